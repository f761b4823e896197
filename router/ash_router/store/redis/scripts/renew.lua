-- Push the expiry of a lease that is still this one. KEYS: lease. ARGV: holder, token, time to live.
-- Returns its expiry, or '' where it is over or another's.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local holder, token, expiry = unpack(redis.call('HMGET', KEYS[1], 'holder', 'token', 'expiry'))
if holder ~= ARGV[1] or token ~= ARGV[2] or tonumber(expiry) <= now then
  return ''
end
local pushed = string.format('%.0f', math.max(tonumber(expiry), now + tonumber(ARGV[3])))
redis.call('HSET', KEYS[1], 'expiry', pushed)
redis.call('PEXPIRE', KEYS[1], string.format('%.0f', (tonumber(pushed) - now) / 1000 + 60000))
return pushed
