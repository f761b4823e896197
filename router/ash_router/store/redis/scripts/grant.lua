-- Take a lease that nobody holds, or that this holder has. Times are microseconds of this server.
-- KEYS: lease. ARGV: holder, time to live. Returns {1, token, expiry}, or {0, holder} where another has it.
-- Tokens are times, so that they grow even where the last one was forgotten. The lease outlives its expiry for a
-- minute, so that they also grow where the clock was set back a little.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local holder, token, expiry = unpack(redis.call('HMGET', KEYS[1], 'holder', 'token', 'expiry'))
local wanted = now + tonumber(ARGV[2])
if holder and tonumber(expiry) > now then
  if holder ~= ARGV[1] then
    return {0, holder}
  end
  expiry = math.max(tonumber(expiry), wanted)
else
  token = math.max(now, tonumber(token or '0') + 1)
  expiry = wanted
end
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'token', string.format('%.0f', token),
  'expiry', string.format('%.0f', expiry))
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', (expiry - now) / 1000 + 60000))
return {1, string.format('%.0f', token), string.format('%.0f', expiry)}
