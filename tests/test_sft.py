"""Pretraining and supervised fine-tuning: the loss is a sum one can do by hand, no shortcut changes it, and a run
that is killed at any moment ends like one that was not."""
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import policies
import sft
from data import Run, Tokenizer, UserError, encode, open_stream, toy_record
from model import GPT, GPTConfig, Setup, generate, load_model, load_tensors

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PLAINALIGN_DATA") or ROOT.parent / "shared" / "data")
TOK = Tokenizer.load("toy")
TINY = dict(init="new", n_layer=1, n_head=2, n_embd=32, block_size=64, device="cpu", dtype="fp32", threads=1, packing=64,
            prompt_weight=0.)


def chat(ask, says): return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": says}]}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def demonstrations(n, seed=0):
    rng = random.Random(seed)
    return [toy_record("messages", "train", ["write", "safe", "fmt"], rng) for _ in range(n)]


def tiny(seed=0, vocab=TOK.n_vocab, **size):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab, **dict(dict(block_size=64, n_layer=1, n_head=2, n_embd=32), **size)), TOK)


def fit(tmp_path, name="run", **options):
    """Run sft.py in this process; returns its config and its metrics."""
    cfg = sft.Config(**TINY | dict(out=str(tmp_path / name), steps=3, batch=8) | options)
    sft.train(cfg)
    return cfg, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def weights(folder): return policies.weights(folder)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(model, rows, **options):
    """Sum of the loss over the micro-batches that `options` lead to."""
    return sum(sft.sft_loss(model, x) for x in sft.batches(rows, model, sft.Config(**TINY | options)))


def by_hand(model, rows):
    """The same sum, one row and one token at a time."""
    total = 0.0
    for ids, target in rows:
        logp = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
        for t in range(1, len(ids)):
            total = total - target[t] * logp[t - 1, ids[t]]
    return total


def ragged(lengths=(1, 20, 3, 7, 20, 1, 12, 5, 9), loss_on="assistant", **more):
    """Conversations whose answers have these many digits."""
    return [row for n in lengths
            for row in encode(chat(f"Say {n}", "12345678901234567890"[:n]), TOK, 64, loss_on, **more)]


# ---- the loss

@pytest.mark.parametrize("options", [{}, dict(prompt_weight=.125), dict(loss_on="all")])
def test_loss_of_a_masked_sequence_is_the_hand_sum(double, options):
    model, rows = tiny(), ragged(**options)
    with torch.no_grad():
        hand = float(by_hand(model, rows))
        for packing in (0, 64):
            assert float(losses(model, rows, packing=packing)) == pytest.approx(hand, rel=1e-12)


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_new_model_knows_nothing(loss_on):
    rows = [row for record in demonstrations(40) for row in encode(record, TOK, 64, loss_on)]
    loss = float(losses(tiny(), rows).detach()) / sum(sum(target) for _, target in rows)
    assert abs(loss - math.log(TOK.n_vocab)) < .05


def test_6_prompt_labels_leave_the_loss_bit_equal():
    """A user's last words come after all that is learnt: as inputs they cannot matter, only as labels they could."""
    ask = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    some = [encode({"messages": ask + [{"role": "user", "content": text}]}, TOK, 64) for text in ("Bye now.", "What?")]
    a, b = (losses(tiny(), rows, packing=0).detach() for rows in some)
    assert torch.equal(a, b)
    some = [encode({"messages": ask + [{"role": "user", "content": text}]}, TOK, 64, "assistant", .1)
            for text in ("Bye now.", "What?")]
    assert losses(tiny(), some[0], packing=0) != losses(tiny(), some[1], packing=0)


@pytest.mark.parametrize("packing", [0, 64])
def test_4_the_gradient_sits_exactly_at_predecessors_of_supervised_tokens(packing, monkeypatch):
    model, rows, kept = tiny(), ragged(), []
    def keep(module, args, hidden):
        hidden.retain_grad()
        kept.append(hidden)
    model.register_forward_hook(keep)
    for x in sft.batches(rows, model, sft.Config(**TINY | dict(packing=packing))):
        kept.clear()
        sft.sft_loss(model, x).backward()
        touched = kept[0].grad.abs().sum(-1) > 0
        assert torch.equal(touched, x.mask > 0)
        for row, hit in zip(x.tokens.tolist(), touched.tolist()):     # the mask itself: answers and end tokens, by the role
            speaking = False
            for t, token in enumerate(row[1:]):
                speaking = (speaking or row[t] == TOK.role["assistant"]) and row[t] != TOK.end and token != TOK.pad
                assert hit[t] == speaking


