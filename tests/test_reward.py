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
    r_w, r_l, required, weight = reward.pair_margins(scores, items, True)
    assert required.tolist() == [2.5, 0, 0, 0, 0]
    assert r_w.tolist() == [0, 2, 2, 3, 5] and r_l.tolist() == [1, 3, 4, 4, 6]
    assert reward.pair_margins(scores, items, False)[2].tolist() == [0] * 5
    assert {x.shape for x in (r_w, r_l, required, weight)} == {(5,)}


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


CFG = SimpleNamespace(micro_tokens=64, margin=False)


def items_of(records):
    return [dict(rows=encode(r, TOK, 64), **{k: r[k] for k in ("scores", "margin") if k in r}) for r in records]


def test_evaluate_against_a_loop(judge):
    records = [r | dict(scores=[float(-len(t)) for t in r["responses"]]) for r in rankings(12)]
    loss, right, agree, every = [], [], [], []
    for r in records:
        s = score(judge, *r["responses"], prompt=r["prompt"][0]["content"])
        every += s
        for i, j in itertools.combinations(range(len(s)), 2):
            loss.append(-math.log(sigmoid(s[i] - s[j])))
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
    reward.compare(reward.Compare(save=str(tmp_path / "table.json"), device="cpu", max_new=6, **(dict(
        n=12, families="write,safe", on="write,safe", judge="vowels") | options)), folders)
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
        assert row["scores"] == pytest.approx([max(group.values())], abs=1e-6) and len(row["win"]) == 1
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


@pytest.mark.parametrize("select", ["rank", "rso", "best"])
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
