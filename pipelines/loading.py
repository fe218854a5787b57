"""Load a Stable Diffusion model (1.x, 2.x, XL) by hub id or folder, and ask it for noise predictions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.attention import cross_attention_layers
from pipelines.errors import ModelError
from pipelines.formulas import noise_from_v

SUPPORTED = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHT_FOLDERS = ("unet", "text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder on disk that `load` can read.

    Attributes:
        path: the folder. name: what the user asked for. revision: the hub's commit, or None for a local folder.
        kind: `sd` or `sdxl`.
    """

    path: Path
    name: str
    revision: str | None
    kind: str

    def weights_sha256(self) -> str:
        """One hash over every weight and configuration file that changes a result (U-Net, text encoders, VAE)."""
        total = hashlib.sha256()
        for part in (*WEIGHT_FOLDERS, "scheduler", "tokenizer", "tokenizer_2"):
            for file in sorted((self.path / part).glob("*")):
                if file.is_file():
                    total.update(f"{part}/{file.name} {_file_sha256(file)}\n".encode())
        return total.hexdigest()

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration as the folder has it, without diffusers' private keys."""
        config = _read_json(self.path, "scheduler/scheduler_config.json", self.name)
        return {key: value for key, value in sorted(config.items()) if key != "_diffusers_version"}

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents, read from the configuration alone."""
        return _latent_shape(_read_json(self.path, "unet/config.json", self.name))


def find_model(name: str, revision: str | None = None) -> ModelFolder:
    """Find a model's folder: a local one as it is, a hub id through diffusers' own download and cache.

    Only small files are read here, no weights; everything wrong with the folder is said before anything is loaded.

    Raises:
        ModelError: no such model, not a diffusers folder, no U-Net, or an architecture without the cross-attention
            these scores are defined on (SD3, FLUX, ... are named with the reason).
    """
    path = Path(name)
    if not path.is_dir():
        if path.exists():
            raise ModelError(f"{name}: is a file; give a diffusers folder or a hub id")
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelError(f"{name}: no such folder; give a diffusers folder or a hub id like owner/name")
        path = _download(name, revision)
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{name}: no model_index.json in it; give the folder of a diffusers pipeline")
    index = _read_json(path, "model_index.json", name)
    architecture = str(index.get("_class_name"))
    if architecture not in SUPPORTED:
        if "unet" not in index:
            reason = (
                "it is a transformer with joint attention: the EOS attention that BE masks are read from is not there"
            )
        else:
            reason = "its prompt does not condition the U-Net as Stable Diffusion's does"
        raise ModelError(
            f"{name}: {architecture} is not supported: {reason}; supported are {', '.join(sorted(SUPPORTED))}"
        )
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (path / part).is_dir() or not any((path / part).iterdir()):
            raise ModelError(f"{name}: the folder has no {part}/; download the model again")
    unet = _read_json(path, "unet/config.json", name)
    if unet["in_channels"] != unet["out_channels"]:
        raise ModelError(f"{name}: the U-Net takes {unet['in_channels']} channels: inpainting is not supported")
    if not any("CrossAttn" in block for block in unet["down_block_types"]):
        raise ModelError(f"{name}: the U-Net has no cross-attention in its down path, so no BE mask")
    commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else None
    return ModelFolder(path, name, commit, SUPPORTED[architecture])


def find_layers(folder: ModelFolder) -> list[str]:
    """Names of a model's cross-attention layers, from its configuration alone: no weights are read."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return cross_attention_layers(UNet2DConditionModel.from_config(_read_json(folder.path, "unet/config.json", "")))


class TokenFacts(NamedTuple):
    """Of B captions: index of the first end-of-text id of the padded ids (the last one when truncated), [B] int64;
    tokens of the whole caption without start and end, [B] int64; longer than the tokenizer's length, [B] bool."""

    eos_positions: Tensor
    num_tokens: Tensor
    truncated: Tensor


