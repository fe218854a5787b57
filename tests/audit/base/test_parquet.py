"""Encrypted Parquet is refused by name: of some, pyarrow ends the process when their metadata is looked at."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from audit.base.parquet import open_parquet, repeated
from audit.captions import describe_captions
from audit.captions.rows import Rows
from tests.command import be_audit


class Keys(encryption.KmsClient):
    """A key server that wraps a key by writing it down."""

    def __init__(self, _: Any) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, name: str) -> bytes:
        return base64.b64decode(wrapped)


def encrypted(path: Path, plain_footer: bool, columns: list[str]) -> Path:
    """A table of captions and pictures, some of whose columns are encrypted."""
    factory = encryption.CryptoFactory(Keys)
    how = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": columns}, plaintext_footer=plain_footer
    )
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    table = pa.table({"TEXT": ["a", "b"], "label": ["none", "none"], "image": [b"x", b"y"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("columns", [["TEXT"], ["label"], ["TEXT", "label", "image"]])
@pytest.mark.parametrize("plain_footer", [True, False])
def test_10_an_encrypted_table_is_one_line(tmp_path: Path, sd1: str, plain_footer: bool, columns: list[str]) -> None:
    path = encrypted(tmp_path / "in" / "x.parquet", plain_footer, columns)
    for words in (
        ["scan", path, "-o", tmp_path / "run", "--model", sd1],
        ["scan", path.parent, "-o", tmp_path / "run", "--model", sd1, "--dry-run"],
        ["index", "build", path.parent, "-o", tmp_path / "index", "--sscd", "testbed"],
    ):
        found = be_audit(*words)
        message = f"Error: {path}: the Parquet file is encrypted: write it again without encryption\n"
        assert (found.code, found.err) == (2, message)
    assert not (tmp_path / "run").exists() and not (tmp_path / "index").exists()


@pytest.mark.slow
def test_labels_and_tables_to_be_cleaned_too(tmp_path: Path, sd1: str) -> None:
    path = encrypted(tmp_path / "x.parquet", True, ["label"])
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"TEXT": ["a", "b"]}), plain)
    run = tmp_path / "run"
    assert be_audit("scan", plain, "-o", run, "--model", sd1, "--steps", 2).code == 0
    for words in (["evaluate", run, "--labels", path, "--label-col", "label"], ["drop", run, path, "--threshold", 0]):
        found = be_audit(*words)
        assert found.code == 2 and "the Parquet file is encrypted" in found.err, found


@pytest.mark.parametrize("version", ["1.0", "2.4", "2.6"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_plain_tables_are_opened(tmp_path: Path, version: str, compression: str) -> None:
    table = pa.table({"TEXT": ["a", "b"], "n": [1, 2]}).replace_schema_metadata({"x" * 28: "y" * 28})
    pq.write_table(table, tmp_path / "x.parquet", version=version, compression=compression, row_group_size=1)
    with open(tmp_path / "x.parquet", "rb") as file:
        assert open_parquet("x.parquet", file).read().equals(table)


@pytest.mark.parametrize("compression", ["none", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_columns_that_are_little_but_references_are_told_from_plain_ones(
    tmp_path: Path, compression: str, version: str
) -> None:
    """However well the plain ones are packed: 100,000 texts, of which a dictionary held the first few thousand."""
    texts = [f"a photograph of the item number {number}" for number in range(100_000)]
    table = pa.table(
        {
            "plain": texts,
            "outgrown": texts,
            "few": [texts[number % 9] for number in range(100_000)],
            "one": pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["a long text " * 10_000]),
            "mostly null": [text if number % 50 == 0 else None for number, text in enumerate(texts)],
        }
    )
    kept = [name for name in table.column_names if name != "plain"]
    path, options = tmp_path / "x.parquet", {"compression": compression, "data_page_version": version}
    pq.write_table(table, path, dictionary_pagesize_limit=1 << 17, use_dictionary=kept, **options)
    data = path.read_bytes()
    found = set(repeated(lambda start, end: data[start:end], pq.read_metadata(path), [*table.column_names, "absent"]))
    assert found - {"mostly null"} == {"few", "one"}


def test_reading_a_giant_row_group_holds_a_few_batches(tmp_path: Path) -> None:
    """Texts that pack well, behind a dictionary that was given up: all were gathered into one as they were read."""
    texts = [f"a photograph of the item number {number}" for number in range(400_000)]
    pq.write_table(pa.table({"TEXT": texts}), tmp_path / "x.parquet", row_group_size=400_000, compression="zstd")
    del texts
    (file,) = describe_captions([str(tmp_path / "x.parquet")])
    rows, before, most = Rows(file, "", ()), pa.total_allocated_bytes(), 0
    for start in range(0, 400_000, 4000):
        assert rows.read(start, 4000).num_rows == 4000
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 8 << 20  # all of them take 16 MB
