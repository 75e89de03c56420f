"""How commands print their results and end: text or JSON on stdout, errors, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import typer

from hfbatch.console import supervisor
from hfbatch.console.display import prepare_streams, say, say_marked, screen

RESUME = "committed results are kept, and the same command resumes from there"
MOST_LETTERS = 500
"""Maximum length of the message of an unexpected error."""


class App(typer.Typer):
    """The program. Its output, including help, can be written to a terminal of any encoding."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command that the arguments select."""
        prepare_streams()
        return super().__call__(*args, **kwargs)


def answer(values: Any, as_json: bool, show: Any) -> None:
    """Prints a result to stdout: as JSON, or by `show`."""
    if as_json:
        _print_json(values)
    else:
        show(screen())


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, default=str))  # noqa: T201 - ASCII, for a terminal of any encoding


@contextmanager
def faults_shown(as_json: bool, supervised: bool = False, resumes: bool = False) -> Iterator[ExitStack]:
    """Turns exceptions into messages, JSON and exit codes; SIGTERM stops a job like Ctrl-C.

    :param supervised: run the command in a child process, because Ray may end the process that uses a cluster.
    :param resumes: the command commits results as it goes, and continues when it is run again.
    :returns: a stack that is closed after the message has been printed.
    """
    prepare_streams()
    if supervised:
        supervisor.supervise(lambda fault: _fail([f"{fault}; {RESUME}" if resumes else fault], as_json))
    code, at_end = 0, ExitStack()
    try:
        with _as_exit_codes(as_json, f"Interrupted; {RESUME}." if resumes else "Interrupted."):
            yield at_end
    except typer.Exit as leaving:
        code = leaving.exit_code
        raise
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        _flush()
        at_end.close()
        supervisor.end(code)


@contextmanager
def _as_exit_codes(as_json: bool, interrupted: str) -> Iterator[None]:
    from hfbatch.errors import HfbatchError, SpecError, redact_text

    def on_term(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_term)
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except SpecError as error:
        _fail(error.faults, as_json)
        raise typer.Exit(2) from None
    except HfbatchError as error:
        _fail([str(error)], as_json)
        raise typer.Exit(1) from None
    except BrokenPipeError:
        # The reader of stdout has closed it, as `| head` does. Discard what is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        _fail([redact_text(str(error))], as_json)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if as_json:
            _print_json({"faults": [interrupted]})
        say(screen(err=True), interrupted)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - a command always ends with a message
        _fail([_unexpected(error)], as_json)
        raise typer.Exit(1) from None


def _fail(faults: Sequence[str], as_json: bool) -> None:
    """Prints errors to stderr, and with `--json` also as JSON to stdout."""
    if as_json:
        _print_json({"faults": list(faults)})
    console = screen(err=True)
    for fault in faults:
        say_marked(console, "✗", "red", fault)


def _unexpected(error: Exception) -> str:
    """The message of an unexpected error; writes the traceback to a file."""
    from hfbatch.errors import redact_text

    text = redact_text(" ".join(str(error).split()))[:MOST_LETTERS]
    shown = f"{type(error).__name__}: {text or 'without a message'}"
    try:
        handle, path = tempfile.mkstemp(prefix="hfbatch-error-", suffix=".txt")
        with open(handle, "w", encoding="utf8", errors="backslashreplace") as file:
            file.write(redact_text("".join(traceback.format_exception(error))))
    except OSError:
        return f"unexpected error: {shown}"
    return f"unexpected error: {shown}; the traceback is in {path}: please report it. The same command may be run again"


def _flush() -> None:
    """Flushes stdout and stderr before the exit code is reported; ignores a reader that has closed them."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
