"""Finds what is wrong in a Docker data root; changes nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from onlap.graphdrivers import layout
from onlap.graphdrivers.home import UNFINISHED
from onlap.graphdrivers.inspection.data_root import ORPHAN, UNUSED, Root, layer_ids
from onlap.graphdrivers.layout import Layer


class Problem(NamedTuple):
    """One problem.

    Attributes:
        kind: ``"damaged"``: something cannot be used; ``"waste"``: it takes space that nothing uses.
        where: the layer, link, image or container.
        what: the problem, in words.
        hint: what to do.
    """

    kind: str
    where: str
    what: str
    hint: str


_REMOVE_IMAGE = "remove the images and containers on it, and pull them again"
_LOST = "docker system prune; dockerd has lost track of what remains then, as after docker export (26.1.5)"


def check(root: Root) -> Iterator[Problem]:
    """All problems, damage first.

    Raises:
        OSError: something cannot be read.
    """
    yield from _records(root)
    for id in layer_ids(root.home):
        yield from _layer(root, id)
    yield from _links(root)
    yield from _waste(root)


def _records(root: Root) -> Iterator[Problem]:
    for chain, id in root.chains.items():
        if id not in root.layers:
            yield Problem("damaged", id, f"the layer of {chain} is missing", _REMOVE_IMAGE)
    for name, chains in root.images.items():
        for chain in chains:
            if chain not in root.chains:
                yield Problem("damaged", name, f"its layer {chain} is unknown", "pull the image again")
    for name, (id, init, _) in root.containers.items():
        for each in (id, init):
            if each and each not in root.layers:
                yield Problem("damaged", name, f"its layer {each} is missing", "remove the container")
    for id, count in Counter(root.chains.values()).items():
        if count > 1:
            yield Problem("damaged", id, f"{count} image layers share it", _REMOVE_IMAGE)


def _layer(root: Root, id: str) -> Iterator[Problem]:
    layer = Layer(root.home, id)
    if not os.path.isdir(layer.diff):
        yield Problem("damaged", id, f"it is incomplete: it has no {layout.DIFF}/", _REMOVE_IMAGE)
    short = layer.short()
    if short is None:
        yield Problem("damaged", id, f"its file {layout.LINK} is missing or empty", _REMOVE_IMAGE)
    elif not os.path.lexists(os.path.join(root.home, layout.LINKS, short)):
        hint = f"ln -s ../{id}/{layout.DIFF} {root.home}/{layout.LINKS}/{short}"
        yield Problem("damaged", id, f"its link {layout.LINKS}/{short} is missing (moby#46498)", hint)
    lower = layer.written_lower()
    for link in lower:
        if not layout.LOWER_LINK.fullmatch(link):
            yield Problem("damaged", id, f"its file {layout.LOWER} is damaged", _REMOVE_IMAGE)
        elif not os.path.isdir(os.path.join(root.home, link)):
            yield Problem("damaged", id, f"the link {link} below it is dangling or missing", _REMOVE_IMAGE)
    for link, count in Counter(lower).items():
        if count > 1:
            yield Problem("damaged", id, f"{link} is below it {count} times, so it cannot be mounted", _REMOVE_IMAGE)
    if len(lower) > layout.MAX_DEPTH:
        yield Problem("damaged", id, f"{len(lower)} layers lie below; Docker mounts {layout.MAX_DEPTH}", "squash some")
    if lower and not os.path.isdir(os.path.join(layer.path, layout.WORK)):
        yield Problem("damaged", id, f"it has no {layout.WORK}/, so it cannot be mounted", f"mkdir it in {layer.path}")


def _links(root: Root) -> Iterator[Problem]:
    directory = os.path.join(root.home, layout.LINKS)
    targets: Counter[str] = Counter()
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if not os.path.islink(path):
            yield Problem("damaged", f"{layout.LINKS}/{name}", "it is not a symlink", "find out who made it")
            continue
        target = os.readlink(path)
        targets[target] += 1
        if not os.path.isdir(path):
            yield Problem("waste", f"{layout.LINKS}/{name}", f"its target {target} is missing", f"rm {path}")
    for target, count in targets.items():
        if count > 1:
            yield Problem("waste", target, f"{count} links point to it", "keep the one in its file link")


def _waste(root: Root) -> Iterator[Problem]:
    for name in sorted(os.listdir(root.home)):
        if name.startswith(UNFINISHED):
            hint = f"a plugin removes it when it starts, or: rm -r {root.home}/{name}"
            yield Problem("waste", name, "a layer that was never finished", hint)
    for layer in root.layers.values():
        if layer.kind == ORPHAN:
            hint = "it is mounted: find out by whom" if layer.mounted else "remove it while dockerd is stopped"
            yield Problem("waste", layer.id, "no image, container or builder knows it", hint)
        elif layer.kind == UNUSED:
            yield Problem("waste", layer.id, "no image, container or builder uses it", _LOST)
