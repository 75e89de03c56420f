"""Images as files: what transformers makes of them, or an error that says what is wrong. No model takes part."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from hfbatch.data.media import to_image

RANDOM = np.random.default_rng(0)
ORIENTATION, QUARTER_TURN = 0x0112, 6
"""The tag of EXIF, and its value for an image that has to be turned clockwise once."""


def noise(mode: str = "RGB", height: int = 23, width: int = 41) -> Image.Image:
    pixels = RANDOM.integers(0, 255, height * width * len(mode), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    return file_of(noise(), "JPEG", exif=exif)


def damaged(file: bytes) -> bytes:
    middle = len(file) // 2
    return file[:middle] + bytes(16) + file[middle + 16 :]


def palette_with_alpha() -> bytes:
    return file_of(noise("RGBA").quantize(16), "PNG", transparency=bytes(range(0, 160, 10)))


def animated(kind: str) -> bytes:
    return file_of(noise(), kind, save_all=True, append_images=[noise(), noise()])


GOOD = {
    "rgb": lambda: file_of(noise(), "PNG"),
    "grey": lambda: file_of(noise("L"), "PNG"),
    "bits": lambda: file_of(noise("L").convert("1"), "PNG"),
    "alpha": lambda: file_of(noise("RGBA"), "PNG"),
    "grey and alpha": lambda: file_of(noise("RGBA").convert("LA"), "PNG"),
    "palette": lambda: file_of(noise().quantize(16), "PNG"),
    "palette with alpha": palette_with_alpha,
    "cmyk": lambda: file_of(noise("CMYK"), "JPEG"),
    "sixteen bits": lambda: file_of(Image.fromarray(RANDOM.integers(0, 65535, (19, 31), np.uint16)), "PNG"),
    "one pixel": lambda: file_of(noise(height=1, width=1), "PNG"),
    "rotated": rotated,
    "progressive": lambda: file_of(noise(), "JPEG", progressive=True),
    "gif": lambda: animated("GIF"),
    "webp": lambda: animated("WEBP"),
    "tiff": lambda: animated("TIFF"),
    "bmp": lambda: file_of(noise(), "BMP"),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_image_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    file = GOOD[name]()
    (tmp_path / "picture").write_bytes(file)
    expected = load_image(str(tmp_path / "picture"))
    found = to_image(file)
    assert found.mode == "RGB"
    assert found.size == expected.size
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_an_image_is_turned_upright() -> None:
    assert to_image(rotated()).size == (23, 41)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", r"not an image of a known format \(0 bytes\)"),
        (b"neither a picture nor a path", r"not an image of a known format \(28 bytes\)"),
        (file_of(noise(), "JPEG")[:-500], r"can be read .*truncated"),
        (file_of(noise(height=60, width=60), "PNG")[:-5000], r"can be read .*truncated"),
        (damaged(file_of(noise(height=60, width=60), "PNG")), r"can be read .*broken"),
        (file_of(noise(), "PNG")[:20], r"not an image"),
        (file_of(noise(), "GIF")[:-300], r"can be read .*truncated"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_reason(file: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        to_image(file)
    assert "0x" not in str(caught.value)  # no address, which would differ from run to run


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("excess", [1.5, 3])
def test_an_image_that_would_fill_the_memory_is_an_error(excess: float, monkeypatch: Any) -> None:
    file = file_of(Image.new("1", (600, 400)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(600 * 400 / excess))
    with pytest.raises(ValueError, match=r"the image is too large.*240000 pixels"):
        to_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600 * 400)
    assert to_image(file).size == (600, 400)
