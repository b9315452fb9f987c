"""The reference of the command, from its parsers: man pages for the wheel, Markdown for the site.

``python tools/manual.py DIR`` writes the man pages into DIR.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Action
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onlap import __version__
from onlap.cli import exits
from onlap.cli.parser import Parser, make_parser
from onlap.cli.registry import VERBS, Verb

# What argparse would take from the terminal.
os.environ.update(COLUMNS="100", NO_COLOR="1")


class Entry(NamedTuple):
    """An argument or option."""

    names: str
    help: str


class Help(NamedTuple):
    """What the parser of a verb says of it."""

    verb: Verb
    usage: str
    paragraphs: list[str]
    groups: list[tuple[str, list[Entry]]]
    examples: list[str]


def read(verb: Verb) -> Help:
    """The help of a verb, in parts."""
    parser = make_parser(verb)
    groups = [
        (group.title or "", [_entry(parser, action) for action in group._group_actions])
        for group in parser._action_groups
        if group._group_actions
    ]
    groups.sort(key=lambda group: group[0] == "options of every verb")  # these come last
    examples = [line.strip() for line in (parser.epilog or "").split("\n")[1:]]
    usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
    usage = usage.replace(" [-h] [--root DIR] [--json] [-q] [-v]", "")  # those of every verb
    return Help(verb, usage, (parser.description or "").split("\n\n"), groups, examples)


def _entry(parser: Parser, action: Action) -> Entry:
    formatter = parser._get_formatter()
    value = formatter._format_args(action, (action.metavar or action.dest.upper()))  # type: ignore[arg-type]
    if not action.option_strings:
        return Entry(str(action.metavar or value), formatter._expand_help(action))
    value = "" if action.nargs == 0 else f" {value}"
    if action.choices and not action.metavar:
        value = " {" + ",".join(map(str, action.choices)) + "}"
    return Entry(", ".join(action.option_strings) + value, formatter._expand_help(action))


# ------------------------------------------------------------------------------------------------------ Markdown


def markdown() -> str:
    """All verbs, by group."""
    lines: list[str] = []
    heading = ""
    for verb in VERBS.values():
        if verb.heading != heading:
            heading = verb.heading
            lines += [f"## {heading[0].upper()}{heading[1:]}", ""]
        lines += _markdown(read(verb))
    return "\n".join(lines)


def _markdown(found: Help) -> list[str]:
    name = found.verb.name
    lines = [f"({anchor(name)})=", f"### onlap {name}", "", f"{found.verb.summary}.".capitalize(), ""]
    lines += ["```text", found.usage, "```", ""]
    for paragraph in found.paragraphs:
        lines += _markdown_paragraph(paragraph)
    for title, entries in found.groups:
        if title == "options of every verb":
            continue
        lines += [f"**{title.capitalize()}**", ""]
        lines += [line for entry in entries for line in (f"`{entry.names}`", f": {_inline(entry.help)}", "")]
    return [
        *lines,
        "```console",
        *(f"$ {line}" if line.startswith("onlap ") else line for line in found.examples),
        "```",
        "",
    ]


def _markdown_paragraph(text: str) -> Iterator[str]:
    for verbatim, lines in _runs(text):
        if verbatim:
            yield from ("```text", *lines, "```", "")
        else:
            yield from (*map(_inline, lines), "")


def _inline(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", text)


def _runs(text: str) -> Iterator[tuple[bool, list[str]]]:
    """The lines of a paragraph, parted where indented ones begin or end."""
    run: list[str] = []
    for line in text.split("\n"):
        if run and line.startswith(" ") != run[0].startswith(" "):
            yield run[0].startswith(" "), run
            run = []
        run.append(line)
    yield run[0].startswith(" "), run


def anchor(name: str) -> str:
    """The label of a verb's section."""
    return f"onlap-{name.replace(' ', '-')}"


