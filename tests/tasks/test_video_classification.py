"""Labels of videos are those of the transformers pipeline, row for row, whatever the batch and the file."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from hfbatch.data.media import to_video
from hfbatch.data.media_files import RowFiles
from hfbatch.spec.job import FilesSpec
from hfbatch.tasks import task_class
from tests.models.video import NAMES, moving, tiny_videomae, video_file
from tests.tasks.drive import features_of, make, run
from tests.tasks.test_audio_tasks import file_of, tone

KINDS = [("mpeg4", "mp4"), ("libvpx-vp9", "webm"), ("ffv1", "matroska"), ("mpeg4", "avi")]
CLIPS = [
    video_file(moving(12 + k % 5, k, 32 + 8 * (k % 3), 32 + 4 * (k % 2)), *KINDS[k % len(KINDS)])
    for k in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_videomae(tmp_path_factory.mktemp("videomae"))


@pytest.mark.parametrize(
    "options",
    [{"top_k": 9}, {"frame_sampling_rate": 3, "function_to_apply": "sigmoid", "top_k": 2}, {"num_frames": 4}],
    ids=["first", "every third", "four"],
)
def test_labels_are_those_of_the_pipeline(
    folder: str,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    task = make(task_class("video-classification"), folder, **options)
    assert task.check() == []
    found = run(task, {"video": CLIPS}).to_pylist()
    oracle = pipeline("video-classification", folder, device="cpu", **options)
    best = set()
    for k, (got, clip) in enumerate(zip(found, CLIPS, strict=True)):
        (tmp_path / f"{k}").write_bytes(clip)
        expected = oracle(str(tmp_path / f"{k}"))
        assert got["label"] == [one["label"] for one in expected]
        np.testing.assert_allclose(got["score"], [one["score"] for one in expected], atol=1e-4)
        best.add(got["label"][0])
    assert len(best) > 1
    assert len(found[0]["label"]) == min(options.get("top_k", 5), len(NAMES))


def test_frames_are_those_that_were_written() -> None:
    clip = moving(9, 3)
    read = to_video(video_file(clip, "ffv1", "matroska"), [0, 4, 8])
    assert (read.shape, read.dtype) == ((3, 32, 48, 3), np.uint8)
    assert (
        np.abs(read.astype(int) - clip[[0, 4, 8]]).mean() < 20
    )  # half of the colours' places go in YUV 4:2:0
    everything = to_video(video_file(clip, "ffv1", "matroska"), range(9))
    np.testing.assert_array_equal(read, everything[[0, 4, 8]])


def test_videos_come_as_bytes_paths_and_structs(folder: str, tmp_path: Path) -> None:
    kind = task_class("video-classification")
    task = make(kind, folder, files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params)
    names = kind.EXAMPLE.rows["video"]
    for name, clip in zip(names, CLIPS, strict=False):
        (tmp_path / name).write_bytes(clip)
    columns = [CLIPS[:2], names, [{"bytes": clip, "path": None} for clip in CLIPS[:2]]]
    first, *others = [run(task, {"video": column}).to_pylist() for column in columns]
    assert others == [first] * 2


def png() -> bytes:
    target = BytesIO()
    Image.new("RGB", (32, 32)).save(target, "PNG")
    return target.getvalue()


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        (b"", "neither bytes nor a path|not a video"),
        (b"A goal in the last minute. " * 20, "not a video"),
        (CLIPS[0][: len(CLIPS[0]) // 2], "no video stream|not a video"),
        (video_file(moving(3, 0)), "has 3 of the first 8 frames"),
        (png(), "has 1 of the first 8 frames"),
        (file_of(tone(0.2, 440)), "no video stream"),
    ],
    ids=["empty", "text", "truncated", "short", "picture", "sound"],
)
def test_what_is_no_video_of_enough_frames_is_an_error(folder: str, file: bytes, fault: str) -> None:
    task = make(task_class("video-classification"), folder, frame_sampling_rate=2)
    with pytest.raises(ValueError, match=fault):
        features_of(task, {"video": [file]})


def test_frames_have_a_limit_on_their_pixels() -> None:
    clip = video_file(moving(9, 3), "ffv1", "matroska")
    for frames, most in (([0], 32 * 48), ([0, 2, 4, 6, 8], 32 * 48 * 5 // 4)):
        assert len(to_video(clip, frames, RowFiles(rules=FilesSpec(max_pixels=most)))) == len(frames)
        with pytest.raises(ValueError, match=r"the video is too large: .*input\.files\.max_pixels"):
            to_video(clip, frames, RowFiles(rules=FilesSpec(max_pixels=most - 1)))


def test_a_row_cannot_open_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret.mp4").write_bytes(CLIPS[0])
    assert len(to_video("secret.mp4", [0], RowFiles(str(tmp_path)))) == 1
    with pytest.raises(ValueError, match="not a video"):
        to_video(b"ffconcat version 1.0\nfile secret.mp4\n", [0])


def test_without_the_decoder_the_check_names_the_pip_command(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.tasks.vision.video_classification.find_spec", lambda name: None)
    (fault,) = make(task_class("video-classification"), folder).check()
    assert "pip install 'hfbatch[video]'" in fault
