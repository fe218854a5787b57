"""How busy a scan keeps its device, shown without one: a stand-in takes a fixed time a batch and computes nothing.

    python -m tests.benchmarks.bench_device [--rows 12000] [--rates 300 600] [--latency 0 0.1]

The real scan reads, tokenizes, packs masks of 64 x 64 cells, writes, reads back and commits; text encoder and denoiser
are the stand-in. As a GPU does, it takes a batch at once and works on it, one after the other, while the caller goes
on; a batch takes as long as that many captions a second mean. Busy is its share of the time from the first batch to the
last commit. One shard at a time, prompts encoded when they are needed, every batch waited for, is how it was; beside it
what it is now, in the same process. With a latency every request to the store takes as long.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipelines
from audit.base.storage import Folder
from audit.engines import local
from audit.scores.scan import ScanConfig, scan
from pipelines import first_step
from pipelines.families import StableDiffusion
from pipelines.text_stream import TextStream
from tests.benchmarks.bench_planning import write_captions

SIDE, WIDTH = 64, 768  # cells of a mask and width of an embedding, as Stable Diffusion 1 has them


class NoEncoder(nn.Module):
    """In the place of a text encoder: embeddings at once, whatever the ids."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.config, self.dtype = encoder.config, encoder.dtype

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.zeros(*input_ids.shape, WIDTH),)


class Asked:
    """In the place of a copy from the device: there once the device has done what it was asked before."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        self.found, self.ready = found, Device.free

    def wait(self) -> dict[str, Tensor]:
        time.sleep(max(self.ready - time.monotonic(), 0.0))
        return self.found


class Device(pipelines.FirstStepScorer):
    """In the place of the scorer: a batch keeps it busy for its time, and gives what it has at hand.

    Class attributes:
        rate: captions a second. look_ahead: batches of prompts. first, free: when it began, and when it has done all
            that it was asked for (time.monotonic). busy: seconds of work.
    """

    rate, look_ahead = 300.0, 2
    first, free, busy = 0.0, 0.0, 0.0

    def __init__(self, model: Any, *arguments: Any, **named: Any) -> None:
        self.answers: dict[str, Tensor] = {}
        super().__init__(model, *arguments, **named)
        self.ahead = self.look_ahead
        names = ("magnitude", "ld", "ld_energy", "webster", "attention_entropy", "cosine", "excess", "excess_pca")
        self.answers = {name: torch.linspace(1, 2, self.batches.batch_size) for name in names}
        maps = torch.rand(self.batches.batch_size, SIDE, SIDE)
        self.answers |= {"mask": maps, "energy_mask": maps}
        model.pipeline.text_encoder = NoEncoder(model.pipeline.text_encoder)

    def differences(self, captions: list[str], on_batch: Callable[[int], None] | None = None) -> Tensor:
        return torch.rand(len(captions), len(self.noises), 4, SIDE, SIDE)

    def _unconditional(self, level: Any) -> Tensor:
        return torch.zeros_like(self.noises)

    def _score(self, texts: TextStream, part: slice) -> dict[str, Tensor]:
        texts.take(torch.arange(part.start, part.stop))
        now, seconds = time.monotonic(), (part.stop - part.start) / self.rate
        Device.first = Device.first or now
        Device.free = max(Device.free, now) + seconds
        Device.busy += seconds
        return {name: values[: part.stop - part.start] for name, values in self.answers.items()}


def busy(captions: str, rate: float, latency: float, overlap: bool) -> tuple[float, float]:
    """Share of the time in which the device computed, and captions a second."""
    Device.rate, Device.look_ahead = rate, 2 if overlap else 0
    Device.first = Device.free = Device.busy = 0.0

    def slow(plain: Any) -> Any:
        def request(*arguments: Any) -> Any:
            time.sleep(latency)
            return plain(*arguments)

        return request

    with tempfile.TemporaryDirectory() as folder:
        config = ScanConfig(
            (captions,), f"{folder}/run", model="testbed", device="cpu", self_check=False, second_look=0
        )
        with pytest.MonkeyPatch.context() as stand_in:
            stand_in.setattr(pipelines, "FirstStepScorer", Device)
            stand_in.setattr(first_step, "HostCopy", Asked)
            stand_in.setattr(first_step, "one_behind", first_step.one_behind if overlap else iter)
            stand_in.setattr(StableDiffusion, "latent_shape_of", classmethod(lambda *_: (4, SIDE, SIDE)))
            stand_in.setattr(local, "HAND", 3 if overlap else 1)
            stand_in.setattr(Folder, "write", slow(Folder.write))
            stand_in.setattr(Folder, "read", slow(Folder.read))
            done = scan(config)
        taken = time.monotonic() - Device.first
        assert done.exit_code == 0, done
        return Device.busy / taken, (sum(done.counts.values()) - done.counts.get("duplicate", 0)) / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[300.0, 600.0])
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| captions a second of the device | a request takes | busy, one shard at a time | busy, as it is | ratio |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        captions = Path(folder, "captions.parquet")
        write_captions(captions, args.rows)
        for rate in args.rates:
            for latency in args.latency:
                (plain, slow), (now, fast) = (busy(str(captions), rate, latency, overlap) for overlap in (False, True))
                print(
                    f"| {rate:g} | {latency * 1000:g} ms | {plain:.1%} ({slow:.0f}/s) | {now:.1%} ({fast:.0f}/s) | "
                    f"{now / plain:.2f} |"
                )


if __name__ == "__main__":
    main()
