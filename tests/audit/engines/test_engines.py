"""Worker processes: what the parent makes of what they say, and of how they end. Real processes, real pipes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from audit.base.commits import Commit, Ledger
from audit.base.devices import find_devices
from audit.base.errors import AuditError, Broken, Drained, StorageError
from audit.base.progress import Progress
from audit.base.stopping import Stop
from audit.base.storage import Folder
from audit.engines.job import JobSpec, Took
from audit.engines.local import run_here, run_processes
from audit.engines.retries import RETIRE, Outcome, Retries

READ = "import sys, os, json\njob = json.loads(sys.stdin.readline())\n"
"""How a worker begins: with the job it is told."""
SHARDS = list(range(6))


class Job:
    """Commits a one-row table; fails the first `failures[shard]` tries. `order` is that of computing."""

    computing = "score"

    def __init__(self, ledger: Ledger, failures: dict[int, int]) -> None:
        self.ledger, self.failures = ledger, failures
        self.order: list[int] = []

    def read(self, shard: int) -> pa.Table:
        return pa.table({"x": [shard]})

    def compute(self, shard: int, rows: pa.Table, on_rows: Callable[[int], None]) -> pa.Table:
        self.order.append(shard)
        on_rows(1)
        if self.failures.get(shard, 0) > 0:
            self.failures[shard] -= 1
            raise ValueError(f"no luck with {shard}")
        return rows

    def write(self, shard: int, found: pa.Table, took: Took) -> Commit:
        return self.ledger.commit(shard, found, None, took.seconds())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Folder(tmp_path), "scan", "print", "out")


def here(job: Job, shards: Sequence[int], progress: Progress, stop: Stop | None = None) -> Outcome:
    """Run shards in this process, three tries each."""
    return run_here(job, Retries(job.ledger, shards, 3, progress), progress, stop or Stop())


def job(number: int) -> JobSpec:
    """What a worker is told; these scripts look at nothing but its device, which is the worker's number."""
    return JobSpec("any:job", "run", str(number), 8, 0.05)


def run_workers(
    ledger: Ledger, script: str, workers: int = 2, stop: Stop | None = None, retries: int = 3
) -> tuple[Outcome, Progress]:
    command = [sys.executable, "-c", READ + script]
    with Progress(len(SHARDS), "rows", "test") as progress:
        done = run_processes(
            job, workers, Retries(ledger, SHARDS, retries, progress), progress, stop or Stop(), argv=command
        )
    return done, progress


def test_a_failed_shard_comes_again_after_the_others(ledger: Ledger) -> None:
    job = Job(ledger, {0: 1, 2: 9})
    with Progress(4, "rows", "test") as progress:
        done = here(job, [0, 1, 2, 3], progress)
    assert job.order == [0, 1, 2, 3, 0, 2, 2]
    assert (done.committed, done.quarantined) == ([1, 3, 0], [2])
    assert [tries.error for tries in ledger.attempts(2)] == ["ValueError: no luck with 2"] * 3
    assert progress.done == 3  # rows of the tries that failed are taken back


SLOW_DOWN = "out/1.arrow: cannot be written: 503 Slow Down"


@pytest.mark.parametrize("step", ("read", "compute", "write"))
def test_a_store_that_fails_once_costs_a_try_and_bad_input_ends_the_job(ledger: Ledger, step: str) -> None:
    raised: list[Exception] = [StorageError(SLOW_DOWN)]

    class Failing(Job):
        """Shard 1 fails in the step that is named."""

        def _raise(self, shard: int, now: str) -> None:
            if (shard, now) == (1, step) and raised:
                raise raised.pop()

        def read(self, shard: int) -> pa.Table:
            self._raise(shard, "read")
            return super().read(shard)

        def compute(self, shard: int, rows: pa.Table, on_rows: Callable[[int], None]) -> pa.Table:
            self._raise(shard, "compute")
            return super().compute(shard, rows, on_rows)

        def write(self, shard: int, found: pa.Table, took: Took) -> Commit:
            self._raise(shard, "write")
            return super().write(shard, found, took)

    with Progress(4, "rows", "test") as progress:
        done = here(Failing(ledger, {}), [0, 1, 2], progress)
        assert (sorted(done.committed), done.quarantined) == ([0, 1, 2], [])
        assert [tries.error for tries in ledger.attempts(1)] == [f"StorageError: {SLOW_DOWN}"]
        assert progress.done == 3
        raised.append(AuditError("input.csv: no such file"))
        ledger.drop(1)
        with pytest.raises(AuditError, match="no such file"):
            here(Failing(ledger, {}), [1], progress)


