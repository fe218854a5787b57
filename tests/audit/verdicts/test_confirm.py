"""`confirm` and `scan --refine` on the testbed: real trajectories (few steps), real index, real verdicts."""

from __future__ import annotations

import io
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from audit import testbed
from audit.base.errors import AuditError, Drained
from audit.base.seal import Seal
from audit.base.stopping import Stop
from audit.cli.commands import cli
from audit.index import Index, IndexConfig, build_index
from audit.reports.flagged import find_flagged
from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from audit.run.schema import tensor_values
from audit.run.stage import CONFIRM, MATCH, REFINE, TRAJECTORIES, Stage
from audit.run.verify import verify_run
from audit.scores.scan import scan
from audit.scores.trajectories import decode_png
from audit.verdicts.beside import Beside
from audit.verdicts.candidates import ConfirmConfig
from audit.verdicts.confirm import NULL_FILE, ConfirmSummary, _run_masks, confirm, read_null
from audit.verdicts.match_shard import own_pictures
from tests.audit.verdicts.conftest import config_at, confirm_at
from tests.conftest import once

pytestmark = pytest.mark.sampling


@pytest.fixture(scope="module")
def confirmed(work: Path, shared: Path) -> tuple[ConfirmConfig, ConfirmSummary]:
    """All of it, done. Read it only."""

    def make(folder: Path) -> tuple[ConfirmConfig, ConfirmSummary]:
        config = confirm_at(work, work / "be-audit-run", folder / "run")
        return config, confirm(config)

    return once(shared / "confirmed", make)


@pytest.fixture(scope="module")
def twenty(work: Path, shared: Path) -> ConfirmConfig:
    """Two images of twenty captions, confirmed. Read it only."""

    def make(folder: Path) -> ConfirmConfig:
        config = confirm_at(work, work / "be-audit-run", folder / "run")
        config = replace(config, num_images=2, top_fraction=None, top_k=20)
        confirm(config)
        return config

    return once(shared / "twenty", make)


@pytest.fixture
def many(twenty: ConfirmConfig, tmp_path: Path) -> ConfirmConfig:
    """A fresh copy of it."""
    return replace(twenty, run=str(shutil.copytree(twenty.run, tmp_path / "run")))


def test_verdicts_name_the_picture_and_store_the_proof(
    confirmed: tuple[ConfirmConfig, ConfirmSummary], work: Path
) -> None:
    run, done = confirmed
    assert (done.candidates, done.exit_code, done.failed) == (24, 0, 0)
    assert "24 candidates by ld_energy: " in done.lines()[0]  # a run this small does not go by excess
    truth = {row["TEXT"]: row for row in pq.read_table(work / "captions.parquet").to_pylist()}
    rows = read_stage(Run.open(run.run), "confirm").to_pylist()
    assert len(rows) == 24 and len({row["row_id"] for row in rows}) == 24
    copies = [row for row in rows if truth[row["caption"]]["label"] == "global"]
    assert [row["verdict"] for row in copies] == ["global"] * 6
    for row in copies:
        best = row["best"]
        assert best["reference_url"] == truth[row["caption"]]["URL"] or best["reference_caption"] == row["caption"]
        assert best["sscd"] > 0.5 and best["ls"] == 0 and best["own"]
        assert Image.open(io.BytesIO(best["reference_image"])).size == (64, 64)
    unseen = [row["verdict"] for row in rows if truth[row["caption"]]["label"] == "none"]
    assert unseen.count("none") >= 11
    made = read_stage(Run.open(run.run), "trajectories")
    assert decode_png(made["image"][0].as_py()).shape == (64, 64, 3)
    assert verify_run(run.run, deep=True).whole


def test_own_sscd_is_the_cosine_of_the_stored_pictures(run: ConfirmConfig) -> None:
    confirm(replace(run, top_fraction=None, top_k=3))
    opened = Run.open(run.run)
    index = Index.open(run.index)
    describe = index.load_descriptor()
    images = {row["row_id"]: row["image"] for row in read_stage(opened, "trajectories").to_pylist()}
    for row in read_stage(opened, "confirm").to_pylist():
        image = decode_png(images[row["row_id"]])
        for match in row["matches"]:
            pixels = np.asarray(index.picture(match["reference_id"]))
            both = describe([image, pixels]).numpy()
            assert match["sscd"] == pytest.approx(float(both[0] @ both[1]), abs=2e-3)  # the index stores float16
            distance = float(np.sqrt((((image / 255.0) - (pixels / 255.0)) ** 2).sum()))
            assert match["s"] == pytest.approx(-distance if match["sscd"] < 0.5 else 0, rel=1e-5)


