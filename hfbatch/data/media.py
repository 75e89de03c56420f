"""Bytes, paths and Hugging Face's `Image`, `Audio` and `Video` structs to pictures, sound and frames. Knows nothing of models.

What a file expands to is judged by its header before it is decoded, and again while it is, since headers may lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.data.media_files import RowFiles

if TYPE_CHECKING:
    from PIL.Image import Image

NO_FILES = RowFiles()
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats of pictures that are read. Pillow knows more, of which some start a program, such as EPS does with `gs`."""
LOWEST_RATE = 1000
"""Fewest samples a second that sound has; fewer would become too many at the rate of a model."""
FULL_RATE = 96_000
"""Samples of all channels that a second has at most, before it counts as longer: two channels at 48 kHz."""
BLOCK = 1 << 20
"""Samples of all channels that are decoded at a time."""
FRAMES_TOGETHER = 4
"""How many times the pixels of the largest picture the frames that are taken of a video may have together."""


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


def to_image(value: Any, files: RowFiles = NO_FILES) -> Image:
    """A picture, decoded, upright and in RGB, as `transformers.image_utils.load_image` gives it; of several frames the first.

    :param value: see `RowFiles.read`; a file of one of the formats in PICTURES.
    :raises ValueError: if it is none that Pillow reads whole, or has more pixels than `input.files.max_pixels`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = files.read(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower or meant
            image = Image.open(BytesIO(data), formats=PICTURES)
            _check_pixels("picture", image.width, image.height, files)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture of a known format ({len(data):,} bytes)") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large a picture for any {files.spec}.max_pixels: {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a picture that can be read ({len(data):,} bytes): {error}") from error
    return image if image.mode == "RGB" else image.convert("RGB")


def _most_pixels(files: RowFiles) -> int:
    """Pixels that the rules allow a picture; those that Pillow warns of where they say nothing."""
    from PIL import Image

    return files.rules.max_pixels or Image.MAX_IMAGE_PIXELS or 89_478_485


def _check_pixels(what: str, width: int, height: int, files: RowFiles, count: int = 1) -> None:
    """:raises ValueError: for more pixels than the rules allow, in one picture or in several frames together."""
    most = _most_pixels(files)
    if width * height > most or width * height * count > FRAMES_TOGETHER * most:
        frames = f"{count} frames of " if count > 1 else ""
        raise ValueError(
            f"too large a {what} of {frames}{width} x {height} = {width * height * count} pixels; "
            f"{files.spec}.max_pixels is {most:,}; raise it if that is meant"
        )


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


def to_sound(value: Any, rate: int, files: RowFiles = NO_FILES) -> np.ndarray:
    """Sound as one channel: float32 [samples], from -1 to 1.

    :param value: see `RowFiles.read` (WAV, FLAC, MP3, OGG, whatever libsndfile reads); or a dict with `array`, floats
        [samples] or [channels, samples], and `sampling_rate`.
    :param rate: samples a second of the result; other rates are converted with soxr in high quality.
    :raises ValueError: if it is no sound that can be read, there is none in it, or it is longer than
        `input.files.max_seconds`.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        samples, own = np.array(value["array"], np.float32), int(value["sampling_rate"] or 0)
        samples = samples.T if samples.ndim == 2 else samples
        _check_length(len(samples), 1, own, files)
        return _resampled(iter([samples]), own, rate)
    return _decoded(files.read(value), rate, files)


def _decoded(data: bytes, rate: int, files: RowFiles) -> np.ndarray:
    """A file of sound, block by block, so that no more than the result and a block are in memory."""
    import soundfile

    def blocks() -> Iterator[np.ndarray]:
        count = 0
        while len(block := file.read(max(BLOCK // file.channels, 1), dtype="float32")):
            count += len(block)
            _check_length(count, file.channels, file.samplerate, files)  # the header may say less, or nothing
            yield block

    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            known = file.frames if file.frames < 1 << 62 else 0  # some formats do not say
            _check_length(known, file.channels, file.samplerate, files)
            return _resampled(blocks(), file.samplerate, rate)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"not a sound that can be read ({len(data):,} bytes): {error.error_string}"
        ) from error


def _check_length(frames: int, channels: int, rate: int, files: RowFiles) -> None:
    """:raises ValueError: for a rate that no sound has, and a recording that is longer than the rules allow."""
    if rate < LOWEST_RATE:
        raise ValueError(f"the sampling rate is {rate} Hz; sound has {LOWEST_RATE:,} Hz or more")
    seconds = max(frames / rate, frames * channels / FULL_RATE)
    if seconds > files.rules.max_seconds:
        raise ValueError(
            f"too long a recording: {frames:,} samples of {channels} channels at {rate:,} Hz count as {seconds:,.0f} s, "
            f"{files.spec}.max_seconds is {files.rules.max_seconds:,g}; raise it if that is meant"
        )


def _resampled(blocks: Iterator[np.ndarray], own: int, rate: int) -> np.ndarray:
    """One channel at another rate: float32 [samples]; bit for bit what soxr makes of it as a whole.

    :param blocks: samples at their own rate, [samples] or [samples, channels].
    """
    import soxr

    stream = soxr.ResampleStream(own, rate, 1, dtype="float32") if own != rate else None
    parts, count = [], 0
    for block in blocks:
        mono = block.mean(axis=1) if block.ndim == 2 else block
        if not np.isfinite(mono).all():
            raise ValueError("some samples are not finite numbers")
        count += len(mono)
        parts.append(stream.resample_chunk(mono) if stream else mono)
    if not count:
        raise ValueError("there are no samples in it")
    if stream:
        parts.append(stream.resample_chunk(np.empty(0, np.float32), last=True))
    return np.concatenate(parts)


def to_video(value: Any, frames: Sequence[int], files: RowFiles = NO_FILES) -> np.ndarray:
    """Frames of a video, RGB: uint8 [frames, height, width, 3].

    :param value: see `RowFiles.read`; whatever the FFmpeg of PyAV reads.
    :param frames: the numbers of the frames to take, ascending, from 0.
    :raises ValueError: if it is no video that can be read, it ends before the last of the frames, or these have too
        many pixels for `input.files.max_pixels`.
    """
    import av

    data = files.read(value)
    wanted, taken, count = set(frames), [], 0
    # For FFmpeg itself, since a stream may change its size on the way; it counts the padding of its buffers too.
    limits = {"max_pixels": str(2 * _most_pixels(files) + (1 << 20))}
    try:
        # A playlist could name other files and addresses, which a row must not be able to open.
        with av.open(
            BytesIO(data), options=limits, container_options={"protocol_whitelist": "none"}
        ) as container:
            if not container.streams.video:
                raise ValueError(f"there are no pictures in it ({len(data):,} bytes)")
            codec = container.streams.video[0].codec_context
            codec.options = limits
            _check_pixels("video", codec.width, codec.height, files, len(wanted))
            for frame in container.decode(video=0):
                if count in wanted:
                    _check_pixels("video", frame.width, frame.height, files, len(wanted))
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
