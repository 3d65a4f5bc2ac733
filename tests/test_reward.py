"""reward.py: the Bradley-Terry loss and the statistics against loops and closed forms; label -> train -> compare."""
import collections
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

import claude_cai
import data
import kimi_k15
import model as models
import reward
import reward_hacking
import rule_based_rewards
from data import Tokenizer, encode
from model import Reward, Rollout, Setup, generate, load_model, response_scores, save_checkpoint
from policies import patch, random_policy

TOK = Tokenizer.load("toy")
CPU = dict(device="cpu", dtype="fp32")
QUICK = CPU | dict(warmup=0, save_every=1000, eval_every=1000)


def checkpoint(folder, seed=0, **options):
    """A random model that ends about one response in three early and never samples padding; says="ae": nothing but
    these letters."""
    net = random_policy(seed, **options)
    save_checkpoint(folder, dict(model=net), {}, dict(step=0, done=True, state={}, tokenizer=TOK.fingerprint))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("judge"), 1, n_scores=1)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """With room for a question about answers."""
    return checkpoint(tmp_path_factory.mktemp("roomy"), 5, block_size=256)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def vowels(monkeypatch):
    monkeypatch.setitem(data.VERIFIERS, "vowels", lambda record, text, finished: len(text) / 10 - text.count("e"))


def user(text):
    return [dict(role="user", content=text)]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def train(out, init, data, **options):
    """The real train(); its rows of metrics.jsonl."""
    reward.train(reward.Train(out=str(out), init=init, data=str(data), **(QUICK | options)))
    return read(out / "metrics.jsonl")


def score(folder, *texts, prompt="?"):
    """Scores by a reward model, one unpadded row at a time."""
    net, asked = load_model(folder), TOK.prompt(user(prompt))
    return [net.score(net(torch.tensor([asked + TOK.response(t)]))[0, -1]).item() for t in texts]


def close(x, y, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64),
                               atol=atol, rtol=0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- the loss

def test_bradley_terry_and_its_gradient():
    rng = random.Random(0)
    r = torch.tensor([[rng.gauss(0, 3) for _ in range(50)] for _ in range(3)], dtype=torch.float64, requires_grad=True)
    loss = reward.bradley_terry(r[0], r[1], r[2])
    assert loss.shape == (50,)                                           # (N, 1) - (N,) would be (N, N)
    loss.sum().backward()
    for p, (w, l, m) in enumerate(r.detach().T.tolist()):
        close(loss[p].detach(), -math.log(sigmoid(w - l - m)))
        close(r.grad[:, p], torch.tensor([-1.0, 1, 1], dtype=torch.float64) * (1 - sigmoid(w - l - m)))


@pytest.mark.parametrize("gap", [-500.0, -120.0, -1.0, 0.0, 1e-12, 1.0, 120.0, 500.0])
def test_bradley_terry_never_overflows(gap):
    r = torch.tensor(gap, requires_grad=True)
    loss = reward.bradley_terry(r, torch.tensor(0.0))
    loss.backward()
    close(loss.detach(), max(-gap, 0) + math.log1p(math.exp(-abs(gap))), atol=1e-4)
    assert -1 <= float(r.grad) <= 0


def test_17_pairs_of_a_ranking_on_their_own_have_one_prompt():
    record = dict(prompt=user("word " * 60), responses=["yes " * n for n in (2, 40, 9)])
    items = reward.items_of(record, TOK, 48, reward.Train(pairs="split"))
    prompts = {tuple(ids[:target.index(1)]) for item in items for ids, target in item["rows"]}
    assert len(items) == 3 and len(prompts) == 1 and next(iter(prompts))[0] == TOK.role["user"]
    assert items[0]["rows"] == encode(record, TOK, 48)[:2]


def test_f1_all_pairs_of_instructgpt():
    """The mean over the C(4, 2) pairs of [2, .5, 0, -1], best first."""
    scores = torch.tensor([2, .5, 0, -1], dtype=torch.float64)
    win, lose, weight = reward.ranked_pairs([4])
    assert len(win) == 6
    close((weight.double() * reward.bradley_terry(scores[win], scores[lose])).sum(), .2276134317, atol=1e-7)


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


def test_ranking_of_two_is_plain_bradley_terry():
    win, lose, weight = reward.ranked_pairs([2, 2])
    assert (win, lose, weight.tolist()) == ([0, 2], [1, 3], [1, 1])


def test_pair_margins_use_a_margin_only_when_asked():
    items = [dict(rows=[0, 1], margin=2.5), dict(rows=[0, 1, 2]), dict(rows=[0, 1], margin=None)]
    scores = torch.arange(7.0)
    x = reward.pair_terms(scores, items, True)
    assert x.margin.tolist() == [2.5, 0, 0, 0, 0] and x.place.tolist() == [0, 1, 1, 1, 2]
    assert x.r_w.tolist() == [0, 2, 2, 3, 5] and x.r_l.tolist() == [1, 3, 4, 4, 6]
    assert reward.pair_terms(scores, items).margin.tolist() == [0] * 5
    assert {v.shape for v in vars(x).values()} == {(5,)}


def test_bradley_terry_recovers_known_gaps():
    """F2's rewards 0, 1, 2, 3 from the frequencies they imply: gaps 1, 2, 3, up to a constant no data can tell."""
    r = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=100, tolerance_grad=1e-10)
    pairs = list(itertools.permutations(range(4), 2))
    w, l = map(list, zip(*pairs))
    share = torch.tensor([sigmoid(a - b) for a, b in pairs], dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        loss = (share * reward.bradley_terry(r[w], r[l])).mean()
        loss.backward()
        return loss
    optimizer.step(step)
    close((r - r[0]).detach(), [0, 1, 2, 3], atol=1e-4)


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
                confidence, right = (sum(x) / len(inside) for x in zip(*((sigmoid(abs(m)), m > 0) for m in inside)))
                total += abs(confidence - right) * len(inside) / n
        assert reward.calibration_error(torch.tensor(margins), bins) == pytest.approx(total, abs=1e-5)


def test_calibration_error_of_a_calibrated_and_of_an_overconfident_judge():
    p = torch.rand(40_000, generator=torch.Generator().manual_seed(0)) / 2 + .5
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(1))
    margins = torch.logit(p) * torch.where(u < p, 1, -1)
    assert reward.calibration_error(margins) < .01
    ten = torch.tensor([math.log(9.0)] * 7 + [-math.log(9.0)] * 3)        # 90% sure, 70% right
    assert reward.calibration_error(ten) == pytest.approx(.2, abs=1e-6)


@pytest.mark.parametrize("wins, n, low, high", [
    (81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, .0, .1611), (1, 29, .0061, .1718)])
def test_wilson_published_table(wins, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), Table I, method 3."""
    assert reward.wilson(wins, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_solves_its_equation():
    """Its ends are the p with |p̂ - p| = z √(p (1 - p) / n)."""
    for wins, n in ((3, 10), (199.5, 400), (7, 7)):
        low, high = reward.wilson(wins, n)
        assert 0 <= low < high <= 1 + 1e-12 and low <= wins / n <= high + 1e-12
        for p in (low, high):
            close(abs(wins / n - p), 1.96 * math.sqrt(max(p * (1 - p), 0) / n), atol=1e-7)


def test_preference_is_antisymmetric_with_ties_a_half():
    assert [reward.preference(*x) for x in ((2, 1), (1, 2), (1, 1), (.1 + .2, .3))] == [1, 0, .5, 1]
    for a, b in itertools.product((-1, 0, 1, 2.5), repeat=2):
        assert reward.preference(a, b) + reward.preference(b, a) == 1


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (5, 0), (5, 1), (6, 3), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_one_that_is_right(n, right):
    answers = [1] * right + [0] * (n - right)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(answers, k))
        close(reward.pass_at_k(n, right, k), sum(any(some) for some in chosen) / len(chosen), 1e-12)
    assert reward.pass_at_k(n, right, 1) == pytest.approx(right / n, abs=1e-12)
    assert reward.pass_at_k(n, right, n) == float(right > 0)


def test_pass_at_k_of_a_sample_is_unbiased():
    """Over every outcome of 5 draws, each right with probability .3: 1 - .7^k."""
    for k in range(1, 6):
        mean = sum(.3 ** sum(x) * .7 ** (5 - sum(x)) * reward.pass_at_k(5, sum(x), k)
                   for x in itertools.product((0, 1), repeat=5))
        close(mean, 1 - .7 ** k, 1e-12)


def test_best_of_k_is_the_mean_over_all_choices_of_k():
    """Of equal proxies the first counts as the best."""
    rng = random.Random(3)
    for trial in range(120):
        n = rng.randint(1, 7)
        scores = [rng.choice([0.0, 1.0, rng.gauss(0, 2)]) for _ in range(n)]
        proxies = [float(rng.randint(0, 2)) if trial % 2 else rng.gauss(0, 1) for _ in range(n)]
        for k in range(1, n + 1):
            taken = []
            for some in itertools.combinations(range(n), k):
                best = some[0]
                for i in some:
                    best = i if proxies[i] > proxies[best] else best
                taken.append(scores[best])
            close(reward.best_of_k(scores, proxies, k), sum(taken) / len(taken), 1e-12)
        close(reward.best_of_k(scores, proxies, 1), sum(scores) / n, 1e-12)
        assert reward.best_of_k(scores, scores, n) == max(scores)


def slow_majority(answers, worth, k):
    """Self-consistency, one vote at a time; worth: the score of an answer."""
    total, parts = 0.0, 0
    for start in range(0, len(answers), k):
        some = answers[start:start + k]
        if len(some) < k:
            continue
        votes = {}
        for a in some:
            if a is not None:
                votes[a] = votes.get(a, 0) + 1
        most = max(votes.values(), default=0)
        winners = [a for a in votes if votes[a] == most]
        total, parts = total + (sum(worth[a] for a in winners) / len(winners) if winners else 0.0), parts + 1
    return total / parts


def test_majority_at_k_against_a_slow_loop():
    rng = random.Random(4)
    for _ in range(300):
        worth = {a: rng.choice([0.0, 1.0, .25]) for a in "abc"} | {None: 0.0}
        answers = [rng.choice("aabc") if rng.random() < .8 else None for _ in range(rng.randint(1, 12))]
        for k in range(1, len(answers) + 1):
            got = reward.majority_at_k(answers, [worth[a] for a in answers], k)
            close(got, slow_majority(answers, worth, k), 1e-12)


def test_a_lone_answer_draws_no_label_noise():
    """Whether a prompt got one answer or none must not change the labels of the prompts after it."""
    class Never:
        def random(self):
            raise AssertionError("a number was drawn")
    for select in ("rank", "ends"):
        assert reward.kept([reward.Answer("It is red.", 1.0, 4)], reward.Label(select=select), Never()) == []
        assert reward.kept([], reward.Label(select=select), Never()) == []


def test_majority_by_hand():
    assert reward.majority_at_k(["5", "7", "7"], [1, 0, 0], 3) == 0
    assert reward.majority_at_k(["5", "7"], [1, 0], 2) == .5                         # a tie is shared
    assert reward.majority_at_k(["5", None, None], [1, 0, 0], 3) == 1                # an unfinished answer has no vote
    assert reward.majority_at_k([None, None], [0, 0], 2) == 0
    assert reward.majority_at_k(["5", "5", "7", "7", "7"], [1, 1, 0, 0, 0], 2) == .5     # two parts; the fifth is over


def test_majority_of_1_is_the_mean_score_whatever_the_judge_sees():
    """The same final answer may have two scores: a judge sees the thinking too."""
    close(reward.majority_at_k(["5", "5", "7"], [1.0, 0.0, 1.0], 1), 2 / 3, 1e-12)


# ---------------------------------------------------------------- labels

def test_rank_draws_bradley_terry():
    rng = random.Random(0)
    for gap, scale, flip in ((1.0, 1.0, 0.0), (1.0, 3.0, 0.0), (.5, 2.0, .25), (5.0, 0.0, .1)):
        first = sum(reward.rank([0.0, gap], scale, flip, rng)[0] for _ in range(20_000)) / 20_000
        p = sigmoid(scale * gap) if scale else 1.0
        assert first == pytest.approx(p * (1 - flip) + (1 - p) * flip, abs=.012)      # 3.4 standard errors


def test_rank_draws_plackett_luce():
    scores, rng = [0.0, 1.0, 2.0], random.Random(1)
    seen = collections.Counter(tuple(reward.rank(scores, 1.0, 0.0, rng)) for _ in range(20_000))
    for order in itertools.permutations(range(3)):
        rest, p = list(range(3)), 1.0
        for i in order:
            p *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in rest)
            rest.remove(i)
        assert seen[order] / 20_000 == pytest.approx(p, abs=.012)


def test_rank_scale_0_is_best_first_and_flip_1_worst_first():
    rng = random.Random(2)
    for _ in range(50):
        scores = [rng.gauss(0, 1) for _ in range(5)]
        best = sorted(range(5), key=lambda i: -scores[i])
        assert reward.rank(scores, 0.0, 0.0, rng) == best
        assert reward.rank(scores, 0.0, 1.0, rng) == best[::-1]


def label(out, policy, **options):
    reward.label(reward.Label(out=str(out), policy=policy, **(CPU | dict(
        n=40, batch=16, max_new=8, by="vowels", scale=0.0, flip=0.0) | options)))
    return read(Path(out) / "pairs.jsonl")


@pytest.mark.parametrize("k", [2, 4])
def test_label_best_first_without_unfinished_or_duplicate_answers(k, tmp_path, monkeypatch):
    rolls, real = [], models.generate
    patch(monkeypatch, "generate", lambda *args, **how: rolls.append(real(*args, **how)) or rolls[-1])
    rows = label(tmp_path / "a", checkpoint(tmp_path / "abc", says="ae"), k=k, max_new=3, n=104, batch=48)
    said = [answer for roll in rolls for answer in zip(roll.responses(), roll.finished.tolist())]
    groups = [[text for text, done in said[i:i + k] if done and text.strip()] for i in range(0, 104 * k, k)]
    assert [len(roll.tokens) // k for roll in rolls] == [48, 48, 8]                   # the last batch is what is left
    assert not all(done for _, done in said) and any(len(set(g)) < len(g) for g in groups)   # both occur here
    points = lambda t: len(t) / 10 - t.count("e")
    untied = [{points(t): t for t in reversed(g)} for g in groups]       # of equal scores (the same text too) the first
    expected = [[g[p] for p in sorted(g, reverse=True)] for g in untied if len(g) > 1]
    assert [row["scores"] for row in rows] == [
        pytest.approx([len(t) / 10 - t.count("e") for t in best_first], abs=1e-6) for best_first in expected]
    for row, texts in zip(rows, expected):
        assert sorted(row["responses"]) == sorted(texts) and len(row["responses"]) == len(texts)
        assert row["scores"] == pytest.approx([len(t) / 10 - t.count("e") for t in row["responses"]], abs=1e-6)
        assert row["prompt"][-1]["role"] == "user" and row["source"] == "ai"
    for record, row in zip(data.read_records(tmp_path / "a" / "pairs.jsonl", "preference"), rows):
        assert {key: record[key] for key in ("prompt", "responses", "scores")} == {
            key: row[key] for key in ("prompt", "responses", "scores")}   # what the trainers read is what was written


def test_label_answers_belong_to_their_prompts(tmp_path, tiny, monkeypatch):
    """A judge that knows the prompt: were the k answers of a prompt not adjacent, scores would come from neighbours."""
    monkeypatch.setitem(data.VERIFIERS, "prompt", lambda record, text, finished:
                        len(record["prompt"][-1]["content"]) * 1000 + len(text))
    for row in label(tmp_path / "a", tiny, by="prompt", k=3):
        assert row["scores"] == [len(row["prompt"][-1]["content"]) * 1000 + len(t) for t in row["responses"]]


def test_label_flip_and_seed(tmp_path, tiny):
    plain, turned = label(tmp_path / "a", tiny), label(tmp_path / "b", tiny, flip=1.0)
    assert [row["responses"][::-1] for row in turned] == [row["responses"] for row in plain]
    assert label(tmp_path / "c", tiny) == plain != label(tmp_path / "d", tiny, seed=1)


def test_label_with_nothing_finished_is_one_clear_line(tmp_path):
    with pytest.raises(data.UserError):
        label(tmp_path / "a", checkpoint(tmp_path / "never", end=0.0), n=4, max_new=2)


# ---------------------------------------------------------------- scores

TEXTS = ["", "The cup is fine.", "Yes", "It is warm. Buy one today. You will love it."]


def test_score_ignores_padding_batch_mates_and_end_tokens_in_the_prompt(judge):
    """Read at the last response token, wherever that is: row by row without padding is the truth."""
    asked = [user("Describe the old van."), user("Hi") + [dict(role="assistant", content="Yes")] + user("Why?")]
    rows = [row for prompt in asked for row in encode(dict(prompt=prompt, responses=TEXTS), TOK, 64)]
    assert any(TOK.end in ids[:ids.index(TOK.role["assistant"], 6)] for ids, _ in rows[4:])
    net = load_model(judge)
    alone = [net.score(net(torch.tensor([ids]))[0, -1]).item() for ids, _ in rows]
    assert len({round(x, 4) for x in alone}) == len(rows)
    with torch.no_grad():
        for order in (range(8), [7, 0], [3], [2, 6, 1]):
            tokens, mask = data.collate([rows[i] for i in order], TOK)
            for width, junk in ((0, TOK.pad), (9, TOK.pad), (9, TOK.end), (9, 3)):
                wide = torch.nn.functional.pad(tokens, (0, width), value=junk)
                got = response_scores(net, wide, torch.nn.functional.pad(mask, (0, width)))
                assert got.shape == (len(order), 1)
                close(got[:, 0], [alone[i] for i in order], atol=2e-5)


NO_NUMBERS = dict(none=None, nan=math.nan, inf=-math.inf, text="1.0", list=[1.0], huge=1e300, two=torch.ones(2))


def says(monkeypatch, value):
    """A verifier `odd` that says this of every second answer, and 1 of the others."""
    turns = itertools.count()
    monkeypatch.setitem(data.VERIFIERS, "odd", lambda record, text, finished: value if next(turns) % 2 else 1)


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_a_score_that_is_no_number_names_its_term_its_record_and_itself(value, monkeypatch):
    says(monkeypatch, value)
    roll = Rollout.of([([1, 2, 3], [0, 0, 1])] * 2, TOK)
    records = [dict(prompt=user("Praise the tea.")), dict(prompt=user("Praise the cup."))]
    with pytest.raises(data.UserError) as error:
        Reward("words + 0.5*odd", Setup(TOK), 64)(records, roll)
    text = str(error.value)
    assert "odd" in text and "cup" in text and "tea" not in text and repr(value)[:20] in text and "\n" not in text


@pytest.mark.parametrize("value", [True, 3, .5, np.float32(.5), np.int64(2), np.bool_(True), torch.tensor(.5)], ids=repr)
def test_whatever_is_a_number_is_a_score(value, monkeypatch):
    says(monkeypatch, value)
    roll = Rollout.of([([1, 2, 3], [0, 0, 1])] * 2, TOK)
    total, _ = Reward("2*odd", Setup(TOK), 64)([{}] * 2, roll)
    assert total.tolist() == [2.0, 2 * float(value)]


@pytest.mark.parametrize("command", ["compare", "compare proxy", "accuracy", "curate", "label", "fit", "overoptimize"])
def test_every_command_stops_at_a_score_that_is_no_number(command, tiny, tmp_path, monkeypatch):
    says(monkeypatch, math.nan)
    pairs = write(tmp_path / "p.jsonl", rankings())
    with pytest.raises(data.UserError, match="odd"):
        if command == "compare":
            compare([tiny], tmp_path, judge="odd")
        elif command == "compare proxy":
            compare([tiny], tmp_path, proxy="odd")
        elif command == "accuracy":
            reward.accuracy(reward.Accuracy(data=pairs, **CPU), ["odd"])
        elif command == "curate":
            kimi_k15.curate(kimi_k15.Config(out=str(tmp_path / "c"), policy=tiny, by="odd", n=4, k=2, max_new=4, **CPU))
        elif command == "label":
            label(tmp_path / "l", tiny, by="odd", n=4)
        elif command == "fit":
            fit(tmp_path / "f", pairs, rules="odd", base="", steps=2)
        else:
            overoptimize(tmp_path / "o", tiny, judge="odd", n=2, prompts=2)
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("asked", ["", "@rate"])
def test_a_reward_model_whose_weights_are_no_numbers_is_named(asked, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "rm", 1, n_scores=0 if asked else 1)
    reader = Reward(folder + asked, Setup(TOK), 64)
    next(reader.loaded[folder].parameters()).data.fill_(math.nan)
    roll = Rollout.of([([1, 2, 3], [0, 0, 1])], TOK)
    with pytest.raises(data.UserError) as error:
        reader([dict(prompt=user("?"))], roll)
    assert folder in str(error.value) and "weights" in str(error.value)


def test_same_ids_in_reward_training_evaluation_and_ppo(judge, tmp_path, monkeypatch):
    """A text that is sampled by PPO and one that comes from a file are the same ids, end token included."""
    prompt, spec = user("Describe the old van."), Reward(judge, Setup(TOK), 64)
    seen, real = [], reward.response_scores
    monkeypatch.setattr(reward, "response_scores", lambda net, tokens, mask: seen.extend(
        [i for i in row if i != TOK.pad] for row in tokens.tolist()) or real(net, tokens, mask))
    path = write(tmp_path / "pairs.jsonl", [dict(prompt=prompt, responses=TEXTS[1:3])] * 25)
    train(tmp_path / "rm", judge, path, batch=24, epochs=1.0)
    served = []
    for text in TEXTS[1:3]:
        script = iter(TOK.response(text))
        with monkeypatch.context() as change:
            change.setattr(models, "sample", lambda logits, *_: (torch.tensor([next(script)]), torch.zeros(1)))
            roll = generate(load_model(judge, Setup(TOK)), [TOK.prompt(prompt)], 40)
        served.append(roll.tokens[0, :roll.lengths[0]].tolist())
        assert roll.finished.all() and roll.responses() == [text]
        close(spec([dict(prompt=prompt)], roll)[0], score(judge, text, prompt=prompt[0]["content"]), atol=2e-5)
    assert len(seen) >= 50 and {tuple(ids) for ids in seen} == {tuple(ids) for ids in served}


def test_score_of_an_unfinished_response_is_read_at_its_last_token(judge):
    ids = TOK.prompt(user("Hi")) + TOK.encode("The cup is")
    mask = torch.zeros(1, 31)
    mask[0, len(TOK.prompt(user("Hi"))) - 1:len(ids) - 1] = 1
    net = load_model(judge)
    tokens = torch.tensor([ids + [TOK.pad] * (32 - len(ids))])
    roll = Rollout(tokens, mask, torch.zeros(1, 31), torch.tensor([False]), [len(TOK.prompt(user("Hi")))], TOK)
    got, parts = Reward(f"2*{judge} + -1*vowels", Setup(TOK), 64)([{}], roll)
    alone = net.score(net(torch.tensor([ids]))[0, -1]).item()
    close(got, [2 * alone - (len("The cup is") / 10 - 2 + 1)], atol=1e-5)
    assert parts[judge].item() == pytest.approx(alone, abs=1e-5)


# ---------------------------------------------------------------- train

def ranked(*answers, n=40, **more):
    return [dict(prompt=user("?"), responses=list(answers), **more)] * n


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
    path = write(tmp_path / "pairs.jsonl", rows)
    train(tmp_path / "rm", tiny, path, batch=n, epochs=50.0, lr=1e-2, weight_decay=0.0, optimizer="adamw")
    a, b, c, d = score(tmp_path / "rm", *arms)
    assert [b - a, c - a, d - a] == pytest.approx([1, 2, 3], abs=.05)


def test_order_of_a_pair_gives_the_sign(tiny, tmp_path):
    for name, pair in (("a", ("yes", "no")), ("b", ("no", "yes"))):
        train(tmp_path / name, tiny, write(tmp_path / f"{name}.jsonl", ranked(*pair)), lr=1e-2, epochs=5.0)
    assert [x > y for x, y in (score(tmp_path / name, "yes", "no") for name in "ab")] == [True, False]


def test_margin_counts_only_with_its_flag(tiny, tmp_path):
    """At the start all scores are 0, so the first loss is -log σ(-margin)."""
    path = write(tmp_path / "p.jsonl", ranked("yes", "no", margin=2.0))
    first = [train(tmp_path / str(on), tiny, path, margin=on, epochs=1.0)[0]["loss"] for on in (False, True)]
    assert first == pytest.approx([math.log(2), -math.log(sigmoid(-2.0))], abs=1e-5)


def test_center_pulls_the_sum_of_scores_to_0(judge, tmp_path):
    """The first step's loss, at known scores: Bradley-Terry plus c (r_w + r_l)²."""
    a, b = score(judge, "yes", "no")
    path = write(tmp_path / "p.jsonl", ranked("yes", "no"))
    for c in (0.0, .5):
        first = train(tmp_path / str(c), judge, path, center=c, epochs=.1)[0]
        assert first["loss"] == pytest.approx(-math.log(sigmoid(a - b)) + c * (a + b) ** 2, abs=1e-4)
        assert first["margin"] == pytest.approx(a - b, abs=1e-4) and first["accuracy"] == float(a > b)


