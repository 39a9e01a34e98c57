"""Images of a report as data URIs, small enough for a page of 500 bags."""

from __future__ import annotations

import base64
import io

from finecap_ray.errors import DataError
from finecap_ray.images import decode_image

SIDE = 192  # pixels of the longer side; a cell shows 144, a dense screen more
_SIGNATURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}
_SMALL = 6_000  # bytes that are kept as they are


def data_uri(image: bytes, image_id: str) -> str:
    """A small image of a kind that browsers show as it is, another one as WebP of at most 192 pixels. Raises DataError for one
    that can't be decoded."""
    kind = next((kind for signature, kind in _SIGNATURES.items() if image.startswith(signature)), None)
    if kind is None or len(image) > _SMALL:
        image, kind = _smaller(image, image_id), "image/webp"
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _smaller(image: bytes, image_id: str) -> bytes:
    try:
        picture = decode_image(image)
    except DataError as error:
        raise DataError(f"image {image_id}: {error}") from error
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=75, method=2)
    return file.getvalue()
