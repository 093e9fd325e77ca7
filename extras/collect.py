"""A corpus from a teacher behind an API.

    python -m extras.collect --distill_from URL --teacher_model NAME --teacher_prompts FILE \\
        --output DIR
    python -m extras.collect --distill_from URL --teacher_model NAME --dataset tinystories \\
        --output DIR    prompts from the text itself

Sequence-level distillation (Kim & Rush 2016): a small model is trained on what a large one writes.
The answers to a list of prompts are saved as they arrive, so an interrupted collection resumes
where it stopped and requests no saved answer again. The key is read from TEACHER_API_KEY; for Groq,
also from GROQ_API_KEY.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import make_parser, read_flags, start

import os
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from main import load_data
from support.cli import RunError, UsageError, explain_errors, one_line, utf8
from support.files import atomic_write
from support.flags import Flag, nonempty, number, path_name
from extras.features.prompt_files import append_lines, json_line, read_prompt_lines

TIMEOUT = 120  # seconds to wait for the server's next byte
# A server; the key that some put before its name comes from the environment.
ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#\s]*)?")
PROMPT_LENGTH = 100  # characters of a prompt from a text, about
# What JSON of another form raises, or a server that fails (of requests: all are OSErrors).
FAULTS = (OSError, ValueError, LookupError, TypeError, RecursionError)


def main(arguments):
    """Collects a corpus as these arguments specify."""
    of_text = ["dataset", "text", "text_field", "valid_text", "valid_fraction"]
    program_flags = {
        "distill_from": Flag(
            None, nonempty, "URL of a server with OpenAI's chat completions API", required=True
        ),
        "teacher_model": Flag(None, nonempty, "the server's model", required=True),
        "output": Flag(None, path_name, "folder for answers.jsonl and corpus.txt", required=True),
        "teacher_prompts": Flag(None, path_name, "a prompt per line (default: from a text)"),
        "num_prompts": Flag(
            1000, number(int, 1), "from evenly spaced places of the text, without --teacher_prompts"
        ),
    }
    parser = make_parser("collect", __doc__, *of_text, "data_dir", "mirror", **program_flags)
    flags = read_flags(parser, arguments)
    teacher = Teacher(flags.distill_from, flags.teacher_model)
    if flags.teacher_prompts:
        prompts = read_prompts(flags.teacher_prompts)
    else:
        prompts = take_prompts(flags)
    collect_answers(teacher, prompts, Path(flags.output))


def take_prompts(flags):
    """Beginnings of lines at evenly spaced places of a training text, a list."""
    flags.tokenizer = "byte"
    dataset = load_data(flags)
    tokens = dataset.train.tokens
    prompts = []
    for place in np.linspace(0, len(tokens), flags.num_prompts, endpoint=False).astype(int):
        text = dataset.tokenizer.decode(tokens[place : place + 10 * PROMPT_LENGTH])
        _, _, lines = text.partition("\n")
        begin = (lines or text).strip()[:PROMPT_LENGTH]
        words, _, _ = begin.rpartition(" ")
        prompts.append(words or begin)
    return [*dict.fromkeys(filter(None, prompts))]


def read_prompts(path):
    """The prompts in a file: its lines."""
    with explain_errors(f"--teacher_prompts {path} must be a UTF-8 file", OSError, ValueError):
        prompts = [line for line in read_prompt_lines(path) if line.strip()]
        if not prompts:
            raise ValueError("it has no prompt")
        return prompts


def collect_answers(teacher, prompts, folder):
    """Saves a teacher's answers to prompts in a folder.

    Each becomes a line of JSON (prompt, model, completion) in its answers.jsonl; at the end, all
    prompts and answers are written to its corpus.txt, for --text. Raises UsageError if the folder
    cannot be used, or if answers.jsonl holds other lines or is being written by another process;
    RunError if one of its lines is damaged, or if the server does not answer.
    """
    path = folder / "answers.jsonl"
    corpus = folder / "corpus.txt"
    if os.path.lexists(corpus) and not path.exists():
        raise UsageError(f"{corpus} is not of this program: name another --output")
    jobs = [{"prompt": prompt, "model": teacher.model} for prompt in prompts]
    with explain_errors(f"cannot write to --output {folder}: name a folder of yours", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        out, answers = append_lines(path, jobs)
    with out:
        for job in jobs[len(answers) :]:
            fault = f"{teacher.url} gives no answer; {len(answers):,} answers are kept"
            with explain_errors(f"{fault}: rerun to continue", RunError, raises=RunError):
                completion = teacher.answer(job["prompt"])
            answers.append(job | {"completion": completion})
            out.write(json_line(answers[-1]))
            out.flush()  # so that no answer that was paid for is lost
    texts = [f"{answer['prompt']}\n{answer['completion']}\n" for answer in answers]
    with atomic_write(corpus) as file:
        file.write(utf8("".join(texts)).encode())
    print(f"{len(answers):,} answers are in {path}; train on them with --text {corpus}")


class Teacher:
    """A model on a server with OpenAI's chat completions API.

    The key in TEACHER_API_KEY is sent to this server alone, and neither shown nor saved. Raises
    UsageError if the address cannot be used in a request.
    """

    def __init__(self, url, model):
        self.url = url
        self.model = model
        self.retry_after = 0  # seconds that the server has asked to wait
        remedy = "an address like http://localhost:8000/v1; the key comes from TEACHER_API_KEY"
        with explain_errors(f"--distill_from: give {remedy}", ValueError):
            parts = urlsplit(url)
            if not ADDRESS.fullmatch(url) or parts.port == 0:  # `port` raises ValueError, too
                raise ValueError("it is no such address")
        key = os.environ.get("TEACHER_API_KEY", "")
        if parts.hostname == "api.groq.com":
            key = key or os.environ.get("GROQ_API_KEY", "")
        # No header can hold a line end, with which a file of a key may end.
        self.key = "".join(key.split())
        if not self.key.isascii():
            raise UsageError("TEACHER_API_KEY has characters that no key has: copy it again")

    def answer(self, prompt):
        """The answer to a prompt, in three tries."""
        for pause in (1, 4, None):
            try:
                return self.request(prompt)
            except FAULTS as error:
                reason = f"{type(error).__name__}: {error}"
            if self.key:  # which the server may echo
                reason = reason.replace(self.key, "***")
            reason = one_line(reason[:240])
            if pause is None:
                raise RunError(reason)
            pause = max(pause, self.retry_after)
            print(f"{reason}; retrying in {pause} s")
            time.sleep(pause)

    def request(self, prompt):
        """Sends a prompt once; returns the answer.

        Raises UsageError for a key that the server refuses; ValueError, LookupError, or what
        Requests raises if the answer has no text.
        """
        import requests

        response = requests.post(
            f"{self.url.rstrip('/')}/chat/completions",
            json={"model": self.model, "messages": [{"role": "user", "content": prompt}]},
            auth=self.authorize,
            timeout=TIMEOUT,
            allow_redirects=False,  # to where the key does not belong
        )
        seconds = response.headers.get("Retry-After", "")  # or a date
        self.retry_after = min(int(seconds), TIMEOUT) if seconds.isdecimal() else 0
        if response.status_code in (401, 403):  # another try would not help
            fault = "refuses the key" if self.key else "wants a key"
            raise UsageError(
                f"{self.url} {fault} (status {response.status_code}): set TEACHER_API_KEY in the "
                "environment (no .env is read)"
            )
        if response.status_code != 200:
            reason = response.content.decode("utf-8", "replace")
            raise ValueError(f"status {response.status_code}: {reason}")
        text = response.json()["choices"][0]["message"]["content"]
        if not isinstance(text, str) or not text.strip():  # one may think up to its limit
            raise ValueError("the answer has no text: ask another model, or leave the prompt out")
        return utf8(text)  # a limit of tokens may have split a character

    def authorize(self, request):
        """Adds the key to a request; ~/.netrc would replace one among the headers of `post`."""
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


if __name__ == "__main__":
    start("collect", main)
