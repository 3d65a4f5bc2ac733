"""Where a score or a preference comes from: label responses, train a reward model, compare policies, watch it hacked.

    minimise  -log σ(r(x, y_w) - r(x, y_l) - m)      over pairs in which y_w was preferred

A reward model is the SFT model with one number per token instead of logits, read at the last token of the response.
Under Bradley-Terry, P(y_w ≻ y_l) = σ(r_w - r_l), the loss is the negative log-likelihood of the labels (Christiano
et al. 1706.03741; Stiennon et al. 2009.01325). Of K ranked responses all C(K, 2) pairs are used, in one batch element
and weighted 1 / C(K, 2) (InstructGPT 2203.02155, eq. 1). --loss chooses another likelihood of a pair (PAIR_LOSSES), or
of a whole ranking, of ratings, of steps. Options: a margin m from ratings (Llama 2, 2307.09288), a pull of r_w + r_l
towards 0 (2312.09244), a wall at ±5 (COOL).

    python reward.py label                        sample pairs from out/sft, label them -> out/pairs/pairs.jsonl
    python reward.py label --judge out/judge      the same, with an AI's labels (RLAIF)
    python reward.py revise                       answers criticised and revised by principles (Constitutional AI)
    python reward.py train                        out/sft + pairs -> out/reward
    python reward.py fit --rules "..."            weights of rules beside a reward model (rule-based rewards)
    python reward.py curate                       prompts for RL: how hard each is, without those that are guessed
    python reward.py accuracy out/reward          how often it orders the pairs of a file as the labels do
    python reward.py compare out/sft out/ppo      gold reward, win rate, KL, length on held-out prompts
    python reward.py overoptimize out/ppo         gold and proxy against √KL, best-of-n beside it

On 2 CPU cores with AMX, bf16: label 16 s, train 40 s, compare 3 s a checkpoint. On pairs of subjects that were held out
the reward model meets .67 to .69 of the noisy labels, .74 to .77 of the truth (two runs, an EPYC without AMX, bf16).

On the toy world the labels are Bradley-Terry draws from the gold reward with a tenth flipped, so the learned reward
is an imperfect proxy by construction, and both can be watched.
"""
import contextlib
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from data import (EXEMPLAR, PRINCIPLES, REASON, RULE, VERDICT, Count, Families, Natural, NonNegative, OptionError, Options,
                  Positive, Range, Run, RunConfig, Share, Sum, Temperature, Tokenizer, TrainConfig, UserError,
                  after_thinking, checked_steps, collate, cut_prompt, encode, family_list, files, gold, guard,
                  item_batches, judge_prompt, mean, micro_batches, next_out, open_stream, pairs, parse, read_records,
                  read_rows, safe_metrics, sparkline, toy_record, view_prompt, write_text)
from model import (Optimizer, Reward, Rollout, choice_logprobs, full, generate, load_model, log_ratios,
                   response_scores, seed_step, setup, steps, token_logprobs)


SELECT = Literal["rank", "ends", "best", "rso", "correct", "shortest", "short_pairs", "quantile", "ratings", "steps"]


@dataclass
class Train(TrainConfig):
    """Train a reward model on preferences."""
    out: str = "out/reward"     # folder of the run; the same command continues an interrupted one
    init: str = "out/sft"       # checkpoint to start from; the score head starts at 0
    data: str = "out/pairs/pairs.jsonl"  # preferences: pairs or rankings
    pairs: Literal["all", "split"] = "all"  # all pairs of a ranking in one batch element, or each on its own
    # the loss
    loss: Literal["bt", "focal", "soft", "cost", "plackett_luce", "ratings", "steps"] = "bt"  # see the mathematics
    margin: bool = False        # bt: use the margin of records that have one (Llama 2)
    gamma: NonNegative = 2.0    # focal: how little pairs count that are ordered right
    heads: Count = 1            # scores of the model; ratings: one for each attribute, the first is the reward
    center: NonNegative = 0.0   # weight of mean (r_w + r_l)²; .01 keeps scores near 0
    barrier: NonNegative = 0.0  # weight of a wall that keeps scores within ±5 (COOL: .02)
    # optimisation
    epochs: Positive = 2.0      # passes over the records
    steps: Natural = 0          # updates; 0: what the epochs take
    batch: Count = 32           # records an update
    lr: Positive = 1e-3         # peak learning rate of AdamW
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, AdamW for the rest
    muon_lr: Positive = 0.003   # peak learning rate of Muon
    weight_decay: NonNegative = 0.1  # on matrices
    warmup: Natural = 10        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 50      # updates between evaluations on held-out records

    def __post_init__(self):
        super().__post_init__()
        if self.data == "toy":
            raise OptionError("--data toy: preferences come from a file; python reward.py label makes one")
        for option, used, losses in (("margin", self.margin, ["bt"]), ("heads", self.heads > 1, ["ratings"]),
                                     ("center", self.center, PAIR_LOSSES), ("barrier", self.barrier, PAIR_LOSSES)):
            if used and self.loss not in losses:
                raise OptionError(f"--{option} goes with --loss {', '.join(losses)}, not {self.loss}")


@dataclass
class Label(RunConfig):
    """Sample responses from a policy and rank them; one JSON line a prompt, best response first."""
    out: str = "out/pairs"      # folder of the run; the records are in its pairs.jsonl
    policy: str = "out/sft"     # checkpoint that answers; none: the responses are in the data
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "write"  # of the toy world, comma-separated
    n: Count = 8000             # prompts
    skip: Natural = 0           # prompts to pass over first: a later round sees others
    k: Natural = 2              # responses to each
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 80         # longest response, tokens; unfinished ones are not used
    batch: Count = 128          # prompts at a time
    system: str = ""            # system message put in front of every prompt
    # the labels
    by: Sum = "gold"            # what judges: reward models and verifiers, as 0.5*out/reward + exact; gold: "people"
    scale: NonNegative = 3.0    # labels are Bradley-Terry draws at scale * score; 0: the higher score always wins
    flip: Share = 0.1           # share of rankings turned upside down
    # AI labels (RLAIF): a language model, asked which of two is better, orders them; --by only checks it, or is none
    judge: str = ""             # the model, as out/judge; none: --by decides
    preamble: str = RULE        # what the question begins with; principles: one of data.PRINCIPLES each time
    exemplar: bool = False      # show it a question with its answer first
    rationale: bool = False     # let it say why before the verdict
    clamp: Annotated[float, Range(0.5, 1)] = 1.0  # most certain soft label (Constitutional AI: .6 after a rationale)
    # a superficial pattern, for experiments
    mark: str = ""              # text put in front of one response of each pair
    mark_better: Share = 1.0    # how often that is the better one
    # what is kept
    select: SELECT = "rank"     # rank, ends, best, rso, correct, shortest, short_pairs, quantile, ...: see kept()
    attributes: str = "gold"    # ratings: what rates each response, with commas between
    balance_length: bool = False  # as many pairs whose better response is longer as shorter, by any difference
    min_gap: NonNegative = 0.0  # rankings: least difference between the scores of first and last
    rso_beta: Positive = 0.5    # rso: a response is accepted with probability exp((score - best score) / this)
    quantiles: Count = 5        # quantile: parts of equal size, by score; their number becomes the system message

    def __post_init__(self):
        super().__post_init__()
        if self.k < 2 and self.policy:
            raise OptionError(f"--k {self.k}: a preference needs at least 2 responses")
        if not self.policy and self.data == "toy":
            raise OptionError("--policy: none, so --data must name files with responses")
        if self.judge and (self.select not in ("rank", "ends") or self.min_gap):
            raise OptionError(f"--judge: it orders responses; no --select {self.select}, no --min_gap")
        if not self.judge and (self.rationale or self.exemplar or not self.by):
            raise OptionError("--judge: none, so --by must decide, and there is no --rationale and no --exemplar")


@dataclass
class Revise(RunConfig):
    """Answers, criticised and revised by a constitution (2212.08073, sec. 3); one JSON line a prompt, for sft.py."""
    out: str = "out/revisions"  # folder of the run; the demonstrations are in its revisions.jsonl
    policy: str = "out/sft"     # checkpoint that answers
    critic: str = "out/judge"   # language model that criticises and revises
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "safe"  # of the toy world, comma-separated
    n: Count = 2000             # prompts
    rounds: Count = 1           # critiques and revisions of each answer, every time by another principle
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 80         # longest answer, tokens
    batch: Count = 128          # prompts at a time


@dataclass
class Fit(RunConfig):
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


