"""Image-text dual encoders on open_clip: load, embed, train."""

from finecap_ray.scorers.scorer import load_scorer

__all__ = ["load_scorer"]
