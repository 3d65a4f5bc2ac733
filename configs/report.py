"""Results as data: run recipes over seeds, and make every table, every figure and a page of what they left.

    python configs/report.py record compare --seeds 0,1,2   runs compare.sh once a seed -> configs/results/compare.json
    python configs/report.py tables     such files -> the tables of README.md and configs/README.md
    python configs/report.py figures    such files -> configs/results/*.svg
    python configs/report.py page out/* run folders -> one page of them, out/report.html (--out); `page` can be left out

A recipe NAME.sh leaves its tables as $OUT/tables/NAME.json or NAME.PART.json: {"rows": [{"checkpoint": "out/seed0/dpo",
"arith": 0.31, ...}, ...]}. A row that is no checkpoint has a "name". Its numbers are gathered, and lists and dicts of
numbers; texts are not.

    configs/results/NAME.json   {"recipe", "commit", "machine", "torch", "seeds", "seconds": one a seed,
                                 "tables": {"NAME": {"dpo": {"arith": [one a seed], ...}, ...}, "NAME.PART": ...}}

In a README the lines <!-- table NAME --> and <!-- end --> enclose a printed table; TABLES below says what it shows.
"""
import functools
import html
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import Count, Natural, OptionError, Options, UserError, guard, mean, parse, tell, write_text
from model import find_device, machine, read_json

RESULTS = ROOT / "configs/results"
READMES = [ROOT / "README.md", ROOT / "configs/README.md"]


# ---------------------------------------------------------------- record

# Curves that become a table NAME.curves beside those that the recipe leaves: {recipe: {run: its metrics}}.
CURVES = {"compare": {"grpo": ["gold", "reward/format", "response_length"]}}
# And what each stage logged last of these becomes a table NAME.stages.
ENDS = ("seconds", "val_loss", "val_accuracy", "val_gold")


@dataclass
class Record(Options):
    """Run a recipe once a seed, and gather its tables into configs/results/NAME.json.

    Seed 0 has the folder out/seed0, and its log there in NAME.log. NAME.run.json says on what it was made, and that it
    is finished: then it is only gathered. Without that file the recipe runs, and skips the stages that are finished.
    """
    seeds: str = "0,1,2"        # all that the results file is to have, with commas between them
    jobs: Count = 1             # runs at a time; several have one thread each
    out: str = "out"            # folder in which every seed has its own
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the matmuls
    threads: Natural = 0        # CPU threads of a run; 0 leaves it to PyTorch


