"""A corpus from a teacher behind an API.

    python -m extras.collect --distill_from URL --teacher_model NAME --teacher_prompts FILE \\
        --output DIR [--max_requests N]

Sequence-level distillation (Kim & Rush 2016): a small model is trained on what a large one writes.
The answers to a list of prompts are saved as they arrive, so an interrupted collection resumes
where it stopped and requests no saved answer again.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from datasets import (
    SIZE,
    Parser,
    RunError,
    UsageError,
    close_redirect,
    explained,
    one_line,
    repair_streams,
    run_command,
    path_name,
    word,
    utf8,
)
from extras.results import append_lines, json_line, read_prompt_lines, write_whole

PAUSES = (1, 2, 4, 8, 16, 32, 60)  # seconds between the attempts for one prompt
LONGEST_WAIT = 900  # seconds for a whole answer, from a server that never quite stalls
LARGEST_ANSWER = 4 << 20  # bytes: a million tokens
# The files of --output.
ANSWERS = "answers.jsonl"
CORPUS = "corpus.txt"
# Statuses below 500 that are worth another attempt: timeouts, conflicts, rate limits.
TEMPORARY = (408, 409, 425, 429)


def make_parser():
    """The command-line parser of this file."""
    parser = Parser(
        prog="python -m extras.collect",
        description="Collects a corpus from a teacher behind an API.",
        epilog="The key is read from TEACHER_API_KEY, or, of these hosts, from OPENAI_API_KEY or "
        "GROQ_API_KEY.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--distill_from",
        metavar="URL",
        required=True,
        type=word,
        help="server with OpenAI's chat completions API",
    )
    add("--teacher_model", metavar="NAME", required=True, type=word, help="the server's model")
    add(
        "--teacher_prompts",
        metavar="FILE",
        required=True,
        type=path_name,
        help="one prompt per line, or the .jsonl that extras.batch wrote",
    )
    add(
        "--output",
        metavar="DIR",
        required=True,
        type=path_name,
        help="folder for answers.jsonl and corpus.txt",
    )
    add(
        "--max_requests",
        metavar="N",
        type=SIZE,
        default=1000,
        help="limit of this session (default: %(default)s)",
    )
    return parser


def main(arguments):
    """Collects a corpus as these arguments specify. Raises UsageError or RunError."""
    flags = make_parser().parse_args(arguments)
    source = Path(flags.teacher_prompts)
    folder = Path(flags.output)
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

    A .jsonl is written by extras.batch. Each of its prompts is joined with the
    completion, so the teacher continues what the student has written. Raises UsageError.
    """
    is_jsonl = str(path).endswith(".jsonl")
    content = "hold what extras.batch writes, or not be named .jsonl"
    fault = f"--teacher_prompts {path} must {content if is_jsonl else 'be a UTF-8 file'}"
    with explained(fault, OSError, ValueError, LookupError, TypeError, RecursionError):
        lines = read_prompt_lines(path)
        if not is_jsonl:
            return lines
        return [read_prompt(line) for line in lines]


def read_prompt(line):
    """The prompt and the completion in a line of JSON, joined.

    Raises ValueError, LookupError, TypeError or RecursionError if there are none.
    """
    answer = json.loads(line)
    parts = [answer["prompt"], answer["completion"]]
    for part in parts:
        if not isinstance(part, str):
            raise TypeError("a prompt or completion is not a string")
    return "".join(parts)


