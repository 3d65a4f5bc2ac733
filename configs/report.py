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

In a README the lines <!-- table NAME --> and <!-- end --> enclose a printed table; tables.py says what it shows. Those of
metrics, glossary.NAME, are in glossary.py.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.cells import HOW, Cell, values_of
from configs.figures import FIGURES
from configs.glossary import GLOSSARY
from configs.page import Page, page
from configs.record import READMES, RESULTS, Record, last_part, record, results_of, rows_from
from configs.tables import TABLES
from data import OptionError, Options, UserError, guard, parse, tell, write_text


# ---------------------------------------------------------------- figures

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


# ---------------------------------------------------------------- tables

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
        kind, _, section = name.partition(".")
        if name in TABLES:
            now = printed_table(TABLES[name])
        elif kind == "glossary" and section in GLOSSARY:
            now = glossary_table(GLOSSARY[section])
        else:
            raise UserError(f"{readme}: configs/tables.py has no table {name}; add it to TABLES")
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


def glossary_table(metrics):
    """A section of the glossary in Markdown."""
    heads = ["metric", "what it is", "healthy", "if not"]
    lines = [markdown(heads), "|" + "---|" * len(heads)]
    for metric in metrics:
        texts = [metric.names, metric.what, metric.healthy, metric.if_not]
        lines.append(markdown(text.replace("|", r"\|") for text in texts))
    return "\n".join([*lines, ""])


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
