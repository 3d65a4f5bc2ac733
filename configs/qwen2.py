"""The Online Merging Optimizer: DPO that mixes what fine-tuning had changed into each of its updates.

    θ_{t+1} = θ_t + (1 - α) keep(Δ_t) + α keep(τ),    τ = θ_0 - θ_base

Published: Lu et al. 2405.17931. What fine-tuning taught, a preference loss unlearns in part (the alignment tax).
Merging models afterwards brings some of it back; this optimizer merges at every step. Δ is AdamW's step, θ_0 the model
that the run begins with, θ_base the model before fine-tuning. Both changes are thinned out to a share before they are
added: OnDARE keeps entries at random, OnTIES the largest ones, and where the two disagree in sign only the larger counts
(eq. 7). Qwen2 (Yang et al. 2407.10671) trained its online stage with it.

What differs: the authors' code uses dropout for OnDARE, so what it keeps is 1 / keep times as large, and it draws the
share of τ once, before training. Here nothing is rescaled, and the share is drawn anew for each update.

    python configs/qwen2.py --init out/qwen2/offline --online --data toy --reward out/qwen2/reward --k 4 --steps 100

Everything else is dpo.py, with its options; configs/qwen2.sh is the whole recipe. In memory there are two copies of the
weights more, τ and, during an update, the weights before it.
"""
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where dpo.py is

import dpo
import model
from data import OptionError, Share, UserError, guard, parse
from model import load_model


@dataclass
class Config(dpo.Config):
    """DPO with the Online Merging Optimizer."""
    out: str = "out/qwen2/online_merging"  # folder of the run; the same command continues an interrupted one
    # the Online Merging Optimizer
    merge_base: str = "out/base"  # the model before fine-tuning: what that changed is mixed into each update
    merge: Literal["ondare", "onties"] = "ondare"  # at random, or the largest changes where their signs agree
    merge_alpha: Share = 1e-4   # α, the weight of that change
    merge_keep: Share = 0.5     # share of the parameters that each update touches

    def __post_init__(self):
        super().__post_init__()
        if not self.merge_base:
            raise OptionError("--merge_base: name the model before fine-tuning")
        if self.lora_r or self.fused_bwd:
            raise OptionError("--merge_base mixes into whole updates of all weights: no --lora_r, no --fused_bwd")


@torch.no_grad()
def merged_update(old, new, tau, kind, alpha, keep):
    """The parameter to go to, when AdamW would go from old to new; tau: its task vector τ."""
    delta = new - old
    if kind == "ondare":
        mine, theirs = (torch.rand_like(x) < keep for x in (delta, tau))
    else:
        mine, theirs = (largest(x, keep) for x in (delta, tau))
        positive = delta * mine + tau * theirs >= 0  # the sign that the larger of the two has
        mine, theirs = mine & ((delta >= 0) == positive), theirs & ((tau >= 0) == positive)
    return torch.where(mine, new - alpha * delta, old) + alpha * torch.where(theirs, tau, 0.0)


def largest(x, share):
    """Where the largest magnitudes of a tensor are, so many that they are this share of it, and at least one."""
    count = max(1, int(share * x.numel()))
    return x.abs() >= x.abs().flatten().kthvalue(x.numel() - count + 1).values


class Optimizer(model.Optimizer):
    """That of dpo.py, and after each of its steps the mixing; the schedule of the learning rate does not scale α."""

    def __init__(self, cfg, policy, *args, **options):
        super().__init__(policy, *args, **options)
        self.cfg = cfg
        base = load_model(cfg.merge_base, policy, n_scores=0, maker="python sft.py --loss_on all --init new")
        if base.config != policy.config:
            raise UserError(f"--merge_base {cfg.merge_base}: of another architecture than {cfg.init}")
        self.tau = [p.detach() - q.detach() for p, q in zip(policy.parameters(), base.parameters())]

    @torch.no_grad()
    def step(self, step):
        cfg, before = self.cfg, [p.clone() for p in self.params]
        metrics = super().step(step)
        for p, old, tau in zip(self.params, before, self.tau):
            p.copy_(merged_update(old, p, tau, cfg.merge, cfg.merge_alpha, cfg.merge_keep))
        return metrics


def train(cfg):
    """DPO, by this optimizer."""
    return dpo.train(cfg, functools.partial(Optimizer, cfg))


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
