"""model.py against slow, obvious oracles; the names give the row of PITFALLS.md that a test protects against (p03 = row 3).

Most models here are float64 with large random weights, so that "equal" can mean 1e-10 and no mistake hides in noise.
"""
import ast
import base64
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
import warnings
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
from data import Tokenizer, UserError, collate, pack
from model import (GPT, Cache, GPTConfig, Optimizer, Reward, Setup, attend, generate, load_model, load_tensors,
                   per_token, reference, response_scores, sample, save_checkpoint, save_tensors, setup, slices, steps,
                   token_logprobs, token_scores)
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

# ------------------------------------------------------------------------------------------------ helpers, oracles


def gpt(seed=0, dtype=torch.float64, std=.3, tok=TOK, **size):
    """A tiny GPT in eval mode whose every parameter is N(0, std), biases and norms included."""
    config = GPTConfig(**dict(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=16) | size)
    model = GPT(config, tok).to(dtype).eval()
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64).mul(std).to(dtype)
    model.transformer.wte.weight.data[config.vocab_size:] = 0
    return model


def weights(model):
    return {name: p.detach().double().numpy() for name, p in model.state_dict().items()}


def gpt2(model, ids):
    """GPT-2 written from its paper, one head and one query at a time: ids -> (states (T, C), logits (T, V)), float64."""
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
    return ([float(lp[t]) for lp, t in zip(logps, ids[1:])],
            [-sum(math.exp(v) * v for v in lp) for lp in logps[:-1]])


def random_rows(lengths, seed=0, low=1):
    """[(ids, target)]: random ids of these (prompt, response) lengths, with the target on the response."""
    rng = random.Random(seed)
    return [([rng.randrange(low, V) for _ in range(p + r)], [0] * p + [1] * r) for p, r in lengths]


ROWS = random_rows([(1, 3), (4, 9), (9, 1), (2, 14), (6, 4)])


def gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(model.parameters(), grads)])


def close(a, b, tol=1e-10):
    a, b = (x.detach().double() if isinstance(x, torch.Tensor) else torch.as_tensor(np.array(x)).double() for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)   # never compare by broadcasting
    assert torch.allclose(a, b, rtol=tol, atol=tol), float((a - b).abs().max())


def rollout(model, prompts, max_new=16, seed=1, tok=TOK, **kw):
    torch.manual_seed(seed)
    model.tok = tok
    return generate(model, prompts, max_new, **kw)


def same(a, b):
    """Two rollouts are the same to the bit."""
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("tokens", "mask", "logp", "finished"))


def check_logps(model, roll, temperature=1.0, tol=1e-10):
    """What the sampler stored is what an independent forward of each row alone gives, and 0 elsewhere."""
    for ids, mask, logp, start, n in zip(roll.tokens.tolist(), roll.mask, roll.logp, roll.prompt_len, roll.lengths):
        want = np.zeros(len(mask))
        want[start - 1:n - 1] = oracle_logps(model, ids[:n], temperature)[0][start - 1:]
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


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_forward_equals_a_gpt2_written_in_numpy(length):
    # a post-norm, an exact GELU, a missing bias or an untied head would all train, and match no published weights
    model, ids = gpt(), [(3 * i) % V for i in range(length)]
    hidden = model(torch.tensor([ids]))
    states, logits = gpt2(model, ids)
    close(hidden[0], states)
    close(model.logits(hidden)[0], logits)


def test_parameter_names_are_hugging_faces():
    # a name of our own, and they could not load what we write
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    want = ["transformer.wte.weight", "transformer.wpe.weight"] + [
        f"transformer.{part}.{kind}" for part in [f"h.{i}.{p}" for i in range(2) for p in parts] + ["ln_f"]
        for kind in ("weight", "bias")]
    assert sorted(gpt().state_dict()) == sorted(want)


def test_initial_loss_is_ln_v():
    # too large an initialisation starts with confident nonsense
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=100, block_size=16, n_layer=4, n_head=2, n_embd=32))
    tokens = torch.randint(0, 100, (8, 16))
    assert abs(-token_logprobs(model, tokens, torch.ones(8, 15)).mean() - math.log(100)) < .05


def test_initial_residual_projections_are_scaled_by_depth():
    # without 1/sqrt(2 n_layer) the residual stream grows with depth
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=64))
    close(model.transformer.h[3].mlp.c_proj.weight.std(), .02 / 4, .001)
    close(model.transformer.h[3].mlp.c_fc.weight.std(), .02, .002)


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


@pytest.mark.parametrize("pads", range(6))
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


def test_cache_select_keeps_and_repeats_rows():
    # a group's samples must continue their own prompt
    cache = Cache(gpt(), 3, 16)
    cache.k += torch.arange(3.)[None, :, None, None, None]
    cache.select(torch.tensor([2, 0, 0]))
    assert cache.k[0, :, 0, 0, 0].tolist() == [2, 0, 0] and cache.v.shape == cache.k.shape


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(dropout, packed):
    # recomputing with other dropout masks, or without the mask of packed rows, would give the gradient of nothing
    model, grads = gpt(block_size=32, dropout=dropout).train(), []
    tokens, mask, pos, see = pack(ROWS, TOK, 32) if packed else (*collate(ROWS, TOK), None, None)
    for model.grad_checkpoint in (False, True):
        torch.manual_seed(0)
        grads.append(gradients(model, token_logprobs(model, tokens, mask, pos=pos, see=see).sum()))
    close(*grads, 1e-9)


@pytest.mark.parametrize("size", [dict(n_embd=18, n_head=4), dict(block_size=20)])
def test_impossible_model_sizes_are_refused_by_name(size):
    with pytest.raises(UserError, match=list(size)[0]):
        GPTConfig(**size)


# ------------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("temperature", [1.0, .6, 2.0])
def test_p10_token_logprobs_and_entropy_equal_a_slow_loop_at_any_temperature(temperature):
    # a log-prob at another temperature than the sampler's makes every importance ratio wrong
    model = gpt()
    tokens, mask = collate(ROWS, TOK)
    logp, entropy = token_logprobs(model, tokens, mask, temperature, entropy=True)
    for b, (ids, target) in enumerate(ROWS):
        for got, want in zip((logp, entropy), oracle_logps(model, ids, temperature)):
            want = [x if m else 0.0 for x, m in zip(want, target[1:])]
            close(got[b], want + [0.0] * (15 - len(want)))


@pytest.mark.parametrize("temperature", [1.0, .6])
@pytest.mark.parametrize("chunk", [1, 3, 8192])
def test_gradients_of_logp_and_entropy_equal_autograd_of_the_plain_formula_chunked_or_not(chunk, temperature):
    # the chunks are recomputed in the backward pass: a bug there shows in the gradient only
    model = gpt()
    tokens, mask = collate(ROWS, TOK)
    c = torch.randn(2, *mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def plain():
        logps = (model(tokens[:, :-1]) @ model.transformer.wte.weight[:V].T / temperature).log_softmax(-1)
        return logps.gather(-1, tokens[:, 1:, None])[..., 0] * mask, -(logps.exp() * logps).sum(-1) * mask
    both = token_logprobs(model, tokens, mask, temperature, entropy=True, chunk=chunk)
    close(gradients(model, sum((c * torch.stack(both)).flatten())),
          gradients(model, sum((c * torch.stack(plain())).flatten())))
    only = token_logprobs(model, tokens, mask, temperature, chunk=chunk)
    close(only, both[0])
    close(gradients(model, (c[0] * only).sum()), gradients(model, (c[0] * plain()[0]).sum()))


def test_gradient_equals_finite_differences():
    # autograd against autograd could share a mistake
    model, direction = gpt(), gpt(seed=5)
    tokens, mask = collate(ROWS[:2], TOK)
    along = float(gradients(model, token_logprobs(model, tokens, mask, .8).sum())
                  @ torch.cat([p.detach().flatten() for p in direction.parameters()]))
    values = []
    for h in (1e-5, -1e-5):
        moved = copy.deepcopy(model)
        for p, d in zip(moved.parameters(), direction.parameters()):
            p.data += h * d.data
        values.append(sum(x for ids, target in ROWS[:2]
                          for x, m in zip(oracle_logps(moved, ids, .8)[0], target[1:]) if m))
    close(along, (values[0] - values[1]) / 2e-5, 1e-6)


def test_p04_gradient_lands_exactly_on_the_predecessors_of_response_tokens():
    # off by one, the first response token is never trained
    model, kept = gpt(), []
    model.register_forward_hook(lambda module, args, out: kept.append(out))
    tokens, mask = collate(ROWS, TOK)
    loss = token_logprobs(model, tokens, mask).sum()
    hit = torch.autograd.grad(loss, kept[0])[0].abs().sum(-1) > 0
    for b, (ids, target) in enumerate(ROWS):
        assert [t + 1 for t in hit[b].nonzero()[:, 0].tolist()] == [t for t, m in enumerate(target) if m]


def test_p06_prompt_labels_do_not_reach_the_loss_but_the_end_token_does():
    # training on prompts barely moves the loss; a masked end token never stops
    model = gpt()
    ids, target = [3, 4, 5, 6, END], [0, 0, 0, 1, 1]
    tokens, mask = collate([(ids, target)], TOK)
    logp = token_logprobs(model, tokens, mask)[0]
    assert [t + 1 for t in logp.nonzero()[:, 0].tolist()] == [3, 4]
    close(logp[2:4], oracle_logps(model, ids)[0][2:])


@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4]], [[0, 3], [1, 2, 4]], [[4, 2, 0, 1, 3]]], ids=str)
def test_p07_summed_gradients_are_equal_under_every_micro_split(split):
    # a mean inside would weigh short rows more
    model = gpt()
    whole = gradients(model, token_logprobs(model, *collate(ROWS, TOK)).sum())
    parts = [gradients(model, token_logprobs(model, *collate([ROWS[i] for i in part], TOK)).sum()) for part in split]
    close(sum(parts), whole)


@pytest.mark.parametrize("extra", [0, 16, 32])
def test_p22_extra_padding_changes_neither_log_probs_nor_their_sum(extra):
    # a length taken from the padded tensor makes beta depend on the batch
    model = gpt(block_size=48)
    tokens, mask = collate(ROWS, TOK)
    want = [sum(x for x, m in zip(oracle_logps(model, ids)[0], target[1:]) if m) for ids, target in ROWS]
    logp = token_logprobs(model, F.pad(tokens, (0, extra), value=PAD), F.pad(mask, (0, extra)))
    assert logp.shape == (5, 15 + extra)
    close(logp.sum(1), want)


def test_p25_fully_masked_batch_gives_zero_and_a_finite_gradient():
    # a mean over no token is NaN
    model = gpt()
    tokens, mask = collate(ROWS, TOK)
    for chunk in (2, 8192):
        logp, entropy = token_logprobs(model, tokens, mask * 0, entropy=True, chunk=chunk)
        assert not logp.any() and not entropy.any()
        assert not gradients(model, (logp + entropy).sum()).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e9])
def test_p35_poisoned_states_outside_the_mask_change_neither_value_nor_gradient(poison):
    # 0 * NaN is NaN: a mask must select, not multiply
    model = gpt()
    tokens, mask = collate(ROWS, TOK)
    clean = token_logprobs(model, tokens, mask, entropy=True)
    want = gradients(model, sum(x.sum() for x in clean))
    hook = model.register_forward_hook(lambda m, i, out: torch.where(mask.bool()[..., None], out, poison))
    got = token_logprobs(model, tokens, mask, entropy=True)
    for a, b in zip(got, clean):
        assert torch.equal(a, b)
    close(gradients(model, sum(x.sum() for x in got)), want)
    hook.remove()


def test_p35_poisoned_padding_changes_neither_value_nor_gradient():
    # what stands on the padding must not exist
    model = gpt()
    rows = [(ids[:8], target[:7] + [1]) for ids, target in ROWS if len(ids) > 8]
    tokens, mask = collate(rows, TOK)
    clean = token_logprobs(model, tokens, mask)
    want = gradients(model, clean.sum())
    tokens[:, 8:] = torch.randint(0, V, tokens[:, 8:].shape)
    poisoned = token_logprobs(model, tokens, mask)
    close(poisoned, clean)
    close(gradients(model, poisoned.sum()), want)


def test_p36_entropy_lies_between_0_and_ln_v_and_is_0_on_padding():
    # log-probs of padding averaged in have been reported as negative entropy for twenty months
    tokens, mask = collate(ROWS, TOK)
    for std, low, high in ((0, 1 - 1e-9, 1 + 1e-9), (.3, .01, 1), (30, -1e-9, .1)):
        _, entropy = token_logprobs(gpt(std=std), tokens, mask, entropy=True)
        share = entropy[mask.bool()] / math.log(V)
        assert share.min() >= -1e-12 and share.max() <= high and share.mean() >= low
        assert not entropy[~mask.bool()].any()


def test_p40_log_softmax_is_fp32_under_bf16_autocast():
    # in bf16 a log-prob of -3.02 is -3.03: every ratio would carry 1% of noise
    model, critic = gpt(dtype=torch.float32), gpt(dtype=torch.float32, n_scores=1)
    tokens, mask = collate(ROWS, TOK)
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
    before, opt = [p.detach().clone() for p in model.parameters()], Optimizer(model, 1e-6, 20, weight_decay=0)
    tokens, mask = collate(ROWS, TOK)
    tokens[:, 1:][mask.bool()] = torch.randint(0, V, (int(mask.sum()),))
    for step in range(10):
        loss = -token_logprobs(model, tokens, mask).sum()
        loss.backward()
        opt.step(step)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    moved = torch.cat([(a != b).flatten() for (n, a), b in zip(model.named_parameters(), before)
                       if ".h." in n and "weight" in n])
    assert moved.float().mean() > .99


