-- The texts that are not over their time, each after its name, the oldest first.
-- KEYS: texts, when each ends on this server's clock, bytes of all. ARGV: the name of the one that is wanted ('' for all).
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local names = {ARGV[1]}
if ARGV[1] == '' then
  names = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. string.format('%.0f', now), '+inf')
elseif tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or '0') <= now then
  return {}
end
local found = {}
for _, name in ipairs(names) do
  found[#found + 1] = name
  found[#found + 1] = redis.call('HGET', KEYS[1], name)
end
return found
