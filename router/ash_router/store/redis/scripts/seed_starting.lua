-- Write the seed's hash of a sandbox that has no route yet.
-- ARGV: seed uuid, host and port ('' where there is none), seconds to keep it.
if redis.pcall('EXISTS', 'sandbox:' .. ARGV[1]) == 0 then
  tell_seed(ARGV[1], 'starting', ARGV[2], ARGV[3])
  redis.pcall('EXPIRE', 'sandbox:' .. ARGV[1], ARGV[4])
end
return 0
