"""What people add to a model or keep beside folders: LoRA files, textual inversions, single checkpoints."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from pipelines import FirstStepScorer, ModelError, find_model, load

CAPTIONS = ["a red house", "two dogs on a very long green street"]
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FEED = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
PROJECTION = "down_blocks.1.attentions.0.proj_in"  # a convolution of one pixel
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK, ALPHA = 3, 6.0
State = dict[str, torch.Tensor]


def layer(pipe: Any, part: str, name: str) -> torch.Tensor:
    return getattr(pipe, part).get_submodule(name).weight


def text_layer(pipe: Any) -> str:
    """The name of a text encoder's layer: transformers 5 has no `text_model.` before it."""
    names = dict(pipe.text_encoder.named_modules())
    return TEXT if TEXT in names else f"text_model.{TEXT}"


def factors(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random down and up of rank RANK, shaped as trainers save them."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((RANK, *weight.shape[1:]), generator=generator) * 0.1
    up = torch.randn((weight.shape[0], RANK, *(1,) * (weight.ndim - 2)), generator=generator) * 0.1
    return down, up


def kohya(pipe: Any, layers: list[tuple[str, str]]) -> State:
    found = {}
    for seed, (part, name) in enumerate(layers):
        short = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
        written = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
        stem = f"{short}_{written.replace('.', '_')}"
        down, up = factors(layer(pipe, part, name), seed)
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}
    return found


def of_peft(pipe: Any, layers: list[tuple[str, str]]) -> State:
    found = {}
    for seed, (part, name) in enumerate(layers):
        down, up = factors(layer(pipe, part, name), seed)
        found |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    return found


def of_processors(pipe: Any, layers: list[tuple[str, str]]) -> State:
    found = {}
    for seed, (part, name) in enumerate(layers):
        down, up = factors(layer(pipe, part, name), seed)
        stem = re.sub(r"\.(to_q)$", r".processor.\1_lora", f"{part}.{name}")
        found |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return found


@pytest.fixture(scope="module")
def pipe(model_folders: dict[str, Path]) -> Any:
    return StableDiffusionPipeline.from_pretrained(model_folders["sd1"], safety_checker=None)


@pytest.mark.parametrize(
    "names, parts, scale, alpha",
    [
        (kohya, ("attention", "feed", "convolution", "projection", "text"), 0.5, ALPHA),
        (of_peft, ("attention", "feed", "convolution"), 1.0, RANK),
        (of_processors, ("attention",), 2.0, RANK),
    ],
)
def test_a_lora_is_merged(
    pipe: Any,
    model_folders: dict[str, Path],
    tmp_path: Path,
    names: Any,
    parts: tuple[str, ...],
    scale: float,
    alpha: float,
) -> None:
    """W + scale * alpha / rank * up @ down, in every layer the file names and in no other."""
    places = {
        "attention": ("unet", ATTENTION),
        "feed": ("unet", FEED),
        "convolution": ("unet", CONVOLUTION),
        "projection": ("unet", PROJECTION),
        "text": ("text_encoder", text_layer(pipe)),
    }
    layers = [places[part] for part in parts]
    file = tmp_path / "my.safetensors"
    save_file(names(pipe, layers), file)
    folder = find_model(str(model_folders["sd1"]), loras=(f"{file}:{scale:g}",))
    merged = load(folder, "cpu", "float32").pipeline
    changed = {f"{part}.{name}.weight" for part, name in layers}
    for part in ("unet", "text_encoder"):
        before = getattr(pipe, part).state_dict()
        for key, value in getattr(merged, part).state_dict().items():
            if f"{part}.{key}" not in changed:
                assert torch.equal(value, before[key]), key
    for seed, (part, name) in enumerate(layers):
        weight = layer(pipe, part, name)
        down, up = factors(weight, seed)
        change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(weight.shape)
        expected = weight + scale * alpha / RANK * change
        torch.testing.assert_close(layer(merged, part, name), expected, rtol=1e-5, atol=1e-6)
    assert folder.adapters()["lora"][0].endswith(f":{scale:g}")


