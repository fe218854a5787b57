"""A model as it lies on disk: which family reads it, which of its files are loaded, and what is wrong with it.

Only small files are read here, no weights: what a folder's configurations tell is said before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Statements, check_statements, read_statements
from pipelines.configurations import check_vae, from_config, model_class, naming, read_config, reading
from pipelines.errors import ModelError
from pipelines.families import find_family, supported
from pipelines.files import PICKLES, Weights, choose_weights, file_sha256, find_weights, read_json, read_shards
from pipelines.model import DiffusionModel, Part
from pipelines.schedules import Schedule, Unit, open_scheduler

VOCABULARY = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "spiece.model"),
    *("special_tokens_map.json", "tokenizer.model"),
)
"""Files a tokenizer is read from."""
REFUSED = {
    "FluxPipeline": "its denoiser takes packed latents with positions of text and image, which no family here gives",
    "QwenImagePipeline": "its prompts are put into a template and its guidance is renormalised, as no family here does",
    "KolorsPipeline": "its text encoder is ChatGLM, whose tokenizer pads on the left and is read by sentencepiece",
    "SanaSprintPipeline": "it is distilled to a scheduler of its own, and told its guidance as a condition",
    "IFSuperResolutionPipeline": "it enlarges the picture of DeepFloyd IF's stage I: give that stage",
    "HunyuanDiTPipeline": "its denoiser takes two texts and the picture's style, which no family here gives",
    "KandinskyV22CombinedPipeline": "its U-Net is told an embedding of a picture that a prior drew, not the prompt",
}
"""Why pipelines that people ask for are not read."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk that `load` can read.

    Attributes:
        path: diffusers folder; of a single checkpoint the folder of its configuration. name: what the user asked for.
        revision: the hub's commit, or None for a local folder. family: that reads it. index: its model_index.json.
        checkpoint: single file with all weights, or None.
        loras: files merged into the weights, with their scales. inversions: files of learned tokens, with their tokens.
        statements: what the single file says of its training. notes: what was decided without being asked, one line
            each.
    """

    path: Path
    name: str
    revision: str | None
    family: type[DiffusionModel]
    index: Mapping[str, Any]
    checkpoint: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    inversions: tuple[tuple[Path, str], ...] = ()
    statements: Statements = field(default_factory=Statements)
    notes: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, Part]:
        """Parts this folder has: optional ones that its index leaves out are not there."""
        return {
            name: part
            for name, part in self.family.parts.items()
            if not (part.optional and self.class_name(name) is None)
        }

    def class_name(self, part: str) -> str | None:
        """The class that the index names for a part; None where it names none."""
        named = self.index.get(part)
        return named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else None

    def config(self, part: str) -> dict[str, Any]:
        """A part's configuration, what it leaves out filled in by its class."""
        return read_config(self.path, part, self.family.parts[part], self.name)

    def configs(self) -> dict[str, dict[str, Any]]:
        """Configurations of all parts with weights."""
        return {name: self.config(name) for name in self.parts() if not name.startswith("tokenizer")}

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration, without diffusers' private keys: what a single file states goes first."""
        config = {**read_json(self.path, "scheduler/scheduler_config.json", self.name), **self.statements.scheduler}
        return {key: value for key, value in sorted(config.items()) if key != "_diffusers_version"}

    def open_scheduler(self) -> Any:
        """diffusers' scheduler of this folder. Raises ModelError: one the family is not read with."""
        config = self.scheduler_config()
        with naming(self.name):
            return open_scheduler(str(config.get("_class_name")), config, self.family.schedules)

    def schedule(self) -> Schedule:
        """Noise levels and units, from configurations alone. Raises ModelError as `open_scheduler`."""
        scheduler = self.open_scheduler()
        with naming(self.name), reading("scheduler/scheduler_config.json"):
            found = self.family.open_schedule(scheduler, self.config(self.family.denoiser_part))
            found.check()
            return found

    def unit(self, steps: int) -> Unit:
        """What the scores of so many sampling steps are differences of."""
        schedule = self.schedule()
        with naming(self.name), reading("scheduler/scheduler_config.json"):
            return schedule.unit(steps)

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents, from the configuration alone."""
        return self.family.latent_shape_of(self.config(self.family.denoiser_part))

    def weights(self, part: str) -> Weights:
        """The weight files of a part. Raises ModelError: none there, or shards that are missing."""
        return find_weights(self.path, part, self.family.parts[part].library, self.name)

    def mask_layers(self) -> tuple[list[str], tuple[str, ...]]:
        """Attention layers that can be read, and those read by default; no weights are read."""
        import torch

        kind = model_class(self.family.parts[self.family.denoiser_part])
        with torch.device("meta"), naming(self.name):
            denoiser = from_config(kind, read_json(self.path, f"{self.family.denoiser_part}/config.json", self.name))
            return self.family.layers(denoiser), self.family.default_layers(denoiser)

    def loaded_files(self) -> list[Path]:
        """Every file that is read by `load`, and no other: what a fingerprint hashes."""
        files = [self.path / "model_index.json", self.path / "scheduler" / "scheduler_config.json"]
        for name in self.parts():
            if name.startswith("tokenizer"):
                files += [self.path / name / file for file in VOCABULARY if (self.path / name / file).is_file()]
            else:
                files.append(self.path / name / "config.json")
                files += self.weights(name).files if self.checkpoint is None else ()
        return files

    def weights_sha256(self) -> str:
        """One hash over every file that is loaded; LoRA and textual inversion files have their own (`adapters`)."""
        total = hashlib.sha256()
        for file in self.loaded_files():
            total.update(f"{file.relative_to(self.path)} {self._file_hash(file)}\n".encode())
        if self.checkpoint is not None:
            total.update(f"checkpoint {file_sha256(self.checkpoint)}\n".encode())
        return total.hexdigest()

    def adapters(self) -> dict[str, list[str]]:
        """Hashes of what is added to the weights: `lora` (sha256:scale) and `textual_inversion` (sha256:token)."""
        return {
            "lora": [f"{file_sha256(path)}:{scale:g}" for path, scale in self.loras],
            "textual_inversion": [f"{file_sha256(path)}:{token}" for path, token in self.inversions],
        }

    def pickles(self) -> list[Path]:
        """Files among those that are loaded that are no safetensors but pickles, which torch would read."""
        adapters = [path for path, _ in (*self.loras, *self.inversions)]
        return [path for path in (*self.loaded_files(), *adapters) if path.suffix in PICKLES]

    def _file_hash(self, file: Path) -> str:
        """sha256 of a file; of model_index.json only what is read of it counts."""
        if file.name != "model_index.json":
            return file_sha256(file)
        read = {name: value for name, value in self.index.items() if isinstance(value, bool)}
        return hashlib.sha256(json.dumps([self.family.pipeline_class, read], sort_keys=True).encode()).hexdigest()


def find_model(
    name: str,
    revision: str | None = None,
    model_config: str | None = None,
    loras: tuple[str, ...] = (),
    inversions: tuple[str, ...] = (),
) -> ModelFolder:
    """Find a model: a local folder as it is, a hub id through diffusers' own download and cache, or a checkpoint file.

    Args:
        name: diffusers folder, hub id, or a .safetensors file with all weights. revision: of a hub id.
        model_config: with a file: diffusers folder of the same architecture, for its configuration and tokenizers.
        loras: FILE or FILE:SCALE. inversions: FILE:TOKEN.

    Raises:
        ModelError: no such model, an architecture no family reads, files that are missing, or configurations that do
            not fit together: one line that names the fact.
    """
    path, checkpoint = _locate(name, revision, model_config)
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{name}: no model_index.json in it; give the folder of a diffusers pipeline")
    index = read_json(path, "model_index.json", name)
    architecture = str(index.get("_class_name"))
    family = find_family(architecture)
    if family is None:
        reason = REFUSED.get(architecture, "no family of be-audit reads it")
        raise ModelError(f"{name}: {architecture} is not supported: {reason}; supported are {', '.join(supported())}")
    commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else None
    found = ModelFolder(
        path=path,
        name=name,
        revision=commit if checkpoint is None else None,
        family=family,
        index=index,
        checkpoint=checkpoint,
        loras=tuple(_lora(text) for text in loras),
        inversions=tuple(_inversion(text) for text in inversions),
        statements=Statements() if checkpoint is None else read_statements(checkpoint),
    )
    _check(found)
    return found


def _check(folder: ModelFolder) -> None:
    """Say what is wrong with a folder, or what was decided for it."""
    for name, part in folder.parts().items():
        if not (folder.path / name).is_dir() or not any((folder.path / name).iterdir()):
            raise ModelError(f"{folder.name}: the folder has no {name}/; download the model again")
        kind = folder.class_name(name)
        if kind is not None and kind not in part.classes:
            raise ModelError(
                f"{folder.name}: its {name} is a {kind}, and {folder.family.pipeline_class} is read with "
                f"{' or '.join(part.classes)}"
            )
        if (folder.path / name / "tokenizer_config.json").is_file():  # its library builds whatever number it reads
            read_json(folder.path, f"{name}/tokenizer_config.json", folder.name)
    if not (folder.path / "scheduler").is_dir():
        raise ModelError(f"{folder.name}: the folder has no scheduler/; download the model again")
    configs = folder.configs()
    for name, config in configs.items():
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method", "no method named") if isinstance(quantised, dict) else quantised
            raise ModelError(
                f"{folder.name}: {name}/config.json has a quantization_config ({method}): quantised weights are not "
                "read; give the model it was made of, with plain weights"
            )
    with naming(folder.name), reading("what its config.json files say"):
        folder.family.check(configs, folder.index)
        if "vae" in configs:
            check_vae(configs["vae"], folder.latent_shape()[0], folder.family.denoiser_part)
    schedule = folder.schedule()
    with naming(folder.name):
        check_statements(folder.statements, schedule, configs.get("vae", {}), folder.path)
    if folder.checkpoint is None:
        variants = {
            name: found.variant
            for name in folder.parts()
            if not name.startswith("tokenizer") and (found := folder.weights(name)).variant is not None
        }
        if variants:
            folder.notes.append(
                f"{folder.name}: {', '.join(variants)} have no plain weights: loaded from "
                f"{', '.join(sorted({f'.{variant}.' for variant in variants.values()}))} files"
            )
    else:
        import diffusers

        if not hasattr(getattr(diffusers, folder.family.pipeline_class), "from_single_file"):
            raise ModelError(
                f"{folder.name}: diffusers reads no single file as a {folder.family.pipeline_class}: give a folder"
            )
        prediction = folder.open_scheduler().config.get("prediction_type")  # flows have none
        decided = {"prediction_type": prediction} if prediction is not None else {}
        for setting, value in {**decided, **folder.statements.scheduler}.items():
            source = folder.statements.sources.get(setting, str(folder.path))
            folder.notes.append(f"{folder.name}: {setting.replace('_', ' ')} {value}, from {source}")
        if folder.statements.second:
            folder.notes.append(
                f"{folder.name}: {folder.statements.second} tensors of averaged weights (model_ema) are left out"
            )


def _locate(name: str, revision: str | None, model_config: str | None) -> tuple[Path, Path | None]:
    """The folder, and the checkpoint file where the model is one."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{name}: is a file; give a .safetensors checkpoint, a diffusers folder or a hub id")
        if model_config is None:
            raise ModelError(
                f"{name}: is a single checkpoint; add --model-config FOLDER, a diffusers folder of the same "
                "architecture, for its configuration and tokenizers"
            )
        if not Path(model_config).is_dir():
            raise ModelError(f"{model_config}: no such folder", "model_config")
        return Path(model_config), path
    if model_config is not None:
        raise ModelError(f"{model_config}: goes with a single .safetensors checkpoint as the model", "model_config")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelError(f"{name}: no such folder; give a diffusers folder or a hub id like owner/name")
        path = _download(name, revision)
    return path, None


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a hub id in the hub's cache, with the files that `load` reads and no others.

    Which weights those are goes by what the repository lists, so that a connection that breaks is an error and never
    other weights.

    Raises:
        ModelError: the hub does not give it, or has weights of which it cannot be told which are meant.
    """
    from huggingface_hub import constants, hf_hub_download, model_info, snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's concern
    way = ""
    try:
        # the index first: an unsupported architecture is refused before gigabytes are fetched
        path = Path(hf_hub_download(name, "model_index.json", revision=revision)).parent
        index = read_json(path, "model_index.json", name)
        family = find_family(str(index.get("_class_name")))
        if family is None or constants.HF_HUB_OFFLINE:
            return path
        way = "; HF_HUB_OFFLINE=1 takes what is in the cache"
        commit = path.name
        listed = [Path(each.rfilename) for each in model_info(name, revision=commit).siblings or ()]
        wanted = ["model_index.json", "scheduler/scheduler_config.json"]
        for part, kind in ModelFolder(path, name, commit, family, index).parts().items():
            if part.startswith("tokenizer"):
                wanted += [f"{part}/{file}" for file in VOCABULARY]
                continue
            wanted.append(f"{part}/config.json")
            files = (file.name for file in listed if file.parent == Path(part))
            if chosen := choose_weights(files, part, kind.library, name):
                wanted.append(f"{part}/{chosen[1]}")
                if chosen[1].endswith(".json"):
                    hf_hub_download(name, wanted[-1], revision=commit)
                    wanted += [f"{part}/{shard}" for shard in read_shards(path, wanted[-1], name)]
        return Path(snapshot_download(name, revision=commit, allow_patterns=wanted))
    except ModelError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types for "cannot be had"
        at = f" at revision {revision}" if revision else ""
        reason = textwrap.shorten(str(error).strip().split("\n\n")[0] or type(error).__name__, 400)
        raise ModelError(f"{name}: no such folder, and the hub does not give it{at}: {reason}{way}") from error


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE."""
    path, scale = text, 1.0
    if not Path(text).expanduser().is_file() and ":" in text:
        path, number = text.rsplit(":", 1)
        try:
            scale = float(number)
            if not math.isfinite(scale):
                raise ValueError(number)
        except ValueError as error:
            raise ModelError(f"{text}: {number!r} is no scale; give FILE or FILE:SCALE", "lora") from error
    if not Path(path).expanduser().is_file():
        raise ModelError(f"{path}: no such file", "lora")
    return Path(path).expanduser(), scale


def _inversion(text: str) -> tuple[Path, str]:
    """FILE:TOKEN."""
    path, _, token = text.rpartition(":")
    if not path or not token:
        raise ModelError(f"{text}: give FILE:TOKEN, the token that captions have", "textual_inversion")
    if not Path(path).expanduser().is_file():
        raise ModelError(f"{path}: no such file", "textual_inversion")
    return Path(path).expanduser(), token
