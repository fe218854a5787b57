"""S3's listings of objects, read fast: understanding a large one field by field, as botocore does, takes most of it."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any, cast
from xml.etree import ElementTree

EVENT = "before-parse.s3.ListObjectsV2"


def read_quickly(fs: Any) -> None:
    """Have the client of an s3fs file system read listings with `objects_of`; others stay as they are."""
    events = getattr(getattr(getattr(fs, "s3", None), "meta", None), "events", None)
    if events is not None:
        events.register(EVENT, _on_listing, unique_id=EVENT)


def _on_listing(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """botocore's event with a response as it came: objects are taken out of it, and botocore parses the rest."""
    if response_dict.get("status_code") != 200:
        return
    with contextlib.suppress(ElementTree.ParseError, KeyError, TypeError, ValueError):  # botocore says what is wrong
        rest, objects = objects_of(response_dict["body"])
        response_dict["body"] = rest
        if objects:
            customized_response_dict["Contents"] = objects


def objects_of(body: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """A listing without its objects, and these as botocore gives them: Key, Size, ETag, LastModified, StorageClass.

    Raises:
        ElementTree.ParseError, KeyError, ValueError: it is no such listing.
    """
    root = ElementTree.fromstring(body)
    space = root.tag.rpartition("}")[0]
    wanted = f"{space}}}Contents" if space else "Contents"
    objects, others = [], []
    for element in root:
        if element.tag != wanted:
            others.append(element)
            continue
        fields = {each.tag.rpartition("}")[2]: each.text or "" for each in element}
        found: dict[str, Any] = {"Key": fields["Key"], "Size": int(fields["Size"])}
        found["LastModified"] = time_of_listing(fields["LastModified"])
        objects.append(found | {name: fields[name] for name in ("ETag", "StorageClass") if name in fields})
    root[:] = others
    return ElementTree.tostring(root), objects


def time_of_listing(text: str) -> datetime:
    """The time that botocore's own parser finds: it guesses the notation."""
    if isinstance(text, str) and text.endswith("Z"):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(text[:-1] + "+00:00")
    from botocore.utils import parse_timestamp

    return cast(datetime, parse_timestamp(text))
