"""configs/merge.py: means of weights, and the arc between two, against slow formulas."""
import base64
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "configs"))
import data
from data import Tokenizer, UserError
from merge import Config, merge, slerp
from model import GPT, GPTConfig, Setup, checksum, load_model, raw, save_checkpoint, write_model

TOY = Tokenizer.load("toy")


def net(seed=0, tok=TOY, **size):
    """A tiny model with large random weights."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab_size=tok.n_vocab, block_size=16, n_layer=1, n_head=2, n_embd=8) | size), tok)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=.3)
        model.transformer.wte.weight[model.config.vocab_size:] = 0
    return model


def keep(folder, model):
    """The folder of a finished run, as a word of a command."""
    write_model(folder, model)
    return str(folder)


def bits(model):
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


def loaded(folder):
    return load_model(folder, Setup(TOY))


@pytest.fixture
def two(tmp_path):
    """Two models and their folders."""
    models = [net(0), net(1)]
    return models, [keep(tmp_path / str(i), model) for i, model in enumerate(models)]


def run(monkeypatch, capsys, *argv):
    """(exit status, what it says) of python configs/merge.py *argv."""
    monkeypatch.setattr(sys, "argv", ["configs/merge.py", *map(str, argv)])
    capsys.readouterr()
    code = 0
    try:
        data.guard(lambda: merge(*data.parse(Config, ["checkpoint", "checkpoint..."])))
    except SystemExit as stop:
        code = stop.code
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("slerp", [False, True])
def test_the_mean_of_copies_is_the_copy_to_the_bit(k, slerp, tmp_path):
    if slerp and k > 2:
        return
    merge(Config(out=str(tmp_path / "m"), slerp=slerp), [keep(tmp_path / str(i), net()) for i in range(k)])
    assert bits(loaded(tmp_path / "m")) == bits(net())


@pytest.mark.parametrize("weights", ["", ".25,.75", "2,-1"])
def test_it_is_the_weighted_sum(weights, two, tmp_path, monkeypatch, capsys):
    models, folders = two
    assert run(monkeypatch, capsys, *folders, "--out", tmp_path / "m", f"--weights={weights}")[0] == 0
    a, b = map(float, (weights or ".5,.5").split(","))
    made = json.loads((tmp_path / "m" / "config.json").read_text())["plainalign"]["made"]
    states = [model.state_dict() for model in models]
    assert made == dict(of=[checksum(map(raw, state.values())) for state in states], weights=[a, b], slerp=False)
    for name, got in loaded(tmp_path / "m").state_dict().items():
        x, y = (state[name].numpy().astype(np.float64) for state in states)
        assert np.array_equal(got.numpy(), (a * x + b * y).astype(np.float32)), name


@pytest.mark.parametrize("weights, t", [("", .5), (".25,.75", .75), ("1,0", 0), ("0,1", 1)])
def test_slerp_goes_tensor_by_tensor_towards_the_second(weights, t, two, tmp_path):
    models, folders = two
    merge(Config(out=str(tmp_path / "m"), weights=weights, slerp=True), folders)
    for name, got in loaded(tmp_path / "m").state_dict().items():
        a, b = (model.state_dict()[name].numpy().astype(np.float64) for model in models)
        angle = math.acos((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))
        arc = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        assert np.allclose(got, arc, rtol=1e-6, atol=1e-6), name
        assert t in (0, 1) or not np.allclose(got, (1 - t) * a + t * b, atol=1e-3)      # the chord is another
    assert t not in (0, 1) or bits(loaded(tmp_path / "m")) == bits(models[t])


def arrow(radius, angle):
    return radius * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def test_slerp_turns_at_constant_speed():
    # in the plane: of two directions α and β it is the direction α + t (β - α), the short way round
    rng = random.Random(0)
    for _ in range(200):
        at, turn, t, r, s = (rng.uniform(*span) for span in ((-3, 3), (-3.1, 3.1), (0, 1), (.1, 9), (.1, 9)))
        e, f, way = arrow(1, at), arrow(1, at + turn), arrow(1, at + t * turn)
        torch.testing.assert_close(slerp(r * e, r * f, t), r * way, rtol=0, atol=1e-8)
        p, q = np.linalg.solve(torch.stack([e, f], 1).numpy(), way.numpy())  # how much of each the arc takes
        torch.testing.assert_close(slerp(r * e, s * f, t), p * r * e + q * s * f, rtol=0, atol=1e-7)


@pytest.mark.parametrize("c", [1.0, 2.0, 1 + 1e-9, 1e-30, 0.0, -1.0, -.5, -1 - 1e-9])
def test_slerp_of_parallel_opposite_and_zero_tensors_is_the_chord(c):
    a = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in (0.0, .3, .5, 1.0):
        for x, y in ((a, c * a), (c * a, a)):
            torch.testing.assert_close(slerp(x, y, t), (1 - t) * x + t * y, rtol=0, atol=1e-12)
    assert slerp(0 * a, 0 * a, .5).eq(0).all()


def test_slerp_is_continuous_where_it_turns_into_the_chord():
    for tilt in (1e-3, 1e-5, 1.5e-6, 1.3e-6, 1e-7, 1e-9, 0.0):
        a, b = arrow(2, .4), arrow(2, .4 + tilt)
        torch.testing.assert_close(slerp(a, b, .25), arrow(2, .4 + .25 * tilt), rtol=0, atol=1e-11)
        assert slerp(a, -b, .5).isfinite().all()


@pytest.mark.parametrize("match, options, size", [
    ("another architecture", {}, dict(n_layer=2)), ("another architecture", {}, dict(n_scores=1)),
    ("1 for 2", dict(weights="1"), {}), ("3 for 2", dict(weights=".2,.3,.5"), {}),
    ("not numbers", dict(weights="a,b"), {}), ("not finite", dict(weights="inf,1"), {}), ("--out", dict(out=""), {}), ("no checkpoint there", {}, None),
    ("not saved: in .* is -?inf", dict(weights="1e39,1"), {}),
    *(("--slerp .*two", dict(slerp=True, weights=weights), {}) for weights in ("1,1", ".5,.4", "0,0"))])
def test_what_has_no_mean_is_refused(match, options, size, tmp_path):
    folders = [keep(tmp_path / "a", net()), str(tmp_path / "b")]
    if size is not None:
        keep(tmp_path / "b", net(1, **size))
    with pytest.raises(UserError, match=match) as error:
        merge(Config(**dict(out=str(tmp_path / "m")) | options), folders)
    assert "\n" not in str(error.value) and not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="--slerp .*two"):
        merge(Config(out="m", slerp=True), folders + folders[:1])


def test_a_second_time_does_nothing_and_another_model_is_not_overwritten(two, tmp_path, capsys):
    _, folders = two
    go = lambda out="m", **options: merge(Config(out=str(tmp_path / out), **options), folders)
    there = lambda: {path: path.read_bytes() for name in ("m", "run") for path in (tmp_path / name).iterdir()}
    go()
    save_checkpoint(tmp_path / "run", dict(model=net()), {}, dict(tokenizer=TOY.fingerprint))
    data.write_text(tmp_path / "run" / "run.json", "{}")                 # interrupted: no config.json yet
    before = there()
    capsys.readouterr()
    go()
    assert "nothing to do" in capsys.readouterr().out
    for out, options in (("m", dict(weights="1,0")), ("m", dict(slerp=True)), ("0", {}), ("run", {})):
        with pytest.raises(UserError, match="holds another model"):      # of others, or one of those to be averaged
            go(out, **options)
    keep(folders[1], net(5))                                             # the same folders, other weights
    with pytest.raises(UserError, match="holds another model"):
        go()
    assert there() == before


def test_it_asks_for_the_tokenizer_of_others(tmp_path, monkeypatch, capsys):
    # by the command, as a person would type it
    vocabulary = tmp_path / "bytes.tiktoken"
    vocabulary.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    theirs = Setup(Tokenizer.load(str(vocabulary)))
    folder, out = keep(tmp_path / "hf", net(tok=theirs.tok, vocab_size=257)), tmp_path / "m"
    facts = json.loads((tmp_path / "hf" / "config.json").read_text())
    del facts["plainalign"]                                              # as if others had made it
    (tmp_path / "hf" / "config.json").write_text(json.dumps(facts))
    code, said = run(monkeypatch, capsys, folder, folder, "--out", out)
    assert code == 1 and "257 tokens" in said and said.count("\n") == 1
    assert run(monkeypatch, capsys, folder, folder, "--out", out, "--tokenizer", vocabulary)[0] == 0
    assert bits(load_model(out, theirs)) == bits(load_model(folder, theirs))


def test_p42_killed_at_any_file_it_runs_again(two, tmp_path, monkeypatch):
    # config.json was written first, and the next try found "another model"
    out, folders, left, replace = tmp_path / "m", two[1], 0, os.replace

    def replace_or_die(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_or_die)
    for files in range(5):                                               # of the five that a model has
        left = files
        with pytest.raises(KeyboardInterrupt):
            merge(Config(out=str(out)), folders)
        assert not (out / "config.json").exists()
    left = 5
    merge(Config(out=str(out)), folders)
    a, b = (model.state_dict() for model in two[0])
    assert all(torch.equal(t, ((a[name].double() + b[name].double()) / 2).float())
               for name, t in loaded(out).state_dict().items())
