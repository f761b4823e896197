-- The name of this filling of the database: it vanishes with everything else, and another comes then. KEYS: epoch.
if redis.call('EXISTS', KEYS[1]) == 0 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[1], now[1] .. '.' .. now[2])
end
return redis.call('GET', KEYS[1])
