"""What lives on the device: the GPT, its log-probabilities, the sampler, the optimizer, checkpoints.

The model is GPT-2 with Hugging Face's names and shapes, so a finished run's folder is one of theirs and they load each
other's. The same trunk carries either the language-model head (tied to the embedding) or `n_scores` numbers per token,
which is all a reward model or a value function is. No algorithm lives here, and this file imports none.

    python model.py out/ppo                            talk to a checkpoint
    echo "What is 7 + 8?" | python model.py out/ppo    answer every line of standard input

One layout for every sequence, in training and in sampling: prompt, response, end token, then padding on the right. With
causal attention a real token never sees padding on its right, so no attention mask is needed, and positions are always
0, 1, 2, ... Two cases need more: rows into which several sequences are packed, and the cache of the sampler. They say
which positions their tokens have, `pos`, and what a token may look at, `see`.

`tokens` is (B, T). The log-probability at index t belongs to token t+1, so `logp` and `mask` are (B, T-1); `mask` is 1
where token t+1 counts, as a token of the response does.

Words that come back: `cfg`, the options of a script; `tok`, the tokenizer; `like`, a Setup or a model, whose tokenizer,
device and precision another model gets; `budget`, the most tokens a micro-batch may hold, padding included; a row, one
sequence of a batch, from data.py as (ids, target), where target[1:] becomes its mask; `rows`, which of them, as
indices; a rollout, prompts with sampled responses.

Letters in shape comments: B rows, T tokens, C width, H heads, D = C/H, V vocabulary, S slots of the cache, P prompts,
N chosen tokens; b and t for the rows and tokens of a micro-batch.
"""
import contextlib
import copy
import ctypes
import errno
import functools
import json
import math
import os
import platform
import re
import struct
import sys
import weakref
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.adamw import adamw
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute

from data import (COLDEST, POINTS, RUBRIC, VERIFIERS, Count, Natural, NonNegative, OptionError, Options, Share,
                  Tokenizer, UserError, after_thinking, answer_rows, check_needs, class_prompt, collate, cut_prompt,
                  guard, mean, micro_batches, number, pad, parse, parse_rewards, rate_prompt, round_up, send, truth,
                  verifier, write_text)


# ------------------------------------------------------------------------------------------------ the model


@dataclass
class GPTConfig:
    """The shape of a GPT; impossible ones are a UserError."""
    vocab_size: int = 512  # ids of the tokenizer, special tokens included
    block_size: int = 256  # longest sequence
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0   # on the embedding and on both residual branches, in training mode only
    n_scores: int = 0      # 0: language model; k > 0: k scalars per token instead (reward model, value function)

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_scores"):
            value = getattr(self, name)
            least = 0 if name == "n_scores" else 1
            if type(value) is not int or value < least:
                raise UserError(f"{name} {value}: must be a whole number of at least {least}")
            if value >= 2 ** 48:  # PyTorch overflows when it counts the bytes of more
                raise UserError(f"{name} {value}: no computer holds that")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of {self.n_head} (n_head)")
        if self.block_size % 16:  # batches are padded to that
            raise UserError(f"block_size {self.block_size} is not a multiple of 16")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout}: must be at least 0 and below 1")


class Linear(nn.Module):
    """x W + b, with W (in, out) as in GPT-2's files; nn.Linear has it the other way round.

    With an adapter (LoRA, Hu et al. 2106.09685) it is x W + b + (α/r) x A B. Only A (in, r) and B (r, out) are trained
    then. B = 0 at first, so that nothing changes at first.
    """

    def __init__(self, n_in, n_out):
        super().__init__()
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.weight = nn.Parameter(torch.empty(n_in, n_out))  # GPT draws them
        self.bias = nn.Parameter(torch.empty(n_out))

    def add_lora(self, r, alpha):
        n_in, n_out = self.weight.shape
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.randn(n_in, r, device=device) * n_in ** -0.5)
        self.lora_B = nn.Parameter(torch.zeros(r, n_out, device=device))
        self.scale = alpha / r

    def merged(self):
        """The weight with the adapter in it: x times it is what forward makes of x, but for the bias."""
        return self.weight if self.lora_A is None else self.weight + self.scale * self.lora_A @ self.lora_B

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])  # addmm takes matrices, and is faster than a product and a sum
        y = torch.addmm(self.bias, rows, self.weight).view(*x.shape[:-1], self.weight.shape[1])
        if self.lora_A is not None:
            y = y + self.scale * (x @ self.lora_A @ self.lora_B)
        return y


def bias_of(see, dtype):
    """What hides the rest: `see`, a boolean, True where a query may look, -> 0 there and -inf elsewhere."""
    return torch.zeros(see.shape, device=see.device, dtype=dtype).masked_fill_(~see, -torch.inf)


def attend(q, k, v, bias):
    """Scaled dot-product attention: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    bias (B, 1, T, S) is added to the scores, see bias_of; None is causal self-attention.
    """
    # On a CPU (an EPYC with avx512_bf16) the fused kernel is slow in two places, the bf16 backward (6x) and the single
    # query of decoding (2x, in bf16 5x); three plain operators are not.
    if q.is_cuda or (q.dtype != torch.bfloat16 and q.shape[2] > 1):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    T, D = q.shape[2:]
    if bias is None:
        bias = bias_of(torch.ones(T, T, dtype=torch.bool).tril(), q.dtype)
    scores = (q * D ** -0.5) @ k.transpose(2, 3) + bias                                  # (B, H, T, S)
    return torch.softmax(scores, -1, dtype=scores.dtype) @ v  # autocast would make it fp32 if not told


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C), from the cache where there is one.

    pos, the position of each token, (B, T) or (T,), is not needed here: GPT-2 adds positions to the embedding. Rotary
    positions would turn q and k by it, before they are cached.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head, self.layer = config.n_head, layer

    def forward(self, x, pos, bias, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)       # (3, B, H, T, D)
        q, k, v = qkv.unbind(0)
        if cache is not None:
            k, v = cache.write(self.layer, qkv[1:])                                      # (B, H, S, D) each
        y = attend(q, k, v, bias)                                                        # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers around GPT-2's tanh GELU, (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.fused = False  # in a copy to sample from, which needs no gradient

    def forward(self, x):
        if self.fused:  # in bf16 on a CPU tanh alone takes longer than the matmul before it; oneDNN does both faster
            weight, bias = self.c_fc.weight, self.c_fc.bias
            hidden = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight.t(), bias, "gelu", [], "tanh")
        else:
            hidden = F.gelu(self.c_fc(x), approximate="tanh")
        return self.c_proj(hidden)


class Block(nn.Module):
    """One layer: attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, pos, bias=None, cache=None, where=None):
        """(B, T, C) -> (B, T, C), or with where, rows (N,) and places (N,), what comes out there, (N, C)."""
        x = x + self.drop(self.attn(self.ln_1(x), pos, bias, cache))
        if where is not None:  # from here on every token is on its own
            x = x[where]
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2. Calling it gives hidden states; `logits` and `scores` are the two things one can read off them.

    It knows its tokenizer, `tok`, and the precision of its matmuls, fp32 or bf16; its weights are fp32 in both.
    """

    def __init__(self, config, tok=None):
        super().__init__()
        self.config, self.tok, self.precision = config, tok, "fp32"
        # Rows up to the next multiple of 64 keep the matmul of the head fast; `logits` cuts them off again, so
        # an id without a token has no probability and cannot be sampled.
        rows = round_up(config.vocab_size, 64)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(rows, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.score = nn.Linear(config.n_embd, config.n_scores, bias=False) if config.n_scores else None
        self.grad_checkpoint = False  # recompute each block in the backward pass: less memory, 4/3 of the time
        self.fused_bwd = False  # whether its Optimizer updates in the backward pass, see there
        self.vector_lr = 0.0    # with LoRA, the learning rate of biases and norms; 0: they are frozen like the rest
        self.rounded_head = None  # of a copy to sample from, see for_sampling
        self.read_logprobs = read_logprobs  # or with --compile that, compiled
        self.apply(self._init)
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: keeps the residual stream's variance at depth 2 n_layer
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * config.n_layer))
        if self.score is not None:
            nn.init.zeros_(self.score.weight)
        with torch.no_grad():
            self.transformer.wte.weight[config.vocab_size:] = 0  # no row of the vocabulary, and never trained

    @staticmethod
    def _init(module):
        if isinstance(module, (Linear, nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Linear):
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    @property
    def matmul_dtype(self):
        return torch.bfloat16 if self.precision == "bf16" else self.transformer.wte.weight.dtype

    def autocast(self):
        """The context of its matmuls. forward and logits enter it themselves. Around several passes it spares work: the
        bf16 copies of the weights are then made once."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, tokens, pos=None, see=None, cache=None, where=None):
        """tokens (B, T) -> hidden states (B, T, C), or with where, rows (N,) and places (N,), only those there, (N, C).

        pos (B, T) or (T,): positions, 0..T-1 when absent. see (B, 1, T, T): what may look at what, causal when absent.
        cache: keys and values of earlier positions, which this call extends at `pos`. The last layer's MLP runs only
        where it is asked for: what a prompt's tokens become there is needed by nothing.
        """
        T, longest = tokens.shape[1], self.config.block_size
        if pos is None:
            if T > longest:
                raise UserError(f"a sequence of {T} tokens does not fit the context of {longest}")
            pos = torch.arange(T, device=tokens.device)
        if cache is not None:
            see = cache.prepare(pos.expand(tokens.shape))
        bias = None if see is None else bias_of(see, self.matmul_dtype)
        part = self.transformer
        with self.autocast():
            x = part.drop(part.wte(tokens) + part.wpe(pos))                              # (B, T, C)
            for block in part.h:
                there = where if block is part.h[-1] else None
                if self.grad_checkpoint and torch.is_grad_enabled():  # no cache then: sampling has no gradient
                    x = recompute(block, x, pos, bias, None, there, use_reentrant=False)
                else:
                    x = block(x, pos, bias, cache, there)
            return part.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., V), in the precision of the matmul."""
        head = self.transformer.wte.weight if self.rounded_head is None else self.rounded_head
        with self.autocast():
            return F.linear(hidden, head)[..., :self.config.vocab_size]

    def scores(self, hidden):
        """(..., C) -> (..., n_scores), never in bf16: different answers would round to one number."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(full(hidden))

    def prepare(self, cfg):
        """Switch on what the run's options ask of a model that is to be trained, and return it."""
        self.grad_checkpoint, self.fused_bwd = cfg.grad_checkpoint, cfg.fused_bwd
        if cfg.lora_r:
            torch.manual_seed(cfg.seed)
            self.add_lora(cfg.lora_r, cfg.lora_alpha, vector_lr=cfg.lora_bias)
        if cfg.compile:
            check_compiler(self.device)
            for block in self.transformer.h:  # all but the last are alike: two are compiled, however many there are
                block.compile(dynamic=True)   # (a copy is not compiled, such as the one to sample from)
            self.read_logprobs = torch.compile(read_logprobs, dynamic=True)
        return self

    def add_lora(self, r, alpha, vector_lr=0.0):
        """Freeze everything but a score head, and give every linear layer of the blocks an adapter of rank r. If
        vector_lr is not 0, biases and norms are trained too, at that rate (BitFit, Ben Zaken et al. 2106.10199)."""
        self.requires_grad_(False)
        if self.score is not None:
            self.score.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, Linear):
                module.add_lora(r, alpha)
        self.vector_lr = vector_lr
        for param in self.transformer.parameters():
            if vector_lr and param.ndim == 1:
                param.requires_grad_(True)

    def loras(self):
        """Its layers that have an adapter."""
        return [module for module in self.modules() if isinstance(module, Linear) and module.lora_A is not None]

    @torch.no_grad()
    def merge_lora(self):
        """Write the adapters into the weights: the same function as a plain model again."""
        for layer in self.loras():
            layer.weight.copy_(layer.merged())
        return self.remove_lora().requires_grad_(True)

    def remove_lora(self):
        """Throw the adapters away."""
        for layer in self.loras():
            layer.lora_A = layer.lora_B = None
        return self


