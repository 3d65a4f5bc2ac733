"""configs/quark.py: its KL and entropy against a loop over single places, its loop against a second loop, and where it
leads against a closed form."""
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import quark
import runs
import sft
import test_sft
from data import encode, open_stream
from exact import ARMS, PI_REF
from model import load_model
from policies import TOK, random_policy, save, weights
from runs import close, same, write
from test_sft import TINY, by_hand, chat, gradient, weight

ROOT = Path(__file__).resolve().parents[1]
QUARK = TINY | dict(packing=0)


def fit(tmp_path, name="run", **options):
    """Run configs/quark.py in this process -> its folder, its rows."""
    usual = dict(steps=3, batch=8, warmup=20, clip_grad=1.0)
    rows = runs.train(quark, tmp_path / name, **(QUARK | usual | options))
    return str(tmp_path / name), rows


# ---------------------------------------------------------------- a KL to a reference that does not see the quality

def told(ask, says, system="Quality 3.", earlier=()):
    """A conversation behind a system message (none if empty), with earlier turns in between."""
    turns = [dict(role="system", content=system)] if system else []
    for before in earlier:
        turns += chat(*before)["messages"]
    return dict(messages=turns + chat(ask, says)["messages"])


TOLD = [told("Say it", "1234"), told("Name the tall red urn and two more", "a", "Quality 5."),
        told("Hm", "It is 12345678901234567", "Be brief and kind."), told("Hi", "Hello.", ""),
        told("And now?", "No.", "Quality 1.", [("What is 3 + 4?", "The answer is 7."), ("Ok", "Yes")])]


def wild(seed, folder=None):
    """A model far from uniform, saved in a folder if there is one."""
    net = random_policy(seed)
    if folder is not None:
        save(folder, net)
    return net.to(torch.get_default_dtype()).eval()


def spoken(messages):
    """The ids of a conversation and the places of what the assistant says, ends included, read off the role tokens."""
    ids, places, speaking = TOK.chat(messages)[0], [], False
    for place, token in enumerate(ids):
        if speaking:
            places.append(place)
        if token == TOK.role["assistant"]:
            speaking = True
        elif token == TOK.end:
            speaking = False
    return ids, places


def next_token(net, ids):
    return net.logits(net(torch.tensor([ids])))[0, -1].log_softmax(-1)


def slow_terms(model, ref, records):
    """Σ KL, Σ entropy and the number of places, a place at a time and with the reference's row built on its own."""
    kl, entropy, said = 0.0, 0.0, 0
    for record in records:
        ids, places = spoken(record["messages"])
        bare, bare_places = spoken([turn for turn in record["messages"] if turn["role"] != "system"])
        assert [ids[t] for t in places] == [bare[t] for t in bare_places]
        for t, u in zip(places, bare_places):
            logp, base = next_token(model, ids[:t]), next_token(ref, bare[:u]).detach()
            kl = kl + logp.exp() @ (logp - base)
            entropy = entropy - logp.exp() @ logp
            said += 1
    return kl, entropy, said


def told_pairs(records=TOLD, block=64, **options):
    cfg = quark.Config(**(QUARK | dict(prompt_weight=.1, ref="out/sft") | options))
    like, pairs = SimpleNamespace(tok=TOK, config=SimpleNamespace(block_size=block)), []
    for record in records:
        pairs += quark.pairs_of(record, like, cfg)
    return pairs, cfg


def summed(model, ref, records=TOLD, **options):
    """Both sums over the micro-batches that the options lead to."""
    pairs, cfg = told_pairs(records, **options)
    kl, entropy = 0.0, 0.0
    for one, bare in quark.batches(pairs, model, cfg):
        terms = quark.kl_and_entropy(model, ref, one, bare)
        kl, entropy = kl + terms[0], entropy + terms[1]
    return kl, entropy


@pytest.mark.parametrize("options", [{}, dict(prompt_weight=0.), dict(prompt_weight=.5), dict(micro_tokens=1),
                                     dict(micro_tokens=100)], ids=str)
def test_kl_and_entropy_are_sums_over_what_the_assistant_says(float64, options):
    """The reference does not see the system message; other prompts, lengths and turns share the batch; the gradient is
    π's. Neither a split nor the weight of the prompts changes anything."""
    model, ref = wild(1), wild(2)
    kl, entropy, said = slow_terms(model, ref, TOLD)
    assert kl > .05 * said, "nothing is far enough from 0 to be wrong about"
    for got, want in zip(summed(model, ref, **options), (kl, entropy)):
        close(got.detach(), want.detach(), rtol=1e-9)
        close(gradient(got, model), gradient(want, model), atol=1e-8)
        pushed = torch.autograd.grad(got, list(ref.parameters()), allow_unused=True)
        assert all(slope is None for slope in pushed), "a gradient reaches the reference"


