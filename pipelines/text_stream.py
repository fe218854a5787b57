"""Embeddings of captions as a stream: encoded in batches ahead of the one that is needed, and dropped behind it."""

from __future__ import annotations

import collections
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pipelines.batching import AdaptiveBatches
from pipelines.model import DiffusionModel, Embeddings


class TextStream:
    """Embeddings of N captions, taken front to back.

    A text encoder's tokenizer takes a twentieth to a tenth of the time in which a GPU scores its captions, so with
    `ahead` it runs beside the denoiser. Only what is in use is kept on the device (118 kB a prompt for Stable
    Diffusion 1 in float16).

    Args:
        model: whose `encode`. captions: N. at_once: captions of a batch; fewer where memory runs out.
        ahead: batches encoded ahead, from now on; 0 encodes each when it is asked for.
        thread: of one worker, which encodes ahead; streams share it, since a tokenizer serves one thread.
    """

    def __init__(
        self,
        model: DiffusionModel,
        captions: list[str],
        at_once: int,
        ahead: int = 0,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.model, self.captions, self.ahead = model, captions, ahead
        self._parts = collections.deque(slice(at, at + at_once) for at in range(0, len(captions), at_once))
        self._thread = thread
        self._coming: collections.deque[tuple[slice, Future[Embeddings]]] = collections.deque()
        self._first = self._end = 0  # captions whose embeddings are held: [first, end)
        self._held: list[Embeddings] = []
        self._facts: list[tuple[Tensor, Tensor]] = []
        self._look_ahead()

    def close(self) -> None:
        """Give up what was encoded ahead."""
        for _, future in self._coming:
            future.cancel()
        self._coming.clear()
        self._parts.clear()

    def take(self, rows: Tensor) -> Embeddings:
        """The embeddings of some captions, [B] indices; those before the first of them are given up."""
        first, last = int(rows.min()), int(rows.max())
        while self._end <= last:
            self._encode_next()
        while self._first + len(self._held[0]) <= first:
            self._first += len(self._held.pop(0))
        if len(self._held) > 1:
            self._held = [Embeddings.concatenate(self._held)]
        return self._held[0].take(rows - self._first)

    def facts(self) -> tuple[Tensor, Tensor]:
        """`num_tokens` and `truncated` of all captions once they were taken, [N] each, on the CPU."""
        tokens, truncated = zip(*self._facts, strict=True)
        return torch.cat(tokens), torch.cat(truncated)

    def _look_ahead(self) -> None:
        while self._thread and self._parts and len(self._coming) < self.ahead:
            part = self._parts.popleft()
            self._coming.append((part, self._thread.submit(self._encode, part)))

    def _encode_next(self) -> None:
        if self._coming:
            part, future = self._coming.popleft()
            try:
                found = future.result()
            except torch.OutOfMemoryError:  # beside the denoiser; it waits now
                assert self._thread is not None
                found = self._thread.submit(self._encode, part).result()
        else:
            found = self._encode(self._parts.popleft())
        self._held.append(found)
        self._end += len(found)
        self._facts.append((found.num_tokens.cpu(), found.truncated.cpu()))
        self._look_ahead()

    def _encode(self, part: slice) -> Embeddings:
        captions = self.captions[part]
        batches = AdaptiveBatches(len(captions))
        parts = batches.run(len(captions), lambda rows: self.model.encode(captions[rows]))
        return Embeddings.concatenate([found for _, found in parts])
