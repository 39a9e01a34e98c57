"""Reads a captioning request off HTTP, multipart or JSON, and refuses what is too large before it is held or decoded."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.types import Message

from finecap_ray.config import ServeSettings
from serve.schema import CaptionParameters, CaptionRequest, RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # not all of Pillow's: EPS, say, starts Ghostscript
_ENVELOPE_BYTES = 64 * 2**10  # room for the other fields of a request and its multipart or JSON marks
_MULTIPART = "multipart/form-data"
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class ImageRequest:
    image: bytes  # encoded; its header says that it is an image of an accepted format and size
    parameters: CaptionParameters


async def read_request(request: Request, settings: ServeSettings) -> ImageRequest:
    """Raises RequestError for what can't be read, is no image, or is too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _MULTIPART:
        async with _limited(request, settings.max_image_bytes + _ENVELOPE_BYTES).form(max_files=1) as form:
            image, parameters = await _of_form(form)
    elif kind == _JSON:
        limit = settings.max_image_bytes * 4 // 3 + _ENVELOPE_BYTES
        image, parameters = _of_json(await _limited(request, limit).body())
    else:
        raise RequestError(
            "unsupported_media_type",
            f"send {_MULTIPART} with a file `image`, or {_JSON} with a base64 `image`; got {kind!r}",
        )
    _check_image(image, settings)
    return ImageRequest(image, parameters)


def _limited(request: Request, max_bytes: int) -> Request:
    """The same request, whose body raises RequestError past `max_bytes`, whatever its headers promise."""
    too_large = RequestError(
        "image_too_large",
        f"the request is larger than the {max_bytes} bytes that this service reads: send a smaller image",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
        if received > max_bytes:
            raise too_large
        return message

    return Request(request.scope, receive)


async def _of_form(form: FormData) -> tuple[bytes, CaptionParameters]:
    fields: dict[str, Any] = dict(form)
    image = fields.pop("image", None)
    if not isinstance(image, UploadFile):
        raise RequestError("invalid_request", "the form needs a file named `image`")
    try:
        parameters = CaptionParameters.model_validate(fields)
    except ValidationError as error:
        raise RequestError("invalid_request", _explain(error)) from None
    return await image.read(), parameters


def _of_json(body: bytes) -> tuple[bytes, CaptionParameters]:
    try:
        parsed = CaptionRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestError("invalid_request", _explain(error)) from None
    try:
        return base64.b64decode(parsed.image, validate=True), parsed
    except (binascii.Error, ValueError) as error:
        raise RequestError("not_an_image", f"`image` isn't base64: {error}") from None


def _check_image(image: bytes, settings: ServeSettings) -> None:
    """Reads no more than the header of the image."""
    if len(image) > settings.max_image_bytes:
        raise RequestError(
            "image_too_large", f"the image has {len(image)} bytes, this service takes up to {settings.max_image_bytes}"
        )
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError as error:
        raise RequestError("image_too_large", str(error)) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise RequestError(
            "not_an_image", f"not an image of the formats {', '.join(FORMATS)} ({len(image)} bytes)"
        ) from error
    if width * height > settings.max_image_pixels:
        raise RequestError(
            "image_too_large",
            f"the image has {width} x {height} pixels, this service takes up to {settings.max_image_pixels}",
        )


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in issue['loc']) or 'body'}: {issue['msg']}" for issue in error.errors()
    )
