"""Runs to test with. One helper runs any trainer at tiny size; what it did is watched, and done again slowly.

Everything slow works on plain lists, one unpadded row at a time, so it can have no padding, no mask and no batch to get
wrong. A row is (ids, start): the tokens of a prompt and of the response that begins at ids[start].
"""
import itertools
import json
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import model
from policies import TOK, patch

QUICK = dict(device="cpu", dtype="fp32", threads=1, warmup=0, clip_grad=0.0, save_every=100, eval_every=100)


# ---------------------------------------------------------------- running

def train(script, out, **options):
    """Run a trainer's train() -> the rows it logged, without the time they took."""
    script.train(script.Config(**QUICK | dict(out=str(out)) | options))
    return rows_of(out)


def rows_of(folder):
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        del row["seconds"]
        rows.append(row)
    return rows


def outcome(folder):
    """All that a run leaves to the next one: its rows, and the bytes of every file of weights."""
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.safetensors")}
    return rows_of(folder), weights


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refuse(script, argv, monkeypatch, capsys):
    """What `python script.py ARGV` answers to a mistake: its exit code and its one line; nothing may be written."""
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *argv])
    with pytest.raises(SystemExit) as stop:
        data.guard(lambda: script.train(data.parse(script.Config)))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, "a mistake is answered with one line"
    assert not list(Path.cwd().iterdir()), "something was written before the mistake was found"
    return stop.value.code, error


# ---------------------------------------------------------------- dying

class Killed(BaseException):
    """What SIGKILL is to a process: nothing of ours catches it."""


def killing(monkeypatch, at):
    """Die at the at-th moment that matters (None: never): a row has been logged, a file is about to reach the disk, or
    to get its name, or has it. -> A counter of the moments."""
    moments = itertools.count()

    def die():
        if next(moments) == at:
            raise Killed

    def dying(owner, name, before, after):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if before:
                die()
            result = real(*args, **kwargs)
            if after:
                die()
            return result
        monkeypatch.setattr(owner, name, call)

    dying(os, "fsync", before=True, after=False)
    dying(os, "replace", before=True, after=True)
    dying(data.Run, "log", before=False, after=True)
    return moments


# ---------------------------------------------------------------- watching

def watch(monkeypatch, module, *names):
    """Record every call of functions that module has: {name: [(arguments, result), ...]}."""
    calls = {}
    for name in names:
        calls[name] = []

        def call(*args, real=getattr(module, name), log=calls[name], **kwargs):
            result = real(*args, **kwargs)
            log.append((args, result))
            return result
        patch(monkeypatch, name, call)
    return calls


def watch_bars(monkeypatch):
    """Count what goes through the progress bars of the scripts: {name of the bar: how many}."""
    passed = Counter()

    def bar(items, what, **options):
        for item in items:
            passed[what] += 1
            yield item
    patch(monkeypatch, "bar", bar)
    return passed


def watch_steps(monkeypatch):
    """Record what every logged step drew: a list of steps, each with rollouts, [(records, Rollout)], that of its
    evaluation the last, and orders, in which its updates took the rows."""
    steps, now = [], SimpleNamespace(rollouts=[], orders=[])
    respond, randperm, log = model.respond, torch.randperm, data.Run.log

    def watched_respond(policy, records, *args, **kwargs):
        roll = respond(policy, records, *args, **kwargs)
        now.rollouts.append((records, roll))
        return roll

    def watched_randperm(n):
        now.orders.append(randperm(n))
        return now.orders[-1]

    def watched_log(*args, **kwargs):
        steps.append(SimpleNamespace(**vars(now)))
        now.rollouts, now.orders = [], []
        return log(*args, **kwargs)

    patch(monkeypatch, "respond", watched_respond)
    monkeypatch.setattr(torch, "randperm", watched_randperm)
    monkeypatch.setattr(data.Run, "log", watched_log)
    return steps


def watch_gradients(monkeypatch):
    """The gradients of every update of every optimizer, as it gets them: a list of lists of tensors."""
    gradients, step = [], model.Optimizer.step

    def watched(self, number):
        gradients.append([p.grad.clone() for p in self.params])
        return step(self, number)
    monkeypatch.setattr(model.Optimizer, "step", watched)
    return gradients


def rows_in(roll):
    """A rollout as rows, read off the padding id alone."""
    rows = []
    for ids, start in zip(roll.tokens.tolist(), roll.prompt_len):
        rows.append(([i for i in ids if i != TOK.pad], start))
    return rows


def updates(step, cfg):
    """The rows of each update of a watched step, as lists of numbers; every epoch takes all rows."""
    out = []
    for order in step.orders[:cfg.epochs]:
        out += [part.tolist() for part in order.chunk(cfg.minibatches)]
    n = len(step.orders[0])
    assert sorted(itertools.chain(*out)) == sorted([*range(n)] * cfg.epochs)
    return out


# ---------------------------------------------------------------- the same, slowly

def distributions(net, ids, start, temperature=1.0):
    """log softmax(logits / T) from which each token of the response was drawn: (n, V)."""
    hidden = net(torch.tensor([ids]))[0, start - 1:-1]
    return (net.logits(hidden) / temperature).log_softmax(-1)


def spoken(net, ids, start, temperature=1.0):
    """log π of each token of the response, and the entropy it was drawn with: (n,) each."""
    every = distributions(net, ids, start, temperature)
    return every[range(len(every)), ids[start:]], -(every.exp() * every).sum(-1)


def ends(row):
    """Whether a response ends by itself."""
    return row[0][-1] == TOK.end


def text_of(row):
    ids, start = row
    return TOK.decode(ids[start:-1] if ends(row) else ids[start:])


