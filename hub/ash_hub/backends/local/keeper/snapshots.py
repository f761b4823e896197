"""Snapshots in the keeper: frozen layers, who has them, and when they are given up.

A layer is given up when no snapshot has it and no sandbox stands on it; all of them with the keeper, whatever ends it.
An owner is charged for each of its layers once, as long as it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .launchers.layers import Spaces, new_space, used_bytes

__all__ = ["MOST_LAYERS", "Layer", "Snapshot", "SnapshotProblem", "Snapshots", "close_spaces", "new_spaces", "size_of"]

MOST_LAYERS = 32
"""On which a sandbox may stand: each is one more place to look for every file that is not found above."""


class SnapshotProblem(Exception):
    """A snapshot cannot be taken or used; the message says why and what to do."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What a sandbox wrote until it was frozen. Nobody writes to it any more."""

    owner: str
    spaces: Spaces
    size: int
    """In bytes."""
    image: str = ""
    """The one that its sandbox began as, as in a plan."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Files as they were: a layer, over those that its sandbox stood on."""

    id: str
    owner: str
    layers: tuple[Layer, ...]
    """The lowest first."""
    record: Mapping[str, Any]
    """The hub's word on it, stored unread."""
    expiry: asyncio.TimerHandle

    def view(self) -> dict[str, Any]:
        left = max(0.0, self.expiry.when() - asyncio.get_running_loop().time())
        own = {"id": self.id, "owner": self.owner, "bytes": self.layers[-1].size, "layers": len(self.layers)}
        return {**own, "left_seconds": left, "record": self.record}


class Snapshots:
    """All snapshots of a hive, and their layers.

    Args:
        in_use: Returns the layers that sandboxes stand on.
        on_expired: Called when one is gone whose time is over.
    """

    def __init__(self, in_use: Callable[[], Iterable[Layer]], on_expired: Callable[[], None]) -> None:
        self._in_use = in_use
        self._on_expired = on_expired
        self._snapshots: dict[str, Snapshot] = {}
        self._layers: set[Layer] = set()
        self._held: list[tuple[Layer, ...]] = []
        self._promised: dict[str, tuple[str, int]] = {}
        """Owner and bytes of those that are being taken."""

    def __len__(self) -> int:
        return len(self._snapshots)

    def views(self) -> list[dict[str, Any]]:
        return [snapshot.view() for snapshot in self._snapshots.values()]

    def layers_of(self, name: str) -> tuple[Layer, ...]:
        """Return the layers of a snapshot.

        Raises:
            SnapshotProblem: There is none of that name.
        """
        snapshot = self._snapshots.get(name)
        if snapshot is None:
            raise SnapshotProblem("no_snapshot", f"there is no snapshot {name}")
        return snapshot.layers

    @contextlib.contextmanager
    def promised(
        self, name: str, owner: str, size: int, layers: tuple[Layer, ...], limits: Mapping[str, int]
    ) -> Generator[None]:
        """Keep room for a snapshot while it is taken, and the layers that it stands on.

        Raises:
            SnapshotProblem: It would be one too many.
        """
        self._require_room(name, owner, size, len(layers) + 1, limits)
        self._promised[name] = owner, size
        try:
            with self.held(layers):
                yield
        finally:
            del self._promised[name]

    @contextlib.contextmanager
    def held(self, layers: tuple[Layer, ...]) -> Generator[None]:
        """Keep layers meanwhile, whatever becomes of their snapshots."""
        self._held.append(layers)
        try:
            yield
        finally:
            self._held.remove(layers)

    def _require_room(self, name: str, owner: str, size: int, depth: int, limits: Mapping[str, int]) -> None:
        """Refuse a snapshot that would be one too many.

        Args:
            depth: How many layers it would have.
            limits: `per_owner`, `hive` (how many), `owner_bytes`, `hive_bytes`.

        Raises:
            SnapshotProblem: It is; the message says what to do.
        """
        if name in self._snapshots or name in self._promised:
            raise SnapshotProblem("exists", f"snapshot {name} exists")
        if depth > MOST_LAYERS:
            why = f"it stands on {depth - 1} snapshots, which is the most: reset it to an earlier one"
            raise SnapshotProblem("too_deep", why)
        owners = [*(it.owner for it in self._snapshots.values()), *(of for of, _ in self._promised.values())]
        whose = {"per_owner": owners.count(owner), "hive": len(owners)}
        for limit, count in whose.items():
            if count >= limits[limit]:
                raise SnapshotProblem(
                    "full", f"there are {count} snapshots, which is the limit ({limit}): remove some"
                )
        layers = self.sweep()
        sizes = [*((it.owner, it.size) for it in layers), *self._promised.values()]
        taken = {"owner_bytes": sum(it for of, it in sizes if of == owner), "hive_bytes": sum(it for _, it in sizes)}
        for limit, there in taken.items():
            if there + size > limits[limit]:
                why = f"it has {size} bytes, and {there} of {limits[limit]} are taken ({limit}): remove some"
                raise SnapshotProblem("full", why)

    def add(self, name: str, layers: Sequence[Layer], record: Mapping[str, Any], seconds: float) -> Snapshot:
        """Keep a snapshot for some time."""
        expiry = asyncio.get_running_loop().call_later(seconds, self._expire, name)
        owner = layers[-1].owner
        self._snapshots[name] = snapshot = Snapshot(name, owner, tuple(layers), record, expiry)
        self._layers |= set(layers)
        return snapshot

    def drop(self, name: str) -> None:
        """Give up a snapshot; idempotent. What sandboxes stand on stays until they have ended."""
        if (snapshot := self._snapshots.pop(name, None)) is not None:
            snapshot.expiry.cancel()
            self.sweep()

    def _expire(self, name: str) -> None:
        self.drop(name)
        self._on_expired()

    def sweep(self) -> set[Layer]:
        """Give up what nobody has, and return the layers that are left."""
        wanted = {layer for snapshot in self._snapshots.values() for layer in snapshot.layers}
        wanted |= {*self._in_use(), *(layer for layers in self._held for layer in layers)}
        for layer in self._layers - wanted:
            close_spaces(layer.spaces)
        self._layers &= wanted
        return self._layers


def new_spaces(sizes: Mapping[str, int | None]) -> dict[str, int]:
    """Return empty file systems to write to.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    made: dict[str, int] = {}
    try:
        for name, size in sizes.items():
            made[name] = new_space(size)
    except OSError:
        close_spaces(made)
        raise
    return made


def size_of(spaces: Spaces) -> int:
    """Return what is written to them, in bytes."""
    return sum(used_bytes(space) for space in spaces.values())


def close_spaces(spaces: Spaces) -> None:
    for descriptor in spaces.values():
        os.close(descriptor)
