"""Readers: a duplicate row is given its first occurrence's scores, a refined row its trajectory's."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.errors import AuditError, Damaged
from audit.reports.sql import run_query
from audit.run.read import (
    count_rows,
    dataset,
    read_distinct,
    read_repeats,
    read_rows,
    read_scores,
    read_stage,
    resolve_duplicates,
)
from audit.run.run import Run
from audit.run.schema import SCORE_COLUMNS, SCORE_MASKS, tensor_values
from audit.run.select import best_rows
from audit.run.stage import REFINE, SCAN, Stage
from audit.scores.scan import ScanConfig, scan
from tests.command import be_audit
from tests.fabricate import make_run
from tests.tiny import SIZE


def scores(rows: list[dict[str, object]]) -> pa.Table:
    """A table of scores; what a row does not say is null."""
    fields = [(name, kind) for name, (kind, _) in SCORE_COLUMNS.items() if name not in SCORE_MASKS]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


FAR = (5 << 32) | 2
ROWS: list[dict[str, object]] = [
    {"row_id": 0, "caption": "a", "status": "ok", "ld": 1.0, "magnitude": 2.0, "num_tokens": 1, "refined": True},
    {"row_id": 1, "caption": "a", "status": "ok", "duplicate_of": 0, "refined": False},
    {"row_id": 2, "caption": "b", "status": "error", "error": "broken", "refined": False},
    {"row_id": 3, "caption": "b", "status": "ok", "duplicate_of": 2, "refined": False},
    {"row_id": 4, "caption": None, "status": "empty", "refined": False},
    {"row_id": 5, "caption": "c", "status": "ok", "duplicate_of": FAR, "refined": False},
    {"row_id": FAR, "caption": "c", "status": "ok", "ld": 7.0, "refined": False},
]


def test_duplicates_take_everything_from_their_first_occurrence() -> None:
    found = resolve_duplicates(scores(ROWS)).to_pylist()
    assert [row["ld"] for row in found] == [1.0, 1.0, None, None, None, 7.0, 7.0]
    assert [row["status"] for row in found] == ["ok", "ok", "error", "error", "empty", "ok", "ok"]
    assert (found[1]["num_tokens"], found[1]["refined"], found[3]["error"]) == (1, True, "broken")
    assert [row["duplicate_of"] for row in found] == [None, 0, None, 2, None, FAR, None]  # it stays said
    assert [row["row_id"] for row in found] == [0, 1, 2, 3, 4, 5, FAR]


def test_rows_in_any_order() -> None:
    order = [6, 1, 5, 0, 3, 4, 2]
    found = resolve_duplicates(scores([ROWS[place] for place in order]))
    assert found["ld"].to_pylist() == [7.0, 1.0, 7.0, 1.0, None, None, None]


def test_a_first_occurrence_that_is_not_done_leaves_pending() -> None:
    found = resolve_duplicates(scores(ROWS[:6])).to_pylist()
    assert (found[5]["status"], found[5]["ld"], found[5]["caption"]) == ("pending", None, "c")
    assert found[1]["status"] == "ok"


def test_no_duplicates_and_no_rows() -> None:
    assert resolve_duplicates(scores(ROWS[:1])).to_pylist() == scores(ROWS[:1]).to_pylist()
    assert resolve_duplicates(scores([])).num_rows == 0


def test_counts_and_repeats_are_those_of_the_whole_table(tmp_path: Path) -> None:
    """Without ever holding it: duplicates of failed captions, of shards that are not done, and empty ones."""
    captions = ["a", "b", None, "a", "c", "b", " ", "d", "c", "d", "a", "e"]
    run = make_run(tmp_path, captions, failed=[1], rows_per_shard=4)
    for without in (None, 1, 0):  # d and c are in shard 1; a and b in 0
        if without is not None:
            Stage.open(run, SCAN).ledger.drop(without)
        table = read_scores(run, ["row_id", "status", "duplicate_of"])
        counts = count_rows(run)
        expected = Counter(table["status"].to_pylist())
        assert {name: counts[name] for name in ("ok", "error", "empty", "pending")} == {
            name: expected[name] for name in ("ok", "error", "empty", "pending")
        }
        assert (
            counts["rows"] == table.num_rows
            and counts["duplicates"] == table.num_rows - table["duplicate_of"].null_count
        )
        same = pa.compute.coalesce(table["duplicate_of"], table["row_id"]).to_pylist()
        for chosen in ([0], [0, 1 << 32], []):
            found = read_repeats(run, np.array(chosen, np.int64))
            pairs = [pair for pair in zip(table["row_id"].to_pylist(), same, strict=True) if pair[1] in chosen]
            assert list(zip(found["row_id"].to_pylist(), found["first"].to_pylist(), strict=True)) == pairs
        own = table.filter(pa.compute.is_null(table["duplicate_of"]))
        own = own.filter(pa.compute.equal(own["status"], "ok"))
        assert read_distinct(run, ["row_id"])["row_id"].equals(own["row_id"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sd1: str) -> Run:
    """Captions a to h, where shard 2 repeats shards 0 and 1, refined by half."""
    root = tmp_path_factory.mktemp("tables")
    captions = [*"abcdefgh", "a", "e", "h", None]
    pq.write_table(pa.table({"TEXT": captions, "key": [f"k{i}" for i in range(12)]}), root / "x.parquet")
    scan(
        ScanConfig(
            (str(root / "x.parquet"),), str(root / "run"), sd1, rows_per_shard=4, second_look=0, refine=0.5, steps=3
        )
    )
    return Run.open(str(root / "run"))


@pytest.mark.sampling
def test_no_null_score_for_an_ok_row(run: Run) -> None:
    found = read_scores(run)
    ok = found.filter(pa.compute.equal(found["status"], "ok"))
    assert ok.num_rows == 11
    for name in ("magnitude", "ld", "ld_energy", "webster", "cosine", "num_tokens", "truncated"):
        assert ok[name].null_count == 0, name
    by_caption: dict[str, set[float]] = {}
    for row in ok.to_pylist():
        by_caption.setdefault(row["caption"], set()).add(row["ld"])
    assert all(len(values) == 1 for values in by_caption.values()) and len(by_caption) == 8
    assert found["key"].to_pylist() == [f"k{i}" for i in range(12)]


@pytest.mark.sampling
def test_refined_rows_carry_their_windows(run: Run) -> None:
    found, refined = read_scores(run), read_stage(run, "refine")
    assert refined is not None and refined.num_rows == 4
    for row in refined.to_pylist():
        same = [scored for scored in found.to_pylist() if scored["caption"] == row["caption"]]
        assert same and all(scored["refined"] for scored in same)
        for name in ("ld_first", "ld_10", "ld_all", "magnitude_10", "magnitude_all"):
            assert {scored[name] for scored in same} == {row[name]}
    others = found.filter(pa.compute.invert(found["refined"]))
    assert others["ld_all"].null_count == others.num_rows > 0


@pytest.mark.sampling
def test_several_images_of_a_row_are_averaged(run: Run, tmp_path: Path, sd1: str) -> None:
    inputs = [entry["path"] for entry in run.fingerprint.inputs]
    config = ScanConfig(tuple(map(str, inputs)), str(tmp_path / "run"), sd1, refine=0.2, steps=3, num_noises=3)
    scan(config)
    other = Run.open(config.output)
    rows = read_stage(other, "refine", ["row_id", "image_index", "ld_all"])
    assert rows is not None and rows["image_index"].to_pylist() == [0, 1, 2] * 2
    scored = {row["row_id"]: row["ld_all"] for row in read_scores(other).to_pylist()}
    for row_id in set(rows["row_id"].to_pylist()):
        values = [row["ld_all"] for row in rows.to_pylist() if row["row_id"] == row_id]
        assert scored[row_id] == pytest.approx(np.mean(values), rel=1e-6)


def test_a_row_whose_trajectory_failed_is_not_refined(run: Run, tmp_path: Path) -> None:
    other = Run.open(shutil.copytree(run.url, tmp_path / "run"))
    stage = Stage.open(other, REFINE)
    shard = stage.shards[0]
    table = stage.table(shard)
    failed = table["row_id"][0].as_py()
    errors = pa.array(["boom", *[None] * (table.num_rows - 1)], pa.string())
    stage.ledger.commit(shard, table.set_column(3, "error", errors))
    assert table.schema.names[3] == "error"
    rows = [row for row in read_scores(other).to_pylist() if failed in (row["row_id"], row["duplicate_of"])]
    assert rows and all((row["refined"], row["ld_first"]) == (False, None) for row in rows)
    sql = tmp_path / "q.sql"
    sql.write_text(f"SELECT refined, ld_first FROM scores WHERE row_id = {failed}")
    assert run_query(str(sql), other.url).to_pylist() == [{"refined": False, "ld_first": None}]


def test_chosen_columns_and_masks(run: Run) -> None:
    assert read_scores(run, ["row_id", "ld"]).schema.names == ["row_id", "ld"]
    assert not set(SCORE_MASKS) & set(read_scores(run).schema.names)
    for name in SCORE_MASKS:
        masks = read_scores(run, [name], masks=True)[name]
        assert masks.null_count == 4  # three duplicates and the empty row
        assert tensor_values(masks.drop_null()).shape == (8, SIZE, SIZE // 8)


def test_a_score_that_is_younger_than_the_run_or_a_part_of_it_has_nulls(run: Run, tmp_path: Path) -> None:
    """Scanned before the detector existed, and gone on with after: nulls in the old shards, whoever reads."""
    other = Run.open(shutil.copytree(run.url, tmp_path / "run"))
    stage = Stage.open(other, SCAN)
    query = tmp_path / "q.sql"
    query.write_text("SELECT row_id, cosine FROM scores ORDER BY row_id")
    for shard in (0, 1, 2):
        stage.ledger.commit(shard, stage.table(shard).drop_columns(["cosine"]))
        left = [row for row in read_scores(other).to_pylist() if row["cosine"] is not None]
        assert all(row["row_id"] >> 32 > shard or row["duplicate_of"] is not None for row in left)
        assert {row["row_id"]: row["cosine"] for row in run_query(str(query), other.url).to_pylist()} == {
            row["row_id"]: row["cosine"] for row in read_scores(other).to_pylist()
        }
    with pytest.raises(AuditError, match="--by cosine: the run has no scores in this column"):
        best_rows(other, "cosine")


def test_rows_by_id_in_the_order_asked_for(run: Run) -> None:
    every = {row["row_id"]: row for row in read_scores(run).to_pylist()}
    ids = [(1 << 32) | 3, 0, (2 << 32) | 3, 2]
    found = read_rows(run, np.array(ids))
    assert found.to_pylist() == [every[row_id] for row_id in ids]
    assert read_rows(run, np.array(ids), ["key"]).to_pylist() == [{"key": every[row_id]["key"]} for row_id in ids]
    assert read_rows(run, np.zeros(0, np.int64)).schema.names == found.schema.names


def test_uncommitted_files_are_not_read(run: Run, tmp_path: Path) -> None:
    import shutil

    copy = Run.open(str(shutil.copytree(run.folder.root, tmp_path / "run")))
    (tmp_path / "run" / "_commits" / "scan" / "00001.json").unlink()
    (tmp_path / "run" / "scores" / "000" / "00007.arrow").write_bytes(b"of nobody")
    found = read_scores(copy)
    assert found["caption"].to_pylist() == [*"abcd", "a", "e", "h", None]
    assert found["status"].to_pylist() == ["ok"] * 5 + ["pending"] * 2 + ["empty"]
    for path in (tmp_path / "run" / "_commits" / "scan").iterdir():
        path.unlink()
    with pytest.raises(AuditError, match="no shard is done yet: go on with `be-audit scan`"):
        read_scores(copy)
    assert dataset(copy) is None and read_stage(copy, "confirm") is None


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "commit"])
def test_what_is_committed_and_not_there_is_named_and_never_left_out(
    run: Run, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are compared with the commits by every reader: a run never answers with some of its rows."""
    monkeypatch.setattr("audit.base.commits.MOVING", 0.01)  # nobody is at work on it
    copy = Run.open(str(shutil.copytree(run.folder.root, tmp_path / "run")))
    path = tmp_path / "run" / "scores" / "000" / "00001.arrow"
    if damage == "commit":
        path = tmp_path / "run" / "_commits" / "scan" / "00001.json"
        path.write_text("{")
    elif damage == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-8] if damage == "cut" else data + b"\0")
    for read in (lambda: read_scores(copy), lambda: run_query("errors", copy.url), lambda: best_rows(copy, "ld")):
        with pytest.raises(Damaged, match=f"{path.name}: .*verify .* --repair does it again"):
            read()
    for words in (["sql", "errors", copy.url], ["report", copy.url]):
        found = be_audit(*words)
        assert found.code == 3 and found.err.startswith("Error: ") and str(path) in found.err, found
    assert read_rows(copy, np.array([0]), ["key"]).num_rows == 1, "of another shard"


def test_other_tools_read_the_files(run: Run) -> None:
    """Plain Arrow for everybody: DuckDB over the data set, pandas over the table."""
    stored = dataset(run)
    assert stored is not None
    count = duckdb.sql("select count(*), count(ld), count(duplicate_of) from stored").fetchall()
    assert count == [(12, 8, 3)]
    frame = read_scores(run).to_pandas()
    assert len(frame) == 12 and frame.loc[frame.caption == "a", "ld"].nunique() == 1
