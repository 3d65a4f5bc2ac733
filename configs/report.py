"""Results as data: run recipes over seeds, and make every table, every figure and a page of what they left.

    python configs/report.py record compare --seeds 0,1,2   configs/compare.sh once a seed -> configs/results/compare.json
    python configs/report.py tables                         those files -> the tables of README.md and configs/README.md
    python configs/report.py figures                        those files -> configs/results/*.svg
    python configs/report.py page out/*                     run folders -> out/report.html (--out); `page` can be left out

A recipe leaves its tables as $OUT/tables/NAME.json or NAME.PART.json, NAME that of the recipe: {"rows": [{"checkpoint":
"out/seed0/dpo", "arith": 0.31, ...}, ...]}. A row that is no checkpoint has a "name". Its numbers are gathered, and lists
and dicts of numbers; texts are not.

    configs/results/NAME.json   {"recipe", "commit", "machine", "torch", "seeds", "seconds": one a seed,
                                 "tables": {"NAME": {"dpo": {"arith": [one a seed], ...}, ...}, "NAME.PART": ...}}

In a README `<!-- table NAME -->` and `<!-- end -->` enclose a printed table; TABLES below says what it shows.
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
PAGES = [ROOT / "README.md", ROOT / "configs/README.md"]


# ---------------------------------------------------------------- record

# Curves that are gathered beside a recipe's tables, as its table NAME.curves: {recipe: {run: its metrics}}.
CURVES = {"compare": {"grpo": ["gold", "reward/format", "response_length"]}}


@dataclass
class Record(Options):
    """Run a recipe once a seed, and gather its tables into configs/results/NAME.json.

    Seed 0 has the folder out/seed0, with its log in NAME.log. NAME.run.json says there on what it was made, and that it
    is finished: then it is only gathered. Without that file the recipe runs, and skips the stages that are finished.
    """
    seeds: str = "0,1,2"        # a run each, with commas between them
    jobs: Count = 1             # runs at a time; several have one thread each
    out: str = "out"            # folder in which every seed has its own
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the matmuls
    threads: Natural = 0        # CPU threads of a run; 0 leaves it to PyTorch


class SeedRun:
    """One run of a recipe: its folder, its log, and the note of what made it."""

    def __init__(self, name, seed, cfg):
        self.name, self.seed = name, seed
        out = cfg.out if os.path.isabs(cfg.out) else os.path.relpath(cfg.out, ROOT)  # recipes run in ROOT
        self.out = os.path.join(out, f"seed{seed}")
        self.folder = ROOT / self.out
        self.log, self.note = self.folder / f"{name}.log", self.folder / f"{name}.run.json"
        self.recipe = [f"configs/{name}.sh", "--seed", str(seed)]
        if cfg.threads:
            self.recipe += ["--threads", str(cfg.threads)]
        if cfg.dtype != "auto":
            self.recipe += ["--dtype", cfg.dtype]
        python = os.path.dirname(sys.executable)    # the stages run in the Python that runs this
        self.how = dict(cwd=ROOT, env=os.environ | {"OUT": self.out, "PATH": f"{python}:{os.environ['PATH']}"})

    def tables(self):
        """The files of the tables that the recipe has left."""
        folder = self.folder / "tables"
        return sorted([*folder.glob(f"{self.name}.json"), *folder.glob(f"{self.name}.*.json")])

    def finished(self):
        return self.note.exists() and bool(self.tables())

    def stages(self):
        """The run folders that the recipe makes. bash reads it with a `python` that only repeats what it is told."""
        repeat = 'python() { printf "%s\\n" "$@"; }; source "$0"'
        done = subprocess.run(["bash", "-c", repeat, *self.recipe], **self.how, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"configs/{self.name}.sh: {last_line(done.stderr)}")
        words = done.stdout.splitlines()
        folders = [ROOT / folder for word, folder in zip(words, words[1:]) if word == "--out"]
        return list(dict.fromkeys(folders))

    def begin(self, made):
        """Start the recipe; made: commit, machine and torch."""
        self.made = made
        self.before = sum(map(seconds_of, self.stages()))
        self.since = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(["bash", *self.recipe], **self.how, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)
        print(f"seed {self.seed} runs; its log is {self.log}", flush=True)

    def end(self):
        """After the recipe: write the note, or say what went wrong. -> Whether all is well.

        The seconds are those from nothing: of this run, and what its stages had taken before it.
        """
        seconds = self.before + time.perf_counter() - self.since
        if self.process.returncode or not self.tables():
            said = last_line(self.log.read_text(encoding="utf-8", errors="replace"))
            why = said if self.process.returncode else f"it left no {self.folder}/tables/{self.name}.json"
            tell(f"seed {self.seed} failed: {why} ({self.log})")
            return False
        write_text(self.note, json.dumps(self.made | dict(seconds=round(seconds, 1)), indent=1))
        print(f"seed {self.seed} is finished: {seconds:.0f} s", flush=True)
        return True


def record(cfg, names):
    """Run what is not finished, so many at a time, then write the results file."""
    name, = names
    seeds = seeds_of(cfg.seeds)
    if not (ROOT / f"configs/{name}.sh").exists():
        known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.sh")))
        raise OptionError(f"there is no configs/{name}.sh; choose from {known}")
    if cfg.jobs > 1:
        cfg.threads = 1
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    version, _, _ = torch.__version__.partition("+")
    made = dict(commit=commit(), machine=machine(find_device("auto"), cfg.dtype), torch=version)
    runs = [SeedRun(name, seed, cfg) for seed in seeds]
    to_do = []
    for run in runs:
        if run.finished():
            print(f"seed {run.seed} is only gathered: {run.note} is there")
        else:
            to_do.append(run)
    failed = run_all(to_do, cfg.jobs, made)
    if failed:
        raise UserError(f"{name}: {len(failed)} of {len(seeds)} seeds failed, nothing is written; the same command "
                        "goes on from here")
    path = RESULTS / f"{name}.json"
    write_text(path, to_json(gather(name, runs)))
    print(f"{path}: {len(seeds)} seeds")


def seeds_of(text):
    """The seeds that a text like 0,1,2 names."""
    words = text.split(",")
    if not all(re.fullmatch(r"\d{1,9}", word) for word in words) or len(set(words)) < len(words):
        raise OptionError(f"--seeds {text}: whole numbers with commas between them, each once, as in 0,1,2")
    return [int(word) for word in words]


def run_all(runs, jobs, made):
    """Let the recipes run, so many at a time -> those that failed."""
    waiting, running, failed = list(runs), [], []
    stages = [folder for run in runs for folder in run.stages()]
    shown = tqdm(total=len(stages), unit="stage", leave=False, disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].begin(made)
            time.sleep(0.2)
            for run in list(running):
                if run.process.poll() is not None:
                    running.remove(run)
                    if not run.end():
                        failed.append(run)
            shown.n = sum((folder / "summary.json").exists() for folder in stages)
            shown.refresh()
    finally:    # interrupted: what they have saved is whole
        shown.close()
        for run in running:
            os.killpg(run.process.pid, signal.SIGTERM)
    return failed


def commit():
    """The commit of the code, with a + where files that results depend on differ from it; unknown outside git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
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
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no word about it"


