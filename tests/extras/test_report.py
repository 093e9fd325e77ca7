"""Reports to dashboards: what they are told is what the log says, and no error of theirs counts."""

import json
import struct
import sys
import threading
from types import SimpleNamespace

import main
import pytest
from conftest import TINY, ids, log_rows, run, run_folder
from datasets import UsageError

from extras import report


@pytest.fixture
def line(text, tmp_path):
    """The command of a short run that reports every 5 steps and saves every 10."""
    line = ["--text", text, *TINY, "--steps_per_report", 5, "--steps_per_eval", 10]
    return [*line, "--data_dir", tmp_path / "data", "--save_dir"]


def reported(save_dir):
    """The points of the only run in a folder, as its log has them: {metric: {iteration: value}}."""
    curves = {}
    for row in log_rows(save_dir):
        for name, value in report.named_by_split(row).items():
            curves.setdefault(name, {})[row["iteration"]] = value
    return curves


def train(*typed):
    """Trains in this process, which has to import the packages of dashboards once alone."""
    assert main.main([*map(str, typed)]) == 0


def test_tensorboard_reads_the_curves_of_a_run_that_was_killed(line, tmp_path):
    """Steps that are repeated are there once; the weights are those of a run without reports."""
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "lm"
    train(*line, folder, "--num_iters", 20, "--report_to", "tensorboard")
    newest = main.list_checkpoints(folder)[0]
    newest.delete()  # as if it had been killed before
    train("--num_iters", 30, "--save_dir", folder, "--data_dir", tmp_path / "data")  # inherited
    train(*line, tmp_path / "plain", "--num_iters", 30)
    assert ids(folder)[0] == ids(tmp_path / "plain")[0]

    events = accumulator.EventAccumulator(str(run_folder(folder)))
    events.Reload()
    expected = reported(folder)
    assert sorted(expected["train/loss"]) == [5, 10, 15, 20, 25, 30]
    assert sorted(expected["valid/loss"]) == [10, 20, 30]
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(i, pytest.approx(points[i], rel=1e-6)) for i in sorted(points)]


