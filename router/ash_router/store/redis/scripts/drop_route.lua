-- Forget a route and when its sandbox was last called.
-- KEYS: routes, order, changed, version, calls. ARGV: sandbox, news channel, changes remembered.
redis.call('ZREM', KEYS[5], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then
  return 0
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[4]), ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -tonumber(ARGV[3]) - 1)
redis.call('PUBLISH', ARGV[2], ARGV[1])
return 1
