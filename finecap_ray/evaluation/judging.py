"""The Ray side of an evaluation: a scorer in an actor that embeds images and captions once, and answers about pools."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from finecap_ray.cluster import get_within
from finecap_ray.config import ResourceSettings
from finecap_ray.evaluation.clip_score import CLIP_PREFIX, clip_score, ref_clip_score
from finecap_ray.evaluation.pools import PoolSet
from finecap_ray.evaluation.ranking import Places, place_captions, retrieval_numbers
from finecap_ray.rewards.self_retrieval import better_and_tied

SAME_SCORER = "the judge is the reward scorer ({digest}): a caption that fools one fools the other; give another judge"


@dataclass(frozen=True, slots=True)
class JudgeFacts:
    spec: str
    digest: str
    tower_digest: str


@dataclass(frozen=True, slots=True)
class JudgeReply:
    retrieval: list[dict[str, Any]]  # numbers of each pool set
    human: list[dict[str, Any]]  # the same by human captions
    similarity: dict[str, float | str]


@dataclass(frozen=True, slots=True)
class BagReply:
    """Per system and bag, of each image: what its captions add to R@1 on average, and the rank and find of the first one."""

    hits: dict[str, list[np.ndarray]]  # [K] float, NaN for an image without a caption
    ranks: dict[str, list[np.ndarray]]  # [K] float, the same
    best: dict[str, list[np.ndarray]]  # [K] int: place in the bag of the most similar image; -1 without a caption


class PoolJudge:
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
        only then are their similarities equal to the last bit. Raises DataError, naming it, for one that can't be decoded."""
        digests = [
            hashlib.sha256(one).digest() for one in (images if features is None else np.ascontiguousarray(features))
        ]
        first: dict[bytes, int] = {}
        for place, digest in enumerate(digests):
            first.setdefault(digest, place)
        own = list(first.values())
        if features is None:
            names = [image_ids[place] for place in own]
            embedded = self.scorer.embed_images([images[place] for place in own], names)
        else:
            embedded = self.scorer.project_features(torch.from_numpy(features[own].astype(np.float32)))
        row = {digest: number for number, digest in enumerate(first)}
        self.images = embedded[[row[digest] for digest in digests]]
        self.rows = {image_id: row for row, image_id in enumerate(image_ids)}

    def answer(
        self,
        captions: Mapping[str, Sequence[str]],
        human: Mapping[str, Sequence[str]],
        pools: Sequence[PoolSet],
        samples: int,
        seed: int,
    ) -> JudgeReply:
        """Judges captions, and human ones beside them; each of several captions of an image is a question of its own."""
        texts = _Texts(self.scorer, [text for own in (captions, human) for several in own.values() for text in several])
        return JudgeReply(
            self._retrieval(captions, texts, pools, samples, seed),
            self._retrieval(human, texts, pools, samples, seed),
            self._similarity(captions, human, texts),
        )

    def judge_bags(
        self, captions: Mapping[str, Mapping[str, Sequence[str]]], bags: Sequence[Sequence[str]]
    ) -> BagReply:
        """captions: system -> image id -> its captions, if any; bags: image ids, which compete in their bag."""
        reply = BagReply({}, {}, {})
        for system, own in captions.items():
            texts = _Texts(self.scorer, [text for several in own.values() for text in several])
            found = [self._judge_bag(texts, own, bag) for bag in bags]
            reply.hits[system], reply.ranks[system], reply.best[system] = (
                list(part) for part in zip(*found, strict=True)
            )
        return reply

    def _judge_bag(
        self, texts: _Texts, captions: Mapping[str, Sequence[str]], bag: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.array([len(captions.get(image_id, ())) for image_id in bag])
        hits, ranks, best = np.full(len(bag), np.nan), np.full(len(bag), np.nan), np.full(len(bag), -1)
        asked = counts.nonzero()[0]
        if len(asked):
            starts = np.cumsum(counts)[asked] - counts[asked]
            text = texts.of([one for image_id in bag for one in captions.get(image_id, ())])
            images = self.images[[self.rows[image_id] for image_id in bag]]
            target = torch.arange(len(bag)).repeat_interleave(torch.from_numpy(counts))
            better, tied = better_and_tied(text, images, target, torch.ones(len(text), len(bag), dtype=torch.bool))
            places = Places(better.double().numpy(), tied.double().numpy(), np.zeros(len(text)), target.numpy())
            hits[asked] = np.add.reduceat(places.found_within(1), starts) / counts[asked]
            ranks[asked] = places.rank[starts]
            best[asked] = (text[starts] @ images.T).argmax(dim=1).numpy()
        return hits, ranks, best

    def _retrieval(
        self, captions: Mapping[str, Sequence[str]], texts: _Texts, pools: Sequence[PoolSet], samples: int, seed: int
    ) -> list[dict[str, Any]]:
        rows = {image_id: [texts.rows[text] for text in own] for image_id, own in captions.items()}
        asked = [
            own for own in pools if any(rows.get(pool.image_ids[place]) for pool in own.pools for place in pool.asked)
        ]
        return [
            retrieval_numbers(
                own, place_captions(own.pools, self.rows, self.images, rows, texts.embedded), samples, seed
            )
            for own in asked
        ]

    def _similarity(
        self, captions: Mapping[str, Sequence[str]], human: Mapping[str, Sequence[str]], texts: _Texts
    ) -> dict[str, float | str]:
        """Mean CLIPScore and, over the images with references, RefCLIPScore; and the share of truncated captions.

        The prefix of the published numbers goes before texts for a CLIP; a scorer that was trained here never saw it.
        """
        prefix = "" if self.scorer.made_here else CLIP_PREFIX
        first = {image_id: own[0] for image_id, own in captions.items()}
        if prefix:
            references = [text for image_id in first for text in human.get(image_id, ())]
            texts = _Texts(self.scorer, [prefix + text for text in [*first.values(), *references]])
        images = self.images[[self.rows[image_id] for image_id in first]]
        embedded = texts.of([prefix + text for text in first.values()])
        result: dict[str, float | str] = {
            "CLIPScore": clip_score(embedded, images).mean().item(),
            "truncated": texts.truncated[[texts.rows[prefix + text] for text in first.values()]].mean().item(),
            "prefix": prefix,
        }
        referred = [row for row, image_id in enumerate(first) if human.get(image_id)]
        if referred:
            ids = list(first)
            references = [texts.of([prefix + text for text in human[ids[row]]]) for row in referred]
            result["RefCLIPScore"] = ref_clip_score(embedded[referred], images[referred], references).mean().item()
        return result


class _Texts:
    """Texts embedded once, however often they are asked about."""

    def __init__(self, scorer, texts: Sequence[str]) -> None:
        unique = list(dict.fromkeys(texts))
        self.embedded, self.truncated = scorer.read_texts(unique)
        self.rows = {text: row for row, text in enumerate(unique)}

    def of(self, texts: Sequence[str]) -> torch.Tensor:
        return self.embedded[[self.rows[text] for text in texts]]


Judge = ray.remote(num_cpus=1)(PoolJudge)


@contextmanager
def started_judges(specs: Mapping[str, str], resources: ResourceSettings) -> Iterator[dict[str, ActorHandle]]:
    """Actors of scorers (name -> what load_scorer takes), which share what one process may take of a GPU; gone afterwards."""
    options = Judge.options(num_gpus=resources.gpus / max(len(specs), 1))
    actors = {name: options.remote(spec, resources.threads) for name, spec in specs.items()}
    try:
        yield actors
    finally:
        for actor in actors.values():
            ray.kill(actor)


def judge_facts(actors: Mapping[str, ActorHandle], resources: ResourceSettings) -> dict[str, JudgeFacts]:
    """Of actors that are starting. Raises what their start raised, DeadlineError where it takes too long."""
    late = f"{' and '.join(actors)} didn't start within {resources.start_timeout_s:.0f} s: see `ray status` for what is free"
    starting = [actor.facts.remote() for actor in actors.values()]
    return dict(zip(actors, get_within(starting, resources.start_timeout_s, late), strict=True))
