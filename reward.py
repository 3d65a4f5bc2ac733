"""Where a score or a preference comes from: label responses, choose prompts, train a reward model, compare policies.

    minimise  -log σ(r(x, y_w) - r(x, y_l) - m)      over pairs in which y_w was preferred

A reward model is the SFT model with one number per token instead of logits, read at the last token of the response.
Under Bradley-Terry, P(y_w ≻ y_l) = σ(r_w - r_l), the loss is the negative log-likelihood of the labels (Christiano
et al. 1706.03741; Stiennon et al. 2009.01325). Of K ranked responses all C(K, 2) pairs are used, in one batch element
and weighted 1 / C(K, 2) (InstructGPT 2203.02155, eq. 1). Options: a margin m from ratings (Llama 2, 2307.09288) and
a pull of r_w + r_l towards 0 (2312.09244).

    python reward.py label                        sample pairs from out/sft, label them -> out/pairs/pairs.jsonl
    python reward.py train                        out/sft + pairs -> out/reward
    python reward.py curate                       prompts for RL: how hard each is, without those that are guessed
    python reward.py compare out/sft out/ppo      gold reward, win rate, KL, length on held-out prompts

On 2 CPU cores: label 16 s, train 40 s, compare 3 s a checkpoint; the reward model meets .62-.70 of held-out noisy
labels and .73-.80 of the truth.

On the toy world the labels are Bradley-Terry draws from the gold reward with a tenth flipped, so the learned reward
is an imperfect proxy by construction, and both can be watched.
"""
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from data import (OptionError, Run, RunConfig, Tokenizer, TrainConfig, UserError, after_thinking, check, collate,
                  encode, family_list, files, guard, mean, micro_batches, open_stream, pairs, parse, read_records,
                  toy_record, write_text)
from model import (Optimizer, Reward, generate, load_model, per_token, response_scores, setup, steps,
                   token_logprobs)


SELECT = Literal["rank", "ends", "best", "rso", "correct", "shortest", "short_pairs", "quantile"]


@dataclass
class Train(TrainConfig):
    """Train a reward model on preferences."""
    out: str = "out/reward"     # folder of the run; the same command continues an interrupted one
    init: str = "out/sft"       # checkpoint to start from; the score head starts at 0
    data: str = "out/pairs/pairs.jsonl"  # preferences: pairs or rankings
    pairs: Literal["all", "split"] = "all"  # all pairs of a ranking in one batch element, or each on its own
    margin: bool = False        # use the margin of records that have one (Llama 2)
    center: float = 0.0         # weight of mean (r_w + r_l)²; .01 keeps scores near 0
    # optimisation
    epochs: float = 2.0         # passes over the records
    batch: int = 32             # records an update
    lr: float = 1e-3            # peak learning rate of AdamW
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, AdamW for the rest
    muon_lr: float = 0.003      # peak learning rate of Muon
    weight_decay: float = 0.1   # on matrices
    warmup: int = 10            # updates of linear warm-up, before the cosine
    clip_grad: float = 1.0      # global gradient norm; 0 never clips
    # evaluation
    eval_every: int = 50        # updates between evaluations on held-out records


@dataclass
class Label(RunConfig):
    """Sample responses from a policy and rank them; one JSON line a prompt, best response first."""
    out: str = "out/pairs"      # folder of the run; the records are in its pairs.jsonl
    policy: str = "out/sft"     # checkpoint that answers
    data: str = "toy"           # prompts: toy, or a file
    families: str = "write"     # of the toy world, comma-separated
    n: int = 8000               # prompts
    skip: int = 0               # prompts to pass over first: a later round sees others
    k: int = 2                  # responses to each
    temperature: float = 1.0    # of sampling
    max_new: int = 80           # longest response, tokens; unfinished ones are not used
    batch: int = 128            # prompts at a time
    # the labels
    by: str = "gold"            # what judges: reward models and verifiers, as 0.5*out/reward + exact
    scale: float = 3.0          # labels are Bradley-Terry draws at scale * score; 0: the higher score always wins
    flip: float = 0.1           # share of rankings turned upside down
    # what is kept
    select: SELECT = "rank"     # rank, ends, best, rso, correct, shortest, short_pairs, quantile: see kept()
    min_gap: float = 0.0        # rankings: least difference between the scores of first and last
    rso_beta: float = 0.5       # rso: a response is accepted with probability exp((score - best score) / this)
    quantiles: int = 5          # quantile: parts of equal size, by score; their number becomes the system message