def test_what_another_process_has_committed_is_not_done_again(ledger: Ledger) -> None:
    ledger.commit(1, pa.table({"x": [1]}))
    job = Job(ledger, {})
    with Progress(3, "rows", "test") as progress:
        done = here(job, [0, 1, 2], progress)
    assert (sorted(done.committed), job.order, progress.done) == ([0, 1, 2], [0, 2], 3)


def test_a_broken_device_does_not_use_up_every_shards_tries(ledger: Ledger) -> None:
    """From shard 2 on everything fails, as after a device-side assert."""
    job = Job(ledger, dict.fromkeys(range(2, 100), 9))
    with Progress(100, "rows", "test") as progress, pytest.raises(Broken, match="stopped with 98 shards left"):
        here(job, range(100), progress)
    # the good ones may be written only after the first bad ones failed: these are in a row all the same
    assert job.order == list(range(2 + RETIRE)) and ledger.shards() == [0, 1]


def test_a_stop_drops_the_shard_in_hand(ledger: Ledger) -> None:
    """What was computed before is written all the same."""
    stop = Stop()

    class Stopping(Job):
        def compute(self, shard: int, rows: pa.Table, on_rows: Callable[[int], None]) -> pa.Table:
            stop.requested = shard == 2
            return super().compute(shard, rows, on_rows)

        def write(self, shard: int, found: pa.Table, took: Took) -> Commit:
            time.sleep(0.2)
            return super().write(shard, found, took)

    with Progress(4, "rows", "test") as progress, pytest.raises(Drained):
        here(Stopping(ledger, {}), [0, 1, 2, 3], progress, stop)
    assert ledger.shards() == [0, 1] and ledger.attempts(2) == []


def test_steps_of_shards_run_beside_each_other(ledger: Ledger) -> None:
    """While one is computed the next is read and the last is written; each step is one shard's at a time."""
    running: list[tuple[str, int]] = []
    seen: set[tuple[str, ...]] = set()

    class Slow(Job):
        @contextlib.contextmanager
        def _step(self, name: str, shard: int) -> Iterator[None]:
            running.append((name, shard))
            seen.add(tuple(sorted(each for each, _ in running)))
            time.sleep(0.05)
            running.remove((name, shard))
            yield

        def read(self, shard: int) -> pa.Table:
            with self._step("read", shard):
                return super().read(shard)

        def compute(self, shard: int, rows: pa.Table, on_rows: Callable[[int], None]) -> pa.Table:
            with self._step("compute", shard):
                return super().compute(shard, rows, on_rows)

        def write(self, shard: int, found: pa.Table, took: Took) -> Commit:
            with self._step("write", shard):
                return super().write(shard, found, took)

    job = Slow(ledger, {3: 1})
    with Progress(9, "rows", "test") as progress:
        done = here(job, range(9), progress)
    assert sorted(done.committed) == list(range(9)) and job.order == [*range(9), 3]
    assert ("compute", "read", "write") in seen and all(len(set(names)) == len(names) for names in seen)
    commit = ledger.read(0)
    assert commit is not None and set(commit.seconds) == {"read", "score", "wall"}
    assert 0.1 < commit.seconds["wall"] < 0.3  # of its steps, not of what it waited between them


