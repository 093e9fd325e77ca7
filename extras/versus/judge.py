"""The judge of extras.versus: scores checkpoints without the code that trained them.

A side's code only turns tokens into logits, in a process of its own (worker.py). The judge chooses
tokens and targets, and computes log-softmax and sums: an edit of the loss, of `token_metrics` or of
`evaluate` cannot move these. The model predicts each scored batch again, with other tokens at
positions that it must not see.
"""

import json
import math
from typing import NamedTuple

import numpy as np

from datasets import tokenizer_from_dict
from support.cli import UsageError
from extras.versus.sides import SideError, Worker

DEFAULT_TOKENS = 128_000  # that are scored of a text
MAX_ROWS = 64  # in a batch
MAX_REPEATS = 3  # predictions of a batch with other tokens
MIN_LOG_PROB = -30  # where predictions are compared, a smaller one counts as this
MAX_BATCH_LOGITS = 1 << 24  # in a batch of more than one row
# How far rounding may move a log-probability: on a CPU, another number of rows has moved one by
# 2e-5; on a GPU, the order of a sum may depend on the shape of the batch.
TOLERANCE = {False: 1e-4, True: 1e-2}  # whether on a GPU

DIVERGED = "diverged"  # the fault of a run, see RunScore
DEPENDS_ON_OTHERS = "the predictions for a text depend on other texts, or on chance"


class Text(NamedTuple):
    """A split on which a side is scored."""

    tokens: np.ndarray  # [N]
    spans: list  # of the scored targets, [(start, stop)]
    scale: float  # from nats/token to the unit of the comparison


def read_texts(sides, split, limit):
    """The Text of each Side, or Nones if one of them lacks this split.

    Raises UsageError if the Sides do not have the same text. limit: see choose_spans.
    """
    paths = [side.folder.with_suffix(f".{split}") for side in sides]  # uint32 each
    if not all(path.exists() for path in paths):
        return [None, None]
    tokens = [np.fromfile(path, np.uint32) for path in paths]
    if sides[0].tokenizer == sides[1].tokenizer:
        if not np.array_equal(*tokens):
            raise UsageError(f"the sides' {split} texts differ: put what chooses them after --")
        width = max(side.context_size for side in sides)
        spans = choose_spans(len(tokens[0]) - 1, width, limit)
        return [Text(ids, spans, 1) for ids in tokens]
    texts = []
    for side, ids in zip(sides, tokens):
        tokenizer = tokenizer_from_dict(side.tokenizer)
        if tokenizer.eos is not None:  # it may separate documents, but is not text
            ids = ids[ids != tokenizer.eos]
        texts.append(tokenizer.decode(ids))
    if texts[0] != texts[1]:
        raise UsageError(
            f"the tokens of the sides do not decode to the same {split} text: use other tokenizers"
        )
    nats_at_one_bpb = math.log(2) * len(texts[0].encode())
    # All of them, as only whole texts are the same where the tokens differ.
    return [Text(ids, [(0, len(ids) - 1)], (len(ids) - 1) / nats_at_one_bpb) for ids in tokens]


