"""Pretraining and supervised fine-tuning: raise the likelihood of text someone wrote.

    minimise  L = - Σ_t w_t log π(y_t | y_<t) / Σ_t w_t                     (sums over the whole batch of a step)

Pretraining counts every token (w = 1); fine-tuning counts what the assistant says, its end token included
(InstructGPT, 2203.02155, step 1), and everything else with the weight `prompt_weight`: 0 as usual elsewhere, .1 here,
because reading the question well is half of what so small a model has to learn. The mean is over the tokens of the
whole batch however it is split into micro-batches: a mean of their means would weigh a short answer's tokens more.

    python sft.py --loss_on all --init new --out out/base        pretrain the toy base
    python sft.py                                                fine-tune it on demonstrations: out/base -> out/sft
    python sft.py --data my.jsonl --out out/mine                 on your file (README, "Your data")

What comes out on the toy is in README.md, "What comes out".
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from data import (THINK, Count, Families, Natural, NonNegative, OptionError, Run, Share,
                  TrainConfig, collate, encode, guard, late_rows, micro_batches, open_stream, pad, parse)
from model import GPTConfig, Optimizer, load_model, new_model, setup, steps, token_logprobs


PRETRAINING = dict(steps=1000, lr=3e-3, muon_lr=0.01)   # where an option is 0
FINE_TUNING = dict(steps=400, lr=1e-3, muon_lr=0.003)


@dataclass
class Config(TrainConfig):
    """Pretraining and supervised fine-tuning."""
    out: str = "out/sft"        # folder of the run; the same command continues an interrupted one
    # data
    data: str = "toy"           # toy, or a file (.txt, .json, .jsonl, .gz)
    families: Families = ""     # of the toy world, comma-separated; none for all
    think: Share = THINK        # share of the toy's sums demonstrated with thinking
    loss_on: Literal["assistant", "all"] = "assistant"  # all: pretraining, on documents
    prompt_weight: Share = 0.1  # weight of the other tokens beside the assistant's
    packing: Natural = 128      # sequences share rows of this many tokens, kept apart by a mask; 0: one row each
    # model
    init: str = "out/base"      # checkpoint to start from, or new: random weights of this size
    n_layer: Natural = 4        # of a new model
    n_head: Natural = 4         # of a new model
    n_embd: Natural = 128       # of a new model
    block_size: Natural = 256   # of a new model
    dropout: Share = 0.0        # of a new model
    # optimisation
    steps: Natural = 0          # updates; 0: what the epochs take, and without these 1,000 to pretrain, 400 to fine-tune
    epochs: NonNegative = 0.0   # passes over a file
    batch: Count = 64           # sequences an update
    lr: NonNegative = 0.0       # peak learning rate of AdamW; 0: .003 to pretrain, .001 to fine-tune
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, AdamW for the rest
    muon_lr: NonNegative = 0.0  # peak learning rate of Muon; 0: .01 to pretrain, .003 to fine-tune
    weight_decay: NonNegative = 0.1  # on matrices
    beta2: Share = 0.98         # of AdamW
    warmup: Natural = 20        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 100     # updates between evaluations on held-out records

    def __post_init__(self):
        super().__post_init__()
        if self.lora_r and self.init == "new":
            raise OptionError("--lora_r: LoRA adapts a trained model; --init new has to be trained whole")
        # At the rates of pretraining, fine-tuning first wrecks what the base can do, and then learns it anew.
        chosen = PRETRAINING if self.loss_on == "all" else FINE_TUNING
        self.lr = self.lr or chosen["lr"]
        self.muon_lr = self.muon_lr or chosen["muon_lr"]
        if not self.epochs:
            self.steps = self.steps or chosen["steps"]
        elif self.data == "toy" and not self.steps:
            raise OptionError(f"--epochs {self.epochs:g}: the toy world never ends; say --steps")


# ---------------------------------------------------------------- the mathematics

class Batch(NamedTuple):
    """Sequences that go through the model together: one to a row, or packed, several to a row."""
    tokens: torch.Tensor             # (B, T)
    mask: torch.Tensor               # (B, T-1) the weight w of token t+1 in the loss
    pos: torch.Tensor | None = None  # (B, T) of packed rows: the place of each token in its own sequence,
    see: torch.Tensor | None = None  # (B, 1, T, T) and which tokens it may look at


def sft_loss(model, x):
    """Σ_t w_t · -log π(token t+1) of a Batch: a sum, which the caller divides by the weight of the whole update."""
    logp = token_logprobs(model, x.tokens, x.mask, pos=x.pos, see=x.see)                 # (B, T-1)
    return -(logp * x.mask).sum()


# ---------------------------------------------------------------- the steps
# Until a Batch makes tensors of it, a sequence is a row: two lists (ids, weights), its tokens and the w of each.

SIZE = ("n_layer", "n_head", "n_embd", "block_size", "dropout")  # options of a new model


def initial_model(cfg, like):
    """The model to train: random weights, or a checkpoint's. like: whose tokenizer, device and precision it gets."""
    if cfg.init == "new":
        torch.manual_seed(cfg.seed)
        size = {name: getattr(cfg, name) for name in SIZE}
        return new_model(GPTConfig(vocab_size=like.tok.n_vocab, **size), like)
    model = load_model(cfg.init, like, n_scores=0, maker="python sft.py --loss_on all --init new --out out/base")
    for name in SIZE:
        asked, has = getattr(cfg, name), getattr(model.config, name)
        if asked not in (has, getattr(Config, name)):  # a default asks for nothing: one --config can serve both stages
            raise OptionError(f"--{name} {asked}: {cfg.init} has {has}, and only --init new makes a model of another")
    return model


