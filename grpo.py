"""GRPO and its family: sample a group of responses to each prompt, reward them, step towards those above the others.

    maximise  E_{x, y ~ π} [ r(x, y) ] - β KL(π || π_ref),    A_i = (r_i - mean_j r_j) / std_j r_j

The other responses to the same prompt say how hard it is, so no value function is needed: with a verifier as reward
(an answer is right or wrong) and β = 0 the policy is the only model in memory. Each step: (1) sample G responses to
each prompt; (2) reward them; (3) turn the rewards of each group into advantages, one number a response; (4) minimise
-min(ρ A, clip(ρ) A) over the response tokens, ρ = π / π_old.

Papers: GRPO, Shao et al. 2402.03300; DeepSeek-R1 2501.12948. What others change is one line each: how an advantage
comes from a group (ADVANTAGES), the loss of a token (POLICY_LOSSES), how tokens are averaged (token_weights), and
whether the KL is in the reward or in the loss (kl_estimate). Departures: β = 0 unless asked for, and then the KL is
estimated by k2, a squared log-ratio, rather than by the published k3; tokens are averaged over the batch, not first
within each response (DAPO 2503.14476); dropout stays off. With one update a rollout, the default, the old
log-probabilities *are* the present ones: ρ = 1 to the bit. The value of the loss then says nothing: the advantages of a
group sum to 0, and what is left is that longer responses weigh more. Only its gradient matters.

    python grpo.py                                 out/sft, sums and a verifier -> out/grpo
    python grpo.py --adv dr_grpo --per constant    Dr. GRPO
    python grpo.py --reward out/reward --families write --kl k2 --kl_coef 0.05 --out out/grpo_write

What comes out on the toy is in README.md, "What comes out": on sums, that thinking pays. "What the numbers mean" there
explains each metric, and what a collapse looks like.
"""
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import torch

from data import (Count, Families, Natural, NonNegative, OptionError, Positive, Range, Run, Share, Sum, Temperature,
                  TrainConfig, check_needs, compare_words, fits, guard, mean, number, open_stream, parse,
                  truth, verifier)
from model import (Means, Optimizer, Reward, Rollout, evaluate, generate, load_model, logps, minibatches, parts,
                   reference, respond, setup, steps, token_logprobs)