def gather(name, runs):
    """The content of configs/results/NAME.json, from what the runs have left."""
    notes = [read_json(run.note) for run in runs]
    result = dict(recipe=name)
    for key in ("commit", "machine", "torch"):
        result[key] = " and ".join(dict.fromkeys(note[key] for note in notes))
    result |= dict(seeds=[run.seed for run in runs], seconds=[note["seconds"] for note in notes], tables={})

    per_table = defaultdict(list)   # of each seed {row: {metric: value}}
    for run in runs:
        for path in run.tables():
            per_table[path.stem].append(rows_of(path, run.out))
        if name in CURVES:
            per_table[f"{name}.curves"].append(curves_of(run, CURVES[name]))
    for table, rows in per_table.items():
        result["tables"][table] = over_seeds(rows, table, runs)
    return result


def rows_of(path, out):
    """{row: {metric: number, or list or dict of numbers}} of a table that a recipe has left."""
    rows = {}
    for row in table_rows(path):
        name = str(row.get("checkpoint", row.get("name"))).removeprefix(f"{out}/")
        if name in rows:
            raise UserError(f"{path}: two rows are called {name}; delete the file, and the recipe makes it anew")
        rows[name] = {metric: rounded(value) for metric, value in row.items() if is_numeric(value)}
    return rows


def table_rows(path):
    """The rows of a table's file."""
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{path}: no table, which is {{"rows": [...]}}')
    return rows


def is_numeric(value):
    """Whether it is a number, or lists and dicts of numbers; None is a number that does not exist."""
    if isinstance(value, dict):
        return all(map(is_numeric, value.values()))
    if isinstance(value, list):
        return all(map(is_numeric, value))
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def rounded(value):
    """Numbers with six digits, in lists and dicts as well."""
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


def over_seeds(tables, name, runs):
    """A table a seed, {row: {metric: value}} -> {row: {metric: [a value a seed]}}; None where a seed has no value."""
    if len(tables) < len(runs):
        raise UserError(f"only {len(tables)} of {len(runs)} seeds have the table {name}")
    out = {}
    for table, run in zip(tables, runs):
        different = table.keys() ^ tables[0].keys()
        if different:
            raise UserError(f"{name}: seeds {runs[0].seed} and {run.seed} do not both have {', '.join(different)}")
    for row in tables[0]:
        out[row] = {}
        for metric in dict.fromkeys(metric for table in tables for metric in table[row]):
            out[row][metric] = [table[row].get(metric) for table in tables]
    return out


def to_json(result):
    """JSON with a metric a line."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


# ---------------------------------------------------------------- what is in a cell

# The .975 quantiles of Student's t with 1, 2, ... degrees of freedom; with more than 20 the last is a little too wide.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
     2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]


def sd(values):
    """The standard deviation of a sample, by n - 1; 0 of one value."""
    center = mean(values)
    return math.sqrt(sum((x - center) ** 2 for x in values) / max(1, len(values) - 1))


def interval(values, new=True):
    """95%, by Student's t: where the value of a new seed falls, or where the mean over all seeds is."""
    n, center = len(values), mean(values)
    half = 0.0
    if n > 1:
        half = T[min(n - 2, len(T) - 1)] * sd(values) * math.sqrt(new + 1 / n)
    return center - half, center + half


def short(x, digits=2, sign=""):
    """A number as the tables write it: .87, -1.20, 24.4; with the sign +, +.87."""
    text = f"{round(x, digits) + 0.0:{sign}.{digits}f}"     # + 0.0: no -0
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def in_brackets(values, new, write, share):
    """Mean and interval, where seeds differ; a share's ends at 0 and 1."""
    low, high = interval(values, new)
    if low == high:
        return write(low)
    if share:
        low, high = max(0.0, low), min(1.0, high)
    return f"{write(mean(values))} [{write(low)}, {write(high)}]"


def with_sd(values, write):
    return f"{write(mean(values))} ± {write(sd(values)).lstrip('+')}" if sd(values) else write(mean(values))


