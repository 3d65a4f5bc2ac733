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

On the toy, 2 CPU cores with AMX, bf16: 32 s; true reward +.8 ± .2 over SFT, win rate .73 ± .02; sums .54 -> .86 (three
seeds).
Four models are in memory (policy, reference, critic, reward). README, "What the numbers mean", explains each metric.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from data import (Count, Families, Natural, NonNegative, OptionError, Positive, Run, Share, Sum, Temperature, Tokenizer,
                  TrainConfig, collate, compare_words, encode, fits, guard, mean, open_stream, parse, truth)
from model import (Optimizer, Reward, generate, load_model, log_ratios, per_token, reference, setup, slices, steps,
                   token_logprobs, token_scores)


@dataclass
class Config(TrainConfig):
    """RLHF with PPO."""
    out: str = "out/ppo"        # folder of the run; the same command continues an interrupted one
    save_every: Count = 5       # steps between checkpoints
    # what is optimised
    init: str = "out/sft"       # policy to start from; it is also the reference
    reward: Sum = "out/reward"  # weighted sum of reward models and verifiers, as 0.5*out/reward + exact
    minus_reference: bool = False  # reward minus that of the reference's own answer to the prompt (ChatGLM-RLHF)
    cost: Sum = ""              # another such sum, whose expectation a multiplier λ holds down (Safe RLHF)
    cost_limit: float = 0.0     # the most that it may be; any sign
    cost_lambda: Positive = 1.0  # λ at first
    lambda_lr: NonNegative = 0.1  # ln λ grows by this times λ times the excess, each step; 0 keeps λ fixed
    critic: str = ""            # value function to start from; none: the first reward model, else the policy's trunk
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "write"  # of the toy world, comma-separated
    # rollouts
    steps: Count = 30           # rollout-and-update steps
    prompts: Count = 128        # prompts a step, one response each
    max_new: Count = 80         # longest response, tokens
    temperature: Temperature = 1.0  # of sampling; every log-probability is at this temperature too
    # the reward of a response
    missing_end: NonNegative = 1.0  # taken off the score of a response cut off before its end token
    reward_shift: NonNegative = 0.0  # added to the score of a finished response (Starling's length control)
    normalize_reward: bool = False  # divide scores by their running standard deviation, after taking off the mean
    clip_reward: NonNegative = 10.0  # scores are clipped to ± this; 0 never clips
    # the KL penalty
    kl: Literal["k1", "k2", "k3"] = "k1"  # k1: in the reward, where only k1 is a KL; k2, k3: in the loss
    kl_coef: NonNegative = 0.1  # β
    target_kl: NonNegative = 0.0  # KL per response, nats, that β adapts to; 0 keeps β fixed
    kl_horizon: Positive = 2000.0  # responses over which β adapts
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
    ptx_coef: NonNegative = 0.0  # γ of PPO-ptx: weight of the pretraining loss in the same update (InstructGPT: 27.8)
    ptx_data: str = "toy"       # the documents: toy, or a file
    ptx_batch: Count = 32       # documents a step, the same for each of its updates
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
        if self.fused_bwd and (self.ptx_coef or self.critic_warmup):
            raise OptionError("--fused_bwd: an update is one backward pass; no --ptx_coef, no --critic_warmup")


# ---------------------------------------------------------------- the mathematics
# logp, ref_logp, old_logp, values, mask: (B, T-1). Index t is about response token t+1: its log-probability, and the
# value of the state before it. Everything outside the mask is ignored, whatever it holds.

