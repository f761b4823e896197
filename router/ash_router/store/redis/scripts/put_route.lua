-- Keep a route; tell the followers of routes if anything changed. Its sandbox starts no more.
-- KEYS: routes, order, changed, version, starting, starts.
-- ARGV: sandbox, record, news channel, changes remembered, seed uuid, host and port ('' where there is none),
-- version of its shares.
started(KEYS[5], KEYS[6], ARGV[1])
tell_seed(ARGV[5], 'ready', ARGV[6], ARGV[7])
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known == ARGV[2] then
  return 0
end
-- older news of its shares would give back what was revoked
local shares = known and cjson.decode(known).shares
if shares and shares.version > tonumber(ARGV[8]) then
  return 0
end
local version = redis.call('INCR', KEYS[4])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], 'NX', version, ARGV[1])
redis.call('ZADD', KEYS[3], version, ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -tonumber(ARGV[4]) - 1)
redis.call('PUBLISH', ARGV[3], ARGV[1])
return 1
