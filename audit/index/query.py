"""An index to ask: nearest pictures by exact cosine, what is known of them, their pixels."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from audit.base.commits import Ledger, damaged, shard_name
from audit.base.errors import AuditError, Damaged
from audit.base.fingerprint import diff_lines
from audit.base.storage import Folder
from audit.index import ann
from audit.index.descriptors import find_descriptor, open_descriptor
from audit.index.facts import (
    FAISS,
    IDS,
    INFO,
    PARTS,
    STAGE,
    VECTORS,
    DescriptorFacts,
    IndexInfo,
    read_index_facts,
    read_index_info,
)
from audit.index.items import KEY, NUMBER, PLACE, decode, read_file
from audit.index.parts import read_part
from audit.index.sources import read_bytes

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor

FACT_COLUMNS = ["id", "key", "url", "caption", "source", "locator"]

MEND = "be-audit index verify --repair, then be-audit index build, make it again"


class Index:
    """A finished index, opened for reading. Vectors stay on the disk (memory-mapped).

    Attributes:
        folder: where it is.
        fingerprint: of the listings and the descriptor it was made from: whose parts these are.
        contents: of what is in it; what is matched with it rests on that.
        descriptor: name, sha256, dim and preprocessing of the descriptor.
        info: type, sizes, counts, recall, files: index_info.json.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        read_index_facts(folder)
        self.info = read_index_info(folder)
        self.fingerprint = self.info.fingerprint
        self.contents = self.info.contents or self.info.fingerprint  # an index of before has none
        self.descriptor = self.info.descriptor
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._faiss: Any = None
        self._facts = lru_cache(maxsize=64)(self._read_part)

    @cached_property
    def _ids(self) -> Any:
        """[N] int64, ascending. Raises Damaged where the file is not what was written."""
        with damaged(self.folder.path(IDS), MEND):
            return np.load(self._local(IDS), mmap_mode="r", allow_pickle=False)

    @cached_property
    def _vectors(self) -> Any:
        """[N, D] float16. Raises Damaged where the file is not what was written."""
        with damaged(self.folder.path(VECTORS), MEND):
            return np.load(self._local(VECTORS), mmap_mode="r", allow_pickle=False)

    @classmethod
    def open(cls, path: str) -> Index:
        """Open by path or URL. Raises AuditError when there is no finished index."""
        return cls(Folder(path))

    @classmethod
    def open_same(cls, path: str, contents: str) -> Index:
        """Open the index that something was begun with. Raises AuditError where another lies there."""
        index = cls.open(path)
        if index.contents != contents:
            raise AuditError(
                f"--index {path}: not what was in the index when this run was confirmed: name that one, or begin anew "
                "with `be-audit confirm --replace`"
            )
        return index

    def __len__(self) -> int:
        """Pictures in the index (those that could be read)."""
        return len(self._ids)

    def ids(self) -> np.ndarray:
        """Every id, ascending, int64 [N]."""
        return np.asarray(self._ids)

    def seen(self) -> np.ndarray:
        """Ids of the pictures whose pixels can be read, ascending, int64 [M]: those not made from embeddings alone."""
        ids = self.ids()
        if self.info.blind is not None:
            return ids[~np.isin(ids >> 32, self.info.blind)]
        locators = {int(part): self._facts(int(part))["locator"] for part in np.unique(ids >> 32)}
        blind = [part for part, of in locators.items() if len(of) and of[0].as_py() == "{}"]
        return ids[~np.isin(ids >> 32, blind)]

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest pictures of each vector.

        Args:
            vectors: [Q, D], any length of vector.
            k: how many.
        Returns:
            ids int64 [Q, k] (-1 where there are fewer) and exact cosines float32 [Q, k] (-inf there), best first.
        """
        if self._faiss is None and FAISS in self.info.files:
            try:
                self._faiss = ann.load(self._local(FAISS), self.info.num_probe)
            except (RuntimeError, MemoryError) as error:
                raise Damaged(f"{self.folder.path(FAISS)}: damaged: {MEND}") from error
        positions, cosines = ann.nearest(self._vectors, vectors, k, self._faiss)
        return np.where(positions >= 0, self._ids[np.maximum(positions, 0)], -1), cosines

    def _read_part(self, part: int) -> pa.Table:
        with damaged(self.folder.path(f"{PARTS}/{shard_name(part)}.arrow"), MEND):
            return read_part(self.folder, part, FACT_COLUMNS)

    def vectors(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Stored vectors, float32 [n, D], unit length. Raises KeyError on an id that is not in the index."""
        wanted = np.asarray(ids, np.int64)
        positions = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        if missing := wanted[self._ids[positions] != wanted].tolist():
            raise KeyError(f"{missing[0]} is not in the index {self.folder.url}")
        return ann.normalised(self._vectors[positions])

    def facts(self, ids: Sequence[int] | np.ndarray) -> pa.Table:
        """What is known of pictures, in the order of `ids`: id, key, url, caption, source, locator (JSON)."""
        wanted = np.asarray(ids, np.int64)
        parts = wanted >> 32
        order = np.argsort(parts, kind="stable")
        tables = [
            self._facts(int(part)).take(pa.array(wanted[parts == part] & 0xFFFFFFFF)) for part in np.unique(parts)
        ]
        if not tables:
            return self._facts(0).slice(0, 0)
        return pa.concat_tables(tables).take(pa.array(np.argsort(order)))

    def picture(self, id: int) -> Image.Image | None:
        """The picture itself, RGB, turned as its EXIF says; None where the index was made from embeddings alone.

        Raises:
            AuditError: the file it was read from is gone or has changed.
        """
        locator = json.loads(self.facts([id])["locator"][0].as_py())
        if not locator:
            return None
        try:
            return decode(read_bytes(locator))
        except AuditError:
            raise
        except Exception as error:  # decoders raise anything on broken input
            raise AuditError(f"{locator['file']}: the picture has changed and cannot be read: {error}") from error

    def own(self, joins: Sequence[tuple[str, Sequence[str | None]]]) -> list[int | None]:
        """Each caption's own picture; None where it is not known. One pass over the index a join.

        Args:
            joins: (what it is in the index: url, key, number or caption; the value of each of N captions), the surest
                first; values are compared exactly. A key is a picture's own, a number also the bare row number of its
                table; what several pictures have is none of them, and what the index made up itself is neither.
        Returns:
            N ids: by the first join that knows the value.
        """
        own: list[int | None] = [None] * len(joins[0][1])
        for column, values in joins:
            pairs = list(zip(own, values, strict=True))
            known = self._first(column, (value for have, value in pairs if value and have is None))
            own = [known.get(value or "") if have is None else have for have, value in pairs]
        return own

    def _first(self, column: str, values: Iterable[str]) -> dict[str, int]:
        wanted = pa.array(list(dict.fromkeys(values)), pa.string())
        found: dict[str, int] = {}
        several: set[str] = set()
        by = {"number": "key"}.get(column, column)
        kinds = pa.array({"key": [KEY], "number": [KEY, NUMBER]}.get(column, [KEY, NUMBER, PLACE]), pa.string())
        for part in range(self.info.parts if len(wanted) else 0):
            table = read_part(self.folder, part, ["id", by, "status", "key_from"])
            hit = pc.and_(pc.is_in(table[by], value_set=wanted), pc.equal(table["status"], "ok"))
            rows = table.filter(pc.and_(hit, pc.is_in(table["key_from"], value_set=kinds)))
            for value, id_ in zip(rows[by].to_pylist(), rows["id"].to_pylist(), strict=True):
                if found.setdefault(value, id_) != id_ and by == "key":
                    several.add(value)
        return {value: id_ for value, id_ in found.items() if value not in several}

    def load_descriptor(self, sscd: str | None = None, device: str = "auto") -> Descriptor:
        """The descriptor this index was made with, by flag, else the file it was made with, else as `find_descriptor`.

        Raises:
            AuditError: other weights or another preprocessing would be compared with this index.
        """
        recorded = Path(self.info.weights)
        path = recorded if sscd is None and recorded.is_file() else find_descriptor(sscd)
        loaded = open_descriptor(path, device, self.descriptor.preprocessing["resize"])
        found = DescriptorFacts(**loaded.facts())
        old, new = (asdict(replace(facts, name="")) for facts in (self.descriptor, found))
        if old != new:
            lines = "; ".join(diff_lines(old, new))
            raise AuditError(
                f"{path}: not the descriptor of the index {self.folder.url} ({self.descriptor.name}; {lines}): "
                "name that file with --sscd, or build an index with this one"
            )
        return loaded

    def verify(self, deep: bool = False, repair: bool = False) -> list[str]:
        """What is wrong with the index, one line each; [] when nothing is.

        Args:
            deep: read and hash everything; without it a flipped bit is not seen.
            repair: take back what is damaged, so that the next `be-audit index build` makes just that again.
        """
        ledger = Ledger(self.folder, STAGE, self.fingerprint, PARTS)
        problems = []
        for part in range(self.info.parts):
            commit = ledger.read(part)
            problem = ledger.problem(commit, deep) if commit else f"part {part}: no valid commit"
            if problem:
                problems.append(problem)
                if repair:
                    ledger.drop(part)
        for name, facts in self.info.files.items():
            if not self.folder.exists(name):
                problems.append(f"{name}: missing")
            elif self.folder.size(name) != facts.bytes:
                problems.append(f"{name}: {self.folder.size(name)} bytes where {INFO} says {facts.bytes}")
            elif deep and _hash(self.folder, name) != facts.sha256:
                problems.append(f"{name}: contents do not match the sha256 in {INFO}")
        if problems and repair:
            self.folder.remove(INFO)
        return problems

    def _local(self, name: str) -> str:
        """A file of the index on this machine: itself, or a copy that lives as long as the Index."""
        if not self.folder.exists(name):
            raise AuditError(f"{self.folder.path(name)}: missing: give `be-audit index build` again, it restores it")
        facts = self.info.files.get(name)
        if facts is not None and self.folder.size(name) != facts.bytes:
            raise Damaged(f"{self.folder.path(name)}: damaged: not the size {INFO} says: {MEND}")
        if self.folder.local:
            return self.folder.path(name)
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="be-audit-index-")
        target = str(Path(self._scratch.name) / name)
        self.folder.fs.get_file(self.folder.path(name), target)
        return target


