"""Verdicts on losses of other programs, given as a file."""

import pytest

from datasets import UsageError
from extras.versus import losses

CONDITIONS = "if these losses are right and both sides are tuned."
ROWS = ["1,3.0,2.9", "2,3.1,2.8", "3,3.2,3.0", "4,3.0,2.8"]  # differences of -0.1, -0.3, -0.2, -0.2


def judge(path, rows, *options, header="seed,before,after"):
    path.write_text("\n".join([header, *rows]))
    losses.main([str(path), *options])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pairs.csv"


def test_the_interval_with_a_number_of_pairs_is_students(file, capsys):
    judge(file, ROWS, "--pairs", "4")
    # A mean of -0.2 with a standard error of 0.0816 / 2; t is 3.182 with three degrees of freedom.
    *_, numbers, signs, verdict = capsys.readouterr().out.splitlines()
    assert numbers == "mean difference -0.2000 in loss, 95 % interval -0.3299 to -0.0701"
    assert signs.startswith("4 of 4 pairs agree in sign; correlation of the sides ")
    assert verdict == f"Helped, {CONDITIONS}"


def test_a_race_is_wider_and_ends_with_its_first_outcome(file, capsys):
    judge(file, [*ROWS, "5,3.0,9.0"])
    *_, numbers, _, _, rest, verdict = capsys.readouterr().out.splitlines()
    assert numbers.endswith("interval -0.3980 to -0.0020")  # 4.85 standard errors
    assert rest == "Rows after the 4 pairs of this verdict do not count."
    assert verdict == f"Helped, {CONDITIONS}"


def test_the_other_sign_hurts(file, capsys):
    judge(file, ["1,2.9,3.0", "2,2.8,3.1", "3,3.0,3.2", "4,2.8,3.0"])
    assert capsys.readouterr().out.endswith(f"Hurt, {CONDITIONS}\n")


def test_a_race_that_goes_on(file, capsys):
    judge(file, ROWS[:3])
    assert capsys.readouterr().out.endswith("No verdict yet: the next look is after 4 pairs.\n")


def test_rows_without_an_effect_at_first(file, capsys):
    judge(file, ["1,3.0,3.0", "2,3.1,3.1", "3,3.2,3.2", "4,3.3,3.3", "5,3.0,2.9"])
    assert "all differences are the same" in capsys.readouterr().out


def test_seeds_that_change_nothing(file, capsys):
    judge(file, [f"{seed},3.0,2.9" for seed in range(4)])
    assert "\nCannot tell: all differences are the same" in capsys.readouterr().out


def test_a_table_of_a_spreadsheet(file, capsys):
    rows = [row.replace(",", " , ") for row in ROWS]
    judge(file, [rows[0], ",,", "", *rows[1:]], header="\ufeffseed, before, after")
    assert "Helped" in capsys.readouterr().out


MISTAKES = [
    (["1,3.0"], "line 2 is not a seed and two finite losses"),
    (["", "1,3.0,x"], "line 3 is not a seed and two finite losses"),
    (["1,3.0,nan"], "line 2 is not a seed and two finite losses"),
    (["1,3.0,2.9", "1,3.0,2.8"], "has a seed twice"),
]


@pytest.mark.parametrize("rows, reason", MISTAKES)
def test_mistakes(rows, reason, file):
    with pytest.raises(UsageError, match=reason):
        judge(file, rows)


@pytest.mark.parametrize("header", ["seed,loss", "seed;before;after", ""])
def test_other_columns(header, file):
    with pytest.raises(UsageError, match="first line is not seed,before,after"):
        judge(file, [], header=header)
