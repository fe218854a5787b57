"""SQL over a run: every query that comes with be-audit against pandas, at any state of a run, and read-only."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from audit.base.errors import AuditError
from audit.cli.commands import cli
from audit.reports.sql import answer_as, connect, queries, question, run_query
from audit.run.run import Run
from audit.run.schema import CONFIRMED_COLUMNS, MATCH_COLUMNS, SCORE_COLUMNS, SCORE_MASKS, TRAJECTORY_COLUMNS
from audit.run.stage import SCAN, Stage
from tests.fabricate import add_confirm, add_refine, make_run

BRANDS = ("Shaw Floors", "Red Barn", "Blue Lake", "Old Town")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """300 rows, one in five a repeat (some across shards), failed rows, verdicts, refined rows, failed tries."""
    rng = np.random.default_rng(3)
    captions = [f"{BRANDS[rng.integers(4)]} item {'abcdefghij'[n % 10]} {n}" for n in range(240)]
    captions += [captions[n] for n in rng.integers(0, 240, 60)]
    made = make_run(tmp_path_factory.mktemp("sql"), captions, rows_per_shard=64, failed=(5, 17, 200))
    add_confirm(made, ["global", "local", "none", "global", "no_reference", "local"], num_images=2)
    add_refine(made, 0.05)
    Stage.open(made, SCAN).ledger.record_attempt(2, "OSError: no space left")
    return made


@pytest.fixture(scope="module")
def scores(run: Run) -> pd.DataFrame:
    """What scores must be, from the raw files by pandas alone."""
    files = sorted(Path(run.url, "scores").rglob("*.arrow"))
    raw = pd.concat([pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_pandas() for file in files])
    raw = raw.set_index("row_id", drop=False)
    of = raw["duplicate_of"].fillna(raw["row_id"]).astype("int64")
    frame = raw.loc[of].set_index(raw.index)  # of every row its first occurrence
    frame["row_id"], frame["duplicate_of"] = raw["row_id"], raw["duplicate_of"]
    for name in ("url", "key"):
        frame[name] = raw[name]
    return frame.rename_axis(index=None)


@pytest.fixture(scope="module")
def confirmed(run: Run) -> pd.DataFrame:
    table = pa.ipc.open_file(pa.memory_map(str(next(Path(run.url).glob("confirmed/*/000/00000.arrow"))))).read_all()
    return (
        pd.DataFrame(table.drop_columns(["matches"]).to_pylist())
        .set_index("row_id", drop=False)
        .rename_axis(index=None)
    )


def frame_of(name: str, run: Run) -> pd.DataFrame:
    return run_query(name, run.url).to_pandas()


def test_the_views_hold_what_the_files_hold(run: Run, scores: pd.DataFrame) -> None:
    with connect(run) as connection:
        found = connection.sql("SELECT * FROM scores ORDER BY row_id").to_arrow_table().to_pandas()
    assert found["row_id"].tolist() == scores["row_id"].tolist()
    for name in ("caption", "status", "error", "ld_energy", "magnitude", "duplicate_of"):
        pd.testing.assert_series_equal(found[name], scores[name].reset_index(drop=True), check_dtype=False)
    assert found["source_url"].tolist() == scores["url"].tolist()
    assert "mask" not in found.columns


def test_refined_rows_have_their_windows_duplicates_included(run: Run) -> None:
    from audit.run.read import read_scores

    reference = read_scores(run, ["row_id", "refined", "ld_10"]).to_pandas()
    with connect(run) as connection:
        found = connection.sql("SELECT row_id, refined, ld_10 FROM scores ORDER BY row_id").to_arrow_table().to_pandas()
    first = found["row_id"].isin(reference["row_id"][reference["refined"]])
    pd.testing.assert_frame_equal(
        found[first].reset_index(drop=True), reference[reference["refined"]].reset_index(drop=True)
    )
    with connect(run) as connection:
        wrong = connection.sql(
            "SELECT count(*) FROM scores d JOIN scores f ON d.duplicate_of = f.row_id "
            "WHERE d.refined <> f.refined OR d.ld_10 IS DISTINCT FROM f.ld_10"
        ).fetchall()
    assert wrong == [(0,)]


def test_flagged(run: Run, scores: pd.DataFrame, confirmed: pd.DataFrame) -> None:
    first = scores[(scores["status"] == "ok") & scores["duplicate_of"].isna()]
    first = first.sort_values(["ld_energy", "row_id"], ascending=[False, True]).head(100)
    found = frame_of("flagged", run)
    assert found["row_id"].tolist() == first["row_id"].tolist()
    verdicts = [confirmed["verdict"].get(row_id) for row_id in first["row_id"]]
    assert [value if isinstance(value, str) else None for value in found["verdict"]] == verdicts
    best = [confirmed["best"].get(row_id) for row_id in first["row_id"]]
    sscd = [np.nan if each is None else each["sscd"] for each in best]
    np.testing.assert_allclose(found["sscd"].astype(float), sscd)


def test_templates(run: Run, scores: pd.DataFrame) -> None:
    first = scores[(scores["status"] == "ok") & scores["duplicate_of"].isna()]
    numbers_alike = first["caption"].str.lower().str.replace("[0-9]+", "0", regex=True)
    opening = numbers_alike.str.extract("^[^a-z0-9]*([a-z0-9]+[^a-z0-9]+[a-z0-9]+)")[0]
    groups = first.groupby(opening)["ld_energy"].agg(["size", "mean", "max"])
    groups = groups[groups["size"] >= 3].sort_values("mean", ascending=False, kind="stable").head(50)
    found = frame_of("templates", run)
    assert found["opening"].tolist() == groups.index.tolist()
    assert found["captions"].tolist() == groups["size"].tolist()
    np.testing.assert_allclose(found["mean_ld_energy"], groups["mean"], rtol=1e-5)
    np.testing.assert_allclose(found["max_ld_energy"], groups["max"])


def test_duplicates(run: Run, scores: pd.DataFrame) -> None:
    good = scores[scores["status"] == "ok"]
    caption = good.groupby("caption").agg(times=("row_id", "size"), score=("ld_energy", "first"))
    groups = caption.groupby("times")["score"].agg(["size", "mean", "median", "max"])
    found = frame_of("duplicates", run)
    assert len(groups) > 1 and found["occurrences"].tolist() == groups.index.tolist()
    for name, column in (("size", "captions"), ("mean", "mean_ld_energy"), ("median", "median_ld_energy")):
        np.testing.assert_allclose(found[column], groups[name], rtol=1e-5)


def test_histogram(run: Run, scores: pd.DataFrame, confirmed: pd.DataFrame) -> None:
    first = scores[(scores["status"] == "ok") & scores["duplicate_of"].isna()]
    counts, edges = np.histogram(first["ld_energy"].astype(float), 20)
    found = frame_of("histogram", run)
    assert dict(zip(found["bin"], found["captions"], strict=True)) == {n: c for n, c in enumerate(counts) if c}
    np.testing.assert_allclose(found["from_score"], edges[found["bin"]], rtol=1e-5)
    assert found["reproduced"].sum() == confirmed["verdict"].isin(["global", "local"]).sum() > 0


def test_domains(run: Run, scores: pd.DataFrame, confirmed: pd.DataFrame) -> None:
    good = scores[scores["status"] == "ok"].copy()
    limit = good["ld_energy"][good["duplicate_of"].isna()].astype(float).quantile(0.95)
    good["domain"] = [urlsplit(url).netloc for url in good["url"]]
    good["high"] = good["ld_energy"] >= limit
    copied = confirmed["row_id"][confirmed["verdict"].isin(["global", "local"])]
    good["reproduced"] = good["duplicate_of"].fillna(good["row_id"]).isin(copied)
    groups = good.groupby("domain").agg(rows=("row_id", "size"), high=("high", "sum"), reproduced=("reproduced", "sum"))
    groups = groups.reset_index().sort_values(["high", "rows", "domain"], ascending=[False, False, True])
    found = frame_of("domains", run)
    for name in ("domain", "rows", "high", "reproduced"):
        assert found[name].tolist() == groups[name].tolist(), name
    np.testing.assert_allclose(found["high_rate"], groups["high"] / groups["rows"])


def test_throughput(run: Run) -> None:
    commits = [json.loads(file.read_text()) for file in Path(run.url, "_commits").rglob("*.json")]
    frame = pd.DataFrame([{"stage": c["stage"], "rows": c["rows"], "wall": c["seconds"]["wall"]} for c in commits])
    groups = frame.groupby("stage").agg(shards=("rows", "size"), rows=("rows", "sum"), wall=("wall", "sum"))
    found = frame_of("throughput", run).set_index("stage")
    assert {"confirm", "refine", "scan", "trajectories"} <= set(found.index)  # and `match`, in a run that was made
    assert found.index.tolist() == groups.index.tolist()
    assert found["rows"].tolist() == groups["rows"].tolist() and found["shards"].tolist() == groups["shards"].tolist()
    np.testing.assert_allclose(found["rows_per_second"], groups["rows"] / groups["wall"])


def test_errors(run: Run, scores: pd.DataFrame) -> None:
    failed = scores[scores["status"] == "error"]
    assert frame_of("errors", run).to_dict("records") == [
        {"what": "row", "error": "ValueError: made to fail", "times": len(failed), "example": failed["row_id"].min()},
        {"what": "scan shard", "error": "OSError: no space left", "times": 1, "example": 2},
    ]


def test_verdicts(run: Run, confirmed: pd.DataFrame) -> None:
    groups = confirmed.groupby("verdict")["candidate_score"].agg(["size", "min", "median"]).reset_index()
    groups = groups.sort_values(["size", "verdict"], ascending=[False, True])
    found = frame_of("verdicts", run)
    assert found["verdict"].tolist() == groups["verdict"].tolist()
    np.testing.assert_allclose(found["median_score"], groups["median"])
    own = confirmed["best"].map(lambda best: best is not None and best["own"]).groupby(confirmed["verdict"]).sum()
    assert found.set_index("verdict")["own_picture"].to_dict() == own.to_dict()


def test_columns_that_share_a_name_stay_apart(run: Run, tmp_path: Path) -> None:
    query = tmp_path / "twice.sql"
    query.write_text("SELECT 1 AS x, 2 AS x_1, 3 AS x, 'z' AS y, 4 AS x ORDER BY 1")
    found = run_query(str(query), run.url)
    assert found.to_pylist() == [{"x": 1, "x_1": 2, "x_2": 3, "y": "z", "x_3": 4}]


def test_every_query_is_tested_here_and_says_its_question() -> None:
    assert set(queries()) == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} & set(
        queries()
    )
    for name, sql in queries().items():
        assert question(sql).endswith(("?", "?)", ".)")), name


@pytest.mark.parametrize("shards", [0, 1])
def test_every_query_answers_while_a_run_is_in_progress(tmp_path: Path, shards: int) -> None:
    made = make_run(tmp_path, ["ant", "bee", "ant", "cat"], rows_per_shard=2, shards=shards)
    for name in queries():
        whole = run_query(name, made.url)
        assert whole.num_columns > 1 and (shards or not whole.num_rows)


def test_a_duplicate_of_a_shard_that_is_not_done_is_pending(tmp_path: Path) -> None:
    made = make_run(tmp_path, ["ant", "bee", "ant", "cat"], rows_per_shard=2)
    Stage.open(made, SCAN).ledger.drop(0)
    with connect(made) as connection:
        rows = connection.sql("SELECT caption, status, ld_energy FROM scores ORDER BY row_id").fetchall()
    assert rows[0] == ("ant", "pending", None) and rows[1][:2] == ("cat", "ok") and len(rows) == 2


def test_stages_that_have_not_begun_are_empty_views_with_their_columns(tmp_path: Path) -> None:
    made = make_run(tmp_path, ["ant"], shards=0)
    wanted = {
        "scores": set(SCORE_COLUMNS) - set(SCORE_MASKS) | {"url", "key", "source_url", "source_key"},
        "trajectories": {name for name, (kind, _) in TRAJECTORY_COLUMNS.items() if kind != pa.null()} - {"image"}
        | {"stage"},
        "confirmed": set(CONFIRMED_COLUMNS) | {"q_value"},
        "matches": set(MATCH_COLUMNS) | {"row_id"},
    }
    with connect(made) as connection:
        for view, names in wanted.items():
            found = connection.sql(f"SELECT * FROM {view}").to_arrow_table()
            assert set(found.schema.names) == names, view
            assert found.num_rows == 0
        assert connection.sql("SELECT best.sscd, best.reference_url FROM confirmed").fetchall() == []


def test_pictures_stay_in_the_files(run: Run) -> None:
    with connect(run) as connection:
        best = connection.sql("SELECT best FROM confirmed WHERE best IS NOT NULL").to_arrow_table()["best"].type
        assert {field.name for field in best} == set(MATCH_COLUMNS)
        counts = dict(connection.sql("SELECT stage, count(*) FROM trajectories GROUP BY stage").fetchall())
        assert counts["confirm"] == 12 and counts["refine"] > 0
        matches = connection.sql("SELECT count(*) FROM matches").fetchall()
        assert matches == [(5 * 2 * 2,)]  # five rows with references, two images, two neighbours


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "SELECT * FROM read_csv('{folder}/secret.csv')",
        "SELECT * FROM '{folder}/secret.csv'",
        "ATTACH '{folder}/new.db'",
        "EXPORT DATABASE '{folder}/out'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "LOAD httpfs",
        "FORCE INSTALL httpfs FROM 'http://127.0.0.1:9'",
        "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
        "SELECT * FROM 's3://bucket/x.parquet'",
        "SELECT * FROM read_text('{folder}/secret.csv')",
        "SELECT * FROM read_blob('{folder}/*')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM read_json('{folder}/secret.csv')",
        "COPY scores TO '{folder}/out.parquet' (FORMAT parquet)",
        "COPY commits FROM '{folder}/secret.csv'",
        "CREATE SECRET (TYPE s3, KEY_ID 'x')",
        "SET lock_configuration = false",
        "SET allowed_directories = ['{folder}']",
        "PRAGMA enable_profiling; SET profiling_output = '{folder}/out.json'",
        "SET temp_directory = '{folder}'",
        "SET python_enable_replacements = true",
        "SELECT * FROM sys.modules",
        "IMPORT DATABASE '{folder}'",
        "DELETE FROM scores",
        "SELEC 1",
        "",
    ],
)
def test_nothing_can_be_written_or_read_elsewhere(run: Run, tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    query = tmp_path / "query.sql"
    query.write_text(sql.format(folder=tmp_path))
    with pytest.raises(AuditError, match=str(query)):
        run_query(str(query), run.url)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["query.sql", "secret.csv"]


def test_the_command_lists_prints_and_writes(run: Run, tmp_path: Path) -> None:
    ask = CliRunner().invoke
    listed = ask(cli, ["sql"])
    assert listed.exit_code == 0 and "histogram" in listed.output and "How are the scores distributed" in listed.output
    assert ask(cli, ["sql", "verdicts", run.url]).output.splitlines()[0].split() == [
        *run_query("verdicts", run.url).schema.names
    ]
    rows = json.loads(ask(cli, ["sql", "verdicts", run.url, "--format", "json"]).output)
    assert rows == run_query("verdicts", run.url).to_pylist()
    file = tmp_path / "answer.parquet"
    assert ask(cli, ["sql", "flagged", run.url, "--format", "parquet", "-o", str(file)]).exit_code == 0
    assert pq.read_table(file).num_rows == 100
    mine = tmp_path / "mine.sql"
    mine.write_text("SELECT count(*) AS n FROM scores")
    assert ask(cli, ["sql", str(mine), run.url, "--format", "csv"]).output.splitlines() == ["n", "300"]
    wrong = ask(cli, ["sql", "nonsense", run.url])
    assert wrong.exit_code == 2 and "histogram" in wrong.output
    assert ask(cli, ["sql", "flagged", str(tmp_path)]).exit_code == 2


def test_json_is_split_at_line_feeds_alone() -> None:
    captions = ["a\u2028b\u2029c\u0085d", "e\x0bf\x0cg\x1ch\x1di\x1ej\r\nk", ""]
    assert json.loads(answer_as(pa.table({"c": captions}), "json")) == [{"c": caption} for caption in captions]
    assert json.loads(answer_as(pa.table({"c": pa.array([], pa.string())}), "json")) == []


def test_answers_that_python_has_no_dates_for_are_printed(run: Run, tmp_path: Path) -> None:
    query = tmp_path / "far.sql"
    query.write_text(
        "SELECT 'infinity'::DATE AS a, TIMESTAMP '99999-01-01' AS b, [DATE '99999-01-02'] AS c, "
        "{'d': TIMESTAMPTZ '99999-01-03 00:00:00+00', 'e': DATE '2000-01-04'} AS d, "
        "MAP {'k': DATE '99999-01-05'} AS e, union_value(num := DATE '99999-01-06') AS f"
    )
    wanted = {
        "a": "5881580-07-11",  # the day DuckDB keeps for it
        "b": "99999-01-01 00:00:00.000000",
        "c": ["99999-01-02"],
        "d": {"d": "99999-01-03 00:00:00.000000+00:00", "e": "2000-01-04"},
        "e": [["k", "99999-01-05"]],
        "f": "99999-01-06",
    }
    answer = run_query(str(query), run.url)
    assert json.loads(answer_as(answer, "json")) == [wanted]
    for kind in ("table", "csv"):
        text = answer_as(answer, kind).decode()
        assert all(day in text for day in ("5881580-07-11", "99999-01-01", "99999-01-02", "99999-01-06"))


def test_sums_are_numbers(run: Run, tmp_path: Path) -> None:
    query = tmp_path / "sum.sql"
    query.write_text("SELECT sum(n::HUGEINT) AS whole, sum(-n::DECIMAL(9, 2) / 2) AS part FROM range(4) t(n)")
    answer = run_query(str(query), run.url)
    assert json.loads(answer_as(answer, "json")) == [{"whole": 6, "part": -3}]
    assert answer_as(answer.select(["whole"]), "csv") == b"whole\r\n6\r\n"
    assert answer_as(answer.select(["whole"]), "table").decode().splitlines()[-1].endswith("    6")


def test_a_table_for_a_terminal_is_aligned_and_holds_no_control_characters() -> None:
    table = pa.table({"name": ["a\x1b[31m\nb", None], "value": [1.23456, 100.0]})
    assert (
        answer_as(table, "table").decode()
        == "name        value\n--------  -------\na [31m b    1.235\n              100\n"
    )
    many = answer_as(pa.table({"n": list(range(500))}), "table").decode()
    assert "300 more rows" in many


@pytest.mark.slow
def test_what_memory_is_short_for_goes_to_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits goes to TMPDIR; without a folder for it the same memory is too little."""
    captions = [f"a house number {n}" for n in range(300_000)]
    big = make_run(tmp_path / "run", captions + captions, rows_per_shard=60_000)
    question = tmp_path / "own.sql"
    question.write_text("SELECT max(n) FROM (SELECT row_number() OVER (ORDER BY repeat(caption, 60)) AS n FROM scores)")
    here, spill = tmp_path / "here", tmp_path / "spill"
    here.mkdir()
    spill.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(spill))
    # each thread has memory of its own
    monkeypatch.setattr("audit.reports.sql.duckdb.connect", partial(duckdb.connect, config={"threads": 2}))
    assert run_query(str(question), big.url, "450MB").to_pylist() == [{"max(n)": 600_000}]
    with connect(big, None, "450MB") as connection, pytest.raises(duckdb.OutOfMemoryException):
        connection.sql(question.read_text()).fetchall()
    with pytest.raises(AuditError, match="--memory 30MB cannot hold what the query needs: give more --memory"):
        run_query(str(question), big.url, "30MB")
    assert list(here.iterdir()) == list(spill.iterdir()) == []


def test_memory_that_is_none_is_one_line(run: Run) -> None:
    found = CliRunner().invoke(cli, ["sql", "histogram", run.url, "--memory", "much"])
    assert found.exit_code == 2 and "--memory much: give an amount as 4GB or 500MB" in found.output