# How a cell can be written: a function of values, one number's text, and whether it is a share; and what it shows.
CELLS = {
    "mean": (lambda values, write, share: write(mean(values)), ""),
    "sd": (lambda values, write, share: with_sd(values, write), "`a ± b`: mean and standard deviation"),
    "seeds": (lambda values, write, share: " / ".join(map(write, values)), "`a / b`: each seed"),
    "new": (lambda values, write, share: in_brackets(values, True, write, share),
            "`a [b, c]`: mean, and where a new seed falls, 95%"),
    "sure": (lambda values, write, share: in_brackets(values, False, write, share),
             "`a [b, c]`: mean over the seeds, and its 95% interval"),
}
SHARES = re.compile(r"(arith|pass@|maj@|win|greedy_win|harmless|over_refusal|help|right|safe|fmt)")


# ---------------------------------------------------------------- the printed tables

@dataclass
class Table:
    """A printed table. source: a table of a results file, NAME or NAME.PART. columns: {title: "metric how digits"}, how as
    in CELLS ("sd" without), two digits without; "+metric" is the gain over the first row. rows: {row: what is printed
    for it}, with | between several cells, whose titles are in head; without, all rows under their own names."""
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

# {NAME of a block in a README: what it shows}. One of a recipe needs a line: "dapo": Table("dapo", {"sums right": "arith"}).
TABLES = {
    "algorithms": Table("compare", MAIN, ALGORITHMS, " | learns from"),
    "compare": Table("compare", ALL),
    "variants": Table("variants", ALL),
}


@dataclass
class Tables(Options):
    """Rewrite the tables of README.md and configs/README.md from the results files."""
    check: bool = False         # write nothing; say which differ, and exit with 1 if any does


def tables(cfg):
    """Every block of the pages anew."""
    stale, printed = [], []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new, names, changed = rewrite(text, page)
        printed += names
        stale += [f"{page}: table {name}" for name in changed]
        if changed and not cfg.check:
            write_text(page, new)
    for name in TABLES:
        if name not in printed:
            tell(f"table {name} is printed nowhere")
    report_stale(stale, cfg.check, f"{len(printed)} tables")


def report_stale(stale, check, count):
    """Say which were not as the results files are; a mistake if that was only checked."""
    for what in stale:
        print(f"{what} {'differs from the results' if check else 'is new'}")
    print(f"{count}, {len(stale)} of them changed")
    if stale and check:
        raise UserError("not as configs/results has it: run this command without --check")


BLOCK = re.compile(r"(?ms)^(<!-- table (\S+)[^\n]*-->\n)(.*?)^(<!-- end -->)$")


def rewrite(text, page):
    """A page with all its tables made from the results files; the names of all, and of those that were otherwise."""
    names, changed = [], []

    def made(block):
        begin, name, was, end = block.groups()
        if name not in TABLES:
            raise UserError(f"{page}: configs/report.py knows no table {name}; add it to TABLES")
        now = "\n".join(printed_table(TABLES[name])) + "\n"
        names.append(name)
        if now != was:
            changed.append(name)
        return begin + now + end

    new = BLOCK.sub(made, text)
    begun, ended = (len(re.findall(rf"(?m)^<!-- {word}", text)) for word in ("table ", "end -->"))
    if not begun == ended == len(names):
        raise UserError(f"{page}: {begun} times <!-- table NAME -->, {ended} times <!-- end -->: one of each to a table")
    return new, names, changed


def results_of(recipe):
    """The content of configs/results/RECIPE.json."""
    path = RESULTS / f"{recipe}.json"
    if not path.exists():
        raise UserError(f"there is no {path}; python configs/report.py record {recipe} makes it")
    return read_json(path)


def rows_from(source):
    """{row: {metric: [a value a seed]}} of a table of a results file, NAME or NAME.PART."""
    results = results_of(source.split(".")[0])
    if source not in results["tables"]:
        raise UserError(f"configs/results has no table {source}, only {', '.join(results['tables'])}")
    return results["tables"][source]


def printed_table(table):
    """The lines of a table in Markdown, and of what stands under it."""
    found = rows_from(table.source)
    recipe = table.source.split(".")[0]
    rows = table.rows or {row: row.removeprefix(f"{recipe}/") for row in found}
    columns = [column_of(text) for text in table.columns.values()]
    heads = table.head.split("|") + list(table.columns)
    lines = [markdown(heads), "|" + "---|" * len(heads)]
    for row, printed in rows.items():
        cells = printed.split("|")
        for metric, how, digits in columns:
            values = values_of(found, row, metric, table.source)
            cells.append(cell(values, metric, how, digits))
        lines.append(markdown(cells))
    hows = [how for _, how, _ in columns]
    return [*lines, "", provenance(results_of(recipe), hows)]


def markdown(cells):
    """A line of a table."""
    return "| " + " | ".join(text.strip() for text in cells) + " |"


def column_of(text):
    """(metric, how, digits) of "metric how digits", the last two with defaults."""
    metric, *rest = text.split()
    how = rest[0] if rest else "sd"
    digits = rest[1] if len(rest) > 1 else "2"
    if how not in CELLS or not digits.isdigit() or len(rest) > 2:
        raise UserError(f'column "{text}" is not "metric how digits", with how one of {", ".join(CELLS)}')
    return metric, how, int(digits)


def values_of(found, row, metric, source):
    """A metric of a row, one value a seed; of "+metric", by how much it is above that of the first row. None where a seed
    has none."""
    if row not in found:
        raise UserError(f"table {source} has no row {row}, only {', '.join(found)}")
    name, first = metric.removeprefix("+"), next(iter(found))
    if not any(name in values for values in found.values()):
        raise UserError(f"table {source} has no {name}, only {', '.join(found[first])}")
    values = found[row].get(name, [None])
    if None in values or name == metric:
        return values
    return [value - before for value, before in zip(values, found[first][name])]


