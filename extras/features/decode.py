"""Decoding many texts at once, and a single text faster with the help of a draft model.

    python main.py --prompt "The company" --draft ptb-0a1b2c3d   speculative decoding
    python -m extras.batch prompts.txt                           sixteen prompts at a time

Both give each text the continuation that main.py's Decoder would give it alone, unless two tokens
are tied up to rounding: the random numbers depend only on the seed and the position in the text.
"""

import mlx.core as mx
import numpy as np

from main import KVCache, fast, open_model, sample_tokens
from support.cli import UsageError


def open_draft(flags, contents):
    """The model of --draft, for that of the Contents of a checkpoint.

    Their ids have to mean the same text.
    """
    checkpoint = contents.checkpoint
    draft, tokenizer, *_ = open_model(flags, "draft")
    is_same_tokenizer = tokenizer.to_dict() == contents.tokenizer.to_dict()
    is_same_size = draft.config.vocab_size == contents.config.vocab_size  # one may be padded
    if not (is_same_tokenizer and is_same_size):
        raise UsageError(
            f"--draft {flags.draft} has a different tokenizer than {checkpoint.id[:12]}: use one "
            "trained with the same tokenizer"
        )
    return draft


class BatchCache(KVCache):
    """A KVCache for texts of different lengths; `begin` is called before each pass."""

    def begin(self, lengths):
        """Moves past the first `lengths` [B] positions of each text; the rest is overwritten."""
        self.lengths = lengths
        self.mask = "causal"
        self.offset = int(lengths[0])
        if (lengths != lengths[0]).any():
            self.offset = mx.array(lengths)  # [B], which RoPE also accepts, of one position each

    def update_and_fetch(self, keys, values):
        """Adds L positions to each text, one if lengths differ; returns all keys and values."""
        if isinstance(self.offset, int):
            return super().update_and_fetch(keys, values)
        end = int(self.lengths.max()) + 1
        # [B, 1, 1, end]; False for the junk after a shorter text.
        self.mask = mx.array(np.arange(end) <= self.lengths[:, None, None, None])
        self.reserve(end, keys, values)
        # Scatters, which are slower than KVCache's slice assignments.
        rows = mx.arange(len(self.lengths))
        self.keys[rows, :, self.offset] = keys.squeeze(2)
        self.values[rows, :, self.offset] = values.squeeze(2)
        return self.keys[:, :, :end], self.values[:, :, :end]


class BatchReader:
    """main.py's Reader in plain MLX, for texts of different lengths.

    num_read: how many ids of each text it has read, [B]. If a number is lowered, the ids after that
    are forgotten.
    """

    def __init__(self, model, num_texts):
        self.model = model
        self.caches = [BatchCache() for _ in model.model.layers]
        self.num_read = np.zeros(num_texts, np.int64)

    def read(self, parts, count=1):
        """Logits [B, count, V] after each of the last `count` tokens of every text.

        parts: for each text, the list of ids that follow what was read of it, at least `count`.
        """
        lengths = [len(part) for part in parts]
        if min(lengths) < max(lengths):
            # One pass reads the same number of tokens of each text, so those with more are first
            # read alone, except for their last ones.
            for row in np.flatnonzero(np.array(lengths) > count):
                self.prefill(row, parts[row][:-count])
            parts = [part[-count:] for part in parts]
        tokens = mx.array(parts)  # [B, L]
        for cache in self.caches:
            cache.begin(self.num_read)
        self.num_read = self.num_read + tokens.shape[1]
        return self.model(tokens, self.caches, logits_to_keep=count)

    def prefill(self, row, part):
        """Reads the ids `part` of one text alone, into its row of the caches."""
        start = int(self.num_read[row])
        end = start + len(part)
        alone = [KVCache() for _ in self.caches]
        for cache, other in zip(self.caches, alone):
            if start:
                other.keys, other.values = cache.keys[row, None], cache.values[row, None]
                other.offset = start
        self.model(mx.array([part]), alone, logits_to_keep=1)
        B = len(self.num_read)
        for cache, other in zip(self.caches, alone):
            cache.reserve(end, mx.repeat(other.keys, B, 0), mx.repeat(other.values, B, 0))
            cache.keys[row, :, start:end] = other.keys[0, :, start:end]
            cache.values[row, :, start:end] = other.values[0, :, start:end]
        self.num_read[row] = end


