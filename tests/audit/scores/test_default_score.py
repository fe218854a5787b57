"""Which score picks where none is named: by how many captions the null maps are of, the same for every command."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.captions import SAMPLE
from audit.reports.sql import run_query
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.select import score_of_size
from audit.run.stage import REFINE, SECOND_LOOK, Stage
from audit.scores.cut import Cut, find_cut
from audit.scores.refine import RefineFingerprint
from audit.scores.second_look import SecondLookFingerprint, default_score
from audit.verdicts.candidates import ConfirmConfig, choose
from tests.command import be_audit
from tests.conftest import once, some_captions
from tests.fabricate import make_run

pytestmark = pytest.mark.slow  # scans of some hundred captions


def scanned(folder: Path, count: int, sd1: str, *flags: object) -> Run:
    """A run of so many distinct captions, each twice."""
    pq.write_table(pa.table({"caption": some_captions(count) * 2}), folder / "captions.parquet")
    scan = ("scan", folder / "captions.parquet", "-o", folder / "run", "--model", sd1, "--steps", 2, *flags)
    done = be_audit(*scan, "--store-masks", "none", "--device", "cpu")
    assert done.code == 0, done.err
    return Run.open(str(folder / "run"))


@pytest.fixture(scope="module")
def large(sd1: str, shared: Path) -> Run:
    flags = ("--second-look-noises", 2, "--refine", 0.01)
    return Run.open(once(shared / "large", lambda folder: scanned(folder, SAMPLE, sd1, *flags).url))


def best(run: Run, by: str, count: int, first: bool = False) -> list[int]:
    """row_ids of the best by a column, read and sorted here."""
    columns = ["row_id", "status", "duplicate_of", by]
    rows = [row for row in read_scores(run, columns, first_look=first).to_pylist() if row["duplicate_of"] is None]
    return [row["row_id"] for row in sorted(rows, key=lambda row: (-row[by], row["row_id"]))[:count]]


def test_it_takes_as_many_captions_as_null_maps_should_be_of(tmp_path: Path) -> None:
    texts = some_captions(SAMPLE)
    whole, fewer = make_run(tmp_path / "all", texts * 2), make_run(tmp_path / "fewer", [*texts[1:], *texts[1:], ""])
    assert score_of_size(whole) == default_score(whole) == "excess"
    assert score_of_size(fewer) == default_score(fewer) == "ld_energy"


def test_every_command_goes_by_the_same_score(large: Run, tmp_path: Path) -> None:
    run, by = large, "excess"
    assert best(run, "excess", 52) != best(run, "ld_energy", 52)  # or this test could not tell
    look, refined = Stage.open(run, SECOND_LOOK), Stage.open(run, REFINE)
    assert look.fingerprint(SecondLookFingerprint).by == refined.fingerprint(RefineFingerprint).by == by
    assert sorted(look.items["row_id"].to_pylist()) == sorted(best(run, by, 52, first=True))
    assert sorted(refined.items["row_id"].to_pylist()) == sorted(best(run, by, 6))
    assert run_query("flagged", run.url)["row_id"].to_pylist() == best(run, by, 100)
    asked, images = choose(run, ConfirmConfig(run.url, top_k=10))
    assert asked.by == by and images["row_id"].to_pylist() == best(run, by, 10)
    done = be_audit("report", run.url, "--format", "parquet", "--top-k", 30, "-o", tmp_path / "report")
    assert done.code == 0, done.err
    flagged = pq.read_table(tmp_path / "report/exports/flagged.parquet")
    assert flagged["row_id"].to_pylist() == best(run, by, 30) and set(flagged["score_name"].to_pylist()) == {by}
    at = sorted(
        read_scores(run, ["duplicate_of", by]).filter(pa.compute.field("duplicate_of").is_null())[by].to_pylist()
    )
    captions = Path(run.facts.config["captions"][0])
    dropped = be_audit("drop", run.url, captions, "--threshold", repr(at[-11]), "-o", tmp_path / "kept.parquet")
    assert dropped.code == 0 and f"by {by} go too" in dropped.out, dropped.err
    kept = pq.read_table(tmp_path / "kept.parquet")
    assert kept.num_rows == 2 * (run.facts.unique - 10)
    texts = {
        row["caption"]
        for row in read_scores(run, ["row_id", "caption"]).to_pylist()
        if row["row_id"] in best(run, by, 10)
    }
    assert not texts & set(kept["caption"].to_pylist())


def test_the_same_command_goes_on_with_the_run(large: Run, sd1: str) -> None:
    before = Stage.open(large, SECOND_LOOK).facts.digest
    flags = ("--steps", 2, "--store-masks", "none", "--device", "cpu", "--second-look-noises", 2, "--refine", 0.01)
    done = be_audit("scan", large.facts.config["captions"][0], "-o", large.url, "--model", sd1, *flags)
    assert done.code == 0 and Stage.open(large, SECOND_LOOK).facts.digest == before, done.err
    assert be_audit("verify", large.url).code == 0


def test_a_score_that_was_named_is_not_left_for_the_default(sd1: str, tmp_path: Path) -> None:
    looks = ("--second-look", 0.1, "--second-look-by", "magnitude")
    run = scanned(tmp_path, 20, sd1, *looks, "--refine", 0.1, "--refine-by", "ld")
    assert best(run, "magnitude", 20) != best(run, "ld_energy", 20)
    # the rows that have the means of more noises are those that are best by it
    assert default_score(run) == "magnitude" and find_cut(run, None, None, None).by == "magnitude"
    assert choose(run, ConfirmConfig(run.url, top_k=2))[0].by == "magnitude"
    assert run_query("flagged", run.url)["row_id"].to_pylist() == best(run, "magnitude", 20)
    assert Stage.open(run, SECOND_LOOK).fingerprint(SecondLookFingerprint).by == "magnitude"
    assert Stage.open(run, REFINE).fingerprint(RefineFingerprint).by == "ld"
    flags = ("--steps", 2, "--store-masks", "none", "--device", "cpu")
    again = ("scan", run.facts.config["captions"][0], "-o", run.url, "--model", sd1, *flags)
    said = be_audit(*again, "--second-look", 0.1)
    assert said.code == 2 and "magnitude -> ld_energy" in said.err
    said = be_audit(*again, *looks, "--refine", 0.1)
    assert said.code == 2 and "ld -> magnitude" in said.err


def test_a_file_of_thresholds_says_which_score_it_is_for(large: Run, sd1: str, tmp_path: Path) -> None:
    """`excess` has none that holds for another run, so the file's own score is taken and nobody has to know."""
    clean, file = tmp_path / "clean.csv", tmp_path / "thresholds.json"
    clean.write_text("\n".join(["caption", *(f"{text} again" for text in some_captions(SAMPLE))]))
    made = ("calibrate", clean, "--model", sd1, "--steps", 2, "--num-noises", 2, "-o", file, "--fpr")
    assert be_audit(*made, 0.5).code == 0
    # every row was looked at again, so that the file can be made again whatever a scan of that size goes by
    assert default_score(Run.open(f"{file}.run")) == "ld_energy"
    facts = json.loads(file.read_text())
    at = facts["thresholds"]["ld_energy"]["threshold"]
    assert facts["method"] == "ld_energy"
    assert find_cut(large, None, None, str(file)) == Cut("ld_energy", at, 2)
    assert find_cut(large, None, None, str(file), "excess") == Cut("ld_energy", at, 2)  # after a default confirm
    assert find_cut(large, None, None, str(file), "magnitude") == Cut("ld_energy", at, 2)  # as the same file in confirm
    by_magnitude = facts["thresholds"]["magnitude"]["threshold"]
    assert find_cut(large, "magnitude", None, str(file), "ld") == Cut("magnitude", by_magnitude, 2)
    assert be_audit(*made, 0.1, "--method", "magnitude").code == 0
    assert find_cut(large, None, None, str(file)).by == "magnitude"
    report = ("report", large.url, "--thresholds", file, "--format", "csv", "-o", tmp_path / "report")
    assert be_audit(*report).code in (0, 3)
    assert "score_name" in (tmp_path / "report/exports/flagged.csv").read_text()
    refused = be_audit(*report, "--by", "excess")
    assert refused.code == 2 and "excess is measured against a run's own captions" in refused.err


def test_a_threshold_alone_is_of_the_score_that_picked(large: Run) -> None:
    assert find_cut(large, None, 1.5, None) == Cut("excess", 1.5, None)
    assert find_cut(large, None, 1.5, None, "magnitude") == Cut("magnitude", 1.5, None)
    assert find_cut(large, "ld", 1.5, None, "magnitude") == Cut("ld", 1.5, None)
