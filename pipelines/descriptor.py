"""Copy descriptors: SSCD from a TorchScript or ONNX file, and what is done to a picture before it.

Pizzi et al. 2022, "A Self-Supervised Descriptor for Image Copy Detection". Two pictures are compared by the cosine of
their descriptors. It depends on the preprocessing too (a photograph resized to 288 and the same one squared to 320 have
a cosine of about 0.9): so the preprocessing is a part of the descriptor and recorded with it.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as SSCD was trained
DEFAULT_PREPROCESSING = "small-edge-288"
MAX_ASPECT = 10  # a crawl holds banners of 1 x 1000; beyond 1 x 10 they are squeezed, so that memory stays bounded
Picture: TypeAlias = "np.ndarray | Image.Image"
_Network: TypeAlias = Callable[[Tensor], Tensor]  # uint8 [B, H, W, 3] -> [B, dim], any device


@dataclass(frozen=True)
class Descriptor:
    """A loaded copy descriptor: `descriptor(pictures)` gives one L2-normalised vector a picture.

    Attributes:
        name: the weights' file name.
        sha256: of the weights' file.
        preprocessing: what is recorded and compared: resize, filter, normalisation.
        dim: length of a vector.
    """

    name: str
    sha256: str
    preprocessing: dict[str, str]
    dim: int
    network: _Network

    def facts(self) -> dict[str, Any]:
        """What an index records, and what must be equal for two vectors to be compared."""
        return {"name": self.name, "sha256": self.sha256, "dim": self.dim, "preprocessing": dict(self.preprocessing)}

    def prepare(self, picture: Picture) -> np.ndarray:
        """One picture (PIL, or uint8 [H, W, 3]) resized for the network, uint8 [h, w, 3]. Safe to call from threads.

        The resize is Pillow's bilinear filter, antialiased, as in Meta's own inference.
        """
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        size = resized(image.width, image.height, self.preprocessing["resize"])
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        return np.asarray(image.convert("RGB"))

    def embed(
        self,
        prepared: Sequence[np.ndarray],
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Vectors [N, dim], float32 on the CPU, of pictures from `prepare`; equal sizes share batches.

        Args:
            prepared: the more of them, the fuller the batches of mixed sizes. batch_size: of one; None for any.
            on_batch: called with the pictures of each batch when it is done; may raise to stop.
        """
        vectors = torch.empty(len(prepared), self.dim)
        groups = defaultdict(list)
        for position, picture in enumerate(prepared):
            groups[picture.shape].append(position)
        for group in groups.values():
            for at in range(0, len(group), batch_size or len(group)):
                positions = group[at : at + batch_size] if batch_size else group
                batch = torch.from_numpy(np.stack([prepared[i] for i in positions]))
                vectors[positions] = F.normalize(self._run(batch).float().cpu(), dim=1)
                if on_batch:
                    on_batch(len(positions))
        return vectors

    def __call__(self, pictures: Sequence[Picture] | Tensor) -> Tensor:
        """Describe pictures.

        Args:
            pictures: PIL images or uint8 [H, W, 3] arrays of any sizes, or one float tensor [B, 3, H, W] in [0, 1]
                (rounded to 8 bits, as every stored picture is).
        Returns:
            [B, dim], float32 on the CPU, L2-normalised.
        """
        if isinstance(pictures, Tensor):
            bytes_ = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8)
            pictures = list(bytes_.permute(0, 2, 3, 1).cpu().numpy())
        return self.embed([self.prepare(picture) for picture in pictures])

    def _run(self, batch: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                return self.network(batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self._run(half) for half in batch.chunk(2)])


def resized(width: int, height: int, resize: str) -> tuple[int, int]:
    """Size (width, height) after `small-edge-N` (the shorter side is N), `square-N` or `none`.

    Raises:
        ValueError: another name.
    """
    match = re.fullmatch(r"(small-edge|square)-([1-9]\d*)|none", resize)
    if not match:
        raise ValueError(f"preprocessing {resize!r} is unknown: use small-edge-N, square-N or none")
    if resize == "none":
        return width, height
    size = int(match[2])
    if match[1] == "square":
        return size, size
    short, long = sorted((width, height))
    longer = min(int(size * long / short), MAX_ASPECT * size)
    return (size, longer) if width <= height else (longer, size)


def load_descriptor(path: str | Path, *, device: str = "cpu", preprocessing: str = DEFAULT_PREPROCESSING) -> Descriptor:
    """Load SSCD, or any descriptor called like it.

    TorchScript takes ImageNet-normalised float [B, 3, H, W]. ONNX takes the same, or uint8 [B, H, W, 3] where the
    normalisation is inside the model. TorchScript is code: load only files you trust.

    Args:
        path: `.pt` (TorchScript) or `.onnx`.
        device: a torch device; ONNX runs on the GPU where onnxruntime can.
        preprocessing: `small-edge-288` (Meta's recommendation), `square-320` (Meta's for batches), `small-edge-N`,
            `square-N`, or `none`.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is neither TorchScript nor ONNX (pickles are never loaded), or an unknown preprocessing.
        ImportError: an ONNX file where onnxruntime is not installed.
    """
    path = Path(path)
    resized(1, 1, preprocessing)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    load = _load_onnx if path.suffix.lower() == ".onnx" else _load_torchscript
    network, normalise = load(path, device)
    side = int(preprocessing.rsplit("-", 1)[1]) if preprocessing != "none" else 64
    with torch.inference_mode():
        dim = network(torch.zeros(1, side, side, 3, dtype=torch.uint8)).shape[1]
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    facts = {"resize": preprocessing, "filter": "bilinear, antialiased", "normalise": normalise}
    return Descriptor(path.name, digest.hexdigest(), facts, dim, network)


def _normalised(batch: Tensor, device: str) -> Tensor:
    pixels = batch.to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def _load_torchscript(path: Path, device: str) -> tuple[_Network, str]:
    if not is_torchscript(path):
        raise ValueError(
            f"{path}: not a TorchScript archive; pickled checkpoints can run any code and are not loaded: "
            "use a .torchscript.pt or .onnx file"
        )
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path}: TorchScript that cannot be loaded: {str(error).splitlines()[0]}") from error
    return lambda batch: module(_normalised(batch, device)), "imagenet"


def is_torchscript(path: Path) -> bool:
    """Whether a file is laid out as a TorchScript archive (compiled code and constants), not as a pickle of tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = [name.split("/", 1)[-1] for name in archive.namelist()]
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def _load_onnx(path: Path, device: str) -> tuple[_Network, str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path}: ONNX weights need onnxruntime: pip install onnxruntime") from error
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()] + ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no base but Exception
        raise ValueError(f"{path}: ONNX that cannot be loaded: {str(error).splitlines()[0]}") from error
    first, output = session.get_inputs()[0], session.get_outputs()[0].name

    one_by_one = first.shape[0] == 1  # exported without a batch dimension

    def run(batch: Tensor) -> Tensor:
        chunks = batch.split(1) if one_by_one else [batch]
        return torch.cat([torch.from_numpy(session.run([output], {first.name: x.numpy()})[0]) for x in chunks])

    if first.type == "tensor(uint8)" and first.shape[-1] == 3:
        return lambda batch: run(batch.contiguous()), "inside the model"
    if first.type == "tensor(float)" and first.shape[1] == 3:
        return lambda batch: run(_normalised(batch, "cpu").contiguous()), "imagenet"
    raise ValueError(f"{path}: takes {first.type} {first.shape}; float [B, 3, H, W] or uint8 [B, H, W, 3] is needed")
