"""A model by its hub id: what is fetched is what is loaded, from a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pipelines import find_model

pytestmark = pytest.mark.processes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = ("someone/plain", "someone/half", "someone/shards", "someone/twice", "someone/breaks")
FIND = """
import json, sys
from pipelines import ModelError, find_model
found = {}
for name in sys.argv[1:]:
    try:
        folder = find_model(name)
        found[name] = {"notes": folder.notes, "sha256": folder.weights_sha256(), "revision": folder.revision}
    except ModelError as error:
        found[name] = {"error": str(error)}
print(json.dumps(found))
"""


def halved(folder: Path, *, keep: bool) -> None:
    """Half-precision variants of all weights, beside the plain ones or in their place."""
    for plain in sorted(folder.glob("*/*.safetensors")):
        state = {key: value.half() for key, value in load_file(plain).items()}
        save_file(state, plain.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if not keep:
            plain.unlink()


def sharded(folder: Path) -> None:
    """The U-Net in several files."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")


@pytest.fixture(scope="module")
def repositories(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repositories")
    found = {name: Path(shutil.copytree(model_folders["sd1"], root / name)) for name in REPOSITORIES}
    for name, folder in found.items():
        halved(folder, keep=name != "someone/half")
    (found["someone/plain"] / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (found["someone/plain"] / "unet.ckpt").write_bytes(b"another")
    sharded(found["someone/shards"])
    whole = shutil.copy(found["someone/plain"] / "unet" / "diffusion_pytorch_model.safetensors", root)
    sharded(found["someone/twice"])
    shutil.copy(whole, found["someone/twice"] / "unet")
    return found


class Hub(ThreadingHTTPServer):
    """Answers as the hub does, for repositories that are folders; the lists of `someone/breaks` never arrive."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.fetched = repositories, set[str]()

    def find(self, home: Path, offline: str) -> dict[str, dict[str, Any]]:
        """What a process of its own says of every repository. home: of its cache. offline: its HF_HUB_OFFLINE."""
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home)}
        done = subprocess.run(
            [sys.executable, "-c", FIND, *REPOSITORIES],
            env={**os.environ, **address, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
        return found


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models/").strip("/")
        name, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        folder = self.server.repositories[name]
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if rest[:1] == ["resolve"]:
            file = "/".join(rest[2:])
            if file not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                self.server.fetched.add(f"{name}/{file}")
            content = files[file].read_bytes()
            return self.answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        if name == "someone/breaks":
            self.close_connection = True
            return None
        if rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": file, "oid": hashlib.sha1(where.read_bytes()).hexdigest(), "size": 1}
                for file, where in files.items()
            ]
            return self.answer(200, json.dumps(listed).encode(), {})
        facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        return self.answer(200, json.dumps(facts).encode(), {})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    with Hub(repositories) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def found(hub: Hub, home: Path) -> dict[str, dict[str, Any]]:
    """`HF_HUB_OFFLINE=0` is not offline."""
    return hub.find(home, offline="0")


@pytest.mark.parametrize("name", ("someone/plain", "someone/half", "someone/shards"))
def test_what_is_fetched_is_what_is_loaded(
    hub: Hub, repositories: dict[str, Path], found: dict[str, dict[str, Any]], name: str
) -> None:
    """Plain weights where there are any, else half precision, shards too; and nothing beside them."""
    local = find_model(str(repositories[name]))
    notes = [note.replace(str(repositories[name]), name) for note in local.notes]
    assert found[name] == {"notes": notes, "sha256": local.weights_sha256(), "revision": COMMIT}
    assert bool(notes) == (name == "someone/half")
    fetched = {file.removeprefix(f"{name}/") for file in hub.fetched if file.startswith(f"{name}/")}
    assert fetched == {str(file.relative_to(repositories[name])) for file in local.loaded_files()}


def test_weights_that_are_there_twice_are_refused(found: dict[str, dict[str, Any]]) -> None:
    whole = "diffusion_pytorch_model.safetensors"
    assert f"someone/twice: unet/ has {whole} and {whole}.index.json, which may" in found["someone/twice"]["error"]


def test_a_connection_that_breaks_is_an_error_and_no_other_weights(hub: Hub, found: dict[str, dict[str, Any]]) -> None:
    said = found["someone/breaks"]["error"]
    assert said.startswith("someone/breaks: no such folder, and the hub does not give it: ") and "\n" not in said
    assert said.endswith("; HF_HUB_OFFLINE=1 takes what is in the cache")
    assert {file for file in hub.fetched if "breaks" in file} == {"someone/breaks/model_index.json"}


def test_offline_is_what_is_in_the_cache(hub: Hub, home: Path, found: dict[str, dict[str, Any]]) -> None:
    before = set(hub.fetched)
    cached = hub.find(home, offline="1")
    assert hub.fetched == before
    for name in ("someone/plain", "someone/half", "someone/shards"):
        assert cached[name] == found[name]
    assert "the folder has no" in cached["someone/breaks"]["error"]
