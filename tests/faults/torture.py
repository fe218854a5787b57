"""`make torture MINUTES=60`: faults at random over all stages; prints what was tried, survived, lost and doubled.

A run is disturbed several times before it may come to its end, two runs at a time (`--jobs`).
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tests.faults.harness import FAULTS, STAGES, STORE_FAULTS, Outcome, World, disturb, together
from tests.tiny import save_model

TOGETHER = {"two processes": 2, "eight processes": 8}
AT_MOST = 4  # faults in the life of one run


@dataclass(frozen=True)
class Case:
    """What is done to one stage: faults by their place in their list, one after the other, or several processes."""

    stage: str
    faults: tuple[int, ...] = ()
    processes: str = ""
    on_store: bool = False


Told = list[tuple[str, str, Outcome]]
_world: World


def main() -> None:
    """Torture for so many minutes; exit code 1 where anything was lost, doubled or ended with a wrong code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    moments = random.Random(asked.seed)
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    world = World(root / "world", str(save_model("sd1", root / "model")))
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    started, number = time.monotonic(), 0
    until, ahead = started + 60 * asked.minutes, cases(moments)
    running: set[Future[Told]] = set()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.command_imports"])
    with ProcessPoolExecutor(asked.jobs, mp_context=context, initializer=_begin, initargs=(world,)) as pool:
        while running or time.monotonic() < until:
            while len(running) < asked.jobs and time.monotonic() < until:
                running.add(pool.submit(torture, next(ahead), root / f"run{number}", moments.randrange(1 << 30)))
                number += 1
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for stage, name, found in (each for future in done for each in future.result()):
                tell(counts[stage, name], found)
                if found.problem:
                    print(f"{stage}, {name}: {found.problem}\n", flush=True)
    print_table(counts)
    tried, minutes = sum(count["tried"] for count in counts.values()), (time.monotonic() - started) / 60
    print(f"\n{tried} faults in {minutes:.1f} minutes, {60 * tried / minutes:.0f} an hour.")
    shutil.rmtree(root)
    raise SystemExit(any(count["tried"] != count["survived"] for count in counts.values()))


def cases(moments: random.Random) -> Iterator[Case]:
    """Every fault at every stage, in random order and company; again and again."""
    while True:
        found = [Case(stage, processes=name) for stage in STAGES for name in TOGETHER]
        for stage in STAGES:
            found += [Case(stage, chosen) for chosen in _in_company(len(FAULTS), moments)]
        found += [Case("scan", chosen, on_store=True) for chosen in _in_company(len(STORE_FAULTS), moments)]
        moments.shuffle(found)
        yield from found


def _in_company(count: int, moments: random.Random) -> Iterator[tuple[int, ...]]:
    order = moments.sample(range(count), count)
    while order:
        many = moments.randint(2, AT_MOST)
        yield tuple(order[:many])
        order = order[many:]


def _begin(world: World) -> None:
    global _world
    _world = world


def torture(case: Case, run: Path, seed: int) -> Told:
    """Do it; stage, name of the fault and outcome, an entry a fault."""
    moments, told = random.Random(seed), []
    if case.processes:
        told.append((case.stage, case.processes, together(_world, case.stage, TOGETHER[case.processes], run)))
    left = [(STORE_FAULTS if case.on_store else FAULTS)[at] for at in case.faults]
    while left:  # a command that came to its end leaves the rest to the next run
        shutil.rmtree(run, ignore_errors=True)
        found = disturb(_world, case.stage, left, run, moments, f"faulty://{run}" if case.on_store else "")
        told += [(case.stage, fault.name, outcome) for fault, outcome in zip(left, found, strict=False)]
        left = left[len(found) :]
    shutil.rmtree(run, ignore_errors=True)
    return told


def tell(count: collections.Counter[str], found: Outcome) -> None:
    """Count an outcome."""
    count["tried"] += 1
    count["survived"] += found.problem is None
    count["disturbed"] += found.code != 0
    count["wrong exit code"] += found.wrong_code
    if found.problem and not found.wrong_code:
        count["doubled" if "rows where" in found.problem and _more(found.problem) else "lost"] += 1


def _more(problem: str) -> bool:
    numbers = [int(word) for word in problem.split() if word.isdigit()]
    return len(numbers) > 1 and numbers[0] > numbers[1]


def print_table(counts: dict[tuple[str, str], collections.Counter[str]]) -> None:
    """A Markdown table by stage and fault, with sums."""
    columns = ("tried", "disturbed", "survived", "lost", "doubled", "wrong exit code")
    total: collections.Counter[str] = collections.Counter()
    print(f"| stage | fault | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for (stage, name), count in sorted(counts.items()):
        total.update(count)
        print(f"| {stage} | {name} | {' | '.join(str(count[column]) for column in columns)} |")
    print(f"| all | all | {' | '.join(str(total[column]) for column in columns)} |")


if __name__ == "__main__":
    main()
