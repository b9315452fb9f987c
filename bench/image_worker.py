"""The process of ours that bench/images.py times: it imports what it needs, and no more."""

from __future__ import annotations

import json
import os
import sys
import time

import onlap


def work(op: str, mount: str, archive: str = "", again: bool = False) -> dict[str, float]:
    """Do it; the seconds and the processor time that do not count, and the seconds of the call alone."""
    root = f"{mount}/onlap-kept" if op in ("keep", "commit") or again else f"{mount}/onlap"
    aside, call = Spent(), Spent()
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        images = store.images
        if op == "keep":
            images.import_(f"{mount}/big.tar")
        elif op == "import":
            (image,) = images.import_(f"{mount}/{archive}.tar")
            with aside:
                images.remove(image.name)
        elif op == "unpack":
            with aside:
                (image,) = images.import_(f"{mount}/big.tar", unpack=False)
                os.sync()
            images.unpack(image)
            with aside:
                images.remove(image.name)
        elif op == "commit":
            key = f"work-{time.monotonic_ns()}"
            with aside:
                store.prepare(key, images.get("localhost/bench/big:1").chain_ids[-1])
                with store.mounted(key) as tree:
                    (tree / "changed").write_text(key)
            with call:
                images.commit(key, "made:1")
            with aside:
                images.remove("made:1")
        with aside:
            store.cleanup()
            os.sync()
    return {"seconds": aside.seconds, "cpu_s": aside.cpu, "call": call.seconds}


class Spent:
    """What blocks take, added up."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.monotonic()
        self.cpu -= sum(os.times()[:4])

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic()
        self.cpu += sum(os.times()[:4])


command = json.loads(sys.argv[1])
with open(command.pop("answer"), "w", encoding="utf-8") as file:
    json.dump(work(**command), file)
