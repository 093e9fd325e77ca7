"""Distillation: also learn from the predictions of a larger model (Hinton et al. 2015).

    python main.py --teacher MODEL --dim 256 --dataset ptb

A share of the loss is T² times the Kullback-Leibler divergence from the teacher's distribution to
the student's, both softened by the temperature T; the rest is the cross-entropy of the text. T²
preserves the scale of the gradients. Both are computed chunk by chunk, as in extras/fast.py, which
is required: the logits of the two models never exist as a whole.
"""

import mlx.core as mx

from extras.fast import (
    cross_entropy_of_chunk,
    exp,
    flatten_positions,
    stored_gradients,
    sum_over_chunks,
)


def make_loss(teacher, flags):
    """A function like main.py's cross_entropy that also takes the input tokens [B, L]."""
    share = mx.array(flags.teacher_weight)
    temperature = mx.array(flags.teacher_temperature)

    def loss(hidden, head, targets, weights, tokens):
        inputs = flatten_positions(hidden, head, targets, weights)
        states = teacher.model(tokens).flatten(0, 1)  # [N, D'], without dropout
        return distilled_loss_and_gradients(*inputs, states, teacher.head, share, temperature)[0]

    return loss


@mx.custom_function
def distilled_loss_and_gradients(
    hidden, head, targets, weights, states, their_head, share, temperature
):
    """The loss and its gradients w.r.t. hidden [N, D] and head [V, D]; see stored_gradients.

    targets, weights: [N]; states: the teacher's hidden states [N, D']; their_head: its matrix
    [V', D']. If V and V' differ, the larger vocabulary has padding: the teacher's rows beyond V are
    ignored, and it gives no probability to the student's ids beyond V'.
    """
    padding = max(0, len(head) - len(their_head))

    def loss_of_chunk(logits, targets, text_weights, rows):
        loss, powers, scale = cross_entropy_of_chunk(logits, targets, text_weights, rows)
        their_logits = (states[rows] @ their_head.T)[:, : len(head)].astype(mx.float32)
        log_wanted = log_softmax(their_logits / temperature)
        log_given = log_softmax(logits / temperature)
        wanted = exp(log_wanted)
        if padding:
            wanted = mx.pad(wanted, [(0, 0), (0, padding)])
            # Any finite number will do: it is multiplied by the probability, 0.
            log_wanted = mx.pad(log_wanted, [(0, 0), (0, padding)])
        given = exp(log_given)
        pull = share * temperature * weights[rows, None]  # [n, 1]
        divergence = (pull * wanted * (log_wanted - log_given)).sum()
        # T² times the gradient of the divergence w.r.t. the logits is T (given - wanted); this T
        # is in `pull`.
        gradient = powers * scale + pull * (given - wanted)
        return loss + temperature * divergence, gradient, mx.ones_like(scale)

    return sum_over_chunks(hidden, head, targets, weights * (1 - share), loss_of_chunk)


distilled_loss_and_gradients.vjp(stored_gradients)


def log_softmax(logits):
    """Log probabilities [n, V]."""
    below = logits - logits.max(axis=-1, keepdims=True)
    return below - mx.log(exp(below).sum(axis=-1, keepdims=True))
