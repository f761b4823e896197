-- The open runs, the first to be opened first: what is left of each lease in microseconds, and the record.
-- KEYS: runs, leases, names, counts, ends, ended.
local keys = {runs = KEYS[1], leases = KEYS[2], names = KEYS[3], counts = KEYS[4], ends = KEYS[5], ended = KEYS[6]}

local now, found = server_micros(), {}
for _, id in ipairs(redis.call('HKEYS', keys.runs)) do
  local standing = standing_of_run(keys, id, now)
  found[#found + 1] = standing[2]
  found[#found + 1] = standing[3]
end
return found
