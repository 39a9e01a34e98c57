"""Images and captions from outside, as examples."""

from finecap_ray.sources.examples import ExampleSet, read_examples

__all__ = ["ExampleSet", "read_examples"]
