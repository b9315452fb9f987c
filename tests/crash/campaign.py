"""Lives recorded and power cuts made of them, until so many have been looked at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from crash import aftermath
from crash.filesystems import Filesystem, states
from crash.lives import FOUNDED, Life, Model, sequences
from crash.powerdisk import Disk, Entry, State
from onlap.snapshots.recorded import Sync


class Campaign:
    """A filesystem, and how its stores are opened.

    Args:
        disk: whose power is cut.
        kind: the filesystem that is made on it.
        sync: of the stores.
        top: an empty directory to mount it at.
        seed: of all that is chosen.

    Attributes:
        disk: see there.
        filesystem: the filesystem.
        states: how many have been looked at.
        checks: how many trees and blobs were compared.
        lost: how many of those were not whole, of which that had not been promised.
        lives: how many were recorded.
    """

    def __init__(self, disk: Disk, kind: str, sync: Sync, top: Path, seed: int) -> None:
        self.disk = disk
        self._sync = sync
        self.rng = random.Random(seed)
        self.filesystem = Filesystem(disk, kind, top)
        disk.keep()
        self._founded: Life | None = None
        self.states = self.checks = self.lost = self.lives = 0

    def run(self, count: int, part: int = 0, parts: int = 1) -> None:
        """Look at so many states: first of a life without a root, then of lives that find one."""
        self.look("build", "settle", "fill", "commit", limit=count // 10)
        self.found_root()
        # What is lost where nothing is synced: a layer that nothing takes along to the disk.
        self.look("settle", "fill", "commit", "prepare", limit=count // 10)
        for verbs in sequences(self.rng, part, parts):
            if self.states >= count:
                break
            self.look(*verbs, limit=min(25, count - self.states))

    def found_root(self) -> None:
        """Make a root with something in it, all of it on the disk; from now on every life begins with it."""
        assert self._founded is None
        self.disk.record()
        with self.filesystem.mounted() as top:
            self._founded = Life(top / "root", "layer", None)
            self._founded.run(*FOUNDED)
        self.disk.keep()

    def look(self, *verbs: str, limit: int) -> None:
        """Record a life in which this is done, and look at so many of its states at most.

        Raises:
            AssertionError: something is wrong in one, which its note names.
        """
        life, entries = self.record(*verbs)
        all_states = list(states(entries, self.rng, 2, self.filesystem.kind))
        chosen = sorted(self.rng.sample(range(len(all_states)), min(limit, len(all_states))))
        for number in chosen:
            self.check(all_states[number], aftermath.allowed(life.models, entries, all_states[number]), verbs)

    def record(self, *verbs: str) -> tuple[Life, list[Entry]]:
        """Run these verbs in a new life; returns it, and the log of the disk."""
        self.disk.record()
        with self.filesystem.mounted() as top:
            life = self.life(top)
            life.run(*verbs)
        self.lives += 1
        return life, self.disk.log()

    def life(self, top: Path) -> Life:
        """A life that has not begun yet, with its root below this directory."""
        return Life(top / "root", self._sync, self.disk.mark, self._founded)

    def check(self, state: State, models: Sequence[Model], verbs: Sequence[str]) -> None:
        """Look at one state; see :func:`aftermath.check`."""
        # What was on the disk before the life began is promised also where nothing else is.
        promised = None
        if self._sync == "none":
            promised = frozenset(self._founded.model.snapshots) if self._founded is not None else frozenset()
        self.disk.become(state)
        self.states += 1
        try:
            with self.filesystem.mounted() as top:
                found = aftermath.check(top / "root", models, promised, self.rng)
        except Exception as error:
            error.add_note(f"after {', '.join(verbs)}: {state}")
            raise
        self.checks += found.checks
        self.lost += found.lost

    def __str__(self) -> str:
        lost = f", {self.lost} lost of what was not promised" if self._sync == "none" else ""
        return f"{self.states} states of {self.lives} lives, {self.checks} trees and blobs compared, 0 losses{lost}"
