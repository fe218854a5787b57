"""The scan: same scores whatever the batches, shards and workers; rows that fail; the summary and its exit codes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.errors import AuditError
from audit.base.fingerprint import digest
from audit.engines.job import JobSpec
from audit.run.read import dataset, read_scores, read_stage
from audit.run.run import Run
from audit.run.schema import SCORE_COLUMNS, tensor_values
from audit.run.stage import NULL_MAPS, SCAN, Stage
from audit.scores.estimate import estimate
from audit.scores.scan import ScanConfig, scan
from pipelines import FirstStepScorer, find_model, load
from pipelines.loading import DiffusionModel
from tests.audit.conftest import Watched
from tests.command import be_audit
from tests.conftest import some_captions
from tests.reference import Reference
from tests.tiny import SIZE

SCORES = ("magnitude", "ld", "ld_energy", "webster", "attention_entropy", "cosine")


@pytest.fixture(scope="module")
def config(captions_file: Path, sd1: str, tmp_path_factory: pytest.TempPathFactory) -> ScanConfig:
    """The scan that the others are compared with; done."""
    output = tmp_path_factory.mktemp("scan") / "run"
    made = ScanConfig(captions=(str(captions_file),), output=str(output), model=sd1, store_masks="float16")
    scan(made)
    return made


def table(config: ScanConfig, first_look: bool = False) -> pa.Table:
    return read_scores(Run.open(config.output), masks=True, first_look=first_look)


def assert_same(found: pa.Table, expected: pa.Table, ids: bool = True) -> None:
    names = ("caption", "status", "num_tokens", "truncated", "URL", *(("row_id", "duplicate_of") if ids else ()))
    for name in names:
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    for name in SCORES:
        one, other = (rows[name].to_numpy().astype(float) for rows in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=name)


def test_stored_rows_are_the_reference(config: ScanConfig, captions_file: Path, sd1: str) -> None:
    """Every input row is there in order; unique captions carry scores, repeated ones say of which."""
    raw, captions = dataset(Run.open(config.output)), pq.read_table(captions_file)["TEXT"].to_pylist()
    assert raw is not None
    stored = raw.to_table().to_pylist()
    assert list(stored[0]) == [*SCORE_COLUMNS, "URL"]
    reference, first = Reference(Path(sd1)), dict[str, int]()
    assert [row["caption"] for row in stored] == captions
    for row in stored:
        caption, number = row["caption"], row["row_id"]
        if caption is None or not caption.strip():
            assert (row["status"], row["ld"], row["mask"], row["energy_mask"]) == ("empty", None, None, None)
        elif caption in first:
            assert (row["status"], row["duplicate_of"], row["ld"]) == ("ok", first[caption], None)
        else:
            first[caption] = number
            assert (row["status"], row["error"], row["duplicate_of"]) == ("ok", None, None)
            assert (row["mask_source"], row["refined"], row["ld_first"]) == ("first:eos", False, None)
            if number % 9 == 0:
                expected = reference.score(caption)
                for name in (*SCORES, "num_tokens", "truncated"):
                    value = pytest.approx(expected[name], rel=1e-4, abs=1e-6)
                    assert row[name] == value, name
                energy_mask = reference.score(caption, mask="energy")["mask"]
                for name, mask in (("mask", expected["mask"]), ("energy_mask", energy_mask)):
                    np.testing.assert_allclose(np.reshape(row[name], mask.shape), mask, rtol=2e-3, atol=1e-4)
    assert len(first) == 50


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 64}, {"batch_size": "auto"}])
def test_batch_size_changes_nothing(config: ScanConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    scan(other := replace(config, output=str(tmp_path / "run"), **changes))
    assert_same(table(other), table(config))


@pytest.mark.slow
@pytest.mark.parametrize("rows", (1, 7, 1000))
def test_rows_per_shard_change_nothing_but_ids(config: ScanConfig, tmp_path: Path, rows: int) -> None:
    scan(other := replace(config, output=str(tmp_path / "run"), rows_per_shard=rows))
    found = table(other)
    assert_same(found, table(config), ids=False)
    ids = found["row_id"].to_numpy()
    assert len(set(ids)) == 60 and ids.tolist() == sorted(ids)
    # a duplicate's first occurrence is the same row of the input
    place = {row_id: number for number, row_id in enumerate(ids.tolist())}
    of = [None if row_id is None else place[row_id] for row_id in found["duplicate_of"].to_pylist()]
    assert of == table(config)["duplicate_of"].to_pylist()  # one shard: ids are places


@pytest.mark.processes
def test_workers_change_nothing(config: ScanConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of a second look: tests/faults/test_scan_kill.py. One process makes the null maps and scans."""
    other = replace(config, output=str(tmp_path / "run"), rows_per_shard=7, workers=2, batch_size=5, second_look=0.0)
    done = scan(other)
    assert (done.complete, done.committed_now, done.exit_code) == (True, 9, 0)
    assert_same(table(other), table(config, first_look=True), ids=False)
    pids = {made.worker.pid for made in Stage.open(Run.open(other.output), SCAN).done().values()}
    assert os.getpid() not in pids and len(pids) == 2
    assert {made.worker.pid for made in Stage.open(Run.open(other.output), NULL_MAPS).done().values()} < pids
    assert "Stopping" not in capfd.readouterr().err


