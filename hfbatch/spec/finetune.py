"""The spec of a fine-tuning, which users write as YAML, flags or Python. Validates its structure; reads no files."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hfbatch.spec.job import InputSpec, ModelSpec, Spec, TokenizerSpec
from hfbatch.spec.location import Location
from hfbatch.spec.section import Auto, Section
from hfbatch.spec.shorthand import shorthand


class BaseModelSpec(ModelSpec):
    """The base model."""

    overrides: dict[str, Any] = Field(default={})
    """Fields of the model's config to change, such as {hidden_dropout_prob: 0.2}."""
    scratch: bool = False
    """Begin with random weights; the folder then only needs config.json and the tokenizer or processor."""


class MethodSpec(Section):
    """Which weights are trained."""

    name: Literal["full", "head", "lora", "qlora"] = "full"
    """full: all; head: only the head, on a frozen base; lora: low-rank adapters; qlora: these on a quantised base."""
    rank: int = Field(default=16, ge=1)
    """Rank of the adapters' matrices (LoRA's r)."""
    alpha: float = Field(default=32, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout of the adapters' inputs."""
    targets: tuple[str, ...] | None = None
    """Names of the layers that get adapters; default: every linear layer but the head."""
    bits: Literal[4, 8] = 4
    """qlora: bits per weight of the base; 4: nf4 with double quantisation."""


class TrainBatchSpec(Section):
    """Rows of a step."""

    size: int = Field(default=32, ge=1)
    """Rows of one optimizer step, over all workers: the global batch."""
    per_device: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Rows of one forward pass; auto: a worker's share of the step, at most 32. Gradients are accumulated over a step."""
    max_length: int | None = Field(default=None, ge=1)
    """Maximum number of tokens of a row; longer ones are truncated and counted. Default: the model's own limit."""
    by_length: bool = True
    """Batch rows of similar length, to reduce padding; the order of the batches stays random."""


class ScheduleSpec(Section):
    """Duration, learning rate and optimizer."""

    epochs: float = Field(default=3, gt=0)
    """How often each row is seen."""
    steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps; overrides epochs."""
    learning_rate: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Peak learning rate; auto: 5e-5 for full, 1e-3 for head, 2e-4 for lora and qlora."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warm-up."""
    warmup: float = Field(default=0.1, ge=0)
    """Warm-up steps: below 1 as a share of all steps, else their number."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum norm of gradients, to which they are clipped."""
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    """Optimizer; adamw_8bit is that of bitsandbytes."""
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    """Share of a label's probability that is spread over all labels."""


class EvaluationSpec(Section):
    """When the model is evaluated and saved, and how the best checkpoint is selected."""

    every: Annotated[int, Field(ge=1)] | Literal["epoch"] = "epoch"
    """Steps between two evaluations, each with a checkpoint; epoch: once per epoch."""
    fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training set to hold out for evaluation if the spec has no `eval`."""
    metric: Annotated[str, AfterValidator(lambda name: name.removeprefix("eval_"))] | None = None
    """Metric that selects the best checkpoint; default: the task's own, such as accuracy."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many consecutive evaluations without a better one."""
    keep: int = Field(default=1, ge=1)
    """Number of newest checkpoints to keep, besides the best one."""


class ComputeSpec(Section):
    """Precision, memory and determinism."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of forward and backward pass; weights and optimizer stay float32. auto: the best of the device."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile; pays off for long trainings."""
    deterministic: bool = False
    """Use only deterministic algorithms, where torch has them: bitwise reproducible, but slower."""


class TrainWorkersSpec(Section):
    """Number of training processes, and the resources of each."""

    count: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Number of training processes; auto: one for each GPU, else one for all CPUs of a node."""
    at_least: int | None = Field(default=None, ge=1)
    """Continue with this many when the cluster shrinks, and with count again when it grows; default: count."""
    gpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs of one process; auto: 1 if the cluster has GPUs, else 0."""
    cpus: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs of one process."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each process holds the whole model; fsdp: the processes shard it (FSDP2, at least two GPUs)."""
    failures: int = Field(default=3, ge=0)
    """How often training restarts from the newest checkpoint after a process or node is lost."""


class FinetuneSpec(Spec):
    """The complete spec of a fine-tuning."""

    task: str = Field(min_length=1)
    """Task to train; `hfbatch tasks` shows which tasks can be trained."""
    model: Annotated[BaseModelSpec, shorthand("name")]
    """The base model; a plain string is its name."""
    train: Annotated[InputSpec, shorthand("path")]
    """The training set; a plain string is the path."""
    eval: Annotated[InputSpec | None, shorthand("path")] = None
    """The evaluation set; default: a held-out share of the training set."""
    output: Location
    """The output folder: the model, its report, and checkpoints during training."""
    method: Annotated[MethodSpec, shorthand("name")] = MethodSpec()
    """Which weights are trained; a plain string is the name."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """Changes to the model's tokenizer."""
    batch: TrainBatchSpec = TrainBatchSpec()
    """Rows of a step."""
    schedule: ScheduleSpec = ScheduleSpec()
    """Duration, learning rate and optimizer."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """When the model is evaluated and saved."""
    compute: ComputeSpec = ComputeSpec()
    """Precision, memory and determinism."""
    workers: TrainWorkersSpec = TrainWorkersSpec()
    """How the work is distributed."""
    loop: Literal["trainer", "accelerate"] = "trainer"
    """transformers' Trainer, or a loop on plain Accelerate that is easy to change."""
    params: dict[str, Any] = Field(default={})
    """Options of the task."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Experiment trackers for losses and metrics, besides the report."""
    push_to_hub: str | None = None
    """Hub repository to upload the finished model to; needs HF_TOKEN."""
    seed: int = Field(default=0, ge=0)
    """Random seed."""

    @model_validator(mode="after")
    def _go_together(self) -> FinetuneSpec:
        """Checks that the choices are compatible. :raises ValueError: with one argument for each incompatibility."""
        shared, least, most = self.workers.strategy == "fsdp", self.workers.at_least, self.workers.count
        faults = []
        if self.loop == "accelerate" and (self.compute.compile or shared):
            faults.append(
                "loop accelerate supports neither compute.compile nor workers.strategy fsdp; use loop: trainer for these"
            )
        if shared and self.schedule.optimizer != "adamw":
            faults.append(
                f"schedule.optimizer {self.schedule.optimizer} does not support sharded weights; use adamw with "
                "workers.strategy fsdp"
            )
        if shared and self.compute.dtype == "float16":
            faults.append(
                "compute.dtype float16 cannot resume from a sharded checkpoint; use bfloat16 or float32 with "
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
    """Returns whether a spec is one of a fine-tuning: it has `train`, or no `input` but a key similar to `train`."""
    return "train" in values or (
        "input" not in values and bool(get_close_matches("train", map(str, values), 1))
    )