def headed(pipe: Any, settings: dict[str, Any], file: Path) -> None:
    """A LoRA of two layers as diffusers' save_lora_weights leaves it: no `.alpha`, peft's settings in the header."""
    said = {
        **{"peft_type": "LORA", "bias": "none", "init_lora_weights": True, "lora_dropout": 0.1, "use_dora": False},
        **{"target_modules": ["to_q"], "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}},
        **{"r": RANK, "lora_alpha": ALPHA, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False},
        **settings,
    }
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in said.items()})}
    save_file(of_peft(pipe, [("unet", ATTENTION), ("unet", FEED)]), file, metadata=header)


@pytest.mark.parametrize(
    "settings, attention, feed",
    [
        ({}, ALPHA / RANK, ALPHA / RANK),
        ({"lora_alpha": 1, "use_rslora": True}, 1 / math.sqrt(RANK), 1 / math.sqrt(RANK)),
        ({"alpha_pattern": {"attn1.to_q": 1.5}}, 1.5 / RANK, ALPHA / RANK),
        ({"r": 16, "rank_pattern": {"to_q": RANK, r"ff\.net\.\d": RANK}}, ALPHA / RANK, ALPHA / RANK),
        ({"alpha_pattern": {"q": 1.5, f"x.{ATTENTION}": 2, ATTENTION: 3}}, 3 / RANK, ALPHA / RANK),
    ],
)
def test_a_lora_is_as_strong_as_its_header_says(
    pipe: Any, model_folders: dict[str, Path], tmp_path: Path, settings: dict[str, Any], attention: float, feed: float
) -> None:
    """alpha / r of peft (0.21: LoraLayer.update_layer, get_pattern_key), by hand."""
    headed(pipe, settings, tmp_path / "my.safetensors")
    folder = find_model(str(model_folders["sd1"]), loras=(f"{tmp_path}/my.safetensors:0.5",))
    merged = load(folder, "cpu", "float32").pipeline
    for seed, (name, factor) in enumerate(((ATTENTION, attention), (FEED, feed))):
        weight = layer(pipe, "unet", name)
        down, up = factors(weight, seed)
        torch.testing.assert_close(layer(merged, "unet", name), weight + 0.5 * factor * up @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, "its header sets unet.use_dora to True, which changes more than the product"),
        ({"bias": "all"}, "unet.bias to 'all'"),
        ({"fan_in_fan_out": True}, "unet.fan_in_fan_out to True"),
        ({"init_lora_weights": "pissa"}, "unet.init_lora_weights to 'pissa'"),
        ({"layer_replication": [[0, 2]]}, r"unet.layer_replication to \[\[0, 2\]\]"),
        ({"use_something_new": {"of": 2031}}, "unet.use_something_new to"),
        ({"r": 4}, f"{ATTENTION}: rank 4, where its factors have {RANK}"),
        ({"lora_alpha": "strong"}, "lora_alpha 'strong' is no number"),
        ({"alpha_pattern": {"(": 1}}, "is not understood"),
        ({"alpha_pattern": 3}, "is not understood"),
    ],
)
def test_a_header_that_says_anything_else_is_refused(
    pipe: Any, model_folders: dict[str, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    headed(pipe, settings, tmp_path / "my.safetensors")
    with pytest.raises(ModelError, match=message) as refused:
        load(find_model(str(model_folders["sd1"]), loras=(str(tmp_path / "my.safetensors"),)), "cpu")
    said = str(refused.value)
    assert refused.value.about == "lora" and said.startswith(f"{tmp_path}/my.safetensors: ") and "\n" not in said


@pytest.mark.parametrize(
    "header, extra, message",
    [
        ("{", {}, "lora_adapter_metadata of its header is not understood"),
        ("[1]", {}, "lora_adapter_metadata of its header is not understood"),
        ('{"lora_alpha": 4}', {}, "lora_alpha is of no part of this model"),
        ('{"unet.r": 3}', {f"unet.{ATTENTION}.alpha": torch.tensor(2.0)}, "alpha and its header both say how strong"),
        ("{}", {"unet.conv_in.alpha": torch.tensor(2.0)}, "1 tensors are not understood, unet.conv_in.alpha"),
    ],
)
def test_strengths_that_are_of_nothing_or_said_twice_are_refused(
    pipe: Any, model_folders: dict[str, Path], tmp_path: Path, header: str, extra: State, message: str
) -> None:
    state = {**of_peft(pipe, [("unet", ATTENTION)]), **extra}
    save_file(state, tmp_path / "my.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(ModelError, match=message) as refused:
        load(find_model(str(model_folders["sd1"]), loras=(str(tmp_path / "my.safetensors"),)), "cpu")
    assert refused.value.about == "lora" and "\n" not in str(refused.value)


def test_a_strength_of_no_layer_is_named(pipe: Any, model_folders: dict[str, Path], tmp_path: Path) -> None:
    state = {**kohya(pipe, [("unet", ATTENTION)]), "lora_unet_conv_in.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "my.safetensors")
    with pytest.raises(ModelError, match=r"names are not understood: .*lora_unet_conv_in\.alpha") as refused:
        load(find_model(str(model_folders["sd1"]), loras=(str(tmp_path / "my.safetensors"),)), "cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key, message",
    [
        ("lora_unet_x.hada_w1_a", "is LyCORIS LoHa, which is not understood"),
        ("lora_unet_x.lokr_w1", "is LyCORIS LoKr"),
        ("unet.x.dora_scale", "is DoRA"),
        ("unet.down_blocks.9.attentions.0.to_q.lora_A.weight", "no layer of this model: it was made for another"),
        ("unet.conv_in.something.weight", "1 tensors are not understood, unet.conv_in.something.weight the first"),
        ("model.weight", "has no LoRA layers|not understood"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused(
    model_folders: dict[str, Path], pipe: Any, tmp_path: Path, key: str, message: str
) -> None:
    state = {key: torch.zeros(RANK, 4)}
    if key.endswith("lora_A.weight"):
        state[key.replace("lora_A", "lora_B")] = torch.zeros(4, RANK)
    if key.startswith("unet.conv_in"):
        state |= of_peft(pipe, [("unet", ATTENTION)])
    save_file(state, tmp_path / "my.safetensors")
    with pytest.raises(ModelError, match=message) as refused:
        load(find_model(str(model_folders["sd1"]), loras=(str(tmp_path / "my.safetensors"),)), "cpu")
    assert refused.value.about == "lora" and "\n" not in str(refused.value)


def test_a_lora_of_another_width_is_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    stem = f"unet.{ATTENTION}"
    save_file(
        {f"{stem}.lora_A.weight": torch.zeros(3, 99), f"{stem}.lora_B.weight": torch.zeros(16, 3)}, tmp_path / "x"
    )
    with pytest.raises(ModelError, match="has another shape"):
        load(find_model(str(model_folders["sd1"]), loras=(str(tmp_path / "x"),)), "cpu")


@pytest.mark.parametrize(
    "options, about, message",
    [
        ({"loras": ("gone.safetensors",)}, "lora", "no such file"),
        ({"loras": (f"{__file__}:big",)}, "lora", "'big' is no scale"),
        ({"inversions": ("gone.pt",)}, "textual_inversion", "give FILE:TOKEN"),
        ({"inversions": ("gone.pt:<x>",)}, "textual_inversion", "no such file"),
        ({"model_config": "somewhere"}, "model_config", "goes with a single .safetensors checkpoint"),
    ],
)
def test_files_that_are_not_there(model_folders: dict[str, Path], options: Any, about: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        find_model(str(model_folders["sd1"]), **options)
    assert refused.value.about == about


@pytest.mark.parametrize("suffix", (".safetensors", ".pt"))
def test_a_textual_inversion_is_its_vectors(model_folders: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    file = tmp_path / f"style{suffix}"
    if suffix == ".pt":
        torch.save({"<style>": vectors}, file)
    else:
        save_file({"<style>": vectors}, file)
    folder = find_model(str(model_folders["sd1"]), inversions=(f"{file}:<style>",))
    model = load(folder, "cpu", "float32")
    found = model.encode(["a house <style>", "a house"])
    assert found.num_tokens[0] == found.num_tokens[1] + 3
    ids = model.pipeline.tokenizer(model.pipeline.maybe_convert_prompt("<style>", model.pipeline.tokenizer))[
        "input_ids"
    ]
    embedding = model.pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(embedding[ids[1:-1]], vectors)
    assert folder.adapters()["textual_inversion"][0].endswith(":<style>")
    assert folder.weights_sha256() == find_model(str(model_folders["sd1"])).weights_sha256()


def test_a_textual_inversion_of_another_width(model_folders: dict[str, Path], tmp_path: Path) -> None:
    save_file({"<style>": torch.zeros(3, 31)}, tmp_path / "style.safetensors")
    with pytest.raises(ModelError, match=r"style.safetensors: ") as refused:
        load(find_model(str(model_folders["sd1"]), inversions=(f"{tmp_path}/style.safetensors:<style>",)), "cpu")
    assert refused.value.about == "textual_inversion" and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "kind, tensors, message",
    [
        ("sdxl", ("<style>",), "has no vectors of <style> for text_encoder_2: it was made for another model"),
        ("sdxl", ("clip_l",), "has no vectors of <style> for text_encoder_2: it was made for another model"),
        ("sdxl", ("clip_g",), "has no vectors of <style> for text_encoder: it was made for another model"),
        ("sd1", ("clip_l", "clip_g"), "clip_g is for text_encoder_2, which this model does not have"),
        ("sdxl", ("clip_l", "clip_g"), ""),
    ],
)
def test_a_textual_inversion_has_vectors_for_every_encoder(
    model_folders: dict[str, Path], tmp_path: Path, kind: str, tensors: tuple[str, ...], message: str
) -> None:
    """Stable Diffusion 1's fit SDXL's first encoder; the second would read the token as letters."""
    vectors = {name: torch.full((2, 32), float(place)) for place, name in enumerate(tensors)}
    save_file(vectors, tmp_path / "style.safetensors")
    folder = find_model(str(model_folders[kind]), inversions=(f"{tmp_path}/style.safetensors:<style>",))
    if not message:
        pipe = load(folder, "cpu", "float32").pipeline
        for place, number in enumerate(("", "_2")):
            encoder, tokenizer = (getattr(pipe, f"{part}{number}") for part in ("text_encoder", "tokenizer"))
            token = tokenizer.convert_tokens_to_ids("<style>")
            assert (encoder.get_input_embeddings().weight[token] == place).all()
        return
    with pytest.raises(ModelError, match=f"style.safetensors: {message}") as refused:
        load(folder, "cpu")
    assert refused.value.about == "textual_inversion" and "\n" not in str(refused.value)


# -- single checkpoints ------------------------------------------------------------------------------------------------

RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}


def unet_key(key: str, per_block: int, up_blocks: tuple[str, ...]) -> str:
    """A U-Net's key by the original names of Stable Diffusion 1."""
    for new, old in OUTER.items():
        if key.startswith(new):
            return old + key[len(new) :]
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key):
        way, block, part, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if part == "downsamplers":
            return f"input_blocks.{(per_block + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
        if part == "upsamplers":
            behind = 2 if "CrossAttn" in up_blocks[block] else 1
            return f"output_blocks.{(per_block + 1) * block + per_block}.{behind}.{rest}"
        first = (per_block + 1) * block + place
        stem = f"input_blocks.{first + 1}" if way == "down" else f"output_blocks.{first}"
    else:
        match = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key)
        assert match is not None, key
        part, rest = match[1], match[3]
        stem = "middle_block"
        if part == "attentions":
            return f"{stem}.1.{rest}"
        name, rest = rest.split(".", 1)
        return f"{stem}.{2 * int(match[2])}.{RES[name]}.{rest}"
    if part == "attentions":
        return f"{stem}.1.{rest}"
    name, rest = rest.split(".", 1)
    return f"{stem}.0.{RES[name]}.{rest}"


def vae_key(key: str, value: torch.Tensor, blocks: int) -> tuple[str, torch.Tensor]:
    """A VAE's key by the original names, and its value: attention was a convolution."""
    key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", key)
    key = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
    key = re.sub(
        r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)",
        lambda match: f"decoder.up.{blocks - 1 - int(match[1])}.block.{match[2]}",
        key,
    )
    key = re.sub(
        r"decoder\.up_blocks\.(\d+)\.upsamplers\.0",
        lambda match: f"decoder.up.{blocks - 1 - int(match[1])}.upsample",
        key,
    )
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            key = key.replace(new, old)
        value = value[:, :, None, None] if value.ndim == 2 else value
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut"), value


def checkpoint(folder: Path) -> State:
    """A folder's weights as one file of the original code has them."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    config, found = pipe.unet.config, {}
    for key, value in pipe.unet.state_dict().items():
        name = unet_key(key, config.layers_per_block, config.up_block_types)
        found[f"model.diffusion_model.{name}"] = value.contiguous()
    for key, value in pipe.vae.state_dict().items():
        name, value = vae_key(key, value, len(pipe.vae.config.block_out_channels))
        found[f"first_stage_model.{name}"] = value.contiguous()
    for key, value in pipe.text_encoder.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        found[f"cond_stage_model.transformer.{name}"] = value.contiguous()
    return found


@pytest.fixture(scope="module")
def single(model_folders: dict[str, Path]) -> State:
    return checkpoint(model_folders["testbed"])


@pytest.fixture
def config(model_folders: dict[str, Path], tmp_path: Path) -> str:
    """A diffusers folder without weights."""
    return str(
        shutil.copytree(model_folders["testbed"], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    )


def test_a_checkpoint_scores_as_its_folder(
    single: State, config: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    save_file(single, tmp_path / "one.safetensors")
    folder = find_model(str(tmp_path / "one.safetensors"), model_config=config)
    assert folder.notes == [f"{tmp_path}/one.safetensors: prediction type epsilon, from {config}"]
    expected = FirstStepScorer(load(find_model(str(model_folders["testbed"])), "cpu", "float32"))(CAPTIONS).scores
    found = FirstStepScorer(load(folder, "cpu", "float32"))(CAPTIONS).scores
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize("how", ("metadata", "tensor"))
def test_the_prediction_type_is_the_files(single: State, config: str, tmp_path: Path, how: str) -> None:
    state = {**single, "v_pred": torch.zeros(1)} if how == "tensor" else single
    metadata = {"modelspec.prediction_type": "v"} if how == "metadata" else None
    how = how if how == "metadata" else "tensor v_pred"
    save_file(state, tmp_path / "v.safetensors", metadata=metadata)
    folder = find_model(str(tmp_path / "v.safetensors"), model_config=config)
    assert folder.notes == [f"{tmp_path}/v.safetensors: prediction type v_prediction, from the file's {how}"]
    model = load(folder, "cpu", "float32")
    assert model.schedule.scheduler.config.prediction_type == "v_prediction"


def test_checkpoints_are_loaded_strictly(single: State, config: str, tmp_path: Path) -> None:
    first = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    for change, message in (
        ({key: value for key, value in single.items() if key != first}, r"unet/ has other weights.* 1 missing"),
        ({key: value for key, value in single.items() if "mid.block_1.norm1" not in key}, r"vae/ .* missing"),
        ({key: value for key, value in single.items() if "layers.0.mlp.fc1" not in key}, r"text_encoder/ .* missing"),
    ):
        save_file(change, tmp_path / "one.safetensors")
        with pytest.raises(ModelError, match=message) as refused:
            load(find_model(str(tmp_path / "one.safetensors"), model_config=config), "cpu")
        assert "\n" not in str(refused.value)


def test_a_checkpoint_needs_a_configuration(single: State, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="is a single checkpoint; add --model-config FOLDER"):
        find_model(str(tmp_path / "one.safetensors"))
    with pytest.raises(ModelError, match="no such folder"):
        find_model(str(tmp_path / "one.safetensors"), model_config=str(tmp_path / "gone"))
