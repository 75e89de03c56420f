"""`hfbatch doctor`: checks what this machine and this installation provide for a job. Changes nothing.

Reads the operating system, the metadata of installed packages and the layers below; opens no network
connection except to a running Ray cluster.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.filesize import decimal

from hfbatch.console.display import add, show
from hfbatch.console.display import table as headed
from hfbatch.engines import ENGINES
from hfbatch.runtime.machine import cgroup_limits, host_memory, usable_cores

if TYPE_CHECKING:
    from rich.console import Console

GB = 10**9
MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("✗", "red")}


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    status: Literal["ok", "warn", "missing"]
    """ok; warn: jobs run, but slower or not all of them; missing: no job runs."""
    detail: str
    """What was found."""
    fix: str = ""
    """What to do about it."""


def run_checks(folder: Path | None = None) -> list[Check]:
    """Runs every check, in the order in which a user would fix problems.

    :param folder: where output would be written, whose disk is checked. Default: the working directory.
    """
    return [
        *check_packages(),
        check_device(),
        *check_engines(),
        check_cores(),
        check_memory(),
        check_shared_memory(),
        check_disk("disk here", folder or Path.cwd()),
        check_disk("disk of Ray's session", Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))),
        check_cluster(),
        check_hub(),
    ]


def render(checks: Iterable[Check], console: Console) -> None:
    """Prints a table with one line for each check; the fix is below a failed one."""
    table = headed(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in checks:
        add(table, MARKS[check.status], (check.name, "bold"), check.detail)
        if check.fix:
            add(table, "", "", (f"→ {check.fix}", "cyan"))
    show(console, table)


def to_values(checks: Iterable[Check]) -> list[dict[str, str]]:
    """The checks as values for JSON."""
    return [asdict(check) for check in checks]


def check_packages(distribution: str = "hfbatch") -> list[Check]:
    """Checks Python and each package that a distribution requires against the required versions."""
    try:
        described = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return [
            Check(distribution, "missing", "not installed", "pip install -e . (in the root of the clone)")
        ]
    wanted = SpecifierSet(described["Requires-Python"] or "")
    fits = wanted.contains(platform.python_version(), prereleases=True)
    python = Check(
        "python",
        "ok" if fits else "missing",
        platform.python_version(),
        "" if fits else f"install Python {wanted}",
    )
    needs = [Requirement(text) for text in metadata.requires(distribution) or []]
    core = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    extras = described.get_all("Provides-Extra") or []
    return [python, *map(_package, core), *(_extra(distribution, extra, needs) for extra in extras)]


def _package(need: Requirement) -> Check:
    version = _version(need.name)
    fix = f"pip install '{need.name}{need.specifier}'"
    if version is None:
        return Check(need.name, "missing", f"not installed (needs {need.specifier})", fix)
    if not need.specifier.contains(version, prereleases=True):
        return Check(need.name, "missing", f"{version} (needs {need.specifier})", fix)
    return Check(need.name, "ok", version)


def _extra(distribution: str, extra: str, needs: list[Requirement]) -> Check:
    inside = [need for need in needs if need.marker and need.marker.evaluate({"extra": extra})]
    absent = [need for need in inside if _package(need).status != "ok"]
    if not absent:
        return Check(f"extra {extra}", "ok", "installed")
    wanted = " ".join(f"'{need.name}{need.specifier}'" for need in absent)
    return Check(
        f"extra {extra}",
        "warn",
        f"lacks {', '.join(need.name for need in absent)}",
        f"pip install '{distribution}[{extra}]', or: pip install {wanted}",
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_device() -> Check:
    """Checks the device on which models run, and its best dtype."""
    if _version("torch") is None:
        return Check("device", "missing", "unknown without torch", "pip install torch")
    from hfbatch.engines.precision import native_dtype

    device, dtype = native_dtype()
    detail = f"{device}, native {dtype}"
    if device == "cpu" and dtype == "float32":
        return Check(
            "device",
            "warn",
            detail,
            "use small models; a CPU with bfloat16 (AVX512-BF16, AMX) or a GPU is much faster",
        )
    return Check("device", "ok", detail)


def check_engines() -> Iterator[Check]:
    """Yields what each engine can compute in here, and how to install what is missing."""
    for name, kind in ENGINES.items():
        able = [*kind.dtypes, *(one for one in kind.quantizations if not kind.missing(one))]
        if lacking := kind.missing():
            yield Check(
                f"engine {name}", "warn", f"lacks {', '.join(lacking)}", f"pip install 'hfbatch[{name}]'"
            )
        elif kind.apart:
            yield Check(f"engine {name}", "ok", f"{', '.join(able)}; runs in {kind.apart}", "")
        else:
            rest = [one for one in kind.quantizations if kind.missing(one)]
            fix = "pip install 'hfbatch[quantization]'" if rest else ""
            more = f"; not installed: {', '.join(rest)}" if rest else ""
            yield Check(f"engine {name}", "warn" if rest else "ok", ", ".join(able) + more, fix)


def check_cores() -> Check:
    """Checks the cores available to this process, by affinity and by the quota of the container."""
    usable = usable_cores()
    detail = f"{usable} usable of {os.cpu_count()}"
    if usable < 2:
        return Check("cores", "warn", detail, "the stages of a job cannot overlap; use 2 cores or more")
    return Check("cores", "ok", detail)


def check_memory() -> Check:
    """Checks the memory that is free for a job, within the limit of the container."""
    total, free = host_memory()
    _, limit = cgroup_limits()
    detail = f"{decimal(free)} free of {decimal(total)}" + (
        f", limited to {decimal(limit)}" if limit and limit < total else ""
    )
    if free < 3 * GB:
        return Check(
            "memory", "warn", detail, "Ray and one small model take about 3 GB; close other programs"
        )
    return Check("memory", "ok", detail)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:  # noqa: S108
    """Checks the shared memory for Ray's object store, through which splits are passed."""
    if not folder.is_dir():
        return Check("shared memory", "warn", f"no {folder}", "Ray uses the disk instead, which is slow")
    total = shutil.disk_usage(folder).total
    if total < GB:
        fix = "in a container: docker run --shm-size=4g; else Ray uses the disk, which is slow"
        return Check("shared memory", "warn", f"{decimal(total)} in {folder}", fix)
    return Check("shared memory", "ok", f"{decimal(total)} in {folder}")


