-- Stands before every script. Names the present filling of the database: after a flush the epoch is another one, and
-- after a restart or a failover, which may have lost the last writes, the run of the server is.
local function filling(epoch)
  if redis.call('EXISTS', epoch) == 0 then
    local now = redis.call('TIME')
    redis.call('SET', epoch, now[1] .. '.' .. now[2])
  end
  local said = redis.pcall('INFO', 'server')
  local run = type(said) == 'string' and string.match(said, 'run_id:(%x+)') or ''
  return redis.call('GET', epoch) .. '/' .. run
end