class SeedRun:
    """One run of a recipe: its folder, its log, and the note that says on what it was made."""

    def __init__(self, name, seed, cfg):
        self.name, self.seed = name, seed
        out = os.path.join(cfg.out, f"seed{seed}")
        self.out = out if os.path.isabs(out) else os.path.relpath(out, ROOT)    # the recipes run in ROOT
        self.folder = ROOT / self.out
        self.log = self.folder / f"{name}.log"
        self.note = self.folder / f"{name}.run.json"
        self.recipe = [f"configs/{name}.sh", "--seed", str(seed)]
        if cfg.threads:
            self.recipe += ["--threads", str(cfg.threads)]
        if cfg.dtype != "auto":
            self.recipe += ["--dtype", cfg.dtype]

    def bash(self, *words, **options):
        """Start bash in ROOT, for this seed's folder; its `python` is the one that runs this."""
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        env = os.environ | dict(OUT=self.out, PATH=path)
        return subprocess.Popen(["bash", *words], cwd=ROOT, env=env, text=True, stdin=subprocess.DEVNULL, **options)

    def tables(self):
        """The files of the tables that the recipe has left."""
        paths = sorted((self.folder / "tables").glob("*.json"))
        return [path for path in paths if path.name.split(".")[0] == self.name]

    def finished(self):
        return self.note.exists() and bool(self.tables())

    @functools.cached_property
    def stages(self):
        """The run folders that the recipe makes: bash reads it with a `python` that only repeats what it is told."""
        repeat = 'python() { printf "%s\\n" "$@"; }; source "$0"'
        reader = self.bash("-c", repeat, *self.recipe, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        words, error = reader.communicate()
        if reader.returncode:
            raise UserError(f"configs/{self.name}.sh: {last_line(error)}")
        words = words.splitlines()
        folders = {}
        for option, value in zip(words, words[1:]):
            if option == "--out":
                folders[ROOT / value] = True
        return list(folders)

    def begin(self, made):
        """Start the recipe; made: commit, machine and torch."""
        self.made = made
        self.before = sum(map(seconds_of, self.stages))
        self.since = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = self.bash(*self.recipe, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        print(f"seed {self.seed} runs; its log is {self.log}", flush=True)

    def end(self):
        """After the recipe: write the note, or say what went wrong. -> Whether all is well.

        The seconds are those from nothing: of this run, and what its stages had taken before it.
        """
        seconds = round(self.before + time.perf_counter() - self.since, 1)
        fault = ""
        if self.process.returncode:
            fault = last_line(self.log.read_text(encoding="utf-8", errors="replace"))
        elif not self.tables():
            fault = f"it left no {self.folder}/tables/{self.name}.json"
        if fault:
            tell(f"seed {self.seed} failed: {fault} ({self.log})")
            return False
        note = self.made | dict(seconds=seconds)
        write_text(self.note, json.dumps(note, indent=1))
        print(f"seed {self.seed} is finished: {seconds:.0f} s", flush=True)
        return True


def record(cfg, names):
    """Run what is not finished, so many at a time, then write the results file."""
    name, = names
    seeds = seeds_of(cfg.seeds)
    recipes = sorted(path.stem for path in (ROOT / "configs").glob("*.sh"))
    if name not in recipes:
        raise OptionError(f"there is no configs/{name}.sh; choose from {', '.join(recipes)}")
    if cfg.jobs > 1:
        cfg.threads = 1
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    here = machine(find_device("auto"), cfg.dtype)
    made = dict(commit=commit(), machine=here, torch=torch.__version__.split("+")[0])
    runs = [SeedRun(name, seed, cfg) for seed in seeds]
    to_do = []
    for run in runs:
        if run.finished():
            print(f"seed {run.seed} is only gathered, as {run.note} says")
        else:
            to_do.append(run)
    failed = run_all(to_do, cfg.jobs, made)
    if failed:
        raise UserError(f"{name}: {failed} seeds failed, nothing is written; the same command goes on from here")
    path = RESULTS / f"{name}.json"
    write_text(path, to_json(gather(name, runs)))
    print(f"{path}: {len(seeds)} seeds")


def seeds_of(text):
    """The seeds that a text like 0,1,2 names."""
    words = text.split(",")
    numbers = [int(word) for word in words if re.fullmatch(r"\d{1,9}", word)]
    if len(set(numbers)) < len(words):
        raise OptionError(f"--seeds {text}: whole numbers with commas between them, each once, as in 0,1,2")
    return numbers


def run_all(runs, jobs, made):
    """Let the recipes run, so many at a time -> how many failed."""
    waiting, running, failed = list(runs), [], 0
    stages = []
    for run in runs:
        stages += run.stages
    shown = tqdm(total=len(stages), unit="stage", leave=False, disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].begin(made)
            time.sleep(0.1)
            for run in list(running):
                if run.process.poll() is not None:
                    running.remove(run)
                    failed += not run.end()
            shown.n = sum((folder / "summary.json").exists() for folder in stages)
            shown.refresh()
    finally:
        shown.close()
        for run in running:     # interrupted: what they have saved is whole
            os.killpg(run.process.pid, signal.SIGTERM)
    return failed


def commit():
    """The commit of the code, with a + if files that results depend on differ from it; unknown outside git."""
    def git(*words):
        said = subprocess.check_output(["git", *words], cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
        return said.strip()
    try:
        changed = git("status", "--porcelain", "--", ".", ":!configs/results", ":!*.md")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def seconds_of(folder):
    """How long a run has taken so far, 0 where there is none."""
    rows, _ = read_log(folder)
    return rows[-1].get("seconds", 0) if rows else 0


def last_line(text):
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def gather(name, runs):
    """The content of configs/results/NAME.json, from what the runs have left."""
    notes = [read_json(run.note) for run in runs]
    result = dict(recipe=name)
    for key in ("commit", "machine", "torch"):
        different = dict.fromkeys(each(notes, key))
        result[key] = " and ".join(different)
    result["seeds"] = [run.seed for run in runs]
    result["seconds"] = each(notes, "seconds")

    seeds_of_table = defaultdict(dict)      # {table: {seed: {row: {metric: value}}}}
    for run in runs:
        for path in run.tables():
            seeds_of_table[path.stem][run.seed] = rows_of(path, run.out)
        if name in CURVES:
            seeds_of_table[f"{name}.curves"][run.seed] = curves_of(run, CURVES[name])
        seeds_of_table[f"{name}.stages"][run.seed] = ends_of(run)
    result["tables"] = {}
    for table, of_seed in seeds_of_table.items():
        if len(of_seed) < len(runs):
            raise UserError(f"the table {table} is only there for {len(of_seed)} of {len(runs)} seeds")
        result["tables"][table] = over_seeds(of_seed, table)
    return result


def rows_of(path, out):
    """{row: {metric: number, or list or dict of numbers}} of a table that a recipe has left in $OUT."""
    rows = {}
    for row in table_rows(path):
        name = name_of(row).replace(f"{out}/", "")
        if name in rows:
            raise UserError(f"{path}: two rows are called {name}; delete the file, and the recipe makes it anew")
        rows[name] = {}
        for metric, value in row.items():
            if is_numeric(value):
                rows[name][metric] = rounded(value)
    return rows


def table_rows(path):
    """The rows of a table's file."""
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{path}: no table, which is {{"rows": [{{...}}, ...]}}')
    return rows


def name_of(row):
    """What a row is called; one of reward.py accuracy, by the file that it is about, too."""
    name = str(row.get("checkpoint", row.get("name", "")))
    return f"{name} on {row['data']}" if "data" in row else name


def each(rows, key):
    """What every row has under a key."""
    return [row[key] for row in rows]


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def is_numeric(value):
    """Whether it is a number, or lists and dicts of numbers; None is a number that does not exist."""
    if isinstance(value, dict):
        return is_numeric(list(value.values()))
    if isinstance(value, list):
        return all(map(is_numeric, value))
    return value is None or is_number(value)


def rounded(value):
    """Numbers to six digits, in lists and dicts as well."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if type(value) is float else value


def curves_of(run, wanted):
    """{run: {metric: its values by step}} of the metrics that were logged at every step."""
    curves = {}
    for folder, metrics in wanted.items():
        rows, _ = read_log(run.folder / folder)
        curves[folder] = {}
        for metric in metrics:
            values = [row.get(metric) for row in rows]
            if values and None not in values:
                curves[folder][metric] = rounded(values)
    return curves


def ends_of(run):
    """{stage: {metric: what it logged last}} of the metrics in ENDS."""
    ends = {}
    for folder in run.stages:
        last = {}
        for row in read_log(folder)[0]:
            last |= {metric: rounded(row[metric]) for metric in ENDS if is_number(row.get(metric))}
        ends[os.path.relpath(folder, run.folder)] = last
    return ends


def over_seeds(of_seed, table):
    """{seed: {row: {metric: value}}} -> {row: {metric: [a value a seed]}}; None where a seed has no value."""
    first, *others = of_seed
    for seed in others:
        different = of_seed[seed].keys() ^ of_seed[first].keys()
        if different:
            raise UserError(f"{table}: of seeds {first} and {seed} only one has {', '.join(different)}")
    out = {}
    for row in of_seed[first]:
        per_seed = [rows[row] for rows in of_seed.values()]
        names = dict.fromkeys(name for metrics in per_seed for name in metrics)
        out[row] = {name: [metrics.get(name) for metrics in per_seed] for name in names}
    return out


def to_json(result):
    """JSON with a metric a line."""
    def in_a_line(found):
        numbers = found[1].split()
        return f"[{' '.join(numbers)}]"
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[([^][{}]*)\]", in_a_line, text) + "\n"


# ---------------------------------------------------------------- what is in a cell

# The .975 quantiles of Student's t with 1, 2, ... degrees of freedom; for more than 20 the last is a little too wide.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
     2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]


def sd(values):
    """The standard deviation of a sample, by n - 1; 0 of one value."""
    center = mean(values)
    squares = [(value - center) ** 2 for value in values]
    return math.sqrt(sum(squares) / max(1, len(values) - 1))


def interval(values, new=True):
    """95%, by Student's t: where the value of a new seed falls; or, not new, where the mean of all seeds is."""
    n, center = len(values), mean(values)
    if n == 1:
        return center, center
    t = T[min(n - 1, len(T)) - 1]
    half = t * sd(values) * math.sqrt(new + 1 / n)
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
        if float(text) == 0:
            text = text.strip("+-")
        return re.sub(r"^([+-]?)0\.", r"\1.", text)

    def __call__(self, values):
        """values: one a seed. A dash where a seed has none."""
        if None in values:
            return "–"
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
    "mean": "", "sd": "`a ± b`: mean and standard deviation", "seeds": "`a / b`: each seed",
    "new": "`a [b, c]`: mean, and where a new seed falls, 95%",
    "sure": "`a [b, c]`: mean over the seeds, and its 95% interval"}
SHARES = re.compile(r"arith|pass@|maj@|win|greedy_win|harmless|over_refusal|help|right")    # they end at 0 and 1


# ---------------------------------------------------------------- the printed tables

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

# {NAME of a block in a README: what it shows}. A recipe's is a line: "dapo": Table("dapo", {"sums right": "arith"}).
TABLES = {
    "algorithms": Table("compare", MAIN, ALGORITHMS, " | learns from"),
    "compare": Table("compare", ALL),
    "reward": Table("compare.stages", {"of the labels": "val_accuracy", "of the truth": "val_gold"}, {"reward": "right"}),
    "thinking": Table("thinking", {"sampled": "arith new", "greedy": "thinking.greedy:arith new",
                                   "four steps, sampled": "arith4 new", "made to think": "thinking.made:arith new",
                                   "thinks": "thinking.who:arith new"}),
    "variants": Table("variants", ALL),
}


@dataclass
class Tables(Options):
    """Rewrite the tables of README.md and configs/README.md from the results files."""
    check: bool = False         # write nothing; say which differ, and exit with 1 if any does


def tables(cfg):
    """Every block of the pages anew."""
    printed, stale = [], []
    for page in READMES:
        text, names, changed = rewrite(page)
        printed += names
        stale += [f"{page}: table {name}" for name in changed]
        if changed and not cfg.check:
            write_text(page, text)
    for name in TABLES:
        if name not in printed:
            tell(f"table {name} is printed nowhere")
    tell_stale(stale, cfg.check, f"{len(printed)} tables")


def tell_stale(stale, check, count):
    """Say which were not as the results files are; a mistake, if that was only to be checked."""
    for what in stale:
        print(f"{what} {'differs from configs/results' if check else 'is made anew'}")
    print(f"{count}, {len(stale)} changed")
    if stale and check:
        raise UserError("not all is as configs/results has it; the same command without --check makes it so")


BLOCK = re.compile(r"(?ms)^(<!-- table ([\w.-]+)[^\n]*-->\n)(.*?)^(<!-- end -->)$")


def rewrite(page):
    """A page with all its tables made from the results files; the names of all, and of those that were otherwise."""
    text = page.read_text(encoding="utf-8")
    names, changed = [], []

    def renew(block):
        begin, name, was, end = block.groups()
        if name not in TABLES:
            raise UserError(f"{page}: configs/report.py knows no table {name}; add it to TABLES")
        now = printed_table(TABLES[name])
        names.append(name)
        if now != was:
            changed.append(name)
        return begin + now + end

    new = BLOCK.sub(renew, text)
    begun = len(re.findall("(?m)^<!-- table ", text))
    ended = len(re.findall("(?m)^<!-- end -->", text))
    if not begun == ended == len(names):
        raise UserError(f"{page}: {begun} times <!-- table NAME -->, {ended} times <!-- end -->: each table has one")
    return new, names, changed


def results_of(source):
    """The content of the results file that has a table NAME or NAME.PART."""
    recipe = source.split(".")[0]
    path = RESULTS / f"{recipe}.json"
    if not path.exists():
        raise UserError(f"there is no {path}; python configs/report.py record {recipe} makes it")
    return read_json(path)


def rows_from(source):
    """{row: {metric: [a value a seed]}} of a table NAME or NAME.PART."""
    found = results_of(source)["tables"]
    if source not in found:
        raise UserError(f"configs/results has no table {source}, but {', '.join(found)}")
    return found[source]


def values_of(found, row, metric, source):
    """A metric of a row, one value a seed, None where it has none; of "+metric", the gain over the first row."""
    if row not in found:
        raise UserError(f"table {source} has no row {row}, but {', '.join(found)}")
    name, first = metric.removeprefix("+"), next(iter(found.values()))
    if not any(name in metrics for metrics in found.values()):
        raise UserError(f"table {source} has no {name}, but {', '.join(first)}")
    values = found[row].get(name, [None])
    if None in values or name == metric:
        return values
    return [value - before for value, before in zip(values, first[name])]


def printed_table(table):
    """A table in Markdown, and what stands under it."""
    found = rows_from(table.source)
    cells = [Cell(text) for text in table.columns.values()]
    heads = table.head.split("|") + list(table.columns)
    lines = [markdown(heads), "|" + "---|" * len(heads)]
    for row, printed in (table.rows or own_names(found)).items():
        texts = printed.split("|")
        for cell in cells:
            source = cell.source or table.source
            texts.append(cell(values_of(rows_from(source), row, cell.metric, source)))
        lines.append(markdown(texts))
    lines += ["", provenance(results_of(table.source), [cell.how for cell in cells])]
    return "\n".join(lines) + "\n"


def own_names(found):
    """{row: what it is called}, the last part of its folder where no other row has that."""
    last = [row.split("/")[-1] for row in found]
    if len(set(last)) < len(last):
        return {row: row for row in found}
    return dict(zip(found, last))


def markdown(texts):
    """A line of a table."""
    return "| " + " | ".join(text.strip() for text in texts) + " |"


def provenance(results, hows):
    """Where the numbers of a table are from, and how to read its cells."""
    seeds = ", ".join(map(str, results["seeds"]))
    seconds = f"{mean(results['seconds']):.0f} s"
    made = f"{results['machine']}; commit {results['commit']}"
    if len(results["seeds"]) == 1:
        return f"Seed {seeds}; {made}; {seconds}."
    meanings = [HOW[how] + "." for how in dict.fromkeys(hows) if HOW[how]]
    return " ".join([f"Seeds {seeds}; {made}; {seconds} a seed.", *meanings])


# ---------------------------------------------------------------- drawing
# SVG by hand, for figures and page alike. Colours are classes: c0 to c7 draw lines, f0 to f7 fill.

LIGHT = {"paper": "#ffffff", "ink": "#222222", "soft": "#666666", "grid": "#e3e3e3", "0": "#0072b2", "1": "#d55e00",
         "2": "#009e73", "3": "#b05590", "4": "#3d9bd9", "5": "#b98300", "6": "#777777", "7": "#8a5a2b"}
DARK = {"paper": "#0d1117", "ink": "#e6e6e6", "soft": "#a0a0a0", "grid": "#2c323a", "0": "#58b0f0", "1": "#ff8f4a",
        "2": "#35cfa5", "3": "#e59ac8", "4": "#a5d8ff", "5": "#f5c04e", "6": "#b0b0b0", "7": "#d0a577"}
COLORS = 8
LOOKS = """
text{font:12px system-ui,sans-serif;fill:var(--ink)} .soft{fill:var(--soft);font-size:11px} .head{font-weight:600}
.paper{fill:var(--paper)} .grid{stroke:var(--grid)} .zero{stroke:var(--soft)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round} .thin{stroke-width:1;opacity:.45}
.dash{stroke-dasharray:6 3} .dots{stroke-dasharray:2 2} .wide{stroke-width:7;opacity:.3} .mean{stroke-width:3}
"""


def style():
    """The CSS that all drawings share."""
    def variables(colors):
        said = "".join(f"--{name}:{color};" for name, color in colors.items())
        return f":root{{{said}}}"
    css = f"{variables(LIGHT)}\n@media (prefers-color-scheme:dark){{{variables(DARK)}}}{LOOKS}"
    for i in range(COLORS):
        css += f".c{i}{{stroke:var(--{i})}} .f{i}{{fill:var(--{i})}}\n"
    return css


def tag(name, *inside, **attributes):
    """An element of SVG or HTML. Attributes are escaped, what is inside is not. `look` is the class; _ stands for -."""
    words = [name]
    for key, value in attributes.items():
        key = "class" if key == "look" else key.strip("_").replace("_", "-")
        text = place(value) if type(value) is float else str(value)
        words.append(f'{key}="{html.escape(text)}"')
    if not inside and name in ("line", "circle", "polyline", "rect"):
        return f"<{' '.join(words)}/>"
    return f"<{' '.join(words)}>{''.join(inside)}</{name}>"


def place(value):
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def drawing(width, height, parts, about):
    """A whole SVG file. It has its own background: an <img> sees the reader's colour scheme, but not the page's."""
    back = tag("rect", look="paper", width=width, height=height)
    title = tag("title", html.escape(about))
    inside = "\n".join(["", title, tag("style", style()), back, *parts, ""])
    return tag("svg", inside, xmlns="http://www.w3.org/2000/svg", width=width, height=height,
               viewBox=f"0 0 {width} {height}", role="img") + "\n"


def line(x1, y1, x2, y2, look):
    return tag("line", look=look, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))


def dot(x, y, look):
    return tag("circle", look=look, cx=float(x), cy=float(y), r=2.5)


def words(x, y, text, look="soft", anchor="start"):
    return tag("text", html.escape(text), look=look, x=float(x), y=float(y), text_anchor=anchor)


def legend(x, y, apart, entries):
    """Side by side, a line and what it stands for: {text: look}."""
    parts = []
    for text, look in entries.items():
        parts.append(line(x, y - 4, x + 24, y - 4, look))
        parts.append(words(x + 30, y, text))
        x += apart
    return parts


def ticks(low, high, about=4):
    """Round numbers from low to high, not many more than `about`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = 10 * power
    for times in (5, 2, 1):
        if times * power >= 0.9 * rough:
            step = times * power
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def span(values):
    """The range of an axis that shows these values, with a little air."""
    low, high = min(values), max(values)
    air = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    return low - air, high + air


class Axes:
    """A box of a drawing with two scales: values in, pixels out. x_log: the x axis is that of log x."""

    def __init__(self, left, top, width, height, x_range, y_range, x_log=False):
        self.left, self.top = left, top
        self.width, self.height = width, height
        self.right, self.bottom = left + width, top + height
        self.x_range, self.y_range, self.x_log = x_range, y_range, x_log

    def x(self, value):
        low, high = self.x_range
        if self.x_log:
            value, low, high = map(math.log, (value, low, high))
        return self.left + self.width * (value - low) / (high - low or 1)

    def y(self, value):
        low, high = self.y_range
        return self.top + self.height * (high - value) / (high - low)

    def x_axis(self, label, values, zero=False):
        """Grid and numbers along x; zero: mark where it is 0."""
        parts = [words(self.left + self.width / 2, self.bottom + 30, label, anchor="middle")]
        for value in values:
            x = self.x(value)
            look = "zero" if zero and value == 0 else "grid"
            parts.append(line(x, self.top, x, self.bottom, look))
            parts.append(words(x, self.bottom + 15, f"{value:g}", anchor="middle"))
        return parts

    def frame(self, title, x_label, x_ticks=None):
        """Title, grid and numbers of both axes."""
        parts = [words(self.left, self.top - 8, title, "head")]
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(line(self.left, y, self.right, y, "grid"))
            parts.append(words(self.left - 5, y + 4, f"{value:g}", anchor="end"))
        return parts + self.x_axis(x_label, x_ticks or ticks(*self.x_range))

    def curve(self, xs, ys, look, *inside, **attributes):
        """A line through points."""
        points = []
        for x, y in zip(xs, ys):
            points.append(place(self.x(x)) + "," + place(self.y(y)))
        return tag("polyline", *inside, look=look, points=" ".join(points), **attributes)

    def seeds_and_mean(self, xs_of_seed, ys_of_seed, look):
        """A thin line a seed, and a thick one through the means of their first points, of their second ones, ..."""
        parts = []
        for xs, ys in zip(xs_of_seed, ys_of_seed):
            if len(ys_of_seed) > 1:
                parts.append(self.curve(xs, ys, f"{look} thin"))
        mean_x, mean_y = map(mean, zip(*xs_of_seed)), map(mean, zip(*ys_of_seed))
        return [*parts, self.curve(mean_x, mean_y, look)]


# ---------------------------------------------------------------- the figures

def gains():
    """compare.sh: what each algorithm gains over SFT in `write`, sampled and greedy."""
    found = rows_from("compare")
    lines = []      # of (row, which of its two lines, values)
    for row in list(found)[1:]:
        for i, metric in enumerate(("+write", "+greedy")):
            lines.append((row, i, values_of(found, row, metric, "compare")))
    shown = [0.0]
    for _, _, values in lines:
        shown += [*values, *interval(values)]
    axes = Axes(80, 40, 540, 22 * len(lines), span(shown), (0, 1))
    parts = legend(80, 22, 100, {"sampled": "c0 wide", "greedy": "c1 wide"})
    parts.append(words(290, 22, "a dot: a seed; the bar: where a new seed falls, 95%"))
    parts += axes.x_axis("true reward in write, gained over SFT", ticks(*axes.x_range, 8), zero=True)
    for place_, (row, i, values) in enumerate(lines):
        y = axes.top + 22 * place_ + (14, 8)[i]
        if i == 0:
            name, _, _ = ALGORITHMS.get(row, row).partition(" |")
            parts.append(words(axes.left - 8, y + 12, name, "", "end"))
        low, high = map(axes.x, interval(values))
        center = axes.x(mean(values))
        parts.append(line(low, y, high, y, f"c{i} wide"))
        parts.append(line(center, y - 6, center, y + 6, f"c{i} mean"))
        for value in values:
            parts.append(dot(axes.x(value), y, f"f{i}"))
    return drawing(640, axes.bottom + 44, parts, gains.__doc__)


# What is fitted to a gain over d = √KL (Gao et al. 2210.10760, sec. 3.1).
FORMS = {"d (α - β d)": lambda d, alpha, beta: d * (alpha - beta * d),
         "d (α - β log d)": lambda d, alpha, beta: d * (alpha - beta * math.log(d))}


def overoptimization():
    """reward_hacking.sh: the true and the learned reward against √KL, and the two forms fitted to the true one."""
    return draw_curves(rows_from("reward_hacking.curves"))


def draw_curves(found):
    """A panel for each row {"d": [a list a seed], "gold", "proxy" alike, "fits": [{form: {"alpha", "beta"}}, ...]}."""
    looks = dict(zip(FORMS, ("c2 dash", "c3 dots")))
    entries = {"gold, the truth": "c0", "proxy": "c1"}
    for form, look in looks.items():
        entries[f"fit {form}"] = look
    parts = legend(46, 20, 160, entries)
    first = next(iter(found.values()))
    start = mean([gold[0] for gold in first["gold"]])   # of the policy before any optimisation
    for i, (row, curves) in enumerate(found.items()):
        across, down = i % 3, i // 3
        heights = sum(curves["gold"] + curves["proxy"], [])
        farthest = max(map(max, curves["d"]))
        axes = Axes(46 + 262 * across, 56 + 226 * down, 206, 160, (0, farthest), span(heights))
        parts += axes.frame(row.split("/")[-1], "d = √KL")
        parts += axes.seeds_and_mean(curves["d"], curves["proxy"], "c1")
        parts += axes.seeds_and_mean(curves["d"], curves["gold"], "c0")
        for form, look in looks.items():
            fits = [of_seed[form] for of_seed in curves["fits"] if form in of_seed]
            if fits:
                parts.append(fitted(axes, fits, form, start, look))
    return drawing(832, 46 + 226 * math.ceil(len(found) / 3), parts, overoptimization.__doc__)


def fitted(axes, fits, form, start, look):
    """A form with the mean coefficients of the seeds, where it is inside the axes."""
    alpha, beta = mean(each(fits, "alpha")), mean(each(fits, "beta"))
    low, high = axes.y_range
    xs, ys = [], []
    for i in range(1, 25):
        x = axes.x_range[1] * i / 24
        y = start + FORMS[form](x, alpha, beta)
        if low <= y <= high:
            xs.append(x)
            ys.append(y)
    return axes.curve(xs, ys, look)


def scaling():
    """o1.sh: sums right against the number of samples, after more and more steps of RL."""
    found = rows_from("o1")
    entries = {row.split("/")[-1]: f"c{i % COLORS}" for i, row in enumerate(found)}
    parts = legend(48, 22, 120, entries)
    for left, kind, title in ((48, "pass@", "one right among k: pass@k"), (348, "maj@", "the majority of k: maj@k")):
        first = next(iter(found.values()))
        ks = sorted(int(name.removeprefix(kind)) for name in first if name.startswith(kind))
        curves, shown = [], []      # of a row: a curve a seed
        for metrics in found.values():
            columns = [metrics[f"{kind}{k}"] for k in ks]
            curves.append(list(zip(*columns)))
            shown += sum(columns, [])
        axes = Axes(left, 60, 240, 190, (1, ks[-1]), span(shown), x_log=True)
        parts += axes.frame(title, "k, samples to a prompt", ks)
        for per_seed, look in zip(curves, entries.values()):
            parts += axes.seeds_and_mean([ks] * len(per_seed), per_seed, look)
    return drawing(610, 300, parts, scaling.__doc__)


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
        axes = Axes(48 + 300 * panel, 36, 240, 180, (0, len(steps) - 1), span(sum(per_seed, [])))
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


# ---------------------------------------------------------------- runs, as a page shows them

def read_log(folder):
    """The rows of a run's metrics.jsonl, and how many of its lines are none."""
    path, rows, bad = Path(folder) / "metrics.jsonl", [], 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for said in text.splitlines():
        try:
            row = json.loads(said)
            if not is_number(row["step"]) or not is_number(row.get("seconds", 0)):
                raise ValueError
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
    return rows, bad


class RunFolder:
    """What a run's folder says: options, rows, samples."""

    def __init__(self, folder):
        self.folder, self.name = folder, str(folder)
        self.options = read_json(folder / "run.json")
        if not isinstance(self.options, dict):
            raise UserError(f"{folder}/run.json: not a run's options")
        for no_option in ("code", "inputs"):
            self.options.pop(no_option, None)
        self.script = script_of(self.options)
        self.rows, self.bad = read_log(folder)
        self.samples = sorted((folder / "samples").glob("*.txt"))
        self.finished = (folder / "summary.json").exists()

    def curve(self, metric, most=160):
        """(steps, values) of a metric, where it is a number; of more than `most` the means of neighbours."""
        rows = [row for row in self.rows if is_number(row.get(metric))]
        size = math.ceil(len(rows) / most) or 1
        steps, values = [], []
        for i in range(0, len(rows), size):
            near = rows[i:i + size]
            steps.append(mean(each(near, "step")))
            values.append(mean(each(near, metric)))
        return steps, values


@functools.cache
def option_names():
    """{"ppo.py": the options of its own, "reward.py label": ...} of all that makes a run, read from the sources."""
    found = {}
    for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("configs/*.py"))]:
        for text in re.split(r"(?m)^class ", path.read_text(encoding="utf-8"))[1:]:
            name = re.match(r"\w+", text)[0].lower()
            script = path.name if name == "config" else f"{path.name} {name}"
            body, _, _ = text.partition("\n\n\n")
            found[script] = set(re.findall(r"(?m)^    (\w+): .*?  # ", body))
            adds_to = re.match(r"Config\((\w+)\.Config\)", text)    # another script's options
            if adds_to:
                found[script] |= found[f"{adds_to[1]}.py"]
    shared = found.pop("data.py runconfig") | found.pop("data.py trainconfig")
    return {script: names - shared for script, names in found.items() if names - shared}