@dataclass
class Config(TrainConfig):  # of data.py: options of every trainer, as seed, device, dtype, micro_tokens, lora_r
    """GRPO, Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO, CISPO, Kimi's OPMD, SPO."""
    out: str = "out/grpo"       # folder of the run; the same command continues an interrupted one
    save_every: Count = 5       # steps between checkpoints
    # what is optimised
    init: str = "out/sft"       # policy to start from; it is also the reference
    reward: Sum = "exact"       # weighted sum of reward models and verifiers, as exact + 0.2*format
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "arith"  # of the toy world, comma-separated
    # rollouts
    steps: Count = 40           # rollout-and-update steps
    prompts: Count = 32         # prompts a step
    group: Annotated[int, Range(2)] = 8  # responses to each, compared with each other
    max_new: Count = 80         # longest response, tokens
    temperature: Temperature = 1.0  # of sampling; every log-probability is at this temperature too
    resample: Natural = 0       # at most so many draws more, while fewer than `prompts` groups differ in reward (DAPO)
    # which prompts
    pool: Natural = 0           # train on a fixed set of this many prompts; 0: no fixed set
    curriculum: Share = 0.0     # share of the steps over which the pool opens, from its easiest quarter to all of it
    prioritized: bool = False   # draw a prompt of the pool with chances ∝ 1 - its last mean reward (Kimi k1.5)
    # the reward of a response
    missing_end: NonNegative = 0.0  # taken off the reward of a response cut off before its end token
    overlong: Natural = 0       # tokens before max_new over which the reward falls by 1 (DAPO's soft punishment)
    mask_truncated: bool = False  # responses cut off at max_new teach nothing (DAPO's overlong filtering)
    len_reward: NonNegative = 0.0  # weight of the length reward within a group: short is good (Kimi k1.5)
    prefer: str = ""            # win rates in the group as rewards (SPO): by `score`, or a judge, module:function
    # looking ahead (ours): from some places in a response the policy writes on, to see where it was going
    tripwire: str = ""          # verifier of a forbidden event, asked about every continuation
    lookahead: NonNegative = 1.0  # λ: the reward loses λ times the share of continuations that trip the wire
    cuts: Count = 2             # places in each response, evenly spaced
    ahead: Count = 24           # tokens that the policy writes on from each
    # advantages, and the loss of a token
    adv: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "grpo"  # see ADVANTAGES
    loss: Literal["clip", "gspo", "cispo", "opmd"] = "clip"  # see POLICY_LOSSES
    clip_low: Share = 0.2       # ε below 1 (gspo: 3e-4)
    clip_high: NonNegative = 0.2  # ε above 1 (DAPO: .28; gspo: 4e-4)
    tau: Positive = 1.0         # opmd: τ / 2 is the weight of the squared log-ratio
    per: Literal["token", "response", "constant"] = "token"  # see token_weights
    # the KL penalty (k3 is GRPO's as published; k3_is: times the ratio)
    kl: Literal["k1", "k2", "k3", "k3_is"] = "k2"  # k1: off the reward; others: in the loss (kl_estimate)
    kl_coef: NonNegative = 0.0  # β; 0 needs no reference model
    ref_every: Natural = 0      # steps after which the policy becomes the reference; 0: never
    # the update
    epochs: Count = 1           # passes over each rollout
    minibatches: Count = 1      # updates per pass
    reset: bool = False         # forget the optimizer's state after each rollout (Kimi k1.5)
    lr: Positive = 2e-4         # peak learning rate
    weight_decay: NonNegative = 0.0  # on matrices
    warmup: Natural = 10        # steps of linear warm-up, before the cosine
    lr_end: Share = 0.1         # where the cosine ends, as a share of the peak; 1 keeps the rate constant
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 10      # steps between evaluations on held-out prompts

    def __post_init__(self):
        super().__post_init__()
        if self.ref_every and (self.lora_r or not self.kl_coef):
            raise OptionError("--ref_every refreshes a reference: it needs --kl_coef, and no --lora_r, whose reference "
                              "is the model it adapts")
        if self.prefer and self.prefer != "score" and ":" not in self.prefer:
            raise OptionError(f"--prefer {self.prefer}: neither `score` nor the module:function of a judge of two "
                              "answers")
        if self.overlong > self.max_new:
            raise OptionError(f"--overlong {self.overlong}: more than --max_new {self.max_new}")
        if (self.curriculum or self.prioritized) and not self.pool:
            raise OptionError("--curriculum and --prioritized need a --pool of prompts that come again")
        if self.resample and self.pool:
            raise OptionError("--resample draws new prompts, --pool keeps to old ones: choose one")
        if self.resample and self.adv == "reinforce_pp":
            raise OptionError("--resample replaces groups of equal rewards, from which --adv reinforce_pp learns, too")


# ---------------------------------------------------------------- the mathematics
# r: the rewards (P, G) of P groups. logp, old_logp, ref_logp, mask: (B, T-1), B = P G; index t is about token t+1.

def center(r):
    """r minus its group's mean. Equal rewards have to give exactly 0: of what rounding leaves, the division by the
    spread would make an advantage. So the first reward is taken off beforehand."""
    r = r - r[:, :1]
    return r - r.mean(1, keepdim=True)


