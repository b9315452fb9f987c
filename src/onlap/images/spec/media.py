"""Media types: which ones are accepted, and why others are not."""

from __future__ import annotations

from onlap import errors
from onlap.errors import shown

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"

DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

SCHEMA_1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
# A layer's compression is told from its first bytes, as in Docker; its media type need only be a known one.
LAYERS = frozenset(
    {
        OCI_LAYER,
        f"{OCI_LAYER}+gzip",
        f"{OCI_LAYER}+zstd",
        DOCKER_LAYER,
        f"{DOCKER_LAYER}.gzip",
        f"{DOCKER_LAYER}.zstd",
    }
)

ACCEPT = (OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST)


def is_document(media_type: str) -> bool:
    """Whether it is the media type of a manifest or an index."""
    return media_type in INDEXES or media_type in MANIFESTS


def check_config(media_type: str, digest: str) -> None:
    """Raise Unimplemented where the configuration is not that of a container image."""
    if media_type not in CONFIGS:
        raise errors.Unimplemented(
            f"{digest} is not a container image: its configuration is of the type {shown(media_type)}",
            key=digest,
            hint="it may be a chart, a signature or another artifact",
        )


def check_layer(media_type: str, digest: str) -> None:
    """Raise Unimplemented where a layer cannot be unpacked."""
    if media_type in LAYERS:
        return
    if "+encrypted" in media_type:
        raise errors.Unimplemented(
            f"the layer {digest} is encrypted", key=digest, hint="decrypt the image first, as with: skopeo copy"
        )
    if "nondistributable" in media_type or "foreign" in media_type:
        raise errors.Unimplemented(
            f"the layer {digest} is foreign ({shown(media_type)}): registries do not distribute it", key=digest
        )
    raise errors.Unimplemented(f"the layer {digest} has the unknown media type {shown(media_type)}", key=digest)


def layer_type(*, docker: bool, compression: str) -> str:
    """The media type of a new layer, in the family of the image's other media types.

    Args:
        docker: Docker's family, else OCI's.
        compression: ``"none"``, ``"gzip"`` or ``"zstd"``.
    """
    base, separator = (DOCKER_LAYER, ".") if docker else (OCI_LAYER, "+")
    return base if compression == "none" else f"{base}{separator}{compression}"
