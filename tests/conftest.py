"""Shared by all tests: one thread (nets this small pay for more), tiny model folders, tiny captions."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
from collections.abc import Callable
from typing import TypeVar

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# a local `ray.init()` turns tokens on in its process alone: those started before could not join its clusters
os.environ["RAY_AUTH_MODE"] = "disabled"

from pathlib import Path  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402

torch.set_num_threads(1)
gc.set_threshold(100_000, 20, 100)  # libraries and tests stay: they are not looked through for garbage

Made = TypeVar("Made")

WORDS = ("red", "blue", "old", "tiny", "wooden", "quiet"), ("house", "dog", "street", "lamp", "boat")


def some_captions(count: int) -> list[str]:
    """Captions without repeats."""
    adjectives, nouns = WORDS
    return [f"a {adjectives[i % 6]} {nouns[i % 5]} number {i}" for i in range(count)]


def pytest_collection_finish() -> None:
    gc.freeze()


SLOW = ("processes", "sampling", "simulation", "browser", "faults", "benchmark")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What makes a test slow is its mark; `make quick` leaves out all of them.

    Files with slow tests go first, those with the longest before all, then those that kill and wait, dealt to the test
    processes in turn: none of them is left over when the rest is done.
    """
    length: dict[Path, float] = {}
    for item in items:
        for folder, mark in (("browser", "browser"), ("faults", "faults"), ("benchmarks", "benchmark")):
            if f"tests/{folder}/" in item.path.as_posix():
                item.add_marker(mark)
        if any(item.get_closest_marker(name) for name in SLOW):
            item.add_marker("slow")
        if item.get_closest_marker("slow"):
            limit = item.get_closest_marker("timeout")
            length[item.path] = max(length.get(item.path, 0), limit.args[0] if limit else 300)
    items.sort(key=lambda item: (-length.get(item.path, 0), "faults" not in item.keywords))
    items[:] = _dealt(items, [*length], int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _dealt(items: list[pytest.Item], slow: list[Path], workers: int) -> list[pytest.Item]:
    """The same tests so that each of `--dist worksteal`'s first shares, which are cut by count, has files of every
    length: slow files in turn, then what is quick.
    """
    files = [path for path in dict.fromkeys(item.path for item in items) if path in slow]
    turn = {path: place % workers for place, path in enumerate(files)}
    shares = [[item for item in items if turn.get(item.path) == worker] for worker in range(workers)]
    quick, found = [item for item in items if item.path not in turn], list[pytest.Item]()
    for worker, share in enumerate(shares):
        count = (len(items) - len(found)) // (workers - worker) - len(share)
        found += share + quick[: max(count, 0)]
        quick = quick[max(count, 0) :]
    return found + quick


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder: Path, make: Callable[[Path], Made]) -> Made:
    """What `make` makes in a new folder, once a session, by the test process that is the first to ask. Read it only."""
    made = folder.with_suffix(".made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            whole = made.with_suffix(".part")
            whole.write_bytes(pickle.dumps(make(folder)))
            whole.replace(made)
    found: Made = pickle.loads(made.read_bytes())
    return found


@pytest.fixture(scope="session")
def testbed_index(shared: Path) -> str:
    """The testbed's training pictures, indexed. Read it only."""
    from audit import testbed
    from audit.index import IndexConfig, build_index

    def make(folder: Path) -> str:
        index = str(folder / "index")
        build_index(IndexConfig(images=(str(testbed.PICTURES),), output=index, sscd="testbed", device="cpu"))
        return index

    return once(shared / "testbed-index", make)


@pytest.fixture(scope="session")
def model_folders(shared: Path) -> dict[str, Path]:
    """Folders of random models of Stable Diffusion's three shapes, and of the testbed. Read them only."""
    from audit import testbed
    from tests.tiny import save_model

    def make(folder: Path) -> dict[str, Path]:
        return {kind: save_model(kind, folder / kind) for kind in ("sd1", "sd2", "sdxl")}

    return {**once(shared / "models", make), "testbed": testbed.PIPELINE}


@pytest.fixture(scope="session")
def sd1(model_folders: dict[str, Path]) -> str:
    """What to give `--model` for a scan that takes milliseconds a row."""
    return str(model_folders["sd1"])


@pytest.fixture(scope="session")
def captions_file(shared: Path) -> Path:
    """60 rows: 50 captions once, 4 of them again at the end, null and blank ones, one longer than the tokenizer's."""
    captions: list[str | None] = [*some_captions(49), "a long " * 60]
    captions += [captions[3], None, "   ", captions[0], captions[49], "", captions[20], None, captions[3], None]
    table = {"URL": [f"https://example.org/{i}.jpg" for i in range(60)], "TEXT": captions, "width": list(range(60))}

    def make(folder: Path) -> Path:
        pq.write_table(pa.table(table), folder / "captions.parquet", row_group_size=25)
        return folder / "captions.parquet"

    return once(shared / "captions", make)
