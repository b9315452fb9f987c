"""From a descriptor to one image: through indexes, to the manifest and the configuration for one platform."""

from __future__ import annotations

from collections.abc import Callable

from onlap import errors
from onlap.images.spec import media, model, platforms
from onlap.images.spec.model import Descriptor, Documents, Index, Platform
from onlap.layers.stream.digests import check_content, digest_of

# get(descriptor, limit): the bytes of a small blob, not verified yet.
Get = Callable[[Descriptor, int], bytes]

# Indexes within indexes. No honest image has more than two.
_MAX_DEPTH = 4
# Manifests that an index may name, and documents to get in all, so that a hostile image comes to an end.
_MAX_ENTRIES = 1000
_MAX_DOCUMENTS = 2 * _MAX_ENTRIES + _MAX_DEPTH


def resolve(get: Get, descriptor: Descriptor, wanted: Platform) -> Documents:
    """The image that a descriptor leads to.

    Raises:
        NotFound: there is none for the platform.
        InvalidArgument, Unimplemented: see :func:`onlap.images.spec.model.decode_document`; or there are too many
            indexes.
        DigestMismatch: a document is not what its descriptor says.
    """
    return _resolve(_bounded(get), descriptor, wanted, (), chosen=False)


def choose(get: Get, index: Index, wanted: Platform, what: str) -> Documents:
    """The image of an index that fits the platform best; raises as :func:`resolve` does."""
    return _choose(_bounded(get), index, wanted, what, ())


def _bounded(get: Get) -> Get:
    left = _MAX_DOCUMENTS

    def bounded(descriptor: Descriptor, limit: int) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise errors.InvalidArgument(
                f"the image leads through more than {_MAX_DOCUMENTS} documents", key=descriptor.digest
            )
        return get(descriptor, limit)

    return bounded


def _resolve(get: Get, descriptor: Descriptor, wanted: Platform, above: tuple[str, ...], *, chosen: bool) -> Documents:
    if descriptor.digest in above:
        raise errors.InvalidArgument(f"the index {descriptor.digest} leads back to itself", key=descriptor.digest)
    if len(above) >= _MAX_DEPTH:
        raise errors.InvalidArgument(
            f"there are more than {_MAX_DEPTH} indexes within one another", key=descriptor.digest
        )
    data = fetch(get, descriptor, model.MAX_MANIFEST)
    document = model.decode_document(data, descriptor.media_type, descriptor.digest)
    if isinstance(document, Index):
        return _choose(get, document, wanted, descriptor.digest, (*above, descriptor.digest))
    if document.media_type and document.media_type != descriptor.media_type:
        descriptor = Descriptor(document.media_type, descriptor.digest, descriptor.size)
    if descriptor.media_type not in media.MANIFESTS:
        kind = media.DOCKER_MANIFEST if document.is_docker else media.OCI_MANIFEST
        descriptor = Descriptor(kind, descriptor.digest, descriptor.size)
    config_data = fetch(get, document.config, model.MAX_CONFIG)
    config = model.decode_config(config_data, document)
    if not chosen and config.architecture and config.os and not platforms.matches(wanted, config.platform):
        raise errors.NotFound(
            f"the image is for {config.platform}, not for {wanted}",
            key=descriptor.digest,
            hint=f"take it with --platform {config.platform}",
        )
    return Documents(descriptor, document, data, config, config_data)


def _choose(get: Get, index: Index, wanted: Platform, what: str, above: tuple[str, ...]) -> Documents:
    if len(index.manifests) > _MAX_ENTRIES:
        raise errors.InvalidArgument(f"the index {what} has {len(index.manifests)} entries", key=what)
    entries = [each for each in index.manifests if not each.media_type or media.is_document(each.media_type)]
    candidates = [(each, each.platform) for each in entries if each.platform is not None]
    unsaid = [each for each in entries if each.platform is None]
    if candidates and (not unsaid or any(platforms.matches(wanted, platform) for _, platform in candidates)):
        return _resolve(get, platforms.choose(candidates, wanted, what), wanted, above, chosen=True)
    failure: errors.OnlapError | None = None
    for each in unsaid:
        try:
            return _resolve(get, each, wanted, above, chosen=False)
        except errors.NotFound as error:
            failure = failure or error
    if failure is not None:
        raise failure
    raise errors.NotFound(f"{what} has no image for {wanted}", key=what)


def fetch(get: Get, descriptor: Descriptor, limit: int) -> bytes:
    """A small blob, verified.

    Raises:
        ResourceExhausted: it is larger.
        DigestMismatch: it is something else.
    """
    if descriptor.size > limit:
        raise errors.ResourceExhausted(
            f"{descriptor.digest} has {descriptor.size} bytes, more than the {limit} that are read",
            key=descriptor.digest,
        )
    data = get(descriptor, limit)
    check_content(digest_of(data), len(data), descriptor.digest, descriptor.size)
    return data
