"""Encoded images -> pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image

from finecap_ray.errors import DataError

_LONGEST = 100  # times its width: image processors scale by the shorter side, or refuse from 200 on
LINE = f"more than {_LONGEST} times as long as wide"
_TURNED_BY = {  # EXIF orientation, of which 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """Upright RGB image; transparent parts become white. Raises DataError for bytes that can't be decoded, or that are a line."""
    try:
        image = Image.open(io.BytesIO(data))
        if is_line(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels, {LINE}")
        image.load()
        return as_rgb(upright(image))
    except Exception as error:  # decoders of damaged files raise nearly anything, AVIF's RuntimeError
        raise DataError(f"not a decodable image ({len(data)} bytes): {error}") from error


def is_line(size: tuple[int, int]) -> bool:
    """Whether an image of that width and height is too long for its width to be seen by a model."""
    return max(size) > _LONGEST * min(size)


def upright(image: Image.Image) -> Image.Image:
    """A loaded image turned as its EXIF orientation says; the image itself where that says nothing, or can't be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return image  # damaged metadata around whole pixels: nearly anything may be raised
    # Not ImageOps.exif_transpose: it writes the metadata anew, and dies of a damaged tag.
    return image.transpose(_TURNED_BY[orientation]) if orientation in _TURNED_BY else image


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparent parts white. Raises ValueError for pixels that are floating-point numbers."""
    if image.mode.startswith("I"):  # 16 bits: the high byte is the picture
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")
