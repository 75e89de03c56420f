"""Pictures and sound as people have them: files beside the shards, odd ones and broken ones; the job goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soxr
from PIL import Image
from transformers import pipeline

from tests.cases.case import columns_of, near
from tests.data.test_images import GOOD, file_of, noise
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, read_output, read_rejects
from tests.models.audio import tiny_wav2vec2
from tests.models.vision import tiny_vision
from tests.tasks import audio_files
from tests.tasks.audio_files import tone
from tests.tasks.test_audio_tasks import BAD_AUDIO


def test_paths_are_relative_to_the_input(tmp_path: Path) -> None:
    model = tiny_vision(tmp_path / "model", "ViTForImageClassification", id2label={0: "cat", 1: "dog"})
    folder = tmp_path / "in" / "_pictures"
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for k in range(12):
        Image.fromarray(random.integers(0, 255, (20 + k, 30, 3), np.uint8)).save(folder / f"{k}.png")
    (folder / "9.png").write_bytes(b"this is no picture")
    paths: list[str | None] = [f"_pictures/{k}.png" for k in range(12)]
    paths[7], paths[8] = None, "_pictures/missing.png"
    pq.write_table(pa.table({"id": range(12), "image": paths}), tmp_path / "in" / "a.parquet")
    spec = make_spec(
        "image-classification", model, tmp_path / "in", tmp_path / "out", rejects={"max_fraction": 0.3}
    )

    assert job_here(spec).exit_code == 0

    oracle = pipeline("image-classification", model, device="cpu")
    found = read_output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4, 5, 6, 10, 11]
    for row in found:
        answer = columns_of(oracle(str(folder / f"{row['id']}.png")))
        assert near({name: row[name] for name in answer}, answer)
    rejects = [(one["id"], one["hfbatch_error"]) for one in read_rejects(tmp_path / "out")]
    assert rejects == [(7, "NullInput"), (8, "FileNotFoundError"), (9, "ValueError")]


BOMB = file_of(Image.new("1", (15_000, 10_000)), "PNG")
"""18 kB that would take 450 MB as RGB."""
BROKEN = {
    "cut JPEG": file_of(noise(), "JPEG")[:-500],
    "cut PNG": file_of(noise(height=60, width=60), "PNG")[:-5000],
    "bomb": BOMB,
    "empty": b"",
    "text": b"neither a picture nor a path",
}


def test_odd_pictures_are_read_right_and_broken_ones_are_rejects(tmp_path: Path) -> None:
    model = tiny_vision(tmp_path / "model", "ViTForImageClassification", id2label={0: "cat", 1: "dog"})
    files = {**{name: make() for name, make in GOOD.items()}, **BROKEN}
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(len(files)), "image": list(files.values())})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    spec = make_spec(
        "image-classification", model, tmp_path / "in", tmp_path / "out", rejects={"max_fraction": 0.5}
    )

    assert job_here(spec).exit_code == 0

    oracle = pipeline("image-classification", model, device="cpu")
    found = read_output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in found] == list(range(len(GOOD)))
    for row in found:
        (tmp_path / "picture").write_bytes(row["image"])
        answer = columns_of(oracle(str(tmp_path / "picture")))
        assert near({name: row[name] for name in answer}, answer)
    rejects = {one["id"]: one["hfbatch_message"] for one in read_rejects(tmp_path / "out")}
    words = ["truncated", "truncated", "the image is too large", "(0 bytes)", "(28 bytes)"]
    assert list(rejects) == list(range(len(GOOD), len(files)))
    assert all(word in message for word, message in zip(words, rejects.values(), strict=True))


def test_odd_sound_is_heard_right_and_broken_sound_is_a_reject(tmp_path: Path) -> None:
    model = tiny_wav2vec2(
        tmp_path / "model", "Wav2Vec2ForSequenceClassification", {0: "bell", 1: "rain", 2: "speech"}
    )
    stereo = np.stack([tone(0.5, 440), tone(0.5, 660)], axis=1)
    good = [
        (audio_files.file_of(tone(0.5, 440)), tone(0.5, 440)),
        (audio_files.file_of(stereo), stereo.mean(axis=1)),
        *(
            (
                audio_files.file_of(tone(0.5, 440, rate), rate),
                soxr.resample(tone(0.5, 440, rate), rate, audio_files.RATE),
            )
            for rate in (8_000, 96_000)
        ),
    ]
    broken = [value for value, _ in BAD_AUDIO.values()]
    files = [*(file for file, _ in good), *broken]
    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"id": range(len(files)), "audio": pa.array(files, pa.binary())}),
        tmp_path / "in" / "a.parquet",
    )
    spec = make_spec(
        "audio-classification", model, tmp_path / "in", tmp_path / "out", rejects={"max_fraction": 0.8}
    )

    assert job_here(spec).exit_code == 0

    oracle = pipeline("audio-classification", model, device="cpu")
    found = read_output(tmp_path / "out").to_pylist()
    assert len(found) == len(good)
    for row, (_, samples) in zip(found, good, strict=True):
        answer = columns_of(oracle(samples))
        assert near({name: row[name] for name in answer}, answer)
    rejects = [one["hfbatch_message"] for one in read_rejects(tmp_path / "out")]
    assert all(words in text for text, (_, words) in zip(rejects, BAD_AUDIO.values(), strict=True))