@pytest.mark.processes
def test_machines_share_a_run_by_rank(config: ScanConfig, tmp_path: Path) -> None:
    other = replace(config, output=str(tmp_path / "run"), rows_per_shard=7, world_size=3)
    for rank in (2, 0):
        done = scan(replace(other, rank=rank))
        assert (done.committed_now, done.mine_complete, done.complete, done.exit_code) == (3, True, False, 0)
    assert scan(replace(other, rank=1)).complete
    assert_same(table(other), table(config), ids=False)


def test_finished_run_is_left_alone_and_says_so(config: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model is not needed")

    monkeypatch.setattr(DiffusionModel, "__init__", refuse)
    found = be_audit("scan", *config.captions, "-o", config.output, "--model", config.model, "--store-masks", "float16")
    assert found.code == 0
    assert "nothing to do, all 1 shards of 60 rows are done." in found.out
    assert "60 rows, 50 unique captions: 50 scored, 5 duplicates, 5 empty, 0 failed." in found.out


@pytest.mark.slow
@pytest.mark.parametrize("noises", (1, 3))
def test_evaluations_equal_unique_captions(
    config: ScanConfig, tmp_path: Path, watched: type[Watched], noises: int
) -> None:
    run = str(tmp_path / "run")
    scan(other := replace(config, output=run, num_noises=noises, rows_per_shard=7, second_look=0.0))
    assert watched.latents == 2 * noises * (50 + 1)  # the empty prompt's once a noise; null maps, then the scan
    assert scan(other).committed_now == 0 and watched.latents == 2 * noises * 51


@pytest.mark.sampling
def test_mask_of_the_final_step_is_the_papers_score(six: Path, sd1: str, tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    scan(ScanConfig((str(six),), output, sd1, mask="final", steps=12, store_masks="float16", num_noises=2))
    rows, reference = table(ScanConfig(output=output)).to_pylist(), Reference(Path(sd1))
    expected = [reference.trajectory("one two", noise, 12) for noise in reference.noises(2, 0)]
    ld, magnitude = (np.array([row[name] for row in expected]) for name in ("ld_t", "magnitude_t"))
    found = rows[1]
    assert (found["mask_source"], found["refined"], found["ld"]) == ("final:eos", True, found["ld_first"])
    assert found["ld_first"] == pytest.approx(ld[:, 0].mean(), rel=1e-4)
    assert found["ld_std"] == pytest.approx(ld[:, 0].std(), rel=1e-2)
    assert found["ld_10"] == pytest.approx(ld[:, :10].mean(), rel=1e-4)
    assert found["ld_all"] == pytest.approx(ld.mean(), rel=1e-4)
    assert found["magnitude_10"] == pytest.approx(magnitude[:, :10].mean(), rel=1e-4)
    assert found["magnitude_all"] == pytest.approx(magnitude.mean(), rel=1e-4)
    mask = np.mean([row["be_mask"] for row in expected], 0)
    np.testing.assert_allclose(np.reshape(found["mask"], mask.shape), mask, rtol=2e-3, atol=1e-4)
    first = reference.score("one two", num_noises=2, steps=12)
    for name in ("magnitude", "ld_energy", "webster", "cosine"):
        assert found[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_masks_are_stored_as_asked(config: ScanConfig, tmp_path: Path, sd1: str) -> None:
    scan(bits := replace(config, output=str(tmp_path / "bits"), store_masks="bits", second_look=0.0))
    found = FirstStepScorer(load(find_model(sd1), "cpu", "float32"))(some_captions(49))
    for name, exact in (("mask", found.mask), ("energy_mask", found.energy_mask)):
        assert exact is not None
        full = tensor_values(table(config)[name].drop_null()).astype(np.float32)
        packed = tensor_values(table(bits)[name].drop_null())
        assert packed.dtype == np.uint8 and packed.shape == (50, SIZE, SIZE // 8)
        above = np.unpackbits(packed, axis=-1)[:49].astype(bool)
        assert (above == (exact > exact.mean((1, 2), keepdims=True))).mean() > 0.999  # but for ties of rounding
        np.testing.assert_allclose(full[:49], exact, rtol=2e-3, atol=1e-4)
    scan(none := replace(config, output=str(tmp_path / "none"), store_masks="none", second_look=0.0))
    assert not {"mask", "energy_mask"} & set(table(none).schema.names)


@pytest.mark.sampling
def test_refinement_is_a_second_stage_that_can_be_gone_on_with(
    config: ScanConfig, tmp_path: Path, watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(config, output=str(tmp_path / "run"), refine=0.1, rows_per_shard=20, steps=12)
    done = scan(other)
    assert (done.refined, done.exit_code) == (5, 0)
    scores = table(other)
    by_caption = {row["caption"]: row["ld_energy"] for row in scores.to_pylist() if row["ld_energy"] is not None}
    chosen = set(sorted(by_caption, key=lambda caption: -by_caption[caption])[:5])
    refined = scores.filter(scores["refined"])
    assert set(refined["caption"].to_pylist()) == chosen  # their duplicates with them
    rows = read_stage(Run.open(other.output), "refine")
    assert rows is not None and rows.num_rows == 5
    reference = Reference(Path(config.model))
    row = rows.to_pylist()[0]
    expected = reference.trajectory(row["caption"], reference.noises(1, 0)[0], 12)
    assert row["ld_all"] == pytest.approx(expected["ld_t"].mean(), rel=2e-4)
    shard = Path(other.output, "_commits", "refine").rglob("*.json")
    next(shard).unlink()
    before = watched.latents
    assert scan(other).refined == 5 and watched.latents > before
    again = table(other)["ld_all"].to_numpy().astype(float)
    np.testing.assert_allclose(again, scores["ld_all"].to_numpy().astype(float), rtol=1e-4)
    before = watched.latents
    scan(other)
    assert watched.latents == before


def test_dry_run_writes_nothing(config: ScanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    found = be_audit("scan", *config.captions, "--model", config.model, "--rows-per-shard", 25, "--dry-run")
    assert "excess rests on few captions: the null maps are of all 50 there are" in found.out
    assert found.code == 0, found
    for line in ("rows             60 (5 empty)", "unique captions  50", "shards           3 of 25 rows"):
        assert line in found.out
    assert "captions/s on one worker, one batch of 32)" in found.out
    assert "--guidance-scale" not in found.err  # 7.5 is Stable Diffusion's own
    assert "masks            800 Bytes (--store-masks bits" in found.out
    flags = ("--model", config.model, "--batch-size", "auto", "--dry-run")
    found = be_audit("scan", *config.captions, *flags)
    assert found.code == 0 and "one batch of 32; --batch-size auto may find a faster size)" in found.out
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_refine_is_no_mistake(sd1: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"TEXT": ["", " ", None]}), tmp_path / "blank.parquet")
    found = be_audit("scan", tmp_path / "blank.parquet", "-o", tmp_path / "run", "--model", sd1, "--refine", 0.5)
    assert found.code == 3 and "--by" not in found.err, found


def test_captions_that_are_all_empty(sd1: str, tmp_path: Path) -> None:
    path = tmp_path / "blank.parquet"
    pq.write_table(pa.table({"TEXT": pa.array([None, "", " "], pa.string())}), path)
    run = tmp_path / "run"
    assert "0.0 captions/s" in be_audit("scan", path, "-o", run, "--model", sd1, "--dry-run").out
    assert not run.exists()
    found = be_audit("scan", path, "-o", run, "--model", sd1)
    assert found.code == 3 and "No caption has text" in found.err
    assert "3 rows, 0 unique captions: 0 scored, 0 duplicates, 3 empty, 0 failed." in found.out
    assert read_scores(Run.open(str(run)))["status"].to_pylist() == ["empty"] * 3


def test_short_forms_work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"url": ["a", "b"], "caption": ["a red house", "a dog"]}), "captions.parquet")
    assert be_audit("scan", "captions.parquet", "--model", "testbed").code == 0
    found = be_audit("status")
    assert found.code == 0
    assert found.out.startswith("be-audit-run: 2 rows, 2 unique captions, model testbed\n")
    assert "1/1 shards, 2/2 rows (2 ok)" in found.out
    assert read_scores(Run.open("be-audit-run"))["url"].to_pylist() == ["a", "b"]


def test_files_of_one_run_may_differ(sd1: str, tmp_path: Path, config: ScanConfig) -> None:
    """Column order, string width, dictionaries, nullability and other columns, as LAION's own parts have it."""
    captions = some_captions(40)
    parts: list[pa.Table] = [
        pa.table({"URL": captions[:10], "TEXT": captions[:10]}),
        pa.table({"TEXT": pa.array(captions[10:20], pa.large_string()), "NSFW": ["?"] * 10, "URL": captions[10:20]}),
        pa.table({"TEXT": pa.array(captions[20:30]).dictionary_encode(), "width": [1.5] * 10}),
        pa.Table.from_arrays(
            [pa.array(captions[30:]), pa.array(captions[30:], pa.large_string())],
            schema=pa.schema([pa.field("TEXT", pa.string(), nullable=False), ("URL", pa.large_string())]),
        ),
    ]
    for number, part in enumerate(parts):
        pq.write_table(part, tmp_path / f"part-{3 - number}.parquet")  # read in the order of their names
    scan(ScanConfig((str(tmp_path),), str(tmp_path / "run"), sd1, rows_per_shard=7, second_look=0))
    found = read_scores(Run.open(str(tmp_path / "run")))
    order = [*captions[30:], *captions[20:30], *captions[10:20], *captions[:10]]
    assert found["caption"].to_pylist() == order
    assert found["URL"].to_pylist() == [*captions[30:], *[None] * 10, *captions[10:20], *captions[:10]]
    first = read_scores(Run.open(config.output), ["caption", "ld"], first_look=True).to_pydict()
    known = dict(zip(first["caption"], first["ld"], strict=True))
    np.testing.assert_allclose(found["ld"].to_numpy(), [known[caption] for caption in order], rtol=1e-4)
    inputs = [entry["path"] for entry in Run.open(str(tmp_path / "run")).fingerprint.inputs]
    assert inputs == [str(tmp_path / f"part-{number}.parquet") for number in range(4)]


def test_estimate_refuses_what_the_scan_refuses(config: ScanConfig) -> None:
    with pytest.raises(AuditError, match="goes with --mask first"):
        estimate(replace(config, mask="final", extra_evaluation=True), print)


def test_a_model_changed_under_a_worker_is_refused(config: ScanConfig, tmp_path: Path) -> None:
    """A worker on another machine finds other weights in the same place."""
    scan(other := replace(config, output=str(tmp_path / "run")))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    facts["fingerprint"]["model"]["weights_sha256"] = "0" * 64
    facts["digest"] = digest(facts["fingerprint"])
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    with pytest.raises(AuditError, match="other weights than the run was begun with"):
        JobSpec(SCAN.opener, other.output, "cpu", 8, 0.05).open()


@pytest.mark.sampling
def test_dry_run_counts_what_refine_adds(config: ScanConfig) -> None:
    few = replace(config, steps=4)
    plain, refined = estimate(few, print), estimate(replace(few, refine=0.5), print)
    assert plain.refine_seconds == 0 < refined.refine_seconds
    words = ("scan", *config.captions, "--model", config.model, "--steps", 4, "--refine", 0.5, "--dry-run")
    assert "--refine adds" in be_audit(*words).out


def test_another_way_to_write_a_path_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"TEXT": ["a cat", "a dog"]}), tmp_path / "a" / "captions.parquet")
    base = {"model": "testbed", "steps": 2, "device": "cpu"}
    monkeypatch.chdir(tmp_path / "a")
    scan(ScanConfig(captions=("captions.parquet",), output="run", **base))
    monkeypatch.chdir(tmp_path / "b")
    again = scan(ScanConfig(captions=("../a/captions.parquet",), output="../a/run", **base))
    assert (again.committed_before, again.committed_now) == (1, 0)
