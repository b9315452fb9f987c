"""The records of Docker's layer store, one directory per image layer, and what they make of each other.

::

    layerdb/sha256/<chain>/cache-id           the driver's id of the layer
    layerdb/sha256/<chain>/diff               its diff ID
    layerdb/sha256/<chain>/parent             the chain ID of the layer below; none for a base layer
    layerdb/sha256/<chain>/size               bytes of its files
    layerdb/sha256/<chain>/tar-split.json.gz  how to make its archive again

Source: moby v26.1.5, layer/filestore.go and layer/ro_layer.go.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from typing import NamedTuple

from onlap.layers.stream.digests import chain_ids
from onlap.syscalls.files import is_directory, open_file

# Docker's records are some KiB; repositories.json has some 200 bytes per name.
_MAX_TEXT = 64 << 20

SPLIT = "tar-split.json.gz"
CACHE_ID, DIFF, PARENT, SIZE = "cache-id", "diff", "parent", "size"
MOUNT_ID, INIT_ID = "mount-id", "init-id"

DIGEST = re.compile("sha256:[0-9a-f]{64}")
# moby writes 64 hexadecimal digits, and BuildKit 25 letters and digits; a plugin of Onlap's takes any name of a file.
ID = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")


class ChainRecord(NamedTuple):
    """What the layer store knows of an image layer.

    Attributes:
        directory: where its files are.
        cache_id: the driver's id; empty if the file is damaged, as the others.
        diff_id: its diff ID.
        parent: the chain ID of the layer below; empty for a base layer.
        damaged: the names of the files that are missing, empty, or not what they should be.
    """

    directory: str
    cache_id: str
    diff_id: str
    parent: str
    damaged: tuple[str, ...]

    @property
    def split(self) -> str:
        """The path of its tar-split metadata."""
        return os.path.join(self.directory, SPLIT)


def contradicts(record: ChainRecord, chain: str) -> bool:
    """Whether a layer's diff ID and parent, as far as they are there, make another chain ID than its record has."""
    if not record.diff_id or PARENT in record.damaged:
        return False
    return (chain_ids((record.parent, record.diff_id))[-1] if record.parent else record.diff_id) != chain


def cache_id(directory: str) -> str | None:
    """The driver's id in a record; None if the record has lost it, and empty if there is no record any more."""
    if not is_directory(directory):
        return ""
    return text_of(os.path.join(directory, CACHE_ID)) or None


def text_of(path: str) -> str | None:
    """A small file, without what surrounds its text; None if there is none, or it cannot be read, which is damage."""
    try:
        with open_file(path) as file:
            return os.fsdecode(file.read(_MAX_TEXT)).strip()
    except OSError:
        return None


def value_of(path: str) -> object:
    """The value in a JSON file; None if the file is missing or damaged."""
    try:
        return json.loads(text_of(path) or "")
    except (ValueError, RecursionError):
        return None


def json_of(path: str) -> dict[str, object] | None:
    """A JSON object; None if the file is missing or damaged, or has another value."""
    value = value_of(path)
    return value if isinstance(value, dict) else None


def read_record(directory: str, chain: str, texts: Mapping[str, str | None]) -> ChainRecord:
    """The record of an image layer.

    Args:
        directory: where its files are.
        chain: its chain ID.
        texts: their contents, without what surrounds them; None for a missing one.

    Raises:
        OSError: it cannot be told whether the metadata is there.
    """
    layer_id, diff_id, parent, size = (texts.get(name) or "" for name in (CACHE_ID, DIFF, PARENT, SIZE))
    damaged = []
    if not ID.fullmatch(layer_id):
        damaged.append(CACHE_ID)
        layer_id = ""
    if not DIGEST.fullmatch(diff_id):
        damaged.append(DIFF)
        diff_id = ""
    # A layer without a parent has its diff ID as its chain ID, so that a lost file shows.
    is_lost = texts.get(PARENT) == "" or diff_id not in ("", chain)
    if not DIGEST.fullmatch(parent) if parent else is_lost:
        damaged.append(PARENT)
        parent = ""
    if not size.isdigit():
        damaged.append(SIZE)
    try:
        status = os.stat(os.path.join(directory, SPLIT), follow_symlinks=False)
        is_there = stat.S_ISREG(status.st_mode) and status.st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        is_there = False
    if not is_there:
        damaged.append(SPLIT)
    return ChainRecord(directory, layer_id, diff_id, parent, tuple(damaged))


def restored(record: ChainRecord, name: str, chain: str, diff_ids: tuple[str, ...]) -> str | None:
    """The content of a damaged file of a record, from an image on the layer; None if nothing tells it.

    Args:
        record: the record.
        name: the file.
        chain: the layer's chain ID.
        diff_ids: those of an image that stands on it.
    """
    chains = chain_ids(diff_ids)
    if chain not in chains:
        return None
    at = chains.index(chain)
    if name == DIFF:
        return diff_ids[at]
    if name == PARENT and at:
        return chains[at - 1]
    return None
