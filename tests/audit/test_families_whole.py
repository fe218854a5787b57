"""be-audit runs whole on every family: scan, index, confirm, mitigate, report; without a mask calibrate and score."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from tests.command import be_audit
from tests.conftest import once, some_captions
from tests.tiny import save_model

pytestmark = pytest.mark.sampling

KINDS = {"pixart": ("epsilon", "T5's end token"), "sd3": ("velocity", "no mask of joint attention")}
OTHERS = {
    "sana": "velocity",
    "if": "epsilon",
    "sd2": "epsilon",
    "sdxl": "epsilon",
    "zero_snr": "velocity",
    "distilled": "epsilon",
    "playground": "epsilon",
    "pixart_alpha": "epsilon",
    "sd3_clip": "velocity",
}
"""The other families, and the unit of their scores: the audit alone."""
STEPS = ("--steps", 3, "--device", "cpu")


@pytest.fixture(scope="module")
def data(shared: Path) -> Path:
    """captions.parquet, and index: of 24 random pictures with captions, the first of which are those."""
    return once(shared / "families", _indexed)


def _indexed(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for caption in some_captions(24):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
        rows.append({"TEXT": caption, "image": buffer.getvalue()})
    pq.write_table(pa.Table.from_pylist(rows), folder / "pictures.parquet")
    pq.write_table(pa.table({"TEXT": some_captions(8)}), folder / "captions.parquet")
    done = be_audit("index", "build", folder / "pictures.parquet", "-o", folder / "index", "--sscd", "testbed")
    assert done.code == 0, done
    return folder


@pytest.fixture(scope="module", params=KINDS)
def work(request: pytest.FixtureRequest, data: Path, shared: Path) -> Path:
    """NAME/model, NAME/captions.parquet, NAME/index, NAME/run: scanned."""
    return once(shared / request.param, lambda folder: _scanned(folder, data))


def _scanned(folder: Path, data: Path) -> Path:
    save_model(folder.name, folder / "model")
    for name in ("captions.parquet", "index"):
        (folder / name).symlink_to(data / name)
    done = be_audit("scan", folder / "captions.parquet", "-o", folder / "run", "--model", folder / "model", *STEPS)
    assert done.code == 0, done
    assert "by itself: give it for images like its own (7.5 now)" in done.err
    return folder


def test_ld_is_null_and_says_why(work: Path) -> None:
    unit, reason = KINDS[work.name]
    run = Run.open(str(work / "run"))
    assert (run.fingerprint.unit, run.fingerprint.mask) == (unit, "none")
    rows = read_scores(run, None).to_pylist()
    assert len(rows) == 8 and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert row["ld"] is None and row["ld_std"] is None
        assert row["mask_source"].startswith(f"none: {reason}")
        assert (row["webster"] is None) == (unit == "velocity")
        assert row["magnitude"] > 0 and row["ld_energy"] > 0


def test_the_rest_of_the_audit(work: Path) -> None:
    run = work / "run"
    done = be_audit("confirm", run, "--index", work / "index", "--top-k", 3, "--ls-threshold", 1e9, "--device", "cpu")
    assert done.code == 0 and "3 local" in done.out, done
    rows = read_stage(Run.open(str(run)), "confirm").to_pylist()
    assert all(row["best"]["ls"] is None and row["best"]["ls_energy"] < 0 for row in rows)
    made = read_stage(Run.open(str(run)), "trajectories")
    assert made["be_mask"].null_count == made["ld_t"].null_count == 3 and made["energy_mask"].null_count == 0
    done = be_audit("mitigate", run, "--device", "cpu", "--iterations", 2, "--target", 0)
    assert done.code == 0 and "3 images: 3 mitigated" in done.out, done
    moved = read_stage(Run.open(str(run)), "mitigate").to_pylist()
    assert all(row["loss_after"] < row["loss_before"] and row["ld_before"] is None for row in moved)
    done = be_audit("report", run, "-o", work / "report", "--format", "html,parquet")
    assert done.code == 0 and (work / "report" / "index.html").exists(), done
    assert be_audit("verify", run, "--deep").code == 0
    assert be_audit("status", run).code == 0


def test_what_it_has_not_is_refused_by_name(work: Path) -> None:
    captions, model = work / "captions.parquet", ("--model", work / "model", *STEPS)
    _, reason = KINDS[work.name]
    for flags in (("--mask", "final"), ("--refine", 0.5, "--refine-by", "ld")):
        done = be_audit("scan", captions, "-o", work / "other", *model, *flags)
        assert done.code == 2 and reason in done.err and len(done.err.splitlines()) == 1, done
    for flags in (("--match-mask", "final"), ("--by", "ld")):
        done = be_audit("confirm", work / "run", "--index", work / "index", "--replace", *flags)
        assert done.code == 2 and "no attention masks" in done.err, done
    assert not (work / "other").exists()


def test_named_layers_give_an_experimental_mask(work: Path) -> None:
    layer = "transformer_blocks.0.attn2" if work.name == "pixart" else "transformer_blocks.0.attn"
    done = be_audit(
        *("scan", work / "captions.parquet", "-o", work / "layers", "--model", work / "model", *STEPS),
        *("--mask-layers", layer, "--limit", 2),
    )
    assert done.code == 0, done
    rows = read_scores(Run.open(str(work / "layers")), None).to_pylist()
    assert all(row["ld"] > 0 and row["mask_source"] == f"first:eos:{layer}" for row in rows)


def test_one_prompt(work: Path, tmp_path: Path) -> None:
    flags = ("--prompt", "a red house", "--model", work / "model", *STEPS)
    done = be_audit("score", *flags, "--trajectory", "-o", tmp_path / "score.png")
    assert done.code == 0 and "ld_energy" in done.out and (tmp_path / "score.png").exists(), done
    for more in ((), ("--loss", "magnitude", "--mask", "final")):  # of magnitude no mask is asked
        picture = tmp_path / f"mitigate-{len(more)}.png"
        done = be_audit("mitigate", *flags, "--iterations", 1, "-o", picture, *more)
        assert done.code == 0 and picture.exists(), done


def test_thresholds_of_another_unit_are_refused(work: Path, tmp_path: Path) -> None:
    words = ("calibrate", work / "captions.parquet", "--model", work / "model", "-o", tmp_path / "t.json", "--fpr", 0.5)
    done = be_audit(*words, *STEPS)
    assert done.code == 0, done
    facts = json.loads((tmp_path / "t.json").read_text())
    assert facts["model"]["unit"] == KINDS[work.name][0]
    facts["model"]["unit"] = {"epsilon": "velocity", "velocity": "epsilon"}[facts["model"]["unit"]]
    (tmp_path / "t.json").write_text(json.dumps(facts))
    done = be_audit("confirm", work / "run", "--index", work / "index", "--thresholds", tmp_path / "t.json")
    assert done.code == 2 and "unit: " in done.err, done


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_family(data: Path, tmp_path: Path, kind: str) -> None:
    model, run = save_model(kind, tmp_path / "model"), tmp_path / "run"
    words = ("scan", data / "captions.parquet", "-o", run, "--model", model, "--limit", 3, "--device", "cpu")
    done = be_audit(*words, "--steps", 2)
    assert done.code == 0, done
    made = Run.open(str(run))
    assert made.fingerprint.unit == OTHERS[kind]
    masked = made.fingerprint.mask != "none"
    for row in read_scores(made, None).to_pylist():
        assert row["status"] == "ok" and row["magnitude"] > 0 and row["ld_energy"] > 0
        assert (row["ld"] is not None) == masked
        assert row["mask_source"] == "first:eos" if masked else row["mask_source"].startswith("none: ")
    flags = ("--top-k", 1, "--ls-threshold", 1e9, "--device", "cpu")
    done = be_audit("confirm", run, "--index", data / "index", *flags)
    assert done.code == 0 and "1 local" in done.out, done
    done = be_audit("mitigate", run, "--device", "cpu", "--iterations", 1, "--target", 0)
    assert done.code == 0 and "1 images: 1 mitigated" in done.out, done
    done = be_audit("report", run, "-o", tmp_path / "report")
    assert done.code == 0 and (tmp_path / "report" / "index.html").exists(), done
    assert be_audit("verify", run).code == 0