def script_of(options):
    """The script whose options these are most likely."""
    def likeness(script):
        own = option_names()[script]
        return len(own & options.keys()) / len(own | options.keys())
    return max(option_names(), key=likeness)


def collect(paths):
    """(run folders, files of tables, what is neither) of the words of a command line."""
    folders, files, skipped = [], [], []
    for path in map(Path, paths):
        if path.suffix == ".html":      # an earlier page
            continue
        inside = sorted(file.parent for file in path.rglob("run.json"))
        if path.suffix == ".json":
            files.append(path)
        elif path.name == "tables":
            files += sorted(path.glob("*.json"))
        elif inside:
            folders += [path] if path in inside else inside
        else:
            skipped.append(f"{path} is skipped: there is no run in it")
    for parent in dict.fromkeys(folder.parent for folder in folders):
        files += sorted(parent.glob("tables/*.json"))
    return list(dict.fromkeys(folders)), list(dict.fromkeys(files)), skipped


@functools.cache
def glossary():
    """[(scripts, pattern of the name, [what it is, healthy, if not])]: the tables of "Metrics" in configs/README.md."""
    text = READMES[1].read_text(encoding="utf-8")
    _, _, text = text.partition("\n## Metrics\n")
    text, _, _ = text.partition("\n## ")
    heading, found = "", []
    for row in text.splitlines():
        if row.startswith("### "):
            heading = row
        parts = re.split(r"(?<!\\)\|", row)
        if len(parts) != 6:
            continue
        names, *texts = (part.replace("\\|", "|").strip() for part in parts[1:5])
        scripts = re.findall(r"\w+\.py", names) or re.findall(r"\w+\.py", heading)
        for name in re.findall(r"`([^`]+)`", names):
            pattern = re.sub(r"NAME|\\\*|a\\\|b|\bK\b", ".+", re.escape(name))
            found.append((scripts, pattern, texts))
    return found


