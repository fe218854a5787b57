"""The half of compare_official that runs beside the authors' code, in an environment of its own.

Their pipeline and their registration of attention are imported from the clone; what their detect_mem.py does around
them (two passes, the second under the mask of the first) is done here. Their store of attention keeps maps of 64 x 64
cells and 8 heads alone, so a controller of the testbed's shape stands in for it.

Run by compare_official: python official_scores.py CLONE WORK, in the other environment; nothing of ours is imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Stopped(Exception):
    """Raised by the pipeline's own callback to end it after a step."""


def main(clone: Path, work: Path) -> None:
    sys.path.insert(0, str(clone))
    import diffusers
    import transformers
    from controller import AttentionControl
    from local_sd_pipeline import LocalStableDiffusionPipeline

    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    job = json.loads((work / "job.json").read_text())
    torch.set_num_threads(1)
    noise = torch.from_numpy(np.load(work / "noise.npy"))
    cells, steps = noise.shape[-2:].numel(), job["steps"]

    class LastStep(AttentionControl):
        """Cross-attention of the largest maps at the last step, averaged over heads."""

        def reset(self) -> None:
            super().reset()
            self.maps: list[torch.Tensor] = []

        def between_steps(self) -> None:
            pass

        def forward(self, attn: torch.Tensor, is_cross: bool, place_in_unet: str) -> torch.Tensor:
            if is_cross and attn.shape[1] == cells and self.cur_step == steps - 1:
                self.maps.append(attn.unflatten(0, (-1, job["heads"])).mean(1))
            return attn

    def pipeline() -> Any:
        loaded = LocalStableDiffusionPipeline.from_pretrained(
            work / "pipeline", torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
        loaded.scheduler = diffusers.DDIMScheduler.from_config(loaded.scheduler.config)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    options = {
        "latents": noise,
        "num_inference_steps": steps,
        "guidance_scale": job["guidance_scale"],
        "track_noise_norm": True,
        "output_type": "latent",
    }
    watched, plain, control = pipeline(), pipeline(), LastStep()  # their two passes are two processes
    found: dict[str, list[Any]] = {"magnitude": [], "ld": [], "mask": []}
    seconds: dict[str, list[float]] = {"first": [], "whole": [], "masked": []}

    def stop(*_: Any) -> None:
        raise Stopped

    plain("warm up", **options)
    watched("warm up", **options)
    for caption in job["captions"]:
        started = time.process_time()
        try:
            plain(caption, **options, callback=stop)
        except Stopped:
            seconds["first"].append(time.process_time() - started)

        control.reset()
        started = time.process_time()
        _, track = watched(caption, controller=control, **options)
        seconds["whole"].append(time.process_time() - started)
        found["magnitude"].append(track["text_noise_norm"][0])

        end = len(watched.tokenizer.encode(caption)) - 1
        mask = torch.stack(control.maps).mean(0)[..., min(end, control.maps[0].shape[-1] - 1)]
        mask = mask.reshape(1, 1, *noise.shape[-2:])
        _, track = plain(caption, controller=control, attn_mask=mask, **options)
        seconds["masked"].append(time.process_time() - started)
        found["ld"].append(track["text_noise_norm_masked"][0])
        found["mask"].append(mask[0, 0].numpy())
    found |= {f"seconds_{name}": taken for name, taken in seconds.items()}
    np.savez(work / "official.npz", **{name: np.asarray(values) for name, values in found.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
