"""The recipes that are compared: what each changes in the preset. Estimator, step size and number of steps are the same for all."""

from __future__ import annotations

MLE = "mle"
DEFAULT = "default"

LAST = ["rl.average_decay=0", "rl.start_share=0"]  # the papers' recipes end with their last weights

RECIPES: dict[str, list[str]] = {
    # Self-retrieval among random images of the step (DiscriTune's reward).
    "sr": [
        "bags.kind=random",
        "bags.sizes=[60]",
        "rl.curriculum=[{bag_size: 60, epochs: 3}]",
        "rl.reward.cider=0",
        *LAST,
    ],
    # Steps are made of bags of look-alikes, of growing sizes, and all images of the step compete (No Detail Left Behind).
    "sr_bagcurri": ["rl.reward.cider=0", *LAST],
    "sr_bagcurri_cider": LAST,
    DEFAULT: [],
    # The default with one thing off, or otherwise.
    "no_curriculum": ["bags.sizes=[5]", "rl.curriculum=[{bag_size: 5, epochs: 3}]"],
    "no_cider": ["rl.reward.cider=0"],
    "no_normalisation": ["rl.advantage=leave_one_out"],
    "own_bag": ["rl.reward.scope=bag"],
}
