"""The engine for continuous batching: a finished row is replaced by the next at once, not when a whole batch is finished.

Uses the implementation in transformers, with a paged cache. Options that it would silently ignore are errors here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from hfbatch.engines.base import Completion, EngineConfig, Request, RowEngine, unsupported_options
from hfbatch.errors import HfbatchError, NonFiniteOutput

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, GenerationConfig, PretrainedConfig

    from hfbatch.engines.continuous_masks import AllowedInTurn

STEP_TOKENS = 512
"""Default maximum of tokens in a step."""
STOP_S = 5
"""Seconds that the thread of a session may take to stop."""
PAGE = 32
"""Tokens in a page of the cache."""
NOT_DONE = (
    *("num_beams", "stop_strings", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty"),
)
"""Options that continuous batching drops, ignores or does not support."""
ATTENTIONS = ("full_attention", "sliding_attention")
"""Layer types with a paged cache."""


class ContinuousError(HfbatchError):
    """Generation of a row, or of one that ran concurrently, failed."""


class ContinuousEngine(RowEngine):
    """Generates the most probable continuations with the model of a TorchEngine.

    :param config: what it loads.
    """

    name = "continuous"
    rows = 32

    def __init__(self, config: EngineConfig) -> None:
        from hfbatch.engines.torch import TorchEngine

        self._torch = TorchEngine(config)
        self.model = self._torch.model
        self.device, self.dtype = self._torch.device, self._torch.dtype

    @classmethod
    def quantization_faults(
        cls, model: PretrainedConfig, auto_class: str, trust_remote_code: bool, quantization: str
    ) -> list[str]:
        """Returns errors for a model that has no layers to quantise."""
        from hfbatch.engines.quantization import quantization_faults

        return quantization_faults(model, auto_class, trust_remote_code, cls.name, quantization)

    @classmethod
    def option_faults(
        cls, model: PretrainedConfig, generation: GenerationConfig, begin_with: str | None
    ) -> list[str]:
        """Returns errors for sampling, options that would be ignored, and layers without a paged cache."""
        faults = []
        if generation.do_sample:
            faults.append(
                "engine continuous samples from a random state shared by all rows, so a rerun would not reproduce "
                "them; set params.do_sample=false or use engine torch"
            )
        faults += unsupported_options(cls.name, generation, NOT_DONE, begin_with)
        kinds = {*(getattr(model.get_text_config(), "layer_types", None) or ())} - {*ATTENTIONS}
        if kinds:
            faults.append(
                f"engine continuous has no cache for layers of kind {', '.join(sorted(kinds))}; "
                "use engine torch for this model"
            )
        return faults

    def complete(
        self,
        requests: Sequence[Request],
        generation: GenerationConfig,
        rows: int,
        tokens: int | None = None,
        log_probs: bool = False,
    ) -> Iterator[tuple[int, Completion]]:
        """Yields each continuation as it finishes; with log_probs, after all have finished.

        The cache has room for all concurrent rows, each at the maximum length.

        :raises ContinuousError: if a row failed, with its cause.
        :raises NonFiniteOutput: if logits were not finite.
        :raises DeviceLostError: if the process must be replaced.
        """
        if not requests:
            return
        self._torch.use_threads()
        found = self._generate(requests, generation, rows, tokens)
        if not log_probs:
            yield from found
            return
        for place, made in list(found):
            scores = self._log_probs(requests[place].prompt, made.tokens)
            yield place, Completion(made.tokens, made.stopped, scores, made.complete)

    def _generate(
        self, requests: Sequence[Request], generation: GenerationConfig, rows: int, tokens: int | None
    ) -> Iterator[tuple[int, Completion]]:
        from transformers.generation.continuous_batching import RequestStatus
        from transformers.generation.continuous_batching.utils import WorkloadHints

        from hfbatch.engines.seen import Seen

        new = [request.max_new_tokens or generation.max_new_tokens for request in requests]
        prompts = [len(request.prompt) for request in requests]
        longest = max(prompt + most for prompt, most in zip(prompts, new, strict=True))
        seen = Seen()
        hook = self.model.register_forward_hook(lambda model, inputs, output: seen.look(output))
        allowed = _allowed(requests[0])
        session = _session(
            self.model,
            allowed,
            generation_config=deepcopy(generation),
            continuous_batching_config=_settings(min(rows, len(requests)), longest, tokens),
            workload_hints=WorkloadHints(max(prompts), max(new), len(requests)),
        )
        failed = ""
        try:
            with session as manager:  # it runs the model in another thread
                for place, output in _outputs(manager, requests):
                    if output.status != RequestStatus.FINISHED:
                        failed = failed or output.error or output.status.name
                    elif not seen.finite:
                        raise NonFiniteOutput.of("what the model computed", self.dtype)
                    else:
                        yield place, _completion(output, generation.eos_token_id, allowed)
        finally:
            hook.remove()
        if failed:
            raise self._torch.lost_or(ContinuousError(f"continuous batching failed: {failed}"))

    def _log_probs(self, prompt: list[int], new: list[int]) -> list[float]:
        import torch

        from hfbatch.engines.log_probs import log_probs_of

        ids = torch.tensor([[*prompt, *new[:-1]]], device=self.model.device)
        with torch.inference_mode():
            found = log_probs_of(self.model, {"input_ids": ids}, torch.tensor([new], device=ids.device))
        return found.tolist()

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether device memory ran out, or host memory if the device is the CPU."""
        return self._torch.is_out_of_memory(error)

    def release_memory(self) -> None:
        """Empties torch's cache of device memory."""
        self._torch.release_memory()


