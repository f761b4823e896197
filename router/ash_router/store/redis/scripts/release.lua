-- Give a lease back if it is still this one; its token stays known for a minute. KEYS: lease. ARGV: holder, token.
local holder, token = unpack(redis.call('HMGET', KEYS[1], 'holder', 'token'))
if holder == ARGV[1] and token == ARGV[2] then
  redis.call('HSET', KEYS[1], 'expiry', '0')
  redis.call('PEXPIRE', KEYS[1], 60000)
end
return 1
