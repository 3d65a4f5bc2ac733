"""The figures of the READMEs, from configs/results/*.json: FIGURES has a function for every configs/results/NAME.svg.

`python configs/report.py figures` draws them. charts.py has the axes and the lines.
"""
import itertools
import math

from configs.cells import interval, values_of
from configs.charts import COLORS, Axes, dot, drawing, legend, line, span, ticks, words
from configs.record import each, last_part, rows_from
from configs.tables import ALGORITHMS, KLS, METHODS, TFLOPS
from data import mean


def gains():
    """compare.sh: what each algorithm gains over SFT in `write`, sampled and greedy."""
    rows = rows_from("compare")
    _, *others = rows       # the first is SFT
    gained = {}         # {row: [values of all seeds, sampled; the same, greedy]}
    shown = [0.0]       # all that must be in sight
    for row in others:
        gained[row] = [values_of(rows, row, metric, "compare") for metric in ("+write", "+greedy")]
        for values in gained[row]:
            shown += [*values, *interval(values)]
    height = 44     # of a row
    axes = Axes(80, 40, 540, height * len(gained), span(shown), (0, 1))
    parts = legend(80, 22, 100, {"sampled": "c0 wide", "greedy": "c1 wide"})
    parts.append(words(290, 22, "a dot: a seed; the bar: where a new seed falls, 95%"))
    parts += axes.x_axis("true reward in write, gained over SFT", ticks(*axes.x_range, 8), zero=True)
    y = axes.top + 14
    for row, (sampled, greedy) in gained.items():
        name, _, _ = ALGORITHMS.get(row, row).partition(" |")
        parts.append(words(axes.left - 8, y + 12, name, "", "end"))
        parts += seeds_in_a_line(axes, y, sampled, 0)
        parts += seeds_in_a_line(axes, y + 16, greedy, 1)
        y += height
    return drawing(640, axes.bottom + 44, parts, gains.__doc__)


def seeds_in_a_line(axes, y, values, color):
    """A dot a seed at the height y, in pixels, with their mean, and a bar where a new seed falls."""
    low, high = map(axes.x, interval(values))
    center = axes.x(mean(values))
    bar = line(low, y, high, y, f"c{color} wide")
    middle = line(center, y - 6, center, y + 6, f"c{color} mean")
    dots = [dot(axes.x(value), y, f"f{color}") for value in values]
    return [bar, middle, *dots]


# What is fitted to a gain over d = √KL (Gao et al. 2210.10760, sec. 3.1).
FORMS = {"d (α - β d)": lambda d, alpha, beta: d * (alpha - beta * d),
         "d (α - β log d)": lambda d, alpha, beta: d * (alpha - beta * math.log(d))}


def overoptimization():
    """reward_hacking.sh: the true and the learned reward against √KL, and the two forms fitted to the true one."""
    return draw_curves(rows_from("reward_hacking.curves"))


