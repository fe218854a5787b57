"""The one policy of what fails, whoever runs shards: tries of a shard, replacement and retirement of a worker."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from audit.base.commits import Commit, Ledger
from audit.base.errors import Broken
from audit.base.progress import Progress

REPLACE, RETIRE = 2, 8
"""Shards that fail one after the other at their first try: so many, and a worker is replaced; is not started again.
Bad data fail here and there; a broken device or driver fails everything at once, and would use up every shard's tries.
"""


@dataclass
class Outcome:
    """What became of the shards: committed now, and given up after the last try."""

    committed: list[int] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)


class Retries:
    """Shards to do, and what happens when one fails. A place is where a worker lives: a device, a slot of a cluster.

    Args:
        ledger: where failed tries are recorded. shards: to do, in order. max_tries: of a shard, before it is given up.
        progress: is told of every failure.
    """

    def __init__(self, ledger: Ledger, shards: Sequence[int], max_tries: int, progress: Progress) -> None:
        self.ledger, self.max_tries, self.progress = ledger, max_tries, progress
        self.outcome = Outcome()
        self._queue = collections.deque(shards)
        self._tried: set[int] = set()
        self._suspects: set[int] = set()  # one of those a worker had in hand when it died
        self._streaks: collections.Counter[int] = collections.Counter()  # failures in a row at a place, at first tries
        self._taken: dict[int, int] = {}  # shards in hand -> how many were taken before
        self._takes = 0
        self._failed: dict[int, int] = {}  # place -> the same of the last shard that failed there

    def __len__(self) -> int:
        """Shards that wait."""
        return len(self._queue)

    def take(self, hand: Collection[int] = ()) -> int | None:
        """The next shard for a worker; None when none waits that may go beside what it has in hand.

        A suspect goes beside nothing.
        """
        if self._suspects.intersection(hand):
            return None
        for shard in self._queue:
            if not hand or shard not in self._suspects:
                self._queue.remove(shard)
                self._taken[shard], self._takes = self._takes, self._takes + 1
                return shard
        return None

    def put_back(self, hand: Sequence[int]) -> None:
        """It was not the shards' fault: they come next, in the order they were taken, and no try is counted."""
        self._queue.extendleft(reversed(hand))

    def done(self, place: int, shard: int) -> None:
        """A shard is committed."""
        self.outcome.committed.append(shard)
        self._suspects.discard(shard)
        if self._taken.pop(shard, 0) > self._failed.get(place, -1):  # one before it may only now be written
            self._streaks[place] = 0

    def died(self, place: int, hand: Sequence[int], error: str) -> Mapping[int, Commit]:
        """A worker died with shards in hand, in the order they were taken; gives those it had committed.

        One shard that is left is what it died of: a failed try. Of several nobody knows which it was: each is done
        again with nothing beside it, and no try is counted.
        """
        committed = self.ledger.done(hand)
        for shard in committed:  # it died between its commit and saying so
            self.done(place, shard)
        left = [shard for shard in hand if shard not in committed]
        if len(left) == 1:
            self.failed(place, left[0], error)
        elif left:
            self._suspects.update(left)
            self.put_back(left)
            names = ", ".join(map(str, left))
            self.progress.note(f"{self.ledger.stage}: {error} with shards {names} in hand: done again one by one")
        return committed

    def failed(self, place: int, shard: int, error: str) -> None:
        """A try failed: recorded; the shard is tried again after the others, or given up."""
        self._failed[place] = max(self._failed.get(place, -1), self._taken.pop(shard, 0))
        self._streaks[place] += shard not in self._tried
        self._tried.add(shard)
        tries = self.ledger.record_attempt(shard, error)
        again = tries < self.max_tries
        if again:
            self._queue.append(shard)
        else:
            self.outcome.quarantined.append(shard)
        what = "will be tried again" if again else f"given up after {tries} tries"
        first = (error.splitlines() or [""])[0][:300]
        self.progress.note(f"{self.ledger.stage} shard {shard}: {first}; {what}")

    def replace(self, place: int) -> bool:
        """Whether the worker at a place has failed so much in a row that another should take its place."""
        return self._streaks[place] >= REPLACE

    def retired(self, place: int) -> bool:
        """Whether a place has failed so much in a row that it stays empty."""
        return self._streaks[place] >= RETIRE

    def broken(self) -> Broken:
        """What to raise when no place is left."""
        return Broken(
            f"{RETIRE} shards failed one after the other on every worker: stopped with {len(self)} shards left. Look "
            "at what failed (be-audit status), mend it, and give the same command again."
        )
