"""Talking to a checkpoint: from a pipe and in a terminal.

With no corpus at hand, whatever is typed.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import time

import pexpect
from conftest import MAIN, WORDS, ids, run, run_folder, start
from forkserver import default_signals


def talk(folder, prompts, *arguments):
    """stdout and stderr of a session in which `prompts` come from a pipe."""
    return run("--inference", "--save_dir", folder, *arguments, input=prompts)


def replies_of(folder, prompts, *arguments):
    """What such a session says on stdout."""
    out, _ = talk(folder, prompts, *arguments)
    return out


# From a pipe


def test_reply(model):
    out, err = talk(model, "the company\n")
    assert "the company" not in out[:11], "the continuation, not the prompt"
    prefix = ids(model)[0][:12]
    name = run_folder(model).name
    assert re.fullmatch("text-[0-9a-f]{8}", name)
    assert err.startswith(f"{name}, iteration 100, checkpoint {prefix}, in {model}\n")
    known = set(re.findall(r"\w+", out)) & set(WORDS)
    assert len(known) >= 2, "it has learnt a little"
    alone, err = run("--prompt", "the company", "--save_dir", model)
    assert alone.rstrip("\n") == out.rstrip("\n")
    assert "tokens/s" in err
    assert run("--prompt", "", "--save_dir", model)[0].strip()


def test_each_line_gets_a_reply(word_model):
    """Of five words each, with a line end behind them; the last line typed has none."""
    prompts = ["the company", "", "a lazy", "  fox  ", "the company"]
    out, err = talk(word_model, "\n".join(prompts), "--max_tokens", 5)
    end = replies_of(word_model, "")  # what ends a session
    replies = out.removesuffix(end)
    assert len(replies.split()) + replies.count("\n") == len(prompts) * (5 + 1)
    assert "<unk>" not in err
    assert out.startswith(replies_of(word_model, prompts[0], "--max_tokens", 5))


def test_a_prompt_beyond_the_context_is_said(byte_model):
    _, err = run("--prompt", "x" * 500, "--save_dir", byte_model, "--max_tokens", 1)
    assert "The prompt's 500 tokens are more than the context" in err
    _, err = run("--prompt", "x" * 8, "--save_dir", byte_model, "--max_tokens", 1)
    assert "context" not in err


def test_a_prompt_names_no_file(byte_model):
    """As it does in nanoGPT: what is continued is said."""
    line = ["--save_dir", byte_model, "--max_tokens", 1]
    said = 'The prompt is this text itself; for a file\'s: --prompt "$(cat FILE)"\n'
    assert said in run("--prompt", "FILE:a.txt", *line)[1]
    assert said not in run("--prompt", "a FILE:", *line)[1]


def test_commands(byte_model):
    """What was said before counts until /reset; other lines with a slash are text."""
    hot = ["--temperature", 3, "--max_tokens", 30]
    first = replies_of(byte_model, "the company\n", *hot)
    continued = replies_of(byte_model, "the company\nthe company\n", *hot)
    assert continued.startswith(first) and continued != 2 * first
    lines = "/fo\x1b[2Jo\n/reset\nthe company\n/reset \nthe company\n/quit \nthe company\n"
    out, _ = talk(byte_model, lines, *hot)
    assert out == replies_of(byte_model, "/fo\x1b[2Jo\n", *hot) + 2 * first


ODD = [
    "x" * 20000,  # beyond the context
    "",
    "\udcff\udcfe",
    "the \udcff company\udce2\udc82",
    "\0\x1b[31m\x0c\x85 fox",
    "\ufeffthe",
]


def test_odd_bytes(model):
    short = ["--max_tokens", 20]
    lines = "".join(f"{prompt}\n" for prompt in ODD)
    out, err = talk(model, f"{lines}/reset\nthe company\n", *short)
    assert out.endswith(replies_of(model, "the company\n", *short))
    assert "Traceback" not in err


def test_two_files_are_enough(word_model, tmp_path):
    """In a folder with any name that a run may have."""
    copy = tmp_path / "from-a-friend"
    copy.mkdir()
    stem = ids(word_model)[0]
    for kind in ("safetensors", "metadata"):
        shutil.copy(run_folder(word_model) / f"{stem}.{kind}", copy)
    out, err = talk(tmp_path, "the company\n")
    assert out == replies_of(word_model, "the company\n")
    assert err == f"from-a-friend, iteration 100, checkpoint {stem[:12]}, in {tmp_path}\n"
    left = sorted(path.suffix for path in copy.iterdir())
    assert left == [".metadata", ".safetensors"], "nothing is left there"


def test_text_comes_before_the_reply_is_over(byte_model):
    arguments = ["--inference", "--save_dir", byte_model, "--max_tokens", 1000000]
    process = start(*arguments, stdin=subprocess.PIPE, errors="replace")
    process.stdin.write("the company\n")
    process.stdin.flush()
    assert process.stdout.read(20).strip()
    assert process.poll() is None
    process.kill()
    process.communicate()


# One prompt


def test_samples_of_a_prompt(word_model):
    hot = ["--temperature", 3, "--max_tokens", 20]
    line = ["--prompt", "the company", "--save_dir", word_model, *hot]
    out, _ = run(*line, "--num_samples", 3, "--seed", 5)
    samples = out.split("-" * 15 + "\n")
    assert samples == [run(*line, "--seed", seed)[0] for seed in (5, 6, 7)]
    assert len(set(samples)) == 3


# In a terminal


class Terminal(pexpect.spawn):
    """The program in a terminal of its own; `logfile_read` has all that it shows."""

    def __init__(self, *arguments):
        super().__init__(
            sys.executable,
            [str(MAIN), *map(str, arguments)],
            env=os.environ | {"TERM": "xterm"},
            dimensions=(24, 100),
            timeout=60,
            encoding="utf-8",
            codec_errors="replace",
            preexec_fn=default_signals,
        )
        self.logfile_read = io.StringIO()
        self.delaybeforesend = None
        self.ptyproc.delayafterclose = 0

    def wait_for(self, pattern):
        """What is shown up to where `pattern` matches, without escape sequences and CRs."""
        self.expect(pattern)
        seen = re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", self.before + self.after)
        assert "Traceback" not in seen, seen
        return seen

    def leave(self, key):
        """Types `key` at the prompt until the program leaves; returns its exit status.

        Python's input() overlooks a Ctrl+C in the instant between showing something and waiting
        for a key, which no person is quick enough for.
        """
        time.sleep(0.3)
        self.send(key)
        while self.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=10):
            self.send(key)
        assert not re.search("Traceback|Error", self.before), self.before
        return self.wait()


PROMPT = r"(^|\n|\[\?2004h)> $"  # readline first turns on what a terminal calls bracketed paste
CTRL_C = "\x03"
CTRL_D = "\x04"


def test_session_in_a_terminal(word_model):
    with Terminal("--inference", "--save_dir", word_model, "--max_tokens", 9) as terminal:
        assert "iteration 100, " in terminal.wait_for(PROMPT)
        for prompt in ("the company", "", "the zebra"):
            terminal.send(prompt + "\n")
            shown = terminal.wait_for(PROMPT)
            echo, reply = shown.split("\n", maxsplit=1)
            assert echo == prompt
            assert reply.removesuffix("> ").strip()
            is_warned = "Not in the vocabulary" in reply
            assert is_warned == ("zebra" in prompt)
        assert terminal.leave(CTRL_D) == 0


def test_a_terminal_shows_the_prompt_before_its_continuation(word_model):
    """Where it is piped, or cut at --stop, only what is new."""
    line = ["--prompt", "the company", "--max_tokens", 3, "--save_dir", word_model]
    piped, _ = run(*line)
    for more, begin in (([], "the company"), (["--stop", "?"], "")):
        with Terminal(*line, *more) as terminal:
            assert f"\n{begin}{piped}" in terminal.wait_for("tokens/s")


def test_ctrl_c_ends_the_reply_and_then_the_session(byte_model):
    with Terminal("--inference", "--save_dir", byte_model, "--max_tokens", 100000) as terminal:
        terminal.wait_for(PROMPT)
        for _ in range(10):  # one in thirty was lost once
            terminal.send("the\n")
            terminal.wait_for(r"the\r\n.{40}")  # the reply has begun
            terminal.send(CTRL_C)
            rest = terminal.wait_for(PROMPT)
            assert len(rest) < 50_000, "a reply of 100,000 tokens is longer"
        terminal.send("of")
        assert terminal.leave(CTRL_C) == 0, "in the middle of a line"


def test_control_characters_do_not_reach_a_terminal(line, text, tmp_path):
    """What a model has learnt is a stranger's text. Windows' line ends are none of them."""
    text.write_bytes(b"a\x1b]0;owned\x07\r\n" * 400)
    line += ["--sample_tokens", 0, "--num_iters", 60]
    run(*line, "--learning_rate", 0.03, "--lr_warmup", 0)
    sample = ["--prompt", "a", "--max_tokens", 20, "--save_dir", tmp_path]
    assert "\x1b]0;owned\x07\n" in run(*sample)[0], "as it is, but for a terminal"
    with Terminal(*sample) as terminal:
        assert "\ufffd]0;owned\ufffd\n" in terminal.wait_for("tokens/s")