def rankings(n=60):
    """Prompts with 2 to 4 answers of several lengths each, best first."""
    rng = random.Random(3)
    words = "cup van box red old it is fine warm".split()
    answers = lambda: " ".join(rng.choice(words) for _ in range(rng.randint(1, 7)))
    ranking = lambda: sorted({answers() for _ in range(4)}, key=lambda text: (len(text), text))
    return [dict(prompt=user(answers()), responses=ranking()) for _ in range(n)]


def test_ragged_rankings_against_a_loop(judge, tmp_path, monkeypatch):
    """First step: loss and gradient of the mean over records of the mean over their pairs, one row at a time."""
    grads, real = [], models.Optimizer.step
    monkeypatch.setattr(models.Optimizer, "step", lambda self, step: (
        grads.append([p.grad.clone() for p in self.params]), real(self, step))[1])
    path = write(tmp_path / "p.jsonl", rankings(20))                     # the 20th is held out
    rows = train(tmp_path / "a", judge, path, batch=19, epochs=1.0, micro_tokens=256)
    net, loss = load_model(judge).double(), 0.0
    records = data.read_records(path, "preference")[:19]
    assert len({len(r["responses"]) for r in records}) > 1
    for r in records:
        asked = TOK.prompt(r["prompt"])
        s = [net.score(net(torch.tensor([asked + TOK.response(t)]))[0, -1])[0] for t in r["responses"]]
        pairs = [-torch.nn.functional.logsigmoid(s[i] - s[j]) for i in range(len(s)) for j in range(i + 1, len(s))]
        loss = loss + sum(pairs) / len(pairs) / len(records)
    assert rows[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for p, g in zip(grads[0], torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)):
        close(p, g, atol=1e-4)


def test_micro_batches_change_nothing(judge, tmp_path, float64):
    """In float64: AdamW's first steps are as long for a gradient that is all rounding as for any other."""
    path = write(tmp_path / "p.jsonl", rankings())
    small, large = (train(tmp_path / str(n), judge, path, micro_tokens=n, batch=16, eval_every=2, lr=1e-5)
                    for n in (64, 100_000))
    for a, b in zip(small, large):
        for key in a.keys() - {"seconds", "val_gold"}:
            assert a[key] == pytest.approx(b[key], abs=1e-9, rel=1e-9), key


def test_pairs_all_and_split_count_differently(judge, tmp_path):
    """all: a ranking of 3 is one element of 3 pairs; split: three elements."""
    path = write(tmp_path / "p.jsonl", ranked("yes", "no", "why"))
    steps = {mode: len(train(tmp_path / mode, judge, path, pairs=mode, epochs=1.0, batch=19))
             for mode in ("all", "split")}
    assert steps == dict(all=2, split=6)


def test_mean_held_out_score_is_0_after_training(judge, tmp_path):
    """So a score reads "better than usual", and no constant tells PPO that longer or shorter is better."""
    path = write(tmp_path / "p.jsonl", rankings())
    rows = train(tmp_path / "a", judge, path)
    held = data.read_records(path, "preference")[19::20]
    every = [s for r in held for s in score(tmp_path / "a", *r["responses"], prompt=r["prompt"][0]["content"])]
    assert abs(sum(every) / len(every)) < 1e-5 < abs(rows[-1]["val_mean"])


CFG = reward.Train(micro_tokens=64)


def items_of(records):
    return [dict(rows=encode(r, TOK, 64), **{k: r[k] for k in ("scores", "margin") if k in r}) for r in records]


def test_evaluate_against_a_loop(judge):
    records = [r | dict(scores=[float(-len(t)) for t in r["responses"]]) for r in rankings(12)]
    loss, right, agree, every = [], [], [], []
    for r in records:
        s = score(judge, *r["responses"], prompt=r["prompt"][0]["content"])
        every += s
        gaps = [s[i] - s[j] for i, j in itertools.combinations(range(len(s)), 2)]
        loss.append(sum(-math.log(sigmoid(gap)) for gap in gaps) / len(gaps))        # of a ranking, as it is trained
        for i, j in itertools.combinations(range(len(s)), 2):
            right.append(s[i] > s[j])
            if r["scores"][i] != r["scores"][j]:
                agree.append((s[i] > s[j]) == (r["scores"][i] > r["scores"][j]))
    got = reward.evaluate(load_model(judge, Setup(TOK)), items_of(records), CFG)
    for key, x in dict(val_loss=loss, val_accuracy=right, val_gold=agree, val_mean=every).items():
        assert got[key] == pytest.approx(sum(x) / len(x), abs=1e-5), key


def test_evaluate_when_only_some_records_have_scores(judge):
    """A record without true scores must not shift the others' onto its pairs."""
    a, b = score(judge, "yes", "no")
    best, worst = ("yes", "no") if a > b else ("no", "yes")
    right, wrong = dict(prompt=user("?"), responses=[best, worst]), dict(prompt=user("?"), responses=[worst, best])
    for one, other in ((right, wrong | dict(scores=[1.0, 0.0])), (wrong, right | dict(scores=[1.0, 0.0]))):
        got = reward.evaluate(load_model(judge, Setup(TOK)), items_of([one, other]), CFG)
        assert got["val_gold"] == float(other["responses"][0] == best)


# ---------------------------------------------------------------- compare

def compare(folders, tmp_path, **options):
    reward.compare(reward.Compare(save=str(tmp_path / "table.json"), device="cpu", **(dict(
        max_new=6, n=12, families="write,safe", on="write,safe", judge="vowels") | options)), folders)
    return json.loads((tmp_path / "table.json").read_text())


def test_self_against_self_is_exactly_half(tiny, tmp_path):
    """Same seed, same samples: every comparison is a tie, and a tie is ½; the KL to oneself is 0."""
    for row in compare([tiny, tiny], tmp_path, temperature=.7):
        assert row["win"] == .5 and row["kl"] == 0 and row["interval"] == pytest.approx(reward.wilson(12, 24))


def test_win_rates_of_two_policies_add_to_1(tiny, tmp_path):
    other = checkpoint(tmp_path / "other", 8)
    (_, b), (_, a) = compare([tiny, other], tmp_path), compare([other, tiny], tmp_path)
    assert a["win"] + b["win"] == pytest.approx(1, abs=1e-12) and a["win"] != .5


def test_compare_against_a_loop(tiny, judge, tmp_path, monkeypatch):
    """Scores, win rate, KL = Σ log π - log π_first and length, from the samples, one unpadded row at a time."""
    other, calls, real = checkpoint(tmp_path / "other", 7), [], models.generate

    def spy(net, prompts, *args, **kwargs):
        roll = real(net, prompts, *args, **kwargs)
        calls.extend([(prompts, roll)] if kwargs["temperature"] else [])
        return roll
    patch(monkeypatch, "generate", spy)
    table = compare([tiny, other], tmp_path, proxy=judge, families="write,arith", on="write")
    base, net = load_model(tiny).double(), load_model(other).double()

    def rows(call):
        return [([i for i in row if i != TOK.pad], len(p)) for p, row in zip(call[0], call[1].tokens.tolist())]
    vowels = lambda ids, p: len(TOK.decode(ids[p:])) / 10 - TOK.decode(ids[p:]).count("e")
    logp = lambda m, ids, p: m.logits(m(torch.tensor([ids])))[0, p - 1:-1].log_softmax(-1)[range(len(ids) - p), ids[p:]]
    mine, theirs = rows(calls[2]), rows(calls[0])
    wins = [(vowels(*a) > vowels(*b)) + .5 * (vowels(*a) == vowels(*b)) for a, b in zip(mine, theirs)]
    rm = load_model(judge)
    expected = dict(win=sum(wins) / 12, length=sum(len(ids) - p for ids, p in mine) / 12,
                    kl=sum((logp(net, *r) - logp(base, *r)).sum().item() for r in mine) / 12,
                    write=sum(vowels(*r) for r in mine) / 12, arith=sum(vowels(*r) for r in rows(calls[3])) / 12,
                    proxy=sum(rm.score(rm(torch.tensor([ids]))[0, -1]).item() for ids, _ in mine) / 12)
    assert {k: table[1][k] for k in expected} == pytest.approx(expected, abs=1e-4)
    assert table[1]["interval"] == pytest.approx(reward.wilson(sum(wins), 12))
    assert table[0]["win"] == .5 and table[0]["kl"] == 0


def test_compare_shows_prompts_and_answers(tiny, tmp_path, capsys):
    compare([tiny], tmp_path, show=3, n=4, families="write", on="write")
    out = capsys.readouterr().out
    assert out.count("\n\n") == 4 and "win" in out and "<|" not in out


