"""orpo.py: its losses against golden numbers and slow formulas, its log odds against 60 digits, its loop against a
second loop.

What all trainers have in common (resuming, seeds, evaluation, LoRA, micro-batches) is in test_runs.py.
"""
import math
import random
from decimal import Decimal, localcontext
from types import SimpleNamespace

import pytest
import torch

import data
import model
import orpo
import runs
from model import GPT, Setup, load_model
from orpo import LOSSES
from policies import TOK, random_policy, save, weights
from runs import close, preferences, rows_in, spoken, write

QUICK = dict(batch=8, steps=3, lr=2e-3, max_new=6, micro_tokens=128)
H = SimpleNamespace(orpo_lam=.1, simpo_beta=2.5, simpo_gamma=1.375, cpo_beta=.1, slic_delta=1.0, slic_lam=.1)


def train(out, init, path, **options):
    return runs.train(orpo, out, init=init, data=path, **(QUICK | options))


# ---------------------------------------------------------------- the losses

GOLDEN = dict(orpo=.0512523176, simpo=1.1902907183, slic=1.925, cpo=1.4607162164)
F1_CHOSEN = [[-.5, -1, -.25], [-2, -.5, -.5, -1, -.25]]
F1_REJECTED = [[-1, -.5, -1.5, -.5], [-.75, -1.25]]


def odds(logp):
    p = torch.exp(logp.mean())
    return p / (1 - p)


def log_sigmoid(x):
    return torch.log(torch.sigmoid(x))


def slow_orpo(chosen, rejected, nll, h):
    ratio = odds(chosen) / odds(rejected)
    return nll - h.orpo_lam * log_sigmoid(torch.log(ratio))


def slow_simpo(chosen, rejected, nll, h):
    margin = chosen.mean() - rejected.mean()
    return -log_sigmoid(h.simpo_beta * margin - h.simpo_gamma)


def slow_cpo(chosen, rejected, nll, h):
    margin = chosen.sum() - rejected.sum()
    return nll - log_sigmoid(h.cpo_beta * margin)


def slow_slic(chosen, rejected, nll, h):
    short = h.slic_delta - (chosen.sum() - rejected.sum())
    return max(0 * short, short) - h.slic_lam * chosen.sum()


# Of the token log-probs of one pair, and its share of the likelihood term.
SLOW = dict(orpo=slow_orpo, simpo=slow_simpo, cpo=slow_cpo, slic=slow_slic)


def slow_loss(loss, chosen, rejected, h, nll):
    each = [SLOW[loss](w, l, nll, h) for w, l in zip(chosen, rejected)]
    return sum(each) / len(each)


def fast_loss(loss, chosen, rejected, h, nll):
    """The same from orpo.LOSSES."""
    x = SimpleNamespace(nll=nll.expand(len(chosen)))
    x.lw = torch.stack([w.sum() for w in chosen])
    x.ll = torch.stack([l.sum() for l in rejected])
    x.n_w = torch.tensor([len(w) for w in chosen])
    x.n_l = torch.tensor([len(l) for l in rejected])
    each = LOSSES[loss](x, h)
    assert each.shape == (len(chosen),), "one number a pair, so that a mean is the caller's"
    return each.mean()


def tensors(rows, dtype=torch.float64):
    return [torch.tensor(row, dtype=dtype, requires_grad=True) for row in rows]


def likelihood(chosen):
    """The mean over all chosen tokens."""
    return -torch.cat(chosen).mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_a_golden_number(loss):
    """One without it cannot be added. Of ORPO it is the odds ratio alone; of CPO, for which no peer was run, the number
    is the slow formula's."""
    chosen, rejected = tensors(F1_CHOSEN), tensors(F1_REJECTED)
    nll = torch.tensor(0.0) if loss == "orpo" else likelihood(chosen)
    value = fast_loss(loss, chosen, rejected, H, nll)
    close(value.detach(), GOLDEN[loss], atol=1e-9)


def random_side(rng):
    """Seven ragged responses."""
    rows = []
    for _ in range(7):
        n = rng.randint(1, 9)
        rows.append([-rng.expovariate(.5) - .01 for _ in range(n)])
    return tensors(rows)


@pytest.mark.parametrize("loss", LOSSES)
def test_p22_value_and_gradient_equal_a_slow_formula(loss):
    """A sum for a mean, or a mean over the padded length, shows on ragged pairs; each batch has its own options."""
    rng, beyond = random.Random(loss), set()
    for _ in range(30):
        h = SimpleNamespace(**{name: rng.uniform(.05, 3) for name in vars(H)})
        chosen, rejected = random_side(rng), random_side(rng)
        got = fast_loss(loss, chosen, rejected, h, likelihood(chosen))
        want = slow_loss(loss, chosen, rejected, h, likelihood(chosen))
        close(got.detach(), want.detach(), rtol=1e-12)
        slopes = torch.autograd.grad(got, chosen + rejected)
        wanted = torch.autograd.grad(want, chosen + rejected)
        for a, b in zip(slopes, wanted):
            close(a, b, rtol=1e-10)
            beyond.add(not b.any())
    assert loss != "slic" or beyond == {True, False}, "one side of the hinge was not seen"


