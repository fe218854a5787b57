"""What an index was made from (index.json) and what it is (index_info.json), as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from audit.base.errors import AuditError
from audit.base.facts import read_facts
from audit.base.storage import Folder

FORMAT = 1
STAGE, PARTS = "embed", "parts"
FACTS, INFO, VECTORS, IDS, FAISS = "index.json", "index_info.json", "vectors.npy", "ids.npy", "index.faiss"


@dataclass(frozen=True)
class DescriptorFacts:
    """Which descriptor: file name, hash, length of a vector, what is done to a picture before it."""

    name: str
    sha256: str
    dim: int
    preprocessing: dict[str, str]


@dataclass(frozen=True)
class IndexFacts:
    """index.json. facts: what the pictures and vectors depend on; fingerprint: their hash."""

    fingerprint: str
    descriptor_name: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of a file of the index."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class IndexInfo:
    """index_info.json, written last.

    Attributes:
        fingerprint: of listings and descriptor: whose parts these are. contents: of the pictures themselves, what is
            known of them and which could not be read; "" in an index of before.
        type: FAISS factory string; seed: of its samples.
        weights: path of the descriptor's file. dim: length of a vector. parts: units of work.
        rows: pictures seen; ok: in the index; errors: not readable, the first of them in error_examples.
        training_rows, num_lists, num_probe: of the FAISS index. recall_*: measured on recall_rows vectors.
        blind: parts without pixels, made from embeddings; None in an index of before.
        seconds: by step. files: of the search index. left_out: reason -> files and members that gave no picture.
    """

    fingerprint: str
    type: str
    seed: int
    descriptor: DescriptorFacts
    weights: str
    dim: int
    parts: int
    rows: int
    ok: int
    errors: int
    error_examples: list[str]
    training_rows: int
    num_lists: int | None
    num_probe: int | None
    recall_at_1: float
    recall_at_10: float
    copy_recall_at_1: float
    recall_rows: int
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    contents: str = ""
    blind: list[int] | None = None


def read_index_facts(folder: Folder) -> IndexFacts:
    """index.json. Raises AuditError when it is not there or cannot be read."""
    try:
        data = folder.read(FACTS)
    except (FileNotFoundError, NotADirectoryError):
        raise AuditError(
            f"{folder.url}: no index of training pictures here ({FACTS} is missing): make one with "
            f"`be-audit index build IMAGES... -o {folder.url}`, or name another with --index"
        ) from None
    return read_facts(IndexFacts, data, folder.path(FACTS))


def read_index_info(folder: Folder) -> IndexInfo:
    """index_info.json of a finished index. Raises AuditError when it is not finished or cannot be read."""
    try:
        data = folder.read(INFO)
    except FileNotFoundError:
        raise AuditError(
            f"{folder.url}: the index is not finished: give `be-audit index build` again, it goes on"
        ) from None
    return read_facts(IndexInfo, data, folder.path(INFO))
