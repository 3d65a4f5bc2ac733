"""The page of runs: one HTML file that shows what any runs have left, beside each other.

First the tables of numbers. Then the runs of each script: who they are, the options in which they differ, every metric
as a chart with what configs/README.md says of it, the first and the last samples. What is read may be hostile: all of
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
from configs.record import READMES, ROOT, each, is_number, name_of, read_log, table_rows
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
            notes.append(f"{folder}/metrics.jsonl: {len(run.bad)} lines are no rows and left out, as line {run.bad[0]}")
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


# ---------------------------------------------------------------- the runs of a script

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


# ---------------------------------------------------------------- a table

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


# ---------------------------------------------------------------- what a run's folder says

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


# ---------------------------------------------------------------- what a metric means

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
