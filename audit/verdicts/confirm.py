"""`be-audit confirm`: regenerate the most suspicious captions and prove, or not, what was copied, from where.

Verdict of an image: `global` when sscd > 0.5 against a training picture; else `local` when the correlation distance
under the match mask to one is below the local threshold (audit/verdicts/null.py); else `none`. Matching needs no
threshold: it runs beside generation, and what is decided can be decided again under another rate without it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from audit.base.errors import AuditError
from audit.base.facts import read_facts, to_json
from audit.base.stopping import Stop
from audit.engines.ray_cluster import one_connection
from audit.index import Index
from audit.run.run import Run
from audit.run.schema import MASKS, VERDICTS, tensor_values
from audit.run.stage import CONFIRM, MATCH, SCAN, SECOND_LOOK, SECOND_NULL_MAPS, TRAJECTORIES, Stage, run_stage
from audit.run.status import not_begun
from audit.scores.trajectories import decode_png
from audit.statistics.null import CAPTIONS, PICTURES, Null, NullFacts, sample_needed
from audit.verdicts.beside import Beside
from audit.verdicts.candidates import ConfirmConfig, TrajectoriesFingerprint, choose, passed_over
from audit.verdicts.compare import COPY, VERDICT_VERSION, References, statistic_of
from audit.verdicts.crops import TrainingCrops
from audit.verdicts.match_shard import MatchFingerprint, own_pictures
from audit.verdicts.null import NullPictures, check_pictures, draw_pictures, null_of, pictures_null, threads

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor

NULL_FILE = "null.json"  # beside the rows of confirm


@dataclass(frozen=True)
class ConfirmFingerprint:
    """What a verdict depends on: the matches, the flags of the threshold, and the rule (VERDICT_VERSION)."""

    rule_version: int
    trajectories: str
    match: str
    index: str
    match_mask: str
    match_fpr: float
    ls_threshold: float | None
    null: str
    null_pictures: int | None


@dataclass(frozen=True)
class ConfirmSummary:
    """What a confirm did.

    Attributes:
        candidates: rows confirmed; by: the score they were picked by. verdicts: how many of each.
        null: the local threshold and what it rests on.
        failed: trajectories that failed. quarantined: shards given up. unreadable: comparisons with training pictures
            that could not be read any more; why_unreadable: the first reason.
        before: the null that this call replaced, because pictures it was made without are back.
        unlooked: what a threshold passed over since it had no second look, in words.
        with_picture: candidates whose own picture is in the index. dead_urls: URLs that img2dataset could not download.
        committed_now: shards done by this call.
    """

    run: str
    candidates: int
    verdicts: dict[str, int]
    null: Null
    failed: int
    quarantined: list[int]
    unreadable: int
    committed_now: int
    seconds: float
    why_unreadable: str = ""
    before: Null | None = None
    unlooked: str = ""
    with_picture: int = 0
    dead_urls: int = 0
    by: str = ""

    @property
    def decided(self) -> int:
        """Candidates with a verdict."""
        return sum(self.verdicts.values())

    @property
    def exit_code(self) -> int:
        """0 complete, 3 with failed trajectories or shards, candidates without a verdict or pictures not to be read."""
        missing = self.unreadable or self.failed or self.quarantined or self.null.missing
        return 3 if missing or self.decided < self.candidates else 0

    def lines(self) -> list[str]:
        """For people."""
        shown = [name for name in VERDICTS if self.verdicts[name] or name != "no_reference"]
        counts = ", ".join(f"{self.verdicts[name]} {name}" for name in shown)
        lines = [f"{self.run}: {self.candidates} candidates by {self.by}: {counts} ({self.seconds:.1f} s)."]
        null = self.null
        if len(null):
            low, high = null.rate
            source = "different training pictures" if null.source == PICTURES else "clean captions"
            lines.append(
                f"global: sscd > {COPY:g}. local: correlation distance < {null.threshold:.4g}, for a false-positive "
                f"rate of {null.fpr:g} a candidate (95 % {low:.2g} to {high:.2g}, from {len(null):,} {source})."
            )
        elif np.isinf(null.threshold) and not null.missing:
            what = "no image was generated" if self.failed else "the index holds no pixels"
            lines.append(f"No local threshold: {what}; only global copies can be told.")
        if null.missing:
            rests = "there is no local threshold" if null.untold else "the local threshold was made without them"
            lines.append(
                f"{len(null.missing):,} training pictures of the null cannot be read, and {rests}: {null.why_missing}: "
                "give the command again when they are back."
            )
        if self.before is not None:
            was, now = (f"{each.threshold:.4g}" if len(each) else "none" for each in (self.before, null))
            lines.append(
                f"Pictures are back: the local threshold was made again, {was} -> {now}, and every verdict was decided "
                "again by it."
            )
        if self.unlooked:
            lines.append(self.unlooked)
        if self.failed:
            lines.append(f"{self.failed} trajectories failed: be-audit status {self.run}")
        if self.decided < self.candidates:
            left = self.candidates - self.decided
            lines.append(
                f"{left} candidates have no verdict yet: give the command again; why: be-audit status {self.run}"
            )
        if self.candidates:
            dead = f"; {self.dead_urls:,} URLs were dead when its pictures were downloaded" if self.dead_urls else ""
            lines.append(
                f"{self.with_picture:,} of {self.candidates:,} candidates have their own picture in the index, "
                f"{self.candidates - self.with_picture:,} have not{dead}."
            )
        if self.unreadable:
            lines.append(
                f"{self.unreadable:,} comparisons for which training pictures cannot be read decided nothing "
                f"(no_reference): {self.why_unreadable}: give the command again when they are back."
            )
        return lines


@one_connection()
def confirm(config: ConfirmConfig, stop: Stop | None = None) -> ConfirmSummary:
    """Confirm a run's candidates, or go on with a confirm that was begun.

    Raises:
        AuditError: no run, no index, another descriptor, too small a null for the rate, or a confirm begun differently.
        Drained: `stop` asked to.
        Broken: every worker failed shard after shard; no verdict was begun that needs what is missing.
    """
    started = time.monotonic()
    run = Run.open(config.run)
    index = Index.open(config.index)
    descriptor = index.load_descriptor(config.sscd, config.device)
    _check_scan(run)
    # 1. which captions, and whether their rate can be promised at all: nothing is generated where it cannot
    fingerprint, images = choose(run, config)
    source = None if config.ls_threshold is not None else PICTURES if fingerprint.clean is None else CAPTIONS
    pictures = _null_pictures(run, index, config) if source == PICTURES else None
    trajectories = Stage.begin(run, TRAJECTORIES, fingerprint, images, _recorded(config), config.replace)
    # 2. images, and beside them their matches, which need no threshold
    captions = images.filter(pc.equal(images["image_index"], 0)).drop_columns(["image_index"])
    asked = MatchFingerprint(
        trajectories.facts.digest, index.contents, descriptor.sha256, config.neighbours, VERDICT_VERSION
    )
    matching = Stage.begin(run, MATCH, asked, captions, _recorded(config), config.replace)
    _moved(matching, config)
    _take_back(matching, index)
    with Beside(matching, trajectories, config, stop):
        generated = run_stage(trajectories, trajectories.missing(), config, stop)
    ready = trajectories.done()
    matched = run_stage(matching, [shard for shard in matching.missing() if shard in ready], config, stop)
    # 3. the local threshold: one for all verdicts of this confirm, however often it is gone on with
    verdicts = ConfirmFingerprint(
        rule_version=VERDICT_VERSION,
        trajectories=trajectories.facts.digest,
        match=matching.facts.digest,
        index=index.contents,
        match_mask=config.match_mask,
        match_fpr=config.match_fpr,
        ls_threshold=config.ls_threshold,
        null="given" if source is None else source,
        null_pictures=None if pictures is None else len(pictures),
    )
    candidates = captions.filter(pc.invert(captions["clean"])).drop_columns(["clean"])
    stage, before = Stage.find(run, CONFIRM), None
    whole = stage is not None and not stage.differs(verdicts) and not stage.problems()
    if stage is not None and whole and _is_back(_null_of(stage).missing, index):
        before = _null_of(stage).null()
        stage.discard()  # two thresholds never meet in one confirm
    if stage is None or not whole or before is not None:
        if config.ls_threshold is not None:
            null = Null.given(config.ls_threshold, config.match_fpr)
        elif source == CAPTIONS:
            null = _captions_null(matching, config)
        else:
            null = _find_null(trajectories, pictures, index, descriptor, config)
        beside = {NULL_FILE: to_json(NullFacts.of(null))}
        stage = Stage.begin(run, CONFIRM, verdicts, candidates, _recorded(config), config.replace, beside)
    _moved(stage, config)
    null = _null_of(stage).null()
    # 4. verdicts of what was matched
    ready = matching.done()
    outcome = run_stage(stage, [shard for shard in stage.missing() if shard in ready], config, stop)
    counts = stage.done().counts
    committed = (generated, matched, outcome)
    return ConfirmSummary(
        run=config.run,
        candidates=stage.items.num_rows,
        verdicts={name: counts.get(name, 0) for name in VERDICTS},
        null=null,
        failed=trajectories.done().counts.get("error", 0),
        quarantined=[shard for each in committed for shard in each.quarantined],
        unreadable=counts.get("unreadable", 0),
        committed_now=sum(len(each.committed) for each in committed),
        seconds=time.monotonic() - started,
        why_unreadable=(_why_unreadable(matching) or null.untold) if counts.get("unreadable") else "",
        before=before,
        unlooked=passed_over(run, config),
        with_picture=len(own_pictures(run, index, candidates)),
        dead_urls=index.info.left_out.get("dead URLs", 0),
        by=fingerprint.by,
    )


def _unreadable(matching: Stage) -> Iterator[tuple[int, int, str]]:
    """Of every comparison with a picture that could not be read: shard, id of the picture, reason."""
    for shard, made in matching.done().items():
        if made.counts.get("unreadable"):
            matches = matching.table(shard, ["matches"])["matches"].to_pylist()
            bad = (match for each in matches for match in each if match.get("unreadable") is not None)
            yield from ((shard, match["reference_id"], match["unreadable"]) for match in bad)


def _is_back(missing: Iterable[int], index: Index) -> bool:
    """Whether one of these pictures, which could not be read once, can be read now."""
    references = References(index, (1, 1))
    return any(references.pixels(id) is not None for id in missing)


def _why_unreadable(matching: Stage) -> str:
    return next((reason for *_, reason in _unreadable(matching)), "")


def _take_back(matching: Stage, index: Index) -> None:
    """Take back matches that missed a picture which can be read now, and first their verdicts: they are made again."""
    verdicts = Stage.find(matching.run, CONFIRM)
    references = References(index, (1, 1))
    back = {shard for shard, id, _ in _unreadable(matching) if references.pixels(id) is not None}
    for shard in sorted(back):
        if verdicts is not None:
            verdicts.ledger.drop(shard)
        matching.ledger.drop(shard)


def resume(run: Run, stop: Stop | None = None) -> None:
    """Go on with a run's confirm as it was begun (`verify --repair`)."""
    stage = Stage.find(run, CONFIRM) or Stage.find(run, MATCH) or Stage.open(run, TRAJECTORIES)
    by = Stage.open(run, TRAJECTORIES).fingerprint(TrajectoriesFingerprint).by  # whatever would be taken by now
    confirm(replace(stage.config(ConfirmConfig), run=run.url, by=by, replace=False), stop)