def wandb_records(path):
    """The records in a .wandb file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    place = 7
    record = b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768  # of the block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_without_a_network(line, tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "lm"
    alone = {"env": {"WANDB_MODE": "offline"}, "start_new_session": True}
    mirror = "https://user:password@example.com"  # not used by a text of one's own
    typed = [*line, folder, "--report_to", "wandb", "--mirror", mirror]
    for num_iters in (10, 20):
        run(*typed, "--num_iters", num_iters, **alone)
    for path in folder.glob("wandb/**/*"):
        assert path.is_dir() or b"password" not in path.read_bytes()
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2, "a file for each session"
    curves = {}
    for path in paths:
        for record in wandb_records(path):
            if record.HasField("run"):
                assert record.run.run_id == run_folder(folder).name
            values = {}
            for item in record.history.item:
                values[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            for name in values:
                if "/" in name:
                    curves.setdefault(name, {})[values["iteration"]] = values[name]
    assert curves == reported(folder)


class Recorder:
    """The part of wandb and of Trackio that is used; remembers what it is told."""

    def __init__(self):
        self.sessions = []
        self.offline = True
        self.Settings = dict

    def init(self, **given):
        self.sessions.append((given, []))
        return self

    def define_metric(self, name, step_metric=None):
        """Does nothing."""

    def log(self, row, step=None):
        self.sessions[-1][1].append(row if step is None else row | {"iteration": step})

    def finish(self):
        self.sessions[-1][1].append("finished")


def use(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_with_its_curves(name, line, tmp_path, monkeypatch):
    recorder = Recorder()
    use(monkeypatch, name, recorder)
    folder = tmp_path / "lm"
    for num_iters in (10, 20):
        typed = [*line, folder, "--num_iters", num_iters, "--report_to", name]
        assert main.main([*map(str, typed)]) == 0
    rows = []
    for given, told in recorder.sessions:
        identity = "id" if name == "wandb" else "name"  # what the sessions of a run have in common
        assert given[identity] == given["name"] == run_folder(folder).name
        assert given["resume"] == "allow"
        assert given["config"]["dim"] == 16
        *told, last = told
        assert last == "finished"
        rows += told
    expected = []
    for row in log_rows(folder):
        expected.append({"iteration": row["iteration"]} | report.named_by_split(row))
    assert rows == expected


class Broken(Recorder):
    """A dashboard of which something fails or never ends."""

    def __init__(self, place, failure):
        super().__init__()
        self.place = place
        self.failure = failure

    def init(self, **given):
        self.meet("init")
        return super().init(**given)

    def log(self, row, step=None):
        self.meet("log")

    def finish(self):
        self.meet("finish")

    def meet(self, place):
        if place == self.place:
            self.failure()


def lose():
    raise ConnectionError("gone\x1b[2J\nfor ever")


@pytest.mark.parametrize("failure", [lose, threading.Event().wait], ids=["fails", "hangs"])
@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_lost_connection_changes_nothing(
    place, failure, line, tmp_path, monkeypatch, capsys
):
    use(monkeypatch, "wandb", Broken(place, failure))
    if failure is not lose:  # for as long as it waits for one that hangs
        monkeypatch.setattr(report, "LAST_SECONDS", 0.2)
    typed = [*line, tmp_path / "lm", "--num_iters", 10, "--report_to", "wandb"]
    assert main.main([*map(str, typed)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "--report_to" in line]
    if failure is lose:
        assert told == ["--report_to wandb failed, the run goes on: gone\ufffd[2J for ever"]
    else:
        assert told == ["--report_to wandb: it has not taken all of this run yet"]
    [checkpoint] = main.list_checkpoints(tmp_path / "lm")
    assert checkpoint.iteration == 10
    assert [row["iteration"] for row in log_rows(tmp_path / "lm", "train")] == [5, 10]


def test_only_the_first_rank_reports():
    """The others have no folder."""
    flags = SimpleNamespace(report_to="wandb", num_iters=1)
    reporter = main.Reporter(SimpleNamespace(folder=None, flags=flags, iteration=0))
    assert reporter.dashboards is None


@pytest.mark.parametrize("typed, words", [
    ("mlflow", "must be none, or some of tensorboard, wandb, trackio, not mlflow"),
    ("wandb,", "must be none"),
    ("trackio", "--report_to trackio needs a package: pip install --upgrade trackio"),
    ("wandb", "--report_to wandb finds no key: wandb login, WANDB_MODE=offline"),
])  # fmt: skip
def test_mistakes(typed, words, line, tmp_path, monkeypatch, capsys):
    """Before anything is trained."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    keyless = SimpleNamespace(login=lambda prompt, verify: prompt or verify)
    monkeypatch.setitem(sys.modules, "wandb", keyless)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    given = [*line, tmp_path / "lm", "--num_iters", 1, "--report_to", typed]
    assert main.main([*map(str, given)]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1
    assert not list(tmp_path.glob("lm/text-*"))


def test_none_turns_off_what_a_run_was_begun_with(line, tmp_path, monkeypatch):
    recorder = Recorder()
    use(monkeypatch, "wandb", recorder)
    train(*line, tmp_path / "lm", "--num_iters", 10, "--report_to", "wandb")
    train(*line, tmp_path / "lm", "--num_iters", 20, "--report_to", "none")
    [(_, told)] = recorder.sessions
    assert told[-1] == "finished"
    assert main.list_checkpoints(tmp_path / "lm")[0].iteration == 20


def test_names_of_dashboards():
    assert report.split_names("wandb,none,wandb,tensorboard") == ["wandb", "tensorboard"]
    report.check("none")
    assert main.parse(["--report_to", "none"]) == {"report_to": "none"}
    with pytest.raises(UsageError):
        main.parse(["--report_to", ""])
