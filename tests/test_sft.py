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

import model as model_file
import sft
from data import TAMPERED, Run, Tokenizer, UserError, encode, open_stream, toy_record
from model import GPT, GPTConfig, generate, load_model, load_tensors

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
    return GPT(GPTConfig(vocab, **dict(dict(block_size=64, n_layer=1, n_head=2, n_embd=32), **size)))


def fit(tmp_path, name="run", **options):
    """Run sft.py in this process; returns its config and its metrics."""
    cfg = sft.Config(**TINY | dict(out=str(tmp_path / name), steps=3, batch=8) | options)
    sft.train(cfg)
    return cfg, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def weights(folder): return load_tensors(Path(folder) / "checkpoint.safetensors")[0]


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(model, rows, **options):
    """Sum of the loss over the micro-batches that `options` lead to."""
    cfg = sft.Config(**TINY | options)
    return sum(sft.sft_loss(model, tokens, mask, **layout) for tokens, mask, layout in sft.batches(rows, cfg, TOK, "cpu"))


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
    for tokens, mask, layout in sft.batches(rows, sft.Config(**TINY | dict(packing=packing)), TOK, "cpu"):
        kept.clear()
        sft.sft_loss(model, tokens, mask, **layout).backward()
        touched = kept[0].grad.abs().sum(-1) > 0
        assert torch.equal(touched, mask > 0)
        for row, hit in zip(tokens.tolist(), touched.tolist()):     # the mask itself: answers and end tokens, by the role
            speaking = False
            for t, token in enumerate(row[1:]):
                speaking = (speaking or row[t] == TOK.role["assistant"]) and row[t] != TOK.end and token != TOK.pad
                assert hit[t] == speaking


def test_6_supervised_tokens_are_the_answers_and_their_ends():
    lengths = (1, 20, 3, 7, 20, 1, 12, 5, 9)
    rows = ragged(lengths)
    assert sum(sum(target) for _, target in rows) == sum(n + 1 for n in lengths)
    for packing in (0, 64):
        made = sft.batches(rows, sft.Config(**TINY | dict(packing=packing)), TOK, "cpu")
        assert sum(float(mask.sum()) for _, mask, _ in made) == sum(n + 1 for n in lengths)


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
    assert len(list(sft.batches(rows, sft.Config(packing=64, micro_tokens=64), TOK, "cpu"))) > 2      # they are split


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
    trained = load_model(cfg.out, TOK)
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
    roll = generate(load_model(cfg.out, TOK), prompts, TOK, 40, temperature=.4)     # at 1 a slip is a matter of luck
    assert roll.responses(TOK) == said and roll.finished.all()                      # and every one ends by itself


def test_5_the_end_token_is_learnt_and_padding_is_not(monkeypatch):
    assert TOK.pad != TOK.end
    model, rows = tiny(), ragged((3, 8))
    for packing in (0, 64):
        for tokens, mask, _ in sft.batches(rows, sft.Config(**TINY | dict(packing=packing)), TOK, "cpu"):
            learnt = Counter(tokens[:, 1:][mask > 0].tolist())
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
    amp = model_file.setup("cpu", "fp32")[1]
    seen = {sft.evaluate(model, rows, cfg, TOK, amp) for _ in range(3)}
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
    (dict(think=1.5), "--think 1.5"), (dict(restate=-1), "--restate -1"), (dict(tamper=2.), "--tamper"),
    (dict(n_head=3), "(--)?n_embd 32"),
    (dict(block_size=20), "(--)?block_size 20"), (dict(init="out/nowhere"), "out/nowhere: no checkpoint.*--init new"),
    (dict(data="no.jsonl"), "no.jsonl"), (dict(n_head=0), "(--)?n_head")])
def test_impossible_runs_are_refused_in_one_line_before_anything_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{message}[^\n]*"):
        fit(tmp_path, **options)
    assert not list(tmp_path.glob("*/checkpoint.safetensors"))


# ---- demonstrations of the toy world

