-- Restart the lease of an open run, and say how it stands; put it back where nothing is known of it.
-- KEYS: runs, leases, names, counts, ends, ended, epoch. ARGV: run, record to put back ('' for none), the restored epoch
-- ('' where only what was lost is put back), most of the owner and of the hive ('' for any).
-- Returns {1, state, left, record}, {0} where it is unknown, {2, which} where there are too many, or {-1} where the
-- database lost what it held and is not filled again yet.
local keys = {runs = KEYS[1], leases = KEYS[2], names = KEYS[3], counts = KEYS[4], ends = KEYS[5], ended = KEYS[6]}

local now, id = server_micros(), ARGV[1]
local found = standing_of_run(keys, id, now)
if not found then
  if ARGV[2] == '' then
    return {current_epoch(KEYS[7]) == ARGV[3] and 0 or -1}
  end
  local run = cjson.decode(ARGV[2])
  local full = ARGV[4] ~= '' and full_of_runs(keys, run.owner, ARGV[4], ARGV[5])
  if full then
    return {2, full}
  end
  open_run(keys, id, ARGV[2], run, now)
elseif found[1] == 'open' and ARGV[3] ~= '' then
  local lease = cjson.decode(found[3]).lease_seconds
  redis.call('ZADD', keys.leases, string.format('%.0f', now + lease * 1000000), id)
end
return {1, unpack(standing_of_run(keys, id, now))}
