"""Caption metrics against human references, and what the captions are like by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from finecap_ray.errors import DataError
from finecap_ray.evaluation.tokenise import Tokenisation, tokenise


def caption_metrics(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenisation: Tokenisation = "coco",
) -> dict[str, float]:
    """Metrics of one caption per image: those of `reference_metrics` and of `text_statistics`, in one dict.

    candidates: image id -> caption; references: image id -> human captions. References of other images are not used,
    nor do they count in CIDEr's document frequencies.
    Raises DataError for no candidates, or for candidates without references.
    """
    return {
        **reference_metrics(candidates, references, tokenisation),
        **text_statistics(list(candidates.values())),
    }


def reference_metrics(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenisation: Tokenisation
) -> dict[str, float]:
    """Bleu_1 to Bleu_4 and ROUGE_L (0 to 1) and CIDEr (CIDEr-D, 0 to 10; papers print it times 100), by coco-caption.

    With one image CIDEr is 0: every n-gram is in all documents.
    """
    if not candidates:
        raise DataError("caption metrics of 0 captions: give at least one")
    _check_texts(candidates, references)
    bare = [image_id for image_id in candidates if not references.get(image_id)]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(candidates)} captions have no reference, such as those of {', '.join(map(str, bare[:5]))}: "
            "leave these out, and count them"
        )
    hypotheses = {image_id: [" ".join(tokenise(text, tokenisation))] for image_id, text in candidates.items()}
    truths = {
        image_id: [" ".join(tokenise(text, tokenisation)) for text in references[image_id]] for image_id in candidates
    }
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    rouge, _ = Rouge().compute_score(truths, hypotheses)
    cider, _ = Cider().compute_score(truths, hypotheses)
    scores = {f"Bleu_{n}": score for n, score in enumerate(bleu, start=1)} | {"ROUGE_L": rouge, "CIDEr": cider}
    return {name: float(score) for name, score in scores.items()}


def text_statistics(captions: Sequence[str]) -> dict[str, float]:
    """What tells a collapsed or hacked captioner from a sound one; words are `coco` tokens, without punctuation.

    distinct_1, distinct_2   distinct words and pairs of neighbouring words, per word and per pair
    vocabulary               distinct words
    mean_length              words per caption
    repeated_words           share of the words that the same caption has already used ("a" in "a man and a dog" counts)
    trailing_space           share of the captions that end in white space
    full_stop                share of the captions that end in a full stop
    """
    if not captions:
        raise DataError("text statistics of 0 captions: give at least one")
    texts = [tokenise(caption, "coco") for caption in captions]
    words = [word for text in texts for word in text]
    pairs = [pair for text in texts for pair in pairwise(text)]
    repeated = sum(len(text) - len(set(text)) for text in texts)
    return {
        "distinct_1": _share(len(set(words)), len(words)),
        "distinct_2": _share(len(set(pairs)), len(pairs)),
        "vocabulary": float(len(set(words))),
        "mean_length": len(words) / len(captions),
        "repeated_words": _share(repeated, len(words)),
        "trailing_space": sum(caption != caption.rstrip() for caption in captions) / len(captions),
        "full_stop": sum(caption.rstrip().endswith(".") for caption in captions) / len(captions),
    }


def _check_texts(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """A text where a list belongs would be read letter by letter, and scored."""
    for image_id, text in candidates.items():
        if not isinstance(text, str):
            raise DataError(
                f"the caption of {image_id} is {type(text).__name__}, not a text: give one caption per image"
            )
        own = references.get(image_id, ())
        if isinstance(own, str) or not all(isinstance(one, str) for one in own):
            raise DataError(f"the references of {image_id} are no list of texts: {str(own)[:80]!r}")


def _share(part: int, whole: int) -> float:
    """part / whole, and 0 of nothing: captions without a word have no distinct and no repeated ones."""
    return part / whole if whole else 0.0
