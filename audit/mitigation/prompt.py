"""`be-audit mitigate --prompt TEXT`: one prompt without a run, before and after."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from audit.base.errors import AuditError
from audit.base.options import option
from audit.index import Index
from audit.mitigation.config import MASK_LOSS, MovingConfig, find_clip, open_clip, trigger_column
from audit.mitigation.mitigate_shard import move_and_sample
from audit.run.schema import MASKS
from audit.scores.config import DEFAULT_MODEL, DTYPES, MODEL_HELP
from audit.scores.model import few_steps, find_model_folder, load_model
from audit.scores.prompt import check_finite, check_picture, check_prompt, draw, naming_what_overflows

FRACTION = 0.15  # of its own loss, the target where none is given: ordinary captions against copies on the testbed


@dataclass(frozen=True)
class MitigatePromptConfig(MovingConfig):
    """Which prompt to mitigate, of which model. Every field is a flag of `be-audit mitigate --prompt TEXT`."""

    prompt: str | None = option(None, "Mitigate this prompt instead, without a run.")
    output: str = option("be-audit-mitigate.png", "With --prompt: picture of before and after.", short="-o")
    model: str = option(DEFAULT_MODEL, f"With --prompt: {MODEL_HELP[0].lower()}{MODEL_HELP[1:]}")
    revision: str | None = option(None, "With --prompt: revision of a hub model.")
    model_config: str | None = option(None, "With --prompt and a checkpoint file: its diffusers folder.")
    lora: tuple[str, ...] = option((), "With --prompt: LoRA files, FILE or FILE:SCALE.")
    textual_inversion: tuple[str, ...] = option((), "With --prompt: files of learned tokens, FILE:TOKEN.")
    allow_pickle: bool = option(False, "With --prompt: load weights that are pickles (.bin, .pt) too.")
    steps: int = option(50, "With --prompt: sampling steps.", min=1)
    guidance_scale: float = option(7.5, "With --prompt: classifier-free guidance scale.")
    seed: int = option(0, "With --prompt: seed of the noise bank.", min=0, max=2**63 - 1)
    dtype: str = option("auto", "With --prompt: auto is float16 on CUDA.", choices=DTYPES)


def mitigate_prompt(config: MitigatePromptConfig) -> dict[str, tuple[float, float]]:
    """Mitigate one prompt on each of its noises, and draw the images before (above) and after (below).

    Returns:
        name -> (before, after), means over the images: `loss` (as in the column of mitigated/), `ld` and `magnitude`
        of the first step; `sscd` to the training picture nearest to each unmitigated image where `index` is given;
        `alignment` where there is a CLIP.
    Raises:
        AuditError: a prompt that is empty or no text, a model that cannot be loaded, numbers or pictures that are not
            finite, a picture that cannot be written.
    """
    from pipelines import MaskSource, Mitigator, TrajectorySampler

    prompt, count = config.prompt or "", config.num_images or 1
    check_prompt(prompt, "mitigate")
    check_picture(config.output)
    options: dict[str, Any] = {"steps": config.steps, "guidance_scale": config.guidance_scale}
    index = None if config.index is None else Index.open(config.index)
    descriptor = None if index is None else index.load_descriptor(config.sscd, config.device)
    folder, clip_folder = find_model_folder(config), find_clip(config.clip, config.model)
    for note in few_steps(folder, config.steps):
        print(note, file=sys.stderr)
    model = load_model(folder, config.device, config.dtype)
    clip = open_clip(clip_folder, config.device)
    # 1. unmitigated
    sampler = TrajectorySampler(model, None, count, config.seed, batch_size=config.batch_size, **options)
    with naming_what_overflows():
        before = sampler([prompt] * count, list(range(count)))
    assert before.images is not None
    mask = config.mask or ("energy" if before.be_mask is None else "final")
    if before.be_mask is None and config.loss == "ld" and mask != "energy":
        raise AuditError(f"--mask {mask}: {model.no_mask}: give --mask energy")
    scores = {**before.first, **before.windows()}
    scores |= {"ld_first_mask": scores["ld"]} if "ld" in scores else {}
    loss = scores["magnitude" if config.loss == "magnitude" else MASK_LOSS[mask]]
    trigger = trigger_column(config.loss, mask)
    score = scores["ld_first_mask" if trigger == "ld" else trigger]
    rows = np.flatnonzero(score > (-np.inf if config.threshold is None else config.threshold))
    # 2. mitigated, where triggered
    mitigator = Mitigator(
        model,
        config.loss,
        FRACTION * float(loss.mean()) if config.target is None else config.target,
        mask_source=MaskSource("final"),
        learning_rate=config.learning_rate,
        iterations=config.iterations,
        gradient_checkpointing=config.gradient_checkpointing,
        batch_size=config.batch_size,
        **options,
    )
    columns = {"loss": loss, "magnitude": scores["magnitude"]}
    columns |= {"ld": scores["ld_first"]} if "ld_first" in scores else {}
    changed, images = {name: values.copy() for name, values in columns.items()}, before.images.copy()
    if len(rows):
        masks = None if config.loss == "magnitude" else getattr(before, MASKS[mask])[rows]
        with naming_what_overflows():
            moved, after = move_and_sample(mitigator, sampler, [prompt] * len(rows), rows.tolist(), masks)
        windows = after.windows()
        changed["loss"][rows] = moved.last_loss
        changed["magnitude"][rows] = windows["magnitude"]
        if "ld" in changed:
            changed["ld"][rows] = windows["ld_first"]
        images[rows] = after.images
    # 3. what it did
    pairs = {name: (float(columns[name].mean()), float(changed[name].mean())) for name in columns}
    both = [list(before.images), list(images)]
    if index is not None and descriptor is not None:
        vectors = [descriptor(made).numpy() for made in both]
        nearest = index.vectors(index.search(vectors[0], 1)[0][:, 0])
        pairs["sscd"] = tuple(float((made * nearest).sum(1).mean()) for made in vectors)  # type: ignore[assignment]
    if clip is not None:
        pairs["alignment"] = tuple(float(clip(made, [prompt] * count).mean()) for made in both)  # type: ignore[assignment]
    for at, when in enumerate(("before", "after")):
        check_finite({f"{name} {when}": pair[at] for name, pair in pairs.items()})
    above, below = (
        {f"{when}, noise {at}": made[at] for at in range(count)}
        for when, made in zip(("before", "after"), both, strict=True)
    )
    draw(prompt, above, below, config.output)
    return pairs
