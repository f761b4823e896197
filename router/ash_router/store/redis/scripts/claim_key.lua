-- Bind an idempotency key to the first sandbox that comes, and say which that was.
-- KEYS: key, epoch. ARGV: sandbox, the restored epoch ('' for any).
-- Returns {1, sandbox}, or {-1} where the database lost what it held and is not filled again yet.
if ARGV[2] ~= '' and current_epoch(KEYS[2]) ~= ARGV[2] then
  return {-1}
end
redis.call('SET', KEYS[1], ARGV[1], 'NX')
return {1, redis.call('GET', KEYS[1])}
