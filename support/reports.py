"""What a run says of itself: on the screen, in its folder, and to a dashboard."""

import contextlib
import csv
import io
import json
import math
import os
import shlex
import shutil

import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from support.cli import RunError, for_terminal, one_line, plural, printable, progress_bar, say
from support.cli import warning
from support import code
from support.code import EDITED_NAMES, describe_edit, edited_files, read_code
from support.files import atomic_write, is_on_ram_disk, open_no_follow, size_of
from support.flags import FLAGS, ineffective_flag_notices
from support.machine import REFERENCE_BLAS, available_cores
from support.runs import best_evaluation, checkpoints_in, resume_command

# How metrics are shown on the screen, and which of them in the bar: main.py fills these.
METRIC_FORMATS = {}
BAR_METRICS = []

# ---- The start and the end of a command --------------------------------------------------------


def print_start(run, checkpoint, rate, note=None):
    """Prints the start screen: what is trained, on what data, and where its files go.

    checkpoint: the one that is resumed, or None; rate: see describe_schedule; note: one more line.
    """
    flags = run.flags
    config = run.model.config
    dataset = run.dataset
    versions = run.versions
    lengths = [f"{len(split.tokens):,} {name}" for name, split in dataset.splits.items()]
    rows_per_step = run.batches.rows_per_step
    steps_per_epoch = len(run.batches.perm) // rows_per_step or 1
    epochs = flags.num_iters * rows_per_step * config.context_size / len(dataset.train.tokens)
    num_parameters = count_parameters(run.model.parameters())
    num_trainable = count_parameters(run.model.trainable_parameters())
    trainable = f", {num_trainable:,} trainable" if num_trainable < num_parameters else ""
    ranks = f", {versions['ranks']} ranks" if versions["ranks"] > 1 else ""
    lines = [
        f"run      {run.folder.name}, from iteration {run.iteration:,} to {flags.num_iters:,}, "
        f"seed {flags.seed}",
        f"model    {num_parameters:,} parameters{trainable}: {plural(config.num_blocks, 'block')}, "
        f"dim {config.dim}, {plural(config.num_heads, 'head')} "
        f"({plural(config.num_kv_heads, 'key/value head')}), {config.mlp} {config.mlp_dim}, "
        f"context {config.context_size}",
        f"data     {dataset.name}: {' / '.join(lengths)} tokens; "
        f"{dataset.tokenizer}; in {dataset.folder}",
        f"steps    {rows_per_step} x {config.context_size} tokens, {steps_per_epoch:,} per epoch, "
        f"{epochs:,.2f} epochs in all; {flags.optimizer}, {versions['dtype']}",
        f"rate     {describe_schedule(flags, rate)}",
        f"machine  {versions['device']}{ranks}; MLX {versions['MLX']}, "
        f"matmuls: {versions['BLAS']}, kernels: {versions['kernels']}",
        f"files    {run.folder.absolute()}",
    ]
    if checkpoint:
        lines += describe_resume(checkpoint, run)
    if note:
        lines.append(note)
    say(printable("\n".join([*lines, *start_notices(run)])))


def describe_schedule(flags, rate):
    """The learning rate at the first step of a run, at the end of warmup, and at the last step.

    rate: a function of the step, counted from 0.
    """
    texts = []
    for step in sorted({1, min(max(1, flags.lr_warmup), flags.num_iters), flags.num_iters}):
        texts.append(f"{rate(step - 1):.3g} (step {step:,})")
    return f"{flags.lr_schedule}: {', '.join(texts)}"


def count_parameters(tree):
    """The number of weights in a tree of arrays."""
    return sum(array.size for _, array in tree_flatten(tree))


