"""What scorers and bag sets wrote down of themselves, in lines for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def describe_warrant(spec: str) -> str:
    """What a scorer that was trained here is worth: R@1 on dev images, each from its first caption."""
    from finecap_ray.scorers.scorer import FACTS_FILE

    file = Path(spec) / FACTS_FILE
    if not file.is_file():
        return f"{spec}: taken as it is, not trained or measured here"
    facts = json.loads(file.read_text(encoding="utf-8"))
    line = f"{facts['text']} text tower, {facts['images']} images, digest {facts['digest']}, logit scale {facts['logit_scale']:.1f}"
    if "dev_images" not in facts:
        return f"{line}; no image of a dev split has a caption, so R@1 is unknown"
    if "recall_at_1_of_100" in facts:
        line += f"; R@1 of 100 dev images {100 * facts['recall_at_1_of_100']:.1f} % (chance 1 %)"
    dev = facts["dev_images"]
    return f"{line}; R@1 of all {dev} {100 * facts['recall_at_1_of_all']:.1f} % (chance {100 / dev:.2g} %)"


def describe_bags(manifest: dict[str, Any]) -> str:
    """A line per size of a bag set, and one per reason for which images were left out."""
    lines = []
    if manifest["search"] is not None:
        search = manifest["search"]
        how = "exact" if search["kind"] == "exact" else f"{search['probed']} of {search['cells']} cells probed"
        lines.append(
            f"{manifest['source']:<12} search: {how}, {100 * search['recall']:.1f} % of the {search['depth']} nearest found"
        )
    lines += [
        f"{manifest['source']:<12} {facts['bags']:>6} bags of {size}, {facts['leftover']} of {manifest['images']} images left over, "
        f"similarity {facts['mean_similarity']:.3f} (random bags {facts['mean_similarity_of_random_bags']:.3f})"
        for size, facts in manifest["sizes"].items()
    ]
    lines += [
        f"{manifest['source']:<12} {count:>6} images {reason}"
        for reason, count in manifest["left_out"].items()
        if count
    ]
    return "\n".join(lines)
