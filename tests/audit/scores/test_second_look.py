"""`--second-look`: the best rows have the scores of more noises, for every reader; errors, damage, thresholds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from audit.engines.job import Took
from audit.reports.sql import connect
from audit.run.read import read_rows, read_scores
from audit.run.run import Run
from audit.run.schema import DETECTORS
from audit.run.select import best_rows, best_scores
from audit.run.stage import REFINE, SECOND_LOOK, Stage
from audit.scores.calibrate import load_thresholds
from audit.scores.model import load_run_model
from audit.scores.scan import ScanConfig, scan
from audit.scores.second_look import SecondLookJob, means
from tests.audit.conftest import Watched
from tests.command import be_audit

LOOKED = 40  # 0.8 of 50 distinct captions

pytestmark = pytest.mark.slow  # whole scans, a dozen


@pytest.fixture(scope="module")
def config(captions_file: Path, sd1: str, tmp_path_factory: pytest.TempPathFactory) -> ScanConfig:
    """A scan with a second look of four noises, done."""
    output = tmp_path_factory.mktemp("look") / "run"
    made = ScanConfig((str(captions_file),), str(output), sd1, second_look=0.8, rows_per_shard=20, store_masks="none")
    done = scan(made)
    assert (done.looked, done.look_failed, done.exit_code) == (LOOKED, 0, 0)
    return made


def command(config: ScanConfig, output: object, *flags: object) -> tuple[object, ...]:
    shared = ("--rows-per-shard", 20, "--store-masks", "none")
    return ("scan", *config.captions, "-o", output, "--model", config.model, *shared, *flags)


def test_the_best_have_the_scores_of_four_noises_and_the_others_of_one(config: ScanConfig, tmp_path: Path) -> None:
    once = replace(config, output=str(tmp_path / "once"), second_look=0.0)
    four = replace(once, output=str(tmp_path / "four"), num_noises=4)
    scan(once)
    scan(four)
    found, one, all_four = (read_scores(Run.open(each.output)).to_pylist() for each in (config, once, four))
    first = [row for row in one if row["status"] == "ok" and row["duplicate_of"] is None]
    best = {row["row_id"] for row in sorted(first, key=lambda row: -row["ld_energy"])[:LOOKED]}
    duplicates = 0
    for row, before, expected in zip(found, one, all_four, strict=True):
        if row["status"] != "ok":
            assert row["num_noises"] is None
            continue
        looked = (row["row_id"] if row["duplicate_of"] is None else row["duplicate_of"]) in best
        duplicates += looked and row["duplicate_of"] is not None
        assert row["num_noises"] == (4 if looked else 1)
        for name in (*DETECTORS, "ld_std"):
            value = (expected if looked else before)[name]
            assert row[name] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)), name
    assert duplicates  # one of the best occurs again, and says the same


def test_sql_and_python_say_the_same(config: ScanConfig) -> None:
    same_in_sql(Run.open(config.output))


def same_in_sql(run: Run) -> None:
    table = read_scores(run)
    names = [name for name in table.schema.names if name != "caption"]
    listed = ", ".join(f'"{name}"' for name in names)
    with connect(run) as connection:
        asked = connection.sql(f"SELECT {listed} FROM scores ORDER BY row_id").to_arrow_table()
    for name in names:
        assert asked[name].to_pylist() == table[name].to_pylist(), name


def test_going_on_chooses_the_same_rows_and_damage_is_repaired(config: ScanConfig) -> None:
    run = Run.open(config.output)
    before = read_scores(run)
    stage = Stage.open(run, SECOND_LOOK)
    shard = stage.shards[-1]
    path = Path(config.output, stage.file(shard))
    path.write_bytes(path.read_bytes()[:-1])
    found = be_audit("verify", config.output)
    assert found.code == 3 and stage.file(shard) in found.err + found.out
    assert scan(config).exit_code == 0
    again = Stage.open(run, SECOND_LOOK)
    assert again.facts.digest == stage.facts.digest and again.items.equals(stage.items)
    assert read_scores(run).equals(before)
    assert be_audit("verify", config.output, "--deep").code == 0


def test_another_second_look_is_refused_and_replaced_when_asked(config: ScanConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert be_audit(*command(config, output, "--second-look", 0.1)).code == 0
    maps = (output / "stages/second_null_maps.json").read_bytes()
    for flags in (("--second-look", 0.2), ("--second-look", 0.1, "--second-look-noises", 3)):
        refused = be_audit(*command(config, output, *flags))
        assert refused.code == 2 and "second_look was begun differently; nothing was touched" in refused.err
        assert (output / "stages/second_null_maps.json").read_bytes() == maps
    done = be_audit(*command(config, output, "--second-look", 0.2, "--second-look-noises", 3, "--replace"))
    assert done.code == 0 and "10 best-scored rows looked at again, with 3 noises (--second-look 0.2)." in done.out
    assert sorted(set(read_scores(Run.open(str(output)))["num_noises"].drop_null().to_pylist())) == [1, 3]


def test_a_row_that_fails_keeps_its_first_scores_and_is_said(
    six: Path, sd1: str, tmp_path: Path, watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    arguments = ("scan", six, "-o", output, "--model", sd1, "--second-look")
    assert be_audit(*arguments, 0).code == 0
    monkeypatch.setattr(watched, "poison", (7,))
    for _ in range(2):
        done = be_audit(*arguments, 1)
        assert done.code == 3 and "1 rows failed at the second look and keep their first scores" in done.err
    rows = read_scores(Run.open(str(output))).to_pylist()
    assert [row["num_noises"] for row in rows] == [4, 4, 1, 4, 1, 4]
    assert all(row["status"] == "ok" and row["ld_energy"] > 0 for row in rows)


def test_a_score_that_is_younger_than_the_stage_is_null(config: ScanConfig, tmp_path: Path) -> None:
    shutil.copytree(config.output, tmp_path / "run")
    run = Run.open(str(tmp_path / "run"))
    stage = Stage.open(run, SECOND_LOOK)
    shard, job = stage.shards[0], SecondLookJob(stage, load_run_model(run, "cpu"), 32, 0.0)
    before = stage.table(shard)
    stage.ledger.drop(shard)
    items = job.read(shard).drop_columns(["excess_pca"])
    job.write(shard, job.compute(shard, items, lambda _: None), Took("score"))
    after = stage.table(shard)
    assert after["excess_pca"].null_count == after.num_rows > before["excess_pca"].null_count
    assert after.schema == before.schema and after["row_id"].equals(before["row_id"])
    np.testing.assert_allclose(after["excess"].to_numpy(), before["excess"].to_numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, -1])
def test_files_of_before_a_score_are_read_beside_others(config: ScanConfig, tmp_path: Path, place: int) -> None:
    """A stage gone on with by a newer version: what an older one wrote has nulls, and nothing of fewer noises."""
    shutil.copytree(config.output, tmp_path / "run")
    run = Run.open(str(tmp_path / "run"))
    stage = Stage.open(run, SECOND_LOOK)
    shard = stage.shards[place]
    old = stage.table(shard).drop_columns(["excess_pca"])
    stage.ledger.drop(shard)
    stage.ledger.commit(shard, old, {"ok": old.num_rows}, {"wall": 1.0})
    seen = set()
    for row in read_scores(run).to_pylist():
        if row["num_noises"] == 4:
            first = row["row_id"] if row["duplicate_of"] is None else row["duplicate_of"]
            seen.add(first in old["row_id"].to_pylist())
            assert (row["excess_pca"] is None) == (first in old["row_id"].to_pylist()) and row["excess"] is not None
    assert seen == {True, False}
    same_in_sql(run)
    done = be_audit("report", run.url, "--format", "csv", "-o", tmp_path / "report")
    assert done.code == 0, done.err


def test_evaluations(config: ScanConfig, tmp_path: Path, watched: type[Watched]) -> None:
    """Null maps of a noise take the 50 captions (512 at most) and the empty one, and so does the scan."""
    scan(replace(config, output=str(tmp_path / "run"), rows_per_shard=100))
    assert watched.latents == 2 * 51 + 3 * 51 + 3 * (LOOKED + 1)
    planned = be_audit(*command(config, tmp_path / "dry", "--second-look", 0.8, "--dry-run"))
    assert f"evaluations      {50 + 3 * LOOKED + 4 * 50}" in planned.out and "3 more for the best 0.8" in planned.out
    assert not (tmp_path / "dry").exists()


def test_the_machine_that_ends_last_makes_it(config: ScanConfig, tmp_path: Path) -> None:
    other = replace(config, output=str(tmp_path / "run"), world_size=3)
    assert [scan(replace(other, rank=rank)).looked for rank in (2, 0, 1)] == [0, 0, LOOKED]
    one, found = (read_scores(Run.open(each.output)) for each in (config, other))
    np.testing.assert_allclose(found["ld_energy"].to_numpy(), one["ld_energy"].to_numpy(), rtol=1e-4)


def test_means_and_deviation_by_hand() -> None:
    """1 at the first noise; 3, 5 and 7 at three others: mean 4, variance (9 + 1 + 1 + 9) / 4."""
    firsts = {"ld": np.array([1.0]), "ld_std": np.array([0.0]), "webster": np.array([2.0])}
    seconds = {"ld": np.array([5.0], np.float32), "ld_std": np.array([np.sqrt(8 / 3)], np.float32)}
    found = means(firsts, seconds, 1, 4)
    assert found["ld"] == pytest.approx([4.0]) and found["ld_std"] == pytest.approx([np.sqrt(5)])
    assert np.isnan(found["webster"]).all()  # nothing is made up where the other noises have none


def test_a_threshold_holds_for_rows_over_as_many_noises_alone(config: ScanConfig, tmp_path: Path) -> None:
    clean, one, both = tmp_path / "clean.parquet", tmp_path / "one.json", tmp_path / "both.json"
    pq.write_table(pq.read_table(config.captions[0]).slice(0, 40), clean)
    calibrate = ("calibrate", clean, "--model", config.model, "--fpr", 0.6, "-o")
    assert be_audit(*calibrate, both).code == 0  # four noises, as a second look has, and one
    assert be_audit(*calibrate, one, "--num-noises", 1).code == 0
    report = ("report", config.output, "--format", "parquet", "-o", tmp_path / "report", "--thresholds")
    refused = be_audit(*report, one)
    assert refused.code == 2 and "num_noises: 1 -> 4" in refused.err and "and --num-noises 4." in refused.err
    refused = be_audit(*report, both, "--by", "excess")
    assert refused.code == 2 and "excess is measured against a run's own captions" in refused.err
    assert be_audit(*report, both).code == 0
    flagged = pq.read_table(tmp_path / "report/exports/flagged.parquet")
    assert 0 < flagged.num_rows <= LOOKED and set(flagged["num_noises"].to_pylist()) == {4}
    page, said = (
        (tmp_path / "report/statement.md").read_text(),
        "1 initial noise, the best-scored 0.8 of the captions 4",
    )
    assert said in page
    refused = be_audit(*calibrate, both, "--num-noises", 3)
    assert refused.code == 2 and f"{both}.run has scores of 4 noises: give another -o" in refused.err
    # an image, which has one noise, is measured against the threshold of one
    run, of_one, of_both = Run.open(config.output), json.loads(one.read_text()), json.loads(both.read_text())
    assert of_one["thresholds"] == of_both["first"] != of_both["thresholds"] and of_one["first"] == {}
    for file in (one, both):
        assert load_thresholds(str(file), run, 1).threshold("ld") == of_one["thresholds"]["ld"]["threshold"]


def test_a_run_is_calibrated_where_every_row_has_as_many_noises(config: ScanConfig, tmp_path: Path) -> None:
    refused = be_audit("calibrate", config.output, "-o", tmp_path / "mixed.json")
    assert refused.code == 2 and "not every row had the second look" in refused.err and "--second-look 1" in refused.err
    assert be_audit(*command(config, tmp_path / "clean", "--second-look", 1)).code == 0
    assert be_audit("calibrate", tmp_path / "clean", "--fpr", 0.1, "-o", tmp_path / "t.json").code == 0
    facts, table = json.loads((tmp_path / "t.json").read_text()), read_scores(Run.open(str(tmp_path / "clean")))
    rows = [row for row in table.to_pylist() if row["status"] == "ok" and row["duplicate_of"] is None]
    ranked = sorted(row["magnitude"] for row in rows)
    assert facts["thresholds"]["magnitude"]["threshold"] == ranked[46 - 1]  # ceil(51 x 0.9) of 50
    assert "excess" in facts["thresholds"] and facts["model"]["num_noises"] == 4 and facts["first_noises"] == 1


def test_a_second_look_that_was_too_small_for_a_threshold_is_said(config: ScanConfig, tmp_path: Path) -> None:
    clean, file = tmp_path / "clean.parquet", tmp_path / "t.json"
    pq.write_table(pq.read_table(config.captions[0]).slice(0, 40), clean)
    assert be_audit("calibrate", clean, "--model", config.model, "--fpr", 0.6, "-o", file).code == 0
    facts = json.loads(file.read_text())
    facts["thresholds"]["ld_energy"]["threshold"] = 0.0  # below every row that had a second look
    file.write_text(json.dumps(facts))
    said = "10 captions had no second look, while all that had one are above the threshold of ld_energy"
    done = be_audit("report", config.output, "--format", "csv", "-o", tmp_path / "report", "--thresholds", file)
    assert done.code == 3 and said in done.err
    done = be_audit("drop", config.output, *config.captions, "--thresholds", file)
    assert said in done.err


def test_a_fraction_is_of_all_captions_whatever_the_threshold_holds_for(config: ScanConfig) -> None:
    run = Run.open(config.output)
    assert best_scores(run, "ld_energy", fraction=0.1, threshold=0.0, num_noises=4).num_rows == 5  # of 50, not of 40
    assert best_scores(run, "ld_energy", fraction=1.0, threshold=0.0, num_noises=4).num_rows == LOOKED


def test_a_look_that_has_not_begun_is_said_and_goes_on_by_its_own_flags(config: ScanConfig, tmp_path: Path) -> None:
    shutil.copytree(config.output, tmp_path / "run")
    run, stage = str(tmp_path / "run"), Stage.open(Run.open(config.output), SECOND_LOOK)
    (tmp_path / "run/stages/second_look.json").unlink()
    shutil.rmtree(tmp_path / "run/_commits/second_look")
    said = "second_look: not begun yet"
    done = be_audit("report", run, "--format", "csv", "-o", tmp_path / "report")
    assert done.code == 3 and said in done.err + done.out
    done = be_audit("drop", run, *config.captions, "--threshold", 0.5)
    assert done.code == 3 and said in done.err + done.out
    done = be_audit("calibrate", run, "-o", tmp_path / "t.json")
    assert done.code == 2 and said in done.err
    done = be_audit(*command(config, run, "--second-look", 0))
    assert done.code == 2 and "a second look was begun" in done.err and "not begun yet" in done.err
    # it goes on and chooses the same rows; begun and not done, it cannot be left out either
    assert scan(replace(config, output=run)).exit_code == 0
    look = Stage.open(Run.open(run), SECOND_LOOK)
    assert look.items.equals(stage.items)
    look.ledger.drop(look.shards[0])
    done = be_audit(*command(config, run, "--second-look", 0, "--refine", 0.1))
    assert done.code == 2 and f"1 of {len(look.shards)} shards have none yet: give the flags it was" in done.err
    assert Stage.find(Run.open(run), REFINE) is None
    assert scan(replace(config, output=run)).exit_code == 0
    assert be_audit(*command(config, run, "--second-look", 0)).code == 0  # nothing is left to do


def test_later_stages_do_not_change_what_it_was_begun_with(config: ScanConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(config.output, output)
    assert be_audit(*command(config, output, "--second-look", 0.8, "--refine", 0.1)).code == 0
    before = read_scores(Run.open(str(output)))
    (items,) = output.glob("stages/second_look-*/items.arrow")
    items.unlink()
    done = be_audit("verify", output, "--repair")
    assert done.code == 0, done.err
    assert read_scores(Run.open(str(output))).equals(before)


def test_refine_and_confirm_choose_by_the_second_look(config: ScanConfig) -> None:
    run = Run.open(config.output)
    chosen = best_rows(run, "ld_energy", top_k=5)
    stored = read_rows(run, chosen["row_id"].to_numpy(), ["ld_energy", "num_noises"])
    assert chosen["score"].equals(stored["ld_energy"])
    first = best_scores(run, "ld_energy", top_k=5, first_look=True)
    assert not first["ld_energy"].equals(chosen["score"])
