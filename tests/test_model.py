"""model.py against slow, obvious oracles; a name gives the silent bug that a test protects against (p03: the third of
tests/README.md).

Most models here are float64 with large random weights, so that "equal" can mean 1e-10 and no mistake hides in noise.
"""
import ast
import contextlib
import copy
import errno
import io
import json
import math
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model as M
import sft
from data import OptionError, Tokenizer, UserError, collate
from model import (GPT, Cache, GPTConfig, Optimizer, Reward, Rollout, Setup, attend, generate, load_model, load_tensors,
                   per_token, reference, response_scores, sample, save_checkpoint, save_tensors, setup, slices, steps,
                   token_logprobs, token_scores, write_model)
from policies import NOTHING, teach

ROOT = Path(M.__file__).parent
PAD, END, V = 0, 10, 11


class Eleven:
    """What the model needs of a tokenizer; a text is the tuple of its ids."""
    pad, end, n_vocab, fingerprint = PAD, END, V, "eleven"

    @staticmethod
    def decode(ids):
        return tuple(ids)

    @staticmethod
    def huggingface():
        return {}


class Twelve(Eleven):
    fingerprint = "twelve"


TOK = Eleven()

# ------------------------------------------------------------------------------------------------ models, oracles


def gpt(seed=0, dtype=torch.float64, std=.3, tok=TOK, **size):
    """A tiny GPT in eval mode whose every parameter is N(0, std), biases and norms included."""
    config = GPTConfig(**dict(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=16) | size)
    model = GPT(config, tok).to(dtype).eval()
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64).mul(std).to(dtype)
    model.transformer.wte.weight.data[config.vocab_size:] = 0
    return model


def tiny(**options):
    """A small reward model, in fp32."""
    return gpt(dtype=torch.float32, n_layer=1, n_embd=8, **dict(n_scores=1) | options)


def weights(model):
    return {name: p.detach().double().numpy() for name, p in model.state_dict().items()}


def bits(model):
    """{name: the bytes of the weight}."""
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


def gpt2(model, ids):
    """GPT-2 written from its paper, one head and one query at a time: ids -> states (T, C), logits (T, V), float64."""
    w, H = weights(model), model.config.n_head
    D = model.config.n_embd // H

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = np.array([w["transformer.wte.weight"][t] + w["transformer.wpe.weight"][i] for i, t in enumerate(ids)])
    for layer in range(model.config.n_layer):
        at = f"transformer.h.{layer}."
        q, k, v = np.split(linear(norm(x, at + "ln_1"), at + "attn.c_attn"), 3, axis=1)
        heads = np.zeros_like(x)
        for h in range(H):
            of = slice(h * D, (h + 1) * D)
            for i in range(len(ids)):                       # a query looks at itself and at what came before
                score = np.array([q[i, of] @ k[j, of] for j in range(i + 1)]) / math.sqrt(D)
                p = np.exp(score - score.max())
                heads[i, of] = (p / p.sum()) @ v[:i + 1, of]
        x = x + linear(heads, at + "attn.c_proj")
        u = linear(norm(x, at + "ln_2"), at + "mlp.c_fc")
        u = .5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + .044715 * u ** 3)))
        x = x + linear(u, at + "mlp.c_proj")
    x = norm(x, "transformer.ln_f")
    return x, x @ w["transformer.wte.weight"][:model.config.vocab_size].T


def alone(model, ids):
    """The same of one row by itself in a plain forward, whatever the model is made of: what batches, padding, packing,
    the cache and the sampler must not change. That it is GPT-2's forward is another test's matter."""
    with torch.no_grad():
        whole = copy.deepcopy(model).double().eval()
        states = whole(torch.tensor([ids]))
        return states[0].numpy(), whole.logits(states)[0].numpy()


def log_softmax(x):
    return x - x.max() - math.log(sum(math.exp(v - x.max()) for v in x))


def oracle_logps(model, ids, temperature=1.0):
    """[log π(ids[t+1] | ids[:t+1])] and the entropies of those distributions, of the row by itself."""
    logps = [log_softmax(row / temperature) for row in alone(model, ids)[1]]
    entropies = [-sum(math.exp(v) * v for v in logp) for logp in logps[:-1]]
    return [float(logp[t]) for logp, t in zip(logps, ids[1:])], entropies


def oracle_sum(model, rows, temperature=1.0):
    """[Σ log π of the targets] of each row by itself."""
    sums = []
    for ids, target in rows:
        logp, _ = oracle_logps(model, ids, temperature)
        sums.append(sum(x for x, counts in zip(logp, target[1:]) if counts))
    return sums


def random_rows(lengths, seed=0, low=1):
    """[(ids, target)]: random ids of these (prompt, response) lengths, with the target on the response."""
    rng = random.Random(seed)
    return [([rng.randrange(low, V) for _ in range(p + r)], [0] * p + [1] * r) for p, r in lengths]


ROWS = random_rows([(1, 3), (4, 9), (9, 1), (2, 14), (6, 4)])
BATCH = collate(ROWS, TOK)  # tokens (5, 16), mask (5, 15)


def gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(model.parameters(), grads)])


def close(a, b, tol=1e-10):
    a, b = (torch.as_tensor(x.detach() if isinstance(x, torch.Tensor) else np.array(x)).double() for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)   # never compare by broadcasting
    assert torch.allclose(a, b, rtol=tol, atol=tol), float((a - b).abs().max())


def refused(match, call, *args, kind=UserError, **options):
    """The call is a UserError of one line that says this."""
    with pytest.raises(kind, match=match) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_forward_equals_a_gpt2_written_in_numpy(length):
    # a post-norm, an exact GELU, a missing bias or an untied head would all train, and match no published weights
    model, ids = gpt(), [(3 * i) % V for i in range(length)]
    hidden = model(torch.tensor([ids]))
    states, logits = gpt2(model, ids)
    close(hidden[0], states)
    close(model.logits(hidden)[0], logits)


def test_a_new_model_starts_at_ln_v_with_small_residuals_and_a_head_of_zeros():
    # too large, it starts with confident nonsense; without 1/sqrt(2 n_layer) the residual stream grows with depth
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=100, n_layer=8, n_embd=64))
    tokens = torch.randint(0, 100, (8, 16))
    assert abs(-token_logprobs(model, tokens, torch.ones(8, 15)).mean() - math.log(100)) < .05
    close(model.transformer.h[3].mlp.c_proj.weight.std(), .02 / 4, .001)
    close(model.transformer.h[3].mlp.c_fc.weight.std(), .02, .002)
    assert not GPT(GPTConfig(n_scores=2)).score.weight.any()                # a random head is a random baseline


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, .03)])
@pytest.mark.parametrize("T, masked", [(1, False), (1, True), (6, False), (6, True)])
def test_attend_equals_torchs_kernel(T, masked, dtype, tol):
    # the plain operators of the CPU branch must be the same function, forward and backward
    torch.manual_seed(0)
    S = 9 if masked else T
    q, k, v = (torch.randn(2, 2, n, 8, dtype=dtype, requires_grad=True) for n in (T, S, S))
    mask = torch.rand(2, 1, T, S) < .5 if masked else None
    if masked:
        mask[..., 0] = True     # no query without a key
    bias = mask if masked else torch.ones(T, S, dtype=torch.bool).tril()
    ours, theirs = attend(q, k, v, mask), F.scaled_dot_product_attention(q.double(), k.double(), v.double(), bias)
    close(ours, theirs, tol)
    weight = torch.randn(ours.shape)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                    torch.autograd.grad((theirs * weight).sum(), (q, k, v))):
        close(a, b, 3 * tol)


@pytest.mark.parametrize("pads", [0, 1, 5])
def test_p02_padding_changes_no_logit_of_a_real_token(pads):
    # left padding, or positions counted from the padded end, would shift every position
    model, rng = gpt(), random.Random(pads)
    for ids, _ in ROWS:
        ids = ids[:10]
        padded = model.logits(model(torch.tensor([ids + [rng.randrange(V) for _ in range(pads)]])))
        close(padded[0, :len(ids)], alone(model, ids)[1])


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5], [1, 7, 1], [8, 1]], ids=str)
def test_p03_kv_cache_equals_the_full_forward_at_every_step_for_any_prefill_chunking(chunks):
    # an uncausal prefill, or a query that sees only key 0, leaves the training loss untouched and ruins sampling
    model, lengths = gpt(), [2, 9, 5]
    rows = [ids[:n + 5] for (ids, _), n in zip(random_rows([(16, 0)] * 3), lengths)]
    cache = Cache(model, 3, 9)
    cache.k, cache.v = cache.k + 1e9, cache.v + 1e9         # a slot not yet written must stay hidden
    prompt, hidden, at = torch.tensor([r[:n] + [PAD] * (9 - n) for r, n in zip(rows, lengths)]), [], 0
    for size in chunks:
        hidden.append(model(prompt[:, at:at + size], torch.arange(at, at + size), cache=cache))
        at += size
    for row, n, h in zip(rows, lengths, torch.cat(hidden, 1)):
        close(h[:n], alone(model, row[:n])[0])
    for i in range(5):                                      # every row decodes at a position of its own
        cache.reserve(10 + i)
        now = torch.tensor([row[n + i] for row, n in zip(rows, lengths)])
        hidden = model(now[:, None], torch.tensor(lengths)[:, None] + i, cache=cache)
        for row, n, h in zip(rows, lengths, hidden):
            close(h[0], alone(model, row[:n + i + 1])[0][-1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(dropout, packed):
    # recomputing with other dropout masks, or without the mask of packed rows, would give the gradient of nothing
    model, grads = gpt(block_size=32, dropout=dropout).train(), []
    tokens, mask, pos, see = sft.pack(ROWS, TOK, 32) if packed else (*BATCH, None, None)
    for model.grad_checkpoint in (False, True):
        torch.manual_seed(0)
        grads.append(gradients(model, token_logprobs(model, tokens, mask, pos=pos, see=see).sum()))
    close(*grads, 1e-9)


# ------------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("temperature", [1.0, .6, 2.0])
def test_p10_token_logprobs_and_entropy_equal_a_slow_loop_at_any_temperature(temperature):
    # a log-prob at another temperature than the sampler's makes every importance ratio wrong
    model = gpt()
    logp, entropy = token_logprobs(model, *BATCH, temperature, entropy=True)
    for b, (ids, target) in enumerate(ROWS):
        for got, want in zip((logp, entropy), oracle_logps(model, ids, temperature)):
            want = [x if m else 0.0 for x, m in zip(want, target[1:])]
            close(got[b], want + [0.0] * (15 - len(want)))


@pytest.mark.parametrize("temperature", [1.0, .6])
@pytest.mark.parametrize("chunk", [1, 3, 8192])
def test_gradients_of_logp_and_entropy_equal_autograd_of_the_plain_formula_chunked_or_not(chunk, temperature):
    # the chunks are recomputed in the backward pass: a bug there shows in the gradient only
    model, (tokens, mask) = gpt(), BATCH
    c = torch.randn(2, *mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def plain():
        logps = (model.logits(model(tokens[:, :-1])) / temperature).log_softmax(-1)
        return logps.gather(-1, tokens[:, 1:, None])[..., 0] * mask, -(logps.exp() * logps).sum(-1) * mask

    both = token_logprobs(model, tokens, mask, temperature, entropy=True, chunk=chunk)
    close(gradients(model, (c * torch.stack(both)).sum()), gradients(model, (c * torch.stack(plain())).sum()))
    only = token_logprobs(model, tokens, mask, temperature, chunk=chunk)
    close(only, both[0])
    close(gradients(model, (c[0] * only).sum()), gradients(model, (c[0] * plain()[0]).sum()))


def test_p04_p06_gradient_lands_exactly_on_the_predecessors_of_response_tokens():
    # off by one, the first response token is never trained; prompts trained on barely move the loss
    model, kept = gpt(), []
    model.register_forward_hook(lambda module, args, out: kept.append(out))
    loss = token_logprobs(model, *BATCH).sum()
    hit = torch.autograd.grad(loss, kept[0])[0].abs().sum(-1) > 0
    for b, (ids, target) in enumerate(ROWS):
        assert [t + 1 for t in hit[b].nonzero()[:, 0].tolist()] == [t for t, m in enumerate(target) if m]


@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4]], [[0, 3], [1, 2, 4]], [[4, 2, 0, 1, 3]]], ids=str)
def test_p07_summed_gradients_are_equal_under_every_micro_split(split):
    # a mean inside would weigh short rows more
    model = gpt()
    parts = [gradients(model, token_logprobs(model, *collate([ROWS[i] for i in part], TOK)).sum()) for part in split]
    close(sum(parts), gradients(model, token_logprobs(model, *BATCH).sum()))


@pytest.mark.parametrize("extra", [0, 16, 32])
def test_p22_extra_padding_changes_neither_log_probs_nor_their_sum(extra):
    # a length taken from the padded tensor makes beta depend on the batch
    model, (tokens, mask) = gpt(block_size=48), BATCH
    logp = token_logprobs(model, F.pad(tokens, (0, extra), value=PAD), F.pad(mask, (0, extra)))
    assert logp.shape == (5, 15 + extra)
    close(logp.sum(1), oracle_sum(model, ROWS))


def test_p25_fully_masked_batch_gives_zero_and_a_finite_gradient():
    # a mean over no token is NaN
    model, (tokens, mask) = gpt(), BATCH
    for chunk in (2, 8192):
        logp, entropy = token_logprobs(model, tokens, mask * 0, entropy=True, chunk=chunk)
        assert not logp.any() and not entropy.any()
        assert not gradients(model, (logp + entropy).sum()).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("function", [lambda *args: torch.stack(token_logprobs(*args, entropy=True)), token_scores],
                         ids=["logp, entropy", "scores"])
def test_p35_poisoned_states_outside_the_mask_change_neither_value_nor_gradient(function, poison):
    # 0 * NaN is NaN: a mask must select, not multiply
    model, (tokens, mask) = gpt(n_scores=1), BATCH
    clean = function(model, tokens, mask)
    want = gradients(model, clean.square().sum())
    model.register_forward_hook(lambda m, i, out: torch.where(mask.bool()[..., None], out, poison))
    got = function(model, tokens, mask)
    assert torch.equal(got, clean)
    close(gradients(model, got.square().sum()), want)


def test_p40_log_softmax_is_fp32_under_bf16_autocast():
    # in bf16 a log-prob of -3.02 is -3.03: every ratio would carry 1% of noise
    model, critic = gpt(dtype=torch.float32), gpt(dtype=torch.float32, n_scores=1)
    tokens, mask = BATCH
    model.precision = critic.precision = "bf16"
    logp, entropy = token_logprobs(model, tokens, mask, .7, entropy=True)
    logits = model.logits(model(tokens[:, :-1]))
    assert logits.dtype == torch.bfloat16
    assert token_scores(critic, tokens, mask).dtype == torch.float32
    want = (logits.double() / .7).log_softmax(-1)
    assert logp.dtype == entropy.dtype == torch.float32
    close(logp, want.gather(-1, tokens[:, 1:, None])[..., 0] * mask, 2e-6)
    close(entropy, -(want.exp() * want).sum(-1) * mask, 5e-6)


