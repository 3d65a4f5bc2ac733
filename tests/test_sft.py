"""Pretraining and supervised fine-tuning: the loss is a sum one can do by hand, no shortcut changes it, and the loop is
that of a second one, done slowly.

What all trainers have in common (dying and resuming, seeds, evaluation, micro-batches) is in test_runs.py.
"""
import itertools
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch

import runs
import sft
from data import UserError, encode, open_stream, toy_record
from model import GPT, GPTConfig, Setup, generate, load_model
from policies import TOK, weights
from runs import close, write

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PLAINALIGN_DATA") or ROOT.parent / "shared" / "data")
SIZE = dict(n_layer=1, n_head=2, n_embd=32, block_size=64)
TINY = dict(SIZE, init="new", device="cpu", dtype="fp32", threads=1, packing=64, prompt_weight=0.)


def chat(ask, says):
    return dict(messages=[dict(role="user", content=ask), dict(role="assistant", content=says)])


def demonstrations(n):
    rng = random.Random(0)
    return [toy_record("messages", "train", ["write", "safe", "fmt"], rng) for _ in range(n)]


def tiny_model(seed=0, **size):
    torch.manual_seed(seed)
    return GPT(GPTConfig(TOK.n_vocab, **(SIZE | size)), TOK)


def fit(tmp_path, name="run", **options):
    """Run sft.py in this process -> its folder, its rows."""
    usual = dict(steps=3, batch=8, warmup=20, clip_grad=1.0, save_every=25)
    rows = runs.train(sft, tmp_path / name, **(TINY | usual | options))
    return str(tmp_path / name), rows


def losses(model, rows, **options):
    """Sum of the loss over the micro-batches that `options` lead to."""
    cfg = sft.Config(**(TINY | options))
    return sum(sft.sft_loss(model, x) for x in sft.batches(rows, model, cfg))


def by_hand(model, rows):
    """The same sum, one row and one token at a time."""
    total = 0.0
    for ids, target in rows:
        logp = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
        for t in range(1, len(ids)):
            total = total - target[t] * logp[t - 1, ids[t]]
    return total


def weight(rows):
    return sum(sum(target) for _, target in rows)


def gradient(loss, model):
    slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([slope.reshape(-1) for slope in slopes])


DIGITS = (1, 20, 3, 7, 20, 1, 12, 5, 9)


def ragged(loss_on="assistant", **more):
    """Conversations whose answers have these many digits."""
    rows = []
    for n in DIGITS:
        record = chat(f"Say {n}", "12345678901234567890"[:n])
        rows += encode(record, TOK, 64, loss_on, **more)
    return rows


# ---------------------------------------------------------------- the loss

@pytest.mark.parametrize("options", [{}, dict(prompt_weight=.125), dict(loss_on="all")], ids=str)
def test_7_and_52_every_split_and_packing_give_the_same_gradient(float64, options):
    """And the same loss: those of a sum done by hand."""
    model, rows = tiny_model(), ragged(**options)
    want = by_hand(model, rows)
    slope = gradient(want, model)
    for packing, micro_tokens in itertools.product((0, 16, 64, 128), (1, 64, 500, 10 ** 6)):
        got = losses(model, rows, packing=packing, micro_tokens=micro_tokens)
        close(got.detach(), want.detach(), rtol=1e-12)
        close(gradient(got, model), slope)
    assert len(list(sft.batches(rows, model, sft.Config(packing=64, micro_tokens=64)))) > 2, "nothing was split"


def test_6_prompt_labels_leave_the_loss_bit_equal():
    """A user's last words come after all that is learnt: as inputs they cannot matter, only as labels they could."""
    def loss(text, weight):
        turns = chat("Hi", "Hello.")["messages"] + [dict(role="user", content=text)]
        rows = encode(dict(messages=turns), TOK, 64, "assistant", weight)
        return losses(tiny_model(), rows, packing=0).item()
    assert loss("Bye now.", 0) == loss("What?", 0)
    assert loss("Bye now.", .1) != loss("What?", .1)


def spoken(line):
    """Which tokens of a line of tokens, but for its first, the assistant says, the ends included."""
    said, speaking = [], False
    for before, token in zip(line, line[1:]):
        if before == TOK.role["assistant"]:
            speaking = True
        elif before == TOK.end or token == TOK.pad:
            speaking = False
        said.append(speaking)
    return said


@pytest.mark.parametrize("packing", [0, 64])
def test_4_the_gradient_sits_exactly_at_predecessors_of_what_the_assistant_says(packing):
    """Its end token included, and of nothing else."""
    model, kept, learnt = tiny_model(), [], 0

    def keep(module, args, added):
        added.retain_grad()
        kept.append(added)
    model.transformer.h[-1].attn.register_forward_hook(keep)    # behind it every token is on its own
    cfg = sft.Config(**(TINY | dict(packing=packing)))
    for x in sft.batches(ragged(), model, cfg):
        sft.sft_loss(model, x).backward()
        touched = kept.pop().grad.abs().sum(-1) > 0
        for line, learns in zip(x.tokens.tolist(), touched.tolist()):
            said = spoken(line)
            assert learns[:len(said)] == said, f"other tokens of {TOK.decode(line)!r} are learnt"
            learnt += sum(said)
    assert learnt == sum(DIGITS) + len(DIGITS)


