"""Bytes, paths and Hugging Face's `Image`, `Audio` and `Video` structs to pictures, sound and frames. Knows nothing of models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.data.filesystem import is_url, join, open_filesystem

if TYPE_CHECKING:
    from PIL.Image import Image


def is_file_like(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type can hold files: bytes, paths or URLs, or structs of `bytes` and `path`."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    return any(
        test(kind)
        for test in (
            pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view,
            pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
        )
    )  # fmt: skip


def file_bytes(value: Any, root: str = "") -> bytes:
    """The content of a file.

    :param value: bytes; a path or URL; or a dict with `bytes` or else `path`.
    :param root: folder that relative paths are relative to.
    :raises ValueError: where there is neither bytes nor a path.
    :raises OSError: for a path that cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not value:
        raise ValueError("there are neither bytes nor a path")
    path = value if is_url(value) or value.startswith("/") or not root else join(root, value)
    fs, where = open_filesystem(path)
    with fs.open_input_file(where) as file:
        return file.read()


def to_image(value: Any, root: str = "") -> Image:
    """A picture, decoded, upright and in RGB, as `transformers.image_utils.load_image` gives it; of several frames the first.

    :param value: see `file_bytes`.
    :raises ValueError: if it is none that Pillow reads whole, or more than `PIL.Image.MAX_IMAGE_PIXELS` large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = file_bytes(value, root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture of a known format ({len(data):,} bytes)") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"too large a picture ({len(data):,} bytes): {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a picture that can be read ({len(data):,} bytes): {error}") from error
    return image if image.mode == "RGB" else image.convert("RGB")


def to_png(image: Image) -> bytes:
    """A picture as PNG."""
    target = BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def is_sound_like(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type can hold sound: files, or structs of `array` and `sampling_rate`."""
    if pa.types.is_struct(kind) and kind.get_field_index("array") >= 0:
        return kind.get_field_index("sampling_rate") >= 0
    return is_file_like(kind)


def to_sound(value: Any, rate: int, root: str = "") -> np.ndarray:
    """Sound as one channel: float32 [samples], from -1 to 1.

    :param value: see `file_bytes` (WAV, FLAC, MP3, OGG, whatever libsndfile reads); or a dict with `array`, floats
        [samples] or [channels, samples], and `sampling_rate`.
    :param rate: samples a second of the result; other rates are converted with soxr in high quality.
    :raises ValueError: if it is no sound that can be read, or there is none in it.
    """
    import soundfile
    import soxr

    if isinstance(value, dict) and value.get("array") is not None:
        samples, own_rate = np.array(value["array"], np.float32), int(value["sampling_rate"])
        samples = samples.T if samples.ndim == 2 else samples
    else:
        data = file_bytes(value, root)
        try:
            samples, own_rate = soundfile.read(BytesIO(data), dtype="float32")
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"not a sound that can be read ({len(data):,} bytes): {error.error_string}"
            ) from error
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not len(samples):
        raise ValueError("there are no samples in it")
    if not np.isfinite(samples).all():
        raise ValueError("some samples are not finite numbers")
    return samples if own_rate == rate else soxr.resample(samples, own_rate, rate)


def to_video(value: Any, frames: Sequence[int], root: str = "") -> np.ndarray:
    """Frames of a video, RGB: uint8 [frames, height, width, 3].

    :param value: see `file_bytes`; whatever the FFmpeg of PyAV reads.
    :param frames: the numbers of the frames to take, ascending, from 0.
    :raises ValueError: if it is no video that can be read, or it ends before the last of the frames.
    """
    import av

    data = file_bytes(value, root)
    wanted, taken, count = set(frames), [], 0
    try:
        # A playlist could name other files and addresses, which a row must not be able to open.
        with av.open(BytesIO(data), container_options={"protocol_whitelist": "none"}) as container:
            if not container.streams.video:
                raise ValueError(f"there are no pictures in it ({len(data):,} bytes)")
            for frame in container.decode(video=0):
                if count in wanted:
                    taken.append(frame.to_ndarray(format="rgb24"))
                count += 1
                if count > frames[-1]:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"not a video that can be read ({len(data):,} bytes): {error.strerror}") from error
    if count <= frames[-1]:
        raise ValueError(f"the video has {count:,} of the first {frames[-1] + 1:,} frames, which are needed")
    return np.stack(taken)


def to_wav(samples: np.ndarray, rate: int) -> bytes:
    """Sound as a WAV file of 16 bits; what is louder than 1 is clipped.

    :param samples: floats from -1 to 1, [samples] or [channels, samples].
    :param rate: samples a second.
    """
    import soundfile

    target = BytesIO()
    soundfile.write(target, samples.T, rate, format="WAV", subtype="PCM_16")
    return target.getvalue()