def cell(values, metric, how, digits):
    """What a cell says; a dash where a seed has no value."""
    if None in values:
        return "–"
    sign = "+" if metric.startswith("+") else ""
    write_cell, _ = CELLS[how]
    return write_cell(values, lambda x: short(x, digits, sign), bool(SHARES.match(metric)))


def provenance(results, hows):
    """What stands under a table: where its numbers are from, and how to read its cells."""
    seeds, several = results["seeds"], len(results["seeds"]) > 1
    told = [f"Seed{'s' * several} {', '.join(map(str, seeds))}", results["machine"], f"commit {results['commit']}",
            f"{mean(results['seconds']):.0f} s{' a seed' * several}"]
    text = "; ".join(told) + "."
    for how in dict.fromkeys(hows):
        _, meaning = CELLS[how]
        if meaning and several:
            text += f" {meaning}."
    return text


# ---------------------------------------------------------------- drawing
# SVG by hand, for figures and page alike. Colours are classes: c0 to c7 draw lines, f0 to f7 fill.

LIGHT = dict(paper="#ffffff", ink="#222222", soft="#666666", grid="#e3e3e3", c0="#0072b2", c1="#d55e00", c2="#009e73",
             c3="#b05590", c4="#3d9bd9", c5="#b98300", c6="#777777", c7="#8a5a2b")
DARK = dict(paper="#0d1117", ink="#e6e6e6", soft="#a0a0a0", grid="#2c323a", c0="#58b0f0", c1="#ff8f4a", c2="#35cfa5",
            c3="#e59ac8", c4="#a5d8ff", c5="#f5c04e", c6="#b0b0b0", c7="#d0a577")
COLORS = 8


def style():
    """The CSS that all drawings share."""
    def variables(colors):
        return ":root{" + "".join(f"--{name}:{color};" for name, color in colors.items()) + "}"
    lines = [variables(LIGHT), "@media (prefers-color-scheme:dark){" + variables(DARK) + "}",
             "text{font:12px system-ui,sans-serif;fill:var(--ink)}.soft{fill:var(--soft);font-size:11px}",
             ".paper{fill:var(--paper)}.grid{stroke:var(--grid)}.zero{stroke:var(--soft)}.head{font-weight:600}",
             "polyline{fill:none;stroke-width:2;stroke-linejoin:round}.thin{stroke-width:1;opacity:.45}",
             ".dash{stroke-dasharray:6 3}.dots{stroke-dasharray:2 2}.wide{stroke-width:7;opacity:.3}.mean{stroke-width:3}"]
    for i in range(COLORS):
        lines.append(f".c{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}")
    return "\n".join(lines)


def drawing(width, height, parts, about):
    """A whole SVG file. It has its own background: an <img> sees the reader's colour scheme, but not the page's."""
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                      f'height="{height}" role="img">', f"<title>{html.escape(about)}</title>",
                      f"<style>{style()}</style>", f'<rect class="paper" width="{width}" height="{height}"/>',
                      *parts, "</svg>\n"])


def place(value):
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def line(x1, y1, x2, y2, look):
    x1, y1, x2, y2 = map(place, (x1, y1, x2, y2))
    return f'<line class="{look}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def dot(x, y, look, radius=3):
    return f'<circle class="{look}" cx="{place(x)}" cy="{place(y)}" r="{radius}"/>'


def words(x, y, text, look="", anchor="start"):
    return f'<text class="{look}" x="{place(x)}" y="{place(y)}" text-anchor="{anchor}">{html.escape(text)}</text>'


def legend(x, y, entries, apart=150):
    """A line's look and what it stands for, side by side."""
    parts = []
    for i, (look, text) in enumerate(entries):
        left = x + i * apart
        parts += [line(left, y - 4, left + 24, y - 4, look), words(left + 30, y, text, "soft")]
    return parts


