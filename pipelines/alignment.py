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

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipScore:
    """A loaded CLIP: `clip(images, captions)` gives one cosine a pair.

    Attributes:
        model, tokenizer: of the CLIPModel folder. image_size: side of its pictures, pixels.
        mean, std: of its pictures' normalisation.
    """

    model: Any
    tokenizer: Any
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

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
        pixels = torch.from_numpy(np.stack([self.prepare(image) for image in images])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.mean, self.std))
        normalised = (pixels.float() / 255 - mean) / std
        return self._project(self.model.get_image_features(normalised.to(self.model.device, self.model.dtype)))

    @torch.inference_mode()
    def embed_captions(self, captions: list[str]) -> Tensor:
        """L2-normalised text embeddings, [N, D], float32."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self._project(self.model.get_text_features(tokens["input_ids"].to(self.model.device)))

    def prepare(self, image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """CLIP's preprocessing up to normalisation: shorter side resized (bicubic, antialiased), centre crop.

        Returns:
            uint8 [image_size, image_size, 3].
        """
        picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
        size, short = self.image_size, min(picture.size)
        width, height = (max(size, int(size * side / short)) for side in picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return np.asarray(picture)[top : top + size, left : left + size]

    def _project(self, features: Any) -> Tensor:
        # transformers 5 returns an output object here, earlier ones the tensor
        projected = features if isinstance(features, Tensor) else features.pooler_output
        return F.normalize(projected.float(), dim=1)


def load_clip(folder: str | Path, device: str = "auto") -> ClipScore:
    """Load any CLIP saved by transformers as `CLIPModel` (OpenAI's, OpenCLIP's conversions, the testbed's).

    The size of its pictures is read from its configuration; mean and standard deviation from
    preprocessor_config.json, where there is one, else OpenAI's.

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
        model = transformers.CLIPModel.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder}: cannot be loaded: {first}", "clip") from error
    processor: dict[str, Any] = {}
    if (path / "preprocessor_config.json").is_file():
        processor = json.loads((path / "preprocessor_config.json").read_text())
    return ClipScore(
        model.to(target).eval().requires_grad_(False),
        tokenizer,
        model.config.vision_config.image_size,
        tuple(processor.get("image_mean", CLIP_MEAN)),
        tuple(processor.get("image_std", CLIP_STD)),
    )