def check_compiler(device):
    """A UserError where torch.compile does not work on a device: it needs a C++ compiler, and Triton on a GPU."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # whatever is missing, it is an error of its own
        why = " ".join(str(error).partition("\n\n")[0].split())
        raise UserError(f"--compile: PyTorch's compiler does not work here ({why})") from None


def reference(policy):
    """π_ref = the policy as it is now, without its adapters: a model that training cannot move.

    What is frozen in the policy is shared rather than copied, so with LoRA it takes next to no memory. Called before
    the first step: the adapters are 0 then, and biases and norms are what they were.
    """
    shared = {id(param): param for param in policy.parameters() if not param.requires_grad}
    ref = copy.deepcopy(policy, memo=shared)  # what is in the memo is used as it is
    return ref.remove_lora().requires_grad_(False).eval()


class Cache:
    """Keys and values of every layer. Slot s of row b holds position s of row b, so rows of any length share it.

    A slot that a row has not reached yet may hold padding, from behind a shorter prompt, or what an earlier rollout
    left; `prepare` hides it until the row overwrites it. Only the first `rows` rows and `slots` slots are in use.
    """

    def __init__(self, model, rows, slots):
        config = model.config
        shape = (config.n_layer, 2, rows, config.n_head, slots, config.n_embd // config.n_head)
        # Zeros, not empty: a hidden slot has weight 0, and 0 * NaN would still be NaN.
        self.kv = torch.zeros(shape, device=model.device, dtype=model.matmul_dtype)      # (L, 2, B, H, S, D)
        self.rows, self.slots = rows, slots

    def reserve(self, slots):
        """Use the positions below `slots`, and make room for them where there is none yet."""
        more = slots - self.kv.shape[4]
        if more > 0:
            self.kv = F.pad(self.kv[:, :, :self.rows], (0, 0, 0, more))
        self.slots = slots

    def prepare(self, pos):
        """Get ready to write at pos (B, T); returns what may be seen, (B, 1, T, S): for a token the slots up to its
        own."""
        rows, heads, slots = (torch.arange(n, device=pos.device) for n in (self.rows, self.kv.shape[3], self.slots))
        # Where the new keys go, (B, H, T) each. (contiguous: a GPU would copy them in every layer.)
        index = torch.broadcast_tensors(rows[:, None, None], heads[None, :, None], pos[:, None, :])
        self.index = [places.contiguous() for places in index]
        return (slots <= pos[:, :, None])[:, None]

    def write(self, layer, kv):
        """Store keys and values, (2, B, H, T, D), of the tokens being processed -> all keys and all values that are in
        use, (B, H, S, D) each."""
        mine = self.kv[layer]                                                            # (2, B, H, S, D)
        mine[:, *self.index] = kv.to(mine.dtype)
        return mine[:, :self.rows, :, :self.slots].unbind(0)

    def take(self, other, rows):
        """Begin with the keys and values of these rows, an index (B,), of another cache."""
        self.rows, slots = len(rows), other.kv.shape[4]
        self.kv[:, :, :, :, :slots] = other.kv.index_select(2, rows)

    def select(self, rows):
        """Keep these rows, an index (n,): they become the first n."""
        self.rows = len(rows)
        self.kv[:, :, :self.rows] = self.kv.index_select(2, rows)


# ------------------------------------------------------------------------------------------------ log-probabilities


def wide(x):
    """The dtype of losses, log-probabilities and values: at least fp32, never half precision. (Tests use float64.)"""
    return torch.promote_types(x.dtype, torch.float32)


def full(x):
    """A tensor in that dtype."""
    return x.to(wide(x))


def token_logprobs(model, tokens, mask, temperature=1.0, entropy=False, bonus=False, chunk=None, pos=None, see=None):
    """log π(token t+1 | tokens 0..t) where mask is not 0, and exactly 0 elsewhere.

    tokens (B, T), mask (B, T-1) -> logp (B, T-1), at least fp32; with entropy=True also the entropy of each of those
    next-token distributions, in nats. A gradient it has only if it is a bonus in the loss, as that takes more time than
    the entropy itself. Both are at the sampling temperature: a policy that was sampled at temperature τ
    *is* softmax(logits / τ), and PPO's ratio π / π_old is right only if both are divided by τ. pos and see are those of
    packed rows, see sft.pack. The head runs only where the mask is 1, on `chunk` positions at a time, see at_positions:
    no (B, T, V) tensor ever exists.
    """
    def head(hidden, target):                                                            # (N, C), (N,)
        return model.read_logprobs(model, hidden, target, temperature, entropy, bonus)

    where = mask.nonzero(as_tuple=True)  # (N,), (N,): found once, since a GPU has to be waited for to know N
    target = tokens[:, 1:][where]                                                        # (N,)
    chunk = chunk or head_chunk(model)
    with model.autocast():
        hidden = model(tokens, pos, see, where=where)                                    # (N, C)
        out = at_positions(head, mask.shape, where, hidden, target, chunk=chunk)
    return out if entropy else out[0]


def read_logprobs(model, hidden, target, temperature, entropy, bonus):
    """log π of the tokens that came next, target (N,), given hidden states (N, C), and with entropy that too, as a tuple
    of (N,). See token_logprobs."""
    logits = model.logits(hidden)                                                        # (N, V)
    if temperature != 1:
        logits = full(logits) / temperature
    every = F.log_softmax(logits, -1, dtype=wide(logits))                                # (N, V)
    logp = every.gather(1, target[:, None])[:, 0]                                        # (N,)
    if not entropy:
        return (logp,)
    every = every if bonus else every.detach()
    return logp, -(every.exp() * every).sum(-1)


def head_chunk(model):
    """How many positions the head takes at a time: 2^24 logits; on a GPU one logit for each 64 bytes of its memory. A
    logit and what is made of it take some 10 bytes, so that is a sixth."""
    logits = 2 ** 24
    if model.device.type == "cuda":
        logits = torch.cuda.get_device_properties(model.device).total_memory // 64
    return max(64, logits // model.config.vocab_size)


def at_positions(head, shape, where, *inputs, chunk):
    """head(*inputs) at chosen positions, 0 elsewhere: shape is (B, T-1), where rows (N,) and places (N,), inputs are
    (N, ...) each -> a tuple of (B, T-1).

    head gives a tuple of (N,). Beyond `chunk` positions it runs on one chunk after the other, and the backward pass
    recomputes them, so that what head makes on the way, such as logits (N, V), never exists whole.
    """
    save_memory = len(inputs[0]) > chunk and torch.is_grad_enabled()
    results = []  # of each chunk a tuple, as (logp, entropy)
    for some in zip(*(x.split(chunk) for x in inputs)):  # the inputs of one chunk
        results.append(recompute(head, *some, use_reentrant=False) if save_memory else head(*some))
    columns = zip(*results)  # of all chunks logp, then entropy
    return tuple(scattered(shape, where, torch.cat(column)) for column in columns)


def scattered(shape, where, values):
    """The N values (N,) at the places `where`, rows (N,) and places (N,), 0 elsewhere. That is no product with a mask:
    what is not a response token cannot leak, NaN included."""
    return values.new_zeros(shape).index_put(where, values)


def token_scores(model, tokens, mask):
    """The first score of the state before each masked token, 0 elsewhere: (B, T), (B, T-1) -> (B, T-1).

    At index t it has seen tokens 0..t: for a value function, V of the state in which token t+1 was chosen.
    """
    where = mask.nonzero(as_tuple=True)                                                  # (N,), (N,)
    hidden = model(tokens, where=where)                                                  # (N, C)
    return scattered(mask.shape, where, model.scores(hidden)[:, 0])


def response_scores(model, tokens, mask):
    """The scores read at each row's last response token: (B, T), (B, T-1) -> (B, n_scores).

    Neither the amount of padding nor an end token inside the prompt moves the place.
    """
    B, T = tokens.shape
    place = mask.bool() * torch.arange(1, T, device=mask.device)  # (B, T-1): t+1, the token that mask[t] is about
    where = torch.arange(B, device=mask.device), place.amax(1)                           # (B,), (B,)
    return model.scores(model(tokens, where=where))


# ------------------------------------------------------------------------------------------------ the sampler


# On a GPU a step of the sampler is a few hundred kernels, each done sooner than the next is launched. A recording (a
# CUDA graph) launches them all at once: a prototype was 3 to 11 times faster on an H200. What it reads and writes has to
# stay in its place, and each number of rows and of slots takes a recording of its own: so there are few of both, and
# they are kept.
CAPTURES = {"cpu": False, "cuda": True}
# cuDNN's attention is the quickest for one token, but it prepares itself for each new shape, in tenths of a second. So
# only recordings have it, see setup.
FOR_ONE_TOKEN = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOOK = {"cpu": 1, "cuda": 8}  # how many steps until the next look at which rows are finished: a look makes a GPU wait


@dataclass
class Rollout:
    """What the sampler drew: the very tensors a trainer uses, never decoded and encoded again."""
    tokens: torch.Tensor    # (B, T) prompt, response, end token, padding
    mask: torch.Tensor      # (B, T-1) 1 where the log-probability at t belongs to a response token, the end included
    logp: torch.Tensor      # (B, T-1) log-probability under the sampling distribution, 0 where nothing was drawn
    finished: torch.Tensor  # (B,) whether the end token was drawn (False: cut off at max_new or block_size)
    prompt_len: list        # (B,) tokens in the prompt
    tok: Tokenizer          # whose ids they are

    @functools.cached_property
    def lengths(self):
        """Tokens of each row without padding."""
        said = self.mask.sum(1).long().tolist()
        return [prompt + response for prompt, response in zip(self.prompt_len, said)]

    def rows(self):
        """Its rows as data.encode makes them: [(ids, target), ...]."""
        out = []
        for ids, start, end in zip(self.tokens.tolist(), self.prompt_len, self.lengths):
            target = [0] * start + [1] * (end - start)
            out.append((ids[:end], target))
        return out

    def responses(self):
        """The B responses as text, without the end token."""
        texts = []
        for (ids, _), start, finished in zip(self.rows(), self.prompt_len, self.finished.tolist()):
            end = len(ids) - finished
            texts.append(self.tok.decode(ids[start:end]))
        return texts

    def take(self, rows):
        """Some of its rows."""
        prompt_len = [self.prompt_len[row] for row in rows]
        return replace(self, tokens=self.tokens[rows], mask=self.mask[rows], logp=self.logp[rows],
                       finished=self.finished[rows], prompt_len=prompt_len)

    @staticmethod
    def of(rows, tok, device="cpu"):
        """Finished responses as if they had been drawn: [(ids, target), ...] as data.encode makes them; logp is 0."""
        tokens, mask = collate(rows, tok, device)
        finished = torch.ones(len(rows), dtype=torch.bool, device=device)
        prompt_len = [target.index(1) for _, target in rows]
        return Rollout(tokens, mask, torch.zeros_like(mask), finished, prompt_len, tok)

    @staticmethod
    def join(rolls):
        """Several rollouts below each other, padded to the widest."""
        tok, width = rolls[0].tok, max(roll.tokens.shape[1] for roll in rolls)
        tokens, mask, logp, finished, prompt_len = [], [], [], [], []
        for roll in rolls:
            more = 0, width - roll.tokens.shape[1]
            tokens.append(F.pad(roll.tokens, more, value=tok.pad))
            mask.append(F.pad(roll.mask, more))
            logp.append(F.pad(roll.logp, more))
            finished.append(roll.finished)
            prompt_len += roll.prompt_len
        return Rollout(torch.cat(tokens), torch.cat(mask), torch.cat(logp), torch.cat(finished), prompt_len, tok)


def respond(policy, records, cfg, n=1, begin=()):
    """n responses to the prompt of each record, sampled as the options say -> Rollout."""
    prompts = [policy.tok.prompt(record["prompt"]) for record in records]
    return generate(policy, prompts, cfg.max_new, n, cfg.temperature, begin=begin)


@torch.no_grad()
def generate(model, prompts, max_new, n=1, temperature=1.0, top_k=0, top_p=1.0, stream=None, begin=()):
    """Sample n responses to each prompt (a list of id lists) -> Rollout of len(prompts) * n rows, prompt by prompt.

    Prompts of any length are padded on the right; each is read once for its n samples, and from there every row keeps
    its own position in the cache. A row stops at its end token, after max_new tokens, or when the context is full.
    top_k and top_p are for chatting: a policy gradient needs the samples to come from the distribution it
    differentiates, so no trainer offers them. stream(token) is called with each new id, for a single row. begin: ids
    that every response is made to begin with, as "<think>" in reward.py (no trainer does that); they are a part of it,
    with log-probability 0, and do not count in max_new. Raises UserError for a prompt that leaves no room in the
    context, and for a model whose logits are no numbers.
    """
    if 0 < temperature < COLDEST:
        raise OptionError(f"--temperature {temperature}: 0 is greedy; anything else has to be {COLDEST:g} or more")
    if min(map(len, prompts)) == 0 or max_new < 1:
        raise UserError("cannot sample from an empty prompt, nor less than one token")
    given = [prompt + list(begin) for prompt in prompts]
    longest, block_size = max(map(len, given)), model.config.block_size
    if longest >= block_size:
        raise UserError(f"a prompt of {longest} tokens leaves no room in the context of {block_size}")
    multiple = 64 if CAPTURES[model.device.type] else 16  # few widths: each needs recordings of its own
    width = min(round_up(longest + max_new, multiple), block_size)
    decoder = find_decoder(model, len(prompts) * n, width, max_new, (temperature, top_k, top_p))
    with model.autocast():
        decoder.read(given, n)
        decoder.run(longest, max_new, stream)

    # A row is: prompt, begin, drawn, padding. The response is begin and drawn.
    place, length = torch.arange(width, device=model.device), decoder.length             # (width,), (B,)
    start, end = length - len(begin), decoder.end                                        # (B,), of the response
    response = (start[:, None] <= place) & (place < end[:, None])                        # (B, width)
    drawn = response & (place >= length[:, None])
    tokens = decoder.tokens[:, :width].masked_fill(place >= end[:, None], model.tok.pad)
    logp = decoder.logp[:, :width].masked_fill(~drawn, 0)
    if logp.isnan().any():
        DECODERS.pop(model, None)  # its cache may hold what is no number
        raise UserError(f"cannot sample: the logits are no numbers; {largest_weight(model)}. In training a lower --lr "
                        "helps")
    finished = (drawn & (tokens == model.tok.end)).any(1)
    width = min(round_up(int(end.max())), width)  # to the longest
    # From here on the index is that of the log-probability, one before its token's.
    mask, logp = response[:, 1:width].float(), logp[:, 1:width]
    return Rollout(tokens[:, :width], mask, logp, finished, start.tolist(), model.tok)


DECODERS = weakref.WeakKeyDictionary()  # {model: its decoders by their sizes}, where steps are recorded


def find_decoder(model, *sizes):
    """A decoder for this model as it is now, one that was used before if steps are recorded."""
    if not CAPTURES[model.device.type]:
        return Decoder(model, *sizes)
    kept, key, stream = DECODERS.setdefault(model, {}), (*sizes, model.precision), None
    if key in kept:
        kept[key] = kept.pop(key)  # the last is the one used last
        refresh(kept[key].model, model)
        return kept[key]
    if len(kept) == 2:  # a trainer has two: for its rollouts, and for the held-out prompts
        stream = kept.pop(next(iter(kept))).stream
    kept[key] = Decoder(model, *sizes, stream)
    return kept[key]


def for_sampling(model):
    """A copy of a model to sample from: without dropout, its adapters merged, its matrices rounded to the precision of
    the matmuls once instead of at every token. What is not rounded is shared."""
    shared = {id(param): param for param in model.parameters()}
    if model.precision == "bf16" or model.loras():
        for module in model.modules():
            if isinstance(module, Linear):
                for param in module.parameters():
                    del shared[id(param)]
    twin = copy.deepcopy(model, memo=shared).remove_lora().eval()  # what is in the memo is used as it is
    if model.precision == "bf16":
        on_cpu = model.device.type == "cpu" and torch.backends.mkldnn.is_available()
        fused = on_cpu and precision(model.device) == "bf16"  # where bf16 is emulated oneDNN may not have it
        twin.rounded_head = model.transformer.wte.weight.bfloat16()
        for module in twin.modules():
            if isinstance(module, Linear):
                module.bfloat16()
            if isinstance(module, MLP):
                module.fused = fused
    refresh(twin, model)
    return twin


def refresh(twin, model):
    """Write the present weights of a model into its copy for sampling, in their place."""
    for mine, theirs in zip(twin.modules(), model.modules()):
        if isinstance(mine, Linear) and mine.weight is not theirs.weight:
            mine.weight.copy_(theirs.merged())
            mine.bias.copy_(theirs.bias)
    if twin.rounded_head is not None:
        twin.rounded_head.copy_(model.transformer.wte.weight)


class Decoder:
    """Draws token after token for B rows, each after its own prompt. Finished rows leave the batch, which changes no
    result: each row has its own random numbers.

    Everything that a step reads and writes stays in its place from call to call, and a step asks the host for nothing,
    as a recording needs it (see CAPTURES). The loop is `run`, one turn of it `step`, one draw `sample`.
    """

    def __init__(self, model, rows, width, max_new, how, stream=None):
        """width: places of a row. how: temperature, top_k, top_p. stream: that of a decoder which this one replaces."""
        self.model, self.how, self.width, device = for_sampling(model), how, width, model.device
        dtype = full(model.transformer.wte.weight).dtype
        self.stream, self.pool = None, None
        self.cache, self.recordings = Cache(self.model, rows, width if CAPTURES[device.type] else 0), {}
        if device.type == "cuda":
            self.stream, self.pool = stream or torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.uniform = torch.empty(max_new, rows, device=device, dtype=dtype)
        # Of every row. The last column is for what a row draws that is finished and full.
        self.tokens = torch.zeros(rows, width + 1, device=device, dtype=torch.long)
        self.logp = torch.zeros(rows, width + 1, device=device, dtype=dtype)
        self.length = torch.zeros(rows, device=device, dtype=torch.long)  # of its prompt
        self.end = torch.zeros(rows, device=device, dtype=torch.long)     # the place behind its last token
        # Of the rows still in the batch. Only the first n entries of each are in use.
        self.rows = torch.zeros(rows, device=device, dtype=torch.long)    # which they are
        self.pos = torch.zeros(rows, device=device, dtype=torch.long)     # where the next token goes
        self.token = torch.zeros(rows, device=device, dtype=torch.long)   # the last one
        self.live = torch.zeros(rows, device=device, dtype=torch.bool)    # whether it is not finished
        self.new = torch.zeros(1, device=device, dtype=torch.long)        # how many were drawn before; no Python
        # number, since a recording would keep it as it was

    def read(self, prompts, n):
        """One pass over the P prompts, then n copies of each: B = P n rows."""
        device, pad_id = self.model.device, self.model.tok.pad
        length = torch.tensor([len(prompt) for prompt in prompts], device=device)        # (P,)
        tokens = pad(prompts, pad_id, device, width=self.width + 1)[:, :self.width + 1]  # (P, width + 1)
        which, longest = torch.arange(len(prompts), device=device), max(map(len, prompts))
        cache = Cache(self.model, len(prompts), longest)
        hidden = self.model(tokens[:, :longest], cache=cache, where=(which, length - 1))  # (P, C)
        which = which.repeat_interleave(n)                                               # (B,): whose copy
        self.cache.reserve(longest)
        self.cache.take(cache, which)
        self.hidden = hidden[which]
        self.uniform.uniform_()  # all at once: what a row draws does not depend on which others have left the batch
        self.tokens.copy_(tokens[which])
        self.length.copy_(length[which])
        self.n = len(which)
        self.rows.copy_(torch.arange(self.n, device=device))
        self.pos.copy_(self.length)
        self.live.fill_(True)
        self.new.zero_()

    def run(self, longest, max_new, stream=None):
        """Draw up to max_new tokens a row; longest: tokens of the longest prompt."""
        look = LOOK[self.model.device.type] if stream is None else 1  # to show a token is to wait for it
        for new in range(max_new):
            if new == 0:
                self.draw(self.hidden)
            else:
                self.reserve(longest + new)
                self.next_step()
            if stream is not None:
                stream(int(self.token[0]))
            if (new + 1) % look == 0 and self.drop_finished() == 0:
                break

    def reserve(self, slots):
        """Let attention read so many slots, rounded up, so that few sizes need a recording."""
        multiple = round_up(self.width // 4, 64) if CAPTURES[self.model.device.type] else 32
        self.cache.reserve(min(round_up(slots, multiple), self.width))

    def step(self):
        """Read the last token of each row, and draw the next."""
        token, pos = self.token[:self.n, None], self.pos[:self.n, None]
        hidden = self.model(token, pos - 1, cache=self.cache)[:, 0]                      # (n, C)
        self.draw(hidden)

    def draw(self, hidden):
        """Draw the next token of each row from the hidden states (n, C) of the last."""
        rows, pos, live = self.rows[:self.n], self.pos[:self.n], self.live[:self.n]
        token, logp = sample(self.model.logits(hidden), self.uniform[self.new, rows], *self.how)
        self.token[:self.n] = token
        self.tokens[rows, pos] = token
        self.logp[rows, pos] = logp
        pos += live  # a finished row stays behind its end; what it goes on drawing there does not count
        self.end[rows] = pos
        live &= (token != self.model.tok.end) & (pos < self.model.config.block_size)
        self.new += 1

    def next_step(self):
        """A step, where it can be by replaying its recording."""
        size = self.n, self.cache.slots
        if size in self.recordings:
            self.recordings[size]()
        elif CAPTURES[self.model.device.type]:
            self.recordings[size] = capture(self.step, self.stream, self.pool)
        else:
            self.step()

    def drop_finished(self):
        """Let finished rows leave the batch if there are enough of them; returns how many are not finished."""
        live = self.live[:self.n]
        left, n = int(live.sum()), self.n
        if CAPTURES[self.model.device.type]:  # few sizes: halves, down to an eighth
            while n >= 2 * left and n % 2 == 0 and n > len(self.live) // 8:
                n //= 2
        elif left <= 0.75 * n:  # only when a quarter is gone: it copies the cache
            n = left
        if 0 < n < self.n:
            rows = torch.argsort(live.int(), descending=True, stable=True)[:n]
            for state in (self.rows, self.pos, self.token, self.live):
                state[:n] = state[rows]
            self.cache.select(rows)
            self.n = n
        return left


def capture(step, stream, pool):
    """Run step() on a GPU, and record it -> a function that does it again.

    The first run loads all that a recording needs, on its stream. Each decoder has a stream of its own: PyTorch frees
    the workspace of a stream's matmuls with any recording that was made there. pool: where recordings keep what they
    make on the way; nothing of it outlives a step, so they share it.
    """
    now = torch.cuda.current_stream(stream.device)
    stream.wait_stream(now)
    with sdpa_kernel(FOR_ONE_TOKEN), torch.cuda.stream(stream):
        step()
    now.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with sdpa_kernel(FOR_ONE_TOKEN), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One draw per row by inverting the cumulative distribution: logits (B, V), uniform (B,) -> token, logp (B,).

    One random number a row rather than one a vocabulary entry, as multinomial and Gumbel need: 10x faster on a CPU.
    Temperature 0 is greedy. The log-probability is that of the distribution drawn from; it is NaN where the logits
    make no distribution, which `generate` refuses.
    """
    if temperature == 0:
        best = full(logits.amax(-1))
        return logits.argmax(-1), best - best  # 0, or NaN if best is not finite
    if temperature != 1:
        logits = full(logits) / temperature
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[1])).values                           # (B, k)
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1, dtype=wide(logits)).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # what the likelier tokens make up together
        outside = before >= max(top_p, 1e-9)   # never the first
        outside = outside.scatter(1, order, outside)  # back in the order of the vocabulary
        logits = logits.masked_fill(outside, -torch.inf)
    p = logits.softmax(-1, dtype=wide(logits))                                           # (B, V)
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]                                                                  # (B, 1)
    # The product may round up to the total, and behind that there is no token: stay just below.
    below = total.nextafter(torch.zeros_like(total))
    point = torch.minimum(uniform[:, None] * total, below)
    token = torch.searchsorted(cdf, point, right=True)  # the first whose cdf exceeds it: its probability is not 0
    token = token.clamp(max=logits.shape[1] - 1)  # of a NaN it would be past the end
    return token[:, 0], p.gather(1, token)[:, 0].log()


