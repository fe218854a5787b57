"""What is scored is the model in the folder: folders as people have them load as what they are, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pipelines import FirstStepScorer, ModelError, find_model, load

CAPTIONS = ["a red house", "two dogs on a very long green street"]
UNET, TEXT, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
State = dict[str, torch.Tensor]


@pytest.fixture
def copy(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of sd1's shape, to be changed."""
    return Path(shutil.copytree(model_folders["sd1"], tmp_path / "model"))


def weights(file: Path, change: Callable[[State], State]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def scores(folder: Path) -> dict[str, Any]:
    return FirstStepScorer(load(find_model(str(folder)), "cpu", "float32"))(CAPTIONS).scores


def without(state: State, count: int) -> State:
    return dict(sorted(state.items())[count:])


def reshaped(state: State) -> State:
    return {key: value[:-1].clone() if value.ndim == 2 else value for key, value in state.items()}


def unfused(state: State) -> State:
    found = {}
    for key, value in state.items():
        stem, name = key.rsplit(".", 1)
        if ".attn" in key and name == "weight" and stem.endswith(("to_q", "to_k")):
            found[f"{stem}.base_layer.weight"] = value
            found[f"{stem}.lora_A.default.weight"] = torch.zeros(4, value.shape[1])
        else:
            found[key] = value
    return found


def overflowing(state: State) -> State:
    key = min(state)
    return {**state, key: torch.full_like(state[key], float("nan"))}


@pytest.mark.parametrize("file", (UNET, TEXT, VAE))
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {f"module.{key}": value for key, value in state.items()}, "saved from a DataParallel model"),
        (lambda state: without(state, 2), r"2 missing \("),
        (lambda state: {**state, "extra.weight": torch.zeros(2)}, r"1 unknown \(extra.weight"),
        (reshaped, "of another shape"),
        (overflowing, "1 weights that are not finite in float32"),
    ],
    ids=("prefix", "missing", "unknown", "shape", "finite"),
)
def test_weights_that_are_not_the_configurations(
    copy: Path, file: str, change: Callable[[State], State], message: str
) -> None:
    weights(copy / file, change)
    with pytest.raises(ModelError, match=message) as refused:
        load(find_model(str(copy)), "cpu", "float32")
    said = str(refused.value)
    assert said.startswith(f"{copy}: ") and f"{file.split('/')[0]}/" in said and "\n" not in said


def test_a_lora_saved_unfused_names_the_way_out(copy: Path) -> None:
    weights(copy / UNET, unfused)
    with pytest.raises(ModelError, match=r"missing .* unknown .*fuse it before saving, or .* --lora FILE"):
        load(find_model(str(copy)), "cpu")


def test_weights_too_large_for_half_precision(copy: Path) -> None:
    weights(copy / UNET, lambda state: {**state, "conv_in.bias": torch.full_like(state["conv_in.bias"], 1e6)})
    load(find_model(str(copy)), "cpu", "float32")
    with pytest.raises(ModelError, match=r"unet/ has 1 weights that are not finite in float16, conv_in.bias the first"):
        load(find_model(str(copy)), "cpu", "float16")


def test_shards_are_all_there(copy: Path) -> None:
    expected = load_file(copy / UNET)
    UNet2DConditionModel.from_pretrained(copy / "unet").save_pretrained(copy / "unet", max_shard_size="50KB")
    (copy / UNET).unlink()
    for name, value in load(find_model(str(copy)), "cpu", "float32").pipeline.unet.state_dict().items():
        assert torch.equal(value, expected[name])
    sorted((copy / "unet").glob("*-00002-of-*.safetensors"))[0].unlink()
    with pytest.raises(ModelError, match=r"unet/ has \d+ of \d+ shards, .*-00002-of-.* is not there"):
        find_model(str(copy))