def read_null(run: Run) -> NullFacts | None:
    """The local threshold a run's verdicts rest on; None before there are any. Raises Damaged: not what was written."""
    stage = Stage.find(run, CONFIRM)
    return None if stage is None else _null_of(stage)


def _null_of(stage: Stage) -> NullFacts:
    return read_facts(NullFacts, stage.sealed(NULL_FILE), stage.run.folder.path(stage.place(NULL_FILE)))


def check_same(run: Run) -> None:
    """Raise AuditError where the index of a run's confirm is not the one it was begun with."""
    stage = Stage.find(run, MATCH)
    if stage is None:
        return
    config, begun = stage.config(ConfirmConfig), stage.fingerprint(MatchFingerprint)
    index = Index.open_same(config.index, begun.index)
    if index.load_descriptor(config.sscd, config.device).sha256 != begun.descriptor:
        raise AuditError("--sscd: not the descriptor confirm used; nothing was touched")


def _recorded(config: ConfirmConfig) -> ConfirmConfig:
    """As a stage keeps it: local files by absolute paths, to be found from elsewhere; other names as they are."""

    def whole(path: str | None) -> str | None:
        return os.path.abspath(path) if path is not None and os.path.exists(path) else path

    index, thresholds = whole(config.index) or config.index, whole(config.thresholds)
    return replace(config, index=index, clean=whole(config.clean), sscd=whole(config.sscd), thresholds=thresholds)


