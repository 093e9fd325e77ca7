"""Verdicts on losses of other programs, given as a file."""

import pytest

from datasets import UsageError
from extras.versus import __main__ as versus
from extras.versus.losses import judge_file

ROWS = ["1,3.0,2.9", "2,3.1,2.8", "3,3.2,3.0", "4,3.0,2.8"]  # differences of -0.1, -0.3, -0.2, -0.2


def judge(path, rows, *options, header="seed,before,after"):
    path.write_text("\n".join([header, *rows]))
    options, _ = versus.read_arguments(["--losses", str(path), *options])
    judge_file(path, versus.bounds_of(options), options)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pairs.csv"


def test_the_interval_with_a_number_of_pairs_is_students(file, capsys):
    judge(file, ROWS, "--pairs", "4")
    # A mean of -0.2 with a standard error of 0.0816 / 2; t is 3.182 with three degrees of freedom.
    *_, numbers, verdict = capsys.readouterr().out.splitlines()
    assert numbers.startswith("mean difference -0.2000 in loss, 95 % interval -0.3299 to -0.0701;")
    assert verdict == "Helped, by losses that nobody checked."


def test_a_race_is_wider_and_ends_with_its_first_outcome(file, capsys):
    judge(file, [*ROWS, "5,3.0,9.0"])
    *_, numbers, _, rest, verdict = capsys.readouterr().out.splitlines()
    assert "interval -0.3980 to -0.0020;" in numbers  # 4.85 standard errors
    assert rest == "It ended here, so 1 more rows do not count."
    assert verdict == "Helped, by losses that nobody checked."


def test_the_other_sign_hurts(file, capsys):
    judge(file, ["1,2.9,3.0", "2,2.8,3.1", "3,3.0,3.2", "4,2.8,3.0"])
    assert capsys.readouterr().out.endswith("Hurt, by losses that nobody checked.\n")


def test_a_race_that_goes_on(file, capsys):
    judge(file, ROWS[:3])
    assert capsys.readouterr().out.endswith("No verdict yet: the next look is after 4 pairs.\n")


MISTAKES = [
    (["1,3.0"], "not a CSV file"),
    (["1,3.0,x"], "not a CSV file"),
    (["1,3.0,nan"], "a loss is not finite"),
    (["1,3.0,2.9", "1,3.0,2.8"], "has a seed twice"),
    (["1,3.0,3.0", "2,3.1,3.1"], "no loss has changed"),
]


@pytest.mark.parametrize("rows, reason", MISTAKES)
def test_mistakes(rows, reason, file):
    with pytest.raises(UsageError, match=reason):
        judge(file, rows)


def test_other_columns(file):
    with pytest.raises(UsageError, match="they are seed, loss"):
        judge(file, [], header="seed,loss")