def test_confirm_again_does_nothing_and_other_flags_are_refused(run: ConfirmConfig) -> None:
    small = replace(run, top_fraction=None, top_k=5)
    assert confirm(small).committed_now > 0
    assert confirm(small).committed_now == 0
    before = {path: path.read_bytes() for path in Path(run.run).rglob("*") if path.is_file()}
    with pytest.raises(AuditError, match=r"match_mask: energy -> final[\s\S]*--replace"):
        confirm(replace(small, match_mask="final"))
    with pytest.raises(AuditError, match=r"candidates: 5 -> 6"):
        confirm(replace(small, top_k=6))
    assert {path: path.read_bytes() for path in Path(run.run).rglob("*") if path.is_file()} == before
    images = Stage.open(Run.open(run.run), TRAJECTORIES).ledger.done()
    again = confirm(replace(small, match_mask="final", replace=True))
    assert again.committed_now == 1  # new verdicts, the same images and matches
    assert Stage.open(Run.open(run.run), TRAJECTORIES).ledger.done() == images


def test_stopped_and_damaged_confirms_go_on(run: ConfirmConfig) -> None:
    class StopLater(Stop):
        calls = 0

        def check(self) -> None:
            self.calls += 1
            if self.calls > 4:
                raise Drained

    many = replace(run, num_images=2, top_fraction=None, top_k=20, batch_size=8)
    with pytest.raises(Drained):
        confirm(many, StopLater())
    done = confirm(many)
    assert done.candidates == 20 and sum(done.verdicts.values()) == 20
    whole = read_stage(Run.open(run.run), "confirm").to_pylist()
    assert {row["num_images"] for row in whole} == {2}
    assert {m["image_index"] for m in whole[0]["matches"]} == {0, 1}
    next(Path(run.run).glob("confirmed/*/000/00000.arrow")).write_bytes(b"")
    next(Path(run.run).glob("trajectories/*/000/00001.arrow")).unlink()
    broken = verify_run(run.run)
    assert not broken.whole and len(broken.problems) == 2
    assert verify_run(run.run, repair=True).whole
    assert read_stage(Run.open(run.run), "confirm").to_pylist() == whole


def test_a_confirm_that_goes_on_keeps_the_threshold_it_began_with(many: ConfirmConfig) -> None:
    """Trajectories that come later would calibrate another one, and verdicts of one confirm would not agree."""
    stage = Stage.open(Run.open(many.run), CONFIRM)
    file, facts = Path(many.run) / stage.place(NULL_FILE), Path(many.run) / "stages/confirm.json"
    begun, sealed = json.loads(file.read_text()), facts.read_text()
    stage.ledger.drop(1)
    file.write_text(json.dumps({**begun, "threshold": 1e9}))  # as if other masks had been there at the beginning
    seal = asdict(Seal.of(file))
    facts.write_text(json.dumps({**json.loads(sealed), "sealed": {**json.loads(sealed)["sealed"], NULL_FILE: seal}}))
    confirm(many)
    assert json.loads(file.read_text())["threshold"] == 1e9
    rows = read_stage(Run.open(many.run), "confirm").to_pylist()
    redone = [row["verdict"] for row in rows[16:]]
    assert len(redone) == 4 and "none" not in redone
    facts.write_text(sealed)
    file.write_text("{")  # damaged: calibrated again, and taken where it is what it was
    Stage.open(Run.open(many.run), CONFIRM).ledger.drop(1)
    confirm(many)
    assert json.loads(file.read_text()) == begun


def test_what_is_generated_is_matched_while_the_rest_is(many: ConfirmConfig) -> None:
    opened = Run.open(many.run)
    matching, trajectories = Stage.open(opened, MATCH), Stage.open(opened, TRAJECTORIES)
    first = matching.table(0)
    matching.ledger.drop(0)
    matching.ledger.drop(1)
    trajectories.ledger.drop(1)  # not generated yet
    with Beside(matching, trajectories, many, None):
        until = time.monotonic() + 60
        while not matching.ledger.done([0]) and time.monotonic() < until:
            time.sleep(0.1)
    assert set(matching.ledger.done()) == {0}
    assert matching.table(0).equals(first)
    assert confirm(many).exit_code == 0 and matching.complete


def test_the_threshold_rests_on_masks_of_all_candidates(confirmed: tuple[ConfirmConfig, ConfirmSummary]) -> None:
    """Not of the best-scored alone, whose masks are the most concentrated."""
    stage = Stage.open(Run.open(confirmed[0].run), TRAJECTORIES)
    assert stage is not None
    every = tensor_values(stage.table(0)["energy_mask"])
    masks, size = _run_masks(stage, "energy_mask", 4)
    assert size == (128, 128) or size == (64, 64)
    np.testing.assert_array_equal(masks, every[[0, 8, 15, 23]])


