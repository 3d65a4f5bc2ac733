"""grpo.py: every advantage and loss against its golden number and a slow formula, the estimators against enumeration,
the loop against a second loop, and its fixed points against the closed forms of a one-token bandit.

What all trainers have in common (resuming, seeds, evaluation, LoRA, micro-batches) is in test_runs.py.
"""
import collections
import itertools
import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import exact
import grpo
import model
import runs
from exact import PI_REF, SCALED_2, TILT_2, K3_2, Tabular, Tree, apart, arms, bandit_game, farthest
from grpo import ADVANTAGES, POLICY_LOSSES, kl_estimate, policy_loss, token_weights
from model import Setup, load_model
from policies import TOK, random_policy, save, weights
from runs import close, dense, ends, ragged, rows_in, same, spoken, text_of, watch, write

QUICK = dict(families="write", steps=2, prompts=3, group=4, max_new=6, micro_tokens=64, reward="runs:vowels",
             lr_end=1.0, lr=1e-3)
PER = ("token", "response", "constant")


def train(out, init, **options):
    return runs.train(grpo, out, init=init, **QUICK | options)


def hyper(loss="clip", **options):
    """A run's options, whatever an advantage or a loss may ask for."""
    return SimpleNamespace(**(vars(grpo.Config()) | dict(loss=loss, clip_high=.28) | options))


def watch_rewards(monkeypatch, adv):
    """Record the rewards (P, G) of each step just before they become advantages, and these."""
    seen, real = [], ADVANTAGES[adv]

    def watched(r, h):
        seen.append((r.clone(), real(r, h)))
        return seen[-1][1]
    monkeypatch.setitem(ADVANTAGES, adv, watched)
    return seen


# ---------------------------------------------------------------- advantages

F1_REWARDS = [[1, 0, 0, 1], [1, 1, 0, 1]]
GOLDEN_ADVANTAGES = {
    "grpo": [[.8660239, -.8660239, -.8660239, .8660239], [.499999, .499999, -1.499997, .499999]],
    "dr_grpo": [[.5, -.5, -.5, .5], [.25, .25, -.75, .25]],
    "rloo": [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [1 / 3, 1 / 3, -1, 1 / 3]],
    # F1 has no REINFORCE++. Mean 5/8, variance (5 · .375² + 3 · .625²) / 7 = 1.875 / 7, root .5175492.
    "reinforce_pp": [[.7245674, -1.2076123, -1.2076123, .7245674], [.7245674, .7245674, -1.2076123, .7245674]],
    # Of the centred ones the variance is (4 · .25 + 3 · .0625 + .5625) / 7 = .25, the root .5.
    "reinforce_pp_baseline": [[1, -1, -1, 1], [.5, .5, -1.5, .5]],
}


def centred(group):
    return [r - sum(group) / len(group) for r in group]


def slow_grpo(groups):
    return [[a / (statistics.stdev(group) + 1e-6) for a in centred(group)] for group in groups]


def slow_dr_grpo(groups):
    return [centred(group) for group in groups]


def slow_rloo(groups):
    return [[r - (sum(group) - r) / (len(group) - 1) for r in group] for group in groups]


def slow_reinforce_pp(groups):
    every = [r for group in groups for r in group]
    return [[(r - statistics.fmean(every)) / (statistics.stdev(every) + 1e-6) for r in group] for group in groups]


def slow_reinforce_pp_baseline(groups):
    spread = statistics.stdev(a for group in groups for a in centred(group))
    return [[a / (spread + 1e-6) for a in centred(group)] for group in groups]


