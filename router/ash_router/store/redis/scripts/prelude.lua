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

local function server_micros()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- Runs: the record of each open one, when its lease is over on this server's clock, the run of each name, how many are
-- open of each owner, and of ended ones how each ended with its record, and when.
local function name_of_run(run)
  return cjson.encode({run.owner, run.scope, run.name})
end

local function open_run(keys, id, text, run, now)
  redis.call('HSET', keys.runs, id, text)
  redis.call('ZADD', keys.leases, string.format('%.0f', now + run.lease_seconds * 1000000), id)
  redis.call('HSETNX', keys.names, name_of_run(run), id)
  redis.call('HINCRBY', keys.counts, run.owner, 1)
end

-- Which limit is reached of those for an owner and for the hive, or nil.
local function full_of_runs(keys, owner, most_of_owner, most_of_hive)
  if tonumber(redis.call('HGET', keys.counts, owner) or '0') >= tonumber(most_of_owner) then
    return 'owner'
  end
  return redis.call('HLEN', keys.runs) >= tonumber(most_of_hive) and 'hive' or nil
end

-- Drop the ended runs that are over their time, and the first to end while there are too many.
local function forget_ended_runs(keys, now, most, micros)
  local last = string.format('%.0f', now - tonumber(micros))
  local over = redis.call('ZRANGEBYSCORE', keys.ended, '-inf', last, 'LIMIT', 0, 100)
  for _, id in ipairs(redis.call('ZRANGE', keys.ended, 0, -tonumber(most) - 1)) do
    over[#over + 1] = id
  end
  for _, id in ipairs(over) do
    redis.call('ZREM', keys.ended, id)
    redis.call('HDEL', keys.ends, id)
  end
end

local function end_run(keys, id, state, now)
  local text = redis.call('HGET', keys.runs, id)
  if not text then
    return
  end
  local run = cjson.decode(text)
  redis.call('HDEL', keys.runs, id)
  redis.call('ZREM', keys.leases, id)
  if redis.call('HGET', keys.names, name_of_run(run)) == id then
    redis.call('HDEL', keys.names, name_of_run(run))
  end
  if redis.call('HINCRBY', keys.counts, run.owner, -1) <= 0 then
    redis.call('HDEL', keys.counts, run.owner)
  end
  redis.call('HSET', keys.ends, id, state .. ':' .. text)
  redis.call('ZADD', keys.ended, string.format('%.0f', now), id)
end

-- End the runs whose leases are over; none counts from before so many microseconds ago.
local function end_overdue_runs(keys, now, quiet)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', keys.leases, '-inf', string.format('%.0f', now), 'LIMIT', 0, 1000)) do
    local text = redis.call('HGET', keys.runs, id)
    if not text then
      redis.call('ZREM', keys.leases, id)
    elseif tonumber(quiet) >= cjson.decode(text).lease_seconds * 1000000 then
      end_run(keys, id, 'over', now)
    end
  end
end

-- How a run stands: its state, what is left of its lease in microseconds, and its record; nil if it is unknown.
local function standing_of_run(keys, id, now)
  local text = redis.call('HGET', keys.runs, id)
  if text then
    local left = math.max(0, tonumber(redis.call('ZSCORE', keys.leases, id) or '0') - now)
    return {'open', string.format('%.0f', left), text}
  end
  local ended = redis.call('HGET', keys.ends, id)
  if ended then
    local state, record = string.match(ended, '^(%l+):(.*)$')
    return {state, '0', record}
  end
  return nil
end
