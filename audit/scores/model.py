"""Which model a run has: found by name, checked against the flags, loaded in a worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from audit import testbed
from audit.base.errors import AuditError
from audit.run.run import Run
from pipelines.errors import ModelError

if TYPE_CHECKING:
    from pipelines.loading import DiffusionModel, ModelFolder


class ModelConfig(Protocol):
    """What of a command's configuration names a model and where it is to run."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def device(self) -> str: ...


@contextmanager
def naming_the_flag() -> Iterator[None]:
    """Turn what a pipeline says of a model, a device or a dtype into one line that names the flag."""
    try:
        yield
    except ModelError as error:
        raise AuditError(f"--{error.about.replace('_', '-')} {error}") from error


def find_model_folder(config: ModelConfig) -> ModelFolder:
    """The folder of a configuration's model; `testbed` is the embedded one.

    Raises:
        AuditError: no such model or device, or an architecture that cannot be audited.
    """
    from pipelines.loading import find_device

    with naming_the_flag():
        find_device(config.device)
    return _find(config.model, config.revision)


def load_model(folder: ModelFolder, device: str, dtype: str) -> DiffusionModel:
    """Load a found model. Raises AuditError: a device that is not there, or weights that cannot be read."""
    import pipelines.loading

    with naming_the_flag():
        return pipelines.loading.load(folder, device, dtype)


def load_run_model(run: Run, device: str) -> DiffusionModel:
    """The model a run was begun with.

    Raises:
        AuditError: it has other weights by now, or cannot be loaded.
    """
    folder = _find(run.facts.model, run.facts.revision)
    if folder.weights_sha256() != run.fingerprint.model.weights_sha256:
        raise AuditError(f"--model {run.facts.model}: other weights than the run was begun with")
    return load_model(folder, device, run.fingerprint.dtype)


def _find(name: str, revision: str | None) -> ModelFolder:
    from pipelines.loading import find_model

    with naming_the_flag():
        return find_model(str(testbed.PIPELINE) if name == "testbed" else name, revision)
