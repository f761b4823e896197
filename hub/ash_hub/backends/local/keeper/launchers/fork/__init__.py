"""The launcher that forks: a process that has imported a recipe and is warm forks each of its sandboxes.

    parents.py   in the keeper: the fork parents, started, watched, replaced and ended; the launcher
    handle.py    in the keeper: one launch, by the channel to the process that was forked for it
    helper.py    the first process of a fork parent's namespaces: prepares mounts, passes launches on, reaps
    parent.py    the fork parent itself, behind walls: loads, warms, forks
    forked.py    what it forks: from a copy of the parent to the first process of a sandbox
    walls.py     namespaces, a root, privileges: what bubblewrap does, from the same plan
    kernel.py    the system calls for it

    keeper -- launch --> helper -- descriptors --> parent -- fork --> sandbox
       '------------------ channel: the plan, and what became of it --------'

The parent never reads a plan: it is sent on a channel of its own to the process that is forked for it. The helper
alone sees the host's directories and may mount; the parent has no capability, no network and no file but what its
recipe needs. Sandboxes are children of the helper, so they outlive the parent; they end with the helper, as with the
keeper.
What runs behind the walls is on the standard library alone, and on nothing of this package but what stands here and
`init.py`.
"""