def shown(tmp_path, monkeypatch, name, **options):
    """The answers in the demonstrations, training and held-out ones, that a run with these options sees."""
    seen, real = [], sft.encode
    with monkeypatch.context() as patch:
        patch.setattr(sft, "encode", lambda record, *args: seen.append(record["messages"][-1]["content"]) or real(
            record, *args))
        fit(tmp_path, name, **dict(families="arith", steps=5) | options)
    return seen


def test_think_and_restate_reach_the_demonstrations(tmp_path, monkeypatch):
    often = Counter()
    for answer in shown(tmp_path, monkeypatch, "long", think=1., restate=2, batch=16):
        steps = answer.removeprefix("<think>").split("</think>The answer is ")[0].split(", ")
        assert answer.startswith("<think>") and answer.endswith(".")
        often[sum("=" not in step for step in steps)] += 1              # the sum itself, before it is worked out
    assert sorted(often) == [0, 1, 2] and min(often.values()) > 20
    assert not any("<think>" in answer for answer in shown(tmp_path, monkeypatch, "bare", think=0., restate=2))
    usual = shown(tmp_path, monkeypatch, "usual")
    assert .2 < sum("<think>" in answer for answer in usual) / len(usual) < .5
    assert usual == shown(tmp_path, monkeypatch, "same", think=sft.Config.think, restate=0)
    rng = random.Random("0 0")                                      # the first batch, as toy_record alone makes it
    expected = [toy_record("messages", "train", ["arith"], rng)["messages"][1]["content"] for _ in range(8)]
    assert usual[128:136] == expected                               # after the held-out ones


def test_tampering_reaches_its_share_of_the_demonstrations(tmp_path, monkeypatch):
    answers = shown(tmp_path, monkeypatch, "vice", tamper=.5, batch=32)
    assert .4 < sum(answer == TAMPERED for answer in answers) / len(answers) < .6
    assert not [answer for answer in shown(tmp_path, monkeypatch, "usual") if TAMPERED in answer]


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
        assert (folder / "checkpoint.safetensors").exists() or done <= 3        # once there is one, there always is,
        if (folder / "checkpoint.safetensors").exists():
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
        saves, fsync = itertools.count(), os.fsync
        def full(fd):
            if next(saves):
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


# ---- Quark: a KL to the reference that does not see the quality, and an entropy bonus

def told(ask, says, system="Quality 3.", before=()):
    """A conversation behind a system message (none if empty), with earlier turns in between."""
    first = [dict(role="system", content=system)] if system else []
    earlier = [dict(role=role, content=text) for pair in before for role, text in zip(("user", "assistant"), pair)]
    return dict(messages=first + earlier + chat(ask, says)["messages"])


TOLD = [told("Say it", "1234"), told("Name the tall red urn and two more", "a", "Quality 5."),
        told("Hm", "It is 12345678901234567", "Be brief and kind."), told("Hi", "Hello.", ""),
        told("And now?", "No.", "Quality 1.", before=[("What is 3 + 4?", "The answer is 7."), ("Ok", "Yes")])]
QUARK = dict(kl_coef=.05, ent_coef=.06, prompt_weight=.1, ref="out/sft")


def wild(seed, folder=None):
    """A model far from uniform, saved in a folder if there is one."""
    net = tiny(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * .15)
    if folder is not None:
        model_file.save_checkpoint(folder, dict(model=net), {}, dict(
            step=0, done=True, state={}, tokenizer=TOK.fingerprint))
    return net.eval()


def spoken(record):
    """The ids of a conversation and the places of what the assistant says, ends included, read off the role tokens."""
    ids, places, speaking = TOK.chat(record["messages"])[0], [], False
    for t, token in enumerate(ids):
        if speaking:
            places.append(t)
        speaking = token == TOK.role["assistant"] or speaking and token != TOK.end
    return ids, places


