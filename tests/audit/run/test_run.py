"""The run folder: another run is refused field by field with nothing touched; the same one is gone on with."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audit.base.claims import ClaimFacts
from audit.base.errors import AuditError
from audit.base.facts import to_json
from audit.base.fingerprint import diff_lines, digest
from audit.base.publish import this_host
from audit.base.storage import Folder
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import REFINE, SCAN, Stage
from audit.run.status import run_status, stage_status
from audit.scores.scan import ScanConfig, scan
from tests.command import be_audit, tree
from tests.conftest import some_captions


@pytest.fixture
def config(tmp_path: Path, sd1: str) -> ScanConfig:
    """A finished scan of 20 rows in 3 shards, with inputs and model of its own to be changed."""
    model = shutil.copytree(sd1, tmp_path / "model")
    pq.write_table(pa.table({"TEXT": some_captions(20), "txt": some_captions(20)}), tmp_path / "captions.parquet")
    made = ScanConfig(
        (str(tmp_path / "captions.parquet"),), str(tmp_path / "run"), str(model), rows_per_shard=8, second_look=0.0
    )
    assert scan(made).exit_code == 0
    return made


def command(config: ScanConfig, *more: object) -> tuple[object, ...]:
    flags = ("--mask", config.mask, "--rows-per-shard", config.rows_per_shard, "--second-look", config.second_look)
    return ("scan", *config.captions, "-o", config.output, "--model", config.model, *flags, *more)


FLAGS: list[tuple[tuple[object, ...], str]] = [
    (("--seed", 1), "seed: 0 -> 1"),
    (("--steps", 20), "steps: 50 -> 20"),
    (("--num-noises", 2), "num_noises: 1 -> 2"),
    (("--guidance-scale", 5), "guidance_scale: 7.5 -> 5.0"),
    (("--mask", "final"), "mask: first -> final"),
    (("--mask-token", "bos"), "mask_token: eos -> bos"),
    (
        ("--mask-layers", "down_blocks.1.attentions.0.transformer_blocks.0.attn2"),
        "mask_layers.0: absent -> down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    ),
    (("--store-masks", "none"), "store_masks: bits -> none"),
    (("--dtype", "bfloat16"), "dtype: float32 -> bfloat16"),
    (("--rows-per-shard", 4), "rows_per_shard: 8 -> 4"),
    (("--limit", 10), "limit: None -> 10"),
    (("--caption-col", "txt"), "inputs.0.caption_col: TEXT -> txt"),
    (("--keep-cols", "txt"), "keep_cols: None -> absent"),
    (("--extra-evaluation",), "extra_evaluation: False -> True"),
]


@pytest.mark.faults
@pytest.mark.parametrize("flags, line", FLAGS, ids=lambda value: str(value[0]) if isinstance(value, tuple) else "")
def test_another_flag_is_refused_with_nothing_touched(config: ScanConfig, flags: Any, line: str) -> None:
    before = tree(Path(config.output))
    found = be_audit(*command(config, *flags))
    assert found.code == 2
    assert f"{config.output}: holds a different run; nothing was touched. What differs (there -> now):\n" in found.err
    assert f"  {line}\n" in found.err
    assert tree(Path(config.output)) == before


def change_captions(config: ScanConfig) -> str:
    path = Path(config.captions[0])
    table = pq.read_table(path).to_pydict()
    table["TEXT"][7] = "another caption"
    pq.write_table(pa.table(table), path)
    return "inputs.0.footer_sha256: "


def change_weights(config: ScanConfig) -> str:
    weights = next(Path(config.model, "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    return "model.weights_sha256: "


def change_schedule(config: ScanConfig) -> str:
    path = Path(config.model, "scheduler", "scheduler_config.json")
    path.write_text(path.read_text().replace("0.012", "0.013"))
    return "scheduler.beta_end: 0.012 -> 0.013"


@pytest.mark.faults
@pytest.mark.parametrize("change", (change_captions, change_weights, change_schedule))
def test_changed_files_are_refused_with_nothing_touched(config: ScanConfig, change: Any) -> None:
    line = change(config)
    before = tree(Path(config.output))
    found = be_audit(*command(config))
    assert found.code == 2 and f"\n  {line}" in found.err
    assert tree(Path(config.output)) == before


def test_another_file_is_refused(config: ScanConfig, tmp_path: Path) -> None:
    more = tmp_path / "more.parquet"
    shutil.copy(config.captions[0], more)
    found = be_audit(*command(config, more))
    assert found.code == 2 and f"  inputs.1.path: absent -> {more}\n" in found.err


def test_what_changes_no_result_may_change(config: ScanConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(Path(config.output))
    monkeypatch.chdir(tmp_path)  # paths are recorded whole
    flags = ("--batch-size", 3, "--workers", 2, "--max-error-rate", 0.9, "--device", "cpu", "--dtype", "float32")
    relative = replace(config, captions=("captions.parquet",), output="run", model="model")
    assert "nothing to do" in be_audit(*command(relative, *flags)).out
    moved = shutil.move(config.model, tmp_path / "elsewhere")
    assert "nothing to do" in be_audit(*command(replace(config, model=str(moved)))).out
    assert tree(Path(config.output)) == before


def test_a_run_can_be_moved_and_gone_on_with(config: ScanConfig, tmp_path: Path) -> None:
    moved = Path(shutil.move(config.output, tmp_path / "moved"))
    before = tree(moved)
    (moved / "_commits" / "scan" / "00001.json").unlink()
    assert scan(replace(config, output=str(moved))).committed_now == 1
    after = tree(moved)
    assert set(after) == set(before)
    assert [name for name in after if after[name] != before[name] and not name.startswith("logs/")] == [
        "_commits/scan/00001.json",
        "scores/000/00001.arrow",
    ]


def test_a_folder_used_again_for_another_run(config: ScanConfig, tmp_path: Path) -> None:
    """In one process, as in a notebook: nothing of the earlier run is remembered."""
    shutil.rmtree(config.output)
    captions = [*some_captions(10), *some_captions(10)]
    pq.write_table(pa.table({"TEXT": captions}), tmp_path / "captions.parquet")
    assert scan(config).exit_code == 0
    found = read_scores(Run.open(config.output))
    assert found["caption"].to_pylist() == captions
    assert [of is not None for of in found["duplicate_of"].to_pylist()] == [False] * 10 + [True] * 10
    assert be_audit("verify", config.output, "--deep").code == 0


@pytest.mark.faults
def test_planning_that_was_killed_begins_anew(config: ScanConfig) -> None:
    folder = Path(config.output)
    claim = ClaimFacts(asdict(Run.open(config.output).fingerprint), this_host(), 4_190_000)  # above the largest pid
    (folder / "run.json").unlink()
    Folder(folder).write("_claims/1.json", to_json(claim))
    for name in ("_commits", "scores", "stages", "null_maps"):
        shutil.rmtree(folder / name)
    (folder / ".plan.arrow.somehost.1.tmp").write_bytes(b"half a pl")
    assert scan(config).committed_now == 3
    assert not (folder / "_claims").exists()


@pytest.mark.faults
def test_leftovers_of_dead_processes_alone_are_swept(config: ScanConfig) -> None:
    host = this_host()
    dead = 4_190_000  # above the largest pid
    folder = Path(config.output, "scores", "000")
    kept = [folder / f".00009.arrow.{host}.{os.getpid()}.1f.tmp", folder / f".00009.arrow.otherhost.{dead}.1f.tmp"]
    for path in (*kept, folder / f".00009.arrow.{host}.{dead}.1f.tmp"):
        path.write_bytes(b"x")
    scan(config)
    assert sorted(path for path in folder.iterdir() if path.name.startswith(".")) == sorted(kept)


def test_run_json_says_what_was_asked(config: ScanConfig) -> None:
    facts = json.loads(Path(config.output, "run.json").read_text())
    assert facts["config"]["captions"] == list(config.captions) and facts["config"]["rows_per_shard"] == 8
    assert (facts["rows"], facts["unique"], facts["empty"], facts["shards"]) == (20, 20, 0, 3)
    assert facts["digest"] == digest(facts["fingerprint"])
    assert {"torch", "diffusers", "pyarrow", "python"} <= set(facts["versions"])
    assert not {"device", "batch_size", "workers", "output"} & set(facts["fingerprint"])


def test_status_counts_commits_alone(config: ScanConfig) -> None:
    Path(config.output, "_commits", "scan", "00002.json").unlink()
    scores = Path(config.output, "scores", "000", "00001.arrow")
    scores.write_bytes(scores.read_bytes()[:-1])
    found = run_status(config.output)
    stage = found.stages[0]
    assert (stage.stage, stage.shards, stage.done, stage.rows, stage.rows_done) == ("scan", 3, 1, 20, 8)
    assert stage.counts["ok"] == 8 and not stage.complete and stage.rate > 0
    assert stage.eta == pytest.approx(12 / stage.rate)
    lines = found.lines()
    assert lines[0] == f"{config.output}: 20 rows, 20 unique captions, model {config.model}"
    assert "1/3 shards, 8/20 rows (8 ok)" in lines[1] and "s left" in lines[1]
    printed = be_audit("status", config.output, "--json")
    told = json.loads(printed.out)["stages"][0]
    assert printed.code == 0 and (told["done"], told["complete"]) == (1, False) and told["eta_seconds"] > 0


def test_rate_counts_parallel_work_once_and_pauses_not_at_all(config: ScanConfig) -> None:
    stage = Stage.open(Run.open(config.output), SCAN)
    # two workers side by side for two seconds; a restart later, one alone for two more
    for shard, second in ((0, "10"), (1, "10"), (2, "40")):
        path = Path(config.output, stage.ledger.name(shard))
        made = json.loads(path.read_text())
        made["finished"], made["seconds"]["wall"] = f"2026-01-01T00:00:{second}+00:00", 2.0
        path.write_text(json.dumps(made))
    rate = stage_status(stage).rate
    assert rate == pytest.approx((8 + 8 + 4) / (2 + 2))


@dataclass(frozen=True)
class TopK:
    """A stage's fingerprint."""

    top_k: int


