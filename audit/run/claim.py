"""One planner a folder: it is claimed before anything is planned (audit/base/claims.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from audit.base.claims import CLAIMS, held, newest_claim
from audit.base.errors import StorageError
from audit.base.ours import is_run_name
from audit.base.stopping import Stop
from audit.base.storage import Folder
from audit.run.run import PLANNED, Fingerprint, Run


@contextlib.contextmanager
def claimed(folder: Folder, fingerprint: Fingerprint, stop: Stop | None = None) -> Iterator[Run | None]:
    """Inside the block the folder is ours to plan (None), or another process has planned it meanwhile (the run).

    What a dead planner left behind is removed first; the claim is given back at the end.

    Raises:
        AuditError: another process plans a different run here, with one line a field that differs.
        Drained: `stop` asked to.
    """
    identity = _identity(fingerprint)
    with held(folder, CLAIMS, identity, lambda: Run.find(folder) is not None, "plans this run", stop) as number:
        if not number:
            yield Run.find(folder)
            return
        folder.sweep()
        for name in PLANNED if number > 1 else ():
            folder.remove(name)
        try:
            yield None
        except Exception:
            if Run.find(folder) is None and newest_claim(folder, CLAIMS) == number:
                with contextlib.suppress(StorageError):
                    for name in PLANNED:
                        folder.remove(name)
            raise


def take_back(run: Run, stop: Stop | None = None) -> None:
    """Remove a run in which nothing was done, but for its logs: the folder can be another's. Never another run.

    `run.json` goes under the planner's claim, which says of a killed one what was left behind.
    """
    folder = run.folder
    identity = _identity(run.fingerprint)
    with held(folder, CLAIMS, identity, lambda: Run.find(folder) is None, "takes this run back", stop) as number:
        if not number:
            return
        run.still()
        kept = {"logs", CLAIMS, "run.json", *PLANNED}
        for name in folder.list():
            if is_run_name(name) and name not in kept:
                folder.remove(name)
        for name in ("run.json", *PLANNED):
            folder.remove(name)


def _identity(fingerprint: Fingerprint) -> dict[str, Any]:
    """What a claim is for: all but the rows of a shard, which may not be known before it is planned."""
    return {name: value for name, value in asdict(fingerprint).items() if name != "rows_per_shard"}
