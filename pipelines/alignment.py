"""Text alignment: how well pictures still show what their captions say, by the CLIP score (Hessel et al. 2021)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.errors import ModelError
from pipelines.loading import find_device


@dataclass(frozen=True)
class ClipScore:
    """A loaded CLIP: `clip(images, captions)` gives one cosine a pair.

    Attributes:
        model, tokenizer, processor: of the CLIPModel folder; the processor resizes, crops and normalises pictures.
    """

    model: Any
    tokenizer: Any
    processor: Any

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image | NDArray[np.uint8]], captions: Sequence[str], batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Cosine of each image and its caption.

        Args:
            images: N PIL images or uint8 [H, W, 3] arrays, of any sizes.
            captions: N captions; longer ones are cut at CLIP's length.
            batch_size: pairs at a time.
        Returns:
            [N], float32, in [-1, 1]. (The CLIP score of the literature is this, cut at 0 and times 100 or 2.5.)
        Raises:
            ValueError: numbers of images and captions differ.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions")
        scores = [np.zeros(0, np.float32)]
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            pictures, texts = self.embed_images(images[part]), self.embed_captions(list(captions[part]))
            scores.append((pictures * texts).sum(1).clamp(-1, 1).cpu().numpy())
        return np.concatenate(scores)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image | NDArray[np.uint8]]) -> Tensor:
        """L2-normalised image embeddings, [N, D], float32."""
        pictures = [each if isinstance(each, Image.Image) else Image.fromarray(each) for each in images]
        pixels = self.processor(images=[each.convert("RGB") for each in pictures], return_tensors="pt")["pixel_values"]
        return self._project(self.model.get_image_features(pixels.to(self.model.device, self.model.dtype)))

    @torch.inference_mode()
    def embed_captions(self, captions: list[str]) -> Tensor:
        """L2-normalised text embeddings, [N, D], float32."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self._project(self.model.get_text_features(tokens["input_ids"].to(self.model.device)))

    def _project(self, features: Any) -> Tensor:
        # transformers 5 returns an output object here, earlier ones the tensor
        projected = features if isinstance(features, Tensor) else features.pooler_output
        return F.normalize(projected.float(), dim=1)


def load_clip(folder: str | Path, device: str = "auto") -> ClipScore:
    """Load any CLIP saved by transformers as `CLIPModel` (OpenAI's, OpenCLIP's conversions, the testbed's).

    The size of its pictures is read from its configuration; how they are normalised from preprocessor_config.json,
    where there is one, else OpenAI's means.

    Args:
        folder: a folder with config.json, weights and tokenizer.
        device: as in `load`. Weights are float32 on the CPU, else as stored.

    Raises:
        ModelError: no such folder, another kind of model, or weights that cannot be read.
    """
    import transformers

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json in it; give the folder of a transformers CLIPModel", "clip")
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise ModelError(f"{folder}: its config.json says model_type {kind!r}; give the folder of a CLIPModel", "clip")
    target = find_device(device)
    transformers.logging.set_verbosity_error()
    dtype = torch.float32 if target.type == "cpu" else "auto"
    try:
        model = transformers.CLIPModel.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,  # and no pickle
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder}: cannot be loaded: {first}", "clip") from error
    side = model.config.vision_config.image_size
    options: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if (path / "preprocessor_config.json").is_file():
        stored = json.loads((path / "preprocessor_config.json").read_text())
        options |= {name: stored[name] for name in ("image_mean", "image_std") if name in stored}
    # transformers 5 calls the one that needs no torchvision by a name of its own
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return ClipScore(model.to(target).eval().requires_grad_(False), tokenizer, kind(**options))
