-- Record when sandboxes that have a route were last called, never backwards. While the database is being filled again
-- a route may not be back yet, so that all are recorded; what turns out to have none is removed once it is filled.
-- KEYS: routes, calls, epoch. ARGV: the restored epoch, then sandbox and time, again and again.
local refilling = ARGV[1] ~= '' and current_epoch(KEYS[3]) ~= ARGV[1]
for index = 2, #ARGV, 2 do
  if refilling or redis.call('HEXISTS', KEYS[1], ARGV[index]) == 1 then
    redis.call('ZADD', KEYS[2], 'GT', ARGV[index + 1], ARGV[index])
  end
end
if not refilling and redis.call('ZCARD', KEYS[2]) > redis.call('HLEN', KEYS[1]) then
  for _, sandbox in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    if redis.call('HEXISTS', KEYS[1], sandbox) == 0 then
      redis.call('ZREM', KEYS[2], sandbox)
    end
  end
end
return 1