# ---------------------------------------------------------------- log odds

SWEEP = [-500.0, -math.log(2), -.69, -.7]
for power in range(-12, 2):
    SWEEP += [-m * 10.0 ** power for m in (1, 1.7, 2.5, 4, 6.3, 9)]
SWEEP.sort()


def exact(s):
    """log(p / (1 - p)) and its derivative 1 / (1 - p), to 60 digits."""
    with localcontext() as context:
        context.prec = 60
        p = Decimal(s).exp()
        value = Decimal(s) - (1 - p).ln()
        return float(value), float(1 / (1 - p))


def log_odds(rows, dtype):
    """-> log odds, and their derivatives."""
    s = torch.tensor(rows, dtype=dtype, requires_grad=True)
    value = orpo.log_odds(s)
    slope, = torch.autograd.grad(value.sum(), s)
    assert value.isfinite().all() and slope.isfinite().all()
    return value.detach(), slope


def test_p24_log_odds_are_exact_in_float64_and_so_is_their_gradient():
    """log(1 - exp(s)) is -inf from s = -1e-17 on and has no digit left at -1e-12."""
    value, slope = log_odds(SWEEP, torch.float64)
    for s, got, grad in zip(SWEEP, value.tolist(), slope.tolist()):
        want, want_grad = exact(s)
        assert got == pytest.approx(want, rel=1e-14, abs=1e-15), f"log odds at {s}"
        assert grad == pytest.approx(want_grad, rel=1e-13), f"their slope at {s}"



