"""Run recipes over seeds and gather what they leave into results files; and read tables, logs and results files.

    record       a recipe NAME.sh once a seed, so many at a time, then gather
    gather       tables, logs and notes of all seeds -> configs/results/NAME.json
    table_rows   the rows of $OUT/tables/NAME.json, which a recipe has left
    read_log     the rows of a run's metrics.jsonl
    rows_from    a table of configs/results/NAME.json

The command line is report.py's: python configs/report.py record NAME. What is in these files is said there, at the top.
"""
import functools
import json
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

from data import Count, Natural, OptionError, Options, UserError, tell, write_text
from model import find_device, machine, read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "configs/results"
READMES = [ROOT / "README.md", ROOT / "configs/README.md", ROOT / "tests/STUDY.md"]

# Curves that become a table NAME.curves beside those that the recipe leaves: {recipe: {run: its metrics}}.
CURVES = {"compare": {"grpo": ["gold", "reward/format", "response_length"]}}
# All that a run logged at some of its steps becomes a table NAME.log: {recipe: {run: steps}}.
LOGS = {"compare": {"ppo": (0, 1, 2, 4, 9, 14, 19), "grpo": (0, 4, 9, 14, 19, 29, 39)}}
# And what each stage logged last of these, or of these by kind as val_r2/0, becomes a table NAME.stages.
ENDS = ("seconds", "val_loss", "val_accuracy", "val_gold", "val_r2", "agrees", "inconsistent", "cost", "lambda")


# ---------------------------------------------------------------- run

@dataclass
class Record(Options):
    """Run a recipe once a seed, and gather its tables into configs/results/NAME.json; or elsewhere, if --name says so.

    Seed 0 has the folder out/seed0, and its log there in NAME.log. NAME.run.json says on what it was made, and that it
    is finished: then it is only gathered. Without that file the recipe runs, and skips the stages that are finished.
    """
    seeds: str = "0,1,2"        # all that the results file is to have, with commas between them
    name: str = ""              # of the results file; empty: the recipe's
    jobs: Count = 1             # runs at a time; several have one thread each
    out: str = "out"            # folder in which every seed has its own
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the matmuls
    threads: Natural = 0        # CPU threads of a run; 0 leaves it to PyTorch


