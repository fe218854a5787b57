"""Files appear whole or not at all, on a disk and on a real S3 server; a whole audit there."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from botocore.utils import parse_timestamp

from audit.base.commits import Ledger
from audit.base.errors import AuditError, Damaged
from audit.base.listings import EVENT, objects_of, time_of_listing
from audit.base.publish import this_host
from audit.base.storage import Folder, _entry_of, join
from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from audit.run.stage import SCAN, Stage
from tests.command import be_audit, start
from tests.conftest import some_captions


def test_files_are_written_read_listed_and_removed(folder: Folder) -> None:
    assert not folder.exists("a/b.txt") and folder.list() == [] and folder.list("a") == []
    folder.write("a/b.txt", b"one")
    folder.write("a/b.txt", b"three")
    folder.write("a/c.txt", b"")
    folder.write("d.txt", b"x")
    assert folder.exists("a/b.txt") and folder.read("a/b.txt") == b"three" and folder.size("a/b.txt") == 5
    assert folder.list() == ["a", "d.txt"] and folder.list("a") == ["b.txt", "c.txt"]
    with folder.open("a/b.txt") as file:
        file.seek(2)
        assert file.read() == b"ree"
    for missing in (folder.read, folder.size):
        with pytest.raises(FileNotFoundError):
            missing("a/none.txt")
    folder.remove("a")
    folder.remove("a")
    assert folder.list() == ["d.txt"]


def test_large_files_are_published_whole(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20))
    folder.put("big/file", source)
    assert folder.read("big/file") == source.read_bytes() and source.exists()
    assert folder.list("big") == ["file"]


def test_a_ledger_believes_files_not_names(folder: Folder) -> None:
    ledger = Ledger(folder, "scan", "print", "scores")
    table = pa.table({"x": [1, 2, 3]})
    made = ledger.commit(7, table, {"ok": 3}, {"score": 1.23456})
    assert ledger.read(7) == made and (made.rows, made.counts, made.seconds) == (3, {"ok": 3}, {"score": 1.2346})
    assert ledger.done([6, 7]) == {7: made} and ledger.shards() == [7]
    assert ledger.table(7).equals(table) and ledger.table(7, ["x"]).num_rows == 3
    assert ledger.problem(made, deep=True) is None
    assert Ledger(folder, "scan", "another", "scores").read(7) is None
    assert Ledger(folder, "other", "print", "scores").read(7) is None
    assert Ledger(folder, "scan", "print", "scores", "second").read(7) is None
    folder.write(made.file, folder.read(made.file)[:-1] + b"?")
    assert ledger.problem(made) is None and "sha256" in str(ledger.problem(made, deep=True))
    with pytest.raises(Damaged, match="sha256"):
        ledger.table(7)
    folder.write(made.file, b"")
    assert "0 bytes" in str(ledger.problem(made)) and ledger.done() == {}
    folder.remove(made.file)
    assert "missing" in str(ledger.problem(made))
    assert (ledger.record_attempt(7, "first"), ledger.record_attempt(7, "second")) == (1, 2)
    assert [tries.error for tries in ledger.attempts(7)] == ["first", "second"]
    ledger.drop(7)
    assert ledger.shards() == [] and ledger.attempts(7) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("x", b"old")
    (tmp_path / "blocked").write_bytes(b"a file where a folder should be")
    with pytest.raises(AuditError, match="blocked/y: cannot be written"):
        folder.write("blocked/y", b"new")
    with pytest.raises(TypeError):
        folder.write("x", "not bytes")  # type: ignore[arg-type]
    assert folder.read("x") == b"old"


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    code = f"""
import resource, signal
from audit.base.errors import AuditError
from audit.base.storage import Folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Folder({str(tmp_path)!r}).write("a/x", b"0" * 5000)
except AuditError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/a/x: cannot be written: File too large\n", done.stderr
    assert list((tmp_path / "a").iterdir()) == []


