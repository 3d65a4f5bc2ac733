"""orpo.py: its losses against golden numbers and slow formulas, its log odds against 60 digits, its loop against a
second loop.

What all trainers have in common (resuming, seeds, evaluation, LoRA, micro-batches) is in test_runs.py.
"""
import copy
import itertools
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
from model import GPT, GPTConfig, Setup, load_model
from orpo import LOSSES
from policies import TOK, random_policy, save, weights
from runs import close, preferences, rows_in, spoken, write

QUICK = dict(batch=8, steps=3, lr=2e-3, max_new=6, micro_tokens=128)
H = SimpleNamespace(orpo_lam=.1, simpo_beta=2.5, simpo_gamma=1.375, cpo_beta=.1, slic_delta=1.0, slic_lam=.1)


def train(out, init, path, **options):
    return runs.train(orpo, out, init=init, data=path, **QUICK | options)


# ---------------------------------------------------------------- the losses

GOLDEN = dict(orpo=.0512523176, simpo=1.1902907183, slic=1.925, cpo=1.4607162164)
F1 = ([[-.5, -1, -.25], [-2, -.5, -.5, -1, -.25]], [[-1, -.5, -1.5, -.5], [-.75, -1.25]])  # of FEATURES.md


def odds(logp):
    p = torch.exp(logp.mean())
    return p / (1 - p)


def slow_orpo(chosen, rejected, nll, h):
    return nll - h.orpo_lam * torch.log(torch.sigmoid(torch.log(odds(chosen) / odds(rejected))))


def slow_simpo(chosen, rejected, nll, h):
    return -torch.log(torch.sigmoid(h.simpo_beta * (chosen.mean() - rejected.mean()) - h.simpo_gamma))


def slow_cpo(chosen, rejected, nll, h):
    return nll - torch.log(torch.sigmoid(h.cpo_beta * (chosen.sum() - rejected.sum())))


def slow_slic(chosen, rejected, nll, h):
    short = h.slic_delta - (chosen.sum() - rejected.sum())
    return max(0 * short, short) - h.slic_lam * chosen.sum()


# Of the token log-probs of one pair, and its share of the likelihood term.
SLOW = dict(orpo=slow_orpo, simpo=slow_simpo, cpo=slow_cpo, slic=slow_slic)


def slow_loss(loss, chosen, rejected, h, nll):
    return sum(SLOW[loss](w, l, nll, h) for w, l in zip(chosen, rejected)) / len(chosen)


def fast_loss(loss, chosen, rejected, h, nll):
    """The same from orpo.LOSSES."""
    x = SimpleNamespace(lw=torch.stack([w.sum() for w in chosen]), ll=torch.stack([l.sum() for l in rejected]),
                        n_w=torch.tensor([len(w) for w in chosen]), n_l=torch.tensor([len(l) for l in rejected]))
    x.nll = nll.expand(len(chosen))
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
    """One without it, and without its slow formula, cannot be added. Of ORPO it is the odds ratio alone; of CPO, for
    which no peer was run, the number is the slow formula's."""
    chosen, rejected = tensors(F1[0]), tensors(F1[1])
    nll = torch.tensor(0.0) if loss == "orpo" else likelihood(chosen)
    for value in (slow_loss(loss, chosen, rejected, H, nll), fast_loss(loss, chosen, rejected, H, nll)):
        close(value.detach(), GOLDEN[loss], atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_p22_value_and_gradient_equal_a_slow_formula(loss):
    """A sum for a mean, or a mean over the padded length, shows on ragged pairs; each batch has its own options."""
    rng, hinges = random.Random(loss), set()
    for _ in range(30):
        h, sides = SimpleNamespace(**{name: rng.uniform(.05, 3) for name in vars(H)}), []
        for _ in range(2):
            sides.append(tensors([[-rng.expovariate(.5) - .01 for _ in range(rng.randint(1, 9))] for _ in range(7)]))
        got, want = (f(loss, *sides, h, likelihood(sides[0])) for f in (fast_loss, slow_loss))
        close(got.detach(), want.detach(), rtol=1e-12)
        leaves = sides[0] + sides[1]
        slopes = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (got, want)]
        for a, b in zip(*slopes):
            close(a, b, rtol=1e-10)
            hinges.add(bool(b.any()))
    assert loss != "slic" or hinges == {True, False}, "one side of the hinge was not seen"


def test_simpo_without_margin_on_equal_lengths_is_cpo_without_likelihood():
    rng = random.Random(1)
    for n in (1, 3, 8):
        chosen, rejected = (tensors([[-rng.expovariate(1) for _ in range(n)] for _ in range(5)]) for _ in range(2))
        a = fast_loss("simpo", chosen, rejected, SimpleNamespace(simpo_beta=2.0, simpo_gamma=0.0), torch.tensor(0.0))
        b = fast_loss("cpo", chosen, rejected, SimpleNamespace(cpo_beta=2.0 / n), torch.tensor(0.0))
        close(a.detach(), b.detach())


