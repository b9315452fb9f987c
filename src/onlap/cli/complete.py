"""``onlap __complete SHELL WORD...``: what the last word of a command line can become, for the scripts of shells.

Snapshots and images are named by everybody who may use the store, containerd's clients and whoever pushes an image
among them. So a shell gets names as lines, to insert and never to evaluate; one that a terminal would act on, or that
would be taken for an option, is not offered at all.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser, make_parser
from onlap.cli.registry import GROUPS, VERBS, of_group
from onlap.cli.terminal.output import Output

NAME = "__complete"
SHELLS = ("bash", "zsh", "fish")

# A candidate, and what it is; the words of a shell's own display.
_Candidates = Iterator[tuple[str, str]]

_GLOBALS = ("--root", "--json", "--quiet", "--verbose", "--help", "--version")

# What bash leaves as it is in a word; all else gets a backslash.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]")

# Bash parts words at these also where no blank is (COMP_WORDBREAKS), and replaces what is behind the last.
_BREAKS = frozenset(":=")


def complete(arguments: Sequence[str], out: Output) -> None:
    """Print the candidates, one a line, for zsh and fish with a tab and a description where there is one."""
    shell, *raw = arguments or ("",)
    if shell not in SHELLS:
        return
    words = raw or [""]
    quoted = False
    kept = 0
    if shell == "bash":
        words, kept = _joined(words)
        quoted = "'" in words[-1] or '"' in words[-1]
        kept = len(_unquoted(words[-1][:kept]))
        words = [_unquoted(word) for word in words]
    elif shell == "fish":
        words[-1] = _unquoted(words[-1])  # of the others, and all of zsh's, the shell takes the quotes away
    lines = []
    for text, about in _candidates(words, out):
        if not text.startswith(words[-1]) or not text.isprintable():
            continue
        if shell == "bash":
            inserted = _inserted(text[kept:])
            # Between quotes a backslash is no escape, or not for everything.
            if quoted and inserted != text[kept:]:
                continue
            lines.append(inserted)
        else:
            lines.append(f"{text}\t{about}" if about else text)
    # Whatever the locale: what a shell inserts are bytes.
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())


def _inserted(text: str) -> str:
    """What bash has to be given for a word."""
    special = [char for char in text if char < "\x80" and not _PLAIN.match(char)]
    if text.isascii() or not special:
        return "".join("\\" + char if char in special else char for char in text)
    # Where bash takes its bytes for another encoding than UTF-8, as GBK, a backslash may be the second half of a
    # character, and what is behind it would be bash's to run.
    return "$'" + "".join(char if _PLAIN.match(char) else _hexadecimal(char) for char in text) + "'"


def _hexadecimal(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())


def _joined(raw: Sequence[str]) -> tuple[list[str], int]:
    """Bash's words without its additional breaks, and how much of the last one it keeps."""
    words: list[str] = []
    kept = 0
    glue = False
    for word in raw:
        breaks = bool(word) and _BREAKS.issuperset(word)
        if words and word and (breaks or glue):
            kept = len(words[-1]) + (len(word) if breaks else 0)
            words[-1] += word
        else:
            kept = 0
            words.append(word)
        glue = breaks
    return words, kept


def _unquoted(word: str) -> str:
    """A word as the shell would give it to a program, if nothing in it were expanded."""
    text = ""
    quote = ""
    characters = iter(word)
    for char in characters:
        if char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        elif char == "\\" and quote != "'":
            text += next(characters, "")
        else:
            text += char
    return text


def _candidates(words: Sequence[str], out: Output) -> _Candidates:
    *before, last = words
    options: dict[str, str] = {}
    verb = ""
    rest = iter(before)
    for word in rest:
        if word == "--root":
            options["root"] = next(rest, "")
        elif not word.startswith("-"):
            verb = f"{verb} {word}".lstrip()
            if verb not in GROUPS:
                break
    if before[-1:] == ["--root"] and verb not in VERBS:
        return
    if verb not in VERBS:
        yield from _first_words(verb, last)
        return
    parser = make_parser(VERBS[verb])
    yield from _of_verb(parser, verb.startswith("image "), list(rest), last, options, out)


def _first_words(group: str, last: str) -> _Candidates:
    if last.startswith("-"):
        yield from ((option, "") for option in _GLOBALS)
    elif group in GROUPS:
        yield from ((verb.name.partition(" ")[2], verb.summary) for verb in of_group(group))
    elif not group:
        yield from ((verb.name, verb.summary) for verb in VERBS.values() if " " not in verb.name)
        yield from ((name, ", ".join(v.name.partition(" ")[2] for v in of_group(name))) for name in sorted(GROUPS))


def _of_verb(
    parser: Parser, of_images: bool, before: list[str], last: str, options: dict[str, str], out: Output
) -> _Candidates:
    """What can stand behind a verb."""
    count = 0
    behind_dashes = False
    action: argparse.Action | None = None
    rest = iter(before)
    for word in rest:
        known = None if behind_dashes else parser._option_string_actions.get(word)
        if known is not None and known.nargs is None:
            value = next(rest, None)
            if value is None:
                action = known
            elif known.dest == "root":
                options["root"] = value
        elif word.startswith("--root=") and not behind_dashes:
            options["root"] = word.partition("=")[2]
        elif word == "--" and not behind_dashes:
            behind_dashes = True
        elif behind_dashes or not word.startswith("-") or word == "-":
            count += 1
    if parser.takes_command and count and action is None:
        ours = parser.options_behind and count == 1 and last.startswith("-") and not behind_dashes
        if not ours:
            return  # a command line of the user's own
    prefix = ""
    if action is None and not behind_dashes and last.startswith("-"):
        option, equals, _ = last.partition("=")
        action = parser._option_string_actions.get(option) if equals else None
        if action is None or action.nargs is not None:
            yield from ((name, act.help or "") for name, act in parser._option_string_actions.items())
            return
        prefix = option + equals
    action = action or _positional(parser, count)
    if action is None:
        return
    for name in _values(parser, action, of_images, options, out):
        if prefix or behind_dashes or not name.startswith("-"):
            yield prefix + name, ""


def _positional(parser: Parser, count: int) -> argparse.Action | None:
    """The action that takes the argument behind ``count`` others."""
    for action in parser._get_positional_actions():
        if action.nargs in ("*", "+") or count == 0:
            return action
        count -= 1
    return None


def _values(
    parser: Parser, action: argparse.Action, of_images: bool, options: dict[str, str], out: Output
) -> Iterator[str]:
    if action.choices is not None:
        yield from map(str, action.choices)
        return
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    images = "IMAGE" in metavar.split("|") or (of_images and metavar == "OTHER")
    snapshots = action.dest in parser.keys
    if not images and not snapshots:
        return
    from onlap.cli.shared.images import images_of
    from onlap.cli.shared.things import records

    with Call("", argparse.Namespace(root=options.get("root")), out).store() as store:
        if snapshots:
            yield from (record.name for record in records(store))
        if images:
            with contextlib.suppress(errors.Unimplemented):  # without their libraries there are none
                yield from (image.name for image in images_of(store).list())