def kl_estimate(logp, ref_logp, kind):
    """Estimators of KL(π || π_ref) from samples of π, per token (Schulman 2020, "Approximating KL divergence").

    k1 sits in the reward: as a loss its expected gradient is 0. k2 and k3 sit in the loss: as a reward, pushed through
    ∇ log π, only k1 gives the gradient of the KL. In the loss k2's gradient is the KL's, token by token; k3's is that
    of KL(π_ref || π).

    Where it leads, with responses of one token: k1 and k2 to the optimum π_ref exp(r / β) / Z, k3 to the solution of
    π = β π_ref / (β + E_π[r] - r). With responses of more tokens only k1 reaches the optimum: each token's penalty is
    taken off the advantage of all tokens before it. A KL in the loss is not, so a token is then chosen by the reward
    that follows alone, as if the KL of all later tokens cost nothing.
    """
    d = logp - ref_logp
    return {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[kind]


def token_rewards(score, kl, mask, beta):
    """score (B,) on the last response token, -β · kl on every one -> (B, T-1)."""
    last = mask.cumsum(1).eq(mask.sum(1, keepdim=True)) & mask.bool()
    return torch.where(mask.bool(), -beta * kl, 0.0) + torch.where(last, score[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (1506.02438, eq. 16) -> advantages, returns, both (B, T-1).

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γλ A_{t+1}, with V = A = 0 after the last token: a response cut off at
    max_new ends there like any other. returns = A + V, the critic's target.
    """
    rewards, values = (torch.where(mask.bool(), x, 0.0) for x in (rewards, values))
    adv, running, following = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        adv[:, t], following = running, values[:, t]
    return adv, (adv + values) * mask


def lagrangian(adv, cost_adv, lam):
    """(A_R - λ A_C) / (1 + λ): the advantage of E[r] - λ E[c], kept in the unit of one reward (Safe RLHF 2310.12773,
    eq. 11). With -β KL in the rewards and +β KL in the costs, β keeps its meaning whatever λ is."""
    return (adv - lam * cost_adv) / (1 + lam)


def next_lambda(lam, excess, rate):
    """ln λ += α λ J with J = E[c] - limit (Safe RLHF 2310.12773, sec. 3.3): λ stays positive, and grows while the cost
    is too high; ours by no more than a factor e a step."""
    return lam * math.exp(max(-1.0, min(1.0, rate * lam * excess)))


def masked_sum(x, mask):
    """Σ of the masked entries; the others do not matter, NaN included."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x, mask):
    """Their mean."""
    return masked_sum(x, mask) / mask.sum()


def masked_var(x, mask):
    """Unbiased, dividing by n - 1."""
    return masked_sum((x - masked_mean(x, mask)) ** 2, mask) / (mask.sum() - 1).clamp(min=1)


def whiten(x, mask):
    """Mean 0 and variance 1 over the masked entries, 0 elsewhere."""
    return torch.where(mask.bool(), (x - masked_mean(x, mask)) * (masked_var(x, mask) + 1e-8).rsqrt(), 0.0)


def policy_loss(logp, old_logp, adv, clip):
    """-min(ρ A, clip(ρ, 1-ε, 1+ε) A) per token (1707.06347, eq. 7) -> loss, ratio, where the clip decided."""
    ratio = (logp - old_logp).exp()
    plain, clipped = -ratio * adv, -ratio.clamp(1 - clip, 1 + clip) * adv
    return torch.maximum(plain, clipped), ratio, clipped > plain


def value_loss(values, old_values, returns, clip):
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²) per token; the larger, so that clipping can only hold back."""
    loss = (values - returns) ** 2
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return loss / 2


def adapt(beta, kl, target, n, horizon):
    """β after n more responses whose KL was `kl` (Ziegler et al. 1909.08593, eq. 8)."""
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


def normalize(score, state):
    """Scores (B,) by the mean and standard deviation of all scores so far, which `state` carries between steps."""
    state["seen"] += len(score)
    state["sum"] += float(score.double().sum())
    state["square"] += float((score.double() ** 2).sum())
    mean = state["sum"] / state["seen"]
    return (score - mean) / (max(0.0, state["square"] / state["seen"] - mean ** 2) + 1e-8) ** 0.5


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Roll out, score, turn into advantages, update, report: one step after another."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.init, tok, device, n_scores=0, maker="python sft.py")
    policy.prepare(cfg)
    ref, as_ref = reference(policy)
    reward = Reward(cfg.reward, tok, device, amp, cfg.micro_tokens)
    critic = load_model(cfg.critic or (reward.models + [cfg.init])[0], tok, device, n_scores=1)
    critic.prepare(cfg)
    modules = dict(model=policy, critic=critic)
    if cfg.cost:
        cost = Reward(cfg.cost, tok, device, amp, cfg.micro_tokens, cost=True)
        modules["cost_critic"] = load_model((cost.models + [cfg.init])[0], tok, device, n_scores=1)
        modules["cost_critic"].prepare(cfg)
    critics = list(modules.values())[1:]  # of the reward, and of the cost if there is one
    block = policy.config.block_size

    stream, held = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=cfg.eval_prompts,
                               prepare=fits(tok, block, cfg.max_new), skip_bad=cfg.skip_bad)
    reward.meet(stream.some(), cfg.data)
    if cfg.cost:
        cost.meet(stream.some(), cfg.data)
    if cfg.ptx_coef:
        documents, _ = open_stream(cfg.ptx_data, "text", cfg.seed, n_held=0, skip_bad=cfg.skip_bad,
                                   prepare=lambda doc: encode(doc, tok, block, "all"))
    shared = dict(total=cfg.steps, weight_decay=cfg.weight_decay, warmup=cfg.warmup, floor=cfg.lr_end,
                  clip=cfg.clip_grad)
    policy_opt = Optimizer(policy, cfg.lr, **shared)
    critic_opts = {f"{name}_opt": Optimizer(modules[name], cfg.critic_lr, **shared) for name in list(modules)[1:]}
    state = dict(beta=cfg.kl_coef, seen=0, sum=0.0, square=0.0, lam=cfg.cost_lambda)

    def sample(records, model=policy):
        with amp():
            return generate(model, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new,
                            temperature=cfg.temperature)

    for step in steps(run, cfg.steps, modules, dict(policy_opt=policy_opt) | critic_opts, state, cfg.save_every):
        # 1. Roll out.
        records = stream.batch(step, cfg.prompts)
        roll = sample(records)
        mask = roll.mask                                                                 # (B, T-1)

        # 2. Score: what the reward says of the response, and what every model says of every token.
        raw, parts = reward(records, roll)                                               # (B,)
        score = raw
        if cfg.minus_reference:  # what a prompt's answers have in common drops out
            with as_ref():
                score = raw - reward(records, sample(records, ref))[0]
        score = score + torch.where(roll.finished, cfg.reward_shift, -cfg.missing_end)
        if cfg.normalize_reward:
            score = normalize(score, state)
        if cfg.clip_reward:
            score = score.clamp(-cfg.clip_reward, cfg.clip_reward)
        with torch.no_grad(), amp():
            old_logp, entropy = per_token(roll, cfg.micro_tokens, lambda tokens, mask: token_logprobs(
                policy, tokens, mask, cfg.temperature, entropy=True))                    # (B, T-1)
            with as_ref():
                ref_logp = per_token(roll, cfg.micro_tokens, lambda tokens, mask: token_logprobs(
                    ref, tokens, mask, cfg.temperature))[0]                              # (B, T-1)
            values = [per_token(roll, cfg.micro_tokens, lambda tokens, mask: token_scores(c, tokens, mask))[0]
                      for c in critics]                                                  # (B, T-1) each

        # 3. Rewards and advantages.
        beta = state["beta"]
        kl = kl_estimate(old_logp, ref_logp, "k1") * mask
        rewards = token_rewards(score, kl, mask, beta if cfg.kl == "k1" else 0.0)        # (B, T-1)
        adv, target = gae(rewards, values[0], mask, cfg.gamma, cfg.lam)                  # (B, T-1)
        returns, constraint = [target], {}
        if cfg.cost:
            costs = cost(records, roll)[0]                                               # (B,)
            paid = token_rewards(costs, kl, mask, -beta if cfg.kl == "k1" else 0.0)
            cost_adv, target = gae(paid, values[1], mask, cfg.gamma, cfg.lam)
            adv, returns = lagrangian(adv, cost_adv, state["lam"]), returns + [target]
            constraint = {"cost": costs.mean(), "lambda": state["lam"]}
            if step >= cfg.critic_warmup:
                state["lam"] = next_lambda(state["lam"], float(costs.mean()) - cfg.cost_limit, cfg.lambda_lr)
        explained = 1 - float(masked_var(returns[0] - values[0], mask) / masked_var(returns[0], mask).clamp(min=1e-8))
        unit = float(masked_var(adv, mask)) ** 0.5 + 1e-8 if cfg.whiten else 1.0  # whitening changes the unit of reward
        if cfg.whiten:
            adv = whiten(adv, mask)

        # 4. Update. Every loss is a mean over the response tokens of its minibatch, however that is split up. Policy
        # and critic share no weights, so their losses need no relative weight and one backward serves both.
        tally, seen, grad_norm, lr = torch.zeros(5, device=device), 0.0, None, None
        for batch in [rows for _ in range(cfg.epochs) for rows in torch.randperm(len(records)).chunk(cfg.minibatches)]:
            count, sums = float(mask[batch].sum()), torch.zeros(5, device=device)
            for rows, tokens, m in slices(roll, cfg.micro_tokens, batch.tolist()):
                cut = rows, slice(0, m.shape[1])                                         # their corner of (B, T-1)
                with amp():
                    vs = [token_scores(c, tokens, m) for c in critics]                   # (b, t-1) each
                    logp, ent = token_logprobs(policy, tokens, m, cfg.temperature, entropy=True)
                p_loss, ratio, clipped = policy_loss(logp, old_logp[cut], adv[cut], cfg.clip)
                v_loss = sum(value_loss(v, old[cut], ret[cut], cfg.value_clip)
                             for v, old, ret in zip(vs, values, returns))
                loss = p_loss + v_loss - cfg.entropy_coef * ent
                if cfg.kl != "k1":  # exact at the first update of a step; later ones see slightly stale samples
                    loss = loss + beta / unit * kl_estimate(logp, ref_logp[cut], cfg.kl)
                (masked_sum(loss, m) / count).backward()
                drift = kl_estimate(old_logp[cut], logp, "k3")
                sums += torch.stack([masked_sum(x.detach(), m) for x in (p_loss, v_loss, clipped, drift, ratio)])
            if cfg.ptx_coef:
                with amp():
                    nll = pretraining_loss(policy, documents.batch(step, cfg.ptx_batch), tok)
                (cfg.ptx_coef * nll).backward()
            critic_norm = [opt.step(step)[0] for opt in critic_opts.values()][0]
            if step < cfg.critic_warmup:
                policy_opt.clear()
            else:
                grad_norm, lr = policy_opt.step(step)
            tally, seen = tally + sums, seen + count
            if cfg.stop_kl and sums[3] / count > cfg.stop_kl:
                break

        # 5. Report.
        kl_response = float(kl.sum(1).mean())
        if cfg.target_kl:
            state["beta"] = adapt(beta, kl_response, cfg.target_kl, len(records), cfg.kl_horizon)
        p_loss, v_loss, clip_frac, approx_kl, ratio = (tally / seen).tolist()
        gold, val = truth(records, roll.responses(tok), roll.finished), {}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            held_roll = sample(held)
            texts = held_roll.responses(tok)
            with amp():
                val_kl = log_ratios(held_roll, policy, (ref, as_ref), cfg.micro_tokens, cfg.temperature).sum(1)  # (B,)
            val = dict(val_kl=val_kl.mean(), val_reward=reward(held, held_roll)[0].mean(),
                       val_gold=mean(truth(held, texts, held_roll.finished)))
            run.samples(step + 1, held, texts)
        run.log(step, ("reward", "gold", "kl"), reward=raw.mean(), gold=mean(gold), **val,
                kl=kl_response, beta=beta, entropy=masked_mean(entropy, mask), response_length=mask.sum(1).mean(),
                finished=roll.finished.float().mean(), policy_loss=p_loss, value_loss=v_loss, clip_frac=clip_frac,
                approx_kl=approx_kl, ratio=ratio, explained_variance=explained, grad_norm=grad_norm,
                critic_grad_norm=critic_norm, lr=lr, sampler_gap=masked_mean((roll.logp - old_logp).abs(), mask),
                **constraint, **{f"reward/{name}": part.mean() for name, part in parts.items()})
    return run.finish(("reward", "gold", "kl", "response_length", "entropy"),
                      then=compare_words(cfg, cfg.data, cfg.families, cfg.reward))


def pretraining_loss(policy, rows, tok):
    """Mean -log π per token of pretraining documents (PPO-ptx, InstructGPT eq. 2) -> scalar."""
    tokens, mask = collate(rows, tok, policy.device)
    return -masked_mean(token_logprobs(policy, tokens, mask), mask)


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
