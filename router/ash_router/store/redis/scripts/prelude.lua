-- Stands before every script. The epoch changes whenever writes may have been lost: a flush drops the key, so a new one
-- is set; a restart or a failover changes the run of the server.
local function current_epoch(epoch)
  if redis.call('EXISTS', epoch) == 0 then
    local now = redis.call('TIME')
    redis.call('SET', epoch, now[1] .. '.' .. now[2])
  end
  local said = redis.pcall('INFO', 'server')
  local run = type(said) == 'string' and string.match(said, 'run_id:(%x+)') or ''
  return redis.call('GET', epoch) .. '/' .. run
end

-- Whether nobody holds a name of one owner and scope, and only its numbers are left, of which k counts the chosen.
local function is_idle(names)
  local chosen = redis.call('HGET', names, 'k')
  local numbers = redis.call('HEXISTS', names, 'n') + (chosen and 1 + tonumber(chosen) or 0)
  return numbers > 0 and redis.call('HLEN', names) == numbers
end

-- Count a sandbox no more among those of its owner that start.
local function started(starting, starts, sandbox)
  local owner = redis.call('HGET', starting, sandbox)
  if owner then
    redis.call('HDEL', starting, sandbox)
    if redis.call('HINCRBY', starts, owner, -1) <= 0 then
      redis.call('HDEL', starts, owner)
    end
  end
end

-- Write the hash by which the seed's gateway finds a sandbox. A user of Redis who may not is no reason to fail: callers
-- of the hive itself need no such hash.
local function tell_seed(uuid, status, host, port)
  if uuid ~= '' and host ~= '' then
    local key = 'sandbox:' .. uuid
    redis.pcall('HSET', key, 'uuid', uuid, 'host', host, 'port', port, 'status', status)
    redis.pcall('PERSIST', key)
  end
end
