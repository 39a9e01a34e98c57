"""The embedded data: pictures of emoji with captions, so that everything runs on a laptop without a download.

Origin: Microsoft's Fluent Emoji in the 3D style, as packaged by LobeHub (npm @lobehub/fluent-emoji-3d 1.1.0), with the
names and tags of emojibase-data 17.0.0; all MIT, notices in NOTICE. `tools/build_fluent.py` makes the file: 128 px RGB
WebP on white. The package keeps some pictures under the name of another skin tone or gender; the build puts them right.

Captions, each a part of the truth as human captions are, the full name always first and without repeats:

    woman running medium-light skin tone      the full name
    woman running                             without skin tone
    person running medium-light skin tone     without gender
    person running                            without both
    fast marathon move rush speed             up to five tags

Splits. A family is one base emoji in all its skin tones and genders (woman, man, person running: 18 images).

    train         what is learned from
    dev_seen      groups of 5 images out of large families whose other images are in train
    test_seen     the same
    dev_unseen    whole families, of which no image is in train: 6 and 18 look-alikes, and some single ones
    test_unseen   the same

So bags of 5 mined within an evaluation split are real look-alikes. All flags are in train.
"""

from __future__ import annotations

from importlib import resources


def fluent_file() -> str:
    """Path of the parquet file with all embedded examples."""
    return str(resources.files("finecap_ray") / "sources" / "fluent.parquet")
