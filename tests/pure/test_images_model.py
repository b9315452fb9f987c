"""Documents of images: what is taken, and what is said of the rest."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlap import errors
from onlap.images.spec import media, model, platforms, resolve
from onlap.images.spec.model import Descriptor, Index, Manifest, Platform
from onlap.layers.stream.digests import chain_ids
from pure.image_makers import CONFIG, INDEX, LAYER, MANIFEST, Made, digest_of, layer

DOCKER = "application/vnd.docker."
_KEYS = ["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size"]


@pytest.fixture
def made() -> Made:
    return Made(layer(a="1"), layer(b="2"))


def decode(document: dict[str, Any], media_type: str = "") -> Manifest | Index:
    data = json.dumps(document).encode()
    return model.decode_document(data, media_type, digest_of(data))


def test_a_manifest_is_read(made: Made) -> None:
    manifest = decode(made.manifest, MANIFEST)
    assert isinstance(manifest, Manifest)
    assert [each.digest for each in manifest.layers] == made.diff_ids
    config = model.decode_config(json.dumps(made.config).encode(), manifest)
    assert config.execution.cmd == ["/x"]
    assert config.platform == Platform("amd64", "linux")


@pytest.mark.parametrize("kind", ["", "+gzip", "+zstd"])
def test_layers_of_oci(made: Made, kind: str) -> None:
    made.manifest["layers"][0]["mediaType"] = LAYER + kind
    decode(made.manifest)


@pytest.mark.parametrize("kind", ["", ".gzip", ".zstd"])
def test_layers_of_docker(made: Made, kind: str) -> None:
    made.manifest["mediaType"] = f"{DOCKER}distribution.manifest.v2+json"
    made.manifest["config"]["mediaType"] = f"{DOCKER}container.image.v1+json"
    made.manifest["layers"][0]["mediaType"] = f"{DOCKER}image.rootfs.diff.tar{kind}"
    manifest = decode(made.manifest)
    assert isinstance(manifest, Manifest)
    assert manifest.is_docker


@pytest.mark.parametrize(
    "kind, says",
    [
        (f"{LAYER}+encrypted", "encrypted"),
        (f"{LAYER}+gzip+encrypted", "encrypted"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
        (f"{DOCKER}image.rootfs.foreign.diff.tar.gzip", "foreign"),
        (f"{LAYER}+brotli", "unknown media type"),
        ("text/plain\x1b[31m", r"text/plain\\e\[31m"),
    ],
)
def test_other_layers_are_named(made: Made, kind: str, says: str) -> None:
    made.manifest["layers"][1]["mediaType"] = kind
    with pytest.raises(errors.Unimplemented, match=says):
        decode(made.manifest)


@pytest.mark.parametrize("kind", ["application/vnd.oci.empty.v1+json", "application/vnd.cncf.helm.config.v1+json", ""])
def test_what_is_no_container_image_is_named(made: Made, kind: str) -> None:
    made.manifest["config"]["mediaType"] = kind
    with pytest.raises(errors.Unimplemented, match="not a container image"):
        decode(made.manifest)


def test_schema_1_is_named() -> None:
    with pytest.raises(errors.Unimplemented, match="schema 1"):
        decode({"schemaVersion": 1, "name": "x", "tag": "y", "fsLayers": []})


def test_a_document_is_one_thing(made: Made) -> None:
    both = {**made.manifest, "manifests": []}
    with pytest.raises(errors.InvalidArgument, match="at once"):
        decode(both)
    with pytest.raises(errors.InvalidArgument, match="its descriptor says"):
        decode(made.manifest, INDEX)


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersion": 3},
        {"schemaVersion": "2"},
        {"layers": None},
        {"layers": {}},
        {"layers": [{}]},
        {"layers": [{"mediaType": LAYER, "digest": "../../etc/passwd", "size": 1}]},
        {"layers": [{"mediaType": LAYER, "digest": "sha256:" + "0" * 64, "size": -1}]},
        {"layers": [{"mediaType": LAYER, "digest": "sha256:" + "0" * 64, "size": 1e300}]},
        {"layers": [{"mediaType": LAYER, "digest": "sha256:" + "0" * 64, "size": 1}] * 501},
        {"config": {"mediaType": CONFIG, "digest": "sha256:..", "size": 1}},
        {"mediaType": 7},
    ],
)
def test_what_is_no_manifest_is_refused(made: Made, change: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        decode({**made.manifest, **change})


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"null", b'{"schemaVersion": 2}'])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(errors.OnlapError):
        model.decode_document(data, "", "sha256:x")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=6),
    )
)
def test_any_json_is_a_document_or_an_error(document: object) -> None:
    data = json.dumps(document).encode()
    try:
        model.decode_document(data, "", "sha256:x")
    except errors.OnlapError:
        return


def test_fewer_diff_ids_than_layers_are_refused(made: Made) -> None:
    manifest = decode(made.manifest)
    assert isinstance(manifest, Manifest)
    for diff_ids in ([], made.diff_ids[:1], [*made.diff_ids, made.diff_ids[0]]):
        config = {**made.config, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        with pytest.raises(errors.InvalidArgument, match="diff IDs for 2 layers"):
            model.decode_config(json.dumps(config).encode(), manifest)
    config = {**made.config, "rootfs": {"type": "layers", "diff_ids": ["sha256:x", made.diff_ids[0]]}}
    with pytest.raises(errors.InvalidArgument):
        model.decode_config(json.dumps(config).encode(), manifest)


def test_a_configuration_may_have_nulls(made: Made) -> None:
    """Go writes null for an empty list."""
    manifest = decode(made.manifest)
    assert isinstance(manifest, Manifest)
    config = {**made.config, "config": {"Env": None, "Cmd": None, "Labels": None, "Volumes": None}, "history": None}
    execution = model.decode_config(json.dumps(config).encode(), manifest).execution
    assert (execution.env, execution.cmd) == (None, None)


def test_chain_ids() -> None:
    """The specification's rule, by hand."""
    one, two, three = ("sha256:" + digit * 64 for digit in "123")
    second = "sha256:" + hashlib.sha256(f"{one} {two}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {three}".encode()).hexdigest()
    assert chain_ids([one, two, three]) == (one, second, third)
    assert chain_ids([]) == ()


