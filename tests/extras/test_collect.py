"""python -m extras.collect: a corpus from a server that speaks OpenAI's protocol.

The server is a real one on the loopback address, and it fails, stalls and limits.
"""

import fcntl
import contextlib
import gzip
import json
import os
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, TINY, run, run_extra

import extras.collect
import extras.results
from datasets import RunError, UsageError

KEY = "sk-very-secret"
PROMPTS = ["tell me", "ünd jetzt 😀", "", "the end"]
sleep = time.sleep  # which a fixture replaces


def reply(content):
    """The body of a server's reply, in which `content` is JSON."""
    return f'{{"choices": [{{"message": {{"content": {content}}}}}]}}'.encode()


REPLIES = {
    "nonsense": b"<html>",
    "no choice": b'{"choices": []}',
    "nothing": reply("null"),
    "parts": reply('[{"text": "a"}]'),  # of a content, as some servers divide it
    "false": reply("false"),
    "empty list": reply("[]"),
    "deep": b"[" * 100_000,
    "bomb": gzip.compress(bytes(1 << 26)),
    "escapes": reply("\x1b]0;owned\x07"),
    "echo": reply(f'"your key is {KEY}"'),
    "half": reply('"smile \\ud83d"'),  # of an emoji, which the model's token limit has cut
}


class Server:
    """Answers each request by the next of `script`, then "ok", and keeps what it was asked."""

    def __init__(self, script=()):
        self.script = list(script)
        self.asked = []  # (path, Authorization, body)
        self.sent = 0  # bytes of endless answers
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                authorization = self.headers.get("Authorization")
                server.asked.append((self.path, authorization, body))
                what = server.script.pop(0) if server.script else "ok"
                content = f"echo {body['messages'][0]['content']}"
                message = {"role": "assistant", "content": content}
                answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
                status = 200
                data = json.dumps(answer).encode()
                headers = {"Content-Length": str(len(data))}
                if what == "stall":
                    sleep(2)
                elif what == "endless":
                    headers = {}
                elif what == "endless redirect":
                    status = 307
                    headers = {"Location": f"{server.url}/chat/completions"}
                elif what == "cut":
                    headers["Content-Length"] = str(len(data) + 5)
                elif what == "key":  # where a message cut too early would keep its beginning
                    status = 400
                    data = b"x" * 190 + authorization.encode()
                    headers["Content-Length"] = str(len(data))
                elif isinstance(what, tuple):
                    status, more = what
                    what = "failure"
                    data = f"no, {authorization}\x1b]0;owned\x07".encode()
                    headers["Content-Length"] = str(len(data))
                    headers |= more
                elif what not in ("ok", "trickle"):
                    data = REPLIES[what]
                    headers["Content-Length"] = str(len(data))
                    if what == "bomb":
                        headers["Content-Encoding"] = "gzip"
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have had enough
                    self.send_body(what, data)

            def send_body(self, what, data):
                if what.startswith("endless"):
                    for _ in range(64):  # MiB
                        self.wfile.write(bytes(1 << 20))
                        server.sent += 1 << 20
                elif what == "trickle":
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        sleep(0.03)
                else:
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        # Seconds between looks at whether to shut down.
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds the client would have slept; nobody waits for them."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    return slept


def read_lines(path):
    text = path.read_text().removesuffix("\n")
    return [json.loads(line) for line in text.split("\n")]


def lines(folder):
    return read_lines(folder / "answers.jsonl")


def distill(server, folder, prompts=PROMPTS, **options):
    said = []
    extras.collect.collect_answers(server.url, "gpt", prompts, folder, say=said.append, **options)
    return said


def test_answers_become_a_corpus(tmp_path, pauses):
    with Server() as server:
        said = distill(server, tmp_path)
    expected = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert [body["messages"] for _, _, body in server.asked] == expected
    assert {asked[:2] for asked in server.asked} == {("/v1/chat/completions", f"Bearer {KEY}")}
    assert lines(tmp_path) == [
        {"prompt": prompt, "model": "gpt", "completion": f"echo {prompt}"} for prompt in PROMPTS
    ]
    corpus = "".join(f"{prompt}\necho {prompt}\n" for prompt in PROMPTS)
    assert (tmp_path / "corpus.txt").read_text() == corpus
    assert pauses == []
    assert "--text" in said[-1]