class BatchDecoder:
    """A model that continues B texts: lists of one id or more.

    As in main.py's Decoder, if a text outgrows the context, its last context_size // 2 tokens are
    read again.
    """

    def __init__(self, model, texts):
        self.model = model
        self.texts = texts
        self.begin_windows()

    def begin_windows(self):
        """Forgets what was read; the next pass reads the texts from their beginnings."""
        self.window_starts = np.zeros(len(self.texts), np.int64)
        self.reader = None  # made when it is needed: until then, the model may change

    def truncate(self, length):
        """Truncates the texts to `length`, which lies within their windows."""
        for text in self.texts:
            del text[length:]
        if self.reader is not None:
            num_read = self.reader.num_read
            num_read[:] = np.minimum(num_read, length - self.window_starts)

    def next_token_logits(self, count=1):
        """Next-token logits [B, count, V] after each of the last `count` tokens of every text."""
        B = len(self.texts)
        if self.reader is None:
            quick = fast.quick_reader(self.model, B) if fast else None
            self.reader = quick or BatchReader(self.model, B)
        for row in range(B):
            self.place_window(row, count)
        begins = self.window_starts + self.reader.num_read
        return self.reader.read([text[i:] for text, i in zip(self.texts, begins)], count)

    def place_window(self, row, count):
        """Moves a text's window if the text has outgrown it or has under `count` tokens in it."""
        context_size = self.model.config.context_size
        num_read = self.reader.num_read
        length = len(self.texts[row])
        if not count <= length - self.window_starts[row] <= context_size:
            self.window_starts[row] = max(0, length - max(count, context_size // 2))
            num_read[row] = 0
        # The last `count` tokens are always read, again if necessary: their logits are needed.
        num_read[row] = min(num_read[row], length - self.window_starts[row] - count)

    def sample(self, flags, seeds, count=1):
        """Ids [B, count], sampled after each of the last `count` tokens of every text."""
        logits = self.next_token_logits(count)  # [B, count, V]
        windows = []  # up to each of those tokens
        keys = []
        for text, start, seed in zip(self.texts, self.window_starts, seeds):
            for end in range(len(text) - count + 1, len(text) + 1):
                windows.append(text[start:end])
                keys.append([seed, end])
        logits = logits.reshape(len(keys), -1)
        ids = sample_tokens(logits, flags, windows, keys)
        return np.array(ids).reshape(-1, count)

    def generate(self, max_tokens, flags, seeds):
        """Samples the texts' next ids `max_tokens` times; appends them and yields each list."""
        for _ in range(max_tokens):
            ids = self.sample(flags, seeds)[:, 0].tolist()
            for text, token in zip(self.texts, ids):
                text.append(token)
            yield ids


class SpeculativeDecoder:
    """A model that continues one text, a list of ids, with a smaller model as its draft.

    The draft proposes some tokens; the model reads them in one pass and keeps those that it would
    have sampled. Both sample with the same random numbers, so they mostly agree where their
    distributions are similar, and the text is the same as without a draft (Daliri, Musco & Suresh
    2024).
    """

    num_draft_tokens = 4  # proposed at a time, at most

    def __init__(self, model, draft_model, ids):
        self.ids = ids
        self.decoder = BatchDecoder(model, [ids])
        self.draft_decoder = BatchDecoder(draft_model, [ids])  # shares the same list
        self.num_proposed = 0  # tokens of the draft
        self.num_accepted = 0

    def read_prompt(self):
        """For main.py's Decoder, which could be stopped here; this one reads a prompt at once."""
        return []

    def generate(self, max_tokens, flags, seed):
        """Yields `max_tokens` ids and appends them to the text."""
        num_final = len(self.ids)  # tokens that are final
        end = num_final + max_tokens
        try:
            while num_final < end:
                for token in self.sample(end - num_final, flags, seed):
                    num_final += 1
                    yield token
        finally:
            self.drop_after(num_final)  # what was sampled but not consumed

    def sample(self, max_tokens, flags, seed):
        """Samples between one and `max_tokens` ids and appends them to the text."""
        num_final = len(self.ids)
        # Beyond this, the window would move.
        room = self.decoder.model.config.context_size - (num_final - self.decoder.window_starts[0])
        num_wanted = max(0, min(self.num_draft_tokens, room, max_tokens - 1))
        proposals = [token for [token] in self.draft_decoder.generate(num_wanted, flags, [seed])]
        ids = self.decoder.sample(flags, [seed], num_wanted + 1)[0].tolist()
        num_accepted = 0
        while num_accepted < num_wanted and proposals[num_accepted] == ids[num_accepted]:
            num_accepted += 1
        self.num_proposed += num_wanted
        self.num_accepted += num_accepted
        self.drop_after(num_final + num_accepted)
        self.ids.append(ids[num_accepted])  # the model's own token, after the last accepted one
        return ids[: num_accepted + 1]

    def drop_after(self, length):
        """Drops the newest ids, so that `length` are left."""
        self.decoder.truncate(length)
        self.draft_decoder.truncate(length)

    def truncate(self, length):
        """Truncates the text to `length` ids, which are read anew, as by main.py's Decoder."""
        del self.ids[length:]
        self.decoder.begin_windows()
        self.draft_decoder.begin_windows()

    def describe_draft(self):
        """The draft's acceptance rate, to be appended to the speed."""
        rate = self.num_accepted / max(1, self.num_proposed)
        return f", {rate:.0%} of the draft's {self.num_proposed:,} proposals accepted"
