-- The current epoch of the database, and the server's time in seconds and microseconds. KEYS: epoch.
local time = redis.call('TIME')
return {current_epoch(KEYS[1]), time[1], time[2]}