def test_slic_leaves_the_rejected_alone_once_the_margin_is_reached():
    for gap, slope in ((1.0, 0.0), (1.5, 0.0), (40.0, 0.0), (.99, 1.0), (-3.0, 1.0)):
        chosen, rejected = tensors([[-.5]]), tensors([[-.5 - gap]])
        fast_loss("slic", chosen, rejected, H, likelihood(chosen)).backward()
        close(rejected[0].grad, [slope]), close(chosen[0].grad, [-slope - .1])


# ---------------------------------------------------------------- log odds

SWEEP = sorted({-m * 10.0 ** e for e in range(-12, 3) for m in (1, 1.7, 2.5, 4, 6.3, 9)
                if m * 10.0 ** e <= 500} | {-.69, -math.log(2), -.7, -500.0})


def exact(s):
    """log(p / (1 - p)) and its derivative 1 / (1 - p), to 60 digits."""
    with localcontext() as context:
        context.prec = 60
        p = Decimal(s).exp()
        return float(Decimal(s) - (1 - p).ln()), float(1 / (1 - p))


def test_p24_log_odds_are_exact_in_float64_and_so_is_their_gradient():
    """log(1 - exp(s)) is -inf from s = -1e-17 on and has no digit left at -1e-12."""
    s = torch.tensor(SWEEP, dtype=torch.float64, requires_grad=True)
    value = orpo.log_odds(s)
    slope, = torch.autograd.grad(value.sum(), s)
    for got, grad, (want, want_grad) in zip(value.tolist(), slope.tolist(), map(exact, SWEEP)):
        assert got == pytest.approx(want, rel=1e-14, abs=1e-15) and grad == pytest.approx(want_grad, rel=1e-13)
    assert (value.diff() > 0).all() and SWEEP[0] == -500 and SWEEP[-1] == -1e-12


