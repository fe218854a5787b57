"""The small audit that is disturbed, made once a session."""

from __future__ import annotations

import pytest

from tests.faults.harness import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, sd1: str) -> World:
    """Read it only: `before` gives copies."""
    return World(tmp_path_factory.mktemp("world"), sd1)
