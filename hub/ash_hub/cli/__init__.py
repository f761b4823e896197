"""The commands of `ash` that need a hive's own code, found by the entry points `ash.commands`.

Each imports what it needs when it runs, so that `--help`, and `up --stdio` beside a hive that runs, start fast.
"""

from ash_hub.cli.doctor import doctor
from ash_hub.cli.up import up

__all__ = ["doctor", "up"]
