"""configs/merge.py: means of weights, and the arc between two, against slow formulas."""
import base64
import json
import math
import os
import random
import sys

import numpy as np
import pytest
import torch

import data
from data import Tokenizer, UserError
from merge import Config, merge, slerp
from model import GPT, GPTConfig, Setup, load_model, save_checkpoint, write_model
from policies import TOK, save, weights
from runs import close, same, watch_bars


def net(seed=0, tok=TOK, **size):
    """A tiny model with large random weights."""
    torch.manual_seed(seed)
    usual = dict(vocab_size=tok.n_vocab, block_size=16, n_layer=1, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**usual | size), tok)
    for param in model.parameters():
        param.data.normal_(std=.3)
    return model


@pytest.fixture
def two(tmp_path):
    """The folders of two models, words of a command."""
    return [save(tmp_path / str(seed), net(seed)) for seed in range(2)]


def go(out, folders, **options):
    """Merge -> the weights of the result."""
    merge(Config(out=str(out), **options), folders)
    return weights(out)


@pytest.mark.parametrize("k, slerp", [(2, False), (3, False), (7, False), (2, True)])
def test_the_mean_of_copies_is_the_copy_to_the_bit(k, slerp, two, tmp_path):
    assert same(go(tmp_path / "m", two[:1] * k, slerp=slerp), weights(two[0]))


@pytest.mark.parametrize("told, a, b", [("", .5, .5), (".25,.75", .25, .75), ("2,-1", 2, -1)])
def test_it_is_the_weighted_sum(told, a, b, two, tmp_path):
    got = go(tmp_path / "m", two, weights=told)
    first, second = map(weights, two)
    for name in got:
        x, y = first[name].double(), second[name].double()
        want = (a * x + b * y).float()
        assert torch.equal(got[name], want), name


@pytest.mark.parametrize("told, t", [("", .5), (".25,.75", .75), ("1,0", 0), ("0,1", 1)])
def test_slerp_goes_tensor_by_tensor_towards_the_second(told, t, two, tmp_path):
    got = go(tmp_path / "m", two, weights=told, slerp=True)
    first, second = map(weights, two)
    for name in got:
        a, b = first[name].double(), second[name].double()
        angle = math.acos((a * b).sum() / (a.norm() * b.norm()))
        of_a, of_b = math.sin((1 - t) * angle), math.sin(t * angle)
        arc = (of_a * a + of_b * b) / math.sin(angle)
        close(got[name], arc, atol=1e-6)
    if t in (0, 1):
        assert same(got, (first, second)[t])


def arrow(radius, angle):
    return radius * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def test_slerp_turns_at_constant_speed():
    # in the plane: of two directions α and β it is the direction α + t (β - α), the short way round
    rng = random.Random(0)
    for _ in range(200):
        begin, turn, t = rng.uniform(-3, 3), rng.uniform(-3.1, 3.1), rng.random()
        r, s = rng.uniform(.1, 9), rng.uniform(.1, 9)
        e, f = arrow(1, begin), arrow(1, begin + turn)
        way = arrow(1, begin + t * turn)
        close(slerp(r * e, r * f, t), r * way, atol=1e-8)
        p, q = np.linalg.solve(torch.stack([e, f], 1), way)     # how much of each the arc takes
        want = p * r * e + q * s * f
        close(slerp(r * e, s * f, t), want, atol=1e-7)


@pytest.mark.parametrize("c", [1.0, 2.0, 1 + 1e-9, 1e-30, 0.0, -1.0, -.5, -1 - 1e-9])
def test_slerp_of_parallel_opposite_and_zero_tensors_is_the_chord(c):
    torch.manual_seed(1)
    a = torch.randn(5, 4, dtype=torch.float64)
    for t in (0.0, .3, .5, 1.0):
        for x, y in ((a, c * a), (c * a, a)):
            chord = (1 - t) * x + t * y
            close(slerp(x, y, t), chord, atol=1e-12)
    assert not slerp(0 * a, 0 * a, .5).any()


def test_slerp_is_continuous_where_it_turns_into_the_chord():
    a = arrow(2, .4)
    for tilt in (1e-3, 1e-5, 1.5e-6, 1.3e-6, 1e-7, 1e-9, 0.0):
        b, between = arrow(2, .4 + tilt), arrow(2, .4 + .25 * tilt)
        close(slerp(a, b, .25), between, atol=1e-11)
        assert slerp(a, -b, .5).isfinite().all()