@pytest.mark.timeout(60)
def test_messages_that_arrive_together_are_all_heard(ledger: Ledger) -> None:
    """Two lines in one read of the pipe: the second must not wait for a third that never comes."""
    done, progress = run_workers(
        ledger,
        """
for line in sys.stdin:
    shard = int(line)
    os.write(1, b'{"ready": true}\\n{"rows": 1, "shard": %d}\\n{"done": %d, "rows": 1}\\n' % (shard, shard))
""",
    )
    assert sorted(done.committed) == SHARDS and progress.done == len(SHARDS)


@pytest.mark.timeout(60)
def test_a_message_in_pieces_is_one_message(ledger: Ledger) -> None:
    done, _ = run_workers(
        ledger,
        """
import time
for line in sys.stdin:
    os.write(1, b'{"ready": tr'); time.sleep(0.05)
    os.write(1, b'ue}\\n{"done": %d, "ro' % int(line)); time.sleep(0.05)
    os.write(1, b'ws": 1}\\n')
""",
    )
    assert sorted(done.committed) == SHARDS


@pytest.mark.timeout(60)
def test_failures_said_and_deaths_count_as_tries(ledger: Ledger) -> None:
    """Shard 1 says that it failed, shard 3 takes its worker with it; no other shard is blamed for that."""
    done, progress = run_workers(
        ledger,
        """
print('{"ready": true}', flush=True)
for line in sys.stdin:
    shard = int(line)
    print(json.dumps({"rows": 1, "shard": shard}), flush=True)
    if shard == 3: os.kill(os.getpid(), 9)
    said = {"failed": 1, "error": "ValueError: bad"} if shard == 1 else {"done": shard, "rows": 1}
    print(json.dumps(said), flush=True)
""",
        retries=2,
    )
    assert sorted(done.committed) == [0, 2, 4, 5] and sorted(done.quarantined) == [1, 3]
    assert [tries.error for tries in ledger.attempts(3)] == ["worker died with exit code -9"] * 2
    assert [tries.error for tries in ledger.attempts(1)] == ["ValueError: bad"] * 2
    assert all(ledger.attempts(shard) == [] for shard in (0, 2, 4, 5))
    assert progress.done == 4


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_shard_committed_by_a_worker_that_died_is_not_done_again(tmp_path: Path, ledger: Ledger) -> None:
    """Killed between its commit and saying so."""
    script = f"""
import pyarrow as pa
from pathlib import Path
from audit.base.commits import Commit, Ledger
from audit.base.storage import Folder
ledger = Ledger(Folder({str(tmp_path)!r}), "scan", "print", "out")
print('{{"ready": true}}', flush=True)
for line in sys.stdin:
    shard = int(line)
    with open({str(tmp_path / "order")!r}, "a") as order: order.write(line)
    ledger.commit(shard, pa.table({{"x": [shard]}}))
    if shard == 0: os.kill(os.getpid(), 9)
    print(json.dumps({{"done": shard, "rows": 1}}), flush=True)
"""
    done, progress = run_workers(ledger, script, workers=1)
    assert done.committed == SHARDS and ledger.attempts(0) == [] and progress.done == len(SHARDS)
    assert (tmp_path / "order").read_text().split() == [str(shard) for shard in SHARDS]


BROKEN = """
import time
print('{"ready": true}', flush=True)
broken = %s
for line in sys.stdin:
    said = {"failed": int(line), "error": "RuntimeError: CUDA error"} if broken else {"done": int(line), "rows": 1}
    if not broken: time.sleep(0.02)
    print(json.dumps(said), flush=True)
"""


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_worker_that_fails_everything_is_replaced_then_retired(tmp_path: Path, ledger: Ledger) -> None:
    """One of three devices is broken for good: the other two do all the work, and no shard is given up."""
    starts = tmp_path / "starts"
    script = f"open({str(starts)!r}, 'a').write(job['device'] + '\\n')\n" + BROKEN % "job['device'] == '0'"
    command = [sys.executable, "-c", READ + script]
    with Progress(200, "rows", "test") as progress:
        done = run_processes(job, 3, Retries(ledger, range(200), 3, progress), progress, Stop(), argv=command)
    assert sorted(done.committed) == list(range(200)) and done.quarantined == []
    assert progress.done == 200
    assert starts.read_text().split().count("0") > 1  # a fresh process may be a fresh device


