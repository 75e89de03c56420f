"""The engine vLLM: its server runs beside the worker, in a Python environment of its own, and continues prompts of token ids.

vLLM needs other versions of torch and transformers than this package, so it is not imported here.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from hfbatch.engines.adapters import plain_lora_faults, rank_limit
from hfbatch.engines.base import (
    CACHED,
    Completion,
    DeviceLostError,
    EngineConfig,
    Request,
    RowEngine,
    cached_count,
    unsupported_options,
)
from hfbatch.engines.sending import Sender, UnansweredError, as_answered, free_port, sender_of
from hfbatch.errors import HfbatchError, NonFiniteOutput, WorkerError
from hfbatch.spec.engines import VLLMEngineSpec

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

SERVER = "vllm.entrypoints.openai.api_server"
PATH = "/v1/completions"
NAME, BASE = "model", "base"
"""Names of what answers, and of the model below it if that is an adapter."""
NOT_DONE = (
    *("num_beams", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *(
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
    ),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
)
"""Options of `generate` that vLLM does not have."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
WATCH = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"
"""The program that ends the server's processes when its standard input ends."""
LAST_LINES = 5
MOST_LOG = 8192
"""Bytes at the end of the server's messages that are read."""
ROOM_S = 86_400.0
"""Time limit of a request: `timeout` of the spec counts from the last answer, since requests wait for each other."""


class RefusedError(HfbatchError):
    """vLLM refuses a request, or its answer is not complete; the row becomes a reject."""


