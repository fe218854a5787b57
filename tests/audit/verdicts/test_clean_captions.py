"""Which captions of a `--clean` table the null is made of: those in the run's column, read as the run's were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from audit.run.run import Run
from audit.scores.scan import scan
from audit.verdicts.candidates import ConfirmConfig, choose
from tests.audit.verdicts.conftest import config_at

pytestmark = pytest.mark.sampling
CLEAN = [f"clean {row}" for row in range(4)]


def clean_of(run: Path, file: Path) -> list[str]:
    """The clean captions a confirm of the run would take."""
    config = ConfirmConfig(run=str(run), top_k=1, clean=str(file), match_fpr=0.4)
    images = choose(Run.open(str(run)), config)[1]
    return images.filter(pc.field("clean"))["caption"].to_pylist()


def scanned(tmp_path: Path, captions: Path, **flags: object) -> Path:
    config = config_at(tmp_path, captions=(str(captions),), output=str(tmp_path / "run"), second_look=0.0)
    scan(replace(config, **flags))  # type: ignore[arg-type]
    return tmp_path / "run"


def test_the_column_of_the_run_is_taken_where_the_table_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"caption": ["short"], "long": ["a long one"]}), tmp_path / "captions.parquet")
    run = scanned(tmp_path, tmp_path / "captions.parquet", caption_col="long")
    table = {"caption": ["short"] * 4, "long": CLEAN, "TEXT": [*CLEAN[:3], "x"]}
    pq.write_table(pa.table(table), tmp_path / "both.parquet")
    capsys.readouterr()
    assert clean_of(run, tmp_path / "both.parquet") == CLEAN
    assert capsys.readouterr().err == f"--clean {tmp_path}/both.parquet: captions from long\n"
    for name, long in (("without", None), ("blank", [""] * 4), ("numbers", [1] * 4)):
        other = {"caption": CLEAN} | ({"long": long} if long else {})
        pq.write_table(pa.table(other), tmp_path / f"{name}.parquet")
        assert clean_of(run, tmp_path / f"{name}.parquet") == CLEAN
        assert capsys.readouterr().err == f"--clean {tmp_path}/{name}.parquet: captions from caption\n"


def test_the_column_a_run_found_by_itself_is_taken_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a sofa"]}), tmp_path / "captions.parquet")
    run = scanned(tmp_path, tmp_path / "captions.parquet")
    pq.write_table(pa.table({"TEXT": ["alt text"] * 4, "caption": CLEAN}), tmp_path / "clean.parquet")
    assert clean_of(run, tmp_path / "clean.parquet") == CLEAN


def test_a_text_file_is_read_as_the_run_s_or_as_what_it_says_itself(tmp_path: Path) -> None:
    texts = [f"é {text}" for text in CLEAN]
    (tmp_path / "dump.tsv").write_bytes("a sofa, é\thttp://a/1\n".encode("latin-1"))
    run = scanned(tmp_path, tmp_path / "dump.tsv", no_header=True, encoding="latin-1")
    dump = "".join(f"{text}\thttp://a/{row}\n" for row, text in enumerate(texts))
    header = "caption\turl\n"
    for number, content in enumerate(
        (dump.encode("latin-1"), dump.encode(), (header + dump).encode(), (header + dump).encode("latin-1"))
    ):
        (tmp_path / f"{number}.tsv").write_bytes(content)
        assert clean_of(run, tmp_path / f"{number}.tsv") == texts, number
    pq.write_table(pa.table({"TEXT": CLEAN}), tmp_path / "clean.parquet")
    assert clean_of(run, tmp_path / "clean.parquet") == CLEAN
