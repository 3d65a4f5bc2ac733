"""What lives on the device: the GPT, its log-probabilities, the sampler, the optimizer, checkpoints.

The model is GPT-2 with Hugging Face's names and shapes (but for its transposed linear layers), so weights map one to
one. The same trunk carries either the language-model head (tied to the embedding) or `n_scores` numbers per token,
which is all a reward model or a value function is. No algorithm lives here, and this file imports none.

    python model.py out/ppo                        talk to a checkpoint
    echo "What is 7 + 8?" | python model.py out/ppo    answer every line of standard input
    python model.py merge out/a out/b --out out/c  average their weights
    python model.py export out/a --out hf/a        for transformers, TRL, vLLM; import is the way back

One layout for every sequence, in training and in sampling: prompt, response, end token, then padding on the right.
With causal attention a real token never sees padding on its right, so no attention mask is needed, and position ids
are always 0, 1, 2, ... `tokens` is (B, T). The log-probability at index t belongs to token t+1, so `logp` and
`mask` are (B, T-1).

Letters in shape comments: B rows, T tokens, C width, H heads, D = C/H, V vocabulary, S cache slots, N chosen tokens.
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
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute

from data import (COLDEST, GPT2_SPECIALS, POINTS, RUBRIC, VERIFIERS, Count, Natural, NonNegative, OptionError, Options,
                  Share, Tokenizer, UserError, after_thinking, answer_rows, check_needs, collate, cut_prompt, guard,
                  micro_batches, number, pad, parse, parse_rewards, round_up, verifier, view_prompt, write_text)

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
            if type(value) is not int or value < (name != "n_scores"):
                raise UserError(f"{name} {value}: must be a whole number, and not 0 but for n_scores")
            if value >= 2 ** 48:  # of more PyTorch cannot even count the bytes
                raise UserError(f"{name} {value}: no computer holds that")
        for name, unit in (("n_embd", self.n_head), ("block_size", 16)):  # 16: batches are padded to a multiple of it
            if getattr(self, name) % unit:
                of = " (n_head)" if name == "n_embd" else ""
                raise UserError(f"{name} {getattr(self, name)} is not a multiple of {unit}{of}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout}: must be at least 0 and below 1")


def attend(q, k, v, mask):
    """Scaled dot-product attention: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    mask is None for causal self-attention, or a boolean (B, 1, T, S), True where a query may look.
    """
    if q.is_cuda or (q.dtype != torch.bfloat16 and q.shape[2] > 1):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    # On a CPU the fused kernel is slow in two places, the bf16 backward (5x) and the single query of decoding
    # (1.3x); three plain operators are not.
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias                        # (B, H, T, S)
    return torch.softmax(scores, -1, dtype=scores.dtype) @ v


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C), from the cache where there is one."""
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.layer = config.n_head, layer

    def forward(self, x, mask, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)                                                          # (B, H, T, D) each
        if cache is not None:
            k, v = cache.write(self.layer, k, v)                                         # (B, H, S, D)
        return self.c_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers around GPT-2's tanh GELU, (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention and MLP, each on a normalised copy of the residual stream."""
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config, layer)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class LoRA(nn.Module):
    """W x + b + (α/r) B A x with W and b frozen (Hu et al. 2106.09685); B = 0 at first, so nothing changes at first.

    It keeps the linear layer's own `weight` and `bias`, so a checkpoint's names stay what they were.
    """
    def __init__(self, linear, r, alpha):
        super().__init__()
        self.weight, self.bias, self.scale, self.on = linear.weight, linear.bias, alpha / r, True
        start = torch.empty(r, linear.in_features, device=linear.weight.device)
        self.lora_A = nn.Parameter(nn.init.normal_(start).mul_(linear.in_features ** -0.5))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=linear.weight.device))

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.on else out


class GPT(nn.Module):
    """GPT-2. Calling it gives hidden states; `logits` and `scores` are the two things one can read off them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Rows up to the next multiple of 64 keep the matmul of the head fast; `logits` cuts them off again, so
        # an id without a token has no probability and cannot be sampled.
        rows = math.ceil(config.vocab_size / 64) * 64
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(rows, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.score = nn.Linear(config.n_embd, config.n_scores) if config.n_scores else None
        self.grad_checkpoint = False  # recompute each block in the backward pass: less memory, 4/3 of the time
        self.fused_bwd = False  # whether its Optimizer updates in the backward pass
        self.base = self.adapter = self.tokenizer = None  # the folder it is from, its LoRA adapters, whose ids it reads
        self.machine = None  # on what it is trained, and in which precision
        self.vectors, self.vector_lr = [], 0.0  # biases and norms of an adapter: module, name, trained, old; their rate
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: keeps the residual stream's variance at depth 2 n_layer
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        if self.score is not None:
            nn.init.zeros_(self.score.weight)

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def prepare(self, cfg):
        """Switch on what the run's options ask of a model that is to be trained."""
        self.grad_checkpoint, self.fused_bwd = cfg.grad_checkpoint, cfg.fused_bwd
        self.machine = machine(self.device, cfg.dtype)
        if cfg.lora_r:
            torch.manual_seed(cfg.seed)
            self.add_lora(cfg.lora_r, cfg.lora_alpha, cfg.lora_bias > 0)
            self.vector_lr = cfg.lora_bias
        if cfg.compile:
            self.compile(dynamic=True)

    def add_lora(self, r, alpha, bias=False):
        """Freeze everything but a score head, and give every linear layer of the blocks an adapter of rank r. bias: its
        biases and norms are trained too (BitFit, Ben Zaken et al. 2106.10199), as a part of the adapter."""
        if self.base is None:
            raise UserError("LoRA adapts a trained model; a new one has to be trained whole")
        self.requires_grad_(False)
        if self.score is not None:
            self.score.requires_grad_(True)
        for owner, name, layer in self.linears():
            setattr(owner, name, LoRA(layer, r, alpha))
        self.vectors = [(module, name, p, p.detach().clone()) for module in self.modules()
                        for name, p in module.named_parameters(recurse=False)
                        if bias and p.ndim == 1 and module is not self.score]
        for _, _, p, _ in self.vectors:
            p.requires_grad_(True)
        self.adapter = dict(self.base, r=r, alpha=alpha, bias=bias)

    def linears(self):
        """[(owner, name, layer)] of every linear layer of the blocks, adapted or not."""
        return [(owner, name, layer) for block in self.transformer.h for owner in (block.attn, block.mlp)
                for name, layer in owner.named_children()]

    def loras(self):
        return [m for m in self.modules() if isinstance(m, LoRA)]

    @torch.no_grad()
    def merge_lora(self):
        """Write the adapters into the weights: the same function as a plain model again."""
        for owner, name, layer in self.linears():
            layer.weight += layer.scale * layer.lora_B @ layer.lora_A
            linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            setattr(owner, name, linear)
        self.adapter, self.vectors = None, []
        return self.requires_grad_(True)

    @contextlib.contextmanager
    def without_adapter(self):
        """The model it was before: with LoRA, the reference costs no second model."""
        for layer in self.loras():
            layer.on = False
        for module, name, _, old in self.vectors:  # another tensor, since autocast remembers what it made of the first
            module._parameters[name] = old
        try:
            yield
        finally:
            for layer in self.loras():
                layer.on = True
            for module, name, new, _ in self.vectors:
                module._parameters[name] = new

    def saved(self):
        """What a checkpoint holds: all tensors, or of an adapted model those that are trained."""
        return {k: t for k, t in self.state_dict().items() if not self.adapter or "lora_" in k
                or k.startswith("score.") or self.vectors and t.ndim == 1}

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def forward(self, tokens, pos=None, mask=None, cache=None):
        """tokens (B, T) -> hidden states (B, T, C).

        pos (B, T) or (T,): position ids, 0..T-1 when absent. mask (B, 1, T, T): what may see what, causal when
        absent. cache: keys and values of earlier positions, which this call extends at `pos`.
        """
        T, block = tokens.shape[1], self.config.block_size
        if pos is None:
            if T > block:
                raise UserError(f"a sequence of {T} tokens does not fit the context of {block}")
            pos = torch.arange(T, device=tokens.device)
        if cache is not None:
            mask = cache.at(pos.expand(tokens.shape))
        t = self.transformer
        x = t.drop(t.wte(tokens) + t.wpe(pos))                                           # (B, T, C)
        for block in t.h:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = recompute(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return t.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., V), in the precision of the matmul."""
        return F.linear(hidden, self.transformer.wte.weight)[..., :self.config.vocab_size]

    def scores(self, hidden):
        """(..., C) -> (..., n_scores), computed in at least fp32 under autocast too: bf16 would make ties."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(full(hidden))


