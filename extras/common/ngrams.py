"""The losses of n-gram models: what counting alone reaches on a text, for extras.plot."""

import numpy as np

LONGEST = 3  # tokens before the one that is predicted
COUNTED = 10_000_000  # tokens, at most
SCORED = 1_000_000


def losses_of_ngrams(train, valid, vocab_size):
    """The mean losses in nats of `valid` [M] by what is counted in `train` [N]: a list.

    The first is that of single tokens, the others that of a token after one, two and three others.
    Probabilities are interpolated with those after fewer tokens (Witten & Bell 1991): the more
    different tokens have followed, the more weight these get. Those of single tokens are
    interpolated with equal chances for all.
    """
    train = train[:COUNTED]
    tokens = np.concatenate([train, valid[:SCORED]]).astype(np.int64)
    positions = np.arange(len(tokens))
    is_scored = positions >= len(train) + LONGEST
    is_counted = positions < len(train)
    histories = np.zeros(len(tokens), np.int64)  # an id of the tokens before each position
    probabilities = np.full(is_scored.sum(), 1 / vocab_size)
    losses = []
    for length in range(LONGEST + 1):
        is_counted[:length] = False
        _, first, grams = np.unique(
            histories * vocab_size + tokens, return_index=True, return_inverse=True
        )
        count = np.bincount(grams[is_counted], minlength=len(first))
        of_history = np.bincount(histories[is_counted], minlength=histories.max() + 1)
        # How many different tokens have followed each history.
        followers = np.bincount(histories[first][count > 0], minlength=len(of_history))
        scored_histories = histories[is_scored]
        total = of_history[scored_histories] + followers[scored_histories]
        numerator = count[grams[is_scored]] + followers[scored_histories] * probabilities
        probabilities = np.where(total > 0, numerator / np.maximum(total, 1), probabilities)
        losses.append(-np.log(probabilities).mean())
        # The history of the next position is this gram: of one token more.
        histories = np.concatenate([[len(first)], grams[:-1]])
    return losses