@pytest.mark.parametrize("file", (UNET, TEXT))
def test_the_same_weights_whole_and_in_shards_are_refused(copy: Path, file: str) -> None:
    """diffusers loads the shards, transformers the whole file: neither library's order is for us to guess."""
    keys = sorted(load_file(copy / file))
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "other.safetensors")}
    (copy / f"{file}.index.json").write_text(json.dumps(index))
    save_file(
        {key: value + 1 for key, value in load_file(copy / file).items()}, (copy / file).parent / "other.safetensors"
    )
    part, name = file.split("/")
    with pytest.raises(ModelError, match=f"{part}/ has {name} and {name}.index.json, which may differ: keep one of"):
        find_model(str(copy))
    (copy / file).unlink()
    assert copy / part / "other.safetensors" in find_model(str(copy)).loaded_files()


@pytest.mark.parametrize("part", ("unet", "vae", "text_encoder"))
def test_quantised_parts_are_refused_by_name(copy: Path, part: str) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit(copy / part / "config.json", quantization_config=settings)
    message = (
        rf"{part}/config.json has a quantization_config \(bitsandbytes\): quantised weights are not read; give the"
    )
    with pytest.raises(ModelError, match=message):
        find_model(str(copy))
    edit(copy / part / "config.json", quantization_config=None)
    find_model(str(copy))


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / VAE).unlink()
    with pytest.raises(ModelError, match="vae/ has no weights"):
        find_model(str(copy))


@pytest.mark.parametrize("name", ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"))
def test_other_classes_over_the_same_weights_score_the_same(
    copy: Path, model_folders: dict[str, Path], name: str
) -> None:
    before = find_model(str(copy)).weights_sha256()
    edit(copy / "model_index.json", _class_name=name)
    expected = scores(model_folders["sd1"])
    for key, values in scores(copy).items():
        np.testing.assert_array_equal(values, expected[key])
    assert find_model(str(copy)).weights_sha256() == before


def halved(folder: Path, *files: str) -> None:
    for file in files:
        state = {key: value.half() for key, value in load_file(folder / file).items()}
        save_file(state, folder / file.replace(".safetensors", ".fp16.safetensors"), metadata={"format": "pt"})


def test_variants_are_found_and_said_and_never_preferred(copy: Path) -> None:
    halved(copy, UNET, TEXT, VAE)
    plain = find_model(str(copy))
    assert plain.notes == []
    before, exact = plain.weights_sha256(), scores(copy)
    for file in (UNET, TEXT, VAE):
        (copy / file).unlink()
    found = find_model(str(copy))
    assert found.notes == [f"{copy}: unet, vae, text_encoder have no plain weights: loaded from .fp16. files"]
    assert found.weights_sha256() != before
    np.testing.assert_allclose(scores(copy)["magnitude"], exact["magnitude"], rtol=0.05)
    shutil.copy(copy / UNET.replace(".saf", ".fp16.saf"), copy / UNET.replace(".saf", ".ema.saf"))
    with pytest.raises(ModelError, match="unet/ has weights of the variants ema, fp16 only: keep one of them"):
        find_model(str(copy))


def test_only_what_is_loaded_is_hashed(copy: Path) -> None:
    before = find_model(str(copy)).weights_sha256()
    halved(copy, UNET)
    for name in ("safety_checker", "feature_extractor"):
        (copy / name).mkdir()
        (copy / name / "config.json").write_text("{}")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    (copy / "tokenizer" / "notes.txt").write_text("mine")
    edit(copy / "model_index.json", _diffusers_version="0.1", safety_checker=["diffusers", "X"])
    assert find_model(str(copy)).weights_sha256() == before
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=70)
    assert find_model(str(copy)).weights_sha256() != before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"class_embed_type": "timestep"}, "sets class_embed_type to 'timestep'"),
        ({"num_class_embeds": 1000}, "sets num_class_embeds to 1000"),
        ({"encoder_hid_dim_type": "image_proj"}, "sets encoder_hid_dim_type to 'image_proj'"),
        ({"addition_embed_type": "text_image"}, "sets addition_embed_type to 'text_image'"),
        ({"cross_attention_dim": 48}, "takes text embeddings of width 48, but text_encoder give"),
    ],
)
def test_conditions_that_no_prompt_gives(copy: Path, settings: dict[str, Any], message: str) -> None:
    edit(copy / "unet" / "config.json", **settings)
    with pytest.raises(ModelError, match=message):
        find_model(str(copy))


