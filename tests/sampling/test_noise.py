"""The seeded noise: the distribution that is asked for, and a row's tokens by its seed alone."""

import numpy as np
import pytest
import torch

from finecap_ray.sampling import engine  # noqa: F401  (before vllm: it sets what vllm reads at import)


@pytest.fixture(scope="module")
def sampler():
    from finecap_ray.sampling.noise import SeededSampler

    return SeededSampler()


def generators(seeds):
    return {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}


def test_tokens_are_drawn_with_the_probabilities_of_the_logits(sampler):
    n, probabilities = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.049, 0.001])
    tokens, logprobs = sampler.forward(probabilities.log().repeat(n, 1), generators(range(n)), None, None)
    found = torch.bincount(tokens, minlength=5) / n
    error = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((found - probabilities).abs() < 4 * error).all()
    torch.testing.assert_close(logprobs[0].exp(), probabilities)


def test_the_same_generator_gives_independent_draws(sampler):
    rows = generators([7])
    drawn = [sampler.forward(torch.zeros(1, 2), rows, None, None)[0].item() for _ in range(2000)]
    pairs = np.bincount(np.array(drawn[:-1]) * 2 + np.array(drawn[1:]), minlength=4) / 1999
    assert np.abs(pairs - 0.25).max() < 0.05


def test_a_rows_tokens_depend_on_its_seed_and_not_on_its_neighbours(sampler):
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) / 10
    three, alone = generators([11, 12, 13]), {0: torch.Generator().manual_seed(12)}
    for _ in range(5):
        together, _ = sampler.forward(logits.clone(), three, None, None)
        own, _ = sampler.forward(logits[1:2].clone(), alone, None, None)
        assert together[1] == own[0]
        assert len(set(together.tolist())) == 3


def test_of_the_tokens_that_top_k_leaves_out_none_is_drawn(sampler):
    logits = torch.arange(10.0).repeat(500, 1)
    tokens, logprobs = sampler.forward(logits, generators(range(500)), torch.full((500,), 2), None)
    assert set(tokens.tolist()) == {8, 9}
    assert torch.isinf(logprobs[:, :8]).all()


def test_where_a_request_has_no_seed_vllm_draws(sampler):
    tokens, logprobs = sampler.forward(torch.tensor([[0.0, 50.0], [50.0, 0.0]]), generators([3]), None, None)
    assert tokens.tolist() == [1, 0] and logprobs.shape == (2, 2)
