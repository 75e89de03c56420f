"""Which files a row may name, and how much may come of one: what is refused says which line of the spec allows it."""

from __future__ import annotations

import base64
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from hfbatch.data.download import FileRefusedError, Permit
from hfbatch.data.media_files import RowFiles
from hfbatch.data.reader import ReadPlan
from hfbatch.data.source import open_source
from hfbatch.predict.named_files import named_files, names_in
from hfbatch.spec.job import FilesSpec, InputSpec
from hfbatch.spec.location import Location
from hfbatch.tasks import task_class
from hfbatch.tasks.base import TaskConfig

RATE = 16_000


def rules(**given: Any) -> FilesSpec:
    return FilesSpec.model_validate(given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An input's folder with a file, and files that are not its own beside it."""
    (tmp_path / "in").mkdir()
    for name in ("in/a", "outside", "in/a::b"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "inner").symlink_to("a")
    (tmp_path / "linked").symlink_to("in")
    os.mkfifo(tmp_path / "in" / "pipe")
    return tmp_path


def test_files_below_the_input_are_read_whatever_they_are_called(folder: Path) -> None:
    inline = "data:text/plain;base64," + base64.b64encode(b"in/a").decode()
    for root in (folder / "in", folder / "linked"):
        files = RowFiles(str(root))
        names = ["a", "./a", "../in/a", "inner", str(folder / "in/a"), f"file://{folder}/in/a", inline]
        for name in names:
            assert files.read(name) == files.read({"bytes": None, "path": name}) == b"in/a"
        assert files.read("a::b") == b"in/a::b"
        assert files.read({"bytes": b"x", "path": "/etc/passwd"}) == b"x"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("../outside", "input.files.roots: [{}]"),
        ("link", "input.files.roots: [{}]"),
        ("{}/outside", "input.files.roots: [{}]"),
        ("file://{}/outside", "input.files.roots: [{}]"),
        ("FILE://{}/outside", "input.files.roots: [{}]"),
        ("/etc/passwd", "input.files.roots: [/etc]"),
        ("/dev/zero", "input.files.roots: [/dev]"),
        ("/proc/self/environ", "input.files.roots: [/proc"),
        ("../nothing/there", "input.files.roots: [{}/nothing]"),
        ("https://images.example.com/a.png", "input.files.hosts: [images.example.com]"),
        ("HTTP://127.0.0.1:1/a.png", "input.files.hosts: [127.0.0.1]"),
        ("s3://other/a.png", "input.files.roots: [s3://other] or input.files.schemes: [s3]"),
        ("memory://a/b", "input.files.schemes: [memory]"),
        ("simplecache::file:///etc/passwd", "a chain of filesystems"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
    ],
)
def test_what_is_elsewhere_is_refused_with_the_line_to_add(folder: Path, name: str, line: str) -> None:
    files = RowFiles(str(folder / "in"))
    with pytest.raises(FileRefusedError) as caught:
        files.read(name.format(folder))
    assert line.format(folder) in str(caught.value)


def test_a_root_of_the_spec_is_read_too(folder: Path) -> None:
    files = RowFiles(str(folder / "in"), rules(roots=str(folder)))
    assert files.read("../outside") == files.read("link") == b"outside"
    assert "train.files.roots" in str(RowFiles(str(folder / "in"), section="train").refusal("link"))
    with pytest.raises(ValidationError, match="use roots"):
        rules(schemes=["file"])
    with pytest.raises(FileRefusedError, match=r"input\.files\.max_bytes, 3"):
        RowFiles(str(folder / "in"), rules(max_bytes=3)).read("a")


def test_files_in_a_bucket_lie_below_its_prefix() -> None:
    files = RowFiles("s3://key:secret@lake/in")
    allowed = ["a.png", "s3://lake/in/b/c#1?.png", "s3://lake/in/a::b"]
    refused = [
        "../a.png",
        "s3://lake/in/../out/a",
        "s3://lake/inner/a",
        "s3://lake/out",
        "gs://lake/in/a",
        "/etc/passwd",
    ]
    assert [files.refusal(name) for name in allowed] == [None] * len(allowed)
    assert all("secret" not in (files.refusal(name) or "secret") for name in refused)
    more = RowFiles("s3://lake/in", rules(roots=["gs://pond/x"], schemes=["abfs"]))
    assert [more.refusal(name) for name in ("gs://pond/x/y", "abfs://c@account/y")] == [None, None]
    assert more.refusal("abfs::file://x")
    assert more.refusal("gs://pond/xy")