class Cache:
    """Keys and values of every layer. Slot s of row b holds position s of row b, so rows of any length share it.

    A slot a row has not reached yet may hold another row's padding; `at` hides it until the row overwrites it.
    """

    def __init__(self, config, rows, slots, device, dtype):
        shape = (config.n_layer, rows, config.n_head, slots, config.n_embd // config.n_head)
        # Zeros, not empty: a hidden slot has weight 0, and 0 * NaN would still be NaN.
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")

    def reserve(self, slots):
        """Make room for positions below `slots`."""
        more = slots - self.k.shape[3]
        if more > 0:
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))

    def at(self, pos):
        """Prepare to write at pos (B, T); returns the mask (B, 1, T, S): a token sees slots up to its own."""
        self.index = (torch.arange(len(pos), device=pos.device)[:, None, None],
                      torch.arange(self.k.shape[2], device=pos.device)[None, :, None], pos[:, None, :])
        return (torch.arange(self.k.shape[3], device=pos.device) <= pos[:, :, None])[:, None]

    def write(self, layer, k, v):
        """Store k and v (B, H, T, D) of the tokens being processed; returns all (B, H, S, D)."""
        self.k[layer][self.index] = k.to(self.k.dtype)
        self.v[layer][self.index] = v.to(self.v.dtype)
        return self.k[layer], self.v[layer]

    def select(self, rows):
        """Keep (or repeat) these rows, an index (B',)."""
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)


# ------------------------------------------------------------------------------------------------ log-probabilities


def full(x):
    """At least fp32: losses, log-probabilities and values are never computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs(model, tokens, mask, temperature=1.0, entropy=False, chunk=None, pos=None, see=None):
    """log π(token t+1 | tokens 0..t) where mask is not 0, and exactly 0 elsewhere.

    tokens (B, T), mask (B, T-1) -> logp (B, T-1), at least fp32; with entropy=True also the entropy of each of
    those next-token distributions, in nats. The head runs on masked positions only and in chunks (of 2^24 logits,
    unless told) that the backward pass recomputes, so no (B, T, V) tensor ever exists. Both are at the sampling
    temperature: a policy sampled at T != 1 *is* softmax(logits / T), and ratios of anything else are no importance
    weights.
    """
    def head(hidden, target):                                                            # (N, C), (N,)
        logits = full(model.logits(hidden))                                              # (N, V)
        logits = logits if temperature == 1 else logits / temperature
        logp = -F.cross_entropy(logits, target, reduction="none")
        if not entropy:
            return (logp,)
        logz = logits.logsumexp(-1)
        return logp, logz - ((logits - logz[:, None]).exp() * logits).sum(-1)

    where = mask.bool()
    if see is not None:  # packed rows: data.pack's positions and mask
        pos, see = pos[:, :-1], see[:, :, :-1, :-1]
    hidden, target = model(tokens[:, :-1], pos, see)[where], tokens[:, 1:][where]
    out = at_positions(head, where, hidden, target, chunk=chunk or max(64, 2 ** 24 // model.config.vocab_size))
    return out if entropy else out[0]


def at_positions(head, where, *inputs, chunk):
    """head(*inputs) at chosen positions, 0 elsewhere: where (B, T-1), inputs (N, ...) each -> a tuple of (B, T-1).

    head gives a tuple of (N,). Beyond `chunk` positions it runs on one chunk after the other, and the backward pass
    recomputes them, so that what it holds on the way, as (N, V) logits, never exists whole.
    """
    chunks = list(zip(*(x.split(chunk) for x in inputs)))
    again = len(chunks) > 1 and torch.is_grad_enabled()
    run = functools.partial(recompute, head, use_reentrant=False) if again else head
    columns = [torch.cat(column) for column in zip(*(run(*some) for some in chunks))]    # (N,) each
    # masked_scatter rather than multiplication by the mask: what is not a response token cannot leak, NaN included.
    return tuple(torch.zeros(where.shape, device=where.device, dtype=column.dtype).masked_scatter(where, column)
                 for column in columns)


def token_scores(model, tokens, mask):
    """The first score of the state before each masked token, 0 elsewhere: (B, T), (B, T-1) -> (B, T-1).

    At index t it has seen tokens 0..t: for a value function, V of the state in which token t+1 was chosen.
    """
    where = mask.bool()
    score = model.scores(model(tokens[:, :-1])[where])[:, 0]                             # (N,)
    return torch.zeros(mask.shape, device=mask.device, dtype=score.dtype).masked_scatter(where, score)


def response_scores(model, tokens, mask):
    """The scores read at each row's last response token: (B, T), (B, T-1) -> (B, n_scores).

    Neither the amount of padding nor an end token inside the prompt moves the place.
    """
    last = (mask.bool() * torch.arange(1, tokens.shape[1], device=mask.device)).amax(1)  # (B,)
    return model.scores(model(tokens)[torch.arange(len(tokens), device=mask.device), last])


# ------------------------------------------------------------------------------------------------ the sampler


@dataclass
class Rollout:
    """What the sampler drew: the very tensors a trainer uses, never decoded and encoded again."""
    tokens: torch.Tensor    # (B, T) prompt, response, end token, padding
    mask: torch.Tensor      # (B, T-1) 1 where the log-probability at t belongs to a response token, the end included
    logp: torch.Tensor      # (B, T-1) log-probability under the sampling distribution, 0 where nothing was drawn
    finished: torch.Tensor  # (B,) whether the end token was drawn (False: cut off at max_new or block_size)
    prompt_len: list        # (B,) tokens in the prompt

    @property
    def lengths(self):
        """Tokens of each row without padding."""
        return [p + int(n) for p, n in zip(self.prompt_len, self.mask.sum(1).tolist())]

    def responses(self, tok):
        """The B responses as text, without the end token."""
        lengths = (self.mask.sum(1).long() - self.finished.long()).tolist()
        return [tok.decode(row[p:p + n]) for row, p, n in zip(self.tokens.tolist(), self.prompt_len, lengths)]

    def rows(self):
        """Its rows as data.encode makes them: [(ids, target), ...]."""
        return [(ids[:n], [0] * p + [1] * (n - p))
                for ids, n, p in zip(self.tokens.tolist(), self.lengths, self.prompt_len)]

    def take(self, rows):
        """Some of its rows."""
        return Rollout(self.tokens[rows], self.mask[rows], self.logp[rows], self.finished[rows],
                       [self.prompt_len[i] for i in rows])

    @staticmethod
    def of(rows, tok, device="cpu"):
        """Finished responses as if they had been drawn: [(ids, target), ...] as data.encode makes them; logp is 0."""
        tokens, mask = collate(rows, tok, device)
        return Rollout(tokens, mask, torch.zeros_like(mask), torch.ones(len(rows), dtype=torch.bool, device=device),
                       [target.index(1) for _, target in rows])

    @staticmethod
    def join(rolls, pad_id):
        """Several rollouts below each other, padded to the widest."""
        T = max(roll.tokens.shape[1] for roll in rolls)

        def stack(name, width, value):
            return torch.cat([F.pad(x := getattr(roll, name), (0, width - x.shape[1]), value=value) for roll in rolls])
        return Rollout(stack("tokens", T, pad_id), stack("mask", T - 1, 0.0), stack("logp", T - 1, 0.0),
                       torch.cat([roll.finished for roll in rolls]), [n for roll in rolls for n in roll.prompt_len])


LOOK = {"cpu": 1, "cuda": 8}  # steps from one look at how many rows are left to the next: it makes a GPU wait


def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One draw per row by inverting the cumulative distribution: logits (B, V), u (B,) uniform -> token, logp (B,).

    One random number a row rather than one a vocabulary entry, as multinomial and Gumbel need: 15x faster on a CPU.
    Temperature 0 is greedy. The log-probability is that of the distribution drawn from; it is NaN where the logits
    make no distribution.
    """
    logits = full(logits)
    if temperature == 0:
        best = logits.amax(-1)
        return logits.argmax(-1), best - best  # 0, but of NaN or infinity NaN
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= max(top_p, 1e-9)  # what comes before it suffices; never the first
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    logp = logits.log_softmax(-1)                                                        # (B, V)
    cdf = logp.exp().cumsum(-1)
    # `right=True` finds the first entry whose cdf exceeds the draw, which always has probability > 0, provided the
    # draw stays below the last cdf value; rounding could lift it there, hence the minimum.
    draw = torch.minimum(u[:, None] * cdf[:, -1:], cdf[:, -1:].nextafter(torch.zeros_like(cdf[:, -1:])))
    token = torch.searchsorted(cdf, draw, right=True)                                    # (B, 1)
    token = token.clamp(max=logits.shape[1] - 1)  # of a NaN it would be past the end
    return token[:, 0], logp.gather(1, token)[:, 0]


