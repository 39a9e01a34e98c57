"""What bag sets wrote down of themselves, in lines for a person."""

from __future__ import annotations

from typing import Any


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
