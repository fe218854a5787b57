"""`be-audit index build`: from pictures to their descriptors, where their pixels are, and a search index."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from audit.base.claims import CLAIMS, held
from audit.base.commits import Commit, Ledger
from audit.base.devices import find_devices
from audit.base.errors import AuditError, Drained
from audit.base.facts import to_json
from audit.base.fingerprint import diff_lines, digest, file_sha256
from audit.base.options import option
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.base.storage import Folder
from audit.index import ann
from audit.index.descriptors import find_descriptor, open_descriptor
from audit.index.embed import LEFT_OUT, embed_part
from audit.index.facts import (
    FACTS,
    FAISS,
    FORMAT,
    IDS,
    INFO,
    PARTS,
    STAGE,
    VECTORS,
    DescriptorFacts,
    FileFacts,
    IndexFacts,
    IndexInfo,
    read_index_facts,
    read_index_info,
)
from audit.index.items import EMBEDDINGS, Columns, Slice, Source
from audit.index.parts import contents_of, outdated, read_part
from audit.index.sources import find_sources

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor

DEFAULT_INDEX = "be-audit-index"


@dataclass(frozen=True)
class IndexConfig:
    """What `be-audit index build` was asked for; its flags are made from these fields."""

    images: tuple[str, ...] = option((), "Where the training pictures are.", argument=True)
    output: str = option(DEFAULT_INDEX, "Index folder (any fsspec URL).", short="-o", envvar="BE_AUDIT_INDEX")
    sscd: str | None = option(None, "Copy descriptor: a TorchScript or ONNX file you trust, or `testbed`.")
    preprocessing: str | None = option(
        None, "small-edge-288 (default), square-320 (faster on GPUs), small-edge-N, square-N or none."
    )
    type: str = option("auto", "auto (exact up to a million pictures), or any FAISS factory string.")
    rows_per_part: int = option(10_000, "Pictures a part; all that a kill can lose.", min=1)
    batch_size: int = option(32, "Pictures described at once.", min=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = option(0, "Parts described beside each other; 0 is one a GPU.", min=0, max=1024)
    seed: int = option(0, "Seed of the training and recall samples.")
    image_col: str | None = option(None, "Column of pictures or embeddings; found by itself.")
    url_col: str | None = option(None, "Column of URLs; found by itself.")
    caption_col: str | None = option(None, "Column of captions; found by itself.")
    key_col: str | None = option(None, "Column of keys; found by itself.")


@dataclass(frozen=True)
class IndexSummary:
    """What a build made.

    Attributes:
        rows: pictures seen; `ok` of them are in the index, `errors` could not be read.
        error_examples: the first of those, one line each.
        parts: units of work; `resumed` of them were there already, `again` were and were described again, since their
            files have changed or a picture that could not be read can be read now.
        info: index_info.json.
        columns: where the captions, URLs and keys of tables are read from, in words.
    """

    index: str
    rows: int
    ok: int
    errors: int
    error_examples: list[str]
    parts: int
    resumed: int
    info: IndexInfo
    again: int = 0
    columns: tuple[str, ...] = ()


def build_index(config: IndexConfig, stop: Stop | None = None) -> IndexSummary:
    """Describe every picture, part by part, then build the search index. A killed build goes on where it was.

    Parts whose files are not the ones they were made from are described again, and those with pictures that could not
    be read and can be now. One build a folder at a time: others wait for it.

    Args:
        config: what to build.
        stop: asks the build to stop; the part in hand is dropped.

    Raises:
        AuditError: bad input, no descriptor, or a folder that holds an index of other pictures or another descriptor.
        Drained: a stop was asked for.
    """
    if config.rows_per_part < 1 or config.batch_size < 1:
        raise AuditError("--rows-per-part and --batch-size must be at least 1")
    folder = Folder(config.output)
    columns = Columns(config.image_col, config.url_col, config.caption_col, config.key_col)
    sources, left_out = find_sources(config.images, columns)
    if config.sscd is None and any(source.kind == EMBEDDINGS for source in sources):
        raise AuditError(
            f"{', '.join(config.images)}: holds embeddings, and only you know which descriptor made them: name it with "
            "--sscd; those of another (CLIP, say) tell nothing of copies"
        )
    weights = find_descriptor(config.sscd)
    devices = find_devices(config.device, config.workers)
    descriptor = open_descriptor(weights, devices[0], config.preprocessing)
    if config.type != "auto":
        ann.make(config.type, descriptor.dim)  # a mistyped one is said before any picture is read
    identity = _identity(sources, descriptor, config)
    check_index_folder(folder, identity)
    work = [(source, part) for source in sources for part in source.parts(config.rows_per_part)]
    if not work:
        raise AuditError(f"{', '.join(config.images)}: holds no rows")
    stop = stop or Stop()
    with held(folder, CLAIMS, identity, lambda: False, "builds an index here", stop):
        ledger = Ledger(folder, STAGE, plan(folder, descriptor.name, identity), PARTS)
        folder.sweep()
        done = dict(ledger.done(range(len(work))))
        again = outdated(folder, work, done)
        for number in again:
            ledger.drop(number)
            del done[number]
        if len(done) < len(work):
            folder.remove(INFO)
        resumed = len(done)
        missing = [(number, *each) for number, each in enumerate(work) if number not in done]
        others = [open_descriptor(weights, device, config.preprocessing) for device in devices[1 : len(missing)]]
        with ThreadPoolExecutor(8 * (1 + len(others)), "decode") as pool, _progress(work, done) as progress:

            def embed(
                descriptor: Descriptor, number: int, source: Source, part: Slice, check: Callable[[], None]
            ) -> None:
                done[number] = embed_part(
                    number, source, part, descriptor, config.batch_size, pool, ledger, check, progress
                )

            _beside(missing, [descriptor, *others], embed, stop)
        blind = [number for number, (source, _) in enumerate(work) if source.kind == EMBEDDINGS]
        info = _finish(folder, ledger, done, descriptor, weights, config, left_out, blind)
    counts = info.rows, info.ok, info.errors
    columns_taken = tuple(dict.fromkeys(words for source in sources if (words := source.columns())))
    parts = len(work), resumed
    return IndexSummary(config.output, *counts, info.error_examples, *parts, info, len(again), columns_taken)


def _beside(
    missing: list[tuple[int, Source, Slice]], descriptors: list[Descriptor], embed: Callable[..., None], stop: Stop
) -> None:
    """Every descriptor, one a device, takes the next part in a thread of its own; what fails in one ends all.

    Raises:
        AuditError: as `embed`. Drained: a stop was asked for.
    """
    todo, taking, failed = iter(missing), threading.Lock(), threading.Event()

    def check() -> None:
        stop.check()
        if failed.is_set():
            raise Drained

    def serve(descriptor: Descriptor) -> None:
        try:
            while True:
                check()
                with taking:
                    part = next(todo, None)
                if part is None:
                    return
                embed(descriptor, *part, check)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(len(descriptors), "describe") as threads:
        served = [threads.submit(serve, descriptor) for descriptor in descriptors]
    errors = [error for each in served if (error := each.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Drained)):
        raise error


def _identity(sources: list[Source], descriptor: Descriptor, config: IndexConfig) -> dict[str, Any]:
    """What makes it this index and no other."""
    return {
        "format": FORMAT,
        "descriptor": {name: value for name, value in descriptor.facts().items() if name != "name"},
        "rows_per_part": config.rows_per_part,
        "columns": {name: getattr(config, name) for name in ("image_col", "url_col", "caption_col", "key_col")},
        "sources": [source.facts() for source in sources],
    }


def check_index_folder(folder: Folder, identity: dict[str, Any]) -> bool:
    """Whether this very index was begun in the folder; False for an empty one.

    Raises:
        AuditError: the folder holds something else, with the difference field by field.
    """
    there = [name for name in folder.list() if not name.startswith((".", "_"))]
    if folder.exists(FACTS):  # asked for after the listing: it is the first that another build writes
        old = read_index_facts(folder)
        if old.fingerprint != digest(identity):
            lines = "; ".join(diff_lines(old.facts, identity))
            raise AuditError(f"{folder.url}: holds another index ({lines}): name another folder with -o, or remove it")
        return True
    if there or (folder.local and folder.fs.isfile(folder.root)):
        raise AuditError(f"-o {folder.url}: not an empty folder and no index (it has {(there or ['data'])[0]})")
    return False


def plan(folder: Folder, name: str, identity: dict[str, Any]) -> str:
    """Write `index.json`, or check that what is there is this very index; returns the fingerprint.

    Args:
        name: of the descriptor.

    Raises:
        AuditError: as check_index_folder.
    """
    fingerprint = digest(identity)
    if not check_index_folder(folder, identity):
        folder.write(FACTS, to_json(IndexFacts(fingerprint, name, identity)))
    return fingerprint


def _finish(
    folder: Folder,
    ledger: Ledger,
    done: dict[int, Commit],
    descriptor: Descriptor,
    weights: Path,
    config: IndexConfig,
    left_out: Counter[str],
    blind: list[int],
) -> IndexInfo:
    """Gather the parts' vectors, build the search index, measure it; `index_info.json` last says that all is there."""
    counts = Counter[str]()
    for commit in done.values():
        counts.update(commit.counts)
    total = counts["ok"]
    if total == 0:
        raise AuditError(f"{', '.join(config.images)}: not one picture could be read{_first_error(folder, done)}")
    key = ann.auto_key(total) if config.type == "auto" else config.type
    if folder.exists(INFO):
        info = read_index_info(folder)
        same = (info.fingerprint, info.type, info.seed) == (ledger.fingerprint, key, config.seed)
        if same and all(folder.exists(name) for name in info.files):
            return info
        folder.remove(INFO)
    start = time.perf_counter()
    scratch_root = folder.path() if folder.local else None
    for left in Path(folder.path()).glob(".build-*") if folder.local else ():  # of a build killed here
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=scratch_root))
    try:
        examples = _gather(folder, done, total, descriptor.dim, scratch)
        vectors = np.load(scratch / VECTORS, mmap_mode="r")
        facts: dict[str, Any] = {"training_rows": 0, "num_lists": None, "num_probe": None}
        names = [VECTORS, IDS]
        search = None
        if key != "Flat":
            facts = ann.build(vectors, key, config.seed, scratch / FAISS)
            search = ann.load(str(scratch / FAISS), facts["num_probe"])
            names.append(FAISS)
        built = time.perf_counter() - start
        recall = ann.recall(vectors, search, config.seed, trained=facts["training_rows"])
        del vectors, search
        for name in names:
            folder.put(name, scratch / name)
        if key == "Flat":
            folder.remove(FAISS)
        files = {name: FileFacts((scratch / name).stat().st_size, file_sha256(scratch / name)) for name in names}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    info = IndexInfo(
        fingerprint=ledger.fingerprint,
        type=key,
        seed=config.seed,
        descriptor=DescriptorFacts(**descriptor.facts()),
        weights=str(weights.resolve()),
        dim=descriptor.dim,
        parts=len(done),
        rows=total + counts["error"],
        ok=total,
        errors=counts["error"],
        error_examples=examples,
        left_out=dict(left_out + _left_out(counts)),
        contents=contents_of(folder, done, blind),
        blind=blind,
        **facts,
        **recall,
        seconds={
            "search_index": round(built, 2),
            "describe": round(sum(made.seconds["part"] for made in done.values()), 2),
        },
        files=files,
    )
    folder.write(INFO, to_json(info))
    return info