def test_p24_log_odds_in_float32_are_finite_monotone_and_right_to_its_digits():
    s = torch.tensor(SWEEP, requires_grad=True)
    value = orpo.log_odds(s)
    slope, = torch.autograd.grad(value.sum(), s)
    assert value.isfinite().all() and slope.isfinite().all() and (slope >= 0).all() and (value.diff() >= 0).all()
    for x, got, grad in zip(s.tolist(), value.tolist(), slope.tolist()):
        if x < -1e-6:
            assert got == pytest.approx(exact(x)[0], rel=3e-6, abs=1e-6)
            assert grad == pytest.approx(exact(x)[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p24_log_odds_of_a_certain_response_are_finite(dtype):
    """So is the loss with it on either side; s = 0 is what exp(-1e-9) rounds to in float32."""
    s = torch.tensor([0.0, -1e-3], dtype=dtype, requires_grad=True)
    value = orpo.log_odds(s)
    slope, = torch.autograd.grad(value.sum(), s)
    assert value.isfinite().all() and slope.isfinite().all() and value[0] > value[1]
    for pair in (([[0.0, 0.0]], [[-1.0]]), ([[-1.0]], [[0.0]]), ([[-500.0]], [[-1e-9]]), ([[0.0]], [[0.0]])):
        chosen, rejected = (tensors(rows, dtype) for rows in pair)
        loss = fast_loss("orpo", chosen, rejected, H, likelihood(chosen))
        loss.backward()
        assert loss.isfinite() and chosen[0].grad.isfinite().all() and rejected[0].grad.isfinite().all()


# ---------------------------------------------------------------- the loop against a second loop

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences(42))


class Slow:
    """ORPO and its kin again, from the papers: one row at a time, no padding, no micro-batches."""

    def __init__(self, cfg, total):
        self.cfg, self.policy = cfg, load_model(cfg.init, Setup(TOK))
        self.optimizer = runs.SlowOptimizer(self.policy, cfg.lr, total, cfg)

    def measure(self, records):
        """-> the loss of these pairs, to differentiate, and its metrics."""
        c, nll, weight, sides = self.cfg, 0.0, 0.0, ([], [])
        for record in records:
            prompt = TOK.prompt(record["prompt"])
            for side, text in zip(sides, record["responses"]):
                logp, _ = spoken(self.policy, prompt + TOK.response(text), 1)        # of all tokens but the first
                asked, said = logp[:len(prompt) - 1], logp[len(prompt) - 1:]
                side.append(said)
                if side is sides[0]:
                    nll = nll - said.sum() - c.prompt_weight * asked.sum()
                    weight += len(said) + c.prompt_weight * len(asked)
        chosen, rejected = sides
        loss = slow_loss(c.loss, chosen, rejected, c, nll / weight)
        good, bad = ([logp.mean().item() for logp in side] for side in sides)
        return loss, {
            "loss": loss.item(), "nll": float(nll.detach() / weight), "rewards/chosen": runs.mean(good),
            "rewards/rejected": runs.mean(bad), "rewards/margin": runs.mean(good) - runs.mean(bad),
            "rewards/accuracy": runs.mean(w > l for w, l in zip(good, bad)),
            "logps/chosen": runs.mean(logp.sum() for logp in chosen),
            "logps/rejected": runs.mean(logp.sum() for logp in rejected)}

    def step(self, step, records):
        loss, metrics = self.measure(records)
        loss.backward()
        return metrics | self.optimizer.step(step)


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
    cfg = orpo.Config(**runs.QUICK | options)
    calls = runs.watch(monkeypatch, orpo, "generate")
    rows = runs.train(orpo, **options)
    monkeypatch.undo()

    records = data.read_records(pairs, "preference")
    held = [record for i, record in enumerate(records) if i % 20 == 19]
    stream = data.Stream(items=[record for record in records if record not in held], seed=cfg.seed)
    total = cfg.steps or math.ceil(cfg.epochs * 40 / cfg.batch)
    assert len(rows) == total, f"{len(rows)} steps instead of {total}"
    slow = Slow(cfg, total)
    for step, row in enumerate(rows):
        want = slow.step(step, stream.batch(step, cfg.batch))
        if step % 2 or step + 1 == total:
            _, measured = slow.measure(held)
            want |= {f"val_{name}": value for name, value in measured.items() if "logps" not in name}
            _, roll = calls["generate"].pop(0)
            torch.manual_seed(cfg.seed)
            asked = [TOK.prompt(record["prompt"]) for record in held]
            again = model.generate(slow.policy, asked, cfg.max_new)
            assert rows_in(roll) == rows_in(again), "the policy as it is now, seeded, says something else"
            said = rows_in(roll)
            want["response_length"] = runs.mean(len(ids) - start for ids, start in said)
            want["gold"] = runs.mean(
                data.gold(record, runs.text_of(one), runs.ends(one)) for record, one in zip(held, said))
        else:
            assert not any(key.startswith("val_") for key in row)
        runs.compare_rows(step, row, want)
    runs.compare_weights(weights(cfg.out), slow.policy)


def test_p25_an_overlong_prompt_or_response_is_cut_and_finite(tiny, tmp_path):
    some = [dict(prompt="old red box " * 40, responses=["yes", "van " * 60]),
            dict(prompt="?", responses=["cup " * 60, "no"])] * 3
    for row in train(tmp_path / "a", tiny, write(tmp_path / "p.jsonl", some), batch=5, prompt_weight=1.0):
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0


def test_rankings_give_all_pairs_or_the_ends(tiny, tmp_path):
    record = dict(prompt=[dict(role="user", content="?")], responses=["a", "b", "c", "d"], scores=[3.0, 2, 1, 0])
    for mode, want in (("all", itertools.combinations("abcd", 2)), ("ends", [("a", "d")])):
        said = []
        for item in data.preference_items(record, TOK, 64, which=mode):
            said.append(tuple(TOK.decode(ids[target.index(1):-1]) for ids, target in item["rows"]))
        assert said == list(want)
    path = write(tmp_path / "p.jsonl", [record] * 21)
    for mode, updates in (("all", 6), ("ends", 1)):
        assert len(train(tmp_path / mode, tiny, path, pairs=mode, batch=20, steps=0)) == updates


@pytest.mark.parametrize("loss", LOSSES)
def test_a_base_model_learns_pairs_and_no_second_model_is_allocated(loss, tmp_path, monkeypatch):
    """One stage: the chosen becomes likelier (of ORPO and CPO) and the preference clearer, with the policy alone."""
    base, made, copies, real = save(tmp_path / "base", random_policy(3)), [], [], GPT.__init__

    def init(self, *args):
        real(self, *args)
        made.append(self)
    monkeypatch.setattr(GPT, "__init__", init)
    monkeypatch.setattr(GPT, "__deepcopy__", lambda self, memo: copies.append(self), raising=False)
    copy.deepcopy(GPT(GPTConfig(64, 16, 1, 1, 16)))
    assert len(made) == len(copies) == 1, "the net catches no copy"
    rng, rows = random.Random(0), []
    for _ in range(42):
        rows.append(dict(prompt=rng.choice("abcdefgh") * rng.randint(1, 3),
                         responses=["It is fine.", "no " * rng.randint(1, 4)]))
    log = train(tmp_path / "a", base, write(tmp_path / "p.jsonl", rows), loss=loss, lr=5e-3, batch=10, steps=16)
    assert len(made) == 2 and len(copies) == 1, "more than the policy was made"
    if loss in ("orpo", "cpo"):
        assert log[-1]["nll"] < log[0]["nll"] - .5 and log[-1]["val_nll"] < log[0]["nll"] - .5
    assert log[-1]["rewards/margin"] > log[0]["rewards/margin"] + .5 and log[-1]["val_rewards/margin"] > 0
    assert log[-1]["val_rewards/accuracy"] == 1 and log[-1]["loss"] < log[0]["loss"]


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
