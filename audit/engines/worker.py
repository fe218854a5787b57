"""A worker process: loads the job's model once, then computes the shards whose numbers it reads from stdin."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from audit.base.errors import AuditError, Damaged, Drained, ends_the_job
from audit.base.stopping import stop_on_signals
from audit.engines.job import JobSpec, compute
from audit.engines.local import BEAT, die_with_parent


def main(spec: str) -> int:
    """Serve a JobSpec (JSON) until stdin ends. Exit codes: 0, 2 bad input, 3 a damaged run, 75 stopped."""
    say = _take_stdout()
    die_with_parent()
    threading.Thread(target=_beat, args=(say,), daemon=True, name="heartbeat").start()
    with stop_on_signals() as stop:
        try:
            job = JobSpec.from_json(spec).open()
        except AuditError as error:
            say({"error_line": str(error)})
            return 3 if isinstance(error, Damaged) else 2

        def on_rows(rows: int) -> None:
            try:
                say({"rows": rows})
            except BrokenPipeError:
                raise Drained from None  # the parent is gone: nobody waits for this shard
            stop.check()

        try:
            say({"ready": True})
            for line in sys.stdin:
                shard = int(line)
                try:
                    made = compute(job, shard, on_rows)
                except Exception as error:  # the parent decides whether it is tried again
                    if ends_the_job(error):
                        raise
                    say({"failed": shard, "error": f"{type(error).__name__}: {error}"})
                else:
                    say({"done": shard, "rows": made.rows})
        except AuditError as error:
            say({"error_line": str(error)})
            return 3 if isinstance(error, Damaged) else 2
        except (Drained, BrokenPipeError, KeyboardInterrupt):
            return 75
    return 0


def _take_stdout() -> Any:
    """Keep stdout for messages alone; what libraries print goes to stderr."""
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            messages.write(json.dumps(message) + "\n")
            messages.flush()

    return say


def _beat(say: Callable[[dict[str, Any]], None]) -> None:
    """Say again and again that this process runs: one that was stopped, or hangs with Python's lock held, does not."""
    while True:
        time.sleep(BEAT)
        try:
            say({"alive": True})
        except (OSError, ValueError):
            return  # the parent is gone


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
