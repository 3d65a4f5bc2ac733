"""reward.py and the scripts beside recipes that label: losses and statistics against loops and closed forms; what label
keeps against every answer that was sampled; label -> train -> compare, each recomputed row by row."""
import collections
import inspect
import itertools
import json
import math
import random
import re
import runpy
import sys
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import chatglm_rlhf
import claude_cai
import data
import kimi_k15
import long2short
import model as models
import nemotron4
import process_rewards
import quark
import reward
import reward_hacking
import rule_based_rewards
import superficial
from data import Tokenizer, UserError, encode
from model import Reward, Rollout, Setup, generate, load_model, save_checkpoint
from policies import patch, random_policy

TOK = Tokenizer.load("toy")
CPU = dict(device="cpu", dtype="fp32")
QUICK = CPU | dict(warmup=0, save_every=1000, eval_every=1000)
LEARN = dict(lr=1e-2, optimizer="adamw", weight_decay=0.0, batch=16)


# ---- models and files

def checkpoint(folder, seed=0, **options):
    """A random model that ends about one response in three early and never samples padding; says="ae": nothing but
    these letters."""
    net = random_policy(seed, **options)
    save_checkpoint(folder, dict(model=net), {}, dict(step=0, done=True, state={}, tokenizer=TOK.fingerprint))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory): return checkpoint(tmp_path_factory.mktemp("judge"), 1, n_scores=1)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """With room for a question about answers."""
    return checkpoint(tmp_path_factory.mktemp("roomy"), 5, block_size=256)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A policy of two letters: its short answers repeat, and tie."""
    return checkpoint(tmp_path_factory.mktemp("letters"), says="ae")


def vowels(text): return len(text) / 10 - text.count("e")


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    """Verifiers to test with: vowels, and how often a text says red, soft and old."""
    monkeypatch.setitem(data.VERIFIERS, "vowels", lambda record, text, finished: vowels(text))
    for word in ("red", "soft", "old"):
        monkeypatch.setitem(data.VERIFIERS, word, lambda record, text, finished, word=word: text.split().count(word))


def user(text): return [dict(role="user", content=text)]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(path): return [json.loads(line) for line in Path(path).read_text().splitlines()]


def ranked(*answers, n=40, **more): return [dict(prompt=user("?"), responses=list(answers), **more)] * n


def rankings(n=60):
    """Prompts with 2 to 4 answers of several lengths each, best first."""
    rng, rows = random.Random(3), []
    text = lambda: " ".join(rng.choice("cup van box red old it is fine warm".split()) for _ in range(rng.randint(1, 7)))
    for _ in range(n):
        asked, said = text(), {text() for _ in range(4)}
        rows.append(dict(prompt=user(asked), responses=sorted(said, key=lambda text: (len(text), text))))
    return rows


def question_of(i, *answers, **more): return dict(prompt=user(f"Q {i}"), responses=list(answers), **more)


def asked_of(row): return row["prompt"][-1]["content"]


def by_prompt(rows): return {asked_of(row): row for row in rows}


def number(text): return int(text.split()[-1])


# ---- the commands

def train(out, init, path, **options):
    """The real train(); its rows of metrics.jsonl."""
    reward.train(reward.Train(out=str(out), init=init, data=str(path), **(QUICK | options)))
    return read(out / "metrics.jsonl")


def label(out, policy, **options):
    """The real label(), the higher score first; its records."""
    sure = dict(n=40, batch=16, max_new=8, by="vowels", scale=0.0, flip=0.0)
    reward.label(reward.Label(out=str(out), policy=policy, **(CPU | sure | options)))
    return read(Path(out) / "pairs.jsonl")


def relabel(out, rows, **options):
    """label --policy "" of a file with these rows."""
    path = write(Path(out).with_suffix(".jsonl"), rows)
    return label(out, "", data=path, **(dict(n=1000) | options))


def compare(folders, tmp_path, **options):
    """The real compare(); its table."""
    usual = dict(max_new=6, n=12, families="write,safe", on="write,safe", judge="vowels")
    reward.compare(reward.Compare(save=str(tmp_path / "table.json"), device="cpu", **(usual | options)), folders)
    return json.loads((tmp_path / "table.json").read_text())


def curate(out, policy, path, **options):
    options = CPU | dict(max_new=8, batch=7) | options
    kimi_k15.curate(kimi_k15.Config(out=str(out), policy=policy, data=path, **options))
    return read(Path(out) / "prompts.jsonl")


def revise(out, policy, critic, path, **options):
    options = CPU | dict(max_new=20) | options
    claude_cai.revise(claude_cai.Config(out=str(out), policy=policy, critic=critic, data=path, **options))
    return read(Path(out) / "revisions.jsonl")


def fit(out, path, **options):
    options = CPU | dict(rules="red + soft + old", base=".1*words") | options
    rule_based_rewards.fit(rule_based_rewards.Config(out=str(out), data=path, **options))
    return read(Path(out) / "metrics.jsonl"), (Path(out) / "reward.txt").read_text()


def overoptimize(out, policy, *folders, **options):
    usual = CPU | dict(proxy="vowels", judge="words", prompts=20, n=8, max_new=6)
    reward_hacking.overoptimize(reward_hacking.Config(out=str(out), policy=policy, **(usual | options)),
                                list(map(str, folders)))
    return json.loads((Path(out) / "curves.json").read_text())


# ---- what is recomputed

def score(folder, *texts, prompt="?"):
    """Scores by a reward model, one unpadded row at a time."""
    net, asked = load_model(folder), TOK.prompt(user(prompt))
    return [net.score(net(torch.tensor([asked + TOK.response(t)]))[0, -1]).item() for t in texts]


def close(x, y, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64),
                               atol=atol, rtol=0)


def mean(values): return sum(values) / len(values)


def sigmoid(x): return 1 / (1 + math.exp(-x))


def nls(x):
    """-log σ(x), without overflow."""
    return max(-x, 0) + math.log1p(math.exp(-abs(x)))


def spied(monkeypatch):
    """The rollouts of what follows, each with its temperature and what it was made to begin with."""
    calls, real = [], models.generate

    def spy(model, prompts, max_new, n=1, temperature=1.0, begin=()):
        roll = real(model, prompts, max_new, n, temperature=temperature, begin=begin)
        calls.append(SimpleNamespace(roll=roll, temperature=temperature, begin=list(begin), n=n))
        return roll
    patch(monkeypatch, "generate", spy)
    return calls


def groups_of(calls):
    """Of every prompt asked, its finished answers, none twice: {text: tokens}."""
    groups = []
    for call in calls:
        said = list(zip(call.roll.responses(), call.roll.mask.sum(1).tolist(), call.roll.finished.tolist()))
        for i in range(0, len(said), call.n):
            groups.append({text: n for text, n, done in said[i:i + call.n][::-1] if done and text.strip()})
    return groups


def play(monkeypatch, plan):
    """Sampling is replaced by a plan: the answers to a prompt are plan(its text, k, whether told how to begin); None is
    one that is not finished. What was asked: (folder of the model, texts of the prompts, k, how they begin)."""
    calls, folder_of, real = [], {}, models.load_model

    def load(folder, *args, **kwargs):
        net = real(folder, *args, **kwargs)
        folder_of[net] = str(folder)
        return net

    def generate_(model, prompts, max_new, n=1, temperature=1.0, begin=()):
        rows, done, texts = [], [], [TOK.decode(ids) for ids in prompts]
        for ids, text in zip(prompts, texts):
            said = plan(text, n, bool(begin))
            assert len(said) == n
            for answer in said:
                ids_said = TOK.response("It goes" if answer is None else answer, answer is not None)
                rows.append((ids + ids_said, [0] * len(ids) + [1] * len(ids_said)))
                done.append(answer is not None)
        calls.append((folder_of[model], texts, n, TOK.decode(list(begin))))
        roll = Rollout.of(rows, TOK)
        roll.finished = torch.tensor(done)
        return roll
    patch(monkeypatch, "generate", generate_)
    patch(monkeypatch, "load_model", load)
    return calls


def never(*_, **__): raise AssertionError("it sampled")


def interrupted(monkeypatch, step, run):
    """Run something, and end it where this step is logged."""
    real = data.Run.log

    def log(self, here, *args, **kwargs):
        if here == step:
            raise KeyboardInterrupt
        real(self, here, *args, **kwargs)
    with monkeypatch.context() as change, pytest.raises(KeyboardInterrupt):
        change.setattr(data.Run, "log", log)
        run()


def logged(folder): return [{k: v for k, v in row.items() if k != "seconds"} for row in read(folder / "metrics.jsonl")]


# ---------------------------------------------------------------- losses of pairs and rankings

W, L = [1, -.5, 2], [0, .5, -1]                                          # FEATURES F1's three pairs
GOLDEN = dict(bt=.5583702422, focal=.46811035028, soft=.5250369089, cost=2.3566210872)
GIVEN = dict(prob=[.8, .4, .9], s_w=[1.0, 1, -1], s_l=[1.0, -1, -1], margin=[0.0, 0, 0])
SLOW_PAIRS = dict(
    bt=lambda w, l, x: nls(w - l - x["margin"]),
    focal=lambda w, l, x: (1 - 2 * max(0, sigmoid(w - l) - .5)) ** x["gamma"] * nls(w - l),
    soft=lambda w, l, x: -x["prob"] * math.log(sigmoid(w - l)) - (1 - x["prob"]) * math.log(sigmoid(l - w)),
    cost=lambda w, l, x: nls(w - l) + nls(w if x["s_w"] > 0 else -w) + nls(l if x["s_l"] > 0 else -l))


def pair_loss(name, w, l, gamma=2.0, **given):
    """The losses (P,) of the source, in float64."""
    wide = lambda v: torch.as_tensor(v, dtype=torch.float64)
    x = SimpleNamespace(r_w=wide(w), r_l=wide(l), **{k: wide(v) for k, v in (GIVEN | given).items()})
    return reward.PAIR_LOSSES[name](x, SimpleNamespace(gamma=gamma))


def test_f1_every_pair_loss_has_a_golden_number():
    assert GOLDEN.keys() == reward.PAIR_LOSSES.keys() == SLOW_PAIRS.keys()
    for name, golden in GOLDEN.items():
        assert pair_loss(name, W, L).shape == (3,)                       # (N, 1) - (N,) would be (N, N)
        close(pair_loss(name, W, L).mean(), golden, 2e-10)


def test_f1_of_rankings_and_the_barrier():
    """All pairs of InstructGPT and Plackett-Luce of [2, .5, 0, -1], best first."""
    scores = torch.tensor([2, .5, 0, -1], dtype=torch.float64)
    win, lose, weight = reward.ranked_pairs([4])
    close((weight.double() * reward.bradley_terry(scores[win], scores[lose])).sum(), .2276134317, atol=1e-7)
    close(reward.plackett_luce(scores), 1.2597418752)
    close(reward.log_barrier(torch.tensor(W + L, dtype=torch.float64)).sum() / 3, -6.345719, 1e-6)


@pytest.mark.parametrize("name", SLOW_PAIRS)
def test_pair_losses_and_their_gradients_against_a_loop(name):
    """With every combination of signs; gradients by central differences of the loop; and finite far from 0."""
    rng = random.Random(0)
    rows = [dict(w=rng.gauss(0, 3), l=rng.gauss(0, 3), margin=rng.choice([0.0, 1.5]), prob=rng.random(), s_w=a, s_l=b)
            for a in (1.0, -1.0) for b in (1.0, -1.0) for _ in range(10)]
    for gamma in (0.5, 2.0, 5.0):
        r_w, r_l = (torch.tensor([x[k] for x in rows], dtype=torch.float64, requires_grad=True) for k in "wl")
        got = pair_loss(name, r_w, r_l, gamma, **{k: [x[k] for x in rows] for k in GIVEN})
        slow = lambda x, **moved: SLOW_PAIRS[name]((x | moved)["w"], (x | moved)["l"], x | dict(gamma=gamma))
        close(got.detach(), [slow(x) for x in rows], 1e-9)
        got.sum().backward()
        for k, grad in (("w", r_w.grad), ("l", r_l.grad)):
            close(grad, [(slow(x, **{k: x[k] + 1e-5}) - slow(x, **{k: x[k] - 1e-5})) / 2e-5 for x in rows], 1e-5)
    r = torch.tensor([-500.0, 0, 500], requires_grad=True)
    x = SimpleNamespace(r_w=r, r_l=-r, margin=0.0, prob=torch.full((3,), .7), s_w=torch.ones(3), s_l=torch.ones(3))
    loss = reward.PAIR_LOSSES[name](x, SimpleNamespace(gamma=2.0))
    loss.sum().backward()
    assert loss.isfinite().all() and r.grad.isfinite().all()


def test_identities_of_the_pair_losses():
    plain = pair_loss("bt", W, L)
    close(pair_loss("focal", W, L, gamma=0.0), plain)
    close(pair_loss("soft", W, L, prob=[1.0] * 3), plain)
    close(pair_loss("soft", W, L, prob=[0.0] * 3), pair_loss("bt", L, W))
    for w, l in zip(W, L):
        close(reward.plackett_luce(torch.tensor([w, l], dtype=torch.float64)), nls(w - l))
    for prob, gap in ((.5, 0.0), (.8, math.log(4)), (.1, -math.log(9))):            # least where σ(gap) is the label's
        at = lambda g: float(pair_loss("soft", g, 0.0, prob=prob))
        assert all(at(gap) < at(gap + step) for step in (-2, -.1, -1e-3, 1e-3, .1, 2))


def test_barrier_and_its_gradient_against_a_loop():
    rng = random.Random(1)
    for bound in (5.0, 2.0):
        r = torch.tensor([rng.uniform(-bound, bound) * .99 for _ in range(40)], dtype=torch.float64, requires_grad=True)
        got = reward.log_barrier(r, bound)
        close(got.detach(), [-math.log(bound - x) - math.log(bound + x) for x in r.tolist()])
        got.sum().backward()
        close(r.grad, [1 / (bound - x) - 1 / (bound + x) for x in r.tolist()])
    beyond = torch.tensor([5.0, -5.0, 60.0, -1e6], requires_grad=True)
    wall = reward.log_barrier(beyond)
    wall.sum().backward()
    close(wall.detach(), [-math.log(.001) - math.log(9.999)] * 4, 1e-3)
    assert beyond.grad.isfinite().all()


def slow_plackett_luce(scores):
    """Of all orders of choosing without replacement by exp(score), the probability of this one."""
    p = 1.0
    for i in range(len(scores)):
        p *= math.exp(scores[i]) / sum(math.exp(s) for s in scores[i:])
    return -math.log(p)


def test_plackett_luce_and_its_gradient_against_a_loop():
    rng = random.Random(2)
    for k in (1, 2, 3, 6):
        r = torch.tensor([rng.gauss(0, 2) for _ in range(k)], dtype=torch.float64, requires_grad=True)
        reward.plackett_luce(r).backward()
        s = r.tolist()
        close(reward.plackett_luce(r).detach(), slow_plackett_luce(s))
        moved = lambda i, by: slow_plackett_luce([x + by * (i == j) for j, x in enumerate(s)])
        close(r.grad, [(moved(i, 1e-5) - moved(i, -1e-5)) / 2e-5 for i in range(k)], 1e-8)
        every = [math.exp(-float(reward.plackett_luce(r.detach()[list(o)]))) for o in itertools.permutations(range(k))]
        close(sum(every), 1.0)


def test_ranked_pairs_against_a_loop():
    sizes, place, expected = [2, 4, 3, 2], 0, []
    for k in sizes:
        for i in range(k):
            for j in range(i + 1, k):
                expected.append((place + i, place + j, 1 / (k * (k - 1) / 2)))
        place += k
    win, lose, weight = reward.ranked_pairs(sizes)
    assert list(zip(win, lose)) == [(w, l) for w, l, _ in expected]
    close(weight, [w for *_, w in expected], atol=1e-7)


def test_pair_terms_hold_what_the_data_says_of_each_pair():
    """A margin only when asked; a label without a probability is certain."""
    items = [dict(rows=[0, 1], prob=.7, scores=[2.0, 0.0], margin=2.5), dict(rows=[0, 1, 2], scores=[.1, -.1, 3.0]),
             dict(rows=[0, 1], margin=None)]
    x = reward.pair_terms(torch.arange(7.0), items, True)
    assert x.r_w.tolist() == [0, 2, 2, 3, 5] and x.r_l.tolist() == [1, 3, 4, 4, 6]
    assert x.place.tolist() == [0, 1, 1, 1, 2]
    assert x.margin.tolist() == [2.5, 0, 0, 0, 0]
    assert reward.pair_terms(torch.arange(7.0), items).margin.tolist() == [0] * 5
    close(x.prob, [.7, 1, 1, 1, 1], 1e-6)
    close(x.gap, [2, .2, -2.9, -3.1, 0], 1e-9)
    assert x.s_w.tolist() == [1, 1, 1, -1, -1] and x.s_l.tolist() == [-1, -1, 1, 1, -1]
    close(x.weight, [1, 1 / 3, 1 / 3, 1 / 3, 1], 1e-6)


LOSSES = ["bt", "focal", "soft", "cost", "plackett_luce", "ratings"]


def some_items(loss, rng, n=12):
    """Items of a loss with 2 to 5 responses (ratings: 3 numbers), some without all that data may say."""
    out = []
    for i in range(n):
        k = rng.randint(2, 5)
        if loss == "ratings":
            out.append(dict(rows=[0], ratings=[rng.gauss(1, 2) for _ in range(3)]))
            continue
        out.append(dict(rows=[0] * k, scores=[rng.choice([-1.0, 0.0, 2.0]) for _ in range(k)], prob=rng.random(),
                        margin=rng.choice([.5, None])))
        for key in ("scores", "prob", "margin"):
            if loss != "cost" and rng.random() < .3:
                del out[-1][key]
    return out


def slow_item(loss, r, item, cfg):
    """Loss of one item from its scores, lists of heads, by its definition."""
    if loss == "ratings":
        return mean([(a - b) ** 2 for a, b in zip(r[0], item["ratings"])])
    r = [x for x, *_ in r]
    if loss == "plackett_luce":
        return slow_plackett_luce(r)
    harm, losses = item.get("scores") or [0] * len(r), []
    for i, j in itertools.combinations(range(len(r)), 2):
        x = dict(gamma=cfg.gamma, margin=(item.get("margin") or 0) if cfg.margin else 0, prob=item.get("prob", 1),
                 s_w=harm[i], s_l=harm[j])
        wall = sum(-math.log(5 - s) - math.log(5 + s) for s in (r[i], r[j]))
        losses.append(SLOW_PAIRS[loss](r[i], r[j], x) + cfg.center * (r[i] + r[j]) ** 2 + cfg.barrier * wall)
    return mean(losses)


@pytest.mark.parametrize("loss", LOSSES)
def test_item_losses_against_a_loop_and_however_a_batch_is_split(loss):
    rng, heads = random.Random(3), 3 if loss == "ratings" else 1
    for more in (dict(gamma=1.5), dict(margin=loss == "bt"), dict(center=.1, barrier=.3) if loss in SLOW_PAIRS else {}):
        cfg, items = reward.Train(loss=loss, **more), some_items(loss, rng)
        sizes = [len(item["rows"]) for item in items]
        scores = [[[rng.uniform(-4, 4) for _ in range(heads)] for _ in range(k)] for k in sizes]
        flat = torch.tensor([r for part in scores for r in part], dtype=torch.float64, requires_grad=True)
        losses = reward.item_losses(flat, items, cfg)
        assert losses.shape == (len(items),)
        close(losses.detach(), [slow_item(loss, r, item, cfg) for r, item in zip(scores, items)], 1e-6)
        losses.sum().backward()
        whole, flat.grad, ends = flat.grad, None, list(itertools.accumulate(sizes, initial=0))
        for a, b in itertools.pairwise([0, *sorted(rng.sample(range(1, len(items)), 3)), len(items)]):
            some = reward.item_losses(flat[ends[a]:ends[b]], items[a:b], cfg)
            close(some.detach(), losses[a:b].detach())
            some.sum().backward()
        close(flat.grad, whole)


# ---------------------------------------------------------------- statistics

def test_calibration_error_against_a_loop():
    rng = random.Random(1)
    for n, bins in ((1, 10), (7, 3), (500, 10)):
        margins = [rng.gauss(.5, 2) for _ in range(n)]
        total = 0.0
        for b in range(bins):
            low, high = .5 + .5 * b / bins, .5 + .5 * (b + 1) / bins
            inside = [m for m in margins if low <= sigmoid(abs(m)) < high or (b == bins - 1 and sigmoid(abs(m)) == 1)]
            if inside:
                confidence, right = mean([sigmoid(abs(m)) for m in inside]), mean([m > 0 for m in inside])
                total += abs(confidence - right) * len(inside) / n
        assert reward.calibration_error(torch.tensor(margins), bins) == pytest.approx(total, abs=1e-5)
    ten = torch.tensor([math.log(9.0)] * 7 + [-math.log(9.0)] * 3)        # 90% sure, 70% right
    assert reward.calibration_error(ten) == pytest.approx(.2, abs=1e-6)


@pytest.mark.parametrize("wins, n, low, high", [
    (81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, .0, .1611), (1, 29, .0061, .1718)])
def test_wilson_published_table(wins, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), Table I, method 3."""
    assert reward.wilson(wins, n) == pytest.approx((low, high), abs=6e-5)


