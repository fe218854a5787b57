"""What this program wrote, told by its content: a scan of `.` must not read its own scores, nor skip a user's files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from audit.base.errors import check_machine

MARK = {b"be-audit": b"written by a scan"}
"""Schema metadata of Arrow files that a run holds before its run.json."""

_KINDS: dict[str, tuple[frozenset[str], str]] = {
    "run.json": (
        frozenset({"format", "fingerprint", "digest", "shards"}),
        r"(second_)?null_maps/.*|scores/.*|second_look/.*|refined/.*|trajectories/.*|matched/.*|confirmed/.*|mitigated/.*|"
        r"stages/.*|input/.*|logs/.*|evaluate/.*|_claims/.*|_commits/.*|_attempts/.*|run\.json|plan\.arrow|duplicates\.arrow",
    ),
    "index.json": (
        frozenset({"fingerprint", "descriptor_name", "facts"}),
        r"parts/.*|_claims/.*|_commits/.*|_attempts/.*|index\.json|index_info\.json|vectors\.npy|ids\.npy|index\.faiss|\.build.*",
    ),
    "report.json": (
        frozenset({"format", "made", "digest", "run"}),
        r"exports/.*|_claims/.*|rows/.*|pictures/.*|report\.json|statement\.md|summary\.json|index\.html|data\.js|report\.css|report\.js|icon\.svg",
    ),
}
"""Files that say what a folder is: the keys their JSON object has, and what we write beside them."""
_PLANNED = re.compile(r"(?:^|/)(plan|duplicates|input/\d{5})\.arrow$")


def is_run_name(name: str) -> bool:
    """Whether a name at the top of a run folder is one that a run writes itself."""
    return any(re.fullmatch(_KINDS["run.json"][1], text) for text in (name, f"{name}/"))


def our_files(fs: Any, names: Iterable[str]) -> set[str]:
    """Those of some files that a run, an index or a report wrote. What a user keeps beside them is not among them.

    Args:
        fs: the fsspec file system. names: paths on it.
    """
    names = list(names)
    ours: set[str] = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        if last in _KINDS and _says_so(fs, name, _KINDS[last][0]):
            inside = re.compile(_KINDS[last][1], re.DOTALL)
            start = f"{folder}/" if folder or name.startswith("/") else ""
            ours.update(other for other in names if other.startswith(start) and inside.fullmatch(other[len(start) :]))
    planned = [name for name in names if name not in ours and _PLANNED.search(name)]
    return ours | {name for name in planned if _is_marked(fs, name)}


def _says_so(fs: Any, path: str, keys: frozenset[str]) -> bool:
    try:
        content = json.loads(fs.cat_file(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and keys <= content.keys()


def _is_marked(fs: Any, path: str) -> bool:
    try:
        with fs.open(path, "rb") as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
    except (OSError, pa.ArrowException) as error:
        check_machine(path, error)
        return False
    return MARK.items() <= metadata.items()