# Each gives the advantages (P, G) of rewards r (P, G). h: the Config; add an option there if an advantage of yours
# needs one.
ADVANTAGES = {
    # in units of the group's spread; that rescales β and the weight of each prompt        GRPO 2402.03300 sec. 4.1.2
    "grpo": lambda r, h: center(r) / (r.std(1, keepdim=True) + 1e-6),
    # without it: all prompts count alike                                                  Dr. GRPO 2503.20783
    "dr_grpo": lambda r, h: center(r),
    # minus the mean of the others, which is G/(G-1) times r minus the mean of all: unbiased RLOO 2402.14740
    "rloo": lambda r, h: center(r) * r.shape[1] / (r.shape[1] - 1),
    # the whole batch as one group, so equal rewards to one prompt teach as well. A response counts once in the mean and
    # the spread; in verl, another trainer, long ones count for more                      REINFORCE++ 2501.03262
    "reinforce_pp": lambda r, h: center(r.view(1, -1)).view_as(r) / (r.std() + 1e-6),
    # the group is the baseline, the batch the scale                                       the same, "baseline"
    "reinforce_pp_baseline": lambda r, h: center(r) / (center(r).std() + 1e-6),
}


# A policy loss returns two tensors (B, T-1): the loss of every token, and whether a clip decides it (clip_frac). It is
# given s, which policy_loss below makes: logp; gap = logp - old_logp; ratio = exp(gap); response_ratio (B, 1), the
# ratio of the whole response to the power 1 / its length; adv (B, 1). And h, the Config: add an option there if a loss
# of yours needs one.

def clip(s, h):
    """Every token by its own ratio: -min(ρ A, clip(ρ, 1-ε_low, 1+ε_high) A) (PPO 1707.06347, eq. 7; two ε: DAPO
    2503.14476, eq. 8)."""
    return clipped(s.ratio, s.adv, h)


def gspo(s, h):
    """Every token by the n-th root of the ratio of its whole response of n tokens; with --per response --clip_low 3e-4
    --clip_high 4e-4 it is the paper's (GSPO 2507.18071, eq. 5, 7)."""
    return clipped(s.response_ratio.expand_as(s.logp), s.adv, h)


def clipped(ratio, adv, h):
    """The larger of two losses, the free and the clipped one, so that a clip can only hold back."""
    free = -ratio * adv
    held = -ratio.clamp(1 - h.clip_low, 1 + h.clip_high) * adv
    return torch.maximum(free, held), held > free


def cispo(s, h):
    """The ratio is a constant weight of A log π, held below 1 + ε_high; so even a token whose weight is held keeps its
    gradient (CISPO 2506.13585, eq. 4, 5)."""
    weight = s.ratio.clamp(max=1 + h.clip_high).detach()
    held = (s.ratio > weight) & (s.adv != 0)
    return -weight * s.adv * s.logp, held


def opmd(s, h):
    """Instead of a clip a square, τ/2 (log π(y) / π_old(y))² of the whole response y; with --adv dr_grpo --per constant
    it is the paper's (Kimi k1.5 2501.12599, eq. 3)."""
    square = s.gap * s.gap.sum(1, keepdim=True)  # a token's part of it: summed over the response it is (Σ gap)²
    never = torch.zeros_like(s.gap, dtype=torch.bool)
    return -s.adv * s.logp + h.tau / 2 * square, never


POLICY_LOSSES = {"clip": clip, "gspo": gspo, "cispo": cispo, "opmd": opmd}


def policy_loss(logp, old_logp, adv, mask, h):
    """The loss of --loss per token, the token's ratio, where a clip decides: (B, T-1) each; adv (B, 1)."""
    inside = mask.bool()  # whatever is outside, NaN included, must not reach a gradient
    gap = torch.where(inside, logp - old_logp, 0.0)                                      # (B, T-1)
    length = mask.sum(1, keepdim=True).clamp(min=1)                                      # (B, 1)
    response_ratio = (gap.sum(1, keepdim=True) / length).exp()                           # (B, 1)
    logp = torch.where(inside, logp, 0.0)
    s = SimpleNamespace(logp=logp, gap=gap, ratio=gap.exp(), response_ratio=response_ratio, adv=adv)
    loss, decides = POLICY_LOSSES[h.loss](s, h)
    return loss, s.ratio, decides & inside


