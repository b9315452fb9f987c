"""Command lines: argparse, with options before and after everything, and errors in one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, NoReturn

from onlap import errors
from onlap.cli.registry import GROUPS, Verb

# Options that stand before the verb and take a value.
_WITH_VALUE = frozenset({"--root"})


class UsageError(Exception):
    """A command line that cannot be run; its text says why."""


class Words(NamedTuple):
    """The words of a command line behind the verb.

    Attributes:
        options: options of the verb, with their values.
        others: its other arguments.
        command: the user's command line behind them, for a verb that takes one.
        waiting: the option whose value is missing at the end.
        dashes: whether ``--`` was given.
    """

    options: list[str]
    others: list[str]
    command: list[str]
    waiting: argparse.Action | None
    dashes: bool


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Without :mod:`shutil`, which argparse's own asks for the width, and which takes long to import."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    """The width of the terminal, as :func:`shutil.get_terminal_size` finds it."""
    try:
        return int(os.environ["COLUMNS"]) or 80
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class Parser(argparse.ArgumentParser):
    """The parser of one verb, including the options of every verb.

    Attributes:
        keys: the arguments that are keys or names of snapshots, for completion.
        images: the arguments that are names of images, for completion.
        workspaces: those that are names of workspaces, likewise.
        checkpoints: those that are checkpoints of the workspace in the first argument, likewise.
        takes_command: whether the user's command line begins behind the first argument.
        only_command: whether there is no first argument.
        options_behind: whether options of the verb may stand between the two.
    """

    def __init__(self, verb: Verb) -> None:
        super().__init__(
            prog=f"onlap {verb.name}",
            formatter_class=_Formatter,
            conflict_handler="resolve",  # a verb's own -v takes precedence: Docker's --volume
            allow_abbrev=False,
            add_help=False,
        )
        # Those that the catalog stores, which must be UTF-8.
        self._texts: list[str] = []
        self.keys: list[str] = []
        self.images: list[str] = []
        self.workspaces: list[str] = []
        self.checkpoints: list[str] = []
        self.takes_command = False
        self.only_command = False
        self.options_behind = False
        every = self.add_argument_group("options of every verb")
        every.add_argument("-h", "--help", action="help", help="show this help")
        every.add_argument("--root", metavar="DIR", help="where the snapshots are (see: onlap --help)")
        every.add_argument("--json", action="store_true", help="JSON Lines: one object per thing")
        every.add_argument("-q", "--quiet", action="store_true", help="no warnings, no progress")
        every.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice: with tracebacks")

    def explain(self, description: str, *examples: str) -> None:
        """Set what the help says the verb does, and its examples."""
        self.description = description
        self.epilog = "\n".join([f"example{'s' if len(examples) > 1 else ''}:", *(f"  {line}" for line in examples)])

    def key(self, dest: str, *, nargs: str | None = None, metavar: str = "KEY", help: str) -> None:
        """Add an argument, or an option with a value, that is a key or name of a snapshot."""
        self.keys.append(self._add_name(dest, nargs, metavar, help))
        self._texts.append(self.keys[-1])

    def image(self, dest: str, *, nargs: str | None = None, metavar: str = "IMAGE", help: str) -> None:
        """Add an argument, or an option with a value, that is the name of an image."""
        self.images.append(self._add_name(dest, nargs, metavar, help))

    def workspace(self, dest: str, *, nargs: str | None = None, metavar: str = "NAME", help: str) -> None:
        """Add an argument that is the name of a workspace."""
        self.workspaces.append(self._add_name(dest, nargs, metavar, help))
        self._texts.append(self.workspaces[-1])

    def checkpoint(self, dest: str, *, nargs: str | None = None, metavar: str, help: str) -> None:
        """Add an argument, or an option with a value, that is the name or id of a checkpoint."""
        self.checkpoints.append(self._add_name(dest, nargs, metavar, help))
        self._texts.append(self.checkpoints[-1])

    def _add_name(self, dest: str, nargs: str | None, metavar: str, help: str) -> str:
        return self.add_argument(dest, nargs=nargs, metavar=metavar, help=help).dest

    def command(self, metavar: str = "", *, options_behind: bool = False) -> None:
        """Take what follows the first argument, or a ``--`` behind it, as a command line, into ``command``.

        Without ``metavar`` there is no first argument. With ``options_behind``, options right behind the first argument
        still belong to the verb.
        """
        self.takes_command = True
        self.only_command = not metavar
        self.options_behind = options_behind
        self.usage = f"{self.prog} [OPTION...] {metavar} [[--] CMD [ARG...]]".replace("  ", " ")

    def repeatable(self, *flags: str, metavar: str, help: str) -> None:
        """Add an option that may be given several times; its values are a list."""
        self.add_argument(*flags, metavar=metavar, action="append", default=[], help=f"{help}; repeatable")

    def labels(self) -> None:
        """Add the option ``--label K=V``."""
        self.repeatable("--label", metavar="K=V", help="set a label on it")

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            message = message.replace(" -- ", " ", 1)  # which read() put there
        raise UsageError(message)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a command line; options and arguments may come in any order.

        Raises:
            UsageError: it does not fit the verb.
            InvalidArgument: a key is not valid UTF-8.
        """
        words = self.split(arguments)
        # argparse alone cannot take "diff A --exit-code B": an optional argument ends at the first option.
        args = self.parse_args([*words.options, "--", *words.others] if words.others else words.options)
        args.command = words.command
        for dest in self._texts:
            value = getattr(args, dest)
            for text in value if isinstance(value, list) else [value]:
                check_text(text, "key" if dest in self.keys else "name")
        return args

    def split(self, arguments: Iterable[str]) -> Words:
        """Sort the words of a command line, without checking them."""
        options: list[str] = []
        others: list[str] = []
        command: list[str] = []
        waiting: argparse.Action | None = None
        dashes = may_take = False
        rest = iter(arguments)
        for word in rest:
            is_option = word.startswith("-") and word not in ("-", "--")
            may_be_taken, may_take = may_take, False
            if self.takes_command and (
                not is_option if self.only_command else others and not (is_option and self.options_behind)
            ):
                dashes = word == "--"
                command = [*rest] if dashes else [word, *rest]
            elif word == "--":
                dashes = True
                others += islice(rest, 1) if self.takes_command else rest
                command = [*rest]
            elif may_be_taken and not is_option:
                options.append(word)
            elif is_option:
                waiting = self._takes_next_word(word)
                action = self.find_option(word)
                may_take = action is not None and action.nargs == "?"
                options.append(word)
                if waiting is not None and (value := next(rest, None)) is not None:
                    options.append(value)
                    waiting = None
            else:
                others.append(word)
        return Words(options, others, command, waiting, dashes)

    def find_option(self, name: str) -> argparse.Action | None:
        """The action of an option, as ``--root`` or ``-q``."""
        return self._option_string_actions.get(name)

    def options(self) -> Iterator[tuple[str, str]]:
        """Each option, with its help."""
        return ((name, action.help or "") for name, action in self._option_string_actions.items())

    def _takes_next_word(self, word: str) -> argparse.Action | None:
        """The option in a word whose value is the next word; short options may share a word, as in ``-itv``."""
        if word.startswith("--"):
            action = self.find_option(word)
            return action if action is not None and action.nargs is None else None
        for end, letter in enumerate(word[1:], 2):
            action = self.find_option(f"-{letter}")
            if action is None or action.nargs is None:
                return action if end == len(word) else None
        return None


