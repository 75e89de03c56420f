"""The lock of an output: one writer, a heartbeat, and the takeover from a dead holder.

    OUT/__hfbatch/lock-00000003.json    the holder of the output; the highest number counts

A process takes the output by creating the file of the next number, which succeeds for only one process (see
`exclusive`), and deletes it at the end. No process removes or overwrites the highest file of another. So no two
observers of a dead holder can both take its place, and a holder that was replaced while it was stopped sees a higher
number, or another token.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.fs as pafs

from hfbatch.data.filesystem import (
    absent_folders,
    is_local,
    kind_of,
    list_names,
    one_line,
    open_filesystem,
    redact,
)
from hfbatch.errors import HfbatchError, LockLostError, OutputHeldError
from hfbatch.output.earlier import has_earlier, move_earlier
from hfbatch.output.exclusive import exclusive_create
from hfbatch.output.holder import Holder, this_process
from hfbatch.output.layout import INNER, OLD_INNER, lock_file, lock_number
from hfbatch.output.writer import write_file

HEARTBEAT_S = 10.0
TAKEOVER_S = 60.0
"""Seconds, by the observer's clock, after which a holder whose file has not changed has lost the output."""
POLL_S = 0.5
CONFIRM_S = 2.0
"""Seconds for which a lock file has to be missing or unreadable before its hold counts as lost: a store can show it so for
a moment, while the holder renews it."""


def holder_of(fs: pafs.FileSystem, root: str) -> Holder | None:
    """Returns the current holder of an output, from its lock file; None if there is none or it cannot be read."""
    for folder in (INNER, OLD_INNER):
        holder = Holder.parse(_newest(fs, f"{root}/{folder}")[1])
        if holder is not None and not holder.dead:
            return holder
    return None


def describe_holder(fs: pafs.FileSystem, root: str) -> dict[str, Any] | None:
    """Describes the current holder of an output and the age of its heartbeat as plain values; None without a holder."""
    holder = holder_of(fs, root)
    if holder is None:
        return None
    quiet = time.monotonic() - holder.clock if holder.here else time.time() - holder.renewed
    return {
        "user": holder.user,
        "host": holder.host,
        "pid": holder.pid,
        "since": holder.since,
        "heartbeat_seconds_ago": round(max(quiet, 0.0), 1),
    }


def guard_note(out: str) -> str | None:
    """Returns a note if no lock can protect an output from two writers; None if one can. Leaves no files behind.

    :raises OSError: if the folder cannot be written.
    """
    fs, root = open_filesystem(out)
    create, why = exclusive_create(fs), "its filesystem has no conditional write"
    if isinstance(fs, pafs.LocalFileSystem):
        return None
    if create is not None:
        probe = f"{root}/{INNER}/.probe-{uuid.uuid4().hex}"
        try:
            create(probe, b"hfbatch")
            if not create(probe, b"hfbatch"):
                return None
            why = "its server ignores the condition of a conditional write"
        except NotImplementedError:
            pass
        finally:
            with suppress(OSError):
                fs.delete_file(probe)
    return f"no lock protects {redact(out)} from two writers ({why}): run only one command on it"


@dataclass(frozen=True)
class Claim:
    """A hold on an output, which any process of the job can check."""

    out: str
    name: str
    """The lock file."""
    token: str
    folder: str = INNER
    """The folder of the lock file."""

    def check(self, patience: float = 0.0) -> None:
        """Checks that this claim still holds the output: one listing and one small read.

        :param patience: seconds to wait for a lock file that is not listed: network disks show new files late on
            other machines.
        :raises LockLostError: if it does not; nothing may be written then.
        """
        fs, root = open_filesystem(self.out)
        deadline = time.monotonic() + max(patience, CONFIRM_S)
        while True:
            name, data = _newest(fs, f"{root}/{self.folder}")
            holder, later = Holder.parse(data), lock_number(name) > lock_number(self.name)
            if name == self.name and holder is not None:
                if holder.token == self.token:
                    return
                break
            if later or time.monotonic() >= deadline:
                break
            time.sleep(POLL_S)
        taker = f"was taken over by {holder}" if later and holder else "is no longer locked by this run"
        raise LockLostError(f"{redact(self.out)} {taker}; this run writes nothing more")


