"""Command lines: argparse, with options before and after everything, and errors in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from onlap import errors
from onlap.cli.registry import Verb

# Verbs whose -v is something else: Docker's --volume. Before such a verb it is --verbose as well.
_OTHER_V = frozenset({"run"})


class UsageError(Exception):
    """A command line that nobody can run; its text says why."""


class Parser(argparse.ArgumentParser):
    """The parser of one verb, the options of every verb included.

    Attributes:
        keys: the arguments that are keys or names of snapshots, for the check and for completion.
        takes_command: whether a command line of the user's begins behind the first argument.
        options_behind: whether options of the verb may stand between the two.
    """

    def __init__(self, verb: Verb) -> None:
        super().__init__(
            prog=f"onlap {verb.name}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.keys: list[str] = []
        self.takes_command = False
        self.options_behind = False
        self._globals = self.add_argument_group("options of every verb")
        self._globals.add_argument("-h", "--help", action="help", help="this text")
        self._globals.add_argument("--root", metavar="DIR", help="where the snapshots are (see: onlap --help)")
        self._globals.add_argument("--json", action="store_true", help="JSON Lines: an object per thing")
        self._globals.add_argument("-q", "--quiet", action="store_true", help="no warnings, no progress")
        flags = ("--verbose",) if verb.name in _OTHER_V else ("-v", "--verbose")
        self._globals.add_argument(*flags, action="count", default=0, help="say more; twice: with tracebacks")

    def explain(self, description: str, *examples: str) -> None:
        """Say what the verb does, and show how."""
        self.description = description
        self.epilog = "\n".join([f"example{'s' if len(examples) > 1 else ''}:", *(f"  {line}" for line in examples)])

    def key(self, dest: str, *, nargs: str | None = None, metavar: str = "KEY", help: str) -> None:
        """An argument, or an option with a value, that is a key or name of a snapshot."""
        self.keys.append(dest.lstrip("-"))
        if nargs is None:
            self.add_argument(dest, metavar=metavar, help=help)
        else:
            self.add_argument(dest, nargs=nargs, metavar=metavar, help=help)

    def command(self, metavar: str, *, options_behind: bool = False) -> None:
        """Take what follows the first argument as a command line, into ``command``; ``--`` may stand between the two.

        With ``options_behind`` options that follow at once are still the verb's.
        """
        self.takes_command = True
        self.options_behind = options_behind
        self.usage = f"{self.prog} [OPTION...] {metavar} [[--] CMD [ARG...]]"

    def repeatable(self, *flags: str, metavar: str, help: str) -> None:
        """An option that may be given several times; its values are a list."""
        self.add_argument(*flags, metavar=metavar, action="append", default=[], help=f"{help}; repeatable")

    def labels(self) -> None:
        """The option ``--label K=V``."""
        self.repeatable("--label", metavar="K=V", help="note a label on it")

    def error(self, message: str) -> NoReturn:
        # The "--" is ours (see read), and not what nobody recognizes.
        raise UsageError(message.replace("unrecognized arguments: -- ", "unrecognized arguments: "))

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments of a command line, in whatever order they come.

        Raises:
            UsageError: they are not the verb's.
            InvalidArgument: a key is not text.
        """
        command: list[str] = []
        if self.takes_command:
            arguments, command = self._first_parted(arguments)
        options, others = self._parted(arguments)
        # argparse alone cannot take "diff A --exit-code B": an optional argument ends at the first option.
        args = self.parse_args([*options, "--", *others] if others else options)
        args.command = command
        for dest in self.keys:
            value = getattr(args, dest)
            for key in value if isinstance(value, list) else [value]:
                check_text(key, "key")
        return args

    def _first_parted(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """What belongs to the verb, its first argument included, and what is behind that."""
        rest = list(arguments)
        ours: list[str] = []
        named = False
        while rest:
            word = rest.pop(0)
            if word == "--":
                return (ours, rest) if named else ([*ours, word, *rest[:1]], rest[1:])
            if named and (not word.startswith("-") or not self.options_behind):
                return ours, [word, *rest]
            ours.append(word)
            if not word.startswith("-") or word == "-":
                named = True
                continue
            action = self._option_string_actions.get(word)
            if action is not None and action.nargs is None:
                ours += [rest.pop(0)] if rest else []
        return ours, []

    def _parted(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        options: list[str] = []
        others: list[str] = []
        rest = iter(arguments)
        for word in rest:
            if word == "--":
                others += rest
            elif word.startswith("-") and word != "-":
                options.append(word)
                action = self._option_string_actions.get(word)
                if action is not None and action.nargs is None:
                    options += [value for value in [next(rest, None)] if value is not None]
            else:
                others.append(word)
        return options, others


def make_parser(verb: Verb) -> Parser:
    """The parser of a verb."""
    parser = Parser(verb)
    verb.load().arguments(parser)
    return parser


def check_text(text: str | None, what: str) -> None:
    """Raise InvalidArgument for what was given as bytes that are not UTF-8: the catalog keeps text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(f"the {what} {errors.shown(text)} is not valid UTF-8", key=text) from error


def read_labels(pairs: Sequence[str], *, removing: bool = False) -> dict[str, str | None]:
    """Labels from ``K=V``; with ``removing``, ``K=`` gives None.

    Raises:
        UsageError: one has no ``=`` or no key.
        InvalidArgument: one is not text.
    """
    found: dict[str, str | None] = {}
    for pair in pairs:
        check_text(pair, "label")
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"a label is KEY=VALUE, not {errors.shown(pair)}")
        if not value and not removing:
            raise UsageError(f"the label {errors.shown(key)} has no value")
        found[key] = value or None
    return found
