"""Keeps a command's last words: the work goes on in a child process, and this one tells what ended it.

Ray's core library ends the process that it is loaded into, without a word, when the cluster's head or this machine's
raylet is gone; the kernel kills one that takes too much memory. What the command prints must not depend on that.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

POLL_S = 1.0
GRACE_S = 20.0
"""How long work may take to stop after it is interrupted; it is interrupted once more then."""
EXIT_S = 30.0
"""How long a process may take to end after it has said all; then it is killed. Its answer stands."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1
_told: list[int] = []
"""In the child: the writing end of the pipe to the process that waits for it."""


def supervise(last_words: Callable[[str], None]) -> None:
    """Returns in a child process; this process waits for it, passes signals on, and ends with its exit code.

    Does nothing where the caller's output is not the process's own or other threads run, as where a program or a test
    calls a command, and on systems other than Linux.

    :param last_words: called in the waiting process with one sentence when the child ended without `end`.
    """
    if sys.platform != "linux" or threading.active_count() > 1 or sys.stdout is not sys.__stdout__:
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    heard, told = os.pipe()
    waiting = os.getpid()
    child = os.fork()
    if child:
        os.close(told)
        _wait(child, heard, last_words)
    os.close(heard)
    _told[:] = [told]
    os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, by way of the waiting process
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != waiting:
        os._exit(1)


def supervised() -> bool:
    """Whether another process tells the end of this one."""
    return bool(_told)


def note(text: str) -> None:
    """What to tell if this process ends without a word from now on; the newest note counts."""
    _tell("note", text)


def end(code: int) -> None:
    """All is said; what is left is to leave, with this exit code."""
    _tell("end", str(code))


def interrupt(reason: str, over: threading.Event, leaving: Callable[[], bool] = bool) -> None:
    """Ends the work of the main thread from another; and this process, where that takes too long and somebody tells.

    :param reason: a sentence.
    :param over: set once the main thread has stopped its work.
    :param leaving: whether it is about to, so that nothing is left to interrupt.
    """
    note(reason)
    for _ in range(2):
        if over.is_set():
            return
        if not leaving():
            _signal_main_thread()
        if over.wait(GRACE_S):
            return
    if supervised():
        os._exit(1)


def _signal_main_thread() -> None:
    """A real signal, which also ends a system call. A command that a script starts in the background ignores SIGINT."""
    main = threading.main_thread().ident
    for number in (signal.SIGINT, signal.SIGTERM):
        if main is not None and callable(signal.getsignal(number)):
            signal.pthread_kill(main, number)
            return


def _tell(kind: str, text: str) -> None:
    if _told:
        os.write(_told[0], f"{kind} {' '.join(text.split())}\n".encode("utf8", "backslashreplace"))


def _wait(child: int, heard: int, last_words: Callable[[str], None]) -> NoReturn:
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: _kill(child, number))
    signal.signal(signal.SIGTSTP, lambda *_: _pause(child))
    status, words = _follow(child, heard)
    if "end" in words:
        sys.exit(int(words["end"]))
    last_words(
        f"{words.get('note') or 'the process that did the work ended without a word'} ({_how(status)})"
    )
    sys.exit(1)


def _follow(child: int, heard: int) -> tuple[int, dict[str, str]]:
    """Exit status of the child as waitpid gives it, and its last `note` and `end`."""
    data, deadline, status = b"", None, None
    while status is None:
        if select.select([heard], [], [], POLL_S)[0]:
            more = os.read(heard, 65536)
            data += more
            if not more:  # nobody can say anything any more, so that it is about to end
                deadline = deadline or time.monotonic() + EXIT_S
                time.sleep(0.01)
        if deadline is None and b"\nend " in b"\n" + data:
            deadline = time.monotonic() + EXIT_S
        if deadline is not None and time.monotonic() > deadline:
            _kill(child, signal.SIGKILL)
        ended, found = os.waitpid(child, os.WNOHANG)
        status = found if ended else None
    while select.select([heard], [], [], 0)[0] and (more := os.read(heard, 65536)):
        data += more
    said = (line.partition(" ") for line in data.decode("utf8").splitlines())
    return status, {kind: text for kind, _, text in said}


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"signal {name}" + (", memory may have run out" if name == "SIGKILL" else "")
    return f"exit code {os.WEXITSTATUS(status)}"


def _kill(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _pause(child: int) -> None:
    """Ctrl-Z: both stop; both go on."""
    _kill(child, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    _kill(child, signal.SIGCONT)
