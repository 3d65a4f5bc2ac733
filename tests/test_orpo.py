"""orpo.py: its losses against plain Python floats, its log odds against 60 digits, its loop against one row at a time.

The slow losses below know no tensor, no padding and no batch; p22 and so on are rows of PITFALLS.md.
"""
import copy
import itertools
import json
import math
import random
import runpy
import sys
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import model as models
import orpo
from data import Tokenizer, preference_items
from model import GPT, GPTConfig, load_model
from policies import random_policy, save, weights

TOK = Tokenizer.load("toy")
QUICK = dict(device="cpu", dtype="fp32", warmup=0, max_new=4, save_every=1000, eval_every=1000)
H = SimpleNamespace(orpo_lam=.1, simpo_beta=2.5, simpo_gamma=1.375, cpo_beta=.1, slic_delta=1.0, slic_lam=.1)
GOLDEN = dict(orpo=.0512523176, simpo=1.1902907183, slic=1.925, cpo=1.4607162164)
F1 = ([[-.5, -1, -.25], [-2, -.5, -.5, -1, -.25]], [[-1, -.5, -1.5, -.5], [-.75, -1.25]])  # of FEATURES.md


def checkpoint(folder, seed=0, n_scores=0):
    """A random model, far from uniform."""
    return save(folder, random_policy(seed, n_scores=n_scores))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A file of 21 pairs of many lengths; the 20th is held out."""
    rng, words = random.Random(0), "cup van box red old it is fine warm".split()
    say = lambda most: " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))
    rows = [dict(prompt=user(say(5)), responses=[say(9), say(9) + "."]) for _ in range(21)]
    return write(tmp_path_factory.mktemp("pairs") / "ragged.jsonl", rows)


def user(text):
    return [dict(role="user", content=text)]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def train(out, init, path, **options):
    """The real train(); its rows of metrics.jsonl."""
    orpo.train(orpo.Config(out=str(out), init=init, data=path, **(QUICK | options)))
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def halves(path):
    """The records of `ragged` that are trained on, and the one that is held out."""
    records = data.read_records(path, "preference")
    return records[:19] + records[20:], records[19:20]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the slow losses

def log_sigmoid(z):
    return min(z, 0) - math.log1p(math.exp(-abs(z)))


def sigmoid(z):
    return math.exp(log_sigmoid(z))


def slow(loss, chosen, rejected, h, nll=None):
    """Token log-probs as lists -> value, d value / d each chosen token, the same of each rejected token. nll: what the
    likelihood term is, when it is not the mean over all chosen tokens."""
    P, tokens = len(chosen), sum(map(len, chosen))
    value, up, down = 0.0, [], []
    for w, l in zip(chosen, rejected):
        lw, ll, n, m = sum(w), sum(l), len(w), len(l)
        own = -lw * P / tokens if nll is None else nll
        if loss == "orpo":
            pw, pl = math.exp(lw / n), math.exp(ll / m)
            z = math.log(pw / (1 - pw)) - math.log(pl / (1 - pl))
            one, pull = own - h.orpo_lam * log_sigmoid(z), h.orpo_lam * (1 - sigmoid(z))
            gw, gl = -pull / (1 - pw) / n, pull / (1 - pl) / m
        elif loss == "simpo":
            z = h.simpo_beta * (lw / n - ll / m) - h.simpo_gamma
            one, pull = -log_sigmoid(z), h.simpo_beta * (1 - sigmoid(z))
            gw, gl = -pull / n, pull / m
        elif loss == "cpo":
            z = h.cpo_beta * (lw - ll)
            one, pull = own - log_sigmoid(z), h.cpo_beta * (1 - sigmoid(z))
            gw, gl = -pull, pull
        else:
            short = lw - ll < h.slic_delta
            one, gw, gl = short * (h.slic_delta - lw + ll) - h.slic_lam * lw, -short - h.slic_lam, short
        if loss in ("orpo", "cpo") and nll is None:
            gw -= P / tokens
        value += one / P
        up.append([gw / P] * n)
        down.append([gl / P] * m)
    return value, up, down


def fast(loss, chosen, rejected, h, nll=None, dtype=torch.float64):
    """The same from orpo.LOSSES, by autograd."""
    rows = [[torch.tensor(r, dtype=dtype, requires_grad=True) for r in side] for side in (chosen, rejected)]
    lw, ll = (torch.stack([r.sum() for r in side]) for side in rows)
    n_w, n_l = (torch.tensor([len(r) for r in side], dtype=dtype) for side in rows)
    x = SimpleNamespace(lw=lw, ll=ll, n_w=n_w, n_l=n_l,
                        nll=-lw * len(lw) / n_w.sum() if nll is None else torch.full_like(lw, nll))
    each = orpo.LOSSES[loss](x, h)
    assert each.shape == (len(chosen),)                                  # one a pair, so a mean is the caller's
    each.mean().backward()
    zero = lambda r: [0.0] * len(r) if r.grad is None else r.grad.tolist()
    return each.mean().item(), *([zero(r) for r in side] for side in rows)


@pytest.mark.parametrize("loss", GOLDEN)
def test_f1_golden_numbers(loss):
    """Of ORPO it is the odds ratio alone; of CPO, for which no peer was run, the number is the slow loop's."""
    nll = 0.0 if loss == "orpo" else None
    assert slow(loss, *F1, H, nll)[0] == pytest.approx(GOLDEN[loss], abs=1e-9)
    assert fast(loss, *F1, H, nll)[0] == pytest.approx(GOLDEN[loss], abs=1e-9)


