"""reward.py: the Bradley-Terry loss and the statistics against loops and closed forms; label -> train -> compare."""
import collections
import itertools
import json
import math
import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import model as models
import reward
from data import Tokenizer, encode
from model import GPT, GPTConfig, Reward, Rollout, generate, load_model, response_scores, save_checkpoint

TOK = Tokenizer.load("toy")
CPU = dict(device="cpu", dtype="fp32")
QUICK = CPU | dict(warmup=0, save_every=1000, eval_every=1000)


def checkpoint(folder, seed=0, n_scores=0, end=4.0, says=""):
    """A random model that ends about one response in three early and never samples padding; with says: little else
    than these letters."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(TOK.n_vocab, 64, 1, 2, 32, n_scores=n_scores))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        net.transformer.ln_f.weight[0], net.transformer.ln_f.bias[0] = 0.0, 1.0
        net.transformer.wte.weight[:, 0] = 0.0
        net.transformer.wte.weight[TOK.end, 0], net.transformer.wte.weight[TOK.pad, 0] = end, -50.0
        net.transformer.wte.weight[TOK.encode(says), 0] = end
    save_checkpoint(folder, dict(model=net), {}, dict(step=0, done=True, state={}, tokenizer=TOK.fingerprint))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("judge"), 1, n_scores=1)


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
        assert reward.kept([("It is red.", 1.0, 4, None)], reward.Label(select=select), Never()) == []
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
    rolls, real = [], reward.generate
    monkeypatch.setattr(reward, "generate", lambda *args: rolls.append(real(*args)) or rolls[-1])
    rows = label(tmp_path / "a", checkpoint(tmp_path / "abc", says="ae", end=9.0), k=k, max_new=3, n=104, batch=48)
    said = [answer for roll in rolls for answer in zip(roll.responses(TOK), roll.finished.tolist())]
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
        label(tmp_path / "a", checkpoint(tmp_path / "never", end=-50.0), n=4, max_new=2)


# ---------------------------------------------------------------- scores

TEXTS = ["", "The cup is fine.", "Yes", "It is warm. Buy one today. You will love it."]


def test_score_ignores_padding_batch_mates_and_end_tokens_in_the_prompt(judge):
    """Read at the last response token, wherever that is: row by row without padding is the truth."""
    asked = [user("Describe the old van."), user("Hi") + [dict(role="assistant", content="Yes")] + user("Why?")]
    rows = [row for prompt in asked for row in encode(dict(prompt=prompt, responses=TEXTS), TOK, 64)]
    assert any(TOK.end in ids[:ids.index(TOK.role["assistant"], 6)] for ids, _ in rows[4:])
    net = load_model(judge)
    alone = [net.score(net(torch.tensor([ids]))[0, -1]).item() for ids, _ in rows]
    assert len({round(x, 3) for x in alone}) == len(rows)
    with torch.no_grad():
        for order in (range(8), [7, 0], [3], [2, 6, 1]):
            tokens, mask = data.collate([rows[i] for i in order], TOK)
            for width, junk in ((0, TOK.pad), (9, TOK.pad), (9, TOK.end), (9, 3)):
                wide = torch.nn.functional.pad(tokens, (0, width), value=junk)
                got = response_scores(net, wide, torch.nn.functional.pad(mask, (0, width)))
                assert got.shape == (len(order), 1)
                close(got[:, 0], [alone[i] for i in order], atol=2e-5)


def test_same_ids_in_reward_training_evaluation_and_ppo(judge, tmp_path, monkeypatch):
    """A text that is sampled by PPO and one that comes from a file are the same ids, end token included."""
    prompt, spec = user("Describe the old van."), Reward(judge, TOK, "cpu", models.setup("cpu", "fp32")[1], 64)
    seen, real = [], reward.response_scores
    monkeypatch.setattr(reward, "response_scores", lambda net, tokens, mask: seen.extend(
        [i for i in row if i != TOK.pad] for row in tokens.tolist()) or real(net, tokens, mask))
    path = write(tmp_path / "pairs.jsonl", [dict(prompt=prompt, responses=TEXTS[1:3])] * 25)
    train(tmp_path / "rm", judge, path, batch=24, epochs=1.0)
    served = []
    for text in TEXTS[1:3]:
        script = iter(TOK.response(text))
        with monkeypatch.context() as patch:
            patch.setattr(models, "sample", lambda logits, *_: (torch.tensor([next(script)]), torch.zeros(1)))
            roll = generate(load_model(judge), [TOK.prompt(prompt)], TOK, 40)
        served.append(roll.tokens[0, :roll.lengths[0]].tolist())
        assert roll.finished.all() and roll.responses(TOK) == [text]
        close(spec([dict(prompt=prompt)], roll)[0], score(judge, text, prompt=prompt[0]["content"]), atol=2e-5)
    assert len(seen) >= 50 and {tuple(ids) for ids in seen} == {tuple(ids) for ids in served}


def test_score_of_an_unfinished_response_is_read_at_its_last_token(judge):
    ids = TOK.prompt(user("Hi")) + TOK.encode("The cup is")
    mask = torch.zeros(1, 31)
    mask[0, len(TOK.prompt(user("Hi"))) - 1:len(ids) - 1] = 1
    net = load_model(judge)
    tokens = torch.tensor([ids + [TOK.pad] * (32 - len(ids))])
    roll = Rollout(tokens, mask, torch.zeros(1, 31), torch.tensor([False]), [len(TOK.prompt(user("Hi")))])
    got, parts = Reward(f"2*{judge} + -1*vowels", TOK, "cpu", models.setup("cpu", "fp32")[1], 64)([{}], roll)
    alone = net.score(net(torch.tensor([ids]))[0, -1]).item()
    close(got, [2 * alone - (len("The cup is") / 10 - 2 + 1)], atol=1e-5)
    assert parts[judge].item() == pytest.approx(alone, abs=1e-5)


# ---------------------------------------------------------------- train

def ranked(*answers, n=40, **more):
    return [dict(prompt=user("?"), responses=list(answers), **more)] * n


def test_training_recovers_known_gaps(tiny, tmp_path):
    """The real loop on the pairs of F2's bandit, both orders as often as Bradley-Terry says: gaps 1, 2, 3."""
    arms, rows = "abcd", []
    for i, j in itertools.combinations(range(4), 2):
        won = round(148 * sigmoid(j - i))                                # of 148: close to whole numbers
        rows += ranked(arms[j], arms[i], n=won) + ranked(arms[i], arms[j], n=148 - won)
    random.Random(0).shuffle(rows)
    for place in range(19, len(rows) * 20 // 19, 20):                    # every 20th is held out: let it be a spare
        rows.insert(place, ranked("a", "d", n=1)[0])
    path = write(tmp_path / "pairs.jsonl", rows)
    train(tmp_path / "rm", tiny, path, batch=888, epochs=50.0, lr=1e-2, weight_decay=0.0, optimizer="adamw")
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


def test_micro_batches_change_nothing(judge, tmp_path):
    path = write(tmp_path / "p.jsonl", rankings())
    small, large = (train(tmp_path / str(n), judge, path, micro_tokens=n, batch=16, eval_every=2, lr=1e-5)
                    for n in (64, 100_000))
    for a, b in zip(small, large):
        for key in a.keys() - {"seconds", "val_gold"}:
            assert a[key] == pytest.approx(b[key], abs=2e-5, rel=1e-4), key


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
    got = reward.evaluate(load_model(judge), items_of(records), CFG, TOK, models.setup("cpu", "fp32")[1])
    for key, x in dict(val_loss=loss, val_accuracy=right, val_gold=agree, val_mean=every).items():
        assert got[key] == pytest.approx(sum(x) / len(x), abs=1e-5), key


def test_evaluate_when_only_some_records_have_scores(judge):
    """A record without true scores must not shift the others' onto its pairs."""
    a, b = score(judge, "yes", "no")
    best, worst = ("yes", "no") if a > b else ("no", "yes")
    right, wrong = dict(prompt=user("?"), responses=[best, worst]), dict(prompt=user("?"), responses=[worst, best])
    for one, other in ((right, wrong | dict(scores=[1.0, 0.0])), (wrong, right | dict(scores=[1.0, 0.0]))):
        got = reward.evaluate(load_model(judge), items_of([one, other]), CFG, TOK, models.setup("cpu", "fp32")[1])
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
    other = checkpoint(tmp_path / "other", 7)
    (_, b), (_, a) = compare([tiny, other], tmp_path), compare([other, tiny], tmp_path)
    assert a["win"] + b["win"] == pytest.approx(1, abs=1e-12) and a["win"] != .5


def test_compare_against_a_loop(tiny, judge, tmp_path, monkeypatch):
    """Scores, win rate, KL = Σ log π - log π_first and length, from the samples, one unpadded row at a time."""
    other, calls, real = checkpoint(tmp_path / "other", 7), [], reward.generate

    def spy(net, prompts, *args, **kwargs):
        calls.append((prompts, real(net, prompts, *args, **kwargs)))
        return calls[-1][1]
    monkeypatch.setattr(reward, "generate", spy)
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
    calls, real = [], reward.generate
    monkeypatch.setattr(reward, "generate", lambda *args, **how: (
        calls.append((how, real(*args, **how))), calls[-1][1])[1])
    return calls


def test_compare_with_several_samples_scales_with_test_time(letters, tmp_path, monkeypatch, capsys):
    """pass@k, maj@k and best@k recomputed, by brute force, from the samples; pass@1 and maj@1 are the mean score."""
    monkeypatch.setitem(data.VERIFIERS, "right", lambda record, text, finished: finished and text.count("a") % 2 == 1)
    calls = spied(monkeypatch)
    options = dict(judge="right", proxy="vowels", max_new=4, families="write,safe", on="write,safe", n=35)
    other = checkpoint(tmp_path / "other", 7, says="aeo", end=8.0)
    table = compare([letters, other], tmp_path, samples=6, **options)
    rolls = [roll for _, roll in calls if len(roll.tokens) > 35]
    assert [len(roll.tokens) for roll in rolls] == [64 * 6, 6 * 6] * 2               # 70 prompts of both families
    for row, (a, b) in zip(table, (rolls[:2], rolls[2:])):
        said = [(t, f) for roll in (a, b) for t, f in zip(roll.responses(TOK), roll.finished.tolist())]
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
    texts = [text for _, roll in calls for text in roll.responses(TOK)]
    assert len(texts) == 5 + 10 and all(text.startswith("<think>") for text in texts)
    assert all(how["begin"] == begin for how, _ in calls)
    points = [len(text) / 10 - text.count("e") for text in texts[:5]]
    assert row["write"] == pytest.approx(sum(points) / 5, abs=1e-5)                  # the judge sees the beginning too
    assert capsys.readouterr().out.count("  <think>") == 2


def test_kl_of_answers_made_to_begin_alike_is_that_of_what_was_sampled(tiny, tmp_path, monkeypatch):
    other, calls = checkpoint(tmp_path / "other", 7), spied(monkeypatch)
    table = compare([tiny, other], tmp_path, begin="<think>", families="write", on="write")
    base, net, kl = load_model(tiny).double(), load_model(other).double(), 0.0
    roll = calls[-1][1]
    for ids, start, n in zip(roll.tokens.tolist(), roll.prompt_len, roll.lengths):
        logp, ref = (m.logits(m(torch.tensor([ids[:n]])))[0].log_softmax(-1).detach() for m in (net, base))
        kl += sum(float(logp[t - 1, ids[t]] - ref[t - 1, ids[t]]) for t in range(start + 1, n)) / 12
    assert table[1]["kl"] == pytest.approx(kl, abs=1e-4)


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
    assert f"reward.py train --data {tmp_path / 'pairs' / 'pairs.jsonl'}" in out
    assert f"ppo.py --reward {tmp_path / 'rm'}" in out
    again = train(tmp_path / "rm", tiny, tmp_path / "pairs" / "pairs.jsonl", batch=8)
    assert again == log and "nothing to do" in capsys.readouterr().out


def test_reward_training_resumes_bit_for_bit(judge, tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", rankings())
    whole, real = train(tmp_path / "a", judge, path, batch=16), data.Run.log
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def log(self, step, *args, **kwargs):
            if step == 3:
                raise KeyboardInterrupt
            real(self, step, *args, **kwargs)
        patch.setattr(data.Run, "log", log)
        train(tmp_path / "b", judge, path, batch=16, save_every=2)
    resumed = train(tmp_path / "b", judge, path, batch=16, save_every=2)
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in resumed] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in whole]
    assert score(tmp_path / "a", "yes", "no") == score(tmp_path / "b", "yes", "no")


