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
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model as M
import runs
import sft
from data import OptionError, Tokenizer, UserError, collate
from model import (GPT, Cache, GPTConfig, Optimizer, Reward, Rollout, Setup, attend, bias_of, generate, load_model,
                   load_tensors, reference, response_scores, sample, save_checkpoint, save_tensors, token_logprobs,
                   token_scores, write_model)

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


TOK = Eleven()

# ------------------------------------------------------------------------------------------------ models, oracles


def gpt(seed=0, dtype=torch.float64, std=.3, tok=TOK, **size):
    """A tiny GPT in eval mode whose every parameter is N(0, std), biases and norms included."""
    usual = dict(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=16)
    config = GPTConfig(**usual | size)
    model = GPT(config, tok).to(dtype).eval()
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        p.data = (drawn * std).to(dtype)
    model.transformer.wte.weight.data[config.vocab_size:] = 0
    return model


def bits(model):
    """{name: the bytes of the weight}."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def gpt2(model, ids):
    """GPT-2 written from its paper, one head and one query at a time: ids -> states (T, C), logits (T, V), float64."""
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    C, n_head = model.config.n_embd, model.config.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return centred / deviation * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def head(q, k, v):
        out = np.zeros_like(v)
        for i in range(len(q)):                             # a query looks at itself and at what came before
            seen = slice(i + 1)
            score = k[seen] @ q[i] / math.sqrt(C / n_head)
            p = np.exp(score - score.max())
            out[i] = p / p.sum() @ v[seen]
        return out

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:len(ids)]
    for layer in range(model.config.n_layer):
        at = f"transformer.h.{layer}."
        qkv = linear(norm(x, at + "ln_1"), at + "attn.c_attn")
        q, k, v = qkv.reshape(len(ids), 3, n_head, -1).transpose(1, 2, 0, 3)
        heads = list(map(head, q, k, v))
        x = x + linear(np.concatenate(heads, axis=1), at + "attn.c_proj")
        u = linear(norm(x, at + "ln_2"), at + "mlp.c_fc")
        bend = math.sqrt(2 / math.pi) * (u + .044715 * u ** 3)
        gelu = .5 * u * (1 + np.tanh(bend))
        x = x + linear(gelu, at + "mlp.c_proj")
    x = norm(x, "transformer.ln_f")
    return x, x @ w["transformer.wte.weight"][:model.config.vocab_size].T


def alone(model):
    """The same weights, whatever the model is made of, in float64, to read one row at a time: what batches, padding,
    the cache and the sampler must not change. That it is GPT-2's forward is another test's matter."""
    slow = copy.deepcopy(model).double().eval().requires_grad_(False)
    slow.precision = "fp32"
    return slow


def slow_states(model, ids):
    return alone(model)(torch.tensor([ids]))[0]


def slow_logits(model, ids):
    return alone(model).logits(slow_states(model, ids))


def slow_scores(model, ids):
    """Every score after every token, (T, n_scores)."""
    return slow_states(model, ids) @ alone(model).score.weight.T


def slow_logps(model, ids, temperature=1.0):
    """log π of each token but the first, and the entropy it was drawn with: (T-1,) each."""
    return runs.spoken(alone(model), ids, 1, temperature)


def row(prompt, response):
    """(ids, target), with the target on the response."""
    target = [0] * len(prompt) + [1] * len(response)
    return prompt + response, target


def random_ids(n, rng):
    return [rng.randrange(1, V) for _ in range(n)]


def random_rows(lengths, seed=0):
    """Rows of these (prompt, response) lengths."""
    rng = random.Random(seed)
    return [row(random_ids(prompt, rng), random_ids(response, rng)) for prompt, response in lengths]


LENGTHS = (1, 3), (4, 9), (9, 1), (2, 14), (6, 4)
ROWS = random_rows(LENGTHS)
BATCH = collate(ROWS, TOK)  # tokens (5, 16), mask (5, 15)


def gradients(model, loss):
    """Of all parameters, as one vector."""
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def close(got, want, tol=1e-10):
    runs.close(got, want, atol=tol, rtol=tol)


def refused(match, call, *args, kind=UserError, **options):
    """The call is a UserError of one line that says this."""
    with pytest.raises(kind, match=match) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("length", [1, 16])
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
    model = GPT(GPTConfig(vocab_size=100, n_layer=8, n_embd=64, n_scores=2))
    tokens = torch.randint(0, 100, (8, 16))
    loss = -token_logprobs(model, tokens, torch.ones(8, 15)).mean()
    assert loss.item() == pytest.approx(math.log(100), abs=.05)
    mlp = model.transformer.h[3].mlp
    assert mlp.c_proj.weight.std().item() == pytest.approx(.02 / 4, abs=.001)
    assert mlp.c_fc.weight.std().item() == pytest.approx(.02, abs=.002)
    assert not model.score.weight.any(), "a random head is a random baseline"


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, .03)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 6])
def test_attend_equals_torchs_kernel(T, masked, dtype, tol):
    # the plain operators of the CPU branch must be the same function, forward and backward
    torch.manual_seed(0)
    S = 9 if masked else T
    shapes = (2, 2, T, 8), (2, 2, S, 8), (2, 2, S, 8)           # of q, k, v
    ours = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    bias, visible = None, torch.ones(T, S, dtype=torch.bool).tril()
    if masked:
        visible = torch.rand(2, 1, T, S) < .5
        visible[..., 0] = True  # no query without a key
        bias = bias_of(visible, dtype)
    got = attend(*ours, bias)
    want = F.scaled_dot_product_attention(*theirs, visible)
    close(got, want, tol)
    direction = torch.randn(got.shape)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    for a, b in zip(ours, theirs):
        close(a.grad, b.grad, 3 * tol)


def test_p02_padding_changes_no_logit_of_a_real_token():
    # left padding, or positions counted from the padded end, would shift every position
    model, rng = gpt(), random.Random(0)
    for pads in (0, 1, 5):
        for ids, _ in ROWS:
            ids = ids[:10]
            padding = [rng.randrange(V) for _ in range(pads)]
            padded = model.logits(model(torch.tensor([ids + padding])))
            close(padded[0, :len(ids)], slow_logits(model, ids))


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5], [1, 7, 1]], ids=str)
def test_p03_kv_cache_equals_the_full_forward_at_every_step_for_any_prefill_chunking(chunks):
    # an uncausal prefill, or a query that sees only key 0, leaves the training loss untouched and ruins sampling
    model, lengths = gpt(), [2, 9, 5]
    rng = random.Random(0)
    rows = [random_ids(14, rng) for _ in lengths]
    cache = Cache(model, 3, 9)
    cache.kv += 1e9                                         # a slot not yet written must stay hidden
    prompts = [ids[:n] for ids, n in zip(rows, lengths)]
    prompt = data.pad(prompts, PAD, width=9)[:, :9]
    hidden, at = [], 0
    for size in chunks:
        part = prompt[:, at:at + size]
        hidden.append(model(part, torch.arange(at, at + size), cache=cache))
        at += size
    for ids, n, states in zip(rows, lengths, torch.cat(hidden, 1)):
        close(states[:n], slow_states(model, ids[:n]))
    for i in range(5):                                      # every row decodes at a position of its own
        cache.reserve(10 + i)
        pos = torch.tensor(lengths)[:, None] + i
        tokens = torch.tensor(rows).gather(1, pos)
        hidden = model(tokens, pos, cache=cache)
        for ids, n, state in zip(rows, lengths, hidden):
            want = slow_states(model, ids[:n + i + 1])
            close(state[0], want[-1])


def test_gradient_checkpointing_changes_no_gradient():
    # recomputing with other dropout masks, or without the mask of packed rows, would give the gradient of nothing
    model, grads = gpt(block_size=32, dropout=.5).train(), []
    tokens, mask, pos, see = sft.pack(ROWS, TOK, 32)
    for model.grad_checkpoint in (False, True):
        torch.manual_seed(0)
        logp = token_logprobs(model, tokens, mask, pos=pos, see=see)
        grads.append(gradients(model, logp.sum()))
    close(*grads, 1e-9)


# ------------------------------------------------------------------------------------------------ log-probabilities


def padded(values, target):
    """A row of BATCH as it should be: these numbers (n-1,) where the target is 1, and 0 elsewhere."""
    inside = torch.tensor(target[1:])
    return F.pad(values * inside, (0, 15 - len(inside)))


def by_formula(logits, tokens, mask):
    """The same by the plain formula, of all logits (B, T-1, V)."""
    every = logits.log_softmax(-1)
    logp = every.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)
    return logp * mask, entropy * mask


@pytest.mark.parametrize("temperature", [1.0, .6, 2.0])
def test_p10_token_logprobs_and_entropy_equal_a_slow_loop_at_any_temperature(temperature):
    # a log-prob at another temperature than the sampler's makes every importance ratio wrong
    model, (tokens, mask) = gpt(), BATCH
    both = token_logprobs(model, tokens, mask, temperature, entropy=True)
    for b, (ids, target) in enumerate(ROWS):
        for got, values in zip(both, slow_logps(model, ids, temperature)):
            close(got[b], padded(values, target))


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_gradients_of_logp_and_entropy_equal_autograd_of_the_plain_formula_chunked_or_not(chunk):
    # the chunks are recomputed in the backward pass: a bug there shows in the gradient only
    model, (tokens, mask) = gpt(), BATCH
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 15, dtype=torch.float64, generator=rng)
    logp, entropy = token_logprobs(model, tokens, mask, .6, entropy=True, bonus=True, chunk=chunk)
    logits = model.logits(model(tokens[:, :-1]))
    slow_logp, slow_entropy = by_formula(logits / .6, tokens, mask)
    want = gradients(model, (a * slow_logp + b * slow_entropy).sum())
    close(gradients(model, (a * logp + b * entropy).sum()), want)
    _, reported = token_logprobs(model, tokens, mask, .6, entropy=True, chunk=chunk)
    assert not reported.requires_grad and torch.equal(reported, entropy)


def logp_and_entropy(model, tokens, mask):
    return torch.stack(token_logprobs(model, tokens, mask, entropy=True))


@pytest.mark.parametrize("function", [logp_and_entropy, token_scores])
def test_p35_poisoned_states_outside_the_mask_change_neither_value_nor_gradient(function):
    # 0 * NaN is NaN: a mask must select, not multiply
    model, (tokens, mask) = gpt(n_scores=1), BATCH
    clean = function(model, tokens, mask)
    want = gradients(model, clean.square().sum())
    inside = F.pad(mask, (0, 1)).bool()[..., None]          # nothing is read at the last token
    last = model.transformer.h[-1].attn                     # its keys and values are of the layer before
    last.register_forward_hook(lambda module, args, out: torch.where(inside, out, torch.nan))
    got = function(model, tokens, mask)
    assert torch.equal(got, clean)
    close(gradients(model, got.square().sum()), want)


def test_p40_log_softmax_is_fp32_under_bf16_autocast():
    # in bf16 a log-prob of -3.02 is -3.03: every ratio would carry 1% of noise
    model, (tokens, mask) = gpt(dtype=torch.float32, n_scores=1), BATCH
    model.precision = "bf16"
    logits = model.logits(model(tokens[:, :-1]))
    assert logits.dtype == torch.bfloat16
    assert token_scores(model, tokens, mask).dtype == torch.float32
    for temperature in (1, .7):
        both = token_logprobs(model, tokens, mask, temperature, entropy=True)
        for got, want in zip(both, by_formula(logits.double() / temperature, tokens, mask)):
            assert got.dtype == torch.float32
            close(got, want, 5e-6)


@pytest.mark.parametrize("chunk, grad, times", [(7, True, 2), (7, False, 1), (100, True, 1)])
def test_the_head_runs_on_response_positions_only_in_chunks_and_again_in_the_backward_pass(
        chunk, grad, times, monkeypatch):
    # a (B, T, V) tensor is what runs out of memory first; in one chunk, or without a gradient, nothing runs twice
    model, seen = gpt(), []

    def logits(hidden):
        seen.append(len(hidden))
        return GPT.logits(model, hidden)

    monkeypatch.setattr(model, "logits", logits)
    with torch.set_grad_enabled(grad):
        out = token_logprobs(model, *BATCH, chunk=chunk)
    if grad:
        out.sum().backward()
    assert max(seen) <= chunk
    assert sum(seen) == times * BATCH[1].sum()


def test_p35_means_are_over_masked_tokens_only_and_add_up_over_micro_batches():
    first, second, other = torch.tensor([[1., 2.], [3., math.nan]]), torch.tensor([[5., math.inf]]), M.Means()
    means = M.Means()
    means.add(torch.tensor([[1., 1.], [1., 0.]]), x=first)
    other.add(torch.tensor([[1., 0.]]), x=second, y=second)
    means.join(other)
    assert means.result() == {"x": (1 + 2 + 3 + 5) / 4, "y": 5.0}, "a mean takes in what is outside the mask"


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("extra", [0, 16])
def test_p27_response_score_reads_the_last_response_token_whatever_the_padding_and_batch(extra):
    # scoring the first end token, or a pad, trains a reward model on nothing
    model = gpt(n_scores=3, block_size=32)
    rows = [*ROWS, row([1], [END])]
    rows.append(row([3, END, 4], [5, 6, END]))                  # end token inside the prompt
    rows.append(row([END, END, 7], [8, 9]))                     # and no end token in the response
    tokens, mask = collate(rows, TOK)
    tokens, mask = F.pad(tokens, (0, extra), value=7), F.pad(mask, (0, extra))
    got = response_scores(model, tokens, mask)
    for (ids, _), scores in zip(rows, got, strict=True):
        close(scores, slow_scores(model, ids)[-1])


def test_p33_token_scores_are_v_of_the_state_before_each_token_and_of_shape_b_t():
    # one step late, V has seen the action; with a last dimension of 1, (N,1)-(N,) broadcasts
    model, (tokens, mask) = gpt(n_scores=2), BATCH
    values = token_scores(model, tokens, mask)
    assert values.shape == mask.shape
    for b, (ids, target) in enumerate(ROWS):
        want = slow_scores(model, ids)[:-1, 0]
        close(values[b], padded(want, target))


# ------------------------------------------------------------------------------------------------ one draw


def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is sampled from, the slow way: probabilities, zero where a token was cut off."""
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).double()
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    if top_k:
        p[order[top_k:]] = 0
        p = p / p.sum()
    if top_p < 1:
        total = 0.0
        for place, token in enumerate(order):
            if place > 0 and total >= top_p:
                p[token] = 0
            total += p[token].item()
        p = p / p.sum()
    return p


