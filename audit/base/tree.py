"""What lies below a folder: every file once, whatever links lead to it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from audit.base.errors import AuditError

NO_FILE, AGAIN = -1, -2
"""Sizes that are none in a `list_tree`: of what is no file, and of another name of a file that is listed."""
SAME_FILE = "the same file again"


def list_tree(fs: Any, root: str) -> dict[str, int]:
    """Every file below a folder (or the file itself) with its size, sorted by path.

    Locally links to folders are followed, as fsspec's `find` does not; no folder is entered twice. What is there and is
    no file has the size NO_FILE, other names of a file that is listed the size AGAIN; `why_no_file` says it in words.

    Raises:
        AuditError: a folder that cannot be listed.
    """
    if not isinstance(fs, LocalFileSystem) or os.path.isfile(root):
        found = fs.find(root, detail=True)
        return {path: int(info["size"] or 0) for path, info in sorted(found.items())}
    files: dict[str, int] = {}
    entered = {os.path.realpath(root): root}  # real folder -> as it is listed
    several: dict[str, tuple[int, int]] = {}  # what may be another name of a file -> that file
    links: set[str] = set()

    def is_new(folder: str) -> bool:
        return entered.setdefault(os.path.realpath(folder), folder) == folder

    def refuse(error: OSError) -> None:
        raise AuditError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        below[:] = [name for name in sorted(below) if is_new(os.path.join(folder, name))]
        for path in (os.path.join(folder, name) for name in names):
            facts, is_link = _facts_of(path)
            files[path] = facts.st_size if facts else NO_FILE
            if facts and (is_link or facts.st_nlink > 1):
                several[path] = facts.st_dev, facts.st_ino
            if facts and is_link:
                links.add(path)
    for path in links:  # what one leads to may be listed by its own name, and have no hard links
        inside, name = os.path.split(os.path.realpath(path))
        target = os.path.join(entered.get(inside, inside), name)
        if target in files:
            several[target] = several[path]
    others = _whole_records(_other_names(root, several, links), files)
    return dict(sorted({**files, **dict.fromkeys(others, AGAIN)}.items()))


def _facts_of(path: str) -> tuple[os.stat_result | None, bool]:
    """Size, device and inode of a local file, None where there is none; and whether the path is a link to it."""
    with contextlib.suppress(OSError):
        facts = os.lstat(path)
        is_link = stat.S_ISLNK(facts.st_mode)
        facts = os.stat(path) if is_link else facts
        return facts if stat.S_ISREG(facts.st_mode) else None, is_link
    return None, False


def _other_names(root: str, several: dict[str, tuple[int, int]], links: set[str]) -> set[str]:
    """All names but one of each file that has several of one extension: a visible one that is no link is kept.

    Names of other extensions are no such: who reads `x.jpg` does not read `blobs/5f3a`, where the hub keeps it.
    """
    kept: dict[tuple[tuple[int, int], str], str] = {}
    others: set[str] = set()

    def rank(path: str) -> tuple[bool, bool, str]:
        return any(part.startswith(".") for part in path[len(root) :].split("/")), path in links, path

    for path, file in several.items():
        known = file, os.path.splitext(path)[1].lower()
        kept[known], *worse = sorted({path, kept.get(known, path)}, key=rank)
        others.update(worse)
    return others


def _whole_records(others: set[str], files: Iterable[str]) -> set[str]:
    """Those of some names whose record has no other file: a picture and the text of its name are one record.

    Equal texts of different pictures are one file on the hub, and may be hard links elsewhere.
    """
    if not others:
        return others
    stems = {os.path.splitext(path)[0] for path in others}
    stems -= {os.path.splitext(path)[0] for path in files if path not in others}
    return {path for path in others if os.path.splitext(path)[0] in stems}


def why_no_file(path: str) -> str:
    """What a local path is that has no size in a `list_tree`, as a reason to leave it out."""
    if os.path.isfile(path):
        return SAME_FILE
    return "broken links" if os.path.islink(path) and not os.path.exists(path) else "pipes and devices"
