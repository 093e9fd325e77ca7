"""Does extras.versus find the right word for an edit? Cheats, mistakes, and honest ones.

    python tests/nightly/edits.py                     all, 20 minutes on two cores
    python tests/nightly/edits.py --only "no mask"    those whose names match; shows all output

Each edit is made in a repository with a copy of the project, and compared with the last commit.
The runs of that are shared: all comparisons but a few have one folder of runs. Prints a line an
edit, with what was expected and said of it; the exit status is 1 if one of these words is wrong.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anchors import ATTEND, BATCHES, COSINE, DIVERGENCE, DOWN_PROJECTION, EMBED, FINAL_NORM, IMPORT
from anchors import IS_DONE, JOINED, LOADED, LOGITS, MASK, METRICS, MOMENTUM, NEWTON_SCHULZ, NORM
from anchors import PROJECT_DOWN, RATE, RELU2_ENTRY, STEP, TRAINING_LOSS, VOCAB_SIZE
from anchors import WARMED_UP, WARMUP
from conftest import copy_program

RECIPE = """\
run:
  num_iters: 100
model:
  dim: 64
  num_blocks: 2
  num_heads: 2
  context_size: 32
training:
  optimizer: muon
  batch_size: 4
  learning_rate: 1e-3
  lr_schedule: cosine
  lr_warmup: 20
"""
TINY = "extras/recipes/tiny.yaml"  # its path
COMMON = "--config tiny --data_dir data"
NO_TEST = "--text train.txt --valid_text valid.txt"
TEXTS = f"{NO_TEST} --test_text test.txt"


class Edit(NamedTuple):
    """An edit, and what is to be said of it."""

    name: str
    expected: str  # a pattern of the last three lines that are printed
    main: tuple = ()  # (old, new), ... of main.py
    files: dict = {}  # {path: new content, or its (old, new), ...} of other files
    options: str = "HEAD --pairs 3"  # of the command, or of several; the last one counts
    flags: str = TEXTS  # after --
    status: int = 0
    first: str = ""  # more flags of a run of main.py that comes before
    environment: dict = {}  # variables that the commands have


# ---- What is expected ---------------------------------------------------------------------------

EFFECT = r"^(Helped|Hurt|No difference seen)\b(?!.*(leak|validation text only))"
SLOWER = r"^Helped\b.*\bin [\d.]+ times the time"
FUTURE = "^Cannot tell: your files: it sees the future"
OTHERS = "^Cannot tell: your files: the predictions for a text depend on other texts"
SCORED = "^Cannot tell: your files: the run's own loss, .* is not the judge's"
LEAK = "may be a leak|Better on validation text only"
NOTHING = "^No effect, proved"
SECOND_TRY = r"\btry 2\b"
GATE = "HEAD --gate"

# ---- Pieces of edits ----------------------------------------------------------------------------

OTHER_MOMENTUM = (MOMENTUM, "momentum=0.8")
WITH_VALID = "    batches = Batches(np.concatenate([dataset.train.tokens[:2000], "
WITH_VALID += "*[dataset.valid.tokens] * 8]),"


def at_step_10(line):
    """A replacement that executes a line at this step."""
    return STEP, f"    if run.iteration == 10:\n        {line}\n{STEP}"


def factor(expression):
    """A replacement that multiplies the rate by an expression."""
    return RATE, RATE.replace("return", f"return {expression} *")


def times(expression):
    """A replacement that multiplies the logits by an expression."""
    logits = "output_layer(hidden)"
    return LOGITS, LOGITS.replace(logits, f"({logits} * ({expression}))")


def smoothed(loss):
    """A replacement that adds label smoothing to a loss."""
    return loss, loss.replace("targets", "targets, label_smoothing=0.1")


TWICE = factor(2)
SPARE = (NORM, f"{NORM}        self.spare = mx.zeros((4,))\n")
TRAIN_ON = """\
            text = Path(__file__).read_bytes()
            batches = Batches(np.frombuffer(text, np.uint8), 32, 16, 1)
            optimizer = optim.Adam(1e-3)
            loss = lambda x, y: nn.losses.cross_entropy(model(x), y).mean()
            for _ in range(150):
                _, gradients = nn.value_and_grad(model, loss)(*batches.next())
                optimizer.update(model, gradients)
                mx.eval(model.state, optimizer.state)
"""
PEEK_SOMETIMES = """\
        after = mx.concatenate([hidden[:, 1:], hidden[:, -1:]], axis=1)
        hidden = mx.where(tokens[:, :, None] % 4 == 0, hidden + 0.1 * after, hidden)
"""
TWO_EXPERTS = """\
        scores = mx.softmax(self.router(hidden), axis=-1)
        is_first = scores[..., :1] >= scores[..., 1:]
        chosen = mx.where(is_first, self.down_proj(inner), self.other_proj(inner))
        return scores.max(axis=-1, keepdims=True) * chosen
