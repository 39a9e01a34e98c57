"""The images of a scorer's training as its head takes them: of a frozen tower once and for all, of one that trains each time.

Heads see them standardised by channel: (x - mean) / deviation of the training images. `fold_standardisation` puts that into
the head's first layer afterwards, so that what is saved is a plain open_clip model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from timm.layers import AttentionPool2d
from torch import Tensor, nn

from finecap_ray.config import ScorerSettings
from finecap_ray.images import decode_image
from finecap_ray.scorers.tower import FrozenTower

_BATCH = 64
_MEASURED = 512  # maps that mean and deviation are taken of


@dataclass(frozen=True, slots=True)
class CaptionedFeatures:
    """What a scorer is trained or measured on. The encoded images are looked at only where features don't do."""

    features: Float[Tensor, "N F"]  # pooled, of the frozen tower
    captions: list[list[str]]
    images: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: Sequence[int]) -> CaptionedFeatures:
        images = [self.images[row] for row in rows] if self.images else ()
        return CaptionedFeatures(self.features[list(rows)], [self.captions[row] for row in rows], images)

    def captioned(self) -> CaptionedFeatures:
        """Without those that have no caption."""
        return self.rows([row for row, own in enumerate(self.captions) if own])


@dataclass(frozen=True, slots=True)
class Standard:
    """(x - mean) / deviation, by channel."""

    mean: Float[Tensor, " F"]
    deviation: Float[Tensor, " F"]

    @classmethod
    def of(cls, features: Float[Tensor, "n F *map"]) -> Standard:
        rows = features.transpose(0, 1).flatten(1).float()
        deviation, mean = torch.std_mean(rows, dim=1, correction=0)
        return cls(mean, deviation + 1e-3)

    def __call__(self, features: Float[Tensor, "n F *map"]) -> Float[Tensor, "n F *map"]:
        shape = (-1, *[1] * (features.dim() - 2))
        return (features - self.mean.view(shape)) / self.deviation.view(shape)


class ImageTable:
    """The images of a set, row by row, as the head of `visual` takes them."""

    def __init__(
        self, visual: nn.Module, tower: FrozenTower, settings: ScorerSettings, data: CaptionedFeatures
    ) -> None:
        self._visual, self._tower, self._images = visual, tower, data.images
        self._device = next(visual.parameters()).device
        if settings.image_groups:
            self._seen = None
        elif settings.pooling == "pooled" or not len(data):
            self._seen = data.features
        else:
            self._seen = torch.cat([self._maps(start).half().cpu() for start in range(0, len(data), _BATCH)])

    def seen(self, rows: Tensor) -> Float[Tensor, "n F *map"]:
        """With gradients where the tower trains."""
        if self._seen is not None:
            return self._seen[rows].float().to(self._device)
        return self._look([self._images[row] for row in rows.tolist()])

    @torch.no_grad()
    def standard(self) -> Standard:
        """Of the first images where they are maps, or seen anew each time."""
        if self._seen is not None and self._seen.dim() == 2:
            return Standard.of(self._seen.to(self._device))
        few = torch.arange(min(_MEASURED, len(self._images)))
        return Standard.of(torch.cat([self.seen(rows) for rows in few.split(_BATCH)]))

    @torch.inference_mode()
    def _maps(self, start: int) -> Float[Tensor, "n F h w"]:
        return self._look(self._images[start : start + _BATCH])

    def _look(self, images: Sequence[bytes]) -> Tensor:
        pixels = torch.stack([self._tower.preprocess(decode_image(image)) for image in images])
        return self._visual.trunk(pixels.to(self._device, memory_format=torch.channels_last))


@torch.no_grad()
def fold_standardisation(head: nn.Module, standard: Standard) -> None:
    """Makes a head that was trained on standardised features take them as they are.

    W (x - m) / d = (W / d) x - (W / d) m; in an attention pool, which adds positions p to x, W ((x - m) / d + p) = (W / d) (x + d p - m).
    """
    pool = getattr(head, "pool", None)
    if isinstance(pool, AttentionPool2d):
        pool.pos_embed.mul_(standard.deviation).sub_(standard.mean)
        pool.qkv.weight.div_(standard.deviation)
    else:
        layer = head.mlp.fc1
        layer.weight.div_(standard.deviation)
        layer.bias.sub_(layer.weight @ standard.mean)
