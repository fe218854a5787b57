"""`be-audit evaluate` on made-up scores whose figures are known by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.base.errors import AuditError
from audit.evaluation import plots
from audit.evaluation.config import EvaluateConfig
from audit.evaluation.evaluate import Evaluation, _csv, evaluate, measure
from audit.evaluation.series import MATCH_SCORES, Series, _best_matches
from audit.run.run import Run
from audit.run.stage import CONFIRM, Stage
from tests.command import be_audit
from tests.fabricate import Neighbours, add_confirm, make_run

pytestmark = pytest.mark.simulation

# memorised a to d, clean w to z: of the 16 pairs 13 are in order, one is tied -> AUC 13.5 / 16
SCORES = {"a": 9.0, "b": 8.0, "c": 5.0, "d": 2.0, "w": 6.0, "x": 2.0, "y": 1.0, "z": 0.5}
LABELS = {"a": "global", "b": "local", "c": "local", "d": "global", "w": "none", "x": "none", "y": "None", "z": "none"}


def write_labels(path: Path, labels: dict[str, str], **more: dict[str, str]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "label", *more])
        writer.writerows([name, label, *(column[name] for column in more.values())] for name, label in labels.items())
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Eight captions, of which `a` and `w` stand twice more, with other scores that must not count."""
    names = [*SCORES, "a", "w", "a"]
    return make_run(tmp_path / "made", names, scores=[*SCORES.values(), 0, 0, 0], urls=[f"u{i}" for i in range(11)])


@pytest.fixture
def labels(tmp_path: Path) -> str:
    return write_labels(tmp_path / "labels.csv", LABELS)


def of(run: Run, labels: str, **more: Any) -> Evaluation:
    return evaluate(EvaluateConfig(run=run.url, labels=labels, resamples=200, **more))


def test_figures_are_the_hand_computed_ones_and_a_repeated_caption_counts_once(run: Run, labels: str) -> None:
    found = {(each.score, each.type): each for each in of(run, labels).figures}
    every = found["ld_energy", "all"]
    assert (every.memorised, every.clean) == (4, 4)
    assert every.auc == 13.5 / 16
    # above 2: a, b, c and w -> F1 = 6 / 8; above 1: a, b, c, d, w, x -> 8 / 10, the best
    assert (every.f1, every.f1_threshold) == (0.8, 1.0)
    assert every.tpr_1 == every.tpr_01 == 0.5  # a and b, above every clean caption
    assert found["ld_energy", "local"].auc == 7 / 8
    assert found["ld_energy", "global"].auc == 6.5 / 8
    assert every.auc_low < every.auc < every.auc_high


def test_a_label_that_is_no_number_is_no_label(run: Run, tmp_path: Path) -> None:
    labels = pa.array([1.0, 1.0, np.nan, 1.0, 0.0, 0.0, 0.0, np.nan], pa.float64(), from_pandas=False)
    pq.write_table(pa.table({"caption": [*SCORES], "label": labels}), tmp_path / "labels.parquet")
    found = of(run, str(tmp_path / "labels.parquet"), clean=("0",)).figures
    assert {each.type for each in found} == {"1"} and {(each.memorised, each.clean) for each in found} == {(3, 3)}


def test_a_column_that_cannot_be_read_beside_the_key_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "keys.csv").write_text("url,caption,label\nu0,one,global\n")
    with pytest.raises(AuditError, match="--cluster-col caption: give the column another name"):
        of(run, str(tmp_path / "keys.csv"), key="url", cluster_col="caption")


def test_gain_is_the_paired_difference_to_magnitude() -> None:
    truth = np.array([True] * 30 + [False] * 30)
    good = np.r_[np.arange(30) + 100.0, np.arange(30.0)]
    bad = np.tile([0.0, 1.0], 30)
    series = Series("scan", "ld", "one", np.arange(60), good)
    found = measure(series, "all", good, truth, bad, None, EvaluateConfig(resamples=200))
    assert found.gain == 0.5 and found.gain_low > 0.3 and found.gain_not_above == 0
    back = measure(series, "all", bad, truth, good, None, EvaluateConfig(resamples=200))
    assert back.gain == -0.5 and back.gain_not_above == 1


