"""Results as data: run recipes over seeds, and make every table, every figure and a page of what they left.

    python configs/report.py record compare --seeds 0,1,2   runs compare.sh once a seed -> configs/results/compare.json
    python configs/report.py tables     such files -> the tables of the READMEs and of tests/STUDY.md
    python configs/report.py figures    such files -> configs/results/*.svg
    python configs/report.py page out/* run folders -> one page of them, out/report.html (--out); `page` can be left out

A recipe NAME.sh leaves its tables as $OUT/tables/NAME.json or NAME.PART.json: {"rows": [{"checkpoint": "out/seed0/dpo",
"arith": 0.31, ...}, ...]}. A row that is no checkpoint has a "name". Its numbers are gathered, and lists and dicts of
numbers; texts are not.

    configs/results/NAME.json   {"recipe", "commit", "machine", "torch", "seeds", "seconds": one a seed,
                                 "tables": {"NAME": {"dpo": {"arith": [one a seed], ...}, ...}, "NAME.PART": ...}}

In a README the lines <!-- table NAME --> and <!-- end --> enclose a printed table; TABLES below says what it shows.
"""
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.charts import COLORS, Axes, dot, drawing, legend, line, span, ticks, words
from configs.page import Page, page
from configs.changes import CHANGES
from configs.record import LOGS, READMES, RESULTS, Record, each, record, results_of, rows_from
from data import OptionError, Options, UserError, guard, mean, parse, tell, write_text


# ---------------------------------------------------------------- the tables

@dataclass
class Table:
    """A printed table. source: a table of a results file, NAME or NAME.PART. columns: {title: what Cell reads}. rows:
    {row: what is printed for it}, with | between several cells, whose titles are in head; without, all of them."""
    source: str
    columns: dict
    rows: dict | None = None
    head: str = ""


ALGORITHMS = {
    "sft": "SFT | demonstrations", "dpo": "DPO | the pairs", "ppo": "PPO | the reward model",
    "grpo": "GRPO | a verifier of sums", "kto": "KTO | the pairs, as thumbs", "orpo": "ORPO | the pairs",
    "simpo": "SimPO | the pairs"}
MAIN = {"sums right": "arith new", "`write`: true reward": "write new", "greedy": "greedy new",
        "win rate over SFT": "win new", "KL": "kl mean", "length": "length mean 0"}
ALL = {"`arith`": "arith", "`write`": "write", "`safe`": "safe", "`fmt`": "fmt", "nll": "nll", "proxy": "proxy",
       "win": "win", "KL": "kl", "length": "length sd 1", "greedy": "greedy", "greedy win": "greedy_win"}
GAIN = {"true reward in `write`": "write", "win": "win", "greedy": "greedy", "greedy win": "greedy_win", "KL": "kl"}
LOSSES = {
    "sft": "SFT | demonstrations", "losses/best/dpo": "DPO | pairs", "losses/best/rso": "RSO | pairs",
    "losses/best/gpo_exponential": "GPO, exponential | pairs", "losses/best/gpo_savage": "GPO, Savage | pairs",
    "losses/best/dpop": "DPOP | pairs", "losses/best/tdpo2": "TDPO | pairs",
    "losses/best/sppo": "SPPO | pairs and win rates", "losses/best/dno": "DNO | pairs and win rates",
    "losses/best/dro": "DRO | answers and scores", "losses/best/d2o": "D2O | pairs", "losses/best/npo": "NPO | the worse answers",
    "losses/best/slic": "SLiC-HF | pairs, no reference", "losses/best/cpo": "CPO | pairs, no reference",
    "losses/best/spo": "SPO | the reward model, by RL"}
