"""ppo.py: its formulas against slow loops over ragged lists, its estimators against enumeration, its loop against a
second loop, and its fixed point against the closed form of a one-token bandit.

What all trainers have in common (resuming, seeds, evaluation, LoRA, micro-batches) is in test_runs.py.
"""
import collections
import itertools
import math
import random

import pytest
import torch

import data
import exact
import model
import ppo
import runs
from exact import ARMS, K3_2, PI_REF, TILT_1, TILT_2, Tabular, Tree, apart, arms, bandit_game, farthest
from model import Setup, load_model
from policies import TOK, patch, random_policy, save, weights
from runs import close, dense, ends, ragged, rows_in, spoken, text_of

QUICK = dict(
    families="write", steps=2, prompts=6, max_new=6, micro_tokens=64,
    reward="runs:vowels", kl_coef=.05, lr_end=1.0)


def train(out, init, **options):
    return runs.train(ppo, out, init=init, **QUICK | options)


def double(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


# ---------------------------------------------------------------- the KL estimators

def estimate(logp, ref_logp, ratio, kind):
    return ppo.kl_estimate(logp, ref_logp, kind)


def test_kl_estimators_in_expectation_by_enumeration():
    """Golden numbers, gradients, expectations over a vocabulary, and over whole responses."""
    kinds = ("k1", "k2", "k3")
    exact.check_kl_values(estimate, kinds)
    exact.check_kl_gradients(estimate, kinds)
    exact.check_kl_in_expectation(estimate, kinds)
    exact.check_kl_over_responses(estimate, ("k2", "k3"))


# ---------------------------------------------------------------- rewards and advantages

def slow_gae(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, one row, the definition and nothing clever."""
    V, n, out = list(values) + [0.0], len(rewards), []
    for t in range(n):
        total = 0.0
        for s in range(t, n):
            delta = rewards[s] + gamma * V[s + 1] - V[s]
            total += (gamma * lam) ** (s - t) * delta
        out.append(total)
    return out


def test_kl_penalty_sign_and_place_of_the_score():
    kl, score = ragged(2), [3.0, -1.0, .5, 2.0, 7.0, 0.0]
    slow = []
    for row, last in zip(kl, score):
        paid = [-.3 * x for x in row]
        paid[-1] += last
        slow.append(paid)
    values, mask = dense(kl, padding=float("nan"))
    close(ppo.token_rewards(double(score), values, mask, .3), dense(slow)[0])


def test_terminal_reward_is_on_the_last_response_token():
    """γ = λ = 1 and V = β = 0: every response token has advantage = score; a score on a pad would leave 0."""
    score = double([1, 2, 3, 4, 5, 6])
    _, mask = dense(ragged(3))
    zero = torch.zeros_like(mask)
    for m in (mask, mask.bool()):
        rewards = ppo.token_rewards(score, zero, m, 0.0)
        adv, ret = ppo.gae(rewards, zero, m, 1.0, 1.0)
        close(adv, score[:, None] * mask)
        close(ret, score[:, None] * mask)


@pytest.mark.parametrize("gamma, lam", [(1.0, .95), (.9, .8), (.7, 0.0), (0.0, .5)])
@pytest.mark.parametrize("poison", [0.0, 1e9, float("nan")])
def test_gae_against_brute_force_and_poisoned_padding(gamma, lam, poison):
    rewards, values = ragged(4), ragged(5)
    r, mask = dense(rewards, padding=poison)
    v, _ = dense(values, padding=poison)
    got, ret = ppo.gae(r, v, mask, gamma, lam)
    slow = [slow_gae(*row, gamma, lam) for row in zip(rewards, values)]
    adv, _ = dense(slow)
    close(got, adv)
    close(ret, adv + dense(values)[0])


def test_f1_gae_returns_and_whitened_advantages():
    r, mask = dense([[-.1, -.2, 1], [-.05, .5]], 5, 1e9)
    v, _ = dense([[.2, .3, .4], [.1, .2]], 5, 1e9)
    adv, ret = ppo.gae(r, v, mask, 1.0, .95)
    close(ret[mask.bool()], [.6465, .77, 1, .435, .5], atol=1e-7)
    white = ppo.whiten(adv, mask)[mask.bool()]
    close(white, [.136071, .333458, 1.425386, -.800467, -1.094448], atol=2e-6)


@pytest.mark.parametrize("poison", [0.0, 1e9, float("nan")])
def test_whitening_counts_response_tokens_only(poison):
    rows = ragged(6)
    every = double(list(itertools.chain(*rows)))
    x, mask = dense(rows, padding=poison)
    close(ppo.masked_mean(x, mask), every.mean())
    close(ppo.masked_sum(x, mask), every.sum())
    close(ppo.masked_var(x, mask), every.var())
    white = (dense(rows)[0] - every.mean()) / (every.var() + 1e-8).sqrt()
    close(ppo.whiten(x, mask), white * mask)


def test_whitening_equal_advantages_gives_zero():
    """Nothing to tell apart is no gradient, not a division by 0."""
    x, mask = dense([[.3, .3], [.3]], 4)
    assert ppo.whiten(x, mask).abs().max() < 1e-6


# ---------------------------------------------------------------- the losses

def test_policy_loss_and_its_gradient():
    """-min(ρA, clip(ρ)A) term by term; where the clip decides, the gradient is 0, else -ρA."""
    rng = random.Random(7)
    for _ in range(200):
        old, adv = double(rng.gauss(-2, 1)), double(rng.gauss(0, 1))
        clip = rng.choice([.1, .2, .5])
        x = (old + rng.gauss(0, .4)).requires_grad_()
        loss, ratio, clipped = ppo.policy_loss(x, old, adv, clip)
        loss.backward()
        rho = math.exp(x.item() - old)
        near = min(max(rho, 1 - clip), 1 + clip)
        held = rho > 1 + clip if adv > 0 else rho < 1 - clip
        close(loss.detach(), -min(rho * adv, near * adv))
        close(x.grad, 0.0 if held else -rho * adv)
        close(ratio.detach(), rho)
        assert bool(clipped) == held                   # clip_frac counts where the clip decides, not where ρ is far


VALUE_CLIP = [  # V, V_old, R, ε -> ½ max((V-R)², (clip(V)-R)²), dL/dV; the clip binds in rows 2, 3 and 5
    (1.1, 1.0, 2.0, .2, .405, -.9),        # moved less than ε: the plain loss
    (1.5, 1.0, 2.0, .2, .32, 0.0),         # moved 0.5 towards R: as if it had moved 0.2, and no further pull
    (0.2, 1.0, 0.0, .2, .32, 0.0),         # the same downwards
    (1.5, 1.0, 0.0, .2, 1.125, 1.5),       # moved away from R: the plain loss is larger, and pulls back
    (3.0, 1.0, 2.5, .2, .845, 0.0),        # past R
    (1.5, 1.0, 2.0, 0.0, .125, -.5),       # ε = 0: never clipped
]


@pytest.mark.parametrize("v, old, ret, clip, loss, slope", VALUE_CLIP)
def test_value_clip_table(v, old, ret, clip, loss, slope):
    x = double(v, requires_grad=True)
    got = ppo.value_loss(x, double(old), double(ret), clip)
    got.backward()
    close(got.detach(), loss)
    close(x.grad, slope)


# ---------------------------------------------------------------- the controllers

@pytest.mark.parametrize("kl, factor", [(6.6, 1.01), (60.0, 1.02), (-9.0, .98), (6.0, 1.0)])
def test_adaptive_kl_closed_form(kl, factor):
    """Ziegler's controller: proportional error, clipped at ±.2, so β moves at most .2 n / horizon at a time."""
    close(ppo.adapt(.1, kl, 6.0, 64, 640), .1 * factor)


@pytest.mark.parametrize("x", [.1, 5.1, -7.3, 33.3])
def test_normalize_equal_scores(x):
    """mean(x²) - mean(x)² in fp32 may come out below 0, whose root is complex."""
    for n in (1, 3, 7, 100):
        state = dict(seen=0, sum=0.0, square=0.0)
        got = ppo.normalize(torch.full((n,), x), state)
        assert got.dtype == torch.float32 and got.abs().max() < .1


# ---------------------------------------------------------------- the estimator as a whole, by enumeration

def first_gradient(world, adv):
    """That of the first PPO update, averaged over all responses; the advantages are adv."""
    loss, ratio, _ = ppo.policy_loss(world.logp, world.logp.detach(), adv, .2)
    assert (ratio == 1).all()
    chance = world.chance.detach()[:, None]
    return -world.gradient((chance * loss * world.mask).sum())


def exact_gradient(world, worth, beta):
    """∇(E[worth] - β KL(π || ref))."""
    kl = (world.logp - world.ref_logp).sum(1)
    return world.gradient((world.chance * (worth - beta * kl)).sum())


@pytest.mark.parametrize("critic, lam", [(0.0, 1.0), (0.0, .9), (1.0, 1.0)])
def test_expected_first_gradient_is_that_of_the_objective(critic, lam):
    """Exactly so with V = 0 and λ = 1, and with any V at all, which is only a baseline. λ < 1 trades that for
    variance."""
    world, beta = Tabular(0, words=(1, 2, 3)), .3
    torch.manual_seed(9)
    values = critic * torch.randn(len(world.theta)).double()
    kl = ppo.kl_estimate(world.logp.detach(), world.ref_logp, "k1")
    rewards = ppo.token_rewards(world.score, kl, world.mask, beta)
    adv, _ = ppo.gae(rewards, values[world.states], world.mask, 1.0, lam)
    off = farthest(first_gradient(world, adv), exact_gradient(world, world.score, beta))
    if lam == 1:
        assert off < 1e-10
    else:
        assert off > 1e-3


def test_expected_gradient_with_a_cost_is_that_of_the_lagrangian():
    """Over all responses, whatever the two critics say: ∇ [(E[r] - λ E[c]) / (1 + λ) - β KL]."""
    world, beta, lam = Tabular(3, words=(1, 2, 3)), .3, .7
    torch.manual_seed(9)
    cost = torch.randn(len(world.score)).double()
    kl, advs = world.logp.detach() - world.ref_logp, []
    for pay, sign in ((world.score, 1), (cost, -1)):
        values = torch.randn(len(world.theta)).double()
        rewards = ppo.token_rewards(pay, kl, world.mask, sign * beta)
        adv, _ = ppo.gae(rewards, values[world.states], world.mask, 1.0, 1.0)
        advs.append(adv)
    worth = (world.score - lam * cost) / (1 + lam)
    got = first_gradient(world, ppo.lagrangian(*advs, lam))
    close(got, exact_gradient(world, worth, beta))


# ---------------------------------------------------------------- the loop against a second loop

def values_of(net, row):
    """The value of the state before each token of the response."""
    ids, start = row
    states = net(torch.tensor([ids]))[0, start - 1:-1]
    return net.score(states)[:, 0]


class Slow:
    """PPO again, from the papers: one row at a time, no padding, no masks, no micro-batches. critics: the folders that
    the critic starts from, and that of the cost."""

    def __init__(self, cfg, critics):
        self.cfg, self.beta, self.multiplier = cfg, cfg.kl_coef, cfg.cost_lambda
        self.seen_scores = []
        self.policy, self.ref = load_model(cfg.init), load_model(cfg.init)
        self.critics = [load_model(folder, n_scores=1) for folder in critics]
        self.optimizer = self.optimizer_of(self.policy, cfg.lr)
        self.critic_optimizers = [self.optimizer_of(critic, cfg.critic_lr) for critic in self.critics]

    def optimizer_of(self, net, lr):
        cfg = self.cfg
        return runs.SlowOptimizer(net, lr, cfg.steps, cfg, floor=cfg.lr_end)

    def logp(self, net, row):
        return spoken(net, *row, self.cfg.temperature)

    def scores(self, rows, raw, theirs):
        c, scores = self.cfg, []
        for row, own, other in zip(rows, raw, theirs):
            bonus = c.reward_shift if ends(row) else -c.missing_end
            scores.append(own - other + bonus)
        if c.normalize_reward:
            self.seen_scores += scores
            seen = torch.tensor(self.seen_scores)
            spread = seen.var(correction=0) + 1e-8
            scores = ((torch.tensor(scores) - seen.mean()) / spread.sqrt()).tolist()
        if c.clip_reward:
            scores = [min(max(s, -c.clip_reward), c.clip_reward) for s in scores]
        return scores

    def advantages(self, kl, last, values, sign):
        """Of one row, whose last token gets `last` and every token sign · β · its KL -> advantages, returns."""
        c = self.cfg
        beta = self.beta if c.kl == "k1" else 0.0
        rewards = (sign * beta * kl).tolist()
        rewards[-1] += last
        adv = slow_gae(rewards, values.tolist(), c.gamma, c.lam)
        return torch.tensor(adv), torch.tensor(adv) + values

    def learn(self, step, k, rows, kl, lasts, batches):
        """The advantages by the critic k, 0 that of the reward and 1 that of the cost; it learns -> and its metrics."""
        with torch.no_grad():
            values = [values_of(self.critics[k], row) for row in rows]
        adv, returns = [], []
        for own in zip(kl, lasts, values):
            a, target = self.advantages(*own, sign=1 if k else -1)
            adv.append(a)
            returns.append(target)
        learnt = self.fit(step, k, rows, values, returns, batches)
        if k:
            learnt = {"cost_" + name: value for name, value in learnt.items()}
        return adv, learnt

    def pay(self, step, adv, cost_adv, costs):
        """The advantages of reward and cost together; the multiplier moves."""
        c, both = self.cfg, []
        for a, b in zip(adv, cost_adv):
            both.append((a - self.multiplier * b) / (1 + self.multiplier))
        excess = runs.mean(costs) - c.cost_limit
        growth = c.lambda_lr * self.multiplier * excess
        if step >= c.critic_warmup:
            self.multiplier *= math.exp(min(1.0, max(-1.0, growth)))
        return both

    def step(self, step, rows, raw, theirs, costs, batches, documents):
        """One step on these rows -> what has to be logged. raw, theirs, costs: of each row its reward, that of the
        reference's answer, its cost. batches: the rows of each update. documents: rows of the pretraining loss."""
        c = self.cfg
        with torch.no_grad():
            old, entropy = zip(*(self.logp(self.policy, row) for row in rows))
            ref = [self.logp(self.ref, row)[0] for row in rows]
        kl = [a - b for a, b in zip(old, ref)]
        adv, learnt = self.learn(step, 0, rows, kl, self.scores(rows, raw, theirs), batches)
        metrics = dict(beta=self.beta) | learnt
        if c.cost:
            metrics |= {"cost": runs.mean(costs), "lambda": self.multiplier}
            cost_adv, learnt = self.learn(step, 1, rows, kl, costs, batches)
            metrics |= learnt
            adv = self.pay(step, adv, cost_adv, costs)
        unit = 1.0      # whitening divides the reward by this, so it must divide a penalty in the loss too
        if c.whiten:
            every = torch.cat(adv)
            unit = float(every.std())
            scale = (every.var() + 1e-8).sqrt()
            adv = [(a - every.mean()) / scale for a in adv]
        if step >= c.critic_warmup:
            metrics |= self.improve(step, rows, old, ref, adv, unit, batches, documents)
        per_response = runs.mean(k.sum() for k in kl)
        if c.target_kl:
            error = min(max(per_response / c.target_kl - 1, -.2), .2)
            self.beta *= 1 + error * len(rows) / c.kl_horizon
        entropies = torch.cat(entropy)
        return metrics | dict(
            reward=runs.mean(raw), kl=per_response, entropy=runs.mean(entropies), sampler_gap=0.0,
            response_length=runs.mean(map(len, old)), finished=runs.mean(map(ends, rows)))

    def fit(self, step, k, rows, before, returns, batches):
        """Regress a critic on the returns."""
        c, losses = self.cfg, []
        every = torch.cat(returns)
        missed = every - torch.cat(before)
        metrics = dict(explained_variance=float(1 - missed.var() / every.var()))
        for batch in batches:
            tokens = []
            for i in batch:
                values = values_of(self.critics[k], rows[i])
                for v, v0, R in zip(values, before[i], returns[i]):
                    loss = (v - R) ** 2 / 2
                    if c.value_clip:
                        near = v0 + (v - v0).clamp(-c.value_clip, c.value_clip)
                        loss = max(loss, (near - R) ** 2 / 2)
                    tokens.append(loss)
            (sum(tokens) / len(tokens)).backward()
            losses += tokens
            metrics["critic_grad_norm"] = self.critic_optimizers[k].step(step)["grad_norm"]
        return metrics | dict(value_loss=runs.mean(losses))

    def improve(self, step, rows, old, ref, adv, unit, batches, documents):
        """The updates of the policy."""
        c, every, metrics = self.cfg, collections.defaultdict(list), {}
        for batch in batches:
            seen, terms = collections.defaultdict(list), []
            for i in batch:
                logp, entropy = self.logp(self.policy, rows[i])
                for t, A in enumerate(adv[i]):
                    rho = (logp[t] - old[i][t]).exp()
                    d = logp[t] - ref[i][t]
                    clipped = -rho.clamp(1 - c.clip, 1 + c.clip) * A
                    loss = max(-rho * A, clipped)
                    penalty = dict(k1=0.0, k2=d ** 2 / 2, k3=(-d).exp() - 1 + d)[c.kl]
                    bonus = c.entropy_coef * entropy[t]
                    terms.append(loss + self.beta / unit * penalty - bonus)
                    seen["policy_loss"].append(loss)
                    seen["ratio"].append(rho)
                    seen["clip_frac"].append(bool(clipped > -rho * A))
                    seen["approx_kl"].append(rho - 1 - rho.log())       # estimates KL(π_old || π)
            total = sum(terms) / len(terms)
            if documents:
                read = [spoken(self.policy, ids, 1)[0] for ids, _ in documents]
                total = total - c.ptx_coef * torch.cat(read).mean()
            total.backward()
            metrics |= self.optimizer.step(step)
            for name, values in seen.items():
                every[name] += values
            if c.stop_kl and runs.mean(seen["approx_kl"]) > c.stop_kl:
                self.stopped_early = runs.mean(every["approx_kl"]) < c.stop_kl
                break
        for name, values in every.items():
            metrics[name] = runs.mean(values)
        return metrics


# Every option takes another value than its default at least once; JUDGE is a reward model, TEXTS a file of documents.
LOOPS = {
    "k1, whitened, clipped, two minibatches": dict(
        epochs=2, minibatches=2, temperature=.7, gamma=.9, lam=.8, reward_shift=.5, value_clip=.05, clip=.05,
        lr=3e-3, critic_lr=3e-2, lr_end=.2, clip_grad=.5, target_kl=.01, kl_horizon=20.0, warmup=2, weight_decay=.3,
        seed=3, eval_prompts=1),
    "k2, entropy, clipped score": dict(
        kl="k2", kl_coef=.5, whiten=False, entropy_coef=.1, clip_reward=.5, missing_end=.3, epochs=3, lr=2e-3),
    "k2, whitened": dict(kl="k2", kl_coef=.5, lr=2e-3, epochs=1),
    "k3, running score, no value clip, a reward model, critic warm-up": dict(
        kl="k3", kl_coef=.5, normalize_reward=True, value_clip=0.0, epochs=2, lr=5e-3, temperature=1.3, critic_warmup=1,
        reward="0.5*JUDGE + runs:vowels"),
    "epochs ended by the drift": dict(epochs=5, minibatches=2, lr=3e-3, stop_kl=.02),
    "pretraining documents": dict(ptx_coef=.7, ptx_batch=5, ptx_data="TEXTS", seed=2),
    "minus the reference": dict(minus_reference=True, lr=1e-2, clip_reward=0.0),
    "a cost, k1": dict(
        cost="0.5*JUDGE + runs:price", minibatches=2, gamma=.9, lam=.8, kl_coef=.5, value_clip=.05, clip=.05,
        cost_limit=.3, cost_lambda=.6, lambda_lr=.3, lr=3e-3, critic_lr=1e-2),
    "a cost, k2, critic warm-up": dict(
        cost="0.5*JUDGE + runs:price", kl="k2", kl_coef=.5, whiten=False, cost_limit=-1.0, cost_lambda=3.0,
        lambda_lr=.02, critic_warmup=1, lr=3e-3, critic_lr=1e-2),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rows = [dict(text="The red cup is on the table. " * (1 + i % 3) + str(i)) for i in range(30)]
    return runs.write(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


@pytest.mark.parametrize("name", LOOPS)
def test_loop_equals_a_slow_loop(name, tmp_path, tiny, judge, prompts, texts, monkeypatch, float64):
    """Every logged number of every step, evaluations included, and every weight at the end, in float64. The critic of
    a sum starts from its first reward model, else from the policy."""
    options = QUICK | LOOPS[name] | dict(data=prompts, init=tiny, out=str(tmp_path / "run"))
    options |= dict(steps=3, eval_every=2)
    for key, value in options.items():
        if isinstance(value, str):
            options[key] = value.replace("JUDGE", judge).replace("TEXTS", texts)
    cfg = ppo.Config(**runs.QUICK | options)
    steps = runs.watch_steps(monkeypatch)
    rows = runs.train(ppo, **options)
    monkeypatch.undo()

    reward_model = load_model(judge)

    def score(record, row, spec=cfg.reward):
        """What a sum says of a response: a rule of runs.py, with half of the reward model's score where it is in it."""
        rule = getattr(runs, spec.split(":")[-1])
        value = rule(record, text_of(row), ends(row))
        if judge in spec:
            last = reward_model(torch.tensor([row[0]]))[0, -1]
            value += .5 * reward_model.score(last).item()
        return value

    specs = [cfg.reward, cfg.cost] if cfg.cost else [cfg.reward]
    slow = Slow(cfg, [judge if judge in spec else tiny for spec in specs])
    stream, held = data.open_stream(prompts, "prompt", cfg.seed, n_held=cfg.eval_prompts)
    documents, _ = data.open_stream(texts, "text", cfg.seed, n_held=0,
                                    prepare=lambda record: data.encode(record, TOK, 64, loss_on="all"))
    for step, (row, watched) in enumerate(zip(rows, steps)):
        records, roll = watched.rollouts[0]
        assert records == stream.batch(step, cfg.prompts), "other prompts were asked for"
        own, theirs = rows_in(roll), [0.0] * len(records)
        if cfg.minus_reference:
            asked, answers = watched.rollouts[1]
            assert asked == records, "the reference answered other prompts"
            theirs = list(map(score, asked, rows_in(answers)))
        raw = list(map(score, records, own))
        costs = [score(*said, cfg.cost) for said in zip(records, own)] if cfg.cost else None
        shown = documents.batch(step, cfg.ptx_batch) if cfg.ptx_coef else None
        want = slow.step(step, own, raw, theirs, costs, runs.updates(watched, cfg), shown)
        truths = []
        for record, said in zip(records, own):
            if "family" in record:
                truths.append(data.gold(record, text_of(said), ends(said)))
        want["gold"] = runs.mean(truths)
        if step % 2 or step + 1 == cfg.steps:
            asked, answers = watched.rollouts[-1]
            assert asked == held, "the evaluation is of other prompts than those held out"
            want |= runs.slow_evaluation(slow.policy, slow.ref, asked, answers, score, cfg.temperature)
        runs.compare_rows(step, row, want)
        runs.check_terms(row, cfg.reward)
    runs.compare_weights(weights(cfg.out), slow.policy)
    for part, critic in zip(("critic", "cost_critic"), slow.critics):
        assert weights(cfg.out, part), f"no {part} was written"
        runs.compare_weights(weights(cfg.out, part), critic)
    assert any(TOK.end in ids[:start] for ids, start in own), "no prompt holds an end token"
    if cfg.clip < .1:
        assert max(row.get("clip_frac", 0) for row in rows) > .05, "nothing was clipped"
    if cfg.stop_kl:
        assert slow.stopped_early, "the epochs have to end where the mean over all updates is still below the limit"


def test_lr_0_every_ratio_is_1_in_all_epochs(tiny, tmp_path):
    """Rows are padded and cut differently in sampling, scoring and updating; none of it may move a log-probability.
    approx_kl is a mean of terms ≥ 0 that vanish only at ratio 1. sampler_gap: temperature in one but not the other."""
    still = dict(lr=1e-30, critic_lr=1e-30, epochs=3, minibatches=2)
    for row in train(tmp_path / "a", tiny, prompts=16, temperature=.6, **still):
        assert row["ratio"] == pytest.approx(1, abs=1e-6)
        assert row["clip_frac"] == 0 and row["approx_kl"] < 1e-9
        assert row["sampler_gap"] < 1e-6 and abs(row["kl"]) < 1e-5


@pytest.mark.skipif(model.precision(torch.device("cpu")) == "fp32", reason="bf16 is only emulated here")
def test_in_bf16_the_ratio_is_to_the_trainers_own_log_probs(tiny, tmp_path):
    """The sampler's differ there from those of a whole pass: taken for the old ones, they make an approx_kl of 5e-6."""
    row, = train(tmp_path / "a", tiny, dtype="bf16", steps=1, prompts=32, max_new=16, epochs=1)
    assert row["approx_kl"] < 1e-7 and row["ratio"] == pytest.approx(1, abs=1e-6)
    assert row["sampler_gap"] > 1e-4, "both have the same log-probs, and nothing was tested"


def test_the_sampler_gap_does_not_cancel(tiny):
    """|log π of the sampler - log π of the trainer|, per token."""
    roll = model.generate(load_model(tiny, Setup(TOK)), [[5, 6, 7]], 6, 4)
    off, nothing = torch.full_like(roll.logp, .1), torch.zeros_like(roll.logp)
    off[:, ::2] *= -1
    metrics = ppo.report([{}] * 4, roll, torch.zeros(4), {}, roll.logp + off, nothing, nothing)
    assert float(metrics["sampler_gap"]) == pytest.approx(.1, abs=1e-6)


# ---------------------------------------------------------------- the critic and the reference

@pytest.mark.parametrize("heads", [1, 3])
def test_the_critic_starts_from_the_score_that_the_reward_reads(heads, tiny, tmp_path):
    """Of a reward model with several heads it is the first, and so the value of a state is what that one says of it."""
    judge = save(tmp_path / "rm", random_policy(5, n_scores=heads))
    train(tmp_path / "a", tiny, reward=judge, cost=judge, steps=1, critic_lr=1e-30)
    want = load_model(judge).score.weight[:1].detach()
    for name in ("critic", "cost_critic"):
        got = weights(tmp_path / "a", name)
        close(got[f"{name}/score.weight"], want)


def test_the_critic_of_a_finished_run_is_a_folder_that_the_next_run_starts_from(tiny, tmp_path):
    train(tmp_path / "a", tiny, steps=2, critic_lr=1e-2)
    critic = str(tmp_path / "a" / "critic")
    assert load_model(critic).score.weight.abs().max() > 0
    train(tmp_path / "b", tiny, steps=1, critic=critic, critic_lr=1e-30)
    runs.compare_weights(weights(tmp_path / "b", "critic"), load_model(critic), atol=1e-12)
    with pytest.raises(data.UserError, match="language model is needed"):
        train(tmp_path / "c", critic)


def test_with_lora_the_reference_samples_without_the_adapter(tiny, tmp_path, monkeypatch):
    prompt = TOK.prompt([dict(role="user", content="Hm")])
    seen, real = [], model.generate

    def says(net):
        return net.logits(net(torch.tensor([prompt]))).detach()

    def spy(net, *args, **kwargs):
        seen.append(says(net))
        return real(net, *args, **kwargs)
    patch(monkeypatch, "generate", spy)
    train(tmp_path / "a", tiny, lr=1e-2, steps=3, lora_r=2, minus_reference=True)
    start = says(load_model(tiny))
    moved = [farthest(logits, start) for logits in seen[:6]]     # the policy and the reference in turn, three steps
    policy, ref = moved[2::2], moved[1::2]
    assert max(ref) < 1e-5 and min(policy) > 1e-3


@pytest.mark.parametrize("flags, word", [
    ("--lr 0", "--lr"), ("--clip 0", "--clip"), ("--steps 0", "--steps"), ("--gamma 1.5", "--gamma"),
    ("--lam -1", "--lam"), ("--temperature 0", "--temperature"), ("--epochs 0", "--epochs"), ("--kl k4", "k3"),
    ("--kl_coef -1", "--kl_coef"), ("--nonsense 1", "--nonsense"), ("--prompts 2.5", "--prompts"),
    ("--reward", "--reward"), ("--kl_horizon 0", "--kl_horizon"), ("--cost_lambda 0", "--cost_lambda"),
    ("--lambda_lr -1", "--lambda_lr"), ("--fused_bwd --ptx_coef 1", "--ptx_coef")])
def test_refusals(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = runs.refuse(ppo, flags.split(), monkeypatch, capsys)
    assert code == 2 and word in error


# ---------------------------------------------------------------- the one-token bandit (F2)

@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    return bandit_game(tmp_path_factory.mktemp("bandit"))


def play(out, bandit, **options):
    """The real loop on the bandit, to its end -> its rows, the policy."""
    init, prompts = bandit
    game = dict(
        data=prompts, reward="exact:worth", max_new=1, epochs=1, missing_end=0.0, micro_tokens=4096,
        critic_lr=3e-2, lr_end=0.0, lr=1e-2)
    return train(out, init, **game | options), arms(out)


F2 = {  # whitening, β, where it must arrive; k1 has no noise left there, k2 and k3 have, so they need more samples
    "k1": (True, 1.0, TILT_1, dict(steps=40, prompts=96)),
    "k2": (False, 1.0, TILT_1, dict(steps=80, prompts=256, lr=5e-3)),
    "k3": (False, 2.0, K3_2, dict(steps=80, prompts=64)),
}


@pytest.mark.parametrize("kl", F2)
def test_bandit_fixed_point(kl, bandit, tmp_path):
    """The real loop, to its end: within .006 (three seeds). k3 in the loss is no KL penalty: it does not arrive at the
    tilt of β = 2."""
    whiten, beta, target, options = F2[kl]
    _, final = play(tmp_path / "a", bandit, kl=kl, kl_coef=beta, whiten=whiten, **options)
    assert farthest(final, target) < .02 and farthest(final, TILT_2) > .05


def ppo_loss(tree, kl):
    """logp -> the exact expectation of PPO's loss at the first update of a step, the critic being right."""
    ref = tree.logp(tree.ref)

    def loss_of(logp):
        old = logp.detach()
        chance = old.sum(1).exp()[:, None].expand(-1, tree.n)                            # (N, n)
        rewards = ppo.token_rewards(tree.reward, ppo.kl_estimate(old, ref, "k1"), tree.mask,
                                    tree.beta if kl == "k1" else 0.0)
        to_come = rewards.flip(1).cumsum(1).flip(1)
        values = tree.visits(chance * to_come) / tree.visits(chance)
        adv, _ = ppo.gae(rewards, values[tree.states], tree.mask, 1.0, .95)
        loss, _, _ = ppo.policy_loss(logp, old, adv, .2)
        if kl != "k1":
            loss = loss + tree.beta * ppo.kl_estimate(logp, ref, kl)
        return (chance * loss).sum()
    return loss_of


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("n, seed", [(1, 0), (2, 0), (2, 1)])
def test_which_distribution_is_reached(n, seed, kl):
    """On one token k1 and k2 reach the tilt, on two k1 alone: a KL in the loss is not credited to the token before."""
    exact.check_predictions()
    tree = Tree(n, seed)
    beta, slow = tree.beta, 1 / (tree.beta + 3)
    target = {"k1": tree.tilt(beta), "k2": tree.token_by_token(exact.towards_reward, beta),
              "k3": tree.token_by_token(exact.spread_over_reward, beta)}[kl]
    steps, rate = (200, slow) if kl == "k3" else (40, .5 / beta)
    reached = tree.settle(ppo_loss(tree, kl), steps, lambda step: rate)
    assert apart(reached, target) < 1e-4
    if kl == "k3" or n == 2 and kl == "k2":
        assert apart(reached, tree.tilt(beta)) > .05


# ---------------------------------------------------------------- a cost and its multiplier (Safe RLHF)

COSTS = (-1.0, -1.0, 1.0, 2.0)          # of the arms of the bandit


def toll(record, text, finished):
    return COSTS[ARMS.index(text)]


NEXT_LAMBDA = [  # λ, E[c] - limit, rate -> λ afterwards; an update moves ln λ by 1 at most
    (1.0, 0.0, .1, 1.0),
    (.5, 2.0, .1, .5525854590),
    (1.0, -2.0, .1, .8187307531),
    (2.0, 50.0, .1, 2 * math.e),
    (100.0, -1e9, 1.0, 100 / math.e)]


@pytest.mark.parametrize("lam, excess, rate, golden", NEXT_LAMBDA)
def test_next_lambda_table(lam, excess, rate, golden):
    """It grows with the excess, falls without, and stays positive however long the cost is low."""
    assert ppo.next_lambda(lam, excess, rate) == pytest.approx(golden, rel=1e-9)
    for _ in range(2000):
        before, lam = lam, ppo.next_lambda(lam, -10.0, 1.0)
        assert 0 < lam < before


def safe_tilt(lam):
    """argmax of E[r] - λ E[c] - (1 + λ) KL on the bandit, in plain floats."""
    weights = []
    for r, (p, c) in enumerate(zip(PI_REF, COSTS)):
        worth = (r - lam * c) / (1 + lam)
        weights.append(p * math.exp(worth))
    return [w / sum(weights) for w in weights]


def expected_cost(pi):
    return sum(p * c for p, c in zip(pi, COSTS))


def saddle():
    """The λ whose tilt costs 0 on average, by bisection -> λ, π."""
    low, high = 0.0, 10.0
    for _ in range(200):
        mid = (low + high) / 2
        if expected_cost(safe_tilt(mid)) > 0:
            low = mid
        else:
            high = mid
    return low, safe_tilt(low)


def test_f2_safe_rlhf_solved_by_bisection():
    """And there the combined advantages of all arms are equal, so that the policy gradient vanishes."""
    lam, pi = saddle()
    assert lam == pytest.approx(.4742, abs=5e-5)
    assert pi == pytest.approx([.2366, .3496, .2414, .1724], abs=5e-5)
    assert expected_cost(pi) == pytest.approx(0, abs=1e-12)
    assert expected_cost(safe_tilt(0.0)) == pytest.approx(.9102, abs=5e-5)
    kl = (double(pi) / double(PI_REF)).log()[:, None]
    ones, score, cost = torch.ones(4, 1), double([0, 1, 2, 3]), double(COSTS)
    rewards, spreads = ppo.token_rewards(score, kl, ones, 1.0), []
    for beta in (-1.0, 1.0):
        adv = ppo.lagrangian(rewards, ppo.token_rewards(cost, kl, ones, beta), lam)
        spreads.append(float(adv.std()))
    assert spreads[0] < 1e-6 and spreads[1] > .1, "+β KL belongs in the costs, not -β"


def test_bandit_with_a_cost_arrives_at_the_saddle_point(bandit, tmp_path):
    """The real loop, to its end: E[c] = 0, at the λ and the policy of F2."""
    rows, final = play(tmp_path / "a", bandit, cost="test_ppo:toll", kl_coef=1.0, steps=120, prompts=128, lambda_lr=.15,
                       lr_end=.1)
    lam, pi = saddle()
    assert farthest(final, pi) < .02 and farthest(pi, exact.tilt(1.0)) > .1
    assert rows[-1]["lambda"] == pytest.approx(lam, abs=.06)
    assert abs(runs.mean(row["cost"] for row in rows[-20:])) < .05
