"""``onlap image commit``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser, check_text
from onlap.cli.shared.archives import source_date_epoch
from onlap.cli.shared.images import images_of, show_image
from onlap.cli.terminal.progress import progress


def arguments(parser: Parser) -> None:
    parser.explain(
        "Make an image of the active snapshot KEY: what it changed becomes one layer more than the image has that it\n"
        "was prepared from. KEY is gone afterwards; the new layer's snapshot is what it was. An instruction is one of\n"
        "a Dockerfile's: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, WORKDIR, VOLUME. The order is that of onlap\n"
        "commit; that of docker commit, KEY first, is understood where IMAGE is no snapshot.",
        "onlap run --keep work debian:13 sh -c 'echo hello > /greeting'",
        "onlap image commit greeter:1 work --message 'says hello' --change 'CMD [\"cat\", \"/greeting\"]'",
    )
    parser.add_argument("name", metavar="IMAGE", help="what to call the image")
    parser.key("key", help="the active snapshot")
    parser.add_argument("--author", metavar="A", default="", help="who made it")
    parser.add_argument("-m", "--message", metavar="M", default="", help="what was done")
    parser.add_argument(
        "-c",
        "--change",
        metavar="I",
        action="append",
        default=[],
        help="an instruction; repeatable",
    )
    parser.add_argument("--base", metavar="IMAGE", help="the image that KEY goes on from (the one it was run as)")
    parser.add_argument("--compress", choices=("gzip", "zstd", "none"), default="gzip", help="of the layer (gzip)")


def run(call: Call) -> None:
    args, out = call.args, call.out
    check_text(args.name, "name")
    with call.store(sweep=True) as store:
        images = images_of(store)
        key, name = args.key, args.name
        if key not in store and name in store:
            key, name = name, key
        with progress(out) as report:
            image = images.commit(
                key,
                name,
                author=args.author,
                message=args.message,
                changes=args.change,
                base=args.base,
                compression=args.compress,
                epoch=source_date_epoch(),
                progress=report,
            )
    show_image(out, image)
