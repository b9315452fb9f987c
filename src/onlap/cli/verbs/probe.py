"""``onlap probe``."""

from __future__ import annotations

from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.terminal.text import size
from onlap.errors import shown
from onlap.probing.probe import FEATURES, Probe, existing_above, probe

_MODES = {
    "overlay": "overlay",
    "overlay-userxattr": "overlay with userxattr, mounted in a user namespace",
    "native": "native copies",
}


def arguments(parser: Parser) -> None:
    parser.explain(
        "Find out by trial what this kernel, with your privilege, can do in DIR: a line a feature, with the reason\n"
        "for each no, and how a new root there would keep its snapshots. Nothing is left behind.\n\n"
        "features:\n  " + "\n  ".join(" ".join(FEATURES[start : start + 7]) for start in range(0, len(FEATURES), 7)),
        "onlap probe /srv",
        "onlap probe --require overlay && echo yes",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", help="by default, where the root is or would be")
    parser.add_argument(
        "--require", metavar="F", action="append", default=[], help="end with 1 unless F works; repeatable"
    )


def run(call: Call) -> int:
    out = call.out
    for name in call.args.require:
        if name not in FEATURES:
            raise UsageError(f"there is no feature {shown(name)}; there are: {' '.join(FEATURES)}")
    found = probe(call.args.directory or existing_above(call.root))
    if out.json:
        out.item(_as_json(found))
    else:
        _print(call, found)
    missing = [name for name in call.args.require if not found.features[name].ok]
    for name in missing:
        out.error("Required", f"{name} does not work here: {found.features[name].reason}")
    return exits.NO if missing else exits.DONE


def _print(call: Call, found: Probe) -> None:
    out = call.out
    bug = "with the WAL-reset bug, from which a lock of ours protects" if found.sqlite_wal_bug else "sound"
    for name, value in (
        ("directory", shown(found.directory)),
        ("filesystem", f"{found.filesystem}, {size(found.free)} free"),
        ("kernel", found.kernel),
        ("sqlite", f"{found.sqlite}, {bug}"),
        ("a root", f"{_MODES[found.mode]}: {found.why}"),
    ):
        out.line(f"{name:<11} {value}")
    out.line()
    width = max(map(len, FEATURES))
    for name, feature in found.features.items():
        answer = out.paint("yes", "green") if feature.ok else out.paint("no ", "red")
        out.line(f"{name:<{width}}  {answer}  {shown(feature.reason)}".rstrip())


def _as_json(found: Probe) -> dict[str, object]:
    return {
        "directory": found.directory,
        "filesystem": found.filesystem,
        "free": found.free,
        "kernel": found.kernel,
        "sqlite": found.sqlite,
        "sqlite_wal_bug": found.sqlite_wal_bug,
        "mode": found.mode,
        "why": found.why,
        "features": {name: feature._asdict() for name, feature in found.features.items()},
    }