class SeedRun:
    """One run of a recipe: its folder, its log, and the note that says on what it was made."""

    def __init__(self, name, seed, cfg):
        self.name, self.seed = name, seed
        out = os.path.join(cfg.out, f"seed{seed}")
        if not os.path.isabs(out):
            out = os.path.relpath(out, ROOT)    # the recipes run in ROOT, wherever this was started
        self.out = out      # what the recipe knows as $OUT, and what the rows of its tables begin with
        self.folder = ROOT / out
        self.log = self.folder / f"{name}.log"
        self.note = self.folder / f"{name}.run.json"
        self.recipe = [f"configs/{name}.sh", "--seed", str(seed)]
        if cfg.threads:
            self.recipe += ["--threads", str(cfg.threads)]
        if cfg.dtype != "auto":
            self.recipe += ["--dtype", cfg.dtype]

    def bash(self, *words, **options):
        """Start bash in ROOT, for this seed's folder; its `python` is the one that runs this."""
        beside_python = os.path.dirname(sys.executable)
        path = beside_python + os.pathsep + os.environ["PATH"]
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
        folders = []
        for option, value in zip(words, words[1:]):
            if option == "--out" and ROOT / value not in folders:
                folders.append(ROOT / value)
        return folders

    def begin(self):
        """Start the recipe."""
        self.seconds_before = sum(map(seconds_of, self.stages))
        self.since = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"seed {self.seed} runs; its log is {self.log}", flush=True)
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = self.bash(*self.recipe, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def end(self, origin):
        """After the recipe: write the note, or say what went wrong -> whether all is well.

        origin: commit, machine and torch. The seconds are those from nothing: of this run, and what its stages had taken
        before it.
        """
        seconds = self.seconds_before + time.perf_counter() - self.since
        fault = ""
        if self.process.returncode:
            fault = last_line(self.log.read_text(encoding="utf-8", errors="replace"))
        elif not self.tables():
            fault = f"it left no {self.folder}/tables/{self.name}.json"
        if fault:
            tell(f"seed {self.seed} failed: {fault} ({self.log})")
            return False
        note = origin | dict(seconds=round(seconds, 1))
        write_text(self.note, json.dumps(note, indent=1))
        print(f"seed {self.seed} is finished: {seconds:.0f} s", flush=True)
        return True


def record(cfg, recipe):
    """Run what is not finished, so many at a time, then write the results file. recipe: [its name]."""
    name, = recipe
    seeds = seeds_of(cfg.seeds)
    recipes = sorted(path.stem for path in (ROOT / "configs").glob("*.sh"))
    if name not in recipes:
        raise OptionError(f"there is no configs/{name}.sh; choose from {', '.join(recipes)}")
    if cfg.jobs > 1:
        cfg.threads = 1
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    here = machine(find_device("auto"), cfg.dtype)
    version, _, _ = torch.__version__.partition("+")        # 2.13.0+cpu
    origin = dict(commit=commit(), machine=here, torch=version)
    runs = [SeedRun(name, seed, cfg) for seed in seeds]
    to_do = []
    for run in runs:
        if run.finished():
            print(f"seed {run.seed} is only gathered, as {run.note} says")
        else:
            to_do.append(run)
    failed = run_all(to_do, cfg.jobs, origin)
    if failed:
        raise UserError(f"{name}: {failed} seeds failed, nothing is written; the same command goes on from here")
    result, called = gather(name, runs), cfg.name or name
    result["tables"] = {called + table.removeprefix(name): rows for table, rows in result["tables"].items()}
    path = RESULTS / f"{called}.json"
    write_text(path, to_json(result))
    print(f"{path}: {len(seeds)} seeds")


def seeds_of(text):
    """The seeds that a text like 0,1,2 names."""
    words = text.split(",")
    numbers = [int(word) for word in words if re.fullmatch(r"\d{1,9}", word)]
    if len(set(numbers)) < len(words):      # a word is no number, or a number is there twice
        raise OptionError(f"--seeds {text}: whole numbers with commas between them, each once, as in 0,1,2")
    return numbers


def run_all(runs, jobs, origin):
    """Let the recipes run, so many at a time -> how many failed."""
    waiting, running = list(runs), []
    failed = 0
    stages = []
    for run in runs:
        stages += run.stages
    shown = tqdm(total=len(stages), unit="stage", leave=False, disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                run.begin()
                running.append(run)
            time.sleep(0.1)
            for run in list(running):
                if run.process.poll() is None:
                    continue
                running.remove(run)
                if not run.end(origin):
                    failed += 1
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
        head = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--", ".", ":!configs/results", ":!*.md")
        return f"{head}+" if changed else head
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


# ---------------------------------------------------------------- gather

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
        if name in LOGS:
            seeds_of_table[f"{name}.log"][run.seed] = logged_of(run, LOGS[name])
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


def logged_of(run, wanted):
    """{run STEP: {metric: value}} of what was logged at these steps."""
    logged = {}
    for folder, steps in wanted.items():
        for row in read_log(run.folder / folder)[0]:
            if row["step"] not in steps:
                continue
            name = f"{folder} {row['step']}"
            logged[name] = {}
            for metric, value in row.items():
                metric = metric.replace(f"{run.out}/", "")      # in reward/FOLDER
                logged[name][metric] = rounded(value)
    return logged


def ends_of(run):
    """{stage: {metric: what it logged last}} of the metrics in ENDS."""
    ends = {}
    for folder in run.stages:
        rows, _ = read_log(folder)
        last = {}
        for row in rows:
            for metric, value in row.items():
                kind, _, _ = metric.partition("/")
                if kind in ENDS and is_number(value):
                    last[metric] = rounded(value)
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
        names = {}      # of all metrics that any seed has; a dict keeps their order
        for metrics in per_seed:
            names |= metrics
        out[row] = {}
        for name in names:
            out[row][name] = [metrics.get(name) for metrics in per_seed]
    return out


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


def to_json(result):
    """JSON with a metric a line: the lists that hold no list or dict are not spread over lines."""
    def in_a_line(match):
        items = match[1].split()
        return "[" + " ".join(items) + "]"
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[([^][{}]*)\]", in_a_line, text) + "\n"


# ---------------------------------------------------------------- read

def table_rows(path):
    """The rows of a table's file."""
    rows = read_json(path).get("rows")
    is_table = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not is_table:
        raise UserError(f'{path}: no table, which is {{"rows": [{{...}}, ...]}}')
    return rows


def name_of(row):
    """What a row is called; one of reward.py accuracy, by the file that it is about, too."""
    name = str(row.get("checkpoint", row.get("name", "")))
    return f"{name} on {row['data']}" if "data" in row else name


def read_log(folder):
    """The rows of a run's metrics.jsonl, and the numbers of those of its lines that are none."""
    path = Path(folder) / "metrics.jsonl"
    rows, bad = [], []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, said in enumerate(text.splitlines(), 1):
        row = row_of_log(said)
        if row is None:
            bad.append(number)
        else:
            rows.append(row)
    return rows, bad


def row_of_log(text):
    """A line of metrics.jsonl; None if it is no row, which has the number of its step."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    whole = is_number(row.get("step")) and is_number(row.get("seconds", 0))
    return row if whole else None


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


def each(rows, key):
    """What every row has under a key."""
    return [row[key] for row in rows]


def is_number(value):
    """Whether it is a number, and no truth value, that one can calculate with: JSON has NaN, 1e999 and whole numbers of
    any length, too."""
    return type(value) in (int, float) and abs(value) < 1e300


def last_part(row):
    """o1/steps10 -> steps10."""
    return row.split("/")[-1]