def test_p52_packed_rows_are_the_sum_of_separate_rows_values_and_gradients():
    # a sequence that sees its neighbour, or the neighbour's positions, learns from it
    model, rows = gpt(block_size=32), random_rows([(1, 3), (4, 9), (9, 1), (2, 14), (6, 4), (0, 5)])
    rows[-1][1][0] = 0                      # the first token of a row is no target
    tokens, mask, pos, see = pack(rows, TOK, 32)
    logp = token_logprobs(model, tokens, mask, pos=pos, see=see)
    assert (tokens != PAD).sum(1).max() > 20                    # something was packed
    want = sorted(x for ids, target in rows for x, m in zip(oracle_logps(model, ids)[0], target[1:]) if m)
    close(logp[mask.bool()].sort().values, want)
    alone = sum(gradients(model, token_logprobs(model, *collate([row], TOK)).sum()) for row in rows)
    close(gradients(model, logp.sum()), alone)


def test_the_head_runs_on_response_positions_only_and_in_chunks(monkeypatch):
    # a (B, T, V) tensor is what runs out of memory first
    model, seen = gpt(), []
    tokens, mask = collate(ROWS, TOK)
    monkeypatch.setattr(model, "logits", lambda h: seen.append(len(h)) or GPT.logits(model, h))
    token_logprobs(model, tokens, mask, chunk=7)
    assert max(seen) <= 7 and sum(seen) == mask.sum()


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
    w = weights(model)
    assert got.shape == (len(rows), 3)
    for ids, score, one in zip((ids for ids, _ in rows), got, rows):
        want = alone(model, ids)[0][-1] @ w["score.weight"].T
        close(score, want)
        close(response_scores(model, *collate([one], TOK))[0], want)


def test_p33_token_scores_are_v_of_the_state_before_each_token_and_of_shape_b_t():
    # one step late, V has seen the action; with a last dimension of 1, (N,1)-(N,) broadcasts
    model = gpt(n_scores=2)
    tokens, mask = collate(ROWS, TOK)
    values, w = token_scores(model, tokens, mask), weights(model)
    assert values.shape == mask.shape
    for b, (ids, target) in enumerate(ROWS):
        states = alone(model, ids)[0] @ w["score.weight"][0]
        close(values[b, :len(ids) - 1], states[:-1] * np.array(target[1:]))
        assert not values[b, len(ids) - 1:].any()


@pytest.mark.parametrize("poison", [float("nan"), 1e9])
def test_p35_poisoned_states_outside_the_mask_do_not_reach_the_value_loss(poison):
    model = gpt(n_scores=1)
    tokens, mask = collate(ROWS, TOK)
    clean = token_scores(model, tokens, mask)
    want = gradients(model, clean.pow(2).sum())
    model.register_forward_hook(lambda m, i, out: torch.where(mask.bool()[..., None], out, poison))
    got = token_scores(model, tokens, mask)
    close(got, clean)
    close(gradients(model, got.pow(2).sum()), want)


def test_score_head_starts_at_zero():
    # a random head is a random baseline
    assert not gpt(std=0).score and not GPT(GPTConfig(n_scores=2)).score.weight.any()


# ------------------------------------------------------------------------------------------------ one draw


