"""Whether a model can be had from a hub, told in seconds and before Ray starts. Nothing is downloaded here."""

from __future__ import annotations

import httpx
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from finecap_ray.errors import ConfigError, UnsupportedError

_TIMEOUT_S = 10
_CONFIGS = ("config.json", "open_clip_config.json")


def check_hub(repo: str, setting: str) -> None:
    """`setting` names what asks for it. Raises ConfigError for a model that the hub doesn't have, UnsupportedError without a hub."""
    try:
        if any(isinstance(try_to_load_from_cache(repo, name), str) for name in _CONFIGS):
            return
        HfApi().model_info(repo, timeout=_TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{setting}: no folder {repo!r}, and the hub has no model of that name that you may read"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise UnsupportedError(
            f"{setting}: there is no folder {repo!r}, it isn't in the cache, and this machine reaches no model hub "
            f"({type(error).__name__}): give a folder"
        ) from error
