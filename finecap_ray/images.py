"""Encoded images -> pictures."""

from __future__ import annotations

import io

from PIL import Image

from finecap_ray.errors import DataError


def decode_image(data: bytes) -> Image.Image:
    """RGB image; transparent parts become white. Raises DataError for bytes that can't be decoded."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"not a decodable image ({len(data)} bytes): {error}") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
