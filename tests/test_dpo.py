"""dpo.py: every loss against its golden number and a slow formula, the identities between them, the loop against a
second loop, and the fixed points of a one-token bandit.

What all trainers have in common (resuming, seeds, evaluation, LoRA, micro-batches) is in test_runs.py.
"""
import itertools
import json
import math
import random
import zlib
from types import SimpleNamespace

import pytest
import torch

import data
import dpo
import model
import runs
import sft
from data import UserError
from dpo import LOSSES
from exact import ARMS, PI_REF, TILT_1, arms, bandit_game, farthest
from model import Setup, load_model
from policies import TOK, random_policy, weights
from runs import close, distributions, ends, preferences, rows_in, same, spoken, text_of, write

LN2 = math.log(2)
QUICK = dict(
    beta=.1, epochs=1.0, batch=8, steps=3, lr=2e-3, critic_lr=1e-2,
    max_new=6, micro_tokens=256)


def train(out, init, path, **options):
    usual = QUICK | dict(init=str(init), data=str(path))
    return runs.train(dpo, out, **usual | options)


def hyper(**options):
    usual = dict(beta=.1, eps=.1, lam=50.0, alpha=.5, eta=1.0)
    usual |= dict(lam_up=1.0, lam_down=1.0)
    return SimpleNamespace(**usual | options)


def unit_of(name):
    """What a loss is averaged over: pairs, single responses, or the bad ones alone."""
    return LOSSES[name][0].split()[0]


def value_of(name, x, **options):
    return LOSSES[name][1](x, hyper(**options))


