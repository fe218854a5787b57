"""Columns that name a picture or a caption, by name and in any case: one list for captions, index, verdicts, report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

URLS = ("url", "image_url", "img_url", "source_url", "link")
KEYS = (
    "key",
    "image_key",
    "uid",
    "uuid",
    "guid",
    "sample_id",
    "image_id",
    "file_name",
    "filename",
    "sha256",
    "md5",
    "hash",
)
ROW_NUMBERS = ("id",)
"""A bare `id` is often a row number, the same in tables that have nothing to do with each other."""
CAPTIONS = ("TEXT", "caption", "text", "prompt", "captions")
"""Where a caption is looked for when no column is named: exactly so and in this order, then in any case."""
TITLES = ("alt_text", "title")
"""What a picture without any of these may have instead."""

_KEPT = re.compile(r"(.*_)?(url|uri|key|id|uid|uuid|guid|hash|phash|md5|sha1|sha256|sha512)_*|link|file_?name")


def is_identity(name: str) -> bool:
    """Whether a column is carried through a run by default: its name says URL, key, id or hash."""
    return _KEPT.fullmatch(name.lower()) is not None


def id_text(value: object) -> str | None:
    """A value as an id: whole numbers as such in floats too (ids of a column with gaps), null for null and NaN.

    >>> id_text(1234567.0), id_text(0.5), id_text(float("nan")), id_text("007"), id_text(b"k1")
    ('1234567', '0.5', None, '007', 'k1')
    """
    if isinstance(value, bytes):  # of writers that know no strings
        return value.decode(errors="replace")
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    return None if value is None else str(value)


def first_named(names: Sequence[str], known: Iterable[str]) -> str | None:
    """The first of `known` that is among `names`, in any case, as `names` spells it; None where there is none."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def all_named(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Every one of `known` that is among `names`, in the order of `known`, as `names` spells it."""
    lower = {name.lower(): name for name in reversed(names)}
    return [lower[name] for name in known if name in lower]


def caption_columns(names: Sequence[str]) -> list[str]:
    """Those of a table's columns that could hold its captions, the likeliest first."""
    loose = [name for known in CAPTIONS for name in names if name.lower() == known.lower()]
    return list(dict.fromkeys([*(name for name in CAPTIONS if name in names), *loose]))


def source_columns(names: Sequence[str]) -> tuple[str | None, str | None]:
    """Which of the carried input columns are the source's URL and its key."""
    return first_named(names, URLS), first_named(names, (*KEYS, *ROW_NUMBERS))
