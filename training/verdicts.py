"""Whether a difference between two arms is more than the spread of their seeds, and what that says of a claim."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

Values = Sequence[float | None]
HELD, REVERSED, OPEN, UNMEASURED = "held", "reversed", "open", "unmeasured"
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The difference of two arms, seed by seed.

    Attributes:
        outcome: `HELD` where the 95 % interval of the mean difference lies above zero, `REVERSED` where it lies below,
            `OPEN` where it holds zero, `UNMEASURED` with fewer than two pairs.
        mean: Of the differences.
        low: Of the interval.
        high: Of the interval.
    """

    outcome: str
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def words(self, held: str = "held", reversed_: str = "the reverse was seen", open_: str = "no verdict") -> str:
        """The outcome in words, with the numbers behind it."""
        if self.outcome == UNMEASURED:
            return "not measured"
        said = {HELD: held, REVERSED: reversed_, OPEN: open_}[self.outcome]
        return f"{said} ({self.mean:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f})"


def compare(better: Values, worse: Values) -> Comparison:
    """Compare two arms by Student's t on the differences of equal seeds.

    Args:
        better: A measure of the arm that a claim says is better, by seed; None where it was not measured.
        worse: The same of the other arm.
    """
    pairs = [a - b for a, b in zip(better, worse) if a is not None and b is not None]
    if len(pairs) < 2:
        return Comparison(UNMEASURED)
    mean = statistics.mean(pairs)
    reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    low, high = mean - reach, mean + reach
    return Comparison(HELD if low > 0 else REVERSED if high < 0 else OPEN, mean, low, high)


def overall(comparisons: Sequence[Comparison]) -> str:
    """What the comparisons that a claim rests on say of it, as one sentence."""
    outcomes = [comparison.outcome for comparison in comparisons if comparison.outcome != UNMEASURED]
    if not outcomes:
        return "No verdict: fewer than two seeds have been measured."
    if all(outcome == OPEN for outcome in outcomes):
        return "No verdict: the differences lie within the spread of the seeds."
    if REVERSED not in outcomes:
        part = "" if OPEN not in outcomes else f" in part, in {outcomes.count(HELD)} of {len(outcomes)} comparisons"
        return f"The claim held at this scale{part}."
    if HELD in outcomes:
        return "The claim held in some comparisons at this scale, and the reverse was seen in others."
    return "The claim did not hold at this scale: the reverse was seen."


def spread(values: Values, digits: int = 3) -> str:
    """Mean and standard deviation as text, a dash where nothing was measured."""
    held = [value for value in values if value is not None]
    if not held:
        return "-"
    deviation = f" ± {statistics.stdev(held):.{digits}f}" if len(held) > 1 else ""
    return f"{statistics.mean(held):.{digits}f}{deviation}"
