"""Rule-based rewards: the weights of rules, fitted to rankings, beside a reward model whose own weight stays.

    minimise  max(0, m + R(x, y_l) - R(x, y_w)),    R = base + Σ w_i φ_i

over pairs of answers in which y_w ranks above y_l. A rule φ_i is a verifier, or what a judge thinks of a proposition
about the answer. Published: Mu et al. 2411.01111, sec. 4.3 and eq. 3.

    python configs/rule_based_rewards.py --base out/reward --rules "refuses + out/judge@A"     -> out/rules/reward.txt

The fitted sum stands in reward.txt: --reward out/rules means that sum, and you can edit it without training anything.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import (Count, OptionError, Positive, Run, RunConfig, Sum, guard, open_stream, parse, write_text)
from model import Reward, setup
from reward import counts, given_responses, ranked_pairs, repeat


@dataclass
class Config(RunConfig):
    """Fit the weights of rules to rankings, beside a reward model (rule-based rewards, 2411.01111, sec. 4.3)."""
    out: str = "out/rules"      # folder of the run; as a --reward it stands for the sum in its reward.txt
    data: str = "out/pairs/pairs.jsonl"  # rankings
    base: Sum = ""              # the part of the reward whose weight stays
    rules: Sum = ""             # the sum whose weights are fitted, as refuses + out/judge@A + out/judge@C
    margin: Positive = 1.0      # by which the better must lead
    steps: Count = 1000         # updates
    lr: Positive = 1e-2         # of AdamW

    def __post_init__(self):
        super().__post_init__()
        if not self.rules:
            raise OptionError("--rules: the terms to fit, as refuses + out/judge@A")


def hinge(better, worse, margin):
    """max(0, m + R_worse - R_better) per pair (rule-based rewards 2411.01111, eq. 3)."""
    return F.relu(margin + worse - better)


def leads(records, base, rules, like):
    """By how much the better of every pair leads: in base (P,), in each rule (P, F). And weights 1 / C(K, 2), (P,)."""
    sizes = counts(records, "responses")
    roll, repeated = given_responses(records, rules, like), repeat(records, sizes)
    win, lose, weight = ranked_pairs(sizes)
    parts = rules(repeated, roll)[1]
    phi = torch.stack([parts[term.label] for term in rules.terms], 1)                    # (R, F)
    fixed = torch.zeros(len(phi), device=like.device)                                    # (R,)
    if base:
        fixed = base(repeated, roll)[0]
    return fixed[win] - fixed[lose], phi[win] - phi[lose], weight.to(like.device)


def as_sum(terms, weights, base):
    """The fitted sum as a --reward: base + w_1*φ_1 + w_2*φ_2."""
    words = [base] if base else []
    for term, weight in zip(terms, weights):
        words.append(term.label if weight == 1 else f"{weight:.4f}*{term.label}")
    return " + ".join(words)


def fit(cfg):
    """Weights of rules by a hinge on the order of rankings; writes reward.txt, and says how many pairs it orders."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    base = Reward(cfg.base, like, cfg.micro_tokens) if cfg.base else None
    rules = Reward(cfg.rules, like, cfg.micro_tokens)
    stream, held = open_stream(cfg.data, "preference", cfg.seed, n_held=200, skip_bad=cfg.skip_bad)
    for reward in filter(None, (base, rules)):
        reward.check(stream.items, cfg.data)

    # 1. What base and rules say of every pair; it does not change.
    gap, phi, weight = leads(stream.items, base, rules, like)
    held_gap, held_phi, _ = leads(held, base, rules, like)

    # 2. Weights by which the better ones lead. Adam moves every weight by about lr a step, also one whose gradient is
    # next to nothing, as of a rule that differs by .001: that would go to -10. With eps it stays.
    w = torch.zeros(phi.shape[1], device=like.device, requires_grad=True)                # (F,)
    optimizer = torch.optim.AdamW([w], lr=cfg.lr, weight_decay=0.0, eps=0.01)
    for step in run.progress(0, cfg.steps):
        optimizer.zero_grad()
        lead = gap + phi @ w                                                             # (P,)
        loss = (weight * hinge(lead, 0.0, cfg.margin)).sum() / weight.sum()
        loss.backward()
        optimizer.step()
        right = (lead > 0).float().mean()
        held_right = (held_gap + held_phi @ w.detach() > 0).float().mean()
        run.log(step, ("loss", "accuracy"), loss=loss.detach(), accuracy=right, val_accuracy=held_right)

    # 3. Their sum, which is a reward.
    spec = as_sum(rules.terms, w.tolist(), cfg.base)
    write_text(run.folder / "reward.txt", spec + "\n")
    print(f"{run.folder}/reward.txt: {spec}\n{held_right:.1%} of {len(held_gap)} held-out pairs in order")
    return run.finish(("loss", "accuracy", "val_accuracy"), then=["ppo.py", "--reward", cfg.out, "--out", f"{cfg.out}_ppo"])


if __name__ == "__main__":
    guard(lambda: fit(parse(Config)))
