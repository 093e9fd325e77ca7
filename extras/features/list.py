"""The table of runs: python main.py --list"""

import math

from support.runs import NO_CHECKPOINT, Evaluation, best_checkpoint, list_checkpoints


def list_runs(save_dir):
    """Prints a table of the runs in `save_dir`, those with the lowest losses first.

    Each has its best checkpoint, or the newest if none has a loss. Losses on fewer tokens come
    later; where tokenizers differ, those of all are compared in bits per byte.
    """
    checkpoints = list_checkpoints(save_dir, warn=True)  # newest first
    if not checkpoints:
        print(NO_CHECKPOINT.format(save_dir))
        return
    runs = {}  # {run: its checkpoints, newest first}
    for checkpoint in checkpoints:
        runs.setdefault(checkpoint.folder.name, []).append(checkpoint)
    tokenizers = set()
    for newest, *_ in runs.values():
        tokenizers.add((newest.flags["tokenizer"], str(newest.config.get("vocab_size"))))
    in_bits = len(tokenizers) > 1

    def sort_key(checkpoint):
        evaluation = checkpoint.evaluation or Evaluation(0, math.inf, 0, math.inf)
        return evaluation.bits_per_byte if in_bits else (-evaluation.num_tokens, evaluation.loss)

    columns = f"{'trained':>20}{'bits/byte' if in_bits else 'valid nats':>12}{'of tokens':>12}"
    print(f"{'run':<24}{columns}{'iteration':>12}  checkpoint")
    for checkpoint in sorted(map(best_checkpoint, runs.values()), key=sort_key):
        run = checkpoint.folder.name
        newest = runs[run][0]
        trained = f"{newest.iteration:,} of {newest.flags['num_iters']:,}"
        columns = f"{'-':>12}{'-':>12}"
        evaluation = checkpoint.evaluation
        if evaluation:
            loss = evaluation.bits_per_byte if in_bits else evaluation.loss
            columns = f"{loss:>12.4f}{evaluation.num_tokens:>12,}"
        columns += f"{checkpoint.iteration:>12,}  {checkpoint.id[:12]}"
        print(f"{run:<24}{trained:>20}{columns}")
