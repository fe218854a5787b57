"""Work that is claimed is done by one at a time, however many ask."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from audit.base import claims
from audit.base.claims import held
from audit.base.errors import AuditError
from audit.base.storage import Folder
from tests.audit.base.test_storage import no_link


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


def test_a_holder_that_stood_still_touches_no_later_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspended, taken over, and back when a third holds a claim of the same number."""
    folder = Folder(tmp_path / "folder")
    monkeypatch.setattr(claims, "STALE", 0.1)
    monkeypatch.setattr(claims, "BEAT", 1000.0)  # as one that is suspended
    with held(folder, "_claims", {}, lambda: False, "works", None) as first:
        with held(folder, "_claims", {}, lambda: False, "works", None) as second:
            assert (first, second) == (1, 2)
        assert folder.list("_claims") == []
        third = held(folder, "_claims", {}, lambda: False, "works", None)
        assert third.__enter__() == 1
    assert folder.list("_claims") == ["1.json"]  # the third's, although the first has given back a 1 meanwhile
    third.__exit__(None, None, None)
    assert list(tmp_path.joinpath("folder").iterdir()) == []


def test_without_hard_links_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_link)
    with held(Folder(tmp_path / "folder"), "_claims", {}, lambda: False, "works", None) as number:
        assert number == 1
    assert list(tmp_path.joinpath("folder").iterdir()) == []
