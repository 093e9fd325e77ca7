"""python -m extras.collect: a corpus from a server that speaks OpenAI's protocol.

The server is a real one on the loopback address, and it fails where a test asks it to.
"""

import json
import re
from http.server import BaseHTTPRequestHandler

import pytest
from conftest import run_extra, serving

KEY = "sk-very-secret"
PROMPTS = ["tell me", "ünd jetzt 😀", "go on", "the end"]


def answer(content):
    """The body of a server's answer, in which `content` is JSON."""
    return f'{{"choices": [{{"message": {{"content": {content}}}}}]}}'.encode()


class Handler(BaseHTTPRequestHandler):
    """Answers by (status, body), those of `server.script` first, then by an echo."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        content = f"echo {body['messages'][0]['content']}"
        status, data = 200, answer(json.dumps(content))
        if self.server.script:
            status, data = self.server.script.pop(0)
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", data.decode())
        self.send_header("Location", f"{self.server.url}/elsewhere")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    """A server, which a test gives a script; `asked` are (path, Authorization, body)."""
    with serving(Handler) as server:
        server.script = []
        server.asked = []
        server.url += "/v1"
        yield server


@pytest.fixture
def collect(server, tmp_path):
    """Types the command for that server in a folder; returns (stdout, stderr).

    The prompts are PROMPTS, unless the rest of the line names others, or a text.
    """
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")  # blank lines ask nothing
    # Which must not be sent in the place of the key.
    (tmp_path / "netrc").write_text("default login somebody password secret\n")

    def collect(*more, key=KEY, **options):
        line = ["--distill_from", server.url, "--teacher_model", "gpt", "--output", "out"]
        env = {"TEACHER_API_KEY": key, "NETRC": str(tmp_path / "netrc"), "no_proxy": "*"}
        if "--text" not in more:
            line += ["--teacher_prompts", "prompts.txt"]
        return run_extra("collect", *line, *more, cwd=tmp_path, env=env, **options)

    return collect


def prompts_of(server):
    """What the server was asked."""
    return [body["messages"][0]["content"] for _, _, body in server.asked]


def lines(folder):
    text = (folder / "out" / "answers.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("key, sent", [
    (KEY, f"Bearer {KEY}"),
    (f"{KEY[:5]}\r\n{KEY[5:]}\n", f"Bearer {KEY}"),  # as of a file: it begins no other header
    ("", None),
])  # fmt: skip
def test_answers_become_a_corpus(tmp_path, server, collect, key, sent):
    out, _ = collect(key=key)
    expected = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert [body["messages"] for _, _, body in server.asked] == expected
    assert {asked[:2] for asked in server.asked} == {("/v1/chat/completions", sent)}
    assert lines(tmp_path) == [
        {"prompt": prompt, "model": "gpt", "completion": f"echo {prompt}"} for prompt in PROMPTS
    ]
    corpus = "".join(f"{prompt}\necho {prompt}\n" for prompt in PROMPTS)
    assert (tmp_path / "out" / "corpus.txt").read_text() == corpus
    assert "4 answers are in out/answers.jsonl; train on them with --text out/corpus.txt" in out


@pytest.mark.parametrize("status, data, said", [
    (500, b"busy", "status 500: busy; retrying in 1 s"),
    (429, b"2", "status 429: 2; retrying in 2 s"),  # as the server asks
    (429, b"Fri, 31 Dec 1999 23:59:59 GMT", "GMT; retrying in 1 s"),
    (200, b"<html>", "JSONDecodeError.*; retrying in 1 s"),
    (200, b'{"choices": []}', "IndexError.*; retrying in 1 s"),
    (200, answer('[{"text": "a"}]'), "ValueError: the answer has no text.*; retrying in 1 s"),
    (200, answer("null"), "ValueError: the answer has no text.*; retrying in 1 s"),
    (200, b"[" * 100_000, "RecursionError.*; retrying in 1 s"),
])  # fmt: skip
def test_failures_are_tried_again(tmp_path, server, collect, status, data, said):
    server.script = [(status, data)]
    out, _ = collect()
    assert re.search(f"{said}\n", out)
    assert lines(tmp_path)[0]["completion"] == "echo tell me"


def test_what_a_model_may_say(tmp_path, server, collect):
    half_an_emoji = '"smile \\ud83d"'  # which a limit of tokens has cut
    said = ['"yes"', half_an_emoji, '"the latest test"', '"\\u001b[2J \\u009b"']
    server.script = [(200, answer(content)) for content in said]
    collect(key="test")
    expected = ["yes", "smile \ufffd", "the latest test", "\x1b[2J \x9b"]
    assert [line["completion"] for line in lines(tmp_path)] == expected
    kept = (tmp_path / "out" / "answers.jsonl").read_text()
    assert kept.replace("\n", "").isprintable(), "a terminal would act on other characters"


@pytest.mark.parametrize("key, fault", [(KEY, "refuses the key"), ("", "wants a key")])
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_sent_again(server, collect, status, key, fault):
    server.script = [(status, KEY.encode())]
    out, err = collect(key=key, status=2)
    line = f"extras.collect: {server.url} {fault} (status {status}): set TEACHER_API_KEY "
    line += "in the environment (no .env is read)\n"
    assert (out, err) == ("", line)
    assert len(server.asked) == 1


def test_a_key_that_no_header_can_hold(server, collect):
    _, err = collect(key="kéy", status=2)
    assert "TEACHER_API_KEY has characters that no key has" in err and not server.asked


def test_prompts_from_a_text(tmp_path, server, collect, text):
    """Beginnings of its lines, whole words, without a file of prompts."""
    collect("--text", text, "--data_dir", tmp_path, "--num_prompts=9")
    prompts = prompts_of(server)
    assert 1 < len(prompts) <= 9
    for prompt in prompts:
        assert f"\n{prompt} " in text.read_text()
        assert 0 < len(prompt) <= 100


def test_prompts_from_a_text_without_blanks(tmp_path, server, collect):
    line = "これは空白のない日本語の文章です。" * 20
    (tmp_path / "ja.txt").write_text(f"{line}\n" * 50, "utf-8")
    collect("--text", "ja.txt", "--data_dir", tmp_path, "--num_prompts=5")
    assert {*prompts_of(server)} == {line[:100]}


def test_three_failures_end_it_and_a_rerun_continues(tmp_path, server, collect):
    """A redirect, which is not followed; it does not show the key."""
    failure = (307, b"x" * 208 + KEY.encode())  # which a limit on what is shown cuts
    server.script = [(200, answer('"one"')), *[failure] * 3]
    out, err = collect(status=1)
    assert err.startswith(f"extras.collect: {server.url} gives no answer; 1 answers are kept")
    assert "status 307" in err and err.count("\n") == 1
    assert KEY[:5] not in out + err
    assert len(server.asked) == 4
    collect()
    assert len(server.asked) == 7
    assert [line["completion"] for line in lines(tmp_path)][:2] == ["one", f"echo {PROMPTS[1]}"]


def line_of(prompt, key="completion", text="a"):
    answer = {"prompt": prompt, "model": "gpt", key: text}
    return json.dumps(answer, ensure_ascii=False) + "\n"


DAMAGED = "line 1 of out/answers.jsonl is damaged"


@pytest.mark.parametrize("name, content, status, said", [
    ("corpus.txt", "mine", 2, "corpus.txt is not of this program: name another --output"),
    ("answers.jsonl", line_of("show me"), 2, "name another --output"),
    ("answers.jsonl", line_of("tell me", "answer"), 2, "name another --output"),
    ("answers.jsonl", "".join(map(line_of, [*PROMPTS, "more"])), 2, "name another --output"),
    ("answers.jsonl", line_of("tell me", text=5), 1, DAMAGED),
    ("answers.jsonl", line_of("tell me").replace("}", ""), 1, DAMAGED),
])  # fmt: skip
def test_other_files_are_left_alone(tmp_path, server, collect, name, content, status, said):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / name
    path.write_text(content)
    _, err = collect(status=status)
    assert said in err and err.count("\n") == 1
    assert path.read_text() == content
    assert not server.asked


@pytest.mark.parametrize("typed, said", [
    ("--distill_from localhost:8000", "give an address like http://localhost:8000/v1"),
    ("--distill_from http://user:word@x/v1", "the key comes from TEACHER_API_KEY"),
    ("--distill_from http://[::1/v1", "give an address like http://localhost:8000/v1"),
    ("--distill_from http://127.0.0.1:99999/v1", "Port out of range"),
    ("--teacher_prompts none.txt", "none.txt must be a UTF-8 file"),
    ("--teacher_prompts blank.txt", "it has no prompt"),
    ("--output prompts.txt", "cannot write to --output prompts.txt"),
])  # fmt: skip
def test_mistakes(tmp_path, collect, typed, said):
    (tmp_path / "blank.txt").write_text("\n \n")
    _, err = collect(*typed.split(), status=2)
    assert said in err.splitlines()[-1] and "word" not in err
