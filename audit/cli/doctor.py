"""`be-audit doctor`: what this machine has, what is missing, and for what; nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import humanize

from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.index.descriptors import find_descriptor
from audit.run.run import check_writable

PACKAGES = ("be-audit", "torch", "diffusers", "transformers", "pyarrow", "duckdb", "faiss-cpu", "numpy")
EXTRAS = {
    "s3fs": "s3:// folders: pip install 'be-audit[s3]'",
    "gcsfs": "gs:// folders: pip install gcsfs",
    "ray": "--engine ray: pip install 'be-audit[ray]'",
    "onnxruntime": "ONNX copy descriptors: pip install 'be-audit[sscd]'",
}
MODEL_BYTES = 8 << 30  # weights of a Stable Diffusion model and room to download them


def doctor(output: str) -> tuple[list[str], bool]:
    """Lines for people, `ok` or `MISSING` first, and whether everything a local audit needs is there.

    Args:
        output: the folder runs will go to.
    """
    lines: list[str] = []
    whole = True
    checks: tuple[tuple[str, Callable[[], str], bool], ...] = (
        ("versions", _versions, True),
        ("devices", _devices, True),
        ("memory", _memory, True),
        ("output", lambda: _writable(output), True),
        ("temporary", lambda: _writable(tempfile.gettempdir()), True),
        ("model cache", _model_cache, False),
        ("descriptor", lambda: str(find_descriptor(None)), False),
    )
    for name, look, needed in checks:
        try:
            lines.append(f"ok       {name}: {look()}")
        except (AuditError, OSError, ImportError, RuntimeError) as error:
            lines.append(f"MISSING  {name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            whole = whole and not needed
    for module, purpose in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        lines.append(
            f"ok       {module}: {purpose.partition(':')[0]}" if there else f"absent   {module}: for {purpose}"
        )
    return lines, whole


def _versions() -> str:
    found = [f"Python {platform.python_version()} on {platform.platform()}"]
    found += [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES if _installed(package)]
    return ", ".join(found)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _devices() -> str:
    import torch

    found = [f"{os.cpu_count()} CPU cores"]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        sizes = f"{humanize.naturalsize(free, binary=True)} of {humanize.naturalsize(total, binary=True)} free"
        found.append(f"cuda:{number} {torch.cuda.get_device_name(number)}, {sizes}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return "; ".join(found)


def _memory() -> str:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{humanize.naturalsize(pages * size, binary=True)} free"


def _writable(url: str) -> str:
    """The folder, or the nearest one above that exists, written to; what was made for it is removed again."""
    folder = Folder(url)
    if not folder.local:
        check_writable(folder)
        return f"{url} can be written"
    place = Path(folder.root)
    while not place.exists():
        place = place.parent
    check_writable(Folder(place))
    return f"{url} can be written, {humanize.naturalsize(shutil.disk_usage(place).free, binary=True)} free"


def _model_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    where = cache if cache.exists() else cache.parent
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if not models and free < MODEL_BYTES:
        raise AuditError(
            f"{cache}: no model, and {humanize.naturalsize(free, binary=True)} free: HF_HOME names another"
        )
    return f"{cache}: {', '.join(models) or 'no model yet'}, {humanize.naturalsize(free, binary=True)} free"
