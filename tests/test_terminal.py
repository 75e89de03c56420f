"""What reaches a terminal is text: no markup, no escape sequence, whatever the data, and on every terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import hfbatch
from hfbatch.console import display
from hfbatch.console.display import add, facts, line, prepare_streams, say, say_marked, show, visible
from hfbatch.console.progress import Progress, Snapshot
from hfbatch.predict.status import render_status
from hfbatch.train.progress import TrainProgress

NASTY = "run[red]x[/red] [/] :smile: \x1b]0;title\x07 \x9b31m \u202eevil\u2066 \u200b\nok\r✓ \udcff"
STATUS = {
    "output": NASTY, "task": NASTY, "model": {"name": NASTY, "commit": "0" * 40}, "success": False, "parts": 1,
    "splits": 2, "rows_in": 1, "rows_out": 1, "rows_rejected": 0,
    "running": None,
    "settled": {"batch_size": 8, "dtype": NASTY, "device": NASTY},
    "last_run": {"finished": "now", "exit_code": 1, "message": NASTY},
}  # fmt: skip


def printed(show_it: Any, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=400, force_terminal=terminal, color_system=None)
    show_it(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def harmless(shown: str, terminal: bool = False) -> bool:
    """Whether nothing but the console's own sequences and line breaks is no plain text."""
    own = ("\n", "\x1b") if terminal else ("\n",)
    return all(c in own or c.isprintable() or unicodedata.category(c) == "Zs" for c in shown)


@settings(max_examples=50, deadline=None)
@given(st.text())
@example("🏻")
def test_any_text_is_shown_and_obeyed_nowhere(text: str) -> None:
    shown = visible(text)
    assert harmless(shown)
    assert "\n" not in shown
    assert not text.isprintable() or shown == text
    table = facts()
    add(table, "name", text)
    for one in (lambda console: say(console, text, wrap=False), lambda console: show(console, table)):
        out = printed(one)
        assert harmless(out)
        assert "".join(shown.split()) in "".join(out.split())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run[red]x", "run[red]x"), ("[/red]", "[/red]"), ("\x1b[2J", r"\x1b[2J"), ("\x9b2J", r"\x9b2J"),
        ("a\u202eb", r"a\u202eb"), ("a\nb", r"a\nb"), ("a\u200bb", r"a\u200bb"), ("\udcff", r"\udcff"),
        ("Grüße 日本\u3000語 😀", "Grüße 日本\u3000語 😀"),
    ],
)  # fmt: skip
def test_what_a_terminal_would_obey_is_shown_as_repr_shows_it(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_status_progress_and_faults_show_names_as_they_are() -> None:
    def progress(console: Console) -> None:
        with Progress(console, NASTY) as shown:
            shown.update(Snapshot(state=NASTY, working=1.0))

    def training(console: Console) -> None:
        with TrainProgress(console, NASTY) as shown:
            shown.say(NASTY)

    for one in (
        lambda console: render_status(STATUS, console), progress, training,
        lambda console: say_marked(console, "✗", "red", NASTY),
    ):  # fmt: skip
        assert harmless(printed(one))
        assert "run[red]x[/red] [/] :smile:" in printed(one)
    for one in (progress, training):
        shown = printed(one, terminal=True)
        assert "\x1b]0" not in shown
        assert "run[red]x[/red] [/]" in shown


def test_a_message_of_two_lines_cannot_pass_for_two_messages() -> None:
    shown = printed(lambda console: say_marked(console, "✗", "red", "no file 'a\n✓ every row is there'"))
    assert [text for text in shown.splitlines() if not text.startswith("  ")] == ["✗ no file 'a"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_terminal_of_any_encoding_takes_everything(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding)
    prepare_streams([stream])
    console = Console(file=stream, width=200)
    say_marked(console, "✓", "", f"every row → 日本 · … {NASTY}")
    show(console, facts())
    with Progress(console, "embedding") as progress:
        progress.update(Snapshot(state="réading"))
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert "every row" in text
    assert "?" not in text
    assert ("日本" in text) == (encoding == "utf-8")


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "hfbatch", *arguments], capture_output=True, timeout=120, env={**os.environ, **env}
    )  # fmt: skip


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_commands_speak_to_a_terminal_that_is_not_utf8(env: dict[str, str]) -> None:
    done = command("status", "/no[/red]where\u4e2d", **env)
    assert done.returncode == 2
    assert rb"x /no[/red]where\u4e2d is not an output" in done.stderr


# How commands end, whatever ends them.

