"""`mitigate` on the testbed: real copies (few steps) moved, generated and audited again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from audit import testbed
from audit.base.errors import AuditError, Drained
from audit.base.stopping import Stop
from audit.cli.commands import cli
from audit.index import Index, IndexConfig, build_index
from audit.mitigation.mitigate import MitigateConfig, begun_target, mitigate
from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from audit.run.schema import MITIGATED_COLUMNS, tensor_values
from audit.run.stage import CONFIRM, MITIGATE, Stage
from audit.run.verify import verify_run
from audit.scores.scan import ScanConfig, scan
from audit.scores.trajectories import decode_png
from audit.verdicts.confirm import ConfirmConfig, confirm
from pipelines import Mitigator, TrajectorySampler, find_model, load
from pipelines.alignment import load_clip
from tests.conftest import once

pytestmark = pytest.mark.sampling
STEPS = 4  # enough for the strongest copies
LS_THRESHOLD = 0.9  # between the correlation distances of these copies and of different pictures
IMAGES = 11  # confirm's images a caption: two captions a shard


@pytest.fixture(scope="module")
def work(shared: Path) -> Path:
    """run: 12 captions, the four copies among them confirmed in two shards. index: the pictures of the copies."""
    return once(shared / "mitigate", _confirmed)


def _confirmed(folder: Path) -> Path:
    table = pq.read_table(testbed.CAPTIONS).to_pandas().drop_duplicates("TEXT").sort_values("copy_error", kind="stable")
    parts = [table[table.label == "global"].head(2), table[table.label == "local"].drop_duplicates("cluster").head(2)]
    parts.append(table[table.cluster.str.startswith("unseen")].head(8))
    rows = [row for part in parts for row in part.to_dict("records")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")
    run, index = str(folder / "run"), str(folder / "index")
    scan(ScanConfig(captions=(str(folder / "captions.parquet"),), output=run, model="testbed", steps=STEPS))
    pictures = pq.read_table(testbed.PICTURES)
    wanted = pc.is_in(pictures["cluster"], pa.array([row["cluster"] for row in rows]))
    pq.write_table(pictures.filter(wanted), folder / "pictures.parquet")
    build_index(IndexConfig(images=(str(folder / "pictures.parquet"),), output=index, sscd="testbed"))
    confirm(ConfirmConfig(run=run, index=index, top_k=4, num_images=IMAGES, ls_threshold=LS_THRESHOLD))
    return folder


@pytest.fixture()
def run(work: Path, tmp_path: Path) -> MitigateConfig:
    """A fresh copy of the confirmed run, and how to mitigate an image of each of its captions."""
    shutil.copytree(work / "run", tmp_path / "run")
    return MitigateConfig(run=str(tmp_path / "run"), num_images=1, device="cpu")


def rows_of(config: MitigateConfig) -> list[dict[str, Any]]:
    table = read_stage(Run.open(config.run), "mitigate")
    assert table is not None and table.schema.names == list(MITIGATED_COLUMNS)
    return table.to_pylist()


def stored(config: MitigateConfig) -> dict[int, dict[str, Any]]:
    """Trajectory of image 0 of every row, with confirm's best match and `mask`: the BE mask at pixel size."""
    table = read_stage(Run.open(config.run), "trajectories")
    confirmed = read_stage(Run.open(config.run), "confirm")
    assert table is not None and confirmed is not None
    best = {row["row_id"]: row["best"] for row in confirmed.to_pylist()}
    table = table.filter(pc.equal(table["image_index"], 0))
    masks = torch.from_numpy(tensor_values(table["be_mask"]).copy())[:, None]
    masks = torch.nn.functional.interpolate(masks, (64, 64), mode="bilinear", antialias=False)[:, 0].numpy()
    return {
        row["row_id"]: {**row, "best": best[row["row_id"]], "mask": mask}
        for row, mask in zip(table.to_pylist(), masks, strict=True)
    }