def test_without_hard_links_a_name_is_given_once_and_never_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exFAT and some network drives have none."""
    monkeypatch.setattr(os, "link", no_link)
    folder = Folder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: folder.create("a/x", str(number).encode()), range(64)))
    assert sum(made) == 1 and folder.read("a/x") == str(made.index(True)).encode()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AuditError, match="a/y: cannot be written: No space left"):
        folder.create("a/y", b"content")
    assert not (tmp_path / "a/y").exists()


def no_link(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_sweeping_bears_with_folders_that_go_meanwhile(tmp_path: Path) -> None:
    """As those of claims do."""
    folder, over = Folder(tmp_path), threading.Event()
    (tmp_path / "deep").mkdir()
    left = [tmp_path / f"deep/.x.{this_host()}.4190000.abc.tmp", tmp_path / f".y.{this_host()}.4190000.abc.tmp"]

    def come_and_go() -> None:
        while not over.is_set():
            for number in range(20):
                (tmp_path / f"claims{number}").mkdir()
            for number in range(20):
                (tmp_path / f"claims{number}").rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(100):
            for path in left:
                path.touch()
            folder.sweep()
            assert not any(path.exists() for path in left)
    finally:
        over.set()
        thread.join()


def test_paths_and_schemes(tmp_path: Path) -> None:
    assert join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b" and join("x", "") == "x"
    assert Folder(str(tmp_path) + "/").path("a/b") == f"{tmp_path}/a/b"
    with pytest.raises(AuditError, match="nowhere://x: cannot open"):
        Folder("nowhere://x")


@pytest.mark.processes
def test_an_audit_on_s3(s3: dict[str, str], sd1: str, tmp_path: Path) -> None:
    """Scan, SIGKILL, resume, refine, status, verify and repair; the same scores as on a disk."""
    captions = [*some_captions(46), *some_captions(2), "", None]
    pq.write_table(pa.table({"TEXT": captions}), tmp_path / "captions.parquet")
    s3fs.S3FileSystem().put(str(tmp_path / "captions.parquet"), "bucket/in/captions.parquet")
    flags: tuple[object, ...] = ("--model", sd1, "--rows-per-shard", 5, "--batch-size", 2, "--steps", 3)
    flags = (*flags, "--second-look", 0, "--refine", 0.1)
    local, url, log = tmp_path / "run", "s3://bucket/run", tmp_path / "log"
    assert be_audit("scan", tmp_path / "captions.parquet", "-o", local, *flags).code == 0

    folder = Folder(url)
    process = start("scan", "s3://bucket/in/captions.parquet", "-o", url, *flags, log=log, environment=s3)
    deadline = time.monotonic() + 60
    while len(folder.list("_commits/scan")) < 3:
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = set(Stage.open(Run.open(url), SCAN).ledger.done())
    assert 3 <= len(done) < 10
    stamps = {shard: Stage.open(Run.open(url), SCAN).ledger.read(shard) for shard in done}
    found = be_audit("status", url)
    assert found.code == 0 and f"{len(done)}/10 shards" in found.out

    found = be_audit("scan", "s3://bucket/in/captions.parquet", "-o", url, *flags)
    assert found.code == 0, found
    assert f"10 of 10 shards done ({10 - len(done)} now" in found.out
    run = Run.open(url)
    assert {shard: Stage.open(run, SCAN).ledger.read(shard) for shard in done} == stamps
    one, other = read_scores(run, masks=True), read_scores(Run.open(str(local)), masks=True)
    for name in ("row_id", "caption", "status", "duplicate_of", "refined"):
        assert one[name].equals(other[name])
    for name in ("ld", "magnitude", "ld_all"):
        np.testing.assert_allclose(one[name].to_numpy().astype(float), other[name].to_numpy().astype(float), rtol=1e-4)
    refined = read_stage(run, "refine", ["row_id"])
    assert refined is not None and refined.num_rows == 5

    assert be_audit("verify", url, "--deep").code == 0
    Folder(url).write("scores/000/00004.arrow", b"torn")
    found = be_audit("verify", url)
    assert found.code == 3 and found.err.startswith("scores/000/00004.arrow: 4 bytes where the commit says ")
    assert be_audit("verify", url, "--repair").code == 0
    found = be_audit("scan", "s3://bucket/in/captions.parquet", "-o", url, *flags, "--seed", 1)
    assert found.code == 2 and "  seed: 0 -> 1\n" in found.err


@pytest.mark.processes
def test_workers_share_a_run_on_s3(s3: dict[str, str], sd1: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"TEXT": some_captions(12)}), tmp_path / "captions.parquet")
    flags = ("--model", sd1, "--rows-per-shard", 3, "--second-look", 0, "--workers", 2)
    found = be_audit("scan", tmp_path / "captions.parquet", "-o", "s3://bucket/workers", *flags)
    assert found.code == 0, found
    assert read_scores(Run.open("s3://bucket/workers"))["caption"].to_pylist() == some_captions(12)


class Door:
    """Before a server's port: while it is shut, connections are cut and new ones refused, as by one that restarts."""

    def __init__(self, server: str) -> None:
        self.server = int(server.rpartition(":")[2])
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open(self.listener)

    def open(self, listener: socket.socket | None = None) -> None:
        self.listener = listener or socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        for each in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, outer = listener.accept()[0], socket.create_connection(("127.0.0.1", self.server))
                self.sockets += [inner, outer]
                for pair in ((inner, outer), (outer, inner)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_file_of_a_store_is_one_request_and_a_listing_tells_its_time(s3: dict[str, str]) -> None:
    folder, asked = Folder("s3://bucket/requests"), []
    folder.write("small.json", b"{}")
    folder.fs._s3.meta.events.register("request-created.s3", lambda request, **_: asked.append(request.method))
    assert folder.read("small.json") == b"{}" and asked == ["GET"]
    slowly = {entry.name: entry for entry in map(_entry_of, folder.fs.ls(folder.root, detail=True, refresh=True))}
    quickly = {entry.name: entry for entry in folder.entries("")}
    assert quickly == slowly and slowly["small.json"].stamp.endswith("+00:00")


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-29T22:41:48.000Z",
        "2026-11-29T22:41:48.123Z",
        "2026-11-29T22:41:48Z",
        "2026-11-29T22:41:48+02:00",
        "Sun, 29 Nov 2026 22:41:48 GMT",
        "1764456108",
        "20261129",  # seconds, no date
        1764456108,
    ],
)
def test_the_times_of_a_listing_are_botocore_s(text: str) -> None:
    assert str(time_of_listing(text)) == str(parse_timestamp(text))


