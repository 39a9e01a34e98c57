"""Encoded images -> pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps

from finecap_ray.errors import DataError


def decode_image(data: bytes) -> Image.Image:
    """Upright RGB image; transparent parts become white. Raises DataError for bytes that can't be decoded."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return as_rgb(upright(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"not a decodable image ({len(data)} bytes): {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """A loaded image turned as its EXIF orientation says; the image itself where that says nothing, or can't be read."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:
        return image  # damaged metadata around whole pixels: nearly anything may be raised
    return ImageOps.exif_transpose(image) if turned else image


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