def test_p40_fp32_master_weights_move_under_bf16_autocast_at_a_tiny_learning_rate():
    # bf16 weights round an update of 1e-6 away: 1.9% of them moved
    model = gpt(dtype=torch.float32).train()
    model.precision = "bf16"
    before, opt = copy.deepcopy(model.state_dict()), Optimizer(model, 1e-6, 20, weight_decay=0)
    for step in range(10):
        (-token_logprobs(model, *BATCH).sum()).backward()
        opt.step(step)
    inside = [name for name in before if ".h." in name and "weight" in name]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    moved = torch.cat([(model.state_dict()[name] != before[name]).flatten() for name in inside])
    assert moved.float().mean() > .99


def test_p52_packed_rows_are_the_sum_of_separate_rows_values_and_gradients():
    # a sequence that sees its neighbour, or the neighbour's positions, learns from it
    model, rows = gpt(block_size=32), random_rows([(1, 3), (4, 9), (9, 1), (2, 14), (6, 4), (0, 5)])
    rows[-1][1][0] = 0                      # the first token of a row is no target
    tokens, mask, pos, see = sft.pack(rows, TOK, 32)
    logp = token_logprobs(model, tokens, mask, pos=pos, see=see)
    assert (tokens != PAD).sum(1).max() > 20                    # something was packed
    want = sorted(x for ids, target in rows for x, m in zip(oracle_logps(model, ids)[0], target[1:]) if m)
    close(logp[mask.bool()].sort().values, want)
    apart = sum(gradients(model, token_logprobs(model, *collate([row], TOK)).sum()) for row in rows)
    close(gradients(model, logp.sum()), apart)


def test_the_head_runs_on_response_positions_only_in_chunks_and_again_in_the_backward_pass(monkeypatch):
    # a (B, T, V) tensor is what runs out of memory first; in one chunk, or without a gradient, nothing runs twice
    model, seen, total = gpt(), [], int(BATCH[1].sum())
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or GPT.logits(model, hidden))
    for chunk, grad, times in ((7, True, 2), (7, False, 1), (total, True, 1)):
        seen.clear()
        with torch.set_grad_enabled(grad):
            out = token_logprobs(model, *BATCH, chunk=chunk)
        if grad:
            out.sum().backward()
        assert max(seen) <= chunk and sum(seen) == times * total


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("extra", [0, 16])
def test_p27_response_score_reads_the_last_response_token_whatever_the_padding_and_batch(extra):
    # scoring the first end token, or a pad, trains a reward model on nothing
    model = gpt(n_scores=3, block_size=32)
    rows = [([3, END, 4, 5, 6, END], [0, 0, 0, 1, 1, 1]),       # end token inside the prompt
            ([END, END, 7, 8, 9], [0, 0, 0, 1, 1]),             # and no end token in the response
            ([1, END], [0, 1]), *ROWS]
    tokens, mask = collate(rows, TOK)
    got = response_scores(model, F.pad(tokens, (0, extra), value=7), F.pad(mask, (0, extra)))
    assert got.shape == (len(rows), 3)
    for row, score in zip(rows, got):
        want = alone(model, row[0])[0][-1] @ weights(model)["score.weight"].T
        close(score, want)
        close(response_scores(model, *collate([row], TOK))[0], want)


def test_p33_token_scores_are_v_of_the_state_before_each_token_and_of_shape_b_t():
    # one step late, V has seen the action; with a last dimension of 1, (N,1)-(N,) broadcasts
    model, (tokens, mask) = gpt(n_scores=2), BATCH
    values = token_scores(model, tokens, mask)
    assert values.shape == mask.shape
    for b, (ids, target) in enumerate(ROWS):
        states = alone(model, ids)[0] @ weights(model)["score.weight"][0]
        close(values[b, :len(ids) - 1], states[:-1] * np.array(target[1:]))
        assert not values[b, len(ids) - 1:].any()


# ------------------------------------------------------------------------------------------------ one draw