TRAINED = {"dpo": "DPO", "online_dpo": "online DPO", "ppo": "PPO", "grpo": "GRPO"}
METHODS = TRAINED | {"best of n": "best of n"}
KLS, BUDGETS = (0.25, 0.5, 1, 2, 4), (0.125, 0.25, 0.5, 1)
PPO_LOG = {"`reward`": "reward first", "`gold`": "gold first", "`kl`": "kl first", "`entropy`": "entropy first",
           "`response_length`": "response_length first 1", "`clip_frac`": "clip_frac first 4",
           "`approx_kl`": "approx_kl first 4", "`policy_loss`": "policy_loss first 4", "`value_loss`": "value_loss first 3",
           "`explained_variance`": "explained_variance first"}
GRPO_LOG = {"`reward`": "reward first", "`zero_std`": "zero_std first", "`loss`": "loss first 3",
            "`grad_norm`": "grad_norm first", "`entropy`": "entropy first", "`response_length`": "response_length first 1",
            "`finished`": "finished first", "`val_reward`": "val_reward first"}

# {NAME of a block in a README: what it shows}. A recipe's is a line: "dapo": Table("dapo", {"sums right": "arith"}).
TABLES = {
    "algorithms": Table("compare", MAIN, ALGORITHMS, " | learns from"),
    "compare": Table("compare", ALL),
    "reward": Table("compare.stages", {"of the labels": "val_accuracy", "of the truth": "val_gold"}, {"reward": "right"}),
    "thinking": Table("thinking", {"sampled": "arith new", "greedy": "thinking.greedy:arith new",
                                   "four steps, sampled": "arith4 new", "made to think": "thinking.made:arith new",
                                   "thinks": "thinking.who:arith new"}),
    "variants": Table("variants", ALL),
    "phi3": Table("phi3.fillers", {"answers without fillers": "write", "true reward in `write`": "phi3:write",
                                   "greedy": "phi3:greedy", "sums right": "phi3:arith"}),
    "zephyr": Table("zephyr_orpo", {"true reward in `write`": "write", "win rate over SFT": "win", "greedy win": "greedy_win",
                                    "sums right": "arith", "nll": "nll"}),
    "hermes3": Table("hermes3", {"true reward in `write`": "write", "win rate over SFT": "win", "greedy win": "greedy_win",
                                 "KL": "kl", "sums right": "arith"}),
    "ppo_log": Table("compare.log", PPO_LOG, {f"ppo {step}": str(step) for step in LOGS["compare"]["ppo"]}, "step"),
    "grpo_log": Table("compare.log", GRPO_LOG, {f"grpo {step}": str(step) for step in LOGS["compare"]["grpo"]}, "step"),
    "changes": Table("changes", {"plain": "plain", "changed": "changed", "as said": "as_said"},
                     {f"{change.run} {change.metric}": str(change) for change in CHANGES}, "option | metric | goes | why"),
    "losses": Table("losses", {"true reward in `write`": "write", "win": "win", "greedy": "greedy",
                               "greedy win": "greedy_win", "proxy": "proxy", "KL": "kl", "nll": "nll"}, LOSSES, "loss | learns from"),
    "losses_flipped": Table("losses.flipped", GAIN),
    "losses_bad": Table("losses.bad", {"true reward in `safe`": "safe", "harmless": "harmless", "over-refusal": "over_refusal",
                                       "help": "help", "KL": "kl sd 1", "nll": "nll"},
                        {"sft": "sft", "losses/bad/npo5e-5": "NPO, 5e-5", "losses/bad/d2o5e-5": "D2O, 5e-5",
                         "losses/bad/npo2e-4": "NPO, 2e-4", "losses/bad/d2o2e-4": "D2O, 2e-4"}),
    "losses_thumbs": Table("losses.thumbs", GAIN),
    "losses_digits": Table("losses.digits", {"chosen": "val_rewards/chosen", "rejected": "val_rewards/rejected",
                                             "accuracy": "val_rewards/accuracy", "KL": "kl"}),
    "losses_rounds": Table("losses.rounds", GAIN | {"proxy": "proxy"}),
    "losses_own": Table("losses.own", GAIN, {"sft": "sft", "losses/best/rso": "RSO, on the pairs of all",
                                             "losses/own/rso": "RSO, on its own", "losses/best/spo": "SPO, by the reward model",
                                             "losses/own/spo": "SPO, by how often people prefer it"}),
    "when_kl": Table("when", {f"{kl} nats": f"gold@kl{kl}" for kl in KLS}, METHODS, "true reward at a KL of"),
    "when_kl_greedy": Table("when", {f"{kl} nats": f"greedy@kl{kl}" for kl in KLS}, TRAINED, "greedy at a KL of"),
    "when_compute": Table("when", {f"{budget}": f"gold@{budget}T" for budget in BUDGETS}, TRAINED, "true reward at so many TFLOPs"),
    "when_compute_greedy": Table("when", {f"{budget}": f"greedy@{budget}T" for budget in BUDGETS}, TRAINED,
                                 "greedy at so many TFLOPs"),
    "o1": Table("o1", {"one answer": "pass@1", "majority of 16": "maj@16", "one right of 16": "pass@16"}),
}


