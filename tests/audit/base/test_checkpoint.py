"""A checkpoint of commits is a cache: torn, edited, stale or of another run, it never changes what is reported."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest

from audit.base import checkpoint, storage
from audit.base.commits import Ledger
from audit.base.committed import Commit, Committed, Worker, columns_of
from audit.base.errors import AuditError, Damaged
from audit.base.storage import Folder

COUNT = 24
PLACE = "_commits/scan/checkpoint"

PLACES = ["disk", pytest.param("s3", marks=pytest.mark.processes)]


def commit_of(shard: int, size: int, **changes: object) -> Commit:
    """Commits whose counts and steps do not all have the same names."""
    made = Commit(
        stage="scan",
        shard=shard,
        file=f"scores/000/{shard:05d}.arrow",
        rows=10 + shard,
        bytes=size,
        sha256=hashlib.sha256(str(shard).encode()).hexdigest(),
        fingerprint="print",
        counts={"ok": shard, "error": 1} if shard % 3 else {"empty": 2},
        seconds={"score": 0.5 * shard, "wall": shard} if shard % 2 else {},
        worker=Worker(f"host{shard % 2}", 100 + shard, shard % 4),
        finished=f"2026-01-01T00:{shard % 60:02d}:00+00:00",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def put(ledger: Ledger, made: Commit) -> None:
    ledger.folder.write(ledger.name(made.shard), json.dumps(asdict(made), indent=1).encode())


def old_done(ledger: Ledger) -> dict[int, Commit]:
    """Every commit read by itself, and every file asked for its size: what needs no listing and no checkpoint."""
    found = (ledger.read(shard) for shard in range(COUNT + 5))
    return {made.shard: made for made in found if made and ledger.problem(made) is None}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten commits are many here, and a stamp is believed after a hundredth of a second."""
    monkeypatch.setattr("audit.base.commits.MANY", 10)
    monkeypatch.setattr(storage, "YOUNG", 10_000_000)


@pytest.fixture
def ledger(folder: Folder) -> Ledger:
    """Twenty-four commits with their files."""
    made = Ledger(folder, "scan", "print", "scores")
    for shard in range(COUNT):
        folder.write(made.file(shard), b"x" * (100 + shard))
        put(made, commit_of(shard, 100 + shard))
    time.sleep(0.05)
    return made