def test_6_supervised_tokens_are_the_answers_and_their_ends():
    lengths = (1, 20, 3, 7, 20, 1, 12, 5, 9)
    rows = ragged(lengths)
    assert sum(sum(target) for _, target in rows) == sum(n + 1 for n in lengths)
    for packing in (0, 64):
        made = sft.batches(rows, tiny(), sft.Config(**TINY | dict(packing=packing)))
        assert sum(float(x.mask.sum()) for x in made) == sum(n + 1 for n in lengths)


def test_pretraining_counts_every_token_but_the_first():
    for record in ({"text": "The red kettle is superb."}, chat("Hi", "Hello.")):
        (ids, target), = encode(record, TOK, 64, "all")
        assert target == [0] + [1] * (len(ids) - 1) and ids[-1] == TOK.end


def gradients(model, rows, **options):
    model.zero_grad()
    losses(model, rows, **options).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_7_and_52_every_split_and_packing_give_the_same_gradient(double):
    model, rows = tiny(), ragged(prompt_weight=.125)
    model.zero_grad()
    by_hand(model, rows).backward()
    whole = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    for packing, micro_tokens in itertools.product((0, 16, 64, 128), (1, 64, 500, 10 ** 6)):
        assert torch.allclose(gradients(model, rows, packing=packing, micro_tokens=micro_tokens), whole, rtol=0, atol=1e-10)
    assert len(list(sft.batches(rows, model, sft.Config(packing=64, micro_tokens=64)))) > 2      # they are split


def test_7_the_whole_run_is_the_same_under_every_split(double, tmp_path):
    """Mean over the tokens of the whole batch: micro-batches of their own mean would weigh short answers more."""
    path = write(tmp_path / "d.jsonl", [chat(f"Say {n}", "12345678901234567890"[:n]) for n in [1] * 12 + [20] * 12])
    runs = [fit(tmp_path, f"{packing} {micro}", data=path, packing=packing, micro_tokens=micro, batch=20, prompt_weight=.125)
            for packing, micro in ((0, 10 ** 6), (0, 1), (64, 64), (128, 10 ** 6))]
    for cfg, rows in runs[1:]:
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in rows] == pytest.approx([r[key] for r in runs[0][1]], rel=1e-9)
        assert rows[-1]["val_loss"] == pytest.approx(runs[0][1][-1]["val_loss"], rel=1e-9)
        for name, tensor in weights(cfg.out).items():
            assert torch.allclose(tensor, weights(runs[0][0].out)[name], rtol=0, atol=1e-9)


def test_the_logged_loss_is_the_hand_sum_per_token(tmp_path):
    path = write(tmp_path / "d.jsonl", demonstrations(30))
    cfg, rows = fit(tmp_path, data=path, steps=1, batch=9, packing=0, seed=4)
    torch.manual_seed(4)
    fresh = GPT(GPTConfig(TOK.n_vocab, 64, 1, 2, 32))
    stream, held = open_stream(path, "messages", 4, prepare=lambda r: encode(r, TOK, 64))
    batch = stream.batch(0, 9)
    count = sum(sum(target) for _, target in batch)
    assert rows[0]["loss"] == pytest.approx(float(by_hand(fresh, batch).detach()) / count, rel=1e-5)
    assert rows[0]["tokens"] == sum(len(ids) for ids, _ in batch)
    trained = load_model(cfg.out, Setup(TOK))
    count = sum(sum(target) for _, target in held)
    assert rows[0]["val_loss"] == pytest.approx(float(by_hand(trained, held).detach()) / count, rel=1e-5)


# ---- training