@pytest.mark.parametrize("root", ["s3://lake/a?b=c", "s3://key:secret@lake/run#2", "gs://lake/token=1/50% a"])
def test_a_prefix_means_itself_in_rows_as_well(root: str) -> None:
    files = RowFiles(Location(root))
    bare = root.replace("key:secret@", "")
    for name in ("x?.png", f"{bare}/x?.png"):
        assert files.place_of(name) == f"{bare}/x?.png"
    for other in ("s3://lake/a/x.png", "s3://lake/run/x.png", "gs://lake/token=1/50/x.png", f"{bare}2/x.png"):
        assert "is not below" in (files.refusal(other) or "")
    with_options = RowFiles(Location(f"{root}?region=eu-west-1") if root.startswith("s3") else Location(root))
    assert with_options.place_of("x.png") == f"{bare}/x.png"


def test_a_row_leads_a_store_to_no_other_server() -> None:
    files = RowFiles("/data", rules(schemes=["s3", "gs"]))
    assert files.refusal("s3://lake/a?b=c.png") is None
    for options in ("endpoint_override=169.254.169.254&scheme=http", "endpoint_override=127.0.0.1:1"):
        assert "options" in (files.refusal(f"s3://lake/a.png?{options}") or "")


def test_a_url_is_judged_as_it_is_asked_for() -> None:
    files = RowFiles("https://host/in d")
    assert files.refusal("a b.png") is None
    assert files.refusal("https://HOST/in%20d/a.png") is None
    for name in ("https://host/in%20d/%2e%2e/out/a.png", "https://host/in%20d/x/..%2f../../out"):
        assert "input.files.hosts" in (files.refusal(name) or ""), name


class Site(BaseHTTPRequestHandler):
    """Answers by the path, and keeps count."""

    seen: list[str]
    body = b"a picture"

    def log_message(self, *given: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        kind, _, target = unquote(self.path[1:]).partition("=")
        with suppress(OSError):  # of a client that has seen enough
            if kind == "to":
                self.send_response(302)
                self.send_header("Location", target)
                self.end_headers()
                return
            self.send_response(404 if kind == "absent" else 200)
            if kind in {"whole", "claims"}:
                self.send_header("Content-Length", str(len(self.body) if kind == "whole" else 1 << 40))
            self.end_headers()
            if kind == "slow":
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            while kind == "endless":
                self.wfile.write(bytes(1 << 16))
            self.wfile.write(self.body)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    Site.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def site(server: ThreadingHTTPServer) -> str:
    Site.seen.clear()
    return f"http://127.0.0.1:{server.server_port}"


def web(tmp_path: Path, **given: Any) -> RowFiles:
    return RowFiles(str(tmp_path), rules(**given))


@pytest.mark.parametrize("hosts", ["127.0.0.1", "127.0.0.0/8", "127.0.0.1:{}"])
def test_a_named_host_is_asked_once_for_a_file(site: str, tmp_path: Path, hosts: str) -> None:
    files = web(tmp_path, hosts=hosts.format(site.rpartition(":")[2]))
    assert [files.read(f"{site}/whole") for _ in range(3)] == [Site.body] * 3
    assert Site.seen == ["GET /whole"]
    with pytest.raises(OSError, match="404"):
        files.read(f"{site}/absent")
    with pytest.raises(OSError, match="404"):
        files.read(f"{site}/absent")
    assert Site.seen == ["GET /whole", "GET /absent"]


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("http://169.254.169.254/latest/meta-data", "hosts: [169.254.169.254]"),
        ("http://localhost/a", "hosts: [localhost]"),
        ("http://[::1]/a", "hosts: [::1]"),
        ("file:///etc/passwd", "scheme file"),
    ],
)
def test_a_redirect_leads_no_further_than_a_row_may(
    site: str, tmp_path: Path, target: str, line: str
) -> None:
    with pytest.raises(FileRefusedError) as caught:
        web(tmp_path, hosts="127.0.0.1").read(f"{site}/to={target}")
    assert line in str(caught.value)
    assert len(Site.seen) == 1


def test_redirects_come_to_an_end(site: str, tmp_path: Path) -> None:
    files = web(tmp_path, hosts="127.0.0.1")
    assert files.read(f"{site}/to=/whole") == Site.body
    again = f"{site}/to=" * 7
    with pytest.raises(OSError, match="redirects"):
        files.read(f"{again}{site}/whole")


