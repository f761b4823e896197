-- Take back that a replica lives. KEYS: replicas. ARGV: replica.
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