def test_pretraining_counts_every_token_but_the_first():
    for record in (dict(text="The red kettle is superb."), chat("Hi", "Hello.")):
        (ids, target), = encode(record, TOK, 64, "all")
        assert target == [0] + [1] * (len(ids) - 1) and ids[-1] == TOK.end


# ---------------------------------------------------------------- the loop against a second loop

# Every option takes another value than its default at least once; those of Muon are in test_runs.py.
LOOPS = {
    "fine-tuning": dict(prompt_weight=.125, seed=3),
    "schedule": dict(warmup=2, weight_decay=.3, clip_grad=.5, beta2=.6, steps=5, packing=0),
    "an epoch": dict(steps=0, epochs=1., batch=7, lr=1e-3),
    "pretraining": dict(loss_on="all", texts=True),
    "conversations count whole in pretraining": dict(loss_on="all", data="toy", steps=2),
    "from a checkpoint": dict(init="CHECKPOINT", packing=128),
}


@pytest.mark.parametrize("name", LOOPS)
def test_44_loop_equals_a_slow_loop(name, tiny, tmp_path, float64):
    """Every logged number of every step and every weight at the end. An update is the mean over the tokens of its
    whole batch: micro-batches of their own mean would weigh short answers more."""
    options = TINY | dict(steps=3, batch=6, optimizer="adamw", warmup=0, clip_grad=0.0)
    options |= dict(eval_every=2, lr=3e-3, micro_tokens=100) | LOOPS[name]
    kind, records = "messages", demonstrations(50)          # two are held out
    if options.pop("texts", False):
        kind, records = "text", [dict(text=" ".join(record["messages"][-1]["content"])) for record in records]
    options.setdefault("data", write(tmp_path / "d.jsonl", records))
    options["init"] = options["init"].replace("CHECKPOINT", tiny)
    if options["data"] == "toy":
        kind = "text"
    folder, rows = fit(tmp_path, **options)
    cfg = sft.Config(**options)

    def prepare(record):
        return encode(record, TOK, 64, cfg.loss_on, cfg.prompt_weight)
    stream, held = open_stream(cfg.data, kind, cfg.seed, n_held=128, prepare=prepare, think=cfg.think)
    net = tiny_model(cfg.seed) if cfg.init == "new" else load_model(tiny)
    total = cfg.steps or math.ceil(48 / cfg.batch)
    floor = .1 if cfg.loss_on == "all" else 0
    optimizer = runs.SlowOptimizer(net, cfg.lr, total, cfg, betas=(.9, cfg.beta2), floor=floor)
    assert len(rows) == total, f"{len(rows)} steps instead of {total}"
    for step, row in enumerate(rows):
        batch = stream.batch(step, cfg.batch)
        loss = by_hand(net, batch) / weight(batch)
        loss.backward()
        want = optimizer.step(step) | dict(loss=loss.item(), val_loss=None)
        want["tokens"] = sum(len(ids) for ids, _ in batch)
        if step % 2 or step + 1 == total:
            want["val_loss"] = by_hand(net, held).item() / weight(held)
        runs.compare_rows(step, row, want)
    runs.compare_weights(weights(folder), net)


# ---------------------------------------------------------------- training

def test_it_overfits_eight_examples_and_5_stops(tmp_path):
    examples = {"What is 3 + 4?": "The answer is 7.", "Name two pots.": "pan and jar.", "Hi": "Hello.", "Who?": "Ann",
                "Is it red?": "No.", "Write about the urn.": "The urn is great. It is deep.", "A b c": "d e f g",
                "Go on.": "I will."}
    records = [chat(ask, says) for ask, says in examples.items()]
    path = write(tmp_path / "d.jsonl", [*records, chat("held", "out")])
    folder, rows = fit(tmp_path, data=path, steps=120, batch=9, lr=1e-2, muon_lr=.02, warmup=5)
    assert abs(rows[0]["loss"] - math.log(TOK.n_vocab)) < .1, "a new model knows nothing"
    assert rows[-1]["loss"] < .01
    prompts = [TOK.prompt(record["messages"][:1]) for record in records]
    roll = generate(load_model(folder, Setup(TOK)), prompts, 40, temperature=.4)      # at 1 a slip is a matter of luck
    assert roll.responses() == list(examples.values())
    assert roll.finished.all(), "every one ends by itself"


def test_5_the_end_token_is_learnt_and_padding_is_not():
    """A row of the embedding gets its gradient through the head where it is the target."""
    model, hidden = tiny_model(), torch.randn(1, 32)
    model.forward = lambda *_, where: hidden.expand(len(where[0]), 32)
    loss = losses(model, ragged(), packing=0)
    slope, = torch.autograd.grad(loss, model.transformer.wte.weight)
    push = slope @ hidden[0]
    assert push[TOK.end] < 0 < push[TOK.pad]