def open_data(model, cfg):
    """The rows to train on, a Stream, and a list of held-out ones."""
    tok, block_size = model.tok, model.config.block_size
    kind = "text" if cfg.loss_on == "all" else "messages"
    rows_of = encode if cfg.data == "toy" else late_rows    # the toy's are seen once
    return open_stream(cfg.data, kind, cfg.seed, cfg.families, n_held=128, skip_bad=cfg.skip_bad,
                       think=cfg.think, context=(tok, block_size),
                       prepare=lambda record: rows_of(record, tok, block_size, cfg.loss_on, cfg.prompt_weight))


def pack(rows, tok, width, device="cpu"):
    """Rows -> tokens (B, T), mask (B, T-1), pos (B, T), see (B, 1, T, T).

    Several sequences share a line of `width` tokens (first fit, longest first). Each keeps its own positions from 0,
    and `see` lets a token look only at earlier tokens of its own sequence, so the loss is exactly that of the
    separate rows. The number of lines is rounded up to a multiple of 4, for few shapes.
    """
    lines = []
    for ids, target in sorted(rows, key=lambda row: -len(row[0])):
        for line in lines:
            if len(line["tokens"]) + len(ids) <= width:
                break
        else:
            line = dict(tokens=[], target=[], pos=[], part=[], parts=0)
            lines.append(line)
        line["tokens"] += ids
        line["target"] += target                        # its first is 0: nothing is predicted across a boundary
        line["pos"] += range(len(ids))
        line["part"] += [line["parts"]] * len(ids)
        line["parts"] += 1
    empty = dict(tokens=[], target=[], pos=[], part=[])
    lines += [empty] * (-len(lines) % 4)

    def lay(key, value, dtype=torch.long):
        return pad([line[key] for line in lines], value, device, dtype, width)
    tokens, pos, part = lay("tokens", tok.pad), lay("pos", 0), lay("part", -1)           # (B, T)
    mask = lay("target", 0, torch.float32)[:, 1:]                                        # (B, T-1)
    earlier = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=device).tril()
    own = part[:, :, None] == part[:, None, :]                                           # (B, T, T)
    return tokens, mask, pos, (own & earlier)[:, None]


def batches(rows, model, cfg):
    """The rows as Batches of at most cfg.micro_tokens tokens each, padding included."""
    lengths = [len(ids) for ids, _ in rows]
    if cfg.packing:
        width = max(cfg.packing, *lengths)
        packed = Batch(*pack(rows, model.tok, width, model.device))
        n = max(1, cfg.micro_tokens // packed.tokens.shape[1])
        for i in range(0, len(packed.tokens), n):
            yield Batch(*(x[i:i + n] for x in packed))
    else:
        for places in micro_batches(lengths, cfg.micro_tokens):
            some = [rows[i] for i in places]
            yield Batch(*collate(some, model.tok, model.device))


def draw(stream, step, model, cfg):
    """What a step trains on: its rows, and the Batches that they make."""
    rows = stream.batch(step, cfg.batch)
    return rows, list(batches(rows, model, cfg))


def total_weight(rows):
    """Σ w over all tokens of the rows."""
    return sum(sum(weights) for _, weights in rows)


@torch.no_grad()
def evaluate(model, rows, cfg):
    """The loss on held-out rows, without dropout."""
    model.eval()
    loss = 0.0
    for x in batches(rows, model, cfg):
        loss += sft_loss(model, x).double()
    return loss / total_weight(rows)


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Draw a batch, raise the likelihood of what it says, evaluate now and then: one step after another."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    model = initial_model(cfg, setup(cfg, run.tok)).prepare(cfg)
    stream, held = open_data(model, cfg)
    total = stream.updates(cfg)
    floor = 0.1 if cfg.loss_on == "all" else 0.0  # how often a model thinks settles only as the rate goes to 0
    optimizer = Optimizer(model, cfg.lr, total, kind=cfg.optimizer, muon_lr=cfg.muon_lr, betas=(0.9, cfg.beta2),
                          weight_decay=cfg.weight_decay, warmup=cfg.warmup, floor=floor, clip=cfg.clip_grad)

    # A GPU's gradient leaves Python free to draw the next rows; a CPU's needs all cores itself.
    aside = ThreadPoolExecutor(1) if model.device.type == "cuda" else None
    drawn = None  # what the next step trains on, as soon as it is there
    for step in steps(run, total, dict(model=model), dict(model=optimizer), {}, cfg.save_every):
        # 1. Draw some rows.
        rows, micro = drawn.result() if drawn else draw(stream, step, model, cfg)
        weight, tokens = total_weight(rows), sum(len(ids) for ids, _ in rows)

        # 2. Add up the gradient of their loss, a micro-batch at a time.
        model.train()
        loss, drawn = 0.0, None
        for x in micro:
            part = sft_loss(model, x) / weight
            if aside and drawn is None:
                drawn = aside.submit(draw, stream, step + 1, model, cfg)
            part.backward()
            loss += part.detach()

        # 3. Update the weights.
        metrics = optimizer.step(step)

        # 4. Evaluate now and then, and report.
        val_loss = None
        if run.evaluates(step):
            val_loss = evaluate(model, held, cfg)
        run.log(step, ("loss", "val_loss"), loss=loss, val_loss=val_loss, tokens=tokens, **metrics)
    return run.finish(("loss", "val_loss"), then=["model.py", cfg.out])


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