def meaning(script, metric):
    """What the glossary says of a metric of a script, as HTML; nothing if it does not know it."""
    known = {}
    for scripts, pattern, texts in glossary():
        if script.split()[0] in scripts and re.fullmatch(pattern, metric):
            known[pattern] = texts
    if not known:
        held = metric.startswith("val_") and meaning(script, metric.removeprefix("val_"))
        return f"On what is held out: {held}" if held else ""
    exact = min(known, key=lambda pattern: (".+" in pattern, -len(pattern)))
    said = ""
    for title, text in zip(("", "Healthy", "If not"), known[exact]):
        if text not in ("", "–"):
            title = f" <b>{title}:</b> " if title else ""
            text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
            said += f"{title}{text}."
    return said


# ---------------------------------------------------------------- the page

@dataclass
class Page(Options):
    """One HTML file of any runs, that needs nothing else: curves, options that differ, samples early and late, tables.

    A folder that is no run stands for the runs in it. Tables are files *.json with "rows", or a folder `tables` of such
    files. The one beside the runs is shown, too.
    """
    out: str = "out/report.html"  # the file to write


def page(cfg, paths):
    """Write the page of these runs and tables."""
    folders, files, notes = collect(paths)
    sections, groups = {}, defaultdict(list)    # {title: HTML}, {script: its runs}
    for file in files:
        try:
            sections[str(file)] = numbers_of(table_rows(file))
        except UserError as e:
            notes.append(f"skipped: {e}")
    for folder in folders:
        try:
            run = RunFolder(folder)
        except UserError as e:
            notes.append(f"skipped: {e}")
            continue
        groups[run.script].append(run)
        if run.bad:
            notes.append(f"{folder}/metrics.jsonl: {run.bad} lines are no rows and left out")
    for script, runs in groups.items():
        sections[script] = group_of(script, runs)
    for note in notes:
        tell(note)
    if not sections:
        raise UserError("no run to show: a folder with run.json and metrics.jsonl")
    write_text(cfg.out, whole_page(sections, notes))
    runs = sum(map(len, groups.values()))
    print(f"{cfg.out}: {runs} runs, {len(sections) - len(groups)} tables")