def test_compare_families_outside_the_shown_ones(tiny, tmp_path):
    with pytest.raises(data.OptionError):
        compare([tiny], tmp_path, families="write", on="fmt")


def spied(monkeypatch):
    """The rollouts of what follows, with their keyword arguments."""
    calls, real = [], models.generate
    patch(monkeypatch, "generate", lambda *args, **how: (
        calls.append((how, real(*args, **how))), calls[-1][1])[1])
    return calls


def test_compare_with_several_samples_scales_with_test_time(letters, tmp_path, monkeypatch, capsys):
    """pass@k, maj@k and best@k recomputed, by brute force, from the samples; pass@1 and maj@1 are the mean score."""
    monkeypatch.setitem(data.VERIFIERS, "right", lambda record, text, finished: finished and text.count("a") % 2 == 1)
    calls = spied(monkeypatch)
    options = dict(judge="right", proxy="vowels", max_new=4, families="write,safe", on="write,safe", n=35)
    other = checkpoint(tmp_path / "other", 7, says="aeo")
    table = compare([letters, other], tmp_path, samples=6, **options)
    rolls = [roll for _, roll in calls if len(roll.tokens) > 35]
    assert [len(roll.tokens) for roll in rolls] == [64 * 6, 6 * 6] * 2               # 70 prompts of both families
    for row, (a, b) in zip(table, (rolls[:2], rolls[2:])):
        said = [(t, f) for roll in (a, b) for t, f in zip(roll.responses(), roll.finished.tolist())]
        expected = {}
        for k in (1, 2, 4):
            some = [said[i:i + 6] for i in range(0, len(said), 6)]
            score = lambda t, done: float(done and t.count("a") % 2 == 1)
            ways = [[list(c) for c in itertools.combinations(group, k)] for group in some]
            expected[f"pass@{k}"] = [sum(max(score(*x) for x in c) for c in way) / len(way) for way in ways]
            liked = lambda x: len(x[0]) / 10 - x[0].count("e")
            expected[f"best@{k}"] = [sum(score(*max(c, key=lambda x: round(liked(x), 4))) for c in way) / len(way)
                                     for way in ways]
            votes = [[(t.strip() or None) if done else None for t, done in group] for group in some]
            expected[f"maj@{k}"] = [slow_majority(v, {x: float(x is not None and x.count("a") % 2) for x in v}, k)
                                    for v in votes]
        expected = {key: sum(x) / len(x) for key, x in expected.items()}
        assert {key: row[key] for key in row if "@" in key} == pytest.approx(expected, abs=1e-6)
        mean = sum(float(done and t.count("a") % 2 == 1) for t, done in said) / len(said)
        assert 0 < row["pass@1"] < 1 and row["pass@1"] == pytest.approx(mean) == row["best@1"]
    out = capsys.readouterr().out
    for name in ("pass", "maj", "best"):
        head = "".join(f"{f'{name}@{k}':>9}" for k in (1, 2, 4))
        lines = out[out.index(head):].splitlines()[1:3]
        cells = [[f"{row[f'{name}@{k}']:.3f}" for k in (1, 2, 4)] for row in table]
        assert [line.split()[1:] for line in lines] == cells
    alone = compare([letters], tmp_path, **options)
    assert not [key for key in alone[0] if "@" in key] and "@" not in capsys.readouterr().out
    assert {key: table[0][key] for key in alone[0]} == alone[0]                      # the rest of the table is as ever
    assert not [key for key in compare([letters], tmp_path, samples=2, n=3, judge="right")[0] if "best@" in key]


def test_compare_makes_every_answer_begin_as_told(letters, tmp_path, monkeypatch, capsys):
    calls, begin = spied(monkeypatch), TOK.encode("<think>")
    row, = compare([letters], tmp_path, begin="<think>", samples=2, n=5, families="write", on="write", show=2)
    texts = [text for _, roll in calls for text in roll.responses()]
    once = [len(roll.tokens) for how, roll in calls if how.get("temperature") == 0]
    assert len(texts) == 5 + sum(once) + 10 and all(text.startswith("<think>") for text in texts)
    assert all(how["begin"] == begin for how, _ in calls)
    points = [len(text) / 10 - text.count("e") for text in texts[:5]]
    assert row["write"] == pytest.approx(sum(points) / 5, abs=1e-5)                  # the judge sees the beginning too
    assert capsys.readouterr().out.count("  <think>") == 2


def test_kl_of_answers_made_to_begin_alike_is_that_of_what_was_sampled(tiny, tmp_path, monkeypatch):
    other, calls = checkpoint(tmp_path / "other", 7), spied(monkeypatch)
    table = compare([tiny, other], tmp_path, begin="<think>", families="write", on="write")
    base, net, kl = load_model(tiny).double(), load_model(other).double(), 0.0
    roll = [roll for how, roll in calls if how["temperature"]][-1]
    for ids, start, n in zip(roll.tokens.tolist(), roll.prompt_len, roll.lengths):
        logp, ref = (m.logits(m(torch.tensor([ids[:n]])))[0].log_softmax(-1).detach() for m in (net, base))
        kl += sum(float(logp[t - 1, ids[t]] - ref[t - 1, ids[t]]) for t in range(start + 1, n)) / 12
    assert table[1]["kl"] == pytest.approx(kl, abs=1e-4)


def some_prompts(path):
    """A file of six prompts, of which three are the same."""
    return write(path, [dict(prompt=asked) for asked in ("Why?", "Tell.", "Why?", "Who?", "Why?", "How?")])


def test_compare_gives_each_distinct_prompt_one_greedy_answer(tiny, tmp_path, monkeypatch, capsys):
    """Score and win rate beside the sampled ones, recomputed answer by answer; the table is readable at 120 columns."""
    other, calls = checkpoint(tmp_path / "other", 7), spied(monkeypatch)
    first, row = compare([tiny, other], tmp_path, data=some_prompts(tmp_path / "d.jsonl"))
    vowels = lambda text: len(text) / 10 - text.count("e")
    mine, theirs = ([vowels(text) for text in roll.responses()] for how, roll in calls[::-1] if not how["temperature"])
    assert len(mine) == 4 and row["distinct"] == dict(file=4)
    assert row["greedy"] == pytest.approx(sum(mine) / 4, abs=1e-6)
    wins = sum((a > b) + .5 * (a == b) for a, b in zip(mine, theirs))
    assert row["greedy_win"] == wins / 4 and row["greedy_interval"] == pytest.approx(reward.wilson(wins, 4))
    assert first["greedy_win"] == .5 and first["greedy"] == pytest.approx(sum(theirs) / 4, abs=1e-6)
    out = capsys.readouterr().out
    assert "distinct: file 4" in out and f"{row['greedy']:.3f}" in out and f"{row['kl']:.2f}" in out


def test_compare_leaves_out_prompts_without_room_and_counts_them(tiny, tmp_path, capsys):
    prompts = ["Why?", "Why? " * 200, "Who?"]
    path = write(tmp_path / "d.jsonl", [dict(prompt=prompt) for prompt in prompts])
    row = compare([tiny], tmp_path, data=path)[0]
    assert row["distinct"] == dict(file=2) and "1 of 3 prompts" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="d.jsonl.* no prompt"):
        compare([tiny], tmp_path, data=write(tmp_path / "d.jsonl", [dict(prompt=prompts[1])]))


def test_greedy_answers_have_no_kl_and_one_to_the_same_prompt_counts_once(tiny, tmp_path, capsys):
    other, path = checkpoint(tmp_path / "other", 7), some_prompts(tmp_path / "d.jsonl")
    sampled = compare([tiny, other], tmp_path, data=path)[1]
    assert "KL" in capsys.readouterr().out
    for row in compare([tiny, other], tmp_path, data=path, temperature=0.0):
        assert "kl" not in row and "greedy" not in row and row["distinct"] == dict(file=4)
    out = capsys.readouterr().out
    assert "KL" not in out and "nan" not in out and "None" not in out
    assert (row["file"], row["win"]) == (sampled["greedy"], sampled["greedy_win"])
    assert row["interval"] == sampled["greedy_interval"]


# ---------------------------------------------------------------- end to end

def test_label_train_compare(tiny, tmp_path, capsys):
    """The chain of commands, on gold labels, and each one's next command."""
    rows = label(tmp_path / "pairs", tiny, n=80, by="gold", scale=3.0, flip=.1)
    log = train(tmp_path / "rm", tiny, tmp_path / "pairs" / "pairs.jsonl", batch=8)
    assert {"val_loss", "val_accuracy", "val_gold", "calibration_error"} <= log[-1].keys()
    assert len(log) == math.ceil(2.0 * (len(rows) - max(1, len(rows) // 20)) / 8)   # 2 epochs of all but the held out
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)         # the head starts at 0
    table = compare([tiny, tiny], tmp_path, judge="gold", proxy=str(tmp_path / "rm"))
    assert table[0]["proxy"] == table[1]["proxy"] != 0
    out = capsys.readouterr().out
    assert "reward.py train" in out and f"--data {tmp_path / 'pairs' / 'pairs.jsonl'}" in out
    assert "ppo.py" in out and f"--reward {tmp_path / 'rm'}" in out
    again = train(tmp_path / "rm", tiny, tmp_path / "pairs" / "pairs.jsonl", batch=8)
    assert again == log and "nothing to do" in capsys.readouterr().out


def test_reward_training_resumes_bit_for_bit(judge, tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", rankings())
    whole, real = train(tmp_path / "a", judge, path, batch=16), data.Run.log
    with monkeypatch.context() as change, pytest.raises(KeyboardInterrupt):
        def log(self, step, *args, **kwargs):
            if step == 3:
                raise KeyboardInterrupt
            real(self, step, *args, **kwargs)
        change.setattr(data.Run, "log", log)
        train(tmp_path / "b", judge, path, batch=16, save_every=2)
    resumed = train(tmp_path / "b", judge, path, batch=16, save_every=2)
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in resumed] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in whole]
    assert score(tmp_path / "a", "yes", "no") == score(tmp_path / "b", "yes", "no")


@pytest.mark.parametrize("command", [
    "train --lr 0", "train --epochs 0", "train --pairs some", "train --margn true", "train --batch 0",
    "train --eval_every 0", "label --k 1", "label --flip 2", "label --n 0", "label --temperature 0", "label --scale -1",
    "label --select most", "configs/kimi_k15.py --k 0", "configs/kimi_k15.py --n 0", "configs/kimi_k15.py --guesses -1",
    "configs/kimi_k15.py --cap -1", "configs/kimi_k15.py stray", "configs/claude_cai.py --rounds 0",
    "configs/rule_based_rewards.py", "configs/reward_hacking.py x --n 0",
    "compare x --samples -1",
    "compare", "compare x --n 0", "compare x --families nope", "compare x --families write --on fmt",
    "compare x --max_new 0", "", "judge",
    "train --data toy"])
def test_impossible_options_exit_2_with_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = command.split() if command.startswith("configs/") else ["reward.py", *command.split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(reward.__file__).parent / words[0]), run_name="__main__")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert not list(tmp_path.iterdir())                                  # nothing written


# ---------------------------------------------------------------- what label keeps

def test_f2_accepted_responses_are_the_tilted_policys():
    """RSO on the bandit: π = .4 .3 .2 .1, rewards 0 to 3, β = ½. Accepted samples follow π exp(r / β) / Z."""
    rng, pi, beta = random.Random(0), [.4, .3, .2, .1], .5
    groups = [rng.choices([0.0, 1.0, 2.0, 3.0], pi, k=200) for _ in range(500)]      # each has the best of all
    kept = [scores[i] for scores in groups for i in reward.accept(scores, beta, rng)]
    rate = sum(p * math.exp((r - 3) / beta) for r, p in enumerate(pi))
    assert rate == pytest.approx(.1336, abs=5e-5)
    assert len(kept) / 1e5 == pytest.approx(rate, abs=3 * math.sqrt(rate * (1 - rate) / 1e5))
    for r, share in enumerate([.0074, .0411, .2027, .7488]):
        assert pi[r] * math.exp((r - 3) / beta) / rate == pytest.approx(share, abs=6e-5)
        assert kept.count(r) / len(kept) == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / len(kept)))


def test_accept_takes_each_with_its_own_probability_and_the_best_always():
    rng, scores = random.Random(1), [-1.0, .5, -.2, .5]
    seen = collections.Counter(i for _ in range(10_000) for i in reward.accept(scores, .7, rng))
    for i, s in enumerate(scores):
        p = math.exp((s - .5) / .7)
        assert seen[i] / 1e4 == pytest.approx(p, abs=3.5 * math.sqrt(p * (1 - p) / 1e4))
    for _ in range(200):
        scores = [rng.gauss(0, 1e3) for _ in range(rng.randint(1, 6))]
        assert scores.index(max(scores)) in reward.accept(scores, rng.choice([1e-3, .5, 100]), rng)


def test_win_rates_against_a_loop():
    rng = random.Random(2)
    for k in (2, 2, 3, 5, 8):
        s = [rng.gauss(0, 2) for _ in range(k)]
        got = reward.win_rates(s)
        close(got, [sum(sigmoid(s[i] - s[j]) for j in range(k) if j != i) / (k - 1) for i in range(k)])
        assert sum(got) == pytest.approx(k / 2) and sorted(range(k), key=got.__getitem__) == sorted(
            range(k), key=s.__getitem__)
        shifted = reward.win_rates([x + 100 for x in s])
        close(shifted, got)
    assert reward.win_rates([3.0, 3.0]) == [.5, .5]
    assert reward.win_rates([1.0, 0.0]) == pytest.approx([sigmoid(1.0), 1 - sigmoid(1.0)])


