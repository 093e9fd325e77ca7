"""A corpus from a teacher behind an API: `python datasets.py --distill_from URL ...`.

Sequence-level distillation (Kim & Rush 2016): a small model is trained on what a large one writes.
The answers to a list of prompts are kept as they come, so an interrupted collection resumes where
it stopped, and no answer is paid for twice.
"""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from datasets import RunError, UsageError, explained, utf8

PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds between the attempts for one prompt
# The files of --output.
ANSWERS = "answers.jsonl"
CORPUS = "corpus.txt"
# Statuses below 500 that another attempt may turn into an answer: timeouts, conflicts, limits.
TEMPORARY = (408, 409, 425, 429)


def collect(flags):
    """Does what the flags of datasets.py ask for. Raises UsageError, RunError."""
    source, folder = Path(flags.teacher_prompts), Path(flags.output)
    for path in (folder / ANSWERS, folder / CORPUS):
        if path.exists() and source.exists() and path.samefile(source):
            raise UsageError(
                f"--teacher_prompts {flags.teacher_prompts} is a file that --output {folder} "
                "writes: name another --output"
            )
    prompts = read_prompts(source)
    distill(flags.distill_from, flags.teacher_model, prompts, folder, flags.max_requests)


def read_prompts(path):
    """The lines of a file; of a .jsonl that main.py's --prompts_file wrote, what a model began.

    That is each prompt with its completion: so the teacher goes on where a student's own
    continuations lead. Raises UsageError.
    """
    is_jsonl = str(path).endswith(".jsonl")
    content = "hold prompts and completions, as main.py --prompts_file writes them, or another name"
    fault = f"--teacher_prompts {path} must {content if is_jsonl else 'be a UTF-8 file'}"
    with explained(fault, OSError, ValueError, LookupError, TypeError):
        text = Path(path).read_text("utf-8")
        lines = text.removesuffix("\n").split("\n")  # splitlines would cut at \f, too
        if not is_jsonl:
            return lines
        answers = [json.loads(line) for line in lines]
        return [answer["prompt"] + answer["completion"] for answer in answers]


def distill(url, model, prompts, folder, most=1000, timeout=120, say=print):
    """Collects what `model`, at a server that speaks OpenAI's chat completions, answers.

    Each answer becomes a line of JSON (prompt, model, completion) in folder/answers.jsonl, and in
    the end all prompts and answers go to folder/corpus.txt, for --text. At most `most` requests
    are made; the next call resumes. The key, see find_key, is written nowhere.
    timeout: seconds without a byte from the server.

    Raises UsageError if the address or the key cannot be used, or answers.jsonl holds other lines
    or is written by another process; RunError if one of its lines is damaged, or if the server
    does not answer.
    """
    teacher = Teacher(url, model, most, timeout, say)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS
    heads = [{"prompt": prompt, "model": model} for prompt in prompts]
    out, lines = append_lines(path, heads)
    with out:
        for head in heads[len(lines) :]:
            completion = teacher.answer(head["prompt"], num_answered=len(lines))
            line = json.dumps(head | {"completion": completion}, ensure_ascii=False).encode()
            out.write(line + b"\n")
            out.flush()  # an answer that was paid for is not lost
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


