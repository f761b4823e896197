-- Keep a ticket for a sandbox; drop those whose time is over, and taken ones beyond the last.
-- KEYS: tickets (hash -> text), when each ends on this server's clock, those that are taken by when.
-- ARGV: hash, text, microseconds, most, most taken.
local now = server_micros()
local function drop(hashes)
  for _, hash in ipairs(hashes) do
    redis.call('HDEL', KEYS[1], hash)
    redis.call('ZREM', KEYS[2], hash)
    redis.call('ZREM', KEYS[3], hash)
  end
end
drop(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now)))
drop(redis.call('ZRANGE', KEYS[3], 0, -tonumber(ARGV[5]) - 1))
local unused = redis.call('HLEN', KEYS[1]) - redis.call('ZCARD', KEYS[3])
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 and unused >= tonumber(ARGV[4]) then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ':' .. ARGV[2])
redis.call('ZADD', KEYS[2], string.format('%.0f', now + tonumber(ARGV[3])), ARGV[1])
local left = math.max(redis.call('PTTL', KEYS[2]), math.ceil(tonumber(ARGV[3]) / 1000))
for _, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, string.format('%.0f', left))
end
return 1
