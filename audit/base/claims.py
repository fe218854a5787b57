"""One at a time: the work on a folder is claimed before it is begun; others wait, or take a dead claim over.

`PLACE/1.json` is made by an atomic create (a conditional put on object stores). The claim with the highest number
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
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from audit.base.errors import AuditError, StorageError
from audit.base.facts import read_facts, to_json
from audit.base.fingerprint import refuse_other
from audit.base.publish import CREATE_LOCK, lives_here, this_host
from audit.base.stopping import Stop
from audit.base.storage import Folder, join

CLAIMS = "_claims"
BEAT, STALE = 5.0, 60.0  # seconds


@dataclass(frozen=True)
class ClaimFacts:
    """PLACE/N.json: what the work is for, who does it, and a number that grows while he lives.

    token: of this one claim: whoever stood still so long that it was taken over touches no later one of that number.
    """

    identity: dict[str, Any]
    host: str
    pid: int
    token: str = ""
    beat: int = 0


@contextlib.contextmanager
def held(
    folder: Folder, place: str, identity: dict[str, Any], done: Callable[[], bool], what: str, stop: Stop | None
) -> Iterator[int]:
    """Inside the block the work is ours (the number of the claim), or others have done it (0); given back at the end.

    Args:
        folder, place: where the claims lie. identity: what the work is for. done: whether nothing is left to do.
        what: is being done, for those who wait: "process 7 on host WHAT: waiting". stop: asks to stop.

    Raises:
        AuditError: another process holds the claim for something else. Drained: `stop` asked to.
    """
    facts = ClaimFacts(identity, this_host(), os.getpid(), uuid.uuid4().hex)
    number = _claim(folder, place, facts, done, what, stop)
    try:
        if number and not done():
            with _beating(folder, place, number, facts):
                yield number
        else:
            yield 0
    finally:
        if number and _is_ours(folder, place, number, facts):
            with contextlib.suppress(StorageError):
                for other in sorted(_numbers(folder, place), reverse=True):
                    if other <= number:
                        folder.remove(f"{place}/{other}.json")
                if folder.local:
                    with contextlib.suppress(OSError):
                        os.unlink(join(folder.path(place), CREATE_LOCK))
                    with contextlib.suppress(OSError):
                        os.rmdir(folder.path(place))
                        os.rmdir(folder.path(CLAIMS))


def _claim(folder: Folder, place: str, ours: ClaimFacts, done: Callable[[], bool], what: str, stop: Stop | None) -> int:
    """The number of our claim; 0 when another process finished the work first."""
    data = to_json(ours)
    seen: tuple[int, bytes] = (0, b"")
    since, said = time.monotonic(), False
    while True:
        newest = newest_claim(folder, place)
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
            refuse_other(folder.url, facts.identity, ours.identity, f"another process {what} with other settings")
            if not said:
                print(f"{folder.url}: process {facts.pid} on {facts.host} {what}: waiting", file=sys.stderr)
                said = True
        if stop is not None:
            stop.check()
        time.sleep(0.2)


@contextlib.contextmanager
def _beating(folder: Folder, place: str, number: int, facts: ClaimFacts) -> Iterator[None]:
    """Let the claim's number grow every few seconds, for as long as it is ours."""
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(BEAT):
            beats += 1
            with contextlib.suppress(StorageError):  # the store may be back at the next beat
                if _is_ours(folder, place, number, facts):
                    folder.write(f"{place}/{number}.json", to_json(replace(facts, beat=beats)))

    thread = threading.Thread(target=beat, daemon=True, name="claim")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_ours(folder: Folder, place: str, number: int, facts: ClaimFacts) -> bool:
    """Whether a claim's file still says so; one that cannot be read is taken for ours, as it was made by us."""
    name = f"{place}/{number}.json"
    try:
        return read_facts(ClaimFacts, folder.read(name), name).token == facts.token
    except FileNotFoundError:
        return False
    except AuditError:
        return True


def _numbers(folder: Folder, place: str) -> list[int]:
    stems = [name.removesuffix(".json") for name in folder.list(place) if name.endswith(".json")]
    return [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) < 10]


def newest_claim(folder: Folder, place: str) -> int:
    """The highest number there; 0 without a claim."""
    return max(_numbers(folder, place), default=0)
