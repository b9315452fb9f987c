"""What containerd's images say: their documents in the content store, and the chain IDs that follow from them.

A blob is ``io.containerd.content.v1.content/blobs/sha256/<hex>``. Nothing in a document is believed before its digest
was verified. An image may lack blobs: manifests for other platforms, layers that were discarded once they were unpacked
(``discard_unpacked_layers``) or that are fetched when they are read. Then its namespace has no record of them either,
since containerd removes the record first. A record without a file is a loss, also of such a blob: containerd believes
it has the blob, and does not fetch it again.

Sources: containerd v1.7.24, content/local/store.go, metadata/content.go, images/image.go; OCI image specification 1.1.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

from onlap import errors
from onlap.check.stores.containerd.metadata import Namespace, Target
from onlap.errors import shown
from onlap.images.spec import media, model
from onlap.images.spec.model import Descriptor, Index, Manifest
from onlap.layers.stream.digests import chain_ids, check_content, check_sha256, digest_of
from onlap.syscalls.files import names_in, open_file

CONTENT = "io.containerd.content.v1.content"

# Indexes in indexes, and documents of one image, so that a hostile one comes to an end.
_MAX_DEPTH = 4
_MAX_DOCUMENTS = 2000


class Stacked(NamedTuple):
    """A layer in an image.

    Attributes:
        diff_id: the digest of its archive without compression.
        below: the chain ID of the layer below; None for the lowest.
        blob: the digest of its blob.
        size: bytes that the blob should have.
        is_archive: whether the blob is one that can be unpacked: not one that is encrypted, or that a snapshotter of
            its own reads.
    """

    diff_id: str
    below: str | None
    blob: str
    size: int
    is_archive: bool


class Trouble(NamedTuple):
    """What is wrong with a blob: the kind of a finding, the blob's digest, and the detail."""

    kind: str
    digest: str
    detail: str


class Read(NamedTuple):
    """What an image's documents say.

    Attributes:
        layers: by chain ID; of all its platforms whose documents are there.
        blobs: the digests of all blobs that its documents name, and of the documents that are there.
        troubles: what is wrong with them.
    """

    layers: Mapping[str, Stacked]
    blobs: frozenset[str]
    troubles: tuple[Trouble, ...]


_Identity = tuple[int, ...]


