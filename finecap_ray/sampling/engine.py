"""vLLM as the sampler of any captioner: its family says what the engine is built from, loads and is asked.

The engine runs inside this process (no worker process of its own) with float32 and eager mode on CPU, where its
log-probabilities then equal the trainer's to 1e-5.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

# Read by vllm at import. In-process engine; no pinning of threads, which would starve the neighbours on a shared machine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from transformers import PreTrainedModel, ProcessorMixin

from finecap_ray.captioners import family_of
from finecap_ray.config import ResourceSettings
from finecap_ray.errors import StaleWeightsError, UnsupportedError
from finecap_ray.precision import dtype_of
from finecap_ray.records import Rollout
from finecap_ray.sampling.fingerprint import fingerprints
from finecap_ray.sampling.spec import SamplingSpec
from finecap_ray.sampling.weights import as_engine_holds

SUPPORTED_VLLM = ("0.29",)
_IMAGES_TOGETHER = 64  # which wait in the engine with their pixels, in tiles up to 50 MB each
_OF_A_GPU = 0.9  # so much of its share vLLM asks for, and takes where no cache is said


class CaptionEngine:
    """A vLLM engine with loadable weights. `weights_version` is what it samples with (-1: none loaded yet)."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, resources: ResourceSettings) -> None:
        """`model` gives the architecture; its weights are not used: `load` brings them. Raises UnsupportedError for another vllm."""
        LLM = _supported_vllm()
        self.family = family = family_of(model.config, processor)
        self.dtype = getattr(torch, dtype_of(resources.sampler_dtype, resources.use_gpu))
        self.weights_version = -1
        self._loaded: dict[str, torch.Tensor] = {}  # until somebody asks for their fingerprints
        self._fingerprints: dict[str, str] = {}
        self._prefix, beside = family.beside_engine(model) or ("", None)
        self.beside = deepcopy(beside)  # else the file that the model was loaded from stays mapped, all of it
        if self.beside is not None:
            self.beside.eval().requires_grad_(False)
        self._names = family.engine_names(model)
        with tempfile.TemporaryDirectory() as folder:
            family.save_for_engine(model, Path(folder))
            self.llm = LLM(
                folder,
                dtype=self.dtype,
                load_format="dummy",
                max_num_seqs=resources.sampler_max_sequences,
                kv_cache_memory_bytes=resources.kv_cache_bytes,
                gpu_memory_utilization=_OF_A_GPU * resources.gpu_share,
                enforce_eager=not torch.cuda.is_available(),
                enable_prefix_caching=family.reads == "image",  # the captions of an image share its prompt
                # A prompt that a step of the engine has no room for is cut, what is drawn behind the piece thrown away, and the
                # generator of its seed turned back: on a CPU there is no turning back.
                enable_chunked_prefill=torch.cuda.is_available(),
                logprobs_mode="processed_logprobs",
                logits_processors=_without(family.banned_token_ids),
                disable_log_stats=True,
                **family.engine_options(),
            )
        if not torch.cuda.is_available():
            from finecap_ray.sampling.noise import use_seeded_sampler

            self.llm.collective_rpc(use_seeded_sampler)

    def load(self, weights_version: int, tensors: dict[str, torch.Tensor]) -> None:
        """Loads the state dict of the trained model. Raises StaleWeightsError where a tensor is missing from it."""
        beside = [] if self.beside is None else [f"{self._prefix}{name}" for name in self.beside.state_dict()]
        names = [*beside, *self._names]
        if missing := [name for name in names if name not in tensors]:
            raise StaleWeightsError(
                f"weights {weights_version} came without {', '.join(missing)}: the sampler keeps weights {self.weights_version}"
            )
        if self.beside is not None:
            self.beside.load_state_dict({name.removeprefix(self._prefix): tensors[name].float() for name in beside})
        inside = [(ours, tensors[theirs]) for theirs, ours in self._names.items()]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": inside})
        if self.family.reads == "image":
            self.llm.reset_prefix_cache()
            # The worker has dropped what it made of images by the old weights; the scheduler still counts on it.
            self.llm.llm_engine.engine_core.reset_encoder_cache()
            self.llm.llm_engine.reset_mm_cache()
        self._loaded = {name: tensors[name] for name in names}
        self.weights_version = weights_version

    def as_held(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The weights of a model of this architecture, as `load` takes them, in the types that this engine holds them in."""
        return as_engine_holds(model.state_dict(), self.dtype, self._prefix or None)

    def fingerprints(self) -> dict[str, str]:
        """Of the tensors that were loaded, which therefore must not change meanwhile, by their names in the trained model."""
        if self._loaded:
            self._fingerprints, self._loaded = fingerprints(self._loaded), {}
        return self._fingerprints

    @torch.inference_mode()
    def sample(
        self,
        image_ids: Sequence[str],
        images: Any,
        spec: SamplingSpec | Sequence[SamplingSpec],
        seeds: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """N images -> N * captions_per_image rollouts, those of an image side by side. `spec` is one for all or one per image.

        images: what the family's `images_of` gives: features [N, F], or N encoded images.
        """
        from vllm import SamplingParams

        specs = [spec] * len(image_ids) if isinstance(spec, SamplingSpec) else spec
        params = [
            SamplingParams(
                n=one.captions_per_image,
                temperature=one.temperature,
                max_tokens=one.max_tokens,
                seed=None if seeds is None else seeds[row],
                stop_token_ids=list(self.family.end_token_ids[1:]),
                logprobs=0,
                # Without these the engine makes text of every token, and of every log-prob's token, one at a time.
                detokenize=False,
                flat_logprobs=True,
            )
            for row, one in enumerate(specs)
        ]
        prompts = self.family.requests(images, self.beside, self.dtype)
        together = _IMAGES_TOGETHER if self.family.reads == "image" else max(1, len(params))
        outputs = []
        for start in range(0, len(params), together):
            own = params[start : start + together]
            outputs += self.llm.generate(list(islice(prompts, len(own))), own, use_tqdm=False)
        captions = [
            (image_id, self.family.prompt_of(output.prompt_token_ids), caption)
            for image_id, output in zip(image_ids, outputs, strict=True)
            for caption in output.outputs
        ]
        tokens = [caption.token_ids for *_, caption in captions]
        texts = self.family.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Rollout(
                image_id=image_id,
                prompt_token_ids=prompt,
                token_ids=tuple(caption.token_ids),
                logprobs=tuple(caption.logprobs.logprobs[start] for start in caption.logprobs.start_indices),
                text=text,
                finish_reason=caption.finish_reason,
                weights_version=self.weights_version,
            )
            for (image_id, prompt, caption), text in zip(captions, texts, strict=True)
        ]


def _without(token_ids: Sequence[int]) -> list[type] | None:
    """For vLLM: what takes tokens out of every distribution that is sampled from."""
    if not token_ids:
        return None
    from finecap_ray.sampling.banned import banned_tokens

    return [banned_tokens(token_ids)]


def _supported_vllm():
    import vllm

    found = getattr(vllm, "__version__", None) or version("vllm")
    if not found.startswith(SUPPORTED_VLLM):
        raise UnsupportedError(
            f"vllm {found} is installed; this version of finecap-ray runs on {', '.join(SUPPORTED_VLLM)}.x"
        )
    return vllm.LLM
