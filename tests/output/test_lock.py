"""One writer for an output: exclusive, taken over from the dead at once or after a minute, never from the living."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from hfbatch.data.filesystem import open_filesystem
from hfbatch.errors import HfbatchError, LockLostError, OutputHeldError
from hfbatch.output import exclusive, lock
from hfbatch.output.holder import Holder, this_process
from hfbatch.output.layout import INNER, OLD_INNER
from hfbatch.output.lock import Claim, Lock, describe_holder, guard_note, hold

HOLDER = """
import sys, time
from hfbatch.output import holder, lock
from hfbatch.errors import HfbatchError
out, machine = sys.argv[1:3]
lock.HEARTBEAT_S, lock.TAKEOVER_S, holder.FRESH_S = map(float, sys.argv[3:])
if machine:
    holder._machine = lambda: machine
for _ in sys.stdin:
    try:
        with lock.hold(out, lambda text: print(text, flush=True)) as held:
            print("held", held.claim.name, flush=True)
            while not held.lost:
                time.sleep(0.02)
            print(held.lost, flush=True)
    except HfbatchError as error:
        print(error, flush=True)
"""


def start(
    out: Path | str, machine: str = "", takeover: float = 60, fresh: float = 60
) -> subprocess.Popen[str]:
    """A process that takes the output each time it reads a line, and then keeps it; with heartbeats each 0.2 s."""
    command = [sys.executable, "-c", HOLDER, str(out), machine, "0.2", str(takeover), str(fresh)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def read(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


@pytest.fixture
def processes():
    """Started processes, ended with the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "out")
    return f"s3://{request.getfixturevalue('s3')['bucket']}/out #1"


def take(out: str | Path, said: list[str] | None = None) -> Lock:
    held = Lock(str(out))
    held.acquire((said if said is not None else []).append)
    return held


def leave(out: str | Path, number: int = 1, folder: str = INNER, **changes: object) -> Holder:
    """The lock file that some process left."""
    holder = replace(this_process(), **changes)
    fs, root = open_filesystem(str(out))
    lock.write_file(fs, f"{root}/{folder}/lock-{number:08d}.json", holder.dump())
    return holder


def test_of_those_that_start_at_once_one_holds_and_the_place_of_the_dead_goes_to_one(
    out: str, processes: list[subprocess.Popen[str]]
) -> None:
    processes += [start(out) for _ in range(3)]
    for process in processes:
        go(process)
    told = {read(process): process for process in processes}
    winner = told.pop("held lock-00000001.json")
    me = this_process()
    assert len(told) == 1  # the others are told the same
    (line,) = told
    assert line.startswith(
        f"output {out} is being written by {me.user}@{me.host}, process {winner.pid}, since 20"
    )
    assert line.endswith("wait for that run to end, or stop it, and run again, or choose another output")

    winner.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, winner.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
    others = [process for process in processes if process is not winner]
    for process in others:
        go(process)
    told = {read(process)[:23]: process for process in others}
    second = told.pop("held lock-00000002.json")
    assert [*told] == [line[:23]]
    fs, root = open_filesystem(out)
    assert describe_holder(fs, root)["pid"] == second.pid


def test_what_the_version_before_wrote_is_moved_when_the_output_is_taken(out: str) -> None:
    part = "part-{}-0000000000-86d7f50eee1f-0aed3b95d33f"
    fs, root = open_filesystem(out)
    old = {
        "_SUCCESS": b"{}", f"{part.format('test')}.parquet": b"rows", "_hfbatch/job.json": b"{}",
        f"_hfbatch/rejects/{part.format('test')}.parquet": b"rejects", "_hfbatch/checkpoints/step-8/x.parquet": b"x",
        "_hfbatch/manifests.parquet": b"cache", "__hfbatch/job.json": b"left by a copy that was killed",
    }  # fmt: skip
    for name, data in old.items():
        lock.write_file(fs, f"{root}/{name}", data)
    leave(out, folder=OLD_INNER, pid=2**22 + 1)
    with hold(out, print):
        pass
    found = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    assert {info.path[len(root) + 1 :] for info in found if info.is_file} == {
        f"{part.format('Test')}.parquet", "__hfbatch/job.json", f"__hfbatch/rejects/{part.format('Test')}.PARQUET",
        "__hfbatch/checkpoints/step-8/x.parquet", "__hfbatch/manifests.PARQUET",
    }  # fmt: skip
    assert fs.open_input_stream(f"{root}/__hfbatch/job.json").read() == b"{}"
    assert not any(OLD_INNER in info.path.split("/") for info in found)


def test_a_holder_that_was_stopped_and_passed_over_writes_nothing_more(out: str, processes) -> None:
    first, second = processes[:] = [start(out, takeover=1, fresh=0.5), start(out, takeover=1, fresh=0.5)]
    go(first)
    assert read(first).startswith("held")
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(0.6)  # past FRESH_S
    go(second)
    assert read(second).startswith(f"waiting up to 1 s for a heartbeat of the run that holds {out}: ")
    assert read(second) == "held lock-00000002.json"
    os.kill(first.pid, signal.SIGCONT)
    lost = read(first)
    assert f"{out} was taken over by" in lost
    assert f"process {second.pid}, since" in lost
    assert lost.endswith("; this run writes nothing more")
    time.sleep(0.5)  # its heartbeats have ended, and the other's file is as it was
    fs, root = open_filesystem(out)
    assert describe_holder(fs, root)["pid"] == second.pid


