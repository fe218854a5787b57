"""Damage is named and repaired, and repairing touches nothing that is whole."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from audit.base.commits import table_bytes
from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import REFINE, SCAN, Stage
from audit.run.verify import verify_run
from audit.scores.scan import ScanConfig, scan
from tests.command import be_audit, tree
from tests.conftest import some_captions

pytestmark = pytest.mark.faults

SHARDS = 5
LATER = 5  # three of second null maps, two of second looks


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, sd1: str) -> ScanConfig:
    """A finished scan of 20 rows in 5 shards with duplicates, an empty row and refined rows."""
    root = tmp_path_factory.mktemp("verify")
    captions: list[str | None] = [*some_captions(16), None, "a tiny lamp number 3", some_captions(2)[1], " "]
    pq.write_table(pa.table({"TEXT": captions}), root / "captions.parquet")
    config = ScanConfig((str(root / "captions.parquet"),), str(root / "run"), sd1, rows_per_shard=4)
    config = replace(config, refine=0.2, steps=3)
    assert scan(config).exit_code == 0
    return config


@pytest.fixture
def run(original: ScanConfig, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original.output, tmp_path / "run"))


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flipped(path: Path) -> None:
    """One bit, the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def damage_replaced(path: Path) -> None:
    """By that of another shard."""
    other = path.with_name(path.name.replace("00002", "00003"))
    shutil.copy(other, path)


SCORE, COMMIT = "scores/000/00002.arrow", "_commits/scan/00002.json"
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (SCORE, damage_missing, f"{SCORE}: missing"),
    (SCORE, damage_empty, f"{SCORE}: 0 bytes where the commit says"),
    (SCORE, damage_truncated, f"{SCORE}: "),
    (SCORE, damage_flipped, f"{SCORE}: contents do not match the commit's sha256"),
    (SCORE, damage_replaced, f"{SCORE}: "),
    (COMMIT, damage_missing, f"{COMMIT}: no commit"),
    (COMMIT, damage_empty, f"{COMMIT}: cannot be read or is of another run"),
    (COMMIT, damage_truncated, f"{COMMIT}: cannot be read or is of another run"),
    (COMMIT, damage_replaced, f"{COMMIT}: cannot be read or is of another run"),
    ("refined/*/000/{}.arrow", damage_flipped, "refined/"),
    ("_commits/refine/*/{}.json", damage_empty, "_commits/refine/"),
]


@pytest.mark.parametrize("name, damage, line", DAMAGE, ids=[f"{d[0]} {d[1].__name__[7:]}" for d in DAMAGE])
def test_damage_is_named_and_repaired_alone(
    run: Path, original: ScanConfig, name: str, damage: Callable[[Path], None], line: str
) -> None:
    refined = sorted(path.stem for path in (run / "_commits" / "refine").rglob("*.json"))
    name = str(next(run.glob(name.format(refined[0]))).relative_to(run))
    scores, before = read_scores(Run.open(original.output)), tree(run)
    damage(run / name)
    damaged = tree(run)
    found = be_audit("verify", run)
    assert found.code == 3
    assert len(found.err.splitlines()) == 1 and line in found.err
    shards = SHARDS + len(refined) + 1 + LATER  # and one of null maps
    assert found.out == f"{run}: {shards} shards checked, 1 not whole.\n"
    assert tree(run) == damaged  # looking changes nothing
    found = be_audit("verify", run, "--repair")
    assert found.code == 0, found
    assert found.out.endswith(f"{shards} shards checked, all whole. 1 shards were done again.\n")
    after = tree(run)
    stage = Stage.open(Run.open(str(run)), REFINE if "refine" in name else SCAN)
    redone = {stage.file(int(Path(name).stem)), stage.ledger.name(int(Path(name).stem))}
    before, after = ({path: seen for path, seen in each.items() if "logs/" not in path} for each in (before, after))
    assert set(after) == set(before)
    assert {path for path in before if after[path] != before[path]} == redone
    again = read_scores(Run.open(str(run)))
    assert again["caption"].equals(scores["caption"]) and again["duplicate_of"].equals(scores["duplicate_of"])
    for column in ("ld", "magnitude", "ld_all"):
        one, other = (table[column].to_numpy().astype(float) for table in (again, scores))
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_all_damage_is_found_at_once(run: Path) -> None:
    (run / "scores/000/00000.arrow").unlink()
    (run / "scores/000/00003.arrow").write_bytes(b"")
    (run / "_commits/scan/00001.json").write_text("{}")
    (run / "_commits/scan/00002.json").write_text('["a", "list"]')
    found = verify_run(str(run))
    assert found.bad == {"scan": [0, 1, 2, 3]} and len(found.problems) == 4
    assert verify_run(str(run), repair=True).repaired == 4
    assert verify_run(str(run), deep=True).whole