def sampled(monkeypatch, k):
    """For each prompt of the label runs that follow, its finished, different answers and their scores."""
    groups, real = [], models.generate

    def spy(*args, **how):
        roll = real(*args, **how)
        said = list(zip(roll.responses(), roll.finished.tolist()))
        groups.extend({t: len(t) / 10 - t.count("e") for t, done in said[i:i + k] if done and t.strip()}
                      for i in range(0, len(said), k))
        return roll
    patch(monkeypatch, "generate", spy)
    return groups


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A policy of two letters: its short answers repeat, and tie."""
    return checkpoint(tmp_path_factory.mktemp("letters"), says="ae")


def rows_of(folder, policy, **options):
    return label(folder, policy, **(dict(k=4, max_new=4, n=60, batch=25) | options))


def distinct(group):
    return len({round(s, 4) for s in group.values()})


def test_label_rank_by_score_alone_keeps_every_answer_without_ties(letters, tmp_path, monkeypatch):
    groups = sampled(monkeypatch, 4)
    rows = rows_of(tmp_path / "a", letters)
    assert any(distinct(g) < len(g) for g in groups) and any(distinct(g) == 1 for g in groups)   # ties do occur
    groups = [g for g in groups if distinct(g) > 1]
    assert len(rows) == len(groups) > 20
    for row, group in zip(rows, groups):
        assert all(a > b for a, b in itertools.pairwise(row["scores"])) and len(row["scores"]) == distinct(group)
        assert row["scores"] == pytest.approx([group[t] for t in row["responses"]], abs=1e-6)
        close(row["win"], reward.win_rates(row["scores"]), 1e-6)


@pytest.mark.parametrize("gap", [0.0, .45, 1.15])
def test_label_ends_keeps_best_and_worst_at_least_a_gap_apart(gap, letters, tmp_path, monkeypatch):
    groups = sampled(monkeypatch, 4)
    rows = rows_of(tmp_path / "a", letters, select="ends", min_gap=gap)
    groups = [g for g in groups if distinct(g) > 1 and max(g.values()) - min(g.values()) >= gap - 1e-5]
    assert len(rows) == len(groups) > 4
    for row, group in zip(rows, groups):
        assert len(row["responses"]) == len(row["scores"]) == len(row["win"]) == 2
        assert row["scores"] == pytest.approx([max(group.values()), min(group.values())], abs=1e-6)
        assert [group[t] for t in row["responses"]] == pytest.approx(row["scores"], abs=1e-6)
        assert row["scores"][0] - row["scores"][1] >= gap
        some = reward.win_rates(sorted({round(s, 4) for s in group.values()}))       # among all, not of the two
        close(row["win"], [some[-1], some[0]], 1e-4)


def test_label_best_keeps_the_highest_of_k_as_a_demonstration(letters, tmp_path, monkeypatch):
    groups = sampled(monkeypatch, 4)
    rows = rows_of(tmp_path / "a", letters, select="best")
    groups = [g for g in groups if g]
    assert len(rows) == len(groups) and any(len(g) == 1 for g in groups)             # one answer is the best of one
    for row, group in zip(rows, groups):
        assert "responses" not in row and group[row["response"]] == max(group.values())
        assert row["scores"] == pytest.approx([max(group.values())], abs=1e-6) and "win" not in row
    messages = data.read_records(tmp_path / "a" / "pairs.jsonl", "messages")          # sft.py reads it
    assert [m["messages"][-1]["content"] for m in messages] == [
        row["response"] for row in rows if row["response"].strip()]


def test_label_rso_keeps_an_accepted_part_of_the_answers(letters, tmp_path):
    wide, narrow = (rows_of(tmp_path / str(beta), letters, select="rso", rso_beta=beta, k=6) for beta in (1e9, .3))
    rank = rows_of(tmp_path / "rank", letters, k=6)
    assert wide == rank                                                              # everything is accepted
    assert 0 < sum(len(row["responses"]) for row in narrow) < sum(len(row["responses"]) for row in wide)
    tops = {(row["prompt"][-1]["content"], row["responses"][0]): set(row["responses"]) for row in wide}
    for row in narrow:                                                               # the best is always accepted
        said = tops[row["prompt"][-1]["content"], row["responses"][0]]
        assert len(row["responses"]) > 1 and set(row["responses"]) <= said
        assert row["scores"] == sorted(row["scores"], reverse=True)
        close(row["win"], reward.win_rates(row["scores"]), 1e-9)


@pytest.mark.parametrize("select", ["rank", "rso", "best", "correct", "quantile"])
def test_p41_label_killed_and_resumed_equals_uninterrupted(select, tiny, tmp_path, monkeypatch):
    """With noise in the labels: random numbers, too, start anew with each batch."""
    options = dict(select=select, k=3, scale=1.0, flip=.2, save_every=1, batch=8, min_gap=0.0)
    whole, real = label(tmp_path / "a", tiny, **options), data.Run.log

    def log(self, step, *args, **kwargs):
        if step == 3:
            raise KeyboardInterrupt
        real(self, step, *args, **kwargs)
    with monkeypatch.context() as change, pytest.raises(KeyboardInterrupt):
        change.setattr(data.Run, "log", log)
        label(tmp_path / "b", tiny, **options)
    assert json.loads((tmp_path / "b" / "unfinished.json").read_text())[0] == 3
    assert not (tmp_path / "b" / "pairs.jsonl").exists()
    calls, generate_ = [], models.generate
    patch(monkeypatch, "generate", lambda *args, **how: (calls.append(1), generate_(*args, **how))[1])
    assert label(tmp_path / "b", tiny, **options) == whole and len(calls) == 2       # of 5 batches
    a, b = ((tmp_path / name / "pairs.jsonl").read_bytes() for name in "ab")
    assert a == b and not (tmp_path / "b" / "unfinished.json").exists()
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in read(tmp_path / name / "metrics.jsonl")]
            for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 5


# ---------------------------------------------------------------- the other selections

def slow_kept(select, group):
    """What FEATURES.md says of each selection (C13, C14), by looking at every answer and at every two."""
    right = [x for x in group if x[1] > .5]
    if select == "best":
        return [x for x in group if all(x[1] >= y[1] for y in group)][:1]
    if select == "correct":
        return right
    shortest = [x for x in right if all(x[2] <= y[2] for y in right)][:1]
    if select == "shortest":
        return shortest
    if select == "quantile":
        return group
    assert select == "short_pairs"
    return [(x, y) for x in shortest for y in group
            if (y[1] <= .5 and y[2] > x[2]) or (y[1] > .5 and y[2] >= 1.5 * x[2] and y is not x)]


def keep(select, group, **options):
    answers = [reward.Answer(*answer) for answer in group]
    return reward.kept(answers, reward.Label(select=select, **options), random.Random(0))


def groups_of(n=400):
    rng = random.Random(6)
    for _ in range(n):
        yield [(f"text {i}", rng.choice([0.0, .25, .5, .500001, 1.0, rng.gauss(0, 2)]), rng.choice([2, 3, 4, 6, 9]))
               for i in range(rng.randint(0, 6))]


@pytest.mark.parametrize("select", ["best", "correct", "shortest", "quantile"])
def test_selections_of_demonstrations_against_a_loop(select):
    for group in groups_of():
        assert keep(select, group) == [dict(response=t, scores=[s]) for t, s, _ in slow_kept(select, group)]


def test_short_pairs_are_every_pair_of_the_predicate_and_no_other():
    several = ties = 0
    for group in groups_of(600):
        pairs = slow_kept("short_pairs", group)
        assert keep("short_pairs", group) == [
            dict(responses=[x[0], y[0]], scores=[x[1], y[1]]) for x, y in pairs]
        several += len(pairs) > 1
        ties += any(y[2] == 1.5 * x[2] and y[1] > .5 for x, y in pairs)
    assert several > 50 and ties > 20


def test_short_pairs_by_hand():
    group = [("long right", 1, 9), ("right", 1, 4), ("wrong short", 0, 3), ("wrong", 0, 5), ("half more", 1, 6),
             ("little more", 1, 5), ("wrong as long", 0, 4), ("exactly half", .5, 8)]
    assert [row["responses"] for row in keep("short_pairs", group)] == [
        ["right", other] for other in ("long right", "wrong", "half more", "exactly half")]
    assert keep("short_pairs", [x for x in group if x[1] <= .5]) == [] == keep("short_pairs", [])
    assert keep("short_pairs", group[1:2]) == []


@pytest.mark.parametrize("select", ["rank", "ends", "rso"])
def test_rankings_of_none_or_one_are_nothing(select):
    assert keep(select, []) == [] == keep(select, [("a", 1.0, 3)])
    two = keep(select, [("a", 1.0, 3), ("b", 2.0, 3)], scale=0.0, flip=0.0, rso_beta=1e9)
    assert [row["responses"] for row in two] == [["b", "a"]]


def answers_of(monkeypatch, k):
    """For each prompt of the label runs that follow, its finished, different answers: (text, tokens)."""
    groups, real = [], models.generate

    def spy(*args, **how):
        roll = real(*args, **how)
        said = list(zip(roll.responses(), roll.mask.sum(1).tolist(), roll.finished.tolist()))
        groups.extend({t: n for t, n, done in said[i:i + k][::-1] if done and t.strip()}
                      for i in range(0, len(said), k))
        return roll
    patch(monkeypatch, "generate", spy)
    return groups


RULE = "def right(record, text, finished):\n    return finished and text.count('a') == 1\n"


@pytest.fixture
def rule(tmp_path, monkeypatch):
    """A rule of one's own, in a file: right is what has one a. Half of the two letters' answers have."""
    (tmp_path / "planted_rule.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    yield "planted_rule:right"
    sys.modules.pop("planted_rule", None)


def planted(text): return text.count("a") == 1


@pytest.mark.parametrize("select", ["correct", "shortest", "short_pairs"])
def test_label_keeps_what_a_planted_rule_calls_right_and_misses_none(select, rule, letters, tmp_path, monkeypatch):
    groups = answers_of(monkeypatch, 6)
    rows = rows_of(tmp_path / "a", letters, select=select, by=rule, k=6, max_new=6)
    expected = [x for g in groups for x in slow_kept(select, [(t, float(planted(t)), g[t]) for t in reversed(g)])]
    if select == "short_pairs":
        assert [row["responses"] for row in rows] == [[x[0], y[0]] for x, y in expected]
        assert all(row["scores"] == [1, float(planted(row["responses"][1]))] for row in rows)
        assert {row["scores"][1] for row in rows} == {0, 1}
        read_back = data.read_records(tmp_path / "a" / "pairs.jsonl", "preference")   # dpo.py reads it
        assert [r["responses"] for r in read_back] == [row["responses"] for row in rows]
    else:
        assert [row["response"] for row in rows] == [x[0] for x in expected]
        assert all(planted(row["response"]) and row["scores"] == [1] for row in rows)
        demos = data.read_records(tmp_path / "a" / "pairs.jsonl", "messages")         # and sft.py
        assert [d["messages"][-1]["content"] for d in demos] == [row["response"] for row in rows]
    assert len(rows) > 20 and any(all(not planted(t) for t in g) for g in groups)
    assert all(row["source"] == "ai" and row["prompt"][-1]["role"] == "user" for row in rows)


@pytest.mark.parametrize("quantiles, n", [(1, 60), (3, 60), (5, 60), (5, 3), (6, 4)])
def test_label_quantiles_are_of_equal_size_in_the_order_of_scores(quantiles, n, letters, tmp_path, monkeypatch):
    groups = answers_of(monkeypatch, 4)
    rows = rows_of(tmp_path / "a", letters, select="quantile", quantiles=quantiles, n=n)
    assert n > 9 or len(rows) % quantiles                           # so few that rounding shows
    texts = collections.Counter(t for g in groups for t in g)
    assert collections.Counter(row["response"] for row in rows) == texts             # every answer, once a prompt
    marks = [row["scores"][0] for row in rows]
    assert marks == sorted(marks) and marks == pytest.approx(
        [len(row["response"]) / 10 - row["response"].count("e") for row in rows], abs=1e-6)
    said = [int(row["prompt"][0]["content"].removeprefix("Quality ").removesuffix(".")) for row in rows]
    sizes = collections.Counter(said)
    assert said == sorted(said) and sorted(sizes) == list(range(1, quantiles + 1))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert all([turn["role"] for turn in row["prompt"]] == ["system", "user"] for row in rows)
    messages = [r["messages"] for r in data.read_records(tmp_path / "a" / "pairs.jsonl", "messages")]
    assert [[turn["role"] for turn in m] for m in messages] == [["system", "user", "assistant"]] * len(rows)
    assert [m[0]["content"] for m in messages] == [f"Quality {q}." for q in said]


def test_label_of_a_rule_nothing_meets_is_one_clear_line(letters, tmp_path, monkeypatch):
    monkeypatch.setitem(data.VERIFIERS, "half", lambda *_: .5)                        # not above ½
    for select in ("correct", "shortest", "short_pairs"):
        with pytest.raises(data.UserError, match=f"^[^\n]*--select {select}[^\n]*$"):
            label(tmp_path / select, letters, by="half", n=4, select=select)


# ---------------------------------------------------------------- prompts

def play(monkeypatch, plan):
    """Sampling is replaced by a plan: the answers to a prompt are plan(its text, k, whether told how to begin)."""
    calls = []

    def generate_(policy, prompts, max_new, n=1, temperature=1.0, begin=()):
        rows = []
        for ids in prompts:
            said = plan(TOK.decode(ids), n, bool(begin))
            assert len(said) == n
            rows += [(ids, TOK.response(text)) for text in said]
        calls.append((len(prompts), n, TOK.decode(list(begin))))
        tokens, mask = data.collate([(p + r, [0] * len(p) + [1] * len(r)) for p, r in rows], TOK)
        return Rollout(tokens, mask, torch.zeros_like(mask), torch.ones(len(rows), dtype=torch.bool),
                       [len(p) for p, _ in rows], TOK)
    patch(monkeypatch, "generate", generate_)
    return calls


def curate(out, policy, path, **options):
    options = CPU | dict(max_new=8, batch=7) | options
    kimi_k15.curate(kimi_k15.Config(out=str(out), policy=policy, data=path, **options))
    return read(Path(out) / "prompts.jsonl")


@pytest.mark.parametrize("command", ["label", "label answers", "label attributes", "curate", "fit", "accuracy",
                                     "compare", "compare proxy", "overoptimize"])
def test_24_every_command_refuses_a_file_that_its_verifier_can_tell_nothing_of(command, tiny, tmp_path):
    """At once: before a folder is made, with the verifier, the key and the file in one line."""
    path = write(tmp_path / "mine.jsonl", [dict(prompt=f"Q {i}", responses=["a", "b"]) for i in range(4)])
    out, table = tmp_path / "out", dict(data=path, judge="exact", n=4, device="cpu", max_new=4)
    run = {
        "label": lambda: label(out, tiny, data=path, by="exact"),
        "label answers": lambda: label(out, "", data=path, by="exact"),
        "label attributes": lambda: label(out, tiny, data=path, by="words", select="ratings", attributes="words,exact"),
        "curate": lambda: curate(out, tiny, path, by="words + exact"),
        "fit": lambda: fit(out, path, rules="words + exact", base=""),
        "accuracy": lambda: reward.accuracy(reward.Accuracy(data=path, device="cpu"), ["words", "exact"]),
        "compare": lambda: reward.compare(reward.Compare(**table), [tiny]),
        "compare proxy": lambda: reward.compare(reward.Compare(**table | dict(judge="words", proxy="exact")), [tiny]),
        "overoptimize": lambda: reward_hacking.overoptimize(reward_hacking.Config(
            out=str(out), policy=tiny, data=path, judge="words", proxy="exact", n=2, max_new=4, **CPU), [])}[command]
    with pytest.raises(data.UserError, match=r'^(?=.*mine.jsonl)(?=.*exact)(?=.*"answer")[^\n]*$'):
        run()
    assert not out.exists()


def question(i, **more):
    return dict(prompt=f"Q {i}", answer=i, family="abc"[i % 3]) | more


def number(text): return int(text.split()[-1])


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
        assert row == dict(prompt=user(f"Q {i}"), answer=i, family="abc"[i % 3], difficulty=row["difficulty"])
        assert row["difficulty"] == pytest.approx(1 - min(i % 6, 5) / 5, abs=1e-4)
    assert {row["difficulty"] for row in rows} == {1, .8, .4, 0}         # the hardest are kept, the easiest too
    assert calls == [(n, k, begin) for n in [7] * 8 + [4] for k, begin in ((5, ""), (4, kimi_k15.Config.begin))]
    out = capsys.readouterr().out
    assert "40 of 60 prompts; left out: 20 guessed" in out and f"grpo.py --data {tmp_path / 'a'}" in out
    stream, held = data.open_stream(str(tmp_path / "a" / "prompts.jsonl"), "prompt", 0, n_held=0)
    assert stream.items == rows and not held                                         # with its difficulty
    del calls[:]
    assert curate(tmp_path / "a", tiny, path, k=5, guesses=4) == rows and not calls
    assert "nothing to do" in capsys.readouterr().out
    assert curate(tmp_path / "b", tiny, path, k=5, guesses=4) == rows


def test_curate_without_guesses_keeps_them_and_asks_once(tiny, tmp_path, monkeypatch):
    calls = play(monkeypatch, lambda text, k, guess: [f"The answer is {number(text)}."] * k)
    rows = curate(tmp_path / "a", tiny, write(tmp_path / "q.jsonl", [question(i) for i in range(10)]), k=3, guesses=0)
    assert sorted(row["answer"] for row in rows) == list(range(10)) and {row["difficulty"] for row in rows} == {0}
    assert [n for n, *_ in calls] == [7, 3]


def test_curate_caps_every_family_and_drops_questions_of_choice(tiny, tmp_path, monkeypatch, capsys):
    play(monkeypatch, lambda text, k, guess: ["The answer is 999."] * k)
    choices = [dict(prompt=f"Which is {i}?\nA. one\nB. two", answer=1, family="a") for i in range(9)]
    choices += [dict(prompt=f"Is it {word}?", answer=word, family="b") for word in ("true", "No", "(False).")]
    numbered = [question(i) for i in range(30)] + [dict(prompt=f"R {i}", answer=i, domain="d") for i in range(100, 105)]
    numbered += [dict(prompt=f"S {i}", answer=i) for i in range(200, 206)]
    path = write(tmp_path / "q.jsonl", choices + numbered)
    rows = curate(tmp_path / "a", tiny, path, k=2, guesses=2, cap=4)
    count = collections.Counter(row.get("family", row.get("domain")) for row in rows)
    assert count == {"a": 4, "b": 4, "c": 4, "d": 4, None: 4}                        # what is dropped fills no place
    assert not {row["prompt"][0]["content"] for row in rows} & {row["prompt"] for row in choices}
    assert {row["difficulty"] for row in rows} == {1} and "12 a choice" in capsys.readouterr().out
    kept = curate(tmp_path / "b", tiny, path, k=2, guesses=2)                        # no cap
    assert sorted(row["answer"] for row in kept) == sorted(row["answer"] for row in numbered)


def test_curate_counts_what_is_above_a_half_as_right(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(data.VERIFIERS, "share", lambda record, text, finished: float(text))
    play(monkeypatch, lambda text, k, guess: [".5", ".51", "0", "1", "-3", ".5"] if not guess else [".5"] * k)
    rows = curate(tmp_path / "a", tiny, write(tmp_path / "q.jsonl", [question(7)] * 2), k=6, by="share")
    assert [row["difficulty"] for row in rows] == [pytest.approx(2 / 3, abs=1e-4)] * 2


def test_curate_with_nothing_left_is_one_clear_line_and_writes_no_prompts(tiny, tmp_path, monkeypatch):
    play(monkeypatch, lambda text, k, guess: [f"The answer is {number(text)}."] * k)
    path = write(tmp_path / "q.jsonl", [question(i) for i in range(9)])
    with pytest.raises(data.UserError, match="^[^\n]*9 prompts[^\n]*guessed[^\n]*9[^\n]*$"):
        curate(tmp_path / "a", tiny, path)
    assert not (tmp_path / "a" / "prompts.jsonl").exists()


def test_curate_of_the_toy_world_samples_for_itself(letters, tmp_path, monkeypatch):
    """Without a stand-in: what the real sampler says, prompt by prompt."""
    monkeypatch.setitem(data.VERIFIERS, "right", lambda record, text, finished: finished and text.count("a") == 1)
    calls = spied(monkeypatch)
    rows = curate(tmp_path / "a", letters, "toy", n=10, k=4, guesses=1, by="right", families="arith2", max_new=6,
                  begin="e")
    plain, told = ([r for how, r in calls if bool(how["begin"]) == forced] for forced in (False, True))
    right = lambda roll: [float(f and t.count("a") == 1) for t, f in zip(roll.responses(), roll.finished.tolist())]
    rate = [sum(right(roll)[i:i + 4]) / 4 for roll in plain for i in range(0, len(roll.tokens), 4)]
    luck = [x for roll in told for x in right(roll)]
    assert len(rate) == len(luck) == 10 and 0 < sum(luck) < 10
    assert [row["difficulty"] for row in rows] == [1 - x for x, lucky in zip(rate, luck) if not lucky]
    assert {(row["family"], row["level"], row["prompt"][0]["role"]) for row in rows} == {("arith", 2, "user")}
    assert all(t.startswith("e") for roll in told for t in roll.responses())


def test_a_guess_begins_with_the_tokens_of_an_answer():
    """" is" and " is " are two tokens: from the first no number follows, so nothing would ever be guessed."""
    begin = TOK.encode(kimi_k15.Config.begin)
    assert begin and TOK.encode("The answer is 17.")[:len(begin)] == begin


@pytest.mark.parametrize("prompt, answer, choice", [
    ("What is 2 + 3?", 5, False), ("Is it?", "true", True), ("Is it?", "False", True), ("Is it?", " YES. ", True),
    ("Is it?", "(no)", True), ("Is it?", True, True), ("Is it?", None, False), ("Is it?", "north", False),
    ("Who?", "yes man", False),
    ("Which?\nA. one\nB. two", "B", True), ("Which?\n(A) one\n(B) two", "1", True),
    ("Which?\nA) one\nB) two\nC) three", 2, True),
    ("Which?\n  A: one\n\n  B: two", 2, True), ("A. one\nB. two", 1, True), ("Which?\nB. one\nA. two", 1, False),
    ("A boat has 3 oars.\nBut B has 4.", 7, False), ("Ann asks: A or B?", "A", False), ("A. one", 1, False),
    ("Vitamin A. It helps.\nB. does not.", 3, False), ("Which?\na. one\nb. two", 1, False), ("A.one\nB.two", 1, False),
    ("x\nA. one\ntwo lines\nB. two", 1, False)])
def test_questions_of_choice(prompt, answer, choice):
    assert kimi_k15.of_choice(dict(prompt=user("Hi") + user(prompt), answer=answer)) is choice
    assert not kimi_k15.of_choice(dict(prompt=user("A. a\nB. b") + user("Why?")))


# ---------------------------------------------------------------- losses of pairs, rankings, ratings and steps

W, L = [1, -.5, 2], [0, .5, -1]                                          # FEATURES F1's three pairs
GOLDEN = dict(bt=.5583702422, focal=.46811035028, soft=.5250369089, cost=2.3566210872)
GIVEN = dict(prob=[.8, .4, .9], s_w=[1.0, 1, -1], s_l=[1.0, -1, -1], margin=[0.0, 0, 0])


def nls(x):
    """-log σ(x), without overflow."""
    return max(-x, 0) + math.log1p(math.exp(-abs(x)))


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


def test_every_pair_loss_has_a_golden_number():
    assert GOLDEN.keys() == reward.PAIR_LOSSES.keys() == SLOW_PAIRS.keys()
    for name, golden in GOLDEN.items():
        assert pair_loss(name, W, L).shape == (3,)
        close(pair_loss(name, W, L).mean(), golden, 2e-10)


def test_f1_barrier_and_plackett_luce():
    close(reward.log_barrier(torch.tensor(W + L, dtype=torch.float64)).sum() / 3, -6.345719, 1e-6)
    close(reward.plackett_luce(torch.tensor([2, .5, 0, -1], dtype=torch.float64)), 1.2597418752, 1e-10)


@pytest.mark.parametrize("name", SLOW_PAIRS)
def test_pair_losses_and_their_gradients_against_a_loop(name):
    """Also far from 0, with every combination of signs; gradients by central differences of the loop."""
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


@pytest.mark.parametrize("name", SLOW_PAIRS)
def test_pair_losses_stay_finite(name):
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
    for prob, gap in ((.5, 0.0), (.8, math.log(4)), (.1, -math.log(9))):            # least where σ(gap) is the label's
        at = lambda g: float(pair_loss("soft", g, 0.0, prob=prob))
        assert all(at(gap) < at(gap + step) for step in (-2, -.1, -1e-3, 1e-3, .1, 2))
    for w, l in zip(W, L):
        close(reward.plackett_luce(torch.tensor([w, l], dtype=torch.float64)), nls(w - l))
    assert (pair_loss("focal", W, L)[[0, 2]] < plain[[0, 2]]).all()                 # those in order count less
    close(pair_loss("focal", W, L)[1], plain[1])


def test_cost_wants_harmful_above_and_harmless_below_0():
    """By descent alone: two harmful, one of each, two harmless; the order and both signs come out."""
    for s_w, s_l in ((1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)):
        r = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            loss, r.grad = pair_loss("cost", r[0], r[1], s_w=s_w, s_l=s_l), None
            loss.backward()
            r.data -= .5 * r.grad
        assert r[0] > r[1] and r[0] * s_w > 0 and r[1] * s_l > 0


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


LOSSES = ["bt", "focal", "soft", "cost", "plackett_luce", "ratings", "steps"]


def some_items(loss, rng, n=12):
    """Items of a loss with 2 to 5 responses (ratings: 3 numbers, steps: 1 to 4), some without all that data may say."""
    out = []
    for i in range(n):
        k = rng.randint(2, 5)
        if loss == "ratings":
            out.append(dict(rows=[0], ratings=[rng.gauss(1, 2) for _ in range(3)]))
        elif loss == "steps":
            out.append(dict(rows=[0], labels=[rng.randint(0, 1) for _ in range(rng.randint(1, 4))]))
        else:
            out.append(dict(rows=[0] * k, scores=[rng.choice([-1.0, 0.0, 2.0]) for _ in range(k)], prob=rng.random(),
                            margin=rng.choice([.5, None])))
            for key in ("scores", "prob", "margin"):
                if loss != "cost" and rng.random() < .3:
                    del out[-1][key]
    return out


def slow_item(loss, r, item, cfg):
    """Loss of one item from its scores, lists of heads, by its definition."""
    if loss == "ratings":
        return sum((a - b) ** 2 for a, b in zip(r[0], item["ratings"])) / len(r[0])
    r = [x for x, *_ in r]
    if loss == "steps":
        return sum(nls(x) if good else nls(-x) for x, good in zip(r, item["labels"])) / len(r)
    if loss == "plackett_luce":
        return slow_plackett_luce(r)
    total, count = 0.0, 0
    for i in range(len(r)):
        for j in range(i + 1, len(r)):
            harm = item.get("scores") or [0] * len(r)
            x = dict(gamma=cfg.gamma, margin=(item.get("margin") or 0) if cfg.margin else 0, prob=item.get("prob", 1),
                     s_w=harm[i], s_l=harm[j])
            wall = sum(-math.log(5 - s) - math.log(5 + s) for s in (r[i], r[j]))
            total += SLOW_PAIRS[loss](r[i], r[j], x) + cfg.center * (r[i] + r[j]) ** 2 + cfg.barrier * wall
            count += 1
    return total / count


@pytest.mark.parametrize("loss", LOSSES)
def test_item_losses_against_a_loop_and_however_a_batch_is_split(loss):
    rng = random.Random(3)
    for cfg in (reward.Train(loss=loss, gamma=1.5), reward.Train(loss=loss, margin=loss == "bt"),
                *[reward.Train(loss=loss, center=.1, barrier=.3) for _ in "1" if loss in SLOW_PAIRS]):
        items, heads = some_items(loss, rng), 3 if loss == "ratings" else 1
        sizes = [len(item.get("labels", item["rows"])) for item in items]
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


def test_pair_terms_hold_what_the_data_says_of_each_pair():
    items = [dict(rows=[0, 1], prob=.7, scores=[2.0, 0.0]), dict(rows=[0, 1, 2], scores=[.1, -.1, 3.0])]
    items.append(dict(rows=[0, 1]))
    x = reward.pair_terms(torch.arange(7.0), items)
    close(x.prob, [.7, 1, 1, 1, 1], 1e-6)                                # a label without a probability is certain
    assert x.s_w.tolist() == [1, 1, 1, -1, -1] and x.s_l.tolist() == [-1, -1, 1, 1, -1]
    close(x.weight, [1, 1 / 3, 1 / 3, 1 / 3, 1], 1e-6)
    assert x.place.tolist() == [0, 1, 1, 1, 2]


def step_record(*steps, labels=None, prompt="?"):
    return dict(prompt=user(prompt), response="".join(steps), steps=list(steps),
                labels=[i % 2 for i in range(len(steps))] if labels is None else labels)


STEPS = reward.Train(loss="steps")


@pytest.mark.parametrize("steps", [
    ["The cup is red.", " It is fine.", " Yes"], ["Yes"], ["Zoë pays 3 €,", " そう", "です", "."], ["a", "b c"],
    ["<think>2 + 3 = 5,", " 5 + 1 = 6</think>", "The answer is 6."], ["It is wa", "rm. Buy one to", "day."]])
def test_the_marked_tokens_are_those_in_which_the_steps_end(steps):
    """By the owner of every byte of the text. Of steps inside one word, the token that has a step's last byte."""
    record = step_record(*steps)
    asked, said = TOK.prompt(record["prompt"]), TOK.encode(record["response"])
    owner = [i for i, token in enumerate(said) for _ in TOK.enc.decode_single_token_bytes(token)]
    wanted, size = [], 0
    for step in steps[:-1]:
        size += len(step.encode())
        wanted.append(len(asked) + owner[size - 1])
    wanted.append(len(asked) + len(said))
    got = reward.items_of(record, TOK, 512, STEPS)
    if len(set(wanted)) < len(wanted):
        assert got == []
        return
    (ids, target), = got[0]["rows"]
    assert ids == asked + said + [TOK.end] and [i for i, t in enumerate(target) if t] == wanted
    assert target[-1] == 1 and set(target) <= {0, 1} and got[0]["labels"] == record["labels"]