def _moved(stage: Stage, config: ConfirmConfig) -> None:
    """Where the stage's index lies by now: workers open it there."""
    begun, index = stage.config(ConfirmConfig), _recorded(config).index
    if begun.index != index:
        stage.record(replace(begun, index=index))


def _check_scan(run: Run) -> None:
    """Scan and second look must be complete, or the best-scored captions would be missing."""
    stages = (Stage.open(run, SCAN), "are not scanned yet"), (Stage.find(run, SECOND_LOOK), "had no second look yet")
    for stage, words in stages:
        left = stage.missing() if stage else []
        if stage and left:
            raise AuditError(
                f"{run.url}: {len(left)} of {len(stage.shards)} shards {words}: go on with `be-audit scan`"
            )
    amiss = not_begun(run)
    for line in (amiss[kind.name] for kind in (SECOND_NULL_MAPS, SECOND_LOOK) if kind.name in amiss):
        raise AuditError(f"{run.url}: {line}: go on with `be-audit scan`")


def _null_pictures(run: Run, index: Index, config: ConfirmConfig) -> NullPictures | None:
    """The training pictures of the null; None where the index holds no pixels, and nothing local can be decided."""
    if not len(index.seen()):
        return None
    sample = max(config.null_pictures, sample_needed(config.match_fpr, config.num_images))
    found = draw_pictures(index, config.neighbours + 1, sample, run.fingerprint.seed)
    check_pictures(found, index, config.match_fpr, config.num_images)
    return found