def start_notices(run):
    """Yields a line for whatever may surprise the user of a run."""
    flags = run.flags
    for path in edited_files(run.code):
        yield f"{path} was edited since it was loaded: the edit is not in this run."
    yield from describe_edited()
    tokenizer = run.dataset.tokenizer
    if tokenizer.bos:
        yield f"Each text begins with {tokenizer.decode(tokenizer.bos)}, as for the base model."
    if len(run.batches.perm) < run.batches.rows_per_step:
        yield "The text has fewer windows than a step has rows: some repeat within each step."
    if run.versions["kernels"] == "main.py":
        yield (
            "Without extras/features/fast.py, products are in float32 and, on a Linux CPU, take "
            "about 30 times as long."
        )
    elif run.versions["BLAS"] == REFERENCE_BLAS:
        yield (
            "Matrix products are slow, and in float32: a fast library for them needs a C compiler "
            "(apt install g++) and NumPy from PyPI or, on x86-64, pip install onednn-cpu-gomp."
        )
    elif flags.dtype != run.versions["dtype"]:
        yield (
            "Computing in float32: bfloat16 is not faster here. It would be with --gpu, or on an "
            "AMD CPU with AVX-512 BF16 or an Intel CPU with AMX, after pip install onednn-cpu-gomp."
        )
    cores = available_cores()
    if run.origin.cores > cores:
        yield f"This run was begun on {run.origin.cores} cores; on {cores}, it ends the same."
    dataset = run.dataset
    num_targets = len(dataset.valid.tokens) - 1
    size = run.origin.eval_size
    if size < num_targets and flags.steps_per_eval:
        yield f"Evaluations score {size:,} of {num_targets:,} held-out tokens, evenly spread."
    if run.origin.seen:
        share = f"{run.origin.seen:.0%}"
        yield f"--init_from or --teacher was trained on about {share} of the validation text."
    if dataset.sha256["train"] == dataset.sha256["valid"]:
        yield "The validation text is the training text."
    _, arrays = run.snapshot()
    # Beside those that are kept, the best one, and the one that is being written.
    needed = (flags.keep + 2) * sum(array.nbytes for _, array in tree_flatten(arrays)) / 2**30
    free = (shutil.disk_usage(run.folder).free + size_of(run.folder)) / 2**30
    if needed > free:
        yield (
            f"Checkpoints may take {needed:.1f} GiB, and {flags.save_dir} has {free:.1f}: give a "
            "smaller --keep, or another --save_dir."
        )
    for folder in (run.folder.parent, dataset.folder):
        if is_on_ram_disk(folder):
            yield f"{folder} is on a RAM disk: it takes memory, and is gone after a restart."
    is_new = run.checkpoint_id is None
    if is_new and "config" in flags.explicit and not {"dataset", "text"} & {*flags.explicit}:
        yield f"The --config names no text, so this is {run.dataset.name}; --text FILE names yours."
    yield from ineffective_flag_notices(flags)


def announce(checkpoint):
    """Says which checkpoint a command uses, and whether other code trained it."""
    line = f"{checkpoint}, in {checkpoint.folder.parent}"
    if describe_edit(checkpoint, code_of(checkpoint)):
        line += ", trained by other code than this"
    warning("\n".join([line, *describe_edited()]))


def describe_edited():
    """A line that names the edited functions, in a list; [] without any."""
    names = ", ".join(EDITED_NAMES)
    return [f"edited   {names}: computed by main.py, not by fast.py"] if names else []


def code_of(checkpoint):
    """The code that would train the run of a checkpoint now, see read_code."""
    reads_rows = "extras/features/formats.py" in checkpoint.segments[-1].code
    return read_code(checkpoint.flags, reads_rows)


def describe_resume(checkpoint, run):
    """Yields lines on what has changed in a resumed run since its checkpoint."""
    flags = run.flags
    changes = describe_changes(checkpoint.flags, vars(flags), "--")
    yield f"resumed  with {changes or 'unchanged flags'}"
    if checkpoint.folder.name != run.folder.name:
        yield f"This is a branch of {checkpoint.folder.name}, which stays as it is."
    has_schedule = flags.lr_schedule != "constant" or flags.dropout_final is not None
    if has_schedule and checkpoint.flags["num_iters"] != flags.num_iters:
        yield "Schedules of the learning rate and of dropout now end at --num_iters."
    edit = describe_edit(checkpoint, run.code)
    if edit:
        yield f"Code changed since iteration {checkpoint.iteration:,} ({edit})."
    changes = describe_changes(checkpoint.segments[-1].versions, run.versions)
    if changes:
        yield f"Environment changed ({changes}): resume may not be bit-exact."


