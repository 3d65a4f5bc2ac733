"""What a step costs: the README's table D and tests/bench.py's formulas against what really happens.

FLOPs are counted by PyTorch at every matmul, bytes by watching every tensor come and go, both in the real train().
Attention's own FLOPs are left out on both sides: on a CPU its kernel is not counted.
"""
import json
import random
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import dpo
import grpo
import model as M
import orpo
import ppo
import reward
import runs
import sft

TOK = data.Tokenizer.load("toy")
SIZE = dict(n_layer=2, n_head=4, n_embd=128, block_size=256)
COMMON = dict(seed=0, device="cpu", dtype="fp32", threads=1)


class Live(TorchDispatchMode):
    """The bytes of all tensors that are alive, and the most there were at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                store = t.untyped_storage()
                key, size = store._cdata, store.nbytes()
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(store, self.gone, key, size)
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Checkpoints of a language model and of a reward model, and pairs of responses that fill half of the context."""
    folder = tmp_path_factory.mktemp("cost")
    torch.manual_seed(0)
    for name, n_scores in (("lm", 0), ("rm", 1)):
        M.write_model(folder / name, M.GPT(M.GPTConfig(vocab_size=TOK.n_vocab, n_scores=n_scores, **SIZE), TOK))
    say = lambda i, c: (f"{c}{i} " * 60)[:150]
    rows = [dict(prompt=[dict(role="user", content="?" + say(i, "q"))], responses=[say(i, "a"), say(i, "b")])
            for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(folder=folder, lm=str(folder / "lm"), rm=str(folder / "rm"), pairs=str(folder / "pairs.jsonl"),
                           rows=rows)


def apart(record, text, finished):
    """A reward by which no two different answers are alike, so that every group is learned from."""
    return random.Random(text).random()


def run(kind, start, out, **more):
    """Two steps of the real training of one kind."""
    Config, options = {
        "sft": (sft.Config, dict(data=start.pairs, steps=2, batch=8, packing=0)),
        "reward": (reward.Train, dict(data=start.pairs, epochs=.4, batch=8)),
        "dpo": (dpo.Config, dict(data=start.pairs, steps=2, batch=8, max_new=8)),
        "orpo": (orpo.Config, dict(data=start.pairs, steps=2, batch=8, max_new=8)),
        "ppo": (ppo.Config, dict(reward=start.rm, steps=2, prompts=20, max_new=60, eval_prompts=2)),
        "grpo": (grpo.Config, dict(reward=f"{__name__}:apart", steps=2, prompts=3, max_new=60)),
        "grpo_kl": (grpo.Config, dict(reward=start.rm, kl_coef=.1, steps=2, prompts=3, max_new=60))}[kind]
    cfg = Config(**COMMON | dict(out=str(start.folder / out), init=start.lm) | options | more)
    sys.modules[Config.__module__].train(cfg)


NAMES = {"sft": "sft, dpo, orpo, grpo", "dpo": "sft, dpo, orpo, grpo", "orpo": "sft, dpo, orpo, grpo",
         "grpo": "sft, dpo, orpo, grpo", "reward": "reward", "ppo": "ppo", "grpo_kl": "grpo, KL, reward model"}


@pytest.mark.parametrize("kind, options", [(kind, {}) for kind in NAMES if kind != "orpo"] + [
    ("ppo", dict(lora_r=8)), ("dpo", dict(grad_checkpoint=True))])
def test_peak_memory_is_within_15_percent_of_the_formula(kind, options, start):
    live = Live()
    with live:
        run(kind, start, f"memory_{kind}{len(options)}{'lora_r' in options}", micro_tokens=1024, **options)
    config = M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE)
    assert live.most == pytest.approx(bench.memory(NAMES[kind], config, 1024, 4, **options), rel=.15)


def test_peak_memory_counts_what_is_alive_and_nothing_else():
    with Live() as live:
        a = torch.zeros(1000)
        b = a[10:].view(-1, 10)                    # shares a's memory
        del a, b
        torch.zeros(500) + 1
    assert live.now == 0 and live.most == 4000


# ------------------------------------------------------------------------------------------------ FLOPs