def test_one_elsewhere_is_alive_as_long_as_its_heartbeat_goes(tmp_path: Path, processes) -> None:
    first, second = processes[:] = [start(tmp_path, machine="other machine"), start(tmp_path)]
    go(first)
    read(first)
    go(second)
    assert "waiting up to 60 s for a heartbeat" in read(second)
    assert "is being written by" in read(second)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"{}", b"\xff\xfe"])
def test_a_damaged_lock_file_keeps_nobody_out_for_long(
    tmp_path: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "TAKEOVER_S", 0.0)
    leave(tmp_path)
    (tmp_path / "__hfbatch/lock-00000001.json").write_bytes(damage)
    said: list[str] = []
    held = take(tmp_path, said)
    assert held.claim.name == "lock-00000002.json"
    assert "a run whose lock file is damaged" in said[0]
    assert sorted(os.listdir(tmp_path / "__hfbatch")) == ["lock-00000002.json"]
    held.release()


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({"process": "1"}, False),  # its pid is another process's now
        ({"pid": 2**22 + 1}, False),
        ({"pid": 2**22 + 1, "machine": "elsewhere"}, True),
        ({"machine": ""}, True),
        ({"clock": time.monotonic() - 999}, True),  # alive, but its heartbeat has ended
    ],
)
def test_who_is_taken_over_at_once(
    tmp_path: Path, changes: dict[str, object], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "TAKEOVER_S", 0.0)
    leave(tmp_path, **changes)
    said: list[str] = []
    take(tmp_path, said).release()
    assert bool(said) == waits


def test_a_lost_answer_of_the_server_is_no_other_holder(tmp_path: Path) -> None:
    held = Lock(str(tmp_path))
    leave(tmp_path, token=held._me.token)
    held.acquire(print)
    held.check()
    held.release()


def test_an_observer_that_woke_up_late_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It judged number 1 dead; since then 2 and 3 came, and 2 was swept."""
    leave(tmp_path, 3)
    late, seen = Lock(str(tmp_path)), [("lock-00000001.json", replace(this_process(), pid=2**22 + 1).dump())]
    newest = lock._newest
    monkeypatch.setattr(lock, "_newest", lambda *where: seen.pop() if seen else newest(*where))
    with pytest.raises(OutputHeldError):
        late.acquire(print)
    Claim(
        str(tmp_path),
        "lock-00000003.json",
        json.loads((tmp_path / "__hfbatch/lock-00000003.json").read_text())["token"],
    ).check()


def test_a_claim_holds_for_one_hold_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "CONFIRM_S", 0.2)
    held = take(tmp_path)
    path = tmp_path / "__hfbatch" / held.claim.name
    held.claim.check()
    kept = path.read_bytes()
    path.unlink()  # as by rm -r of the output
    with pytest.raises(LockLostError, match="is no longer locked by this run"):
        held.claim.check()
    leave(tmp_path)  # and another one began there
    with pytest.raises(LockLostError):
        held.claim.check()
    path.write_bytes(kept)
    held.claim.check(patience=60)
    held.release()
    with pytest.raises(LockLostError):
        held.claim.check()


@pytest.mark.parametrize("meanwhile", [b"", None], ids=["empty", "absent"])
def test_a_lock_file_that_a_store_shows_late_is_not_lost(tmp_path: Path, meanwhile: bytes | None) -> None:
    with hold(str(tmp_path / "out"), print) as held:
        assert held.claim is not None
        path = tmp_path / "out" / INNER / held.claim.name
        content = path.read_bytes()
        path.unlink() if meanwhile is None else path.write_bytes(meanwhile)
        late = threading.Timer(0.3, path.write_bytes, [content])
        late.start()
        held.claim.check()
        late.join()


def test_a_temporary_file_that_was_swept_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swept(*_: object) -> None:
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", swept)
        assert not exclusive.exclusive_create(pafs.LocalFileSystem())(str(tmp_path / "lock"), b"x")
    assert os.listdir(tmp_path) == []


def test_a_disk_without_links_has_a_lock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with hold(str(tmp_path), print), pytest.raises(OutputHeldError):
        take(tmp_path)
    assert os.listdir(tmp_path) == []  # the folder of the lock alone does not stay either


def test_status_names_the_writer(tmp_path: Path) -> None:
    fs, root = open_filesystem(str(tmp_path))
    assert describe_holder(fs, root) is None
    held = take(tmp_path)
    found = describe_holder(fs, root)
    assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
    assert 0 <= found["heartbeat_seconds_ago"] < 60
    held.release()
    assert describe_holder(fs, root) is None


def test_where_nothing_guards_the_plan_says_so(s3: dict[str, str]) -> None:
    assert guard_note("/no/matter") is None
    assert guard_note(f"s3://{s3['bucket']}/out") is None
    fs, _ = open_filesystem(f"s3://{s3['bucket']}/out")
    left = fs.get_file_info(pafs.FileSelector(s3["bucket"], recursive=True))
    assert not any(info.is_file for info in left)
    note = guard_note("memory://out")
    assert note.startswith("no lock protects memory://out from two writers")
    with hold("memory://out", print) as held:  # works all the same
        assert held.claim is None
        held.check()


def test_a_lock_that_cannot_be_written_says_why(s3: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, cause in (
        ("s3://no-such-bucket/out", "NoSuchBucket"),
        (str(tmp_path / "file/out"), "Not a directory"),
    ):
        with pytest.raises(HfbatchError) as caught, hold(out, print):
            pass
        assert f"output {out} cannot be locked: " in str(caught.value)
        assert cause in str(caught.value)