def describe_changes(old, new, prefix=""):
    """Changed values, in words: "--dim 32 -> 64, --seed 1 -> 2"."""
    changed = [name for name in old if old[name] != new.get(name)]
    return ", ".join(f"{prefix}{name} {old[name]} -> {new.get(name)}" for name in changed)


def describe_end(run, stop_signal, arguments, note=None):
    """The last lines of a command: where the run is, and what to type next.

    arguments: those of the command; note: one more line.
    """
    flags = run.flags
    if run.checkpoint_id is None:
        return f"Stopped at iteration {run.iteration:,}; nothing was saved yet."
    resume = resume_command(flags, run.folder.name)
    trained = f"{plural(run.iteration, 'iteration')} in {tqdm.format_interval(run.seconds)}"
    if run.evaluations:
        best = best_evaluation(run.evaluations)
        trained += f", best: valid {best.loss:.4f} nats at iteration {best.iteration:,}"
    if stop_signal:
        way = resume_command(flags)
        typed = one_line(shlex.join(["python", code.main_file, *map(str, arguments)]))
        if run.versions["ranks"] > 1:
            way = "the same command"
        elif typed != way and not flags.new_model:
            way = f"the same command ({typed}); after an edit: {way}"
        ended = f"Stopped at iteration {run.iteration:,}. To resume: {way}"
    else:
        ended = f"Ended at iteration {run.iteration:,} of {flags.num_iters:,}"
        more = ""
        if run.is_out_of_patience():
            more = f" --patience {run.evaluations_since_best() + flags.patience}"
        if run.iteration >= flags.num_iters:
            ended = f"Run complete ({run.iteration:,}/{flags.num_iters:,})"
            more += f" --num_iters {2 * run.iteration}"
        ended += f". To sample: {resume} --inference\nTo train on: {resume}{more}"
    where = f"Files: {run.folder.absolute()}, {size_of(run.folder) / 2**20:,.0f} MiB"
    return "\n".join(filter(None, [trained, where, ended, note]))


def divergence_error(run, what, iteration):
    """The RunError for a run whose `what` is not finite.

    It gives a command that goes back to the newest checkpoint before `iteration`, which is good, as
    the step after it was finite.
    """
    remedy = "start over with --new_model"
    for checkpoint in checkpoints_in(run.folder):  # newest first
        if checkpoint.iteration < iteration:
            remedy = f"go back with {resume_command(run.flags, checkpoint.id[:12])}"
            break
    return RunError(
        f"the {what} of iteration {run.iteration:,} is not finite: choose a lower --learning_rate "
        f"or a stricter --grad_clip (0: none), and {remedy}"
    )


# ---- Training -----------------------------------------------------------------------------------