@dataclass(frozen=True)
class Embeddings:
    """Prompts as the U-Net takes them.

    Attributes:
        hidden: text embeddings, [B, L, D]. pooled: SDXL's pooled embedding, [B, P], else None.
        eos_positions, num_tokens, truncated: as in TokenFacts.
    """

    hidden: Tensor
    pooled: Tensor | None
    eos_positions: Tensor
    num_tokens: Tensor
    truncated: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @staticmethod
    def concatenate(parts: list[Embeddings]) -> Embeddings:
        """Embeddings of one model, one after the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Embeddings(
            torch.cat([part.hidden for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat([part.eos_positions for part in parts]),
            torch.cat([part.num_tokens for part in parts]),
            torch.cat([part.truncated for part in parts]),
        )

    def take(self, rows: Tensor | slice) -> Embeddings:
        """The embeddings of some rows."""
        return Embeddings(
            self.hidden[rows],
            None if self.pooled is None else self.pooled[rows],
            self.eos_positions[rows],
            self.num_tokens[rows],
            self.truncated[rows],
        )

    def expand(self, batch: int) -> Embeddings:
        """One row repeated `batch` times without copying."""
        return Embeddings(
            self.hidden.expand(batch, -1, -1),
            None if self.pooled is None else self.pooled.expand(batch, -1),
            self.eos_positions.expand(batch),
            self.num_tokens.expand(batch),
            self.truncated.expand(batch),
        )


class DiffusionModel:
    """A loaded model: text encoder, U-Net, VAE and DDIM sampler, as the scorers use them.

    Attributes:
        latent_shape: (C, H, W) of the latents.
        scheduler: DDIM made from the model's scheduler configuration, eta 0, clip_sample off.
    """

    def __init__(self, pipeline: Any, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import DDIMScheduler

        self.pipeline, self.folder, self.device, self.dtype = pipeline, folder, device, dtype
        self.unet, self.vae, self.tokenizer = pipeline.unet, pipeline.vae, pipeline.tokenizer
        self.scheduler: Any = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, thresholding=False
        )
        self.prediction_type: str = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"{folder.name}: prediction type {self.prediction_type!r} is not supported")
        if float(self.scheduler.alphas_cumprod[-1]) == 0:
            raise ModelError(
                f"{folder.name}: its schedule has zero terminal SNR (rescale_betas_zero_snr), where the noise "
                "prediction of the first step does not depend on the prompt: not supported"
            )
        self.latent_shape = _latent_shape(self.unet.config)
        self.image_size = tuple(side * pipeline.vae_scale_factor for side in self.latent_shape[1:])
        positions = pipeline.text_encoder.config.max_position_embeddings
        self.max_tokens: int = min(self.tokenizer.model_max_length, positions)

    def noise_bank(self, num_noises: int, seed: int) -> Tensor:
        """The initial noises every prompt shares: one CPU generator, so that anyone can recompute a score.

        Returns:
            [K, C, H, W], float32, on the CPU, scaled by the scheduler's init_noise_sigma.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        bank = torch.randn((num_noises, *self.latent_shape), generator=generator, dtype=torch.float32)
        return bank * float(self.scheduler.init_noise_sigma)

    def timesteps(self, steps: int) -> Tensor:
        """The sampler's timesteps, highest noise first, [steps]; set on the scheduler as well."""
        self.scheduler.set_timesteps(steps, device=self.device)
        return self.scheduler.timesteps

    def alpha_bar(self, timestep: Tensor) -> Tensor:
        """Cumulative alpha of a timestep, float32 scalar on the device."""
        return self.scheduler.alphas_cumprod.to(self.device)[timestep.long()]

    @property
    def sigma_max(self) -> float:
        """sqrt((1 - abar) / abar) of the last training step: 14.6 for Stable Diffusion 1."""
        last = float(self.scheduler.alphas_cumprod[-1])
        return ((1 - last) / last) ** 0.5

    def tokens(self, captions: list[str]) -> TokenFacts:
        """Where the first end-of-text id is, how long captions are and whether they were cut."""
        padded = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_tokens)
        ids = torch.as_tensor(np.asarray(padded["input_ids"]))
        lengths = torch.tensor([len(row) for row in self.tokenizer(captions, truncation=False)["input_ids"]])
        is_end = ids == self.tokenizer.eos_token_id
        eos = torch.where(is_end.any(1), is_end.int().argmax(1), torch.tensor(self.max_tokens - 1))
        return TokenFacts(eos, lengths - 2, lengths > self.max_tokens)

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Embeddings:
        """Captions to embeddings, through the pipeline's own encode_prompt."""
        encoded = self.pipeline.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        pooled = encoded[2] if self.folder.kind == "sdxl" else None
        return Embeddings(encoded[0], pooled, *self.tokens(captions))

    @torch.inference_mode()
    def encode_empty(self) -> Embeddings:
        """The embedding of the empty prompt, one row; zeros where SDXL's configuration says so."""
        empty = self.encode([""])
        if self.folder.kind == "sdxl" and self.pipeline.config.force_zeros_for_empty_prompt:
            assert empty.pooled is not None
            return replace(empty, hidden=torch.zeros_like(empty.hidden), pooled=torch.zeros_like(empty.pooled))
        return empty

    def predict(self, latents: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """One U-Net evaluation per latent: the raw output (epsilon or v), [B, C, H, W], in the model's dtype."""
        conditions: dict[str, Any] = {}
        if embeddings.pooled is not None:
            height, width = self.image_size
            ids = torch.tensor(
                [[height, width, 0, 0, height, width]], device=self.device, dtype=embeddings.hidden.dtype
            )
            conditions["added_cond_kwargs"] = {
                "text_embeds": embeddings.pooled,
                "time_ids": ids.expand(len(latents), -1),
            }
        scaled = self.scheduler.scale_model_input(latents, timestep)
        return self.unet(scaled, timestep, encoder_hidden_states=embeddings.hidden, return_dict=False, **conditions)[0]

    def to_noise(self, output: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """The noise prediction of a raw output: itself, or converted from v."""
        if self.prediction_type == "epsilon":
            return output
        return noise_from_v(output, latents, self.alpha_bar(timestep))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images, [B, 3, H, W], float32 in [0, 1]."""
        vae = self.vae
        if self.folder.kind == "sdxl" and vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # SDXL's VAE overflows in float16
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        if getattr(vae.config, "shift_factor", None) is not None:
            scaled = scaled + vae.config.shift_factor
        return (vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


def load(folder: ModelFolder, device: str = "auto", dtype: str = "auto") -> DiffusionModel:
    """Load a found model onto a device.

    Args:
        folder: from `find_model`.
        device: `auto` (CUDA, then MPS, then CPU), `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto` (float16 on CUDA, else float32), `float32`, `float16` or `bfloat16`.

    Raises:
        ModelError: a device this machine does not have, or weights that cannot be read.
    """
    import diffusers
    import transformers

    target = find_device(device)
    kind = DTYPES[resolve_dtype(dtype, target)]
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    name = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[folder.kind]
    parts: dict[str, Any] = {"torch_dtype": kind, "local_files_only": True}
    if folder.kind == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = getattr(diffusers, name).from_pretrained(str(folder.path), **parts).to(target)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder.name}: cannot be loaded: {first}") from error
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if part is not None:
            part.eval().requires_grad_(False)
    return DiffusionModel(pipeline, folder, target, kind)


def find_device(device: str) -> torch.device:
    """The torch device of a `--device` value. Raises ModelError when this machine has no such device."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ModelError(f"{device}: give auto, cpu, cuda, cuda:N or mps", "device")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"{device}: this machine has {torch.cuda.device_count()} CUDA devices; try cpu", "device")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("mps: this machine has no Apple GPU; try cpu", "device")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The dtype's name that `auto` stands for on a device. Raises ModelError for an unknown one."""
    if dtype == "auto":
        return "float16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ModelError(f"{dtype}: give auto, {', '.join(DTYPES)}", "dtype")
    return dtype


def _download(name: str, revision: str | None) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download, snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's concern
    try:
        # the index first: an unsupported architecture is refused before gigabytes are fetched
        index = Path(hf_hub_download(name, "model_index.json", revision=revision))
        if json.loads(index.read_text()).get("_class_name") not in SUPPORTED:
            return index.parent
        if os.environ.get("HF_HUB_OFFLINE"):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        return Path(DiffusionPipeline.download(name, revision=revision))
    except Exception as error:  # the hub client raises a dozen unrelated types for "cannot be had"
        at = f" at revision {revision}" if revision else ""
        reason = textwrap.shorten(str(error).strip().split("\n\n")[0] or type(error).__name__, 400)
        raise ModelError(f"{name}: no such folder, and the hub does not give it{at}: {reason}") from error


def _read_json(path: Path, file: str, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((path / file).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{name}: {file} cannot be read ({error}): download the model again") from error


def _latent_shape(config: Any) -> tuple[int, int, int]:
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(height), int(width)


_hashes: dict[tuple[str, int, int, int], str] = {}  # of files as they were: path, size, modified, inode


def _file_sha256(file: Path) -> str:
    """sha256 of a file; one that was hashed before in this process, and is the same, is not read again."""
    # the hub's cache links big files to blobs that are named by their sha256
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    facts = file.stat()
    key = (str(file.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ino)
    if key not in _hashes:
        total = hashlib.sha256()
        with file.open("rb") as content:
            while chunk := content.read(1 << 22):
                total.update(chunk)
        _hashes[key] = total.hexdigest()
    return _hashes[key]
