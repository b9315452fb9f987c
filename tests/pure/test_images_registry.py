"""Registries that misbehave: each a clear error, and nothing left; or overcome."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import urllib3

from onlap import errors
from onlap.containers.run import Source, find_source
from onlap.images import Access, Credentials
from onlap.images.registry.connections import discard
from onlap.store import Store
from pure.image_makers import INDEX, MANIFEST, Faulty, Made, Reply, Request, digest_of, layer

NOBODY = Credentials()


pytestmark = pytest.mark.usefixtures("hasty")


def pull(store: Store, registry: Faulty, version: str = ":1", credentials: Credentials = NOBODY, **more: Any) -> Any:
    return store.images.pull(
        f"{registry.host}/some/image{version}", access=Access(plain_http=True, credentials=credentials), **more
    )


def left(store: Store) -> list[str]:
    """All that a failed pull could leave."""
    found = [info.name for info in store.walk()] + [image.name for image in store.images.list()]
    content = store.snapshotter.catalog.layout.content
    for top, _, names in os.walk(content):
        found += [os.path.join(top, name) for name in names]
    return found


def tokens(registry: Faulty, elsewhere: Faulty) -> None:
    """The registry wants a token that the other one gives."""
    realm = f"http://{elsewhere.host}/token"

    def guard(request: Request) -> Reply | None:
        if request.headers.get("authorization") == "Bearer t0ken":
            return None
        scope = "repository:some/image:pull"
        return Reply(401, WWW_Authenticate=f'Bearer realm="{realm}",service="s, x",scope="{scope}"')

    registry.answers.append(guard)
    elsewhere.answers.append(lambda request: Reply(200, b'{"token": "t0ken"}') if "/token" in request.path else None)


# What is overcome


def test_an_image_comes_whole(store: Store, registry: Faulty, made: Made) -> None:
    stages: dict[str, int] = {}
    image = pull(store, registry, progress=lambda report: stages.__setitem__(report.stage, report.done))
    assert image.digest == digest_of(made.data)
    assert image.diff_ids == tuple(made.diff_ids)
    assert set(stages) == {"fetch", "unpack"}
    assert stages["fetch"] == stages["unpack"] == image.size
    tree = store.snapshotter.layers(store.snapshotter.record(image.chain_ids[-1]))[0]
    assert (Path(tree, "a").read_text(), Path(tree, "b").read_text()) == ("1", "2")
    count = len(registry.asked("blobs"))
    assert pull(store, registry) == image
    assert len(registry.asked("blobs")) == count  # all of it is there


def test_a_damaged_blob_is_fetched_again(store: Store, registry: Faulty, made: Made) -> None:
    image = pull(store, registry, unpack=False)
    for digest in image.blobs:
        path = Path(store.content.path(digest))
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert pull(store, registry) == image
    assert all(map(store.content.is_whole, image.blobs))


def test_a_fetch_resumes_after_a_cut_connection(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    cuts = iter([1_000_000, 1_000_000])

    def cut(request: Request) -> Reply | None:
        if not request.path.endswith(big):
            return None
        reply = registry.honest(request)
        reply.cut = next(cuts, None)
        return reply

    registry.answers.append(cut)
    pull(store, registry)
    assert [each.headers.get("range") for each in registry.asked(big)] == [
        None,
        "bytes=1000000-",
        "bytes=2000000-",
    ]


def test_an_interrupted_pull_is_resumed(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]

    def cut(request: Request) -> Reply | None:
        if not request.path.endswith(big):
            return None
        if "range" in request.headers:
            return Reply(503)
        reply = registry.honest(request)
        reply.cut = 1_500_000
        return reply

    registry.answers.append(cut)
    with pytest.raises(errors.Unavailable, match="503"):
        pull(store, registry)
    assert store.images.list() == []
    store.cleanup()  # which takes nothing of it
    registry.answers.clear()
    registry.requests.clear()
    pull(store, registry)
    assert [each.headers.get("range") for each in registry.asked(big)] == ["bytes=1500000-"]


def test_a_registry_without_ranges_starts_again(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    cuts = iter([1_000_000])

    def cut(request: Request) -> Reply | None:
        if not request.path.endswith(big):
            return None
        return Reply(200, made.blobs[big], cut=next(cuts, None))

    registry.answers.append(cut)
    assert pull(store, registry).digest == digest_of(made.data)


@pytest.mark.parametrize("where", ["manifests", "token"])
def test_a_document_that_is_cut_is_asked_for_again(store: Store, registry: Faulty, made: Made, where: str) -> None:
    with Faulty(made).running() as elsewhere:
        tokens(registry, elsewhere)
        cuts = iter([5])

        def cut(request: Request) -> Reply | None:
            if where not in request.path or (where == "manifests" and "authorization" not in request.headers):
                return None
            at = next(cuts, None)
            return None if at is None else Reply(200, made.data, cut=at)

        (elsewhere if where == "token" else registry).answers.append(cut)
        assert pull(store, registry).digest == digest_of(made.data)


def test_fetching_again_is_not_progress(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]

    def cut(request: Request) -> Reply | None:
        if not request.path.endswith(big):
            return None
        return Reply(416) if "range" in request.headers else Reply(200, made.blobs[big], cut=1000)

    registry.answers.append(cut)
    with pytest.raises(errors.Unavailable, match="fetch"):
        pull(store, registry)


class Endless:
    """A body, read piece by piece."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self.closed = False

    def read(self, amount: int) -> bytes:
        self.read_bytes += amount
        assert self.read_bytes < 1 << 20
        return b"x" * amount

    def close(self) -> None:
        self.closed = True


