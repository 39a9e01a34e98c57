"""Images that a source names by URL only. They are fetched when the user asks for it, and never otherwise."""

from __future__ import annotations

import http.client
import string
import urllib.parse
import urllib.request
from dataclasses import dataclass

NOT_FETCHED = "image URL, not fetched (importing.fetch_urls)"
NO_WEB_ADDRESS = "image URL that is neither http nor https"
NOT_ANSWERED = "image URL that gives no image"
TOO_LARGE = "image URL that gives too many bytes"


@dataclass(frozen=True, slots=True)
class Fetching:
    """How URLs are fetched."""

    timeout_s: float
    max_bytes: int  # of one image; what gives more is left out


def fetch(url: str, fetching: Fetching) -> tuple[bytes, str | None]:
    """The bytes at a URL, or the reason why there are none."""
    if not url.lower().startswith(("http://", "https://")):  # file:// would read this machine's own files
        return b"", NO_WEB_ADDRESS
    try:
        # Addresses in data are as people write them, with spaces and accents; % is safe: what is quoted stays as it is.
        quoted = urllib.parse.quote(url.strip(), safe=string.punctuation)
        with urllib.request.urlopen(quoted, timeout=fetching.timeout_s) as answer:
            data = answer.read(fetching.max_bytes + 1)
    except (OSError, ValueError, http.client.HTTPException):
        return b"", NOT_ANSWERED
    return (b"", TOO_LARGE) if len(data) > fetching.max_bytes else (data, None)
