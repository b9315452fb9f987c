"""``onlap image files``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import images_of, short
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import NOTHING, size
from onlap.errors import shown
from onlap.images.inspection.inspect import File


def arguments(parser: Parser) -> None:
    parser.explain(
        "Which layer each file of an image comes from, its bytes, the layers below whose file it hides, and how many\n"
        'bytes that wastes. LAYER is "-" for a file that a later layer removed, so that all of it is waste. Layers\n'
        "have numbers, from 1 for the lowest; the lines behind the files sum them up.",
        "onlap image files app:1",
        "onlap image files app:1 /etc/passwd",
        "onlap image files app:1 --wasted",
    )
    parser.add_argument("name", metavar="IMAGE", help="the image")
    parser.add_argument("path", metavar="PATH", nargs="?", help="only this file, or what is in this directory")
    parser.add_argument("--wasted", action="store_true", help="only files that hide others, or are removed")


def run(call: Call) -> None:
    from onlap.images.inspection import inspect

    out = call.out
    with call.store(sweep=True) as store:
        images = images_of(store)
        image = images.get(call.args.name)
        with progress(out) as report:
            images.unpack(image, progress=report)
        found = inspect.files(store.snapshotter, image.chain_ids, call.args.path)
    files = [each for each in found.files if each.hid or not call.args.wasted]
    if out.json:
        for each in files:
            out.item(
                {
                    "path": f"/{each.path}",
                    "layer": each.layer,
                    "size": each.size,
                    "hid": [hidden._asdict() for hidden in each.hid],
                    "wasted": each.wasted,
                }
            )
        for total in found.layers:
            out.item({**total._asdict(), "digest": image.layers[total.layer - 1].digest})
        return
    out.table(("LAYER", "SIZE", "HIDES", "WASTED", "PATH"), map(_row, files), right=(0, 1, 3))
    out.line()
    rows = [
        (
            str(total.layer),
            short(image.layers[total.layer - 1].digest),
            f"{total.files:,}",
            size(total.size),
            size(total.wasted),
        )
        for total in found.layers
    ]
    out.table(("LAYER", "DIGEST", "FILES", "SIZE", "WASTED"), rows, right=(0, 2, 3, 4))


def _row(each: File) -> tuple[str, ...]:
    return (
        str(each.layer) if each.layer is not None else NOTHING,
        size(each.size) if each.layer is not None else NOTHING,
        ",".join(str(hidden.layer) for hidden in each.hid) or NOTHING,
        size(each.wasted) if each.hid else NOTHING,
        shown(f"/{each.path}"),
    )
