"""The settings of a runner: plain values that travel between processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from hfbatch.data.media_files import RowFiles
from hfbatch.engines.quantization import quiet
from hfbatch.hub.models import Model
from hfbatch.runtime.machine import collector_at_rest
from hfbatch.spec.engines import EngineSpec, TorchEngineSpec
from hfbatch.spec.job import BatchSpec, FilesSpec, JobSpec, TokenizerSpec
from hfbatch.spec.location import WITH_SECRETS, Location
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task, TaskConfig


@dataclass(frozen=True)
class RuntimeChoice:
    """What the spec leaves to the first worker; it then holds for the whole job and for its reruns."""

    batch_size: int
    dtype: str
    device: str
    engine: str = "torch"
    quantization: str = "none"
    guard: dict[str, Any] | None = None
    """The comparison with float32, see `Verdict`; None if nothing was lowered."""
    trials: list[dict[str, Any]] | None = None
    """What `engine: auto` tried, see `EngineTrial`; None if it tried nothing."""
    compiled: bool = False
    """Whether torch.compile compiles the model."""
    dedupe: bool = False
    """Whether identical rows of a split run once; false for jobs that began before there was a choice."""
    fitted: dict[str, Any] | None = None
    """What the task took from rows of the job, see `Task.fit`; None if it needs nothing."""
    share_prefixes: bool = False
    """Whether tokens that all prompts of a batch begin with are read once; false for jobs that began before there was a choice."""


@dataclass(frozen=True)
class RunnerConfig:
    """What a process needs to run a task over rows, without the job's input and output."""

    task: str
    model: Model
    params: dict[str, Any]
    dtype: str
    """As the spec has it: `auto` or a name."""
    batch: BatchSpec
    engine: EngineSpec = field(default_factory=lambda: TorchEngineSpec(name="torch"))
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    seed: int = 0
    files: FilesSpec = field(default_factory=FilesSpec)
    root: str = ""
    """Folder or URL that paths in the rows are relative to."""
    choice: RuntimeChoice | None = None

    @classmethod
    def of(
        cls, spec: JobSpec, model: Model, root: str = "", choice: RuntimeChoice | None = None
    ) -> RunnerConfig:
        """The part of a job's spec that concerns what is computed."""
        return cls(
            spec.task, model, spec.params, spec.model.dtype, spec.batch, spec.engine, spec.tokenizer, spec.seed,
            spec.input.files, root, choice,
        )  # fmt: skip

    def to_json(self) -> str:
        """The settings as text, which processes can compare; it holds the secrets of URLs."""
        values = {
            **vars(self),
            "model": asdict(self.model),
            "batch": self.batch.model_dump(mode="json"),
            "engine": self.engine.model_dump(mode="json"),
            "tokenizer": self.tokenizer.model_dump(mode="json"),
            "files": self.files.model_dump(mode="json", context=WITH_SECRETS),
            "root": Location(self.root).unmasked,
            "choice": asdict(self.choice) if self.choice else None,
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> RunnerConfig:
        """The reverse of to_json."""
        values = json.loads(text)
        made = {
            "model": Model(**values["model"]),
            "batch": BatchSpec.model_validate(values["batch"]),
            "engine": TypeAdapter(EngineSpec).validate_python(values["engine"]),
            "tokenizer": TokenizerSpec.model_validate(values["tokenizer"]),
            "files": FilesSpec.model_validate(values["files"]),
            "root": Location(values["root"]),
            "choice": RuntimeChoice(**values["choice"]) if values["choice"] else None,
        }
        return cls(**{**values, **made})

    @collector_at_rest()
    def build_task(self) -> Task:
        """The task, with the model's files as they are on this machine.

        :raises pydantic.ValidationError: for params that the task does not have.
        """
        quiet()
        cls = task_class(self.task)
        task = cls(
            TaskConfig(
                self.model,
                cls.Params.model_validate(self.params),
                self.batch.max_length,
                self.seed,
                self.tokenizer,
                RowFiles(self.root, self.files),
                self.choice.fitted if self.choice else None,
                self.choice.share_prefixes if self.choice else self.batch.share_prefixes,
            )
        )
        _ = task.config  # imports torch while the collector is at rest
        return task