def test_every_loss_has_its_golden_number():
    assert set(orpo.LOSSES) == set(GOLDEN) == set(orpo.Config.__annotations__["loss"].__args__)


@pytest.mark.parametrize("loss", GOLDEN)
def test_p22_value_and_gradient_equal_a_slow_loop(loss):
    """A sum for a mean, or a mean over the padded length, shows on ragged pairs; each batch has its own options."""
    rng, hinges = random.Random(loss), set()
    for _ in range(30):
        h = SimpleNamespace(**{k: rng.uniform(.05, 3) for k in vars(H)})
        chosen, rejected = ([[-rng.expovariate(.5) - .01 for _ in range(rng.randint(1, 9))]
                             for _ in range(7)] for _ in range(2))
        value, *slopes = fast(loss, chosen, rejected, h)
        want, *their = slow(loss, chosen, rejected, h)
        assert value == pytest.approx(want, rel=1e-12)
        for mine, theirs in zip(itertools.chain(*slopes), itertools.chain(*their)):
            assert mine == pytest.approx(theirs, rel=1e-10, abs=1e-15)
        hinges |= {slope != 0 for row in their[1] for slope in row}
    assert loss != "slic" or hinges == {True, False}                     # both sides of the hinge were seen


def test_simpo_without_margin_on_equal_lengths_is_cpo_without_likelihood():
    rng = random.Random(1)
    for n in (1, 3, 8):
        chosen, rejected = ([[-rng.expovariate(1) for _ in range(n)] for _ in range(5)] for _ in range(2))
        a = fast("simpo", chosen, rejected, SimpleNamespace(simpo_beta=2.0, simpo_gamma=0.0))
        b = fast("cpo", chosen, rejected, SimpleNamespace(cpo_beta=2.0 / n), nll=0.0)
        for x, y in zip(a[:1] + tuple(itertools.chain(*a[1], *a[2])), b[:1] + tuple(itertools.chain(*b[1], *b[2]))):
            assert x == pytest.approx(y, rel=1e-12)


def test_slic_leaves_the_rejected_alone_once_the_margin_is_reached():
    for gap, slope in ((1.0, 0.0), (1.5, 0.0), (40.0, 0.0), (.99, 1.0), (-3.0, 1.0)):
        _, up, down = fast("slic", [[-.5]], [[-.5 - gap]], H)
        assert down == [[slope]] and up == [[pytest.approx(-slope - .1)]]


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
        got = fast("orpo", *pair, H, dtype=dtype)
        assert all(math.isfinite(x) for x in (got[0], *itertools.chain(*got[1], *got[2])))


# ---------------------------------------------------------------- the loop, one row at a time

