"""RLHF with PPO: sample from the policy, score with a learned reward, step towards what scored above expectation.

    maximise  E_{x, y ~ π} [ r(x, y) ] - β KL(π || π_ref)

Each step: (1) roll out the policy; (2) give every response token the reward -β (log π - log π_ref), and the last one
the score of the response on top; (3) turn rewards into advantages with a learned value function, A = GAE(γ, λ);
(4) for a few epochs minimise  -min(ρ A, clip(ρ, 1±ε) A)  over tokens, ρ = π / π_old, and regress the value function
on the returns.

Papers: PPO, Schulman et al. 1707.06347; GAE 1506.02438; KL in the reward, Ziegler et al. 1909.08593; InstructGPT,
Ouyang et al. 2203.02155. As in InstructGPT the critic is a model of its own, started from the reward model. Departures:
advantages are whitened; losses are means over the tokens of a minibatch; old log-probabilities are recomputed by the
trainer, because the sampler's differ in the last bits of bf16; dropout stays off (load_model returns eval mode and
nothing here leaves it), so ρ = 1 before the first update of a step; the rates fall along a cosine.

    python ppo.py                       out/sft + out/reward -> out/ppo
    python ppo.py --reward exact --families arith     a verifier instead of a reward model

Four models are in memory (policy, reference, critic, reward). What comes out on the toy is in README.md, "What comes
out"; "What the numbers mean" there explains each metric.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from data import (Count, Families, Natural, NonNegative, OptionError, Positive, Run, Share, Sum, Temperature,
                  TrainConfig, collate, compare_words, fits, guard, late_rows, mean, open_stream, parse, truth)
from model import (Means, Optimizer, Reward, evaluate, load_model, logps, minibatches, parts, per_token, reference,
                   respond, setup, steps, token_logprobs, token_scores)


@dataclass
class Config(TrainConfig):  # of data.py: options of every trainer, as seed, device, dtype, micro_tokens, lora_r
    """RLHF with PPO."""
    out: str = "out/ppo"        # folder of the run; the same command continues an interrupted one
    save_every: Count = 5       # steps between checkpoints
    # what is optimised
    init: str = "out/sft"       # policy to start from; it is also the reference
    reward: Sum = "out/reward"  # weighted sum of reward models and verifiers, as 0.5*out/reward + exact
    minus_reference: bool = False  # reward minus that of the reference's own answer to the prompt (ChatGLM-RLHF)
    cost: Sum = ""              # a sum like --reward, of what is to be avoided; λ holds its mean down (Safe RLHF)
    cost_limit: float = 0.0     # the most that its mean may be; any sign
    cost_lambda: Positive = 1.0  # λ at first
    lambda_lr: NonNegative = 0.1  # α in ln λ += α λ (E[cost] - cost_limit), each step; 0 keeps λ fixed
    critic: str = ""            # value function to start from; none: the first reward model, else the policy's trunk
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "write"  # of the toy world, comma-separated
    # rollouts
    steps: Count = 20           # rollout-and-update steps
    prompts: Count = 128        # prompts a step, one response each
    max_new: Count = 80         # longest response, tokens
    temperature: Temperature = 1.0  # of sampling; every log-probability is at this temperature too
    # the reward of a response
    missing_end: NonNegative = 1.0  # taken off the score of a response cut off before its end token
    reward_shift: NonNegative = 0.0  # added to the score of a finished response (Starling's length control)
    normalize_reward: bool = False  # divide scores by their running standard deviation, after taking off the mean
    clip_reward: NonNegative = 10.0  # scores are clipped to ± this; 0 never clips
    # the KL penalty
    kl: Literal["k1", "k2", "k3"] = "k1"  # k1: taken off the reward; k2, k3: added to the loss (see kl_estimate)
    kl_coef: NonNegative = 0.1  # β
    target_kl: NonNegative = 0.0  # KL per response, in nats, that β is adapted to reach; 0 keeps β fixed
    kl_horizon: Positive = 2000.0  # responses over which β may change by a fifth
    # advantages
    gamma: Share = 1.0          # discount per token
    lam: Share = 0.95           # GAE: 0 trusts the critic, 1 the sampled return
    whiten: bool = True         # advantages to mean 0 and variance 1 over the response tokens of a step
    # the update
    epochs: Count = 2           # passes over each rollout
    minibatches: Count = 1      # updates per pass
    clip: Positive = 0.2        # ε of the policy ratio
    value_clip: NonNegative = 0.2  # ε of the value function; 0 never clips
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus
    stop_kl: NonNegative = 0.0  # end a step's epochs once KL(π_old || π) per token exceeds this; 0 never
    ptx_coef: NonNegative = 0.0  # weight of the pretraining loss in the same update (PPO-ptx; InstructGPT: 27.8)
    ptx_data: str = "toy"       # the documents: toy, or a file
    ptx_batch: Count = 32       # documents a step; every update of the step sees the same
    critic_warmup: Natural = 0  # first steps that train the critic only
    lr: Positive = 1e-4         # of the policy
    critic_lr: Positive = 1e-3  # of the critic
    weight_decay: NonNegative = 0.0  # on matrices
    warmup: Natural = 0         # steps of linear warm-up, before the cosine
    lr_end: Share = 0.1         # where the cosine ends, as a share of the peak; 1 keeps the rates constant
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 10      # steps between evaluations on held-out prompts
    eval_prompts: Count = 64    # how many these are

    def __post_init__(self):
        super().__post_init__()
        if self.fused_bwd and self.ptx_coef:  # with it a weight moves in its backward pass, and ptx needs a second one
            raise OptionError("--fused_bwd: an update is one backward pass; no --ptx_coef")


# ---------------------------------------------------------------- the mathematics
# logp, ref_logp, old_logp, values, mask: (B, T-1). Index t is about tokens[:, t+1]: its log-probability, and the value
# of the state before it. The mask is 1 where that is a token of the response; all else is ignored, whatever it holds.

def kl_estimate(logp, ref_logp, kind):
    """Estimators of KL(π || π_ref) from samples of π, per token (Schulman 2020, "Approximating KL divergence").

        kind    sits in       and its gradient there is that of
        k1      the reward    KL(π || π_ref)
        k2      the loss      KL(π || π_ref), of each token by itself
        k3      the loss      KL(π_ref || π), of each token by itself

    Their values all estimate KL(π || π_ref), k2 with a bias. What counts is where their gradients lead. As a reward,
    only k1 gives the gradient of the KL. As a loss, k1's gradient is 0 on average.

    Where training with each of them ends (for comparing kinds: skip it at first). When a response is one token:

        k1, k2    the optimum of E_π[r] - β KL(π || π_ref), which is π_ref exp(r / β) / Z
        k3        the optimum of E_π[r] - β KL(π_ref || π), the solution π of π = β π_ref / (β + E_π[r] - r)

    When it is more tokens, only k1 leads to the first: it takes the KL of a token off the advantage of that token and
    of all before it. A KL in the loss moves its own token only.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    return (-d).exp() - 1 + d


