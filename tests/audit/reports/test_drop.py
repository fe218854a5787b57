"""`be-audit drop`: the clean table is the old one less the rows that were found, and nothing else is changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.cli.commands import cli
from audit.reports.drop import DropConfig, drop
from audit.statistics.null import PICTURES, Null
from tests.fabricate import add_confirm, make_run

COPIED, LOCAL, CLEAN = "a copied sofa", "a poster copied in part", "a sofa of its own"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """RUN, in which the two best-scored captions are copies, and `table.parquet`, larger than what was scanned."""
    captions = [COPIED, LOCAL, CLEAN, "another", "one more", "the last"]
    run = make_run(tmp_path, captions, scores=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    add_confirm(run, ["global", "local", "none"])
    table = pa.table(
        {
            "n": pa.array(range(10), pa.int16()),
            "TEXT": [CLEAN, COPIED, None, "", COPIED, COPIED, COPIED, "never scanned", LOCAL, CLEAN],
            "nested": [[{"a": at}] for at in range(10)],
        }
    ).replace_schema_metadata({"made by": "somebody"})
    pq.write_table(table, tmp_path / "table.parquet", row_group_size=2, compression="zstd")
    return tmp_path


def test_the_clean_table_is_the_old_one_less_those_rows(work: Path) -> None:
    before = pq.read_table(work / "table.parquet")
    done = drop(DropConfig(str(work / "RUN"), (str(work / "table.parquet"),), str(work / "clean.parquet")))
    assert done.files == [(str(work / "table.parquet"), 10, 5, str(work / "clean.parquet"))]
    after = pq.ParquetFile(work / "clean.parquet")
    assert after.read().equals(before.take([0, 2, 3, 7, 9]))
    assert after.schema_arrow.metadata[b"made by"] == b"somebody"
    assert [after.metadata.row_group(at).num_rows for at in range(after.num_row_groups)] == [1, 2, 0, 1, 1]
    assert after.metadata.row_group(0).column(0).compression == "ZSTD"
    with pytest.raises(AuditError, match=r"clean\.parquet: is there already"):
        drop(DropConfig(str(work / "RUN"), (str(work / "table.parquet"),), str(work / "clean.parquet")))


def test_without_an_output_it_only_says(work: Path) -> None:
    done = CliRunner().invoke(cli, ["drop", str(work / "RUN"), str(work / "table.parquet")])
    assert done.exit_code == 0
    assert f"{work}/table.parquet: 5 of 10 rows would go" in done.output and "Nothing was written" in done.output
    assert COPIED in done.output and LOCAL in done.output and CLEAN not in done.output
    assert sorted(path.name for path in work.glob("*.parquet") if "clean" in path.name) == []


def test_several_tables_go_below_a_folder(work: Path) -> None:
    for name in ("a/x.parquet", "b/x.parquet"):
        (work / "in" / name).parent.mkdir(parents=True)
        pq.write_table(pq.read_table(work / "table.parquet"), work / "in" / name)
    done = drop(DropConfig(str(work / "RUN"), (str(work / "in"),), str(work / "out")))
    assert [dropped for _, _, dropped, _ in done.files] == [5, 5]
    assert pq.read_table(work / "out/a/x.parquet").num_rows == pq.read_table(work / "out/b/x.parquet").num_rows == 5


def test_tables_here_and_elsewhere_go_by_their_names(work: Path) -> None:
    Folder("memory://drop").write("y.parquet", (work / "table.parquet").read_bytes())
    tables = (str(work / "table.parquet"), "memory://drop/y.parquet")
    drop(DropConfig(str(work / "RUN"), tables, str(work / "out")))
    assert sorted(path.name for path in (work / "out").iterdir()) == ["table.parquet", "y.parquet"]
    (work / "in/a").mkdir(parents=True)
    (work / "in/a/x.parquet").write_bytes((work / "table.parquet").read_bytes())
    drop(DropConfig(str(work / "RUN"), (f"file://{work}/in",), str(work / "by-url")))
    assert pq.read_table(work / "by-url/a/x.parquet").num_rows == 5


def test_a_folder_becomes_a_folder_also_of_one_table(work: Path) -> None:
    (work / "in" / "deep").mkdir(parents=True)
    pq.write_table(pq.read_table(work / "table.parquet"), work / "in" / "deep" / "x.parquet")
    (work / "in" / "notes.md").write_text("x")
    done = drop(DropConfig(str(work / "RUN"), (str(work / "in"),), str(work / "out")))
    assert pq.read_table(work / "out" / "deep" / "x.parquet").num_rows == 5
    assert done.left_out == {"of other kinds": 1} and done.lines()[0] == "left out: 1 of other kinds"
    drop(DropConfig(str(work / "RUN"), (str(work / "table.parquet"),), f"{work}/new/"))
    assert pq.read_table(work / "new" / "table.parquet").num_rows == 5


def test_what_a_writer_chose_stays(work: Path) -> None:
    """Codec of every column, INT96 times of Spark, names used twice, ids of pandas, dictionaries, empty row groups."""
    texts = [CLEAN, COPIED, CLEAN, LOCAL]
    when = pa.array([0, 1, 2, 3], pa.timestamp("ns"))
    values = [pa.array(texts).dictionary_encode(), when, pa.array(range(4)), pa.array(range(4)), pa.array(list("vwxy"))]
    table = pa.Table.from_arrays(values, ["TEXT", "when", "u", "u", "a.b"])
    codecs = {"TEXT": "gzip", "when": "zstd", "u": "snappy", "a.b": "none"}
    order = pq.SortingColumn(1)
    pq.write_table(
        table,
        work / "x.parquet",
        row_group_size=2,
        compression=codecs,
        use_deprecated_int96_timestamps=True,
        sorting_columns=[order],
    )
    drop(DropConfig(str(work / "RUN"), (str(work / "x.parquet"),), str(work / "y.parquet")))
    before, after = (pq.ParquetFile(work / name) for name in ("x.parquet", "y.parquet"))
    assert after.read().equals(before.read().take([0, 2])) and after.num_row_groups == 2
    assert after.metadata.row_group(1).sorting_columns == (order,)
    groups = [file.metadata.row_group(0) for file in (before, after)]
    facts = [
        [(c.path_in_schema, c.compression, c.physical_type, c.encodings) for c in map(group.column, range(5))]
        for group in groups
    ]
    assert facts[0] == facts[1]


def test_captions_are_in_the_column_the_run_took_them_from(tmp_path: Path) -> None:
    table = pa.table({"alt": [COPIED, CLEAN], "caption": ["x", "y"], "url": ["u", "v"], "key": ["k", "l"]})
    pq.write_table(table, tmp_path / "x.parquet")
    run = make_run(tmp_path, table["alt"].to_pylist(), scores=[2.0, 1.0], column="alt")
    add_confirm(run, ["global", "none"])
    done = drop(DropConfig(run.url, (str(tmp_path / "x.parquet"),)))
    assert done.files[0][2] == 1
    pq.write_table(table.drop_columns("alt").rename_columns(["TEXT", "url", "key"]), tmp_path / "y.parquet")
    assert drop(DropConfig(run.url, (str(tmp_path / "y.parquet"),))).files[0][2] == 0, "found as scan finds it"


def test_of_an_unfinished_run_it_exits_3(tmp_path: Path) -> None:
    run = make_run(tmp_path, [COPIED, CLEAN, "c"], scores=[2.0, 1.0, 0.0], rows_per_shard=1, shards=2)
    add_confirm(run, ["global"])
    pq.write_table(pa.table({"caption": [COPIED]}), tmp_path / "x.parquet")
    done = CliRunner().invoke(cli, ["drop", run.url, str(tmp_path / "x.parquet")])
    assert done.exit_code == 3 and "not finished: " in done.output and "1 of 1 rows would go" in done.output


def test_a_threshold_drops_unconfirmed_captions_too(work: Path) -> None:
    done = drop(DropConfig(str(work / "RUN"), (str(work / "table.parquet"),), threshold=3.5))
    assert done.captions == 3 and done.files[0][2] == 7


def test_what_it_cannot_do_is_one_line(work: Path) -> None:
    (work / "x.csv").write_text("TEXT\na sofa\n")
    with pytest.raises(AuditError, match=r"x\.csv: not parquet"):
        drop(DropConfig(str(work / "RUN"), (str(work / "x.csv"),)))
    with pytest.raises(AuditError, match="give the run and the caption tables"):
        drop(DropConfig(str(work / "RUN")))
    (work / "other").mkdir()
    make_run(work / "other", ["a", "b"], scores=[1.0, 2.0])
    with pytest.raises(AuditError, match=r"no verdicts yet: run `be-audit confirm"):
        drop(DropConfig(str(work / "other" / "RUN"), (str(work / "table.parquet"),)))


def test_a_table_that_was_not_scanned_is_read_by_the_run_s_column(tmp_path: Path) -> None:
    run = make_run(tmp_path, [COPIED, LOCAL, CLEAN], scores=[3.0, 2.0, 1.0])
    add_confirm(run, ["global", "local", "none"])
    facts = json.loads((tmp_path / "RUN/run.json").read_text())
    facts["config"]["caption_col"] = None  # found by its name
    (tmp_path / "RUN/run.json").write_text(json.dumps(facts))
    texts = [COPIED, CLEAN, LOCAL]
    pq.write_table(pa.table({"TEXT": ["raw alt"] * 3, "caption": texts}), tmp_path / "x.parquet")
    done = CliRunner().invoke(cli, ["drop", run.url, str(tmp_path / "x.parquet"), "-o", str(tmp_path / "y.parquet")])
    assert done.exit_code == 0 and "2 of 3 rows dropped" in done.output and "column 'caption'" in done.output
    assert pq.read_table(tmp_path / "y.parquet")["caption"].to_pylist() == [CLEAN]
    pq.write_table(pa.table({"TEXT": texts, "alt": ["raw alt"] * 3}), tmp_path / "z.parquet")
    done = CliRunner().invoke(cli, ["drop", run.url, str(tmp_path / "z.parquet")])
    assert done.exit_code == 0 and "2 of 3 rows would go; captions: column 'TEXT'" in done.output


def test_that_no_table_has_any_of_the_captions_is_said(work: Path) -> None:
    pq.write_table(pa.table({"TEXT": ["raw alt"], "caption": [COPIED]}), work / "x.parquet")
    flags = ["drop", str(work / "RUN"), "--caption-col", "TEXT"]
    done = CliRunner().invoke(cli, [*flags, str(work / "x.parquet")])
    assert done.exit_code == 0 and "none of the 2 captions to drop is in any table given" in done.output
    done = CliRunner().invoke(cli, [*flags, str(work / "x.parquet"), str(work / "table.parquet")])
    assert done.exit_code == 0 and "none of the" not in done.output


def test_rows_that_could_not_be_judged_are_said(tmp_path: Path) -> None:
    captions = [COPIED, CLEAN, "c", "failed", "failed"]
    run = make_run(tmp_path, captions, scores=[5.0, 4.0, 3.0, 2.0, 2.0], failed=[3])
    add_confirm(run, ["global", "no_reference", "none"])
    pq.write_table(pa.table({"caption": captions}), tmp_path / "x.parquet")
    done = CliRunner().invoke(cli, ["drop", run.url, str(tmp_path / "x.parquet"), "-o", str(tmp_path / "y.parquet")])
    assert done.exit_code == 3 and pq.read_table(tmp_path / "y.parquet").num_rows == 4
    assert "2 rows could not be scored" in done.output
    assert (
        "1 candidates could be compared with no training picture" in done.output
        and "have no verdict" not in done.output
    )


def test_candidates_without_a_verdict_and_a_null_made_without_pictures_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, [COPIED, CLEAN, "c"], scores=[3.0, 2.0, 1.0])
    add_confirm(
        run, ["global", "none"], null=Null.of(PICTURES, np.linspace(0.3, 0.9, 400), 0.01).without([4, 9], "gone")
    )
    pq.write_table(pa.table({"caption": [COPIED]}), tmp_path / "x.parquet")
    done = CliRunner().invoke(cli, ["drop", run.url, str(tmp_path / "x.parquet")])
    assert done.exit_code == 3 and "2 training pictures that the local threshold should rest on" in done.output
    undecided = make_run(tmp_path / "u", [COPIED, CLEAN, "c"], scores=[3.0, 2.0, 1.0])
    add_confirm(undecided, ["global", "none"], decided=False)
    done = CliRunner().invoke(cli, ["drop", undecided.url, str(tmp_path / "x.parquet"), "--threshold", "2.5"])
    assert done.exit_code == 3 and "2 candidates have no verdict" in done.output


def test_views_stay_views(work: Path) -> None:
    texts = [CLEAN, COPIED, None, LOCAL]
    values = [pa.array(texts, pa.string_view()), pa.array([b"a", b"b", b"c", None], pa.binary_view()), range(4)]
    table = pa.table(dict(zip(("TEXT", "bytes", "n"), values, strict=True)))
    pq.write_table(table, work / "x.parquet")
    drop(DropConfig(str(work / "RUN"), (str(work / "x.parquet"),), str(work / "y.parquet")))
    before, after = pq.read_table(work / "x.parquet"), pq.read_table(work / "y.parquet")
    assert before.schema.field("TEXT").type == pa.string_view() and after.schema.equals(before.schema)
    assert after.to_pylist() == [row for at, row in enumerate(before.to_pylist()) if at in (0, 2)]


def test_views_in_lists_are_refused_before_anything_is_written(work: Path) -> None:
    nested = pa.array([["a"], ["b"]], pa.list_(pa.string_view()))
    pq.write_table(pa.table({"TEXT": [CLEAN, COPIED], "tags": nested}), work / "x.parquet")
    tables = (str(work / "table.parquet"), str(work / "x.parquet"))
    with pytest.raises(AuditError, match=r"x\.parquet: column 'tags' is list<.*string_view>"):
        drop(DropConfig(str(work / "RUN"), tables, str(work / "out")))
    assert not (work / "out").exists()
    assert [dropped for *_, dropped, _ in drop(DropConfig(str(work / "RUN"), tables)).files] == [5, 1]