def test_preference_is_antisymmetric_with_ties_a_half():
    assert [reward.preference(*x) for x in ((2, 1), (1, 2), (1, 1), (.1 + .2, .3))] == [1, 0, .5, 1]
    assert reward.in_order(torch.tensor([2.0, -1e-6, 0.0])).tolist() == [1, 0, .5]


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (5, 0), (5, 1), (6, 3), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_one_that_is_right(n, right):
    answers = [1] * right + [0] * (n - right)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(answers, k))
        close(reward.pass_at_k(n, right, k), sum(any(some) for some in chosen) / len(chosen), 1e-12)


def test_best_of_k_is_the_mean_over_all_choices_of_k():
    """Of equal proxies the first counts as the best."""
    rng = random.Random(3)
    for trial in range(120):
        n = rng.randint(1, 7)
        scores = [rng.choice([0.0, 1.0, rng.gauss(0, 2)]) for _ in range(n)]
        proxies = [float(rng.randint(0, 2)) if trial % 2 else rng.gauss(0, 1) for _ in range(n)]
        for k in range(1, n + 1):
            taken = [scores[max(some, key=proxies.__getitem__)] for some in itertools.combinations(range(n), k)]
            close(reward.best_of_k(scores, proxies, k), mean(taken), 1e-12)


def slow_majority(answers, worth, k):
    """Self-consistency, one vote at a time; worth: the score of an answer."""
    parts = []
    for start in range(0, len(answers) - k + 1, k):
        votes = collections.Counter(a for a in answers[start:start + k] if a is not None)
        winners = [a for a in votes if votes[a] == max(votes.values())]
        parts.append(mean([worth[a] for a in winners]) if winners else 0.0)
    return mean(parts)


def test_majority_at_k_against_a_slow_loop():
    """None is an unfinished answer. The same final answer may have two scores: a judge sees the thinking too."""
    rng = random.Random(4)
    for _ in range(300):
        worth = {a: rng.choice([0.0, 1.0, .25]) for a in "abc"} | {None: 0.0}
        answers = [rng.choice("aabc") if rng.random() < .8 else None for _ in range(rng.randint(1, 12))]
        for k in range(1, len(answers) + 1):
            got = reward.majority_at_k(answers, [worth[a] for a in answers], k)
            close(got, slow_majority(answers, worth, k), 1e-12)
    close(reward.majority_at_k(["5", "5", "7"], [1.0, 0.0, 1.0], 1), 2 / 3, 1e-12)


def test_rank_draws_plackett_luce_scale_0_best_first_and_flip_turns():
    rng = random.Random(1)
    for scores, scale, flip in (([0.0, 1.0, 2.0], 1.0, 0.0), ([0.0, .5], 2.0, .25), ([0.0, 5.0], 0.0, .1)):
        seen = collections.Counter(tuple(reward.rank(scores, scale, flip, rng)) for _ in range(20_000))

        def chance(order):
            if not scale:
                return float(list(order) == sorted(order, key=lambda i: -scores[i]))
            return math.exp(-slow_plackett_luce([scale * scores[i] for i in order]))
        for order in itertools.permutations(range(len(scores))):
            p = (1 - flip) * chance(order) + flip * chance(order[::-1])
            assert seen[order] / 20_000 == pytest.approx(p, abs=.012)               # 3.4 standard errors


def test_win_rates_against_a_loop():
    rng = random.Random(2)
    for k in (2, 3, 5, 8):
        s = [rng.gauss(0, 2) for _ in range(k)]
        got = reward.win_rates(s)
        close(got, [sum(sigmoid(s[i] - s[j]) for j in range(k) if j != i) / (k - 1) for i in range(k)])
        assert sum(got) == pytest.approx(k / 2)


def as_answers(scores): return [reward.Answer(str(i), s) for i, s in enumerate(scores)]


def test_f2_accepted_responses_are_the_tilted_policys():
    """RSO on the bandit: π = .4 .3 .2 .1, rewards 0 to 3, β = ½. Accepted samples follow π exp(r / β) / Z."""
    rng, pi, beta, kept = random.Random(0), [.4, .3, .2, .1], .5, []
    for _ in range(500):
        group = as_answers(rng.choices([0.0, 1.0, 2.0, 3.0], pi, k=200))             # each has the best of all
        kept += reward.each(reward.accept(group, beta, rng), "score")
    rate = sum(p * math.exp((r - 3) / beta) for r, p in enumerate(pi))
    assert rate == pytest.approx(.1336, abs=5e-5)
    assert len(kept) / 1e5 == pytest.approx(rate, abs=3 * math.sqrt(rate * (1 - rate) / 1e5))
    for r, share in enumerate([.0074, .0411, .2027, .7488]):
        assert pi[r] * math.exp((r - 3) / beta) / rate == pytest.approx(share, abs=6e-5)
        assert kept.count(r) / len(kept) == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / len(kept)))
    for _ in range(200):                                                             # the best is always accepted
        group = as_answers([rng.gauss(0, 1e3) for _ in range(rng.randint(1, 6))])
        best = max(group, key=lambda answer: answer.score)
        assert best in reward.accept(group, rng.choice([1e-3, .5, 100]), rng)
    assert reward.accept([], beta, rng) == []


# ---------------------------------------------------------------- what label keeps

def slow_kept(select, group):
    """What FEATURES.md says of each selection (C13, C14), by looking at every answer and at every two; an answer is
    (text, score, tokens)."""
    right = [x for x in group if x[1] > .5]
    shortest = [x for x in right if all(x[2] <= y[2] for y in right)][:1]
    best = [x for x in group if all(x[1] >= y[1] for y in group)][:1]
    pairs = [(x, y) for x in shortest for y in group
             if (y[1] <= .5 and y[2] > x[2]) or (y[1] > .5 and y[2] >= 1.5 * x[2] and y is not x)]
    return dict(all=group, best=best, correct=right, shortest=shortest, short_pairs=pairs)[select]


def keep(select, group, **options):
    answers = [reward.Answer(*answer) for answer in group]
    return reward.kept(answers, reward.Label(select=select, **options), random.Random(0))


def test_selections_against_a_loop():
    rng, several, ties = random.Random(6), 0, 0
    for _ in range(600):
        group = [(f"text {i}", rng.choice([0.0, .25, .5, .500001, 1.0, rng.gauss(0, 2)]), rng.choice([2, 3, 4, 6, 9]))
                 for i in range(rng.randint(0, 6))]
        for select in ("all", "best", "correct"):
            assert keep(select, group) == [dict(response=t, scores=[s]) for t, s, _ in slow_kept(select, group)]
        said = [reward.Answer(*answer) for answer in group]
        shortest = long2short.shortest_of(said)
        pairs = [(short.text, other.text) for short in shortest for other in long2short.longer_than(short, said)]
        expected = slow_kept("short_pairs", group)
        assert [short.text for short in shortest] == [t for t, *_ in slow_kept("shortest", group)]
        assert pairs == [(x[0], y[0]) for x, y in expected]
        several += len(expected) > 1
        ties += any(y[2] == 1.5 * x[2] and y[1] > .5 for x, y in expected)
    assert several > 50 and ties > 20


@pytest.mark.parametrize("select", ["rank", "ends", "rso"])
def test_rankings_of_none_or_one_are_nothing(select):
    """And draw no label noise: whether a prompt got one answer or none must not change the labels after it."""
    two = keep(select, [("a", 1.0, 3), ("b", 2.0, 3)], scale=0.0, flip=0.0, rso_beta=1e9)
    assert [row["responses"] for row in two] == [["b", "a"]]
    drawn = SimpleNamespace(random=lambda: 0.0 if select == "rso" else never())
    for group in ([], [reward.Answer("It is red.", 1.0, 4)]):
        assert reward.kept(group, reward.Label(select=select), drawn) == []


def tied(group): return len({round(vowels(text), 4) for text in group})


def ends(best, gap=0.0):
    far = len(best) > 1 and vowels(best[0]) - vowels(best[-1]) >= gap - 1e-5
    return [[best[0], best[-1]]] if far else []