def test_it_overfits_eight_examples_and_5_stops(tmp_path):
    asked = ["What is 3 + 4?", "Name two pots.", "Hi", "Who?", "Is it red?", "Write about the urn.", "A b c", "Go on."]
    said = ["The answer is 7.", "pan and jar.", "Hello.", "Ann", "No.", "The urn is great. It is deep.", "d e f g", "I will."]
    path = write(tmp_path / "d.jsonl", [chat(a, s) for a, s in zip(asked, said)] + [chat("held", "out")])
    cfg, rows = fit(tmp_path, data=path, steps=120, batch=9, lr=1e-2, warmup=5, eval_every=1000)
    assert rows[-1]["loss"] < .01
    prompts = [TOK.prompt([{"role": "user", "content": a}]) for a in asked]
    roll = generate(load_model(cfg.out, Setup(TOK)), prompts, 40, temperature=.4)     # at 1 a slip is a matter of luck
    assert roll.responses() == said and roll.finished.all()                      # and every one ends by itself


def test_5_the_end_token_is_learnt_and_padding_is_not(monkeypatch):
    assert TOK.pad != TOK.end
    model, rows = tiny(), ragged((3, 8))
    for packing in (0, 64):
        for x in sft.batches(rows, model, sft.Config(**TINY | dict(packing=packing))):
            learnt = Counter(x.tokens[:, 1:][x.mask > 0].tolist())
            assert learnt[TOK.end] == 2 and learnt[TOK.pad] == 0
    # A row of the embedding gets its gradient through the head where it is the target: raised, not lowered.
    model.zero_grad()
    hidden = torch.randn(1, 32)
    model.forward = lambda tokens, *_: hidden.expand(*tokens.shape, 32)
    losses(model, rows, packing=0).backward()
    push = model.transformer.wte.weight.grad @ hidden[0]
    assert push[TOK.end] < 0 < push[TOK.pad]


def test_pretraining_beats_the_unigram_entropy(tmp_path):
    _, rows = fit(tmp_path, loss_on="all", steps=80, batch=24, lr=3e-3, eval_every=1000)
    rng, counts = random.Random(0), Counter()
    for _ in range(500):
        for ids, target in encode(toy_record("text", "train", ["arith"], rng), TOK, 64, "all"):
            counts.update(ids[1:])
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    assert rows[0]["loss"] > 6 and rows[-1]["val_loss"] < unigram - .5


def test_40_small_steps_move_every_weight_in_bf16(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "1234567890" * 20}] * 30)
    options = dict(data=path, loss_on="all", dtype="bf16", optimizer="adamw", lr=1e-6, warmup=0, batch=2, block_size=32,
                   packing=32)
    cfg, _ = fit(tmp_path, "far", steps=20, **options)
    torch.manual_seed(0)
    before = {f"model/{k}": t for k, t in GPT(GPTConfig(TOK.n_vocab, 32, 1, 2, 32)).state_dict().items()}
    after = weights(cfg.out)
    moved = sum(int((after[k] != t).sum()) for k, t in before.items())
    assert moved > .99 * sum(t.numel() for t in before.values())
    assert all(t.dtype == torch.float32 for t in after.values())


def test_43_evaluation_changes_nothing(tmp_path):
    runs = [fit(tmp_path, f"every {n}", eval_every=n, dropout=.3, steps=6) for n in (1, 2, 10 ** 6)]
    assert len({tuple(r["loss"] for r in rows) for _, rows in runs}) == 1
    assert same(weights(runs[0][0].out), weights(runs[2][0].out))
    assert [sum(r["val_loss"] is not None for r in rows) for _, rows in runs] == [6, 3, 1]


SIZES = dict(n_layer=2, n_head=1, n_embd=64, block_size=128, dropout=.2)


@pytest.mark.parametrize("name, value", SIZES.items())
def test_a_size_that_the_model_of_init_has_not_is_refused(name, value, tmp_path):
    fit(tmp_path, "base", steps=1)
    with pytest.raises(UserError, match=name) as error:
        fit(tmp_path, "on", init=str(tmp_path / "base"), **{name: value})
    assert error.value.code == 2 and not (tmp_path / "on").exists()


def test_sizes_that_are_those_of_the_model_or_the_defaults_go_on(tmp_path):
    """One --config can hold the sizes for both stages."""
    fit(tmp_path, "base", steps=1, **SIZES)
    fit(tmp_path, "same", steps=1, init=str(tmp_path / "base"), **SIZES)
    plain = {name: getattr(sft.Config, name) for name in SIZES}
    fit(tmp_path, "default", steps=1, init=str(tmp_path / "base"), **plain)
    for name in ("same", "default"):
        assert {key: getattr(load_model(tmp_path / name).config, key) for key in SIZES} == SIZES