CERTAIN = [([0.0, 0.0], [-1.0]), ([-1.0], [0.0]), ([-500.0], [-1e-9]), ([0.0], [0.0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p24_log_odds_of_a_certain_response_are_finite(dtype):
    """So is the loss with it on either side; s = 0 is what exp(-1e-9) rounds to in float32."""
    value, slope = log_odds([*SWEEP, 0.0], dtype)
    assert (slope >= 0).all() and (value.diff() >= 0).all() and value[-1] > value[0]
    for chosen, rejected in CERTAIN:
        w, l = tensors([chosen], dtype), tensors([rejected], dtype)
        loss = fast_loss("orpo", w, l, H, likelihood(w))
        loss.backward()
        assert loss.isfinite() and w[0].grad.isfinite().all() and l[0].grad.isfinite().all()


# ---------------------------------------------------------------- the loop against a second loop

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences(42))


class Slow:
    """ORPO and its kin again, from the papers: one row at a time, no padding, no micro-batches."""

    def __init__(self, cfg, total):
        self.cfg, self.policy = cfg, load_model(cfg.init, Setup(TOK))
        self.optimizer = runs.SlowOptimizer(self.policy, cfg.lr, total, cfg)

    def read(self, record, text):
        """log π of the prompt's tokens, and of the response's."""
        prompt = TOK.prompt(record["prompt"])
        logp, _ = spoken(self.policy, prompt + TOK.response(text), 1)        # of all tokens but the first
        return logp[:len(prompt) - 1], logp[len(prompt) - 1:]

    def measure(self, records):
        """-> the loss of these pairs, to differentiate, and its metrics."""
        c, nll, weight = self.cfg, 0.0, 0.0
        chosen, rejected = [], []
        for record in records:
            good, bad = record["responses"]
            asked, said = self.read(record, good)
            chosen.append(said)
            rejected.append(self.read(record, bad)[1])
            nll = nll - said.sum() - c.prompt_weight * asked.sum()
            weight += len(said) + c.prompt_weight * len(asked)
        loss = slow_loss(c.loss, chosen, rejected, c, nll / weight)
        good = [logp.mean().item() for logp in chosen]
        bad = [logp.mean().item() for logp in rejected]
        return loss, {
            "loss": loss.item(), "nll": float(nll.detach() / weight),
            "rewards/chosen": runs.mean(good), "rewards/rejected": runs.mean(bad),
            "rewards/margin": runs.mean(good) - runs.mean(bad),
            "rewards/accuracy": runs.mean(w > l for w, l in zip(good, bad)),
            "logps/chosen": runs.mean(logp.sum() for logp in chosen),
            "logps/rejected": runs.mean(logp.sum() for logp in rejected)}

    def step(self, step, records):
        loss, metrics = self.measure(records)
        loss.backward()
        return metrics | self.optimizer.step(step)

    def evaluate(self, held, roll):
        """What an evaluation logs that sampled roll."""
        _, measured = self.measure(held)
        want = {f"val_{name}": value for name, value in measured.items() if "logps" not in name}
        torch.manual_seed(self.cfg.seed)
        prompts = [TOK.prompt(record["prompt"]) for record in held]
        again = model.generate(self.policy, prompts, self.cfg.max_new)
        said = rows_in(roll)
        assert said == rows_in(again), "the policy as it is now, seeded, says something else"
        want["response_length"] = runs.mean(len(ids) - start for ids, start in said)
        golds = [data.gold(record, runs.text_of(row), runs.ends(row)) for record, row in zip(held, said)]
        return want | dict(gold=runs.mean(golds))


LOOPS = {   # every option takes another value than its default at least once
    "orpo": dict(warmup=2, weight_decay=.3, clip_grad=.5, seed=3, steps=4),
    "orpo, prompts too": dict(prompt_weight=1.0, orpo_lam=.3),
    "part of an epoch": dict(steps=0, epochs=.4),
    "simpo": dict(loss="simpo", simpo_beta=.7, simpo_gamma=.3, prompt_weight=.5),
    "cpo": dict(loss="cpo", cpo_beta=.05, prompt_weight=.5),
    "slic": dict(loss="slic", slic_delta=9.0, slic_lam=.3),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop_equals_a_slow_loop(name, pairs, tiny, tmp_path, monkeypatch, float64):
    """Every logged number of every step, evaluations included, and every weight at the end, in float64."""
    options = QUICK | LOOPS[name] | dict(init=tiny, data=pairs, out=str(tmp_path / "run"), eval_every=2)
    cfg = orpo.Config(**(runs.QUICK | options))
    calls = runs.watch(monkeypatch, orpo, "generate")
    rows = runs.train(orpo, **options)
    monkeypatch.undo()

    records = data.read_records(pairs, "preference")
    held = records[19::20]
    stream = data.Stream(items=[record for record in records if record not in held], seed=cfg.seed)
    total = cfg.steps or math.ceil(cfg.epochs * 40 / cfg.batch)
    assert len(rows) == total, f"{len(rows)} steps instead of {total}"
    slow = Slow(cfg, total)
    for step, row in enumerate(rows):
        want = slow.step(step, stream.batch(step, cfg.batch))
        if step % 2 or step + 1 == total:
            _, roll = calls["generate"].pop(0)
            want |= slow.evaluate(held, roll)
        runs.compare_rows(step, row, want)
    runs.compare_weights(weights(cfg.out), slow.policy)



def test_rankings_give_all_pairs_or_the_ends(tiny, tmp_path):
    record = dict(prompt="?", responses=["a", "b", "c", "d"], scores=[3.0, 2, 1, 0])
    path = write(tmp_path / "p.jsonl", [record] * 21)
    for mode, updates in dict(all=6, ends=1).items():
        rows = train(tmp_path / mode, tiny, path, pairs=mode, batch=20, steps=0)
        assert len(rows) == updates


@pytest.mark.parametrize("loss", LOSSES)
def test_a_base_model_learns_pairs_and_no_second_model_is_allocated(loss, tmp_path, monkeypatch):
    """One stage: the chosen becomes likelier (of ORPO and CPO) and the preference clearer, with the policy alone."""
    base, made, real = save(tmp_path / "base", random_policy(3)), [], GPT.__init__

    def init(self, *args):
        made.append(self)
        real(self, *args)
    monkeypatch.setattr(GPT, "__init__", init)
    monkeypatch.setattr(GPT, "__deepcopy__", lambda self, memo: made.append(self), raising=False)
    monkeypatch.setattr(model, "for_sampling", lambda policy: policy)   # a copy that lasts for one evaluation
    rng, rows = random.Random(0), []
    for _ in range(42):
        bad = "no " * rng.randint(1, 4)
        rows.append(dict(prompt=rng.choice("abcdefgh"), responses=["It is fine.", bad]))
    path = write(tmp_path / "p.jsonl", rows)
    log = train(tmp_path / "a", base, path, loss=loss, lr=5e-3, batch=10, steps=16)
    assert len(made) == 1, "more than the policy was made"
    first, last = log[0], log[-1]
    if loss in ("orpo", "cpo"):
        assert last["nll"] < first["nll"] - .5 and last["val_nll"] < first["nll"] - .5
    assert last["rewards/margin"] > first["rewards/margin"] + .5
    assert last["val_rewards/margin"] > 0 and last["val_rewards/accuracy"] == 1


@pytest.mark.parametrize("flags, word", [
    ("--loss dpo", "simpo"), ("--lr 0", "--lr"), ("--data toy", "--data"), ("--prompt_weight 2", "--prompt_weight"),
    ("--simpo_beta 0", "--simpo_beta"), ("--cpo_beta 0", "--cpo_beta"), ("--orpo_lam -1", "--orpo_lam"),
    ("--slic_lam -.1", "--slic_lam"), ("--epochs 0", "--epochs"), ("--pairs some", "--pairs"), ("--lamda 1", "lamda"),
    ("something", "something"), ("--init TINY --data nowhere.jsonl", "nowhere.jsonl"),
    ("--init JUDGE", "language model")])
def test_refusals(flags, word, tiny, judge, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = flags.replace("TINY", tiny).replace("JUDGE", judge).split()
    code, error = runs.refuse(orpo, words, monkeypatch, capsys)
    assert code in (1, 2) and word in error