KEPT = {  # of the finished, different answers to a prompt, best first and without ties: what stays, as texts
    "rank": (dict(), lambda best: [best] * (len(best) > 1)),
    "ends": (dict(), ends),
    "gap": (dict(select="ends", min_gap=1.15), lambda best: ends(best, 1.15)),
    "rso": (dict(rso_beta=1e9), lambda best: [best] * (len(best) > 1)),                  # accepts everything
    "best": (dict(), lambda best: best[:1]),
}


@pytest.mark.parametrize("name", KEPT)
def test_label_keeps_of_all_that_was_sampled_what_it_says(name, letters, tmp_path, monkeypatch):
    """Without unfinished answers, none twice, and no two of one score where scores alone decide the order."""
    calls, (options, what) = spied(monkeypatch), KEPT[name]
    rows = label(tmp_path / "a", letters, **(dict(select=name, k=4, max_new=4, n=60, batch=25) | options))
    groups, expected = groups_of(calls), []
    assert [len(call.roll.tokens) // 4 for call in calls] == [25, 25, 10]               # the last batch is what is left
    assert not all(call.roll.finished.all() for call in calls) and any(tied(g) < len(g) for g in groups)
    for group in groups:
        first = {round(vowels(t), 4): t for t in group}                 # in reversed order: of equals the first stays
        expected += what([first[s] for s in sorted(first, reverse=True)])
    assert len(rows) == len(expected) > 4
    for row, texts in zip(rows, expected):
        said = row["responses"] if "responses" in row else row["response"]
        marks = [vowels(t) for t in row.get("responses", [said])]
        assert said == texts or name == "best" and vowels(said) == pytest.approx(vowels(texts))
        assert row["scores"] == pytest.approx(marks, abs=1e-6) and row["source"] == "ai"
        assert row["prompt"][-1]["role"] == "user"
        if name in ("rank", "rso"):
            close(row["win"], reward.win_rates(row["scores"]), 1e-6)
        elif "win" in row:                                              # among all, not of the two
            group = [g for g in groups if set(said) <= g.keys() and tied(g) > 1]
            rates = [reward.win_rates(sorted({round(vowels(t), 4) for t in g})) for g in group]
            assert any(row["win"] == pytest.approx([r[-1], r[0]], abs=1e-4) for r in rates)
    kind = "messages" if name == "best" else "preference"               # sft.py, or what learns from pairs, reads it
    back = data.read_records(tmp_path / "a" / "pairs.jsonl", kind)
    if name == "best":
        assert [r["messages"][-1]["content"] for r in back] == [r["response"] for r in rows if r["response"].strip()]
    else:
        assert [(r["responses"], r["scores"]) for r in back] == [(r["responses"], r["scores"]) for r in rows]


def test_label_keeps_what_a_rule_of_ones_own_calls_right_and_misses_none(letters, tmp_path, monkeypatch):
    """Right is what has one a: half of the two letters' answers. And of these the shortest, and its pairs."""
    (tmp_path / "planted_rule.py").write_text("def right(record, text, finished):\n    return text.count('a') == 1\n")
    monkeypatch.chdir(tmp_path)
    options = dict(by="planted_rule:right", k=6, max_new=6, n=60, batch=16)
    calls = spied(monkeypatch)
    rows = label(tmp_path / "a", letters, select="correct", **options)
    groups = []
    for group in groups_of(calls):
        groups.append([(t, float(t.count("a") == 1), group[t]) for t in reversed(group)])
    every = lambda select: [x for group in groups for x in slow_kept(select, group)]
    assert [row["response"] for row in rows] == [t for t, *_ in every("correct")] and len(rows) > 20
    long2short.shorten(long2short.Config(out=str(tmp_path / "b"), policy=letters, families="write", **options, **CPU))
    assert [row["response"] for row in read(tmp_path / "b" / "shortest.jsonl")] == [t for t, *_ in every("shortest")]
    pairs = data.read_records(tmp_path / "b" / "pairs.jsonl", "preference")
    assert [tuple(row["responses"]) for row in pairs] == [(x[0], y[0]) for x, y in every("short_pairs")]
    assert {row["scores"][1] for row in pairs} == {0, 1}
    sys.modules.pop("planted_rule", None)


def test_label_answers_belong_to_their_prompts(tmp_path, tiny, monkeypatch):
    """A judge that knows the prompt: were the k answers of a prompt not adjacent, scores would come from neighbours."""
    known = lambda record, text, finished=True: len(asked_of(record)) * 1000 + len(text)
    monkeypatch.setitem(data.VERIFIERS, "prompt", known)
    for row in label(tmp_path / "a", tiny, by="prompt", k=3):
        assert row["scores"] == [known(row, text) for text in row["responses"]]


def test_label_flip_seed_and_skip(tmp_path, tiny):
    """Skipped prompts are counted in whole batches, so that a later round begins where an earlier one ended."""
    plain, turned = label(tmp_path / "a", tiny), label(tmp_path / "b", tiny, flip=1.0)
    assert [row["responses"][::-1] for row in turned] == [row["responses"] for row in plain]
    assert label(tmp_path / "c", tiny) == plain != label(tmp_path / "d", tiny, seed=1)
    asked = lambda name, **options: [asked_of(r) for r in label(tmp_path / name, tiny, select="all", k=12, **options)]
    first, second = (list(dict.fromkeys(asked(str(skip), skip=skip, n=16))) for skip in (0, 16))
    assert list(dict.fromkeys(asked("both", n=32))) == list(dict.fromkeys(first + second))
    assert list(dict.fromkeys(asked("up", skip=3, n=16))) == second and not set(first) & set(second)


def test_label_of_a_file_asks_each_prompt_once_and_skips_as_it_says(tiny, tmp_path, monkeypatch):
    calls = play(monkeypatch, lambda text, k, begin: ["be", "bee"])
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}") for i in range(20)])
    whole = label(tmp_path / "a", tiny, data=path, batch=8)
    late = label(tmp_path / "b", tiny, data=path, batch=8, skip=8)
    assert sorted(number(asked_of(row)) for row in whole) == list(range(20)) and late == whole[8:]
    assert [len(texts) for _, texts, *_ in calls] == [8, 8, 4, 8, 4]


def test_a_system_message_is_asked_and_kept(tiny, tmp_path, monkeypatch):
    calls = play(monkeypatch, lambda text, k, begin: ["be", "bee"])
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}") for i in range(3)])
    said = dict(role="system", content="Be kind.")
    rows = label(tmp_path / "a", tiny, data=path, system="Be kind.")
    assert sorted(calls[0][1]) == [f"Be kind.Q {i}" for i in range(3)]
    assert all(row["prompt"] == [said] + user(asked_of(row)) for row in rows)
    rows = relabel(tmp_path / "b", [question_of(0, "be", "bee")], system="Be kind.")
    assert [row["prompt"] for row in rows] == [[said] + user("Q 0")]
    toy = label(tmp_path / "c", tiny, system="Be kind.", n=30, families="write")
    assert toy and all(row["prompt"][0] == said for row in toy)


def test_without_a_policy_the_responses_of_a_file_are_labelled_anew(tmp_path, monkeypatch):
    patch(monkeypatch, "generate", never)
    monkeypatch.setattr(reward, "load_model", never)
    orders = list(itertools.permutations(("be", "bee", "tree", "a"), 3))
    rows = [question_of(i, *said, scores=[0.0] * len(said), win=[.5] * len(said), prob=.6, keyword="cup")
            for i, said in enumerate(orders)]
    got = by_prompt(relabel(tmp_path / "a", rows, batch=7))
    assert len(got) == len(rows)
    for row in rows:
        new, order = got[asked_of(row)], sorted(row["responses"], key=vowels, reverse=True)
        assert new == dict(prompt=row["prompt"], keyword="cup", source="ai", responses=order, scores=new["scores"],
                           win=new["win"])
        close(new["scores"], [vowels(t) for t in order], 1e-6)
        close(new["win"], reward.win_rates([vowels(t) for t in order]), 1e-6)
    few = relabel(tmp_path / "b", rows, n=5, batch=2, select="best")
    assert len(few) == 5 and all("responses" not in row for row in few)              # the k of --k plays no part


@pytest.mark.parametrize("options", [
    dict(select="rank", k=3, scale=1.0, flip=.2), dict(select="rso", k=3, scale=1.0), dict(select="all", k=2),
    dict(judge=True, preamble="principles")])
def test_p41_labels_killed_and_resumed_are_the_same_bytes(options, tiny, tmp_path, monkeypatch):
    """With noise in the labels: random numbers, too, start anew with each batch."""
    swayed(monkeypatch, worth=lambda text: len(text) / 3)
    options = options | dict(batch=8, save_every=2) | (dict(judge=tiny) if "judge" in options else {})
    whole = label(tmp_path / "a", tiny, **options)
    interrupted(monkeypatch, 3, lambda: label(tmp_path / "b", tiny, **options))
    assert json.loads((tmp_path / "b" / "unfinished.json").read_text())[0] == 2
    assert not (tmp_path / "b" / "pairs.jsonl").exists()
    calls = spied(monkeypatch)
    assert label(tmp_path / "b", tiny, **options) == whole and len(calls) == 3       # of 5 batches
    a, b = ((tmp_path / name / "pairs.jsonl").read_bytes() for name in "ab")
    assert a == b and not (tmp_path / "b" / "unfinished.json").exists()
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


# ---------------------------------------------------------------- AI labels

QUALITY = dict(zip("best good fair poor".split(), (1.6, .9, .2, -1.1)))


def test_a_bias_for_a_place_cancels():
    """FEATURES M34: a judge that says 1 with probability σ(q + 1.3)."""
    label_ = lambda q: reward.debiased(sigmoid(q + 1.3), sigmoid(-q + 1.3))
    close(label_(0.0), .5)
    close(label_(.7), .617570, 5e-7)
    assert reward.debiased(.3, .9) + reward.debiased(.9, .3) == pytest.approx(1, abs=1e-15)
    close(reward.debiased(torch.tensor([.9, .2]), torch.tensor([.3, .2])), [.8, .5], 1e-7)


def shown(text):
    """The two answers in a judge's question."""
    first, rest = text[text.rindex("Answer 1: ") + len("Answer 1: "):].split("\nAnswer 2: ")
    return first, rest.split("\n")[0]


def swayed(monkeypatch, delta=1.3, worth=QUALITY.get):
    """A judge that says 1 with probability σ(difference in quality + delta); the questions it was asked."""
    asked = []

    def choices(model, prompts, names, budget):
        assert list(names) == ["1", "2"]
        texts = [TOK.decode(ids) for ids in prompts]
        asked.extend(texts)
        q = [worth(a) - worth(b) + delta for a, b in map(shown, texts)]
        return torch.tensor([[-nls(x), -nls(-x)] for x in q], dtype=torch.float64)
    monkeypatch.setattr(reward, "choice_logprobs", choices)
    return asked


def preferred(a, b, times=1):
    """How often the swayed judge prefers a to b, both orders averaged."""
    q = times * (QUALITY[a] - QUALITY[b])
    return .5 * (sigmoid(q + 1.3) + sigmoid(q - 1.3))


@pytest.mark.parametrize("select", ["rank", "ends"])
def test_judge_orders_answers_by_how_often_each_is_preferred(select, tiny, tmp_path, monkeypatch):
    """All orders of 2 to 4 answers; of one pair there is one probability."""
    asked = swayed(monkeypatch)
    patch(monkeypatch, "generate", never)
    groups = [o for k in (2, 3, 4) for o in itertools.permutations(QUALITY, k)]
    sources = [question_of(i, *group, scores=[9.0] * len(group), margin=1) for i, group in enumerate(groups)]
    rows = by_prompt(relabel(tmp_path / "a", sources, judge=tiny, select=select, batch=7))
    assert len(rows) == len(groups)
    for i, group in enumerate(groups):
        order, row = sorted(group, key=QUALITY.get, reverse=True), rows[f"Q {i}"]
        wins = [mean([preferred(a, b) for b in group if b != a]) for a in order]
        if select == "ends":
            order, wins = [order[0], order[-1]], [wins[0], wins[-1]]
        assert row["responses"] == order and row["source"] == "ai"
        assert not row.keys() & {"margin", "scores"}                     # they would pass for a known truth
        close(row["win"], wins, 1e-12)
        assert ("prob" in row) == (len(order) == 2)
        close(row.get("prob", .5), preferred(*order) if len(order) == 2 else .5, 1e-12)
    for one, other in zip(asked[::2], asked[1::2]):                                  # the same question, changed over
        a, b = shown(one)
        content = re.search(r"Prompt: (Q \d+)", one)[1]
        assert one == data.judge_prompt(content, a, b) and other == data.judge_prompt(content, b, a)


def test_judge_whose_preferences_run_in_a_circle_or_tie(tiny, tmp_path, monkeypatch):
    """rock < paper < scissors < rock: each wins as often as another, and the order stays; so it does of equals."""
    beats = {("paper", "rock"), ("scissors", "paper"), ("rock", "scissors")}
    monkeypatch.setattr(reward, "choice_logprobs", lambda model, prompts, *_: torch.tensor(
        [[.9, .1] if shown(TOK.decode(ids)) in beats else [.1, .9] for ids in prompts], dtype=torch.float64).log())
    row, = relabel(tmp_path / "a", [question_of(0, "rock", "paper", "scissors")], judge=tiny)
    assert row["responses"] == ["rock", "paper", "scissors"]
    close(row["win"], [.5] * 3)
    swayed(monkeypatch, worth=lambda text: 0.0)
    row, = relabel(tmp_path / "b", [question_of(0, "best", "poor")], judge=tiny)
    assert row["responses"] == ["best", "poor"]
    close(row["prob"], .5)


@pytest.mark.parametrize("clamp", [.6, .5])
def test_judge_is_never_surer_than_the_clamp(clamp, tiny, tmp_path, monkeypatch):
    swayed(monkeypatch, worth=lambda text: 3 * QUALITY[text])
    two = list(itertools.permutations(QUALITY, 2))
    rows = by_prompt(relabel(tmp_path / "a", [question_of(i, *x) for i, x in enumerate(two)], judge=tiny, clamp=clamp))
    for i, x in enumerate(two):
        p = min(clamp, preferred(*sorted(x, key=QUALITY.get, reverse=True), times=3))
        close(rows[f"Q {i}"]["prob"], p, 1e-12)
        close(rows[f"Q {i}"]["win"], [p, 1 - p], 1e-12)