def test_time_and_bytes_have_limits(site: str, tmp_path: Path) -> None:
    slow, small = (
        web(tmp_path, hosts="127.0.0.1", timeout=0.3),
        web(tmp_path, hosts="127.0.0.1", max_bytes=100_000),
    )
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"input\.files\.timeout, 0\.3 s"):
        slow.read(f"{site}/slow")
    for kind in ("endless", "claims"):
        with pytest.raises(FileRefusedError, match=r"input\.files\.max_bytes, 100,000"):
            small.read(f"{site}/{kind}")
    with pytest.raises(OSError, match="cannot be downloaded"):
        web(tmp_path, hosts="127.0.0.1", max_bytes=1 << 41).read(
            f"{site}/claims"
        )  # fewer bytes than were claimed
    assert time.monotonic() - begun < 30


PRIVATE = [
    "127.0.0.1", "10.1.2.3", "192.168.0.9", "172.16.5.5", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "168.63.129.16", "::1", "::", "fe80::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::a00:1", "2002:7f00:1::", "::127.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_does_not_lead_to_a_private_address(
    site: str, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(site.rpartition(":")[2])

    def look_up(host: str, *given: Any, **options: Any) -> list[Any]:
        assert host == "images.example.com"
        six = ":" in address
        where = (address, port, 0, 0) if six else (address, port)
        return [(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM, 6, "", where)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for opened in ({"hosts": ["*.example.com"]}, {"hosts": ["*"]}, {"schemes": ["http"]}):
        with pytest.raises(
            FileRefusedError, match=r"not public; .*input\.files\.hosts: \[images\.example\.com, "
        ):
            web(tmp_path, **opened).read(f"http://images.example.com:{port}/whole?{address}")
    assert Site.seen == []


def test_a_name_with_its_address_is_read_where_the_address_was_checked(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, asked = int(site.rpartition(":")[2]), []

    def look_up(host: str, *given: Any, **options: Any) -> list[Any]:
        asked.append(host)  # a second answer would be another one
        where = ("127.0.0.1" if len(asked) == 1 else "169.254.169.254", port)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", where)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    files = web(tmp_path, hosts=["images.example.com", "127.0.0.1"])
    assert files.read(f"http://images.example.com:{port}/whole?named") == Site.body
    assert asked == ["images.example.com"]


@pytest.mark.parametrize(
    "host", ["2130706433", "127.1", "0x7f.1", "017700000001", "[::ffff:127.0.0.1]", "localhost"]
)
def test_other_ways_to_write_this_machine_are_refused(site: str, tmp_path: Path, host: str) -> None:
    for opened in ({"schemes": ["http"]}, {"hosts": ["*"]}):
        with pytest.raises(FileRefusedError):
            web(tmp_path, **opened).read(f"{site.replace('127.0.0.1', host)}/whole?{host}")
    assert Site.seen == []


def test_public_addresses_pass() -> None:
    permit = Permit((), ("https",), 1, 1, "input.files")
    for address in ("93.184.216.34", "2606:2800:220:1::1"):
        permit.check_address("images.example.com", address, 443)


def test_names_are_found_wherever_a_row_has_them() -> None:
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "url": "u", "path": None}, {"type": "text", "text": "t"}],
        },
        {"role": "assistant", "content": "no file"},
    ]
    row = [
        chat,
        "a",
        {"bytes": b"x", "path": "no"},
        {"bytes": None, "path": "b"},
        {"array": [0.0], "path": "no"},
        ["c"],
    ]
    assert list(names_in(row)) == ["u", "a", "b", "c"]


@pytest.mark.parametrize(
    ("bad", "most_rejected", "faults", "notes"),
    [(0, 0, 0, 0), (3, 0.01, 0, 1), (9, 0.01, 1, 0), (9, 1, 0, 1)],
)
def test_the_plan_says_what_the_first_rows_may_not_name(
    folder: Path, bad: int, most_rejected: float, faults: int, notes: int
) -> None:
    names = ["../outside"] * bad + ["a"] * (10 - bad)
    pq.write_table(pa.table({"picture": names, "text": names}), folder / "in" / "a.parquet")
    source = open_source(InputSpec(path=str(folder / "in" / "a.parquet")))
    kind = task_class("image-classification")
    task = kind(TaskConfig(None, kind.Params(), files=RowFiles(source.root_url)))
    read = ReadPlan(source.root_url, source.format, ("picture", "text"), source.schema)
    found = named_files(task, {"image": "picture"}, source.cut(100), read, most_rejected)
    assert [len(one) for one in found] == [faults, notes]
    for reported in (*found[0], *found[1]):
        assert f"{bad} of the first 10 rows" in reported
        assert f"input.files.roots: [{folder}]" in reported