def items(captions: list[str]) -> pa.Table:
    return pa.table({"shard": pa.array([0] * len(captions), pa.int32()), "caption": captions})


def test_a_stage_begun_differently_is_refused_or_replaced(config: ScanConfig) -> None:
    run = Run.open(config.output)
    stage = Stage.begin(run, REFINE, TopK(3), items(["a", "b"]))
    stage.ledger.commit(0, pa.table({"x": [1, 2]}))
    assert stage.complete
    again = Stage.begin(run, REFINE, TopK(3), items(["other"]))
    assert again.items["caption"].to_pylist() == ["a", "b"] and again.complete
    before = tree(Path(config.output))
    with pytest.raises(AuditError, match=r"refine was begun differently; nothing was touched.*\n  top_k: 3 -> 4\n"):
        Stage.begin(run, REFINE, TopK(4), items(["c"]))
    assert tree(Path(config.output)) == before
    replaced = Stage.begin(run, REFINE, TopK(4), items(["c"]), replace=True)
    assert not replaced.complete and replaced.items["caption"].to_pylist() == ["c"]
    assert [path.name for path in Path(config.output, "refined").iterdir()] == []
    assert np.array_equal(read_scores(run)["row_id"].to_numpy() >> 32, [0] * 8 + [1] * 8 + [2] * 4)