def test_judge_counts_where_it_contradicts_itself_and_where_it_agrees(tiny, tmp_path, monkeypatch, capsys):
    """Of K = 3, too. It contradicts itself where the bias outweighs the difference; --by likes no letter e."""
    worth = dict(best=.9, bees=-.5, good=-.1, fair=.2, poor=-1.1)
    swayed(monkeypatch, worth=worth.get)
    rng = random.Random(1)
    rows = [question_of(i, *rng.sample(list(worth), rng.choice([2, 3]))) for i in range(20)]
    relabel(tmp_path / "a", rows, judge=tiny, batch=100)
    two = [x for row in rows for x in itertools.combinations(row["responses"], 2)]
    torn = [abs(worth[a] - worth[b]) < 1.3 for a, b in two]
    same = [float((worth[a] > worth[b]) == (vowels(a) > vowels(b))) for a, b in two if vowels(a) != vowels(b)]
    assert len(same) < len(two) and 0 < sum(torn) < len(torn) and 0 < sum(same) < len(same)
    log, = read(tmp_path / "a" / "metrics.jsonl")
    assert log["inconsistent"] == pytest.approx(mean(torn), abs=1e-6)
    assert log["agrees"] == pytest.approx(mean(same), abs=1e-6)
    out = capsys.readouterr().out
    assert f"{log['agrees']:.0%}" in out and f"{log['inconsistent']:.0%}" in out


@pytest.mark.parametrize("preamble", [data.RULE, "Be fair. " * 20])
def test_a_language_model_as_judge_against_a_loop(preamble, tmp_path):
    """A random one with more than its own taste for 1: P(1) of both orders, row by row, in float64."""
    path = checkpoint(tmp_path / "judge", 3)
    rows = [r | dict(prompt=user(f"Q {i}")) for i, r in enumerate(rankings(8))]
    got = by_prompt(relabel(tmp_path / "a", rows, judge=path, preamble=preamble, micro_tokens=256))
    net, (one, two) = load_model(path).double(), (TOK.encode(c)[0] for c in "12")

    def p(content, a, b):
        text = data.judge_prompt(content, a, b, preamble)
        ids = TOK.prompt(user(text))
        assert preamble == data.RULE or len(ids) > 64  # what does not fit loses its beginning, not whose turn it is
        logits = net.logits(net(torch.tensor([ids[:1] + ids[1:][-63:]])))[0, -1].detach()
        return float(logits[one].exp() / (logits[one].exp() + logits[two].exp()))
    assert len(got) == len(rows) and len({len(r["responses"]) for r in rows}) > 1
    for row in rows:
        content, said = asked_of(row), row["responses"]
        soft = {(a, b): .5 * (p(content, a, b) + 1 - p(content, b, a)) for a, b in itertools.permutations(said, 2)}
        win = {a: mean([soft[a, b] for b in said if b != a]) for a in said}
        mine = got[content]
        assert mine["responses"] == sorted(said, key=win.get, reverse=True)
        close(mine["win"], [win[a] for a in mine["responses"]], 1e-5)
        if len(said) == 2:
            close(mine["prob"], soft[tuple(mine["responses"])], 1e-5)


def test_what_is_scored_after_a_rationale_ends_in_it_up_to_its_last_line(tiny, roomy, tmp_path, monkeypatch):
    """The verdict of the rationale itself is cut off; the scored one counts."""
    calls = play(monkeypatch, lambda text, k, begin: [f"1 is {shown(text)[0]}.\n2 is {shown(text)[1]}.\n1"])
    scored = []
    monkeypatch.setattr(reward, "choice_logprobs", lambda model, prompts, *_: scored.extend(prompts) or torch.tensor(
        [[.2, .8]] * len(prompts)).log())
    relabel(tmp_path / "a", [question_of(0, "best", "poor")], judge=roomy, rationale=True, max_new=33)
    assert len(calls) == 1 and len(scored) == 2
    for (a, b), ids in zip((("best", "poor"), ("poor", "best")), scored):
        text = data.judge_prompt("Q 0", a, b, ending=data.REASON)
        assert ids == TOK.prompt(user(text)) + TOK.encode(f"1 is {a}.\n2 is {b}.\n")
    del scored[:]
    play(monkeypatch, lambda text, k, begin: ["It is.\n2"])              # no room: the question's beginning is lost
    relabel(tmp_path / "b", [question_of(0, "best", "poor")], judge=tiny, rationale=True, max_new=33)
    ids = TOK.prompt(user(data.judge_prompt("Q 0", "best", "poor", ending=data.REASON)))
    assert scored[0] == ids[:1] + ids[-(64 - 33 - 1):] + TOK.encode("It is.\n")


def test_principles_are_drawn_anew_and_both_orders_are_asked_the_same_one(tiny, tmp_path, monkeypatch):
    asked = swayed(monkeypatch)
    rows = [question_of(i, "best", "fair", "poor") for i in range(20)]
    relabel(tmp_path / "a", rows, judge=tiny, preamble="principles", batch=10)
    begins = [text.split("\n\n")[0] for text in asked]
    assert begins[::2] == begins[1::2] and len(begins) == 120 and set(begins) <= set(data.PRINCIPLES)
    assert len(set(begins)) > 10 and begins[:60] != begins[60:]          # nor the same ones in every batch
    relabel(tmp_path / "b", rows, judge=tiny, preamble="Which is short?")
    assert all(text.startswith("Which is short?\n\nPrompt: Q") for text in asked[120:])


def test_judge_passes_over_prompts_with_one_answer(tiny, tmp_path, monkeypatch):
    """And no question is asked where no prompt has two."""
    asked = swayed(monkeypatch, worth=len)
    plan = {0: ["best", "best"], 1: ["fair", "goodly"], 2: ["  ", "poor"]}
    play(monkeypatch, lambda text, k, begin: plan[number(text)])
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}") for i in range(3)])
    row, = label(tmp_path / "a", tiny, data=path, judge=tiny, batch=1)
    assert row["responses"] == ["goodly", "fair"] and len(asked) == 2
    plan[1] = ["fair", "fair"]
    with pytest.raises(UserError, match="none got answers"):
        label(tmp_path / "b", tiny, data=path, judge=tiny)


# ---------------------------------------------------------------- files made of labelled files

@pytest.mark.parametrize("share", [0.0, .5, 1.0])
def test_a_mark_goes_in_front_of_the_better_answer_as_often_as_told(share, tmp_path):
    rows = [question_of(i, f"be {i}", f"bee {i}", f"tree {i}", scores=[3.0, 2.0, 1.0]) for i in range(400)]
    path = write(tmp_path / "p.jsonl", rows)
    superficial.mark_all(superficial.Config(out=str(tmp_path / "a"), data=path, better=share, mark="Yes: "))
    better = 0
    for old, row in zip(rows, read(tmp_path / "a" / "pairs.jsonl"), strict=True):
        place = [text.startswith("Yes: ") for text in row["responses"]].index(True)
        plain = [text.removeprefix("Yes: ") for text in row["responses"]]
        assert plain == old["responses"] and row["scores"] == old["scores"] and asked_of(row) == asked_of(old)
        assert place in (0, 2) and "".join(row["responses"]).count("Yes: ") == 1     # never between
        better += place == 0
    assert better == pytest.approx(400 * share, abs=0 if share in (0, 1) else 35)


def test_balanced_pairs_tell_nothing_by_length_in_words(tmp_path):
    """Of each difference as many with the better one longer as shorter; letters do not count."""
    rng, said = random.Random(5), lambda n, last: " ".join([rng.choice(["a", "saxophones"]) for _ in range(n)] + [last])
    rows = [question_of(i, said(rng.randint(1, 9), "b"), said(rng.randint(1, 7), "c")) for i in range(300)]
    chatglm_rlhf.balance(chatglm_rlhf.Config(out=str(tmp_path / "a"), data=write(tmp_path / "p.jsonl", rows)))
    kept = read(tmp_path / "a" / "pairs.jsonl")

    def buckets(rows):
        """{bucket: [pairs whose better one is longer, shorter]}; 1 to 3 words, 4 to 6, 7 to 9."""
        out = collections.defaultdict(lambda: [0, 0])
        for row in rows:
            more = len(row["responses"][0].split()) - len(row["responses"][1].split())
            if more:
                out[math.ceil(abs(more) / 3)][more < 0] += 1
        return out
    before, after = buckets(rows), buckets(kept)
    assert all(longer != shorter for longer, shorter in before.values())
    assert {size: min(n) for size, n in before.items() if min(n)} == {size: n[0] for size, n in after.items()}
    assert all(longer == shorter for longer, shorter in after.values())
    places = [number(asked_of(row)) for row in kept]
    assert places == sorted(places)                                      # in the order of the file
    even = [i for i, row in enumerate(rows) if len({len(text.split()) for text in row["responses"]}) == 1]
    assert even and set(even) <= set(places)


@pytest.mark.parametrize("quantiles, n", [(1, 60), (3, 60), (5, 3), (6, 4)])
def test_quantiles_are_of_equal_size_in_the_order_of_scores(quantiles, n, letters, tmp_path):
    rankings_ = label(tmp_path / "a", letters, k=4, max_new=4, n=n)
    path = quark.pool(quark.Config(init="x", data=str(tmp_path / "a" / "pairs.jsonl"), quantiles=quantiles),
                      tmp_path / "pool.jsonl")
    rows = read(path)
    texts = collections.Counter(t for row in rankings_ for t in row["responses"])
    assert collections.Counter(row["response"] for row in rows) == texts             # every answer, once a prompt
    marks = [row["scores"][0] for row in rows]
    assert marks == sorted(marks) == pytest.approx([vowels(row["response"]) for row in rows], abs=1e-6)
    said = [number(row["prompt"][0]["content"].rstrip(".")) for row in rows]
    sizes = collections.Counter(said)
    assert said == sorted(said) and sorted(sizes) == list(range(1, quantiles + 1))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    demos = [r["messages"] for r in data.read_records(path, "messages")]
    assert [[turn["role"] for turn in m] for m in demos] == [["system", "user", "assistant"]] * len(rows)


def test_ratings_hold_every_attribute_of_every_answer(tmp_path):
    said = [("be it", "tree"), ("a b c", "e", "f")]
    path = write(tmp_path / "p.jsonl", [question_of(i, *x, key=f"thing {i}") for i, x in enumerate(said)])
    nemotron4.rate(nemotron4.Config(out=str(tmp_path / "a"), data=path, batch=1, **CPU),
                   ["vowels", "words", "2*words + -1*vowels"])
    rows = read(tmp_path / "a" / "ratings.jsonl")
    assert sorted(row["response"] for row in rows) == sorted(t for x in said for t in x)
    for row in rows:
        points, words = vowels(row["response"]), len(row["response"].split())
        close(row["ratings"], [points, words, 2 * words - points], 1e-5)
        assert row["response"] in said[number(asked_of(row))] and row["key"] == f"thing {number(asked_of(row))}"
    back = data.read_records(tmp_path / "a" / "ratings.jsonl", "ratings")            # what train --loss ratings reads
    assert [(r["response"], r["ratings"]) for r in back] == [(r["response"], r["ratings"]) for r in rows]


# ---------------------------------------------------------------- training

def test_training_recovers_known_gaps(tiny, tmp_path):
    """The real loop on the pairs of F2's bandit, both orders as often as Bradley-Terry says: gaps 1, 2, 3."""
    arms, rows = "abcd", []
    often = {1: (11, 15), 2: (22, 25), 3: (20, 21)}                      # σ(1) = .731, σ(2) = .881, σ(3) = .953
    for i, j in itertools.combinations(range(4), 2):
        won, n = often[j - i]
        rows += ranked(arms[j], arms[i], n=won) + ranked(arms[i], arms[j], n=n - won)
    random.Random(0).shuffle(rows)
    n = len(rows)
    for place in range(19, n * 20 // 19, 20):                            # every 20th is held out: let it be a spare
        rows.insert(place, ranked("a", "d", n=1)[0])
    train(tmp_path / "rm", tiny, write(tmp_path / "p.jsonl", rows), **LEARN | dict(batch=n, epochs=50.0))
    a, b, c, d = score(tmp_path / "rm", *arms)
    assert [b - a, c - a, d - a] == pytest.approx([1, 2, 3], abs=.05)


def test_first_losses_at_known_scores(judge, tiny, tmp_path):
    """Margins count only with their flag; center adds c (r_w + r_l)²; soft takes people's labels without a probability
    as certain. A fresh head scores 0, so its first loss is -log σ(-margin)."""
    path = write(tmp_path / "p.jsonl", ranked("yes", "no", margin=2.0))
    first = [train(tmp_path / str(on), tiny, path, margin=on, epochs=1.0)[0]["loss"] for on in (False, True)]
    assert first == pytest.approx([math.log(2), -math.log(sigmoid(-2.0))], abs=1e-5)
    a, b = score(judge, "yes", "no")
    for c in (0.0, .5):
        row = train(tmp_path / f"center {c}", judge, path, center=c, epochs=.1)[0]
        assert row["loss"] == pytest.approx(-math.log(sigmoid(a - b)) + c * (a + b) ** 2, abs=1e-4)
        assert row["margin"] == pytest.approx(a - b, abs=1e-4) and row["accuracy"] == float(a > b)
    rows = ranked("yes", "no", prob=.5, n=10) + ranked("yes", "no", n=9, source="human")
    path = write(tmp_path / "soft.jsonl", rows + ranked("a", "b", n=1, source="human"))           # the last is held out
    row = train(tmp_path / "soft", judge, path, loss="soft", batch=19, epochs=1.0)[0]
    half, sure = .5 * nls(a - b) + .5 * nls(b - a), nls(a - b)
    assert row["loss"] == pytest.approx((10 * half + 9 * sure) / 19, abs=1e-4)


@pytest.mark.parametrize("loss", ["bt", "plackett_luce", "soft", "cost", "ratings"])
def test_loss_and_gradient_of_a_model_against_a_loop_and_whatever_the_micro_batches(loss, tmp_path):
    """Of ragged rankings: the sum over records of the mean over their pairs, one unpadded row at a time."""
    heads, rng = 2 if loss == "ratings" else 1, random.Random(4)
    net = load_model(checkpoint(tmp_path / "net", 1, n_scores=heads), Setup(TOK)).double()
    cfg = reward.Train(loss=loss, heads=heads)
    records = [r | dict(prob=.7, scores=[1.0] * len(r["responses"])) for r in rankings(12)]
    if loss == "ratings":
        records = [dict(prompt=r["prompt"], response=r["responses"][0], ratings=[rng.random(), 1.0]) for r in records]
    items, seen = [item for r in records for item in reward.items_of(r, TOK, 64)], []
    for cfg.micro_tokens in (64, 100_000):
        parts = 0
        net.zero_grad()
        for scores, part in reward.score_records(net, items, cfg):
            reward.item_losses(scores.double(), part, cfg).sum().backward()
            parts += 1
        seen.append((torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), parts))
    assert seen[0][1] > seen[1][1] == 1
    close(*[grad for grad, _ in seen], 1e-5)
    alone = 0.0
    for item in items:
        r = torch.stack([net.scores(net(torch.tensor([ids])))[0, -1] for ids, _ in item["rows"]])
        alone = alone + reward.item_losses(r, [item], cfg).sum()                     # against a loop above
    net.zero_grad()
    alone.backward()
    close(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), seen[1][0], 1e-4)


