-- The replicas that live by this server's clock, each followed by its record. KEYS: replicas.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local kept, living = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #kept, 2 do
  local expiry, record = string.match(kept[i + 1], '^(%d+):(.*)$')
  if tonumber(expiry) > now then
    living[#living + 1] = kept[i]
    living[#living + 1] = record
  end
end
return living