def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is sampled from, the slow way: probabilities, zero where a token was cut off."""
    p = np.exp(log_softmax(np.asarray(logits, float) / temperature))
    for limit in ("k", "p"):
        order, keep, total = sorted(range(len(p)), key=lambda i: -p[i]), [], 0.0
        for i in order:
            enough = limit == "k" and top_k and len(keep) == top_k
            if enough or (limit == "p" and top_p < 1 and keep and total >= top_p):
                break
            keep.append(i)
            total += p[i]
        p = np.array([x if i in keep else 0.0 for i, x in enumerate(p)])
        p = p / p.sum()
    return p


CUTS = [dict(), dict(temperature=.5), dict(temperature=1.7), dict(top_k=4), dict(top_p=.7), dict(top_k=50),
        dict(temperature=.6, top_k=6, top_p=.8), dict(top_p=1e-6), dict(top_k=1), dict(top_p=0.0)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_p11_the_measure_of_u_that_maps_to_a_token_is_its_probability_and_the_kept_set_sums_to_1(cut):
    # exact, by a grid over u: truncation whose log-probs are not renormalised is off-policy by log S
    logits, n = torch.tensor([.3, -1, 2, 1.9, -4, 0, .7, 1, -.2, -2, -9], dtype=torch.float64), 20_000
    u = (torch.arange(n, dtype=torch.float64) + .5) / n
    token, logp = sample(logits.expand(n, V), u, **cut)
    p = kept(logits, **cut)
    close(torch.bincount(token, minlength=V) / n, p, 1.01 / n)
    assert p[token.numpy()].min() > 0
    close(logp.exp(), p[token.numpy()])


def test_p11_no_trainer_offers_or_uses_top_k_or_top_p():
    # a policy gradient under truncation differentiates another distribution than it samples from
    for path in set(ROOT.glob("*.py")) - {ROOT / "model.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "target", None) or getattr(node, "arg", None)
            assert getattr(name, "id", name) not in ("top_k", "top_p"), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", ["0", "tiny", "below 1", "1"])
def test_p53_a_token_of_probability_0_is_never_drawn_at_the_extremes_of_u(extreme, dtype):
    # searchsorted from the left picks entry 0 at u = 0, whatever its probability
    info = torch.finfo(dtype)
    u = torch.full((64,), {"0": 0.0, "tiny": info.tiny, "below 1": 1 - info.eps / 2, "1": 1.0}[extreme], dtype=dtype)
    logits = torch.randn(64, 1000, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, :7] = logits[:, -9:] = -torch.inf
    logits[:, 500:520] = -1e4                               # its probability underflows
    logits[0] = -torch.inf
    logits[0, 3] = 0                                        # only one is left
    for cut in (dict(), dict(top_k=5), dict(top_p=.9), dict(temperature=.1)):
        token, logp = sample(logits, u, **cut)
        assert token.min() >= 0 and token.max() < 1000 and logp.isfinite().all() and token[0] == 3
        p = (logits / cut.get("temperature", 1)).softmax(-1).gather(1, token[:, None])
        assert (p > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [dict(), dict(temperature=0), dict(top_k=2, top_p=.9)], ids=str)
def test_a_draw_from_no_distribution_is_a_token_of_log_probability_nan(kind, dtype):
    logits = torch.randn(5, V, dtype=dtype)
    logits[1, 4], logits[3, 0], logits[4] = float("nan"), float("inf"), -float("inf")
    token, logp = sample(logits, torch.rand(5, dtype=dtype), **kind)
    assert ((token >= 0) & (token < V)).all() and logp.isnan().tolist() == [False, True, False, True, True]


# ------------------------------------------------------------------------------------------------ rollouts

RAGGED = [ids for ids, _ in random_rows([(n, 0) for n in range(1, 16)], seed=3)]
ENDLESS = SimpleNamespace(pad=PAD, end=-1)  # no token ends a response


@pytest.fixture(params=[True, False])
def drop(request, monkeypatch):
    """With and without dropping finished rows from the batch, which the sampler does where it looks for them."""
    if not request.param:
        monkeypatch.setitem(M.LOOK, "cpu", 10 ** 9)


def rollout(model, prompts, max_new=16, seed=1, tok=TOK, **options):
    torch.manual_seed(seed)
    model.tok = tok
    return generate(model, prompts, max_new, **options)


def same(a, b):
    """Two rollouts are the same to the bit."""
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("tokens", "mask", "logp", "finished"))


def check_logps(model, roll, tol=1e-10, given=0, **cut):
    """What the sampler stored is what an independent forward of each row alone gives, and 0 elsewhere; given: tokens
    that each response was made to begin with."""
    for ids, logp, start, n in zip(roll.tokens.tolist(), roll.logp, roll.prompt_len, roll.lengths):
        want, logits = np.zeros(len(logp)), alone(model, ids[:n])[1]
        for t in range(start + given, n):
            want[t - 1] = math.log(kept(logits[t - 1], **cut)[ids[t]])
        close(logp, want, tol)


def scripted(prompts, answers, **size):
    """A model that is certain to go on from each of these prompts as told."""
    model = gpt(**size)
    tokens, mask = collate([(p + a, [0] * len(p) + [1] * len(a)) for p, a in zip(prompts, answers)], TOK)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -token_logprobs(model, tokens, mask).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure() < .01
    return model


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_p03_p09_stored_log_probs_equal_an_independent_forward_for_ragged_prompts(dtype, tol, drop):
    # the tensor handed to the trainer is the one that was sampled; a cache bug or re-encoding breaks the equality
    model = gpt(dtype=dtype, std=.2)
    roll = rollout(model, RAGGED, n=2)
    check_logps(model, roll, tol)
    close(token_logprobs(model, roll.tokens, roll.mask), roll.logp, tol)    # as the trainer computes them
    assert roll.finished.any() and not roll.finished.all()
    assert roll.prompt_len == [len(prompt) for prompt in RAGGED for _ in range(2)]
    for i, row in enumerate(roll.tokens.tolist()):
        assert row[:roll.prompt_len[i]] == RAGGED[i // 2]                   # prompt by prompt


@pytest.mark.parametrize("max_new", [1, 2, 5, 40])
def test_stored_log_probs_equal_an_independent_forward_in_a_context_longer_than_the_batch(max_new):
    # the cache is narrower than the context there, and grows in steps
    model = gpt(block_size=48)
    roll = rollout(model, RAGGED[::3], max_new, n=2, tok=ENDLESS)
    check_logps(model, roll)
    assert max(roll.mask.sum(1)) == min(max_new, 40)


@pytest.mark.parametrize("cut", [dict(temperature=.5), dict(temperature=1.5), dict(temperature=.9, top_k=5, top_p=.8)],
                         ids=str)
def test_p10_p11_stored_log_probs_are_those_of_the_distribution_that_was_sampled(cut):
    model = gpt()
    check_logps(model, rollout(model, RAGGED[:6], n=2, max_new=8, **cut), **cut)


def test_rollouts_occur_as_often_as_their_stored_probability_says():
    # a chi-square over all pairs of tokens: rows or steps that share a random number would show
    model, n = gpt(vocab_size=4, std=.2), 6000
    roll, seen = rollout(model, [[1, 2]], 2, n=n, tok=ENDLESS), {}
    for pair, logp in zip(roll.tokens[:, 2:4].tolist(), roll.logp.sum(1).tolist()):
        seen.setdefault(tuple(pair), []).append(math.exp(logp))
    chi2 = 0
    for pair in [(a, b) for a in range(4) for b in range(4)]:
        p, times = math.exp(sum(oracle_logps(model, [1, 2, *pair])[0][1:])), seen.get(pair, [])
        close(times, [p] * len(times))
        chi2 += (len(times) - n * p) ** 2 / (n * p)
    assert chi2 < 37.7                                      # 15 degrees of freedom, one in a thousand


def test_greedy_generation_follows_the_argmax_of_the_full_forward():
    model = gpt()
    roll = rollout(model, RAGGED[:8], 6, temperature=0)
    assert not roll.logp.any()
    for ids, start, n in zip(roll.tokens.tolist(), roll.prompt_len, roll.lengths):
        for t in range(start, n):
            assert ids[t] == int(alone(model, ids[:t])[1][-1].argmax())


@pytest.mark.parametrize("n, max_new", [(1, 16), (4, 16), (3, 3)])
def test_dropping_finished_rows_and_sharing_the_prefill_change_no_token(n, max_new, monkeypatch):
    # what a row draws must not depend on who else is still in the batch
    model = gpt(std=.2)
    roll = rollout(model, RAGGED, max_new, n=n)
    apart = rollout(model, [p for p in RAGGED for _ in range(n)], max_new)
    monkeypatch.setitem(M.LOOK, "cpu", 10 ** 9)
    slow = rollout(model, RAGGED, max_new, n=n)
    for other in (slow, apart):
        assert torch.equal(roll.tokens, other.tokens) and torch.equal(roll.finished, other.finished)
        assert torch.equal(roll.mask, other.mask)
        close(roll.logp, other.logp)


def test_p02_p18_neither_the_pad_id_nor_what_stands_behind_the_end_matters():
    # short prompts are prefilled with padding on their right, which their samples must not see
    model = gpt(std=.2)
    a, b = (rollout(model, RAGGED, n=2, tok=SimpleNamespace(pad=pad, end=END)) for pad in (0, 7))
    assert torch.equal(a.mask, b.mask) and torch.equal(a.tokens[:, 1:] * a.mask.long(), b.tokens[:, 1:] * b.mask.long())
    close(a.logp, b.logp)
    beyond = torch.arange(16) >= torch.tensor(a.lengths)[:, None]
    assert (a.tokens[beyond] == PAD).all() and beyond.any()
    junk = torch.where(beyond, torch.randint(0, V, a.tokens.shape), a.tokens)
    close(token_logprobs(model, junk, a.mask), a.logp)


def test_p18_p34_finished_and_truncated_rows_and_nothing_after_the_end(drop):
    # end in the last slot, absent, or only in the prompt; a token after the end would be trained
    plan = [1, 2, 3, 4, 5, 6, 7, 8, END, 1, 2, 3, 4, 5, 6, 7]
    first = [1, 2, 3, 4, 5, END, END, 6, 7]
    rest = [[9] * n for n in (2, 3, 4, 7, 8)] + [[END], [9, 9, END]] + [[9] * n for n in (12, 14)]
    prompts = [[token] + more for token, more in zip(first, rest)]
    model = scripted(prompts, [plan[len(p):] for p in prompts])
    want = [5, 5, 4, 1, 5, 5, 5, 3, 1]                      # tokens of each response at max_new 5
    ends = [False, True, True, True, False, False, True, False, False]
    roll = rollout(model, prompts, 5)
    assert roll.finished.tolist() == ends and roll.lengths == [len(p) + n for p, n in zip(prompts, want)]
    for i, (p, n) in enumerate(zip(prompts, want)):
        row = p + plan[len(p):len(p) + n]
        assert roll.tokens[i].tolist() == row + [PAD] * (16 - len(row))
        assert roll.mask[i].tolist() == [float(len(p) <= t < len(row)) for t in range(1, 16)]
        assert not roll.logp[i][roll.mask[i] == 0].any()
    texts = [list(text) for text in roll.responses()]
    assert texts == [plan[len(p):len(p) + n - e] for p, n, e in zip(prompts, want, ends)]   # without the end token


def test_p20_p43_sampling_ignores_dropout_and_restores_the_training_mode():
    # noise in the stored log-probs is noise in every ratio; a policy left in eval mode trains without dropout
    model = gpt(dropout=.5).train()
    assert same(rollout(model, RAGGED, n=2), rollout(gpt().eval(), RAGGED, n=2))
    assert all(m.training for m in model.modules())
    model.eval()
    rollout(model, RAGGED[:1])
    assert not any(m.training for m in model.modules())


def test_p40_a_bf16_rollout_stores_fp32_log_probs():
    model = gpt(dtype=torch.float32, std=.2)
    model.precision = "bf16"
    roll = rollout(model, RAGGED, n=2)
    again = token_logprobs(model, roll.tokens, roll.mask)
    assert roll.logp.dtype == torch.float32 and roll.mask.sum() > 50
    assert (roll.logp - again).abs().max() < .1 and (roll.logp - again).abs().mean() < .01


@pytest.mark.parametrize("cut", [dict(), dict(top_k=60), dict(top_p=.999), dict(temperature=0), dict(temperature=5.0)],
                         ids=str)
def test_p47_padded_vocabulary_rows_have_no_mass_and_are_never_sampled(cut):
    # the table has 64 rows for 11 ids; an id beyond them is a KeyError in the tokenizer
    model = gpt()
    hidden = model(torch.tensor(RAGGED[6:7]))
    model.transformer.wte.weight.data[V:] = 100 * hidden[0, -1].sign().detach()     # as likely as can be
    assert model.transformer.wte.weight.shape[0] == 64 and model.logits(hidden).shape[-1] == V
    roll = rollout(model, RAGGED, n=4, **cut)
    assert roll.tokens.max() < V
    if not cut:
        check_logps(model, roll)


def test_p49_a_prompt_may_leave_room_for_one_token():
    # an overflow crashes, or shifts the positions
    model = gpt()
    roll = rollout(model, [[3] * 15, [1, 2]], 50)
    assert roll.lengths[0] == 16 and roll.tokens.shape == (2, 16)
    check_logps(model, roll)
    assert rollout(model, [RAGGED[11]], begin=[1, 2, 3]).mask.sum() == 4    # 12 of 16; 3 given, and room for one


@pytest.mark.parametrize("match, prompts, options", [
    ("16.* of 16", [[3] * 16, [1]], {}), ("17.* of 16", [[3] * 17, [1]], {}), ("empty", [[1], []], {}),
    ("16.* of 16", [[1], [1] * 12], dict(begin=[1, 2, 3, 4])), ("32.* of 16", [[1] * 12], dict(begin=[1] * 20)),
    ("less than one", [[1]], dict(max_new=0)),
    *(("--temperature", [[1]], dict(temperature=t)) for t in (1e-300, 1e-40, 1e-9))], ids=str)
def test_what_cannot_be_sampled_is_refused(match, prompts, options):
    refused(match, rollout, gpt(), prompts, **options)


@pytest.mark.parametrize("temperature", [0, .7, 1.0])
@pytest.mark.parametrize("name, value", [("transformer.h.1.mlp.c_fc.weight", float("nan")),
                                         ("transformer.ln_f.bias", float("inf")), ("transformer.wte.weight", 1e200)])
def test_logits_that_are_no_numbers_stop_the_sampler_and_name_the_weight(name, value, temperature):
    # "index 768 is out of bounds"
    model = gpt()
    model.get_parameter(name).data.flatten()[3] = value
    if value == 1e200:
        model.transformer.wte.weight.data *= 1e200
    for cut in (dict(), dict(top_k=3, top_p=.5), dict(n=2)):
        refused(re.escape(name), rollout, model, [[1, 2], [3]], temperature=temperature, **cut)


@pytest.mark.parametrize("begin, n", [([5], 1), ([7, 3, 9], 1), ([7, 3, 9], 3)])
def test_p09_responses_made_to_begin_alike_store_log_probs_of_the_drawn_part_only(begin, n, drop):
    model, prompts, b = gpt(std=.2), RAGGED[:11], len(begin)
    roll = rollout(model, prompts, 8, n=n, begin=begin)
    assert roll.prompt_len == [len(p) for p in prompts for _ in range(n)] and len(roll.tokens) == 11 * n
    check_logps(model, roll, given=b)
    for i, (ids, mask, start, end) in enumerate(zip(roll.tokens.tolist(), roll.mask, roll.prompt_len, roll.lengths)):
        assert ids[:start + b] == prompts[i // n] + begin and list(roll.responses()[i][:b]) == begin
        assert mask.tolist() == [float(start <= t + 1 < end) for t in range(len(mask))]     # it is part of the response
        assert start + b < end <= min(start + b + 8, 16) and not any(ids[end:])
        assert bool(roll.finished[i]) == (ids[end - 1] == END)
    assert roll.finished.any() and not roll.finished.all()
    longer = rollout(model, [p + begin for p in prompts], 8, n=n)       # as if asked that much more
    assert torch.equal(roll.tokens, longer.tokens) and torch.equal(roll.logp, longer.logp)


def test_the_stream_gets_each_id_up_to_the_end_token_however_seldom_the_sampler_looks(drop):
    # a GPU is asked every eighth step only: up to seven ids drawn after the end were shown
    model, got = scripted([[1, 2]], [[4, 5, END, 6, 7, 6, 7, 6, 7, 6, 7, 6, 7, 6]]), []
    roll = rollout(model, [[1, 2]], max_new=13, temperature=0, stream=got.append)
    assert got == [4, 5, END] and roll.finished.all() and roll.lengths == [5]


def test_rollouts_taken_and_joined_keep_every_row_as_it_was():
    tok = SimpleNamespace(pad=7, end=END, decode=TOK.decode)
    short = rollout(gpt(std=.2), RAGGED[:3], 5, n=2, tok=tok)
    wide = rollout(gpt(std=.2, block_size=48), [[1] * 30, [2] * 3], 9, tok=tok)
    some = short.take([4, 0, 4])
    joined = Rollout.join([some, wide, short.take([]), short])
    order = [4, 0, 4, *range(6)]
    for what in (Rollout.rows, Rollout.responses, lambda roll: roll.finished.tolist(), lambda roll: roll.prompt_len,
                 lambda roll: [row[row != 0].tolist() for row in roll.logp]):
        ours = what(short)
        wanted = [ours[i] for i in order]
        assert what(joined) == wanted[:3] + what(wide) + wanted[3:] and what(some) == wanted[:3]
    beyond = torch.arange(wide.tokens.shape[1]) >= torch.tensor(joined.lengths)[:, None]
    assert joined.tok is tok and (joined.tokens[beyond] == 7).all()
    assert not joined.mask[beyond[:, 1:]].any() and not joined.logp[joined.mask == 0].any()


def test_a_rollout_of_rows_is_what_the_sampler_lays_out():
    drawn = rollout(gpt(std=.2), RAGGED, n=3)
    assert 5 < sum(drawn.finished) < len(drawn.finished)
    drawn = drawn.take([i for i, finished in enumerate(drawn.finished) if finished])
    for (ids, target), tokens, mask, p in zip(drawn.rows(), drawn.tokens.tolist(), drawn.mask, drawn.prompt_len):
        n = p + int(mask.sum())
        assert ids == tokens[:n] and target == [0] * p + [1] * (n - p) and target[1:] == mask[:n - 1].tolist()
    roll, T = Rollout.of(drawn.rows(), TOK), max(drawn.lengths)
    assert roll.prompt_len == drawn.prompt_len and roll.lengths == drawn.lengths
    assert torch.equal(roll.tokens[:, :T], drawn.tokens[:, :T]) and (roll.tokens[:, T:] == PAD).all()
    assert torch.equal(roll.mask[:, :T - 1], drawn.mask[:, :T - 1]) and not roll.mask[:, T - 1:].any()
    assert roll.mask.shape == roll.logp.shape and roll.mask.dtype == drawn.mask.dtype
    assert roll.finished.all() and not roll.logp.any() and roll.responses() == drawn.responses()


def test_slices_and_per_token_cover_every_row_once_and_change_nothing():
    # a row left out of a micro-batch keeps reference log-probs of 0
    model = gpt(block_size=48)
    roll = rollout(model, RAGGED, 30, n=2)
    for budget in (1, 200, 10_000):
        parts = list(slices(roll, budget))
        assert sorted(i for rows, *_ in parts for i in rows) == list(range(30))
        assert all(mask.sum() == roll.mask[rows].sum() for rows, _, mask in parts)
        logp, entropy = per_token(roll, budget, lambda t, m: torch.stack(token_logprobs(model, t, m, entropy=True)))
        close(logp, roll.logp)
        close(entropy, token_logprobs(model, roll.tokens, roll.mask, entropy=True)[1])
    picked = [i for rows, *_ in slices(roll, 100, [7, 3, 20]) for i in rows]
    assert sorted(picked) == [3, 7, 20]


def test_p10_logps_are_at_the_sampling_temperature_and_without_gradient():
    model = gpt()
    roll = rollout(model, [[1, 2], [3, 4, 5, 6], [7]], n=2, temperature=.6)
    for temperature in (.6, 1.7):
        got = M.logps(model, roll, SimpleNamespace(micro_tokens=32, temperature=temperature))
        assert not got.requires_grad and got.shape == roll.mask.shape and not got[roll.mask == 0].any()
        close(got.sum(1), oracle_sum(model, roll.rows(), temperature))


# ------------------------------------------------------------------------------------------------ rewards


def test_reward_is_the_weighted_sum_of_models_and_verifiers(tmp_path, monkeypatch):
    judge, tok = gpt(dtype=torch.float32, n_scores=1), Eleven()
    tok.decode = lambda ids: f"{len(ids)}"
    save_checkpoint(tmp_path / "rm", dict(model=judge), {}, dict(tokenizer=tok.fingerprint))
    roll = rollout(gpt(std=.2), RAGGED, n=2, tok=tok)
    records = [dict(answer=i) for i in range(30)]
    monkeypatch.setitem(data.VERIFIERS, "count", lambda record, text, finished: (
        record["answer"] + 100 * finished + 1000 * int(text)))
    reward = Reward(f"0.5*{tmp_path / 'rm'} + count + -2*count", Setup(tok), 100)
    total, parts = reward(records, roll)
    w = weights(judge)
    scores = [alone(judge, ids[:n])[0][-1] @ w["score.weight"][0]
              for ids, n in zip(roll.tokens.tolist(), roll.lengths)]
    counts = [i + 100 * f + 1000 * (n - p - f) for i, (f, n, p)
              in enumerate(zip(map(int, roll.finished), roll.lengths, roll.prompt_len))]
    assert total.shape == (30,)                             # p33: not (30, 1)
    close(parts[str(tmp_path / "rm")], scores, 1e-4)
    close(parts["count"], counts, 1e-6)
    close(total, [.5 * s - c for s, c in zip(scores, counts)], 1e-3)


WORDS = Tokenizer.load("toy")


def spoken(prompts, texts, finished=True):
    """What a policy sampled when it answered so: a rollout, padded on the right, and the records of its prompts."""
    rows = [(WORDS.prompt(p), WORDS.response(text, finished)) for p, text in zip(prompts, texts)]
    tokens, mask = collate([(p + r, [0] * len(p) + [1] * len(r)) for p, r in rows], WORDS)
    return M.Rollout(tokens, mask, torch.zeros_like(mask), torch.full([len(rows)], finished), [len(p) for p, _ in rows],
                     WORDS)


def told(*texts):
    return [[dict(role="user", content=text)] for text in texts]


def words_judge(folder, seed=3):
    model = gpt(seed, torch.float32, tok=WORDS, vocab_size=WORDS.n_vocab, block_size=64, n_scores=1)
    save_checkpoint(folder, dict(model=model), {}, dict(tokenizer=WORDS.fingerprint))
    return model, str(folder)


def reward_of(spec, budget=64):
    return Reward(spec, Setup(WORDS), budget)


ASKED = told("What is 2 + 3?", "Why?", "Describe the old van for a friend.", "Name two pots.", "Who?")
SAID = ["<think>2 + 3 = 5</think>The answer is 5.", "It is fun.", "<think>a</think>x<think>b</think>\n It is fine. ",
        "<think>so</think>", "<think>on and on"]
SHOWN = ["The answer is 5.", "It is fun.", "It is fine.", "", ""]


def test_reward_of_an_answer_reads_prompt_answer_and_end_token_and_nothing_else(tmp_path, monkeypatch):
    (judge, name), seen, real = words_judge(tmp_path / "rm"), [], M.response_scores
    monkeypatch.setattr(M, "response_scores", lambda model, tokens, mask: (seen.extend(
        (tuple(i for i in row if i != WORDS.pad), tuple(t for t, m in enumerate(marks) if m))
        for row, marks in zip(tokens.tolist(), mask.tolist())), real(model, tokens, mask))[1])
    total, parts = reward_of(f"2*{name}@answer")([dict(prompt=p) for p in ASKED], spoken(ASKED, SAID))
    w, expected, read = weights(judge), [], []
    for p, text in zip(ASKED, SHOWN):
        asked = [WORDS.role["user"]] + WORDS.encode(p[0]["content"]) + [WORDS.role["assistant"]]
        ids = asked + WORDS.encode(text) + [WORDS.end]
        expected.append(gpt2(judge, ids)[0][-1] @ w["score.weight"][0])
        read.append((tuple(ids), tuple(range(len(asked) - 1, len(ids) - 1))))
    assert sorted(seen) == sorted(read)
    assert list(parts) == [f"{name}@answer"] and total.shape == (5,)
    close(parts[f"{name}@answer"], expected, 1e-4)                  # each in its own row
    close(total, [2 * x for x in expected], 1e-4)


def test_thinking_does_not_reach_the_reward_of_an_answer(tmp_path):
    _, name = words_judge(tmp_path / "rm")
    thoughts = [["", "<think>a</think>", "<think>It is superb. Buy one today.</think>"][(i + shift) % 3]
                for shift in range(2) for i in range(5)]
    answers = [f"The {x} is fine." for x in ("van", "red cup", "old big bear", "hat", "top")]
    records = [dict(prompt=p) for p in ASKED]
    (a, plain_a), (b, plain_b) = ([reward_of(spec)(records, spoken(ASKED, [t + x for t, x in zip(some, answers)]))[0]
                                   for spec in (f"{name}@answer", name)] for some in (thoughts[:5], thoughts[5:]))
    assert torch.equal(a, b) and (plain_a != plain_b).all()
    never = spoken(ASKED, answers)                                  # who does not think has the same answer
    close(reward_of(f"{name}@answer")(records, never)[0], a, 1e-5)
    close(reward_of(name)(records, never)[0], a, 1e-5)


@pytest.mark.parametrize("finished", [True, False])
def test_verifiers_of_an_answer_get_the_text_after_the_thinking(finished, monkeypatch):
    calls = []
    monkeypatch.setitem(M.VERIFIERS, "heard", lambda *args: calls.append(args) or len(calls))
    records = [dict(prompt=p, n=i) for i, p in enumerate(ASKED)]
    total, parts = reward_of("heard@answer + 10*heard")(records, spoken(ASKED, SAID, finished))
    assert calls == [(r, text, finished) for texts in (SHOWN, SAID) for r, text in zip(records, texts)]
    close(parts["heard@answer"], [1, 2, 3, 4, 5]), close(parts["heard"], [6, 7, 8, 9, 10])
    close(total, [61, 72, 83, 94, 105])


def test_reward_of_some_families_is_0_for_the_others_and_never_asked_of_them(tmp_path, monkeypatch):
    (judge, name), calls, read, real = words_judge(tmp_path / "rm"), [], [], M.response_scores
    monkeypatch.setitem(M.VERIFIERS, "heard", lambda record, *_: calls.append(record["n"]) or 1 + record["n"])
    monkeypatch.setattr(M, "response_scores", lambda *args: read.append(len(args[1])) or real(*args))
    families = ["arith", "write", "arith", None, "safe"]
    records = [dict(prompt=p, n=i) | (dict(family=f) if f else {}) for i, (p, f) in enumerate(zip(ASKED, families))]
    roll = spoken(ASKED, SAID)
    total, parts = reward_of("heard[arith,safe] + -1*heard[write] + heard[fmt]")(records, roll)
    assert calls == [0, 2, 4, 1] and list(parts) == ["heard[arith,safe]", "heard[write]", "heard[fmt]"]
    assert [p.tolist() for p in parts.values()] == [[1, 0, 3, 0, 5], [0, 2, 0, 0, 0], [0] * 5]
    assert total.tolist() == [1, -2, 3, 0, 5]
    for span in ("", "@answer"):
        whole, _ = reward_of(name + span, 10 ** 6)(records, roll)
        del read[:]
        for mine in ("arith", "arith,write,safe", "fmt"):
            some, _ = reward_of(f"{name}{span}[{mine}]")(records, roll)
            close(some, [float(x) * (f in mine.split(",")) for x, f in zip(whole, families)], 1e-5)
        assert sum(read) == 2 + 4                                   # rows, and of no other family


@pytest.mark.parametrize("ids", [[0x80] * 40, WORDS.encode("It is fine.") * 20])
def test_p49_an_answer_that_fills_the_context_still_has_a_reward(ids, tmp_path):
    # cut off, it is followed by an end token nobody drew; and bytes that are no text come back as three each
    prompt = told("Hi")
    ids = ids[:64 - len(WORDS.prompt(prompt[0]))]
    asked = WORDS.prompt(prompt[0])
    tokens, mask = collate([(asked + ids, [0] * len(asked) + [1] * len(ids))], WORDS)
    roll = M.Rollout(tokens, mask, torch.zeros_like(mask), torch.tensor([False]), [len(asked)], WORDS)
    for span in ("", "@answer"):
        total, _ = reward_of(words_judge(tmp_path / "rm")[1] + span)([dict(prompt=prompt[0])], roll)
        assert total.isfinite().all()


@pytest.mark.parametrize("sums, spec", [(dict(a="{a}"), "{a}"), (dict(a="count + 2*{b}", b="3*{a} + count"), "2*{b}"),
                                        (dict(a="{a}/../a"), "count + {a}")])
def test_a_reward_txt_that_is_a_part_of_itself_is_one_clear_line(sums, spec, tmp_path):
    folders = {name: tmp_path / name for name in "ab"}
    for name, text in sums.items():
        folders[name].mkdir()
        (folders[name] / "reward.txt").write_text(text.format(**folders))
    with pytest.raises(UserError, match="reward.txt.*itself"):
        Reward.expand(spec.format(**folders))


def test_a_reward_txt_may_be_named_twice_and_must_be_text(tmp_path):
    for name, text in dict(a=f"2*{tmp_path / 'b'} + {tmp_path / 'b'}", b="count").items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.txt").write_text(text)
    assert [term.weight for term in Reward.expand(f"3*{tmp_path / 'a'}")] == [6, 3]
    (tmp_path / "b" / "reward.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="reward.txt: cannot be read"):
        Reward.expand(str(tmp_path / "a"))


def test_a_language_model_is_refused_as_a_reward_model(tmp_path):
    save_checkpoint(tmp_path, dict(model=gpt()), {}, dict(tokenizer=TOK.fingerprint))
    with pytest.raises(UserError, match="not a reward model"):
        Reward(str(tmp_path), Setup(TOK), 100)


def test_a_missing_reward_model_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="python reward.py"):
        Reward(str(tmp_path / "none"), Setup(TOK), 100)


# ------------------------------------------------------------------------------------------------ reference


def test_p19_a_reference_shares_no_memory_and_training_does_not_move_it():
    # an aliased reference makes the KL 0 for ever
    model = gpt(dropout=.5, n_scores=1).train()
    ref = reference(model)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in ref.parameters()}
    assert not ref.training and not any(p.requires_grad for p in ref.parameters())
    before = bits(ref)
    assert before == bits(model)                            # p21: of the same precision, or its KL is 1e-7 at step 0
    train_a_little(model, Optimizer(model, 1e-2, 10), 0, 10)
    assert bits(ref) == before
    assert all(before[name] != now for name, now in bits(model).items() if name != "score.weight")


# ------------------------------------------------------------------------------------------------ optimizer

KINDS = pytest.mark.parametrize("kind", ["adamw", "muon"])


def train_a_little(model, opt, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        tokens = torch.randint(0, V, (4, 16))
        (-token_logprobs(model, tokens, torch.ones(4, 15)).mean()).backward()
        opt.step(step)


def test_p44_the_schedule_is_linear_warm_up_then_cosine_to_the_floor():
    # a schedule that counts micro-batches runs k times too fast
    model = gpt()
    opt = Optimizer(model, 1.0, 50, "muon", muon_lr=.3, warmup=10, floor=.2)
    rates = [1, 1] + [.3 * math.sqrt(p.shape[1] / p.shape[0]) for n, p in model.named_parameters()
                      if ".h." in n and p.ndim == 2]
    for step in range(60):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        lr = opt.step(step)["lr"]
        up, down = (step + 1) / 10, .2 + .8 * (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        want = up if step < 10 else down if step < 50 else .2
        close(lr, want)
        assert [g["lr"] for g in opt.groups()] == pytest.approx([want * rate for rate in rates])
    assert Optimizer(gpt(), 1.0, 3).scale(0) == 1.0                                         # no warm-up, no 1/0
    assert all(0 < Optimizer(gpt(), 1.0, 3, warmup=9).scale(s) <= 1 for s in range(12))     # longer than the run


@pytest.mark.parametrize("clip", [0, .5, 1e9])
def test_adamw_with_clipping_to_a_global_norm_and_decay_of_matrices_equals_a_slow_loop(clip):
    # decayed norms and biases shrink towards 0
    model, lr, rng = gpt(n_scores=1), .01, torch.Generator().manual_seed(0)
    opt, moments = Optimizer(model, lr, 100, weight_decay=.5, clip=clip), {}
    for step in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = {name: torch.randn(p.shape, generator=rng, dtype=p.dtype) for name, p in before.items()}
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        total = math.sqrt(sum(float((g ** 2).sum()) for g in grads.values()))
        said = opt.step(step)
        assert said["grad_norm"] == pytest.approx(total)
        share = min(1, clip / total) if clip else 1
        for name, p in model.named_parameters():
            m, v = moments.get(name, (0, 0))
            g = grads[name] * share
            m, v = moments[name] = .9 * m + .1 * g, .95 * v + .05 * g ** 2
            change = m / (1 - .9 ** (step + 1)) / ((v / (1 - .95 ** (step + 1))).sqrt() + 1e-8)
            decay = .5 if p.ndim == 2 else 0
            close(p, before[name] * (1 - said["lr"] * decay) - said["lr"] * change, 1e-5)   # PyTorch's clip adds 1e-6
            assert p.grad is None


def test_muon_orthogonalises_the_step_of_hidden_matrices_and_adamw_takes_the_rest():
    # Muon on the embedding or the head, or AdamW on the hidden ones, is another algorithm
    model = gpt(n_scores=1, n_embd=32)
    before, lr, muon_lr, wd = copy.deepcopy(model.state_dict()), .01, .02, 2.0
    opt, rng = Optimizer(model, lr, 100, "muon", muon_lr, wd, clip=0), torch.Generator().manual_seed(0)
    grads = {n: torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    opt.step(0)
    hidden = 0
    for name, p in model.named_parameters():
        decay = wd if p.ndim == 2 else 0
        step = before[name] * (1 - lr * decay) - p.detach()          # decay is the same for both
        if name.startswith("transformer.h.") and p.ndim == 2:
            hidden += 1
            u, s, vt = torch.linalg.svd(grads[name], full_matrices=False)
            ortho = u.T @ step @ vt.T / (muon_lr * max(1, p.shape[1] / p.shape[0]) ** .5)   # diagonal, about 1
            assert (ortho.diag()[s > .1 * s[0]] > .4).all() and (ortho.diag() < 1.4).all()
            assert (ortho - ortho.diag().diag()).abs().max() < .05
        else:
            close(step, lr * grads[name].sign(), 1e-5)
    assert hidden == 8


@KINDS
def test_an_optimizer_that_forgets_steps_like_a_new_one_to_the_bit(kind):
    # at the same place of the schedule: only the moments go
    runs = {}
    for how in ("forget", "new", "neither"):
        model = gpt(0, torch.float32)
        opt = Optimizer(model, .01, 10, kind, warmup=2)
        train_a_little(model, opt, 0, 4)
        if how == "forget":
            assert len(opt.tensors()) > 30
            opt.forget()
            assert opt.tensors() == {}
        opt = Optimizer(model, .01, 10, kind, warmup=2) if how == "new" else opt
        train_a_little(model, opt, 4, 7)
        runs[how] = bits(model)
    assert runs["forget"] == runs["new"] and not any(runs["new"][name] == runs["neither"][name] for name in runs["new"])


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_gradient_is_an_error_that_changes_nothing(bad, kind):
    # one NaN update ends the run, and the checkpoint after it
    model = gpt()
    opt = Optimizer(model, .01, 10, kind)
    train_a_little(model, opt, 0, 2)
    before, state = bits(model), copy.deepcopy(opt.tensors())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    list(model.parameters())[-1].grad[3] = bad
    refused("step 2.*gradient", opt.step, 2)
    assert bits(model) == before and all(torch.equal(t, opt.tensors()[name]) for name, t in state.items())


# ------------------------------------------------------------------------------------------------ resuming


def run_in(folder, seed=7):
    left = lambda name: folder / name if (folder / name).exists() else None
    return SimpleNamespace(folder=folder, seed=seed, tok=TOK, left=left, progress=range)


def training(folder, kind="adamw", stop=None, peek=False, total=6, save_every=2, init=0, lora_r=0):
    """A run with dropout and random batches -> [(step, loss, running mean, optimizer state)], and its weights."""
    model = gpt(init, torch.float32, dropout=.3)
    if lora_r:
        torch.manual_seed(init)
        model.add_lora(lora_r, 4.0)
    opt, state, log = Optimizer(model, .01, total, kind), dict(mean=0.0), []
    for step in steps(run_in(folder), total, dict(model=model), dict(optimizer=opt), state, save_every):
        if step == stop:
            break
        model.train()
        tokens = torch.randint(0, V, (4, 16))
        loss = -token_logprobs(model, tokens, torch.ones(4, 15)).mean()
        loss.backward()
        opt.step(step)
        state["mean"] = .9 * state["mean"] + .1 * float(loss.detach())
        moments = {name: t.numpy().tobytes() for name, t in opt.tensors().items()}
        log.append((step, float(loss.detach()), state["mean"], moments))
        if peek:                                            # evaluation: draws random numbers, changes the mode
            generate(model.eval(), [[1, 2]], 5)
            torch.rand(step + 1)
    return log, bits(model)


@pytest.mark.parametrize("kind, lora_r", [("adamw", 0), ("muon", 0), ("muon", 2)])
def test_p41_a_run_stopped_at_any_step_resumes_bit_identically(kind, lora_r, tmp_path):
    # weights, optimizer, random numbers and carried state: each forgotten one changes the suffix a little
    rows, end = training(tmp_path / "whole", kind, lora_r=lora_r)
    for stop in range(1, 6):
        folder, saved = tmp_path / f"{stop}", stop // 2 * 2
        folder.mkdir()
        assert training(folder, kind, stop, lora_r=lora_r)[0] == rows[:stop]
        (folder / "checkpoint.part").write_bytes(b"torn")                           # p42: of a kill while it was saved
        init = 1 if saved else 0                                                    # it must not start from its own
        resumed = training(folder, kind, init=init, lora_r=lora_r)
        assert resumed == (rows[saved:], end), stop


def test_a_run_says_where_it_goes_on_on_another_machine(tmp_path, monkeypatch, capsys):
    for name, says in (("a CPU", False), ("a CPU", False), ("another", True)):
        monkeypatch.setattr(M, "cpu_name", lambda: name)
        training(tmp_path, stop=3)
        assert ("begun on a CPU" in capsys.readouterr().err) == says


def test_p43_sampling_and_evaluation_inside_a_step_do_not_change_the_next(tmp_path):
    # a random number drawn by an evaluation would change all that follow
    assert training(tmp_path / "a") == training(tmp_path / "b", peek=True)


def test_every_seed_and_every_step_draws_its_own_numbers():
    draws = []
    for seed, step in ((7, 0), (7, 0), (7, 1), (8, 0), (2 ** 63 - 1, 0), (2 ** 63 - 1, 10 ** 6), (2 ** 62, 0)):
        M.seed_step(seed, step)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] and len(set(draws)) == 6


def test_a_finished_run_yields_no_step_and_its_folder_is_a_model(tmp_path):
    _, end = training(tmp_path)
    assert training(tmp_path, init=3)[0] == []
    loaded = load_model(tmp_path, Setup(TOK))
    assert bits(loaded) == end and not loaded.training


# ------------------------------------------------------------------------------------------------ checkpoints


def tamper(path, key, change):
    tensors, meta = load_tensors(path)
    tensor = tensors.pop(key)
    if change in ("rename", "add"):
        tensors[key + "x"] = tensor
    if change == "add":
        tensors[key] = tensor
    if change == "reshape":
        tensors[key] = tensor.new_zeros(*tensor.shape, 2)
    save_tensors(path, tensors, meta)


CHANGES = pytest.mark.parametrize("change", ["drop", "rename", "reshape", "add"])


@CHANGES
@pytest.mark.parametrize("key", ["optimizer of optimizer/0.0.exp_avg", "optimizer of optimizer/0.3.step",
                                 "optimizer of optimizer/1.2.momentum_buffer", "model/transformer.wpe.weight",
                                 "model/transformer.h.0.attn.c_attn.lora_A"])
def test_p46_a_resumed_run_names_a_missing_misshapen_or_surplus_tensor(key, change, tmp_path):
    # silently fresh moments are an incomplete resume (p41)
    lora_r = 2 * ("lora" in key)
    training(tmp_path, "muon", stop=3, lora_r=lora_r)
    tamper(tmp_path / "checkpoint.safetensors", key, change)
    refused(re.escape(key.partition("/")[2]), training, tmp_path, "muon", lora_r=lora_r)


@pytest.mark.parametrize("facts", [dict(step=None), dict(step=-1), dict(step="2"), dict(step=2.0), dict(step=[]),
                                   dict(state=None), dict(state=[]), dict(state=3)], ids=str)
def test_p46_a_resumed_run_is_told_its_step_and_its_state(facts, tmp_path):
    training(tmp_path, stop=3)
    path = tmp_path / "checkpoint.safetensors"
    tensors, meta = load_tensors(path)
    save_tensors(path, tensors, meta | facts)
    refused("at which step", training, tmp_path)


@pytest.fixture
def saved(tmp_path):
    """The folder of an unfinished run."""
    save_checkpoint(tmp_path, dict(model=tiny()), {}, dict(tokenizer=TOK.fingerprint, step=1))
    return tmp_path


@CHANGES
@pytest.mark.parametrize("key", ["transformer.wte.weight", "transformer.h.0.attn.c_attn.bias", "score.weight"])
def test_p46_a_dropped_renamed_reshaped_or_surplus_tensor_is_named(saved, key, change):
    # lenient loading keeps a random head
    tamper(saved / "checkpoint.safetensors", f"model/{key}", change)
    refused(re.escape(key), load_model, saved, Setup(TOK))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias", "score.weight"])
def test_a_weight_that_is_no_number_is_named_when_it_is_saved_and_when_it_is_read(key, value, saved):
    path, model = saved / "checkpoint.safetensors", tiny()
    before = path.read_bytes()
    model.get_parameter(key).data.flatten()[-1] = value
    refused(f"{key}.*{value}", save_checkpoint, saved, dict(model=model), {}, {})
    assert path.read_bytes() == before
    tensors, meta = load_tensors(path)
    tensors["model/" + key].flatten()[-1] = value
    save_tensors(path, tensors, meta)
    refused(f"{saved}.*{key}.*{value}", load_model, saved, Setup(TOK))


@pytest.mark.parametrize("match, options", [
    ("another tokenizer.*eleven.*twelve", dict(like=Setup(Twelve()))), ("language model is needed", dict(n_scores=0))])
def test_p46_a_model_of_another_kind_is_refused(match, options, saved):
    refused(match, load_model, saved, **(dict(like=Setup(TOK)) | options))
    refused("make it with: python sft.py", load_model, saved / "none", maker="python sft.py")


@pytest.mark.parametrize("had, asked", [(0, 2), (1, 1), (1, 3), (3, 1), (3, 2)])
def test_of_several_scores_the_first_ones_are_kept_and_what_is_missing_starts_at_zero(had, asked, tmp_path):
    ours, kept_ones = tiny(n_scores=had), min(had, asked)
    save_checkpoint(tmp_path, dict(model=ours), {}, dict(tokenizer=TOK.fingerprint))
    got = load_model(tmp_path, Setup(TOK), n_scores=asked)
    assert got.config.n_scores == asked and got.score.weight.shape == (asked, 8)
    assert not had or torch.equal(got.score.weight[:kept_ones], ours.score.weight[:kept_ones])
    assert not got.score.weight[kept_ones:].any()
    assert all(now == bits(got)[name] for name, now in bits(ours).items() if name != "score.weight")


@pytest.mark.parametrize("size", [10 ** 9, 10 ** 12, 10 ** 40])
@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "vocab_size", "n_scores", "block_size"])
def test_p46_sizes_that_a_checkpoint_only_promises_take_no_memory(saved, name, size):
    # a thousand million layers: 2.3 GB, then the system ended the process
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    path, before = saved / "checkpoint.safetensors", peak()
    path.write_bytes(set_in("config", name, size)(path.read_bytes()))
    for n_scores in (None, 3):
        refused("^(?!.*damaged)", load_model, saved, Setup(TOK), n_scores=n_scores)
    assert peak() < before + 2 ** 28


# ------------------------------------------------------------------------------------------------ saving


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(*_):
    raise KeyboardInterrupt


def kills(go, folder, monkeypatch, calls=("replace",), how=killed):
    """go(out) in one new folder after the other, ended at its first, second, ... call of these functions of os, until
    it gets through: (out, whether it was ended)."""
    ended, count = True, 0
    while ended:
        out, left = folder / f"out{count}", [count]

        def until(real):
            def call(*args, **kwargs):
                left[0] -= 1
                return real(*args, **kwargs) if left[0] >= 0 else how()
            return call
        with monkeypatch.context() as patch:
            for call in calls:
                patch.setattr(os, call, until(getattr(os, call)))
            try:
                go(out)
                ended = False
            except (KeyboardInterrupt, UserError):
                count += 1
        yield out, ended


def test_p42_a_write_that_fails_half_way_leaves_the_old_checkpoint(saved):
    # the real thing: the system refuses to write past 3000 bytes
    old, (soft, hard) = (saved / "checkpoint.safetensors").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        refused("not saved", save_checkpoint, saved, dict(model=gpt()), {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (saved / "checkpoint.safetensors").read_bytes() == old and not list(saved.glob("*.part"))


def test_p42_the_new_file_is_complete_and_on_the_disk_before_it_takes_the_name(saved, monkeypatch):
    # a rename that overtakes the data leaves an empty file after a power cut
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("replace", os.stat(a).st_size)) or replace(a, b))
    save_checkpoint(saved, dict(model=gpt()), {}, {})
    size = (saved / "checkpoint.safetensors").stat().st_size
    assert calls == [("fsync", size), ("replace", size)]


def test_tensors_of_every_type_and_shape_come_back_bit_for_bit(tmp_path):
    tensors = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in M.DTYPES.values()}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5), "t": torch.randn(4, 3).T, "é/✓": torch.ones(1)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"a": [1, {"b": None}], "ü": "✓"})
    got, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == {"a": [1, {"b": None}], "ü": "✓"} and list(got) == list(tensors)
    assert all(got[k].dtype == t.dtype and torch.equal(got[k], t) for k, t in tensors.items())


# ------------------------------------------------------------------------------------------------ files, good and hostile


def header_of(raw):
    """(header, data) of a safetensors file: 8 bytes of little-endian length, a JSON header, then the tensors."""
    size, = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def with_header(header, data):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def signed(header, data):
    """The file of a header and data, with a checksum that fits: only the sense can be wrong."""
    facts = header["__metadata__"]
    if isinstance(facts, dict):
        facts.pop("crc32", None)
        facts["crc32"] = f"{zlib.crc32(data, zlib.crc32(json.dumps(header).encode())):08x}"
    return with_header(header, data)


def edited(edit):
    """A checkpoint whose header was changed: edit(header, its first tensor's entry, plainalign's own facts)."""
    def make(raw):
        header, data = header_of(raw)
        facts = header["__metadata__"]
        meta = json.loads(facts["plainalign"])
        edit(header, header["model/transformer.wte.weight"], meta)
        if header["__metadata__"] is facts:
            facts["plainalign"] = json.dumps(meta)
        return signed(header, data)
    return make


def set_in(which, key, value):
    def edit(header, first, meta):
        dict(header=header, first=first, meta=meta, config=meta["config"])[which][key] = value
    return edited(edit)


def test_the_file_is_safetensors_by_its_specification(saved):
    header, content = header_of((saved / "checkpoint.safetensors").read_bytes())
    assert all(isinstance(text, str) for text in header.pop("__metadata__").values())
    at = 0
    for info in header.values():                                            # without a gap, by offset
        assert info["data_offsets"] == [at, at := at + 4 * math.prod(info["shape"])]
    size = (saved / "checkpoint.safetensors").stat().st_size
    assert at == len(content) and (size - at) % 8 == 0
    for name, want in tiny().state_dict().items():
        info = header[f"model/{name}"]
        start, stop = info["data_offsets"]
        close(np.frombuffer(content[start:stop], "<f4").reshape(info["shape"]), want, 0)


FIRST = "model/transformer.wte.weight"
MALFORMED = {
    "no byte": lambda raw: b"", "three bytes": lambda raw: raw[:3], "only a length": lambda raw: raw[:8],
    "half a header": lambda raw: raw[:300], "half the data": lambda raw: raw[:-100],
    "a byte less": lambda raw: raw[:-1], "a byte more": lambda raw: raw + b"\0", "huge length": lambda raw: b"\xff" * 8 + raw[8:],
    "zero length": lambda raw: b"\0" * 8 + raw[8:], "text": lambda raw: b"hello, this is no checkpoint at all",
    "no utf-8": lambda raw: with_header(b'{"\xff": 1}', b""), "no object": lambda raw: with_header([1], b""),
    "a number": lambda raw: with_header(3, b""), "null": lambda raw: with_header(None, b""),
    "empty object": lambda raw: with_header({}, b""), "deep": lambda raw: with_header(b"[" * 100_000, b""),
    "deep object": lambda raw: with_header(b'{"a":' * 100_000, b""), "NaN": lambda raw: with_header(b'{"a": NaN}', b"")}
MALFORMED |= {f"{which} {key} {value}": set_in(which, key, value) for which, key, values in [
    ("header", "__metadata__", [[], 3, {}, {"plainalign": "{"}, {"plainalign": "[1]"}, {"plainalign": 5}]),
    ("header", FIRST, [None]),
    ("first", "data_offsets", [[2048, 0], [-2048, 0], [10 ** 9, 10 ** 9 + 2048], [64, 2112], [0.0, 2048.0],
                               ["0", "2048"], [0, 1, 2], None]),
    ("first", "dtype", ["F8", [], "F64", "BOOL"]),
    ("first", "shape", [[-64, -8], [-1, 8], "64", [64.0, 8.0], [[64], 8], [512]]),
    ("meta", "config", [{}, [], None]),
    ("config", "n_wings", [2]), ("config", "n_head", [0, -2]), ("config", "n_layer", ["1", -1]),
    ("config", "dropout", [9.0]), ("config", "n_embd", [0, -8, 18]), ("config", "vocab_size", [-1]),
    ("config", "block_size", [None, 20]), ("config", "n_scores", ["1", -1])] for value in values}
MALFORMED["huge and empty"] = edited(lambda header, first, meta: first.update(shape=[0, 2 ** 70], data_offsets=[0, 0]))


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED)
def test_p46_a_malformed_checkpoint_is_refused(saved, make):
    path = saved / "checkpoint.safetensors"
    raw = path.read_bytes()
    assert edited(lambda *_: None)(raw) == with_header(*header_of(raw))     # the valid twin
    path.write_bytes(make(raw))
    refused(str(saved), load_model, saved, Setup(TOK))


@pytest.mark.parametrize("where", ["length", "header", "data"])
def test_p46_a_damaged_checkpoint_is_refused_or_as_it_was(saved, where):
    # flipped, other, missing or repeated bytes: without a checksum, every flip in the data loaded
    def read():
        tensors, meta = load_tensors(path)
        return meta, {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}

    path, rng, harmless = saved / "checkpoint.safetensors", random.Random(3), 0
    raw, whole = path.read_bytes(), read()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    first, last = dict(length=(0, 8), header=(8, header), data=(header, len(raw)))[where]
    for trial in range(120):
        at, few = rng.randrange(first, last), rng.randrange(1, 40)
        flipped, other = bytes([raw[at] ^ 1 << rng.randrange(8)]), bytes([rng.choice(b'0123456789-[]{},:"\\ ')])
        middle = (flipped, other, b"", raw[at:at + few])[trial % 4]
        path.write_bytes(raw[:at] + middle + raw[at + (trial % 4 < 3):])
        with contextlib.suppress(UserError):
            assert read() == whole, "another checkpoint loaded"
            harmless += 1
    assert harmless == 0 or where == "header" and harmless < 15


@pytest.mark.parametrize("change", [
    lambda header, facts: header["model/score.weight"].update(dtype="I32"), lambda header, facts: facts.pop("crc32"),
    lambda header, facts: facts.update(crc32="00000000"), lambda header, facts: facts.update(crc32=None),
    lambda header, facts: facts.update(plainalign=facts["plainalign"] + " ")])
def test_a_relabelled_dtype_a_missing_checksum_and_another_files_checksum_are_refused(change, saved):
    path = saved / "checkpoint.safetensors"
    header, content = header_of(path.read_bytes())
    change(header, header["__metadata__"])
    path.write_bytes(with_header(header, content))
    refused("damaged", load_tensors, path)


@pytest.mark.parametrize("facts", [{}, {"format": "pt"}, None])
def test_files_of_others_need_no_checksum(facts, saved):
    path = saved / "checkpoint.safetensors"
    header, content = header_of(path.read_bytes())
    del header["__metadata__"]
    path.write_bytes(with_header(header | ({} if facts is None else {"__metadata__": facts}), content))
    assert len(load_tensors(path)[0]) == len(header)


def executes(source):
    """The places of a source text that unpickle, or run text as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [name.name for name in node.names] + [getattr(node, "module", "") or ""]
        banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        if any(name.split(".")[0] in banned for name in names):
            found.append(node.lineno)
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (call in ("eval", "exec", "torch.save", "yaml.load", "pd.read_pickle")
                    or call == "torch.load" and options.get("weights_only") != "True"
                    or call in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False"):
                found.append(node.lineno)
    return found


def test_p45_nothing_in_the_house_can_unpickle():
    # torch.load of a stranger's checkpoint runs the stranger's code
    bad = ["import pickle", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
           "torch.save(x, f)", "np.load(f, allow_pickle=True)", "def f():\n import joblib"]
    assert all(executes(source) for source in bad) and not executes("torch.load(f, weights_only=True); model.eval()")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]:
        assert not executes(path.read_text(encoding="utf-8")), path.name