def test_40_small_steps_move_every_weight_in_bf16(tmp_path):
    path = write(tmp_path / "d.jsonl", [dict(text="1234567890" * 20)] * 30)
    options = dict(loss_on="all", dtype="bf16", optimizer="adamw", lr=1e-6, warmup=0, batch=2)
    folder, _ = fit(tmp_path, data=path, steps=20, block_size=32, packing=32, **options)
    before, after = tiny_model(block_size=32).state_dict(), weights(folder)
    for name, tensor in before.items():
        new = after[f"model/{name}"]
        still = (new == tensor).double().mean()
        assert new.dtype == torch.float32 and still < .05, f"{still:.0%} of {name} has not moved"


SIZES = dict(n_layer=2, n_head=1, n_embd=64, block_size=128, dropout=.2)


def test_sizes_that_are_those_of_the_model_or_the_defaults_go_on_and_no_others(tmp_path):
    """One --config can hold the sizes for both stages."""
    fit(tmp_path, "base", steps=1, **SIZES)
    base = str(tmp_path / "base")
    plain = {name: getattr(sft.Config, name) for name in SIZES}
    for name, sizes in dict(same=SIZES, default=plain).items():
        fit(tmp_path, name, steps=1, init=base, **sizes)
        config = vars(load_model(tmp_path / name).config)
        assert config == config | SIZES
    for name, value in dict(n_layer=3, n_head=2, n_embd=32, block_size=64, dropout=.4).items():
        sizes = plain | {name: value}
        with pytest.raises(UserError, match=name):
            fit(tmp_path, "on", init=base, **sizes)
        assert not (tmp_path / "on").exists()


def test_43_evaluation_is_without_dropout():
    model, rows, cfg = tiny_model(dropout=.5).train(), ragged(), sft.Config(**TINY)
    got = sft.evaluate(model, rows, cfg)
    model.eval()
    close(got, by_hand(model, rows).item() / weight(rows), atol=1e-4)


@pytest.mark.parametrize("flags, word", [
    ("--batch 0", "--batch"), ("--prompt_weight 2", "--prompt_weight"), ("--think 1.5", "--think"),
    ("--init new --n_embd 32 --n_head 3", "n_embd"),
    ("--init new --block_size 20", "block_size"), ("--init out/nowhere", "--init new"),
    ("--init new --data no.jsonl", "no.jsonl"), ("--init new --n_head 0", "n_head"),
    ("--init new --lora_r 2", "--lora_r"), ("--init new --epochs 1", "--epochs")])
def test_refusals(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = runs.refuse(sft, flags.split(), monkeypatch, capsys)
    assert code in (1, 2) and word in error


@pytest.mark.parametrize("loss_on, chosen", [("all", sft.PRETRAINING), ("assistant", sft.FINE_TUNING)])
def test_rates_and_steps_that_are_0_are_those_of_the_stage(loss_on, chosen):
    """But the epochs decide how many steps a file takes. What somebody asks for is left alone."""
    def options(**given):
        cfg = sft.Config(loss_on=loss_on, **given)
        return dict(steps=cfg.steps, lr=cfg.lr, muon_lr=cfg.muon_lr)
    assert options() == chosen
    assert options(data="my.jsonl") == chosen
    assert options(data="my.jsonl", epochs=.5) == chosen | dict(steps=0)
    asked = dict(steps=7, lr=.5, muon_lr=.25)
    assert options(**asked) == asked


def test_think_reaches_the_demonstrations(tmp_path, monkeypatch):
    calls = runs.watch(monkeypatch, sft, "encode")
    for think in (0.0, 1.0):
        calls["encode"].clear()
        fit(tmp_path, f"think {think}", families="arith", steps=1, think=think)
        assert calls["encode"]
        for (record, *_), _ in calls["encode"]:
            assert ("<think>" in record["messages"][-1]["content"]) == think


# ---------------------------------------------------------------- real data, with GPT-2's vocabulary

@pytest.mark.parametrize("name, loss_on", [("plaintext/tinyshakespeare_input.txt", "all"),
                                           ("alpaca_and_pairs/instruction-data.json", "assistant")])
def test_the_loss_falls_on_real_data(tmp_path, name, loss_on):
    vocabulary, path = SHARED / "gpt2_bpe" / "r50k_base.tiktoken", SHARED / name
    if not (path.exists() and vocabulary.exists()):
        pytest.skip(f"{path} is not here")
    few, text = tmp_path / path.name, path.read_text()
    if path.suffix == ".txt":
        few.write_text(text[:8000])
    else:
        few.write_text(json.dumps(json.loads(text)[:60]))
    options = dict(steps=8, batch=4, lr=1e-2, warmup=1, optimizer="adamw", eval_every=1000)
    _, rows = fit(tmp_path, data=str(few), tokenizer=str(vocabulary), loss_on=loss_on, **options)
    first, last = rows[0], rows[-1]
    assert abs(first["loss"] - math.log(50257)) < .2
    assert last["loss"] < first["loss"] - .5 and last["val_loss"] < first["loss"] - .5
