"""Task video-classification: returns labels and scores of a video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.data.media import to_video
from hfbatch.tasks.base import Example, Params
from hfbatch.tasks.labels import score_function
from hfbatch.tasks.pipelines.pipeline import LabelTask
from hfbatch.tasks.vision.vision import IMAGE


class VideoClassificationParams(Params):
    """Options for the frames to read and the returned labels and scores."""

    num_frames: int | None = Field(default=None, ge=1)
    """Number of input frames; null uses the number in the model's config."""
    frame_sampling_rate: int = Field(default=1, ge=1)
    """Sampling interval: every n-th frame is used, from the start of the video."""
    top_k: int = Field(default=5, ge=1)
    """Number of labels to return, best first."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """Function applied to logits; null depends on the model's problem type."""


class VideoClassification(LabelTask):
    """Returns the top labels of each video, with their scores."""

    name = "video-classification"
    summary = "Labels and scores of a video, by a model such as VideoMAE"
    auto_class = "AutoModelForVideoClassification"
    pipeline = "hfbatch.tasks.vision.image_pipelines.VideoClassificationPipeline"
    keeps = ("logits",)
    inputs = (replace(IMAGE, name="video"),)
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = VideoClassificationParams
    split_rows = 64
    EXAMPLE = Example({"video": ["goal.mp4", "corner.mp4"]}, {"frame_sampling_rate": 2, "top_k": 2})

    params: VideoClassificationParams

    @property
    def function(self) -> str:
        """Function applied to logits: softmax, sigmoid or none."""
        return self.params.function_to_apply or score_function(self.config)

    def check(self) -> list[str]:
        """Also returns an error if the video decoder is not installed."""
        if not find_spec("av"):
            return ["videos are decoded by PyAV, which is not installed; pip install 'hfbatch[video]'"]
        return super().check()

    def options(self) -> dict[str, Any]:
        """Returns the params of the steps after decoding."""
        return {key: value for key, value in super().options().items() if "frame" not in key}

    @property
    def frames(self) -> list[int]:
        """Indices of the input frames."""
        count = self.params.num_frames or int(self.config.num_frames)
        return np.linspace(0, count * self.params.frame_sampling_rate - 1, count, dtype=np.int64).tolist()

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields the frames of each video, decoded one by one."""
        for value in columns["video"]:
            yield to_video(value.as_py(), self.frames, self.files)
