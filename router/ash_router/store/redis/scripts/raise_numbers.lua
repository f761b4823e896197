-- Never give again the session numbers up to these.
-- KEYS: idle, then names of several owners and scopes. ARGV: their numbers.
local time = redis.call('TIME')
local now = string.format('%.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
for index, number in ipairs(ARGV) do
  local names = KEYS[index + 1]
  if tonumber(redis.call('HGET', names, 'n') or '0') < tonumber(number) then
    redis.call('HSET', names, 'n', number)
  end
  if is_idle(names) then
    redis.call('ZADD', KEYS[1], 'NX', now, names)
  end
end
return 1
