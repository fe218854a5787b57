"""The small audit that is disturbed, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import once
from tests.faults.harness import World


@pytest.fixture(scope="session")
def world(shared: Path, sd1: str) -> World:
    """Read it only: `before` gives copies."""
    return once(shared / "world", lambda folder: World(folder, sd1))