def test_same_seed_same_figures(run: Run, labels: str) -> None:
    first, again, other = of(run, labels), of(run, labels), of(run, labels, seed=1)
    assert first.figures == again.figures
    assert [each.auc for each in first.figures] == [each.auc for each in other.figures]
    assert [each.auc_low for each in first.figures] != [each.auc_low for each in other.figures]


def test_clusters_come_from_their_column_and_widen_the_interval(run: Run, tmp_path: Path) -> None:
    groups = dict(zip(SCORES, "mmnnvvuu", strict=True))
    labels = write_labels(tmp_path / "grouped.csv", LABELS, group=groups)
    alone, grouped = (
        next(
            each
            for each in of(run, labels, cluster_col=column).figures
            if (each.score, each.type) == ("ld_energy", "all")
        )
        for column in (None, "group")
    )
    assert alone.auc == grouped.auc
    assert (alone.auc_low, alone.auc_high) != (grouped.auc_low, grouped.auc_high)


def test_one_cluster_a_class_gives_no_interval_and_null_in_the_json(run: Run, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "one.csv", LABELS, group=dict(zip(SCORES, "mmmmuuuu", strict=True)))
    found = of(run, labels, cluster_col="group")
    assert all(np.isnan(each.auc_low) for each in found.figures)
    text = (Path(found.output) / "evaluation.json").read_text()
    facts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert facts["scores"][0]["auc_low"] is None and facts["scores"][0]["auc"] is not None


def test_written_tables_hold_the_figures_and_plots_are_pictures(run: Run, labels: str, tmp_path: Path) -> None:
    found = of(run, labels, output=str(tmp_path / "out"))
    rows = list(csv.DictReader((tmp_path / "out/evaluation.csv").open()))
    assert [(row["score"], row["type"], float(row["auc"])) for row in rows] == [
        (each.score, each.type, each.auc) for each in found.figures
    ]
    for name in ("roc.png", "scores.png"):
        image = Image.open(tmp_path / "out" / name).convert("L")
        assert min(image.size) > 200 and len(set(image.tobytes())) > 20