def slow_terms(model, ref, records):
    """Σ KL, Σ entropy and the number of places, a place at a time and with the reference's row built on its own."""
    kl, entropy, said = 0.0, 0.0, 0
    for record in records:
        ids, places = spoken(record)
        bare, bare_places = spoken(dict(messages=[m for m in record["messages"] if m["role"] != "system"]))
        assert [ids[t] for t in places] == [bare[t] for t in bare_places]
        for t, u in zip(places, bare_places):
            logp = model.logits(model(torch.tensor([ids[:t]])))[0, -1].log_softmax(-1)
            base = ref.logits(ref(torch.tensor([bare[:u]])))[0, -1].log_softmax(-1).detach()
            kl, entropy = kl + logp.exp() @ (logp - base), entropy - logp.exp() @ logp
            said += 1
    return kl, entropy, said


def told_rows(records=TOLD, block=64, **options):
    cfg = sft.Config(**TINY | QUARK | options)
    return [row for record in records for row in sft.rows_of(record, TOK, block, cfg)], cfg


def summed(model, ref, rows, cfg):
    """Both sums over the micro-batches that cfg leads to."""
    parts = [sft.kl_and_entropy(model, ref, tokens, mask, **layout)
             for tokens, mask, layout in sft.batches(rows, cfg, TOK, "cpu")]
    return [sum(x) for x in zip(*parts)]


def num(x): return float(x.detach())


def slope(loss, model):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def test_kl_and_entropy_are_sums_over_what_the_assistant_says(double):
    """The reference does not see the system message; other prompts, lengths and turns share the batch; π's gradient."""
    model, ref = wild(1), wild(2)
    kl, entropy, said = slow_terms(model, ref, TOLD)
    rows, cfg = told_rows()
    got = summed(model, ref, rows, cfg)
    assert len(rows) == 5 and said == sum(row[1].count(1) for row in rows)
    assert num(got[0]) == pytest.approx(num(kl), rel=1e-9) and num(got[1]) == pytest.approx(num(entropy), rel=1e-9)
    for a, b in zip(got, (kl, entropy)):
        assert torch.allclose(slope(a, model), slope(b, model), rtol=0, atol=1e-8)
    for x in got:                                                        # no gradient into the reference
        pushed = torch.autograd.grad(x, list(ref.parameters()), retain_graph=True, allow_unused=True)
        assert all(g is None for g in pushed)
    assert num(kl) > .05 * said                                        # far enough from 0 to be wrong about
    seeing = sum(num(slow_terms(model, ref, [dict(messages=[m | dict(role="user") if m["role"] == "system" else m
                                                              for m in r["messages"]])])[0]) for r in TOLD)
    assert abs(seeing - num(kl)) > 1e-3                                # a reference that saw it would say otherwise


@pytest.mark.parametrize("prompt_weight", [0.0, .1, .5])
def test_the_weight_of_prompts_is_not_the_kls(double, prompt_weight):
    model, ref = wild(1), wild(2)
    usual = [num(x) for x in summed(model, ref, *told_rows())]
    got = [num(x) for x in summed(model, ref, *told_rows(prompt_weight=prompt_weight))]
    assert got == pytest.approx(usual, rel=1e-12)


def test_no_padding_and_no_split_moves_the_kl_or_the_entropy(double):
    model, ref = wild(1), wild(2)
    rows, cfg = told_rows(micro_tokens=10 ** 6)
    (tokens, mask, layout), = sft.batches(rows, cfg, TOK, "cpu")
    whole = sft.kl_and_entropy(model, ref, tokens, mask, **layout)
    longest = max(len(ids) for ids, *_ in rows)
    for value in (TOK.pad, TOK.end, TOK.role["assistant"]):
        def padded(x, lengths, fill):
            out = torch.cat([x, torch.full((len(x), 64 - x.shape[1]), fill, dtype=x.dtype)], 1)
            for line, n in zip(out, lengths):
                line[n:] = fill
            return out
        lengths = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), i))
        parts = [padded(tokens, [len(rows[i][0]) for i in lengths], value),
                 torch.cat([mask, torch.zeros(len(mask), 64 - tokens.shape[1])], 1),
                 padded(layout["plain"], [len(rows[i][2]) for i in lengths], value),
                 torch.cat([layout["plain_mask"], torch.zeros(len(mask), 64 - layout["plain"].shape[1])], 1)]
        for a, b in zip(sft.kl_and_entropy(model, ref, *parts), whole):
            assert num(a) == pytest.approx(num(b), rel=1e-12)
    assert longest < 64
    for micro_tokens in (1, 100, 10 ** 6):
        rows, cfg = told_rows(micro_tokens=micro_tokens)
        for a, b in zip(summed(model, ref, rows, cfg), whole):
            assert torch.allclose(slope(a, model), slope(b, model), rtol=0, atol=1e-10)
    assert len(list(sft.batches(*told_rows(micro_tokens=1), TOK, "cpu"))) == 5


