"""Distillation: also learn from the predictions of a larger model (Hinton et al. 2015).

    python main.py --teacher MODEL --dim 256 --dataset ptb

A share of the loss is T² times the Kullback-Leibler divergence from the teacher's distribution to
the student's, both softened by the temperature T; the rest is the cross-entropy of the text. T²
preserves the scale of the gradients. Both are computed chunk by chunk, as in fast.py, which
is required: the logits of the two models never exist as a whole.
"""

import mlx.core as mx

from main import fast
from support.cli import UsageError
from support.code import EDITED_NAMES
from extras.features.fast import chunked_loss_and_gradients, cross_entropy_of_chunk, exp
from extras.features.fast import row_sums, stored_gradients


def check():
    """Raises UsageError if main.py has other logits than the chunks here, or may have."""
    if fast is None:  # then main.py does not look for edits
        raise UsageError("--teacher needs extras/features/fast.py: unset DISABLE_FAST")
    if "LanguageModel" in EDITED_NAMES:
        raise UsageError(
            "--teacher: distil.py in extras/ computes logits as main.py had them: undo the edit of "
            "LanguageModel"
        )


def make_loss(teacher, flags):
    """A function like main.py's training_loss."""
    teacher_weight = mx.array(flags.teacher_weight)
    temperature = mx.array(flags.teacher_temperature)

    def loss(model, inputs, targets, scale, dropout_masks=None):
        hidden = model.model(inputs, dropout_masks=dropout_masks).flatten(0, 1)  # [N, D]
        head = model.output_matrix.astype(hidden.dtype)
        teacher_hidden = teacher.model(inputs).flatten(0, 1)  # [N, D'], without dropout
        return distilled_loss_and_gradients(
            hidden,
            head,
            targets.flatten(),
            mx.array(scale),
            teacher_hidden,
            teacher.output_matrix,
            teacher_weight,
            temperature,
        )[0]

    return loss


@mx.custom_function
def distilled_loss_and_gradients(
    hidden, head, targets, scale, teacher_hidden, teacher_head, teacher_weight, temperature
):
    """The loss and its gradients w.r.t. hidden [N, D] and head [V, D]; see stored_gradients.

    targets: [N]; teacher_hidden: [N, D']; teacher_head: [V', D']. If V and V' differ, the larger
    vocabulary has padding: the teacher's rows beyond V are ignored, and it gives no probability to
    the student's ids beyond V'.
    """
    # T² times the gradient of a divergence w.r.t. the logits is T (student's - teacher's).
    kl_scale = teacher_weight * temperature * scale

    def loss_of_chunk(logits, targets, text_scale, rows):
        losses, exps, factor = cross_entropy_of_chunk(logits, targets, text_scale)
        teacher_logits = (teacher_head @ teacher_hidden[rows].T)[: len(head)].astype(mx.float32)
        teacher_softened, teacher_exps, teacher_sum = soften(teacher_logits, temperature)
        student_softened, student_exps, student_sum = soften(logits, temperature)
        differences = teacher_exps * (teacher_softened - student_softened[: len(teacher_exps)])
        divergences = row_sums(differences.T).flatten() / teacher_sum  # [n]
        divergences = divergences + mx.log(student_sum) - mx.log(teacher_sum)
        teacher_exps = mx.pad(teacher_exps, [(0, len(head) - len(teacher_exps)), (0, 0)])
        d_kl = student_exps * (kl_scale / student_sum) - teacher_exps * (kl_scale / teacher_sum)
        losses = losses + temperature * kl_scale * divergences
        return losses, exps * factor + d_kl, mx.ones_like(factor)

    text_scale = scale * (1 - teacher_weight)
    return chunked_loss_and_gradients(hidden, head, targets, text_scale, loss_of_chunk)


distilled_loss_and_gradients.vjp(stored_gradients)


def soften(logits, temperature):
    """Logits [V, n] / temperature, less their maximum; e to the power of them; its sums [n]."""
    softened = (logits - logits.max(axis=0)) / temperature
    exps = exp(softened)
    return softened, exps, row_sums(exps.T).flatten()