def test_an_unfinished_run_is_not_whole_and_repair_finishes_it(original: ScanConfig, tmp_path: Path) -> None:
    run = Path(shutil.copytree(original.output, tmp_path / "run"))
    (run / SCORE).unlink()
    (run / COMMIT).unlink()
    found = be_audit("verify", run)
    assert (found.code, found.err) == (3, "scan: 1 of 5 shards not done yet (2)\n")
    assert be_audit("verify", run, "--repair").code == 0


def test_repair_from_another_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (run / SCORE).unlink()
    assert be_audit("verify", run, "--repair").code == 0
    assert list(elsewhere.iterdir()) == []


# --- what only --deep can see: files that are whole but hold the wrong rows ------------------------------------------


def rewrite(run: Path, change: Callable[[pa.Table], pa.Table], shard: int = 2) -> None:
    """Replace a shard's rows and its commit, as a bug or a forger would."""
    opened = Run.open(str(run))
    ledger = Stage.open(opened, SCAN).ledger
    made = ledger.read(shard)
    assert made is not None
    ledger.commit(shard, change(ledger.table(shard)), made.counts)


def set_column(table: pa.Table, name: str, values: list[object]) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), [pa.array(values, table.schema.field(place).type)])


def row_twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 2), table.slice(1, 2)])


def row_lost(table: pa.Table) -> pa.Table:
    return table.slice(1)


def other_captions(table: pa.Table) -> pa.Table:
    return set_column(table, "caption", ["x", *table["caption"].to_pylist()[1:]])


def no_score(table: pa.Table) -> pa.Table:
    return set_column(table, "ld_energy", [None, *table["ld_energy"].to_pylist()[1:]])


def not_finite(table: pa.Table) -> pa.Table:
    return set_column(table, "magnitude", [float("nan"), *table["magnitude"].to_pylist()[1:]])


def no_duplicate(table: pa.Table) -> pa.Table:
    return set_column(table, "duplicate_of", [None] * 4)


def no_empties(table: pa.Table) -> pa.Table:
    return set_column(table, "status", ["ok"] * 4)


@pytest.mark.parametrize(
    "shard, change, line",
    [
        (2, row_twice, "row ids are not as planned"),
        (2, row_lost, "3 rows where 4 were planned"),
        (2, other_captions, "captions are not those of the input"),
        (2, no_score, "a scored row has no finite ld_energy"),
        (2, not_finite, "a scored row has no finite magnitude"),
        (4, no_duplicate, "duplicates are not as planned"),
        (4, no_empties, "empty captions are not marked as such"),
    ],
)
def test_wrong_rows_are_found_by_deep(run: Path, shard: int, change: Callable[[pa.Table], pa.Table], line: str) -> None:
    rewrite(run, change, shard)
    assert be_audit("verify", run).code == 0
    found = be_audit("verify", run, "--deep")
    assert (found.code, found.err) == (3, f"scores/000/{shard:05d}.arrow: {line}\n")
    assert be_audit("verify", run, "--deep", "--repair").code == 0


