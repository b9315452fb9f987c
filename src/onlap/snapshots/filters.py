"""containerd's filter language, as `Snapshotter.walk` takes it (containerd v1.7.24, filters/*.go).

::

    name==a                             equal
    parent!="",labels."a/b"             AND: it has a parent, and a label a/b (no operator: is it present?)
    kind==view,labels.a.b~=/^v[0-9]+/   ~= searches a Go regular expression; a.b is one label, "a.b"

Fields are `name`, `parent`, `kind` (active, view, committed) and `labels.KEY`; any other is never present.
Several filters are alternatives (OR); none at all, or an empty one, matches everything.

An operator takes an absent field for the empty string, but `==` never holds for it (filters/filter.go).
So without a label a, `labels.a!=b` and `labels.a~=b?` hold, and `labels.a!=""` does not. `parent` is never
absent, even when there is none.

Two differences are meant. A regular expression that cannot be compiled is InvalidArgument; the peer logs it
and matches nothing. And `\\U80000000` and above is refused; the peer overflows there and takes the low byte.
Python's `re` runs the expressions, translated: unlike Go's it can take exponential time, and (?i) takes the
Turkish dotted and dotless i for i.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple, NoReturn, Protocol

from onlap.errors import InvalidArgument

_SPACES = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"  # Go's unicode.IsSpace
_SURROGATES = "[\ud800-\udfff]"  # in a str of surrogateescape: bytes that are not UTF-8
_ILLEGAL = "[\0\ufffd\ud800-\udfff]"  # what the peer's scanner refuses anywhere, quoted or not
_FIELD = "[A-Za-z0-9_]+"
_HEX = "[0-9a-fA-F]"
_ESCAPE = rf"\\(?:([abfnrtv])|x({_HEX}{{2}})|([0-7]{{3}})|u({_HEX}{{4}})|U({_HEX}{{8}})|(.))"
_CONTROLS = dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True))
_KINDS = ("active", "view", "committed")
_MOST_TERMS = 200  # SQLite limits the depth of an expression to 1000; a longer filter is evaluated here alone


class Record(Protocol):
    """What a filter looks at: `onlap.Info`, or anything of its shape."""

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

    field: str  # "name", "parent", "kind", "labels", or anything else, which no record has
    label: str  # the key, where field is "labels"
    operator: str  # "==", "!=", "~=", or "": is it present?
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
            return False  # SQLite's text is UTF-8: such a parameter cannot be bound
        if self.field == "labels":
            return self.operator in ("==", "")
        return self.operator == "==" and self.field in ("name", "parent", "kind")


class Filter:
    """A parsed filter: alternatives, each a tuple of selectors that must all hold."""

    __slots__ = ("alternatives",)

    def __init__(self, alternatives: tuple[tuple[Selector, ...], ...]) -> None:
        self.alternatives = alternatives

    def matches(self, info: Record) -> bool:
        return any(all(selector.matches(info) for selector in selectors) for selectors in self.alternatives)

    @property
    def equalities(self) -> tuple[tuple[Selector, ...], ...]:
        """For each alternative the selectors that an index can answer: necessary conditions, perhaps none."""
        return tuple(tuple(s for s in selectors if s.indexable) for selectors in self.alternatives)

    def where(self, terms: Mapping[str, str]) -> tuple[str, tuple[str | None, ...]]:
        """The equalities as an SQL condition and its parameters. It lets every record through that matches,
        and perhaps others: call `matches` on what comes back.

        `terms` says how the catalog states each: "name", "parent" and "kind" with one `?`, "label" with two
        (key, value), "labelled" with one (key). No parent is NULL, so the term must be `parent IS ?`.
        """
        equalities = self.equalities
        if not all(equalities) or sum(map(len, equalities)) > _MOST_TERMS:
            return "TRUE", ()
        parameters: list[str | None] = []
        alternatives = []
        for selectors in equalities:
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
    return Filter(tuple(tuple(_Parser(text).selectors()) for text in filters) or ((),))


def quote(text: str) -> str:
    """`text` as a quoted field or value of a filter. What is not UTF-8 (surrogateescape) becomes \\xNN."""
    plain = re.sub(r'["\\]', r"\\\g<0>", text)
    return '"' + re.sub("[\0-\x1f\x7f\ufffd\ud800-\udfff]", lambda m: _as_bytes(m[0]), plain) + '"'


def _as_bytes(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode("utf-8", "surrogateescape"))


def _as_go_reads(text: str) -> str:
    """Go's regexp takes each byte that is not UTF-8 for U+FFFD."""
    return re.sub(_SURROGATES, "\ufffd", text)


