"""The judge of extras.versus: scores checkpoints without the code that trained them.

A side's own code only turns tokens into logits, in a process of its own (extras/side.py). Which
tokens, their targets, the log-softmax and the sums are the judge's: an edit of the loss, of `score`
or of `evaluate` cannot move them. What a model may know of a text is tried out.
"""

import json
import math
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets import RunError, UsageError, one_line, tokenizer_from_dict

SIDE = Path(__file__).with_name("side.py")
NATS = "nats/token"
BITS = "bits per byte"  # of sides with different tokens
LIMIT = 128_000  # tokens of a text that are scored
ROWS = 64  # of a batch, at most
FLOATS = 1 << 24  # logits of a batch, about
# How far the logarithm of a probability may move where it has no reason to: on a CPU it was seen to
# move by 2e-5, with the number of rows; GPUs may order sums by the shape of a batch.
TOLERANCE = {"cpu": 1e-4, "gpu": 1e-2}

DIVERGED = "diverged"  # the fault of such a run
DEPENDS_ON_OTHERS = "the predictions for a text depend on what other texts the model is given"


class Text(NamedTuple):
    """A split on which both sides are scored."""

    tokens: tuple  # of each side, [N] each
    unit: str  # NATS or BITS
    num_bytes: int | None  # with BITS


def read_text(before, after, split):
    """The Text of a split of two Sides; None if it has none. Raises UsageError if they differ."""
    sides = (before, after)
    paths = [side.folder / f"{split}.tokens" for side in sides]  # uint32 each
    if not all(path.exists() for path in paths):
        return None
    tokens = tuple(np.fromfile(path, np.uint32) for path in paths)
    for path in paths:
        path.unlink()
    if before.tokenizer == after.tokenizer:
        if not np.array_equal(*tokens):
            raise UsageError(f"the sides have other {split} texts: put what chooses them behind --")
        return Text(tokens, NATS, None)
    texts = []
    for side, ids in zip(sides, tokens):
        tokenizer = tokenizer_from_dict(side.tokenizer)
        if tokenizer.unk is not None and np.any(ids == tokenizer.unk):
            raise UsageError(f"{side.name} reads <unk>: that has no bytes; use other tokenizers")
        if tokenizer.eos is not None:  # it may lie between documents, but is no part of them
            ids = ids[ids != tokenizer.eos]
        texts.append(tokenizer.decode(ids))
    if texts[0] != texts[1]:
        raise UsageError(
            f"the tokens of the sides do not decode to the same {split} text: use other tokenizers"
        )
    return Text(tokens, BITS, len(texts[0].encode()))


