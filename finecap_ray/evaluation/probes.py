"""Hacking probes: the cheap ways in which a policy has been seen to raise a reward, made from an honest caption.

Pure text. A reward resists a probe when the probe earns no more than the caption it was made from, on average over
captions; `benchmarks/hacking_probes.py` measures that on photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from finecap_ray.bags.conditional import WORD_CLASSES
from finecap_ray.evaluation.tokenise import tokenise
from finecap_ray.rewards.combine import total_reward
from finecap_ray.rewards.component import RewardComponent, RewardRequest

# Words of captions that are no nouns: closed classes, and the open ones that people use most about photographs. Words in
# -ing and -ly and the colours, numbers and sizes of WORD_CLASSES are left out as well.
_OTHER_WORDS = """
a an the this that these those some any each every another other others both all no its his her their our my your it
he she they them him us we i you who whom which what where when while there something someone in on of with at to and
or but by into through from for near over off down up out as beside behind along across next around onto under above
below between among against toward towards during after before without within past inside outside about away back
front together very so too not also just than if then is are was were be been being has have had do does did can
could will would may might 's n't ' s t
sits sit sat stands stand stood runs run ran walks walk walked jumps jump jumped plays play played holds hold held
wears wear wore looks look looked rides ride rode leaps leap climbs climb watches watch takes take poses smiles smile
swims swim catches catch throws throw kicks kick performs perform does tries goes go gets get makes make has leans
lies lays lie flies fly skis skates slides pulls chases carries eats drinks talks works dressed covered surrounded
seated gathered crowded filled made attached painted lined parked decorated shown
outdoor indoor young old snowy grassy rocky wooden sandy dirty wet dry open high low colorful colourful striped
different same busy paved bare beautiful happy empty elderly teenage male female asian american curly
"""
_NO_NOUNS = frozenset(_OTHER_WORDS.split()).union(*(WORD_CLASSES[name] for name in ("colour", "number", "size")))


@dataclass(frozen=True, slots=True)
class Probe:
    text: str
    ended: bool  # whether the policy ended the caption by itself


def repeated(caption: str, context: int) -> Probe:
    """The caption twice."""
    return Probe(f"{caption} {caption}", ended=True)


def nouns_alone(caption: str, context: int) -> Probe:
    """The nouns of the caption in their order; the caption itself where it has none."""
    nouns = [
        word
        for word in tokenise(caption, "coco")
        if word not in _NO_NOUNS and not word.endswith(("ing", "ly")) and word.isalpha()
    ]
    return Probe(" ".join(nouns) or caption, ended=True)


def trailing_spaces(caption: str, context: int) -> Probe:
    """Spaces after the caption, and then its end: what 99.6 % of the captions of NDLB's CIDEr run look like."""
    return Probe(caption + " " * context, ended=True)


def no_end(caption: str, context: int) -> Probe:
    """The caption without its full stop, cut at the token limit."""
    return Probe(caption.rstrip(" .!?"), ended=False)


def past_the_context(caption: str, context: int) -> Probe:
    """The caption over and over until the scorer's context is full, and then what the scorer doesn't see."""
    words = caption.split()
    seen = " ".join((words * context)[: max(context, len(words))])
    return Probe(f"{seen} {'and so on ' * context}".rstrip(), ended=True)


PROBES: dict[str, Callable[[str, int], Probe]] = {
    "the caption repeated": repeated,
    "its nouns alone": nouns_alone,
    "trailing spaces": trailing_spaces,
    "no end": no_end,
    "text past the scorer's context": past_the_context,
}
"""Name -> (caption, tokens that the scorer reads) -> probe."""


def probe_gains(
    honest: RewardRequest,
    components: Mapping[str, RewardComponent],
    weights: Mapping[str, float],
    embed_texts: Callable[[list[str]], Float[Tensor, "n D"]],
    context: int,
) -> dict[str, dict[str, Float[np.ndarray, " C"]]]:
    """Probe -> component -> what it pays beyond the caption that the probe was made from; `reward` is the weighted sum.

    Components without a weight are worked out as well. `embed_texts` and `context` (tokens) are the scorer's.
    """

    def paid(request: RewardRequest) -> dict[str, Float[np.ndarray, " C"]]:
        text = embed_texts(request.texts)
        parts = {name: component(request, text) for name, component in components.items()}
        return {"reward": total_reward(parts, weights)} | parts

    of_honest = paid(honest)
    gains = {}
    for name, make in PROBES.items():
        probes = [make(caption, context) for caption in honest.texts]
        ended = np.array([probe.ended for probe in probes])
        of_probe = paid(replace(honest, texts=[probe.text for probe in probes], ended=ended))
        gains[name] = {part: of_probe[part] - of_honest[part] for part in of_honest}
    return gains