ENDS = """
import os, sys, time, typer
from hfbatch.console import supervisor
from hfbatch.cli.terminal import answer, faults_shown
way = sys.argv[1]
try:
    with faults_shown(True, supervised=True, resumes=way != "signal"):
        if way == "fine":
            answer({"fine": 1}, True, None)
        elif way == "exit 3":
            answer({"fine": 1}, True, None)
            raise typer.Exit(3)
        elif way == "unexpected":
            raise ZeroDivisionError("[red]\\x1b s3://KEY:SECRET@lake")
        elif way == "os":
            raise OSError("disk full")
        elif way == "note":
            supervisor.note("the head is gone")
            os._exit(1)
        elif way == "abort":
            os.abort()
        elif way == "signal":
            print("ready", file=sys.stderr, flush=True)
            time.sleep(60)
        elif way == "lost":
            import signal
            signal.signal(signal.SIGINT, lambda *_: os._exit(1))
            print("ready", file=sys.stderr, flush=True)
            time.sleep(60)
        elif way == "stuck at exit":
            import atexit
            answer({"fine": 1}, True, None)
            atexit.register(time.sleep, 60)
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize(
    ("way", "code", "reported"),
    [
        ("fine", 0, None), ("exit 3", 3, None), ("stuck at exit", 0, None), ("os", 1, "disk full"),
        ("unexpected", 1, "unexpected error: ZeroDivisionError: [red]"),
        ("note", 1, "the head is gone (exit code 1); committed results are kept"),
        ("abort", 1, "ended without a message (signal SIGABRT"),
    ],
)  # fmt: skip
def test_whatever_ends_a_command_it_has_last_words_and_json_stays_json(
    way: str, code: int, reported: str | None
) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, way], capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    answer = json.loads(done.stdout)
    if reported is None:
        assert answer == {"fine": 1}
    else:
        assert reported in answer["faults"][0]
        assert reported.split(";")[0] in " ".join(done.stderr.split())
        assert "\x1b" not in done.stderr
        assert "SECRET" not in done.stdout + done.stderr
        if "the traceback is in " in answer["faults"][0]:
            path = Path(answer["faults"][0].partition("the traceback is in ")[2].partition(":")[0])
            assert "SECRET" not in path.read_text(encoding="utf8")
            path.unlink()


def test_a_signal_goes_to_the_work_and_a_kill_takes_it_along() -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        work = subprocess.Popen(
            [sys.executable, "-c", ENDS, "signal"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert work.stderr is not None
        assert work.stderr.readline() == "ready\n"
        work.send_signal(number)
        printed, _ = work.communicate(timeout=60)  # to the end of whoever writes there
        assert work.returncode == code
        if code == 130:
            assert json.loads(printed)["faults"] == ["Interrupted."]  # it has no results to resume from


def test_a_process_that_is_lost_after_ctrl_c_was_interrupted() -> None:
    work = subprocess.Popen(
        [sys.executable, "-c", ENDS, "lost"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert work.stderr is not None
    assert work.stderr.readline() == "ready\n"
    work.send_signal(signal.SIGINT)
    printed, _ = work.communicate(timeout=60)
    assert work.returncode == 130
    fault = json.loads(printed)["faults"][0]
    assert fault.startswith(
        "interrupted; the process that did the work ended without a message (exit code 1)"
    )


# Nobody prints past that one module.

ROOT = Path(hfbatch.__file__).parent
PRINTING = {"print", "add_row", "add_column", "print_json", "echo", "secho"}
MAKING = {
    "Console",
    "Text",
    "TextColumn",
    "Panel",
    "Markdown",
    "from_markup",
    "assemble",
    "render_str",
    "escape",
}


def past_display(source: str) -> list[str]:
    """Calls that show text by other ways than `hfbatch.console.display`, and markup in f-strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr=name, value=ast.Name(id=of)), args=[*arguments]):
                styled = name == "add_column" and not arguments  # a column without a heading shows nothing
                if (
                    name in PRINTING | MAKING
                    and not styled
                    and of not in ("math", "np", "re", "ast", "torch", "logger", "html")
                ):
                    found.append(f"line {node.lineno}: {of}.{name}")
            case ast.Call(func=ast.Attribute(attr=name)) if name in {"print", "add_row", "from_markup"}:
                found.append(f"line {node.lineno}: {name}")
            case ast.Call(func=ast.Name(id=name)) if name in (PRINTING | MAKING) - {"escape"}:
                found.append(f"line {node.lineno}: {name}")
            case ast.JoinedStr(values=parts):
                texts = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
                if "[/]" in texts or any(
                    f"[{style}]" in texts for style in ("red", "green", "bold", "dim", "cyan")
                ):
                    found.append(f"line {node.lineno}: markup in an f-string")
    return found


def test_everything_is_printed_by_one_module() -> None:
    allowed = {"console/display.py": 100, "cli/terminal.py": 1}  # terminal.py prints JSON
    for path in ROOT.rglob("*.py"):
        found = past_display(path.read_text(encoding="utf8"))
        assert len(found) <= allowed.get(str(path.relative_to(ROOT)), 0), (
            f"{path}: {found}; use hfbatch.console.display"
        )


@pytest.mark.parametrize(
    "source",
    [
        "console.print(f'[red]{name}[/]')", "table.add_row(name)", "print(name)", "typer.echo(name)",
        "self._console.print(name)", "Text(name)", "Text.from_markup(name)", "Console(stderr=True)",
        "x = f'[bold]{name}'", "TextColumn('{task.description}')", "table.add_column(name)",
    ],
)  # fmt: skip
def test_printing_past_that_module_is_found(source: str) -> None:
    assert past_display(source)


def test_lines_are_made_of_texts_and_styles() -> None:
    assert line("a", ("[b]", "red")).plain == "a[b]"
    assert display.screen().options is not None
