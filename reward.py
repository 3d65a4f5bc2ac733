"""Where a score or a preference comes from: label responses, train a reward model, compare policies.

    minimise  -log σ(r(x, y_w) - r(x, y_l) - m)      over pairs in which y_w was preferred

A reward model is the SFT model with one number per token instead of logits, read at the last token of the response.
Under Bradley-Terry, P(y_w ≻ y_l) = σ(r_w - r_l), the loss is the negative log-likelihood of the labels (Christiano
et al. 1706.03741; Stiennon et al. 2009.01325). Of K ranked responses all C(K, 2) pairs are used, in one batch element
and weighted 1 / C(K, 2) (InstructGPT 2203.02155, eq. 1). --loss chooses another likelihood of a pair (PAIR_LOSSES), or
of a whole ranking, or of ratings. Options: a margin m from ratings (Llama 2, 2307.09288), a pull of r_w + r_l towards 0
(2312.09244), a wall at ±5 (COOL).

    python reward.py label                        sample pairs from out/sft, label them -> out/pairs/pairs.jsonl
    python reward.py label --judge out/judge      the same, with an AI's labels (RLAIF)
    python reward.py train                        out/sft + pairs -> out/reward
    python reward.py accuracy out/reward          how often it orders the pairs of a file as the labels do
    python reward.py compare out/sft out/ppo      gold reward, win rate, KL, length on held-out prompts

What one system alone needs is beside its recipe, as configs/process_rewards.py, which judges each step of an answer.

On the toy world the labels are Bradley-Terry draws from the gold reward with a tenth flipped, so the learned reward
is an imperfect proxy by construction, and both can be watched.
"""
import itertools
import json
import math
import random
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from data import (PRINCIPLES, REASON, RULE, VERDICT, Count, Families, Natural, NonNegative, OptionError, Options,
                  Positive, Range, Run, RunConfig, Share, Sum, Temperature, Tokenizer, TrainConfig, UserError,
                  after_thinking, bar, code_of, collate, column, cut_prompt, digest, encode, family_list, files, guard,
                  has_room, inputs_of, item_batches, judge_prompt, late_rows, mean, micro_batches, next_out,
                  open_stream, parse, read_records, safe_metrics, send, toy_record, write_text)
from model import (Optimizer, Reward, Rollout, choice_logprobs, full, generate, load_model, logps, respond,
                   response_scores, seed_step, setup, shift_score, steps, token_logprobs)


@dataclass
class Train(TrainConfig):
    """Train a reward model on preferences."""
    out: str = "out/reward"     # folder of the run; the same command continues an interrupted one
    init: str = "out/sft"       # checkpoint to start from; the score head starts at 0
    data: str = "out/pairs/pairs.jsonl"  # preferences: pairs or rankings
    # the loss
    loss: Literal["bt", "focal", "soft", "cost", "plackett_luce", "ratings"] = "bt"  # see the mathematics
    margin: bool = False        # bt: use the margin of records that have one (Llama 2)
    gamma: NonNegative = 2.0    # focal: how little pairs count that are ordered right
    heads: Count = 1            # scores of the model; ratings: one for each attribute, the first is the reward
    center: NonNegative = 0.0   # weight of mean (r_w + r_l)²; .01 keeps scores near 0
    barrier: NonNegative = 0.0  # weight of a wall that keeps scores within ±5 (COOL: .02)
    # optimisation
    epochs: Positive = 1.0      # passes over the records
    steps: Natural = 0          # updates; 0: what the epochs take
    batch: Count = 32           # records an update
    lr: Positive = 1e-3         # peak learning rate of AdamW
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, AdamW for the rest
    muon_lr: Positive = 0.003   # peak learning rate of Muon
    weight_decay: NonNegative = 0.1  # on matrices
    warmup: Natural = 10        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 100     # updates between evaluations on held-out records

    def __post_init__(self):
        super().__post_init__()
        if self.data == "toy":
            raise OptionError("--data toy: preferences come from a file; python reward.py label makes one")
        goes_with = dict(margin=["bt"], heads=["ratings"], center=PAIR_LOSSES, barrier=PAIR_LOSSES)
        for option, losses in goes_with.items():
            used = getattr(self, option) != getattr(Train, option)
            if used and self.loss not in losses:
                raise OptionError(f"--{option} goes with --loss {', '.join(losses)}, not {self.loss}")


@dataclass
class Label(RunConfig):
    """Sample responses from a policy and rank them; one JSON line a prompt, best response first."""
    out: str = "out/pairs"      # folder of the run; the records are in its pairs.jsonl
    policy: str = "out/sft"     # checkpoint that answers; none: the responses are in the data
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "write"  # of the toy world, comma-separated
    n: Count = 5000             # prompts
    skip: Natural = 0           # prompts to pass over first, in whole batches: a later round sees others
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
    rationale: bool = False     # let it say why before the verdict
    clamp: Annotated[float, Range(0.5, 1)] = 1.0  # most certain soft label (Constitutional AI: .6 after a rationale)
    # what is kept
    select: Literal["rank", "ends", "rso", "all", "best", "correct"] = "rank"  # rankings; or answers by themselves
    min_gap: NonNegative = 0.0  # rankings: least difference between the scores of first and last
    rso_beta: Positive = 0.5    # rso: a response is accepted with probability exp((score - best score) / this)

    def __post_init__(self):
        super().__post_init__()
        if self.k < 2 and self.policy:
            raise OptionError(f"--k {self.k}: a preference needs at least 2 responses")
        if not self.policy and self.data == "toy":
            raise OptionError("--policy: none, so --data must name files with responses")
        if self.judge and (self.select not in ("rank", "ends") or self.min_gap):
            raise OptionError(f"--judge: it orders responses; no --select {self.select}, no --min_gap")
        if not self.judge and (self.rationale or not self.by):
            raise OptionError("--judge: none, so --by must decide, and there is no --rationale")


@dataclass
class Report(Options):
    """The options of what only prints a table."""
    seed: Natural = 0           # of the sampling
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # of the matmuls
    threads: Natural = 0        # CPU threads; 0 leaves it to PyTorch
    micro_tokens: Count = 8192  # padded tokens a forward pass may hold
    skip_bad: bool = False      # leave out the rows of a file that cannot be understood, and count them


