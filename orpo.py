"""ORPO and the preference losses that need no reference: the likelihood itself is the reward.

    minimise  -log π(y_w|x) / |y_w|  -  λ log σ(log odds(y_w) - log odds(y_l)),    odds = p / (1 - p)

where p is the geometric mean of the response's token probabilities (Hong et al. 2403.07691, eq. 6-7). The first term
teaches what the chosen response says, the second to prefer it to the rejected one; together they make an aligned model
of a base model in one stage, with one model in memory. Its kin are the dict LOSSES: SimPO, CPO, SLiC-HF.

    python orpo.py                                          out/sft + out/pairs/pairs.jsonl -> out/orpo
    python orpo.py --init out/base --out out/o              straight from a base model
    python orpo.py --loss simpo --lr 5e-5 --out out/simpo

On the toy, 2 CPU cores with AMX, bf16, 8,000 pairs, from SFT: 23 s; true reward +1.0 ± .1, win rate .77 ± .01 (three
seeds).

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

from data import (Count, Natural, NonNegative, OptionError, Positive, Run, Share, Tokenizer, TrainConfig, collate,
                  compare_words, fits, guard, item_batches, mean, open_stream, parse, preference_items, truth)
from model import Optimizer, generate, load_model, setup, steps, token_logprobs


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
    lr: Positive = 5e-4         # peak learning rate
    weight_decay: NonNegative = 0.0  # on matrices
    warmup: Natural = 10        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 50      # updates between evaluations on held-out records
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


# ---------------------------------------------------------------- the loop

def train(cfg):
    """One forward over chosen and rejected, one loss, one step."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.init, tok, device, n_scores=0, maker="python sft.py")
    policy.prepare(cfg)
    block = policy.config.block_size
    stream, held = open_stream(cfg.data, "preference", cfg.seed, n_held=256,
                               prepare=lambda record: preference_items(record, tok, block, which=cfg.pairs),
                               context=(tok, block), skip_bad=cfg.skip_bad)
    fit = fits(tok, block, cfg.max_new)
    prompts = list({str(p["prompt"]): p for item in held for p in fit(item["record"])}.values())[:64]
    total = cfg.steps or math.ceil(cfg.epochs * len(stream.items) / cfg.batch)
    optimizer = Optimizer(policy, cfg.lr, total, weight_decay=cfg.weight_decay, warmup=cfg.warmup, clip=cfg.clip_grad)

    def one_step(items, backward):
        """Loss and metrics of a batch of pairs; its gradient is added up on the way if backward."""
        loss, sums = 0.0, torch.zeros(6, device=device)
        weight = lambda ids, target: sum(target) + cfg.prompt_weight * (len(ids) - 1 - sum(target))
        n_nll = sum(weight(*item["rows"][0]) for item in items)
        for part in item_batches(items, cfg.micro_tokens):
            tokens, mask = collate([row for item in part for row in item["rows"]], tok, device)  # (2P, T), ...
            real = tokens[:, 1:] != tok.pad
            with amp():
                logp = token_logprobs(policy, tokens, real if cfg.prompt_weight else mask)  # (2P, T-1)
            s, n = (logp * mask).sum(1), mask.sum(1)                                     # (2P,)
            weights = (mask + cfg.prompt_weight * (1 - mask) * real)[::2]
            x = SimpleNamespace(lw=s[::2], ll=s[1::2], n_w=n[::2], n_l=n[1::2],
                                nll=-(logp[::2] * weights).sum(1) * len(items) / n_nll)  # (P,) each
            part_loss = LOSSES[cfg.loss](x, cfg).sum() / len(items)
            if backward:
                part_loss.backward()
            loss += part_loss.detach()
            chosen, rejected = x.lw.detach() / x.n_w, x.ll.detach() / x.n_l  # what ORPO and SimPO call the reward
            right = 0.5 + 0.5 * (chosen - rejected).sign()
            sums += torch.stack([v.detach().sum() for v in (chosen, rejected, right, x.lw, x.ll, x.nll)])
        chosen, rejected, right, lw, ll, nll = (sums / len(items)).tolist()
        return {"loss": loss, "nll": nll, "rewards/chosen": chosen, "rewards/rejected": rejected,
                "rewards/margin": chosen - rejected, "rewards/accuracy": right, "logps/chosen": lw,
                "logps/rejected": ll}

    def evaluate(step):
        """Held-out pairs, and samples to held-out prompts with, in the toy world, their true score."""
        torch.manual_seed(cfg.seed)
        with torch.no_grad(), amp():
            out = {f"val_{k}": v for k, v in one_step(held, False).items() if "logps" not in k}
            if prompts:
                roll = generate(policy, [tok.prompt(r["prompt"]) for r in prompts], tok, cfg.max_new)
                texts = roll.responses(tok)
                out |= dict(response_length=float(roll.mask.sum(1).mean()),
                            gold=mean(truth(prompts, texts, roll.finished)))
                run.samples(step + 1, prompts, texts)
        return out

    for step in steps(run, total, dict(model=policy), dict(optimizer=optimizer), {}, cfg.save_every):
        metrics = one_step(stream.batch(step, cfg.batch), True)
        grad_norm, lr = optimizer.step(step)
        val = evaluate(step) if (step + 1) % cfg.eval_every == 0 or step + 1 == total else {}
        run.log(step, ("loss", "rewards/margin", "gold"), **metrics, **val, grad_norm=grad_norm, lr=lr)
    return run.finish(("loss", "nll", "rewards/accuracy", "rewards/margin", "gold"),
                      then=compare_words(cfg, "toy" if cfg.tokenizer == "toy" else cfg.data))


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