def watched(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose commit is read from its file from now on."""
    seen: list[int] = []
    read = Ledger.read

    def noted(self: Ledger, shard: int) -> Commit | None:
        seen.append(shard)
        return read(self, shard)

    monkeypatch.setattr(Ledger, "read", noted)
    return seen


def has_stamps(ledger: Ledger) -> bool:
    return "memory" not in str(ledger.folder.url)


def test_what_was_read_once_is_read_from_the_checkpoint(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = old_done(ledger)
    assert len(expected) == COUNT and not ledger.folder.exists(PLACE)
    assert ledger.done() == expected
    assert ledger.folder.exists(PLACE) == has_stamps(ledger)
    seen = watched(ledger, monkeypatch)
    again = ledger.done()
    assert seen == ([] if has_stamps(ledger) else list(range(COUNT)))
    assert again == expected and list(again) == list(range(COUNT))
    assert ledger.shards() == list(range(COUNT)), "it is no commit"


def test_columns_say_what_the_commits_say(ledger: Ledger) -> None:
    for done in (ledger.done(), ledger.done()):  # as read, and from the checkpoint
        every = list(done.values())
        assert done.rows == sum(made.rows for made in every) and done.bytes == sum(made.bytes for made in every)
        assert done.counts == {"empty": 16, "ok": 192, "error": 16}
        assert done.seconds == {"score": 72.0, "wall": 144.0}
        assert done.counted("ok").tolist() == [made.counts.get("ok", 0) for made in every]
        assert done.took("wall").tolist() == [made.seconds.get("wall") for made in every]
        assert done.took("none").tolist() == [None] * COUNT and done.counted("none").tolist() == [0] * COUNT
        assert [dict(each) for each in done.steps().to_pylist()] == [made.seconds for made in every]
        assert done.finished()[1] - done.finished()[0] == 60
        assert 7 in done and 24 not in done and "7" not in done and done.get(99) is None
        assert done.lacking([50, 3, 41]) == [50, 41]
    empty = ledger.done([])
    assert len(empty) == 0 and empty.counts == {} and empty.rows == 0 and empty.finished().tolist() == []
    assert empty.counted("ok").tolist() == [] and empty.lacking([2]) == [2]
    large = Committed([columns_of([commit_of(0, 1, rows=2**61), commit_of(1, 1, rows=2**61)])], "s", "p", str)
    assert large.rows == 2**62


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_columns(path: Path) -> None:
    forge(path, pa.table({"shard": [1, 2, 3]}), "_commits/scan scores print")


def other_run(path: Path) -> None:
    """Whole in itself, with wrong numbers, but of another fingerprint."""
    forge(path, wrong(path), "_commits/scan scores another")


def other_files(path: Path) -> None:
    """Of this very ledger and whole, made from files with other stamps: as after a copy of the folder."""
    table = wrong(path)
    stamps = pa.array([stamp ^ 1 for stamp in table["file_stamp"].to_pylist()], pa.uint64())
    forge(path, table.set_column(table.schema.get_field_index("file_stamp"), "file_stamp", stamps))


def wrong(path: Path) -> pa.Table:
    """Its rows with a thousand rows more in every commit."""
    table = pa.ipc.open_file(path.read_bytes()[64:]).read_all()
    rows = pa.array([rows + 1000 for rows in table["rows"].to_pylist()], pa.int64())
    return table.set_column(table.schema.get_field_index("rows"), "rows", rows)


def forge(path: Path, table: pa.Table, ledger: str = "_commits/scan scores print") -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    path.write_bytes(hashlib.sha256(f"1 {ledger}\n".encode() + data).hexdigest().encode() + data)


DAMAGE: list[Callable[[Path], object]] = [
    cut,
    flip,
    other_columns,
    other_run,
    other_files,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:30]),
    lambda path: path.write_bytes(b"0" * 64 + path.read_bytes()[64:]),
    lambda path: (path.unlink(), path.mkdir()),
    lambda path: path.chmod(0),
]


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_costs_time_alone(ledger: Ledger, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    expected = old_done(ledger)
    ledger.done()
    path = tmp_path / "below" / PLACE
    assert path.exists()
    damage(path)
    assert ledger.done() == expected
    assert dict(ledger.done(range(20))) == {shard: expected[shard] for shard in range(20)}
    assert ledger.shards() == list(range(COUNT))


@pytest.mark.parametrize("folder", ["disk"], indirect=True)  # its files are changed by hand
def test_a_forged_one_is_shown_by_what_a_true_one_is(ledger: Ledger, tmp_path: Path) -> None:
    """The forgeries above differ from what is believed by nothing else: with the right stamps it would be read."""
    ledger.done()
    path = tmp_path / "below" / PLACE
    forge(path, wrong(path))
    assert ledger.done().rows == old_rows(ledger) + 1000 * COUNT


def old_rows(ledger: Ledger) -> int:
    return sum(made.rows for made in old_done(ledger).values())


CHANGES: dict[str, Callable[[Ledger, int], object]] = {
    "commit removed": lambda ledger, shard: ledger.folder.remove(ledger.name(shard)),
    "commit torn": lambda ledger, shard: ledger.folder.write(ledger.name(shard), b"{"),
    "commit empty": lambda ledger, shard: ledger.folder.write(ledger.name(shard), b""),
    "commit replaced": lambda ledger, shard: put(ledger, commit_of(shard, 100 + shard, rows=9999)),
    "commit of another run": lambda ledger, shard: put(ledger, commit_of(shard, 100 + shard, fingerprint="prinz")),
    "same size": lambda ledger, shard: put(ledger, commit_of(shard, 100 + shard, rows=36 - shard)),
    "result removed": lambda ledger, shard: ledger.folder.remove(ledger.file(shard)),
    "result cut": lambda ledger, shard: ledger.folder.write(ledger.file(shard), b"x" * 99),
    "result longer": lambda ledger, shard: ledger.folder.write(ledger.file(shard), b"x" * 2000),
    "another shard": lambda ledger, shard: put(ledger, commit_of(COUNT + 1, 1)),
    "dropped": lambda ledger, shard: ledger.drop(shard),
}


@pytest.mark.parametrize("folder", PLACES, indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_it_is_noticed(ledger: Ledger, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old_done(ledger)
    assert ledger.done() == before
    CHANGES[change](ledger, 12)
    expected = old_done(ledger)
    assert (expected != before) == (change != "another shard")
    for _ in range(2):
        assert ledger.done() == expected
        assert ledger.done(range(20)) == {shard: made for shard, made in expected.items() if shard < 20}
    if change.startswith("result ") or change in ("commit torn", "commit empty", "commit of another run"):
        monkeypatch.setattr("audit.base.commits.HASHED", 0)  # the files hold no tables
        with pytest.raises(Damaged, match=r"00012\.(json|arrow): .*--repair does it again"):
            ledger.whole(range(20))


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
def test_a_commit_changed_in_place_with_its_old_time_is_noticed(ledger: Ledger, tmp_path: Path) -> None:
    ledger.done()
    path = tmp_path / "below" / ledger.name(12)
    before = path.stat()
    text = path.read_text()
    path.write_text(text.replace('"rows": 22', '"rows": 23'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert ledger.done()[12].rows == 23


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
def test_what_was_changed_a_moment_ago_is_not_remembered(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be changed again within one tick of the clock, which no time would show."""
    monkeypatch.setattr(storage, "YOUNG", 3_000_000_000)
    ledger.done()
    assert not ledger.folder.exists(PLACE)
    seen = watched(ledger, monkeypatch)
    assert len(ledger.done()) == COUNT and seen == list(range(COUNT))


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
def test_it_grows_and_is_left_alone_for_few(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(10, COUNT):
        ledger.folder.remove(ledger.name(shard))
    assert len(ledger.done()) == 10 and not ledger.folder.exists(PLACE), "ten are not worth it"
    for shard in range(10, 20):
        put(ledger, commit_of(shard, 100 + shard))
    time.sleep(0.05)
    assert len(ledger.done(range(18))) == 18
    seen = watched(ledger, monkeypatch)
    for _ in range(2):
        assert len(ledger.done()) == 20
    assert seen == [18, 19] * 2, "nor are two"
    for shard in range(COUNT):
        put(ledger, commit_of(shard, 100 + shard, rows=shard))
    time.sleep(0.05)
    seen.clear()
    for _ in range(2):
        assert ledger.done().rows == 276
    assert seen == list(range(COUNT))


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_where_it_cannot_be_written_nothing_is_said(
    ledger: Ledger, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    expected = old_done(ledger)
    monkeypatch.setattr(os, "replace", refuse)
    assert ledger.done() == expected and ledger.done() == expected
    assert not ledger.folder.exists(PLACE) and sorted(os.listdir(ledger.folder.path("_commits/scan")))[0][0] != "."
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
def test_a_copy_of_the_folder_reads_its_own_files(ledger: Ledger, tmp_path: Path) -> None:
    ledger.done()
    shutil.copytree(tmp_path / "below", tmp_path / "copy")
    copy = Ledger(Folder(tmp_path / "copy"), "scan", "print", "scores")
    put(copy, commit_of(3, 103, rows=777))
    assert copy.done() == old_done(copy) and copy.done()[3].rows == 777


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
def test_none_is_left_of_a_stage_that_was_discarded_meanwhile(ledger: Ledger) -> None:
    def gone() -> None:
        raise AuditError("discarded")

    ledger.still = gone
    assert len(ledger.done()) == COUNT and not ledger.folder.exists(PLACE)


CODE = """
import sys, time
from audit.base import checkpoint, commits, storage
from audit.base.storage import Folder
commits.MANY, storage.YOUNG = 10, 10_000_000
ledger = commits.Ledger(Folder(sys.argv[1]), "scan", "print", "scores")
if sys.argv[2] == "kill":
    import os
    publish = os.replace
    def slow(*names):
        print("written", flush=True)
        time.sleep(100)
    os.replace = slow
print(len(ledger.done()), ledger.done().rows, flush=True)
"""


@pytest.mark.faults
@pytest.mark.parametrize("folder", ["disk"], indirect=True)
def test_killed_while_it_writes_leaves_nothing_that_counts(ledger: Ledger, tmp_path: Path) -> None:
    """SIGKILL between the bytes and the name."""
    expected, root = old_done(ledger), tmp_path / "below"
    process = subprocess.Popen([sys.executable, "-c", CODE, str(root), "kill"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in (root / "_commits/scan").iterdir() if path.name.startswith(".checkpoint.")]
    assert len(left) == 1 and not (root / PLACE).exists()
    assert ledger.shards() == list(range(COUNT)) and ledger.done() == expected
    ledger.folder.sweep()
    assert not left[0].exists() and (root / PLACE).exists() and ledger.done() == expected


@pytest.mark.processes
@pytest.mark.parametrize("folder", PLACES, indirect=True)
def test_processes_that_write_it_at_once_all_see_every_commit(ledger: Ledger) -> None:
    expected = f"{COUNT} {old_rows(ledger)}\n"
    words = [sys.executable, "-c", CODE, ledger.folder.url, "read"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: subprocess.run(words, capture_output=True, text=True), range(4)))
    assert [each.stdout for each in found] == [expected] * 4, found[0].stderr
    assert ledger.folder.exists(PLACE) and ledger.done() == old_done(ledger)


@pytest.mark.parametrize("folder", PLACES, indirect=True)
def test_names_that_are_no_commits_are_none(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a store is asked in parts."""
    for name in ("7.json", "000025.json", "x.json", "00025.json.bak", "deep/00026.json"):
        ledger.folder.write(f"_commits/scan/{name}", json.dumps(asdict(commit_of(25, 1))).encode())
    expected = old_done(ledger)
    for parted in (10**9, 10):
        monkeypatch.setattr("audit.base.commits.PREFIXED", parted)
        assert ledger.done(range(COUNT + 5)) == expected and len(expected) == COUNT


@pytest.mark.parametrize("folder", PLACES, indirect=True)
def test_the_table_is_checked_before_pyarrow_reads_it(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow may end the process over a damaged file."""
    ledger.done()
    data = bytearray(ledger.folder.read(PLACE))
    data[-1] ^= 1
    ledger.folder.write(PLACE, bytes(data))
    monkeypatch.setattr(checkpoint.pa.ipc, "open_file", lambda *_: pytest.fail("it was read"))
    assert len(ledger.done()) == COUNT
