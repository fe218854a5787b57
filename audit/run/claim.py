"""One planner a folder: it is claimed before anything is planned; others wait for the run, or take a dead claim over.

The null maps of a run are claimed in the same way, below `_claims/STAGE/`.

`_claims/1.json` is made by an atomic create (a conditional put on object stores). The claim with the highest number
holds; a stale one is taken over by creating the next number, which one of several succeeds in. A claim is stale when
its process is dead (seen on the same host), or when its heartbeat has stood still for STALE seconds of the waiting
process's own clock: clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from audit.base.errors import AuditError, StorageError
from audit.base.facts import read_facts, to_json
from audit.base.ours import is_run_name
from audit.base.stopping import Stop
from audit.base.storage import Folder, lives_here, this_host
from audit.run.run import PLANNED, Fingerprint, Run, refuse_other

CLAIMS = "_claims"
BEAT, STALE = 5.0, 60.0  # seconds


@dataclass(frozen=True)
class ClaimFacts:
    """_claims/N.json: what is to be planned, who does it, and a number that grows while he lives."""

    fingerprint: Fingerprint
    host: str
    pid: int
    beat: int = 0


@contextlib.contextmanager
def claimed(folder: Folder, fingerprint: Fingerprint, stop: Stop | None = None) -> Iterator[Run | None]:
    """Inside the block the folder is ours to plan (None), or another process has planned it meanwhile (the run).

    What a dead planner left behind is removed first; the claim is given back at the end.

    Raises:
        AuditError: another process plans a different run here, with one line a field that differs.
        Drained: `stop` asked to.
    """
    with held(folder, CLAIMS, fingerprint, lambda: Run.find(folder) is not None, "plans this run", stop) as number:
        if not number:
            yield Run.find(folder)
            return
        folder.sweep()
        for name in PLANNED if number > 1 else ():
            folder.remove(name)
        try:
            yield None
        except Exception:
            if Run.find(folder) is None and _newest(folder, CLAIMS) == number:
                with contextlib.suppress(StorageError):
                    for name in PLANNED:
                        folder.remove(name)
            raise


def take_back(run: Run, stop: Stop | None = None) -> None:
    """Remove a run in which nothing was done, but for its logs: the folder can be another's. Never another run.

    `run.json` goes under the planner's claim, which says of a killed one what was left behind.
    """
    folder = run.folder
    with held(folder, CLAIMS, run.fingerprint, lambda: Run.find(folder) is None, "takes this run back", stop) as number:
        if not number:
            return
        run.still()
        kept = {"logs", CLAIMS, "run.json", *PLANNED}
        for name in folder.list():
            if is_run_name(name) and name not in kept:
                folder.remove(name)
        for name in ("run.json", *PLANNED):
            folder.remove(name)


@contextlib.contextmanager
def held(
    folder: Folder, place: str, fingerprint: Fingerprint, done: Callable[[], bool], what: str, stop: Stop | None
) -> Iterator[int]:
    """Inside the block the work is ours (the number of the claim), or others have done it (0); given back at the end.

    Args:
        folder, place: where the claims lie. fingerprint: of the run. done: whether nothing is left to do.
        what: is being done, for those who wait: "process 7 on host WHAT: waiting". stop: asks to stop.

    Raises:
        AuditError: another process holds the claim for a different run. Drained: `stop` asked to.
    """
    number = _claim(folder, place, fingerprint, done, what, stop)
    try:
        if number and not done():
            with _beating(folder, place, number, fingerprint):
                yield number
        else:
            yield 0
    finally:
        if number:
            with contextlib.suppress(StorageError):
                for other in sorted(_numbers(folder, place), reverse=True):
                    if other <= number:
                        folder.remove(f"{place}/{other}.json")
                if folder.local:
                    with contextlib.suppress(OSError):
                        os.rmdir(folder.path(place))
                        os.rmdir(folder.path(CLAIMS))


def _claim(
    folder: Folder, place: str, fingerprint: Fingerprint, done: Callable[[], bool], what: str, stop: Stop | None
) -> int:
    """The number of our claim; 0 when another process finished the work first."""
    data = to_json(ClaimFacts(fingerprint, this_host(), os.getpid()))
    seen: tuple[int, bytes] = (0, b"")
    since, said = time.monotonic(), False
    while True:
        newest = _newest(folder, place)
        if done():
            return 0
        if newest == 0:
            if folder.create(f"{place}/1.json", data):
                return 1
            continue
        try:
            held = folder.read(f"{place}/{newest}.json")
        except FileNotFoundError:
            continue  # given back this moment
        if (newest, held) != seen:
            seen, since = (newest, held), time.monotonic()
        stale = time.monotonic() - since > STALE
        try:
            facts = read_facts(ClaimFacts, held, folder.path(f"{place}/{newest}.json"))
        except AuditError:
            facts = None  # torn or foreign: nobody's, once it has stood still
        if facts is not None:
            stale = stale or lives_here(facts.host, facts.pid) is False
        if stale:
            if folder.create(f"{place}/{newest + 1}.json", data):
                return newest + 1
            continue
        if facts is not None:
            refuse_other(folder, facts.fingerprint, fingerprint, "another process is planning a different run here")
            if not said:
                print(f"{folder.url}: process {facts.pid} on {facts.host} {what}: waiting", file=sys.stderr)
                said = True
        if stop is not None:
            stop.check()
        time.sleep(0.2)


@contextlib.contextmanager
def _beating(folder: Folder, place: str, number: int, fingerprint: Fingerprint) -> Iterator[None]:
    """Let the claim's number grow every few seconds."""
    over = threading.Event()

    def beat() -> None:
        facts = ClaimFacts(fingerprint, this_host(), os.getpid())
        while not over.wait(BEAT):
            facts = replace(facts, beat=facts.beat + 1)
            with contextlib.suppress(StorageError):  # the store may be back at the next beat
                folder.write(f"{place}/{number}.json", to_json(facts))

    thread = threading.Thread(target=beat, daemon=True, name="claim")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _numbers(folder: Folder, place: str) -> list[int]:
    stems = [name.removesuffix(".json") for name in folder.list(place) if name.endswith(".json")]
    return [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) < 10]


def _newest(folder: Folder, place: str) -> int:
    return max(_numbers(folder, place), default=0)