def test_differences_are_named_by_their_place() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "same": None}
    new = {"a": {"b": 2, "c": [1, 3, 4]}, "same": None, "more": True}
    assert diff_lines(old, new) == ["a.b: 1 -> 2", "a.c.1: 2 -> 3", "a.c.2: absent -> 4", "more: absent -> True"]
    assert diff_lines(old, old) == []
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_a_run_of_an_earlier_format_is_refused_by_name(config: ScanConfig) -> None:
    """Its `ld` may be under the energy map: it is neither read nor gone on with."""
    path = Path(config.output, "run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    before = tree(Path(config.output))
    for words in (command(config), ("status", config.output), ("report", config.output)):
        found = be_audit(*words)
        assert found.code == 2 and "a run of format 1" in found.err and "scan again into a new folder (-o)" in found.err
    assert tree(Path(config.output)) == before


@pytest.mark.faults
@pytest.mark.parametrize("content", (b"{", b"[]", b'{"format": 3}', b'{"format": 3, "rows": "many"}'))
def test_a_run_json_that_lacks_fields_is_one_line(config: ScanConfig, content: bytes) -> None:
    Path(config.output, "run.json").write_bytes(content)
    found = be_audit("status", config.output)
    assert found.code == 2 and "run.json: cannot be read" in found.err and len(found.err.splitlines()) == 1