def largest_weight(model):
    """Which weight of a model is the largest, in words; one that is no number is larger than all."""
    peaks = {name: float(param.detach().abs().max()) for name, param in model.named_parameters()}
    name = max(peaks, key=lambda name: math.inf if math.isnan(peaks[name]) else peaks[name])
    return f"the largest weight, in {name}, is {peaks[name]:.3g}"


# ------------------------------------------------------------------------------------------------ rollouts in training
# A step of training has epochs over its rollout; an epoch has minibatches, an update each; a minibatch has
# micro-batches, whose gradients add up: they exist only so that an update fits into memory.


def slices(roll, budget, rows=None):
    """Micro-batches of a rollout's rows, trimmed to their own longest: rows (b,), tokens (b, t), mask (b, t-1) each."""
    every = roll.lengths
    rows = list(range(len(every))) if rows is None else rows
    if not rows:
        return
    lengths = [every[row] for row in rows]
    for places in micro_batches(lengths, budget):
        some = send(torch.tensor([rows[place] for place in places]), roll.tokens.device)
        longest = max(lengths[place] for place in places)
        width = min(round_up(longest), roll.tokens.shape[1])
        yield some, roll.tokens[some, :width], roll.mask[some, :width - 1]


@torch.no_grad()
def per_token(roll, budget, function):
    """function(tokens, mask) of a rollout's micro-batches, whose results (..., b, t-1) are joined: (..., B, T-1). PPO
    asks for log π and entropy, for instance: (2, b, t-1)."""
    out = None
    for rows, tokens, mask in slices(roll, budget):
        part = function(tokens, mask)
        if out is None:
            shape = part.shape[:-2] + roll.mask.shape
            out = part.new_zeros(shape)
        out[..., rows, :part.shape[-1]] = part
    return out