# ---------------------------------------------------------------- the figures

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
    return sum(lists, [])


def last_part(row):
    """o1/steps10 -> steps10."""
    return row.split("/")[-1]


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


FIGURES = dict(gains=gains, overoptimization=overoptimization, scaling=scaling, thinking=thinking)


@dataclass
class Figures(Options):
    """Draw configs/results/*.svg from the results files."""
    check: bool = False         # write nothing; say which differ, and exit with 1 if any does


def figures(cfg):
    """Every figure whose results are there."""
    drawn, stale = 0, []
    for name, draw in FIGURES.items():
        path = RESULTS / f"{name}.svg"
        try:
            text = draw()
        except (UserError, LookupError) as e:   # no such file; or nothing in it of what the figure shows
            tell(f"{path.name} is not drawn: {e}")
            continue
        drawn += 1
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path))
            if not cfg.check:
                write_text(path, text)
    tell_stale(stale, cfg.check, f"{drawn} figures")


# ---------------------------------------------------------------- printing a table

@dataclass
class Tables(Options):
    """Rewrite the tables of the READMEs and of tests/STUDY.md from the results files."""
    check: bool = False         # write nothing; say which differ, and exit with 1 if any does


def tables(cfg):
    """Every block of the READMEs anew."""
    printed, stale = [], []
    for readme in READMES:
        text, names, changed = rewrite(readme)
        printed += names
        stale += [f"{readme}: table {name}" for name in changed]
        if changed and not cfg.check:
            write_text(readme, text)
    for name in TABLES:
        if name not in printed:
            tell(f"table {name} is printed nowhere")
    tell_stale(stale, cfg.check, f"{len(printed)} tables")


def tell_stale(stale, check, count):
    """Say which were not as the results files are; a mistake, if that was only to be checked."""
    said = "differs from configs/results" if check else "is made anew"
    for what in stale:
        print(f"{what} {said}")
    print(f"{count}, {len(stale)} changed")
    if stale and check:
        raise UserError("not all is as configs/results has it; the same command without --check makes it so")


# <!-- table NAME ... -->, its lines, <!-- end -->
BLOCK = re.compile(r"(?ms)^(<!-- table ([\w.-]+)[^\n]*-->\n)(.*?)^(<!-- end -->)$")


def rewrite(readme):
    """A README with all its tables made from the results files; the names of all, and of those that were otherwise."""
    text = readme.read_text(encoding="utf-8")
    names, changed = [], []

    def renew(block):
        begin, name, was, end = block.groups()
        if name not in TABLES:
            raise UserError(f"{readme}: configs/report.py knows no table {name}; add it to TABLES")
        now = printed_table(TABLES[name])
        names.append(name)
        if now != was:
            changed.append(name)
        return begin + now + end

    new = BLOCK.sub(renew, text)
    begun = len(re.findall("(?m)^<!-- table ", text))
    ended = len(re.findall("(?m)^<!-- end -->", text))
    if not begun == ended == len(names):
        raise UserError(f"{readme}: {begun} times <!-- table NAME -->, {ended} times <!-- end -->: each table has one")
    return new, names, changed


