"""Runs a side's code, and answers what extras.versus asks about it. Not a command.

    python worker.py FOLDER describe FLAGS       what these flags mean, and what a run of them needs
    python worker.py FOLDER serve METADATA GPU   logits of a checkpoint, for the tokens on stdin

FOLDER has the side's files, perhaps of an older commit, from fc7a359 on. Answers go to stdout; what
the side's own code prints goes to stderr.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

PROJECT = Path(__file__).parents[2]
FOLDER = Path(sys.argv[1])
sys.path[0] = str(FOLDER)  # instead of this file's folder
ANSWERS = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)

import main
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from main import RunError, UsageError, read_contents
from support.code import EDITED_NAMES
from support.flags import FLAGS, RECORDED, arguments_of
from support.runs import PATH_FLAGS, is_hugging_face, read_checkpoint


def describe(*words):
    """Prepares the texts, takes a step, and answers with the fields of a Side (sides.py).

    The tokens of the texts on which a side is scored go to files beside FOLDER.
    """
    flags = main.resolve_flags(main.read_command_line([*map(in_copy, words)]))
    main.use_device(flags.gpu)
    inputs = main.load_inputs(flags)
    if inputs.origin.seen:
        remedy = "name another, or another --valid_text"
        raise UsageError(f"its --init_from or --teacher has learned the validation text: {remedy}")
    flags = inputs.flags
    run = main.make_run(flags.save_dir, inputs)
    check_seed(run, inputs)
    # A step compiles what the first run would have to.
    main.train_step(run, main.make_step(run.model, run.optimizer, flags, teacher=run.teacher))
    values = {}
    for name in flags.explicit:
        if name in ("identifier", "inference", "prompt", "evaluate", "list"):
            raise UsageError(f"--{name} has no effect on a comparison: leave it out")
        # Only the judge gets the test text.
        if name in {*FLAGS.names(RECORDED), "gpu"} - {"test_text", "eval_test"}:
            values[name] = getattr(flags, name)
    files = {}
    for name, source in inputs.models.items():
        if not is_hugging_face(getattr(flags, name)):
            values[name] = source.id  # runs find the model by its id, wherever it is
            for file, path in source.files.items():
                files[f"{name}/{file}"] = str(path.resolve())
    # Not the paths, as hashes stand for their content; nor what does not decide how a run ends.
    names = {*FLAGS.names(RECORDED)} - {*PATH_FLAGS, "test_text", "seed"}
    identity = {name: getattr(flags, name) for name in sorted(names)}
    dataset = inputs.dataset
    for name in ("valid", "test"):
        split = getattr(dataset, name)
        if split:  # a copy, as preparing the other side may rewrite the files that it maps
            split.tokens.astype(np.uint32).tofile(FOLDER.with_suffix(f".{name}"))
    data_dir = dataset.folder.absolute().parents[1]
    answer(
        {
            "words": [*arguments_of(values), f"--data_dir={data_dir}"],
            "flags": vars(flags),
            "identity": identity | run.parents,
            "edited_functions": EDITED_NAMES,
            "files": files,
            "versions": run.versions,
            "num_parameters": sum(array.size for _, array in tree_flatten(run.model.parameters())),
            "vocab_size": run.model.config.vocab_size,
            "context_size": run.model.config.context_size,
            "tokens_sha256": dataset.sha256,
            "tokenizer": dataset.tokenizer.to_dict(),
        }
    )


def in_copy(word):
    """A word of a command line; a YAML file that FOLDER has is named by its path there."""
    flag, equals, path = word.rpartition("=")
    if path.endswith((".yaml", ".yml")):
        path = FOLDER / os.path.relpath(path, PROJECT)
        if path.is_file():
            return f"{flag}{equals}{path}"
    return word


def check_seed(run, inputs):
    """Raises RunError unless another seed gives other first weights and batches than this run's."""
    flags = Namespace(**vars(inputs.flags) | {"seed": inputs.flags.seed + 1})
    other = main.make_run(flags.save_dir, inputs._replace(flags=flags, models={}))
    drawn = {"order of batches": [side.batches.next() for side in (run, other)]}
    if not run.parents:  # else, the first weights are a model's
        models = (run.model, other.model)
        weights = [dict(tree_flatten(model.trainable_parameters())).values() for model in models]
        drawn["first weights"] = weights
    for name, arrays in drawn.items():
        if all(map(mx.array_equal, *arrays)):
            raise RunError(f"all seeds give the same {name}: use flags.seed")


def serve(metadata, gpu):
    """Answers each line of stdin, rows of tokens [B, L], with their logits' shape and bytes.

    Logits are [B, L, V] float32.
    """
    main.use_device(gpu == "True")
    model = read_contents(read_checkpoint(Path(metadata))).load_model()
    model.train(False)  # for layers with two modes
    for line in sys.stdin:
        logits = np.array(model(mx.array(json.loads(line))).astype(mx.float32))
        answer(logits.shape, logits.tobytes())


def answer(data, content=b""):
    """Writes an answer: plain data as a line of JSON, then bytes."""
    ANSWERS.write(json.dumps(data, default=str).encode() + b"\n" + content)
    ANSWERS.flush()


if __name__ == "__main__":
    _, _, question, *arguments = sys.argv
    try:
        {"describe": describe, "serve": serve}[question](*arguments)
    except (RunError, UsageError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
