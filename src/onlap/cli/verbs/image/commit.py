"""``onlap image commit``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser, check_text
from onlap.cli.shared.archives import source_date_epoch
from onlap.cli.shared.images import images_of, show_image


def commit_arguments(parser: Parser) -> None:
    parser.explain(
        "Make an image of the active snapshot KEY: its changes become one more layer on top of the image that it was\n"
        "prepared from, and it becomes the snapshot of that layer, so that KEY no longer exists. An instruction is\n"
        "one of a Dockerfile's: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, WORKDIR, VOLUME. The order is that of\n"
        "onlap commit; that of docker commit, KEY first, is accepted if IMAGE is not a snapshot.",
        "onlap run --keep work debian:13 sh -c 'echo hello > /greeting'",
        "onlap image commit greeter:1 work --message 'says hello' --change 'CMD [\"cat\", \"/greeting\"]'",
    )
    parser.image("name", help="the name of the image")
    parser.key("key", help="the active snapshot")
    parser.add_argument("--author", metavar="A", default="", help="who made it")
    parser.add_argument("-m", "--message", metavar="M", default="", help="what was done")
    parser.repeatable("-c", "--change", metavar="I", help="an instruction")
    parser.image("--base", help="the image below KEY's changes (the one it was run from)")
    parser.add_argument("--compress", choices=("gzip", "zstd", "none"), default="gzip", help="of the layer (gzip)")


def commit(call: Call) -> None:
    args = call.args
    check_text(args.name, "name")
    with call.store(sweep=True) as store, call.progress() as report:
        images = images_of(store)
        key, name = args.key, args.name
        if key not in store and name in store:
            key, name = name, key
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
    show_image(call.out, image)
