"""The page of runs: one HTML file that shows what any runs have left, beside each other.

First the tables of numbers. Then the runs of each script: who they are, the options in which they differ, every metric
as a chart with what the glossary says of it, the first and the last samples. What is read may be hostile: all of
its texts are escaped. The command line is report.py's: python configs/report.py page out/*.
"""
import functools
import html
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from configs.charts import COLORS, Axes, dot, line, span, style, tag
from configs.glossary import GLOSSARY, SCRIPTS
from configs.record import ROOT, each, is_number, name_of, read_log, table_rows
from data import Options, UserError, mean, tell, write_text
from model import read_json


@dataclass
class Page(Options):
    """One HTML file of any runs, that needs nothing else: curves, options that differ, samples early and late, tables.

    A folder that is no run stands for the runs in it. Tables are files *.json with "rows", or a folder `tables` of such
    files. The one beside the runs is shown, too.
    """
    out: str = "out/report.html"  # the file to write


def page(cfg, paths):
    """Write the page of these runs and tables; what cannot be shown is said, on it and on stderr."""
    folders, files, notes = collect(paths)
    sections = {}       # {title: HTML}
    for file in files:
        try:
            sections[str(file)] = numbers_of(table_rows(file))
        except UserError as e:
            notes.append(f"skipped: {e}")
    tables = len(sections)
    runs_of = defaultdict(list)     # {script: its runs}
    for folder in folders:
        try:
            run = RunFolder(folder)
        except (UserError, OSError) as e:
            notes.append(f"skipped: {e}")
            continue
        runs_of[run.script].append(run)
        notes += run.notes
    for script, runs in runs_of.items():
        sections[script] = group_of(script, runs)
    for note in notes:
        tell(note)
    if not sections:
        raise UserError("no run to show: a folder with run.json and metrics.jsonl")
    write_text(cfg.out, writable(whole_page(sections, notes)))
    shown = sum(map(len, runs_of.values()))
    print(f"{cfg.out}: {shown} runs, {tables} tables")


def writable(text):
    """A text that UTF-8 can hold: JSON and names of files can have lone surrogates, which it cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def whole_page(sections, notes):
    """HTML of all sections {title: HTML}, with links to them and the notes on top."""
    links, parts = [], []
    for i, (title, text) in enumerate(sections.items()):
        title = html.escape(title)
        heading = tag("h2", title)
        links.append(tag("a", title, href=f"#part{i}"))
        parts.append(tag("section", heading, text, id=f"part{i}"))
    said = [tag("p", html.escape(note), look="note") for note in notes]
    css = style() + PAGE_STYLE
    head = [HEAD, tag("title", "Runs"), tag("style", css), tag("h1", "Runs")]
    where = tag("p", " · ".join(links))
    return "\n".join([*head, where, *said, *parts, tag("script", SCRIPT), "</html>\n"])


HEAD = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
PAGE_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;
  background:var(--paper);color:var(--ink);overflow-wrap:anywhere}
a{color:var(--0)} h2{border-top:1px solid var(--grid);padding-top:1em;margin-top:2em}
figcaption,.note{color:var(--soft);font-size:13px} p.note{margin:.3em 0}
figure{margin:0} figcaption b{color:var(--ink);font-weight:600} .hover{min-height:1.5em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:1em 1.5em}
svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto;margin:.6em 0}
table{border-collapse:separate;border-spacing:0;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:3px 9px;line-height:19px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1em}
pre{white-space:pre-wrap;font-size:13px;margin:.3em 0;padding:.7em;border:1px solid var(--grid)}
.who{position:sticky;top:0;z-index:1;max-height:20vh;overflow:auto;padding:.4em 0;background:var(--paper)}
label{display:inline-block;margin-right:1.2em}
label svg{display:inline;width:24px;margin:0 .4em} label line{stroke-width:3}
summary{cursor:pointer;margin:.6em 0}
@media (max-width:700px){.two{grid-template-columns:1fr} td:first-child{white-space:normal;min-width:9em}}
"""

