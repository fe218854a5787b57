"""`be-audit drop`: the clean table is the old one less the rows that were found, and nothing else is changed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.cli.commands import cli
from audit.reports.drop import DropConfig, drop
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
