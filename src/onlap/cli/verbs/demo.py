"""``onlap demo``."""

from __future__ import annotations

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import Parser


def demo_arguments(parser: Parser) -> None:
    parser.explain(
        "The main job, on a real tree: import the standard library of the running Python, make a writable view of it,\n"
        "run programs in there, see what changed, commit it, let two children go different ways, and remove\n"
        "everything. It takes some seconds and some 100 MiB, in TMPDIR, /var/tmp or /dev/shm, and says which mode it\n"
        "runs in and why.",
        "onlap demo",
        "onlap demo --require overlay",
    )
    parser.add_argument("--require", choices=("overlay",), help="end with 1 rather than take native copies")


def demo(call: Call) -> int:
    from onlap.cli.demo.material import material
    from onlap.cli.demo.place import choose
    from onlap.cli.demo.story import tell

    tree = material()
    try:
        choice = choose(tree.size, overlay_only=call.args.require == "overlay")
    except errors.Unimplemented as error:
        call.out.onlap_error(error)
        return exits.NO
    tell(call, choice.place, choice.line, tree)
    return exits.DONE