def _first_error(folder: Folder, done: dict[int, Commit]) -> str:
    errors = (error for number in sorted(done) for error in read_part(folder, number, ["error"])["error"].to_pylist())
    return next((f"; the first: {error}" for error in errors if error), "")


def _left_out(counts: Counter[str]) -> Counter[str]:
    """Reason -> how often, of the counts of commits."""
    return Counter({name.removeprefix(LEFT_OUT): count for name, count in counts.items() if name.startswith(LEFT_OUT)})


def _gather(folder: Folder, done: dict[int, Commit], total: int, dim: int, scratch: Path) -> list[str]:
    """Write `vectors.npy` and `ids.npy` from the parts, in id order; returns the first unreadable pictures."""
    vectors = np.lib.format.open_memmap(scratch / VECTORS, mode="w+", dtype=np.float16, shape=(total, dim))
    ids = np.empty(total, np.int64)
    examples: list[str] = []
    position = 0
    for number in sorted(done):
        table = read_part(folder, number, ["id", "key", "status", "error", "embedding"])
        good = table.filter(pc.equal(table["status"], "ok"))
        rows = good.num_rows
        embedding = good["embedding"].combine_chunks()
        vectors[position : position + rows] = np.asarray(embedding.flatten()).reshape(rows, dim)
        ids[position : position + rows] = good["id"].to_numpy()
        position += rows
        if len(examples) < 20:
            bad = table.filter(pc.equal(table["status"], "error")).slice(0, 20 - len(examples))
            examples += [f"{row['key']}: {row['error']}" for row in bad.select(["key", "error"]).to_pylist()]
    vectors.flush()
    np.save(scratch / IDS, ids)
    return examples


def _progress(work: list[tuple[Source, Slice]], done: dict[int, Commit]) -> Progress:
    """Counts pictures; parts where tars are among them, whose members nobody has counted."""
    counts = [part.count for _, part in work]
    if not all(counts):
        return Progress(len(work), "parts", "describe", len(done))
    return Progress(sum(counts), "pictures", "describe", sum(counts[number] for number in done))
