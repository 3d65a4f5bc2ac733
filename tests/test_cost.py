"""What a step costs: the README's table of costs and costs.py's formulas against what really happens.

FLOPs are counted by PyTorch at every matmul, bytes by watching every tensor come and go, both in the real train().
Attention's own FLOPs are left out on both sides: on a CPU its kernel is not counted.
"""
import random
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import costs
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
CONFIG = M.GPTConfig(vocab_size=TOK.n_vocab, **SIZE)
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
        config = M.GPTConfig(vocab_size=TOK.n_vocab, n_scores=n_scores, **SIZE)
        M.write_model(folder / name, M.GPT(config, TOK))
    rows = []
    for i in range(40):
        question, *answers = [(f"{c}{i} " * 60)[:150] for c in "qab"]
        rows.append(dict(prompt=[dict(role="user", content="?" + question)], responses=answers))
    pairs = runs.write(folder / "pairs.jsonl", rows)
    return SimpleNamespace(folder=folder, lm=str(folder / "lm"), rm=str(folder / "rm"), pairs=pairs, rows=rows)


def apart(record, text, finished):
    """A reward by which no two different answers are alike, so that every group is learned from."""
    return random.Random(text).random()


def run(kind, start, out, **more):
    """Two steps of the real training of one kind."""
    pairs = dict(data=start.pairs, steps=2, batch=8)
    sampled = dict(steps=2, prompts=3, max_new=60)
    script, options = {
        "sft": (sft, pairs | dict(packing=0)),
        "reward": (reward, dict(data=start.pairs, epochs=.4, batch=8)),
        "dpo": (dpo, pairs | dict(max_new=8)),
        "orpo": (orpo, pairs | dict(max_new=8)),
        "ppo": (ppo, sampled | dict(reward=start.rm, prompts=20, eval_prompts=2)),
        "grpo": (grpo, sampled | dict(reward=f"{__name__}:apart")),
        "grpo_kl": (grpo, sampled | dict(reward=start.rm, kl_coef=.1))}[kind]
    Config = reward.Train if script is reward else script.Config
    usual = COMMON | dict(out=str(start.folder / out), init=start.lm)
    script.train(Config(**usual | options | more))


ONE = "sft, dpo, orpo, grpo"    # what costs.py calls those with one model
NAMES = dict(sft=ONE, dpo=ONE, grpo=ONE, reward="reward", ppo="ppo", grpo_kl="grpo, KL, reward model")


def check_memory(kind, start, tokens, half, **options):
    """The real peak of a run against the formula's; half: bytes of a matmul's number."""
    seen, forward = [], M.GPT.forward

    def watched(self, tokens, *args, where=None, **more):
        if torch.is_grad_enabled() and where is not None:
            seen.append((len(where[0]), tokens.numel()))
        return forward(self, tokens, *args, where=where, **more)
    with Live() as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr(M.GPT, "forward", watched)
        run(kind, start, f"{kind}_{half}_" + "_".join(options), micro_tokens=tokens, **options)
    told = {name: options[name] for name in options if name in ("lora_r", "grad_checkpoint")}
    told["read"] = max(read / tokens for read, tokens in seen)
    assert live.most == pytest.approx(costs.memory(NAMES[kind], CONFIG, tokens, half, **told), rel=.15)


ALL = [(kind, {}) for kind in NAMES]


@pytest.mark.parametrize("kind, options", ALL + [("ppo", dict(lora_r=8)), ("dpo", dict(grad_checkpoint=True))])
def test_peak_memory_is_within_15_percent_of_the_formula(kind, options, start):
    check_memory(kind, start, 1024, 4, **options)


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
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(data.Run, "log", log)
        with pytest.raises(Enough):
            run(kind, start, f"flops_{tag}", steps=3, eval_every=10, **options)
    return counts[1] - counts[0]