def double(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


# ---------------------------------------------------------------- golden numbers (F1)

CHOSEN = [[-.5, -1, -.25], [-2, -.5, -.5, -1, -.25]]
CHOSEN_REF = [[-.75, -1, -.5], [-1.5, -.5, -.5, -.75, -.25]]
REJECTED = [[-1, -.5, -1.5, -.5], [-.75, -1.25]]
REJECTED_REF = [[-.75, -.5, -1, -.25], [-1, -.75]]
F1 = dict(
    gap=[1.5, 1.0], p=[.75, .75], p_w=[.8, .7], p_l=[.3, .35], kl_w=[.3, .6], kl_l=[.4, .2],
    r_w=[2.0, 1.0], r_l=[.5, 0.0], v_w=[.7, -.2], v_l=[.7, -.2])

GOLDEN = {  # loss: value at F1's inputs, the options that differ from hyper()
    "dpo": (.6697083479, {}),
    "cdpo": (.6747083479, {}),
    "robust": (.6634583479, {}),
    "ipo": (21.25, {}),
    "rso": (.95, {}),
    "gpo_exponential": (.9559895364, {}),
    "gpo_squared": (.9125, {}),
    "gpo_truncated": (.9125, {}),
    "gpo_savage": (.2383123647, {}),
    "rpo_squared": (1.4625, {}),
    "rpo_backward": (.1480393904, {}),
    "rpo_forward": (.1689251224, {}),
    "dpop": (5.9466300707, dict(beta=.3)),
    "tdpo1": (.6618774314, {}),
    "tdpo2": (.6657663414, {}),
    "d2o": (.6697083479, dict(alpha=.1)),
    "sppo": (48006.71875, dict(eta=1e3)),
    "sppo_hard": (499500.9375, dict(beta=1e-3)),
    "dno": (.6822083479, {}),
    "apo_zero": (.9875074787, {}),
    "kto": (.4937551407, {}),
    # F1 has no dro. r - V - β·log-ratio is 2-.7-.05 = 1.25, 1+.2+.075 = 1.275 for the good and .5-.7+.1 = -.1,
    # 0+.2+.025 = .225 for the bad, with V = .7 and -.2; half of the mean of their squares:
    "dro": (.40609375, {}),
    "npo": (13.2512196360, {}),
}


def total(rows, means=False):
    """What response_logps makes of padded token log-probs."""
    values, mask = runs.dense(rows, padding=-77.0)
    return dpo.response_logps(values, mask, mean=means)


def f1(means=False):
    """x of the losses at F1's inputs, of sums over tokens or of means."""
    x = SimpleNamespace(z=double(.2))
    for name, values in F1.items():
        setattr(x, name, double(values))
    x.a = total(CHOSEN, means) - total(CHOSEN_REF, means)
    x.b = total(REJECTED, means) - total(REJECTED_REF, means)
    x.d = x.a - x.b
    return x


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_golden_number(name):
    """One without it, and without its slow formula, cannot be added."""
    golden, options = GOLDEN[name]
    value = value_of(name, f1(), **options)
    numbers = 4 if unit_of(name) == "single" else 2
    assert value.shape == (numbers,), "33: one number a pair, or a response"
    close(value.mean(), golden, atol=1e-9)
    assert name in SLOW


def test_f1_per_token_means():
    """Each response by its own length: IPO as TRL has it; dpo_norm of Tülu 3."""
    x = f1(means=True)
    close(x.a, [.5 / 3, -.75 / 5])
    close(x.b, [-1 / 4, -.25 / 2])
    close(value_of("ipo", x).mean(), 23.1287847222, atol=1e-9)
    close(value_of("dpo", x, beta=5.0).mean(), .4374751984, atol=1e-9)


def test_25_of_a_response_that_is_its_end_alone_nothing_is_left_to_average():
    logp, mask = double([[-1.0, -2.0], [-3.0, 0.0]]), double([[1, 1], [1, 0]])
    ends = torch.tensor([[False, True], [True, False]])
    close(dpo.response_logps(logp, mask, ends, mean=True), [-1, 0])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_what_it_needs_and_no_more(name):
    """Of x it has a and b, and what its words name."""
    x, read = f1(), set()

    class Watch:
        def __getattr__(self, word):
            read.add(word)
            return getattr(x, word)
    value_of(name, Watch())
    _, *words = LOSSES[name][0].split()
    assert read - {"a", "b"} == set(words) - {"anchors"}


# ---------------------------------------------------------------- each loss and its gradient against a slow formula

def sg(x):
    return 1 / (1 + torch.exp(-torch.as_tensor(x)))


def sp(x):
    """-log σ(-x)."""
    return torch.log1p(torch.exp(x))


def kl2(p, q):
    of_yes = p * torch.log(p / q)
    return of_yes + (1 - p) * torch.log((1 - p) / (1 - q))


# Of one pair, or (of a good response, of a bad one).
SLOW = {
    "dpo": lambda x, h: sp(-h.beta * x.d),
    "cdpo": lambda x, h: (
        (1 - h.eps) * sp(-h.beta * x.d)
        + h.eps * sp(h.beta * x.d)),
    "robust": lambda x, h: (
        (1 - h.eps) / (1 - 2 * h.eps) * sp(-h.beta * x.d)
        - h.eps / (1 - 2 * h.eps) * sp(h.beta * x.d)),
    "ipo": lambda x, h: (x.d - .5 / h.beta) ** 2,
    "rso": lambda x, h: max(0 * x.d, 1 - h.beta * x.d),
    "gpo_exponential": lambda x, h: torch.exp(-h.beta * x.d),
    "gpo_squared": lambda x, h: (1 - h.beta * x.d) ** 2,
    "gpo_truncated": lambda x, h: max(0 * x.d, 1 - h.beta * x.d) ** 2,
    "gpo_savage": lambda x, h: sg(-h.beta * x.d) ** 2,
    "rpo_squared": lambda x, h: (h.beta * x.d - h.eta * x.gap) ** 2,
    "rpo_backward": lambda x, h: kl2(sg(h.eta * x.gap), sg(h.beta * x.d)),
    "rpo_forward": lambda x, h: kl2(sg(h.beta * x.d), sg(h.eta * x.gap)),
    "dpop": lambda x, h: sp(
        -h.beta * x.d
        + h.beta * h.lam * max(0 * x.a, -x.a)),
    "tdpo1": lambda x, h: sp(-h.beta * (x.d - (x.kl_l - x.kl_w))),
    "tdpo2": lambda x, h: sp(
        -h.beta * x.d
        + h.beta * h.alpha * (x.kl_l - x.kl_w.detach())),
    "d2o": lambda x, h: sp(h.alpha * x.b - h.beta * x.a),
    "sppo": lambda x, h: (
        .5 * (x.a - h.eta * (x.p_w - .5)) ** 2
        + .5 * (x.b - h.eta * (x.p_l - .5)) ** 2),
    "sppo_hard": lambda x, h: (
        (x.a - .5 / h.beta) ** 2
        + (x.b + .5 / h.beta) ** 2),
    "dno": lambda x, h: (
        x.p * sp(-h.beta * x.d)
        + (1 - x.p) * sp(h.beta * x.d)),
    "apo_zero": lambda x, h: 1 - sg(h.beta * x.a) + sg(h.beta * x.b),
    "kto": (lambda x, h: h.lam_up * (1 - sg(h.beta * (x.a - x.z))),
            lambda x, h: h.lam_down * (1 - sg(h.beta * (x.z - x.b)))),
    "dro": (lambda x, h: .5 * (x.r_w - x.v_w - h.beta * x.a) ** 2,
            lambda x, h: .5 * (x.r_l - x.v_l - h.beta * x.b) ** 2),
    "npo": (None, lambda x, h: 2 / h.beta * sp(h.beta * x.b)),
}


def parts_of(name):
    """The slow formula of a pair; or of a good response and of a bad one."""
    slow = SLOW[name]
    return slow if isinstance(slow, tuple) else (slow, None)


def slopes(loss, leaves):
    """Its gradient in each of them, 0 in what it does not read."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return torch.stack(found)


@pytest.mark.parametrize("name", LOSSES)
def test_22_23_value_and_gradient_against_a_slow_loop(name):
    """In every number that the loss reads; the data's have no gradient to get wrong, the KLs of TDPO have."""
    for seed in range(3):
        h = hyper(beta=.3 + .4 * seed, eps=.2, lam=3.0, alpha=.7, eta=1.3, lam_up=1.4, lam_down=.6)
        torch.manual_seed(seed)
        x = SimpleNamespace(z=double(.3))
        for word in F1:
            setattr(x, word, torch.rand(5).double())
        x.a, x.b = 2 * torch.randn(2, 5).double()
        leaves = [x.a, x.b, x.kl_w, x.kl_l]
        for leaf in leaves:
            leaf.requires_grad_()
        x.d = x.a - x.b
        values = []
        for i in range(5):
            one = SimpleNamespace(z=x.z)
            for word in [*F1, "a", "b", "d"]:
                setattr(one, word, getattr(x, word)[i])
            for formula in parts_of(name):
                if formula:
                    values.append(formula(one, h))
        got = LOSSES[name][1](x, h).mean()
        want = sum(values) / len(values)
        close(got.detach(), want.detach())
        close(slopes(got, leaves), slopes(want, leaves))


# ---------------------------------------------------------------- identities

SAME = [  # a loss and its options; what it then equals; times how much
    ("cdpo", dict(eps=0.0), "dpo", {}, 1),
    ("robust", dict(eps=0.0), "dpo", {}, 1),
    ("dpop", dict(lam=0.0), "dpo", {}, 1),
    ("tdpo2", dict(alpha=0.0), "dpo", {}, 1),
    ("d2o", dict(alpha=.1), "dpo", {}, 1),
    ("cdpo", dict(eps=.3), "dno", {}, 1),           # p is .7
    ("tdpo2", dict(alpha=1.0), "tdpo1", {}, 1),
    ("rpo_backward", {}, "dpo", {}, 1),             # the gap is 500
    ("gpo_squared", dict(beta=.2), "ipo", {}, .04),
    ("sppo_hard", {}, "sppo", dict(eta=10), 2),     # one always wins
]


@pytest.mark.parametrize("name, options, other, others, times", SAME)
def test_identity(name, options, other, others, times):
    """Value and gradient, all over a grid of a and b."""
    line = torch.linspace(-40, 40, 21, dtype=torch.float64)
    a, b = torch.cartesian_prod(line, line).T
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    x = SimpleNamespace(a=a, b=b, d=a - b)
    given = dict(kl_w=.3, kl_l=.8, p_w=1.0, p_l=0.0, p=.7, gap=500.0)
    for word, value in given.items():
        setattr(x, word, torch.full_like(a, value).detach())
    left = value_of(name, x, **options)
    right = times * value_of(other, x, **others)
    close(left.detach(), right.detach(), atol=1e-8)
    close(slopes(left.sum(), (a, b)), slopes(right.sum(), (a, b)), atol=1e-8)


def test_f2_npo_slope_is_1_at_first_and_vanishes_once_forgotten():
    b = double([0.0, -2, -20, -100], requires_grad=True)
    value = value_of("npo", SimpleNamespace(b=b))
    close(slopes(value.sum(), [b]), [[1, .9003, .2384, .00009]], atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_24_extreme_log_ratios_are_finite(name, dtype):
    """±500 nats on either side, value and gradient. e^(βd) itself leaves fp32 at βd = -88."""
    line = torch.tensor([-500.0, -120.0, -1e-9, 0.0, 1e-9, 120.0, 500.0], dtype=dtype)
    a, b = torch.cartesian_prod(line, line).T
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    x = SimpleNamespace(a=a, b=b, d=a - b, z=line[3])
    for word in F1:
        setattr(x, word, torch.rand(len(a), dtype=dtype))
    beta = .05 if name == "gpo_exponential" else 1.0
    for gap in (500.0, -500.0, 0.0):
        x.gap = torch.full_like(b, gap).detach()
        value = value_of(name, x, beta=beta)
        assert value.dtype == dtype and value.isfinite().all()
        slope = torch.autograd.grad(value.sum(), (a, b), retain_graph=True, allow_unused=True, materialize_grads=True)
        assert torch.stack(slope).isfinite().all()


# ---------------------------------------------------------------- files for the loop

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, pairs = tmp_path_factory.mktemp("data"), preferences(44)
    bare, margins, thumbs, prompts = [], [], [], []
    for i, row in enumerate(pairs):
        prompt = dict(row)
        responses = prompt.pop("responses")
        del prompt["scores"], prompt["win"]
        prompts.append(prompt | dict(prob=.9, margin=7.0))      # of a file's own answers, not of the samples
        bare.append(prompt | dict(responses=responses))
        margins.append(prompt | dict(responses=responses, margin=i % 3))
        thumbs.append(prompt | dict(response=responses[i % 2], label=i % 3 > 0))
    made = dict(pairs=pairs, bare=bare, margins=margins, thumbs=thumbs, prompts=prompts)
    made["ranks"] = preferences(24, 3)
    made["one_bare"] = pairs[:19] + bare[19:20] + pairs[20:]    # held out
    paths = {}
    for name, rows in made.items():
        paths[name] = write(folder / f"{name}.jsonl", rows)
    return paths


def lines(path):
    with open(path) as file:
        return list(map(json.loads, file))


# ---------------------------------------------------------------- the sequence KL of TDPO

def slow_kl(policy, ref, ids, start):
    """Σ_t KL(π_ref || π) over the whole vocabulary, of one unpadded row."""
    logp = distributions(policy, ids, start)
    base = distributions(ref, ids, start).detach()
    return (base.exp() * (base - logp)).sum()


# ---------------------------------------------------------------- the loop against a second loop

def slow_items(cfg, rows):
    """What the loop should make of records: a prompt's ids, good and bad responses (ids), and what is known of them."""
    out = []
    for row in rows:
        prompt = TOK.prompt(row["prompt"])
        texts = row.get("responses") or [row["response"]]
        said = list(map(TOK.response, texts))
        if "response" in row:
            good, bad = (said, []) if row["label"] else ([], said)
            out.append(item(prompt, good, bad, r=float(row["label"])))
        elif cfg.loss == "d2o":
            out.append(item(prompt, said[:-1], said[-1:]))
        else:
            out += ranked_items(cfg, row, prompt, said)
    return out


def ranked_items(cfg, row, prompt, said):
    """The pairs of a ranking, all or its ends; as single responses always its ends."""
    unit, out = unit_of(cfg.loss), []
    last = len(said) - 1
    only_ends = cfg.pairs == "ends" or unit != "pair"
    for i, j in itertools.combinations(range(len(said)), 2):
        if only_ends and (i, j) != (0, last):
            continue
        gap, win, r = row.get("margin"), None, [1.0, 0.0]
        if "scores" in row:
            r = [row["scores"][i], row["scores"][j]]
            gap = r[0] - r[1]
        if "win" in row:
            win = [row["win"][i], row["win"][j]]
        out += as_unit(unit, prompt, said[i], said[j], gap, win, r)
    return out


def item(prompt, good, bad, gap=None, win=None, r=None):
    if gap is not None and win is None:
        win = [float(sg(gap)), float(sg(-gap))]
    one = SimpleNamespace(prompt=prompt, good=good, bad=bad)
    one.gap, one.win, one.r = gap, win, r
    return one


def as_unit(unit, prompt, good, bad, gap, win, r):
    """A pair, or its two responses each by itself."""
    if unit == "pair":
        return [item(prompt, [good], [bad], gap, win)]
    up = item(prompt, [good], [], gap, win, r[0])
    down = item(prompt, [], [bad], gap, win, r[1])
    return [up, down]


def sampled_items(cfg, drawn):
    """Online: of the k samples to each prompt the best against the worst. drawn: k rows, k scores of each prompt."""
    out = []
    for rows, scores in drawn:
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if best == worst:
            continue
        win = []
        for i in (best, worst):
            others = scores[:i] + scores[i + 1:]
            win.append(runs.mean(float(sg(scores[i] - other)) for other in others))
        ids, start = rows[best]
        other, _ = rows[worst]
        r = [scores[best], scores[worst]]
        gap = r[0] - r[1]
        out += as_unit(unit_of(cfg.loss), ids[:start], ids[start:], other[start:], gap, win, r)
    return out


class Slow:
    """DPO and its kin again, from the papers: one row at a time, no padding, no micro-batches."""

    def __init__(self, cfg, total):
        self.cfg = cfg
        self.policy, self.ref = load_model(cfg.init, Setup(TOK)), load_model(cfg.init)
        self.critic = None
        self.optimizers = [runs.SlowOptimizer(self.policy, cfg.lr, total, cfg)]
        if cfg.loss == "dro":
            self.critic = load_model(cfg.init, n_scores=1)
            learner = runs.SlowOptimizer(self.critic, cfg.critic_lr, total, cfg)
            self.optimizers.append(learner)

    def said(self, prompt, response):
        """log π of a response's tokens, and the log-ratio that the preference term takes of them."""
        ids, start = prompt + response, len(prompt)
        logp, _ = spoken(self.policy, ids, start)
        gaps = logp - spoken(self.ref, ids, start)[0].detach()
        kept = []
        for gap, token in zip(gaps, response):
            if token != TOK.end or not self.cfg.mask_end:
                kept.append(gap)
        ratio = sum(kept) + 0 * logp.sum()
        if self.cfg.length_norm:
            ratio = ratio / max(1, len(kept))
        return logp, ratio

    def reference_point(self, others):
        """KTO's z of mismatched rows."""
        if not others:
            return None
        with torch.no_grad():
            ratios = [self.said(*other)[1] for other in others]
        return torch.stack(ratios).mean().clamp(min=0)

    def known(self, one, a, b, z):
        """x of one item, whose log-ratios are a and b; None where it has no good or no bad response."""
        c = self.cfg
        x = SimpleNamespace(a=a, b=b, z=z, gap=one.gap)
        if a is not None and b is not None:
            x.d = a - b
            if c.margin:
                x.d = x.d - c.margin / c.beta * x.gap
        if one.win:
            x.p_w, x.p_l = one.win
            x.p = float(sg(one.gap))
        if "kl_w" in LOSSES[c.loss][0]:
            start = len(one.prompt)
            x.kl_w = slow_kl(self.policy, self.ref, one.prompt + one.good[0], start)
            x.kl_l = slow_kl(self.policy, self.ref, one.prompt + one.bad[0], start)
        if self.critic:
            x.r_w = x.r_l = one.r
            states = self.critic(torch.tensor([one.prompt]))
            x.v_w = x.v_l = self.critic.score(states[0, -1])[0]
        return x

    def measure(self, items, others):
        """-> the loss of a batch, to differentiate, and its metrics. others: KTO's mismatched rows."""
        c, z = self.cfg, self.reference_point(others)
        values, right, likely, unlikely, of_good, of_bad = [], [], [], [], [], []
        of_a_good, of_a_bad = parts_of(c.loss)
        for one in items:
            a = b = None
            good = [self.said(one.prompt, response) for response in one.good]
            for logp, _ in good:
                likely.append(logp)
            if good:
                a = sum(ratio for _, ratio in good) / len(good)
                of_good.append(a)
            for response in one.bad:
                logp, b = self.said(one.prompt, response)
                unlikely.append(logp)
                of_bad.append(b)
            if good and one.bad:
                tied = abs(a - b) < 1e-9
                right.append(None if tied else float(a > b))
            formula = of_a_good if good else of_a_bad
            if formula:
                values.append(formula(self.known(one, a, b, z), c))
        loss = sum(values) / max(1, len(values))
        if c.nll_coef:
            nll = [-logp.mean() for logp in likely]
            if c.nll_per == "token":
                nll = -torch.cat(likely)
            loss = loss + c.nll_coef * sum(nll) / len(nll)
        chosen, rejected = runs.mean(of_good), runs.mean(of_bad)
        metrics = {
            "loss": loss.item(),
            "rewards/chosen": c.beta * chosen,
            "rewards/rejected": c.beta * rejected,
            "rewards/margin": c.beta * (chosen - rejected),
            "logps/chosen": runs.mean(y.sum() for y in likely),
            "logps/rejected": runs.mean(y.sum() for y in unlikely)}
        if right and None not in right:                 # else rounding decides it
            metrics["rewards/accuracy"] = runs.mean(right)
        if others:
            metrics["z"] = z.item()
        return loss, metrics

    def step(self, step, items, others):
        if self.cfg.ref_every and step and step % self.cfg.ref_every == 0:
            self.ref.load_state_dict(self.policy.state_dict())
        loss, metrics = self.measure(items, others)
        loss.backward()
        for optimizer in reversed(self.optimizers):     # what is logged is the policy's
            metrics |= optimizer.step(step)
        return metrics

    def evaluation(self, held, others, prompts, watched):
        """Held-out items by the same loss, held-out prompts answered by the policy as it is now."""
        metrics = {}
        if held:
            _, seen = self.measure(held, others)
            for name, value in seen.items():
                metrics[f"val_{name}"] = value
        asked, roll = watched.rollouts[-1]
        assert [own["prompt"] for own in asked] == [own["prompt"] for own in prompts], "no held-out prompts"
        torch.manual_seed(self.cfg.seed)
        again = model.respond(self.policy, prompts, self.cfg)
        assert rows_in(again) == rows_in(roll), "the policy as it is now, seeded, says something else"
        seen = runs.slow_evaluation(self.policy, self.ref, asked, roll, lambda *_: 0.0, self.cfg.temperature)
        metrics["kl"], metrics["gold"] = seen["val_kl"], seen["val_gold"]
        lengths = [len(ids) - start for ids, start in rows_in(roll)]
        metrics["response_length"] = runs.mean(lengths)
        return metrics


def unlike(record, text, finished):
    """A reward by which no two answers are alike."""
    return zlib.crc32(text.encode()) % 10007 / 3000


# Every option takes another value than its default at least once.
LOOPS = {name: dict(loss=name) for name in LOSSES} | {
    "dpo, schedule": dict(warmup=2, weight_decay=.3, clip_grad=.5, seed=3, steps=4),
    "dpo, part of an epoch": dict(steps=0, epochs=.4, seed=1),
    "dpo, per token": dict(length_norm=True, beta=5.0),
    "ipo, per token, no end": dict(loss="ipo", length_norm=True, mask_end=True),
    "dpo, no end, nll per token": dict(mask_end=True, nll_coef=.2),
    "dpo, nll per pair": dict(nll_coef=.2, nll_per="pair"),
    "npo, nll": dict(loss="npo", nll_coef=.5),
    "dpo, margin": dict(margin=.5, beta=.3),
    "dpo, reference moved": dict(ref_every=2),
    # The penalty has a kink where policy and reference agree: here they never do.
    "dpop": dict(loss="dpop", another=True, ref_every=9),
    "dpop, little penalty": dict(loss="dpop", another=True, ref_every=9, lam=2.0),
    "cdpo": dict(loss="cdpo", eps=.3),
    "tdpo2": dict(loss="tdpo2", alpha=.9),
    "sppo, win rates from margins": dict(loss="sppo", file="margins", eta=3.0),
    "rpo, margins": dict(loss="rpo_backward", file="margins", eta=.5),
    "sppo, all of a ranking": dict(loss="sppo", file="ranks"),
    "sppo, ends of a ranking": dict(loss="sppo", file="ranks", pairs="ends"),
    "d2o, two anchors": dict(loss="d2o", file="ranks"),
    "dro, a ranking": dict(loss="dro", file="ranks", seed=2, warmup=1, critic_lr=3e-2),
    "kto, thumbs": dict(loss="kto", file="thumbs", lam_up=1.3, lam_down=.7),
    "kto, z below 0": dict(loss="kto", file="thumbs", lam_up=.02, lr=1e-2),
    "kto, reference moved": dict(loss="kto", file="thumbs", ref_every=1),
    "dro, thumbs": dict(loss="dro", file="thumbs"),
    "npo, thumbs": dict(loss="npo", file="thumbs"),
    "online": dict(online=True, k=4, missing_end=.3, temperature=1.3, seed=4),
    "online, dno": dict(online=True, loss="dno"),
    "online, sppo": dict(online=True, loss="sppo", k=3),
    "online, kto": dict(online=True, loss="kto", k=2),
}


def watch_mismatched(monkeypatch):
    """KTO's mismatched row of each single response, which the loop draws: a dict (ids, good?) -> (prompt, response)."""
    mates, real = {}, dpo.add_mismatched

    def watched(items, block_size):
        real(items, block_size)
        for single in items:
            ids, _ = single["rows"][0]
            other, target = single["other"]
            start = target.index(1)
            mates[tuple(ids), single["up"][0]] = other[:start], other[start:]
    monkeypatch.setattr(dpo, "add_mismatched", watched)
    return mates


def mismatched(cfg, items, mates):
    out = []
    if cfg.loss == "kto":
        for one in items:
            said = (one.good + one.bad)[0]
            mate = mates[tuple(one.prompt + said), bool(one.good)]
            assert mate[0] == one.prompt
            out.append(mate)
    return out


def slow_samples(cfg, roll):
    """The items of an online step, and what is logged of them."""
    said, drawn, every = rows_in(roll), [], []
    for i in range(0, len(said), cfg.k):
        group, scores = said[i:i + cfg.k], []
        for row in group:
            score = unlike(None, text_of(row), True)
            scores.append(score if ends(row) else score - cfg.missing_end)
        drawn.append((group, scores))
        every += scores
    items = sampled_items(cfg, drawn)
    return items, dict(items=len(items), reward=runs.mean(every))


@pytest.mark.parametrize("name", LOOPS)
def test_19_36_loop_equals_a_slow_loop(name, files, tiny, tmp_path, monkeypatch, float64):
    """Every logged number of every step, evaluations included, and every weight at the end, in float64."""
    options = QUICK | LOOPS[name] | dict(init=tiny, out=str(tmp_path / "run"), eval_every=2, reward="test_dpo:unlike")
    usual = "prompts" if "online" in options else "pairs"
    options["data"] = path = files[options.pop("file", usual)]
    another = None
    if options.pop("another", False):
        another = random_policy(1).double()
        monkeypatch.setattr(dpo, "reference", lambda policy: another)
    cfg = dpo.Config(**runs.QUICK | options)
    steps, mates = runs.watch_steps(monkeypatch), watch_mismatched(monkeypatch)
    rows = runs.train(dpo, **options)
    monkeypatch.undo()

    every = lines(path)
    held = every[19::20]
    held_items, items = [], []
    if cfg.online:
        questions, _ = data.open_stream(path, "prompt", cfg.seed, n_held=64)
    else:
        held_items = slow_items(cfg, held)
        items = slow_items(cfg, [row for row in every if row not in held])
    stream = data.Stream(items=items, seed=cfg.seed)
    asked = data.read_records(path, "prompt" if cfg.online else None)[19::20]
    total = cfg.steps or math.ceil(cfg.epochs * len(items) / cfg.batch)
    assert len(rows) == total, f"{len(rows)} steps instead of {total}"
    slow = Slow(cfg, total)
    slow.ref = another or slow.ref
    for step, (row, watched) in enumerate(zip(rows, steps)):
        evaluates = step % 2 == 1 or step + 1 == total
        assert len(watched.rollouts) == cfg.online + evaluates, "it samples for nothing"
        if cfg.online:
            records, roll = watched.rollouts[0]
            assert records == questions.batch(step, cfg.batch), "other prompts were asked for"
            batch, seen = slow_samples(cfg, roll)
        else:
            batch, seen = stream.batch(step, cfg.batch), {}
        want = slow.step(step, batch, mismatched(cfg, batch, mates)) | seen
        if evaluates:
            others = mismatched(cfg, held_items, mates)
            want |= slow.evaluation(held_items, others, asked, watched)
        runs.compare_rows(step, row, want, tied=("rewards/accuracy", "val_rewards/accuracy"))
    runs.compare_weights(weights(cfg.out), slow.policy)
    if slow.critic:
        runs.compare_weights(weights(cfg.out, "critic"), slow.critic)


# ---------------------------------------------------------------- the loop: pitfalls

# What a loss is where policy and reference agree, if it is not ln 2.
AT_0 = dict(
    ipo=25.0, rso=1, gpo_exponential=1, gpo_squared=1, gpo_truncated=1, gpo_savage=.25,
    apo_zero=1, kto=.5, npo=20 * LN2, sppo_hard=50.0)


@pytest.mark.parametrize("name", LOSSES)
def test_21_policy_equals_reference_at_step_0(name, files, tiny, tmp_path):
    """Every margin is 0, in fp32, so the loss is known without a model: ln 2 for dpo. The gradient is not 0."""
    row, = train(tmp_path / "a", tiny, files["pairs"], loss=name, steps=1, batch=42, micro_tokens=100_000)
    _, *words = LOSSES[name][0].split()
    if not {"gap", "p", "p_w", "r_w"} & set(words):      # theirs depends on the data
        assert row["loss"] == pytest.approx(AT_0.get(name, LN2), abs=1e-6)
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/margin"] == 0
    assert row.get("rewards/accuracy", .5) == .5
    assert row["grad_norm"] > 1e-3


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_all_that_comes_before_the_first_step_shows_how_far_it_is(loss, files, tiny, tmp_path, monkeypatch):
    passed = runs.watch_bars(monkeypatch)
    train(tmp_path / "a", tiny, files["pairs"], loss=loss, steps=2, batch=2)
    cfg = dpo.Config(data=str(files["pairs"]))
    stream, held, _ = data.open_preferences(cfg, TOK, 64, paired=loss == "dpo")
    seen = 2 * 2 + len(held)
    assert passed["tokenising"] == seen and 1 <= passed["reference"] <= seen
    assert passed["mismatched"] == (loss == "kto") * (len(stream.items) + len(held))


def single(prompt, response, up=True):
    """An item of one response."""
    target = [0] * len(prompt) + [1] * len(response)
    return dpo.make_item({}, [(prompt + response, target)], [up])


@pytest.mark.parametrize("n", range(1, 8))
def test_37_kto_mismatched_partners(n):
    """Every size: the own prompt with another prompt's response, never one's own, also where a prompt comes twice."""
    twice = [i // 2 for i in range(n)]
    one_other = [0] * (n - 1) + [1]
    for prompts in (list(range(n)), twice, one_other):
        items = []
        for i, p in enumerate(prompts):
            items.append(single([p, 9], [100 + 10 * p, i]))
        if len(set(prompts)) < 2:
            with pytest.raises(UserError, match="one prompt"):
                dpo.add_mismatched(items, 64)
            continue
        dpo.add_mismatched(items, 64)
        for own, p in zip(items, prompts):
            ids, target = own["other"]
            assert ids[:2] == [p, 9]
            assert ids[2] != 100 + 10 * p
            assert target == [0, 0, 1, 1]


def test_37_kto_partners_are_good_and_bad_alike():
    """Pairs come as good, bad, good, bad; a mismatched response is as often the one as the other, to either. It is cut
    to the context."""
    items = []
    for p in range(10, 510):
        for kind in (1, 2):
            items.append(single([p] + [5] * (p % 9), [600 + p] * (p % 7) + [kind], kind == 1))
    torch.manual_seed(0)
    dpo.add_mismatched(items, 64)
    partners = [own["other"][0][-1] for own in items]
    for side in (partners[::2], partners[1::2]):
        assert .4 < side.count(1) / len(side) < .6
    dpo.add_mismatched(items, 12)
    for own in items:
        ids, target = own["other"]
        start = target.index(1)
        assert len(ids) == len(target) <= 12
        assert ids[:start] == own["rows"][0][0][:start]


def test_37_kto_small_files(tiny, tmp_path):
    """A file too small for two held-out prompts can still be learnt from."""
    some = []
    for i in range(12):
        some.append(dict(prompt=str(i), response="yes" * (1 + i % 3), label=i % 2 == 0))
    rows = train(tmp_path / "a", tiny, write(tmp_path / "t.jsonl", some), loss="kto")
    assert len(rows) == 3


def test_c21_a_record_says_how_sure_its_label_is():
    pair = dpo.make_item(dict(margin=1.0, prob=.3), [0, 0], [True, False])
    assert pair["p"] == .3
    assert pair["gap"] == 1


def test_26_overlong_prompts_and_responses(tiny, tmp_path):
    """Both keep part of the context: no empty response, no NaN."""
    some = []
    for n, m, k in itertools.product((1, 30, 90), repeat=3):
        some.append(dict(prompt="why " * n, responses=["yes " * m, "no " * k]))
    path = write(tmp_path / "d.jsonl", some)
    for loss in ("dpo", "kto", "tdpo2"):
        per_token = loss != "tdpo2"
        for row in train(tmp_path / loss, tiny, path, loss=loss, mask_end=True, length_norm=per_token):
            assert math.isfinite(row["loss"]) and row["grad_norm"] > 0


def test_npo_of_a_batch_without_a_bad_response_is_no_division_by_0(tiny, tmp_path):
    rows = []
    for i in range(40):
        rows.append(dict(prompt=str(i), response="yes", label=i not in (7, 19, 39)))
    seen = train(tmp_path / "a", tiny, write(tmp_path / "d.jsonl", rows), loss="npo", batch=2, steps=19)
    assert any(row["logps/rejected"] is None for row in seen)
    assert all(math.isfinite(row["loss"]) for row in seen)


# ---------------------------------------------------------------- online

def rare(record, text, finished):
    """A reward that differs between answers to one prompt alone."""
    return len(text) if runs.asked(record).startswith("0 why") else 0


@pytest.mark.parametrize("loss", ["dpo", "kto", "npo"])
def test_online_ties_give_no_pair(loss, files, tiny, tmp_path):
    """Nothing is learnt then. And a batch in which one prompt alone is no tie is bad luck, no reason to end the run."""
    options = dict(online=True, missing_end=0.0, loss=loss, k=3)
    rows = train(tmp_path / "a", tiny, files["prompts"], reward="runs:nothing", **options)
    assert len(rows) == 3
    for row in rows:
        assert "loss" not in row and row["reward"] == 1
    assert same(weights(tmp_path / "a"), weights(tiny))
    rows = train(tmp_path / "b", tiny, files["prompts"], reward="test_dpo:rare", batch=42, **options)
    assert len(rows) == 3


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, word", [
    ("--loss dop", "dop"), ("--lr 0", "--lr"), ("--nll_per batch", "--nll_per"), ("--data toy", "--online"),
    ("--nonsense 1", "--nonsense"), ("--online --steps 2 --k 1", "--k"), ("--online", "--steps"),
    ("--beta 0", "--beta"), ("--loss cdpo --eps -.1", "--eps"), ("--loss robust --eps .5", "--eps"),
    ("--loss tdpo1 --length_norm", "length_norm"), ("--loss apo_zero --margin 1", "--margin"),
    ("--lora_r 2 --ref_every 2", "--lora_r")])
def test_refusals(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = runs.refuse(dpo, flags.split(), monkeypatch, capsys)
    assert code == 2 and word in error


@pytest.mark.parametrize("options, file, word", [
    (dict(loss="rpo_squared"), "bare", "scores"),
    (dict(loss="dno"), "bare", "scores"),
    (dict(margin=.5), "bare", "margin"),
    (dict(loss="dno", margin=.5), "one_bare", "margin"),
    (dict(loss="dpo"), "thumbs", "preference"),
    (dict(online=True, reward="nowhere"), "prompts", "nowhere")], ids=str)
def test_refusals_of_what_is_in_a_file(options, file, word, files, tiny, tmp_path):
    with pytest.raises(UserError, match=word):
        train(tmp_path / "a", tiny, files[file], **options)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- the one-token bandit (F2)

@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    folder, _ = bandit_game(tmp_path_factory.mktemp("bandit"))
    return folder


def duels(share, scores=False):
    """Records over the six pairs of arms, worth 0, 1, 2, 3; share: gap -> (how often the better won, of how many)."""
    out = []
    for i, j in itertools.combinations(range(4), 2):
        won, n = share[j - i]
        for k in range(n):
            w, l = (j, i) if k < won else (i, j)
            record = dict(prompt=[dict(role="user", content="?")], responses=[ARMS[w], ARMS[l]])
            if scores:
                record["scores"] = [w, l]
            out.append(record)
    for i in range(19, len(out) * 20 // 19, 20):                         # what is held out is none of them
        out.insert(i, out[0])
    if len(out) < 20:
        out.append(out[0])
    return out


def learn(bandit, folder, rows, **options):
    """Full batches, the end token left out: one token a response, and the exact gradient. -> policy, metrics."""
    path, held = write(folder / "d.jsonl", rows), max(1, len(rows) // 20)
    usual = dict(beta=1.0, mask_end=True, max_new=80, batch=len(rows) - held, steps=120, lr=3e-2)
    rows = train(folder / "run", bandit, path, **usual | options)
    return arms(folder / "run"), rows


CERTAIN = {1: (1, 1), 2: (1, 1), 3: (1, 1)}
BT = {1: (11, 15), 2: (22, 25), 3: (20, 21)}                             # σ(1) = .731, σ(2) = .881, σ(3) = .953
EVEN = {1: (19, 26), 2: (23, 26), 3: (25, 26)}                           # the same, every pair as often
FLIPPED = {1: (23, 36), 2: (8, 11), 3: (17, 22)}                         # .2 + .6 σ
FLIPPED_EVEN = {1: (23, 36), 2: (26, 36), 3: (28, 36)}
F2 = {  # what must be arrived at, from which records, with which options
    "dpo": (TILT_1, BT, {}),
    "dpo on flipped labels is biased": ([.221749, .263632, .287082, .227536], FLIPPED_EVEN, {}),
    "robust undoes the flips": (TILT_1, FLIPPED, dict(loss="robust", eps=.2)),
    "ipo": ([.262445, .277043, .270293, .190219], EVEN, dict(loss="ipo", beta=.5)),  # its τ is our β
    "rpo_squared": (TILT_1, CERTAIN, dict(loss="rpo_squared")),
    "rpo_backward": (TILT_1, CERTAIN, dict(loss="rpo_backward")),
    "rpo_forward": (TILT_1, CERTAIN, dict(loss="rpo_forward", lr=1e-2)),
    "dno": (TILT_1, CERTAIN, dict(loss="dno")),
    "dro": (TILT_1, CERTAIN, dict(loss="dro", batch=12, critic_lr=3e-2)),
}


@pytest.mark.parametrize("name", F2)
def test_f2_bandit_fixed_point(name, bandit, tmp_path):
    """The real loop arrives at the closed form: among the arms, as pairs of them say nothing of any other token."""
    target, share, options = F2[name]
    final, rows = learn(bandit, tmp_path, duels(share, scores=share is CERTAIN), **options)
    assert farthest(final / final.sum(), target) < .01 and rows[0]["rewards/margin"] == 0
    if name == "dro":       # V = log Σ π_ref e^r, at the prompt's last token
        critic, prompt = load_model(tmp_path / "run" / "critic"), TOK.prompt([dict(role="user", content="?")])
        value = critic.score(critic(torch.tensor([prompt]))[0, -1]).item()
        assert value == pytest.approx(1.547956, abs=.02)


@pytest.mark.parametrize("loss", ["dpo", "rpo_backward"])
def test_f2_on_deterministic_labels_dpo_diverges_and_rpo_stays(loss, bandit, tmp_path):
    assert farthest(arms(bandit), PI_REF) < 1e-5
    final, rows = learn(bandit, tmp_path, duels(CERTAIN, scores=True), loss=loss, steps=150)
    margins = [row["rewards/margin"] for row in rows[29::30]]            # mean over the six pairs; of the rewards 5/3
    best_worst = (final[3] / final[0]).log() + math.log(4)
    if loss == "dpo":
        assert all(b > a for a, b in zip(margins, margins[1:])) and best_worst > 10
    else:
        assert all(abs(m - 5 / 3) < .05 for m in margins[2:]) and abs(best_worst - 3) < .02


# ---------------------------------------------------------------- pairs that differ in one digit

def test_dpop_keeps_the_chosen_likely_on_pairs_of_one_digits_difference_and_dpo_does_not(tmp_path):
    """The sign of the change, on a model that has seen sums: after 100 steps log π(chosen) has fallen in nearly all pairs with
    DPO, in hardly any with DPOP."""
    rng, rows, start = random.Random(0), [], str(tmp_path / "sft")
    runs.train(sft, start, init="new", n_layer=1, n_head=2, n_embd=64, block_size=64, families="arith", steps=60,
               batch=32, packing=64, prompt_weight=0.0, warmup=20, clip_grad=1.0)
    for _ in range(200):
        task = data.toy_task("train", "arith", rng)
        right = str(task["answer"])
        wrong = right[:-1] + rng.choice([digit for digit in "0123456789" if digit != right[-1]])
        rows.append(dict(prompt=task["prompt"], responses=[f"The answer is {n}." for n in (right, wrong)]))

    def chosen(folder):
        net, out = load_model(folder), []
        for row in rows:
            prompt = TOK.prompt([dict(role="user", content=row["prompt"])])
            with torch.no_grad():
                out.append(spoken(net, prompt + TOK.response(row["responses"][0]), len(prompt))[0].sum())
        return torch.stack(out)
    before, path = chosen(start), write(tmp_path / "pairs.jsonl", rows)
    for loss, low, high in (("dpo", .9, 1), ("dpop", 0, .1)):
        train(tmp_path / loss, start, path, loss=loss, beta=.3, steps=100, lr=6e-4, warmup=10, clip_grad=1.0)
        fell = float((chosen(tmp_path / loss) < before).float().mean())
        assert low <= fell <= high, f"{loss}: the chosen fell in {fell:.0%} of the pairs"
