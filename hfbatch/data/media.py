"""Bytes, paths and Hugging Face's `Image` structs to pictures. Knows nothing of models."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

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
    """A picture, decoded. :param value: see `file_bytes`. :raises ValueError: if it is none that Pillow reads."""
    from PIL import Image, UnidentifiedImageError

    data = file_bytes(value, root)
    try:
        image = Image.open(BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"not a picture that can be read ({len(data):,} bytes): {error}") from error
    return image


def to_png(image: Image) -> bytes:
    """A picture as PNG."""
    target = BytesIO()
    image.save(target, "PNG")
    return target.getvalue()