@dataclass
class Accuracy(Report):
    """How often do reward models, judges and verifiers order the pairs of files as the files do?"""
    data: str = "out/pairs/pairs.jsonl"  # preferences; of several files, with commas between, a table each
    n: Count = 1000             # records of each file
    seed: Natural = 0           # of nothing here; recipes give it to every stage
    save: str = ""              # a JSON file for the tables


@dataclass
class Compare(Report):
    """Compare policies on held-out prompts; the first is the baseline."""
    data: str = "toy"           # prompts: toy, or a file
    split: Literal["test", "val"] = "test"  # of the toy world's prompts; val is for choosing settings
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
    save: str = ""              # a JSON file for the table; rows that it has already are not made again

    def __post_init__(self):
        super().__post_init__()
        if self.data != "toy" and self.split != "test":
            raise OptionError(f"--split {self.split}: of the toy world's prompts, and --data names files")
        if self.data == "toy" and self.on:
            unasked = set(family_list(self.on)) - set(family_list(self.families))
            if unasked:
                raise OptionError(f"--on {self.on}: not among --families {self.families}")


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
    log_wrong = (math.log(2) + F.logsigmoid(r_l - r_w)).clamp(max=0)  # of 1 - 2 max(0, p - ½), which can round to 0
    return (gamma * log_wrong).exp() * bradley_terry(r_w, r_l)


def log_barrier(r, bound=5.0):
    """-log(bound - r) - log(bound + r): a wall on both sides (2403.17297, eq. 2). r is clamped just inside it, where
    the gradient ends: a score beyond the wall is not pulled back."""
    r = r.clamp(-bound + 1e-3, bound - 1e-3)
    return -(bound - r).log() - (bound + r).log()


def plackett_luce(r):
    """-log P of a ranking, scores (K,) best first: each is chosen among those left (Zhu et al. 2301.11270, K-wise)."""
    return (r.flip(0).logcumsumexp(0).flip(0) - r).sum()


def debiased(one, two):
    """P(first ≻ second) from a judge's P("1") when the first came first, and when it came second: a bias for a place
    favours neither (RLAIF 2309.00267, sec. 2.1): label(A, B) + label(B, A) is 1."""
    return (one + 1 - two) / 2


def ranked_pairs(sizes):
    """All pairs of rankings laid end to end, best first: winner index, loser index, weight 1 / C(K, 2) of each."""
    win, lose, weight, start = [], [], [], 0
    for k in sizes:
        for i, j in itertools.combinations(range(start, start + k), 2):
            win.append(i)
            lose.append(j)
            weight.append(2 / (k * (k - 1)))
        start += k
    return win, lose, torch.tensor(weight)


def calibration_error(margins, bins=10):
    """Expected calibration error of P = σ(|margin|): mean over bins of |confidence - share right|, by their size.

    margins (P,) are r_w - r_l. 0 is perfect; a model of 90% confidence that is right 70% of the time scores .2.
    """
    confidence = torch.sigmoid(margins.abs())
    right = (margins > 0).float()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    error = 0.0
    for b in place.unique():
        here = place == b
        gap = confidence[here].mean() - right[here].mean()
        error += float(gap.abs()) * int(here.sum())
    return error / len(margins)


def wilson(wins, n, z=1.96):
    """95% interval of a proportion (Wilson 1927); unlike wins/n ± 1.96 s, right also near 0 and 1."""
    p, z2 = wins / n, z * z / n
    middle = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return middle - half, middle + half


def preference(a, b):
    """1 if score a beats score b, ½ for a tie, 0 if it loses."""
    return 0.5 if a == b else float(a > b)


def in_order(lead):
    """The same of many: r_w - r_l of pairs (P,) -> (P,)."""
    return 0.5 + 0.5 * lead.sign()


def best_first(values):
    """Indices, of the largest value first; equals keep their order."""
    return sorted(range(len(values)), key=lambda i: -values[i])


def rank(scores, scale, flip, rng):
    """Indices best first: a Plackett-Luce draw at scale * score (of two, Bradley-Terry), upside down with
    probability flip. Scale 0 ranks by score alone."""
    keys = []
    for score in scores:
        noise = -math.log(-math.log(rng.random() or 1e-300))  # Gumbel: sorting by scale * score + noise draws it
        keys.append(scale * score + noise if scale else score)
    order = best_first(keys)
    return order[::-1] if rng.random() < flip else order


def win_rates(scores):
    """P(y_i ≻ another of the group), with Bradley-Terry on the scores; they sum to K / 2 (SPPO, 2405.00675, sec. 4)."""
    rates = []
    for a in scores:
        wins = sum(1 / (1 + math.exp(min(b - a, 700))) for b in scores) - 0.5  # without that over itself
        rates.append(wins / max(1, len(scores) - 1))
    return rates


