"""Whatever lies in a model's folder, or in a file given with it: it is loaded as what it is, or refused in one line."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipelines import FirstStepScorer, ModelError, find_model, load
from tests.command import be_audit
from tests.tiny import save_model

pytestmark = pytest.mark.faults
KINDS = ("sd1", "sdxl", "pixart", "sd3", "sana", "if")
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
settled = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.generate,)
)  # a smaller example would say no more


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """An absurd number that reaches a library ends as an error here, and not with the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def told(folder: Path, about: str = "model", **options: Any) -> str:
    """What is said of a model, in one line; empty where it is loaded, and scores then."""
    try:
        model = load(find_model(str(folder), **options), "cpu", "float32")
    except ModelError as error:
        said = str(error)
        assert error.about == about and "\n" not in said and len(said) < 2000, said
        assert said.startswith(str(folder)) or about != "model", said
        return said
    FirstStepScorer(model, steps=min(50, model.schedule.most_steps))(["a house"])
    return ""


DEEP = b"[" * 100_000 + b"]" * 100_000
CONTENTS = (b"", b"{}", b"[]", b"null", b"3", b"[[1, 2]]", b"\xff\xfe", DEEP, b'{"a": ' + DEEP + b"}")
GONE = object()
VALUES = (
    GONE,
    None,
    -1,
    0,
    3,
    10**9,
    10**400,
    1e308,
    float("nan"),
    True,
    "x",
    [],
    [None],
    [10**9],
    {},
    {"a": {"b": 1}},
)


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_configuration_that_is_something_else(folders: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    for file in sorted(folder.rglob("*.json")):
        kept = file.read_bytes()
        file.write_bytes(content)
        assert told(folder) or file.parent.name == "tokenizer", file  # whose small files have defaults
        file.write_bytes(kept)


@settings(settled, max_examples=15)
@given(data=st.data())
def test_a_configuration_with_another_value(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = folders[data.draw(st.sampled_from(KINDS))]
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.json"))]
    file = folder / data.draw(st.sampled_from(names))
    kept = file.read_text()
    facts = json.loads(kept)
    key, value = data.draw(st.sampled_from(sorted(facts))), data.draw(st.sampled_from(VALUES))
    changed = {name: each for name, each in facts.items() if name != key or value is not GONE}
    file.write_text(json.dumps(changed if value is GONE else {**changed, key: value}))
    try:
        told(folder)
    finally:
        file.write_text(kept)


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "sample_size", 10**6),
        ("unet/config.json", "block_out_channels", [10**6, 10**6]),
        ("text_encoder/config.json", "vocab_size", 10**8),
        ("text_encoder/config.json", "num_hidden_layers", 10**7),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "beta_end", 1e308),
        ("vae/config.json", "latent_channels", 16),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "latents_mean", [1.0]),
    ],
)
def test_numbers_that_no_model_has_are_said_before_they_are_built(
    folders: dict[str, Path], tmp_path: Path, file: str, key: str, value: object
) -> None:
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    facts = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**facts, key: value, **({"latents_std": [1.0]} if "mean" in key else {})}))
    assert told(folder)


@pytest.mark.parametrize(
    "kind, file, key, value",
    [
        ("sana", "transformer/config.json", "timestep_scale", [1.0]),
        ("sdxl", "tokenizer_2/tokenizer_config.json", "model_max_length", True),
        ("sd3", "tokenizer_2/tokenizer_config.json", "pad_token", None),
        ("sd3", "tokenizer_3/tokenizer_config.json", "extra_ids", 10**9),
        ("sd1", "unet/config.json", "dropout", float("nan")),
        ("if", "unet/config.json", "addition_embed_type_num_heads", 3),
    ],
)
def test_what_loads_but_cannot_predict_is_refused_before_the_first_caption(
    folders: dict[str, Path], tmp_path: Path, kind: str, file: str, key: str, value: object
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), key: value}))
    assert told(folder)


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(share * len(data))]


