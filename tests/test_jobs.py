"""The specs and the cluster file that are shipped are right, and each says how it is used."""

from pathlib import Path

import pytest
import yaml

from hfbatch.data.templates import compile_template
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.job import JobSpec, ServeSpec
from hfbatch.tasks import endpoint_task, task_class
from hfbatch.train.recipes import recipe_class

ROOT = Path(__file__).parent.parent
TRAINING = ROOT / "jobs/finetune.yaml"
SERVING = ROOT / "jobs/serve.yaml"
JOBS = sorted({*(ROOT / "jobs").glob("*.yaml")} - {TRAINING, SERVING})


def comment_head(path: Path) -> str:
    """The comment lines that a file begins with, after the one for editors, without their signs."""
    lines = path.read_text(encoding="utf8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert lines[:2] == ["# yaml-language-server: $schema=../hfbatch/docs/spec.schema.json", "#"]
    return "\n".join(line.removeprefix("#").strip() for line in lines[2:end])


@pytest.fixture(scope="module")
def cluster():
    """cluster.yaml, prepared as `ray up` prepares it, without asking the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf8")))
    validate_config(config)
    return config


def test_the_jobs_are_there():
    assert [path.stem for path in JOBS] == ["embed", "endpoint", "extract", "generate", "prompt", "score"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_shipped_spec_loads_and_its_task_knows_its_params(path):
    spec = JobSpec.load(path)
    task = task_class(endpoint_task(spec.task) if spec.engine.name == "http" else spec.task)
    params = task.Params.model_validate(spec.params)
    for message in getattr(params, "messages", None) or ():
        compile_template(message.content)
    assert set(spec.input.columns) <= {column.name for column in task.inputs}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_shipped_spec_takes_the_users_own_paths(path):
    spec = JobSpec.load(path, ["input.path=mine/", "output.path=ours/"])
    assert (spec.input.path, spec.output.path) == ("mine/", "ours/")


def test_the_shipped_training_loads_and_its_task_knows_its_params():
    spec = FinetuneSpec.load(TRAINING, ["train.path=mine/", "eval=null", "output=ours/"])
    recipe = recipe_class(spec.task)
    recipe.Params.model_validate(spec.params)
    assert set(spec.train.columns) <= {column.name for column in recipe.columns}
    assert (spec.train.path, spec.eval, spec.output) == ("mine/", None, "ours/")


def test_the_shipped_endpoint_loads_and_says_how_it_is_started():
    spec = ServeSpec.load(SERVING, ["model=mine/"])
    task_class(spec.task).Params.model_validate(spec.params)
    head = comment_head(SERVING)
    assert f"Run:   hfbatch serve jobs/{SERVING.name} --set model=" in head
    assert "Out: " in head


@pytest.mark.parametrize("path", [*JOBS, TRAINING], ids=lambda path: path.name)
def test_a_shipped_spec_says_what_it_does_how_to_run_it_and_what_comes_out(path):
    head = comment_head(path)
    job = f"hfbatch run jobs/{path.name}"
    assert head.splitlines()[0].endswith(".")
    assert f"Run:   {job} --set {'train' if path == TRAINING else 'input'}.path=" in head
    assert f"ray job submit --working-dir . -- {job}" in head
    assert "Out: " in head


@pytest.mark.parametrize("path", [*JOBS, TRAINING], ids=lambda path: path.name)
def test_a_spec_survives_being_saved(path, tmp_path):
    kind = FinetuneSpec if path == TRAINING else JobSpec
    spec = kind.load(path)
    (tmp_path / "saved.yaml").write_text(spec.to_yaml(), encoding="utf8")
    assert kind.load(tmp_path / "saved.yaml") == spec


def test_gpu_workers_start_from_zero(cluster):
    workers = [kind for kind in cluster["available_node_types"].values() if kind["resources"].get("GPU")]
    assert workers
    assert all(kind["min_workers"] == 0 < kind["max_workers"] <= cluster["max_workers"] for kind in workers)


def test_the_head_has_no_gpu(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["GPU"] == 0
    assert any("--num-gpus=0" in command for command in cluster["head_start_ray_commands"])


def test_every_node_runs_this_code_with_the_tested_versions(cluster):
    (remote,) = (there for there, here in cluster["file_mounts"].items() if here == ".")
    for node in ("head", "worker"):
        (install,) = (command for command in cluster[f"{node}_setup_commands"] if remote in command)
        assert f"-c {remote}/constraints.txt" in install
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert all(f":{pins['ray']}-" in cluster["docker"][image] for image in ("image", "worker_image"))


def test_constraints_pin_published_versions_only():
    head, pins = [], []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines():
        (head if line.startswith("#") else pins).append(line)
    assert len(head) == 2
    assert pins == sorted(pins, key=str.lower)
    assert not [
        pin for pin in pins if pin.count("==") != 1 or "+" in pin or "/" in pin or pin.startswith("hfbatch")
    ]