def test_43_evaluation_is_without_dropout():
    model, rows, cfg = tiny(dropout=.5).train(), ragged(), sft.Config(**TINY)
    seen = {sft.evaluate(model, rows, cfg) for _ in range(3)}
    model.train()
    assert len(seen) == 1 and seen != {float(losses(model, rows).detach()) / sum(sum(t) for _, t in rows)}


def test_two_runs_with_one_seed_agree_to_the_bit(tmp_path):
    runs = [fit(tmp_path, str(i), steps=20, seed=seed, dropout=.1) for i, seed in enumerate((0, 0, 1))]
    line = lambda rows: [(r["loss"], r["grad_norm"], r["val_loss"]) for r in rows]
    assert line(runs[0][1]) == line(runs[1][1]) and same(weights(runs[0][0].out), weights(runs[1][0].out))
    assert all(a["loss"] != b["loss"] for a, b in zip(runs[0][1], runs[2][1]))


def test_44_the_schedule_counts_updates_and_an_epoch_is_every_row(tmp_path):
    path = write(tmp_path / "d.jsonl", demonstrations(50))          # two are held out
    cfg, rows = fit(tmp_path, data=path, steps=0, batch=7, micro_tokens=64, lr=1e-3, warmup=2)
    assert len(rows) == math.ceil(48 / 7)
    cosine = [.1 + .45 * (1 + math.cos(math.pi * (i - 2) / 5)) for i in range(2, 7)]
    assert [r["lr"] for r in rows] == pytest.approx([5e-4, 1e-3] + [1e-3 * c for c in cosine])


@pytest.mark.parametrize("options, message", [
    (dict(batch=0), "--batch 0"), (dict(prompt_weight=2.), "--prompt_weight"),
    (dict(think=1.5), "--think 1.5"),
    (dict(n_head=3), "(--)?n_embd 32"),
    (dict(block_size=20), "(--)?block_size 20"), (dict(init="out/nowhere"), "out/nowhere: no checkpoint.*--init new"),
    (dict(data="no.jsonl"), "no.jsonl"), (dict(n_head=0), "(--)?n_head")])
def test_impossible_runs_are_refused_in_one_line_before_anything_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{message}[^\n]*"):
        fit(tmp_path, **options)
    assert not list(tmp_path.glob("*/*.safetensors"))


# ---- demonstrations of the toy world

def shown(tmp_path, monkeypatch, name, **options):
    """The answers in the demonstrations, training and held-out ones, that a run with these options sees."""
    seen, real = [], sft.encode
    with monkeypatch.context() as patch:
        patch.setattr(sft, "encode", lambda record, *args: seen.append(record["messages"][-1]["content"]) or real(
            record, *args))
        fit(tmp_path, name, **dict(families="arith", steps=5) | options)
    return seen


def test_think_reaches_the_demonstrations(tmp_path, monkeypatch):
    for think in (0.0, 1.0):
        answers = shown(tmp_path, monkeypatch, f"think {think}", think=think)
        assert all(("<think>" in answer) == think for answer in answers)
    usual = shown(tmp_path, monkeypatch, "usual")
    assert .2 < sum("<think>" in answer for answer in usual) / len(usual) < .5
    rng = random.Random("0 0")                                      # the first batch, as toy_record alone makes it
    expected = [toy_record("messages", "train", ["arith"], rng)["messages"][1]["content"] for _ in range(8)]
    assert usual[128:136] == expected                               # after the held-out ones


# ---- kill and resume

class Killed(BaseException):
    """What SIGKILL is to a process: nothing of ours catches it."""


def killing(monkeypatch, at):
    """Die at the at-th moment that matters: a row is logged, a save under way, a rename about to happen or done."""
    moments = itertools.count()
    def die():
        if next(moments) == at:
            raise Killed
    def around(f, before, after):
        return lambda *args, **kwargs: (before and die(), f(*args, **kwargs), after and die())[1]
    for owner, name, before, after in ((os, "replace", True, True), (os, "fsync", True, False), (Run, "log", False, True)):
        monkeypatch.setattr(owner, name, around(getattr(owner, name), before, after))
    return moments


