"""dpo.py: every loss against its golden number and a slow formula, the identities between them, the loop against a
second loop, and the fixed points of a one-token bandit.

What all trainers have in common (resuming, seeds, evaluation, LoRA, micro-batches) is in test_runs.py.
"""
import decimal
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
from runs import close, dense, distributions, ends, preferences, ragged, rows_in, same, spoken, text_of, write

LN2 = math.log(2)
QUICK = dict(beta=.1, epochs=1.0, batch=8, steps=3, lr=2e-3, critic_lr=1e-2, max_new=6, micro_tokens=256)


def train(out, init, path, **options):
    return runs.train(dpo, out, init=str(init), data=str(path), **QUICK | options)


def hyper(**options):
    return SimpleNamespace(**dict(beta=.1, eps=.1, lam=50.0, alpha=.5, eta=1.0, lam_up=1.0, lam_down=1.0) | options)


def unit_of(name):
    """What a loss is averaged over: pairs, single responses, or the bad ones alone."""
    return LOSSES[name][0].split()[0]


def value_of(name, x, **options):
    return LOSSES[name][1](x, hyper(**options))


# ---------------------------------------------------------------- golden numbers (F1)

CHOSEN, CHOSEN_REF = [[-.5, -1, -.25], [-2, -.5, -.5, -1, -.25]], [[-.75, -1, -.5], [-1.5, -.5, -.5, -.75, -.25]]
REJECTED, REJECTED_REF = [[-1, -.5, -1.5, -.5], [-.75, -1.25]], [[-.75, -.5, -1, -.25], [-1, -.75]]
F1 = dict(gap=[1.5, 1.0], p=[.75, .75], p_w=[.8, .7], p_l=[.3, .35], kl_w=[.3, .6], kl_l=[.4, .2],
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
    values, mask = dense(rows, padding=-77.0)
    return dpo.response_logps(values, mask, mean=means)


def f1(means=False):
    """x of the losses at F1's inputs, of sums over tokens or of means."""
    a = total(CHOSEN, means) - total(CHOSEN_REF, means)
    b = total(REJECTED, means) - total(REJECTED_REF, means)
    given = {name: torch.tensor(values, dtype=torch.float64) for name, values in F1.items()}
    return SimpleNamespace(a=a, b=b, d=a - b, z=torch.tensor(.2, dtype=torch.float64), **given)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_golden_number(name):
    """One without it, and without its slow formula, cannot be added."""
    golden, options = GOLDEN[name]
    value = value_of(name, f1(), **options)
    assert value.shape == ({"single": 4}.get(unit_of(name), 2),), "33: one number a pair, or a response"
    close(value.mean(), golden, atol=1e-9)
    assert name in SLOW


def test_f1_per_token_means():
    """Each response by its own length: IPO as TRL has it; dpo_norm of Tülu 3."""
    close(f1().a, [.5, -.75]), close(f1().b, [-1, -.25])
    x = f1(means=True)
    close(x.a, [.5 / 3, -.75 / 5]), close(x.b, [-1 / 4, -.25 / 2])
    close(value_of("ipo", x).mean(), 23.1287847222, atol=1e-9)
    close(value_of("dpo", x, beta=5.0).mean(), .4374751984, atol=1e-9)


@pytest.mark.parametrize("per, n, golden", [("token", 8, .8197083479), ("pair", 2, .8130416812)])
def test_f1_likelihood_term(per, n, golden):
    """The mean over all chosen tokens, or over pairs of each one's mean."""
    x, cfg = f1(), dpo.Config(**QUICK | dict(data="x.jsonl", nll_coef=.2, nll_per=per))
    x.lw, x.n_w = total(CHOSEN), torch.tensor([3, 5])
    close(dpo.batch_loss(x, SimpleNamespace(n=2, n_nll=n), cfg), golden, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_what_it_needs_and_no_more(name):
    """Of x it has a and b, and what its words name."""
    _, *words = LOSSES[name][0].split()
    x, read = f1(), []

    class Watch:
        def __getattr__(self, word):
            read.append(word)
            return getattr(x, word)
    LOSSES[name][1](Watch(), hyper())
    assert set(read) - {"a", "b"} == set(words) - {"anchors"}


# ---------------------------------------------------------------- each loss and its gradient against a slow formula

def sg(x):
    return 1 / (1 + torch.exp(-torch.as_tensor(x)))


def sp(x):
    """-log σ(-x)."""
    return torch.log1p(torch.exp(x))


def kl2(p, q):
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


# Of one pair, or (of a good response, of a bad one).
SLOW = {
    "dpo": lambda x, h: sp(-h.beta * x.d),
    "cdpo": lambda x, h: (1 - h.eps) * sp(-h.beta * x.d) + h.eps * sp(h.beta * x.d),
    "robust": lambda x, h: ((1 - h.eps) * sp(-h.beta * x.d) - h.eps * sp(h.beta * x.d)) / (1 - 2 * h.eps),
    "ipo": lambda x, h: (x.d - .5 / h.beta) ** 2,
    "rso": lambda x, h: max(0 * x.d, 1 - h.beta * x.d),
    "gpo_exponential": lambda x, h: torch.exp(-h.beta * x.d),
    "gpo_squared": lambda x, h: (1 - h.beta * x.d) ** 2,
    "gpo_truncated": lambda x, h: max(0 * x.d, 1 - h.beta * x.d) ** 2,
    "gpo_savage": lambda x, h: (1 / (1 + torch.exp(h.beta * x.d))) ** 2,
    "rpo_squared": lambda x, h: (h.beta * x.d - h.eta * x.gap) ** 2,
    "rpo_backward": lambda x, h: kl2(sg(h.eta * x.gap), sg(h.beta * x.d)),
    "rpo_forward": lambda x, h: kl2(sg(h.beta * x.d), sg(h.eta * x.gap)),
    "dpop": lambda x, h: sp(-h.beta * (x.d - h.lam * max(0 * x.a, -x.a))),
    "tdpo1": lambda x, h: sp(-h.beta * (x.d - (x.kl_l - x.kl_w))),
    "tdpo2": lambda x, h: sp(-h.beta * (x.d - h.alpha * (x.kl_l - x.kl_w.detach()))),
    "d2o": lambda x, h: sp(h.alpha * x.b - h.beta * x.a),
    "sppo": lambda x, h: .5 * (x.a - h.eta * (x.p_w - .5)) ** 2 + .5 * (x.b - h.eta * (x.p_l - .5)) ** 2,
    "sppo_hard": lambda x, h: (x.a - .5 / h.beta) ** 2 + (x.b + .5 / h.beta) ** 2,
    "dno": lambda x, h: x.p * sp(-h.beta * x.d) + (1 - x.p) * sp(h.beta * x.d),
    "apo_zero": lambda x, h: 1 - sg(h.beta * x.a) + sg(h.beta * x.b),
    "kto": (lambda x, h: h.lam_up * (1 - sg(h.beta * (x.a - x.z))),
            lambda x, h: h.lam_down * (1 - sg(h.beta * (x.z - x.b)))),
    "dro": (lambda x, h: .5 * (x.r_w - x.v_w - h.beta * x.a) ** 2,
            lambda x, h: .5 * (x.r_l - x.v_l - h.beta * x.b) ** 2),
    "npo": (None, lambda x, h: 2 / h.beta * sp(h.beta * x.b)),
}




def parts_of(name):
    """The slow formula of a pair; or of a good response and of a bad one."""
    return SLOW[name] if isinstance(SLOW[name], tuple) else (SLOW[name], None)


@pytest.mark.parametrize("name", LOSSES)
def test_22_23_value_and_gradient_against_a_slow_loop(name):
    """In every number that the loss reads; the data's have no gradient to get wrong, the KLs of TDPO have."""
    for seed in range(3):
        h = hyper(beta=.3 + .4 * seed, eps=.2, lam=3.0, alpha=.7, eta=1.3, lam_up=1.4, lam_down=.6)
        torch.manual_seed(seed)
        x = SimpleNamespace(**{word: torch.rand(5).double() for word in F1}, z=torch.tensor(.3).double())
        x.a, x.b = 2 * torch.randn(2, 5).double()
        leaves = [x.a, x.b, x.kl_w, x.kl_l]
        for leaf in leaves:
            leaf.requires_grad_()
        x.d = x.a - x.b
        values = []
        for i in range(5):
            one = SimpleNamespace(**{word: v if word == "z" else v[i] for word, v in vars(x).items()})
            values += [f(one, h) for f in parts_of(name) if f]
        want, got = sum(values) / len(values), LOSSES[name][1](x, h).mean()
        close(got.detach(), want.detach())
        for a, b in zip(*(torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (got, want))):
            nothing = torch.zeros(5)
            close(nothing if a is None else a, nothing if b is None else b)


@pytest.mark.parametrize("mean", [False, True])
def test_22_response_logps_sum_up_what_is_inside_and_not_skipped(mean):
    """And so does their gradient; a response of one token, its end, has nothing left to average."""
    rows = ragged(0)
    values, mask = dense(rows, padding=1e9)
    skip = torch.zeros(mask.shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        skip[b, b % 3 + len(row) - 1] = True                            # the last of each row
    values.requires_grad_()
    for left_out, skipped in ((0, None), (1, skip)):
        got = dpo.response_logps(values, mask, skipped, mean)
        kept = [row[:len(row) - left_out] for row in rows]
        weight = [1 / max(1, len(row)) if mean else 1.0 for row in kept]
        close(got.detach(), [w * sum(row) for w, row in zip(weight, kept)])
        gradient, = torch.autograd.grad(got.sum(), values)
        close(gradient, dense([[w] * len(row) for w, row in zip(weight, kept)])[0])


# ---------------------------------------------------------------- identities

def grid(**given):
    """x over a grid of a and b."""
    a, b = torch.cartesian_prod(*[torch.linspace(-40, 40, 21, dtype=torch.float64)] * 2).T
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    given = {name: torch.full_like(a, float(value)).detach() for name, value in given.items()}
    return SimpleNamespace(a=a, b=b, d=a - b, **given)


DPO = [("cdpo", dict(eps=0.0), {}), ("robust", dict(eps=0.0), {}), ("dpop", dict(lam=0.0), {}),
       ("tdpo1", {}, dict(kl_w=0, kl_l=0)), ("tdpo1", {}, dict(kl_w=2, kl_l=2)), ("tdpo2", {}, dict(kl_w=0, kl_l=0)),
       ("tdpo2", dict(alpha=0.0), dict(kl_w=1, kl_l=3)), ("d2o", dict(alpha=.4), {}), ("dno", {}, dict(p=1)),
       ("rpo_backward", {}, dict(gap=500))]


@pytest.mark.parametrize("name, options, given", DPO, ids=[f"{n} {o or g}" for n, o, g in DPO])
def test_identity_with_dpo(name, options, given):
    """Value and gradient, all over the grid."""
    x = grid(**given)
    value, plain = (LOSSES[n][1](x, hyper(**(dict(beta=.4) | options))) for n in (name, "dpo"))
    close(value, plain, atol=1e-9)
    for g, want in zip(torch.autograd.grad(value.sum(), (x.a, x.b)), torch.autograd.grad(plain.sum(), (x.a, x.b))):
        close(g, want, atol=1e-9)


IDENTITIES = {  # two ways to say the same
    "gpo squared = 4τ² ipo": lambda x, tau: (
        value_of("gpo_squared", x, beta=2 * tau), 4 * tau ** 2 * value_of("ipo", x, beta=tau)),
    "truncated = rso²": lambda x, tau: (
        value_of("rso", x, beta=tau) ** 2, value_of("gpo_truncated", x, beta=tau)),
    "rso = hinge": lambda x, tau: (value_of("rso", x, beta=tau), (1 - tau * (x.a - x.b)).clamp(min=0)),
    "sppo hard = 2 sppo": lambda x, tau: (
        value_of("sppo_hard", x, beta=tau), 2 * value_of("sppo", x, eta=1 / tau)),
    "cdpo = dno at 1-ε": lambda x, tau: (
        value_of("cdpo", x, beta=tau, eps=.3), value_of("dno", x, beta=tau)),
    "tdpo1 = tdpo2 at α=1": lambda x, tau: (
        value_of("tdpo1", x, beta=tau), value_of("tdpo2", x, beta=tau, alpha=1.0)),
    "dpo = log(1 + exponential)": lambda x, tau: (
        value_of("gpo_exponential", x, beta=tau).log1p(), value_of("dpo", x, beta=tau)),
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("tau", [.05, .5])
def test_identity(name, tau):
    left, right = IDENTITIES[name](grid(kl_w=.3, kl_l=.8, p_w=1, p_l=0, p=.7), tau)
    close(left.detach(), right.detach(), atol=1e-6, rtol=1e-6)


def test_dno_differs_from_rpo_backward_by_the_entropy_alone():
    """Cross-entropy and KL to the same soft label have one gradient, so they share their fixed point."""
    x = grid(gap=1.2, p=1 / (1 + math.exp(-1.2)))
    gap = value_of("dno", x, beta=.2) - value_of("rpo_backward", x, beta=.2)
    p = x.p[0]
    close(gap.detach(), torch.full_like(gap, -(p * p.log() + (1 - p) * (1 - p).log())), atol=1e-8)


@pytest.mark.parametrize("name", ["dpo", "rso"] + [n for n in LOSSES if n.startswith("gpo_")])
def test_gpo_slope_at_0_is_negative(name):
    """GPO's condition for f: else the loss does not prefer the chosen. And f'(0) is what is known of each f."""
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    LOSSES[name][1](SimpleNamespace(d=d), hyper(beta=1.0)).sum().backward()
    close(d.grad, [dict(dpo=-.5, rso=-1, gpo_exponential=-1, gpo_squared=-2, gpo_truncated=-2, gpo_savage=-.25)[name]])


@pytest.mark.parametrize("eps", [.1, .2, .4])
def test_robust_is_unbiased_under_flips(eps):
    """(1-ε) of the labels right and ε flipped: the average of robust is the clean dpo loss; that of dpo is not."""
    x, h = grid(), hyper(eps=eps)
    flipped = SimpleNamespace(a=x.b, b=x.a, d=-x.d)
    noisy = {n: (1 - eps) * LOSSES[n][1](x, h) + eps * LOSSES[n][1](flipped, h) for n in ("robust", "dpo", "cdpo")}
    clean = LOSSES["dpo"][1](x, h)
    close(noisy["robust"], clean)
    assert (noisy["dpo"] - clean).abs().max() > .1
    close(noisy["dpo"], LOSSES["cdpo"][1](x, h))                        # cdpo is what dpo does on flipped labels


@pytest.mark.parametrize("beta", [.01, .1, 1.0, 5.0])
def test_npo_slope_at_the_start_is_1_for_any_beta(beta):
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value_of("npo", SimpleNamespace(b=b), beta=beta).sum().backward()
    close(b.grad, [1.0])


def test_f2_npo_slope_vanishes_once_forgotten():
    b = torch.tensor([0.0, -2, -20, -100], dtype=torch.float64, requires_grad=True)
    value_of("npo", SimpleNamespace(b=b)).sum().backward()
    close(b.grad, [1, .9003, .2384, .00009], atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_24_extreme_log_ratios_are_finite(name, dtype):
    """±500 nats on either side, value and gradient. e^(βd) itself leaves fp32 at βd = -88."""
    ends = [-500.0, -120.0, -1e-9, 0.0, 1e-9, 120.0, 500.0]
    beta = .1 if name == "gpo_exponential" and dtype == torch.float64 else .05 if name == "gpo_exponential" else 1.0
    a, b = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in zip(*itertools.product(ends, ends)))
    n = len(a)
    x = SimpleNamespace(a=a, b=b, d=a - b, z=torch.zeros((), dtype=dtype), gap=torch.full((n,), 500.0, dtype=dtype),
                        **{k: torch.rand(n, dtype=dtype) for k in "p p_w p_l kl_w kl_l r_w r_l v_w v_l".split()})
    for gap in (500.0, -500.0, 0.0):
        x.gap = torch.full((n,), gap, dtype=dtype)
        value = LOSSES[name][1](x, hyper(beta=beta))
        got = torch.autograd.grad(value.sum(), (a, b), retain_graph=True, allow_unused=True)
        assert value.isfinite().all() and value.dtype == dtype
        assert all(g.isfinite().all() for g in got if g is not None)


def test_24_log_sigmoid_against_fifty_digits():
    decimal.getcontext().prec = 50
    for size, sign in itertools.product([1e-12, 1e-6, .1, 1.0, 10.0, 40.0, 120.0, 500.0], (1, -1)):
        d = torch.tensor([sign * size], dtype=torch.float64)
        exact = (1 + (-decimal.Decimal(sign * size)).exp()).ln()
        assert LOSSES["dpo"][1](SimpleNamespace(d=d), hyper(beta=1.0)).item() == pytest.approx(float(exact), rel=1e-12)


def test_24_bernoulli_kl_is_a_kl():
    s = torch.linspace(-30, 30, 61, dtype=torch.float64)
    all_s, all_t = s[:, None].expand(61, 61), s[None].expand(61, 61)
    kl = dpo.bernoulli_kl(all_s, all_t)
    assert (kl >= -1e-15).all() and kl.diagonal().abs().max() < 1e-15
    close(dpo.bernoulli_kl(torch.tensor(2.0), torch.tensor(-1.0)), kl2(sg(2.0), sg(-1.0)), atol=1e-6)


# ---------------------------------------------------------------- files for the loop

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, pairs = tmp_path_factory.mktemp("data"), preferences(44)
    bare, margins, thumbs, prompts = [], [], [], []
    for i, row in enumerate(pairs):
        prompt = {key: value for key, value in row.items() if key not in ("responses", "scores", "win")}
        prompts.append(prompt)
        bare.append(prompt | dict(responses=row["responses"]))
        margins.append(bare[-1] | dict(margin=i % 3))
        thumbs.append(prompt | dict(response=row["responses"][i % 2], label=i % 3 > 0))
    made = dict(pairs=pairs, bare=bare, margins=margins, thumbs=thumbs, prompts=prompts, ranks=preferences(24, 3))
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in made.items()}


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


# ---------------------------------------------------------------- the sequence KL of TDPO

def slow_kl(policy, ref, ids, start):
    """Σ_t KL(π_ref || π) over the whole vocabulary, of one unpadded row."""
    logp, base = distributions(policy, ids, start), distributions(ref, ids, start).detach()
    return (base.exp() * (base - logp)).sum()


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_sequence_kl_against_a_slow_loop_over_the_vocabulary(chunk):
    """And its gradient goes through the policy alone."""
    policy, ref = random_policy(0).double().eval(), random_policy(1).double().eval()
    rng, rows = random.Random(0), []
    for _ in range(5):
        start, said = rng.randint(1, 9), rng.randint(1, 20)
        rows.append(([rng.randrange(TOK.base) for _ in range(start + said)], start))
    tokens, mask = data.collate([(ids, [0] * start + [1] * (len(ids) - start)) for ids, start in rows], TOK)
    got, want = dpo.sequence_kl(policy, ref, tokens, mask, chunk=chunk), [slow_kl(policy, ref, *row) for row in rows]
    assert min(want) > .1 and got.shape == (5,)
    close(got.detach(), torch.stack(want).detach())
    weight = torch.tensor([1.0, -2, .5, 3, 1], dtype=torch.float64)
    (got * weight).sum().backward()
    slow = torch.autograd.grad((torch.stack(want) * weight).sum(), list(policy.parameters()))
    for p, slope in zip(policy.parameters(), slow):
        close(p.grad, slope)
    assert all(p.grad is None for p in ref.parameters()), "a gradient reached the reference"


# ---------------------------------------------------------------- the loop against a second loop

def slow_items(cfg, rows):
    """What the loop should make of records: a prompt's ids, good and bad responses (ids), and what is known of them."""
    out = []
    for row in rows:
        prompt, texts = TOK.prompt(row["prompt"]), row.get("responses") or [row["response"]]
        said = [TOK.response(text) for text in texts]
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
    unit, out, last = unit_of(cfg.loss), [], len(said) - 1
    for i, j in itertools.combinations(range(len(said)), 2):
        if (i, j) != (0, last) and (cfg.pairs == "ends" or unit != "pair"):
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
    return SimpleNamespace(prompt=prompt, good=good, bad=bad, gap=gap, win=win, r=r)


def as_unit(unit, prompt, good, bad, gap, win, r):
    """A pair, or its two responses each by itself."""
    if unit == "pair":
        return [item(prompt, [good], [bad], gap, win)]
    return [item(prompt, [good], [], gap, win, r[0]), item(prompt, [], [bad], gap, win, r[1])]


def sampled_items(cfg, drawn):
    """Online: of the k samples to each prompt the best against the worst. drawn: (record, k rows, k scores) each."""
    out = []
    for record, rows, scores in drawn:
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if best == worst:
            continue
        win = []
        for i in (best, worst):
            beats = [float(sg(scores[i] - other)) for j, other in enumerate(scores) if j != i]
            win.append(sum(beats) / len(beats))
        (ids, start), (other, _) = rows[best], rows[worst]
        r = [scores[best], scores[worst]]
        out += as_unit(unit_of(cfg.loss), ids[:start], ids[start:], other[start:], r[0] - r[1], win, r)
    return out


class Slow:
    """DPO and its kin again, from the papers: one row at a time, no padding, no micro-batches."""

    def __init__(self, cfg, total):
        self.cfg, self.policy, self.ref = cfg, load_model(cfg.init, Setup(TOK)), load_model(cfg.init)
        self.critic = None
        self.optimizers = [runs.SlowOptimizer(self.policy, cfg.lr, total, cfg)]
        if cfg.loss == "dro":
            self.critic = load_model(cfg.init, n_scores=1)
            self.optimizers.append(runs.SlowOptimizer(self.critic, cfg.critic_lr, total, cfg))

    def said(self, prompt, response):
        """log π of a response's tokens, and the log-ratio that the preference term takes of them."""
        ids, start = prompt + response, len(prompt)
        logp, _ = spoken(self.policy, ids, start)
        gaps = logp - spoken(self.ref, ids, start)[0].detach()
        kept = [gap for gap, token in zip(gaps, response) if not (self.cfg.mask_end and token == TOK.end)]
        ratio = sum(kept) + 0 * logp.sum()
        return logp, ratio / max(1, len(kept)) if self.cfg.length_norm else ratio

    def measure(self, items, others):
        """-> the loss of a batch, to differentiate, and its metrics. others: KTO's mismatched rows."""
        c, values, likely = self.cfg, [], []
        z = None
        if others:
            with torch.no_grad():
                z = torch.stack([self.said(*other)[1] for other in others]).mean().clamp(min=0)
        right, of_good, of_bad = [], [], []
        of_a_good, of_a_bad = parts_of(c.loss)
        for one in items:
            x = SimpleNamespace(z=z, gap=one.gap)
            good = [self.said(one.prompt, response) for response in one.good]
            bad = [self.said(one.prompt, response) for response in one.bad]
            likely += [logp for logp, _ in good]
            of_bad += bad
            if good:
                x.a = sum(ratio for _, ratio in good) / len(good)
                of_good.append((good, x.a))
            if bad:
                x.b = bad[0][1]
            if good and bad:
                x.d = x.a - x.b
                right.append(float(x.d > 0) if abs(x.d) > 1e-9 else None)
                if c.margin:
                    x.d = x.d - c.margin / c.beta * x.gap
            if one.win:
                (x.p_w, x.p_l), x.p = one.win, float(sg(one.gap))
            if "kl_w" in LOSSES[c.loss][0]:
                ids, start = one.prompt, len(one.prompt)
                x.kl_w, x.kl_l = (slow_kl(self.policy, self.ref, ids + y[0], start) for y in (one.good, one.bad))
            if self.critic:
                x.r_w = x.r_l = one.r
                x.v_w = x.v_l = self.critic.score(self.critic(torch.tensor([one.prompt]))[0, -1])[0]
            of_this = of_a_good if good else of_a_bad
            values += [of_this(x, c)] if of_this else []
        loss = sum(values) / max(1, len(values))
        if c.nll_coef:
            nll = [-logp.mean() for logp in likely] if c.nll_per == "pair" else -torch.cat(likely)
            loss = loss + c.nll_coef * sum(nll) / len(nll)
        chosen, rejected = runs.mean(a for _, a in of_good), runs.mean(b for _, b in of_bad)
        metrics = {"loss": loss.item(), "rewards/chosen": c.beta * chosen, "rewards/rejected": c.beta * rejected,
                   "rewards/margin": c.beta * (chosen - rejected), "logps/chosen": runs.mean(y.sum() for y in likely),
                   "logps/rejected": runs.mean(y.sum() for y, _ in of_bad)}
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

    def evaluation(self, step, held, others, prompts, watched):
        """Held-out items by the same loss, held-out prompts answered by the policy as it is now."""
        metrics = {}
        if held:
            metrics = {f"val_{name}": value for name, value in self.measure(held, others)[1].items()}
        asked, roll = watched.rollouts[-1]
        assert [own["prompt"] for own in asked] == [own["prompt"] for own in prompts], "no held-out prompts"
        torch.manual_seed(self.cfg.seed)
        again = model.respond(self.policy, prompts, self.cfg)
        assert rows_in(again) == rows_in(roll), "the policy as it is now, seeded, says something else"
        seen = runs.slow_evaluation(self.policy, self.ref, asked, roll, lambda *_: 0.0, self.cfg.temperature)
        lengths = [len(ids) - start for ids, start in rows_in(roll)]
        return metrics | dict(kl=seen["val_kl"], gold=seen["val_gold"], response_length=runs.mean(lengths))


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
    "dpo, all of a ranking": dict(file="ranks"),
    "sppo, ends of a ranking": dict(loss="sppo", file="ranks", pairs="ends"),
    "d2o, two anchors": dict(loss="d2o", file="ranks"),
    "dro, a ranking": dict(loss="dro", file="ranks", seed=2, warmup=1, critic_lr=3e-2),
    "kto, thumbs": dict(loss="kto", file="thumbs", lam_up=1.3, lam_down=.7),
    "kto, z below 0": dict(loss="kto", file="thumbs", lam_up=.02, lr=1e-2),
    "kto, reference moved": dict(loss="kto", file="thumbs", ref_every=1),
    "dro, thumbs": dict(loss="dro", file="thumbs"),
    "npo, thumbs": dict(loss="npo", file="thumbs"),
    "online": dict(online=True, k=4, missing_end=.3, temperature=1.3, seed=4),
    "online, sppo": dict(online=True, loss="sppo", k=3),
    "online, kto": dict(online=True, loss="kto", k=2),
}


def watch_mismatched(monkeypatch):
    """KTO's mismatched row of each single response, which the loop draws: a dict (ids, good?) -> (prompt, response)."""
    mates, real = {}, dpo.add_mismatched

    def watched(items, block_size):
        real(items, block_size)
        for single in items:
            (ids, _), = single["rows"]
            other, target = single["other"]
            start = target.index(1)
            mates[tuple(ids), single["up"][0]] = other[:start], other[start:]
    monkeypatch.setattr(dpo, "add_mismatched", watched)
    return mates


def mismatched(cfg, items, mates):
    if cfg.loss != "kto":
        return []
    out = [mates[tuple(one.prompt + (one.good + one.bad)[0]), bool(one.good)] for one in items]
    assert all(prompt == one.prompt for (prompt, _), one in zip(out, items))
    return out


@pytest.mark.parametrize("name", LOOPS)
def test_19_36_loop_equals_a_slow_loop(name, files, tiny, tmp_path, monkeypatch, float64):
    """Every logged number of every step, evaluations included, and every weight at the end, in float64."""
    options = QUICK | LOOPS[name] | dict(init=tiny, out=str(tmp_path / "run"), eval_every=2, reward="test_dpo:unlike")
    path = files[options.pop("file", "prompts" if "online" in options else "pairs")]
    another = random_policy(1).double() if options.pop("another", False) else None
    if another:
        monkeypatch.setattr(dpo, "reference", lambda policy: another)
    cfg = dpo.Config(**runs.QUICK | options | dict(data=path))
    steps, mates = runs.watch_steps(monkeypatch), watch_mismatched(monkeypatch)
    rows = runs.train(dpo, **options | dict(data=path))
    monkeypatch.undo()

    every = lines(path)
    held = [row for i, row in enumerate(every) if i % 20 == 19]
    stream = data.Stream(items=slow_items(cfg, [row for row in every if row not in held]) if not cfg.online else [],
                         seed=cfg.seed)
    if cfg.online:
        questions, _ = data.open_stream(path, "prompt", cfg.seed, n_held=64)
    total = cfg.steps or math.ceil(cfg.epochs * len(stream.items) / cfg.batch)
    assert len(rows) == total, f"{len(rows)} steps instead of {total}"
    held_items = [] if cfg.online else slow_items(cfg, held)
    slow = Slow(cfg, total)
    slow.ref = another or slow.ref
    for step, (row, watched) in enumerate(zip(rows, steps)):
        if cfg.online:
            records, roll = watched.rollouts[0]
            assert records == questions.batch(step, cfg.batch), "other prompts were asked for"
            drawn, scores = [], []
            said = rows_in(roll)
            for i, record in enumerate(records):
                group = said[i * cfg.k:(i + 1) * cfg.k]
                scores = [unlike(record, text_of(own), True) - cfg.missing_end * (not ends(own)) for own in group]
                drawn.append((record, group, scores))
            items = sampled_items(cfg, drawn)
            seen = dict(items=len(items), reward=runs.mean(itertools.chain(*(own for *_, own in drawn))))
        else:
            items, seen = stream.batch(step, cfg.batch), {}
        want = slow.step(step, items, mismatched(cfg, items, mates)) | seen
        if step % 2 or step + 1 == total:
            prompts = data.read_records(path, "prompt" if cfg.online else None)
            prompts = [record for i, record in enumerate(prompts) if i % 20 == 19]
            others = mismatched(cfg, held_items, mates)
            want |= slow.evaluation(step, held_items, others, prompts, watched)
        runs.compare_rows(step, row, want, tied=("rewards/accuracy", "val_rewards/accuracy"))
    runs.compare_weights(weights(cfg.out), slow.policy)
    if slow.critic:
        runs.compare_weights(weights(cfg.out, "critic"), slow.critic)


# ---------------------------------------------------------------- the loop: pitfalls

@pytest.mark.parametrize("name", LOSSES)
def test_21_policy_equals_reference_at_step_0(name, files, tiny, tmp_path):
    """Every margin is 0, in fp32, so the loss is known without a model: ln 2 for dpo. The gradient is not 0."""
    row, = train(tmp_path / "a", tiny, files["pairs"], loss=name, steps=1, batch=42, micro_tokens=100_000)
    at_0 = {"ipo": 25.0, "rso": 1, "gpo_exponential": 1, "gpo_squared": 1, "gpo_truncated": 1, "gpo_savage": .25,
            "apo_zero": 1, "kto": .5, "npo": 20 * LN2, "sppo_hard": 50.0}
    _, *words = LOSSES[name][0].split()
    if not {"gap", "p", "p_w", "r_w"} & set(words):      # theirs depends on the data
        assert row["loss"] == pytest.approx(at_0.get(name, LN2), abs=1e-6)
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/margin"] == 0
    assert row.get("rewards/accuracy", .5) == .5 and row["grad_norm"] > 1e-3


def test_c17_nll_keeps_the_chosen_likely(files, tiny, tmp_path):
    free, held = (train(tmp_path / str(c), tiny, files["pairs"], nll_coef=c, steps=12, lr=3e-3, batch=42)
                  for c in (0.0, 1.0))
    assert held[-1]["logps/chosen"] > held[0]["logps/chosen"] and held[-1]["logps/chosen"] > free[-1]["logps/chosen"]
    assert held[-1]["rewards/margin"] > 0


def single(prompt, response):
    """An item of one good response."""
    return dpo.make_item({}, [(prompt + response, [0] * len(prompt) + [1] * len(response))], [True])


@pytest.mark.parametrize("n", range(1, 8))
def test_37_kto_mismatched_partners(n):
    """Every size: the own prompt with another prompt's response, never one's own, also where a prompt comes twice."""
    for prompts in (list(range(n)), [i // 2 for i in range(n)], [0] * (n - 1) + [1]):
        items = [single([p, 9], [100 + 10 * p, i]) for i, p in enumerate(prompts)]
        if len(set(prompts)) < 2:
            with pytest.raises(UserError, match="one prompt"):
                dpo.add_mismatched(items, 64)
            continue
        dpo.add_mismatched(items, 64)
        for own, p in zip(items, prompts):
            ids, target = own["other"]
            assert ids[:2] == [p, 9] and ids[2] != 100 + 10 * p and target == [0, 0, 1, 1]


def test_37_kto_partners_are_good_and_bad_alike():
    """Pairs come as good, bad, good, bad; a mismatched response is as often the one as the other, to either. The order
    is that of PyTorch's generator."""
    rng, items, drawn = random.Random(0), [], []
    for p in range(10, 510):
        prompt = [p] + [5] * rng.randint(1, 9)
        for kind in (1, 2):
            items.append(single(prompt, [600 + p] * rng.randint(0, 6) + [kind]))
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        dpo.add_mismatched(items, 64)
        drawn.append([own["other"] for own in items])
    assert drawn[0] == drawn[2] != drawn[1]
    partners = [ids[-1] for ids, _ in drawn[0]]
    for side in (partners[::2], partners[1::2]):
        assert .4 < side.count(1) / len(side) < .6
    dpo.add_mismatched(items, 12)
    for own in items:
        (ids, target), start = own["other"], own["rows"][0][1].index(1)
        assert len(ids) == len(target) <= 12 and ids[:start] == own["rows"][0][0][:start] and sum(target) > 0


def test_37_kto_small_files(tiny, tmp_path):
    """A file too small for two held-out prompts can still be learnt from; one of a single prompt cannot."""
    some = [dict(prompt=str(i), response="yes" * (1 + i % 3), label=i % 2 == 0) for i in range(12)]
    assert len(train(tmp_path / "a", tiny, write(tmp_path / "t.jsonl", some), loss="kto")) == 3
    with pytest.raises(UserError, match="one prompt"):
        train(tmp_path / "b", tiny, write(tmp_path / "u.jsonl", [row | dict(prompt="one") for row in some]), loss="kto")


@pytest.mark.parametrize("options", [dict(loss="dpo"), dict(loss="kto"), dict(loss="dpo", lora_r=2)], ids=str)
def test_the_reference_reads_what_the_steps_will_see_and_no_more(options, files, tiny, tmp_path, monkeypatch):
    """One step of 4 items and the 2 held-out records; a run that goes on, only what its last step sees."""
    known, log, real = [], data.Run.log, dpo.FromFile.read_by

    def read_by(self, *args):
        ref = real(self, *args)
        known.append(sum("ref" in own for own in self.stream.items + self.held))
        return ref

    def interrupted(self, step, *args, **metrics):
        if step == 7:
            raise runs.Killed
        log(self, step, *args, **metrics)
    monkeypatch.setattr(dpo.FromFile, "read_by", read_by)
    options = options | dict(batch=4, micro_tokens=64)
    train(tmp_path / "a", tiny, files["pairs"], steps=1, **options)
    held = 4 if options["loss"] == "kto" else 2         # two thumbs a pair
    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        patch.setattr(data.Run, "log", interrupted)
        train(tmp_path / "b", tiny, files["pairs"], steps=8, save_every=7, **options)
    train(tmp_path / "b", tiny, files["pairs"], steps=8, save_every=7, **options)
    assert known[:2] == [4 + held, 32 + held] and known[2] < 16 + held


# ---------------------------------------------------------------- shapes of feedback (C21)

def test_c21_a_pair_of_a_ranking_has_its_own_gap_and_win_rates():
    record = dict(prompt=[dict(role="user", content="?")], responses=["a", "b", "c"], scores=[3, 1, -1],
                  win=[.9, .5, .1])
    pairs = [dpo.make_item(part, [([], [])] * 2, [True, False]) for part in data.pairs(record)]
    assert [pair["gap"] for pair in pairs] == [2, 4, 2]
    assert [[pair["p_w"], pair["p_l"]] for pair in pairs] == [[.9, .5], [.9, .1], [.5, .1]]
    pair = dpo.make_item(dict(margin=1.0, prob=.3), [0, 0], [True, False])
    assert pair["p"] == .3 and pair["gap"] == 1 and pair["r"] == [1, 0]


@pytest.mark.parametrize("where", [3, 19])
def test_a_single_record_without_a_gap_is_found_held_out_or_not(where, files, tiny, tmp_path):
    """dno takes its p from `prob`, but a margin needs scores, which one record lacks; a loss that needs none does not
    mind."""
    rows = lines(files["pairs"])
    rows[where] = {key: rows[where][key] for key in ("prompt", "responses")} | dict(prob=.8)
    path = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError, match="--loss dno needs to know how much better"):
        train(tmp_path / "a", tiny, path, loss="dno", margin=.5)
    assert len(train(tmp_path / "b", tiny, path, loss="dno")) == len(train(tmp_path / "c", tiny, path)) == 3


def test_26_overlong_prompts_and_responses(tiny, tmp_path):
    """Both keep part of the context: no empty response, no NaN."""
    some = []
    for n, m, k in itertools.product((1, 30, 90), repeat=3):
        some.append(dict(prompt="why " * n, responses=["yes " * m, "no " * k]))
    path = write(tmp_path / "d.jsonl", some)
    for loss in ("dpo", "kto", "tdpo2"):
        for row in train(tmp_path / loss, tiny, path, loss=loss, mask_end=True, length_norm=loss != "tdpo2"):
            assert math.isfinite(row["loss"]) and row["grad_norm"] > 0


def test_npo_of_a_batch_without_a_bad_response_is_no_division_by_0(tiny, tmp_path):
    rows = [dict(prompt=str(i), response="yes", label=not (i % 20 == 19 or i == 7)) for i in range(40)]
    seen = train(tmp_path / "a", tiny, write(tmp_path / "d.jsonl", rows), loss="npo", batch=2, steps=19)
    assert any(row["logps/rejected"] is None for row in seen) and all(math.isfinite(row["loss"]) for row in seen)


# ---------------------------------------------------------------- online

def test_offline_never_samples_before_the_evaluation(files, tiny, tmp_path, monkeypatch):
    steps = runs.watch_steps(monkeypatch)
    train(tmp_path / "a", tiny, files["pairs"], steps=4)
    assert [len(step.rollouts) for step in steps] == [0, 0, 0, 1]


def test_online_pairs_take_nothing_of_what_a_file_says_of_its_own_answers(tiny):
    """Prompts may come from a file of labelled pairs: its `prob` and `margin` are about other responses."""
    asked = [dict(prompt=[dict(role="user", content=f"Q{i}")], prob=.9, margin=7.0, key="kept") for i in range(4)]
    prompts = [TOK.prompt(record["prompt"]) for record in asked]
    rows = model.generate(load_model(tiny, Setup(TOK)), prompts, 4, 2).rows()
    cfg = dpo.Config(online=True, steps=1, loss="dno", k=2)
    items = dpo.best_and_worst(asked, rows, torch.arange(8).view(4, 2) * .5, cfg)
    assert len(items) == 4
    for own in items:
        assert own["gap"] == .5 and own["record"]["key"] == "kept"
        assert own["p"] == pytest.approx(float(sg(.5)))


@pytest.mark.parametrize("loss", ["dpo", "kto", "npo"])
def test_online_ties_give_no_pair(loss, files, tiny, tmp_path, monkeypatch):
    """Nothing is learnt then. And a batch in which one prompt alone is no tie is bad luck, no reason to end the run."""
    options = dict(online=True, missing_end=0.0, loss=loss, k=3)
    rows = train(tmp_path / "a", tiny, files["prompts"], reward="runs:nothing", **options)
    assert len(rows) == 3 and all("loss" not in row and row["reward"] == 1 for row in rows)
    assert same(weights(tmp_path / "a"), weights(tiny))
    monkeypatch.setitem(data.VERIFIERS, "rare", lambda record, text, _: len(text) * runs.asked(record).startswith("0"))
    assert len(train(tmp_path / "b", tiny, files["prompts"], reward="rare", batch=42, **options)) == 3


def test_online_improves_the_reward(files, tiny, tmp_path):
    """The mean reward of the policy's own samples rises."""
    rows = train(tmp_path / "a", tiny, files["prompts"], online=True, reward="runs:vowels", k=4, steps=20, batch=16,
                 lr=5e-3)
    rewards = [row["reward"] for row in rows]
    assert runs.mean(rewards[-4:]) > runs.mean(rewards[:4]) + .05


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
    (dict(loss="rpo_squared"), "bare", "scores"), (dict(loss="dno"), "bare", "scores"),
    (dict(margin=.5), "bare", "margin"), (dict(loss="dpo"), "thumbs", "preference"), (dict(online=True, reward="nowhere"), "prompts", "nowhere")], ids=str)
def test_refusals_of_what_is_in_a_file(options, file, word, files, tiny, tmp_path):
    with pytest.raises(UserError, match=word):
        train(tmp_path / "a", tiny, files[file], **options)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- the one-token bandit (F2)

@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    return bandit_game(tmp_path_factory.mktemp("bandit"))[0]


def duels(share, scores=False):
    """Records over the six pairs of arms, worth 0, 1, 2, 3; share: gap -> (how often the better won, of how many)."""
    out = []
    for i, j in itertools.combinations(range(4), 2):
        won, n = share[j - i]
        for k in range(n):
            w, l = (j, i) if k < won else (i, j)
            record = dict(prompt=[dict(role="user", content="?")], responses=[ARMS[w], ARMS[l]])
            out.append(record | (dict(scores=[w, l]) if scores else {}))
    for i in range(19, len(out) * 20 // 19, 20):                         # what is held out is none of them
        out.insert(i, out[0])
    return out + out[:1] * (len(out) < 20)


def learn(bandit, folder, rows, steps=120, lr=3e-2, **options):
    """Full batches, the end token left out: one token a response, and the exact gradient. -> policy, metrics."""
    path = write(folder / "d.jsonl", rows)
    options = dict(beta=1.0, mask_end=True, max_new=80, batch=len(rows) - max(1, len(rows) // 20)) | options
    rows = train(folder / "run", bandit, path, steps=steps, lr=lr, **options)
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
    """M12's sign test, on a model that has seen sums: after 100 steps log π(chosen) has fallen in nearly all pairs with
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