@torch.no_grad()
def generate(model, prompts, tok, max_new, n=1, temperature=1.0, top_k=0, top_p=1.0, stream=None, drop_finished=True,
             begin=()):
    """Sample n responses to each prompt (a list of id lists) -> Rollout of len(prompts) * n rows, prompt-major.

    Prompts of any length are padded on the right; each is prefilled once for its n samples, and from there every row
    keeps its own position in a static key-value cache. A row stops at `tok.end`, after max_new tokens, or when the
    context is full; finished rows leave the batch. top_k and top_p are for chatting: a policy gradient needs the
    samples to come from the distribution it differentiates, so no trainer offers them. stream(token) is called with
    each new id, for a single row. begin: ids every response is made to begin with, besides max_new; they are part
    of it, with log-probability 0. Raises UserError for a prompt that leaves no room in the context, and for a model
    whose logits are no numbers.
    """
    if 0 < temperature < COLDEST:
        raise OptionError(f"--temperature {temperature}: 0 is greedy; anything else has to be {COLDEST:g} or more")
    config, device = model.config, model.device
    if min(map(len, prompts)) == 0 or max_new < 1:
        raise UserError("cannot sample from an empty prompt, nor less than one token")
    prompts = [p + list(begin) for p in prompts]
    length = torch.tensor([len(p) for p in prompts], device=device)                      # (P,)
    longest, rows = max(map(len, prompts)), torch.arange(len(prompts), device=device)
    if longest >= config.block_size:
        raise UserError(f"a prompt of {longest} tokens leaves no room in the context of {config.block_size}")
    width = min(round_up(longest + max_new), config.block_size)
    tokens = pad(prompts, tok.pad, device, width=width)[:, :width]                       # (P, T)
    half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    cache = Cache(config, len(prompts), longest, device, half or model.transformer.wte.weight.dtype)
    was_training = model.training
    model.eval()

    # Prefill: one pass over the prompts; then every prompt's row is repeated for its n samples.
    hidden = model(tokens[:, :longest], cache=cache)[rows, length - 1]                   # (P, C)
    if n > 1:
        rows = rows.repeat_interleave(n)
        hidden, tokens, length = hidden[rows], tokens[rows], length[rows]                # (B, ...)
        cache.select(rows)

    # Decode: at step j every row draws its response token j, at its own position length + j.
    B = len(length)
    said = torch.full((B, max_new), tok.pad, device=device)
    drawn, logp = torch.zeros(B, max_new, dtype=torch.bool, device=device), torch.zeros(
        B, max_new, device=device, dtype=full(hidden).dtype)
    # All uniforms at once: what a row draws does not depend on which other rows have left the batch.
    uniform = torch.rand(max_new, B, device=device, dtype=logp.dtype)
    active, live = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)
    look = LOOK[device.type] if stream is None else 1  # to show a token is to wait for it
    for j in range(max_new):
        token, lp = sample(model.logits(hidden), uniform[j, active], temperature, top_k, top_p)
        said[active, j], logp[active, j], drawn[active, j] = token, lp, live
        if stream is not None and live[0]:
            stream(int(token[0]))
        pos = length[active] + j  # of the token just drawn
        live = live & (token != tok.end) & (pos + 1 < config.block_size)
        if drop_finished and (j + 1) % look == 0:
            left = int(live.sum())
            if left == 0:
                break
            if left <= 0.75 * len(live):  # to drop rows, the cache is copied: worth it for a good many only
                active, pos, token = active[live], pos[live], token[live]
                cache.select(live.nonzero()[:, 0])
                live = live[live]
        if j + 1 < max_new:
            # A CPU reads all slots at every step, so it gets them as they are needed; a GPU gets them at once.
            cache.reserve(width if device.type == "cuda" else min(round_up(longest + j + 1, 32), width))
            hidden = model(token[:, None], pos.clamp(max=width - 1)[:, None], cache=cache)[:, 0]
    model.train(was_training)

    # Lay out: each response directly behind its prompt.
    row, j = drawn.nonzero(as_tuple=True)
    at, mask, laid = length[row] + j, torch.zeros(B, width - 1, device=device), logp.new_zeros(B, width - 1)
    tokens[row, at], mask[row, at - 1], laid[row, at - 1] = said[row, j], 1.0, logp[row, j]
    if laid.isnan().any():
        raise UserError(f"cannot sample: the logits are no numbers; {largest(model)}. In training a lower --lr helps")
    for k in range(1, len(begin) + 1):
        mask[torch.arange(B, device=device), length - k - 1] = 1.0
    width = min(round_up(int(at.max()) + 1), width)
    return Rollout(tokens[:, :width], mask[:, :width - 1], laid[:, :width - 1],
                   (drawn & (said == tok.end)).any(1), (length - len(begin)).tolist())


def largest(model):
    """Which weight of a model is the largest, in words; one that is no number is larger than all."""
    peaks = {name: float(p.detach().abs().max()) for name, p in model.named_parameters()}
    name = max(peaks, key=lambda name: math.inf if math.isnan(peaks[name]) else peaks[name])
    return f"the largest weight, in {name}, is {peaks[name]:.3g}"


def slices(roll, budget, rows=None):
    """Micro-batches of a rollout's rows, trimmed to their own longest: (rows, tokens (b, t), mask (b, t-1)) each."""
    lengths = roll.lengths
    rows = list(range(len(lengths))) if rows is None else rows
    for part in micro_batches([lengths[i] for i in rows], budget):
        part = [rows[i] for i in part]
        t = min(round_up(max(lengths[i] for i in part)), roll.tokens.shape[1])
        yield part, roll.tokens[part, :t], roll.mask[part, :t - 1]


def per_token(roll, budget, fn):
    """Run fn(tokens, mask) over a rollout in micro-batches; each (b, t-1) result comes back as (B, T-1)."""
    out = None
    for rows, tokens, mask in slices(roll, budget):
        got = fn(tokens, mask)
        got = got if isinstance(got, tuple) else (got,)
        out = out or [torch.zeros(roll.mask.shape, device=mask.device, dtype=x.dtype) for x in got]
        for whole, part in zip(out, got):
            whole[rows, :part.shape[1]] = part
    return out


@torch.no_grad()
def log_ratios(roll, policy, frozen, budget, temperature=1.0):
    """log π - log π_ref of a rollout's tokens, without gradient -> (B, T-1); frozen: what `reference` gives."""
    def logps(model):
        return per_token(roll, budget, lambda tokens, mask: token_logprobs(model, tokens, mask, temperature))[0]
    ref, as_ref = frozen
    logp = logps(policy)                                                                 # (B, T-1)
    with as_ref():
        return logp - logps(ref)


@torch.no_grad()
def choice_logprobs(model, prompts, choices, tok, amp, budget):
    """log P of each of a few one-token answers (texts) to each prompt (lists of ids), among them alone -> (N, choices).

    A prompt beyond the context loses its beginning."""
    ids, out = [tok.encode(choice) for choice in choices], torch.zeros(len(prompts), len(choices), device=model.device)
    if any(len(choice) != 1 for choice in ids):
        raise UserError(f"the choices {', '.join(choices)} must be one token each of this tokenizer")
    prompts = [cut_prompt(prompt, tok, model.config.block_size) for prompt in prompts]
    for part in micro_batches([len(prompt) for prompt in prompts], budget):
        tokens = pad([prompts[i] for i in part], tok.pad, model.device)                  # (b, T)
        last = torch.tensor([len(prompts[i]) - 1 for i in part], device=model.device)
        with amp():
            logits = model.logits(model(tokens)[torch.arange(len(part), device=model.device), last])
        out[part] = full(logits)[:, [i for i, in ids]].log_softmax(-1)
    return out


