"""Batch files of the OpenAI API: a request in each line, an answer for each, exactly once. Does not import Ray.

OUT.partial/job.json      the input, its digest and what answers it
OUT.partial/answers.jsonl answers in the order in which they came; a line without its end was cut off by a crash
OUT                       all answers in the order of the input, renamed into place last
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hfbatch.errors import OutputHeldError, SpecError
from hfbatch.output.writer import sync_folder

TASKS = {
    "/v1/embeddings": "embedding",
    "/v1/chat/completions": "text-generation",
    "/v1/completions": "text-generation",
}
"""The task that answers the requests of a URL."""
MOST_FAULTS = 5
MOST_BYTES = 64 << 20
"""Maximum length of a line."""


@dataclass(frozen=True)
class Line:
    """A request of a batch file."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass
class BatchFile:
    """A batch file that has been checked."""

    path: Path
    digest: str
    """SHA-256 of its bytes, in hexadecimal."""
    ids: list[str]
    """In the order of the lines."""
    urls: set[str]

    def lines(self, without: set[str] | None = None) -> Iterator[Line]:
        """Reads the requests again.

        :param without: ids to leave out.
        :raises SpecError: at the end, if the file has changed since it was checked.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for data in file:
                digest.update(data)
                if data.strip():
                    values = json.loads(data)
                    if values["custom_id"] not in (without or ()):
                        yield Line(values["custom_id"], values["url"], values["body"])
        if digest.hexdigest() != self.digest:
            raise SpecError(
                f"batch file {self.path} has changed while it was read; run again when it is whole"
            )


def open_batch(path: Path) -> BatchFile:
    """Checks every line of a batch file. :raises SpecError: with the first faults and their lines."""
    faults, digest = _Faults(), hashlib.sha256()
    ids: dict[str, int] = {}
    urls: set[str] = set()
    if path.exists() and not path.is_file():
        raise SpecError(f"batch file {path} is not a regular file, which can be read twice; store it in one")
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MOST_BYTES + 1):
                number += 1
                digest.update(data)
                if len(data) > MOST_BYTES:
                    faults.add(number, f"it has more than {MOST_BYTES:,} bytes")
                    break
                if data.strip() and (values := _checked(data, number, ids, faults)):
                    ids[values["custom_id"]] = number
                    urls.add(values["url"])
    except OSError as error:
        raise SpecError(f"batch file {path} cannot be read: {error.strerror}") from error
    if faults.found:
        more = [f"and {faults.count - MOST_FAULTS} more"] if faults.count > MOST_FAULTS else []
        raise SpecError([f"batch file {path}, {fault}" for fault in faults.found] + more)
    if not ids:
        raise SpecError(f"batch file {path} has no requests; write one JSON object in each line")
    return BatchFile(path, digest.hexdigest(), list(ids), urls)


@dataclass
class _Faults:
    """The first faults, and their number."""

    found: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, number: int, fault: str) -> None:
        """Notes a fault of a line."""
        self.count += 1
        if self.count <= MOST_FAULTS:
            self.found.append(f"line {number}: {fault}")


def _checked(data: bytes, number: int, ids: dict[str, int], faults: _Faults) -> dict[str, Any] | None:
    """The values of a line; None if it has a fault."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        faults.add(number, f"it is not JSON: {error}")
        return None
    if not isinstance(values, dict):
        faults.add(number, "it is not an object with custom_id, method, url and body")
        return None
    before, name, url = faults.count, values.get("custom_id"), values.get("url")
    if not isinstance(name, str) or not name:
        faults.add(number, f"custom_id is {name!r}; give each line a text of its own")
    elif not _is_text(name):
        faults.add(
            number, f"custom_id {name!r} has half of a surrogate pair; give each line a text of its own"
        )
    elif name in ids:
        faults.add(
            number, f"custom_id {name!r} is that of line {ids[name]} too; give each line one of its own"
        )
    if values.get("method") != "POST":
        faults.add(number, f"method is {values.get('method')!r}; it has to be POST")
    if url not in TASKS:
        faults.add(number, f"url is {url!r}; it has to be one of {', '.join(TASKS)}")
    body = values.get("body")
    if not isinstance(body, dict):
        faults.add(number, "body is not an object")
    elif body.get("stream"):
        faults.add(number, "body asks for a stream, which a file cannot hold; leave stream out")
    return values if faults.count == before else None


