"""Worlds small enough to be exact: a bandit whose optimum is a formula, and responses that can all be enumerated."""
import itertools
import json
import math
import random

import torch

from model import load_model
from policies import TOK, bandit_policy, save
from runs import close

ARMS, PI_REF = "abcd", (.4, .3, .2, .1)     # F2: four one-token responses, worth 0, 1, 2 and 3


# ---------------------------------------------------------------- the one-token bandit

def bandit_game(folder, start=PI_REF):
    """A policy that says each arm with these chances, and the prompts to say it to."""
    net = bandit_policy(dict(zip(ARMS, start)))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join([json.dumps(dict(prompt="?"))] * 40))
    return save(folder, net), str(prompts)


def arms(folder, messages=(dict(role="user", content="?"),)):
    """The exact policy of a checkpoint."""
    net, prompt = load_model(folder), TOK.prompt(list(messages))
    chances = net.logits(net(torch.tensor([prompt])))[0, -1].detach().softmax(-1)
    return chances[[TOK.encode(arm)[0] for arm in ARMS]]


def worth(record, text, finished):
    """The reward of an arm."""
    return float(ARMS.index(text))


def tilt(beta):
    """π_ref exp(r / β) / Z, the optimum of E[r] - β KL(π || π_ref)."""
    weights = torch.tensor([p * math.exp(r / beta) for r, p in enumerate(PI_REF)])
    return weights / weights.sum()


# The closed forms of F2. k3 in the loss leads elsewhere, and so does a division by the group's spread.
TILT_1 = [.085073, .173439, .314304, .427184]
TILT_2 = [.212039, .262195, .288191, .237574]
K3_2 = [.219513, .226892, .243245, .310350]         # β π_ref / (β + E r - r) with β = 2
SCALED_2 = [.223194, .266906, .283714, .226186]


def farthest(p, q):
    """The largest difference of two distributions."""
    return float((torch.as_tensor(p) - torch.as_tensor(q)).abs().max())


# ---------------------------------------------------------------- all responses of at most three tokens

def all_responses(words):
    """Every response over 0 = end and these words of at most 3 tokens: finished ones, and those that are cut off."""
    for n in (1, 2, 3):
        for body in itertools.product(words, repeat=n - 1):
            yield *body, 0
    yield from itertools.product(words, repeat=3)


class Tabular:
    """A policy with its own logits after every beginning, a reference, and a score for every response, all random.

    logp, ref_logp and mask are (N, 3) of all N responses; states the places of their beginnings in the table.
    """

    def __init__(self, seed, words):
        torch.manual_seed(seed)
        beginnings = [y for n in range(3) for y in itertools.product(words, repeat=n)]
        self.theta = torch.randn(len(beginnings), len(words) + 1, dtype=torch.float64, requires_grad=True)
        self.ref = torch.randn(len(beginnings), len(words) + 1, dtype=torch.float64).log_softmax(-1)
        responses = list(all_responses(words))
        n = len(responses)
        self.score = torch.randn(n, dtype=torch.float64)
        self.states, tokens = torch.zeros(n, 3, dtype=torch.long), torch.zeros(n, 3, dtype=torch.long)
        self.mask = torch.zeros(n, 3, dtype=torch.float64)
        for i, response in enumerate(responses):
            for t, token in enumerate(response):
                self.states[i, t], tokens[i, t], self.mask[i, t] = beginnings.index(response[:t]), token, 1
        self.table = self.theta.log_softmax(-1)
        self.logp = self.table[self.states, tokens] * self.mask
        self.ref_logp = self.ref[self.states, tokens] * self.mask
        self.chance = self.logp.sum(1).exp()
        close(self.chance.sum().detach(), 1)

    def gradient(self, objective):
        return torch.autograd.grad(objective, self.theta, retain_graph=True)[0]

    def visits(self):
        """How often a response passes each beginning."""
        out = torch.zeros(len(self.theta), dtype=torch.float64)
        return out.index_put((self.states,), self.chance.detach()[:, None] * self.mask, accumulate=True)


# ---------------------------------------------------------------- the estimators of the KL: the proofs of both files

def check_kl_values(estimate, kinds):
    """F1's golden numbers. estimate(logp, ref_logp, ratio, kind)."""
    golden = dict(k1=[.5, -.5, 0], k2=[.125, .125, 0], k3=[.106531, .148721, 0], k3_is=[.213061, .148721, 0])
    logp, ref_logp, ratio = torch.tensor([-1, -2, -.5]), torch.tensor([-1.5, -1.5, -.5]), torch.tensor([2, 1, 3])
    for kind in kinds:
        close(estimate(logp, ref_logp, ratio, kind), golden[kind], atol=1e-6)


def check_kl_gradients(estimate, kinds):
    """Token by token; on policy k3_is has k2's: k3 + 1 - exp(-d) = d."""
    rng = random.Random(1)
    for _ in range(20):
        d = rng.gauss(0, 2)
        slopes = dict(k1=1.0, k2=d, k3=1 - math.exp(-d), k3_is=d)
        for kind in kinds:
            logp = torch.tensor(d - 1, dtype=torch.float64, requires_grad=True)
            ratio = (logp - logp.detach()).exp()
            estimate(logp, torch.tensor(-1.0, dtype=torch.float64), ratio, kind).backward()
            close(logp.grad, slopes[kind])


