"""Hatchling's hook: a wheel brings its man pages, made from the parsers of the command (``tools/manual.py``)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ManPages(BuildHookInterface[Any]):
    """``share/man/man1`` of a wheel; an editable one stays as it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        top = Path(self.root)
        pages = top / "build" / "man"
        # A process of its own: the builder's may be a frontend that builds more than this. The parsers need nothing
        # but the standard library, so that they load where a build isolates itself.
        subprocess.run(
            [sys.executable, "-B", str(top / "tools" / "manual.py"), str(pages)],
            env={"PYTHONPATH": str(top / "src")},
            check=True,
        )
        for page in sorted(pages.glob("*.1")):
            build_data["shared_data"][str(page)] = f"share/man/man1/{page.name}"
