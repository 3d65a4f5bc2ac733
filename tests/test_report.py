"""configs/report.py and its parts: what recipes leave is gathered as it is, printed as it is, drawn where it is."""
import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import data
import dpo
import grpo
import nemotron4
import orpo
import ppo
import quark
import qwen2
import reward
import sft
from configs import cells, charts, figures, page, record, report, tables

STAGE = '''
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, seed = options["--out"], int(options["--seed"])
if os.path.exists(f"broken{seed}"):
    sys.exit("error: seed is broken")
os.makedirs(out, exist_ok=True)
if not os.path.exists(out + "/summary.json"):
    for name in ("metrics.jsonl", "summary.json"):
        with open(f"{out}/{name}", "w") as f:
            json.dump({"step": 0, "gold": seed, "seconds": 1000 + seed, "val_r2/0": seed}, f)
tables = os.environ["OUT"] + "/tables"
os.makedirs(tables, exist_ok=True)
row = dict(checkpoint=out, arith=seed / 8, interval=[0, 1 / 3], answers=[dict(text="no number")])
ensemble = dict(name="{0}/a|{0}/b".format(os.environ["OUT"]), data=os.environ["OUT"] + "/pairs.jsonl", right=1)
row["threads"] = options.get("--threads", "")
for name in ("tiny", "tiny.part", "tinyother"):
    with open(f"{tables}/{name}.json", "w") as f:
        json.dump(dict(rows=[row, ensemble, dict(name="best of n", curves=dict(d=[0.5, None]))]), f)
'''
RECIPE = 'set -e\npython stage.py --out $OUT/base "$@"\npython stage.py --out $OUT/tiny/a "$@"\n'


