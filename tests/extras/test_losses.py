"""Verdicts on losses of other programs, given as a file."""

import pytest

from datasets import UsageError
from extras.versus import losses

CONDITIONS = "if these losses are right and both sides are tuned."
# Pairs of losses; differences of -0.1, -0.3, -0.2, -0.2
PAIRS = [(3.0, 2.9), (3.1, 2.8), (3.2, 3.0), (3.0, 2.8)]
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


def judge(path, lines, *options, header="side,seed,loss"):
    path.write_text("\n".join([header, *lines]))
    losses.main([str(path), *options])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs.csv"


def test_the_interval_with_a_number_of_pairs_is_students(file, capsys):
    judge(file, lines_of(PAIRS), "--pairs", "4")
    # A mean of -0.2 with a standard error of 0.0816 / 2; t is 3.182 with three degrees of freedom.
    *_, numbers, signs, verdict = capsys.readouterr().out.splitlines()
    assert numbers == "mean difference -0.2000 in loss, 95 % interval -0.3299 to -0.0701"
    assert signs.startswith("4 of 4 pairs agree in sign; correlation of the sides ")
    assert verdict == f"Helped, {CONDITIONS}"


def test_a_race_is_wider_and_ends_with_its_first_outcome(file, capsys):
    judge(file, lines_of([*PAIRS, (3.0, 9.0)]))
    *_, numbers, signs, early, rest, verdict = capsys.readouterr().out.splitlines()
    assert numbers.endswith("interval -0.3980 to -0.0020")  # 4.85 standard errors
    assert signs.startswith("4 of 4 pairs agree in sign")
    assert early.startswith("It ended once the difference was clear")
    assert rest == "Pairs after the first 4 do not count."
    assert verdict == f"Helped, {CONDITIONS}"


def test_the_other_sign_hurts(file, capsys):
    judge(file, lines_of([(after, before) for before, after in PAIRS]))
    assert capsys.readouterr().out.endswith(f"Hurt, {CONDITIONS}\n")


def test_a_race_that_goes_on(file, capsys):
    judge(file, lines_of(PAIRS[:3]))
    assert capsys.readouterr().out.endswith("No verdict yet: the next look is after 4 pairs.\n")


def test_a_seed_with_one_side_is_no_pair(file, capsys):
    judge(file, [*lines_of(PAIRS), "before,5,1.0", "after,6,9.0"], "--pairs", "5")
    assert capsys.readouterr().out.endswith("No verdict yet: the next look is after 5 pairs.\n")


def test_pairs_without_an_effect_at_first(file, capsys):
    judge(file, lines_of([(3.0, 3.0), (3.1, 3.1), (3.2, 3.2), (3.3, 3.3), (3.0, 2.9)]))
    assert "all differences are the same" in capsys.readouterr().out


def test_seeds_that_change_nothing(file, capsys):
    for pair in [(3.0, 2.9), (0.0, -0.1)]:
        judge(file, lines_of([pair] * 4))
        assert "\nCannot tell: all differences are the same" in capsys.readouterr().out


def test_small_losses(file, capsys):
    judge(file, lines_of([(before * 1e-10, after * 1e-10) for before, after in PAIRS]))
    assert capsys.readouterr().out.endswith(f"Helped, {CONDITIONS}\n")


def test_a_seed_that_controls_the_terminal(file, capsys):
    lines = [line.replace(",1,", ",\x1b[31m1,") for line in lines_of(PAIRS)]
    judge(file, lines)
    assert "\x1b" not in capsys.readouterr().out


def test_a_pair_that_has_diverged(file, capsys):
    judge(file, lines_of([*PAIRS[:3], (3.0, "nan")]))
    assert capsys.readouterr().out.endswith("\nCannot tell: a run of this pair has diverged.\n")


def test_a_table_of_a_spreadsheet(file, capsys):
    first, *lines = lines_of(PAIRS)
    first = first.replace(",", " , ")
    judge(file, [first, ",,", "", *lines], header="\ufeffside, seed, loss")
    assert "Helped" in capsys.readouterr().out


