"""The policies: image captioners as Hugging Face models, behind one loader."""

from finecap_ray.captioners.families import family_of
from finecap_ray.captioners.loader import load_captioner

__all__ = ["family_of", "load_captioner"]
