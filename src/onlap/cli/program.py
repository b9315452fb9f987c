"""From a command line to an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from onlap import errors
from onlap.cli import exits, process
from onlap.cli.call import Call
from onlap.cli.parser import UsageError, make_parser, split_verb
from onlap.cli.registry import COMPLETE, GROUPS, VERBS
from onlap.cli.terminal.output import Output, complain
from onlap.cli.terminal.text import safe

# Verbs that run the user's command, and end with its status.
_RUNNERS = frozenset({"enter", "run", "try", "unshare", "ws run", "ws shell"})


def run(argv: list[str]) -> int:
    """Run a command line; nothing is raised."""
    verb, arguments = split_verb(argv)
    out = _first_output(argv[: argv.index(verb.split()[0])] if verb in _RUNNERS else argv)
    process.prepare()
    try:
        status = _run(verb, arguments, out)
    except SystemExit as end:  # argparse's --help
        status = end.code if isinstance(end.code, int) else exits.DONE
    return _finish(out, status)


def _first_output(argv: Sequence[str]) -> Output:
    # For the errors of a command line that is not understood; what follows "--" is not the command's own.
    ours = list(argv[: argv.index("--")] if "--" in argv else argv)
    verbose = 2 if "-vv" in ours or ours.count("-v") > 1 else 0
    return Output(json="--json" in ours, quiet="-q" in ours or "--quiet" in ours, verbose=verbose)


def _run(verb: str | None, arguments: list[str], out: Output) -> int:
    """Run a verb, and report what goes wrong."""
    runs = verb in _RUNNERS
    try:
        status = _dispatch(verb, arguments, out)
        out.flush()
        return status
    except UsageError as error:
        out.error("Usage", str(error), hint=f"see: onlap {_known(verb or '')} --help".replace("  ", " "))
        return exits.RUN_FAILED if runs else exits.USAGE
    except errors.OnlapError as error:
        _traceback(out)
        out.onlap_error(error)
        return exits.RUN_FAILED if runs else exits.BY_KIND[error.kind]
    except BrokenPipeError:
        return exits.SIGNAL + signal.SIGPIPE
    except KeyboardInterrupt:
        return exits.SIGNAL + signal.SIGINT
    except process.Terminated as end:
        return exits.SIGNAL + end.number
    except ModuleNotFoundError as error:
        # Of a library that is installed with Onlap; the core works without.
        _traceback(out)
        message = f"{verb} needs the Python module {error.name}, which is not installed"
        out.error("Unimplemented", message, hint="install Onlap with its dependencies (pip)")
        return exits.RUN_FAILED if runs else exits.BY_KIND["Unimplemented"]
    except Exception as error:  # noqa: BLE001 - the last resort: one line for the user instead of a traceback
        _traceback(out)
        from traceback import extract_tb

        frame = extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        hint = "please report it" if out.verbose > 1 else "please report it, with the output of -vv"
        out.error("Internal", f"a bug in Onlap, {type(error).__name__} at {where}: {error}", hint=hint)
        return exits.RUN_FAILED if runs else exits.BUG


def _known(verb: str) -> str:
    """The verb, or its first word if there is only help for that group, or nothing."""
    return next((name for name in (verb, verb.partition(" ")[0]) if name in VERBS or name in GROUPS), "")


def _dispatch(verb: str | None, arguments: list[str], out: Output) -> int:
    if verb is None:
        return _without_verb(arguments, out)
    if verb in GROUPS:
        return _without_second_word(verb, arguments, out)
    if verb == COMPLETE:
        from onlap.cli.complete import complete

        complete(arguments, out)
        return exits.DONE
    if verb not in VERBS:
        raise UsageError(f"there is no verb {errors.shown(verb)}{_similar(verb)}")
    args = make_parser(VERBS[verb]).read(arguments)
    out.json, out.quiet, out.verbose = args.json, args.quiet, args.verbose
    if out.quiet or out.verbose:
        _configure_logging(out)
    return VERBS[verb].run(Call(args, out)) or exits.DONE


def _without_verb(arguments: list[str], out: Output) -> int:
    from onlap.cli.help import overview

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
    return exits.DONE


def _without_second_word(group: str, arguments: list[str], out: Output) -> int:
    from onlap.cli.help import group_overview

    if "-h" not in arguments and "--help" not in arguments:
        raise UsageError(f"which verb of {group}?")
    out.line(group_overview(group))
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

        # Control characters must not reach the terminal, but for the line ends.
        complain("\n".join(map(safe, traceback.format_exc().rstrip("\n").split("\n"))))


def _finish(out: Output, status: int) -> int:
    """Flush what is still buffered, so that the interpreter does not fail to do so at its end."""
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
