"""dpo.py: every loss against its golden number and a slow loop, the identities between them, the loop against a second
loop, and the fixed points of a one-token bandit. The slow code works on plain lists, one row at a time."""
import contextlib
import decimal
import itertools
import json
import math
import random
import runpy
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import dpo
import sft
import model as models
import policies
from data import Tokenizer, UserError
from dpo import LOSSES
from model import GPT, GPTConfig, Setup, load_model, save_checkpoint
from policies import bandit_policy, patch, random_policy

TOK = Tokenizer.load("toy")
LN2 = math.log(2)
def unit_of(name):
    return LOSSES[name][0].split()[0]


H = dict(beta=.1, eps=.1, lam=50.0, alpha=.5, eta=1.0, lam_up=1.0, lam_down=1.0)


def hyper(**options):
    return SimpleNamespace(**(H | options))


def close(x, y, atol=1e-10, rtol=0.0):
    torch.testing.assert_close(torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64),
                               atol=atol, rtol=rtol)


def dense(rows, width=9, garbage=-77.0):
    """Ragged lists -> (values (B, width) in float64, mask); row b starts at column b % 3, the rest is garbage."""
    out, mask = torch.full((len(rows), width), garbage, dtype=torch.float64), torch.zeros(len(rows), width)
    for b, row in enumerate(rows):
        out[b, b % 3:b % 3 + len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[b, b % 3:b % 3 + len(row)] = 1
    return out, mask


# ---------------------------------------------------------------- golden numbers (F1)

CHOSEN, CHOSEN_REF = [[-.5, -1, -.25], [-2, -.5, -.5, -1, -.25]], [[-.75, -1, -.5], [-1.5, -.5, -.5, -.75, -.25]]
REJECTED, REJECTED_REF = [[-1, -.5, -1.5, -.5], [-.75, -1.25]], [[-.75, -.5, -1, -.25], [-1, -.75]]
F1 = dict(gap=[1.5, 1.0], p=[.75, .75], p_w=[.8, .7], p_l=[.3, .35], kl_w=[.3, .6], kl_l=[.4, .2],
          r_w=[2.0, 1.0], r_l=[.5, 0.0], v_w=[.7, -.2], v_l=[.7, -.2])

GOLDEN = {  # loss: (value at F1's inputs, what differs from H); F1 has no dro, so it is worked out here:
    # r - V - β·log-ratio is 2-.7-.05 = 1.25, 1+.2+.075 = 1.275 for the good and .5-.7+.1 = -.1, 0+.2+.025 = .225 for
    # the bad, with V = .7 and -.2; the mean of their four squares is .8121875, and half of it the loss.
    "dpo": (.6697083479, {}), "cdpo": (.6747083479, {}), "robust": (.6634583479, {}), "ipo": (21.25, {}),
    "rso": (.95, {}), "gpo_exponential": (.9559895364, {}), "gpo_truncated": (.9125, {}),
    "gpo_savage": (.2383123647, {}), "gpo_squared": (.9125, {}), "rpo_squared": (1.4625, {}),
    "rpo_backward": (.1480393904, {}), "rpo_forward": (.1689251224, {}), "dpop": (5.9466300707, dict(beta=.3)),
    "tdpo1": (.6618774314, {}), "tdpo2": (.6657663414, {}), "npo": (13.2512196360, {}),
    "d2o": (.6697083479, dict(alpha=.1)), "sppo": (48006.71875, dict(eta=1e3)),
    "sppo_hard": (499500.9375, dict(beta=1e-3)), "dno": (.6822083479, {}), "kto": (.4937551407, {}),
    "apo_zero": (.9875074787, {}), "dro": (.40609375, {}),
}


def f1(mean=False, grad=False):
    """x of the losses at F1's inputs, from padded token log-probs; with grad also those of the policy."""
    chosen, rejected = (dense(rows)[0].requires_grad_(grad) for rows in (CHOSEN, REJECTED))
    a = dpo.response_logps(chosen, dense(CHOSEN)[1], mean=mean) - dpo.response_logps(*dense(CHOSEN_REF), mean=mean)
    b = dpo.response_logps(rejected, dense(REJECTED)[1], mean=mean) - dpo.response_logps(*dense(REJECTED_REF), mean=mean)
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in F1.items()}
    return SimpleNamespace(a=a, b=b, d=a - b, z=torch.tensor(.2, dtype=torch.float64), **given), chosen, rejected


