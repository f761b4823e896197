"""The plan of a launch: what is started, and what surrounds it. Plain data that says nothing of how it is done."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

__all__ = ["Identity", "Mount", "Plan", "Subordinate"]

_Usual = Literal[
    "bind", "folder", "tmpfs", "file", "covered", "masked", "directory", "link", "proc", "devices", "read_only"
]
_OfMachines = Literal["writable", "kept", "pinned"]
Kind = _Usual | _OfMachines


class Mount(NamedTuple):
    """One thing in a sandbox's file system. They are made in order, each over those before it."""

    kind: Kind
    """`bind`: a file or directory of the host, read-only. `folder`: one that is written to as it is, by the launcher's
    own user; a plan with users of its own has none. `tmpfs`: an empty place to write to. `file`: a file with
    `content`. `covered`: read-only `content` over a file that is there. `masked`: an empty device over a file that is
    there. `directory`: an empty one. `link`: a symbolic link to `source`. `proc`, `devices`: such file systems of the
    sandbox's own. `read_only`: what is at `target` by then cannot be written to any more. `writable`: a directory of
    the host whose owners are users of the sandbox; what is written there stays in the sandbox, in the space of
    `Plan.writable_bytes`. `kept`: an empty place to write to, as `tmpfs`, that snapshots have with what is `writable`.
    `pinned`: a directory of a writable root that nobody inside can move, replace or remove."""
    target: str
    """The path inside."""
    source: str = ""
    content: bytes = b""
    size: int | None = None
    """Of a `tmpfs` or what is `kept`, in bytes; None is as much as memory allows."""
    mode: str | None = None
    """Permissions in octal, such as `0755`; None is the launcher's choice."""
    optional: bool = False
    """Whether a `bind` is left out where the host has no such file."""
    overlay: str | None = None
    """A directory of the host, `source` itself or above it, that is shown through an overlay with a name and inodes of
    its own: a sandbox then learns neither where `source` lies nor who else uses it. None: it is shared as it is."""
    sealed: bool = False
    """Whether device nodes of the host keep their mode, owner and times, whatever is done to them inside."""

    def to_json(self) -> dict[str, Any]:
        given = {name: value for name, default in _DEFAULTS if (value := getattr(self, name)) != default}
        if self.content:
            given["content"] = base64.b64encode(self.content).decode()
        return given

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Mount:
        content = given.get("content")
        return cls(**given) if content is None else cls(**dict[str, Any](given, content=base64.b64decode(content)))


_DEFAULTS = tuple((name, Mount._field_defaults.get(name)) for name in Mount._fields)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the processes are, to themselves."""

    uid: int = 1000
    gid: int = 1000
    host_name: str = "sandbox"
    users: int = 0
    """How many users there are inside, from 0 on. 0: there is `uid` alone, who is the launcher's own user outside."""
    first_user: int | None = None
    """What user 0 is on the host; the keeper says it, as no other sandbox may have one of them."""


