"""The man pages, which a wheel gets when it is built: one per verb, from its parser."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onlap.cli.registry import VERBS

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    # Without site-packages, as in the environment that a build isolates itself in.
    program = [sys.executable, "-S", "-B", str(TOP / "tools" / "manual.py"), str(directory)]
    subprocess.run(program, env={"PYTHONPATH": str(TOP / "src")}, check=True)
    return directory


def test_every_verb_has_a_page(pages: Path) -> None:
    names = {f"onlap-{name.replace(' ', '-')}.1" for name in VERBS}
    assert {page.name for page in pages.iterdir()} == {"onlap.1", *names}


def test_a_page_says_what_the_help_says(pages: Path) -> None:
    page = (pages / "onlap-diff.1").read_text()
    for text in (VERBS["diff"].summary, r"\-\-exit\-code", r"\-\-tar FILE", r"\-\-base B", ".SH EXAMPLES"):
        assert text in page


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_complain_of(pages: Path) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", *sorted(pages.iterdir())], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
