"""Sphinx: ``make docs`` builds the site from these pages, the docstrings and the command's parsers."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

TOP = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOP / "src"), str(TOP / "tools")]

import manual  # noqa: E402 - found by the line above

import onlap  # noqa: E402

project = "Onlap"
author = "the authors of Onlap"
copyright = author
version = release = onlap.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
suppress_warnings = ["ref.python"]  # short names in annotations: several packages have a Change

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

smartquotes = False  # "--json" is two hyphens

autoclass_content = "class"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # else they would be described under "Attributes:" and again one by one

html_theme = "furo"
html_title = f"Onlap {release}"
html_copy_source = False
html_show_sphinx = False


def modules() -> str:
    """All modules by package, with the first line of each docstring; nothing is imported."""
    packages: dict[str, list[str]] = {}
    for path in sorted((TOP / "src" / "onlap").rglob("*.py")):
        name = ".".join(path.relative_to(TOP / "src").with_suffix("").parts).removesuffix(".__init__")
        text = ast.get_docstring(ast.parse(path.read_bytes()))
        if text and "._" not in name:
            first = text.partition("\n\n")[0].replace("\n", " ").replace("``", "`").replace("|", "\\|")
            package = (
                name.split(".")[1] if name.count(".") > 1 or (path.name == "__init__.py" and name != "onlap") else ""
            )
            packages.setdefault(package, []).append(f"| `{name}` | {re.sub(r':[a-z]+:`[~!]?', '`', first)} |")
    return "\n".join(
        line
        for package, rows in sorted(packages.items())
        for line in (f"## {package or 'onlap'}", "", "| module | |", "|---|---|", *rows, "")
    )


# A comment in a page, and what the build replaces it with.
GENERATED = {
    "<!-- generated: verbs -->": manual.markdown,
    "<!-- generated: statuses -->": manual.statuses,
    "<!-- generated: modules -->": modules,
}


def fill_in(_app: Sphinx, _page: str, source: list[str]) -> None:
    for mark, text in GENERATED.items():
        if mark in source[0]:
            source[0] = source[0].replace(mark, text())


def skip(_app: Sphinx, _what: str, _name: str, member: object, _skip: bool, _options: object) -> bool | None:
    """Skip the fields of a NamedTuple: its docstring lists them under "Attributes:"."""
    return True if str(getattr(member, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip)
    app.connect("source-read", fill_in)
