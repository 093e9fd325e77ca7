"""The losses of n-gram models: what counting alone reaches on a text, for extras.plot."""

import numpy as np

MAX_HISTORY = 3  # tokens before the one that is predicted
MAX_COUNTED = 10_000_000  # tokens, at most
MAX_SCORED = 1_000_000


def losses_of_ngrams(train, valid, vocab_size):
    """The mean losses in nats of `valid` [M] by what is counted in `train` [N]: a list.

    The first is that of single tokens, the others that of a token after one, two and three others.
    Probabilities are interpolated with those after fewer tokens (Witten & Bell 1991): the more
    different tokens have followed, the more weight these get. Those of single tokens are
    interpolated with equal chances for all.
    """
    train = train[:MAX_COUNTED]
    tokens = np.concatenate([train, valid[:MAX_SCORED]]).astype(np.int64)
    scored = slice(len(train) + MAX_HISTORY, None)
    histories = np.zeros(len(tokens), np.int64)  # an id of the tokens before each position
    probabilities = 1 / vocab_size
    losses = []
    for length in range(MAX_HISTORY + 1):
        counted = slice(length, len(train))
        _, first, grams = np.unique(
            histories * vocab_size + tokens, return_index=True, return_inverse=True
        )
        count = np.bincount(grams[counted], minlength=len(first))
        of_history = np.bincount(histories[counted], minlength=histories.max() + 1)
        # How many different tokens have followed each history.
        followers = np.bincount(histories[first][count > 0], minlength=len(of_history))
        scored_histories = histories[scored]
        total = of_history[scored_histories] + followers[scored_histories]
        numerator = count[grams[scored]] + followers[scored_histories] * probabilities
        probabilities = np.where(total > 0, numerator / np.maximum(total, 1), probabilities)
        losses.append(-np.log(probabilities).mean())
        # The history of the next position is this gram: of one token more.
        histories = np.concatenate([[len(first)], grams[:-1]])
    return losses