def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is sampled from, the slow way: probabilities, zero where a token was cut off."""
    p = np.exp(log_softmax(np.asarray(logits, float) / temperature))
    for limit in ("k", "p"):
        order, keep, total = sorted(range(len(p)), key=lambda i: -p[i]), [], 0.0
        for i in order:
            if limit == "k" and top_k and len(keep) == top_k or limit == "p" and top_p < 1 and keep and total >= top_p:
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
    drawn = {int(t): float(lp) for t, lp in zip(token, logp)}
    if min(p[p > 0]) > 1 / n:
        assert abs(sum(math.exp(lp) for lp in drawn.values()) - 1) < 1e-10


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


def test_greedy_is_the_argmax_and_draws_nothing_at_random():
    logits = torch.randn(50, V)
    for u in (0.0, .999):
        token, logp = sample(logits, torch.full((50,), u), temperature=0)
        assert token.tolist() == [max(range(V), key=lambda i: row[i]) for row in logits.tolist()]
        assert not logp.any()


# ------------------------------------------------------------------------------------------------ rollouts

RAGGED = [ids for ids, _ in random_rows([(n, 0) for n in range(1, 16)], seed=3)]


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_p03_p09_stored_log_probs_equal_an_independent_forward_for_ragged_prompts(dtype, tol, drop):
    # the tensor handed to the trainer is the one that was sampled; a cache bug or re-encoding breaks the equality
    model = gpt(dtype=dtype, std=.2)
    roll = rollout(model, RAGGED, n=2, drop_finished=drop)
    check_logps(model, roll, tol=tol)
    close(token_logprobs(model, roll.tokens, roll.mask), roll.logp, tol)    # as the trainer computes them
    assert roll.finished.any() and not roll.finished.all() and roll.prompt_len == [n for n in range(1, 16) for _ in "ab"]
    for i, row in enumerate(roll.tokens.tolist()):
        assert row[:roll.prompt_len[i]] == RAGGED[i // 2]                   # prompt-major


@pytest.mark.parametrize("max_new", [1, 2, 5, 40])
def test_stored_log_probs_equal_an_independent_forward_in_a_context_longer_than_the_batch(max_new):
    # the cache is narrower than the context there, and grows in steps of 16
    model = gpt(block_size=48)
    roll = rollout(model, RAGGED[::3], max_new, n=2, tok=SimpleNamespace(pad=PAD, end=-1))     # none ever ends
    check_logps(model, roll)
    assert max(roll.mask.sum(1)) == min(max_new, 40)


@pytest.mark.parametrize("temperature", [.5, 1.5])
def test_p10_stored_log_probs_are_at_the_sampling_temperature(temperature):
    model = gpt()
    check_logps(model, rollout(model, RAGGED[:6], n=2, max_new=8, temperature=temperature), temperature)


def test_p11_stored_log_probs_of_a_truncated_chat_are_those_of_the_kept_set():
    model, cut = gpt(), dict(temperature=.9, top_k=5, top_p=.8)
    roll = rollout(model, RAGGED[:6], max_new=8, **cut)
    for ids, logp, start, n in zip(roll.tokens.tolist(), roll.logp, roll.prompt_len, roll.lengths):
        logits = alone(model, ids[:n])[1]
        close(logp[start - 1:n - 1].exp(), [kept(logits[t - 1], **cut)[ids[t]] for t in range(start, n)])


def test_rollouts_occur_as_often_as_their_stored_probability_says():
    # a chi-square over all pairs of tokens: rows or steps that share a random number would show
    model, n = gpt(vocab_size=4, std=.2), 6000
    roll = rollout(model, [[1, 2]], 2, n=n, tok=SimpleNamespace(pad=0, end=-1))
    seen = {}
    for pair, logp in zip(roll.tokens[:, 2:4].tolist(), roll.logp.sum(1).tolist()):
        seen.setdefault(tuple(pair), []).append(math.exp(logp))
    want = {}
    for a in range(4):
        for b in range(4):
            want[a, b] = math.exp(sum(oracle_logps(model, [1, 2, a, b])[0][1:]))
    chi2 = sum((len(seen.get(k, [])) - n * p) ** 2 / (n * p) for k, p in want.items())
    assert chi2 < 37.7                                      # 15 degrees of freedom, one in a thousand
    for pair, ps in seen.items():
        close(ps, [want[pair]] * len(ps))


def test_greedy_generation_follows_the_argmax_of_the_full_forward():
    model = gpt()
    roll = rollout(model, RAGGED[:8], 6, temperature=0)
    for ids, start, n in zip(roll.tokens.tolist(), roll.prompt_len, roll.lengths):
        for t in range(start, n):
            assert ids[t] == int(alone(model, ids[:t])[1][-1].argmax())


@pytest.mark.parametrize("n, max_new", [(1, 16), (4, 16), (3, 3)])
def test_dropping_finished_rows_and_sharing_the_prefill_change_no_token(n, max_new):
    # what a row draws must not depend on who else is still in the batch
    model = gpt(std=.2)
    roll = rollout(model, RAGGED, max_new, n=n)
    slow = rollout(model, RAGGED, max_new, n=n, drop_finished=False)
    apart = rollout(model, [p for p in RAGGED for _ in range(n)], max_new)
    for other in (slow, apart):
        assert torch.equal(roll.tokens, other.tokens) and torch.equal(roll.finished, other.finished)
        assert torch.equal(roll.mask, other.mask)
        close(roll.logp, other.logp)


def test_a_seed_gives_the_same_rollout_and_other_rows_and_seeds_other_ones():
    model = gpt()
    a, b, c = (rollout(model, [[1, 2]], n=8, seed=s) for s in (1, 1, 2))
    assert same(a, b) and not torch.equal(a.tokens, c.tokens) and len({tuple(r) for r in a.tokens.tolist()}) > 4


def test_p02_the_pad_id_never_reaches_a_prompt_or_a_sample():
    # short prompts are prefilled with padding on their right, which their samples must not see
    model = gpt()
    a, b = (rollout(model, RAGGED, n=2, tok=SimpleNamespace(pad=pad, end=END)) for pad in (0, 7))
    assert torch.equal(a.mask, b.mask) and torch.equal(a.tokens[:, 1:] * a.mask.long(), b.tokens[:, 1:] * b.mask.long())
    close(a.logp, b.logp)


@pytest.mark.parametrize("drop", [True, False])
def test_p18_p34_finished_and_truncated_rows_and_nothing_after_the_end(drop):
    # end in the last slot, absent, or only in the prompt; a token after the end would be trained
    plan = [1, 2, 3, 4, 5, 6, 7, 8, END, 1, 2, 3, 4, 5, 6, 7]
    first = [1, 2, 3, 4, 5, END, END, 6, 7]
    rest = [[9] * n for n in (2, 3, 4, 7, 8)] + [[END], [9, 9, END]] + [[9] * n for n in (12, 14)]
    prompts = [[token] + more for token, more in zip(first, rest)]
    model = scripted(prompts, [plan[len(p):] for p in prompts])
    want = [5, 5, 4, 1, 5, 5, 5, 3, 1]                      # tokens of each response at max_new 5
    ends = [False, True, True, True, False, False, True, False, False]
    roll = rollout(model, prompts, 5, drop_finished=drop)
    assert roll.finished.tolist() == ends and roll.lengths == [len(p) + n for p, n in zip(prompts, want)]
    for i, (p, n) in enumerate(zip(prompts, want)):
        row = p + plan[len(p):len(p) + n]
        assert roll.tokens[i].tolist() == row + [PAD] * (16 - len(row))
        assert roll.mask[i].tolist() == [float(len(p) <= t < len(row)) for t in range(1, 16)]
        assert not roll.logp[i][roll.mask[i] == 0].any()
    texts = [list(text) for text in roll.responses()]
    assert texts == [plan[len(p):len(p) + n - e] for p, n, e in zip(prompts, want, ends)]   # without the end token


def test_p18_ids_after_the_end_do_not_affect_the_log_probs():
    model = gpt(std=.2)
    roll = rollout(model, RAGGED, n=2)
    beyond = torch.arange(16) >= torch.tensor(roll.lengths)[:, None]
    junk = torch.where(beyond, torch.randint(0, V, roll.tokens.shape), roll.tokens)
    assert (roll.tokens[beyond] == PAD).all() and beyond.any()
    close(token_logprobs(model, junk, roll.mask), roll.logp)


def test_p20_p43_sampling_ignores_dropout_and_restores_the_training_mode():
    # noise in the stored log-probs is noise in every ratio; a policy left in eval mode trains without dropout
    model = gpt(dropout=.5).train()
    assert same(rollout(model, RAGGED, n=2), rollout(gpt().eval(), RAGGED, n=2))
    assert all(m.training for m in model.modules())
    model.eval()
    rollout(model, RAGGED[:1])
    assert not any(m.training for m in model.modules())


def test_p20_scoring_in_eval_mode_is_bit_equal_twice_and_not_in_training_mode():
    model = gpt(dropout=.5)
    tokens, mask = collate(ROWS, TOK)
    frozen = reference(model.train())
    assert torch.equal(token_logprobs(frozen, tokens, mask), token_logprobs(frozen, tokens, mask))
    assert not torch.equal(token_logprobs(model, tokens, mask), token_logprobs(model, tokens, mask))


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


@pytest.mark.parametrize("length", [15, 16, 17])
def test_p49_a_prompt_of_block_size_minus_1_is_exact_and_longer_ones_are_refused(length):
    # an overflow crashes, or shifts the positions
    model, prompts = gpt(), [[3] * length, [1, 2]]
    if length < 16:
        roll = rollout(model, prompts, 50)
        assert roll.lengths[0] == 16 and roll.tokens.shape == (2, 16)
        check_logps(model, roll)
    else:
        with pytest.raises(UserError, match=f"{length}.*16"):
            rollout(model, prompts, 50)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="empty"):
        rollout(gpt(), [[1], []])


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("begin, n", [([5], 1), ([7, 3, 9], 1), ([7, 3, 9], 3)])
def test_p09_responses_made_to_begin_alike_store_log_probs_of_the_drawn_part_only(begin, n, drop):
    model, prompts, b = gpt(std=.2), RAGGED[:11], len(begin)
    roll = rollout(model, prompts, 8, n=n, begin=begin, drop_finished=drop)
    assert roll.prompt_len == [len(p) for p in prompts for _ in range(n)] and len(roll.tokens) == 11 * n
    for i, (ids, mask, logp, start, end) in enumerate(zip(roll.tokens.tolist(), roll.mask, roll.logp, roll.prompt_len,
                                                          roll.lengths)):
        assert ids[:start + b] == prompts[i // n] + begin and list(roll.responses()[i][:b]) == begin
        assert mask.tolist() == [float(start <= t + 1 < end) for t in range(len(mask))]     # it is part of the response
        want = np.zeros(len(mask))
        want[start + b - 1:end - 1] = oracle_logps(model, ids[:end])[0][start + b - 1:]
        close(logp, want)
        assert start + b < end <= min(start + b + 8, 16) and not any(ids[end:])
        assert bool(roll.finished[i]) == (ids[end - 1] == END)
    assert roll.finished.any() and not roll.finished.all()
    longer = rollout(model, [p + begin for p in prompts], 8, n=n, drop_finished=drop)       # as if asked that much more
    assert torch.equal(roll.tokens, longer.tokens) and torch.equal(roll.finished, longer.finished)
    assert torch.equal(roll.logp, longer.logp) and roll.lengths == longer.lengths


def test_p49_what_a_response_begins_with_counts_in_the_context():
    model, ids = gpt(), RAGGED[11]                                  # 12 of 16
    assert rollout(model, [ids], begin=[1, 2, 3]).mask.sum() == 4   # 3 given, and room for one
    for begin in ([1, 2, 3, 4], [1] * 20):
        with pytest.raises(UserError, match=rf"{12 + len(begin)}.* of 16"):
            rollout(model, [ids[:2], ids], begin=begin)


def test_rollouts_taken_and_joined_keep_every_row_as_it_was():
    model = gpt(std=.2)
    a, b = rollout(model, RAGGED[:3], 5, n=2), rollout(model, RAGGED[:14], 5, seed=2)
    wide = rollout(gpt(std=.2, block_size=48), [[1] * 30, [2] * 3], 9)
    some = a.take([4, 0, 4])
    for k in ("tokens", "mask", "logp", "finished"):
        assert torch.equal(getattr(some, k), torch.stack([getattr(a, k)[i] for i in (4, 0, 4)]))
    assert some.prompt_len == [3, 1, 3] and same(a.take(list(range(6))), a)
    a.tok = Eleven()
    a.tok.pad = 9
    rolls = [a, wide, b.take([13, 2]), a.take([])]
    roll = M.Rollout.join(rolls)
    i, width = 0, wide.tokens.shape[1]
    assert roll.tokens.shape == (10, width) and roll.mask.shape == roll.logp.shape == (10, width - 1)
    for part in rolls:
        for k in range(len(part.tokens)):
            n = part.tokens.shape[1]
            assert roll.tokens[i].tolist() == part.tokens[k].tolist() + [9] * (width - n)
            assert roll.mask[i].tolist() == part.mask[k].tolist() + [0] * (width - n)
            assert roll.logp[i].tolist() == part.logp[k].tolist() + [0] * (width - n)
            assert roll.finished[i] == part.finished[k] and roll.prompt_len[i] == part.prompt_len[k]
            i += 1
    assert roll.tok is a.tok and roll.responses() == [text for part in rolls for text in part.responses()]
    assert roll.lengths == [n for part in rolls for n in part.lengths]


def test_stream_gets_each_id_of_the_row_as_it_is_drawn():
    got = []
    roll = rollout(gpt(), [[1, 2]], stream=got.append)
    assert [1, 2] + got == roll.tokens[0, :roll.lengths[0]].tolist()


@pytest.mark.parametrize("drop", [True, False])
def test_the_stream_ends_with_the_end_token_however_seldom_the_sampler_looks(drop, monkeypatch):
    # a GPU is asked every eighth step only: up to seven ids drawn after the end were shown
    model = scripted([[1, 2]], [[4, 5, END, 6, 7, 6, 7, 6, 7, 6, 7, 6, 7, 6]])
    for look in (1, 8):
        monkeypatch.setitem(M.LOOK, "cpu", look)
        got = []
        roll = rollout(model, [[1, 2]], max_new=13, temperature=0, stream=got.append, drop_finished=drop)
        assert got == [4, 5, END] and roll.finished.all() and roll.lengths == [5]


def spoil(model, name, value):
    model.get_parameter(name).data.flatten()[3] = value
    return model


@pytest.mark.parametrize("temperature", [0, .7, 1.0])
@pytest.mark.parametrize("name, value", [("transformer.h.1.mlp.c_fc.weight", float("nan")),
                                         ("transformer.ln_f.bias", float("inf")), ("transformer.wte.weight", 1e200)])
def test_logits_that_are_no_numbers_stop_the_sampler_and_name_the_weight(name, value, temperature):
    # "index 768 is out of bounds"
    model = spoil(gpt(), name, value)
    if value == 1e200:
        model.transformer.wte.weight.data *= 1e200
    for cut in (dict(), dict(top_k=3, top_p=.5), dict(n=2)):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
            rollout(model, [[1, 2], [3]], temperature=temperature, **cut)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [dict(), dict(temperature=0), dict(top_k=2, top_p=.9)], ids=str)
def test_a_draw_from_no_distribution_is_a_token_of_log_probability_nan(kind, dtype):
    logits = torch.randn(5, V, dtype=dtype)
    logits[1, 4], logits[3, 0], logits[4] = float("nan"), float("inf"), -float("inf")
    token, logp = sample(logits, torch.rand(5, dtype=dtype), **kind)
    assert ((token >= 0) & (token < V)).all() and logp.isnan().tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9])
def test_a_temperature_that_is_next_to_nothing_is_refused_by_name(temperature):
    with pytest.raises(data.OptionError, match="--temperature"):
        rollout(gpt(), [[1]], temperature=temperature)
    for tiny in (1e-6, 1e-3):                                               # and just above, it is all but greedy
        cold, greedy = (rollout(gpt(dtype=torch.float32), RAGGED, temperature=t) for t in (tiny, 0))
        assert torch.equal(cold.tokens, greedy.tokens) and cold.logp.isfinite().all()


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
    ours, theirs = ([t for t in m.state_dict().values()] for m in (model, ref))
    assert not {t.untyped_storage().data_ptr() for t in ours} & {t.untyped_storage().data_ptr() for t in theirs}
    assert not ref.training and not any(p.requires_grad for p in ref.parameters())
    before, opt = copy.deepcopy(ref.state_dict()), Optimizer(model, 1e-2, 10)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(before.values(), ours))
    for step in range(10):
        token_logprobs(model, *collate(ROWS, TOK)).sum().backward()
        opt.step(step)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ref.state_dict().values()))
    assert not any(torch.equal(a.to(b.dtype), b) for a, b in zip(theirs[:5], model.state_dict().values()))


def test_p21_a_reference_has_the_precision_of_the_original():
    # a float32 reference of a float64 policy has a KL of 1e-7 at step 0
    model = gpt()
    tokens, mask = collate(ROWS, TOK)
    assert torch.equal(token_logprobs(reference(model), tokens, mask), token_logprobs(model, tokens, mask))


# ------------------------------------------------------------------------------------------------ optimizer


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
    assert Optimizer(gpt(), 1.0, 3).step.__self__.scale(0) == 1.0                           # no warm-up, no 1/0
    assert all(0 < Optimizer(gpt(), 1.0, 3, warmup=9).scale(s) <= 1 for s in range(12))     # longer than the run


def test_weight_decay_reaches_matrices_only_and_the_first_adamw_step_is_the_closed_form():
    # decayed norms and biases shrink towards 0
    model = gpt(n_scores=1)
    before = copy.deepcopy(model.state_dict())
    opt = Optimizer(model, .01, 100, weight_decay=.5, clip=0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    norm = opt.step(0)["grad_norm"]
    assert norm == pytest.approx(3 * math.sqrt(sum(p.numel() for p in model.parameters())))
    for name, p in model.named_parameters():
        decay = .5 if p.ndim == 2 else 0
        close(p, before[name] * (1 - .01 * decay) - .01, 1e-8)
        assert p.grad is None


@pytest.mark.parametrize("clip", [.5, 1e9])
def test_gradients_are_clipped_to_a_global_norm(clip):
    # Adam's first step hides the scale; its momentum shows it
    model = gpt()
    opt = Optimizer(model, .01, 100, clip=clip)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    total = math.sqrt(sum((i + 1) ** 2 * p.numel() for i, p in enumerate(model.parameters())))
    norm = opt.step(0)["grad_norm"]
    assert norm == pytest.approx(total)
    for i, p in enumerate(model.parameters()):
        close(opt.optims[0].state[p]["exp_avg"], torch.full_like(p, .1 * (i + 1) * min(1, clip / total)), 1e-6)


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


def train_a_little(model, opt, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        tokens = torch.randint(0, V, (4, 16))
        (-token_logprobs(model, tokens, torch.ones(4, 15)).mean()).backward()
        opt.step(step)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_p41_optimizer_state_survives_the_file_bit_for_bit(kind, tmp_path):
    # without its moments the loss differs by .009, which nobody sees
    make = lambda seed: (m := gpt(seed, torch.float32), Optimizer(m, .01, 10, kind, warmup=2))
    a, opt_a = make(0)
    train_a_little(a, opt_a, 0, 4)
    save_tensors(tmp_path / "opt", opt_a.tensors(), {})
    b, opt_b = make(1)
    b.load_state_dict(a.state_dict())
    opt_b.load_tensors(load_tensors(tmp_path / "opt")[0])
    for m, opt in ((a, opt_a), (b, opt_b)):
        train_a_little(m, opt, 4, 7)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert opt_a.tensors().keys() == opt_b.tensors().keys() and len(opt_a.tensors()) > 30


@pytest.mark.parametrize("kind", ["adamw", "muon"])
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
        runs[how] = []
        for step in (4, 5, 6):
            train_a_little(model, opt, step, step + 1)
            runs[how].append([p.detach().clone() for p in model.parameters()])
    for new, forgot, kept_on in zip(runs["new"], runs["forget"], runs["neither"]):
        assert all(map(torch.equal, new, forgot)) and not any(map(torch.equal, new, kept_on))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_gradient_is_an_error_that_changes_nothing(bad, kind):
    # one NaN update ends the run, and the checkpoint after it
    model = gpt()
    opt = Optimizer(model, .01, 10, kind)
    train_a_little(model, opt, 0, 2)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.tensors())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    list(model.parameters())[-1].grad[3] = bad
    with pytest.raises(UserError, match="step 2.*gradient"):
        opt.step(2)
    assert all(torch.equal(x, y) for x, y in zip(before.values(), model.state_dict().values()))
    assert all(torch.equal(x, y) for x, y in zip(state.values(), opt.tensors().values()))


def test_frozen_parameters_are_left_alone():
    model = gpt()
    model.transformer.wte.requires_grad_(False)
    before = model.transformer.wte.weight.clone()
    train_a_little(model, Optimizer(model, .01, 10, "muon"), 0, 2)
    assert torch.equal(before, model.transformer.wte.weight)


# ------------------------------------------------------------------------------------------------ resuming


def run_in(folder, seed=7):
    left = lambda name: folder / name if (folder / name).exists() else None
    return SimpleNamespace(folder=folder, seed=seed, tok=TOK, left=left,
                           progress=lambda a, b: iter(range(a, b)))


def training(folder, kind="adamw", stop=None, peek=False, total=6, save_every=2, init=0, lora_r=0):
    """A run with dropout and random batches -> [(step, loss, running mean, optimizer state)], and its weights."""
    model = gpt(init, torch.float32, dropout=.3)
    if lora_r:
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
        log.append((step, float(loss.detach()), state["mean"], [t.clone() for t in opt.tensors().values()]))
        if peek:                                            # evaluation: draws random numbers, changes the mode
            generate(model.eval(), [[1, 2]], 5)
            torch.rand(step + 1)
    return log, [p.detach().clone() for p in model.parameters()]


def equal_runs(a, b):
    return (len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1]))
            and all(x[:3] == y[:3] and all(map(torch.equal, x[3], y[3])) for x, y in zip(a[0], b[0])))


def test_the_largest_seed_there_is_seeds_every_step():
    draws = []
    for seed, step in ((2 ** 63 - 1, 0), (2 ** 63 - 1, 10 ** 6), (2 ** 62, 0)):
        M.seed_step(seed, step)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_p41_a_run_stopped_at_any_step_resumes_bit_identically(kind, tmp_path):
    # weights, optimizer, random numbers and carried state: each forgotten one changes the suffix a little
    whole = training(tmp_path / "whole", kind)
    for stop in range(1, 6):
        begun = training(tmp_path / f"{stop}", kind, stop)[0]
        assert [row[:3] for row in begun] == [row[:3] for row in whole[0][:stop]]
        saved = stop // 2 * 2
        log, params = training(tmp_path / f"{stop}", kind, init=1 if saved else 0)  # it must not start from its own
        assert equal_runs((log, params), (whole[0][saved:], whole[1])), stop


def test_p43_sampling_and_evaluation_inside_a_step_do_not_change_the_next(tmp_path):
    # a random number drawn by an evaluation would change all that follow
    assert equal_runs(training(tmp_path / "a"), training(tmp_path / "b", peek=True))


def test_another_seed_is_another_run_and_steps_differ_from_each_other(tmp_path):
    draws = [[torch.rand(1).item() for _ in steps(run_in(tmp_path / name, len(name)), 5, dict(model=tiny()), {}, {}, 9)]
             for name in ("a", "b", "cc")]
    assert draws[0] == draws[1] and len(set(draws[0] + draws[2])) == 10


def test_a_finished_run_yields_no_step_and_its_checkpoint_is_a_model(tmp_path):
    _, params = training(tmp_path)
    assert training(tmp_path, init=3)[0] == []
    loaded = load_model(tmp_path, Setup(TOK))
    assert all(torch.equal(a, b) for a, b in zip(params, loaded.parameters())) and not loaded.training


@pytest.mark.parametrize("change", ["drop", "rename", "reshape", "add"])
@pytest.mark.parametrize("key", ["optimizer of optimizer/0.0.exp_avg", "optimizer of optimizer/0.3.step", "optimizer of optimizer/1.2.momentum_buffer",
                                 "model/transformer.wpe.weight", "model/transformer.h.0.attn.c_attn.lora_A"])
def test_p46_a_resumed_run_names_a_missing_misshapen_or_surplus_tensor(key, change, tmp_path):
    # silently fresh moments are an incomplete resume (p41)
    lora_r = 2 * ("lora" in key)
    training(tmp_path, "muon", stop=3, lora_r=lora_r)
    tamper(tmp_path / "checkpoint.safetensors", key, change)
    with pytest.raises(UserError, match=key.partition("/")[2].replace(".", r"\.")) as error:
        training(tmp_path, "muon", lora_r=lora_r)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("facts", [dict(step=None), dict(step=-1), dict(step="2"), dict(step=2.0), dict(step=[]),
                                   dict(state=None), dict(state=[]), dict(state=3)], ids=str)
def test_p46_a_resumed_run_is_told_its_step_and_its_state(facts, tmp_path):
    training(tmp_path, stop=3)
    path = tmp_path / "checkpoint.safetensors"
    tensors, meta = load_tensors(path)
    save_tensors(path, tensors, meta | facts)
    with pytest.raises(UserError, match=f"^{tmp_path}: its checkpoint does not say at which step it was written$"):
        training(tmp_path)


# ------------------------------------------------------------------------------------------------ checkpoints


def tiny(**kw):
    return gpt(dtype=torch.float32, n_layer=1, n_embd=8, **dict(n_scores=1) | kw)


def tamper(path, key, change):
    tensors, meta = load_tensors(path)
    tensors = {k: t.clone() for k, t in tensors.items()}
    t = tensors.pop(key)
    if change in ("rename", "add"):
        tensors[key + "x"] = t
    if change == "add":
        tensors[key] = t
    if change == "reshape":
        tensors[key] = t.new_zeros(*t.shape, 2)
    save_tensors(path, tensors, meta)


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path, dict(model=tiny()), {}, dict(tokenizer=TOK.fingerprint, step=1))
    return tmp_path


def test_tensors_of_every_type_and_shape_come_back_bit_for_bit(tmp_path):
    tensors = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in M.DTYPES.values()}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5), "t": torch.randn(4, 3).T, "é/✓": torch.ones(1)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"a": [1, {"b": None}], "ü": "✓"})
    got, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == {"a": [1, {"b": None}], "ü": "✓"} and list(got) == list(tensors)
    assert all(got[k].dtype == t.dtype and torch.equal(got[k], t) for k, t in tensors.items())


def test_the_file_is_safetensors_by_its_specification(saved):
    # 8 bytes of little-endian length, a JSON header, then the tensors without a gap, by offset
    raw = (saved / "checkpoint.safetensors").read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    assert all(isinstance(v, str) for v in header.pop("__metadata__").values()) and (8 + size) % 8 == 0
    at = 0
    for info in header.values():
        assert info["data_offsets"] == [at, at := at + 4 * math.prod(info["shape"])]
    assert at == len(raw) - 8 - size
    for name, want in tiny().state_dict().items():
        info = header[f"model/{name}"]
        a, b = info["data_offsets"]
        close(np.frombuffer(raw[8 + size + a:8 + size + b], "<f4").reshape(info["shape"]), want, 0)


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


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("how", [no_space, killed])
def test_p42_a_full_disk_or_a_kill_while_saving_leaves_the_old_checkpoint(saved, monkeypatch, where, how):
    # writing over the old file loses both
    old = (saved / "checkpoint.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, where, how)
        with pytest.raises(UserError if how is no_space else KeyboardInterrupt) as error:
            save_checkpoint(saved, dict(model=gpt()), {}, {})
    assert (saved / "checkpoint.safetensors").read_bytes() == old
    if how is no_space:
        assert "full" in str(error.value) and not list(saved.glob("*.part"))
    load_model(saved, Setup(TOK))
    save_checkpoint(saved, dict(model=tiny(seed=1)), {}, {})                # and the next save works
    assert (saved / "checkpoint.safetensors").read_bytes() != old


def test_p42_a_write_that_fails_half_way_leaves_the_old_checkpoint(saved):
    # the real thing: the system refuses to write past 3000 bytes
    old, (soft, hard) = (saved / "checkpoint.safetensors").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(UserError, match="not saved"):
            save_checkpoint(saved, dict(model=gpt()), {}, {})
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
    assert calls[:2] == [("fsync", size), ("replace", size)]


def test_p42_a_torn_part_file_is_ignored(tmp_path):
    whole = training(tmp_path / "whole")
    training(tmp_path / "run", stop=3)
    raw = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "run" / "checkpoint.part").write_bytes(raw[:len(raw) // 2])
    log, params = training(tmp_path / "run", init=1)
    assert equal_runs((log, params), (whole[0][2:], whole[1]))


KEYS = list(tiny().state_dict())[::3] + ["score.weight"]


@pytest.mark.parametrize("change", ["drop", "rename", "reshape", "add"])
@pytest.mark.parametrize("key", KEYS)
def test_p46_a_dropped_renamed_reshaped_or_surplus_tensor_is_named(saved, key, change):
    # lenient loading keeps a random head
    tamper(saved / "checkpoint.safetensors", f"model/{key}", change)
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        load_model(saved, Setup(TOK))


def test_p46_another_tokenizer_is_refused_by_name(saved):
    with pytest.raises(UserError, match="another tokenizer.*eleven.*twelve"):
        load_model(saved, Setup(Twelve()))


def test_p46_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make it with: python sft.py"):
        load_model(tmp_path, maker="python sft.py")


def test_loading_as_a_value_model_keeps_its_head_or_starts_one_at_zero(saved, tmp_path):
    save_checkpoint(tmp_path / "lm", dict(model=tiny(n_scores=0)), {}, dict(tokenizer=TOK.fingerprint))
    want = tiny()
    assert torch.equal(load_model(saved, Setup(TOK), n_scores=1).score.weight, want.score.weight)
    fresh = load_model(tmp_path / "lm", Setup(TOK), n_scores=2)
    assert fresh.score.weight.shape == (2, 8) and not fresh.score.weight.any()
    with pytest.raises(UserError, match="language model is needed"):
        load_model(saved, Setup(TOK), n_scores=0)
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in tiny(n_scores=0).state_dict().items())


@pytest.mark.parametrize("had, asked", [(1, 3), (3, 1), (3, 2), (3, 3)])
def test_of_several_scores_the_first_ones_are_kept_and_what_is_missing_starts_at_zero(had, asked, tmp_path):
    many = tiny(n_scores=had)
    save_checkpoint(tmp_path, dict(model=many), {}, dict(tokenizer=TOK.fingerprint))
    got, kept = load_model(tmp_path, Setup(TOK), n_scores=asked), min(had, asked)
    assert got.config.n_scores == asked and got.score.weight.shape == (asked, 8)
    assert torch.equal(got.score.weight[:kept], many.score.weight[:kept]) and many.score.weight.any()
    assert not got.score.weight[kept:].any()
    hidden = torch.randn(2, 8)
    torch.testing.assert_close(got.scores(hidden)[:, :kept], many.scores(hidden)[:, :kept])


def header_of(raw):
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
        kept = header["__metadata__"]
        meta = json.loads(kept["plainalign"])
        edit(header, header["model/transformer.wte.weight"], meta)
        if header["__metadata__"] is kept:
            kept["plainalign"] = json.dumps(meta)
        return signed(header, data)
    return make


def set_in(which, key, value):
    return edited(lambda header, first, meta: {"header": header, "first": first, "meta": meta,
                                               "config": meta["config"]}[which].__setitem__(key, value))


MALFORMED = {
    "no byte": lambda raw: b"", "three bytes": lambda raw: raw[:3], "only a length": lambda raw: raw[:8],
    "half a header": lambda raw: raw[:300], "half the data": lambda raw: raw[:-100], "a byte less": lambda raw: raw[:-1],
    "a byte more": lambda raw: raw + b"\0", "huge length": lambda raw: b"\xff" * 8 + raw[8:],
    "zero length": lambda raw: b"\0" * 8 + raw[8:], "text": lambda raw: b"hello, this is no checkpoint at all",
    "no utf-8": lambda raw: with_header(b'{"\xff": 1}', b""), "no object": lambda raw: with_header([1], b""),
    "a number": lambda raw: with_header(3, b""), "null": lambda raw: with_header(None, b""),
    "empty object": lambda raw: with_header({}, b""), "deep": lambda raw: with_header(b"[" * 100_000, b""),
    "deep object": lambda raw: with_header(b'{"a":' * 100_000, b""), "NaN": lambda raw: with_header(b'{"a": NaN}', b""),
    "metadata list": set_in("header", "__metadata__", []), "metadata number": set_in("header", "__metadata__", 3),
    "facts no JSON": set_in("header", "__metadata__", {"plainalign": "{"}),
    "facts a list": set_in("header", "__metadata__", {"plainalign": "[1]"}),
    "facts a number": set_in("header", "__metadata__", {"plainalign": 5}),
    "no facts": set_in("header", "__metadata__", {}),
    "tensor null": set_in("header", "model/transformer.wte.weight", None),
    "offsets swapped": set_in("first", "data_offsets", [2048, 0]), "offsets negative": set_in("first", "data_offsets", [-2048, 0]),
    "offsets beyond": set_in("first", "data_offsets", [10 ** 9, 10 ** 9 + 2048]),
    "offsets overlap": set_in("first", "data_offsets", [64, 2112]),
    "offsets floats": set_in("first", "data_offsets", [0.0, 2048.0]), "offsets text": set_in("first", "data_offsets", ["0", "2048"]),
    "offsets three": set_in("first", "data_offsets", [0, 1, 2]), "offsets null": set_in("first", "data_offsets", None),
    "dtype unknown": set_in("first", "dtype", "F8"), "dtype list": set_in("first", "dtype", []),
    "dtype double": set_in("first", "dtype", "F64"), "dtype other": set_in("first", "dtype", "BOOL"),
    "shape negative": set_in("first", "shape", [-64, -8]), "shape -1": set_in("first", "shape", [-1, 8]),
    "shape text": set_in("first", "shape", "64"), "shape floats": set_in("first", "shape", [64.0, 8.0]),
    "shape huge": edited(lambda h, f, m: f.update(shape=[0, 2 ** 70], data_offsets=[0, 0])),
    "shape nested": set_in("first", "shape", [[64], 8]), "shape flat": set_in("first", "shape", [512]),
    "no config": set_in("meta", "config", {}), "config list": set_in("meta", "config", []),
    "config null": set_in("meta", "config", None), "surplus size": set_in("config", "n_wings", 2),
    "n_head 0": set_in("config", "n_head", 0), "n_head -2": set_in("config", "n_head", -2),
    "n_layer text": set_in("config", "n_layer", "1"), "n_layer -1": set_in("config", "n_layer", -1),
    "dropout 9": set_in("config", "dropout", 9.0), "n_embd 0": set_in("config", "n_embd", 0),
    "n_embd -8": set_in("config", "n_embd", -8), "vocab -1": set_in("config", "vocab_size", -1),
    "block null": set_in("config", "block_size", None),
    "n_scores text": set_in("config", "n_scores", "1"), "n_scores -1": set_in("config", "n_scores", -1),
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED)
def test_p46_a_malformed_checkpoint_is_a_user_error(saved, make):
    path = saved / "checkpoint.safetensors"
    raw = path.read_bytes()
    assert edited(lambda *_: None)(raw) == with_header(*header_of(raw))     # the valid twin
    path.write_bytes(make(raw))
    with pytest.raises(UserError) as error:
        load_model(saved, Setup(TOK))
    assert "\n" not in str(error.value)


def test_p46_fuzzed_checkpoints_load_or_are_a_user_error(saved):
    # flipped, deleted, repeated bytes anywhere in the header: nothing else may come out, and nothing hangs
    path, rng, refused = saved / "checkpoint.safetensors", random.Random(0), 0
    raw = path.read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    for trial in range(300):
        bad, at = bytearray(raw), rng.randrange(8 + size)
        kind = trial % 4
        if kind == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            bad[at] = rng.choice(b"0123456789-[]{},:\"\\ ")
        elif kind == 2:
            bad = bad[:rng.randrange(len(bad))]
        else:
            bad[at:at] = bad[at:at + rng.randrange(1, 40)]
        path.write_bytes(bytes(bad))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_model(saved, Setup(TOK))
            except UserError:
                refused += 1
    assert refused > 200


def same_file(a, b):
    """Whether two results of load_tensors are the same to the bit."""
    (tensors, meta), (others, facts) = a, b
    return meta == facts and tensors.keys() == others.keys() and all(
        t.dtype == others[k].dtype and t.shape == others[k].shape and t.numpy().tobytes() == others[k].numpy().tobytes()
        for k, t in tensors.items())


def flip(raw, bit):
    bad = bytearray(raw)
    bad[bit // 8] ^= 1 << bit % 8
    return bytes(bad)


@pytest.mark.parametrize("where", ["length", "header", "data"])
def test_a_bit_that_flips_anywhere_is_refused_or_harmless(saved, where):
    # without a checksum every flip in the data loaded
    path, rng = saved / "checkpoint.safetensors", random.Random(3)
    raw, whole = path.read_bytes(), load_tensors(path)
    whole = {k: t.clone() for k, t in whole[0].items()}, whole[1]
    size, = struct.unpack("<Q", raw[:8])
    first, last = dict(length=(0, 8), header=(8, 8 + size), data=(8 + size, len(raw)))[where]
    harmless = 0
    for _ in range(60):
        path.write_bytes(flip(raw, rng.randrange(8 * first, 8 * last)))
        try:
            harmless += same_file(load_tensors(path), whole) or pytest.fail("another checkpoint loaded")
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert harmless == 0 or where == "header" and harmless < 10


def test_a_relabelled_dtype_a_missing_checksum_and_another_files_checksum_are_refused(saved):
    path = saved / "checkpoint.safetensors"
    raw = path.read_bytes()
    header, content = header_of(raw)

    def stripped(header):
        del header["__metadata__"]["crc32"]
    for change in (lambda h: h["model/score.weight"].update(dtype="I32"), stripped,
                   lambda h: h["model/transformer.ln_f.bias"].update(dtype="I32"),
                   lambda h: h["__metadata__"].update(crc32="00000000"), lambda h: h["__metadata__"].update(crc32=None),
                   lambda h: h["__metadata__"].update(plainalign=h["__metadata__"]["plainalign"] + " ")):
        other = json.loads(json.dumps(header))
        change(other)
        path.write_bytes(with_header(other, content))
        with pytest.raises(UserError, match="damaged"):
            load_tensors(path)
    path.write_bytes(signed(header, content))
    load_model(saved, Setup(TOK))


def test_files_of_others_need_no_checksum(saved):
    path = saved / "checkpoint.safetensors"
    header, content = header_of(path.read_bytes())
    for facts in ({}, {"format": "pt"}, None):
        header["__metadata__"] = facts
        path.write_bytes(with_header({k: v for k, v in header.items() if v is not None}, content))
        assert len(load_tensors(path)[0]) == len(header) - 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias", "score.weight"])
def test_a_weight_that_is_no_number_is_named_when_it_is_saved_and_when_it_is_read(key, value, saved):
    path, model = saved / "checkpoint.safetensors", tiny()
    before = path.read_bytes()
    model.get_parameter(key).data.flatten()[-1] = value
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        save_checkpoint(saved, dict(model=model), {}, {})
    assert path.read_bytes() == before
    tensors, meta = load_tensors(path)
    tensors = {k: t.clone() for k, t in tensors.items()}
    tensors["model/" + key].flatten()[-1] = value
    save_tensors(path, tensors, meta)
    with pytest.raises(UserError, match=f"{saved}.*{key}.*{value}"):
        load_model(saved, Setup(TOK))


@pytest.mark.parametrize("size", [10 ** 9, 10 ** 12, 10 ** 40])
@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "vocab_size", "n_scores", "block_size"])
def test_p46_sizes_that_a_checkpoint_only_promises_take_no_memory(saved, name, size, monkeypatch):
    # a thousand million layers: 2.3 GB, then the system ended the process
    path = saved / "checkpoint.safetensors"
    path.write_bytes(set_in("config", name, size)(path.read_bytes()))
    monkeypatch.setattr(GPT, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    for n_scores in (None, 3):
        with pytest.raises(UserError) as error:
            load_model(saved, Setup(TOK), n_scores=n_scores)
        assert "\n" not in str(error.value) and "damaged" not in str(error.value)


# ------------------------------------------------------------------------------------------------ security


def executes(source):
    """The places of a source text that unpickle, or run text as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] + [getattr(node, "module", "") or ""] \
            if isinstance(node, (ast.Import, ast.ImportFrom)) else []
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
    assert len(list(ROOT.glob("*.py"))) >= 2
    for path in ROOT.glob("*.py"):
        assert not executes(path.read_text(encoding="utf-8")), path.name


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", range(6))
def test_p45_a_malicious_pickle_under_the_checkpoints_name_is_refused_and_not_run(tmp_path, protocol):
    bomb = Bomb()
    bomb.target = str(tmp_path / "exploded")
    (tmp_path / "checkpoint.safetensors").write_bytes(pickle.dumps(bomb, protocol))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model(tmp_path, Setup(TOK))
    with pytest.raises(UserError, match="not a checkpoint"):
        training(tmp_path)
    torch.save({"model": bomb}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model(tmp_path, Setup(TOK))
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------------------ device, chat


def set_up(device="auto", dtype="auto"):
    return setup(SimpleNamespace(device=device, dtype=dtype, threads=0), TOK)


def matmuls(model):
    """The type of what a model multiplies."""
    return model.logits(model(torch.tensor([[1, 2]]))).dtype


def test_an_absent_device_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set_up("auto").device.type == "cpu"
    with pytest.raises(UserError, match="no CUDA"):
        set_up("cuda")


def test_setup_chooses_the_precision_of_the_matmuls(saved):
    # a model that is made like another, new or loaded, multiplies as that one does
    for dtype, want in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        like = set_up("cpu", dtype)
        model = M.new_model(tiny(n_scores=0).config, like)
        for made in (model, load_model(saved, like), load_model(saved, model)):
            assert matmuls(made) == want and made.tok is like.tok is TOK and made.device == like.device


@pytest.mark.parametrize("name", ["foo", "", "cuda:x", "cuda:-1", "cuda:99999999999999999999", "meta", "mps", "cpu:7"])
def test_a_device_that_is_none_is_one_clear_line(name):
    with pytest.raises(data.OptionError, match="--device"):
        set_up(name)


def test_a_gpu_that_is_not_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert M.find_device("auto") == torch.device("cuda") and M.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:2.*2 CUDA devices"):
        M.find_device("cuda:2")


@pytest.mark.parametrize("amx, avx512, told, want", [
    (True, True, "", "bf16"), (False, True, "", "bf16"), (True, None, "", "bf16"), (False, False, "", "fp32"),
    (None, None, "", "fp32"), (True, True, "AVX512_CORE", "fp32"), (False, True, "avx2", "fp32"),
    (False, True, "AVX512_CORE_BF16", "bf16"), (True, True, "ALL", "bf16")])
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_auto_is_bf16_where_a_cpu_may_use_instructions_for_it(variable, amx, avx512, told, want, monkeypatch):
    # with avx512_bf16 alone it took fp32
    for name, has in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
        if has is None:                                                     # a PyTorch that has no such question
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, told)
    assert M.precision(torch.device("cpu")) == want
    model = M.new_model(tiny(n_scores=0).config, set_up("cpu"))
    assert matmuls(model) == dict(bf16=torch.bfloat16, fp32=torch.float32)[want]
    assert [M.precision(torch.device("cpu"), dtype) for dtype in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize("emulated", [True, False])
def test_auto_is_fp32_on_a_gpu_that_only_emulates_bf16(emulated, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or not emulated)
    assert M.precision(torch.device("cuda")) == ("fp32" if emulated else "bf16")


def test_a_run_says_on_what_it_computes_and_where_that_changes(toy_base, tmp_path, monkeypatch, capsys):
    def part(steps_done):
        """Train, interrupted after so many steps if it is told; what it says."""
        real = data.Run.log

        def log(self, step, *args, **metrics):
            return killed() if step == steps_done else real(self, step, *args, **metrics)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(data.Run, "log", log)
            tune(tmp_path / "a", toy_base)
        return capsys.readouterr()
    first = part(2)
    assert M.cpu_name() in first.out and "fp32" in first.out and "threads" not in first.out
    assert "begun" not in part(3).err
    monkeypatch.setattr(M, "cpu_name", lambda: "another CPU")
    last = part(None)
    assert "another CPU" in last.out and "begun" in last.err


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


def keep(folder, model):
    """The folder of a finished run, as a word of a command."""
    M.write_model(folder, model)
    return str(folder)


def adapt(folder, r=3, alpha=5.0, stir=.2, n_scores=None, vector_lr=0.0, **size):
    """A base in folder/base, loaded and given adapters; with stir, as training might have left them."""
    if not (folder / "base").exists():
        keep(folder / "base", gpt(dtype=torch.float32, **size))
    model = load_model(folder / "base", Setup(TOK), n_scores=n_scores)
    model.add_lora(r, alpha, vector_lr)
    rng = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.requires_grad and stir:
            p.data += stir * torch.randn(p.shape, generator=rng)
    return model


def logps(model):
    with torch.no_grad():
        return token_logprobs(model, *collate(ROWS, TOK))


def test_lora_changes_nothing_at_first_and_then_adds_alpha_over_r_times_a_b(tmp_path):
    # B = 0 at the start; later every linear layer is W + (α/r) A B, here in the GPT-2 written in numpy
    base = gpt(dtype=torch.float32)
    assert torch.equal(logps(adapt(tmp_path, stir=0)), logps(base))
    model, whole = adapt(tmp_path), gpt(dtype=torch.float32)
    assert len(model.loras()) == 8 and (logps(model) - logps(base)).abs().max() > .1
    for name, p in model.named_parameters():
        if name.endswith("lora_A"):
            layer = name.removesuffix(".lora_A")
            whole.get_submodule(layer).weight.data += 5 / 3 * p @ model.get_parameter(layer + ".lora_B")
    want = [oracle_logps(whole.double(), ids)[0] for ids, _ in ROWS]
    for row, (_, target), ours in zip(want, ROWS, logps(model)):
        close(ours[:len(row)], [x * t for x, t in zip(row, target[1:])], 1e-4)


def test_lora_merged_equals_unmerged_and_is_a_plain_model(tmp_path):
    model = adapt(tmp_path)
    before, roll = logps(model), rollout(model, [[1, 2], [3]])
    check_logps(copy.deepcopy(model).merge_lora().double(), roll, tol=1e-4)     # through the cache too
    merged = model.merge_lora()
    assert (logps(merged) - before).abs().max() < 1e-5
    assert merged.state_dict().keys() == gpt().state_dict().keys() and not merged.loras()
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("n_scores, kind", [(0, "adamw"), (0, "muon"), (1, "adamw")])
def test_lora_only_adapters_and_a_score_head_have_gradients_and_are_optimised(n_scores, kind, tmp_path):
    model = adapt(tmp_path, n_scores=n_scores)
    before, opt = copy.deepcopy(model.state_dict()), Optimizer(model, .01, 10, kind)
    tokens, mask = collate(ROWS, TOK)
    out = response_scores(model, tokens, mask) if n_scores else token_logprobs(model, tokens, mask)
    out.square().sum().backward()
    trained = {n for n in before if n.endswith(("lora_A", "lora_B")) or n.startswith("score.")}
    assert len(trained) == 16 + n_scores
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    names = {id(p): n for n, p in model.named_parameters()}
    held = [names[id(p)] for group in opt.groups() for p in group["params"]]
    assert sorted(held) == sorted(trained) and {names[id(p)] for p in opt.params} == trained
    opt.step(0)
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == trained


def test_lora_optimizer_state_is_below_a_tenth(tmp_path):
    # r = 8 on the toy world's default size
    def size(model):
        opt = Optimizer(model, .01, 10)
        for p in opt.params:
            p.grad = torch.ones_like(p)
        opt.step(0)
        return sum(t.numel() * t.element_size() for t in opt.tensors().values())
    keep(tmp_path, GPT(GPTConfig(), TOK))
    whole, model = size(load_model(tmp_path)), load_model(tmp_path)
    model.add_lora(8, 16.0)
    assert .05 < size(model) / whole < .1
    model = load_model(tmp_path)
    model.add_lora(8, 16.0, .01)
    assert .07 < size(model) / whole < .1


def test_lora_reference_is_the_base_to_the_bit_whatever_is_learned(tmp_path):
    base, model = logps(gpt(dtype=torch.float32)), adapt(tmp_path)
    ref = reference(model)
    train_a_little(model, Optimizer(model, .05, 10), 0, 3)
    tuned = logps(model)
    assert torch.equal(logps(ref), base) and (tuned - base).abs().max() > .1
    assert torch.equal(logps(model), tuned)


def test_p19_lora_reference_shares_all_that_is_frozen_and_nothing_that_is_trained(tmp_path):
    for bias in (0.0, .01):
        model = adapt(tmp_path / str(bias), vector_lr=bias)
        ref = reference(model)
        trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        own = {p.data_ptr() for p in ref.parameters()} - frozen
        vectors_of_ref = {p.data_ptr() for p in ref.parameters() if p.ndim == 1}
        assert not own & trained and own == (vectors_of_ref if bias else set())
        assert not ref.loras() and not any(p.requires_grad for p in ref.parameters()) and model.loras()
    plain = gpt(dtype=torch.float32)
    theirs = {p.data_ptr() for p in reference(plain).parameters()}
    assert not theirs & {p.data_ptr() for p in plain.parameters()}


@pytest.mark.parametrize("size", [dict(), dict(n_scores=1), dict(vector_lr=.01)], ids=str)
def test_lora_is_written_merged_and_leaves_the_model_that_is_trained_as_it_is(size, tmp_path):
    model = adapt(tmp_path, **size)
    before = bits(model)
    keep(tmp_path / "a", model)
    assert bits(model) == before and len(model.loras()) == 8
    loaded = load_model(tmp_path / "a", Setup(TOK))
    assert not loaded.loras() and all(p.requires_grad for p in loaded.parameters())
    assert bits(loaded) == bits(copy.deepcopy(model).merge_lora())
    hidden, ids = [m(torch.tensor([[1, 2, 3]])) for m in (model, loaded)], torch.tensor([[1, 2, 3]])
    close(*hidden, 1e-5)
    if model.score is not None:
        close(loaded.scores(hidden[1]), model.scores(hidden[0]), 1e-5)
        with pytest.raises(UserError, match="language model is needed"):
            load_model(tmp_path / "a", Setup(TOK), n_scores=0)


def test_p46_an_unfinished_run_with_adapters_is_one_clear_line(tmp_path):
    save_checkpoint(tmp_path / "a", dict(model=adapt(tmp_path)), {}, dict(tokenizer=TOK.fingerprint))
    with pytest.raises(UserError, match=r"^\S+/a: an unfinished run that trains adapters[^\n]*$"):
        load_model(tmp_path / "a", Setup(TOK))


def tune(out, init, **options):
    """sft.train on a few toy texts; its log."""
    sft.train(sft.Config(out=str(out), init=init, **(dict(
        steps=5, device="cpu", dtype="fp32", families="write", packing=0, batch=4, warmup=2, save_every=2) | options)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory):
    tok = Tokenizer.load("toy")
    return keep(tmp_path_factory.mktemp("toy"), gpt(dtype=torch.float32, std=.1, tok=tok, vocab_size=tok.n_vocab,
                                                    block_size=128, n_layer=1))


def vectors(names): return {n for n in names if n.endswith(".bias") or re.search(r"ln_\w+\.weight", n)}


@pytest.mark.parametrize("stop, options", [(1, dict(optimizer="muon")), (3, dict(optimizer="adamw")), (3, dict(
    optimizer="muon")), (3, dict(optimizer="adamw", lora_bias=.02))], ids=str)
def test_p41_lora_run_resumes_bit_for_bit_and_changes_no_more(stop, options, toy_base, tmp_path, monkeypatch):
    whole, real = tune(tmp_path / "a", toy_base, lora_r=2, **options), data.Run.log

    def log(self, step, *args, **kwargs):
        if step == stop:
            raise KeyboardInterrupt
        real(self, step, *args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.Run, "log", log)
        tune(tmp_path / "b", toy_base, lora_r=2, **options)
    if stop > 1:
        with pytest.raises(UserError, match="an unfinished run that trains adapters"):
            load_model(tmp_path / "b")
    assert tune(tmp_path / "b", toy_base, lora_r=2, **options) == whole and len(whole) == 5
    a, b, before = (load_model(folder).state_dict() for folder in (tmp_path / "a", tmp_path / "b", toy_base))
    adapted = {n for n in a if ".h." in n and n.endswith(("attn.c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    assert all(torch.equal(a[n], b[n]) for n in a)
    trained = adapted | (vectors(a) if "lora_bias" in options else set())
    assert {n for n in a if not torch.equal(a[n], before[n])} == trained


@pytest.mark.parametrize("lora_r, how, calls", [(0, killed, ["replace", "unlink"]), (2, killed, ["replace", "unlink"]),
                                                (0, no_space, ["replace"]), (0, killed, ["fsync"])])
def test_p42_a_run_ended_at_any_file_goes_on_to_the_same_end(lora_r, how, calls, toy_base, tmp_path, monkeypatch):
    # also between its last checkpoint, model.safetensors, config.json, summary.json and the end of the checkpoint
    go = lambda out: tune(out, toy_base, steps=3, lora_r=lora_r)
    whole, found, names = go(tmp_path / "whole"), [], lambda out: {path.name for path in out.iterdir()}
    want = bits(load_model(tmp_path / "whole"))
    assert "checkpoint.safetensors" not in names(tmp_path / "whole")
    for out, ended in kills(go, tmp_path, monkeypatch, calls, how):
        try:
            found.append(bits(load_model(out)) == want)
        except UserError as error:
            assert "no checkpoint there" in str(error) or lora_r and "run its command again" in str(error)
            found.append(None)
        if ended:
            assert go(out) == whole
        assert bits(load_model(out)) == want
        assert not (names(out) ^ names(tmp_path / "whole")) - {"checkpoint.part"}
    assert found[0] is None and found[-1] and len(found) == 11 + ("unlink" in calls)
    if not lora_r:
        assert found[3] is False and all(found[4:])                     # step 2, then the end


def test_lora_bias_trains_biases_and_norms_too_at_their_own_rate(tmp_path):
    model = adapt(tmp_path, vector_lr=.5, stir=0)
    before, opt = copy.deepcopy(model.state_dict()), Optimizer(model, .01, 10, weight_decay=0)
    assert vectors(before) == {n for n, t in before.items() if t.ndim == 1}
    assert torch.equal(logps(model), logps(gpt(dtype=torch.float32)))
    train_a_little(model, opt, 0, 1)
    moved = {n: float((t - before[n]).abs().max()) for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved.keys() == vectors(before) | {n for n in before if n.endswith("lora_B")}  # A has no gradient while B is 0
    assert all(x == pytest.approx(.5 if n in vectors(before) else .01, rel=.05) for n, x in moved.items())


def test_lora_bias_reference_is_the_base_to_the_bit_in_both_precisions(tmp_path):
    for precision in ("fp32", "bf16"):
        base = gpt(dtype=torch.float32)
        model = adapt(tmp_path, vector_lr=.01, stir=0)
        base.precision = model.precision = precision
        ref = reference(model)
        train_a_little(model, Optimizer(model, .05, 10), 0, 3)
        assert torch.equal(logps(ref), logps(base)) and (logps(model) - logps(base)).abs().max() > .1
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert vectors(names) == vectors(model.state_dict()) and len(names) == len(vectors(names)) + 16


def test_lora_of_a_new_model_is_refused(tmp_path):
    # frozen random weights under an adapter would learn nothing
    with pytest.raises(data.OptionError, match="--lora_r"):
        tune(tmp_path / "a", "new", n_layer=1, n_embd=16, n_head=2, block_size=128, lora_r=2)
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------------------ merging


@pytest.fixture
def eleven(monkeypatch):
    """Commands that ask for no tokenizer get that of these tests."""
    monkeypatch.setattr(M.Tokenizer, "load", lambda name: TOK)


def bits(model):
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("k", [2, 3, 7])
def test_merge_of_copies_is_the_copy_to_the_bit(k, tmp_path, capsys, eleven):
    model = gpt(dtype=torch.float32)
    M.merge(M.Merge(out=str(tmp_path / "m")), [keep(tmp_path / str(i), model) for i in range(k)])
    assert bits(load_model(tmp_path / "m", Setup(TOK))) == bits(model)
    assert str(tmp_path / "m") in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["", ".25,.75", "2,-1"])
def test_merge_is_the_weighted_sum(weights, tmp_path, monkeypatch, eleven):
    # by the command, as a person would type it
    models = [gpt(seed, torch.float32) for seed in (0, 1)]
    folders = [keep(tmp_path / str(i), m) for i, m in enumerate(models)]
    words = ["merge", *folders, "--out", str(tmp_path / "m")] + [f"--weights={weights}"] * bool(weights)
    monkeypatch.setattr(sys, "argv", ["model.py", *words])
    M.main()
    a, b = map(float, (weights or ".5,.5").split(","))
    made = json.loads((tmp_path / "m" / "config.json").read_text())["plainalign"]["made"]
    assert made == dict(of=[M.checksum(m.state_dict()) for m in models], weights=[a, b], slerp=False)
    got = load_model(tmp_path / "m", Setup(TOK)).state_dict()
    for name, t in got.items():
        x, y = (m.state_dict()[name].numpy().astype(np.float64) for m in models)
        assert np.array_equal(t.numpy(), (a * x + b * y).astype(np.float32)), name


@pytest.mark.parametrize("other, options, match", [
    (dict(n_layer=1), {}, "another architecture"), (dict(n_scores=1), {}, "another architecture"),
    (dict(tok=Twelve()), {}, "another tokenizer"),
    ({}, dict(weights="1"), "1 for 2"), ({}, dict(weights=".2,.3,.5"), "3 for 2|for 2 checkpoints"),
    ({}, dict(weights="a,b"), "not numbers"), ({}, dict(out=""), "--out"), (None, {}, "no checkpoint there"),
    ({}, dict(weights="1e39,1"), "not saved: in .* is -?inf")])
def test_merge_refuses_what_has_no_mean(other, options, match, tmp_path, eleven):
    a, b = keep(tmp_path / "a", gpt(dtype=torch.float32)), str(tmp_path / "b")
    if other is not None:
        keep(b, gpt(1, torch.float32, **other))
    with pytest.raises(UserError, match=match) as error:
        M.merge(M.Merge(**(dict(out=str(tmp_path / "m")) | options)), [a, b])
    assert "\n" not in str(error.value) and not (tmp_path / "m").exists()


def test_merge_twice_does_nothing_and_another_model_is_not_overwritten(tmp_path, capsys, eleven):
    folders = [keep(tmp_path / str(i), gpt(i, torch.float32)) for i in range(2)]
    there = lambda name: {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / name).iterdir()}
    M.merge(M.Merge(out=str(tmp_path / "m")), folders)
    save_checkpoint(tmp_path / "run", dict(model=gpt()), {}, dict(tokenizer=TOK.fingerprint))
    data.write_text(tmp_path / "run" / "run.json", "{}")                 # interrupted: no config.json yet
    before = {name: there(name) for name in ("m", "0", "run")}
    M.merge(M.Merge(out=str(tmp_path / "m")), folders)
    assert "nothing to do" in capsys.readouterr().out
    for out, options in (("m", dict(weights="1,0")), ("m", dict(slerp=True)), ("0", {}), ("run", {})):
        with pytest.raises(UserError, match="holds another model"):      # of others, or one of those to be averaged
            M.merge(M.Merge(out=str(tmp_path / out), **options), folders)
    for i in range(2):
        keep(folders[i], gpt(i + 5, torch.float32))                      # the same folders, other weights
    with pytest.raises(UserError, match="holds another model"):
        M.merge(M.Merge(out=str(tmp_path / "m")), folders)
    assert {name: there(name) for name in ("m", "run")} == {name: before[name] for name in ("m", "run")}


def arrow(radius, angle):
    return radius * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def test_slerp_turns_at_constant_speed():
    # in the plane: of two directions α and β it is the direction α + t (β - α), the short way round
    rng = random.Random(0)
    for _ in range(200):
        at, turn, t = rng.uniform(-3, 3), rng.uniform(-3.1, 3.1), rng.uniform(0, 1)
        r, s = rng.choice([(1, 1), (5, 5), (rng.uniform(.1, 9), rng.uniform(.1, 9))])
        e, f, way = arrow(1, at), arrow(1, at + turn), arrow(1, at + t * turn)
        p, q = np.linalg.solve(torch.stack([e, f], 1).numpy(), way.numpy())  # how much of each the arc takes
        got = M.slerp(r * e, s * f, t)
        close(got, p * r * e + q * s * f, 1e-8)
        if r == s:
            close(got.norm(), r, 1e-8)
            close(got, r * way, 1e-8)


def test_slerp_keeps_the_norm_of_equal_norms_and_divides_the_angle():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 7, generator=rng, dtype=torch.float64) for _ in "ab")
    b *= a.norm() / b.norm()
    angle = lambda x, y: math.acos(float((x * y).sum() / x.norm() / y.norm()))
    for t in (.1, .25, .5, .9):
        got = M.slerp(a, b, t)
        close(got.norm(), a.norm()), close(got, M.slerp(b, a, 1 - t))
        close([angle(a, got), angle(got, b)], [t * angle(a, b), (1 - t) * angle(a, b)], 1e-9)
        assert float(((1 - t) * a + t * b).norm()) < .95 * float(a.norm())       # the chord shrinks
    close(M.slerp(a, b, 0.0), a, 1e-15), close(M.slerp(a, b, 1.0), b, 1e-15)


@pytest.mark.parametrize("c", [1.0, 2.0, 1 + 1e-9, 1e-30, 0.0, -1.0, -.5, -1 - 1e-9])
def test_slerp_of_parallel_opposite_and_zero_tensors_is_the_chord(c):
    a = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in (0.0, .3, .5, 1.0):
        for x, y in ((a, c * a), (c * a, a)):
            got = M.slerp(x, y, t)
            assert got.isfinite().all()
            close(got, (1 - t) * x + t * y, 1e-12)
    assert M.slerp(0 * a, 0 * a, .5).eq(0).all()


def test_slerp_is_continuous_where_it_turns_into_the_chord():
    for tilt in (1e-3, 1e-5, 1.5e-6, 1.3e-6, 1e-7, 1e-9, 0.0):
        a, b = arrow(2, .4), arrow(2, .4 + tilt)
        close(M.slerp(a, b, .25), arrow(2, .4 + .25 * tilt), 1e-11)
        assert M.slerp(a, -b, .5).isfinite().all()


@pytest.mark.parametrize("weights, t", [("", .5), (".25,.75", .75), (".9,.1", .1)])
def test_merge_slerp_goes_tensor_by_tensor_towards_the_second(weights, t, tmp_path, monkeypatch, capsys, eleven):
    models = [gpt(seed, torch.float32) for seed in (0, 1)]
    folders = [keep(tmp_path / str(i), m) for i, m in enumerate(models)]
    words = ["model.py", "merge", *folders, "--out", str(tmp_path / "m"), "--slerp"]
    words += [f"--weights={weights}"] * bool(weights)
    monkeypatch.setattr(sys, "argv", words)
    M.main()
    chord = 0
    for name, got in load_model(tmp_path / "m", Setup(TOK)).state_dict().items():
        a, b = (m.state_dict()[name].numpy().astype(np.float64) for m in models)
        cos = (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
        angle = math.acos(cos)
        arc = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        assert np.allclose(got, arc, rtol=1e-6, atol=1e-6), name
        chord += np.allclose(got, (1 - t) * a + t * b, atol=1e-3)
    assert not chord                                                # not one tensor is the plain mean
    path = tmp_path / "m" / "model.safetensors"
    before = path.read_bytes()
    M.main()
    assert "is finished; nothing to do" in capsys.readouterr().out and path.read_bytes() == before
    monkeypatch.setattr(sys, "argv", [w for w in words if w != "--slerp"])
    with pytest.raises(UserError, match="holds another model"):     # the plain mean is another model
        M.main()
    assert path.read_bytes() == before


def test_merge_slerp_with_all_the_weight_on_one_is_that_one_to_the_bit(tmp_path, eleven):
    models = [gpt(seed, torch.float32) for seed in (0, 1)]
    folders = [keep(tmp_path / str(i), m) for i, m in enumerate(models)]
    for name, weights, model in (("a", "1,0", models[0]), ("b", "0,1", models[1])):
        M.merge(M.Merge(out=str(tmp_path / f"m{name}"), weights=weights, slerp=True), folders)
        assert bits(load_model(tmp_path / f"m{name}", Setup(TOK))) == bits(model)
    M.merge(M.Merge(out=str(tmp_path / "c"), slerp=True), [folders[0], keep(tmp_path / "copy", models[0])])
    assert bits(load_model(tmp_path / "c", Setup(TOK))) == bits(models[0])


@pytest.mark.parametrize("k, weights", [(3, ""), (3, ".2,.3,.5"), (2, "1,1"), (2, ".5,.4"), (2, "0,0"), (1, "")])
def test_merge_slerp_goes_between_two_with_weights_that_add_up_to_1(k, weights, tmp_path):
    folders = [keep(tmp_path / str(i), gpt(i, torch.float32)) for i in range(k)]
    with pytest.raises(UserError, match="^--slerp [^\n]*two[^\n]*1$"):
        M.merge(M.Merge(out=str(tmp_path / "m"), weights=weights, slerp=True), folders)
    assert not (tmp_path / "m").exists()




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
        close(got.exp().sum(1), [1.0] * 13, 1e-5)


def test_choice_logprobs_see_no_padding_and_keep_the_order(tmp_path):
    model, rng = talker(tmp_path / "lm", block_size=48)[0], random.Random(1)
    prompts = [[rng.randrange(WORDS.base) for _ in range(n)] for n in (9, 3, 30, 1, 16)]
    got = M.choice_logprobs(model, prompts, ["1", "2"], 10 ** 6)
    for order in ([4, 3, 2, 1, 0], [2, 0], [1]):
        close(M.choice_logprobs(model, [prompts[i] for i in order], ["1", "2"], 10 ** 6), got[order], 1e-5)
    close(M.choice_logprobs(model, prompts, ["2", "1"], 64), got.flip(1), 1e-5)


@pytest.mark.parametrize("choices", [["10", "1"], ["1", ""], ["1", "no way"]])
def test_choices_of_several_tokens_are_refused_in_one_line(choices, tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*one token[^\n]*$"):
        M.choice_logprobs(talker(tmp_path / "lm")[0], [[1, 2]], choices, 64)


def test_a_rollout_of_rows_is_what_the_sampler_lays_out():
    drawn = rollout(gpt(std=.2), RAGGED, n=3)
    done = [i for i, f in enumerate(drawn.finished.tolist()) if f]
    drawn = drawn.take(done)
    rows = [(ids, [0] * p + [1] * (len(ids) - p)) for ids, p in zip(rows_of(drawn), drawn.prompt_len)]
    roll = M.Rollout.of(rows, TOK)
    assert len(rows) > 10 and roll.prompt_len == drawn.prompt_len and roll.lengths == drawn.lengths
    T = max(drawn.lengths)
    assert torch.equal(roll.tokens[:, :T], drawn.tokens[:, :T])
    assert torch.equal(roll.mask[:, :T - 1], drawn.mask[:, :T - 1])
    assert (roll.tokens[:, T:] == PAD).all() and not roll.mask[:, T - 1:].any() and roll.mask.dtype == drawn.mask.dtype
    assert roll.mask.shape == roll.logp.shape == (len(rows), roll.tokens.shape[1] - 1)
    assert torch.equal(roll.finished, drawn.finished) and roll.finished.all() and not roll.logp.any()
    assert roll.responses() == drawn.responses()


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
    head = json.dumps(head).encode()
    return struct.pack("<Q", len(head)) + head + body


def hf(folder, tensors=None, config=None, kind="safe"):
    """A folder with a GPT-2 in Hugging Face's layout, in one of the ways in which such are found."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = golden_weights() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(THERE if config is None else config))
    names = sorted(tensors)
    halves = {"a-00001.bin": names[::2], "a-00002.bin": names[1::2]}
    if kind == "safe":
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
    elif kind == "safe shards":
        for shard, held in halves.items():
            (folder / shard).write_bytes(safetensors({n: tensors[n] for n in held}))
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            dict(metadata={}, weight_map={n: shard for shard, held in halves.items() for n in held})))
    elif kind == "bin shards":
        for shard, held in halves.items():
            torch.save({n: tensors[n] for n in held}, folder / shard)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
            dict(weight_map={n: shard for shard, held in halves.items() for n in held})))
    else:  # the oldest files: a bare trunk, masks in it, torch's first format
        if kind == "old bin":
            tensors = {n.removeprefix("transformer."): t for n, t in tensors.items()}
            tensors |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "old bin")
    return folder


@pytest.mark.parametrize("kind", ["safe", "safe shards", "bin", "bin shards", "old bin"])
def test_gpt2_of_hugging_face_gives_the_logits_of_transformers(kind, tmp_path):
    """The numbers are what transformers 5.23 computes in float64 from the same weights."""
    model = load_model(hf(tmp_path / "hf", kind=kind)).double()
    out = model.logits(model(torch.tensor([[5, 250, 17, 99, 256, 0, 1]])))[0].detach()
    want = {(0, 3): -1.987912682831762, (1, 200): .7154162144844138, (3, 0): 2.031249966184696,
            (5, 128): 2.2609788704013063, (6, 256): 2.063353486926129}
    assert out.shape == (7, 257)
    for (t, v), number in want.items():
        assert float(out[t, v]) == pytest.approx(number, abs=2e-6)  # loaded as float32


def test_gpt2_vocabulary_grows_by_our_special_tokens_and_keeps_its_ids(tmp_path):
    """Id 256, its end of text, is our end token; the others are the mean row; rows that only pad the matrix are 0."""
    there, model = golden_weights()["transformer.wte.weight"].float(), load_model(hf(tmp_path / "hf"), Setup(BYTES))
    wte = model.transformer.wte.weight.detach()
    assert BYTES.end == 256 and model.config.vocab_size == BYTES.n_vocab == 261 and wte.shape == (320, 8)
    assert torch.equal(wte[:257], there) and not wte[261:].any()
    for row in wte[257:261]:
        close(row, there.mean(0), 1e-6)
    assert model.fingerprint == BYTES.fingerprint
    plain = load_model(hf(tmp_path / "hf"))
    ids = torch.tensor([[5, 250, 17, 256]])
    close(model.logits(model(ids))[..., :257], plain.logits(plain(ids)), 1e-6)


def test_gpt2_half_precision_weights_and_a_head_that_is_the_embedding_load_as_float32(tmp_path):
    tensors = {n: t.half() for n, t in golden_weights().items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    model = load_model(hf(tmp_path / "hf", tensors))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, tensors["transformer.h.1.mlp.c_fc.weight"].float())


def small(seed=3, **size):
    """A model of ours, of the golden model's size and with our special tokens."""
    return gpt(seed, torch.float32, tok=BYTES, **dict(vocab_size=261, n_embd=8) | size)


@pytest.mark.parametrize("n_scores, lora", [(0, 0), (0, 2), (1, 0), (3, 2)])
def test_gpt2_what_we_write_has_hugging_faces_names_and_shapes_and_loads_as_the_same_function(n_scores, lora, tmp_path):
    ours = small(n_scores=n_scores)
    if lora:
        ours.add_lora(lora, 4.0)
        for layer in ours.loras():
            torch.nn.init.normal_(layer.lora_B, std=.2)
    assert keep(tmp_path, ours) and {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    want = {name: tuple(t.shape) for name, t in golden_weights().items()} | {"transformer.wte.weight": (261, 8)}
    tensors, meta = load_tensors(tmp_path / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == want | (
        {"score.weight": (n_scores, 8)} if n_scores else {})
    assert header_of((tmp_path / "model.safetensors").read_bytes())[0]["__metadata__"]["format"] == "pt"
    back, ids = load_model(tmp_path, Setup(BYTES)), torch.tensor([[5, 250, 17, 256]])
    assert back.config == ours.config and back.fingerprint == BYTES.fingerprint
    read = (lambda model: model.scores(model(ids))) if n_scores else (lambda model: model.logits(model(ids)))
    close(read(back), read(ours), 1e-5)
    assert bits(back) == bits(copy.deepcopy(ours).merge_lora() if lora else ours)


@pytest.mark.parametrize("n_scores", [0, 2])
def test_gpt2_what_we_write_is_what_transformers_loads(n_scores, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, ids = small(n_scores=n_scores), torch.tensor([[5, 250, 17, 99]])
    keep(tmp_path, ours)
    auto = transformers.AutoModelForSequenceClassification if n_scores else transformers.AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    head = {"lm_head.weight"} - ({"lm_head.weight"} if n_scores else set())    # tied to the embedding
    assert set(theirs.state_dict()) == set(ours.state_dict()) | head
    hidden = ours(ids)
    close(theirs(ids).logits, ours.scores(hidden)[:, -1] if n_scores else ours.logits(hidden), 1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id == BYTES.end


def spoilt(config=None, drop=(), tensors=None, kind="safe", write=None):
    """How to spoil a folder: other config values, missing tensors, changed ones, or files overwritten at the end."""
    def make(folder):
        found = {n: t for n, t in (golden_weights() | (tensors or {})).items() if n not in drop}
        hf(folder, found, {k: v for k, v in (THERE | (config or {})).items() if v is not None}, kind)
        for name, content in (write or {}).items():
            old = (folder / name).read_bytes() if (folder / name).exists() else b""
            (folder / name).write_bytes(content(old) if callable(content) else content)
    return make


@pytest.mark.parametrize("make, match", [
    (spoilt(config=dict(activation_function="relu")), r"config.json: activation_function is 'relu'"),
    (spoilt(config=dict(model_type="llama")), r"config.json: model_type is 'llama'"),
    (spoilt(config=dict(n_inner=7)), r"config.json: n_inner is 7"),
    (spoilt(config=dict(n_head=None)), r"config.json: n_head is None, and has to be a whole number"),
    (spoilt(config=dict(n_head="2")), r"config.json: n_head is '2', and has to be"),
    (spoilt(config=dict(n_embd=0)), r"config.json: n_embd is 0, and has to be"),
    (spoilt(config=dict(vocab_size=257.0)), r"config.json: vocab_size is 257.0, and has to be"),
    (spoilt(config=dict(n_positions=16 * 10 ** 13)), r"wpe.weight is \(16, 8\), not"),
    (spoilt(config=dict(n_embd=2 ** 40)), r"wte.weight is missing, or not \(257, 1099511627776\)"),
    (spoilt(config=dict(n_layer=10 ** 12)), r"2 layers, and its config says 1000000000000"),
    (spoilt(tensors={"score.weight": torch.tensor(1.0)}), r"score"),
    (spoilt(config=dict(plainalign={}, resid_pdrop="x")), r"dropout x: must be at least 0 and below 1"),
    (spoilt(tensors={"transformer.h.0.ln_1.bias": torch.ones(8, dtype=torch.complex64)}, kind="bin"), r"ln_1.bias is missing"),
    (spoilt(tensors={"transformer.ln_f.bias": torch.ones(8, device="meta")}, kind="bin"), r"something else than named"),
    (spoilt(write={"config.json": b'{"model_type":' + b"[" * 200_000}), r"config.json: no JSON"),
    (spoilt(kind="safe shards", write={"model.safetensors.index.json": b'{"weight_map": {}}'}), r"no weight_map"),
    (spoilt(config=dict(tie_word_embeddings=False)), r"config.json: tie_word_embeddings is False"),
    (spoilt(config=dict(vocab_size=300)), r"wte.weight is missing, or not \(300, 8\)"),
    (spoilt(config=dict(n_layer=3)), r"model.safetensors: 2 layers, and its config says 3"),
    (spoilt(config=dict(n_positions=32)), r"wpe.weight is \(16, 8\), not \(32, 8\)"),
    (spoilt(drop=["transformer.h.1.mlp.c_fc.weight"]), r"h.1.mlp.c_fc.weight is missing"),
    (spoilt(drop=["transformer.wte.weight"]), r"wte.weight is missing"),
    (spoilt(tensors={"transformer.h.0.extra": torch.ones(1)}), r"h.0.extra does not belong"),
    (spoilt(tensors={"lm_head.weight": torch.ones(257, 8)}), r"lm_head.weight is not the embedding"),
    (spoilt(write={"config.json": b'{"model_type": '}), r"config.json: no JSON"),
    (spoilt(write={"config.json": b"\xff\xfe"}), r"config.json: no JSON"),
    (spoilt(write={"model.safetensors": lambda old: old[:-5]}), r"model.safetensors: .*not where they should be"),
    (spoilt(write={"model.safetensors": b""}), r"model.safetensors: not a checkpoint"),
    (spoilt(kind="bin", write={"pytorch_model.bin": lambda old: old[:-90]}), r"pytorch_model.bin: not readable"),
    (spoilt(kind="old bin", write={"pytorch_model.bin": lambda old: old[:-90]}), r"pytorch_model.bin: not readable"),
    (spoilt(kind="bin", write={"pytorch_model.bin": b"a page of HTML"}), r"pytorch_model.bin: not readable"),
    (spoilt(kind="safe shards", write={"a-00002.bin": lambda old: old[:-5]}), r"a-00002.bin: .*not where"),
    (spoilt(kind="safe shards", write={"model.safetensors.index.json": json.dumps(
        dict(weight_map={"x": "../other/model.safetensors"})).encode()}), r"weight_map does not name files"),
    (spoilt(kind="safe shards", write={"model.safetensors.index.json": b"[1]"}), r"index.json: not a JSON object"),
    (spoilt(kind="safe shards", write={"model.safetensors.index.json": json.dumps(
        dict(weight_map={"x": "a-00001.bin"})).encode()}), r"index.json: x is not in a-00001.bin"),
    (spoilt(kind="safe shards", write={"model.safetensors.index.json": json.dumps(
        dict(weight_map={"x": "gone.bin"})).encode()}), r"gone.bin: no such file"),
])
def test_p46_a_gpt2_that_is_not_one_is_refused_in_one_line(make, match, tmp_path):
    make(tmp_path / "hf")
    with pytest.raises(UserError, match=match) as caught:
        load_model(tmp_path / "hf", Setup(BYTES))
    assert "\n" not in str(caught.value)


def test_p46_weights_that_are_missing_and_another_vocabulary_are_named(tmp_path):
    (hf(tmp_path / "hf") / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        load_model(tmp_path / "hf")
    with pytest.raises(UserError, match=r"257 tokens, and --tokenizer has 763, which"):
        load_model(hf(tmp_path / "hf"), Setup(Tokenizer.load("toy")))
    keep(tmp_path / "ours", small())
    with pytest.raises(UserError, match="trained with another tokenizer"):      # by the mark in its config.json
        load_model(tmp_path / "ours", Setup(Tokenizer.load("toy")))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_p45_a_hostile_file_of_weights_is_refused_and_not_run(name, protocol, tmp_path):
    bomb, folder = Bomb(), hf(tmp_path / "hf", kind="bin")
    bomb.target = str(tmp_path / "exploded")
    (folder / name).write_bytes(pickle.dumps(bomb, protocol))
    with pytest.raises(UserError, match=f"{name}: not"):
        load_model(folder, Setup(BYTES))
    torch.save({"transformer.wte.weight": bomb}, folder / "pytorch_model.bin", pickle_protocol=max(2, protocol))
    (folder / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match="pytorch_model.bin: not readable"):
        load_model(folder, Setup(BYTES))
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="something else than named tensors"):
        load_model(folder, Setup(BYTES))
    assert not Path(bomb.target).exists()


def test_p46_a_run_folder_of_an_earlier_version_is_one_clear_line(tmp_path):
    """Its config.json holds the options, and its checkpoint calls the layers (out, in)."""
    (tmp_path / "config.json").write_text(json.dumps(dict(lr=1e-3)))
    with pytest.raises(UserError, match="a run folder of an earlier version, or no model's; run what made it again$"):
        load_model(tmp_path, Setup(TOK))
    save_tensors(tmp_path / "checkpoint.safetensors", {"model/x": torch.ones(1)}, dict(config=dict(model={})))
    with pytest.raises(UserError, match="does not say what model it holds"):
        load_model(tmp_path, Setup(TOK))
    with pytest.raises(UserError, match="holds a model that no run of this version made: choose another --out$"):
        sft.train(sft.Config(out=str(tmp_path), init="new", device="cpu", steps=1, overwrite=True))


@pytest.mark.parametrize("mark", [dict(tokenizer=[]), dict(), None, [], "someone else's"], ids=str)
def test_p46_a_foreign_mark_is_none(mark, tmp_path):
    folder = hf(tmp_path / "hf", config=THERE | dict(plainalign=mark))
    assert load_model(folder, Setup(BYTES)).fingerprint == BYTES.fingerprint
    assert load_model(folder).fingerprint is None


def test_p46_options_of_a_run_that_are_none_end_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text("null")
    with pytest.raises(UserError, match="run.json: not a run's options"):
        sft.train(sft.Config(out=str(tmp_path), init="new", device="cpu", steps=1))


def test_p42_a_run_does_not_write_over_a_gpt2_of_hugging_face(tmp_path):
    before = (hf(tmp_path / "hf") / "config.json").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds a model that no run of this version made"):
            sft.train(sft.Config(out=str(tmp_path / "hf"), init="new", device="cpu", steps=1, overwrite=overwrite))
    assert (tmp_path / "hf" / "config.json").read_bytes() == before


def test_merge_of_gpt2s_of_hugging_face_from_the_command_line(tmp_path, monkeypatch, capsys):
    """It asks for their tokenizer, by which they grow, and what it makes needs none but that."""
    vocabulary = tmp_path / "bytes.tiktoken"
    vocabulary.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))

    def run(*argv):
        """(exit status, what it says) of python model.py *argv."""
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, argv)])
        capsys.readouterr()
        try:
            data.guard(M.main)
        except SystemExit as stop:
            return stop.code, "".join(capsys.readouterr())
        return 0, "".join(capsys.readouterr())
    folder, out, tok = hf(tmp_path / "hf"), tmp_path / "m", ("--tokenizer", vocabulary)
    assert run("merge", folder, folder, "--out", out, *tok)[0] == 0
    assert bits(load_model(out, Setup(BYTES))) == bits(load_model(folder, Setup(BYTES)))
    facts = json.loads((out / "config.json").read_text())["plainalign"]
    assert facts["tokenizer"] == BYTES.fingerprint and facts["made"]["weights"] == [.5, .5] and len(
        set(facts["made"]["of"])) == 1
    assert run("merge", folder, out, "--out", tmp_path / "again", *tok)[0] == 0
    for words, status, match in ((("--out", "x"), 1, "257 tokens, and --tokenizer has 763"), (tok, 2, "--out")):
        code, said = run("merge", folder, folder, *words)
        assert code == status and match in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------ adapters, GPT-2: more


def test_rows_of_a_rollout_end_with_the_response_and_target_it_alone():
    drawn = rollout(gpt(std=.2), RAGGED, n=3)
    assert 5 < sum(drawn.finished) < len(drawn.finished)
    for (ids, target), row, mask, p in zip(drawn.rows(), drawn.tokens.tolist(), drawn.mask.tolist(), drawn.prompt_len):
        n = p + int(sum(mask))
        assert ids == row[:n] and target == [0] * p + [1] * (n - p) == [0] + [int(x) for x in mask[:n - 1]]


def test_beyond_a_chunk_the_head_runs_again_in_the_backward_pass():
    """So no chunk's logits wait for it; in one chunk, or without a gradient, nothing is computed twice."""
    calls, where = [], torch.ones(1, 5, dtype=torch.bool)

    def head(x, y):
        calls.append(len(x))
        return x.exp().sum(-1), (x * y).exp().sum(-1)
    x, y = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in "xy")
    for chunk, grad, want in ((2, True, [2, 2, 1] * 2), (2, False, [2, 2, 1]), (5, True, [5])):
        calls.clear()
        with torch.set_grad_enabled(grad):
            out = M.at_positions(head, where, x, y, chunk=chunk)
            if grad:
                torch.stack(out).sum().backward()
        assert sorted(calls) == sorted(want) and out[0].requires_grad == grad
        close(torch.stack(out)[:, 0], torch.stack([x.exp().sum(-1), (x * y).exp().sum(-1)]))


def test_p10_logps_of_policy_and_reference_are_at_the_sampling_temperature_and_without_gradient(tmp_path):
    model, base = adapt(tmp_path), gpt(dtype=torch.float32)
    ref = reference(model)
    train_a_little(model, Optimizer(model, .05, 10), 0, 3)
    roll, merged = rollout(model, [[1, 2], [3, 4, 5, 6], [7]], n=2, temperature=.6), copy.deepcopy(model).merge_lora()
    for temperature in (.6, 1.7):
        cfg = SimpleNamespace(micro_tokens=32, temperature=temperature)
        got = M.logps(model, roll, cfg) - M.logps(ref, roll, cfg)
        assert not got.requires_grad and got.shape == roll.mask.shape and not got[roll.mask == 0].any()
        for line, (ids, target) in zip(got, roll.rows()):
            a, b = (np.array(oracle_logps(net, ids, temperature)[0]) for net in (merged, base))
            close(line[:len(ids) - 1], (a - b) * np.array(target[1:]), 1e-4)
    assert got.abs().max() > .1


def test_lora_bias_of_a_reward_model_leaves_its_head_where_it_is_without_the_adapter(tmp_path):
    model = adapt(tmp_path, n_scores=1, vector_lr=.01, stir=0)
    tokens, mask = collate(ROWS, TOK)
    base = load_model(tmp_path / "base", Setup(TOK), n_scores=1)
    torch.nn.init.normal_(model.score.weight)
    base.score.load_state_dict(model.score.state_dict())
    ref = reference(model)
    for p in model.parameters():
        p.data += .2 * p.requires_grad                                    # the adapter is trained, and the head
    assert base.score.weight.all() and not torch.equal(ref.score.weight, model.score.weight)
    assert torch.equal(response_scores(ref, tokens, mask), response_scores(base, tokens, mask))


def test_lora_options_reach_the_adapter_its_optimizer_and_its_seed(tmp_path):
    keep(tmp_path / "base", gpt(dtype=torch.float32))

    def prepared(**options):
        torch.rand(int(options.get("seed", 0)) + len(made))               # whatever was drawn before
        made.append(load_model(tmp_path / "base", Setup(TOK)))
        made[-1].prepare(sft.Config(lora_r=2, **options))
        return made[-1]
    made = []
    opt = Optimizer(prepared(lora_bias=.02), .001, 10, warmup=4)
    for step, share in ((0, .25), (3, 1.0), (9, None)):                   # the schedule is both rates'
        opt.at(step)
        (matrices, a), (biases, b) = ((group["params"], group["lr"]) for group in opt.groups())
        assert {p.ndim for p in matrices} == {2} and {p.ndim for p in biases} == {1} and len(biases) > 8
        assert b == pytest.approx(20 * a) and (share is None or a == pytest.approx(.001 * share))
    first, again, other = (torch.cat([p.flatten() for n, p in prepared(seed=seed).named_parameters() if "lora_A" in n])
                           for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not made[-1].vector_lr


def pickled(content):
    """The bytes of a pytorch_model.bin."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Sparse invariant")  # of some versions of torch, for the sparse one
@pytest.mark.parametrize("make, match", [
    (spoilt(config=dict(layer_norm_epsilon=1e-6)), r"config.json: layer_norm_epsilon is 1e-06"),
    (spoilt(config=dict(scale_attn_weights=False)), r"config.json: scale_attn_weights is False"),
    (spoilt(config=dict(scale_attn_by_inverse_layer_idx=True)), r"json: scale_attn_by_inverse_layer_idx is True"),
    (spoilt(config=dict(add_cross_attention=True)), r"config.json: add_cross_attention is True"),
    (spoilt(tensors={"transformer.h.1.mlp.c_fc.weight": torch.ones(8, 4, 8)}), r"c_fc.weight is \(8, 4, 8\), not"),
    (spoilt(tensors={"transformer.wte.weight": torch.ones(257)}), r"wte.weight is missing, or not \(257, 8\)"),
    (spoilt(tensors={"transformer.wte.weight": torch.ones(257, 9)}), r"wte.weight is missing, or not \(257, 8\)"),
    (spoilt(kind="bin", tensors={"transformer.x": 1}), r"something else than named tensors"),
    (spoilt(kind="bin", write={"pytorch_model.bin": pickled({7: torch.ones(1)})}), r"something else than named"),
    (spoilt(kind="bin", tensors={"transformer.x": torch.ones(2, 2).to_sparse()}), r"something else than named tensors"),
    (spoilt(kind="bin", write={"pytorch_model.bin": pickled({"x": Fraction(1, 2)})}), r"bin: not readable"),
    (spoilt(kind="safe shards", write={"model.safetensors.index.json": b'{"weight_map": {"x": 3}}'}), r"not name"),
])
def test_p46_more_that_is_no_gpt2_of_ours_is_refused_in_one_line(make, match, tmp_path):
    make(tmp_path / "hf")
    with pytest.raises(UserError, match=match) as caught:
        load_model(tmp_path / "hf", Setup(BYTES))
    assert "\n" not in str(caught.value)


def test_p46_a_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config.json: Is a directory$"):
        load_model(tmp_path)
    with pytest.raises(UserError, match=r"index.json: No such file"):
        M.read_json(tmp_path / "index.json")


def test_gpt2_that_says_what_goes_without_saying_loads(tmp_path):
    """Every default spelt out; a mark that is none of ours; both kinds of weights, of which safetensors counts."""
    config = THERE | M.GPT2 | dict(n_inner=32, plainalign="someone else's", n_ctx=16)
    folder = hf(tmp_path / "hf", config=config)
    hf(folder, {name: t * 2 for name, t in golden_weights().items()}, config, kind="bin")
    want = load_model(hf(tmp_path / "plain"), Setup(BYTES)).state_dict()
    assert all(torch.equal(t, want[name]) for name, t in load_model(folder, Setup(BYTES)).state_dict().items())


def test_gpt2_half_precision_weights_grow_by_their_mean_in_float32(tmp_path):
    tensors = {n: t.half() for n, t in golden_weights().items()}
    wte = load_model(hf(tmp_path / "hf", tensors), Setup(BYTES)).transformer.wte.weight
    want = tensors["transformer.wte.weight"].float().mean(0)
    assert wte.dtype == torch.float32 and (wte[257:261] - want).abs().max() < 1e-7


def test_gpt2_masks_of_old_files_are_left_out_whatever_their_type(tmp_path):
    square = torch.ones(1, 1, 16, 16)
    masks = {"transformer.h.0.attn.bias": square.tril(), "transformer.h.1.attn.masked_bias": torch.ones(1),
             "transformer.h.1.attn.bias": square.to(torch.uint8), "transformer.ids": torch.arange(3)}
    want = load_model(hf(tmp_path / "plain")).state_dict()
    got = load_model(hf(tmp_path / "hf", golden_weights() | masks, kind="bin")).state_dict()
    assert all(torch.equal(t, got[name]) for name, t in want.items()) and want.keys() == got.keys()


@pytest.mark.parametrize("n_scores", [0, 3])
def test_gpt2_what_we_write_tells_transformers_what_it_is_and_leaves_the_model_alone(n_scores, tmp_path):
    model = small(n_scores=n_scores, dropout=.1)
    before = bits(model)
    keep(tmp_path, model)
    assert bits(model) == before
    facts = json.loads((tmp_path / "config.json").read_text())
    labels = facts.pop("id2label", {})
    assert list(labels) == [str(k) for k in range(n_scores)] and len(set(labels.values())) == n_scores
    assert facts == M.GPT2 | dict(
        architectures=["GPT2ForSequenceClassification" if n_scores else "GPT2LMHeadModel"], vocab_size=261,
        n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=.1, embd_pdrop=.1, attn_pdrop=0.0, dtype="float32",
        bos_token_id=256, eos_token_id=256, pad_token_id=257, plainalign=dict(tokenizer=BYTES.fingerprint))
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert "\u0120" in text and json.loads(text) == BYTES.huggingface()["tokenizer.json"]


def test_gpt2_dropout_of_others_is_not_taken_over_and_of_ours_is(tmp_path):
    keep(tmp_path / "ours", small(dropout=.25))
    assert load_model(tmp_path / "ours", Setup(BYTES)).config.dropout == .25
    assert load_model(hf(tmp_path / "hf"), Setup(BYTES)).config.dropout == 0         # its config.json says .1


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_p42_merge_killed_at_any_file_runs_again(call, tmp_path, monkeypatch):
    # config.json was written first, and the next try found "another model"
    monkeypatch.setattr(M.Tokenizer, "load", lambda name: BYTES)
    folder, cuts = str(hf(tmp_path / "hf")), 0
    go = lambda out: M.merge(M.Merge(out=str(out)), [folder])
    for out, ended in kills(go, tmp_path, monkeypatch, [call]):
        if ended:
            with pytest.raises(UserError):                                       # half of it is no model
                load_model(out, Setup(BYTES))
            go(out)
        assert bits(load_model(out, Setup(BYTES))) == bits(load_model(folder, Setup(BYTES)))
        assert not list(out.glob("*.part"))
        cuts += ended
    assert cuts == 5
