"""Which model a run has: found by name, checked against the flags, loaded in a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from audit import testbed
from audit.base.errors import AuditError
from audit.engines.keep import kept
from audit.run.run import ModelFacts, Run
from pipelines.errors import ModelError

if TYPE_CHECKING:
    from pipelines.folders import ModelFolder
    from pipelines.model import DiffusionModel


class ModelConfig(Protocol):
    """What of a command's configuration names a model and where it is to run."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def model_config(self) -> str | None: ...
    @property
    def lora(self) -> tuple[str, ...]: ...
    @property
    def textual_inversion(self) -> tuple[str, ...]: ...
    @property
    def allow_pickle(self) -> bool: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...


@contextmanager
def naming_the_flag() -> Iterator[None]:
    """Turn what a pipeline says of a model, a device or a dtype into one line that names the flag."""
    try:
        yield
    except ModelError as error:
        raise AuditError(f"--{error.about.replace('_', '-')} {error}") from error


def find_model_folder(config: ModelConfig) -> ModelFolder:
    """The folder of a configuration's model; `testbed` is the embedded one. What was decided for it is said.

    Raises:
        AuditError: no such model or device, an architecture that cannot be audited, or weights that are pickles and
            were not allowed.
    """
    from pipelines.loading import find_device, slow_dtype

    with naming_the_flag():
        device = find_device(config.device)
    found = _find(config.model, config.revision, config.model_config, config.lora, config.textual_inversion)
    if not config.allow_pickle and (pickles := found.pickles()):
        raise AuditError(
            f"--model {config.model}: {pickles[0].name} is a pickle, which can be made to run code: convert it to "
            "safetensors, or pass --allow-pickle where you trust whoever made it"
        )
    slow = slow_dtype(config.dtype, device)
    for note in (*found.notes, *([f"--dtype {slow}"] if slow else [])):
        print(note, file=sys.stderr)
    return found


def absolute_paths(config: ModelConfig) -> dict[str, Any]:
    """Where a configuration's model lies, to be found from elsewhere: fields to replace."""
    found: dict[str, Any] = {"model": os.path.abspath(config.model) if os.path.exists(config.model) else config.model}
    if config.model_config is not None:
        found["model_config"] = os.path.abspath(config.model_config)
    for name in ("lora", "textual_inversion"):  # relative to here, whatever follows the file's name
        found[name] = tuple(os.path.abspath(Path(text).expanduser()) for text in getattr(config, name))
    return found


def model_facts(folder: ModelFolder) -> ModelFacts:
    """What a fingerprint says of a model, and of the captions it is given on this machine."""
    from pipelines.families.defaults import cleans_captions, published_pipeline

    clean = cleans_captions(published_pipeline(folder.family.pipeline_class))
    return ModelFacts(folder.weights_sha256(), folder.revision, **folder.adapters(), clean_captions=clean)


def few_steps(folder: ModelFolder, steps: int) -> list[str]:
    """What is to be said of a sampling that begins far from noise.

    Raises:
        AuditError: steps the model's schedule has not, or so few that nothing comes of them.
    """
    from pipelines.configurations import naming

    with naming_the_flag(), naming(folder.name):
        few = folder.schedule().check_steps(steps)
    return [f"--steps {few}"] if few else []


def no_mask_reason(folder: ModelFolder, mask_layers: tuple[str, ...]) -> str:
    """Why a model's scores have no attention mask; empty where they have one."""
    return "" if mask_layers else folder.family.no_mask


def load_model(folder: ModelFolder, device: str, dtype: str) -> DiffusionModel:
    """Load a found model. Raises AuditError: a device that is not there, or weights that cannot be read."""
    import pipelines.loading

    with naming_the_flag():
        return pipelines.loading.load(folder, device, dtype)


def load_run_model(run: Run, device: str, compile: bool = False) -> DiffusionModel:
    """The model a run was begun with, loaded once in a command that keeps it (`keeping`); compiled where asked to.

    Raises:
        AuditError: it has other weights by now, or cannot be loaded.
    """
    config: Mapping[str, Any] = run.facts.config
    added = [tuple(config.get(name) or ()) for name in ("lora", "textual_inversion")]
    folder = _find(run.facts.model, run.facts.revision, config.get("model_config"), *added)
    begun, now = run.fingerprint.model, model_facts(folder)
    if now.clean_captions != begun.clean_captions:
        way = "install" if begun.clean_captions else "do without"
        raise AuditError(
            f"{run.url}: its captions were {'' if begun.clean_captions else 'not '}cleaned (clean_caption), as this "
            f"machine would not do: {way} beautifulsoup4 and ftfy, or scan into a new folder"
        )
    if replace(now, revision=begun.revision) != begun:
        raise AuditError(f"--model {run.facts.model}: other weights than the run was begun with")
    command, key = kept(), (run.digest, device, compile)
    if command is not None and key in command.models:
        return cast("DiffusionModel", command.models[key])
    model = load_model(folder, device, run.fingerprint.dtype)
    if compile:
        from pipelines.compiled import compile_denoiser

        compile_denoiser(model, lambda note: print(note, file=sys.stderr))
    if command is not None:
        command.models[key] = model
    return model


def _find(
    name: str,
    revision: str | None,
    model_config: str | None,
    loras: tuple[str, ...],
    inversions: tuple[str, ...],
) -> ModelFolder:
    from pipelines.folders import find_model

    with naming_the_flag():
        path = str(testbed.PIPELINE) if name == "testbed" else name
        return find_model(path, revision, model_config, loras, inversions)