@dataclass
class Curate(RunConfig):
    """Choose prompts for RL: how hard is each, and can it be guessed? (Kimi k1.5, 2501.12599, sec. 2.1)"""
    out: str = "out/prompts"    # folder of the run; the records are in its prompts.jsonl
    policy: str = "out/sft"     # checkpoint that answers
    data: str = "toy"           # prompts: toy, or a file
    families: str = "arith"     # of the toy world, comma-separated
    n: int = 1000               # prompts
    by: str = "exact"           # what judges; more than .5 is right
    k: int = 10                 # answers to each; difficulty = 1 - the share that is right
    guesses: int = 8            # answers without thinking: one that is right, and the prompt is left out; 0: none
    begin: str = "The answer"    # how an answer without thinking begins
    cap: int = 0                # most prompts of one family (or "domain"); 0: no limit
    temperature: float = 1.0    # of sampling
    max_new: int = 80           # longest answer, tokens
    batch: int = 64             # prompts at a time


@dataclass
class Compare:
    """Compare policies on held-out prompts; the first is the baseline."""
    data: str = "toy"           # prompts: the toy world's test split, or a file
    families: str = ""          # of the toy world, comma-separated; none for all
    on: str = "write"           # families behind win rate, KL and length
    n: int = 400                # prompts of each family
    judge: str = "gold"         # decides who wins: reward models and verifiers, as 0.5*out/reward + exact
    proxy: str = ""             # another such sum, shown beside it
    temperature: float = 1.0    # of sampling; 0 is greedy
    max_new: int = 80           # longest response, tokens
    begin: str = ""             # what every answer is made to begin with, as "<think>"
    samples: int = 1            # answers to each prompt of --on; more give pass@k, maj@k and the best of k by --proxy
    show: int = 2               # prompts whose answers are printed
    save: str = ""              # a JSON file for the table
    seed: int = 0               # of the sampling
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # of the matmuls
    threads: int = 0            # CPU threads; 0 leaves it to PyTorch
    micro_tokens: int = 8192    # padded tokens a forward pass may hold


# ---------------------------------------------------------------- the mathematics

def bradley_terry(r_w, r_l, margin=0.0):
    """-log P(w ≻ l) = -log σ(r_w - r_l - m) per pair; scores (P,) -> (P,)."""
    return -F.logsigmoid(r_w - r_l - margin)


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
    """What --select keeps of the finished answers to one prompt, (text, score, tokens) each: a list of records' keys.

    rank: all, best first as the labels have it. ends: its first and last. best: that of the highest score (best-of-n,
    rejection sampling). rso: a ranking of those that statistical rejection sampling accepts. correct: all that are
    right, that is, of a score above .5. shortest: the shortest of these. short_pairs: it over each longer one that is
    wrong, or right and at least 1.5 times as long (Kimi k1.5, long2short DPO). quantile: all, to be sorted later.
    """
    if cfg.select == "rso":
        group = [group[i] for i in accept([score for _, score, _ in group], cfg.rso_beta, rng)] if group else []
    if not group:
        return []
    texts, scores, sizes = zip(*group)
    right = [i for i, score in enumerate(scores) if score > 0.5]
    shortest = [min(right, key=lambda i: sizes[i])] if right else []
    single = dict(best=[scores.index(max(scores))], correct=right, shortest=shortest, quantile=range(len(texts)))
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