@pytest.mark.parametrize("key", [KEY, ""])
def test_netrc_replaces_no_key(tmp_path, pauses, monkeypatch, key):
    (tmp_path / "netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TEACHER_API_KEY", key)
    with Server() as server:
        distill(server, tmp_path)
    sent = {authorization for _, authorization, _ in server.asked}
    assert sent == {f"Bearer {key}" if key else None}


def test_without_a_key_none_is_sent(tmp_path, pauses, monkeypatch):
    monkeypatch.delenv("TEACHER_API_KEY")
    with Server() as server:
        distill(server, tmp_path)
    assert {authorization for _, authorization, _ in server.asked} == {None}


def test_a_redirect_takes_no_key_along(tmp_path, pauses):
    with Server() as other:
        redirect = (307, {"Location": f"{other.url}/chat/completions"})
        with Server([redirect] * 9) as server, contextlib.suppress(RunError):
            distill(server, tmp_path, PROMPTS[:1])
    assert server.asked[0][1] == f"Bearer {KEY}"
    assert other.asked
    assert {authorization for _, authorization, _ in other.asked} == {None}


def key_for(url):
    """The variable of the key that is sent to a server, and the key."""
    teacher = extras.collect.Teacher(url, "gpt", 1, 1, print)
    return teacher.key_name, teacher.key


@pytest.fixture
def owners_keys(monkeypatch):
    """OpenAI's and Groq's keys are set, each to its variable's name, and no other key."""
    for name in ("OPENAI_API_KEY", "GROQ_API_KEY"):
        monkeypatch.setenv(name, name.lower())
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)


@pytest.mark.parametrize(
    "url, variable",
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("https://API.Groq.com:443/openai/v1", "GROQ_API_KEY"),
        ("HTTPS://api.openai.com/v1", "OPENAI_API_KEY"),
        ("http://localhost:8000/v1", None),
        ("https://api.openai.com.example.org/v1", None),
        ("https://notopenai.com/v1", None),
        ("https://example.org/openai.com", None),
        ("https://example.org/@openai.com", None),
        ("https://example.org?@openai.com", None),
        ("https://example.org#@openai.com", None),
    ],
)
def test_a_key_goes_to_its_owner_alone(monkeypatch, owners_keys, url, variable):
    expected = ("TEACHER_API_KEY", "")
    if variable:
        expected = (variable, variable.lower())
    assert key_for(url) == expected
    monkeypatch.setenv("TEACHER_API_KEY", "")
    assert key_for(url) == expected
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    assert key_for(url) == ("TEACHER_API_KEY", KEY)
    monkeypatch.delenv("TEACHER_API_KEY")
    if variable:
        monkeypatch.setenv(variable, f"{KEY}\n")
        with pytest.raises(UsageError, match=f"^{variable} holds a line end"):
            key_for(url)


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("", "\\@api.openai.com/v1", "holds a backslash"),
        ("", "\\@openai.com", "holds a backslash"),
        ("", "\t@openai.com/v1", "control character"),
        ("", "\n@openai.com/v1", "control character"),
        ("openai.com@", "/v1", "takes no name or password"),
        ("api.openai.com:x@", "", "takes no name or password"),
    ],
)
def test_an_address_that_only_seems_to_be_the_owners(
    tmp_path, pauses, owners_keys, before, after, words
):
    """Parsers disagree about the host of such an address."""
    with Server() as server:
        host = server.url.removeprefix("http://").removesuffix("/v1")
        url = f"http://{before}{host}{after}"
        with pytest.raises(UsageError, match=words) as error:
            extras.collect.collect_answers(url, "gpt", PROMPTS, tmp_path / "out")
    assert not server.asked
    assert "\n" not in str(error.value)


def test_an_owners_key_is_not_sent_in_clear_text(monkeypatch, owners_keys):
    url = "http://api.openai.com/v1"
    with pytest.raises(UsageError, match="OPENAI_API_KEY in clear text: give .* https://"):
        key_for(url)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key_for(url) == ("OPENAI_API_KEY", ""), "there is none to be sent"