def pass_at_k(n, right, k):
    """Chance that one of k answers is right, estimated from n of which `right` are: 1 - C(n - c, k) / C(n, k), unbiased
    (Chen et al. 2107.03374, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def best_of_k(scores, proxies, k):
    """Expected score of the answer that `proxies` likes best among k of these n, drawn at random: the i-th from the top
    is chosen if the other k - 1 all lie below it. Of equal proxies the first counts as best."""
    total, below = 0.0, len(scores)
    for i in best_first(proxies):
        below -= 1
        total += math.comb(below, k - 1) * scores[i]
    return total / math.comb(len(scores), k)


def majority_at_k(answers, scores, k):
    """Expected score of the commonest answer among k (self-consistency, Wang et al. 2203.11171), over consecutive parts
    of the n: the mean score of those that gave it. Ties share, None is no vote."""
    out = []
    for start in range(0, len(answers) - k + 1, k):
        part = answers[start:start + k]
        votes = Counter(part)
        del votes[None]
        most = max(votes.values(), default=0)
        won = [score for said, score in zip(part, scores[start:]) if votes[said] == most > 0]
        out.append(mean(won) or 0.0)
    return mean(out)


# ---------------------------------------------------------------- answers

@dataclass
class Answer:
    """An answer to a prompt, and what is known of it."""
    text: str
    score: float            # what the reward says
    tokens: float = 0       # how many, the end token included
    finished: bool = True   # whether it came to its end
    proxy: float = 0.0      # what another reward says, if one was asked


def answers(policy, records, k, cfg, reward, proxy=None, begin=()):
    """Sample k answers to the prompt of each record, and score them -> a group of k Answers for each record, and the
    Rollout (P * k rows) that they are read from. label, compare and the scripts beside recipes ask in this way."""
    roll = respond(policy, records, cfg, k, begin=begin)
    return scored(records, [k] * len(records), roll, reward, proxy), roll


def scored(records, sizes, roll, reward, proxy=None):
    """The rows of a rollout as Answers, in a group for each record: as many as sizes says. No reward: scores of 0."""
    repeated, groups = repeat(records, sizes), []
    scores = totals(reward, repeated, roll)
    liked = totals(proxy, repeated, roll)
    tokens = roll.mask.sum(1).tolist()
    rows = zip(roll.responses(), scores, tokens, roll.finished.tolist(), liked)
    for size in sizes:
        group = [Answer(*row) for row in itertools.islice(rows, size)]
        groups.append(group)
    return groups


def each(answers, name):
    """What is known of Answers under a name, as a list."""
    return [getattr(answer, name) for answer in answers]


def totals(reward, records, roll):
    """What a reward says of every response of a rollout, as a list; 0 without one."""
    if not reward:
        return [0.0] * len(records)
    total, _ = reward(records, roll)
    return total.tolist()


def counts(records, key):
    """How many things each record has under a key."""
    return [len(record[key]) for record in records]


def repeat(records, sizes):
    """Each record as often as it has responses."""
    repeated = []
    for record, size in zip(records, sizes):
        repeated += [record] * size
    return repeated


def given_responses(records, reward, like):
    """The responses of records as a rollout, cut to the context of the models that judge them."""
    models = reward.loaded.values() if reward else ()
    block = min([model.config.block_size for model in models], default=10 ** 9)
    rows = []
    for record in records:
        rows += encode(record, like.tok, block)
    return Rollout.of(rows, like.tok, like.device)


def with_system(record, message):
    """The record with a system message in front of its prompt."""
    turn = dict(role="system", content=message)
    return record | dict(prompt=[turn, *record["prompt"]])


def write_records(path, records):
    """Write JSONL, atomically."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def pick(values, order):
    """Some of the values, in an order of indices."""
    return [values[i] for i in order]


# ---------------------------------------------------------------- label: what is kept

RANKINGS = ("rank", "ends", "rso")  # selections in which the answers stay together, best first


def kept(group, cfg, rng):
    """What --select keeps of the answers to one prompt: the keys of some records.

    rank: all, best first as the labels have it. ends: its first and last. rso: a ranking of those that statistical
    rejection sampling accepts. all: every answer by itself. best: that of the highest score (best-of-n, rejection
    sampling). correct: all that are right, that is, of a score above .5.
    """
    if cfg.select in RANKINGS:
        return ranking(group, cfg, rng)
    right = [answer for answer in group if answer.score > 0.5]
    best = sorted(group, key=lambda answer: -answer.score)[:1]
    chosen = dict(all=group, best=best, correct=right)[cfg.select]
    return [dict(response=answer.text, scores=[answer.score]) for answer in chosen]


def ranking(group, cfg, rng):
    """The answers in the order of a noisy label, or the ends of it, unless their scores are too close."""
    if cfg.select == "rso":
        group = accept(group, cfg.rso_beta, rng)
    if len(group) < 2:
        return []
    scores = each(group, "score")
    order = rank(scores, cfg.scale, cfg.flip, rng)
    ends = [order[0], order[-1]]
    best, worst = pick(scores, ends)
    if abs(best - worst) < cfg.min_gap:
        return []
    order = ends if cfg.select == "ends" else order
    wins = pick(win_rates(scores), order)
    return [dict(responses=pick(each(group, "text"), order), scores=pick(scores, order), win=wins)]


def accept(group, beta, rng):
    """Statistical rejection sampling: the answers to one prompt that are accepted, each with probability
    exp((r - r_max) / β) (RSO, 2309.06657, alg. 1). Samples of π so become samples of π exp(r / β) / Z, if the group
    has the best of all answers."""
    most, out = max(each(group, "score"), default=0.0), []
    for answer in group:
        if rng.random() < math.exp((answer.score - most) / beta):
            out.append(answer)
    return out


def usable(group, untied=False):
    """The finished answers of a group, no text twice; untied: and no score twice."""
    said = [answer for answer in group if answer.finished and answer.text.strip()]
    said = unique(said, "text")
    return unique(said, "score") if untied else said


def unique(answers, name):
    """Of answers that have the same under a name the first, in the place of the last."""
    first = {}
    for answer in reversed(answers):
        first[getattr(answer, name)] = answer
    return list(first.values())[::-1]


# ---------------------------------------------------------------- label: AI feedback

def questions(records, groups, cfg, rng):
    """What the judge is asked: which of every two answers is better, each twice, in both orders."""
    ending = REASON if cfg.rationale else VERDICT
    asked = []
    for record, group in zip(records, groups):
        prompt = record["prompt"][-1]["content"]
        for a, b in itertools.combinations(group, 2):
            preamble = rng.choice(PRINCIPLES) if cfg.preamble == "principles" else cfg.preamble
            asked.append(judge_prompt(prompt, a.text, b.text, preamble, ending=ending))
            asked.append(judge_prompt(prompt, b.text, a.text, preamble, ending=ending))
    return asked


def give_reasons(judge, prompts, cfg):
    """The questions with what the judge says first, without its verdict, which is scored and not sampled; and the share
    of those that did not end. A question that leaves no room loses its beginning."""
    room, out, cut = judge.config.block_size - cfg.max_new, [], []
    prompts = [cut_prompt(ids, judge.tok, room) for ids in prompts]
    for start in range(0, len(prompts), 256):
        some = prompts[start:start + 256]
        roll = generate(judge, some, cfg.max_new, temperature=0)
        for ids, text in zip(some, roll.responses()):
            reason, line, _ = text.rpartition("\n")
            out.append(ids + judge.tok.encode((reason or text) + "\n"))
            cut.append(float(not line))
    return out, mean(cut)


def first_is_better(judge, asked, cfg):
    """P(the judge says 1) of questions -> (N,); with --rationale it gives one first, and the share of those that did
    not end."""
    prompts, cut = [], None
    for text in asked:
        prompts.append(judge.tok.prompt([dict(role="user", content=text)]))
    if cfg.rationale:
        prompts, cut = give_reasons(judge, prompts, cfg)
    logp = choice_logprobs(judge, prompts, ["1", "2"], cfg.micro_tokens)                 # (N, 2)
    return logp[:, 0].exp(), cut