def test_copies_stop_copying_and_every_before_is_what_confirm_saw(run: MitigateConfig, work: Path) -> None:
    done = mitigate(run)
    assert (done.captions, done.images, done.untriggered, done.failed, done.exit_code) == (4, 4, 0, 0, 0)
    # below the target a copy may still be one: of the two whole pictures none is, of the two regions at most one
    assert done.verdicts["global"][0] == 4 and done.verdicts["global"][1] <= 1
    assert all(row["verdict_after"] != "global" for row in rows_of(run) if row["row_id"] < 2)
    known = stored(run)
    captions = read_scores(Run.open(run.run), ["row_id", "caption"]).to_pylist()
    clean = [row["caption"] for row in captions if row["row_id"] not in known]
    sampler = TrajectorySampler(load(find_model(str(testbed.PIPELINE)), "cpu", "float32"), steps=STEPS)
    loss = sampler(clean, [0] * len(clean), decode=False).windows()["ld_first"]  # the loss itself, BE mask of each
    assert len(clean) == 8 and done.target == pytest.approx(np.median(loss), rel=1e-4)
    clip = load_clip(testbed.CLIP, "cpu")
    index = Index.open(str(work / "index"))
    describe = index.load_descriptor()
    for row in rows_of(run):
        of = known[row["row_id"]]
        assert row["image_before"] == of["image"] and row["image_after"] != of["image"]
        assert row["loss_before"] == row["ld_before"] == of["ld_first"]
        assert row["magnitude_before"] == of["magnitude"]
        assert row["loss_after"] < row["loss_before"] and 0 < row["iterations"] <= 10
        assert row["loss_after"] <= done.target or row["iterations"] == 10
        # the reference is confirm's; cosine, distances and alignment are recomputed from the stored pictures
        assert (row["reference_id"], row["reference_key"]) == (of["best"]["reference_id"], of["best"]["reference_key"])
        picture = np.asarray(index.picture(row["reference_id"]))
        mask = of["mask"]
        for when in ("before", "after"):
            image = decode_png(row[f"image_{when}"])
            both = describe([image, picture]).numpy()
            sscd = float(both[0] @ both[1])
            assert row[f"sscd_{when}"] == pytest.approx(sscd, abs=2e-3)  # the index stores float16
            assert row[f"alignment_{when}"] == pytest.approx(clip([image], [row["caption"]])[0], abs=1e-4)
            difference = (image / 255.0 - picture / 255.0) * mask[..., None]
            ls_norm = -np.sqrt((difference**2).sum()) / mask.mean() if sscd < 0.5 else 0.0
            assert row[f"ls_norm_{when}"] == pytest.approx(ls_norm, rel=1e-4)
    assert verify_run(run.run, deep=True).whole


def test_a_row_is_what_the_mitigator_gives_it_alone(run: MitigateConfig) -> None:
    target = mitigate(replace(run, loss="magnitude", batch_size=3)).target
    model = load(find_model(str(testbed.PIPELINE)), "cpu")
    sampler = TrajectorySampler(model, steps=STEPS)
    for row in rows_of(run)[:2]:
        moved = Mitigator(model, "magnitude", target, steps=STEPS)([row["caption"]], sampler.noises)
        assert row["loss_after"] == pytest.approx(moved.last_loss[0], rel=1e-3)
        assert row["iterations"] == moved.iterations_used[0]
        made = sampler.sample(moved.embeddings, sampler.noises)
        image = made["images"][0].numpy().astype(int)
        assert np.abs(decode_png(row["image_after"]) - image).mean() < 0.5
        assert row["magnitude_after"] == pytest.approx(float(made["magnitude_t"][0, 0]), rel=1e-3)
        assert row["magnitude_after"] == pytest.approx(row["loss_after"], rel=1e-3)


