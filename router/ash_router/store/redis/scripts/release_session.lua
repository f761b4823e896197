-- Let a name go if this sandbox holds it, and with it the sandbox's place. KEYS: names, places, counts, idle, starting,
-- starts. ARGV: session, sandbox, idle scopes that are remembered, and for how many microseconds.
if redis.call('HGET', KEYS[1], 'h:' .. ARGV[1]) == ARGV[2] then
  redis.call('HDEL', KEYS[1], 'h:' .. ARGV[1])
  if redis.call('HGET', KEYS[1], 's:' .. ARGV[2]) == ARGV[1] then
    redis.call('HDEL', KEYS[1], 's:' .. ARGV[2])
  end
  started(KEYS[5], KEYS[6], ARGV[2])
  local place = redis.call('HGET', KEYS[2], ARGV[2])
  if place then
    redis.call('HDEL', KEYS[2], ARGV[2])
    local owner = cjson.decode(place)[1]
    if redis.call('HINCRBY', KEYS[3], owner, -1) <= 0 then
      redis.call('HDEL', KEYS[3], owner)
    end
  end
  if is_idle(KEYS[1]) then
    local time = redis.call('TIME')
    local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
    redis.call('ZADD', KEYS[4], string.format('%.0f', now), KEYS[1])
    local last = string.format('%.0f', now - tonumber(ARGV[4]))
    local over = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', last, 'LIMIT', 0, 10)
    for _, names in ipairs(redis.call('ZRANGE', KEYS[4], 0, -tonumber(ARGV[3]) - 1)) do
      over[#over + 1] = names
    end
    for _, names in ipairs(over) do
      redis.call('ZREM', KEYS[4], names)
      redis.call('DEL', names)
    end
  end
end
return 1
