"""Runs the work of a command in a child process; the parent waits and reports what ended it.

Ray's core library ends its process without a message when the cluster's head or this machine's raylet is gone, and
the kernel kills a process that takes too much memory. The parent prints a message in these cases too.
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
"""Seconds that work may take to stop after an interrupt, before it is interrupted once more."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, also if Ray's library ends the process while it disconnects."""
PR_SET_PDEATHSIG = 1
_sender: list[int] = []
"""In the child: the write end of the pipe to the parent."""


def supervise(last_words: Callable[[str], None]) -> None:
    """Forks, and returns in the child. The parent waits, forwards signals, and exits with the child's exit code.

    Does nothing if stdout is redirected within the process or other threads run, as when a program or a test calls a
    command, and on systems other than Linux.

    :param last_words: called in the parent with one sentence if the child ended without `end`.
    """
    if sys.platform != "linux" or threading.active_count() > 1 or sys.stdout is not sys.__stdout__:
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    receiver, sender = os.pipe()
    waiting = os.getpid()
    child = os.fork()
    if child:
        os.close(sender)
        _wait(child, receiver, last_words)
    os.close(receiver)
    _sender[:] = [sender]
    os.setpgid(0, 0)  # a terminal's Ctrl-C arrives once, through the parent
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != waiting:
        os._exit(1)


def supervised() -> bool:
    """Returns whether a parent process reports the end of this one."""
    return bool(_sender)


def note(text: str) -> None:
    """Sets the message that the parent prints if this process ends without `end`; the last one counts."""
    _send("note", text)


def end(code: int) -> None:
    """Ends the child with this code once all output is written; does nothing in a process without a waiting parent.

    The interpreter's own end takes half a second with the libraries of a job, and those of Ray can block it.
    """
    _send("end", str(code))
    if _sender:
        os._exit(code)


def interrupt(reason: str, over: threading.Event, leaving: Callable[[], bool] = bool) -> None:
    """Interrupts the main thread from another one; if that takes too long and a parent reports it, exits the process.

    :param reason: a sentence that the parent prints.
    :param over: set once the main thread has stopped its work.
    :param leaving: returns whether the main thread is about to stop, so that no interrupt is needed.
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
    """Sends a real signal, which also ends a system call: SIGTERM where SIGINT is ignored, as in background scripts."""
    main = threading.main_thread().ident
    for number in (signal.SIGINT, signal.SIGTERM):
        if main is not None and callable(signal.getsignal(number)):
            signal.pthread_kill(main, number)
            return


def _send(kind: str, text: str) -> None:
    if _sender:
        os.write(_sender[0], f"{kind} {' '.join(text.split())}\n".encode("utf8", "backslashreplace"))


def _wait(child: int, receiver: int, last_words: Callable[[str], None]) -> NoReturn:
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        _kill(child, number)

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    signal.signal(signal.SIGTSTP, lambda *_: _pause(child))
    status, words = _follow(child, receiver)
    if "end" in words:
        sys.exit(int(words["end"]))
    cause = f"{words.get('note') or 'the process that did the work ended without a message'} ({_how(status)})"
    stopped = bool({signal.SIGINT, signal.SIGTERM} & set(received))
    last_words(f"interrupted; {cause}" if stopped else cause)
    sys.exit(INTERRUPTED if stopped else 1)


def _follow(child: int, receiver: int) -> tuple[int, dict[str, str]]:
    """Returns the exit status of the child, as waitpid gives it, and its last `note` and `end`."""
    data, status = b"", None
    while status is None:
        if select.select([receiver], [], [], POLL_S)[0]:
            more = os.read(receiver, 65536)
            data += more
            if not more:  # the pipe is closed: the child is about to exit
                time.sleep(0.01)
        ended, found = os.waitpid(child, os.WNOHANG)
        status = found if ended else None
    while select.select([receiver], [], [], 0)[0] and (more := os.read(receiver, 65536)):
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
    """Handles Ctrl-Z: stops the child and this process, and continues both."""
    _kill(child, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    _kill(child, signal.SIGCONT)
