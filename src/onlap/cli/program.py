"""From a command line to an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from onlap import errors
from onlap.cli import exits
from onlap.cli.call import Call
from onlap.cli.parser import UsageError, make_parser
from onlap.cli.registry import GROUPS, VERBS
from onlap.cli.terminal.output import Output, complain
from onlap.cli.terminal.text import safe

# Options that stand before the verb and take a value.
_WITH_VALUE = frozenset({"--root"})
# Asked for by the scripts of "onlap completion".
_COMPLETE = "__complete"
# Verbs that run a command of the user's, whose statuses are theirs.
_RUNNERS = frozenset({"enter", "run"})


class Terminated(BaseException):
    """A signal asked us to end; raised so that everything is cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(argv: list[str]) -> int:
    """Run a command line; nothing is raised."""
    verb, arguments = in_group(*split(argv))
    out = _first_output(argv if verb not in _RUNNERS else argv[: argv.index(verb)])
    _prepare_process()
    try:
        status = _run(verb, arguments, out)
    except SystemExit as end:  # argparse's --help
        status = end.code if isinstance(end.code, int) else exits.DONE
    return _finish(out, status)


def split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The verb, and the rest: options before the verb count as if they stood behind it.

    But for ``-v``, which may mean something else there (``run -v SRC:DST``).
    """
    before: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("-"):
            return word, [*before, *rest]
        before += ["--verbose"] * (len(word) - 1) if set(word[1:]) == {"v"} else [word]
        if word in _WITH_VALUE:
            before += [value for value in [next(rest, None)] if value is not None]
    return None, before


def in_group(verb: str | None, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The same, where the first word is that of a group: then the verb has a second one, if it is there."""
    if verb not in GROUPS:
        return verb, arguments
    second, rest = split(arguments)
    return (verb, arguments) if second is None else (f"{verb} {second}", rest)


def _first_output(argv: Sequence[str]) -> Output:
    # For the errors of a command line that is not understood; what follows "--" is not ours.
    ours = list(argv[: argv.index("--")] if "--" in argv else argv)
    verbose = 2 if "-vv" in ours or ours.count("-v") > 1 else 0
    return Output(json="--json" in ours, quiet="-q" in ours or "--quiet" in ours, verbose=verbose)


def _prepare_process() -> None:
    from onlap.cli.shared import limits

    _open_standard_streams()
    limits.raise_open_files()
    if hasattr(sys.stdout, "reconfigure"):
        # A locale that cannot show a name is no reason to end.
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # SIG_IGN was somebody's wish: nohup(1).
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)


def _open_standard_streams() -> None:
    """Where one was closed, the next file that is opened would become it, and a child would write into the catalog."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


def _terminate(number: int, _frame: object) -> None:
    raise Terminated(number)


def _run(verb: str | None, arguments: list[str], out: Output) -> int:
    """Run a verb, and say what goes wrong."""
    runs = verb in _RUNNERS
    try:
        return _dispatch(verb, arguments, out)
    except UsageError as error:
        out.error("Usage", str(error), hint=f"see: onlap {_known(verb)} --help".replace("  ", " "))
        return exits.RUN_FAILED if runs else exits.USAGE
    except errors.OnlapError as error:
        _traceback(out)
        out.onlap_error(error)
        return exits.RUN_FAILED if runs else exits.BY_KIND.get(error.kind, exits.BUG)
    except BrokenPipeError:
        return exits.SIGNAL + signal.SIGPIPE
    except KeyboardInterrupt:
        return exits.SIGNAL + signal.SIGINT
    except Terminated as end:
        return exits.SIGNAL + end.number
    except Exception as error:  # noqa: BLE001 - the last one to see it: a line for the user instead of a traceback
        _traceback(out)
        where = _place(error)
        hint = "please report it" if out.verbose > 1 else "please report it, with what -vv shows"
        out.error("Internal", f"a bug of ours, {type(error).__name__} at {where}: {error}", hint=hint)
        return exits.RUN_FAILED if runs else exits.BUG


def _known(verb: str | None) -> str:
    """What of a verb there is help for."""
    if verb is None or verb in VERBS or verb in GROUPS:
        return verb or ""
    group = verb.partition(" ")[0]
    return group if group in GROUPS else ""


def _dispatch(verb: str | None, arguments: list[str], out: Output) -> int:
    if verb is None:
        return _without_verb(arguments, out)
    if verb in GROUPS:
        return _without_second_word(verb, arguments, out)
    if verb == _COMPLETE:
        from onlap.cli.complete import complete

        complete(arguments, out)
        return exits.DONE
    if verb not in VERBS:
        raise UsageError(f"there is no verb {errors.shown(verb)}{_similar(verb)}")
    module = VERBS[verb].load()
    args = make_parser(VERBS[verb]).read(arguments)
    out.json, out.quiet, out.verbose = args.json, args.quiet, args.verbose
    if out.quiet or out.verbose:
        _configure_logging(out)
    action: Callable[[Call], int | None] = module.run
    status = action(Call(verb, args, out)) or exits.DONE
    out.flush()
    return status


def _without_verb(arguments: list[str], out: Output) -> int:
    from onlap.cli.terminal.overview import overview

    if "--version" in arguments:
        from onlap._version import __version__

        out.line(f"onlap {__version__}")
    elif "-h" in arguments or "--help" in arguments:
        out.line(overview())
    elif arguments:
        raise UsageError("a verb is missing")
    else:
        complain(overview())
        return exits.USAGE
    out.flush()
    return exits.DONE


def _without_second_word(group: str, arguments: list[str], out: Output) -> int:
    from onlap.cli.terminal.overview import group_overview

    if "-h" not in arguments and "--help" not in arguments:
        raise UsageError(f"which verb of {group}?")
    out.line(group_overview(group))
    out.flush()
    return exits.DONE


def _similar(verb: str) -> str:
    from difflib import get_close_matches

    found = get_close_matches(verb, VERBS, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _configure_logging(out: Output) -> None:
    """Without -q or -v the standard library prints warnings as they are, and ``logging`` need not be loaded."""
    import logging

    level = logging.ERROR if out.quiet else logging.DEBUG if out.verbose > 1 else logging.INFO
    logging.basicConfig(level=level, format="onlap: %(message)s", stream=sys.stderr)


def _traceback(out: Output) -> None:
    if out.verbose > 1:
        import traceback

        # Control characters stay out of the terminal; the line ends are ours.
        complain("\n".join(map(safe, traceback.format_exc().rstrip("\n").split("\n"))))


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "?"
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"


def _finish(out: Output, status: int) -> int:
    """Give away what is still buffered, so that the interpreter finds nothing to complain of at its end."""
    try:
        out.flush()
    except BrokenPipeError:
        _discard_stdout()
        return status or exits.SIGNAL + signal.SIGPIPE
    except errors.OnlapError as error:
        _discard_stdout()
        if status == exits.DONE:
            out.onlap_error(error)
            return exits.BY_KIND[error.kind]
    return status


def _discard_stdout() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)
