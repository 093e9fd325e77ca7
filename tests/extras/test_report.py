"""Reports to a dashboard: it is told what the log says, and no error of its counts."""

import sys

import main
import pytest
from conftest import TINY, ids, log_rows, run_folder


@pytest.fixture
def line(text, tmp_path):
    """The command of a short run that reports every 5 steps and saves every 10."""
    line = ["--text", text, *TINY, "--steps_per_report=5", "--steps_per_eval=10"]
    return [*line, "--data_dir", tmp_path / "data", "--save_dir"]


def reported(save_dir):
    """The points of the only run in a folder, as its log has them: {metric: {iteration: value}}."""
    curves = {}
    for row in log_rows(save_dir):
        iteration = row.pop("iteration")
        split = row.pop("split")
        for name, value in row.items():
            curves.setdefault(f"{split}/{name}", {})[iteration] = pytest.approx(value, rel=1e-5)
    return curves


def train(*typed):
    """Trains in this process, which has to import the packages of dashboards once alone."""
    assert main.main([*map(str, typed)]) == 0


class Recorder:
    """The part of wandb that is used; remembers what it is told, and may fail at a place."""

    def __init__(self, failing=None):
        self.failing = failing
        self.sessions = []
        self.Settings = dict

    def init(self, **given):
        self.meet("init")
        self.sessions.append((given, []))
        return self

    def define_metric(self, name, step_metric=None):
        """Does nothing."""

    def log(self, row):
        self.meet("log")
        self.sessions[-1][1].append(row)

    def finish(self):
        self.meet("finish")
        self.sessions[-1][1].append("finished")

    def meet(self, place):
        if place == self.failing:
            raise ConnectionError("gone\x1b[2J\nfor ever")


def test_wandb_goes_on_with_the_curves_of_a_resumed_run(line, tmp_path, monkeypatch):
    """Until --report_to none. It is told no password."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    folder = tmp_path / "lm"
    mirror = "https://user:password@example.com"  # not used by a text of one's own
    train(*line, folder, "--num_iters=10", "--report_to=wandb", "--mirror", mirror)
    train(*line, folder, "--num_iters=20")
    expected = reported(folder)
    train(*line, folder, "--num_iters=30", "--report_to=none")
    train(*line, tmp_path / "plain", "--num_iters=30")
    assert len(recorder.sessions) == 2
    assert ids(folder)[0] == ids(tmp_path / "plain")[0]
    assert "password" not in str(recorder.sessions)
    curves = {}
    for given, (*rows, last) in recorder.sessions:
        assert given["id"].startswith(run_folder(folder).name)
        assert given["resume"] == "allow"
        assert given["config"]["dim"] == 16
        assert last == "finished"
        for row in rows:
            iteration = row.pop("iteration")
            for name, value in row.items():
                curves.setdefault(name, {})[iteration] = value
    assert curves == expected


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_failure_is_said_once_and_changes_nothing(place, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Recorder(place))
    train(*line, tmp_path / "lm", "--num_iters=10", "--report_to=wandb")
    told = [line for line in capsys.readouterr().out.splitlines() if "--report_to" in line]
    assert told == ["--report_to wandb failed, the run goes on: gone\ufffd[2J for ever"]
    assert [row["iteration"] for row in log_rows(tmp_path / "lm", "train")] == [5, 10]
