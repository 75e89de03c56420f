"""The doctor reports what is installed and how to install what is missing, and never shows a secret."""

import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from hfbatch.cli import doctor
from hfbatch.cli.doctor import (
    Check,
    check_disk,
    check_packages,
    check_shared_memory,
    run_checks,
)
from hfbatch.runtime.machine import cgroup_limits


def text_of(checks):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    doctor.render(checks, console)
    return console.export_text()


def install(folder: Path, *headers: str) -> None:
    """Makes the metadata of an installed distribution named `thing`."""
    info = folder / "thing-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", "Name: thing", "Version: 1.0", *headers])
    )


def group(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def missing(checks):
    """The checks without which no job runs."""
    return [check for check in checks if check.status == "missing"]


def test_this_installation_can_run_a_job():
    checks = run_checks()
    assert missing(checks) == []
    assert {"python", "ray", "torch", "device", "cores", "memory", "cluster", "model hub"} <= {
        c.name for c in checks
    }


def test_json_holds_every_check():
    checks = [Check("cores", "ok", "2 usable of 2"), Check("disk", "warn", "1 GiB free", "free some space")]
    assert [Check(**values) for values in doctor.to_values(checks)] == checks


def test_the_fix_stands_below_the_fault_and_markup_is_shown_as_it_is():
    text = text_of([Check("extra demo", "warn", "lacks x", "pip install 'hfbatch[demo]'")])
    assert "lacks x" in text
    assert "→ pip install 'hfbatch[demo]'" in text


def test_a_package_that_is_absent_or_too_old_is_named_with_its_pip_command(tmp_path, monkeypatch):
    install(
        tmp_path, "Requires-Dist: numpy>=9999", "Requires-Dist: no-such-package>=2", "Requires-Dist: rich"
    )
    monkeypatch.syspath_prepend(tmp_path)
    by_name = {check.name: check for check in check_packages("thing")}
    assert by_name["rich"].status == by_name["python"].status == "ok"
    assert by_name["numpy"].status == "missing"
    assert "(needs >=9999)" in by_name["numpy"].detail
    assert by_name["no-such-package"].fix == "pip install 'no-such-package>=2'"
    assert missing(by_name.values())


def test_an_extra_that_is_absent_is_a_warning_with_its_pip_command(tmp_path, monkeypatch):
    install(
        tmp_path,
        "Provides-Extra: fast",
        "Requires-Dist: rich; extra == 'fast'",
        "Requires-Dist: no-such-package>=2; extra == 'fast'",
    )
    monkeypatch.syspath_prepend(tmp_path)
    checks = check_packages("thing")
    assert missing(checks) == []
    assert checks[-1].name == "extra fast"
    assert checks[-1].status == "warn"
    assert "'thing[fast]'" in checks[-1].fix
    assert "'no-such-package>=2'" in checks[-1].fix


def test_a_python_that_is_too_old_is_missing(tmp_path, monkeypatch):
    install(tmp_path, "Requires-Python: >=9.9")
    monkeypatch.syspath_prepend(tmp_path)
    assert check_packages("thing")[0] == Check(
        "python", "missing", sys.version.split()[0], "install Python >=9.9"
    )


def test_a_distribution_that_is_not_installed_is_missing():
    assert missing(check_packages("no-such-package"))


def test_cgroup_version_2_limits_cores_and_memory(tmp_path):
    group(
        tmp_path,
        {"cgroup": "0::/box\n", "fs/box/cpu.max": "150000 100000\n", "fs/box/memory.max": "1073741824\n"},
    )
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (1.5, 2**30)


def test_cgroup_version_1_limits_cores_and_memory(tmp_path):
    files = {
        "cgroup": "4:memory:/box\n1:cpu,cpuacct:/box\n",
        "fs/cpu/box/cpu.cfs_quota_us": "200000\n",
        "fs/cpu/box/cpu.cfs_period_us": "100000\n",
        "fs/memory/box/memory.limit_in_bytes": "1073741824\n",
    }
    group(tmp_path, files)
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (2.0, 2**30)


def test_the_tightest_of_a_group_and_its_parents_counts(tmp_path):
    files = {"cgroup": "0::/a/b\n", "fs/a/cpu.max": "100000 100000\n", "fs/a/b/cpu.max": "400000 100000\n"}
    group(tmp_path, files)
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (1.0, None)


def test_no_limit_is_none_in_both_versions(tmp_path):
    files = {
        "cgroup": "4:memory:/\n1:cpu:/\n0::/\n",
        "fs/cpu.max": "max 100000\n",
        "fs/memory.max": "max\n",
        "fs/cpu/cpu.cfs_quota_us": "-1\n",
        "fs/cpu/cpu.cfs_period_us": "100000\n",
        "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    group(tmp_path, files)
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (None, None)
    assert cgroup_limits(tmp_path / "absent", tmp_path / "fs") == (None, None)


def test_disks_are_named_with_their_folder(tmp_path):
    assert str(tmp_path) in check_disk("disk here", tmp_path).detail
    assert "free in" in check_disk("disk here", tmp_path / "not" / "made").detail
    assert check_shared_memory(tmp_path / "absent").status == "warn"


def test_the_token_is_never_shown(tmp_path):
    env = {**os.environ, "HF_TOKEN": "hf_verysecret", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = "from hfbatch.cli.doctor import check_hub, to_values; import json; print(json.dumps(to_values([check_hub()])))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    (check,) = json.loads(done.stdout)
    assert check["status"] == "warn"
    assert "HF_HUB_OFFLINE" in check["detail"]
    assert "with a token" in check["detail"]
    assert str(tmp_path) in check["detail"]
    assert "hf_verysecret" not in done.stdout + done.stderr