@pytest.mark.processes
def test_a_listing_is_what_botocore_makes_of_it(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with all that XML and URLs escape, several pages, folders below, and none."""
    folder = Folder("s3://bucket/listed")
    names = ["a b.json", "c&d<e>.json", "\"f'.json", "g+h%20.json", "\u00fc\u4e16.json", "00.json", "01.json"]
    for at, name in enumerate([*names, "below/i.json"]):
        folder.write(name, b"x" * at)
    calls = list[int]()
    monkeypatch.setattr("audit.base.listings.objects_of", lambda body: (calls.append(1), objects_of(body))[1])
    client = folder.fs.s3

    async def small(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 3

    client.meta.events.register("before-parameter-build.s3.ListObjectsV2", small, unique_id="small")
    try:
        found = sorted(folder.entries(""))
        assert len(calls) == 3 and [each.name for each in found] == sorted([*names, "below"])
        assert [each.size for each in found if each.name == names[3]] == [3] and all(each.stamp for each in found[:3])
        client.meta.events.unregister(EVENT, unique_id=EVENT)
        monkeypatch.setattr("audit.base.storage.read_quickly", lambda fs: None)
        assert sorted(folder.entries("")) == found and len(calls) == 3
        assert list(folder.entries("nothing")) == []
    finally:
        client.meta.events.unregister("before-parameter-build.s3.ListObjectsV2", unique_id="small")


def test_what_is_no_listing_is_left_to_botocore() -> None:
    from audit.base.listings import _on_listing

    none = "", "no XML", "<A><Contents><Key>k</Key></Contents></A>", "<A><Contents><Size>x</Size></Contents></A>"
    for body in (text.encode() for text in none):
        response, changed = {"status_code": 200, "body": body}, dict[str, Any]()
        _on_listing(response_dict=response, customized_response_dict=changed)
        assert response["body"] == body and not changed
    response = {"status_code": 503, "body": b"<A><Contents><Key>k</Key><Size>1</Size></Contents></A>"}
    _on_listing(response_dict=dict(response), customized_response_dict=changed)
    assert not changed


@pytest.mark.processes
def test_a_scan_outlives_a_restart_of_the_server(s3: dict[str, str], sd1: str, tmp_path: Path) -> None:
    """Three seconds without it, after the first commits: exit 0, every row once."""
    pq.write_table(pa.table({"TEXT": some_captions(40)}), tmp_path / "captions.parquet")
    door, log, folder = Door(s3["AWS_ENDPOINT_URL"]), tmp_path / "log", Folder("s3://bucket/restarted")
    scan = ("scan", tmp_path / "captions.parquet", "-o", folder.url, "--model", sd1)
    flags = ("--rows-per-shard", 2, "--batch-size", 1, "--num-noises", 2, "--second-look", 0)
    process = start(*scan, *flags, log=log, environment={**s3, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}"})
    deadline = time.monotonic() + 200
    while len(folder.list("_commits/scan")) < 2:
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    door.shut()
    done = len(folder.list("_commits/scan"))
    time.sleep(3)
    door.open()
    process.join(200)
    assert done < 20, "it was done before the server was away: the test shows nothing"
    assert process.exitcode == 0, log.read_text()
    assert read_scores(Run.open(folder.url))["caption"].to_pylist() == some_captions(40)
    assert be_audit("verify", folder.url, "--deep").code == 0


def test_buckets_that_cannot_be_had_are_one_line(
    s3: dict[str, str], sd1: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"TEXT": some_captions(2)}), tmp_path / "captions.parquet")
    scan = ("scan", tmp_path / "captions.parquet", "--model", sd1, "-o")
    found = be_audit(*scan, "s3://no-such-bucket/run")
    assert found.code == 2 and found.err.startswith("Error: no-such-bucket/run") and found.err.count("\n") == 1
    found = be_audit("status", "s3://no-such-bucket/run")
    assert found.code == 2 and "no run here" in found.err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    for command in ((*scan, "s3://bucket/denied"), ("status", "s3://bucket/run")):
        found = be_audit(*command)
        assert found.code == 2 and "Unable to locate credentials" in found.err and found.err.count("\n") == 1, found
    s3fs.S3FileSystem.clear_instance_cache()
