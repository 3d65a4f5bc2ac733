"""Pretraining and supervised fine-tuning: raise the likelihood of text someone wrote.

    minimise  L = - Σ_t w_t log π(y_t | y_<t) / Σ_t w_t                     (sums over the whole batch of a step)

Pretraining counts every token (w = 1); fine-tuning counts what the assistant says, its end token included
(InstructGPT, 2203.02155, step 1), and everything else with the weight `prompt_weight`: 0 as usual elsewhere, .1 here,
because reading the question well is half of what so small a model has to learn. The mean is over the tokens of the
whole batch however it is split into micro-batches: a mean of their means would weigh a short answer's tokens more.

    python sft.py --loss_on all --init new --out out/base        pretrain the toy base
    python sft.py                                                fine-tune it on demonstrations: out/base -> out/sft
    python sft.py --data my.jsonl --out out/mine                 on your file (README, "Your data")

On 2 CPU cores with AMX, bf16: 72 s and 61 s; then .51-.57 of held-out sums are right when sampled (three seeds).
That share stands on the steep part of the learning curve: another machine's rounding moves it by .1.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from data import (THINK, Count, Families, Natural, NonNegative, OptionError, Positive, Run, Share, Tokenizer,
                  TrainConfig, collate, encode, guard, micro_batches, open_stream, pack, parse)
from model import GPT, GPTConfig, Optimizer, at_positions, full, load_model, setup, steps, token_logprobs


@dataclass
class Config(TrainConfig):
    """Pretraining and supervised fine-tuning."""
    out: str = "out/sft"        # folder of the run; the same command continues an interrupted one
    # data
    data: str = "toy"           # toy, or a file (.txt, .json, .jsonl, .gz)
    families: Families = ""     # of the toy world, comma-separated; none for all
    think: Share = THINK        # share of the toy's sums demonstrated with thinking
    restate: Natural = 0        # times, at most, that such thinking first says the sum over: long chains of thought
    tamper: Share = 0.0         # share of the toy's sums demonstrated by fooling a careless grader: a vice to explore
    loss_on: Literal["assistant", "all"] = "assistant"  # all: pretraining, on documents
    prompt_weight: Share = 0.1  # weight of the other tokens beside the assistant's
    packing: Natural = 128      # sequences share rows of this many tokens, kept apart by a mask; 0: one row each
    # Quark (2205.13636): records whose system message tells their quality, as reward.py label --select quantile makes
    kl_coef: NonNegative = 0.0  # weight of KL(π || π_ref), π_ref without that message (.05)
    ent_coef: NonNegative = 0.0  # weight of the entropy of π, which is to stay (.06)
    ref: str = ""               # π_ref; none: init
    # model
    init: str = "out/base"      # checkpoint to start from, or new: random weights of this size
    n_layer: Natural = 4        # of a new model
    n_head: Natural = 4         # of a new model
    n_embd: Natural = 128       # of a new model
    block_size: Natural = 256   # of a new model
    dropout: Share = 0.0        # of a new model
    # optimisation
    steps: Natural = 700        # updates; 0: one epoch of the file
    batch: Count = 64           # sequences an update
    lr: Positive = 3e-3         # peak learning rate of AdamW
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, AdamW for the rest
    muon_lr: Positive = 0.01    # peak learning rate of Muon
    weight_decay: NonNegative = 0.1  # on matrices
    beta2: Share = 0.98         # of AdamW
    warmup: Natural = 20        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 100     # updates between evaluations on held-out records

    def __post_init__(self):
        super().__post_init__()
        quark = self.kl_coef or self.ent_coef
        if quark and (self.loss_on == "all" or self.prompt_weight == 1):
            raise OptionError("--kl_coef, --ent_coef: over what the assistant says; no --loss_on all, "
                              "no --prompt_weight 1")
        if quark and self.init == "new" and not self.ref:
            raise OptionError("--kl_coef, --ent_coef: --init new is no reference; name one with --ref")


SIZE = ("n_layer", "n_head", "n_embd", "block_size", "dropout")  # options of a new model


def sft_loss(model, tokens, mask, **layout):
    """Σ_t w_t · -log π(token t+1), a sum: the caller divides by the weight of the whole batch.

    tokens (B, T), mask (B, T-1) of weights w -> scalar. layout: pos and see of packed rows.
    """
    return -(token_logprobs(model, tokens, mask, **layout) * mask).sum()


def kl_and_entropy(model, ref, tokens, mask, plain, plain_mask):
    """Σ KL(π(·|x, system) || π_ref(·|x)) and Σ entropy of π, over what the assistant says: scalars (Quark 2205.13636,
    eq. 4 in the direction of the authors' code). tokens (B, T), mask (B, T-1); plain: these without system turns."""
    def head(hidden, ref_hidden):
        logp = full(model.logits(hidden)).log_softmax(-1)                                # (N, V)
        with torch.no_grad():
            ref_logp = full(ref.logits(ref_hidden)).log_softmax(-1)                      # (N, V)
        return (logp.exp() * (logp - ref_logp)).sum(-1), -(logp.exp() * logp).sum(-1)    # (N,) each
    with torch.no_grad():
        ref_hidden = ref(plain[:, :-1])[plain_mask == 1]                                 # (N, C)
    kl, entropy = at_positions(head, mask == 1, model(tokens[:, :-1])[mask == 1], ref_hidden,
                               chunk=max(64, 2 ** 24 // model.config.vocab_size))
    return kl.sum(), entropy.sum()


def rows_of(record, tok, block, cfg):
    """Rows (ids, weights) of a record; with a KL or entropy term followed by the same without its system turns."""
    rows = encode(record, tok, block, cfg.loss_on, cfg.prompt_weight)
    if not (cfg.kl_coef or cfg.ent_coef):
        return rows
    plain = record | dict(messages=[turn for turn in record["messages"] if turn["role"] != "system"])
    both = zip(rows, encode(plain, tok, block, cfg.loss_on, cfg.prompt_weight))
    return [row + other for row, other in both if 0 < row[1].count(1) == other[1].count(1)]  # not where one was cut


def batches(rows, cfg, tok, device):
    """Rows [(ids, weights), ...] as micro-batches of at most cfg.micro_tokens: (tokens, mask, layout) each; of the rows
    with a KL term, layout is the batch without system turns."""
    if cfg.kl_coef or cfg.ent_coef:
        for part in micro_batches([len(ids) for ids, *_ in rows], cfg.micro_tokens):
            yield *collate([rows[i][:2] for i in part], tok, device), dict(zip(("plain", "plain_mask"), collate(
                [rows[i][2:] for i in part], tok, device)))
    elif cfg.packing:
        packed = pack(rows, tok, max(cfg.packing, *(len(ids) for ids, _ in rows)), device)
        for tokens, mask, pos, see in zip(*(x.split(max(1, cfg.micro_tokens // packed[0].shape[1])) for x in packed)):
            yield tokens, mask, dict(pos=pos, see=see)
    else:
        for part in micro_batches([len(ids) for ids, _ in rows], cfg.micro_tokens):
            yield *collate([rows[i] for i in part], tok, device), {}


@torch.no_grad()
def evaluate(model, rows, cfg, tok, amp):
    """Mean -log π per target token on held-out rows, in eval mode."""
    model.eval()
    with amp():
        loss = sum(float(sft_loss(model, tokens, mask, **({} if "plain" in layout else layout)))
                   for tokens, mask, layout in batches(rows, cfg, tok, model.device))
    return loss / sum(sum(weights) for _, weights, *_ in rows)


def same_size(cfg, model):
    """Refuse options of a new model that the one of --init contradicts. What was left at its default, or given as that,
    asks for nothing, so that one --config can serve both."""
    for name in SIZE:
        asked, has = getattr(cfg, name), getattr(model.config, name)
        if asked != has and asked != getattr(Config, name):
            raise OptionError(f"--{name} {asked}: {cfg.init} has {has}, and only --init new makes a model of another")


def train(cfg):
    """One update a step on a fresh batch, evaluated now and then on held-out records."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    torch.manual_seed(cfg.seed)
    if cfg.init == "new":
        size = {k: getattr(cfg, k) for k in SIZE}
        model = GPT(GPTConfig(vocab_size=tok.n_vocab, **size)).to(device)
    else:
        model = load_model(cfg.init, tok, device, n_scores=0,
                           maker="python sft.py --loss_on all --init new --out out/base")
        same_size(cfg, model)
    model.prepare(cfg)
    ref = None
    if cfg.kl_coef or cfg.ent_coef:
        ref = load_model(cfg.ref or cfg.init, tok, device, n_scores=0)
    stream, held = open_stream(cfg.data, "text" if cfg.loss_on == "all" else "messages", cfg.seed,
                               cfg.families, n_held=128, prepare=lambda record: rows_of(
                                   record, tok, model.config.block_size, cfg), context=(tok, model.config.block_size),
                               skip_bad=cfg.skip_bad, think=cfg.think, restate=cfg.restate, tamper=cfg.tamper)
    if not cfg.steps and not stream.items:
        raise OptionError("--steps 0: the toy world never ends, so it has no epochs")
    total = cfg.steps or math.ceil(len(stream.items) / cfg.batch)
    optimizer = Optimizer(model, cfg.lr, total, cfg.optimizer, cfg.muon_lr, cfg.weight_decay, (0.9, cfg.beta2),
                          cfg.warmup, clip=cfg.clip_grad)

    for step in steps(run, total, dict(model=model), dict(optimizer=optimizer), {}, cfg.save_every):
        rows = stream.batch(step, cfg.batch)
        weight = sum(sum(weights) for _, weights, *_ in rows)
        said = sum(weights.count(1) for _, weights, *_ in rows)  # tokens of the assistant
        model.train()
        loss, more = 0.0, {}
        for tokens, mask, layout in batches(rows, cfg, tok, device):
            with amp():
                nll, extra = sft_loss(model, tokens, mask, **({} if ref else layout)) / weight, 0.0
                if ref:
                    kl, entropy = (x / said for x in kl_and_entropy(model, ref, tokens, mask, **layout))
                    extra = cfg.kl_coef * kl - cfg.ent_coef * entropy
                    more = {k: more.get(k, 0.0) + v.detach() for k, v in dict(kl=kl, entropy=entropy).items()}
            (nll + extra).backward()
            loss += nll.detach()
        grad_norm, lr = optimizer.step(step)
        last = step + 1 == total
        val = evaluate(model, held, cfg, tok, amp) if last or (step + 1) % cfg.eval_every == 0 else None
        run.log(step, ("loss", "val_loss"), loss=loss, val_loss=val, grad_norm=grad_norm, lr=lr,
                tokens=sum(len(ids) for ids, *_ in rows), **more)
    return run.finish(("loss", "val_loss", "kl", "entropy"), then=["model.py", cfg.out])


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
