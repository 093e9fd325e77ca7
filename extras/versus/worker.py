"""What extras.versus asks of one side, in a process of that side's own code. Not a command.

    python worker.py FOLDER describe FLAGS       what these flags mean, and what a run of them needs
    python worker.py FOLDER serve METADATA GPU   logits of a checkpoint, for the tokens on stdin

FOLDER has the side's files, perhaps those of an older commit: of main.py, only names_for_judge is
used here. What the side itself prints goes to stderr, and is no answer.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.path[0] = str(FOLDER)  # in the place of this file's folder
ANSWERS = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)

READ = set()  # the paths of files that were opened to be read


def note(event, arguments):
    """An audit hook of Python."""
    if event == "open" and isinstance(arguments[0], str) and "w" not in str(arguments[1]):
        READ.add(arguments[0])


sys.addaudithook(note)

import main
import mlx.core as mx
import numpy as np
from datasets import RunError, UsageError
from mlx.utils import tree_flatten


# {a name in names_for_judge: what it was called in commits before}
BEFORE = {
    "resolve_flags": "settle",
    "load_inputs": "begin",
    "RECORDED_FLAGS": "SAVED",
    "PATH_FLAGS": "PATHS",
    "EDITED_FUNCTIONS": "EDITED",
    "explicit": "given",  # of flags
    "parents": "origins",  # of a run
}


def by_now(names):
    """{name: value} of this or an older commit, by the names of now."""
    return Namespace(**names, **{new: names[old] for new, old in BEFORE.items() if old in names})


# Commits before names_for_judge had these names as they are.
SIDE = by_now(getattr(main, "names_for_judge", lambda: vars(main))())


def describe(words):
    """Prepares the text, and answers with a side's fields, see Side in sides.py."""
    flags = SIDE.resolve_flags(SIDE.read_command_line([*map(of_folder, words)]))
    SIDE.use_device(flags.gpu)
    models, flags, dataset = SIDE.load_inputs(flags)
    run = SIDE.make_run(flags.save_dir, flags, None, models, dataset, SIDE.SingleProcess())
    unseeded = None if models else without_seed(run, flags, dataset)
    notices = [line for line in SIDE.start_notices(run) if "edited " not in line]
    # A step loads what is only imported there, and compiles what else a first run would have to.
    SIDE.train_step(run, SIDE.make_step(run.model, run.optimizer, flags, teacher=run.teacher))
    values = {}
    explicit = [*by_now(vars(flags)).explicit]
    for name in explicit:
        # The test text is for the judge alone.
        if name in {*SIDE.RECORDED_FLAGS, "mirror", "gpu"} - {"test_text", "eval_test"}:
            values[name] = getattr(flags, name)
    if os.path.exists(values.get("mirror") or ""):  # its runs have another working directory
        values["mirror"] = os.path.abspath(values["mirror"])
    files = {}
    for name, source in models.items():
        if not SIDE.is_foreign(getattr(flags, name)):
            values[name] = source.id  # its run finds it by that, wherever it is
            paths = {f"{name}/{file}": str(path.resolve()) for file, path in source.files.items()}
            files |= paths
    elsewhere = [*SIDE.PATH_FLAGS, "test_text", "seed"]  # in other fields, or not of a side
    shape = [name for name in SIDE.RECORDED_FLAGS if name not in elsewhere]
    for name in ("valid", "test"):
        split = getattr(dataset, name)
        if split:  # the files that it maps may be written anew for the other side
            split.tokens.astype(np.uint32).tofile(FOLDER / f"{name}.tokens")
    data_dir = dataset.folder.absolute().parents[1]
    answer(
        {
            "words": [*SIDE.arguments_of(values), f"--data_dir={data_dir}"],
            "flags": vars(flags),
            "given": explicit,
            "shape": {name: getattr(flags, name) for name in shape},
            "edited": SIDE.EDITED_FUNCTIONS,
            "notices": notices,
            "files": files,
            "read": files_read(),
            "unseeded": unseeded,
            "origins": by_now(vars(run)).parents,
            "versions": run.versions,
            "parameters": sum(array.size for _, array in tree_flatten(run.model.parameters())),
            "vocab_size": run.model.config.vocab_size,
            "context_size": run.model.config.context_size,
            "texts": dataset.sha256,
            "tokenizer": dataset.tokenizer.to_dict(),
        }
    )


def of_folder(word):
    """A word of a command line, with the side's own file if it names one for --config."""
    flag, equals, path = word.rpartition("=")
    is_own = path.endswith((".yaml", ".yml")) and (FOLDER / path).is_file()
    return f"{flag}{equals}{FOLDER / path}" if is_own else word


def without_seed(run, flags, dataset):
    """What is the same in a run with another seed, though it should not be; or None."""
    other = Namespace(**vars(flags) | {"seed": flags.seed + 1})
    folder, single = flags.save_dir, SIDE.SingleProcess()
    other = SIDE.make_run(folder, other, None, {}, dataset, single)
    weights = [dict(tree_flatten(each.model.trainable_parameters())) for each in (run, other)]
    if all(mx.array_equal(weights[0][name], weights[1][name]) for name in weights[0]):
        return "first weights"
    batches = [[*map(np.array, each.batches.next())] for each in (run, other)]
    if all(map(np.array_equal, *batches)):
        return "order of batches"


def files_read():
    """The paths from FOLDER of what the side has read there, or as if it worked there."""
    paths = [FOLDER / path for path in sorted(READ)]  # absolute ones stay as they are
    return [str(path.relative_to(FOLDER)) for path in paths if FOLDER in path.parents]


def serve(metadata, gpu):
    """Answers rows of tokens [B, L], a line of stdin each, with their logits' shape and bytes.

    Those are [B, L, V] float32.
    """
    SIDE.use_device(gpu == "True")
    model = SIDE.read_checkpoint(Path(metadata)).open().load_model()
    model.train(False)  # as an edited `evaluate` may leave it
    for line in sys.stdin:
        logits = np.array(model(mx.array(json.loads(line))).astype(mx.float32))
        answer(logits.shape, logits.tobytes())


def answer(data, content=b""):
    """Answers with plain data, a line of JSON, and with bytes."""
    ANSWERS.write(json.dumps(data, default=str).encode() + b"\n" + content)
    ANSWERS.flush()


if __name__ == "__main__":
    _, _, question, *arguments = sys.argv
    try:
        describe(arguments) if question == "describe" else serve(*arguments)
    except (RunError, UsageError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