def whole_page(sections, notes):
    """HTML of all sections {title: HTML}, with a list of them on top."""
    links, parts = [], []
    for i, (title, text) in enumerate(sections.items()):
        title = html.escape(title)
        links.append(tag("a", title, href=f"#part{i}"))
        parts.append(tag("section", tag("h2", title), text, id=f"part{i}"))
    said = [tag("li", html.escape(note)) for note in notes]
    head = [HEAD, tag("title", "Runs"), tag("style", style() + PAGE_STYLE), tag("h1", "Runs")]
    body = [tag("p", " · ".join(links)), *parts, tag("ul", *said), tag("script", SCRIPT), "</html>\n"]
    return "\n".join(head + body)


HEAD = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
PAGE_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;
  background:var(--paper);color:var(--ink)}
a{color:var(--0)} h2{border-top:1px solid var(--grid);padding-top:1em;margin-top:2em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:1em 1.5em}
figure{margin:0} figcaption,.note{color:var(--soft);font-size:13px} figcaption b{color:var(--ink);font-weight:600}
svg{width:100%;height:auto;display:block} .hover{min-height:1.5em}
.scroll{overflow-x:auto;margin:.6em 0} table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
td:first-child,th:first-child{text-align:left}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1em} @media (max-width:700px){.two{grid-template-columns:1fr}}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;margin:.3em 0;padding:.7em;border:1px solid var(--grid)}
label{margin-right:1.2em} label svg{display:inline;width:24px;margin:0 .4em} label line{stroke-width:3}
summary{cursor:pointer;margin:.6em 0}
"""

# Without it the page is complete; with it a curve can be hidden, and the values under the pointer are told.
SCRIPT = """
document.querySelectorAll("label input").forEach(box => box.onchange = () =>
  box.closest("section").querySelectorAll(".charts ." + box.value).forEach(curve =>
    curve.style.display = box.checked ? "" : "none"));
