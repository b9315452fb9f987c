"""Go's regular expressions, translated to Python's `re`.

Source: Go's regexp/syntax/parse.go, with its Perl flags. Only whether something matches counts, so groups lose their
names, and U (ungreedy) its meaning. Flags are applied to each atom, since they may change inside a group. Python
repeats no bare assertion, so those become groups.
"""

from __future__ import annotations

import re
from functools import cache

SURROGATES = "[\ud800-\udfff]"  # in a str of surrogateescape: bytes that are not UTF-8
HEX = "[0-9a-fA-F]"
CONTROLS = dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True))


_PERL = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\t\n\f\r "}  # what they hold; ASCII in Go, and no \v
_POSIX = {"alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": r"\0-\x7f", "blank": r"\t ", "digit": "0-9"}
_POSIX |= {"cntrl": r"\0-\x1f\x7f", "graph": "!-~", "lower": "a-z", "print": " -~", "upper": "A-Z"}
_POSIX |= {"punct": r"!-/:-@\[-`{-~", "space": r"\t-\r ", "word": "0-9A-Za-z_", "xdigit": "0-9A-Fa-f"}
_CATEGORIES = "C[cfos]?|L[lmotu]?|M[cen]?|N[dlo]?|P[cdefios]?|S[ckmo]?|Z[lps]?"
_ASSERTIONS = {"^": r"(\A)", r"\A": r"(\A)", "$": r"(\Z)", r"\z": r"(\Z)"}
_ASSERTIONS |= {r"\b": r"((?a:\b))", r"\B": r"((?!(?a:\b)))"}  # ASCII in Go; and \B holds in the empty string
_CHARACTER = rf"""(?: \\x\{{{HEX}+\}} | \\x{HEX}{{2}} | \\0[0-7]{{0,2}} | \\[1-7][0-7]{{1,2}} | \\[afnrtv]
    | \\[\0-/:-@\[-`{{-\x7f] | [^\\] )"""
_CLASS = r"\\(?P<perl>[dDsSwW]) | \\(?P<sign>[pP])(?:\{(?P<not>\^?)(?P<long>[^}]*)\}|(?P<short>[^{]))"
_MEMBER = rf"""(?sx) \[:(?P<inverse>\^?)(?P<posix>.*?):\] | {_CLASS}
    | (?P<low>{_CHARACTER}) (?: -(?!\]) (?P<high>{_CHARACTER}) | (?!-[^\]]) )"""
_COUNT = r"\{(?:0|[1-9][0-9]*)(?:,(?:0|[1-9][0-9]*)?)?\}"
_TOKEN = rf"""(?sx) (?P<repeat>(?:[*+?]|{_COUNT})\??) | (?P<or>\|) | (?P<any>\.) | (?P<set>\[\^?)
    | (?P<class>{_CLASS}) | \\Q(?P<literal>.*?)(?:\\E|\Z) | (?P<assertion>\\[AzbB]|[$^])
    | (?P<flags>\(\?(?P<on>[imsU]*)(?:-(?P<off>[imsU]+))?(?P<scope>[:)]))
    | (?P<open>\((?:\?P?<[A-Za-z0-9_]+>|(?!\?))) | (?P<close>\)) | (?P<character>(?!\(){_CHARACTER})"""


def translate(go: str) -> str:
    """Python's pattern for Go's. Raises re.error where Go does, and for a script such as \\p{Greek}."""
    if re.search(SURROGATES, go):
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
    if text[1] in CONTROLS:
        return CONTROLS[text[1]]
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
