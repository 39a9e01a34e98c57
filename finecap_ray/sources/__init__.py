"""Images and captions from outside, as examples."""

from finecap_ray.sources.examples import read_examples

__all__ = ["read_examples"]