def write_whole(path, text):
    """Writes a UTF-8 file; where a full disk or a kill prevents it, an old one stays as it was.

    What is no regular file, like /dev/stdout or a pipe, is written directly. Raises RunError.
    """
    with explained(f"cannot write {path}", OSError, kind=RunError):
        if os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_text(text, "utf-8")
            return
        target = os.path.realpath(path)  # a link stays one
        new = Path(f"{target}.new")
        try:
            with open(new, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()  # out of Python's buffer
                os.fsync(file.fileno())  # and out of the system's, before the old file is replaced
            os.replace(new, target)
        except OSError:
            new.unlink(missing_ok=True)
            raise


def append_lines(path, heads):
    """Opens a file of JSON lines to append to it: (file, the whole lines that it holds, as bytes).

    `heads` are the dicts that the lines have to begin with, in order, those still to be written
    included; "completion" follows in each line. A last line that a kill cut off is removed. The
    file is locked until it is closed, or its process ends.

    Raises UsageError if it is no regular file, holds other lines or is locked by another process,
    RunError if a line is damaged; the file stays as it is.
    """
    heads = [json.dumps(head, ensure_ascii=False).encode() for head in heads]
    # With the name that follows: `"max_tokens": 20` alone would be the beginning of 200, too.
    heads = [head.removesuffix(b"}") + b', "completion": ' for head in heads]
    out = open(path, "a+b")
    try:
        if not os.path.isfile(path):  # reading a device might never end
            raise UsageError(f"{path} is no regular file: name another --output")
        lock_file(out, path)
        out.seek(0)  # not before it is locked: what another process appends now would be missed
        *lines, cut_off = out.read().split(b"\n")
        if not are_ours(lines, cut_off, heads):
            raise UsageError(
                f"{path} holds other things than this command's answers (other prompts, another "
                "model or other sampling flags): name another --output"
            )
        check_lines(path, lines)
        out.truncate(out.tell() - len(cut_off))
    except Exception:
        out.close()
        raise
    return out, lines


def lock_file(file, path):
    """Locks an open file. Raises UsageError if another process has locked it."""
    try:
        # NB: raises BlockingIOError instead of waiting.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{path} is being written by another process: wait for it, or name another --output"
        ) from None


def check_lines(path, lines):
    """Raises RunError if one of a file's lines is no JSON with a completion."""
    for i, line in enumerate(lines, 1):
        fault = f"line {i:,} of {path} is damaged: mend it, or delete it and all that follow"
        with explained(fault, ValueError, RecursionError, kind=RunError):
            answer = json.loads(line.decode())
            if not isinstance(answer["completion"], str):
                raise ValueError("its completion is no text")


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


# The environment variables that hold keys for these hosts, and for those below them.
KEYS = {"openai.com": "OPENAI_API_KEY", "groq.com": "GROQ_API_KEY"}


def find_key(url):
    """The key for a server, and the environment variable that has it: (variable, key or "").

    TEACHER_API_KEY is for any server, those of KEYS for none but their owners'.
    """
    key = os.environ.get("TEACHER_API_KEY")
    if key:
        return "TEACHER_API_KEY", key
    host = ""
    with contextlib.suppress(ValueError):  # `check` says what is wrong with the address
        host = urlsplit(url).hostname or ""
    for owner, variable in KEYS.items():
        if f".{host}".endswith(f".{owner}"):
            return variable, os.environ.get(variable, "")
    return "TEACHER_API_KEY", ""


class Teacher:
    """A model at a server, and how many requests it has been sent.

    Raises UsageError if no request can be made of the address and the key.
    """

    def __init__(self, url, model, most, timeout, say):
        self.url = url
        self.address = f"{url.rstrip('/')}/chat/completions"
        self.model = model
        self.most = most
        self.timeout = timeout
        self.say = say
        self.sent = 0
        self.key_name, self.key = find_key(url)
        self.check()

    def check(self):
        """Raises UsageError if no request can be made of the address and the key."""
        import requests

        # requests takes `localhost:8000` for a scheme of its own.
        if not self.url.lower().startswith(("http://", "https://")):
            raise UsageError(
                f"--distill_from {self.url}: give the address with http:// or https://"
            )
        with explained(f"--distill_from {self.url} is no address: check it", ValueError):
            requests.Request("POST", self.address).prepare()
        if not (self.key.isascii() and self.key.isprintable()):
            # Without the key, which is written nowhere.
            raise UsageError(
                f"{self.key_name} holds a line end or another character that no header can hold: "
                "set it to the key alone"
            )

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

        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        headers = {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            response = requests.post(self.address, json=body, headers=headers, timeout=self.timeout)
        except (requests.RequestException, ValueError) as error:
            reason = self.masked(f"{type(error).__name__}: {error}")
            # An address, here or of a redirect, or a header that is none stays what it is.
            is_final = isinstance(error, (ValueError, requests.TooManyRedirects))
            return Reply(None, reason, is_temporary=not is_final)
        wait = 0
        try:
            wait = seconds_asked_for(response)
            status = response.status_code
            if status == 200:
                content = response.json()["choices"][0]["message"]["content"] or ""
                if not isinstance(content, str):
                    raise TypeError("its content is no text")
                return Reply(utf8(content))  # a limit of tokens may have cut a character in two
            reason = self.masked(f"status {status}: {response.text}")
            return Reply(None, reason, status >= 500 or status in TEMPORARY, wait)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
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
