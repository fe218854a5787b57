"""What a diffusers pipeline does where its call is told nothing: read from its signatures, not written down again."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from pipelines.model import TextFacts

CLEANED = 1 << 12  # characters of a caption that are cleaned: some of diffusers' patterns take time as their square


def published_pipeline(*names: str) -> Any:
    """The first of these pipeline classes that diffusers has."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()  # a pipeline's import warns of parts it could have
    return next(kind for name in names if (kind := getattr(diffusers, name, None)) is not None)


def call_default(pipeline: Any, option: str, otherwise: Any = None) -> Any:
    """The default of an option of a pipeline's call; `otherwise` where that has no such option.

    Args:
        pipeline: a class, or one loaded.
    """
    takes = inspect.signature(_class(pipeline).__call__).parameters
    return takes[option].default if option in takes else otherwise


def encode_options(pipeline: Any) -> list[str]:
    """Options of a pipeline's call that end in its encode_prompt, but for the prompt itself."""
    kind = _class(pipeline)
    call, encode = (inspect.signature(each).parameters for each in (kind.__call__, kind.encode_prompt))
    shared = [name for name in encode if name in call and encode[name].kind is not inspect.Parameter.VAR_KEYWORD]
    return [name for name in shared if name not in ("self", "prompt")]


def encode_defaults(pipeline: Any) -> dict[str, Any]:
    """What a pipeline's call gives its encode_prompt where it is told nothing beside the prompt.

    `clean_caption` (of what T5 and Gemma read) is what comes of it: diffusers leaves captions as they are, but for case
    and blanks, where a package it cleans them with is missing.
    """
    found = {name: call_default(pipeline, name) for name in encode_options(pipeline)}
    return found | ({"clean_caption": cleans_captions(pipeline)} if "clean_caption" in found else {})


def cleans_captions(pipeline: Any) -> bool:
    """Whether captions are cleaned on this machine (URLs, HTML, `#123` taken out) unless a call says otherwise."""
    return bool(call_default(pipeline, "clean_caption")) and not missing_cleaners()


def missing_cleaners() -> list[str]:
    """Packages that diffusers cleans captions with, one as much as the other, and that are not installed."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    there = {"beautifulsoup4": is_bs4_available(), "ftfy": is_ftfy_available()}
    return [name for name, available in there.items() if not available]


def cleanable(captions: list[str], clean: bool) -> list[str]:
    """Captions as they may be cleaned: no longer than CLEANED, which fills any text encoder that has them cleaned."""
    return [caption[:CLEANED] for caption in captions] if clean else captions


def facts_of_whole(facts: TextFacts, given: list[str], captions: list[str]) -> TextFacts:
    """Facts of what was `given` for captions, as facts of these: of one that was cut, part was not seen."""
    cut = torch.tensor([len(part) < len(whole) for part, whole in zip(given, captions, strict=True)])
    return facts._replace(truncated=facts.truncated | cut)


def _class(pipeline: Any) -> Any:
    return pipeline if isinstance(pipeline, type) else type(pipeline)