def forward_of_a_pass(start):
    """FLOPs of one forward pass of one response of the file."""
    (ids, target), _ = data.encode(start.rows[0], TOK, 256)
    width = data.round_up(len(ids))
    return costs.forward_flops(CONFIG, width, 0, head=sum(target))


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
    passes = 3 * grad + plain
    if options.get("loss") == "kto":
        passes += 1
    tag = "_".join(map(str, options.values()))
    got = flops_of_a_step(kind, start, f"{kind}{grad}{plain}_{tag}", **options)
    assert got == pytest.approx(options["batch"] * passes * forward_of_a_pass(start), rel=.05)


def test_flops_of_a_run_of_two_steps_and_of_one_differ_by_a_step_and_its_reference(start):
    """16 P T too, but that the reference has read what the steps will see before the first of them."""
    totals = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            run("dpo", start, f"flops_{steps}_steps", steps=steps, batch=PROMPTS, eval_every=10)
        totals.append(counter.get_total_flops())
    assert totals[1] - totals[0] == pytest.approx(PROMPTS * 8 * forward_of_a_pass(start), rel=.05)


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEMORY = (ROOT / "configs/README.md").read_text(encoding="utf-8")


def cost_in_the_table(method):
    """The numbers of the README's table of costs, forward and backward passes of one response in units of PT."""
    rows = re.findall(rf"^\| {method} \|.*PT.*", README, re.MULTILINE)
    assert len(rows) == 1
    return list(map(int, re.findall(r"(\d+)PT", rows[0])))


def test_readme_says_the_same_cost_of_ppo_in_its_table_and_where_it_tells_of_memory():
    sample, score, train = cost_in_the_table("PPO")
    paragraph, = [text for text in MEMORY.split("\n\n") if "1/18" in text]
    numbers = {int(number) for number in re.findall(r"\d+", paragraph)}
    assert {sample + score + train, sample + score + 2 * train} <= numbers


@pytest.mark.parametrize("kind", ["ppo", "grpo", "grpo_kl"])
def test_flops_of_a_rollout_and_its_update_are_those_of_table_d(kind, start):
    """PPO: 2 P T to sample, 2 each for π_old, reference, reward model and critic, 12 an epoch, as README has them.
    GRPO: a prompt is read once for its group; 6 to update, and 4 more with a reference and a reward model."""
    _, score, train = cost_in_the_table("PPO")
    group = 1 if kind == "ppo" else GROUP
    rows, asked = PROMPTS * group, len(TOK.prompt(start.rows[0]["prompt"]))
    width = data.round_up(asked + NEW)
    full = costs.forward_flops(CONFIG, width, 0, head=NEW)               # of a row, its responses' logits
    bare = costs.forward_flops(CONFIG, width, 0, head=0, read=NEW)       # of a row, scores only
    read = costs.forward_flops(CONFIG, asked, 0, head=1)
    drawn = costs.forward_flops(CONFIG, NEW - 1, 0, head=NEW - 1)
    PT = (full + bare) / 4                                               # of both passes, with logits and with scores
    want = dict(ppo=(score + 2 * train) * PT, grpo=3 * full, grpo_kl=4 * full + bare)[kind]
    more = dict(epochs=2) if kind == "ppo" else dict(group=GROUP)
    got = flops_of_a_step(kind, start, kind, data=start.pairs, prompts=PROMPTS, max_new=NEW, **more)
    assert got == pytest.approx(PROMPTS * read + rows * (drawn + want), rel=.05)


# ------------------------------------------------------------------------------------------------ fused backward


@pytest.mark.parametrize("kind, options", [("sft", dict(optimizer="muon", batch=8)), ("dpo", dict(batch=4))])
def test_fused_backward_gives_the_same_weights_with_no_gradient_left(kind, options, start, monkeypatch):
    """Equal but for rounding after three updates; every weight's gradient is freed in the backward pass."""
    left, step = [], M.Optimizer.step

    def counted(self, *args):
        left.append(sum(p.grad is not None for p in self.params))
        return step(self, *args)
    monkeypatch.setattr(M.Optimizer, "step", counted)
    for fused in (False, True):
        run(kind, start, f"{kind}_{fused}", fused_bwd=fused, steps=3, clip_grad=0.0, micro_tokens=10 ** 5, **options)
    assert min(left[:3]) > 20
    assert left[3:] == [0, 0, 0]
    before = M.load_model(start.lm).state_dict()
    plain = M.load_model(start.folder / f"{kind}_False").state_dict()
    fused = M.load_model(start.folder / f"{kind}_True").state_dict()
    for name, tensor in plain.items():
        assert torch.allclose(tensor, fused[name], rtol=0, atol=1e-6), name
        assert not torch.equal(tensor, before[name]), f"{name} did not move"


