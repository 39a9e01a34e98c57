"""What training on a CPU sets: no result depends on it."""

import torch

from finecap_ray.captioners.clipcap_family import FeatureImages
from finecap_ray.captioners.family import training_batch
from finecap_ray.training.cpu import suit_cpu


def test_a_captioner_suited_to_the_cpu_computes_the_same(captioner):
    model, processor = captioner
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = training_batch(
        FeatureImages(torch.randn(3, model.config.feature_dim), tuple(processor.prompt_token_ids())),
        [0, 1, 1, 2],
        [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]],
        0,
    )
    before = model.train()(**batch).loss
    tiny = torch.tensor([1e-30])
    try:
        suit_cpu(model)
        after = model(**batch).loss
        assert tiny * 1e-10 == 0
    finally:
        torch.set_flush_denormal(False)
    assert tiny * 1e-10 > 0
    assert model.model.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(after, before)