document.querySelectorAll("figure").forEach(figure => {
  const svg = figure.querySelector("svg"), told = figure.querySelector(".hover");
  const [top, height, low, high] = svg.dataset.y.split(" ").map(Number);
  svg.onmouseleave = () => told.textContent = "";
  svg.onmousemove = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const said = [];
    svg.querySelectorAll("polyline").forEach(curve => {
      if (curve.style.display == "none") return;
      const points = [...curve.points].sort((a, b) => Math.abs(a.x - at.x) - Math.abs(b.x - at.x));
      const value = high - (points[0].y - top) / height * (high - low);
      said.push(curve.dataset.name + " " + value.toPrecision(3));
    });
    told.textContent = said.join(", ");
  };
});
"""


def group_of(script, runs):
    """The runs of one script: who they are, options, curves, samples."""
    labels = []
    for i, run in enumerate(runs):
        box = f'<input type="checkbox" checked value="r{i}">'
        key = tag("svg", line(0, 5, 24, 5, look_of(i)), viewBox="0 0 24 10")
        state = "" if run.finished else ", unfinished"
        length = tag("span", f" ({len(run.rows)} steps{state})", look="note")
        labels.append(tag("label", box, key, html.escape(run.name), length))
    metrics = {}
    for run in runs:
        for row in run.rows:
            metrics |= dict.fromkeys(row)
    for boring in ("lr", "seconds"):    # last
        if boring in metrics:
            metrics[boring] = metrics.pop(boring)
    charts = [chart(script, metric, runs) for metric in metrics if metric != "step"]
    samples = [samples_of(run) for run in runs]
    parts = [tag("p", *labels), options_of(runs), tag("div", *charts, look="charts")]
    return "".join(parts + samples)


def look_of(i):
    """The classes of the i-th run's curves: a colour, dashed the second time round, and r0, r1, ..."""
    dash = " dash" if i // COLORS % 2 else ""
    return f"c{i % COLORS}{dash} r{i}"


