"""A process reward model: not how good an answer is, but whether each of its steps is right.

    minimise  -Σ_i [ y_i log σ(r_i) + (1 - y_i) log(1 - σ(r_i)) ] / n

over the n steps of an answer: r_i is the score at the token that ends step i, y_i is 1 if the step is right. Published:
Uesato et al. 2211.14275; Lightman et al. 2305.20050, whose labels are people's. Files with "steps" and "labels" are
learned from as they are; of sums, the labels can be made by rule (--check): is each equation true, is the answer?

    python reward.py label --families arith --by exact --select all --out out/answers
    python configs/process_rewards.py --check            out/sft + out/answers -> out/process

Its score of a whole answer is that of the last step, so it serves as any other: --reward out/process.
"""
import itertools
import json
import math
import re
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import (Count, Natural, NonNegative, Positive, Run, TrainConfig, UserError, collate, column,
                  encode, files, guard, item_batches, mean, open_stream, parse, read_rows, write_text)
from model import Optimizer, full, load_model, setup, steps
from reward import counts, tensor_like, write_records


@dataclass
class Config(TrainConfig):
    """Train a process reward model: is each step of an answer right? (2305.20050)"""
    out: str = "out/process"    # folder of the run; the same command continues an interrupted one
    init: str = "out/sft"       # checkpoint to start from; the score head starts at 0
    data: str = "out/answers/pairs.jsonl"  # answers in steps with labels; or answers with scores, see check
    check: bool = False         # cut the answers of reward.py label --select all into steps, and label each by rule
    # optimisation
    epochs: Positive = 2.0      # passes over the answers
    steps: Natural = 0          # updates; 0: what the epochs take
    batch: Count = 32           # answers an update
    lr: Positive = 1e-3         # peak learning rate of AdamW
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the hidden matrices, AdamW for the rest
    muon_lr: Positive = 0.003   # peak learning rate of Muon
    weight_decay: NonNegative = 0.1  # on matrices
    warmup: Natural = 10        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 50      # updates between evaluations on held-out answers
    save: str = ""              # a JSON file for the last of them


# ---------------------------------------------------------------- what is learned from

def checked_steps(text, right):
    """The steps of a response's thinking and its answer as [(step, 1 or 0)]: is each equation true (what claims nothing
    is), is the answer (`right` says)? Joined, the steps are the text. Labels for a process reward model, by rule."""
    parts = [text]
    if "<think>" in text:
        parts = re.findall(r"<think>[^,<]*,?|[^,<>]+,?|</think>.*", text, re.DOTALL)
    if "".join(parts) != text:
        return []
    *steps, answer = parts
    return [(step, int(is_true(step))) for step in steps] + [(answer, int(right))]


def is_true(step):
    """Whether a step is a true equation, or claims nothing."""
    if "=" not in step:
        return True
    found = re.fullmatch(r"(?:<think>)? ?([0-9]{1,9}) ([+-]) ([0-9]{1,9}) = (-?[0-9]{1,9}),?", step)
    return bool(found) and int(found[1]) + int(found[2] + found[3]) == int(found[4])


def check_answers(cfg, path):
    """Write the answers of all files in steps, each with its label; without those that cannot be divided."""
    made = []
    for file in files(cfg.data):
        for where, row in read_rows(file):
            if "response" not in row or "scores" not in row:
                raise UserError(f'{where}: --check needs "response" and "scores", as reward.py label --select all has')
            divided = checked_steps(row["response"], row["scores"][0] > 0.5)
            if divided:
                texts, labels = zip(*divided)
                own = {key: value for key, value in row.items() if key not in ("response", "scores")}
                made.append(own | dict(steps=texts, labels=labels))
    write_records(path, made)
    return str(path)