class Reward:
    """A weighted sum of reward models (run folders), judges (language models asked about the answer) and verifiers
    (data.VERIFIERS, or module:function).

    `Reward("0.5*out/reward@answer[write] + exact", ...)(records, roll)` -> total (B,), {term: unweighted part (B,)}.
    What follows a name: |NAME, and the worst of them counts, which is the least, but the most of a cost or with a
    negative weight (Coste et al. 2310.02743; the part "NAME|NAME spread" is their standard deviation); @answer, and it
    sees only what follows the thinking; @rate, a language model's expected points, as -1..1 (direct RLAIF, 2309.00267);
    @A to @D, its P of a class of data.RUBRIC (RBRM, GPT-4 2303.08774); {system message} of a conditional reward model;
    [families], and prompts of others get 0.
    A folder with a reward.txt stands for the sum in it (python reward.py fit).
    """

    def __init__(self, spec, tok, device, amp, budget, cost=False):
        self.terms, self.models, self.loaded, self.rules, self.asked = self.expand(spec), [], {}, {}, {}
        self.tok, self.amp, self.budget, self.cost = tok, amp, budget, cost
        for term in self.terms:
            for name in term.names:
                rule = verifier(name)
                if rule is None and not Path(name).exists():
                    raise UserError(f"{name}: neither a run folder (python reward.py train makes one) nor a verifier "
                                    f"({', '.join(VERIFIERS)}, or module:function)")
                asked = term.view not in ("", "answer")
                if asked and term.system:
                    raise UserError(f"--reward {term.label}: a question takes no system message")
                if rule is not None:
                    if asked or term.system:
                        raise UserError(f"--reward {term.label}: {name} is a verifier and cannot be asked that")
                    self.rules[name] = rule
                    continue
                self.loaded[name] = model = self.loaded.get(name) or load_model(name, tok, device,
                                                                                maker="python reward.py train")
                if asked and model.config.n_scores:
                    raise UserError(f"--reward {term.label}: a reward model, and @{term.view} asks a language model")
                if not asked and not model.config.n_scores:
                    raise UserError(f"--reward {name}: a language model, not a reward model (as a judge: {name}@rate)")
                self.models += [] if asked else [name]

    @staticmethod
    def expand(spec, inside=()):
        """The terms of a sum, those of a folder's reward.txt in the place of the folder; inside: the reward.txt that
        this sum is from, and those that one is from."""
        out = []
        for term in parse_rewards(spec):
            sums = [name for name in term.names if (Path(name) / "reward.txt").exists()]
            if sums and term.label != sums[0]:
                raise UserError(f"--reward {term.label}: {sums[0]} stands for a sum, and takes no |, @, {{}} or []")
            if not sums:
                out.append(term)
                continue
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

    def meet(self, records, data):
        """Refuse records that a term can never pay for, and count those of a file that get 0: see check_needs."""
        for term in self.terms:
            if term.families and not any("family" in record for record in records):
                raise UserError(f'{data}: --reward {term.label} needs "family" in a record, and none has it')
            mine = [record for record in records if not term.families or record.get("family") in term.families]
            for name in term.names:
                check_needs(name, self.rules.get(name), mine, data)

    @torch.no_grad()
    def __call__(self, records, roll):
        texts, parts, self.asked = roll.responses(self.tok), {}, {}
        total = torch.zeros(len(records), device=roll.tokens.device)
        for term in self.terms:
            mine = [i for i, record in enumerate(records) if not term.families or record.get("family") in term.families]
            values = torch.zeros(len(term.names), len(records), device=total.device)
            shown = {i: after_thinking(texts[i]) if term.view == "answer" else texts[i] for i in mine}
            for k, name in enumerate(term.names if mine else ()):
                said = values[k, mine] = self.judge(name, term, records, shown, roll)
                if not said.isfinite().all():
                    self.complain(name, said.tolist(), [records[i] for i in mine])
            worst = torch.amin if (term.weight > 0) != self.cost else torch.amax
            parts[term.label] = worst(values, 0)
            if len(term.names) > 1:
                parts[term.label + " spread"] = values.std(0)
            total += term.weight * parts[term.label]
        return total, parts

    def complain(self, name, said, records):
        """Raise the UserError for a model whose scores are not all finite."""
        if not all(p.isfinite().all() for p in self.loaded[name].parameters()):
            raise UserError(f"{name}: its weights are not all finite numbers; train it again")
        for value, record in zip(said, records):
            number(value, name, record)

    def judge(self, name, term, records, shown, roll):
        """What one model or verifier says of the texts {row: text} -> (len(shown),)."""
        device, mine = roll.tokens.device, list(shown)
        if name in self.rules:
            rule = self.rules[name]
            told = [rule(records[i], shown[i], bool(roll.finished[i])) for i in mine]
            return torch.tensor([number(value, name, records[i]) for value, i in zip(told, mine)], device=device)
        model, out = self.loaded[name], torch.zeros(len(records), device=device)
        if term.view not in ("", "answer"):
            view = "rate" if term.view == "rate" else "classify"
            choices = [str(n) for n in range(POINTS + 1)] if view == "rate" else list(RUBRIC)
            key = name, view, *term.families  # the classes of one answer are one question
            if key not in self.asked:
                texts = [view_prompt(view, records[i]["prompt"][-1]["content"], shown[i]) for i in mine]
                prompts = [self.tok.prompt([dict(role="user", content=text)]) for text in texts]
                self.asked[key] = choice_logprobs(model, prompts, choices, self.tok, self.amp, self.budget).exp()
            p = self.asked[key]                                                          # (n, choices)
            return (p @ torch.arange(POINTS + 1.0, device=device) * 2 / POINTS - 1 if view == "rate"
                    else p[:, choices.index(term.view)])
        plain = not term.system and not term.view
        for rows, tokens, mask in slices(roll, self.budget, mine) if plain else self.read(
                term, records, shown, roll, model.config.block_size):
            with self.amp():
                out[rows] = full(response_scores(model, tokens, mask)[:, 0])
        return out[mine]

    def read(self, term, records, shown, roll, most):
        """Micro-batches of what a reward model sees: texts encoded as in its training, or the rollout's own tokens,
        after the term's system message, cut to `most` tokens as in its training: (rows, tokens, mask)."""
        system = self.tok.chat([dict(role="system", content=term.system)])[0] if term.system else []
        rows, lengths, built = list(shown), roll.lengths, []
        for i in rows:
            ids, begin = roll.tokens[i, :lengths[i]].tolist(), roll.prompt_len[i]
            answer = self.tok.response(shown[i]) if term.view else ids[begin:]
            built += answer_rows(system + ids[:begin], [answer], self.tok, most)
        for part in micro_batches([len(ids) for ids, _ in built], self.budget):
            yield [rows[j] for j in part], *collate([built[j] for j in part], self.tok, roll.tokens.device)


# ------------------------------------------------------------------------------------------------ devices


def keep_freed_memory():
    """Ask glibc to keep freed memory (up to 2 GB) for the next tensor. By default large blocks go back to the system,
    and getting them anew, page by page and zeroed, costs a fifth of a training step. Elsewhere it does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2 ** 31 - 1)


def find_device(name):
    """The torch.device of --device; auto is the first GPU, where there is one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
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
    told = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    if told.upper() in WITHOUT_BF16:
        return "fp32"
    for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        if getattr(torch.cpu, question, bool)():  # bool() is False: a PyTorch that cannot tell
            return "bf16"
    return "fp32"


def machine(device, dtype="auto"):
    """On what, with how many threads and in which precision: figures differ between machines by their rounding."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision(device, dtype)}"
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}, {precision(device, dtype)}"


def cpu_name():
    """What the CPU calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def setup(device="auto", dtype="auto", threads=0):
    """(torch.device, autocast context factory), and a line that says on what the figures are computed. dtype: auto,
    fp32 or bf16, see `precision`. Weights, optimizer and every log-softmax stay in fp32; bf16 is for the matmuls."""
    device = find_device(device)
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    print(f"computing on {machine(device, dtype)}")
    half = precision(device, dtype) == "bf16"
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)


# ------------------------------------------------------------------------------------------------ the optimizer


