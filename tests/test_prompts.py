"""Talking to a checkpoint: from a pipe and in a terminal, with no corpus at hand, whatever is typed."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT, WORDS, ids, run, start


def talk(folder, prompts, *arguments):
    """stdout and stderr of a session in which `prompts` come from a pipe."""
    return run("--inference", "--save_dir", folder, *arguments, input=prompts)


def count_tokens(folder, replies):
    """Tokens of a word model's replies: words and line ends, the one included that closes each reply."""
    replies = replies.removesuffix(talk(folder, "")[0])  # what ends a session
    return len(replies.split()) + replies.count("\n")


# ---- From a pipe ----------------------------------------------------------------------------------------------------


def test_reply(model):
    out, err = talk(model, "the company\n")
    assert len(out) > 20 and out.endswith("\n") and "the company" not in out[:11], "the continuation, not the prompt"
    assert re.fullmatch(rf"text-[0-9a-f]{{6}}, iteration 100, checkpoint {ids(model)[0][:12]}\n", err)
    assert len(set(re.findall(r"\w+", out)) & set(WORDS)) >= 2, "it has learnt a little"


def test_nothing_asked(model):
    out, err = talk(model, "")
    assert out.strip() == "" and err.count("\n") == 1


def test_each_line_gets_a_reply(word_model):
    prompts = ["the company", "", "a lazy", "  fox  ", "the company"]
    out, err = talk(word_model, "\n".join(prompts), "--max_tokens", 5)  # the last line has no end
    assert count_tokens(word_model, out) == len(prompts) * (5 + 1) and "<unk>" not in err
    assert out.startswith(talk(word_model, prompts[0], "--max_tokens", 5)[0])


def test_the_conversation_counts_until_it_is_reset(byte_model):
    """Greedy replies to the same line differ after other lines, and are the first one's after /reset."""
    hot = ["--temperature", 3, "--max_tokens", 30]
    first = talk(byte_model, "the company\n", *hot)[0]
    assert talk(byte_model, "the company\nthe company\n", *hot)[0] != 2 * first
    assert talk(byte_model, "the company\n/reset\nthe company\n", *hot)[0] == 2 * first


def test_commands(model):
    cold, hot = (talk(model, "the company\n", "--temperature", t, "--seed", 7)[0] for t in (0, 3))
    lines = ["/set temperature 0", "the company", "/reset", "/set temperature 3", "/set seed 7", "the company"]
    assert talk(model, "\n".join(lines))[0] == cold + hot
    assert talk(model, "the company\n/quit \nthe company\n", "--temperature", 0)[0].rstrip("\n") == cold.rstrip("\n")
    out, err = talk(model, "/stats\nthe company\n/stats\n/reset\nthe company\n", "--temperature", 0)
    assert out == 2 * cold and len(re.findall(r"^[\d,.]+ tokens/s$", err, re.M)) == 1


@pytest.mark.parametrize("line, words", [
    ("/help", ["/set", "/reset", "/stats", "/quit"]),
    ("/sett temperature 1", ["/set NAME VALUE"]),
    ("/set", ["/set NAME VALUE"]),
    ("/set temperature", ["/set NAME VALUE"]),
    ("/set dim 5", ["/set NAME VALUE"]),
    ("/set num_samples 2", ["/set NAME VALUE"]),
    ("/set temperature hot", ["--temperature", "'hot'"]),
    ("/set top_p 2", ["--top_p", "at most 1"]),
])  # fmt: skip
def test_commands_that_are_none(word_model, line, words):
    out, err = talk(word_model, f"{line}\nthe company\n")
    assert all(word in err for word in words) and "Traceback" not in err
    assert out == talk(word_model, "the company\n")[0], "nothing else happened"


def test_words_never_seen(word_model):
    out, err = talk(word_model, "the zebra of Zürich\n")
    assert err.splitlines()[1] == "Not in the vocabulary, read as <unk>: zebra Zürich"
    assert out.strip()
    assert talk(word_model, "the ape of Ulm\n")[0] == out, "both are <unk>"


def test_only_words_never_seen(word_model):
    assert talk(word_model, "zebra\n")[0].strip()


@pytest.mark.parametrize("prompt", ["the company of the fox " * 500, "x" * 20000], ids=["words", "letters"])
def test_prompt_beyond_the_context(model, prompt):
    assert talk(model, prompt + "\n")[0].strip()


@pytest.mark.parametrize(
    "prompt", ["\udcff\udcfe", "the \udcff company\udce2\udc82", "\0\x1b[31m\x0c\x85 fox", "\ufeffthe"], ids=ascii
)
def test_odd_bytes(model, prompt):
    out, err = talk(model, f"{prompt}\n/reset\nthe company\n")
    assert out.endswith(talk(model, "the company\n")[0]) and "Traceback" not in err


def test_two_files_are_enough(model, tmp_path):
    for kind in ("safetensors", "metadata"):
        shutil.copy(model / f"{ids(model)[0]}.{kind}", tmp_path)
    assert talk(tmp_path, "the company\n") == talk(model, "the company\n")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".metadata", ".safetensors"], "nothing is left there"


def test_identifier(word_model):
    name = talk(word_model, "")[1].split(",")[0]
    for identifier in (name, "latest", ids(word_model)[0][:7]):
        assert talk(word_model, "the\n", "--identifier", identifier) == talk(word_model, "the\n")


