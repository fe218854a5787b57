"""`excess` and its null maps: the formula once more, whatever the run is cut into; damage, kills, few captions."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from audit.captions.sample import LowestHashes
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import NULL_MAPS, SCAN, Stage
from audit.run.verify import verify_run
from audit.scores.scan import ScanConfig, scan
from tests.command import be_audit, start
from tests.conftest import some_captions
from tests.reference import Reference, excess, less_common, peak

pytestmark = pytest.mark.slow  # whole scans, a dozen


@pytest.fixture(scope="module")
def config(captions_file: Path, sd1: str, tmp_path_factory: pytest.TempPathFactory) -> ScanConfig:
    """A scan with two noises, done; second looks are another file's."""
    output = tmp_path_factory.mktemp("null") / "run"
    made = ScanConfig((str(captions_file),), str(output), sd1, num_noises=2, store_masks="none", second_look=0.0)
    scan(made)
    return made


def by_caption(output: str | Path, score: str = "excess") -> dict[str, float]:
    table = read_scores(Run.open(str(output)), ["caption", "status", score]).to_pylist()
    return {row["caption"]: row[score] for row in table if row["status"] == "ok"}


def test_a_run_whose_null_maps_are_of_before_has_excess_alone(config: ScanConfig, tmp_path: Path) -> None:
    shutil.copytree(config.output, tmp_path / "run")
    stage = Stage.open(Run.open(str(tmp_path / "run")), NULL_MAPS)
    for shard in stage.shards:
        table = stage.table(shard).drop_columns(["residual"]).replace_schema_metadata(None)
        stage.ledger.drop(shard)
        stage.ledger.commit(shard, table, {"ok": table.num_rows, "error": 0}, {})
    scanned = Stage.open(Run.open(str(tmp_path / "run")), SCAN)
    for shard in scanned.shards:
        scanned.ledger.drop(shard)
    assert scan(replace(config, output=str(tmp_path / "run"))).exit_code == 0
    assert_same(tmp_path / "run", config.output, 1e-5, ("excess",))
    assert set(by_caption(tmp_path / "run", "excess_pca").values()) == {None}
    assert not verify_run(str(tmp_path / "run")).bad


SCORES = ("ld_energy", "excess", "excess_pca")


def assert_same(
    output: str | Path, expected: str | Path, within: float = 1e-6, scores: tuple[str, ...] = SCORES
) -> None:
    for score in scores:
        found, values = by_caption(output, score), by_caption(expected, score)
        assert set(found) == set(values)
        assert max(abs(found[caption] - value) / max(abs(value), 1) for caption, value in values.items()) <= within


def test_it_is_the_formula_over_all_captions_and_the_mean_over_noises(config: ScanConfig, sd1: str) -> None:
    found, reference = by_caption(config.output), Reference(Path(sd1))
    captions = list(found)
    noises = reference.noises(2, 0)
    differences = np.stack([[reference.difference(caption, noise) for caption in captions] for noise in noises])
    energies = (differences**2).sum(2)
    expected = np.mean([excess(of_noise, of_noise) for of_noise in energies], 0)
    np.testing.assert_allclose([found[caption] for caption in captions], expected, rtol=2e-3, atol=2e-3)
    found = by_caption(config.output, "excess_pca")
    energies = np.stack([(less_common(each, each) ** 2).sum(1) for each in differences])
    expected = np.mean([peak(of_noise, of_noise) for of_noise in energies], 0)
    np.testing.assert_allclose([found[caption] for caption in captions], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("changes", [{"rows_per_shard": 7}, {"rows_per_shard": 1000}, {"batch_size": 5}])
def test_how_the_run_is_cut_changes_nothing(config: ScanConfig, tmp_path: Path, changes: dict[str, int]) -> None:
    scan(replace(config, output=str(tmp_path / "run"), **changes))
    within = 1e-4 if "batch_size" in changes else 1e-5  # float rounding of other batches, as for every score
    assert_same(tmp_path / "run", config.output, within)


def test_the_order_of_the_captions_changes_nothing(config: ScanConfig, tmp_path: Path) -> None:
    rows = pq.read_table(config.captions[0])
    turned = rows.take(np.random.default_rng(1).permutation(rows.num_rows))
    pq.write_table(turned, tmp_path / "turned.parquet")
    scan(replace(config, captions=(str(tmp_path / "turned.parquet"),), output=str(tmp_path / "run")))
    one, other = (Stage.open(Run.open(str(path)), NULL_MAPS).table(0) for path in (config.output, tmp_path / "run"))
    assert one["caption"].equals(other["caption"])
    assert one["energy"].combine_chunks().equals(other["energy"].combine_chunks())  # to the bit
    assert_same(tmp_path / "run", config.output, 1e-5)


@pytest.mark.processes
def test_workers_and_machines_read_the_same_maps(config: ScanConfig, tmp_path: Path) -> None:
    other = replace(config, output=str(tmp_path / "run"), rows_per_shard=7, world_size=2)
    scan(replace(other, rank=1, workers=2))
    made = (tmp_path / "run/_commits/null_maps").rglob("*.json")
    times = {path: path.stat().st_mtime_ns for path in made}
    assert len(times) == 2  # a noise each
    assert scan(replace(other, rank=0)).complete
    assert {path: path.stat().st_mtime_ns for path in times} == times  # made once
    assert_same(tmp_path / "run", config.output, 1e-5)


def test_the_sample_is_the_lowest_hashes_of_distinct_captions() -> None:
    hashes = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in some_captions(100)], np.uint64)
    rows = np.concatenate([[0], hashes, hashes[:50], [0]]).astype(np.uint64)
    for count, expected in ((10, 1 + np.argsort(hashes)[:10]), (1000, 1 + np.argsort(hashes))):
        lowest = LowestHashes(count)
        for at in range(0, len(rows), 30):
            lowest.add(at, rows[at : at + 30])
        assert lowest.rows.tolist() == expected.tolist()
    none = LowestHashes(10)
    none.add(0, np.zeros(3, np.uint64))
    assert none.rows.tolist() == []


