"""Verdicts on losses of other programs, given as a file."""

import pytest

from support.cli import UsageError
from extras.versus import losses

CONDITIONS = "if both sides are tuned."
# Pairs of losses; differences of -0.1, -0.3, -0.2, -0.2
PAIRS = [(3.0, 2.9), (3.1, 2.8), (3.2, 3.0), (3.0, 2.8)]
COLUMNS = "side,seed,loss"


def lines_of(pairs):
    """A line for each run of pairs of losses, with seeds from 1 on."""
    lines = []
    for seed, (before, after) in enumerate(pairs, 1):
        lines += [f"before,{seed},{before}", f"after,{seed},{after}"]
    return lines


@pytest.fixture
def judge(tmp_path, capsys):
    """What is printed of a file with these lines."""

    def judged(lines, *options, header=COLUMNS):
        path = tmp_path / "runs.csv"
        path.write_text("\n".join([header, *lines]))
        losses.main([str(path), *options])
        return capsys.readouterr().out

    return judged


def test_the_interval_with_a_number_of_pairs_is_students(judge):
    out = judge(lines_of(PAIRS), "--pairs=4")
    # A mean of -0.2 with a standard error of 0.0816 / 2; t is 3.182 with three degrees of freedom.
    *_, numbers, signs, verdict = out.splitlines()
    assert numbers == "mean difference -0.2000 in loss, 95 % interval -0.3299 to -0.0701"
    assert signs.startswith("4 of 4 pairs agree in sign; correlation of the sides ")
    assert verdict == f"Helped, {CONDITIONS}"


def test_a_race_is_wider_and_ends_with_its_first_outcome(judge):
    out = judge(lines_of([*PAIRS, (3.0, 9.0)]))
    *_, numbers, signs, early, rest, verdict = out.splitlines()
    assert numbers.endswith("interval -0.3980 to -0.0020")  # 4.85 standard errors
    assert signs.startswith("4 of 4 pairs agree in sign")
    assert early.startswith("It ended once the difference was clear")
    assert rest == "Pairs after the first 4 do not count."
    assert verdict == f"Helped, {CONDITIONS}"


ENDS = [
    (PAIRS[:3], "No verdict yet: the next look is after 4 pairs."),
    ([(after, before) for before, after in PAIRS], f"Hurt, {CONDITIONS}"),
    ([*PAIRS[:3], (3.0, "nan")], "Cannot tell: a run of this pair has diverged."),
]


@pytest.mark.parametrize("pairs, end", ENDS)
def test_verdicts(pairs, end, judge):
    assert judge(lines_of(pairs)).splitlines()[-1] == end


def test_a_seed_with_one_side_is_no_pair(judge):
    out = judge([*lines_of(PAIRS), "before,5,1.0", "after,6,9.0"], "--pairs=5")
    assert out.startswith("Seeds without a run of each side to compare: 5, 6\n")
    assert out.endswith("No verdict yet: the next look is after 5 pairs.\n")


@pytest.mark.parametrize("pairs", [
    [(3.0, 3.0)] * 4 + [(3.0, 2.9)],  # at first
    [(3.0, 2.9)] * 4,
    [(0.0, -0.1)] * 4,
])  # fmt: skip
def test_seeds_that_change_nothing(pairs, judge):
    assert "\nCannot tell: all differences are the same" in judge(lines_of(pairs))


def test_a_seed_that_controls_the_terminal(judge):
    lines = [line.replace(",1,", ",\x1b[31m1,") for line in lines_of(PAIRS)]
    assert "\x1b" not in judge(lines)


def test_a_table_of_a_spreadsheet(judge):
    first, *lines = lines_of(PAIRS)
    lines = [first.replace(",", " , "), ",,", "", *lines]
    assert "Helped" in judge(lines, header="\ufeffside, seed, loss")


HEADERS = [
    *("", "seed,before,after", ",side,seed,loss", "side,seed", "side,side,loss"),
    "side,seed,loss,learning_rate",
]
MISTAKES = [
    (COLUMNS, ["before,1"], "line 2: not like side,seed,loss with before or after"),
    (COLUMNS, ["", "before,1,x"], "line 3: not like"),
    (COLUMNS, ["control,1,3.0"], "line 2: not like"),
    (COLUMNS, ["before,1,3.0", "before,1,3.1"], "line 3: this run is there twice"),
    (COLUMNS, ["before,1,0.002", "after,1,0.003"], "four decimals are shown: multiply losses"),
    (COLUMNS, ["before,1,3.0"], "has no run of the side 'after'"),
    *((header, [], "first line is not side,seed,loss") for header in HEADERS),
]


@pytest.mark.parametrize("header, lines, reason", MISTAKES)
def test_mistakes(header, lines, reason, judge):
    with pytest.raises(UsageError, match=reason):
        judge(lines, header=header)