@pytest.mark.timeout(60)
def test_workers_that_all_fail_stop_the_job(ledger: Ledger) -> None:
    command = [sys.executable, "-c", READ + BROKEN % True]
    with Progress(100, "rows", "test") as progress, pytest.raises(Broken, match="stopped with 100 shards left"):
        run_processes(job, 2, Retries(ledger, range(100), 3, progress), progress, Stop(), argv=command)
    assert all(len(ledger.attempts(shard)) <= 1 for shard in range(100))


@pytest.mark.timeout(60)
def test_bad_input_said_by_a_worker_ends_the_job(ledger: Ledger) -> None:
    with pytest.raises(AuditError, match="other weights"):
        run_workers(ledger, """print('{"error_line": "other weights"}', flush=True); sys.exit(2)""")


@pytest.mark.timeout(60)
def test_workers_that_never_load_end_the_job(ledger: Ledger) -> None:
    """A missing library kills each at once: not a matter of single shards, and no endless respawning."""
    with pytest.raises(AuditError, match="3 workers in a row died while loading"):
        run_workers(ledger, "sys.exit(1)")
    assert all(ledger.attempts(shard) == [] for shard in SHARDS)


@pytest.mark.timeout(60)
def test_a_worker_that_hangs_with_all_done_does_not_hold_the_job(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has said that all is done, and its input is closed: then it neither lives nor ends."""
    monkeypatch.setattr("audit.engines.processes.SILENCE", 1.0)
    script = """
import time
print('{"ready": true}', flush=True)
for line in sys.stdin:
    print(json.dumps({"done": int(line), "rows": 1}), flush=True)
time.sleep(600)
"""
    done, _ = run_workers(ledger, script)
    assert sorted(done.committed) == SHARDS and done.quarantined == []


@pytest.mark.timeout(60)
def test_one_worker_that_dies_while_loading_is_replaced(tmp_path: Path, ledger: Ledger) -> None:
    script = f"""
flag = {str(tmp_path / "died")!r}
if not os.path.exists(flag):
    open(flag, "w").close(); sys.exit(1)
print('{{"ready": true}}', flush=True)
for line in sys.stdin:
    print(json.dumps({{"done": int(line), "rows": 1}}), flush=True)
"""
    done, _ = run_workers(ledger, script, workers=1)
    assert done.committed == SHARDS and done.quarantined == []


@pytest.mark.timeout(60)
def test_a_stop_ends_workers_that_wait_for_work(ledger: Ledger) -> None:
    """A worker that has caught SIGTERM between two shards reads on: only the end of its input ends it."""
    stop = Stop()

    class Stopping(Progress):
        def add(self, units: int) -> None:
            stop.requested = True

    command = [
        sys.executable,
        "-c",
        READ
        + """
import signal
signal.signal(signal.SIGTERM, lambda *_: None)
print('{"ready": true}', flush=True)
for line in sys.stdin:
    print(json.dumps({"done": int(line), "rows": 1}), flush=True)
""",
    ]
    with Stopping(6, "rows", "test") as progress, pytest.raises(Drained):
        run_processes(job, 2, Retries(ledger, SHARDS, 3, progress), progress, stop, argv=command)


def test_progress_says_nothing_twice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("audit.base.progress.LINE_SECONDS", 0.0)
    with Progress(3, "rows", "test") as progress:
        progress.add(1)
        progress.add(2)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["test: 1/3 rows", "test: 3/3 rows"]


def test_devices_of_workers() -> None:
    assert find_devices("cpu", 0) == ["cpu"] and find_devices("cpu", 3) == ["cpu"] * 3