def test_joins_by_a_kept_column(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "by_url.jsonl"
    rows = [{"url": f"u{place}", "kind": LABELS[name]} for place, name in enumerate(SCORES)]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = of(run, str(path), key="url", label_col="kind")
    assert next(each.auc for each in found.figures if (each.score, each.type) == ("ld_energy", "all")) == 13.5 / 16
    with pytest.raises(AuditError, match=r"--key page: the run kept url, key"):
        of(run, str(path), key="page", label_col="kind")
    with pytest.raises(AuditError, match=r"no column 'key'; it has url, kind: pass another --key"):
        of(run, str(path), key="key", label_col="kind")


def test_which_labels_are_clean_and_memorised_can_be_said(run: Run, tmp_path: Path) -> None:
    names = {"global": "whole", "local": "part", "none": "ok", "None": "ok"}
    labels = write_labels(tmp_path / "own.csv", {name: names[label] for name, label in LABELS.items()})
    with pytest.raises(AuditError, match=r"no clean caption.*ok, part, whole.*--clean"):
        of(run, labels)
    assert {each.type for each in of(run, labels, clean=("ok",)).figures} == {"all", "part", "whole"}
    only = of(run, labels, clean=("ok",), positive=("part",))
    assert {(each.type, each.memorised, each.clean) for each in only.figures} == {("part", 2, 4)}
    with pytest.raises(AuditError, match=r"--positive half: no such memorised label; there are part, whole"):
        of(run, labels, clean=("ok",), positive=("half",))


def test_verdicts_are_counted_by_label_and_matches_scored_by_image(run: Run, labels: str) -> None:
    add_confirm(run, ["global", "none", "local"], num_images=2)  # of a, b and w, the three best
    found = of(run, labels)
    assert found.verdicts is not None
    table = dict(zip(found.verdicts.labels, found.verdicts.counts.tolist(), strict=True))
    assert found.verdicts.verdicts == ("global", "local", "none", "not a candidate")
    assert table == {"global": [1, 0, 0, 1], "local": [0, 0, 1, 1], "none": [0, 1, 0, 2], "None": [0, 0, 0, 1]}
    scored = {(each.score, each.images, each.type): each for each in found.figures if each.stage == "confirm"}
    assert {images for _, images, _ in scored} == {"one", "mean", "best"}
    assert {"sscd", "ls", "ls_norm", "ls_energy", "ls_corr"} <= {score for score, _, _ in scored}
    # sscd 0.93 (a, global), 0.2 (b, none), 0.4 (w, local): a above w, b below
    every = scored["sscd", "mean", "all"]
    assert (every.memorised, every.clean, every.auc) == (2, 1, 0.5)
    assert "Verdicts by label:" in found.lines()


def test_matches_of_an_image_beside_one_that_failed_are_kept() -> None:
    """Image 0 failed, image 1 is a copy: num_images is 1, and its matches carry index 1."""
    numbers = dict.fromkeys(MATCH_SCORES, 0.25) | {"sscd": 0.9}
    row = {"row_id": 7, "num_images": 1, "matches": [{"image_index": 1, **numbers}]}
    assert _best_matches(pa.Table.from_pylist([row])).to_pylist() == [{"row_id": 7, "image_index": 1, **numbers}]


def test_only_labelled_and_scored_captions_count_and_the_rest_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made", list(SCORES), scores=list(SCORES.values()), failed=[0])
    labels = write_labels(tmp_path / "labels.csv", {**LABELS, "b": "", "elsewhere": "none"})
    found = of(run, labels)
    every = next(each for each in found.figures if (each.score, each.type) == ("ld_energy", "all"))
    assert (every.memorised, every.clean) == (2, 4)
    notes = "\n".join(found.notes)
    assert "1 of 8 labels match no caption" in notes and "1 labelled rows have no scores" in notes
    assert "2 distinct captions of the run are not scored or have no label" in notes


def test_a_users_mistakes_are_one_line_and_exit_2(run: Run, labels: str, tmp_path: Path) -> None:
    def fails(*arguments: object) -> str:
        done = be_audit("evaluate", run.url, *arguments)
        assert done.code == 2 and done.err.count("\n") == 1
        return done.err

    assert "--labels FILE" in fails()
    assert "no such file" in fails("--labels", tmp_path / "none.csv")
    assert "no column 'kind'; it has caption, label: pass --label-col" in fails(
        "--labels", labels, "--label-col", "kind"
    )
    assert "pass --cluster-col" in fails("--labels", labels, "--cluster-col", "group")
    only = write_labels(tmp_path / "only.csv", {"a": "local", "b": "local"})
    assert "no clean caption among 2" in fails("--labels", only)
    clean = write_labels(tmp_path / "clean.csv", {"w": "none"})
    assert "no memorised caption among 1" in fails("--labels", clean)
    other = write_labels(tmp_path / "other.csv", {"nobody": "local"})
    assert "none of its 1 captions" in fails("--labels", other)
    twice = tmp_path / "twice.csv"
    twice.write_text("caption,label\na,local\na,none\n")
    assert "'a' is labelled 'local' and 'none'" in fails("--labels", twice)
    by_url = tmp_path / "by_url.csv"
    by_url.write_text("url,label\nu0,local\nu8,none\n")  # both are caption a
    assert "equal captions are labelled 'local' and 'none'" in fails("--labels", by_url, "--key", "url")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails("--labels", labels, "-o", tmp_path / "file" / "below")


def test_the_command_prints_the_table_and_a_report_can_follow(run: Run, labels: str) -> None:
    done = be_audit("evaluate", run.url, "--labels", labels, "--resamples", 100)
    assert done.code == 0
    (line,) = [line for line in done.out.splitlines() if line.split()[:2] == ["scan", "ld_energy"] and " all " in line]
    assert "4/4" in line and "0.844 [" in line
    assert "no false positive at all is allowed" in done.out
    assert be_audit("report", run.url).code == 0


def test_of_a_scan_that_is_not_finished_it_says_so_and_exits_3(tmp_path: Path) -> None:
    names = ["a", "w", "b", "x"]
    run = make_run(tmp_path / "made", names, scores=[SCORES[name] for name in names], rows_per_shard=1, shards=3)
    labels = write_labels(tmp_path / "labels.csv", {name: LABELS[name] for name in names} | {"z": "rare"})
    done = be_audit("evaluate", run.url, "--labels", labels, "--resamples", 100)
    assert done.code == 3
    assert "2 of 5 labels match no caption scanned so far." in done.out and "of the run" not in done.out
    assert "Not finished: scan: 3 of 4 shards are done." in done.out
    facts = json.loads((Path(run.url) / "evaluate/evaluation.json").read_text())
    assert facts["unfinished"] == ["scan: 3 of 4 shards are done"]
    assert of(run, labels, positive=("global", "rare")).unfinished  # a label whose captions come later is none unknown
    later = write_labels(tmp_path / "later.csv", {"x": "none", "a": "local"})
    with pytest.raises(AuditError, match=r"no clean caption among 1.*not finished: scan: 3 of 4 shards"):
        of(run, later)
    missing = write_labels(tmp_path / "missing.csv", {"x": "none"})
    with pytest.raises(AuditError, match=r"none of its 1 captions.*not finished: scan: 3 of 4 shards"):
        of(run, missing)


def test_a_candidate_without_a_verdict_is_a_candidate(run: Run, labels: str) -> None:
    add_confirm(run, ["global", "none", "local"])  # of a, b and w
    whole = Stage.open(run, CONFIRM)
    items = whole.items.set_column(
        whole.items.schema.get_field_index("shard"), "shard", pa.array([0, 1, 0], pa.int32())
    )
    found = whole.table(0)
    whole.discard()
    stage = Stage.begin(run, CONFIRM, Neighbours(2, whole.facts.fingerprint["trajectories"]), items)
    ids = items.filter(pa.array([True, False, True]))["row_id"]
    stage.ledger.commit(0, found.filter(pc.is_in(found["row_id"], ids.combine_chunks())), {}, {"wall": 1.0})
    done = be_audit("evaluate", run.url, "--labels", labels, "--resamples", 100)
    assert done.code == 3 and "Not finished: confirm: 1 of 2 shards are done." in done.out
    rows = {row["label"]: row for row in csv.DictReader((Path(run.url) / "evaluate/verdicts.csv").open())}
    assert (rows["local"]["no verdict yet"], rows["local"]["not a candidate"]) == ("1", "1")  # b and c
    assert {name: row["no verdict yet"] for name, row in rows.items() if name != "local"} == dict.fromkeys(
        ("None", "global", "none"), "0"
    )


def test_a_confirm_whose_images_alone_were_begun_is_not_finished(run: Run, labels: str) -> None:
    add_confirm(run, ["global", "none"])
    Stage.open(run, CONFIRM).discard()
    assert of(run, labels).unfinished == ["confirm: not begun yet"]


def test_nothing_of_an_earlier_evaluation_stays_beside_a_new_one(run: Run, labels: str, tmp_path: Path) -> None:
    add_confirm(run, ["global", "none", "local"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.csv").write_text("kept")
    assert len(of(run, labels, output=str(out)).files) == 5
    bare = make_run(tmp_path / "bare", list(SCORES), scores=list(SCORES.values()))
    of(bare, labels, output=str(out))
    assert {each.name for each in out.iterdir()} == {
        *("evaluation.csv", "evaluation.json", "roc.png", "scores.png", "mine.csv")
    }


def test_a_folders_own_files_stay_where_no_evaluation_was(run: Run, labels: str, tmp_path: Path) -> None:
    (tmp_path / "verdicts.csv").write_text("mine")
    of(run, labels, output=str(tmp_path))
    assert (tmp_path / "verdicts.csv").read_text() == "mine"


def test_blanks_around_labels_and_clusters_are_no_part_of_them(run: Run, labels: str, tmp_path: Path) -> None:
    groups = dict(zip(SCORES, "mmnnvvuu", strict=True))
    tidy = write_labels(tmp_path / "tidy.csv", {**LABELS, "z": ""}, group=groups)
    blanks = {**{name: f" {label}\u00a0 " for name, label in LABELS.items()}, "z": "  "}
    loose = write_labels(tmp_path / "loose.csv", blanks, group={**groups, "b": "m "})
    first, other = (of(run, path, cluster_col="group") for path in (tidy, loose))
    assert first.labels == other.labels == {"None": 1, "global": 2, "local": 2, "none": 2}
    assert first.figures == other.figures


def test_a_clean_name_that_no_label_is_is_refused(run: Run, labels: str) -> None:
    done = be_audit("evaluate", run.url, "--labels", labels, "--clean", "none,celan")
    assert done.code == 2
    assert done.err == "Error: --clean celan: no such label; there are None, global, local, none\n"
    assert of(run, labels, clean=("NONE ",)).labels == of(run, labels).labels


def test_labels_that_matplotlib_would_read_are_drawn_as_they_are(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    save = plots.png_of

    def saved(figure: Any) -> bytes:
        texts = [text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()]
        drawn.append([*texts, *(axis.get_title() for axis in figure.axes)])
        return save(figure)

    monkeypatch.setattr(plots, "png_of", saved)
    names = {"global": r"$\foo$", "local": "_part"}
    of(run, write_labels(tmp_path / "odd.csv", {name: names.get(label, label) for name, label in LABELS.items()}))
    curves, groups = drawn
    assert r"scan: \$\foo\$ against clean" in curves
    assert {r"\$\foo\$ (2)", " _part (2)", "none (3)"} <= set(groups)


def test_tables_are_written_before_anything_is_drawn(run: Run, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise ValueError("cannot be drawn")

    monkeypatch.setattr("audit.evaluation.evaluate.roc_plot", broken)
    with pytest.raises(ValueError, match="cannot be drawn"):
        of(run, labels)
    assert {each.name for each in (Path(run.url) / "evaluate").iterdir()} == {"evaluation.csv", "evaluation.json"}


@pytest.mark.parametrize("flag", ["--label-col", "--cluster-col"])
@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([["x"]] * 8, r"list<\w+: string>: name one with a value a row"),
        ([{"of": "x"}] * 8, r"struct<of: string>: name one with a value a row"),
        ([b"x"] * 7 + [b"caf\xe9"], "binary, bytes that are not UTF-8: name a column of text"),
    ],
)
def test_a_column_that_is_no_text_is_one_line(
    run: Run, tmp_path: Path, flag: str, values: list[Any], what: str
) -> None:
    path = tmp_path / "typed.parquet"
    pq.write_table(pa.table({"caption": [*SCORES], "label": [*LABELS.values()], "odd": values}), path)
    with pytest.raises(AuditError, match=rf"^{path}: {flag} odd: the column is {what}$"):
        of(run, str(path), **{flag[2:].replace("-", "_"): "odd"})


def test_a_caption_in_two_clusters_is_refused(run: Run, tmp_path: Path) -> None:
    twice = tmp_path / "twice.csv"
    twice.write_text("caption,label,group\na,local,m\nw,none,\na,local,n\n")
    with pytest.raises(AuditError, match="'a' is in the clusters 'm' and 'n': give a caption one cluster"):
        of(run, str(twice), cluster_col="group")
    by_url = tmp_path / "by_url.csv"
    by_url.write_text("url,label,group\nu0,local,m\nu8,local,n\nu4,none,\n")  # u0 and u8 are both caption a
    with pytest.raises(AuditError, match=r"equal captions are in the clusters 'm' and 'n' \(url 'u8'\)"):
        of(run, str(by_url), key="url", cluster_col="group")
    twice.write_text("caption,label,group\na,local,\nw,none,\na,local,n\n")  # no cluster contradicts none
    assert of(run, str(twice), cluster_col="group").labels == {"local": 1, "none": 1}


def test_no_spreadsheet_takes_a_label_for_a_formula() -> None:
    assert _csv(["label", "auc"], [["=1+1", -0.5]]) == b"label,auc\n'=1+1,-0.5\n"
