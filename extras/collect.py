"""A corpus from a teacher behind an API: `python datasets.py --distill_from URL ...`.

Sequence-level distillation (Kim & Rush 2016): a small model is trained on what a large one writes.
The answers to a list of prompts are saved as they arrive, so an interrupted collection resumes
where it stopped and requests no saved answer again.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from datasets import RunError, UsageError, explained, utf8
from extras.results import append_lines, json_line, write_whole

PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds between the attempts for one prompt
# The files of --output.
ANSWERS = "answers.jsonl"
CORPUS = "corpus.txt"
# Statuses below 500 that are worth another attempt: timeouts, conflicts, rate limits.
TEMPORARY = (408, 409, 425, 429)


def collect(flags):
    """Collects a corpus as the flags of datasets.py specify. Raises UsageError or RunError."""
    source, folder = Path(flags.teacher_prompts), Path(flags.output)
    for path in (folder / ANSWERS, folder / CORPUS):
        if path.exists() and source.exists() and path.samefile(source):
            raise UsageError(
                f"--teacher_prompts {flags.teacher_prompts} is a file that --output {folder} "
                "writes: name another --output"
            )
    prompts = read_prompts(source)
    collect_answers(flags.distill_from, flags.teacher_model, prompts, folder, flags.max_requests)


def read_prompts(path):
    """The prompts in a file: its lines or, for a .jsonl, the texts that a model has started.

    A .jsonl is written by main.py --prompts_file. Each of its prompts is joined with the
    completion, so the teacher continues what the student has written. Raises UsageError.
    """
    is_jsonl = str(path).endswith(".jsonl")
    content = "hold what main.py --prompts_file writes, or not be named .jsonl"
    fault = f"--teacher_prompts {path} must {content if is_jsonl else 'be a UTF-8 file'}"
    with explained(fault, OSError, ValueError, LookupError, TypeError):
        text = Path(path).read_text("utf-8")
        if not text:
            raise ValueError("it is empty")
        lines = text.removesuffix("\n").split("\n")  # splitlines would also split at \f
        if not is_jsonl:
            return lines
        answers = [json.loads(line) for line in lines]
        return [answer["prompt"] + answer["completion"] for answer in answers]


def collect_answers(url, model, prompts, folder, max_requests=1000, timeout=120, say=print):
    """Collects answers of `model` from a server with OpenAI's chat completions API.

    Each answer becomes a line of JSON (prompt, model, completion) in folder/answers.jsonl; at the
    end, all prompts and answers are written to folder/corpus.txt, for --text. At most
    `max_requests` requests are made; the next call resumes. The key (see find_key) is never written
    anywhere. timeout: seconds to wait for the server's next byte.

    Raises UsageError if the address or the key cannot be used, or if answers.jsonl holds other
    lines or is being written by another process; RunError if one of its lines is damaged, or if
    the server does not answer.
    """
    teacher = Teacher(url, model, max_requests, timeout, say)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS
    heads = [{"prompt": prompt, "model": model} for prompt in prompts]
    out, lines = append_lines(path, heads)
    with out:
        for head in heads[len(lines) :]:
            completion = teacher.answer(head["prompt"], num_answered=len(lines))
            line = json_line(head | {"completion": completion})
            out.write(line + b"\n")
            out.flush()  # so that no answer that was paid for is lost
            lines.append(line)
        corpus = folder / CORPUS
        write_corpus(lines, corpus)
    say(f"{len(lines):,} answers are in {path}; train on them with --text {corpus}")


def write_corpus(lines, path):
    """Writes the prompts and completions of JSON lines as plain text."""
    texts = []
    for line in lines:
        answer = json.loads(line)
        texts.append(f"{answer['prompt']}\n{answer['completion']}\n")
    write_whole(path, utf8("".join(texts)))


class Reply(NamedTuple):
    """The outcome of one request: the text of an answer, or the reason why there is none."""

    text: str | None
    reason: str = ""
    is_temporary: bool = True  # whether another attempt may help
    wait: int = 0  # seconds until then, if the server asks for a delay


# The environment variables that hold the keys for these hosts and their subdomains.
KEYS = {"openai.com": "OPENAI_API_KEY", "groq.com": "GROQ_API_KEY"}


def find_key(url):
    """The environment variable for a server's key, and the key: (variable, key or "").

    TEACHER_API_KEY is for any server, those in KEYS only for their owners' servers.
    """
    key = os.environ.get("TEACHER_API_KEY")
    if key:
        return "TEACHER_API_KEY", key
    host = ""
    with contextlib.suppress(ValueError):  # `check` reports what is wrong with the address
        host = urlsplit(url).hostname or ""
    for owner, variable in KEYS.items():
        if f".{host}".endswith(f".{owner}"):
            return variable, os.environ.get(variable, "")
    return "TEACHER_API_KEY", ""


class Teacher:
    """A model on a server, with a count of the requests sent to it.

    Raises UsageError if the address or the key cannot be used in a request.
    """

    def __init__(self, url, model, max_requests, timeout, say):
        self.url = url
        self.address = f"{url.rstrip('/')}/chat/completions"
        self.model = model
        self.max_requests = max_requests
        self.timeout = timeout
        self.say = say
        self.sent = 0
        self.key_name, self.key = find_key(url)
        self.check()

    def check(self):
        """Raises UsageError if the address or the key cannot be used in a request."""
        import requests

        # requests would take the `localhost` in `localhost:8000` for a scheme.
        if not self.url.lower().startswith(("http://", "https://")):
            raise UsageError(
                f"--distill_from {self.url}: give the address with http:// or https://"
            )
        with explained(f"--distill_from {self.url} is not a valid address", ValueError):
            requests.Request("POST", self.address).prepare()
        if not (self.key.isascii() and self.key.isprintable()):
            # The message leaves out the key, which is never written anywhere.
            raise UsageError(
                f"{self.key_name} holds a line end or another character that no header can hold: "
                "set it to the key alone"
            )

    def answer(self, prompt, num_answered):
        """The answer to a prompt, in as many attempts as it takes and PAUSES allows.

        Raises RunError, which says that the `num_answered` answers so far are kept.
        """
        for pause in (*PAUSES, None):
            if self.sent >= self.max_requests:
                raise RunError(
                    f"stopped after {self.max_requests} requests (--max_requests), "
                    f"{num_answered} prompts answered: rerun to continue"
                )
            self.sent += 1
            reply = self.request(prompt)
            if reply.text is not None:
                return reply.text
            if pause is None or not reply.is_temporary:
                break
            seconds = max(pause, reply.wait)
            self.say(f"{reply.reason}; retrying in {seconds:g} s")
            time.sleep(seconds)
        remedy = "rerun to continue"
        if not reply.is_temporary:
            remedy = f"check the address, key, --teacher_model and prompt, then {remedy}"
        raise RunError(
            f"{self.url} does not answer prompt {num_answered + 1:,} ({reply.reason}); "
            f"{num_answered:,} answers are kept: {remedy}"
        )

    def request(self, prompt):
        """Sends a prompt once and returns the Reply."""
        import requests

        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        try:
            response = requests.post(
                self.address, json=body, auth=self.authorize, timeout=self.timeout
            )
        except (requests.RequestException, ValueError) as error:
            reason = self.masked(f"{type(error).__name__}: {error}")
            # Retrying does not help with an invalid header or address (ours or a redirect's).
            is_final = isinstance(error, (ValueError, requests.TooManyRedirects))
            return Reply(None, reason, is_temporary=not is_final)
        wait = 0
        try:
            wait = seconds_asked_for(response)
            status = response.status_code
            if status == 200:
                content = response.json()["choices"][0]["message"]["content"] or ""
                if not isinstance(content, str):
                    raise TypeError("its content is not a string")
                return Reply(utf8(content))  # a token limit may have split a character
            reason = self.masked(f"status {status}: {response.text}")
            return Reply(None, reason, status >= 500 or status in TEMPORARY, wait)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            reason = self.masked(f"{type(error).__name__}: {error}")
            return Reply(None, reason, wait=wait)

    def authorize(self, request):
        """Adds the key to a request; ~/.netrc would replace one among the headers of `post`."""
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def masked(self, reason):
        """`reason` on one line of at most 240 characters, without the key."""
        # A server may echo the key. Mask it before truncating, which might leave a part of it.
        if self.key:
            reason = reason.replace(self.key, "***")
        return " ".join(reason[:240].split())


def seconds_asked_for(response):
    """The seconds in a response's Retry-After, up to ten minutes; 0 if it has none."""
    asked = response.headers.get("Retry-After", "")
    return min(int(asked), 600) if asked.isdigit() else 0