class Subordinate(NamedTuple):
    """Where an ordinary user's sandboxes have their users from: those that are subordinate to it, or nowhere."""

    first_user: int = 0
    """The first of the host's users that are its subordinates; it owns the files that roots begin as."""
    first_group: int = 0
    size: int = 0
    """How many there are, of users and of groups alike. 0: root inside is the hive's own user."""
    runs: tuple[tuple[int, int], ...] = ((0, 1),)
    """What a sandbox's range is inside: the first number of each run, and how many follow from it on."""
    owner: int = 0
    """The number inside of the owner of the files that roots begin as, the same user of the host in all sandboxes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a launcher starts.

    `@fd:NAME@` as a whole word of the command or value of the environment becomes the number of one of `descriptors`.
    """

    command: tuple[str, ...]
    """Of the main process, which the sandbox's first process starts."""
    python: str
    """The interpreter inside that runs the first process."""
    loader: tuple[str, ...] = ()
    """What starts it: the loader inside with its options. None: the one that the interpreter names."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    directory: str = "/"
    """Where the main process starts, inside."""
    mounts: tuple[Mount, ...] = ()
    own_directories: tuple[str, ...] = ()
    """Directories of the host that are made before, and removed after with all that is in the first."""
    identity: Identity = Identity()
    rlimits: Mapping[str, int] = field(default_factory=dict[str, int])
    """Limits of each process, by the names that follow `RLIMIT_`."""
    capabilities: tuple[str, ...] = ()
    """What its processes may have in their own user namespace, by the names that follow `CAP_`."""
    user_block: tuple[int, int] = (0, 0)
    """The first of the host's users that sandboxes are given, and how many there are; the keeper chooses."""
    subordinate: Subordinate | None = None
    """For a plan with users of its own that an ordinary user launches; None: root does."""
    user_lock: str | None = None
    """The file by which ranges of users are locked; None: the host's."""
    in_use: tuple[str, ...] = ()
    """Directories of the host that nobody may remove as long as it runs; the keeper locks them."""
    writable_bytes: int | None = None
    """What all that is written to `writable` mounts may take, in memory; None is as much as memory allows."""
    snapshots: bool = False
    """Whether what it writes to `writable` and `kept` mounts can be frozen; the keeper gives it `layers` then."""
    processes: int = 0
    """A limit on processes that the first one sets in its own user namespace; 0 is none."""
    group: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Limits of the sandbox's control group, as `Group.create` takes them, and the `controllers` that must hold."""
    system_call_filter: bytes | None = None
    """A classic BPF program for seccomp."""
    network: Mapping[str, Any] | None = None
    """What the egress proxy lets out, its `policy` and `limits`; None: there is no way out."""
    descriptors: Mapping[str, int] = field(default_factory=dict[str, int])
    """Open descriptors that the main process inherits. Whoever launches adds them: they are not in the JSON."""
    group_entrances: tuple[str, ...] = ()
    """Files to write `0` to in order to join the control group, before anything else. Not in the JSON, either."""

    hold: int | None = None
    """A descriptor that stays open as long as anything of it runs, out of reach for all inside. Not in the JSON."""
    layers: tuple[Mapping[str, int], ...] = ()
    """File systems that it stands on, by the names of its `spaces`, each a descriptor. The first is the lowest, and
    only the last is written to. Not in the JSON."""

    @property
    def spaces(self) -> Mapping[str, int | None]:
        """The places whose sizes are bounded each by itself, with their bytes: `/`, and what is `kept`."""
        return {"/": self.writable_bytes} | {it.target: it.size for it in self.mounts if it.kind == "kept"}

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` makes a plan of again, without what is of one launch."""
        plain = {it.name: getattr(self, it.name) for it in fields(self) if it.name not in _OF_THE_LAUNCH}
        code = self.system_call_filter
        return plain | {
            "mounts": [mount.to_json() for mount in self.mounts],
            "identity": {it.name: getattr(self.identity, it.name) for it in fields(self.identity)},
            "system_call_filter": None if code is None else base64.b64encode(code).decode(),
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Plan:
        code = given["system_call_filter"]
        made: dict[str, Any] = {
            "command": tuple(given["command"]),
            "loader": tuple(given["loader"]),
            "mounts": tuple(Mount.from_json(mount) for mount in given["mounts"]),
            "own_directories": tuple(given["own_directories"]),
            "capabilities": tuple(given["capabilities"]),
            "user_block": tuple(given["user_block"]),
            "subordinate": _subordinate(given["subordinate"]),
            "in_use": tuple(given["in_use"]),
            "identity": Identity(**given["identity"]),
            "system_call_filter": None if code is None else base64.b64decode(code),
        }
        return cls(**dict[str, Any](given, **made))


def _subordinate(given: list[Any] | None) -> Subordinate | None:
    if given is None:
        return None
    *numbers, runs, owner = given
    return Subordinate(*numbers, runs=tuple((first, count) for first, count in runs), owner=owner)


_OF_THE_LAUNCH = ("descriptors", "group_entrances", "hold", "layers")
