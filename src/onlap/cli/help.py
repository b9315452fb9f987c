"""The text of ``onlap --help``."""

from __future__ import annotations

from onlap._version import __version__
from onlap.cli import exits
from onlap.cli.registry import VERBS, of_group


def overview() -> str:
    """The help of the command, without the last line end."""
    lines = [
        f"Onlap {__version__}: OverlayFS for Python. Stacks of read-only layers, a writable view on top, and what was",
        "written there becomes the next layer.",
        "",
        "usage: onlap [--root DIR] [--json] [-q] [-v] VERB ...",
    ]
    heading = ""
    for verb in VERBS.values():
        if verb.heading != heading:
            heading = verb.heading
            lines += ["", f"{heading}:"]
        lines.append(f"  {verb.name:<16}  {verb.summary}")
    lines += [
        "",
        "options, before or after the verb:",
        "  --root DIR  where the snapshots are; else $ONLAP_ROOT, else /var/lib/onlap for root and",
        "              $XDG_DATA_HOME/onlap (~/.local/share/onlap) for others",
        '  --json      JSON Lines: one object per thing; a name that is not UTF-8 is {"bytes": base64}',
        "  -q          no warnings, no progress; ls: names only",
        "  -v          say more; -vv: with tracebacks",
        "  --version   print the version",
        "",
        "for a start:",
        "  onlap import ./project base       # a committed snapshot",
        "  onlap prepare work base           # a writable view of it, in about a millisecond",
        "  onlap enter work sh -c 'echo hello > greeting'",
        "  onlap diff work                   # A /greeting",
        "  onlap commit next work            # what was written is the next layer",
        "  onlap try -- make format          # in a copy of this directory; shows what it did, and asks",
        "",
        "exit status:",
        *(f"  {status:<5}  {meaning.replace('`', '')}" for status, meaning in exits.MEANINGS.items()),
        "",
        "More: onlap VERB --help. Names are shown with C escapes where a terminal would act on them.",
    ]
    return "\n".join(lines)


def group_overview(group: str) -> str:
    """The help of a group of verbs, without the last line end."""
    lines = [f"usage: onlap {group} VERB ...", "", f"{group}:"]
    lines += [f"  {verb.name.partition(' ')[2]:<13}  {verb.summary}" for verb in of_group(group)]
    return "\n".join([*lines, "", f"More: onlap {group} VERB --help."])
