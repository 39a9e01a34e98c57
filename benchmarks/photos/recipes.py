"""The recipes that are compared: what each changes in the preset. Estimator, step size and number of steps are the same for all."""

from __future__ import annotations

from dataclasses import dataclass

MLE = "mle"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Recipe:
    changes: tuple[str, ...] = ()
    # The papers' recipes end with their last weights, ours with an average that is mixed with the start. Until its end a run is the same.
    last_weights_of: str | None = None  # a recipe, whose changes are this one's


RECIPES: dict[str, Recipe] = {
    # Self-retrieval among random images of the step (DiscriTune's reward).
    "sr": Recipe(
        (
            "bags.kind=random",
            "bags.sizes=[60]",
            "rl.curriculum=[{bag_size: 60, epochs: 3}]",
            "rl.reward.cider=0",
            "rl.reward.repetition=0",
            "rl.average_decay=0",
            "rl.start_share=0",
        )
    ),
    # Steps are made of bags of look-alikes, of growing sizes, and all images of the step compete (No Detail Left Behind).
    # The preset's small penalty on repeated words, which the paper doesn't have, stays in both.
    "sr_bagcurri": Recipe(last_weights_of="no_cider"),
    "sr_bagcurri_cider": Recipe(last_weights_of=DEFAULT),
    DEFAULT: Recipe(),
    # The default with one thing off, or otherwise.
    "no_curriculum": Recipe(("bags.sizes=[5]", "rl.curriculum=[{bag_size: 5, epochs: 3}]")),
    "no_cider": Recipe(("rl.reward.cider=0",)),
    "no_normalisation": Recipe(("rl.advantage=leave_one_out",)),
    "own_bag": Recipe(("rl.reward.scope=bag",)),
    # The nearest of the other photos of train compete as well: more look-alikes than a bag has.
    "hard_negatives": Recipe(("rl.reward.hard_negatives=20",)),
    "three_captions": Recipe(("rl.captions_per_image=3",)),  # of each image and step, instead of six
}