def _settings(rows: int, longest: int, tokens: int | None) -> ContinuousBatchingConfig:
    """Returns the settings for concurrent rows of at most `longest` tokens, new ones included."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=rows * -(-longest // PAGE),
        max_batch_tokens=max(tokens or STEP_TOKENS, rows),
        max_requests_per_batch=rows,
        auto_switch_to_flash=False,  # keeps the attention of generate; downloads nothing from the Hub
        use_async_batching=False,
        use_cuda_graph=False,
    )


def _allowed(request: Request) -> AllowedInTurn | None:
    """Returns the mask of the constraint that all requests have; None without one."""
    if request.grammar is None:
        return None
    from hfbatch.engines.continuous_masks import AllowedInTurn

    return AllowedInTurn(request.grammar())


@contextmanager
def _session(model: Any, allowed: AllowedInTurn | None, **settings: Any) -> Iterator[Any]:
    """Starts a manager and stops it, as `continuous_batching_context_manager` does, which adds no processor of scores.

    If the block raises, the manager stops at once; otherwise it would first finish all requests.
    """
    manager = model.init_continuous_batching(**settings)
    if allowed is not None:
        processors = manager.logit_processor
        processors.logits_processor.append(allowed)
        processors.tensors_required, processors.do_processing = processors.tensors_required + 1, True
    manager.start()
    try:
        yield manager
    except BaseException:
        manager.stop(hard_stop=True)
        raise
    finally:
        manager.stop(block=True, timeout=STOP_S)
        manager.destroy()


def _outputs(manager: Any, requests: Sequence[Request]) -> Iterator[tuple[int, Any]]:
    """Submits all requests; yields the position and the output of each when it has ended.

    :raises ContinuousError: if the manager ends before.
    """
    waiting = _submit(manager, requests)
    while waiting:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            yield waiting.pop(output.request_id), output
        elif output is None and not manager.is_running():
            done = len(requests) - len(waiting)
            raise ContinuousError(f"continuous batching ended with {done} of {len(requests)} rows")


def _submit(manager: Any, requests: Sequence[Request]) -> dict[str, int]:
    """Submits all requests; returns the position of each by the id that the manager gives it."""
    alike = defaultdict(list)
    for place, request in enumerate(requests):
        alike[request.max_new_tokens].append(place)
    waiting: dict[str, int] = {}
    for most, places in alike.items():
        ids = manager.add_requests([requests[place].prompt for place in places], max_new_tokens=most)
        waiting.update(zip(ids, places, strict=True))
    return waiting


def _completion(output: Any, eos: int | list[int] | None, allowed: AllowedInTurn | None) -> Completion:
    """Returns the new tokens up to the first that ends a text."""
    ends = {eos} if isinstance(eos, int) else {*(eos or ())}
    tokens = output.generated_tokens
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
    complete = allowed.is_complete(output.request_id, tokens[:length]) if allowed else None
    return Completion(tokens[:length], length is not None, complete=complete)