def choose_spans(text, contexts, limit):
    """Which targets are scored, [(start, stop)]: about `limit` of them, evenly spaced.

    contexts: of both sides. All of a text with other tokens: no others are the same for both.
    """
    count = len(text.tokens[0]) - 1  # the first token is only context
    width = max(contexts)
    if text.unit == BITS or not limit or count <= max(limit, width):
        return None
    starts = np.linspace(0, count - width, max(1, limit // width)).astype(int)
    return [(int(start), int(start) + width) for start in starts]


class Referee:
    """A checkpoint of a side, served by a process of the side's code; a context manager."""

    def __init__(self, side, metadata, environment):
        """metadata: the path of the checkpoint's .metadata."""
        self.side = side
        self.tolerance = TOLERANCE["gpu" if side.flags["gpu"] else "cpu"]
        self.messages = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-B", SIDE, side.folder, "serve", metadata, str(side.flags["gpu"])],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        self.messages.close()

    def ask(self, question, tokens):
        """The side's answer, plain data. Raises RunError."""
        line = json.dumps([question, tokens.tolist()]).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.process.wait()
            self.messages.seek(0)
            raise failure(self.side.name, self.process.returncode, self.messages.read()) from None

    def logits(self, rows):
        """Logits [B, L, V] of rows of tokens [B, L]. Raises RunError."""
        shape = self.ask("logits", rows)
        expected = [*rows.shape, self.side.vocab_size]
        if shape != expected:
            what = f"{self.side.name} cannot be scored: its logits are {shape}, not {expected}"
            raise SideError(what, self.side.name)
        content = self.process.stdout.read(4 * math.prod(shape))
        return np.frombuffer(content, np.float32).reshape(shape)

    def judge(self, texts, spans):
        """The losses of the validation and the test text in nats/token, and their fault, or None.

        texts: tokens [N] of each; the loss of one that is None is nan. spans: of each, see `score`.
        """
        scores = [math.nan, math.nan]
        for i, text in enumerate(texts):
            if text is not None:
                scores[i] = self.score(text, spans[i])
        # 2 nats more than an untrained model, which has some 5 with few tokens, and else that of
        # equal chances for all.
        limit = max(5, math.log(self.side.vocab_size)) + 2
        if all(score < limit for score, text in zip(scores, texts) if text is not None):
            return scores, self.check_sight(texts[0]) or self.check_evaluation(texts[0])
        return scores, DIVERGED

    def score(self, tokens, spans=None):
        """The mean loss in nats of the targets in `spans`, by default of all of `tokens` [N].

        Windows have the context of the side, and begin anew in each span.
        """
        width = self.side.context_size
        count = len(tokens) - 1
        windows = []
        for start, stop in spans or [(0, count)]:
            windows += [(place, min(place + width, stop)) for place in range(start, stop, width)]
        rows = max(1, min(ROWS, FLOATS // (width * self.side.vocab_size)))
        total = 0.0
        for first in range(0, len(windows), rows):
            starts, stops = np.array(windows[first : first + rows]).T[:, :, None]  # [B, 1] each
            places = starts + np.arange(width)  # [B, L]
            is_scored = places < stops
            places = np.minimum(places, count - 1)
            targets = tokens[places + 1].astype(int)[:, :, None]
            gains = np.take_along_axis(log_softmax(self.logits(tokens[places])), targets, axis=-1)
            total -= gains[is_scored].sum(dtype=float)
        return total / sum(stop - start for start, stop in windows)

    def check_evaluation(self, tokens):
        """What is wrong if the side's own `evaluate` finds another loss than the judge, or None."""
        width = self.side.context_size
        part = tokens[: 1 + width * max(1, 4096 // width)]
        own = self.ask("evaluate", part)
        judged = self.score(part)
        if abs(own - judged) > self.tolerance * max(1, judged):
            return (
                f"it is scored otherwise than it was trained: its own code says {own:.4f} of "
                f"{len(part) - 1:,} tokens, its logits {judged:.4f}"
            )

    def check_sight(self, tokens):
        """What is wrong if a prediction depends on what comes later, or on other texts, or None.

        Of windows all over the text, the tokens from some place on are replaced: in one from the
        first, in one from the second, up to the 64th, and in sixteen from places beyond.
        """
        width = min(self.side.context_size, (len(tokens) - 1) // 2)
        cuts = np.arange(1, min(width, 65))
        if width > 65:
            cuts = np.append(cuts, np.linspace(65, width - 1, 16).astype(int))
        starts = np.linspace(0, len(tokens) - width, len(cuts)).astype(int)
        windows = tokens[starts[:, None] + np.arange(width)]  # [cuts, L]
        others = np.roll(windows[::-1], 1, axis=1)
        others = np.where(others == windows, (others + 1) % self.side.vocab_size, others)
        # The last place comes first: the message then names the farthest token that is seen.
        for cut, window, other in zip(cuts[::-1], windows, others):
            changed = np.append(window[:cut], other[cut:])
            expected, found = self.log_probs(np.stack([window, changed]))
            # In another place, in a larger batch, with other texts on both sides.
            _, again, _ = self.log_probs(np.stack([other, window, other]))
            if np.abs(again - expected).max() > self.tolerance:
                return DEPENDS_ON_OTHERS
            has_moved = np.abs(found - expected)[:cut].max(axis=-1) > self.tolerance
            if has_moved.any():
                what = f"the prediction at position {has_moved.argmax()} depends on token {cut}"
                return f"it sees the future: {what}"

    def log_probs(self, rows):
        """Logarithms of probabilities [B, L, V] for rows of tokens [B, L], none below -30."""
        return np.maximum(log_softmax(self.logits(rows)), -30)


def log_softmax(logits):
    """Logarithms of probabilities [..., V]."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class SideError(RunError):
    """A side cannot run, by its own fault: not by that of the machine."""

    def __init__(self, text, name):
        super().__init__(text)
        self.name = name  # the side's


def failure(name, status, output):
    """The exception for a process of a side that has failed; name: the side's.

    It says its last line, and where a traceback points.
    """
    line = one_line(output.strip().rpartition("\n")[2]) or f"exit status {status}"
    if status < 0:
        line = f"ended by {signal.Signals(-status).name}"
    for file, place in re.findall(r'File ".*?(\w+\.py)", line (\d+)', output)[-1:]:
        line += f" ({file}, line {place})"
    line = f"{name} cannot run: {line}"
    is_of_code = "Traceback" in output or "No module named" in line
    if is_of_code and not re.search("MemoryError|OSError", line):
        return SideError(line, name)
    return UsageError(line) if status == 2 else RunError(line)
