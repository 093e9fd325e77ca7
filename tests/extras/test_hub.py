"""Models by name: from a server on this machine that speaks the hub's protocol as far as needed."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler

import pytest
from conftest import begin, ids, newest, run, serving
from datasets import ByteTokenizer
from test_huggingface import TEXTS, change, make_llama

from extras.features.huggingface import export_model

KEY = "hf_secret"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.folder` as the model org/tiny: its list of files, and each of them."""

    def do_GET(self):
        server = self.server
        server.seen.append((self.command, self.path))
        path, _, name = self.path.partition("?")[0].rpartition("/")
        files = {each.name: each.read_bytes() for each in sorted(server.folder.iterdir())}
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models/org/tiny/revision":
            self.reply(200, json.dumps({"id": "org/tiny", "sha": server.commit}).encode())
        elif path == "/api/models/org/tiny/tree":
            tree = []
            for each, content in files.items():
                oid = hashlib.sha1(content).hexdigest()
                tree.append({"type": "file", "path": each, "oid": oid, "size": len(content)})
            self.reply(200, json.dumps(tree).encode())
        elif path == f"/org/tiny/resolve/{server.commit}":
            etag = hashlib.sha1(files[name]).hexdigest()
            self.reply(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": server.commit})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, status, content, headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    """The server, and as `env` the variables by which it is found."""
    pytest.importorskip("huggingface_hub")
    with serving(Handler) as server:
        server.folder = tmp_path / "served"
        export_model(make_llama(), ByteTokenizer(), server.folder, None)
        for name in ("consolidated.safetensors", "model.fp16.safetensors", "README.md"):
            (server.folder / name).write_bytes(b"large")
        server.commit = "a" * 40
        server.key = None
        server.seen = []
        server.env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        yield server


def fetched(hub):
    """The names of the files that were sent."""
    paths = [path for method, path in hub.seen if method == "GET"]
    return {path.rpartition("/")[2] for path in paths if "/resolve/" in path}


@pytest.fixture
def line(text, tmp_path):
    """The command of a run of adapters, which needs its base again whenever it is resumed."""
    line = ["--text", text, "--lora_rank=2", "--batch_size=4", "--sample_tokens=2"]
    return [*line, "--data_dir", tmp_path / "data"]


def test_a_model_by_name(hub, line, tmp_path):
    """Its weights are those of the folder.

    Resumed, it is the very same model: that of the cache where the hub cannot be reached, or that
    of the run.
    """
    named = [*line, "--init_from=org/tiny", "--save_dir", tmp_path / "named"]
    hub.key = KEY
    name, _, _ = begin(*named, "--num_iters=1", env=hub.env | {"HF_TOKEN": KEY})
    assert fetched(hub) == {*TEXTS, "model.safetensors"}

    hub.commit = "b" * 40  # its owner has changed it
    change(hub.folder, rms_norm_eps=1e-3)
    hub.seen.clear()
    by_address = [*named, "--init_from", "https://huggingface.co/org/tiny", "--num_iters=1"]
    unreachable = hub.env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert begin(*by_address, env=unreachable)[:2] == (name, 1)
    shutil.rmtree(tmp_path / "home")
    by_run = ["--identifier", name, "--num_iters=2", "--save_dir", tmp_path / "named"]
    assert begin(*by_run, env=hub.env)[:2] == (name, 1)
    assert hub.seen == []
    export = tmp_path / "again"
    export_model(make_llama(), ByteTokenizer(), export, None)
    whole = [*line, "--init_from", export, "--save_dir", tmp_path / "whole"]
    run(*whole, "--num_iters=2")
    assert ids(tmp_path / "named")[0] == ids(tmp_path / "whole")[0]


FAULT = "is no folder here, and cannot be downloaded from the Hugging Face hub: check its name"


@pytest.mark.parametrize("name, values, words", [
    ("org/none", {}, [FAULT, "Repository Not Found"]),
    ("org/tiny", {"HF_HUB_OFFLINE": "1"}, [FAULT, "outgoing traffic has been disabled"]),
    ("org/tiny", {"HF_TOKEN": "another"}, [FAULT, "Cannot access gated repo"]),
    ("org/tiny", {}, ["cannot be used: name another model (this needs about"]),
])  # fmt: skip
def test_what_cannot_be_had(name, values, words, hub, line, tmp_path):
    """And what cannot be used, before anything large is downloaded."""
    hub.key = KEY if "HF_TOKEN" in values else None
    change(hub.folder, num_hidden_layers=10**7)
    line += ["--save_dir", tmp_path / "lm"]
    _, err = run(*line, "--init_from", name, status=2, env=hub.env | values)
    assert all(word in err for word in words), err
    assert err.count("\n") == 1
    assert "model.safetensors" not in fetched(hub)


@pytest.mark.parametrize("given, expected", [([], 1024), (["--context_size=1500"], 1500)])
def test_a_long_context_is_not_trained_unasked(given, expected, line, tmp_path):
    export_model(make_llama(context_size=2000), ByteTokenizer(), tmp_path / "hf", None)
    line += ["--init_from", tmp_path / "hf", "--num_iters=1", "--batch_size=1", *given]
    run(*line, "--save_dir", tmp_path / "lm")
    assert newest(tmp_path / "lm").config["context_size"] == expected