PROMPTS, GROUP, NEW = 4, 4, 32


class Enough(Exception):
    """All that was to be counted has been."""


def flops_of_a_step(kind, start, tag, **options):
    """What is counted between two rows of the log: no evaluation, no start."""
    counts, real = [], data.Run.log

    def log(self, *args, **metrics):
        counts.append(counter.get_total_flops())
        if len(counts) == 2:
            raise Enough
        real(self, *args, **metrics)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter, pytest.raises(Enough):
        patch.setattr(data.Run, "log", log)
        run(kind, start, f"flops_{tag}", steps=3, eval_every=10, **options)
    return counts[1] - counts[0]


@pytest.mark.parametrize("kind, grad, plain, options", [
    ("sft", 1, 0, dict(batch=PROMPTS, packing=0, prompt_weight=0.0, optimizer="adamw")),
    ("orpo", 2, 0, dict(batch=PROMPTS)),
    ("dpo", 2, 2, dict(batch=PROMPTS, ref_every=100)),                 # 16 P T; the reference with every batch
    ("dpo", 2, 0, dict(batch=40)),                                     # 12 P T; every step sees the whole file again
    ("dpo", 1, 2, dict(batch=PROMPTS, loss="kto", ref_every=100)),     # 8 P T a thumb, and 4 for the mismatched one
])
def test_flops_of_a_step_on_a_file_are_those_of_table_d(kind, grad, plain, options, start):
    """grad: rows with a backward pass, thrice a forward one; plain: passes without. KTO's row here is a thumb, whose
    mismatched twin is read by policy and reference, and whose own reference pass comes on top."""
    config, record = M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE), start.rows[0]
    (ids, target), _ = data.encode(record, TOK, 256)
    one = bench.forward_flops(config, data.round_up(len(ids)) - 1, 0, head=sum(target))
    passes, tag = 3 * grad + plain + (options.get("loss") == "kto"), "_".join(map(str, options.values()))
    got = flops_of_a_step(kind, start, f"{kind}{grad}{plain}_{tag}", **options)
    assert got == pytest.approx(options["batch"] * passes * one, rel=.05)


def test_flops_of_a_run_of_two_steps_and_of_one_differ_by_a_step_and_its_reference(start):
    """16 P T too, but that the reference has read what the steps will see before the first of them."""
    config, totals = M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE), []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            run("dpo", start, f"flops_{steps}_steps", steps=steps, batch=PROMPTS, eval_every=10)
        totals.append(counter.get_total_flops())
    (ids, target), _ = data.encode(start.rows[0], TOK, 256)
    one = bench.forward_flops(config, data.round_up(len(ids)) - 1, 0, head=sum(target))
    assert totals[1] - totals[0] == pytest.approx(PROMPTS * 8 * one, rel=.05)


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEMORY = (ROOT / "configs/README.md").read_text(encoding="utf-8")


def cost_in_the_table(method):
    """The numbers of README's table D, forward and backward passes of one response in units of PT."""
    row, = [line for line in README.splitlines() if line.startswith(f"| {method} |") and "PT" in line]
    return [int(number) for number in re.findall(r"(\d+)PT", row)]


def test_readme_says_the_same_cost_of_ppo_in_its_table_and_where_it_tells_of_memory():
    sample, score, train = cost_in_the_table("PPO")
    paragraph, = [text for text in MEMORY.split("\n\n") if "1/18" in text]
    numbers = {int(number) for number in re.findall(r"\d+", paragraph)}
    assert {sample + score + train, sample + score + 2 * train} <= numbers


