"""DPO, PPO and GRPO at equal KL and at equal compute: curves through finished runs of growing length, and two tables.

    python configs/when.py out/when/dpo out/when/ppo --val out/when/val.json --test out/when/test.json

A method's folder holds its runs, RATE/STEPS. What they score comes from tables of `reward.py compare`: the same prompts
for all. Of each rate there is a curve, and rewards are read off between two of its runs:

* At a KL. Rewards are nearly a line in d = √KL, and both of Gao's forms are functions of it (2210.10760), so the line
  between two runs is drawn in d. Where noise makes KL fall on the way, the first crossing counts: where somebody who
  watches the KL would have stopped.
* At a number of FLOPs. A longer run is no continuation of a shorter one, since its rate falls later. So a point says
  what a budget buys. The line is drawn in FLOPs, from the SFT model, which costs nothing.

At each place the rate with the most true reward on the validation split is taken, and its reward on the test split is
what is told. Beyond the last run there is no number: nothing is extrapolated.

FLOPs are by formula: 2 a weight and token forward, three times that in training, and attention. Padding, evaluations
and optimizers do not count. What was there before, the pairs and the reward model, is told apart.
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
    test: str = "out/when/test.json"  # what reward.py compare --save says of the runs; its first row is the start
    val: str = "out/when/val.json"  # the same on the validation split, which chooses the rates
    best_of: str = ""           # a table of compare --samples: best-of-n as one more curve over KL
    data: str = "out/pairs/pairs.jsonl"  # the pairs that all learned from
    kl: str = "0.25,0.5,1,2,4"  # nats at which rewards are told
    tflops: str = "0.125,0.25,0.5,1,2"  # 10¹² FLOPs at which they are told
    save: str = ""              # a JSON file for the curves and tables, as tables/when.json


# ---------------------------------------------------------------- FLOPs
# shape: config.json of the model. p, n: tokens of a prompt and of an answer, on average; numbers, not whole ones.

def forward_flops(shape, p, n, head, read):
    """One forward pass of a prompt with its answer: 2 a weight and token, and attention. head: tokens that need logits;
    read: those whose last state is used, and the last layer's MLP runs for these only."""
    C, layers, T = shape["n_embd"], shape["n_layer"], p + n
    weights = T * (12 * layers - 8) * C ** 2 + read * 8 * C ** 2 + head * shape["vocab_size"] * C
    return 2 * weights + attention_flops(shape, T)


def attention_flops(shape, T):
    """Of each of T tokens to those before it, which are half of the row on average: 4 C a layer and pair."""
    return T * 4 * shape["n_layer"] * shape["n_embd"] * T / 2


def sample_flops(shape, p, n, k):
    """k answers to a prompt, which is read once for all of them."""
    prompt = forward_flops(shape, p, 0, head=1, read=1)
    answer = forward_flops(shape, p, n, head=n, read=n) - forward_flops(shape, p, 0, head=0, read=0)
    return prompt + k * answer


def passes(shape, p, n):
    """FLOPs of a forward pass that gives log-probs of the answer, a value of each of its tokens, or one score."""
    return SimpleNamespace(logps=forward_flops(shape, p, n, head=n, read=n),
                           values=forward_flops(shape, p, n, head=0, read=n),
                           score=forward_flops(shape, p, n, head=0, read=1))


TRAIN = 3   # a forward and a backward pass, in forward passes


# Each gives the FLOPs of a step of a trainer, from its options and the row that it logged.

def dpo_step(options, row, shape, pairs):
    """Both answers of a pair are read by the reference, once, and trained on."""
    one = passes(shape, pairs.p, pairs.n)
    return options["batch"] * 2 * (1 + TRAIN) * one.logps


def online_dpo_step(options, row, shape, pairs):
    """k answers to each prompt are sampled and scored; best and worst make a pair. No length of them is logged: they
    count as long as the answers of the pairs."""
    one, k = passes(shape, pairs.p, pairs.n), options["k"]
    sampled = sample_flops(shape, pairs.p, pairs.n, k) + k * one.score
    return options["batch"] * sampled + row["items"] * 2 * (1 + TRAIN) * one.logps