class _Parser:
    """One filter, by recursive descent. As in the peer, spaces may stand before a field, an operator and a
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
                    regexp = re.compile(_translate(value))
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
        # The peer takes anything else as the first character, even a control; then what is printable but ",".
        if first in ("", *",.=!~/|"):
            self.fail("a value, or one in double quotes" + (", // or ||" if operator == "~=" else ""))
        end = start + 1
        while self.text[end : end + 1] not in ("", ",", " ") and self.text[end].isprintable():
            end += 1
        self.at = end
        return start, self.text[start:end]

    def quoted(self) -> str:
        """A Go string between its first character and the next like it. \\xNN and \\NNN are bytes."""
        mark = re.escape(self.text[self.at])
        legal = rf"[abfnrtv\\{mark}]|x{_HEX}{{2}}|[0-3][0-7]{{2}}|u{_HEX}{{4}}|U00(?:0{_HEX}|10){_HEX}{{4}}"
        body = self.take(rf"{mark}(?:[^\\{mark}\n]|\\(?:{legal}))*{mark}")
        if not body:
            self.fail(f"a string closed by {self.text[self.at]} on the same line, with Go's escapes")
        return re.sub(_ESCAPE.encode(), _unescape, body[1:-1].encode()).decode("utf-8", "surrogateescape")

    def take(self, pattern: str) -> str:
        """What `pattern` matches here, consumed; the empty string if it does not match."""
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


# From Go's regular expressions (regexp/syntax/parse.go, with its Perl flags) to Python's `re`. Only whether
# something matches counts, so groups lose their names, and U (ungreedy) its meaning. Flags go to each atom,
# since they may change inside a group. Python repeats no bare assertion, so those become groups.

_PERL = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\t\n\f\r "}  # what they hold; ASCII in Go, and no \v
_POSIX = {"alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": r"\0-\x7f", "blank": r"\t ", "digit": "0-9"}
_POSIX |= {"cntrl": r"\0-\x1f\x7f", "graph": "!-~", "lower": "a-z", "print": " -~", "upper": "A-Z"}
_POSIX |= {"punct": r"!-/:-@\[-`{-~", "space": r"\t-\r ", "word": "0-9A-Za-z_", "xdigit": "0-9A-Fa-f"}
_CATEGORIES = "C[cfos]?|L[lmotu]?|M[cen]?|N[dlo]?|P[cdefios]?|S[ckmo]?|Z[lps]?"
_ASSERTIONS = {"^": r"(\A)", r"\A": r"(\A)", "$": r"(\Z)", r"\z": r"(\Z)"}
_ASSERTIONS |= {r"\b": r"((?a:\b))", r"\B": r"((?!(?a:\b)))"}  # ASCII in Go; and \B holds in the empty string
_CHARACTER = rf"""(?: \\x\{{{_HEX}+\}} | \\x{_HEX}{{2}} | \\0[0-7]{{0,2}} | \\[1-7][0-7]{{1,2}} | \\[afnrtv]
    | \\[\0-/:-@\[-`{{-\x7f] | [^\\] )"""
_CLASS = r"\\(?P<perl>[dDsSwW]) | \\(?P<sign>[pP])(?:\{(?P<not>\^?)(?P<long>[^}]*)\}|(?P<short>[^{]))"
_MEMBER = rf"""(?sx) \[:(?P<inverse>\^?)(?P<posix>.*?):\] | {_CLASS}
    | (?P<low>{_CHARACTER}) (?: -(?!\]) (?P<high>{_CHARACTER}) | (?!-[^\]]) )"""
_COUNT = r"\{(?:0|[1-9][0-9]*)(?:,(?:0|[1-9][0-9]*)?)?\}"
_TOKEN = rf"""(?sx) (?P<repeat>(?:[*+?]|{_COUNT})\??) | (?P<or>\|) | (?P<any>\.) | (?P<set>\[\^?)
    | (?P<class>{_CLASS}) | \\Q(?P<literal>.*?)(?:\\E|\Z) | (?P<assertion>\\[AzbB]|[$^])
    | (?P<flags>\(\?(?P<on>[imsU]*)(?:-(?P<off>[imsU]+))?(?P<scope>[:)]))
    | (?P<open>\((?:\?P?<[A-Za-z0-9_]+>|(?!\?))) | (?P<close>\)) | (?P<character>(?!\(){_CHARACTER})"""


def _translate(go: str) -> str:
    """Python's pattern for Go's. Raises re.error where Go does, and for a script such as \\p{Greek}."""
    if re.search(_SURROGATES, go):
        raise re.error("not UTF-8")
    token, member = re.compile(_TOKEN), re.compile(_MEMBER)
    python: list[str] = []
    flags: frozenset[str] = frozenset()
    enclosing: list[frozenset[str]] = []
    repeated = False
    at = 0

    def atom(text: str) -> str:
        return f"(?i:{text})" if "i" in flags else f"(?:{text})"

    while at < len(go):
        found = token.match(go, at)
        if not found:
            raise re.error("not Go's syntax", go, at)
        text, sort = found[0], found.lastgroup
        if (sort == "repeat" and repeated) or (sort == "close" and not enclosing):
            raise re.error(f"nothing for {text}", go, at)  # Python would take `a*+` for possessive
        if sort == "repeat" and any(len(n) > 4 or int(n) > 1000 for n in re.findall("[0-9]+", text)):
            raise re.error(f"more than 1000 in {text}", go, at)
        at = found.end()
        out = text  # for repeat and or
        if sort == "character":
            out = atom(re.escape(_character(text)))
        elif sort == "literal":
            out = "".join(atom(re.escape(c)) for c in found["literal"])
        elif sort == "any":
            out = "(?s:.)" if "s" in flags else "."
        elif sort == "assertion":
            out = f"((?m:{text}))" if "m" in flags and text in "^$" else _ASSERTIONS[text]
        elif sort == "class":
            out = atom(_union([_member(found)]))
        elif sort == "set":
            members: list[tuple[bool, str]] = []
            while not members or go[at : at + 1] != "]":
                part = member.match(go, at)
                if not part:
                    raise re.error("not Go's syntax in [...]", go, at)
                members.append(_member(part))
                at = part.end()
            at += 1
            out = atom(rf"(?!{_union(members)})[\s\S]" if text == "[^" else _union(members))
        elif sort == "close":
            flags, out = enclosing.pop(), ")"
        elif sort in ("open", "flags"):
            out = "" if text[-1] == ")" else "("
            if out:
                enclosing.append(flags)
            if sort == "flags":
                flags = flags.union(found["on"]).difference(found["off"] or "")
        if out:
            python.append(out)
            repeated = sort == "repeat"
    return "".join(python)


def _union(members: list[tuple[bool, str]]) -> str:
    """Negated members stay apart: with (?i), Go folds a class before it negates it."""
    plain = "".join(body for negated, body in members if not negated)
    sets = [f"[^{body}]" for negated, body in members if negated]
    return "|".join([f"[{plain}]", *sets] if plain else sets)


def _member(found: re.Match[str]) -> tuple[bool, str]:
    """Of a class: whether it is negated, and what it holds, as Python writes it in [...]."""
    if found["perl"]:
        return found["perl"].isupper(), _PERL[found["perl"].lower()]
    if found["sign"]:
        return (found["sign"] == "P") != bool(found["not"]), _category(found["short"] or found["long"])
    if found["posix"] is not None:
        if found["posix"] not in _POSIX:
            raise re.error(f"no class {found[0]}")
        return bool(found["inverse"]), _POSIX[found["posix"]]
    low, high = _character(found["low"]), _character(found["high"] or found["low"])
    return False, f"{re.escape(low)}-{re.escape(high)}"


def _character(text: str) -> str:
    if text[0] != "\\":
        return text
    if text[1] in _CONTROLS:
        return _CONTROLS[text[1]]
    if text[1] != "x" and not text[1].isdigit():
        return text[1]
    code = int(text[2:].strip("{}"), 16) if text[1] == "x" else int(text[1:], 8)
    if code > 0x10FFFF:
        raise re.error(f"no character {text}")
    return chr(code)


@cache
def _category(name: str) -> str:
    """The characters of a general category, such as L or Nd; unlike Unicode's, Go's C is without Cn."""
    if name == "Any":
        return r"\0-\U0010ffff"
    if not re.fullmatch(_CATEGORIES, name):
        raise re.error(f"no general category {name!r} (scripts are not supported)")
    from unicodedata import category  # here, for it is large, and wanted only by \p

    found = map(category, map(chr, range(0x110000)))
    held = "".join("x" if c.startswith(name) and c != "Cn" else " " for c in found)
    return "".join(rf"\U{run.start():08x}-\U{run.end() - 1:08x}" for run in re.finditer("x+", held))
