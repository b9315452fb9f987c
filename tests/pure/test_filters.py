"""containerd's filter language: grammar, quoting, look-ups in SQL, Go's regular expressions."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onlap.errors import InvalidArgument
from onlap.snapshots.filters import Filter, parse, quote


class Info(NamedTuple):
    name: str = "n"
    parent: str | None = None
    kind: str = "active"
    labels: Mapping[str, str] = {}


# Snapshots as in containerd v1.7.24, snapshots/testsuite/testsuite.go; and names that a parser trips over.
GC = {"containerd.io/gc.root": "check-walk"}
INFOS = [
    Info("p", None, "committed", GC),
    Info("a", "p", "active", GC),
    Info("v", "p", "view", GC),
    Info("a-np", None, "active", GC),
    Info("p-wl", None, "committed", {**GC, "l": "1"}),
    Info("a-wl", "p-wl", "active", {**GC, "l": "2"}),
    Info("v-wl", "p-wl", "view", {**GC, "l": "3"}),
    Info("a-np-wl", "", "active", {**GC, "l": "2"}),
    Info("default/3/x sha256:0a", "\udcff", "view", {"a.b": "true", "": "nothing", "e": "", 'q"\\': "x,y"}),
    Info("牛\n", "é", "committed", {"l": "\udcff"}),
]
GC_ROOT = 'labels."containerd.io/gc.root"==check-walk'


def names(*filters: str) -> set[str]:
    chosen = parse(*filters)
    return {info.name for info in INFOS if chosen.matches(info)}


@pytest.mark.parametrize(
    "filters,expected",
    [
        ([GC_ROOT], "p a v a-np p-wl a-wl v-wl a-np-wl"),
        (["kind==active," + GC_ROOT], "a a-np a-wl a-np-wl"),
        (["kind==view," + GC_ROOT], "v v-wl"),
        (["kind==committed," + GC_ROOT], "p p-wl"),
        (["name==p", "name==a-np-wl"], "p a-np-wl"),
        (["name==a-wl,labels.l"], "a-wl"),
        (["parent==p"], "a v"),
        (['parent!="",' + GC_ROOT], "a v a-wl v-wl"),
        (["labels.l," + GC_ROOT], "p-wl a-wl v-wl a-np-wl"),
        (["labels.l==2"], "a-wl a-np-wl"),
        (['parent==""'], "p a-np p-wl a-np-wl"),
        (["name==p,name==a"], ""),
        (["nothing"], ""),
        (["nothing==x"], ""),
        (["name.ignored==p"], "p"),
        ([" name == p, kind\t== committed"], "p"),
        (['"name"=="p"'], "p"),
        (["name~=^.-wl$"], "p-wl a-wl v-wl"),
        (["name~=|^p/?|"], "p p-wl"),
        (["name~=/^p{1,2}$/"], "p"),
        ([r'name~="^\x61$"'], "a"),
    ],
)
def test_selects(filters: list[str], expected: str) -> None:
    assert names(*filters) == set(expected.split())


@pytest.mark.parametrize("filters", [[], [""], ["name==none", ""], ["name"], ["parent,kind"], ["nothing!=x"]])
def test_selects_everything(filters: list[str]) -> None:
    assert names(*filters) == {info.name for info in INFOS}


@pytest.mark.parametrize(
    "text,labels,matches",
    [
        # Absent is the empty string for != and ~=, and nothing for ==.
        ("labels.x", {}, False),
        ('labels.x==""', {}, False),
        ("labels.x!=a", {}, True),
        ('labels.x!=""', {}, False),
        ("labels.x~=a?", {}, True),
        ("labels.x~=a", {}, False),
        ("labels.x", {"x": ""}, True),
        ('labels.x==""', {"x": ""}, True),
        ('labels.x!=""', {"x": ""}, False),
        # A path below labels is one key.
        ("labels.a.b==1", {"a.b": "1"}, True),
        ('labels."a.b"==1', {"a.b": "1"}, True),
        ('labels.a."b.c".d==1', {"a.b.c.d": "1"}, True),
        ("labels==1", {"": "1"}, True),
        ("labels.1==1", {"1": "1"}, True),
        # Quoting: \x and octal are bytes, \u and \U characters.
        (r'labels.x=="\xff"', {"x": "\udcff"}, True),
        (r'labels.x=="\xc3\xa9"', {"x": "é"}, True),
        (r'labels.x=="\303\251\u00e9\U0001f600"', {"x": "éé😀"}, True),
        (r'labels.x=="\ud800"', {"x": "\ufffd"}, True),
        (r'labels.x=="\a\b\f\n\r\t\v\\\"\x00"', {"x": '\a\b\f\n\r\t\v\\"\0'}, True),
        (r"labels.x~=/a\/b/", {"x": "a/b"}, True),
        (r"labels.x~=/^\\d$/", {"x": "7"}, True),
        (r"labels.x~=|a\|b|", {"x": "b"}, True),
        # Bare values: everything printable but the comma.
        ('labels.x==a.b="c"/|~', {"x": 'a.b="c"/|~'}, True),
        ("labels.x==牛", {"x": "牛"}, True),
        ("labels.x==\x01a", {"x": "\x01a"}, True),
        # Bytes that are not UTF-8 are U+FFFD to a regular expression.
        (r"labels.x~=^\ufffd$", {"x": "\udcff"}, True),
    ],
)
def test_labels_and_values(text: str, labels: dict[str, str], matches: bool) -> None:
    assert parse(text).matches(Info(labels=labels)) is matches


def test_a_kind_that_is_none_is_absent() -> None:
    assert not parse("kind").matches(Info(kind="unknown"))


@pytest.mark.parametrize(
    "text,position,expected",
    [
        (" ", 1, "a field"),
        ("name==foo,", 10, "a field"),
        ("labels.", 7, "a field"),
        ('labels.?"x"==y', 7, "a field"),
        ("labels.|foo|==x", 7, "a field"),
        ("name=foo", 4, '"=="'),
        ("name===foo", 4, '"=="'),
        ("name==!foo", 4, '"=="'),
        ("labels.l ", 9, '"=="'),
        ("labels .l", 7, '"=="'),
        ("labels.ns/key==value", 9, '"=="'),
        ("name==", 6, "a value"),
        ("image~=,id?=?x", 7, "a value"),
        ("name==.a", 6, "a value"),
        ("name== =a", 7, "a value"),
        ("name==/a/", 6, "a value"),
        ("name==a b", 7, "the end"),
        ("name==a ,kind", 7, "the end"),
        ('name=="a"b', 9, "the end"),
        ("name==a\x01", 7, "the end"),
        ('name=="a', 6, 'closed by "'),
        ('name=="a\nb"', 6, 'closed by "'),
        (r'name=="\g"', 6, "escapes"),
        (r'name=="\xaz"', 6, "escapes"),
        (r'name=="\777"', 6, "escapes"),
        (r'name=="\U00110000"', 6, "escapes"),
        (r'name=="\/"', 6, "escapes"),
        (r"name~=/\d/", 6, "escapes"),
        ("name==a\0", 7, "UTF-8"),
        ("name==\ufffd", 6, "UTF-8"),
        ('name=="\udcff"', 7, "UTF-8"),
        ("name~=a**", 6, "a regular expression"),
        (r'name~="\xff"', 6, "a regular expression"),
    ],
)
def test_errors_name_filter_position_and_need(text: str, position: int, expected: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse("name==fine", text)
    message = str(caught.value)
    assert f"filter {text!r}, position {position}: expected" in message
    assert expected in message


# --------------------------------------------------------------------------- quoting

ANY_NAME = st.binary().map(lambda name: name.decode("utf-8", "surrogateescape")) | st.text(st.characters(codec="utf-8"))


@given(ANY_NAME)
@example('"\\\n\0\ufffd\udcff/|')
def test_quoted_values_come_back(value: str) -> None:
    chosen = parse(f"name=={quote(value)}")
    assert chosen.matches(Info(name=value))
    assert not chosen.matches(Info(name=value + "x"))


@given(ANY_NAME)
def test_quoted_labels_come_back(key: str) -> None:
    assert parse(f"labels.{quote(key)}").matches(Info(labels={key: ""}))
    assert not parse(f"labels.{quote(key)}").matches(Info(labels={key + "x": ""}))


# --------------------------------------------------------------------------- whatever comes, and SQL

PIECES = st.sampled_from(
    [
        *("name", "parent", "kind", "labels", "labels.l", "labels.a.b", GC_ROOT, "name==p", 'parent==""'),
        *("==", "!=", "~=", "=", ".", ",", "p", "a", "view", "2", "牛", '"p"', '""', "/p/", "|p|"),
        *(r'"\xff"', r'"\101"', '"', "/", "|", "\\", " ", "\n", "\0", "\ufffd", "\udcff"),
        *("(", ")", "[", "^", "]", "{1}", "*", "?", "(?i)", r"\d", r"\pL"),
    ]
)
FILTERS = st.lists(PIECES, max_size=8).map("".join)
FIELDS = (
    "name",
    "parent",
    "kind",
    "labels",
    "labels.l",
    "labels.e",
    'labels."a.b"',
    r'labels."\xff"',
    "nothing",
)
VALUES = ("p", "a", "v", "view", "active", "2", '""', '"x,y"', "é")
SELECTORS = st.one_of(
    st.builds("{}{}{}".format, st.sampled_from(FIELDS), st.sampled_from(["==", "!=", "~="]), st.sampled_from(VALUES)),
    st.sampled_from([*FIELDS, GC_ROOT, r'name=="\xff"', "name~=^a", "labels.l~=^.?$"]),
)
GOOD_FILTERS = st.lists(SELECTORS, max_size=3).map(",".join)


@given(st.one_of(FILTERS, st.text(), st.text(min_size=1).map(lambda t: "name~=" + quote(t))))
@example("name~=" + "(" * 5000)
@example("name~=a{99999999999999999999}")
@example("name~=" + r"\x{" + "f" * 5000 + "}")
def test_parse_raises_only_invalid_argument(text: str) -> None:
    try:
        chosen = parse(text)
    except InvalidArgument:
        return
    assert isinstance(chosen.matches(INFOS[0]), bool)


TERMS = {
    "name": "name = ?",
    "parent": "parent IS ?",
    "kind": "kind = ?",
    "label": "EXISTS (SELECT 1 FROM labels l WHERE l.id = s.id AND l.key = ? AND l.value = ?)",
    "labelled": "EXISTS (SELECT 1 FROM labels l WHERE l.id = s.id AND l.key = ?)",
}


def select(what: str, infos: list[Info], chosen: Filter) -> list[str | int]:
    """The last column of `what` (SELECT, EXPLAIN QUERY PLAN SELECT) in a small catalog that holds `infos`."""
    condition, parameters = chosen.where(TERMS)
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE snapshots (id INTEGER PRIMARY KEY, name TEXT UNIQUE, parent TEXT, kind TEXT)")
        db.execute("CREATE TABLE labels (id INTEGER, key TEXT, value TEXT)")
        db.execute("CREATE INDEX parents ON snapshots (parent)")
        for i, info in enumerate(infos):
            row = (i, info.name, info.parent or None, info.kind)
            db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", row)
            db.executemany("INSERT INTO labels VALUES (?, ?, ?)", [(i, *pair) for pair in info.labels.items()])
        return [row[-1] for row in db.execute(f"{what} id FROM snapshots s WHERE {condition}", parameters)]


STORED = [info for info in INFOS if "\udcff" not in (info.parent, *info.labels.values())]


@given(st.lists(GOOD_FILTERS, max_size=3))
@example(["name==p", "name==a"])
@example(["name==a,labels.l", 'parent==""'])
@example(["name==p"] * 1500)
def test_sql_loses_nothing_that_matches(filters: list[str]) -> None:
    chosen = parse(*filters)
    found = select("SELECT", STORED, chosen)
    assert {i for i, info in enumerate(STORED) if chosen.matches(info)} <= set(found)


@pytest.mark.parametrize(
    "filters,ids",
    [
        (["name==a"], {1}),
        (["name==a", "parent==p,kind==view"], {1, 2}),
        (["labels.l==2,name!=a-wl"], {5, 7}),
        (["labels.l"], {4, 5, 6, 7}),
        (['parent==""'], {0, 3, 4, 7}),
    ],
)
def test_sql_narrows_to_the_equalities(filters: list[str], ids: set[int]) -> None:
    chosen = parse(*filters)
    assert set(select("SELECT", STORED, chosen)) == ids
    plan = str(select("EXPLAIN QUERY PLAN SELECT", STORED, chosen))
    assert ("SCAN s" in plan) == filters[0].startswith("labels")  # this schema has indexes for the others


@pytest.mark.parametrize("filters", [[], [""], ["name==a", "name!=b"], ["name~=a"], [r'name=="\xff"'], ["kind"]])
def test_sql_without_equalities_is_a_scan(filters: list[str]) -> None:
    assert parse(*filters).where(TERMS) == ("TRUE", ())


def test_no_alternative_matches_nothing() -> None:
    assert not Filter(()).matches(INFOS[0])


# --------------------------------------------------------------------------- regular expressions


@pytest.mark.parametrize(
    "pattern,text,matches",
    [
        ("^b", "a\nb", False),
        ("(?m)^b", "a\nb", True),
        ("a.b", "a\nb", False),
        ("(?s)a.b", "a\nb", True),
        (r"\d", "٣", False),  # ASCII, as in Go
        (r"\w", "é", False),
        ("(?i)K", "k", True),
        ("(?P<n>a)(?:c)", "ac", True),
        ("^x{2,3}$", "xx", True),
        (r"^[^\D]$", "1", True),
        (r"^[]a]$", "]", True),
        (r"\x41\101", "AA", True),
        ("", "", True),
        ("a||b", "", True),
        ("#a b", "#a b", True),
    ],
)
def test_regexps(pattern: str, text: str, matches: bool) -> None:
    assert parse(f"name~={quote(pattern)}").matches(Info(name=text)) is matches


@pytest.mark.parametrize(
    "pattern",
    [
        "a**",
        "*",
        "(*)",
        "a{3,2}",
        "(",
        ")",
        "[",
        "[a",
        "[b-a]",
        "\\",
        r"\pL",
        r"\Qa\E",
        "[[:alpha:]]",
        "[a&&b]",
        "(?U)a",
    ],
)
def test_regexps_that_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match="expected a regular expression"):
        parse(f"name~={quote(pattern)}")
