"""A row is read once, whatever names its file has and whatever `datasets` keeps beside it; what is not read is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from audit.captions import find_captions
from tests.audit.captions.test_captions_found import plan_of, rows_of
from tests.audit.captions.test_captions_kinds import ipc, parquet

datasets.disable_progress_bars()
AGAIN = "the same file again"


@pytest.mark.parametrize("given", [["in"], ["in/*"], ["in/**/*.parquet"], ["in/part-0.parquet", "in/latest.parquet"]])
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_file_with_two_names_is_read_once(tmp_path: Path, make: Callable[..., None], given: list[str]) -> None:
    real = parquet(tmp_path / "in" / "part-0.parquet", caption=["a sofa", "a bed"])
    make(real, tmp_path / "in" / "latest.parquet")
    plan = plan_of([str(tmp_path / name) for name in given], tmp_path / "run")
    assert [row["caption"] for row in rows_of(plan, tmp_path / "run")] == ["a sofa", "a bed"]
    assert plan.facts.left_out == {AGAIN: 1}
    assert plan.files[0].path == str(real) or make is os.link  # a link is the other name
    assert plan.facts.lines(2, 2, 0)[1] == f"left out: 1 {AGAIN}"


def test_two_links_to_a_file_elsewhere_are_one(tmp_path: Path) -> None:
    """As the hub keeps two equal files of a data set."""
    blob = parquet(tmp_path / "hub" / "blobs" / "5f3a", caption=["a sofa"])
    for name in ("a", "b"):
        (tmp_path / "hub" / "main").mkdir(exist_ok=True)
        (tmp_path / "hub" / "main" / f"{name}.parquet").symlink_to(blob)
    for given, other in ((tmp_path / "hub" / "main", {}), (tmp_path / "hub", {"of other kinds": 1})):
        plan = plan_of(given, tmp_path / "run")
        assert (plan.num_rows, plan.facts.left_out) == (1, {AGAIN: 1, **other})


def test_a_link_is_read_where_its_file_is_not(tmp_path: Path) -> None:
    real = parquet(tmp_path / "in" / "_old" / "part-0.parquet", caption=["a sofa"])
    (tmp_path / "in" / "latest.parquet").symlink_to(real)
    for given, left in ((tmp_path / "in", {"hidden": 1}), (tmp_path / "in" / "**" / "latest*", {})):
        plan = plan_of(given, tmp_path / "run")
        assert (plan.num_rows, plan.facts.left_out) == (1, left)


def test_a_folder_given_by_two_ways_is_read_once(tmp_path: Path) -> None:
    parquet(tmp_path / "in" / "a.parquet", caption=["a sofa"])
    (tmp_path / "same").symlink_to(tmp_path / "in")
    found = find_captions([tmp_path / "same", tmp_path / "in"])
    assert [source.path for source in found.sources] == [str(tmp_path / "in" / "a.parquet")]
    assert found.left_out == {AGAIN: 1}


def saved(folder: Path) -> Path:
    """A saved data set of two rows, with a cache of the same rows, changed, beside them."""
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(folder)
    datasets.load_from_disk(str(folder)).map(lambda row: {"text": row["text"] + "!"}, load_from_cache_file=False)
    assert len(list(folder.glob("cache-*.arrow"))) == 1
    return folder


def test_what_datasets_keeps_beside_a_saved_set_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path / "in" / "set")
    beside = {"beside a saved data set": 1}
    for given, left in (
        (tmp_path / "in", {**beside, ".json, read where named": 2}),
        (tmp_path / "in" / "set", beside),
        (tmp_path / "in" / "*" / "*.arrow", beside),
    ):
        plan = plan_of(given, tmp_path / "run")
        assert [row["caption"] for row in rows_of(plan, tmp_path / "run")] == ["one", "two"], given
        assert plan.facts.left_out == left, given
    both = plan_of([str(tmp_path / "in"), str(tmp_path / "in" / "set")], tmp_path / "run")
    assert both.num_rows == 2


def test_a_split_of_a_saved_set_and_its_files_are_the_same(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} one"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "in" / "set")
    given = [str(tmp_path / "in"), f"{tmp_path}/in/set:train"]
    plan = plan_of(given, tmp_path / "run")
    assert sorted(row["caption"] for row in rows_of(plan, tmp_path / "run")) == ["test one", "train one"]
    assert plan.facts.left_out[AGAIN] == 1


def test_what_datasets_made_of_a_set_in_its_own_cache_is_not_read(tmp_path: Path) -> None:
    """Where `load_dataset` keeps a set there is no state.json; a file that is only called so is one."""
    name = "cache-0123456789abcdef_00000_of_00002.arrow"
    for folder in (tmp_path / "in" / "x", tmp_path / "in" / "y"):
        folder.mkdir(parents=True)
        ipc(folder / name, text=["one"])
    ipc(tmp_path / "in" / "x" / "x-train.arrow", text=["one", "two"])
    (tmp_path / "in" / "x" / "dataset_info.json").write_text("{}")
    found = find_captions([tmp_path / "in"])
    assert [Path(source.path).name for source in found.sources] == ["x-train.arrow", name]
    assert found.left_out == {"beside a saved data set": 1, ".json, read where named": 1}


def test_equal_tables_that_are_two_files_stay_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        parquet(tmp_path / "in" / f"{name}.parquet", caption=["a sofa"])
    assert pq.read_table(tmp_path / "in" / "a.parquet") == pq.read_table(tmp_path / "in" / "b.parquet")
    assert plan_of(tmp_path / "in", tmp_path / "run").num_rows == 2
