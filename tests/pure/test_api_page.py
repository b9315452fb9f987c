"""The page that shows the public API at a glance is the one that the source gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onlap

TOP = Path(__file__).resolve().parents[2]
PAGE = TOP / "docs" / "reference" / "api.md"


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import api; print(api.render(), end='')"],
        env={"PYTHONPATH": f"{TOP / 'src'}:{TOP / 'tools'}", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    assert PAGE.read_text(encoding="utf-8") == done.stdout, "run: .venv/bin/python tools/api.py"


def test_every_public_name_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = [name for name in onlap.__all__ if name != "__version__"]
    assert [name for name in names if f"\n- `{name}`" not in page and f"\n- `{name}(" not in page] == []