def test_few_captions_are_said(config: ScanConfig) -> None:
    arguments = ("scan", *config.captions, "-o", config.output, "--model", config.model)
    done = be_audit(*arguments, "--num-noises", 2, "--store-masks", "none", "--second-look", 0)
    assert "excess rests on few captions: the null maps are of all 50 there are, not of 512" in done.err
    assert be_audit("report", config.output, "--format", "jsonl").code == 0
    facts = json.loads(Path(config.output, "report/report.json").read_text())
    assert facts["null_maps"] == {"captions": 50, "few": True}
    assert "null_maps     2/2 shards, 100/100 rows (100 ok)" in be_audit("status", config.output).out


@pytest.mark.parametrize("how", ("cut", "flipped", "removed", "stage removed"))
def test_damage_is_named_and_repaired(config: ScanConfig, tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(config.output, run)
    path = next((run / "null_maps").rglob("00001.arrow"))
    data = path.read_bytes()
    if how == "stage removed":
        path = run / "stages/null_maps.json"
    path.unlink()
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "flipped":
        path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    found = be_audit("verify", run)
    assert found.code == 3 and path.name in found.err + found.out
    assert be_audit("verify", run, "--repair").code == 0
    assert be_audit("verify", run, "--deep").code == 0
    assert_same(run, config.output)


def test_a_single_prompt_and_a_trajectory_have_no_excess(sd1: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"TEXT": some_captions(6)}), tmp_path / "six.parquet")
    scan(ScanConfig((str(tmp_path / "six.parquet"),), str(tmp_path / "run"), sd1, refine=0.1, steps=2))
    refined = next((tmp_path / "run/refined").rglob("*.arrow"))
    assert "excess" not in pa.ipc.open_file(str(refined)).schema.names
    printed = be_audit("score", "--model", sd1, "--prompt", "a dog", "-o", tmp_path / "x.png", "--steps", 3)
    assert printed.code == 0 and "excess" not in printed.out


@pytest.mark.faults
@pytest.mark.parametrize("moment", ("stages/null_maps.json", "_commits/null_maps"))
def test_killed_while_they_are_made(config: ScanConfig, tmp_path: Path, moment: str) -> None:
    """SIGKILL when the stage is begun, and when the first of two noises is committed; the same command goes on."""
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ("scan", *config.captions, "-o", run, "--model", config.model, "--num-noises", 2)
    arguments = (*arguments, "--store-masks", "none", "--second-look", 0)
    process = start(*arguments, log=log)
    while not (run / moment).exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not (run / "_commits/scan").exists()
    assert be_audit(*arguments).code == 0
    assert not (run / "_claims").exists()
    assert be_audit("verify", run, "--deep").code == 0
    assert_same(run, config.output)
