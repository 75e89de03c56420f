"""The spec of a fine-tuning: what the user writes, as YAML, flags or Python. Checks form, touches no file."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from hfbatch.location import Location
from hfbatch.spec import Auto, InputSpec, ModelSpec, Section, Spec, TokenizerSpec, shorthand


class BaseModelSpec(ModelSpec):
    """The model that training begins with."""

    overrides: dict[str, Any] = Field(default={})
    """Fields of the model's config to change, such as {hidden_dropout_prob: 0.2}."""
    scratch: bool = False
    """Begin with random weights; the folder then needs config.json and the tokenizer or processor alone."""


class MethodSpec(Section):
    """Which weights are trained."""

    name: Literal["full", "head", "lora", "qlora"] = "full"
    """full: all; head: those beside the frozen base; lora: low-rank adapters; qlora: these on a quantised base."""
    rank: int = Field(default=16, ge=1)
    """Rank of the adapters' matrices (LoRA's r)."""
    alpha: float = Field(default=32, gt=0)
    """Scale of the adapters: their product counts alpha / rank times."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout of the adapters' inputs."""
    targets: tuple[str, ...] | None = None
    """Names of the layers that get adapters; default: every linear layer but the head."""
    bits: Literal[4, 8] = 4
    """qlora: bits of a weight of the base; 4 is nf4 with double quantisation."""


class TrainBatchSpec(Section):
    """What one step sees."""

    size: int = Field(default=32, ge=1)
    """Rows of one optimizer step, over all workers: the global batch."""
    per_device: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Rows of one forward pass; auto: as many as the step has for a worker, 32 at most. Gradients add up to the step."""
    max_length: int | None = Field(default=None, ge=1)
    """Most tokens of a row; longer ones are truncated and counted. Default: the model's own limit."""
    by_length: bool = True
    """Put rows of similar length together, so that little is padding; which rows follow which stays random."""


class ScheduleSpec(Section):
    """How long, how fast and by which rule weights change."""

    epochs: float = Field(default=3, gt=0)
    """How often each row is seen."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; goes before epochs."""
    learning_rate: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Peak learning rate; auto: 5e-5 for full, 1e-3 for head, 2e-4 for lora and qlora."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes down after the warm-up."""
    warmup: float = Field(default=0.1, ge=0)
    """Warm-up: below 1 the share of all steps, else their number."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    """adamw_8bit is that of bitsandbytes."""
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    """Share of a label's probability that is spread over all of them."""


class EvaluationSpec(Section):
    """When the model is measured and saved, and what is the best of it."""

    every: Annotated[int, Field(ge=1)] | Literal["epoch"] = "epoch"
    """Steps between two evaluations, each with a checkpoint; or once an epoch."""
    fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows that is set aside for it where the spec has no `eval`."""
    metric: Annotated[str, AfterValidator(lambda name: name.removeprefix("eval_"))] | None = None
    """What decides which checkpoint is the best; default: the task's own, such as accuracy."""
    patience: int | None = Field(default=None, ge=1)
    """End after so many evaluations in a row without a better one."""
    keep: int = Field(default=1, ge=1)
    """Checkpoints that stay, the newest; the best one stays too."""


class ComputeSpec(Section):
    """How weights and activations are held and computed."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the forward and backward pass; weights and optimizer stay float32. auto: the best that the device has."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile; pays for long trainings."""
    deterministic: bool = False
    """Deterministic algorithms alone, where torch has them: the same bits in each run, more slowly."""


class TrainWorkersSpec(Section):
    """How many processes train, and what each of them takes."""

    count: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Training processes; auto: one for each GPU, else one for all CPUs of a node."""
    at_least: int | None = Field(default=None, ge=1)
    """Go on with this many when the cluster shrinks, and with count again when it grows; default: count."""
    gpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs of one process; auto is 1 where the cluster has GPUs, else 0."""
    cpus: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs of one process."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each process holds the whole model; fsdp: they share it (FSDP2, two GPUs at least)."""
    failures: int = Field(default=3, ge=0)
    """How often training begins again at the newest checkpoint after a process or node is lost."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class FinetuneSpec(Spec):
    """One fine-tuning, whole."""

    task: str = Field(min_length=1)
    """What the model learns; `hfbatch tasks` says which tasks can be trained."""
    model: Annotated[BaseModelSpec, shorthand("name")]
    """The model to begin with; a plain string is its name."""
    train: Annotated[InputSpec, shorthand("path")]
    """The rows to learn from; a plain string is the path."""
    eval: Annotated[InputSpec | None, shorthand("path")] = None
    """The rows to measure with; default: a share of the training rows, which is then not learnt from."""
    output: Location
    """The output folder: the model, its report, and checkpoints while it trains."""
    method: Annotated[MethodSpec, BeforeValidator(_named)] = MethodSpec()
    """Which weights are trained; a plain string is the name."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """Changes to the model's tokenizer."""
    batch: TrainBatchSpec = TrainBatchSpec()
    """What one step sees."""
    schedule: ScheduleSpec = ScheduleSpec()
    """How weights change."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """When the model is measured and saved."""
    compute: ComputeSpec = ComputeSpec()
    """How it is computed."""
    workers: TrainWorkersSpec = TrainWorkersSpec()
    """How the work is spread."""
    loop: Literal["trainer", "accelerate"] = "trainer"
    """transformers' Trainer, or a loop on plain Accelerate that is easy to change."""
    params: dict[str, Any] = Field(default={})
    """Options of the task."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where losses and metrics go, beside the report."""
    push_to_hub: str | None = None
    """A Hub repository that the finished model is uploaded to; needs HF_TOKEN."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""

    @model_validator(mode="after")
    def _go_together(self) -> FinetuneSpec:
        """:raises ValueError: with one argument for each choices that exclude each other."""
        shared, least, most = self.workers.strategy == "fsdp", self.workers.at_least, self.workers.count
        faults = []
        if self.loop == "accelerate" and (self.compute.compile or shared):
            faults.append(
                "loop accelerate has neither compute.compile nor workers.strategy fsdp; use loop: trainer with these"
            )
        if shared and self.schedule.optimizer != "adamw":
            faults.append(
                f"schedule.optimizer {self.schedule.optimizer} cannot take weights in shards; use adamw with "
                "workers.strategy fsdp"
            )
        if shared and self.compute.dtype == "float16":
            faults.append(
                "compute.dtype float16 cannot go on from a checkpoint in shards; use bfloat16 or float32 with "
                "workers.strategy fsdp"
            )
        if least is not None and most != "auto" and least > most:
            faults.append(
                f"workers.at_least {least} is more than workers.count {most}; make it {most} or less"
            )
        if faults:
            raise ValueError(*faults)
        return self


def is_training(values: Mapping[str, Any]) -> bool:
    """Whether a spec is that of a fine-tuning: it has `train`, or has no `input` but a key that looks like `train`."""
    return "train" in values or (
        "input" not in values and bool(get_close_matches("train", map(str, values), 1))
    )
