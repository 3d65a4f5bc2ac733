"""ORPO and the preference losses that need no reference: the likelihood itself is the reward.

    minimise  -log π(y_w|x) / |y_w|  -  λ log σ(log odds(y_w) - log odds(y_l)),    odds = p / (1 - p)

where p is the geometric mean of the response's token probabilities (Hong et al. 2403.07691, eq. 6-7). The first term
teaches what the chosen response says, the second to prefer it to the rejected one; together they make an aligned model
of a base model in one stage, with one model in memory. Its kin are the dict LOSSES: SimPO, CPO, SLiC-HF.

    python orpo.py                                          out/sft + out/pairs/pairs.jsonl -> out/orpo
    python orpo.py --init out/base --out out/o              straight from a base model
    python orpo.py --loss simpo --lr 5e-5 --out out/simpo

What comes out on the toy is in README.md, "What comes out".

Departures: ORPO's likelihood term counts the chosen response only; the authors' code counts the prompt too, as does
--prompt_weight 1. CPO's is the paper's and TRL's as it is, without the prompt. λ is 1, the paper's .1 is for models
that already write well. SLiC-HF's regulariser takes the chosen response for the paper's SFT target. Each loss's own
options are in Config under its name; SimPO wants a lower lr.
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

from data import (Count, Natural, NonNegative, OptionError, Positive, Run, Share, TrainConfig, collate,
                  column, compare_words, guard, item_batches, mean, open_preferences, parse, truth)
from model import Means, Optimizer, generate, load_model, setup, steps, token_logprobs


@dataclass
class Config(TrainConfig):
    """ORPO, SimPO, CPO and SLiC-HF."""
    out: str = "out/orpo"       # folder of the run; the same command continues an interrupted one
    # data
    init: str = "out/sft"       # policy to start from, or a base model
    data: str = "out/pairs/pairs.jsonl"  # preferences
    pairs: Literal["all", "ends"] = "all"  # of a ranking: all its pairs, or the best against the worst
    # the loss
    loss: Literal["orpo", "simpo", "cpo", "slic"] = "orpo"  # what is minimised
    orpo_lam: NonNegative = 1.0  # weight of the odds ratio beside the likelihood
    simpo_beta: Positive = 2.5  # scale of the mean log-prob
    simpo_gamma: NonNegative = 1.375  # margin asked for
    cpo_beta: Positive = 0.1    # scale of the summed log-prob
    slic_delta: NonNegative = 1.0  # margin of summed log-probs beyond which a pair is good enough
    slic_lam: NonNegative = 0.1  # weight of the chosen's summed log-prob
    prompt_weight: Share = 0.0  # weight of the prompt's tokens in the likelihood (the authors: ORPO 1, CPO 0)
    # optimisation
    epochs: Positive = 1.0      # passes over the records
    steps: Natural = 0          # updates; 0: what the epochs take
    batch: Count = 32           # pairs an update
    lr: Positive = 1e-4         # peak learning rate
    weight_decay: NonNegative = 0.0  # on matrices
    warmup: Natural = 10        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 100     # updates between evaluations on held-out records
    max_new: Count = 80         # longest sample of an evaluation, tokens

    def __post_init__(self):
        super().__post_init__()
        if self.data == "toy":
            raise OptionError("--data toy: preferences come from a file; python reward.py label makes one")


# ---------------------------------------------------------------- the mathematics
# x holds, for each pair (P,): lw and ll, the summed log-probs of chosen and rejected, n_w and n_l, their tokens, and
# nll, the likelihood term (over all pairs of a batch its mean is one over all their tokens). h: options.

logsig = F.logsigmoid  # log σ without underflow

LOSSES = {
    # likelihood, and the ratio of odds                                                      ORPO 2403.07691 eq. 6
    "orpo": lambda x, h: x.nll - h.orpo_lam * logsig(log_odds(x.lw / x.n_w) - log_odds(x.ll / x.n_l)),
    # mean log-probs, as the model generates, and a margin                                   SimPO 2405.14734 eq. 6
    "simpo": lambda x, h: -logsig(h.simpo_beta * (x.lw / x.n_w - x.ll / x.n_l) - h.simpo_gamma),
    # DPO with a uniform reference, and likelihood                                           CPO 2401.08417 eq. 5-6
    "cpo": lambda x, h: x.nll - logsig(h.cpo_beta * (x.lw - x.ll)),
    # a hinge on sequence likelihoods, and the target's likelihood as regulariser            SLiC-HF 2305.10425 eq. 1
    "slic": lambda x, h: F.relu(h.slic_delta - x.lw + x.ll) - h.slic_lam * x.lw,
}


def log_odds(s):
    """log(p / (1 - p)) of p = exp(s), s <= 0: s - log(1 - exp(s)), in float64 exact from s = -1e-12 to -500.

    log1p(-exp(s)) loses all digits near 0, log(-expm1(s)) near -∞ (Mächler 2012); the threshold is -log 2. The odds of
    a certain response, s = 0, are infinite; it counts as -1e-12, in fp32 as -1e-7.
    """
    s = s.clamp(max=-1e-12 if s.dtype == torch.float64 else -1e-7)
    near = s > -math.log(2)
    # Each branch sees only its own arguments, or the other's infinite gradient would leak as 0 * inf.
    return s - torch.where(near, torch.log(-torch.expm1(torch.where(near, s, -1.0))),
                           torch.log1p(-torch.exp(torch.where(near, -1.0, s))))


# ---------------------------------------------------------------- the steps
# The rows of pairs lie as chosen, rejected, chosen, rejected, ...
CHOSEN = slice(0, None, 2)
REJECTED = slice(1, None, 2)


def total_weight(items, cfg):
    """What the likelihood term is divided by: the tokens of the chosen rows, those of a prompt times prompt_weight."""
    total = 0
    for ids, target in column(items, "rows")[CHOSEN]:
        said = sum(target)
        total += said + cfg.prompt_weight * (len(ids) - 1 - said)  # nothing predicts the first token
    return total


def compare(policy, items, cfg):
    """How likely the policy finds chosen and rejected: x of the losses, of one micro-batch after the other."""
    total = total_weight(items, cfg)
    for part in item_batches(items, cfg.micro_tokens):
        tokens, mask = collate(column(part, "rows"), policy.tok, policy.device)          # (2P, T), (2P, T-1)
        real = tokens[:, 1:] != policy.tok.pad
        weights = mask + cfg.prompt_weight * (1 - mask) * real  # of the tokens in the likelihood, (2P, T-1)
        logp = token_logprobs(policy, tokens, weights)                                   # (2P, T-1)
        s = (logp * mask).sum(1)                                                         # (2P,) of responses
        n = mask.sum(1)                                                                  # (2P,)
        nll = -(logp[CHOSEN] * weights[CHOSEN]).sum(1)                                   # (P,)
        yield SimpleNamespace(lw=s[CHOSEN], ll=s[REJECTED], n_w=n[CHOSEN], n_l=n[REJECTED],
                              nll=nll * len(items) / total)


def batch_loss(x, items, cfg):
    """A micro-batch's share of the loss of the batch."""
    return LOSSES[cfg.loss](x, cfg).sum() / len(items)