class VLLMEngine(RowEngine):
    """Starts vLLM's server on this machine, for this process alone, and sends it prompts.

    :raises WorkerError: if the server does not start, with its last messages.
    """

    name = "vllm"
    rows = 256
    model = None

    def __init__(self, config: EngineConfig) -> None:
        self._spec, self.dtype = cast(VLLMEngineSpec, config.options), config.dtype
        self._cached = 0
        self._key, self._port = secrets.token_urlsafe(32), free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        self._server = self._start(config)
        # Its own processes would outlive it; the pipe ends with this process, however that ends.
        self._watch = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WATCH, str(self._server.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self.close)
        try:
            self._wait()
            self.device = f"{_device()}, vLLM {self._get('/version').get('version', 'of an unknown version')}"
        except BaseException:
            self.close()
            raise

    @classmethod
    def option_faults(
        cls, model: PretrainedConfig, generation: GenerationConfig, begin_with: str | None
    ) -> list[str]:
        """Returns errors for options that vLLM does not have."""
        faults = unsupported_options(cls.name, generation, NOT_DONE, begin_with)
        if generation.stop_strings and generation.min_new_tokens:
            faults.append(
                f"engine {cls.name} ignores params.stop until it has generated params.min_new_tokens tokens, and transformers does "
                "not; leave one of them out, or use engine torch"
            )
        return faults

    @classmethod
    def adapter_faults(cls, model: str, folder: str) -> list[str]:
        """Returns an error for what is not plain LoRA, or has too large a rank."""
        return plain_lora_faults(model, folder, cls.name)

    def take_usage(self) -> dict[str, int]:
        """Returns how many tokens of prompts came from vLLM's prefix cache since the last call."""
        cached, self._cached = self._cached, 0
        return {CACHED: cached} if cached else {}

    def complete(
        self,
        requests: Sequence[Request],
        generation: GenerationConfig,
        rows: int,
        tokens: int | None = None,
        log_probs: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Yields each continuation, or the error of its row, as it finishes.

        :param tokens: not used; vLLM has --max-num-batched-tokens for it.
        :raises DeviceLostError: if the server has ended, or has given no answer for `timeout` seconds.
        """
        options, last = _options(generation), time.monotonic()

        def check() -> None:
            """Raises if the server will not answer any more."""
            if self._server.poll() is not None:
                self.close()
                raise DeviceLostError(f"vLLM's server ended: {self._said()}")
            if time.monotonic() - last > self._spec.timeout:
                self.close()
                raise DeviceLostError(
                    f"vLLM's server has given no answer for {self._spec.timeout:g} s; it is restarted"
                )

        with sender_of(self._url, rows, self._key, ROOM_S, "its key has changed", "run again") as (
            loop,
            sender,
        ):
            jobs = (self._ask(sender, place, request, options) for place, request in enumerate(requests))
            try:
                for place, made in as_answered(loop, jobs, rows, check):
                    last = time.monotonic()
                    yield place, made if log_probs or isinstance(made, Exception) else _bare(made)
            except UnansweredError as error:
                raise DeviceLostError(f"vLLM's server does not answer: {error}") from error

    async def _ask(
        self, sender: Sender, place: int, request: Request, options: Mapping[str, Any]
    ) -> tuple[int, Completion | Exception]:
        body = {**options, "prompt": request.prompt}
        if request.max_new_tokens is not None:
            body["max_tokens"] = request.max_new_tokens
        if request.seed is not None:
            body["seed"] = request.seed
        if request.constraint is not None:
            body["structured_outputs"] = request.constraint
        status, answer = await sender.post(PATH, body, f"{PATH} of row {place}")
        if status != 200:
            return place, RefusedError(f"vLLM answers {status}: {json.dumps(answer)[:300]}")
        self._cached += cached_count(answer.get("usage") if isinstance(answer, dict) else None)
        try:
            return place, _read(cast("dict[str, Any]", answer), self.dtype)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            return place, RefusedError(f"vLLM's answer is not complete: {error!r}")
        except NonFiniteOutput as error:
            return place, error

    def _start(self, config: EngineConfig) -> subprocess.Popen[bytes]:
        gpus = _device() != "cpu"
        given = {
            "model": config.folder,
            "served_model_name": NAME,
            "host": "127.0.0.1",
            "port": self._port,
            "dtype": config.dtype,
            "generation_config": "vllm",
            "enforce_eager": not gpus,
            "enable_prompt_tokens_details": True,
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
            "trust_remote_code": config.trust_remote_code,
            **({"tokenizer": config.tokenizer} if config.tokenizer else {}),
            **(_lora(config.adapter) if config.adapter else {}),
            **self._spec.arguments,
        }
        flags = [word for name, value in given.items() for word in _flag(name, value)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "VLLM_API_KEY": self._key,
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONSAFEPATH": "1",
            "HF_HUB_OFFLINE": "1",
            **(
                {}
                if gpus
                else {"OMP_NUM_THREADS": str(config.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            ),
        }
        try:
            return subprocess.Popen(
                [self._spec.python, "-m", SERVER, *flags],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",  # Python looks for modules here first, and nobody else may write to it
                start_new_session=True,
            )
        except OSError as error:
            raise WorkerError(
                f"engine.python {self._spec.python!r} does not start: {error.strerror}; name the Python of an environment with "
                "vLLM, on every node"
            ) from error

    def _wait(self) -> None:
        """Waits until the server answers."""
        begun = time.monotonic()
        while True:
            if self._server.poll() is not None:
                raise WorkerError(
                    f"vLLM's server did not start (engine.python {self._spec.python!r}): {self._said()}"
                )
            if time.monotonic() - begun > self._spec.start_timeout:
                raise WorkerError(
                    f"vLLM's server did not start in {self._spec.start_timeout:g} s; set a larger engine.start_timeout. It says: "
                    f"{self._said()}"
                )
            try:
                self._get("/health")
                return
            except OSError:
                time.sleep(0.2)

    def _get(self, path: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._url + path, headers=headers)  # noqa: S310 - this machine
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=30) as response:
            return json.loads(response.read() or b"{}")

    def _said(self) -> str:
        """Returns the last lines of the server's messages."""
        file = self._log.fileno()
        size = os.fstat(file).st_size
        # Not by read: the server's next message would follow where that ends.
        lines = os.pread(file, MOST_LOG, max(size - MOST_LOG, 0)).decode(errors="replace").splitlines()
        return (
            " / ".join(line.strip() for line in lines[-LAST_LINES:] if line.strip())[-1000:] or "no message"
        )

    def close(self) -> None:
        """Ends the server and its processes."""
        self._watch.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        self._watch.wait()

    def is_out_of_memory(self, error: Exception) -> bool:
        """Never: vLLM sets its memory aside when it starts."""
        return False

    def release_memory(self) -> None:
        """Does nothing."""


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"  # its name would take memory of the GPU


def _lora(folder: str) -> dict[str, Any]:
    """Returns the options with which the server runs an adapter; the base keeps another name, so that nothing asks for it."""
    return {
        "served_model_name": BASE,
        "enable_lora": True,
        "max_lora_rank": rank_limit(folder),
        "lora_modules": {"name": NAME, "path": folder},
    }


def _flag(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]


def _options(generation: GenerationConfig) -> dict[str, Any]:
    """Returns the fields of all requests: the end of a text is where the config says, not where the model's files say."""
    eos = generation.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    options = {
        "model": NAME,
        "max_tokens": generation.max_new_tokens,
        "min_tokens": generation.min_new_tokens,
        "repetition_penalty": generation.repetition_penalty,
        "stop": generation.stop_strings or None,
        "include_stop_str_in_output": True if generation.stop_strings else None,
        "stop_token_ids": ends or None,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 0,
        "temperature": 0.0,
    }
    if generation.do_sample:
        options |= {name: getattr(generation, name) for name in SAMPLING}
    return {name: value for name, value in options.items() if value is not None}


def _read(answer: dict[str, Any], dtype: str) -> Completion:
    """Reads the continuation of an answer.

    :raises NonFiniteOutput: if the probability of a token is not a number.
    """
    choice = answer["choices"][0]
    tokens, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if len(tokens) != len(log_probs) or choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(
            f"{len(tokens)} tokens, {len(log_probs)} probabilities, finish_reason {choice['finish_reason']!r}"
        )
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in log_probs):
        raise NonFiniteOutput.of("what the model computed", dtype)
    return Completion([int(token) for token in tokens], choice["finish_reason"] == "stop", log_probs)


def _bare(made: Completion) -> Completion:
    return Completion(made.tokens, made.stopped)