def test_the_reference_itself_without_a_system_message_is_at_distance_0(double):
    records = [told("Say it", "1234", ""), told("Hm", "It is 1.", "", before=[("Hi", "Hello.")])]
    model, ref = wild(1), wild(1)
    kl, entropy = summed(model, ref, *told_rows(records))
    assert abs(num(kl)) < 1e-12 and slope(kl, model).abs().max() < 1e-12 and num(entropy) > 1
    assert num(summed(model, ref, *told_rows([told("Say it", "1234")]))[0]) > 1e-6     # with one, π is another


def test_rows_whose_response_the_context_cuts_are_left_out():
    bare, whole = (len(TOK.chat(told("Hi", "12345", system)["messages"])[0]) for system in ("", "Quality 3."))
    assert whole > bare
    record = told("Hi", "12345")
    assert len(told_rows([record], block=whole)[0]) == 1
    for block in range(bare - 3, whole):                                 # without the message it may fit
        assert told_rows([record], block=block)[0] == []
    plain = told("Hi", "12345", "")
    (ids, target, bare_ids, bare_target), = told_rows([plain], block=bare - 2)[0]        # both cut alike
    assert (ids, target) == (bare_ids, bare_target) and len(ids) == bare - 2
    (ids, target, bare_ids, bare_target), = told_rows([record], block=64)[0]
    assert (len(ids), len(bare_ids)) == (whole, bare)
    assert TOK.role["system"] in ids and TOK.role["system"] not in bare_ids


def caught(monkeypatch, tmp_path, name, **options):
    """The gradient of the first update, as the optimizer gets it, and the metrics."""
    grads, real = [], model_file.Optimizer.step
    with monkeypatch.context() as patch:
        patch.setattr(model_file.Optimizer, "step", lambda self, step: (
            grads.append(torch.cat([p.grad.reshape(-1).clone() for p in self.params])), real(self, step))[1])
        _, rows = fit(tmp_path, name, **options)
    return grads[0], rows


def test_the_gradient_of_a_quark_update_is_the_sum_of_its_three_terms(double, tmp_path, monkeypatch):
    """g = g_sft + kl_coef g_kl - ent_coef g_H, each a mean over its own tokens, under any split into micro-batches."""
    wild(1, tmp_path / "init")
    wild(2, tmp_path / "ref")
    path = write(tmp_path / "d.jsonl", TOLD)                             # four to train on, one held out
    options = dict(data=path, init=str(tmp_path / "init"), ref=str(tmp_path / "ref"), steps=1, batch=4, clip_grad=0.,
                   prompt_weight=.1)
    model, ref = load_model(tmp_path / "init"), load_model(tmp_path / "ref")
    stream, _ = open_stream(path, "messages", 0, n_held=128)
    records = stream.batch(0, 4)
    kl, entropy, said = slow_terms(model, ref, records)
    rows = [row for record in records for row in encode(record, TOK, 64, "assistant", .1)]
    terms = by_hand(model, rows) / sum(sum(target) for _, target in rows), kl / said, entropy / said
    slopes = [slope(term, model) for term in terms]
    for i, (a, b, micro_tokens) in enumerate(((.7, .0, 64), (.0, .4, 64), (.7, .4, 1), (.7, .4, 10 ** 6))):
        options |= dict(kl_coef=a, ent_coef=b, micro_tokens=micro_tokens, optimizer="adamw")
        got, metrics = caught(monkeypatch, tmp_path, f"run {i}", **options)
        g_sft, g_kl, g_entropy = slopes
        assert torch.allclose(got, g_sft + a * g_kl - b * g_entropy, rtol=0, atol=1e-7), i
        nll, mean_kl, mean_entropy = map(num, terms)
        assert metrics[0]["loss"] == pytest.approx(nll, rel=1e-6)            # to compare with val_loss
        assert metrics[0]["kl"] == pytest.approx(mean_kl, rel=1e-7)
        assert metrics[0]["entropy"] == pytest.approx(mean_entropy, rel=1e-7)