def test_rows_at_or_below_the_trigger_are_left_as_they_are(run: MitigateConfig) -> None:
    known = stored(run)
    scores = sorted(row["ld_first_mask"] for row in known.values())  # ld, as the scan scored it, of this noise
    shortened = float(np.nextafter(scores[1], 0))  # as a person writes it: the same once it is stored as scores are
    done = mitigate(replace(run, threshold=shortened))
    assert done.untriggered == 2
    for row in rows_of(run):
        above = known[row["row_id"]]["ld_first_mask"] > scores[1]
        assert row["triggered"] == above
        assert (row["image_after"] == row["image_before"]) is not above
        if not above:
            assert row["iterations"] == 0
            for name in ("loss", "ld", "magnitude", "sscd", "ls_norm", "ls_energy", "distance", "verdict", "alignment"):
                assert row[f"{name}_after"] == row[f"{name}_before"]
    untouched = mitigate(replace(run, threshold=1e9, replace=True))
    assert (untouched.untriggered, untouched.means) == (4, {})


def test_lost_commits_and_stops_go_on_and_other_flags_are_refused(run: MitigateConfig) -> None:
    class StopLater(Stop):
        calls = 0

        def check(self) -> None:
            self.calls += 1
            if self.calls > 4:
                raise Drained

    with pytest.raises(Drained):
        mitigate(run, StopLater())
    first = mitigate(run)
    assert first.images == 4
    whole = rows_of(run)
    assert mitigate(run).committed_now == 0
    stage = Stage.find(Run.open(run.run), MITIGATE)
    assert stage is not None
    commits = stage.ledger.done()
    assert sorted(commits) == [0, 1]
    stage.ledger.drop(1)
    assert mitigate(run).committed_now == 1
    assert rows_of(run) == whole
    assert stage.ledger.done()[0] == commits[0]
    # damaged by something else: verify names it and does it again
    next(Path(run.run).glob("mitigated/*/000/00000.arrow")).write_bytes(b"")
    assert len(verify_run(run.run).problems) == 1
    assert verify_run(run.run, repair=True).whole
    assert rows_of(run) == whole
    before = {path: path.read_bytes() for path in Path(run.run).rglob("*") if path.is_file()}
    with pytest.raises(AuditError, match=r"learning_rate: 0.05 -> 0.1[\s\S]*--replace"):
        mitigate(replace(run, learning_rate=0.1))
    assert {path: path.read_bytes() for path in Path(run.run).rglob("*") if path.is_file()} == before
    measured = begun_target(Run.open(run.run), Stage.open(Run.open(run.run), CONFIRM), run, "final")
    assert measured == first.target  # and not measured again
    best = mitigate(replace(run, top_k=1, num_images=2, iterations=0, target=5.0, replace=True))
    assert best.target == 5.0
    assert begun_target(Run.open(run.run), Stage.open(Run.open(run.run), CONFIRM), run, "final") is None
    assert (best.captions, best.images) == (1, 2)
    for row in rows_of(run):  # no update: the same picture, generated again
        assert np.abs(decode_png(row["image_after"]).astype(int) - decode_png(row["image_before"])).max() <= 2
        assert row["ld_after"] == pytest.approx(row["ld_before"], rel=1e-3)


