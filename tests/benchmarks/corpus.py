"""The texts that the benchmarks run over, as Parquet shards with `id` and `text`.

Generated ones have the mix of lengths of AG News (its test set, in tokens of all-MiniLM-L6-v2), which the
constants below hold, and need no download. `--source` repeats and reshards a Parquet file with a text column.

    python -m tests.benchmarks.corpus FOLDER --rows 7600
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 1000
PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
TOKENS = (19, 26, 32, 37, 44, 51, 60, 70, 80, 123, 201, 278)
"""Percentiles of the token lengths of AG News, [CLS] and [SEP] included; their mean is 53.7."""
SPECIAL_TOKENS = 2
PUNCTUATION = (",", ".", ";", ":", "-")
PUNCTUATION_SHARE = 0.13
VOCABULARY = """
the of to in and a for on that is with at by from as it said has was be are its have will an not but
after this new more up one two out over first about than year last who their would had company market oil
prices stock shares quarter profit sales growth report economy bank dollar investors billion million
percent business government official president minister election court police security military attack
troops war peace talks nuclear leader party vote country nation city people group state national
international world united states team game season win victory coach player league cup match champion
final score home run night sunday monday tuesday wednesday thursday friday saturday week month day time
software computer internet network service users technology system research scientists space mission
launch satellite music video phone mobile wireless search web site online data server chip maker giant
deal merger offer plan rule case trial judge lawyer law river mountain water storm hurricane fire weather
north south east west coast island capital region border house street office store factory car plane
train energy gas power electric record high low strong weak early late major small large big good best
better next third second another many most some other several local public private foreign federal former
chief executive director announced reported expected agreed signed opened closed rose fell gained lost
won beat led made took gave told called asked found killed wounded arrested charged released planned
started ended
"""
"""English words from frequent to rare; each is one token of the vocabulary that all uncased BERTs share."""


def write_corpus(
    folder: Path, rows: int, shards: int = 8, source: Path | None = None, column: str = "text", seed: int = 0
) -> Path:
    """Writes the shards; the same arguments give the same files. Row groups have 1,000 rows.

    :param source: a Parquet file whose texts are repeated up to `rows`; default: generated texts.
    :param column: the source's text column.
    :returns: the folder.
    """
    texts = generate(rows, seed) if source is None else _repeat(pq.read_table(source)[column], rows)
    table = pa.table({"id": pa.array(np.arange(rows)), "text": texts})
    folder.mkdir(parents=True, exist_ok=True)
    step = -(-rows // shards)
    for shard in range(shards):
        piece = table.slice(shard * step, step)
        if len(piece):
            pq.write_table(piece, folder / f"shard-{shard:05d}.parquet", row_group_size=ROW_GROUP)
    return folder


def generate(rows: int, seed: int = 0) -> pa.Array:
    """Texts whose token lengths are spread as TOKENS says: string [rows]."""
    chosen = np.random.default_rng(seed)
    at = chosen.permutation((np.arange(rows) + 0.5) / rows * 100)
    lengths = np.rint(np.interp(at, PERCENTS, TOKENS)).astype(int) - SPECIAL_TOKENS
    vocabulary = VOCABULARY.split()
    weights = 1 / np.arange(3, len(vocabulary) + 3)
    words = chosen.choice(
        np.array([f" {word}" for word in vocabulary]), lengths.sum(), p=weights / weights.sum()
    )
    marks = chosen.choice(np.array(PUNCTUATION), lengths.sum())
    tokens = np.where(chosen.random(lengths.sum()) < PUNCTUATION_SHARE, marks, words)
    texts = np.split(tokens, np.cumsum(lengths)[:-1])
    return pa.array(["".join(text).strip() for text in texts], pa.string())


def _repeat(texts: pa.ChunkedArray, rows: int) -> pa.ChunkedArray:
    return texts.take(pa.array(np.arange(rows) % len(texts)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--rows", type=int, default=7600)
    options.add_argument("--shards", type=int, default=8)
    options.add_argument("--source", type=Path)
    options.add_argument("--column", default="text")
    chosen = options.parse_args()
    write_corpus(chosen.folder, chosen.rows, chosen.shards, chosen.source, chosen.column)
    print(f"{chosen.rows:,} rows in {chosen.folder}")


if __name__ == "__main__":
    main()
