"""Decode-check of one image, and a new encoding of those that a reader of examples couldn't take as they are."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# Pillow can open more, among them EPS, which starts a program.
READABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


class BadImageError(Exception):
    """The image is left out; the message is the reason it is counted under."""


def usable_image(data: bytes, longest_side: int | None, jpeg_quality: int) -> tuple[bytes, bool]:
    """`data` itself, or a JPEG made of it, and whether it was made.

    Kept as they are: upright JPEG, PNG and WebP with one frame, 8 bits, no transparency, and no side over
    `longest_side` pixels. All else becomes an upright RGB JPEG: the first frame, transparency on white.
    Raises BadImageError for what isn't a whole image.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata, and sizes under twice Pillow's limit of pixels
            return _usable(data, longest_side, jpeg_quality)
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {2 * Image.MAX_IMAGE_PIXELS} pixels") from None


def _usable(data: bytes, longest_side: int | None, jpeg_quality: int) -> tuple[bytes, bool]:
    # Decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error, ValueError, MemoryError, ...
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except Image.DecompressionBombError:
        raise
    except Exception:
        raise BadImageError("can't be opened as an image") from None
    with image:
        kind, frames = image.format, getattr(image, "n_frames", 1)
        try:
            image.load()
        except Image.DecompressionBombError:
            raise
        except Exception:
            raise BadImageError("truncated or damaged image") from None
        if not min(image.size):
            raise BadImageError("image without pixels")
        try:
            turned = image.getexif().get(ORIENTATION, 1) != 1
        except Exception:
            turned = False  # damaged metadata around whole pixels
        plain = image.mode in ("RGB", "L") or (image.mode == "P" and "transparency" not in image.info)
        small = longest_side is None or max(image.size) <= longest_side
        if kind in ("JPEG", "PNG", "WEBP") and frames == 1 and plain and small and not turned:
            return data, False
        upright = ImageOps.exif_transpose(image) if turned else image
        return _as_jpeg(_as_rgb(upright), longest_side, jpeg_quality), True


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: the high byte is the picture
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImageError("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _as_jpeg(image: Image.Image, longest_side: int | None, quality: int) -> bytes:
    if longest_side is not None:
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)  # never larger than it was
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
