"""vLLM as the sampler of a ClipCap: the mapper runs here, the decoder in the engine, which takes prefix embeddings.

The engine runs inside this process (no worker process of its own) with float32 and eager mode on CPU, where its
log-probabilities then equal the trainer's to 1e-5.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

# Read by vllm at import. In-process engine; no pinning of threads, which would starve the neighbours on a shared machine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import torch
from jaxtyping import Float16

from finecap_ray.captioners.clipcap import ClipCapForConditionalGeneration, ClipCapProcessor
from finecap_ray.errors import StaleWeightsError, UnsupportedError
from finecap_ray.records import Rollout
from finecap_ray.sampling.fingerprint import fingerprints
from finecap_ray.sampling.spec import SamplingSpec

SUPPORTED_VLLM = ("0.29",)


class CaptionEngine:
    """A vLLM engine with loadable weights. `weights_version` is what it samples with (-1: none loaded yet)."""

    def __init__(
        self,
        model: ClipCapForConditionalGeneration,
        processor: ClipCapProcessor,
        dtype: str,
        max_sequences: int,
        kv_cache_gb: int,
    ) -> None:
        """`model` gives the architecture; its weights are not used: `load` brings them. Raises UnsupportedError for another vllm."""
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gb)
        LLM = _supported_vllm()
        self.processor = processor
        self.mapper = model.model.mapper.eval().requires_grad_(False)
        self.dtype = getattr(torch, dtype)
        self.weights_version = -1
        self.fingerprints: dict[str, str] = {}  # of the tensors that were loaded
        self._decoder_names = model.decoder_names()
        self._prompt_token_ids = tuple(processor.prompt_token_ids())
        self._eos_token_id = processor.tokenizer.eos_token_id
        decoder_config = model.decoder_config()
        with tempfile.TemporaryDirectory() as folder:
            decoder_config.save_pretrained(folder)
            processor.tokenizer.save_pretrained(folder)
            self.llm = LLM(
                str(Path(folder)),
                dtype=dtype,
                load_format="dummy",
                enable_prompt_embeds=True,
                max_model_len=decoder_config.max_position_embeddings,
                max_num_seqs=max_sequences,
                enforce_eager=not torch.cuda.is_available(),
                enable_prefix_caching=False,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
            )
        if not torch.cuda.is_available():
            from finecap_ray.sampling.noise import use_seeded_sampler

            self.llm.collective_rpc(use_seeded_sampler)

    def load(self, weights_version: int, tensors: dict[str, torch.Tensor]) -> None:
        """Loads the state dict of the trained model. Raises StaleWeightsError where a tensor is missing from it."""
        mapper_names = [f"model.mapper.{name}" for name in self.mapper.state_dict()]
        if missing := [name for name in (*mapper_names, *self._decoder_names) if name not in tensors]:
            raise StaleWeightsError(
                f"weights {weights_version} came without {', '.join(missing)}: the sampler keeps weights {self.weights_version}"
            )
        mapper = {
            name.removeprefix("model.mapper."): tensor
            for name, tensor in tensors.items()
            if name.startswith("model.mapper.")
        }
        self.mapper.load_state_dict({name: tensor.float() for name, tensor in mapper.items()})
        decoder = [(ours, tensors[theirs]) for theirs, ours in self._decoder_names.items()]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": decoder})
        self.llm.reset_prefix_cache()
        self.fingerprints = fingerprints({name: tensors[name] for name in (*mapper_names, *self._decoder_names)})
        self.weights_version = weights_version

    @torch.inference_mode()
    def sample(
        self,
        image_ids: Sequence[str],
        features: Float16[np.ndarray, "N F"],
        spec: SamplingSpec | Sequence[SamplingSpec],
        seeds: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """N images -> N * captions_per_image rollouts, those of an image side by side. `spec` is one for all or one per image."""
        from vllm import SamplingParams

        # One image at a time: the rounding of a product depends on how many rows it has, and a caption must not depend on
        # which images share its call.
        rows = torch.from_numpy(np.asarray(features, dtype=np.float32)).split(1)
        prefixes = [self.mapper(row)[0].to(self.dtype) for row in rows]
        specs = [spec] * len(image_ids) if isinstance(spec, SamplingSpec) else spec
        params = [
            SamplingParams(
                n=one.captions_per_image,
                temperature=one.temperature,
                max_tokens=one.max_tokens,
                seed=None if seeds is None else seeds[row],
                logprobs=0,
                # Without these the engine makes text of every token, and of every log-prob's token, one at a time.
                detokenize=False,
                flat_logprobs=True,
            )
            for row, one in enumerate(specs)
        ]
        outputs = self.llm.generate([{"prompt_embeds": prefix} for prefix in prefixes], params, use_tqdm=False)
        captions = [
            (image_id, caption)
            for image_id, output in zip(image_ids, outputs, strict=True)
            for caption in output.outputs
        ]
        tokens = [caption.token_ids for _, caption in captions]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Rollout(
                image_id=image_id,
                prompt_token_ids=self._prompt_token_ids,
                token_ids=tuple(caption.token_ids),
                logprobs=tuple(caption.logprobs.logprobs[start] for start in caption.logprobs.start_indices),
                text=text,
                finish_reason=caption.finish_reason,
                weights_version=self.weights_version,
            )
            for (image_id, caption), text in zip(captions, texts, strict=True)
        ]


def _supported_vllm():
    import vllm

    found = getattr(vllm, "__version__", None) or version("vllm")
    if not found.startswith(SUPPORTED_VLLM):
        raise UnsupportedError(
            f"vllm {found} is installed; this version of finecap-ray runs on {', '.join(SUPPORTED_VLLM)}.x"
        )
    return vllm.LLM
