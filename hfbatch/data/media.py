"""Decodes bytes, paths and Hugging Face's `Image`, `Audio` and `Video` structs to images, audio and frames.

The decoded size of a file is checked by its header before decoding, and again during it, since headers may be wrong.
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
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The image formats that are read. Pillow reads more, some by starting a program, such as `gs` for EPS."""
LOWEST_RATE = 1000
"""Lowest sampling rate; audio of lower rates would become too long at the rate of a model."""
FULL_RATE = 96_000
"""Samples of all channels that count as one second at most: two channels at 48 kHz."""
BLOCK = 1 << 20
"""Samples of all channels in one decoded block."""
FRAMES_TOGETHER = 4
"""Most pixels of all frames taken from a video, as a multiple of the most pixels of an image."""


def is_file_like(kind: pa.DataType) -> bool:
    """Returns whether a column of this type can hold files: bytes, paths or URLs, or structs of `bytes` and `path`."""
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
    """Decodes an image, upright and in RGB, as `transformers.image_utils.load_image` does; of several frames the first.

    :param value: see `RowFiles.read`; a file of one of the formats above.
    :raises ValueError: if Pillow cannot decode it completely, or it has more pixels than `input.files.max_pixels`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = files.read(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower or intended
            image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
            _check_pixels("image", image.width, image.height, files)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image of a known format ({len(data):,} bytes)") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large for any {files.spec}.max_pixels: {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not an image that can be read ({len(data):,} bytes): {error}") from error
    return image if image.mode == "RGB" else image.convert("RGB")


def _most_pixels(files: RowFiles) -> int:
    """Returns the most pixels of an image by the rules; by default the number above which Pillow warns."""
    from PIL import Image

    return files.rules.max_pixels or Image.MAX_IMAGE_PIXELS or 89_478_485


def _check_pixels(what: str, width: int, height: int, files: RowFiles, count: int = 1) -> None:
    """:raises ValueError: for more pixels than the rules allow, in one image or in several frames together."""
    most = _most_pixels(files)
    if width * height > most or width * height * count > FRAMES_TOGETHER * most:
        frames = f"{count} frames of " if count > 1 else ""
        raise ValueError(
            f"the {what} is too large: {frames}{width} x {height} = {width * height * count} pixels; "
            f"{files.spec}.max_pixels is {most:,}; raise it to allow this"
        )


def to_png(image: Image) -> bytes:
    """Encodes an image as PNG."""
    target = BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def is_audio_like(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type can hold audio: files, or structs of `array` and `sampling_rate`."""
    if pa.types.is_struct(kind) and kind.get_field_index("array") >= 0:
        return kind.get_field_index("sampling_rate") >= 0
    return is_file_like(kind)


def to_audio(value: Any, rate: int, files: RowFiles = NO_FILES) -> np.ndarray:
    """Decodes audio to one channel: float32 [samples], from -1 to 1.

    :param value: see `RowFiles.read` (WAV, FLAC, MP3, OGG, whatever libsndfile reads); or a dict with `array`, floats
        [samples] or [channels, samples], and `sampling_rate`.
    :param rate: sampling rate of the result; other rates are resampled with soxr in high quality.
    :raises ValueError: if the audio cannot be read, is empty, or is longer than `input.files.max_seconds`.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        samples, own = np.array(value["array"], np.float32), int(value["sampling_rate"] or 0)
        samples = samples.T if samples.ndim == 2 else samples
        _check_length(len(samples), 1, own, files)
        return _resampled(iter([samples]), own, rate)
    return _decoded(files.read(value), rate, files)


def _decoded(data: bytes, rate: int, files: RowFiles) -> np.ndarray:
    """Decodes an audio file block by block, so that only the result and one block are in memory."""
    import soundfile

    def blocks() -> Iterator[np.ndarray]:
        count = 0
        while len(block := file.read(max(BLOCK // file.channels, 1), dtype="float32")):
            count += len(block)
            _check_length(count, file.channels, file.samplerate, files)  # the header may be wrong
            yield block

    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            known = file.frames if file.frames < 1 << 62 else 0  # some formats do not give it
            _check_length(known, file.channels, file.samplerate, files)
            return _resampled(blocks(), file.samplerate, rate)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"not audio that can be read ({len(data):,} bytes): {error.error_string}") from error


def _check_length(frames: int, channels: int, rate: int, files: RowFiles) -> None:
    """:raises ValueError: for a sampling rate that is too low, or a recording that is longer than the rules allow."""
    if rate < LOWEST_RATE:
        raise ValueError(f"the sampling rate is {rate} Hz; it has to be {LOWEST_RATE:,} Hz or more")
    seconds = max(frames / rate, frames * channels / FULL_RATE)
    if seconds > files.rules.max_seconds:
        raise ValueError(
            f"the recording is too long: {frames:,} samples of {channels} channels at {rate:,} Hz count as {seconds:,.0f} s, "
            f"{files.spec}.max_seconds is {files.rules.max_seconds:,g}; raise it to allow this"
        )


def _resampled(blocks: Iterator[np.ndarray], own: int, rate: int) -> np.ndarray:
    """Mixes blocks to one channel and resamples them: float32 [samples], bit-identical to soxr on the whole signal.

    :param blocks: samples at the original rate, [samples] or [samples, channels].
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
        raise ValueError("the audio holds no samples")
    if stream:
        parts.append(stream.resample_chunk(np.empty(0, np.float32), last=True))
    return np.concatenate(parts)


def to_video(value: Any, frames: Sequence[int], files: RowFiles = NO_FILES) -> np.ndarray:
    """Decodes frames of a video to RGB: uint8 [frames, height, width, 3].

    :param value: see `RowFiles.read`; any format that PyAV's FFmpeg reads.
    :param frames: the numbers of the frames to take, ascending, from 0.
    :raises ValueError: if the video cannot be read, ends before the last of the frames, or these have more pixels than
        `input.files.max_pixels` allows.
    """
    import av

    data = files.read(value)
    wanted, taken, count = set(frames), [], 0
    # A limit for FFmpeg itself, since a stream may change its size; FFmpeg also counts the padding of its buffers.
    limits = {"max_pixels": str(2 * _most_pixels(files) + (1 << 20))}
    try:
        # A playlist could name other files and addresses, which a row must not be able to open.
        with av.open(
            BytesIO(data), options=limits, container_options={"protocol_whitelist": "none"}
        ) as container:
            if not container.streams.video:
                raise ValueError(f"the file has no video stream ({len(data):,} bytes)")
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
    """Encodes audio as a WAV file of 16 bits; clips values beyond 1.

    :param samples: floats from -1 to 1, [samples] or [channels, samples].
    :param rate: sampling rate.
    """
    import soundfile

    target = BytesIO()
    soundfile.write(target, samples.T, rate, format="WAV", subtype="PCM_16")
    return target.getvalue()
