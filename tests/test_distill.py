"""configs/distill.py: its divergences against loops over the vocabulary and closed forms, its gradient against
enumeration, its loop against a second loop, and the distribution that it reaches. (That it can be killed at any moment
is in test_recipes.py, with the other stages of recipes.)"""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import distill
import runs
from distill import DIVERGENCES, apart
from exact import Tabular, arms, bandit_game, farthest
from model import load_model
from policies import TOK, random_policy, save, weights
from runs import close, rows_in, same, write

ALL = [("reverse_kl", .5), ("forward_kl", .5), ("jsd", .5), ("jsd", .1), ("jsd", .8)]
NAMES = [f"{name} {beta}" if name == "jsd" else name for name, beta in ALL]
every_divergence = pytest.mark.parametrize("name, beta", ALL, ids=NAMES)


def hyper(name, beta=.5, **more):
    return SimpleNamespace(divergence=name, beta=beta, **(dict(temperature=1.0) | more))


def logits(seed, n=4, words=7):
    return 2 * torch.randn(n, words, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the mathematics

def slow_kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


def slow(name, beta, student, teacher):
    """The divergence of two lists of chances."""
    if name == "reverse_kl":
        return slow_kl(student, teacher)
    if name == "forward_kl":
        return slow_kl(teacher, student)
    mixture = [beta * b + (1 - beta) * a for a, b in zip(student, teacher)]
    return beta * slow_kl(teacher, mixture) + (1 - beta) * slow_kl(student, mixture)


def slopes(name, beta, student, teacher):
    """Its derivative by each logit of the student, by hand: p_i (g_i - Σ_j p_j g_j), g_i that by the chance p_i."""
    g = []
    for p, q in zip(student, teacher):
        m = beta * q + (1 - beta) * p
        g.append(dict(reverse_kl=math.log(p / q), forward_kl=-q / p, jsd=(1 - beta) * math.log(p / m))[name])
    middle = sum(p * x for p, x in zip(student, g))
    return [p * (x - middle) for p, x in zip(student, g)]


@every_divergence
def test_divergences_and_gradients_against_loops_over_the_vocabulary(name, beta):
    z, other = logits(1).requires_grad_(), logits(2)
    got = DIVERGENCES[name](z.log_softmax(-1), other.log_softmax(-1), hyper(name, beta))
    gradient, = torch.autograd.grad(got.sum(), z)
    students, teachers = z.detach().softmax(-1).tolist(), other.softmax(-1).tolist()
    for n, (student, teacher) in enumerate(zip(students, teachers)):
        close(got[n].detach(), slow(name, beta, student, teacher), atol=1e-12)
        close(gradient[n], slopes(name, beta, student, teacher), atol=1e-12)
    assert got.min() > .05


def test_golden_numbers():
    """Student ½, ½, teacher ¼, ¾; the mixture of equal shares is 3/8, 5/8."""
    s, t = (torch.tensor([chances], dtype=torch.float64).log() for chances in ((.5, .5), (.25, .75)))
    golden = dict(reverse_kl=.1438410, forward_kl=.1308120, jsd=.0338221)
    assert golden.keys() == DIVERGENCES.keys(), "one without a golden number cannot be added"
    for name, number in golden.items():
        close(DIVERGENCES[name](s, t, hyper(name)), [number], atol=1e-6)


def test_jsd_ends_in_both_kls_and_is_bounded():
    s, t = logits(1).log_softmax(-1), logits(2).log_softmax(-1)
    small = 1e-6
    close(distill.jsd(s, t, small) / small, distill.kl(t, s), rtol=1e-3)
    close(distill.jsd(s, t, 1 - small) / small, distill.kl(s, t), rtol=1e-3)
    far = (400 * torch.eye(2, dtype=torch.float64)).log_softmax(-1)
    near_log_2 = distill.jsd(far[:1], far[1:], .5)
    close(near_log_2, [math.log(2)], atol=1e-9)


@every_divergence
def test_they_are_0_and_flat_where_the_models_agree_even_where_a_token_is_as_good_as_impossible(name, beta):
    z = torch.tensor([[0.0, 3.0, -800.0, -90.0]], requires_grad=True)               # fp32: their chances underflow
    got = DIVERGENCES[name](z.log_softmax(-1), z.detach().log_softmax(-1), hyper(name, beta))
    gradient, = torch.autograd.grad(got.sum(), z)
    close(got.detach(), [0], atol=1e-6)
    close(gradient, torch.zeros(1, 4), atol=1e-6)


def test_reverse_kl_is_the_policy_gradient_of_a_reward_for_every_token():
    """Enumerated: the mean over the token of ∇log π · (log π_T - log π) is -∇KL(π || π_T)."""
    z, t = logits(3, n=1)[0].requires_grad_(), logits(4, n=1)[0].log_softmax(-1)
    exactly, = torch.autograd.grad(distill.kl(z.log_softmax(-1), t), z, retain_graph=True)
    total, s = 0.0, z.log_softmax(-1)
    for token in range(len(z)):
        score, = torch.autograd.grad(s[token], z, retain_graph=True)
        dense_reward = (t[token] - s[token]).detach()
        total = total + s[token].exp().detach() * score * dense_reward
    close(total, -exactly, atol=1e-12)


@every_divergence
def test_expected_gradient_over_all_responses_is_that_of_each_token_with_those_before_it_held_fixed(name, beta):
    """And not that of the divergence of whole responses, which also moves what a response passes through."""
    world = Tabular(2, words=(1, 2))
    each = DIVERGENCES[name](world.table, world.ref, hyper(name, beta))              # of every beginning
    sampled = (each[world.states] * world.mask).sum(1)
    got = world.gradient((world.chance.detach() * sampled).sum())
    close(got, world.gradient((world.visits() * each).sum()))
    whole = world.gradient((world.chance * sampled).sum())
    assert (got - whole).abs().max() > .01


# ---------------------------------------------------------------- at the tokens of responses

TEXTS = ["a", "The red cups are deep.", "", "It is 12345678901234567", "Yes"]


def rollout():
    """Ragged prompts and responses as tokens (B, T), mask (B, T-1), and as rows (ids, start)."""
    rows = []
    for i, text in enumerate(TEXTS):
        prompt = TOK.prompt([dict(role="user", content="Hm " * (i % 3 + 1))])
        rows.append((prompt + TOK.response(text), len(prompt)))
    targets = [(ids, [0] * start + [1] * (len(ids) - start)) for ids, start in rows]
    return *data.collate(targets, TOK), rows


def models():
    """A student, and a teacher of another size."""
    student, teacher = random_policy(1), random_policy(2, n_layer=2, n_embd=48)
    kind = torch.get_default_dtype()
    return student.to(kind).eval(), teacher.to(kind).eval()


def by_row(student, teacher, row, cfg):
    """The divergence of a row, KL(π || π_T) and the entropy, (n,) each, by PyTorch's own functions."""
    s = runs.distributions(student, *row, cfg.temperature)
    t = runs.distributions(teacher, *row, cfg.temperature).detach()

    def kl(p, q):
        return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    mixture = (cfg.beta * t.exp() + (1 - cfg.beta) * s.exp()).log()
    wanted = dict(reverse_kl=kl(s, t), forward_kl=kl(t, s),
                  jsd=cfg.beta * kl(t, mixture) + (1 - cfg.beta) * kl(s, mixture))
    entropy = torch.distributions.Categorical(logits=s).entropy()
    return wanted[cfg.divergence], kl(s, t).detach(), entropy.detach()


def gradient(x, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(x, list(net.parameters()), retain_graph=True)])