# Platforms and indexes


@pytest.mark.parametrize(
    "text, platform",
    [
        ("linux/arm64", Platform("arm64", "linux")),
        ("arm64", Platform("arm64", "linux")),
        ("linux/arm/v7", Platform("arm", "linux", "", "v7")),
        ("linux/x86_64", Platform("amd64", "linux")),
        ("Windows/AMD64", Platform("amd64", "windows")),
    ],
)
def test_a_platform_is_read(text: str, platform: Platform) -> None:
    assert platforms.parse(text) == platform


@pytest.mark.parametrize("text", ["/", "a/b/c/d", "linux/", "linux//v7"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        platforms.parse(text)


@pytest.mark.parametrize(
    "wanted, offered, fits",
    [
        ("linux/arm64", Platform("arm64", "linux", "", "v8"), True),
        ("linux/arm64/v8", Platform("arm64", "linux"), True),
        ("linux/arm/v7", Platform("arm", "linux", "", "v6"), True),
        ("linux/arm/v6", Platform("arm", "linux", "", "v7"), False),
        ("linux/amd64", Platform("arm64", "linux"), False),
        ("linux/amd64", Platform("amd64", "windows"), False),
        ("linux/amd64", Platform("amd64", "linux", "", "v3"), False),
    ],
)
def test_a_platform_fits(wanted: str, offered: Platform, fits: bool) -> None:
    assert platforms.matches(platforms.parse(wanted), offered) is fits


def images_of(*architectures: str) -> tuple[Made, list[dict[str, Any]]]:
    """One place with an image for each."""
    place = Made()
    entries = []
    for each in architectures:
        made = Made(layer(a=each), config={"architecture": each})
        place.blobs.update(made.blobs)
        entries.append({**place.add(MANIFEST, made.data), "platform": {"os": "linux", "architecture": each}})
    return place, entries


def resolved(place: Made, index: bytes, platform: str) -> model.Documents:
    def get(descriptor: Descriptor, limit: int) -> bytes:
        try:
            return place.blobs[descriptor.digest]
        except KeyError:
            raise errors.NotFound(f"no {descriptor.digest}") from None

    place.add(INDEX, index)
    descriptor = Descriptor(INDEX, digest_of(index), len(index))
    return resolve.resolve(get, descriptor, platforms.parse(platform))


def test_the_image_for_the_platform_is_chosen() -> None:
    place, entries = images_of("amd64", "arm64")
    attestation = {**place.add(MANIFEST, b"{}"), "platform": {"os": "unknown", "architecture": "unknown"}}
    index = place.index(attestation, *entries)
    assert resolved(place, index, "linux/arm64").config.architecture == "arm64"
    with pytest.raises(errors.NotFound, match=r"linux/s390x.*linux/amd64, linux/arm64") as caught:
        resolved(place, index, "linux/s390x")
    assert "unknown" not in str(caught.value)


def test_entries_without_a_platform_are_looked_into() -> None:
    place, entries = images_of("amd64", "arm64")
    for entry in entries:
        del entry["platform"]
    assert resolved(place, place.index(*entries), "linux/arm64").config.architecture == "arm64"
    with pytest.raises(errors.NotFound, match="--platform"):
        resolved(place, place.index(entries[0]), "linux/arm64")


def test_an_index_in_an_index_is_followed() -> None:
    place, entries = images_of("amd64")
    inner = {**place.add(INDEX, place.index(*entries)), "platform": {"os": "linux", "architecture": "amd64"}}
    assert resolved(place, place.index(inner), "linux/amd64").config.architecture == "amd64"


def test_an_empty_index_has_no_image() -> None:
    with pytest.raises(errors.NotFound):
        resolved(Made(), b'{"schemaVersion": 2, "manifests": []}', "linux/amd64")


def test_another_content_than_the_descriptor_says_is_refused() -> None:
    place, entries = images_of("amd64")
    place.blobs[entries[0]["digest"]] = place.blobs[entries[0]["digest"]] + b" "
    with pytest.raises(errors.DigestMismatch):
        resolved(place, place.index(*entries), "linux/amd64")


def test_types_of_our_layers() -> None:
    assert media.layer_type(docker=False, compression="gzip") == f"{LAYER}+gzip"
    assert media.layer_type(docker=True, compression="gzip") == f"{DOCKER}image.rootfs.diff.tar.gzip"
    assert media.layer_type(docker=False, compression="none") == LAYER