def check_disk(name: str, folder: Path) -> Check:
    """Checks free space; Ray stops writing to a disk that is 95 % full. The folder need not exist yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    usage = shutil.disk_usage(there)
    used = 1 - usage.free / usage.total
    detail = f"{decimal(usage.free)} free in {folder} ({used:.0%} used)"
    if usage.free < 5 * GB or used > 0.95:
        return Check(
            name, "warn", detail, "free some space, or choose another folder (RAY_TMPDIR moves Ray's session)"
        )
    return Check(name, "ok", detail)


def check_cluster() -> Check:
    """Checks the Ray cluster that a job would connect to."""
    if _version("ray") is None:
        return Check("cluster", "missing", "unknown without ray", "pip install 'ray[data]'")
    from hfbatch.cluster.session import describe

    facts = describe()
    if facts is None:
        return Check("cluster", "ok", "none is running; each job starts a local one")
    return Check("cluster", "ok", ", ".join(f"{name} {_plain(value)}" for name, value in facts.items()))


def check_hub() -> Check:
    """Checks how models are downloaded by name. Reports whether there is a token, never its value."""
    if _version("huggingface_hub") is None:
        return Check("model hub", "missing", "unknown without huggingface_hub", "pip install huggingface_hub")
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "without a token (public models only)"
    detail = f"{token}, cache {constants.HF_HOME}"
    if constants.HF_HUB_OFFLINE:
        fix = "only cached models and local folders work; unset HF_HUB_OFFLINE to fetch others"
        return Check("model hub", "warn", f"offline (HF_HUB_OFFLINE is set), {detail}", fix)
    return Check("model hub", "ok", detail)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
