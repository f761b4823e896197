-- The current epoch of the database, the layout of its keys, and the server's time in seconds and microseconds.
-- KEYS: epoch, layout. ARGV: the layout that this release knows; of another one there is no epoch, and nothing changes.
-- Keys without a layout are those of earlier releases, which is layout 1.
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('SET', KEYS[2], redis.call('EXISTS', KEYS[1]) == 1 and '1' or ARGV[1])
end
local layout, time = redis.call('GET', KEYS[2]), redis.call('TIME')
return {layout == ARGV[1] and current_epoch(KEYS[1]) or '', layout, time[1], time[2]}
