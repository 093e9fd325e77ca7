"""Reports a run's metrics to dashboards: TensorBoard, Weights & Biases.

    python main.py --report_to tensorboard         then: tensorboard --logdir runs
    python main.py --report_to wandb,tensorboard   both; WANDB_MODE=offline keeps it on this disk

Each row of log.csv becomes a point of the curves train/loss, valid/loss and so on, over the run's
iterations. A resumed run continues its curves; steps that it repeats have the same values. The
packages are optional: pip install tensorboardX or wandb.
"""

import contextlib
import importlib
import os

from support.cli import UsageError, explain_errors, one_line, say
from support.files import sha1_of_text
from support.flags import FLAGS, RECORDED, arguments_of, get_values


class TensorBoard:
    """Event files in the run's folder."""

    package = "tensorboardX"

    def __init__(self, run):
        import tensorboardX

        begin = run.iteration + 1
        self.writer = tensorboardX.SummaryWriter(
            str(run.folder),
            # TensorBoard hides what earlier sessions wrote of steps that are now repeated.
            purge_step=begin,
            # It reads a run's files by name: this comes after the second in which each was begun.
            filename_suffix=f".{run.iteration:012d}",
        )
        arguments = arguments_of(get_values(run.flags, FLAGS.names(RECORDED)))
        self.writer.add_text("flags", " ".join(arguments), begin)

    def show(self, iteration, metrics):
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """A run of Weights & Biases. Its id there is that of the run's folder: names are not unique."""

    package = "wandb"

    def __init__(self, run):
        import wandb

        folder_sha1 = sha1_of_text(str(run.folder.absolute()))[:8]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "transformer-lm"),
            name=run.folder.name,
            id=f"{run.folder.name}-{folder_sha1}",
            resume="allow",
            config=get_values(run.flags, FLAGS.names(RECORDED)),
            allow_val_change=True,  # flags may change when a run is resumed
            dir=os.environ.get("WANDB_DIR", run.folder.parent),
            settings=wandb.Settings(
                console="off",
                silent=True,
                finish_timeout=30,  # seconds
                x_disable_meta=True,  # the command line, which may have a password in an address
                disable_git=True,  # edits that were not committed
            ),
        )
        # Not wandb's own steps: those of a resumed run could only go on after the last one.
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def show(self, iteration, metrics):
        self.run.log({"iteration": iteration} | metrics)

    def close(self):
        self.run.finish()


BOARDS = {"tensorboard": TensorBoard, "wandb": WandB}


def parse_report_to(report_to):
    """The dashboards in a --report_to, "wandb,tensorboard"; there are none in "none"."""
    return sorted({name.strip() for name in report_to.split(",")} - {"none"})


def check(report_to):
    """Raises UsageError unless these dashboards have their packages."""
    for name in parse_report_to(report_to):
        if name not in BOARDS:
            raise UsageError(f"--report_to: must be one of tensorboard, wandb, none, not {name}")
        package = BOARDS[name].package
        remedy = f"pip install --upgrade {package}, or --report_to none"
        # Of any type: a package that is older than what it needs raises some other error.
        with explain_errors(f"--report_to {name} needs a package: {remedy}", Exception):
            importlib.import_module(package)


class Dashboards:
    """The dashboards of a run. An error of one is said and ends it, but not the run."""

    def __init__(self, run):
        self.boards = {}
        for name in parse_report_to(run.flags.report_to):
            with self.dropping(name):
                self.boards[name] = BOARDS[name](run)

    def append(self, row):
        """Shows a row of the log, {name: value}."""
        metrics = {}
        for name in row.keys() - {"iteration", "split"}:
            metrics[f"{row['split']}/{name}"] = row[name]
        for name, board in [*self.boards.items()]:
            with self.dropping(name):
                board.show(row["iteration"], metrics)

    def close(self):
        """Waits until the dashboards have all that they were told."""
        for name, board in [*self.boards.items()]:
            with self.dropping(name):
                board.close()

    @contextlib.contextmanager
    def dropping(self, name):
        """Leaves out a dashboard that fails in this block."""
        try:
            yield
        except Exception as error:  # of any type: the packages have their own
            self.boards.pop(name, None)
            reason = one_line(error)[:300] or type(error).__name__
            say(f"--report_to {name} failed, the run goes on: {reason}")
