"""Decoding many texts at once, and one text faster with the help of a draft.

    python main.py --prompts_file prompts.txt --output answers.jsonl     sixteen prompts together
    python main.py --prompt "The company" --draft ptb-0a1b2c             speculative decoding

Both give, text by text, what main.py's Decoder gives for it alone: the random numbers depend on
the seed and the place in the text only.
"""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np

from datasets import explained
from extras.collect import append_lines
from main import Cache, Decoder, first_ids, shape_logits

# The flags, beside the seed, that decide what follows a prompt.
SAMPLING_FLAGS = [
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "quantize",
]


class BatchCache(Cache):
    """A Cache of texts of different lengths; `begin` is called before each pass."""

    def begin(self, lengths):
        """Goes to where so many positions of each text, [B], are read; the rest is overwritten."""
        self.lengths = lengths
        if (lengths == lengths[0]).all():
            self.offset = int(lengths[0])
        else:
            self.offset = mx.array(lengths)  # [B], as RoPE takes it, too

    def attend(self, queries, keys, values):
        """Reads L more positions of each text, as main.py's Cache does of texts of one length."""
        if isinstance(self.offset, int):
            return super().attend(queries, keys, values)
        L, scale = queries.shape[2], queries.shape[3] ** -0.5
        places = self.lengths[:, None] + np.arange(L)  # [B, L]
        rows = mx.arange(len(places))[:, None]
        self.keys[rows, :, mx.array(places)] = keys.swapaxes(1, 2)  # a scatter, which takes longer
        self.values[rows, :, mx.array(places)] = values.swapaxes(1, 2)
        end = int(places.max()) + 1
        seen = (
            np.arange(end) <= places[:, None, :, None]
        )  # [B, 1, L, end]; junk behind a shorter text is not
        return mx.fast.scaled_dot_product_attention(
            queries,
            self.keys[:, :, :end],
            self.values[:, :, :end],
            scale=scale,
            mask=mx.array(seen),
        )


