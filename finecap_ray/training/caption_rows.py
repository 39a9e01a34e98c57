"""Captions as rows to learn from, and the order in which an epoch takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BATCHES_SORTED_TOGETHER = 50


class CaptionDataset(torch.utils.data.Dataset):
    """One row per (image, caption): prompt placeholders, the caption's tokens and the end token; only the latter two are learnt.

    `word_noise`: probability that a caption's token is read as another one, drawn from those of its batch; what is to be learnt
    stays (unigram noising, Xie 2017, arXiv:1703.02573).
    """

    def __init__(
        self, features: np.ndarray, captions: list[list[str]], processor, max_tokens: int, word_noise: float = 0.0
    ) -> None:
        self.features, self.max_tokens, self.word_noise = torch.from_numpy(features), max_tokens, word_noise
        self.prompt = processor.prompt_token_ids()
        self.pad = processor.tokenizer.pad_token_id
        end = processor.tokenizer.eos_token_id
        pairs = [(image, text) for image, own in enumerate(captions) for text in own]
        tokens = processor.tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
        self.rows = [(image, [*ids[: max_tokens - 1], end]) for (image, _), ids in zip(pairs, tokens, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, tokens = self.rows[index]
        return {"input_ids": tokens, "image": image}

    def lengths(self) -> list[int]:
        """Tokens of each caption."""
        return [len(tokens) for _, tokens in self.rows]

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """[B, P + T]: padded on the right, labels -100 where nothing is to be learnt."""
        longest = max(len(row["input_ids"]) for row in batch)
        prefix = len(self.prompt)
        ids = torch.full((len(batch), prefix + longest), self.pad)
        ids[:, :prefix] = torch.tensor(self.prompt)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, caption in enumerate(batch):
            end = prefix + len(caption["input_ids"])
            ids[row, prefix:end] = torch.tensor(caption["input_ids"])
            labels[row, prefix:end] = ids[row, prefix:end]
            mask[row, :end] = 1
        if self.word_noise:
            own = labels != -100
            noisy = own & (torch.rand(ids.shape) < self.word_noise)
            ids[noisy] = ids[own][torch.randint(int(own.sum()), (int(noisy.sum()),))]
        features = self.features[[caption["image"] for caption in batch]].float()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": features}


class LikeLengths(torch.utils.data.Sampler[int]):
    """All rows once per epoch in a random order, those of a batch of like length: a batch is padded to its longest.

    The order is a function of (seed, epoch), so a resumed run takes up the same one; transformers sets the epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        shuffled = torch.from_numpy(random.permutation(len(self)))
        sorted_parts = [
            part[self.lengths[part].argsort(stable=True)]
            for part in shuffled.split(self.batch_size * _BATCHES_SORTED_TOGETHER)
        ]
        batches = [batch for part in sorted_parts for batch in part.split(self.batch_size)]
        # An uneven batch keeps its place at the end: anywhere else it would shift the others.
        full = len(batches) - (len(batches[-1]) < self.batch_size)
        order = [*random.permutation(full).tolist(), *range(full, len(batches))]
        yield from torch.cat([batches[index] for index in order]).tolist()
