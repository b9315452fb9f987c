"""What there was, what there is, and whether that is right."""

from __future__ import annotations

import json
from typing import Any, Literal

from onlap.catalog.runs import LABEL

State = dict[str, Any]
Which = Literal["before", "after", ""]

# Layers of images may stay unpacked, or be, behind a failure: they are named by what is in them, and cleanup takes
# those that no image has.
_LAYER = "snapshot sha256:"


class Judge:
    """Tells what is wrong with a state.

    Args:
        before: what there was before the verb.
        after: what there is when it is done.
        loose: see :class:`~syscall_sweep.verbs.Verb`.
    """

    def __init__(self, before: State, after: State, loose: tuple[str, ...]) -> None:
        self._before = before
        self._after = after
        self._loose = loose
        self._passing = {
            name for name in {*before, *after} if name.startswith(_LAYER) and before.get(name) != after.get(name)
        }

    def wrong(self, found: State, *, settled: bool = False, only: Which = "", kept: str = "") -> str:
        """How a state is neither of the two; empty when it is one of them.

        Args:
            found: what there is.
            settled: whether there was a cleanup, so that nothing may lie about.
            only: which of the two it has to be.
            kept: a snapshot that may be there as well.
        """
        states = {"before": [self._before], "after": [self._after]}.get(only, [self._before, self._after])
        found = {name: value for name, value in plain(found).items() if name != f"snapshot {kept}"}
        said = [self._difference(found, wanted, settled) for wanted in states]
        return "" if "" in said else min(said, key=len)

    def lost(self, found: State) -> str:
        """What is in both states, and not there."""
        both = {name: value for name, value in self._before.items() if self._after.get(name) == value}
        here = {name: value for name, value in plain(found).items() if name in both}
        return self._difference(here, both, settled=True)

    def _difference(self, found: State, wanted: State, settled: bool) -> str:
        passing = set() if settled else self._passing | {name for name in found if _is_of_a_run(found[name])}
        said = [f"{name} is not there" for name in wanted if name not in found and name not in passing]
        said += [f"{name} is there" for name in found if name not in wanted and name not in passing]
        said += [
            f"{name} is {_short(found[name])} rather than {_short(wanted[name])}"
            for name in wanted
            if name in found and name not in self._loose and found[name] != wanted[name]
        ]
        return "; ".join(said)


def plain(state: State) -> State:
    """A state as JSON has it."""
    found: State = json.loads(json.dumps(state))
    return found


def _is_of_a_run(value: object) -> bool:
    # A transaction whose last fdatasync fails may have been made all the same; what names a run that is over is
    # garbage, which cleanup takes.
    return isinstance(value, list) and value[0] == "active" and isinstance(value[2], dict) and LABEL in value[2]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else f"{text[:300]}..."
