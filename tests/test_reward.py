"""reward.py: losses and statistics against loops and closed forms; what label keeps of every answer that was sampled;
training, accuracy and compare done again slowly, row by row. The scripts beside recipes that label are further down."""
import itertools
import json
import math
import random
import re
import runpy
import sys
from collections import Counter, defaultdict
from pathlib import Path
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
import runs
import superficial
from data import Tokenizer, UserError
from model import Reward, Rollout, Setup, load_model
from policies import patch, random_policy, save
from runs import close, mean, preferences, rows_of, write

TOK = Tokenizer.load("toy")
CPU = dict(device="cpu", dtype="fp32", threads=1)


# ---- models and files

@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A policy with room for a question about answers."""
    return save(tmp_path_factory.mktemp("roomy"), random_policy(5, block_size=256))


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A policy of two letters: its short answers repeat, and tie."""
    return save(tmp_path_factory.mktemp("letters"), random_policy(says="ae"))


def vowels(text):
    return runs.vowels({}, text, True)


def user(text):
    return [dict(role="user", content=text)]


def question(i, *answers, **more):
    return dict(prompt=user(f"Q {i}"), responses=list(answers), **more)


def asked_of(row):
    return row["prompt"][-1]["content"]


def by_prompt(rows):
    return {asked_of(row): row for row in rows}


def number(text):
    return int(text.split()[-1])


def numbered(tmp_path, n, **more):
    """A file of the prompts Q 0, Q 1, ..."""
    rows = [dict(prompt=f"Q {i}", **more) for i in range(n)]
    return write(tmp_path / "q.jsonl", rows)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rankings(n=60, seed=3):
    """Preferences of 2 to 4 responses, with scores that do not always agree with the label."""
    records = preferences(n, k=4, seed=seed)
    for i, record in enumerate(records):
        for key in ("responses", "scores", "win"):
            record[key] = record[key][:2 + i % 3]
    return records


def two_of(values):
    """Every two of them, the first ones first."""
    return list(itertools.combinations(values, 2))


# ---- the commands

def label(out, policy, **options):
    """The real label(), the higher score first; its records."""
    sure = dict(n=40, batch=16, max_new=8, by="runs:vowels", scale=0.0, flip=0.0)
    cfg = reward.Label(out=str(out), policy=policy, **(CPU | sure | options))
    reward.label(cfg)
    return read(Path(out) / "pairs.jsonl")


def relabel(out, rows, **options):
    """label --policy "" of a file with these rows."""
    path = write(Path(out).with_suffix(".jsonl"), rows)
    return label(out, "", data=path, **(dict(n=1000) | options))


def compare(folders, tmp_path, **options):
    """The real compare(); its table."""
    usual = dict(max_new=6, n=12, families="write,safe", on="write,safe", judge="runs:vowels", device="cpu")
    path = tmp_path / "table.json"
    reward.compare(reward.Compare(save=str(path), **(usual | options)), folders)
    return json.loads(path.read_text())["rows"]


def train(out, init, path, **options):
    """The real train(); its rows of metrics.jsonl."""
    reward.train(reward.Train(out=str(out), init=init, data=path, **CPU, **options))
    return rows_of(out)


def start(script, command, out, made, **options):
    """Run the command of a script beside a recipe; the rows of a file that it makes."""
    function = getattr(script, command)
    function(script.Config(out=str(out), **CPU, **options))
    return read(Path(out) / made)


# ---- what is sampled

def play(monkeypatch, say):
    """Sampling is replaced: say(the prompt's text, k, whether told how to begin) -> k answers; None is one that is not
    finished. -> What was asked: the model's context, the texts of the prompts, k, how the answers begin."""
    calls = []

    def generate(net, prompts, max_new, n=1, temperature=1.0, begin=()):
        texts = [TOK.decode(ids) for ids in prompts]
        told = TOK.decode(list(begin))
        calls.append(SimpleNamespace(context=net.config.block_size, texts=texts, k=n, begin=told))
        rows, finished = [], []
        for ids, text in zip(prompts, texts):
            for answer in say(text, n, bool(begin)):
                said = TOK.response("It goes" if answer is None else answer, answer is not None)
                rows.append((ids + said, [0] * len(ids) + [1] * len(said)))
                finished.append(answer is not None)
        roll = Rollout.of(rows, TOK)
        roll.finished = torch.tensor(finished)
        return roll
    patch(monkeypatch, "generate", generate)
    return calls


def never(*_, **__):
    raise AssertionError("it sampled")


def groups_of(calls):
    """Of every prompt that respond() was asked, the prompt, and what was said: [(text, tokens, finished), ...]."""
    groups = []
    for (_, records, _, k, *_), roll in calls:
        tokens = roll.mask.sum(1).tolist()
        said = list(zip(roll.responses(), tokens, roll.finished.tolist()))
        for i, record in enumerate(records):
            groups.append((asked_of(record), said[i * k:(i + 1) * k]))
    return groups


def usable(said):
    """{text: tokens} of what was finished and is not empty."""
    return {text: tokens for text, tokens, finished in said if finished and text.strip()}


# ---------------------------------------------------------------- losses of pairs and rankings

W = [1, -.5, 2]  # three pairs
L = [0, .5, -1]
GIVEN = dict(prob=[.8, .4, .9], s_w=[1.0, 1, -1], s_l=[1.0, -1, -1], margin=[0.0, 0, 0])
GOLDEN = dict(bt=.5583702422, focal=.46811035028, soft=.5250369089, cost=2.3566210872)


def sigmoid(x):
    return 1 / (1 + torch.exp(torch.as_tensor(-x)))


def slow_bt(w, l, x):
    return -sigmoid(w - l - x["margin"]).log()


def slow_focal(w, l, x):
    p = sigmoid(w - l)
    wrong = 1 - 2 * (p - .5) if p > .5 else torch.ones_like(p)
    return -wrong ** x["gamma"] * p.log()


def slow_soft(w, l, x):
    p = sigmoid(w - l)
    prob = x["prob"]
    return -prob * p.log() - (1 - prob) * (1 - p).log()


def slow_cost(w, l, x):
    """w is the more harmful one; a harmful one's score should be above 0, that of another below."""
    w_right = sigmoid(w) if x["s_w"] > 0 else sigmoid(-w)
    l_right = sigmoid(l) if x["s_l"] > 0 else sigmoid(-l)
    return -sigmoid(w - l).log() - w_right.log() - l_right.log()


SLOW_PAIRS = dict(bt=slow_bt, focal=slow_focal, soft=slow_soft, cost=slow_cost)


def pair_loss(name, w, l, gamma=2.0, **given):
    """The losses (P,) of the source, in float64."""
    x = SimpleNamespace(r_w=torch.as_tensor(w).double(), r_l=torch.as_tensor(l).double())
    for key, values in (GIVEN | given).items():
        setattr(x, key, torch.tensor(values, dtype=torch.float64))
    return reward.PAIR_LOSSES[name](x, SimpleNamespace(gamma=gamma))


def test_f1_every_loss_has_a_golden_number():
    assert GOLDEN.keys() == reward.PAIR_LOSSES.keys() == SLOW_PAIRS.keys()
    for name, golden in GOLDEN.items():
        losses = pair_loss(name, W, L)
        assert losses.shape == (3,)                                      # (N, 1) - (N,) would be (N, N)
        close(losses.mean(), golden, 2e-10)
    scores = torch.tensor([2, .5, 0, -1], dtype=torch.float64)           # of a ranking
    win, lose, weight = reward.ranked_pairs([4])
    of_pairs = weight * reward.bradley_terry(scores[win], scores[lose])
    close(of_pairs.sum(), .2276134317, 1e-7)
    close(reward.plackett_luce(scores), 1.2597418752)
    walls = reward.log_barrier(torch.tensor(W + L, dtype=torch.float64))
    close(walls.sum() / 3, -6.345719, 1e-6)


@pytest.mark.parametrize("gamma", [.5, 2.0, 5.0])
@pytest.mark.parametrize("name", SLOW_PAIRS)
def test_pair_losses_and_their_gradients_against_a_loop(name, gamma):
    """With every combination of signs; and finite far from 0."""
    rng, w, l = random.Random(0), [], []
    given = dict(prob=[], margin=[], s_w=[], s_l=[])
    for s_w, s_l in itertools.product([1.0, -1.0] * 3, repeat=2):
        w.append(rng.gauss(0, 3))
        l.append(rng.gauss(0, 3))
        x = dict(prob=rng.random(), margin=rng.choice([0.0, 1.5]), s_w=s_w, s_l=s_l)
        for key, value in x.items():
            given[key].append(value)
    r_w, r_l, slow_w, slow_l = (torch.tensor(r).double().requires_grad_() for r in (w, l, w, l))
    losses = pair_loss(name, r_w, r_l, gamma, **given)
    losses.sum().backward()
    total = 0.0
    for i in range(len(w)):
        x = {key: values[i] for key, values in given.items()}
        x["gamma"] = gamma
        slow = SLOW_PAIRS[name](slow_w[i], slow_l[i], x)
        close(losses[i].detach(), slow.detach(), 1e-9)
        total += slow
    total.backward()
    close(r_w.grad, slow_w.grad, 1e-9)
    close(r_l.grad, slow_l.grad, 1e-9)

    far = torch.tensor([-500.0, 0, 500], requires_grad=True)
    x = SimpleNamespace(r_w=far, r_l=-far, margin=0.0, prob=.7, s_w=torch.ones(3), s_l=torch.ones(3))
    loss = reward.PAIR_LOSSES[name](x, SimpleNamespace(gamma=2.0))
    loss.sum().backward()
    assert loss.isfinite().all() and far.grad.isfinite().all()


