"""The Ray side of an evaluation: a scorer in an actor that embeds images and captions once, and answers about pools.

Started before captions are there, so that it loads, and embeds the images, while the sampler starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from finecap_ray.evaluation.clip_score import CLIP_PREFIX, clip_score, ref_clip_score
from finecap_ray.evaluation.pools import PoolSet
from finecap_ray.evaluation.ranking import place_captions, retrieval_numbers

_IMAGE_BATCH = 64


@dataclass(frozen=True, slots=True)
class JudgeFacts:
    spec: str
    digest: str
    tower_digest: str


@ray.remote(num_cpus=1, max_retries=0)
class Judge:
    """One scorer and the embeddings of the images it was shown."""

    def __init__(self, spec: str, threads: int) -> None:
        from finecap_ray.scorers.scorer import load_scorer

        torch.set_num_threads(threads)
        self.spec = spec
        self.scorer = load_scorer(spec)
        self.rows: dict[str, int] = {}
        self.images = torch.zeros(0, 0)

    def facts(self) -> JudgeFacts:
        return JudgeFacts(self.spec, self.scorer.digest, self.scorer.tower_digest)

    def show(self, image_ids: Sequence[str], images: Sequence[bytes] | None, features: np.ndarray | None) -> None:
        """Embeds images, from their features [N, F] where they are of the scorer's own tower. Equal ones are embedded once:
        only then are their similarities equal to the last bit."""
        if features is not None:
            unique, row = np.unique(features, axis=0, return_inverse=True)
            embedded = self.scorer.project_features(torch.from_numpy(unique.astype(np.float32)))
            self.images = embedded[torch.from_numpy(row.ravel())]
        else:
            first: dict[bytes, int] = {}
            row = [first.setdefault(hashlib.sha256(image).digest(), len(first)) for image in images]
            unique = dict(zip(row, images, strict=True))
            batches = [
                self.scorer.embed_images(
                    [unique[index] for index in range(start, min(start + _IMAGE_BATCH, len(unique)))]
                )
                for start in range(0, len(unique), _IMAGE_BATCH)
            ]
            self.images = torch.cat(batches)[row]
        self.rows = {image_id: row for row, image_id in enumerate(image_ids)}

    def retrieval(
        self, captions: Mapping[str, Sequence[str]], pools: Sequence[PoolSet], samples: int, seed: int
    ) -> list[dict[str, Any]]:
        """Numbers of each pool set; captions: image id -> its captions, each a question of its own."""
        texts = [text for own in captions.values() for text in own]
        embedded = self.scorer.embed_texts(texts)
        rows, start = {}, 0
        for image_id, own in captions.items():
            rows[image_id] = range(start, start + len(own))
            start += len(own)
        return [
            retrieval_numbers(own, place_captions(own.pools, self.rows, self.images, rows, embedded), samples, seed)
            for own in pools
        ]

    def similarity(
        self, captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
    ) -> dict[str, float | str]:
        """Mean CLIPScore and, over the images with references, RefCLIPScore; and the share of truncated captions.

        The prefix of the published numbers goes before texts for a CLIP; a scorer of a folder never saw it.
        """
        prefix = "" if self.scorer.tower_digest else CLIP_PREFIX
        ids = list(captions)
        text = self.scorer.embed_texts([prefix + captions[image_id] for image_id in ids])
        images = self.images[[self.rows[image_id] for image_id in ids]]
        result: dict[str, float | str] = {
            "CLIPScore": clip_score(text, images).mean().item(),
            "truncated": self.scorer.truncated([prefix + captions[image_id] for image_id in ids]).mean().item(),
            "prefix": prefix,
        }
        referred = [row for row, image_id in enumerate(ids) if references.get(image_id)]
        if referred:
            counts = [len(references[ids[row]]) for row in referred]
            every = self.scorer.embed_texts([prefix + one for row in referred for one in references[ids[row]]])
            score = ref_clip_score(text[referred], images[referred], every.split(counts))
            result["RefCLIPScore"] = score.mean().item()
        return result
