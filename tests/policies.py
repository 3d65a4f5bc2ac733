"""Models to test with. They are made by training, through what every model of ours can do, so that no test knows what
a model is made of: replace positions, norms or the tied head in model.py, and these stay what they say they are.
"""
import copy
import functools
import math

import torch

from data import Tokenizer
from model import GPT, GPTConfig

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
    net = GPT(GPTConfig(TOK.n_vocab, dropout=dropout, **dict(block_size=64, n_layer=1, n_head=2, n_embd=32) | size))
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
    net = GPT(GPTConfig(TOK.n_vocab, block_size=16, n_layer=1, n_head=2, n_embd=16))
    arms = {TOK.encode(letter)[0]: p for letter, p in chances.items()}
    return teach(net, torch.tensor([TOK.prompt([dict(role="user", content="?")])]), NOTHING | arms, exact=True)


def teach(net, contexts, chances, exact=False):
    """Train net until each of these tokens has its chance after every beginning of the contexts (B, T), or nearly."""
    tokens = torch.tensor(list(chances))
    want = torch.tensor([math.log(p) if p else NEVER for p in chances.values()], dtype=torch.float64)
    net.double().eval()                        # so that every machine arrives at the same weights
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-8 if exact else 1e-3,
                                  line_search_fn="strong_wolfe")

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
    assert gaps().abs().max() < .1
    return net.float().train()
