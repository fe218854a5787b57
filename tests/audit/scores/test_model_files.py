"""Scans of what people have beside folders: variants, LoRA files, learned tokens, folders that lie about themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from audit.base.errors import AuditError, Drained
from audit.run.claim import take_back
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import NULL_MAPS
from audit.scores.model import find_model_folder
from audit.scores.null_maps import make_null_maps
from audit.scores.scan import ScanConfig, scan
from pipelines import ModelError
from tests.command import be_audit, tree
from tests.conftest import some_captions

UNET = "unet/diffusion_pytorch_model.safetensors"
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"TEXT": [*some_captions(4), "a house <style>"]}), path)
    return path


def test_loras_and_tokens_are_part_of_the_run(
    sd1: str, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 32), (16, 2)))
    save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, "my.safetensors")
    save_file({"<style>": torch.ones(3, 32)}, "style.safetensors")
    given = ("scan", captions, "--model", sd1, "--device", "cpu", "--steps", 2)
    assert be_audit(*given, "-o", "plain").code == 0
    added = ("--lora", "my.safetensors:0.5", "--textual-inversion", "style.safetensors:<style>")
    done = be_audit(*given, "-o", "tuned", *added)
    assert done.code == 0, done
    plain, tuned = (read_scores(Run.open(name), None).to_pylist() for name in ("plain", "tuned"))
    assert tuned[4]["num_tokens"] == tuned[0]["num_tokens"] - plain[0]["num_tokens"] + 5  # a, house, and three
    assert all(a["magnitude"] != b["magnitude"] for a, b in zip(plain, tuned, strict=True))
    facts = Run.open("tuned").fingerprint.model
    assert facts.lora[0].endswith(":0.5") and facts.textual_inversion[0].endswith(":<style>")
    assert be_audit(*given, "-o", "tuned", *added).code == 0  # the same: nothing to do
    done = be_audit(*given, "-o", "tuned", "--lora", "my.safetensors:0.6", *added[2:])
    assert done.code == 2 and "model.lora.0: " in done.err
    monkeypatch.chdir("/")  # the run knows where its files are
    done = be_audit("verify", tmp_path / "tuned", "--deep")
    assert done.code == 0, done
    next((tmp_path / "tuned" / "scores").rglob("*.arrow")).unlink()
    assert be_audit("verify", tmp_path / "tuned", "--repair").code in (0, 3)
    assert read_scores(Run.open(str(tmp_path / "tuned")), None).to_pylist() == tuned


def test_variants_are_said(sd1: str, captions: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sd1, tmp_path / "model"))
    for file in list(model.rglob("*.safetensors")):
        state = {key: value.half() for key, value in load_file(file).items()}
        save_file(state, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    done = be_audit("scan", captions, "-o", tmp_path / "run", "--model", model, "--steps", 2)
    assert done.code == 0 and "have no plain weights: loaded from .fp16. files" in done.err, done


@pytest.mark.parametrize("file", ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"))
def test_other_weights_than_described_end_with_one_line(sd1: str, captions: Path, tmp_path: Path, file: str) -> None:
    model = Path(shutil.copytree(sd1, tmp_path / "model"))
    path = model / f"{file}.safetensors"
    save_file({f"module.{key}": value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    done = be_audit("scan", captions, "-o", tmp_path / "run", "--model", model, "--steps", 2, "--device", "cpu")
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert done.code == 2 and len(errors) == 1 and f"{file.split('/')[0]}/ has other weights" in errors[0], done
    assert "Traceback" not in done.err


def test_a_schedule_nobody_trained_with_is_refused_before_anything_is_written(
    sd1: str, captions: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(sd1, tmp_path / "model"))
    (model / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0})
    )
    done = be_audit("scan", captions, "-o", tmp_path / "run", "--model", model)
    assert done.code == 2 and "its scheduler is EDMDPMSolverMultistepScheduler" in done.err, done
    assert not (tmp_path / "run").exists()


def prefixed(file: Path) -> None:
    save_file({f"module.{key}": value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("way", ("mended", "another"))
def test_after_a_refusal_the_same_command_serves_the_model_once_it_is_mended(
    sd1: str, tmp_path: Path, way: str
) -> None:
    """Also into the folder of the captions themselves, whose staged copies are no captions."""
    model, run = Path(shutil.copytree(sd1, tmp_path / "model")), tmp_path / "run"
    run.mkdir()
    (run / "captions.csv").write_text("TEXT\na house\na dog\n")
    given = ("scan", run, "-o", run, "--steps", 2, "--device", "cpu", "--model")
    whole = (model / UNET).read_bytes()
    prefixed(model / UNET)
    for _ in range(2):
        done = be_audit(*given, model)
        assert done.code == 2 and "unet/ has other weights" in done.err, done
        assert [file.name for file in run.iterdir()] == ["captions.csv"]
    if way == "mended":
        (model / UNET).write_bytes(whole)
    done = be_audit(*given, model if way == "mended" else sd1)
    assert done.code == 0 and "1 file, 2 rows" in done.err + done.out, done


def test_a_refusal_takes_nothing_from_a_run_that_was_there(
    sd1: str, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from one with scores, nor from one that an earlier command has planned and no more."""
    model, run = Path(shutil.copytree(sd1, tmp_path / "model")), tmp_path / "run"
    given = ("scan", captions, "-o", run, "--steps", 2, "--device", "cpu", "--model", model)

    def stopped(*_: object) -> None:
        raise Drained

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.loading.load", stopped)
        assert be_audit(*given).code == 75

    def refuses() -> None:
        def refused(*_: object) -> None:
            raise ModelError(f"{model}: cannot be loaded: this machine lacks a library")

        with monkeypatch.context() as patch:
            patch.setattr("pipelines.loading.load", refused)
            done = be_audit(*given)
        assert done.code == 2 and "lacks a library" in done.err, done

    begun = Run.open(str(run)).facts
    refuses()
    assert Run.open(str(run)).facts == begun
    assert be_audit(*given, "--limit", 2).code == 2  # which is another run
    assert be_audit(*given).code == 0
    before = tree(run)
    prefixed(model / UNET)
    done = be_audit(*given)
    assert done.code == 2 and "model.weights_sha256" in done.err and tree(run) == before, done


def test_who_waited_for_a_run_that_was_taken_back_says_so(sd1: str, captions: Path, tmp_path: Path) -> None:
    config = ScanConfig(captions=(str(captions),), output=str(tmp_path / "run"), model=sd1, device="cpu", steps=2)
    scan(config)
    run = Run.open(config.output)
    for name in ("null_maps", "_commits", "scores"):
        shutil.rmtree(tmp_path / "run" / name)
    assert run.plan.sample
    take_back(run)
    assert {file.name for file in (tmp_path / "run").iterdir()} <= {"logs"}
    with pytest.raises(AuditError, match="was removed or replaced by another process"):
        make_null_maps(run, NULL_MAPS, range(1), config, None, new=True)
    scan(replace(config, limit=2))
    with pytest.raises(AuditError, match="was removed or replaced by another process"):
        take_back(run)
    assert Run.open(config.output).facts.rows == 2


def test_a_dtype_that_is_slow_here_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("pipelines.loading.slow_dtype", lambda dtype, device: f"{dtype}: slow on {device.type}")
    find_model_folder(ScanConfig((), "run", "testbed", dtype="bfloat16", device="cpu"))
    assert capsys.readouterr().err == "--dtype bfloat16: slow on cpu\n"