def draw_curves(rows):
    """A panel for each row {"d": [a list a seed], "gold", "proxy" alike, "fits": [{form: {"alpha", "beta"}}, ...]}."""
    looks = dict(zip(FORMS, ("c2 dash", "c3 dots")))
    entries = {"gold, the truth": "c0", "proxy": "c1"}
    for form, look in looks.items():
        entries[f"fit {form}"] = look
    parts = legend(46, 20, 160, entries)
    first, *_ = rows.values()
    start = mean([gold[0] for gold in first["gold"]])   # of the policy before any optimisation
    for i, (row, curves) in enumerate(rows.items()):
        left, top = 46 + 262 * (i % 3), 56 + 226 * (i // 3)     # three panels side by side
        heights = flat(curves["gold"] + curves["proxy"])
        farthest = max(map(max, curves["d"])) or 1      # a policy that has not moved is at 0
        axes = Axes(left, top, 206, 160, (0, farthest), span(heights))
        parts += axes.frame(last_part(row), "d = √KL")
        parts += axes.seeds_and_mean(curves["d"], curves["proxy"], "c1")
        parts += axes.seeds_and_mean(curves["d"], curves["gold"], "c0")
        for form, look in looks.items():
            fits = [of_seed[form] for of_seed in curves["fits"] if form in of_seed]
            if fits:
                parts.append(fitted(axes, fits, form, start, look))
    lines = math.ceil(len(rows) / 3)
    return drawing(832, 46 + 226 * lines, parts, overoptimization.__doc__)


def flat(lists):
    """The values of several lists, in one."""
    return list(itertools.chain(*lists))


def fitted(axes, fits, form, start, look):
    """A form with the mean coefficients of the seeds, where it is inside the axes."""
    alpha = mean(each(fits, "alpha"))
    beta = mean(each(fits, "beta"))
    low, high = axes.y_range
    _, farthest = axes.x_range
    xs, ys = [], []
    for i in range(1, 25):      # not at 0, which has no logarithm
        x = farthest * i / 24
        y = start + FORMS[form](x, alpha, beta)
        if low <= y <= high:
            xs.append(x)
            ys.append(y)
    return axes.curve(xs, ys, look)


def scaling():
    """o1.sh: sums right against the number of samples, after more and more steps of RL."""
    rows = rows_from("o1")
    looks = {}
    for i, row in enumerate(rows):
        looks[last_part(row)] = f"c{i % COLORS}"
    parts = legend(48, 22, 120, looks)
    parts += over_samples(48, rows, "pass@", "one right among k: pass@k")
    parts += over_samples(348, rows, "maj@", "the majority of k: maj@k")
    return drawing(610, 300, parts, scaling.__doc__)


def over_samples(left, rows, kind, title):
    """A panel with a row's pass@k or maj@k against k, in the row's colour."""
    first, *_ = rows.values()
    ks = sorted(int(name.removeprefix(kind)) for name in first if name.startswith(kind))
    curves, shown = [], []
    for metrics in rows.values():
        of_k = [metrics[f"{kind}{k}"] for k in ks]      # of each k, a value a seed
        curves.append(list(zip(*of_k)))     # of each seed, a value a k
        shown += flat(of_k)
    axes = Axes(left, 60, 240, 190, (1, ks[-1]), span(shown), x_log=True)
    parts = axes.frame(title, "k, samples to a prompt", ks)
    for i, per_seed in enumerate(curves):
        parts += axes.seeds_and_mean([ks] * len(per_seed), per_seed, f"c{i % COLORS}")
    return parts


def thinking():
    """compare.sh: the share of sums that are right while GRPO learns them, and how much the model thinks."""
    curves = rows_from("compare.curves")["grpo"]
    titles = {"gold": "share of sums right", "reward/format": "share of answers that think",
              "response_length": "tokens of an answer"}
    thinks = "reward/format" if "reward/format" in curves else "response_length"
    parts = []
    for panel, metric in enumerate(("gold", thinks)):
        per_seed = curves[metric]
        steps = range(len(per_seed[0]))
        left, last = 48 + 300 * panel, len(steps) - 1
        axes = Axes(left, 36, 240, 180, (0, last), span(flat(per_seed)))
        parts += axes.frame(titles[metric], "steps of GRPO")
        parts += axes.seeds_and_mean([steps] * len(per_seed), per_seed, f"c{panel}")
    return drawing(610, 266, parts, thinking.__doc__)


def when():
    """when.sh: true reward over √KL and over compute, of methods that learn from the same data."""
    rows = rows_from("when")
    looks = {name: f"c{i}" for i, name in enumerate(METHODS.values())}
    parts = legend(48, 22, 110, looks)
    for top, metric, title in ((60, "gold", "true reward of samples"), (330, "greedy", "true reward of greedy answers")):
        kls = curves_at(rows, metric, KLS, root_kl)
        parts += over_places(48, top, kls, title, "d = √KL")
        budgets = curves_at(rows, metric, TFLOPS, tflops)
        parts += over_places(348, top, budgets, title, "TFLOPs of training", x_log=True)
    return drawing(610, 570, parts, when.__doc__)


def root_kl(place):
    """kl0.25 -> 0.5"""
    return math.sqrt(float(place.removeprefix("kl")))


def tflops(place):
    """0.5T -> 0.5"""
    return float(place.removesuffix("T"))


def curves_at(rows, metric, places, x_of):
    """{method: {x: a value a seed}} of a metric at the places of its curve that all seeds have."""
    curves = {}
    for method in METHODS:
        curves[method] = {}
        for place in places.values():
            values = rows[method].get(f"{metric}@{place}", [None])
            if None not in values:
                curves[method][x_of(place)] = values
    return curves


def over_places(left, top, curves, title, x_label, x_log=False):
    """A panel with the curves of all methods, each in its colour. On a logarithmic axis their places are the ticks."""
    across, shown = [], []
    for curve in curves.values():
        across += curve
        shown += flat(curve.values())
    axes = Axes(left, top, 240, 190, (min(across), max(across)), span(shown), x_log=x_log)
    parts = axes.frame(title, x_label, sorted(set(across)) if x_log else None)
    for i, curve in enumerate(curves.values()):
        per_seed = list(zip(*curve.values()))
        if per_seed:
            parts += axes.seeds_and_mean([list(curve)] * len(per_seed), per_seed, f"c{i}")
    return parts


FIGURES = dict(gains=gains, overoptimization=overoptimization, scaling=scaling, thinking=thinking, when=when)
