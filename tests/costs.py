"""What a model costs by formula: parameters, FLOPs, bytes. test_cost.py holds them against what really happens.

FLOPs count matmuls only: 2 per weight and token in a forward pass, 6 in training, and attention.
"""
from model import GPTConfig

SIZES = {"tiny": dict(n_layer=4, n_embd=128, n_head=4, vocab_size=512, block_size=256),
         "gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, block_size=1024)}
SIZES |= {name: SIZES["gpt2"] | dict(n_layer=layers, n_embd=width, n_head=width // 64) for name, layers, width in (
    ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280), ("gpt2-xl", 48, 1600))}


def n_params(config):
    rows = -(-config.vocab_size // 64) * 64
    C, layers = config.n_embd, config.n_layer
    return (rows + config.block_size) * C + layers * (12 * C ** 2 + 13 * C) + 2 * C + config.n_scores * C


def forward_flops(config, tokens, context, head=None, read=None):
    """FLOPs of `tokens` tokens that each attend to `context` others on average; head: how many need logits, if not all;
    read: how many are read at all, if not as many. The last layer's MLP runs for these only."""
    head = tokens if head is None else head
    read = head if read is None else read
    C, layers = config.n_embd, config.n_layer
    weights = tokens * (12 * layers - 8) * C ** 2 + read * 8 * C ** 2 + head * config.vocab_size * C
    return 2 * weights + tokens * 4 * layers * C * context


# Models trained and models frozen. DPO's reference has left when training starts; GRPO here has a verifier, no KL term.
MODELS = {"sft, dpo, orpo, grpo": (1, 0), "reward": (1, 0), "grpo, KL, reward model": (1, 2), "ppo": (2, 2)}


def memory(algorithm, config, tokens, half=2, lora_r=0, grad_checkpoint=False, read=1.0):
    """Bytes at the peak of an update whose micro-batches hold `tokens` tokens; half: bytes of a matmul's number; read:
    the share of the tokens whose state is read at the end, as those of responses are.

    A trained number costs 16 bytes (itself, its gradient, AdamW's two), a frozen one 4; PPO's policy and critic are
    updated one after the other, so gradients, activations and rounded weights are those of one. A layer keeps for its
    backward pass, in widths a token, two residual states in fp32 and fourteen of its matmuls'; one and nine are of its
    MLP, which in the last layer sees only what is read: in a reward model next to nothing. The head's logits exist in
    chunks: in a half, in fp32, as their log-softmax and as a gradient that is freed in part. With LoRA everything is
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
    if algorithm == "reward":
        read = 0
    logit = 10 + half // 2 + 8 * (algorithm == "ppo")  # bytes; PPO asks for the entropy, too
    head = min(int(read * tokens), 2 ** 24 // config.vocab_size) * config.vocab_size * logit
    unread = (1 - read) * tokens * C * (4 + 9 * half)
    if grad_checkpoint:  # a layer keeps its input; the one that is being recomputed, or the head, comes on top
        return held + tokens * layers * 4 * C + max(layer, head)
    return held + layers * layer - unread + head


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