def test_a_report_by_a_score_of_trajectories_is_ranked_by_it(confirmed: tuple[ConfirmConfig, ConfirmSummary]) -> None:
    found = find_flagged(Run.open(confirmed[0].run), "ld_first", None, None)
    assert len(found.scores) == 24 and (np.diff(found.scores) <= 0).all()
    scores = found.table.filter(pc.equal(found.table["verdict"], "none"))["score"].to_numpy()
    assert (np.diff(scores) <= 0).all()
    for verdict in ("global", "local"):  # the surest first
        q = found.table.filter(pc.equal(found.table["verdict"], verdict))["q_value"].to_numpy()
        assert len(q) and (np.diff(q) >= 0).all()
    assert found.table["score"].to_pylist() == found.table["ld_first"].to_pylist()


def test_short_forms_work_as_typed(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work / "be-audit-run", tmp_path / "be-audit-run")
    without = CliRunner().invoke(cli, ["confirm"])
    assert without.exit_code == 2
    assert "be-audit index build" in without.output and "Traceback" not in without.output
    shutil.copytree(work / "be-audit-index", tmp_path / "be-audit-index")
    found = CliRunner().invoke(cli, ["confirm", "--top-k", "4", "--null-pictures", "100"])
    assert found.exit_code == 0, found.output
    assert "4 candidates" in found.output and "local: correlation distance <" in found.output


def test_an_index_of_embeddings_can_tell_global_copies_only(run: ConfirmConfig, work: Path, tmp_path: Path) -> None:
    index = Index.open(run.index)
    rows = index.facts(index.ids())
    vectors = index.vectors(index.ids())
    table = pa.table({"embedding": list(vectors.astype(np.float32)), "key": rows["key"], "url": rows["url"]})
    pq.write_table(table, tmp_path / "embeddings.parquet")
    build_index(
        IndexConfig(images=(str(tmp_path / "embeddings.parquet"),), output=str(tmp_path / "ix"), sscd="testbed")
    )
    done = confirm(replace(run, index=str(tmp_path / "ix")))
    assert done.verdicts["global"] >= 6 and done.verdicts["local"] == 0
    first = read_stage(Run.open(run.run), "confirm").to_pylist()[0]["best"]
    assert first["distance"] is None and first["s"] is None and first["reference_image"] is None


def test_refine_gives_the_papers_scores_and_resumes(work: Path, tmp_path: Path) -> None:
    captions = str(work / "captions.parquet")
    config = config_at(tmp_path, captions=(captions,), refine=0.25, refine_by="ld")
    done = scan(config)
    assert (done.refined, done.exit_code) == (6, 0)
    final = scan(
        config_at(tmp_path, captions=(captions,), output=str(tmp_path / "final"), mask="final", second_look=0.0)
    )
    assert final.exit_code == 0
    cascade = read_scores(Run.open(config.output)).to_pandas()
    papers = read_scores(Run.open(str(tmp_path / "final"))).to_pandas()
    refined = cascade.refined.to_numpy(bool)
    first_row_is_repeated = cascade.duplicate_of.notna().sum() == 1
    assert first_row_is_repeated
    assert papers.refined.all() and papers.mask_source.eq("final:eos").all()
    for name in ("ld_first", "ld_10", "ld_all", "magnitude_10", "magnitude_all"):
        np.testing.assert_allclose(cascade[name][refined], papers[name][refined], rtol=1e-4)
        assert cascade[name][~refined].isna().all()
    np.testing.assert_allclose(papers.ld, papers.ld_first)
    best = cascade[cascade.duplicate_of.isna()].sort_values("ld", ascending=False, kind="stable").head(6)
    assert best.refined.all()
    # a lost shard of the second stage is done again, and only that
    stage = Stage.open(Run.open(config.output), REFINE)
    assert stage is not None
    kept = stage.ledger.done()
    lost = sorted(kept)[0]
    stage.ledger.drop(lost)
    scan(config)
    after = stage.ledger.done()
    assert set(after) == set(kept)
    assert {k: v for k, v in after.items() if k != lost} == {k: v for k, v in kept.items() if k != lost}
    with pytest.raises(AuditError, match=r"fraction: 0.25 -> 0.5"):
        scan(replace(config, refine=0.5))


