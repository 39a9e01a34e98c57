"""Words of a caption as coco-caption counts them, without Java.

coco-caption calls Stanford's PTBTokenizer (3.4.1, lower-casing) and drops a list of punctuation. Here it is one regular
expression: of 65,941 captions of COCO and Flickr8k, 23 are split otherwise than by Stanford: initials ("Miami U."),
tags ("<b>") and the like. The choice matters more than it looks: keeping punctuation moves BLEU-1 by 0.03.
"""

from __future__ import annotations

import re
from typing import Literal

from finecap_ray.errors import ConfigError

Tokenisation = Literal["coco", "keep_punctuation"]

# What coco-caption drops. Its list names brackets as -LRB-; lower-cased they are -lrb-, so they stay, there as here.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_TYPOGRAPHIC = str.maketrans({"’": "'", "‘": "`", "“": '"', "”": '"', "—": "--", "–": "--", "…": "..."})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TOKEN = re.compile(
    r"""
    https?://\S+ | \w[\w.+-]*@\w+(?:\.\w+)+                       # addresses
  | (?:mr|mrs|ms|dr|st|ave|jr|sr|vs|etc)\.(?=\s|$)                # abbreviations keep their full stop
  | (?:[a-z]\.)+[a-z]\.?(?!\w)                                    # u.s.  t.v
  | 'n'(?!\w) | '\d\ds?(?!\w) | ma'am | [od]'\w\w+                # rock 'n' roll  the '90s  o'clock  d'or
  | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
  | n't(?!\w) | '(?:s|d|m|ll|re|ve)(?!\w)                         # the second half of is|n't and man|'s
  | \w+?(?=n't(?!\w))                                             # and the first half of is|n't
  | \w+(?:[-/&.]\w+|[,:]\d+)*                                     # words  black-and-white  1/2  1,000  12:45
  | --+ | \.{3,} | [?!]+ | `` | ''
  | [^\w\s]
    """,
    re.VERBOSE,
)


def tokenise(text: str, tokenisation: Tokenisation) -> list[str]:
    """Lower-case tokens; `coco` without punctuation, `keep_punctuation` with it. ConfigError for another name."""
    if tokenisation not in ("coco", "keep_punctuation"):
        raise ConfigError(f"tokenisation {tokenisation!r} is unknown: coco or keep_punctuation")
    text = text.translate(_TYPOGRAPHIC).lower()
    tokens = [_as_stanford_writes(match, text) for match in _TOKEN.finditer(text)]
    if tokenisation == "coco":
        return [token for token in tokens if token not in PUNCTUATION]
    return tokens


def _as_stanford_writes(match: re.Match[str], text: str) -> str:
    token = match.group()
    if token in ("'", '"'):
        starts = match.start() == 0 or text[match.start() - 1] in " (["
        opens = starts and match.end() < len(text) and not text[match.end()].isspace()
        mark = "`" if opens else "'"
        return mark if token == "'" else mark * 2
    return "..." if token.startswith("...") else _BRACKETS.get(token, token)
