"""DPO, PPO and GRPO at equal KL and at equal compute: curves through finished runs of growing length, and two tables.

    python configs/when.py out/when/best/dpo out/when/best/ppo --table out/when/test.json

A method's folder holds its runs, each as long as its name says. What they score comes from one table of `reward.py
compare`: the same test prompts for all. KL and compute are read off between two runs:

* At a KL. Rewards are nearly a line in d = √KL, and both of Gao's forms are functions of it (2210.10760), so the line
  between two runs is drawn in d. Where noise makes KL fall on the way, the first crossing counts: where a training with
  one eye on the KL would have stopped.
* At a number of FLOPs. A longer run is no continuation of a shorter one, since its rate falls later. So a point says
  what a budget buys. The line is drawn in FLOPs, from the SFT model, which costs nothing.

Beyond the last run there is no number: nothing is extrapolated.

FLOPs are by formula: 2 a weight and token forward, three times that in training, and attention. Padding, evaluations and
optimizers do not count. What was there before, the pairs and the reward model, is told apart.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.pick import rows_of
from data import OptionError, Run, RunConfig, UserError, files, guard, mean, parse, read_records, read_rows, write_text
from reward import print_table


@dataclass
class Config(RunConfig):
    """Tables at equal KL and at equal compute, from runs of growing length."""
    out: str = "out/when/curves"  # folder of the tables
    table: str = "out/when/test.json"  # what reward.py compare --save says of the runs; its first row is the start
    best_of: str = ""           # a table of compare --samples: best-of-n as one more curve over KL
    data: str = "out/pairs/pairs.jsonl"  # the pairs that all learned from
    kl: str = "0.25,0.5,1,2,4"  # nats at which rewards are told
    tflops: str = "0.25,0.5,1,2,4"  # 10¹² FLOPs at which they are told
    save: str = ""              # a JSON file for the curves and tables, as tables/when.json


# ---------------------------------------------------------------- FLOPs
# shape: config.json of the model. p, n: tokens of a prompt and of an answer, on average; numbers, not whole ones.

def forward_flops(shape, p, n, head, read):
    """One forward pass of a prompt with its answer: 2 a weight and token, and for attention 4 C a layer, token and token
    before it, which are half of the row on average. head: tokens that need logits; read: those whose last state is used,
    and the last layer's MLP runs for these only."""
    C, layers, T = shape["n_embd"], shape["n_layer"], p + n
    weights = T * (12 * layers - 8) * C ** 2 + read * 8 * C ** 2 + head * shape["vocab_size"] * C
    attention = T * 4 * layers * C * T / 2
    return 2 * weights + attention


def passes(shape, p, n):
    """FLOPs of a forward pass that gives log-probs of the answer, a value of each of its tokens, or one score."""
    return SimpleNamespace(logps=forward_flops(shape, p, n, head=n, read=n),
                           values=forward_flops(shape, p, n, head=0, read=n),
                           score=forward_flops(shape, p, n, head=0, read=1))


TRAIN = 3   # a forward and a backward pass, in forward passes


def dpo_step(options, row, shape, pairs):
    """Both answers of a pair are read by the reference, once, and trained on."""
    one = passes(shape, pairs.p, pairs.n)
    return options["batch"] * 2 * (1 + TRAIN) * one.logps


def online_dpo_step(options, row, shape, pairs):
    """k answers to each prompt are sampled and scored; best and worst make a pair."""
    one = passes(shape, pairs.p, pairs.n)  # no length is logged; the policy begins as who wrote the pairs
    sampled = options["batch"] * options["k"] * (one.logps + one.score)
    return sampled + row["items"] * 2 * (1 + TRAIN) * one.logps


def ppo_step(options, row, shape, pairs):
    """Sampled, read by policy and reference, scored, valued; then each epoch trains policy and critic."""
    one = passes(shape, pairs.p, row["response_length"])
    read = 3 * one.logps + one.score + one.values
    return options["prompts"] * (read + options["epochs"] * TRAIN * (one.logps + one.values))


def grpo_step(options, row, shape, pairs):
    """Sampled, scored, trained on where the group's rewards differ; the reference only reads if there is a KL penalty."""
    one = passes(shape, pairs.p, row["response_length"])
    extra = bool(options["kl_coef"]) + (options["epochs"] * options["minibatches"] > 1)
    drawn = row["groups"] * options["group"] * (one.logps + one.score)
    kept = options["prompts"] * options["group"]
    return drawn + kept * (extra + options["epochs"] * TRAIN * (1 - row["zero_std"])) * one.logps


def step_cost(options):
    """The function for the trainer that a run's options are of."""
    if "group" in options:
        return grpo_step
    if "value_clip" in options:
        return ppo_step
    return online_dpo_step if options.get("online") else dpo_step


def run_flops(folder, shape, pairs):
    """FLOPs of all steps of a finished run, from its run.json and metrics.jsonl."""
    options = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    cost = step_cost(options)
    rows = [row for _, row in read_rows(folder / "metrics.jsonl")]
    return sum(cost(options, row, shape, pairs) for row in rows)


def lengths(records, tok):
    """Tokens of a prompt and of an answer of pairs, on average, with how many answers there are."""
    prompts, answers = [], []
    for record in records:
        for text in record["responses"]:
            prompts.append(len(tok.prompt(record["prompt"])))
            answers.append(len(tok.response(text)))
    return SimpleNamespace(p=mean(prompts), n=mean(answers), answers=len(answers))


