"""Models by name: from a server on this machine that speaks the hub's protocol as far as needed."""

import hashlib
import http.server
import json
import sys
import threading

import pytest
from conftest import ids, run
from datasets import ByteTokenizer, UsageError
from test_huggingface import change, make_model

from extras import huggingface
from extras.huggingface import export_model

COMMITS = ["a" * 40, "b" * 40]
KEY = "hf_secret"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder` as the model org/tiny: its list of files, and each of them."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        server = self.server
        server.seen.append((self.command, self.path))
        path = self.path.partition("?")[0]
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": each.name} for each in sorted(server.folder.iterdir())]
            info = {"id": "org/tiny", "sha": server.commit, "siblings": siblings}
            self.reply(200, json.dumps(info).encode())
        elif path.startswith("/api/models/org/tiny/tree/"):
            files = []
            for each in sorted(server.folder.iterdir()):
                content = each.read_bytes()
                oid = hashlib.sha1(content).hexdigest()
                files.append({"type": "file", "path": each.name, "oid": oid, "size": len(content)})
            self.reply(200, json.dumps(files).encode())
        elif path.startswith(f"/org/tiny/resolve/{server.commit}/"):
            content = (server.folder / path.rpartition("/")[2]).read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": server.commit})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def reply(self, status, content, headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def hub(tmp_path):
    """The server, and as `env` the variables by which it is found."""
    pytest.importorskip("huggingface_hub")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.folder = tmp_path / "served"
        export_model(make_model(), ByteTokenizer(), server.folder, None)
        for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
            (server.folder / name).write_bytes(b"large")
        server.commit = COMMITS[0]
        server.key = None
        server.seen = []
        address = f"http://127.0.0.1:{server.server_port}"
        server.env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


def fetched(hub):
    """The names of the files that were sent."""
    paths = [path for method, path in hub.seen if method == "GET"]
    return {path.rpartition("/")[2] for path in paths if "/resolve/" in path}


@pytest.fixture
def line(text, tmp_path):
    """The command of a run of adapters, which needs its base again whenever it is resumed."""
    line = ["--text", text, "--lora_rank", 2, "--batch_size", 4, "--max_tokens", 2]
    return [*line, "--data_dir", tmp_path / "data"]


def test_a_model_by_name(hub, line, tmp_path):
    """Its weights are those of the folder; resumed, it is the very same model, from the cache."""
    named = [*line, "--init_from", "org/tiny", "--save_dir", tmp_path / "named"]
    hub.key = KEY
    run(*named, "--num_iters", 1, env=hub.env | {"HF_TOKEN": KEY})
    assert fetched(hub) == {*huggingface.TEXTS, "model.safetensors"}

    hub.commit = COMMITS[1]  # its owner has changed it
    change(hub.folder, rope_theta=5e3)
    run("--num_iters", 2, *named[-2:], *line[-2:], env=hub.env | {"HF_HUB_OFFLINE": "1"})
    change(hub.folder, rope_theta=1e4)
    export = tmp_path / "again"
    export_model(make_model(), ByteTokenizer(), export, None)
    whole = [*line, "--init_from", export, "--save_dir", tmp_path / "whole"]
    run(*whole, "--num_iters", 2)
    assert ids(tmp_path / "named")[0] == ids(tmp_path / "whole")[0]


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """The same server for this process, in which the library has read its variables already."""
    from huggingface_hub import constants

    address = hub.env["HF_ENDPOINT"]
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return constants


def test_a_folder_of_that_name_wins(hub, here, tmp_path):
    export_model(make_model(seed=1), ByteTokenizer(), tmp_path / "org" / "tiny", None)
    *_, its_id, files = huggingface.open_by_name("org/tiny")
    assert hub.seen == []
    assert str(files["config.json"]) == "org/tiny/config.json"
    *_, other_id, _ = huggingface.open_by_name("org/tiny@main")
    assert its_id != other_id


@pytest.mark.parametrize("name, values, words", [
    ("org/none", {}, "it has no such model, or a private one: check the name, or set HF_TOKEN"),
    ("org/tiny", {"HF_HUB_OFFLINE": True}, "no connection, and it was not downloaded before"),
    ("org/tiny", {"ENDPOINT": "http://127.0.0.1:9"}, "check the network, HF_ENDPOINT"),
    ("no/such/folder", {}, "no/such/folder is no folder here: name one"),
])  # fmt: skip
def test_what_cannot_be_had(name, values, words, hub, here, monkeypatch):
    for constant, value in values.items():
        monkeypatch.setattr(here, constant, value)
    with pytest.raises(UsageError) as error:
        huggingface.open_by_name(name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gated_model_names_its_key(hub, here):
    hub.key = KEY
    with pytest.raises(UsageError, match="accept the terms on its page there, and set HF_TOKEN"):
        huggingface.open_by_name("org/tiny")


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), "org/tiny: it has model_type gpt2"),
    (dict(num_hidden_layers=10**7), "org/tiny: this needs at least"),
    (dict(hidden_size="large"), "org/tiny: hidden_size is 'large'"),
    (dict(num_attention_heads=None), "org/tiny: its config.json is not that of a Llama, "),
])  # fmt: skip
def test_nothing_large_is_downloaded_in_vain(changes, words, hub, here):
    change(hub.folder, **changes)
    with pytest.raises(UsageError, match=words):
        huggingface.open_by_name("org/tiny")
    assert "model.safetensors" not in fetched(hub)


def test_no_weights_are_downloaded_without_a_tokenizer(hub, here):
    (hub.folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="org/tiny: it has no tokenizer.json"):
        huggingface.open_by_name("org/tiny")
    assert "model.safetensors" not in fetched(hub)


def test_weights_that_another_program_has_downloaded_do_not_count(hub, here):
    before = huggingface.open_by_name("org/tiny")
    folder = huggingface.download_model("org/tiny")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another form")
    after = huggingface.open_by_name("org/tiny")
    assert after[2:] == before[2:]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub"):
        huggingface.open_by_name("org/tiny")


@pytest.mark.parametrize("context, given, expected", [
    (2000, [], 1024),
    (2000, ["--context_size", 1500], 1500),
    (32, [], 32),
])  # fmt: skip
def test_a_long_context_is_not_trained_unasked(context, given, expected, line, tmp_path):
    export_model(make_model(context_size=context), ByteTokenizer(), tmp_path / "hf", None)
    line += ["--init_from", tmp_path / "hf", "--num_iters", 1, "--batch_size", 1, *given]
    out, _ = run(*line, "--save_dir", tmp_path / "lm")
    assert f", context {expected}\n" in out
