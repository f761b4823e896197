-- End a run for its owner. KEYS: runs, leases, names, counts, ends, ended. ARGV: run.
local keys = {runs = KEYS[1], leases = KEYS[2], names = KEYS[3], counts = KEYS[4], ends = KEYS[5], ended = KEYS[6]}

end_run(keys, ARGV[1], 'destroyed', server_micros())
return 1
