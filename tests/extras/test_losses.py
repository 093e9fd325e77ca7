"""Verdicts on losses of other programs, given as a file."""

import pytest

from support.cli import UsageError
from extras.versus import losses

CONDITIONS = "if both sides are tuned."
# Pairs of losses; differences of -0.1, -0.3, -0.2, -0.2
PAIRS = [(3.0, 2.9), (3.1, 2.8), (3.2, 3.0), (3.0, 2.8)]
UNTUNED = "side,seed,loss"
TUNED = "side,seed,learning_rate,loss"
# Seeds 1 and 2 choose 2 before and 3 after: there, means are 3.1 and 2.9.
TUNING = [
    *("before,1,1,3.5", "before,2,1,3.1", "before,1,2,3.0", "before,2,2,3.2"),
    *("before,1,3,3.4", "before,2,3,3.0", "after,1,2,3.0", "after,2,2,3.0"),
    *("after,1,3,2.8", "after,2,3,3.0"),
]


def lines_of(pairs):
    """A line for each run of pairs of losses, with seeds from 1 on."""
    lines = []
    for seed, (before, after) in enumerate(pairs, 1):
        lines += [f"before,{seed},{before}", f"after,{seed},{after}"]
    return lines


def at(lines, before, after):
    """The same lines with a learning rate for each side, and seeds from 3 on."""
    rates = {"before": before, "after": after}
    cells = [line.split(",") for line in lines]
    return [f"{side},{int(seed) + 2},{rates[side]},{loss}" for side, seed, loss in cells]


@pytest.fixture
def judge(tmp_path, capsys):
    """What is printed of a file with these lines."""

    def judged(lines, *options, header=UNTUNED):
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


def test_tuned_sides_are_compared_at_their_best_values(judge):
    others = ["before,7,3,9.0", "after,7,2,1.0"]  # at values that lost
    lines = [*TUNING, *at(lines_of(PAIRS), 2.0, 3), *others]
    unpaired, *rest, numbers, choice, _, _, verdict = judge(lines, header=TUNED).splitlines()
    assert unpaired.endswith(" to compare: 7")
    assert [*map(str.split, rest[:2])] == [
        ["seed", "before", "after", "difference"],
        ["3", "3.0000", "2.9000", "-0.1000"],
    ]
    assert numbers.endswith("interval at the chosen values -0.3980 to -0.0020")
    assert choice.startswith("The choice itself may be luck: confirm")
    best = "2 before, 3 after (at the edge of the list: give more)"
    assert verdict == f"Helped, unconfirmed, each at its best learning_rate: {best}."


def test_a_diverged_value_is_not_the_best(judge):
    out = judge(["after,1,9,nan", "after,2,9,-inf", *TUNING], header=TUNED)
    best = "each at its best learning_rate: 2 before, 3 after"  # now within the list
    assert out == f"Next: train both sides on other seeds, {best}.\n"


def test_a_seed_that_has_chosen_for_one_side_is_not_compared(judge):
    lines = at(lines_of(PAIRS), 2, 3)
    out = judge([*TUNING[:6], "after,1,3,9.0", "after,2,3,9.0", *lines], header=TUNED)
    assert "9.0000" not in out
    assert "4 of 4 pairs agree" in out


def test_untuned_sides_are_named_with_their_values(judge):
    out = judge(at(lines_of(PAIRS), 1e-3, 1234567.5), header=TUNED)
    values = "(learning_rate: 0.001 before, 1234567.5 after)."
    assert out.endswith(f"Helped, {CONDITIONS[:-1]} {values}\n")


HEADERS = "seed,before,after ,side,seed,loss side,seed side,seed,loss,a,b side,side,loss".split()
MISTAKES = [
    # With one more value for seed 1 alone, seed 2 would be compared although it has chosen before.
    (TUNED, [*TUNING, "before,1,9,8.0"], "seed 2 of 'before' has several values of learning_rate"),
    (TUNED, ["before,1,1,3", "before,2,2,3", "after,1,1,3"], "'before' has several values of lea"),
    (TUNED, ["before,1,1,nan", "before,1,2,inf", "after,1,1,3"], "no .+ of 'before' has a finite"),
    (TUNED, ["before,1,nan,3.0"], "line 2: not like"),
    (UNTUNED, ["before,1"], "line 2: not like side,seed,loss with before or after"),
    (UNTUNED, ["", "before,1,x"], "line 3: not like"),
    (UNTUNED, ["control,1,3.0"], "line 2: not like"),
    (UNTUNED, ["before,1,3.0", "before,1,3.1"], "line 3: this run is there twice"),
    (UNTUNED, ["before,1,0.002", "after,1,0.003"], "four decimals are shown: multiply losses"),
    (UNTUNED, ["before,1,3.0"], "has no run of the side 'after'"),
    *((header, [], "first line is not side,seed,loss") for header in ["", *HEADERS]),
]


@pytest.mark.parametrize("header, lines, reason", MISTAKES)
def test_mistakes(header, lines, reason, judge):
    with pytest.raises(UsageError, match=reason):
        judge(lines, header=header)
