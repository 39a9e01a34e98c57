"""Decode-check of one image, and a new encoding of those that a reader of examples couldn't take as they are."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from finecap_ray.images import LINE, as_rgb, is_line, upright

# Pillow can open more, among them EPS, which starts a program.
READABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


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
        try:
            # GIF and TIFF are never kept as they are, and would have to look for the end of the file to count their frames.
            kept = image.format in ("JPEG", "PNG", "WEBP") and getattr(image, "n_frames", 1) == 1
            image.load()
        except Image.DecompressionBombError:
            raise
        except Exception:
            raise BadImageError("truncated or damaged image") from None
        if not min(image.size):
            raise BadImageError("image without pixels")
        if is_line(image.size):
            raise BadImageError(LINE)
        turned = upright(image)
        plain = image.mode in ("RGB", "L") or (image.mode == "P" and "transparency" not in image.info)
        small = longest_side is None or max(image.size) <= longest_side
        if kept and plain and small and turned is image:
            return data, False
        try:
            rgb = as_rgb(turned)
        except ValueError as error:
            raise BadImageError(str(error)) from None
        if longest_side is not None:
            rgb.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)  # never larger than it was
        if is_line(rgb.size):  # by rounding
            raise BadImageError(LINE)
        out = io.BytesIO()
        rgb.save(out, "JPEG", quality=jpeg_quality)
        return out.getvalue(), True
