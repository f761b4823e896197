-- Keep a text unless one of its name is there; drop what is over its time, and the oldest while there are too many.
-- KEYS: texts, when each ends on this server's clock, bytes of all. ARGV: name, text, most, most bytes, microseconds.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local function drop(name)
  redis.call('DECRBY', KEYS[3], redis.call('HSTRLEN', KEYS[1], name))
  redis.call('HDEL', KEYS[1], name)
  redis.call('ZREM', KEYS[2], name)
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now))) do
  drop(name)
end
if #ARGV[2] > tonumber(ARGV[4]) or redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then
  return 0
end
redis.call('ZADD', KEYS[2], string.format('%.0f', now + tonumber(ARGV[5])), ARGV[1])
local size = redis.call('INCRBY', KEYS[3], #ARGV[2])
while redis.call('ZCARD', KEYS[2]) > tonumber(ARGV[3]) or size > tonumber(ARGV[4]) do
  drop(redis.call('ZRANGE', KEYS[2], 0, 0)[1])
  size = tonumber(redis.call('GET', KEYS[3]))
end
local left = math.max(redis.call('PTTL', KEYS[2]), math.ceil(tonumber(ARGV[5]) / 1000))
for _, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, string.format('%.0f', left))
end
return 1
