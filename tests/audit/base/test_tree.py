"""What a folder holds: every file once, whatever its names, and no record of a picture and its text torn apart."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from audit.base.tree import AGAIN, NO_FILE, list_tree, why_no_file


def write(path: Path, content: str = "12") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(to, path.parent))


def tree(root: Path) -> dict[str, int]:
    return {os.path.relpath(path, root): size for path, size in list_tree(fsspec.filesystem("file"), str(root)).items()}


def test_other_names_of_a_file_are_told(tmp_path: Path) -> None:
    data = tmp_path / "data"
    real = write(data / "part-0.parquet")
    link(data / "latest.parquet", real)
    os.link(real, data / "sub.parquet")
    link(data / "outside.parquet", write(tmp_path / "far.parquet", "1234"))
    link(data / "outside-2.parquet", tmp_path / "far.parquet")
    os.link(write(data / "a.jpg"), data / "b.jpg")
    link(data / "gone.jpg", data / "nothing.jpg")
    write(data / "c.jpg")  # the same content, another file
    assert tree(data) == {
        "a.jpg": 2,
        "b.jpg": AGAIN,
        "c.jpg": 2,
        "gone.jpg": NO_FILE,
        "latest.parquet": AGAIN,
        "outside-2.parquet": 4,
        "outside.parquet": AGAIN,
        "part-0.parquet": 2,
        "sub.parquet": AGAIN,
    }
    assert why_no_file(str(data / "latest.parquet")) == why_no_file(str(data / "b.jpg")) == "the same file again"
    assert why_no_file(str(data / "gone.jpg")) == "broken links"


def test_a_file_behind_a_linked_folder_is_the_one_a_link_leads_to(tmp_path: Path) -> None:
    data, far = tmp_path / "data", tmp_path / "far"
    write(far / "a.jpg")
    link(data / "folder", far)
    link(data / "z.jpg", far / "a.jpg")
    assert tree(data) == {"folder/a.jpg": 2, "z.jpg": AGAIN}


@pytest.mark.parametrize("store", ["blobs/5f3a", ".git/annex/5f3a.jpg"])
def test_the_name_that_is_read_is_kept_where_a_store_holds_the_file(tmp_path: Path, store: str) -> None:
    """The hub keeps files below names without extension, git-annex in a hidden folder: both link to them."""
    blob = write(tmp_path / store)
    link(tmp_path / "main" / "b.jpg", blob)
    link(tmp_path / "main" / "a.jpg", blob)
    sizes = tree(tmp_path)
    assert (sizes["main/a.jpg"], sizes["main/b.jpg"]) == (2, AGAIN)


@pytest.mark.parametrize("make", [os.link, lambda to, path: link(path, to)])
def test_a_picture_keeps_its_text_and_a_text_its_picture(tmp_path: Path, make: object) -> None:
    """Equal texts are one file on the hub, and after a tool that links what is equal; so are equal pictures."""
    for name, picture, text in (("a", "1", "a dog"), ("b", "2", "a dog"), ("c", "1", "a cat"), ("d", "1", "a dog")):
        for kind, content in (("jpg", picture), ("txt", text)):
            blob = tmp_path / "blobs" / content
            if not blob.exists():
                write(blob, content)
            (tmp_path / "in").mkdir(exist_ok=True)
            make(blob, tmp_path / "in" / f"{name}.{kind}")  # type: ignore[operator]
    sizes = tree(tmp_path / "in")
    assert [name for name, size in sizes.items() if size == AGAIN] == ["d.jpg", "d.txt"]