def label(cfg):
    """Sample k responses to each prompt, score and rank them, and write pairs.jsonl."""
    check(cfg, positive="n temperature max_new batch save_every rso_beta quantiles", share="flip")
    if cfg.k < 2:
        raise OptionError(f"--k {cfg.k}: a preference needs at least 2 responses")
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.policy, tok, device, n_scores=0, maker="python sft.py")
    judge = Reward(cfg.by, tok, device, amp, cfg.micro_tokens)

    def fits(record):
        """The record, if its prompt leaves room for a whole response."""
        return [record] if len(tok.prompt(record["prompt"])) + cfg.max_new <= policy.config.block_size else []
    stream, _ = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=0, prepare=fits)
    n = min(cfg.n, len(stream.items)) if stream.items else cfg.n  # a file's prompts once each
    path, part = run.folder / "pairs.jsonl", run.folder / "unfinished.json"
    start, made = json.loads(part.read_text(encoding="utf-8")) if part.exists() else (0, [])
    for step in run.progress(start, math.ceil(n / cfg.batch)):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        rng = random.Random(f"labels {cfg.seed} {step}")
        records = stream.batch(step + math.ceil(cfg.skip / cfg.batch), cfg.batch)[:n - step * cfg.batch]
        with amp():
            roll = generate(policy, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new, cfg.k,
                            cfg.temperature)
        repeated = [r for r in records for _ in range(cfg.k)]
        scores = judge(repeated, roll)[0].tolist()
        answers = list(zip(roll.responses(tok), scores, roll.mask.sum(1).tolist(), roll.finished.tolist()))
        for i, record in enumerate(records):
            group = [answer for *answer, done in answers[i * cfg.k:(i + 1) * cfg.k] if done and answer[0].strip()]
            group = list({answer[0]: answer for answer in group[::-1]}.values())[::-1]  # no answer twice
            if not cfg.scale and cfg.select in ("rank", "ends", "rso"):  # where scores decide, two equal ones cannot
                group = list({score: (text, score, size) for text, score, size in group[::-1]}.values())[::-1]
            made += [record | parts | dict(source="ai") for parts in kept(group, cfg, rng)]
        run.log(step, ("records",), records=len(made), score=mean(scores), response_length=roll.mask.sum(1).mean(),
                finished=roll.finished.float().mean())
        if (step + 1) % cfg.save_every == 0:
            write_text(part, json.dumps([step + 1, made]))
    if not made:
        raise UserError(f"{cfg.policy}: of {n} prompts none got answers that --select {cfg.select} keeps")
    if cfg.select == "quantile":  # Quark: the model learns what goes with which quality, and is asked for the best
        made.sort(key=lambda r: r["scores"][0])
        made = [r | dict(prompt=[dict(role="system", content=f"Quality {1 + i * cfg.quantiles // len(made)}.")]
                         + r["prompt"]) for i, r in enumerate(made)]
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made))
    agree = mean([preference(r["scores"][0], r["scores"][-1]) for r in made if "responses" in r])
    print(f"{path}: {len(made)} records of {n} prompts"
          + ("" if agree is None else f"; the label agrees with the score in {agree:.0%}"))
    maker = "sft.py" if agree is None else "reward.py train"
    run.finish(("score", "response_length"), then=f"python {maker} --data {path}")
    part.unlink(missing_ok=True)