CUTS = [    # temperature, top_k, top_p
    (1, 0, 1), (0, 0, 1), (.5, 0, 1),
    (1.7, 0, 1), (1, 4, 1), (1, 1, 1),
    (1, 50, 1), (1, 0, .7), (1, 0, 1e-6),
    (1, 0, 0), (.6, 6, .8)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_p11_the_measure_of_u_that_maps_to_a_token_is_its_probability_and_the_kept_set_sums_to_1(cut):
    # exact, by a grid over u: truncation whose log-probs are not renormalised is off-policy by log S
    rng, n = torch.Generator().manual_seed(0), 20_000
    logits = 3 * torch.randn(V, dtype=torch.float64, generator=rng)
    u = (torch.arange(n, dtype=torch.float64) + .5) / n
    token, logp = sample(logits.expand(n, V), u, *cut)
    p = kept(logits, *cut)
    close(torch.bincount(token, minlength=V) / n, p, 1.01 / n)
    close(logp.exp(), p[token])
    assert p[token].min() > 0


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_p40_of_logits_in_bf16_the_sampler_draws_as_of_the_same_in_fp32(cut):
    # the logits are rounded anyway; what is made of them is not, or 512 tokens would share a few probabilities
    torch.manual_seed(0)
    logits, u = 3 * torch.randn(200, 512).bfloat16(), torch.rand(200)
    for got, want in zip(sample(logits, u, *cut), sample(logits.float(), u, *cut)):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_p11_no_trainer_offers_or_uses_top_k_or_top_p():
    # a policy gradient under truncation differentiates another distribution than it samples from
    for path in set(ROOT.glob("*.py")) - {ROOT / "model.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "target", None) or getattr(node, "arg", None)
            name = getattr(name, "id", name)
            assert name not in ("top_k", "top_p"), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p53_a_token_of_probability_0_is_never_drawn_at_the_extremes_of_u(dtype):
    # searchsorted from the left picks entry 0 at u = 0, whatever its probability
    rng, info = torch.Generator().manual_seed(0), torch.finfo(dtype)
    logits = torch.randn(64, 1000, dtype=dtype, generator=rng) * 5
    logits[:, :7] = logits[:, -9:] = -torch.inf
    logits[:, 500:520] = -1e4                               # its probability underflows
    logits[0] = -torch.inf
    logits[0, 3] = 0                                        # only one is left
    for extreme in (0.0, info.tiny, 1 - info.eps / 2, 1.0):
        u = torch.full((64,), extreme, dtype=dtype)
        for temperature, top_k, top_p in (1, 0, 1), (1, 5, 1), (1, 0, .9), (.1, 0, 1):
            token, logp = sample(logits, u, temperature, top_k, top_p)
            assert token[0] == 3 and logp.isfinite().all()
            p = (logits / temperature).softmax(-1)
            assert (p[range(64), token] > 0).all(), f"u = {extreme}: a token of probability 0"


# ------------------------------------------------------------------------------------------------ rollouts

RAGGED = [random_ids(n, random.Random(n)) for n in range(1, 16)]
ENDLESS = SimpleNamespace(pad=PAD, end=-1)  # no token ends a response


def as_on_a_gpu(monkeypatch):
    """Let the sampler go the way of a GPU: few sizes, steps recorded once and replayed, looked at seldom. Here a
    recording is the step itself."""
    monkeypatch.setitem(M.CAPTURES, "cpu", True)
    monkeypatch.setitem(M.LOOK, "cpu", 3)

    def run(step, stream, pool):
        step()
        return step
    monkeypatch.setattr(M, "capture", run)


@pytest.fixture(params=["dropping finished rows", "keeping them", "as on a GPU"])
def drop(request, monkeypatch):
    """With and without dropping finished rows from the batch, and as on a GPU."""
    if request.param == "keeping them":
        monkeypatch.setitem(M.LOOK, "cpu", 10 ** 9)
    if request.param == "as on a GPU":
        as_on_a_gpu(monkeypatch)


def rollout(model, prompts, max_new=16, seed=1, tok=TOK, **options):
    torch.manual_seed(seed)
    model.tok = tok
    return generate(model, prompts, max_new, **options)


def check_same(a, b):
    """Two rollouts are the same, to the bit."""
    for name in ("tokens", "mask", "logp", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), f"another {name}"


def check_logps(model, roll, tol=1e-10, given=0, cut=()):
    """What the sampler stored is what an independent forward of each row alone gives, and 0 elsewhere; given: tokens
    that each response was made to begin with."""
    for (ids, _), logp, start in zip(roll.rows(), roll.logp, roll.prompt_len):
        logits = slow_logits(model, ids)
        want = torch.zeros(len(logp), dtype=torch.float64)
        for t in range(start + given, len(ids)):
            p = kept(logits[t - 1], *cut)
            want[t - 1] = p[ids[t]].log()
        close(logp, want, tol)


def scripted(prompts, answers, **size):
    """A model that is certain to go on from each of these prompts as told."""
    model = gpt(**size)
    tokens, mask = collate(list(map(row, prompts, answers)), TOK)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -token_logprobs(model, tokens, mask).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure() < .01
    return model


@pytest.mark.parametrize("cut", [(1, 0, 1), (.5, 0, 1), (0, 0, 1), (.9, 5, .8)], ids=str)
def test_p03_p09_stored_log_probs_equal_an_independent_forward_for_ragged_prompts(cut, drop):
    # the tensor handed to the trainer is the one that was sampled; a cache bug or re-encoding breaks the equality
    model = gpt(std=.2)
    temperature, top_k, top_p = cut
    roll = rollout(model, RAGGED, n=2, temperature=temperature, top_k=top_k, top_p=top_p)
    check_logps(model, roll, cut=cut)
    for i, (ids, _) in enumerate(roll.rows()):
        start = roll.prompt_len[i]
        assert ids[:start] == RAGGED[i // 2], "not prompt by prompt"
    if cut == CUTS[0]:
        assert roll.finished.any() and not roll.finished.all()
        close(token_logprobs(model, roll.tokens, roll.mask), roll.logp)     # as the trainer computes them


def test_rollouts_occur_as_often_as_their_stored_probability_says():
    # a chi-square over all pairs of tokens: rows or steps that share a random number would show
    model, n = gpt(vocab_size=4, std=.2), 6000
    roll = rollout(model, [[1, 2]], 2, n=n, tok=ENDLESS)
    pairs = roll.tokens[:, 2] * 4 + roll.tokens[:, 3]
    times = torch.bincount(pairs, minlength=16)
    chi2 = 0
    for pair in range(16):
        logp, _ = slow_logps(model, [1, 2, pair // 4, pair % 4])
        expected = n * logp[1:].sum().exp()
        chi2 += (times[pair] - expected) ** 2 / expected
    assert chi2 < 37.7, "15 degrees of freedom: one in a thousand"


def test_dropping_finished_rows_and_sharing_the_prefill_change_no_token(monkeypatch):
    # what a row draws must not depend on who else is still in the batch
    model = gpt(std=.2)
    roll = rollout(model, RAGGED, n=3)
    apart = rollout(model, [prompt for prompt in RAGGED for _ in range(3)])
    monkeypatch.setitem(M.LOOK, "cpu", 10 ** 9)
    undropped = rollout(model, RAGGED, n=3)
    as_on_a_gpu(monkeypatch)
    replayed = rollout(model, RAGGED, n=3)
    for other in (apart, undropped, replayed):
        assert torch.equal(roll.tokens, other.tokens)
        assert torch.equal(roll.mask, other.mask)
        assert torch.equal(roll.finished, other.finished)


@pytest.mark.parametrize("precision, lora_r", [("fp32", 0), ("bf16", 0), ("fp32", 2), ("bf16", 2)])
def test_a_kept_decoder_draws_from_the_present_weights_and_forgets_the_last_rollout(precision, lora_r, monkeypatch):
    # a recording reads a copy of the weights, and keys and values of the rollout before are still in its cache
    model = gpt(std=.2, dtype=torch.float32, block_size=128)
    model.precision = precision
    if lora_r:
        model.add_lora(lora_r, 4)
    as_on_a_gpu(monkeypatch)
    rollout(model, RAGGED[::-1], 64, n=2)
    for param in model.parameters():
        if param.requires_grad:
            param.data += .1 * torch.randn_like(param)
    again = rollout(model, RAGGED, 64, n=2)
    decoder, = M.DECODERS[model].values()
    sizes = [rows for rows, _ in decoder.recordings]
    assert set(sizes) <= {30, 15}, "each number of rows takes a recording of its own"
    monkeypatch.undo()
    plain = rollout(model, RAGGED, 64, n=2)
    assert torch.equal(again.tokens, plain.tokens)
    for logp in again.logp, token_logprobs(model, plain.tokens, plain.mask):
        close(logp, plain.logp, 1e-4 if precision == "fp32" else .1)


def test_of_the_decoders_of_a_model_the_two_used_last_are_kept_each_of_its_precision(monkeypatch):
    # one of another precision would draw from weights that are rounded otherwise
    as_on_a_gpu(monkeypatch)
    model = gpt(std=.2, dtype=torch.float32)

    def used(n):
        rollout(model, RAGGED, n=n)
        return list(M.DECODERS[model].values())[-1]
    one, two = used(1), used(2)
    assert used(1) is one and used(3) is not one
    kept = list(M.DECODERS[model].values())
    assert len(kept) == 2 and one in kept and two not in kept
    model.precision = "bf16"
    assert used(1).model.precision == "bf16"


def test_recorded_on_a_gpu_the_sampler_draws_what_it_draws_step_by_step(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")           # another test may have called setup()
    model = gpt(std=.2, dtype=torch.float32, block_size=128).cuda()
    recorded = [rollout(model, RAGGED, 64, n=8) for _ in range(2)]          # the second replays only
    with monkeypatch.context() as patch:
        patch.setitem(M.CAPTURES, "cuda", False)
        plain = rollout(model, RAGGED, 64, n=8)
    for roll in recorded:
        assert torch.equal(roll.tokens, plain.tokens)
        close(roll.logp, plain.logp, 1e-4)
    torch.set_float32_matmul_precision(before)
    model.precision = "bf16"                                # rounding may change a token, but not what is stored of it
    roll = rollout(model, RAGGED, 64, n=8)
    gap = (roll.logp - token_logprobs(model, roll.tokens, roll.mask)).abs()
    assert gap.max() < .1 and gap.mean() < .01


PLAN = [*range(1, 9), END, *range(1, 8)]    # what the token at each place is to be
CASES = [   # a prompt, how many tokens follow with max_new 5 in a context of 16, and whether the last is the end
    ([1, 9, 9], 5, False),
    ([2, 9, 9, 9], 5, True),
    ([3, 9, 9, 9, 9], 4, True),
    ([4] + [9] * 7, 1, True),
    ([5] + [9] * 8, 5, False),
    ([END, END], 5, False),
    ([END, 9, 9, END], 5, True),
    ([6] + [9] * 12, 3, False),
    ([7] + [9] * 14, 1, False)]


def test_p18_p34_finished_and_truncated_rows_and_nothing_after_the_end(drop):
    # end in the last slot, absent, or only in the prompt; a token after the end would be trained
    prompts = [prompt for prompt, _, _ in CASES]
    model = scripted(prompts, [PLAN[len(prompt):] for prompt in prompts])
    roll = rollout(model, prompts, 5)
    for i, (prompt, n, ends) in enumerate(CASES):
        response, padding = PLAN[len(prompt):len(prompt) + n], 16 - len(prompt) - n
        ids, target = row(prompt, response)
        assert roll.tokens[i].tolist() == ids + [PAD] * padding
        assert roll.mask[i].tolist() == target[1:] + [0] * padding
        assert roll.finished[i] == ends
        assert list(roll.responses()[i]) == response[:n - ends], "a text is without the end token"


def test_p20_p43_sampling_ignores_dropout_and_restores_the_training_mode():
    # noise in the stored log-probs is noise in every ratio; a policy left in eval mode trains without dropout
    model = gpt(dropout=.5).train()
    check_same(rollout(model, RAGGED), rollout(gpt(), RAGGED))
    assert all(module.training for module in model.modules())
    model.eval()
    rollout(model, RAGGED[:1])
    assert not any(module.training for module in model.modules())


def test_p40_a_bf16_rollout_stores_fp32_log_probs():
    model = gpt(dtype=torch.float32, std=.2)
    model.precision = "bf16"
    roll = rollout(model, RAGGED, n=2)
    assert roll.logp.dtype == torch.float32 and roll.mask.sum() > 50
    gap = (roll.logp - token_logprobs(model, roll.tokens, roll.mask)).abs()
    assert gap.max() < .1 and gap.mean() < .01


def test_where_bf16_is_emulated_the_sampler_does_not_ask_for_the_fused_operator(monkeypatch):
    # oneDNN has none there: "could not create a primitive descriptor"
    model = gpt(dtype=torch.float32)
    model.precision = "bf16"
    for told in ("AVX2", ""):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", told)
        fused = M.precision(torch.device("cpu")) == "bf16"
        with torch.no_grad():
            twin = M.for_sampling(model)
        chosen = [module.fused for module in twin.modules() if isinstance(module, M.MLP)]
        assert chosen and set(chosen) == {fused}


@pytest.mark.parametrize("temperature, top_k", [(1, 0), (0, 0), (1, 60)])
def test_p47_padded_vocabulary_rows_have_no_mass_and_are_never_sampled(temperature, top_k):
    # the table has 64 rows for 11 ids; an id beyond them is a KeyError in the tokenizer
    model = gpt()
    hidden = model(torch.tensor([[3, 1, 4]]))
    likely = 100 * hidden[0, -1].sign().detach()            # as likely as can be
    model.transformer.wte.weight.data[V:] = likely
    roll = rollout(model, RAGGED, temperature=temperature, top_k=top_k)
    assert roll.tokens.max() < V
    assert model.logits(hidden).shape[-1] == V


def test_p49_a_prompt_may_leave_room_for_one_token():
    # an overflow crashes, or shifts the positions
    model = gpt()
    roll = rollout(model, [[3] * 15, [1, 2]], 50)
    assert roll.lengths[0] == 16 and roll.tokens.shape == (2, 16)
    check_logps(model, roll)
    roll = rollout(model, [[3] * 12], begin=[1, 2, 3])
    assert roll.mask.sum() == 4                             # 3 given, and room for one


@pytest.mark.parametrize("match, prompts, options", [
    ("16.* of 16", [[3] * 16, [1]], {}),
    ("16.* of 16", [[1], [1] * 12], dict(begin=[1, 2, 3, 4])),
    ("empty", [[1], []], {}),
    ("less than one", [[1]], dict(max_new=0)),
    ("--temperature", [[1]], dict(temperature=1e-9))])
def test_what_cannot_be_sampled_is_refused(match, prompts, options):
    refused(match, rollout, gpt(), prompts, **options)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1, 0, 1), (0, 0, 1), (1, 2, .9)])
@pytest.mark.parametrize("name, value", [("transformer.h.1.mlp.c_fc.weight", torch.nan),
                                         ("transformer.ln_f.bias", torch.inf), ("transformer.wte.weight", 1.7e308)])
def test_logits_that_are_no_numbers_stop_the_sampler_and_name_the_weight(name, value, temperature, top_k, top_p):
    # "index 768 is out of bounds"
    model = gpt(std=1e5)
    model.get_parameter(name).data[..., 3] = value
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    refused(re.escape(name), rollout, model, [[1, 2], [3]], **how)


@pytest.mark.parametrize("begin, n", [([5], 1), ([7, 3, 9], 3)])
def test_p09_responses_made_to_begin_alike_store_log_probs_of_the_drawn_part_only(begin, n, drop):
    model, prompts = gpt(std=.2), RAGGED[:11]
    roll = rollout(model, prompts, 8, n=n, begin=begin)
    check_logps(model, roll, given=len(begin))
    longer = rollout(model, [prompt + begin for prompt in prompts], 8, n=n)     # as if asked that much more,
    assert torch.equal(roll.tokens, longer.tokens) and torch.equal(roll.logp, longer.logp)
    assert roll.lengths == longer.lengths and torch.equal(roll.finished, longer.finished)
    for i, (ids, target) in enumerate(roll.rows()):                         # but it is a part of the response
        prompt = prompts[i // n]
        assert target == row(prompt, ids[len(prompt):])[1]
        assert roll.mask[i, :len(ids) - 1].tolist() == target[1:]


def test_the_stream_gets_each_id_up_to_the_end_token_however_seldom_the_sampler_looks(drop):
    # a GPU is asked every eighth step only: up to seven ids drawn after the end were shown
    model, got = scripted([[1, 2]], [[4, 5, END] + [6, 7] * 5]), []
    roll = rollout(model, [[1, 2]], max_new=13, temperature=0, stream=got.append)
    assert got == [4, 5, END] and roll.lengths == [5]


def contents(roll):
    """All that is to be known of each row of a rollout."""
    out = []
    for i, (ids, target) in enumerate(roll.rows()):
        width = len(ids) - 1
        assert not roll.logp[i, width:].any()
        assert not roll.mask[i, width:].any()
        assert not (roll.tokens[i, width + 1:] - PAD).any()
        logp = roll.logp[i, :width].tolist()
        text, finished = roll.responses()[i], roll.finished[i].item()
        out.append((ids, target, logp, text, finished))
    return out


def test_rollouts_taken_joined_and_made_of_rows_keep_every_row_as_it_was():
    narrow = rollout(gpt(std=.2), RAGGED[:3], 5, n=2)
    roomy = gpt(std=.2, block_size=48)
    wide = rollout(roomy, [[1] * 30, [2] * 3], 9)
    some = narrow.take([4, 0, 4])
    six = contents(narrow)
    assert contents(some) == [six[4], six[0], six[4]]
    joined = Rollout.join([some, wide, narrow.take([]), narrow])
    assert contents(joined) == contents(some) + contents(wide) + six
    for (ids, target), start in zip(joined.rows(), joined.prompt_len):
        assert target == row(ids[:start], ids[start:])[1]
    again = Rollout.of(joined.rows(), TOK)
    assert again.rows() == joined.rows() and again.mask.dtype == joined.mask.dtype
    assert again.finished.all() and not again.logp.any()


# ------------------------------------------------------------------------------------------------ rewards

WORDS = Tokenizer.load("toy")
BRIEF = [WORDS.role["system"], *WORDS.encode("Be brief.")]
RUBRIC = "A: It says no to harm.\nB: It says no without need.\nC: It helps with harm.\nD: It helps.\n"
EARLIER = dict(role="system", content="S"), dict(role="user", content="Hi"), dict(role="assistant", content="Ho")


def asked(text, before=(), **more):
    """The record of a prompt."""
    question = dict(role="user", content=text)
    return dict(prompt=[*before, question]) | more


def turn(text):
    """The ids of a question and of whose turn it is."""
    return [WORDS.role["user"], *WORDS.encode(text), WORDS.role["assistant"]]


RECORDS = [
    asked("What is 2 + 3?", family="arith"), asked("Why?", family="write"), asked("Tell me.", family="safe"),
    asked("Name two pots.", family="write"), asked("Who?", family="safe"), asked("Why?", before=EARLIER)]
SAID = ["<think>2 + 3 = 5</think>The answer is 5.", "It is fun.", "<think>a</think>x<think>b</think>\n It is fine. ",
        "<think>so</think>", "<think>on and on", b"\x80\xffe"]
SHOWN = ["The answer is 5.", "It is fun.", "It is fine.", "", "", "\ufffd\ufffde"]     # what follows the thinking


def answered(records, answers, finished=True):
    """A policy's answers, texts or bytes that are no text, as a rollout."""
    rows = []
    for record, said in zip(records, answers):
        prompt = WORDS.prompt(record["prompt"])
        response = list(said) if isinstance(said, bytes) else WORDS.encode(said)    # an id below 256 is a byte
        response += [WORDS.end] * finished
        rows.append(row(prompt, response))
    roll = Rollout.of(rows, WORDS)
    roll.finished[:] = finished
    return roll


def reward_of(spec, budget=64, cost=False):
    return Reward(spec, Setup(WORDS), budget, cost)


def total_of(spec, **options):
    return reward_of(spec, **options)(RECORDS, answered(RECORDS, SAID))[0]


def tell(record, text, finished):
    """A verifier whose number depends on all that it is given."""
    question = record["prompt"][-1]["content"]
    return len(text) / 100 + len(question) + 100 * finished


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """{word: folder}: two reward models, two language models, and what holds no model."""
    places = {word: tmp_path / word for word in ("RM", "RM2", "LM", "LM2", "NONE", "EMPTY", "SUM", "LOOP")}
    for seed, word in enumerate(("RM", "RM2", "LM", "LM2")):
        size = dict(vocab_size=WORDS.n_vocab, block_size=128, n_scores=int("R" in word))
        model = gpt(seed, torch.float32, .5, WORDS, **size)
        save_checkpoint(places[word], dict(model=model), {}, dict(tokenizer=WORDS.fingerprint))
    for word in ("EMPTY", "SUM", "LOOP"):
        places[word].mkdir()
    monkeypatch.setitem(M.VERIFIERS, "tell", tell)
    return {word: str(place) for word, place in places.items()}


def slow_choice(model, text, choices):
    """P of each of a few one-token texts as the answer to a question, among them alone."""
    logits = slow_logits(model, turn(text))[-1]
    return logits[WORDS.encode(choices)].softmax(-1).tolist()


def slow_terms(rm, lm, finished):
    """{kind of term: its value for each of RECORDS}, one row and one question at a time."""
    out = defaultdict(list)
    for record, said, shown in zip(RECORDS, SAID, SHOWN):
        text = shown if isinstance(said, bytes) else said
        question = record["prompt"][-1]["content"]
        ids = answered([record], [said], finished).rows()[0][0]         # the very ids that were sampled
        view = WORDS.prompt(record["prompt"]) + WORDS.encode(shown) + [WORDS.end]
        reads = {"RM": ids, "RM{Be brief.}": BRIEF + ids, "RM@answer": view, "RM@answer{Be brief.}": BRIEF + view}
        for term, ids in reads.items():
            out[term].append(slow_scores(rm, ids)[-1, 0].item())
        p = slow_choice(lm, f"Prompt: {question}\nAnswer: {text}\nHow good is it, from 0 to 5?", "012345")
        points = sum(n * chance for n, chance in enumerate(p))
        out["LM@rate"].append(points / 5 * 2 - 1)
        p = slow_choice(lm, f"Prompt: {question}\nAnswer: {text}\n{RUBRIC}Which is it?", "ABCD")
        for letter, chance in zip("ABCD", p):
            out["LM@" + letter].append(chance)
        out["tell"].append(tell(record, text, finished))
        out["tell@answer"].append(tell(record, shown, finished))
    return out


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("budget", [1, 64, 10 ** 6])
def test_every_term_of_a_reward_against_a_loop(budget, finished, folders, monkeypatch):
    """Alone, and for some families, where the others get 0; whatever the micro-batches."""
    models = {word: load_model(folders[word], Setup(WORDS)) for word in ("RM", "LM")}
    want = {}
    for term, values in slow_terms(models["RM"], models["LM"], finished).items():
        for word in models:
            term = term.replace(word, folders[word])
        want[term] = values
        families = ("write",) if len(want) % 4 == 1 else ("arith", "safe")     # of judges' classes both
        concerned = [record.get("family") in families for record in RECORDS]
        want[f"{term}[{','.join(families)}]"] = np.multiply(values, concerned).tolist()
    spec, total = [], torch.zeros(6)
    for place, (term, values) in enumerate(want.items()):
        weight = place / 8 - .75
        spec.append(f"{weight}*{term}")
        total += weight * torch.tensor(values)
    loads = runs.watch(monkeypatch, M, "load_model")["load_model"]
    reward = reward_of(" + ".join(spec), budget)
    got, parts = reward(RECORDS, answered(RECORDS, SAID, finished))
    assert list(parts) == list(want)
    for term, values in want.items():
        close(parts[term], values, 1e-4)
    close(got, total, 1e-3)
    assert len(loads) == 2, "a folder is loaded once, however many terms name it"


def test_no_term_is_asked_of_prompts_of_other_families(folders, monkeypatch):
    spec = "{RM}[fmt] + {RM}@answer[fmt] + {LM}@rate[fmt] + {LM}@A[fmt] + tell[fmt] + {RM}|{RM2}[fmt]"
    reward = reward_of(spec.format(**folders))
    monkeypatch.setattr(GPT, "forward", lambda *_: pytest.fail("a model was asked"))
    monkeypatch.setitem(reward.rules, "tell", lambda *_: pytest.fail("a verifier was asked"))
    total, parts = reward(RECORDS, answered(RECORDS, SAID))
    assert total.tolist() == [0] * 6 and len(parts) == 7


@pytest.mark.parametrize("names, tail", [
    ("a|b|c", ""), ("{RM}|a", ""), ("{LM}|{LM2}", "@rate"), ("{RM}|{RM2}", "@answer{{Be brief.}}[write,safe]")])
def test_of_several_the_worst_counts_and_their_spread_is_a_part(names, tail, folders, monkeypatch):
    monkeypatch.setitem(M.VERIFIERS, "a", lambda record, text, finished: len(text))
    monkeypatch.setitem(M.VERIFIERS, "b", lambda record, text, finished: 30 - len(text))
    monkeypatch.setitem(M.VERIFIERS, "c", lambda record, text, finished: 12)
    joined, tail = names.format(**folders), tail.format()
    apart = torch.stack([total_of(name + tail) for name in joined.split("|")])
    least, greatest = torch.amin, torch.amax
    for weight, cost, worst in ((2, False, least), (-2, False, greatest), (2, True, greatest), (-2, True, least)):
        reward = reward_of(f"{weight}*{joined}{tail}", 64, cost)
        total, parts = reward(RECORDS, answered(RECORDS, SAID))
        assert list(parts) == [joined + tail, f"{joined}{tail} spread"]
        close(parts[joined + tail], worst(apart, 0), 1e-5)
        close(parts[f"{joined}{tail} spread"], apart.std(0), 1e-5)
        close(total, weight * worst(apart, 0), 1e-5)                # the spread is told, not paid


def test_a_folder_with_a_reward_txt_stands_for_the_sum_in_it(folders):
    inner = Path(folders["SUM"]) / "reward.txt"
    outer = Path(folders["EMPTY"]) / "reward.txt"
    inner.write_text("0.5*words + {RM}{{S + x}}\n".format(**folders))
    outer.write_text("2*{SUM} + -1*{LM}@A[write] + {SUM}".format(**folders))
    terms = Reward.expand("-3*{EMPTY} + words".format(**folders))
    flat = "-3.0*words + -6.0*{RM}{{S + x}} + 3.0*{LM}@A[write] + -1.5*words + -3.0*{RM}{{S + x}} + 1.0*words"
    flat = flat.format(**folders)
    assert " + ".join(f"{float(term.weight)}*{term.label}" for term in terms) == flat
    close(total_of("-3*{EMPTY} + words".format(**folders)), total_of(flat))


@pytest.mark.parametrize("text", [b"{LOOP}", b"words + 2*{SUM}", b"{LOOP}/../LOOP", b"\xff\xfe", b"exact +"])
def test_a_reward_txt_that_is_no_sum_is_refused(text, folders):
    for word, content in dict(SUM=b"3*{LOOP} + words", LOOP=text).items():
        for name, place in folders.items():
            content = content.replace(b"{%s}" % name.encode(), place.encode())
        (Path(folders[word]) / "reward.txt").write_bytes(content)
    refused("itself|cannot be read|not a sum", Reward.expand, folders["LOOP"])


@pytest.mark.parametrize("spec, match", [
    ("words@rate", "verifier"), ("words@A", "verifier"), ("words{{S}}", "verifier"), ("words|{LM}@rate", "verifier"),
    ("{RM}@A", "reward model"), ("{LM}|{RM}@rate", "reward model"), ("{LM}@rate{{S}}", "system message"),
    ("{LM}", "not a reward model"), ("{LM}@answer", "not a reward model"), ("{RM}|{LM}{{S}}", "not a reward model"),
    ("{NONE}", "neither .*python reward.py"), ("{RM}|{NONE}", "neither"), ("words|nothing", "nothing: neither"),
    ("{EMPTY}", "python reward.py train")])
def test_impossible_terms_are_one_line(spec, match, folders):
    refused(match, reward_of, spec.format(**folders))


@pytest.mark.parametrize("tail", ["@answer", "{Be brief.}", "@answer{Be brief.}"])
def test_17_beyond_the_context_a_reward_model_keeps_its_system_message_and_the_role(tail, folders):
    """Cut is the beginning of the question, as in training; the answer is whole."""
    record = asked("a " * 128)
    prompt = WORDS.prompt(record["prompt"])
    answer = WORDS.encode("It is fun.") + [WORDS.end]
    before = BRIEF if "Be brief." in tail else []
    left = 128 - len(before) - 1 - len(answer)
    ids = before + prompt[:1] + prompt[-left:] + answer
    want = slow_scores(load_model(folders["RM"], Setup(WORDS)), ids)[-1]
    roll = answered([record], ["It is fun."])
    got, _ = reward_of(folders["RM"] + tail)([record], roll)
    close(got, want, 1e-4)


def test_p49_an_answer_that_fills_the_context_still_has_a_reward(folders):
    # cut off, it is followed by an end token nobody drew; and bytes that are no text come back as three each
    record = asked("Hi")
    filling = b"\x80" * (128 - len(turn("Hi")))
    roll = answered([record], [filling], finished=False)
    for tail in ("", "@answer", "{Be brief.}"):
        total, _ = reward_of(folders["RM"] + tail)([record], roll)
        assert total.isfinite().all()


def test_24_a_reward_refuses_records_that_no_term_can_pay_for(capsys):
    sums, plain = asked("2 + 3", answer=5, family="arith"), asked("Why?")
    for spec, records, word in [
            ("exact", [plain], "answer"), ("words + gsm8k", [plain], "gsm8k"), ("words|help", [sums], "help"),
            ("exact[write]", [plain], "family"), ("exact[arith]", [sums | dict(answer="x"), plain], "answer")]:
        refused(f"(?=.*my.jsonl)(?=.*{word})", reward_of(spec).check, records, "my.jsonl")
    reward_of("words + exact[arith]").check([sums, plain], "my.jsonl")      # others it need not judge
    reward_of("exact[write]").check([sums], "my.jsonl")                     # a file of other families is no mistake
    reward_of("exact").check([sums, plain], "toy")                          # the toy world's families are as they are
    assert capsys.readouterr().err == ""
    reward_of("exact").check([sums, plain, plain], "my.jsonl")
    assert "2 of 3" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [1, 50, 10 ** 6])
def test_choice_logprobs_equal_a_loop_over_single_prompts_whatever_the_batch(budget, folders):
    model, prompts = load_model(folders["LM"], Setup(WORDS)), []
    for n in (0, 45, 1, 126, 46, 127, 3, 300):
        prompts.append(turn("xy" * n))
    got = M.choice_logprobs(model, prompts, ["A", "B", "7"], budget)
    for logp, ids in zip(got, prompts, strict=True):
        ids = ids[:1] + ids[1:][-127:]              # beyond the context, the end of a question is kept, and whose it is
        logits = slow_logits(model, ids)[-1, WORDS.encode("AB7")]
        close(logp, logits.log_softmax(-1), 1e-4)
    refused("one token", M.choice_logprobs, model, prompts, ["10", "1"], budget)
    refused("one token", M.choice_logprobs, model, prompts, ["1", ""], budget)


# ------------------------------------------------------------------------------------------------ the optimizer


def train_a_little(model, opt, steps):
    for step in range(steps):
        torch.manual_seed(step)
        tokens = torch.randint(0, V, (4, 16))
        loss = -token_logprobs(model, tokens, torch.ones(4, 15)).mean()
        loss.backward()
        opt.step(step)


def random_gradients(model, rng):
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=rng, dtype=p.dtype)


@pytest.mark.parametrize("warmup, floor", [(10, .2), (0, .1), (90, .1)])
def test_p44_the_schedule_is_linear_warm_up_then_cosine_to_the_floor(warmup, floor):
    # a schedule that counts micro-batches runs k times too fast; no warm-up is no 1/0; one may be longer than the run
    opt = Optimizer(gpt(), 1.0, 50, "muon", muon_lr=.3, warmup=warmup, floor=floor)
    peaks = [group["lr"] for group in opt.groups()]
    for step in range(60):
        opt.at(step)
        share = (step + 1) / warmup if warmup else 0
        if step >= warmup:
            turned = math.pi * min(1, (step - warmup) / (50 - warmup))
            share = floor + (1 - floor) * (1 + math.cos(turned)) / 2
        for group, peak in zip(opt.groups(), peaks):
            assert group["lr"] == pytest.approx(share * peak)


@pytest.mark.parametrize("clip", [0, .5, 1e9])
def test_adamw_with_clipping_to_a_global_norm_and_decay_of_matrices_equals_a_slow_loop(clip):
    # decayed norms and biases shrink towards 0
    model, slow = gpt(n_scores=1), gpt(n_scores=1)
    rng = torch.Generator().manual_seed(0)
    opt = Optimizer(model, .01, 100, weight_decay=.5, clip=clip)
    other = runs.SlowOptimizer(slow, .01, 100, SimpleNamespace(warmup=0, clip_grad=clip, weight_decay=.5))
    for step in range(4):
        random_gradients(model, rng)
        for p, q in zip(model.parameters(), slow.parameters()):
            q.grad = p.grad.clone()
        assert opt.step(step) == pytest.approx(other.step(step))
        for p, q in zip(model.parameters(), slow.parameters()):
            close(p, q)
            assert p.grad is None


def test_muon_orthogonalises_the_step_of_hidden_matrices_and_adamw_takes_the_rest():
    # Muon on the embedding or the head, or AdamW on the hidden ones, is another algorithm
    model, lr, muon_lr, decay = gpt(n_scores=1, n_embd=32), .01, .02, 2.0
    opt = Optimizer(model, lr, 100, "muon", muon_lr, decay, clip=0)
    random_gradients(model, torch.Generator().manual_seed(0))
    before = copy.deepcopy(model)
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.step(0)
    for name, p in model.named_parameters():
        old, grad = before.get_parameter(name).detach(), gradient[name]
        shrunk = old * (1 - lr * decay) if p.ndim == 2 else old      # decay is the same for both
        step = shrunk - p.detach()
        if ".h." not in name or p.ndim < 2:
            close(step, lr * grad.sign(), 1e-5)
            continue
        u, s, vt = torch.linalg.svd(grad, full_matrices=False)
        n_in, n_out = p.shape
        rate = muon_lr * max(1, n_out / n_in) ** .5
        turned = u.T @ step @ vt.T / rate                       # diagonal, about 1
        along = turned.diag()
        assert (turned - along.diag()).abs().max() < .05, f"{name}: the step is not along the gradient's directions"
        assert along.max() < 1.4 and along[s > .1 * s[0]].min() > .4, f"{name}: the step has another length"


def slow_orthogonal(matrix):
    """Newton-Schulz of one matrix, in float64."""
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
    return x


@pytest.mark.parametrize("half, exact", [("fp32", 1e-4), ("bf16", .03)])
def test_muon_of_all_matrices_of_a_shape_is_pytorchs_muon_and_a_slow_loop_of_each(half, exact, monkeypatch):
    # rounded to bf16, singular values move by 1 in 100; a step of another matrix's gradient has nothing in common
    monkeypatch.setattr(M, "precision", lambda device: half)
    rng = torch.Generator().manual_seed(0)
    fast = [torch.randn(shape, generator=rng) for shape in ((12, 32), (12, 32), (32, 12), (12, 12), (12, 32), (5, 4))]
    slow, theirs = [p.double() for p in fast], [p.T.clone() for p in fast]  # PyTorch's are (out, in)
    lr, decay, means = .1, .5, [0.0 for _ in fast]
    ours = M.Muon([dict(params=fast, lr=lr, weight_decay=decay)])
    torchs = torch.optim.Muon(theirs, lr=lr, weight_decay=decay)
    for step in range(4):
        for place, (p, q) in enumerate(zip(fast, theirs)):
            if place == 5 and step < 2:
                continue                                        # one that has no gradient yet
            p.grad = torch.randn(p.shape, generator=rng) + .5   # with a part that stays: momentum matters
            q.grad = p.grad.T.clone()
            grad = p.grad.double()
            means[place] = .95 * means[place] + .05 * grad
            along = .95 * means[place] + .05 * grad
            rate = lr * max(1, p.shape[1] / p.shape[0]) ** .5
            slow[place] = slow[place] * (1 - lr * decay) - rate * slow_orthogonal(along)
        ours.step()
        torchs.step()
        for p, q, want in zip(fast, theirs, slow):
            assert p.grad is None
            close(p, want, exact * lr)
            close(p, q.T, .05 * lr)


def test_an_optimizer_does_not_import_the_compiler():
    # which takes a second, at the start of every run
    code = ("import sys, torch, model\nm = model.GPT(model.GPTConfig(n_embd=8, n_head=1))\n"
            "o = model.Optimizer(m, 1e-3, 10, 'muon')\nm(torch.ones(1, 4, dtype=torch.long)).sum().backward()\n"
            "o.step(0)\nassert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_that_forgets_has_no_moments(kind):
    model = gpt()
    opt = Optimizer(model, .01, 10, kind)
    train_a_little(model, opt, 2)
    assert len(opt.tensors()) > 30
    opt.forget()
    assert opt.tensors() == {}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_gradient_is_an_error_that_changes_nothing(bad, kind):
    # one NaN update ends the run, and the checkpoint after it
    model = gpt()
    opt = Optimizer(model, .01, 10, kind)
    train_a_little(model, opt, 2)
    before, state = bits(model), copy.deepcopy(opt.tensors())
    random_gradients(model, None)
    model.transformer.ln_f.bias.grad[3] = bad
    refused("step 2.*gradient", opt.step, 2)
    assert bits(model) == before and runs.same(opt.tensors(), state)


# ------------------------------------------------------------------------------------------------ reference, LoRA


def test_p19_a_reference_shares_no_memory_and_training_does_not_move_it():
    # an aliased reference makes the KL 0 for ever
    model = gpt(dropout=.5).train()
    ref = reference(model)
    for p, q in zip(model.parameters(), ref.parameters()):
        assert p.data_ptr() != q.data_ptr() and not q.requires_grad
    assert not ref.training
    before = bits(ref)
    assert before == bits(model)                            # p21: of the same precision, or its KL is 1e-7 at step 0
    train_a_little(model, Optimizer(model, 1e-2, 10), 10)
    assert bits(ref) == before
    for name, now in bits(model).items():
        assert now != before[name], f"{name} was not trained"


def adapted(stir=.2, vector_lr=0.0, **options):
    """The model of gpt() with adapters; with stir, as training might have left them."""
    model = gpt(dtype=torch.float32, **options)
    model.add_lora(3, 5.0, vector_lr)
    rng = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data += stir * torch.randn(p.shape, generator=rng)
    return model


def logps(model):
    with torch.no_grad():
        return token_logprobs(model, *BATCH)


def is_vector(name):
    """Whether it is a bias or the gain of a norm."""
    return name.endswith(".bias") or re.search(r"ln_\w+\.weight", name) is not None


def test_lora_changes_nothing_at_first_and_then_adds_alpha_over_r_times_a_b():
    # B = 0 at the start; later every linear layer of the blocks is W + (α/r) A B
    plain, model = gpt(dtype=torch.float32), adapted()
    assert torch.equal(logps(adapted(stir=0)), logps(plain))
    roll = rollout(model, RAGGED[:4])
    for name, p in model.named_parameters():
        if name.endswith("lora_A"):
            layer = name.removesuffix(".lora_A")
            change = 5 / 3 * p @ model.get_parameter(layer + ".lora_B")
            assert change.abs().max() > .01
            plain.get_submodule(layer).weight.data += change
    close(logps(model), logps(plain), 1e-4)
    assert len(model.loras()) == 8
    merged = model.merge_lora()
    close(logps(merged), logps(plain), 1e-4)
    check_logps(merged, roll, 1e-4)                         # through the cache it was the same
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("vector_lr", [0.0, .01])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_p19_lora_reference_is_the_base_to_the_bit_and_shares_all_that_is_frozen(precision, vector_lr):
    plain, model = gpt(dtype=torch.float32), adapted(0, vector_lr)
    plain.precision = model.precision = precision
    ref = reference(model)
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    for name, p in ref.named_parameters():
        trained = is_vector(name) and vector_lr > 0
        assert (p.data_ptr() in frozen) != trained, name
    assert not ref.loras() and not any(p.requires_grad for p in ref.parameters())
    train_a_little(model, Optimizer(model, .05, 10), 3)
    assert torch.equal(logps(ref), logps(plain))
    assert (logps(model) - logps(plain)).abs().max() > .1


@pytest.mark.parametrize("vector_lr", [0.0, .5])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_lora_trains_adapters_a_score_head_and_with_a_rate_of_their_own_biases_and_norms(kind, vector_lr):
    model = adapted(.01, vector_lr, n_scores=1)
    before = copy.deepcopy(model.state_dict())
    opt = Optimizer(model, .02, 10, kind, muon_lr=.02, weight_decay=0, warmup=2)       # half of each rate at step 0
    (response_scores(model, *BATCH) * 100).sum().backward()
    opt.step(0)
    for name, tensor in model.state_dict().items():
        moved = (tensor - before[name]).abs().max().item()
        if is_vector(name):
            assert moved == pytest.approx(vector_lr / 2, rel=.05), name
        else:
            assert (moved > 0) == ("lora_" in name or name == "score.weight"), name


def test_lora_options_reach_the_adapter_its_optimizer_and_its_seed():
    def prepared(**options):
        torch.rand(5)                                       # whatever was drawn before
        return gpt(dtype=torch.float32).prepare(sft.Config(lora_r=2, lora_alpha=6.0, **options))

    model = prepared(lora_bias=.02)
    layer = model.loras()[0]
    assert layer.lora_A.shape == (16, 2) and layer.scale == 3 and model.vector_lr == .02
    first, again, other = (bits(prepared(seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


# ------------------------------------------------------------------------------------------------ steps and checkpoints


def small(seed=0, **options):
    """A small reward model, in fp32."""
    return gpt(seed, torch.float32, n_layer=1, n_embd=8, **dict(n_scores=1) | options)


@pytest.fixture
def saved(tmp_path):
    """The folder of an unfinished run."""
    model = small()
    opt = Optimizer(model, .01, 10, "muon")
    random_gradients(model, None)
    opt.step(0)
    facts = dict(tokenizer=TOK.fingerprint, step=1, state=dict(kl=.5), machine="a CPU")
    save_checkpoint(tmp_path, dict(model=model), dict(model=opt), facts)
    return tmp_path


def resume(folder, here="a CPU"):
    """What steps does before its first step."""
    model, state = small(seed=1), {}
    opt = Optimizer(model, .01, 10, "muon")
    run = SimpleNamespace(folder=folder, left=lambda name: folder / name)
    step = M.restore(run, dict(model=model), dict(model=opt), state, here)
    return step, state, bits(model), opt.tensors()


def load(folder, **options):
    return load_model(folder, Setup(TOK), **options)


def change_file(path, change):
    """Read a checkpoint, change(tensors, meta), and write it."""
    tensors, meta = load_tensors(path)
    change(tensors, meta)
    save_tensors(path, tensors, meta)


def tamper(tensors, key, change):
    tensor = tensors.pop(key)
    if change == "rename":
        tensors[key + "x"] = tensor
    if change == "reshape":
        tensors[key] = tensor.new_zeros(*tensor.shape, 2)
    if change == "add":
        tensors |= {key: tensor, key + "x": tensor}


@pytest.mark.parametrize("change", ["drop", "rename", "reshape", "add"])
@pytest.mark.parametrize("key", [
    "optimizer of model/0.0.exp_avg", "optimizer of model/0.3.step", "optimizer of model/1.2.momentum_buffer",
    "model/transformer.wte.weight", "model/transformer.h.0.attn.c_attn.bias", "model/score.weight"])
def test_p46_a_dropped_renamed_reshaped_or_surplus_tensor_is_named(key, change, saved):
    # lenient loading keeps a random head; silently fresh moments are an incomplete resume (p41)
    change_file(saved / "checkpoint.safetensors", lambda tensors, meta: tamper(tensors, key, change))
    part, name = key.split("/")
    refused(re.escape(name), resume, saved)
    if part == "model":
        refused(re.escape(name), load, saved)


@pytest.mark.parametrize("key, value", [("step", None), ("step", -1), ("step", "2"), ("step", 2.0), ("state", [])])
def test_p46_a_resumed_run_is_told_its_step_and_its_state(key, value, saved):
    assert resume(saved)[:2] == (1, dict(kl=.5))
    change_file(saved / "checkpoint.safetensors", lambda tensors, meta: meta.update({key: value}))
    refused("at which step", resume, saved)


def test_a_run_says_where_it_goes_on_on_another_machine(saved, capsys):
    resume(saved)
    assert capsys.readouterr().err == ""
    resume(saved, here="another")
    assert "begun on a CPU" in capsys.readouterr().err


def test_every_seed_and_every_step_draws_its_own_numbers():
    draws = {}
    for seed in (7, 8, 2 ** 62, 2 ** 63 - 1, 7):
        for step in (0, 1, 10 ** 6):
            M.seed_step(seed, step)
            drawn = torch.rand(1).item()
            assert draws.setdefault((seed, step), drawn) == drawn
    assert len(set(draws.values())) == 12


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["transformer.h.0.attn.c_attn.bias", "score.weight"])
def test_a_weight_that_is_no_number_is_named_when_it_is_saved_and_when_it_is_read(key, value, saved):
    path, model = saved / "checkpoint.safetensors", small()
    before = path.read_bytes()
    model.get_parameter(key).data.flatten()[-1] = value
    refused(f"{key}.*{value}", save_checkpoint, saved, dict(model=model), {}, {})
    assert path.read_bytes() == before
    change_file(path, lambda tensors, meta: tensors["model/" + key].fill_(value))
    refused(f"{key}.*{value}", load, saved)


def test_p46_a_model_of_another_kind_is_refused(saved):
    refused("another tokenizer", load_model, saved, Setup(WORDS))
    refused("language model is needed", load, saved, n_scores=0)
    refused("make it with: python sft.py", load, saved / "none", maker="python sft.py")
    save_checkpoint(saved, dict(model=adapted()), {}, dict(tokenizer=TOK.fingerprint))
    refused("unfinished run that trains adapters", load, saved)


@pytest.mark.parametrize("had, wanted", [(0, 2), (1, 1), (1, 3), (3, 2)])
def test_of_several_scores_the_first_ones_are_kept_and_what_is_missing_starts_at_zero(had, wanted, tmp_path):
    model, both = small(n_scores=had), min(had, wanted)
    save_checkpoint(tmp_path, dict(model=model), {}, dict(tokenizer=TOK.fingerprint))
    got = load(tmp_path, n_scores=wanted)
    assert got.config.n_scores == wanted and got.score.weight.shape == (wanted, 8)
    assert not got.score.weight[both:].any()
    if had:
        assert torch.equal(got.score.weight[:both], model.score.weight[:both])
    before, now = bits(model), bits(got)
    before.pop("score.weight", None), now.pop("score.weight")
    assert now == before and not got.training


def peak_memory():
    """The most this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.parametrize("size", [10 ** 9, 10 ** 12, 10 ** 40])
@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "vocab_size", "n_scores", "block_size"])
def test_p46_sizes_that_a_checkpoint_only_promises_take_no_memory(name, size, saved):
    # a thousand million layers: 2.3 GB, then the system ended the process
    before = peak_memory()
    change_file(saved / "checkpoint.safetensors", lambda tensors, meta: meta["config"].update({name: size}))
    refused(str(saved), load, saved)
    refused(str(saved), load, saved, n_scores=3)
    assert peak_memory() < before + 2 ** 28


def test_p42_a_write_that_fails_half_way_leaves_the_old_checkpoint(saved):
    # the real thing: the system refuses to write past 3000 bytes
    path, (soft, hard) = saved / "checkpoint.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    old = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        refused("not saved", save_checkpoint, saved, dict(model=gpt()), {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert not list(saved.glob("*.part"))


def test_p42_the_new_file_is_whole_and_on_the_disk_before_it_takes_the_name(saved, monkeypatch):
    # a rename that overtakes the data leaves an empty file after a power cut
    path, sizes = saved / "checkpoint.safetensors", []
    old = path.read_bytes()

    def full(fd):
        sizes.append(os.fstat(fd).st_size)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused("disk is full", save_checkpoint, saved, dict(model=gpt()), {}, {})
    assert path.read_bytes() == old
    save_checkpoint(saved, dict(model=gpt()), {}, {})
    assert sizes == [path.stat().st_size], "synced before it was whole"


# ------------------------------------------------------------------------------------------------ safetensors files


def header_of(raw):
    """(header, data) of a safetensors file: 8 bytes of little-endian length, a JSON header, then the tensors."""
    size, = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def with_header(header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def signed(header, data):
    """The file of a header and data, with a checksum that fits: only the sense can be wrong."""
    facts = header["__metadata__"]
    if isinstance(facts, dict):
        facts.pop("crc32", None)
        crc = zlib.crc32(json.dumps(header).encode())
        facts["crc32"] = f"{zlib.crc32(data, crc):08x}"
    return with_header(header, data)


def test_tensors_of_every_type_and_shape_come_back_bit_for_bit(tmp_path):
    tensors = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.5), "é/✓": torch.randn(4, 3).T}
    for dtype in M.DTYPES.values():
        tensors[str(dtype)] = torch.arange(6).reshape(2, 3).to(dtype)
    facts = {"a": [1, {"b": None}], "ü": "✓"}
    save_tensors(tmp_path / "x.safetensors", tensors, facts)
    got, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == facts and runs.same(got, tensors)
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype


def test_the_file_is_safetensors_by_its_specification(saved):
    raw = (saved / "checkpoint.safetensors").read_bytes()
    header, content = header_of(raw)
    assert all(isinstance(text, str) for text in header.pop("__metadata__").values())
    tensors, at = load_tensors(saved / "checkpoint.safetensors")[0], 0
    for name, info in header.items():
        start, stop = info["data_offsets"]
        assert (start, stop) == (at, at + 4 * math.prod(info["shape"]))     # without a gap
        values = np.frombuffer(content[start:stop], "<f4")
        assert values.tolist() == tensors[name].flatten().tolist()
        at = stop
    assert at == len(content) and (len(raw) - at) % 8 == 0


NO_FILES = [b"", b"abc", b"hello, this is no checkpoint at all", b"\xff" * 8 + b"{}", bytes(8) + b"{}",
            with_header(b'{"\xff": 1}'), with_header([1]), with_header(None), with_header({}),
            with_header(b"[" * 100_000), with_header(b'{"a": NaN}')]


@pytest.mark.parametrize("content", NO_FILES, ids=range(len(NO_FILES)))
def test_p46_what_is_no_checkpoint_is_refused(content, saved):
    (saved / "checkpoint.safetensors").write_bytes(content)
    refused(str(saved), load, saved)


MALFORMED = [   # where in the header, which key, and another value
    ("header", "__metadata__", []), ("header", "__metadata__", {}), ("header", "model/score.weight", None),
    ("facts", "plainalign", "{"), ("facts", "plainalign", "[1]"), ("facts", "plainalign", 5),
    ("first", "data_offsets", [2048, 0]), ("first", "data_offsets", [-2048, 0]), ("first", "data_offsets", [64, 2112]),
    ("first", "data_offsets", [10 ** 9, 10 ** 9 + 2048]), ("first", "data_offsets", [0.0, 2048.0]),
    ("first", "data_offsets", ["0", "2048"]), ("first", "data_offsets", None),
    ("first", "dtype", "F8"), ("first", "dtype", "F64"), ("first", "dtype", "BOOL"), ("first", "dtype", []),
    ("first", "shape", [-64, -8]), ("first", "shape", "64"), ("first", "shape", [64.0, 8.0]), ("first", "shape", [512]),
    ("config", "n_wings", 2), ("config", "n_head", 0), ("config", "n_layer", "1"), ("config", "dropout", 9.0),
    ("config", "n_embd", 18), ("config", "vocab_size", -1), ("config", "block_size", 20), ("config", "n_scores", "1"),
    ("meta", "config", None), ("meta", "config", {}),
    ("header", "empty", dict(dtype="F32", shape=[0, 2 ** 70], data_offsets=[0, 0]))]


@pytest.mark.parametrize("which, key, value", MALFORMED, ids=str)
def test_p46_a_malformed_checkpoint_is_refused(which, key, value, saved):
    path = saved / "checkpoint.safetensors"
    header, content = header_of(path.read_bytes())
    path.write_bytes(signed(header, content))
    load(saved)                                     # nothing is wrong yet
    facts = header["__metadata__"]
    meta = json.loads(facts["plainalign"])
    places = dict(header=header, facts=facts, first=header["model/transformer.wte.weight"], meta=meta,
                  config=meta["config"])
    places[which][key] = value
    if which in ("meta", "config"):
        facts["plainalign"] = json.dumps(meta)
    path.write_bytes(signed(header, content))
    refused(str(saved), load, saved)


@pytest.mark.parametrize("where", ["length", "header", "data"])
def test_p46_a_damaged_checkpoint_is_refused_or_as_it_was(where, saved):
    # flipped, other, missing or repeated bytes: without a checksum, every flip in the data loaded
    path, rng, harmless = saved / "checkpoint.safetensors", random.Random(3), 0
    raw, (whole, facts) = path.read_bytes(), load_tensors(path)
    begin = 8 + struct.unpack("<Q", raw[:8])[0]     # of the data
    spans = dict(length=(0, 8), header=(8, begin), data=(begin, len(raw)))
    first, last = spans[where]
    for trial in range(120):
        at = rng.randrange(first, last)
        flipped = bytes([raw[at] ^ 1 << rng.randrange(8)])
        other = bytes([rng.choice(b'0123456789-[]{},:"\\ ')])
        repeated = raw[at:at + 1] * rng.randrange(2, 40)
        damage = (flipped, other, b"", repeated)[trial % 4]
        path.write_bytes(raw[:at] + damage + raw[at + 1:])
        with contextlib.suppress(UserError):
            tensors, meta = load_tensors(path)
            assert meta == facts and runs.same(tensors, whole), f"trial {trial}: another checkpoint loaded"
            harmless += 1
    assert harmless == 0 or where == "header" and harmless < 15


@pytest.mark.parametrize("place, key, value", [
    ("model/score.weight", "dtype", "I32"), ("__metadata__", "crc32", "00000000"), ("__metadata__", "crc32", None),
    ("__metadata__", "plainalign", "{}")])
def test_p46_what_does_not_fit_the_checksum_is_refused(place, key, value, saved):
    path = saved / "checkpoint.safetensors"
    header, content = header_of(path.read_bytes())
    header[place][key] = value
    path.write_bytes(with_header(header, content))
    refused("damaged", load_tensors, path)
    if key == "crc32":
        del header[place][key]              # a file of ours has one
        path.write_bytes(with_header(header, content))
        refused("damaged", load_tensors, path)


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def is_dangerous(node):
    """Whether a node of a source unpickles, or runs text as code."""
    if isinstance(node, ast.Import):
        return any(name.name.split(".")[0] in UNPICKLERS for name in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in UNPICKLERS
    if not isinstance(node, ast.Call):
        return False
    call = ast.unparse(node.func)
    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
    if call == "torch.load":
        return options.get("weights_only") != "True"
    if call in ("np.load", "numpy.load"):
        return options.get("allow_pickle", "False") != "False"
    return call in ("eval", "exec", "torch.save", "yaml.load", "pd.read_pickle")


def dangers(source):
    """The lines of a source that do."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if is_dangerous(node)]


def test_p45_nothing_in_the_house_can_unpickle():
    # torch.load of a stranger's checkpoint runs the stranger's code
    for bad in ("import pickle", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)",
                "torch.save(x, f)", "np.load(f, allow_pickle=True)", "eval(x)", "def f():\n import joblib"):
        assert dangers(bad), bad
    for path in [*ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]:
        assert not dangers(path.read_text(encoding="utf-8")), path.name


class Bomb:
    """Unpickled, it makes a folder."""
    def __init__(self, folder):
        self.target = folder / "exploded"

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_p45_a_malicious_pickle_is_refused_and_not_run(name, protocol, tmp_path):
    bomb, folder = Bomb(tmp_path), tmp_path / "hf"
    hf(folder, "bin")
    hostile = pickled({"transformer.wte.weight": bomb}, pickle_protocol=max(2, protocol))
    for content in (pickle.dumps(bomb, protocol), hostile):
        (folder / name).write_bytes(content)
        refused(f"{name}: not", load_model, folder)
    assert not bomb.target.exists()


# ------------------------------------------------------------------------------------------------ Hugging Face's GPT-2

BYTES = data.Tokenizer("gpt2", data.GPT2_PATTERN, {bytes([b]): b for b in range(256)})  # its end token is id 256
SIZE = dict(vocab_size=257, n_positions=16, n_embd=8, n_layer=2, n_head=2)
THERE = dict(model_type="gpt2", activation_function="gelu_new", resid_pdrop=.1, **SIZE)


def golden_weights():
    """{name: tensor} as transformers lays a GPT-2 out: linear layers are (in, out). Each is a sine, about 1 for the
    gain of a norm."""
    shapes = {"wte.weight": (257, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for at in ("h.0.", "h.1."):
        for norm in ("ln_1", "ln_2"):
            shapes[f"{at}{norm}.weight"] = shapes[f"{at}{norm}.bias"] = (8,)
        for layer, n_in, n_out in (("attn.c_attn", 8, 24), ("attn.c_proj", 8, 8), ("mlp.c_fc", 8, 32),
                                   ("mlp.c_proj", 32, 8)):
            shapes[f"{at}{layer}.weight"] = (n_in, n_out)
            shapes[f"{at}{layer}.bias"] = (n_out,)
    tensors = {}
    for name, shape in shapes.items():
        name = "transformer." + name
        places = torch.arange(math.prod(shape), dtype=torch.float64)
        tensors[name] = .4 * torch.sin(places * .7 + len(name)).view(shape)
        if "ln_" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


def safetensors(tensors):
    """The bytes of a safetensors file of others: no checksum."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        begin, kind = len(body), {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        body += tensor.contiguous().numpy().tobytes()
        header[name] = dict(dtype=kind, shape=list(tensor.shape), data_offsets=[begin, len(body)])
    return with_header(header, body)


def pickled(content, **options):
    """The bytes of a pytorch_model.bin."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def hf(folder, kind="safe", tensors=None, **config):
    """A folder with a GPT-2 in Hugging Face's layout, in one of the ways in which such are found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(THERE | config))
    tensors = golden_weights() if tensors is None else tensors
    if kind == "old bin":       # a bare trunk, masks in it, torch's first format
        old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        old |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4),
                "h.1.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8)}
        content = pickled(old, _use_new_zipfile_serialization=False)
        (folder / "pytorch_model.bin").write_bytes(content)
        return folder
    write, name = (safetensors, "model.safetensors") if "safe" in kind else (pickled, "pytorch_model.bin")
    if "shards" not in kind:
        (folder / name).write_bytes(write(tensors))
        return folder
    where = {}
    for place, key in enumerate(tensors):
        where[key] = f"{place % 2}-{name}"
    for file in set(where.values()):
        held = {key: tensors[key] for key in tensors if where[key] == file}
        (folder / file).write_bytes(write(held))
    (folder / f"{name}.index.json").write_text(json.dumps(dict(weight_map=where)))
    return folder


@pytest.mark.parametrize("kind", ["safe", "safe shards", "bin", "bin shards", "old bin"])
def test_gpt2_of_hugging_face_gives_the_logits_of_transformers(kind, tmp_path):
    """The numbers are what transformers 5.23 computes in float64 from the same weights."""
    model = load_model(hf(tmp_path, kind))
    logits = slow_logits(model, [5, 250, 17, 99, 256, 0, 1])
    assert logits.shape == (7, 257)
    for t, v, want in [(0, 3, -1.987912682831762), (1, 200, .7154162144844138), (3, 0, 2.031249966184696),
                       (5, 128, 2.2609788704013063), (6, 256, 2.063353486926129)]:
        assert logits[t, v].item() == pytest.approx(want, abs=2e-6)         # loaded as float32


@pytest.mark.parametrize("more", [
    {}, M.GPT2 | dict(n_inner=32, n_ctx=16), dict(plainalign={}), dict(plainalign="someone else's")], ids=str)
def test_gpt2_in_half_precision_grows_by_our_special_tokens_and_keeps_its_ids(more, tmp_path):
    """Id 256, its end of text, is our end token; the others are the mean row; rows that only pad the matrix are 0."""
    tensors = {name: tensor.half() for name, tensor in golden_weights().items()}
    there = tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    hf(tmp_path, tensors={"x": torch.ones(1)}, kind="bin")                  # of both kinds safetensors counts
    model = load_model(hf(tmp_path, tensors=tensors, **more), Setup(BYTES))
    wte = model.transformer.wte.weight.detach()
    there = there.float()
    assert BYTES.end == 256 and model.config.vocab_size == 261 and wte.shape == (320, 8)
    assert torch.equal(wte[:257], there)
    close(wte[257:261], there.mean(0).expand(4, 8), 1e-7)
    assert not wte[261:].any()
    fc = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(model.get_parameter(fc), tensors[fc].float())
    assert model.config.dropout == 0 or "plainalign" in more, "dropout is an option of training"


def ours(**size):
    """A model of ours, of the golden model's size and with our special tokens."""
    return gpt(3, torch.float32, tok=BYTES, **dict(vocab_size=261, n_embd=8) | size)


@pytest.mark.parametrize("n_scores, lora", [(0, 0), (0, 2), (1, 0), (3, 2)])
def test_gpt2_what_we_write_has_hugging_faces_names_and_shapes_and_loads_as_the_same_model(n_scores, lora, tmp_path):
    model = ours(n_scores=n_scores, dropout=.25)
    if lora:
        model.add_lora(lora, 4.0)
        for layer in model.loras():
            layer.lora_B.data.fill_(.2)
    before = bits(model)
    write_model(tmp_path, model)
    assert bits(model) == before
    want = {name: tensor.shape for name, tensor in golden_weights().items()}
    want["transformer.wte.weight"] = (261, 8)
    if n_scores:
        want["score.weight"] = (n_scores, 8)
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == want
    header, _ = header_of((tmp_path / "model.safetensors").read_bytes())
    assert header["__metadata__"]["format"] == "pt"         # transformers asks for it
    facts = json.loads((tmp_path / "config.json").read_text())
    assert len(facts.pop("id2label", {})) == n_scores
    architecture = "GPT2ForSequenceClassification" if n_scores else "GPT2LMHeadModel"
    assert facts == M.GPT2 | SIZE | dict(
        architectures=[architecture], vocab_size=261, resid_pdrop=.25, embd_pdrop=.25, attn_pdrop=0.0, dtype="float32",
        bos_token_id=256, eos_token_id=256, pad_token_id=257, plainalign=dict(tokenizer=BYTES.fingerprint))
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer == BYTES.huggingface()["tokenizer.json"]
    back = load_model(tmp_path, Setup(BYTES))
    assert back.config == model.config and not back.training
    assert bits(back) == bits(model.merge_lora())


@pytest.mark.parametrize("key, value, match", [
    *((key, "other", key) for key in M.GPT2), ("n_inner", 7, "n_inner"), ("n_head", None, "n_head"),
    ("n_head", "2", "n_head"), ("vocab_size", 257.0, "vocab_size"), ("vocab_size", 300, "wte.weight"),
    ("n_embd", 2 ** 40, "wte.weight"), ("n_positions", 16 * 10 ** 13, "wpe.weight"), ("n_layer", 3, "2 layers, .* 3"),
    ("n_layer", 10 ** 12, "2 layers")])
def test_p46_a_gpt2_of_another_shape_is_refused(key, value, match, tmp_path):
    refused(match, load_model, hf(tmp_path, **{key: value}), Setup(BYTES))


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about sparse tensors
@pytest.mark.parametrize("kind, match, name, tensor", [
    ("safe", "h.1.mlp.c_fc.weight is missing", "transformer.h.1.mlp.c_fc.weight", None),
    ("safe", "wte.weight is missing", "transformer.wte.weight", None),
    ("safe", "wte.weight is missing, or not", "transformer.wte.weight", torch.ones(257, 9)),
    ("safe", "does not belong", "transformer.h.0.extra", torch.ones(1)),
    ("safe", "score", "score.weight", torch.tensor(1.0)),
    ("safe", "c_fc.weight is", "transformer.h.1.mlp.c_fc.weight", torch.ones(8, 4, 8)),
    ("safe", "lm_head.weight is not the embedding", "lm_head.weight", torch.ones(257, 8)),
    ("bin", "ln_1.bias is missing", "transformer.h.0.ln_1.bias", torch.ones(8, dtype=torch.complex64)),
    ("bin", "not readable", "transformer.ln_f.bias", torch.ones(8, device="meta")),
    ("bin", "not readable", "x", torch.ones(2, 2).to_sparse()), ("bin", "not readable", "x", 1),
    ("bin", "does not belong", 7, torch.ones(1))])
def test_p46_a_gpt2_of_other_weights_is_refused(kind, match, name, tensor, tmp_path):
    tensors = golden_weights() | {name: tensor}
    if tensor is None:
        del tensors[name]
    refused(match, load_model, hf(tmp_path, kind, tensors), Setup(BYTES))


def index_of(**where):
    return json.dumps(dict(weight_map=where)).encode()


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("kind, match, file, content", [
    ("safe", "no JSON", "config.json", b'{"model_type":' + b"[" * 200_000), ("safe", "no JSON", "config.json", b"\xff"),
    ("safe", "earlier version", "config.json", b'{"lr": 0.001}'),
    ("safe", "not a checkpoint", "model.safetensors", b""),
    ("safe", "longer", "model.safetensors", safetensors(golden_weights()) + b" "),
    ("bin", "not readable", "pytorch_model.bin", b"a page of HTML"),
    ("bin", "not readable", "pytorch_model.bin", pickled(golden_weights())[:-90]),
    ("bin", "not readable", "pytorch_model.bin", pickled([torch.ones(1)])),
    ("safe shards", "not where", "1-model.safetensors", safetensors(golden_weights())[:-5]),
    ("safe shards", "no weight_map", INDEX, b'{"weight_map": []}'), ("safe shards", "not a JSON object", INDEX, b"[1]"),
    ("safe shards", "missing", INDEX, index_of(x="0-model.safetensors")), ("safe shards", "missing", INDEX, index_of()),
    ("safe shards", "gone: no such file", INDEX, index_of(x="gone")),
    ("safe shards", "3: no such file", INDEX, index_of(x=3)),
    ("safe shards", "no file of this folder", INDEX, index_of(x="../other/model.safetensors"))], ids=range(16))
def test_p46_a_gpt2_of_other_files_is_refused(kind, match, file, content, tmp_path):
    hf(tmp_path, kind)
    (tmp_path / file).write_bytes(content)
    refused(match, load_model, tmp_path, Setup(BYTES))


def test_p46_weights_that_are_missing_and_another_vocabulary_are_named(tmp_path):
    refused("257 tokens, and --tokenizer has 763, which", load_model, hf(tmp_path / "hf"), Setup(WORDS))
    (tmp_path / "hf" / "model.safetensors").unlink()
    refused("neither model.safetensors nor pytorch_model.bin", load_model, tmp_path / "hf")
    (tmp_path / "config.json").mkdir()
    refused("config.json: Is a directory", load_model, tmp_path)


def test_p42_a_run_does_not_write_over_a_model_of_others(tmp_path):
    before = (hf(tmp_path) / "config.json").read_bytes()
    cfg = sft.Config(out=str(tmp_path), init="new", device="cpu", steps=1)
    for cfg.overwrite in (False, True):
        refused("holds a model that no run of this version made", sft.train, cfg)
    assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "run.json").write_text("null")
    cfg.overwrite = False
    refused("run.json: not a run's options", sft.train, cfg)


# ------------------------------------------------------------------------------------------------ device, chat


@pytest.mark.parametrize("dtype, want", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_setup_chooses_the_precision_of_the_matmuls(dtype, want, saved, capsys, monkeypatch):
    # a model that is made like another, new or loaded, multiplies as that one does
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    like = M.setup(SimpleNamespace(device="cpu", dtype=dtype, threads=0, micro_tokens=0), TOK)
    assert f"1 thread, {dtype}" in capsys.readouterr().out
    model = M.new_model(small().config, like)
    for made in (model, load_model(saved, like), load_model(saved, model)):
        logits = made.logits(made(torch.tensor([[1, 2]])))
        assert logits.dtype == want and made.tok is TOK and made.device == like.device


@pytest.mark.parametrize("gpus, name, want", [
    (0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cuda:1", "cuda:1"),
    (0, "cuda", UserError), (2, "cuda:2", UserError), (2, "foo", OptionError), (2, "", OptionError),
    (2, "cuda:x", OptionError), (2, "cuda:-1", OptionError), (2, "cuda:99999", OptionError), (2, "cpu:7", OptionError)])
def test_a_device_is_found_or_one_clear_line(gpus, name, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if isinstance(want, str):
        assert M.find_device(name) == torch.device(want)
    else:
        refused("--device", M.find_device, name, kind=want)


@pytest.mark.parametrize("amx, avx512, told, want", [
    (True, True, "", "bf16"), (False, True, "", "bf16"), (True, None, "", "bf16"), (False, False, "", "fp32"),
    (None, None, "", "fp32"), (True, True, "AVX512_CORE", "fp32"), (False, True, "avx2", "fp32"),
    (False, True, "AVX512_CORE_BF16", "bf16")])
def test_auto_is_bf16_where_a_cpu_may_use_instructions_for_it(amx, avx512, told, want, monkeypatch):
    # with avx512_bf16 alone it took fp32
    for name, has in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
        if has is None:                                                     # a PyTorch that has no such question
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", told)
    assert M.precision(torch.device("cpu")) == want
    assert M.precision(torch.device("cpu"), "bf16") == "bf16"
    here = M.machine(torch.device("cpu"))
    assert here.endswith(f", {want}") and (f"at most {told}" in here) == bool(told), "what is hidden is said"


@pytest.mark.parametrize("emulated", [True, False])
def test_auto_is_fp32_on_a_gpu_that_only_emulates_bf16(emulated, monkeypatch):
    def is_supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert M.precision(torch.device("cuda")) == ("fp32" if emulated else "bf16")


def test_chat_answers_every_piped_line_with_whole_characters(tmp_path, monkeypatch, capsys):
    # printed byte by byte, é is two question marks
    said, prompt = "é€😀 ok", turn("hi")
    answer = WORDS.encode(said) + [WORDS.end]
    model = scripted([prompt], [answer], tok=WORDS, vocab_size=WORDS.n_vocab, n_embd=32, n_layer=1, block_size=64)
    write_model(tmp_path, model.float())
    monkeypatch.setattr(sys, "argv", ["model.py", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nhi\n"))
    M.main()
    assert capsys.readouterr().out == f"{said}\n{said}\n"


def test_chat_leaves_room_for_an_answer_to_a_prompt_beyond_the_context(capsys):
    model = gpt(tok=WORDS, vocab_size=WORDS.n_vocab, block_size=32)
    said = [dict(role="user", content="so " * 100)]
    M.answer(model, said, M.Config(max_new=4))                      # without room it would be refused
    assert capsys.readouterr().out.endswith("\n")
