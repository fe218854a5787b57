"""Workers that a command keeps between its stages. Real processes, real pipes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from audit.base.commits import Ledger
from audit.base.errors import AuditError
from audit.base.storage import Folder
from audit.engines.keep import keeping, kept
from tests.audit.engines.test_engines import SHARDS, run_workers


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Folder(tmp_path), "scan", "print", "out")


SERVES = """
print('{"ready": true}', flush=True)
for line in sys.stdin:
    if line.startswith("{"):
        print('{"ready": true}', flush=True)
    else:
        print(json.dumps({"done": int(line), "rows": os.getpid()}), flush=True)
"""


@pytest.mark.timeout(60)
def test_a_command_that_keeps_its_workers_gives_them_the_next_job(ledger: Ledger) -> None:
    """They end with it; one that died between two jobs is replaced, and a job that fails keeps none."""
    with keeping():
        command = kept()
        assert command is not None
        done, _ = run_workers(ledger, SERVES)
        first = {number: worker.process for number, worker in command.workers.items()}
        assert set(first) == {0, 1} and all(process.poll() is None for process in first.values())
        again, _ = run_workers(ledger, SERVES)
        assert {number: worker.process for number, worker in command.workers.items()} == first
        first[0].kill()
        first[0].wait()
        last, _ = run_workers(ledger, SERVES)
        assert command.workers[0].process is not first[0] and command.workers[1].process is first[1]
        processes = [worker.process for worker in command.workers.values()]
        with pytest.raises(AuditError, match="no good"):
            run_workers(ledger, """print('{"error_line": "no good"}', flush=True); sys.exit(2)""", workers=3)
        assert command.workers == {} and all(process.poll() is not None for process in processes)
    assert [sorted(each.committed) for each in (done, again, last)] == [SHARDS] * 3
    with keeping():
        run_workers(ledger, SERVES)
        processes = [worker.process for worker in (kept() or pytest.fail()).workers.values()]
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)


@pytest.mark.timeout(60)
def test_a_worker_in_which_a_shard_failed_is_given_no_other_job(ledger: Ledger) -> None:
    """Its device may be broken, and the next stage knows nothing of it."""
    script = """
print('{"ready": true}', flush=True)
failed = False
for line in sys.stdin:
    if job["device"] == "0" and not failed:
        failed = True
        print(json.dumps({"failed": int(line), "error": "RuntimeError: CUDA error"}), flush=True)
    else:
        print(json.dumps({"done": int(line), "rows": 1}), flush=True)
"""
    with keeping():
        command = kept()
        assert command is not None
        done, _ = run_workers(ledger, script)
        assert sorted(done.committed) == SHARDS and set(command.workers) == {1}


@pytest.mark.timeout(60)
def test_a_worker_that_stands_still_between_two_jobs_is_soon_replaced(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.engines.processes.SILENCE", 1.0)
    with keeping():
        command = kept()
        assert command is not None
        run_workers(ledger, SERVES)
        stopped = command.workers[0].process
        stopped.send_signal(signal.SIGSTOP)
        done, _ = run_workers(ledger, SERVES)
        assert sorted(done.committed) == SHARDS and stopped.poll() == -signal.SIGKILL