def reseal(run: Path, name: str) -> None:
    """What a forger does who knows of the seals."""
    facts = json.loads((run / "run.json").read_text())
    data = (run / name).read_bytes()
    facts["sealed"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (run / "run.json").write_text(json.dumps(facts))


def test_a_hash_collision_is_found_by_deep(run: Path) -> None:
    """Duplicates rest on 64-bit hashes; here two captions are called equal that are not."""
    folder = Folder(run)
    reader = pa.ipc.open_file(pa.BufferReader(folder.read("duplicates.arrow")))
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    false = [pa.array(values, pa.int64()) for values in ([(4 << 32) | 1, (4 << 32) | 2], [2, 2])]
    batches[4] = pa.record_batch(false, schema=batches[4].schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, reader.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    folder.write("duplicates.arrow", sink.getvalue().to_pybytes())
    plan = pa.ipc.open_file(pa.BufferReader(folder.read("plan.arrow"))).read_all()
    digests = plan["duplicates_xxh3"].to_pylist()
    digests[4] = xxhash.xxh3_64_intdigest(b"".join(array.to_numpy().tobytes() for array in false))
    place = plan.schema.get_field_index("duplicates_xxh3")
    folder.write(
        "plan.arrow", table_bytes(plan.set_column(place, plan.schema.field(place), [pa.array(digests, pa.uint64())]))
    )
    for name in ("duplicates.arrow", "plan.arrow"):
        reseal(run, name)
    rewrite(run, lambda table: set_column(table, "duplicate_of", [None, 2, 2, None]), 4)
    found = be_audit("verify", run, "--deep")
    assert found.code == 3 and "a row is called a duplicate of another caption in shard" in found.err


def test_an_input_that_was_deleted_is_one_line(original: ScanConfig, tmp_path: Path, sd1: str) -> None:
    captions = Path(shutil.copy(original.captions[0], tmp_path / "gone.parquet"))
    run = tmp_path / "run"
    scan(replace(original, captions=(str(captions),), output=str(run), refine=0.0))
    captions.unlink()
    importlib.import_module("audit.captions")._open.cache_clear()  # each command is a process of its own
    assert be_audit("verify", run).code == 0  # commits alone
    (run / SCORE).unlink()
    before = tree(run)
    found = be_audit("verify", run, "--repair")
    assert found.code == 2 and found.err == f"Error: {captions}: no such file or folder\n"
    found = be_audit("verify", run, "--deep")
    assert found.code == 2 and str(captions) in found.err
    assert tree(run) == before


def test_repair_leaves_what_was_committed_while_it_looked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine does shard 2 after it was looked at: its commit stays, the work is not done again."""
    score, commit = (run / name for name in (SCORE, COMMIT))
    kept = {path: path.read_bytes() for path in (score, commit)}
    lost = list(kept)
    for path in lost:
        path.unlink()

    verify = importlib.import_module("audit.run.verify")
    check = verify._check

    def look(*arguments: object) -> object:
        found = check(*arguments)  # type: ignore[arg-type]
        while lost:  # the first time
            path = lost.pop()
            path.write_bytes(kept[path])
        return found

    monkeypatch.setattr(verify, "_check", look)
    found = verify_run(str(run), repair=True)
    assert found.whole and commit.read_bytes() == kept[commit]


def test_repair_redoes_a_refinement_that_a_later_command_asked_for(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["refine"] = 0.0  # as a scan without --refine records, which one with it went on with
    (run / "run.json").write_text(json.dumps(facts))
    part = next((run / "refined").rglob("*.arrow"))
    whole = part.read_bytes()
    damage_truncated(part)
    found = be_audit("verify", run, "--repair")
    assert found.code == 0 and "1 shards were done again" in found.out, found
    assert len(part.read_bytes()) == len(whole)


def test_a_damaged_list_of_rows_is_named(run: Path) -> None:
    damage_truncated(next(run.glob("stages/refine-*/items.arrow")))
    found = be_audit("verify", run)
    assert found.code == 3 and "/items.arrow: damaged: " in found.err and found.err.count("\n") == 1
    assert be_audit("verify", run, "--repair").code == 0
    assert be_audit("verify", run).code == 0


def test_another_fraction_is_refused_or_replaces(original: ScanConfig, run: Path) -> None:
    other = replace(original, output=str(run), refine=0.5)
    with pytest.raises(AuditError, match="--replace"):
        scan(other)
    assert scan(replace(other, replace=True)).refined == 8  # half of the 16 distinct captions


SHORT = """
import resource, sys
from audit.base.errors import AuditError
from audit.run.run import Run
from audit.run.stage import SCAN, Stage
stage = Stage.open(Run.open(sys.argv[1]), SCAN)
made = stage.ledger.read(0)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 20), resource.RLIM_INFINITY))  # no room for a thread's stack
for look in (lambda: stage.ledger.problem(made, deep=True), lambda: stage.table(0)):
    try:
        print("no error:", look())
    except AuditError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on address space is Linux's")