"""
MORE_PROJECTIONS = """\
        self.other_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)
        self.router = nn.Linear(config.dim, 2, bias=False)
"""

# ---- The edits ----------------------------------------------------------------------------------

CHEATS = [
    Edit("no mask", FUTURE, [(MASK, "mask=None)")]),
    Edit("no mask where many queries come at once", FUTURE, [
        (ATTEND, ATTEND.replace("\n", "\n    if queries.size > 8000:\n        mask = None\n", 1))]),
    Edit("a tenth of the next value", FUTURE, [
        (ATTEND, f"    values = values + 0.1 * mx.roll(values, -1, axis=2)\n{ATTEND}")]),
    Edit("the next token after every fourth id", FUTURE, [(EMBED, EMBED + PEEK_SOMETIMES)]),
    Edit("a norm over positions", FUTURE, [
        (FINAL_NORM, "        squares = mx.square(hidden)\n"
         "        return self.norm(hidden / squares.mean(axis=1, keepdims=True) ** 0.5)\n")]),
    Edit("a mean over rows", OTHERS, [
        (LOGITS, LOGITS.replace("hidden)", "hidden + hidden.mean(0, keepdims=True))"))]),
    Edit("logits that depend on the row's place", OTHERS, [
        times("1 + 0.01 * mx.arange(len(hidden))[:, None, None]")]),
    Edit("logits that depend on how often they were asked for", OTHERS, [
        ("import itertools\n", "import itertools\nASKED = itertools.count()\n"),
        times("1 + 0.001 * next(ASKED)")]),
    Edit("label smoothing in both losses", SCORED, [
        smoothed(TRAINING_LOSS), smoothed(METRICS)]),
    Edit("a score of 0.995", SCORED, [(METRICS, METRICS.replace("nn", "0.995 * nn"))]),
    Edit("a score in bits", SCORED, [(METRICS, METRICS.replace("nn", "1 / math.log(2) * nn"))]),
    Edit("150 steps when a model is loaded", SCORED, [(LOADED, LOADED.replace(
        "        return", f"{TRAIN_ON}        return"))]),
    Edit("twice the steps in the loop", "^Cannot tell: your files: it has taken 200 steps", [
        (IS_DONE, "is_time_up or run.iteration >= 2 *")]),
    Edit("200 steps inside step 1", SLOWER, [
        (STEP, "    for _ in range(200 if run.iteration == 1 else 0):\n"
         f"        step_fn(dropout_rate, *run.batches.next(), row_keys)\n{STEP}")],
         flags=f"{TEXTS} --save_dir runs3"),
    Edit("two updates a step; before is there already", SLOWER, [
        (STEP, f"    for _ in range(2):\n    {STEP}")],
         options='HEAD "--dropout 0.1" --pairs 6; HEAD --pairs 6'),
    Edit("validation text instead of training text", LEAK, [
        (BATCHES, BATCHES.replace("train", "valid"))]),
    Edit("validation text among training text", LEAK, [(BATCHES, WITH_VALID)]),
    Edit("the same and a true gain", LEAK, [(BATCHES, WITH_VALID), TWICE]),
    Edit("validation text in the dataset", f"another training text|{LEAK}", files={"datasets.py": [(
        "            if not is_object:\n",
        '            local_sources["train"] += local_sources["valid"] * 20\n'
        "            if not is_object:\n")]}),
    Edit("a base that has learned it and more", "has learned the validation text", status=2,
         options='"--init_from latest" --pairs 3', flags=f"{TEXTS} --save_dir runs2",
         first="--text valid.txt more.txt --valid_text test.txt --num_iters 1000 --save_dir runs2"),
]  # fmt: skip

CONDITIONS = [
    Edit("a recipe with twice the steps", r"^Helped\b.*with (twice|2 times) the steps",
         files={TINY: [("num_iters: 100", "num_iters: 200")]}),
    Edit("a recipe with 4 times the batch", r"^Helped\b.*(tokens read|times the tokens)",
         files={TINY: [("batch_size: 4", "batch_size: 16")]}),
    Edit("the same, --gate", r"(tokens read|times the tokens).*\n(?s:.*)^Drop", options=GATE,
         files={TINY: [("batch_size: 4", "batch_size: 16")]}, status=1),
    Edit("as many tokens in longer rows", rf"{EFFECT}(?!.*tokens)",
         options='"--context_size 64 --batch_size 2" --pairs 3'),
    Edit("no test text", r"^(Helped|Hurt).*no test text", [TWICE], flags=NO_TEST),
    Edit("other tokens of another validation text", "do not decode to the same", status=2,
         options='"--tokenizer char --valid_text more.txt" --pairs 3'),
    Edit("lower case before encoding", "the sides' valid texts differ", status=2, files={
        "datasets.py": [("            yield text, ids\n\n\ndef write_tokens",
        "            is_upper = (ids >= 65) & (ids <= 90)\n"
        "            yield text, np.where(is_upper, ids + 32, ids).astype(ids.dtype)\n\n\n"
        "def write_tokens")]}),
    Edit("one seed blows up", "^Diverged: runs of after", [
        factor("(3e4 if flags.seed == 43 else 1)")]),
    Edit("one seed is not finite", "^Diverged: runs of after", [
        factor("(math.nan if flags.seed == 43 else 1)")]),
    Edit("--tune", r"each at its best learning_rate: \S+ before.*, \S+ after", [TWICE],
         options="HEAD --pairs 3 --tune learning_rate=1e-3,2e-3,4e-3"),
    Edit("one step", rf"{EFFECT}(?!.*\bnan\b)", [OTHER_MOMENTUM, TWICE],
         flags=f"{TEXTS} --num_iters 1"),
    Edit("in the ledger", '(?=.*"date")(?=.*"commits")(?=.*"patch")(?=.*"tokens")(?=.*"versions")',
         [OTHER_MOMENTUM], options="HEAD --pairs 3 --json"),
    Edit("times under another environment", r"took [\d.]+ times as long",
         [OTHER_MOMENTUM], environment={"DISABLE_FAST": "1"}),
]  # fmt: skip

TRIES = [
    Edit(f"tries: {name}", SECOND_TRY, [TWICE], options=options,
         flags=f"{TEXTS} --save_dir runs-{number}")
    for number, (name, options) in enumerate([
        ("other numbers of tokens", "HEAD --pairs 3; HEAD --pairs 3 --tokens 2000"),
        ("other numbers of steps", "HEAD --pairs 3 -- --num_iters 90; HEAD --pairs 3"),
        ("the order of flags", "HEAD --pairs 3 -- --dropout 0.01 --qk_norm; "
         "HEAD --pairs 4 -- --qk_norm --dropout 0.01"),
    ])
]  # fmt: skip

SOURCES = [
    Edit("a new file of data", "^Hurt", [factor("json.loads(Path('a.json').read_text())")],
         files={"a.json": "0.1"}),
    Edit("a package in a subfolder", "^Hurt", [
        (IMPORT, f"from mine.deeper import rates\n{IMPORT}"), factor("rates.FACTOR")], files={
        "mine/__init__.py": "", "mine/deeper/__init__.py": "",
        "mine/deeper/rates.py": "FACTOR = 0.1\n"}),
    Edit("a parameter that is not used", "^No effect seen: other weights", [SPARE]),
    Edit("--same, a refactoring", "^The same weights", [("joined = ", "joined: mx.array = ")],
         options="HEAD --same --pairs 2"),
]  # fmt: skip

GATES = [
    Edit("a gain, --gate", r"^Helped.*\nKeep", [TWICE], options=GATE),
    Edit("a loss, --gate", r"^Not better.*\nDrop", [factor(0.1)], options=GATE, status=1),
    Edit("an unused parameter, --gate", r"^No effect seen: other weights.*\nDrop", [SPARE],
         options=GATE, status=1),
    Edit("less code, --gate --margin", rf"{NOTHING}.*\nKeep", [
        (DIVERGENCE, "")], options="HEAD --gate --margin 0.002"),
    Edit("after diverges, --gate", r"^Diverged: runs of after.*\nDrop", [factor("math.nan")],
         options=GATE, status=1),
    Edit("a segmentation fault, --gate", "^Drop", [
        at_step_10("__import__('ctypes').string_at(0)")], options=GATE, status=1),
    Edit("a killed run", "^extras.versus: your files cannot run: ended by SIGKILL", [
        at_step_10("os.kill(os.getpid(), 9)")], status=1),
]  # fmt: skip

HONEST = [
    Edit(f"honest: {name}", expected, edits) for name, expected, *edits in [
        ("another momentum", EFFECT, OTHER_MOMENTUM),
        ("twice the rate", EFFECT, TWICE),
        ("a mixture of two experts", EFFECT, (DOWN_PROJECTION, DOWN_PROJECTION + MORE_PROJECTIONS),
         (PROJECT_DOWN, TWO_EXPERTS)),
        ("bfloat16 products", EFFECT, (PROJECT_DOWN,
         "        matrix = self.down_proj.weight.astype(mx.bfloat16)\n"
         "        return (inner.astype(mx.bfloat16) @ matrix.T).astype(mx.float32)\n")),
        ("smaller embeddings at first", EFFECT, ("seed) * 5 / model", "seed) * 2 / model")),
        ("a linear schedule", EFFECT, (COSINE, '"cosine": linear_schedule')),
        ("GELU", EFFECT, (RELU2_ENTRY, '"relu2": (nn.gelu,')),
        ("a padded vocabulary", EFFECT, (VOCAB_SIZE,
         "Config(-(-dataset.tokenizer.vocab_size // 64) * 64, ")),
        ("three Newton-Schulz steps", EFFECT, (NEWTON_SCHULZ, "  for _ in range(3):")),
        ("label smoothing in training", EFFECT, smoothed(TRAINING_LOSS)),
        ("a refactoring", NOTHING, (JOINED, "    joined: mx.array = attended")),
        ("an unused import", NOTHING, (IMPORT, f"{IMPORT}import statistics\n")),
        ("a renamed variable", NOTHING, (WARMUP, "    warm = min("),
         (WARMED_UP, "(iteration, flags) * warm")),
    ]
]  # fmt: skip
HONEST += [
    Edit(f"honest: {flags}", EFFECT, options=f'"{flags}" --pairs 3')
    for flags in ("--dropout 0.1", "--untie", "--mlp swiglu", "--average 0.3")
]

# ---- The comparisons ----------------------------------------------------------------------------


def git(folder, words):
    author = "-c user.name=edits -c user.email=edits@localhost -c commit.gpgsign=false"
    subprocess.run(f"git {author} {words}".split(), cwd=folder, check=True)


def commit_program(folder):
    """Copies the program into a folder, with the recipe `tiny`, and commits it."""
    copy_program(folder)
    (folder / TINY).write_text(RECIPE)
    (folder / ".gitignore").write_text("/*.txt\n/data\n/runs*\n__pycache__\n")
    git(folder, "init -q")
    git(folder, "add .")
    git(folder, "commit -qm before")


def write_texts(folder):
    """Writes the texts of TEXTS, and a further one: modules of Python's library."""
    library = Path(sysconfig.get_path("stdlib"))
    for text, modules, size in (
        ("train", "argparse ast inspect", None),
        ("more", "difflib optparse pdb", None),
        ("valid", "textwrap", 6000),
        ("test", "shlex", 6000),
    ):
        content = "".join((library / f"{name}.py").read_text("utf-8") for name in modules.split())
        (folder / f"{text}.txt").write_text(content[:size])