def slow_evaluation(policy, ref, records, roll, score, temperature):
    """val_kl, val_reward and val_gold of a rollout on held-out prompts; score(record, row) is the reward."""
    kls, scores, truths = [], [], []
    with torch.no_grad():
        for record, row in zip(records, rows_in(roll)):
            kls.append(spoken(policy, *row, temperature)[0].sum() - spoken(ref, *row, temperature)[0].sum())
            scores.append(score(record, row))
            if "family" in record:
                truths.append(data.gold(record, text_of(row), ends(row)))
    return dict(val_kl=mean(kls), val_reward=mean(scores), val_gold=mean(truths))


def mean(values):
    """None where there is nothing to average."""
    values = [v.item() if isinstance(v, torch.Tensor) else float(v) for v in values]
    return sum(values) / len(values) if values else None


class SlowOptimizer:
    """AdamW, with decay on matrices alone, at rates that rise for `warmup` steps and then fall along a cosine."""

    def __init__(self, net, lr, total, cfg, betas=(.9, .95), floor=.1):
        self.net, self.lr, self.total, self.warmup, self.clip = net, lr, total, cfg.warmup, cfg.clip_grad
        self.floor = floor
        matrices = [p for p in net.parameters() if p.ndim > 1]
        vectors = [p for p in net.parameters() if p.ndim < 2]
        self.groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.betas = betas
        self.forget()

    def forget(self):
        groups = [dict(group) for group in self.groups]
        self.optimizer = torch.optim.AdamW(groups, self.lr, betas=self.betas)

    def rate(self, step):
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.total - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)

    def step(self, step):
        """Clip, update, clear -> the norm of the gradient before clipping, and the rate."""
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dict(grad_norm=float(norm), lr=self.rate(step))


# ---------------------------------------------------------------- comparing

def close(got, want, atol=1e-10, rtol=0.0):
    """Equal in float64, but for rounding."""
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


def same(a, b):
    """Whether two {name: tensor} are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compare_rows(step, got, want, tolerance=2e-6, tied=()):
    """A logged row with what it should be, which nothing may be missing from. tied: names of what rounding decides."""
    recomputed = {*want, *tied, "step"} | {name for name in got if name.startswith("reward/")}      # see check_terms
    assert got.keys() <= recomputed, f"step {step}: {got.keys() - recomputed} is logged and not recomputed"
    for name, value in want.items():
        assert got.get(name) == (None if value is None else pytest.approx(value, abs=tolerance, rel=tolerance)), (
            f"step {step}: {name} is {got.get(name)} in the run, and should be {value}")


def check_terms(row, spec):
    """The terms of a reward are logged too, and make up the reward."""
    total = sum(term.weight * row[f"reward/{term.label}"] for term in data.parse_rewards(spec))
    assert row["reward"] == pytest.approx(total, abs=1e-5), "the terms of the reward do not add up to it"


def compare_weights(folder_weights, net, atol=5e-7):
    """A model's weights {part/name: tensor}, which a file holds in fp32, with those that they should be."""
    want = net.state_dict()
    for key, tensor in folder_weights.items():
        right = want[key.split("/", 1)[1]].double()
        gap = (tensor.double() - right).abs() - 2 ** -23 * right.abs()  # of a large one the file's last bit is more
        assert gap.max() < atol, f"{key} is {gap.max():.2g} away from what it should be"


# ---------------------------------------------------------------- made-up numbers, prompts and rewards

LENGTHS = (4, 1, 6, 2, 1, 5)


def ragged(seed, lengths=LENGTHS, scale=1.0):
    """Rows of random numbers, of several lengths."""
    rng = random.Random(seed)
    return [[rng.gauss(0, scale) for _ in range(n)] for n in lengths]


def dense(rows, width=9, padding=0.0):
    """Rows as (values (B, width), mask); row b starts at column b % 3, and everything around it is padding."""
    values = torch.full((len(rows), width), padding, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.float64)
    for b, row in enumerate(rows):
        inside = slice(b % 3, b % 3 + len(row))
        values[b, inside] = torch.as_tensor(row, dtype=torch.float64)
        mask[b, inside] = 1
    return values, mask


def preferences(n, k=2, seed=0):
    """Ragged preferences with scores that do not always agree with the label, and win rates; some prompts hold an end
    token. Some are tasks of the toy world, whose truth is known."""
    rng, out = random.Random(seed), []
    for i in range(n):
        before = [dict(role="user", content="Hm"), dict(role="assistant", content="Yes")] * (i % 2)
        asked = dict(role="user", content=f"{i // 2 * 2} {'why ' * (i % 3)}")
        responses = []
        for j in range(k):
            letters = [rng.choice("abcdefgh ") for _ in range(rng.randint(1, 8))]
            responses.append("".join(letters) + rng.choice("xyz") + str(j))
        scores = [round(rng.gauss(-j, 1), 3) for j in range(k)]
        out.append(dict(prompt=before + [asked], responses=responses, scores=scores,
                        win=[round(rng.random(), 3) for _ in range(k)]))
    for i in range(19, n, 20):      # these are held out
        out[i] |= dict(family="write", key=f"old car {i}", thing="car", category="vehicles")
    return out


def asked(record):
    return record["prompt"][-1]["content"]


def vowels(record, text, finished):
    """A reward that differs between almost any two responses."""
    return len(text) / 10 - text.count("e")


def half(record, text, finished):
    """The same, but 0 for half of the prompts: there the rewards of a group are equal."""
    return vowels(record, text, finished) if len(asked(record)) % 2 else 0.0


def nothing(record, text, finished):
    """A reward by which all responses are alike."""
    return 1.0


def has_e(record, text, finished):
    return "e" in text


def price(record, text, finished):
    """A cost of either sign that has little to do with the reward."""
    return text.count("a") + len(text) % 3 - 1.0
