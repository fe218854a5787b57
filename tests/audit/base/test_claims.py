"""Work that is claimed is done by one at a time, however many ask."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from audit.base.claims import held
from audit.base.errors import AuditError
from audit.base.storage import Folder


def test_one_at_a_time(tmp_path: Path) -> None:
    folder, within, most = Folder(tmp_path / "folder"), threading.Semaphore(1), 0

    def work(_: int) -> None:
        nonlocal most
        with held(folder, "_claims", {"a": 1}, lambda: False, "works", None) as number:
            assert number > 0 and within.acquire(blocking=False), "two at once"
            most += 1
            within.release()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(30)))
    assert most == 30 and list((tmp_path / "folder").iterdir()) == []


def test_other_work_is_refused_while_it_lasts(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "folder")
    with (
        held(folder, "_claims", {"a": 1}, lambda: False, "works", None),
        pytest.raises(AuditError, match=r"(?s)another process works with other settings; .*\n  a: 1 -> 2\n"),
        held(folder, "_claims", {"a": 2}, lambda: False, "works", None),
    ):
        pass
    with held(folder, "_claims", {"a": 2}, lambda: False, "works", None) as number:
        assert number == 1
    with held(folder, "_claims", {"a": 2}, lambda: True, "works", None) as number:
        assert number == 0