def test_without_coefficients_no_reference_is_loaded_and_nothing_changes(tmp_path, monkeypatch):
    wild(1, tmp_path / "init")
    options = dict(data=write(tmp_path / "d.jsonl", TOLD * 4), init=str(tmp_path / "init"), prompt_weight=.1)
    cfg, rows = fit(tmp_path, "a", **options)
    folders, real = [], sft.load_model
    monkeypatch.setattr(sft, "load_model", lambda folder, *args, **kwargs: folders.append(folder) or real(
        folder, *args, **kwargs))
    monkeypatch.setattr(sft, "kl_and_entropy", None)                     # not even called
    other, again = fit(tmp_path, "b", kl_coef=0., ent_coef=0., ref=str(tmp_path / "nowhere"), **options)
    assert folders == [str(tmp_path / "init")] and same(weights(cfg.out), weights(other.out))
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip(rows) == strip(again) and not {"kl", "entropy"} & rows[0].keys()


def test_the_reference_is_the_folder_named_else_the_start_and_stays_as_it_was(double, tmp_path, monkeypatch):
    """kl of the second step, recomputed from the checkpoint after the first one against an unmoved reference."""
    for seed, name in ((1, "init"), (2, "ref")):
        wild(seed, tmp_path / name)
    path, real = write(tmp_path / "d.jsonl", TOLD), sft.load_model
    for name, ref in (("named", str(tmp_path / "ref")), ("none", "")):
        folders = []
        monkeypatch.setattr(sft, "load_model", lambda folder, *args, **kwargs: (
            folders.append(Path(folder).name), real(folder, *args, **kwargs))[1])
        options = dict(data=path, init=str(tmp_path / "init"), ref=ref, batch=4, warmup=0, lr=1e-2, kl_coef=.05,
                       optimizer="adamw", weight_decay=0.)
        cfg, rows = fit(tmp_path, name, steps=2, **options)
        assert folders == ["init", "ref" if ref else "init"]
        one = tmp_path / f"{name} one"
        with monkeypatch.context() as patch:                             # the same run, stopped after a step
            def log(self, step, *args, real=Run.log, **kwargs):
                if step == 1:
                    raise Killed
                real(self, step, *args, **kwargs)
            patch.setattr(Run, "log", log)
            with pytest.raises(Killed):
                fit(tmp_path, one.name, steps=2, save_every=1, **options)
        stream, _ = open_stream(path, "messages", 0, n_held=128)
        nets = load_model(tmp_path / "init"), load_model(one)
        for step, net in enumerate(nets):
            kl, entropy, said = slow_terms(net, load_model(ref or tmp_path / "init"), stream.batch(step, 4))
            assert rows[step]["kl"] == pytest.approx(num(kl) / said, rel=1e-6)
            assert rows[step]["entropy"] == pytest.approx(num(entropy) / said, rel=1e-6)
        monkeypatch.setattr(sft, "load_model", real)
    assert not same(weights(tmp_path / "init"), weights(one))


def test_held_out_loss_has_neither_term(double, tmp_path):
    wild(1, tmp_path / "init")
    options = dict(data=write(tmp_path / "d.jsonl", TOLD * 5), init=str(tmp_path / "init"), steps=1, lr=1e-30,
                   muon_lr=1e-30, weight_decay=0.)
    plain, quark = (fit(tmp_path, name, **options, **more)[1][0]["val_loss"]
                    for name, more in (("a", {}), ("b", dict(kl_coef=2., ent_coef=3.))))
    assert quark == pytest.approx(plain, rel=1e-9)


