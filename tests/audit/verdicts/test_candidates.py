"""Which captions `confirm` takes: of whole scans alone, the same ones again, by scores that a threshold holds for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pytest

from audit.base.errors import AuditError
from audit.reports.flagged import find_flagged
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import SECOND_LOOK, Stage
from audit.scores.scan import scan
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.confirm import confirm
from tests.audit.verdicts.conftest import config_at, confirm_at
from tests.command import be_audit, tree

pytestmark = pytest.mark.sampling


def test_unscanned_rows_and_missing_runs_are_refused(run: ConfirmConfig, tmp_path: Path) -> None:
    (Path(run.run) / "_commits/scan/00001.json").unlink()
    with pytest.raises(AuditError, match="1 of 4 shards are not scanned yet"):
        confirm(run)
    with pytest.raises(AuditError, match="no run here"):
        confirm(replace(run, run=str(tmp_path / "nothing")))


def test_a_second_look_that_is_not_done_is_refused(run: ConfirmConfig) -> None:
    look = Stage.open(Run.open(run.run), SECOND_LOOK)
    look.ledger.drop(look.shards[0])
    with pytest.raises(AuditError, match=r"1 of . shards had no second look yet: go on with `be-audit scan`"):
        confirm(run)
    (Path(run.run) / "stages/second_look.json").unlink()
    shutil.rmtree(Path(run.run) / "_commits/second_look")
    with pytest.raises(AuditError, match="second_look: not begun yet: go on with `be-audit scan`"):
        confirm(run)


def test_images_that_change_a_score_do_not_change_who_is_confirmed(work: Path, tmp_path: Path) -> None:
    """By a score of trajectories, which the confirm's own images tell more of: gone on with, it chooses the same."""
    scan(config_at(work, output=str(tmp_path / "run"), mask="final", second_look=1.0, limit=8))
    config = replace(confirm_at(work, tmp_path / "run", tmp_path / "copy"), by="ld_first", top_fraction=None, top_k=3)
    done = confirm(config)
    before = read_scores(Run.open(config.run), ["ld_first", "num_noises"]).to_pydict()
    assert set(before["num_noises"]) == {4}  # and so are their scores, whatever one image has
    first = read_scores(Run.open(str(tmp_path / "run")), ["ld_first"])["ld_first"].to_pylist()
    assert before["ld_first"] == first
    again = confirm(config)
    assert (again.candidates, again.committed_now) == (done.candidates, 0)


def test_thresholds_are_of_the_scan_s_scores_whatever_confirm_s_images_tell(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    scan(config_at(work, output=str(run), mask="final", second_look=0.0, limit=8))
    thresholds = {}
    for when in ("before", "after"):
        file = tmp_path / f"{when}.json"
        done = be_audit("calibrate", run, "--method", "ld_first", "--fpr", 0.5, "-o", file)
        assert done.code == 0, done.err
        thresholds[when] = json.loads(file.read_text())["thresholds"]["ld_first"]["threshold"]
        table = (work / "captions.parquet", "--by", "ld_first", "--thresholds", tmp_path / "before.json")
        dropped = be_audit("drop", run, *table).out
        if when == "before":
            flagged = find_flagged(Run.open(str(run)), "ld_first", thresholds[when], None).table["caption"].to_pylist()
            assert 2 < len(flagged) < 8 and all(f"  {caption}" in dropped for caption in flagged[:3])
            config = ConfirmConfig(run=str(run), index=str(work / "be-audit-index"), top_k=8, num_images=3)
            confirm(replace(config, by="ld_first", ls_threshold=1e-6))
            continue
        again = find_flagged(Run.open(str(run)), "ld_first", thresholds[when], None, confirmed=False)
        assert again.above == len(flagged)
        shown = again.table.filter(pc.greater(again.table["score"], thresholds[when]))
        assert sorted(shown["caption"].to_pylist()) == sorted(flagged)
    assert thresholds["after"] == thresholds["before"]


def test_a_threshold_above_every_score_leaves_nothing_to_confirm(run: ConfirmConfig) -> None:
    with pytest.raises(AuditError, match="nothing to confirm"):
        confirm(replace(run, threshold=1e9))
    with pytest.raises(AuditError, match="--top-fraction 0: nothing to confirm"):
        confirm(replace(run, top_fraction=0.0))
    assert confirm(replace(run, threshold=0.0, top_k=2)).candidates == 2


def test_a_repair_goes_on_by_the_score_that_was_taken_whatever_its_file_says_by_now(work: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "thresholds.json"
    scan(config_at(work, output=str(run), second_look=0.0, limit=8))
    calibrate = ("calibrate", run, "--fpr", 0.5, "-o", file)
    assert be_audit(*calibrate).code == 0
    index = ("--index", work / "be-audit-index", "--ls-threshold", 0.01)
    done = be_audit("confirm", run, *index, "--thresholds", file)
    assert done.code == 0 and " candidates by ld_energy: " in done.out, done.err
    before = tree(run / "confirm")
    assert be_audit(*calibrate, "--method", "magnitude").code == 0
    next((run / "_commits").glob("confirm*/**/*.json")).unlink()
    done = be_audit("verify", run, "--repair")
    assert done.code == 0 and tree(run / "confirm") == before, done.err


@pytest.mark.parametrize("name", ["confirm", "match", "trajectories"])
def test_a_confirm_whose_own_file_is_lost_is_said_and_can_be_given_again(run: ConfirmConfig, name: str) -> None:
    """Its verdicts are no verdicts any more: a report without them would say that nothing was compared."""
    config = replace(run, top_fraction=None, top_k=2)
    confirm(config)
    (Path(run.run) / f"stages/{name}.json").unlink()
    said = f"stages/{name}.json: missing, while results of that stage are there"
    verified, report = be_audit("verify", run.run), be_audit("report", run.run, "--format", "csv")
    assert verified.code == report.code == 3 and said in verified.out + verified.err and said in report.err
    assert confirm(replace(config, replace=name == "match")).exit_code == 0  # what rests on it names it
    assert be_audit("verify", run.run).code == 0
