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

from configs.record import each, table_rows
from data import OptionError, Run, RunConfig, UserError, files, guard, mean, parse, read_records, read_rows, write_text
from model import read_json
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
    C, T = shape["n_embd"], p + n
    attention = 4 * C ** 2      # weights of a layer
    mlp = 8 * C ** 2
    for_all = shape["n_layer"] * (attention + mlp) - mlp
    unembed = shape["vocab_size"] * C
    weights = T * for_all + read * mlp + head * unembed
    return 2 * weights + attention_flops(shape, T)


def attention_flops(shape, T):
    """Of each of T tokens to those before it, which are half of the row on average: 4 C a layer and pair."""
    before = T / 2
    return T * 4 * shape["n_layer"] * shape["n_embd"] * before


def sample_flops(shape, p, n, k):
    """k answers to a prompt, which is read once for all of them."""
    prompt = forward_flops(shape, p, 0, head=1, read=1)
    whole = forward_flops(shape, p, n, head=n, read=n)
    cached = forward_flops(shape, p, 0, head=0, read=0)     # keys and values of the prompt
    return prompt + k * (whole - cached)


def passes(shape, p, n):
    """FLOPs of a forward pass that gives log-probs of the answer, a value of each of its tokens, or one score."""
    return SimpleNamespace(logps=forward_flops(shape, p, n, head=n, read=n),
                           values=forward_flops(shape, p, n, head=0, read=n),
                           score=forward_flops(shape, p, n, head=0, read=1))


TRAIN = 3   # a forward and a backward pass, in forward passes


# Each gives the FLOPs of a step of a trainer, from its options, the row that it logged, and the mean lengths of the
# pairs: lengths.p of a prompt, lengths.n of an answer.

def dpo_step(options, row, shape, lengths):
    """Both answers of a pair are read by the reference, once, and trained on."""
    one = passes(shape, lengths.p, lengths.n)
    return options["batch"] * 2 * (1 + TRAIN) * one.logps


def online_dpo_step(options, row, shape, lengths):
    """k answers to each prompt are sampled and scored; best and worst make a pair. No length of them is logged: they
    count as long as the answers of the pairs."""
    k = options["k"]
    one = passes(shape, lengths.p, lengths.n)
    sampled = sample_flops(shape, lengths.p, lengths.n, k)
    scored = k * one.score
    of_a_pair = 2 * (1 + TRAIN) * one.logps
    return options["batch"] * (sampled + scored) + row["items"] * of_a_pair


def ppo_step(options, row, shape, lengths):
    """Sampled, read by policy and reference, scored, valued; then each epoch trains policy and critic."""
    n = row["response_length"]
    one = passes(shape, lengths.p, n)
    sampled = sample_flops(shape, lengths.p, n, 1)
    read = 2 * one.logps + one.score + one.values
    epoch = TRAIN * (one.logps + one.values)
    return options["prompts"] * (sampled + read + options["epochs"] * epoch)


def grpo_step(options, row, shape, lengths):
    """Sampled, scored, trained on. Groups of equal rewards are left out, but with a KL penalty they teach as well; then
    the reference reads, too. A second update of a rollout needs log π_old of the first."""
    n, group = row["response_length"], options["group"]
    one = passes(shape, lengths.p, n)
    sampled = sample_flops(shape, lengths.p, n, group)
    scored = group * one.score
    reads, taught = 0, 1 - row["zero_std"]
    if options["kl_coef"] > 0:
        reads, taught = 1, 1
    if options["epochs"] * options["minibatches"] > 1:
        reads += 1
    trained = taught * options["epochs"] * TRAIN
    learned = (reads + trained) * one.logps         # an answer
    return row["groups"] * (sampled + scored) + options["prompts"] * group * learned


def step_cost(options):
    """The function for the trainer that a run's options are of: each has one that no other has."""
    if "group" in options:
        return grpo_step
    if "value_clip" in options:
        return ppo_step
    return online_dpo_step if options.get("online") else dpo_step


def run_flops(folder, shape, lengths):
    """FLOPs of all steps of a finished run, from its run.json and metrics.jsonl."""
    options = read_json(folder / "run.json")
    cost = step_cost(options)
    total = 0
    for _, row in read_rows(folder / "metrics.jsonl"):
        total += cost(options, row, shape, lengths)
    return total


def mean_lengths(records, tok):
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
    for i in range(1, len(xs)):
        before, after = xs[i - 1], xs[i]
        if before <= x <= after:
            share = (x - before) / (after - before) if after > before else 0.0
            return ys[i - 1] + share * (ys[i] - ys[i - 1])
    return None


def distance(kl):
    """d = √KL; an estimate of the KL may be below 0."""
    return math.sqrt(max(0.0, kl))


REWARDS = {"gold": "write", "greedy": "greedy", "proxy": "proxy"}   # our name, and that of compare


def curve_of(folder, table, path):
    """KL and rewards, a list each, of the runs of one rate, from the start on; table: rows by checkpoint, from path."""
    start, *_ = table.values()
    rows = [start]      # and the others in the order of their steps
    for run in runs_of(folder):
        if str(run) not in table:
            raise UserError(f"{path}: no row of {run}; reward.py compare ... --save makes one")
        rows.append(table[str(run)])
    curve = dict(kl=each(rows, "kl"))
    for ours, theirs in REWARDS.items():
        if all(theirs in row for row in rows):      # the validation split is asked for no proxy
            curve[ours] = each(rows, theirs)
    return curve


