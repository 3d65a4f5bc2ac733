"""configs/quark.py: its KL and entropy against a loop over single places, its update against the sum of its three
terms, its loop against a second loop, and where it leads against a closed form."""
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import quark
import sft
import test_sft
import runs
from data import encode, open_stream
from exact import ARMS
from model import load_model
from policies import TOK, random_policy, save, weights
from runs import same, write
from test_sft import TINY, by_hand, chat

ROOT = Path(__file__).resolve().parents[1]


def fit(tmp_path, name="run", **options):
    """Run configs/quark.py in this process -> its folder, its rows."""
    return str(tmp_path / name), runs.train(quark, tmp_path / name, **TINY | dict(
        steps=3, batch=8, packing=0, warmup=20, clip_grad=1.0) | options)


# ---------------------------------------------------------------- a KL to a reference that does not see the quality

def told(ask, says, system="Quality 3.", before=()):
    """A conversation behind a system message (none if empty), with earlier turns in between."""
    first = [dict(role="system", content=system)] if system else []
    earlier = [dict(role=role, content=text) for pair in before for role, text in zip(("user", "assistant"), pair)]
    return dict(messages=first + earlier + chat(ask, says)["messages"])


TOLD = [told("Say it", "1234"), told("Name the tall red urn and two more", "a", "Quality 5."),
        told("Hm", "It is 12345678901234567", "Be brief and kind."), told("Hi", "Hello.", ""),
        told("And now?", "No.", "Quality 1.", before=[("What is 3 + 4?", "The answer is 7."), ("Ok", "Yes")])]
QUARK = dict(prompt_weight=.1, packing=0, ref="out/sft")


def wild(seed, folder=None):
    """A model far from uniform, saved in a folder if there is one."""
    net = random_policy(seed)
    if folder is not None:
        save(folder, net)
    return net.to(torch.get_default_dtype()).eval()


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


def told_pairs(records=TOLD, block=64, **options):
    cfg = quark.Config(**TINY | QUARK | options)
    like = SimpleNamespace(tok=TOK, config=SimpleNamespace(block_size=block))
    return [pair for record in records for pair in quark.pairs_of(record, like, cfg)], cfg


def summed(model, ref, pairs, cfg):
    """Both sums over the micro-batches that cfg leads to."""
    parts = [quark.kl_and_entropy(model, ref, told, bare) for told, bare in quark.batches(pairs, model, cfg)]
    return [sum(x) for x in zip(*parts)]


def num(x): return float(x.detach())


def slope(loss, model):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def test_kl_and_entropy_are_sums_over_what_the_assistant_says(float64):
    """The reference does not see the system message; other prompts, lengths and turns share the batch; π's gradient."""
    model, ref = wild(1), wild(2)
    kl, entropy, said = slow_terms(model, ref, TOLD)
    pairs, cfg = told_pairs()
    got = summed(model, ref, pairs, cfg)
    assert len(pairs) == 5 and said == sum(quark.n_said(row) for row, _ in pairs)
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
def test_the_weight_of_prompts_is_not_the_kls(float64, prompt_weight):
    model, ref = wild(1), wild(2)
    usual = [num(x) for x in summed(model, ref, *told_pairs())]
    got = [num(x) for x in summed(model, ref, *told_pairs(prompt_weight=prompt_weight))]
    assert got == pytest.approx(usual, rel=1e-12)


def widened(x, lengths, fill, width=64):
    """A Batch of wider rows, `fill` in the place of all padding."""
    tokens = torch.full((len(x.tokens), width), fill)
    for line, row, n in zip(tokens, x.tokens, lengths):
        line[:n] = row[:n]
    mask = torch.zeros(len(x.mask), width - 1)
    mask[:, :x.mask.shape[1]] = x.mask
    return sft.Batch(tokens, mask)


def test_no_padding_and_no_split_moves_the_kl_or_the_entropy(float64):
    model, ref = wild(1), wild(2)
    pairs, cfg = told_pairs(micro_tokens=10 ** 6)
    (told, bare), = quark.batches(pairs, model, cfg)
    whole = quark.kl_and_entropy(model, ref, told, bare)
    assert max(len(ids) for ids, _ in (row for pair in pairs for row in pair)) < 64
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0][0]), i))
    lengths = [[len(pairs[i][side][0]) for i in order] for side in (0, 1)]
    for value in (TOK.pad, TOK.end, TOK.role["assistant"]):
        parts = widened(told, lengths[0], value), widened(bare, lengths[1], value)
        assert not torch.equal(parts[0].tokens[:, :told.tokens.shape[1]], told.tokens) or value == TOK.pad
        for a, b in zip(quark.kl_and_entropy(model, ref, *parts), whole):
            assert num(a) == pytest.approx(num(b), rel=1e-12)
    for micro_tokens in (1, 100, 10 ** 6):
        for a, b in zip(summed(model, ref, *told_pairs(micro_tokens=micro_tokens)), whole):
            assert torch.allclose(slope(a, model), slope(b, model), rtol=0, atol=1e-10)
    pairs, cfg = told_pairs(micro_tokens=1)
    assert len(list(quark.batches(pairs, model, cfg))) == 5


