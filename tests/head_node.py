"""`ray start`, whose cluster forks its workers and has the parts of a dashboard that run jobs, and no others: each is a
process of its own, which imports Ray for seconds."""

from __future__ import annotations

from typing import Any

from ray._private import ray_constants, services
from ray._private.node import Node
from ray.scripts.scripts import main

from tests.forked_workers import use_forked_workers

JOBS_ALONE = "--modules-to-load=JobHead,NodeHead"
"""The server of jobs, and the part that tells it which node is the head."""


def without_other_parts() -> None:
    """Has the dashboard load what runs jobs alone, and leaves out the autoscaler and the server of logs."""
    start = services.start_ray_process

    def started(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        more = [JOBS_ALONE] if process_type == ray_constants.PROCESS_TYPE_DASHBOARD else []
        return start([*command, *more], process_type, *args, **options)

    services.start_ray_process = started
    for name in ("start_monitor", "start_log_monitor"):
        setattr(Node, name, lambda *_, **__: None)


if __name__ == "__main__":
    use_forked_workers()
    without_other_parts()
    main()
