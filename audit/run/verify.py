"""`be-audit verify`: is every committed shard there and whole, and does it hold the rows it should?"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.base.commits import Ledger
from audit.base.stopping import Stop
from audit.captions import is_empty, read_shard
from audit.run.run import Run
from audit.run.schema import RUN_DETECTORS
from audit.run.stage import NULL_MAPS, SCAN, STAGES, Stage
from audit.run.status import not_begun

RESTORE_PLAN = "audit.scores.scan:restore_plan"
OPTIONAL = ("ld", "excess_pca")  # a model without an attention to read; null maps made before there was the score


@dataclass
class Verified:
    """What was found.

    Attributes:
        problems: one line each, naming the file or shard. missing: shards of the scan without a valid commit.
        bad: stage -> shards to redo. plan: it is damaged itself, so that nothing else could be looked at.
        summary: one line. repaired: shards that were done again.
    """

    problems: list[str] = field(default_factory=list)
    bad: dict[str, list[int]] = field(default_factory=dict)
    plan: bool = False
    summary: str = ""
    repaired: int = 0

    @property
    def whole(self) -> bool:
        return not self.problems


def verify_run(url: str, deep: bool = False, repair: bool = False, stop: Stop | None = None) -> Verified:
    """Check what the run rests on, and every shard of every stage that was begun: its commit and its bytes.

    Args:
        url: the run.
        deep: also read the scan's rows: ids as planned, captions as in the input, equal captions of duplicates.
        repair: take back the commits of bad shards and go on with their stages as they were begun. Nothing is taken
            back before inputs, model and index are known to be the run's.
        stop: asks a repair to stop.

    Raises:
        AuditError: no run there; or, with `repair`, what is needed is not what the run was begun with.
    """
    run = Run.open(url)
    found = _check(run, deep)
    if repair and not found.whole:
        for dotted in dict.fromkeys(kind.check for name, kind in STAGES.items() if name in found.bad or kind is SCAN):
            _call(dotted, run)
        before = found.bad
        if found.plan:
            _call(RESTORE_PLAN, run)
            run = Run.open(url)
            found = _check(run, deep)
        for name, shards in found.bad.items():
            ledger = Stage.open(run, STAGES[name]).ledger
            for shard in shards:
                if not _whole_by_now(run, ledger, shard, deep):
                    ledger.drop(shard)
        _redo(run, found.bad, stop)
        before, found = before | found.bad, _check(Run.open(url), deep)
        left = {stage: set(shards) for stage, shards in found.bad.items()}
        found.repaired = sum(len(set(shards) - left.get(stage, set())) for stage, shards in before.items())
        found.summary += f" {found.repaired} shards were done again."
    return found


def _check(run: Run, deep: bool) -> Verified:
    found = Verified()
    scan = Stage.open(run, SCAN)
    found.problems += scan.problems()
    if found.problems:  # nothing can be measured against a plan that is not the run's
        found.plan = True
        found.summary = f"{run.url}: the plan is not whole: --repair makes it again from the inputs."
        return found
    checked = sum(_check_stage(stage, found) for stage in Stage.begun(run))
    if run.plan.sample and Stage.find(run, NULL_MAPS) is None and any(map(scan.ledger.read, scan.ledger.shards())):
        found.problems.append(f"stages/{NULL_MAPS.name}.json: missing")
        found.bad.setdefault(SCAN.name, [])
    if left := not_begun(run):
        found.problems += left.values()
        found.bad.setdefault(SCAN.name, [])
    if deep:
        for shard in sorted(set(range(len(run.plan))) - set(found.bad.get(SCAN.name, []))):
            reason = _check_rows(run, shard)
            if reason:
                found.problems.append(f"{scan.file(shard)}: {reason}")
                found.bad.setdefault(SCAN.name, []).append(shard)
    bad = sum(len(shards) for shards in found.bad.values())
    found.summary = f"{run.url}: {checked} shards checked, "
    found.summary += "all whole." if found.whole else f"{max(bad, 1)} not whole."
    return found


def _whole_by_now(run: Run, ledger: Ledger, shard: int, deep: bool) -> bool:
    """Other machines go on while a run is checked: what they have committed since is not taken back."""
    made = ledger.read(shard)
    if made is None or ledger.problem(made, deep=True):
        return False
    return not (deep and ledger.stage == SCAN.name and _check_rows(run, shard))


def _check_stage(stage: Stage, found: Verified) -> int:
    problems = [] if stage.kind is SCAN else stage.problems()
    if problems:  # which rows it has is not known
        found.problems += problems
        found.bad[stage.kind.name] = []
        return 0
    ledger, shards = stage.ledger, stage.shards
    pending: list[int] = []
    for shard in shards:
        made = ledger.read(shard)
        if made is None:
            there = ledger.folder.exists(ledger.name(shard))
            reason = f"{ledger.name(shard)}: " + ("cannot be read or is of another run" if there else "no commit")
            if not there and not ledger.folder.exists(stage.file(shard)):
                pending.append(shard)
                continue
        else:
            reason = ledger.problem(made, deep=True) or ""
        if reason:
            found.problems.append(reason)
            found.bad.setdefault(ledger.stage, []).append(shard)
    if pending:  # one line for all: a run in progress may have a million of them
        some = ", ".join(map(str, pending[:10])) + (", ..." if len(pending) > 10 else "")
        found.problems.append(f"{ledger.stage}: {len(pending)} of {len(shards)} shards not done yet ({some})")
        found.bad.setdefault(ledger.stage, []).extend(pending)
    return len(shards)


def _check_rows(run: Run, shard: int) -> str | None:
    """What is wrong with a scanned shard's rows, against the plan and the input; None when nothing is."""
    table = Stage.open(run, SCAN).table(shard)
    planned = run.plan.shards["row_count"][shard].as_py()
    if table.num_rows != planned:
        return f"{table.num_rows} rows where {planned} were planned"
    ids = (np.int64(shard) << 32) | np.arange(planned, dtype=np.int64)
    if not np.array_equal(table["row_id"].to_numpy(), ids):
        return "row ids are not as planned"
    captions = read_shard(run.plan, shard, run.folder, [])["caption"]
    if not table["caption"].combine_chunks().equals(pa.chunked_array([captions.combine_chunks()]).combine_chunks()):
        return "captions are not those of the input"
    if not np.array_equal(pc.equal(table["status"], "empty").to_numpy(zero_copy_only=False), is_empty(captions)):
        return "empty captions are not marked as such"
    duplicate_of = run.plan.duplicates(shard)
    if not np.array_equal(pc.fill_null(table["duplicate_of"], -1).to_numpy(), duplicate_of):
        return "duplicates are not as planned"
    scored = pc.and_(pc.equal(table["status"], "ok"), pc.is_null(table["duplicate_of"]))
    values = table.filter(scored)
    known = [name for name in RUN_DETECTORS if run.plan.sample and name in table.schema.names]  # some may be younger
    for name in ("magnitude", "ld", "ld_energy", *known):
        if name in OPTIONAL and values[name].null_count == values.num_rows:
            continue
        if values[name].null_count or not np.isfinite(values[name].to_numpy()).all():
            return f"a scored row has no finite {name}"
    return _check_origins(run, captions, duplicate_of)


def _check_origins(run: Run, captions: pa.ChunkedArray, duplicate_of: np.ndarray) -> str | None:
    """Duplicates are found by 64-bit hashes: here the captions themselves are compared."""
    for origin in np.unique(duplicate_of[duplicate_of >= 0] >> 32):
        rows = np.flatnonzero((duplicate_of >= 0) & (duplicate_of >> 32 == origin))
        theirs = read_shard(run.plan, int(origin), run.folder, [])["caption"]
        first = theirs.take(pa.array(duplicate_of[rows] & 0xFFFFFFFF))
        if captions.take(pa.array(rows)).to_pylist() != first.to_pylist():
            return f"a row is called a duplicate of another caption in shard {origin}"
    return None


def _redo(run: Run, bad: dict[str, list[int]], stop: Stop | None) -> None:
    """Go on with every stage that has bad shards, and with the scan, on which all rest; each resume once."""
    for dotted in dict.fromkeys(kind.resume for name, kind in STAGES.items() if name in bad or kind is SCAN):
        _call(dotted, run, stop)


def _call(dotted: str, *arguments: object) -> None:
    module, _, name = dotted.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)
