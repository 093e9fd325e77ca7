"""python datasets.py --distill_from: a corpus from a server that speaks OpenAI's protocol, and that fails, stalls and limits."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
from conftest import ROOT
from datasets import RunError, UsageError

KEY, sleep = "sk-very-secret", time.sleep
PROMPTS = ["tell me", "ünd jetzt 😀", "", "the end"]


class Server:
    """Answers each request by the next of `script` ("ok" beyond it) and keeps what it was asked."""

    def __init__(self, script=()):
        self.script, self.asked, server = list(script), [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((time.monotonic(), self.path, self.headers.get("Authorization"), body))
                what = server.script.pop(0) if server.script else "ok"
                content = f"echo {body['messages'][0]['content']}"
                answer = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
                status, headers, data = 200, {}, json.dumps(answer).encode()
                if what == "stall":
                    sleep(2)
                elif what == "cut":
                    headers, data = {"Content-Length": str(len(data) + 5)}, data
                elif what == "nonsense":
                    data = b"<html>"
                elif what == "no choice":
                    data = b'{"choices": []}'
                elif what == "half":  # of an emoji, which the model's token limit has cut
                    data = b'{"choices": [{"message": {"content": "smile \\ud83d"}}]}'
                elif what == "key":  # so far on that a message cut too early would keep its beginning
                    status, data = 400, b"x" * 190 + self.headers.get("Authorization").encode()
                elif isinstance(what, tuple):
                    status, headers = what
                    data = f"no, {self.headers.get('Authorization')}".encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds the client would have slept; nobody waits for them."""
    slept = []
    monkeypatch.setattr(datasets.time, "sleep", slept.append)
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    return slept


def lines(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def distill(server, folder, prompts=PROMPTS, **options):
    said = []
    datasets.distill(server.url, "gpt", prompts, folder, say=said.append, **options)
    return said


def test_answers_become_a_corpus(tmp_path, pauses):
    with Server() as server:
        said = distill(server, tmp_path)
    assert [asked[3]["messages"] for asked in server.asked] == [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert {asked[1:3] for asked in server.asked} == {("/v1/chat/completions", f"Bearer {KEY}")}
    assert lines(tmp_path) == [{"prompt": p, "model": "gpt", "completion": f"echo {p}"} for p in PROMPTS]
    assert (tmp_path / "corpus.txt").read_text() == "".join(f"{p}\necho {p}\n" for p in PROMPTS)
    assert pauses == [] and "--text" in said[-1]


def test_without_a_key_none_is_sent(tmp_path, pauses, monkeypatch):
    monkeypatch.delenv("TEACHER_API_KEY")
    with Server() as server:
        distill(server, tmp_path)
    assert {asked[2] for asked in server.asked} == {None}


def test_failures_are_tried_again(tmp_path, pauses):
    script = [(500, {}), "ok", (429, {"Retry-After": "7"}), (429, {"Retry-After": "0.5"}), "cut", "ok", "nonsense", "no choice"]
    with Server(script) as server:
        said = distill(server, tmp_path)
    assert [line["prompt"] for line in lines(tmp_path)] == PROMPTS and len(server.asked) == 4 + 6
    assert pauses == [1, 7, 2, 4, 1, 2], "backing off for each prompt anew, and as long as the server asks"
    assert "status 500" in said[0] and KEY not in " ".join(said), "not even where the server repeats it"


def test_a_server_that_stalls(tmp_path, pauses):
    with Server(["stall"]) as server:
        said = distill(server, tmp_path, PROMPTS[:1], timeout=0.3)
    assert len(server.asked) == 2 and "Timeout" in said[0]


@pytest.mark.parametrize("script, asked", [([(401, {})], 1), ([(400, {})], 1), ([(503, {})] * 8, 8)])
def test_failures_that_end_it(tmp_path, pauses, script, asked):
    with Server(["ok", *script]) as server:
        with pytest.raises(RunError) as error:
            distill(server, tmp_path)
        assert len(server.asked) == 1 + asked and KEY not in str(error.value) and "start it again" in str(error.value)
        distill(server, tmp_path)
        assert len(server.asked) == 1 + asked + 3, "what was answered is not asked again"
    assert [line["prompt"] for line in lines(tmp_path)] == PROMPTS


@pytest.mark.parametrize("kept", [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:5]])
def test_a_file_that_a_kill_cut_off(tmp_path, pauses, kept):
    path = tmp_path / "answers.jsonl"
    with Server() as server:
        distill(server, tmp_path)
        whole = path.read_bytes()
        path.write_bytes(kept(whole))
        distill(server, tmp_path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"notes\n", b"notes", b'{"prompt": "other", "model": "gpt", "completion": ""}\n', b"[]\n", b"{}\n"])
def test_other_files_are_left_alone(tmp_path, pauses, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with Server() as server, pytest.raises(UsageError, match="name another --output"):
        distill(server, tmp_path)
    assert path.read_bytes() == content and not server.asked


def test_half_a_character_is_an_answer(tmp_path, pauses):
    with Server(["half"]) as server:
        distill(server, tmp_path)
    assert lines(tmp_path)[0]["completion"] == "smile \ufffd" and len(server.asked) == len(PROMPTS)


def test_no_part_of_the_key_is_shown(tmp_path, pauses):
    with Server(["key"]) as server, pytest.raises(RunError) as error:
        distill(server, tmp_path)
    assert KEY[:6] not in str(error.value) and "***" in str(error.value)


def test_limit_of_requests(tmp_path, pauses):
    with Server() as server, pytest.raises(RunError, match="-1 requests"):
        distill(server, tmp_path, most=-1)
    assert not server.asked
    with Server([(500, {})]) as server:
        with pytest.raises(RunError, match="2 requests are made .*, 1 prompts answered"):
            distill(server, tmp_path, most=2)
        assert len(server.asked) == 2 and len(lines(tmp_path)) == 1


def program(folder, *arguments, **env):
    command = [sys.executable, str(ROOT / "datasets.py"), *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "TEACHER_API_KEY"} | env | {"no_proxy": "*"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_from_the_command_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    with Server(["stall"]) as server:
        line = ["--distill_from", server.url, "--teacher_model", "gpt", "--teacher_prompts", "prompts.txt", "--output", "out"]
        process = program(tmp_path, *line, TEACHER_API_KEY=KEY)
        assert process.returncode == 0 and "4 answers" in process.stdout
        assert program(tmp_path, *line, "--teacher_model", "other").returncode == 2
    assert len(server.asked) == 4 and server.asked[0][2] == f"Bearer {KEY}"
    for path in (tmp_path / "out").iterdir():
        assert KEY not in path.read_text()
    assert KEY not in process.stdout + process.stderr
    process = program(tmp_path, *line[:4], "--teacher_prompts", "none.txt", "--output", "out")
    assert process.returncode == 2 and "--teacher_prompts none.txt must be" in process.stderr
    for left_out in ("--teacher_model", "--teacher_prompts", "--output"):
        shorter = [*line]
        del shorter[shorter.index(left_out) : shorter.index(left_out) + 2]
        process = program(tmp_path, *shorter)
        assert process.returncode == 2 and left_out in process.stderr and process.stderr.count("\n") == 1