@pytest.mark.parametrize("options, match", [
    (dict(clip_grad=1.0), "cannot be clipped"),
    (dict(clip_grad=0.0, micro_tokens=512), "one backward pass")], ids=str)
def test_fused_backward_refuses_what_needs_whole_gradients(options, match, start):
    with pytest.raises(data.UserError, match=match):
        run("sft", start, "refused_" + match[:3], fused_bwd=True, **options)


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


@pytest.mark.parametrize("shape", [dict(vocab_size=500, n_scores=3), dict(n_layer=2, n_embd=64, n_head=1)], ids=str)
def test_n_params_is_the_number_of_parameters(shape):
    config = M.GPTConfig(**SIZE | shape)
    sizes = [p.numel() for p in M.GPT(config).parameters()]
    assert costs.n_params(config) == sum(sizes)


@pytest.mark.parametrize("head", [None, 5, 0])
def test_forward_flops_are_those_of_every_matmul_attention_included(head):
    """In bf16 a CPU's attention is plain matmuls, which are counted: of all T tokens to all T, the masked half too."""
    config, T = M.GPTConfig(vocab_size=512, **SIZE), 48
    model = M.GPT(config).to(torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        some = torch.arange(2 * T)[:head]
        model.logits(model(torch.zeros(2, T, dtype=torch.long), where=(some // T, some % T)))
    assert counter.get_total_flops() == costs.forward_flops(config, 2 * T, T, head)


@pytest.fixture(scope="module")
def short(start):
    """Pairs of about 16 tokens, nearly all responses: so short that a CPU's plain attention in bf16 costs little."""
    rows = []
    for i in range(140):
        answers = [f"{x}{i} " * 9 for x in "ab"]
        rows.append(dict(prompt=[dict(role="user", content="?")], responses=answers))
    short = vars(start) | dict(pairs=runs.write(start.folder / "short.jsonl", rows))
    return SimpleNamespace(**short)


@pytest.mark.parametrize("kind, options", [("sft", dict(lora_r=8)), ("dpo", {})])
def test_peak_memory_in_bf16_is_within_15_percent_of_the_formula(kind, options, short):
    check_memory(kind, short, 2048, 2, batch=128, dtype="bf16", **options)


def test_memory_of_the_sizes_of_gpt2_by_hand():
    """124,475,904 parameters (50,304 rows), 4,096 tokens in bf16: 333 positions a chunk, 36 or 4 widths a token."""
    config, P, C = M.GPTConfig(**costs.SIZES["gpt2"]), 124_475_904, 768
    head, layer, lora = 333 * 50257 * 11, 4096 * 36 * C, 16 * 12 * 16 * 16 * C
    kept = 12 * layer + head
    again = 12 * 4096 * 4 * C + max(layer, head)        # activations computed again
    judged, entropy = "grpo, KL, reward model", 333 * 50257 * 8
    table = [  # algorithm, lora_r, grad_checkpoint, bytes
        (ONE, 0, False, 18 * P + kept),
        (ONE, 0, True, 18 * P + again),
        (ONE, 16, False, 6 * P + lora + kept),
        ("reward", 0, False, 18 * P + 12 * layer - 4096 * 22 * C),
        (judged, 0, False, 26 * P + kept),
        (judged, 16, False, 10 * P + lora + kept),
        ("ppo", 0, False, 38 * P + kept + entropy),
        ("ppo", 0, True, 38 * P + again + entropy),
        ("ppo", 16, False, 14 * P + lora * 28 // 16 + kept + entropy)]
    assert costs.n_params(config) == P
    for name, r, checkpoint, number in table:
        assert costs.memory(name, config, 4096, 2, r, checkpoint) == number, (name, r, checkpoint)