# Without it the page is complete; with it a curve can be hidden, and under a chart stand the values of the four curves
# that are nearest to the pointer.
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
    const near = [];
    svg.querySelectorAll("polyline").forEach(curve => {
      if (curve.style.display == "none") return;
      const points = [...curve.points].sort((a, b) => Math.abs(a.x - at.x) - Math.abs(b.x - at.x));
      const value = high - (points[0].y - top) / height * (high - low);
      near.push({far: Math.abs(points[0].y - at.y), text: curve.dataset.name + " " + value.toPrecision(3)});
    });
    near.sort((a, b) => a.far - b.far);
    told.textContent = near.slice(0, 4).map(curve => curve.text).join(", ");
  };
});
"""


# ---------------------------------------------------------------- the runs of a script

def group_of(script, runs):
    """The runs of one script: who they are, options, curves, samples."""
    metrics = {}        # by name; a dict keeps the order in which they were first logged
    for run in runs:
        for row in run.rows:
            metrics |= row
    metrics.pop("step", None)
    for boring in ("lr", "seconds"):
        if boring in metrics:
            metrics[boring] = metrics.pop(boring)       # comes last
    labels = [label_of(i, run) for i, run in enumerate(runs)]
    charts = [chart(script, metric, runs) for metric in metrics]
    samples = [samples_of(run) for run in runs]
    who = tag("p", *labels, look="who")
    curves = tag("div", *charts, look="charts")
    return "".join([who, options_of(runs), curves, *samples])


def label_of(i, run):
    """A box that hides the i-th run's curves, how they look, its name and how long it is."""
    box = f'<input type="checkbox" checked value="r{i}">'
    stroke = line(0, 5, 24, 5, look_of(i))
    key = tag("svg", stroke, viewBox="0 0 24 10")
    state = "" if run.finished else ", unfinished"
    steps = f" ({len(run.rows)} steps{state})"
    return tag("label", box, key, html.escape(run.name), tag("span", steps, look="note"))


def look_of(i):
    """The classes of the i-th run's curves: a colour, dashed the second time round, and r0, r1, ... for SCRIPT."""
    dash = " dash" if i // COLORS % 2 else ""
    return f"c{i % COLORS}{dash} r{i}"


def chart(script, metric, runs):
    """A metric's figure, with a curve for each run that has it, and what it means; nothing if none has a number."""
    curves = [run.curve(metric) for run in runs]
    shown = []
    for _, ys in curves:
        shown += ys
    if not shown:
        return ""
    ends = [run.rows[-1]["step"] for run in runs if run.rows]
    steps = 0, max(1, *ends)        # the same for all charts of a script
    axes = Axes(52, 24, 326, 140, steps, span(shown))
    parts = axes.frame(metric, "step")
    for i, (xs, ys) in enumerate(curves):
        if xs:
            parts += curve_of(i, runs[i].name, axes, xs, ys)
    scale = [axes.top, axes.height, *axes.y_range]      # with which SCRIPT turns pixels back into values
    svg = tag("svg", *parts, viewBox="0 0 390 200", data_y=" ".join(map(str, scale)))
    caption = tag("figcaption", meaning(script, metric))
    return tag("figure", svg, tag("div", look="hover note"), caption)


FEW = 10        # points: so few are seen as dots; one alone has no line


def curve_of(i, name, axes, xs, ys):
    """The i-th run's curve, which says where it begins and ends when pointed at."""
    first, last = ys[0], ys[-1]
    about = tag("title", html.escape(f"{name}: {first:.4g} → {last:.4g}"))
    parts = [axes.curve(xs, ys, look_of(i), about, data_name=name)]
    if len(xs) < FEW:
        look = f"f{i % COLORS} r{i}"
        for x, y in zip(xs, ys):
            parts.append(dot(axes.x(x), axes.y(y), look))
    return parts


