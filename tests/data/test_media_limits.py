"""How much may come of one file: what its header claims is checked first, and its contents are while they are decoded."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hfbatch.data.formats import rowgroups
from hfbatch.data.media import to_audio, to_image
from hfbatch.data.media_files import RowFiles
from hfbatch.data.reader import ReadPlan, read_split
from hfbatch.data.source import open_source
from hfbatch.errors import SplitError
from hfbatch.spec.job import InputSpec
from tests.data.test_images import file_of, noise
from tests.data.test_media_files import rules

RATE = 16_000


def test_a_program_is_not_started_by_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="not an image of a known format"):
        to_image(file_of(noise(), "EPS"))
    assert not (tmp_path / "started").exists()


def wav(frames: int, rate: int, channels: int = 1, claimed: int | None = None) -> bytes:
    """Silence of 8 bits with a header that claims some number of bytes."""
    size = frames * channels
    head = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * channels & 0xFFFFFFFF, channels, 8
    )
    data = struct.pack("<4sI", b"data", size if claimed is None else claimed) + b"\x80" * size
    return b"RIFF" + struct.pack("<I", 4 + len(head) + len(data) & 0xFFFFFFFF) + b"WAVE" + head + data


def test_audio_is_limited_by_its_decoded_length() -> None:
    target = BytesIO()
    soundfile.write(target, np.zeros((100 * RATE, 2), np.int16), RATE, format="FLAC")
    few = RowFiles(rules=rules(max_seconds=99))
    with pytest.raises(ValueError, match=r"count as 100 s, input\.files\.max_seconds is 99"):
        to_audio(target.getvalue(), RATE, few)
    with pytest.raises(ValueError, match=r"max_seconds"):
        to_audio({"array": np.zeros(100 * RATE), "sampling_rate": RATE}, RATE, few)
    with pytest.raises(ValueError, match="sampling rate is 1 Hz"):
        to_audio(wav(1000, 1), RATE)
    with pytest.raises(ValueError, match="sampling rate is 0 Hz"):
        to_audio({"array": [0.0], "sampling_rate": None}, RATE)
    with pytest.raises(ValueError, match=r"max_seconds"):  # at a rate that makes little time of many samples
        to_audio(wav(200_000, 4_000_000, 2), RATE, RowFiles(rules=rules(max_seconds=4)))


def test_audio_in_blocks_is_what_it_is_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfbatch.data.media.BLOCK", 1000)
    samples = np.random.default_rng(0).normal(0, 0.1, (30_001, 2)).astype(np.float32)
    target = BytesIO()
    soundfile.write(target, samples, 44_100, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(
        to_audio(target.getvalue(), RATE), soxr.resample(samples.mean(axis=1), 44_100, RATE)
    )


@settings(max_examples=50, deadline=None)
@given(
    frames=st.integers(0, 3000),
    rate=st.sampled_from([0, 1, 999, 1000, 8000, 44_100, 192_000, 2**31, 2**32 - 1]),
    channels=st.integers(1, 9),
    claimed=st.sampled_from([None, 0, 7, 2**31, 2**32 - 1]),
    seconds=st.sampled_from([0.01, 0.5, 7200.0]),
)
def test_a_header_of_audio_gets_no_more_than_the_limit(
    frames: int, rate: int, channels: int, claimed: int | None, seconds: float
) -> None:
    try:
        made = to_audio(
            wav(frames, rate, channels, claimed), RATE, RowFiles(rules=rules(max_seconds=seconds))
        )
    except ValueError:
        return
    assert rate >= 1000
    assert len(made) <= seconds * RATE + 1
    if claimed is None:  # else no more is read than the header claims
        assert frames * channels <= seconds * 96_000


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    pixels=st.integers(1, 1600),
    place=st.integers(0, 60),
    value=st.integers(0, 255),
)
def test_a_header_of_an_image_gets_no_more_than_the_limit(
    kind: str, width: int, height: int, pixels: int, place: int, value: int
) -> None:
    whole = file_of(Image.new("RGB", (width, height)), kind)
    files = RowFiles(rules=rules(max_pixels=pixels))
    if width * height <= pixels:
        assert to_image(whole, files).size == (width, height)
    else:
        with pytest.raises(ValueError, match=rf"= {width * height} pixels; input.files.max_pixels is"):
            to_image(whole, files)
    lying = bytearray(whole)
    lying[place % len(lying)] = value
    with suppress(ValueError):
        image = to_image(bytes(lying), files)
        assert image.width * image.height <= pixels


def repeated(value: Any, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))


@pytest.mark.parametrize("stored", ["dictionary", "plain", "struct"])
@pytest.mark.parametrize("looks", [True, False], ids=["looks", "guesses"])
def test_rows_that_decode_to_too_much_are_an_error(
    tmp_path: Path, stored: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few kB whose rows are 60 MB, with limits a thousandth of what they are."""
    monkeypatch.setattr("hfbatch.data.reader.MOST_BYTES", 2 << 20)
    monkeypatch.setattr(rowgroups, "BATCH_BYTES", 256 << 10)
    monkeypatch.setattr(rowgroups, "SMALL_BYTES", 1 << 30 if looks else 0)
    column = repeated(b"\0" * 60_000, 1000)
    if stored == "struct":
        column = pa.StructArray.from_arrays(
            [column.cast(pa.binary()), pa.nulls(1000, pa.string())], ["bytes", "path"]
        )
    elif stored == "plain":
        column = column.cast(pa.binary())
    pq.write_table(pa.table({"image": column, "k": range(1000)}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    source = open_source(InputSpec(path=str(tmp_path)))
    plan = ReadPlan(source.root_url, source.format, ("image", "k"), source.schema)
    (split,) = source.cut(1000)
    with pytest.raises(SplitError, match=r"a\.parquet \(rows 0-1000\) .* lower split_rows"):
        read_split(split, plan)
    monkeypatch.setattr("hfbatch.data.reader.MOST_BYTES", 5 << 20)
    tables = [read_split(split, plan).table for split in source.cut(63)]
    assert len(tables) == 16
    whole = pa.concat_tables(tables)
    assert whole["k"].to_pylist() == list(range(1000))
    first = whole["image"][999].as_py()
    assert (first["bytes"] if stored == "struct" else first) == b"\0" * 60_000
