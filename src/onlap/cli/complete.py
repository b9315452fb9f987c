"""``onlap __complete SHELL WORD...``: candidates for the last word of a command line, for the scripts of shells.

Every user of a store names snapshots and images, including containerd's clients and those who push images. So a shell
gets names as lines, to insert and never to evaluate. A name that a terminal would act on, or that
would be taken for an option, is not offered.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser, Words, make_parser, split_verb
from onlap.cli.registry import GROUPS, VERBS, of_group
from onlap.cli.terminal.output import Output

SHELLS = ("bash", "zsh", "fish")

# A candidate and its description.
_Candidates = Iterator[tuple[str, str]]

_GLOBALS = ("--root", "--json", "--quiet", "--verbose", "--help", "--version")

# What bash leaves as it is in a word; everything else gets a backslash.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]")

# Bash splits words at these too (COMP_WORDBREAKS), and replaces only what is behind the last one.
_BREAKS = frozenset(":=")


def complete(arguments: Sequence[str], out: Output) -> None:
    """Print one candidate per line; for zsh and fish with a tab and the description, if there is one."""
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
        words[-1] = _unquoted(words[-1])  # fish removes the quotes of the other words, and zsh of all
    lines = []
    for text, about in _candidates(words, out):
        if not text.startswith(words[-1]) or not text.isprintable():
            continue
        if shell == "bash":
            inserted = _inserted(text[kept:])
            # Between quotes a backslash is not an escape, or not for every character.
            if quoted and inserted != text[kept:]:
                continue
            lines.append(inserted)
        else:
            lines.append(f"{text}\t{about}" if about else text)
    # Whatever the locale is: a shell inserts bytes.
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())


def _inserted(text: str) -> str:
    """What bash has to be given for a word."""
    special = [char for char in text if char < "\x80" and not _PLAIN.match(char)]
    if text.isascii() or not special:
        return "".join("\\" + char if char in special else char for char in text)
    # Where bash takes its bytes for another encoding than UTF-8, as GBK, a backslash may be the second half of a
    # character, and bash would evaluate what is behind it.
    return "$'" + "".join(char if _PLAIN.match(char) else _hexadecimal(char) for char in text) + "'"


def _hexadecimal(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())


def _joined(raw: Sequence[str]) -> tuple[list[str], int]:
    """Bash's words without its additional breaks, and how many characters of the last one it keeps."""
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
    """A word as the shell would pass it to a program if nothing in it were expanded; a quote may be open."""
    lexer = shlex.shlex(word, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        return lexer.get_token() or ""
    except ValueError:
        return lexer.token


def _candidates(words: Sequence[str], out: Output) -> _Candidates:
    *before, last = words
    verb, arguments = split_verb(before)
    if verb in VERBS:
        yield from _of_verb(make_parser(VERBS[verb]), arguments, last, out)
    elif before[-1:] != ["--root"]:
        yield from _first_words(verb or "", last)


def _first_words(group: str, last: str) -> _Candidates:
    if last.startswith("-"):
        yield from ((option, "") for option in _GLOBALS)
    elif group in GROUPS:
        yield from ((verb.name.partition(" ")[2], verb.summary) for verb in of_group(group))
    elif not group:
        yield from ((verb.name, verb.summary) for verb in VERBS.values() if " " not in verb.name)
        yield from ((name, ", ".join(v.name.partition(" ")[2] for v in of_group(name))) for name in sorted(GROUPS))


def _of_verb(parser: Parser, before: Sequence[str], last: str, out: Output) -> _Candidates:
    """What can stand behind a verb and the words before."""
    words = parser.split(before)
    action = words.waiting
    if parser.takes_command and (words.others or words.command) and action is None:
        an_option = parser.options_behind and last.startswith("-") and not words.command and not words.dashes
        if not an_option:
            return  # a word of the user's own command line
    prefix = ""
    if action is None and not words.dashes and last.startswith("-"):
        option, equals, _ = last.partition("=")
        action = parser.find_option(option) if equals else None
        if action is None or action.nargs is not None:
            yield from parser.options()
            return
        prefix = option + equals
    action = action or _positional(parser, len(words.others))
    if action is None:
        return
    for name in _values(parser, action, words, out):
        if prefix or words.dashes or not name.startswith("-"):
            yield prefix + name, ""


def _positional(parser: Parser, count: int) -> argparse.Action | None:
    """The action that takes the argument behind ``count`` others."""
    for action in parser._get_positional_actions():
        if action.nargs in ("*", "+") or count == 0:
            return action
        count -= 1
    return None


def _values(parser: Parser, action: argparse.Action, words: Words, out: Output) -> Iterator[str]:
    if action.choices is not None:
        yield from map(str, action.choices)
        return
    named = (parser.keys, parser.images, parser.workspaces, parser.checkpoints)
    snapshots, images, workspaces, checkpoints = (action.dest in each for each in named)
    if not (snapshots or images or workspaces or checkpoints):
        return
    from onlap.cli.shared.images import images_of
    from onlap.cli.shared.snapshots import records

    only_root = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    only_root.add_argument("--root")
    with Call(only_root.parse_known_args(words.options)[0], out).store() as store:
        if snapshots:
            yield from (record.name for record in records(store))
        if workspaces:
            yield from store.workspaces
        if checkpoints and words.others:
            for checkpoint in store.workspaces[words.others[0]].log():
                yield from (*checkpoint.names, checkpoint.id)
        if images:
            with contextlib.suppress(errors.Unimplemented):  # without their libraries there are none
                yield from (image.name for image in images_of(store).list())
