-- Write the seed's hashes of routes again that somebody has removed.
-- KEYS: routes. ARGV: host and port ('' where there is none), then sandbox and seed uuid of each.
for at = 3, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[at]) == 1 and redis.pcall('EXISTS', 'sandbox:' .. ARGV[at + 1]) == 0 then
    tell_seed(ARGV[at + 1], 'ready', ARGV[1], ARGV[2])
  end
end
return 0