def chart(script, metric, runs):
    """A metric's figure, with a curve for each run that has it, and what it means; nothing if none has a number."""
    curves = [run.curve(metric) for run in runs]
    values = sum((ys for _, ys in curves), [])
    if not values:
        return ""
    last = max(run.rows[-1]["step"] for run in runs if run.rows)
    axes = Axes(52, 24, 326, 140, (0, max(1, last)), span(values))
    parts = axes.frame(metric, "step")
    for i, (run, (xs, ys)) in enumerate(zip(runs, curves)):
        if not xs:
            continue
        about = f"{run.name}: {ys[0]:.4g} → {ys[-1]:.4g}"
        parts.append(axes.curve(xs, ys, look_of(i), tag("title", html.escape(about)), data_name=run.name))
        for x, y in zip(xs, ys):
            if len(xs) < 10:
                parts.append(dot(axes.x(x), axes.y(y), f"f{i % COLORS} r{i}"))
    scale = [axes.top, axes.height, *axes.y_range]      # for SCRIPT
    svg = tag("svg", *parts, viewBox="0 0 390 200", data_y=" ".join(map(str, scale)))
    caption = tag("figcaption", meaning(script, metric))
    return tag("figure", svg, tag("div", look="hover note"), caption)


def options_of(runs):
    """The options in which the runs differ; the others folded away."""
    common, differ, names = [], [], {}
    for run in runs:
        names |= run.options
    for name in names:
        values = [text_of(run.options.get(name, "–")) for run in runs]
        if len(set(values)) > 1:
            differ.append([f"--{name}", *values])
        else:
            common.append([f"--{name}", values[0]])
    heads = ["option", *(run.name for run in runs)]
    shown = html_table(heads, differ) if differ else ""
    agree = " in which they agree" if len(runs) > 1 else ""
    folded = tag("summary", f"{len(common)} options{agree}") + html_table(["option", "value"], common)
    return shown + tag("details", folded)