@torch.no_grad()
def merged_update(old, new, tau, kind, alpha, keep):
    """The parameter an Online Merging Optimizer goes to, when AdamW would go from old to new (Lu et al. 2405.17931).

    Change and task vector tau = θ_sft - θ_base are thinned out and added, weighted 1 - α and α: by OnDARE to a random
    share `keep` of each, without rescaling; by OnTIES to the largest `keep` of each, and where these disagree in sign
    only the larger counts (eq. 7). The authors' code uses dropout for OnDARE: what it keeps is 1 / keep times as large,
    and of tau the share is drawn once, before training; ours is drawn anew for each update.
    """
    delta = new - old
    if kind == "ondare":
        mine, theirs = (torch.rand_like(x) < keep for x in (delta, tau))
    else:
        count = max(1, int(keep * tau.numel()))
        mine, theirs = (x.abs() >= x.abs().flatten().kthvalue(x.numel() - count + 1).values for x in (delta, tau))
        positive = delta * mine + tau * theirs >= 0
        mine, theirs = mine & ((delta >= 0) == positive), theirs & ((tau >= 0) == positive)
    return torch.where(mine, new - alpha * delta, old) + alpha * torch.where(theirs, tau, 0.0)


class Optimizer:
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; linear warm-up, then cosine to `floor` · lr.

    Decay applies to matrices only, never to biases and norms. Muon (Jordan et al. 2024) steps along
    the orthogonalised momentum of each matrix; on the toy world it decides whether the base learns arithmetic in
    time. Gradients are clipped to a global norm before either sees them.

    With model.fused_bwd every parameter has an optimizer of its own, which steps as soon as its gradient is whole and
    frees it (fused gradient descent, ChatGLM-RLHF 2404.00934; LOMO 2306.09782). Nothing is left to clip or to add to.
    """

    def __init__(self, model, lr, total, kind="adamw", muon_lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), warmup=0,
                 floor=0.1, clip=1.0):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.merge = None  # (task vectors by parameter, kind, α, keep) of an Online Merging Optimizer
        self.total, self.warmup, self.floor, self.clip = total, warmup, floor, clip
        hidden = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".h." in n]
        muon = hidden if kind == "muon" else []
        ids = {id(p) for p in muon}
        decay = [p for p in self.params if p.ndim == 2 and id(p) not in ids]
        plain = [p for p in self.params if p.ndim < 2]
        self.optims = [torch.optim.AdamW([dict(params=decay, weight_decay=weight_decay),
                                          dict(params=plain, weight_decay=0.0, lr=model.vector_lr or lr)],
                                         lr=lr, betas=betas, fused=True)]
        if muon:
            self.optims.append(torch.optim.Muon(muon, lr=muon_lr,  # the decay of a step as AdamW's
                                                 weight_decay=weight_decay * lr / muon_lr))
        self.fused, self.updated = model.fused_bwd, set()
        if self.fused:
            if clip:
                raise OptionError("--fused_bwd: a gradient that is freed at once cannot be clipped; add --clip_grad 0")
            self.optims = [type(optim)([group | dict(params=[p])]) for optim in self.optims
                           for group in optim.param_groups for p in group["params"]]
            for optim in self.optims:
                optim.param_groups[0]["params"][0].register_post_accumulate_grad_hook(
                    functools.partial(self.update, optim))
        for group in self.groups():
            group["base_lr"] = group["lr"]

    def merge_in(self, model, base, kind, alpha, keep):
        """Become an Online Merging Optimizer: mix what made model of base into each update of its parameters."""
        if self.fused:
            raise OptionError("--fused_bwd: no --merge_base, which mixes into a whole update")
        if base.config != model.config:
            raise UserError(f"--merge_base {base.base['folder']}: of another architecture than {model.base['folder']}")
        tau = [p.detach() - q.detach() for p, q in zip(model.parameters(), base.parameters())]
        self.merge = tau, kind, alpha, keep

    def groups(self):
        return [group for optim in self.optims for group in optim.param_groups]

    def scale(self, step):
        """The schedule: learning rate of `step` (from 0) as a share of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def update(self, optim, p):
        """fused_bwd: what a parameter's own optimizer does once its gradient is there."""
        if id(p) in self.updated:
            raise UserError("--fused_bwd: an update has to be one backward pass: more --micro_tokens, or less --batch")
        self.updated.add(id(p))
        optim.step()
        optim.zero_grad(set_to_none=True)

    def at(self, step):
        """Set the learning rates of a step."""
        for group in self.groups():
            group["lr"] = group["base_lr"] * self.scale(step)

    def step(self, step):
        """Clip, update, clear the gradients; returns (gradient norm before clipping, None if fused; learning rate)."""
        if self.fused:
            self.updated.clear()
            return None, self.optims[0].param_groups[0]["lr"]
        norm = float(nn.utils.clip_grad_norm_(self.params, self.clip if self.clip else float("inf")))
        if not math.isfinite(norm):
            raise UserError(f"step {step}: the gradient is {norm}; nothing was updated, the last checkpoint is intact. "
                            "A lower --lr, or --dtype fp32, usually helps")
        self.at(step)
        old = [p.detach().clone() for p in self.params] if self.merge else ()
        for optim in self.optims:
            optim.step()
        for p, before, tau in zip(self.params, old, self.merge[0] if self.merge else ()):
            p.data.copy_(merged_update(before, p.detach(), tau, *self.merge[1:]))
        self.clear()
        return norm, self.optims[0].param_groups[0]["lr"]

    def clear(self):
        for optim in self.optims:
            optim.zero_grad(set_to_none=True)

    def forget(self):
        """Back to the state before the first step: no momentum."""
        for optim in self.optims:
            optim.state.clear()

    def tensors(self):
        """Its state as a flat dict of tensors, for the checkpoint."""
        return {f"{i}.{p}.{key}": value for i, optim in enumerate(self.optims)
                for p, state in optim.state_dict()["state"].items() for key, value in state.items()}

    def load_tensors(self, flat, path=""):
        """The inverse; none at all is the state before the first step, anything incomplete is a UserError."""
        want = {f"{i}.{p}.{key}": torch.Size() if key == "step" else param.shape
                for i, optim in enumerate(self.optims)
                for p, param in enumerate(param for group in optim.param_groups for param in group["params"])
                for key in (("momentum_buffer",) if isinstance(optim, torch.optim.Muon) else
                            ("step", "exp_avg", "exp_avg_sq"))}
        compare_shapes(flat, want if flat else {}, path)
        for i, optim in enumerate(self.optims):
            state = {}
            for name, value in flat.items():
                which, p, key = name.split(".", 2)
                if int(which) == i:
                    state.setdefault(int(p), {})[key] = value.clone()  # not the file's memory
            optim.load_state_dict(dict(state=state, param_groups=optim.state_dict()["param_groups"]))


# ------------------------------------------------------------------------------------------------ checkpoints

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_tensors(path, tensors, meta):
    """Write one safetensors file: a JSON header, then raw bytes. Nothing in it can be executed on loading.

    The file appears under its name only once it is complete and on the disk, so a crash, a kill or a full disk at
    any moment leaves the previous one as it was. meta (JSON) rides in the header: weights and facts cannot part. So
    does a checksum of all that the header says and of the data, by which load_tensors knows a file that was damaged.
    """
    path, offset = Path(path), 0
    facts = {"format": "pt", "plainalign": json.dumps(meta)}  # transformers asks for the format
    header = {"__metadata__": facts}
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = dict(dtype=NAMES[t.dtype], shape=list(t.shape), data_offsets=[offset, offset + size])
        offset += size

    def head():
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
        return struct.pack("<Q", len(text)) + text
    crc = zlib.crc32(json.dumps(header).encode())
    facts["crc32"] = f"{0:08x}"  # its place: what it is shows when all is written
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(head())
            for t in tensors.values():
                data = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                crc = zlib.crc32(data, crc)
                f.write(data)
            facts["crc32"] = f"{crc:08x}"
            f.seek(0)
            f.write(head())
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        why = "the disk is full" if e.errno == errno.ENOSPC else e.strerror
        raise UserError(f"{path}: not saved, {why}; an earlier checkpoint there is intact") from None


