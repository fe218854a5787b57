"""Training pictures that cannot be read any more decide nothing; they are compared once they are back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit import testbed
from audit.base.errors import AuditError
from audit.index import IndexConfig, build_index
from audit.mitigation.mitigate import MitigateConfig, mitigate
from audit.run.read import read_stage
from audit.run.run import Run
from audit.run.stage import CONFIRM, MATCH, Stage
from audit.scores.scan import ScanConfig, scan
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.confirm import confirm, read_null
from tests.command import be_audit
from tests.conftest import once

pytestmark = pytest.mark.sampling


@pytest.fixture(scope="module")
def scanned(shared: Path) -> Path:
    """A run of two captions whose pictures are copied and six others, and a folder of 68 pictures. Read it only."""
    return once(shared / "unreadable", _scanned)


def _scanned(folder: Path) -> Path:
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT")
    copied = (
        table[(table.copy_error < 0.15) & (table.label == "global")].sort_values("copy_error", kind="stable").head(2)
    )
    rows = [*copied.to_dict("records"), *table[table.cluster.str.startswith("unseen")].head(6).to_dict("records")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")
    captions = (str(folder / "captions.parquet"),)
    scan(ScanConfig(captions, str(folder / "run"), model="testbed", steps=5, rank=0, world_size=1))
    (folder / "pictures").mkdir()
    for row in pq.read_table(testbed.PICTURES).to_pylist():
        if row["TEXT"] in set(copied.TEXT) or row["key"].endswith("7"):
            (folder / "pictures" / f"{row['key']}.png").write_bytes(row["image"]["bytes"])
            (folder / "pictures" / f"{row['key']}.txt").write_text(row["TEXT"])
    return folder


@pytest.fixture
def config(scanned: Path, tmp_path: Path) -> ConfirmConfig:
    """A copy of it with an index of its own, and how to confirm the two captions."""
    for name in ("run", "pictures"):
        shutil.copytree(scanned / name, tmp_path / name)
    build_index(IndexConfig((str(tmp_path / "pictures"),), str(tmp_path / "index"), sscd="testbed"))
    return ConfirmConfig(str(tmp_path / "run"), index=str(tmp_path / "index"), top_k=2, match_fpr=0.05)


def copied_pictures(scanned: Path) -> list[str]:
    """Files of the pictures of the two copied captions."""
    captions = pq.read_table(scanned / "captions.parquet")["TEXT"].to_pylist()[:2]
    texts = (scanned / "pictures").glob("*.txt")
    return [text.with_suffix(".png").name for text in texts if text.read_text() in captions]


def verdicts(config: ConfirmConfig) -> list[tuple[str, float | None]]:
    return [(row["verdict"], row["p_value"]) for row in _rows(config)]


def test_a_picture_that_is_gone_decides_nothing_until_it_is_back(config: ConfirmConfig, tmp_path: Path) -> None:
    config = replace(config, ls_threshold=1e-6)
    # 1. the mount is dead
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    dead = confirm(config)
    assert dead.verdicts == {"global": 0, "local": 0, "none": 0, "no_reference": 2} and dead.exit_code == 3
    assert f"{dead.unreadable} comparisons" in dead.lines()[-1] and "decided nothing (no_reference)" in dead.lines()[-1]
    assert "No such file" in dead.lines()[-1] and "give the command again when they are back" in dead.lines()[-1]
    assert all(
        match["verdict"] == "no_reference" and "No such file" in match["unreadable"]
        for match in _rows(config)[0]["matches"]
    )
    # 2. as long as it is, nothing is done again
    assert confirm(config).committed_now == 0
    # 3. it is back
    (tmp_path / "elsewhere").rename(tmp_path / "pictures")
    back = confirm(config)
    assert back.verdicts["global"] == 2 and back.unreadable == 0 and back.exit_code == 0
    assert "2 of 2 candidates have their own picture in the index" in back.lines()[-1]
    assert confirm(config).committed_now == 0


@pytest.mark.parametrize("null", [{}, {"null_captions": 6, "match_fpr": 0.2}])
def test_without_pictures_there_is_no_threshold_until_they_are_back(
    null: dict[str, float], config: ConfirmConfig, scanned: Path, tmp_path: Path
) -> None:
    config = replace(config, **null)  # type: ignore[arg-type]
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    dead = confirm(config)
    assert dead.verdicts["no_reference"] == 2 and dead.exit_code == 3
    assert f"{len(dead.null.missing)} training pictures of the null cannot be read, and there is no local thr" in str(
        dead.lines()
    )
    assert f"{dead.unreadable} comparisons" in dead.lines()[-1] and "No such file" in dead.lines()[-1]
    assert confirm(config).committed_now == 0
    with pytest.raises(AuditError, match=r"has no local threshold yet.*give `be-audit confirm"):
        mitigate(MitigateConfig(run=config.run))
    found = be_audit("report", config.run, "--format", "csv")
    assert found.code == 0 and (Path(config.run) / "report/statement.md").is_file()  # of a null without members
    (tmp_path / "elsewhere").rename(tmp_path / "pictures")
    back = confirm(config)
    assert back.verdicts["global"] == 2 and back.exit_code == 0 and not back.null.missing
    assert "local threshold was made again, none -> " in str(back.lines())
    assert confirm(config).committed_now == 0
    found = verdicts(config)
    shutil.rmtree(config.run)
    shutil.copytree(scanned / "run", config.run)
    assert (confirm(config).verdicts, verdicts(config)) == (back.verdicts, found)  # as if nothing had been missing


def test_a_threshold_made_without_some_pictures_is_made_again_for_every_verdict(
    config: ConfirmConfig, scanned: Path, tmp_path: Path
) -> None:
    """With what is left a null can be made; it is not that of the whole, and no verdict keeps the old one."""
    config = replace(config, neighbours=4)
    assert confirm(config).exit_code == 0
    whole, expected = read_null(Run.open(config.run)), verdicts(config)
    compared = {Path(match["reference_key"]).stem for row in _rows(config) for match in row["matches"]}
    away = [file for file in sorted((tmp_path / "pictures").glob("*7.png")) if file.stem not in compared][:4]
    (tmp_path / "away").mkdir()
    for file in away:
        file.rename(tmp_path / "away" / file.name)
    shutil.rmtree(config.run)
    shutil.copytree(scanned / "run", config.run)
    some = confirm(config)
    assert whole is not None and 19 <= len(some.null) < len(whole.statistics) and len(some.null.missing) == len(away)
    assert some.unreadable == 0 and some.verdicts["no_reference"] == 0
    assert some.exit_code == 3 and "the local threshold was made without them" in str(some.lines())
    assert confirm(config).committed_now == 0  # nothing is back
    for file in away:
        (tmp_path / "away" / file.name).rename(file)
    back = confirm(config)
    assert f"was made again, {some.null.threshold:.4g} -> {whole.threshold:.4g}, and every" in str(back.lines())
    assert read_null(Run.open(config.run)) == whole and verdicts(config) == expected and back.exit_code == 0
    assert confirm(config).committed_now == 0


def _rows(config: ConfirmConfig) -> list[dict[str, Any]]:
    return read_stage(Run.open(config.run), "confirm").to_pylist()  # type: ignore[union-attr]


def test_another_picture_in_its_place_is_not_compared(config: ConfirmConfig, scanned: Path, tmp_path: Path) -> None:
    config = replace(config, ls_threshold=1e-6)
    other = next((tmp_path / "pictures").glob("*7.png"))
    for name in copied_pictures(scanned):
        shutil.copyfile(other, tmp_path / "pictures" / name)
    done = confirm(config)
    assert done.verdicts["global"] == 0 and done.exit_code == 3
    assert "another picture lies there than when the index was made" in done.lines()[-1]


def test_what_came_into_the_index_is_not_missed(config: ConfirmConfig, scanned: Path, tmp_path: Path) -> None:
    config = replace(config, ls_threshold=1e-6)
    built = IndexConfig((str(tmp_path / "pictures"),), str(tmp_path / "index"), sscd="testbed")
    copied = {name: (tmp_path / "pictures" / name).read_bytes() for name in copied_pictures(scanned)}
    for name, data in copied.items():
        (tmp_path / "pictures" / name).write_bytes(b"\0" * len(data))  # a mount that gives nothing
    assert build_index(built).errors == len(copied)
    assert confirm(config).verdicts["global"] == 0
    for name, data in copied.items():
        (tmp_path / "pictures" / name).write_bytes(data)
    done = build_index(built)
    assert (done.errors, done.again) == (0, 1)
    with pytest.raises(AuditError, match=r"match was begun differently(.|\n)*index"):
        confirm(config)
    again = confirm(replace(config, replace=True))
    assert again.verdicts["global"] == 2 and again.committed_now  # of the images that are there


def test_an_index_that_moved_is_used_where_it_lies(config: ConfirmConfig, tmp_path: Path) -> None:
    config = replace(config, ls_threshold=1e-6)
    confirm(config)
    expected, stage = verdicts(config), Stage.open(Run.open(config.run), MATCH)
    (tmp_path / "index").rename(tmp_path / "moved")
    (tmp_path / "few").mkdir()
    shutil.copyfile(next((tmp_path / "pictures").glob("*7.png")), tmp_path / "few" / "x.png")
    build_index(IndexConfig((str(tmp_path / "few"),), str(tmp_path / "index"), sscd="testbed"))  # another in its place
    for shard in stage.shards:
        stage.ledger.drop(shard)
        Stage.open(Run.open(config.run), CONFIRM).ledger.drop(shard)
    with pytest.raises(AuditError, match=r"begun differently"):
        confirm(config)
    assert confirm(replace(config, index=str(tmp_path / "moved"))).exit_code == 0
    assert verdicts(config) == expected
    for place in (MATCH, CONFIRM):  # a worker opens it there
        assert Stage.open(Run.open(config.run), place).config(ConfirmConfig).index == str(tmp_path / "moved")
