-- Say that a replica lives. KEYS: replicas. ARGV: replica, record, time to live in microseconds, how many are kept.
-- Each is kept as its expiry on this server's clock, a colon, and its record; what has expired is removed here.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now + tonumber(ARGV[3])) .. ':' .. ARGV[2])
local kept = redis.call('HGETALL', KEYS[1])
local living, last = {}, now
for i = 1, #kept, 2 do
  local expiry = tonumber(string.match(kept[i + 1], '^(%d+):'))
  if expiry <= now then
    redis.call('HDEL', KEYS[1], kept[i])
  else
    living[#living + 1] = {expiry, kept[i]}
    last = math.max(last, expiry)
  end
end
if #living > tonumber(ARGV[4]) then
  table.sort(living, function(one, other) return one[1] < other[1] end)
  for i = 1, #living - tonumber(ARGV[4]) do
    redis.call('HDEL', KEYS[1], living[i][2])
  end
end
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((last - now) / 1000)))
return 1