@torch.no_grad()
def report(xs, items, cfg):
    """Loss and metrics of a batch, from the x of its micro-batches."""
    means = Means()
    for x in xs:
        chosen = x.lw / x.n_w  # (P,), what ORPO and SimPO call the reward
        rejected = x.ll / x.n_l
        right = 0.5 + 0.5 * (chosen - rejected).sign()
        means.add(torch.ones_like(right), **{
            "nll": x.nll, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracy": right,
            "logps/chosen": x.lw, "logps/rejected": x.ll})
    metrics = means.result()
    metrics["rewards/margin"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["loss"] = sum(batch_loss(x, items, cfg) for x in xs)
    return metrics


@torch.no_grad()
def evaluate(policy, held, prompts, run, step, cfg):
    """Held-out pairs, by the same loss; held-out prompts, answered, with their true score where it is known."""
    xs = list(compare(policy, held, cfg))
    metrics = {f"val_{name}": value for name, value in report(xs, held, cfg).items() if "logps" not in name}
    if prompts:
        torch.manual_seed(cfg.seed)
        roll = generate(policy, [policy.tok.prompt(record["prompt"]) for record in prompts], cfg.max_new)
        texts = roll.responses()
        run.samples(step + 1, prompts, texts)
        metrics |= dict(response_length=roll.mask.sum(1).mean(), gold=mean(truth(prompts, texts, roll.finished)))
    return metrics


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Take pairs, read them, set chosen against rejected, step, report: one step after another."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    policy = load_model(cfg.init, setup(cfg, run.tok), n_scores=0, maker="python sft.py").prepare(cfg)
    pairs, held, prompts = open_preferences(cfg, policy.tok, policy.config.block_size)
    total = pairs.updates(cfg)
    optimizer = Optimizer(policy, cfg.lr, total, weight_decay=cfg.weight_decay, warmup=cfg.warmup, clip=cfg.clip_grad)

    for step in steps(run, total, dict(model=policy), dict(model=optimizer), {}, cfg.save_every):
        # 1. Take a batch of pairs.
        items = pairs.batch(step, cfg.batch)

        # 2. Read chosen and rejected: how likely the policy finds them.
        # 3. Set them against each other; the gradients of the micro-batches add up.
        xs = []
        for x in compare(policy, items, cfg):
            batch_loss(x, items, cfg).backward()
            xs.append(x)

        # 4. Step towards the chosen ones.
        metrics = report(xs, items, cfg) | optimizer.step(step)

        # 5. Report.
        if run.evaluates(step):
            metrics |= evaluate(policy, held, prompts, run, step, cfg)
        run.log(step, ("loss", "rewards/margin", "gold"), **metrics)
    return run.finish(("loss", "nll", "rewards/accuracy", "rewards/margin", "gold"),
                      then=compare_words(cfg, "toy" if cfg.tokenizer == "toy" else cfg.data))


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
