"""What a forked child must leave alone: it has its parent's ``with`` blocks on its stack, and leaves them as well."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def only_here(action: Callable[P, object]) -> Callable[P, None]:
    """The action for the process that asks now. In a child forked later it does nothing: the thing is its parent's."""
    pid = os.getpid()

    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if os.getpid() == pid:
            action(*args, **kwargs)

    return guarded