def test_the_reference_itself_without_a_system_message_is_at_distance_0(float64):
    records = [told("Say it", "1234", ""), told("Hm", "It is 1.", "", before=[("Hi", "Hello.")])]
    model, ref = wild(1), wild(1)
    kl, entropy = summed(model, ref, *told_pairs(records))
    assert abs(num(kl)) < 1e-12 and slope(kl, model).abs().max() < 1e-12 and num(entropy) > 1
    assert num(summed(model, ref, *told_pairs([told("Say it", "1234")]))[0]) > 1e-6     # with one, π is another


def test_rows_whose_response_the_context_cuts_are_left_out():
    bare, whole = (len(TOK.chat(told("Hi", "12345", system)["messages"])[0]) for system in ("", "Quality 3."))
    assert whole > bare
    record = told("Hi", "12345")
    assert len(told_pairs([record], block=whole)[0]) == 1
    for block in range(bare - 3, whole):                                 # without the message it may fit
        assert told_pairs([record], block=block)[0] == []
    plain = told("Hi", "12345", "")
    (row, bare_row), = told_pairs([plain], block=bare - 2)[0]            # both cut alike
    assert row == bare_row and len(row[0]) == bare - 2
    ((ids, _), (bare_ids, _)), = told_pairs([record], block=64)[0]
    assert (len(ids), len(bare_ids)) == (whole, bare)
    assert TOK.role["system"] in ids and TOK.role["system"] not in bare_ids


def test_without_its_two_terms_it_is_plain_sft(tmp_path):
    wild(1, tmp_path / "init")
    wild(2, tmp_path / "ref")
    options = dict(data=write(tmp_path / "d.jsonl", TOLD * 4), init=str(tmp_path / "init"), prompt_weight=.1, packing=0)
    plain, rows = test_sft.fit(tmp_path, "a", **options)
    told, again = fit(tmp_path, "b", kl_coef=0., ent_coef=0., ref=str(tmp_path / "ref"), **options)
    assert same(weights(plain), weights(told)) and again[0]["kl"] > .05
    strip = lambda rows: [{k: v for k, v in row.items() if k not in ("kl", "entropy")} for row in rows]
    assert strip(rows) == strip(again)


@pytest.mark.parametrize("ref", ["ref", ""])
def test_loop_equals_a_slow_loop(ref, float64, tmp_path):
    """Every logged number and every weight; the reference is the folder named, else the start, and stays as it was."""
    options = dict(data=write(tmp_path / "d.jsonl", TOLD * 4), batch=4, steps=4, warmup=1, lr=1e-2, optimizer="adamw",
                   weight_decay=.2, beta2=.6, clip_grad=.5, kl_coef=.7, ent_coef=.4, prompt_weight=.2, seed=3,
                   eval_every=2)
    for seed, name in ((1, "init"), (2, "ref")):
        wild(seed, tmp_path / name)
    options |= dict(init=str(tmp_path / "init"), ref=str(tmp_path / ref) if ref else "")
    folder, rows = fit(tmp_path, **options)
    cfg = quark.Config(**TINY | dict(packing=0) | options)
    net, reference = load_model(cfg.init), load_model(cfg.ref or cfg.init)
    stream, held = open_stream(cfg.data, "messages", cfg.seed, n_held=128)
    optimizer = runs.SlowOptimizer(net, cfg.lr, 4, cfg, betas=(.9, cfg.beta2))

    def likelihood(records):
        encoded = [row for record in records for row in encode(record, TOK, 64, "assistant", .2)]
        return by_hand(net, encoded) / sum(sum(target) for _, target in encoded)
    for step, row in enumerate(rows):
        records = stream.batch(step, 4)
        nll, (kl, entropy, said) = likelihood(records), slow_terms(net, reference, records)
        (nll + .7 * kl / said - .4 * entropy / said).backward()
        want = optimizer.step(step) | dict(loss=num(nll), kl=num(kl) / said, entropy=num(entropy) / said)
        want["tokens"] = sum(len(spoken(record)[0]) for record in records)
        want["val_loss"] = num(likelihood(held)) if step % 2 else None         # of the likelihood alone
        runs.compare_rows(step, row, want)
    runs.compare_weights(weights(folder), net)