@dataclass
class Accuracy(Options):
    """How often do reward models, judges and verifiers order the pairs of files as the files do?"""
    data: str = "out/pairs/pairs.jsonl"  # preferences; of several files, with commas between, a table each
    n: Count = 1000             # records of each file
    seed: Natural = 0           # of nothing here; recipes give it to every stage
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # of the matmuls
    threads: Natural = 0        # CPU threads; 0 leaves it to PyTorch
    micro_tokens: Count = 8192  # padded tokens a forward pass may hold
    skip_bad: bool = False      # leave out the rows of a file that cannot be understood, and count them


@dataclass
class Overoptimize(RunConfig):
    """Gold and proxy reward against d = √KL, for best-of-n and for RL runs (2210.10760)."""
    out: str = "out/overoptimize"  # folder of the run: curves.json, and curves.png where matplotlib is installed
    policy: str = "out/sft"     # best-of-n samples from it
    proxy: Sum = "out/reward"   # what best-of-n and the runs optimise
    judge: Sum = "gold"         # what counts
    families: Families = "write"  # of the toy world, comma-separated
    data: str = "toy"           # prompts: the toy world's test split, or a file
    prompts: Count = 200        # of them
    n: Count = 64               # samples of each: best of 1, 2, 4, ..., n
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 80         # longest response, tokens


@dataclass
class Curate(RunConfig):
    """Choose prompts for RL: how hard is each, and can it be guessed? (Kimi k1.5, 2501.12599, sec. 2.1)"""
    out: str = "out/prompts"    # folder of the run; the records are in its prompts.jsonl
    policy: str = "out/sft"     # checkpoint that answers
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "arith"  # of the toy world, comma-separated
    n: Count = 1000             # prompts
    by: Sum = "exact"           # what judges; more than .5 is right
    k: Count = 10               # answers to each; difficulty = 1 - the share that is right
    guesses: Natural = 8        # answers without thinking: one that is right, and the prompt is left out; 0: none
    begin: str = "The answer"    # how an answer without thinking begins
    cap: Natural = 0            # most prompts of one family (or "domain"); 0: no limit
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 80         # longest answer, tokens
    batch: Count = 64           # prompts at a time


@dataclass
class Compare(Options):
    """Compare policies on held-out prompts; the first is the baseline."""
    data: str = "toy"           # prompts: the toy world's test split, or a file
    families: Families = ""     # of the toy world, comma-separated; none for all
    on: Families = ""           # families behind win rate, KL and length; none for write, if it is among them, else all
    n: Count = 400              # prompts of each family
    judge: Sum = "gold"         # decides who wins: reward models and verifiers, as 0.5*out/reward + exact
    proxy: Sum = ""             # another such sum, shown beside it
    temperature: NonNegative = 1.0  # of sampling; 0 is greedy
    max_new: Count = 80         # longest response, tokens
    begin: str = ""             # what every answer is made to begin with, as "<think>"
    system: str = ""            # system message put in front of every prompt
    samples: Count = 1          # answers to each prompt of --on; more give pass@k, maj@k and the best of k by --proxy
    show: Natural = 2           # prompts whose answers are printed
    save: str = ""              # a JSON file for the table
    seed: Natural = 0           # of the sampling
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # of the matmuls
    threads: Natural = 0        # CPU threads; 0 leaves it to PyTorch
    micro_tokens: Count = 8192  # padded tokens a forward pass may hold
    skip_bad: bool = False      # leave out the rows of a file that cannot be understood, and count them


# ---------------------------------------------------------------- the mathematics

def bradley_terry(r_w, r_l, margin=0.0):
    """-log P(w ≻ l) = -log σ(r_w - r_l - m) per pair; scores (P,) -> (P,)."""
    return -F.logsigmoid(r_w - r_l - margin)


# Losses of a pair: x.r_w, x.r_l scores of preferred and other (P,), x.margin, x.prob the label's P(w ≻ l), x.s_w, x.s_l
# +1 where a response is harmful and -1 where it is not; h the options.
PAIR_LOSSES = {
    # the label's likelihood                                                     Bradley-Terry; margin: 2307.09288 eq. 2
    "bt": lambda x, h: bradley_terry(x.r_w, x.r_l, x.margin),
    # pairs that are ordered right with certainty hardly count                   COOL, InternLM2 2403.17297 sec. 4.2.1
    "focal": lambda x, h: focal(x.r_w, x.r_l, h.gamma),
    # an AI's probability for a label                                            RLAIF 2309.00267 sec. 2.1
    "soft": lambda x, h: x.prob * bradley_terry(x.r_w, x.r_l) + (1 - x.prob) * bradley_terry(x.r_l, x.r_w),
    # w is the more harmful one, and 0 divides harmful from harmless             Safe RLHF 2310.12773 eq. 6
    "cost": lambda x, h: bradley_terry(x.r_w, x.r_l) - F.logsigmoid(x.s_w * x.r_w) - F.logsigmoid(x.s_l * x.r_l),
}


def focal(r_w, r_l, gamma):
    """-(1 - 2 max(0, p - ½))^γ log p with p = σ(r_w - r_l), per pair (InternLM2 2403.17297, eq. 1)."""
    wrong = (2 * torch.sigmoid(r_l - r_w)).clamp(max=1)  # = 1 - 2 max(0, p - ½), but never 0
    return wrong ** gamma * bradley_terry(r_w, r_l)


def log_barrier(r, bound=5.0):
    """-log(bound - r) - log(bound + r): a wall on both sides (2403.17297, eq. 2). r is clamped just inside it, where
    the gradient ends: a score beyond the wall is not pulled back."""
    r = r.clamp(-bound + 1e-3, bound - 1e-3)
    return -(bound - r).log() - (bound + r).log()


def plackett_luce(r):
    """-log P of a ranking, scores (K,) best first: each is chosen among those left (Zhu et al. 2301.11270, K-wise)."""
    return (r.flip(0).logcumsumexp(0).flip(0) - r).sum()


def hinge(better, worse, margin):
    """max(0, m + R_worse - R_better) per pair (rule-based rewards 2411.01111, eq. 3)."""
    return F.relu(margin + worse - better)


def least_squares(columns, y):
    """Coefficients of y ≈ Σ c_k x_k without intercept, and R²; all (N,)."""
    x, y = torch.tensor(columns, dtype=torch.float64).T, torch.tensor(y, dtype=torch.float64)
    c = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return c.tolist(), float(1 - ((y - x @ c) ** 2).sum() / ((y - y.mean()) ** 2).sum().clamp(min=1e-12))


def fit_best_of_n(d, gain):
    """gain ≈ d (α - β d), d = √KL (Gao et al. 2210.10760, sec. 3.1) -> α, β, R², the peak's d."""
    (alpha, beta), r2 = least_squares([list(d), [-x * x for x in d]], gain)
    return dict(alpha=alpha, beta=beta, r2=r2, peak=alpha / (2 * beta) if alpha > 0 and beta > 0 else None)


def fit_rl(d, gain):
    """gain ≈ d (α - β log d) (the same) -> α, β, R², the peak's d."""
    (alpha, beta), r2 = least_squares([list(d), [-x * math.log(x) for x in d]], gain)
    return dict(alpha=alpha, beta=beta, r2=r2, peak=math.exp(min(alpha / beta - 1, 50)) if beta > 0 else None)


def debiased(one, two):
    """P(first ≻ second) from a judge's P("1") when the first came first, and when it came second: a bias for a place
    cancels (RLAIF 2309.00267, sec. 2.1). label(A, B) + label(B, A) is 1."""
    return (one + 1 - two) / 2


def ranked_pairs(sizes):
    """All pairs of rankings laid end to end, best first: winner index, loser index, weight 1 / C(K, 2) of each."""
    out, start = [], 0
    for k in sizes:
        out += [(start + i, start + j, 2 / (k * (k - 1))) for i, j in itertools.combinations(range(k), 2)]
        start += k
    win, lose, weight = zip(*out)
    return list(win), list(lose), torch.tensor(weight)


def calibration_error(margins, bins=10):
    """Expected calibration error of P = σ(|margin|): mean over bins of |confidence - share right|, by their size.

    margins (P,) are r_w - r_l. 0 is perfect; a model of 90% confidence that is right 70% of the time scores .2.
    """
    confidence, right = torch.sigmoid(margins.abs()), (margins > 0).float()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    parts = [(confidence[place == b], right[place == b]) for b in range(bins)]
    return sum(float((c.mean() - r.mean()).abs()) * len(c) for c, r in parts if len(c)) / len(margins)