@pytest.mark.parametrize("match, names, options", [
    ("another architecture", "0 deep", {}),
    ("another architecture", "0 judge", {}),
    ("no checkpoint there", "0 none", {}),
    ("1 for 2", "0 1", dict(weights="1")),
    ("3 for 2", "0 1", dict(weights=".2,.3,.5")),
    ("not numbers", "0 1", dict(weights="a,b")),
    ("not finite", "0 1", dict(weights="inf,1")),
    ("not saved", "0 1", dict(weights="1e39,1")),
    ("--out", "0 1", dict(out="")),
    ("--slerp .*two", "0 1 1", dict(slerp=True)),
    ("--slerp .*two", "0 1", dict(slerp=True, weights=".5,.4")),
    ("--slerp .*two", "0 1", dict(slerp=True, weights="0,0"))])
def test_what_has_no_mean_is_refused(match, names, options, two, tmp_path):
    save(tmp_path / "deep", net(n_layer=2))
    save(tmp_path / "judge", net(n_scores=1))
    folders = [str(tmp_path / name) for name in names.split()]
    with pytest.raises(UserError, match=match):
        go(**dict(out=tmp_path / "m", folders=folders) | options)
    assert not (tmp_path / "m").exists()


def test_a_second_time_does_nothing_and_another_model_is_not_overwritten(two, tmp_path, capsys):
    def files():
        return {path: path.read_bytes() for path in tmp_path.glob("[mr]*/*")}

    go(tmp_path / "m", two)
    save_checkpoint(tmp_path / "run", dict(model=net()), {}, dict(tokenizer=TOK.fingerprint))
    (tmp_path / "run" / "run.json").write_text("{}")            # interrupted: no config.json yet
    before = files()
    capsys.readouterr()
    go(tmp_path / "m", two)
    assert "nothing to do" in capsys.readouterr().out
    for out, options in (("m", dict(weights="1,0")), ("m", dict(slerp=True)), ("0", {}), ("run", {})):
        with pytest.raises(UserError, match="holds another model"):
            go(tmp_path / out, two, **options)
    save(tmp_path / "1", net(5))                                # the same folders, other weights
    with pytest.raises(UserError, match="holds another model"):
        go(tmp_path / "m", two)
    assert files() == before


def test_it_shows_how_far_it_is(two, tmp_path, monkeypatch):
    passed = watch_bars(monkeypatch)
    merged = go(tmp_path / "m", two)
    assert list(passed.values()) == [2, 2, len(merged)], "models read, models summed up, weights merged"


def command(monkeypatch, capsys, *words):
    """What `python configs/merge.py WORDS` answers: its exit status, and its one line if it is a mistake."""
    monkeypatch.setattr(sys, "argv", ["configs/merge.py", *map(str, words)])
    try:
        data.guard(lambda: merge(*data.parse(Config, ["checkpoint", "checkpoint..."])))
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, ""


def test_it_asks_for_the_tokenizer_of_others(tmp_path, monkeypatch, capsys):
    # by the command, as a person would type it
    vocabulary = tmp_path / "bytes.tiktoken"
    lines = []
    for b in range(256):
        letter = base64.b64encode(bytes([b])).decode()
        lines.append(f"{letter} {b}\n")
    vocabulary.write_text("".join(lines))
    tok = Tokenizer.load(str(vocabulary))
    folder = tmp_path / "hf"
    write_model(folder, net(tok=tok, vocab_size=257))
    facts = json.loads((folder / "config.json").read_text())
    del facts["plainalign"]                                     # as if others had made it
    (folder / "config.json").write_text(json.dumps(facts))
    words = folder, folder, "--out", tmp_path / "m"
    code, said = command(monkeypatch, capsys, *words)
    assert code == 1 and "257 tokens" in said and said.count("\n") == 1
    assert command(monkeypatch, capsys, *words, "--tokenizer", vocabulary) == (0, "")
    got, want = (load_model(path, Setup(tok)).state_dict() for path in (tmp_path / "m", folder))
    assert same(got, want), "the mean of copies is the copy"


def test_p42_killed_at_any_file_it_runs_again(two, tmp_path, monkeypatch):
    # config.json was written first, and the next try found "another model"
    left, replace = 0, os.replace

    def replace_or_die(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(*paths)

    whole = go(tmp_path / "whole", two)
    monkeypatch.setattr(os, "replace", replace_or_die)
    for files in range(5):                                      # of the five that a model has
        left = files
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "m", two)
        assert not (tmp_path / "m" / "config.json").exists()
    left = 5
    assert same(go(tmp_path / "m", two), whole)