class Bomb:
    """Unpickled, it makes a folder."""
    def __init__(self, folder):
        self.target = folder / "exploded"

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(6))
def test_p45_a_malicious_pickle_under_the_checkpoints_name_is_refused_and_not_run(tmp_path, protocol):
    bomb, path = Bomb(tmp_path), tmp_path / "checkpoint.safetensors"
    path.write_bytes(pickle.dumps(bomb, protocol))
    refused("not a checkpoint", load_model, tmp_path, Setup(TOK))
    refused("not a checkpoint", training, tmp_path)
    torch.save({"model": bomb}, path)
    refused("not a checkpoint", load_model, tmp_path, Setup(TOK))
    assert not bomb.target.exists()


# ------------------------------------------------------------------------------------------------ device, chat


def set_up(device="auto", dtype="auto"):
    return setup(SimpleNamespace(device=device, dtype=dtype, threads=0), TOK)


def matmuls(model):
    """The type of what a model multiplies."""
    return model.logits(model(torch.tensor([[1, 2]]))).dtype


def test_setup_chooses_the_precision_of_the_matmuls(saved, capsys):
    # a model that is made like another, new or loaded, multiplies as that one does
    for dtype, want in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        like = set_up("cpu", dtype)
        assert f"{M.cpu_name()}, 1 thread, {dtype}" in capsys.readouterr().out
        model = M.new_model(tiny(n_scores=0).config, like)
        for made in (model, load_model(saved, like), load_model(saved, model)):
            assert matmuls(made) == want and made.tok is like.tok is TOK and made.device == like.device