def token_rewards(score, kl, mask, beta):
    """score (B,) on the last response token, -β · kl on every one -> (B, T-1)."""
    inside, nth = mask.bool(), mask.cumsum(1)
    last = inside & (nth == nth[:, -1:])  # its number is the count of them all; so is that of padding
    paid = torch.where(inside, -beta * kl, 0.0)
    return paid + torch.where(last, score[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (1506.02438, eq. 16) -> advantages, returns, both (B, T-1).

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γλ A_{t+1}, with V = A = 0 after the last token: a response cut off at
    max_new ends there like any other. returns = A + V, the critic's target.
    """
    rewards, values = torch.where(mask.bool(), rewards, 0.0), torch.where(mask.bool(), values, 0.0)
    adv = torch.zeros_like(values)
    adv_after, value_after = 0.0, 0.0  # of the token that follows
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        adv[:, t] = (delta + gamma * lam * adv_after) * mask[:, t]
        adv_after, value_after = adv[:, t], values[:, t]
    return adv, (adv + values) * mask


def lagrangian(adv, cost_adv, multiplier):
    """(A_R - λ A_C) / (1 + λ): the advantage of E[r] - λ E[c], kept in the unit of one reward (Safe RLHF 2310.12773,
    eq. 11). With -β KL in the rewards and +β KL in the costs, β keeps its meaning: (-β - λ β) / (1 + λ) = -β."""
    return (adv - multiplier * cost_adv) / (1 + multiplier)


def next_lambda(multiplier, excess, rate):
    """ln λ += α λ J with J = E[c] - limit (Safe RLHF 2310.12773, sec. 3.3): λ stays positive, and grows while the cost
    is too high. Here, unlike there, it changes by a factor e a step at most."""
    growth = rate * multiplier * excess
    return multiplier * math.exp(max(-1.0, min(1.0, growth)))


def masked_sum(x, mask):
    """Σ of the masked entries; the others do not matter, NaN included."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x, mask):
    """Their mean."""
    return masked_sum(x, mask) / mask.sum()


def masked_var(x, mask):
    """Unbiased, dividing by n - 1."""
    off = x - masked_mean(x, mask)
    return masked_sum(off ** 2, mask) / (mask.sum() - 1).clamp(min=1)


def whiten(x, mask):
    """Mean 0 and variance 1 over the masked entries, 0 elsewhere."""
    off, scale = x - masked_mean(x, mask), (masked_var(x, mask) + 1e-8).rsqrt()
    return torch.where(mask.bool(), off * scale, 0.0)


def policy_loss(logp, old_logp, adv, clip):
    """-min(ρ A, clip(ρ, 1-ε, 1+ε) A) per token (1707.06347, eq. 7) -> loss, ratio, where the clip decided."""
    ratio = (logp - old_logp).exp()
    plain = -ratio * adv
    clipped = -ratio.clamp(1 - clip, 1 + clip) * adv
    return torch.maximum(plain, clipped), ratio, clipped > plain


def value_loss(values, old_values, returns, clip):
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²) per token. Where the clipped one is larger, V has moved by more than
    ε, towards R, and gets no gradient. Elsewhere the clip does nothing."""
    loss = (values - returns) ** 2
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return loss / 2


def adapt(beta, kl, target, n, horizon):
    """β after n more responses whose KL was `kl` (Ziegler et al. 1909.08593, eq. 8); without a target it stays."""
    if not target:
        return beta
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + error * n / horizon)


def explained_variance(returns, values, mask):
    """The share of the returns' variance that the values foresaw: 1 is all, 0 is as much as their mean would."""
    left, whole = masked_var(returns - values, mask), masked_var(returns, mask)
    return 1 - float(left / whole.clamp(min=1e-8))


def normalize(score, state):
    """Scores (B,) by the mean and standard deviation of all scores so far, which `state` carries between steps."""
    state["seen"] += len(score)
    state["sum"] += float(score.double().sum())
    state["square"] += float((score.double() ** 2).sum())
    mean = state["sum"] / state["seen"]
    variance = max(0.0, state["square"] / state["seen"] - mean ** 2)
    return (score - mean) / (variance + 1e-8) ** 0.5


# ---------------------------------------------------------------- the steps
# records: B dicts, each with a "prompt". roll, a Rollout: tokens (B, T), mask (B, T-1), finished (B,), and logp (B,
# T-1) as the sampler had it. x, a micro-batch of it: b rows, cut to t tokens, as long as the longest of them is.
#
# Of model.py:
#   setup             tokenizer, device and precision, which models share
#   load_model        a language model (n_scores=0) or a value function (1); maker: who makes one, for the error message
#   prepare           switch on what training needs
#   Reward            (records, roll) -> scores (B,), and each term of the sum by its name. check: can it judge these?
#   respond           the responses of a policy, a Rollout
#   logps             log π of its tokens (B, T-1), without gradient
#   per_token         the same of any function of micro-batches (tokens, mask) -> (..., b, t-1)
#   minibatches       the rows of every update, all epochs one after another
#   parts             the rows of one update as micro-batches x; parts(..., NAME=tensor) with B rows gives x.NAME
#   token_logprobs, token_scores    (b, t-1), with gradient
#   Optimizer.step    clip, update, clear the gradients
#   steps             restore what an interrupted run had, seed each step, and save
# Models cast to bf16 by themselves; with `autocast` around several passes the weights are cast only once.
#
# Of data.py:
#   open_stream       -> prompts to train on, a Stream (batch(step, n); some(): a few to look at), and held-out ones
#   fits              leaves out a prompt that has no room for max_new tokens behind it
#   mean              of a list; None of an empty one. truth: the toy's gold of these answers, of other prompts none
#   run.log           a row of metrics, the named ones in the bar, too. run.finish: curves, and what to do next

def shape_score(raw, records, roll, ref, reward, state, cfg):
    """The score (B,) of each response, from what the reward says of it, raw (B,): less that of the reference's own
    answer, with a bonus for its end or a penalty for being cut off, brought to a common scale, clipped."""
    score = raw
    if cfg.minus_reference:  # what a prompt's answers have in common drops out (ChatGLM-RLHF 2404.00934)
        theirs, _ = reward(records, respond(ref, records, cfg))                          # (B,)
        score = score - theirs
    score = score + torch.where(roll.finished, cfg.reward_shift, -cfg.missing_end)
    if cfg.normalize_reward:
        score = normalize(score, state)
    if cfg.clip_reward:
        score = score.clamp(-cfg.clip_reward, cfg.clip_reward)
    return score


def logps_and_entropy(policy, roll, cfg):
    """log π of a rollout's tokens, and the entropy of the distributions they were drawn from, without gradient:
    (2, B, T-1)."""
    def both(tokens, mask):
        return torch.stack(token_logprobs(policy, tokens, mask, cfg.temperature, entropy=True))  # (2, b, t-1)
    with policy.autocast():
        return per_token(roll, cfg.micro_tokens, both)


def critic_start(reward, cfg):
    """The folder a value function starts from: that of the first reward model in a sum, else the policy's."""
    return reward.models[0] if reward.models else cfg.init


class Critic:
    """A value function: what it expects of every token, and how it learns from what came out."""

    def __init__(self, folder, like, cfg):
        """folder: the reward model that it starts from, or a policy, whose trunk it takes. like: whose tokenizer,
        device and precision."""
        self.cfg = cfg
        self.model = load_model(folder, like, n_scores=1).prepare(cfg)
        self.optimizer = Optimizer(self.model, cfg.critic_lr, **schedule(cfg))

    def advantages(self, rewards, roll):
        """Token rewards (B, T-1) -> advantages (B, T-1); values and returns are kept for fit."""
        with self.model.autocast():
            self.values = per_token(roll, self.cfg.micro_tokens, lambda tokens, mask: token_scores(
                self.model, tokens, mask))                                               # (B, T-1)
        adv, self.returns = gae(rewards, self.values, roll.mask, self.cfg.gamma, self.cfg.lam)
        return adv

    def fit(self, roll, batches, step):
        """Regress the values on the returns -> metrics. batches: the rows of each update."""
        metrics = dict(explained_variance=explained_variance(self.returns, self.values, roll.mask))
        means = Means()
        for rows in batches:
            count = roll.mask[rows].sum()
            for x in parts(roll, rows, self.cfg, old_values=self.values, returns=self.returns):
                values = token_scores(self.model, x.tokens, x.mask)                      # (b, t-1)
                loss = value_loss(values, x.old_values, x.returns, self.cfg.value_clip)
                (masked_sum(loss, x.mask) / count).backward()  # the sums of the micro-batches make up the mean
                means.add(x.mask, value_loss=loss)
            metrics["critic_grad_norm"] = self.optimizer.step(step)["grad_norm"]
        return metrics | means.result()


class Constraint:
    """Safe RLHF's cost (2310.12773): the policy pays for it λ times, and λ grows while the cost is above its limit."""

    def __init__(self, policy, prompts, cfg):
        self.cfg = cfg
        self.cost = Reward(cfg.cost, policy, cfg.micro_tokens, cost=True)  # the worst of A|B is the greatest
        self.cost.check(prompts.some(), cfg.data)
        self.critic = Critic(critic_start(self.cost, cfg), policy, cfg)

    def advantages(self, adv, kl, reward_beta, records, roll, state, step):
        """The advantages (B, T-1) of reward and cost together; the multiplier λ is in state, and is updated.
        reward_beta: the β that sits in the rewards, 0 where the KL sits in the loss."""
        cost, _ = self.cost(records, roll)                                               # (B,)
        costs = token_rewards(cost, kl, roll.mask, -reward_beta)  # + β kl where a reward has - β kl: see lagrangian
        multiplier = state["multiplier"]
        adv = lagrangian(adv, self.critic.advantages(costs, roll), multiplier)           # (B, T-1)
        excess = float(cost.mean()) - self.cfg.cost_limit
        if step >= self.cfg.critic_warmup:
            state["multiplier"] = next_lambda(multiplier, excess, self.cfg.lambda_lr)
        self.paid = {"cost": cost.mean(), "lambda": multiplier}  # for fit, which reports
        return adv

    def fit(self, roll, batches, step):
        """Let its critic learn -> metrics."""
        metrics = self.paid
        for name, value in self.critic.fit(roll, batches, step).items():
            metrics[f"cost_{name}"] = value
        return metrics


def pretraining_loss(policy, rows):
    """Mean -log π per token of pretraining documents (PPO-ptx, InstructGPT eq. 2) -> scalar."""
    tokens, mask = collate(rows, policy.tok, policy.device)
    return -masked_mean(token_logprobs(policy, tokens, mask), mask)


def schedule(cfg):
    """What the optimizers of policy and critic have in common."""
    return dict(total=cfg.steps, weight_decay=cfg.weight_decay, warmup=cfg.warmup, floor=cfg.lr_end,
                clip=cfg.clip_grad)


def open_data(policy, reward, cfg):
    """Prompts to train on (a Stream) and held-out ones, which the reward can judge; the documents of PPO-ptx, a Stream
    or None."""
    tok, block_size = policy.tok, policy.config.block_size
    prompts, held = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=cfg.eval_prompts,
                                prepare=fits(tok, block_size, cfg.max_new), skip_bad=cfg.skip_bad)
    reward.check(prompts.some(), cfg.data)
    documents = None
    if cfg.ptx_coef:
        documents, _ = open_stream(cfg.ptx_data, "text", cfg.seed, n_held=0, skip_bad=cfg.skip_bad,
                                   prepare=lambda document: late_rows(document, tok, block_size, loss_on="all"))
    return prompts, held, documents