def test_tuned_sides_are_compared_at_their_best_values(file, capsys):
    others = ["before,7,3,9.0", "after,7,2,1.0"]  # at values that lost
    lines = [*TUNING, *at(lines_of(PAIRS), 2.0, 3), *others]
    judge(file, lines, header=TUNED)
    before, *rest, numbers, _, _, verdict = capsys.readouterr().out.splitlines()
    assert before == "before: mean loss by learning_rate, seeds 1, 2"
    means = [line.split() for line in rest if line.startswith("   ")]
    assert means[:3] == [["1", "3.3000"], ["2", "3.1000"], ["3", "3.2000"]]
    assert means[3:5] == [["2", "3.0000"], ["3", "2.9000"]]
    first_pair = rest[7]
    assert first_pair.split() == ["3", "3.0000", "2.9000", "-0.1000"]
    assert numbers.endswith("interval -0.3980 to -0.0020")
    best = "2 before, 3 after (at the edge of the list: give more)"
    assert verdict == f"Helped, each at its best learning_rate: {best}, if these losses are right."


def test_a_diverged_value_is_not_the_best(file, capsys):
    judge(file, ["after,1,9,nan", "after,2,9,-inf", *TUNING], header=TUNED)
    out = capsys.readouterr().out
    assert "\n         9       inf\n" in out
    best = "each at its best learning_rate: 2 before, 3 after"  # now within the list
    assert out.endswith(f"\nNext: train both sides on other seeds, {best}.\n")


def test_a_seed_that_has_chosen_for_one_side_is_not_compared(file, capsys):
    lines = at(lines_of(PAIRS), 2, 3)
    judge(file, [*TUNING[:6], "after,1,3,9.0", "after,2,3,9.0", *lines], header=TUNED)
    out = capsys.readouterr().out
    assert "9.0000" not in out
    assert "4 of 4 pairs agree" in out


def test_untuned_sides_are_named_with_their_values(file, capsys):
    judge(file, at(lines_of(PAIRS), 1e-3, 1234567.5), header=TUNED)
    values = "(learning_rate: 0.001 before, 1234567.5 after)."
    assert capsys.readouterr().out.endswith(f"Helped, {CONDITIONS[:-1]} {values}\n")


NO_CHOICE = [
    # With one more value for seed 1 alone, seed 2 would be compared although it has chosen before.
    ([*TUNING, "before,1,9,8.0"], "seed 2 of 'before' has several values of learning_rate"),
    (["before,1,1,3.0", "before,2,2,3.0", "after,1,1,3.0"], "'before' has several values of lea"),
    (["before,1,1,nan", "before,1,2,inf", "after,1,1,3.0"], "no learning_rate of 'before' has a"),
]


@pytest.mark.parametrize("lines, reason", NO_CHOICE)
def test_values_that_cannot_be_chosen(lines, reason, file):
    with pytest.raises(UsageError, match=reason):
        judge(file, lines, header=TUNED)


MISTAKES = [
    (["before,1"], "line 2: not like side,seed,loss with before or after"),
    (["", "before,1,x"], "line 3: not like"),
    (["control,1,3.0"], "line 2: not like"),
    (["before,1,3.0", "before,1,3.1"], "line 3: this run is there twice"),
    (["before,1,3.0"], "has no run of the side 'after'"),
]


@pytest.mark.parametrize("lines, reason", MISTAKES)
def test_mistakes(lines, reason, file):
    with pytest.raises(UsageError, match=reason):
        judge(file, lines)


HEADERS = ["seed,before,after", "side,seed", "side,seed,loss,a,b", "side,side,loss", ""]


@pytest.mark.parametrize("header", HEADERS)
def test_other_columns(header, file):
    with pytest.raises(UsageError, match="first line is not side,seed,loss"):
        judge(file, [], header=header)


def test_a_value_that_is_no_number(file):
    with pytest.raises(UsageError, match="line 2: not like"):
        judge(file, ["before,1,nan,3.0"], header=TUNED)