@pytest.mark.parametrize("gpus, name, want", [
    (0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cuda:1", "cuda:1"), (0, "cuda", "no CUDA"),
    (2, "cuda:2", "cuda:2.*2 CUDA devices"), *((2, name, "--device") for name in (
        "foo", "", "cuda:x", "cuda:-1", "cuda:99999999999999999999", "meta", "mps", "cpu:7"))])
def test_a_device_is_found_or_one_clear_line(gpus, name, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if re.fullmatch(r"cpu|cuda(:1)?", want):
        assert M.find_device(name) == torch.device(want)
    else:
        refused(want, M.find_device, name, kind=OptionError if want == "--device" else UserError)


@pytest.mark.parametrize("amx, avx512, told, want", [
    (True, True, "", "bf16"), (False, True, "", "bf16"), (True, None, "", "bf16"), (False, False, "", "fp32"),
    (None, None, "", "fp32"), (True, True, "AVX512_CORE", "fp32"), (False, True, "avx2", "fp32"),
    (False, True, "AVX512_CORE_BF16", "bf16"), (True, True, "ALL", "bf16")])
def test_auto_is_bf16_where_a_cpu_may_use_instructions_for_it(amx, avx512, told, want, monkeypatch):
    # with avx512_bf16 alone it took fp32
    for name, has in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
        if has is None:                                                     # a PyTorch that has no such question
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", told)
    cpu = torch.device("cpu")
    assert [M.precision(cpu, dtype) for dtype in ("auto", "fp32", "bf16")] == [want, "fp32", "bf16"]


@pytest.mark.parametrize("emulated", [True, False])
def test_auto_is_fp32_on_a_gpu_that_only_emulates_bf16(emulated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or not emulated)
    assert M.precision(torch.device("cuda")) == ("fp32" if emulated else "bf16")


def test_chat_answers_every_piped_line_with_whole_characters(tmp_path):
    # printed byte by byte, é is two question marks
    tok, said = Tokenizer.load("toy"), "é€😀 ok"
    model = scripted([tok.prompt([dict(role="user", content="hi")])], [tok.response(said)], vocab_size=tok.n_vocab,
                     block_size=64, n_embd=32, n_layer=1)
    save_checkpoint(tmp_path, dict(model=model.float()), {}, dict(tokenizer=tok.fingerprint))
    done = subprocess.run([sys.executable, "model.py", str(tmp_path)], input="hi\n\nhi\n".encode(), cwd=ROOT,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"}, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"{said}\n{said}\n"


# ------------------------------------------------------------------------------------------------ LoRA


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, gpt(dtype=torch.float32))
    return folder


def adapt(folder, r=3, alpha=5.0, stir=.2, n_scores=None, vector_lr=0.0):
    """The model of a folder, with adapters; with stir, as training might have left them."""
    model = load_model(folder, Setup(TOK), n_scores=n_scores)
    model.add_lora(r, alpha, vector_lr)
    rng = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad and stir:
            p.data += stir * torch.randn(p.shape, generator=rng)
    return model


def logps(model):
    with torch.no_grad():
        return token_logprobs(model, *BATCH)


def is_vector(name):
    """Whether it is a bias or the gain of a norm."""
    return name.endswith(".bias") or re.search(r"ln_\w+\.weight", name) is not None


def test_lora_changes_nothing_at_first_and_then_adds_alpha_over_r_times_a_b(base):
    # B = 0 at the start; later every linear layer of the blocks is W + (α/r) A B
    plain, model = gpt(dtype=torch.float32), adapt(base)
    assert torch.equal(logps(adapt(base, stir=0)), logps(plain))
    assert len(model.loras()) == 8 and (logps(model) - logps(plain)).abs().max() > .1
    for name, p in model.named_parameters():
        if name.endswith("lora_A"):
            layer = name.removesuffix(".lora_A")
            plain.get_submodule(layer).weight.data += 5 / 3 * p @ model.get_parameter(layer + ".lora_B")
    close(logps(model).sum(1), oracle_sum(plain, ROWS), 1e-4)


def test_lora_merged_equals_unmerged_and_is_a_plain_model(base):
    model = adapt(base)
    before, roll = logps(model), rollout(model, [[1, 2], [3]])
    merged = model.merge_lora()
    check_logps(merged, roll, 1e-4)                                         # through the cache too
    assert (logps(merged) - before).abs().max() < 1e-5
    assert merged.state_dict().keys() == gpt().state_dict().keys() and not merged.loras()
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("n_scores, kind", [(0, "adamw"), (0, "muon"), (1, "adamw")])
def test_lora_only_adapters_and_a_score_head_have_gradients_and_are_optimised(n_scores, kind, base):
    model = adapt(base, n_scores=n_scores)
    before, opt = bits(model), Optimizer(model, .01, 10, kind)
    out = response_scores(model, *BATCH) if n_scores else token_logprobs(model, *BATCH)
    out.square().sum().backward()
    trained = {n for n in before if n.endswith(("lora_A", "lora_B")) or n.startswith("score.")}
    assert len(trained) == 16 + n_scores
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    opt.step(0)
    assert {n for n, now in bits(model).items() if now != before[n]} == trained
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for name, t in opt.tensors().items() if not name.endswith("step")) <= 2 * held


@pytest.mark.parametrize("vector_lr", [0.0, .01])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_p19_lora_reference_is_the_base_to_the_bit_and_shares_all_that_is_frozen(precision, vector_lr, base):
    plain, model = gpt(dtype=torch.float32), adapt(base, vector_lr=vector_lr, stir=0)
    plain.precision = model.precision = precision
    ref = reference(model)
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    own = [name for name, p in ref.named_parameters() if p.data_ptr() not in frozen]
    assert all(map(is_vector, own)) and bool(own) == bool(vector_lr)
    assert not ref.loras() and not any(p.requires_grad for p in ref.parameters()) and model.loras()
    train_a_little(model, Optimizer(model, .05, 10), 0, 3)
    assert torch.equal(logps(ref), logps(plain)) and (logps(model) - logps(plain)).abs().max() > .1


def test_p46_an_unfinished_run_with_adapters_is_one_clear_line(base, tmp_path):
    save_checkpoint(tmp_path, dict(model=adapt(base)), {}, dict(tokenizer=TOK.fingerprint))
    refused("unfinished run that trains adapters", load_model, tmp_path, Setup(TOK))


def test_lora_bias_trains_biases_and_norms_too_at_their_own_rate(base):
    model = adapt(base, vector_lr=.5, stir=0)
    before, opt = copy.deepcopy(model.state_dict()), Optimizer(model, .01, 10, weight_decay=0)
    train_a_little(model, opt, 0, 1)
    moved = {name: float((t - before[name]).abs().max()) for name, t in model.state_dict().items()}
    for name, distance in moved.items():
        rate = .5 if is_vector(name) else .01 if name.endswith("lora_B") else 0      # A has no gradient while B is 0
        assert distance == pytest.approx(rate, rel=.05), name


def test_lora_options_reach_the_adapter_its_optimizer_and_its_seed(base):
    def prepared(**options):
        torch.rand(5)                                                     # whatever was drawn before
        return load_model(base, Setup(TOK)).prepare(sft.Config(lora_r=2, **options))

    opt = Optimizer(prepared(lora_bias=.02), .001, 10, warmup=4)
    for step in (0, 3, 9):                                                # the schedule is both rates'
        opt.at(step)
        matrices, vectors = opt.groups()
        assert vectors["lr"] == pytest.approx(20 * matrices["lr"]) == pytest.approx(.02 * opt.scale(step))
    first, again, other = (bits(prepared(seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


# ------------------------------------------------------------------------------------------------ runs


def tune(out, init, **options):
    """sft.train on a few toy texts; its log."""
    options = dict(steps=5, device="cpu", dtype="fp32", families="write", packing=0, batch=4, warmup=2,
                   save_every=2) | options
    sft.train(sft.Config(out=str(out), init=str(init), **options))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory):
    folder, tok = tmp_path_factory.mktemp("toy"), Tokenizer.load("toy")
    write_model(folder, gpt(dtype=torch.float32, std=.1, tok=tok, vocab_size=tok.n_vocab, block_size=128, n_layer=1))
    return folder


@pytest.mark.parametrize("lora_r, how, calls", [(0, killed, ["replace", "unlink"]), (2, killed, ["replace", "unlink"]),
                                                (0, no_space, ["replace"]), (0, killed, ["fsync"])])
def test_p42_a_run_ended_at_any_file_goes_on_to_the_same_end(lora_r, how, calls, toy_base, tmp_path, monkeypatch):
    # also between its last checkpoint, model.safetensors, config.json, summary.json and the end of the checkpoint
    def go(out):
        return tune(out, toy_base, steps=3, lora_r=lora_r)

    def names(out):
        return {path.name for path in out.iterdir()} - {"checkpoint.part"}

    whole, found = go(tmp_path / "whole"), []
    want = bits(load_model(tmp_path / "whole"))
    for out, ended in kills(go, tmp_path, monkeypatch, calls, how):
        try:
            found.append(bits(load_model(out)) == want)
        except UserError as error:
            assert "no checkpoint there" in str(error) or lora_r and "run its command again" in str(error)
            found.append(None)
        if ended:
            assert go(out) == whole
        assert bits(load_model(out)) == want and names(out) == names(tmp_path / "whole")
    assert found[0] is None and found[-1] and len(found) > 8
    assert lora_r or (found[3] is False and all(found[4:]))                 # step 2, then the end


def test_lora_of_a_new_model_is_refused(tmp_path):
    # frozen random weights under an adapter would learn nothing
    refused("--lora_r", tune, tmp_path / "a", "new", n_layer=1, n_embd=16, n_head=2, block_size=128, lora_r=2)
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------------------ terms of a reward

BRIEF = "Be brief."
LETTERS = ("It says no to harm.", "It says no without need.", "It helps with harm.", "It helps.")


def talker(folder, seed=4, **size):
    """A tiny language model of the toy vocabulary in a run folder."""
    model = gpt(seed, torch.float32, **dict(tok=WORDS, vocab_size=WORDS.n_vocab, block_size=128) | size)
    save_checkpoint(folder, dict(model=model), {}, dict(tokenizer=WORDS.fingerprint))
    return model, str(folder)


def grader(folder, seed=3):
    """A reward model that looks far back: its weights are large."""
    model = gpt(seed, torch.float32, .6, WORDS, vocab_size=WORDS.n_vocab, block_size=64, n_scores=1)
    save_checkpoint(folder, dict(model=model), {}, dict(tokenizer=WORDS.fingerprint))
    return model, str(folder)


def odds(model, ids, choices):
    """P of each of a few one-token texts as the next one, among them alone: a forward of the row by itself."""
    logits = alone(model, ids)[1][-1]
    mass = [math.exp(logits[WORDS.encode(choice)[0]] - logits.max()) for choice in choices]
    return [m / sum(mass) for m in mass]


def turn(text):
    return [WORDS.role["user"]] + WORDS.encode(text) + [WORDS.role["assistant"]]


def score_of(model, ids):
    w = weights(model)
    return float(alone(model, ids)[0][-1] @ w["score.weight"][0])


def rows_of(roll):
    return [ids[:n] for ids, n in zip(roll.tokens.tolist(), roll.lengths)]


RECORDS = [dict(prompt=p, family=f) for p, f in zip(ASKED, ("arith", "write", "safe", "write", "fmt"))]


@pytest.mark.parametrize("budget", [1, 200, 10 ** 6])
def test_rate_is_the_expected_points_of_a_language_model_as_minus_1_to_1(budget, tmp_path):
    model, name = talker(tmp_path / "lm")
    total, parts = reward_of(f"2*{name}@rate", budget)(RECORDS, spoken(ASKED, SAID))
    want = []
    for p, text in zip(ASKED, SAID):                                # the whole answer, the thinking included
        p = odds(model, turn(f"Prompt: {p[0]['content']}\nAnswer: {text}\nHow good is it, from 0 to 5?"), "012345")
        want.append(sum(n * share for n, share in enumerate(p)) / 5 * 2 - 1)
    close(parts[f"{name}@rate"], want, 1e-4), close(total, [2 * x for x in want], 1e-4)
    assert list(parts) == [f"{name}@rate"] and max(want) - min(want) > 1e-3 and all(-1 < x < 1 for x in want)


def test_rate_of_a_certain_grader_is_minus_1_to_1_at_the_ends(tmp_path):
    for n in range(6):                                              # whatever it reads, it is certain of n
        model, _ = talker(tmp_path / "lm", std=.02)
        teach(model, torch.randint(0, WORDS.n_vocab, (2, 64)), NOTHING | {WORDS.encode(str(n))[0]: 1.0})
        save_checkpoint(tmp_path / "lm", dict(model=model), {}, dict(tokenizer=WORDS.fingerprint))
        total, _ = reward_of(f"{tmp_path / 'lm'}@rate")(RECORDS[:2], spoken(ASKED[:2], SAID[:2]))
        close(total, [[-1, -.6, -.2, .2, .6, 1][n]] * 2, 1e-6)


def test_classes_of_the_rubric_are_probabilities_that_add_up_to_1(tmp_path):
    model, name = talker(tmp_path / "lm")
    total, parts = reward_of(" + ".join(f"{name}@{x}" for x in "ABCD"))(RECORDS, spoken(ASKED, SAID))
    close(total, [1.0] * 5, 1e-5)
    rubric = "".join(f"{letter}: {text}\n" for letter, text in zip("ABCD", LETTERS))
    want = [odds(model, turn(f"Prompt: {p[0]['content']}\nAnswer: {text}\n{rubric}Which is it?"), "ABCD")
            for p, text in zip(ASKED, SAID)]
    for k, letter in enumerate("ABCD"):
        close(parts[f"{name}@{letter}"], [p[k] for p in want], 1e-4)
        alone, _ = reward_of(f"{name}@{letter}", 10 ** 6)(RECORDS, spoken(ASKED, SAID))
        close(alone, [p[k] for p in want], 1e-4)


def test_a_judge_answers_anew_about_the_prompts_of_other_families(tmp_path):
    """As many of them as of the first, so that the old answers would fit."""
    _, name = talker(tmp_path / "lm")
    total = lambda spec: reward_of(spec)(RECORDS, spoken(ASKED, SAID))[0]
    first, second = f"{name}@A[write]", f"{name}@B[safe,fmt]"
    close(total(f"{first} + {second}"), total(first) + total(second), 1e-6)


def test_a_judge_is_asked_about_the_last_turn_of_the_prompt(tmp_path):
    model, name = talker(tmp_path / "lm")
    long = [dict(role="system", content="S"), dict(role="user", content="Hi"), dict(role="assistant", content="Ho"),
            *ASKED[1]]
    total, _ = reward_of(f"{name}@rate")([dict(prompt=long)], spoken([long], ["It is fun."]))
    alone, _ = reward_of(f"{name}@rate")([dict(prompt=ASKED[1])], spoken([ASKED[1]], ["It is fun."]))
    close(total, alone, 1e-6)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("budget", [1, 64, 10 ** 6])
def test_a_conditional_reward_model_reads_its_system_message_before_the_very_ids(finished, budget, tmp_path):
    (judge, name), roll = grader(tmp_path / "rm"), spoken(ASKED, SAID, finished)
    total, parts = reward_of(f"{name}{{{BRIEF}}} + 10*{name}", budget)(RECORDS, roll)
    before = [WORDS.role["system"]] + WORDS.encode(BRIEF)
    want, text = [score_of(judge, before + ids) for ids in rows_of(roll)], f"{name}{{{BRIEF}}}"
    plain = [score_of(judge, ids) for ids in rows_of(roll)]
    assert list(parts) == [text, name]
    close(parts[text], want, 1e-4), close(parts[name], plain, 1e-4)
    close(total, [a + 10 * b for a, b in zip(want, plain)], 1e-3)
    assert all(abs(a - b) > 1e-3 for a, b in zip(want, plain))


def test_a_conditional_reward_model_may_read_the_answer_only_and_of_some_families(tmp_path):
    (judge, name), roll = grader(tmp_path / "rm"), spoken(ASKED, SAID)
    total, parts = reward_of(f"-1*{name}@answer{{{BRIEF}}}[write,safe]")(RECORDS, roll)
    before = [WORDS.role["system"]] + WORDS.encode(BRIEF)
    want = [score_of(judge, before + turn(p[0]["content"]) + WORDS.encode(text) + [WORDS.end]) * (1 <= i <= 3)
            for i, (p, text) in enumerate(zip(ASKED, SHOWN))]
    close(parts[f"{name}@answer{{{BRIEF}}}[write,safe]"], want, 1e-4), close(total, [-x for x in want], 1e-4)


def test_ids_that_no_text_decodes_to_reach_a_conditional_reward_model_as_they_are(tmp_path):
    judge, name = grader(tmp_path / "rm")
    ids = turn("Hi") + [0x80, 0xff, WORDS.encode("e")[0]] + [WORDS.end]     # read as text, each byte would be three
    tokens, mask = collate([(ids, [0] * (len(ids) - 4) + [1] * 4)], WORDS)
    roll = M.Rollout(tokens, mask, torch.zeros_like(mask), torch.tensor([True]), [len(ids) - 4], WORDS)
    total, _ = reward_of(f"{name}{{{BRIEF}}}")([dict(prompt=told("Hi")[0])], roll)
    close(total, [score_of(judge, [WORDS.role["system"]] + WORDS.encode(BRIEF) + ids)], 1e-4)


@pytest.mark.parametrize("tail", ["", "@answer"])
def test_17_beyond_the_context_a_conditional_reward_model_keeps_its_system_message_and_the_role(tail, tmp_path):
    """Cut is the beginning of the question, as in training; the answer is whole."""
    judge, name = grader(tmp_path / "rm")
    block, before = judge.config.block_size, [WORDS.role["system"]] + WORDS.encode(BRIEF)
    asked, text = told("a " * block)[0], "It is fun."
    roll, said = spoken([asked], [text]), WORDS.encode(text) + [WORDS.end]
    left = block - len(before) - len(said) - 2
    ids = WORDS.prompt(asked)
    want = before + ids[:1] + ids[-1 - left:] + said
    assert len(want) == block
    close(reward_of(f"{name}{tail}{{{BRIEF}}}")([dict(prompt=asked)], roll)[0], [score_of(judge, want)], 1e-4)


def test_24_a_reward_refuses_records_that_no_term_can_pay_for(tmp_path, capsys):
    sums, plain = dict(prompt=ASKED[0], answer=5, family="arith"), dict(prompt=ASKED[1])
    for spec, records, word in [("exact", [plain], "answer"), ("words + gsm8k", [plain], "gsm8k"),
                                ("words|help", [sums], "help"), ("exact[write]", [plain], "family"),
                                ("exact[arith]", [sums | dict(answer="x")] + [plain], "answer")]:
        with pytest.raises(UserError, match=f"^(?=.*my.jsonl)(?=.*{word})[^\n]*$"):
            reward_of(spec).check(records, "my.jsonl")
    reward_of("words + exact[arith]").check([sums, plain], "my.jsonl")       # others it need not judge
    reward_of("exact[write]").check([sums], "my.jsonl")                      # a file of other families is no mistake
    assert capsys.readouterr().err == ""
    reward_of("exact").check([sums, plain, plain], "my.jsonl")
    assert "2 of 3" in capsys.readouterr().err
    reward_of("exact").check([sums, plain, plain], "toy")                    # the toy world's families are as they are
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tail", ["", "@answer", "{Be brief.}", "[write]"])
def test_of_several_models_the_least_counts_and_their_spread_is_a_part(tail, tmp_path):
    roll, models = spoken(ASKED, SAID), []
    for i in range(3):                                              # alike on average: each is the least of some
        model, name = grader(tmp_path / str(i), seed=i)
        M.shift_score(model, -float(np.mean([score_of(model, ids) for ids in rows_of(roll)])))
        save_checkpoint(name, dict(model=model), {}, dict(tokenizer=WORDS.fingerprint))
        models.append(name)
    joined = "|".join(models)
    apart = [reward_of(m + tail)(RECORDS, roll)[0].tolist() for m in models]
    for weight, cost, worst in ((2, False, min), (-2, False, max), (2, True, max), (-2, True, min)):
        total, parts = Reward(f"{weight}*{joined}{tail}", Setup(WORDS), 64, cost)(RECORDS, roll)
        assert list(parts) == [joined + tail, f"{joined}{tail} spread"]
        least, spread = [worst(x) for x in zip(*apart)], [np.std(x, ddof=1) for x in zip(*apart)]
        close(parts[joined + tail], least, 1e-4), close(parts[f"{joined}{tail} spread"], spread, 1e-4)
        close(total, [weight * x for x in least], 1e-4)             # the spread is told, not paid
    if not tail:
        assert len({x.index(min(x)) for x in zip(*apart)}) > 1      # not always the same one


def test_judges_verifiers_and_reward_models_join_with_a_bar(tmp_path, monkeypatch):
    monkeypatch.setitem(M.VERIFIERS, "half", lambda record, text, finished: .5 * (text == "It is fun."))
    (_, rm), names = grader(tmp_path / "rm"), [talker(tmp_path / str(i), i)[1] for i in range(2)]
    roll, total = spoken(ASKED, SAID), lambda spec: reward_of(spec)(RECORDS, spoken(ASKED, SAID))[0]
    close(total(f"{rm}|half"), torch.minimum(total(rm), total("half")), 1e-6)
    close(total("|".join(names) + "@rate"), torch.minimum(total(f"{names[0]}@rate"), total(f"{names[1]}@rate")), 1e-6)
    close(total("half|words"), [0, .5, 0, 0, 0], 1e-6)


@pytest.mark.parametrize("tail", ["@rate", "@C", "{Be brief.}", "@answer", ""])
def test_every_kind_of_term_is_0_for_other_families_and_not_asked_of_them(tail, tmp_path, monkeypatch):
    _, name = (talker if tail in ("@rate", "@C") else grader)(tmp_path / "m")
    whole, _ = reward_of(name + tail)(RECORDS, spoken(ASKED, SAID))
    some, _ = reward_of(f"{name}{tail}[write,fmt]")(RECORDS, spoken(ASKED, SAID))
    close(some, [float(x) * (r["family"] in ("write", "fmt")) for x, r in zip(whole, RECORDS)], 1e-5)
    assert all(float(x) != 0 for x in whole)
    monkeypatch.setattr(GPT, "forward", lambda *_: pytest.fail("asked"))
    none, parts = reward_of(f"{name}|{name}{tail}[judge]")(RECORDS, spoken(ASKED, SAID))
    assert none.tolist() == [0] * 5 and [p.tolist() for p in parts.values()] == [[0] * 5] * 2


def test_a_folder_with_a_reward_txt_stands_for_the_sum_in_it(tmp_path, monkeypatch):
    for name, value in (("one", 1), ("len", 7)):
        monkeypatch.setitem(M.VERIFIERS, name, lambda record, text, finished, value=value: value * (1 + len(text)))
    (_, rm), (_, lm) = grader(tmp_path / "rm"), talker(tmp_path / "lm")
    (tmp_path / "rules").mkdir()
    inner = f"0.5*one + {rm}{{Be brief. + x}} + -2*{lm}@A[write] + len@answer"
    (tmp_path / "rules" / "reward.txt").write_text(inner + "\n")
    roll = spoken(ASKED, SAID)
    plain, plain_parts = reward_of(inner)(RECORDS, roll)
    words_, _ = reward_of("words")(RECORDS, roll)
    total, parts = reward_of(f"-3*{tmp_path / 'rules'} + 0.25*words")(RECORDS, roll)
    close(total, -3 * plain + .25 * words_, 1e-3)
    assert list(parts) == [*plain_parts, "words"]                   # parts by their own names, and unweighted
    for key, value in plain_parts.items():
        close(parts[key], value, 1e-5)
    assert [(t.weight, t.label) for t in Reward.expand(f"-3*{tmp_path / 'rules'} + 0.25*words")] == [
        (-1.5, "one"), (-3, f"{rm}{{Be brief. + x}}"), (6, f"{lm}@A[write]"), (-3, "len@answer"), (.25, "words")]
    assert [t.label for t in Reward.expand(f"words + {rm}")] == ["words", rm]


def test_a_folder_is_loaded_once_however_many_terms_name_it(tmp_path, monkeypatch):
    (_, rm), (_, lm), loads, real = grader(tmp_path / "rm"), talker(tmp_path / "lm"), [], load_model
    monkeypatch.setattr(M, "load_model", lambda folder, *a, **k: loads.append(folder) or real(folder, *a, **k))
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "reward.txt").write_text(f"{rm}@answer + {lm}@B")
    reward = reward_of(f"{rm} + 2*{rm}{{S}} + {lm}@rate + {lm}@A + {rm}|{rm}[write] + {tmp_path / 'rules'} + words")
    assert loads == [rm, lm] and set(reward.loaded) == {rm, lm}
    assert set(reward.models) == {rm}                               # a judge is no reward model


@pytest.mark.parametrize("spec, match", [
    ("words@rate", "verifier"), ("words@A", "verifier"), ("words{S}", "verifier"), ("words|LM@rate", "verifier"),
    ("RM@A", "reward model, and @A asks a language model"), ("RM@rate", "reward model, and @rate"),
    ("LM", "not a reward model .as a judge: LM@rate"), ("LM@answer", "not a reward model"),
    ("LM{S}", "not a reward model"),
    ("RM|LM", "not a reward model"), ("LM|RM@A", "reward model, and @A"), ("NONE", "neither a run folder"),
    ("NONE@rate", "neither a run folder"), ("RM|NONE", "neither a run folder"), ("words|nothing", "nothing: neither"),
    ("EMPTY", "no checkpoint there; make it with: python reward.py train"), ("RM + LM", "not a reward model"),
    ("BROKEN", "--reward exact [+]: not a sum")])
def test_impossible_terms_are_one_line(spec, match, tmp_path):
    grader(tmp_path / "RM"), talker(tmp_path / "LM")
    for name in ("EMPTY", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "reward.txt").write_text("exact +")
    here = lambda text: "".join(f"{tmp_path}/{word}" if word.isupper() and len(word) > 1 else word
                                for word in re.split(r"(\W)", text))
    with pytest.raises(UserError, match=match.replace("LM@", f"{tmp_path}/LM@")) as error:
        reward_of(here(spec))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ to choose


@pytest.mark.parametrize("budget", [1, 50, 10 ** 6])
def test_choice_logprobs_equal_a_loop_over_single_prompts_whatever_the_batch(budget, tmp_path):
    model, rng = talker(tmp_path / "lm", block_size=48)[0], random.Random(0)
    user, cue = WORDS.role["user"], WORDS.role["assistant"]
    prompts = [[user] + [rng.randrange(WORDS.base) for _ in range(n)] + [cue]
               for n in (0, 45, 1, 14, 15, 46, 31, 3, 3, 47, 78, 1, 198)]
    for choices in (["1", "2"], list("ABCD"), ["3"], list("012345")):
        got = M.choice_logprobs(model, prompts, choices, budget)
        assert got.shape == (13, len(choices)) and not got.requires_grad
        for line, ids in zip(got, prompts):         # beyond the context, the end of a question is kept, and whose it is
            close(line, [math.log(p) for p in odds(model, ids[:1] + ids[1:][-47:], choices)], 1e-4)


@pytest.mark.parametrize("choices", [["10", "1"], ["1", ""], ["1", "no way"]])
def test_choices_of_several_tokens_are_refused(choices, tmp_path):
    refused("one token", M.choice_logprobs, talker(tmp_path / "lm")[0], [[1, 2]], choices, 64)


def test_a_rollout_of_records_gives_their_texts_back_and_scores_as_if_sampled(tmp_path):
    texts = ["It is fun.", "", "<think>2 + 3 = 5</think>The answer is 5.", "\u00e9\u732b <|end|>", "x" * 30]
    records = [dict(prompt=p, responses=[text, "other"]) for p, text in zip(ASKED, texts)]
    roll = M.Rollout.of([row for r in records for row in data.encode(r, WORDS, 10 ** 9)], WORDS)
    assert roll.responses() == [text for t in texts for text in (t, "other")]
    assert roll.finished.tolist() == [True] * 10 and roll.finished.dtype == torch.bool
    assert roll.prompt_len == [len(turn(p[0]["content"])) for p in ASKED for _ in "12"]
    assert roll.lengths == [p + len(WORDS.encode(text)) + 1
                            for p, text in zip(roll.prompt_len, roll.responses())]
    for ids, mask, p, n in zip(roll.tokens.tolist(), roll.mask.tolist(), roll.prompt_len, roll.lengths):
        assert mask == [float(p <= t + 1 < n) for t in range(len(mask))] and ids[n - 1] == WORDS.end
        assert set(ids[n:]) <= {WORDS.pad}
    _, name = grader(tmp_path / "rm")
    first = roll.take(range(0, 10, 2))
    reward = reward_of(f"{name} + words")
    close(reward(RECORDS, first)[0], reward(RECORDS, spoken(ASKED, texts))[0], 1e-5)


# ------------------------------------------------------------------------------------------------ Hugging Face's GPT-2

BYTES = data.Tokenizer("gpt2", data.GPT2_PATTERN, {bytes([b]): b for b in range(256)})  # its end token is id 256
SIZE = dict(vocab_size=257, n_positions=16, n_embd=8, n_layer=2, n_head=2)
THERE = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new", resid_pdrop=.1, **SIZE)


def sines(name, *shape):
    """A weight of the golden model: a sine, about 1 for the gain of a norm."""
    wave = .4 * torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * .7 + len(name)).view(shape)
    return wave + ("ln_" in name and name.endswith("weight"))


def golden_weights():
    """{name: tensor} as transformers lays a GPT-2 out: linear layers are (in, out)."""
    C, shapes = 8, {"wte.weight": (257, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for at in ("h.0.", "h.1."):
        shapes |= {f"{at}{ln}.{part}": (C,) for ln in ("ln_1", "ln_2") for part in ("weight", "bias")}
        for layer, i, o in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C), ("mlp.c_fc", C, 4 * C),
                            ("mlp.c_proj", 4 * C, C)):
            shapes |= {f"{at}{layer}.weight": (i, o), f"{at}{layer}.bias": (o,)}
    return {f"transformer.{name}": sines(f"transformer.{name}", *shape) for name, shape in shapes.items()}


def safetensors(tensors):
    """The bytes of a safetensors file, written from its specification."""
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    head, body = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = bytes(t.contiguous().flatten().view(torch.uint8).tolist())
        head[name] = dict(dtype=kinds[t.dtype], shape=list(t.shape), data_offsets=[len(body), len(body) + len(raw)])
        body += raw
    return with_header(head, body)


def pickled(content, **options):
    """The bytes of a pytorch_model.bin."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def hf(folder, tensors=None, config=THERE, kind="safe"):
    """A folder with a GPT-2 in Hugging Face's layout, in one of the ways in which such are found."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = golden_weights() if tensors is None else tensors
    name, write = ("model.safetensors", safetensors) if "safe" in kind else ("pytorch_model.bin", pickled)
    files = {name: tensors}
    if kind == "old bin":  # a bare trunk, masks in it, torch's first format
        files[name] = {n.removeprefix("transformer."): t for n, t in tensors.items()} | {
            "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4),
            "h.1.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8)}
        write = lambda content: pickled(content, _use_new_zipfile_serialization=False)
    if "shards" in kind:
        names, suffix = sorted(tensors), name.rpartition(".")[2]
        files = {f"a-{i}.{suffix}": {n: tensors[n] for n in names[i::2]} for i in range(2)}
        where = {n: file for file, held in files.items() for n in held}
        (folder / f"{name}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    (folder / "config.json").write_text(json.dumps(config))
    for file, held in files.items():
        (folder / file).write_bytes(write(held))
    return folder


@pytest.mark.parametrize("kind", ["safe", "safe shards", "bin", "bin shards", "old bin"])
def test_gpt2_of_hugging_face_gives_the_logits_of_transformers(kind, tmp_path):
    """The numbers are what transformers 5.23 computes in float64 from the same weights."""
    model = load_model(hf(tmp_path, kind=kind)).double()
    out = model.logits(model(torch.tensor([[5, 250, 17, 99, 256, 0, 1]])))[0].detach()
    want = {(0, 3): -1.987912682831762, (1, 200): .7154162144844138, (3, 0): 2.031249966184696,
            (5, 128): 2.2609788704013063, (6, 256): 2.063353486926129}
    assert out.shape == (7, 257)
    for (t, v), number in want.items():
        assert float(out[t, v]) == pytest.approx(number, abs=2e-6)  # loaded as float32


def test_gpt2_in_half_precision_grows_by_our_special_tokens_and_keeps_its_ids(tmp_path):
    """Id 256, its end of text, is our end token; the others are the mean row; rows that only pad the matrix are 0."""
    tensors = {name: t.half() for name, t in golden_weights().items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    model, there = load_model(hf(tmp_path, tensors), Setup(BYTES)), tensors["transformer.wte.weight"].float()
    wte = model.transformer.wte.weight.detach()
    assert BYTES.end == 256 and model.config.vocab_size == BYTES.n_vocab == 261 and wte.shape == (320, 8)
    assert torch.equal(wte[:257], there) and not wte[261:].any()
    assert (wte[257:261] - there.mean(0)).abs().max() < 1e-7
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, tensors["transformer.h.1.mlp.c_fc.weight"].float())


def test_gpt2_that_says_what_goes_without_saying_loads(tmp_path):
    """Every default spelt out; both kinds of weights, of which safetensors counts; their dropout is not taken over."""
    config = THERE | M.GPT2 | dict(n_inner=32, n_ctx=16)
    folder = hf(tmp_path / "hf", config=config)
    hf(folder, {name: t * 2 for name, t in golden_weights().items()}, config, kind="bin")
    model = load_model(folder, Setup(BYTES))
    assert bits(model) == bits(load_model(hf(tmp_path / "plain"), Setup(BYTES))) and model.config.dropout == 0


def ours(**size):
    """A model of ours, of the golden model's size and with our special tokens."""
    return gpt(3, torch.float32, tok=BYTES, **dict(vocab_size=261, n_embd=8) | size)


@pytest.mark.parametrize("n_scores, lora", [(0, 0), (0, 2), (1, 0), (3, 2)])
def test_gpt2_what_we_write_has_hugging_faces_names_and_shapes_and_loads_as_the_same_model(n_scores, lora, tmp_path):
    model = ours(n_scores=n_scores, dropout=.25)
    if lora:
        model.add_lora(lora, 4.0)
        for layer in model.loras():
            torch.nn.init.normal_(layer.lora_B, std=.2)
    before = bits(model)
    write_model(tmp_path, model)
    assert bits(model) == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    want = {name: t.shape for name, t in golden_weights().items()} | {"transformer.wte.weight": (261, 8)}
    if n_scores:
        want["score.weight"] = (n_scores, 8)
    assert {name: t.shape for name, t in load_tensors(tmp_path / "model.safetensors")[0].items()} == want
    assert header_of((tmp_path / "model.safetensors").read_bytes())[0]["__metadata__"]["format"] == "pt"
    back = load_model(tmp_path, Setup(BYTES))
    assert back.config == model.config
    assert bits(back) == bits(model.merge_lora())


@pytest.mark.parametrize("n_scores", [0, 3])
def test_gpt2_what_we_write_tells_transformers_what_it_is(n_scores, tmp_path):
    write_model(tmp_path, ours(n_scores=n_scores, dropout=.1))
    facts = json.loads((tmp_path / "config.json").read_text())
    labels = facts.pop("id2label", {})
    assert list(labels) == [str(k) for k in range(n_scores)] and len(set(labels.values())) == n_scores
    assert facts == M.GPT2 | SIZE | dict(
        architectures=["GPT2ForSequenceClassification" if n_scores else "GPT2LMHeadModel"], vocab_size=261,
        resid_pdrop=.1, embd_pdrop=.1, attn_pdrop=0.0, dtype="float32",
        bos_token_id=256, eos_token_id=256, pad_token_id=257, plainalign=dict(tokenizer=BYTES.fingerprint))
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert "\u0120" in text and json.loads(text) == BYTES.huggingface()["tokenizer.json"]


@pytest.mark.parametrize("n_scores", [0, 2])
def test_gpt2_what_we_write_is_what_transformers_loads(n_scores, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, ids = ours(n_scores=n_scores), torch.tensor([[5, 250, 17, 99]])
    write_model(tmp_path, model)
    auto = transformers.AutoModelForSequenceClassification if n_scores else transformers.AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    hidden = model(ids)
    close(theirs(ids).logits, model.scores(hidden)[:, -1] if n_scores else model.logits(hidden), 1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id == BYTES.end


def index_of(where):
    return {"model.safetensors.index.json": json.dumps(dict(weight_map=where)).encode()}


# What is wrong with a folder: words of the error, and which config values, weights (None: missing) and files are other.
CONFIGS = [
    ("activation_function is 'relu'", dict(activation_function="relu")),
    ("model_type is 'llama'", dict(model_type="llama")), ("scale_attn_weights", dict(scale_attn_weights=False)),
    ("scale_attn_by_inverse", dict(scale_attn_by_inverse_layer_idx=True)), ("cross", dict(add_cross_attention=True)),
    ("layer_norm_epsilon is 1e-06", dict(layer_norm_epsilon=1e-6)),
    ("tie_word_embeddings is False", dict(tie_word_embeddings=False)), ("n_inner is 7", dict(n_inner=7)),
    ("n_head None", dict(n_head=None)), ("n_head 2", dict(n_head="2")), ("n_embd 0", dict(n_embd=0)),
    ("vocab_size 257.0", dict(vocab_size=257.0)), ("dropout x", dict(plainalign={}, resid_pdrop="x")),
    (r"wpe.weight is \(16, 8\), not \(32, 8\)", dict(n_positions=32)),
    ("wpe.weight is", dict(n_positions=16 * 10 ** 13)),
    (r"wte.weight is missing, or not \(257, 1099511627776\)", dict(n_embd=2 ** 40)),
    (r"wte.weight is missing, or not \(300, 8\)", dict(vocab_size=300)), ("2 layers, .* 3", dict(n_layer=3)),
    ("2 layers, and its config says 1000000000000", dict(n_layer=10 ** 12))]
WEIGHTS = [
    ("h.1.mlp.c_fc.weight is missing", {"h.1.mlp.c_fc.weight": None}), ("wte.weight is missing", {"wte.weight": None}),
    ("h.0.extra does not belong", {"h.0.extra": torch.ones(1)}), ("score", {"score.weight": torch.tensor(1.0)}),
    (r"c_fc.weight is \(8, 4, 8\), not", {"h.1.mlp.c_fc.weight": torch.ones(8, 4, 8)}),
    (r"wte.weight is missing, or not \(257, 8\)", {"wte.weight": torch.ones(257)}),
    (r"wte.weight is missing, or not \(257, 8\)", {"wte.weight": torch.ones(257, 9)}),
    ("lm_head.weight is not the embedding", {"lm_head.weight": torch.ones(257, 8)})]
PICKLES = [
    ("ln_1.bias is missing", {"h.0.ln_1.bias": torch.ones(8, dtype=torch.complex64)}),
    ("not readable", {"ln_f.bias": torch.ones(8, device="meta")}), ("not readable", {"x": 1}),
    ("not readable", {"x": torch.ones(2, 2).to_sparse()}), ("not readable", {"x": Fraction(1, 2)})]
FILES = [
    ("safe", "config.json: no JSON", {"config.json": b'{"model_type":' + b"[" * 200_000}),
    ("safe", "config.json: no JSON", {"config.json": b'{"model_type": '}),
    ("safe", "config.json: no JSON", {"config.json": b"\xff\xfe"}),
    ("safe", "earlier version", {"config.json": b'{"lr": 0.001}'}),
    ("safe", "model.safetensors: .*not where they should be", {"model.safetensors": lambda old: old[:-5]}),
    ("safe", "model.safetensors: not a checkpoint", {"model.safetensors": b""}),
    ("bin", "pytorch_model.bin: not readable", {"pytorch_model.bin": lambda old: old[:-90]}),
    ("old bin", "pytorch_model.bin: not readable", {"pytorch_model.bin": lambda old: old[:-90]}),
    ("bin", "pytorch_model.bin: not readable", {"pytorch_model.bin": b"a page of HTML"}),
    ("bin", "not readable", {"pytorch_model.bin": pickled([torch.ones(1)])}),
    ("bin", "not readable", {"pytorch_model.bin": lambda old: pickled(
        {"x": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])})}),
    ("bin", "does not belong", {"pytorch_model.bin": lambda old: pickled(golden_weights() | {7: torch.ones(1)})}),
    ("safe shards", "a-1.safetensors: .*not where", {"a-1.safetensors": lambda old: old[:-5]}),
    ("safe shards", "no weight_map", {"model.safetensors.index.json": b'{"weight_map": []}'}),
    ("safe shards", "not a JSON object", {"model.safetensors.index.json": b"[1]"}),
    ("safe shards", "missing", index_of({"x": "a-0.safetensors"})), ("safe shards", "missing", index_of({})),
    ("safe shards", "gone.safetensors: no such file", index_of({"x": "gone.safetensors"})),
    ("safe shards", "3: no such file", index_of({"x": 3})),
    ("safe shards", "no file of this folder", index_of({"x": "../other/model.safetensors"}))]
SPOILT = [("safe", match, config, {}, {}) for match, config in CONFIGS] + [
    ("safe", match, {}, tensors, {}) for match, tensors in WEIGHTS] + [
    ("bin", match, {}, tensors, {}) for match, tensors in PICKLES] + [
    (kind, match, {}, {}, files) for kind, match, files in FILES]


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about sparse and nested tensors
@pytest.mark.parametrize("kind, match, config, tensors, files", SPOILT, ids=[case[1] for case in SPOILT])
def test_p46_a_gpt2_that_is_not_one_is_refused_in_one_line(kind, match, config, tensors, files, tmp_path):
    named = {name if name.startswith("lm_head") or name == "score.weight" else f"transformer.{name}": tensor
             for name, tensor in tensors.items()}
    held = {name: tensor for name, tensor in (golden_weights() | named).items() if tensor is not None}
    hf(tmp_path, held, {key: value for key, value in (THERE | config).items() if value is not None}, kind)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content((tmp_path / name).read_bytes()) if callable(content) else content)
    refused(match, load_model, tmp_path, Setup(BYTES))


def test_p46_weights_that_are_missing_and_another_vocabulary_are_named(tmp_path):
    refused("257 tokens, and --tokenizer has 763, which", load_model, hf(tmp_path / "hf"), Setup(WORDS))
    (tmp_path / "hf" / "model.safetensors").unlink()
    refused("neither model.safetensors nor pytorch_model.bin", load_model, tmp_path / "hf")
    write_model(tmp_path / "ours", ours())
    refused("trained with another tokenizer", load_model, tmp_path / "ours", Setup(WORDS))    # its config.json says it
    (tmp_path / "config.json").mkdir()
    refused("config.json: Is a directory", load_model, tmp_path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_p45_a_hostile_file_of_weights_is_refused_and_not_run(name, protocol, tmp_path):
    bomb, folder = Bomb(tmp_path), hf(tmp_path / "hf", kind="bin")
    (folder / name).write_bytes(pickle.dumps(bomb, protocol))
    refused(f"{name}: not", load_model, folder, Setup(BYTES))
    (folder / "model.safetensors").unlink(missing_ok=True)
    hostile = pickled({"transformer.wte.weight": bomb}, pickle_protocol=max(2, protocol))
    (folder / "pytorch_model.bin").write_bytes(hostile)
    refused("pytorch_model.bin: not readable", load_model, folder, Setup(BYTES))
    assert not bomb.target.exists()


@pytest.mark.parametrize("mark", [dict(), None, [], "someone else's"], ids=str)
def test_p46_a_foreign_mark_is_none(mark, tmp_path):
    folder = hf(tmp_path, config=THERE | dict(plainalign=mark))
    assert load_model(folder, Setup(BYTES)).config.vocab_size == BYTES.n_vocab          # it grows like any of others


def test_p42_a_run_does_not_write_over_a_model_of_others(tmp_path):
    before = (hf(tmp_path) / "config.json").read_bytes()
    for overwrite in (False, True):
        config = sft.Config(out=str(tmp_path), init="new", device="cpu", steps=1, overwrite=overwrite)
        refused("holds a model that no run of this version made", sft.train, config)
    assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "run.json").write_text("null")
    config = sft.Config(out=str(tmp_path), init="new", device="cpu", steps=1)
    refused("run.json: not a run's options", sft.train, config)
