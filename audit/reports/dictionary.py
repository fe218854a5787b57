"""docs/data-dictionary.md from the schema: python -m audit.reports.dictionary > docs/data-dictionary.md"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from audit.reports.export import READING, TABLES
from audit.reports.flagged import CANDIDATE_COLUMNS, DENY_COLUMNS, FLAGGED_COLUMNS
from audit.run.schema import (
    CONFIRMED_COLUMNS,
    MATCH_COLUMNS,
    MITIGATED_COLUMNS,
    NULL_MAP_COLUMNS,
    SCORE_COLUMNS,
    SECOND_LOOK_COLUMNS,
    TRAJECTORY_COLUMNS,
)

_VARIES = {
    "mask": "float16 [H, W] or bits",
    "be_mask": "float32 [H, W]",
    "first_mask": "float32 [H, W]",
    "energy_mask": "float32 [H, W]",
    "score_map": "float32 [H, W]",
    "energy": "float32 [H, W]",
    "residual": "float32 [H, W]",
    "best": "struct",
    "matches": "list of structs",
}
_SCORES = (
    "One Arrow file a shard, a row an input row. The input's own columns that were carried through follow. A row whose "
    "caption occurred before has `duplicate_of` and null scores here; whatever reads a run gives it the scores of that "
    "first row (`pending` is its status until that one is done)."
)
_LOOKED = (
    "One row a caption that was looked at again, scores over all its noises. Whatever reads a run gives the row these "
    "in the place of those of `scores/`."
)
_HEAD = """# Data dictionary

Every column be-audit writes. The files in a run folder and the parquet exports carry the same descriptions as column
metadata (`description`). Made by `python -m audit.reports.dictionary`; a test keeps it so.

`row_id` is `shard_id << 32 | row in shard`. Arrow files of a run count only when `_commits/` has their commit: read
them with `be-audit sql` or `audit.read_scores`, not by a glob.
"""


def data_dictionary() -> str:
    """The whole document."""
    parts = [
        _HEAD,
        _section("Run: scores/", _SCORES, SCORE_COLUMNS),
        _section("Run: null_maps/", "One row a sampled caption, one shard a noise.", NULL_MAP_COLUMNS),
        _section("Run: second_look/", _LOOKED, SECOND_LOOK_COLUMNS),
        _section("Run: trajectories/ and refined/", "One row a generated image.", TRAJECTORY_COLUMNS),
        _section("Run: confirmed/", "One row a candidate.", CONFIRMED_COLUMNS),
        _section(
            "Fields of best and of each of matches",
            "One comparison of a generated image with a training picture. `best` also has `reference_image`: that "
            "picture as PNG, at the generated size.",
            MATCH_COLUMNS,
        ),
        _section("Run: mitigated/", "One row an image of a mitigated copy.", MITIGATED_COLUMNS),
        _section("Export: flagged", TABLES["flagged"], FLAGGED_COLUMNS),
        _section("Export: denylist", TABLES["denylist"], DENY_COLUMNS),
        _section("Export: candidates", TABLES["candidates"], CANDIDATE_COLUMNS),
        f"## Reading the exports\n\n{READING}\n",
    ]
    return "\n".join(parts)


def _section(title: str, text: str, columns: Mapping[str, tuple[pa.DataType, str]]) -> str:
    lines = [f"## {title}", "", text, "", "| column | type | what it is |", "|---|---|---|"]
    for name, (kind, about) in columns.items():
        about = about.replace("|", "\\|")
        lines.append(f"| `{name}` | {_VARIES.get(name, kind)} | {about} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(data_dictionary(), end="")
