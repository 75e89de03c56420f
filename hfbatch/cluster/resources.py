"""Resources: how many workers fit, and the share of each stage, so that the stages cannot block each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfbatch.errors import SpecError
from hfbatch.runtime.machine import Node
from hfbatch.spec.job import WorkersSpec

CORES_PER_CPU_WORKER = 8
"""Beyond about eight cores, a model on the CPU gains more from a second worker than from more threads."""


@dataclass(frozen=True)
class Layout:
    """The resources of the workers and stages."""

    workers: int
    gpus: float
    """GPUs of one worker."""
    cpus: float
    """CPUs of one worker."""
    read_cpus: float
    write_cpus: float
    """CPUs of one task of the read and write stages; the two differ, since Ray fuses stages with equal CPUs."""
    read_tasks: int
    write_tasks: int

    def at_most(self, workers: int) -> Layout:
        """Returns the layout with at most this many workers, for fewer splits than workers."""
        return replace(self, workers=min(self.workers, workers))


def lay_out(
    spec: WorkersSpec, nodes: list[Node], ceiling: Node | None = None, threads: int | str = "auto"
) -> Layout:
    """Computes how many workers and stage tasks fit onto the cluster.

    Ray starts every worker before the first read, so workers plus one task of the largest stage must fit.

    :param ceiling: total resources after autoscaling; None for a fixed cluster.
    :param threads: of one worker's model; auto: as many as its CPUs.
    :raises SpecError: if they do not fit, with the fix.
    """
    all_gpus = max(sum(node.gpus for node in nodes), ceiling.gpus if ceiling else 0.0)
    all_cpus = max(sum(node.cpus for node in nodes), ceiling.cpus if ceiling else 0.0)
    gpus = (1.0 if all_gpus else 0.0) if spec.gpus == "auto" else spec.gpus
    if gpus > all_gpus:
        raise SpecError(
            f"workers.gpus is {gpus:g} and the cluster has {all_gpus:g} GPUs; set workers.gpus=0 to run on CPUs"
        )
    if gpus:
        cpus = 1.0 if spec.cpus == "auto" else spec.cpus
        fitting = sum(int(node.gpus / gpus) for node in nodes) if not ceiling else int(all_gpus / gpus)
    else:
        cpus, fitting = _cpu_workers(spec, nodes, all_cpus)
    if not gpus and isinstance(threads, int) and threads > max(round(cpus), 1):
        raise SpecError(
            f"engine.threads is {threads}, and a worker has {cpus:g} CPUs on this cluster; set "
            f"engine.threads={max(round(cpus), 1)} or fewer, or workers.cpus={threads}"
        )
    count = fitting if spec.count == "auto" else spec.count
    spare = all_cpus - count * cpus
    read_cpus, write_cpus = (1.0, 0.5) if spare >= 4 else (0.25, 0.2)
    if count < 1 or count > fitting or spare < read_cpus - 1e-9:
        raise SpecError(_misfit(count, gpus, cpus, nodes, all_cpus, all_gpus, read_cpus))
    read_tasks = max(min(int(spare * 0.7 / read_cpus), 4 * count), 1)
    write_tasks = max(min(int(spare * 0.3 / write_cpus), 2 * count), 1)
    return Layout(count, gpus, cpus, read_cpus, write_cpus, read_tasks, write_tasks)


def _cpu_workers(spec: WorkersSpec, nodes: list[Node], all_cpus: float) -> tuple[float, int]:
    """Returns the CPUs of one worker, and how many workers fit, without GPUs."""
    usable = [max(node.cpus - _kept_back(node.cpus), 0.0) for node in nodes]
    if spec.cpus != "auto":
        return spec.cpus, sum(int(node.cpus / spec.cpus + 1e-9) for node in nodes)
    if spec.count != "auto":
        largest = max(usable, default=0.0)
        share = sum(usable) / spec.count
        cpus = min(share, largest) if share >= largest else largest / -(-largest // share)
        cpus = max(int(cpus * 100) / 100, 0.01)
        return cpus, sum(int(room / cpus + 1e-9) for room in usable)
    cpus = min((room for room in usable if room > 0), default=all_cpus)
    if cpus > CORES_PER_CPU_WORKER:
        cpus = cpus / -(-cpus // CORES_PER_CPU_WORKER)
    cpus = max(int(cpus * 100) / 100, 0.01)
    return cpus, sum(int(room / cpus + 1e-9) for room in usable)


def _kept_back(cpus: float) -> float:
    """Returns the CPUs of a node reserved for reading and writing: an eighth, and at least 0.5."""
    return max(cpus / 8, 0.5)


def _misfit(
    count: int,
    gpus: float,
    cpus: float,
    nodes: list[Node],
    all_cpus: float,
    all_gpus: float,
    read_cpus: float,
) -> str:
    wanted = f"{count} workers of {cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    return (
        f"workers: {wanted}, with {read_cpus:g} CPUs for reading, do not fit into the cluster "
        f"({len(nodes)} nodes, {all_cpus:g} CPUs, {all_gpus:g} GPUs); "
        f"set a smaller workers.count or workers.cpus, or add nodes"
    )
