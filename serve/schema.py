"""What the captioning service takes and gives: the JSON of requests, responses and errors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ErrorType = Literal[
    "invalid_request", "not_an_image", "image_too_large", "unsupported_media_type", "not_found", "overloaded",
    "not_ready", "timeout", "internal",
]  # fmt: skip
HTTP_STATUS: dict[ErrorType, int] = {
    "invalid_request": 422,
    "not_an_image": 400,
    "image_too_large": 413,
    "unsupported_media_type": 415,
    "not_found": 404,
    "overloaded": 503,
    "not_ready": 503,
    "timeout": 504,
    "internal": 500,
}


class CaptionParameters(BaseModel):
    """How captions are drawn; in a multipart request these are form fields beside the file `image`."""

    model_config = ConfigDict(extra="forbid")

    n: int = Field(1, description="Captions of the image: 1 to the service's `max_captions`.")
    temperature: float | None = Field(
        None, description="0 (greedy, one caption) to 2. Left out: 0 for one caption, 1 for several."
    )
    max_tokens: int | None = Field(
        None,
        description="1 to the service's `max_tokens`. Left out: its `default_max_tokens`, of the longest caption it was trained on.",
    )


class CaptionRequest(CaptionParameters):
    image: str = Field(description="JPEG, PNG, WebP, GIF or BMP, base64-encoded.")


class Caption(BaseModel):
    text: str
    logprob: float = Field(description="Summed over the tokens, in nats, of the distribution that was sampled from.")
    tokens: int = Field(description="With the end token, where the caption ended by itself.")
    finish_reason: str = Field(description="stop: ended by itself; length: cut at max_tokens.")


class Model(BaseModel):
    captioner: str = Field(description="The captioner's folder and the one above it.")
    weights: str = Field(description="Digest of the captioner's weights.")


class CaptionResponse(BaseModel):
    captions: list[Caption]
    model: Model
    seconds: float = Field(description="From the whole request read to the answer.")


class Limits(BaseModel):
    max_image_bytes: int
    max_image_pixels: int
    max_captions: int
    max_tokens: int
    default_max_tokens: int


class Health(BaseModel):
    status: Literal["ready"]
    replicas: int
    model: Model
    limits: Limits


class Error(BaseModel):
    type: ErrorType
    message: str


class ErrorResponse(BaseModel):
    error: Error


class RequestError(Exception):
    """A request that gets an ErrorResponse."""

    def __init__(self, type: ErrorType, message: str) -> None:
        super().__init__(message)
        self.type = type
