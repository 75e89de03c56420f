"""Converts the spec to transformers' TrainingArguments, which both loops use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hfbatch.data.filesystem import redact
from hfbatch.engines.precision import native_dtype
from hfbatch.train.loop.worker_config import TrainWorkerConfig, shares
from hfbatch.train.recipes.base import LOWER_IS_BETTER

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "adamw_8bit": "adamw_bnb_8bit"}
LEARNING_RATES = {"full": 5e-5, "head": 1e-3, "lora": 2e-4, "qlora": 2e-4}


def arguments(
    config: TrainWorkerConfig, local: Path, world: int, layers: Sequence[str] = ()
) -> TrainingArguments:
    """Returns transformers' TrainingArguments for the spec.

    :param layers: class names of the layers to shard as groups of their own, with fsdp.
    """
    spec, schedule, every = config.spec, config.spec.schedule, config.spec.evaluation.every
    rate = LEARNING_RATES[spec.method.name] if schedule.learning_rate == "auto" else schedule.learning_rate
    dtype = native_dtype()[1] if spec.compute.dtype == "auto" else spec.compute.dtype
    per_device, accumulation = shares(spec.batch.size, spec.batch.per_device, world, config.recipe.group)
    metric = spec.evaluation.metric or config.recipe.metric
    when = {"eval_strategy": "epoch"} if every == "epoch" else {"eval_strategy": "steps", "eval_steps": every}
    saved = (
        {"save_strategy": "epoch"} if every == "epoch" else {"save_strategy": "steps", "save_steps": every}
    )
    return TrainingArguments(
        output_dir=str(local / "run"),
        run_name=redact(spec.output).rstrip("/").rpartition("/")[2],
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=schedule.epochs,
        max_steps=schedule.steps or -1,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup" if schedule.scheduler == "constant" else schedule.scheduler,
        warmup_steps=schedule.warmup if schedule.warmup < 1 else int(schedule.warmup),
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        optim=OPTIMIZERS[schedule.optimizer],
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        torch_compile=spec.compute.compile,
        full_determinism=spec.compute.deterministic,
        seed=spec.seed,
        metric_for_best_model=metric,
        greater_is_better=metric not in LOWER_IS_BETTER,
        logging_steps=10,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        save_total_limit=1,
        restore_callback_states_from_checkpoint=True,
        **({"gradient_checkpointing": True} if spec.compute.gradient_checkpointing else {}),
        **(sharing(layers) if spec.workers.strategy == "fsdp" else {}),
        **when,
        **saved,
    )


def sharing(layers: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments for sharding (FSDP2). :param layers: class names of the layers to shard as groups."""
    groups = {"transformer_layer_cls_to_wrap": list(layers)} if layers else {"auto_wrap_policy": "NO_WRAP"}
    # Without it, each process would keep the gradients of the whole model until the last pass of a step.
    every_pass = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return {"fsdp": True, "fsdp_config": {"version": 2, **groups}, "accelerator_config": every_pass}
