"""Reports a run's metrics to Weights & Biases.

    python main.py --report_to wandb         WANDB_MODE=offline keeps them on this disk

Each row of log.csv becomes a point of the curves train/loss, valid/loss and so on, over the run's
iterations. A resumed run continues its curves; steps that it repeats have the same values. The
package is optional: pip install wandb.
"""

import contextlib
import os

from support.cli import UsageError, explain_errors, one_line, say
from support.files import sha1_of_text
from support.flags import FLAGS, RECORDED, get_values


def check(report_to):
    """Raises UsageError unless this dashboard is known and its package installed."""
    if report_to not in ("wandb", "none"):
        raise UsageError(f"--report_to: must be wandb or none, not {report_to}")
    if report_to == "wandb":
        # Of any type: a package that is older than what it needs raises some other error.
        remedy = "pip install --upgrade wandb, or --report_to none"
        with explain_errors(f"--report_to wandb needs a package: {remedy}", Exception):
            import wandb  # noqa: F401


class Dashboard:
    """A run of Weights & Biases. An error of it is said and ends its reports, but not the run."""

    def __init__(self, run):
        self.run = None
        with self.dropping():
            self.run = begin(run)

    def append(self, row):
        """Shows a row of the log, {name: value}."""
        metrics = {"iteration": row["iteration"]}
        for name in row.keys() - {"iteration", "split"}:
            metrics[f"{row['split']}/{name}"] = row[name]
        with self.dropping():
            if self.run:
                self.run.log(metrics)

    def close(self):
        """Waits until it has all that it was told."""
        with self.dropping():
            if self.run:
                self.run.finish()

    @contextlib.contextmanager
    def dropping(self):
        """Ends the reports if this block fails."""
        try:
            yield
        except Exception as error:  # of any type: the package has its own
            self.run = None
            reason = one_line(error)[:300] or type(error).__name__
            say(f"--report_to wandb failed, the run goes on: {reason}")


def begin(run):
    """The run of wandb for a main.Run; its id there is that of the folder: names are not unique."""
    import wandb

    folder_sha1 = sha1_of_text(str(run.folder.absolute()))[:8]
    dashboard = wandb.init(
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
    dashboard.define_metric("iteration")
    dashboard.define_metric("*", step_metric="iteration")
    return dashboard