def options_of(runs):
    """The options in which the runs differ, a run a line; the others folded away."""
    names = {}
    for run in runs:
        names |= run.options
    heads, lines = [""], [[run.name] for run in runs]
    common = []
    for name in names:
        texts = [option_text(run.options.get(name, "–")) for run in runs]
        if len(set(texts)) == 1:
            common.append([f"--{name}", texts[0]])
            continue
        heads.append(f"--{name}")
        for cells, text in zip(lines, texts):
            cells.append(text)
    shown = html_table(heads, lines) if len(heads) > 1 else ""
    agree = " in which they agree" if len(runs) > 1 else ""
    summary = tag("summary", f"{len(common)} options{agree}")
    return shown + tag("details", summary, html_table(["option", "value"], common))


def option_text(value):
    """An option's value as a cell: texts as they are, anything else as JSON has it, but with few digits."""
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if type(value) is float else json.dumps(value)


def html_table(heads, rows):
    """A table of texts, which may be hostile."""
    lines = [html_row("th", heads)]
    for row in rows:
        lines.append(html_row("td", row))
    return tag("div", tag("table", *lines), look="scroll")


def html_row(kind, texts):
    """A line of it; kind: th or td."""
    cells = [tag(kind, html.escape(text)) for text in texts]
    return tag("tr", *cells)


def samples_of(run):
    """The first and the last samples of a run, side by side."""
    blocks = []
    for step, text in run.samples.items():
        note = tag("div", html.escape(f"step {step}"), look="note")
        said = tag("pre", html.escape(text))
        blocks.append(tag("div", note, said))
    if not blocks:
        return ""
    title = tag("summary", f"samples of {html.escape(run.name)}")
    return tag("details", title, tag("div", *blocks, look="two"), open="")


# ---------------------------------------------------------------- a table

def numbers_of(rows):
    """The numbers of a table's rows, and its intervals, as HTML."""
    heads = {}          # a dict keeps their order
    for row in rows:
        for name, value in row.items():
            if number_text(value):
                heads[name] = True
    lines = []
    for row in rows:
        numbers = [number_text(row.get(name)) for name in heads]
        lines.append([name_of(row), *numbers])
    return html_table(["", *heads], lines)


def number_text(value):
    """A number or the two ends of an interval as a cell; nothing for anything else."""
    if isinstance(value, list) and len(value) == 2:
        low, high = map(number_text, value)
        return f"[{low}, {high}]" if low and high else ""
    if not is_number(value):
        return ""
    return f"{value:.3f}" if type(value) is float else str(value)


# ---------------------------------------------------------------- what a run's folder says

# Earlier pages, and what `record` puts beside the runs of a seed: they are no runs, and nobody need be told.
BESIDE_RUNS = (".html", ".log", ".run.json")


def collect(paths):
    """(run folders, files of tables, notes of what is neither) of the words of a command line, each once."""
    folders, files, notes = [], [], []
    for path in map(Path, paths):
        inside = runs_in(path)
        if inside:
            folders += inside
        elif path.name == "tables":
            files += sorted(path.glob("*.json"))
        elif path.name.endswith(BESIDE_RUNS):
            continue
        elif path.suffix == ".json":
            files.append(path)
        else:
            notes.append(f"{path} is skipped: there is no run in it")
    for folder in folders:
        files += sorted(folder.parent.glob("tables/*.json"))
    return unique(folders), unique(files), notes


def runs_in(path):
    """The runs that a path stands for: itself, or all in it."""
    if (path / "run.json").exists():
        return [path]
    return sorted(file.parent for file in path.rglob("run.json"))


def unique(paths):
    return list(dict.fromkeys(paths))


