"""Images of a report as data URIs, small enough for a page of 500 bags."""

from __future__ import annotations

import base64
import io

from PIL import Image

from finecap_ray.errors import DataError

SIDE = 192  # pixels of the longer side; a cell shows 144, a dense screen more
_SIGNATURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}
_SMALL = 6_000  # bytes that are kept as they are


def data_uri(image: bytes, image_id: str) -> str:
    """A small image as it is, a larger one as WebP of at most 192 pixels. Raises DataError for a kind browsers don't show."""
    kind = next((kind for signature, kind in _SIGNATURES.items() if image.startswith(signature)), None)
    if kind is None:
        raise DataError(f"image {image_id} begins with {image[:4]!r}: a report shows JPEG, PNG, GIF and WebP")
    if len(image) > _SMALL:
        image, kind = _smaller(image), "image/webp"
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _smaller(image: bytes) -> bytes:
    with Image.open(io.BytesIO(image)) as picture:
        picture.thumbnail((SIDE, SIDE))
        picture = picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB")
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=75, method=2)
    return file.getvalue()