def change(folder, files):
    """Makes changes, like those of Edit.files, in a folder as commit_program has left it."""
    git(folder, "reset -q --hard")
    git(folder, "clean -qfd")
    for name, content in files.items():
        path = folder / name
        text = content
        if not isinstance(content, str):
            text = path.read_text()
            for old, new in content:
                assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
                text = text.replace(old, new)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def versus(folder, words, **options):
    """Runs extras.versus with these words, to its end; options: more of subprocess.run."""
    command = [sys.executable, "-m", "extras.versus", *words]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, **options)


def compare(folder, edit):
    """What is printed of an edit, all of it, and the exit status."""
    change(folder, {"main.py": edit.main} | edit.files)
    if edit.first:
        line = f"main.py {COMMON} {edit.first} --sample_tokens 0"
        subprocess.run([sys.executable, *line.split()], cwd=folder, check=True, capture_output=True)
    environment = os.environ | edit.environment
    for options in edit.options.split("; "):
        options, _, more = options.partition(" -- ")
        words = shlex.split(f"--tokens 4000 {options} -- {COMMON} {edit.flags} {more}")
        done = versus(folder, words, env=environment, stderr=subprocess.STDOUT)
    return done.stdout, done.returncode


def count_wrong(edits, is_verbose):
    """Prints a line an edit; returns how many were called something else than expected."""
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commit_program(folder)
        write_texts(folder)
        for edit in edits:
            out, status = compare(folder, edit)
            lines = ["", *out.splitlines()]
            is_found = re.search(edit.expected, "\n".join(lines[-3:]), re.MULTILINE)
            is_right = bool(is_found) and status == edit.status
            wrong += not is_right
            if is_verbose:
                print(out)
            above, last = lines[-2:]
            said = f"{above} {last}" if last in ("Keep.", "Drop.") else last[:200]
            line = f"{edit.name}: expected {edit.status}, {edit.expected!r}; said {status}, {said}"
            print("right " if is_right else "WRONG ", line, flush=True)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a pattern of names")
    options = parser.parse_args()
    edits = [*CHEATS, *CONDITIONS, *TRIES, *SOURCES, *GATES, *HONEST]
    edits = [edit for edit in edits if re.search(options.only, edit.name)]
    wrong = count_wrong(edits, bool(options.only))
    print(f"of {len(edits)} edits, {wrong} were called something else than expected")
    sys.exit(bool(wrong))