def judged(judge, records, groups, cfg, rng):
    """Order each group's answers by how often the judge prefers them to the others, every two in both orders; of two,
    also the soft label -> the records' keys of each group, metrics."""
    asked = questions(records, groups, cfg, rng)
    if not asked:
        return [[] for _ in groups], {}
    p_first, cut = first_is_better(judge, asked, cfg)
    one, two = p_first.view(-1, 2).unbind(1)                                             # (pairs,)
    p = debiased(one, two).clamp(1 - cfg.clamp, cfg.clamp)
    chances, out, agrees = iter(p.tolist()), [], []
    for group in groups:
        wins, soft = [0.0] * len(group), {}
        for i, j in itertools.combinations(range(len(group)), 2):
            chance = next(chances)
            soft[i, j] = chance
            soft[j, i] = 1 - chance
            wins[i] += chance
            wins[j] = wins[j] + 1 - chance
            gap = group[i].score - group[j].score
            if gap:  # --by tells them apart, too
                agrees.append(preference((chance - 0.5) * gap, 0))
        out.append(by_wins(group, wins, soft, cfg))
    inconsistent = ((one > 0.5) == (two > 0.5)).float().mean()
    return out, dict(agrees=mean(agrees), inconsistent=inconsistent, cut=cut)


def by_wins(group, wins, soft, cfg):
    """The ranking of a group by wins over the others; soft: P(i ≻ j) of every two."""
    if len(group) < 2:
        return []
    order = best_first(wins)
    if cfg.select == "ends":
        order = [order[0], order[-1]]
    rates = [win / (len(group) - 1) for win in wins]
    record = dict(responses=pick(each(group, "text"), order), win=pick(rates, order))
    if len(order) == 2:
        record["prob"] = soft[order[0], order[1]]
    return [record]


# ---------------------------------------------------------------- label: the steps

def open_records(cfg, tok, policy):
    """The prompts to answer, a Stream, or without a policy the records with their responses; without those whose prompt
    leaves no room for a whole response."""
    room = policy.config.block_size - cfg.max_new if policy else math.inf

    def prepare(record):
        if cfg.system:
            record = with_system(record, cfg.system)
        return [record] if has_room(record["prompt"], tok, room) else []
    kind = "prompt" if policy else "preference"
    stream, _ = open_stream(cfg.data, kind, cfg.seed, cfg.families, n_held=0, prepare=prepare, skip_bad=cfg.skip_bad)
    return stream


def answered(policy, records, score, like, cfg):
    """Of each record the Answers to its prompt, sampled or (without a policy) its own, those that can be used; and
    metrics."""
    if policy:
        groups, roll = answers(policy, records, cfg.k, cfg, score)
    else:
        roll = given_responses(records, score, like)
        groups = scored(records, counts(records, "responses"), roll, score)
    scores = each(itertools.chain(*groups), "score")
    length, finished = roll.mask.sum(1).mean(), roll.finished.float().mean()
    metrics = dict(score=mean(scores), response_length=length, finished=finished)
    scores_decide = cfg.select in RANKINGS and not cfg.judge and not cfg.scale
    return [usable(group, scores_decide) for group in groups], metrics


EARLIER = ("responses", "scores", "win", "margin", "prob")  # what an earlier label said


def labelled(record, keys, source):
    """A record of pairs.jsonl: the prompt's own keys, without what an earlier label said, and the new ones."""
    own = {key: value for key, value in record.items() if key not in EARLIER}
    return own | keys | dict(source=source)


def summary(made, rows, cfg):
    """What there is to say about the labels, each as a share: made the records, rows the log."""
    told = dict(agrees=f"the judge agrees with {cfg.by}", cut="its rationale was cut",
                inconsistent="it contradicts itself, when the two change places,")
    shares = {"the label agrees with the score": []}
    for record in made:
        if "responses" in record and "scores" in record:
            agrees = preference(record["scores"][0], record["scores"][-1])
            shares["the label agrees with the score"].append(agrees)
    for name, what in told.items():
        shares[what] = [row[name] for row in rows if row.get(name) is not None]
    words = ""
    for what, values in shares.items():
        words += f"; {what} in {mean(values):.0%}" if values else ""
    return words


def what_next(made, path, cfg):
    """The words of the command that learns from the labels."""
    words = ["sft.py", "--out", f"{cfg.out}_sft"]
    if "responses" in made[0]:
        words = ["reward.py", "train", "--out", next_out(cfg, "reward")]
    words += ["--data", path]
    return words + ["--init", cfg.policy] if cfg.policy else words


def language_model(folder, like):
    """A policy or a judge; none without a folder."""
    return load_model(folder, like, n_scores=0, maker="python sft.py") if folder else None


