"""A statement people can sign: statement.md, a section of a model card, and summary.json, the same for machines.

Every number comes from the run. What was not checked is said with its reason, and how many.
"""

from __future__ import annotations

import json
import re
from typing import Any

from audit.base.storage import Folder
from audit.statistics.intervals import share_interval
from audit.statistics.null import CAPTIONS

FORMAT = 1


def write_statement(folder: Folder, facts: dict[str, Any]) -> list[str]:
    """Write statement.md and summary.json; returns their names.

    Args:
        folder: of the report.
        facts: of `report_facts`.
    """
    found = summary(facts)
    folder.write("summary.json", json.dumps(found, indent=1).encode())
    folder.write("statement.md", statement(found).encode(errors="replace"))
    return ["statement.md", "summary.json"]


def summary(facts: dict[str, Any]) -> dict[str, Any]:
    """The audit in one JSON-able object: model, data, method, result, error rates, what was not checked."""
    confirmed = facts["confirm"]
    result: dict[str, Any] | None = None
    if confirmed is not None:
        copied, decided = facts["copied"], facts["decided"]
        low, high = share_interval(copied, decided)
        result = {
            "candidates": confirmed["candidates"],
            "decided": decided,
            "reproduced": copied,
            **facts["verdicts"],
            "share_of_decided": copied / decided if decided else None,
            "share_low": low,
            "share_high": high,
        }
    return {
        "format": FORMAT,
        "tool": "be-audit",
        "version": facts["version"],
        "versions": facts["versions"],
        "made": facts["made"],
        "run": {"created": facts["created"], "fingerprint": facts["digest"]},
        "model": facts["model"],
        "captions": {"files": facts["captions"], **facts["scanned"]},
        "method": {
            **facts["settings"],
            "score": facts["score"],
            "threshold": facts["threshold"],
            "confirm": confirmed,
        },
        "result": result,
        "error_rates": _error_rates(facts),
        "not_checked": facts["not_checked"],
        "unfinished": facts["unfinished"],
    }


def _error_rates(facts: dict[str, Any]) -> dict[str, Any] | None:
    """How often a verdict is false, as far as the run can tell; None without a confirm."""
    confirmed = facts["confirm"]
    if confirmed is None:
        return None
    rates: dict[str, Any] = {"local": None, "global": None, "expected_false_local": confirmed["expected_false"]}
    if confirmed["null_size"]:
        rates["local"] = {
            "promised_a_candidate": confirmed["match_fpr"],
            "low": confirmed["rate_low"],
            "high": confirmed["rate_high"],
        }
    if confirmed["null"] == CAPTIONS and confirmed["null_size"]:
        copies, size = confirmed["null_copies"], confirmed["null_size"]
        low, high = share_interval(copies, size)
        rates["global"] = {"clean_captions": size, "global_copies": copies, "low": low, "high": high}
    return rates


def statement(found: dict[str, Any]) -> str:
    """statement.md from `summary`."""
    model, captions, method = found["model"], found["captions"], found["method"]
    confirmed, result = method["confirm"], found["result"]
    lines = [
        "## Memorisation of training pictures",
        "",
        f"Audited with be-audit {found['version']} on {found['made'][:10]}, from a scan of "
        f"{found['run']['created'][:10]}.",
        "",
        f"- **Model:** `{_text(_last(model['name']))}`"
        + (f", revision `{_text(model['revision'])}`" if model["revision"] else "")
        + f"; weights sha256 `{model['sha256']}`",
        "- **Captions:** "
        + ", ".join(f"`{_text(_last(each['file']))}` ({each['rows']:,} rows)" for each in captions["files"][:10])
        + (f" and {len(captions['files']) - 10:,} more files" if len(captions["files"]) > 10 else "")
        + f"; {captions['distinct']:,} different captions scored",
        f"- **Score:** `{method['score']}` at the first sampling step ({method['steps']} DDIM steps, guidance "
        f"{method['guidance_scale']:g}, seed {method['seed']}, {method['noises']}, "
        f"{method['dtype']})" + (f"; listed above {method['threshold']:g}" if method["threshold"] is not None else ""),
        "- **Versions:** " + ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items())),
        f"- **Run fingerprint:** `{found['run']['fingerprint']}`",
    ]
    if confirmed is None or result is None:
        lines += [
            "",
            "No image was generated and compared with training pictures: no caption is said to be reproduced.",
        ]
    else:
        lines += _result(confirmed, result, found["error_rates"])
    lines += ["", "### What was not checked", ""]
    lines += [
        f"- {_text(line)}" for line in [*found["not_checked"], *(f"Not finished: {x}" for x in found["unfinished"])]
    ]
    lines += [
        "- That no copy was found says nothing of training pictures that are not in the index, of other captions, "
        "and of other noises than those that were sampled.",
    ]
    return "\n".join(lines) + "\n"


def _result(confirmed: dict[str, Any], result: dict[str, Any], rates: dict[str, Any]) -> list[str]:
    index = confirmed["index_facts"]
    pictures = f"{index['pictures']:,} training pictures" if index else "training pictures"
    many = confirmed["num_images"]
    lines = [
        f"- **Compared with:** {pictures}"
        + (f" (index `{index['fingerprint'][:16]}`, descriptor `{_text(index['descriptor'])}` " if index else "")
        + (f"sha256 `{index['descriptor_sha256'][:16]}`)" if index else "")
        + f"; the {confirmed['neighbours']} nearest and the caption's own, {many} image{'s' if many != 1 else ''} "
        "a caption",
        "",
        "### What was reproduced",
        "",
        f"Of the {result['candidates']:,} captions that score highest by `{confirmed['by']}`, "
        f"{result['decided']:,} could be decided; "
        f"**{result['reproduced']:,} reproduce a training picture**: {result['global']:,} as a whole (SSCD above 0.5), "
        f"{result['local']:,} in a region (correlation distance under the {confirmed['match_mask']} mask below "
        f"{_figure(confirmed['threshold'])}).",
        "",
        "| | | 95 % interval |",
        "|---|---|---|",
    ]
    if result["share_of_decided"] is not None:
        lines.append(
            f"| share of the decided candidates that reproduce a picture | {result['share_of_decided']:.2%} | "
            f"{result['share_low']:.2%} to {result['share_high']:.2%} |"
        )
    if rates["local"] is not None:
        local = rates["local"]
        source = "clean captions" if confirmed["null"] == CAPTIONS else "different training pictures"
        lines.append(
            f"| false-positive rate of a local verdict, a candidate (from {confirmed['null_size']:,} {source}) | "
            f"{local['promised_a_candidate']:.2%} promised | {local['low']:.2%} to {local['high']:.2%} |"
        )
    if rates["global"] is not None:
        clean = rates["global"]
        share = clean["global_copies"] / clean["clean_captions"]
        lines.append(
            f"| clean captions with a global verdict | {clean['global_copies']:,} of {clean['clean_captions']:,} "
            f"({share:.2%}) | {clean['low']:.2%} to {clean['high']:.2%} |"
        )
    if rates["expected_false_local"] is not None:
        lines.append(
            f"| local verdicts expected to be false, at most | {rates['expected_false_local']:.1f} of "
            f"{result['local']:,} | |"
        )
    return lines


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _last(path: str) -> str:
    """Last part of a path: a statement is handed on, folders of the machine are nobody's business."""
    return path.rstrip("/").rsplit("/", 1)[-1] or path


def _text(text: str) -> str:
    """Text that changes no Markdown around it."""
    return re.sub(r"\s+", " ", str(text)).replace("`", "'").replace("|", "\\|").replace("<", "&lt;")