class BatchDecoder:
    """A model that continues B texts, lists of at least one id, which may also grow and be cut.

    As in main.py's Decoder, a text that outgrows the context is read again from its last
    context_size // 2 tokens on.
    """

    def __init__(self, model, texts):
        self.model = model
        self.texts = texts
        self.starts = np.zeros(len(texts), np.int32)  # of the windows
        self.lengths = np.zeros(len(texts), np.int32)  # tokens that are read of each window
        self.caches = [BatchCache(model.config, len(texts)) for _ in model.model.layers]

    def forget(self):
        """Forgets what was read, as after a pass that was interrupted."""
        self.lengths[:] = 0

    def cut(self, length):
        """Takes back what stands in the texts beyond `length`."""
        for text in self.texts:
            del text[length:]
        self.lengths = np.minimum(self.lengths, length - self.starts)

    def logits(self, count=1):
        """Logits [B, count, V] of what follows each of the last `count` tokens of every text."""
        for row in range(len(self.texts)):
            self.place_window(row, count)
        windows = [text[start:] for text, start in zip(self.texts, self.starts)]
        unread = np.array([len(window) for window in windows]) - self.lengths  # [B]
        if unread.min() < unread.max():
            # One pass reads equally many tokens of each text: those with more are read alone up to
            # their last ones.
            for row in np.flatnonzero(unread > count):
                self.read_alone(row, windows[row][:-count])
        tokens = mx.array(
            [window[length:] for window, length in zip(windows, self.lengths)]
        )  # [B, unread]
        for cache in self.caches:
            cache.begin(self.lengths)
        logits = self.model(tokens, self.caches, last=count)
        self.lengths = self.lengths + tokens.shape[1]
        return logits

    def place_window(self, row, count):
        """Moves the window of a text that has outgrown it, or has under `count` tokens in it."""
        context_size = self.model.config.context_size
        length = len(self.texts[row])
        if not count <= length - self.starts[row] <= context_size:
            self.starts[row] = max(0, length - max(count, context_size // 2))
            self.lengths[row] = 0
        # The last `count` tokens are always read, if need be again: what is asked for are their
        # logits.
        most = length - self.starts[row] - count
        self.lengths[row] = min(self.lengths[row], most)

    def read_alone(self, row, window):
        """Reads the ids `window` of one text."""
        alone = Decoder(self.model, window)
        alone.logits()
        for cache, other in zip(self.caches, alone.caches):
            cache.keys[row] = other.keys[0]  # [K, context, d]
            cache.values[row] = other.values[0]
        self.lengths[row] = len(window)

    def draw(self, flags, seeds, count=1):
        """Ids [B, count], drawn for what follows each of the last `count` tokens of every text."""
        logits = self.logits(count).flatten(0, 1)  # [B * count, V]
        befores = []  # the window up to each of those tokens
        keys = []
        for text, start, seed in zip(self.texts, self.starts, seeds):
            for end in range(len(text) - count + 1, len(text) + 1):
                befores.append(text[start:end])
                keys.append([seed, end])
        logits = shape_logits(logits, flags, befores)

        def draw_one(row, key):
            return mx.random.categorical(row, key=key)

        ids = mx.vmap(draw_one)(logits, mx.array(keys, mx.uint32))
        return np.array(ids).reshape(-1, count)

    def generate(self, max_tokens, flags, seeds):
        """Draws `max_tokens` times the next ids of the texts, appends them and yields the list."""
        for _ in range(max_tokens):
            ids = self.draw(flags, seeds)[:, 0].tolist()
            for text, token in zip(self.texts, ids):
                text.append(token)
            yield ids


class SpeculativeDecoder:
    """A model that continues one text, a list of ids, with a smaller model as its draft.

    The draft proposes up to `length` tokens; the model reads them in one pass and keeps those that
    it draws itself. Both draw by the same random numbers, so that they mostly agree where their
    distributions are alike, and the text is the same as without a draft (Daliri, Musco & Suresh
    2024).
    """

    def __init__(self, model, draft, text, length=4):
        self.text = text
        self.length = length
        self.decoder = BatchDecoder(model, [text])
        self.draft = BatchDecoder(draft, [text])  # of the very same list
        self.proposed = 0
        self.accepted = 0

    def generate(self, max_tokens, flags, seed):
        """Yields `max_tokens` ids and appends them to the text."""
        known = len(self.text)  # tokens that are there for good
        end = known + max_tokens
        try:
            while known < end:
                ids = self.draw(end - known, flags, seed)
                for token in ids:
                    known += 1
                    yield token
        finally:
            self.cut(known)  # without what was drawn when the reader left

    def draw(self, most, flags, seed):
        """Draws from one id to `most` of them, and appends them to the text."""
        known = len(self.text)
        room = self.decoder.model.config.context_size - (
            known - self.decoder.starts[0]
        )  # or the window would move
        wanted = max(0, min(self.length, room, most - 1))
        proposals = [token for [token] in self.draft.generate(wanted, flags, [seed])]
        ids = self.decoder.draw(flags, [seed], wanted + 1)[0].tolist()
        accepted = 0
        while accepted < wanted and proposals[accepted] == ids[accepted]:
            accepted += 1
        self.proposed += wanted
        self.accepted += accepted
        self.cut(known + accepted)
        self.text.append(ids[accepted])  # the model's own, after the last that it accepted
        return ids[: accepted + 1]

    def cut(self, length):
        self.decoder.cut(length)
        self.draft.cut(length)

    def forget(self):
        self.decoder.forget()
        self.draft.forget()

    def describe_draft(self):
        """How often the draft was right, to be put behind the speed."""
        rate = self.accepted / max(1, self.proposed)
        return f", {rate:.0%} of the draft's {self.proposed:,} proposals accepted"


def answer_file(model, tokenizer, checkpoint_id, flags, batch_size=16):
    """Continues each line of --prompts_file --num_samples times, `batch_size` of them together.

    Each continuation is a line of JSON in --output or on stdout: prompt, seed, checkpoint,
    SAMPLING_FLAGS, completion and tokens. An --output that holds the first of these lines is
    continued. Raises UsageError or RunError for one that cannot be, see append_lines.
    """
    settings = {name: getattr(flags, name) for name in SAMPLING_FLAGS}
    problem = f"--prompts_file {flags.prompts_file} must be UTF-8, --output writable"
    with explained(problem, OSError, ValueError):
        text = Path(flags.prompts_file).read_text("utf-8")
        jobs = []
        for prompt in text.removesuffix("\n").split("\n"):  # splitlines would cut at \f, too
            for _ in range(flags.num_samples):
                job = {
                    "prompt": prompt,
                    "seed": flags.seed + len(jobs),
                    "checkpoint": checkpoint_id,
                }
                jobs.append(job | settings)
        if flags.output:
            out, answered = append_lines(flags.output, jobs)
        else:
            out, answered = os.fdopen(os.dup(1), "wb"), []  # stdout itself stays open
    with out:
        for start in range(len(answered), len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            for line in answer_batch(model, tokenizer, batch, flags):
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            out.flush()  # a kill costs the batch that is computed, no more


def answer_batch(model, tokenizer, jobs, flags):
    """The jobs, dicts of a prompt and a seed, with their completion and its tokens added."""
    texts = [first_ids(tokenizer, job["prompt"]) for job in jobs]  # which the decoder lengthens
    shown = [len(tokenizer.decode(text)) for text in texts]  # characters of the prompts
    read = [len(text) for text in texts]  # tokens of the prompts
    decoder = BatchDecoder(model, texts)
    stopped = [None] * len(texts)  # how many tokens each text has where it has --stop
    for _ in decoder.generate(flags.max_tokens, flags, [job["seed"] for job in jobs]):
        if not flags.stop:
            continue
        for i, text in enumerate(texts):
            if stopped[i] is None and flags.stop in tokenizer.decode(text)[shown[i] :]:
                stopped[i] = len(text)
        if None not in stopped:
            break
    lines = []
    for i, job in enumerate(jobs):
        text = texts[i][: stopped[i]]
        completion = tokenizer.decode(text)[shown[i] :]
        if flags.stop:
            completion, _, _ = completion.partition(flags.stop)
        lines.append(job | {"completion": completion, "tokens": text[read[i] :]})
    return lines
