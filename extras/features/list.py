"""The table of runs: python main.py --list"""

import math
import shlex

from datasets import printable
from main import NO_CHECKPOINT, SEVERAL, SHAPING, Score, arguments_of, best_of, list_checkpoints


def by_run(checkpoints):
    """The checkpoints of each run, {run: [Checkpoint, ...]}, in the order that they have here."""
    runs = {}
    for each in checkpoints:
        runs.setdefault(each.run, []).append(each)
    return runs


def list_runs(save_dir):
    """Prints a table of the runs in `save_dir`, the one with the best score first.

    Each has its best checkpoint, or the newest if none has a score, and the flags that set it
    apart. Scores of other numbers of tokens stand apart; where tokenizers differ, those of all are
    compared in bits per byte.
    """
    checkpoints = list_checkpoints(save_dir, warn=True)  # newest first
    if not checkpoints:
        print(NO_CHECKPOINT.format(save_dir))
        return
    runs = by_run(checkpoints)
    apart = flags_apart(checkpoints)
    several = len({own[0].flags["tokenizer"] for own in runs.values()}) > 1

    def rank(checkpoint):
        score = checkpoint.score or Score(0, math.inf)
        return score.bits if several else (-score.tokens, score.nats)

    columns = f"{'trained':>20}{'bits/byte' if several else 'valid nats':>12}{'of tokens':>12}"
    print(f"{'run':<24}{columns}{'iteration':>12}  checkpoint    flags")
    for each in sorted(map(best_of, runs.values()), key=rank):
        newest = runs[each.run][0]
        trained = f"{newest.iteration:,} of {newest.flags['num_iters']:,}"
        score = f"{'-':>12}{'-':>12}"
        if each.score:
            loss = each.score.bits if several else each.score.nats
            score = f"{loss:>12.4f}{each.score.tokens:>12,}"
        place = f"{each.iteration:>12,}  {each.id[:12]}"
        print(f"{each.run:<24}{trained:>20}{score}{place}  {printable(apart[each.run])}")


def flags_apart(checkpoints):
    """The flags that tell the runs of these checkpoints apart, {run: "--dim=32 --seed=1"}.

    Of each run, the newest checkpoint counts.
    """
    newest = [own[0] for own in by_run(checkpoints).values()]
    apart = []
    for name in SHAPING:
        if len({str(each.flags[name]) for each in newest}) > 1:
            apart.append(name)
    texts = {}
    for each in newest:
        values = {}
        for name in apart:
            values[name] = each.flags[name]
            if name in SEVERAL and len(values[name]) > 3:
                values[name] = [*values[name][:2], f"({len(values[name]) - 2:,} more)"]
        texts[each.run] = shlex.join(arguments_of(values))
    return texts