def test_seed_and_temperature(model):
    hot = ["--temperature", 1, "--max_tokens", 50]
    first = talk(model, "the company\n", *hot)
    assert talk(model, "the company\n", *hot) == first, "the same seed gives the same text"
    assert talk(model, "the company\n", *hot, "--seed", 1) != first
    cold = [talk(model, "the company\n", "--temperature", 0, "--seed", seed)[0] for seed in (1, 2)]
    assert cold[0] == cold[1] == talk(model, "the company\n", "--top_k", 1)[0]


@pytest.mark.parametrize("count", [1, 7, 30])
def test_max_tokens(word_model, count):
    assert count_tokens(word_model, talk(word_model, "the company\n", "--max_tokens", count)[0]) == count + 1


def test_text_comes_before_the_reply_is_over(model):
    process = start(
        "--inference", "--save_dir", model, "--max_tokens", 1000000,
        stdin=subprocess.PIPE, errors="replace", env={"PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    process.stdin.write("the company\n")
    process.stdin.flush()
    assert process.stdout.read(20).strip() and process.poll() is None
    process.kill()
    process.communicate()


# ---- One prompt -----------------------------------------------------------------------------------------------------


def test_prompt(model):
    out, err = run("--prompt", "the company", "--save_dir", model)
    assert out.rstrip("\n") == talk(model, "the company\n")[0].rstrip("\n") != ""
    assert ids(model)[0][:12] in err and "tokens/s" in err
    assert run("--prompt", "", "--save_dir", model)[0].strip()


def test_samples_of_a_prompt(model):
    line = ["--prompt", "the company", "--save_dir", model, "--temperature", 3, "--max_tokens", 20]
    samples = run(*line, "--num_samples", 3, "--seed", 5)[0].split("-" * 15 + "\n")
    assert samples == [run(*line, "--seed", seed)[0] for seed in (5, 6, 7)] and len(set(samples)) == 3


# ---- In a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """The program in a terminal of its own; what it shows is kept, without escape sequences and carriage returns."""

    def __init__(self, *arguments):
        self.seen = ""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, str(ROOT / "main.py"), *map(str, arguments)])
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))

    def read(self):
        """Collects what comes next; False once the program has closed the terminal."""
        assert select.select([self.terminal], [], [], 60)[0], f"nothing more came: {self.seen!r}"
        try:
            data = os.read(self.terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            data = b""
        self.seen = re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", self.seen + data.decode("utf-8", "replace"))
        return data != b""

    def wait_for(self, pattern):
        """What is shown up to where `pattern` matches; it is forgotten afterwards."""
        while not re.search(pattern, self.seen):
            assert self.read(), f"{pattern!r} never came: {self.seen!r}"
        seen, self.seen = self.seen, ""
        assert "Traceback" not in seen, seen
        return seen

    def type(self, keys):
        os.write(self.terminal, keys.encode())

    def leave(self, key):
        """Types `key` at the prompt until the program leaves; returns its exit status. Python's input() overlooks a
        Ctrl+C in the instant between showing something and waiting for a key, which no person is quick enough for."""
        time.sleep(0.3)
        self.type(key)
        while self.is_open(10):
            self.type(key)
        assert "Traceback" not in self.seen and "Error" not in self.seen, self.seen
        os.close(self.terminal)
        self.pid, pid = 0, self.pid
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def is_open(self, seconds):
        """Collects what comes until nothing does for so long, or until the program has left."""
        while select.select([self.terminal], [], [], seconds)[0]:
            if not self.read():
                return False
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


PROMPT = r"(^|\n)> $"
LEAVE = {"Ctrl+C": "\x03", "Ctrl+D": "\x04"}


@pytest.mark.parametrize("key", LEAVE)
def test_session_in_a_terminal(word_model, key):
    with Terminal("--inference", "--save_dir", word_model, "--max_tokens", 9) as terminal:
        assert "iteration 100, " in terminal.wait_for(PROMPT)
        for prompt in ("the company", "", "the zebra"):
            terminal.type(prompt + "\n")
            echo, reply = re.split(r"\n", terminal.wait_for(PROMPT), maxsplit=1)
            assert echo == prompt and reply.removesuffix("> ").strip()
            assert ("Not in the vocabulary" in reply) == ("zebra" in prompt)
        assert terminal.leave(LEAVE[key]) == 0


@pytest.mark.parametrize("key", LEAVE)
def test_leaving_at_once(byte_model, key):
    with Terminal("--inference", "--save_dir", byte_model) as terminal:
        terminal.wait_for(PROMPT)
        assert terminal.leave(LEAVE[key]) == 0


def test_ctrl_c_ends_the_reply_and_then_the_session(model):
    with Terminal("--inference", "--save_dir", model, "--max_tokens", 100000) as terminal:
        terminal.wait_for(PROMPT)
        for _ in range(3):
            terminal.type("the company\n")
            terminal.wait_for(r"the company\n(.|\n){40}")  # the reply has begun
            terminal.type(LEAVE["Ctrl+C"])
            terminal.wait_for(PROMPT)
        terminal.type("of")
        assert terminal.leave(LEAVE["Ctrl+C"]) == 0, "in the middle of a line"