def runs_of(folder):
    """The runs in a folder, whose names are numbers of steps, the shortest first."""
    runs = [path for path in Path(folder).iterdir() if path.name.isdigit()]
    return sorted(runs, key=lambda path: int(path.name))


def curves_of(method, test, val, shape, lengths, cfg):
    """{rate: its curve} of a method's folder: steps, flops, kl, gold, greedy, proxy, and of the validation split val_kl
    and val_gold."""
    curves = {}
    for folder in sorted(Path(method).iterdir()):
        runs = runs_of(folder) if folder.is_dir() else []
        if not runs:
            continue
        steps = [int(run.name) for run in runs]
        flops = [run_flops(run, shape, lengths) for run in runs]
        curve = dict(steps=[0, *steps], flops=[0.0, *flops])
        curve |= curve_of(folder, test, cfg.test)
        on_val = curve_of(folder, val, cfg.val)
        curve["val_kl"] = on_val["kl"]
        curve["val_gold"] = on_val["gold"]
        curves[folder.name] = curve
    if not curves:
        raise UserError(f"{method}: no runs RATE/STEPS in it")
    return curves


# An axis gives where the runs of a curve are; split: "" for the test split, "val_" for the validation split.

def by_kl(curve, split):
    """d = √KL of the runs on a split."""
    return [distance(kl) for kl in curve[f"{split}kl"]]


def by_flops(curve, split):
    """Their FLOPs, whatever the split."""
    return curve["flops"]


def best_rate(curves, axis, x):
    """The rate with the most reward at x, on the validation split, among those that come so far on both splits; None if
    none does."""
    best, most = None, -math.inf
    for rate, curve in curves.items():
        on_val = read_off(axis(curve, "val_"), curve["val_gold"], x)
        on_test = read_off(axis(curve, ""), curve["gold"], x)
        if on_val is None or on_test is None:
            continue
        if on_val > most:
            best, most = rate, on_val
    return best


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
        where = axis(curve, "")
        out[f"rate@{place}"] = float(rate)
        for name in REWARDS:
            if name in curve:
                out[f"{name}@{place}"] = read_off(where, curve[name], x)
    return out


def best_of_n(row):
    """Best-of-n as a curve over KL, log n - (n - 1) / n, from a row that has best@1, best@2, ... It trains nothing and
    pays at each answer, so it has no FLOPs to compare."""
    curve = dict(n=[], kl=[], gold=[])
    n = 1
    while row.get(f"best@{n}") is not None:
        kl = math.log(n) - (n - 1) / n
        curve["n"].append(n)
        curve["kl"].append(kl)
        curve["gold"].append(row[f"best@{n}"])
        n *= 2
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
    rows = table_rows(path)
    whole = all("checkpoint" in row and "kl" in row and "write" in row for row in rows)
    if not rows or not whole:
        raise UserError(f"{path}: needed are rows with checkpoint, kl and write, as of reward.py compare --save")
    return {row["checkpoint"]: row for row in rows}


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
        columns = [(f"{place:>8}", place, "") for place in places]
        print_table(names, cells, columns)


def what_was_before(n_pairs, lengths, shape):
    """TFLOPs of sampling the pairs, and of an epoch of the reward model, as rows: the same for all that need them."""
    of_a_prompt = lengths.answers / n_pairs
    one = passes(shape, lengths.p, lengths.n)
    sampled = n_pairs * sample_flops(shape, lengths.p, lengths.n, of_a_prompt)
    trained = lengths.answers * TRAIN * one.score
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
    start, *_ = test
    shape = read_json(Path(start) / "config.json")
    records = []
    for path in files(cfg.data):
        records += read_records(path, "preference", cfg.skip_bad)
    lengths = mean_lengths(records, run.tok)

    # 1. The curves of each method, and its numbers at the places of the grids.
    rows, curves = [], []
    for step in run.progress(0, len(folders)):
        name = Path(folders[step]).name
        of_rate = curves_of(folders[step], test, val, shape, lengths, cfg)
        for rate, curve in of_rate.items():
            curves.append(dict(name=f"{name} {rate}") | curve)
        rows.append(dict(name=name) | told(of_rate, kls, tflops))
        run.log(step)
    if cfg.best_of:
        start, *_ = by_checkpoint(cfg.best_of).values()
        curve = best_of_n(start)
        curves.append(dict(name="best of 1, 2, 4, ...") | curve)
        rows.append(dict(name="best of n") | told_of_best(curve, kls))

    # 2. The tables.
    at_kl = list(map(kl_place, kls))
    at_flops = list(map(flops_place, tflops))
    for reward in REWARDS:
        show(rows, reward, at_kl, "a KL of so many nats")
    for reward in ("gold", "greedy"):
        show(rows, reward, at_flops, "so many TFLOPs of training")

    # 3. What was there before.
    before = what_was_before(len(records), lengths, shape)
    print("\nbefore that:")
    for row in before:
        print(f"  {row['name']}, {row['tflops']:.2f} TFLOPs")
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=rows + before + curves), indent=1))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: when(*parse(Config, ["method", "method..."])))