class RunFolder:
    """What a run's folder says: options, rows, first and last samples; and notes of what it does not say."""

    def __init__(self, folder):
        self.name = str(folder)
        self.notes = []
        self.options = read_json(folder / "run.json")
        for no_option in ("code", "inputs"):
            self.options.pop(no_option, None)
        self.script = script_of(self.options)
        self.finished = (folder / "summary.json").exists()
        self.rows, bad = read_log(folder)
        log = f"{folder}/metrics.jsonl"
        if bad:
            lines = len(bad) + len(self.rows)
            self.notes.append(f"{log}:{bad[0]}: no row; {len(bad)} of {lines} lines are left out")
        if not self.rows:
            self.notes.append(f"{log}: no step is in it, so there is nothing to draw")
        paths = sorted((folder / "samples").glob("*.txt"))
        if len(paths) > 2:
            paths = [paths[0], paths[-1]]
        self.samples = {}       # {step: text}
        for path in paths:
            step = path.stem.lstrip("0") or "0"     # of 000149.txt
            self.samples[step] = self.read(path).strip()

    def read(self, path):
        """The text of a file, whatever is in it."""
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            self.notes.append(f"{path}: not utf-8; what cannot be read is shown as \ufffd")
            return path.read_text(encoding="utf-8", errors="replace")

    def curve(self, metric):
        """(steps, values) of a metric, where it is a number; of more than MOST the means of neighbours."""
        rows = [row for row in self.rows if is_number(row.get(metric))]
        size = max(1, math.ceil(len(rows) / MOST))
        steps, values = [], []
        for i in range(0, len(rows), size):
            near = rows[i:i + size]
            steps.append(mean(each(near, "step")))
            values.append(mean(each(near, metric)))
        return steps, values


MOST = 160      # points of a curve: two pixels each


# ---------------------------------------------------------------- by which script a run was made

CLASS = re.compile(r"class (\w+)(?:\((\w+)\.Config\))?")     # Config(ppo.Config) has all of ppo.py's options
OPTION = re.compile(r"    (\w+): .*?  # ")      # every option has a comment


@functools.cache
def option_names():
    """{"ppo.py": the options of its own, "reward.py label": ...}, by the text of all scripts: none is run for it."""
    found = {}
    for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("configs/*.py"))]:
        names = set()       # of the class in which we are
        for text in path.read_text(encoding="utf-8").splitlines():
            begins, option = CLASS.match(text), OPTION.match(text)
            if begins:
                name, parent = begins.groups()
                script = path.name if name == "Config" else f"{path.name} {name.lower()}"
                names = set(found.get(f"{parent}.py", ()))
                found[script] = names
            elif option:
                names.add(option[1])
            elif text and text[0] not in " #":
                names = set()       # the class is over
    shared = found["data.py runconfig"] | found["data.py trainconfig"]
    own = {}
    for script, names in found.items():
        if names - shared:
            own[script] = names - shared
    return own


def script_of(options):
    """The script whose options these are most likely: run.json does not say it."""
    def likeness(script):
        own = option_names()[script]
        both, either = own & options.keys(), own | options.keys()
        return len(both) / len(either)
    return max(option_names(), key=likeness)


# ---------------------------------------------------------------- what a metric means

@functools.cache
def glossary():
    """[(scripts, none for every one, pattern of the name, its Metric)], those first that say a name most exactly."""
    found = []
    for section, metrics in GLOSSARY.items():
        for metric in metrics:
            scripts = re.findall(r"\w+\.py", metric.names) or SCRIPTS[section]
            for name in re.findall(r"`([^`]+)`", metric.names):
                found.append((scripts, pattern_of(name), metric))
    return sorted(found, key=vagueness)


def pattern_of(name):
    """The regular expression of the metrics that a name stands for: in it NAME, K, a|b and * are anything."""
    parts = re.split(r"NAME|\bK\b|a\|b|\*", name)
    return ".+".join(map(re.escape, parts))


def vagueness(entry):
    """A name is exact, of patterns the longest is."""
    _, pattern, _ = entry
    return ".+" in pattern, -len(pattern)


def meaning(script, metric):
    """What the glossary says of a metric of a script, as HTML; nothing if it does not know it."""
    file, *_ = script.split()       # of reward.py label
    for scripts, pattern, found in glossary():
        if (file in scripts or not scripts) and re.fullmatch(pattern, metric):
            return explained(found)
    held_out = metric.startswith("val_") and meaning(script, metric.removeprefix("val_"))
    return f"On what is held out: {held_out}" if held_out else ""


def explained(metric):
    """What a Metric says, as HTML."""
    said = ""
    for title, text in [("", metric.what), (" <b>Healthy:</b> ", metric.healthy), (" <b>If not:</b> ", metric.if_not)]:
        if text:
            code = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
            said += f"{title}{code}."
    return said
