"""CIDEr-D as a reward: how much a caption sounds like what people wrote about its image.

    CIDEr-D(c) = mean over references r and n = 1 ... 4 of
                 exp(-(l_c - l_r)^2 / (2 * 6^2)) * <min(g_c, g_r), g_r> / (|g_c| |g_r|)

g are the tf-idf weights of the n-grams and l is a length (Vedantam 2015, arXiv:1411.5726). This is the scorer of
pycocoevalcap, fit for one step at a time: document frequencies come from a fixed corpus or from the images of the step, the references of
an image are weighed once for all its captions, and of the products only those of shared n-grams are worked out.

pycocoevalcap multiplies this by 10, and papers by 1000: a reward of 0.1 is what they print as 100.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from pycocoevalcap.cider.cider_scorer import precook
from torch import Tensor

from finecap_ray.errors import DataError
from finecap_ray.evaluation.tokenise import Tokenisation, tokenise
from finecap_ray.rewards.component import RewardRequest

MAX_N = 4
SIGMA = 6.0
FEWEST_DOCUMENTS = 2  # images with references; what all documents have is worth 0

NGram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _References:
    """The R references of one image as tf-idf vectors."""

    weights: dict[NGram, list[tuple[int, float]]]  # n-gram -> (reference that has it, its weight there)
    norms: list[list[float]]  # [R][n]
    lengths: list[int]  # [R]


class Cider:
    """The component. `corpus`: the references of the images that are its documents; None: those of each step's own images.

    NaN where the image has no references, and in a step of fewer than two images that do: nothing tells their words apart.
    `combine.images_with_signal` says where that is so.
    """

    def __init__(self, corpus: Iterable[Sequence[str]] | None) -> None:
        self._reward = None if corpus is None else CiderReward(corpus)

    def __call__(self, request: RewardRequest, text: Float[Tensor, "C D"]) -> Float[np.ndarray, " C"]:
        reward = self._reward
        if reward is None:
            if sum(map(bool, request.references)) < FEWEST_DOCUMENTS:
                return np.full(len(request.texts), np.nan, dtype=np.float32)
            reward = CiderReward(request.references)
        return reward(request.texts, request.own_references())


class CiderReward:
    """CIDEr-D of captions against the references of their own image, 0 to 1.

    corpus: the references of every image that counts as a document, as {id: references} or without the ids; usually the
    training split. tokenisation: punctuation is kept by default, so that a caption without its full stop loses by it;
    without punctuation nothing does, and captioners unlearn it (NDLB: 94.1 % of the captions end in a full stop before
    training on CIDEr, 0.4 % after).
    Raises DataError for a corpus of fewer than two images with references.
    """

    def __init__(
        self,
        corpus: Mapping[str, Sequence[str]] | Iterable[Sequence[str]],
        tokenisation: Tokenisation = "keep_punctuation",
    ) -> None:
        self._tokenisation = tokenisation
        document_frequency: Counter[NGram] = Counter()
        documents = 0
        for references in corpus.values() if isinstance(corpus, Mapping) else corpus:
            if references:
                documents += 1
                document_frequency.update(set().union(*(self._ngrams(text)[0] for text in references)))
        if documents < FEWEST_DOCUMENTS:
            raise DataError(
                f"CIDEr over {documents} images with references needs two or more, what all images have is worth 0: give captions, "
                "or set rl.reward.cider=0"
            )
        self._unseen = math.log(documents)  # an n-gram of no document weighs as much as one of a single document
        self._idf = {ngram: self._unseen - math.log(count) for ngram, count in document_frequency.items()}

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " C"]:
        """The reward of each caption as float32; references: those of its image, equal ones are weighed once.

        NaN means no signal: the image has no references. The caller counts these, and leaves them out of the reward.
        """
        weighed: dict[tuple[str, ...], _References] = {}
        rewards = np.full(len(captions), np.nan, dtype=np.float32)
        for index, (caption, own) in enumerate(zip(captions, references, strict=True)):
            key = tuple(own)
            if not key:
                continue
            if key not in weighed:
                weighed[key] = self._weigh(key)
            rewards[index] = self._score(caption, weighed[key])
        return rewards

    def _score(self, caption: str, references: _References) -> float:
        counts, length = self._ngrams(caption)
        squares = [0.0] * MAX_N
        products = [[0.0] * MAX_N for _ in references.lengths]
        for ngram, count in counts.items():
            n = len(ngram) - 1
            weight = count * self._idf.get(ngram, self._unseen)
            squares[n] += weight * weight
            for reference, other in references.weights.get(ngram, ()):
                products[reference][n] += min(weight, other) * other
        norms = [math.sqrt(square) for square in squares]
        total = 0.0
        for product, other_norms, other_length in zip(products, references.norms, references.lengths, strict=True):
            penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            # a product above 0 has norms above 0
            total += penalty * sum(p / (a * b) for p, a, b in zip(product, norms, other_norms, strict=True) if p)
        return total / MAX_N / len(products)

    def _weigh(self, references: tuple[str, ...]) -> _References:
        weights = defaultdict(list)
        norms, lengths = [], []
        for index, text in enumerate(references):
            counts, length = self._ngrams(text)
            squares = [0.0] * MAX_N
            for ngram, count in counts.items():
                weight = count * self._idf.get(ngram, self._unseen)
                weights[ngram].append((index, weight))
                squares[len(ngram) - 1] += weight * weight
            norms.append([math.sqrt(square) for square in squares])
            lengths.append(length)
        return _References(dict(weights), norms, lengths)

    def _ngrams(self, text: str) -> tuple[dict[NGram, int], int]:
        """Counts of the n-grams of a text, and its length in pairs of words, as pycocoevalcap takes it."""
        words = tokenise(text, self._tokenisation)
        return precook(" ".join(words), MAX_N), max(len(words) - 1, 0)