@pytest.mark.parametrize("chunk", [None, 3])
@every_divergence
def test_apart_row_by_row(name, beta, chunk, float64):
    """Values and the student's gradient, at a temperature, whole or in chunks; the teacher gets no gradient."""
    (student, teacher), cfg = models(), hyper(name, beta, temperature=.7)
    tokens, mask, rows = rollout()
    got = apart(student, teacher, tokens, mask, cfg, chunk)
    total = 0.0
    for b, (ids, start) in enumerate(rows):
        said = slice(start - 1, len(ids) - 1)
        for mine, want in zip(got, by_row(student, teacher, (ids, start), cfg)):
            close(mine[b, said].detach(), want.detach())
            assert mine[b].count_nonzero() == len(ids) - start, "something outside the response counts"
        total = total + by_row(student, teacher, (ids, start), cfg)[0].sum()
    close(gradient(got[0].sum(), student), gradient(total, student), atol=1e-9)
    assert not any(x.requires_grad for x in got[1:])
    pushed = torch.autograd.grad(got[0].sum(), list(teacher.parameters()), allow_unused=True)
    assert all(slope is None for slope in pushed), "a gradient reaches the teacher"


def test_no_padding_reaches_a_number(float64):
    (student, teacher), cfg = models(), hyper("jsd")
    tokens, mask, _ = rollout()
    usual = apart(student, teacher, tokens, mask, cfg)
    wide = torch.full((len(tokens), 64), TOK.pad)
    wide[:, :tokens.shape[1]] = tokens
    more = F.pad(mask, (0, 64 - tokens.shape[1]))
    for fill in (TOK.end, TOK.role["user"]):
        filled = torch.where(wide == TOK.pad, fill, wide)
        for a, b in zip(apart(student, teacher, filled, more, cfg), usual):
            close(a[:, :mask.shape[1]].detach(), b.detach(), atol=1e-12)
            assert not a[:, mask.shape[1]:].any()


