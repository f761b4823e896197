-- Open a run, or renew the open one of its name and idempotency key.
-- KEYS: runs, leases, names, counts, ends, ended, epoch. ARGV: run, record, the restored epoch, most of the owner, most
-- of the hive, for how many microseconds renewals came, ended runs that are remembered, and for how many microseconds.
-- Returns {1, state, left, record}, {0, left, record} where another has the name, {2, which} where there are too many, or
-- {-1} where the database lost what it held and is not filled again yet.
local keys = {runs = KEYS[1], leases = KEYS[2], names = KEYS[3], counts = KEYS[4], ends = KEYS[5], ended = KEYS[6]}

if current_epoch(KEYS[7]) ~= ARGV[3] then
  return {-1}
end
local now, run = server_micros(), cjson.decode(ARGV[2])
end_overdue_runs(keys, now, ARGV[6])
forget_ended_runs(keys, now, ARGV[7], ARGV[8])
local id = redis.call('HGET', keys.names, name_of_run(run))
if id then
  local found = standing_of_run(keys, id, now)
  local key = cjson.decode(found[3]).key
  if key == cjson.null or key ~= run.key then
    return {0, found[2], found[3]}
  end
  redis.call('ZADD', keys.leases, string.format('%.0f', now + run.lease_seconds * 1000000), id)
else
  local full = full_of_runs(keys, run.owner, ARGV[4], ARGV[5])
  if full then
    return {2, full}
  end
  id = ARGV[1]
  open_run(keys, id, ARGV[2], run, now)
end
return {1, unpack(standing_of_run(keys, id, now))}