def test_what_says_nothing_is_not_read_to_its_end() -> None:
    body = Endless()
    discard(urllib3.HTTPResponse(body, preload_content=False))  # type: ignore[arg-type]
    assert body.closed


def test_another_part_than_asked_for_is_refused(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    data = made.blobs[big]
    replies = iter(
        [
            Reply(200, data, cut=1_000_000),
            Reply(206, data[500:], Content_Range=f"bytes 500-{len(data) - 1}/{len(data)}"),
            Reply(200, data),
        ]
    )
    registry.answers.append(lambda request: next(replies) if request.path.endswith(big) else None)
    pull(store, registry)
    assert store.content.read(big, len(data)) == data


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_registry_is_asked_again(store: Store, registry: Faulty, status: int) -> None:
    waiting = {word: [Reply(status), Reply(status, Retry_After="0")] for word in ("manifests", "blobs")}

    def busy(request: Request) -> Reply | None:
        return next((replies.pop() for word, replies in waiting.items() if word in request.path and replies), None)

    registry.answers.append(busy)
    pull(store, registry)
    assert not any(waiting.values())


def test_a_registry_that_stays_busy_is_unavailable(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda _request: Reply(503))
    with pytest.raises(errors.Unavailable, match="503"):
        pull(store, registry)
    assert len(registry.requests) == 5


def test_nobody_there_is_unavailable(store: Store) -> None:
    with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
        store.images.pull("127.0.0.1:1/x:1")


def test_http_where_tls_is_wanted_says_so(store: Store, registry: Faulty) -> None:
    with pytest.raises(errors.Unavailable, match="--plain-http"):
        store.images.pull(f"{registry.host}/x:1", access=Access(plain_http=False))


def test_a_callback_can_end_a_pull(store: Store, registry: Faulty) -> None:
    class Enough(Exception):
        pass

    def stop(_report: object) -> None:
        raise Enough

    with pytest.raises(Enough):
        pull(store, registry, progress=stop)
    assert store.images.list() == []
    assert [info for info in store.walk() if info.kind == "active"] == []
    pull(store, registry)


# Pulled when it is run


def test_an_image_that_is_not_here_is_pulled(store: Store, registry: Faulty, made: Made) -> None:
    name = f"{registry.host}/some/image:1"

    def source(**more: Any) -> Source:
        return find_source(store.snapshotter, lambda: store.images, name, **more)

    with pytest.raises(errors.NotFound, match="no snapshot and no image"):
        source()
    assert registry.requests == []
    assert source(pull=store.images.pull).defaults.command == ("/x",)
    before = len(registry.requests)
    source(pull=store.images.pull)
    assert len(registry.requests) == before  # it is here
    changed = Made(*made.layers, config={"config": {"Cmd": ["/new"]}})
    registry.made = changed
    assert source(pull=store.images.pull, newest=True).defaults.command == ("/new",)


def test_an_image_that_cannot_be_pulled_says_why(store: Store, registry: Faulty) -> None:
    for name, error in ((f"{registry.host}/some/image:2", errors.NotFound), ("127.0.0.1:1/x:1", errors.Unavailable)):
        with pytest.raises(error, match=r"there is no snapshot .* and the image cannot be pulled"):
            find_source(store.snapshotter, lambda: store.images, name, pull=store.images.pull)
    with pytest.raises(errors.NotFound, match="no snapshot and no image"):
        find_source(store.snapshotter, lambda: store.images, "No name", pull=store.images.pull)


# What is refused, with nothing left


def test_other_bytes_are_refused(store: Store, registry: Faulty, made: Made) -> None:
    big = made.diff_ids[0]
    wrong = b"y" * len(made.blobs[big])
    registry.answers.append(lambda request: Reply(200, wrong) if request.path.endswith(big) else None)
    with pytest.raises(errors.DigestMismatch, match=big):
        pull(store, registry)
    assert left(store) == []


@pytest.mark.parametrize("more", [-1, 1])
def test_a_lying_size_is_refused(store: Store, registry: Faulty, made: Made, more: int) -> None:
    made.manifest["layers"][0]["size"] += more
    with pytest.raises(errors.DigestMismatch, match="bytes"):
        pull(store, registry)
    assert left(store) == []


def test_a_lying_size_of_the_configuration_is_refused(store: Store, registry: Faulty, made: Made) -> None:
    made.manifest["config"]["size"] += 1
    with pytest.raises(errors.DigestMismatch):
        pull(store, registry)
    assert left(store) == []


def test_another_manifest_than_asked_for_is_refused(store: Store, registry: Faulty, made: Made) -> None:
    asked = "sha256:" + "0" * 64
    registry.answers.append(
        lambda request: Reply(200, made.data, Content_Type=MANIFEST) if request.path.endswith(asked) else None
    )
    with pytest.raises(errors.DigestMismatch, match=asked):
        pull(store, registry, f"@{asked}")
    assert left(store) == []


def test_another_digest_than_announced_is_refused(store: Store, registry: Faulty, made: Made) -> None:
    def lie(request: Request) -> Reply | None:
        if "manifests" not in request.path:
            return None
        return Reply(200, made.data, Content_Type=MANIFEST, Docker_Content_Digest="sha256:" + "0" * 64)

    registry.answers.append(lie)
    with pytest.raises(errors.DigestMismatch):
        pull(store, registry)
    assert left(store) == []


def test_an_index_that_loops_ends(store: Store, registry: Faulty, made: Made) -> None:
    """No index can hold its own digest; but a registry can answer with one index to whatever it is asked for."""
    platform = {"os": "linux", "architecture": "amd64"}
    index = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{"mediaType": INDEX, "digest": "sha256:" + "1" * 64, "size": 1, "platform": platform}],
        }
    ).encode()
    registry.answers.append(
        lambda request: Reply(200, index, Content_Type=INDEX) if "manifests" in request.path else None
    )
    with pytest.raises((errors.InvalidArgument, errors.DigestMismatch)):
        pull(store, registry, platform="linux/amd64")
    assert left(store) == []


def test_indexes_in_indexes_end(store: Store, registry: Faulty, made: Made) -> None:
    platform = {"os": "linux", "architecture": "amd64"}
    entry = {**made.add(MANIFEST, made.data), "platform": platform}
    for _ in range(10):
        entry = {**made.add(INDEX, made.index(entry)), "platform": platform}
    with pytest.raises(errors.InvalidArgument, match="within one another"):
        pull(store, registry, f"@{entry['digest']}", platform="linux/amd64")
    assert left(store) == []


def test_a_huge_manifest_is_not_read(store: Store, registry: Faulty) -> None:
    registry.answers.append(lambda _request: Reply(200, b" " * (5 << 20), Content_Type=MANIFEST))
    with pytest.raises(errors.ResourceExhausted):
        pull(store, registry)
    assert left(store) == []


def test_a_wrong_diff_id_is_refused(store: Store, registry: Faulty) -> None:
    registry.made = Made(layer(a="1"), config={"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}})
    with pytest.raises(errors.DigestMismatch):
        pull(store, registry)
    assert left(store) == []


def test_a_missing_image_is_not_found(store: Store, registry: Faulty) -> None:
    with pytest.raises(errors.NotFound, match="manifest unknown"):
        pull(store, registry, ":2")
