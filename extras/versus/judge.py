"""The judge of extras.versus: scores checkpoints without the code that trained them.

A side's own code only turns tokens into logits, in a process of its own (worker.py). Which
tokens, their targets, the log-softmax and the sums are the judge's: an edit of the loss, of
`token_metrics` or of `evaluate` cannot move them. The very batches that are scored are asked again,
with other tokens where a model may not look.
"""

import json
import math
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

import numpy as np

from datasets import UsageError, tokenizer_from_dict
from extras.versus.sides import LONGEST, WORKER, SideError, failure

NATS = "nats/token"
BITS = "bits per byte"  # of sides with different tokens
LIMIT = 128_000  # tokens of a text that are scored
ROWS = 64  # of a batch, at most
ASKED_AGAIN = 3  # times at most, with other tokens
LOWEST = -30  # of logarithms of probabilities that are compared
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


class Judge:
    """A checkpoint of a side, served by a process of the side's code; a context manager."""

    def __init__(self, side, metadata, environment):
        """metadata: the path of the checkpoint's .metadata."""
        self.side = side
        self.tolerance = TOLERANCE["gpu" if side.flags["gpu"] else "cpu"]
        self.messages = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-B", WORKER, side.folder, "serve", metadata, str(side.flags["gpu"])],
            env=environment,
            cwd=side.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
        )
        self.killer = threading.Timer(LONGEST, self.process.kill)
        self.killer.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.killer.cancel()
        self.process.kill()
        self.process.communicate()
        self.messages.close()

    def ask(self, rows):
        """The shape of the logits of rows of tokens [B, L]; their bytes follow."""
        try:
            self.process.stdin.write(json.dumps(rows.tolist()).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.process.wait()
            self.messages.seek(0)
            raise failure(self.side.name, self.process.returncode, self.messages.read()) from None

    def logits(self, rows):
        """Logits [B, L, V] of rows of tokens [B, L].

        More than there are ids, as where a vocabulary is padded, are impossible.
        """
        size = self.side.vocab_size
        *shape, own_size = self.ask(rows)
        if tuple(shape) != rows.shape or own_size < size:
            what = f"its logits are {[*shape, own_size]}, not {[*rows.shape, size]}"
            raise SideError(f"{self.side.name} cannot be scored: {what}", self.side.name)
        content = self.process.stdout.read(4 * math.prod(shape) * own_size)
        return np.frombuffer(content, np.float32).reshape(*shape, own_size)[:, :, :size]

    def examine_run(self, texts, spans, own):
        """The losses of the validation and the test text in nats/token, and their fault, or None.

        texts: tokens [N] of each; the loss of one that is None is nan. spans: of each, see
        `batches`. own: see check_evaluation.
        """
        valid, test = texts
        loss, sight = self.examine(valid, spans[0])
        scores = [loss, math.nan if test is None else self.score(test, spans[1])]
        # 2 nats more than an untrained model, which has some 5 with few tokens, and else that of
        # equal chances for all.
        limit = max(5, math.log(self.side.vocab_size)) + 2
        if all(score < limit for score, text in zip(scores, texts) if text is not None):
            return scores, sight or self.check_evaluation(valid, own)
        return scores, DIVERGED

    def batches(self, tokens, spans=None):
        """The windows of which `tokens` [N] are scored: places [B, L], and which of them count.

        spans: those of the targets, by default all. Windows have the context of the side, and begin
        anew in each span.
        """
        width = self.side.context_size
        count = len(tokens) - 1
        windows = []
        for start, stop in spans or [(0, count)]:
            windows += [(place, min(place + width, stop)) for place in range(start, stop, width)]
        rows = max(1, min(ROWS, FLOATS // (width * self.side.vocab_size)))
        for first in range(0, len(windows), rows):
            starts, stops = np.array(windows[first : first + rows]).T[:, :, None]  # [B, 1] each
            places = starts + np.arange(width)  # [B, L]
            yield np.minimum(places, count - 1), places < stops

    def score(self, tokens, spans=None):
        """The mean loss in nats of the targets in `spans`, see `batches`."""
        loss, _ = self.examine(tokens, spans, times=0)
        return loss

    def examine(self, tokens, spans=None, times=ASKED_AGAIN):
        """The score, and what is wrong with predictions that know too much, or None.

        Each batch that is scored is asked again in the same shape, with its rows in another order
        and, in each row, other tokens from some place on. That is done until each position was such
        a place, at most so many times; where that is not enough, they are evenly spaced.
        """
        batches = list(self.batches(tokens, spans))
        windows = sum(len(places) for places, _ in batches)
        last = self.side.context_size - 1
        times = min(times, math.ceil(last / windows))
        stride = max(1, last // max(1, times * windows))
        total = count = done = 0
        fault = None
        for places, is_scored in batches:
            rows = tokens[places]
            found = log_softmax(self.logits(rows))
            targets = tokens[places + 1].astype(int)[:, :, None]
            gains = np.take_along_axis(found, targets, axis=-1)
            total -= gains[is_scored].sum(dtype=float)
            count += is_scored.sum()
            for _ in range(times):
                cuts = 1 + (done + np.arange(len(rows))) * stride % last  # [B]
                done += len(rows)
                fault = fault or self.ask_again(rows, np.maximum(found, LOWEST), cuts)
        return total / count, fault

    def check_evaluation(self, tokens, own):
        """What is wrong if the run's own score at its end is another than the judge's, or None.

        own: (number of tokens, loss), of the first ones of the text.
        """
        count, loss = own
        judged = self.score(tokens[: count + 1])
        if abs(loss - judged) > self.tolerance * max(1, judged):
            return (
                f"it is scored otherwise than it was trained: its own run says {loss:.4f} of "
                f"{count:,} tokens, its logits {judged:.4f}"
            )

    def ask_again(self, rows, expected, cuts):
        """What is wrong with the predictions `expected` for rows [B, L], or None.

        cuts: the first place of each row, [B], at which others are put.
        """
        others = rows[::-1]
        others = np.where(others == rows, (rows + 1) % self.side.vocab_size, others)
        is_before = np.arange(rows.shape[1]) < cuts[:, None]  # [B, L]
        changed = np.where(is_before, rows, others)
        has_moved = self.move(self.log_probs(changed[::-1])[::-1], expected) & is_before
        if not has_moved.any():
            return None
        # The two changes apart: first the order alone, then the tokens of one row.
        if self.move(self.log_probs(rows[::-1])[::-1], expected).any():
            return DEPENDS_ON_OTHERS
        row, position = np.argwhere(has_moved)[0]
        alone = rows.copy()
        alone[row] = changed[row]
        if not self.move(self.log_probs(alone), expected)[row, position]:
            return DEPENDS_ON_OTHERS
        what = f"the prediction at position {position} depends on tokens from {cuts[row]} on"
        return f"it sees the future: {what}"

    def move(self, found, expected):
        """Where predictions [B, L, V] are others than expected, [B, L]."""
        return np.abs(found - expected).max(axis=-1) > self.tolerance

    def log_probs(self, rows):
        """Logarithms of probabilities [B, L, V] for rows of tokens [B, L], none below LOWEST."""
        return np.maximum(log_softmax(self.logits(rows)), LOWEST)


def log_softmax(logits):
    """Logarithms of probabilities [..., V]."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