def test_a_machine_without_room_for_a_thread_finds_nothing_damaged(run: Path) -> None:
    """What is whole would be taken back by a repair, and done again for hours, because of where it was read."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SHORT, str(run)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("StorageError ") for line in lines), done.stdout
    assert all("too little memory" in line and "damaged" not in line for line in lines), done.stdout


@pytest.mark.parametrize("name", ["second_look", "second_null_maps", "refine"])
def test_a_stage_whose_own_file_is_lost_is_not_as_if_it_had_never_been(run: Path, tmp_path: Path, name: str) -> None:
    (run / f"stages/{name}.json").unlink()
    said = f"stages/{name}.json: missing, while results of that stage are there"
    for command in (("verify", run), ("report", run, "--format", "csv", "-o", tmp_path / "report")):
        done = be_audit(*command)
        assert done.code == 3 and said in done.out + done.err, done
    assert said in be_audit("status", run).out


LATER_STAGES = ("second_null_maps", "second_look", "refine")


def killed_before(run: Path, *names: str) -> None:
    """As a scan leaves its run that was killed when its last shard was committed."""
    for name in names:
        for path in (*run.glob(f"stages/{name}*"), run / "_commits" / name, run / name, run / "refined"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_a_scan_that_was_killed_before_its_second_look_does_not_pass_for_whole(run: Path, tmp_path: Path) -> None:
    expected = read_scores(Run.open(str(run)))
    killed_before(run, *LATER_STAGES)
    said = ("second_look: not begun yet", "refine: not begun yet")
    report = ("report", run, "--format", "csv", "-o", tmp_path / "report")
    for command, code in ((("verify", run), 3), (report, 3), (("status", run), 0), (("calibrate", run), 2)):
        done = be_audit(*command)
        assert done.code == code and said[0] in done.out + done.err, done
    assert be_audit("verify", run, "--repair").code == 0
    assert read_scores(Run.open(str(run))).equals(expected)


def test_who_wants_no_second_look_any_more_says_so_once(run: Path, original: ScanConfig) -> None:
    killed_before(run, *LATER_STAGES)
    again = ("scan", *original.captions, "-o", run, "--model", original.model, "--rows-per-shard", 4, "--steps", 3)
    assert be_audit(*again, "--second-look", 0).code == 0
    assert be_audit("verify", run).code == 0 and "not begun" not in be_audit("status", run).out
    assert be_audit(*again, "--refine", 0.2).code == 0  # and may change their mind
    assert "refine" in be_audit("status", run).out and be_audit("verify", run).code == 0


def test_a_stage_whose_ground_was_begun_anew_is_said(run: Path, original: ScanConfig) -> None:
    """The maps are lost and made again: the second look that rests on them is nobody's until it is done again."""
    killed_before(run, "refine")
    (run / "stages/second_null_maps.json").unlink()
    stage, before = run / "stages/second_look.json", (run / "stages/second_look.json").read_bytes()
    again = ("scan", *original.captions, "-o", run, "--model", original.model, "--rows-per-shard", 4, "--steps", 3)
    assert be_audit(*again).code == 0 and stage.read_bytes() != before
    assert be_audit("verify", run).code == 0
    stage.write_bytes(before)  # as a scan leaves it that is killed between the two
    said = "stages/second_look.json: rests on a stage that was begun anew"
    for command, code in ((("verify", run), 3), (("status", run), 0), (("calibrate", run), 2)):
        done = be_audit(*command)
        assert done.code == code and said in done.out + done.err, done


def test_what_a_discarded_stage_left_is_not_taken_for_a_lost_one(run: Path, tmp_path: Path) -> None:
    killed_before(run, "refine")
    (run / "_commits/refine/0a1b2c3d").mkdir(parents=True)
    (run / "_commits/refine/0a1b2c3d/00000.json").write_text("{}")  # its file and its items went first
    done = be_audit("status", run)
    assert "missing, while results" not in done.out
