-- Forget a route, when its sandbox was last called, and its tickets.
-- KEYS: routes, order, changed, version, calls, and the three of put_ticket.lua.
-- ARGV: sandbox, news channel, changes remembered, seed uuid ('' where it is only in the record, if anywhere).
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('DEL', KEYS[6], KEYS[7], KEYS[8])
local record = redis.call('HGET', KEYS[1], ARGV[1])
local uuid = ARGV[4] ~= '' and ARGV[4] or record and cjson.decode(record).alias
if uuid then
  redis.pcall('DEL', 'sandbox:' .. uuid)
end
if not record then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[4]), ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -tonumber(ARGV[3]) - 1)
redis.call('PUBLISH', ARGV[2], ARGV[1])
return 1