def logps(model, roll, cfg):
    """log π of a rollout's tokens at the temperature they were sampled with, without gradient -> (B, T-1)."""
    def function(tokens, mask):
        return token_logprobs(model, tokens, mask, cfg.temperature)

    with model.autocast():
        return per_token(roll, cfg.micro_tokens, function)


def minibatches(n, cfg):
    """The rows of each update of a step: every epoch takes n rows in a new order, in cfg.minibatches parts."""
    out = []
    for _ in range(cfg.epochs):
        out += torch.randperm(n).chunk(cfg.minibatches)
    return out


def parts(roll, rows, cfg, **tensors):
    """The micro-batches of an update. Each has tokens (b, t), mask (b, t-1), and by its name each of the tensors,
    (B, T-1) or (B, 1) or None, cut to the same rows and width."""
    for some, tokens, mask in slices(roll, cfg.micro_tokens, rows.tolist()):
        part, width = SimpleNamespace(tokens=tokens, mask=mask), mask.shape[1]
        for name, tensor in tensors.items():
            own = None if tensor is None else tensor[some, :width]
            setattr(part, name, own)
        yield part


class Means:
    """Means over the masked tokens of a step, added up on the device, micro-batch by micro-batch."""

    def __init__(self):
        self.sums, self.counts = defaultdict(float), defaultdict(float)

    def add(self, mask, **numbers):
        """Numbers (b, t-1) by name; what is outside the mask does not count, NaN included."""
        for name, values in numbers.items():
            self.sums[name] += torch.where(mask.bool(), values.detach(), 0.0).sum()
            self.counts[name] += mask.sum()

    def join(self, other):
        """Add what another one has summed up."""
        for name in other.sums:
            self.sums[name] += other.sums[name]
            self.counts[name] += other.counts[name]

    def result(self):
        """{name: its mean}, still on the device."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


@torch.no_grad()
def choice_logprobs(model, prompts, choices, budget):
    """What a model answers to P prompts (lists of ids) when it has to choose: log P of each choice, a text of one
    token, among the choices -> (P, choices). A prompt beyond the context loses its beginning."""
    tok, device = model.tok, model.device
    encoded = [tok.encode(choice) for choice in choices]
    if any(len(ids) != 1 for ids in encoded):
        raise UserError(f"the choices {', '.join(choices)} must be one token each of this tokenizer")
    ids = sum(encoded, [])
    out = torch.zeros(len(prompts), len(choices), device=device)
    prompts = [cut_prompt(prompt, tok, model.config.block_size) for prompt in prompts]
    with model.autocast():
        for places in micro_batches([len(prompt) for prompt in prompts], budget):
            some = [prompts[place] for place in places]
            hidden = model(pad(some, tok.pad, device))                                   # (b, t, C)
            last = torch.tensor([len(prompt) - 1 for prompt in some], device=device)
            hidden = hidden[torch.arange(len(some), device=device), last]                # (b, C)
            logits = full(model.logits(hidden))                                          # (b, V)
            out[places] = logits[:, ids].log_softmax(-1)
    return out


# ------------------------------------------------------------------------------------------------ rewards


class Reward:
    """A weighted sum of reward models (run folders), judges (language models asked about the answer) and verifiers
    (data.VERIFIERS, or module:function).

    `Reward("0.5*out/reward@answer[write] + exact", ...)(records, roll)` -> total (B,), {term: unweighted part (B,)}.
    A term is a data.Term: weight, names, view, system, families; label is the term without its weight. Behind its names
    it may have, in this order:

        NAME|NAME          several names; the worst of their values counts (Coste et al. 2310.02743): the least. It is
                           the greatest where more is worse: with a negative weight, or in a cost (PPO's --cost, for
                           which cost=True). "NAME|NAME spread" is their standard deviation
        @answer            the model or verifier sees only what follows the thinking
        @rate              a language model is asked for points; they count as -1..1 (direct RLAIF, 2309.00267)
        @A to @D           a language model is asked for a class of data.RUBRIC; its P counts (RBRM, 2303.08774)
        {system message}   the message is put in front, for a conditional reward model
        [families]         prompts of other families get 0

    A folder with a reward.txt stands for the sum in it (configs/rule_based_rewards.py).
    """

    def __init__(self, spec, like, budget, cost=False):
        self.terms, self.tok, self.budget, self.cost = self.expand(spec), like.tok, budget, cost
        self.models = []                    # the folders of its reward models; PPO's critic starts from the first
        self.loaded, self.rules = {}, {}    # name: a model; name: a verifier
        self.asked = {}                     # what the judges have answered about the rollout at hand
        for term in self.terms:
            for name in term.names:
                self.load(name, term, like)

    @staticmethod
    def expand(spec, inside=()):
        """The terms of a sum, those of a folder's reward.txt in the place of the folder. inside: the paths of the
        reward.txt that are being expanded, so that a loop is found."""
        out = []
        for term in parse_rewards(spec):
            sums = [name for name in term.names if (Path(name) / "reward.txt").exists()]
            if not sums:
                out.append(term)
                continue
            if term.label != sums[0]:       # it is more than a bare name
                raise UserError(f"--reward {term.label}: {sums[0]} stands for a sum, and takes no |, @, {{}} or []")
            path = Path(sums[0]).resolve() / "reward.txt"
            if path in inside:
                raise UserError(f"{path}: the sum in it is a part of itself")
            try:
                text = path.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as e:
                raise UserError(f"{path}: cannot be read ({e})") from None
            for part in Reward.expand(text, (*inside, path)):
                out.append(replace(part, weight=term.weight * part.weight))
        return out

    def load(self, name, term, like):
        """Find the verifier or the model that a term names, and refuse what it cannot be asked."""
        told, rule = f"--reward {term.label}", verifier(name)
        if term.asks and term.system:
            raise UserError(f"{told}: a question takes no system message")
        if rule is not None:
            if term.asks or term.system:
                raise UserError(f"{told}: {name} is a verifier and cannot be asked that")
            self.rules[name] = rule
            return
        if not Path(name).exists():
            raise UserError(f"{name}: neither a run folder (python reward.py train makes one) nor a verifier "
                            f"({', '.join(VERIFIERS)}, or module:function)")
        if name not in self.loaded:
            self.loaded[name] = load_model(name, like, maker="python reward.py train")
        scores = self.loaded[name].config.n_scores > 0
        if term.asks and scores:
            raise UserError(f"{told}: a reward model, and @{term.view} asks a language model")
        if not term.asks and not scores:
            raise UserError(f"--reward {name}: a language model, not a reward model (as a judge: {name}@rate)")
        if scores:
            self.models.append(name)

    def check(self, records, data):
        """Refuse records that a term can never pay for, and count those of a file that get 0: see check_needs."""
        for term in self.terms:
            if term.families and not any("family" in record for record in records):
                raise UserError(f'{data}: --reward {term.label} needs "family" in a record, and none has it')
            mine = [record for record in records if term.concerns(record)]
            for name in term.names:
                check_needs(name, self.rules.get(name), mine, data)

    @torch.no_grad()
    def __call__(self, records, roll):
        texts, parts, self.asked = roll.responses(), {}, {}
        total = torch.zeros(len(records), device=roll.tokens.device)
        for term in self.terms:
            rows = [i for i, record in enumerate(records) if term.concerns(record)]
            shown = {i: texts[i] for i in rows}
            if term.view == "answer":
                shown = {i: after_thinking(texts[i]) for i in rows}
            values = torch.zeros(len(term.names), len(records), device=total.device)
            if rows:
                for k, name in enumerate(term.names):
                    values[k, rows] = self.judge(name, term, records, shown, roll)
            more_is_better = (term.weight > 0) != self.cost
            worst = torch.amin if more_is_better else torch.amax
            parts[term.label] = worst(values, 0)
            if len(term.names) > 1:
                parts[term.label + " spread"] = values.std(0)
            total += term.weight * parts[term.label]
        return total, parts

    def judge(self, name, term, records, shown, roll):
        """What one model or verifier says of the texts {row: text} -> (len(shown),), all of them finite numbers."""
        if name in self.rules:
            values = []
            for i, text in shown.items():
                value = self.rules[name](records[i], text, bool(roll.finished[i]))
                values.append(number(value, name, records[i]))
            return torch.tensor(values, device=roll.tokens.device)
        said = self.answers(name, term, records, shown) if term.asks else self.scores(name, term, shown, roll)
        if not said.isfinite().all():
            if not all(p.isfinite().all() for p in self.loaded[name].parameters()):
                raise UserError(f"{name}: its weights are not all finite numbers; train it again")
            for value, i in zip(said.tolist(), shown):
                number(value, name, records[i])  # raises for one that is no number
        return said

    def answers(self, name, term, records, shown):
        """What a language model answers when it is asked about each text: expected points as -1..1, or P of a class."""
        ask, choices = class_prompt, list(RUBRIC)
        if term.view == "rate":
            ask, choices = rate_prompt, [str(n) for n in range(POINTS + 1)]
        key = (name, ask, *term.families)    # @A to @D are one question, asked once; families decide of which texts
        if key not in self.asked:
            prompts = []
            for i, text in shown.items():
                question = ask(records[i]["prompt"][-1]["content"], text)
                prompts.append(self.tok.prompt([dict(role="user", content=question)]))
            self.asked[key] = choice_logprobs(self.loaded[name], prompts, choices, self.budget).exp()
        p = self.asked[key]                                                              # (n, choices)
        if term.view == "rate":
            expected = p @ torch.arange(POINTS + 1.0, device=p.device)                   # (n,)
            return expected * 2 / POINTS - 1
        return p[:, choices.index(term.view)]

    def scores(self, name, term, shown, roll):
        """The scores of a reward model: of the rollout's own tokens, or of what a view or a system message makes of
        them."""
        model, rows = self.loaded[name], list(shown)
        out = torch.zeros(len(roll.tokens), device=roll.tokens.device)
        if term.system or term.view:
            batches = self.read(term, shown, roll, model.config.block_size)
        else:
            batches = slices(roll, self.budget, rows)
        for some, tokens, mask in batches:
            out[some] = full(response_scores(model, tokens, mask)[:, 0])
        return out[rows]

    def read(self, term, shown, roll, most):
        """Micro-batches (rows, tokens, mask) of what a reward model sees, as in its training: the term's system
        message, the prompt, and the answer (the rollout's own tokens, or with a view the text, encoded), cut to `most`
        tokens."""
        system, tokens, lengths = [], roll.tokens.tolist(), roll.lengths
        if term.system:
            system, _ = self.tok.chat([dict(role="system", content=term.system)])
        rows, built = list(shown), []
        for i, text in shown.items():
            start = roll.prompt_len[i]
            prompt, answer = tokens[i][:start], tokens[i][start:lengths[i]]
            if term.view:
                answer = self.tok.response(text)
            built += answer_rows(system + prompt, [answer], self.tok, most)  # one row for one answer
        for places in micro_batches([len(ids) for ids, _ in built], self.budget):
            some = [built[j] for j in places]
            yield [rows[j] for j in places], *collate(some, self.tok, roll.tokens.device)


@torch.no_grad()
def evaluate(policy, ref, reward, records, run, step, cfg):
    """Held-out prompts, answered by the policy after its update: reward, truth where it is known, and with a reference
    the KL of a response."""
    roll = respond(policy, records, cfg)
    texts = roll.responses()
    run.samples(step + 1, records, texts)
    metrics = {}
    if ref is not None:
        kl = logps(policy, roll, cfg) - logps(ref, roll, cfg)                            # (B, T-1)
        metrics["val_kl"] = kl.sum(1).mean()
    metrics["val_reward"] = reward(records, roll)[0].mean()
    metrics["val_gold"] = mean(truth(records, texts, roll.finished))
    return metrics


# ------------------------------------------------------------------------------------------------ devices


class Setup(NamedTuple):
    """What the models of a run have in common. A model has all three as well, so another can be made like it."""
    tok: Tokenizer | None = None
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"     # of the matmuls; weights, optimizer and every log-softmax stay in fp32


MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}  # more helps a CPU little; a GPU has more to do at a time


def setup(cfg, tok):
    """The Setup that the options ask for; says on what the figures are computed. What an option leaves to the device is
    written into cfg."""
    device = find_device(cfg.device)
    cfg.micro_tokens = cfg.micro_tokens or MICRO_TOKENS[device.type]
    if device.index:
        torch.cuda.set_device(device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # in training shapes change at every step, see FOR_ONE_TOKEN
    print(f"computing on {machine(device, cfg.dtype)}")
    return Setup(tok, device, precision(device, cfg.dtype))


def find_device(name):
    """The torch.device of --device; auto is the first GPU, where there is one."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise OptionError(f"--device {name}: choose auto, cpu, cuda, or cuda:1 for the second GPU")
    if name != "cpu" and int(name[5:] or 0) >= gpus:
        raise UserError(f"--device {name}: this machine has {gpus or 'no'} CUDA device{'s' * (gpus > 1)}")
    return torch.device(name)


# oneDNN, which does a CPU's matmuls, can be told to keep to older instructions than the CPU has.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def precision(device, dtype="auto"):
    """What --dtype means on a device, fp32 or bf16: auto is bf16 where there are instructions for it.

    Those are a GPU's from Ampere on, and a CPU's AMX or avx512_bf16. Elsewhere bf16 is emulated and slow.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    told = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    if told.upper() in WITHOUT_BF16:
        return "fp32"
    for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        if getattr(torch.cpu, question, bool)():  # bool() is False: a PyTorch that cannot tell
            return "bf16"
    return "fp32"


def keep_freed_memory():
    """Ask glibc to keep freed memory (up to 2 GB) for the next tensor. By default large blocks go back to the system,
    and getting them anew, page by page and zeroed, costs a fifth of a training step or more where tensors are larger
    than 32 MB (smaller ones glibc keeps by itself). Elsewhere it does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2 ** 31 - 1)


