"""Speech recognition: measures hfbatch against the transformers pipeline, on the same recordings, in turn.

Recordings per second from Parquet to Parquet at the same precision, without start-up and with it, as medians of a few rounds,
and whose texts are those of the pipeline that reads one recording at a time. Models have random weights and the
shape of wav2vec2-base or whisper-tiny; recordings are made up, with lengths like those of utterances, unless
`--source` names a Parquet file with an audio column.

    python -m tests.benchmarks.speech --model ctc --rows 256 --rounds 3
    python -m tests.benchmarks.speech --model whisper --rows 64
    python -m tests.benchmarks.speech --source spoken_digits_train.parquet --rows 600
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tests.benchmarks import tools

TASK = "automatic-speech-recognition"
PEERS = {"pipeline-8": 8, "pipeline-1": 1}
"""Contestants other than hfbatch, and their batch sizes."""
NAMES = ("hfbatch", *PEERS)
TARGET = 1.5
"""The least ratio of hfbatch to the pipeline with a batch size of 8, without start-up."""
PARAMS: dict[str, dict[str, Any]] = {"ctc": {}, "whisper": {"num_beams": 1, "max_new_tokens": 32}}
RATE = 16_000


def write_recordings(path: Path, rows: int, source: Path | None, seed: int = 0) -> Path:
    """A Parquet file of `id` and `audio` (WAV bytes): rising tones of 0.5 to 15 seconds, 3 at the median."""
    from tests.tasks.audio_files import chirp, file_of

    if source is not None:
        files = pq.read_table(source)["audio"].to_pylist()
        audio = [files[k % len(files)] for k in range(rows)]
    else:
        generator = np.random.default_rng(seed)
        seconds = np.exp(generator.normal(np.log(3), 0.6, rows)).clip(0.5, 15)
        audio = [file_of(chirp(length, 100 + 7 * k)) for k, length in enumerate(seconds)]
    pq.write_table(pa.table({"id": range(rows), "audio": pa.array(audio, pa.binary())}), path)
    return path


def write_model(folder: Path, kind: str) -> str:
    """A model with random weights in its folder."""
    from tests.models.audio import tiny_wav2vec2, tiny_whisper

    if kind == "whisper":
        shape = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6,
                 "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "init_std": 0.05}  # fmt: skip
        return tiny_whisper(folder, seconds=30, **shape)
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "conv_dim": [512] * 7, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
             "initializer_range": 0.05}  # fmt: skip
    return tiny_wav2vec2(folder, "Wav2Vec2ForCTC", **shape)


def run_pipeline(kind: str, model: str, source: Path, out: Path, batch: int, dtype: str) -> dict[str, Any]:
    """The pipeline over all recordings in this process. :returns: rows, and seconds without the start."""
    import transformers

    from hfbatch.data.media import to_audio

    transformers.utils.logging.set_verbosity_error()
    generate = {"generate_kwargs": PARAMS[kind]} if PARAMS[kind] else {}
    recognise = transformers.pipeline(TASK, model, device="cpu", dtype=dtype, **generate)
    begun = time.perf_counter()
    table = pq.read_table(source)
    recordings = (to_audio(file, RATE) for file in table["audio"].to_pylist())
    texts = [answer["text"] for answer in recognise(recordings, batch_size=batch)]
    out.mkdir()
    pq.write_table(pa.table({"id": table["id"], "text": texts}), out / "out.parquet")
    return {"rows": len(texts), "job_s": time.perf_counter() - begun}


class Contest:
    """Runs contestants over the same recordings and keeps their rates and texts by name."""

    def __init__(self, kind: str, model: str, source: Path, folder: Path, rows: int, dtype: str) -> None:
        self.kind, self.model, self.source, self.folder, self.rows = kind, model, source, folder, rows
        self.dtype = dtype
        self.rates: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.texts: dict[str, list[str]] = {}

    def run(self, name: str) -> None:
        """One run of a contestant, into a new folder that is removed afterwards."""
        out = self.folder / f"out-{name}"
        done = tools.run(self._hfbatch(out) if name == "hfbatch" else self._peer(name, out))
        if name == "hfbatch":
            rows, rate = done.answer["rows"]["out"], done.answer["rates"]["rows_per_s"]
        else:
            rows, rate = done.answer["rows"], self.rows / done.answer["job_s"]
        if rows != self.rows:
            sys.exit(f"{name} wrote {rows:,} rows of {self.rows:,}")
        self.rates[name].append((rate, self.rows / done.seconds))
        files = [str(path) for path in out.glob("*.parquet")]
        table = ds.dataset(files, format="parquet").to_table(columns=["id", "text"]).sort_by("id")
        self.texts[name] = table["text"].to_pylist()
        shutil.rmtree(out)

    def _hfbatch(self, out: Path) -> list[str]:
        params = [f"--param={name}={value}" for name, value in PARAMS[self.kind].items()]
        flags = ["--model", self.model, "--set", f"model.dtype={self.dtype}", "--keep", "id", *params]
        return [*tools.HFBATCH, "predict", TASK, str(self.source), str(out), *flags, *tools.OPTIONS]

    def _peer(self, name: str, out: Path) -> list[str]:
        where = [self.kind, self.model, str(self.source), str(out), str(PEERS[name]), self.dtype]
        return [sys.executable, "-m", "tests.benchmarks.speech", "--peer", *where]

    def medians(self, name: str) -> tuple[float, float]:
        """Recordings per second, without start-up and with it."""
        without, with_start = zip(*self.rates[name], strict=True)
        return median(without), median(with_start)

    def same_texts(self, name: str) -> float | None:
        """Share of the texts that are those of the pipeline without batches, where both ran."""
        truth, texts = self.texts.get("pipeline-1"), self.texts.get(name)
        if truth is None or texts is None:
            return None
        return sum(mine == theirs for mine, theirs in zip(texts, truth, strict=True)) / len(truth)


def show(contest: Contest) -> dict[str, Any]:
    """Prints the rates and whether the target is met. :returns: the same as figures."""
    figures = {
        name: {"rates": contest.rates[name], "same_texts": contest.same_texts(name)} for name in contest.rates
    }
    rows = [
        [name, *(f"{rate:,.2f}" for rate in contest.medians(name)), _share(contest.same_texts(name))]
        for name in contest.rates
    ]
    columns = ("", "rows/s without start-up", "rows/s with start-up", "texts as without batches")
    tools.show(f"{contest.kind}, {contest.rows:,} recordings, medians", columns, rows)
    if {"hfbatch", "pipeline-8"} <= set(contest.rates):
        ratio = contest.medians("hfbatch")[0] / contest.medians("pipeline-8")[0]
        met = tools.verdict(ratio >= TARGET)
        tools.show(
            "hfbatch against", ("", "target", "", ""), [["pipeline-8", f"≥ {TARGET:g}", f"{ratio:.2f}", met]]
        )
    return figures


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def parse() -> argparse.Namespace:
    options = tools.arguments(__doc__)
    options.add_argument("--model", choices=sorted(PARAMS), default="ctc")
    options.add_argument("--rows", type=int, default=128)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--source", type=Path, help="a Parquet file with an audio column; default: made up")
    options.add_argument("--only", nargs="+", choices=NAMES, help="leave out the others")
    options.add_argument("--peer", nargs=6, help=argparse.SUPPRESS)
    return options.parse_args()


def main() -> None:
    options = parse()
    if options.peer:
        kind, model, source, out, batch, dtype = options.peer
        print(json.dumps(run_pipeline(kind, model, Path(source), Path(out), int(batch), dtype)), flush=True)
        return
    with tools.workspace() as folder:
        source = write_recordings(folder / "recordings.parquet", options.rows, options.source)
        model = write_model(folder / "model", options.model)
        contest = Contest(options.model, model, source, folder, options.rows, options.dtype)
        for number in range(1, options.rounds + 1):
            for name in options.only or NAMES:
                print(f"round {number} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                contest.run(name)
        tools.save(options.json, show(contest))


if __name__ == "__main__":
    main()