def test_the_xl_refiner_is_called_that(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folders["sdxl"], tmp_path / "refiner"))
    edit(folder / "model_index.json", requires_aesthetics_score=True, _class_name="StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(ModelError, match="it is SDXL's refiner"):
        find_model(str(folder))


def test_parts_of_another_class_are_refused(copy: Path) -> None:
    edit(copy / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(ModelError, match="its vae is a AutoencoderTiny"):
        find_model(str(copy))


def test_what_a_configuration_leaves_out_is_its_classs_default(copy: Path) -> None:
    config = json.loads((copy / "unet" / "config.json").read_text())
    for key in ("in_channels", "out_channels", "down_block_types"):
        del config[key]
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="down_block_types"):  # four blocks by default, where there are two widths
        load(find_model(str(copy)), "cpu")
    config["down_block_types"] = ["CrossAttnDownBlock2D"] * 2  # and channels are 4 by default, as they were
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    assert np.isfinite(scores(copy)["magnitude"]).all()


def test_a_tokenizer_without_a_length_has_its_encoders(copy: Path, model_folders: dict[str, Path]) -> None:
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    long = ["a long caption " * 40, *CAPTIONS]
    found = load(find_model(str(copy)), "cpu").encode(long)
    expected = load(find_model(str(model_folders["sd1"])), "cpu").encode(long)
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.truncated, expected.truncated)


def test_a_tokenizer_with_more_words_than_the_encoder(copy: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(copy, safety_checker=None)
    pipe.tokenizer.add_tokens(["<mine>"])
    pipe.tokenizer.save_pretrained(copy / "tokenizer")
    with pytest.raises(ModelError, match=r"tokenizer/ gives ids up to \d+, but text_encoder/ has embeddings for \d+"):
        load(find_model(str(copy)), "cpu")


def test_a_tokenizer_with_another_end_token(copy: Path) -> None:
    edit(copy / "text_encoder" / "config.json", eos_token_id=5)
    with pytest.raises(ModelError, match=r"tokenizer/ ends prompts with id \d+, but text_encoder/config.json says 5"):
        load(find_model(str(copy)), "cpu")


def test_counted_is_what_was_encoded(copy: Path) -> None:
    """A learned token of six vectors is six tokens of the prompt, for the end, the count and the cut."""
    pipe = StableDiffusionPipeline.from_pretrained(copy, safety_checker=None)
    length = pipe.tokenizer.model_max_length
    pipe.tokenizer.add_tokens(["<mystyle>", *(f"<mystyle>_{i}" for i in range(1, 6))])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.save_pretrained(copy)
    model = load(find_model(str(copy)), "cpu")
    seen: list[torch.Tensor] = []
    handle = model.pipeline.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = model.encode(["a house <mystyle>", "<mystyle> " * 14 + "a house", "a house"])
    handle.remove()
    is_end = seen[0] == model.pipeline.tokenizer.eos_token_id
    plain = int(found.num_tokens[2])
    assert found.num_tokens.tolist() == [plain + 6, plain + 84, plain]
    assert found.truncated.tolist() == [False, True, False]
    assert found.eos_positions.tolist() == is_end.int().argmax(1).tolist() == [plain + 7, length - 1, plain + 1]


def test_names_of_older_versions_are_read(copy: Path, model_folders: dict[str, Path]) -> None:
    """As the published Stable Diffusion 1 has them: the VAE's attention by other names, a buffer nothing reads."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def renamed(state: State) -> State:
        found = {}
        for key, value in state.items():
            for new, name in old.items():
                key = key.replace(new, name) if "attentions" in key else key
            found[key] = value
        return found

    weights(copy / VAE, renamed)
    weights(copy / TEXT, lambda state: {**state, "text_model.embeddings.position_ids": torch.arange(77)[None]})
    edit(copy / "text_encoder" / "config.json", eos_token_id=2)
    model, plain = (load(find_model(str(each)), "cpu", "float32") for each in (copy, model_folders["sd1"]))
    latents = plain.noise_bank(1, 0)
    assert torch.equal(model.decode(latents), plain.decode(latents))
    assert torch.equal(model.encode(CAPTIONS).hidden, plain.encode(CAPTIONS).hidden)
