"""Models that watch, and videos to give them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch
import transformers

from tests.models.text import labels_of

NAMES = {0: "goal", 1: "corner", 2: "foul", 3: "throw"}


def moving(frames: int, seed: int, width: int = 48, height: int = 32) -> np.ndarray:
    """A patch of noise that wanders over an image of one colour: uint8 [frames, height, width, 3]."""
    random = np.random.default_rng(seed)
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[:] = random.integers(0, 255, 3)
    patch, (down, right) = random.integers(0, 255, (12, 12, 3)), random.integers(-4, 5, 2)
    for k, frame in enumerate(clip):
        frame[(k * down) % (height - 12) :, (k * right) % (width - 12) :][:12, :12] = patch
    return clip


def video_file(clip: np.ndarray, codec: str = "mpeg4", kind: str = "mp4") -> bytes:
    """A video file of the frames, uint8 [frames, height, width, 3]."""
    target = BytesIO()
    with av.open(target, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def tiny_videomae(folder: str | Path, frames: int = 4, seed: int = 0) -> str:
    """A VideoMAE that classifies. :returns: its folder."""
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=frames, tubelet_size=2, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, initializer_range=0.3, **labels_of(NAMES),
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.VideoMAEForVideoClassification(config).eval().save_pretrained(folder)
    square = {"height": 16, "width": 16}
    transformers.VideoMAEImageProcessorPil(size={"shortest_edge": 16}, crop_size=square).save_pretrained(
        folder
    )
    return str(folder)
