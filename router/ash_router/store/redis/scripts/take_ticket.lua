-- Give a ticket's text to the first who takes it, also when he asks again; nil to everybody else.
-- KEYS: as put_ticket.lua. ARGV: hash, by whom.
local now = server_micros()
local found = redis.call('HGET', KEYS[1], ARGV[1])
local ends = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not found or not ends or tonumber(ends) <= now then
  return false
end
local by, text = string.match(found, '^([^:]*):(.*)$')
if by == '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ':' .. text)
  redis.call('ZADD', KEYS[3], string.format('%.0f', now), ARGV[1])
  redis.call('PEXPIRE', KEYS[3], math.max(redis.call('PTTL', KEYS[2]), 1))
elseif by ~= ARGV[2] then
  return false
end
return text