def ticks(low, high, about=4):
    """Round numbers from low to high, not many more than `about`: steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(power * times for times in (1, 2, 5, 10) if (high - low) / (power * times) <= about + 0.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def span(values):
    """The range of an axis that shows these values, with a little air."""
    low, high = min(values), max(values)
    air = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    return low - air, high + air


class Axes:
    """A box of a drawing with two scales: values in, pixels out. x_log: the x axis is that of log x."""

    def __init__(self, left, top, width, height, x_range, y_range, x_log=False):
        self.left, self.top, self.width, self.height = left, top, width, height
        self.x_range, self.y_range, self.x_log = x_range, y_range, x_log

    def x(self, value):
        low, high = self.x_range
        if self.x_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.left + self.width * (value - low) / ((high - low) or 1)

    def y(self, value):
        low, high = self.y_range
        return self.top + self.height * (high - value) / (high - low)

    def frame(self, title, x_label, x_ticks=None):
        """Grid, ticks and labels."""
        bottom = self.top + self.height
        parts = [words(self.left, self.top - 8, title, "head")]
        for value in ticks(*self.y_range):
            parts += [line(self.left, self.y(value), self.left + self.width, self.y(value), "grid"),
                      words(self.left - 5, self.y(value) + 4, f"{value:g}", "soft", "end")]
        for value in x_ticks or ticks(*self.x_range):
            parts += [line(self.x(value), self.top, self.x(value), bottom, "grid"),
                      words(self.x(value), bottom + 15, f"{value:g}", "soft", "middle")]
        parts.append(words(self.left + self.width / 2, bottom + 30, x_label, "soft", "middle"))
        return parts

    def points(self, xs, ys):
        """Pixels of a curve."""
        return " ".join(f"{place(self.x(x))},{place(self.y(y))}" for x, y in zip(xs, ys))

    def curve(self, xs, ys, look):
        return f'<polyline class="{look}" points="{self.points(xs, ys)}"/>'

    def seeds_and_mean(self, xs, per_seed, color, look=""):
        """Every seed as a thin line, their mean as a thick one."""
        parts = []
        if len(per_seed) > 1:
            parts = [self.curve(xs, ys, f"{color} thin {look}".strip()) for ys in per_seed]
        means = [mean(column) for column in zip(*per_seed)]
        return [*parts, self.curve(xs, means, f"{color} {look}".strip())]


# ---------------------------------------------------------------- the figures

def gains():
    """compare.sh: what each algorithm gains over SFT in `write`, sampled and greedy."""
    found = rows_from("compare")
    first, *rows = found
    kinds = [("c0", "f0", "sampled", "+write"), ("c1", "f1", "greedy", "+greedy")]
    values, shown = {}, [0.0]
    for row in rows:
        for _, _, _, metric in kinds:
            values[row, metric] = values_of(found, row, metric, "compare")
            shown += [*values[row, metric], *interval(values[row, metric])]
    step = 44
    axes = Axes(80, 46, 540, step * len(rows), span(shown), (0, len(rows)))
    parts = []
    for value in ticks(*axes.x_range, 8):
        x, bottom = axes.x(value), axes.top + axes.height
        parts += [line(x, axes.top, x, bottom, "zero" if value == 0 else "grid"),
                  words(x, bottom + 15, f"{value:g}", "soft", "middle")]
    for i, row in enumerate(rows):
        middle = axes.top + step * (i + 0.5)
        name = ALGORITHMS.get(row, row).split("|")[0].strip()
        parts.append(words(axes.left - 8, middle + 4, name, "", "end"))
        for shift, (color, fill, _, metric) in zip((-8, 8), kinds):
            low, high = interval(values[row, metric])
            center, y = axes.x(mean(values[row, metric])), middle + shift
            parts += [line(axes.x(low), y, axes.x(high), y, f"{color} wide"),
                      line(center, y - 6, center, y + 6, f"{color} mean")]
            parts += [dot(axes.x(value), y, fill, 2.5) for value in values[row, metric]]
    names = [(f"{color} wide", name) for color, _, name, _ in kinds]
    parts += legend(80, 22, names, 100)
    parts.append(words(300, 22, "a dot: a seed; the bar: where a new seed falls, 95%", "soft"))
    below = axes.top + axes.height + 34
    parts.append(words(350, below, f"true reward in write, gained over {first.upper()}", "soft", "middle"))
    return drawing(640, round(below + 14), parts, gains.__doc__)


# What is fitted to a gain over d = √KL (Gao et al. 2210.10760, sec. 3.1).
FORMS = {"d (α - β d)": lambda d, alpha, beta: d * (alpha - beta * d),
         "d (α - β log d)": lambda d, alpha, beta: d * (alpha - beta * math.log(d))}


def overoptimization():
    """reward_hacking.sh: the true and the learned reward against √KL, and the two forms fitted to the true one."""
    return draw_curves(rows_from("reward_hacking.curves"))


def draw_curves(found):
    """A panel for each row {"d": [a list a seed], "gold": ..., "proxy": ..., "fits": [{form: {"alpha", "beta"}}, ...]}."""
    across, wide, high = 3, 262, 226
    down = math.ceil(len(found) / across)
    start = mean([gold[0] for gold in next(iter(found.values()))["gold"]])
    parts = legend(46, 20, [("c0", "gold, the truth"), ("c1", "proxy"), ("c2 dash", "fit d (α − β d)"),
                            ("c3 dots", "fit d (α − β log d)")], 160)
    for i, (row, curves) in enumerate(found.items()):
        left, top = 46 + wide * (i % across), 56 + high * (i // across)
        ds = [d for seed in curves["d"] for d in seed]
        heights = [y for key in ("gold", "proxy") for seed in curves[key] for y in seed]
        axes = Axes(left, top, wide - 56, high - 66, (0, max(ds)), span(heights))
        parts += axes.frame(row.removeprefix("reward_hacking/"), "d = √KL")
        for key, color in (("gold", "c0"), ("proxy", "c1")):
            alone = len(curves["d"]) == 1
            for d, ys in zip(curves["d"], curves[key]):
                parts.append(axes.curve(d, ys, color if alone else f"{color} thin"))
            if not alone:   # at every point of a curve the mean of d, and of the reward
                parts.append(axes.curve(means_by_place(curves["d"]), means_by_place(curves[key]), color))
        for form, look in zip(FORMS, ("c2 dash", "c3 dots")):
            parts += fitted(axes, curves["fits"], form, start, look)
    return drawing(46 + wide * across, 46 + high * down, parts, overoptimization.__doc__)


def means_by_place(lists):
    """The means of the first numbers, of the second ones, and so on, as far as all lists go."""
    return [mean(column) for column in zip(*lists)]


def fitted(axes, fits, form, start, look):
    """A form with the mean coefficients of the seeds, where it is inside the axes."""
    coefficients = [fit[form] for fit in fits if form in fit]
    if not coefficients:
        return []
    alpha, beta = (mean([c[name] for c in coefficients]) for name in ("alpha", "beta"))
    low, high = axes.y_range
    xs, ys = [], []
    for i in range(1, 41):
        x = axes.x_range[1] * i / 40
        y = start + FORMS[form](x, alpha, beta)
        if low <= y <= high:
            xs.append(x)
            ys.append(y)
    return [axes.curve(xs, ys, look)]


def scaling():
    """o1.sh: sums right against the number of samples, after more and more steps of RL."""
    found = rows_from("o1")
    parts, shown = [], []
    for i, (kind, title) in enumerate([("pass@", "one right among k: pass@k"), ("maj@", "the majority of k: maj@k")]):
        curves = {}
        for row, metrics in found.items():
            names = sorted((name for name in metrics if name.startswith(kind)), key=lambda name: int(name[len(kind):]))
            counts = [int(name[len(kind):]) for name in names]
            curves[row] = list(zip(*(metrics[name] for name in names)))     # a curve a seed
            shown += [value for curve in curves[row] for value in curve]
        axes = Axes(48 + 300 * i, 60, 240, 190, (1, max(counts)), span(shown), x_log=True)
        parts += axes.frame(title, "k, samples to a prompt", counts)
        for j, per_seed in enumerate(curves.values()):
            parts += axes.seeds_and_mean(counts, per_seed, f"c{j % COLORS}")
    entries = [(f"c{j % COLORS}", row.removeprefix("o1/")) for j, row in enumerate(found)]
    return drawing(610, 300, legend(48, 22, entries, 120) + parts, scaling.__doc__)


def thinking():
    """compare.sh: the share of sums that are right while GRPO learns them, and how much the model thinks."""
    curves = rows_from("compare.curves")["grpo"]
    thinks = "reward/format" if "reward/format" in curves else "response_length"
    titles = {"gold": "share of sums right", "reward/format": "share of answers that think",
              "response_length": "tokens of an answer"}
    parts = []
    for i, metric in enumerate(("gold", thinks)):
        per_seed = curves[metric]
        axes = Axes(48 + 300 * i, 36, 240, 180, (0, len(per_seed[0]) - 1), span([y for ys in per_seed for y in ys]))
        parts += axes.frame(titles[metric], "steps of GRPO")
        parts += axes.seeds_and_mean(range(len(per_seed[0])), per_seed, f"c{i}")
    return drawing(610, 266, parts, thinking.__doc__)


FIGURES = dict(gains=gains, overoptimization=overoptimization, scaling=scaling, thinking=thinking)


@dataclass
class Figures(Options):
    """Draw configs/results/*.svg from the results files."""
    check: bool = False         # write nothing; say which differ, and exit with 1 if any does


def figures(cfg):
    """Every figure whose results are there."""
    stale, drawn = [], 0
    for name, draw in FIGURES.items():
        path = RESULTS / f"{name}.svg"
        try:
            text = draw()
        except UserError as e:
            tell(f"{name}.svg is not drawn: {e}")
            continue
        drawn += 1
        was = path.read_text(encoding="utf-8") if path.exists() else ""
        if was != text:
            stale.append(path.name)
            if not cfg.check:
                write_text(path, text)
    report_stale(stale, cfg.check, f"{drawn} figures")


# ---------------------------------------------------------------- the page of some runs

@dataclass
class Page(Options):
    """One HTML file of any run folders, that needs nothing else: curves, options that differ, samples, tables.

    A folder that is no run stands for the runs in it. Tables are *.json with "rows", given, in a folder tables, or beside
    the runs.
    """
    out: str = "out/report.html"  # the file to write


KEEP = 160      # points of a curve; a longer one is drawn by the means of neighbours


def read_log(folder):
    """The rows of a metrics.jsonl, {} of them damaged or not -> (rows, how many lines are no rows)."""
    path, rows, bad = Path(folder) / "metrics.jsonl", [], 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for text_line in text.splitlines():
        try:
            row = json.loads(text_line)
            row["step"] + row.get("seconds", 0)     # both are numbers
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
    return rows, bad


class RunFolder:
    """What a run's folder says: its options, its curves, its samples."""

    def __init__(self, folder):
        self.folder, self.name = folder, str(folder)
        self.options = read_json(folder / "run.json")
        if not isinstance(self.options, dict):
            raise UserError(f"{folder}/run.json: not a run's options")
        for made_of in ("code", "inputs"):
            self.options.pop(made_of, None)
        self.script = script_of(self.options)
        self.rows, self.bad = read_log(folder)
        self.samples = sorted((folder / "samples").glob("*.txt"))
        self.unfinished = not (folder / "summary.json").exists()

    def curve(self, metric):
        """(steps, values) of a metric, where it is a number."""
        steps, values = [], []
        for row in self.rows:
            value = row.get(metric)
            if type(value) in (int, float) and math.isfinite(value):
                steps.append(row["step"])
                values.append(value)
        return steps, values


@functools.cache
def option_names():
    """{"ppo.py": the options of its own, "reward.py label": ...} of all that makes a run, read from the sources."""
    found = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]):
        for text in re.split(r"(?m)^class ", path.read_text(encoding="utf-8"))[1:]:
            name = re.match(r"\w+", text)[0]
            body, _, _ = text.partition("\n\n\n")
            script = path.name if name == "Config" else f"{path.name} {name.lower()}"
            found[script] = set(re.findall(r"(?m)^    (\w+): .*?  # ", body))
    shared = found.pop("data.py runconfig") | found.pop("data.py trainconfig")
    return {script: names - shared for script, names in found.items() if names - shared}


def script_of(options):
    """The script whose options these are most likely."""
    def likeness(script):
        own = option_names()[script]
        return len(own & options.keys()) / len(own | options.keys())
    return max(option_names(), key=likeness)


def collect(paths):
    """(runs, files of tables, what is neither) of the words of a command line."""
    runs, found_tables, skipped = [], [], []
    for path in map(Path, paths):
        if path.suffix == ".json":
            found_tables.append(path)
            continue
        inside = sorted(file.parent for file in path.rglob("run.json"))
        runs += [path] if path in inside else inside
        found_tables += sorted(path.glob("tables/*.json")) + sorted(path.glob("*.json")) * (path.name == "tables")
        if not inside and path.name != "tables":
            skipped.append(f"{path} is skipped: there is no run in it")
    for parent in dict.fromkeys(run.parent for run in runs):
        found_tables += sorted(parent.glob("*.json")) + sorted(parent.glob("tables/*.json"))
    return list(dict.fromkeys(runs)), list(dict.fromkeys(found_tables)), skipped


def page(cfg, paths):
    """Write the page of these runs."""
    folders, table_files, skipped = collect(paths)
    groups = defaultdict(list)
    for folder in folders:
        try:
            run = RunFolder(folder)
        except UserError as e:
            skipped.append(f"{folder} is skipped: {e}")
            continue
        groups[run.script].append(run)
        if run.bad:
            skipped.append(f"{folder}/metrics.jsonl: {run.bad} lines are no rows and left out")
    sections = []
    for path in table_files:
        try:
            sections.append(table_section(path))
        except UserError as e:
            skipped.append(f"{path} is skipped: {e}")
    if not groups and not sections:
        raise UserError(f"{', '.join(paths)}: no run there, which is a folder with run.json and metrics.jsonl")
    sections += [group_section(script, runs) for script, runs in groups.items()]
    for text in skipped:
        tell(text)
    write_text(cfg.out, whole_page(sections, skipped))
    print(f"{cfg.out}: {sum(map(len, groups.values()))} runs of {len(groups)} kinds, {len(sections) - len(groups)} "
          f"tables")


def whole_page(sections, notes):
    """HTML of all sections [(title, anchor, html)], with a list of them on top."""
    links = " · ".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for title, anchor, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{html.escape(title)}</h2>{text}</section>'
                   for title, anchor, text in sections)
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs</title>'
            f'<meta name="viewport" content="width=device-width"><style>{style()}{PAGE_STYLE}</style>'
            f"<h1>Runs</h1><p>{links}</p>{body}<ul>{said}</ul><script>{SCRIPT}</script></html>\n")


PAGE_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;
  background:var(--paper);color:var(--ink)}
a{color:var(--c0)} h1,h2{line-height:1.2} h2{border-top:1px solid var(--grid);padding-top:1em;margin-top:2em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(350px,1fr));gap:1.2em 1.5em}
figure{margin:0} figcaption,.note{color:var(--soft);font-size:13px} figcaption b{color:var(--ink);font-weight:600}
svg{width:100%;height:auto;display:block} .hover{min-height:1.4em;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
td:first-child,th:first-child{text-align:left}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1em} @media (max-width:700px){.two{grid-template-columns:1fr}}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;margin:.3em 0;padding:.7em;border:1px solid var(--grid)}
.runs label{margin-right:1.2em;white-space:nowrap} .runs svg{display:inline;width:24px;height:10px}
summary{cursor:pointer;margin:.6em 0}
"""

# Without it the page is complete; with it a curve can be hidden, and the values under the pointer are told.
SCRIPT = """
document.querySelectorAll(".runs input").forEach(box => box.onchange = () =>
  box.closest("section").querySelectorAll(".charts ." + box.value).forEach(curve =>
    curve.style.display = box.checked ? "" : "none"));
document.querySelectorAll(".charts figure").forEach(figure => {
  const svg = figure.querySelector("svg"), told = figure.querySelector(".hover");
  const [top, height, low, high] = svg.dataset.y.split(" ").map(Number);
  svg.onmouseleave = () => told.textContent = "";
  svg.onmousemove = event => {
    const at = svg.createSVGPoint();
    at.x = event.clientX;
    const x = at.matrixTransform(svg.getScreenCTM().inverse()).x, said = [];
    svg.querySelectorAll("polyline").forEach(curve => {
      let best = null;
      for (const point of curve.points)
        if (!best || Math.abs(point.x - x) < Math.abs(best.x - x)) best = point;
      const value = high - (best.y - top) / height * (high - low);
      if (curve.style.display != "none") said.push(curve.dataset.name + " " + value.toPrecision(3));
    });
    told.textContent = said.join(", ");
  };
});
"""


def anchor_of(text):
    return re.sub(r"\W+", "-", text)


def group_section(script, runs):
    """The runs of one script: who they are, options, curves, samples."""
    boxes = []
    for i, run in enumerate(runs):
        steps = f"{len(run.rows)} steps" + ", unfinished" * run.unfinished
        boxes.append(f'<label><input type="checkbox" value="r{i}" checked> <svg viewBox="0 0 24 10">'
                     f"{line(0, 5, 24, 5, look_of(i))}</svg> {html.escape(run.name)} "
                     f'<span class="note">({steps})</span></label>')
    metrics = dict.fromkeys(metric for run in runs for row in run.rows for metric in row)
    charts = [chart(script, metric, runs) for metric in metrics if metric != "step"]
    text = (f'<p class="runs">{"".join(boxes)}</p>{options_table(runs)}<div class="charts">{"".join(charts)}</div>'
            + "".join(map(samples_of, runs)))
    return script, anchor_of(script), text


def look_of(i):
    """The classes of the i-th run's curve: a colour, dashed the second time round."""
    return f"c{i % COLORS}" + " dash" * (i // COLORS % 2) + f" r{i}"


def chart(script, metric, runs):
    """A metric's figure with a curve for each run that has it, and what it means; nothing if none has a number."""
    curves = {i: thinned(*run.curve(metric)) for i, run in enumerate(runs)}
    curves = {i: curve for i, curve in curves.items() if curve[0]}
    if not curves:
        return ""
    all_steps = [step for steps, _ in curves.values() for step in steps]
    all_values = [value for _, values in curves.values() for value in values]
    axes = Axes(52, 24, 326, 140, (min(all_steps), max(all_steps)), span(all_values))
    low, high = axes.y_range
    parts = axes.frame(metric, "step", None if len(set(all_steps)) > 1 else [all_steps[0]])
    for i, (steps, values) in curves.items():
        name = f"{html.escape(runs[i].name)}: {values[0]:.4g} → {values[-1]:.4g}"
        parts.append(f'<polyline class="{look_of(i)}" data-name="{html.escape(runs[i].name)}" '
                     f'points="{axes.points(steps, values)}"><title>{name}</title></polyline>')
        if len(steps) == 1:
            parts.append(dot(axes.x(steps[0]), axes.y(values[0]), f"f{i % COLORS} r{i}"))
    return (f'<figure><svg viewBox="0 0 390 200" data-y="{axes.top} {axes.height} {low} {high}">{"".join(parts)}</svg>'
            f'<div class="hover note"></div><figcaption>{meaning(script, metric)}</figcaption></figure>')


def thinned(steps, values):
    """A curve of at most KEEP points: means of neighbours."""
    size = math.ceil(len(steps) / KEEP) or 1
    starts = range(0, len(steps), size)
    return [steps[i:i + size][-1] for i in starts], [mean(values[i:i + size]) for i in starts]


@functools.cache
def glossary():
    """[(heading, pattern of names, [what it is, healthy, if not])], the tables of "Metrics" in configs/README.md."""
    text = PAGES[1].read_text(encoding="utf-8")
    _, _, text = text.partition("\n## Metrics\n")
    text, _, _ = text.partition("\n## ")
    heading, found = "", []
    for row in text.splitlines():
        if row.startswith("### "):
            heading = row[4:]
        cells = [part.strip().replace(r"\|", "|") for part in re.split(r"(?<!\\)\|", row)]
        if len(cells) != 6 or "`" not in cells[1]:
            continue
        scripts = " ".join(re.findall(r"`(\w+\.py)`", cells[1]))
        for name in re.findall(r"`([^`]+)`", cells[1]):
            pattern = re.sub(r"NAME|\\\*|a\\\|b|\bK\b", ".+", re.escape(name))
            found.append((scripts or heading, pattern, cells[2:5]))
    return found


def meaning(script, metric):
    """What the glossary says of a metric of a script, as HTML; nothing if it is not in there."""
    file = script.split()[0]
    fitting = [(pattern, texts) for scripts, pattern, texts in glossary()
               if file in scripts and re.fullmatch(pattern, metric)]
    if not fitting:
        return ""
    _, (what, healthy, if_not) = min(fitting, key=lambda entry: entry[0].count(".+") * 100 - len(entry[0]))
    said = []
    for title, text in (("", what), ("Healthy: ", healthy), ("If not: ", if_not)):
        if text not in ("", "–"):
            text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
            said.append(f"<b>{title}</b>{text}." if title else f"{text}.")
    return " ".join(said)


def options_table(runs):
    """The options in which the runs differ; the others folded away."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    common, differ = [], []
    for name in names:
        values = [shown(run.options.get(name, "–")) for run in runs]
        (differ if len(set(values)) > 1 else common).append([f"--{name}", *values])
    text = ""
    if differ:
        text = html_table(["option", *(run.name for run in runs)], differ)
    rows = [row[:2] for row in common]
    return f"{text}<details><summary>{len(rows)} options {'in common' if len(runs) > 1 else ''}</summary>" \
           f"{html_table(['option', 'value'], rows)}</details>"


def shown(value):
    """A value of JSON as a cell: numbers short, texts as they are."""
    if type(value) is float:
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def html_table(heads, rows):
    """A table of texts, which may be hostile."""
    def cells(tag, texts):
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"
    body = "".join(cells("td", row) for row in rows)
    return f'<div class="scroll"><table>{cells("th", heads)}{body}</table></div>'


def samples_of(run):
    """The first and the last samples of a run, side by side."""
    if not run.samples:
        return ""
    blocks = []
    for path in dict.fromkeys([run.samples[0], run.samples[-1]]):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        step = path.stem.lstrip("0") or "0"
        blocks.append(f'<div><div class="note">step {html.escape(step)}</div><pre>{html.escape(text)}</pre></div>')
    return (f'<details open><summary>samples of {html.escape(run.name)}</summary><div class="two">{"".join(blocks)}</div>'
            "</details>")


def table_section(path):
    """A table that compare or a recipe has left, all its numbers."""
    rows = table_rows(path)
    names = dict.fromkeys(key for row in rows for key, value in row.items() if is_number_or_pair(value))
    lines = []
    for row in rows:
        name = str(row.get("checkpoint", row.get("name", "")))
        lines.append([name, *(number_or_pair(row.get(key)) for key in names)])
    return str(path), anchor_of(str(path)), html_table(["", *names], lines)


def is_number_or_pair(value):
    return type(value) in (int, float) or (isinstance(value, list) and len(value) == 2 and is_numeric(value))


def number_or_pair(value):
    """A number, or the two ends of an interval, as text; nothing for anything else."""
    if not is_number_or_pair(value):
        return ""
    if isinstance(value, list):
        low, high = value
        return f"[{low:.3f}, {high:.3f}]"
    return f"{value:.3f}" if type(value) is float else str(value)


# ---------------------------------------------------------------- the command line

COMMANDS = {"record": (Record, record, ["recipe"]), "tables": (Tables, tables, []), "figures": (Figures, figures, []),
            "page": (Page, page, ["run", "run..."])}


def main():
    """Run the command that the first word names; other words are the folders of a page."""
    first, *rest = sys.argv[1:] or [""]
    if first in ("-h", "--help"):
        return print(f"{__doc__}\n--help after a command lists its options: {', '.join(COMMANDS)}")
    if first not in COMMANDS:
        if not Path(first).exists() or not first:
            raise OptionError(f"say what to do: python configs/report.py {'|'.join(COMMANDS)} (--help after it lists its "
                              f"options), or name run folders{f'; there is no {first}' * bool(first)}")
        first, rest = "page", sys.argv[1:]
    Config, run, takes = COMMANDS[first]
    got = parse(Config, takes, rest, first)
    run(*got) if takes else run(got)


if __name__ == "__main__":
    guard(main)