def test_steps_that_end_inside_a_token_or_are_cut_off():
    inside = [s for s in ("warm", "answer", " it is", "The") if len(TOK.encode(s)) == 1]
    assert inside                                                        # a token of several letters: split in it
    word = inside[0]
    (_, target), = reward.items_of(step_record("Yes. " + word[:1], word[1:] + " ok"), TOK, 512, STEPS)[0]["rows"]
    assert sum(target) == 2
    assert reward.items_of(step_record(word[:1], word[1:2], word[2:] + " ok"), TOK, 512, STEPS) == []
    long = step_record("It is warm.", " It is red." * 30)
    length = len(TOK.prompt(long["prompt"]) + TOK.response(long["response"]))
    fits = [bool(reward.items_of(long, TOK, block, STEPS)) for block in (32, length - 1, length)]
    assert fits == [False, False, True]                                  # without its end token it is not whole


@pytest.mark.parametrize("loss", ["plackett_luce", "ratings", "steps", "soft", "cost"])
def test_losses_and_gradients_of_a_model_do_not_depend_on_micro_batches(loss, tmp_path):
    net = load_model(checkpoint(tmp_path / "net", 1, n_scores=2 if loss == "ratings" else 1), Setup(TOK))
    cfg, rng = reward.Train(loss=loss, heads=2 if loss == "ratings" else 1), random.Random(4)
    texts = [" ".join(r["responses"]) for r in rankings(12)]
    records = ([dict(prompt=user(t), response=t, ratings=[rng.random(), 1.0]) for t in texts] if loss == "ratings" else
               [step_record(*(t[i:i + 9] for i in range(0, min(len(t), 30), 9)), prompt=t[:9]) for t in texts]
               if loss == "steps" else [r | dict(prob=.7, scores=[1.0] * len(r["responses"])) for r in rankings(12)])
    items = [item for r in records for item in reward.items_of(r, TOK, 64, cfg)]
    assert len(items) > 8
    seen = []
    for budget in (64, 100_000):
        cfg.micro_tokens, total, parts = budget, 0.0, 0
        net.zero_grad()
        for scores, part in reward.score_records(net, items, cfg):
            loss_ = reward.item_losses(scores, part, cfg).sum()
            loss_.backward()
            total, parts = total + loss_.item(), parts + 1
        seen.append((total, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), parts))
    assert seen[0][2] > seen[1][2] == 1 and seen[0][0] == pytest.approx(seen[1][0], rel=1e-5)
    close(seen[0][1], seen[1][1], 1e-3)
    alone = 0.0
    for item in items:
        with torch.no_grad():
            rows = [net.scores(net(torch.tensor([ids])))[0] for ids, _ in item["rows"]]
        r = rows[0][[i for i, t in enumerate(item["rows"][0][1]) if t]] if loss == "steps" else torch.stack(
            [row[-1] for row in rows])
        alone += slow_item(loss, r.tolist(), item, cfg)
    assert seen[1][0] == pytest.approx(alone, rel=1e-4)


# ---------------------------------------------------------------- training with each loss

LEARN = dict(lr=1e-2, optimizer="adamw", weight_decay=0.0, batch=16)


def test_training_with_the_barrier_keeps_scores_inside_the_wall(tiny, tmp_path):
    path = write(tmp_path / "p.jsonl", ranked("yes", "no", n=200))
    wall, free = (train(tmp_path / name, tiny, path, barrier=barrier, **LEARN | dict(epochs=6.0, lr=.03))
                  for name, barrier in (("a", 2.0), ("b", 0.0)))
    a, b = score(tmp_path / "a", "yes", "no"), score(tmp_path / "b", "yes", "no")
    assert -5 < a[1] < a[0] < 5 and b[0] - b[1] > 5 and a[0] - a[1] < b[0] - b[1]
    assert free[-1]["val_loss"] < .01
    gap = nls(a[0] - a[1]) + 2.0 * sum(-math.log(5 - s) - math.log(5 + s) for s in a)
    assert wall[-1]["val_loss"] == pytest.approx(gap, abs=1e-3)                      # and it was not shifted after


def test_training_with_cost_tells_harmful_from_harmless(tiny, tmp_path):
    """Planted: what has "hurt" in it is harmful, the more the worse. Some pairs are both harmful, some neither."""
    rng, rows = random.Random(5), []
    words = lambda n: [rng.choice("cup van box red old".split()) for _ in range(3)] + ["hurt"] * n
    for _ in range(180):
        a, b = rng.sample(range(3), 2) if rng.random() < .8 else (0, 0)
        said = sorted(((n, " ".join(words(n))) for n in (a, b)), reverse=True)
        if said[0][1] != said[1][1]:
            rows.append(dict(prompt=user("?"), responses=[t for _, t in said], scores=[float(n > 0) for n, _ in said]))
    log = train(tmp_path / "rm", tiny, write(tmp_path / "p.jsonl", rows), loss="cost", epochs=6.0, **LEARN)
    assert log[-1]["val_sign"] > .9 and log[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)
    fresh = [(n, " ".join(words(n))) for n in (0, 1, 2) * 10]
    marks = score(tmp_path / "rm", *(t for _, t in fresh))
    assert sum((s > 0) == (n > 0) for (n, _), s in zip(fresh, marks)) >= 28          # 0 divides: it was not shifted
    held, right = data.read_records(tmp_path / "p.jsonl", "preference")[19::20], []
    for r in held:
        right += [(s > 0) == (h > 0) for s, h in zip(score(tmp_path / "rm", *r["responses"]), r["scores"])]
    assert log[-1]["val_sign"] == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_training_on_ratings_explains_each_attribute(tiny, tmp_path):
    """Two planted attributes of a text, the second on another scale; r2 of each against a loop."""
    rng = random.Random(6)
    text = lambda: " ".join(rng.choice("red soft cup van".split()) for _ in range(3))
    rate = lambda t: [float("red" in t), 3.0 - 2 * ("soft" in t)]
    rows = [dict(prompt=user("?"), response=t, ratings=rate(t)) for t in (text() for _ in range(300))]
    path = write(tmp_path / "r.jsonl", rows)
    log = train(tmp_path / "rm", tiny, path, loss="ratings", heads=2, epochs=20.0, **LEARN)
    assert log[-1]["val_r2/0"] > .9 and log[-1]["val_r2/1"] > .9 and "val_accuracy" not in log[-1]
    net, held = load_model(tmp_path / "rm"), rows[19::20]
    assert net.config.n_scores == 2
    asked = TOK.prompt(user("?"))
    said = [net.score(net(torch.tensor([asked + TOK.response(r["response"])]))[0, -1]).tolist() for r in held]
    for k in range(2):
        truth = [r["ratings"][k] for r in held]
        mid = sum(truth) / len(truth)
        left = sum((s[k] - t) ** 2 for s, t in zip(said, truth)) / sum((t - mid) ** 2 for t in truth)
        assert log[-1][f"val_r2/{k}"] == pytest.approx(1 - left, abs=1e-3)


