"""How fast are the sampler and the training steps here? A program, not a test; nothing asserts on time.

    python tests/bench.py                        every item, a line each
    python tests/bench.py generate --batch 256   one item, as one line of JSON
    python tests/bench.py memory                 what each algorithm needs at each size of GPT-2, computed

The work of each item is that of ../shared/bench/peers.py (the same shapes, random tokens, no end token), so the two
can be run in turn and compared. FLOPs count matmuls only: 2 per weight and token forward, 6 for training, plus
attention; the peak is a large matmul of the same precision, measured on the spot.
"""
import argparse
import contextlib
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import collate  # noqa: E402
from model import (GPTConfig, Optimizer, generate, machine, new_model, response_scores, setup, slices,  # noqa: E402
                   token_logprobs)
import dpo  # noqa: E402
import grpo  # noqa: E402
import orpo  # noqa: E402
from reward import bradley_terry  # noqa: E402
from sft import Batch, sft_loss  # noqa: E402

SIZES = {"tiny": dict(n_layer=4, n_embd=128, n_head=4, vocab_size=512, block_size=256),
         "gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, block_size=1024)}
SIZES |= {name: SIZES["gpt2"] | dict(n_layer=layers, n_embd=width, n_head=width // 64) for name, layers, width in (
    ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280), ("gpt2-xl", 48, 1600))}
ITEMS = ["generate", "sft", "reward", "dpo", "orpo", "grpo"]
# Models trained and models frozen. DPO's reference has left when training starts; GRPO here has a verifier, no KL term.
MODELS = {"sft, dpo, orpo, grpo": (1, 0), "reward": (1, 0), "grpo, KL, reward model": (1, 2), "ppo": (2, 2)}
TOK = SimpleNamespace(pad=0, end=-1, fingerprint="bench")  # an end token that is never drawn: every row runs to its full length


def forward_flops(config, tokens, context, head=None):
    """FLOPs of `tokens` tokens that each attend to `context` others on average; head: how many need logits, if not all."""
    blocks, head = 12 * config.n_layer * config.n_embd ** 2, tokens if head is None else head
    return (tokens * (2 * blocks + 4 * config.n_layer * config.n_embd * context)
            + head * 2 * config.vocab_size * config.n_embd)