def statuses() -> str:
    """The exit statuses, as a table."""
    kinds: dict[str, list[str]] = {}
    for kind, number in exits.BY_KIND.items():
        kinds.setdefault(str(number), []).append(f"`{kind}`")
    rows = [
        f"| {number} | {meaning} | {', '.join(kinds.get(number, []))} |" for number, meaning in exits.MEANINGS.items()
    ]
    return "\n".join(["| status | meaning | error kinds |", "|---|---|---|", *rows])


# ----------------------------------------------------------------------------------------------------- man pages


def man_pages() -> Iterator[tuple[str, str]]:
    """The name of each man page, and its text."""
    yield "onlap.1", _man_overview()
    for verb in VERBS.values():
        yield f"{anchor(verb.name)}.1", _man(read(verb))


def _man_overview() -> str:
    lines = [*_man_head("onlap", "OverlayFS for Python: a snapshot engine for file trees"), ".SH SYNOPSIS"]
    lines += [r".B onlap", _roff("[--root DIR] [--json] [-q] [-v] VERB ..."), ".SH DESCRIPTION"]
    lines += [
        "Onlap keeps file trees as stacks of read\\-only layers, gives a writable view on top, and turns what was"
    ]
    lines += ["written there into the next layer. Each verb has a page of its own."]
    heading = ""
    for verb in VERBS.values():
        if verb.heading != heading:
            heading = verb.heading
            lines.append(f".SS {_roff(heading[0].upper() + heading[1:])}")
        lines += [".TP", f".BR {_roff(anchor(verb.name))} (1)", _roff(verb.summary)]
    lines.append(".SH OPTIONS")
    _, entries = read(VERBS["ls"]).groups[-1]
    for entry in [*entries, Entry("--version", "print the version")]:
        lines += [".TP", f".B {_roff(entry.names)}", _roff(entry.help)]
    lines += [".SH EXIT STATUS"]
    for number, meaning in exits.MEANINGS.items():
        lines += [".TP", f".B {number}", _roff(meaning.replace("`", ""))]
    lines += [".SH ENVIRONMENT", ".TP", ".B ONLAP_ROOT", "the root, where", r".B \-\-root", "does not say it"]
    lines += [".SH FILES", ".TP", ".I /var/lib/onlap", "the root's default place for root"]
    lines += [".TP", ".I $XDG_DATA_HOME/onlap", "for other users; by default", ".I ~/.local/share/onlap"]
    return "\n".join(lines) + "\n"


def _man(found: Help) -> str:
    name = anchor(found.verb.name)
    lines = [*_man_head(name, found.verb.summary), ".SH SYNOPSIS", _roff(found.usage), ".SH DESCRIPTION"]
    for number, paragraph in enumerate(found.paragraphs):
        if number:
            lines.append(".PP")
        for verbatim, part in _runs(paragraph):
            lines += [".nf", *map(_roff, part), ".fi"] if verbatim else map(_roff, part)
    for title, entries in found.groups:
        lines.append(f".SH {_roff({'positional arguments': 'arguments'}.get(title, title).upper())}")
        for entry in entries:
            lines += [".TP", f".B {_roff(entry.names)}", _roff(entry.help)]
    lines += [".SH EXAMPLES", ".nf", *map(_roff, found.examples), ".fi"]
    lines += [".SH EXIT STATUS", "As in", ".BR onlap (1).", ".SH SEE ALSO", ".BR onlap (1)"]
    return "\n".join(lines) + "\n"


def _man_head(name: str, summary: str) -> list[str]:
    return [
        f'.TH {_roff(name.upper())} 1 "" "onlap {__version__}" "Onlap"',
        ".nh",
        ".ad l",
        ".SH NAME",
        rf"{_roff(name)} \- {_roff(summary)}",
    ]


def _roff(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga")
    return rf"\&{text}" if text.startswith((".", "'")) else text


def write(directory: Path) -> list[Path]:
    """Write all man pages; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in man_pages():
        path = directory / name
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]))