def curate(cfg):
    """Rate prompts by how often the policy gets them right, leave out what it guesses, and write prompts.jsonl."""
    check(cfg, positive="n k temperature max_new batch save_every")
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.policy, tok, device, n_scores=0, maker="python sft.py")
    judge = Reward(cfg.by, tok, device, amp, cfg.micro_tokens)
    begin, room = tok.encode(cfg.begin), policy.config.block_size - cfg.max_new

    def fits(record):
        """The record, if its prompt leaves room for a whole answer."""
        return [record] if len(tok.prompt(record["prompt"])) + len(begin) <= room else []
    stream, _ = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=0, prepare=fits)
    n = min(cfg.n, len(stream.items)) if stream.items else cfg.n
    made, lost, of_family = [], Counter(), Counter()

    def rates(records, k, **how):
        """Share of k answers to each prompt that are right."""
        with amp():
            roll = generate(policy, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new, k, cfg.temperature,
                            **how)
        return (judge([r for r in records for _ in range(k)], roll)[0].view(-1, k) > 0.5).float().mean(1).tolist()
    for step in run.progress(0, math.ceil(n / cfg.batch)):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
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
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made))
    print(f"{path}: {len(made)} of {n} prompts; left out: "
          + (", ".join(f"{n} {why}" for why, n in lost.items() if why) or "none"))
    run.finish(("kept", "difficulty"), then=f"python grpo.py --data {path} --pool {len(made)} --prioritized")


def of_choice(record):
    """Whether a prompt is true-or-false, yes-or-no or multiple choice: right by luck too often to learn from."""
    answer = str(record.get("answer", "")).strip().strip("().").lower()
    return answer in ("true", "false", "yes", "no") or bool(re.search(
        r"(?m)^[ \t]*\(?A[.):]\s.*\n(?:[ \t]*\n)?[ \t]*\(?B[.):]\s", record["prompt"][-1]["content"]))


# ---------------------------------------------------------------- train