def _hash(folder: Folder, name: str) -> str:
    digest = hashlib.sha256()
    with folder.open(name) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def index_info(path: str) -> IndexInfo:
    """`be-audit index info`: what an index holds and how well it finds."""
    return Index.open(path).info


def search_image(
    path: str, image: str, k: int = 10, sscd: str | None = None, device: str = "auto"
) -> list[dict[str, Any]]:
    """`be-audit index search`: the k nearest pictures of a picture.

    Returns:
        One dict a picture, nearest first: rank, cosine, id, key, url, caption, source, file.
    Raises:
        AuditError: no index, not a picture, or another descriptor than the index's.
    """
    index = Index.open(path)
    try:
        picture = decode(read_file(str(Path(image).expanduser())))
    except Exception as error:  # decoders raise anything on broken input
        raise AuditError(f"{image}: not a picture that can be read: {error}") from error
    vectors = index.load_descriptor(sscd, device)([picture]).numpy()
    ids, cosines = index.search(vectors, min(k, len(index)))
    rows = index.facts(ids[0]).to_pylist()
    return [
        {
            "rank": rank,
            "cosine": round(float(cosine), 4),
            **{name: row[name] for name in ("id", "key", "url", "caption", "source")},
            "file": json.loads(row["locator"]).get("file"),
        }
        for rank, (row, cosine) in enumerate(zip(rows, cosines[0], strict=True))
    ]


def verify_index(path: str, deep: bool = False, repair: bool = False) -> list[str]:
    """`be-audit index verify`: problems, one line each; `repair` as in `Index.verify`."""
    return Index.open(path).verify(deep, repair)
