"""Captions and URLs, no pictures: candidates out, the real img2dataset in between, their pictures in and joined.

img2dataset's pins do not fit ours: it runs from an environment of its own, whose program BE_AUDIT_IMG2DATASET names (or
PATH). The server is on this machine; it also fails, stalls and answers 404.
"""

from __future__ import annotations

import http.server
import io
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from audit.index import Index, IndexConfig, build_index
from audit.reports.report import ReportConfig, report
from audit.run.read import read_scores, read_stage
from audit.run.run import Run
from audit.run.stage import TRAJECTORIES, Stage
from audit.verdicts.match_shard import own_pictures
from tests.command import be_audit
from tests.fabricate import add_confirm, make_run

IMG2DATASET = os.environ.get("BE_AUDIT_IMG2DATASET") or shutil.which("img2dataset")


class Pictures(http.server.BaseHTTPRequestHandler):
    """/N.jpg is a picture; /404/, /500/ and /text/ answer so; /stall/ says nothing for a while; /cut/ stops midway."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "stall":
            time.sleep(8)
        if kind in ("404", "500"):
            self.send_error(int(kind))
            return
        buffer = io.BytesIO()
        seed = int("".join(filter(str.isdigit, self.path)) or 0)
        pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        data = b"<html>gone</html>" if kind == "text" else buffer.getvalue()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download(candidates: Path, pictures: Path, layout: str) -> None:
    """img2dataset as docs/url-lists.md has it, with little patience."""
    assert IMG2DATASET, "no img2dataset: `make test` brings it, or name its program in BE_AUDIT_IMG2DATASET"
    command = [IMG2DATASET, "--url_list", str(candidates)]
    command += ["--input_format", "parquet", "--url_col", "url", "--caption_col", "caption"]
    command += ["--save_additional_columns", '["uid"]', "--output_format", layout, "--output_folder"]
    command += [str(pictures), "--resize_mode", "no", "--processes_count", "1", "--thread_count", "8"]
    command += ["--timeout", "2", "--number_sample_per_shard", "4"]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "no_proxy": "*", "NO_PROXY": "*"}
    environment.pop("PYTHONPATH", None)  # of this environment, not of its own
    subprocess.run(command, check=True, capture_output=True, timeout=240, env=environment)


def test_candidates_are_what_img2dataset_takes(tmp_path: Path) -> None:
    """Every URL of a flagged caption once, repeats of the caption included; none without a URL."""
    captions = ["a", "b", "a", "c", "a", "d"]
    run = make_run(tmp_path, captions, urls=["u0", "u1", "u2", "", "u0", "u5"], scores=[9.0, 8, 9, 7, 9, 1])
    add_confirm(run, ["global", "none", "none"])
    done = report(ReportConfig(run=run.url, top_k=3))
    path = tmp_path / "RUN" / "report" / "exports" / "candidates.parquet"
    assert str(path) in done.files
    rows = pq.read_table(path).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("u0", "a", "k0000000", "k0000000"),
        ("u1", "b", "k0000001", "k0000001"),
        ("u2", "a", "k0000002", "k0000002"),
    ]


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_the_loop_with_the_real_img2dataset(tmp_path: Path, server: str, layout: str) -> None:
    kinds = ["", "", "", "", "/404", "/500", "/stall", "/text", "/cut"]
    urls = [f"{server}{kind}/{at}.jpg" for at, kind in enumerate(kinds)]
    captions = [f"caption {at}" for at in range(len(urls))]
    run = make_run(tmp_path, captions, urls=urls, scores=[float(99 - at) for at in range(len(urls))])
    add_confirm(run, ["none"] * len(urls))
    report(ReportConfig(run=run.url, top_k=100))
    download(tmp_path / "RUN/report/exports/candidates.parquet", tmp_path / "pictures", layout)
    output = str(tmp_path / "index")
    done = build_index(IndexConfig(images=(str(tmp_path / "pictures"),), output=output, sscd="testbed"))
    assert (done.ok, done.errors) == (4, 0)
    assert done.info.left_out["dead URLs"] == 5
    index = Index.open(output)
    facts = index.facts(index.ids()).to_pylist()
    assert sorted(row["url"] for row in facts) == sorted(urls[:4])
    assert sorted(row["key"] for row in facts) == [f"k{at:07d}" for at in range(4)], "our key, not img2dataset's"
    items = Stage.open(run, TRAJECTORIES).items
    own = own_pictures(run, index, items)
    by_id = {row["id"]: row["caption"] for row in facts}
    captions_of = dict(zip(items["row_id"].to_pylist(), items["caption"].to_pylist(), strict=True))
    assert len(own) == 4 and all(by_id[id] == captions_of[row] for row, id in own.items())


@pytest.mark.processes
@pytest.mark.sampling
def test_the_whole_loop_joins_by_key_alone(tmp_path: Path, server: str, sd1: str) -> None:
    """Downloaded from a mirror, all under one row's caption: only the key tells whose picture it is."""
    kinds = ["", "", "", "", "/404", "/500", "/stall"]
    urls = [f"{server}{kind}/{at}.jpg" for at, kind in enumerate(kinds)]
    captions = [f"a caption of row {at}" for at in range(len(urls))]
    keys = [f"k{at}" for at in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "caption": captions, "key": keys}), tmp_path / "list.parquet")
    run, index = tmp_path / "run", tmp_path / "index"
    flags = ("--model", sd1, "--steps", 2)
    assert be_audit("scan", tmp_path / "list.parquet", "-o", run, *flags).code == 0
    assert be_audit("report", run, "--top-k", 100).code == 0
    candidates = run / "report/exports/candidates.parquet"
    table = pq.read_table(candidates).sort_by("uid").to_pydict()
    assert table["uid"] == keys
    table["url"] = [url.replace("127.0.0.1", "localhost") for url in table["url"]]
    table["caption"] = [captions[3]] * len(captions)
    pq.write_table(pa.table(table), candidates)
    download(candidates, tmp_path / "pictures", "webdataset")
    found = be_audit("index", "build", tmp_path / "pictures", "-o", index, "--sscd", "testbed")
    assert found.code == 0 and "3 dead URLs" in found.err, found
    words = ("confirm", run, "--index", index, "--top-k", 100, "--num-images", 1, "--ls-threshold", -1)
    found = be_audit(*words)
    assert found.code == 0, found
    last = "4 of 7 candidates have their own picture in the index, 3 have not; 3 URLs were dead when its pictures were"
    assert last in found.out
    opened = Run.open(str(run))
    keys_of = {row["row_id"]: row["key"] for row in read_scores(opened, ["row_id", "key"]).to_pylist()}
    matches = read_stage(opened, "match", ["row_id", "matches"])
    assert matches is not None
    own = {keys_of[row["row_id"]]: [each for each in row["matches"] if each["own"]] for row in matches.to_pylist()}
    assert {key: [each["reference_key"] for each in found] for key, found in own.items()} == {
        key: [key] if at < 4 else [] for at, key in enumerate(keys)
    }
    assert be_audit("report", run).code == 0