def score_records(model, items, cfg, tok, amp):
    """Yield (scores (N,), items) by micro-batch; all responses of an item are in the same one."""
    k = max(len(item["rows"]) for item in items)
    for part in micro_batches([max(len(ids) for ids, _ in item["rows"]) for item in items], cfg.micro_tokens // k):
        part = [items[i] for i in part]
        tokens, mask = collate([row for item in part for row in item["rows"]], tok, model.device)
        with amp():
            yield response_scores(model, tokens, mask)[:, 0], part                       # (N,)


def pair_margins(scores, items, use_margin):
    """Scores of items laid end to end -> r_w, r_l, required margin, weight, all (P,)."""
    win, lose, weight = ranked_pairs([len(item["rows"]) for item in items])
    required = torch.tensor([item.get("margin") or 0.0 for item in items for _ in itertools.combinations(
        item["rows"], 2)]) if use_margin else torch.zeros(len(win))
    return scores[win], scores[lose], required.to(scores.device), weight.to(scores.device)


@torch.no_grad()
def evaluate(model, items, cfg, tok, amp):
    """Held-out loss, accuracy on the labels and on the true scores where records have them, calibration, mean score."""
    losses, margins, truth, every = [], [], [], []
    for scores, part in score_records(model, items, cfg, tok, amp):
        r_w, r_l, required, _ = pair_margins(scores, part, cfg.margin)
        losses += bradley_terry(r_w, r_l, required).tolist()
        margins += (r_w - r_l).tolist()
        truth += [a - b for item in part for a, b in itertools.combinations(
            item.get("scores") or [0.0] * len(item["rows"]), 2)]                         # 0: not known
        every += scores.tolist()
    right = [float((m > 0) == (t > 0)) for m, t in zip(margins, truth) if t]
    return dict(val_loss=mean(losses), val_accuracy=mean([preference(m, 0) for m in margins]), val_gold=mean(right),
                calibration_error=calibration_error(torch.tensor(margins)), val_mean=mean(every))


def train(cfg):
    """Fit the scores to the preferences; at the end their held-out mean is put at 0."""
    check(cfg, positive="epochs batch lr muon_lr micro_tokens save_every eval_every")
    if cfg.data == "toy":
        raise OptionError("--data toy: preferences come from a file; python reward.py label makes one")
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    model = load_model(cfg.init, tok, device, n_scores=1, maker="python sft.py")
    model.prepare(cfg)

    def prepare(record):
        """One item a record, or one a pair of its ranking."""
        parts = [record] if cfg.pairs == "all" else pairs(record)
        return [{k: part[k] for k in ("margin", "scores") if k in part}
                | dict(rows=encode(part, tok, model.config.block_size)) for part in parts]
    stream, held = open_stream(cfg.data, "preference", cfg.seed, n_held=400, prepare=prepare)
    total = math.ceil(cfg.epochs * len(stream.items) / cfg.batch)
    optimizer = Optimizer(model, cfg.lr, total, cfg.optimizer, cfg.muon_lr, cfg.weight_decay, warmup=cfg.warmup,
                          clip=cfg.clip_grad)

    for step in steps(run, total, dict(model=model), dict(optimizer=optimizer), {}, cfg.save_every):
        items = stream.batch(step, cfg.batch)
        loss, right, gap = 0.0, 0.0, 0.0
        for scores, part in score_records(model, items, cfg, tok, amp):
            r_w, r_l, required, weight = pair_margins(scores, part, cfg.margin)
            pair_loss = bradley_terry(r_w, r_l, required) + cfg.center * (r_w + r_l) ** 2  # (P,)
            part_loss = (weight * pair_loss).sum() / len(items)
            part_loss.backward()
            loss += part_loss.detach()
            right += (weight * (0.5 + 0.5 * (r_w - r_l).detach().sign())).sum() / len(items)
            gap += (weight * (r_w - r_l).detach()).sum() / len(items)
        grad_norm, lr = optimizer.step(step)
        last = step + 1 == total
        val = evaluate(model, held, cfg, tok, amp) if last or (step + 1) % cfg.eval_every == 0 else {}
        if last:  # only differences were trained; put the mean at 0, so that a score reads "better than usual"
            model.score.bias.data -= val["val_mean"]
        run.log(step, ("loss", "accuracy", "val_accuracy"), loss=loss, accuracy=right, margin=gap,
                grad_norm=grad_norm, lr=lr, **val)
    run.finish(("loss", "accuracy", "val_accuracy", "val_gold", "calibration_error"),
               then="python ppo.py" if cfg.out == "out/reward" else f"python ppo.py --reward {cfg.out}")


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


def compare(cfg, folders):
    """Let every checkpoint answer the same prompts, judge the answers, and print one table. The column nll is the mean
    -log π per token of fresh pretraining documents."""
    check(cfg, positive="n max_new")
    if not cfg.judge:
        raise OptionError("--judge: name what decides, as gold or out/reward")
    tok = Tokenizer.load(cfg.tokenizer)
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    families = family_list(cfg.families) if cfg.data == "toy" else ["file"]
    on = family_list(cfg.on) if cfg.data == "toy" else ["file"]
    if not set(on) <= set(families):
        raise OptionError(f"--on {cfg.on}: not among --families {cfg.families}")
    judge, proxy = (Reward(spec, tok, device, amp, cfg.micro_tokens) if spec else None
                    for spec in (cfg.judge, cfg.proxy))
    tasks = {}
    for family in families:
        rng = random.Random(f"compare {family}")
        tasks[family] = ([toy_record("prompt", "test", [family], rng) for _ in range(cfg.n)] if cfg.data == "toy"
                         else [r for path in files(cfg.data) for r in read_records(path, "prompt")][:cfg.n])
    rng = random.Random("compare documents")
    texts = [toy_record("text", "test", families, rng) for _ in range(cfg.n)] if cfg.data == "toy" else []
    first, baseline, table, answers = None, {}, [], {}
    for folder in folders:
        model, row = load_model(folder, tok, device, n_scores=0), dict(checkpoint=folder)
        first = first or model
        wins, kls, lengths, proxies = [], [], [], []
        for family, records in tasks.items():
            torch.manual_seed(cfg.seed)
            with amp():
                roll = generate(model, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new,
                                temperature=cfg.temperature, begin=tok.encode(cfg.begin))
            scores = judge(records, roll)[0].tolist()
            row[family] = mean(scores)
            answers[folder, family] = list(zip(roll.responses(tok), scores))
            if family in on:
                theirs = baseline.setdefault(family, scores)
                wins += [preference(a, b) for a, b in zip(scores, theirs)]  # scores know no order of presentation
                with torch.no_grad(), amp():
                    logp, base = (per_token(roll, cfg.micro_tokens, lambda tokens, mask: token_logprobs(
                        m, tokens, mask, cfg.temperature or 1.0))[0] for m in (model, first))
                drawn = roll.mask.cumsum(1) > len(tok.encode(cfg.begin))                 # not what was put there
                kls += ((logp - base) * drawn).sum(1).tolist()
                lengths += roll.mask.sum(1).tolist()
                proxies += proxy(records, roll)[0].tolist() if proxy else []
        if texts:  # how much of its pretraining it still knows: the alignment tax
            rows = [row for text in texts for row in encode(text, tok, model.config.block_size, "all")]
            nll = 0.0
            for part in micro_batches([len(ids) for ids, _ in rows], cfg.micro_tokens):
                tokens, mask = collate([rows[i] for i in part], tok, device)
                with torch.no_grad(), amp():
                    nll -= float(token_logprobs(model, tokens, mask).sum())
            row["nll"] = nll / sum(sum(target) for _, target in rows)
        if cfg.samples > 1:
            row |= at_k(model, [r for family in on for r in tasks[family]], judge, proxy, cfg, tok, amp)
        row |= dict(win=mean(wins), interval=wilson(sum(wins), len(wins)), kl=mean(kls), length=mean(lengths))
        table.append(row | (dict(proxy=mean(proxies)) if proxy else {}))

    wide = max(len(f) for f in folders)
    columns = families + ["nll"] * bool(texts) + ["proxy"] * bool(proxy)
    head = "".join(f"{f:>8}" for f in columns)
    count = len(tasks[families[0]])
    print(f"{cfg.judge} on {count} {'held-out ' * (cfg.data == 'toy')}prompts a family; win rate against {folders[0]}, "
          f"KL and length on {','.join(on)}\n\n{'':{wide}}{head}     win  [95% interval]      KL  length")
    for row in table:
        cells = "".join(f"{row[f]:>8.3f}" for f in columns)
        low, high = row["interval"]
        print(f"{row['checkpoint']:{wide}}{cells}{row['win']:>8.3f}  [{low:.3f}, {high:.3f}]"
              f"{row['kl']:>8.2f}{row['length']:>8.1f}")
    for name in ("pass", "maj", "best"):
        if f"{name}@1" in table[0]:
            ks = [key for key in table[0] if key.startswith(name + "@")]
            print(f"\n{'':{wide}}" + "".join(f"{key:>9}" for key in ks))
            for row in table:
                print(f"{row['checkpoint']:{wide}}" + "".join(f"{row[key]:>9.3f}" for key in ks))
    for family in on[:1]:
        for i in range(min(cfg.show, len(tasks[family]))):
            print(f"\n{tasks[family][i]['prompt'][-1]['content']}")
            for folder in folders:
                text, score = answers[folder, family][i]
                print(f"  {folder:{wide}}  {score:>6.2f}  {text}")
    if cfg.save:
        write_text(cfg.save, json.dumps(table, indent=1))


COMMANDS = {"train": (Train, train), "label": (Label, label), "curate": (Curate, curate), "compare": (Compare, compare)}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(__doc__)
        raise OptionError(f"say what to do: python reward.py {'|'.join(COMMANDS)} (--help after it lists its options)")
    Config, run = COMMANDS[name]
    if name == "compare":
        run(*parse(Config, ["checkpoint", "checkpoint..."], sys.argv[2:], name))
    else:
        run(parse(Config, argv=sys.argv[2:], name="reward" if name == "train" else name))


if __name__ == "__main__":
    guard(main)
