"""A step made by hand: what a component of the reward gets."""

import numpy as np
import pytest

from finecap_ray.rewards.component import RewardRequest


@pytest.fixture
def step():
    """A function that makes a step; by default of one image and one bag, without references, every caption ended by itself."""

    def make(texts, target=None, images=((1.0, 0.0),), bags=None, references=None, ended=None) -> RewardRequest:
        return RewardRequest(
            texts=list(texts),
            ended=np.array([True] * len(texts) if ended is None else ended),
            target=np.array([0] * len(texts) if target is None else target),
            image_ids=[f"image-{row}" for row in range(len(images))],
            embeddings=np.asarray(images, dtype=np.float16),
            bag_of_image=np.array([0] * len(images) if bags is None else bags),
            references=[()] * len(images) if references is None else references,
        )

    return make