def _is_text(name: str) -> bool:
    """Whether it can be written: JSON may hold a half of a surrogate pair alone."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class Answers:
    """The answers of a batch file that have come so far.

    :param target: the file that holds all of them in the end.
    :param batch: the requests.
    :param answered_by: what answers them; a rerun has to name the same.
    """

    def __init__(self, target: Path, batch: BatchFile, answered_by: dict[str, Any]) -> None:
        self.target, self._batch = target, batch
        self._folder = target.with_name(target.name + ".partial")
        self._identity = {"sha256": batch.digest, **answered_by}
        self._places: dict[str, tuple[int, int]] = {}
        self._file: BinaryIO

    @property
    def done(self) -> set[str]:
        """Ids of the requests that have an answer."""
        return set(self._places)

    @contextmanager
    def open(self, overwrite: bool = False) -> Iterator[Answers]:
        """Takes the target for this process, and reads what an earlier run has answered.

        :param overwrite: whether to replace the target, and what an earlier run has answered of other requests.
        :raises SpecError: if the target exists, or answers of other requests or of another model are kept for it.
        :raises OutputHeldError: if another process writes them.
        """
        if self.target.exists() and not overwrite:
            raise SpecError(f"output {self.target} exists; choose another file, or use --overwrite")
        if self.target.is_dir():
            raise SpecError(f"output {self.target} is a folder; choose a file in it")
        if self.target.exists() and self.target.samefile(self._batch.path):
            raise SpecError(f"output {self.target} is the batch file itself; choose another file")
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputHeldError(
                    f"another process writes to {self.target}; run again after it has ended"
                ) from error
            self._begin(overwrite)
            with (self._folder / "answers.jsonl").open("a+b") as self._file:
                yield self

    def _begin(self, overwrite: bool) -> None:
        record, answers = self._folder / "job.json", self._folder / "answers.jsonl"
        earlier = json.loads(record.read_text(encoding="utf8")) if record.exists() else {}
        differ = [
            name for name in {**earlier, **self._identity} if earlier.get(name) != self._identity.get(name)
        ]
        if differ:
            if not overwrite and record.exists() and answers.exists() and answers.stat().st_size:
                raise SpecError(
                    f"{self._folder} holds answers of another run ({', '.join(differ)} differ); choose another output, "
                    "or use --overwrite"
                )
            answers.unlink(missing_ok=True)
            new = self._folder / "job.json.new"
            new.write_text(json.dumps(self._identity), encoding="utf8")
            new.replace(record)  # a crash leaves a whole record or none
        answers.touch()
        with answers.open("r+b") as file:
            begin = 0
            for data in file:
                if (name := _id_of(data)) is None:
                    break
                self._places[name] = begin, len(data)
                begin += len(data)
            file.truncate(begin)

    def add(self, custom_id: str, status: int, body: Any) -> None:
        """Stores the answer of a request. :param body: what was answered, an error of the API included."""
        number = hashlib.sha256(custom_id.encode()).hexdigest()[:24]
        values = {
            "id": f"batch_req_{number}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"req_{number}", "body": body},
            "error": None,
        }
        # Half of a surrogate pair, which a body may hold, becomes its escape in JSON.
        data = json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        begin = self._file.seek(0, os.SEEK_END)
        self._file.write(data)
        self._file.flush()
        self._places[custom_id] = begin, len(data)

    def finish(self) -> dict[str, int]:
        """Writes the target, and removes what it was made of.

        :returns: the number of `answered` requests, and of those that `failed`.
        :raises RuntimeError: if a request has no answer.
        """
        if lost := [name for name in self._batch.ids if name not in self._places]:
            raise RuntimeError(f"{len(lost)} requests have no answer, such as {lost[0]!r}")
        whole, failed = self._folder / "whole.jsonl", 0
        with whole.open("wb") as file:
            for name in self._batch.ids:
                begin, size = self._places[name]
                self._file.seek(begin)
                data = self._file.read(size)
                failed += json.loads(data)["response"]["status_code"] != 200
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.target)
        sync_folder(str(self.target.parent.resolve()))
        shutil.rmtree(self._folder)
        return {"answered": len(self._batch.ids) - failed, "failed": failed}


def _id_of(data: bytes) -> str | None:
    """The id of a stored answer; None if a crash of the process or of the machine has left something else."""
    if not data.endswith(b"\n"):
        return None
    try:
        return str(json.loads(data)["custom_id"])
    except (ValueError, LookupError, TypeError):
        return None
