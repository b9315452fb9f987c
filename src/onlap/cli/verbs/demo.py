"""``onlap demo``."""

from __future__ import annotations

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser


def demo_arguments(parser: Parser) -> None:
    parser.explain(
        "Show the main job on a real tree: import the standard library of the running Python, make a writable view of\n"
        "it, run programs in there, show what changed, commit it, let two children diverge, and remove everything. It\n"
        "takes some seconds and some 100 MiB, in TMPDIR, /var/tmp or /dev/shm, and prints its mode and the reason.",
        "onlap demo",
        "onlap demo --require overlay",
    )
    parser.add_argument("--require", choices=("overlay",), help="end with 1 rather than use native copies")


def demo(call: Call) -> int:
    from onlap.cli.demo.place import choose
    from onlap.cli.demo.steps import run_steps
    from onlap.cli.demo.tree import find_source

    source = find_source()
    try:
        place, line = choose(source.size, overlay_only=call.args.require == "overlay")
    except errors.Unimplemented as error:
        call.out.onlap_error(error)
        return exits.NO
    run_steps(call.out, place, line, source)
    return exits.DONE
