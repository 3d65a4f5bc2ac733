"""GRPO and its family: sample a group of responses to each prompt, reward them, step towards those above the others.

    maximise  E_{x, y ~ π} [ r(x, y) ] - β KL(π || π_ref),    A_i = (r_i - mean_j r_j) / std_j r_j

The other responses to the same prompt say how hard it is, so no value function is needed: with a verifier as reward
(an answer is right or wrong) and β = 0 the policy is the only model in memory. Each step: (1) sample G responses to
each prompt; (2) reward them; (3) turn the rewards of each group into advantages, one number a response; (4) minimise
-min(ρ A, clip(ρ) A) over the response tokens, ρ = π / π_old.

Papers: GRPO, Shao et al. 2402.03300; DeepSeek-R1 2501.12948. What others change is one line each: how an advantage
comes from a group (ADVANTAGES), the loss of a token (POLICY_LOSSES), how tokens are averaged (token_weights), how the
KL is estimated, where it sits, and whether the optimum above is reached (kl_estimate). Departures: β = 0 unless asked
for, and then k2 rather than the published k3; tokens are averaged over the batch, not first within each response (DAPO
2503.14476); dropout stays off. With one update a rollout, the default, the old log-probabilities *are* the present
ones: ρ = 1 to the bit, and the value of the loss says nothing about progress (it is 0 but for the lengths of the
responses). Only its gradient matters.

    python grpo.py                                 out/sft, sums and a verifier -> out/grpo
    python grpo.py --adv dr_grpo --per constant    Dr. GRPO
    python grpo.py --reward out/reward --families write --kl k2 --kl_coef 0.05 --out out/grpo_write

On the toy, 2 CPU cores with AMX, bf16: a minute; held-out sums .54 -> .93 sampled, .43 -> .97 greedy; .34 -> .99 think
(three seeds).
README, "What the numbers mean", explains each metric, and what a collapse looks like.
"""
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import torch

from data import (Count, Families, Natural, NonNegative, OptionError, Positive, Range, Run, Share, Sum, Temperature,
                  Tokenizer, TrainConfig, check_needs, compare_words, fits, guard, mean, number, open_stream, parse,
                  truth, verifier)
from model import (Optimizer, Reward, Rollout, generate, load_model, log_ratios, per_token, reference, setup, slices,
                   steps, token_logprobs)


@dataclass
class Config(TrainConfig):
    """GRPO, Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO, CISPO, Kimi's OPMD, SPO."""
    out: str = "out/grpo"       # folder of the run; the same command continues an interrupted one
    save_every: Count = 5       # steps between checkpoints
    # what is optimised
    init: str = "out/sft"       # policy to start from; it is also the reference
    reward: Sum = "exact"       # weighted sum of reward models and verifiers, as exact + 0.2*format
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "arith"  # of the toy world, comma-separated
    # rollouts
    steps: Count = 100          # rollout-and-update steps
    prompts: Count = 32         # prompts a step
    group: Annotated[int, Range(2)] = 8  # responses to each, compared with each other
    max_new: Count = 80         # longest response, tokens
    temperature: Temperature = 1.0  # of sampling; every log-probability is at this temperature too
    resample: Natural = 0       # most further draws of prompts, until `prompts` groups have unequal rewards (DAPO)
    # which prompts
    pool: Natural = 0           # train on a fixed set of this many prompts; 0: no fixed set
    curriculum: Share = 0.0     # share of the steps over which the pool opens, from its easiest quarter to all of it
    prioritized: bool = False   # draw a prompt of the pool with chances ∝ 1 - its last mean reward (Kimi k1.5)
    # the reward of a response
    missing_end: NonNegative = 0.0  # taken off the reward of a response cut off before its end token
    overlong: Natural = 0       # tokens before max_new over which the reward falls by 1 (DAPO's soft punishment)
    mask_truncated: bool = False  # responses cut off at max_new teach nothing (DAPO's overlong filtering)
    len_reward: NonNegative = 0.0  # weight of the length reward within a group: short is good (Kimi k1.5)
    prefer: str = ""            # win rate in the group as reward (SPO): `score`, or module:function of (record, a, b)
    tripwire: str = ""          # verifier of what must not happen; continuations of each response are checked for it
    lookahead: NonNegative = 1.0  # its weight λ: the reward loses λ times the chance that it happens
    cuts: Count = 2             # places in a response to look ahead from
    ahead: Count = 24           # tokens to look ahead
    # advantages, and the loss of a token
    adv: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "grpo"  # see ADVANTAGES
    loss: Literal["clip", "gspo", "cispo", "opmd"] = "clip"  # see POLICY_LOSSES
    clip_low: Share = 0.2       # ε below 1 (gspo: 3e-4)
    clip_high: NonNegative = 0.2  # ε above 1 (DAPO: .28; gspo: 4e-4)
    tau: Positive = 1.0         # opmd: τ, half of which weighs the squared log-ratio
    per: Literal["token", "response", "constant"] = "token"  # mean over all tokens; of each response first; max_new
    # the KL penalty (k3 is GRPO's as published; k3_is: times the ratio)
    kl: Literal["k1", "k2", "k3", "k3_is"] = "k2"  # k1: in the reward, where only k1 is a KL; the others: in the loss
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


