-- End the runs whose leases are over, and say how some stand: state, left and record of each, or three times '' where it
-- is unknown. KEYS: runs, leases, names, counts, ends, ended. ARGV: for how many microseconds renewals came, ended runs
-- that are remembered, and for how many microseconds, then the runs.
local keys = {runs = KEYS[1], leases = KEYS[2], names = KEYS[3], counts = KEYS[4], ends = KEYS[5], ended = KEYS[6]}

local now, found = server_micros(), {}
end_overdue_runs(keys, now, ARGV[1])
forget_ended_runs(keys, now, ARGV[2], ARGV[3])
for index = 4, #ARGV do
  for _, said in ipairs(standing_of_run(keys, ARGV[index], now) or {'', '', ''}) do
    found[#found + 1] = said
  end
end
return found
