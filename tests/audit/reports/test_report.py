"""What a report holds: which rows, in which groups, what is said about an unfinished run."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from audit.base.errors import AuditError
from audit.base.identity import source_columns
from audit.cli.commands import cli
from audit.reports.facts import report_facts
from audit.reports.flagged import Flagged, find_flagged
from audit.reports.groups import group_captions
from audit.reports.html import render
from audit.reports.pictures import mask_url
from audit.reports.report import ReportConfig, report
from audit.run.run import Run
from audit.run.stage import SCAN, Stage
from tests.fabricate import add_confirm, make_run

CAPTIONS = [f"caption number {word}" for word in ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")]


def test_templates_are_one_finding_and_unrelated_captions_are_not() -> None:
    floors = [f"Shaw Floors {name} Collection {n} 00{n}01 Oak" for n, name in enumerate(("Couture", "Design", "Value"))]
    suffixed = ["Red Barn Wall Art Print", "Misty Lake, Wall Art Print", "Old Town - wall art PRINT"]
    alone = ["The red bicycle", "A photo of the red bicycle at night", "a picture of a dog", "a picture of a boat"]
    groups = group_captions([*floors, *suffixed, *alone])
    assert groups.of == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5]
    assert groups.labels[:2] == ["Shaw Floors …", "… Wall Art Print"]
    bare = group_captions(["Shaw Floors", *floors, "Wall Art Print", *suffixed])  # the shared words and nothing else
    assert bare.of == [0, 0, 0, 0, 1, 1, 1, 1]
    assert bare.labels[0] == "Shaw Floors …"


def test_captions_equal_up_to_case_numbers_and_order_are_near_equal() -> None:
    groups = group_captions(["Plate 12 Blue", "plate, 7: BLUE", "blue plate 99", "Plate blue", None, ""])
    assert groups.of == [0, 0, 0, 1, 2, 2]
    assert groups.labels[0] == "Plate # Blue"


@pytest.mark.slow
def test_grouping_fifty_thousand_captions_takes_seconds() -> None:
    captions = [
        f"Brand {n % 900} Model {n} in colour {n % 13} with word{n % 7} and tail{n % 11}" for n in range(50_000)
    ]
    started = time.perf_counter()
    groups = group_captions(captions)
    assert time.perf_counter() - started < 20  # 1 s on two cores
    assert len(groups.of) == 50_000
    assert len(group_captions(["x" * 1_000_000] * 3).labels) == 1  # a long caption costs no more


def test_flagged_rows_are_the_candidates_and_what_is_above_the_threshold(tmp_path: Path) -> None:
    run = make_run(tmp_path, [*CAPTIONS, "caption number ant"], scores=[8, 7, 6, 5, 4, 3, 2, 1, 8], failed=[1])
    add_confirm(run, ["none", "global", "local"])  # ant, cat, dog: bee failed
    table = find_flagged(run, "ld_energy", 3.5, None).table
    shown = list(zip(table["caption"].to_pylist(), table["verdict"].to_pylist(), strict=True))
    words = [(caption.split()[-1], verdict) for caption, verdict in shown]
    assert words == [("cat", "global"), ("dog", "local"), ("ant", "none"), ("eel", None)]
    assert table["occurrences"].to_pylist() == [1, 1, 2, 1]
    assert table["score"].to_pylist() == [6, 5, 8, 4]
    assert table["input_row"].to_pylist() == [2, 3, 0, 4]
    assert table["source_key"].to_pylist() == ["k0000002", "k0000003", "k0000000", "k0000004"]
    assert find_flagged(run, "ld_energy", None, 1).table["caption"].to_pylist()[-1] == "caption number ant"
    above = find_flagged(run, "ld_energy", 0.5, 2)
    assert (above.above, above.taken, above.counts["error"]) == (7, 2, 1)


def test_another_score_ranks_by_itself_and_one_without_values_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS, scores=list(range(8)))
    table = find_flagged(run, "magnitude", None, 8).table
    assert table["score"].to_pylist() == sorted(table["magnitude"].to_pylist(), reverse=True)
    with pytest.raises(AuditError, match="no scores in this column"):
        find_flagged(run, "anisotropy", None, None)


def test_an_unfinished_run_is_reported_and_says_so_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS, rows_per_shard=2, shards=3)
    Stage.open(run, SCAN).ledger.record_attempt(3, "OSError: disk on fire")
    Stage.open(run, SCAN).ledger.record_attempt(3, "OSError: disk on fire")
    Stage.open(run, SCAN).ledger.record_attempt(3, "OSError: disk on fire")
    done = report(ReportConfig(run=run.url, top_k=10))
    assert done.unfinished == [
        "scan: 6 of 8 rows (3 of 4 shards) are done",
        "scan: shard 3 was given up: OSError: disk on fire",
    ]
    page = (tmp_path / "RUN" / "report" / "index.html").read_text()
    assert page.index("This audit is not finished") < page.index("Captions scored")
    assert "3 of 4 shards" in page and done.listed == 6


def test_a_confirm_in_progress_shows_its_pictures_without_verdicts(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS)
    add_confirm(run, ["global", "none"], decided=False)
    done = report(ReportConfig(run=run.url))
    assert done.unfinished == ["confirm: 0 of 2 rows (0 of 1 shards) are done"]
    assert sum(done.verdicts.values()) == 0
    assert len(list((tmp_path / "RUN/report/pictures").iterdir())) == 2


def test_a_finished_run_does_not_say_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS)
    done = report(ReportConfig(run=run.url))
    assert done.unfinished == []
    assert "not finished" not in (tmp_path / "RUN/report/index.html").read_text()


def test_facts_count_what_was_scored_found_and_spent(tmp_path: Path) -> None:
    run = make_run(tmp_path, [*CAPTIONS, CAPTIONS[0], ""], scores=[*range(8), 0, 0], rows_per_shard=4)
    add_confirm(run, ["global", "local", "none"], num_images=2)
    report(ReportConfig(run=run.url, threshold=5))
    facts = json.loads((tmp_path / "RUN/report/report.json").read_text())
    assert facts["verdicts"] == {"global": 1, "local": 1, "none": 1, "no_reference": 0}
    assert (facts["copied"], facts["above"], facts["listed"]) == (2, 2, 3)
    assert facts["scanned"]["duplicates"] == 1
    assert facts["cost"]["seconds"] == {"scan": 6.0, "trajectories": 3.0, "confirm": 1.0}
    assert facts["cost"]["evaluations"] == 11 + 2 * 50 * 6  # 10 captions and one unconditional; 6 trajectories
    assert sum(facts["histogram"]["all"]) == facts["scanned"]["distinct"]
    assert sum(facts["histogram"]["copied"]) == 2
    assert facts["decided"] == 3

    made = replace(run.fingerprint, extra_evaluation=True)
    run = Run(run.folder, replace(run.facts, fingerprint=made))
    assert report_facts(run, find_flagged(run, "ld_energy", 5, None))["cost"]["evaluations"] == 2 * 11 + 2 * 50 * 6


def test_a_report_on_another_file_system_from_a_run_on_another(tmp_path: Path) -> None:
    made = make_run(tmp_path, CAPTIONS)
    add_confirm(made, ["global"])
    memory = fsspec.filesystem("memory")
    memory.put(made.url, "/far/RUN", recursive=True)
    done = report(ReportConfig(run="memory://far/RUN", output="memory://far/report"))
    assert done.verdicts["global"] == 1
    there = {name.rsplit("/", 1)[-1] for name in memory.find("/far/report")}
    assert {"index.html", "data.js", "report.js", "report.css", "flagged.parquet", "denylist.csv"} <= there


def test_a_second_report_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS)
    add_confirm(run, ["global", "none"])
    report(ReportConfig(run=run.url))
    assert (tmp_path / "RUN/report/rows").exists()
    report(ReportConfig(run=run.url, format=("csv",)))
    names = sorted(path.name for path in (tmp_path / "RUN/report").iterdir())
    assert names == ["exports", "report.json", "statement.md", "summary.json"]
    assert sorted(path.name for path in (tmp_path / "RUN/report/exports").iterdir()) == [
        "README.md",
        "denylist.csv",
        "flagged.csv",
    ]


def test_mistakes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS)
    mine = tmp_path / "documents"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not touch")
    with pytest.raises(AuditError, match=r"thesis\.txt"):
        report(ReportConfig(run=run.url, output=str(mine)))
    with pytest.raises(AuditError, match="not a report"):
        report(ReportConfig(run=run.url, output=run.url))
    with pytest.raises(AuditError, match="--format pdf"):
        report(ReportConfig(run=run.url, format=("pdf",)))
    with pytest.raises(AuditError, match="no run here"):
        report(ReportConfig(run=str(tmp_path / "nothing")))
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "RUN/report").exists()
    empty = make_run(tmp_path / "empty", CAPTIONS, shards=0)
    with pytest.raises(AuditError, match="no shard is done yet"):
        report(ReportConfig(run=empty.url))


@pytest.mark.parametrize("told", ['{"my":"report"}', "", '{"made":', "[]", '["digest"]', "[" * 100_000, "\ud800"])
def test_a_folder_with_a_report_json_of_someone_else_is_left_as_it_is(tmp_path: Path, told: str) -> None:
    run = make_run(tmp_path, CAPTIONS)
    mine = tmp_path / "mine"
    for name in ("pictures/holiday.jpg", "exports/a.csv", "rows/1", "index.html"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("do not touch")
    (mine / "report.json").write_bytes(told.encode("utf-8", "surrogatepass"))
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    with pytest.raises(AuditError, match=r"not a report \(it has a report\.json of something else\)"):
        report(ReportConfig(run=run.url, output=str(mine)))
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    assert CliRunner().invoke(cli, ["report", run.url, "-o", str(mine)]).exit_code == 2


def test_a_report_that_was_killed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, CAPTIONS)
    asked = ReportConfig(run=run.url, output=str(tmp_path / "out"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("audit.reports.report.write_statement", killed)
        report(asked)
    assert not (tmp_path / "out/index.html").exists()
    report(asked)
    assert (tmp_path / "out/index.html").exists()


def test_an_earlier_report_stays_where_the_next_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, CAPTIONS)
    report(ReportConfig(run=run.url))
    before = {path: path.read_bytes() for path in (tmp_path / "RUN/report").rglob("*") if path.is_file()}

    def broken(*_: object) -> bytes:
        raise OverflowError("date value out of range")

    monkeypatch.setattr("audit.reports.export.table_as", broken)
    with pytest.raises(OverflowError):
        report(ReportConfig(run=run.url))
    assert {path: path.read_bytes() for path in (tmp_path / "RUN/report").rglob("*") if path.is_file()} == before


def test_kept_dates_beyond_python_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, CAPTIONS)

    def dated(*given: Any, **named: Any) -> Flagged:
        found = find_flagged(*given, **named)
        dates = pa.array([2**60] * found.table.num_rows, pa.int64()).view(pa.timestamp("us"))
        return replace(found, table=found.table.append_column("taken", dates))

    monkeypatch.setattr("audit.reports.report.find_flagged", dated)
    report(ReportConfig(run=run.url, top_k=2))
    lines = (tmp_path / "RUN/report/exports/flagged.jsonl").read_text().splitlines()
    assert [json.loads(line)["taken"] for line in lines] == ["38504-08-17 21:30:06.846976"] * 2


def test_pictures_of_training_size_become_small_files(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS)
    add_confirm(run, ["none"], side=512)  # the training picture is noise: what no format can make small
    report(ReportConfig(run=run.url))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "RUN/report/pictures").iterdir()}
    assert len(sizes) == 2 and all(name.endswith(".webp") for name in sizes)
    assert min(sizes.values()) < 20_000 and max(sizes.values()) < 400_000


def test_a_mask_is_opaque_where_it_is_highest_and_a_region_alone_is_coloured() -> None:
    import base64
    import io

    from PIL import Image

    def drawn(mask: np.ndarray, region: bool) -> list[list[int]]:
        picture = Image.open(io.BytesIO(base64.b64decode(mask_url(mask, region).split(",")[1])))
        return np.asarray(picture)[..., 3].tolist()

    assert drawn(np.array([[0.1, 0.2], [0.3, 0.5]], np.float32), False) == [[0, 64], [128, 255]]
    mask = np.array([[0.0, 0.2], [0.6, 0.8]])  # mean 0.4, edge of the region 0.3
    assert drawn(mask, True) == [[0, 0], [204, 255]]  # 255 (0.5 + 0.5 * 0.3 / 0.5)
    for region in (False, True):  # a mask that says nothing hides nothing
        assert drawn(np.ones((2, 2)), region) == [[0, 0], [0, 0]]


def test_names_from_the_run_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, CAPTIONS)
    report(ReportConfig(run=run.url))
    facts = json.loads((tmp_path / "RUN/report/report.json").read_text())
    facts["model"]["name"] = facts["unfinished"] = ["<script>alert(1)</script>"]
    facts["model"]["name"] = '<img src=x onerror=alert(1)>"'
    page = render(facts, ['exports/"><script>x</script>'])
    assert "<script>alert" not in page and "<img src=x" not in page and '"><script>' not in page
    assert "script-src 'self'" in page and "unsafe-inline" not in page


def test_source_columns_are_found_by_name_in_any_case() -> None:
    assert source_columns(["KEY", "URL", "hash"]) == ("URL", "KEY")
    assert source_columns(["image_url", "id"]) == ("image_url", "id")
    assert source_columns(["width"]) == (None, None)


@pytest.mark.processes
def test_report_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    run = make_run(tmp_path, CAPTIONS)
    code = (
        "import sys; from audit.reports.report import ReportConfig, report; from audit.reports.sql import run_query; "
        f"report(ReportConfig(run={run.url!r})); run_query('flagged', {run.url!r}); "
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_rows_beyond_what_javascript_counts_keep_their_ids(tmp_path: Path) -> None:
    from audit.reports.html import page_data

    run = make_run(tmp_path, CAPTIONS)
    table = find_flagged(Run.open(run.url), "ld_energy", None, 8).table
    far = (1 << 61) + 1
    table = table.set_column(0, table.schema.field("row_id"), pa.array([far] * table.num_rows, pa.int64()))
    assert page_data(table, {})["ids"][0] == str(far)