def choose_spans(count, width, limit):
    """The spans of the scored targets, [(start, stop)]: about `limit` of them, evenly spaced.

    count: of all targets, which are scored if `limit` is 0. width: of a span.
    """
    if not limit or count <= max(limit, width):
        return [(0, count)]
    starts = np.linspace(0, count - width, max(1, limit // width)).astype(int)
    return [(start, start + width) for start in starts.tolist()]


class Judge(Worker):
    """Asks a side's code for the logits of a checkpoint."""

    def __init__(self, side, metadata, environment):
        """metadata: the path of the checkpoint's .metadata."""
        gpu = side.flags["gpu"]
        self.tolerance = TOLERANCE[gpu]
        super().__init__(side, "serve", metadata, str(gpu), env=environment, cwd=side.folder)

    def logits(self, rows):
        """Logits [B, L, V] of rows of tokens [B, L], without those that pad a vocabulary."""
        shape = self.ask(json.dumps(rows.tolist()).encode() + b"\n")
        size = self.side.vocab_size
        if tuple(shape[:-1]) != rows.shape or shape[-1] < size:
            what = f"its logits have the shape {shape}, not {[*rows.shape, size]}"
            raise SideError(f"{self.side.name} cannot be scored: {what}")
        content = self.process.stdout.read(4 * math.prod(shape))
        return np.frombuffer(content, np.float32).reshape(shape)[:, :, :size]

    def examine_run(self, valid, test, recorded):
        """The scores on both Texts, in the unit of the comparison; what is wrong, or None.

        test: may be None; its score is nan then. recorded: see check_evaluation.
        """
        loss, fault = self.examine(valid)
        test_loss = self.mean_loss(test) if test else 0.0
        # 2 nats above an untrained model. Its loss is about log(vocab_size), as if all tokens were
        # equally likely, or 5 if embeddings are tied and tokens few, see main.init_weights.
        limit = max(5, math.log(self.side.vocab_size)) + 2
        if not np.max([loss, test_loss]) < limit:  # also if one of them is nan
            fault = DIVERGED
        fault = fault or self.check_evaluation(valid, recorded)
        test_score = test_loss * test.scale if test else math.nan
        return [loss * valid.scale, test_score, fault]

    def mean_loss(self, text):
        """In nats/token, over the scored targets of a Text."""
        return self.examine(text, times=0)[0]

    def examine(self, text, times=MAX_REPEATS):
        """The mean loss in nats/token; what predictions depend on and must not see, or None.

        Windows are as long as the side's context; each span begins a new one. The model predicts
        each scored batch again in the same shape, with its rows in reverse order. In each row, the
        tokens from a position on, its cut, are replaced: earlier predictions must stay. This is
        repeated until each position has been a cut, or `times` times with evenly spaced cuts.
        """
        width = self.side.context_size
        windows = []
        for start, stop in text.spans:
            for begin in range(start, stop, width):
                windows.append((begin, min(begin + width, stop)))
        num_rows = max(1, min(MAX_ROWS, MAX_BATCH_LOGITS // (width * self.side.vocab_size)))
        times = min(times, math.ceil((width - 1) / len(windows)))
        cuts = np.linspace(1, width - 1, times * len(windows)).astype(int)
        cuts = cuts.reshape(times, len(windows))
        total_nats = count = 0
        fault = None
        for first in range(0, len(windows), num_rows):
            starts, stops = np.array(windows[first : first + num_rows]).T[:, :, None]  # [B, 1] each
            positions = starts + np.arange(width)  # [B, L]
            is_scored = positions < stops
            positions = np.minimum(positions, len(text.tokens) - 2)
            rows = text.tokens[positions]
            log_probs = log_softmax(self.logits(rows))
            targets = text.tokens[positions + 1].astype(int)[:, :, None]
            target_log_probs = np.take_along_axis(log_probs, targets, axis=-1)
            total_nats -= target_log_probs[is_scored].sum(dtype=float)
            count += is_scored.sum()
            for batch_cuts in cuts[:, first : first + num_rows]:
                fault = fault or self.ask_again(rows, log_probs.clip(MIN_LOG_PROB), batch_cuts)
        return total_nats / count, fault

    def check_evaluation(self, valid, recorded):
        """What is wrong if the run itself has found another loss than the judge, or None.

        recorded: a list of its last Evaluation, as its record has it, or of none.
        """
        if not recorded:
            return "the run has not scored itself"
        _, loss, count, *_ = recorded[0]
        spans = choose_spans(len(valid.tokens) - 1, self.side.context_size, count)
        judged = self.mean_loss(valid._replace(spans=spans))
        if not abs(loss - judged) <= self.tolerance * max(1, judged):  # also if it is nan
            return (
                f"the run's own loss, {loss:.4f} for {count:,} tokens, is not the judge's, "
                f"{judged:.4f}"
            )

    def ask_again(self, rows, expected, cuts):
        """What is wrong with the predictions `expected` for rows [B, L], or None.

        cuts: the first position in each row that gets another token, [B].
        """
        others = rows[::-1]
        others = np.where(others == rows, (rows + 1) % self.side.vocab_size, others)
        is_before = np.arange(rows.shape[1]) < cuts[:, None]  # [B, L]
        changed = np.where(is_before, rows, others)
        moved = self.has_moved(changed, expected) & is_before
        if not moved.any():
            return None
        # Which change was it? The order alone, or the tokens of one row alone?
        row, position = np.argwhere(moved)[0]
        alone = rows.copy()
        alone[row] = changed[row]
        is_own = self.has_moved(alone, expected)[row, position]
        if self.has_moved(rows, expected).any() or not is_own:
            return DEPENDS_ON_OTHERS
        what = f"the prediction at position {position} depends on tokens from {cuts[row]} on"
        return f"it sees the future: {what}"

    def has_moved(self, rows, expected):
        """Where predictions for rows [B, L], in reverse order, differ from `expected`, [B, L]."""
        log_probs = log_softmax(self.logits(rows[::-1])).clip(MIN_LOG_PROB)[::-1]
        return np.abs(log_probs - expected).max(axis=-1) > self.tolerance


def log_softmax(logits):
    """Log-probabilities [..., V]."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