def ppo_step(options, row, shape, pairs):
    """Sampled, read by policy and reference, scored, valued; then each epoch trains policy and critic."""
    n, epochs = row["response_length"], options["epochs"]
    one = passes(shape, pairs.p, n)
    read = sample_flops(shape, pairs.p, n, 1) + 2 * one.logps + one.score + one.values
    return options["prompts"] * (read + epochs * TRAIN * (one.logps + one.values))


def grpo_step(options, row, shape, pairs):
    """Sampled, scored, trained on. Groups of equal rewards are left out, but with a KL penalty they teach as well; then
    the reference reads, too. A second update of a rollout needs log π_old of the first."""
    n, group, updates = row["response_length"], options["group"], options["epochs"] * options["minibatches"]
    one, penalty = passes(shape, pairs.p, n), options["kl_coef"] > 0
    drawn = sample_flops(shape, pairs.p, n, group) + group * one.score
    taught = 1 if penalty else 1 - row["zero_std"]
    learned = (penalty + (updates > 1) + taught * options["epochs"] * TRAIN) * one.logps
    return row["groups"] * drawn + options["prompts"] * group * learned


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


def curve_of(folder, table, path):
    """KL and rewards, a list each, of the runs of one rate, from the start on; table: rows by checkpoint, from path."""
    rows = [next(iter(table.values()))]
    for run in runs_of(folder):
        if str(run) not in table:
            raise UserError(f"{path}: no row of {run}; reward.py compare ... --save makes one")
        rows.append(table[str(run)])
    curve = dict(kl=[row["kl"] for row in rows])
    for ours, theirs in REWARDS.items():
        if theirs in rows[0]:  # the validation split is asked for no proxy
            curve[ours] = [row[theirs] for row in rows]
    return curve


def runs_of(folder):
    """The runs in a folder, whose names are numbers of steps, the shortest first."""
    runs = [path for path in Path(folder).iterdir() if path.name.isdigit()]
    return sorted(runs, key=lambda path: int(path.name))


def curves_of(method, test, val, shape, pairs, cfg):
    """{rate: its curve} of a method's folder: steps, flops, kl, gold, greedy, proxy, and of the validation split val_kl
    and val_gold."""
    curves = {}
    for folder in sorted(Path(method).iterdir()):
        runs = runs_of(folder) if folder.is_dir() else []
        if not runs:
            continue
        curve = dict(steps=[0] + [int(run.name) for run in runs])
        curve["flops"] = [0.0] + [run_flops(run, shape, pairs) for run in runs]
        curve |= curve_of(folder, test, cfg.test)
        chosen_by = curve_of(folder, val, cfg.val)
        curve["val_kl"], curve["val_gold"] = chosen_by["kl"], chosen_by["gold"]
        curves[folder.name] = curve
    if not curves:
        raise UserError(f"{method}: no runs RATE/STEPS in it")
    return curves


def best_rate(curves, axis, x):
    """The rate with the most reward at a place, on the validation split, among those that come so far on both splits;
    None if none does. axis: a function (curve, the split's prefix) -> where the runs are."""
    best, most = None, -math.inf
    for rate, curve in curves.items():
        there = read_off(axis(curve, "val_"), curve["val_gold"], x)
        here = read_off(axis(curve, ""), curve["gold"], x)
        if None not in (there, here) and there > most:
            best, most = rate, there
    return best


def by_kl(curve, split):
    """d = √KL of the runs on a split."""
    return [distance(kl) for kl in curve[f"{split}kl"]]


def by_flops(curve, split):
    """Their FLOPs, whatever the split."""
    return curve["flops"]


def kl_place(kl):
    """What a place on the axis of KL is called in a row."""
    return f"kl{kl:g}"


def flops_place(amount):
    """And one on that of FLOPs."""
    return f"{amount:g}T"


def told(curves, kls, tflops):
    """{reward@place: number} of a method at each KL and number of FLOPs that it comes to, and the rate chosen there."""
    places = []
    for kl in kls:
        places.append((kl_place(kl), by_kl, distance(kl)))
    for amount in tflops:
        places.append((flops_place(amount), by_flops, amount * 1e12))
    out = {}
    for place, axis, x in places:
        rate = best_rate(curves, axis, x)
        if rate is None:
            continue
        curve = curves[rate]
        out[f"rate@{place}"] = float(rate)
        for name in curve.keys() & REWARDS.keys():
            out[f"{name}@{place}"] = read_off(axis(curve, ""), curve[name], x)
    return out


