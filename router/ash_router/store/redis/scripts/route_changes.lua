-- What changed among the routes since a version, or all of them where that is not known any more.
-- KEYS: routes, order, changed, version, epoch. ARGV: epoch and version known ('' and 0: none), changes remembered.
-- Returns epoch, version, which ('some', 'all' or 'anew'), sandboxes, and their records in the same order.
local now = current_epoch(KEYS[5])
local version = tonumber(redis.call('GET', KEYS[4]) or '0')
local since = tonumber(ARGV[2])
local which = 'all'
if ARGV[1] ~= '' then
  if ARGV[1] ~= now then
    which = 'anew'
  elseif since == version or redis.call('ZCARD', KEYS[3]) < tonumber(ARGV[3]) then
    which = 'some'
  elseif since >= tonumber(redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')[2]) - 1 then
    which = 'some'
  end
end
local ids
if which == 'some' then
  ids = redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. ARGV[2], '+inf')
else
  ids = redis.call('ZRANGE', KEYS[2], 0, -1)
end
local records = {}
for first = 1, #ids, 1000 do -- unpack has a limit
  local chunk = redis.call('HMGET', KEYS[1], unpack(ids, first, math.min(first + 999, #ids)))
  for index = 1, math.min(1000, #ids - first + 1) do
    records[#records + 1] = chunk[index]
  end
end
return {now, string.format('%.0f', version), which, ids, records}
