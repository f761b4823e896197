-- Give a session name to a sandbox. In the hash of one owner and scope: n is the last number given, h:<session> the
-- sandbox that holds a name, s:<sandbox> the name that it got last, c:<number> a number beyond n that was chosen, k how
-- many of those there are.
-- With its first name a sandbox takes one of the places of its owner and of the hive, which are counted; until it has a
-- route it is counted as starting, too, unless it is restored.
-- KEYS: names, epoch, places, counts, idle, starting, starts, runs. ARGV: wanted name ('' for the next number), sandbox, a
-- number that was given already, the restored epoch ('' for any), owner, scope, most places of the owner,
-- most of the hive, most that start of the owner ('' for any), '1' where it is restored, most chosen numbers,
-- the run that it is spawned in ('' for none).
-- Returns {1, name, last number}, {0, holder} where another has the name, {2, which} where all places are taken (of the
-- 'owner', the 'hive', or its 'starting' ones), {3} where its run is not open, or
-- {-1} where the database lost what it held and is not filled again yet.

-- Let the count go on behind the lowest of the chosen numbers, and forget these.
local function pass_by_chosen(names, count)
  local numbers = {}
  for _, field in ipairs(redis.call('HKEYS', names)) do
    numbers[#numbers + 1] = tonumber(string.match(field, '^c:(%d+)$'))
  end
  table.sort(numbers)
  for index = 1, count do
    redis.call('HDEL', names, 'c:' .. string.format('%.0f', numbers[index]))
  end
  redis.call('HINCRBY', names, 'k', -count)
  redis.call('HSET', names, 'n', string.format('%.0f', numbers[count]))
  return numbers[count]
end

if ARGV[4] ~= '' and current_epoch(KEYS[2]) ~= ARGV[4] then
  return {-1}
end
if ARGV[12] ~= '' and redis.call('HEXISTS', KEYS[8], ARGV[12]) == 0 then
  return {3}
end
local names, wanted, sandbox = KEYS[1], ARGV[1], ARGV[2]
local full
if redis.call('HEXISTS', KEYS[3], sandbox) == 0 then
  if ARGV[7] ~= '' and tonumber(redis.call('HGET', KEYS[4], ARGV[5]) or '0') >= tonumber(ARGV[7]) then
    full = {2, 'owner'}
  elseif ARGV[9] ~= '' and tonumber(redis.call('HGET', KEYS[7], ARGV[5]) or '0') >= tonumber(ARGV[9]) then
    full = {2, 'starting'}
  elseif ARGV[8] ~= '' and redis.call('HLEN', KEYS[3]) >= tonumber(ARGV[8]) then
    full = {2, 'hive'}
  end
end
local last = math.max(tonumber(redis.call('HGET', names, 'n') or '0'), tonumber(ARGV[3]))
if wanted == '' then
  local mine = redis.call('HGET', names, 's:' .. sandbox)
  if mine then
    return {1, mine, last}
  end
  if full then
    return full
  end
  repeat
    last = last + 1
    local taken = redis.call('HDEL', names, 'c:' .. string.format('%.0f', last))
    if taken == 1 then
      redis.call('HINCRBY', names, 'k', -1)
    end
  until taken == 0
  redis.call('HSET', names, 'n', string.format('%.0f', last))
  wanted = 'sb' .. string.format('%.0f', last)
else
  local holder = redis.call('HGET', names, 'h:' .. wanted)
  if holder and holder ~= sandbox then
    return {0, holder}
  end
  if full then
    return full
  end
  local number = string.match(wanted, '^sb([1-9]%d*)$')
  if number and tonumber(number) > last then
    local chosen = redis.call('HSET', names, 'c:' .. number, '1')
    if chosen == 1 and redis.call('HINCRBY', names, 'k', 1) > tonumber(ARGV[11]) then
      last = pass_by_chosen(names, math.floor(tonumber(ARGV[11]) / 2))
    end
  end
end
redis.call('ZREM', KEYS[5], names)
redis.call('HSET', names, 'h:' .. wanted, sandbox, 's:' .. sandbox, wanted)
if redis.call('HSETNX', KEYS[3], sandbox, cjson.encode({ARGV[5], ARGV[6], wanted})) == 1 then
  redis.call('HINCRBY', KEYS[4], ARGV[5], 1)
  if ARGV[10] == '' then
    redis.call('HSET', KEYS[6], sandbox, ARGV[5])
    redis.call('HINCRBY', KEYS[7], ARGV[5], 1)
  end
end
return {1, wanted, last}