def widened(x, fill, width=64):
    """A Batch of wider rows, `fill` in the place of all padding."""
    tokens = torch.full((len(x.tokens), width), TOK.pad)
    tokens[:, :x.tokens.shape[1]] = x.tokens
    mask = torch.zeros(len(x.mask), width - 1)
    mask[:, :x.mask.shape[1]] = x.mask
    return sft.Batch(torch.where(tokens == TOK.pad, fill, tokens), mask)


def test_no_padding_moves_the_kl_or_the_entropy(float64):
    model, ref = wild(1), wild(2)
    pairs, cfg = told_pairs(micro_tokens=10 ** 6)
    (one, bare), = quark.batches(pairs, model, cfg)
    usual = quark.kl_and_entropy(model, ref, one, bare)
    for fill in (TOK.pad, TOK.end, TOK.role["assistant"]):
        wide = quark.kl_and_entropy(model, ref, widened(one, fill), widened(bare, fill))
        for a, b in zip(wide, usual):
            close(a.detach(), b.detach(), rtol=1e-12)


def test_rows_whose_response_the_context_cuts_are_left_out():
    record, plain = told("Hi", "12345"), told("Hi", "12345", "")
    whole, bare = (len(TOK.chat(x["messages"])[0]) for x in (record, plain))
    assert len(told_pairs([record], block=whole)[0]) == 1
    for block in range(bare - 3, whole):                                 # without the message it may fit
        assert told_pairs([record], block=block)[0] == []
    (row, bare_row), = told_pairs([plain], block=bare - 2)[0]            # both cut alike
    assert row == bare_row and len(row[0]) == bare - 2


def test_without_its_two_terms_it_is_plain_sft(tmp_path):
    wild(1, tmp_path / "init")
    wild(2, tmp_path / "ref")
    path = write(tmp_path / "d.jsonl", TOLD * 4)
    options = dict(data=path, init=str(tmp_path / "init"), prompt_weight=.1, packing=0)
    plain, rows = test_sft.fit(tmp_path, "a", **options)
    folder, again = fit(tmp_path, "b", kl_coef=0., ent_coef=0., ref=str(tmp_path / "ref"), **options)
    assert same(weights(plain), weights(folder))
    for row, more in zip(rows, again):
        assert more == more | row, "what both log differs"


@pytest.mark.parametrize("ref", ["ref", ""])
def test_loop_equals_a_slow_loop(ref, float64, tmp_path):
    """Every logged number and every weight; the reference is the folder named, else the start, and stays as it was."""
    for seed, name in ((1, "init"), (2, "ref")):
        wild(seed, tmp_path / name)
    path = write(tmp_path / "d.jsonl", TOLD * 4)
    options = dict(data=path, init=str(tmp_path / "init"), batch=4, steps=4)
    options |= dict(warmup=1, lr=1e-2, optimizer="adamw", weight_decay=.2, beta2=.6, clip_grad=.5)
    options |= dict(kl_coef=.7, ent_coef=.4, prompt_weight=.25, seed=3, eval_every=2)
    options["ref"] = str(tmp_path / ref) if ref else ""
    folder, rows = fit(tmp_path, **options)
    cfg = quark.Config(**(QUARK | options))
    net, reference = load_model(cfg.init), load_model(cfg.ref or cfg.init)
    stream, held = open_stream(cfg.data, "messages", cfg.seed, n_held=128)
    optimizer = runs.SlowOptimizer(net, cfg.lr, 4, cfg, betas=(.9, cfg.beta2))

    def likelihood(records):
        encoded = []
        for record in records:
            encoded += encode(record, TOK, 64, "assistant", .25)
        return by_hand(net, encoded) / weight(encoded)
    for step, row in enumerate(rows):
        records = stream.batch(step, 4)
        nll, (kl, entropy, said) = likelihood(records), slow_terms(net, reference, records)
        kl, entropy = kl / said, entropy / said
        (nll + .7 * kl - .4 * entropy).backward()
        want = optimizer.step(step) | dict(loss=nll.item(), kl=kl.item(), entropy=entropy.item())
        want["tokens"] = sum(len(TOK.chat(record["messages"])[0]) for record in records)
        want["val_loss"] = likelihood(held).item() if step % 2 else None       # of the likelihood alone
        runs.compare_rows(step, row, want)
    runs.compare_weights(weights(folder), net)


# ---------------------------------------------------------------- on the one-token bandit (F2)

POOL = "a" * 8 + "b" * 6 + "c" * 4 + "d" * 2                          # π_ref, and r = 0, 1, 2, 3: sorted already
BANDIT = dict(batch=20, lr=1e-2, muon_lr=.02, warmup=5, weight_decay=0., eval_every=1000, packing=0)


def pool(path, k):
    """A file of the pool in k quantiles, the quantile as the system message (0: none); line 20 is held out."""
    records = []
    for i, arm in enumerate(POOL):
        system = f"Quality {1 + i * k // len(POOL)}." if k else ""
        records.append(told("?", arm, system))
    return write(path, records[:19] + records[:1] + records[19:])