SLOW_ADVANTAGES = {name: globals()[f"slow_{name}"] for name in GOLDEN_ADVANTAGES}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_advantage_has_its_golden_number_and_is_its_slow_formula(name):
    """One without both cannot be added."""
    close(ADVANTAGES[name](torch.tensor(F1_REWARDS, dtype=torch.float64), hyper()), GOLDEN_ADVANTAGES[name], atol=3e-6)
    rng = random.Random(0)
    for P, G in ((1, 2), (5, 4), (3, 7)):
        groups = [[rng.gauss(5 * i, 1 + i) for _ in range(G)] for i in range(P)]
        close(ADVANTAGES[name](torch.tensor(groups, dtype=torch.float64), hyper()), SLOW_ADVANTAGES[name](groups))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_p16_groups_stay_apart_and_permute(name):
    """Rewards of 100 · prompt + noise: every group sums to 0, but with the batch as the only baseline; permuting
    responses within groups, and groups, permutes the advantages and nothing else."""
    torch.manual_seed(0)
    r = 100 * torch.arange(5.0, dtype=torch.float64)[:, None] + torch.randn(5, 4, dtype=torch.float64)
    adv = ADVANTAGES[name](r, hyper())
    if name == "reinforce_pp":
        close(adv.sum(), 0)
        assert adv[0].sum() < -1 and adv[4].sum() > 1
    else:
        close(adv.sum(1), torch.zeros(5), atol=1e-9)
    rows, columns = torch.randperm(5), torch.stack([torch.randperm(4) for _ in range(5)])
    close(ADVANTAGES[name](r[rows].gather(1, columns), hyper()), adv[rows].gather(1, columns))
    close(ADVANTAGES[name](r + 3, hyper()), adv, atol=1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("G", [3, 7, 8])
def test_p17_equal_rewards_give_exactly_0(name, dtype, G):
    """Rounding leaves a mean of equal numbers some ulps off, and a standard deviation of as little blows that up."""
    rng = random.Random(1)
    constants = torch.tensor([[rng.gauss(0, 10)] for _ in range(1000)], dtype=dtype).expand(-1, G)
    for constant in constants:
        alike = constant.expand(2, G)
        assert not ADVANTAGES[name](alike, hyper()).any(), f"all rewards are {constant[0]}, and one is praised"
    if name == "reinforce_pp":      # it has no groups: equal rewards, if high, are praised
        return
    mixed = torch.cat([constants, torch.arange(1.0 * G, dtype=dtype)[None]])
    adv = ADVANTAGES[name](mixed, hyper())
    assert not adv[:-1].any() and adv[-1, -1] > .1


def test_reinforce_pp_counts_responses_where_verl_counts_tokens():
    """A long bad response and a short good one: ours are as far from 0, of theirs the short one is 7 times as far."""
    r, lengths = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([9, 1])
    close(ADVANTAGES["reinforce_pp"](r, hyper()), [[-.5 ** .5, .5 ** .5]], atol=1e-5)
    tokens = r[0].repeat_interleave(lengths)
    theirs = (tokens - tokens.mean()) / tokens.std()
    assert -theirs[-1] / theirs[0] > 7


# ---------------------------------------------------------------- the losses

F1_RATIO, F1_ADV, F1_MASK = [[1.5, .9, 1.1], [.5, 1.3, 1]], [[1.], [-.5]], [[1, 1, 1], [1, 1, 0]]
GOLDEN_LOSSES = {  # per response, token, constant (max_new 3) of the row "clip-higher .2/.28"
    # verl's Dr. GRPO figure, -.7433333, divides by 3 only; ours also by the 2 responses, so that it is a mean too.
    "clip": (-.2841667, -.446, -.7433333 / 2),
    # With F1's ratios s = 1.1408857 and .8062257, within the clip: (-s₁ + s₂/2)/2, (-3 s₁ + s₂)/5, the same sum over 6.
    "gspo": (-.3688864, -.5232863, -.4360719),
    # -min(ρ, 1.28) A ln ρ, by hand: row 1 -.5189953 +.0948245 -.1048412, row 2 -.1732868 +.1679131.
    "cispo": (-.0895121, -.1068771, -.0890643),
    # S = Σ ln ρ = .3954148 and -.4307829; -A S + S²/2 = -.3172383 and -.1226045.
    "opmd": (-.0835242, -.0879686, -.0733071),
}


def slow_clipped(rho, A, h):
    near = rho.clamp(1 - h.clip_low, 1 + h.clip_high)
    return max(-rho * A, -near * A), bool(-near * A > -rho * A)


def slow_clip(logp, old, A, h):
    return [slow_clipped((new - before).exp(), A, h) for new, before in zip(logp, old)]


def slow_gspo(logp, old, A, h):
    whole = (logp - old).mean().exp()
    return [slow_clipped(whole, A, h) for _ in logp]


def slow_cispo(logp, old, A, h):
    out = []
    for new, before in zip(logp, old):
        rho = math.exp(float(new.detach() - before))
        out.append((-min(rho, 1 + h.clip_high) * A * new, A != 0 and rho > 1 + h.clip_high))
    return out


def slow_opmd(logp, old, A, h):
    """-A log π(y) + τ/2 (log π(y)/π_old(y))² of the whole response, the square shared out evenly over its tokens."""
    square = (logp - old).sum() ** 2
    return [(-A * new + h.tau / 2 * square / len(logp), False) for new in logp]


# Of one response: log-probs now and then, its advantage -> (loss, whether the clip decides it) of each token.
SLOW_LOSSES = {name: globals()[f"slow_{name}"] for name in GOLDEN_LOSSES}


def slow_weights(lengths, per, max_new):
    """What the loss of one token of each response is multiplied by."""
    if per == "token":
        return [1 / max(1, sum(lengths)) for _ in lengths]
    if per == "response":
        responses = sum(n > 0 for n in lengths)
        return [1 / n / responses if n else 0.0 for n in lengths]
    return [1 / max_new / len(lengths) for _ in lengths]


def f1_loss(name, per, **options):
    ratio, mask = torch.tensor(F1_RATIO, dtype=torch.float64), torch.tensor(F1_MASK)
    adv = torch.tensor(F1_ADV, dtype=torch.float64)
    loss, back, decides = policy_loss(ratio.log(), torch.zeros_like(ratio), adv, mask, hyper(name, **options))
    return (loss * token_weights(mask, per, 3)).sum(), back, decides


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_has_a_golden_number(name):
    """One without it, and without its slow formula, cannot be added."""
    for per, golden in zip(("response", "token", "constant"), GOLDEN_LOSSES[name]):
        close(f1_loss(name, per)[0], golden, atol=1e-7)
    assert name in SLOW_LOSSES


def test_f1_ratios_and_where_the_clip_decides():
    for name, decided in (("clip", [[True, False, False], [True, False, False]]), ("gspo", [[False] * 3] * 2)):
        _, ratio, decides = f1_loss(name, "token")
        close(ratio, F1_RATIO)                      # the token's own, which a KL term needs
        assert decides.tolist() == decided
    _, _, decides = f1_loss("gspo", "token", clip_low=3e-4, clip_high=4e-4)
    assert decides.tolist() == [[True, True, True], [True, True, False]], "the masked token never counts as clipped"


@pytest.mark.parametrize("poison", [0.0, 1e9, float("nan"), float("inf")])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_p30_losses_and_gradients_against_a_slow_loop(name, per, poison):
    """Every loss under every mean, on ragged rows; what is in the padding reaches neither the loss nor a gradient."""
    h, clipped = hyper(name, clip_low=.1, tau=.7), 0
    for seed in range(3):
        old, rows = ragged(seed), []
        for before, step in zip(old, ragged(seed + 100, scale=.3)):
            row = [a + b for a, b in zip(before, step)]
            rows.append(torch.tensor(row, dtype=torch.float64, requires_grad=True))
        adv = [row[0] for row in ragged(seed + 200)]
        w, total, held = slow_weights([len(row) for row in rows], per, 7), 0.0, []
        for i, row in enumerate(rows):
            tokens = SLOW_LOSSES[name](row, torch.tensor(old[i], dtype=torch.float64), adv[i], h)
            total = total + w[i] * sum(loss for loss, _ in tokens)
            held.append([float(decides) for _, decides in tokens])

        (logp, mask), (old_logp, _) = dense([row.tolist() for row in rows], 9, poison), dense(old, 9, poison)
        logp.requires_grad_()
        A = torch.tensor(adv, dtype=torch.float64)[:, None]
        loss, ratio, decides = policy_loss(logp, old_logp, A, mask, h)
        got = (loss * token_weights(mask, per, 7))[mask.bool()].sum()
        got.backward()
        close(got.detach(), total.detach())
        close(logp.grad, dense(torch.autograd.grad(total, rows))[0])
        close(decides, dense(held)[0])
        close((ratio.detach() * mask).log().where(mask.bool(), 0.0), dense([
            row.detach() - torch.tensor(before) for row, before in zip(rows, old)])[0], atol=1e-7)
        clipped += sum(sum(row) for row in held)
    assert clipped == 0 if name == "opmd" else 0 < clipped < 50, "the clip has to bite, but not always"


@pytest.mark.parametrize("per", PER)
def test_p30_token_weights(per):
    """Of responses of 4, 1, 6, 2, 1 and 5 tokens, and of one without any (39): it has none to weigh, and counts as a
    response only where each is divided by the same constant. TRL divides by all in `response` too."""
    lengths = (4, 1, 6, 0, 2, 1, 5)
    w, (_, mask) = slow_weights(lengths, per, 6), dense([[1.0] * n for n in lengths])
    got = token_weights(mask, per, 6)
    close(got, dense([[w[i]] * n for i, n in enumerate(lengths)])[0], atol=1e-7)
    close(got.sum(), 19 / 42 if per == "constant" else 1, atol=1e-6)
    assert not token_weights(torch.zeros(3, 4), per, 6).any(), "25: all are masked"


def test_p30_long_wrong_answers():
    """The pull on a token of a wrong answer ten times as long: a tenth per response, the same per token or constant."""
    _, mask = dense([[1.0] * 20, [1.0] * 2], 23)
    for per, pull in dict(token=1, response=.1, constant=1).items():
        w = token_weights(mask, per, 20)
        close(w[0, 0] / w[1, 1], pull, atol=1e-6)


def loss_and_gradient(name, lengths=(3, 1, 2), spread=.5, **options):
    logp, mask = dense(ragged(1, lengths))
    old_logp = logp - dense(ragged(2, lengths, spread))[0]
    logp.requires_grad_()
    adv = torch.tensor([[1.0], [-2.0], [.5]], dtype=torch.float64)
    loss, ratio, _ = policy_loss(logp, old_logp, adv, mask, hyper(name, **options))
    total = (loss * token_weights(mask, "token", 1)).sum()
    return total.detach(), torch.autograd.grad(total, logp)[0], ratio.detach() * mask


def test_identities_of_the_losses():
    """gspo is clip at length 1. On policy all have the gradient of -A log π, whatever clip or τ."""
    for a, b in zip(loss_and_gradient("gspo", (1, 1, 1)), loss_and_gradient("clip", (1, 1, 1))):
        close(a, b)
    assert farthest(loss_and_gradient("gspo")[1], loss_and_gradient("clip")[1]) > .01
    _, plain, ratio = loss_and_gradient("clip", spread=0.0)
    close(plain[0, :3], [-1 / 6] * 3)
    for name in POLICY_LOSSES:
        close(loss_and_gradient(name, spread=0.0, tau=3.0)[1], plain)
    # cispo without a cap has unclipped PPO's gradient off policy too; its weights never have one of their own.
    free = loss_and_gradient("clip", clip_low=1.0, clip_high=1e9)
    close(loss_and_gradient("cispo", clip_high=1e9)[1], free[1])
    close(free[1], -free[2] * torch.tensor([[1.0], [-2.0], [.5]]) / 6)
    assert farthest(loss_and_gradient("cispo", clip_high=.01)[1], free[1]) > .01
    # opmd with τ → 0 is -A log π.
    close(loss_and_gradient("opmd", tau=1e-12)[1], plain)
    assert farthest(loss_and_gradient("opmd")[1], plain) > .01


@dataclass
class Own(grpo.Config):
    """What somebody adds who tries a loss of their own: its option."""
    loss: str = "own"
    sharpness: float = 4.0


def test_a_loss_with_an_option_of_its_own(tiny, tmp_path, monkeypatch):
    """It is evaluated once for each micro-batch, with the options of the run; where it clips is what clip_frac
    counts."""
    seen = []

    def own(x, h):
        seen.append(h)
        loss, decides = grpo.clipped(x.response_ratio, x.adv, h)        # (B, 1), for every token
        return h.sharpness * loss, decides
    monkeypatch.setitem(POLICY_LOSSES, "own", own)
    cfg = Own(**runs.QUICK | QUICK | dict(out=str(tmp_path / "a"), init=tiny, epochs=2, lr=3e-3, steps=1, clip_low=.01,
                                          clip_high=.01, micro_tokens=10 ** 5))
    row, = grpo.train(cfg)
    assert not same(weights(tmp_path / "a"), weights(tiny))
    assert row["clip_frac"] > 0 and seen == [cfg, cfg]


# ---------------------------------------------------------------- the KL estimators

KINDS = ("k1", "k2", "k3", "k3_is")


def test_f1_kl_estimators():
    exact.check_kl_values(kl_estimate, KINDS)


def test_p15_kl_estimators_in_expectation_by_enumeration():
    exact.check_kl_gradients(kl_estimate, KINDS)
    exact.check_kl_in_expectation(kl_estimate, KINDS)
    exact.check_kl_over_responses(kl_estimate, ("k2", "k3", "k3_is"))


def test_p15_k3_is_stays_exact_off_policy():
    """Samples of π_old, one update old: the ratio makes k3's expectation and gradient those of the present policy."""
    torch.manual_seed(1)
    z, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64).log_softmax(0)
    old = (z.detach() + .5 * torch.randn(5, dtype=torch.float64)).log_softmax(0)
    logp = z.log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    value = (old.exp() * kl_estimate(logp, ref, (logp - old).exp(), "k3_is")).sum()
    close(value, kl)
    close(torch.autograd.grad(value, z, retain_graph=True)[0], torch.autograd.grad(kl, z)[0])


