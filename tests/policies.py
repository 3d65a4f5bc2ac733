"""Models to test with. They are made by training, through what every model of ours can do, so that no test knows what
a model is made of: replace positions, norms or the tied head in model.py, and these stay what they say they are.
"""
import copy
import functools
import math
import sys
from pathlib import Path

import torch

from data import Tokenizer
from model import GPT, GPTConfig, load_model, load_tensors, write_model

TOK = Tokenizer.load("toy")
NOTHING = dict.fromkeys(range(TOK.n_vocab), 0.0)  # the chances of a policy that says nothing
NEVER = -30.0  # the log-probability of what is as good as impossible


def random_policy(seed=0, **options):
    """A random model, far from uniform, that never samples padding; with n_scores, a random reward model."""
    return copy.deepcopy(made(seed, **options))


@functools.cache
def made(seed, end=.08, says="", dropout=0.0, **size):
    """end: how likely each token is to be the last; .08 ends about one response in three early. says: the only letters
    it says, each of them and the end as often."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(TOK.n_vocab, dropout=dropout, **dict(block_size=64, n_layer=1, n_head=2, n_embd=32) | size), TOK)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if net.config.n_scores:
        return net
    chances = {TOK.pad: 0.0, TOK.end: end}
    if says:
        tokens = [*TOK.encode(says), TOK.end]
        chances = NOTHING | dict.fromkeys(tokens, 1 / len(tokens))
    return teach(net, torch.randint(0, TOK.n_vocab, (2, 48)), chances)


def bandit_policy(chances):
    """A policy that answers "?" with one token: letter -> its chance."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(TOK.n_vocab, block_size=16, n_layer=1, n_head=2, n_embd=16), TOK)
    arms = {TOK.encode(letter)[0]: p for letter, p in chances.items()}
    return teach(net, torch.tensor([TOK.prompt([dict(role="user", content="?")])]), NOTHING | arms, exact=True)


def teach(net, contexts, chances, exact=False):
    """Train net until each of these tokens has its chance after every beginning of the contexts (B, T), or nearly."""
    tokens = torch.tensor(list(chances))
    want = torch.tensor([math.log(p) if p else NEVER for p in chances.values()], dtype=torch.float64)
    net.double().eval()                        # so that every machine arrives at the same weights
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-12 if exact else 1e-3,
                                  tolerance_change=1e-16 if exact else 1e-9, line_search_fn="strong_wolfe")

    def gaps():
        off = net.logits(net(contexts)).log_softmax(-1)[..., tokens] - want
        return torch.where(want == NEVER, off.clamp(min=0), off)                         # less than never is never

    def closure():
        optimizer.zero_grad()
        loss = (gaps() ** 2).sum(-1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    assert gaps().abs().max() < (1e-6 if exact else .1)
    return net.float().train()


def save(folder, net):
    """The folder of a finished run whose model this is, as a word of a command."""
    net.tok = TOK
    write_model(folder, net)
    return str(folder)


def weights(folder, part="model"):
    """{part/name: tensor} of a model in a run's folder, finished or not; {} where there is no such part."""
    folder = Path(folder)
    if (folder / "checkpoint.safetensors").exists():
        tensors = load_tensors(folder / "checkpoint.safetensors")[0]
        return {name: t.clone() for name, t in tensors.items() if name.startswith(part + "/")}
    if part != "model" and not (folder / part).exists():
        return {}
    net = load_model(folder if part == "model" else folder / part)
    return {f"{part}/{name}": t for name, t in net.state_dict().items()}


def patch(monkeypatch, name, new):
    """Put new in the place of a function in model.py and in every file of ours that has imported it."""
    beside = [path.stem for path in (Path(__file__).resolve().parents[1] / "configs").glob("*.py")]
    for module in ("model", "sft", "reward", "ppo", "dpo", "grpo", "orpo", *beside):
        if hasattr(sys.modules.get(module), name):
            monkeypatch.setattr(sys.modules[module], name, new)