@pytest.mark.parametrize("command", [
    "train --lr 0", "train --epochs 0", "train --pairs some", "train --margn true", "train --batch 0",
    "train --eval_every 0", "label --k 1", "label --flip 2", "label --n 0", "label --temperature 0", "label --scale -1",
    "label --select most", "curate --k 0", "curate --n 0", "curate --guesses -1", "curate --cap -1",
    "compare x --samples -1",
    "compare", "compare x --n 0", "compare x --families nope", "compare x --max_new 0", "", "judge",
    "train --data toy"])
def test_impossible_options_exit_2_with_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reward.py", *command.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(reward.__file__, run_name="__main__")
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
    groups, real = [], reward.generate

    def spy(*args):
        roll = real(*args)
        said = list(zip(roll.responses(TOK), roll.finished.tolist()))
        groups.extend({t: len(t) / 10 - t.count("e") for t, done in said[i:i + k] if done and t.strip()}
                      for i in range(0, len(said), k))
        return roll
    monkeypatch.setattr(reward, "generate", spy)
    return groups


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A policy of two letters: its short answers repeat, and tie."""
    return checkpoint(tmp_path_factory.mktemp("letters"), says="ae", end=7.0)


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
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.Run, "log", log)
        label(tmp_path / "b", tiny, **options)
    assert json.loads((tmp_path / "b" / "unfinished.json").read_text())[0] == 3
    assert not (tmp_path / "b" / "pairs.jsonl").exists()
    calls, generate_ = [], reward.generate
    monkeypatch.setattr(reward, "generate", lambda *args: (calls.append(1), generate_(*args))[1])
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
    return reward.kept([(*answer, None) for answer in group], reward.Label(select=select, **options), random.Random(0))


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
    groups, real = [], reward.generate

    def spy(*args):
        roll = real(*args)
        said = list(zip(roll.responses(TOK), roll.mask.sum(1).tolist(), roll.finished.tolist()))
        groups.extend({t: n for t, n, done in said[i:i + k][::-1] if done and t.strip()}
                      for i in range(0, len(said), k))
        return roll
    monkeypatch.setattr(reward, "generate", spy)
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

    def generate_(policy, prompts, tok, max_new, n=1, temperature=1.0, begin=()):
        rows = []
        for ids in prompts:
            said = plan(TOK.decode(ids), n, bool(begin))
            assert len(said) == n
            rows += [(ids, TOK.response(text)) for text in said]
        calls.append((len(prompts), n, TOK.decode(list(begin))))
        tokens, mask = data.collate([(p + r, [0] * len(p) + [1] * len(r)) for p, r in rows], TOK)
        return Rollout(tokens, mask, torch.zeros_like(mask), torch.ones(len(rows), dtype=torch.bool),
                       [len(p) for p, _ in rows])
    monkeypatch.setattr(reward, "generate", generate_)
    return calls


def curate(out, policy, path, **options):
    reward.curate(reward.Curate(out=str(out), policy=policy, data=path, **(CPU | dict(max_new=8, batch=7) | options)))
    return read(Path(out) / "prompts.jsonl")


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
    assert calls == [(n, k, begin) for n in [7] * 8 + [4] for k, begin in ((5, ""), (4, reward.Curate.begin))]
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
    plain, told = ([r for how, r in calls if bool(how) == forced] for forced in (False, True))
    right = lambda roll: [float(f and t.count("a") == 1) for t, f in zip(roll.responses(TOK), roll.finished.tolist())]
    rate = [sum(right(roll)[i:i + 4]) / 4 for roll in plain for i in range(0, len(roll.tokens), 4)]
    luck = [x for roll in told for x in right(roll)]
    assert len(rate) == len(luck) == 10 and 0 < sum(luck) < 10
    assert [row["difficulty"] for row in rows] == [1 - x for x, lucky in zip(rate, luck) if not lucky]
    assert {(row["family"], row["level"], row["prompt"][0]["role"]) for row in rows} == {("arith", 2, "user")}
    assert all(t.startswith("e") for roll in told for t in roll.responses(TOK))


def test_a_guess_begins_with_the_tokens_of_an_answer():
    """" is" and " is " are two tokens: from the first no number follows, so nothing would ever be guessed."""
    begin = TOK.encode(reward.Curate.begin)
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
    assert reward.of_choice(dict(prompt=user("Hi") + user(prompt), answer=answer)) is choice
    assert not reward.of_choice(dict(prompt=user("A. a\nB. b") + user("Why?")))
