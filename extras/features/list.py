"""The table of runs: python main.py --list"""

import math
import shlex

from support.cli import printable, utf8
from support.flags import FLAGS, IDENTITY, arguments_of
from support.runs import NO_CHECKPOINT, Evaluation, best_checkpoint, list_checkpoints


def list_runs(save_dir):
    """Prints a table of the runs in `save_dir`, those with the lowest losses first.

    Each has its best checkpoint, or the newest if none has a loss, and the flags that set it apart.
    Losses on fewer tokens come later; where tokenizers differ, those of all are compared in bits
    per byte.
    """
    checkpoints = list_checkpoints(save_dir, warn=True)  # newest first
    if not checkpoints:
        print(NO_CHECKPOINT.format(save_dir))
        return
    runs = {}  # {run: its checkpoints, newest first}
    for checkpoint in checkpoints:
        runs.setdefault(checkpoint.folder.name, []).append(checkpoint)
    flags_by_run = distinguishing_flags(checkpoints)
    tokenizers = set()
    for newest, *_ in runs.values():
        tokenizers.add((newest.flags["tokenizer"], str(newest.config.get("vocab_size"))))
    in_bits = len(tokenizers) > 1

    def sort_key(checkpoint):
        evaluation = checkpoint.evaluation or Evaluation(0, math.inf, 0, math.inf)
        return evaluation.bits_per_byte if in_bits else (-evaluation.num_tokens, evaluation.loss)

    columns = f"{'trained':>20}{'bits/byte' if in_bits else 'valid nats':>12}{'of tokens':>12}"
    print(f"{'run':<24}{columns}{'iteration':>12}  checkpoint    flags")
    for checkpoint in sorted(map(best_checkpoint, runs.values()), key=sort_key):
        run = checkpoint.folder.name
        newest = runs[run][0]
        trained = f"{newest.iteration:,} of {newest.flags['num_iters']:,}"
        columns = f"{'-':>12}{'-':>12}"
        evaluation = checkpoint.evaluation
        if evaluation:
            loss = evaluation.bits_per_byte if in_bits else evaluation.loss
            columns = f"{loss:>12.4f}{evaluation.num_tokens:>12,}"
        columns += f"{checkpoint.iteration:>12,}  {checkpoint.id[:12]}  {flags_by_run[run]}"
        print(f"{run:<24}{trained:>20}{columns}")


def distinguishing_flags(checkpoints):
    """The flags that tell the runs of these checkpoints apart, {run: "--dim=32 --seed=1"}.

    checkpoints: newest first. Of each run, the newest counts.
    """
    newest = {checkpoint.folder.name: checkpoint for checkpoint in reversed(checkpoints)}
    names = []
    for name in FLAGS.names(IDENTITY):
        if len({str(checkpoint.flags[name]) for checkpoint in newest.values()}) > 1:
            names.append(name)
    texts = {}
    for run, checkpoint in newest.items():
        values = {}
        for name in names:
            value = checkpoint.flags[name]
            if isinstance(value, list) and len(value) > 3:
                value = [*value[:2], f"({len(value) - 2:,} more)"]
            values[name] = value
        texts[run] = printable(utf8(shlex.join(arguments_of(values))))
    return texts
