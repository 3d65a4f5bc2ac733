"""What all trainers promise, tested of each with the same few lines: a run that is killed at any moment ends as if it
had not been, a seed is all the chance there is, evaluating changes nothing, no micro-batch does, and options are used.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dpo
import grpo
import model
import orpo
import ppo
import quark
import runs
import sft
from model import Linear, load_model
from policies import random_policy, save, weights
from runs import outcome, preferences, same, write

ROOT = Path(__file__).resolve().parents[1]
SIZE = dict(init="new", n_layer=1, n_head=2, n_embd=32, block_size=64)
ROLLOUTS = dict(data="PROMPTS", reward="runs:vowels", max_new=6, prompts=4, lr=3e-3)

RUNS = {    # the trainer and its options: what a run carries from step to step differs
    "sft": (sft, dict(SIZE, data="CHATS", batch=6, dropout=.1, packing=64)),
    "sft, LoRA": (sft, dict(data="CHATS", batch=6, packing=0, lora_r=2, prompt_weight=.3)),
    "quark": (quark, dict(data="CHATS", batch=6, prompt_weight=.1)),
    "orpo": (orpo, dict(data="PAIRS", batch=8, max_new=4, prompt_weight=.3)),
    "orpo, LoRA": (orpo, dict(data="PAIRS", batch=8, max_new=4, lora_r=2)),
    "dpo": (dpo, dict(data="PAIRS", batch=8, max_new=4, nll_coef=.3)),
    "dpo, reference moved": (dpo, dict(data="PAIRS", batch=8, max_new=4, ref_every=2)),
    "dpo, LoRA, tdpo2": (dpo, dict(data="PAIRS", batch=8, max_new=4, lora_r=2, loss="tdpo2")),
    "dpo, kto": (dpo, dict(data="PAIRS", batch=8, max_new=4, loss="kto", nll_coef=.3, nll_per="pair")),
    "dpo, a value function": (dpo, dict(data="PAIRS", batch=8, max_new=4, loss="dro", beta=1.0)),
    "dpo, online": (dpo, dict(data="PROMPTS", batch=4, max_new=6, online=True, reward="runs:vowels", lr=3e-3)),
    "ppo, β and score adapt": (ppo, dict(ROLLOUTS, target_kl=.01, normalize_reward=True, minibatches=2)),
    "ppo, a cost": (ppo, dict(ROLLOUTS, cost="runs:price", lambda_lr=.5, kl="k2", entropy_coef=.01)),
    "ppo, LoRA": (ppo, dict(ROLLOUTS, lora_r=2, minus_reference=True)),
    "grpo, reference moved, pool": (grpo, dict(ROLLOUTS, group=3, kl_coef=.1, ref_every=2, pool=8, prioritized=True,
                                               reward="runs:has_e + runs:vowels", curriculum=.7)),
    "grpo, resampled, look-ahead": (grpo, dict(ROLLOUTS, group=3, epochs=2, minibatches=2, resample=2,
                                               reward="runs:half", tripwire="runs:has_e", ahead=2)),
    "grpo, opmd, forgotten": (grpo, dict(ROLLOUTS, group=3, loss="opmd", reset=True, epochs=2, kl_coef=.1, kl="k1")),
    "grpo, LoRA": (grpo, dict(ROLLOUTS, group=3, lora_r=2, kl_coef=.1)),
}


@pytest.fixture(scope="session")
def files(tmp_path_factory, tiny, prompts):
    """What stands for the capitals above, and where a run starts unless it says so."""
    folder, chats = tmp_path_factory.mktemp("files"), []
    for row in preferences(42):
        chats.append(dict(messages=row["prompt"] + [dict(role="assistant", content=row["responses"][0])]))
    return dict(PROMPTS=prompts, PAIRS=write(folder / "pairs.jsonl", preferences(42)),
                CHATS=write(folder / "chats.jsonl", chats), init=tiny)


@pytest.fixture
def run(files, tmp_path):
    """run(name of RUNS, folder, options) -> its rows."""
    def start(name, folder, **more):
        script, options = RUNS[name]
        options = dict(init=files["init"], steps=4, eval_every=2, save_every=2, micro_tokens=64) | options | more
        options["data"] = files.get(options["data"], options["data"])
        return runs.train(script, tmp_path / folder, **options)
    return start


# ---------------------------------------------------------------- killed, and gone on

@pytest.mark.parametrize("name", RUNS)
def test_41_42_killed_at_any_moment_it_ends_as_if_it_had_not_been(name, run, tmp_path, monkeypatch):
    """To the bit, with all that it leaves. sft.py dies at every moment, the others at every ninth."""
    with monkeypatch.context() as patch:
        moments = runs.killing(patch, None)
        run(name, "whole")
    whole, last = outcome(tmp_path / "whole"), next(moments)
    assert last > 20, "what should kill is not called"
    every = 1 if name == "sft" else 9
    for at in range(list(RUNS).index(name) % every, last, every):
        folder = tmp_path / f"at {at}"
        with monkeypatch.context() as patch, pytest.raises(runs.Killed):
            runs.killing(patch, at)
            run(name, folder.name)
        log = folder / "metrics.jsonl"
        steps = log.read_text().count("\n") if log.exists() else 0
        if (folder / "checkpoint.safetensors").exists() or (folder / "config.json").exists():
            weights(folder)                     # what is there can be read,
        else:
            assert steps <= 2, "a checkpoint is overdue"
        if log.exists() and not (folder / "summary.json").exists():
            with open(log, "a") as file:
                file.write('{"step": 3, "lo')   # a line cut by the kill
        run(name, folder.name)
        assert outcome(folder) == whole, f"killed at moment {at} of {last} and resumed, the run ends differently"
        assert not list(folder.rglob("*.part")) and (folder / "summary.json").exists()


def test_41_a_real_kill(run, files, tmp_path):
    options = dict(steps=40, save_every=3, batch=8, eval_every=20, micro_tokens=4096)
    run("sft", "whole", **options)
    words = runs.QUICK | RUNS["sft"][1] | dict(data=files["CHATS"], out=tmp_path / "killed") | options
    flags = [f"--{name}={value}" for name, value in words.items()]
    process = subprocess.Popen([sys.executable, ROOT / "sft.py", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 8):
        time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "summary.json").exists()
    run("sft", "killed", **options)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    run("sft", "whole")
    saved, real = [], os.fsync

    def fsync(fd):
        saved.append(fd)
        if len(saved) > 3:                      # of run.json, metrics.jsonl and a checkpoint
            raise OSError(28, "No space left on device")
        real(fd)
    with monkeypatch.context() as patch, pytest.raises(data.UserError, match="disk is full"):
        patch.setattr(os, "fsync", fsync)
        run("sft", "full")
    assert not list((tmp_path / "full").glob("*.part"))
    run("sft", "full")
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", ["sft", "quark", "orpo", "dpo", "ppo, a cost", "grpo, LoRA"])
def test_a_finished_run_does_nothing_again_but_with_overwrite(name, run, tmp_path, capsys):
    rows = run(name, "a")
    assert "next: python" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.*")}
    assert run(name, "a") == rows and "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.*")}
    with pytest.raises(data.UserError, match="--seed"):
        run(name, "a", seed=1)
    other = run(name, "a", seed=1, overwrite=True)
    assert other == run(name, "b", seed=1) != rows, "--overwrite is not a run of its own"
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_a_mistyped_option_can_be_corrected(run, tmp_path):
    """A run that never made a step holds nothing: the corrected command must not be told to choose another folder."""
    for name in ("sft, LoRA", "orpo", "dpo", "ppo, LoRA", "grpo, LoRA"):
        with pytest.raises(data.UserError, match="python sft.py"):
            run(name, name, init=str(tmp_path / "typo"))
        run(name, name)


# ---------------------------------------------------------------- what changes a run, and what does not

@pytest.mark.parametrize("name", RUNS)
def test_43_evaluation_changes_nothing(name, run, tmp_path):
    """Of the training; another seed changes every step of it."""
    often, never, other = run(name, "1", eval_every=1), run(name, "9", eval_every=9), run(name, "other", seed=1)
    for a, b in zip(often, never):
        assert all(a[key] == b[key] for key in a.keys() & b.keys() if key != "val_loss" or b[key] is not None)
    assert outcome(tmp_path / "1")[1] == outcome(tmp_path / "9")[1], "the weights depend on when one evaluates"
    assert never[-1].keys() == often[-1].keys() and never[-1] == often[-1]
    assert all(a != b for a, b in zip(often, other)), "another seed changes nothing"


@pytest.mark.parametrize("name", RUNS)
def test_07_micro_batches_and_padding_change_no_number(name, run, tmp_path, float64):
    """One row at a time, or all of them at once, padded to the longest: every metric and every weight."""
    dry = dict(dropout=0.0) if "dropout" in RUNS[name][1] else {}
    small, large = (run(name, str(n), micro_tokens=n, **dry) for n in (1, 100_000))
    small[0].pop("rewards/accuracy", None)      # policy and reference are equal there, but for rounding
    large[0].pop("rewards/accuracy", None)
    for step, (a, b) in enumerate(zip(small, large)):
        assert a.keys() == b.keys()
        runs.compare_rows(step, a, b, tolerance=1e-5)
    runs.compare_weights(weights(tmp_path / "1"), load_model(tmp_path / "100000"))


@pytest.mark.parametrize("name", [name for name, (script, _) in RUNS.items() if script not in (sft, quark)])
def test_20_dropout_of_the_checkpoint_does_not_matter(name, run, tmp_path):
    """Neither in what is logged nor in the gradient: policy and reference agree until the first update."""
    wet = save(tmp_path / "wet", random_policy(dropout=.5))
    assert run(name, "a", steps=2) == run(name, "b", steps=2, init=wet)


MATTERS = [     # an option, another value of it than the run's
    ("sft", dict(beta2=.5)), ("sft", dict(muon_lr=.05)), ("sft", dict(optimizer="adamw")), ("sft", dict(lr=1e-2)),
    ("sft", dict(weight_decay=.9)), ("sft", dict(warmup=3)), ("sft", dict(clip_grad=.01)), ("sft", dict(dropout=.4)),
    ("sft", dict(prompt_weight=.7)),
    ("quark", dict(beta2=.5)), ("quark", dict(muon_lr=.05)), ("quark", dict(optimizer="adamw")),
    ("quark", dict(weight_decay=.9)), ("quark", dict(warmup=3)), ("quark", dict(clip_grad=.01)),
    ("quark", dict(prompt_weight=.7)),
    ("orpo", dict(weight_decay=.9)), ("orpo", dict(warmup=3)), ("orpo", dict(clip_grad=.01)),
    ("orpo", dict(prompt_weight=.7)),
    ("dpo", dict(optimizer="muon")), ("dpo", dict(mask_end=True)), ("dpo", dict(clip_grad=.01)),
]


@pytest.mark.parametrize("name, options", MATTERS, ids=str)
def test_an_option_is_used(name, options, run, tmp_path):
    """The weights end elsewhere. (The slow loops say where.)"""
    run(name, "a", steps=3)
    run(name, "b", steps=3, **options)
    assert outcome(tmp_path / "a")[1] != outcome(tmp_path / "b")[1], f"{options} changes no weight"


@pytest.mark.parametrize("name", ["dpo, online", "grpo, LoRA", "ppo, LoRA"])
def test_the_families_that_are_asked_for_are_those_of_training_and_evaluation(name, run, monkeypatch):
    steps = runs.watch_steps(monkeypatch)
    run(name, "a", data="toy", families="safe", steps=1)
    for records, _ in steps[0].rollouts:
        assert {record["family"] for record in records} == {"safe"}


def test_muons_rate_is_used_where_muon_is_no_default(run, tmp_path):
    for muon_lr in (1e-3, 1e-2):
        run("dpo", str(muon_lr), optimizer="muon", muon_lr=muon_lr, steps=2)
    assert outcome(tmp_path / "0.001")[1] != outcome(tmp_path / "0.01")[1]


# ---------------------------------------------------------------- the reference, LoRA, what people see

@pytest.mark.parametrize("name", [name for name in RUNS if "LoRA" in name and name[:3] not in ("sft", "orp")])
def test_lora_trains_adapters_and_the_reference_is_the_policy_without(name, run, files, tmp_path, monkeypatch):
    """It is no second model; a plain model is written, and only the adapted matrices have changed."""
    script, _ = RUNS[name]
    calls = runs.watch(monkeypatch, script, "reference")
    rows = run(name, "a", lr=1e-2)
    (policy,), ref = calls["reference"][0]
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    assert not ref.loras() and {p.data_ptr() for p in ref.parameters()} == frozen
    learnt = "rewards/margin" if script is dpo else "kl"
    assert rows[0][learnt] == 0 and abs(rows[2][learnt]) > 1e-6
    start, end = weights(files["init"]), weights(tmp_path / "a")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    modules = load_model(files["init"]).named_modules()
    adapted = {f"model/{name}.weight" for name, module in modules if isinstance(module, Linear)}
    assert moved == adapted, "other weights than the adapted ones have moved"


@pytest.mark.parametrize("name", ["ppo, a cost", "grpo, opmd, forgotten", "dpo, online"])
def test_19_the_reference_is_constant_and_shares_no_memory(name, run, files, tmp_path, monkeypatch):
    script, _ = RUNS[name]
    calls = runs.watch(monkeypatch, script, "reference")
    run(name, "a")
    (policy,), ref = calls["reference"][0]
    start = weights(files["init"])
    assert same({f"model/{key}": tensor for key, tensor in ref.state_dict().items()}, start)
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in ref.parameters()}
    assert not same(weights(tmp_path / "a"), start)


@pytest.mark.parametrize("name", ["grpo, LoRA", "ppo, LoRA", "dpo", "orpo"])
def test_samples_are_for_people(name, run, tmp_path):
    run(name, "a", steps=1)
    text, = [path.read_text() for path in (tmp_path / "a" / "samples").iterdir()]
    assert text.count("→") == 2 and "<|" not in text        # two records are held out


@pytest.mark.parametrize("name, options", [
    ("ppo, LoRA", dict(reward="exact")), ("ppo, LoRA", dict(reward="words", cost="exact")),
    ("grpo, LoRA", dict(reward="exact")), ("grpo, LoRA", dict(reward="words", tripwire="exact")),
    ("dpo, online", dict(reward="exact"))], ids=str)
def test_24_a_file_that_a_verifier_can_tell_nothing_of_is_refused_before_the_first_step(name, options, run, tmp_path):
    path = write(tmp_path / "mine.jsonl", [dict(prompt=f"Q {i}") for i in range(6)])
    with pytest.raises(data.UserError, match=r'^(?=.*mine.jsonl)(?=.*exact)(?=.*"answer")[^\n]*$'):
        run(name, "a", data=path, **options)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- waiting for the device

class Reads(TorchDispatchMode):
    """How often a number was read from a tensor: for that a GPU has to be waited for."""
    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sft", "quark", "orpo", "dpo", "dpo, kto", "dpo, a value function"])
def test_a_step_reads_nothing_but_the_norm_of_a_gradient_until_it_reports(name, run, monkeypatch):
    """However many micro-batches there are. A gradient that is no number must not be used, so that is read."""
    reads, until = Reads(), []
    evaluates, log = data.Run.evaluates, data.Run.log

    def reports(self, step):
        until.append(reads.n)
        return evaluates(self, step)

    def logged(*args, **metrics):
        log(*args, **metrics)
        reads.n = 0
    monkeypatch.setattr(data.Run, "evaluates", reports)
    monkeypatch.setattr(data.Run, "log", logged)
    with reads:
        run(name, "a", save_every=100)
    assert set(until[1:]) == {2 if "value function" in name else 1}, "of each optimizer"


# ---------------------------------------------------------------- compiled

@pytest.fixture
def compiled_like_plain(run, monkeypatch):
    """compiled_like_plain(name of RUNS): a run with --compile logs what one without does, but for rounding."""
    torch._dynamo.reset()

    def check(name, **more):
        options = dict(steps=6, micro_tokens=512) | more  # steps of many shapes
        for want, got in zip(run(name, "plain", **options), run(name, "compiled", compile=True, **options)):
            runs.compare_rows(want["step"], got, want, tolerance=1e-4)
    return check


@pytest.mark.filterwarnings("ignore")                   # the compiler warns about its own doings
@pytest.mark.parametrize("name, more, most", [
    ("sft", dict(n_layer=5), 6), ("sft, LoRA", {}, 4), ("dpo, online", {}, 5), ("grpo, LoRA", {}, 4)], ids=str)
def test_whatever_the_shapes_blocks_and_head_are_compiled_once(name, more, most, compiled_like_plain, monkeypatch):
    """The head, the last block and the others, with a gradient and without; never the sampler. What was to be compiled
    runs here as it is: no C++ is needed."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend=backend, **how))
    monkeypatch.setattr(model, "check_compiler", lambda device: None)
    compiled_like_plain(name, **more)
    assert 0 < len(graphs) <= most


@pytest.mark.filterwarnings("ignore")
def test_compiled_in_earnest_it_learns_the_same(compiled_like_plain):
    try:
        model.check_compiler(torch.device("cpu"))
    except data.UserError as error:
        pytest.skip(str(error))
    compiled_like_plain("orpo")                         # one without dropout, whose draws would be others


def test_without_a_compiler_it_is_refused_in_one_line(run, monkeypatch):
    def broken(function):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: none\n\nSet TORCHDYNAMO_VERBOSE=1 for more")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(data.UserError, match="^--compile.*InvalidCxxCompiler: none[^\n]{0,3}$"):
        run("sft", "a", compile=True)
