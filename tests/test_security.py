"""What docs/security.md says, attacked: every claim of it that has no test nearer to the code.

The locked SQL is attacked in tests/audit/reports/test_sql.py, tars in tests/audit/index/test_index_tars.py, the page
of the report in tests/browser/test_page.py; damaged files are in tests/faults/test_damaged_files.py.
"""

from __future__ import annotations

import http.server
import io
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from audit.run.read import read_scores
from audit.run.run import Run
from tests.command import be_audit, tree

SECRET = "correct-horse-battery-staple"


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"TEXT": ["a red house", "a blue boat"]}), tmp_path / "captions.parquet")
    return tmp_path / "captions.parquet"


# --- credentials --------------------------------------------------------------------------------------------------

URLS = (
    f"s3://me:{SECRET}@bucket/x",
    f"https://me:{SECRET}@example.org/x.parquet",
    f"https://example.org/x.parquet?token={SECRET}",
    f"https://example.org/x.parquet?se=2026&sig={SECRET}",
    f"https://example.org/x.parquet?X-Amz-Signature={SECRET}",
    f"https://example.org/x.parquet?api_key={SECRET}",
    f"simplecache::https://me:{SECRET}@example.org/x.parquet",
)
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("scan", "URL", "-o", "run", "--model", "testbed", "--dry-run"),
    ("scan", "captions.parquet", "-o", "URL", "--model", "testbed"),
    ("index", "build", "URL", "-o", "index", "--sscd", "testbed"),
    ("index", "build", "pictures", "-o", "URL", "--sscd", "testbed"),
    ("status", "URL"),
    ("sql", "errors", "URL"),
    ("confirm", "URL", "--index", "URL"),
    ("report", "URL"),
)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_url_with_a_secret_is_refused_and_not_repeated(
    captions: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], url: str
) -> None:
    monkeypatch.chdir(captions.parent)
    Path("pictures").mkdir()
    Path("pictures/0.png").write_bytes(picture())
    before = tree(captions.parent)
    found = be_audit(*[url if word == "URL" else word for word in command])
    assert found.code == 2 and SECRET not in found.out + found.err, found
    if "::" not in url:
        assert "the URL holds " in found.err and "~/.config/fsspec" in found.err
    assert tree(captions.parent) == before


@pytest.mark.parametrize("url", ["memory://x?versionId=3", "memory://me@host/x.parquet", "memory://a:b/x@y.parquet"])
def test_a_url_without_a_secret_is_not_refused_for_one(url: str) -> None:
    assert "the URL holds" not in be_audit("scan", url, "-o", "run", "--model", "testbed", "--dry-run").err


@pytest.mark.slow
def test_secrets_of_the_environment_are_in_no_file(
    captions: Path, sd1: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "FSSPEC_S3_SECRET", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    run = tmp_path / "run"
    assert be_audit("scan", captions, "-o", run, "--model", sd1, "--steps", 2).code == 0
    assert be_audit("report", run, "--top-k", 2, "--format", "html,parquet,jsonl,csv").code == 0
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10 and any("logs" in path.parts for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in be_audit("doctor").out


# --- URLs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths it was asked for."""
    asked: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


@pytest.mark.sampling
def test_urls_of_rows_are_never_fetched(tmp_path: Path, sd1: str, server: tuple[str, list[str]]) -> None:
    url, asked = server
    table = {"TEXT": ["a red house", f"{url}/caption.png"], "url": [f"{url}/0.png", "file:///etc/passwd"]}
    pq.write_table(pa.table(table), tmp_path / "captions.parquet")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "0.png").write_bytes(picture())
    (pictures / "0.json").write_text(json.dumps({"url": f"{url}/beside.png", "caption": "a red house"}))
    cells = [{"bytes": None, "path": f"{url}/cell.png"}, {"bytes": picture(), "path": f"{url}/cell.png"}]
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"image": cells}), tmp_path / "table" / "x.parquet")
    run, index = tmp_path / "run", tmp_path / "index"
    for words in (
        ["scan", tmp_path / "captions.parquet", "-o", run, "--model", sd1, "--steps", 2],
        ["index", "build", pictures, tmp_path / "table", "-o", index, "--sscd", "testbed"],
        ["confirm", run, "--index", index, "--top-k", 2, "--num-images", 1, "--ls-threshold", 1],
        ["report", run],
    ):
        found = be_audit(*words)
        assert found.code == (3 if "build" in words else 0), found  # the cell that is a URL has no picture
    assert asked == []


# --- pickles ------------------------------------------------------------------------------------------------------


class Attack:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def as_pickle(model: Path, content: Any = None) -> None:
    """Turn a model's U-Net into a pickle of its weights, or of something else."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights) if content is None else content, weights.with_suffix(".bin"))
    weights.unlink()


@pytest.mark.slow
def test_pickled_weights_are_loaded_where_they_are_allowed_alone(captions: Path, sd1: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sd1, tmp_path / "model"))
    as_pickle(model)
    words = ["scan", captions, "--steps", 2, "--model"]
    found = be_audit(*words, model, "-o", tmp_path / "run")
    assert found.code == 2 and "diffusion_pytorch_model.bin is a pickle" in found.err and "--allow-pickle" in found.err
    assert not (tmp_path / "run").exists()
    assert be_audit(*words, model, "-o", tmp_path / "run", "--allow-pickle").code == 0
    assert be_audit(*words, sd1, "-o", tmp_path / "plain").code == 0
    one, other = (read_scores(Run.open(str(tmp_path / name)), ["magnitude"]) for name in ("run", "plain"))
    assert one.equals(other)


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [(), ("--allow-pickle",)])
def test_a_pickle_that_would_run_code_runs_none(
    captions: Path, sd1: str, tmp_path: Path, allowed: tuple[str, ...]
) -> None:
    """Without the flag it is not opened; with it, torch's restricted unpickler refuses it."""
    trace = tmp_path / "was-run"
    model = Path(shutil.copytree(sd1, tmp_path / "model"))
    as_pickle(model, {"x": Attack(trace)})
    found = be_audit("scan", captions, "-o", tmp_path / "run", "--model", model, "--steps", 2, *allowed)
    assert found.code in (2, 3) and not trace.exists()
    for name in ("word.pt", "word.bin"):
        (tmp_path / name).write_bytes(pickle.dumps({"<x>": Attack(trace)}))
        flags = ("--textual-inversion", f"{tmp_path / name}:<x>", *allowed)
        found = be_audit("scan", captions, "-o", tmp_path / "run", "--model", sd1, "--steps", 2, *flags)
        assert found.code in (2, 3) and not trace.exists(), found
        if not allowed:
            assert f"{name} is a pickle" in found.err
    pickle.loads((tmp_path / "word.pt").read_bytes())
    assert trace.exists(), "the attack itself works"
