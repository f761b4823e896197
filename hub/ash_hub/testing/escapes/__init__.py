"""What a hostile sandbox tries, as data: every backend that promises isolation is held to it.

attempt.py       what an attempt is, and how it tells what became of it
bait.py          what there is on the host for it to find
trial.py         an attempt carried out in a sandbox
surroundings.py  attempts on the host's files, processes, sockets, names, and on other sandboxes
kernel.py        attempts on interfaces of the kernel
floods.py        attempts to use more than was given
ways_out.py      attempts through the egress proxy
machine.py       attempts of root inside, where it is
shared.py        attempts on what sandboxes share with the host and each other
lies.py          attempts of a server on the hub that asks it
"""

from ash_hub.testing.escapes.attempt import Attempt, Outcome, Verdict
from ash_hub.testing.escapes.bait import Bait, lay_bait
from ash_hub.testing.escapes.floods import FLOODS
from ash_hub.testing.escapes.kernel import KERNEL
from ash_hub.testing.escapes.lies import LIES
from ash_hub.testing.escapes.machine import MACHINE
from ash_hub.testing.escapes.shared import SHARED
from ash_hub.testing.escapes.surroundings import SURROUNDINGS
from ash_hub.testing.escapes.trial import Prison, Ran, not_made, spec_for, try_to_escape
from ash_hub.testing.escapes.ways_out import WAYS_OUT

__all__ = [
    "ATTEMPTS",
    "Attempt",
    "Bait",
    "Outcome",
    "Prison",
    "Ran",
    "Verdict",
    "lay_bait",
    "not_made",
    "spec_for",
    "try_to_escape",
]

ATTEMPTS: tuple[Attempt, ...] = (*SURROUNDINGS, *MACHINE, *KERNEL, *SHARED, *WAYS_OUT, *LIES, *FLOODS)
"""All of them; those that may end their own sandbox say so."""