def printed_table(table):
    """A table in Markdown, and what stands under it."""
    cells = [Cell(text) for text in table.columns.values()]
    rows = table.rows or own_names(rows_from(table.source))
    heads = table.head.split("|") + list(table.columns)
    lines = [markdown(heads), "|" + "---|" * len(heads)]
    for row, printed in rows.items():
        texts = printed.split("|")
        for cell in cells:
            source = cell.source or table.source
            values = values_of(rows_from(source), row, cell.metric, source)
            texts.append(cell(values))
        lines.append(markdown(texts))
    hows = [cell.how for cell in cells]
    under = provenance(results_of(table.source), hows)
    return "\n".join([*lines, "", under, ""])


def own_names(rows):
    """{row: what it is called}, the last part of its folder where no other row has that."""
    last = [last_part(row) for row in rows]
    names = last if len(set(last)) == len(last) else rows
    return dict(zip(rows, names))


def markdown(texts):
    """A line of a table."""
    return "| " + " | ".join(text.strip() for text in texts) + " |"


def provenance(results, hows):
    """Where the numbers of a table are from, and how to read its cells."""
    seeds = ", ".join(map(str, results["seeds"]))
    seconds = f"{median(results['seconds']):.0f} s"     # other work on the machine makes some runs slow
    made = f"{results['machine']}; commit {results['commit']}"
    if len(results["seeds"]) == 1:
        return f"Seed {seeds}; {made}; {seconds}."
    said = [f"Seeds {seeds}; {made}; {seconds} a seed."]
    for how in dict.fromkeys(hows):
        if HOW[how]:
            said.append(f"{HOW[how]}.")
    return " ".join(said)


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


# ---------------------------------------------------------------- what is in a cell

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
        """text: "metric how digits", how one of HOW; the last two can be left out. "+metric" is the gain over the first
        row, "NAME.PART:metric" is of another table."""
        metric, *rest = text.split()
        self.source, _, self.metric = metric.rpartition(":")
        self.how = rest[0] if rest else "sd"
        self.digits = int(rest[1]) if len(rest) > 1 else 2
        if self.how not in HOW:
            raise UserError(f'column "{text}": a cell is written as one of {", ".join(HOW)}')
        self.sign = "+" if self.metric.startswith("+") else ""
        self.share = SHARES.match(self.metric) is not None

    def number(self, x):
        text = f"{x:{self.sign}.{self.digits}f}"
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
    "mean": "", "first": "shown is the first of these seeds",
    "sd": "`a ± b`: mean and standard deviation", "seeds": "`a / b`: each seed",
    "new": "`a [b, c]`: mean, and where a new seed falls, 95%",
    "sure": "`a [b, c]`: mean over the seeds, and its 95% interval"}
SHARES = re.compile(r"arith|pass@|maj@|win|greedy_win|harmless|over_refusal|help|right")    # they end at 0 and 1


# ---------------------------------------------------------------- the command line

COMMANDS = {
    "record": (Record, record),
    "tables": (Tables, tables),
    "figures": (Figures, figures),
    "page": (Page, page)}
TAKES = dict(record=["recipe"], page=["run", "run..."])     # words behind the command, besides options


def main():
    """Run the command that the first word names; anything else that exists is a run to show on a page."""
    first, *rest = sys.argv[1:] or [""]
    if first in ("-h", "--help"):
        print(f"{__doc__}\n--help after a command lists its options: {', '.join(COMMANDS)}")
        return
    if first not in COMMANDS and first and Path(first).exists():
        first, rest = "page", sys.argv[1:]
    if first not in COMMANDS:
        what = f"there is no {first}; " if first else ""
        raise OptionError(f"{what}say what to do: python configs/report.py {'|'.join(COMMANDS)} (--help after it "
                          "lists its options), or name run folders")
    Config, command = COMMANDS[first]
    if first in TAKES:
        command(*parse(Config, TAKES[first], rest, first))
    else:
        command(parse(Config, (), rest, first))


if __name__ == "__main__":
    guard(main)