def run(*argv, monkeypatch):
    """What `python configs/report.py ARGV` exits with, 0 if it does not."""
    monkeypatch.setattr(sys, "argv", ["configs/report.py", *map(str, argv)])
    try:
        data.guard(report.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A place with one recipe, whose stages take a moment and claim a thousand seconds."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "configs/tiny.sh").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for module in (record, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "READMES", [tmp_path / "README.md"])
    monkeypatch.setattr(record, "CURVES", {"tiny": {"base": ["gold", "unlogged"]}})
    monkeypatch.setattr(record, "LOGS", {"tiny": {"base": (0, 7)}})
    return tmp_path


def results(house, name="tiny"):
    return json.loads((house / f"results/{name}.json").read_text())


# ---------------------------------------------------------------- record

def test_a_recipe_is_run_once_a_seed_and_its_numbers_are_gathered(house, monkeypatch):
    assert run("record", "tiny", "--seeds", "1,3", "--jobs", 2, monkeypatch=monkeypatch) == 0
    got = results(house)
    assert got["recipe"] == "tiny" and got["seeds"] == [1, 3] and got["commit"] == "unknown"
    assert "1 thread" in got["machine"] and got["torch"][0].isdigit()
    assert got["tables"] == {
        "tiny": {"tiny/a": {"arith": [0.125, 0.375], "interval": [[0, 0.333333]] * 2},
                 "a|b on pairs.jsonl": {"right": [1, 1]}, "best of n": {"curves": [{"d": [0.5, None]}] * 2}},
        "tiny.part": got["tables"]["tiny"],
        "tiny.curves": {"base": {"gold": [[1], [3]]}},
        "tiny.log": {"base 0": {"step": [0, 0], "gold": [1, 3], "seconds": [1001, 1003], "val_r2/0": [1, 3]}},
        "tiny.stages": dict.fromkeys(["base", "tiny/a"], {"seconds": [1001, 1003], "val_r2/0": [1, 3]})}, "names without OUT, numbers of both seeds, no texts"
    with open(house / "out/seed1/tables/tiny.json") as f:
        assert "1" == json.load(f)["rows"][0]["threads"], "two runs at a time have one thread each"


def test_a_results_file_can_have_a_name_of_its_own(house, monkeypatch):
    """As that of another machine; its tables are then called so, too."""
    assert run("record", "tiny", "--seeds", 0, "--name", "tiny_there", monkeypatch=monkeypatch) == 0
    got = results(house, "tiny_there")
    assert got["recipe"] == "tiny" and not (house / "results/tiny.json").exists()
    assert got["tables"].keys() == {f"tiny_there{part}" for part in ("", ".part", ".curves", ".log", ".stages")}


def test_seconds_are_those_from_nothing_and_stay_when_gathered_again(house, monkeypatch):
    run("record", "tiny", "--seeds", 0, monkeypatch=monkeypatch)
    first = results(house)["seconds"]
    assert first[0] < 1000, "nothing was there before"
    run("record", "tiny", "--seeds", "0,1", monkeypatch=monkeypatch)
    assert results(house)["seconds"][0] == first[0], "a finished seed is not run again"
    (house / "out/seed1/tiny.run.json").unlink()
    run("record", "tiny", "--seeds", "0,1", monkeypatch=monkeypatch)
    assert 2002 <= results(house)["seconds"][1] < 3000, "of stages that are skipped, what they took when they ran"


def test_a_seed_that_fails_is_named_and_nothing_is_written(house, monkeypatch, capsys):
    (house / "broken1").touch()
    assert run("record", "tiny", "--seeds", "0,1", monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().err
    assert "seed 1 failed: error: seed is broken" in said and "out/seed1/tiny.log" in said
    assert not (house / "results").exists() and (house / "out/seed0/tiny.run.json").exists()
    (house / "broken1").unlink()
    assert run("record", "tiny", "--seeds", "0,1", monkeypatch=monkeypatch) == 0


@pytest.mark.parametrize("change, word", [
    (lambda rows: rows.append(rows[0]), "two rows"), (lambda rows: rows.pop(), "best of n"),
    (lambda rows: rows.append(3), "no table")])
def test_tables_that_do_not_fit_together_are_refused(change, word, house, monkeypatch, capsys):
    run("record", "tiny", "--seeds", "0,1", monkeypatch=monkeypatch)
    path = house / "out/seed1/tables/tiny.json"
    table = json.loads(path.read_text())
    change(table["rows"])
    path.write_text(json.dumps(table))
    capsys.readouterr()
    assert run("record", "tiny", "--seeds", "0,1", monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert word in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("argv, code, word", [
    ([], 2, "record|tables|figures|page"), (["recrod"], 2, "recrod"), (["record"], 2, "recipe"),
    (["record", "tyni"], 2, "tiny"), (["record", "tiny", "--seeds", "0,0"], 2, "--seeds"),
    (["record", "tiny", "--seeds", "zero"], 2, "--seeds"), (["record", "tiny", "--jobs", "0"], 2, "--jobs"),
    (["tables", "--chek"], 2, "--check"), (["page", "configs"], 1, "no run")])
def test_a_mistake_is_one_line(argv, code, word, house, monkeypatch, capsys):
    assert run(*argv, monkeypatch=monkeypatch) == code
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and word in error


# ---------------------------------------------------------------- cells and tables

@pytest.mark.parametrize("df", [1, 2, 4, 9, 20])
def test_the_quantiles_of_t_leave_a_fortieth_above(df):
    """∫ of Student's density from 0 to the quantile is .475, by the trapezoidal rule."""
    norm = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    step, area = cells.T[df - 1] / 20000, 0.0
    for i in range(20000):
        x = (i + 0.5) * step
        area += step * norm * (1 + x * x / df) ** (-(df + 1) / 2)
    assert area == pytest.approx(0.475, abs=2e-5)


def test_intervals_by_hand():
    """Of 1, 2, 4: mean 7/3, sd √(7/3), t 4.303."""
    half = 4.303 * math.sqrt(7 / 3)
    for new, share in ((True, math.sqrt(4 / 3)), (False, math.sqrt(1 / 3))):
        assert cells.interval([1, 2, 4], new) == pytest.approx((7 / 3 - half * share, 7 / 3 + half * share))
    assert cells.interval([5]) == (5, 5)


@pytest.mark.parametrize("column, values, text", [
    ("write", [0.5, 1.0, 1.5], "1.00 ± .50"), ("write", [-0.001, -0.001], ".00"), ("write", [2.0], "2.00"),
    ("+write sd", [0.1, 0.3], "+.20 ± .14"), ("write seeds", [-0.25, 1.5], "-.25 / 1.50"),
    ("kl mean 1", [0.1, 0.2], ".2"),
    ("length mean 0", [23.4, 24.4], "24"), ("write new", [0.0, 1.0, 2.0], "1.00 [-3.97, 5.97]"),
    ("write sure", [0.0, 1.0, 2.0], "1.00 [-1.48, 3.48]"), ("win new", [0.3, 0.5, 0.7], ".50 [.00, 1.00]"),
    ("kl mean g", [0.000123, 0.000125], ".000124"), ("kl first g", [-12.914, 0], "-12.9"),
    ("write sd", [0.5, None], "–")])
def test_cells_by_hand(column, values, text):
    assert cells.Cell(column)(values) == text


PAGE = "Before.\n\n<!-- table mine, made by configs/report.py -->\nold\n<!-- end -->\n\nAfter.\n"
TABLE = """Before.

<!-- table mine, made by configs/report.py -->
|  | learns from | sums | gain |
|---|---|---|---|
| SFT | people | .30 ± .14 | .00 |
| DPO | pairs | .60 | +.30 ± .14 |

Seeds 4, 5; a CPU, fp32; commit abc+; 15 s a seed. `a ± b`: mean and standard deviation.
<!-- end -->

After.
"""
ROWS = {"sft": "SFT | people", "out/dpo": "DPO | pairs"}


@pytest.fixture
def printed(house, monkeypatch):
    """A page with one table, and the results that it is made of."""
    content = dict(recipe="mine", commit="abc+", machine="a CPU, fp32", seeds=[4, 5], seconds=[10.0, 20.0])
    content["tables"] = {"mine": {"sft": {"arith": [0.2, 0.4]}, "out/dpo": {"arith": [0.6, 0.6]}}}
    data.write_text(house / "results/mine.json", json.dumps(content))
    (house / "README.md").write_text(PAGE)
    mine = tables.Table("mine", {"sums": "arith", "gain": "+arith"}, ROWS, " | learns from")
    monkeypatch.setattr(report, "TABLES", {"mine": mine})
    return house


def test_a_table_is_made_from_the_results_and_checked(printed, monkeypatch, capsys):
    assert run("tables", "--check", monkeypatch=monkeypatch) == 1
    assert "table mine differs" in capsys.readouterr().out and (printed / "README.md").read_text() == PAGE
    assert run("tables", monkeypatch=monkeypatch) == 0
    assert (printed / "README.md").read_text() == TABLE
    assert run("tables", "--check", monkeypatch=monkeypatch) == 0
    (printed / "README.md").write_text(TABLE.replace(".60", ".61"))
    assert run("tables", "--check", monkeypatch=monkeypatch) == 1


@pytest.mark.parametrize("page, table, word", [
    (PAGE.replace("<!-- end -->", ""), {}, "<!-- end -->"), (PAGE + "<!-- end -->\n", {}, "<!-- end -->"),
    (PAGE.replace("<!-- end -->", "<!-- table mine -->\n<!-- end -->"), {}, "<!-- table NAME -->"),
    (PAGE.replace("mine", "yours"), {}, "yours"), (PAGE, dict(source="theirs"), "record theirs"),
    (PAGE, dict(source="mine.part"), "mine.part"), (PAGE, dict(rows={"ppo": "PPO"}), "ppo"),
    (PAGE, dict(columns={"KL": "kl"}), "kl"), (PAGE, dict(columns={"sums": "arith often"}), "often")])
def test_a_table_that_cannot_be_made_is_an_error(page, table, word, printed, monkeypatch, capsys):
    (printed / "README.md").write_text(page)
    monkeypatch.setitem(report.TABLES, "mine", dataclasses.replace(report.TABLES["mine"], **table))
    assert run("tables", "--check", monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert word in error and error.count("error:") == 1
    assert (printed / "README.md").read_text() == page


@pytest.mark.parametrize("page", report.READMES, ids=lambda page: page.parent.name)
def test_what_the_readmes_print_is_what_is_in_the_results(page):
    _, _, changed = report.rewrite(page)
    assert not changed, f"python configs/report.py tables makes {', '.join(changed)} anew"


@pytest.mark.parametrize("path", report.RESULTS.glob("compare_*.json"), ids=lambda path: path.stem)
def test_another_machine_is_like_another_seed(path):
    """Of the numbers of compare.sh there, 95 of 100 are to lie where a new seed falls; here at least 90 have to."""
    here, there = record.rows_from("compare"), record.rows_from(path.stem)
    inside = []
    for row, metrics in there.items():
        for cell in tables.ALL.values():
            metric = cells.Cell(cell).metric
            low, high = cells.interval(here[row][metric])
            inside += [low <= value <= high for value in metrics[metric]]
    assert len(inside) > 50 and sum(inside) >= .9 * len(inside)


def test_the_figures_show_what_is_in_the_results():
    for path in report.RESULTS.glob("*.svg"):
        assert path.read_text() == report.FIGURES[path.stem](), f"python configs/report.py figures makes {path} anew"


# ---------------------------------------------------------------- figures

@pytest.mark.parametrize("low, high", [(0, 1), (-0.31, 1.27), (3, 3.0004), (0, 699), (-2e-5, 9e-5), (-1234, 98765)])
def test_ticks_are_round_and_inside(low, high):
    marks = charts.ticks(low, high)
    assert 2 <= len(marks) <= 7 and low <= marks[0] and marks[-1] <= high
    step = marks[1] - marks[0]
    digits = f"{step:.0e}"
    assert digits[0] in "125" and float(digits) == pytest.approx(step)
    assert marks[0] - step < low and high < marks[-1] + step, "no tick is missing"


def test_axes_by_hand():
    axes = charts.Axes(10, 20, 100, 50, (0, 4), (-1, 1))
    assert (axes.x(1), axes.y(1), axes.y(-1), axes.y(0)) == (35, 20, 70, 45)
    assert charts.Axes(0, 0, 80, 1, (1, 16), (0, 1), x_log=True).x(4) == pytest.approx(40)


@pytest.fixture
def drawn(house):
    """Results of two seeds for every figure."""
    both = [0.5, 0.7]
    compare = {"sft": dict(write=both, greedy=both), "dpo": dict(write=[1.5, 1.2], greedy=[0.25, 1.0])}
    steps = {"grpo": dict(gold=[[0.1, 0.5], [0.2, 0.7]], response_length=[[9, 20], [9, 25]])}
    fit = {form: dict(alpha=1.0, beta=0.5) for form in figures.FORMS}
    curve = dict(d=[[0.0, 1.0]] * 2, gold=[[0.0, 0.5]] * 2, proxy=[[0.0, 2.0]] * 2, fits=[fit] * 2)
    samples = {f"{kind}@{k}": [k / 4, k / 5] for kind in ("pass", "maj") for k in (1, 2, 4)}
    method = {"gold@kl0.25": [0.0, 0.2], "gold@kl0.5": [0.5, 0.5], "gold@kl1": [1.0, 0.8], "gold@kl4": [0.5, None], "gold@0.5T": both, "gold@1T": both,
              "greedy@kl0.25": both, "greedy@kl1": both, "greedy@0.5T": both, "greedy@1T": both}
    found = dict(compare={"compare": compare, "compare.curves": steps}, o1={"o1": {"sft": samples}},
                 reward_hacking={"reward_hacking.curves": {"best of n": curve}},
                 when={"when": dict.fromkeys(tables.METHODS, method)})
    for name, found in found.items():
        data.write_text(house / f"results/{name}.json", json.dumps(dict(tables=found)))
    return house


def test_every_figure_is_drawn_and_checked(drawn, monkeypatch, capsys):
    assert run("figures", monkeypatch=monkeypatch) == 0
    for name in report.FIGURES:
        text = (drawn / f"results/{name}.svg").read_text()
        ElementTree.fromstring(text)
        assert "prefers-color-scheme:dark" in text and "<script" not in text
    assert run("figures", "--check", monkeypatch=monkeypatch) == 0
    (drawn / "results/o1.json").unlink()
    assert run("figures", "--check", monkeypatch=monkeypatch) == 0
    assert "scaling.svg is not drawn" in capsys.readouterr().err
    (drawn / "results/gains.svg").write_text("old")
    assert run("figures", "--check", monkeypatch=monkeypatch) == 1


def test_curves_of_methods_are_over_root_kl_and_end_where_a_seed_has_no_more(drawn):
    """Of DPO the thick line goes through the means at KL .25 and 1; at 4 one seed has none."""
    first = ElementTree.fromstring(figures.when()).findall(".//{*}polyline[@class='c0']")[0]
    (x1, y1), (middle, _), (x2, y2) = [map(float, point.split(",")) for point in first.get("points").split()]
    assert (x1, x2) == (48, 48 + 240), "between the ends of the axis, √.25 and √1"
    assert middle == pytest.approx(48 + 240 * (math.sqrt(.5) - .5) / .5, abs=.1), "the axis is √KL"
    low, high = charts.span([0, 0.2, 1, 0.8])
    for y, value in ((y1, 0.1), (y2, 0.9)):
        assert y == pytest.approx(60 + 190 * (high - value) / (high - low), abs=.1)


def test_a_dot_stands_where_the_gain_of_its_seed_is(drawn):
    """Gains of DPO: 1.0 and .5 sampled, -.25 and .3 greedy; two ticks tell the scale."""
    svg = ElementTree.fromstring(figures.gains())
    at = {}
    for text in svg.iter("{http://www.w3.org/2000/svg}text"):
        if re.fullmatch(r"-?[\d.]+", text.text):
            at[float(text.text)] = float(text.get("x"))
    last = max(at)
    unit = (at[last] - at[0]) / last
    dots = [float(dot.get("cx")) for dot in svg.iter("{http://www.w3.org/2000/svg}circle")]
    gains = [(x - at[0]) / unit for x in dots]
    assert gains == pytest.approx([1.0, 0.5, -0.25, 0.3], abs=0.01)


def test_the_fitted_form_is_drawn_through_its_values():
    """.2 + d (1 - .5 d) at the right end, d = 2, is .2, and .7 at its peak, d = 1."""
    axes = charts.Axes(0, 0, 200, 100, (0, 2), (0, 1))
    fit = figures.fitted(axes, [dict(alpha=0.5, beta=0.25), dict(alpha=1.5, beta=0.75)], "d (α - β d)", 0.2, "c2")
    points = re.search('points="(.*?)"', fit)[1].split()
    assert "100,30" in points and points[-1] == "200,80"


# ---------------------------------------------------------------- the page

EVIL = "</pre><script>alert('x')</script><img src=http://evil onerror=alert(1)>"
QUOTED = 'out/b" onerror="x'     # a folder


def make_run(folder, rows, **options):
    """A run's folder; its samples are hostile."""
    options = dataclasses.asdict(ppo.Config()) | options | dict(code="c", inputs={})
    data.write_text(folder / "run.json", json.dumps(options))
    text = "".join(json.dumps(dict(step=step, seconds=step) | row) + "\n" for step, row in enumerate(rows))
    data.write_text(folder / "metrics.jsonl", text)
    data.write_text(folder / "samples/000001.txt", f"early {EVIL}")
    data.write_text(folder / "samples/000005.txt", "between")
    data.write_text(folder / "samples/000010.txt", f"late {EVIL}")


class Seen(HTMLParser):
    """What a browser sees of a page: its elements, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "out/a", [{"kl": 0.5, EVIL: 1.0}, {"kl": math.nan}, {"kl": 1.5}], lr=1e-3)
    make_run(tmp_path / QUOTED, [{"kl": 0.5}] * 500, lr=2e-3, reward=EVIL)
    with open(tmp_path / "out/a/metrics.jsonl", "a") as f:
        f.write('{"step": "one"}\n[' * 3)
    (tmp_path / "out/empty").mkdir()
    rows = [dict(checkpoint=f"out/{EVIL}", arith=0.625, interval=[0.25, 0.75], answers=[EVIL])]
    data.write_text(tmp_path / "out/tables/compare.json", json.dumps(dict(rows=rows)))
    return tmp_path


def test_a_page_has_everything_and_runs_nothing_of_theirs(runs, monkeypatch, capsys):
    assert run("out/a", QUOTED, "out/empty", monkeypatch=monkeypatch) == 0     # `page` left out
    said = capsys.readouterr().err
    assert "out/empty is skipped" in said and "out/a/metrics.jsonl:4: no row; 4 of 7 lines" in said
    seen = Seen((runs / "out/report.html").read_text())
    names = [tag for tag, _ in seen.tags]
    assert names.count("script") == 1 and "img" not in names
    for _, own in seen.tags:
        assert not own.keys() & {"src", "onerror"} and "http" not in own.get("href", "")
    text = " ".join(seen.texts)
    assert f"early {EVIL}" in text and f"late {EVIL}" in text and "between" not in text, "samples early and late"
    wanted = {"ppo.py", "--lr", "0.001", "0.002", "0.625", "[0.250, 0.750]", "kl", EVIL}
    assert wanted <= set(map(str.strip, seen.texts))
    assert "grows to a few nats" in text, "what a metric means is said under it"
    curves = [own for tag, own in seen.tags if tag == "polyline"]
    lengths = {own["data-name"]: len(own["points"].split()) for own in curves if own["class"].startswith("c")}
    assert lengths[QUOTED] <= 160, "a long run is thinned"
    assert [len(own["points"].split()) for own in curves if own["data-name"] == "out/a"][0] == 2, "NaN is no point"


def test_options_are_listed_where_the_runs_differ(runs):
    found = [page.RunFolder(runs / name) for name in ("out/a", QUOTED)]
    differ, _, common = page.options_of(found).partition("<details>")
    assert set(re.findall(r"<th>--(\w+)", differ)) == {"lr", "reward"} and "--gamma" in common
    _, *lines = differ.split("</tr>")
    assert "<td>0.001</td>" in lines[0] and "<td>0.002</td>" in lines[1], "a run a line"


def test_a_folder_stands_for_the_runs_in_it(runs):
    folders, files, notes = page.collect(["out", "out/a", "out/tables/compare.json"])
    assert folders == [Path("out/a"), Path(QUOTED)] and files == [Path("out/tables/compare.json")] and not notes


def test_what_record_puts_beside_the_runs_is_no_news(runs):
    for name in ("compare.log", "compare.run.json", "report.html"):
        (runs / "out" / name).write_text("{}")
    folders, files, notes = page.collect(sorted(map(str, Path("out").iterdir())))
    assert len(folders) == 2 and files == [Path("out/tables/compare.json")]
    assert notes == ["out/empty is skipped: there is no run in it"]


@pytest.mark.parametrize("file, content, word", [
    ("metrics.jsonl", b"", "no step is in it"),
    ("metrics.jsonl", b'{"step": 0}\n\xff', "metrics.jsonl:2: no row; 1 of 2"),
    ("metrics.jsonl", b'{"step": 0, "x": %s, "y": 1e308}\n{"step": 1, "y": -1e308}' % (b"9" * 400), ""),
    ("metrics.jsonl", b'{"step": 0, "\\ud800": 1}', ""), ("run.json", b"{", "skipped: out/a/run.json: no JSON"),
    ("run.json", b"[]", "skipped: out/a/run.json: not a JSON object"),
    ("samples/000001.txt", b"\xfe", "000001.txt: not utf-8"), ("samples/000000.txt", None, "skipped: [Errno")])
def test_a_damaged_run_is_one_line_and_the_others_are_shown(file, content, word, runs, monkeypatch, capsys):
    make_run(runs / "out/a", [{"kl": 0.5}])
    if content is None:
        (runs / "out/a" / file).mkdir()
    else:
        (runs / "out/a" / file).write_bytes(content)
    assert run("page", "out/a", QUOTED, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(word) and word in "".join(said)
    text = (runs / "out/report.html").read_text()
    assert "0.002" in text and page.html.escape(word) in text


@pytest.mark.parametrize("script, name", [
    (sft.Config, "sft.py"), (reward.Train, "reward.py train"), (reward.Label, "reward.py label"),
    (ppo.Config, "ppo.py"), (grpo.Config, "grpo.py"), (dpo.Config, "dpo.py"), (orpo.Config, "orpo.py"),
    (nemotron4.Config, "nemotron4.py"), (qwen2.Config, "qwen2.py"), (quark.Config, "quark.py")])
def test_a_run_is_known_by_its_options(script, name):
    assert page.script_of({option.name: 0 for option in dataclasses.fields(script)}) == name


@pytest.mark.parametrize("script, metric, word", [
    ("ppo.py", "kl", "over a response"), ("quark.py", "kl", "quality token"), ("dpo.py", "kl", "held-out prompts"),
    ("grpo.py", "reward/out/a", "each term"), ("grpo.py", "reward/out/a|out/b spread", "standard deviation"),
    ("reward.py train", "val_r2/3", "attribute"), ("orpo.py", "rewards/margin", "log-prob of a token"),
    ("dpo.py", "val_rewards/margin", "On what is held out"), ("sft.py", "nothing", "")])
def test_what_a_metric_means_is_that_of_its_script(script, metric, word):
    said = page.meaning(script, metric)
    assert word in said and bool(word) == bool(said)