def _find_null(
    trajectories: Stage, pictures: NullPictures | None, index: Index, descriptor: Descriptor, config: ConfirmConfig
) -> Null:
    """The null of training pictures under the match masks of the candidates' images."""
    masks, size = _run_masks(trajectories, MASKS[config.match_mask])
    if pictures is None or not len(masks):
        return Null.given(-np.inf, config.match_fpr)
    with threads() as pool:
        crops = TrainingCrops(References(index, size), descriptor, pool)
        return pictures_null(pictures, crops, masks, config.match_fpr, config.num_images)


def _run_masks(trajectories: Stage, column: str, at_most: int = 256) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Match masks of the run's own trajectories, [N, h, w], and the size of its images.

    They are spread over all candidates: the best-scored ones have more concentrated masks than the others, under which
    pictures differ otherwise, and a threshold from them alone would not be that of the rest.
    """
    masks: list[NDArray[np.float32]] = []
    size = (0, 0)
    shards = sorted(trajectories.done())
    chosen = [shards[at] for at in _spread(len(shards), 64)]
    each = -(-at_most // max(len(chosen), 1))
    for shard in chosen:
        table = trajectories.table(shard, [column, "image", "error"])
        table = table.filter(pc.is_null(table["error"]))
        if table.num_rows:
            masks.append(tensor_values(table[column])[_spread(table.num_rows, each)])
            height, width, _ = decode_png(table["image"][0].as_py()).shape
            size = height, width
    return (np.concatenate(masks) if masks else np.zeros((0, 1, 1), np.float32)), size


def _spread(count: int, at_most: int) -> NDArray[np.int64]:
    """At most so many places among `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


def _captions_null(matching: Stage, config: ConfirmConfig) -> Null:
    """The null of the clean captions' own images, under their own masks, with as many comparisons."""
    clean = set(matching.items.filter(matching.items["clean"])["row_id"].to_pylist())
    statistics: list[float] = []
    copies, missing = 0, dict[int, str]()
    for shard in sorted(matching.done()):
        for row in matching.table(shard).to_pylist():
            if row["row_id"] not in clean or row["num_images"] != config.num_images:
                continue
            gone = {m["reference_id"]: m["unreadable"] for m in row["matches"] if m["unreadable"] is not None}
            missing |= gone
            value = statistic_of(row["matches"], config.match_mask)
            if value is not None and not gone:
                statistics.append(value)
                copies += any(match["sscd"] > COPY for match in row["matches"])
    needed = sample_needed(config.match_fpr, 1)
    if len(statistics) < needed and not missing:
        raise AuditError(
            f"{matching.run.url}: only {len(statistics):,} of {len(clean):,} clean captions have images that could be "
            f"compared, {needed:,} are needed for a rate of {config.match_fpr:g}: be-audit status {matching.run.url}"
        )
    return null_of(CAPTIONS, statistics, config.match_fpr, copies=copies, missing=missing)