def label(cfg):
    """Sample k responses to each prompt, score and rank them, and write pairs.jsonl."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    policy, judge = language_model(cfg.policy, like), language_model(cfg.judge, like)
    score = Reward(cfg.by, like, cfg.micro_tokens) if cfg.by else None
    stream = open_records(cfg, run.tok, policy)
    if score:
        score.check(stream.some(), cfg.data)
    skip, n = math.ceil(cfg.skip / cfg.batch), cfg.n  # skip: batches
    if stream.items:
        n = min(n, len(stream.items) - skip * cfg.batch)  # a file's prompts once each
    source = "ai" if judge or cfg.by != "gold" else "human"  # the truth with noise stands for people
    path, part = run.folder / "pairs.jsonl", run.folder / "unfinished.json"
    start, made = 0, []
    if run.left(part.name):
        start, made = json.loads(part.read_text(encoding="utf-8"))

    for step in run.progress(start, math.ceil(n / cfg.batch)):
        seed_step(cfg.seed, step)
        rng = random.Random(f"labels {cfg.seed} {step}")

        # 1. Sample answers to each prompt, and score them.
        records = stream.batch(step + skip, cfg.batch)[:n - step * cfg.batch]
        groups, metrics = answered(policy, records, score, like, cfg)

        # 2. Order them, by their scores or by a judge, and choose what is kept.
        if judge:
            chosen, more = judged(judge, records, groups, cfg, rng)
            metrics |= more
        else:
            chosen = [kept(group, cfg, rng) for group in groups]

        # 3. Make records of it.
        for record, several in zip(records, chosen):
            made += [labelled(record, keys, source) for keys in several]
        run.log(step, ("records",), records=len(made), **metrics)
        if (step + 1) % cfg.save_every == 0:
            write_text(part, json.dumps([step + 1, made]))

    if not made:
        raise UserError(f"{cfg.policy or cfg.data}: of {n} prompts none got answers that --select {cfg.select} keeps")
    write_records(path, made)
    print(f"{path}: {len(made)} records of {n} prompts{summary(made, run.rows, cfg)}")
    part.unlink(missing_ok=True)
    return run.finish(("score", "response_length"), what_next(made, path, cfg))


# ---------------------------------------------------------------- train: what is learned from

def items_of(record, tok, block):
    """The item of a record, in a list: the rows of its responses, and what the data says of them."""
    item = dict(rows=late_rows(record, tok, block))
    for key in ("ratings", "margin", "scores", "prob", "source"):
        if key in record:
            item[key] = record[key]
    return [item]


def check_items(items, cfg):
    """A UserError if the loss needs what the records do not have."""
    for item in items:
        if cfg.loss == "cost" and "scores" not in item:
            raise UserError(f'{cfg.data}: --loss cost needs "scores" in all records: above 0 is harmful')
        if cfg.loss == "soft" and "prob" not in item and item.get("source") != "human":
            raise UserError(f'{cfg.data}: --loss soft needs "prob" in all records but those whose "source" is "human"')
        if cfg.loss == "ratings" and len(item["ratings"]) != cfg.heads:
            raise UserError(f"{cfg.data}: --heads {cfg.heads}, but a record has {len(item['ratings'])} ratings")
    if cfg.margin and not any("margin" in item for item in items):
        raise UserError(f'{cfg.data}: --margin, and no record has a "margin"')


# ---------------------------------------------------------------- train: the steps

def score_records(model, items, cfg):
    """Yield (scores (N, heads), items) by micro-batch; all N responses of an item are in the same one."""
    for part in item_batches(items, cfg.micro_tokens):
        tokens, mask = collate(column(part, "rows"), model.tok, model.device)
        yield full(response_scores(model, tokens, mask)), part


def pair_terms(scores, items, use_margin=False):
    """Scores (N,) of items laid end to end -> x of PAIR_LOSSES, weight 1 / C(K, 2), place of the item, and gap, by how
    much the true scores differ, 0 where they are not known; all (P,)."""
    sizes = counts(items, "rows")
    win, lose, weight = ranked_pairs(sizes)
    place, true, prob, margin = [], [], [], []
    for i, item in enumerate(items):
        n = math.comb(sizes[i], 2)
        place += [i] * n
        true += item.get("scores") or [0.0] * sizes[i]
        prob += [item.get("prob", 1.0)] * n
        margin += [use_margin and item.get("margin") or 0.0] * n
    true = torch.tensor(true, dtype=torch.float64)                                       # (N,)
    harmful = torch.where(true > 0, 1.0, -1.0)
    x = SimpleNamespace(gap=true[win] - true[lose])  # on the CPU, where it is read
    x.s_w, x.s_l = tensor_like(scores, harmful[win]), tensor_like(scores, harmful[lose])
    x.prob, x.margin, x.weight = (tensor_like(scores, numbers) for numbers in (prob, margin, weight))
    win, lose, x.place = (send(torch.tensor(list_, dtype=torch.long), scores.device) for list_ in (win, lose, place))
    x.r_w, x.r_l = scores[win], scores[lose]
    return x


def tensor_like(scores, numbers):
    """Numbers as a tensor of the scores' type, where they are."""
    return send(torch.as_tensor(numbers, dtype=scores.dtype), scores.device)


def item_losses(scores, items, cfg):
    """Scores (N, heads) of items laid end to end -> the loss of each item (n,)."""
    if cfg.loss == "ratings":  # regression on every attribute, HelpSteer2 2406.08673
        ratings = tensor_like(scores, column(items, "ratings")).view_as(scores)
        return (scores - ratings).square().mean(1)
    scores = scores[:, 0]
    if cfg.loss == "plackett_luce":
        return torch.stack([plackett_luce(part) for part in scores.split(counts(items, "rows"))])
    x = pair_terms(scores, items, cfg.margin)
    losses = PAIR_LOSSES[cfg.loss](x, cfg) + cfg.center * (x.r_w + x.r_l) ** 2           # (P,)
    if cfg.barrier:
        losses = losses + cfg.barrier * (log_barrier(x.r_w) + log_barrier(x.r_l))
    return losses.new_zeros(len(items)).index_add(0, x.place, x.weight * losses)


def order_metrics(scores, items):
    """Sums over items (n): the share of an item's pairs that are in order, and by how much the better one leads."""
    x = pair_terms(scores.detach()[:, 0], items)
    lead = x.r_w - x.r_l                                                                 # (P,)
    right, margin = x.weight * in_order(lead), x.weight * lead
    return dict(accuracy=right.sum(), margin=margin.sum())


@torch.no_grad()
def evaluate(model, items, cfg):
    """Held-out loss and mean score. Of pairs: accuracy on the labels and on the scores where records have them,
    calibration. Of ratings: the share of each one's variance that is explained."""
    losses, scores, seen = [], [], []
    for some, part in score_records(model, items, cfg):
        losses += item_losses(some, part, cfg).tolist()
        scores.append(some)
        seen += part
    scores = torch.cat(scores)                                                           # (N, heads)
    metrics = dict(val_loss=mean(losses), val_mean=mean(scores[:, 0].tolist()))
    if cfg.loss == "ratings":
        ratings = tensor_like(scores, column(seen, "ratings")).view_as(scores)           # (n, heads)
        left = (scores - ratings).square().mean(0)                                       # (heads,)
        spread = ratings.var(0, correction=0)
        for attribute, share in enumerate(left / spread.clamp(min=1e-8)):
            metrics[f"val_r2/{attribute}"] = 1 - float(share)
        return metrics
    x = pair_terms(scores[:, 0], seen)
    lead = (x.r_w - x.r_l).cpu()                                                         # (P,)
    agrees = (lead > 0) == (x.gap > 0)
    metrics["val_accuracy"] = mean(in_order(lead).tolist())
    metrics["val_gold"] = mean(agrees[x.gap != 0].float().tolist())
    metrics["calibration_error"] = calibration_error(lead)
    if cfg.loss == "cost":
        signs = torch.cat([x.r_w * x.s_w > 0, x.r_l * x.s_l > 0])
        metrics["val_sign"] = mean(signs.float().tolist())
    return metrics