def lying(length: int) -> Callable[[bytes], bytes]:
    """A header that is said to be of another length."""
    return lambda data: struct.pack("<Q", length) + data[8:]


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        written = json.dumps(header).encode()
        return struct.pack("<Q", len(written)) + written + data[8 + length :]

    return changed


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(key for key in header if key != "__metadata__")]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": cut(0),
    "cut in the header": cut(0.01),
    "cut in the middle": cut(0.5),
    "cut at the end": cut(0.999),
    "not safetensors": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "header longer than the file": lying(1 << 40),
    "header of all bits": lying((1 << 64) - 1),
    "header too short": lying(16),
    "header nested": lambda data: struct.pack("<Q", len(DEEP)) + DEEP,
    "absurd shape": with_header(lambda header: first(header).update(shape=[10**12, 10**6])),
    "wrong shape": with_header(lambda header: first(header).update(shape=[1])),
    "offsets beyond the end": with_header(lambda header: first(header).update(data_offsets=[0, 1 << 50])),
    "unknown dtype": with_header(lambda header: first(header).update(dtype="F7")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_weight_file_that_is_damaged(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    for name in (UNET, "text_encoder/model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(DAMAGES[damage](kept))
        assert told(folder), name
        (folder / name).write_bytes(kept)
    assert not told(folder)


def test_weights_of_another_model_or_with_more_tensors(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    for name, other in ((UNET, folders["sdxl"] / UNET), (UNET, folders["sd1"] / VAE)):
        shutil.copy(other, folder / name)
        assert "unet/" in told(folder)
    shutil.copy(folders["sd1"] / UNET, folder / UNET)
    state = load_file(folder / VAE)
    save_file({**state, "huge": torch.zeros(1 << 20)}, folder / VAE)
    assert "vae/ has other weights than its config.json describes: 1 unknown (huge" in told(folder)


@pytest.mark.parametrize("content", ({}, {"weight_map": 3}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../x"}}))
def test_an_index_of_shards_that_lists_no_files(folders: dict[str, Path], tmp_path: Path, content: object) -> None:
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    (folder / UNET).rename(tmp_path / "x")
    (folder / f"{UNET}.index.json").write_text(json.dumps(content))
    assert "has no weight_map of files beside it" in told(folder)


def lora() -> dict[str, torch.Tensor]:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{stem}.lora_A.weight": torch.zeros(2, 16), f"{stem}.lora_B.weight": torch.zeros(16, 2)}


@pytest.mark.parametrize("kind", ("lora", "textual_inversion", "checkpoint"))
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_given_beside_the_folder(folders: dict[str, Path], tmp_path: Path, damage: str, kind: str) -> None:
    file, state = tmp_path / "given.safetensors", lora()
    save_file({"<x>": torch.zeros(2, 32)} if kind == "textual_inversion" else state, file)
    if kind != "checkpoint":
        options = {"loras": (str(file),)} if kind == "lora" else {"inversions": (f"{file}:<x>",)}
        assert not told(folders["sd1"], kind, **options)
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        assert str(file) in told(folders["sd1"], kind, **options)
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        assert told(file, model_config=str(folders["sd1"]))


def test_loras_of_any_names_and_shapes(folders: dict[str, Path], tmp_path: Path) -> None:
    """A name off by a word, a rank that does not fit: never merged in part."""
    rng, file = random.Random(0), tmp_path / "my.safetensors"
    shapes = ((), (0,), (2,), (2, 17), (0, 16))
    for _ in range(10):
        state = lora()
        key = rng.choice(sorted(state))
        value = state.pop(key)
        words = key.split(".")
        words[rng.randrange(len(words))] = rng.choice(["", "x", "é"])
        name = rng.choice([".".join(words), key])
        state[name] = torch.zeros(rng.choice(shapes)) if name == key else value
        save_file(state, file)
        assert told(folders["sd1"], "lora", loras=(str(file),)), sorted(state)


def test_the_command_says_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    """Whether found before anything is planned or by the worker that loads: exit 2."""
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    (tmp_path / "captions.csv").write_text("TEXT\na house\n")
    words = ["scan", tmp_path / "captions.csv", "--model", folder, "--device", "cpu", "-o"]
    damages = [("unet/config.json", DEEP), ("scheduler/scheduler_config.json", b""), (UNET, b"x" * 100)]
    for number, (name, content) in enumerate(damages):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        done = be_audit(*words, tmp_path / f"run{number}")
        lines = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        assert done.code == 2 and len(lines) == 1 and str(folder) in lines[0], (name, done)
        (folder / name).write_bytes(kept)
    assert be_audit(*words, tmp_path / "run").code == 0