def token_weights(mask, per, max_new):
    """Weights (B, T-1): the loss of the batch is Σ weight · loss over its tokens, however it is split up.

    token: the mean over all tokens (DAPO). response: the mean of each response's own mean, as GRPO was published, where
    a token of a long response counts for less: long wrong answers are hardly penalised. constant: each response's sum
    divided by the longest there could be, and the mean of that (Dr. GRPO), so that no token's weight depends on the
    length of its response.

    A response may have no token left (mask_truncated). `response` is then the mean over the others, as in verl and
    OpenRLHF; `constant` divides by all. TRL divides by all in `response` too.
    """
    n = mask.sum(1, keepdim=True)                                                        # (B, 1)
    if per == "token":
        return mask / n.sum().clamp(min=1)
    if per == "response":
        responses = (n > 0).sum().clamp(min=1)
        return mask / (n.clamp(min=1) * responses)
    return mask / (len(mask) * max_new)


def kl_estimate(logp, ref_logp, ratio, kind):
    """Estimators of KL(π || π_ref) from samples of π, per token (Schulman 2020, "Approximating KL divergence").

        kind    sits in       and its gradient there is that of
        k1      the reward    KL(π || π_ref)
        k2      the loss      KL(π || π_ref), token by token
        k3      the loss      KL(π_ref || π), token by token (GRPO's as published)
        k3_is   the loss      KL(π || π_ref), token by token: k3 times the ratio π / π_old

    A KL in the loss moves its own token only. Earlier tokens do not feel it. The values of all four estimate
    KL(π || π_ref); only the gradients differ. As a reward, only k1 gives the gradient of the KL. As a loss, k1 has one
    that is 0 on average.

    Where training with each of them ends (for choosing --kl: skip it at first). Let π*(β) = π_ref exp(r / β) / Z be the
    optimum, and π'(β) the solution π of π = β π_ref / (β + E_π[r] - r). When a response is one token:

        k1, any advantage         π*(β): there r - β k1 is equal for all responses, and every advantage is 0
        k2 or k3_is with rloo     π*(β)
        k2 or k3_is with dr_grpo  π*(β G / (G-1)): the group's mean shrinks the reward, and not the KL
        k3 with rloo              π'(β)
        k3 with dr_grpo           π'(β G / (G-1))
        these, other advantages   no fixed β: the spread rescales the reward, and with it β

    When a response is more tokens, only k1 leads to π*: it takes a token's KL off the advantage of the whole response,
    the tokens before it included.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    k3 = (-d).exp() - 1 + d
    return ratio * k3 if kind == "k3_is" else k3


def overlong_penalty(length, max_new, buffer):
    """0 up to max_new - buffer tokens, then down to -1 at max_new (DAPO, eq. 13); length of any shape."""
    over = length - (max_new - buffer)
    return -(over / max(1, buffer)).clamp(0, 1)


def length_reward(length, right):
    """λ = ½ - (len - min) / (max - min), by the shortest and the longest of the group; for wrong answers min(0, λ); 0
    for all of a group of equal lengths (Kimi k1.5, 2501.12599, sec. 2.3.3). length and right (P, G)."""
    low = length.amin(1, keepdim=True)                                                   # (P, 1)
    spread = length.amax(1, keepdim=True) - low                                          # (P, 1)
    lam = 0.5 - (length - low) / spread.clamp(min=1)                                     # (P, G)
    lam = torch.where(right, lam, lam.clamp(max=0))
    return torch.where(spread > 0, lam, 0.0)


def win_rates(p):
    """p (P, G, G), chance that i beats j -> mean over j ≠ i (SPO 2401.04056); if p_ij + p_ji = 1 they sum to G / 2."""
    itself = p.diagonal(dim1=1, dim2=2)                                                  # (P, G)
    return (p.sum(2) - itself) / (p.shape[1] - 1)


def draw_prompts(solved, share, n, rng):
    """n different indices among the first `share` of a pool, with chances ∝ 1 - solved[i]. Every index
    is an alarm clock that rings at a random time, at the rate of its chance; the n that ring first are drawn
    (Efraimidis & Spirakis 2006). 1e-3: what is solved comes back at times."""
    n_open = max(n, math.ceil(share * len(solved)))
    arrival = []
    for i in range(n_open):
        chance = 1 - solved[i] + 1e-3
        arrival.append(-math.log(1 - rng.random()) / chance)
    return sorted(range(n_open), key=lambda i: arrival[i])[:n]


# ---------------------------------------------------------------- the steps
# records: dicts, each with a "prompt". roll, a Rollout of B responses: tokens (B, T), mask and logp (B, T-1),
# prompt_len and lengths (prompt and response), finished (B,). x, a micro-batch of it: b rows, cut to t tokens, as long
# as the longest of them is.
#
# Of model.py:
#   setup             tokenizer, device and precision, which models share
#   load_model        maker: who makes such a model, for the error message; prepare: switch on what training needs
#   Reward            (records, roll) -> scores (B,), and each term of the sum by its name. check: can it judge these?
#   respond           the responses of a policy, n to each prompt, a Rollout
#   logps             log π of its tokens (B, T-1), without gradient, 0 outside the response
#   minibatches       the rows of every update, all epochs one after another
#   parts             the rows of one update as micro-batches x; parts(..., NAME=tensor) with B rows gives x.NAME
#   token_logprobs    (b, t-1), with gradient
#   Optimizer.step    clip, update, clear the gradients -> gradient norm, rate
#   steps             restore what an interrupted run had, seed each step, and save
#
# Of data.py:
#   open_stream       -> prompts to train on, a Stream (batch(step, n); some(): a few to look at), and held-out ones
#   fits              leaves out a prompt that has no room for max_new tokens behind it
#   mean              of a list; None of an empty one. truth: the toy's gold of these answers, of other prompts none
#   run.log           a row of metrics, the named ones in the bar, too. run.finish: curves, and what to do next
#   verifier          NAME or module:function -> the function, or an error in the name of the option
#   check_needs       refuse prompts that lack what a verifier reads; number: a float, or an error that names the prompt

class Prompts:
    """The prompts of every step: new ones, or from a pool, which opens from the easy ones on (--curriculum) and gives
    more often what went wrong (--prioritized)."""

    def __init__(self, stream, cfg):
        self.stream, self.cfg, self.pool = stream, cfg, []
        if cfg.pool:
            pool = stream.items or stream.batch(0, cfg.pool)  # a file's records, or fresh ones of the toy world
            self.pool = sorted(pool[:cfg.pool], key=difficulty)
        # The last mean reward of each prompt of the pool, all 0 without --prioritized; `steps` saves and restores this.
        self.state = dict(solved=[0.0] * len(self.pool))

    def choose(self, step, draw):
        """The records of a step, new ones for every draw; of a pool, their places in it too."""
        cfg = self.cfg
        if not self.pool:
            nth = step * (1 + cfg.resample) + draw
            return self.stream.batch(nth, cfg.prompts), []
        share, n = 1.0, min(cfg.prompts, len(self.pool))
        if cfg.curriculum:
            share = min(1.0, 0.25 + 0.75 * step / (cfg.curriculum * cfg.steps))
        places = draw_prompts(self.state["solved"], share, n, random.Random(f"{cfg.seed} {step}"))
        return [self.pool[i] for i in places], places

    def learn(self, places, score):
        """Remember how the prompts at these places of the pool went: score (P, G)."""
        if self.cfg.prioritized:
            means = score.mean(1).clamp(0, 1).tolist()
            for place, mean_score in zip(places, means):
                self.state["solved"][place] = mean_score


def difficulty(record):
    """How hard a prompt is: its difficulty, as configs/kimi_k15.py measures it, or the level of a toy sum; else 0."""
    return record.get("difficulty", record.get("level", 0))


def repeat(things, n):
    """Each of them n times in a row, as a record for every response of its group."""
    return [thing for thing in things for _ in range(n)]


def sample_groups(policy, reward, prompts, step, cfg):
    """Groups to learn from: their records (P), responses, scores (P, G); and metrics of all that was drawn.

    DAPO's dynamic sampling (--resample): where the group is the baseline, equal scores teach nothing, so other groups
    are drawn instead. After the last draw the batch stays smaller. If no group differs at all, it is the last draw.
    """
    groups, seen = [], {}
    for draw in range(1 + cfg.resample):
        records, places = prompts.choose(step, draw)
        roll = respond(policy, records, cfg, cfg.group)
        repeated = repeat(records, cfg.group)
        score, terms = reward(repeated, roll)  # (B,), and each term of the sum by its name
        gold = truth(repeated, roll.responses(), roll.finished)  # of the toy's prompts only; it is watched, not learned
        drawn = dict(reward=score.tolist(), gold=gold)
        for name, term in terms.items():
            drawn[f"reward/{name}"] = term.tolist()
        for name, values in drawn.items():
            seen.setdefault(name, []).extend(values)
        score = score.view(-1, cfg.group)                                                # (P, G)
        prompts.learn(places, score)
        differ = score.amax(1) > score.amin(1)                                           # (P,)
        for i, record in enumerate(records):
            if differ[i] or not cfg.resample:
                rows = range(i * cfg.group, (i + 1) * cfg.group)
                groups.append((record, roll.take(rows), score[i]))
        if len(groups) >= cfg.prompts:
            break
    metrics = {name: mean(values) for name, values in seen.items()}
    metrics["groups"] = len(seen["reward"]) // cfg.group
    if not groups:
        return records, roll, score, metrics
    records, rolls, scores = zip(*groups[:cfg.prompts])
    return records, Rollout.join(rolls), torch.stack(scores), metrics


def preferences(records, texts, score, judge):
    """P(y_i beats y_j) in every group: Bradley-Terry on the scores (P, G), or what judge(record, a, b) says."""
    if judge is None:
        return torch.sigmoid(score[:, :, None] - score[:, None, :])
    G = score.shape[1]
    p = torch.zeros(len(records), G, G, device=score.device)
    for n, record in enumerate(records):
        group = texts[n * G:(n + 1) * G]
        for i, a in enumerate(group):
            for j, b in enumerate(group):
                value = judge(record, a, b)
                p[n, i, j] = number(value, "--prefer", record)
    return p


def look_ahead(policy, records, roll, tripwire, cfg):
    """Chance (B,) that the policy, going on from somewhere in a response, trips the wire within `ahead` tokens: the
    mean over `cuts` places inside it, evenly spaced, of one continuation each."""
    beginnings = []
    for ids, start, end in zip(roll.tokens.tolist(), roll.prompt_len, roll.lengths):
        for cut in range(1, cfg.cuts + 1):
            place = start + (end - start) * cut // (cfg.cuts + 1)
            beginnings.append(ids[:place])
    onward = generate(policy, beginnings, cfg.ahead, temperature=cfg.temperature)
    texts, starts = [], repeat(roll.prompt_len, cfg.cuts)
    for whole, start, end in zip(onward.tokens.tolist(), starts, onward.lengths):
        texts.append(policy.tok.decode(whole[start:end]))  # the response up to the cut, and how it goes on
    trips = tripped(tripwire, repeat(records, cfg.cuts), texts, onward.finished)         # (B cuts,)
    return trips.view(-1, cfg.cuts).mean(1)


def tripped(tripwire, records, texts, finished):
    """What the tripwire says of every response -> (B,)."""
    values = []
    for record, text, done in zip(records, texts, finished.tolist()):
        value = tripwire(record, text, done)
        values.append(number(value, "--tripwire", record))
    return torch.tensor(values, device=finished.device)


def shape_reward(score, records, roll, policy, judge, tripwire, cfg):
    """The reward (P, G) of each response, from its score and what the options add to it."""
    r, length = score.clone(), roll.mask.sum(1).view_as(score)
    if cfg.prefer:
        r = win_rates(preferences(records, roll.responses(), score, judge))
    if cfg.len_reward:
        r += cfg.len_reward * length_reward(length, right=score > 0.5)  # by a verifier of 0 and 1
    if cfg.missing_end:
        r -= cfg.missing_end * (~roll.finished).view_as(r)
    if cfg.overlong:
        r += overlong_penalty(length, cfg.max_new, cfg.overlong)
    if tripwire and cfg.lookahead:
        chance = look_ahead(policy, repeat(records, cfg.group), roll, tripwire, cfg)     # (B,)
        r -= cfg.lookahead * chance.view_as(r)
    return r


def open_prompts(policy, reward, tripwire, cfg):
    """The Prompts to train on, which reward and tripwire can judge, and held-out records."""
    stream, held = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=64, skip_bad=cfg.skip_bad,
                               prepare=fits(policy.tok, policy.config.block_size, cfg.max_new))
    reward.check(stream.some(), cfg.data)
    check_needs(cfg.tripwire, tripwire, stream.some(), cfg.data)
    return Prompts(stream, cfg), held


def in_loss(cfg):
    """Whether a KL penalty is a part of the loss; k1 is a part of the reward."""
    return cfg.kl_coef > 0 and cfg.kl != "k1"


def needs_old(cfg):
    """Whether log π_old needs a pass of its own: for k1, which is in the reward before the update; and for a second
    update of a rollout, at the first of which π_old is the policy itself. The sampler's own log-probabilities,
    roll.logp, are no substitute: in bf16 they differ in the last bits."""
    return cfg.epochs * cfg.minibatches > 1 or (cfg.kl_coef > 0 and cfg.kl == "k1")


def has_gradient(adv, mask, cfg):
    """Which responses (B,) teach something: where A = 0, only a KL in the loss and opmd's square still have a gradient.
    The result is on the CPU, as the rows of minibatches are."""
    taught = mask.any(1)
    if not in_loss(cfg) and cfg.loss != "opmd":
        taught = taught & (adv[:, 0] != 0)
    return taught.cpu()


def report(records, roll, r, means, tripwire, cfg):
    """What is logged of an update, and of the rollout that it learned from; r: its rewards (P, G)."""
    length, equal = float(roll.mask.sum(1).mean()), r.amax(1) == r.amin(1)
    metrics = means.result() | dict(
        zero_std=equal.float().mean(), response_length=length, finished=roll.finished.float().mean())
    if "kl" in metrics:
        metrics["kl"] *= length  # from a token's to a response's: times the mean length
    if tripwire:
        records = repeat(records, cfg.group)
        metrics["tripped"] = tripped(tripwire, records, roll.responses(), roll.finished).mean()
    return metrics


def warn_if_nothing_differed(rows, cfg):
    """Say what to do when no step had anything to learn from."""
    if all(row["zero_std"] == 1 for row in rows):
        print(f"\nIn no group did the rewards differ, so nothing was learned. --reward {cfg.reward} has to tell the "
              f"responses of {cfg.init} apart now and then: easier prompts, a larger --group, or more SFT first.")


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Sample groups, score, compare within each group, update, report: one step after another."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    policy = load_model(cfg.init, setup(cfg, run.tok), n_scores=0, maker="python sft.py").prepare(cfg)
    ref = reference(policy) if cfg.kl_coef else None
    reward = Reward(cfg.reward, policy, cfg.micro_tokens)
    tripwire = verifier(cfg.tripwire, "tripwire") if cfg.tripwire else None
    judge = verifier(cfg.prefer, "prefer") if cfg.prefer not in ("", "score") else None
    prompts, held = open_prompts(policy, reward, tripwire, cfg)
    optimizer = Optimizer(policy, cfg.lr, cfg.steps, weight_decay=cfg.weight_decay, warmup=cfg.warmup,
                          floor=cfg.lr_end, clip=cfg.clip_grad)
    modules = dict(model=policy, ref=ref) if cfg.ref_every else dict(model=policy)

    for step in steps(run, cfg.steps, modules, dict(model=optimizer), prompts.state, cfg.save_every):
        if cfg.ref_every and step and step % cfg.ref_every == 0:
            ref.load_state_dict(policy.state_dict())

        # 1. Sample a group of responses to each prompt, and score them.
        records, roll, score, metrics = sample_groups(policy, reward, prompts, step, cfg)  # score (P, G)

        # 2. Shape the reward, and take off the KL where it sits in there.
        r = shape_reward(score, records, roll, policy, judge, tripwire, cfg)             # (P, G)
        old_logp = logps(policy, roll, cfg) if needs_old(cfg) else None                  # (B, T-1)
        ref_logp = logps(ref, roll, cfg) if cfg.kl_coef else None                        # (B, T-1)
        if cfg.kl_coef and cfg.kl == "k1":
            kl = kl_estimate(old_logp, ref_logp, None, "k1")                             # (B, T-1)
            r -= cfg.kl_coef * kl.sum(1).view_as(r)

        # 3. Compare within each group: every token of a response gets the same advantage.
        adv = ADVANTAGES[cfg.adv](r.double(), cfg)                                       # (P, G), exact sums
        adv = adv.to(roll.logp.dtype).view(-1, 1)                                        # (B, 1)
        mask = roll.mask                                                                 # (B, T-1)
        if cfg.mask_truncated:  # all of a truncated response, which then has no gradient and is left out below
            mask = mask * roll.finished[:, None]

        # 4. Step towards the better ones. A response without a gradient is left out, and metrics of the update are
        # about the others.
        means, total, taught = Means(), 0.0, has_gradient(adv, mask, cfg)
        for rows in minibatches(len(adv), cfg):
            weights = torch.zeros_like(mask)                                             # (B, T-1)
            weights[rows] = token_weights(mask[rows], cfg.per, cfg.max_new)  # of means over all of these rows
            rows = rows[taught[rows]]
            for x in parts(roll, rows, cfg, weights=weights, adv=adv, old_logp=old_logp, ref_logp=ref_logp):
                logp, entropy = token_logprobs(policy, x.tokens, x.mask, cfg.temperature, entropy=True)
                old = logp.detach() if old_logp is None else x.old_logp                  # (b, t-1)
                loss, ratio, decides = policy_loss(logp, old, x.adv, x.mask, cfg)        # (b, t-1)
                if in_loss(cfg):
                    loss = loss + cfg.kl_coef * kl_estimate(logp, x.ref_logp, ratio, cfg.kl)
                loss = (loss * x.weights).sum()
                loss.backward()
                total += loss.detach()
                drift = kl_estimate(old, logp, None, "k3")  # KL(π_old || π): the samples are from π_old
                means.add(x.mask, entropy=entropy, ratio=ratio, clip_frac=decides, approx_kl=drift)
                if cfg.kl_coef:
                    means.add(x.mask, kl=logp - x.ref_logp)  # k1, whatever --kl is
            if len(rows):
                metrics |= optimizer.step(step)
        if cfg.reset:
            optimizer.forget()

        # 5. Report.
        metrics |= report(records, roll, r, means, tripwire, cfg) | dict(loss=total / (cfg.epochs * cfg.minibatches))
        if run.evaluates(step):
            metrics |= evaluate(policy, ref, reward, held, run, step, cfg)
        run.log(step, ("reward", "zero_std", "response_length"), **metrics)
    warn_if_nothing_differed(run.rows, cfg)
    return run.finish(("reward", "zero_std", "entropy", "response_length", "grad_norm"),
                      then=compare_words(cfg, cfg.data, cfg.families, cfg.reward))


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