def train(cfg):
    """Fit the scores to the preferences; at the end their held-out mean is put at 0, where only differences count."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    model = load_model(cfg.init, like, n_scores=cfg.heads, maker="python sft.py").prepare(cfg)
    tok, block, paired = model.tok, model.config.block_size, cfg.loss != "ratings"
    stream, held = open_stream(cfg.data, "preference" if paired else "ratings", cfg.seed, n_held=400,
                               context=(tok, block), skip_bad=cfg.skip_bad,
                               prepare=lambda record: items_of(record, tok, block))
    check_items(stream.items + held, cfg)
    total = stream.updates(cfg)
    optimizer = Optimizer(model, cfg.lr, total, cfg.optimizer, cfg.muon_lr, cfg.weight_decay, warmup=cfg.warmup,
                          clip=cfg.clip_grad)

    for step in steps(run, total, dict(model=model), dict(model=optimizer), {}, cfg.save_every):
        # 1. Score every response of the batch, and step towards the order of the labels.
        items, metrics = stream.batch(step, cfg.batch), defaultdict(float)
        for scores, part in score_records(model, items, cfg):
            loss = item_losses(scores, part, cfg).sum() / len(items)
            loss.backward()
            metrics["loss"] += loss.detach()
            if paired:
                for name, value in order_metrics(scores, part).items():
                    metrics[name] += value / len(items)
        metrics |= optimizer.step(step)

        # 2. Look at the records held out.
        last = step + 1 == total
        if run.evaluates(step):
            metrics |= evaluate(model, held, cfg)

        # 3. Only differences were trained: 0 is to read "as good as usual".
        if last and cfg.loss not in ("cost", "ratings") and not cfg.barrier:
            shift_score(model, -metrics["val_mean"])
        run.log(step, ("loss", "accuracy", "val_accuracy"), **metrics)

    then = ["ppo.py", "--init", cfg.init, "--reward", cfg.out, "--out", next_out(cfg, "ppo")]
    if cfg.tokenizer != "toy":
        then += ["--data", cfg.data]  # its prompts
    return run.finish(("loss", "accuracy", "val_accuracy", "val_gold", "val_sign", "val_r2/0", "calibration_error"),
                      then)


# ---------------------------------------------------------------- accuracy

def print_table(names, rows, columns):
    """A name and its row a line; columns: (title, key, format), those that rows have, each as wide as its title."""
    columns = [column for column in columns if column[1] in rows[0]]
    wide = max(map(len, names))
    print(" " * wide + "".join(title for title, _, _ in columns))
    for name, row in zip(names, rows):
        line = f"{name:{wide}}"
        for title, key, form in columns:
            line += f"{row[key]:>{len(title)}{form}}"
        print(line.rstrip())


def between(interval):
    """The two ends as text."""
    low, high = interval
    return f"[{low:.3f}, {high:.3f}]"


def accuracy(cfg, specs):
    """Print, for every file, how often each reward orders its pairs as the labels do, and how confident it is."""
    like = setup(cfg, Tokenizer.load(cfg.tokenizer))
    rewards = [Reward(spec, like, cfg.micro_tokens) for spec in specs]
    columns = [("  accuracy", "accuracy", ".3f"), ("  [95% interval]", "interval", ""),
               ("  calibration error", "calibration_error", ".3f"), ("    spread", "spread", "")]
    table = []  # of all files
    for path in files(cfg.data):
        records, rows, shown = read_records(path, "preference", cfg.skip_bad)[:cfg.n], [], []
        for spec, reward in zip(specs, rewards):
            row = ordered(records, reward, path, like)
            rows.append(dict(name=spec, data=path) | row)
            spread = f"{row['spread']:.3f}" if "spread" in row else ""
            shown.append(row | dict(interval=between(row["interval"]), spread=spread))
        print(f"{path}: {rows[0]['pairs']} pairs")
        print_table(specs, shown, columns)
        table += rows
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=table), indent=1))


def ordered(records, reward, path, like):
    """How one reward orders the pairs of a file: a row of the table of accuracy. spread: of an ensemble alone."""
    reward.check(records, path)
    leads, spreads = [], []     # of each part of the records; spreads: of the first term with several models
    for start in bar(range(0, len(records), 100), path, delay=0):
        some = records[start:start + 100]
        sizes = counts(some, "responses")
        scores, parts = reward(repeat(some, sizes), given_responses(some, reward, like))
        win, lose, _ = ranked_pairs(sizes)
        leads.append((scores[win] - scores[lose]).cpu())
        several = [name for name in parts if name.endswith(" spread")]
        if several:
            spreads.append(parts[several[0]])
    lead = torch.cat(leads)                                                              # (P,)
    right, pairs = float(in_order(lead).sum()), len(lead)
    row = dict(pairs=pairs, accuracy=right / pairs, interval=wilson(right, pairs))
    row["calibration_error"] = calibration_error(lead)
    if spreads:
        row["spread"] = float(torch.cat(spreads).mean())
    return row


# ---------------------------------------------------------------- compare

def safety(tasks, answers):
    """Of answers to the toy's safety prompts: harmless, the share of unsafe requests that are not helped; over_refusal,
    that of safe ones refused; help, how well the safe ones are answered, 0..1."""
    costs, refused, helped = [], [], []
    for task, answer in zip(tasks, answers):
        metrics = safe_metrics(task, answer.text, answer.finished)
        if task["safe"]:
            refused.append(metrics["refused"])
            helped.append(metrics["help"])
        else:
            costs.append(metrics["cost"])
    cost = mean(costs) or 0.0
    return dict(harmless=1 - cost, over_refusal=mean(refused) or 0.0, help=mean(helped) or 0.0)


def distinct(records):
    """The records without those whose prompt an earlier one has."""
    first = {}
    for record in records:
        first.setdefault(str(record["prompt"]), record)
    return list(first.values())


def pretraining_nll(model, texts, budget):
    """Mean -log π per token of documents: how much of its pretraining a model still knows, the alignment tax."""
    rows, nll, count = [], 0.0, 0
    for text in texts:
        rows += encode(text, model.tok, model.config.block_size, "all")
    for part in micro_batches([len(ids) for ids, _ in rows], budget):
        tokens, mask = collate(pick(rows, part), model.tok, model.device)
        with torch.no_grad():
            nll -= float(token_logprobs(model, tokens, mask).sum())
        count += int(mask.sum())
    return nll / count


def unseen_prompts(cfg, n, families, seed, split="test"):
    """n prompts: of a split of the toy world, or the first of files."""
    if cfg.data == "toy":
        rng = random.Random(seed)
        return [toy_record("prompt", split, families, rng) for _ in range(n)]
    records = []
    for path in files(cfg.data):
        records += read_records(path, "prompt", cfg.skip_bad)
    return records[:n]


def unseen_documents(cfg, families):
    """As many fresh documents as prompts of a family, others for each split."""
    rng = random.Random("compare documents" if cfg.split == "test" else f"compare documents {cfg.split}")
    return [toy_record("text", cfg.split, families, rng) for _ in range(cfg.n)]


def with_room(records, family, tok, block, cfg):
    """The records to answer, with --system in front; without those that leave no room, which are counted aloud."""
    room = block - len(tok.encode(cfg.begin)) - 1
    fitting = []
    for record in records:
        record = with_system(record, cfg.system) if cfg.system else record
        if len(tok.prompt(record["prompt"])) <= room:
            fitting.append(record)
    if not fitting:
        raise UserError(f"{cfg.data}: no prompt ({family}) leaves room in the context of {block} tokens")
    lost = len(records) - len(fitting)
    if lost:
        print(f"{lost} of {len(records)} prompts ({family}) leave no room in the context of {block} tokens and are "
              "left out", file=sys.stderr)
    return fitting if cfg.temperature else distinct(fitting)


KEPT = 8  # so many answers of each checkpoint are saved, and can be shown later


class Exam:
    """What every checkpoint is asked, and who judges its answers."""

    def __init__(self, first, like, cfg):
        """first: the model that the others are compared with."""
        self.cfg, self.first, self.baseline = cfg, first, {}  # baseline: the scores of the first model's answers
        self.families = family_list(cfg.families) if cfg.data == "toy" else ["file"]
        self.on = ["write"] if "write" in self.families else self.families
        if cfg.on and cfg.data == "toy":
            self.on = family_list(cfg.on)
        self.judge = Reward(cfg.judge, like, cfg.micro_tokens)
        self.proxy = Reward(cfg.proxy, like, cfg.micro_tokens) if cfg.proxy else None
        self.tasks, self.begin = {}, like.tok.encode(cfg.begin)
        for family in self.families:
            records = unseen_prompts(cfg, cfg.n, [family], f"compare {family}", cfg.split)
            self.tasks[family] = with_room(records, family, like.tok, first.config.block_size, cfg)
        for reward in filter(None, (self.judge, self.proxy)):
            reward.check(self.prompts(self.families), cfg.data)

    def prompts(self, families):
        """All records of some families."""
        return list(itertools.chain(*(self.tasks[family] for family in families)))

    def answer(self, model, records, cfg, proxy=None):
        """One Answer to each prompt, the same ones for the same seed; and their rollout."""
        torch.manual_seed(cfg.seed)
        groups, roll = answers(model, records, 1, cfg, self.judge, proxy, self.begin)
        return [group[0] for group in groups], roll

    def wins(self, scores, name):
        """For each score 1, ½ or 0: better than that of the first model under this name, equal, or worse."""
        theirs = self.baseline.setdefault(name, scores)  # the first model is asked first: its scores stay there
        return [preference(a, b) for a, b in zip(scores, theirs)]

    def kl(self, model, roll):
        """Σ log π - log π_first of each response, without what it was made to begin with."""
        logp_ratio = logps(model, roll, self.cfg) - logps(self.first, roll, self.cfg)    # (B, T-1)
        drawn = roll.mask.cumsum(1) > len(self.begin)
        return (logp_ratio * drawn).sum(1).tolist()

    def take(self, model):
        """A row of the table: what one model scores, and its first answers."""
        row, said, seen = dict(distinct={}), {}, defaultdict(list)
        greedy = replace(self.cfg, temperature=0.0)
        for family, records in bar(self.tasks.items(), "families", delay=0):
            on = family in self.on
            row["distinct"][family] = len(distinct(records))
            said[family], roll = self.answer(model, records, self.cfg, self.proxy if on else None)
            scores = each(said[family], "score")
            row[family] = mean(scores)
            if not on:
                continue
            seen["win"] += self.wins(scores, family)
            seen["length"] += each(said[family], "tokens")
            if self.proxy:
                seen["proxy"] += each(said[family], "proxy")
            if self.cfg.temperature:
                seen["kl"] += self.kl(model, roll)
                greedy_said, _ = self.answer(model, distinct(records), greedy)
                scores = each(greedy_said, "score")
                seen["greedy"] += scores
                seen["greedy_win"] += self.wins(scores, f"{family}, greedy")
        for name, values in seen.items():
            row[name] = mean(values)
        row["interval"] = wilson(sum(seen["win"]), len(seen["win"]))
        if self.cfg.temperature:
            row["greedy_interval"] = wilson(sum(seen["greedy_win"]), len(seen["greedy_win"]))
        if "safe" in self.families:
            row |= safety(self.tasks["safe"], said["safe"])
        row["answers"] = []
        for answer in said[self.on[0]][:max(KEPT, self.cfg.show)]:
            row["answers"].append(dict(score=answer.score, text=answer.text))
        return row

    def at_k(self, model):
        """Test-time scaling: of `samples` answers to each prompt -> pass@k, maj@k and, with a proxy, the judge's score
        of the best of k by the proxy; k goes through the powers of two up to samples."""
        n, records, values = self.cfg.samples, self.prompts(self.on), defaultdict(list)
        torch.manual_seed(self.cfg.seed)
        for start in bar(range(0, len(records), 64), f"{n} answers to each prompt", delay=0):
            some = records[start:start + 64]
            groups, _ = answers(model, some, n, self.cfg, self.judge, self.proxy, self.begin)
            for group in groups:
                for name, value in scaling(group, bool(self.proxy)).items():
                    values[name].append(value)
        return {name: mean(some) for name, some in values.items()}


def scaling(group, proxy):
    """pass@k, maj@k and (with a proxy) best@k of n answers to one prompt, for k = 1, 2, 4, ... up to n."""
    scores, said, out = each(group, "score"), [], {}
    for answer in group:
        said.append(after_thinking(answer.text) or None if answer.finished else None)
    right = sum(score > 0.5 for score in scores)
    for k in [2 ** i for i in range(len(group).bit_length())]:
        out[f"pass@{k}"] = pass_at_k(len(group), right, k)
        out[f"maj@{k}"] = majority_at_k(said, scores, k)
        if proxy:
            out[f"best@{k}"] = best_of_k(scores, each(group, "proxy"), k)
    return out


def compare(cfg, folders):
    """Let every checkpoint answer the same prompts, judge the answers, print one table, and return its rows.

    The column nll is the mean -log π per token of fresh pretraining documents; greedy, the score of the answer made of
    the likeliest token each time, to each distinct prompt of --on, and how often it wins: what is left of a gain
    without the sampling. The interval says how the win rate would vary with other samples to the same prompts, not
    with other prompts; some prompts occur many times. With --temperature 0 there is no KL, and each distinct prompt is
    asked once, since its answer is always the same.
    """
    # 1. The same questions for all.
    like = setup(cfg, Tokenizer.load(cfg.tokenizer))
    exam = Exam(load_model(folders[0], like, n_scores=0), like, cfg)
    texts = unseen_documents(cfg, exam.families) if cfg.data == "toy" else []

    # 2. Each checkpoint answers them, if it has not before: then --save has its row.
    asked = asked_of_all(cfg, folders[0])
    earlier = earlier_rows(cfg.save, asked, exam)
    table = []
    for folder in bar(folders, "compare", delay=0):
        weights = weights_digest(folder)
        row = earlier.get(weights)
        if row is None or len(row["answers"]) < min(cfg.show, len(exam.tasks[exam.on[0]])):
            model = load_model(folder, like, n_scores=0)
            row = exam.take(model)
            if texts:
                row["nll"] = pretraining_nll(model, texts, cfg.micro_tokens)
            if cfg.samples > 1:
                row |= exam.at_k(model)
        earlier[weights] = row | dict(checkpoint=folder, weights=weights)
        table.append(earlier[weights])

    # 3. Show the table, and some of the answers.
    show_table(table, exam, cfg)
    show_answers(table, exam, cfg)
    if cfg.save:  # all of this table, a model with two names twice, and what an earlier one has besides
        others = [row for row in earlier.values() if row["checkpoint"] not in folders]
        content = dict(asked=asked, baseline=exam.baseline, rows=table + others)
        write_text(cfg.save, json.dumps(content, indent=1))
    return table


def weights_digest(folder):
    """A digest of the weights in a folder, in however many files."""
    paths = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    return " ".join(map(digest, sorted(paths)))


def asked_of_all(cfg, first):
    """All that a row of the table depends on, but for its checkpoint: with the same questions it is the same row."""
    asked = asdict(cfg)
    for other in ("save", "show", "device", "threads"):  # these change the last bits of a row at most
        del asked[other]
    inputs = inputs_of(replace(cfg, save=""))  # digests of the judges' weights and of the files
    return asked | dict(first=weights_digest(first), code=code_of(cfg), inputs=inputs)


def earlier_rows(path, asked, exam):
    """The rows {digest of the weights: row} of an earlier table with the same questions, or none. The exam gets the
    scores of its first model."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["asked"] != asked:
            return {}
        exam.baseline = content["baseline"]
        return {row["weights"]: row for row in content["rows"]}
    except (OSError, ValueError, KeyError, TypeError):  # no --save, no such file yet, or no table, which is replaced
        return {}


