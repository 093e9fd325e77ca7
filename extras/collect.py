"""A corpus from a teacher behind an API: `python datasets.py --distill_from URL ...`.

Sequence-level distillation (Kim & Rush 2016): a small model is trained on what a large one writes.
The answers to a list of prompts are kept as they come, so an interrupted collection resumes where
it stopped, and no answer is paid for twice.
"""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from datasets import RunError, UsageError, explained, utf8

PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds between the attempts for one prompt
# Statuses below 500 that another attempt may turn into an answer: timeouts, conflicts, limits.
TEMPORARY = (408, 409, 425, 429)


def collect(flags):
    """Does what the flags of datasets.py ask for. Raises UsageError, RunError."""
    fault = f"--teacher_prompts {flags.teacher_prompts} must be a UTF-8 file"
    with explained(fault, OSError, ValueError):
        text = Path(flags.teacher_prompts).read_text("utf-8")
    prompts = text.removesuffix("\n").split("\n")  # splitlines would cut at \f, too
    folder = Path(flags.output)
    distill(flags.distill_from, flags.teacher_model, prompts, folder, flags.max_requests)


def distill(url, model, prompts, folder, most=1000, timeout=120, say=print):
    """Collects what `model`, at a server that speaks OpenAI's chat completions, answers.

    Each answer becomes a line of JSON (prompt, model, completion) in folder/answers.jsonl, and in
    the end all prompts and answers go to folder/corpus.txt, for --text. At most `most` requests
    are made; the next call resumes. The key is read from TEACHER_API_KEY and written nowhere.
    timeout: seconds without a byte from the server.

    Raises UsageError if answers.jsonl holds other lines, RunError if the server does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "answers.jsonl"
    teacher = Teacher(url, model, most, timeout, say)
    heads = [{"prompt": prompt, "model": model} for prompt in prompts]
    out, lines = append_lines(path, heads)
    with out:
        for head in heads[len(lines) :]:
            completion = teacher.answer(head["prompt"], num_answered=len(lines))
            line = json.dumps(head | {"completion": completion}, ensure_ascii=False).encode()
            out.write(line + b"\n")
            out.flush()  # an answer that was paid for is not lost
            lines.append(line)
    corpus = folder / "corpus.txt"
    write_corpus(lines, corpus)
    say(f"{len(lines):,} answers are in {path}; train on them with --text {corpus}")


def write_corpus(lines, path):
    """Writes the prompts and completions of JSON lines as plain text."""
    texts = []
    for line in lines:
        answer = json.loads(line)
        texts.append(f"{answer['prompt']}\n{answer['completion']}\n")
    path.write_text("".join(texts), "utf-8")


def append_lines(path, heads):
    """Opens a file of JSON lines to append to it: (file, the whole lines that it holds, as bytes).

    `heads` are the dicts that the lines have to begin with, in order, those still to be written
    included. A last line that a kill cut off is removed. Raises UsageError, and leaves the file as
    it is, if it holds anything else.
    """
    heads = [json.dumps(head, ensure_ascii=False).encode() for head in heads]
    heads = [head.removesuffix(b"}") for head in heads]  # a line goes on after its head
    out = open(path, "a+b")
    out.seek(0)
    *lines, cut_off = out.read().split(b"\n")
    if not are_ours(lines, cut_off, heads):
        out.close()
        raise UsageError(
            f"{path} holds other things than this model's answers to these prompts: "
            "name another --output"
        )
    out.truncate(out.tell() - len(cut_off))
    return out, lines


def are_ours(lines, cut_off, heads):
    """Whether `lines`, and one that is `cut_off` (b"" if none is), begin with `heads`."""
    if len(lines) > len(heads):
        return False
    for line, head in zip(lines, heads):
        if not line.startswith(head):
            return False
    if not cut_off:
        return True
    if len(lines) == len(heads):
        return False  # nothing is left to be written
    head = heads[len(lines)]
    return cut_off.startswith(head) or head.startswith(cut_off)


class Reply(NamedTuple):
    """What one request brought: the text of an answer, or a reason why there is none."""

    text: str | None
    reason: str = ""
    is_temporary: bool = True  # whether another attempt may help
    wait: int = 0  # seconds until then that the server asks for


class Teacher:
    """A model at a server, and how many requests it has been sent."""

    def __init__(self, url, model, most, timeout, say):
        self.url = url
        self.model = model
        self.most = most
        self.timeout = timeout
        self.say = say
        self.sent = 0
        self.key = os.environ.get("TEACHER_API_KEY", "")

    def answer(self, prompt, num_answered):
        """The answer to a prompt, in as many attempts as it takes and PAUSES allow.

        Raises RunError, which says that `num_answered` answers before this one are kept.
        """
        for pause in (*PAUSES, None):
            if self.sent >= self.most:
                raise RunError(
                    f"{self.most} requests are made (the limit), {num_answered} prompts answered: "
                    "start again"
                )
            self.sent += 1
            reply = self.request(prompt)
            if reply.text is not None:
                return reply.text
            if pause is None or not reply.is_temporary:
                break
            self.say(f"{reply.reason}; once more in a moment")
            time.sleep(max(pause, reply.wait))
        raise RunError(
            f"{self.url} does not answer ({reply.reason}); {num_answered:,} answers are kept: "
            "start it again"
        )

    def request(self, prompt):
        """Sends a prompt once and returns the Reply."""
        import requests

        address = f"{self.url.rstrip('/')}/chat/completions"
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        headers = {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        wait = 0
        try:
            response = requests.post(address, json=body, headers=headers, timeout=self.timeout)
            wait = seconds_asked_for(response)
            status = response.status_code
            if status == 200:
                content = response.json()["choices"][0]["message"]["content"] or ""
                return Reply(utf8(content))  # a limit of tokens may have cut a character in two
            reason = self.masked(f"status {status}: {response.text}")
            return Reply(None, reason, status >= 500 or status in TEMPORARY, wait)
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            reason = self.masked(f"{type(error).__name__}: {error}")
            return Reply(None, reason, wait=wait)

    def masked(self, reason):
        """`reason` on one line of at most 240 characters, without the key."""
        # A server may repeat the key. It goes before the cut, which might leave a part of it.
        if self.key:
            reason = reason.replace(self.key, "***")
        return " ".join(reason[:240].split())


def seconds_asked_for(response):
    """What a response's Retry-After asks for, up to ten minutes; 0 if it names no seconds."""
    asked = response.headers.get("Retry-After", "")
    return min(int(asked), 600) if asked.isdigit() else 0
