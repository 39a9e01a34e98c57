"""Hard negatives: the images of a bank that look most like the own one join those that compete for a caption.

A bag of 3 is easily told apart; with the 20 nearest images of the training split beside it, it isn't.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finecap_ray.errors import DataError
from finecap_ray.records import ImageBank


class HardNegatives:
    """The `count` images of a bank that are nearest to an image, and don't compete with it already."""

    def __init__(self, bank: ImageBank, count: int) -> None:
        if count >= len(bank.image_ids):
            raise DataError(
                f"rl.reward.hard_negatives asks for {count} images beside the own one, and the bank holds "
                f"{len(bank.image_ids)}: ask for fewer"
            )
        self.count = count
        self._rows = {image_id: row for row, image_id in enumerate(bank.image_ids)}
        embeddings = torch.from_numpy(bank.embeddings.astype(np.float32))
        self._embeddings = torch.nn.functional.normalize(embeddings, dim=-1)

    def join(
        self,
        image_ids: list[str],
        images: Float[Tensor, "N D"],
        target: Int[Tensor, " C"],
        scope: Bool[Tensor, "C N"],
    ) -> tuple[Float[Tensor, "M D"], Bool[Tensor, "C M"]]:
        """Images and scope with the negatives behind: M = N + the different negatives of all captions.

        Raises DataError where the bank has too few images that don't compete already.
        """
        similarity = (images @ self._embeddings.T)[target]
        known = torch.tensor([self._rows.get(image_id, -1) for image_id in image_ids])
        for column in (known >= 0).nonzero().flatten().tolist():
            similarity[scope[:, column], known[column]] = -torch.inf
        nearest = similarity.topk(self.count, dim=1)
        if nearest.values.isinf().any():
            raise DataError(
                f"the bank of {len(self._rows)} images has fewer than rl.reward.hard_negatives {self.count} that don't "
                "compete already: ask for fewer"
            )
        used, place = torch.unique(nearest.indices, return_inverse=True)
        joined = torch.zeros(len(target), len(used), dtype=torch.bool).scatter(1, place, True)
        return torch.cat([images, self._embeddings[used]]), torch.cat([scope, joined], dim=1)
