"""What commands print, and how they end: answers for people and machines, faults, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from hfbatch import supervisor
from hfbatch.display import prepare_streams, say, screen, tell

GO_ON = "what is committed stays, and the same command goes on from there"
MOST_LETTERS = 500
"""Of an error that nobody foresaw."""
INTERRUPTED = f"Interrupted; {GO_ON}."


class App(typer.Typer):
    """The program: its output can be written to any terminal, its help as well."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command that the arguments name."""
        prepare_streams()
        return super().__call__(*args, **kwargs)


def answer(values: Any, as_json: bool, show: Any) -> None:
    """To stdout: JSON for machines, or what `show` prints for people."""
    if as_json:
        _print_json(values)
    else:
        show(screen())


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, default=str))  # noqa: T201 - plain ASCII, whatever the terminal


@contextmanager
def faults_shown(as_json: bool, supervised: bool = False) -> Iterator[None]:
    """Errors as messages and exit codes, also as JSON; SIGTERM ends a job as Ctrl-C does.

    :param supervised: the command uses a cluster, whose library may end its process: work in a child process.
    """
    prepare_streams()
    if supervised:
        supervisor.supervise(lambda fault: _fail([f"{fault}; {GO_ON}"], as_json))
    code = 0
    try:
        with _as_exit_codes(as_json):
            yield
    except typer.Exit as leaving:
        code = leaving.exit_code
        raise
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        _flush()
        supervisor.end(code)


@contextmanager
def _as_exit_codes(as_json: bool) -> Iterator[None]:
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
        # Whoever read stdout has enough, as `| head` has. What is left to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        _fail([redact_text(str(error))], as_json)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if as_json:
            _print_json({"faults": [INTERRUPTED]})
        say(screen(err=True), INTERRUPTED)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last resort: a command always ends with words of its own
        _fail([_unexpected(error)], as_json)
        raise typer.Exit(1) from None


def _fail(faults: Sequence[str], as_json: bool) -> None:
    """Faults to stderr, and as JSON to stdout where that was asked for."""
    if as_json:
        _print_json({"faults": list(faults)})
    console = screen(err=True)
    for fault in faults:
        tell(console, "✗", "red", fault)


def _unexpected(error: Exception) -> str:
    """One sentence for an error that nobody foresaw; its traceback goes into a file."""
    from hfbatch.errors import redact_text

    text = redact_text(" ".join(str(error).split()))[:MOST_LETTERS]
    told = f"{type(error).__name__}: {text or 'without a message'}"
    try:
        handle, path = tempfile.mkstemp(prefix="hfbatch-error-", suffix=".txt")
        with open(handle, "w", encoding="utf8", errors="backslashreplace") as file:
            file.write(redact_text("".join(traceback.format_exception(error))))
    except OSError:
        return f"unexpected error: {told}"
    return f"unexpected error: {told}; the traceback is in {path}: please report it. The same command may be run again"


def _flush() -> None:
    """What is printed is out before the end is told; a reader that has gone is no fault."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