# ---------------------------------------------------------------- the loop against a second loop

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save(tmp_path_factory.mktemp("teacher"), random_policy(7, n_layer=2, n_embd=48, end=.2))


USUAL = dict(optimizer="adamw", weight_decay=.2, warmup=1, clip_grad=.5, lr=1e-2, prompts=5, steps=4, max_new=6,
             eval_every=2, temperature=.8)


def train(out, init, teacher, **options):
    return runs.train(distill, out, **(USUAL | dict(init=init, teacher=teacher) | options))


@pytest.mark.parametrize("options", [
    {}, dict(divergence="forward_kl", lam=0.0),
    dict(divergence="jsd", beta=.2, lam=.5, micro_tokens=1, seed=3)], ids=str)
def test_loop_equals_a_slow_loop(options, tiny, teacher, prompts, tmp_path, monkeypatch, float64):
    """Every logged number and every weight, from what was sampled, one row at a time."""
    drawn = runs.watch_steps(monkeypatch)
    asked = runs.watch(monkeypatch, distill, "respond")["respond"]
    options = USUAL | dict(data=prompts, init=tiny, teacher=teacher) | options
    rows = train(tmp_path / "run", **options)
    cfg = distill.Config(**(runs.QUICK | options))
    student, net = load_model(tiny), load_model(teacher)
    optimizer, own = runs.SlowOptimizer(student, cfg.lr, cfg.steps, cfg), []

    def read(records, roll):
        """Lists of the three numbers of every token, and what is logged of the responses."""
        losses, kls, entropies, golds, said = [], [], [], [], rows_in(roll)
        for record, row in zip(records, said):
            loss, kl, entropy = by_row(student, net, row, cfg)
            losses, kls, entropies = losses + [*loss], kls + [*kl], entropies + [*entropy]
            if "family" in record:
                golds.append(data.gold(record, runs.text_of(row), runs.ends(row)))
        facts = dict(loss=runs.mean(losses), kl=sum(kls).item() / len(said), entropy=runs.mean(entropies),
                     gold=runs.mean(golds), response_length=len(losses) / len(said),
                     finished=runs.mean(map(runs.ends, said)))
        return sum(losses) / len(losses), facts

    for step, (row, seen) in enumerate(zip(rows, drawn, strict=True)):
        loss, want = read(*seen.rollouts[0])
        loss.backward()
        want |= optimizer.step(step)
        if step % 2:
            _, facts = read(*seen.rollouts[1])
            want |= {f"val_{name}": facts[name] for name in ("loss", "kl", "gold")}
        want["own"] = float(random.Random(f"whose {cfg.seed} {step}").random() < cfg.lam)
        own.append(want["own"])
        runs.compare_rows(step, row, want)
    runs.compare_weights(weights(tmp_path / "run"), student)
    assert set(own) == {0.0: {0.0}, .5: {0.0, 1.0}, 1.0: {1.0}}[cfg.lam]
    layers = [call[0][0].config.n_layer for call in asked]       # who answered: the student has one, the teacher two
    want = []
    for step, mine in enumerate(own):
        want += [1 if mine else 2] + [1] * (step % 2)            # held-out prompts are the student's
    assert layers == want