def wilson(wins, n, z=1.96):
    """95% interval of a proportion (Wilson 1927); unlike wins/n ± 1.96 s, right also near 0 and 1."""
    p, z2 = wins / n, z * z / n
    middle, half = (p + z2 / 2) / (1 + z2), z / (1 + z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return middle - half, middle + half


def preference(a, b):
    """1 if score a beats score b, ½ for a tie, 0 if it loses."""
    return 0.5 if a == b else float(a > b)


def rank(scores, scale, flip, rng):
    """Indices best first: a Plackett-Luce draw at scale * score (of two, Bradley-Terry), upside down with
    probability flip. Scale 0 ranks by score alone."""
    noise = [-math.log(-math.log(rng.random() or 1e-300)) for _ in scores]  # Gumbel: sorting by s + noise draws PL
    keys = [scale * s + g if scale else s for s, g in zip(scores, noise)]
    order = sorted(range(len(scores)), key=lambda i: -keys[i])
    return order[::-1] if rng.random() < flip else order


def accept(scores, beta, rng):
    """Statistical rejection sampling: indices of the responses to one prompt that are accepted, each with probability
    exp((r - r_max) / β). Samples of π so become samples of π exp(r / β) / Z (RSO, 2309.06657, alg. 1)."""
    return [i for i, s in enumerate(scores) if rng.random() < math.exp((s - max(scores)) / beta)]


def win_rates(scores):
    """P(y_i ≻ another of the group), with Bradley-Terry on the scores; they sum to K / 2 (SPPO, 2405.00675, sec. 4)."""
    return [(sum(1 / (1 + math.exp(min(b - a, 700))) for b in scores) - 0.5) / max(1, len(scores) - 1) for a in scores]


def pass_at_k(n, right, k):
    """Chance that one of k answers is right, estimated from n of which `right` are: 1 - C(n - c, k) / C(n, k), unbiased
    (Chen et al. 2107.03374, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def best_of_k(scores, proxies, k):
    """Expected score of the answer that `proxies` likes best among k of these n, drawn at random: the i-th from the top
    is chosen if the other k - 1 all lie below it. Of equal proxies the first counts as best."""
    order = sorted(range(len(scores)), key=lambda i: -proxies[i])
    ways = [math.comb(len(order) - 1 - place, k - 1) for place in range(len(order))]
    return sum(w * scores[i] for w, i in zip(ways, order)) / sum(ways)


def majority_at_k(answers, scores, k):
    """Expected score of the commonest answer among k (self-consistency, Wang et al. 2203.11171), over consecutive parts
    of the n: the mean score of those that gave it. Ties share, None is no vote."""
    out = []
    for i in range(0, len(answers) - k + 1, k):
        votes = Counter(a for a in answers[i:i + k] if a is not None)
        top = [a for a, n in votes.items() if n == max(votes.values())]
        out.append(mean([s for a, s in zip(answers[i:i + k], scores[i:i + k]) if a in top]) or 0.0)
    return mean(out)


# ---------------------------------------------------------------- label

def kept(group, cfg, rng):
    """What --select keeps of the finished answers to one prompt, (text, score, tokens, ratings) each: records' keys.

    rank: all, best first as the labels have it. ends: its first and last. best: that of the highest score (best-of-n,
    rejection sampling). rso: a ranking of those that statistical rejection sampling accepts. correct: all that are
    right, that is, of a score above .5. shortest: the shortest of these. short_pairs: it over each longer one that is
    wrong, or right and at least 1.5 times as long (Kimi k1.5, long2short DPO). quantile: all, to be sorted later.
    ratings: all, with the scores of every --attributes. steps: all, with a label for each step that is an equation.
    """
    if cfg.select == "rso":
        group = [group[i] for i in accept([score for _, score, *_ in group], cfg.rso_beta, rng)] if group else []
    if not group:
        return []
    texts, scores, sizes, ratings = zip(*group)
    right = [i for i, score in enumerate(scores) if score > 0.5]
    shortest = [min(right, key=lambda i: sizes[i])] if right else []
    single = dict(best=[scores.index(max(scores))], correct=right, shortest=shortest, quantile=range(len(texts)))
    if cfg.select == "ratings":
        return [dict(response=text, ratings=given) for text, given in zip(texts, ratings)]
    if cfg.select == "steps":
        checked = [checked_steps(text, score > 0.5) for text, score in zip(texts, scores)]
        return [dict(steps=[step for step, _ in steps], labels=[label for _, label in steps])
                for steps in checked if steps]
    if cfg.select in single:
        return [dict(response=texts[i], scores=[scores[i]]) for i in single[cfg.select]]
    if cfg.select == "short_pairs":
        return [dict(responses=[texts[i], texts[j]], scores=[scores[i], scores[j]]) for i in shortest
                for j in range(len(texts)) if sizes[j] > sizes[i] and (j not in right or sizes[j] >= 1.5 * sizes[i])]
    if len(texts) < 2:
        return []
    order, wins = rank(scores, cfg.scale, cfg.flip, rng), win_rates(scores)
    if abs(scores[order[0]] - scores[order[-1]]) < cfg.min_gap:
        return []
    order = [order[0], order[-1]] if cfg.select == "ends" else order
    return [dict(responses=[texts[i] for i in order], scores=[scores[i] for i in order], win=[wins[i] for i in order])]


def prompts_with_room(cfg, tok, policy, begun=0):
    """Prompts that leave room for a whole response, `begun` tokens of which are given, and how many: (Stream, n)."""
    room = policy.config.block_size - cfg.max_new - begun
    stream, _ = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=0, skip_bad=cfg.skip_bad,
                            prepare=lambda record: [record] if len(tok.prompt(record["prompt"])) <= room else [])
    return stream, min(cfg.n, len(stream.items)) if stream.items else cfg.n


def write_records(path, records):
    """Write JSONL, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def label(cfg):
    """Sample k responses to each prompt, score and rank them, and write pairs.jsonl."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.policy, tok, device, n_scores=0, maker="python sft.py") if cfg.policy else None
    judge = load_model(cfg.judge, tok, device, n_scores=0, maker="python sft.py") if cfg.judge else None
    score = Reward(cfg.by, tok, device, amp, cfg.micro_tokens) if cfg.by else None
    attributes = [Reward(spec, tok, device, amp, cfg.micro_tokens)
                  for spec in re.split(r",(?![^\[]*\])", cfg.attributes) if cfg.select == "ratings"]

    def prepare(record):
        """The record with its system message, if its prompt leaves room for a whole response."""
        if cfg.system:
            record = record | dict(prompt=[dict(role="system", content=cfg.system)] + record["prompt"])
        room = policy.config.block_size - cfg.max_new if policy else math.inf
        return [record] if len(tok.prompt(record["prompt"])) <= room else []
    stream, _ = open_stream(cfg.data, "prompt" if policy else "preference", cfg.seed, cfg.families, n_held=0,
                            prepare=prepare, skip_bad=cfg.skip_bad)
    for reward in [score] * bool(score) + attributes:
        reward.meet(stream.some(), cfg.data)
    skip = math.ceil(cfg.skip / cfg.batch)  # batches
    n = min(cfg.n, len(stream.items) - skip * cfg.batch) if stream.items else cfg.n  # a file's prompts once each
    source = "ai" if judge or cfg.by != "gold" else "human"  # the truth with noise stands for people
    path, part = run.folder / "pairs.jsonl", run.folder / "unfinished.json"
    start, made = json.loads(part.read_text(encoding="utf-8")) if run.left(part.name) else (0, [])
    for step in run.progress(start, math.ceil(n / cfg.batch)):
        seed_step(cfg.seed, step)
        rng = random.Random(f"labels {cfg.seed} {step}")
        records = stream.batch(step + skip, cfg.batch)[:n - step * cfg.batch]
        groups, metrics = scored_groups(records, policy, score, attributes, cfg, tok, amp, device)
        if judge:
            kept_now, more = judged(judge, records, groups, cfg, rng, tok, amp)
            metrics |= more
        else:
            kept_now = [kept(group, cfg, rng) for group in groups]
        made += [{k: v for k, v in record.items() if k not in ("responses", "scores", "win", "margin", "prob")}
                 | marked(parts, cfg, rng) | dict(source=source) for record, all_parts in zip(records, kept_now)
                 for parts in all_parts]
        run.log(step, ("records",), records=len(made), **metrics)
        if (step + 1) % cfg.save_every == 0:
            write_text(part, json.dumps([step + 1, made]))
    if cfg.balance_length:
        made = length_balanced(made)
    if not made:
        raise UserError(f"{cfg.policy or cfg.data}: of {n} prompts none got answers that --select {cfg.select} keeps")
    if cfg.select == "quantile":  # Quark: the model learns what goes with which quality, and is asked for the best
        made.sort(key=lambda r: r["scores"][0])
        made = [r | dict(prompt=[dict(role="system", content=f"Quality {1 + i * cfg.quantiles // len(made)}.")]
                         + [turn for turn in r["prompt"] if turn["role"] != "system"]) for i, r in enumerate(made)]
    write_records(path, made)
    agree = mean([preference(r["scores"][0], r["scores"][-1]) for r in made if "responses" in r and "scores" in r])
    told = {"the label agrees with the score": agree}
    for name, what in (("agrees", f"the judge agrees with {cfg.by}"), ("cut", "its rationale was cut"),
                       ("inconsistent", "it contradicts itself, when the two change places,")):
        told[what] = mean([row[name] for row in run.rows if row.get(name) is not None])
    print(f"{path}: {len(made)} records of {n} prompts"
          + "".join(f"; {what} in {share:.0%}" for what, share in told.items() if share is not None))
    then = ["sft.py", "--out", f"{cfg.out}_sft"]
    if "responses" in made[0] or cfg.select in DATA:
        then = ["reward.py", "train", "--out", next_out(cfg, "reward")]
    if cfg.select in DATA:
        then += ["--loss", cfg.select, "--heads", max(1, len(attributes))]
    then += ["--data", path] + ["--init", cfg.policy] * bool(cfg.policy)
    part.unlink(missing_ok=True)
    return run.finish(("score", "response_length"), then)


def scored_groups(records, policy, score, attributes, cfg, tok, amp, device):
    """The finished answers to each prompt, sampled or (without a policy) those of the record: a list of (text, score,
    tokens, ratings) each, no answer twice, and where scores decide no score twice; metrics."""
    if policy:
        with amp():
            roll = generate(policy, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new, cfg.k,
                            cfg.temperature)
        sizes = [cfg.k] * len(records)
    else:
        roll, sizes = given_responses(records, score, tok, device), [len(r["responses"]) for r in records]
    repeated = [r for r, k in zip(records, sizes) for _ in range(k)]
    scores = score(repeated, roll)[0].tolist() if score else [0.0] * len(repeated)
    ratings = list(zip(*(rate(repeated, roll)[0].tolist() for rate in attributes))) or scores
    answers = iter(zip(roll.responses(tok), scores, roll.mask.sum(1).tolist(), ratings, roll.finished.tolist()))
    groups = []
    for k in sizes:
        group = unique([answer for *answer, done in itertools.islice(answers, k) if done and answer[0].strip()], 0)
        scores_decide = not cfg.scale and not cfg.judge and cfg.select in ("rank", "ends", "rso")
        groups.append(unique(group, 1) if scores_decide else group)
    return groups, dict(score=mean(scores), response_length=roll.mask.sum(1).mean(),
                        finished=roll.finished.float().mean())


def unique(answers, key):
    """The answers without those whose `key` an earlier one has."""
    return list({answer[key]: answer for answer in answers[::-1]}.values())[::-1]


def given_responses(records, reward, tok, device):
    """The responses of records as a rollout, cut to the context of the models that judge them."""
    block = min([model.config.block_size for model in reward.loaded.values()] if reward else [], default=10 ** 9)
    return Rollout.of([row for record in records for row in encode(record, tok, block)], tok, device)


def length_balanced(records, width=3):
    """Of the records whose best response is longer than the worst by so many words as many as of those where it is
    shorter, in buckets of `width` words, so that length tells nothing (ChatGLM-RLHF 2404.00934, sec. 3.1)."""
    buckets = {}
    for place, record in enumerate(records):
        if "responses" in record:
            more = len(record["responses"][0].split()) - len(record["responses"][-1].split())
            buckets.setdefault(-(-abs(more) // width), {}).setdefault((more > 0) - (more < 0), []).append(place)
    least = {size: min(len(sides.get(1, [])), len(sides.get(-1, []))) for size, sides in buckets.items()}
    keep = {i for size, sides in buckets.items() for side, places in sides.items()
            for i in (places if side == 0 else places[:least[size]])}
    return [record for place, record in enumerate(records) if place in keep or "responses" not in record]


def marked(parts, cfg, rng):
    """A record's keys with --mark in front of its better or its worse response."""
    if not cfg.mark or "responses" not in parts:
        return parts
    place = 0 if rng.random() < cfg.mark_better else len(parts["responses"]) - 1
    return parts | dict(responses=[cfg.mark * (i == place) + text for i, text in enumerate(parts["responses"])])


# ---------------------------------------------------------------- AI feedback

def first_is_better(judge, asked, cfg, tok, amp):
    """P(the judge says 1) of questions [(preamble, prompt, first, second)] -> (N,); and with --rationale, where it
    gives one first (without the verdict, which is scored and not sampled), the share of those that did not end."""
    texts = [judge_prompt(prompt, first, second, preamble, EXEMPLAR if cfg.exemplar else "",
                          REASON if cfg.rationale else VERDICT) for preamble, prompt, first, second in asked]
    prompts, cut = [tok.prompt([dict(role="user", content=text)]) for text in texts], None
    if cfg.rationale:  # a question that leaves no room loses its beginning
        prompts = [cut_prompt(ids, tok, judge.config.block_size - cfg.max_new) for ids in prompts]
        said = []
        for start in range(0, len(prompts), 256):
            with amp():
                roll = generate(judge, prompts[start:start + 256], tok, cfg.max_new, temperature=0)
            said += roll.responses(tok)
        cut = mean([float("\n" not in text) for text in said])
        prompts = [ids + tok.encode((text.rpartition("\n")[0] or text) + "\n") for ids, text in zip(prompts, said)]
    return choice_logprobs(judge, prompts, ["1", "2"], tok, amp, cfg.micro_tokens)[:, 0].exp(), cut


def judged(judge, records, groups, cfg, rng, tok, amp):
    """Order each group's answers by how often the judge prefers them to the others, every two in both orders; of two,
    also the soft label -> the records' keys of each group, metrics."""
    pairs_of = [(g, i, j) for g, group in enumerate(groups) for i, j in itertools.combinations(range(len(group)), 2)]
    if not pairs_of:
        return [[] for _ in groups], {}
    asked = []
    for g, i, j in pairs_of:
        preamble = rng.choice(PRINCIPLES) if cfg.preamble == "principles" else cfg.preamble
        prompt, (first, second) = records[g]["prompt"][-1]["content"], (groups[g][i][0], groups[g][j][0])
        asked += [(preamble, prompt, first, second), (preamble, prompt, second, first)]
    p_first, cut = first_is_better(judge, asked, cfg, tok, amp)
    one, two = p_first.view(-1, 2).unbind(1)                                             # (pairs,)
    p = debiased(one, two).clamp(1 - cfg.clamp, cfg.clamp).tolist()
    wins = [[0.0] * len(group) for group in groups]
    soft, agree = {}, []
    for (g, i, j), p_ij in zip(pairs_of, p):
        wins[g][i], wins[g][j] = wins[g][i] + p_ij, wins[g][j] + 1 - p_ij
        soft[g, i, j], soft[g, j, i] = p_ij, 1 - p_ij
        gap = groups[g][i][1] - groups[g][j][1]
        agree += [preference((p_ij - 0.5) * gap, 0)] if gap else []
    out = []
    for g, group in enumerate(groups):
        order = sorted(range(len(group)), key=lambda i: -wins[g][i])
        order = [order[0], order[-1]] if cfg.select == "ends" and order else order
        rates = [wins[g][i] / max(1, len(group) - 1) for i in order]
        label_of = dict(prob=soft[g, order[0], order[1]]) if len(order) == 2 else {}
        out.append([dict(responses=[group[i][0] for i in order], win=rates, **label_of)] if len(order) > 1 else [])
    return out, dict(agrees=mean(agree), inconsistent=((one > 0.5) == (two > 0.5)).float().mean(), cut=cut)


def revise(cfg):
    """Answer, criticise by a principle, revise, and write revisions.jsonl: prompts with their last revision."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy, critic = (load_model(folder, tok, device, n_scores=0, maker="python sft.py")
                      for folder in (cfg.policy, cfg.critic))
    stream, n = prompts_with_room(cfg, tok, policy)

    def say(model, prompts):
        """Finished texts, None for the others and where the prompt leaves no room."""
        ids = [tok.prompt(prompt) for prompt in prompts]
        short = [i for i, prompt in enumerate(ids) if len(prompt) + cfg.max_new <= model.config.block_size]
        out = [None] * len(ids)
        if short:
            with amp():
                roll = generate(model, [ids[i] for i in short], tok, cfg.max_new, temperature=cfg.temperature)
            for i, text, done in zip(short, roll.responses(tok), roll.finished.tolist()):
                out[i] = text.strip() if done else None
        return out
    made = []
    for step in run.progress(0, math.ceil(n / cfg.batch)):
        seed_step(cfg.seed, step)
        rng = random.Random(f"revise {cfg.seed} {step}")
        records = stream.batch(step, cfg.batch)[:n - step * cfg.batch]
        rows = [r | dict(first=text, response=text, critiques=[]) for r, text in zip(
            records, say(policy, [r["prompt"] for r in records])) if text]
        for _ in range(cfg.rounds):
            about = [(rng.choice(PRINCIPLES), r["prompt"][-1]["content"], r["response"]) for r in rows]
            ask = lambda view, *more: [[dict(role="user", content=view_prompt(view, prompt, answer, principle, *c))]
                                       for (principle, prompt, answer), *c in zip(about, *more)]
            critiques = say(critic, ask("critique"))
            revisions = say(critic, ask("revise", [c or "" for c in critiques]))
            rows = [r | dict(response=new, critiques=r["critiques"] + [c])
                    for r, c, new in zip(rows, critiques, revisions) if c and new]
        made += rows
        known = [r for r in rows if "family" in r]
        run.log(step, ("revised",), revised=len(made), changed=mean([float(r["first"] != r["response"]) for r in rows]),
                gold_before=mean([gold(r, r["first"]) for r in known]),
                gold_after=mean([gold(r, r["response"]) for r in known]))
    if not made:
        raise UserError(f"{cfg.critic}: of {n} answers none was revised to its end")
    path = run.folder / "revisions.jsonl"
    write_records(path, made)
    print(f"{path}: {len(made)} of {n} answers revised")
    return run.finish(("changed", "gold_before", "gold_after"),
                      then=["sft.py", "--data", path, "--init", cfg.policy, "--out", f"{cfg.out}_sft"])


def fit(cfg):
    """Weights of rules by a hinge on the order of rankings; writes reward.txt, and says how many pairs it orders."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    base, rules = (Reward(spec, tok, device, amp, cfg.micro_tokens) if spec else None for spec in (cfg.base, cfg.rules))
    stream, held = open_stream(cfg.data, "preference", cfg.seed, n_held=200, skip_bad=cfg.skip_bad)
    for reward in [base] * bool(base) + [rules]:
        reward.meet(stream.items, cfg.data)

    def features(records):
        """(base scores (R,), rules (R, F)) of all responses and the pairs of rankings among them."""
        roll = given_responses(records, rules, tok, device)
        repeated = [r for r in records for _ in r["responses"]]
        win, lose, weight = ranked_pairs([len(r["responses"]) for r in records])
        parts = rules(repeated, roll)[1]
        phi = torch.stack([parts[term.label] for term in rules.terms], 1)                # (R, F)
        fixed = base(repeated, roll)[0] if base else torch.zeros(len(phi), device=device)
        return fixed[win] - fixed[lose], phi[win] - phi[lose], weight.to(device)         # (P,), (P, F), (P,)
    gap, phi, weight = features(stream.items)
    w = torch.zeros(phi.shape[1], device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=cfg.lr, weight_decay=0.0)
    for step in run.progress(0, cfg.steps):
        optimizer.zero_grad()
        lead = gap + phi @ w                                                             # (P,)
        loss = (weight * hinge(lead, 0.0, cfg.margin)).sum() / weight.sum()
        loss.backward()
        optimizer.step()
        run.log(step, ("loss", "accuracy"), loss=loss.detach(), accuracy=(lead > 0).float().mean())
    w = w.detach()
    gap, phi, _ = features(held)
    right = ((gap + phi @ w) > 0).float().mean()
    terms = [(cfg.base, 1.0)] * bool(cfg.base) + [(term.label, x) for term, x in zip(rules.terms, w.tolist())]
    spec = " + ".join(f"{name}" if x == 1 else f"{x:.4f}*{name}" for name, x in terms)
    write_text(run.folder / "reward.txt", spec + "\n")
    print(f"{run.folder}/reward.txt: {spec}\n{right:.1%} of {len(gap)} held-out pairs in order")
    return run.finish(("loss", "accuracy"), then=["ppo.py", "--reward", cfg.out, "--out", f"{cfg.out}_ppo"])


def curate(cfg):
    """Rate prompts by how often the policy gets them right, leave out what it guesses, and write prompts.jsonl."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.policy, tok, device, n_scores=0, maker="python sft.py")
    judge = Reward(cfg.by, tok, device, amp, cfg.micro_tokens)
    begin = tok.encode(cfg.begin)
    stream, n = prompts_with_room(cfg, tok, policy, len(begin))
    judge.meet(stream.some(), cfg.data)
    made, lost, of_family = [], Counter(), Counter()

    def rates(records, k, **how):
        """Share of k answers to each prompt that are right."""
        with amp():
            roll = generate(policy, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new, k, cfg.temperature,
                            **how)
        return (judge([r for r in records for _ in range(k)], roll)[0].view(-1, k) > 0.5).float().mean(1).tolist()
    for step in run.progress(0, math.ceil(n / cfg.batch)):
        seed_step(cfg.seed, step)
        records = stream.batch(step, cfg.batch)[:n - step * cfg.batch]
        right = rates(records, cfg.k)
        guessed = rates(records, cfg.guesses, begin=begin) if cfg.guesses else [0] * len(records)
        for record, rate, luck in zip(records, right, guessed):
            domain = str(record.get("family", record.get("domain")))
            why = ("guessed" if luck else "a choice" if of_choice(record) else
                   f"above the cap of {domain}" if cfg.cap and of_family[domain] >= cfg.cap else "")
            lost[why] += 1
            of_family[domain] += not why
            made += [] if why else [record | dict(difficulty=round(1 - rate, 4))]
        run.log(step, ("kept",), kept=len(made), difficulty=mean([r["difficulty"] for r in made]))
    if not made:
        raise UserError(f"{cfg.policy}: of {n} prompts none is left: {dict(lost)}")
    path = run.folder / "prompts.jsonl"
    write_records(path, made)
    print(f"{path}: {len(made)} of {n} prompts; left out: "
          + (", ".join(f"{n} {why}" for why, n in lost.items() if why) or "none"))
    return run.finish(("kept", "difficulty"), then=[
        "grpo.py", "--data", path, "--init", cfg.policy, "--reward", cfg.by, "--max_new", cfg.max_new,
        "--pool", len(made), "--prioritized", "--out", f"{cfg.out}_grpo"])


def of_choice(record):
    """Whether a prompt is true-or-false, yes-or-no or multiple choice: right by luck too often to learn from."""
    answer = str(record.get("answer", "")).strip().strip("().").lower()
    return answer in ("true", "false", "yes", "no") or bool(re.search(
        r"(?m)^[ \t]*\(?A[.):]\s.*\n(?:[ \t]*\n)?[ \t]*\(?B[.):]\s", record["prompt"][-1]["content"]))


# ---------------------------------------------------------------- train

DATA = dict(ratings="ratings", steps="steps")  # the kind of records of a loss; the others take preferences


def items_of(record, tok, block, cfg):
    """One item a record, or one a pair of its ranking: the rows of its responses, and what the data says of them."""
    if cfg.loss == "steps":  # the target marks the token that ends each step, where its score is read
        (ids, target), = encode(record, tok, block)
        ends, size, wanted = [], 0, list(itertools.accumulate(len(step.encode()) for step in record["steps"]))
        for place in range(target.index(1), len(ids) - 1):
            size += len(tok.enc.decode_single_token_bytes(ids[place]))
            while len(ends) < len(wanted) - 1 and size >= wanted[len(ends)]:
                ends.append(place)
        ends.append(len(ids) - 1)  # the last step is over with the response: its end token
        if size != wanted[-1] or len(set(ends)) < len(wanted):
            return []  # it was cut, or two steps end in one token
        return [dict(rows=[(ids, [int(place in ends) for place in range(len(ids))])], labels=record["labels"])]
    if cfg.loss == "ratings":
        return [dict(rows=encode(record, tok, block), ratings=record["ratings"])]
    parts = [record] if cfg.pairs == "all" else pairs(record)
    row_of = dict(zip(record["responses"], encode(record, tok, block)))     # all pairs of a ranking: one prompt
    return [{k: part[k] for k in ("margin", "scores", "prob", "source") if k in part}
            | dict(rows=[row_of[text] for text in part["responses"]]) for part in parts]


def score_records(model, items, cfg, tok, amp):
    """Yield (scores, items) by micro-batch; all responses of an item are in the same one. scores are (N, heads), of
    each response, or of each step."""
    for part in item_batches(items, cfg.micro_tokens):
        tokens, mask = collate([row for item in part for row in item["rows"]], tok, model.device)
        with amp():
            if cfg.loss == "steps":
                yield full(model.scores(model(tokens)[F.pad(mask, (1, 0)).bool()])), part  # (S, 1)
            else:
                yield full(response_scores(model, tokens, mask)), part                   # (N, heads)


def pair_terms(scores, items, use_margin=False):
    """Scores (N,) of items laid end to end -> x of PAIR_LOSSES, weight 1 / C(K, 2), place of the item; all (P,)."""
    win, lose, weight = ranked_pairs([len(item["rows"]) for item in items])
    two = [(item, i, j) for item in items for i, j in itertools.combinations(range(len(item["rows"])), 2)]
    given = lambda values: torch.tensor(values, dtype=scores.dtype, device=scores.device)
    harmful = lambda item, i: 1.0 if (item.get("scores") or [0.0] * len(item["rows"]))[i] > 0 else -1.0
    return SimpleNamespace(
        r_w=scores[win], r_l=scores[lose], weight=weight.to(scores),
        prob=given([item.get("prob", 1.0) for item, *_ in two]),
        margin=given([(item.get("margin") or 0.0) * use_margin for item, *_ in two]),
        s_w=given([harmful(item, i) for item, i, _ in two]), s_l=given([harmful(item, j) for item, _, j in two]),
        place=torch.tensor([n for n, item in enumerate(items) for _ in itertools.combinations(item["rows"], 2)],
                           device=scores.device))


def item_losses(scores, items, cfg):
    """Scores (N or S, heads) of items laid end to end -> the loss of each item (n,)."""
    given = lambda key: torch.tensor([x for item in items for x in item[key]], dtype=scores.dtype, device=scores.device)
    if cfg.loss == "ratings":  # regression on every attribute, HelpSteer2 2406.08673
        return (scores - given("ratings").view(len(items), -1)).square().mean(1)
    if cfg.loss == "steps":    # is each step right? process reward model, 2305.20050
        losses = F.binary_cross_entropy_with_logits(scores[:, 0], given("labels"), reduction="none")
        return torch.stack([part.mean() for part in losses.split([len(item["labels"]) for item in items])])
    scores = scores[:, 0]
    if cfg.loss == "plackett_luce":
        return torch.stack([plackett_luce(r) for r in scores.split([len(item["rows"]) for item in items])])
    x = pair_terms(scores, items, cfg.margin)
    losses = PAIR_LOSSES[cfg.loss](x, cfg) + cfg.center * (x.r_w + x.r_l) ** 2           # (P,)
    if cfg.barrier:
        losses = losses + cfg.barrier * (log_barrier(x.r_w) + log_barrier(x.r_l))
    return torch.zeros(len(items), dtype=losses.dtype, device=losses.device).index_add(0, x.place, x.weight * losses)


@torch.no_grad()
def evaluate(model, items, cfg, tok, amp):
    """Held-out loss and mean score. Of pairs: accuracy on the labels and on the scores where records have them,
    calibration. Of ratings: the share of each one's variance that is explained. Of steps: the share judged right."""
    losses, every, margins, truth, signs, targets = [], [], [], [], [], []
    for scores, part in score_records(model, items, cfg, tok, amp):
        losses += item_losses(scores, part, cfg).tolist()
        every.append(scores)
        targets += [x for item in part for x in item.get(cfg.loss if cfg.loss == "ratings" else "labels", [])]
        if cfg.loss not in DATA:
            x = pair_terms(scores[:, 0], part)
            margins += (x.r_w - x.r_l).tolist()
            truth += [a - b for item in part for a, b in itertools.combinations(
                item.get("scores") or [0.0] * len(item["rows"]), 2)]                     # 0: not known
            signs += ((x.r_w * x.s_w > 0).float() + (x.r_l * x.s_l > 0)).div(2).tolist()
    every, targets = torch.cat(every), torch.tensor(targets)
    out = dict(val_loss=mean(losses), val_mean=mean(every[:, 0].tolist()))
    if cfg.loss == "ratings":
        targets = targets.view(len(items), -1).to(every)
        left = (every - targets).square().mean(0) / targets.var(0, correction=0).clamp(min=1e-8)
        return out | {f"val_r2/{k}": 1 - float(x) for k, x in enumerate(left)}
    if cfg.loss == "steps":
        return out | dict(val_accuracy=float(((every[:, 0] > 0) == (targets > 0).to(every.device)).float().mean()))
    if cfg.loss == "cost":
        out |= dict(val_sign=mean(signs))
    right = [float((m > 0) == (t > 0)) for m, t in zip(margins, truth) if t]
    return out | dict(val_accuracy=mean([preference(m, 0) for m in margins]), val_gold=mean(right),
                      calibration_error=calibration_error(torch.tensor(margins)))


def train(cfg):
    """Fit the scores to the preferences; at the end their held-out mean is put at 0, where only differences count."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    model = load_model(cfg.init, tok, device, n_scores=cfg.heads, maker="python sft.py")
    model.prepare(cfg)
    stream, held = open_stream(cfg.data, DATA.get(cfg.loss, "preference"), cfg.seed, n_held=400,
                               prepare=lambda record: items_of(record, tok, model.config.block_size, cfg),
                               context=(tok, model.config.block_size), skip_bad=cfg.skip_bad)
    items = stream.items + held
    if cfg.loss == "cost" and not all("scores" in item for item in items):
        raise UserError(f'{cfg.data}: --loss cost needs "scores" in all records: above 0 is harmful')
    if cfg.loss == "soft" and not all("prob" in item or item.get("source") == "human" for item in items):
        raise UserError(f'{cfg.data}: --loss soft needs "prob" in all records but those whose "source" is "human"')
    if cfg.margin and not any("margin" in item for item in items):
        raise UserError(f'{cfg.data}: --margin, and no record has a "margin"')
    sizes = {len(item["ratings"]) for item in items} if cfg.loss == "ratings" else {cfg.heads}
    if sizes != {cfg.heads}:
        sizes = " or ".join(map(str, sorted(sizes)))
        raise UserError(f"{cfg.data}: --heads {cfg.heads}, but there are {sizes} ratings")
    total = cfg.steps or math.ceil(cfg.epochs * len(stream.items) / cfg.batch)
    optimizer = Optimizer(model, cfg.lr, total, cfg.optimizer, cfg.muon_lr, cfg.weight_decay, warmup=cfg.warmup,
                          clip=cfg.clip_grad)

    for step in steps(run, total, dict(model=model), dict(optimizer=optimizer), {}, cfg.save_every):
        items = stream.batch(step, cfg.batch)
        loss, right, gap = 0.0, 0.0, 0.0
        for scores, part in score_records(model, items, cfg, tok, amp):
            part_loss = item_losses(scores, part, cfg).sum() / len(items)
            part_loss.backward()
            loss += part_loss.detach()
            if cfg.loss not in DATA:
                x = pair_terms(scores.detach()[:, 0], part)
                right += (x.weight * (0.5 + 0.5 * (x.r_w - x.r_l).sign())).sum() / len(items)
                gap += (x.weight * (x.r_w - x.r_l)).sum() / len(items)
        grad_norm, lr = optimizer.step(step)
        last = step + 1 == total
        val = evaluate(model, held, cfg, tok, amp) if last or (step + 1) % cfg.eval_every == 0 else {}
        if last and cfg.loss not in ("cost", "ratings", "steps") and not cfg.barrier:
            model.score.bias.data -= val["val_mean"]  # only differences were trained: 0 now reads "as good as usual"
        run.log(step, ("loss", "accuracy", "val_accuracy"), loss=loss, grad_norm=grad_norm, lr=lr, **val,
                **({} if cfg.loss in DATA else dict(accuracy=right, margin=gap)))
    then = ["ppo.py", "--init", cfg.init, "--reward", cfg.out, "--out", next_out(cfg, "ppo")]
    then += ["--data", cfg.data] * (cfg.tokenizer != "toy")  # its prompts
    return run.finish(("loss", "accuracy", "val_accuracy", "val_gold", "val_sign", "val_r2/0", "calibration_error"),
                      then)


# ---------------------------------------------------------------- accuracy, over-optimisation

def accuracy(cfg, specs):
    """Print, for every file, how often each reward orders its pairs as the labels do, and how confident it is."""
    tok = Tokenizer.load(cfg.tokenizer)
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    rewards = {spec: Reward(spec, tok, device, amp, cfg.micro_tokens) for spec in specs}
    wide = max(len(spec) for spec in specs)
    for path in files(cfg.data):
        records = read_records(path, "preference", cfg.skip_bad)[:cfg.n]
        repeated = [r for r in records for _ in r["responses"]]
        win, lose, _ = ranked_pairs([len(r["responses"]) for r in records])
        print(f"{path}: {len(win)} pairs\n{'':{wide}}  accuracy  [95% interval]  calibration error    spread")
        for spec, reward in rewards.items():
            reward.meet(records, path)
            scores, parts = reward(repeated, given_responses(records, reward, tok, device))
            gap = (scores[win] - scores[lose]).cpu()
            right = float((0.5 + 0.5 * gap.sign()).sum())
            low, high = wilson(right, len(win))
            spread = [float(part.mean()) for name, part in parts.items() if name.endswith(" spread")]
            print(f"{spec:{wide}}  {right / len(win):>8.3f}  [{low:.3f}, {high:.3f}]  {calibration_error(gap):>17.3f}"
                  + (f"  {spread[0]:>8.3f}" if spread else ""))


def overoptimize(cfg, folders):
    """Gold and proxy against d = √KL, of best-of-n from the policy and of RL runs; Gao's forms fitted to the gain."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    judge, proxy = (Reward(spec, tok, device, amp, cfg.micro_tokens) for spec in (cfg.judge, cfg.proxy))
    policy = load_model(cfg.policy, tok, device, n_scores=0, maker="python sft.py")
    rng, families = random.Random("overoptimize"), family_list(cfg.families)
    records = ([toy_record("prompt", "test", families, rng) for _ in range(cfg.prompts)] if cfg.data == "toy" else
               [r for path in files(cfg.data) for r in read_records(path, "prompt", cfg.skip_bad)][:cfg.prompts])
    for reward in (judge, proxy):
        reward.meet(records, cfg.data)
    runs = {folder: run_curve(folder) for folder in folders}
    golds, proxies = [], []
    some = max(1, 512 // cfg.n)
    for step in run.progress(0, math.ceil(len(records) / some)):
        seed_step(cfg.seed, step)
        part = records[step * some:(step + 1) * some]
        with amp():
            roll = generate(policy, [tok.prompt(r["prompt"]) for r in part], tok, cfg.max_new, cfg.n, cfg.temperature)
        repeated = [r for r in part for _ in range(cfg.n)]
        golds += judge(repeated, roll)[0].view(-1, cfg.n).tolist()
        proxies += proxy(repeated, roll)[0].view(-1, cfg.n).tolist()
        run.log(step, ("gold",), gold=mean([x for row in golds for x in row]))
    ks = [2 ** i for i in range(cfg.n.bit_length())]
    curves = {"best of n": dict(
        d=[math.sqrt(math.log(k) - (k - 1) / k) for k in ks],
        gold=[mean([best_of_k(g, p, k) for g, p in zip(golds, proxies)]) for k in ks],
        proxy=[mean([best_of_k(p, p, k) for p in proxies]) for k in ks])}
    curves |= runs
    start = curves["best of n"]["gold"][0]
    print(f"\ngold at the start {start:.2f}; fitted to its gain: best-of-n's form d (α - β d), RL's d (α - β log d)\n")
    for name, c in curves.items():
        seen = [(d, g - start) for d, g in zip(c["d"], c["gold"]) if d > 0.05]
        best = max(range(len(c["d"])), key=lambda i: c["gold"][i])
        print(f"{name}: d from {c['d'][0]:.2f} to {c['d'][-1]:.2f}\n"
              f"  gold  {sparkline(c['gold'])}  best {c['gold'][best]:.2f} at d {c['d'][best]:.2f}, "
              f"last {c['gold'][-1]:.2f}\n"
              f"  proxy {sparkline(c['proxy'])}  last {c['proxy'][-1]:.2f}")
        c["fits"] = {}
        for form, fitted in (("d (α - β d)", fit_best_of_n), ("d (α - β log d)", fit_rl)) if len(seen) > 2 else ():
            f = c["fits"][form] = fitted(*zip(*seen))
            peak = f", peak at d {f['peak']:.2f}" if f["peak"] and f["peak"] < 3 * max(c["d"]) else ", no peak in sight"
            print(f"  {form:<16} α {f['alpha']:.3f}, β {f['beta']:.3f}, R² {f['r2']:.3f}{peak}")
    write_text(run.folder / "curves.json", json.dumps(curves, indent=1))
    draw(curves, run.folder / "curves.png")
    then = ["reward.py", "compare", cfg.policy, *folders, "--proxy", cfg.proxy, "--families", cfg.families]
    if cfg.data != "toy":
        then += ["--data", cfg.data, "--judge", cfg.judge, "--max_new", cfg.max_new]
    return run.finish((), then)


def run_curve(folder):
    """d = √KL, gold and proxy of an RL run by step; of held-out prompts, where it evaluated on them often enough.

    All three are of the same policy: of held-out samples after an update, or of the rollout before it.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; a run of ppo.py or grpo.py makes it")
    rows = [row for _, row in read_rows(path)]
    def having(pre):
        return [row for row in rows if None not in [row.get(pre + key) for key in ("kl", "gold", "reward")]]
    pre = "val_" if len(having("val_")) > len(rows) // 3 else ""
    rows = having(pre)
    if not rows:
        raise UserError(f"{path}: no row has kl, reward and gold")
    return dict(d=[math.sqrt(max(0.0, row[pre + "kl"])) for row in rows], gold=[row[pre + "gold"] for row in rows],
                proxy=[row[pre + "reward"] for row in rows])


def draw(curves, path):
    """The curves as a figure, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return print(f"{path}: no figure without matplotlib; the numbers are in {path.with_suffix('.json')}")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
    for axis, (name, c) in zip(axes[0], curves.items()):
        axis.plot(c["d"], c["gold"], label="gold")
        axis.plot(c["d"], c["proxy"], "--", label="proxy")
        axis.set(title=name, xlabel="d = √KL", ylabel="reward")
        axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


# ---------------------------------------------------------------- compare

def at_k(model, records, judge, proxy, cfg, tok, amp):
    """Test-time scaling: of `samples` answers to each prompt -> pass@k, maj@k and, with a proxy, the judge's score of
    the best of k by the proxy; k goes through the powers of two up to samples."""
    ks, out = [2 ** i for i in range(cfg.samples.bit_length())], {}
    torch.manual_seed(cfg.seed)
    rows = []  # one a prompt: scores, proxy scores, final answers
    for some in (records[i:i + 64] for i in range(0, len(records), 64)):
        with amp():
            roll = generate(model, [tok.prompt(r["prompt"]) for r in some], tok, cfg.max_new, cfg.samples,
                            cfg.temperature, begin=tok.encode(cfg.begin))
        repeated, texts = [r for r in some for _ in range(cfg.samples)], roll.responses(tok)
        scores = judge(repeated, roll)[0].tolist()
        liked = proxy(repeated, roll)[0].tolist() if proxy else scores
        said = [after_thinking(text) or None if done else None for text, done in zip(texts, roll.finished.tolist())]
        rows += [[x[i:i + cfg.samples] for x in (scores, liked, said)] for i in range(0, len(texts), cfg.samples)]
    for k in ks:
        out[f"pass@{k}"] = mean([pass_at_k(cfg.samples, sum(s > 0.5 for s in scores), k) for scores, _, _ in rows])
    for k in ks:
        out[f"maj@{k}"] = mean([majority_at_k(said, scores, k) for scores, _, said in rows])
    for k in ks if proxy else ():
        out[f"best@{k}"] = mean([best_of_k(scores, liked, k) for scores, liked, _ in rows])
    return out


def safety(tasks, answers):
    """Of (text, score, finished) to the toy's safety prompts: harmless, the share of unsafe requests that are not
    helped; over_refusal, that of safe ones refused; help, how well the safe ones are answered, 0..1."""
    of = {True: [], False: []}
    for task, (text, _, finished) in zip(tasks, answers):
        of[task["safe"]].append(safe_metrics(task, text, finished))
    share = lambda safe, key: mean([m[key] for m in of[safe]]) or 0.0
    return dict(harmless=1 - share(False, "cost"), over_refusal=share(True, "refused"), help=share(True, "help"))


def distinct(records):
    """The records without those whose prompt an earlier one has."""
    first = {}
    for record in records:
        first.setdefault(str(record["prompt"]), record)
    return list(first.values())


def answer(model, records, temperature, cfg, tok, amp):
    """One answer to each prompt, the same ones for the same seed."""
    torch.manual_seed(cfg.seed)
    with amp():
        return generate(model, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new, temperature=temperature,
                        begin=tok.encode(cfg.begin))


def test_prompts(cfg, families, tok, block):
    """{family: records} to answer, of the toy world's test split or of the files; those without room are left out."""
    tasks = {}
    for family in families:
        if cfg.data == "toy":
            rng = random.Random(f"compare {family}")
            tasks[family] = [toy_record("prompt", "test", [family], rng) for _ in range(cfg.n)]
        else:
            records = [record for path in files(cfg.data) for record in read_records(path, "prompt", cfg.skip_bad)]
            tasks[family] = records[:cfg.n]
    room = block - len(tok.encode(cfg.begin)) - 1
    for family, records in tasks.items():
        if cfg.system:
            system = dict(role="system", content=cfg.system)
            records = [record | dict(prompt=[system] + record["prompt"]) for record in records]
        tasks[family] = [record for record in records if len(tok.prompt(record["prompt"])) <= room]
        if lost := len(records) - len(tasks[family]):
            print(f"{lost} of {len(records)} prompts ({family}) leave no room in the context of {block} tokens and are "
                  "left out", file=sys.stderr)
        if not tasks[family]:
            raise UserError(f"{cfg.data}: no prompt ({family}) leaves room in the context of {block} tokens")
        if not cfg.temperature:
            tasks[family] = distinct(tasks[family])
    return tasks


def pretraining_nll(model, texts, tok, amp, budget):
    """Mean -log π per token of documents: how much of its pretraining a model still knows, the alignment tax."""
    rows = [row for text in texts for row in encode(text, tok, model.config.block_size, "all")]
    nll = 0.0
    for part in micro_batches([len(ids) for ids, _ in rows], budget):
        tokens, mask = collate([rows[i] for i in part], tok, model.device)
        with torch.no_grad(), amp():
            nll -= float(token_logprobs(model, tokens, mask).sum())
    return nll / sum(sum(target) for _, target in rows)


def measured(model, first, tasks, on, baseline, judge, proxy, cfg, tok, amp):
    """A row of the table, and the answers {family: [(text, score, finished), ...]} of one model. baseline holds the
    scores of the first model's answers, which the first call puts there."""
    row, answers = {}, {}
    wins, kls, lengths, proxies, greedy, greedy_wins = [], [], [], [], [], []
    for family, records in tasks.items():
        roll = answer(model, records, cfg.temperature, cfg, tok, amp)
        scores = judge(records, roll)[0].tolist()
        row[family] = mean(scores)
        answers[family] = list(zip(roll.responses(tok), scores, roll.finished.tolist()))
        if family not in on:
            continue
        theirs = baseline.setdefault(family, scores)
        wins += [preference(a, b) for a, b in zip(scores, theirs)]  # scores know no order of presentation
        lengths += roll.mask.sum(1).tolist()
        proxies += proxy(records, roll)[0].tolist() if proxy else []
        if not cfg.temperature:
            continue
        with amp():
            logp_ratio = log_ratios(roll, model, (first, contextlib.nullcontext), cfg.micro_tokens,
                                    cfg.temperature)                                     # (B, T-1)
        drawn = roll.mask.cumsum(1) > len(tok.encode(cfg.begin))                         # not what was put there
        kls += (logp_ratio * drawn).sum(1).tolist()
        once = distinct(records)
        likeliest = judge(once, answer(model, once, 0, cfg, tok, amp))[0].tolist()
        theirs = baseline.setdefault((family, "greedy"), likeliest)
        greedy += likeliest
        greedy_wins += [preference(a, b) for a, b in zip(likeliest, theirs)]
    row |= dict(win=mean(wins), interval=wilson(sum(wins), len(wins)), length=mean(lengths))
    if cfg.temperature:
        row |= dict(kl=mean(kls), greedy=mean(greedy), greedy_win=mean(greedy_wins),
                    greedy_interval=wilson(sum(greedy_wins), len(greedy_wins)))
    if proxy:
        row["proxy"] = mean(proxies)
    return row, answers


def compare(cfg, folders):
    """Let every checkpoint answer the same prompts, judge the answers, print one table, and return its rows.

    The column nll is the mean -log π per token of fresh pretraining documents; greedy, the score of the likeliest
    answer to each distinct prompt of --on, and how often it wins: what is left of a gain without the sampling. The
    interval is that of other samples to these prompts, of which a few may come again and again, not of other prompts.
    Greedy answers have no KL, and one to the same prompt is the same: with --temperature 0 each prompt comes once.
    """
    tok = Tokenizer.load(cfg.tokenizer)
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    families = family_list(cfg.families) if cfg.data == "toy" else ["file"]
    on = family_list(cfg.on) if cfg.on else ["write"] if "write" in families else families
    on = on if cfg.data == "toy" else families
    if not set(on) <= set(families):
        raise OptionError(f"--on {cfg.on}: not among --families {cfg.families}")
    judge, proxy = (Reward(spec, tok, device, amp, cfg.micro_tokens) if spec else None
                    for spec in (cfg.judge, cfg.proxy))
    first = load_model(folders[0], tok, device, n_scores=0)
    tasks = test_prompts(cfg, families, tok, first.config.block_size)
    for reward in [judge] + [proxy] * bool(proxy):
        reward.meet([record for records in tasks.values() for record in records], cfg.data)
    rng = random.Random("compare documents")
    texts = [toy_record("text", "test", families, rng) for _ in range(cfg.n)] if cfg.data == "toy" else []
    asked = {family: len(distinct(records)) for family, records in tasks.items()}

    baseline, table, answers = {}, [], {}
    for folder in folders:
        model = load_model(folder, tok, device, n_scores=0)
        row, answers[folder] = measured(model, first, tasks, on, baseline, judge, proxy, cfg, tok, amp)
        if texts:
            row["nll"] = pretraining_nll(model, texts, tok, amp, cfg.micro_tokens)
        if cfg.samples > 1:
            row |= at_k(model, [r for family in on for r in tasks[family]], judge, proxy, cfg, tok, amp)
        if "safe" in families:
            row |= safety(tasks["safe"], answers[folder]["safe"])
        table.append(dict(checkpoint=folder, distinct=asked) | row)

    show_table(table, families, on, len(tasks[families[0]]), cfg)
    for i, record in enumerate(tasks[on[0]][:cfg.show]):
        print(f"\n{record['prompt'][-1]['content']}")
        for folder in folders:
            text, score, _ = answers[folder][on[0]][i]
            print(f"  {folder:{max(map(len, folders))}}  {score:>6.2f}  {text}")
    if cfg.save:
        write_text(cfg.save, json.dumps(table, indent=1))
    return table


def show_table(table, families, on, count, cfg):
    """Print the rows of compare: scores, wins and the rest; of safety; of several samples."""
    first, asked, wide = table[0]["checkpoint"], table[0]["distinct"], max(len(row["checkpoint"]) for row in table)
    where, of_each = "held-out " * (cfg.data == "toy"), ", ".join(f"{family} {n}" for family, n in asked.items())
    if cfg.temperature:
        what, also = f"{count} {where}prompts a family, distinct: {of_each}", "KL, length and greedy answers"
        tail = [("KL", "kl", ".2f"), ("length", "length", ".1f"), ("greedy", "greedy", ".3f"),
                ("win", "greedy_win", ".3f")]
    else:
        what, also, tail = f"greedy answers to {where}prompts: {of_each}", "length", [("length", "length", ".1f")]
    print(f"{cfg.judge} on {what}\nwin rate against {first}, {also} on {','.join(on)}\n")
    titles = families + [name for name in ("nll", "proxy") if name in table[0]] + ["win"]
    print(f"{'':{wide}}" + "".join(f"{title:>8}" for title in titles) + "  [95% interval]"
          + "".join(f"{title:>8}" for title, *_ in tail))
    for row in table:
        cells = "".join(f"{row[title]:>8.3f}" for title in titles)
        low, high = row["interval"]
        rest = "".join(f"{row[key]:>8{form}}" for _, key, form in tail)
        print(f"{row['checkpoint']:{wide}}{cells}  [{low:.3f}, {high:.3f}]{rest}")
    if "safe" in families:
        print(f"\n{'':{wide}}   harmless  over-refusal    help")
        for row in table:
            print(f"{row['checkpoint']:{wide}}{row['harmless']:>11.3f}{row['over_refusal']:>14.3f}{row['help']:>8.3f}")
    if cfg.proxy and len(table) > 2:
        best = max(table, key=lambda row: mean([row[family] for family in on]))
        liked = max(table, key=lambda row: row["proxy"])
        print(f"\n{cfg.judge} would pick {best['checkpoint']}, {cfg.proxy} {liked['checkpoint']}")
    for name in ("pass", "maj", "best"):
        ks = [key for key in table[0] if key.startswith(name + "@")]
        if ks:
            print(f"\n{'':{wide}}" + "".join(f"{key:>9}" for key in ks))
            for row in table:
                print(f"{row['checkpoint']:{wide}}" + "".join(f"{row[key]:>9.3f}" for key in ks))


COMMANDS = {"train": (Train, train), "label": (Label, label), "revise": (Revise, revise), "curate": (Curate, curate),
            "fit": (Fit, fit), "accuracy": (Accuracy, accuracy), "overoptimize": (Overoptimize, overoptimize),
            "compare": (Compare, compare)}
TAKES = dict(compare=["checkpoint", "checkpoint..."], accuracy=["reward", "reward..."], overoptimize=["run..."])


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        return print(f"{__doc__}\n--help after a command lists its options: {', '.join(COMMANDS)}")
    if name not in COMMANDS:
        print(__doc__)
        raise OptionError(f"say what to do: python reward.py {'|'.join(COMMANDS)} (--help after it lists its options)")
    Config, run = COMMANDS[name]
    if name in TAKES:
        run(*parse(Config, TAKES[name], sys.argv[2:], name))
    else:
        run(parse(Config, argv=sys.argv[2:], name="reward" if name == "train" else name))


if __name__ == "__main__":
    guard(main)