def test_a_student_asks_for_what_it_began(tmp_path, text):
    """Train, sample prompts, collect, fine-tune: the teacher gets the student's continuations."""
    folder = ["--save_dir", tmp_path / "lm", "--max_tokens", 12]
    run("--text", text, *TINY, "--num_iters", 2, *folder)
    (tmp_path / "begin.txt").write_text("the\na ☃\n")
    line = [tmp_path / "begin.txt", "--num_samples", 2, "--temperature", 1, *folder]
    run_extra("batch", *line, "--output", tmp_path / "begun.jsonl")
    begun = read_lines(tmp_path / "begun.jsonl")
    with Server() as server:
        line = ["--distill_from", server.url, "--teacher_model", "gpt"]
        process = program(tmp_path, *line, "--teacher_prompts", "begun.jsonl", "--output", "out")
        assert process.returncode == 0, process.stderr
    asked = [body["messages"][0]["content"] for _, _, body in server.asked]
    assert asked == [answer["prompt"] + answer["completion"] for answer in begun]
    assert len(set(asked)) == 4
    line = ["--text", tmp_path / "out" / "corpus.txt", "--init_from", "latest"]
    out, _ = run(*line, "--batch_size", 2, "--num_iters", 2, *folder)
    assert "at iteration 2" in out


