"""Runs programs as forks of one process that has imported what they need, which takes longer than most of them run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

from tests.forked_workers import use_forked_workers

PRELOADED = [
    "tests.train.tools", "hfbatch.cli.app", "hfbatch.cluster.pipeline", "hfbatch.runtime.runner",
    "hfbatch.train.loop.trainer", "hfbatch.engines.torch", "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert", "sklearn.metrics", "torch.utils.tensorboard",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.utils.serialization", "torch.profiler._cupti_monitor", "scipy.io", "hfbatch.train.loop.loop",
    "hfbatch.train.recipes.text_classification", "hfbatch.train.recipes.text_generation",
    "hfbatch.train.recipes.summarization", "hfbatch.train.recipes.image_classification", "tests.warm",
]  # fmt: skip
"""What the processes of training tests need too: there is one forking process for all."""


AUTHENTICATION = "RAY_AUTH_MODE", "token"
"""Ray sets this variable when it starts a cluster, and reads it when it is imported."""


def forkserver() -> ForkServerContext:
    """The way to start processes that have imported PRELOADED, from one process that imports it once."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*AUTHENTICATION)
        ensure_running()
    return multiprocessing.get_context("forkserver")


class Program:
    """A running program, with the methods of `subprocess.Popen` that tests use. Its output goes to files.

    :param main: a function of a module.
    :param arguments: of the program, as strings.
    """

    def __init__(self, main: Callable[[], None], *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        values = main, arguments, dict(os.environ), self._folder.name
        self._process = forkserver().Process(target=_run, args=values)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while the program runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. :raises subprocess.TimeoutExpired: if it does not come."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.output)
        return code

    def kill(self) -> None:
        """Kills the process."""
        self._process.kill()

    def interrupt(self) -> None:
        """Sends SIGINT, as Ctrl-C does."""
        os.kill(self.pid, signal.SIGINT)

    @property
    def printed(self) -> str:
        """What the program has written to stdout so far."""
        return self._read("stdout")

    @property
    def output(self) -> str:
        """What the program has written to stdout, and then to stderr, so far."""
        return self.printed + self._read("stderr")

    def _read(self, stream: str) -> str:
        path = Path(self._folder.name, stream)
        return path.read_text(encoding="utf8") if path.exists() else ""


def _run(main: Callable[[], None], arguments: tuple[str, ...], env: dict[str, str], folder: str) -> None:
    for number, stream in ((1, "stdout"), (2, "stderr")):
        with open(Path(folder, stream), "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(dict([AUTHENTICATION]) | env)
    sys.argv = ["hfbatch", *arguments]
    main()


def hfbatch() -> None:
    """The command; its own cluster forks its workers."""
    from hfbatch.cli.app import app

    use_forked_workers()
    app()


def run_and_lose_a_node(run: Callable[[], None], far_enough: Callable[[], bool]) -> None:
    """Runs on a cluster of two nodes with a CPU each, which loses the second when the work has come far enough. A node
    that is gone is missed after three seconds, one that is slow to answer after thirty."""
    import ray
    from ray.cluster_utils import Cluster

    from hfbatch.cluster.session import without_helpers

    use_forked_workers()
    missed = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "_system_config": missed, "include_dashboard": False}
    with without_helpers():
        cluster = Cluster(initialize_head=True, head_node_args=head)
        node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)

    def lose_it() -> None:
        while not far_enough():
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        print("node lost")

    threading.Thread(target=lose_it, daemon=True).start()
    try:
        run()
    finally:
        ray.shutdown()
        cluster.shutdown()