def n_params(config):
    rows = -(-config.vocab_size // 64) * 64
    C, layers = config.n_embd, config.n_layer
    return (rows + config.block_size) * C + layers * (12 * C ** 2 + 13 * C) + 2 * C + config.n_scores * C


def memory(algorithm, config, tokens, half=2, lora_r=0, grad_checkpoint=False):
    """Bytes at the peak of an update whose micro-batches hold `tokens` tokens; half: bytes of a matmul's number.

    A trained number costs 16 bytes (itself, its gradient, AdamW's two), a frozen one 4; PPO's policy and critic are
    updated one after the other, so gradients, activations and rounded weights are those of one. A layer keeps for its
    backward pass, in widths a token, two residual states in fp32 and fourteen of its matmuls'; the head's logits exist
    in chunks: in a half, in fp32, as their log-softmax and as a gradient that is freed in part. With LoRA everything is
    frozen but the adapters, and the reference shares it.
    """
    trained, frozen = MODELS[algorithm]
    P, C, layers = n_params(config), config.n_embd, config.n_layer
    held = (trained * 12 + 4) * P + frozen * 4 * P
    if lora_r:
        adapters = layers * lora_r * 16 * C
        held = (trained + max(0, frozen - 1)) * 4 * P + (trained * 12 + 4) * adapters
    if half == 2:  # autocast keeps the weights it has rounded
        held += 2 * P
    layer = tokens * C * (8 + 14 * half)
    head = 0 if algorithm == "reward" else min(tokens, 2 ** 24 // config.vocab_size) * config.vocab_size * (10 + half // 2)
    if grad_checkpoint:  # a layer keeps its input; the one that is being recomputed, or the head, comes on top
        return held + tokens * layers * 4 * C + max(layer, head)
    return held + layers * layer + head


def memory_table(args):
    """GB at the peak, and the largest GPT-2 that fits; nothing is run."""
    print(f"GB at the peak of an update in bf16, micro-batches of {args.micro_tokens} tokens"
          + ", activations recomputed" * args.grad_checkpoint)
    names, cards = [name for name in SIZES if name != "tiny"], (8, 16, 24, 80)
    print(f"{'':28}" + "".join(f"{name:>13}" for name in names) + "".join(f"{f'in {gb} GB':>13}" for gb in cards))
    print(f"{'cache of a sampled token, kB':28}" + "".join(
        f"{4 * SIZES[name]['n_layer'] * SIZES[name]['n_embd'] / 1e3:13.0f}" for name in names))
    for algorithm in MODELS:
        for r in (0, 16):
            gb = [memory(algorithm, GPTConfig(**SIZES[name]), args.micro_tokens, 2, r, args.grad_checkpoint) / 1e9
                  for name in names]
            fits = [([name for name, need in zip(names, gb) if need < 0.9 * card] or ["-"])[-1] for card in cards]
            print(f"{algorithm + ', LoRA' * (r > 0):28}" + "".join(f"{x:13.1f}" for x in gb)
                  + "".join(f"{fit:>13}" for fit in fits))


def matmul_peak(device, dtype):
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    return 2 * n ** 3 / measure(lambda: a @ b, device, 5)[0]


def measure(fn, device, repeats):
    """(median, best) seconds of fn() after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), min(times[1:])


def items(args, model):
    """(fn, tokens, FLOPs) of the item: what one call does, and how many tokens it is counted as."""
    config, draw = model.config, torch.Generator().manual_seed(0)
    optimizer = Optimizer(model, 1e-4, total=10 ** 6)
    if args.item == "generate":
        prompts = torch.randint(3, 500, (args.batch, args.prompt), generator=draw).tolist()

        def run():
            generate(model, prompts, args.new)
        count = args.batch * args.new
        return run, count, forward_flops(config, count, args.prompt + args.new / 2)
    if args.item == "grpo":  # a whole step: sample groups of 8, advantages of some reward, one update
        prompts, cfg = torch.randint(3, 500, (args.batch, args.prompt), generator=draw).tolist(), grpo.Config()

        def run():
            roll = generate(model, prompts, args.new, n=8)
            score = (roll.tokens % 7 == 0).sum(1).view(-1, 8).double()
            adv = grpo.ADVANTAGES["grpo"](score, cfg).float().view(-1, 1)
            weights = grpo.token_weights(roll.mask, cfg.per, args.new)
            for rows, tokens, mask in slices(roll, cfg.micro_tokens):
                logp = token_logprobs(model, tokens, mask)
                loss, _, _ = grpo.policy_loss(logp, logp.detach(), adv[rows], mask, cfg)
                (loss * weights[rows, :mask.shape[1]]).sum().backward()
            optimizer.step(0)
        count, length = args.batch * 8 * args.new, args.prompt + args.new
        return run, count, (forward_flops(config, count, args.prompt + args.new / 2)
                            + 3 * forward_flops(config, args.batch * 8 * length, length / 2))
    length = args.length if args.item == "sft" else args.prompt + args.new
    rows = args.batch * (1 if args.item == "sft" else 2)
    tokens = torch.randint(3, 500, (rows, length), generator=draw)
    mask = [[1] * length if args.item == "sft" else [0] * args.prompt + [1] * args.new] * rows
    tokens, mask = collate(list(zip(tokens.tolist(), mask)), TOK, model.device)

    def run():
        if args.item == "sft":
            loss = sft_loss(model, Batch(tokens, mask)) / mask.sum()
        elif args.item in ("dpo", "orpo"):  # DPO's reference log-probs are computed beforehand
            s, n = token_logprobs(model, tokens, mask).sum(1), mask.sum(1)
            x = SimpleNamespace(lw=s[::2], ll=s[1::2], n_w=n[::2], n_l=n[1::2], nll=-s[::2] / n[::2],
                                d=s[::2] - s[1::2])
            loss = (dpo.LOSSES["dpo"][1](x, dpo.Config()) if args.item == "dpo"
                    else orpo.LOSSES["orpo"](x, orpo.Config())).mean()
        else:
            scores = response_scores(model, tokens, mask)[:, 0]
            loss = bradley_terry(scores[::2], scores[1::2]).mean()
        loss.backward()
        optimizer.step(0)
    return run, rows * length, 3 * forward_flops(config, rows * length, length / 2)


def bench(args):
    with contextlib.redirect_stdout(sys.stderr):  # what it computes on is a part of the line of JSON, below
        like = setup(args, TOK)
    torch.manual_seed(0)
    config = GPTConfig(**SIZES[args.size], n_scores=int(args.item == "reward"))
    model, device = new_model(config, like), like.device
    run, tokens, flops = items(args, model)
    cpu = time.process_time()
    seconds, best = measure(run, device, args.repeats)
    cpu = (time.process_time() - cpu) / (args.repeats + 1)
    half = like.precision == "bf16"
    peak = matmul_peak(device, torch.bfloat16 if half else torch.float32)
    memory = (torch.cuda.max_memory_allocated() if device.type == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(json.dumps(dict(
        what=args.item, peer="plainalign", size=args.size, dtype="bf16" if half else "fp32", batch=args.batch,
        machine=machine(device, args.dtype), threads=torch.get_num_threads(), seconds=round(seconds, 4),
        seconds_min=round(best, 4),
        cpu_seconds=round(cpu, 4), tokens_per_s=round(tokens / seconds), peak_share=round(flops / seconds / peak, 3),
        peak_memory_mb=round(memory / 2 ** 20))), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", nargs="?", choices=[*ITEMS, "memory"], help="none: all but memory")
    parser.add_argument("--micro_tokens", type=int, default=4096, help="memory: tokens a forward pass holds")
    parser.add_argument("--grad_checkpoint", action="store_true", help="memory: recompute activations")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--batch", type=int, default=0, help="rows, pairs or groups; 0: 256 for generate, 16 for grpo, 32 else")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    if args.item == "memory":
        return memory_table(args)
    for item in [args.item] if args.item else ITEMS:
        batch = args.batch or dict(generate=256, grpo=16).get(item, 32)
        bench(argparse.Namespace(**vars(args) | dict(item=item, batch=batch)))


if __name__ == "__main__":
    main()
