"""`be-audit mitigate --prompt TEXT`: one prompt without a run, before and after."""

from __future__ import annotations

from typing import Any

import numpy as np

from audit.confirm import open_index
from audit.errors import AuditError
from audit.matching import MATCH_MASKS
from audit.mitigate import MitigateConfig, find_clip, open_clip, trigger_column
from audit.mitigate_job import MASK_LOSS, move_and_sample
from audit.run import DEFAULT_RUN
from audit.scan import find_model_folder
from audit.score import draw

FRACTION = 0.15  # of its own loss, the target where none is given: ordinary captions against copies on the testbed


def mitigate_prompt(config: MitigateConfig) -> dict[str, tuple[float, float]]:
    """Mitigate one prompt on each of its noises, and draw the images before (above) and after (below).

    Returns:
        name -> (before, after), means over the images: `loss` (as in the column of mitigated/), `ld` and `magnitude`
        of the first step; `sscd` to the training picture nearest to each unmitigated image where `index` is given;
        `alignment` where there is a CLIP.
    Raises:
        AuditError: an empty prompt, flags that need a run, a model that cannot be loaded, a picture that cannot be
            written.
    """
    from pipelines import MaskSource, Mitigator, ModelError, TrajectorySampler, load

    prompt, count = config.prompt or "", config.num_images or 1
    if not prompt.strip():
        raise AuditError("--prompt: is empty; give the caption to mitigate")
    if config.run != DEFAULT_RUN:
        raise AuditError(f"{config.run}: give a run or --prompt, not both")
    if config.thresholds is not None:
        raise AuditError("--thresholds: needs a run; give --threshold with --prompt")
    options: dict[str, Any] = {"steps": config.steps, "guidance_scale": config.guidance_scale}
    index = None if config.index is None else open_index(config.index)
    descriptor = None if index is None else index.load_descriptor(config.sscd, config.device)
    folder, clip_folder = find_model_folder(config), find_clip(config.clip, config.model)
    try:
        model = load(folder, config.device, config.dtype)
    except ModelError as error:
        raise AuditError(str(error)) from error
    clip = open_clip(clip_folder, config.device)
    # 1. unmitigated
    sampler = TrajectorySampler(model, None, count, config.seed, batch_size=config.batch_size, **options)
    before = sampler([prompt] * count, list(range(count)))
    assert before.images is not None
    scores = {**vars(before), **before.windows()}
    loss = scores["magnitude" if config.loss == "magnitude" else MASK_LOSS[config.mask]]
    trigger = trigger_column(config.loss, config.mask)
    score = scores["ld_first_mask" if trigger == "ld" else trigger]
    rows = np.flatnonzero(score > (-np.inf if config.threshold is None else config.threshold))
    # 2. mitigated, where triggered
    mitigator = Mitigator(
        model,
        config.loss,  # type: ignore[arg-type]
        FRACTION * float(loss.mean()) if config.target is None else config.target,
        mask_source=MaskSource("final"),
        learning_rate=config.learning_rate,
        iterations=config.iterations,
        gradient_checkpointing=config.gradient_checkpointing,
        batch_size=config.batch_size,
        **options,
    )
    columns = {"loss": loss, "ld": scores["ld_first"], "magnitude": scores["magnitude"]}
    changed, images = {name: values.copy() for name, values in columns.items()}, before.images.copy()
    if len(rows):
        masks = getattr(before, MATCH_MASKS[config.mask])[rows]
        moved, after = move_and_sample(mitigator, sampler, [prompt] * len(rows), rows.tolist(), masks)
        windows = after.windows()
        changed["loss"][rows] = moved.last_loss
        changed["ld"][rows], changed["magnitude"][rows] = windows["ld_first"], windows["magnitude"]
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
    above, below = (
        {f"{when}, noise {at}": made[at] for at in range(count)}
        for when, made in zip(("before", "after"), both, strict=True)
    )
    draw(prompt, above, below, config.output)
    return pairs