def stepped(record, tok, block):
    """The item of an answer in steps: the target marks the token that ends each step, where its score is read. No item
    if the answer was cut, or if two steps end in one token."""
    (ids, target), = encode(record, tok, block)
    start, last = target.index(1), len(ids) - 1
    pieces = [tok.enc.decode_single_token_bytes(token) for token in ids[start:last]]
    sizes = list(itertools.accumulate(map(len, pieces)))    # bytes up to the end of each token
    *bounds, whole = itertools.accumulate(len(step.encode()) for step in record["steps"])
    if sizes[-1:] != [whole]:
        return []
    ends = {start + bisect_left(sizes, bound) for bound in bounds}
    ends.add(last)                                          # the last step is over with the answer: its end token
    if len(ends) < len(record["steps"]):
        return []
    target = [int(place in ends) for place in range(len(ids))]
    return [dict(rows=[(ids, target)], labels=record["labels"])]


# ---------------------------------------------------------------- the steps of a run

def step_scores(model, items, cfg):
    """Yield (scores (S,) of all steps, items) by micro-batch."""
    for part in item_batches(items, cfg.micro_tokens):
        tokens, mask = collate(column(part, "rows"), model.tok, model.device)
        ends = F.pad(mask, (1, 0)).nonzero(as_tuple=True)                                # (S,), (S,)
        yield full(model.scores(model(tokens, where=ends)))[:, 0], part


def step_losses(scores, items):
    """Scores (S,) of the steps of items laid end to end -> the mean over each item's steps (n,)."""
    labels = tensor_like(scores, column(items, "labels"))                                # (S,)
    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return torch.stack([part.mean() for part in losses.split(counts(items, "labels"))])


@torch.no_grad()
def evaluate(model, items, cfg):
    """Held-out loss and mean score; of held-out steps the share that is right, which is the accuracy of who always says
    so, that of the model, and its accuracy on the wrong ones."""
    losses, said, true = [], [], []
    for scores, part in step_scores(model, items, cfg):
        losses += step_losses(scores, part).tolist()
        said += scores.tolist()
        true += [label > 0 for label in column(part, "labels")]
    hits = [(score > 0) == label for score, label in zip(said, true)]
    found = [hit for hit, label in zip(hits, true) if not label]
    return dict(val_loss=mean(losses), val_mean=mean(said), val_right=mean(true), val_accuracy=mean(hits),
                val_found=mean(found))


def save_table(run, cfg):
    """Write how the model judges held-out steps, as a table of one row, if it is to be saved."""
    if cfg.save:
        last = {key: value for key, value in run.rows[-1].items() if key.startswith("val_")}
        write_text(cfg.save, json.dumps(dict(rows=[dict(name=run.folder.name) | last]), indent=1))


def train(cfg):
    """Fit the score at the end of every step to whether the step is right."""
    run = Run(replace(cfg, save=""))  # where the table goes makes no other run
    if run.finished:
        save_table(run, cfg)
        return run.rows
    like = setup(cfg, run.tok)
    model = load_model(cfg.init, like, n_scores=1, maker="python sft.py").prepare(cfg)
    tok, block = model.tok, model.config.block_size
    data = check_answers(cfg, run.folder / "steps.jsonl") if cfg.check else cfg.data
    stream, held = open_stream(data, "steps", cfg.seed, n_held=400, context=(tok, block), skip_bad=cfg.skip_bad,
                               prepare=lambda record: stepped(record, tok, block))
    total = cfg.steps or math.ceil(cfg.epochs * len(stream.items) / cfg.batch)
    optimizer = Optimizer(model, cfg.lr, total, cfg.optimizer, cfg.muon_lr, cfg.weight_decay, warmup=cfg.warmup,
                          clip=cfg.clip_grad)

    for step in steps(run, total, dict(model=model), dict(model=optimizer), {}, cfg.save_every):
        items, metrics = stream.batch(step, cfg.batch), dict(loss=0.0)
        for scores, part in step_scores(model, items, cfg):
            loss = step_losses(scores, part).sum() / len(items)
            loss.backward()
            metrics["loss"] += loss.detach()
        metrics |= optimizer.step(step)
        if run.evaluates(step):
            metrics |= evaluate(model, held, cfg)
        run.log(step, ("loss", "val_accuracy"), **metrics)
    save_table(run, cfg)
    return run.finish(("loss", "val_loss", "val_accuracy"), then=["ppo.py", "--init", cfg.init, "--reward", cfg.out])


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