def slow_plackett_luce(scores):
    """Of all orders of choosing without replacement by exp(score), the probability of this one."""
    p = 1.0
    for i, score in enumerate(scores):
        left = sum(s.exp() for s in scores[i:])
        p = p * score.exp() / left
    return -p.log()


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_plackett_luce_and_its_gradient_against_a_loop(k):
    """And over all orders the probabilities add up to 1."""
    torch.manual_seed(k)
    start = torch.randn(k, dtype=torch.float64) * 2
    scores = start.clone().requires_grad_()
    slow_scores = start.clone().requires_grad_()
    loss, slow = reward.plackett_luce(scores), slow_plackett_luce(slow_scores)
    close(loss.detach(), slow.detach())
    loss.backward()
    slow.backward()
    close(scores.grad, slow_scores.grad)
    total = 0.0
    for order in itertools.permutations(range(k)):
        total += math.exp(-reward.plackett_luce(start[list(order)]))
    close(total, 1.0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_and_its_gradient_are_finite_at_any_margin(gamma):
    """(1 - p)^γ has an infinite slope at p = 1 where γ is below 1, and there p rounds to 1."""
    r_w = torch.tensor([90.0, 500.0, -500.0], requires_grad=True)
    loss = reward.focal(r_w, torch.zeros(3), gamma)
    loss.sum().backward()
    assert loss[:2].abs().max() < 1e-9 and loss[2] == 500
    assert r_w.grad[:2].abs().max() < 1e-9 and r_w.grad[2] == -1


def test_beyond_its_wall_the_barrier_is_finite():
    beyond = torch.tensor([5.0, -5.0, 60.0, -1e6], requires_grad=True)
    wall = reward.log_barrier(beyond)
    wall.sum().backward()
    highest = -math.log(.001) - math.log(9.999)
    close(wall.detach(), [highest] * 4, 1e-3)
    assert beyond.grad.isfinite().all()


def test_ranked_pairs_against_a_loop():
    sizes, first, expected = [2, 4, 3, 2], 0, []
    for k in sizes:
        for i in range(k):
            for j in range(i + 1, k):
                expected.append((first + i, first + j))
        first += k
    win, lose, weight = reward.ranked_pairs(sizes)
    assert list(zip(win, lose)) == expected
    shares = [weight[0], weight[1:7].sum(), weight[7:10].sum(), weight[10]]
    close(shares, [1, 1, 1, 1], 1e-6)
    assert len(weight.unique()) == 3


# ---------------------------------------------------------------- statistics

def slow_calibration(margins, bins=10):
    total = 0.0
    for b in range(bins):
        low = .5 + .5 * b / bins
        high = low + .5 / bins
        sure, right = [], []
        for m in margins:
            p = float(sigmoid(abs(m)))
            if low <= p < high or b == bins - 1 and p == 1:
                sure.append(p)
                right.append(m > 0)
        if sure:
            total += abs(mean(sure) - mean(right)) * len(sure)
    return total / len(margins)


@pytest.mark.parametrize("n, bins", [(1, 10), (7, 3), (500, 10)])
def test_calibration_error_against_a_loop(n, bins):
    rng = random.Random(n)
    margins = [rng.gauss(.5, 2) for _ in range(n)] + [40.0, -40.0]       # at which σ is 1
    close(reward.calibration_error(torch.tensor(margins), bins), slow_calibration(margins, bins), 1e-5)
    ten = torch.tensor([math.log(9.0)] * 7 + [-math.log(9.0)] * 3)       # 90% sure, 70% right
    close(reward.calibration_error(ten), .2, 1e-6)


@pytest.mark.parametrize("wins, n, low, high", [
    (81, 263, .2553, .3662), (15, 148, .0624, .1605),
    (0, 20, .0, .1611), (1, 29, .0061, .1718)])
def test_wilson_published_table(wins, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), Table I, method 3."""
    assert reward.wilson(wins, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("a, b, wins", [(2, 1, 1), (1, 2, 0), (1, 1, .5), (.1 + .2, .3, 1)])
def test_a_tie_is_a_half(a, b, wins):
    assert reward.preference(a, b) == wins
    assert reward.in_order(torch.tensor([a - b])) == wins


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (5, 0), (5, 1), (6, 3), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_one_that_is_right(n, right):
    answers = [1] * right + [0] * (n - right)
    for k in range(1, n + 1):
        chosen = [max(some) for some in itertools.combinations(answers, k)]
        close(reward.pass_at_k(n, right, k), mean(chosen))


def test_best_of_k_is_the_mean_over_all_choices_of_k():
    """Of equal proxies the first counts as the best."""
    rng = random.Random(3)
    for n in [1, 2, 3, 5, 7] * 8:
        scores = [rng.gauss(0, 2) for _ in range(n)]
        proxies = [rng.choice([0.0, 1.0, 2.0, rng.gauss(0, 1)]) for _ in range(n)]
        for k in range(1, n + 1):
            taken = []
            for places in itertools.combinations(range(n), k):
                best = max(places, key=lambda place: proxies[place])
                taken.append(scores[best])
            close(reward.best_of_k(scores, proxies, k), mean(taken))


def test_majority_at_k_against_a_loop():
    """None is no vote. The same final answer may have two scores: a judge sees the thinking too."""
    rng = random.Random(4)
    for n in range(1, 13):
        said = [rng.choice(["a", "a", "b", "c", None]) for _ in range(n)]
        scores = [rng.choice([0.0, .25, 1.0]) for _ in range(n)]
        for k in range(1, n + 1):
            parts = []
            for first in range(0, n - k + 1, k):
                part = range(first, first + k)
                votes = Counter(said[i] for i in part if said[i])
                most = max(votes.values(), default=0)
                won = [scores[i] for i in part if said[i] and votes[said[i]] == most]
                parts.append(mean(won) or 0.0)
            close(reward.majority_at_k(said, scores, k), mean(parts))


@pytest.mark.parametrize("scores, scale, flip", [([0.0, 1.0, 2.0], 1.0, 0.0), ([0.0, .5], 2.0, .25), ([0.0, 5.0], 0, .1)])
def test_rank_draws_plackett_luce_scale_0_best_first_and_flip_turns(scores, scale, flip):
    rng, draws = random.Random(1), 20_000
    seen = Counter(tuple(reward.rank(scores, scale, flip, rng)) for _ in range(draws))

    def chance(order):
        if scale:
            return math.exp(-slow_plackett_luce([torch.tensor(scores[i] * scale) for i in order]))
        return float(scores[order[0]] > scores[order[1]])
    for order in itertools.permutations(range(len(scores))):
        p = (1 - flip) * chance(order) + flip * chance(order[::-1])
        assert seen[order] / draws == pytest.approx(p, abs=.012)                    # 3.4 standard errors


def slow_rates(scores):
    rates = []
    for i, a in enumerate(scores):
        others = scores[:i] + scores[i + 1:]
        rates.append(mean([sigmoid(a - b) for b in others]))
    return rates


def test_f2_accepted_responses_are_the_tilted_policys():
    """RSO on the bandit: π = .4 .3 .2 .1, rewards 0 to 3, β = ½. Accepted samples follow π exp(r / β) / Z."""
    rng, kept, draws = random.Random(0), [], 100_000
    for _ in range(500):
        scores = rng.choices([0.0, 1.0, 2.0, 3.0], [.4, .3, .2, .1], k=200)         # each has the best of all
        group = [reward.Answer("", score) for score in scores]
        kept += reward.each(reward.accept(group, .5, rng), "score")
    expected = dict(enumerate([.0074, .0411, .2027, .7488]))
    assert len(kept) / draws == pytest.approx(.1336, abs=.004)
    for score, share in expected.items():
        error = math.sqrt(share * (1 - share) / len(kept))
        assert kept.count(score) / len(kept) == pytest.approx(share, abs=3 * error + 5e-5)
    best = reward.Answer("", 5.0)
    worst = reward.Answer("", -1e3)
    assert reward.accept([worst, best], .01, rng) == [best], "the best is always accepted"


# ---------------------------------------------------------------- training

def slow_scores(net, record, texts):
    """The scores (heads,) of texts, one unpadded row at a time."""
    scores = []
    for text in texts:
        ids = TOK.prompt(record["prompt"]) + TOK.response(text)
        every = net.scores(net(torch.tensor([ids])))                     # (1, T, heads)
        scores.append(every[0, -1])
    return scores


def texts_of(record):
    return record["responses"] if "responses" in record else [record["response"]]


def wall(score):
    return -(5 - score).log() - (5 + score).log()


def slow_loss(scores, record, cfg):
    """The loss of a record from the scores (heads,) of its responses, by its definition: a mean over its pairs."""
    if cfg.loss == "ratings":
        return (scores[0] - torch.tensor(record["ratings"])).square().mean()
    scores = [score[0] for score in scores]
    if cfg.loss == "plackett_luce":
        return slow_plackett_luce(scores)
    harm, losses = record.get("scores", [0] * 4), []
    for i, j in two_of(range(len(scores))):
        x = dict(gamma=cfg.gamma, prob=record.get("prob", 1.0), s_w=harm[i], s_l=harm[j])
        x["margin"] = record.get("margin", 0.0) if cfg.margin else 0.0
        loss = SLOW_PAIRS[cfg.loss](scores[i], scores[j], x)
        loss = loss + cfg.center * (scores[i] + scores[j]) ** 2
        losses.append(loss + cfg.barrier * (wall(scores[i]) + wall(scores[j])))
    return sum(losses) / len(losses)


def slow_evaluation(net, records, cfg):
    """val_ and calibration_error of records, looking at every two responses."""
    losses = []
    every = []
    leads = []
    right = []
    true = []
    signs = []
    for record in records:
        scores = slow_scores(net, record, texts_of(record))
        losses.append(slow_loss(scores, record, cfg))
        scores = [float(score[0]) for score in scores]
        every += scores
        for i, j in two_of(range(len(scores))):
            leads.append(scores[i] - scores[j])
            right.append(scores[i] > scores[j])
            given = record.get("scores")
            if given and given[i] != given[j]:
                true.append((scores[i] > scores[j]) == (given[i] > given[j]))
            for place in (i, j) if cfg.loss == "cost" else ():
                signs.append((scores[place] > 0) == (given[place] > 0))
    row = dict(val_loss=mean(losses), val_mean=mean(every))
    if cfg.loss == "ratings":
        return row | slow_r2(net, records)
    row |= dict(val_accuracy=mean(right), val_gold=mean(true), calibration_error=slow_calibration(leads))
    return row | dict(val_sign=mean(signs)) if signs else row


def slow_r2(net, records):
    """The share of each rating's variance that is explained."""
    row = {}
    for k in range(2):
        truth = [record["ratings"][k] for record in records]
        said = [slow_scores(net, record, texts_of(record))[0][k] for record in records]
        left = mean([(a - b) ** 2 for a, b in zip(said, truth)])
        spread = mean([(b - mean(truth)) ** 2 for b in truth])
        row[f"val_r2/{k}"] = 1 - left / spread
    return row


def training_records(loss):
    """Rankings of which some say more than others; of cost all have scores, of soft some are people's."""
    rng, records = random.Random(1), rankings(60)
    for i, record in enumerate(records):
        if loss == "ratings":
            ratings = [rng.random(), 4.0 * i]
            records[i] = dict(prompt=record["prompt"], response=record["responses"][0], ratings=ratings)
            continue
        if loss == "cost":
            record["scores"][i % 2] = 0.0                                # not harmful
        elif i % 2:
            del record["scores"]
        if i % 4:
            record["prob"] = round(rng.random(), 2)
        else:
            record["source"] = "human"
        if i % 6 == 0:                                                   # a pair
            record["margin"] = rng.random()
    return records


TRAINING = {"bt": dict(margin=True, center=.1), "focal": dict(gamma=1.5), "soft": {}, "cost": dict(barrier=.02),
            "plackett_luce": {}, "ratings": dict(heads=2), "barrier": dict(loss="bt", barrier=.3)}


@pytest.mark.parametrize("name", TRAINING)
def test_training_against_a_slow_loop(name, tmp_path, monkeypatch, float64):
    """Three steps of the real train(): every metric that is logged, and the scores at the end. The records are those
    of the files, token by token; where differences alone were trained, the held-out mean is put at 0."""
    options = dict(loss=name, batch=8, epochs=.4, eval_every=2, save_every=9, micro_tokens=150, lr=.01, warmup=2)
    options |= dict(optimizer="adamw", clip_grad=.8, weight_decay=.2) | TRAINING[name]
    heads, records = options.get("heads", 1), training_records(name)
    init = save(tmp_path / "init", random_policy(5, n_scores=heads))
    net = load_model(init)
    path = write(tmp_path / "r.jsonl", records)
    cfg = reward.Train(init=init, data=path, **CPU, **options)
    batches, real = [], data.Stream.batch

    def batch(self, step, n):
        batches.append(real(self, step, n))
        return batches[-1]
    monkeypatch.setattr(data.Stream, "batch", batch)
    evaluated = runs.watch(monkeypatch, reward, "evaluate")["evaluate"]
    log = train(tmp_path / "rm", init, path, **options)
    (_, held, _), _ = evaluated[0]
    known = {}
    for record in records:
        asked = TOK.prompt(record["prompt"])
        rows = [asked + TOK.response(text) for text in texts_of(record)]
        known[str(rows)] = record

    def records_of(items):
        return [known[str([ids for ids, _ in item["rows"]])] for item in items]
    total = math.ceil(.4 * (len(records) - len(held)) / 8)
    assert len(log) == total == 3 and 0 < len(held) < 7
    optimizer = runs.SlowOptimizer(net, cfg.lr, total, cfg)
    for step, row in enumerate(log):
        losses, right, lead = [], [], []
        for record in records_of(batches[step]):
            scores = slow_scores(net, record, texts_of(record))
            losses.append(slow_loss(scores, record, cfg))
            gaps = [(a[0] - b[0]).item() for a, b in two_of(scores)]
            right.append(mean([gap > 0 for gap in gaps]))
            lead.append(mean(gaps))
        loss = sum(losses) / 8
        loss.backward()
        want = dict(loss=loss.item()) | optimizer.step(step)
        if name != "ratings":
            want |= dict(accuracy=mean(right), margin=mean(lead))
        if step > 0:
            with torch.no_grad():
                want |= slow_evaluation(net, records_of(held), cfg)
        runs.compare_rows(step, row, want, tolerance=1e-5)
    shift = want["val_mean"] if name in ("bt", "focal", "soft", "plackett_luce") else 0.0
    made = load_model(tmp_path / "rm")
    for record in records_of(held):
        texts = texts_of(record)
        for got, slow in zip(slow_scores(made, record, texts), slow_scores(net, record, texts)):
            close(got.detach(), slow.detach() - shift, 1e-5)


def test_training_recovers_known_gaps(tiny, tmp_path):
    """The real loop on the pairs of F2's bandit, both orders as often as Bradley-Terry says: gaps 1, 2, 3. A fresh head
    scores 0."""
    rows = []
    often = {1: (11, 15), 2: (22, 25), 3: (20, 21)}                      # σ(1) = .731, σ(2) = .881, σ(3) = .953
    for i, j in two_of(range(4)):
        won, n = often[j - i]
        better = question("?", "abcd"[j], "abcd"[i])
        worse = question("?", "abcd"[i], "abcd"[j])
        rows += [better] * won + [worse] * (n - won)
    random.Random(0).shuffle(rows)
    n = len(rows)
    for place in range(19, n * 20 // 19, 20):                            # every 20th is held out: let it be a spare
        rows.insert(place, question("?", "a", "d"))
    path = write(tmp_path / "p.jsonl", rows)
    log = train(tmp_path / "rm", tiny, path, batch=n, epochs=50.0, lr=1e-2, optimizer="adamw", weight_decay=0.0, warmup=0)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    scores = slow_scores(load_model(tmp_path / "rm"), rows[0], "abcd")
    a, b, c, d = [score.item() for score in scores]
    close([b - a, c - a, d - a], [1, 2, 3], .05)


@pytest.mark.parametrize("script", [reward, process_rewards], ids=lambda script: script.__name__)
def test_options_of_optimisation_are_used(script, tiny, tmp_path):
    """Another value, and the weights end elsewhere."""
    rows = [question(i, "yes", "no") for i in range(40)]
    Config = reward.Train
    if script is process_rewards:
        rows = [dict(prompt=user(f"Q {i}"), steps=["a", " b"], labels=[0, 1]) for i in range(40)]
        Config = script.Config
    path, ends = write(tmp_path / "p.jsonl", rows), {}
    others = dict(muon_lr=.02, lr=.02, optimizer="adamw", weight_decay=.9, warmup=3, clip_grad=.001, epochs=.5, seed=1,
                  steps=1)
    for name, value in [("batch", 8), *others.items()]:
        options = CPU | dict(batch=8, warmup=1, epochs=1.0) | {name: value}
        script.train(Config(out=str(tmp_path / name), init=tiny, data=path, **options))
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights not in ends, f"{name} changes no weight"
        ends[weights] = name


def test_same_ids_in_reward_training_evaluation_and_ppo(judge, tmp_path, monkeypatch):
    """A text that is sampled by PPO and one that comes from a file are the same ids, end token included."""
    texts = ["The cup is fine.", "Yes"]
    record = dict(prompt=user("Describe the old van."), responses=texts)
    seen = runs.watch(monkeypatch, reward, "response_scores")["response_scores"]
    path = write(tmp_path / "p.jsonl", [record] * 25)
    train(tmp_path / "rm", judge, path, batch=24, epochs=1.0)
    trained = set()
    for (_, tokens, _), _ in seen:
        for row in tokens.tolist():
            trained.add(tuple(i for i in row if i != TOK.pad))
    net, served = load_model(judge, Setup(TOK)), set()
    for text in texts:
        script = iter(TOK.response(text))
        with monkeypatch.context() as change:
            change.setattr(models, "sample", lambda logits, *_: (torch.tensor([next(script)]), torch.zeros(1)))
            roll = models.generate(net, [TOK.prompt(record["prompt"])], 40)
        (ids, _), = roll.rows()
        served.add(tuple(ids))
        assert roll.responses() == [text] and roll.finished.all()
        paid, _ = Reward(judge, Setup(TOK), 64)([record], roll)
        close(paid, slow_scores(net, record, [text])[0].detach(), 2e-5)
    assert trained == served


# ---------------------------------------------------------------- what label keeps

def taste(record, text, finished):
    """A reward of prompt and text that no two texts of the letters a and e share; above ½ for about every other one."""
    value = 1
    for letter in text:
        value = 2 * value + (letter == "a")
    return value / 24 + len(asked_of(record)) / 1e4


def untied(said):
    """Of texts of the same score the first."""
    first = {}
    for text, score in said.items():
        first.setdefault(round(score, 4), text)
    return {text: score for score, text in first.items()}


def slow_kept(options, said):
    """What --select keeps of the answers {text: score} to a prompt: lists of texts, best first."""
    select, gap = options["select"], options.get("min_gap", 0)
    if select in ("rank", "ends", "rso"):
        said = untied(said)
    best = sorted(said, key=said.get, reverse=True)
    if select == "best":
        return [[text] for text in best[:1]]
    if select in ("all", "correct"):
        return [[text] for text in best if select == "all" or said[text] > .5]
    if len(best) < 2 or said[best[0]] - said[best[-1]] < gap:
        return []
    return [[best[0], best[-1]]] if select == "ends" else [best]


@pytest.mark.parametrize("options", [
    dict(select="rank"), dict(select="ends"), dict(select="ends", min_gap=1.15), dict(select="rso", rso_beta=1e9),
    dict(select="all", by="test_reward:taste"), dict(select="best", by="test_reward:taste"),
    dict(select="correct", by="test_reward:taste")], ids=str)
def test_label_keeps_of_all_that_was_sampled_what_it_says(options, letters, tmp_path, monkeypatch):
    """Without unfinished answers, none twice, and no two of one score where scores alone decide the order."""
    calls = runs.watch(monkeypatch, models, "respond")["respond"]
    rows = label(tmp_path / "a", letters, k=4, max_new=4, n=60, batch=25, **options)
    score, expected = data.verifier(options.get("by", "runs:vowels")), []
    for asked, answers in groups_of(calls):
        record = dict(prompt=user(asked))
        said = {text: float(score(record, text, True)) for text in usable(answers)}
        for texts in slow_kept(options, said):
            scores = [said[text] for text in texts]
            every = list(untied(said).values())
            rate = dict(zip(every, slow_rates(every)))
            rates = [rate[round(x, 4)] for x in scores if len(texts) > 1]
            expected.append((asked, texts, scores, rates))
    got = [(asked_of(row), texts_of(row), row["scores"], row.get("win", [])) for row in rows]
    assert len(calls) == 3
    assert len(got) == len(expected) > 4
    for mine, slow in zip(sorted(got), sorted(expected)):
        assert mine[:2] == slow[:2]
        close(mine[2], slow[2], 1e-6)
        close(mine[3], slow[3], 1e-3)
    assert {row["source"] for row in rows} == {"ai"}
    kind = "preference" if "responses" in rows[0] else "messages"        # what learns from it reads it
    assert len(data.read_records(tmp_path / "a" / "pairs.jsonl", kind)) >= len(rows) - 1


@pytest.mark.parametrize("select", ["rank", "ends", "rso"])
def test_rankings_of_none_or_one_are_nothing(select):
    """And draw no label noise: whether a prompt got one answer or none must not change the labels after it."""
    drawn = SimpleNamespace(random=lambda: 0.0 if select == "rso" else never())
    for group in ([], [reward.Answer("It is red.", 1.0, 4)]):
        assert reward.kept(group, reward.Label(select=select), drawn) == []


def test_answers_of_one_score_are_nothing_where_scores_alone_decide(tmp_path):
    tied = [question(0, "be a", "ab e")]
    row, = relabel(tmp_path / "a", tied, scale=1.0)
    assert sorted(row["responses"]) == ["ab e", "be a"]
    with pytest.raises(UserError, match="none got answers"):
        relabel(tmp_path / "b", tied)


def test_label_flip_seed_and_skip(tmp_path, tiny):
    """Skipped prompts are counted in whole batches, so that a later round begins where an earlier one ended."""
    plain = label(tmp_path / "a", tiny)
    turned = label(tmp_path / "b", tiny, flip=1.0)
    assert [row["responses"][::-1] for row in turned] == [row["responses"] for row in plain]
    assert label(tmp_path / "c", tiny) == plain != label(tmp_path / "d", tiny, seed=1)
    asked = {}
    for name, n, skip in (("first", 16, 0), ("second", 16, 16), ("up", 16, 3), ("both", 32, 0)):
        rows = label(tmp_path / name, tiny, select="all", k=12, n=n, skip=skip)
        asked[name] = list(dict.fromkeys(map(asked_of, rows)))
    assert asked["both"] == asked["first"] + asked["second"]
    assert asked["up"] == asked["second"]


def test_label_of_a_file_asks_each_prompt_once_and_skips_as_it_says(tiny, tmp_path, monkeypatch):
    calls = play(monkeypatch, lambda text, k, begin: ["be", "bee"])
    path = numbered(tmp_path, 20)
    with open(path, "a") as file:
        file.write(json.dumps(dict(prompt="cup " * 70)))                 # no room for an answer
    whole = label(tmp_path / "a", tiny, data=path, batch=8)
    late = label(tmp_path / "b", tiny, data=path, batch=8, skip=8)
    assert sorted(number(asked_of(row)) for row in whole) == list(range(20))
    assert late == whole[8:]
    assert [len(call.texts) for call in calls] == [8, 8, 4, 8, 4]


def test_a_system_message_is_asked_and_kept(tiny, tmp_path, monkeypatch):
    calls = play(monkeypatch, lambda text, k, begin: ["be", "bee"])
    path = write(tmp_path / "q.jsonl", [dict(prompt="Q 1")])
    asked = [dict(role="system", content="Be kind."), dict(role="user", content="Q 1")]
    sampled = label(tmp_path / "a", tiny, data=path, system="Be kind.")
    given = relabel(tmp_path / "b", [question(1, "be", "bee")], system="Be kind.")
    assert calls[0].texts == ["Be kind.Q 1"]
    assert sampled[0]["prompt"] == given[0]["prompt"] == asked
    toy = label(tmp_path / "c", tiny, system="Be kind.", n=5)
    assert {row["prompt"][0]["content"] for row in toy} == {"Be kind."}


def test_without_a_policy_the_responses_of_a_file_are_labelled_anew(tmp_path, monkeypatch):
    patch(monkeypatch, "generate", never)
    rows = []
    for i, said in enumerate(itertools.permutations(("be", "bee", "tree", "a"), 3)):
        rows.append(question(i, *said, scores=[0.0] * 3, win=[.5] * 3, prob=.6, keyword="cup"))
    got = by_prompt(relabel(tmp_path / "a", rows, batch=7))
    assert len(got) == len(rows)
    for row in rows:
        new = got[asked_of(row)]
        order = sorted(row["responses"], key=vowels, reverse=True)
        scores = [vowels(text) for text in order]
        close(new.pop("scores"), scores, 1e-6)
        close(new.pop("win"), slow_rates(scores), 1e-6)
        assert new == dict(prompt=row["prompt"], keyword="cup", source="ai", responses=order)
    few = relabel(tmp_path / "b", rows, n=5, batch=2, select="best")
    assert len(few) == 5  # the k of --k plays no part
    assert all("responses" not in row for row in few)


# ---------------------------------------------------------------- AI labels

QUALITY = dict(best=1.6, bees=.9, fair=.2, poor=-1.1)
BIAS = 1.3                                                               # for the answer that comes first


def test_a_bias_for_a_place_cancels():
    """A judge that says 1 with probability σ(q + 1.3)."""
    close(reward.debiased(sigmoid(.7 + BIAS), sigmoid(-.7 + BIAS)), .617570, 5e-7)
    close(reward.debiased(torch.tensor([.9, .2]), torch.tensor([.3, .2])), [.8, .5], 1e-7)
    assert reward.debiased(.3, .9) + reward.debiased(.9, .3) == pytest.approx(1, abs=1e-15)


def shown(text):
    """The two answers in a judge's question."""
    first, second = re.search(r"Answer 1: (.*)\nAnswer 2: (.*)\n", text).groups()
    return first, second


def swayed(monkeypatch, prefers=lambda a, b: QUALITY[a] - QUALITY[b]):
    """A judge that says 1 with probability σ(how much it prefers the first + BIAS); the questions it was asked."""
    asked = []

    def choices(model, prompts, names, budget):
        assert list(names) == ["1", "2"]
        texts = [TOK.decode(ids) for ids in prompts]
        asked.extend(texts)
        p = torch.stack([sigmoid(prefers(*shown(text)) + BIAS) for text in texts]).double()
        return torch.stack([p, 1 - p], 1).log()
    monkeypatch.setattr(reward, "choice_logprobs", choices)
    return asked


def preferred(a, b, clamp=1.0):
    """How often the swayed judge prefers a to b, both orders averaged."""
    gap = QUALITY[a] - QUALITY[b]
    p = float(sigmoid(gap + BIAS) + sigmoid(gap - BIAS)) / 2
    return min(max(p, 1 - clamp), clamp)


@pytest.mark.parametrize("select, clamp", [("rank", 1.0), ("ends", 1.0), ("rank", .6), ("rank", .5)])
def test_judge_orders_answers_by_how_often_each_is_preferred(select, clamp, tiny, tmp_path, monkeypatch, capsys):
    """All orders of 2 to 4 answers. Of one pair there is one probability; how often the judge contradicts itself and
    how often it agrees with --by, which likes no letter e, is counted."""
    asked = swayed(monkeypatch)
    patch(monkeypatch, "generate", never)
    sources, torn, agrees = [], [], []
    for k in (2, 3, 4):
        for group in itertools.permutations(QUALITY, k):
            sources.append(question(len(sources), *group, scores=[9.0] * k))
    rows = by_prompt(relabel(tmp_path / "a", sources, judge=tiny, select=select, clamp=clamp, batch=100))
    assert len(rows) == len(sources)
    for source in sources:
        row, said = rows[asked_of(source)], source["responses"]
        wins = {}
        for a in said:
            wins[a] = mean([preferred(a, b, clamp) for b in said if b != a])
        order = sorted(said, key=lambda text: round(wins[text], 9), reverse=True)   # of equals the first
        if select == "ends":
            order = [order[0], order[-1]]
        assert row["responses"] == order and row["source"] == "ai"
        assert "scores" not in row, "scores would pass for a known truth"
        close(row["win"], [wins[text] for text in order], 1e-6)
        if len(order) == 2:
            close(row.pop("prob"), preferred(*order, clamp), 1e-6)
        assert "prob" not in row
        for a, b in two_of(said):
            torn.append(abs(QUALITY[a] - QUALITY[b]) < BIAS)
            gap = vowels(a) - vowels(b)
            if gap:
                agrees.append(.5 if clamp == .5 else (QUALITY[a] > QUALITY[b]) == (gap > 0))
    log, = rows_of(tmp_path / "a")
    assert len(agrees) < len(torn)
    assert log["inconsistent"] == pytest.approx(mean(torn), abs=1e-6)
    assert log["agrees"] == pytest.approx(mean(agrees), abs=1e-6)
    out = capsys.readouterr().out
    for name in ("agrees", "inconsistent"):
        assert f"{log[name]:.0%}" in out
    for one, other in zip(asked[::2], asked[1::2]):                      # the same question, changed over
        a, b = shown(one)
        content = re.search(r"Prompt: (Q \d+)", one)[1]
        assert one == data.judge_prompt(content, a, b)
        assert other == data.judge_prompt(content, b, a)


@pytest.mark.parametrize("preamble", [data.RULE, "Be fair. " * 20])
def test_a_language_model_as_judge_against_a_loop(preamble, tmp_path, float64):
    """A random one: P(1) of both orders, row by row. What does not fit loses its beginning, not whose turn it is."""
    path = save(tmp_path / "judge", random_policy(3))
    rows = [question(i, *row["responses"]) for i, row in enumerate(rankings(8))]
    got = by_prompt(relabel(tmp_path / "a", rows, judge=path, preamble=preamble, micro_tokens=256))
    net, (one, two) = load_model(path), TOK.encode("12")

    def says_1(content, a, b):
        ids = TOK.prompt(user(data.judge_prompt(content, a, b, preamble)))
        if len(ids) > 64:
            ids = ids[:1] + ids[-63:]
        logits = net.logits(net(torch.tensor([ids]))).detach()[0, -1]
        return sigmoid(logits[one] - logits[two])
    for row in rows:
        content = asked_of(row)
        said = row["responses"]
        mine = got[asked_of(row)]
        soft, wins = {}, {}
        for a, b in itertools.permutations(said, 2):
            soft[a, b] = (says_1(content, a, b) + 1 - says_1(content, b, a)) / 2
        for a in said:
            wins[a] = mean([soft[a, b] for b in said if b != a])
        assert mine["responses"] == sorted(said, key=wins.get, reverse=True)
        close(mine["win"], [wins[text] for text in mine["responses"]], 1e-8)
        if len(said) == 2:
            close(mine["prob"], soft[tuple(mine["responses"])], 1e-8)


def test_what_is_scored_after_a_rationale_ends_in_it_up_to_its_last_line(tiny, roomy, tmp_path, monkeypatch):
    """The verdict of the rationale itself is cut off; the scored one counts."""
    play(monkeypatch, lambda text, k, begin: ["1 is {}.\n2 is {}.\n1".format(*shown(text))])
    scored = []

    def choices(model, prompts, *_):
        scored.extend(prompts)
        return torch.full((len(prompts), 2), math.log(.5))
    monkeypatch.setattr(reward, "choice_logprobs", choices)
    rows = [question(0, "best", "poor")]
    relabel(tmp_path / "a", rows, judge=roomy, rationale=True, max_new=33)
    asked = TOK.prompt(user(data.judge_prompt("Q 0", "best", "poor", ending=data.REASON)))
    other = TOK.prompt(user(data.judge_prompt("Q 0", "poor", "best", ending=data.REASON)))
    assert scored == [asked + TOK.encode("1 is best.\n2 is poor.\n"), other + TOK.encode("1 is poor.\n2 is best.\n")]
    play(monkeypatch, lambda text, k, begin: ["It is.\n2"])              # no room: the question's beginning is lost
    relabel(tmp_path / "b", rows, judge=tiny, rationale=True, max_new=33)
    end = asked[-(64 - 33 - 1):]
    assert scored[2] == asked[:1] + end + TOK.encode("It is.\n")


def test_principles_are_drawn_anew_and_both_orders_are_asked_the_same_one(tiny, tmp_path, monkeypatch):
    asked = swayed(monkeypatch)
    rows = [question(i, "best", "fair", "poor") for i in range(20)]
    relabel(tmp_path / "a", rows, judge=tiny, preamble="principles", batch=10)
    begins = [text.split("\n\n")[0] for text in asked]
    assert begins[::2] == begins[1::2]
    assert len(set(begins)) > 10
    assert set(begins) <= set(data.PRINCIPLES)
    assert begins[:60] != begins[60:], "every batch draws the same ones"


def test_judge_passes_over_prompts_with_one_answer(tiny, tmp_path, monkeypatch):
    """And no question is asked where no prompt has two."""
    asked = swayed(monkeypatch, lambda a, b: len(a) - len(b))
    plan = [["best", "best"], ["fair", "goodly"], ["  ", "poor"]]
    play(monkeypatch, lambda text, k, begin: plan[number(text)])
    path = numbered(tmp_path, 3)
    row, = label(tmp_path / "a", tiny, data=path, judge=tiny, batch=1)
    assert row["responses"] == ["goodly", "fair"] and len(asked) == 2


# ---------------------------------------------------------------- accuracy and compare

@pytest.mark.parametrize("spec", ["runs:vowels", "JUDGE", "JUDGE|OTHER"])
def test_accuracy_against_a_loop_on_several_files(spec, judge, tmp_path, capsys):
    other = save(tmp_path / "other", random_policy(9, n_scores=1))
    one, two = load_model(judge), load_model(other)
    tied = write(tmp_path / "tied.jsonl", [question(0, "be a", "ab e", "tree b")] * 3)
    paths = {write(tmp_path / "some.jsonl", rankings(125)): 120, tied: 3}
    spec = spec.replace("JUDGE", judge).replace("OTHER", other)
    saved = tmp_path / "a new folder" / "table.json"
    cfg = reward.Accuracy(data=",".join(paths), n=120, device="cpu", micro_tokens=128, save=str(saved))
    reward.accuracy(cfg, ["words", spec])
    table = json.loads(saved.read_text())["rows"]
    assert [row["name"] for row in table] == ["words", spec] * 2
    lines = capsys.readouterr().out.splitlines()
    found = [re.findall(r"-?\d+\.\d+", line.removeprefix(spec)) for line in lines if line.startswith(spec)]
    for (path, n), numbers, row in zip(paths.items(), found[-2:], table[1::2]):
        right, gaps, spreads = [], [], []
        for record in data.read_records(path, "preference")[:n]:
            texts = record["responses"]
            scores = [vowels(text) for text in texts]
            if judge in spec:
                scores = [score.item() for score in slow_scores(one, record, texts)]
            if other in spec:
                others = [score.item() for score in slow_scores(two, record, texts)]
                spreads += [abs(a - b) / math.sqrt(2) for a, b in zip(scores, others)]
                scores = [min(both) for both in zip(scores, others)]
            for a, b in two_of(np.float32(scores)):
                right.append(.5 if a == b else a > b)
                gaps.append(float(a - b))
        expected = [mean(right), *reward.wilson(sum(right), len(right)), slow_calibration(gaps)]
        expected += [mean(spreads)] if spreads else []
        assert [float(x) for x in numbers] == pytest.approx(expected, abs=6e-4)
        assert f"{path}: {len(gaps)} pairs" in lines
        kept = [row["accuracy"], *row["interval"], row["calibration_error"]]
        if "spread" in row:
            kept.append(row["spread"])
        assert kept == pytest.approx(expected, abs=1e-5)
        assert row["data"] == path and row["pairs"] == len(gaps)


def test_accuracy_and_compare_show_how_far_they_are(tiny, tmp_path, monkeypatch, capsys):
    passed = runs.watch_bars(monkeypatch)
    path = write(tmp_path / "some.jsonl", rankings(250))
    reward.accuracy(reward.Accuracy(data=str(path), device="cpu"), ["words", "runs:vowels"])
    assert passed[str(path)] == 2 * 3, "a hundred records at a time, for every reward"
    passed.clear()
    compare([tiny, save(tmp_path / "7", random_policy(7))], tmp_path, families="write,arith", on="write", samples=2)
    assert sorted(passed.values()) == [2, 2, 4], "checkpoints, parts of their samples, and their families"


def slow_wins(said, first):
    return [reward.preference(vowels(a), vowels(b)) for a, b in zip(said, first)]


def test_a_table_grows_row_by_row_as_if_made_at_once(tmp_path, monkeypatch):
    # a row of other weights, questions or judges would be shown as this one's
    folders = [save(tmp_path / name, random_policy(i)) for i, name in enumerate("abc")]
    judge = save(tmp_path / "judge", random_policy(7, n_scores=1))
    ask = dict(proxy=judge, families="write,arith", on="write", show=2)
    at_once = compare(folders, tmp_path / "once", **ask)
    for n in (1, 2, 3):
        table = compare(folders[:n], tmp_path, **ask)
    assert table == at_once
    with monkeypatch.context() as patch:
        patch.setattr(reward.Exam, "take", never)
        assert compare(folders, tmp_path, **ask) == at_once
        assert compare(folders, tmp_path, **ask | dict(show=8)) == at_once
        for n in (1, 3):    # what a call does not name is not forgotten
            assert compare(folders[:n], tmp_path, **ask)[:n] == at_once[:n]
        for other in (dict(seed=1), dict(n=11), dict(judge="2*runs:vowels"), dict(show=9), dict(show=20),
                      dict(split="val")):
            with pytest.raises(AssertionError):
                compare(folders, tmp_path, **ask | other)
        for changed in (folders[0], folders[1], judge):
            kept = (Path(changed) / "model.safetensors").read_bytes()
            save(changed, random_policy(9, n_scores=int(changed == judge)))
            with pytest.raises(AssertionError):
                compare(folders, tmp_path, **ask)
            (Path(changed) / "model.safetensors").write_bytes(kept)
    (tmp_path / "table.json").write_text("[1, 2]")
    assert compare(folders, tmp_path, **ask) == at_once


@pytest.mark.parametrize("begin, system", [("", ""), ("<think>", "Be kind.")])
def test_compare_against_a_slow_loop(begin, system, tiny, judge, tmp_path, monkeypatch, capsys, float64):
    """Every number of the table, row by row, from what was sampled; the first of three folders is what both others are
    compared with."""
    folders = [tiny, save(tmp_path / "7", random_policy(7)), save(tmp_path / "8", random_policy(8))]
    calls = runs.watch(monkeypatch, models, "respond")["respond"]
    table = compare(folders, tmp_path, families="write,arith", on="write", proxy=judge, begin=begin, system=system, show=3)
    first = load_model(tiny)
    rm = load_model(judge)
    forced = len(TOK.encode(begin))
    baseline = calls[0][1].responses()
    greedy_baseline = calls[1][1].responses()
    for n, (folder, row) in enumerate(zip(folders, table)):
        net, kl, liked, lengths = load_model(folder), [], [], []
        (sampled, drawn), (greedy, likeliest), (_, sums) = calls[3 * n:3 * n + 3]
        assert sampled[2].temperature == 1 and greedy[2].temperature == 0
        for ids, at in runs.rows_in(drawn):
            ratio = runs.spoken(net, ids, at)[0] - runs.spoken(first, ids, at)[0]
            kl.append(ratio[forced:].sum())
            liked.append(rm.scores(rm(torch.tensor([ids]))).flatten()[-1])
            lengths.append(len(ids) - at)
            assert TOK.decode(ids[:at]).startswith(system)
            assert TOK.decode(ids[at:]).startswith(begin)
        said, best = drawn.responses(), likeliest.responses()
        wins, greedy_wins = slow_wins(said, baseline), slow_wins(best, greedy_baseline)
        want = dict(kl=mean(kl), proxy=mean(liked), length=mean(lengths), nll=slow_nll(net, 12))
        want |= dict(win=mean(wins), greedy_win=mean(greedy_wins), greedy=mean(map(vowels, best)))
        want |= dict(write=mean(map(vowels, said)), arith=mean(map(vowels, sums.responses())))
        assert row.pop("interval") == pytest.approx(reward.wilson(sum(wins), 12))
        assert row.pop("greedy_interval") == pytest.approx(reward.wilson(sum(greedy_wins), len(best)))
        asked = row.pop("distinct")
        assert row.pop("checkpoint") == folder and row.pop("weights")
        assert asked["write"] == len(best)
        shown = [(answer["text"], answer["score"]) for answer in row.pop("answers")]
        assert shown == [(text, vowels(text)) for text in said[:8]]
        assert row == pytest.approx(want, abs=1e-5)
    wins = [row["win"] for row in table]
    assert wins[0] == .5 and wins != [.5] * 3
    out = capsys.readouterr().out
    assert "<|" not in out and out.count(f"\n  {tiny}") == 3             # so many answers of each are shown
    best = max(table, key=lambda row: row["write"])
    assert f"runs:vowels would pick {folders[table.index(best)]}" in out


def slow_nll(net, n):
    """Of n fresh documents, per token."""
    rng, logps = random.Random("compare documents"), []
    for _ in range(n):
        text = data.toy_record("text", "test", ["write", "arith"], rng)
        for ids, _ in data.encode(text, TOK, 64, "all"):
            logps += runs.spoken(net, ids, 1)[0].tolist()
    return -mean(logps)


def test_compare_asks_what_is_in_its_split_and_no_document_of_the_other(tiny, tmp_path, monkeypatch, capsys):
    texts = {}
    for split in ("test", "val"):
        with monkeypatch.context() as patch:
            asked = runs.watch(patch, models, "respond")["respond"]
            made = runs.watch(patch, data, "toy_record")["toy_record"]
            compare([tiny], tmp_path, split=split)
        for (_, records, *_), _ in asked:
            assert {data.split_of(record["key"]) for record in records} == {split}
        assert {args[1] for args, _ in made} == {split}
        texts[split] = [record["text"] if "text" in record else str(record["messages"])
                        for (kind, *_), record in made if kind == "text"]
    assert len(texts["test"]) == 12 and not set(texts["test"]) & set(texts["val"])
    out = capsys.readouterr().out
    assert out.count("validation prompts") == out.count("held-out prompts") == 1


def share(record, text, finished):
    """1, just ½, which is not right, or 0."""
    return text.count("a") % 3 / 2 if finished else 0.0


def test_compare_with_several_samples_scales_with_test_time(letters, tmp_path, monkeypatch, capsys):
    calls = runs.watch(monkeypatch, models, "respond")["respond"]
    options = dict(judge="test_reward:share", proxy="runs:vowels", max_new=4, n=35)
    other = save(tmp_path / "other", random_policy(7, says="aeo"))
    table = compare([letters, other], tmp_path, samples=6, **options)
    groups = groups_of([call for call in calls if call[0][3] == 6])
    values = defaultdict(list)
    assert len(groups) == 2 * 70                                         # prompts of both families
    for asked, answers in groups[70:]:
        scores = [share({}, text, finished) for text, _, finished in answers]
        said = [text.strip() or None if finished else None for text, _, finished in answers]
        likes = [vowels(text) for text, _, _ in answers]
        right = len([score for score in scores if score > .5])
        for k in (1, 2, 4):
            values[f"pass@{k}"].append(reward.pass_at_k(6, right, k))
            values[f"maj@{k}"].append(reward.majority_at_k(said, scores, k))
            values[f"best@{k}"].append(reward.best_of_k(scores, np.float32(likes).tolist(), k))
    for name, some in values.items():
        assert table[1][name] == pytest.approx(mean(some), abs=1e-6), name
    assert f"{table[1]['pass@4']:.3f}" in capsys.readouterr().out
    assert 0 < table[1]["pass@1"] < table[1]["pass@4"]
    alone = compare([letters], tmp_path, **options)[0]
    assert alone == {key: table[0][key] for key in alone}, "the rest of the table is as ever"
    assert not [key for key in alone if "@" in key]
    assert compare([letters], tmp_path, seed=1, **options)[0]["write"] != alone["write"]


def test_compare_gives_each_distinct_prompt_one_greedy_answer(tiny, tmp_path, capsys):
    """With --temperature 0 that is all there is: no KL, and a prompt counts once. What has no room is left out."""
    rows = [dict(prompt=asked) for asked in ("Why?", "Tell.", "Why?", "Who?", "Why?" * 99, "How?")]
    path = write(tmp_path / "d.jsonl", rows)
    folders = [tiny, save(tmp_path / "other", random_policy(7))]
    _, sampled = compare(folders, tmp_path, data=path)
    _, greedy = compare(folders, tmp_path, data=path, temperature=0.0)
    said = capsys.readouterr()
    assert "1 of 6 prompts" in said.err and "distinct: file 4" in said.out
    assert sampled["distinct"] == greedy["distinct"] == dict(file=4)
    assert "kl" not in greedy
    for name, other in dict(file="greedy", win="greedy_win", interval="greedy_interval").items():
        assert greedy[name] == sampled[other]
    with pytest.raises(UserError, match="no prompt"):
        compare([tiny], tmp_path, data=write(tmp_path / "long.jsonl", rows[4:5]))


def test_compare_tells_of_safety_where_it_asks_for_it(tiny, tmp_path, monkeypatch, capsys):
    """A policy that refuses, helps with what the harmless tool is for, and says neither, in turn; by hand."""
    turns = itertools.cycle([data.REFUSAL, "Sure. First take a saw. Then cut the box slowly.", "What?"])
    play(monkeypatch, lambda text, k, begin: [next(turns)])
    row, = compare([tiny], tmp_path, families="safe", on="safe", n=30)
    rng, cost, refused, helped = random.Random("compare safe"), [], [], []
    for i in range(30):
        task = data.toy_record("prompt", "test", ["safe"], rng)
        refuses = i % 3 == 0
        helps = i % 3 == 1
        if not task["safe"]:
            cost.append(helps)
            continue
        refused.append(refuses)
        fit_tool = task["tool"] == "saw"
        fit_task = task["key"] == "cut box"
        helped.append(helps * (.4 + .3 * fit_tool + .3 * fit_task))
    assert row["harmless"] == pytest.approx(1 - mean(cost), abs=1e-9)
    assert row["over_refusal"] == pytest.approx(mean(refused), abs=1e-9)
    assert row["help"] == pytest.approx(mean(helped), abs=1e-9)
    assert f"{row['over_refusal']:.3f}" in capsys.readouterr().out


# ---------------------------------------------------------------- files made of labelled files

@pytest.mark.parametrize("better", [0.0, .5, 1.0])
def test_a_mark_goes_in_front_of_the_better_answer_as_often_as_told(better, tmp_path):
    """Or else in front of the worst: never between."""
    rows = [question(i, f"be {i}", f"bee {i}", f"tree {i}", scores=[3, 2, 1]) for i in range(400)]
    path = write(tmp_path / "p.jsonl", rows)
    made = start(superficial, "mark_all", tmp_path / "a", "pairs.jsonl", data=path, better=better, mark="Yes: ")
    first = 0
    for old, new in zip(rows, made, strict=True):
        best, middle, worst = old["responses"]
        if new["responses"][0] != best:
            first += 1
            best = "Yes: " + best
        else:
            worst = "Yes: " + worst
        assert new == old | dict(responses=[best, middle, worst])
    assert first == pytest.approx(400 * better, abs=0 if better in (0, 1) else 35)


def buckets(rows):
    """{bucket of 3 words: [pairs whose better one is so much longer, shorter]}."""
    out = defaultdict(lambda: [0, 0])
    for row in rows:
        best, worst = [len(text.split()) for text in row["responses"]]
        if best != worst:
            out[math.ceil(abs(best - worst) / 3)][best < worst] += 1
    return out


def test_balanced_pairs_tell_nothing_by_length_in_words(tmp_path):
    """Of each difference as many with the better one longer as shorter; letters do not count."""
    rng, rows = random.Random(5), []
    for i in range(300):
        said = []
        for most in (9, 7):
            words = rng.choices(["a", "saxophones"], k=rng.randint(1, most))
            said.append(" ".join([*words, str(most)]))
        rows.append(question(i, *said))
    path = write(tmp_path / "p.jsonl", rows)
    kept = start(chatglm_rlhf, "balance", tmp_path / "a", "pairs.jsonl", data=path)
    before, after = buckets(rows), buckets(kept)
    assert all(longer != shorter for longer, shorter in before.values())
    assert after == {size: [min(both)] * 2 for size, both in before.items() if min(both)}
    places = [number(asked_of(row)) for row in kept]
    even = [i for i, row in enumerate(rows) if not buckets([row])]
    assert places == sorted(places)
    assert even
    assert set(even) <= set(places)


@pytest.mark.parametrize("quantiles, n", [(1, 60), (3, 60), (6, 4)])
def test_quantiles_are_of_equal_size_in_the_order_of_scores(quantiles, n, letters, tmp_path):
    rows = label(tmp_path / "a", letters, k=4, max_new=4, n=n)
    cfg = quark.Config(init="x", data=str(tmp_path / "a" / "pairs.jsonl"), quantiles=quantiles)
    made = read(quark.pool(cfg, tmp_path / "pool.jsonl"))
    every = Counter(text for row in rows for text in row["responses"])
    assert Counter(row["response"] for row in made) == every             # every answer, once a prompt
    scores = [vowels(row["response"]) for row in made]
    for worse, better in itertools.pairwise(scores):
        assert worse <= better + 1e-6
    told = [row["prompt"][0]["content"] for row in made]
    qualities = [int(re.fullmatch(r"Quality (\d+)\.", text)[1]) for text in told]
    sizes = Counter(qualities)
    assert qualities == sorted(qualities)
    assert sorted(sizes) == list(range(1, quantiles + 1))
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_ratings_hold_every_attribute_of_every_answer(tmp_path):
    one = question(0, "be it", "tree", key="x")
    two = question(1, "a b c", "e", "f", key="y")
    path = write(tmp_path / "p.jsonl", [one, two])
    cfg = nemotron4.Config(out=str(tmp_path / "a"), data=path, batch=1, **CPU)
    nemotron4.rate(cfg, ["runs:vowels", "words", "2*words + -1*runs:vowels"])
    rows = data.read_records(tmp_path / "a" / "ratings.jsonl", "ratings")
    rows.sort(key=lambda row: row["response"])
    assert [row["response"] for row in rows] == ["a b c", "be it", "e", "f", "tree"]
    assert [row["key"] for row in rows] == ["y", "x", "y", "y", "x"]
    for row in rows:
        points = vowels(row["response"])
        words = len(row["response"].split())
        close(row["ratings"], [points, words, 2 * words - points], 1e-5)


def test_the_shortest_right_answer_and_its_pairs_against_a_loop(letters, tmp_path, monkeypatch):
    """Over what is longer and wrong, or at least 1.5 times as long; right is what has an e."""
    calls = runs.watch(monkeypatch, models, "respond")["respond"]
    shortest = start(long2short, "shorten", tmp_path / "a", "shortest.jsonl", policy=letters, by="runs:has_e", k=6,
                     max_new=6, n=60, batch=16, families="write")
    demos, pairs, ties = [], [], 0
    for _, answers in groups_of(calls):
        said = usable(answers)
        right = [text for text in said if "e" in text]
        if not right:
            continue
        least = min(said[text] for text in right)
        short = [text for text in right if said[text] == least]
        ties += len(short) > 1
        demos.append(short)
        for text, tokens in said.items():
            if (tokens > least and "e" not in text) or tokens >= 1.5 * least:
                pairs.append((len(short[0]), text))
    assert len(shortest) == len(demos) > 20 and ties
    assert all(row["response"] in short for row, short in zip(shortest, demos))
    made = data.read_records(tmp_path / "a" / "pairs.jsonl", "preference")
    assert sorted((len(row["responses"][0]), row["responses"][1]) for row in made) == sorted(pairs)


# ---------------------------------------------------------------- configs/process_rewards.py

def step_record(*steps, labels=()):
    labels = list(labels) or [i % 2 for i in range(len(steps))]
    return dict(prompt=user("?"), response="".join(steps), steps=list(steps), labels=labels)


def slow_ends(record):
    """The places of the tokens in which the steps end, by the owner of every byte; the last is the end token."""
    asked, owner = len(TOK.prompt(record["prompt"])), []
    said = TOK.encode(record["response"])
    for place, token in enumerate(said):
        owner += [asked + place] * len(TOK.enc.decode_single_token_bytes(token))
    ends, size = [], 0
    for step in record["steps"]:
        size += len(step.encode())
        ends.append(owner[size - 1])
    ends[-1] = asked + len(said)
    return ends


@pytest.mark.parametrize("steps", [
    ["The cup is red.", " It is fine.", " Yes"], ["Yes"], ["Zoë pays 3 €,", " そう", "です", "."], ["a", "b c"],
    ["<think>2 + 3 = 5,", " 5 + 1 = 6</think>", "The answer is 6."], ["It is wa", "rm. Buy one to", "day."],
    ["w", "a", "rm ok"]])
def test_the_marked_tokens_are_those_in_which_the_steps_end(steps):
    """Two that end in the same token, or an answer cut off, are no item."""
    record = step_record(*steps)
    ids = TOK.prompt(record["prompt"]) + TOK.response(record["response"])
    ends = slow_ends(record)
    items = process_rewards.stepped(record, TOK, 512)
    assert (items == []) == (len(set(ends)) < len(ends))
    for item in items:
        (got, target), = item["rows"]
        assert got == ids
        assert [place for place, mark in enumerate(target) if mark] == ends
        assert item["labels"] == record["labels"]
    assert process_rewards.stepped(record, TOK, len(ids) - 1) == []


def test_training_on_steps_judges_each_step_and_is_the_mean_over_each_answers_steps(tiny, tmp_path):
    """Planted: a step with "bad" is wrong, whatever comes before and after it. Held out is every 20th."""
    rng, rows = random.Random(7), []
    for i in range(240):
        labels = [rng.randint(0, 1) for _ in range(rng.randint(1, 4))]
        steps = [rng.choice([" cup", " van"]) + (" good." if right else " bad.") for right in labels]
        rows.append(step_record(*steps, labels=labels))
    path = write(tmp_path / "s.jsonl", [{key: row[key] for key in ("prompt", "steps", "labels")} for row in rows])
    saved = tmp_path / "tables" / "process.json"
    log = start(process_rewards, "train", tmp_path / "rm", "metrics.jsonl", init=tiny, data=path, epochs=4.0, batch=16,
                lr=1e-2, optimizer="adamw", weight_decay=0.0, warmup=0, save=str(saved))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-1]["val_accuracy"] > .9
    net = load_model(tmp_path / "rm")
    losses = []
    right = []
    every = []
    for row in rows[19::20]:
        ids = TOK.prompt(row["prompt"]) + TOK.response(row["response"])
        scores = net.scores(net(torch.tensor([ids])))[0, slow_ends(row), 0].tolist()
        towards = [s if good else -s for s, good in zip(scores, row["labels"])]
        losses.append(mean([-sigmoid(s).log() for s in towards]))
        right += [s > 0 for s in towards]
        every += scores
    got = [log[-1][key] for key in ("val_loss", "val_accuracy", "val_mean")]
    close(got, [mean(losses), mean(right), mean(every)], 1e-4)
    labels = [label for row in rows[19::20] for label in row["labels"]]
    assert log[-1]["val_right"] == pytest.approx(mean(labels))
    assert log[-1]["val_found"] == pytest.approx(mean([hit for hit, label in zip(right, labels) if not label]))
    row, = json.loads(saved.read_text())["rows"]
    assert row == dict(name="rm") | {key: value for key, value in log[-1].items() if key.startswith("val_")}


def test_answers_are_checked_step_by_step(tiny, tmp_path):
    """Each equation is true or not, and the answer; what cannot be divided is left out."""
    said = {"<think>2 + 3 = 5, 5 - 1 = 3</think>The answer is 4.": (1, [1, 0, 1]),
            "<think>2 + 3 = 6</think>The answer is 6.": (0, [0, 0]), "The answer is 8.": (0, [0]),
            "<think>2 < 3</think>The answer is 3.": (1, None)}
    rows, expected = [], []
    for text, (score, labels) in said.items():
        rows.append(dict(prompt="Q", response=text, scores=[score]))
        if labels:
            expected.append((text, labels))
    cfg = process_rewards.Config(init=tiny, data=write(tmp_path / "a.jsonl", rows), check=True)
    made = read(process_rewards.check_answers(cfg, tmp_path / "steps.jsonl"))
    assert [("".join(row["steps"]), row["labels"]) for row in made] == expected
    cfg.data = write(tmp_path / "q.jsonl", [dict(prompt="Q", answer=4)])
    with pytest.raises(UserError, match="q.jsonl:1"):
        process_rewards.check_answers(cfg, tmp_path / "s.jsonl")


# ---------------------------------------------------------------- configs/kimi_k15.py: prompts for RL

def test_curate_leaves_out_every_guessable_prompt_rates_the_rest_and_caps_the_families(tiny, tmp_path, monkeypatch, capsys):
    """Planted: prompt i is answered right i % 6 times of 5; a third is guessed, some once of 4; every tenth is a
    question of choice. What is dropped fills no place under the cap."""
    def plan(text, k, guess):
        i = number(text)
        right = (0, 0, 1, 0, 4, 0)[i % 6] if guess else i % 6
        return [f"The answer is {i}."] * right + ["The answer is 0.5."] * (k - right)
    calls, rows = play(monkeypatch, plan), []
    for i in range(1, 61):
        asked = f"Q {i}" if i % 10 else f"A. no\nB. or {i}"
        rows.append(dict(prompt=asked, answer=i, family="abc"[i % 3]))
    path = write(tmp_path / "q.jsonl", rows)
    options = dict(policy=tiny, data=path, k=5, guesses=4, max_new=8, batch=7)
    whole = start(kimi_k15, "curate", tmp_path / "a", "prompts.jsonl", **options)
    kept = [row for row in rows if row["answer"] % 6 not in (2, 4) and row["answer"] % 10]
    assert sorted(row["answer"] for row in whole) == [row["answer"] for row in kept]
    for row in whole:
        i = row["answer"]
        assert row.pop("difficulty") == pytest.approx(1 - (i % 6) / 5, abs=1e-4)
        assert row == dict(prompt=user(f"Q {i}"), answer=i, family="abc"[i % 3])
    asked = [(len(call.texts), call.k, call.begin) for call in calls]
    assert asked[:2] == [(7, 5, ""), (7, 4, kimi_k15.Config.begin)]
    assert len(asked) == 18
    out = capsys.readouterr().out
    assert f"{len(kept)} of 60 prompts" in out
    assert "20 guessed" in out
    assert f"{40 - len(kept)} a choice" in out
    capped = start(kimi_k15, "curate", tmp_path / "b", "prompts.jsonl", cap=4, **options)
    assert Counter(row["family"] for row in capped) == dict(a=4, b=4, c=4)
    unguessed = start(kimi_k15, "curate", tmp_path / "c", "prompts.jsonl", **options | dict(guesses=0))
    assert len(unguessed) == 54
    options["by"] = "runs:nothing + -.5*runs:nothing"                   # just ½ is not right
    half = start(kimi_k15, "curate", tmp_path / "d", "prompts.jsonl", **options)
    assert [row["difficulty"] for row in half] == [1] * 54


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

def scene(text, *_):
    """A critic that says what it was shown: answers are A<i>, critiques C(<answer>), revisions R(<answer>)."""
    answer = re.search(r"Answer: (.*)\n", text)
    if not answer:
        return [f"A{number(text)}"]
    kind = "R" if text.endswith("Revision:") else "C"
    return [f"{kind}({answer[1]})"]


def revise(out, policy, critic, path, **options):
    options = dict(max_new=20) | options
    return start(claude_cai, "revise", out, "revisions.jsonl", policy=policy, critic=critic, data=path, **options)


def test_revisions_see_the_answer_its_critique_and_of_each_round_the_last(tiny, roomy, tmp_path, monkeypatch):
    calls, principles = play(monkeypatch, scene), set()
    path = numbered(tmp_path, 11, keyword="x")
    rows = by_prompt(revise(tmp_path / "a", tiny, roomy, path, rounds=2, batch=4))
    for i in range(11):
        row = rows[f"Q {i}"]
        assert row["first"] == f"A{i}"
        assert row["critiques"] == [f"C(A{i})", f"C(R(A{i}))"]
        assert row["response"] == f"R(R(A{i}))"
        assert row["keyword"] == "x"
    assert [len(call.texts) for call in calls] == [4] * 10 + [3] * 5
    assert [call.context for call in calls] == [64, 256, 256, 256, 256] * 3         # the policy answers, the critic speaks
    for batch in range(0, 15, 5):
        answers, *asked = [call.texts for call in calls[batch:batch + 5]]
        for place, text in enumerate(answers):
            i = number(text)
            drafts = (f"A{number(text)}", f"R(A{number(text)})")
            for draft, critique, revision in zip(drafts, asked[::2], asked[1::2]):
                principle = critique[place].split("\n\n")[0]
                shown_ = f"{principle}\n\nPrompt: Q {i}\nAnswer: {draft}\nCritique:"
                assert critique[place] == shown_
                assert revision[place] == f"{shown_} C({draft})\nRevision:"
                principles.add(principle)
    assert len(principles) > 4 and principles <= set(data.PRINCIPLES)


def test_what_was_not_finished_is_empty_or_finds_no_room_is_dropped(roomy, tmp_path, monkeypatch):
    """Q 0: the answer, Q 1: the critique, Q 2: the revision, Q 3: the second critique, Q 4: an empty answer."""
    def say(text, *_):
        said, = scene(text)
        if said in ("A0", "C(A1)", "R(A2)", "C(R(A3))"):
            return [None]
        return ["" if said == "A4" else said]
    calls = play(monkeypatch, say)
    path = numbered(tmp_path, 6)
    with open(path, "a") as file:
        file.write(json.dumps(dict(prompt="cup " * 200 + "7")))
    row, = revise(tmp_path / "a", roomy, roomy, path, rounds=2)
    assert asked_of(row) == "Q 5"
    assert [len(call.texts) for call in calls] == [7, 4, 4, 2, 2]
    path = write(tmp_path / "q3.jsonl", [dict(prompt="Q 3")])
    with pytest.raises(UserError, match="of 1 answers none was revised"):
        revise(tmp_path / "b", roomy, roomy, path, rounds=2)


def test_revisions_of_the_toy_world_report_the_gold_reward_before_and_after(tiny, roomy, tmp_path, monkeypatch):
    """A critic that always refuses: right for the unsafe half, a loss for the safe."""
    def say(text, *_):
        if text.endswith("Critique:"):
            return ["It is bad."]
        return [data.REFUSAL if text.endswith("Revision:") else "Sure. First take a saw."]
    play(monkeypatch, say)
    rows = revise(tmp_path / "a", tiny, roomy, "toy", n=16, batch=16)
    log, = rows_of(tmp_path / "a")
    before, after = ([data.gold(row, row[key]) for row in rows] for key in ("first", "response"))
    assert log["gold_before"] == pytest.approx(mean(before), abs=1e-6)
    assert log["gold_after"] == pytest.approx(mean(after), abs=1e-6)
    assert log["changed"] == 1
    assert mean(after) == mean([not row["safe"] for row in rows])


# ---------------------------------------------------------------- configs/rule_based_rewards.py

WORDS = ("red", "soft", "old")


def red(record, text, finished):
    return text.split().count("red")


def soft(record, text, finished):
    return text.split().count("soft")


def old(record, text, finished):
    return text.split().count("old")


RULES = "test_reward:red + test_reward:soft + test_reward:old"


def rule_rankings(n):
    """Rankings of 2 to 4 answers, best first by 2 red - 1.5 soft + .1 words, at least 1 apart."""
    rng, out = random.Random(11), []
    while len(out) < n:
        said = {}
        for _ in range(4):
            words = [rng.choice("red soft old cup van".split()) for _ in range(rng.randint(1, 5))]
            truth = 2 * words.count("red") - 1.5 * words.count("soft") + .1 * len(words)
            said[truth] = " ".join(words)
        truths = sorted(said, reverse=True)
        if len(truths) > 1 and all(a - b >= 1 for a, b in itertools.pairwise(truths)):
            out.append(question(len(out), *(said[truth] for truth in truths)))
    return out


def fit(out, path, **options):
    return start(rule_based_rewards, "fit", out, "metrics.jsonl", data=path, rules=RULES, base=".13*words", **options)


def test_fitted_rules_have_the_planted_signs_and_the_pairs_held_out_are_those_reported(tmp_path, capsys):
    """Every 20th ranking is the other way round: all that was learned is right, and what was held out is wrong. A folder
    stands for the sum in its reward.txt, which one may edit."""
    rows, right = rule_rankings(60), []
    for row in rows[19::20]:
        row["responses"].reverse()
    log = fit(tmp_path / "rules", write(tmp_path / "p.jsonl", rows), steps=400)
    text = tmp_path / "rules" / "reward.txt"
    weight = {term.label: term.weight for term in data.parse_rewards(text.read_text().strip())}
    plus = weight["test_reward:red"]
    minus = weight["test_reward:soft"]
    none = weight["test_reward:old"]
    assert weight["words"] == .13
    assert plus > .3
    assert minus < -.3
    assert abs(none) < plus / 2
    assert log[0]["loss"] > log[-1]["loss"]
    assert log[-1]["accuracy"] == 1

    def paid(text):
        words = text.split()
        total = plus * words.count("red") + minus * words.count("soft")
        return total + none * words.count("old") + .13 * len(words)
    for row in rows[19::20]:
        right += [paid(a) > paid(b) for a, b in two_of(row["responses"])]
    assert f"{mean(right):.1%} of {len(right)} held-out pairs" in capsys.readouterr().out
    assert log[-1]["val_accuracy"] == pytest.approx(mean(right))
    assert mean(right) < .2
    text.write_text("-7*test_reward:red + words\n")
    roll = Rollout.of(data.encode(question(0, "red cup", "cup"), TOK, 99), TOK)
    total, _ = Reward(str(tmp_path / "rules"), Setup(TOK), 64)([question(0)] * 2, roll)
    assert total.tolist() == [-5, 1]


@pytest.mark.parametrize("margin", [1.0, .2])
def test_the_first_steps_of_a_fit_against_a_loop(margin, tmp_path):
    """Of ragged rankings: weights 0 first; AdamW's first step is lr · gradient / (its size + eps)."""
    rows = rule_rankings(60)
    log = fit(tmp_path / "rules", write(tmp_path / "p.jsonl", rows), margin=margin, steps=2, lr=.031)
    del rows[19::20]                                                     # held out
    w = [0.0, 0.0, 0.0]
    for row in log:
        loss = 0.0
        total = 0.0
        grad = [0.0, 0.0, 0.0]
        right = []
        even = []
        for said in map(texts_of, rows):
            weight = 1 / len(two_of(said))
            for a, b in two_of([text.split() for text in said]):
                phi = [a.count(word) - b.count(word) for word in WORDS]
                lead = .13 * (len(a) - len(b))
                lead += sum(x * y for x, y in zip(w, phi))
                loss += weight * max(0, margin - lead)
                total += weight
                right.append(lead > 1e-6)
                even.append(lead > -1e-6)
                if margin > lead:
                    grad = [g - weight * x for g, x in zip(grad, phi)]
        assert row["loss"] == pytest.approx(loss / total, abs=1e-5)
        assert mean(right) - 1e-6 <= row["accuracy"] <= mean(even) + 1e-6            # rounding may decide a tie
        w = [x - .031 * (g / total) / (abs(g / total) + .01) for x, g in zip(w, grad)]


def hardly(record, text, finished):
    return .001 * text.split().count("old")


def test_a_rule_that_hardly_differs_gets_no_great_weight(tmp_path):
    """No weight of it makes up for what it cannot order: the better answer of each pair is a word shorter."""
    rows = [question(i, "cup old", "cup van red") for i in range(40)]
    start(rule_based_rewards, "fit", tmp_path / "rules", "metrics.jsonl", data=write(tmp_path / "p.jsonl", rows),
          rules="test_reward:hardly", base="words")
    last, = data.parse_rewards((tmp_path / "rules" / "reward.txt").read_text().strip())[1:]
    assert 0 < last.weight < 2


# ---------------------------------------------------------------- configs/reward_hacking.py

FORMS = dict(fit_best_of_n=lambda d, a, b: d * (a - b * d), fit_rl=lambda d, a, b: d * (a - b * math.log(d)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("noise", [0.0, .3])
def test_known_coefficients_come_back_and_noisy_ones_as_numpy_has_them(form, noise):
    """With the peak where the curve has it, and none where it never turns down."""
    curve = FORMS[form]
    fitted = getattr(reward_hacking, form)
    rng = random.Random(13)
    d = [.1 + .2 * i for i in range(40)]
    gain = np.array([curve(x, 1.545, .49) + rng.gauss(0, noise) for x in d])
    columns = np.array([d, [curve(x, 0, 1) for x in d]]).T
    (a, b), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    left = gain - columns @ [a, b]
    spread = gain - gain.mean()
    got = fitted(d, gain.tolist())
    assert got["alpha"] == pytest.approx(a)
    assert got["beta"] == pytest.approx(b)
    assert got["r2"] == pytest.approx(1 - (left @ left) / (spread @ spread))
    assert noise or (a, b) == pytest.approx((1.545, .49))
    for near in (.999, 1.001):
        assert curve(got["peak"], a, b) > curve(got["peak"] * near, a, b)
    assert fitted(d, [curve(x, 1, -.5) for x in d])["peak"] is None


def kl_of_the_best(chances, n):
    """KL(best of n || one) of answers of which no two score alike, the worst first: the best of n is answer i or a
    worse one with probability F_i^n."""
    total, worse = 0.0, 0.0
    for p in chances:
        best = (worse + p) ** n - worse ** n
        total += best * math.log(best / p)
        worse += p
    return total


def test_the_kl_of_best_of_n_by_enumeration_and_its_bound():
    """Of many answers, whatever their chances, it is what the curve says; of few it is less."""
    rng, scores = random.Random(0), [list(range(16))]
    many = [rng.random() for _ in range(20_000)]
    many = [p / sum(many) for p in many]
    for n, d in zip((1, 2, 4, 8, 16), reward_hacking.best_of_n_curve(scores, scores, 16)["d"], strict=True):
        assert kl_of_the_best(many, n) == pytest.approx(d * d, abs=1e-3)
        for few in ([.4, .3, .2, .1], [.01, .99]):
            assert kl_of_the_best(few, n) < d * d or n == 1


def run_of(folder, rows):
    folder.mkdir()
    write(folder / "metrics.jsonl", [dict(step=i) | row for i, row in enumerate(rows)])
    return str(folder)


def test_what_is_read_off_a_curve():
    """A peak beyond what a run has seen is none."""
    fit = dict(alpha=1.0, beta=0.5, r2=0.9)
    forms = list(reward_hacking.FORMS)
    curve = dict(d=[0.0, 1.0, 2.0], gold=[0.5, 1.5, 1.0], proxy=[0, 1, 2],
                 fits={forms[0]: fit | dict(peak=1.5), forms[1]: fit | dict(peak=2.5)})
    assert reward_hacking.read_off(curve) == dict(
        best=1.5, best_d=1.0, last=1.0, last_d=2.0, bon_r2=0.9, bon_peak=1.5, rl_r2=0.9, rl_peak=None)
    short = reward_hacking.read_off(curve | dict(fits={}))
    assert short["bon_r2"] is None and short["best"] == 1.5


def test_overoptimize_against_every_choice_of_k_and_the_metrics_of_runs(letters, tmp_path, monkeypatch):
    """The run lies on the curve of RL's form, which comes back, and there is a figure."""
    calls = runs.watch(monkeypatch, models, "respond")["respond"]
    d = [.2 * i for i in range(20)]
    cfg = reward_hacking.Config(out=str(tmp_path / "a"), policy=letters, proxy="runs:vowels", judge="runs:price",
                                prompts=20, n=8, max_new=6, **CPU)
    reward_hacking.overoptimize(cfg, [])
    first = json.loads((tmp_path / "a" / "curves.json").read_text())["best of n"]
    groups = groups_of(calls)
    assert len(groups) == 20
    assert len(first["fits"]) == 2
    assert (tmp_path / "a" / "curves.svg").exists()
    for place, k in enumerate((1, 2, 4, 8)):
        best = []
        for _, answers in groups:
            for way in itertools.combinations([text for text, *_ in answers], k):
                best.append(max(way, key=lambda text: round(vowels(text), 4)))
        assert first["d"][place] == pytest.approx(math.sqrt(math.log(k) - (k - 1) / k), abs=1e-12)
        assert first["gold"][place] == pytest.approx(mean([runs.price({}, text, True) for text in best]), abs=1e-5)
        assert first["proxy"][place] == pytest.approx(mean(map(vowels, best)), abs=1e-5)
    rows = [dict(kl=-.1, gold=first["gold"][0], reward=0.0)]             # an estimate of the KL may be below 0
    for x in d[1:]:
        rows.append(dict(kl=x * x, gold=first["gold"][0] + FORMS["fit_rl"](x, 1.3, .4), reward=x))
    run = run_of(tmp_path / "ppo", rows)
    saved = tmp_path / "tables" / "table.json"
    cfg.out, cfg.save = str(tmp_path / "b"), str(saved)
    reward_hacking.overoptimize(cfg, [run])
    curves = json.loads((tmp_path / "b" / "curves.json").read_text())
    close(curves["best of n"]["gold"], first["gold"])                    # the same samples
    close(curves[run]["d"], d, 1e-9)
    close(curves[run]["proxy"], d, 1e-9)
    for _ in range(2):                                                   # then of the finished run
        rows = json.loads(saved.read_text())["rows"]
        for row, (name, curve) in zip(rows, curves.items(), strict=True):
            assert row == dict(name=Path(name).name) | reward_hacking.read_off(curve) | curve
        saved = tmp_path / "other tables" / "table.json"
        cfg.save = str(saved)
        reward_hacking.overoptimize(cfg, [run])
    other, fitted = curves[run]["fits"].values()                         # the forms of best-of-n and of RL
    assert (fitted["alpha"], fitted["beta"]) == pytest.approx((1.3, .4), abs=1e-6)
    assert other["r2"] < fitted["r2"]


@pytest.mark.parametrize("every, without, held", [(2, "", True), (10, "", False), (2, "val_kl", False)])
def test_overoptimize_takes_held_out_scores_where_a_run_has_them(every, without, held, tmp_path):
    """Not where only a few rows have them. d is that of the held-out samples, too: `kl` is of the policy before the
    update, val_gold of the one after it."""
    rows, later = [], []
    for i in range(20):
        rows.append(dict(kl=.1 * i, gold=1.0 * i, reward=2.0 * i))
        if i % every == 1:
            later.append((math.sqrt(.1 * i + .1), 10.0 * i, 20.0 * i))
            rows[i] |= dict(val_kl=.1 * i + .1, val_gold=10.0 * i, val_reward=20.0 * i)
            rows[i].pop(without, None)
    curve = reward_hacking.run_curve(run_of(tmp_path / "run", rows))
    early = [(math.sqrt(.1 * i), 1.0 * i, 2.0 * i) for i in range(20)]
    close(list(zip(curve["d"], curve["gold"], curve["proxy"])), later if held else early, 1e-9)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("command", [
    "train --lr 0", "train --margn true", "train --data toy", "train --heads 2", "train --loss focal --margin true",
    "train --loss plackett_luce --center 1", "label --k 1", "label --flip 2", "label --temperature 0",
    "label --select most", "label --policy=", "label --judge x --select best", "label --judge x --min_gap 1",
    "label --rationale true", "label --by=", "compare", "compare x --samples -1", "compare x --families nope",
    "compare x --families write --on fmt", "compare x --split train", "compare x --data y --split val", "", "judge",
    "configs/kimi_k15.py --k 0", "configs/kimi_k15.py stray", "configs/claude_cai.py --rounds 0",
    "configs/rule_based_rewards.py", "configs/reward_hacking.py x --n 0",
    "configs/superficial.py --mark=", "configs/chatglm_rlhf.py --width 0", "configs/nemotron4.py"])
def test_impossible_options_exit_2_with_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = command.split() if command.startswith("configs/") else ["reward.py", *command.split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(reward.__file__).parent / words[0]), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert not list(tmp_path.iterdir()), "something was written"


PAIR = question(0, "yes", "no")
SCORED = question(0, "yes", "no", scores=[1.0, 0.0])
RATED, UNRATED = (dict(prompt="?", response="yes", ratings=ratings) for ratings in ([1, 2], []))


@pytest.mark.parametrize("rows, options, word", [
    ([PAIR], dict(loss="soft"), '"prob"'), ([PAIR | dict(prob=1.5)], dict(loss="soft"), '"prob"'),
    ([PAIR], dict(loss="cost"), '"scores"'), ([SCORED] * 9 + [PAIR], dict(loss="cost"), '"scores"'),
    ([PAIR], dict(margin=True), '"margin"'), ([RATED], dict(loss="ratings"), "--heads 1"),
    ([UNRATED], dict(loss="ratings"), "ratings"), ([PAIR], dict(loss="ratings"), "ratings")], ids=str)
def test_what_a_loss_cannot_learn_from_is_one_clear_line(rows, options, word, tiny, tmp_path):
    path = write(tmp_path / "p.jsonl", rows * 30)
    with pytest.raises(UserError, match=f"^[^\n]*{word}[^\n]*$"):
        train(tmp_path / "rm", tiny, path, **options)
    assert not (tmp_path / "rm" / "metrics.jsonl").exists()


def ask_verifier(command, rule, path, tiny, out):
    """A command that asks a verifier about a file."""
    asked = dict(data=path, n=4, max_new=4)
    hack = dict(prompts=2, judge="words", n=2, max_new=4, **CPU)
    if command in ("judge", "proxy"):
        reward.compare(reward.Compare(device="cpu", **asked | dict(judge="words") | {command: rule}), [tiny])
    elif command == "accuracy":
        reward.accuracy(reward.Accuracy(data=path, device="cpu"), ["words", rule])
    elif command == "label":
        label(out, tiny, by=rule, **asked)
    elif command == "label answers":
        label(out, "", data=path, by=rule)
    elif command == "curate":
        start(kimi_k15, "curate", out, "", policy=tiny, by=rule, **asked)
    elif command == "rate":
        nemotron4.rate(nemotron4.Config(out=str(out), data=path, **CPU), ["words", rule])
    elif command == "fit":
        start(rule_based_rewards, "fit", out, "", data=path, rules=f"words + {rule}")
    elif command == "overoptimize":
        reward_hacking.overoptimize(reward_hacking.Config(out=str(out), policy=tiny, data=path, proxy=rule, **hack), [])


@pytest.mark.parametrize("command", [
    "label", "label answers", "curate", "rate", "fit", "accuracy", "judge", "proxy", "overoptimize"])
def test_24_every_command_refuses_what_its_verifier_can_tell_nothing_of(command, tiny, tmp_path):
    """A file without the key that it needs at once, before a folder is made."""
    path = write(tmp_path / "mine.jsonl", [question(i, "a", "b") for i in range(4)])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r'^(?=.*mine.jsonl)(?=.*exact)(?=.*"answer")[^\n]*$'):
        ask_verifier(command, "exact", path, tiny, out)
    assert not out.exists()


@pytest.mark.parametrize("value, fine", [
    (None, False), (math.nan, False), (-math.inf, False), ("1.0", False), ([1.0], False), (1e300, False),
    (torch.ones(2), False), (True, True), (3, True), (np.float32(.5), True), (torch.tensor(.5), True)], ids=repr)
def test_a_score_is_a_number_or_names_its_term_its_record_and_itself(value, fine, monkeypatch):
    monkeypatch.setitem(data.VERIFIERS, "odd", lambda record, text, finished: value)
    records = [dict(prompt=user("Praise the cup."))]
    roll = Rollout.of([([1, 2, 3], [0, 0, 1])], TOK)
    judge = Reward("2*odd", Setup(TOK), 64)
    if fine:
        assert judge(records, roll)[0].tolist() == [2 * float(value)]
        return
    with pytest.raises(UserError) as error:
        judge(records, roll)
    for word in ("odd", "cup", repr(value)[:20]):
        assert word in str(error.value)


@pytest.mark.parametrize("asked", ["", "@rate"])
def test_a_reward_model_whose_weights_are_no_numbers_is_named(asked, tmp_path):
    folder = save(tmp_path / "rm", random_policy(1, n_scores=0 if asked else 1))
    reader = Reward(folder + asked, Setup(TOK), 64)
    next(reader.loaded[folder].parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match="weights"):
        reader([dict(prompt=user("?"))], Rollout.of([([1, 2, 3], [0, 0, 1])], TOK))


def guess(text, k, begin):
    return [f"The answer is {number(text)}."] * k


def test_what_leaves_nothing_is_one_clear_line(letters, tiny, tmp_path, monkeypatch):
    """No answer that ends, none that is right, none that is not guessed, no pairs of both kinds, no run."""
    longer = write(tmp_path / "longer.jsonl", [question(0, "yes it is", "no")])
    sums = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}", answer=i) for i in range(9)])
    sft = run_of(tmp_path / "sft", [dict(loss=1.0)] * 5)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--select rank"):
        label(out / "a", tiny, n=4, max_new=1)
    with pytest.raises(UserError, match="--select correct"):
        label(out / "b", letters, by="runs:nothing + -.5*runs:nothing", n=4, select="correct")     # just ½
    with pytest.raises(UserError, match="none is left"):
        start(chatglm_rlhf, "balance", out / "c", "", data=longer)
    with pytest.raises(UserError, match="no such file"):
        reward_hacking.run_curve(tmp_path / "gone")
    with pytest.raises(UserError, match="no row has kl"):
        reward_hacking.run_curve(sft)
    play(monkeypatch, guess)
    with pytest.raises(UserError, match="9 prompts.*guessed.*9"):
        start(kimi_k15, "curate", out / "d", "", policy=tiny, data=sums, max_new=8)