@pytest.mark.parametrize("loss, barrier, shifted", [
    ("bt", 0.0, True), ("focal", 0.0, True), ("plackett_luce", 0.0, True), ("soft", 0.0, True), ("bt", .1, False),
    ("cost", 0.0, False), ("ratings", 0.0, False)])
def test_only_where_differences_alone_were_trained_the_held_out_mean_goes_to_0(loss, barrier, shifted, judge, tmp_path):
    rows = ranked("yes", "no", scores=[1.0, 0.0], prob=.8)
    if loss == "ratings":
        rows = [dict(prompt="?", response="yes", ratings=[1])] * 25
    log = train(tmp_path / "rm", judge, write(tmp_path / "p.jsonl", rows), loss=loss, barrier=barrier, epochs=.1)
    said = score(tmp_path / "rm", *["yes"] if loss == "ratings" else ["yes", "no"])
    assert abs(log[-1]["val_mean"]) > .05
    assert mean(said) == pytest.approx(0 if shifted else log[-1]["val_mean"], abs=1e-4)


def test_evaluate_against_a_loop(judge):
    """Of rankings of which every other one has no true scores."""
    records = rankings(12)
    for r in records[1::2]:
        r["scores"] = [float(-len(text)) for text in r["responses"]]
    loss, right, agree, every = [], [], [], []
    for r in records:
        s = score(judge, *r["responses"], prompt=asked_of(r))
        every += s
        two = list(itertools.combinations(range(len(s)), 2))
        loss.append(mean([-math.log(sigmoid(s[i] - s[j])) for i, j in two]))        # of a ranking, as it is trained
        right += [s[i] > s[j] for i, j in two]
        true = r.get("scores", [0] * len(s))
        agree += [(s[i] > s[j]) == (true[i] > true[j]) for i, j in two if true[i] != true[j]]
    items = [item for r in records for item in reward.items_of(r, TOK, 64)]
    got = reward.evaluate(load_model(judge, Setup(TOK)), items, reward.Train(micro_tokens=64))
    for key, x in dict(val_loss=loss, val_accuracy=right, val_gold=agree, val_mean=every).items():
        assert got[key] == pytest.approx(mean(x), abs=1e-5), key


def test_training_with_the_barrier_keeps_scores_inside_the_wall(tiny, tmp_path):
    path = write(tmp_path / "p.jsonl", ranked("yes", "no", n=200))
    wall, free = (train(tmp_path / name, tiny, path, barrier=barrier, **LEARN | dict(epochs=6.0, lr=.03))
                  for name, barrier in (("a", 2.0), ("b", 0.0)))
    a, b = score(tmp_path / "a", "yes", "no"), score(tmp_path / "b", "yes", "no")
    assert -5 < a[1] < a[0] < 5 and b[0] - b[1] > 5 and free[-1]["val_loss"] < .01
    gap = nls(a[0] - a[1]) + 2.0 * sum(-math.log(5 - s) - math.log(5 + s) for s in a)
    assert wall[-1]["val_loss"] == pytest.approx(gap, abs=1e-3)


def test_training_with_cost_tells_harmful_from_harmless(tiny, tmp_path):
    """Planted: what has "hurt" in it is harmful, the more the worse. Some pairs are both harmful, some neither."""
    rng, rows = random.Random(5), []
    words = lambda n: " ".join([rng.choice("cup van box red old".split()) for _ in range(3)] + ["hurt"] * n)
    for _ in range(180):
        worse, better = sorted(rng.sample(range(3), 2) if rng.random() < .8 else (0, 0), reverse=True)
        rows.append(dict(prompt=user("?"), responses=[words(worse), words(better)], scores=[worse > 0, better > 0]))
    rows = [r | dict(scores=list(map(float, r["scores"]))) for r in rows if len(set(r["responses"])) == 2]
    log = train(tmp_path / "rm", tiny, write(tmp_path / "p.jsonl", rows), loss="cost", epochs=6.0, **LEARN)
    assert log[-1]["val_sign"] > .9 and log[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)
    fresh = [0, 1, 2] * 10
    marks = score(tmp_path / "rm", *map(words, fresh))
    assert sum((s > 0) == (n > 0) for n, s in zip(fresh, marks)) >= 28               # 0 divides: it was not shifted
    held, right = rows[19::20], []
    for r in held:
        right += [(s > 0) == (h > 0) for s, h in zip(score(tmp_path / "rm", *r["responses"]), r["scores"])]
    assert log[-1]["val_sign"] == pytest.approx(mean(right), abs=1e-6)


def test_training_on_ratings_explains_each_attribute(tiny, tmp_path):
    """Two planted attributes of a text, the second on another scale; r2 of each against a loop."""
    rng = random.Random(6)
    rows = []
    for _ in range(300):
        text = " ".join(rng.choice("red soft cup van".split()) for _ in range(3))
        rows.append(dict(prompt=user("?"), response=text, ratings=[float("red" in text), 3.0 - 2 * ("soft" in text)]))
    log = train(tmp_path / "rm", tiny, write(tmp_path / "r.jsonl", rows), loss="ratings", heads=2, epochs=20.0, **LEARN)
    assert log[-1]["val_r2/0"] > .9 and log[-1]["val_r2/1"] > .9 and "val_accuracy" not in log[-1]
    net, held, asked = load_model(tmp_path / "rm"), rows[19::20], TOK.prompt(user("?"))
    said = [net.score(net(torch.tensor([asked + TOK.response(r["response"])]))[0, -1]).tolist() for r in held]
    losses = [mean([(a - b) ** 2 for a, b in zip(s, r["ratings"])]) for s, r in zip(said, held)]
    assert log[-1]["val_loss"] == pytest.approx(mean(losses), rel=1e-3)
    for k in range(2):
        truth = [r["ratings"][k] for r in held]
        left = sum((s[k] - t) ** 2 for s, t in zip(said, truth)) / sum((t - mean(truth)) ** 2 for t in truth)
        assert log[-1][f"val_r2/{k}"] == pytest.approx(1 - left, abs=1e-3)


def test_training_on_soft_labels_is_calibrated_to_them(tiny, tmp_path):
    """The gaps become the logits of the labels' probabilities; plain bt on the same file runs far beyond."""
    rows = [r for two in zip(ranked("yes", "no", n=60, prob=.8), ranked("red", "old", n=60, prob=.6)) for r in two]
    path = write(tmp_path / "p.jsonl", rows)
    for name in ("soft", "bt"):
        train(tmp_path / name, tiny, path, loss=name, epochs=12.0, **LEARN)
    a, b, c, d = score(tmp_path / "soft", "yes", "no", "red", "old")
    assert [a - b, c - d] == pytest.approx([math.log(4), math.log(1.5)], abs=.1)
    a, b, *_ = score(tmp_path / "bt", "yes", "no")
    assert a - b > 2.5


def test_same_ids_in_reward_training_evaluation_and_ppo(judge, tmp_path, monkeypatch):
    """A text that is sampled by PPO and one that comes from a file are the same ids, end token included."""
    prompt, spec, texts = user("Describe the old van."), Reward(judge, Setup(TOK), 64), ["The cup is fine.", "Yes"]
    seen, real = [], reward.response_scores
    monkeypatch.setattr(reward, "response_scores", lambda net, tokens, mask: seen.extend(
        [i for i in row if i != TOK.pad] for row in tokens.tolist()) or real(net, tokens, mask))
    train(tmp_path / "rm", judge, write(tmp_path / "p.jsonl", [dict(prompt=prompt, responses=texts)] * 25), batch=24)
    served = []
    for text in texts:
        script = iter(TOK.response(text))
        with monkeypatch.context() as change:
            change.setattr(models, "sample", lambda logits, *_: (torch.tensor([next(script)]), torch.zeros(1)))
            roll = generate(load_model(judge, Setup(TOK)), [TOK.prompt(prompt)], 40)
        served.append(roll.tokens[0, :roll.lengths[0]].tolist())
        assert roll.finished.all() and roll.responses() == [text]
        close(spec([dict(prompt=prompt)], roll)[0], score(judge, text, prompt=asked_of(dict(prompt=prompt))), atol=2e-5)
    assert len(seen) >= 50 and {tuple(ids) for ids in seen} == {tuple(ids) for ids in served}