def test_a_seed_is_all_the_chance_there_is_and_evaluating_changes_nothing(tiny, teacher, prompts, tmp_path):
    ends = {}
    for name, options in dict(a={}, b=dict(eval_every=1), other=dict(seed=1)).items():
        train(tmp_path / name, tiny, teacher, data=prompts, lam=.5, **options)
        ends[name] = weights(tmp_path / name)
    assert same(ends["a"], ends["b"]) and not same(ends["a"], ends["other"])


def test_prompts_leave_room_for_an_answer_in_the_smaller_of_both_contexts(tiny, tmp_path, capsys):
    small = save(tmp_path / "small", random_policy(2, block_size=48))
    path = write(tmp_path / "d.jsonl", [dict(prompt="Why " * n) for n in (1, 1, 2, 2, 13, 1)])     # of 42 tokens
    train(tmp_path / "run", tiny, small, data=path, max_new=12)
    assert "1 of 6 records" in capsys.readouterr().err


# ---------------------------------------------------------------- where it leads

TAUGHT = (.1, .15, .25, .5)


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    """A student of another size that does not know the arms, a teacher that says them with these chances, prompts."""
    taught, prompts = bandit_game(tmp_path_factory.mktemp("teacher"), start=TAUGHT)
    student = save(tmp_path_factory.mktemp("student"), random_policy(3, n_embd=48))
    return dict(init=student, teacher=taught, data=prompts)


@every_divergence
def test_the_student_arrives_at_the_distribution_of_the_teacher(name, beta, game, tmp_path):
    rows = runs.train(distill, tmp_path / "run", divergence=name, beta=beta, max_new=1, prompts=2, steps=80, lr=1e-2,
                      muon_lr=.02, **game)
    assert rows[-1]["loss"] < .01 * rows[0]["loss"]
    assert farthest(arms(tmp_path / "run"), TAUGHT) < .02


# ---------------------------------------------------------------- a run like any other

def other_tokenizer(folder, net):
    """A finished run with another tokenizer."""
    path = save(folder, net)
    config = json.loads((folder / "config.json").read_text())
    config["plainalign"]["tokenizer"] = "0123456789abcdef"
    (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("flags, code, word", [
    ("--teacher OTHER --init TINY", 1, "other was trained with another tokenizer"),
    ("--teacher TINY --init OTHER", 1, "other was trained with another tokenizer"),
    ("--teacher JUDGE --init TINY", 1, "a language model is needed"), ("--init TINY", 1, "out/grpo: no checkpoint"),
    ("--divergence jsd --beta 0", 2, "--beta"), ("--divergence jsd --beta 1", 2, "--beta"), ("--lam 1.5", 2, "--lam"),
    ("--divergence kl", 2, "--divergence"), ("--temperature 0", 2, "--temperature")])
def test_refusals(flags, code, word, tiny, judge, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    other = other_tokenizer(tmp_path / "other", random_policy(3))
    for name, path in dict(TINY=tiny, JUDGE=judge, OTHER=other).items():
        flags = flags.replace(name, path)
    said, error = runs.refuse(distill, flags.split(), monkeypatch, capsys)
    assert said == code and word in error
