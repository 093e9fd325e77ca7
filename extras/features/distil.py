"""Distillation: also learn from the predictions of a larger model (Hinton et al. 2015).

    python main.py --teacher MODEL --dim 256 --dataset ptb

A share of the loss is T² times the Kullback-Leibler divergence from the teacher's distribution to
the student's, both softened by the temperature T; the rest is the cross-entropy of the text. T²
preserves the scale of the gradients. Both are computed chunk by chunk, as in fast.py, which
is required: the logits of the two models never exist as a whole.
"""

import mlx.core as mx

from datasets import UsageError
from extras.features.fast import cross_entropy_of_chunk, exp, loss_and_gradients, row_maxima
from extras.features.fast import row_sums, stored_gradients
from main import EDITED_FUNCTIONS


def check():
    """Raises UsageError if main.py has other logits than the chunks here."""
    for name in {"Embedding", "LanguageModel"} & {*EDITED_FUNCTIONS}:
        raise UsageError(
            "--teacher: distil.py in extras/ computes logits as main.py had them: undo the edit of "
            f"{name}"
        )


def make_loss(teacher, flags):
    """A function like main.py's training_loss that also takes the input tokens [B, L]."""
    share = mx.array(flags.teacher_weight)
    temperature = mx.array(flags.teacher_temperature)

    def loss(model, hidden, targets, scale, tokens):
        states = hidden.flatten(0, 1)
        head = model.head.astype(hidden.dtype)
        weights = mx.full(targets.size, scale)
        theirs = teacher.model(tokens).flatten(0, 1)  # [N, D'], without dropout
        return distilled_loss_and_gradients(
            states, head, targets.flatten(), weights, theirs, teacher.head, share, temperature
        )[0]

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
        theirs, their_powers, their_total = soften(their_logits, temperature)
        ours, our_powers, our_total = soften(logits, temperature)
        if padding:
            columns = [(0, 0), (0, padding)]
            their_powers = mx.pad(their_powers, columns)
            theirs = mx.pad(theirs, columns)  # any finite logit will do: it is multiplied by 0
        differences = row_sums(their_powers * (theirs - ours)) / their_total
        divergences = differences + mx.log(our_total) - mx.log(their_total)  # [n, 1]
        # T² times the gradient of a divergence w.r.t. the logits is T (our - their probabilities).
        pull = share * temperature * weights[rows, None]  # [n, 1]
        d_divergence = our_powers * (pull / our_total) - their_powers * (pull / their_total)
        gradient = powers * scale + d_divergence
        loss = loss + temperature * (pull * divergences).sum()
        return loss, gradient, mx.ones_like(scale)

    return loss_and_gradients(hidden, head, targets, weights * (1 - share), loss_of_chunk)


distilled_loss_and_gradients.vjp(stored_gradients)


def soften(logits, temperature):
    """Logits [n, V] / temperature, less their maximum; e to the power of them; its sums [n, 1]."""
    below = (logits - row_maxima(logits)) / temperature
    powers = exp(below)
    return below, powers, row_sums(powers)