def report(records, roll, raw, terms, old_logp, old_entropy, kl):
    """What is logged of a rollout: raw rewards (B,) and their terms, and what is known of every token (B, T-1)."""
    gap, length = (roll.logp - old_logp).abs(), roll.mask.sum(1)
    gold = truth(records, roll.responses(), roll.finished)  # of the toy's prompts only; of others none
    metrics = dict(
        reward=raw.mean(), gold=mean(gold), kl=float(kl.sum(1).mean()), entropy=masked_mean(old_entropy, roll.mask),
        sampler_gap=masked_mean(gap, roll.mask), response_length=length.mean(), finished=roll.finished.float().mean())
    for name, term in terms.items():
        metrics[f"reward/{name}"] = term.mean()
    return metrics


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Sample, score, compare with what was expected, update, report: one step after another."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    policy = load_model(cfg.init, like=setup(cfg, run.tok), n_scores=0, maker="python sft.py").prepare(cfg)
    ref, reward = reference(policy), Reward(cfg.reward, policy, cfg.micro_tokens)
    critic = Critic(cfg.critic or critic_start(reward, cfg), policy, cfg)
    prompts, held, documents = open_data(policy, reward, cfg)
    optimizer = Optimizer(policy, cfg.lr, **schedule(cfg))
    modules, optimizers = dict(model=policy, critic=critic.model), dict(model=optimizer, critic=critic.optimizer)
    constraint = Constraint(policy, prompts, cfg) if cfg.cost else None
    if constraint:
        modules["cost_critic"], optimizers["cost_critic"] = constraint.critic.model, constraint.critic.optimizer
    state = dict(beta=cfg.kl_coef, multiplier=cfg.cost_lambda, seen=0, sum=0.0, square=0.0)  # the last are of normalize

    for step in steps(run, cfg.steps, modules, optimizers, state, cfg.save_every):
        # 1. Sample a response to each prompt, and score it.
        records = prompts.batch(step, cfg.prompts)
        roll = respond(policy, records, cfg)
        raw, terms = reward(records, roll)                                               # (B,)
        score = shape_score(raw, records, roll, ref, reward, state, cfg)                 # (B,)

        # 2. Reward every token: each pays for its KL, the last one gets the score.
        (old_logp, old_entropy), ref_logp = logps_and_entropy(policy, roll, cfg), logps(ref, roll, cfg)  # (B, T-1)
        kl = kl_estimate(old_logp, ref_logp, "k1") * roll.mask  # k1, whatever --kl is: it is logged in any case
        reward_beta = state["beta"] if cfg.kl == "k1" else 0.0  # the others sit in the loss, below
        rewards = token_rewards(score, kl, roll.mask, reward_beta)                       # (B, T-1)

        # 3. Compare with what the critic expected.
        adv = critic.advantages(rewards, roll)                                           # (B, T-1)
        if constraint:
            adv = constraint.advantages(adv, kl, reward_beta, records, roll, state, step)
        loss_beta = state["beta"]  # of k2 and k3, in the loss
        if cfg.whiten:  # divides the advantages by their spread; β divided by it too keeps the balance of reward and KL
            loss_beta /= float(masked_var(adv, roll.mask)) ** 0.5 + 1e-8
            adv = whiten(adv, roll.mask)

        # 4. Let the critic learn what came out, and step towards the better ones. A loss is a mean over its minibatch.
        means, batches = Means(), minibatches(len(records), cfg)
        metrics = critic.fit(roll, batches, step) | dict(beta=state["beta"])
        if constraint:
            metrics |= constraint.fit(roll, batches, step)
        policy_batches = batches if step >= cfg.critic_warmup else []
        for rows in policy_batches:
            count, of_update = roll.mask[rows].sum(), Means()
            for x in parts(roll, rows, cfg, old_logp=old_logp, ref_logp=ref_logp, adv=adv):
                logp, entropy = token_logprobs(policy, x.tokens, x.mask, cfg.temperature, entropy=True, bonus=True)
                p_loss, ratio, clipped = policy_loss(logp, x.old_logp, x.adv, cfg.clip)  # (b, t-1)
                loss = p_loss - cfg.entropy_coef * entropy
                if cfg.kl != "k1":  # not weighted by ρ, so unbiased only while π = π_old: at the first update
                    loss = loss + loss_beta * kl_estimate(logp, x.ref_logp, cfg.kl)
                (masked_sum(loss, x.mask) / count).backward()
                drift = kl_estimate(x.old_logp, logp, "k3")  # KL(π_old || π): the samples are from π_old
                of_update.add(x.mask, policy_loss=p_loss, ratio=ratio, clip_frac=clipped, approx_kl=drift)
            if documents:
                (cfg.ptx_coef * pretraining_loss(policy, documents.batch(step, cfg.ptx_batch))).backward()
            metrics |= optimizer.step(step)
            means.join(of_update)
            if cfg.stop_kl and of_update.result()["approx_kl"] > cfg.stop_kl:
                break

        # 5. Report.
        metrics |= means.result() | report(records, roll, raw, terms, old_logp, old_entropy, kl)
        state["beta"] = adapt(state["beta"], metrics["kl"], cfg.target_kl, len(records), cfg.kl_horizon)
        if run.evaluates(step):
            metrics |= evaluate(policy, ref, reward, held, run, step, cfg)
        run.log(step, ("reward", "gold", "kl"), **metrics)
    return run.finish(("reward", "gold", "kl", "response_length", "entropy"),
                      then=compare_words(cfg, cfg.data, cfg.families, cfg.reward))


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
