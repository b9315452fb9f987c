"""The process of ours that bench/images.py times: it imports what it needs, and no more."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import onlap


def work(op: str, mount: str, archive: str = "", again: bool = False) -> dict[str, float]:
    """Do it; the seconds that do not count, and those of the call alone."""
    root = f"{mount}/onlap-kept" if op in ("keep", "commit") or again else f"{mount}/onlap"
    aside = call = 0.0
    with onlap.open(root, snapshotter="overlay", sync="none") as store:
        images = store.images
        if op == "keep":
            images.import_(f"{mount}/big.tar")
        elif op == "import":
            (image,) = images.import_(f"{mount}/{archive}.tar")
            aside += seconds_of(images.remove, image.name)
        elif op == "unpack":
            began = time.monotonic()
            (image,) = images.import_(f"{mount}/big.tar", unpack=False)
            os.sync()
            aside += time.monotonic() - began
            images.unpack(image)
            aside += seconds_of(images.remove, image.name)
        elif op == "commit":
            began = time.monotonic()
            key = f"work-{time.monotonic_ns()}"
            store.prepare(key, images.get("localhost/bench/big:1").chain_ids[-1])
            with store.mounted(key) as tree:
                (tree / "changed").write_text(key)
            aside += time.monotonic() - began
            call = seconds_of(images.commit, key, "made:1")
            aside += seconds_of(images.remove, "made:1")
        began = time.monotonic()
        store.cleanup()
        os.sync()
    return {"aside": aside + time.monotonic() - began, "call": call}


def seconds_of(call: Callable[..., object], *words: object) -> float:
    """How long a call takes."""
    began = time.monotonic()
    call(*words)
    return time.monotonic() - began


print(json.dumps(work(**json.loads(sys.argv[1]))))