def test_a_null_of_clean_captions_has_their_own_images_and_as_many_comparisons(run: ConfirmConfig, work: Path) -> None:
    """The run's own rows beyond the candidates, then a file: the same images, matches and threshold."""
    half = replace(run, top_fraction=None, top_k=4, null_captions=19, num_images=2, neighbours=3)
    done = confirm(half)
    assert (done.candidates, done.exit_code, done.null.source, len(done.null)) == (4, 0, "captions", 19)
    opened = Run.open(run.run)
    matched = read_stage(opened, "match").to_pylist()  # type: ignore[union-attr]
    candidates = set(read_stage(opened, "confirm")["row_id"].to_pylist())  # type: ignore[index]
    clean = [row for row in matched if row["row_id"] not in candidates]
    assert len(clean) == 19 and {row["num_images"] for row in matched} == {2}
    smallest = sorted(min(m["correlation_distance_energy"] for m in row["matches"]) for row in clean)
    assert read_null(opened).statistics == pytest.approx(smallest)  # type: ignore[union-attr]
    assert done.null.threshold == smallest[0]  # floor(20 x 0.05) - 1 = 0 of them may lie below
    listed = find_flagged(opened, "ld_energy", None, 0).table
    assert set(listed["row_id"].to_pylist()) == candidates  # clean captions are no findings
    file = work / "clean.csv"
    pq_rows = [row["caption"] for row in clean]
    file.write_text("caption\n" + "\n".join(f'"{text}"' for text in [*pq_rows, pq_rows[0]]))
    again = confirm(replace(half, clean=str(file), null_captions=None, replace=True))
    assert again.null.statistics == pytest.approx(done.null.statistics)
    assert again.verdicts == done.verdicts and again.exit_code == 0


def test_what_cannot_be_promised_is_refused_before_anything_is_generated(run: ConfirmConfig, work: Path) -> None:
    for more, line in (
        ({"num_images": 16, "match_fpr": 0.01}, r"pictures cannot tell .* 16 images a candidate, 1,592 are needed"),
        ({"null_captions": 10, "top_k": 4}, r"--null-captions 10; a false-positive rate of 0.05 needs 19"),
        ({"null_captions": 50, "top_k": 20}, r"4 captions to make a null of; .* needs 19"),
        ({"clean": str(work / "captions.parquet"), "match_fpr": 0.01}, r"24 captions to make a null of; .* needs 99"),
    ):
        with pytest.raises(AuditError, match=line):
            confirm(replace(run, **({"top_fraction": None} if "top_k" in more else {}), **more))  # type: ignore[arg-type]
        assert not (Path(run.run) / "trajectories").exists()
        assert not list((Path(run.run) / "stages").glob("trajectories*"))


def test_a_candidates_p_value_counts_all_its_images(run: ConfirmConfig) -> None:
    confirm(replace(run, top_fraction=None, top_k=6, num_images=3))
    opened = Run.open(run.run)
    null = read_null(opened).null()  # type: ignore[union-attr]
    assert null.draws == 3
    for row in read_stage(opened, "confirm").to_pylist():  # type: ignore[union-attr]
        best = min(match["correlation_distance"] for match in row["matches"])
        one = (1 + sum(value <= best for value in null.statistics)) / (1 + len(null))
        assert row["p_value"] == pytest.approx(1 - (1 - one) ** 3, rel=1e-5)
        assert (row["verdict"] != "none") or row["p_value"] > 0.05


@pytest.mark.parametrize("columns", [(), ("id",)])
def test_the_captions_own_picture_is_found_by_caption_and_never_by_a_row_number(
    columns: tuple[str, ...], work: Path, tmp_path: Path
) -> None:
    """A caption list and a picture set that each number their rows: the numbers have nothing to do with each other."""
    pictures = pq.read_table(testbed.PICTURES).slice(0, 60)
    pictures = pictures.select(["TEXT", "image"]).append_column("id", pa.array([str(n) for n in range(60)]))
    pq.write_table(pictures, tmp_path / "pictures.parquet")
    build_index(IndexConfig(images=(str(tmp_path / "pictures.parquet"),), output=str(tmp_path / "ix"), sscd="testbed"))
    captions = list(dict.fromkeys(pictures["TEXT"].to_pylist()))[6:12]
    rows = {"caption": captions} | {name: [str(n) for n in range(6)] for name in columns}
    pq.write_table(pa.table(rows), tmp_path / "list.parquet")
    scan(config_at(tmp_path, captions=(str(tmp_path / "list.parquet"),), steps=2))
    opened, index = Run.open(str(tmp_path / "be-audit-run")), Index.open(str(tmp_path / "ix"))
    items = pa.table({"row_id": pa.array(range(6), pa.int64()), "caption": captions})
    own = own_pictures(opened, index, items)
    assert [index.facts([own[row]])["caption"][0].as_py() for row in range(6)] == captions
