"""Reports a run's metrics to dashboards: TensorBoard, Weights & Biases, Trackio.

    python main.py --report_to tensorboard         then: tensorboard --logdir runs
    python main.py --report_to wandb,tensorboard   several; WANDB_MODE=offline keeps it on this disk

Each row of log.jsonl becomes a point of the curves train/loss, valid/loss and so on, over the
run's iterations. A resumed run continues its curves; steps that it repeats have the same values.
Each dashboard has a thread of its own: neither a lost connection nor an error stops or delays the
run. The packages are optional: pip install tensorboardX, wandb or trackio.
"""

import contextlib
import importlib
import os
import queue
import threading
import time

from tqdm import tqdm

from datasets import UsageError, explained, one_line, without_passwords
from main import INHERITED

PROJECT = "transformer-lm"  # unless the dashboard's own variables name another
# What to install for each dashboard; the package is imported by the same name.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
MOST_ROWS = 10_000  # that wait for a dashboard; later ones are dropped
LAST_SECONDS = 30  # to wait for the dashboards when the run ends


def check(names):
    """Raises UsageError unless each of these dashboards, "wandb,trackio", can be reported to."""
    for name in split_names(names):
        package = PACKAGES[name]
        # Of any type: a package that is older than what it needs raises some other error.
        remedy = f"pip install --upgrade {package}, or --report_to none"
        with explained(f"--report_to {name} needs a package: {remedy}"):
            module = importlib.import_module(package)
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            remedy = "wandb login, WANDB_MODE=offline (and later wandb sync), or --report_to none"
            with explained(f"--report_to wandb cannot log in: {remedy}"):
                # In a thread, nobody could answer its questions.
                has_key = module.login(prompt=False, verify=False)
            if not has_key:
                raise UsageError(f"--report_to wandb finds no key: {remedy}")


def split_names(names):
    """The dashboards in a --report_to, each once."""
    return [name for name in dict.fromkeys(names.split(",")) if name != "none"]


class Dashboards:
    """The dashboards of a run on its first rank."""

    def __init__(self, run):
        self.threads = []
        for name in split_names(run.flags.report_to):
            self.threads.append(Dashboard(name, run))
        for thread in self.threads:
            thread.start()

    def append(self, row):
        """Hands on a row of the log, {name: value}."""
        for thread in self.threads:
            with contextlib.suppress(queue.Full):
                thread.rows.put_nowait(row)

    def close(self):
        """Gives the dashboards a while to take what is left."""
        end = time.monotonic() + LAST_SECONDS
        for thread in self.threads:
            with contextlib.suppress(queue.Full):
                thread.rows.put_nowait(None)
        for thread in self.threads:
            thread.join(max(0, end - time.monotonic()))
            if thread.is_alive():
                thread.is_given_up = True
                tqdm.write(f"--report_to {thread.name}: it has not taken all of this run yet")


class Dashboard(threading.Thread):
    """Hands rows to a dashboard, until it gets None."""

    def __init__(self, name, run):
        super().__init__(name=name, daemon=True)  # at exit, nobody waits for it
        self.rows = queue.Queue(MOST_ROWS)
        self.is_given_up = False
        # Copies: the run goes on meanwhile.
        self.run_name = run.name
        self.folder = run.folder
        self.iteration = run.iteration
        self.flags = {}
        for flag_name in INHERITED:
            value = getattr(run.flags, flag_name)
            if value is not None:
                self.flags[flag_name] = value

    def run(self):
        """The thread: an error is reported in one line and ends it, but not the training run."""
        try:
            with OPENERS[self.name](self) as write:
                while True:
                    row = self.rows.get()
                    if row is None:
                        return
                    write(row["iteration"], named_by_split(row))
        except Exception as error:
            if self.is_given_up:
                return
            # wandb's, if it refuses a key, has no words.
            reason = without_passwords(one_line(error))[:300] or type(error).__name__
            tqdm.write(f"--report_to {self.name} failed, the run goes on: {reason}")


def named_by_split(row):
    """The metrics of a row, {"train/loss": value}."""
    metrics = {}
    for name, value in row.items():
        if name not in ("iteration", "split"):
            metrics[f"{row['split']}/{name}"] = value
    return metrics


@contextlib.contextmanager
def open_tensorboard(board):
    """Yields a function (iteration, metrics) that writes to event files in the run's folder."""
    import tensorboardX

    # TensorBoard hides what earlier sessions wrote of steps that are now repeated. It reads a
    # run's files by name: the iteration comes after the second in which each was begun.
    suffix = f".{board.iteration:012d}"
    writer = tensorboardX.SummaryWriter(
        str(board.folder), purge_step=board.iteration + 1, filename_suffix=suffix
    )
    if board.iteration == 0:
        lines = [f"    --{name} {value}" for name, value in board.flags.items()]
        writer.add_text("flags", "\n".join(lines), 0)

    def write(iteration, metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, iteration)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def tracked(board, package, **options):
    """Yields a run of wandb, or of a package that is used as wandb is, and ends it."""
    run = importlib.import_module(package).init(
        project=os.environ.get(f"{package.upper()}_PROJECT", PROJECT),
        name=board.run_name,
        resume="allow",
        config=board.flags,
        **options,
    )
    try:
        yield run
    finally:
        run.finish()


@contextlib.contextmanager
def open_wandb(board):
    """The same for Weights & Biases; the run's name is its id there."""
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        finish_timeout=LAST_SECONDS,
        x_disable_meta=True,  # it would upload the command line, passwords in addresses included
        disable_git=True,  # and edits that were not committed
    )
    options = {
        "id": board.run_name,
        "dir": os.environ.get("WANDB_DIR", board.folder.parent),
        "allow_val_change": True,  # flags may change when a run is resumed
        "settings": settings,
    }
    with tracked(board, "wandb", **options) as run:
        if not (run.offline or run.disabled):
            tqdm.write(f"wandb    {one_line(run.url)}")
        # Not wandb's own steps: those of a resumed run could only go on after the last one.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        yield lambda iteration, metrics: run.log({"iteration": iteration} | metrics)


@contextlib.contextmanager
def open_trackio(board):
    """The same for Trackio."""
    with tracked(board, "trackio", embed=False) as run:
        yield lambda iteration, metrics: run.log(metrics, step=iteration)


OPENERS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio}