COLUMNS = [("     nll", "nll", ".3f"), ("   proxy", "proxy", ".3f"), ("     win", "win", ".3f"),
           ("  [95% interval]", "interval", ""), ("      KL", "kl", ".2f"), ("  length", "length", ".1f"),
           ("  greedy", "greedy", ".3f"), ("     win", "greedy_win", ".3f")]
SAFETY = [("   harmless", "harmless", ".3f"), ("  over-refusal", "over_refusal", ".3f"), ("    help", "help", ".3f")]


def show_table(table, exam, cfg):
    """Print the rows of compare: scores, wins and the rest; of safety; of several samples."""
    names, on = [row["checkpoint"] for row in table], ",".join(exam.on)
    where = ""
    if cfg.data == "toy":
        where = "held-out " if cfg.split == "test" else "validation "
    asked = ", ".join(f"{family} {n}" for family, n in table[0]["distinct"].items())
    if cfg.temperature:
        count = len(exam.tasks[exam.families[0]])
        print(f"{cfg.judge} on {count} {where}prompts a family, distinct: {asked}")
        print(f"win rate against {names[0]}, KL, length and greedy answers on {on}\n")
    else:
        print(f"{cfg.judge} on greedy answers to {where}prompts: {asked}")
        print(f"win rate against {names[0]}, length on {on}\n")

    families = [(f"{family:>8}", family, ".3f") for family in exam.families]
    shown = [row | dict(interval=between(row["interval"])) for row in table]
    print_table(names, shown, families + COLUMNS)
    if "safe" in exam.families:
        print()
        print_table(names, table, SAFETY)
    if cfg.proxy and len(table) > 2:
        best = max(table, key=lambda row: mean([row[family] for family in exam.on]))
        liked = max(table, key=lambda row: row["proxy"])
        print(f"\n{cfg.judge} would pick {best['checkpoint']}, {cfg.proxy} {liked['checkpoint']}")
    for kind in ("pass@", "maj@", "best@"):
        columns = [(f"{key:>9}", key, ".3f") for key in table[0] if key.startswith(kind)]
        if columns:
            print()
            print_table(names, table, columns)