def load_tensors(path):
    """Read a safetensors file -> (dict of tensors, meta). Raises UserError for anything that is not one, and for one of
    ours that does not fit its checksum. Those of others have none."""
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write: the tensors are ours, the file is not
        size = struct.unpack("<Q", raw[:8].tobytes())[0]
        if size > len(raw) - 8:
            raise ValueError("it is cut short")
        header, data = json.loads(raw[8:8 + size].tobytes()), raw[8 + size:]
        meta = header.get("__metadata__", {})
        said = meta.pop("crc32", None)
        crc = zlib.crc32(json.dumps(header).encode())
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (a, b), shape, dtype = info["data_offsets"], info["shape"], DTYPES[info["dtype"]]
            if a != end or min(shape, default=0) < 0 or b - a != math.prod(shape) * dtype.itemsize or b > len(data):
                raise ValueError(f"the bytes of {name} are not where they should be")
            flat = torch.from_numpy(data[a:b]) if b > a else torch.empty(0, dtype=torch.uint8)
            tensors[name], end = flat.view(dtype).reshape(shape), b
        if end != len(data):
            raise ValueError("it is longer than its header says")
        if said is not None or "plainalign" in meta:  # a file of ours
            crc = zlib.crc32(data, crc)
            if said != f"{crc:08x}":
                raise UserError(f"{path}: damaged; it says that its checksum is {said}, and it is {crc:08x}")
        facts = json.loads(meta.get("plainalign", "{}"))
        if not isinstance(facts, dict):
            raise ValueError("what it says of itself is no table")
        return tensors, facts
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError, RuntimeError, OverflowError) as e:
        why = str(e).splitlines()[0] if str(e) else ""
        raise UserError(f"{path}: not a checkpoint of ours ({type(e).__name__}: {why})") from None


def save_checkpoint(folder, modules, optimizers, meta):
    """modules and optimizers: dicts by name. Everything in one file, `checkpoint.safetensors`, replaced atomically."""
    tensors = {f"{name}/{key}": value for name, m in modules.items() for key, value in m.saved().items()}
    check_finite(tensors, f"{folder}: not saved, an earlier checkpoint there is intact, a lower --lr usually helps")
    tensors |= {f"{name}/{key}": value for name, o in optimizers.items() for key, value in o.tensors().items()}
    meta = meta | {"config": {name: asdict(m.config) for name, m in modules.items()},
                   "adapter": {name: m.adapter for name, m in modules.items() if m.adapter}}
    save_tensors(Path(folder) / "checkpoint.safetensors", tensors, meta)


def fill(module, tensors, name, path):
    """Load the tensors `name/...` into module; every missing, surplus or misshapen one is named in one error."""
    got = part(tensors, name)
    compare_shapes(got, {key: t.shape for key, t in module.saved().items()}, path)
    check_finite(got, path)
    module.load_state_dict(got, strict=False)  # compared above; an adapted model's own weights are not in there


def part(tensors, name):
    """The tensors `name/...`, without that."""
    return {key[len(name) + 1:]: t for key, t in tensors.items() if key.startswith(name + "/")}


def compare_shapes(got, want, path):
    """Raise a UserError that names what is missing, surplus or misshapen in got, a dict of tensors."""
    wrong = [f"{key} is missing" for key in want.keys() - got.keys()]
    wrong += [f"{key} does not belong" for key in got.keys() - want.keys()]
    wrong += [f"{key} is {tuple(got[key].shape)}, not {tuple(want[key])}"
              for key in want.keys() & got.keys() if got[key].shape != want[key]]
    if wrong:
        raise UserError(f"{path}: {'; '.join(sorted(wrong)[:3])}")


def check_finite(tensors, where):
    """Raise a UserError that names the first tensor with a NaN or an infinity in it."""
    for name, t in tensors.items():
        if not t.is_floating_point() or not t.numel():
            continue
        for extreme in t.aminmax():  # of a NaN both are NaN
            if not math.isfinite(extreme):
                raise UserError(f"{where}: in {name} is {float(extreme)}, which is no weight")


