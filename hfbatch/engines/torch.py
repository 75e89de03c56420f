"""The torch engine: a transformers model with SDPA, on a GPU or on the CPU."""

from __future__ import annotations

import ctypes
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfbatch.engines.base import BatchEngine, DeviceLostError, EngineConfig, Forward
from hfbatch.engines.quantization import (
    checkpoint_method,
    embeddings_optional,
    finish_loading,
    may_share,
    quantization_arguments,
    quantization_faults,
    quiet,
)
from hfbatch.errors import HfbatchError, WorkerError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass
class _OnGpu:
    """Results being copied to pinned host memory."""

    host: dict[str, Any]
    copied: torch.cuda.Event


class TorchEngine(BatchEngine):
    """Runs a model loaded with an AutoClass of transformers, as it is, compiled or with packed batches.

    On the CPU, one batch runs on each thread: threads that share a batch wait for each other after every layer,
    and a thread delayed by the system delays all of them. With fewer batches than threads, or where batches must
    not run concurrently, threads share a batch.

    On a GPU, each batch is copied from pinned memory on a separate stream while the previous one computes, and
    its results are copied back on a third stream, so that the compute stream never waits for the host.
    """

    name = "torch"

    def __init__(self, config: EngineConfig) -> None:
        keep_freed_memory()
        self.dtype = config.dtype
        self._torch_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = device_name(self._torch_device)
        self.model = load_model(config, getattr(torch, config.dtype), self._torch_device)
        self.packs = getattr(config.options, "packing", False) is True
        if self.packs:
            from hfbatch.engines.packed import pack_batches

            pack_batches(self.model)
        if self._torch_device.type == "cuda":
            self.depth, self.parallel, self.pad_multiple = 3, 3, 8
            self.batch_sizes, self.batch_tokens = (32, 64, 128, 256, 512, 1024), None
            self._copy_in, self._copy_out = torch.cuda.Stream(), torch.cuda.Stream()
        elif config.dtype == "bfloat16":
            # For the CPU's matrix units: at 300 tokens, attention took a third longer than at 304.
            self.pad_multiple = 16
        self._threads = self._threads_each = config.threads
        self._compiled = config.compiled
        self._lanes: ThreadPoolExecutor | None = None
        if (
            self._torch_device.type == "cpu"
            and config.concurrent
            and not config.trust_remote_code
            and is_stateless(self.model)
            and may_share(self.model)
            and not is_spread(config)
        ):
            self._lanes = ThreadPoolExecutor(config.threads)
            self.depth, self.parallel = 2 * config.threads, config.threads
        if config.compiled:
            self._compile(config)

    def _compile(self, config: EngineConfig) -> None:
        """Has the model compiled for the first batch. Compiled code holds for one number of threads."""
        from hfbatch.engines.compiled import Compiled

        if not is_stateless(self.model):
            raise WorkerError(
                f"model {config.folder!r} computes in another way from some length on, and cannot be compiled; set "
                "engine.compile=false"
            )
        self.model = Compiled(self.model, config.folder)
        self._threads_each = 1 if self._lanes else config.threads

    @classmethod
    def quantization_faults(
        cls, model: PretrainedConfig, auto_class: str, trust_remote_code: bool, quantization: str
    ) -> list[str]:
        """Returns errors for a model that has no layers to quantise."""
        return quantization_faults(model, auto_class, trust_remote_code, cls.name, quantization)

    def expect(self, batches: int) -> None:
        """Divides the threads among the concurrent batches."""
        if self._lanes is not None and not self._compiled:
            self._threads_each = max(self._threads // batches, 1)

    def prepare(self, batch: dict[str, np.ndarray], forward: Forward) -> None:
        """Compiles the model, if it is to be compiled."""
        if not self._compiled:
            return
        try:
            self.collect(self.submit(batch, forward))
        except HfbatchError:
            raise
        except Exception:  # noqa: BLE001 - of a row that the model cannot run: the first batch without it compiles the model
            self.release_memory()

    def submit(self, batch: dict[str, np.ndarray], forward: Forward) -> Any:
        """Starts a batch; on a CPU where threads share a batch, runs it to the end."""
        if self._lanes is not None:
            return self._lanes.submit(self._run_on_cpu, batch, forward)
        if self._torch_device.type == "cpu":
            return self._run_on_cpu(batch, forward)
        try:
            with torch.inference_mode():
                return self._submit_gpu(batch, forward)
        except RuntimeError as error:
            raise self.lost_or(error) from error

    def use_threads(self) -> None:
        """Sets the number of threads of an operation on the CPU, for this Python thread only."""
        torch.set_num_threads(self._threads_each)

    def _run_on_cpu(self, batch: dict[str, np.ndarray], forward: Forward) -> dict[str, torch.Tensor]:
        self.use_threads()
        with torch.inference_mode():
            return forward(self.model, {name: as_tensor(value) for name, value in batch.items()})

    def _submit_gpu(self, batch: dict[str, np.ndarray], forward: Forward) -> _OnGpu:
        compute = torch.cuda.current_stream()
        with torch.cuda.stream(self._copy_in):
            inputs = {
                name: as_tensor(value).pin_memory().to(self._torch_device, non_blocking=True)
                if isinstance(value, np.ndarray)
                else value
                for name, value in batch.items()
            }
        compute.wait_stream(self._copy_in)
        for tensor in inputs.values():
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(compute)
        outputs = forward(self.model, inputs)
        self._copy_out.wait_stream(compute)
        host = {}
        with torch.cuda.stream(self._copy_out):
            for name, tensor in outputs.items():
                if not isinstance(tensor, torch.Tensor):
                    host[name] = tensor
                    continue
                tensor.record_stream(self._copy_out)
                host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host[name].copy_(tensor, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._copy_out)
        return _OnGpu(host, copied)

    def collect(self, handle: Any) -> dict[str, np.ndarray]:
        """Returns results as NumPy arrays that share memory with the tensors."""
        if isinstance(handle, Future):
            handle = handle.result()
        if not isinstance(handle, _OnGpu):
            return {name: as_array(value) for name, value in handle.items()}
        try:
            handle.copied.synchronize()
        except RuntimeError as error:
            raise self.lost_or(error) from error
        return {name: as_array(value) for name, value in handle.host.items()}

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether device memory ran out, or host memory if the device is the CPU."""
        return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
            error
        )

    def release_memory(self) -> None:
        """Empties torch's cache of device memory."""
        if self._torch_device.type == "cuda":
            torch.cuda.empty_cache()

    def lost_or(self, error: Exception) -> Exception:
        """Returns DeviceLostError for a CUDA error other than out-of-memory, after which every later call fails too."""
        if (
            self._torch_device.type == "cuda"
            and "CUDA error" in str(error)
            and not self.is_out_of_memory(error)
        ):
            return DeviceLostError(f"{self.device} failed: {str(error).splitlines()[0]}")
        return error


def load_model(config: EngineConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Loads the model for inference.

    :raises WorkerError: if the weights lack layers, which transformers would initialise at random after a warning.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quiet()
    arguments = quantization_arguments(config, dtype)
    quantized = bool(arguments) or checkpoint_method(config.folder) is not None
    if spread := is_spread(config):
        arguments |= {"device_map": "auto", "max_memory": _max_memory(config)}
    elif quantized:
        arguments |= {"device_map": {"": device}}
    with embeddings_optional():
        model, loading = getattr(transformers, config.auto_class).from_pretrained(
            config.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
    missing = sorted(
        name for name in loading["missing_keys"] if not any(part in name for part in config.unused)
    )
    if missing:
        raise WorkerError(
            f"the weights lack {len(missing)} layers of {config.auto_class}, such as {missing[0]}"
        )
    if config.vocabulary is not None:
        grow_vocabulary(model, config.vocabulary, config.seed)
    model = model.eval().requires_grad_(False)
    if spread:
        return model
    if not quantized:
        return model.to(device)
    finish_loading(model, dtype)
    return model


def is_spread(config: EngineConfig) -> bool:
    """Whether the spec spreads the model over several devices."""
    return getattr(config.options, "device_map", None) is not None


def _max_memory(config: EngineConfig) -> dict[int | str, str] | None:
    memory: dict[str, str] = getattr(config.options, "memory", {})
    return {int(name) if name.isdigit() else name: size for name, size in memory.items()} or None


def grow_vocabulary(model: Any, size: int, seed: int) -> None:
    """Adds token embeddings, drawn close to the mean of the existing ones; deterministic for a given seed.

    Never removes any: many models have more embeddings than their tokenizer has tokens.
    """
    if size > model.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(size)


def as_tensor(value: Any) -> Any:
    """Converts an array to a tensor that shares its memory; returns other values unchanged."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def as_array(value: Any) -> Any:
    """Converts a tensor to an array that shares its memory; returns other values unchanged."""
    return value.numpy() if isinstance(value, torch.Tensor) else value


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed activations instead of returning it to the system after each layer.

    Returned memory causes page faults when allocated again: on the CPU, they slowed a batch of MiniLM by a fifth,
    and more in threads other than the main one. See mallopt(3); has no effect with other C libraries.
    """
    mmap_threshold, trim_threshold, top_pad, most_arenas = -3, -1, -2, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the maximum that glibc accepts on 64 bits
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)
        mallopt(most_arenas, 1)  # arenas of other threads return memory despite the settings above


def is_stateless(model: torch.nn.Module) -> bool:
    """Whether two batches may run concurrently: rotary embeddings that adapt to a batch's length modify the model.

    So does BigBird, which switches its attention type at short lengths.

    Source: `dynamic_rope_update` in transformers' modeling_rope_utils, `set_attention_type` in modeling_big_bird.
    """
    if getattr(model.config, "attention_type", "") == "block_sparse":
        return False
    kinds = (str(getattr(module, "rope_type", "")) for module in model.modules())
    return not any("dynamic" in kind or kind == "longrope" for kind in kinds)


def device_name(device: torch.device) -> str:
    """Returns the device type with the hardware model."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({torch.cpu.get_capabilities().get('cpu_name', 'unknown')})"