def test_every_loss_has_a_golden_number():
    """A loss without its number cannot be added."""
    assert set(LOSSES) == set(GOLDEN) == set(SLOW)
    assert {unit_of(name) for name in LOSSES} == {"pair", "single", "bad"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_what_it_needs_and_no_more(name):
    """Of x it has a and b, and what its words name."""
    _, *words = LOSSES[name][0].split()
    x, *_ = f1()
    x = SimpleNamespace(a=x.a, b=x.b, **{word: getattr(x, word) for word in words if word != "anchors"})
    read = []

    class Watch:
        def __getattr__(self, word):
            read.append(word)
            return getattr(x, word)
    LOSSES[name][1](Watch(), hyper())
    assert set(read) - {"a", "b"} == set(words) - {"anchors"}


@pytest.mark.parametrize("name", GOLDEN)
def test_f1_golden_number(name):
    golden, options = GOLDEN[name]
    value = LOSSES[name][1](f1()[0], hyper(**options))
    assert value.shape == ({"single": 4}.get(unit_of(name), 2),) and value.dtype == torch.float64     # 33: (N,)
    close(value.mean(), golden, atol=1e-9)


def test_f1_inputs_and_the_two_lengths():
    x, *_ = f1()
    close(x.a, [.5, -.75]), close(x.b, [-1, -.25]), close(x.d, [1.5, -.5])
    x, *_ = f1(mean=True)
    close(x.a, [.5 / 3, -.75 / 5]), close(x.b, [-1 / 4, -.25 / 2])


@pytest.mark.parametrize("name, beta, golden", [("ipo", .1, 23.1287847222), ("dpo", 5.0, .4374751984)])
def test_f1_per_token_means(name, beta, golden):
    """IPO as TRL has it; dpo_norm of Tülu 3."""
    close(LOSSES[name][1](f1(mean=True)[0], hyper(beta=beta)).mean(), golden, atol=1e-9)


# ---------------------------------------------------------------- each loss and its gradient against a slow loop

def sg(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def sp(x):
    """log(1 + e^x) = -log σ(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def kl2(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


# Of one pair, or (of a good response, of a bad one).
SLOW = {
    "dpo": lambda x, h: sp(-h.beta * x.d),
    "cdpo": lambda x, h: (1 - h.eps) * sp(-h.beta * x.d) + h.eps * sp(h.beta * x.d),
    "robust": lambda x, h: ((1 - h.eps) * sp(-h.beta * x.d) - h.eps * sp(h.beta * x.d)) / (1 - 2 * h.eps),
    "ipo": lambda x, h: (x.d - .5 / h.beta) ** 2,
    "rso": lambda x, h: max(0.0, 1 - h.beta * x.d),
    "gpo_exponential": lambda x, h: math.exp(-h.beta * x.d),
    "gpo_squared": lambda x, h: (1 - h.beta * x.d) ** 2,
    "gpo_truncated": lambda x, h: max(0.0, 1 - h.beta * x.d) ** 2,
    "gpo_savage": lambda x, h: (1 / (1 + math.exp(h.beta * x.d))) ** 2,
    "rpo_squared": lambda x, h: (h.beta * x.d - h.eta * x.gap) ** 2,
    "rpo_backward": lambda x, h: kl2(sg(h.eta * x.gap), sg(h.beta * x.d)),
    "rpo_forward": lambda x, h: kl2(sg(h.beta * x.d), sg(h.eta * x.gap)),
    "dpop": lambda x, h: sp(-h.beta * (x.d - h.lam * max(0.0, -x.a))),
    "tdpo1": lambda x, h: sp(-h.beta * (x.d - (x.kl_l - x.kl_w))),
    "tdpo2": lambda x, h: sp(-h.beta * (x.d - h.alpha * (x.kl_l - x.kl_w))),
    "d2o": lambda x, h: sp(h.alpha * x.b - h.beta * x.a),
    "sppo": lambda x, h: .5 * (x.a - h.eta * (x.p_w - .5)) ** 2 + .5 * (x.b - h.eta * (x.p_l - .5)) ** 2,
    "sppo_hard": lambda x, h: (x.a - .5 / h.beta) ** 2 + (x.b + .5 / h.beta) ** 2,
    "dno": lambda x, h: x.p * sp(-h.beta * x.d) + (1 - x.p) * sp(h.beta * x.d),
    "apo_zero": lambda x, h: 1 - sg(h.beta * x.a) + sg(h.beta * x.b),
    "kto": (lambda x, h: h.lam_up * (1 - sg(h.beta * (x.a - x.z))), lambda x, h: h.lam_down * (1 - sg(h.beta * (x.z - x.b)))),
    "dro": (lambda x, h: .5 * (x.r_w - x.v_w - h.beta * x.a) ** 2, lambda x, h: .5 * (x.r_l - x.v_l - h.beta * x.b) ** 2),
    "npo": (None, lambda x, h: 2 / h.beta * sp(h.beta * x.b)),
}


def slow_mean(name, xs, h):
    """Mean loss of a list of x, each of one pair."""
    parts = SLOW[name] if isinstance(SLOW[name], tuple) else (SLOW[name],)
    values = [f(x, h) for x in xs for f in parts if f]
    return sum(values) / len(values)


def random_batch(seed):
    """Ragged token log-probs of four kinds of rows, and what else a pair has."""
    rng = random.Random(seed)
    lengths = [[rng.randint(1, 6) for _ in range(5)] for _ in range(2)]
    rows = [[[-abs(rng.gauss(0, 2)) for _ in range(n)] for n in ns] for ns in (*lengths, *lengths)]
    one = lambda: [rng.gauss(0, 1) for _ in range(5)]
    prob = lambda: [rng.random() for _ in range(5)]
    return rows, dict(gap=one(), p=prob(), p_w=prob(), p_l=prob(), kl_w=prob(), kl_l=prob(), r_w=one(), r_l=one(),
                      v_w=one(), v_l=one())


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_22_23_value_and_gradient_against_a_slow_loop(name, mean):
    """Gradient w.r.t. every token's log-prob by central differences of the slow loop; on padding it is 0."""
    for seed in range(3):
        h = hyper(beta=.3 + .4 * seed, eps=.2, lam=3.0, alpha=.7, eta=1.3, lam_up=1.4, lam_down=.6)
        rows, given = random_batch(seed)

        def slow():
            total = [[sum(r) / (len(r) if mean else 1) for r in kind] for kind in rows]
            xs = [SimpleNamespace(a=w - v, b=l - m, d=w - v - l + m, z=.3, **{k: v[i] for k, v in given.items()})
                  for i, (w, l, v, m) in enumerate(zip(*total))]
            return slow_mean(name, xs, h)
        w, l = (dense(r)[0].requires_grad_() for r in rows[:2])
        s = [dpo.response_logps(t, dense(r)[1], mean=mean) for t, r in zip((w, l, *(dense(r)[0] for r in rows[2:])), rows)]
        x = SimpleNamespace(a=s[0] - s[2], b=s[1] - s[3], d=s[0] - s[2] - s[1] + s[3], z=torch.tensor(.3, dtype=torch.float64),
                            **{k: torch.tensor(v, dtype=torch.float64) for k, v in given.items()})
        loss = LOSSES[name][1](x, h).mean()
        close(loss.detach(), slow())
        loss.backward()
        for tensor, kind in ((w, rows[0]), (l, rows[1])):
            want = [[0.0] * len(row) for row in kind]
            for row, out in zip(kind, want):
                for t in range(len(row)):
                    old, both = row[t], []
                    for eps in (1e-5, -1e-5):
                        row[t] = old + eps
                        both.append(slow())
                    row[t], out[t] = old, (both[0] - both[1]) / 2e-5
            got = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            close(got, dense(want, garbage=0.0)[0], atol=1e-8, rtol=1e-6)


def test_22_skip_leaves_tokens_out_of_sum_and_mean():
    rows = random_batch(0)[0][0] + [[-3.0]]
    values, mask = dense(rows)
    skip = torch.zeros(mask.shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        skip[b, b % 3 + len(row) - 1] = True                            # the last of each row
    close(dpo.response_logps(values, mask, skip), [sum(r[:-1]) for r in rows])
    close(dpo.response_logps(values, mask, skip, mean=True), [sum(r[:-1]) / max(1, len(r) - 1) for r in rows])


# ---------------------------------------------------------------- identities

def grid(**given):
    """x over a grid of a and b."""
    a, b = (t.flatten().requires_grad_() for t in torch.meshgrid(*[torch.linspace(-40, 40, 21, dtype=torch.float64)] * 2,
                                                                 indexing="ij"))
    n = len(a)
    return SimpleNamespace(a=a, b=b, d=a - b, **{k: torch.full((n,), float(v), dtype=torch.float64)
                                                 for k, v in given.items()})


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


@pytest.mark.parametrize("left, right", [
    (lambda x, tau: LOSSES["gpo_squared"][1](x, hyper(beta=2 * tau)),
     lambda x, tau: 4 * tau ** 2 * LOSSES["ipo"][1](x, hyper(beta=tau))),
    (lambda x, tau: LOSSES["rso"][1](x, hyper(beta=tau)) ** 2, lambda x, tau: LOSSES["gpo_truncated"][1](x, hyper(beta=tau))),
    (lambda x, tau: LOSSES["rso"][1](x, hyper(beta=tau)), lambda x, tau: (1 - tau * (x.a - x.b)).clamp(min=0)),
    (lambda x, tau: LOSSES["sppo_hard"][1](x, hyper(beta=tau)), lambda x, tau: 2 * LOSSES["sppo"][1](
        SimpleNamespace(a=x.a, b=x.b, p_w=torch.ones(()), p_l=torch.zeros(())), hyper(eta=1 / tau))),
    (lambda x, tau: LOSSES["cdpo"][1](x, hyper(beta=tau, eps=.3)), lambda x, tau: LOSSES["dno"][1](
        SimpleNamespace(d=x.d, p=torch.full(x.d.shape, .7)), hyper(beta=tau))),
    (lambda x, tau: LOSSES["tdpo1"][1](x, hyper(beta=tau)), lambda x, tau: LOSSES["tdpo2"][1](x, hyper(beta=tau, alpha=1.0))),
    (lambda x, tau: LOSSES["gpo_exponential"][1](x, hyper(beta=tau)).log1p(), lambda x, tau: LOSSES["dpo"][1](x, hyper(beta=tau))),
], ids=["gpo squared = 4τ² ipo", "truncated = rso²", "rso = hinge", "sppo hard = 2 sppo", "cdpo = dno at 1-ε",
        "tdpo1 = tdpo2 at α=1", "dpo = log(1 + exponential)"])
@pytest.mark.parametrize("tau", [.05, .5])
def test_identity(left, right, tau):
    x = grid(kl_w=.3, kl_l=.8)
    close(left(x, tau), right(x, tau), atol=1e-6, rtol=1e-6)


def test_dno_differs_from_rpo_backward_by_the_entropy_alone():
    """Cross-entropy and KL to the same soft label have one gradient, so they share their fixed point."""
    x = grid(gap=1.2, p=1 / (1 + math.exp(-1.2)))
    gap = LOSSES["dno"][1](x, hyper(beta=.2)) - LOSSES["rpo_backward"][1](x, hyper(beta=.2))
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


def test_tdpo2_stops_the_gradient_of_the_chosen_kl():
    for name, slope in (("tdpo1", True), ("tdpo2", False)):
        kl_w, kl_l = (torch.tensor([.3, .6], requires_grad=True) for _ in "wl")
        x, *_ = f1(grad=True)
        x.kl_w, x.kl_l = kl_w, kl_l
        LOSSES[name][1](x, hyper()).sum().backward()
        assert (kl_l.grad > 0).all()
        if slope:
            close(kl_w.grad, -kl_l.grad)
        else:
            assert kl_w.grad is None or not kl_w.grad.any()


@pytest.mark.parametrize("beta", [.01, .1, 1.0, 5.0])
def test_npo_slope_at_the_start_is_1_for_any_beta(beta):
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    LOSSES["npo"][1](SimpleNamespace(b=b), hyper(beta=beta)).sum().backward()
    close(b.grad, [1.0])


def test_f2_npo_slope_vanishes_once_forgotten():
    b = torch.tensor([0.0, -2, -20, -100], dtype=torch.float64, requires_grad=True)
    LOSSES["npo"][1](SimpleNamespace(b=b), hyper()).sum().backward()
    close(b.grad, [1, .9003, .2384, .00009], atol=5e-5)


def test_dpop_penalty_is_off_while_the_chosen_is_above_the_reference():
    x = grid()
    dpop, plain = (LOSSES[n][1](x, hyper(beta=.3, lam=5.0)) for n in ("dpop", "dpo"))
    above = x.a >= 0
    close(dpop[above], plain[above])
    assert (dpop[~above] > plain[~above]).all()


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
    close(dpo.bernoulli_kl(torch.tensor(2.0), torch.tensor(-1.0)), kl2(sg(2), sg(-1)), atol=1e-6)


# ---------------------------------------------------------------- checkpoints and files for the loop

QUICK = dict(device="cpu", dtype="fp32", beta=.1, epochs=1.0, batch=100, steps=3, lr=2e-3, critic_lr=1e-2, warmup=0, max_new=6,
             clip_grad=0.0, micro_tokens=100_000, save_every=1000, eval_every=1000)


@pytest.fixture(autouse=True)
def vowels(monkeypatch):
    """A verifier that differs between almost any two responses."""
    monkeypatch.setitem(data.VERIFIERS, "vowels", lambda record, text, finished: len(text) / 10 - text.count("e"))


def save(folder, net):
    save_checkpoint(folder, dict(model=net), {}, dict(step=0, done=True, state={}, tokenizer=TOK.fingerprint))
    return str(folder)


def network(seed=0, dropout=0.0, n_scores=0):
    """A random model, far from uniform, that ends about one response in three early and never samples padding."""
    return random_policy(seed, dropout=dropout, n_scores=n_scores)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"), network())


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def records(n, k=2, seed=0):
    """Ragged preferences with scores that do not always agree with the label, and win rates; some prompts hold an end
    token, some come twice."""
    rng = random.Random(seed)
    text = lambda: "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 8))) + rng.choice("xyz")
    user = lambda s: dict(role="user", content=s)
    out = []
    for i in range(n):
        before = [user("Hm"), dict(role="assistant", content="Yes")] * (i % 2)
        responses = [text() + str(j) for j in range(k)]
        out.append(dict(prompt=before + [user(f"{i // 2 * 2} {'why ' * (i % 3)}")], responses=responses,
                        scores=[round(rng.gauss(-j, 1), 3) for j in range(k)],
                        win=[round(rng.random(), 3) for _ in range(k)]))
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = records(44)
    bare = [{k: r[k] for k in ("prompt", "responses")} for r in rows]
    thumbs = [dict(prompt=r["prompt"], response=r["responses"][i % 2], label=i % 3 > 0) for i, r in enumerate(rows)]
    return {name: write(folder / f"{name}.jsonl", some) for name, some in dict(
        pairs=rows, bare=bare, thumbs=thumbs, ranks=records(24, 3), ranks4=records(24, 4),
        margins=[b | dict(margin=i % 3) for i, b in enumerate(bare)],
        prompts=[dict(prompt=r["prompt"]) for r in rows]).items()}


def train(out, init, data, **options):
    """The real train(); its rows of metrics.jsonl."""
    dpo.train(dpo.Config(out=str(out), init=str(init), data=str(data), **(QUICK | options)))
    return read(out)


def read(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(folder, name="model"):
    return policies.weights(folder, name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def keep_steps(monkeypatch, to):
    """Copy the checkpoint as it is when each step is logged, that is, as the step found it; needs save_every=1."""
    real = data.Run.log

    def log(self, step, *args, **kwargs):
        if step:
            (to / str(step)).mkdir(parents=True)
            shutil.copy(self.folder / "checkpoint.safetensors", to / str(step))
        real(self, step, *args, **kwargs)
    monkeypatch.setattr(data.Run, "log", log)


# ---------------------------------------------------------------- the sequence KL of TDPO

def slow_said(net, prompt, response):
    """Full log-softmax (n, V) at the places of the response's n tokens, of one unpadded row."""
    hidden = net(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
    return net.logits(hidden).log_softmax(-1)


def kl_rows():
    rng = random.Random(0)
    return [([rng.randrange(TOK.base) for _ in range(rng.randint(1, 9))],
             [rng.randrange(TOK.base) for _ in range(rng.randint(1, 20))]) for _ in range(5)]


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_sequence_kl_against_a_slow_loop_over_the_vocabulary(chunk):
    policy, ref = network(0).double().eval(), network(1).double().eval()
    tokens, mask = data.collate([(p + y, [0] * len(p) + [1] * len(y)) for p, y in kl_rows()], TOK)
    got = dpo.sequence_kl(policy, ref, tokens, mask, chunk=chunk)
    want = []
    for p, y in kl_rows():
        logp, base = slow_said(policy, p, y).tolist(), slow_said(ref, p, y).tolist()
        want.append(sum(math.exp(q) * (q - r) for row, ref_row in zip(logp, base) for r, q in zip(row, ref_row)))
    assert min(want) > .1 and got.shape == (5,)
    close(got.detach(), want)
    weight = torch.tensor([1.0, -2, .5, 3, 1], dtype=torch.float64)
    grads = torch.autograd.grad((got * weight).sum(), list(policy.parameters()))
    slow = sum(w * (q.exp() * (q - slow_said(policy, p, y))).sum() for w, (p, y), q in zip(
        weight, kl_rows(), [slow_said(ref, p, y).detach() for p, y in kl_rows()]))
    for g, s in zip(grads, torch.autograd.grad(slow, list(policy.parameters()))):
        close(g, s)


def test_sequence_kl_has_no_gradient_through_the_reference():
    policy, ref = network(0).double(), network(1).double()
    tokens, mask = data.collate([(p + y, [0] * len(p) + [1] * len(y)) for p, y in kl_rows()], TOK)
    dpo.sequence_kl(policy, ref.requires_grad_(False), tokens, mask).sum().backward()
    assert all(p.grad is None for p in ref.parameters()) and all(p.grad is not None for p in policy.parameters())
    same_one = dpo.sequence_kl(policy, models.reference(policy), tokens, mask)
    close(same_one.detach(), torch.zeros(5), atol=1e-12)


# ---------------------------------------------------------------- the loop against a second loop

def own_items(cfg, rows):
    """What the loop should make of records: dicts of prompt, good and bad responses (ids) and what is known of them."""
    unit, out = unit_of(cfg.loss), []
    for r in rows:
        prompt, said = TOK.prompt(r["prompt"]), [TOK.response(t) for t in r.get("responses") or [r["response"]]]
        if "response" in r:
            out.append(dict(prompt=prompt, good=said * r["label"], bad=said * (not r["label"]), r=float(r["label"])))
        elif cfg.loss == "d2o":
            out.append(dict(prompt=prompt, good=said[:-1], bad=said[-1:]))
        else:
            for i, j in itertools.combinations(range(len(said)), 2):
                if cfg.pairs == "ends" and (i, j) != (0, len(said) - 1):
                    continue
                gap = r["scores"][i] - r["scores"][j] if "scores" in r else r.get("margin")
                win = [r["win"][i], r["win"][j]] if "win" in r else gap is not None and [sg(gap), sg(-gap)]
                pair = dict(prompt=prompt, good=[said[i]], bad=[said[j]], gap=gap, win=win)
                out += [pair] if unit == "pair" else [
                    pair | {dict(good="bad", bad="good")[side]: [], "r": r["scores"][k] if "scores" in r else k == i}
                    for side, k in (("good", i), ("bad", j))]
    return out


@torch.no_grad()
def slow_metrics(cfg, policy, ref, items, critic=None, others=()):
    """Loss and metrics of one step from the paper: one row at a time, no padding, no micro-batches."""
    def ratio(prompt, y):
        logp, base = (slow_said(net, prompt, y)[range(len(y)), y].tolist() for net in (policy, ref))
        kept = [t for t, token in enumerate(y) if not (cfg.mask_end and token == TOK.end)]
        return sum(logp[t] - base[t] for t in kept) / (max(1, len(kept)) if cfg.length_norm else 1), sum(logp)

    def kl(prompt, y):
        logp, base = slow_said(policy, prompt, y), slow_said(ref, prompt, y)
        return float((base.exp() * (base - logp)).sum())
    z = max(0.0, sum(ratio(*o)[0] for o in others) / len(others)) if others else None
    values, a, b, lw, ll, n_w, per_pair = [], [], [], [], [], 0, []
    parts = SLOW[cfg.loss] if isinstance(SLOW[cfg.loss], tuple) else (SLOW[cfg.loss], None)
    for item in items:
        good, bad = ([ratio(item["prompt"], y) for y in item[side]] for side in ("good", "bad"))
        x = SimpleNamespace(z=z)
        if good:
            x.a = sum(g[0] for g in good) / len(good)
            a, lw, n_w = a + [x.a], lw + [g[1] for g in good], n_w + sum(map(len, item["good"]))
            per_pair.append(sum(g[1] / len(y) for g, y in zip(good, item["good"])))
        if bad:
            x.b = bad[0][0]
            b, ll = b + [x.b], ll + [bad[0][1]]
        if critic is not None:
            x.r_w = x.r_l = item["r"]
            x.v_w = x.v_l = critic.score(critic(torch.tensor([item["prompt"]]))[0, -1]).item()
        if good and bad:
            x.d, x.gap = x.a - x.b, item.get("gap")
            if cfg.margin:
                x.d -= cfg.margin / cfg.beta * x.gap
            if item.get("win"):
                (x.p_w, x.p_l), x.p = item["win"], sg(x.gap)
            if cfg.loss.startswith("tdpo"):
                x.kl_w, x.kl_l = kl(item["prompt"], item["good"][0]), kl(item["prompt"], item["bad"][0])
        f = parts[0] if good else parts[1]
        values += [f(x, cfg)] if f else []
    loss = sum(values) / len(values)
    if cfg.nll_coef:
        loss -= cfg.nll_coef * (sum(lw) / n_w if cfg.nll_per == "token" else sum(per_pair) / len(items))
    mean = lambda v: sum(v) / len(v)
    out = {"loss": loss, "rewards/chosen": cfg.beta * mean(a), "rewards/rejected": cfg.beta * mean(b),
           "logps/chosen": mean(lw), "logps/rejected": mean(ll), "rewards/margin": cfg.beta * (mean(a) - mean(b))}
    if unit_of(cfg.loss) == "pair":
        out["rewards/accuracy"] = mean([float(u > v) + .5 * (u == v) for u, v in zip(a, b)])
    if z is not None:
        out["z"] = z
    return out


LOOPS = {name: dict(loss=name) for name in LOSSES} | {
    "dpo, per token": dict(loss="dpo", length_norm=True, beta=5.0),
    "ipo, per token, no end": dict(loss="ipo", length_norm=True, mask_end=True),
    "dpo, no end, nll per token": dict(loss="dpo", mask_end=True, nll_coef=.2),
    "dpo, nll per pair": dict(loss="dpo", nll_coef=.2, nll_per="pair"),
    "npo, nll": dict(loss="npo", nll_coef=.5),
    "dpo, margin": dict(loss="dpo", margin=.5),
    "sppo, win rates from margins": dict(loss="sppo", file="margins"),
    "rpo, margins": dict(loss="rpo_backward", file="margins"),
    "dpo, all of a ranking": dict(loss="dpo", file="ranks"),
    "rpo, all of a ranking": dict(loss="rpo_squared", file="ranks"),
    "sppo, ends of a ranking": dict(loss="sppo", file="ranks", pairs="ends"),
    "d2o, two anchors": dict(loss="d2o", file="ranks"),
    "dro, ends of a ranking": dict(loss="dro", file="ranks", pairs="ends"),
    "dro, the ends of a ranking": dict(loss="dro", file="ranks", pairs="ends"),
    "kto, thumbs": dict(loss="kto", file="thumbs", lam_up=1.3, lam_down=.7),
    "kto, z below 0": dict(loss="kto", file="thumbs", lam_up=.02, lr=5e-3),
    "dro, thumbs": dict(loss="dro", file="thumbs"),
    "npo, thumbs": dict(loss="npo", file="thumbs"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_19_36_loop_equals_a_slow_loop(name, files, tiny, tmp_path, monkeypatch):
    """Every metric of the third step, held-out ones included, from the weights that step found and the first
    weights of all as the reference: padding counts nowhere, and the reference has not moved."""
    options = dict(LOOPS[name])
    path = files[options.pop("file", "pairs")]
    keep_steps(monkeypatch, tmp_path / "at")
    taken, real = [], dpo.add_mismatched
    monkeypatch.setattr(dpo, "add_mismatched", lambda items, block: (real(items, block), taken.append(items)))
    options = QUICK | options | dict(batch=30)
    rows = train(tmp_path / "a", tiny, path, **options | dict(save_every=1, eval_every=3))
    cfg = dpo.Config(**options)
    policy, ref, critic = load_model(tmp_path / "at" / "2").double(), load_model(tiny).double(), None
    if cfg.loss == "dro":
        critic = network(n_scores=1).double()
        critic.load_state_dict({k.removeprefix("critic/"): v for k, v in weights(tmp_path / "at" / "2", "critic").items()
                                if "." in k and not k.removeprefix("critic/")[0].isdigit()})
    every = [json.loads(line) for line in Path(path).read_text().splitlines()]
    seen = own_items(cfg, [r for i, r in enumerate(every) if i % 20 != 19])
    batch = data.Stream(items=seen, seed=0).batch(2, cfg.batch)         # which items, is for test_data.py to check
    assert len({len(y) for i in batch for y in i["good"] + i["bad"]}) > 3
    others = []
    if cfg.loss == "kto":
        mates = {(tuple(i["rows"][0][0]), i["up"][0]): i["other"] for i in taken[0]}
        ids = lambda i: (tuple(i["prompt"] + (i["good"] + i["bad"])[0]), bool(i["good"]))
        others = [(o[0][:o[1].index(1)], o[0][o[1].index(1):]) for o in (mates[ids(i)] for i in batch)]
        assert all(o[0] == i["prompt"] for o, i in zip(others, batch))
    want = slow_metrics(cfg, policy, ref, batch, critic, others)
    tail = lambda row: {k: v for k, v in row.items() if k in want}
    assert tail(rows[2]) == pytest.approx(want, rel=2e-4, abs=2e-5)
    assert abs(want["rewards/margin"]) > 1e-4 * cfg.beta
    assert rows[0]["rewards/margin"] == 0 and rows[0]["loss"] != rows[2]["loss"]
    assert any(k.startswith("val_") for k in rows[2]) and not any(k.startswith("val_") for k in rows[1])


@pytest.mark.parametrize("options, golden", [
    (dict(loss="dpo"), .6697083479), (dict(loss="dpo", length_norm=True, beta=5.0), .4374751984),
    (dict(loss="ipo", length_norm=True), 23.1287847222), (dict(loss="ipo"), 21.25),
    (dict(loss="d2o", alpha=.1), .6697083479), (dict(loss="npo"), 13.2512196360),
    (dict(loss="dpo", nll_coef=.2, nll_per="token"), .8197083479),
    (dict(loss="dpo", nll_coef=.2, nll_per="pair"), .8130416812)], ids=str)
@pytest.mark.parametrize("budget", [1, 100_000])
def test_f1_golden_number_through_the_loop(options, golden, budget, tiny, tmp_path, monkeypatch):
    """The loop's own loss where policy and reference are F1's token log-probs, told apart by the response's length."""
    table = {len(p): (p, q) for p, q in zip(CHOSEN + REJECTED, CHOSEN_REF + REJECTED_REF)}

    def token_logprobs(model, tokens, mask, *_):
        out = torch.zeros(mask.shape, dtype=torch.float64)
        for row, where in zip(out, mask.bool()):
            row[where] = torch.tensor(table.get(int(where.sum()), [[0.0] * int(where.sum())] * 2)[
                not torch.is_grad_enabled()], dtype=torch.float64)
        return out + 0 * sum(p.sum() for p in model.parameters()) if torch.is_grad_enabled() else out
    monkeypatch.setattr(dpo, "token_logprobs", token_logprobs)
    digits = [("12", "567"), ("1234", "8"), ("123456", "1234567")]         # a token each, and the end; the last is held out
    path = write(tmp_path / "d.jsonl", [dict(prompt="?" * i, responses=two) for i, two in enumerate(digits, 1)])
    rows = train(tmp_path / "a", tiny, path, steps=1, batch=4 if options["loss"] == "npo" else 2, max_new=80,
                 micro_tokens=budget, **options)
    assert rows[0]["loss"] == pytest.approx(golden, abs=1e-7, rel=1e-9)


# ---------------------------------------------------------------- the loop: pitfalls

@pytest.mark.parametrize("name", LOSSES)
def test_21_policy_equals_reference_at_step_0(name, files, tiny, tmp_path):
    """Every margin is 0, in fp32, so the loss is known without a model: ln 2 for dpo. The gradient is not 0."""
    row = train(tmp_path / "a", tiny, files["pairs"], loss=name, steps=1, batch=42)[0]
    at_0 = {"ipo": 25.0, "rso": 1, "gpo_exponential": 1, "gpo_squared": 1, "gpo_truncated": 1, "gpo_savage": .25,
            "apo_zero": 1, "kto": .5, "npo": 20 * LN2, "sppo_hard": 50.0}
    if not name.startswith("rpo_") and name not in ("sppo", "dno", "dro"):      # theirs depends on the data
        assert row["loss"] == pytest.approx(at_0.get(name, LN2), abs=1e-6)
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/margin"] == 0
    assert row.get("rewards/accuracy", .5) == .5 and row["grad_norm"] > 1e-3


def test_4_first_gradient_of_dpo_row_by_row(files, tiny, tmp_path, monkeypatch):
    """At the reference it is -β/2 · mean ∇(log π(y_w) - log π(y_l)), of the parameters, end tokens included."""
    grads, real = [], models.Optimizer.step
    monkeypatch.setattr(models.Optimizer, "step", lambda self, step: (
        grads.append([p.grad.clone() for p in self.params]), real(self, step))[1])
    train(tmp_path / "a", tiny, files["pairs"], steps=1, batch=42, micro_tokens=200)
    net, total = load_model(tiny).double(), 0.0
    for i, r in enumerate(map(json.loads, Path(files["pairs"]).read_text().splitlines())):
        if i % 20 != 19:
            w, l = (slow_said(net, TOK.prompt(r["prompt"]), y)[range(len(y)), y].sum() for y in map(TOK.response, r["responses"]))
            total = total - .1 / 2 * (w - l) / 42
    for got, want in zip(grads[0], torch.autograd.grad(total, list(net.parameters()))):
        close(got, want, atol=1e-6)
    assert max(g.abs().max() for g in grads[0]) > .01


def test_20_dropout_of_the_checkpoint_does_not_matter(files, tiny, tmp_path):
    """Neither in what is logged nor in the gradient: policy and reference agree until the first update."""
    wet = save(tmp_path / "wet", network(dropout=.5))
    for loss in ("dpo", "tdpo2"):
        a, b = (train(tmp_path / f"{loss}{i}", init, files["pairs"], loss=loss) for i, init in enumerate((tiny, wet)))
        assert a == b and a[0]["rewards/margin"] == 0


MICRO = {"dpo, nll per token": dict(loss="dpo", nll_coef=.3), "dpo, nll per pair": dict(loss="dpo", nll_coef=.3, nll_per="pair"),
         "tdpo2": dict(loss="tdpo2"), "kto": dict(loss="kto", file="thumbs"), "dro": dict(loss="dro", file="thumbs", beta=1.0),
         "npo, nll per token": dict(loss="npo", nll_coef=.3), "npo, nll per pair": dict(loss="npo", nll_coef=.3, nll_per="pair"),
         "d2o": dict(loss="d2o", file="ranks"), "rpo": dict(loss="rpo_forward"), "sppo": dict(loss="sppo")}


@pytest.mark.parametrize("name", MICRO)
def test_7_micro_batches_and_padding_change_no_number(name, files, tiny, tmp_path, monkeypatch):
    """One row at a time, or all at once and 16 columns of garbage behind every row instead of padding."""
    options = dict(MICRO[name])
    path, real = files[options.pop("file", "pairs")], dpo.collate
    small = train(tmp_path / "1", tiny, path, micro_tokens=1, batch=21, **options)

    def collate(rows, tok, device):
        tokens, mask = real(rows, tok, device)
        tokens = torch.nn.functional.pad(tokens, (0, 16))
        mask = torch.nn.functional.pad(mask, (0, 16))
        for line, (ids, _) in zip(tokens, rows):
            line[len(ids):] = torch.randint(TOK.n_vocab, (len(line) - len(ids),))
        return tokens, mask
    monkeypatch.setattr(dpo, "collate", collate)
    large = train(tmp_path / "2", tiny, path, batch=21, **options)
    for a, b in zip(small, large):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] is b[k] is None or a[k] == pytest.approx(b[k], rel=2e-4, abs=2e-5), k


def watch_logps(monkeypatch):
    """All differentiated calls of token_logprobs as (tokens, mask, logp, whose gradient is kept)."""
    calls, real = [], dpo.token_logprobs

    def wrap(model, tokens, mask, *args):
        out = real(model, tokens, mask, *args)
        if out.requires_grad:
            out.retain_grad()
            calls.append((tokens, mask, out))
        return out
    monkeypatch.setattr(dpo, "token_logprobs", wrap)
    return calls


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "npo"])
@pytest.mark.parametrize("norm", [False, True])
def test_mask_end_frees_the_end_token_of_the_preference_but_not_of_the_nll(loss, norm, files, tiny, tmp_path, monkeypatch):
    """C16: in both responses its gradient is exactly 0, or that of the NLL; every other response token has one."""
    calls = watch_logps(monkeypatch)
    for options in (dict(), dict(mask_end=True), dict(mask_end=True, nll_coef=.5)):
        train(tmp_path / str(options), tiny, files["pairs"], loss=loss, steps=1, length_norm=norm, **options)
    n = 0
    for (tokens, mask, _), *grads in zip(calls, *[[c[2].grad for c in calls[i::3]] for i in range(3)]):
        ends = (tokens[:, 1:] == TOK.end) & mask.bool()
        assert (ends.sum(1) == 1).all()
        plain, masked, both = grads
        rows = (plain != 0).any(1)                                        # npo: only the bad ones
        assert (plain[ends][rows] != 0).all() and (masked[ends] == 0).all()
        assert (masked[rows][(mask.bool() & ~ends)[rows]] != 0).all()
        assert both[ends].unique().numel() == 2 and both[ends].max() == 0  # the good: -coef / all chosen tokens
        n += len(tokens)
        good = both[ends] < 0
        close(both[ends].min(), -.5 / mask[good].sum(), atol=1e-8)
    assert n >= 100


def test_c17_nll_keeps_the_chosen_likely(files, tiny, tmp_path):
    free, held = (train(tmp_path / str(c), tiny, files["pairs"], nll_coef=c, steps=12, lr=3e-3) for c in (0.0, 1.0))
    assert held[-1]["logps/chosen"] > held[0]["logps/chosen"] and held[-1]["logps/chosen"] > free[-1]["logps/chosen"]
    assert held[-1]["rewards/margin"] > 0


@pytest.mark.parametrize("n", range(1, 8))
def test_37_kto_mismatched_partners(n):
    """Every size: the own prompt with another prompt's response, never one's own, also where a prompt comes twice."""
    row = lambda p, y: ([p, 9] + y, [0, 0] + [1] * len(y))
    for prompts in (list(range(n)), [i // 2 for i in range(n)], [0] * (n - 1) + [1]):
        items = [dpo.make_item({}, [row(p, [100 + 10 * p, i])], [True]) for i, p in enumerate(prompts)]
        if len(set(prompts)) < 2:
            with pytest.raises(UserError, match="one prompt"):
                dpo.add_mismatched(items, 64)
            continue
        dpo.add_mismatched(items, 64)
        for item, p in zip(items, prompts):
            ids, target = item["other"]
            assert ids[:2] == [p, 9] and ids[2] != 100 + 10 * p and target == [0, 0, 1, 1] and len(ids) == 4


def test_37_kto_uses_many_partners_and_fits_the_context():
    rng = random.Random(0)
    made = [([i] + [5] * rng.randint(1, 9), [300 + i] * rng.randint(1, 7)) for i in range(20)]
    items = [dpo.make_item({}, [(p + y, [0] * len(p) + [1] * len(y))], [True]) for p, y in made]
    dpo.add_mismatched(items, 12)
    assert len({item["other"][0][-1] for item in items}) == 20
    for item, (p, _) in zip(items, made):
        ids, target = item["other"]
        assert len(ids) <= 12 and ids[target.index(1) - 1] == p[-1] and len(ids) == len(target)


def test_37_kto_partners_are_good_and_bad_alike():
    """Pairs come as good, bad, good, bad; a mismatched response is as often the one as the other, to either."""
    torch.manual_seed(0)
    row = lambda p, y: ([p, 9, y], [0, 0, 1])
    pairs = [dpo.make_item({}, [row(p, 1), row(p, 2)], [True, False]) | dict(r=[1, 0]) for p in range(10, 510)]
    items = [single for pair in pairs for single in data.singles(pair)]
    dpo.add_mismatched(items, 64)
    partners = [item["other"][0][-1] for item in items]
    for side in (partners[::2], partners[1::2]):
        assert .4 < side.count(1) / len(side) < .6
    first = [item["other"] for item in items]
    for seed in (0, 1):
        torch.manual_seed(seed)
        dpo.add_mismatched(items, 64)
        assert ([item["other"] for item in items] == first) == (seed == 0)


def test_37_kto_small_files(files, tiny, tmp_path):
    """A file too small for two held-out prompts can still be learnt from; one of a single prompt cannot."""
    some = [dict(prompt=str(i), response="yes" * (1 + i % 3), label=i % 2 == 0) for i in range(12)]
    assert len(train(tmp_path / "a", tiny, write(tmp_path / "t.jsonl", some), loss="kto")) == 3
    with pytest.raises(UserError, match="one prompt"):
        train(tmp_path / "b", tiny, write(tmp_path / "u.jsonl", [r | dict(prompt="one") for r in some]), loss="kto")


@pytest.mark.parametrize("options", [dict(loss="dpo"), dict(loss="kto"), dict(loss="dpo", lora_r=2)], ids=str)
def test_the_reference_reads_what_the_steps_will_see_and_no_more(options, files, tiny, tmp_path, monkeypatch):
    """One step of 4 items and the 2 held-out records; a run that goes on, only what its last step sees."""
    known, log = [], data.Run.log

    def count(self, *args, real=dpo.FromFile.read_by):
        ref = real(self, *args)
        known.append(sum("ref" in item for item in self.stream.items + self.held))
        return ref

    def interrupted(self, step, *args, **metrics):
        if step == 7:
            raise KeyboardInterrupt
        log(self, step, *args, **metrics)
    monkeypatch.setattr(dpo.FromFile, "read_by", count)
    options = options | dict(batch=4, micro_tokens=64)
    train(tmp_path / "a", tiny, files["pairs"], steps=1, **options)
    held = 4 if options["loss"] == "kto" else 2  # two thumbs a pair
    assert known[0] == 4 + held
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        known.clear()
        patch.setattr(data.Run, "log", interrupted)
        train(tmp_path / "b", tiny, files["pairs"], steps=8, save_every=7, **options)
    assert known[0] == 32 + held
    known.clear()
    train(tmp_path / "b", tiny, files["pairs"], steps=8, save_every=7, **options)
    assert known[0] < 16 + held


def test_kto_z_is_clamped_and_detached(files, tiny, tmp_path, monkeypatch):
    """z is computed without a gradient: as many differentiated rows as there are thumbs."""
    calls = watch_logps(monkeypatch)
    train(tmp_path / "a", tiny, files["thumbs"], loss="kto", steps=1, batch=42)
    assert sum(len(tokens) for tokens, _, _ in calls) == 42


@pytest.mark.parametrize("loss", ["dpo", "tdpo1"])
def test_ref_every_makes_the_policy_the_reference(loss, files, tiny, tmp_path):
    """After each refresh, and only then, rewards start again at 0."""
    rows = train(tmp_path / "a", tiny, files["pairs"], loss=loss, steps=6, ref_every=2)
    for row in rows:
        assert (row["rewards/margin"] == 0) == (row["step"] % 2 == 0) == (abs(row["loss"] - LN2) < 1e-7)
    fixed = train(tmp_path / "b", tiny, files["pairs"], loss=loss, steps=6)
    assert [r["rewards/margin"] == 0 for r in fixed] == [True] + [False] * 5
    assert fixed[:2] == rows[:2]
    assert rows[-1]["val_rewards/margin"] != fixed[-1]["val_rewards/margin"]      # held-out ones follow the reference,
    often = train(tmp_path / "c", tiny, files["pairs"], loss=loss, steps=6, ref_every=2, eval_every=1)
    assert often[-1]["val_rewards/margin"] == rows[-1]["val_rewards/margin"]      # every time


@pytest.mark.parametrize("options", [dict(), dict(ref_every=2), dict(loss="dro"), dict(loss="kto"), dict(online=True),
                                     dict(lora_r=2), dict(loss="tdpo2")], ids=str)
def test_41_interrupted_run_continues_bit_for_bit(options, files, tiny, tmp_path, monkeypatch):
    path = files["prompts" if "online" in options else "pairs"]
    options = options | dict(steps=5, save_every=3, reward="vowels", batch=10)
    whole, real = train(tmp_path / "a", tiny, path, **options), data.Run.log
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def log(self, step, *args, **kwargs):
            if step == 4:
                raise KeyboardInterrupt
            real(self, step, *args, **kwargs)
        patch.setattr(data.Run, "log", log)
        train(tmp_path / "b", tiny, path, **options)
    assert train(tmp_path / "b", tiny, path, **options) == whole
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_43_evaluation_does_not_change_training(files, tiny, tmp_path):
    often, never = (train(tmp_path / str(n), tiny, files["pairs"], eval_every=n) for n in (1, 100))
    for a, b in zip(often, never):
        assert all(a[k] == b[k] for k in a.keys() & b.keys())
    assert "val_loss" in often[0] and "val_loss" not in never[0] and often[0]["kl"] != often[1]["kl"]


def test_evaluation_kl_is_to_the_first_model(files, tiny, tmp_path):
    """Nothing learnt: 0, though the reference left the memory before training."""
    still, moved = (train(tmp_path / str(lr), tiny, files["pairs"], lr=lr)[-1] for lr in (1e-30, 1e-2))
    assert abs(still["kl"]) < 1e-6 and moved["kl"] > .01 and 1 <= still["response_length"] <= 6


def test_val_metrics_against_a_slow_loop(files, tiny, tmp_path):
    row = train(tmp_path / "a", tiny, files["pairs"])[-1]
    every = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    cfg = dpo.Config(**QUICK)
    want = slow_metrics(cfg, load_model(tmp_path / "a").double(), load_model(tiny).double(),
                        own_items(cfg, [every[19], every[39]]))
    got = {k.removeprefix("val_"): v for k, v in row.items() if k.startswith("val_")}
    assert got == pytest.approx({k: v for k, v in want.items() if "logps" not in k or k in got}, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- shapes of feedback (C21), options, mistakes

def collect_items(monkeypatch):
    """What reaches the loss: [(responses as text, good?)] of every item ever made, by make_item."""
    made, real = [], data.make_item

    def wrap(record, rows, up):
        made.append([(TOK.decode(ids[target.index(1):]), bool(u)) for (ids, target), u in zip(rows, up)])
        return real(record, rows, up)
    for module in (data, dpo):  # of a file, and online
        monkeypatch.setattr(module, "make_item", wrap)
    return made


@pytest.mark.parametrize("which", ["all", "ends"])
def test_c21_ranking_of_4_gives_6_pairs_or_one(which, files, tiny, tmp_path, monkeypatch):
    made = collect_items(monkeypatch)
    train(tmp_path / "a", tiny, files["ranks4"], pairs=which, steps=1)
    for r in map(json.loads, Path(files["ranks4"]).read_text().splitlines()):
        every = [[(w, True), (l, False)] for w, l in itertools.combinations(r["responses"], 2)]
        want = every if which == "all" else [every[2]]
        assert [m for m in made if m[0][0] in r["responses"]] == want and len(every) == 6
    assert len(made) == 24 * (6 if which == "all" else 1)


def test_c21_margin_of_a_ranked_pair_is_that_of_its_scores(files, tiny, tmp_path):
    """A > B > C with scores: the pair A, C has the gap of A and C, and each pair its own win rates."""
    record = dict(prompt=[dict(role="user", content="?")], responses=["a", "b", "c"], scores=[3, 1, -1], win=[.9, .5, .1])
    got = [dpo.make_item(part, [([], [])] * 2, [True, False]) for part in data.pairs(record)]
    assert [item["gap"] for item in got] == [2, 4, 2]
    assert [[item["p_w"], item["p_l"]] for item in got] == [[.9, .5], [.9, .1], [.5, .1]]
    item = dpo.make_item(dict(margin=2.0), [([], [])] * 2, [True, False])
    assert item["gap"] == 2 and item["p"] == pytest.approx(sg(2)) and [item["p_w"], item["p_l"]] == pytest.approx([sg(2), sg(-2)])
    assert item["r"] == [1, 0] and dpo.make_item(dict(margin=1.0, prob=.3), [0, 0], [True, False])["p"] == .3


@pytest.mark.parametrize("loss", ["kto", "dro", "npo"])
def test_c21_pairs_become_thumbs(loss, files, tiny, tmp_path, monkeypatch):
    """A file of pairs and the file of its thumbs are one training set for the losses of single responses."""
    rows = [json.loads(line) for line in Path(files["bare"]).read_text().splitlines()]
    apart = lambda some: [dict(prompt=r["prompt"], response=y, label=up) for r in some
                          for y, up in zip(r["responses"], (True, False))]
    thumbs, held = apart(r for i, r in enumerate(rows) if i % 20 != 19), apart(rows[19::20])
    for i, row in enumerate(held, 1):
        thumbs.insert(20 * i - 1, row)
    files = files["bare"], write(tmp_path / "t.jsonl", thumbs)
    a, b = (train(tmp_path / str(i), tiny, f, loss=loss, steps=2, batch=84) for i, f in enumerate(files))
    for x, y in zip(a, b):
        for k in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "val_loss") if loss != "kto" else ("logps/chosen",):
            assert x.get(k) is y.get(k) is None or x[k] == pytest.approx(y[k], rel=1e-3), k


@pytest.mark.parametrize("odd", [0, 1])
def test_mixed_margins_do_not_break_a_loss_that_needs_none(odd, files, tiny, tmp_path):
    rows = [json.loads(line) for line in Path(files["bare"]).read_text().splitlines()]
    mixed = write(tmp_path / "m.jsonl", [r | (dict(margin=1.0) if i % 2 == odd else {}) for i, r in enumerate(rows)])
    assert train(tmp_path / "a", tiny, mixed, steps=2) == train(tmp_path / "b", tiny, files["bare"], steps=2)


def test_26_overlong_prompts_and_responses(tiny, tmp_path):
    """Both keep part of the context: no empty response, no NaN."""
    some = [dict(prompt="why " * n, responses=["yes " * m, "no " * k]) for n, m, k in
            itertools.product((1, 30, 90), repeat=3)]
    for i, loss in enumerate(("dpo", "kto", "tdpo2")):
        for row in train(tmp_path / str(i), tiny, write(tmp_path / "d.jsonl", some), loss=loss, mask_end=True, length_norm=loss != "tdpo2"):
            assert math.isfinite(row["loss"]) and row["grad_norm"] > 0


WRONG = {
    "unknown loss": (dict(loss="dop"), "pairs", "dop"),
    "toy without online": (dict(data="toy"), "pairs", "--online"),
    "k 1": (dict(online=True, k=1, steps=2), "prompts", "--k"),
    "online without steps": (dict(online=True, steps=0), "prompts", "--steps"),
    "rpo without scores": (dict(loss="rpo_squared"), "bare", "scores"),
    "dno without scores": (dict(loss="dno"), "bare", "scores"),
    "margin without scores": (dict(margin=.5), "bare", "margin"),
    "thumbs for a pair loss": (dict(loss="dpo"), "thumbs", "preference"),
    "beta 0": (dict(beta=0.0), "pairs", "beta"),
    "negative eps": (dict(loss="cdpo", eps=-.1), "pairs", "eps"),
    "robust at a coin flip": (dict(loss="robust", eps=.5), "pairs", "eps"),
    "tdpo per token": (dict(loss="tdpo1", length_norm=True), "pairs", "length_norm"),
    "margin of no difference": (dict(loss="apo_zero", margin=1.0), "pairs", "margin"),
    "lora and ref_every": (dict(lora_r=2, ref_every=2), "pairs", "lora_r"),
    "no checkpoint": (dict(init="nowhere"), "pairs", "python sft.py"),
    "no such reward": (dict(online=True, reward="nowhere"), "prompts", "nowhere"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line(name, files, tiny, tmp_path):
    options, path, word = WRONG[name]
    options = dict(init=tiny, data=files[path]) | options
    with pytest.raises(UserError) as error:
        dpo.train(dpo.Config(**QUICK | options | dict(out=str(tmp_path / "a"))))
    assert word in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


@pytest.mark.parametrize("flags, word", [("--loss dop", "dop"), ("--lr 0", "--lr"), ("--nll_per batch", "--nll_per"),
                                         ("--data toy", "--data"), ("--nonsense 1", "--nonsense")])
def test_impossible_options_exit_2_with_one_line(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--out", str(tmp_path / "x"), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(dpo.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and word in err and not out and not (tmp_path / "x").exists()


# ---------------------------------------------------------------- online, LoRA

def test_offline_never_samples_before_the_evaluation(files, tiny, tmp_path, monkeypatch):
    asked, real = [], models.generate
    patch(monkeypatch, "generate", lambda *a, **k: (asked.append(len(read(tmp_path / "a"))), real(*a, **k))[1])
    train(tmp_path / "a", tiny, files["pairs"], steps=4)
    assert set(asked) == {3}                                             # only in the last step


def test_online_pairs_take_nothing_of_what_a_file_says_of_its_own_answers(tiny):
    """Prompts may come from a file of labelled pairs: its `prob` and `margin` are about other responses."""
    records = [dict(prompt=[dict(role="user", content=f"Q{i}")], prob=.9, margin=7.0, key="kept") for i in range(4)]
    rows = models.generate(load_model(tiny, Setup(TOK)), [TOK.prompt(r["prompt"]) for r in records], 4, 2).rows()
    cfg = dpo.Config(online=True, steps=1, loss="dno", k=2)
    items = dpo.best_and_worst(records, rows, torch.arange(8).view(4, 2) * .5, cfg)
    assert len(items) == 4 and all(item["gap"] == .5 and item["record"]["key"] == "kept" for item in items)
    assert [item["p"] for item in items] == pytest.approx([1 / (1 + math.exp(-.5))] * 4)



@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_online_pairs_are_best_and_worst_of_the_current_policy(loss, files, tiny, tmp_path, monkeypatch):
    """Each step samples from the weights as they are then, and pairs best with worst by score; a tie gives nothing."""
    rolls, real = [], models.generate

    def generate(model, prompts, *args, **kwargs):
        rolls.append((real(model, prompts, *args, **kwargs), {f"model/{k}": v.clone() for k, v in model.state_dict().items()}))
        return rolls[-1][0]
    patch(monkeypatch, "generate", generate)
    keep_steps(monkeypatch, tmp_path / "at")
    made, steps_made, real_log = collect_items(monkeypatch), [], data.Run.log
    monkeypatch.setattr(data.Run, "log", lambda *a, **k: (steps_made.append(len(made)), real_log(*a, **k))[1])
    options = dict(loss=loss, online=True, k=4, reward="vowels", batch=12, missing_end=.3, steps=3)
    rows = train(tmp_path / "a", tiny, files["prompts"], save_every=1, **options)
    policy, ref = load_model(tmp_path / "at" / "2").double(), load_model(tiny).double()
    lengths, tail = set(), []
    for step, (roll, state) in enumerate(rolls[:3]):
        before = weights(tmp_path / "at" / str(step)) if step else weights(tiny)
        assert same(state, {k: v for k, v in before.items() if "." in k and not k[6].isdigit()})
        texts, scores = roll.responses(), []
        got = made[steps_made[step - 1] if step else 0:steps_made[step]]
        for i in range(0, len(texts), 4):
            score = [len(t) / 10 - t.count("e") - .3 * (not f) for t, f in zip(texts[i:i + 4], roll.finished[i:i + 4].tolist())]
            scores += score
            if max(score) > min(score) + 1e-6:
                (best, up), (worst, down) = got.pop(0)
                w, l = (texts.index(t, i, i + 4) for t in (best, worst))
                assert up and not down and abs(scores[w] - max(score)) < 1e-6 and abs(scores[l] - min(score)) < 1e-6
                ids, start = [roll.tokens[j, :roll.lengths[j]].tolist() for j in (w, l)], roll.prompt_len[w]
                tail += [dict(prompt=ids[0][:start], good=[ids[0][start:]], bad=[ids[1][start:]])] * (step == 2)
        assert not got and rows[step]["reward"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
        lengths |= set(roll.mask.sum(1).tolist())
    assert len(lengths) > 3 and len(tail) > 5
    want = slow_metrics(dpo.Config(**QUICK | dict(loss="dpo")), policy, ref, tail)      # the reference is the first model
    for key in ("rewards/chosen", "rewards/rejected", "logps/chosen"):
        assert rows[2][key] == pytest.approx(want[key], rel=2e-4, abs=2e-5)
    if loss == "dpo":
        assert rows[2]["loss"] == pytest.approx(want["loss"], rel=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "kto", "npo"])
def test_online_ties_give_no_pair(loss, files, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(data.VERIFIERS, "same", lambda *_: 1.0)
    rows = train(tmp_path / "a", tiny, files["prompts"], online=True, reward="same", missing_end=0.0, batch=4, loss=loss)
    assert len(rows) == 3 and all("loss" not in r and r["reward"] == 1 for r in rows)
    assert same(weights(tmp_path / "a"), weights(tiny))


def test_online_kto_where_a_single_prompt_is_left(files, tiny, tmp_path, monkeypatch):
    """A batch in which all prompts but one are ties is bad luck, no reason to end the run."""
    monkeypatch.setitem(data.VERIFIERS, "rare", lambda record, text, _: len(text) * (record["prompt"][-1]["content"][0] == "0"))
    rows = train(tmp_path / "a", tiny, files["prompts"], online=True, reward="rare", missing_end=0.0, batch=44, k=4, loss="kto")
    assert len(rows) == 3


def test_online_improves_the_reward(files, tiny, tmp_path):
    """Online DPO on a verifier: the mean reward of the policy's own samples rises."""
    rows = train(tmp_path / "a", tiny, files["prompts"], online=True, reward="vowels", k=4, steps=20, batch=16, lr=5e-3)
    assert sum(r["reward"] for r in rows[-4:]) / 4 > sum(r["reward"] for r in rows[:4]) / 4 + .05


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_lora_trains_adapters_only_and_merges(loss, files, tiny, tmp_path, monkeypatch):
    """The reference is the policy without its adapter; a plain model is written, whose log-probs are the run's."""
    real = models.save_checkpoint
    monkeypatch.setattr(models, "save_checkpoint", lambda folder, modules, optimizers, meta: (models.write_model(
        tmp_path / "at" / str(meta["step"]), modules["model"]), real(folder, modules, optimizers, meta)))
    rows = train(tmp_path / "a", tiny, files["pairs"], loss=loss, lora_r=4, lr=1e-2, batch=42, save_every=1)
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6) and rows[0]["rewards/margin"] == 0
    assert rows[0]["grad_norm"] > 0 and rows[2]["rewards/margin"] > 0
    merged, first = load_model(tmp_path / "at" / "2"), load_model(tiny)
    assert merged.state_dict().keys() == first.state_dict().keys() and not merged.loras()
    moved = {k for k, v in merged.state_dict().items() if not torch.equal(v, first.state_dict()[k])}
    assert moved == {k for k in moved if ".h." in k and k.endswith("weight") and "ln_" not in k} and len(moved) == 4
    cfg = dpo.Config(**QUICK | dict(loss=loss))
    items = own_items(cfg, [json.loads(r) for i, r in enumerate(Path(files["pairs"]).read_text().splitlines()) if i % 20 != 19])
    want = slow_metrics(cfg, merged.double(), first.double(), items)
    assert {k: rows[2][k] for k in want} == pytest.approx(want, rel=2e-4, abs=2e-5)
    assert rows[2]["kl"] != 0


def test_lora_online_reference_is_the_model_without_the_adapter(files, tiny, tmp_path):
    """Samples come from the policy, adapter on; the rewards are against the model without it, so they are not 0."""
    rows = train(tmp_path / "a", tiny, files["prompts"], online=True, reward="vowels", k=4, batch=12, lora_r=4, lr=1e-2)
    assert rows[0]["rewards/chosen"] == 0 and all(abs(r["rewards/chosen"]) > 1e-4 for r in rows[1:]) and rows[2]["kl"] != 0


# ---------------------------------------------------------------- the one-token bandit (F2)

ARMS, PI_REF = "abcd", (.4, .3, .2, .1)


@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    """A policy that says a, b, c, d with π_ref."""
    return save(tmp_path_factory.mktemp("bandit"), bandit_policy(dict(zip(ARMS, PI_REF))))


def arms(folder, name="model"):
    """The exact policy of a checkpoint."""
    net, prompt = load_model(folder), TOK.prompt([dict(role="user", content="?")])
    probs = net.logits(net(torch.tensor([prompt])))[0, -1].softmax(-1)
    return probs[[TOK.encode(arm)[0] for arm in ARMS]]


def duels(share, scores=False):
    """Records over the six pairs of arms of reward 0, 1, 2, 3; share: gap -> (how often the better won, of how many)."""
    out = []
    for i, j in itertools.combinations(range(4), 2):
        won, n = share[j - i]
        for k in range(n):
            w, l = (j, i) if k < won else (i, j)
            out.append(dict(prompt=[dict(role="user", content="?")], responses=[ARMS[w], ARMS[l]])
                       | (dict(scores=[w, l]) if scores else {}))
    for i in range(19, len(out) * 20 // 19, 20):                         # what is held out is none of them
        out.insert(i, out[0])
    return out + out[:1] * (len(out) < 20)


def learn(bandit, folder, rows, steps=120, lr=3e-2, **options):
    """Full batches, the end token left out: one token a response, and the exact gradient. -> policy, metrics."""
    folder.mkdir()
    options = dict(beta=1.0, mask_end=True, max_new=80, batch=len(rows) - max(1, len(rows) // 20)) | options
    rows = train(folder / "run", bandit, write(folder / "d.jsonl", rows), steps=steps, lr=lr, **options)
    return arms(folder / "run"), rows


CERTAIN = {1: (1, 1), 2: (1, 1), 3: (1, 1)}
BT = {1: (11, 15), 2: (22, 25), 3: (20, 21)}                             # σ(1) = .731, σ(2) = .881, σ(3) = .953
EVEN = {1: (19, 26), 2: (23, 26), 3: (25, 26)}                           # the same, every pair as often
FLIPPED = {1: (23, 36), 2: (8, 11), 3: (17, 22)}                         # .2 + .6 σ
FLIPPED_EVEN = {1: (23, 36), 2: (26, 36), 3: (28, 36)}
TILT = [.085073, .173439, .314304, .427184]                              # π_ref e^r / Z
F2 = {  # what must be arrived at, from which records, with which options
    "dpo": (TILT, BT, {}),
    "dpo on flipped labels is biased": ([.221749, .263632, .287082, .227536], FLIPPED_EVEN, {}),
    "robust undoes the flips": (TILT, FLIPPED, dict(loss="robust", eps=.2)),
    "ipo": ([.262445, .277043, .270293, .190219], EVEN, dict(loss="ipo", beta=.5)),  # its τ is our β
    "rpo_squared": (TILT, CERTAIN, dict(loss="rpo_squared")), "rpo_backward": (TILT, CERTAIN, dict(loss="rpo_backward")),
    "rpo_forward": (TILT, CERTAIN, dict(loss="rpo_forward", lr=1e-2)), "dno": (TILT, CERTAIN, dict(loss="dno")),
    "dro": (TILT, CERTAIN, dict(loss="dro", batch=12, steps=120, critic_lr=3e-2)),
}


@pytest.mark.parametrize("name", F2)
def test_f2_bandit_fixed_point(name, bandit, tmp_path):
    """The real loop arrives at the closed form: among the arms, as pairs of them say nothing of any other token."""
    target, share, options = F2[name]
    final, rows = learn(bandit, tmp_path / "a", duels(share, scores=share is CERTAIN), **options)
    assert (final / final.sum() - torch.tensor(target)).abs().max() < .01 and rows[0]["rewards/margin"] == 0
    if name == "dro":                                                     # V = log Σ π_ref e^r, at the prompt's last token
        critic = GPT(load_model(bandit, n_scores=1).config)
        critic.load_state_dict({k.removeprefix("critic/"): v for k, v in weights(tmp_path / "a" / "run", "critic").items()})
        prompt = TOK.prompt([dict(role="user", content="?")])
        assert critic.score(critic(torch.tensor([prompt]))[0, -1]).item() == pytest.approx(1.547956, abs=.02)


def test_f2_tilt_is_the_closed_form(bandit):
    w = torch.tensor([p * math.exp(r) for r, p in enumerate(PI_REF)])
    close(w / w.sum(), TILT, atol=1e-6)
    close(arms(bandit).detach(), PI_REF, atol=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "rpo_backward"])
def test_f2_on_deterministic_labels_dpo_diverges_and_rpo_stays(loss, bandit, tmp_path):
    final, rows = learn(bandit, tmp_path / "a", duels(CERTAIN, scores=True), loss=loss, steps=150)
    margins = [row["rewards/margin"] for row in rows[29::30]]             # mean over the six pairs; of the rewards 5/3
    best_worst = (final[3] / final[0]).log() + math.log(4)
    if loss == "dpo":
        assert all(b > a for a, b in zip(margins, margins[1:])) and best_worst > 10
    else:
        assert all(abs(m - 5 / 3) < .05 for m in margins[2:]) and abs(best_worst - 3) < .02


# ---------------------------------------------------------------- pairs that differ in one digit

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A model that has seen sums, and pairs of answers to sums that differ in one digit (edit distance 1)."""
    out, rng, rows = tmp_path_factory.mktemp("digits"), random.Random(0), []
    sft.train(sft.Config(init="new", n_layer=1, n_head=2, n_embd=64, block_size=64, families="arith", steps=60, batch=32,
                         packing=64, prompt_weight=0.0, out=str(out / "sft"), device="cpu", dtype="fp32", threads=1))
    for _ in range(200):
        task = data.toy_task("train", "arith", rng)
        right = str(task["answer"])
        wrong = right[:-1] + rng.choice([d for d in "0123456789" if d != right[-1]])
        rows.append(dict(prompt=task["prompt"], responses=[f"The answer is {n}." for n in (right, wrong)]))
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out, rows


def test_dpop_keeps_the_chosen_likely_on_pairs_of_one_digits_difference_and_dpo_does_not(digits, tmp_path):
    """M12's sign test: after 100 steps log π(chosen) has fallen in nearly all pairs with DPO, in hardly any with DPOP."""
    out, rows = digits

    def chosen(folder):
        net, ask = load_model(folder, Setup(TOK)), lambda row: [dict(role="user", content=row["prompt"])]
        with torch.no_grad():
            return torch.stack([models.token_logprobs(net, *data.collate(data.encode(
                dict(prompt=ask(row), response=row["responses"][0]), TOK, 64), TOK)).sum() for row in rows])
    before, fell = chosen(out / "sft"), {}
    for loss in ("dpo", "dpop"):
        dpo.train(dpo.Config(init=str(out / "sft"), data=str(out / "pairs.jsonl"), loss=loss, steps=100, batch=8, lr=6e-4,
                             out=str(tmp_path / loss), device="cpu", dtype="fp32", threads=1, eval_every=1000))
        fell[loss] = float((chosen(tmp_path / loss) < before).float().mean())
    assert fell["dpo"] > .9 and fell["dpop"] < .1


# ---------------------------------------------------------------- refreshed references, records without a gap

def test_kto_mismatched_rows_follow_a_refreshed_reference_too(files, tiny, tmp_path, monkeypatch):
    """At each refresh the mismatched log-ratios, of which z is the mean, are 0 again, and at no other step."""
    gaps, real = [], dpo.reference_point

    def point(policy, items, cfg):
        with torch.no_grad():
            rows = dpo.read(policy, [item["other"] for item in items], cfg).taken
        gaps.append(float((rows - torch.stack([item["other_ref"] for item in items])).abs().max()))
        return real(policy, items, cfg)
    monkeypatch.setattr(dpo, "reference_point", point)
    rows = train(tmp_path / "a", tiny, files["thumbs"], loss="kto", steps=6, ref_every=2)
    assert [gap < 1e-5 for gap in gaps[:6]] == [True, False] * 3 and min(gaps[1:6:2]) > 1e-3
    assert all(row["loss"] == pytest.approx(.5, abs=1e-6) for row in rows[::2])


@pytest.mark.parametrize("where", [3, 19])
def test_a_single_record_without_a_gap_is_found_held_out_or_not(where, files, tiny, tmp_path):
    """dno takes its p from `prob`, but a margin needs scores, which one record lacks."""
    rows = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    rows[where] = dict(prompt=rows[where]["prompt"], responses=rows[where]["responses"], prob=.8)
    path = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError, match="--loss dno needs to know how much better"):
        train(tmp_path / "a", tiny, path, loss="dno", margin=.5)
    assert len(train(tmp_path / "b", tiny, path, loss="dno")) == 3


def test_npo_of_a_batch_without_a_bad_response_is_no_division_by_0(files, tiny, tmp_path):
    rows = [dict(prompt=str(i), response="yes", label=i % 20 == 19 or i == 7) for i in range(40)]
    good = write(tmp_path / "d.jsonl", [row | dict(label=not row["label"]) for row in rows])
    seen = train(tmp_path / "a", tiny, good, loss="npo", batch=2, steps=19)
    assert any(row["logps/rejected"] is None for row in seen) and all(math.isfinite(row["loss"]) for row in seen)


def test_24_online_a_file_that_a_verifier_can_tell_nothing_of_is_refused_before_the_first_step(tiny, tmp_path):
    path = write(tmp_path / "mine.jsonl", [dict(prompt=f"Q {i}") for i in range(6)])
    with pytest.raises(UserError, match=r'^(?=.*mine.jsonl)(?=.*exact)(?=.*"answer")[^\n]*$'):
        train(tmp_path / "a", tiny, path, online=True, reward="exact")
    assert not (tmp_path / "a").exists()
