"""Micro-batches by length: every caption once, in its own shape, and the loss of the whole step."""

import pytest
import torch

from finecap_ray.training.micro_batches import split_captions

LENGTHS = [3, 1, 4, 1, 5, 2]  # of the captions of 3 images, 2 each
ALONE = {"workers": 1, "captions": 6}


IMAGES = torch.arange(3).repeat_interleave(2)  # of each caption


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
        "advantages": torch.arange(6.0),
        "num_items_in_batch": torch.tensor(16),
    }


def test_captions_of_like_length_share_a_batch_that_is_cut_to_the_longest(batch):
    parts = split_captions(batch, IMAGES, 3, "dr_grpo", **ALONE)
    assert [part["advantages"].tolist() for part in parts] == [[1, 3], [5, 0], [2, 4]]
    assert [part["completion_ids"].shape for part in parts] == [(2, 1), (2, 3), (2, 5)]
    assert [part["sampling_per_token_logps"].shape[1] for part in parts] == [1, 3, 5]
    for part in parts:
        assert part["prompt_ids"].shape == part["prompt_mask"].shape == (2, 1)
        assert torch.equal(part["images"][part["image_of_row"]], part["advantages"] // 2)
        assert part["num_items_in_batch"] == 16
    kept = torch.cat([part["completion_ids"][part["completion_mask"].bool()] for part in parts])
    assert sorted(kept.tolist()) == sorted(batch["completion_ids"][batch["completion_mask"].bool()].tolist())


def test_an_image_of_several_captions_comes_once(batch):
    first, last = split_captions(batch, IMAGES, 2, "dr_grpo", **ALONE)
    assert first["advantages"].tolist() == [1, 3, 5]
    assert first["images"].tolist() == [0, 1, 2]
    assert first["image_of_row"].tolist() == [0, 1, 2]
    assert last["advantages"].tolist() == [0, 2, 4]
    whole = split_captions(batch, IMAGES, 1, "dr_grpo", **ALONE)[0]
    assert whole["images"].tolist() == [0, 1, 2]
    assert torch.equal(whole["images"][whole["image_of_row"]], whole["advantages"] // 2)


def test_equal_captions_of_an_image_are_read_once(batch):
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    for name in ("completion_ids", "completion_mask", "sampling_per_token_logps"):
        batch[name][4] = batch[name][0]  # equal, but of another image
        batch[name][5] = batch[name][4]
    whole = split_captions(batch, IMAGES, 1, "dr_grpo", **ALONE)[0]
    assert whole["advantages"].tolist() == [1, 3, 0, 4, 5, 2]
    assert whole["distinct"].tolist() == [0, 1, 2, 3, 5]
    assert whole["row_of_caption"].tolist() == [0, 1, 2, 3, 3, 4]
    assert whole["image_of_row"].tolist() == [0, 1, 0, 2, 1]
    read = whole["completion_ids"][whole["distinct"]]
    assert torch.equal(read[whole["row_of_caption"]], whole["completion_ids"])
    image_of_caption = whole["image_of_row"][whole["row_of_caption"]]
    assert torch.equal(whole["images"][image_of_caption], whole["advantages"] // 2)
    # What stands after a caption's end is no part of it.
    ids[5, 3:] = 7
    assert not mask[5, 3:].any()
    again = split_captions(batch, IMAGES, 1, "dr_grpo", **ALONE)[0]
    assert again["row_of_caption"].tolist() == whole["row_of_caption"].tolist()
    # A cut through equal captions: each side reads its own.
    cut = split_captions(batch, IMAGES, 6, "dr_grpo", **ALONE)
    assert [part["distinct"].tolist() for part in cut] == [[0]] * 6


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


@pytest.mark.parametrize(("parts", "images"), [(1, [[0, 1, 2]]), (2, [[0, 1], [2]]), (3, [[0], [1], [2]])])
def test_whole_images_are_in_one_batch_each(batch, parts, images):
    made = split_captions(batch, IMAGES, parts, "dr_grpo", **ALONE, whole_images=True)
    assert [part["images"].tolist() for part in made] == images
    assert [sorted(part["advantages"].tolist()) for part in made] == [
        [row for one in own for row in (2 * one, 2 * one + 1)] for own in images
    ]
    for part in made:
        assert torch.equal(part["images"][part["image_of_row"]], part["advantages"][part["distinct"]] // 2)


def test_an_image_in_two_bags_is_read_once(batch):
    twice = torch.tensor([0, 0, 1, 1, 0, 0])
    (whole,) = split_captions(batch, twice, 1, "dr_grpo", **ALONE, whole_images=True)
    assert whole["images"].tolist() == [0, 1]
    first, last = split_captions(batch, twice, 2, "dr_grpo", **ALONE, whole_images=True)
    assert (sorted(first["advantages"].tolist()), sorted(last["advantages"].tolist())) == ([0, 1, 4, 5], [2, 3])


def test_more_parts_than_images_cut_through_them(batch):
    made = split_captions(batch, IMAGES, 6, "dr_grpo", **ALONE, whole_images=True)
    assert [part["images"].tolist() for part in made] == [[0], [0], [1], [1], [2], [2]]


@pytest.mark.parametrize("whole_images", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4, 6])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_the_losses_of_the_parts_add_up_to_that_of_the_step(batch, loss_type, parts, whole_images):
    made = split_captions(batch, IMAGES, parts, loss_type, **ALONE, whole_images=whole_images)
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
        made = split_captions(own, IMAGES[rows] - IMAGES[rows][0], parts, loss_type, workers=2, captions=6)
        of_worker.append(sum(loss(part, loss_type, parts, workers=2) * part["share"] for part in made))
    assert sum(of_worker).item() / 2 == pytest.approx(loss(batch, loss_type, 1, 1).item(), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo"])
def test_of_fewer_captions_than_parts_some_parts_count_for_nothing(batch, loss_type):
    parts = split_captions(batch, IMAGES, 8, loss_type, **ALONE)
    assert [len(part["advantages"]) for part in parts] == [1] * 8
    counting = [part for part in parts if part["share"]]
    assert sorted(part["advantages"].item() for part in counting) == list(range(6))
    alone = split_captions(batch, IMAGES, 6, loss_type, **ALONE)
    if loss_type != "dapo":  # whose loss TRL has divided by the tokens of the whole step
        assert sum(part["share"] for part in counting) == pytest.approx(8)
    assert [part["share"] / len(parts) for part in counting] == pytest.approx(
        [part["share"] / (len(parts) if loss_type == "dapo" else len(alone)) for part in alone]
    )