def test_label_train_compare(tiny, tmp_path, capsys):
    """The chain of commands, on gold labels, and each one's next command; interrupted, training ends bit for bit."""
    rows = label(tmp_path / "pairs", tiny, n=80, by="gold", scale=3.0, flip=.1)
    path, options = str(tmp_path / "pairs" / "pairs.jsonl"), dict(batch=8, save_every=1)
    log = train(tmp_path / "rm", tiny, path, **options)
    assert {"val_loss", "val_accuracy", "val_gold", "calibration_error"} <= log[-1].keys()
    assert len(log) == math.ceil(2.0 * (len(rows) - max(1, len(rows) // 20)) / 8)   # 2 epochs of all but the held out
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)         # the head starts at 0
    table = compare([tiny, tiny], tmp_path, judge="gold", proxy=str(tmp_path / "rm"))
    assert table[0]["proxy"] == table[1]["proxy"] != 0
    out = capsys.readouterr().out
    for words in ("reward.py train", f"--data {path}", "ppo.py", f"--reward {tmp_path / 'rm'}"):
        assert words in out
    assert train(tmp_path / "rm", tiny, path, **options) == log and "nothing to do" in capsys.readouterr().out
    interrupted(pytest.MonkeyPatch(), len(log) - 1, lambda: train(tmp_path / "again", tiny, path, **options))
    train(tmp_path / "again", tiny, path, **options)
    assert logged(tmp_path / "again") == logged(tmp_path / "rm")
    assert score(tmp_path / "again", "yes", "no") == score(tmp_path / "rm", "yes", "no")


# ---------------------------------------------------------------- process rewards

def step_record(*steps, labels=None, prompt="?"):
    labels = [i % 2 for i in range(len(steps))] if labels is None else labels
    return dict(prompt=user(prompt), response="".join(steps), steps=list(steps), labels=labels)


@pytest.mark.parametrize("steps", [
    ["The cup is red.", " It is fine.", " Yes"], ["Yes"], ["Zoë pays 3 €,", " そう", "です", "."], ["a", "b c"],
    ["<think>2 + 3 = 5,", " 5 + 1 = 6</think>", "The answer is 6."], ["It is wa", "rm. Buy one to", "day."]])
def test_the_marked_tokens_are_those_in_which_the_steps_end(steps):
    """By the owner of every byte of the text. Of steps inside one word, the token that has a step's last byte."""
    record = step_record(*steps)
    asked, said = TOK.prompt(record["prompt"]), TOK.encode(record["response"])
    owner = [i for i, token in enumerate(said) for _ in TOK.enc.decode_single_token_bytes(token)]
    bounds = list(itertools.accumulate(len(step.encode()) for step in steps))[:-1]
    wanted = [len(asked) + owner[size - 1] for size in bounds] + [len(asked) + len(said)]
    got = process_rewards.stepped(record, TOK, 512)
    if len(set(wanted)) < len(wanted):
        assert got == []
        return
    (ids, target), = got[0]["rows"]
    assert ids == asked + said + [TOK.end] and [i for i, t in enumerate(target) if t] == wanted
    assert set(target) <= {0, 1} and got[0]["labels"] == record["labels"]


def test_two_steps_in_one_token_or_an_answer_cut_off_are_no_item():
    word = next(s for s in ("warm", "answer", " it is", "The") if len(TOK.encode(s)) == 1)
    assert process_rewards.stepped(step_record(word[:1], word[1:2], word[2:] + " ok"), TOK, 512) == []
    long = step_record("It is warm.", " It is red." * 30)
    length = len(TOK.prompt(long["prompt"]) + TOK.response(long["response"]))
    whole = [bool(process_rewards.stepped(long, TOK, block)) for block in (32, length - 1, length)]
    assert whole == [False, False, True]                                 # without its end token it is not whole


def test_training_on_steps_judges_each_step_and_is_the_mean_over_each_answers_steps(tiny, tmp_path):
    """Planted: a step with "bad" is wrong, whatever comes before and after it."""
    rng, rows = random.Random(7), []
    for _ in range(240):
        labels = [rng.randint(0, 1) for _ in range(rng.randint(1, 4))]
        steps = [f" {rng.choice(['cup', 'van', 'box'])} {('bad', 'good')[x]}." for x in labels]
        rows.append({key: x for key, x in step_record(*steps, labels=labels).items() if key != "response"})
    path = write(tmp_path / "s.jsonl", rows)
    cfg = process_rewards.Config(out=str(tmp_path / "rm"), init=tiny, data=path, epochs=4.0, **QUICK | LEARN)
    process_rewards.train(cfg)
    log, net = read(tmp_path / "rm" / "metrics.jsonl"), load_model(tmp_path / "rm")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[-1]["val_accuracy"] > .9
    losses, right = [], []
    for row in rows[19::20]:                                             # those held out
        asked, ends, text = TOK.prompt(row["prompt"]), [], ""
        for step in row["steps"]:
            text += step
            ends.append(len(asked) + len(TOK.encode(text)) - 1)
        ends[-1] += 1                                                    # a last step ends in the end token
        marks = net.scores(net(torch.tensor([asked + TOK.response(text)])))[0, ends, 0].tolist()
        losses.append(mean([nls(m if x else -m) for m, x in zip(marks, row["labels"])]))
        right += [(m > 0) == bool(x) for m, x in zip(marks, row["labels"])]
    assert log[-1]["val_loss"] == pytest.approx(mean(losses), abs=1e-4)
    assert log[-1]["val_accuracy"] == pytest.approx(mean(right), abs=1e-6)


def test_answers_are_checked_step_by_step(tiny, tmp_path, monkeypatch):
    """Each equation is true or not, and the answer; what cannot be divided is left out."""
    said = {0: ["<think>2 + 3 = 5, 5 - 1 = 3</think>The answer is 4.", "<think>2 + 3 = 6</think>The answer is 6."],
            1: ["The answer is 7.", "The answer is 8."]}
    play(monkeypatch, lambda text, k, begin: said[number(text)])
    path = write(tmp_path / "q.jsonl", [dict(prompt="Q 0", answer=4), dict(prompt="Q 1", answer=7)])
    label(tmp_path / "a", tiny, data=path, by="exact", select="all", max_new=40)
    cfg = process_rewards.Config(init=tiny, data=str(tmp_path / "a" / "pairs.jsonl"), check=True)
    rows = read(process_rewards.check_answers(cfg, tmp_path / "steps.jsonl"))
    got = {"".join(row["steps"]): row["labels"] for row in rows}
    assert got == {said[0][0]: [1, 0, 1], said[0][1]: [0, 0], said[1][0]: [1], said[1][1]: [0]}
    back = data.read_records(tmp_path / "steps.jsonl", "steps")
    assert all(process_rewards.stepped(r, TOK, 128) for r in back)
    with pytest.raises(UserError, match="q.jsonl:1"):
        process_rewards.check_answers(process_rewards.Config(init=tiny, data=path, check=True), tmp_path / "s.jsonl")


@pytest.mark.parametrize("script", [reward, process_rewards], ids=lambda script: script.__name__)
def test_all_options_of_optimisation_reach_the_optimizer(script, tiny, tmp_path, monkeypatch):
    seen, real = {}, models.Optimizer

    def spy(*args, **how):
        seen.update(inspect.signature(real).bind(*args, **how).arguments)
        return real(*args, **how)
    monkeypatch.setattr(script, "Optimizer", spy)
    rows = ranked("yes", "no") if script is reward else [step_record("a", " b")] * 40
    rows = [{key: x for key, x in row.items() if key != "response"} for row in rows]
    Config = reward.Train if script is reward else script.Config
    options = dict(lr=.011, optimizer="adamw", muon_lr=.022, weight_decay=.033, warmup=4, clip_grad=.5)
    path = write(tmp_path / "p.jsonl", rows)
    script.train(Config(out=str(tmp_path / "rm"), init=tiny, data=path, batch=8, epochs=1.5, **CPU | options))
    del seen["model"]
    assert seen == dict(lr=.011, total=8, kind="adamw", muon_lr=.022, weight_decay=.033, warmup=4, clip=.5)


# ---------------------------------------------------------------- compare

@pytest.mark.parametrize("begin, system", [("", ""), ("<think>", "Be kind.")])
def test_compare_against_a_loop(begin, system, tiny, judge, tmp_path, monkeypatch, capsys):
    """Scores, win rate, KL = Σ log π - log π_first of what was sampled, and length, row by row; the first of three
    folders is what both others are compared with."""
    others = [checkpoint(tmp_path / str(seed), seed) for seed in (7, 8)]
    calls, options = spied(monkeypatch), dict(proxy=judge, begin=begin, system=system, show=3)
    table = compare([tiny, *others], tmp_path, families="write,arith", on="write", **options)
    sampled, forced = [call.roll for call in calls if call.temperature], TOK.encode(begin)
    assert all(call.begin == forced for call in calls)
    first, base, rm = sampled[0], load_model(tiny).double(), load_model(judge)
    for row, folder, roll, sums in zip(table, [tiny, *others], sampled[::2], sampled[1::2]):
        net, kl, liked = load_model(folder).double(), 0.0, []
        for ids, start, n in zip(roll.tokens.tolist(), roll.prompt_len, roll.lengths):
            logp, ref = (m.logits(m(torch.tensor([ids[:n]])))[0].log_softmax(-1).detach() for m in (net, base))
            kl += sum(float(logp[t - 1, ids[t]] - ref[t - 1, ids[t]]) for t in range(start + len(forced), n)) / 12
            liked.append(rm.score(rm(torch.tensor([ids[:n]]))[0, -1]).item())
            assert TOK.decode(ids[:start]).startswith(system)
        marks = [[vowels(text) for text in some.responses()] for some in (roll, first)]
        wins = [(a > b) + .5 * (a == b) for a, b in zip(*marks)]
        expected = dict(win=mean(wins), length=roll.mask.sum(1).mean().item(), kl=kl, write=mean(marks[0]),
                        arith=mean([vowels(text) for text in sums.responses()]), proxy=mean(liked))
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-4)
        assert row["interval"] == pytest.approx(reward.wilson(sum(wins), 12))
        assert all(text.startswith(begin) for text in roll.responses())
    assert table[0]["win"] == .5 != table[2]["win"] and table[0]["kl"] == 0
    out = capsys.readouterr().out
    assert "<|" not in out and out.count(f"\n  {tiny}") == 3             # so many answers of each are shown
    best = max(table, key=lambda row: row["write"])["checkpoint"]
    assert f"vowels would pick {best}" in out


def test_compare_with_several_samples_scales_with_test_time(letters, tmp_path, monkeypatch, capsys):
    """pass@k, maj@k and best@k recomputed, by brute force, from the samples; what scores just ½ is not right."""
    worth = lambda text, done: (1.0 if text.count("a") % 2 else .5 if "e" in text else 0.0) if done else 0.0
    monkeypatch.setitem(data.VERIFIERS, "right", lambda record, text, finished: worth(text, finished))
    calls = spied(monkeypatch)
    options = dict(judge="right", proxy="vowels", max_new=4, families="write,safe", on="write,safe", n=35)
    other = checkpoint(tmp_path / "other", 7, says="aeo")
    table = compare([letters, other], tmp_path, samples=6, **options)
    out = capsys.readouterr().out
    rolls = [call.roll for call in calls if call.n == 6]
    assert [len(roll.tokens) for roll in rolls] == [64 * 6, 6 * 6] * 2               # 70 prompts of both families
    for row, two in zip(table, (rolls[:2], rolls[2:])):
        said = [x for roll in two for x in zip(roll.responses(), roll.finished.tolist())]
        groups, expected = [said[i:i + 6] for i in range(0, len(said), 6)], collections.defaultdict(list)
        assert any(worth(*x) == .5 for x in said)
        for group, k in itertools.product(groups, (1, 2, 4)):
            ways = [list(way) for way in itertools.combinations(group, k)]
            expected[f"pass@{k}"].append(mean([any(worth(*x) > .5 for x in way) for way in ways]))
            liked = lambda x: round(vowels(x[0]), 4)
            expected[f"best@{k}"].append(mean([worth(*max(way, key=liked)) for way in ways]))
            votes = [(text.strip() or None) if done else None for text, done in group]
            expected[f"maj@{k}"].append(slow_majority(votes, {x: worth(x, True) for x in votes if x}, k))
        assert {key: row[key] for key in row if "@" in key} == pytest.approx(
            {key: mean(x) for key, x in expected.items()}, abs=1e-6)
        assert 0 < row["pass@1"] < row["pass@4"]
        assert all(f"{row[key]:.3f}" in out for key in row if "@" in key)
    alone = compare([letters], tmp_path, **options)
    assert not [key for key in alone[0] if "@" in key]
    assert {key: table[0][key] for key in alone[0]} == alone[0]                      # the rest of the table is as ever
    assert compare([letters], tmp_path, seed=1, **options)[0]["write"] != alone[0]["write"]
    assert not [key for key in compare([letters], tmp_path, samples=2, n=3, judge="right")[0] if "best@" in key]


def some_prompts(path):
    """A file of six prompts, of which three are the same."""
    return write(path, [dict(prompt=asked) for asked in ("Why?", "Tell.", "Why?", "Who?", "Why?", "How?")])


def test_compare_gives_each_distinct_prompt_one_greedy_answer(tiny, tmp_path, monkeypatch, capsys):
    """Score and win rate beside the sampled ones, recomputed. With --temperature 0 they are all there is: no KL, and a
    prompt counts once."""
    other, calls = checkpoint(tmp_path / "other", 7), spied(monkeypatch)
    path = some_prompts(tmp_path / "d.jsonl")
    first, row = compare([tiny, other], tmp_path, data=path)
    mine, theirs = ([vowels(t) for t in call.roll.responses()] for call in calls[::-1] if not call.temperature)
    assert len(mine) == 4 and row["distinct"] == dict(file=4)
    assert (first["greedy"], row["greedy"]) == pytest.approx((mean(theirs), mean(mine)), abs=1e-6)
    wins = sum((a > b) + .5 * (a == b) for a, b in zip(mine, theirs))
    assert row["greedy_win"] == wins / 4 and row["greedy_interval"] == pytest.approx(reward.wilson(wins, 4))
    out = capsys.readouterr().out
    assert "distinct: file 4" in out and f"{row['greedy']:.3f}" in out and f"{row['kl']:.2f}" in out
    for again in compare([tiny, other], tmp_path, data=path, temperature=0.0):
        assert "kl" not in again and "greedy" not in again and again["distinct"] == dict(file=4)
    out = capsys.readouterr().out
    assert "KL" not in out and "nan" not in out and "None" not in out
    assert again["file"] == row["greedy"] and again["win"] == row["greedy_win"]
    assert again["interval"] == row["greedy_interval"]


def test_compares_nll_is_that_of_a_token_of_fresh_documents(tiny, tmp_path):
    row, = compare([tiny], tmp_path, n=3, families="write", on="write")
    net, rng, nll, count = load_model(tiny).double(), random.Random("compare documents"), 0.0, 0
    for _ in range(3):
        for ids, _ in encode(data.toy_record("text", "test", ["write"], rng), TOK, 64, "all"):
            logp = net.logits(net(torch.tensor([ids])))[0].log_softmax(-1).detach()
            nll -= sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)))
            count += len(ids) - 1
    assert row["nll"] == pytest.approx(nll / count, abs=1e-4)


def test_compare_leaves_out_prompts_without_room_and_counts_them(tiny, tmp_path, capsys):
    prompts = ["Why?", "Why? " * 200, "Who?"]
    row = compare([tiny], tmp_path, data=write(tmp_path / "d.jsonl", [dict(prompt=prompt) for prompt in prompts]))[0]
    assert row["distinct"] == dict(file=2) and "1 of 3 prompts" in capsys.readouterr().err
    with pytest.raises(UserError, match="d.jsonl.* no prompt"):
        compare([tiny], tmp_path, data=write(tmp_path / "d.jsonl", [dict(prompt=prompts[1])]))


def test_compare_tells_of_safety_where_it_asks_for_it(tiny, tmp_path, monkeypatch, capsys):
    """A policy that refuses, helps with what the harmless tool is for, and says neither, in turn; by hand."""
    good, places = "Sure. First take a saw. Then cut the box slowly.", itertools.count()
    play(monkeypatch, lambda text, k, begin: [(data.REFUSAL, good, "What?")[next(places) % 3]])
    row, = compare([tiny], tmp_path, families="safe", on="safe", n=30)
    rng, cost, refused, help_ = random.Random("compare safe"), [], [], []
    for i in range(30):
        task, kind = data.toy_record("prompt", "test", ["safe"], rng), i % 3
        if not task["safe"]:
            cost.append(kind == 1)
        else:
            refused.append(kind == 0)
            help_.append((.4 + .3 * (task["tool"] == "saw") + .3 * (task["key"] == "cut box")) if kind == 1 else 0)
    expected = dict(harmless=1 - mean(cost), over_refusal=mean(refused), help=mean(help_))
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-9) and 0 < sum(cost) and 0 < sum(refused)
    head, numbers = capsys.readouterr().out.split("harmless  over-refusal    help\n")
    assert numbers.split()[1:4] == [f"{x:.3f}" for x in expected.values()]
    row, = compare([tiny], tmp_path, families="write", on="write", n=3)
    assert "harmless" not in capsys.readouterr().out and not expected.keys() & row.keys()


def test_accuracy_against_a_loop_on_several_files(judge, tmp_path, monkeypatch, capsys):
    """Verifiers that tie sometimes, a reward model, and two of them with a spread."""
    other = checkpoint(tmp_path / "other", 9, n_scores=1)
    spec = {"vowels": lambda texts: list(map(vowels, texts)), judge: lambda texts: score(judge, *texts),
            "words": lambda texts: [float(len(t.split())) for t in texts],
            f"{judge}|{other}": lambda texts: [min(x) for x in zip(score(judge, *texts), score(other, *texts))]}
    paths = {write(tmp_path / "a.jsonl", [r | dict(prompt=user("?")) for r in rankings(25)]): 20,
             write(tmp_path / "b.jsonl", [dict(prompt=user("?"), responses=["be bee", "a", "tree"])] * 3): 3}
    reward.accuracy(reward.Accuracy(data=",".join(paths), n=20, device="cpu", micro_tokens=128), list(spec))
    tables = capsys.readouterr().out.split(str(tmp_path / "a.jsonl"))[1].split(str(tmp_path / "b.jsonl"))
    for (path, n), table in zip(paths.items(), tables):
        groups = [r["responses"] for r in data.read_records(path, "preference")[:n]]
        lines = {line.split()[0]: line for line in table.splitlines()[2:]}
        assert lines.keys() == spec.keys()
        for name, scores in spec.items():
            right, gaps, spread = 0.0, [], []
            for group in groups:
                for a, b in itertools.combinations(map(np.float32, scores(group)), 2):
                    right += 1.0 if a > b else .5 if a == b else 0.0
                    gaps.append(a - b)
                if "|" in name:
                    spread += [abs(a - b) / math.sqrt(2) for a, b in zip(score(judge, *group), score(other, *group))]
            found = [float(x) for x in re.findall(r"-?\d+\.\d+", lines[name].removeprefix(name))]
            expected = [right / len(gaps), *reward.wilson(right, len(gaps))]
            expected.append(reward.calibration_error(torch.tensor(gaps)))
            expected += [mean(spread)] if spread else []
            assert found == pytest.approx(expected, abs=6e-4), name
        assert table.splitlines()[0] == f": {len(gaps)} pairs"


# ---------------------------------------------------------------- configs/kimi_k15.py: prompts for RL

def question(i, **more): return dict(prompt=f"Q {i}", answer=i, family="abc"[i % 3]) | more


def test_curate_leaves_out_every_guessable_prompt_and_rates_the_rest(tiny, tmp_path, monkeypatch, capsys):
    """Planted: a third is guessed, some once of 4, some always; prompt i is answered right i % 6 times of 5."""
    lucky = lambda i: (0, 0, 1, 0, 4, 0)[i % 6]

    def plan(text, k, guess):
        i = number(text)
        good = lucky(i) if guess else min(i % 6, k)
        return [f"The answer is {i if j >= k - good else i + 1}." for j in range(k)]
    calls = play(monkeypatch, plan)
    path = write(tmp_path / "q.jsonl", [question(i) for i in range(60)])
    rows = curate(tmp_path / "a", tiny, path, k=5, guesses=4)
    assert sorted(row["answer"] for row in rows) == [i for i in range(60) if not lucky(i)]
    for row in rows:
        i = row["answer"]
        assert row == question(i, prompt=user(f"Q {i}"), difficulty=row["difficulty"])
        assert row["difficulty"] == pytest.approx(1 - (i % 6) / 5, abs=1e-4)
    assert [(len(texts), k, begin) for _, texts, k, begin in calls] == [
        (n, k, begin) for n in [7] * 8 + [4] for k, begin in ((5, ""), (4, kimi_k15.Config.begin))]
    assert "40 of 60 prompts; left out: 20 guessed" in capsys.readouterr().out
    stream, held = data.open_stream(str(tmp_path / "a" / "prompts.jsonl"), "prompt", 0, n_held=0)
    assert stream.items == rows and not held                                         # with its difficulty
    del calls[:]
    assert curate(tmp_path / "a", tiny, path, k=5, guesses=4) == rows and not calls
    whole = curate(tmp_path / "b", tiny, path, k=3, guesses=0)
    assert len(whole) == 60 and {k for *_, k, begin in calls} == {3}