# ---------------------------------------------------------------- the mathematics
# r: the rewards (P, G) of P groups. logp, old_logp, ref_logp, mask: (B, T-1), B = P G; index t is about token t+1.

def center(r):
    """r minus its group's mean. Taking off the first reward beforehand makes equal rewards exact zeros, so that their
    group can be left out; a rounding error of 1e-8 over a standard deviation of as little would be an advantage."""
    r = r - r[:, :1]
    return r - r.mean(1, keepdim=True)


ADVANTAGES = {
    # in units of the group's spread; that rescales β and the weight of each prompt        GRPO 2402.03300 sec. 4.1.2
    "grpo": lambda r: center(r) / (r.std(1, keepdim=True) + 1e-6),
    # without it: all prompts count alike                                                  Dr. GRPO 2503.20783
    "dr_grpo": center,
    # minus the mean of the others: unbiased, the group mean shrinks it by (G-1)/G         RLOO 2402.14740
    "rloo": lambda r: center(r) * r.shape[1] / (r.shape[1] - 1),
    # the batch is the baseline, so a group of equal rewards teaches as well. A response counts once in its mean and
    # spread; in verl each of its tokens does, so there long responses count for more     REINFORCE++ 2501.03262
    "reinforce_pp": lambda r: center(r.view(1, -1)).view_as(r) / (r.std() + 1e-6),
    # the group is the baseline, the batch the scale                                       the same, "baseline"
    "reinforce_pp_baseline": lambda r: center(r) / (center(r).std() + 1e-6),
}


def clipped(x, ratio, h):
    """-min(ρ A, clip(ρ, 1-ε_low, 1+ε_high) A) (PPO 1707.06347, eq. 7; two ε: DAPO 2503.14476, eq. 8)."""
    free, held = -ratio * x.adv, -ratio.clamp(1 - h.clip_low, 1 + h.clip_high) * x.adv
    x.decides = held > free
    return torch.maximum(free, held)


def capped(x, h):
    """min(ρ, 1+ε_high) as a weight, without a gradient (CISPO 2506.13585, eq. 5)."""
    x.decides = (x.ratio > 1 + h.clip_high) & (x.adv != 0)
    return x.ratio.clamp(max=1 + h.clip_high).detach()


# Each gives a loss per token (B, T-1). x: logp; gap = logp - old_logp; ratio = exp(gap); whole (B, 1), the ratio of the
# whole response to the power 1 / its length; adv (B, 1); decides: where a clip decides, which clipped and
# capped note there. h: the options, among them whatever a loss of your own needs.
POLICY_LOSSES = {
    # every token by its own ratio                                                         PPO, GRPO, DAPO
    "clip": lambda x, h: clipped(x, x.ratio, h),
    # by the n-th root of its response's of n tokens (per response, clips 3e-4 and 4e-4)   GSPO 2507.18071 eq. 5, 7
    "gspo": lambda x, h: clipped(x, x.whole.expand_as(x.logp), h),
    # clip the weight, never the gradient, and only from above                             CISPO 2506.13585 eq. 4, 5
    "cispo": lambda x, h: -capped(x, h) * x.adv * x.logp,
    # a square around π_old; summed over a response (per constant) it is the paper's       OPMD, Kimi 2501.12599 eq. 3
    "opmd": lambda x, h: -x.adv * x.logp + h.tau / 2 * x.gap * x.gap.sum(1, keepdim=True),
}