def machine(device, dtype="auto"):
    """On what, with how many threads and in which precision: figures differ between machines by their rounding."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"
        if told := os.environ.get("ONEDNN_MAX_CPU_ISA"):
            name += f", at most {told}"
    return f"{name}, {precision(device, dtype)}"


def cpu_name():
    """What the CPU calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------ the optimizer


class Rule:
    """What AdamW and Muon share: groups, dicts of params, lr, weight_decay and more, and the state of each parameter.

    They are no torch.optim.Optimizer because making one of those imports PyTorch's compiler: a second at every start.
    """
    keys = ()  # of the state, as torch.optim names them

    def __init__(self, groups):
        self.groups, self.state = groups, defaultdict(dict)

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient, and let go of that."""
        for group in self.groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self.update(params, group)
            for param in params:
                param.grad = None

    def states(self, params, key):
        """What the last step left of each parameter under a key; zeros before the first."""
        for param in params:
            if key not in self.state[param]:
                zero = torch.zeros_like(param)
                if key == "step":
                    zero = torch.zeros((), device=param.device, dtype=torch.float32)
                self.state[param][key] = zero
        return [self.state[param][key] for param in params]


class AdamW(Rule):
    """AdamW (Loshchilov & Hutter 1711.05101), by PyTorch's fused kernel. A group has betas too."""
    keys = "step", "exp_avg", "exp_avg_sq"

    def update(self, params, group):
        steps, means, squares = (self.states(params, key) for key in self.keys)
        beta1, beta2 = group["betas"]
        adamw(params, [param.grad for param in params], means, squares, [], steps, fused=True, amsgrad=False,
              maximize=False, lr=group["lr"], weight_decay=group["weight_decay"], beta1=beta1, beta2=beta2, eps=1e-8)