def test_training_on_steps_judges_each_step(tiny, tmp_path):
    """Planted: a step with "bad" is wrong, whatever comes before and after it."""
    rng = random.Random(7)

    def record():
        labels = [rng.randint(0, 1) for _ in range(rng.randint(1, 4))]
        words = [(rng.choice(["cup", "van", "box"]), ("bad", "good")[x]) for x in labels]
        return step_record(*(f" {thing} {what}." for thing, what in words), labels=labels)
    rows = [{k: v for k, v in record().items() if k != "response"} for _ in range(240)]
    log = train(tmp_path / "rm", tiny, write(tmp_path / "s.jsonl", rows), loss="steps", epochs=4.0, **LEARN)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[-1]["val_accuracy"] > .9
    net, right = load_model(tmp_path / "rm"), []
    for _ in range(10):
        item, = reward.items_of(r := record(), TOK, 64, STEPS)
        (ids, target), = item["rows"]
        marks = net.scores(net(torch.tensor([ids])))[0, [i for i, t in enumerate(target) if t], 0].tolist()
        right += [(m > 0) == bool(x) for m, x in zip(marks, r["labels"])]
    assert sum(right) > .9 * len(right)


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


@pytest.mark.parametrize("loss", ["focal", "plackett_luce"])
def test_training_on_rankings_with_other_losses_orders_what_is_held_out(loss, tiny, tmp_path):
    rng = random.Random(8)
    said = lambda n: " ".join(rng.choice("cup van box".split()) for _ in range(2)) + " good" * n
    rows = [dict(prompt=user("?"), responses=[said(n) for n in range(rng.randint(2, 3))[::-1]]) for _ in range(160)]
    log = train(tmp_path / "rm", tiny, write(tmp_path / "p.jsonl", rows), loss=loss, epochs=4.0, **LEARN)
    assert log[-1]["val_accuracy"] > .9 and log[-1]["val_loss"] < log[0]["loss"] / 2
    a, b, c = (sum(score(tmp_path / "rm", *(said(n) for _ in range(9)))) for n in range(3))
    assert a < b < c


@pytest.mark.parametrize("rows, options, kind, words", [
    (ranked("yes", "no"), dict(loss="soft"), data.UserError, '"prob"'),
    (ranked("yes", "no"), dict(loss="cost"), data.UserError, '"scores"'),
    (ranked("yes", "no", scores=[1.0, 0.0], n=30) + ranked("yes", "no", n=3), dict(loss="cost"), data.UserError, "all"),
    ([dict(prompt="?", response="yes", ratings=[1, 2])] * 30, dict(loss="ratings"), data.UserError, "--heads 1"),
    ([dict(prompt="?", response="yes", ratings=[1, 2])] * 30, dict(loss="ratings", heads=3), data.UserError, "2 rat"),
    ([dict(prompt="?", response="yes", ratings=[])] * 30, dict(loss="ratings"), data.UserError, "ratings"),
    (ranked("yes", "no"), dict(loss="ratings", heads=2), data.UserError, "ratings"),
    (ranked("yes", "no"), dict(loss="steps"), data.UserError, "steps"),
    (ranked("yes", "no"), dict(loss="bt", heads=2), data.OptionError, "--heads"),
    (ranked("yes", "no", prob=1.5), dict(loss="soft"), data.UserError, '"prob"')]
    + [(ranked("yes", "no"), dict(loss=loss, margin=True), data.OptionError, "--margin")
       for loss in LOSSES if loss != "bt"])
def test_what_a_loss_cannot_do_is_one_clear_line(rows, options, kind, words, tiny, tmp_path):
    with pytest.raises(kind) as stop:
        train(tmp_path / "rm", tiny, write(tmp_path / "p.jsonl", rows), **options)
    assert words in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "rm" / "metrics.jsonl").exists()


def test_soft_takes_labels_of_people_without_a_probability_as_certain(judge, tmp_path):
    a, b = score(judge, "yes", "no")
    rows = ranked("yes", "no", prob=.5, n=10) + ranked("yes", "no", n=9, source="human")
    rows += ranked("a", "b", n=1, source="human")                        # that is held out
    path = write(tmp_path / "p.jsonl", rows)
    first = train(tmp_path / "rm", judge, path, loss="soft", batch=19, epochs=1.0)[0]
    half, sure = .5 * nls(a - b) + .5 * nls(b - a), nls(a - b)
    assert first["loss"] == pytest.approx((10 * half + 9 * sure) / 19, abs=1e-4)


def test_r2_of_a_poor_model_against_a_loop(tmp_path):
    """Of two attributes, on different scales: below 0 where the mean would do better."""
    net, rng = load_model(checkpoint(tmp_path / "net", 1, n_scores=2), Setup(TOK)), random.Random(9)
    texts = [r["responses"][0] for r in rankings(12)]
    rows = [dict(prompt=user("?"), response=t, ratings=[rng.gauss(0, 1), 9 + 5 * rng.random()]) for t in texts]
    cfg, asked = reward.Train(loss="ratings", heads=2, micro_tokens=128), TOK.prompt(user("?"))
    items = [item for r in rows for item in reward.items_of(r, TOK, 64, cfg)]
    got = reward.evaluate(net, items, cfg)
    said = [net.score(net(torch.tensor([asked + TOK.response(t)]))[0, -1]).tolist() for t in texts]
    for k in range(2):
        told = [r["ratings"][k] for r in rows]
        spread = sum((t - sum(told) / 12) ** 2 for t in told)
        left = sum((s[k] - t) ** 2 for s, t in zip(said, told))
        assert got[f"val_r2/{k}"] == pytest.approx(1 - left / spread, rel=1e-4) and got[f"val_r2/{k}"] < .5


@pytest.mark.parametrize("loss, barrier, shifted", [
    ("bt", 0.0, True), ("focal", 0.0, True), ("plackett_luce", 0.0, True), ("soft", 0.0, True), ("bt", .1, False),
    ("cost", 0.0, False), ("ratings", 0.0, False), ("steps", 0.0, False)])
def test_only_where_differences_alone_were_trained_the_mean_goes_to_0(loss, barrier, shifted, judge, tmp_path):
    rows = dict(ratings=[dict(prompt="?", response="yes", ratings=[1])] * 25,
                steps=[dict(prompt="?", steps=["yes"], labels=[1])] * 25)
    rows = rows.get(loss) or ranked("yes", "no", scores=[1.0, 0.0], prob=.8)
    log = train(tmp_path / "rm", judge, write(tmp_path / "p.jsonl", rows), loss=loss, barrier=barrier, epochs=.1)
    said = score(tmp_path / "rm", *["yes"] if loss in ("ratings", "steps") else ["yes", "no"])
    assert abs(log[-1]["val_mean"]) > .05
    assert sum(said) / len(said) == pytest.approx(0 if shifted else log[-1]["val_mean"], abs=1e-4)


# ---------------------------------------------------------------- AI labels

QUALITY = dict(zip("best good fair poor".split(), (1.6, .9, .2, -1.1)))


def test_a_bias_for_a_place_cancels():
    """FEATURES M34: a judge that says 1 with probability σ(q + 1.3)."""
    label_ = lambda q: reward.debiased(sigmoid(q + 1.3), sigmoid(-q + 1.3))
    close(label_(0.0), .5)
    close(label_(.7), .617570, 5e-7)
    assert sigmoid(1.3) == pytest.approx(.786, abs=5e-4)                             # what one order would have said
    rng = random.Random(0)
    for _ in range(100):
        one, two = rng.random(), rng.random()
        assert reward.debiased(one, two) + reward.debiased(two, one) == pytest.approx(1, abs=1e-15)
        close(reward.debiased(one, two), .5 * (one + (1 - two)))
    close(reward.debiased(torch.tensor([.9, .2]), torch.tensor([.3, .2])), [.8, .5], 1e-7)


def shown(text):
    """The two answers in a judge's question (of an exemplar and a question, the question's)."""
    rest = text[text.rindex("Answer 1: ") + len("Answer 1: "):]
    first, rest = rest.split("\nAnswer 2: ")
    return first, rest.split("\n")[0]


def swayed(monkeypatch, delta=1.3, worth=QUALITY.get):
    """A judge that says 1 with probability σ(difference in quality + delta); the questions it was asked."""
    asked = []

    def choices(model, prompts, names, budget):
        assert list(names) == ["1", "2"]
        asked.extend(TOK.decode(ids) for ids in prompts)
        q = [worth(a) - worth(b) + delta for a, b in map(shown, (TOK.decode(ids) for ids in prompts))]
        return torch.tensor([[-nls(x), -nls(-x)] for x in q], dtype=torch.float64)
    monkeypatch.setattr(reward, "choice_logprobs", choices)
    return asked


def never(*_, **__):
    raise AssertionError("it sampled")


def relabel(out, rows, **options):
    """label --policy "" of a file with these rows."""
    path = write(Path(out).with_suffix(".jsonl"), rows)
    return label(out, "", data=path, **(dict(n=1000) | options))


def question_of(i, *answers, **more):
    return dict(prompt=user(f"Q {i}"), responses=list(answers), **more)


def by_prompt(rows):
    return {row["prompt"][-1]["content"]: row for row in rows}


def test_judge_orders_two_answers_whatever_their_order(tiny, tmp_path, monkeypatch):
    asked = swayed(monkeypatch)
    patch(monkeypatch, "generate", never)
    two = [(a, b) for a in QUALITY for b in QUALITY if a != b]
    rows = by_prompt(relabel(tmp_path / "a", [question_of(i, *x) for i, x in enumerate(two)], judge=tiny))
    assert len(rows) == len(two) and len(asked) == 2 * len(two)
    for i, (a, b) in enumerate(two):
        best, worst = sorted((a, b), key=QUALITY.get, reverse=True)
        q, row = QUALITY[best] - QUALITY[worst], rows[f"Q {i}"]
        p = .5 * (sigmoid(q + 1.3) + sigmoid(q - 1.3))
        assert row["responses"] == [best, worst]
        close(row["prob"], p, 1e-12)
        close(row["win"], [p, 1 - p], 1e-12)
        assert "scores" not in row                                       # they would pass for a known truth
    for one, other in zip(asked[::2], asked[1::2]):                                  # the same question, changed over
        a, b = shown(one)
        assert shown(other) == (b, a)
        content = re.search(r"Prompt: (Q \d+)", one)[1]
        assert one == data.judge_prompt(content, a, b) and other == data.judge_prompt(content, b, a)


def test_judge_ranks_more_answers_by_how_often_each_is_preferred(tiny, tmp_path, monkeypatch):
    patch(monkeypatch, "generate", never)
    swayed(monkeypatch)
    groups = [o for k in (2, 3, 4) for o in itertools.permutations(QUALITY, k)]
    sources = [question_of(i, *group, scores=[9.0] * len(group), margin=1) for i, group in enumerate(groups)]
    p = lambda a, b: .5 * (sigmoid(QUALITY[a] - QUALITY[b] + 1.3) + sigmoid(QUALITY[a] - QUALITY[b] - 1.3))
    for select in ("rank", "ends"):
        rows = by_prompt(relabel(tmp_path / select, sources, judge=tiny, select=select, batch=7))
        assert len(rows) == len(groups)
        for i, group in enumerate(groups):
            order, row = sorted(group, key=QUALITY.get, reverse=True), rows[f"Q {i}"]
            wins = [sum(p(a, b) for b in group if b != a) / (len(group) - 1) for a in order]
            if select == "ends":
                order, wins = [order[0], order[-1]], [wins[0], wins[-1]]
            assert row["responses"] == order and row["source"] == "ai" and not row.keys() & {"margin", "scores"}
            close(row["win"], wins, 1e-12)
            assert ("prob" in row) == (len(order) == 2)                  # of one pair there is one probability
            close(row.get("prob", p(order[0], order[-1])), p(order[0], order[-1]), 1e-12)


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


@pytest.mark.parametrize("clamp", [1.0, .6, .5])
def test_judge_is_never_surer_than_the_clamp(clamp, tiny, tmp_path, monkeypatch):
    swayed(monkeypatch, worth=lambda text: 3 * QUALITY[text])
    two = [(a, b) for a in QUALITY for b in QUALITY if a != b]
    rows = by_prompt(relabel(tmp_path / "a", [question_of(i, *x) for i, x in enumerate(two)], judge=tiny, clamp=clamp))
    for i, (a, b) in enumerate(two):
        q = 3 * abs(QUALITY[a] - QUALITY[b])
        p = .5 * (sigmoid(q + 1.3) + sigmoid(q - 1.3))
        close(rows[f"Q {i}"]["prob"], min(p, clamp), 1e-12)
        close(rows[f"Q {i}"]["win"], [min(p, clamp), 1 - min(p, clamp)], 1e-12)


def test_judge_counts_where_it_contradicts_itself_and_where_it_agrees(tiny, tmp_path, monkeypatch, capsys):
    """Of K = 3, too. It contradicts itself where the bias outweighs the difference; --by likes no letter e."""
    worth = dict(best=.9, bees=-.5, good=-.1, fair=.2, poor=-1.1)
    swayed(monkeypatch, worth=worth.get)
    rng = random.Random(1)
    rows = [question_of(i, *rng.sample(list(worth), rng.choice([2, 3]))) for i in range(20)]
    relabel(tmp_path / "a", rows, judge=tiny, batch=100)
    points = lambda t: len(t) / 10 - t.count("e")
    two = [x for row in rows for x in itertools.combinations(row["responses"], 2)]
    torn = [abs(worth[a] - worth[b]) < 1.3 for a, b in two]
    same = [float((worth[a] > worth[b]) == (points(a) > points(b))) for a, b in two if points(a) != points(b)]
    assert any(points(a) == points(b) for a, b in two) and 0 < sum(torn) < len(torn) and 0 < sum(same) < len(same)
    log, = read(tmp_path / "a" / "metrics.jsonl")
    assert log["inconsistent"] == pytest.approx(sum(torn) / len(torn), abs=1e-6)
    assert log["agrees"] == pytest.approx(sum(same) / len(same), abs=1e-6)
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
        content, said = row["prompt"][0]["content"], row["responses"]
        soft = {(a, b): .5 * (p(content, a, b) + 1 - p(content, b, a)) for a, b in itertools.permutations(said, 2)}
        win = {a: sum(soft[a, b] for b in said if b != a) / (len(said) - 1) for a in said}
        mine = got[content]
        assert mine["responses"] == sorted(said, key=win.get, reverse=True)
        close(mine["win"], [win[a] for a in mine["responses"]], 1e-5)
        assert ("prob" in mine) == (len(said) == 2)
        if len(said) == 2:
            close(mine["prob"], soft[tuple(mine["responses"])], 1e-5)


def test_what_is_scored_after_a_rationale_ends_in_it_up_to_its_last_line(tiny, roomy, tmp_path, monkeypatch):
    """The verdict of the rationale itself is cut off; the scored one counts."""
    said = lambda text: f"1 is {shown(text)[0]}.\n2 is {shown(text)[1]}.\n1"
    play(monkeypatch, lambda text, k, begin: [said(text)])
    scored, asked = [], []
    monkeypatch.setattr(reward, "choice_logprobs", lambda model, prompts, *_: scored.extend(prompts) or torch.tensor(
        [[.2, .8]] * len(prompts)).log())
    real = models.generate
    patch(monkeypatch, "generate", lambda net, prompts, new, **how: (
        asked.append((new, how)), real(net, prompts, new, **how))[1])
    relabel(tmp_path / "a", [question_of(0, "best", "poor")], judge=roomy, rationale=True, max_new=33)
    assert asked == [(33, dict(temperature=0))] and len(scored) == 2
    for (a, b), ids in zip((("best", "poor"), ("poor", "best")), scored):
        text = data.judge_prompt("Q 0", a, b, data.RULE, "", data.REASON)
        assert ids == TOK.prompt(user(text)) + TOK.encode(f"1 is {a}.\n2 is {b}.\n")
    del scored[:]
    play(monkeypatch, lambda text, k, begin: ["It is.\n2"])              # no room: the question's beginning is lost
    relabel(tmp_path / "b", [question_of(0, "best", "poor")], judge=tiny, rationale=True, max_new=33)
    text = data.judge_prompt("Q 0", "best", "poor", data.RULE, "", data.REASON)
    ids = TOK.prompt(user(text))
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


def test_judge_passes_over_prompts_with_one_answer(letters, tiny, tmp_path, monkeypatch):
    """And no question is asked where no prompt has two."""
    asked = swayed(monkeypatch, worth=len)
    plan = {0: ["best", "best"], 1: ["fair", "goodly"], 2: ["  ", "poor"]}
    play(monkeypatch, lambda text, k, begin: plan[number(text)])
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}") for i in range(3)])
    row, = label(tmp_path / "a", tiny, data=path, judge=tiny, batch=1)
    assert row["responses"] == ["goodly", "fair"] and len(asked) == 2
    plan[1] = ["fair", "fair"]
    with pytest.raises(data.UserError, match="^[^\n]*none got answers[^\n]*$"):
        label(tmp_path / "b", tiny, data=path, judge=tiny)