@pytest.mark.parametrize("kind", ["ppo", "grpo", "grpo_kl"])
def test_flops_of_a_rollout_and_its_update_are_those_of_table_d(kind, start):
    """PPO: 2 P T to sample, 2 each for π_old, reference, reward model and critic, 12 an epoch, as README has them. GRPO:
    a prompt is read once for its group; 6 to update, and 4 more with a reference and a reward model."""
    _, score, train = cost_in_the_table("PPO")
    config, record = M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE), start.rows[0]
    asked, rows = len(TOK.prompt(record["prompt"])), PROMPTS * (1 if kind == "ppo" else GROUP)
    width = data.round_up(asked + NEW)
    full = bench.forward_flops(config, width - 1, 0, head=NEW)           # of a row, its responses' logits
    bare = bench.forward_flops(config, width, 0, head=0)                 # of a row, scores only
    drawn = PROMPTS * bench.forward_flops(config, asked, 0, head=1) + rows * bench.forward_flops(
        config, NEW - 1, 0, head=NEW - 1)
    PT = (full + bare) / 4                                               # of both passes, with logits and with scores
    want = drawn + rows * {"ppo": (score + 2 * train) * PT, "grpo": 3 * full, "grpo_kl": full + bare + 3 * full}[kind]
    more = dict(epochs=2) if kind == "ppo" else dict(group=GROUP)
    got = flops_of_a_step(kind, start, kind, data=start.pairs, prompts=PROMPTS, max_new=NEW, **more)
    assert got == pytest.approx(want, rel=.05)


# ------------------------------------------------------------------------------------------------ fused backward


@pytest.mark.parametrize("kind, options", [("sft", dict(optimizer="muon", batch=8)), ("dpo", dict(batch=4))])
def test_fused_backward_gives_the_same_weights_with_no_gradient_left(kind, options, start, monkeypatch):
    """Equal but for rounding after three updates; every weight's gradient is freed in the backward pass."""
    common = dict(steps=3, clip_grad=0.0, micro_tokens=10 ** 5) | options
    left, real = [], M.Optimizer.step
    monkeypatch.setattr(M.Optimizer, "step", lambda self, step: (
        left.append(sum(p.grad is not None for p in self.params)), real(self, step))[1])
    for name in ("plain", "fused"):
        run(kind, start, f"{kind}_{name}", fused_bwd=name == "fused", **common)
    assert left[:3] == [left[0]] * 3 and left[0] > 20 and left[3:] == [0] * 3
    a, b = (M.load_model(start.folder / f"{kind}_{name}").state_dict() for name in ("plain", "fused"))
    before = M.load_model(start.lm).state_dict()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-6), name
    assert not any(torch.equal(a[name], before[name]) for name in a)


def test_fused_backward_needs_nearly_4_bytes_a_weight_less():
    config, peaks = M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE), []
    for fused in (False, True):
        torch.manual_seed(0)
        with Live() as live:
            model = M.GPT(config)
            model.fused_bwd = fused
            optimizer = M.Optimizer(model, 1e-3, 10, clip=0.0)
            for step in range(2):
                optimizer.at(step)
                tokens = torch.randint(0, 700, (1, 17))
                M.token_logprobs(model, tokens, torch.ones(1, 16)).sum().backward()
                optimizer.step(step)
        peaks.append(live.most)
    assert 3.2 < (peaks[0] - peaks[1]) / bench.n_params(config) < 4.1


@pytest.mark.parametrize("kind, options, match", [
    ("sft", dict(clip_grad=1.0), "cannot be clipped"), ("sft", dict(clip_grad=0.0, micro_tokens=512), "one backward pass"),
    ("ppo", dict(clip_grad=0.0, ptx_coef=1.0), "no --ptx_coef")])
def test_fused_backward_refuses_what_needs_whole_gradients(kind, options, match, start, request):
    with pytest.raises(data.UserError, match=match):
        run(kind, start, f"refused_{abs(hash(request.node.name))}", fused_bwd=True, **options)


def test_fused_backward_resumes_bit_for_bit(start):
    options = dict(steps=4, clip_grad=0.0, micro_tokens=10 ** 5, save_every=2, fused_bwd=True)
    run("sft", start, "fused_whole", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Killed):
        runs.killing(patch, at=12)                          # after a checkpoint
        run("sft", start, "fused_cut", **options)
    assert (start.folder / "fused_cut" / "checkpoint.safetensors").exists()
    run("sft", start, "fused_cut", **options)
    assert runs.outcome(start.folder / "fused_cut") == runs.outcome(start.folder / "fused_whole")