class Muon(Rule):
    """Muon (Jordan et al. 2024) of matrices (in, out): a step is -lr · max(1, √(out / in)) · orthogonal(momentum), with
    Nesterov's momentum. It computes what torch.optim.Muon does, all matrices of a shape at once.
    """
    keys = "momentum_buffer",

    def update(self, params, group, momentum=0.95):
        shapes = defaultdict(list)
        for param in params:
            shapes[param.shape].append(param)
        for (n_in, n_out), alike in shapes.items():
            gradients, means = [param.grad for param in alike], self.states(alike, "momentum_buffer")
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            # Nesterov: (1 - momentum) · gradient + momentum · mean
            along = torch.stack(torch._foreach_lerp(gradients, means, momentum))         # (k, in, out)
            torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] * math.sqrt(max(1, n_out / n_in))
            torch._foreach_add_(alike, orthogonal(along).unbind(), alpha=-rate)


def orthogonal(matrices):
    """k matrices (k, in, out), their singular values brought to about 1 (.7 to 1.2), their singular vectors kept.

    Five steps of Newton-Schulz, X <- a X + (b X X' + c (X X')²) X, with the a, b, c of Jordan et al. They are rough, so
    bf16 is enough, where the device has instructions for it.
    """
    half = precision(matrices.device) == "bf16"
    x = matrices.to(torch.bfloat16 if half else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT  # X X' is of the smaller side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # Frobenius norm 1: no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # b X X' + c (X X')²
        x = torch.baddbmm(x, factor, x, beta=3.4445)                          # a X + factor X
    if tall:
        x = x.mT
    return x.to(matrices.dtype).contiguous()


class Optimizer:
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; linear warm-up, then cosine to `floor` · lr.

    Decay applies to matrices only, never to biases and norms. Muon (Jordan et al. 2024) steps along the orthogonalised
    momentum of each matrix. The toy's pretraining learns sums with it; with AdamW, in as many steps, hardly.
    Gradients are clipped to a global norm before either sees them.

    With model.fused_bwd every parameter has an optimizer of its own, which steps as soon as its gradient is whole and
    frees it (fused gradient descent, ChatGLM-RLHF 2404.00934; LOMO 2306.09782). So nothing can be clipped, and
    gradients cannot be added up.
    """

    def __init__(self, model, lr, total, kind="adamw", muon_lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), warmup=0,
                 floor=0.1, clip=1.0):
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.total, self.warmup, self.floor, self.clip = total, warmup, floor, clip
        muon, decay, plain = [], [], []
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            if param.ndim < 2:
                plain.append(param)
            elif kind == "muon" and ".h." in name:  # a matrix of a block
                muon.append(param)
            else:
                decay.append(param)
        groups = [dict(params=decay, weight_decay=weight_decay, lr=lr, betas=betas),
                  dict(params=plain, weight_decay=0.0, lr=model.vector_lr or lr, betas=betas)]
        self.optims = [AdamW(groups)]
        if muon:  # a step is to shrink weights by lr · weight_decay; Muon multiplies by muon_lr, so we divide by that
            self.optims.append(Muon([dict(params=muon, weight_decay=weight_decay * lr / muon_lr, lr=muon_lr)]))
        self.fused, self.updated = model.fused_bwd, set()
        if self.fused:
            if clip:
                raise OptionError("--fused_bwd: a gradient that is freed at once cannot be clipped; add --clip_grad 0")
            self.optims = self.one_for_each_parameter()
        for group in self.groups():
            group["base_lr"] = group["lr"]

    def groups(self):
        return [group for optim in self.optims for group in optim.groups]

    def scale(self, step):
        """The schedule: learning rate of `step` (from 0) as a share of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        cosine = math.cos(math.pi * min(1.0, done))
        return self.floor + (1 - self.floor) * 0.5 * (1 + cosine)

    def at(self, step):
        """Set the learning rates of a step; before it, since fused updates happen in its backward passes."""
        for group in self.groups():
            group["lr"] = group["base_lr"] * self.scale(step)

    def step(self, step):
        """Clip, update, clear the gradients -> grad_norm, before clipping (None if fused), and lr.

        Python waits here for the norm, because a gradient that is no number must change nothing. This costs little:
        a GPU is still busy with the backward pass. Fused, nothing is checked: the update has already happened.
        """
        norm = None
        if self.fused:
            self.updated.clear()
        else:
            norm = float(nn.utils.clip_grad_norm_(self.params, self.clip or math.inf))
            if not math.isfinite(norm):
                raise UserError(f"step {step}: the gradient is {norm}; nothing was updated, the last checkpoint is "
                                "intact. A lower --lr, or --dtype fp32, usually helps")
            self.at(step)  # again, for callers without `steps`
            for optim in self.optims:
                optim.step()
        return dict(grad_norm=norm, lr=self.groups()[0]["lr"])

    def one_for_each_parameter(self):
        """fused_bwd: an optimizer for every parameter, which steps as soon as its gradient is there."""
        optims = []
        for optim in self.optims:
            for group in optim.groups:
                for param in group["params"]:
                    own = type(optim)([group | dict(params=[param])])  # a group holds all of its settings
                    param.register_post_accumulate_grad_hook(functools.partial(self.update, own))
                    optims.append(own)
        return optims

    def update(self, optim, param):
        """fused_bwd: what a parameter's own optimizer does once its gradient is there."""
        if id(param) in self.updated:
            raise UserError("--fused_bwd: an update has to be one backward pass: more --micro_tokens, or less --batch")
        self.updated.add(id(param))
        optim.step()

    def forget(self):
        """Back to the state before the first step: no momentum."""
        for optim in self.optims:
            optim.state.clear()

    def entries(self):
        """(name in a checkpoint, state of the parameter, key in it, shape) of each tensor that a step leaves."""
        for nth, optim in enumerate(self.optims):
            params = sum((group["params"] for group in optim.groups), [])
            for place, param in enumerate(params):
                for key in optim.keys:
                    shape = torch.Size() if key == "step" else param.shape
                    yield f"{nth}.{place}.{key}", optim.state[param], key, shape

    def tensors(self):
        """Its state as a flat dict of tensors, for the checkpoint; empty before the first step."""
        return {name: state[key] for name, state, key, _ in self.entries() if key in state}

    def load(self, flat, path=""):
        """The inverse; anything incomplete is a UserError."""
        self.forget()
        if not flat:  # before the first step, and after the last
            return
        compare_shapes(flat, {name: shape for name, _, _, shape in self.entries()}, path)
        for name, state, key, _ in self.entries():
            state[key] = flat[name].to(self.params[0].device)


# ------------------------------------------------------------------------------------------------ steps and checkpoints
# A run folder holds checkpoint.safetensors while the run is unfinished: weights, optimizers, and facts as JSON. When it
# is finished it holds config.json, model.safetensors and a tokenizer instead, see the next section.


def steps(run, total, modules, optimizers, state, save_every):
    """Yield the steps still to do, and save after every `save_every`, so that the loop itself reads as the paper's.

    run: the data.Run whose folder holds the checkpoint. modules: the models that are trained, by name; the first is
    the one that the run is about. state: a JSON-able dict of whatever else the loop carries from step to step (a KL
    coefficient, running means); it is saved and restored in place.

    Each step starts by seeding PyTorch's generators from (seed, step). That is all the random state there is: resuming
    needs no generator's state, and evaluation or sampling inside one step cannot change the next.
    """
    model = next(iter(modules.values()))
    meta = dict(tokenizer=run.tok.fingerprint, machine=machine(model.device, model.precision))
    start = restore(run, modules, optimizers, state, meta["machine"])
    for step in run.progress(start, total):
        seed_step(run.seed, step)
        for optimizer in optimizers.values():
            optimizer.at(step)
        yield step
        done = step + 1 == total
        if done or (step + 1) % save_every == 0:  # the last holds until the models are written; Run then deletes it
            facts = meta | dict(step=step + 1, done=done, state=state)
            save_checkpoint(run.folder, modules, {} if done else optimizers, facts)
    for name, module in modules.items():
        write_model(run.folder if module is model else run.folder / name, module)


def seed_step(seed, step):
    """Seed PyTorch's generators for one step of a run."""
    torch.manual_seed((seed * 1_000_003 + step) % 2 ** 63)


def begun(run):
    """The step at which a run goes on: that of its checkpoint, 0 without one."""
    path = run.left("checkpoint.safetensors")
    return step_of(load_tensors(path)[1], path) if path else 0


def step_of(meta, path):
    """How many steps were done when a checkpoint was written."""
    step = meta.get("step")
    if not isinstance(meta.get("state"), dict) or type(step) is not int or step < 0:
        raise UserError(f"{path}: it does not say at which step it was written")
    return step


def restore(run, modules, optimizers, state, here):
    """Fill modules, optimizers and state from the checkpoint of an interrupted run -> the step at which it goes on.
    here: what `machine` says, for a warning if the run began on another."""
    path = run.left("checkpoint.safetensors")
    if not path:
        return 0
    tensors, meta = load_tensors(path)
    step = step_of(meta, path)
    for name, module in modules.items():
        own = below(tensors, name)
        check_weights(own, module, path)
        module.load_state_dict(own)
    for name, optimizer in optimizers.items():
        optimizer.load(below(tensors, f"optimizer of {name}"), path)
    state.update(meta["state"])
    began = meta.get("machine")
    if began and began != here:
        print(f"{run.folder}: begun on {began}; from here on it rounds as this machine does", file=sys.stderr)
    return step


def save_checkpoint(folder, modules, optimizers, meta):
    """All that an unfinished run goes on from, in one file, which is replaced atomically. modules and optimizers: dicts
    by name; meta: facts, as JSON."""
    tensors = {}
    for name, module in modules.items():
        tensors |= {f"{name}/{key}": tensor for key, tensor in module.state_dict().items()}
    check_finite(tensors, f"{folder}: not saved, an earlier checkpoint there is intact, a lower --lr usually helps")
    for name, optimizer in optimizers.items():
        tensors |= {f"optimizer of {name}/{key}": tensor for key, tensor in optimizer.tensors().items()}
    config = asdict(next(iter(modules.values())).config)
    save_tensors(Path(folder) / "checkpoint.safetensors", tensors, meta | dict(config=config))


def below(tensors, name):
    """The tensors `name/...` of a checkpoint, without that."""
    begin = name + "/"
    return {key.removeprefix(begin): tensor for key, tensor in tensors.items() if key.startswith(begin)}


def check_weights(tensors, module, path):
    """Raise a UserError if tensors from a file are not the weights of a module: their names, shapes and values."""
    compare_shapes(tensors, {name: tensor.shape for name, tensor in module.state_dict().items()}, path)
    check_finite(tensors, path)


def compare_shapes(got, want, path):
    """Raise a UserError that names what is missing, surplus or misshapen: got {name: tensor}, want {name: shape}."""
    wrong = []
    for name in want.keys() | got.keys():
        if name not in got:
            wrong.append(f"{name} is missing")
        elif name not in want:
            wrong.append(f"{name} does not belong")
        elif got[name].shape != want[name]:
            wrong.append(f"{name} is {tuple(got[name].shape)}, not {tuple(want[name])}")
    if wrong:
        raise UserError(f"{path}: {'; '.join(sorted(wrong)[:3])}")


def check_finite(tensors, path):
    """Raise a UserError that names the first tensor with a NaN or an infinity in it."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        for extreme in tensor.aminmax():  # of a NaN both are NaN
            if not math.isfinite(extreme):
                raise UserError(f"{path}: in {name} is {float(extreme)}, which is no weight")


# ------------------------------------------------------------------------------------------------ safetensors files

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw(tensor):
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(chunks):
    """The CRC-32 of some bytes, one behind the other."""
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def save_tensors(path, tensors, meta):
    """Write one safetensors file: a JSON header, then raw bytes. Nothing in it can be executed on loading.

    The file appears under its name only once it is complete and on the disk, so a crash, a kill or a full disk at
    any moment leaves the previous one as it was. meta (JSON) rides in the header: weights and facts cannot part. So
    does a checksum of all that the header says and of the data, by which load_tensors knows a file that was damaged.
    """
    path, offset = Path(path), 0
    facts = {"format": "pt", "plainalign": json.dumps(meta)}  # transformers asks for the format
    header = {"__metadata__": facts}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[offset, offset + size])
        offset += size
    chunks = [raw(tensor) for tensor in tensors.values()]
    facts["crc32"] = checksum([json.dumps(header).encode(), *chunks])  # of all but itself; facts is a part of header
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"{path}: not saved, {why}; an earlier checkpoint there is intact") from None


def load_tensors(path):
    """Read a safetensors file -> (dict of tensors, meta). Anything that is not one is a UserError, and so is one of
    ours that does not fit its checksum. Those of others have none."""
    try:
        return read_tensors(np.memmap(path, dtype=np.uint8, mode="r"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # what is wrong with such a file can surface as nearly any error
        why = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a checkpoint of ours ({type(error).__name__}: {why})") from None


def read_tensors(content):
    """The same of the bytes of a file, an array; what is wrong with them is any error."""
    size = struct.unpack("<Q", content[:8].tobytes())[0]
    if size > len(content) - 8:
        raise ValueError("it is cut short")
    data = content[8 + size:]
    header = json.loads(content[8:8 + size].tobytes())
    facts = header.get("__metadata__", {})
    said = facts.pop("crc32", None)
    if said is not None or "plainalign" in facts:  # a file of ours
        found = checksum([json.dumps(header).encode(), data])
        if said != found:
            raise UserError(f"damaged; it says that its checksum is {said}, and it is {found}")
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        shape, dtype = info["shape"], DTYPES[info["dtype"]]
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or start != end or stop != start + size or stop > len(data):
            raise ValueError(f"the bytes of {name} are not where they should be")
        own = torch.from_numpy(data[start:stop].copy()) if size else torch.empty(0, dtype=torch.uint8)
        tensors[name], end = own.view(dtype).reshape(shape), stop
    if end != len(data):
        raise ValueError("it is longer than its header says")
    meta = json.loads(facts.get("plainalign", "{}"))
    if not isinstance(meta, dict):
        raise ValueError("what it says of itself is no table")
    return tensors, meta


# ------------------------------------------------------------------------------------------------ models in folders
# A finished run has the layout of transformers, TRL and vLLM: config.json, weights under GPT-2's names in
# model.safetensors, and the tokenizer. Others' weights may also be in pytorch_model.bin, or in several files that
# NAME.index.json lists.

GPT2 = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True)
# That is what ours is. Whoever changes the architecture gives it another model_type, or transformers computes another.
SHAPE = dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")


def new_model(config, like):
    """A GPT of random weights, drawn on the CPU, so that they are the same on every device."""
    model = GPT(config, like.tok)
    model.precision = like.precision
    return model.to(like.device)


def load_model(folder, like=Setup(), n_scores=None, maker=""):
    """The model of a folder in eval mode: of a run of ours, finished or not, or a GPT-2 of Hugging Face's. A tokenizer
    other than the one it was trained with is an error.

    like: a Setup, or a model, whose tokenizer, device and precision it gets. n_scores: make it a reward or value model
    of that many scores: the first ones that it has, and new ones, which start at zero. 0 asks for a language model and
    refuses any other; None takes what is there. maker: the command that makes this folder, for the error message.
    """
    folder = Path(folder)
    if (folder / "checkpoint.safetensors").exists():
        path, config, tensors, fingerprint = read_unfinished(folder)
    elif (folder / "config.json").exists():
        path, config, tensors, fingerprint = read_gpt2(folder, like.tok)
    else:
        raise UserError(f"{folder}: no checkpoint there" + (f"; make it with: {maker}" if maker else ""))
    if like.tok is not None and fingerprint != like.tok.fingerprint:
        raise UserError(f"{folder} was trained with another tokenizer ({fingerprint}, not {like.tok.fingerprint})")
    if n_scores == 0 and config.n_scores:
        raise UserError(f"{folder}: a reward or value model, and a language model is needed")
    model = assemble(config, tensors, path)
    if n_scores is not None and n_scores != config.n_scores:
        resize_head(model, n_scores)
    model.tok, model.precision = like.tok, like.precision
    return model.to(like.device).eval()


def assemble(config, tensors, path):
    """A GPT of config with these tensors. config is from a file and may promise anything, so what it promises is
    compared with what is there, names and shapes, before memory is taken for it."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:  # first: even without memory a thousand million layers are too many
        raise UserError(f"{path}: {len(layers)} layers, and its config says {config.n_layer}")
    try:
        with torch.device("meta"), Undrawn():  # weights of the meta device have a shape and no memory
            model = GPT(config)
    except (RuntimeError, ValueError, OverflowError) as error:  # too large to be counted
        why = str(error).partition("\n")[0]
        raise UserError(f"{path}: no model is of the shape that it says ({why})") from None
    check_weights(tensors, model, path)
    own = {name: tensor.to(torch.get_default_dtype()) for name, tensor in tensors.items()}
    model.load_state_dict(own, assign=True)
    return model


class Undrawn(TorchFunctionMode):
    """It saves a second: within it no weight is drawn, since all will be read from a file. (On the meta device PyTorch
    would import its compiler to draw.) PyTorch passes every call through here, and those of nn.init do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_):
            return kwargs["tensor"]  # the name by which nn.init passes the weight on
        return function(*args, **(kwargs or {}))


def resize_head(model, n_scores):
    """Make it a model of n_scores scores: the ones it has, from the first on, and zeros for what is missing.

    The first is the score that Reward reads, so a critic starts from it however many heads the reward model has.
    """
    old, new = model.score, nn.Linear(model.config.n_embd, n_scores, bias=False, device=model.device)
    nn.init.zeros_(new.weight)
    if old is not None:
        kept = min(n_scores, model.config.n_scores)
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
    model.score, model.config.n_scores = new, n_scores


@torch.no_grad()
def shift_score(model, by):
    """Add the number `by` to every score of a model with one score. GPT-2's head w has no bias of its own, but the last
    norm has one, b. To that we add a vector whose product with w is `by`: w · (b + by w / w²) = w · b + by."""
    w = model.score.weight[0]                                                            # (C,)
    model.transformer.ln_f.bias += by * w / (w @ w).clamp(min=1e-12)


def read_unfinished(folder):
    """The model as it is in the middle of a run -> path, config, tensors, fingerprint of its tokenizer."""
    path = folder / "checkpoint.safetensors"
    tensors, meta = load_tensors(path)
    config = config_of(meta.get("config"), path)
    tensors = below(tensors, "model")
    if any("lora_" in name for name in tensors):
        raise UserError(f"{folder}: an unfinished run that trains adapters; run its command again, to its end")
    return path, config, tensors, meta.get("tokenizer")


def config_of(sizes, path):
    """The GPTConfig of sizes from a file."""
    try:
        return GPTConfig(**sizes)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: it does not say what model it holds ({error})") from None


def read_gpt2(folder, tok=None):
    """A GPT-2 in Hugging Face's layout, such as a finished run of ours -> path of its weights, config, tensors,
    fingerprint of its tokenizer.

    A model of others gets rows of the embedding for our special tokens, the mean of all others, to be learnt in
    fine-tuning. One it has: GPT-2's vocabulary ends in its end-of-text token, which is our end token.
    """
    config, fingerprint = read_config(folder / "config.json")
    path, tensors = read_weights(folder)
    wte = tensors.get("transformer.wte.weight")
    if wte is None or wte.shape != (config.vocab_size, config.n_embd):
        raise UserError(f"{path}: transformer.wte.weight is missing, or not ({config.vocab_size}, {config.n_embd}), as "
                        "config.json says")
    if not torch.equal(tensors.pop("lm_head.weight", wte), wte):
        raise UserError(f"{path}: lm_head.weight is not the embedding; only a tied head is known here")
    if tok is not None and fingerprint is None:  # a model of others
        if len(wte) != tok.base + 1:
            raise UserError(f"{folder}: {len(wte)} tokens, and --tokenizer has {tok.base}, which with an end of text "
                            f"would be {tok.base + 1}")
        fingerprint, config.vocab_size = tok.fingerprint, tok.n_vocab
    special = wte.mean(0).expand(config.vocab_size - len(wte), -1)
    unused = wte.new_zeros(round_up(config.vocab_size, 64) - config.vocab_size, config.n_embd)
    tensors["transformer.wte.weight"] = torch.cat([wte, special, unused])
    if "score.weight" in tensors:
        config.n_scores = tensors["score.weight"].numel() // config.n_embd
    return path, config, tensors, fingerprint


def read_config(path):
    """config.json of a Hugging Face folder -> the GPTConfig that it says, and the fingerprint of the tokenizer, which
    only folders of ours have (TRL leaves the entry in)."""
    facts = read_json(path)
    if "model_type" not in facts:
        raise UserError(f"{path.parent}: a run folder of an earlier version, or no model's; run what made it again")
    for key, ours in GPT2.items():
        if facts.get(key, ours) != ours:
            raise UserError(f"{path}: {key} is {facts[key]!r}, and a GPT-2 of ours has {ours!r}")
    sizes = {ours: facts.get(theirs) for ours, theirs in SHAPE.items()}
    mark = facts.get("plainalign")
    if mark is not None:  # dropout is an option of training; of others' models it is not taken over
        sizes["dropout"] = facts.get("resid_pdrop", 0.0)
    config = config_of(sizes, path)
    if facts.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner is {facts['n_inner']}, and a GPT-2 of ours has four times n_embd")
    return config, mark.get("tokenizer") if isinstance(mark, dict) else None


def read_json(path):
    """The object in a JSON file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else f"no JSON ({error})"
        raise UserError(f"{path}: {why}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def read_weights(folder):
    """(path, tensors in float32 by our names) of a Hugging Face folder. The path is for errors: that of the one file,
    or of the index of several."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.exists():
            found = read_file(path)
            break
        if index.exists():
            path, found = index, read_shards(index)
            break
    else:
        raise UserError(f"{folder}: a config.json, but neither model.safetensors nor pytorch_model.bin, nor an index")
    tensors = {}
    for name, tensor in found.items():
        if tensor.is_floating_point() and not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks of old files
            ours = name.startswith(("transformer.", "lm_head.", "score."))  # the oldest leave the first word out
            tensors[name if ours else f"transformer.{name}"] = tensor.float().contiguous()
    return path, tensors


def read_shards(index):
    """The tensors of the files that an index lists."""
    where, tensors = read_json(index).get("weight_map"), {}
    if not isinstance(where, dict):
        raise UserError(f"{index}: it has no weight_map")
    for file in sorted(set(map(str, where.values()))):
        if Path(file).name != file:
            raise UserError(f"{index}: its weight_map names {file}, which is no file of this folder")
        tensors |= read_file(index.parent / file)
    return tensors


def read_file(path):
    """The tensors of a safetensors file, or of NAME.bin, a pickle. With weights_only nothing in that is run."""
    if path.suffix != ".bin":
        return load_tensors(path)[0]
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        # Copied, because that refuses what is no plain tensor: sparse ones, nested ones, ones without memory.
        return {str(name): torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
                for name, tensor in found.items()}
    except Exception as error:  # what is wrong with such a file can surface as nearly any error
        why = str(error).partition("\n")[0][:100]
        raise UserError(f"{path}: not readable as weights ({type(error).__name__}: {why})") from None


def write_model(folder, model, made=None):
    """Write a model, its adapters merged, and its tokenizer, as a folder that transformers, TRL and vLLM load too.
    made: what it was made of, for config.json."""
    folder, tok, config = Path(folder), model.tok, model.config
    if model.loras():
        model = copy.deepcopy(model).merge_lora()
    tensors = model.state_dict()
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:config.vocab_size]
    check_finite(tensors, f"{folder}: not saved")
    save_tensors(folder / "model.safetensors", tensors, {})
    mark = dict(tokenizer=tok.fingerprint)
    if made:
        mark["made"] = made
    facts = GPT2 | {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()} | dict(
        architectures=["GPT2LMHeadModel"], resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=0.0,
        dtype="float32", bos_token_id=tok.end, eos_token_id=tok.end, pad_token_id=tok.pad, plainalign=mark)
    if config.n_scores:
        facts["architectures"] = ["GPT2ForSequenceClassification"]
        facts["id2label"] = {str(head): f"score {head}" for head in range(config.n_scores)}
    texts = tok.huggingface() | {"config.json": facts}  # config.json last: by it the folder holds a model
    for name, content in texts.items():
        write_text(folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ chat


@dataclass
class Config(Options):
    """Talk to a checkpoint, or answer every line of standard input."""
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file or folder
    system: str = ""            # system message
    temperature: NonNegative = 0.7  # 0 is greedy
    top_k: Natural = 0          # keep the k likeliest tokens; 0 keeps all
    top_p: Share = 1.0          # keep the likeliest tokens that make up this share
    max_new: Count = 128        # longest answer, tokens
    seed: Natural = 0           # of the sampling
    device: str = "auto"        # auto, cpu, cuda


def answer(model, messages, cfg):
    """Print the answer to a conversation as it comes, and return it."""
    tok, ids, shown = model.tok, [], 0

    def show(token):
        nonlocal shown
        ids.append(token)
        text = tok.decode(ids)
        if not text.endswith("\ufffd"):  # bytes wait until they make up a whole character
            print(text[shown:], end="", flush=True)
            shown = len(text)

    prompt = cut_prompt(tok.prompt(messages), tok, model.config.block_size - 1)
    generate(model, [prompt], cfg.max_new, 1, cfg.temperature, cfg.top_k, cfg.top_p, show)
    text = tok.decode(ids)
    print(text[shown:])
    return text


def main():
    """Talk to a model."""
    cfg, (folder,) = parse(Config, positional=["checkpoint"])
    model = load_model(folder, Setup(Tokenizer.load(cfg.tokenizer), find_device(cfg.device)), n_scores=0)
    torch.manual_seed(cfg.seed)
    history = [dict(role="system", content=cfg.system)] if cfg.system else []
    by_hand = sys.stdin.isatty()
    while True:
        if by_hand:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if not line.strip():
            continue
        messages = history + [dict(role="user", content=line.strip())]
        reply = answer(model, messages, cfg)
        if by_hand:  # a conversation remembers; piped lines are separate questions
            history = messages + [dict(role="assistant", content=reply)]


if __name__ == "__main__":
    guard(main)