class Content:
    """The content store.

    Args:
        directory: containerd's root.
    """

    def __init__(self, directory: str) -> None:
        self._directory = os.path.join(directory, CONTENT)
        # By digest, and the number of layers where it is a configuration: which file was verified, and what is in it;
        # None: no document of an image.
        self._verified: dict[tuple[str, int], tuple[_Identity, Index | Manifest | model.Config | None]] = {}

    def path(self, digest: str) -> str:
        """Where a blob is; raises InvalidArgument if it is no SHA-256 digest."""
        return os.path.join(self._directory, "blobs", "sha256", check_sha256(digest))

    def size(self, digest: str) -> int | None:
        """Bytes of a blob; -1 if it is no file; None if it is not there.

        Raises:
            OnlapError: it cannot be looked at.
        """
        with errors.translated("look at a blob", key=digest):
            try:
                status = os.lstat(self.path(digest))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def trouble(self, digest: str, size: int) -> Trouble | None:
        """What is wrong with a blob that should be there, without reading it; the size is -1 if it is not known.

        Raises:
            OnlapError: it cannot be looked at.
        """
        found = self.size(digest)
        if found is None:
            return Trouble("blob-missing", digest, "containerd has a record of it, but there is no file")
        if found < 0:
            return Trouble("blob-damaged", digest, "it is not a file")
        if found != size >= 0:
            return Trouble("blob-damaged", digest, f"it has {found} bytes, not {size}")
        return None

    def read(self, target: Target, namespace: Namespace, *, whole: bool) -> Read:
        """What an image says, and what is wrong with its documents and with the sizes of its layers' blobs.

        Args:
            target: what its name stands for.
            namespace: where it is.
            whole: whether all of the namespace's records could be read.

        Raises:
            OnlapError: something cannot be looked at.
        """
        layers: dict[str, Stacked] = {}
        blobs: set[str] = set()
        troubles: list[Trouble] = []

        def lacks(digest: str, document: object) -> None:
            # Others in this store may have the file: this namespace cannot read it without a record. A file that has a
            # record and is not there is found with all others.
            if whole and digest not in namespace.blobs:
                troubles.append(Trouble("blob-missing", digest, "its namespace has no record of it"))
            elif not whole and document is _MISSING:
                troubles.append(Trouble("blob-missing", digest, ""))

        waiting = [(Descriptor(target.media_type, target.digest, target.size), 0)]
        for descriptor, depth in waiting:
            digest = descriptor.digest
            if not media.is_document(descriptor.media_type):
                continue
            blobs.add(digest)
            document = self._get(descriptor, model.MAX_MANIFEST, troubles, None)
            if depth == 0:
                lacks(digest, document)
            if isinstance(document, Index) and depth < _MAX_DEPTH:
                room = max(0, _MAX_DOCUMENTS - len(waiting))
                waiting += [(each, depth + 1) for each in document.manifests[:room]]
            if not isinstance(document, Manifest):
                continue
            blobs.update(each.digest for each in (document.config, *document.layers))
            troubles += self._sizes(document)
            if document.config.media_type not in media.CONFIGS:
                continue  # a chart, a signature or the like: nothing to be unpacked
            config = self._get(document.config, model.MAX_CONFIG, troubles, document)
            # The manifest for another platform may be there for another namespace.
            if depth == 0 or digest in namespace.blobs:
                lacks(document.config.digest, config)
            if isinstance(config, model.Config):
                layers.update(_stacked(document, config))
        return Read(layers, frozenset(blobs), tuple(troubles))

    def leftovers(self, known: frozenset[str], now: float) -> list[str]:
        """Unfinished blobs that nothing goes on with: their directories, relative to the root.

        Args:
            known: what containerd has a record of; it keeps these for a day, or as long as someone has a lease of them.
            now: seconds since the epoch.

        Raises:
            OnlapError: they cannot be looked at.
        """
        ours = {digest_of(each.encode("utf-8", "surrogateescape")).partition(":")[2] for each in known}
        place = os.path.join(self._directory, _INGEST)
        with errors.translated("look for unfinished blobs", key=place):
            found = []
            for name in names_in(place):
                try:
                    changed = max(os.lstat(os.path.join(place, *path)).st_mtime for path in ((name,), (name, "data")))
                except (FileNotFoundError, NotADirectoryError):
                    changed = 0.0
                if name not in ours or changed < now - _DAY:
                    found.append(os.path.join(CONTENT, _INGEST, name))
        return found

    def _get(self, descriptor: Descriptor, limit: int, troubles: list[Trouble], manifest: Manifest | None) -> object:
        """A document, or with a manifest its configuration; None if it says nothing, or cannot be believed."""
        digest, size = descriptor.digest, descriptor.size
        key = digest, -1 if manifest is None else len(manifest.layers)
        try:
            path = self.path(digest)
        except errors.InvalidArgument:
            return None  # an algorithm that containerd knows, and we do not
        try:
            with open_file(path) as file:
                status = os.fstat(file.fileno())
                identity = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
                known = self._verified.get(key)
                if known and known[0] == identity and status.st_size == size:
                    return known[1]
                if not stat.S_ISREG(status.st_mode):
                    raise errors.DataLoss("it is not a file", key=digest)
                if status.st_size > limit:
                    return None  # larger than any document that is read; whether it is damaged cannot be told
                data = file.read(limit + 1)
            check_content(digest_of(data), len(data), digest, size)
        except (FileNotFoundError, NotADirectoryError):
            return _MISSING
        except OSError as error:
            translated = errors.from_oserror(error, doing="read a blob", key=digest)
            if not isinstance(translated, (errors.DataLoss, errors.InvalidArgument)):
                raise translated from error
            troubles.append(Trouble("blob-damaged", digest, translated.message))
            return None
        except errors.DataLoss as error:
            troubles.append(Trouble("blob-damaged", digest, error.message))
            return None
        parsed = _parsed(data, digest) if manifest is None else _parsed_config(data, manifest)
        self._verified[key] = identity, parsed
        return parsed

    def _sizes(self, manifest: Manifest) -> list[Trouble]:
        """Layers' blobs that are there, with another size than the manifest says."""
        found = []
        for layer in manifest.layers:
            size = self.size(layer.digest)
            if size is not None and size != layer.size:
                detail = "it is not a file" if size < 0 else f"it has {size} bytes, not {layer.size}"
                found.append(Trouble("blob-damaged", layer.digest, detail))
        return found


_MISSING = object()
_INGEST = "ingest"
_DAY = 24 * 60 * 60.0  # seconds; metadata/content.go: how long an unfinished blob without a lease is kept


def _parsed(data: bytes, digest: str) -> Index | Manifest | None:
    """A document whose digest is right: whoever made it is to be asked where it makes no sense, so it has no findings.

    More is taken than :func:`onlap.images.spec.model.decode_document` does: layers may be of any kind.
    """
    try:
        document = model.decode(data, dict[str, Any], digest)
        is_index = "manifests" in document
        if is_index == ("layers" in document):
            return None
        if is_index:
            index = model.decode(data, Index, digest)
            for each in index.manifests:
                model.check_descriptor(each)
            return index
        manifest = model.decode(data, Manifest, digest)
        model.check_layer_count(len(manifest.layers), digest)
        for each in (manifest.config, *manifest.layers):
            model.check_descriptor(each)
    except (errors.InvalidArgument, errors.Unimplemented):
        return None
    return manifest


def _parsed_config(data: bytes, manifest: Manifest) -> model.Config | None:
    try:
        return model.decode_config(data, manifest)
    except (errors.InvalidArgument, errors.Unimplemented):
        return None


def _stacked(manifest: Manifest, config: model.Config) -> dict[str, Stacked]:
    diff_ids = config.rootfs.diff_ids
    chain = chain_ids(diff_ids)
    return {
        id: Stacked(diff_id, below, layer.digest, layer.size, layer.media_type in media.LAYERS)
        for id, below, diff_id, layer in zip(chain, (None, *chain), diff_ids, manifest.layers, strict=False)
    }


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 digest."""
    try:
        check_sha256(text)
    except errors.InvalidArgument:
        return False
    return True


def described(target: Target) -> str | None:
    """What is wrong with the record of an image; None if nothing is."""
    if target.size < 0:
        return "its record does not say how large its document is"
    if not target.digest:
        return "its record does not say which document is its"
    algorithm, colon, _ = target.digest.partition(":")
    if not colon or (algorithm == "sha256" and not is_digest(target.digest)):
        return f"its record has the digest {shown(target.digest)}"
    return None
