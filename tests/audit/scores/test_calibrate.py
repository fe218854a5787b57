"""`be-audit calibrate`: thresholds from clean captions, and who may use them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit.base.errors import AuditError
from audit.run.read import read_scores, read_stage
from audit.run.run import ModelFacts, Run
from audit.scores.calibrate import CalibrateConfig, calibrate, load_thresholds
from tests.command import be_audit, tree
from tests.conftest import some_captions
from tests.fabricate import make_run


def clean_run(folder: Path, count: int = 200) -> Run:
    """`count` distinct captions scored 1 to count, in no order, and every one of the last 50 again."""
    scores = np.random.default_rng(0).permutation(count) + 1.0
    names = some_captions(count)
    return make_run(folder, [*names, *names[-50:]], scores=[*scores, *np.full(50, 1000.0)])


def test_threshold_is_the_order_statistic_of_distinct_captions(tmp_path: Path) -> None:
    run, output = clean_run(tmp_path / "clean"), str(tmp_path / "t.json")
    found = calibrate(CalibrateConfig(captions=(run.url,), output=output, fpr=0.05))
    # the ceil(201 x 0.95) = 191st smallest of 1..200; the repeats at 1000 are no captions of their own
    assert found.thresholds["ld_energy"].threshold == 191
    assert (found.rows, found.thresholds["ld_energy"].num_above) == (200, 9)
    facts = json.loads(Path(output).read_text())
    entry = facts["thresholds"]["ld_energy"]
    assert (entry["threshold"], entry["rows"], entry["fpr"]) == (191, 200, 0.05)
    assert entry["low"] < 191 < entry["high"]
    assert facts["steps"] == 50 and facts["model"]["model"]["weights_sha256"] == "0" * 64
    assert set(facts["thresholds"]) == {"magnitude", "ld", "ld_energy", "webster", "attention_entropy", "cosine"}


def test_too_few_captions_are_said_and_their_interval_is_open(tmp_path: Path) -> None:
    run, output = clean_run(tmp_path / "clean", 99), str(tmp_path / "t.json")
    found = calibrate(CalibrateConfig(captions=(run.url,), output=output, fpr=0.01))
    assert any("of 99 clean rows none lie above it" in line for line in found.lines())
    assert json.loads(Path(output).read_text())["thresholds"]["ld"]["high"] is None


def test_fewer_captions_than_the_rate_needs_are_refused(tmp_path: Path) -> None:
    run = clean_run(tmp_path / "clean", 98)
    done = be_audit("calibrate", run.url, "-o", tmp_path / "t.json")
    assert done.code == 2 and "98 clean captions cannot tell a false-positive rate of 0.01: give 99 or more" in done.err
    assert not (tmp_path / "t.json").exists()
    assert be_audit("calibrate", run.url, "-o", tmp_path / "t.json", "--fpr", 0.02).code == 0


def test_thresholds_of_another_model_are_refused_field_by_field(tmp_path: Path) -> None:
    run, output = clean_run(tmp_path / "clean"), str(tmp_path / "t.json")
    calibrate(CalibrateConfig(captions=(run.url,), output=output))
    assert load_thresholds(output, run).threshold("ld_energy") == 199
    with pytest.raises(AuditError, match=r"none for ld_all; it has magnitude, ld"):
        load_thresholds(output, run).threshold("ld_all")
    changed = replace(run.fingerprint, steps=20, mask="final", model=ModelFacts("1" * 64), num_noises=4)
    run.facts = replace(run.facts, fingerprint=changed)
    with pytest.raises(AuditError) as refusal:
        load_thresholds(output, run)
    lines = str(refusal.value).splitlines()
    assert lines[1:5] == [
        "  mask: first -> final",
        f"  model.weights_sha256: {'0' * 64} -> {'1' * 64}",
        "  num_noises: 1 -> 4",
        "  steps: 50 -> 20",
    ]
    assert len(lines) == 6


def test_a_hub_revision_alone_does_not_matter(tmp_path: Path) -> None:
    run, output = clean_run(tmp_path / "clean"), str(tmp_path / "t.json")
    calibrate(CalibrateConfig(captions=(run.url,), output=output))
    named = replace(run.fingerprint, model=replace(run.fingerprint.model, revision="abc"))
    run.facts = replace(run.facts, fingerprint=named)
    assert load_thresholds(output, run).threshold("ld_energy") == 199


def test_report_lists_what_is_above_the_threshold(tmp_path: Path) -> None:
    clean, output = clean_run(tmp_path / "clean"), tmp_path / "t.json"
    calibrate(CalibrateConfig(captions=(clean.url,), output=str(output), fpr=0.05))
    other = make_run(tmp_path / "other", ["p", "q", "r", "s"], scores=[190, 191, 191.5, 500])
    done = be_audit("report", other.url, "--thresholds", output)
    assert done.code == 0 and done.out.startswith("2 flagged captions")
    facts = json.loads(output.read_text())
    facts["model"]["steps"] = 20
    output.write_text(json.dumps(facts))
    done = be_audit("report", other.url, "--thresholds", output)
    assert done.code == 2 and "steps: 20 -> 50" in done.err


@pytest.mark.sampling
def test_clean_captions_are_scanned_once_and_confirm_takes_the_file(sd1: str, tmp_path: Path) -> None:
    captions, suspects = tmp_path / "clean.txt.csv", tmp_path / "suspects.csv"
    captions.write_text("\n".join(["caption", *some_captions(30), *some_captions(30)]))
    suspects.write_text("\n".join(["caption", *(f"{text} again" for text in some_captions(20))]))
    flags = ("--model", sd1, "--steps", 2, "--guidance-scale", 5)
    output, run = tmp_path / "t.json", tmp_path / "RUN"
    done = be_audit("calibrate", captions, *flags, "-o", output, "--fpr", 0.4, "--method", "ld")
    assert done.code == 0 and "of 30 clean rows 11 lie above it" in done.out
    before, file = tree(tmp_path / "t.json.run/scores"), output.read_text()
    assert be_audit("calibrate", captions, *flags, "-o", output, "--fpr", 0.4, "--method", "ld").code == 0
    assert tree(tmp_path / "t.json.run/scores") == before  # it went on with the scan there
    assert json.loads(output.read_text())["thresholds"] == json.loads(file)["thresholds"]

    assert be_audit("scan", suspects, *flags, "-o", run, "--second-look", 1).code == 0
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    assert be_audit("index", "build", pictures, "-o", tmp_path / "INDEX", "--sscd", "testbed").code == 0
    confirm = (
        "confirm",
        run,
        "--index",
        tmp_path / "INDEX",
        "--by",
        "ld",
        "--thresholds",
        output,
        "--ls-threshold",
        0.1,
    )
    done = be_audit(*confirm)
    assert done.code == 0, done.err
    at = json.loads(file)["thresholds"]["ld"]["threshold"]
    scores = Run.open(str(run))
    table = read_scores(scores, ["row_id", "ld"]).to_pydict()
    above = {row for row, score in zip(table["row_id"], table["ld"], strict=True) if score > at}
    assert 0 < len(above) < 20
    assert set(read_stage(scores, "confirm", ["row_id"])["row_id"].to_pylist()) == above

    shutil.rmtree(tmp_path / "t.json.run")
    other = ("--model", sd1, "--steps", 3, "--guidance-scale", 5)
    assert be_audit("calibrate", captions, *other, "-o", output, "--fpr", 0.4).code == 0
    done = be_audit(*confirm, "--replace")
    assert done.code == 2 and "steps: 3 -> 2" in done.err


def test_a_users_mistakes_are_one_line_and_touch_nothing(tmp_path: Path) -> None:
    run = clean_run(tmp_path / "clean")
    part = make_run(tmp_path / "part", some_captions(20), rows_per_shard=10, shards=1)
    mine = tmp_path / "mine.json"
    mine.write_text('{"my": "notes"}')
    before = tree(tmp_path)

    def fails(*arguments: object) -> str:
        done = be_audit("calibrate", *arguments)
        assert done.code == 2 and done.err.count("\n") == 1 and tree(tmp_path) == before
        return done.err

    new = tmp_path / "t.json"
    assert "no captions given" in fails("-o", new)
    assert "another kind of file" in fails(run.url, "-o", mine)
    assert "is a folder" in fails(run.url, "-o", tmp_path)
    assert "--steps 20" in fails(run.url, "-o", new, "--steps", 20)
    assert "--mask final" in fails(run.url, "-o", new, "--mask", "final")
    for flags in (("--limit", 10), ("--caption-col", "x"), ("--dtype", "float16"), ("--delimiter", "tab")):
        assert " ".join(map(str, flags)) in fails(run.url, "-o", new, *flags)  # nothing of a run's scan can be other
    assert "--extra-evaluation True" in fails(run.url, "-o", new, "--extra-evaluation")
    assert "--lora ('my.safetensors',)" in fails(run.url, "-o", new, "--lora", "my.safetensors")
    clean = Path(run.url).parent / "captions.csv"
    assert "--method anisotropy: needs --extra-evaluation" in fails(clean, "-o", new, "--method", "anisotropy")
    assert "--method ld_10: needs --mask final" in fails(clean, "-o", new, "--method", "ld_10")
    assert "1 of 2 shards are not scanned" in fails(part.url, "-o", new)
    assert "--method ld_all" in fails(run.url, "-o", new, "--method", "ld_all")
    done = be_audit("report", run.url, "--thresholds", tmp_path / "gone.json")
    assert done.code == 2 and "no such file: make it with `be-audit calibrate" in done.err
    kept = tmp_path / "kept.json"
    assert be_audit("calibrate", run.url, "-o", kept, "--fpr", 0.5).code == 0
    facts = json.loads(kept.read_text())
    facts["thresholds"]["ld_energy"]["threshold"] = float("nan")
    kept.write_text(json.dumps(facts))
    done = be_audit("report", run.url, "--thresholds", kept)
    assert done.code == 2 and "ld_energy: nan is no threshold" in done.err
    done = be_audit("report", run.url, "--thresholds", mine)
    assert done.code == 2 and "no file of `be-audit calibrate`" in done.err