def chances(folder, system=""):
    """log π(token | system message), exactly."""
    messages = told("?", "a", system)["messages"][:-1]
    return next_token(load_model(folder), TOK.prompt(messages)).detach()


def of_arms(logp):
    return logp.exp()[[TOK.encode(arm)[0] for arm in ARMS]]


@pytest.fixture(scope="module")
def plain_pool(tmp_path_factory):
    """Plain SFT on the pool: π_ref."""
    folder = tmp_path_factory.mktemp("pool")
    init, _ = test_sft.fit(folder, "sft", data=pool(folder / "d.jsonl", 0), steps=60, **BANDIT)
    close(of_arms(chances(init)), PI_REF, atol=.02)
    return init


def optimum(said, ref, kl_coef, ent_coef):
    """argmin over π of the cross-entropy to the arms said + kl_coef KL(π || ref) - ent_coef H(π), by plain descent."""
    p, ref = torch.zeros_like(ref, dtype=torch.float64), ref.double()
    for arm in said:
        p[TOK.encode(arm)[0]] += 1 / len(said)
    z = ref.clone().requires_grad_()
    for _ in range(1500):
        logp = z.log_softmax(-1)
        pi = logp.exp()
        loss = -(p @ logp) + kl_coef * (pi @ (logp - ref)) + ent_coef * (pi @ logp)
        z.data -= torch.autograd.grad(loss, z)[0]
    return of_arms(z.detach().log_softmax(-1))


def test_f2_the_best_quantile_is_worth_its_exact_mean(plain_pool, tmp_path):
    """By likelihood alone: 2.50 where the pool, and π_ref, are worth 1.00; and each of the others its own."""
    options = BANDIT | dict(steps=120, kl_coef=0., ent_coef=0.)
    folder, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 5), init=plain_pool, **options)
    for quality, worth in enumerate((0, 0, 1, 1.5, 2.5), 1):
        got = of_arms(chances(folder, f"Quality {quality}.")) @ torch.arange(4.)
        assert got == pytest.approx(worth, abs=.1), f"quality {quality}"


def test_f2_quark_with_both_terms_arrives_at_the_optimum(plain_pool, tmp_path):
    options = BANDIT | dict(steps=300, kl_coef=.5, ent_coef=.2)
    folder, _ = fit(tmp_path, data=pool(tmp_path / "d.jsonl", 5), init=plain_pool, **options)
    ref = chances(plain_pool)
    for q in range(5):
        best = optimum(POOL[4 * q:4 * q + 4], ref, .5, .2)
        close(of_arms(chances(folder, f"Quality {q + 1}.")), best, atol=.03)


# ---------------------------------------------------------------- a run like any other

@pytest.mark.parametrize("flags, word", [
    ("--packing 64", "--packing"), ("--loss_on all", "--loss_on"), ("--prompt_weight 1", "--prompt_weight"),
    ("--init new", "--ref"), ("--kl_coef -1", "--kl_coef"), ("--ent_coef inf", "--ent_coef")])
def test_refusals(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = runs.refuse(quark, flags.split(), monkeypatch, capsys)
    assert code == 2 and word in error


def start(folder, *words, text=""):
    """Run a command in another folder: exit code, output, errors."""
    done = subprocess.run([sys.executable, *words], cwd=folder, input=text, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_script_finds_the_trainers_from_any_folder_and_says_what_is_wrong(tmp_path):
    script = ROOT / "configs/quark.py"
    code, out, err = start(tmp_path, script, "--help")
    assert code == 0 and not err and "--kl_coef" in out and "--muon_lr" in out
    code, _, err = start(tmp_path, script)
    assert code == 1 and "out/sft" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_script_trains_and_prints_a_command_that_asks_for_the_best(tmp_path):
    wild(1, tmp_path / "init")
    path = write(tmp_path / "d.jsonl", TOLD * 4)
    options = QUARK | dict(data=path, init=tmp_path / "init", batch=4, steps=2)
    options["out"] = tmp_path / "run"
    words = [f"--{name}={value}" for name, value in options.items()]
    code, out, err = start(tmp_path, ROOT / "configs/quark.py", *words)
    assert code == 0, err
    python, *words = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert python == "python" and words[-2:] == ["--system", "Quality 5."]
    code, _, err = start(tmp_path, *words, "--max_new", "3", text="Hi\n")
    assert code == 0 and not err


def test_its_code_is_that_of_all_files_that_it_imports(monkeypatch):
    read = []
    monkeypatch.setattr(data, "digest", lambda path: read.append(Path(path).name) or "x")
    data.code_of(quark.Config())
    assert sorted(read) == ["data.py", "model.py", "quark.py", "reward.py", "sft.py"]
