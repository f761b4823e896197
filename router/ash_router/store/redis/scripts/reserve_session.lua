-- Give a session name to a sandbox. In the hash of one owner and scope: n is the last number given, h:<session> the
-- sandbox that holds a name, s:<sandbox> the name that it got last, c:<number> a number beyond n that was chosen.
-- KEYS: names, epoch. ARGV: wanted name ('' for the next number), sandbox, a number that was given already, the filling
-- that is trusted ('' for any).
-- Returns {1, name, last number}, {0, holder} where another has the name, or {-1} where the database lost what it held
-- and is not filled again yet.
if ARGV[4] ~= '' and filling(KEYS[2]) ~= ARGV[4] then
  return {-1}
end
local names, wanted, sandbox = KEYS[1], ARGV[1], ARGV[2]
local last = math.max(tonumber(redis.call('HGET', names, 'n') or '0'), tonumber(ARGV[3]))
if wanted == '' then
  local mine = redis.call('HGET', names, 's:' .. sandbox)
  if mine then
    return {1, mine, last}
  end
  repeat
    last = last + 1
    local taken = redis.call('HDEL', names, 'c:' .. string.format('%.0f', last))
  until taken == 0
  redis.call('HSET', names, 'n', string.format('%.0f', last))
  wanted = 'sb' .. string.format('%.0f', last)
else
  local holder = redis.call('HGET', names, 'h:' .. wanted)
  if holder and holder ~= sandbox then
    return {0, holder}
  end
  local number = string.match(wanted, '^sb([1-9]%d*)$')
  if number and tonumber(number) > last then
    redis.call('HSET', names, 'c:' .. number, '1')
  end
end
redis.call('HSET', names, 'h:' .. wanted, sandbox, 's:' .. sandbox, wanted)
return {1, wanted, last}