def check_kl_in_expectation(estimate, kinds):
    """Over a vocabulary of 5, on policy: all but k2 have the KL as their mean. Differentiated as a loss, k1 gives
    nothing, k2 and k3_is ∇KL(π || ref), k3 ∇KL(ref || π)."""
    torch.manual_seed(0)
    z, ref_logp = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5).double().log_softmax(0)
    logp = z.log_softmax(0)
    p, q, ratio = logp.exp(), ref_logp.exp(), (logp - logp.detach()).exp()
    kl = (p * (logp - ref_logp)).sum()
    forward, = torch.autograd.grad(kl, z, retain_graph=True)
    backward, = torch.autograd.grad((q * (ref_logp - logp)).sum(), z, retain_graph=True)
    assert (forward - backward).abs().max() > .05, "nothing would tell k2 and k3 apart"
    gradients = dict(k1=torch.zeros(5), k2=forward, k3=backward, k3_is=forward)
    for kind in kinds:
        value = estimate(logp, ref_logp, ratio, kind)
        got, = torch.autograd.grad((p.detach() * value).sum(), z, retain_graph=True)
        close(got, gradients[kind])
        if kind != "k2":
            close((p * value).sum().detach(), kl.detach())


def check_kl_over_responses(estimate, kinds):
    """Over whole responses a KL in the loss has the gradient of the KL of each token, the tokens before it held
    fixed: Σ_t E ∇KL(π(·|s_t) || ref(·|s_t)), and for k3 of KL(ref || π)."""
    world = Tabular(2, words=(1, 2))
    forward = (world.table.exp() * (world.table - world.ref)).sum(-1)
    backward = (world.ref.exp() * (world.ref - world.table)).sum(-1)
    ratio = (world.logp - world.logp.detach()).exp()
    for kind in kinds:
        value = estimate(world.logp, world.ref_logp, ratio, kind) * world.mask
        got = world.gradient((world.chance.detach() * value.sum(1)).sum())
        exact = world.gradient((world.visits() * (backward if kind == "k3" else forward)).sum())
        close(got, exact)


# ---------------------------------------------------------------- which distribution a loss reaches

class Tree:
    """Every response of n tokens out of four, its reward, and a reference with logits of its own after every token.
    One token: the bandit above, β = 2. Two tokens: a random reference and random rewards, β = .5."""

    def __init__(self, n, seed=0):
        torch.manual_seed(seed)
        self.n, self.beta = n, {1: 2.0, 2: .5}[n]
        if n == 1:
            self.ref = torch.tensor([PI_REF], dtype=torch.float64).log()
            self.reward = torch.arange(4.0, dtype=torch.float64)
        else:
            self.ref = torch.randn(5, 4, dtype=torch.float64).log_softmax(-1)
            self.reward = torch.randn(16, dtype=torch.float64)
        self.tokens = torch.tensor(list(itertools.product(range(4), repeat=n)))          # (N, n)
        self.states = torch.zeros_like(self.tokens)                                      # row of the table, (N, n)
        self.states[:, 1:] = 1 + self.tokens[:, :-1]
        self.mask = torch.ones(len(self.tokens), n)

    def logp(self, table):
        """log π of every token of every response, (N, n)."""
        return table[self.states, self.tokens]

    def tilt(self, beta):
        """π_ref exp(r / β) / Z over whole responses."""
        return (self.logp(self.ref).sum(1) + self.reward / beta).softmax(0)

    def token_by_token(self, choose, beta):
        """Each token by choose(mean reward of what follows each choice, log π_ref, β): no KL of later tokens in it."""
        if self.n == 1:
            return choose(self.reward, self.ref[0], beta)
        rewards = self.reward.view(4, 4)
        last = torch.stack([choose(r, row, beta) for r, row in zip(rewards, self.ref[1:])])
        first = choose((last * rewards).sum(1), self.ref[0], beta)
        return (first[:, None] * last).flatten()

    def visits(self, x):
        """x (N, n), of the tokens of responses drawn from π, summed up by the state they were chosen in."""
        return torch.zeros(len(self.ref), dtype=torch.float64).index_put((self.states,), x, accumulate=True)

    def settle(self, loss_of, steps, rate):
        """Follow the gradient of loss_of(logp) from the reference on until nothing moves -> chance of each response.
        It is divided by each logit's probability, which moves no fixed point; rate: step -> learning rate."""
        theta = self.ref.clone().requires_grad_()
        for step in range(steps):
            table = theta.log_softmax(-1)
            grad, = torch.autograd.grad(loss_of(self.logp(table)), theta)
            chance = self.logp(table.detach()).sum(1).exp()
            seen = self.visits(chance[:, None].expand(-1, self.n))
            with torch.no_grad():
                theta -= rate(step) * grad / (seen[:, None] * table.exp())
        return self.logp(theta.detach().log_softmax(-1)).sum(1).exp()


def towards_reward(q, ref, beta):
    """The minimum of -E q + β KL(π || π_ref)."""
    return (ref + q / beta).softmax(0)


def spread_over_reward(q, ref, beta):
    """The minimum of -E q + β KL(π_ref || π): β π_ref / (c - q), with c such that it sums to 1; c = β + E q."""
    low, high = q.max(), q.max() + beta
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if (beta * ref.exp() / (c - q)).sum() > 1 else (low, c)
    return beta * ref.exp() / (c - q)


def apart(p, q):
    """Total variation."""
    return float((p - q).abs().sum() / 2)


def check_predictions():
    """The tree of one token is F2's bandit: its predicted distributions are the closed forms above."""
    one = Tree(1)
    close(one.tilt(1.0), TILT_1, atol=1e-6)
    close(one.token_by_token(towards_reward, 2.0), TILT_2, atol=1e-6)
    close(one.token_by_token(spread_over_reward, 2.0), K3_2, atol=1e-6)
