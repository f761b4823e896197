-- Let a name go if this sandbox holds it. KEYS: names. ARGV: session, sandbox.
if redis.call('HGET', KEYS[1], 'h:' .. ARGV[1]) == ARGV[2] then
  redis.call('HDEL', KEYS[1], 'h:' .. ARGV[1])
  if redis.call('HGET', KEYS[1], 's:' .. ARGV[2]) == ARGV[1] then
    redis.call('HDEL', KEYS[1], 's:' .. ARGV[2])
  end
end
return 1