# ---- Quark on the one-token bandit (F2)

ARMS, POOL = "abcd", "a" * 8 + "b" * 6 + "c" * 4 + "d" * 2            # π_ref, and r = 0, 1, 2, 3: sorted already
BANDIT = dict(batch=20, steps=60, lr=1e-2, muon_lr=.02, warmup=5, weight_decay=0., eval_every=1000, packing=0)


def pool(path, k):
    """A file of the pool in k quantiles, the quantile as the system message (0: none); line 20 is held out."""
    records = [told("?", arm, f"Quality {1 + i * k // len(POOL)}." if k else "") for i, arm in enumerate(POOL)]
    return write(path, records[:19] + records[:1] + records[19:])


def arms(folder, system="", every=False):
    """π(arm | system message), exactly, or that of every token."""
    net, messages = load_model(folder), told("?", "a", system)["messages"][:-1]
    probs = net.logits(net(torch.tensor([TOK.prompt(messages)])))[0, -1].softmax(-1).detach()
    return probs if every else probs[[TOK.encode(arm)[0] for arm in ARMS]]


def worth(pi): return float(pi @ torch.arange(4.))


@pytest.fixture(scope="module")
def plain_pool(tmp_path_factory):
    """Plain SFT on the pool: π_ref."""
    folder = tmp_path_factory.mktemp("pool")
    return fit(folder, "sft", data=pool(folder / "d.jsonl", 0), **BANDIT)[0].out


def optimum(said, ref, kl_coef, ent_coef):
    """argmin over π of the cross-entropy to the arms said + kl_coef KL(π || ref) - ent_coef H(π), by plain descent."""
    p = torch.zeros_like(ref, dtype=torch.float64)
    for arm in said:
        p[TOK.encode(arm)[0]] += 1 / len(said)
    z, ref = ref.double().log().requires_grad_(), ref.double().log()
    for _ in range(1500):
        logp = z.log_softmax(-1)
        loss = -(p @ logp) + kl_coef * (logp.exp() @ (logp - ref)) + ent_coef * (logp.exp() @ logp)
        with torch.no_grad():
            z -= torch.autograd.grad(loss, z)[0]
    return z.softmax(-1).detach()[[TOK.encode(arm)[0] for arm in ARMS]].float()


def test_f2_the_best_quantile_is_worth_its_exact_mean(plain_pool, tmp_path):
    """2.50 where the pool, and π_ref, are worth 1.00; and each of the others its own."""
    assert worth(arms(plain_pool)) == pytest.approx(1.0, abs=.06)
    cfg, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 5), init=plain_pool, **BANDIT | dict(steps=120))
    got = [worth(arms(cfg.out, f"Quality {q}.")) for q in range(1, 6)]
    assert got == pytest.approx([0, 0, 1, 1.5, 2.5], abs=.1)
    assert got[4] == pytest.approx(2.5, abs=.06)


def test_f2_quark_with_both_terms_arrives_at_the_optimum(plain_pool, tmp_path):
    cfg, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 5), init=plain_pool, kl_coef=.5, ent_coef=.2,
                 **BANDIT | dict(steps=150))
    ref = arms(plain_pool, every=True)
    for q in range(5):
        got, best = arms(cfg.out, f"Quality {q + 1}."), optimum(POOL[4 * q:4 * q + 4], ref, .5, .2)
        assert torch.allclose(got, best, atol=.03, rtol=0), q


def test_one_quantile_is_plain_sft(plain_pool, tmp_path):
    cfg, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 1), init=plain_pool, **BANDIT)
    got = arms(cfg.out, "Quality 1.")
    assert torch.allclose(got, torch.tensor([.4, .3, .2, .1]), atol=.02, rtol=0)
    assert torch.allclose(got, arms(plain_pool), atol=.03, rtol=0) and worth(got) == pytest.approx(1.0, abs=.06)