def text_of(value):
    """A value of JSON as a cell: numbers short, texts as they are."""
    if type(value) is float:
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def html_table(heads, rows):
    """A table of texts, which may be hostile."""
    lines = []
    for kind, texts in [("th", heads), *(("td", row) for row in rows)]:
        cells = [tag(kind, html.escape(text)) for text in texts]
        lines.append(tag("tr", *cells))
    return tag("div", tag("table", *lines), look="scroll")


def samples_of(run):
    """The first and the last samples of a run, side by side."""
    blocks = []
    for path in dict.fromkeys(run.samples[:1] + run.samples[-1:]):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        step = path.stem.lstrip("0") or "0"
        note = tag("div", html.escape(f"step {step}"), look="note")
        blocks.append(tag("div", note, tag("pre", html.escape(text))))
    if not blocks:
        return ""
    title = tag("summary", f"samples of {html.escape(run.name)}")
    return tag("details", title, tag("div", *blocks, look="two"), open="")


def numbers_of(rows):
    """The numbers of a table's rows, and its intervals, as HTML."""
    heads, lines = {}, []
    for row in rows:
        heads |= {name: True for name, value in row.items() if in_cell(value)}
    for row in rows:
        numbers = [in_cell(row.get(name)) for name in heads]
        lines.append([name_of(row), *numbers])
    return html_table(["", *heads], lines)


def in_cell(value):
    """A number or the two ends of an interval as text; nothing for anything else."""
    if isinstance(value, list) and len(value) == 2:
        low, high = map(in_cell, value)
        return f"[{low}, {high}]" if low and high else ""
    if not is_number(value):
        return ""
    return f"{value:.3f}" if type(value) is float else str(value)


# ---------------------------------------------------------------- the command line

COMMANDS = {"record": (Record, record), "tables": (Tables, tables), "figures": (Figures, figures), "page": (Page, page)}
TAKES = dict(record=["recipe"], page=["run", "run..."])


def main():
    """Run the command that the first word names; anything else that exists is a run to show on a page."""
    first, *rest = sys.argv[1:] or [""]
    if first in ("-h", "--help"):
        return print(f"{__doc__}\n--help after a command lists its options: {', '.join(COMMANDS)}")
    if first not in COMMANDS:
        if not first or not Path(first).exists():
            what = f"there is no {first}; " if first else ""
            raise OptionError(f"{what}say what to do: python configs/report.py {'|'.join(COMMANDS)} (--help after it "
                              "lists its options), or name run folders")
        first, rest = "page", sys.argv[1:]
    Config, run = COMMANDS[first]
    got = parse(Config, TAKES.get(first, ()), rest, first)
    run(*got) if first in TAKES else run(got)


if __name__ == "__main__":
    guard(main)
