"""Names of images, with Docker's defaults."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlap import errors
from onlap.images.spec import names

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "name, full",
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:13", "docker.io/library/debian:13"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("index.docker.io/library/debian:13", "docker.io/library/debian:13"),
        ("localhost/app:1", "localhost/app:1"),
        ("localhost:5000/a/b/c:V1.2-x_y", "localhost:5000/a/b/c:V1.2-x_y"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("quay.io/team/a__b/c-d", "quay.io/team/a__b/c-d:latest"),
        (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}"),
        (f"debian:13@{DIGEST}", f"docker.io/library/debian:13@{DIGEST}"),
    ],
)
def test_defaults(name: str, full: str) -> None:
    assert names.normalized(name) == full
    assert names.normalized(full) == full


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../etc/passwd",
        "a/../b",
        "quay.io/../b",
        "quay.io/a/..:1",
        "/a",
        "a/",
        "a//b",
        "./a",
        "a:..",
        "a:" + "x" * 129,
        "a:",
        "a:-x",
        "UPPER",
        "team/Upper",
        "a b",
        "a\nb",
        "a@sha256:zz",
        "a@",
        "a@../../x",
        "-a",
        "a-",
        "a..b",
        "quay.io:port/a",
        "x" * 300,
        "häuser",
        "a?x=y",
        "a#b",
        "a%2e%2e",
        "user:pw@host/a",
        "quay.io:0/a",
        "quay.io:65536/a",
        "quay.io:99999/a",
        "[:::::]/a",
        "[1:2]:5000/a",
        "[::1/a",
        "x" * 64 + ".example/a",
        "x." * 127 + "example/a",
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        names.parse(name)


@pytest.mark.parametrize(
    "full, short",
    [
        ("docker.io/library/debian:13", "debian:13"),
        ("docker.io/team/app:1", "team/app:1"),
        ("quay.io/library/x:1", "quay.io/library/x:1"),
    ],
)
def test_familiar(full: str, short: str) -> None:
    assert names.familiar(full) == short
    assert names.normalized(short) == full


@given(st.text(max_size=40) | st.text("ab.:/@-_", max_size=40))
def test_a_name_is_one_or_an_error_and_its_full_form_stays(text: str) -> None:
    try:
        reference = names.parse(text)
    except (errors.InvalidArgument, errors.Unimplemented):
        return
    assert names.parse(str(reference)) == reference
    parts = f"{reference.registry}/{reference.repository}".split("/")
    assert ".." not in parts
    assert "" not in parts