# tqdm's own format without steps per second; with these metrics, it fits into 80 columns.
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Reporter:
    """Reports a run's metrics and samples: on the screen, in its folder, and to a dashboard."""

    def __init__(self, run, dashboard=None):
        """dashboard: of report.py in extras."""
        self.run = run
        self.dashboard = dashboard
        self.timed_from = None  # (iteration, seconds) at the last report or after the first step
        self.has_warned = False
        self.failed_files = set()  # names of files that could not be written
        total = max(run.flags.num_iters, run.iteration)
        self.bar = progress_bar(
            total=total, initial=run.iteration, dynamic_ncols=True, bar_format=BAR_FORMAT
        )
        self.log = Log(run)

    def close(self):
        self.bar.close()
        if self.dashboard:
            self.dashboard.close()

    def report_step(self, metrics):
        """Advances the bar; every --steps_per_report steps, shows and logs metrics, {name: number}.

        `loss` is then the mean since the last report, as speeds are; other metrics are those of the
        last step.
        """
        run = self.run
        if self.timed_from is None:
            self.timed_from = (run.iteration, run.seconds)
            self.bar.unpause()  # leaves the first step out of the estimate
        self.bar.update()
        if run.iteration % run.flags.steps_per_report:
            return
        metrics = metrics | {"loss": run.recent_loss / run.recent_steps}
        start_iteration, start_seconds = self.timed_from
        seconds = run.seconds - start_seconds
        if seconds:  # none after the first step, which is not timed
            steps = run.iteration - start_iteration
            self.warn_once(seconds / steps * (self.bar.total - run.iteration))
            num_tokens = steps * run.batches.rows_per_step * run.flags.context_size
            metrics["ms_per_step"] = 1000 * seconds / steps
            metrics["tokens_per_second"] = num_tokens / seconds
        metrics |= {"epoch": run.epochs, "peak_mib": mx.get_peak_memory() / 2**20}
        self.show(metrics)
        train_split = run.dataset.train
        if train_split.num_bytes is not None and run.teacher is None:  # a teacher's is mixed in
            metrics["bits_per_byte"] = train_split.bits_per_byte(metrics["loss"])
        self.log_metrics("train", metrics)
        self.timed_from = (run.iteration, run.seconds)

    def warn_once(self, seconds):
        """Says how long a run of the defaults will take, if that is more than an hour."""
        is_default = self.run.flags.num_iters == FLAGS.defaults["num_iters"]
        if seconds > 3600 and is_default and not self.has_warned:
            time = tqdm.format_interval(seconds)
            say(f"This will take {time}; python main.py --config first takes two minutes.")
        self.has_warned = True

    def show(self, metrics):
        """Shows the metrics of the steps up to the current iteration."""
        if not self.bar.disable:
            shown = {name: metrics[name] for name in BAR_METRICS if name in metrics}
            self.bar.set_postfix_str(", ".join(format_metrics(shown)))
            return
        texts = format_metrics(metrics)
        texts.append(f"time {tqdm.format_interval(self.run.seconds)}")
        if "ms_per_step" in metrics:
            seconds_left = (self.bar.total - self.run.iteration) * metrics["ms_per_step"] / 1000
            texts.append(f"left {tqdm.format_interval(seconds_left)}")
        say("  ".join([f"{self.run.iteration:,}/{self.bar.total:,}", *texts]))

    def report_evaluation(self, losses, metrics, seconds):
        """Shows the losses of the validation split, in words, and logs its metrics.

        It took `seconds`.
        """
        run = self.run
        train_text = ""
        if run.recent_steps and run.teacher is None:
            train_text = f"train {run.recent_loss / run.recent_steps:.4f}, "
        elapsed = tqdm.format_interval(run.seconds)
        times = f"epoch {run.epochs:.2f}, time {elapsed}, evaluated in {seconds:.1f} s"
        say(f"iteration {run.iteration:,}: {train_text}{losses}; {times}")
        bits = run.dataset.valid.bits_per_byte(metrics["loss"])
        self.log_metrics("valid", metrics | {"bits_per_byte": bits})

    def log_metrics(self, split, metrics):
        """Adds metrics, {name: number}, to the log, and sends them to the dashboard."""
        place = {"iteration": self.run.iteration, "split": split}
        totals = {"tokens_seen": self.run.tokens_seen, "seconds": self.run.seconds}
        # `place` comes first, for the order of columns, and last, so that no metric replaces it.
        row = place | metrics | totals | place
        with self.writing("log.csv"):
            self.log.append(row)
        if self.dashboard:
            self.dashboard.append(row)

    def report_sample(self, prompt, text):
        """Shows a sample, and adds it to the run's samples.jsonl."""
        shown = prompt + text
        if self.run.flags.sample_tokens == FLAGS.defaults["sample_tokens"]:
            shown = "\n".join(shown.split("\n")[:5])
        say(f"sample: {for_terminal(shown)}")
        row = {"iteration": self.run.iteration, "prompt": prompt, "text": text}
        with self.writing("samples.jsonl"):
            path = self.run.folder / "samples.jsonl"
            with open(path, "a", encoding="utf-8", opener=open_no_follow) as file:
                file.write(json.dumps(row) + "\n")

    @contextlib.contextmanager
    def writing(self, name):
        """Turns an OSError in this block into one message per file, so that the run goes on."""
        try:
            yield
        except OSError as error:
            if name not in self.failed_files:
                say(f"Cannot write {name}; the run goes on. {one_line(error)}")
            self.failed_files.add(name)


def format_metrics(metrics):
    """Metrics, {name: number}, for the screen: a list of texts."""
    return [METRIC_FORMATS.get(name, name + " {:.4g}").format(metrics[name]) for name in metrics]


