-- Keep a route unless one of a later generation is there; tell the followers of routes if anything changed.
-- KEYS: routes, order, changed, version. ARGV: sandbox, generation, record, news channel, changes remembered.
local known = redis.call('HGET', KEYS[1], ARGV[1])
local value = ARGV[2] .. ':' .. ARGV[3]
if known == value then
  return 0
end
if known and tonumber(string.match(known, '^(%d+):')) > tonumber(ARGV[2]) then
  return 0
end
local version = redis.call('INCR', KEYS[4])
redis.call('HSET', KEYS[1], ARGV[1], value)
redis.call('ZADD', KEYS[2], 'NX', version, ARGV[1])
redis.call('ZADD', KEYS[3], version, ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -tonumber(ARGV[5]) - 1)
redis.call('PUBLISH', ARGV[4], ARGV[1])
return 1