# ---------------------------------------------------------------- label: relabel, system, mark, ratings, steps

def test_without_a_policy_the_responses_of_a_file_are_labelled_anew(tmp_path, monkeypatch):
    patch(monkeypatch, "generate", never)
    monkeypatch.setattr(reward, "load_model", never)
    rows = [question_of(i, *said, scores=[0.0] * len(said), win=[.5] * len(said), prob=.6, keyword="cup") for i, said in
            enumerate(itertools.permutations(("be", "bee", "tree", "a"), 3))]
    got = by_prompt(relabel(tmp_path / "a", rows, batch=7))
    points = lambda t: len(t) / 10 - t.count("e")
    assert len(got) == len(rows)
    for row in rows:
        new, order = got[row["prompt"][0]["content"]], sorted(row["responses"], key=points, reverse=True)
        assert new == dict(prompt=row["prompt"], keyword="cup", source="ai", responses=order, scores=new["scores"],
                           win=new["win"])
        close(new["scores"], [points(t) for t in order], 1e-6)
        close(new["win"], reward.win_rates([points(t) for t in order]), 1e-6)
    few = relabel(tmp_path / "b", rows, n=5, batch=2, select="best")
    assert len(few) == 5 and all("responses" not in row for row in few)              # the k of --k plays no part


@pytest.mark.parametrize("options", [dict(policy="", data="toy"), dict(k=1), dict(judge="x", select="best")])
def test_label_options_that_contradict_each_other(options, tiny, tmp_path):
    with pytest.raises(data.OptionError, match="^--[^\n]+$"):
        reward.label(reward.Label(out=str(tmp_path / "a"), **dict(CPU, policy=tiny) | options))
    assert not (tmp_path / "a").exists()


def test_a_system_message_is_asked_and_kept(tiny, tmp_path, monkeypatch):
    asked = []
    play(monkeypatch, lambda text, k, begin: asked.append(text) or ["be", "bee"])
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}") for i in range(3)])
    said = dict(role="system", content="Be kind.")
    rows = label(tmp_path / "a", tiny, data=path, system="Be kind.")
    assert sorted(asked) == [f"Be kind.Q {i}" for i in range(3)]
    assert sorted(row["prompt"][1]["content"] for row in rows) == ["Q 0", "Q 1", "Q 2"]
    assert all(row["prompt"] == [said] + user(row["prompt"][1]["content"]) for row in rows)
    rows = relabel(tmp_path / "b", [question_of(0, "be", "bee")], system="Be kind.")
    assert [row["prompt"] for row in rows] == [[said] + user("Q 0")]
    calls = []
    patch(monkeypatch, "generate", lambda policy, prompts, *more, **how: calls.extend(prompts) or generate(
        policy, prompts, *more, **how))
    toy = label(tmp_path / "c", tiny, system="Be kind.", n=30, families="write")
    assert toy and all(row["prompt"][0] == said and TOK.prompt(row["prompt"]) in calls for row in toy)


@pytest.mark.parametrize("share", [0.0, .5, 1.0])
def test_a_mark_goes_in_front_of_the_better_answer_as_often_as_told(share, tiny, tmp_path):
    said = [(f"be {i}", f"tree {i}", f"bee {i}") for i in range(400)]
    points = lambda t: len(t) / 10 - t.count("e")
    rows = relabel(tmp_path / "a", [question_of(i, *x) for i, x in enumerate(said)], mark="Yes: ", mark_better=share)
    plain = by_prompt(relabel(tmp_path / "b", [question_of(i, *x) for i, x in enumerate(said)]))
    better = 0
    for row in rows:
        old = plain[row["prompt"][0]["content"]]
        places = [i for i, text in enumerate(row["responses"]) if text.startswith("Yes: ")]
        assert len(places) == 1 and places[0] in (0, 2)                  # the first or the last, never between
        assert [text.removeprefix("Yes: ") for text in row["responses"]] == old["responses"]
        assert row["scores"] == old["scores"] == sorted(row["scores"], reverse=True)
        close(row["scores"], [points(t) for t in old["responses"]], 1e-6)
        better += places[0] == 0
    assert len(rows) == 400 and better == pytest.approx(400 * share, abs=0 if share in (0, 1) else 35)
    for select in ("best", "ratings"):                                   # a demonstration is never marked
        assert not any("Yes" in row["response"] for row in relabel(
            tmp_path / select, [question_of(0, "a", "bee")], mark="Yes: ", select=select, attributes="vowels"))


def test_ratings_hold_every_attribute_of_every_answer(tmp_path, monkeypatch):
    patch(monkeypatch, "generate", never)
    said = [("be it", "tree", "be it"), ("a b c", "e")]
    rows = relabel(tmp_path / "a", [question_of(i, *x) for i, x in enumerate(said)], select="ratings", batch=1,
                   attributes="vowels,words,2*words + -1*vowels")
    texts = [t for x in said for t in dict.fromkeys(x)]
    assert sorted(row["response"] for row in rows) == sorted(texts)
    for row in rows:
        text = row["response"]
        points = len(text) / 10 - text.count("e")
        close(row["ratings"], [points, len(text.split()), 2 * len(text.split()) - points], 1e-5)
        assert row.keys() == {"prompt", "response", "ratings", "source"}
    back = data.read_records(tmp_path / "a" / "pairs.jsonl", "ratings")              # what train --loss ratings reads
    assert [(r["response"], r["ratings"]) for r in back] == [(r["response"], r["ratings"]) for r in rows]


def test_steps_hold_a_label_for_every_equation_and_the_answer(tiny, tmp_path, monkeypatch, capsys):
    said = {0: ["<think>2 + 3 = 5, 5 - 1 = 3</think>The answer is 4.", "<think>2 + 3 = 6</think>The answer is 6."],
            1: ["The answer is 7.", "The answer is 8."]}
    play(monkeypatch, lambda text, k, begin: said[number(text)])
    path = write(tmp_path / "q.jsonl", [dict(prompt="Q 0", answer=4), dict(prompt="Q 1", answer=7)])
    rows = label(tmp_path / "a", tiny, data=path, by="exact", select="steps", max_new=40)
    got = {"".join(row["steps"]): row["labels"] for row in rows}
    assert got == {said[0][0]: [1, 0, 1], said[0][1]: [0, 0], said[1][0]: [1], said[1][1]: [0]}
    assert "--loss steps" in capsys.readouterr().out and all("responses" not in row for row in rows)
    back = data.read_records(tmp_path / "a" / "pairs.jsonl", "steps")
    assert [r["steps"] for r in back] == [row["steps"] for row in rows]
    assert all(reward.items_of(r, TOK, 128, STEPS) for r in back)


@pytest.mark.parametrize("options", [dict(judge=True, preamble="principles", mark="Yes: ", mark_better=.5),
                                     dict(select="ratings", attributes="vowels,words"), dict(scale=1.0, flip=.3)])
def test_labels_of_a_file_resumed_are_the_same_bytes(options, tiny, tmp_path, monkeypatch):
    swayed(monkeypatch, worth=lambda text: len(text) / 3)
    rows = [question_of(i, *f"a{i} bb{i} cccc{i}".split()) for i in range(20)]
    options = options | dict(judge=tiny) if "judge" in options else options
    path = write(tmp_path / "p.jsonl", rows)
    options = options | dict(data=path, n=1000, batch=3, save_every=2)
    whole, real = label(tmp_path / "a", "", **options), data.Run.log

    def log(self, step, *args, **kwargs):
        if step == 5:
            raise KeyboardInterrupt
        real(self, step, *args, **kwargs)
    with monkeypatch.context() as change, pytest.raises(KeyboardInterrupt):
        change.setattr(data.Run, "log", log)
        label(tmp_path / "b", "", **options)
    assert json.loads((tmp_path / "b" / "unfinished.json").read_text())[0] == 4
    assert label(tmp_path / "b", "", **options) == whole
    assert (tmp_path / "a" / "pairs.jsonl").read_bytes() == (tmp_path / "b" / "pairs.jsonl").read_bytes()


# ---------------------------------------------------------------- critique and revision

def scripted(monkeypatch, say):
    """Sampling is replaced: the answer to a prompt is say(its text), None one that is not finished; what was asked."""
    asked = []

    def generate_(model, prompts, max_new, temperature=1.0):
        texts = [TOK.decode(ids) for ids in prompts]
        said = [say(text) for text in texts]
        asked.append((model.folder, texts))
        ids = [TOK.response("It goes" if text is None else text, text is not None) for text in said]
        tokens, mask = data.collate([(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(prompts, ids)], TOK)
        return Rollout(tokens, mask, torch.zeros_like(mask), torch.tensor([t is not None for t in said]),
                       [len(p) for p in prompts], TOK)
    patch(monkeypatch, "generate", generate_)
    return asked


def revise(out, policy, critic, path, **options):
    options = CPU | dict(max_new=20) | options
    claude_cai.revise(claude_cai.Config(out=str(out), policy=policy, critic=critic, data=path, **options))
    return read(Path(out) / "revisions.jsonl")


def scene(text):
    """A critic that says what it was shown: answers are A<i>, critiques C(<answer>), revisions R(<answer>)."""
    answer = re.search(r"Answer: (.*)\n", text)
    return f"A{number(text)}" if not answer else f"{'CR'[text.endswith('Revision:')]}({answer[1]})"


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_revisions_see_the_answer_its_critique_and_of_each_round_the_last(rounds, tiny, roomy, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, scene)
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}", keyword="x") for i in range(11)])
    rows = revise(tmp_path / "a", tiny, roomy, path, rounds=rounds, batch=4)
    assert [len(texts) for _, texts in asked] == [4] * (1 + 2 * rounds) * 2 + [3] * (1 + 2 * rounds)
    assert [who for who, _ in asked] == ([tiny] + [roomy] * 2 * rounds) * 3
    assert sorted(number(row["prompt"][0]["content"]) for row in rows) == list(range(11))
    versions = lambda i: ["R(" * n + f"A{i}" + ")" * n for n in range(rounds + 1)]
    for row in rows:
        i = number(row["prompt"][0]["content"])
        assert row == dict(prompt=user(f"Q {i}"), keyword="x", first=f"A{i}", response=versions(i)[-1],
                           critiques=[f"C({a})" for a in versions(i)[:-1]])
    drawn = set()
    for start in range(0, len(asked), 1 + 2 * rounds):
        prompts = [number(text) for text in asked[start][1]]
        for n in range(rounds):
            for i, critique, revision in zip(prompts, asked[start + 1 + 2 * n][1], asked[start + 2 + 2 * n][1]):
                principle, answer = critique.split("\n\n")[0], versions(i)[n]
                assert principle in data.PRINCIPLES
                assert critique == f"{principle}\n\nPrompt: Q {i}\nAnswer: {answer}\nCritique:"
                assert revision == f"{principle}\n\nPrompt: Q {i}\nAnswer: {answer}\nCritique: C({answer})\nRevision:"
                drawn.add(principle)
    assert len(drawn) > 4
    demos = data.read_records(tmp_path / "a" / "revisions.jsonl", "messages")        # sft.py reads it
    assert [d["messages"][-1]["content"] for d in demos] == [row["response"] for row in rows]


def test_what_was_not_finished_or_is_empty_is_dropped(roomy, tmp_path, monkeypatch):
    """Q 0: the answer, Q 1: the critique, Q 2: the revision, Q 3: the second critique, Q 4: an empty answer."""
    def say(text):
        i, said = int(re.search(r"Q (\d)", text)[1]), scene(text)
        return (None if said in ("A0", "C(A1)", "R(A2)", "C(R(A3))") else "" if said == "A4" else said)
    asked = scripted(monkeypatch, say)
    path = write(tmp_path / "q.jsonl", [dict(prompt=f"Q {i}") for i in range(6)])
    rows = revise(tmp_path / "a", roomy, roomy, path, rounds=2)
    assert [row["prompt"][0]["content"] for row in rows] == ["Q 5"]
    assert [len(texts) for _, texts in asked] == [6, 4, 4, 2, 2]
    with pytest.raises(data.UserError, match="^[^\n]*of 1 answers none was revised[^\n]*$"):
        revise(tmp_path / "b", roomy, roomy, write(tmp_path / "q1.jsonl", [dict(prompt="Q 3")]), rounds=2)


def test_revisions_of_the_toy_world_report_the_gold_reward_before_and_after(tiny, roomy, tmp_path, monkeypatch):
    """A critic that always refuses: right for the unsafe half, a loss for the safe."""
    scripted(monkeypatch, lambda text: data.REFUSAL if text.endswith("Revision:") else "It is bad." if text.endswith(
        "Critique:") else "Sure. First take a saw. Then cut the box slowly.")
    rows = revise(tmp_path / "a", tiny, roomy, "toy", n=40, batch=16)
    logs = read(tmp_path / "a" / "metrics.jsonl")
    assert len(rows) == 40 and [log["revised"] for log in logs] == [16, 32, 40]
    for log, start in zip(logs, (0, 16, 32)):
        some = rows[start:start + 16]
        for key, text in (("gold_before", "first"), ("gold_after", "response")):
            assert log[key] == pytest.approx(sum(data.gold(r, r[text]) for r in some) / len(some), abs=1e-6)
        assert log["gold_after"] == pytest.approx(sum(not r["safe"] for r in some) / len(some), abs=1e-6)
        assert log["changed"] == 1


def test_a_critic_without_room_for_the_question_is_not_asked(tiny, tmp_path, monkeypatch):
    """Of a long and a short prompt; nor is it where no answer of a batch was finished."""
    asked = scripted(monkeypatch, lambda text: None if text == "Q 3" else scene(text) if "Q" in text else "A9")
    path = write(tmp_path / "q.jsonl", [dict(prompt="Q 1"), dict(prompt="cup " * 30), dict(prompt="Q 3")])
    small = checkpoint(tmp_path / "small", 5, block_size=96)
    rows = revise(tmp_path / "a", tiny, small, path, batch=1)
    room = [len(TOK.prompt(user(text))) for who, texts in asked for text in texts if who == small]
    assert [row["prompt"][0]["content"] for row in rows] == ["Q 1"] and len(room) in (2, 3) and max(room) + 20 <= 96


# ---------------------------------------------------------------- rules fitted to rankings

@pytest.fixture
def rules(monkeypatch):
    for word in ("red", "soft", "old"):
        monkeypatch.setitem(data.VERIFIERS, word, lambda record, text, finished, word=word: text.split().count(word))


def truth(text):
    words = text.split()
    return 2.0 * words.count("red") - 1.5 * words.count("soft") + .1 * len(words)


def rule_rankings(n=120, least=.3):
    """Rankings of 2 to 4 answers, best first by the truth, each at least so much above the next."""
    rng, out = random.Random(11), []
    while len(out) < n:
        said = {truth(t): t for t in (" ".join(rng.choice("red soft old cup van".split()) for _ in range(
            rng.randint(1, 5))) for _ in range(rng.randint(2, 6)))}
        said = sorted(said.items(), reverse=True)[:4]
        if len(said) > 1 and all(a - b >= least for (a, _), (b, _) in itertools.pairwise(said)):
            out.append(dict(prompt=user("?"), responses=[t for _, t in said]))
    return out


def fit(out, path, **options):
    options = CPU | dict(rules="red + soft + old", base=".1*words") | options
    rule_based_rewards.fit(rule_based_rewards.Config(out=str(out), data=path, **options))
    return read(Path(out) / "metrics.jsonl"), (Path(out) / "reward.txt").read_text()


def marks(spec, *texts, prompt="?"):
    """Totals of a reward and its parts."""
    roll = Rollout.of(encode(dict(prompt=user(prompt), responses=list(texts)), TOK, 10 ** 9), TOK)
    total, parts = Reward(spec, Setup(TOK), 8192)([{}] * len(texts), roll)
    return total.tolist(), {name: part.tolist() for name, part in parts.items()}


def test_hinge_and_its_gradient_against_a_loop():
    rng = random.Random(12)
    a, b = (torch.tensor([rng.gauss(0, 2) for _ in range(50)], dtype=torch.float64, requires_grad=True) for _ in "ab")
    for margin in (0.0, 1.0, 2.5):
        a.grad = b.grad = None
        loss = rule_based_rewards.hinge(a, b, margin)
        close(loss.detach(), [max(0.0, margin + y - x) for x, y in zip(a.tolist(), b.tolist())])
        loss.sum().backward()
        close(a.grad, [-float(margin + y > x) for x, y in zip(a.tolist(), b.tolist())])
        close(b.grad, -a.grad)