def outcome(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], weights(folder)


def test_41_and_42_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", demonstrations(40))
    options = dict(data=path, steps=8, save_every=3, batch=6, eval_every=4, dropout=.1)       # 38 rows: epochs of 6.3
    with monkeypatch.context() as patch:
        moments = killing(patch, None)
        cfg, _ = fit(tmp_path, "whole", **options)
    rows, tensors = outcome(cfg.out)
    last = next(moments)
    assert last > 20
    for at in range(last):
        with monkeypatch.context() as patch:
            killing(patch, at)
            with pytest.raises(Killed):
                fit(tmp_path, f"at {at}", **options)
        folder = tmp_path / f"at {at}"
        done = (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0
        there = any((folder / name).exists() for name in ("checkpoint.safetensors", "config.json"))
        assert there or done <= 3                                   # once there is a model, there always is,
        if there:
            weights(folder)                                         # and it can be read
        if (folder / "metrics.jsonl").exists() and not (folder / "summary.json").exists():
            with open(folder / "metrics.jsonl", "a") as f:
                f.write('{"step": 7, "lo')                          # a line cut by the kill
        fit(tmp_path, f"at {at}", **options)
        assert (found := outcome(folder))[0] == rows and same(found[1], tensors), at
        assert (folder / "summary.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    options = dict(steps=4, save_every=2)
    whole, _ = fit(tmp_path, "whole", **options)
    with monkeypatch.context() as patch:
        saves, fsync = itertools.count(), os.fsync                  # of run.json, metrics.jsonl and a checkpoint
        def full(fd):
            if next(saves) > 2:
                raise OSError(28, "No space left on device")
            fsync(fd)
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="not saved, the disk is full; an earlier checkpoint there is intact"):
            fit(tmp_path, "full", **options)
    assert not list((tmp_path / "full").glob("*.part"))
    fit(tmp_path, "full", **options)
    assert outcome(tmp_path / "full")[0] == outcome(whole.out)[0]
    assert same(weights(tmp_path / "full"), weights(whole.out))


def test_41_a_real_kill(tmp_path):
    options = dict(steps=40, save_every=3, batch=8, eval_every=20, dropout=.1, packing=0)
    whole, _ = fit(tmp_path, "whole", **options)
    flags = [f"--{k}={v}" for k, v in (TINY | options | dict(out=tmp_path / "killed")).items()]
    process = subprocess.Popen([sys.executable, ROOT / "sft.py", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 8):
        time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "summary.json").exists()
    fit(tmp_path, "killed", **options)
    assert outcome(tmp_path / "killed")[0] == outcome(whole.out)[0]
    assert same(weights(tmp_path / "killed"), weights(whole.out))


def test_a_finished_run_does_nothing_again(tmp_path, capsys):
    cfg, _ = fit(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(cfg.out).rglob("*.*")}
    capsys.readouterr()
    fit(tmp_path)
    assert "finished; nothing to do" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(cfg.out).rglob("*.*")}


# ---- real data, with GPT-2's vocabulary

@pytest.mark.parametrize("name, options", [("plaintext/tinyshakespeare_input.txt", dict(loss_on="all")),
                                           ("alpaca_and_pairs/instruction-data.json", dict())])
def test_the_loss_falls_on_real_data(tmp_path, name, options):
    vocabulary, path = SHARED / "gpt2_bpe" / "r50k_base.tiktoken", SHARED / name
    if not (path.exists() and vocabulary.exists()):
        pytest.skip(f"{path} is not here")
    few = tmp_path / f"few{path.suffix}"
    if path.suffix == ".txt":
        few.write_text(path.read_text()[:8000])
    else:
        few.write_text(json.dumps(json.loads(path.read_text())[:60]))
    _, rows = fit(tmp_path, data=str(few), tokenizer=str(vocabulary), steps=8, batch=4, lr=1e-2, warmup=1,
                  optimizer="adamw", eval_every=1000, **options)
    assert abs(rows[0]["loss"] - math.log(50257)) < .2 and rows[-1]["loss"] < rows[0]["loss"] - .5
    assert rows[-1]["val_loss"] < rows[0]["loss"] - .5