# ---------------------------------------------------------------- the estimator as a whole, by enumeration

def expected_gradient(adv, loss, per, G):
    """The mean, over every group of G responses, of the first update's gradient; and ∇E[R]. Both exact."""
    world = Tabular(0, words=(1, 2))
    logp, mask, score = world.logp, world.mask, world.score
    groups = torch.tensor(list(itertools.product(range(len(score)), repeat=G)))          # (N^G, G)
    chance, rows = world.chance.detach()[groups].prod(1), groups.flatten()               # (N^G,)
    A = ADVANTAGES[adv](score[groups], hyper()).view(-1, 1)
    losses, ratio, _ = policy_loss(logp[rows], logp[rows].detach(), A, mask[rows], hyper(loss))
    assert (ratio == 1).all()
    each = torch.stack([token_weights(mask[group], per, 3) for group in groups])         # (N^G, G, 3)
    total = (chance * (losses.view_as(each) * each).sum((1, 2))).sum()
    return world.gradient(total), world.gradient((world.chance * score).sum())


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("adv, G, scale", [("rloo", 2, 1), ("dr_grpo", 2, 1 / 2), ("dr_grpo", 3, 2 / 3)])
def test_expected_first_gradient_is_that_of_the_objective(adv, G, scale, loss):
    """Divided by max_new = 3, RLOO's is -∇E[R] / 3, and Dr. GRPO's (G-1)/G of it."""
    got, exactly = expected_gradient(adv, loss, "constant", G)
    close(got, -scale * exactly / 3)
    assert exactly.abs().max() > .05


@pytest.mark.parametrize("adv, per", [("grpo", "constant"), ("rloo", "token"), ("rloo", "response")])
def test_expected_gradient_of_the_others_is_biased(adv, per):
    """As documented: a division by the group's spread or by a length changes the direction of the expected gradient,
    and not its length only."""
    got, exactly = expected_gradient(adv, "clip", per, 2)
    assert torch.cosine_similarity(-got.flatten(), exactly.flatten(), dim=0) < .999


# ---------------------------------------------------------------- the reward of a response

def test_f1_length_reward():
    length, right = torch.tensor([[10., 20, 30, 15]]), torch.tensor([[True, True, False, False]])
    close(grpo.length_reward(length, right), [[.5, 0, -.5, 0]])
    close(grpo.length_reward(length, ~right), [[0, 0, -.5, .25]])
    close(grpo.length_reward(torch.full((1, 4), 7.0), right), [[0, 0, 0, 0]])            # all as long: nothing
    two = grpo.length_reward(torch.cat([length, length * 3 + 1]), right.expand(2, 4))    # each group by itself
    close(two[1], [.5, 0, -.5, 0])


def test_overlong_penalty_table():
    """DAPO eq. 13 with max_new 10 and a buffer of 4: 0 to 6, then -1/4 a token."""
    length = torch.arange(11.0)
    close(grpo.overlong_penalty(length, 10, 4), [0] * 7 + [-.25, -.5, -.75, -1])
    close(grpo.overlong_penalty(length, 10, 10), -length / 10)
    close(grpo.overlong_penalty(torch.tensor([9.0, 10]), 10, 1), [0, -1])


BEATS = ("ab", "bc", "ca")      # rock, paper, scissors


def rps(record, a, b):
    return .5 if a == b else float(a + b in BEATS)


def test_win_rates_of_an_intransitive_judge():
    """judge(record, a, b): its record, its group, this order; rock, paper and scissors in equal numbers are equal."""
    seen = []

    def judge(record, a, b):
        seen.append((record, a, b))
        return rps(record, a, b)
    p = grpo.preferences(["x", "y"], list("abcaab"), torch.zeros(2, 3), judge)
    close(p, [[[.5, 1, 0], [0, .5, 1], [1, 0, .5]], [[.5, .5, 1], [.5, .5, 1], [0, 0, .5]]])
    asked = {("x", *pair) for pair in itertools.product("abc", repeat=2)}
    assert set(seen) == asked | {("y", *pair) for pair in itertools.product("ab", repeat=2)}
    close(grpo.win_rates(p), [[.5, .5, .5], [.75, .75, 0]])


def test_win_rates_of_scores_sum_to_half_the_group():
    """Bradley-Terry; a response never meets itself."""
    torch.manual_seed(0)
    score = torch.randn(3, 6, dtype=torch.float64)
    rates = grpo.win_rates(grpo.preferences(None, None, score, None))
    close(rates.sum(1), [3.0] * 3)
    wins = [1 / (1 + math.exp(float(other - score[0, 0]))) for other in score[0, 1:]]
    close(rates[0, 0], sum(wins) / 5)
    assert (rates.argsort(1) == score.argsort(1)).all()


