"""Mitigation at inference: a diffusers pipeline, wrapped, that moves the prompts that need it and leaves the others."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.attention import MaskSource
from pipelines.errors import ModelError
from pipelines.families import find_family, supported
from pipelines.families.defaults import call_default, encode_options
from pipelines.mitigation import Mitigator
from pipelines.model import DiffusionModel, Embeddings


class MitigatedPipeline:
    """A diffusers pipeline that mitigates the prompts that need it; called like the one it wraps.

    Images of prompts that do not trigger are bit-identical to the wrapped pipeline's for the same generator, whatever
    its sampler. The trigger is the score be-audit calibrates (first of 50 DDIM steps, the image's own noise), also
    where the pipeline is called with another sampler or number of steps: `threshold` is that of the column `ld` (mask
    `first` or `final`), `ld_energy` (mask `energy`) or `magnitude` (that loss). It costs two evaluations an
    image; a triggered one costs up to `iterations` forward and backward passes more, and for mask `final` an
    unmitigated trajectory.

    Args:
        pipe: a loaded pipeline of one of be-audit's families. It is not changed.
        threshold, target, loss, learning_rate, iterations, weight_decay, steps, gradient_checkpointing, batch_size:
            as in Mitigator.
        mask: step of the mask of `ld`: `first`, `final` or `energy`.

    Raises:
        ModelError: another kind of pipeline.

    Example:
        >>> pipe = MitigatedPipeline(StableDiffusionPipeline.from_pretrained(folder), threshold=4.0, target=2.0)
        >>> output = pipe("a caption", num_inference_steps=30)
        >>> output.images, output.mitigation.triggered
    """

    def __init__(
        self,
        pipe: Any,
        threshold: float | None,
        target: float,
        loss: str = "ld",
        mask: Literal["first", "final", "energy"] = "first",
        learning_rate: float = 0.05,
        iterations: int = 10,
        weight_decay: float = 0.01,
        steps: int = 50,
        gradient_checkpointing: bool = False,
        batch_size: int = 8,
    ) -> None:
        families = [find_family(kind.__name__) for kind in type(pipe).__mro__]
        known = [family for family in families if family is not None]
        if not known:
            raise ModelError(f"{type(pipe).__name__} cannot be mitigated; supported are {', '.join(supported())}")
        if "latents" not in inspect.signature(pipe.__call__).parameters:
            raise ModelError(f"{type(pipe).__name__} cannot be mitigated: it draws its initial noise itself")
        self.pipe, self.family = pipe, known[0]
        self.options: dict[str, Any] = {
            "loss": loss,
            "target": target,
            "threshold": threshold,
            "mask_source": MaskSource(mask),
            "learning_rate": learning_rate,
            "iterations": iterations,
            "weight_decay": weight_decay,
            "steps": steps,
            "gradient_checkpointing": gradient_checkpointing,
            "batch_size": batch_size,
        }

    def __call__(self, prompt: str | list[str], **options: Any) -> Any:
        """Generate.

        Args:
            prompt: one or several. options: any option of the wrapped pipeline, by name.
        Returns:
            the wrapped pipeline's output with the attribute `mitigation`, a `Mitigation` with a row for every image
            (with `return_dict=False` the plain tuple, without it).
        Raises:
            ValueError: embeddings given instead of prompts, or an IP-Adapter.
        """
        for name in options:
            if "_embeds" in name or name in self.family.encoded or name.startswith("ip_adapter"):
                raise ValueError(f"{name}: MitigatedPipeline makes the embeddings itself; pass the prompt alone")
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        copies = options.pop("num_images_per_prompt", 1) or 1
        # 1. embeddings and noise as the pipeline itself would make them; a new model each time, because weights,
        #    device and dtype are the caller's to change
        network = getattr(self.pipe, self.family.denoiser_part)
        model = self.family(self.pipe, self.pipe._execution_device, network.dtype)
        default = call_default(self.pipe, "guidance_scale", model.guidance_default)
        guidance = float(options.get("guidance_scale", default))
        encoded, facts = self._encode(model, captions, copies, guidance, options)
        repeated = [fact.repeat_interleave(copies) for fact in facts]
        latents = self._noise(model, len(captions) * copies, encoded["prompt_embeds"].dtype, options)
        # 2. trigger and mitigate
        prompts = Embeddings(encoded["prompt_embeds"], model.conditions(encoded), *repeated)
        mitigator = Mitigator(model, guidance_scale=guidance, **self.options)
        mitigation = mitigator(prompts, latents * model.schedule.noise_scale)
        # 3. generate as usual
        encoded["prompt_embeds"] = mitigation.embeddings.hidden
        if "negative_prompt" in inspect.signature(self.pipe.__call__).parameters:
            options["negative_prompt"] = None  # its embeddings are given instead
        output = self.pipe(latents=latents, **encoded, **options)
        if options.get("return_dict", True):
            output.mitigation = mitigation
        return output

    @torch.no_grad()
    def _encode(
        self, model: DiffusionModel, captions: list[str], copies: int, guidance: float, options: dict[str, Any]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """The pipeline's own embeddings by the name of the option they go back in; takes their options out."""
        taken = {name: options.pop(name) for name in encode_options(self.pipe) if name in options}
        if "lora_scale" in inspect.signature(self.pipe.encode_prompt).parameters:
            given = [options[name] or {} for name in options if name.endswith("attention_kwargs")]  # cross, joint, ...
            taken["lora_scale"] = next((each["scale"] for each in given if "scale" in each), None)
        encoded, facts = model.embed(
            captions,
            num_images_per_prompt=copies,
            do_classifier_free_guidance=guidance > 1 and not model.guided_by_embedding,
            **taken,
        )
        return {name: value for name, value in encoded.items() if value is not None}, facts

    def _noise(self, model: DiffusionModel, images: int, dtype: torch.dtype, options: dict[str, Any]) -> Tensor:
        """The caller's latents, or the ones the pipeline would draw; tells the model their size."""
        from diffusers.utils.torch_utils import randn_tensor

        latents = options.pop("latents", None)
        scale = self.pipe.vae_scale_factor
        if latents is None:
            channels, *default = model.latent_shape
            asked = (options.get("height"), options.get("width"))
            if model.sides_together and not all(asked):  # that pipeline takes both or neither
                asked = (None, None)
            sides = [side // scale if side else usual for side, usual in zip(asked, default, strict=True)]
            shape = (images, channels, *sides)
            latents = randn_tensor(shape, options.get("generator"), self.pipe._execution_device, dtype)
        model.set_size((int(latents.shape[2]), int(latents.shape[3])))
        return latents