# ------------------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("shape", [{}, dict(vocab_size=500, n_scores=3), dict(n_layer=2, n_embd=64, n_head=1)])
def test_n_params_is_the_number_of_parameters(shape):
    config = M.GPTConfig(**dict(vocab_size=TOK.n_vocab) | SIZE | shape)
    assert bench.n_params(config) == sum(p.numel() for p in M.GPT(config).parameters())


@pytest.mark.parametrize("head", [None, 5, 0])
def test_forward_flops_are_those_of_every_matmul_attention_included(head):
    """In bf16 a CPU's attention is plain matmuls, which are counted: of all T tokens to all T, the masked half too."""
    config, T = M.GPTConfig(vocab_size=512, **SIZE), 48
    model = M.GPT(config).to(torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = model(torch.zeros(2, T, dtype=torch.long))
        model.logits(hidden if head is None else hidden.flatten(0, 1)[:head])
    assert counter.get_total_flops() == bench.forward_flops(config, 2 * T, T, head)


@pytest.fixture(scope="module")
def short(start):
    """Pairs of about 16 tokens, nearly all responses: so short that a CPU's plain attention in bf16 costs little."""
    rows = [dict(prompt=[dict(role="user", content="?")], responses=[f"{x}{i} " * 9 for x in "ab"]) for i in range(140)]
    (start.folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(**vars(start) | dict(pairs=str(start.folder / "short.jsonl")))


@pytest.mark.parametrize("kind, options", [("sft", dict(lora_r=8)), ("dpo", {})])
def test_peak_memory_in_bf16_is_within_15_percent_of_the_formula(kind, options, short):
    with Live() as live:
        run(kind, short, f"bf16_{kind}", micro_tokens=2048, batch=128, dtype="bf16", **options)
    config = M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE)
    assert live.most == pytest.approx(bench.memory(NAMES[kind], config, 2048, 2, **options), rel=.15)


def test_bf16_keeps_the_weights_it_has_rounded():
    """Where weights are nearly all there is, bf16 needs more than fp32: 2 bytes of every matrix's weight."""
    peaks, config = [], M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE | dict(n_layer=6))
    for dtype in ("fp32", "bf16"):
        with Live() as live:
            model = M.new_model(config, M.Setup(precision=dtype))
            optimizer = M.Optimizer(model, 1e-3, 10)
            for step in range(2):
                for _ in "12":  # micro-batches: the second one's copies come on top of whole gradients
                    logp = M.token_logprobs(model, torch.ones(1, 9, dtype=torch.long), torch.ones(1, 8))
                    logp.sum().backward()
                optimizer.step(step)
        peaks.append(live.most)
    fp32, bf16 = (bench.memory(NAMES["dpo"], config, 8, half) for half in (4, 2))
    assert bf16 > fp32 and .5 < (peaks[1] - peaks[0]) / (bf16 - fp32) < 1.1


def test_memory_of_the_sizes_of_gpt2_by_hand():
    """124,475,904 parameters (50,304 rows), 4,096 tokens in bf16: 333 positions a chunk, 36 or 4 widths a token."""
    config, P, C = M.GPTConfig(**bench.SIZES["gpt2"]), 124_475_904, 768
    head, layer, lora = 333 * 50257 * 11, 4096 * 36 * C, 16 * 12 * 16 * 16 * C
    want = {("sft, dpo, orpo, grpo", 0, False): 18 * P + 12 * layer + head,
            ("sft, dpo, orpo, grpo", 0, True): 18 * P + 12 * 4096 * 4 * C + max(layer, head),
            ("sft, dpo, orpo, grpo", 16, False): 6 * P + lora + 12 * layer + head,
            ("reward", 0, False): 18 * P + 12 * layer,
            ("grpo, KL, reward model", 0, False): 26 * P + 12 * layer + head,
            ("grpo, KL, reward model", 16, False): 10 * P + lora + 12 * layer + head,
            ("ppo", 0, False): 38 * P + 12 * layer + head,
            ("ppo", 0, True): 38 * P + 12 * 4096 * 4 * C + max(layer, head),
            ("ppo", 16, False): 14 * P + lora * 28 // 16 + 12 * layer + head}
    assert bench.n_params(config) == P
    for (name, r, again), number in want.items():
        assert bench.memory(name, config, 4096, 2, r, again) == number, (name, r, again)
