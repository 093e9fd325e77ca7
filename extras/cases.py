"""Probe cases: how likely checkpoints consider the continuations that a user expects.

    python -m extras.cases extras/cases/english.yaml                every checkpoint in the folder
    python -m extras.cases FILE.yaml --identifier best --top_k 10   one of them (or several)
    python -m extras.cases FILE.yaml --identifier "ptb-*"           the newest of each such run
    python -m extras.cases A.yaml B.yaml --output results.json      also saves the results as JSON

A file is a YAML list like `- {prompt: "import ", expected: "os"}`; extras/cases/ has examples.
A case passes if each expected token is among the --top_k most likely ones at its position.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import IDENTIFIERS, make_parser, read_flags, select_checkpoints, start

import json
import math
import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from datasets import encode_after
from main import encode_prompt, read_contents
from support.cli import RunError, UsageError, explain_errors, utf8
from support.flags import SIZE, Flag, path_name, read_yaml


def main(arguments):
    """Scores as these arguments specify.

    Prints a table for each checkpoint. Those that are damaged or need a base that is gone are
    skipped, unless --identifier names them. Raises UsageError if a file cannot be used, RunError
    if no checkpoint can be or --output cannot be written.
    """
    program_flags = {
        "identifier": IDENTIFIERS,
        "top_k": Flag(5, SIZE, "the tokens expected are to be among so many"),
        "output": Flag(None, path_name, "file for the results, as JSON"),
    }
    parser = make_parser("cases", __doc__, "gpu", **program_flags)
    parser.add_argument("files", metavar="FILE", nargs="+", type=path_name, help="YAML, of cases")
    flags = read_flags(parser, arguments)
    cases = read_cases(flags.files, flags.output)
    results = []
    for checkpoint in select_checkpoints(flags):
        try:
            contents = read_contents(checkpoint)
            model = contents.load_model()
        except RunError as error:
            if flags.identifier:
                raise
            print(f"Skipping {checkpoint}: {error}", file=sys.stderr)
            continue
        print(checkpoint)
        passed = 0
        for prompt, expected in cases:
            case = {"checkpoint": checkpoint.id, "prompt": prompt, "expected": expected}
            case |= score_case(model, contents.tokenizer, prompt, expected, flags.top_k)
            print_result(case)
            passed += case["passed"]
            results.append(case)
        print(f"  {passed} of {len(cases)} in the top {flags.top_k}")
    if not results:
        raise RunError(f"no checkpoint in {flags.save_dir} can be used")
    if flags.output:
        text = json.dumps(results, ensure_ascii=False, indent=1)
        with explain_errors(f"cannot write {flags.output}", OSError, raises=RunError):
            Path(flags.output).write_text(text + "\n", "utf-8")


def read_cases(files, output):
    """The cases in YAML files, [(prompt, expected), ...].

    Raises UsageError if one holds anything else or is the file `output`, or if that has no folder.
    """
    needed = "is not a YAML list of entries like - {prompt: a, expected: b}"
    cases = []
    if output and not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise UsageError(f"--output {output} lies in no folder: make it first")
    for path in files:
        if output and os.path.realpath(path) == os.path.realpath(output):
            raise UsageError(f"--output {output} would overwrite {path}: rename it")
        with explain_errors(f"{path} {needed}"):
            # BaseLoader keeps every scalar a string: `yes` does not become a bool, nor 1.0 a float.
            entries = read_yaml(Path(path), "BaseLoader")
            if not entries:
                raise ValueError("it has no case")
            for number, entry in enumerate(entries, 1):
                case = [entry[name] for name in ("prompt", "expected") if name in entry]
                if [*map(type, case)] != [str, str]:
                    raise ValueError(
                        f"its entry {number} has no prompt and expected, each one text"
                    )
                # In JSON, which is also YAML, an emoji may be two surrogates: "\ud83d\ude00".
                cases.append((*map(utf8, case),))
    return cases


def score_case(model, tokenizer, prompt, expected, top_k):
    """How a model scores on one case, as a dict:

    rank: the worst rank of an expected token, where 1 is the most likely token;
    probability: that of the whole continuation, None for a diverged model;
    top: the `top_k` most likely first tokens;
    passed: whether the rank is at most `top_k`.

    rank and probability are None if the continuation has no token, like a space among words, or
    one that the vocabulary lacks. Both texts are truncated on the left to fit the context.
    """
    context_size = model.config.context_size
    [expected_ids] = encode_after(tokenizer, [(expected, prompt[-1:])])
    expected_ids = expected_ids.tolist()[-context_size:]
    if not expected_ids or tokenizer.unknown(expected):
        return {"rank": None, "probability": None, "top": [], "passed": False}
    text = encode_prompt(tokenizer, prompt) + expected_ids
    # The last token is not an input: nothing is expected after it.
    inputs = text[-context_size - 1 : -1]
    # One pass scores all N expected tokens, each after the true ones before it (teacher forcing),
    # not after the model's guesses.
    logits = model(mx.array([inputs]), logits_to_keep=len(expected_ids))[0]  # [N, V]
    targets = mx.array(expected_ids)  # [N]
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)  # [N, 1]
    # Not `>`: the NaNs of a diverged model must not make its rank 1.
    is_more_likely = mx.logical_not(logits <= target_logits)  # [N, V]
    rank = is_more_likely.sum(axis=-1).max().item() + 1
    nats = nn.losses.cross_entropy(logits, targets, reduction="sum").item()
    best = mx.argsort(-logits[0])[:top_k].tolist()
    return {
        "rank": rank,
        "probability": math.exp(-nats) if math.isfinite(nats) else None,
        "top": [tokenizer.decode([token]) for token in best],
        "passed": rank <= top_k,
    }


def print_result(result):
    """Prints a line of the table: pass or fail, rank, probability, case, most likely tokens."""
    verdict = "pass" if result["passed"] else "FAIL"
    probability = "-" if result["probability"] is None else f"{result['probability']:.2e}"
    rank = "-" if result["rank"] is None else f"{result['rank']:,}"
    case = f"{result['prompt'][-24:]!r} {result['expected'][:16]!r}"
    top = " ".join(map(repr, result["top"]))
    print(f"  {verdict} rank {rank:>6} {probability:>9}  {case}: {top}"[:100])


if __name__ == "__main__":
    start("cases", main)