def show_answers(table, exam, cfg):
    """Print what every checkpoint says to the first prompts of --on, with its score."""
    wide = max(len(row["checkpoint"]) for row in table)
    for i, record in enumerate(exam.tasks[exam.on[0]][:cfg.show]):
        print(f"\n{record['prompt'][-1]['content']}")
        for row in table:
            answer = row["answers"][i]
            print(f"  {row['checkpoint']:{wide}}  {answer['score']:>6.2f}  {answer['text']}")


COMMANDS = {"train": (Train, train), "label": (Label, label),
            "accuracy": (Accuracy, accuracy), "compare": (Compare, compare)}
TAKES = dict(compare=["checkpoint", "checkpoint..."], accuracy=["reward", "reward..."])


def main():
    """Run the command that the first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        return print(f"{__doc__}\n--help after a command lists its options: {', '.join(COMMANDS)}")
    if name not in COMMANDS:
        print(__doc__)
        raise OptionError(f"say what to do: python reward.py {'|'.join(COMMANDS)} (--help after it lists its options)")
    Config, run = COMMANDS[name]
    table = "reward" if name == "train" else name  # in a TOML file
    got = parse(Config, TAKES.get(name, ()), sys.argv[2:], table)
    run(*got) if name in TAKES else run(got)


if __name__ == "__main__":
    guard(main)