def test_an_index_without_pixels_leaves_distances_out(run: MitigateConfig, work: Path, tmp_path: Path) -> None:
    index = Index.open(str(work / "index"))
    rows = index.facts(index.ids())
    table = pa.table({"embedding": list(index.vectors(index.ids())), "key": rows["key"], "caption": rows["caption"]})
    pq.write_table(table, tmp_path / "embeddings.parquet")
    pictures = (str(tmp_path / "embeddings.parquet"),)
    build_index(IndexConfig(images=pictures, output=str(tmp_path / "index"), sscd="testbed"))
    confirm(ConfirmConfig(run=run.run, index=str(tmp_path / "index"), top_k=4, num_images=IMAGES, replace=True))
    done = mitigate(replace(run, top_k=1))
    assert done.images == 1 and done.verdicts["global"] == (1, 0)
    row = rows_of(run)[0]
    assert row["distance_after"] is None and row["ls_norm_before"] is None and row["sscd_after"] < 0.5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-images", "12"], "confirm made 11 a caption"),
        (["--index", "/no/such"], "be-audit index build"),
        (["--clip", "/no/such"], "give the folder of a transformers CLIPModel"),
        (["--loss", "cosine"], "not one of 'ld', 'magnitude'"),
        (["--target", "-1"], "--target"),
        (["--threshold", "1", "--thresholds", "t.json"], "--threshold and --thresholds: give one of them"),
        (["--prompt", "a cat"], "goes with a run, not with --prompt: leave one of them out"),
    ],
)
def test_mistakes_are_one_line_before_any_work(run: MitigateConfig, flags: list[str], says: str) -> None:
    done = CliRunner().invoke(cli, ["mitigate", run.run, *flags])
    assert done.exit_code == 2
    assert says in done.output and "Traceback" not in done.output
    assert Stage.find(Run.open(run.run), MITIGATE) is None


def test_runs_without_copies_or_without_a_confirm_are_refused(
    run: MitigateConfig, work: Path, tmp_path: Path, testbed_index: str
) -> None:
    Stage.open(Run.open(run.run), CONFIRM).discard()
    with pytest.raises(AuditError, match="nothing is confirmed yet: give `be-audit confirm"):
        mitigate(run)
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(work / "run", tmp_path / "run")
    with pytest.raises(AuditError, match="not what was in the index when this run was confirmed"):
        mitigate(replace(run, index=testbed_index))


def test_a_prompt_is_shown_before_and_after(sd1: str, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    flags = ["mitigate", "--model", sd1, "--steps", "3", "--device", "cpu", "--num-images", "2", "-o", str(picture)]
    done = CliRunner().invoke(cli, [*flags, "--prompt", "a cat", "--loss", "magnitude", "--learning-rate", "0.01"])
    assert done.exit_code == 0, done.output
    numbers = {line.split()[0]: line.split()[1::2] for line in done.output.splitlines() if "->" in line}
    model = load(find_model(sd1), "cpu")
    made = TrajectorySampler(model, num_noises=2, steps=3)(["a cat"] * 2, [0, 1])
    assert float(numbers["magnitude"][0]) == pytest.approx(float(made.magnitude_t[:, 0].mean()), rel=1e-3)
    assert float(numbers["loss"][1]) < float(numbers["loss"][0])
    assert float(numbers["loss"][1]) == pytest.approx(float(numbers["magnitude"][1]), rel=1e-3)
    assert "alignment" not in numbers
    assert len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0)) > 50
    left = CliRunner().invoke(cli, [*flags, "--prompt", "a cat", "--threshold", "1e9"])
    pairs = [line.split()[1::2] for line in left.output.splitlines() if "->" in line]
    assert len(pairs) == 3 and all(float(before) == float(after) for before, after in pairs)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "a cat", "--thresholds", "t.json"], "--thresholds: goes with a run, not with --prompt"),
        (["--prompt", "a cat", "-o", "/no/such/folder/x.png", "--iterations", "1"], "cannot be written"),
        (["--prompt", "caf\udce9"], "--prompt: character 4 is not UTF-8"),
        (["--prompt", "a cat", "--guidance-scale", "1e38"], "--prompt: the decoded picture is not finite"),
    ],
)
def test_mistakes_with_a_prompt_are_one_line(sd1: str, flags: list[str], says: str) -> None:
    done = CliRunner().invoke(cli, ["mitigate", "--model", sd1, "--steps", "2", "--device", "cpu", *flags])
    assert done.exit_code == 2
    assert says in done.output and "Traceback" not in done.output


def test_a_picture_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    flags = ["mitigate", "--model", str(tmp_path / "no-such-model"), "--prompt", "a cat"]
    for name in ("nodir/x.png", "x.docx"):
        done = CliRunner().invoke(cli, [*flags, "-o", str(tmp_path / name)])
        assert done.exit_code == 2 and "cannot be written" in done.output
