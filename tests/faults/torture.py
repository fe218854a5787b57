"""`make torture MINUTES=60`: faults at random over all stages; prints what was tried, survived, lost and doubled."""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import tempfile
import time
from pathlib import Path

from tests.faults.harness import FAULTS, STAGES, STORE_FAULTS, Outcome, World, disturb, together
from tests.tiny import save_model

TOGETHER = {"two processes": 2, "eight processes": 8}


def main() -> None:
    """Torture for so many minutes; exit code 1 where anything was lost, doubled or ended with a wrong code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    moments = random.Random(asked.seed)
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    world = World(root / "world", str(save_model("sd1", root / "model")))
    until, number = time.monotonic() + 60 * asked.minutes, 0
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    cases = [(stage, fault) for stage in STAGES for fault in (*FAULTS, *TOGETHER)]
    cases += [("scan", fault) for fault in STORE_FAULTS]
    while time.monotonic() < until:
        if number % len(cases) == 0:
            moments.shuffle(cases)
        stage, fault = cases[number % len(cases)]
        run, number = root / f"run{number}", number + 1
        if isinstance(fault, str):
            name, found = fault, together(world, stage, TOGETHER[fault], run)
        else:
            url = f"faulty://{run}" if fault in STORE_FAULTS else ""
            name, found = fault.name, disturb(world, stage, fault, run, moments, url)
        tell(counts[stage, name], found)
        if found.problem:
            print(f"{stage}, {name}: {found.problem}\n", flush=True)
        shutil.rmtree(run, ignore_errors=True)
    print_table(counts)
    shutil.rmtree(root)
    raise SystemExit(any(count["tried"] != count["survived"] for count in counts.values()))


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