@dataclass
class Lock:
    """The hold of this process on one output."""

    out: str
    on_lost: Callable[[], None] | None = None
    """Called from the heartbeat thread when the output is lost."""
    lost: str = ""
    """Why the output is no longer held; empty while it is."""
    claim: Claim | None = None
    """None if the filesystem supports no lock."""
    folder: str = INNER
    """The folder of the lock files."""
    _me: Holder = field(default_factory=this_process)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.fs, root = open_filesystem(self.out)
        self.root = f"{root}/{self.folder}"
        self._create = exclusive_create(self.fs)

    def acquire(self, say: Callable[[str], None]) -> None:
        """Takes the output; waits if its holder may be dead.

        :param say: called once with the reason for waiting.
        :raises OutputHeldError: if another process holds it.
        :raises OSError: if the lock cannot be written.
        """
        if self._create is None:
            return
        watch = _Watch(self.out, say)
        while True:
            name, data = _newest(self.fs, self.root)
            holder = Holder.parse(data)
            # The server may have answered a repeated request.
            if holder is not None and holder.token == self._me.token:
                break
            if name and not (holder and holder.dead) and not watch.still(name, data, holder):
                time.sleep(POLL_S)
                continue
            mine = lock_file(lock_number(name) + 1)
            if self._create(self._path(mine), self._me.dump()) and _newest(self.fs, self.root)[0] == mine:
                name = mine
                break
        self.claim = Claim(self.out, name, self._me.token, self.folder)
        self._sweep(name)
        self._thread = threading.Thread(target=self._beat, name="hfbatch-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Checks that the output is still held. :raises LockLostError: if it is not."""
        if self.lost:
            raise LockLostError(self.lost)
        if self.claim is not None:
            self.claim.check()

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Interrupts the main thread if the output is lost while the block runs.

        :raises LockLostError: in that case, in place of the KeyboardInterrupt.
        """
        self.on_lost = _thread.interrupt_main
        try:
            self.check()
            yield
        except KeyboardInterrupt:
            if self.lost:
                raise LockLostError(self.lost) from None
            raise
        finally:
            self.on_lost = None

    def release(self) -> None:
        """Releases the output."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=HEARTBEAT_S)
        if self.claim is not None and not self.lost:
            with suppress(OSError, LockLostError):
                self.claim.check()
                self.fs.delete_file(self._path(self.claim.name))

    def _beat(self) -> None:
        """Renews the lock until `release`; never writes again after the lock is lost."""
        renewed = time.monotonic()
        while not self._over.wait(HEARTBEAT_S):
            try:
                self.check()
                self._write(replace(self._me, renewed=time.time(), clock=time.monotonic()))
                renewed = time.monotonic()
            except LockLostError as error:
                return self._lose(str(error))
            except OSError as error:
                if time.monotonic() - renewed > TAKEOVER_S:
                    return self._lose(
                        f"the lock of {redact(self.out)} could not be renewed for {TAKEOVER_S:.0f} s: {one_line(error)}; "
                        "this run writes nothing more"
                    )
        return None

    def _lose(self, why: str) -> None:
        self.lost = why
        if self.on_lost is not None:
            self.on_lost()

    def _write(self, holder: Holder) -> None:
        assert self.claim is not None  # noqa: S101 - for mypy
        write_file(self.fs, self._path(self.claim.name), holder.dump())

    def _sweep(self, mine: str) -> None:
        """Deletes the lock files of earlier holders."""
        for name in list_names(self.fs, self.root):
            if 0 < lock_number(name) < lock_number(mine):
                with suppress(OSError):
                    self.fs.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


class _Watch:
    """Watches the lock file of a holder that may be dead, by the clock of this process."""

    def __init__(self, out: str, say: Callable[[str], None]) -> None:
        self._out, self._say = redact(out), say
        self._seen: tuple[str, bytes] | None = None
        self._since = 0.0

    def still(self, name: str, data: bytes, holder: Holder | None) -> bool:
        """Returns whether the file is unchanged for TAKEOVER_S. :raises OutputHeldError: if its holder is alive."""
        if self._seen == (name, data):
            return time.monotonic() - self._since >= TAKEOVER_S
        if holder is not None and (holder.fresh or self._seen is not None):
            raise OutputHeldError(
                f"output {self._out} is being written by {holder}; wait for that run to end, or stop it, and run "
                "again, or choose another output"
            )
        if self._seen is None:
            who = f"{holder}, which may have died" if holder else "a run whose lock file is damaged"
            self._say(
                f"waiting up to {TAKEOVER_S:.0f} s for a heartbeat of the run that holds {self._out}: {who}"
            )
        self._seen, self._since = (name, data), time.monotonic()
        return False


@contextmanager
def hold(out: str, say: Callable[[str], None]) -> Iterator[Lock]:
    """Holds an output while the block runs. :param say: called with the reason for waiting.

    :raises OutputHeldError: if another process holds it.
    :raises HfbatchError: if the lock cannot be written.
    """
    lock = Lock(out)
    made = absent_folders(lock.root) if is_local(lock.fs) else []
    try:
        try:
            lock.acquire(say)
            _move_earlier(out, say)
        except (OSError, NotImplementedError) as error:
            raise HfbatchError(
                f"output {redact(out)} cannot be locked: {one_line(error)}; free disk space or fix the permissions, then run again"
            ) from error
        yield lock
    finally:
        lock.release()
        with suppress(OSError):  # removes folders that were created only for the lock
            for folder in made:
                os.rmdir(folder)


def _move_earlier(out: str, say: Callable[[str], None]) -> None:
    """Moves the files of the version before to their present places, once no run of that version holds the output.

    :raises OutputHeldError: if one does.
    """
    fs, root = open_filesystem(out)
    if not has_earlier(fs, root):
        return
    earlier = Lock(out, folder=OLD_INNER)
    earlier.acquire(say)
    try:
        move_earlier(fs, root, earlier.check)
    finally:
        earlier.release()
    if is_local(fs):
        with suppress(OSError):  # a run of that version has begun since
            os.rmdir(earlier.root)
    elif not list_names(fs, earlier.root) and kind_of(fs, earlier.root) == "folder":
        fs.delete_dir(earlier.root)


def _newest(fs: pafs.FileSystem, root: str) -> tuple[str, bytes]:
    """Returns name and content of the newest lock file of a folder; empty if there is none."""
    name = ""
    for _ in range(3):  # a file may be deleted by the holder of a higher number before it is opened
        there = (name for name, folder in list_names(fs, root).items() if lock_number(name) and not folder)
        name = max(there, key=lock_number, default="")
        if not name:
            break
        with suppress(FileNotFoundError), fs.open_input_stream(f"{root}/{name}") as stream:
            return name, stream.read()
    return name, b""