# ---------------------------------------------------------------- on the one-token bandit (F2)

POOL = "a" * 8 + "b" * 6 + "c" * 4 + "d" * 2                          # π_ref, and r = 0, 1, 2, 3: sorted already
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
    return test_sft.fit(folder, "sft", data=pool(folder / "d.jsonl", 0), **BANDIT)[0]


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


ALONE = dict(kl_coef=0., ent_coef=0.)                                  # the likelihood, without the two other terms


def test_f2_the_best_quantile_is_worth_its_exact_mean(plain_pool, tmp_path):
    """2.50 where the pool, and π_ref, are worth 1.00; and each of the others its own."""
    assert worth(arms(plain_pool)) == pytest.approx(1.0, abs=.06)
    folder, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 5), init=plain_pool, **BANDIT | ALONE | dict(steps=120))
    got = [worth(arms(folder, f"Quality {q}.")) for q in range(1, 6)]
    assert got == pytest.approx([0, 0, 1, 1.5, 2.5], abs=.1)
    assert got[4] == pytest.approx(2.5, abs=.06)


def test_f2_quark_with_both_terms_arrives_at_the_optimum(plain_pool, tmp_path):
    folder, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 5), init=plain_pool, kl_coef=.5, ent_coef=.2,
                 **BANDIT | dict(steps=150))
    ref = arms(plain_pool, every=True)
    for q in range(5):
        got, best = arms(folder, f"Quality {q + 1}."), optimum(POOL[4 * q:4 * q + 4], ref, .5, .2)
        assert torch.allclose(got, best, atol=.03, rtol=0), q


def test_one_quantile_is_plain_sft(plain_pool, tmp_path):
    folder, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 1), init=plain_pool, **BANDIT | ALONE)
    got = arms(folder, "Quality 1.")
    assert torch.allclose(got, torch.tensor([.4, .3, .2, .1]), atol=.02, rtol=0)
    assert torch.allclose(got, arms(plain_pool), atol=.03, rtol=0) and worth(got) == pytest.approx(1.0, abs=.06)


# ---------------------------------------------------------------- a run like any other

@pytest.fixture
def run_options(tmp_path):
    wild(1, tmp_path / "init")
    return dict(data=write(tmp_path / "d.jsonl", TOLD * 4), init=str(tmp_path / "init"), batch=4, steps=5, save_every=2,
                eval_every=2, dropout=0., prompt_weight=.1)


@pytest.mark.parametrize("flags, word", [
    ("--packing 64", "--packing"), ("--loss_on all", "--loss_on"), ("--prompt_weight 1", "--prompt_weight"),
    ("--init new", "--ref"), ("--kl_coef -1", "--kl_coef"), ("--ent_coef inf", "--ent_coef")])
def test_refusals(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = runs.refuse(quark, flags.split(), monkeypatch, capsys)
    assert code == 2 and word in error


def script(folder, *words):
    """What `python configs/quark.py` does in another folder: exit code, output, errors."""
    command = [sys.executable, ROOT / "configs/quark.py", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_script_finds_the_trainers_from_any_folder_and_says_what_is_wrong(tmp_path):
    code, out, err = script(tmp_path, "--help")
    assert code == 0 and not err and "configs/quark.py [--option value ...]" in out
    assert "\n  --kl_coef " in out and "\noptimisation:\n  --steps " in out and "\nrun:\n" in out
    code, out, err = script(tmp_path, "--kl_coeff", "1")
    assert code == 2 and err.count("\n") == 1 and "did you mean --kl_coef?" in err
    code, out, err = script(tmp_path)
    assert code == 1 and err.endswith("out/sft: no checkpoint there; make it with: python sft.py\n")
    assert not list(tmp_path.iterdir())


def test_the_script_trains_and_prints_a_command_that_asks_for_the_best(run_options, tmp_path):
    words = [f"--{k}={v}" for k, v in (TINY | run_options | dict(packing=0, steps=2, out=tmp_path / "run")).items()]
    code, out, err = script(tmp_path, *words)
    assert code == 0 and "kl " in out and "entropy " in out
    python, *words = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert python == "python" and words[-2:] == ["--system", "Quality 5."]
    done = subprocess.run([sys.executable, *words, "--max_new", "3"], cwd=tmp_path, input="Hi\n", capture_output=True,
                          text=True)
    assert done.returncode == 0 and not done.stderr


def test_its_code_is_that_of_all_files_that_it_imports(monkeypatch):
    read = []
    monkeypatch.setattr(data, "digest", lambda path: read.append(Path(path).name) or "x")
    data.code_of(quark.Config())
    assert sorted(read) == ["data.py", "model.py", "quark.py", "reward.py", "sft.py"]
