"""--compile: the same scores from compiled parts, and the plain ones wherever compiling fails or computes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from audit.run.read import read_scores
from audit.run.run import Run
from pipelines import DiffusionModel, FirstStepScorer, compiled, find_model, load
from pipelines.compiled import AFTER, OF, CompiledPart, compile_denoiser, uncompiled
from tests.command import be_audit
from tests.conftest import some_captions
from tests.tiny import save_model

CAPTIONS = ["a red house", "two dogs on a very long green street", "cat"]
Part = Callable[..., Any]


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    torch._dynamo.reset()


@pytest.fixture
def said() -> list[str]:
    return []


def one_part(forward: Part, said: list[str]) -> tuple[nn.Module, CompiledPart]:
    """A feed-forward whose compiled forward is given."""
    torch.manual_seed(0)
    part = FeedForward(8).requires_grad_(False)
    return part, CompiledPart("ff", part, forward, lambda name, why: said.append(f"{name}: {why}"))


KINDS = ("sd3", "sd1", "pixart", "sana")  # the others' networks are of these classes


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "sd3" else pytest.mark.slow) for kind in KINDS]
)
def test_every_family_scores_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Traced by torch as for its compiler, whose own code generation takes minutes; attention is read all the same."""
    monkeypatch.setattr(compiled, "AFTER", 1)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    model = load(find_model(str(save_model(kind, tmp_path))), "cpu", "float32")
    plain = FirstStepScorer(model)(CAPTIONS)
    parts = compile_denoiser(model, said.append)
    scorer = FirstStepScorer(model)
    scorer(CAPTIONS)
    found = scorer(CAPTIONS)
    assert parts and all(part.compiled and not part.failed for part in parts) and said == []
    assert found.scores.keys() == plain.scores.keys()
    for name, values in plain.scores.items():
        np.testing.assert_allclose(found.scores[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    if plain.mask is not None:
        assert found.mask is not None
        np.testing.assert_allclose(found.mask, plain.mask, atol=1e-5)


def test_no_part_holds_a_layer_that_attention_is_read_in(sd1: str) -> None:
    """torch calls no hook that is set on something inside of a compiled part."""
    model = load(find_model(sd1), "cpu", "float32")
    names = {part: name for name, part in model.denoiser.named_modules()}
    parts = [names[each.part] for each in compile_denoiser(model, pytest.fail)]
    layers = model.layers(model.denoiser)
    assert layers and len(set(parts)) == len(parts)
    assert not [(part, layer) for part in parts for layer in layers if f"{layer}.".startswith(f"{part}.")]
    assert not [(one, other) for one in parts for other in parts if other.startswith(f"{one}.")]
    compute = {name for name, part in model.denoiser.named_modules() if isinstance(part, FeedForward)}
    assert compute <= set(parts) and any(name.endswith("resnets.0") for name in parts)


@pytest.mark.slow
def test_the_compiler_itself_gives_what_the_part_gives(said: list[str]) -> None:
    part, wrapped = one_part(torch.compile(FeedForward.forward, dynamic=False, backend=compiled.BACKEND), said)
    rows = torch.randn(3, 5, 8)
    with torch.inference_mode():
        expected = FeedForward.forward(part, rows)
        for _ in range(AFTER + 1):
            found = part(rows)
    assert wrapped.compiled == {shape(3, 5, 8)} and said == []
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def shape(*sizes: int) -> tuple[tuple[torch.Size, torch.dtype]]:
    return ((torch.Size(sizes), torch.float32),)


def counted(change: Callable[[Tensor], Tensor] = lambda value: value) -> tuple[Part, list[int]]:
    """A forward that counts how often it was called."""
    calls = [0]

    def forward(part: FeedForward, rows: Tensor) -> Tensor:
        calls[0] += 1
        return change(FeedForward.forward(part, rows))

    return forward, calls


def test_a_shape_is_compiled_once_it_comes_often(said: list[str]) -> None:
    """The last batch of a shard is not worth it, however many shards there are, nor is what gradients are asked of."""
    forward, calls = counted()
    part, wrapped = one_part(forward, said)
    with torch.no_grad():
        for _ in range(AFTER - 1):
            part(torch.ones(4, 8))
        part(torch.ones(2, 8))
        assert calls == [0]
        part(torch.ones(4, 8))
        part(torch.ones(4, 8))
        assert calls == [2] and wrapped.compiled == {shape(4, 8)}
        for _ in range(3 * AFTER):  # shards of so many batches that a last one is rare
            for _ in range(OF // AFTER):
                part(torch.ones(4, 8))
            part(torch.ones(3, 8))
        assert wrapped.compiled == {shape(4, 8)}
        for _ in range(AFTER):  # a later stage's
            part(torch.ones(5, 8))
        assert wrapped.compiled == {shape(4, 8), shape(5, 8)}
        with uncompiled(nn.Sequential(part)):
            before = calls[0]
            for _ in range(2 * AFTER):
                part(torch.ones(6, 8))
                part(torch.ones(4, 8))
            assert calls == [before] and len(wrapped.compiled) == 2
        part(torch.ones(4, 8))
        assert calls == [before + 1]
    part(torch.ones(4, 8))
    assert calls == [before + 1] and said == []


def test_what_computes_something_else_is_never_used(said: list[str]) -> None:
    forward, calls = counted(lambda value: value * 1.01)
    part, wrapped = one_part(forward, said)
    with torch.no_grad():
        expected = FeedForward.forward(part, torch.ones(4, 8))
        for _ in range(2 * AFTER):
            assert torch.equal(part(torch.ones(4, 8)), expected)
    assert calls == [1] and wrapped.failed == {shape(4, 8)}
    assert said == ["ff: its output is not the plain part's (off by 0.01)"]


def test_what_overflows_is_compared_another_time(said: list[str]) -> None:
    forward, calls = counted()
    part, wrapped = one_part(forward, said)
    with torch.no_grad():
        for _ in range(AFTER):
            part(torch.full((4, 8), torch.inf))
        assert calls == [0] and not wrapped.compiled
        part(torch.ones(4, 8))
    assert calls == [1] and wrapped.compiled and said == []


def test_where_nothing_compiles_a_line_says_so_and_the_scores_are_the_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("no C++ compiler found\nmore of it")

    monkeypatch.setattr(compiled, "AFTER", 1)
    monkeypatch.setattr(compiled, "BACKEND", broken)
    model = load(find_model(str(save_model("sd3", tmp_path))), "cpu", "float32")
    plain = FirstStepScorer(model)(CAPTIONS).scores
    parts = compile_denoiser(model, said.append)
    found = FirstStepScorer(model)(CAPTIONS).scores
    assert all(part.failed and not part.compiled for part in parts)
    (line,) = said
    assert line.startswith("--compile: ") and line.endswith("as it is: FileNotFoundError: no C++ compiler found")
    for name, values in plain.items():
        assert np.array_equal(found[name], values, equal_nan=True), name


def test_a_python_that_torch_does_not_compile_on_is_a_line(
    sd1: str, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", refused)
    model: DiffusionModel = load(find_model(sd1), "cpu", "float32")
    assert compile_denoiser(model, said.append) == []
    assert len(said) == 1 and "not supported on Python 3.99+" in said[0]


@pytest.mark.slow
def test_a_scan_goes_on_with_it_or_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes how fast scores are, not what they are: no part of what a run is begun with."""
    monkeypatch.setattr(compiled, "AFTER", 1)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    made = list[CompiledPart]()
    plainly = compiled.compile_denoiser
    monkeypatch.setattr(compiled, "compile_denoiser", lambda *given: made.extend(plainly(*given)))
    pq.write_table(pa.table({"TEXT": some_captions(12)}), tmp_path / "captions.parquet")
    model = save_model("pixart", tmp_path / "model")
    words = ("scan", tmp_path / "captions.parquet", "--model", model, "--batch-size", 4)
    assert be_audit(*words, "-o", tmp_path / "plain").code == 0 and not made
    assert be_audit(*words, "--compile", "-o", tmp_path / "compiled").code == 0
    assert made and all(part.compiled for part in made)
    again = be_audit(*words, "-o", tmp_path / "compiled")
    assert again.code == 0 and "nothing to do" in again.out
    one, other = (read_scores(Run.open(str(tmp_path / name))).to_pandas() for name in ("plain", "compiled"))
    assert len(one) and (one.caption == other.caption).all()
    for name in ("magnitude", "ld_energy", "excess"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5)
