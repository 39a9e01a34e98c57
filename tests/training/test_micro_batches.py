"""Micro-batches by length: every caption once, in its own shape, and the loss of the whole step."""

import pytest
import torch

from finecap_ray.training.micro_batches import split_by_length

LENGTHS = [3, 1, 4, 1, 5, 2]  # of the captions of 3 images, 2 each


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
    parts = split_by_length(batch, 3, "dr_grpo", captions_per_image=2, share_images=False)
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
    first, last = split_by_length(batch, 2, "dr_grpo", captions_per_image=2, share_images=True)
    assert first["advantages"].tolist() == [1, 3, 5]
    assert first["pixel_values"][:, 0].tolist() == [0, 1, 2]
    assert first["image_of_row"].tolist() == [0, 1, 2]
    assert first["prompt_ids"].shape == first["prompt_mask"].shape == (3, 1)
    assert last["advantages"].tolist() == [0, 2, 4]
    assert sum(last["num_images"]) == len(last["pixel_values"]) == 3
    whole = split_by_length(batch, 1, "dr_grpo", captions_per_image=2, share_images=True)[0]
    assert whole["pixel_values"][:, 0].tolist() == [0, 1, 2]
    assert torch.equal(whole["pixel_values"][whole["image_of_row"], 0], whole["advantages"] // 2)


@pytest.mark.parametrize("parts", [1, 2, 4, 6])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_the_losses_of_the_parts_add_up_to_that_of_the_step(batch, loss_type, parts):
    """With -log p as the loss of a token, by TRL's formulas; TRL divides each by the number of parts, save dapo's."""

    def loss(part, longest=5):
        value, mask = -part["sampling_per_token_logps"], part["completion_mask"]
        match loss_type:
            case "grpo":
                return ((value * mask).sum(-1) / mask.sum(-1)).mean()
            case "dr_grpo":
                return (value * mask).sum() / (len(value) * longest)
            case "bnpo":
                return (value * mask).sum() / mask.sum()
        return (value * mask).sum() / part["num_items_in_batch"]

    made = split_by_length(batch, parts, loss_type, captions_per_image=2, share_images=False)
    accumulated = sum(loss(part) * part["share"] / (1 if loss_type == "dapo" else parts) for part in made)
    assert accumulated.item() == pytest.approx(loss(batch).item(), rel=1e-6)