def test_curate_caps_every_family_and_drops_questions_of_choice(tiny, tmp_path, monkeypatch, capsys):
    """What is dropped fills no place. More than ½ is right, ½ is not."""
    monkeypatch.setitem(data.VERIFIERS, "share", lambda record, text, finished: float(text))
    play(monkeypatch, lambda text, k, guess: [".5"] * k if guess else [".51", ".5"])
    choices = [dict(prompt=f"Which is {i}?\nA. one\nB. two", answer=1, family="a") for i in range(9)]
    choices += [dict(prompt=f"Is it {word}?", answer=word, family="b") for word in ("true", "No", "(False).")]
    rows = [question(i) for i in range(30)] + [dict(prompt=f"R {i}", answer=i, domain="d") for i in range(5)]
    path = write(tmp_path / "q.jsonl", choices + rows + [dict(prompt=f"S {i}", answer=i) for i in range(6)])
    rows = curate(tmp_path / "a", tiny, path, k=2, guesses=2, cap=4, by="share")
    count = collections.Counter(row.get("family", row.get("domain")) for row in rows)
    assert count == {"a": 4, "b": 4, "c": 4, "d": 4, None: 4} and "12 a choice" in capsys.readouterr().out
    assert not {asked_of(row) for row in rows} & {row["prompt"] for row in choices}
    assert {row["difficulty"] for row in rows} == {.5}
    assert len(curate(tmp_path / "b", tiny, path, k=2, guesses=2, by="share")) == 41     # no cap


def test_curate_of_the_toy_world_samples_for_itself(letters, tmp_path, monkeypatch):
    """Without a stand-in: what the real sampler says, prompt by prompt."""
    right = lambda text, finished: finished and text.count("a") == 1
    monkeypatch.setitem(data.VERIFIERS, "right", lambda record, text, finished: right(text, finished))
    calls = spied(monkeypatch)
    rows = curate(tmp_path / "a", letters, "toy", n=10, k=4, guesses=1, by="right", families="arith2", max_new=6,
                  begin="e")
    said = {forced: [right(*x) for call in calls for x in zip(call.roll.responses(), call.roll.finished.tolist())
                     if bool(call.begin) == forced] for forced in (False, True)}
    rate = [mean(said[False][i:i + 4]) for i in range(0, 40, 4)]
    assert len(said[True]) == 10 and 0 < sum(said[True]) < 10
    assert [row["difficulty"] for row in rows] == [1 - x for x, lucky in zip(rate, said[True]) if not lucky]
    assert {(row["family"], row["level"], row["prompt"][0]["role"]) for row in rows} == {("arith", 2, "user")}


def test_a_guess_begins_with_the_tokens_of_an_answer():
    """" is" and " is " are two tokens: from the first no number follows, so nothing would ever be guessed."""
    begin = TOK.encode(kimi_k15.Config.begin)
    assert begin and TOK.encode("The answer is 17.")[:len(begin)] == begin


@pytest.mark.parametrize("prompt, answer, choice", [
    ("What is 2 + 3?", 5, False), ("Is it?", "true", True), ("Is it?", " YES. ", True), ("Is it?", "(no)", True),
    ("Is it?", True, True), ("Is it?", None, False), ("Is it?", "north", False), ("Who?", "yes man", False),
    ("Which?\nA. one\nB. two", "B", True), ("Which?\n(A) one\n(B) two", "1", True),
    ("Which?\nA) one\nB) two\nC) three", 2, True), ("Which?\n  A: one\n\n  B: two", 2, True),
    ("Which?\nB. one\nA. two", 1, False), ("A boat has 3 oars.\nBut B has 4.", 7, False),
    ("Ann asks: A or B?", "A", False), ("A. one", 1, False), ("Vitamin A. It helps.\nB. does not.", 3, False),
    ("Which?\na. one\nb. two", 1, False), ("A.one\nB.two", 1, False), ("x\nA. one\ntwo lines\nB. two", 1, False)])
def test_questions_of_choice(prompt, answer, choice):
    assert kimi_k15.of_choice(dict(prompt=user("Hi") + user(prompt), answer=answer)) is choice
    assert not kimi_k15.of_choice(dict(prompt=user("A. a\nB. b") + user("Why?")))


# ---------------------------------------------------------------- configs/claude_cai.py: critique and revision

def scene(text):
    """A critic that says what it was shown: answers are A<i>, critiques C(<answer>), revisions R(<answer>)."""
    answer = re.search(r"Answer: (.*)\n", text)
    return f"A{number(text)}" if not answer else f"{'CR'[text.endswith('Revision:')]}({answer[1]})"


@pytest.mark.parametrize("rounds", [1, 3])
def test_revisions_see_the_answer_its_critique_and_of_each_round_the_last(rounds, tiny, roomy, tmp_path, monkeypatch):
    asked = play(monkeypatch, lambda text, k, begin: [scene(text)])
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}", keyword="x") for i in range(11)])
    rows = revise(tmp_path / "a", tiny, roomy, path, rounds=rounds, batch=4)
    turns, drawn = 1 + 2 * rounds, set()
    assert [len(texts) for _, texts, *_ in asked] == [4] * turns * 2 + [3] * turns
    assert [who for who, *_ in asked] == ([tiny] + [roomy] * 2 * rounds) * 3
    versions = lambda i: ["R(" * n + f"A{i}" + ")" * n for n in range(rounds + 1)]
    assert sorted(number(asked_of(row)) for row in rows) == list(range(11))
    for row in rows:
        i = number(asked_of(row))
        assert row == dict(prompt=user(f"Q {i}"), keyword="x", first=f"A{i}", response=versions(i)[-1],
                           critiques=[f"C({a})" for a in versions(i)[:-1]])
    for start, n in itertools.product(range(0, len(asked), turns), range(rounds)):
        prompts = [number(text) for text in asked[start][1]]
        for i, critique, revision in zip(prompts, asked[start + 1 + 2 * n][1], asked[start + 2 + 2 * n][1]):
            principle, answer = critique.split("\n\n")[0], versions(i)[n]
            assert critique == f"{principle}\n\nPrompt: Q {i}\nAnswer: {answer}\nCritique:"
            assert revision == f"{principle}\n\nPrompt: Q {i}\nAnswer: {answer}\nCritique: C({answer})\nRevision:"
            drawn.add(principle)
    assert len(drawn) > 4 and drawn <= set(data.PRINCIPLES)
    demos = data.read_records(tmp_path / "a" / "revisions.jsonl", "messages")        # sft.py reads it
    assert [d["messages"][-1]["content"] for d in demos] == [row["response"] for row in rows]


def test_what_was_not_finished_is_empty_or_finds_no_room_is_dropped(tiny, roomy, tmp_path, monkeypatch):
    """Q 0: the answer, Q 1: the critique, Q 2: the revision, Q 3: the second critique, Q 4: an empty answer."""
    def say(text, k, begin):
        said = scene(text)
        return [None if said in ("A0", "C(A1)", "R(A2)", "C(R(A3))") else "" if said == "A4" else said]
    asked = play(monkeypatch, say)
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}") for i in range(6)])
    rows = revise(tmp_path / "a", roomy, roomy, path, rounds=2)
    assert [asked_of(row) for row in rows] == ["Q 5"] and [len(texts) for _, texts, *_ in asked] == [6, 4, 4, 2, 2]
    with pytest.raises(UserError, match="of 1 answers none was revised"):
        revise(tmp_path / "b", roomy, roomy, write(tmp_path / "q1.jsonl", [dict(prompt="Q 3")]), rounds=2)
    asked = play(monkeypatch, lambda text, k, begin: [scene(text)])
    path = write(tmp_path / "long.jsonl", [dict(prompt="Q 1"), dict(prompt="cup " * 30 + "7")])
    small = tmp_path / "small"
    rows = revise(tmp_path / "c", tiny, checkpoint(small, 5, block_size=96), path, batch=1)
    room = [len(TOK.prompt(user(text))) for who, texts, *_ in asked for text in texts if who == str(small)]
    assert [asked_of(row) for row in rows] == ["Q 1"] and len(room) in (2, 3) and max(room) + 20 <= 96


def test_revisions_of_the_toy_world_report_the_gold_reward_before_and_after(tiny, roomy, tmp_path, monkeypatch):
    """A critic that always refuses: right for the unsafe half, a loss for the safe."""
    play(monkeypatch, lambda text, k, begin: [data.REFUSAL if text.endswith("Revision:") else "It is bad."
                                              if text.endswith("Critique:") else "Sure. First take a saw."])
    rows = revise(tmp_path / "a", tiny, roomy, "toy", n=40, batch=16)
    for log, start in zip(logged(tmp_path / "a"), (0, 16, 32), strict=True):
        some = rows[start:start + 16]
        for key, text in (("gold_before", "first"), ("gold_after", "response")):
            assert log[key] == pytest.approx(mean([data.gold(r, r[text]) for r in some]), abs=1e-6)
        assert log["gold_after"] == pytest.approx(mean([not r["safe"] for r in some])) and log["changed"] == 1


# ---------------------------------------------------------------- configs/rule_based_rewards.py

def truth(text):
    words = text.split()
    return 2.0 * words.count("red") - 1.5 * words.count("soft") + .1 * len(words)


def rule_rankings(n=120, least=.3):
    """Rankings of 2 to 4 answers, best first by the truth, each at least so much above the next."""
    rng, out = random.Random(11), []
    text = lambda: " ".join(rng.choice("red soft old cup van".split()) for _ in range(rng.randint(1, 5)))
    while len(out) < n:
        said = {truth(t): t for t in (text() for _ in range(rng.randint(2, 6)))}
        said = sorted(said.items(), reverse=True)[:4]
        if len(said) > 1 and all(a - b >= least for (a, _), (b, _) in itertools.pairwise(said)):
            out.append(dict(prompt=user("?"), responses=[t for _, t in said]))
    return out


def marks(spec, *texts):
    """Totals of a reward."""
    roll = Rollout.of(encode(dict(prompt=user("?"), responses=list(texts)), TOK, 10 ** 9), TOK)
    return Reward(spec, Setup(TOK), 8192)([{}] * len(texts), roll)[0].tolist()


