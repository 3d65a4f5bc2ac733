"""On-policy distillation: the student answers, and at every token of its own learns what a teacher would have said.

    minimise  E_{x, y ~ π} [ Σ_t D(π(· | x, y_<t), π_T(· | x, y_<t)) ],    D = KL(π || π_T), or another divergence

π is the student, π_T the teacher. SFT on the teacher's samples shows what to say where the teacher would be; this shows
it where the student is, after its own mistakes. As RL it is a reward for every token, log π_T - log π, and no sum of
them: what a token leads to later does not count, so no gradient goes through the sampling. And there is no sampling
noise in it: the mean over the token is exact, over the whole vocabulary. Each step: (1) sample a response to each
prompt; (2) at every token of it read both models and how far they are apart; (3) step towards the teacher.

Papers: GKD, Agarwal et al. 2306.13649, whose λ is --lam and whose eq. 1 is --divergence jsd; MiniLLM, Gu et al.
2306.08543, which argues for KL(π || π_T) and counts what comes later, too. Departures: the mean is over the tokens of
the batch, not first within each response; steps without the student's samples are on new ones of the teacher, not on a
fixed set; both models are at the temperature of the sampling; dropout stays off.

    python configs/distill.py                           out/sft, taught by out/grpo on sums -> out/distill
    python configs/distill.py --divergence jsd --beta 0.1 --lam 0.5

The teacher may have any size, but the student's tokenizer. A step costs what one of grpo.py costs with as many
responses, and one pass of the teacher over them.
"""
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import (Count, Families, Natural, NonNegative, OptionError, Positive, Run, Share, Temperature, TrainConfig,
                  compare_words, fits, guard, mean, open_stream, parse, truth)
from model import Means, Optimizer, at_positions, full, head_chunk, load_model, respond, setup, slices, steps


@dataclass
class Config(TrainConfig):
    """On-policy distillation (GKD, 2306.13649)."""
    out: str = "out/distill"    # folder of the run; the same command continues an interrupted one
    # what is optimised
    init: str = "out/sft"       # student to start from
    teacher: str = "out/grpo"   # model to learn from, of any size, with the same tokenizer
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # see DIVERGENCES
    beta: Share = 0.5           # jsd: the teacher's share of the mixture; near 0 a forward KL, near 1 a reverse KL
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "arith"  # of the toy world, comma-separated
    # rollouts
    steps: Count = 100          # rollout-and-update steps
    prompts: Count = 64         # prompts a step, with one response to each
    lam: Share = 1.0            # λ: share of the steps on the student's own responses; in the others the teacher's
    max_new: Count = 80         # longest response, tokens
    temperature: Temperature = 1.0  # of sampling; both models are read at this temperature too
    # optimisation
    lr: Positive = 1e-3         # peak learning rate of AdamW
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, AdamW for the rest
    muon_lr: Positive = 0.003   # peak learning rate of Muon
    weight_decay: NonNegative = 0.0  # on matrices
    warmup: Natural = 10        # steps of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 20      # steps between evaluations on held-out prompts

    def __post_init__(self):
        super().__post_init__()
        if self.divergence == "jsd" and self.beta in (0, 1):
            raise OptionError(f"--beta {self.beta}: there jsd is 0 whatever the models say; a number between, or "
                              "--divergence forward_kl or reverse_kl")


# ---------------------------------------------------------------- the mathematics
# s and t: log-probabilities (N, V) of student and teacher for the next token, at N places. h: the Config.

def kl(p, q):
    """KL(p || q) of log-probabilities (N, V) -> (N,)."""
    return (p.exp() * (p - q)).sum(-1)


def jsd(s, t, beta):
    """β KL(T || M) + (1 - β) KL(S || M) with the mixture M = β T + (1 - β) S (GKD 2306.13649, eq. 1). Divided by β it
    becomes KL(T || S) as β → 0; divided by 1 - β, KL(S || T) as β → 1."""
    of_teacher, of_student = t + math.log(beta), s + math.log(1 - beta)
    m = torch.logaddexp(of_teacher, of_student)          # log of a sum of probabilities    (N, V)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


# Each gives (N,) numbers, all at 0 where the models agree and nowhere else.
DIVERGENCES = {
    # the student keeps to what the teacher finds likely, and may leave some of it out    MiniLLM 2306.08543
    "reverse_kl": lambda s, t, h: kl(s, t),
    # the student covers all that the teacher may say                                     Hinton et al. 1503.02531
    "forward_kl": lambda s, t, h: kl(t, s),
    # between both, and bounded                                                           GKD 2306.13649 eq. 1
    "jsd": lambda s, t, h: jsd(s, t, h.beta),
}


