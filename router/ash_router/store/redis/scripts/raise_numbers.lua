-- Never give again the session numbers up to these. KEYS: names of several owners and scopes. ARGV: their numbers.
for index, names in ipairs(KEYS) do
  if tonumber(redis.call('HGET', names, 'n') or '0') < tonumber(ARGV[index]) then
    redis.call('HSET', names, 'n', ARGV[index])
  end
end
return 1
