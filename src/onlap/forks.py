"""Processes of ours: what a forked child must leave alone, and how a new one runs this very Onlap."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def only_here(action: Callable[P, object]) -> Callable[P, None]:
    """The action for the process that asks now.

    A child forked later has its parent's ``with`` blocks on its stack and leaves them as well; in it the action does
    nothing: the thing is its parent's.
    """
    pid = os.getpid()

    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if os.getpid() == pid:
            action(*args, **kwargs)

    return guarded


def python(*arguments: str) -> list[str]:
    """A command that runs Python with :func:`environment`, without the site's packages, which cost half its start."""
    return [sys.executable, "-S", "-P", *arguments]


def environment() -> dict[str, str]:
    """Our environment, in which a new Python finds this Onlap wherever it was imported from."""
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
