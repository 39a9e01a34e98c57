"""The policies: image captioners as Hugging Face models, behind one loader."""

from finecap_ray.captioners.loader import load_captioner

__all__ = ["load_captioner"]
