"""The parts of an index as they lie in its folder: read, told from what their files hold by now, taken together."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from audit.base.commits import Commit, shard_name
from audit.base.errors import check_machine
from audit.base.storage import Folder
from audit.index.embed import MARK
from audit.index.facts import PARTS
from audit.index.items import KEY, Slice, Source, decode
from audit.index.sources import read_bytes


def part_mark(folder: Folder, number: int) -> str:
    """`Source.mark` of the files a part was made from; "" where it does not say."""
    with folder.open(f"{PARTS}/{shard_name(number)}.arrow") as file:
        return (pa.ipc.open_file(file).schema.metadata or {}).get(MARK, b"").decode()


def read_part(folder: Folder, number: int, columns: list[str]) -> pa.Table:
    """Some columns of a part; on a local disk the others are not even read. One of before has no `key_from`."""
    path = folder.path(f"{PARTS}/{shard_name(number)}.arrow")
    source = (
        pa.memory_map(path) if folder.local else pa.BufferReader(folder.read(f"{PARTS}/{shard_name(number)}.arrow"))
    )
    names = pa.ipc.open_file(source).schema.names
    options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns if name in names])
    table = pa.ipc.open_file(source, options=options).read_all()
    if "key_from" in columns and "key_from" not in names:
        table = table.append_column("key_from", pa.array([KEY] * table.num_rows, pa.string()))
    return table.select(columns)


def outdated(folder: Folder, work: list[tuple[Source, Slice]], done: dict[int, Commit]) -> list[int]:
    """Parts to describe again: damaged ones, of files that have changed, or with a picture that can be read by now."""

    def is_outdated(number: int) -> bool:
        source, part = work[number]
        try:
            made, mark = part_mark(folder, number), source.mark(part)
            if made and mark and made != mark:
                return True
            if not done[number].counts.get("error"):
                return False
            table = read_part(folder, number, ["status", "locator"])
        except (pa.ArrowInvalid, OSError) as error:  # damaged
            check_machine(folder.path(f"{PARTS}/{shard_name(number)}.arrow"), error)
            return True
        bad = table.filter(pc.equal(table["status"], "error"))["locator"].to_pylist()
        return any(_can_be_read(json.loads(locator)) for locator in bad)

    with ThreadPoolExecutor(16, "look") as pool:
        return [number for number, again in zip(done, pool.map(is_outdated, done), strict=True) if again]


def _can_be_read(locator: dict[str, Any]) -> bool:
    """Whether there is a picture where one could not be read."""
    try:
        if locator:
            decode(read_bytes({name: value for name, value in locator.items() if name != "xxh3"}))
    except Exception:  # decoders raise anything on broken input
        return False
    return bool(locator)


def contents_of(folder: Folder, done: dict[int, Commit], blind: list[int]) -> str:
    """A digest of the pictures, of what is known of them, of which could not be read, of vectors that were given."""
    found, given = xxhash.xxh3_128(), set(blind)
    for number in sorted(done):
        table = read_part(folder, number, ["key", "url", "caption", "locator", "status", "embedding"])
        for name in ("key", "url", "caption", "locator", "status"):
            for chunk in table[name].chunks:
                values = chunk.cast(pa.large_binary())
                found.update(pc.binary_length(values).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
                found.update(b"".join(value for value in values.to_pylist() if value))
        if number in given:
            for chunk in table["embedding"].chunks:
                found.update(np.asarray(chunk.flatten()).tobytes())
    return found.hexdigest()
