"""Micro-batches by length: every caption once, in its own shape, and the loss of the whole step."""

import pytest
import torch

from finecap_ray.training.micro_batches import split_by_length

LENGTHS = [3, 1, 4, 1, 5, 2]  # of the captions of 3 images, 2 each
ALONE = {"captions_per_image": 2, "workers": 1, "captions": 6}


@pytest.fixture
def batch():
    tokens = torch.arange(1, 31).view(6, 5)
    mask = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]
    return {
        "prompt_ids": torch.zeros(6, 5, dtype=torch.long),
        "prompt_mask": torch.ones(6, 5, dtype=torch.int),
        "completion_ids": tokens * mask,
        "completion_mask": mask.int(),
        "sampling_per_token_logps": -tokens.float() * mask,
        "pixel_values": torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, 5).clone(),
        "advantages": torch.arange(6.0),
        "num_images": [1] * 6,
        "num_items_in_batch": torch.tensor(16),
    }


def test_captions_of_like_length_share_a_batch_that_is_cut_to_the_longest(batch):
    parts = split_by_length(batch, 3, "dr_grpo", share_images=False, **ALONE)
    assert [part["advantages"].tolist() for part in parts] == [[1, 3], [5, 0], [2, 4]]
    assert [part["completion_ids"].shape for part in parts] == [(2, 1), (2, 3), (2, 5)]
    assert [part["sampling_per_token_logps"].shape[1] for part in parts] == [1, 3, 5]
    assert all(part["prompt_ids"].shape == (2, 5) for part in parts)
    assert all(part["pixel_values"].shape == (2, 5) for part in parts)
    for part in parts:
        assert torch.equal(part["pixel_values"][:, 0], part["advantages"] // 2)
        assert part["num_items_in_batch"] == 16
        assert part["num_images"] == [1, 1]
    kept = torch.cat([part["completion_ids"][part["completion_mask"].bool()] for part in parts])
    assert sorted(kept.tolist()) == sorted(batch["completion_ids"][batch["completion_mask"].bool()].tolist())


def test_an_image_of_several_captions_comes_once(batch):
    first, last = split_by_length(batch, 2, "dr_grpo", share_images=True, **ALONE)
    assert first["advantages"].tolist() == [1, 3, 5]
    assert first["pixel_values"][:, 0].tolist() == [0, 1, 2]
    assert first["image_of_row"].tolist() == [0, 1, 2]
    assert first["prompt_ids"].shape == first["prompt_mask"].shape == (3, 1)
    assert last["advantages"].tolist() == [0, 2, 4]
    assert sum(last["num_images"]) == len(last["pixel_values"]) == 3
    whole = split_by_length(batch, 1, "dr_grpo", share_images=True, **ALONE)[0]
    assert whole["pixel_values"][:, 0].tolist() == [0, 1, 2]
    assert torch.equal(whole["pixel_values"][whole["image_of_row"], 0], whole["advantages"] // 2)


def loss(part, loss_type, parts, workers):
    """With -log p as the loss of a token, by TRL's formulas, which divide each by the number of parts, save dapo's."""
    value, mask = -part["sampling_per_token_logps"], part["completion_mask"]
    match loss_type:
        case "grpo":
            return ((value * mask).sum(-1) / mask.sum(-1)).mean() / parts
        case "dr_grpo":
            return (value * mask).sum() / (len(value) * 5) / parts
        case "bnpo":
            return (value * mask).sum() / mask.sum() / parts
    return (value * mask).sum() / (part["num_items_in_batch"] / workers)


@pytest.mark.parametrize("parts", [1, 2, 4, 6])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_the_losses_of_the_parts_add_up_to_that_of_the_step(batch, loss_type, parts):
    made = split_by_length(batch, parts, loss_type, share_images=False, **ALONE)
    accumulated = sum(loss(part, loss_type, parts, workers=1) * part["share"] for part in made)
    assert accumulated.item() == pytest.approx(loss(batch, loss_type, 1, 1).item(), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_the_mean_over_workers_with_uneven_shares_is_the_loss_of_the_step(batch, loss_type, parts):
    """Images 0 and 1 on one worker, image 2 on the other; 4 + 2 captions, 9 + 7 tokens."""
    of_worker = []
    for rows in (slice(0, 4), slice(4, 6)):
        own = {
            name: value if name == "num_items_in_batch" else value[rows]  # TRL counts the tokens of all workers
            for name, value in batch.items()
        }
        made = split_by_length(own, parts, loss_type, 2, share_images=False, workers=2, captions=6)
        of_worker.append(sum(loss(part, loss_type, parts, workers=2) * part["share"] for part in made))
    assert sum(of_worker).item() / 2 == pytest.approx(loss(batch, loss_type, 1, 1).item(), rel=1e-6)