# ---------------------------------------------------------------- the loop against a second loop

class Slow:
    """GRPO again, from the papers: one row at a time, no padding, no masks, no micro-batches."""

    def __init__(self, cfg):
        self.cfg, self.policy, self.ref = cfg, load_model(cfg.init), load_model(cfg.init)
        self.optimizer = runs.SlowOptimizer(self.policy, cfg.lr, cfg.steps, cfg, floor=cfg.lr_end)

    def logp(self, net, row):
        return spoken(net, *row, self.cfg.temperature)

    def kl(self, d, ratio):
        """The estimate from one token's d = log π - log π_ref."""
        k3 = (-d).exp() - 1 + d
        return {"k1": d, "k2": d ** 2 / 2, "k3": k3, "k3_is": ratio * k3}[self.cfg.kl]

    def rewards(self, rows, scores, tripped):
        """Those of each response before they are compared, as groups."""
        c, groups = self.cfg, []
        for g in range(0, len(rows), c.group):
            group, r = rows[g:g + c.group], list(scores[g:g + c.group])
            if c.prefer == "score":
                wins = [[1 / (1 + math.exp(other - own)) for other in r] for own in r]
                r = [(sum(own) - .5) / (c.group - 1) for own in wins]
            lengths = [len(ids) - start for ids, start in group]
            low, high = min(lengths), max(lengths)
            for i, n in enumerate(lengths):
                lam = .5 - (n - low) / (high - low) if high > low else 0.0
                r[i] += c.len_reward * (lam if scores[g + i] > .5 else min(0, lam))
                r[i] -= c.missing_end * (not ends(group[i]))
                if c.overlong:
                    r[i] -= max(0, n - (c.max_new - c.overlong)) / c.overlong
                r[i] -= c.lookahead * tripped[g + i]
            groups.append(r)
        return groups

    def step(self, step, rows, scores, tripped, batches, teaches):
        """One step on these rows -> what has to be logged. batches: the rows of each update. teaches: which rows have
        an advantage; rounding decides where it is about 0, and only metrics depend on it."""
        c = self.cfg
        if c.ref_every and step and step % c.ref_every == 0:
            self.ref.load_state_dict(self.policy.state_dict())
        r = self.rewards(rows, scores, tripped)
        with torch.no_grad():
            old = [self.logp(self.policy, row)[0] for row in rows]
            ref = [self.logp(self.ref, row)[0] for row in rows]
        if c.kl_coef and c.kl == "k1":
            for i in range(len(rows)):
                r[i // c.group][i % c.group] -= c.kl_coef * float((old[i] - ref[i]).sum())
        adv = [a for group in SLOW_ADVANTAGES[c.adv](r) for a in group]
        lengths = [len(ids) - start for ids, start in rows]
        counted = [n if ends(row) or not c.mask_truncated else 0 for n, row in zip(lengths, rows)]
        penalised = c.kl_coef > 0 and c.kl != "k1"
        busy = [i for i, own in enumerate(teaches) if counted[i] and (own or penalised or c.loss == "opmd")]

        seen, losses, metrics = collections.defaultdict(list), [], {}
        for batch in batches:
            w = dict(zip(batch, slow_weights([counted[i] for i in batch], c.per, c.max_new)))
            learning = [i for i in batch if i in busy]
            if not learning:                        # there is no update, of momentum neither
                losses.append(0.0)
                continue
            total = sum(w[i] * self.loss_of(rows[i], old[i], ref[i], adv[i], penalised, seen) for i in learning)
            total.backward()
            losses.append(total.detach())
            metrics |= self.optimizer.step(step)
        if c.reset:
            self.optimizer.forget()
        metrics |= {name: runs.mean(values) for name, values in seen.items()}
        if "kl" in metrics:
            metrics["kl"] *= runs.mean(lengths)                 # nats of a response
        return metrics | dict(
            loss=runs.mean(losses), zero_std=runs.mean(max(group) == min(group) for group in r),
            response_length=runs.mean(lengths), finished=runs.mean(ends(row) for row in rows))

    def loss_of(self, row, old, ref, A, penalised, seen):
        """The sum over a response's tokens; what is seen of each of them is added to seen."""
        c, total = self.cfg, 0.0
        logp, entropy = self.logp(self.policy, row)
        for t, (loss, decides) in enumerate(SLOW_LOSSES[c.loss](logp, old, A, c)):
            ratio, gap, d = (logp[t] - old[t]).exp(), (logp[t] - old[t]).detach(), logp[t] - ref[t]
            if penalised:
                loss = loss + c.kl_coef * self.kl(d, ratio)
            total = total + loss
            seen["entropy"].append(entropy[t])
            seen["ratio"].append(ratio)
            seen["clip_frac"].append(decides)
            seen["approx_kl"].append(gap.exp() - 1 - gap)       # estimates KL(π_old || π)
            if c.kl_coef:
                seen["kl"].append(d)
        return total


# Every option takes another value than its default at least once; JUDGE is a reward model.
LOOPS = {
    "grpo, per token": dict(adv="grpo", temperature=.7, lr_end=.2, clip_grad=.5, warmup=2, weight_decay=.3, seed=3),
    "grpo as published: k3 in the loss, per response": dict(per="response", kl="k3", kl_coef=.5, epochs=2, seed=1),
    "rloo, k1 in the reward": dict(adv="rloo", kl="k1", kl_coef=.2, per="constant"),
    "two epochs of two minibatches, clip-higher": dict(epochs=2, minibatches=2, clip_low=.02, clip_high=.04, lr=3e-3,
                                                       temperature=1.3),
    "gspo": dict(loss="gspo", epochs=2, minibatches=2, clip_low=3e-3, clip_high=4e-3, per="response", lr=3e-3),
    "cispo": dict(loss="cispo", epochs=2, minibatches=2, clip_high=.01, adv="dr_grpo", kl_coef=.3, kl="k3_is"),
    "opmd, state forgotten, reference moved": dict(loss="opmd", per="constant", adv="dr_grpo", epochs=3, tau=2.0,
                                                   reset=True, kl_coef=.3, kl="k2", ref_every=1),
    "opmd pulls on groups of equal rewards too": dict(loss="opmd", adv="dr_grpo", reward="runs:half", epochs=3, tau=5.0,
                                                      per="constant", lr=3e-3),
    "overlong, truncated ones masked": dict(overlong=3, mask_truncated=True, per="token", epochs=2),
    "truncated ones masked, per response": dict(mask_truncated=True, per="response", minibatches=2, kl_coef=.5),
    "length reward, batch baseline": dict(len_reward=.5, adv="reinforce_pp", kl="k1", kl_coef=.1),
    "cut-off responses cost something": dict(missing_end=.7, adv="dr_grpo", epochs=2),
    "win rates, batch scale": dict(prefer="score", adv="reinforce_pp_baseline", epochs=2),
    "some groups of equal rewards": dict(reward="runs:half", group=3, prompts=4, epochs=2),
    "some groups of equal rewards, k2": dict(reward="runs:half", adv="rloo", kl="k2", kl_coef=.5, epochs=2),
    "equal groups replaced": dict(reward="runs:half", resample=3, seed=2),
    "equal groups replaced, now and then by none": dict(reward="runs:half", resample=1, prompts=1, kl_coef=.3,
                                                        steps=12),
    "look-ahead": dict(tripwire="runs:has_e", lookahead=.7, cuts=3, ahead=2),
    "a reward model": dict(reward="2*JUDGE + runs:vowels", adv="dr_grpo", per="constant"),
}


def kept_rows(cfg, drawn, scores):
    """Of all that a step drew, a list of draws of rows and of scores, what it learns from."""
    rows, kept = [], []
    for some, own in zip(drawn, scores):
        for g in range(0, len(some), cfg.group):
            group = own[g:g + cfg.group]
            if len(rows) < cfg.prompts * cfg.group and (not cfg.resample or max(group) > min(group)):
                rows += some[g:g + cfg.group]
                kept += group
    return (rows, kept) if rows else (drawn[-1], scores[-1])


@pytest.mark.parametrize("name", LOOPS)
def test_loop_equals_a_slow_loop(name, tmp_path, tiny, judge, prompts, monkeypatch, float64):
    """Every logged number of every step, evaluations included, and every weight at the end, in float64."""
    options = QUICK | dict(steps=3, data=prompts, init=tiny, out=str(tmp_path / "run"), eval_every=2) | LOOPS[name]
    options["reward"] = options["reward"].replace("JUDGE", judge)
    cfg = grpo.Config(**runs.QUICK | options)
    calls, steps = watch(monkeypatch, grpo, "look_ahead"), runs.watch_steps(monkeypatch)
    advantages = watch_rewards(monkeypatch, cfg.adv)
    rows = runs.train(grpo, **options | dict(out=cfg.out))
    monkeypatch.undo()

    reward_model, rule = load_model(judge), data.verifier(cfg.reward.split()[-1])

    def score(record, row):
        value = rule(record, text_of(row), ends(row))
        if judge in cfg.reward:
            value += 2 * float(reward_model.score(reward_model(torch.tensor([row[0]]))[0, -1]).detach())
        return float(value)

    slow = Slow(cfg)
    stream, held = data.open_stream(prompts, "prompt", cfg.seed, n_held=64)
    for step, (row, watched) in enumerate(zip(rows, steps)):
        evaluated = step % 2 == 1 or step + 1 == cfg.steps
        draws = watched.rollouts[:-1] if evaluated else watched.rollouts
        drawn, scores, truths = [], [], []
        for k, (records, roll) in enumerate(draws):
            assert records == stream.batch(step * (1 + cfg.resample) + k, cfg.prompts), "other prompts were asked for"
            asked = [record for record in records for _ in range(cfg.group)]
            drawn.append(rows_in(roll))
            scores.append([score(record, own) for record, own in zip(asked, drawn[-1])])
            truths += [data.gold(record, text_of(own), ends(own)) for record, own in zip(asked, drawn[-1])
                       if "family" in record]
        learned, own = kept_rows(cfg, drawn, scores)
        tripped = calls["look_ahead"][step][1].tolist() if cfg.tripwire else [0.0] * len(learned)
        teaches = (advantages[step][1] != 0).flatten().tolist()
        want = slow.step(step, learned, own, tripped, runs.updates(watched, cfg), teaches)
        want |= dict(reward=runs.mean(itertools.chain(*scores)), gold=runs.mean(truths))
        want["groups"] = len(draws) * cfg.prompts
        if cfg.tripwire:
            want["tripped"] = runs.mean("e" in text_of(row) for row in learned)
        if evaluated:
            records, roll = watched.rollouts[-1]
            assert records == held, "the evaluation is of other prompts than those held out"
            want |= runs.slow_evaluation(slow.policy, slow.ref, records, roll, score, cfg.temperature)
            if not cfg.kl_coef:
                del want["val_kl"]
        runs.compare_rows(step, row, want)
        runs.check_terms(row, cfg.reward)
    runs.compare_weights(weights(cfg.out), slow.policy)
    check_that_it_tested_something(cfg, rows)


def check_that_it_tested_something(cfg, rows):
    if cfg.clip_low < .2:
        assert max(row["clip_frac"] for row in rows) > .05, "nothing was clipped"
    if cfg.reward == "runs:half" and not cfg.resample:
        assert max(row["zero_std"] for row in rows) > 0, "no group had equal rewards"
    if cfg.resample:
        assert max(row["groups"] for row in rows) > cfg.prompts, "nothing was drawn anew"
        assert {row["zero_std"] for row in rows} == ({0, 1} if cfg.prompts == 1 else {0})
    if cfg.mask_truncated:
        assert all(0 < row["finished"] < 1 for row in rows), "nothing was masked, or everything"


def test_rollouts_are_ragged(tiny, tmp_path, monkeypatch):
    """The loops mean something only if responses end early, end in the last slot, and are cut off."""
    steps = runs.watch_steps(monkeypatch)
    train(tmp_path / "a", tiny, prompts=32, group=8, steps=1, micro_tokens=4096)
    rows = [(len(row[0]) - row[1], ends(row)) for row in rows_in(steps[0].rollouts[0][1])]
    assert {(1, True), (6, True), (6, False)} <= set(rows) and len(set(rows)) > 5


# ---------------------------------------------------------------- what teaches, and what does not

def test_p16_groups_of_the_loop_belong_to_one_prompt(tiny, prompts, tmp_path, monkeypatch):
    """Rewards of 100 · the prompt's length + noise: in every row of (P, G) only the noise is left to differ, whether or
    not the groups are drawn several times, and no advantage is as large as the difference of two prompts."""
    monkeypatch.setitem(data.VERIFIERS, "hundreds", lambda record, text, finished: (
        100 * len(runs.asked(record)) + runs.vowels(record, text, finished)))
    seen = watch_rewards(monkeypatch, "dr_grpo")
    for resample in (0, 3):
        train(tmp_path / str(resample), tiny, data=prompts, reward="hundreds", adv="dr_grpo", prompts=8,
              resample=resample)
    assert len(seen) == 4
    for r, adv in seen:
        assert r.shape == (8, 4) and r.dtype == torch.float64, "fp32 would round 3000 + noise"
        assert (r.amax(1) - r.amin(1)).max() < 20 < r.max() - r.min()
        close(adv.sum(1), [0.0] * 8, atol=1e-9)


def test_p38_equal_rewards_and_no_penalty_teach_nothing(tiny, prompts, tmp_path, monkeypatch, capsys):
    """Nothing is computed, no gradient taken, no weight moved, not even by momentum or decay; and that is said."""
    calls = watch(monkeypatch, grpo, "token_logprobs")
    rows = train(tmp_path / "a", tiny, reward="runs:nothing", weight_decay=.1, lr=.1)
    assert same(weights(tmp_path / "a"), weights(tiny)) and not calls["token_logprobs"]
    assert all("grad_norm" not in row and row["zero_std"] == 1 and row["loss"] == 0 for row in rows)
    assert "nothing was learned" in capsys.readouterr().out
    rows = train(tmp_path / "b", tiny, reward="runs:half", data=prompts, prompts=1, steps=6)  # now and then is enough
    assert {row["zero_std"] for row in rows} == {0, 1} and "nothing was learned" not in capsys.readouterr().out


def test_p34_truncated_responses_teach_nothing(tmp_path):
    """A policy that never ends: all are cut off, the end token in the prompt notwithstanding."""
    endless = save(tmp_path / "endless", random_policy(end=0.0))
    rows = train(tmp_path / "a", endless, mask_truncated=True)
    assert same(weights(tmp_path / "a"), weights(endless)) and all(row["finished"] == 0 for row in rows)


def test_options_at_0_are_bit_equal_to_their_absence(tiny, tmp_path, monkeypatch):
    """And without a penalty there is no reference model."""
    monkeypatch.setattr(grpo, "reference", None)
    rows = train(tmp_path / "a", tiny)
    nothing = dict.fromkeys("missing_end overlong len_reward resample pool curriculum ref_every kl_coef".split(), 0)
    for kind in ("k2", "k3"):
        assert train(tmp_path / kind, tiny, kl=kind, **nothing) == rows
        assert same(weights(tmp_path / "a"), weights(tmp_path / kind))
    assert all("kl" not in row for row in rows)


# ---------------------------------------------------------------- ratios and the temperature

@pytest.mark.parametrize("loss, per", zip(POLICY_LOSSES, itertools.cycle(PER)))
def test_p1_lr_0_every_ratio_is_1_in_all_epochs(loss, per, tiny, tmp_path):
    """Rows are padded and cut differently in sampling, scoring and updating; none of it may move a log-probability.
    approx_kl is a mean of terms ≥ 0 that vanish only at ratio 1."""
    for row in train(tmp_path / "a", tiny, lr=1e-30, epochs=3, minibatches=2, loss=loss, per=per, temperature=.6,
                     kl_coef=.1):
        assert row["ratio"] == pytest.approx(1, abs=1e-6) and row["clip_frac"] == 0 and row["approx_kl"] < 1e-9
        assert abs(row["kl"]) < 1e-5


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_one_update_a_rollout_is_on_policy_to_the_bit(loss, tiny, tmp_path, monkeypatch):
    """The old log-probabilities are the present ones: exactly 1, nothing clipped, and nothing computed twice."""
    calls = watch(monkeypatch, model, "per_token")
    for row in train(tmp_path / "a", tiny, loss=loss, lr=1e-2, clip_low=1e-9, clip_high=1e-9):
        assert row["ratio"] == 1 and row["clip_frac"] == 0 and row["approx_kl"] == 0 and row["grad_norm"] > 0
    assert not calls["per_token"]


def test_p10_samples_and_log_probabilities_are_at_the_temperature(tiny, tmp_path, monkeypatch, float64):
    """In training, evaluation and look-ahead what was drawn has the log-probabilities of softmax(logits / T)."""
    calls, policy = watch(monkeypatch, model, "generate"), load_model(tiny)
    train(tmp_path / "a", tiny, temperature=.6, steps=1, lr=1e-30, tripwire="runs:has_e", ahead=3)
    assert [args[2] for args, _ in calls["generate"]] == [6, 3, 6]
    for _, roll in calls["generate"]:
        for row, logp, mask in zip(rows_in(roll), roll.logp, roll.mask.bool()):
            close(logp[mask], spoken(policy, *row, .6)[0].detach(), atol=1e-9)


# ---------------------------------------------------------------- which prompts

def test_draw_prompts_chances():
    """For n = 1 exactly ∝ 1 - rate, up to the 1e-3 that keeps a solved prompt possible."""
    rates, rng, n = [0.0, .5, 1.0, .8, .9], random.Random(0), 20_000
    count = collections.Counter(grpo.draw_prompts(rates, 1.0, 1, rng)[0] for _ in range(n))
    total = sum(1 - r + 1e-3 for r in rates)
    for i, rate in enumerate(rates):
        p = (1 - rate + 1e-3) / total
        assert abs(count[i] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n), i
    assert 0 < count[2] < 30


def test_draw_prompts_is_without_replacement_and_keeps_to_the_easiest():
    rng, rates = random.Random(0), [random.Random(1).random() for _ in range(20)]
    for share, n in itertools.product((.1, .25, .55, 1.0), (1, 3, 7, 20)):
        seen = set()
        for _ in range(200):
            drawn = grpo.draw_prompts(rates, share, n, rng)
            assert len(drawn) == len(set(drawn)) == n
            seen |= set(drawn)
        assert seen == set(range(max(n, math.ceil(share * 20)))), "never fewer are open than are asked for"


def test_resample_replaces_groups_of_equal_rewards(tiny, tmp_path, monkeypatch):
    """Whether an answer to the first half of the prompts is paid at all, an e decides; elsewhere all are equal. Once
    the draws are used up, the batch stays smaller."""
    monkeypatch.setitem(data.VERIFIERS, "some", lambda record, text, finished: (
        len(runs.asked(record)) % 2 * (len(text) + finished)))
    seen = watch_rewards(monkeypatch, "grpo")
    rows = train(tmp_path / "a", tiny, reward="some", prompts=6, resample=20)
    for row, (r, _) in zip(rows, seen):
        assert r.shape == (6, 4) and (r.amax(1) > r.amin(1)).all() and row["zero_std"] == 0
        assert row["groups"] % 6 == 0 and 6 < row["groups"] <= 126
    seen.clear()
    train(tmp_path / "b", tiny, reward="some", prompts=60, resample=1)
    assert any(len(r) < 60 for r, _ in seen) and all((r.amax(1) > r.amin(1)).all() for r, _ in seen)


@pytest.mark.parametrize("options", [dict(epochs=2), dict(kl_coef=.1), dict(adv="reinforce_pp"),
                                     dict(kl_coef=.1, kl="k1"), dict(prefer="score"), dict(len_reward=1.0)], ids=str)
def test_resample_without_any_unequal_group_goes_on(options, tiny, tmp_path):
    """However often prompts are drawn: the last ones stay, and the steps to come may have better luck."""
    rows = train(tmp_path / "a", tiny, reward="runs:nothing", resample=2, **options)
    assert [row["groups"] for row in rows] == [9, 9] and all(row["reward"] == 1 for row in rows)
    assert "len_reward" in options or all(row["zero_std"] == 1 for row in rows)


def asked_for(steps):
    """The words of the prompts of each step."""
    return [[runs.asked(record) for record in step.rollouts[0][0]] for step in steps]


def test_pool_keeps_to_its_prompts(tiny, tmp_path, monkeypatch):
    steps = runs.watch_steps(monkeypatch)
    train(tmp_path / "a", tiny, pool=5, prompts=3, steps=8, max_new=1)
    asked = asked_for(steps)
    assert len({text for step in asked for text in step}) == 5, "the pool has other prompts than its five"
    assert len({str(step) for step in asked}) > 3 and all(len(set(step)) == 3 for step in asked)


def test_pool_of_a_file_that_is_smaller_than_asked_for(tiny, tmp_path, monkeypatch):
    steps = runs.watch_steps(monkeypatch)
    path = write(tmp_path / "few.jsonl", [dict(prompt=f"Say {i}") for i in range(16)])
    train(tmp_path / "a", tiny, data=path, pool=100, prompts=40, max_new=1)
    assert [len(set(step)) for step in asked_for(steps)] == [15, 15]   # one of 16 is held out


def test_curriculum_starts_with_the_easiest(tiny, tmp_path, monkeypatch):
    """Sums of level 1 to 4: a quarter of the pool at first, all of it from half of the steps on."""
    calls, steps = watch(monkeypatch, grpo, "draw_prompts"), runs.watch_steps(monkeypatch)
    train(tmp_path / "a", tiny, families="arith", pool=16, prompts=4, steps=8, curriculum=.5, max_new=1)
    assert [round(args[1] * 16) for args, _ in calls["draw_prompts"]] == [4, 7, 10, 13, 16, 16, 16, 16]
    levels = [[record["level"] for record in step.rollouts[0][0]] for step in steps]
    easiest = sorted({runs.asked(record): record["level"] for step in steps for record in step.rollouts[0][0]}.values())
    assert sorted(levels[0]) == easiest[:4] and max(levels[0]) < max(itertools.chain(*levels))


def test_prioritized_draws_by_the_last_mean_reward(tiny, tmp_path, monkeypatch):
    """The rates a step draws by are, for every prompt drawn before, its last mean reward within [0, 1]; else 0."""
    seen, rates, drawn, real = watch_rewards(monkeypatch, "grpo"), [], [], grpo.draw_prompts

    def draw_prompts(now, *args):
        rates.append(list(now))
        drawn.append(real(now, *args))
        return drawn[-1]
    monkeypatch.setattr(grpo, "draw_prompts", draw_prompts)
    options = dict(reward="runs:vowels + 0.5*runs:has_e", pool=6, prompts=3, steps=6)
    train(tmp_path / "a", tiny, prioritized=True, **options)
    expected = [0.0] * 6
    for before, places, (r, _) in zip(rates, drawn, seen):
        assert before == pytest.approx(expected, abs=1e-6)
        for i, rate in zip(places, r.mean(1).clamp(0, 1).tolist()):
            expected[i] = rate
    assert len(set(expected)) > 2 and min(r.mean(1).min() for r, _ in seen) < 0
    rates.clear()
    train(tmp_path / "b", tiny, **options)
    assert rates == [[0.0] * 6] * 6, "unless asked for, all prompts are alike"


def test_p49_prompts_without_room_for_a_whole_response_are_left_out(tiny, tmp_path, monkeypatch):
    """Of a context of 64 tokens, prompts may take what max_new leaves."""
    calls = watch(monkeypatch, model, "generate")
    path = write(tmp_path / "long.jsonl", [dict(prompt="x" * n) for n in range(1, 80)])
    train(tmp_path / "a", tiny, data=path, prompts=60, group=2, steps=1, max_new=12)
    lengths = {len(ids) for args, _ in calls["generate"] for ids in args[1]}
    assert max(lengths) == 64 - 12 and len(lengths) > 30


# ---------------------------------------------------------------- look-ahead

def test_look_ahead_is_the_share_of_continuations_that_trip(tiny, monkeypatch):
    """By hand from what was sampled: from every cut the row goes on, the judge reads all of it, and half of the cuts
    tripping is ½. What the judge is told of is what the continuation says, its end included."""
    policy, records = load_model(tiny, Setup(TOK)), [dict(n=i) for i in range(8)]
    torch.manual_seed(4)
    roll = model.generate(policy, [[5, 6, 7], [8, 9]], 6, 4)
    cfg = SimpleNamespace(cuts=3, ahead=5, temperature=.8)
    calls, heard = watch(monkeypatch, model, "generate"), []

    def judge(record, text, finished):
        heard.append((record, text, finished))
        return "e" in text
    chance = grpo.look_ahead(policy, records, roll, judge, cfg)
    (args, onward), = calls["generate"]
    slow, said = [0.0] * 8, []
    for i, (ids, start) in enumerate(rows_in(roll)):
        for cut in (1, 2, 3):
            place = 3 * i + cut - 1
            begun, whole = args[1][place], (rows_in(onward)[place][0], start)
            assert begun == ids[:start + (len(ids) - start) * cut // 4] == whole[0][:len(begun)]
            assert TOK.end not in begun and len(whole[0]) - len(begun) <= 5
            said.append((records[i], TOK.decode(whole[0][start:]), ends(whole)))
            slow[i] += ("e" in said[-1][1]) / 3
    assert heard == said and len({finished for *_, finished in said}) == 2
    close(chance, slow, atol=1e-6)
    assert len(set(slow)) > 2 and not chance.requires_grad


def test_look_ahead_lambda_0_is_bitwise_no_tripwire(tiny, tmp_path):
    plain = train(tmp_path / "a", tiny)
    wired = train(tmp_path / "b", tiny, tripwire="runs:has_e", lookahead=0.0)
    train(tmp_path / "c", tiny, tripwire="runs:has_e")
    assert all(row.pop("tripped") > 0 for row in wired) and wired == plain
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


# ---------------------------------------------------------------- the one-token bandit (F2)

@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    return bandit_game(tmp_path_factory.mktemp("bandit"))


def play(out, bandit, **options):
    """The real loop on the bandit, to its end -> the policy."""
    init, prompts = bandit
    game = dict(data=prompts, reward="exact:worth", max_new=1, micro_tokens=4096, prompts=2, steps=90, group=64,
                lr=1e-2, lr_end=0.0)
    train(out, init, **game | options)
    return arms(out)


F2 = {  # options, where it must arrive
    "k1 in the reward": (dict(kl="k1", adv="dr_grpo"), TILT_2),
    "k2 in the loss": (dict(kl="k2", adv="rloo", per="constant"), TILT_2),
    # As published, k3 differentiated as a loss is a penalty on KL(π_ref || π), and π goes to β π_ref / (β + r̄ - r).
    "k3 in the loss": (dict(kl="k3", adv="rloo"), K3_2),
    "k3 times the ratio": (dict(kl="k3_is", adv="rloo"), TILT_2),
}


@pytest.mark.parametrize("name", F2)
def test_bandit_fixed_point(name, bandit, tmp_path):
    """The real loop, β = 2. It arrives within .0056 (four seeds), and the targets are .011 and more apart."""
    options, target = F2[name]
    final = play(tmp_path / "a", bandit, kl_coef=2.0, **options)
    assert farthest(final, target) < (.012 if target is K3_2 else .006)
    for other in (TILT_2, K3_2, SCALED_2):
        assert other is target or farthest(final, other) > farthest(final, target)


@pytest.mark.parametrize("adv, target", [("rloo", TILT_2), ("dr_grpo", TILT_2), ("grpo", SCALED_2)])
def test_bandit_fixed_point_of_the_scaled_advantage(adv, target):
    """GRPO's division by the spread rescales β, so with k2 and β = 2 it does not arrive at the tilt of β = 2. Without
    noise and without a group's finite size: one group of 20 000 in which every arm is as frequent as its probability
    (to a 20 000th), gradient steps until nothing moves."""
    ref = torch.tensor(PI_REF, dtype=torch.float64).log()
    z = ref.clone().requires_grad_()
    for _ in range(400):
        logp = z.log_softmax(0)
        count = (20_000 * logp.detach().exp()).round().long()
        group = torch.arange(4.0, dtype=torch.float64).repeat_interleave(count)
        firsts = [int(count[:i].sum()) for i in range(4)]
        A = ADVANTAGES[adv](group[None], hyper())[0, firsts]
        loss, ratio, _ = policy_loss(logp[:, None], logp.detach()[:, None], A[:, None], torch.ones(4, 1), hyper())
        loss = loss[:, 0] + 2.0 * kl_estimate(logp, ref, ratio[:, 0], "k2")
        grad, = torch.autograd.grad((logp.detach().exp() * loss).sum(), z)
        with torch.no_grad():
            z -= .5 * grad
    close(z.detach().softmax(0), target, atol=2e-4)


def test_within_one_prompt_the_standardised_advantages_are_one():
    """So what grpo reaches, REINFORCE++ reaches too; they differ by whose spread divides several prompts."""
    r = torch.randn(1, 8, dtype=torch.float64)
    two = torch.cat([r, 3 * r])
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        close(ADVANTAGES[name](r, hyper()), ADVANTAGES["grpo"](r, hyper()))
        assert farthest(ADVANTAGES[name](two, hyper()), ADVANTAGES["grpo"](two, hyper())) > .1


def grpo_loss(tree, adv, kl, G):
    """logp -> the exact expectation, over all groups of G responses, of GRPO's loss at the first update of a step."""
    ref, groups = tree.logp(tree.ref), torch.tensor(list(itertools.product(range(len(tree.reward)), repeat=G)))
    rows, mask = groups.flatten(), tree.mask.repeat(G * len(tree.reward) ** (G - 1), 1)
    advantages = torch.vmap(lambda r: ADVANTAGES[adv](r, hyper()))       # of a batch of one group, for every group

    def loss_of(logp):
        old, r = logp.detach(), tree.reward
        if kl == "k1":
            r = r - tree.beta * kl_estimate(old, ref, 1.0, kl).sum(1)
        A = advantages(r[groups][:, None])
        loss, ratio, _ = policy_loss(logp[rows], old[rows], A.view(-1, 1), mask, hyper())
        if kl != "k1":
            loss = loss + tree.beta * kl_estimate(logp[rows], ref[rows], ratio, kl)
        chance = old.sum(1)[groups].sum(1).exp()
        return (chance * loss.view(len(groups), -1).sum(1)).sum() / G
    return loss_of


@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("adv", ["rloo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("n, G", [(1, 4), (2, 2)])
def test_which_distribution_is_reached(n, G, adv, kl):
    """k1 in the reward reaches the tilt with any advantage. A KL in the loss: that of β with rloo, of β G / (G-1) with
    dr_grpo, on one token; on two the KL of the second is not credited to the first, and the tilt is missed."""
    tree = Tree(n)
    beta = tree.beta * G / (G - 1) if adv == "dr_grpo" else tree.beta
    tilt, of_k2 = tree.tilt(tree.beta), tree.token_by_token(exact.towards_reward, beta)
    of_k3 = tree.token_by_token(exact.spread_over_reward, beta)
    steps, rate = 40, lambda step: .5 / tree.beta
    if kl == "k3":
        steps, rate = 200, lambda step: 1 / (tree.beta + 3)
    elif kl == "k1" and adv == "grpo":             # at the tilt the rewards are equal, and the spread next to nothing
        steps, rate = 200, lambda step: 2 / tree.beta / (5 + step)
    reached = tree.settle(grpo_loss(tree, adv, kl, G), steps, rate)
    if kl == "k1":
        assert apart(reached, tilt) < (.005 if adv == "grpo" else 1e-4)
    elif adv == "grpo":                            # the spread rescales β
        assert min(apart(reached, p) for p in (tilt, of_k2, of_k3)) > .04
    else:
        assert apart(reached, of_k3 if kl == "k3" else of_k2) < 1e-4
        if n == 2 or adv == "dr_grpo" or kl == "k3":
            assert apart(reached, tilt) > .04


@pytest.mark.parametrize("tau, gap", [(1.0, .127), (5.0, .0019), (20.0, .00003)])
def test_bandit_opmd_one_exact_iteration(tau, gap):
    """The minimum of the exact expectation over π_i = π_ref goes to π_i exp(r / τ) / Z as τ grows, and is not there."""
    p, r = torch.tensor(PI_REF, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    A, z = (r - (p * r).sum())[:, None], p.log().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=300, tolerance_grad=1e-14, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logp = z.log_softmax(0)[:, None]
        loss, _, _ = policy_loss(logp, p.log()[:, None], A, torch.ones(4, 1), hyper("opmd", tau=tau))
        expected = (p * loss[:, 0]).sum()
        expected.backward()
        return expected
    optimizer.step(closure)
    target = p * (r / tau).exp()
    assert apart(z.detach().softmax(0), target / target.sum()) == pytest.approx(gap, rel=.03 if tau < 20 else .2)


def test_bandit_self_play_preference_does_not_collapse(tmp_path, monkeypatch):
    """SPO (2401.04056) on rock, paper, scissors: win rates within the group leave the policy near its equilibrium,
    while the scalar that fits the same comparisons best gives each arm a fixed score, and one of them takes all. Around
    an equilibrium of a game the gradient turns in circles, and momentum would spiral outwards: hence --reset."""
    start = (.37, .34, .29)
    game, score = bandit_game(tmp_path, start), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):                          # Bradley-Terry on comparisons of the start's own samples
        loss = 0.0
        for i, j in itertools.permutations(range(3), 2):
            wins = rps(None, exact.ARMS[i], exact.ARMS[j])
            loss = loss - start[i] * start[j] * wins * torch.nn.functional.logsigmoid(score[i] - score[j])
        score.data -= torch.autograd.grad(loss, score)[0]
    assert .01 < score.max() - score.min() < 1, "no scalar explains these comparisons"
    monkeypatch.setitem(data.VERIFIERS, "scalar", lambda record, text, done: float(score[exact.ARMS.index(text)]))
    options = dict(steps=60, adv="dr_grpo", lr=8e-4, lr_end=1.0, reset=True, prompts=1, group=128)
    scalar = play(tmp_path / "scalar", game, reward="scalar", **options)
    played = play(tmp_path / "spo", game, reward="runs:nothing", prefer="test_grpo:rps", **options)
    assert scalar[:3].max() > .8 and scalar.argmax() == score.argmax()
    assert farthest(played[:3], [1 / 3] * 3) < .2 and played[:3].sum() > .999


# ---------------------------------------------------------------- a real task, and mistakes

GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k/train_first4000.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="the real data are not here")
def test_gsm8k_end_to_end(tmp_path, capsys):
    """Prompts, the "####" verifier and pass@k on real data, at the 0% of a random model, and without a traceback."""
    import reward
    some = tmp_path / "gsm8k.jsonl"
    some.write_text("".join(GSM8K.read_text().splitlines(keepends=True)[:40]))
    policy = save(tmp_path / "policy", random_policy(block_size=512))
    rows = train(tmp_path / "out", policy, data=str(some), reward="gsm8k", max_new=8)
    assert all(row["reward"] == 0 and row["zero_std"] == 1 and "grad_norm" not in row for row in rows)
    assert "nothing was learned" in capsys.readouterr().out
    words = [policy, str(tmp_path / "out"), "--data", str(some), "--judge", "gsm8k", "--n", "8", "--samples", "2",
             "--max_new", "8", "--device", "cpu"]
    reward.compare(*data.parse(reward.Compare, ["a", "a..."], words, "compare"))
    assert capsys.readouterr().out.count("0.000    0.000") == 4            # pass@k and maj@k of both


@pytest.mark.parametrize("flags, word", [
    ("--lr 0", "--lr"), ("--temperature 0", "--temperature"), ("--kl k4", "k3_is"), ("--kl_coef -1", "--kl_coef"),
    ("--nonsense 1", "--nonsense"), ("--prompts 2.5", "--prompts"), ("--reward", "--reward"), ("--group 1", "--group"),
    ("--adv ppo", "reinforce_pp"), ("--loss dpo", "gspo"), ("--per word", "--per"), ("--clip_low 1.5", "--clip_low"),
    ("--tau 0", "--tau"), ("--cuts 0", "--cuts"), ("--curriculum 2 --pool 8", "--curriculum"),
    ("--missing_end -1", "--missing_end"), ("--lora_r 4 --ref_every 2 --kl_coef .1", "--lora_r"),
    ("--curriculum .5", "--pool"), ("--prioritized true", "--pool"), ("--resample 2 --pool 8", "--resample"),
    ("--overlong 9 --max_new 8", "--max_new"), ("--ref_every 2", "--kl_coef"), ("--prefer exact", "score"),
    ("--tripwire ppo --init TINY", "--tripwire")])
def test_refusals(flags, word, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = runs.refuse(grpo, flags.replace("TINY", tiny).split(), monkeypatch, capsys)
    assert code == 2 and word in error


def test_help_says_where_each_estimator_sits(capsys):
    with pytest.raises(SystemExit):
        data.parse(grpo.Config, argv=["--help"])
    line, = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["--kl"]]
    assert "k1" in line and "reward" in line and "loss" in line
