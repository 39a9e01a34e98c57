"""What a tower of ours around a timm one has in common with all: timm's interface, as far as open_clip calls it."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

PLAIN = "tf_efficientnet_lite0"


class PooledTower(nn.Module):
    """Images -> features that are pooled already: there is no map at its end, and no classifier."""

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.default_cfg = {**backbone.default_cfg, "pool_size": None}  # it doesn't end in a map
        self.num_classes = 0
        self.num_features = num_features

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """As timm's models have it. There is no classifier, and the pooling is what the module is for."""
        if num_classes or global_pool != "avg":
            raise ValueError(f"a pooled tower has no classifier of {num_classes} and no pooling {global_pool!r}")


def plain_tower(pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """timm's EfficientNet-lite0 without a classifier; of the options of its maker those that concern dropping."""
    dropping = {name: value for name, value in options.items() if name.endswith("drop_rate")}
    return timm.create_model(PLAIN, pretrained=pretrained, num_classes=0, global_pool="avg", **dropping)
