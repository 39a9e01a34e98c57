import pytest
import torch

from finecap_ray.evaluation.clip_score import clip_score, ref_clip_score

# Two captions at cosines 0.6 and -1 with their images.
TEXT = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
IMAGES = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])


def test_clip_score_stretches_and_never_falls_below_0():
    assert clip_score(TEXT, IMAGES).tolist() == pytest.approx([2.5 * 0.6, 0.0])


def test_ref_clip_score_is_the_harmonic_mean_with_the_closest_reference():
    references = [torch.tensor([[0.0, 1.0], [0.8, 0.6]]), torch.tensor([[-1.0, 0.0]])]
    # the closest reference of the first is at 0.8; the second has 0 and 0
    assert ref_clip_score(TEXT, IMAGES, references).tolist() == pytest.approx([2 * 1.5 * 0.8 / (1.5 + 0.8), 0.0])
