"""containerd's filter language, as `Snapshotter.walk` takes it (containerd v1.7.24, filters/*.go).

::

    name==a                             equal
    parent!="",labels."a/b"             AND: it has a parent, and a label a/b (no operator: is it present?)
    kind==view,labels.a.b~=/^v[0-9]+/   ~= searches a regular expression; a.b is one label, "a.b"

Fields are `name`, `parent`, `kind` (active, view, committed) and `labels.KEY`; any other is never present.
Several filters are alternatives (OR); none at all, or an empty one, matches everything.

Operators treat an absent field as the empty string, except that `==` never holds for it (filters/filter.go).
So without a label a, `labels.a!=b` and `labels.a~=b?` hold, and `labels.a!=""` does not. `parent` is never
absent, even if a snapshot has none.

Three differences are intended. Regular expressions are those of Python's `re` with ASCII classes, not Go's: they may
take exponential time, ``$`` also matches before a final newline, and Go's ``\\pL``, ``\\Q..\\E`` and ``[[:alpha:]]``
are refused. An expression that cannot be compiled is InvalidArgument; containerd logs it and matches nothing. And
``\\U80000000`` and above are refused; containerd overflows there and takes the low byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, NoReturn, Protocol

from onlap.arguments import check_text
from onlap.errors import InvalidArgument

_SURROGATES = "[\ud800-\udfff]"  # in a str of surrogateescape: bytes that are not UTF-8
_HEX = "[0-9a-fA-F]"
_CONTROLS = dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True))
_SPACES = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"  # Go's unicode.IsSpace
_ILLEGAL = "[\0\ufffd\ud800-\udfff]"  # what containerd's scanner refuses anywhere, quoted or not
_FIELD = "[A-Za-z0-9_]+"
_ESCAPE = rf"\\(?:([abfnrtv])|x({_HEX}{{2}})|([0-7]{{3}})|u({_HEX}{{4}})|U({_HEX}{{8}})|(.))"
_KINDS = ("active", "view", "committed")
_MOST_TERMS = 200  # SQLite limits the depth of an expression to 1000; longer filters are evaluated only in Python


class Record(Protocol):
    """What a filter is applied to: `onlap.Info`, or anything with the same attributes."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self) -> str | None: ...
    @property
    def kind(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


class Selector(NamedTuple):
    """One condition of a filter."""

    field: str  # "name", "parent", "kind", "labels", or another word, which no record has
    label: str  # the key, if field is "labels"
    operator: str  # "==", "!=", "~=", or "" for presence
    value: str
    regexp: re.Pattern[str] | None  # the value of "~="

    def matches(self, record: Record) -> bool:
        found = self._look_up(record)
        if self.operator == "":
            return found is not None
        if self.operator == "==":
            return found == self.value
        if self.regexp is None:
            return (found or "") != self.value
        return self.regexp.search(_as_go_reads(found or "")) is not None

    def _look_up(self, record: Record) -> str | None:
        if self.field == "labels":
            return record.labels.get(self.label)
        if self.field == "name":
            return record.name
        if self.field == "parent":
            return record.parent or ""
        if self.field == "kind" and record.kind in _KINDS:
            return record.kind
        return None

    @property
    def indexable(self) -> bool:
        """Whether an index can answer it: an equality, or the presence of a label."""
        if re.search(_SURROGATES, self.label + self.value):
            return False  # SQLite's text is UTF-8, so such a parameter cannot be bound
        if self.field == "labels":
            return self.operator in ("==", "")
        return self.operator == "==" and self.field in ("name", "parent", "kind")


class Filter(NamedTuple):
    """A parsed filter: alternatives, each a tuple of selectors that must all hold."""

    alternatives: tuple[tuple[Selector, ...], ...]

    def matches(self, info: Record) -> bool:
        return any(all(selector.matches(info) for selector in selectors) for selectors in self.alternatives)

    def where(self, terms: Mapping[str, str]) -> tuple[str, tuple[str | None, ...]]:
        """The selectors that an index can answer, as an SQL condition and its parameters. It selects every record
        that matches, and perhaps others: call `matches` on the results.

        `terms` has the SQL of each: "name", "parent" and "kind" with one `?`, "label" with two (key, value),
        "labelled" with one (key). A missing parent is NULL, so the term for it must be `parent IS ?`.
        """
        indexable = [[s for s in selectors if s.indexable] for selectors in self.alternatives]
        if not all(indexable) or sum(map(len, indexable)) > _MOST_TERMS:
            return "TRUE", ()
        parameters: list[str | None] = []
        alternatives = []
        for selectors in indexable:
            names = []
            for s in selectors:
                if s.field == "labels":
                    names.append("label" if s.operator else "labelled")
                    parameters += (s.label, s.value) if s.operator else (s.label,)
                else:
                    names.append(s.field)
                    parameters.append(None if s.field == "parent" and not s.value else s.value)
            alternatives.append(" AND ".join(f"({terms[name]})" for name in names))
        return " OR ".join(f"({alternative})" for alternative in alternatives), tuple(parameters)


def parse(*filters: str) -> Filter:
    """The filter that holds where any of `filters` does. Raises InvalidArgument, saying where and why."""
    for text in filters:
        check_text(text, "filter")
    return Filter(tuple(tuple(_Parser(text).selectors()) for text in filters) or ((),))


def quote(text: str) -> str:
    """`text` as a quoted field or value of a filter. Bytes that are not UTF-8 (surrogateescape) become \\xNN."""
    plain = re.sub(r'["\\]', r"\\\g<0>", text)
    return '"' + re.sub("[\0-\x1f\x7f\ufffd\ud800-\udfff]", lambda m: _as_bytes(m[0]), plain) + '"'


def _as_bytes(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode("utf-8", "surrogateescape"))


def _as_go_reads(text: str) -> str:
    """`text` with U+FFFD for each byte that is not UTF-8, as Go's regexp reads it."""
    return re.sub(_SURROGATES, "\ufffd", text)


def _compiled(text: str) -> re.Pattern[str]:
    if re.search(_SURROGATES, text):
        raise re.error("not UTF-8")
    # Python warns of these, since they may mean a set of sets one day; Go's [[:alpha:]] is one of them.
    if re.search(r"\[\^?\[|\[[^]]*(?:\[|--|&&|~~|\|\|)", text):
        raise re.error(r"write \[, \-, \&, \~ or \| inside [...]")
    return re.compile(text, re.ASCII)


class _Parser:
    """One filter, by recursive descent. As in containerd, spaces are allowed before a field, an operator and a
    value, but not before "." and ",", nor at the end (filters/scanner.go, scan and peek).
    """

    __slots__ = ("at", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def selectors(self) -> Iterator[Selector]:
        if illegal := re.search(_ILLEGAL, self.text):
            self.at = illegal.start()
            self.fail("text in UTF-8 without NUL and U+FFFD (quoted, write them as \\x00 and \\ufffd)")
        if not self.text:
            return
        yield self.selector()
        while self.at < len(self.text):
            if not self.take(","):
                self.fail('"," or the end')
            yield self.selector()

    def selector(self) -> Selector:
        field = self.field()
        label = []
        while self.take("[.]"):
            label.append(self.field())
        operator = value = ""
        regexp = None
        if self.text[self.at : self.at + 1] not in ("", ","):
            operator = self.operator()
            start, value = self.value(operator)
            if operator == "~=":
                try:
                    regexp = _compiled(value)
                except (re.error, RecursionError, OverflowError) as e:
                    self.at = start
                    self.fail(f"a regular expression ({value!r}: {e})")
        return Selector(field, ".".join(label), operator, value, regexp)

    def field(self) -> str:
        self.take(_SPACES)
        if self.text[self.at : self.at + 1] == '"':
            return self.quoted()
        return self.take(_FIELD) or self.fail('a field: letters, digits, "_", or a string in double quotes')

    def operator(self) -> str:
        self.take(_SPACES)
        start = self.at
        operator = self.take("[=!~]+")
        if operator not in ("==", "!=", "~="):
            self.at = start
            self.fail('"==", "!=" or "~="', hint='quote a field that holds other characters: labels."a/b"==c')
        return operator

    def value(self, operator: str) -> tuple[int, str]:
        self.take(_SPACES)
        start = self.at
        first = self.text[start : start + 1]
        if first == '"' or (first in ("/", "|") and operator == "~="):
            return start, self.quoted()
        # containerd accepts any other first character, even a control, and then what is printable except ",".
        if first in ("", *",.=!~/|"):
            self.fail("a value, or one in double quotes" + (", // or ||" if operator == "~=" else ""))
        end = start + 1
        while self.text[end : end + 1] not in ("", ",", " ") and self.text[end].isprintable():
            end += 1
        self.at = end
        return start, self.text[start:end]

    def quoted(self) -> str:
        """A Go string, delimited by the character that it starts with. \\xNN and \\NNN are bytes."""
        mark = re.escape(self.text[self.at])
        legal = rf"[abfnrtv\\{mark}]|x{_HEX}{{2}}|[0-3][0-7]{{2}}|u{_HEX}{{4}}|U00(?:0{_HEX}|10){_HEX}{{4}}"
        body = self.take(rf"{mark}(?:[^\\{mark}\n]|\\(?:{legal}))*{mark}")
        if not body:
            self.fail(f"a string closed by {self.text[self.at]} on the same line, with Go's escapes")
        return re.sub(_ESCAPE.encode(), _unescape, body[1:-1].encode()).decode("utf-8", "surrogateescape")

    def take(self, pattern: str) -> str:
        """Consume what `pattern` matches here and return it; the empty string if it does not match."""
        found = re.compile(pattern).match(self.text, self.at)
        if not found:
            return ""
        self.at = found.end()
        return found[0]

    def fail(self, expected: str, *, hint: str | None = None) -> NoReturn:
        raise InvalidArgument(f"filter {self.text!r}, position {self.at}: expected {expected}", hint=hint)


def _unescape(escape: re.Match[bytes]) -> bytes:
    control, hexadecimal, octal, short, long, itself = escape.groups()
    if control:
        return _CONTROLS[control.decode()].encode()
    if hexadecimal or octal:
        return bytes([int(hexadecimal, 16) if hexadecimal else int(octal, 8)])
    if short or long:
        character = chr(int(short or long, 16))
        return _as_go_reads(character).encode()  # a surrogate has no UTF-8: Go writes U+FFFD
    return itself
