"""Captions made from one template are one finding: put near-equal captions together, by a rule a reader can follow.

1. Case, punctuation and order are set aside and every number is taken for the same: captions with the same words then
   are near-equal, and stay together.
2. An opening is a caption's first two words, a closing its last three; numbers and words that say nothing (WEAK_WORDS)
   are skipped.
3. An opening or closing shared by at least MIN_SHARED captions that are not near-equal is a template. A caption goes to
   the largest template it fits, to the opening where both are as large.

Linear in the captions: every caption is looked at twice.
"""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MIN_SHARED = 3
OPENING, CLOSING = 2, 3  # closings are longer: `... phone case` alone does not make two products one template
WEAK_WORDS = (
    "a an the and or of in on at by for with from to is are as it its this that your my our de la le "
    "photo photograph picture image"
)
_WEAK = frozenset([*WEAK_WORDS.split(), "0"])
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_NUMBER = re.compile(r"\d+")
_LONGEST = 2000  # characters looked at; captions of 10 kB exist and say no more


@dataclass(frozen=True)
class Groups:
    """Which captions belong together.

    Attributes:
        of: group number of every caption, numbered by first appearance.
        labels: of every group what is shared, `Shaw Floors …` or `… Wall Art Print`, or the caption itself.
    """

    of: list[int]
    labels: list[str]


def group_captions(captions: Sequence[str | None]) -> Groups:
    """Group captions by shared template (see the module)."""
    words = [_words(caption or "") for caption in captions]
    equal = [" ".join(sorted(set(each))) for each in words]
    shared: collections.Counter[tuple[str, ...]] = collections.Counter()
    keys = {}
    for content, each in zip(equal, words, strict=True):
        if content not in keys:
            keys[content] = _keys(each)
            shared.update(keys[content])
    of: list[int] = []
    labels: list[str] = []
    known: dict[object, int] = {}
    for caption, content in zip(captions, equal, strict=True):
        best = max(keys[content], key=lambda key: shared[key], default=None)  # max keeps the first: the opening
        template = best if best is not None and shared[best] >= MIN_SHARED else None
        group = known.setdefault(template or content, len(labels))
        if group == len(labels):
            labels.append(_label(caption or "", template[0]) if template else (caption or ""))
        elif template is None and labels[group] != caption:
            labels[group] = _NUMBER.sub("#", labels[group])
        of.append(group)
    return Groups(of, labels)


def _words(caption: str) -> list[str]:
    """Words in lower case, every number a 0."""
    text = unicodedata.normalize("NFKC", caption[:_LONGEST]).casefold()
    return _NUMBER.sub("0", " ".join(_WORD.findall(text))).split()


def _keys(words: list[str]) -> list[tuple[str, ...]]:
    strong = [word for word in words if word not in _WEAK]
    keys = []
    if len(strong) >= OPENING:  # a caption that is the opening and nothing else belongs to it
        keys.append(("open", *strong[:OPENING]))
    if len(strong) >= CLOSING:
        keys.append(("close", *strong[-CLOSING:]))
    return keys


def _label(caption: str, side: str) -> str:
    """The template as its first caption writes it, with # for numbers: `Shaw Floors …`."""
    text = unicodedata.normalize("NFKC", caption[:_LONGEST])
    strong = [word for word in _WORD.finditer(text) if _NUMBER.sub("0", word.group().casefold()) not in _WEAK]
    if len(strong) < (OPENING if side == "open" else CLOSING):  # case folding can split words
        return caption
    shared = text[: strong[OPENING - 1].end()] + " …" if side == "open" else "… " + text[strong[-CLOSING].start() :]
    return _NUMBER.sub("#", shared)
