-- The name of the present filling. KEYS: epoch.
return filling(KEYS[1])