def apart(student, teacher, tokens, mask, cfg, chunk=None):
    """How far the models are apart at each response token: tokens (B, T), mask (B, T-1) -> the divergence of
    --divergence, KL(π || π_T), and the student's entropy, (B, T-1) each, exact and 0 outside the mask. Only the first
    has a gradient, and only the student's. No (B, T, V) tensor ever exists, see at_positions.
    """
    def log_probs(model, hidden):
        return (full(model.logits(hidden)) / cfg.temperature).log_softmax(-1)

    def head(hidden, teacher_hidden):                                                    # (N, C), (N, C of the teacher)
        s = log_probs(student, hidden)                                                   # (N, V)
        with torch.no_grad():
            t = log_probs(teacher, teacher_hidden)                                       # (N, V)
        fixed = s.detach()       # what is only told has no gradient
        entropy = -(fixed.exp() * fixed).sum(-1)                                         # (N,)
        return DIVERGENCES[cfg.divergence](s, t, cfg), kl(fixed, t), entropy

    where = mask.nonzero(as_tuple=True)                                                  # (N,), (N,)
    chunk = chunk or head_chunk(student)
    with torch.no_grad():
        teacher_hidden = teacher(tokens, where=where)
    with student.autocast():  # around all chunks, or the embedding would be cast anew for each
        hidden = student(tokens, where=where)
        return at_positions(head, mask.shape, where, hidden, teacher_hidden, chunk=chunk)


# ---------------------------------------------------------------- the steps

def open_prompts(student, teacher, cfg):
    """The prompts to train on, a Stream, and held-out ones; both models have room for the answers."""
    room = min(student.config.block_size, teacher.config.block_size)
    fitting = fits(student.tok, room, cfg.max_new)
    return open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=64, skip_bad=cfg.skip_bad, prepare=fitting)


def answers_itself(step, cfg):
    """Whether the student answers in this step, or else the teacher: by chance, with probability λ. It is the step's own
    draw, so that a run that is continued has the same."""
    rng = random.Random(f"whose {cfg.seed} {step}")
    return rng.random() < cfg.lam


def report(records, roll, means):
    """What is logged of the responses that were learned from; the KL is that of a response, as everywhere."""
    length = roll.mask.sum(1).mean()
    finished = roll.finished.float().mean()
    gold = mean(truth(records, roll.responses(), roll.finished))
    metrics = means.result() | dict(gold=gold, response_length=length, finished=finished)
    metrics["kl"] *= length     # from a token's to a response's
    return metrics


@torch.no_grad()
def evaluate(student, teacher, records, run, step, cfg):
    """Held-out prompts, answered by the student after its update."""
    roll, means = respond(student, records, cfg), Means()
    run.samples(step + 1, records, roll.responses())
    for _, tokens, mask in slices(roll, cfg.micro_tokens):
        loss, gap, _ = apart(student, teacher, tokens, mask, cfg)                        # (b, t-1)
        means.add(mask, loss=loss, kl=gap)
    metrics = report(records, roll, means)
    return {f"val_{name}": metrics[name] for name in ("loss", "kl", "gold")}


def what_next(cfg):
    """The words of the command that compares the student with what it began as, and with its teacher."""
    words = compare_words(cfg, cfg.data, cfg.families)
    script, *_ = words
    if script == "reward.py":   # and not model.py, to talk to it where nothing can judge its answers
        words.insert(words.index(cfg.out) + 1, cfg.teacher)
    return words


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Let the student answer, read both models at every token, step towards the teacher: one step after another."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    teacher = load_model(cfg.teacher, like, n_scores=0, maker="python grpo.py")
    student = load_model(cfg.init, like, n_scores=0, maker="python sft.py").prepare(cfg)
    stream, held = open_prompts(student, teacher, cfg)
    optimizer = Optimizer(student, cfg.lr, cfg.steps, cfg.optimizer, cfg.muon_lr, cfg.weight_decay, warmup=cfg.warmup,
                          clip=cfg.clip_grad)

    for step in steps(run, cfg.steps, dict(model=student), dict(model=optimizer), {}, cfg.save_every):
        # 1. Sample a response to each prompt: from here on it is a constant, whoever gave it.
        records = stream.batch(step, cfg.prompts)
        own = answers_itself(step, cfg)
        roll = respond(student if own else teacher, records, cfg)

        # 2. Read both models at every token of it, and add up the gradient of how far they are apart.
        means, n = Means(), roll.mask.sum()     # n: tokens of all slices
        for _, tokens, mask in slices(roll, cfg.micro_tokens):
            loss, gap, entropy = apart(student, teacher, tokens, mask, cfg)              # (b, t-1)
            means.add(mask, loss=loss, kl=gap, entropy=entropy)
            (loss.sum() / n).backward()

        # 3. Step towards the teacher.
        metrics = optimizer.step(step)

        # 4. Evaluate now and then, and report.
        metrics |= report(records, roll, means) | dict(own=float(own))
        if run.evaluates(step):
            metrics |= evaluate(student, teacher, held, run, step, cfg)
        run.log(step, ("loss", "gold", "response_length"), **metrics)
    return run.finish(("loss", "kl", "gold", "val_gold", "entropy", "response_length"), then=what_next(cfg))


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
