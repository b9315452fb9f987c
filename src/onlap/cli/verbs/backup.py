"""``onlap backup`` and ``onlap restore``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from onlap.cli.call import Call, check_access
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import STANDARD_OUTPUT, destination
from onlap.cli.terminal.text import count, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.check.backups.summary import Backup


def backup_arguments(parser: Parser) -> None:
    parser.explain(
        "Write all committed snapshots, images and settings of the root to one archive, which appears only when it is\n"
        "complete; .tar.gz or .tar.zst at the end of its name compress it. The root may be in use: the backup holds\n"
        "what was committed when it began, and none of that can be removed until it ends. Every file is compared with\n"
        "what was committed.",
        "onlap backup /backup/onlap.tar.zst",
        "onlap backup - | ssh host 'cat > onlap.tar'",
    )
    parser.add_argument("file", metavar="FILE", help="the archive, or - for standard output")
    parser.add_argument(
        "--active", action="store_true", help="also active snapshots and views, as they are when they are read"
    )


def backup(call: Call) -> None:
    args = call.args
    with call.store() as store, call.progress() as report, destination(args.file) as out:
        done = store.backup(out, active=args.active, progress=report)
    call.out.not_kept(done.skipped)
    if args.file != STANDARD_OUTPUT:
        call.out.show({"file": os.path.abspath(args.file), **done._asdict()}, f"{shown(args.file)}: {_summary(done)}")


def restore_arguments(parser: Parser) -> None:
    parser.explain(
        "Make the root from a backup, complete or not at all. It must be a new or empty directory (--root), on a\n"
        "filesystem where such a root works, and of the user that it was backed up from. Every file is verified while\n"
        "it is written.",
        "onlap --root /srv/onlap restore /backup/onlap.tar.zst",
        "ssh host 'cat onlap.tar' | onlap restore -",
    )
    parser.add_argument("file", metavar="FILE", help="the backup, or - for standard input")


def restore(call: Call) -> None:
    from onlap.check.backups.restore import restore as restore_root

    check_access(call.root, create=True)
    source = sys.stdin.buffer if call.args.file == "-" else call.args.file
    with call.progress() as report:
        done = restore_root(source, call.root, progress=report)
    call.out.show({"root": os.path.abspath(call.root), **done._asdict()}, f"{shown(call.root)}: {_summary(done)}")


def _summary(done: Backup) -> str:
    parts = (count(done.snapshots, "snapshot"), count(done.images, "image"), count(done.blobs, "blob"))
    return f"{', '.join(parts)}, {count(done.files, 'file')}, {size(done.size)}"