# ---------------------------------------------------------------- curves

def read_off(xs, ys, x):
    """y at x on the line through the points in their order, where it first reaches x; None if it never does."""
    for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:]):
        if x0 <= x <= x1:
            share = (x - x0) / (x1 - x0) if x1 > x0 else 0.0
            return y0 + share * (y1 - y0)
    return None


def distance(kl):
    """d = √KL; an estimate of the KL may be below 0."""
    return math.sqrt(max(0.0, kl))


REWARDS = {"gold": "write", "greedy": "greedy", "proxy": "proxy"}   # our name, and that of compare


def curve_of(folder, table, shape, pairs):
    """The curve of a method, from the start on: steps, kl, gold, greedy, proxy and flops, a list each."""
    runs = sorted((int(path.name), path) for path in Path(folder).iterdir() if path.name.isdigit())
    start, by_name = table[0], {row["checkpoint"]: row for row in table}
    curve = dict(steps=[0], kl=[0.0], flops=[0.0])
    curve |= {ours: [start[theirs]] for ours, theirs in REWARDS.items()}
    for steps, path in runs:
        row = by_name.get(str(path))
        if row is None:
            raise UserError(f"{path}: --table has no row of it; reward.py compare ... --save makes one")
        curve["steps"].append(steps)
        curve["kl"].append(row["kl"])
        curve["flops"].append(run_flops(path, shape, pairs))
        for ours, theirs in REWARDS.items():
            curve[ours].append(row[theirs])
    if not runs:
        raise UserError(f"{folder}: no run in it whose name is a number of steps")
    return curve


def best_of_n(row):
    """Best-of-n as a curve over KL, log n - (n - 1) / n, from a row that has best@1, best@2, ... It trains nothing and
    pays at each answer, so it has no FLOPs to compare."""
    ns = sorted(int(key.removeprefix("best@")) for key in row if key.startswith("best@"))
    kl = [math.log(n) - (n - 1) / n for n in ns]
    return dict(n=ns, kl=kl, gold=[row[f"best@{n}"] for n in ns])


def grid(text, name):
    """'0.5,1' as numbers."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise OptionError(f"--{name} {text}: numbers with commas between them") from None


def told(curve, kls, tflops):
    """{name@place: number} of a curve: its rewards at each KL, and gold and greedy at each number of FLOPs, those that it
    reaches."""
    out, d = {}, [distance(kl) for kl in curve["kl"]]
    for name in curve.keys() & REWARDS.keys():
        for kl in kls:
            out[f"{name}@kl{kl:g}"] = read_off(d, curve[name], distance(kl))
        for amount in tflops if "flops" in curve and name != "proxy" else ():
            out[f"{name}@{amount:g}T"] = read_off(curve["flops"], curve[name], amount * 1e12)
    return {key: value for key, value in out.items() if value is not None}


def show(rows, keys, title):
    """One table: a row a method, – where its curve does not reach."""
    print(f"\n{title}")
    names, cells = [row["name"] for row in rows], []
    for row in rows:
        cells.append({key: f"{row[key]:.2f}" if key in row else "–" for key in keys})
    print_table(names, cells, [(f"{key.partition('@')[2]:>8}", key, "") for key in keys])


def when(cfg, folders):
    """Make the curves, read them off, print two tables for each reward, and save all of it."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    kls, tflops, table = grid(cfg.kl, "kl"), grid(cfg.tflops, "tflops"), rows_of(cfg.table)
    shape = json.loads((Path(table[0]["checkpoint"]) / "config.json").read_text(encoding="utf-8"))
    records = []
    for path in files(cfg.data):
        records += read_records(path, "preference", cfg.skip_bad)
    pairs = lengths(records, run.tok)

    # 1. A curve for each method, and its numbers at the places of the grids.
    rows = []
    for step in run.progress(0, len(folders)):
        curve = curve_of(folders[step], table, shape, pairs)
        numbers = told(curve, kls, tflops)
        rows.append(dict(name=Path(folders[step]).name) | numbers | curve)
        run.log(step, (), **numbers)
    if cfg.best_of:
        curve = best_of_n(rows_of(cfg.best_of)[0])
        rows.append(dict(name="best of n") | told(curve, kls, tflops) | curve)

    # 2. The tables.
    trained = [row for row in rows if "flops" in row]
    for name in REWARDS:
        some = [row for row in rows if name in row]
        show(some, [f"{name}@kl{kl:g}" for kl in kls], f"{name} at a KL of so many nats")
    for name in ("gold", "greedy"):
        show(trained, [f"{name}@{amount:g}T" for amount in tflops], f"{name} at so many TFLOPs of training")

    # 3. What was there before.
    one = passes(shape, pairs.p, pairs.n)
    before = {"sampling the pairs": pairs.answers * one.logps, "the reward model, an epoch": pairs.answers * TRAIN * one.score}
    print("\nbefore that, in TFLOPs: " + ", ".join(f"{name} {flops / 1e12:.2f}" for name, flops in before.items()))
    rows += [dict(name=name, tflops=flops / 1e12) for name, flops in before.items()]
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=rows), indent=1))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: when(*parse(Config, ["method", "method..."])))