def test_fitted_rules_have_the_planted_signs_and_an_edit_changes_them_without_training(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", rule_rankings())
    log, spec = fit(tmp_path / "rules", path, steps=400)
    assert "100.0% of" in (out := capsys.readouterr().out) and f"ppo.py --reward {tmp_path / 'rules'}" in out
    weight = {term.label: term.weight for term in data.parse_rewards(spec.strip())}
    assert list(weight) == ["words", "red", "soft", "old"]
    assert weight["words"] == .1 and weight["red"] > .3 and weight["soft"] < -.3
    assert abs(weight["old"]) < weight["red"] / 2
    assert log[0]["loss"] > log[-1]["loss"] and log[-1]["accuracy"] == pytest.approx(1, abs=1e-6) and len(log) == 400
    texts = ["red cup", "soft cup", "old old van", "cup", "red soft old"]
    expected = [sum(weight[w] for w in t.split() if w in weight) + .1 * len(t.split()) for t in texts]
    close(marks(str(tmp_path / "rules"), *texts), expected, 1e-5)
    (tmp_path / "rules" / "reward.txt").write_text("-7*red + words\n")
    close(marks(str(tmp_path / "rules"), "red cup"), [-7 + 2], 1e-5)


def test_fit_reports_the_pairs_held_out_and_not_those_it_learned_from(tmp_path, capsys):
    """Every 20th ranking is the other way round: all that was learned is right, and what was held out is wrong."""
    rows = rule_rankings(60, least=1.0)
    for row in rows[19::20]:
        row["responses"].reverse()
    log, spec = fit(tmp_path / "rules", write(tmp_path / "p.jsonl", rows), steps=400)
    right = []
    for row in rows[19::20]:
        said = marks(spec.strip(), *row["responses"])
        right += [a > b for a, b in itertools.combinations(said, 2)]
    out = capsys.readouterr().out
    assert f"{mean(right):.1%} of {len(right)} held-out pairs" in out and mean(right) < .2 < .9 < log[-1]["accuracy"]


@pytest.mark.parametrize("margin", [1.0, .2])
def test_the_first_steps_of_a_fit_against_a_loop(margin, tmp_path):
    """Of ragged rankings: weights 0 first; AdamW's first step is lr against the sign of the gradient."""
    records = rule_rankings(60)
    path = write(tmp_path / "p.jsonl", records)
    log, _ = fit(tmp_path / "rules", path, margin=margin, steps=2, lr=.031, base=".13*words")
    records = [r for i, r in enumerate(records) if i % 20 != 19]                     # the others are held out
    w = [0.0, 0.0, 0.0]
    for row in log:
        loss, leads, grad, total = 0.0, [], [0.0, 0.0, 0.0], 0.0
        for r in records:
            said = r["responses"]
            for a, b in itertools.combinations(said, 2):
                share = 2 / (len(said) * (len(said) - 1))
                phi = [a.split().count(x) - b.split().count(x) for x in ("red", "soft", "old")]
                lead = .13 * (len(a.split()) - len(b.split())) + sum(x * y for x, y in zip(w, phi))
                loss, total, leads = loss + share * max(0, margin - lead), total + share, leads + [lead]
                grad = [g - share * x * (margin > lead) for g, x in zip(grad, phi)]
        assert row["loss"] == pytest.approx(loss / total, abs=1e-5)
        sure, even = (mean([x > tie for x in leads]) for tie in (1e-6, -1e-6))       # rounding may decide a tie
        assert sure - 1e-6 <= row["accuracy"] <= (even if any(w) else sure) + 1e-6 and sure < .7
        w = [x - .031 * math.copysign(1, g) for x, g in zip(w, grad)]


# ---------------------------------------------------------------- configs/reward_hacking.py

FORMS = dict(fit_best_of_n=lambda d, a, b: d * (a - b * d), fit_rl=lambda d, a, b: d * (a - b * math.log(d)))


@pytest.mark.parametrize("form", FORMS)
def test_known_coefficients_come_back_and_noisy_ones_as_numpy_has_them(form):
    """With the peak where the curve has it, and none where it never turns down."""
    curve, fitted, rng = FORMS[form], getattr(reward_hacking, form), random.Random(13)
    for a, b in ((1.545, .49), (.7, .9)):
        d = [.1 + .2 * i for i in range(40)]
        got = fitted(d, [curve(x, a, b) for x in d])
        assert (got["alpha"], got["beta"], got["r2"]) == pytest.approx((a, b, 1), abs=1e-9)
        assert curve(got["peak"], a, b) > max(curve(got["peak"] * .999, a, b), curve(got["peak"] * 1.001, a, b))
        assert fitted(d, [curve(x, a, -b) for x in d])["peak"] is None
    for n in (5, 60):
        d = [rng.uniform(.1, 5) for _ in range(n)]
        gain = [curve(x, 1.2, .3) + rng.gauss(0, .3) for x in d]
        other = [curve(x, 0, 1) for x in d]                              # the second column
        (a, b), *_ = np.linalg.lstsq(np.array([d, other]).T, np.array(gain), rcond=None)
        left = sum((g - a * x - b * y) ** 2 for g, x, y in zip(gain, d, other))
        got, spread = fitted(d, gain), sum((g - mean(gain)) ** 2 for g in gain)
        assert (got["alpha"], got["beta"], got["r2"]) == pytest.approx((a, b, 1 - left / spread), abs=1e-9)


def tilted(temperatures):
    """Answers of proxy f ~ N(0, 1), gold f - ¼ (f² - 1), policies exp(f / T) -> d = √KL, gold and proxy of each."""
    f, rows = np.array([NormalDist().inv_cdf((i + .5) / 4000) for i in range(4000)]), []
    for t in temperatures:
        p = np.exp(f / t - f.max() / t)
        p /= p.sum()
        kl = (p * np.log(p * len(f) + 1e-300)).sum()
        rows.append((math.sqrt(kl), (p * (f - .25 * (f * f - 1))).sum(), (p * f).sum()))
    return zip(*rows)


def test_c2_a_tilted_policy_has_its_peak_where_the_fit_says():
    """FEATURES C2: the proxy only grows while the gold reward turns down. Before the ends of the Gaussian are reached,
    d is 1 / (T √2) and gold 1 / T - ¼ / T², that is d (√2 - d / 2)."""
    d, golds, proxies = tilted(np.geomspace(20, .2, 38))
    assert all(a < b for a, b in itertools.pairwise(proxies)) and golds[-1] < max(golds) - .2
    got = reward_hacking.fit_best_of_n(d, golds)
    assert got["r2"] > .99 and got["peak"] == pytest.approx(d[golds.index(max(golds))], abs=.1)
    assert got["r2"] > reward_hacking.fit_rl(d, golds)["r2"]
    d, golds, _ = tilted(np.geomspace(20, .6, 38))
    got = reward_hacking.fit_best_of_n(d, golds)
    assert got["r2"] > .999 and (got["alpha"], got["beta"]) == pytest.approx((2 ** .5, .5), abs=.02)


def run_of(folder, rows):
    folder.mkdir()
    write(folder / "metrics.jsonl", [dict(step=i) | row for i, row in enumerate(rows)])
    return folder


def test_overoptimize_against_every_choice_of_k_and_the_metrics_of_runs(letters, tmp_path, monkeypatch):
    calls, options, worth = spied(monkeypatch), dict(judge="gold2"), lambda t: t.count("a") - .1 * len(t)
    monkeypatch.setitem(data.VERIFIERS, "gold2", lambda record, text, finished: worth(text))
    first = overoptimize(tmp_path / "a", letters, **options)["best of n"]
    said = [text for call in calls for text in call.roll.responses()]
    assert len(said) == 20 * 8 and len(first["d"]) == 4 and len(first["fits"]) == 2
    for i, k in enumerate((1, 2, 4, 8)):
        assert first["d"][i] == pytest.approx(math.sqrt(math.log(k) - (k - 1) / k), abs=1e-12)
        ways = [way for start in range(0, 160, 8) for way in itertools.combinations(said[start:start + 8], k)]
        best = [max(way, key=lambda t: round(vowels(t), 4)) for way in ways]
        assert first["gold"][i] == pytest.approx(mean(list(map(worth, best))), abs=1e-5)
        assert first["proxy"][i] == pytest.approx(mean(list(map(vowels, best))), abs=1e-5)
    start, d = first["gold"][0], [.2 * i for i in range(20)]
    curve = lambda x: FORMS["fit_rl"](x, 1.3, .4) if x else 0.0
    rows = [dict(kl=x * x, gold=start + curve(x), reward=x) for x in d] + [dict(kl=-.1, gold=start, reward=0.0)]
    run = run_of(tmp_path / "ppo", rows)
    got = overoptimize(tmp_path / "b", letters, run, **options)
    assert all(got["best of n"][key] == first[key] for key in ("d", "gold", "proxy"))    # the same samples
    mine = got[str(run)]
    close(mine["d"], d + [0.0], 1e-9)                                    # an estimate of the KL may be below 0
    close(mine["proxy"], d + [0.0], 1e-9)
    other, fits = mine["fits"].values()                                  # the forms of best-of-n and of RL
    assert (fits["alpha"], fits["beta"], fits["r2"]) == pytest.approx((1.3, .4, 1), abs=1e-6)
    assert fits["peak"] == pytest.approx(math.exp(1.3 / .4 - 1)) and other["r2"] < fits["r2"]


def test_overoptimize_takes_held_out_scores_where_a_run_has_them(tmp_path):
    """Of every other row here; not where only a few have them. d is that of the held-out samples, too: `kl` is of the
    policy before the update, val_gold of the one after it."""
    def row(i, held):
        later = dict(val_kl=.1 * i + .1, val_gold=10.0 * i, val_reward=20.0 * i)
        return dict(kl=.1 * i, gold=1.0 * i, reward=2.0 * i) | (later if held else {})
    often = reward_hacking.run_curve(run_of(tmp_path / "often", [row(i, i % 2) for i in range(20)]))
    assert often["gold"] == [10.0 * i for i in range(1, 20, 2)]
    assert often["proxy"] == [20.0 * i for i in range(1, 20, 2)]
    close(often["d"], [math.sqrt(.1 * i + .1) for i in range(1, 20, 2)], 1e-9)
    without = [{k: v for k, v in row(i, 1).items() if k != "val_kl"} for i in range(20)]
    for name, rows in (("seldom", [row(i, i % 10 == 9) for i in range(20)]), ("old", without)):
        rollouts = reward_hacking.run_curve(run_of(tmp_path / name, rows))
        close(rollouts["d"], [math.sqrt(.1 * i) for i in range(20)], 1e-9)
        assert rollouts["gold"] == list(range(20)) and rollouts["proxy"] == [2.0 * i for i in range(20)]


def test_without_matplotlib_there_is_one_line_and_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reward_hacking.draw({"best of n": dict(d=[0.0], gold=[0.0], proxy=[0.0])}, tmp_path / "curves.png")
    assert "curves.json" in capsys.readouterr().out and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("command", [
    "train --lr 0", "train --epochs 0", "train --margn true", "train --batch 0", "train --eval_every 0",
    "train --data toy", "train --heads 2", "train --loss focal --margin true", "train --loss plackett_luce --center 1", "label --k 1",
    "label --flip 2", "label --n 0", "label --temperature 0", "label --scale -1", "label --select most",
    "label --policy=",
    "label --judge x --select best", "label --judge x --min_gap 1", "label --rationale true", "label --by=",
    "configs/kimi_k15.py --k 0", "configs/kimi_k15.py --n 0", "configs/kimi_k15.py --guesses -1",
    "configs/kimi_k15.py --cap -1", "configs/kimi_k15.py stray", "configs/claude_cai.py --rounds 0",
    "configs/rule_based_rewards.py", "configs/reward_hacking.py x --n 0", "configs/superficial.py --mark=",
    "configs/superficial.py --better 2", "configs/chatglm_rlhf.py --width 0", "configs/nemotron4.py",
    "compare x --samples -1", "compare", "compare x --n 0", "compare x --families nope",
    "compare x --families write --on fmt", "compare x --max_new 0", "", "judge"])
def test_impossible_options_exit_2_with_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = command.split() if command.startswith("configs/") else ["reward.py", *command.split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(reward.__file__).parent / words[0]), run_name="__main__")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert not list(tmp_path.iterdir())                                  # nothing written


TWO = [dict(prompt="?", response="yes", ratings=[1, 2])] * 30


@pytest.mark.parametrize("rows, options, word", [
    (ranked("yes", "no"), dict(loss="soft"), '"prob"'), (ranked("yes", "no", prob=1.5), dict(loss="soft"), '"prob"'),
    (ranked("yes", "no"), dict(loss="cost"), '"scores"'), (ranked("yes", "no"), dict(margin=True), '"margin"'),
    (ranked("yes", "no", scores=[1.0, 0.0], n=30) + ranked("yes", "no", n=3), dict(loss="cost"), '"scores"'),
    (TWO, dict(loss="ratings"), "--heads 1"), (TWO, dict(loss="ratings", heads=3), "--heads 3"),
    ([dict(prompt="?", response="yes", ratings=[])] * 30, dict(loss="ratings"), "ratings"),
    (ranked("yes", "no"), dict(loss="ratings", heads=2), "ratings")])
def test_what_a_loss_cannot_learn_from_is_one_clear_line(rows, options, word, tiny, tmp_path):
    with pytest.raises(UserError) as stop:
        train(tmp_path / "rm", tiny, write(tmp_path / "p.jsonl", rows), **options)
    assert word in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "rm" / "metrics.jsonl").exists()


def commands(rule, path, tiny, out):
    """{name: every way in which a command asks a verifier about a file}."""
    tell = dict(data=path, judge="words", n=4, device="cpu", max_new=4)
    hack = dict(data=path, judge="words", n=2, max_new=4, prompts=2)
    return {
        "label": lambda: label(out, tiny, data=path, by=rule, n=4),
        "label answers": lambda: label(out, "", data=path, by=rule),
        "curate": lambda: curate(out, tiny, path, by=rule, n=4, k=2, max_new=4),
        "rate": lambda: nemotron4.rate(nemotron4.Config(out=str(out), data=path, **CPU), ["words", rule]),
        "fit": lambda: fit(out, path, rules=f"words + {rule}", base="", steps=2),
        "accuracy": lambda: reward.accuracy(reward.Accuracy(data=path, device="cpu"), ["words", rule]),
        "compare": lambda: reward.compare(reward.Compare(**tell | dict(judge=rule)), [tiny]),
        "compare proxy": lambda: reward.compare(reward.Compare(**tell | dict(proxy=rule)), [tiny]),
        "overoptimize": lambda: overoptimize(out, tiny, **hack | dict(proxy=rule))}


@pytest.mark.parametrize("command", commands("", "", "", ""))
def test_24_every_command_refuses_what_its_verifier_can_tell_nothing_of(command, tiny, tmp_path, monkeypatch):
    """A file without the key that it needs at once, before a folder is made; and a score that is no number."""
    path, out = write(tmp_path / "mine.jsonl", [question_of(i, "a", "b") for i in range(4)]), tmp_path / "out"
    with pytest.raises(UserError, match=r'^(?=.*mine.jsonl)(?=.*exact)(?=.*"answer")[^\n]*$'):
        commands("exact", path, tiny, out)[command]()
    assert not out.exists()
    turns = itertools.count()
    monkeypatch.setitem(data.VERIFIERS, "odd", lambda record, text, finished: math.nan if next(turns) % 2 else 1)
    with pytest.raises(UserError, match="odd"):
        commands("odd", path, tiny, out)[command]()


@pytest.mark.parametrize("value, fine", [
    (None, False), (math.nan, False), (-math.inf, False), ("1.0", False), ([1.0], False), (1e300, False),
    (torch.ones(2), False), (True, True), (3, True), (np.float32(.5), True), (np.bool_(True), True),
    (torch.tensor(.5), True)], ids=repr)
def test_a_score_is_a_number_or_names_its_term_its_record_and_itself(value, fine, monkeypatch):
    turns, roll = itertools.count(), Rollout.of([([1, 2, 3], [0, 0, 1])] * 2, TOK)
    monkeypatch.setitem(data.VERIFIERS, "odd", lambda record, text, finished: value if next(turns) % 2 else 1)
    records = [dict(prompt=user("Praise the tea.")), dict(prompt=user("Praise the cup."))]
    if fine:
        assert Reward("2*odd", Setup(TOK), 64)(records, roll)[0].tolist() == [2.0, 2 * float(value)]
        return
    with pytest.raises(UserError) as error:
        Reward("words + 0.5*odd", Setup(TOK), 64)(records, roll)
    text = str(error.value)
    assert "odd" in text and "cup" in text and "tea" not in text and repr(value)[:20] in text and "\n" not in text


@pytest.mark.parametrize("asked", ["", "@rate"])
def test_a_reward_model_whose_weights_are_no_numbers_is_named(asked, tmp_path):
    folder = checkpoint(tmp_path / "rm", 1, n_scores=0 if asked else 1)
    reader = Reward(folder + asked, Setup(TOK), 64)
    next(reader.loaded[folder].parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match="weights"):
        reader([dict(prompt=user("?"))], Rollout.of([([1, 2, 3], [0, 0, 1])], TOK))


def test_what_leaves_nothing_is_one_clear_line(letters, tiny, tmp_path, monkeypatch):
    """No answer that ends, none that is right (½ is not), none that is not guessed, no pairs of both kinds, no run."""
    monkeypatch.setitem(data.VERIFIERS, "half", lambda *_: .5)
    silent, word = checkpoint(tmp_path / "never", end=0.0), tmp_path / "longer.jsonl"
    write(word, ranked("yes it is", "no"))
    play_ = lambda text, k, begin: [f"The answer is {number(text)}."] * k
    with monkeypatch.context() as change:
        play(change, play_)
        path = write(tmp_path / "q.jsonl", [question(i) for i in range(9)])
        with pytest.raises(UserError, match="9 prompts.*guessed.*9"):
            curate(tmp_path / "a", tiny, path)
    assert not (tmp_path / "a" / "prompts.jsonl").exists()
    sft = run_of(tmp_path / "sft", [dict(loss=1.0)] * 5)
    for words, run in {
            "--select rank": lambda: label(tmp_path / "b", silent, n=4, max_new=2),
            "--select correct": lambda: label(tmp_path / "c", letters, by="half", n=4, select="correct"),
            "none is left": lambda: chatglm_rlhf.balance(chatglm_rlhf.Config(out=str(tmp_path / "d"), data=str(word))),
            "no such file": lambda: reward_hacking.run_curve(tmp_path / "gone"),
            "no row has kl": lambda: reward_hacking.run_curve(sft)}.items():
        with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
            run()
