"""Matching beside generation: a shard is compared while the next ones are generated, so that no GPU waits for it."""

from __future__ import annotations

import threading

from audit.base.errors import Drained
from audit.base.stopping import Stop
from audit.engines.job import Job, JobSpec, compute
from audit.engines.launch import EngineConfig
from audit.run.stage import Stage

POLL = 1.0  # seconds between two looks at what was generated


class Beside:
    """While its `with` block generates, match what is generated, in a thread.

    Comparing takes processor cores and lets go of the interpreter; what is not matched at the end of the block, or
    could not be, is left to whoever runs the stage then, with retries and reasons.

    Args:
        stage: what to do: a shard is ready when `after` has it.
        after: the stage that generates.
        config: engine and limits. stop: asks to stop.
    """

    def __init__(self, stage: Stage, after: Stage, config: EngineConfig, stop: Stop | None) -> None:
        self.stage, self.after, self.config, self.stop = stage, after, config, stop or Stop()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="match beside", daemon=True)

    def __enter__(self) -> Beside:
        if self.config.engine == "local" and self.after.missing():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _on_rows(self, _: int) -> None:
        self.stop.check()

    def _work(self) -> None:
        config, kind = self.config, self.stage.kind
        limits = config.batch_size, config.max_error_rate
        spec = JobSpec(kind.opener, self.stage.run.url, config.device, *limits, config.compile)
        job: Job | None = None
        left = set(self.stage.missing())
        while left and not self._over.wait(POLL):
            for shard in sorted(left & set(self.after.done())):
                left.discard(shard)
                try:
                    job = job or spec.open()
                    compute(job, shard, self._on_rows)
                except Drained:
                    return
                except Exception:  # it is tried again after the block, which says why
                    continue