def describe_losses(name, metrics, split, tokenizer, mark=""):
    """A split's loss, per token and in units that do not depend on the tokenizer; other metrics.

    metrics: those of main.evaluate; mark: a note on the loss, such as " (best)".
    """
    loss = metrics["loss"]
    unit = "word" if tokenizer.kind == "word" else "token"
    texts = [f"{name} {loss:.4f} nats{mark}", f"perplexity {perplexity(loss):.2f} per {unit}"]
    if split.num_bytes is not None:  # the split is whole
        if tokenizer.kind not in ("word", "char", "byte"):
            # The sum over the split, extrapolated if `loss` is the mean of its first tokens only.
            total = loss * len(split.tokens)
            per_word = perplexity(total / max(1, split.num_words))
            digits = ".2f" if per_word < 1e6 else ".1e"
            texts.append(f"{per_word:{digits}} per word")
        texts.append(f"{split.bits_per_byte(loss):.4f} bits per byte")
        if tokenizer.unk is not None:
            texts.append(f"{split.num_unk / len(split.tokens):.2%} <unk>")
    others = {other: value for other, value in metrics.items() if other != "loss"}
    texts += format_metrics(others)
    return ", ".join(texts)


def perplexity(loss):
    """The perplexity of a mean loss in nats."""
    return math.exp(min(loss, 99))  # exp(710) would overflow


class SilentReporter:
    """In the place of a Reporter, where another process reports."""

    def report_step(self, metrics):
        pass

    def report_evaluation(self, losses, metrics, seconds):
        pass

    def close(self):
        pass


# ---- log.csv ------------------------------------------------------------------------------------


class Log:
    """A run's log.csv: a row has an iteration, a split and metrics.

    It is rewritten when a process adds its first row, without rows after the iteration at which it
    resumed, and when a new metric needs a column.
    """

    def __init__(self, run):
        self.path = run.folder / "log.csv"
        self.columns = []  # of the file; none until this process rewrites it
        # Earlier rows are kept up to here: (iteration, whether it is an evaluation). At the same
        # iteration, an evaluation comes after a training row.
        self.kept_up_to = (run.iteration, run.evaluation is not None)

    def append(self, row):
        """Adds a row, {name: value}. Raises OSError."""
        texts = {}
        for name, value in row.items():
            texts[name] = value if isinstance(value, (int, str)) else f"{float(value):.6g}"
        if not {*row} <= {*self.columns} or not self.path.exists():
            self.rewrite(texts)
            return
        with open(self.path, "a", encoding="utf-8", newline="", opener=open_no_follow) as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(texts)

    def rewrite(self, last_row):
        """Rewrites the file: its rows, then `last_row`, with the columns of both.

        It is replaced as a whole: a kill must not leave a header without rows. An old file in which
        no row can be read was saved by another program, with semicolons, say: it is renamed.
        """
        rows = read_log(self.path)
        if not rows and os.path.lexists(self.path):
            self.path.replace(self.path.with_name("log.old.csv"))
            say("log.csv cannot be read: it was renamed to log.old.csv")
        columns = list(dict(*rows[:1]) | last_row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            position = (int(row["iteration"]), row["split"] != "train")
            if position <= self.kept_up_to:
                writer.writerow(row)
        writer.writerow(last_row)
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())
        self.columns = columns
        self.kept_up_to = (math.inf, True)  # later rows are of this process


def read_log(path):
    """The rows of a run's log, [{column: text}], if it has one. Raises OSError.

    Each line is parsed on its own, so that a damaged one does not affect the others.
    """
    rows = []
    columns = []
    if os.path.lexists(path):
        with open(
            path,
            encoding="utf-8-sig",  # a spreadsheet may have added a byte-order mark
            errors="replace",
            newline="",
            opener=open_no_follow,
        ) as file:
            for line in file:
                with contextlib.suppress(csv.Error, ValueError, KeyError):
                    values = next(csv.reader([line]))
                    columns = columns or values
                    row = dict(zip(columns, values, strict=True))
                    int(row["iteration"])  # also raises ValueError in the header
                    if row["split"] and line.endswith("\n"):
                        rows.append(row)
    return rows