def best_of_n(row):
    """Best-of-n as a curve over KL, log n - (n - 1) / n, from a row that has best@1, best@2, ... It trains nothing and
    pays at each answer, so it has no FLOPs to compare."""
    curve = dict(n=[], kl=[], gold=[])
    for n in [2 ** i for i in range(20)]:
        gold = row.get(f"best@{n}")
        if gold is not None:
            curve["n"].append(n)
            curve["kl"].append(math.log(n) - (n - 1) / n)
            curve["gold"].append(gold)
    return curve


def told_of_best(curve, kls):
    """Its gold at each KL that it comes to."""
    out = {}
    for kl in kls:
        gold = read_off(by_kl(curve, ""), curve["gold"], distance(kl))
        if gold is not None:
            out[f"gold@{kl_place(kl)}"] = gold
    return out


def grid(text, name):
    """'0.5,1' as numbers."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise OptionError(f"--{name} {text}: numbers with commas between them") from None


def by_checkpoint(path):
    """The rows of a table that compare saved, by checkpoint; the first is the model that all began from."""
    return {row["checkpoint"]: row for row in rows_of(path)}


def show(rows, reward, places, title):
    """One table: a row for each method that comes to one of the places, – where it does not."""
    names, cells = [], []
    for row in rows:
        line = {}
        for place in places:
            number = row.get(f"{reward}@{place}")
            line[place] = "–" if number is None else f"{number:.2f}"
        if set(line.values()) != {"–"}:
            names.append(row["name"])
            cells.append(line)
    if names:
        print(f"\n{reward} at {title}")
        print_table(names, cells, [(f"{place:>8}", place, "") for place in places])


def what_was_before(n_pairs, pairs, shape):
    """TFLOPs of sampling the pairs, and of an epoch of the reward model, as rows: the same for all that need them."""
    sampled = n_pairs * sample_flops(shape, pairs.p, pairs.n, pairs.answers / n_pairs)
    trained = pairs.answers * TRAIN * passes(shape, pairs.p, pairs.n).score
    return [dict(name="sampling the pairs", tflops=sampled / 1e12),
            dict(name="the reward model, an epoch", tflops=trained / 1e12)]


def when(cfg, folders):
    """Make the curves, read them off, print a table for each reward and axis, and save all of it."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    kls = grid(cfg.kl, "kl")
    tflops = grid(cfg.tflops, "tflops")
    test = by_checkpoint(cfg.test)
    val = by_checkpoint(cfg.val)
    start = next(iter(test))
    shape = json.loads((Path(start) / "config.json").read_text(encoding="utf-8"))
    records = []
    for path in files(cfg.data):
        records += read_records(path, "preference", cfg.skip_bad)
    pairs = lengths(records, run.tok)

    # 1. The curves of each method, and its numbers at the places of the grids.
    rows, curves = [], []
    for step in run.progress(0, len(folders)):
        name = Path(folders[step]).name
        of_rate = curves_of(folders[step], test, val, shape, pairs, cfg)
        for rate, curve in of_rate.items():
            curves.append(dict(name=f"{name} {rate}") | curve)
        rows.append(dict(name=name) | told(of_rate, kls, tflops))
        run.log(step)
    if cfg.best_of:
        curve = best_of_n(rows_of(cfg.best_of)[0])
        curves.append(dict(name="best of 1, 2, 4, ...") | curve)
        rows.append(dict(name="best of n") | told_of_best(curve, kls))

    # 2. The tables.
    at_kl, at_flops = [kl_place(kl) for kl in kls], [flops_place(amount) for amount in tflops]
    for reward in REWARDS:
        show(rows, reward, at_kl, "a KL of so many nats")
    for reward in ("gold", "greedy"):
        show(rows, reward, at_flops, "so many TFLOPs of training")

    # 3. What was there before.
    before = what_was_before(len(records), pairs, shape)
    print("\nbefore that:")
    for row in before:
        print(f"  {row['name']}, {row['tflops']:.2f} TFLOPs")
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=rows + before + curves), indent=1))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: when(*parse(Config, ["method", "method..."])))
