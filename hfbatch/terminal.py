"""What commands print, and how they end: answers for people and machines, faults, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def answer(values: Any, as_json: bool, show: Any) -> None:
    """To stdout: JSON for machines, or what `show` prints for people."""
    if as_json:
        print(json.dumps(values, indent=2, default=str))  # noqa: T201 - plain, whatever the terminal
    else:
        show(console())


def console(err: bool = False) -> Console:
    """Where people read: stdout, or stderr."""
    from rich.console import Console

    return Console(stderr=err)


def escaped(text: str) -> str:
    """Text that is printed as it is, whatever brackets it holds."""
    from rich.markup import escape

    return escape(text)


@contextmanager
def faults_shown(as_json: bool) -> Iterator[None]:
    """Errors as messages and exit codes; SIGTERM ends a job as Ctrl-C does."""
    from hfbatch.errors import HfbatchError, SpecError, redact_text

    def on_term(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_term)
    try:
        yield
    except HfbatchError as error:
        faults = error.faults if isinstance(error, SpecError) else [str(error)]
        if as_json:
            print(json.dumps({"faults": faults}, indent=2))  # noqa: T201
        for fault in faults:
            console(err=True).print(f"[red]✗[/] {escaped(fault)}", highlight=False)
        raise typer.Exit(2 if isinstance(error, SpecError) else 1) from None
    except BrokenPipeError:
        # Whoever read stdout has enough, as `| head` has. What is left to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        console(err=True).print(f"[red]✗[/] {escaped(redact_text(str(error)))}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console(err=True).print(
            "Interrupted; what is committed stays, and the same command goes on from there."
        )
        sys.exit(130)
