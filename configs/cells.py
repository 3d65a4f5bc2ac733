"""From the values of all seeds to what stands in a cell of a table: a mean, and how far seeds differ.

    Cell("arith new")([0.41, 0.44, 0.37])       .41 [.23, .58]
"""
import math
import re

from data import UserError, mean


def values_of(rows, row, metric, source):
    """A metric of a row, one value a seed, None where it has none; of "+metric", the gain over the first row. source is
    what the table of these rows is called."""
    if row not in rows:
        raise UserError(f"table {source} has no row {row}, but {', '.join(rows)}")
    first, *_ = rows.values()
    name = metric.removeprefix("+")
    if not any(name in metrics for metrics in rows.values()):
        raise UserError(f"table {source} has no {name}, but {', '.join(first)}")
    values = rows[row].get(name, [None])
    if None in values or name == metric:
        return values
    return [value - before for value, before in zip(values, first[name])]


# The .975 quantiles of Student's t with 1, 2, ... degrees of freedom; for more than 20 the last is a little too wide.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
     2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]


def sd(values):
    """The standard deviation of a sample, by n - 1; 0 of one value."""
    center = mean(values)
    squares = [(value - center) ** 2 for value in values]
    degrees = max(1, len(values) - 1)
    return math.sqrt(sum(squares) / degrees)


def interval(values, new=True):
    """95%, by Student's t: where the value of a new seed falls; or, not new, where the mean of all seeds is."""
    n, center = len(values), mean(values)
    if n == 1:
        return center, center
    degrees = min(n - 1, len(T))
    t = T[degrees - 1]
    variance = 1 / n        # of the mean, in that of one seed
    if new:
        variance += 1
    half = t * sd(values) * math.sqrt(variance)
    return center - half, center + half


class Cell:
    """How the numbers of a column are written: .87, -1.20, 24.4."""

    def __init__(self, text):
        """text: "metric how digits", how one of HOW, digits those after the point, or g for three in all; the last two can
        be left out. "+metric" is the gain over the first row, "NAME.PART:metric" is of another table."""
        metric, *rest = text.split()
        self.source, _, self.metric = metric.rpartition(":")
        self.how = rest[0] if rest else "sd"
        digits = rest[1] if len(rest) > 1 else "2"
        self.form = ".3g" if digits == "g" else f".{digits}f"
        if self.how not in HOW:
            raise UserError(f'column "{text}": a cell is written as one of {", ".join(HOW)}')
        self.sign = "+" if self.metric.startswith("+") else ""
        self.share = SHARES.match(self.metric) is not None

    def number(self, x):
        text = f"{x:{self.sign}{self.form}}"
        if float(text) == 0:    # -.00
            text = text.strip("+-")
        return re.sub(r"^([+-]?)0\.", r"\1.", text)    # without the 0 before the point

    def __call__(self, values):
        """values: one a seed. A dash where a seed has none."""
        if None in values:
            return "–"
        if self.how == "first":
            return self.number(values[0])
        if self.how == "seeds":
            return " / ".join(map(self.number, values))
        center, spread = self.number(mean(values)), sd(values)
        if self.how == "mean" or not spread:
            return center
        if self.how == "sd":
            return f"{center} ± {self.number(spread).lstrip('+')}"
        low, high = interval(values, self.how == "new")
        if self.share:
            low, high = max(0.0, low), min(1.0, high)
        return f"{center} [{self.number(low)}, {self.number(high)}]"


HOW = {     # and what is said of it under a table
    "mean": "", "first": "Shown is the first of these seeds",
    "sd": "`a ± b`: mean and standard deviation", "seeds": "`a / b`: each seed",
    "new": "`a [b, c]`: mean, and where a new seed falls, 95%",
    "sure": "`a [b, c]`: mean over the seeds, and its 95% interval"}
SHARES = re.compile(r"arith|pass@|maj@|win|greedy_win|harmless|over_refusal|help|right")    # they end at 0 and 1
