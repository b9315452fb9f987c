"""Bodies of HTTP messages, counts, id maps and Docker's words for changes: what needs no mount."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlap import errors
from onlap.graphdrivers.contract import ADDED, DELETED, MODIFIED
from onlap.graphdrivers.counter import Counter
from onlap.graphdrivers.diff.changes import layer_changes
from onlap.graphdrivers.ids import IdMap, Range
from onlap.overlayfs.markers import USER, Markers
from onlap.serve.docker.bodies import ChunkWriter, drain, request_body
from onlap.serve.docker.requests import Head, RequestError, read_head


def test_heads_of_requests() -> None:
    connection = io.BytesIO(
        b"POST /GraphDriver.Get HTTP/1.1\r\nHost: x\r\nCONTENT-LENGTH:  3 \r\nEmpty:\r\n\r\nabc"
        b"POST /a?b=c HTTP/1.1\nTransfer-Encoding: Chunked\nConnection: Close\n\n"
        b"GET / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n"
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    )
    assert read_head(connection) == Head("POST", "/GraphDriver.Get", 3, keep=True, waits=False)
    assert connection.read(3) == b"abc"
    assert read_head(connection) == Head("POST", "/a?b=c", None, keep=False, waits=False)
    assert read_head(connection) == Head("GET", "/", 0, keep=False, waits=True)
    assert read_head(connection) == Head("GET", "/", 0, keep=True, waits=False)
    assert read_head(connection) is None


@pytest.mark.parametrize(
    "text",
    [
        b"\r\n",
        b"POST /\r\n\r\n",
        b"POST / HTTP/2.0\r\n\r\n",
        b"POST /a b HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\n: x\r\n\r\n",
        b"POST / HTTP/1.1\r\na: b\r\n folded: c\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length : 1\r\n\r\n",
        *(b"POST / HTTP/1.1\r\nContent-Length: %b\r\n\r\n" % length for length in (b"", b"-1", b"+1", b"1_0", b"\xb2")),
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /" + b"a" * (1 << 20),
        b"POST / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % number for number in range(200)) + b"\r\n",
    ],
    ids=lambda text: text[:60],
)
def test_what_is_no_request(text: bytes) -> None:
    with pytest.raises(RequestError):
        read_head(io.BytesIO(text))


@given(st.binary(max_size=200))
def test_a_head_of_any_bytes(data: bytes) -> None:
    for text in (data, b"POST / HTTP/1.1\r\n" + data):
        try:
            read_head(io.BytesIO(text))
        except (RequestError, ConnectionError):
            pass


def test_a_head_that_breaks_off() -> None:
    for text in (b"POST / HTT", b"POST / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nHost: x\r\n"):
        with pytest.raises(ConnectionError):
            read_head(io.BytesIO(text))


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


@given(st.lists(st.binary(min_size=1, max_size=300)), st.integers(1, 500))
def test_chunks_come_out_as_they_went_in(chunks: list[bytes], size: int) -> None:
    connection = io.BytesIO()
    writer = ChunkWriter(connection, lambda: None)
    for chunk in chunks:
        writer.write(chunk)
    writer.finish()
    assert connection.getvalue() == chunked(*chunks)
    connection = io.BufferedReader(io.BytesIO(connection.getvalue() + b"next"))  # type: ignore[assignment]
    body = request_body(connection, None)
    parts = []
    while part := body.read(size):
        assert len(part) <= size
        parts.append(part)
    assert b"".join(parts) == b"".join(chunks)
    assert connection.read() == b"next"


def test_extensions_and_trailers_are_passed_over() -> None:
    connection = io.BytesIO(b"3;name=value\r\nabc\r\n0\r\nTrailer: x\r\n\r\nnext")
    assert request_body(connection, None).read() == b"abc"
    assert connection.read() == b"next"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"5\r\nabc",
        b"3\r\nabc",
        b"3\r\nabcd\r\n",
        b"x\r\nabc\r\n",
        b"-3\r\nabc\r\n",
        b"3\r\nabc\r\n",
        b"3\r\nabc\r\n0\r\n",
        b"3" * 2000 + b"\r\n",
    ],
)
def test_what_is_no_body_in_chunks(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        drain(request_body(io.BytesIO(data), None))


def test_a_sized_body_ends_where_it_says() -> None:
    connection = io.BytesIO(b"abcdef")
    body = request_body(connection, 4)
    assert (body.read(3), body.read(), body.read(1), connection.read()) == (b"abc", b"d", b"", b"ef")
    with pytest.raises(ConnectionError):
        request_body(io.BytesIO(b"ab"), 3).read()


def test_a_first_touch_counts_a_mount() -> None:
    mounted = {"m"}
    counter = Counter(mounted.__contains__, {"known": 3})
    assert [counter.increment("m"), counter.increment("m"), counter.increment("n")] == [2, 3, 1]
    assert [counter.decrement("known"), counter.decrement("n")] == [2, 0]
    assert counter.counts() == {"m": 3, "known": 2}
    mounted.add("n")
    assert counter.decrement("n") == 0
    counter.forget("m")
    counter.clear()
    assert counter.counts() == {}


def test_id_maps() -> None:
    ids = IdMap([Range(0, 1000, 10), Range(10, 5000, 10)], [Range(0, 2000, 20)])
    assert ids.root == (1000, 2000)
    assert ids.to_host(12, 3) == (5002, 2003)
    assert ids.to_container(5002, 2003) == (12, 3)
    assert IdMap.from_json(ids.as_json()["UIDMaps"], ids.as_json()["GIDMaps"]) == ids
    with pytest.raises(errors.InvalidArgument):
        ids.to_host(20, 0)
    with pytest.raises(errors.InvalidArgument):
        ids.to_container(0, 2000)
    assert not IdMap.from_json(None, None)
    assert IdMap().to_host(7, 8) == (7, 8)
    wrongs: tuple[object, ...] = (5, [{}], [{"container_id": 0, "host_id": 0, "size": "x"}], [3])
    for wrong in wrongs:
        with pytest.raises(errors.InvalidArgument):
            IdMap.from_json(wrong, None)


def test_changes_in_dockers_words(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for side, time in ((before, 1), (after, 2)):
        for directory in ("a/b", "a/c", "ab", "h"):
            (side / directory).mkdir(parents=True)
        for file in ("a/b/same", "g"):
            (side / file).write_text("x")
        (side / ("a/d" if side == before else "a/b/f")).write_text("x")
        (side / "h").chmod(0o700 + time)
        for path in (side, *side.rglob("*")):
            os.utime(path, ns=(0, 0 if path.name == "same" else time))
    found = layer_changes([str(before)], [str(after)], Markers(USER))
    assert [tuple(change) for change in found] == [
        ("/a", MODIFIED),
        ("/a/b", MODIFIED),
        ("/a/b/f", ADDED),
        ("/a/d", DELETED),
        ("/g", MODIFIED),
        ("/h", MODIFIED),
    ]
