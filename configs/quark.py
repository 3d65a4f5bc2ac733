"""Quark: learn from good samples and bad ones, each behind a message that tells its quality; then ask for the best.

    minimise  E [ -log π(y | q, x) ] + β KL(π(· | q, x) || π_ref(· | x)) - η H(π(· | q, x))

x is the prompt, y a sample, and q the system message before them, "Quality 1." to "Quality 5.". Nothing is pushed down:
bad samples teach what goes with a bad q. The KL keeps π near the model that knows no q; the entropy keeps it diverse.
KL and entropy are exact, over the whole vocabulary, and are means over the tokens that the assistant says.

Paper: Lu et al. 2205.13636, eq. 4, with the KL in the direction of the authors' code. Departures: q is a system message
instead of a token of its own, and a prompt's tokens count a little in the likelihood, as in sft.py, whose options and
steps these are. A round is one run; configs/quark.sh has two, with the sampling before each.

    python reward.py label --n 3000 --scale 0 --flip 0 --out out/samples
    python configs/quark.py --quantiles 5                out/sft + out/samples -> out/quark
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sft
from data import (Natural, NonNegative, OptionError, Run, UserError, collate, encode, guard, micro_batches, open_stream,
                  parse)
from model import Optimizer, at_positions, full, head_chunk, load_model, setup, steps
from reward import EARLIER, with_system, write_records


@dataclass
class Config(sft.Config):
    """Quark: fine-tuning on samples behind messages that tell their quality."""
    out: str = "out/quark"      # folder of the run; the same command continues an interrupted one
    init: str = "out/sft"       # checkpoint to start from, or new: random weights of this size
    ref: str = ""               # π_ref; none: init
    data: str = "out/samples/pairs.jsonl"  # samples with their scores, or (with --quantiles 0) conversations
    quantiles: Natural = 0      # parts of equal size, by score, that get a message; 0: the data have the messages
    kl_coef: NonNegative = 0.05  # β
    ent_coef: NonNegative = 0.06  # η
    packing: Natural = 0        # always 0: a sequence has its row to itself, beside that of the reference

    def __post_init__(self):
        super().__post_init__()
        if self.packing:
            raise OptionError(f"--packing {self.packing}: Quark has a row for each sequence; only 0")
        if self.loss_on == "all" or self.prompt_weight == 1:
            raise OptionError("--loss_on all and --prompt_weight 1 are not for Quark: its KL and entropy are over what "
                              "the assistant says, which has to weigh more than the rest")
        if self.init == "new" and not self.ref:
            raise OptionError("--init new is no reference; name one with --ref")


# ---------------------------------------------------------------- the mathematics

def kl_and_entropy(model, ref, told, bare):
    """Σ KL(π(· | q, x) || π_ref(· | x)) and Σ H(π(· | q, x)) over what the assistant says: two scalars.

    told and bare: Batches of the same conversations, with their system messages and without. What the assistant says
    stands at other places in them, but in the same order, so the n-th of one belongs to the n-th of the other.
    """
    def head(hidden, ref_hidden):                                                        # (N, C) each
        logp = full(model.logits(hidden)).log_softmax(-1)                                # (N, V)
        with torch.no_grad():
            ref_logp = full(ref.logits(ref_hidden)).log_softmax(-1)                      # (N, V)
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)                                    # (N,)
        entropy = -(logp.exp() * logp).sum(-1)                                           # (N,)
        return kl, entropy

    said, bare_said = ((x.mask == 1).nonzero(as_tuple=True) for x in (told, bare))       # (N,), (N,) each
    hidden = model(told.tokens, where=said)                                              # (N, C)
    with torch.no_grad():
        ref_hidden = ref(bare.tokens, where=bare_said)                                   # (N, C)
    shape, chunk = told.mask.shape, head_chunk(model)
    kl, entropy = at_positions(head, shape, said, hidden, ref_hidden, chunk=chunk)       # (B, T-1)
    return kl.sum(), entropy.sum()


# ---------------------------------------------------------------- the steps
# A sample is a pair of sft.py's rows (ids, weights): with its system message, and without.

def n_said(row):
    """How many tokens of a row the assistant says: they have weight 1, and all others less."""
    ids, weights = row
    return weights.count(1)


def pairs_of(record, model, cfg):
    """The pair of a record, in a list; none if nothing is said, or the context cuts more of it from one of the two."""
    tok, block_size = model.tok, model.config.block_size
    others = [turn for turn in record["messages"] if turn["role"] != "system"]
    told_rows = encode(record, tok, block_size, "assistant", cfg.prompt_weight)
    bare_rows = encode(dict(messages=others), tok, block_size, "assistant", cfg.prompt_weight)
    pairs = []
    for told, bare in zip(told_rows, bare_rows):
        if 0 < n_said(told) == n_said(bare):
            pairs.append((told, bare))
    return pairs


def by_quality(records, quantiles):
    """Demonstrations from rankings with scores: every response, worst first, asked for by its quality."""
    demos = []
    for record in records:
        turns = [turn for turn in record["prompt"] if turn["role"] != "system"]
        own = {key: value for key, value in record.items() if key not in EARLIER}
        for text, score in zip(record["responses"], record["scores"]):
            demos.append(own | dict(prompt=turns, response=text, scores=[score]))
    demos.sort(key=lambda demo: demo["scores"])
    out = []
    for place, demo in enumerate(demos):
        quality = 1 + place * quantiles // len(demos)
        out.append(with_system(demo, f"Quality {quality}."))
    return out


def pool(cfg, path):
    """Write the samples of all files, each asked for by its quality."""
    stream, _ = open_stream(cfg.data, "preference", cfg.seed, n_held=0, skip_bad=cfg.skip_bad)
    if not all("scores" in record for record in stream.items):
        raise UserError(f'{cfg.data}: --quantiles needs "scores" in all records')
    in_order = stream.batch(0, len(stream.items))
    write_records(path, by_quality(in_order, cfg.quantiles))
    return str(path)


def open_data(data, model, cfg):
    """The pairs to train on, a Stream, and the rows of held-out ones with their system messages."""
    stream, held = open_stream(data, "messages", cfg.seed, cfg.families, n_held=128, skip_bad=cfg.skip_bad,
                               think=cfg.think, context=(model.tok, model.config.block_size),
                               prepare=lambda record: pairs_of(record, model, cfg))
    return stream, [told for told, _ in held]


def batches(pairs, model, cfg):
    """The pairs as two Batches of the same samples at a time: with the system messages, and without."""
    lengths = [len(ids) for (ids, _), _ in pairs]
    for places in micro_batches(lengths, cfg.micro_tokens):
        told_rows, bare_rows = zip(*(pairs[i] for i in places))
        told = sft.Batch(*collate(told_rows, model.tok, model.device))
        bare = sft.Batch(*collate(bare_rows, model.tok, model.device))
        yield told, bare


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Draw samples, raise their likelihood near the reference, evaluate now and then: one step after another."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    ref = load_model(cfg.ref or cfg.init, like, n_scores=0, maker="python sft.py")
    model = sft.initial_model(cfg, like).prepare(cfg)
    data = pool(cfg, run.folder / "pool.jsonl") if cfg.quantiles else cfg.data
    stream, held = open_data(data, model, cfg)
    total = stream.updates(cfg)
    optimizer = Optimizer(model, cfg.lr, total, kind=cfg.optimizer, muon_lr=cfg.muon_lr, betas=(0.9, cfg.beta2),
                          weight_decay=cfg.weight_decay, warmup=cfg.warmup, clip=cfg.clip_grad)

    for step in steps(run, total, dict(model=model), dict(model=optimizer), {}, cfg.save_every):
        # 1. Draw some samples.
        pairs = stream.batch(step, cfg.batch)
        rows = [told for told, _ in pairs]
        weight, n = sft.total_weight(rows), sum(map(n_said, rows))

        # 2. Add up the gradient of the three terms, a micro-batch at a time.
        model.train()
        sums = dict(loss=0.0, kl=0.0, entropy=0.0)
        for told, bare in batches(pairs, model, cfg):
            nll = sft.sft_loss(model, told) / weight
            kl, entropy = kl_and_entropy(model, ref, told, bare)
            kl, entropy = kl / n, entropy / n
            loss = nll + cfg.kl_coef * kl - cfg.ent_coef * entropy
            loss.backward()
            for name, x in dict(loss=nll, kl=kl, entropy=entropy).items():
                sums[name] += x.detach()

        # 3. Update the weights.
        metrics = optimizer.step(step) | sums

        # 4. Evaluate now and then, and report. The loss is without KL and entropy, as val_loss is.
        tokens, val_loss = sum(len(ids) for ids, _ in rows), None
        if run.evaluates(step):
            val_loss = sft.evaluate(model, held, cfg)
        run.log(step, ("loss", "val_loss"), val_loss=val_loss, tokens=tokens, **metrics)
    return run.finish(("loss", "val_loss", "kl", "entropy"), then=["model.py", cfg.out, "--system", "Quality 5."])


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