@contextlib.contextmanager
def seconds_at_most(seconds):
    """Raises TimeoutError if the block takes longer. For the main thread, which gets the alarm."""

    def stop(*_):
        raise TimeoutError(f"no whole answer in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def collect_answers(url, model, prompts, folder, max_requests=1000, timeout=120, say=print):
    """Collects answers of `model` from a server with OpenAI's chat completions API.

    Each answer becomes a line of JSON (prompt, model, completion) in folder/answers.jsonl; at the
    end, all prompts and answers are written to folder/corpus.txt, for --text. At most
    `max_requests` requests are made; the next call resumes. The key (see find_key) is never written
    anywhere. timeout: seconds to wait for the server's next byte. For the main thread alone.

    Raises UsageError if the address, the key or the folder cannot be used, or if answers.jsonl
    holds other lines or is being written by another process; RunError if one of its lines is
    damaged, or if the server does not answer.
    """
    teacher = Teacher(url, model, max_requests, timeout, say)
    with explained(f"cannot write to --output {folder}: name a folder of yours", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS
    corpus = folder / CORPUS
    if corpus.is_dir():
        raise UsageError(f"{corpus} is a folder: name another --output")
    heads = [{"prompt": prompt, "model": model} for prompt in prompts]
    out, lines = append_lines(path, heads)
    with out:
        for head in heads[len(lines) :]:
            completion = teacher.answer(head["prompt"], num_answered=len(lines))
            line = json_line(head | {"completion": completion})
            out.write(line + b"\n")
            out.flush()  # so that no answer that was paid for is lost
            lines.append(line)
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


def find_key(address):
    """The environment variable for a server's key, and the key: (variable, key or "").

    address: as `check_address` returns it. TEACHER_API_KEY is for any server, those in KEYS only
    for their owners' servers.
    """
    key = os.environ.get("TEACHER_API_KEY")
    if key:
        return "TEACHER_API_KEY", key
    host = urlsplit(address).hostname
    for owner, variable in KEYS.items():
        if f".{host}".endswith(f".{owner}"):
            return variable, os.environ.get(variable, "")
    return "TEACHER_API_KEY", ""


def check_address(url):
    """The address for requests to the server `url`, exactly as it is sent.

    Raises UsageError unless everyone reads it alike: a key must reach no other host.
    """
    import requests

    # No message shows the address: a password in it would be shown, too.
    # requests would take the `localhost` in `localhost:8000` for a scheme.
    if not url.lower().startswith(("http://", "https://")):
        raise UsageError("--distill_from: give the address with http:// or https://")
    # Some parsers end the host at a backslash, and drop line ends and tabs.
    if "\\" in url or not url.isprintable():
        raise UsageError(
            "--distill_from holds a backslash or a control character: give the address without it"
        )
    if re.match("[^/]*//[^/?#]*@", url):
        raise UsageError(
            "--distill_from takes no name or password in the address: "
            "set TEACHER_API_KEY to the key"
        )
    try:
        address = requests.Request("POST", f"{url.rstrip('/')}/chat/completions").prepare().url
        parts = urlsplit(address)
    except ValueError:
        parts = None
    if parts is None or "@" in parts.netloc:
        raise UsageError(
            "--distill_from is not a valid address: give one like http://localhost:8000/v1"
        )
    return address


class Teacher:
    """A model on a server, with a count of the requests sent to it.

    Raises UsageError if the address or the key cannot be used in a request.
    """

    def __init__(self, url, model, max_requests, timeout, say):
        self.url = url
        self.address = check_address(url)
        self.model = model
        self.max_requests = max_requests
        self.timeout = timeout
        self.say = say
        self.sent = 0
        self.key_name, self.key = find_key(self.address)
        self.check_key()

    def check_key(self):
        """Raises UsageError if the key cannot be sent, or would be sent in clear text."""
        if not (self.key.isascii() and self.key.isprintable()):
            # The message leaves out the key, which is never written anywhere.
            raise UsageError(
                f"{self.key_name} holds a line end or another character that no header can hold: "
                "set it to the key alone"
            )
        # A TEACHER_API_KEY may be for a server in one's own network.
        is_owners = self.key_name in KEYS.values()
        if self.key and is_owners and not self.address.startswith("https:"):
            raise UsageError(
                f"--distill_from {self.url} would send {self.key_name} in clear text: "
                "give the address with https://"
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
            with seconds_at_most(LONGEST_WAIT), self.post(body) as response:
                content = read_answer(response)
        except (requests.RequestException, ValueError, OSError) as error:
            reason = self.masked(f"{type(error).__name__}: {error}")
            # Retrying does not help with an invalid header or address (ours or a redirect's).
            is_final = isinstance(error, (ValueError, requests.TooManyRedirects))
            return Reply(None, reason, is_temporary=not is_final)
        wait = seconds_asked_for(response)
        status = response.status_code
        if status != 200:
            reason = self.masked(f"status {status}: {content.decode(errors='replace')}")
            return Reply(None, reason, status >= 500 or status in TEMPORARY, wait)
        try:
            if len(content) > LARGEST_ANSWER:
                raise ValueError(f"it is larger than {LARGEST_ANSWER:,} bytes")
            text = json.loads(content)["choices"][0]["message"]["content"]
            if text is None:  # the model has said nothing
                text = ""
            if not isinstance(text, str):
                raise TypeError("its content is not a string")
            return Reply(utf8(self.without_key(text)))  # a limit may have split a character
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            reason = self.masked(f"{type(error).__name__}: {error}")
            return Reply(None, reason, wait=wait)

    def post(self, body):
        """The response to a request, whose body is not read yet."""
        import requests

        return requests.post(
            self.address,
            json=body,
            auth=self.authorize,
            timeout=self.timeout,
            hooks={"response": close_redirect},
            stream=True,
        )

    def authorize(self, request):
        """Adds the key to a request; ~/.netrc would replace one among the headers of `post`."""
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def masked(self, reason):
        """`reason` on one line of at most 240 characters, without the key."""
        # Mask the key before truncating, which might leave a part of it.
        return one_line(self.without_key(reason)[:240])

    def without_key(self, text):
        """What a server says, which may echo the key, with *** in its place."""
        return text.replace(self.key, "***") if self.key else text


def read_answer(response):
    """The body of a response, unpacked, of which a little more than LARGEST_ANSWER is read."""
    content = bytearray()
    for chunk in response.iter_content(1 << 16):
        content += chunk
        if len(content) > LARGEST_ANSWER:
            break
    return bytes(content)


def seconds_asked_for(response):
    """The seconds in a response's Retry-After, up to ten minutes; 0 if it has none."""
    asked = response.headers.get("Retry-After", "")
    return min(int(asked), 600) if re.fullmatch("[0-9]{1,9}", asked) else 0


if __name__ == "__main__":
    repair_streams()
    sys.exit(run_command("extras.collect", main, sys.argv[1:]))