def policy_loss(logp, old_logp, adv, mask, h):
    """The loss of --loss per token, the token's ratio, where a clip decides: (B, T-1) each; adv (B, 1)."""
    gap = torch.where(mask.bool(), logp - old_logp, 0.0)
    whole = (gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()    # (B, 1)
    x = SimpleNamespace(logp=torch.where(mask.bool(), logp, 0.0), gap=gap, ratio=gap.exp(), whole=whole, adv=adv,
                        decides=torch.zeros_like(mask, dtype=torch.bool))
    loss = POLICY_LOSSES[h.loss](x, h)
    return loss, x.ratio, x.decides & mask.bool()


def token_weights(mask, per, max_new):
    """Weights (B, T-1) whose sum with the losses of the tokens is the loss of the batch, however it is split up.

    token: the mean over all tokens (DAPO). response: the mean of each response's own mean, as GRPO was published, where
    a token of a long response counts for less: long wrong answers are hardly penalised. constant: sums over responses
    by the longest there could be (Dr. GRPO), so that no token's weight depends on the length of its response.

    A response whose tokens are all masked (mask_truncated) counts in `constant` only. The mean of `response` is over
    the others, as in verl and OpenRLHF; TRL divides by all, and there it makes the weight of the others smaller.
    """
    n = mask.sum(1, keepdim=True)                                                        # (B, 1)
    if per == "token":
        return mask / n.sum().clamp(min=1)
    return mask / (n.clamp(min=1) * (n > 0).sum().clamp(min=1) if per == "response" else len(mask) * max_new)


def kl_estimate(logp, ref_logp, ratio, kind):
    """Estimators of KL(π || π_ref) from samples of π, per token (Schulman 2020, "Approximating KL divergence").

    k1 sits in the reward, summed over the response: as a loss its expected gradient is 0. The others sit in the loss:
    as a reward, pushed through ∇ log π, only k1 gives the gradient of the KL. In the loss k2's gradient is the KL's,
    token by token; k3's, GRPO's as published, is that of KL(π_ref || π); k3_is, times the ratio π / π_old, has the KL's
    again.

    Where it leads, with responses of one token: k1 to the tilt π_ref exp(r / β) / Z, whatever the advantage. With rloo
    k2 and k3_is lead there too, and k3 to the solution of π = β π_ref / (β + E_π[r] - r). With dr_grpo these have
    β G / (G-1) in the place of β, because the group's mean shrinks the reward and not the KL; with the others β is
    changed by the spread, so they lead to neither.

    With responses of more tokens only k1 reaches the tilt. A KL in the loss is not credited to the tokens before it:
    a token is then chosen by the reward that follows alone, as if the KL of all later tokens cost nothing.
    """
    d = logp - ref_logp
    k3 = (-d).exp() - 1 + d
    return {"k1": d, "k2": d * d / 2, "k3": k3, "k3_is": ratio * k3}[kind]


def overlong_penalty(length, max_new, buffer):
    """0 up to max_new - buffer tokens, then down to -1 at max_new (DAPO, eq. 13); length (B,)."""
    return ((max_new - buffer - length) / max(1, buffer)).clamp(-1, 0)


def length_reward(length, right):
    """λ = ½ - (len - min) / (max - min) in each group, of wrong answers min(0, λ), 0 where all are as long (Kimi k1.5,
    2501.12599, sec. 2.3.3); length and right (P, G)."""
    low, high = length.amin(1, keepdim=True), length.amax(1, keepdim=True)
    lam = 0.5 - (length - low) / (high - low).clamp(min=1)
    return torch.where(high > low, torch.where(right, lam, lam.clamp(max=0)), 0.0)


def win_rates(p):
    """p (P, G, G), chance that i beats j -> mean over j ≠ i (SPO 2401.04056); if p_ij + p_ji = 1 they sum to G / 2."""
    G = p.shape[1]
    return (p.sum(2) - p.diagonal(dim1=1, dim2=2)) / (G - 1)


def draw_prompts(rates, share, n, rng):
    """n different indices among the first `share` of a pool, with chances ∝ 1 - rates[i] (one exponential race)."""
    among = range(max(n, math.ceil(share * len(rates))))
    return sorted(among, key=lambda i: -math.log(1 - rng.random()) / (1 - rates[i] + 1e-3))[:n]


# ---------------------------------------------------------------- the reward of a response

def look_ahead(policy, records, roll, judge, cfg, tok, amp):
    """Chance (B,) that the policy, going on from somewhere in a response, trips the wire within `ahead` tokens: the
    mean over `cuts` places inside it, evenly spaced, of one continuation each."""
    rows = [(record, ids[:p + (n - p) * (cut + 1) // (cfg.cuts + 1)], p) for record, ids, p, n in zip(
        records, roll.tokens.tolist(), roll.prompt_len, roll.lengths) for cut in range(cfg.cuts)]
    with amp():
        onward = generate(policy, [ids for _, ids, _ in rows], tok, cfg.ahead, temperature=cfg.temperature)
    trips = []
    for (record, _, p), ids, n, done in zip(rows, onward.tokens.tolist(), onward.lengths, onward.finished.tolist()):
        trips.append(number(judge(record, tok.decode(ids[p:n]), done), "--tripwire", record))
    return torch.tensor(trips, device=roll.tokens.device).view(-1, cfg.cuts).mean(1)


def preferences(records, texts, score, judge):
    """P(y_i beats y_j) in every group: Bradley-Terry on the scores (P, G), or what judge(record, a, b) says."""
    if judge is None:
        return torch.sigmoid(score[:, :, None] - score[:, None, :])
    G = score.shape[1]
    groups = [texts[i:i + G] for i in range(0, len(texts), G)]
    return torch.tensor([[[number(judge(r, a, b), "--prefer", r) for b in group] for a in group]
                         for r, group in zip(records, groups)], device=score.device)


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Sample groups, reward, compare within each group, update, report: one step after another."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.init, tok, device, n_scores=0, maker="python sft.py")
    policy.prepare(cfg)
    ref, as_ref = reference(policy) if cfg.kl_coef else (None, None)
    modules = dict(model=policy) | (dict(ref=ref) if cfg.ref_every else {})
    reward = Reward(cfg.reward, tok, device, amp, cfg.micro_tokens)
    tripwire, judge = (verifier(name, option) if name and name != "score" else None
                       for name, option in ((cfg.tripwire, "tripwire"), (cfg.prefer, "prefer")))
    stream, held = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=64,
                               prepare=fits(tok, policy.config.block_size, cfg.max_new), skip_bad=cfg.skip_bad)
    reward.meet(stream.some(), cfg.data)
    check_needs(cfg.tripwire, tripwire, stream.some(), cfg.data, "tripwire")
    pool = (stream.items or stream.batch(0, cfg.pool))[:cfg.pool]
    pool = sorted(pool, key=lambda record: record.get("difficulty", record.get("level", 0)))
    optimizer = Optimizer(policy, cfg.lr, cfg.steps, weight_decay=cfg.weight_decay, warmup=cfg.warmup,
                          floor=cfg.lr_end, clip=cfg.clip_grad)
    state = dict(rates=[0.0] * len(pool))

    def sample(records, n=1):
        with amp():
            return generate(policy, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new, n, cfg.temperature)

    def choose(step, draw):
        """The prompts of a step, new ones for every draw; of a pool, their places in it too."""
        if not pool:
            return stream.batch(step * (1 + cfg.resample) + draw, cfg.prompts), []
        share = min(1.0, 0.25 + 0.75 * step / (cfg.curriculum * cfg.steps)) if cfg.curriculum else 1.0
        places = draw_prompts(state["rates"], share, min(cfg.prompts, len(pool)), random.Random(f"{cfg.seed} {step}"))
        return [pool[i] for i in places], places

    def sample_groups(step):
        """Groups to learn from: their prompts, responses and scores (P, G); and metrics of all that was drawn."""
        groups, seen = [], {}
        for draw in range(1 + cfg.resample):
            records, places = choose(step, draw)
            repeated, roll = [r for r in records for _ in range(cfg.group)], sample(records, cfg.group)
            score, parts = reward(repeated, roll)
            drawn = dict(reward=score.tolist(), gold=truth(repeated, roll.responses(tok), roll.finished))
            drawn |= {f"reward/{name}": part.tolist() for name, part in parts.items()}
            for name, values in drawn.items():
                seen.setdefault(name, []).extend(values)
            score = score.view(-1, cfg.group)                                            # (P, G)
            for place, rate in zip(places if cfg.prioritized else (), score.mean(1).clamp(0, 1).tolist()):
                state["rates"][place] = rate
            # DAPO's dynamic sampling: a group of equal rewards teaches nothing, so others are drawn instead. When no
            # draws are left the batch stays smaller; if it were empty, the last draw is it.
            keep = [i for i, s in enumerate(score) if not cfg.resample or s.amax() > s.amin()]
            if not keep and not groups and draw == cfg.resample:
                keep = range(len(records))
            groups += [(records[i], roll.take(range(i * cfg.group, (i + 1) * cfg.group)), score[i]) for i in keep]
            if len(groups) >= cfg.prompts:
                break
        records, rolls, scores = zip(*groups[:cfg.prompts])
        metrics = {name: mean(values) for name, values in seen.items()} | dict(groups=len(seen["reward"]) // cfg.group)
        return records, Rollout.join(rolls, tok.pad), torch.stack(scores), metrics

    def logps(model, roll):
        with torch.no_grad(), amp():
            return per_token(roll, cfg.micro_tokens, lambda tokens, mask: token_logprobs(
                model, tokens, mask, cfg.temperature))[0]                                # (B, T-1)

    for step in steps(run, cfg.steps, modules, dict(optimizer=optimizer), state, cfg.save_every):
        if cfg.ref_every and step and step % cfg.ref_every == 0:
            ref.load_state_dict(policy.state_dict())

        # 1. Sample a group of responses to each prompt, and score them.
        records, roll, raw, metrics = sample_groups(step)                                # raw (P, G)
        repeated, length = [r for r in records for _ in range(cfg.group)], roll.mask.sum(1)

        # 2. Shape the reward: win rate, length, cut off or nearly, look-ahead, KL.
        r = raw.clone()
        if cfg.prefer:
            r = win_rates(preferences(records, roll.responses(tok), raw, judge))
        if cfg.len_reward:
            r += cfg.len_reward * length_reward(length.view_as(r), raw > 0.5)
        if cfg.missing_end:
            r -= cfg.missing_end * (~roll.finished).view_as(r)
        if cfg.overlong:
            r += overlong_penalty(length, cfg.max_new, cfg.overlong).view_as(r)
        if cfg.tripwire and cfg.lookahead:
            ahead = look_ahead(policy, repeated, roll, tripwire, cfg, tok, amp)
            r -= cfg.lookahead * ahead.view_as(r)
        # With one update a rollout π_old is the policy itself, and needs no pass of its own.
        need_old = cfg.epochs * cfg.minibatches > 1 or (cfg.kl_coef and cfg.kl == "k1")
        old_logp = logps(policy, roll) if need_old else None                             # (B, T-1)
        if cfg.kl_coef:
            with as_ref():
                ref_logp = logps(ref, roll)                                              # (B, T-1)
            if cfg.kl == "k1":
                penalty = kl_estimate(old_logp, ref_logp, 1.0, "k1") * roll.mask         # (B, T-1)
                r -= cfg.kl_coef * penalty.sum(1).view_as(r)

        # 3. Advantages: every token of a response gets the same.
        adv = ADVANTAGES[cfg.adv](r.double()).to(roll.logp.dtype).view(-1, 1)            # (B, 1)
        mask = roll.mask * roll.finished[:, None] if cfg.mask_truncated else roll.mask
        in_loss = cfg.kl_coef > 0 and cfg.kl != "k1"

        # 4. Update. A response without advantage has no gradient but of the KL term and opmd's square: it is left out,
        # and metrics of the update are about the others.
        teaches = mask.any(1) & (adv[:, 0] != 0 if not in_loss and cfg.loss != "opmd" else True)
        tally, grad_norm, lr = torch.zeros(7, device=device), None, None
        for batch in [rows for _ in range(cfg.epochs) for rows in torch.randperm(len(adv)).chunk(cfg.minibatches)]:
            weights = torch.zeros_like(mask)
            weights[batch] = token_weights(mask[batch], cfg.per, cfg.max_new)
            busy = batch[teaches.cpu()[batch]].tolist()
            for rows, tokens, m in slices(roll, cfg.micro_tokens, busy) if busy else ():
                cut = rows, slice(0, m.shape[1])                                         # their corner of (B, T-1)
                with amp():
                    logp, entropy = token_logprobs(policy, tokens, m, cfg.temperature, entropy=True)
                old = logp.detach() if old_logp is None else old_logp[cut]
                loss, ratio, decides = policy_loss(logp, old, adv[rows], m, cfg)
                kl = torch.zeros_like(logp)
                if cfg.kl_coef:
                    kl = logp.detach() - ref_logp[cut]
                if in_loss:
                    loss = loss + cfg.kl_coef * kl_estimate(logp, ref_logp[cut], ratio, cfg.kl)
                loss = (loss * weights[cut]).sum()
                loss.backward()
                tally += torch.stack([loss.detach() / cfg.minibatches] + [(x.detach() * m).sum() for x in (
                    entropy, ratio, decides, kl_estimate(old, logp, 1.0, "k3"), kl, torch.ones_like(m))])
            if busy:
                grad_norm, lr = optimizer.step(step)
        if cfg.reset:
            optimizer.forget()

        # 5. Report.
        loss, *sums, count = tally.tolist()
        entropy, ratio, clip_frac, approx_kl, kl = (s / count if count else None for s in sums)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            held_roll = sample(held)
            texts = held_roll.responses(tok)
            metrics |= dict(val_reward=reward(held, held_roll)[0].mean(),
                            val_gold=mean(truth(held, texts, held_roll.finished)))
            if cfg.kl_coef:
                with amp():
                    val_kl = log_ratios(held_roll, policy, (ref, as_ref), cfg.micro_tokens, cfg.temperature)  # (B, T-1)
                metrics["val_kl"] = val_kl.sum(1).mean()
            run.samples(step + 1, held, texts)
        if cfg.kl_coef:
            metrics["kl"] = kl and kl * float(length.mean())
        if cfg.tripwire:
            caught = zip(repeated, roll.responses(tok), roll.finished.tolist())
            metrics["tripped"] = mean([number(tripwire(*c), "--tripwire", c[0]) for c in caught])
        run.log(step, ("reward", "zero_std", "response_length"), **metrics, loss=loss / cfg.epochs,
                zero_std=(r.amax(1) == r.amin(1)).float().mean(), entropy=entropy, response_length=length.mean(),
                finished=roll.finished.float().mean(), ratio=ratio, clip_frac=clip_frac, approx_kl=approx_kl,
                grad_norm=grad_norm, lr=lr)
    if all(row["zero_std"] == 1 for row in run.rows):
        print(f"\nIn no group did the rewards differ, so nothing was learned. --reward {cfg.reward} has to tell the "
              f"responses of {cfg.init} apart now and then: easier prompts, a larger --group, or more SFT first.")
    return run.finish(("reward", "zero_std", "entropy", "response_length", "grad_norm"),
                      then=compare_words(cfg, cfg.data, cfg.families, cfg.reward))


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