def alone(net, record):
    """Token log-probs of the prompt and of each response, from an unpadded forward of one row in float64."""
    prompt, out = TOK.prompt(record["prompt"]), []
    for text in record["responses"]:
        ids = prompt + TOK.response(text)
        logp = net.logits(net(torch.tensor([ids])))[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        out.append((logp[:len(prompt) - 1], logp[len(prompt) - 1:]))
    return out


def expected(net, records, loss, cfg):
    """The metrics of a step on these records, and its loss as a tensor: a plain sum over pairs and tokens."""
    rows = [alone(net, record) for record in records]
    lw, ll = ([row[i][1] for row in rows] for i in (0, 1))
    weight = sum(len(c[1]) + cfg.prompt_weight * len(c[0]) for c, _ in rows)
    nll = -sum(c[1].sum() + cfg.prompt_weight * c[0].sum() for c, _ in rows) / weight
    preferring = {
        "orpo": lambda w, l: -cfg.orpo_lam * torch.log(torch.sigmoid(
            sum(sign * (m.mean() - torch.log(1 - torch.exp(m.mean()))) for sign, m in ((1, w), (-1, l))))),
        "simpo": lambda w, l: -torch.log(torch.sigmoid(cfg.simpo_beta * (w.mean() - l.mean()) - cfg.simpo_gamma)),
        "cpo": lambda w, l: -torch.log(torch.sigmoid(cfg.cpo_beta * (w.sum() - l.sum()))),
        "slic": lambda w, l: torch.clamp(cfg.slic_delta - w.sum() + l.sum(), min=0) - cfg.slic_lam * w.sum()}[loss]
    mean = lambda values: float(sum(v.item() for v in values) / len(rows))
    good, bad = [w.mean() for w in lw], [l.mean() for l in ll]
    out = {"nll": nll.item(), "rewards/chosen": mean(good), "rewards/rejected": mean(bad),
           "rewards/margin": mean(good) - mean(bad), "rewards/accuracy": mean(map(torch.gt, good, bad)),
           "logps/chosen": mean([w.sum() for w in lw]), "logps/rejected": mean([l.sum() for l in ll])}
    return out, (nll if loss in ("orpo", "cpo") else 0) + sum(map(preferring, lw, ll)) / len(rows)


CASES = [(loss, weight) for loss in ("orpo", "cpo") for weight in (0.0, .5, 1.0)] + [("simpo", 0.0), ("slic", 1.0)]


@pytest.mark.parametrize("loss, prompt_weight", CASES)
def test_p07_p22_first_step_equals_one_row_at_a_time(loss, prompt_weight, tiny, ragged, tmp_path, monkeypatch):
    """Loss, metrics and gradient in micro-batches of two pairs. prompt_weight 1: ORPO's likelihood over prompt and
    chosen, as its authors have it; per token of the whole batch, not the mean of each pair's mean."""
    grads, real = [], models.Optimizer.step
    monkeypatch.setattr(models.Optimizer, "step", lambda self, step: (
        grads.append([p.grad.clone() for p in self.params]), real(self, step))[1])
    options = dict(loss=loss, prompt_weight=prompt_weight, simpo_beta=.7, simpo_gamma=.3, cpo_beta=.05, slic_delta=9.0)
    row, = train(tmp_path / "a", tiny, ragged, batch=20, steps=1, micro_tokens=128, clip_grad=0.0, **options)
    net = load_model(tiny).double()
    out, value = expected(net, halves(ragged)[0], loss, orpo.Config(**options))
    assert {k: row[k] for k in out} == pytest.approx(out, rel=1e-5, abs=1e-5)
    assert row["loss"] == pytest.approx(value.item(), rel=1e-5)
    for got, want in zip(grads[0], torch.autograd.grad(value, list(net.parameters()))):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_same_measure_on_held_out_pairs(tiny, ragged, tmp_path):
    """A learning rate of nearly 0 leaves the weights: val_ is the same measure of the record that was left out."""
    row, = train(tmp_path / "a", tiny, ragged, steps=1, lr=1e-12, prompt_weight=.5)
    out, value = expected(load_model(tiny).double(), halves(ragged)[1], "orpo",
                          orpo.Config(prompt_weight=.5))
    got = {k[4:]: v for k, v in row.items() if k.startswith("val_")}
    assert got == pytest.approx({k: v for k, v in out.items() if "logps" not in k} | dict(loss=value.item()), rel=1e-4)
    assert (tmp_path / "a" / "samples" / "000001.txt").read_text().count("→") == 1
    assert 1 <= row["response_length"] <= 4


def test_p07_micro_batches_change_no_logged_number(tiny, ragged, tmp_path):
    small, large = (train(tmp_path / str(n), tiny, ragged, micro_tokens=n, batch=8, eval_every=1, lr=1e-5,
                          prompt_weight=.3) for n in (1, 100_000))
    assert len(small) == 3                                               # 20 pairs in eights
    for a, b in zip(small, large):
        assert a.keys() == b.keys()
        for key in a.keys() - {"gold"}:
            assert a[key] == pytest.approx(b[key], abs=2e-5, rel=1e-4), key


def test_p22_one_forward_for_chosen_and_rejected_and_padding_changes_nothing(tiny, ragged, tmp_path, monkeypatch):
    """Wider padding would move a loss that counted it, above all in a likelihood with the prompt in it."""
    seen, logprobs, collate = [], orpo.token_logprobs, orpo.collate
    monkeypatch.setattr(orpo, "token_logprobs", lambda net, tokens, mask: (
        seen.append(tokens), logprobs(net, tokens, mask))[1])
    options = dict(batch=20, steps=1, micro_tokens=100_000, prompt_weight=1.0)
    plain = train(tmp_path / "a", tiny, ragged, **options)
    assert len(seen) == 2 and [len(tokens) for tokens in seen] == [40, 2]  # the step, and the one held-out pair
    texts = [TOK.decode([i for i in row if i != TOK.pad]) for row in seen[0].tolist()]
    assert sorted(zip(texts[::2], texts[1::2])) == sorted(
        tuple(TOK.decode(TOK.prompt(r["prompt"]) + TOK.response(t)) for t in r["responses"])
        for r in halves(ragged)[0])

    def wider(rows, tok, device):
        tokens, mask = collate(rows, tok, device)
        return (torch.nn.functional.pad(tokens, (0, 16), value=tok.pad), torch.nn.functional.pad(mask, (0, 16)))
    monkeypatch.setattr(orpo, "collate", wider)
    for a, b in zip(plain, train(tmp_path / "b", tiny, ragged, **options)):
        assert {k: v for k, v in a.items() if v} == pytest.approx({k: v for k, v in b.items() if v}, rel=1e-4)


def test_p25_an_overlong_prompt_or_response_is_cut_and_finite(tiny, tmp_path):
    rows = [dict(prompt=user("old red box " * 40), responses=["yes", "van " * 60]),
            dict(prompt=user("?"), responses=["cup " * 60, "no"])] * 3
    for row in train(tmp_path / "a", tiny, write(tmp_path / "p.jsonl", rows), batch=5, prompt_weight=1.0):
        assert all(math.isfinite(v) for v in row.values() if v is not None)
    assert all(t.isfinite().all() for t in weights(tmp_path / "a").values())


def test_rankings_give_all_pairs_or_the_ends(tiny, tmp_path):
    record = dict(prompt=user("?"), responses=["a", "b", "c", "d"], scores=[3.0, 2, 1, 0])
    for mode, want in (("all", itertools.combinations("abcd", 2)), ("ends", [("a", "d")])):
        items = preference_items(record, TOK, 64, which=mode)
        said = [tuple(TOK.decode([i for i, t in zip(*row) if t and i != TOK.end]) for row in item["rows"])
                for item in items]
        assert said == list(want)
    path = write(tmp_path / "p.jsonl", [record] * 21)
    assert [len(train(tmp_path / mode, tiny, path, pairs=mode, batch=20)) for mode in ("all", "ends")] == [6, 1]


# ---------------------------------------------------------------- the loop, as a whole

@pytest.mark.parametrize("loss", GOLDEN)
def test_a_base_model_learns_pairs_and_no_second_model_is_allocated(loss, tmp_path, monkeypatch):
    """One stage: the chosen becomes likelier (of ORPO and CPO) and the preference clearer, with the policy alone."""
    base, made, copies, real = checkpoint(tmp_path / "base", 3), [], [], GPT.__init__

    def init(self, config):
        real(self, config)
        made.append(config)
    monkeypatch.setattr(GPT, "__init__", init)
    monkeypatch.setattr(GPT, "__deepcopy__", lambda self, memo: copies.append(self), raising=False)
    monkeypatch.setattr(orpo, "load_model", lambda *args, **kwargs: (made.append(args), load_model(*args, **kwargs))[1])
    copy.deepcopy(SimpleNamespace(net=GPT(GPTConfig(64, 16, 1, 1, 16))))
    assert len(made) == len(copies) == 1                                 # the net catches a copy
    rng = random.Random(0)
    rows = [dict(prompt=user(rng.choice("abcdefgh") * rng.randint(1, 3)),
                 responses=["It is fine.", "no " * rng.randint(1, 4)]) for _ in range(42)]
    log = train(tmp_path / "a", base, write(tmp_path / "p.jsonl", rows), loss=loss, lr=5e-3, batch=10, steps=16)
    assert len(made) == 3 and len(copies) == 1                           # one call of load_model, one GPT
    if loss in ("orpo", "cpo"):
        assert log[-1]["nll"] < log[0]["nll"] - .5 and log[-1]["val_nll"] < log[0]["nll"] - .5
    assert log[-1]["rewards/margin"] > log[0]["rewards/margin"] + .5 and log[-1]["val_rewards/margin"] > 0
    assert log[-1]["val_rewards/accuracy"] == 1 and log[-1]["loss"] < log[0]["loss"]
    assert not {"reference", "clone"} & vars(orpo).keys()


@pytest.mark.parametrize("stop, lora_r", [(1, 0), (3, 0), (5, 0), (3, 2)])
def test_p41_killed_and_resumed_equals_uninterrupted(stop, lora_r, tiny, ragged, tmp_path, monkeypatch):
    """To the bit, also in the middle of an epoch (20 pairs, 8 a step) and before the first checkpoint."""
    options = dict(batch=8, steps=6, save_every=2, eval_every=2, lora_r=lora_r, warmup=2)
    whole, real = train(tmp_path / "a", tiny, ragged, **options), data.Run.log

    def log(self, step, *args, **kwargs):
        if step == stop:
            raise KeyboardInterrupt
        real(self, step, *args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.Run, "log", log)
        train(tmp_path / "b", tiny, ragged, **options)
    assert len((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()) == stop
    assert train(tmp_path / "b", tiny, ragged, **options) == whole and len(whole) == 6
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_p43_evaluation_changes_no_training_number(tiny, ragged, tmp_path):
    often, never = (train(tmp_path / str(n), tiny, ragged, batch=8, steps=5, eval_every=n) for n in (1, 1000))
    assert all("val_loss" in row for row in often) and ["val_loss" in row for row in never] == [False] * 4 + [True]
    assert [{k: a[k] for k in b} for a, b in zip(often, never)] == never
    assert same(weights(tmp_path / "1"), weights(tmp_path / "1000"))


def test_p20_dropout_stays_off(tiny, ragged, tmp_path):
    """A margin between two draws of dropout is noise."""
    net = load_model(tiny)
    net.config.dropout = .5
    rows = [train(tmp_path / name, init, ragged, batch=20, steps=2) for name, init in (
        ("a", tiny), ("b", save(tmp_path / "dropout", net)))]
    assert rows[0] == rows[1]


def test_a_finished_run_is_left_alone(tiny, ragged, tmp_path, capsys):
    first = train(tmp_path / "a", tiny, ragged, batch=20)
    assert "reward.py compare" in capsys.readouterr().out
    assert train(tmp_path / "a", tiny, ragged, batch=20) == first and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("command", [
    "--loss dpo", "--lr 0", "--data toy", "--data nowhere.jsonl", "--prompt_weight 2", "--prompt_weight -1",
    "--simpo_beta 0", "--cpo_beta 0", "--orpo_lam -1", "--slic_lam -.1", "--batch 0", "--epochs 0", "--eval_every 0",
    "--max_new 0", "--save_every 0", "--micro_tokens 0", "--pairs some", "--lamda 1", "--init nowhere", "--init REWARD",
    "--device cuda:99", "something"])
def test_bad_options_are_one_line(command, tiny, ragged, tmp_path, monkeypatch, capsys):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("it may be there")
    if "REWARD" in command:
        command = f"--init {checkpoint(tmp_path / 'reward', n_scores=1)}"
    there = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["orpo.py", "--init", tiny, "--data", ragged, *command.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(orpo.__file__, run_name="__main__")
    err = capsys.readouterr().err
    assert stop.value.code in (1, 2) and err.count("\n") == 1 and err.startswith("error: ")
    assert set(tmp_path.rglob("*")) == there                             # nothing written