def test_lines_of_prompts(tmp_path):
    """As for extras.batch: a lone \\r, a \\f and so on are part of a prompt."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\rb\r\n\nc\x0cd\u2028e\n".encode())
    assert extras.collect.read_prompts(path) == ["a\rb", "", "c\x0cd\u2028e"]
    path.write_bytes(b"\n")
    assert extras.collect.read_prompts(path) == [""]


def test_more_prompts_than_memory_should_hold(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\n" * (10**6 + 1))
    with pytest.raises(UsageError, match="more than 1,000,000 lines"):
        extras.collect.read_prompts(path)
    path.write_bytes(b"\n" * 10**6)
    assert len(extras.collect.read_prompts(path)) == 10**6


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        '{"prompt": "a"}',
        "[1]",
        '{"prompt": "a", "completion": 3}',
        '{"prompt": 1, "completion": 2}',
        '{"prompt": [1], "completion": [2]}',
        '{"prompt": NaN, "completion": 1}',
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_prompts_that_no_model_has_written(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(UsageError) as error:
        extras.collect.read_prompts(path)
    assert f"{path} must hold what extras.batch writes" in str(error.value)
    assert "\n" not in str(error.value)


def test_failures_are_tried_again(tmp_path, pauses):
    script = [
        (500, {}),
        "ok",
        (429, {"Retry-After": "7"}),
        (429, {"Retry-After": "0.5"}),
        "cut",
        "ok",
        "nonsense",
        "no choice",
        "parts",
        "deep",
        "false",
        "empty list",
    ]
    with Server(script) as server:
        said = distill(server, tmp_path)
    assert [line["prompt"] for line in lines(tmp_path)] == PROMPTS
    assert len(server.asked) == 4 + 10
    expected = [1, 7, 2, 4, 1, 2, 4, 8, 16, 32]
    assert pauses == expected, "backing off for each prompt anew, and as long as the server asks"
    assert "status 500" in said[0]
    assert KEY not in " ".join(said), "even if the server repeats it"


def test_a_server_that_stalls(tmp_path, pauses):
    with Server(["stall"]) as server:
        said = distill(server, tmp_path, PROMPTS[:1], timeout=0.3)
    assert len(server.asked) == 2
    assert "Timeout" in said[0]


def test_a_server_that_trickles(tmp_path, pauses, monkeypatch):
    """It never stalls, and would hold the client for days."""
    monkeypatch.setattr(extras.collect, "LONGEST_WAIT", 0.5, raising=False)
    with Server(["trickle"]) as server:
        said = distill(server, tmp_path, PROMPTS[:1])
    assert len(server.asked) == 2
    assert len(said) == 2, "one failure, and the end"


@pytest.mark.parametrize("what", ["endless", "endless redirect"])
def test_an_endless_answer_is_not_read(tmp_path, pauses, what):
    with Server([what]) as server:
        said = distill(server, tmp_path, PROMPTS[:1])
    assert len(server.asked) == 2
    assert server.sent < 32 << 20  # sockets buffer some
    if what == "endless":
        assert "larger than 4,194,304 bytes" in said[0]
    assert lines(tmp_path)[0]["completion"] == "echo tell me"


def test_a_compressed_answer_is_not_unpacked_in_full(tmp_path, pauses):
    """64 MiB in 64 KiB."""
    assert len(REPLIES["bomb"]) < 1 << 17
    tracemalloc.start()
    try:
        with Server(["bomb"]) as server:
            said = distill(server, tmp_path, PROMPTS[:1])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(server.asked) == 2
    assert "larger than" in said[0]
    assert peak < 32 << 20


def test_a_server_does_nothing_to_the_terminal(tmp_path, pauses):
    retry = {"Retry-After": "\xb2"}  # a digit, for Python's isdigit
    with Server(["escapes", (500, {"X": "y"}), (503, retry)]) as server:
        said = distill(server, tmp_path, PROMPTS[:1])
    assert len(server.asked) == 4
    assert all(line.isprintable() for line in said)


@pytest.mark.parametrize(
    "script, asked",
    [
        ([(401, {})], 1),
        ([(400, {})], 1),
        ([(503, {})] * 8, 8),
        ([(307, {"Location": "ftp://elsewhere"})], 1),
        ([(307, {"Location": "http://localhost:99999/"})], 1),
        ([(307, {"Location": "http://a..b/"})], 1),
    ],
)
def test_failures_that_end_it(tmp_path, pauses, script, asked):
    with Server(["ok", *script]) as server:
        with pytest.raises(RunError) as error:
            distill(server, tmp_path)
        assert len(server.asked) == 1 + asked
        assert KEY not in str(error.value)
        assert "rerun to continue" in str(error.value)
        distill(server, tmp_path)
        assert len(server.asked) == 1 + asked + 3, "what was answered is not asked again"
    assert [line["prompt"] for line in lines(tmp_path)] == PROMPTS


@pytest.mark.parametrize(
    "url, words",
    [
        ("localhost:8000/v1", "give the address with http:// or https://"),
        ("127.0.0.1:8000/v1", "give the address with http:// or https://"),
        ("ftp://localhost/v1", "give the address with http:// or https://"),
        ("", "give the address with http:// or https://"),
        ("http://", "is not a valid address"),
        ("http://localhost:port/v1", "is not a valid address"),
        ("http://local host/v1", "is not a valid address"),
    ],
)
def test_what_is_no_address(tmp_path, pauses, url, words):
    folder = tmp_path / "out"
    with pytest.raises(UsageError, match=words):
        extras.collect.collect_answers(url, "gpt", PROMPTS, folder)
    assert not pauses
    assert not folder.exists()


@pytest.mark.parametrize(
    "url",
    [
        "user:passw0rd@localhost/v1",
        "http://user:passw0rd@localhost/v1",
        "http://user:passw0rd@localhost:port/v1",
        "http://user:passw0rd\\@localhost/v1",
        "http://user:passw0rd@local host/v1",
        "http://user:passw0rd/x@localhost/v1",
    ],
)
def test_a_password_in_an_address_is_not_shown(tmp_path, pauses, url):
    with pytest.raises(UsageError) as error:
        extras.collect.collect_answers(url, "gpt", PROMPTS, tmp_path / "out")
    assert "passw0rd" not in str(error.value)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nHost: x", f"{KEY}ü", f"{KEY}\x00"])
def test_a_key_that_no_header_can_hold(tmp_path, pauses, monkeypatch, key):
    if "\0" in key:  # which no environment can hold, either
        monkeypatch.setattr(os, "environ", {"TEACHER_API_KEY": key})
    else:
        monkeypatch.setenv("TEACHER_API_KEY", key)
    with Server() as server, pytest.raises(UsageError, match="TEACHER_API_KEY") as error:
        distill(server, tmp_path)
    assert KEY not in str(error.value)
    assert not server.asked
    assert not pauses


@pytest.mark.parametrize(
    "count",
    [
        lambda size: size - 1,
        lambda size: size // 2,
        lambda size: 0,
        lambda size: 5,
    ],
)
def test_a_file_that_a_kill_cut_off(tmp_path, pauses, count):
    path = tmp_path / "answers.jsonl"
    with Server() as server:
        distill(server, tmp_path)
        whole = path.read_bytes()
        path.write_bytes(whole[: count(len(whole))])
        distill(server, tmp_path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"notes\n",
        b"notes",
        b'{"prompt": "other", "model": "gpt", "completion": ""}\n',
        b"[]\n",
        b"{}\n",
    ],
)
def test_other_files_are_left_alone(tmp_path, pauses, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with Server() as server, pytest.raises(UsageError, match="name another --output"):
        distill(server, tmp_path)
    assert path.read_bytes() == content
    assert not server.asked


@pytest.mark.parametrize("more", [b"{", b'{"prompt": "one more"}\n', b"\n"])
def test_a_file_with_more_than_these_prompts_is_left_alone(tmp_path, pauses, more):
    path = tmp_path / "answers.jsonl"
    with Server() as server:
        distill(server, tmp_path)
        content = path.read_bytes() + more
        path.write_bytes(content)
        with pytest.raises(UsageError, match="name another --output"):
            distill(server, tmp_path)
    assert path.read_bytes() == content
    assert len(server.asked) == len(PROMPTS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-5],
        lambda line: line + b"}",
        lambda line: line.replace(b"echo", b"\xff\xfe"),
        lambda line: line.replace(b"echo", b"\x00"),
        lambda line: line.partition(b"echo")[0] + b"[" * 100_000,
        lambda line: line.replace(b'"echo tell me"', b"5"),
    ],
)
def test_a_damaged_line(tmp_path, pauses, damage):
    path = tmp_path / "answers.jsonl"
    with Server() as server:
        distill(server, tmp_path)
        corpus = (tmp_path / "corpus.txt").read_bytes()
        first, *others = path.read_bytes().split(b"\n")
        content = b"\n".join([damage(first), *others[:1], b""])
        path.write_bytes(content)
        with pytest.raises(RunError, match=f"line 1 of {path} is damaged") as error:
            distill(server, tmp_path)
        assert "\n" not in str(error.value)
        assert len(server.asked) == len(PROMPTS)
    assert path.read_bytes() == content
    assert (tmp_path / "corpus.txt").read_bytes() == corpus


def test_half_a_character_in_the_file(tmp_path, pauses):
    """Escaped, as another program may have written it: no UTF-8 file can hold it."""
    head = json.dumps({"prompt": "a", "model": "gpt"}).removesuffix("}")
    (tmp_path / "answers.jsonl").write_text(head + ', "completion": "\\ud83d"}\n')
    with Server() as server:
        distill(server, tmp_path, ["a"])
    assert (tmp_path / "corpus.txt").read_text() == "a\n\ufffd\n"


def test_another_process_is_collecting(tmp_path, pauses):
    """The lock holds until the corpus is written, and ends with its holder."""
    path = tmp_path / "answers.jsonl"
    with Server() as server:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(UsageError, match=f"{path} is being written by another process"):
                distill(server, tmp_path)
            assert not server.asked
        distill(server, tmp_path)
    assert [line["prompt"] for line in lines(tmp_path)] == PROMPTS


@pytest.mark.parametrize("name", ["corpus.txt", "answers.jsonl", "link"])
def test_prompts_that_the_output_would_replace(tmp_path, name):
    (tmp_path / "out").mkdir()
    source = tmp_path / "out" / name
    if name == "link":
        (tmp_path / "out" / "corpus.txt").write_text("a\n")
        source.symlink_to("corpus.txt")
    else:
        source.write_text("a\n")
    with Server() as server:
        line = ["--distill_from", server.url, "--teacher_model", "gpt", "--output", "out"]
        process = program(tmp_path, *line, "--teacher_prompts", source)
    assert process.returncode == 2
    assert "name another --output" in process.stderr
    assert process.stderr.count("\n") == 1
    assert source.read_text() == "a\n"
    assert not server.asked


@contextlib.contextmanager
def full_disk(size):
    """In it, no file grows beyond so many bytes: also not one that pytest itself prints to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("old")
    with full_disk(100), pytest.raises(RunError, match=f"cannot write {path}"):
        extras.results.write_whole(path, "new" * 100)
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.txt"]
    assert path.read_text() == "old"


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to("target")
    extras.results.write_whole(tmp_path / "link", "é")
    assert (tmp_path / "target").read_text("utf-8") == "é"
    assert (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    extras.results.write_whole(tmp_path / "pipe", "é")
    assert os.read(reader, 9).decode() == "é"
    assert (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_no_answer_is_an_answer(tmp_path, pauses):
    with Server(["nothing"]) as server:
        distill(server, tmp_path)
    assert lines(tmp_path)[0]["completion"] == ""
    assert len(server.asked) == len(PROMPTS)


def test_half_a_character_is_an_answer(tmp_path, pauses):
    with Server(["half"]) as server:
        distill(server, tmp_path)
    assert lines(tmp_path)[0]["completion"] == "smile \ufffd"
    assert len(server.asked) == len(PROMPTS)


def test_no_part_of_the_key_is_shown(tmp_path, pauses):
    with Server(["key"]) as server, pytest.raises(RunError) as error:
        distill(server, tmp_path)
    assert KEY[:6] not in str(error.value)
    assert "***" in str(error.value)


def test_a_key_that_the_server_repeats_is_not_saved(tmp_path, pauses):
    with Server(["echo"]) as server:
        distill(server, tmp_path, PROMPTS[:1])
    assert lines(tmp_path)[0]["completion"] == "your key is ***"


def test_limit_of_requests(tmp_path, pauses):
    with Server() as server, pytest.raises(RunError, match="-1 requests"):
        distill(server, tmp_path, max_requests=-1)
    assert not server.asked
    with Server([(500, {})]) as server:
        with pytest.raises(RunError, match="stopped after 2 requests .*, 1 prompts answered"):
            distill(server, tmp_path, max_requests=2)
        assert len(server.asked) == 2
        assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("place", ["file", "file/sub", "folder"])
def test_an_output_that_cannot_be_written(tmp_path, pauses, place):
    """That is noticed before any request."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder" / "corpus.txt").mkdir(parents=True)
    with Server() as server, pytest.raises(UsageError, match="name (a folder|another)"):
        distill(server, tmp_path / place)
    assert not server.asked
    assert (tmp_path / "file").read_text() == "precious"


def test_the_corpus_keeps_its_mode(tmp_path, pauses):
    path = tmp_path / "corpus.txt"
    path.write_text("old")
    path.chmod(0o600)
    (tmp_path / "corpus.txt.new").write_text("precious")
    with Server() as server:
        distill(server, tmp_path)
    assert path.read_text() != "old"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "corpus.txt.new").read_text() == "precious"


# ---- The command --------------------------------------------------------------------------------


def program(folder, *arguments, path=("-m", "extras.collect"), **env):
    command = [sys.executable, *path, *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    env = inherited | env | {"no_proxy": "*", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def assert_refused(process, words):
    """It ended with status 2 and one line on stderr that contains `words`."""
    assert process.returncode == 2
    assert process.stderr.startswith("extras.collect: ")
    assert process.stderr.count("\n") == 1
    assert words in process.stderr


def test_from_the_command_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    with Server(["stall"]) as server:
        line = ["--distill_from", server.url, "--teacher-model", "gpt"]
        line += ["--teacher_prompts", "prompts.txt", "--output", "out"]
        process = program(tmp_path, *line, TEACHER_API_KEY=KEY)
        assert process.returncode == 0
        assert "4 answers" in process.stdout
        # The errors of the extra are those that the program knows.
        assert_refused(program(tmp_path, *line, "--teacher_model", "other"), "another --output")
        limited = program(tmp_path, *line, "--output", "new", "--max_requests", 1)
        assert limited.returncode == 1
        assert limited.stderr.count("\n") == 1
    assert len(server.asked) == 4 + 1
    assert server.asked[0][1] == f"Bearer {KEY}"
    for path in (tmp_path / "out").iterdir():
        assert KEY not in path.read_text()
    assert KEY not in process.stdout + process.stderr


def test_mistakes_on_the_command_line(tmp_path, monkeypatch):
    """Each in this process, but for the first."""
    monkeypatch.chdir(tmp_path)

    def assert_main_refuses(arguments, words):
        with pytest.raises(UsageError) as refused:
            extras.collect.main(list(map(str, arguments)))
        assert words in str(refused.value)

    (tmp_path / "prompts.txt").write_text("a\n")
    line = {
        "--distill_from": "http://127.0.0.1:9/",
        "--teacher_model": "gpt",
        "--teacher_prompts": "prompts.txt",
        "--output": "out",
    }
    assert_refused(program(tmp_path, "--output", "out"), "--distill_from")
    for name in line:
        shorter = []
        for other, value in line.items():
            if other != name:
                shorter += [other, value]
        assert_main_refuses(shorter, name)
    words = list(sum(line.items(), ()))
    missing = [*words, "--teacher_prompts", "none.txt"]
    assert_main_refuses(missing, "--teacher_prompts none.txt must be")
    assert_main_refuses([*words, "--max_requests", 0], "at least 1")
    assert not (tmp_path / "out").exists()
