-- Bind an idempotency key to the first sandbox that comes, and say which that was. KEYS: key. ARGV: sandbox.
redis.call('SET', KEYS[1], ARGV[1], 'NX')
return redis.call('GET', KEYS[1])