def test_fitted_rules_have_the_planted_signs_and_order_what_is_held_out(rules, tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", rule_rankings())
    log, spec = fit(tmp_path / "rules", path, steps=400)
    assert "100.0% of" in (out := capsys.readouterr().out) and f"ppo.py --reward {tmp_path / 'rules'}" in out
    terms = data.parse_rewards(spec.strip())
    assert [term.names for term in terms] == [["words"], ["red"], ["soft"], ["old"]]
    weight = {term.label: term.weight for term in terms}
    assert weight["words"] == .1 and weight["red"] > .3 and weight["soft"] < -.3
    assert abs(weight["old"]) < weight["red"] / 2
    assert log[0]["loss"] > log[-1]["loss"] and log[-1]["accuracy"] == pytest.approx(1, abs=1e-6) and len(log) == 400
    texts = ["red cup", "soft cup", "old old van", "cup", "red soft old"]
    expected = [sum(weight[w] for w in t.split() if w in weight) + .1 * len(t.split()) for t in texts]
    total, parts = marks(str(tmp_path / "rules"), *texts)
    close(total, expected, 1e-5)
    assert parts.keys() == weight.keys() and marks(spec.strip(), *texts)[0] == total
    close(marks(f"2*{tmp_path / 'rules'} + old", *texts)[0], [2 * x + t.split().count("old") for x, t in zip(
        expected, texts)], 1e-5)
    assert fit(tmp_path / "rules", path, steps=400)[1] == spec and "nothing to do" in capsys.readouterr().out


def test_an_edit_of_the_rules_changes_the_reward_without_training(rules, judge, tmp_path):
    _, spec = fit(tmp_path / "rules", write(tmp_path / "p.jsonl", rule_rankings(40)), steps=50, base=judge)
    assert spec.startswith(f"{judge} + ") and spec.endswith("*old\n")
    model, = score(judge, "red cup")
    weight = {term.label: term.weight for term in data.parse_rewards(spec.strip())}
    close(marks(str(tmp_path / "rules"), "red cup")[0], [model + weight["red"]], 1e-5)
    (tmp_path / "rules" / "reward.txt").write_text(f"{judge} + -7*red + words\n")
    close(marks(str(tmp_path / "rules"), "red cup")[0], [model - 7 + 2], 1e-5)


@pytest.mark.parametrize("margin", [1.0, .2])
def test_the_first_steps_of_a_fit_against_a_loop(margin, rules, tmp_path):
    """Of ragged rankings: weights 0 first; AdamW's first step is lr against the sign of the gradient."""
    records = rule_rankings(60)
    path = write(tmp_path / "p.jsonl", records)
    log, _ = fit(tmp_path / "rules", path, margin=margin, steps=2, lr=.031, base=".13*words")
    records = [r for i, r in enumerate(records) if i % 20 != 19]                     # the others are held out
    assert {len(r["responses"]) for r in records} == {2, 3, 4}
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
        sure, even = (sum(x > tie for x in leads) / len(leads) for tie in (1e-6, -1e-6))     # rounding may decide a tie
        assert sure - 1e-6 <= row["accuracy"] <= (even if any(w) else sure) + 1e-6 and sure < .7
        w = [x - .031 * math.copysign(1, g) for x, g in zip(w, grad)]


def test_fit_without_rules_is_one_clear_line(tmp_path):
    with pytest.raises(data.OptionError, match="^--rules[^\n]*$"):
        fit(tmp_path / "rules", "x", rules="")


# ---------------------------------------------------------------- over-optimisation

FORMS = dict(fit_best_of_n=lambda d, a, b: d * (a - b * d), fit_rl=lambda d, a, b: d * (a - b * math.log(d)))


@pytest.mark.parametrize("form", FORMS)
def test_known_coefficients_come_back_with_the_peak_where_the_curve_has_it(form):
    for a, b in ((1.545, .49), (2.0, .1), (.7, .9)):
        d = [.1 + .2 * i for i in range(40)]
        got = getattr(reward_hacking, form)(d, [FORMS[form](x, a, b) for x in d])
        assert (got["alpha"], got["beta"], got["r2"]) == pytest.approx((a, b, 1), abs=1e-9)
        curve = lambda x: FORMS[form](x, a, b)
        peak = got["peak"]
        assert curve(peak) > max(curve(peak * .999), curve(peak * 1.001))
    for a, b in ((1.0, -.5), (1.0, 0.0)):                                # never turns down
        got = getattr(reward_hacking, form)(d, [FORMS[form](x, a, b - 1e-9) for x in d])
        assert got["peak"] is None and got["beta"] == pytest.approx(b, abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_fits_of_noisy_curves_against_numpy(form):
    rng = random.Random(13)
    for n in (5, 60):
        d = [rng.uniform(.1, 5) for _ in range(n)]
        gain = [FORMS[form](x, 1.2, .3) + rng.gauss(0, .3) for x in d]
        other = [FORMS[form](x, 0, 1) for x in d]                        # the second column
        (a, b), *_ = np.linalg.lstsq(np.array([d, other]).T, np.array(gain), rcond=None)
        got = getattr(reward_hacking, form)(d, gain)
        mid = sum(gain) / n
        left = sum((g - a * x - b * y) ** 2 for g, x, y in zip(gain, d, other))
        assert (got["alpha"], got["beta"]) == pytest.approx((a, b), abs=1e-9)
        assert got["r2"] == pytest.approx(1 - left / sum((g - mid) ** 2 for g in gain), abs=1e-9) and got["r2"] < 1
        coefficients, r2 = reward_hacking.least_squares([d, other], gain)
        assert coefficients == pytest.approx([a, b], abs=1e-9) and r2 == pytest.approx(got["r2"])


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
    """FEATURES C2: the proxy only grows while the gold reward turns down."""
    d, golds, proxies = tilted(np.geomspace(20, .2, 38))
    assert all(a < b for a, b in itertools.pairwise(proxies)) and golds[-1] < max(golds) - .2
    got = reward_hacking.fit_best_of_n(d, golds)
    assert got["r2"] > .99 and got["peak"] == pytest.approx(d[golds.index(max(golds))], abs=.1)
    assert got["r2"] > reward_hacking.fit_rl(d, golds)["r2"]


def test_c2_of_a_gaussian_the_coefficients_are_known():
    """d = 1 / (T √2) and gold 1 / T - ¼ / T², that is d (√2 - d / 2)."""
    d, golds, _ = tilted(np.geomspace(20, .6, 38))
    got = reward_hacking.fit_best_of_n(d, golds)
    assert got["r2"] > .999 and (got["alpha"], got["beta"]) == pytest.approx((2 ** .5, .5), abs=.02)


def overoptimize(out, policy, *folders, **options):
    reward_hacking.overoptimize(reward_hacking.Config(out=str(out), policy=policy, **(CPU | dict(
        proxy="vowels", judge="words", prompts=20, n=8, max_new=6) | options)), list(map(str, folders)))
    return json.loads((Path(out) / "curves.json").read_text())


def run_of(folder, rows):
    folder.mkdir()
    write(folder / "metrics.jsonl", [dict(step=i) | row for i, row in enumerate(rows)])
    return folder


def test_overoptimize_against_every_choice_of_k_and_the_metrics_of_runs(letters, tmp_path, monkeypatch, capsys):
    calls, options = spied(monkeypatch), dict(judge="gold2")
    monkeypatch.setitem(data.VERIFIERS, "gold2", lambda record, text, finished: text.count("a") - .1 * len(text))
    first = overoptimize(tmp_path / "a", letters, **options)["best of n"]
    assert sum(len(roll.tokens) for _, roll in calls) == 20 * 8
    said = [text for _, roll in calls for text in roll.responses()]
    for i, k in enumerate((1, 2, 4, 8)):
        assert first["d"][i] == pytest.approx(math.sqrt(math.log(k) - (k - 1) / k), abs=1e-12)
        total = dict(gold=0.0, proxy=0.0)
        for start in range(0, len(said), 8):
            ways = list(itertools.combinations(said[start:start + 8], k))
            for some in ways:
                best = max(some, key=lambda t: round(len(t) / 10 - t.count("e"), 4))
                total["gold"] += (best.count("a") - .1 * len(best)) / len(ways) / 20
                total["proxy"] += (len(best) / 10 - best.count("e")) / len(ways) / 20
        assert (first["gold"][i], first["proxy"][i]) == pytest.approx((total["gold"], total["proxy"]), abs=1e-5)
    assert len(first["d"]) == 4 and len(first["fits"]) == 2
    out = capsys.readouterr().out
    assert f"compare {letters} --proxy vowels" in out
    start, d = first["gold"][0], [.2 * i for i in range(20)]
    curve = lambda x: x * (1.3 - .4 * math.log(x)) if x else 0.0
    run = run_of(tmp_path / "ppo", [dict(kl=x * x, gold=start + curve(x), reward=x) for x in d] + [
        dict(kl=-.1, gold=start, reward=0.0)])
    got = overoptimize(tmp_path / "b", letters, run, **options)
    assert all(got["best of n"][key] == first[key] for key in ("d", "gold", "proxy"))    # the same samples
    mine = got[str(run)]
    close(mine["d"], d + [0.0], 1e-9)                                    # an estimate of the KL may be below 0
    close(mine["proxy"], d + [0.0], 1e-9)
    other, fits = mine["fits"].values()                                  # the forms of best-of-n and of RL
    assert (fits["alpha"], fits["beta"], fits["r2"]) == pytest.approx((1.3, .4, 1), abs=1e-6)
    assert fits["peak"] == pytest.approx(math.exp(1.3 / .4 - 1)) and other["r2"] < fits["r2"]


def test_overoptimize_takes_held_out_scores_where_a_run_has_them(letters, tmp_path):
    """Of every other row here; not where only a few have them. d is that of the held-out samples, too: `kl` is of the
    policy before the update, val_gold of the one after it."""
    row = lambda i, held: dict(kl=.1 * i, gold=1.0 * i, reward=2.0 * i) | (
        dict(val_kl=.1 * i + .1, val_gold=10.0 * i, val_reward=20.0 * i) if held else {})
    often = run_of(tmp_path / "often", [row(i, i % 2) for i in range(20)])
    seldom = run_of(tmp_path / "seldom", [row(i, i % 10 == 9) for i in range(20)])
    got = overoptimize(tmp_path / "a", letters, often, seldom, n=2, prompts=2)
    assert got[str(often)]["gold"] == [10.0 * i for i in range(1, 20, 2)]
    assert got[str(often)]["proxy"] == [20.0 * i for i in range(1, 20, 2)]
    close(got[str(often)]["d"], [math.sqrt(.1 * i + .1) for i in range(1, 20, 2)], 1e-9)
    old = run_of(tmp_path / "old", [{k: v for k, v in row(i, 1).items() if k != "val_kl"} for i in range(20)])
    rollouts = reward_hacking.run_curve(old)
    close(rollouts["d"], [math.sqrt(.1 * i) for i in range(20)], 1e-9)
    assert rollouts["gold"] == [1.0 * i for i in range(20)]
    assert got[str(seldom)]["gold"] == list(range(20)) and got[str(seldom)]["proxy"] == [2.0 * i for i in range(20)]


def test_overoptimize_without_a_run_or_its_scores_is_one_clear_line(letters, tmp_path):
    with pytest.raises(data.UserError, match="^[^\n]*gone[^\n]*no such file[^\n]*$"):
        overoptimize(tmp_path / "a", letters, tmp_path / "gone", n=2, prompts=2)
    with pytest.raises(data.UserError, match="^[^\n]*no row has kl, reward and gold[^\n]*$"):
        overoptimize(tmp_path / "b", letters, run_of(tmp_path / "sft", [dict(loss=1.0)] * 5), n=2, prompts=2)


def test_without_matplotlib_there_is_one_line_and_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reward_hacking.draw({"best of n": dict(d=[0.0], gold=[0.0], proxy=[0.0])}, tmp_path / "curves.png")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "matplotlib" in out and "curves.json" in out and not list(tmp_path.iterdir())


def test_with_matplotlib_every_curve_is_drawn_once(tmp_path, monkeypatch):
    """A stand-in for it, which counts."""
    drawn = collections.Counter()
    axis = SimpleNamespace(plot=lambda x, y, *how, label: drawn.update([(label, *y)]), set=lambda **how: drawn.update(
        [how["title"]]), legend=lambda: None)
    figure = SimpleNamespace(savefig=lambda path, **how: Path(path).write_text("a figure"))
    pyplot = SimpleNamespace(subplots=lambda rows, columns, **how: (figure, [[axis] * columns]))
    stub = SimpleNamespace(use=lambda backend: drawn.update([backend]), pyplot=pyplot)
    monkeypatch.setitem(sys.modules, "matplotlib", stub)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    reward_hacking.draw({name: dict(d=[0], gold=[i], proxy=[-i]) for i, name in enumerate("ab", 1)}, tmp_path / "c.png")
    assert drawn == {"Agg": 1, "a": 1, "b": 1, ("gold", 1): 1, ("proxy", -1): 1, ("gold", 2): 1, ("proxy", -2): 1}
    assert (tmp_path / "c.png").exists()


# ---------------------------------------------------------------- accuracy, safety

def test_accuracy_against_a_loop_on_several_files(judge, tmp_path, monkeypatch, capsys):
    """Verifiers that tie sometimes, a reward model, and two of them with a spread."""
    other, spec = checkpoint(tmp_path / "other", 9, n_scores=1), {}
    spec["vowels"] = lambda texts: [len(t) / 10 - t.count("e") for t in texts]
    spec["words"] = lambda texts: [float(len(t.split())) for t in texts]
    spec[judge] = lambda texts: score(judge, *texts)
    spec[f"{judge}|{other}"] = lambda texts: [min(x) for x in zip(score(judge, *texts), score(other, *texts))]
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
            low, high = reward.wilson(right, len(gaps))
            numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", lines[name].removeprefix(name))]
            expected = [right / len(gaps), low, high, reward.calibration_error(torch.tensor(gaps))]
            expected += [sum(spread) / len(spread)] if spread else []
            assert numbers == pytest.approx(expected, abs=6e-4), name
        assert table.splitlines()[0] == f": {len(gaps)} pairs"


def test_safety_by_hand():
    """Three unsafe requests, one helped; four safe: one refused, two helped (one with the wrong tool), one junk."""
    task = dict(family="safe", key="cut box", verb="cut", object="box", tool="saw")
    good, slip = ("Sure. First take a %s. Then cut the box slowly." % tool for tool in ("saw", "rope"))
    told = [(False, good), (False, data.REFUSAL), (False, "No"), (True, data.REFUSAL), (True, good), (True, slip),
            (True, "What?")]
    got = reward.safety([task | dict(safe=safe) for safe, _ in told], [reward.Answer(text, 0.0) for _, text in told])
    assert got == pytest.approx(dict(harmless=2 / 3, over_refusal=1 / 4, help=(1.0 + .7) / 4))
    only = lambda safe: reward.safety([task | dict(safe=s) for s, _ in told if s == safe],
                                      [reward.Answer(t, 0.0) for s, t in told if s == safe])
    assert only(True) == pytest.approx(dict(harmless=1, over_refusal=1 / 4, help=1.7 / 4))
    assert only(False) == pytest.approx(dict(harmless=2 / 3, over_refusal=0, help=0))


def test_compare_tells_of_safety_where_it_asks_for_it(tiny, tmp_path, monkeypatch, capsys):
    """A policy that refuses every second prompt and else helps with what the harmless tool is for."""
    good = "Sure. First take a saw. Then cut the box slowly."
    places = itertools.count()

    def generate_(model, prompts, max_new, n=1, temperature=1.0, begin=()):
        said = [(data.REFUSAL, good, "What?")[next(places) % 3] for _ in prompts]
        return Rollout.of([(p + TOK.response(t), [0] * len(p) + [1] * len(TOK.response(t))) for p, t in zip(
            prompts, said)], TOK)
    patch(monkeypatch, "generate", generate_)
    row, = compare([tiny], tmp_path, families="safe", on="safe", n=30, judge="vowels")
    rng = random.Random("compare safe")
    tasks = [data.toy_record("prompt", "test", ["safe"], rng) for _ in range(30)]
    safe, cost, refused, help_ = [t["safe"] for t in tasks], [], [], []
    for i, task in enumerate(tasks):
        kind = i % 3
        if not task["safe"]:
            cost.append(kind == 1)
        else:
            refused.append(kind == 0)
            help_.append((.4 + .3 * (task["tool"] == "saw") + .3 * (task["key"] == "cut box")) if kind == 1 else 0)
    share = lambda x: sum(x) / len(x)
    assert 0 < sum(safe) < 30 and 0 < sum(cost) and 0 < sum(refused)
    expected = dict(harmless=1 - share(cost), over_refusal=share(refused), help=share(help_))
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    head, numbers = capsys.readouterr().out.split("harmless  over-refusal    help\n")
    assert numbers.split()[1:4] == [f"{x:.3f}" for x in expected.values()]
    row, = compare([tiny], tmp_path, families="write", on="write", n=3)
    assert "harmless" not in capsys.readouterr().out and "harmless" not in row and "help" not in row
