"""What the project promises about itself: small modules, a cheap import, a core without dependencies."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import public_names

TOP = Path(__file__).resolve().parents[2]
PACKAGE = TOP / "src" / "onlap"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_LINES = 600

# Dependencies, each with the packages that may import it.
PACKAGES_OF = {
    "isal": {"layers"},
    "backports": {"layers"},
    "fastcrc": {"check"},
    "rich": {"cli"},
    "msgspec": {"images"},
    "urllib3": {"images"},
    "grpc": {"serve", "testing"},
    "google": {"serve", "testing"},
    "prometheus_client": {"serve"},
}
# What loads the module, and so needs no declaration.
HOSTS = {"pytest": {"pytest_plugin"}}

# In brackets, since this file is searched as well.
UNFINISHED = re.compile(r"\b(?:TOD[O]|FIXM[E])\b")
GENERATED = {".git", "build", "dist", "__pycache__"}


def module_id(path: Path) -> str:
    return str(path.relative_to(TOP))


def files_of_the_tree() -> Iterator[Path]:
    """All files that belong to the project: hidden directories at the top are caches, but for .ci."""
    for directory, names, files in os.walk(TOP):
        here = Path(directory)
        names[:] = [
            name for name in names if name not in GENERATED and (not name.startswith(".") or name in {".ci", ".github"})
        ]
        yield from (here / name for name in files if (here / name).is_file())


def run_bare_python(code: str, cwd: Path) -> str:
    """The output of `code` under an interpreter that sees the standard library and src, and nothing else."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONPATH"] = str(PACKAGE.parent)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_module_is_small_enough_to_read(path: Path) -> None:
    lines = path.read_bytes().count(b"\n")
    assert lines <= MAX_LINES, f"{module_id(path)} has {lines} lines"


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{module_id(path)}: {match[0]}"
        for path in files_of_the_tree()
        for match in UNFINISHED.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize("module", ["onlap", "onlap.images"])
def test_exports_are_sorted_and_exist(module: str) -> None:
    exporting = importlib.import_module(module)
    names = list(exporting.__all__)
    assert names == sorted(set(names))
    for name in names:
        getattr(exporting, name)


def _loaded(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    loaded: type = getattr(importlib.import_module(module), attribute)
    return loaded


@pytest.mark.parametrize(
    "mirrored, mirror, left_out",
    [
        # "in" and len() cannot be awaited; an attribute that is no property is not compared.
        ("onlap.store.Store", "onlap.aio.Store", {"__contains__", "content", "workspaces"}),
        ("onlap.workspaces.api.Workspaces", "onlap.aio.Workspaces", {"__contains__", "__len__"}),
        ("onlap.workspaces.workspace.Workspace", "onlap.aio.Workspace", set()),
        (
            "onlap.images.api.Images",
            "onlap.aio.images.Images",
            {"__contains__", "__iter__", "keep", "record", "recording"},
        ),
    ],
    ids=["Store", "Workspaces", "Workspace", "Images"],
)
def test_asyncio_has_every_public_method(mirrored: str, mirror: str, left_out: set[str]) -> None:
    """A new method gets a line in src/onlap/aio/stores.py: call, block, steps or attribute."""
    there, here = (_loaded(name) for name in (mirrored, mirror))
    renamed = {"__enter__": "__aenter__", "__exit__": "__aexit__", "__iter__": "__aiter__"}
    own = {*renamed, "__init__", "close", "get", "images", "root"}
    names = public_names(there) - left_out
    assert {name for name in names if not hasattr(here, renamed.get(name, name))} == set()
    for name in names - own:
        one, other = getattr(there, name), getattr(here, name)
        assert one.__doc__ == other.__doc__, name
        if not isinstance(one, property):
            assert inspect.signature(one) == inspect.signature(other), name


def test_asyncio_opens_a_root_as_without() -> None:
    import onlap.aio

    assert inspect.signature(onlap.aio.open) == inspect.signature(onlap.open)


def test_version_is_said_once() -> None:
    import onlap
    from onlap._version import __version__

    assert onlap.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:[ab.]\w+)?", __version__)


def test_import_needs_the_standard_library_only(tmp_path: Path) -> None:
    code = "import onlap; [getattr(onlap, name) for name in onlap.__all__]; print('imported')"
    assert run_bare_python(code, tmp_path) == "imported\n"


def test_import_loads_no_costly_module(tmp_path: Path) -> None:
    """What the interpreter loads by itself does not count: some builds load more of it than others."""
    code = (
        "import json, sys; bare = set(sys.modules) - {'json'}; import onlap; "
        "print(json.dumps(sorted(set(sys.modules) - bare)))"
    )
    loaded = set(json.loads(run_bare_python(code, tmp_path)))
    assert "onlap" in loaded
    assert loaded & {"sqlite3", "_sqlite3", "dataclasses", "logging", "pathlib"} == set()


def imported_names(tree: ast.AST) -> Iterator[str]:
    """The top-level names that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_dependencies_stay_in_their_packages(path: Path) -> None:
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = set(imported_names(ast.parse(path.read_bytes())))
    foreign = names - sys.stdlib_module_names - {"onlap", "compression"}  # compression: standard from 3.14
    assert {name for name in foreign if package not in {**PACKAGES_OF, **HOSTS}.get(name, set())} == set()


def test_every_declared_dependency_has_its_package() -> None:
    import tomllib

    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["containerd"]
    names = {re.split(r"[^\w.-]", line)[0] for line in declared}
    top_level = {
        "backports.zstd": "backports",
        "grpcio": "grpc",
        "protobuf": "google",
        "prometheus-client": "prometheus_client",
    }
    assert {top_level.get(name, name) for name in names} == set(PACKAGES_OF)


def test_the_tests_that_documents_name_exist() -> None:
    there = {path.name for path in (TOP / "tests").rglob("*.py")}
    pages = [page for page in (*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")) if page.name != "CHANGELOG.md"]
    named = 0
    for page in pages:
        for folder, name in re.findall(r"`(tests/(?:[\w.]+/)*)?(test_\w+\.py)`", page.read_text()):
            named += 1
            assert name in there, f"{page.name} names {name}"
            assert not folder or (TOP / folder / name).is_file(), f"{page.name} names {folder}{name}"
    assert named > 20
