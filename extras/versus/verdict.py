"""A comparison in words: its numbers, and its verdict."""

from extras.versus.sequential import RACE_BOUNDS

SIDES = ("before", "after")
SLOWER = 1.05  # a verdict names a ratio of times that is above it

VERDICTS = {
    "helped": "Helped",
    "hurt": "Hurt",
    "partly": "Helped, but less on test text: the rest may be a leak",
    "valid only": "Better on validation text only",
    "equal": "Equal within {asked[margin]:g}",
    "not worse": "Not worse by more than {asked[margin]:g}",
    "none": (
        "No difference seen: {pairs} pairs would detect one of {detectable:.2g} four times in five"
    ),
    "promising": "Promising, on seeds that were used before",
    "not better": "Not better, on seeds that were used before",
    "same": (
        "No effect, proved: the same weights in {versions[1][dtype]}, for these flags and seeds"
    ),
    "alike": "No effect seen: other weights, and the same losses",
    "diverged": "Diverged: runs of {at_fault}",
    "cannot tell": "Cannot tell: {fault}",
}
PAIRS_HEADER = f"{'seed':>10}{'before':>10}{'after':>10}{'difference':>14}"
SIGNIFICANT = ("helped", "partly", "hurt", "valid only")  # zero lies outside the interval


def describe_pair(seed, before, after):
    """A line on the losses of a pair, under PAIRS_HEADER."""
    return f"{seed:>10}{before:>10.4f}{after:>10.4f}{after - before:>+14.4f}"


def describe_numbers(result):
    """Yields lines on what was measured, none if nothing was."""
    if "difference" not in result:
        return
    pairs = len(result["seeds"])
    is_significant = result["outcome"] in SIGNIFICANT
    interval = "95 % interval at the chosen values" if result["tuned"] else "95 % interval"
    yield (
        f"mean difference {result['difference']:+.4f} {result['unit']}, {interval} "
        f"{result['low']:+.4f} to {result['high']:+.4f}"
    )
    if is_significant and result["tuned"]:
        yield "The choice itself may be luck: confirm the verdict on new seeds, tuned again."
    line = f"{result['agree']} of {pairs} pairs agree in sign"
    if pairs > 3 and "correlation" in result:  # of two, it is 1 or -1
        line += f"; correlation of the sides {result['correlation']:.2f}"
    yield line
    if is_significant and not result["asked"]["pairs"] and pairs < max(RACE_BOUNDS):
        yield "It ended once the difference was clear: the true one is likely smaller."
    if result["outlier"] is not None:
        seed = result["seeds"][result["outlier"]]
        yield f"Seed {seed} is an outlier: without it, differences scatter less than half as far."
    if "test_difference" in result:
        yield f"On test text, the mean difference is {result['test_difference']:+.4f}."
    if "time" in result:
        time, low, high = result["time"], result["time_low"], result["time_high"]
        line = f'"After" took {time:.3f} times as long ({low:.3f} to {high:.3f}).'
        before, after = result["steps"]
        if before == after and not low <= 1 <= high:
            line += f" For equal time, add --num_iters {before / time:.0f} to it."
        yield line


def name_verdict(result):
    """The verdict on a result, without its conditions."""
    outcome = result["outcome"]
    pairs = len(result["seeds"])
    if outcome == "same" and not pairs:
        return "Nothing that counts differs between the sides, so nothing is trained"
    verdict = VERDICTS[outcome].format(**result, pairs=pairs)
    if result["tuned"] and outcome in SIGNIFICANT:
        verdict += ", unconfirmed"  # the interval does not cover the choice of values
    return verdict


def describe_verdict(result):
    """The verdict on a result, in words."""
    outcome = result["outcome"]
    verdict = ", ".join([name_verdict(result), *list_conditions(result)])
    if result["look"] > 1 and outcome in SIGNIFICANT:
        verdict += f": try {result['look']}"
    return f"{verdict}."


def list_conditions(result):
    """Yields the conditions under which a verdict holds, besides the edit itself."""
    if result["outcome"] == "helped" and "test_difference" not in result:
        yield "on validation text (there was no test text)"
    for what in result["unlike"]:
        yield f"with {what}"
    if result.get("time_low", 0) > SLOWER:
        yield f"in {result['time']:.2g} times the time"
    if result["tuned"]:
        yield result["tuned"]


def describe_best(setting, best_values, tried):
    """The condition that each side has its best value of a setting; tried: the values by side."""
    texts = []
    for side, best, values in zip(SIDES, best_values, tried):
        is_edge = best in (min(values, key=float), max(values, key=float))
        edge = " (at the edge of the list: give more)" if is_edge else ""
        texts.append(f"{best} {side}{edge}")
    return f"each at its best {setting}: {', '.join(texts)}"


def list_side_differences(sides, pairs):
    """Yields what differs between the runs of two Sides besides their edit: more conditions."""
    before, after = sides
    ratio = after.flags["num_iters"] / before.flags["num_iters"]
    if ratio != 1:
        yield f"{ratio:.3g} times the steps"
    if before.tokenizer != after.tokenizer:  # the same text is read as other tokens
        return
    texts = [(side.tokens_sha256["train"], side.flags.get("train_tokens")) for side in sides]
    if texts[0] != texts[1]:
        yield "another training text"
    tokens_seen = {run.tokens_seen for pair in pairs for run in pair if run.tokens_seen}
    if ratio == 1 and len(tokens_seen) > 1:
        yield "another number of tokens read"
