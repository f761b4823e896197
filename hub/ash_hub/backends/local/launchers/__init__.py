"""Ways to start a sandbox's processes: `base.py` is the interface, `bubblewrap.py` and `unsafe.py` the choices."""