class Undrawn(TorchFunctionMode):
    """Within it no weight is drawn: all will be read from a file. On the meta device PyTorch would even import its
    compiler to draw, which takes a second."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def outline(config, tensors, path, adapter=None):
    """A GPT of config, with adapters if there are any, that takes no memory yet. tensors must be what it holds.

    config is from a file and may promise anything, so what it promises is compared with what is there, names and
    shapes, before memory is taken for it.
    """
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:  # first: even without memory a thousand million layers are too many
        raise UserError(f"{path}: {len(layers)} layers, and its config says {config.n_layer}")
    try:
        with torch.device("meta"), Undrawn():
            model = GPT(config)
            if adapter:
                model.base = adapter["base"]
                model.add_lora(adapter["r"], adapter["alpha"], adapter["bias"])
    except (RuntimeError, ValueError, OverflowError) as e:  # too large to be counted, or negative
        why = str(e).partition("\n")[0]
        raise UserError(f"{path}: no model is of the shape that it says ({why})") from None
    compare_shapes(tensors, {name: t.shape for name, t in model.saved().items()}, path)
    return model


def load_model(folder, tok=None, device="cpu", n_scores=None, maker="", vocab_size=None, adapted=None):
    """The model of a run folder, or of a folder with a GPT-2 of Hugging Face's, in eval mode. A tokenizer other than
    the one it was trained with is an error.

    n_scores: make it a reward or value model of that many scores; those that the checkpoint has are kept, the first
    ones first, and others start at zero. 0 asks for a language model and refuses any other; None takes what is there.
    maker: the command that makes this checkpoint, for the error message. vocab_size: for a GPT-2 of Hugging Face's,
    where there is no tok to tell how many tokens it is to have. adapted: the folder of an adapter that is for this
    model, and the CRC-32 that the model's files had then.
    """
    path = Path(folder) / "checkpoint.safetensors"
    if not path.exists() and (foreign := Path(folder) / "config.json").exists() and "model_type" in read_json(foreign):
        paths, tensors, meta = read_gpt2(folder, tok, vocab_size)
        path = paths[0]
    elif path.exists():
        paths, (tensors, meta) = [path], load_tensors(path)
    else:
        raise UserError(f"{folder}: no checkpoint there" + (f"; make it with: {maker}" if maker else ""))
    if tok is not None and meta.get("tokenizer") != tok.fingerprint:
        raise UserError(f"{folder} was trained with another tokenizer ({meta.get('tokenizer')}, not {tok.fingerprint})")
    try:
        config = GPTConfig(**meta["config"]["model"])
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: it does not say what model it holds ({e})") from None
    if n_scores == 0 and config.n_scores:
        raise UserError(f"{folder}: a reward or value model, and a language model is needed")
    crc32 = crc32_of(paths)
    if adapted and adapted[1] != crc32:  # before its own base is read: an adapter of itself would never end
        raise UserError(f"{adapted[0]} adapts {folder}, which has changed since")
    adapters = meta.get("adapter")
    if isinstance(adapters, dict) and "model" in adapters:
        tensors = merged_adapter(adapters["model"], config, tensors, tok, folder)
    outline(config, part(tensors, "model"), path)
    with Undrawn():
        model = GPT(config)
    fill(model, tensors, "model", path)
    if n_scores is not None and n_scores != config.n_scores:
        resize_head(model, n_scores)
    model.base, model.tokenizer = dict(folder=str(folder), crc32=crc32), meta.get("tokenizer")
    return model.to(device).eval()


def resize_head(model, n_scores):
    """Make it a model of n_scores scores: the ones it has, from the first on, and zeros for what is missing.

    The first is the score that Reward reads, so a critic starts from it however many heads the reward model has.
    """
    old, new = model.score, nn.Linear(model.config.n_embd, n_scores, device=model.device)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)
    if old is not None:
        kept = min(n_scores, model.config.n_scores)
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
            new.bias[:kept] = old.bias[:kept]
    model.score, model.config.n_scores = new, n_scores


def merged_adapter(adapter, config, tensors, tok, folder):
    """The tensors of the whole model that an adapter's checkpoint stands for: its base, read anew, and the adapter."""
    path = Path(folder) / "checkpoint.safetensors"
    try:
        base, r, alpha = dict(folder=adapter["folder"], crc32=adapter["crc32"]), int(adapter["r"]), adapter["alpha"]
        bias = bool(adapter.get("bias"))
        outline(config, part(tensors, "model"), path, dict(base=base, r=r, alpha=alpha, bias=bias))
        model = load_model(base["folder"], tok, n_scores=config.n_scores, maker=f"what {folder} was trained from",
                           vocab_size=config.vocab_size, adapted=(folder, base["crc32"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as e:
        why = str(e).partition("\n")[0]
        raise UserError(f"{path}: it does not say what it adapts ({why})") from None
    model.add_lora(r, alpha, bias)
    fill(model, tensors, "model", path)
    return {f"model/{k}": t for k, t in model.merge_lora().state_dict().items()}


def clone(model):
    """A frozen copy that shares no memory with the original: a reference that training cannot move."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def reference(policy):
    """π_ref = the policy as it is now -> (model, context to run it in): a frozen copy, or with LoRA the policy itself
    without its adapter."""
    return (policy, policy.without_adapter) if policy.adapter else (clone(policy), contextlib.nullcontext)


def begun(run):
    """The step at which a run goes on: that of its checkpoint, 0 without one."""
    path = run.left("checkpoint.safetensors")
    step = load_tensors(path)[1].get("step") if path else 0
    return step if type(step) is int else 0  # `steps` says what is wrong with it


def seed_step(seed, step):
    """Seed PyTorch's generators for one step of a run."""
    torch.manual_seed((seed * 1_000_003 + step) % 2 ** 63)


def steps(run, total, modules, optimizers, state, save_every):
    """Yield the steps still to do, and save after every `save_every`, so that the loop itself reads as the paper's.

    run: the data.Run whose folder holds the checkpoint. state: a JSON-able dict of whatever else the loop carries
    from step to step (a KL coefficient, running means); it is saved and restored in place.

    Each step starts by seeding PyTorch's generators from (seed, step). That is all the random state there is: resuming
    needs no generator's state, and evaluation or sampling inside one step cannot change the next.
    """
    start, folder = 0, run.folder
    here = next((module.machine for module in modules.values()), None)
    if path := run.left("checkpoint.safetensors"):
        tensors, meta = load_tensors(path)
        adapters = meta.get("adapter") or {}
        if not isinstance(adapters, dict):
            raise UserError(f"{folder}: its checkpoint does not say what it adapts")
        for name, module in modules.items():
            if adapters.get(name) != module.adapter:
                raise UserError(f"{folder}: what it adapts has changed since it began; delete that folder")
            fill(module, tensors, name, folder)
        for name, optimizer in optimizers.items():
            optimizer.load_tensors({} if meta.get("done") else part(tensors, name), folder)
        if not isinstance(meta.get("state"), dict) or type(meta.get("step")) is not int or meta["step"] < 0:
            raise UserError(f"{folder}: its checkpoint does not say at which step it was written")
        state.update(meta["state"])
        start = meta["step"]
        began = meta.get("machine")
        if began and began != here:
            print(f"{folder}: begun on {began}; from here on it rounds as this machine does", file=sys.stderr)
    for step in run.progress(start, total):
        seed_step(run.seed, step)
        for optimizer in optimizers.values():
            optimizer.at(step)
        yield step
        if (step + 1) % save_every == 0 or step + 1 == total:
            done = step + 1 == total
            save_checkpoint(folder, modules, {} if done else optimizers,
                            dict(step=step + 1, done=done, state=state, tokenizer=run.fingerprint, machine=here))


# ------------------------------------------------------------------------------------------------ Hugging Face's GPT-2
# The layout that transformers, TRL and vLLM read: config.json, and weights under our names, the linear layers'
# transposed, in model.safetensors or pytorch_model.bin, or in shards that NAME.index.json lists.

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT2 = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True)  # what ours is


def read_json(path):
    """The object in a JSON file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: {e.strerror if isinstance(e, OSError) else f'no JSON ({e})'}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def crc32_of(paths):
    """The CRC-32 of files one behind the other, read piece by piece."""
    crc = 0
    for path in paths:
        with open(path, "rb") as f:
            while piece := f.read(2 ** 24):
                crc = zlib.crc32(piece, crc)
    return crc


def load_bin(path):
    """The tensors of a pytorch_model.bin. It is a pickle, but weights_only builds tensors from it and runs nothing."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # what is wrong with such a file can surface as nearly any error
        why = (str(e).splitlines() or [""])[0][:100]
        raise UserError(f"{path}: not readable as weights ({type(e).__name__}: {why})") from None
    plain = lambda t: isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.layout == torch.strided
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and plain(t) and not t.is_nested
                                                for name, t in tensors.items()):
        raise UserError(f"{path}: something else than named tensors is in it")
    return tensors


def read_weights(folder):
    """([path], tensors) of a Hugging Face folder, from one file or several."""
    for name, read in (("model.safetensors", lambda path: load_tensors(path)[0]), ("pytorch_model.bin", load_bin)):
        path, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
        if path.exists():
            return [path], read(path)
        if index.exists():
            where, tensors = read_json(index).get("weight_map"), {}
            if not isinstance(where, dict) or not where or not all(
                    isinstance(f, str) and Path(f).name == f for f in where.values()):
                raise UserError(f"{index}: its weight_map does not name files of this folder")
            for shard in sorted(set(where.values())):
                tensors |= read(Path(folder) / shard)
            if lost := sorted(where.keys() - tensors.keys()):
                raise UserError(f"{index}: {lost[0]} is not in {where[lost[0]]}")
            return [Path(folder) / shard for shard in sorted(set(where.values()))], tensors
    raise UserError(f"{folder}: a config.json, but neither model.safetensors nor pytorch_model.bin, nor their index")


def read_gpt2(folder, tok=None, vocab_size=None):
    """A GPT-2 in Hugging Face's layout -> paths of its weights, tensors and meta as in a checkpoint of ours.

    GPT-2's vocabulary ends in its end-of-text token, which is our end token. The other special tokens of ours are
    new rows of the embedding, the mean of all others, to be learnt in fine-tuning: up to tok's number of tokens, or to
    vocab_size. Dropout is not taken over.
    """
    path = Path(folder) / "config.json"
    facts = read_json(path)
    for key, ours in GPT2.items():
        if facts.get(key, ours) != ours:
            raise UserError(f"{path}: {key} is {facts[key]!r}, and a GPT-2 of ours has {ours!r}")
    shape = {}
    for ours, theirs in dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head",
                             n_embd="n_embd").items():
        shape[ours] = facts.get(theirs)
        if type(shape[ours]) is not int or shape[ours] < 1:
            raise UserError(f"{path}: {theirs} is {shape[ours]!r}, and has to be a whole number above 0")
    if facts.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise UserError(f"{path}: n_inner is {facts['n_inner']}, and a GPT-2 of ours has four times n_embd")

    paths, found = read_weights(folder)
    tensors = {}
    for name, t in found.items():
        if not t.is_floating_point() or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old files hold the causal mask
        name = name if name.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{name}"
        tensors[name] = (t.t() if name.endswith(TRANSPOSED) and t.ndim == 2 else t).float().contiguous()
    wte = tensors.get("transformer.wte.weight")
    if wte is None or wte.shape != (shape["vocab_size"], shape["n_embd"]):
        raise UserError(f"{paths[0]}: transformer.wte.weight is missing, or not ({shape['vocab_size']}, "
                        f"{shape['n_embd']}), as config.json says")
    head = tensors.pop("lm_head.weight", wte)
    if not torch.equal(head, wte):
        raise UserError(f"{paths[0]}: lm_head.weight is not the embedding; only a tied head is known here")

    marked = facts.get("plainalign")  # who exports writes there whose tokens it reads, and TRL leaves that in
    mark = marked.get("tokenizer") if isinstance(marked, dict) else None
    meta = dict(tokenizer=mark if isinstance(mark, str) else None)
    if tok is not None and meta["tokenizer"] is None:
        if len(wte) != tok.base + 1:
            raise UserError(f"{path}: {len(wte)} tokens, and --tokenizer has {tok.base}, which with an end of text "
                            f"would be {tok.base + 1}")
        meta["tokenizer"], vocab_size = tok.fingerprint, tok.n_vocab
    shape["vocab_size"] = max(shape["vocab_size"], vocab_size or 0)
    if shape["vocab_size"] - len(wte) > len(GPT2_SPECIALS):
        raise UserError(f"{path}: {len(wte)} tokens, and {vocab_size} are expected of it")
    new, rows = shape["vocab_size"] - len(wte), -(-shape["vocab_size"] // 64) * 64
    tensors["transformer.wte.weight"] = torch.cat(
        [wte, wte.mean(0).expand(new, -1), wte.new_zeros(rows - shape["vocab_size"], wte.shape[1])])
    if "score.weight" in tensors:
        shape["n_scores"] = tensors["score.weight"].numel() // shape["n_embd"]
        tensors.setdefault("score.bias", torch.zeros(shape["n_scores"]))
    return paths, {f"model/{name}": t for name, t in tensors.items()}, meta | dict(config=dict(model=shape))


def write_gpt2(model, tok, folder):
    """The inverse, with the tokenizer and its chat template: a folder that transformers, TRL and vLLM load. The bias of
    a score head, which has no place there, goes into the last norm's, where it does the same to the scores."""
    c, state = model.config, {name: t.detach().clone() for name, t in model.state_dict().items()}
    if c.n_scores:
        shift = torch.linalg.pinv(state["score.weight"].double()) @ state.pop("score.bias").double()
        state["transformer.ln_f.bias"] += shift.to(state["transformer.ln_f.bias"].dtype)
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:c.vocab_size]
    kind = "GPT2ForSequenceClassification" if c.n_scores else "GPT2LMHeadModel"
    facts = GPT2 | dict(
        architectures=[kind], vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=0.0, dtype="float32",
        bos_token_id=tok.end, eos_token_id=tok.end, pad_token_id=tok.pad, plainalign=dict(tokenizer=tok.fingerprint))
    if c.n_scores:
        facts["id2label"] = {str(k): f"score {k}" for k in range(c.n_scores)}
    save_tensors(Path(folder) / "model.safetensors", {
        name: t.t() if name.endswith(TRANSPOSED) else t for name, t in state.items()}, {})
    texts = dict(tok.huggingface(), **{"config.json": facts})  # config.json last: by it the folder holds a model
    for name, content in texts.items():
        write_text(Path(folder) / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@dataclass
class Convert(Options):
    """Hugging Face's GPT-2 to a checkpoint (import), or a checkpoint to Hugging Face's GPT-2 (export)."""
    out: str = ""               # folder of the result
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file or folder


def import_gpt2(cfg, folders):
    """Write what load_model reads of a folder as a checkpoint of ours, LoRA adapters merged."""
    tok, model = opened(cfg, folders)
    save_checkpoint(cfg.out, dict(model=model), {}, dict(step=0, done=True, state={}, tokenizer=tok.fingerprint))
    print(f"{cfg.out}: {folders[0]}, {sum(p.numel() for p in model.parameters()):,} parameters")


def export_gpt2(cfg, folders):
    """Write a checkpoint, LoRA adapters merged, in Hugging Face's layout."""
    tok, model = opened(cfg, folders)
    write_gpt2(model, tok, cfg.out)
    print(f"{cfg.out}: {folders[0]} for transformers, TRL and vLLM")


def opened(cfg, folders):
    """Tokenizer and model of a conversion to a folder that is still free."""
    if not cfg.out:
        raise OptionError("--out: say where to write the result")
    if any((Path(cfg.out) / name).exists() for name in ("config.json", "checkpoint.safetensors")):
        raise UserError(f"{cfg.out} holds another model: choose another --out, or delete that folder")
    tok = Tokenizer.load(cfg.tokenizer)
    return tok, load_model(folders[0], tok)


# ------------------------------------------------------------------------------------------------ merge


@dataclass
class Merge(Options):
    """Average the weights of checkpoints of one architecture (model soups, 2203.05482)."""
    out: str = ""               # folder of the result
    weights: str = ""           # one number a checkpoint, comma-separated; none: all equal
    slerp: bool = False         # of two: along the arc between them, tensor by tensor, not the chord


def slerp(a, b, t):
    """Spherical interpolation of two tensors: t = 0 is a, 1 is b, and between them the norm does not shrink as on the
    chord (Shoemake 1985). Of tensors that (nearly) point the same or opposite ways, the chord."""
    norms = float(a.norm() * b.norm())
    cos = float((a * b).sum()) / norms if norms else 1.0
    if abs(cos) > 1 - 1e-12:
        return (1 - t) * a + t * b
    angle = math.acos(cos)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def merge(cfg, folders):
    """Write Σ w_i θ_i, summed in float64, so that the mean of copies is the copy to the bit; or slerp of two."""
    if not cfg.out:
        raise OptionError("--out: say where to write the result")
    try:
        weights = [float(w) for w in cfg.weights.split(",")] if cfg.weights else [1 / len(folders)] * len(folders)
    except ValueError:
        raise OptionError(f"--weights {cfg.weights}: not numbers with commas between them") from None
    if len(weights) != len(folders):
        raise OptionError(f"--weights {cfg.weights}: {len(weights)} for {len(folders)} checkpoints")
    if not all(map(math.isfinite, weights)):
        raise OptionError(f"--weights {cfg.weights}: not finite")
    if cfg.slerp and (len(folders) != 2 or abs(sum(weights) - 1) > 1e-9):
        raise OptionError("--slerp goes between two checkpoints, with weights that add up to 1")
    models = [load_model(f) for f in folders]
    tokenizers = {m.tokenizer for m in models}
    facts = dict(merged=[m.base for m in models], weights=weights) | (dict(slerp=True) if cfg.slerp else {})
    path = Path(cfg.out) / "checkpoint.safetensors"
    if path.exists():
        if load_tensors(path)[1].get("made") != facts:
            raise UserError(f"{cfg.out} holds another model: choose another --out, or delete that folder")
        return print(f"{cfg.out} is finished; nothing to do")
    first, total = models[0], {}
    if None in tokenizers:
        raise UserError(f"{folders[[m.tokenizer for m in models].index(None)]}: it does not say whose tokens it reads; "
                        "python model.py import first")
    if len(tokenizers) > 1 or any(m.config != first.config for m in models):
        raise UserError(f"{', '.join(folders)}: one has another architecture or tokenizer")
    if cfg.slerp:
        a, b = (model.state_dict() for model in models)
        total = {name: slerp(a[name].double(), b[name].double(), weights[1]) for name in a}
    for model, weight in zip(models, weights) if not cfg.slerp else ():
        for name, t in model.state_dict().items():
            total[name] = total.get(name, 0) + weight * t.double()
    first.load_state_dict({name: t.float() for name, t in total.items()})
    save_checkpoint(cfg.out, dict(model=first), {}, dict(step=0, done=True, state={}, tokenizer=tokenizers.pop(),
                                                         made=facts))
    print(f"{cfg.out}: {' + '.join(f'{w:g} {f}' for w, f in zip(weights, folders))}")


# ------------------------------------------------------------------------------------------------ chat


@dataclass
class Config(Options):
    """Talk to a checkpoint, or answer every line of standard input. Other commands, each with its own --help:
    python model.py merge, python model.py import, python model.py export."""
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file or folder
    system: str = ""            # system message
    temperature: NonNegative = 0.7  # 0 is greedy
    top_k: Natural = 0          # keep the k likeliest tokens; 0 keeps all
    top_p: Share = 1.0          # keep the likeliest tokens that make up this share
    max_new: Count = 128        # longest answer, tokens
    seed: Natural = 0           # of the sampling
    device: str = "auto"        # auto, cpu, cuda


# Without one of these words, it chats.
COMMANDS = {"merge": (Merge, merge), "import": (Convert, import_gpt2), "export": (Convert, export_gpt2)}
TAKES = {"merge": ["checkpoint", "checkpoint..."], "import": ["folder"], "export": ["checkpoint"]}


def main():
    if command := COMMANDS.get(" ".join(sys.argv[1:2])):
        Options, run = command
        return run(*parse(Options, TAKES[sys.argv[1]], sys.argv[2:], sys.argv[1]))
    cfg, (folder,) = parse(Config, positional=["checkpoint"])
    tok = Tokenizer.load(cfg.tokenizer)
    model = load_model(folder, tok, find_device(cfg.device), n_scores=0)
    torch.manual_seed(cfg.seed)
    history = [dict(role="system", content=cfg.system)] if cfg.system else []
    tty = sys.stdin.isatty()

    def answer(messages):
        """Print the answer as it comes; bytes wait until they make up whole characters."""
        ids, shown = [], 0

        def show(token):
            nonlocal shown
            ids.append(token)
            text = tok.decode(ids)
            if not text.endswith("\ufffd"):
                print(text[shown:], end="", flush=True)
                shown = len(text)
        prompt = cut_prompt(tok.prompt(messages), tok, model.config.block_size - 1)
        generate(model, [prompt], tok, cfg.max_new, 1, cfg.temperature, cfg.top_k, cfg.top_p, show)
        print(tok.decode(ids)[shown:])
        return tok.decode(ids)

    while True:
        if tty:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip():
            said = history + [dict(role="user", content=line.strip())]
            reply = answer(said)
            if tty:  # a conversation remembers; piped lines are separate questions
                history = said + [dict(role="assistant", content=reply)]


if __name__ == "__main__":
    guard(main)