def split_verb(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split a command line into the verb and its arguments; a verb of a group is two words, as ``image pull``.

    Options before the verb count as if they stood behind it, but for ``-v``, which may mean something else there
    (``run -v SRC:DST``).
    """
    verb, arguments = _split_first(argv)
    if verb in GROUPS:
        second, rest = _split_first(arguments)
        if second is not None:
            return f"{verb} {second}", rest
    return verb, arguments


def _split_first(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    before: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("-"):
            return word, [*before, *rest]
        before += ["--verbose"] * (len(word) - 1) if set(word[1:]) == {"v"} else [word]
        if word in _WITH_VALUE:
            before += islice(rest, 1)
    return None, before


def make_parser(verb: Verb) -> Parser:
    """The parser of a verb."""
    parser = Parser(verb)
    verb.arguments(parser)
    return parser


def check_text(text: str | None, what: str) -> None:
    """Raise InvalidArgument for an argument whose bytes are not valid UTF-8: the catalog stores text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(f"the {what} {errors.shown(text)} is not valid UTF-8", key=text) from error


def read_labels(pairs: Sequence[str], *, removing: bool = False) -> dict[str, str | None]:
    """Parse labels, as ``K=V``; with ``removing``, ``K=`` gives None.

    Raises:
        UsageError: one has no ``=`` or no key.
        InvalidArgument: one is not valid UTF-8.
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
