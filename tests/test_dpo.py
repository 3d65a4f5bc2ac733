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
import model as models
from data import Tokenizer, UserError
from dpo import LOSSES
from model import GPT, GPTConfig, load_model, save_checkpoint

TOK = Tokenizer.load("toy")
LN2 = math.log(2)
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
    assert {unit for unit, _ in LOSSES.values()} == {"pair", "single", "bad"}


@pytest.mark.parametrize("name", GOLDEN)
def test_f1_golden_number(name):
    golden, options = GOLDEN[name]
    value = LOSSES[name][1](f1()[0], hyper(**options))
    assert value.shape == ({"single": 4}.get(LOSSES[name][0], 2),) and value.dtype == torch.float64     # 33: (N,)
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


@pytest.mark.parametrize("per, golden", [("token", .8197083479), ("pair", .8130416812)])
def test_f1_the_two_nll_reductions(per, golden):
    lw, n = torch.tensor([sum(r) for r in CHOSEN], dtype=torch.float64), torch.tensor([3, 5])
    terms, count = dpo.nll(lw, n, per)
    assert terms.shape == (2,)
    close(LOSSES["dpo"][1](f1()[0], hyper()).mean() + .2 * terms.sum() / count, golden, atol=1e-9)


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

QUICK = dict(device="cpu", dtype="fp32", epochs=1.0, batch=100, steps=3, lr=2e-3, critic_lr=1e-2, warmup=0, max_new=6,
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
    torch.manual_seed(seed)
    net = GPT(GPTConfig(TOK.n_vocab, 64, 1, 2, 32, dropout=dropout, n_scores=n_scores))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        net.transformer.ln_f.weight[0], net.transformer.ln_f.bias[0] = 0.0, 1.0
        net.transformer.wte.weight[:, 0], net.transformer.wte.weight[TOK.end, 0] = 0.0, 4.0
        net.transformer.wte.weight[TOK.pad, 0] = -50.0
    return net


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
    tensors, _ = models.load_tensors(Path(folder) / "checkpoint.safetensors")
    return {k: v.clone() for k, v in tensors.items() if k.startswith(name + "/")}


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
    got = dpo.sequence_kl(policy, ref, contextlib.nullcontext, tokens, mask, chunk=chunk)
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
    dpo.sequence_kl(policy, ref.requires_grad_(False), contextlib.nullcontext, tokens, mask).sum().backward()
    assert all(p.grad is None for p in ref.parameters()) and all(p.grad is not None for p in policy.parameters())
    same_one = dpo.sequence_kl(policy, models.clone(policy), contextlib.nullcontext, tokens, mask)
    close(same_one.detach(), torch.zeros(5), atol=1e-12)


# ---------------------------------------------------------------- the loop against a second loop

def own_items(cfg, rows):
    """What the loop should make of records: dicts of prompt, good and bad responses (ids) and what is known of them."""
    unit, out = LOSSES[cfg.loss][0], []
    ids = lambda r, i: TOK.prompt(r["prompt"]), lambda r, i: TOK.response(r["responses"][i])
    for r in rows:
        prompt, said = TOK.prompt(r["prompt"]), [TOK.response(t) for t in r.get("responses") or [r["response"]]]
        best, worst = 0, len(said) - 1
        if unit != "pair":
            sides = [(r["label"], 0)] if "response" in r else [(True, best), (False, worst)]
            out += [dict(prompt=prompt, good=[said[i]] * up, bad=[said[i]] * (not up),
                         r=r["scores"][i] if "scores" in r else float(up)) for up, i in sides]
        elif cfg.loss == "d2o":
            out.append(dict(prompt=prompt, good=said[:-1], bad=said[-1:]))
        else:
            for i, j in itertools.combinations(range(len(said)), 2):
                if cfg.pairs == "all" or (i, j) == (best, worst):
                    gap = r["scores"][i] - r["scores"][j] if "scores" in r else r.get("margin")
                    win = [r["win"][i], r["win"][j]] if "win" in r else gap is not None and [sg(gap), sg(-gap)]
                    out.append(dict(prompt=prompt, good=[said[i]], bad=[said[j]], gap=gap, win=win))
    return out


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
    if LOSSES[cfg.loss][0] == "pair":
        out["rewards/accuracy"] = mean([float(u > v) + .5 * (u == v) for u, v in zip(a, b)])
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
    "dro, ends of a ranking": dict(loss="dro", file="ranks"),
    "kto, thumbs": dict(loss="kto", file="thumbs", lam_up=1.3, lam_down=.7),
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
    rows = train(tmp_path / "a", tiny, path, save_every=1, eval_every=3, **options)
    cfg = dpo.Config(**QUICK | options)
    policy, ref, critic = load_model(tmp_path / "at" / "2").double(), load_model(tiny).double(), None
    if cfg.loss == "dro":
        critic = network(n_scores=1).double()
        critic.load_state_dict({k.removeprefix("critic/"): v for k, v in weights(tmp_path / "at" / "2", "critic").items()})
    every = [json.loads(line) for line in Path(path).read_text().splitlines()]
    n_held = 20
    seen = own_items(cfg, [r for i, r in enumerate(every) if i % n_held != n_held - 1])
    cfg.batch = 100
    assert len(seen) <= 100 and len({len(y) for i in seen for y in i["good"] + i["bad"]}) > 3
    # a batch of 100 goes on in the next epoch, so which items come twice is the stream's business
    stream = data.Stream(items=list(range(len(seen))), seed=0)
    batch = [seen[i] for i in stream.batch(2, 100)]
    others = []
    if cfg.loss == "kto":
        mates = {(tuple(i["rows"][0][0]), i["up"][0]): i["other"] for i in taken[0]}
        ids = lambda i: (tuple(i["prompt"] + (i["good"] + i["bad"])[0]), bool(i["good"]))
        others = [(o[0][:o[1].index(1)], o[0][o[1].index(1):]) for o in (mates[ids(i)] for i in batch)]
        assert all(o[0] == i["prompt"] for o, i in zip(others, batch))
    want = slow_metrics(cfg, policy, ref, batch, critic, others)
    got = {k: rows[2].get(k) for k in want}
    assert got == pytest.approx(want, rel=2e-4, abs=2e-5)
    assert abs(want["rewards/margin"]) > 1e-4 * cfg.beta
    assert rows[0]["rewards/margin"] == 0 and rows[0]["loss"] != rows[2]["loss"]
    assert any(k.startswith("val_") for k in rows[2]) and not any(k.startswith("val_") for k in rows[1])
