"""The content store: whole and verified, or not there; kept while somebody needs it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onlap import errors
from onlap.catalog import pins, runs
from onlap.catalog.catalog import Catalog
from onlap.content.store import ContentStore
from onlap.content.writer import Blob

DATA = b"layer" * 1000
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()
HEX = DIGEST.removeprefix("sha256:")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "root", create=True, timeout=10)
    yield catalog
    catalog.close()


@pytest.fixture
def content(catalog: Catalog) -> ContentStore:
    return ContentStore(catalog)


def files(catalog: Catalog) -> list[str]:
    """Every file below content/ and staging/."""
    tops = (catalog.layout.content, catalog.layout.staging)
    return sorted(
        os.path.relpath(os.path.join(top, name), catalog.layout.root)
        for start in tops
        for top, _, names in os.walk(start)
        for name in names
    )


def test_a_blob_is_where_its_digest_says(catalog: Catalog, content: ContentStore) -> None:
    assert not content.has(DIGEST)
    assert content.put([DATA[:7], DATA[7:]], digest=DIGEST, size=len(DATA)) == Blob(DIGEST, len(DATA))
    assert content.has(DIGEST)
    assert content.size(DIGEST) == len(DATA)
    assert content.read(DIGEST, len(DATA)) == DATA
    assert Path(catalog.layout.content, "blobs/sha256", HEX).read_bytes() == DATA
    with content.open(DIGEST) as file:
        assert file.read() == DATA
    assert list(content.walk()) == [Blob(DIGEST, len(DATA))]
    assert files(catalog) == [f"content/blobs/sha256/{HEX}"]


def test_nothing_is_seen_before_it_is_whole(catalog: Catalog, content: ContentStore) -> None:
    with content.writer() as writer:
        writer.write(DATA)
        assert list(content.walk()) == []
    assert files(catalog) == []


@pytest.mark.parametrize("digest, size", [(DIGEST[:-1] + "0", None), (None, len(DATA) - 1), (None, len(DATA) + 1)])
def test_another_content_is_refused(
    catalog: Catalog, content: ContentStore, digest: str | None, size: int | None
) -> None:
    with pytest.raises(errors.DigestMismatch):
        content.put([DATA], digest=digest, size=size)
    assert files(catalog) == []


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "A" * 64, "sha256:../../../../etc/passwd", "sha256:" + "0" * 63, "md5:0"]
)
def test_what_is_no_digest_leads_nowhere(content: ContentStore, digest: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        content.open(digest)


def test_another_algorithm_is_reported(content: ContentStore) -> None:
    with pytest.raises(errors.Unimplemented, match="sha512"):
        content.has("sha512:" + "0" * 128)


def test_a_missing_blob_is_not_found(content: ContentStore) -> None:
    for call in (content.size, content.open, content.delete, lambda digest: content.read(digest, 10)):
        with pytest.raises(errors.NotFound, match=DIGEST):
            call(DIGEST)


def test_a_damaged_blob_is_data_loss(catalog: Catalog, content: ContentStore) -> None:
    content.put([DATA])
    Path(content.path(DIGEST)).write_bytes(DATA[:-1] + b"!")
    with pytest.raises(errors.DataLoss, match="damaged"):
        content.read(DIGEST, len(DATA))


def test_a_large_blob_is_not_read_at_once(content: ContentStore) -> None:
    content.put([DATA])
    with pytest.raises(errors.ResourceExhausted):
        content.read(DIGEST, len(DATA) - 1)


# Partials


def test_a_fetch_resumes_where_it_stopped(catalog: Catalog, content: ContentStore) -> None:
    with content.partial(DIGEST, len(DATA)) as partial:
        assert (partial.done, partial.offset) == (False, 0)
        partial.write(DATA[:100])
    assert not content.has(DIGEST)
    with content.partial(DIGEST, len(DATA)) as partial:
        assert partial.offset == 100
        partial.write(DATA[100:])
        partial.commit()
    assert content.read(DIGEST, len(DATA)) == DATA
    assert files(catalog) == [f"content/blobs/sha256/{HEX}"]
    with content.partial(DIGEST, len(DATA)) as partial:
        assert partial.done


def test_a_wrong_fetch_leaves_nothing(catalog: Catalog, content: ContentStore) -> None:
    with content.partial(DIGEST, len(DATA)) as partial:
        partial.write(b"x" * len(DATA))
        with pytest.raises(errors.DigestMismatch):
            partial.commit()
    assert files(catalog) == []


def test_a_fetch_of_too_much_leaves_nothing(catalog: Catalog, content: ContentStore) -> None:
    with content.partial(DIGEST, len(DATA)) as partial:
        partial.write(DATA)
        with pytest.raises(errors.DigestMismatch):
            partial.write(b"x")
    assert files(catalog) == []


def test_a_fetch_can_start_again(content: ContentStore) -> None:
    with content.partial(DIGEST, len(DATA)) as partial:
        partial.write(b"x" * 10)
        partial.restart()
        partial.write(DATA)
        partial.commit()
    assert content.has(DIGEST)


def test_a_partial_that_is_too_long_is_started_again(content: ContentStore) -> None:
    with content.partial(DIGEST, len(DATA) + 9) as partial:
        partial.write(DATA + b"x")
    with content.partial(DIGEST, len(DATA)) as partial:
        assert partial.offset == 0


def test_two_fetches_of_one_blob_take_turns(content: ContentStore) -> None:
    """The second waits, and finds the blob; or goes on with what the first has left."""
    got: list[bool] = []
    started = threading.Event()

    def second() -> None:
        started.set()
        with content.partial(DIGEST, len(DATA)) as partial:
            got.append(partial.done)

    with content.partial(DIGEST, len(DATA)) as partial:
        thread = threading.Thread(target=second)
        thread.start()
        started.wait()
        partial.write(DATA)
        partial.commit()
    thread.join()
    assert got == [True]


# What stays and what goes


def test_what_nobody_pins_is_collected(catalog: Catalog, content: ContentStore) -> None:
    content.put([DATA])
    kept = content.put([b"kept"])
    with content.partial("sha256:" + "0" * 64, 10) as partial:
        partial.write(b"12345")
    catalog.database.write(lambda c: pins.pin(c, "image x", digest=kept.digest))
    assert content.collect() == 1
    assert list(content.walk()) == [kept]
    assert files(catalog) == [f"content/blobs/sha256/{kept.digest[7:]}"]
    with pytest.raises(errors.FailedPrecondition, match="image x"):
        content.delete(kept.digest)
    catalog.database.write(lambda c: pins.unpin_all(c, "image x"))
    content.delete(kept.digest)
    assert files(catalog) == []


def test_only_some_are_collected(content: ContentStore) -> None:
    one, other = content.put([b"1"]), content.put([b"2"])
    assert content.collect([one.digest]) == 1
    assert list(content.walk()) == [other]


def test_a_partial_that_is_written_stays(catalog: Catalog, content: ContentStore) -> None:
    with content.partial(DIGEST, len(DATA)) as partial:
        partial.write(DATA[:9])
        content.collect()
        assert files(catalog) == [f"content/ingest/{HEX}"]
        partial.write(DATA[9:])
        partial.commit()
    assert content.has(DIGEST)


def test_a_lease_keeps_what_is_worked_with(content: ContentStore) -> None:
    with content.lease("test") as lease:
        blob = content.put([DATA], lease=lease)
        assert content.collect() == 0
        with pytest.raises(errors.FailedPrecondition, match="test"):
            content.delete(blob.digest)
    assert content.collect() == 1


def test_a_lease_outlives_an_error_until_it_expires(catalog: Catalog, content: ContentStore) -> None:
    """What an interrupted pull has fetched is there for the next."""

    def fail() -> None:
        with content.lease("test", resumed=True) as lease:
            content.put([DATA], lease=lease)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    runs.sweep(catalog)
    assert content.collect() == 0
    catalog.database.write(lambda c: c.execute("UPDATE pins SET expires_ns = 1"))
    assert content.collect() == 1


def test_a_lease_that_nobody_resumes_ends_with_an_error(content: ContentStore) -> None:
    def fail() -> None:
        with content.lease("export") as lease:
            content.put([DATA], lease=lease)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert content.collect() == 1


def test_a_lease_does_not_look_at_the_clock(
    catalog: Catalog, content: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with content.lease("test") as lease:
        content.put([DATA], lease=lease)
        now = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now + 48 * 3600 * 10**9)
        runs.sweep(catalog)
        assert content.collect() == 0


_DIE = """
import os, sys
from onlap.catalog.catalog import Catalog
from onlap.content.store import ContentStore
content = ContentStore(Catalog(sys.argv[1], create=False, timeout=30))
lease = content.lease("test")
content.put([b"blob"], lease=lease)
os._exit(0)
"""


def test_the_pins_of_a_dead_process_go(catalog: Catalog, content: ContentStore) -> None:
    """They know it by the lock where its directory is there, and by its absence where a power cut took that."""
    for gone in (False, True):
        subprocess.run([sys.executable, "-c", _DIE, catalog.layout.root], check=True)
        (directory,) = Path(catalog.layout.root, "runs").iterdir()
        if gone:
            directory.rmdir()
        assert content.collect() == 0
        assert runs.sweep(catalog) == 1
        assert content.collect() == 1
        assert os.listdir(directory.parent) == []


def test_a_pin_with_a_time_expires(catalog: Catalog, content: ContentStore) -> None:
    """As Onlap 0.1 wrote them."""
    for seconds, collected in ((60, 0), (-60, 1)):
        blob = content.put([DATA])
        row = ("pull of x (ab12cd34)", blob.digest, time.time_ns() + seconds * 10**9)
        catalog.database.write(lambda c: c.execute("INSERT OR REPLACE INTO pins VALUES (?, NULL, ?, ?)", row))  # noqa: B023
        assert content.collect() == collected


def test_a_blob_that_is_pinned_before_it_comes_stays(content: ContentStore) -> None:
    with content.lease("test") as lease:
        lease.pin(DIGEST)
        content.put([DATA])
        assert content.collect() == 0


_PROCESS = """
import sys
from onlap.catalog.catalog import Catalog
from onlap.layers.stream.digests import digest_of
from onlap.content.store import ContentStore
catalog = Catalog(sys.argv[1], create=False, timeout=30)
content = ContentStore(catalog)
for number in range(30):
    with content.lease(f"process {sys.argv[2]}") as lease:
        data = b"blob %d" % (number % 10)
        lease.pin(digest_of(data))
        content.put_documents(data)
        content.collect()
        assert content.read(digest_of(data), 100) == data
catalog.close()
"""


def test_processes_do_not_take_one_anothers_blobs(catalog: Catalog, content: ContentStore) -> None:
    """Each writes, pins, collects and reads the same few blobs: none may lose one that it has pinned."""
    running = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, catalog.layout.root, str(number)], stderr=subprocess.PIPE)
        for number in range(3)
    ]
    for process in running:
        _, errors_of_it = process.communicate(timeout=50)
        assert process.returncode == 0, errors_of_it.decode()
    content.collect()
    assert list(content.walk()) == []


def test_a_killed_writer_leaves_only_what_cleanup_removes(catalog: Catalog, content: ContentStore) -> None:
    code = (
        "import os, signal, sys\n"
        "from onlap.catalog.catalog import Catalog\n"
        "from onlap.content.store import ContentStore\n"
        "writer = ContentStore(Catalog(sys.argv[1], create=False, timeout=30)).writer()\n"
        "writer.write(b'x' * 100)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, catalog.layout.root], check=False)
    assert len(files(catalog)) == 1
    assert list(content.walk()) == []
    catalog.garbage.cleanup()
    assert files(catalog) == []
