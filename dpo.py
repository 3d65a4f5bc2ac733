"""DPO and every preference loss that needs a reference: RLHF's optimum by classification, without a reward model or RL.

    minimise  -log σ(β d),    d = a - b,    a = log [π(y_w|x) / π_ref(y_w|x)],    b = log [π(y_l|x) / π_ref(y_l|x)]

The optimum of  E[r] - β KL(π || π_ref)  satisfies  r(x, y) = β log [π / π_ref] + β log Z(x).  Put into Bradley-Terry's
P(y_w ≻ y_l) = σ(r_w - r_l), Z cancels, and the likelihood of the labels is the line above (Rafailov et al.
2305.18290, eq. 7): β a is an implicit reward. Some twenty papers change one line of it; they are the dict LOSSES.
Around it, the same everywhere: which tokens count, summed or averaged (`length_norm`, `mask_end`); an NLL term
(`nll_coef`); where rows come from (a file, or `online`: the policy's own samples, judged by `reward`); the reference
(fixed, refreshed every `ref_every` steps, or with LoRA the policy without its adapter).

    python dpo.py                                     out/sft + out/pairs/pairs.jsonl -> out/dpo
    python dpo.py --loss kto --out out/kto            another loss; thumbs up and down, here from the same pairs
    python dpo.py --online --data toy --reward out/reward --steps 60 --out out/dpo_online

What comes out on the toy is in README.md, "What comes out".

Departures: dropout stays off, so that policy and reference agree until the first update; a fixed reference's
log-probabilities of what the run will see of a file are computed once, before training, and it then leaves the memory
but for evaluations.
"""
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

from data import (Count, Families, LateRow, Natural, NonNegative, OptionError, Positive, Run, Share, Sum, Temperature,
                  TrainConfig, UserError, bar, collate, column, compare_words, fits, guard, item_batches, longest_rows,
                  make_item, mean, open_preferences, open_stream, parse, send, singles, truth)
from model import (Optimizer, Reward, at_positions, begun, full, head_chunk, load_model, logps, reference, respond,
                   setup, steps, token_logprobs, token_scores)


@dataclass
class Config(TrainConfig):
    """DPO and the losses around it."""
    out: str = "out/dpo"        # folder of the run; the same command continues an interrupted one
    # data
    init: str = "out/sft"       # policy to start from; it is also the reference
    data: str = "out/pairs/pairs.jsonl"  # preferences (or thumbs, for kto, dro and npo); online: prompts, toy or a file
    pairs: Literal["all", "ends"] = "all"  # of a ranking: all its pairs, or the best against the worst
    # the loss
    loss: "Literal[tuple(LOSSES)]" = "dpo"  # what is minimised
    beta: Positive = 0.3        # how strongly the reference holds (papers mostly .1; dpo --length_norm 5, dro 1)
    eps: Share = 0.1            # cdpo, robust: share of labels taken to be flipped
    lam: NonNegative = 50.0     # dpop: penalty once the chosen falls below the reference
    alpha: NonNegative = 0.5    # tdpo: weight of the sequence KL; d2o: of the rejected, as beta of the anchors
    eta: NonNegative = 1.0      # rpo: scale of the score gaps; sppo: of the win probabilities (1000)
    lam_up: NonNegative = 1.0   # kto: weight of thumbs up
    lam_down: NonNegative = 1.0  # kto: weight of thumbs down
    margin: NonNegative = 0.0   # times the record's margin is the β d asked for (ODPO 2402.10571); 0 asks for none
    length_norm: bool = False   # mean instead of sum of the token log-ratios (IPO as TRL has it; Tülu 3, with beta 5)
    mask_end: bool = False      # the end token counts in the NLL term only (Llama 3's format tokens)
    nll_coef: NonNegative = 0.0  # weight of -log π(chosen) per token (Llama 3: .2)
    nll_per: Literal["token", "pair"] = "token"  # its mean: over all chosen tokens, or over pairs of each one's mean
    # the reference
    ref_every: Natural = 0      # steps after which the policy becomes the reference (and `kl` is to that); 0: never
    # online
    online: bool = False        # sample pairs from the policy as it is now
    reward: Sum = "out/reward"  # what judges them: reward models and verifiers, as 0.5*out/reward + exact
    k: Natural = 2              # samples a prompt; the best is set against the worst
    families: Families = "write"  # prompts of the toy world, comma-separated
    max_new: Count = 80         # longest sample, tokens
    temperature: Temperature = 1.0  # of sampling
    missing_end: NonNegative = 1.0  # taken off the score of a sample cut off before its end token
    # optimisation
    epochs: Positive = 1.0      # passes over the records
    steps: Natural = 0          # updates; 0: what the epochs take
    batch: Count = 32           # pairs (thumbs; online: prompts) an update
    lr: Positive = 5e-5         # peak learning rate of AdamW
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the hidden matrices, adapters included
    muon_lr: Positive = 1e-3    # peak learning rate of Muon
    critic_lr: Positive = 1e-3  # dro: of its value function
    weight_decay: NonNegative = 0.0  # on matrices
    warmup: Natural = 10        # updates of linear warm-up, before the cosine
    clip_grad: NonNegative = 1.0  # global gradient norm; 0 never clips
    # evaluation
    eval_every: Count = 100     # updates between evaluations on held-out records

    def __post_init__(self):
        super().__post_init__()
        if self.online and (self.k < 2 or not self.steps):
            raise OptionError("--online needs --steps, and --k of at least 2")
        if not self.online and self.data == "toy":
            raise OptionError("--data toy: preferences come from a file (python reward.py label), or add --online")
        if self.margin and not needs(self, "d"):
            raise OptionError(f"--margin: --loss {self.loss} has no difference to ask a margin of")
        if self.length_norm and needs(self, "kl_w"):
            raise OptionError(f"--length_norm: --loss {self.loss} sets sums of log-ratios against sums of KL")
        if self.loss == "robust" and self.eps >= 0.5:
            raise OptionError(f"--eps {self.eps}: with half of the labels flipped they say nothing")
        if self.lora_r and self.ref_every:
            raise OptionError("--lora_r: the reference is the model it adapts; no --ref_every")


# ---------------------------------------------------------------- the mathematics
# A loss gives (N,) numbers of x and h, the options. The words before it say what it needs. The first: what the numbers
# are averaged over, pairs, single responses, or the bad ones alone. The others: what it reads of x; only that is there.
#   a, b                 always: log-ratio log π/π_ref of the chosen (or good) and of the rejected (or bad) responses
#   d                    a - b, of which a margin can be asked
#   gap, p, p_w, p_l     of the data: r_w - r_l; P(w ≻ l); how often each of them wins
#   z                    KTO's reference point, see reference_point
#   kl_w, kl_l           TDPO's KL along each sequence
#   r_w, r_l, v_w, v_l   DRO's reward and V(x) of each response
#   anchors              makes a the mean over all responses of a ranking but the last

logsig = F.logsigmoid  # log σ without underflow
OF_THE_DATA = ("gap", "p", "p_w", "p_l")  # what of x comes from the records

LOSSES = {
    # the label's likelihood                                                                 DPO 2305.18290 eq. 7
    "dpo": ("pair d", lambda x, h: -logsig(h.beta * x.d)),
    # labels smoothed: a share ε is wrong, so no margin is ever certain                      cDPO, Mitchell 2023
    "cdpo": ("pair d", lambda x, h: -(1 - h.eps) * logsig(h.beta * x.d) - h.eps * logsig(-h.beta * x.d)),
    # unbiased under flips with probability ε: what the clean labels would give on average   rDPO 2403.00409 eq. 9
    "robust": ("pair d", lambda x, h: ((h.eps * logsig(-h.beta * x.d) - (1 - h.eps) * logsig(h.beta * x.d))
                                       / (1 - 2 * h.eps))),
    # regress d on 1 / 2β: certain labels do not drive it to infinity                        IPO 2310.12036 eq. 17
    "ipo": ("pair d", lambda x, h: (x.d - 1 / (2 * h.beta)) ** 2),
    # hinge, for pairs drawn by rejection sampling; TRL's "hinge"                            RSO 2309.06657 eq. 10
    "rso": ("pair d", lambda x, h: F.relu(1 - h.beta * x.d)),
    # other convex f(β d); the logistic f is dpo, the hinge rso, the square ipo's            GPO 2402.05749 tab. 1
    "gpo_exponential": ("pair d", lambda x, h: (-h.beta * x.d).exp()),
    "gpo_squared": ("pair d", lambda x, h: (h.beta * x.d - 1) ** 2),
    "gpo_truncated": ("pair d", lambda x, h: F.relu(1 - h.beta * x.d) ** 2),
    "gpo_savage": ("pair d", lambda x, h: torch.sigmoid(-h.beta * x.d) ** 2),
    # match the gap of the scores, not only its sign: nothing diverges; KL(data || policy)   RPO 2406.11704 sec. 3.3
    "rpo_squared": ("pair d gap", lambda x, h: (h.beta * x.d - h.eta * x.gap) ** 2),
    "rpo_backward": ("pair d gap", lambda x, h: bernoulli_kl(h.eta * x.gap, h.beta * x.d)),  # NeMo's name
    "rpo_forward": ("pair d gap", lambda x, h: bernoulli_kl(h.beta * x.d, h.eta * x.gap)),
    # a penalty once the chosen itself becomes less likely                                   DPOP 2402.13228 eq. 3
    "dpop": ("pair d", lambda x, h: -logsig(h.beta * (x.d - h.lam * F.relu(-x.a)))),
    # penalise a KL that grows faster on the rejected than on the chosen                     TDPO 2404.11999 eq. 13, 16
    "tdpo1": ("pair d kl_w kl_l", lambda x, h: -logsig(h.beta * (x.d - (x.kl_l - x.kl_w)))),
    "tdpo2": ("pair d kl_w kl_l", lambda x, h: -logsig(h.beta * (x.d - h.alpha * (x.kl_l - x.kl_w.detach())))),
    # only the bad is labelled; the good are the reference's own samples, a their mean       D2O 2403.03419 eq. 6
    "d2o": ("pair anchors", lambda x, h: -logsig(h.beta * x.a - h.alpha * x.b)),
    # log-ratios regress on win rates against the policy: self-play                          SPPO 2405.00675 eq. 4.7
    "sppo": ("pair p_w p_l", lambda x, h: ((x.a - h.eta * (x.p_w - .5)) ** 2
                                           + (x.b - h.eta * (x.p_l - .5)) ** 2) / 2),
    "sppo_hard": ("pair", lambda x, h: (x.a - .5 / h.beta) ** 2 + (x.b + .5 / h.beta) ** 2),  # p 1 and 0, TRL's scale
    # soft labels p; the paper's are σ(win rate of w - win rate of l)                        DNO 2404.03715 alg. 1
    "dno": ("pair d p", lambda x, h: -x.p * logsig(h.beta * x.d) - (1 - x.p) * logsig(-h.beta * x.d)),
    # the chosen up and the rejected down, each by itself                                    APO-zero 2408.06266
    "apo_zero": ("pair", lambda x, h: torch.sigmoid(-h.beta * x.a) + torch.sigmoid(h.beta * x.b)),
    # thumbs up and down about a reference point z                                           KTO 2402.01306 eq. 8
    "kto": ("single z", lambda x, h: torch.cat([h.lam_up * torch.sigmoid(h.beta * (x.z - x.a)),
                                                h.lam_down * torch.sigmoid(h.beta * (x.b - x.z))])),
    # r = V(x) + β log π/π_ref at the optimum: one square trains policy and V                DRO-V 2405.19107 eq. 4
    "dro": ("single r_w r_l v_w v_l", lambda x, h: torch.cat([x.r_w - x.v_w - h.beta * x.a,
                                                              x.r_l - x.v_l - h.beta * x.b]) ** 2 / 2),
    # forget the bad; unlike gradient ascent it stops when they are gone                     NPO 2404.05868 eq. 3
    "npo": ("bad", lambda x, h: -2 / h.beta * logsig(-h.beta * x.b)),
}


def needs(cfg, word):
    """Whether the loss needs this; a margin needs the gap, whatever the loss."""
    words, _ = LOSSES[cfg.loss]
    if cfg.margin:
        words += " gap"
    return word in words.split()


def bernoulli_kl(s, t):
    """KL(Bernoulli(σ(s)) || Bernoulli(σ(t))), elementwise."""
    return torch.sigmoid(s) * (logsig(s) - logsig(t)) + torch.sigmoid(-s) * (logsig(-s) - logsig(-t))


def response_logps(logp, mask, skip=None, mean=False):
    """Token log-probs (B, T-1) -> (B,): their sum, or mean, over the masked tokens but for those where skip is."""
    keep = mask if skip is None else mask * ~skip
    total = (logp * keep).sum(1)
    return total / keep.sum(1).clamp(min=1) if mean else total


def sequence_kl(policy, ref, tokens, mask, chunk=None):
    """TDPO's D = Σ_t KL(π_ref || π) over the response positions, whole vocabulary: (B, T), (B, T-1) -> (B,). The
    gradient goes through π."""
    def head(hidden, ref_hidden):                                                        # (N, C) each
        logp = full(policy.logits(hidden)).log_softmax(-1)                               # (N, V)
        with torch.no_grad():
            ref_logp = full(ref.logits(ref_hidden)).log_softmax(-1)                      # (N, V)
        return ((ref_logp.exp() * (ref_logp - logp)).sum(-1),)                           # (N,)

    where = mask.nonzero(as_tuple=True)                                                  # (N,), (N,)
    chunk = chunk or head_chunk(policy)
    with torch.no_grad():
        ref_hidden = ref(tokens, where=where)                                            # (N, C)
    with policy.autocast():  # around all chunks, or the embedding would be cast anew for each
        hidden = policy(tokens, where=where)                                             # (N, C)
        kl, = at_positions(head, mask.shape, where, hidden, ref_hidden, chunk=chunk)     # (B, T-1)
    return kl.sum(1)


# ---------------------------------------------------------------- the steps
# An item, as data.make_item makes it, is a pair or a single response: its rows (ids, target), and which of them are
# good, up. Here it gets ref, log π_ref of each of its rows, and for KTO other, a mismatched row, with other_ref.

def add_mismatched(items, block_size):
    """Give every single response as `other` its prompt with the response to another prompt (KTO).

    That is the next one to another prompt in an order drawn by PyTorch's generator. Not in the items' own order, where
    pairs lie as good, bad, good, bad: the next one would always be good.
    """
    prompts = []
    for item in bar(items, "mismatched"):
        prompt, _ = halves(*item["rows"])
        prompts.append(hash(tuple(prompt)))
    order = torch.randperm(len(items)).tolist()
    for place, i in enumerate(order):
        for k in range(1, len(items)):
            j = order[(place + k) % len(items)]         # the next one, round and round
            if prompts[j] != prompts[i]:
                break
        else:
            raise UserError("--loss kto: all responses are to one prompt, and it needs one to another prompt")
        recipe = partial(mismatched, *items[i]["rows"], *items[j]["rows"], block_size)
        items[i]["other"] = LateRow(recipe, 0)


def halves(row):
    """The ids of a row before its response, and of the response."""
    ids, target = row
    start = target.index(1)
    return ids[:start], ids[start:]


def mismatched(own, other, block_size):
    """The prompt of a row with the response of another, as a list of one row."""
    prompt, _ = halves(own)
    _, said = halves(other)
    said = said[:block_size - len(prompt)]              # the prompt stays as it is before its own response
    return [(prompt + said, [0] * len(prompt) + [1] * len(said))]


class FromFile:
    """Items of a file of preferences or thumbs. They are the same in every epoch, so a fixed reference reads them once,
    before the training."""

    def __init__(self, policy, cfg):
        self.cfg = cfg
        block_size = policy.config.block_size
        self.stream, self.held, self.prompts = open_preferences(
            cfg, policy.tok, block_size, paired=needs(cfg, "pair"), one=needs(cfg, "anchors"))
        every = self.stream.items + self.held
        for name in OF_THE_DATA:
            if needs(cfg, name) and any(item[name] is None for item in every):
                raise UserError(f"{cfg.data}: --loss {cfg.loss} needs to know how much better a response is, and some "
                                "records have neither scores nor a margin")
        self.total = self.stream.updates(cfg)
        self.then = compare_words(cfg, "toy" if cfg.tokenizer == "toy" else cfg.data)
        if needs(cfg, "z"):
            torch.manual_seed(cfg.seed)
            add_mismatched(every, block_size)

    def batch(self, step):
        """The items of a step, and what is logged of them."""
        return self.stream.batch(step, self.cfg.batch), {}

    def read_by(self, ref, first):
        """Let a fixed reference read what the run will see from its first step on. -> The reference, or None where its
        log-probs are all that was needed of it: one model less in memory."""
        cfg = self.cfg
        if cfg.ref_every:
            return ref
        # The micro-batches are those of the whole run, so that a resumed one has the same bits.
        every = self.stream.seen(0, self.total, cfg.batch) + self.held
        still = set(map(id, self.stream.seen(first, self.total, cfg.batch) + self.held))
        lengths = longest_rows(bar(every, "tokenising"))
        for part in bar(list(item_batches(every, cfg.micro_tokens, lengths)), "reference"):
            if not still.isdisjoint(map(id, part)):
                add_reference(part, ref, cfg)
        return ref if cfg.lora_r or needs(cfg, "kl_w") else None  # LoRA's shares the weights of the policy

    def forget(self):
        """The reference is another one from now on."""
        for item in self.stream.items + self.held:
            item.pop("ref", None)


class FromPolicy:
    """Items of the policy's own samples, which the reward judges (--online): no two steps see the same."""

    def __init__(self, policy, cfg):
        self.cfg = cfg
        self.policy = policy
        self.total, self.held = cfg.steps, []
        self.reward = Reward(cfg.reward, policy, cfg.micro_tokens)
        self.stream, self.prompts = open_stream(
            cfg.data, "prompt", cfg.seed, cfg.families, n_held=64, skip_bad=cfg.skip_bad,
            prepare=fits(policy.tok, policy.config.block_size, cfg.max_new))
        self.reward.check(self.stream.some(), cfg.data)
        self.then = compare_words(cfg, cfg.data, cfg.families, cfg.reward)

    def batch(self, step):
        """The items of a step, and what is logged of them."""
        cfg = self.cfg
        records = self.stream.batch(step, cfg.batch)
        roll = respond(self.policy, records, cfg, cfg.k)
        asked = [record for record in records for _ in range(cfg.k)]
        judged, _ = self.reward(asked, roll)                                             # (P k,)
        score = judged - cfg.missing_end * ~roll.finished
        score = score.view(-1, cfg.k)                                                    # (P, k)
        items = best_and_worst(records, roll.rows(), score, cfg)
        if needs(cfg, "z"):
            if len({str(item["record"]["prompt"]) for item in items}) < 2:
                items = []  # a mismatched response is one to another prompt
            add_mismatched(items, self.policy.config.block_size)
        return items, dict(reward=score.mean(), items=len(items))

    def read_by(self, ref, first):
        """Nothing is there yet for the reference to read."""
        return ref

    def forget(self):
        """Nothing is kept from one step to the next."""


def best_and_worst(records, rows, score, cfg):
    """Of the k samples to each prompt the best against the worst: rows (P k), score (P, k) -> items. Where all are
    equally good there is none."""
    items = []
    for i, record in enumerate(records):
        mine, said = score[i], rows[i * cfg.k:(i + 1) * cfg.k]
        ends = [int(mine.argmax()), int(mine.argmin())]
        best, worst = mine[ends].tolist()
        if best == worst:
            continue
        beats = torch.sigmoid(mine[:, None] - mine)                                      # (k, k)
        wins = (beats.sum(1) - .5) / (cfg.k - 1)                                         # (k,) against the others
        told = {key: value for key, value in record.items() if key not in ("prob", "margin")}  # of a file's answers
        told |= dict(scores=[best, worst], win=wins[ends].tolist())
        pair = make_item(told, [said[i] for i in ends], [True, False])
        items += [pair] if needs(cfg, "pair") else singles(pair)
    return items


def read(model, rows, cfg):
    """What a model says of rows: their tokens (R, T), mask and logp (R, T-1), and taken (R,), the sum or mean of logp
    that the preference term takes of each."""
    tokens, mask = collate(rows, model.tok, model.device)
    logp = token_logprobs(model, tokens, mask)
    skip = tokens[:, 1:] == model.tok.end if cfg.mask_end else None
    taken = response_logps(logp, mask, skip, cfg.length_norm)
    return SimpleNamespace(tokens=tokens, mask=mask, logp=logp, taken=taken)


@torch.no_grad()
def add_reference(items, ref, cfg):
    """Give the items that lack it log π_ref of their rows, and of the mismatched row."""
    unread = [item for item in items if "ref" not in item]
    for part in item_batches(unread, cfg.micro_tokens):
        sizes = [len(item["rows"]) for item in part]
        said = read(ref, column(part, "rows"), cfg).taken                                # (R,)
        for item, own in zip(part, said.split(sizes)):
            item["ref"] = own
        if needs(cfg, "z"):
            said = read(ref, [item["other"] for item in part], cfg).taken                # (R,)
            for item, own in zip(part, said):
                item["other_ref"] = own


@torch.no_grad()
def reference_point(policy, items, cfg):
    """KTO's z = max(0, mean log-ratio of mismatched responses), an estimate of KL(π || π_ref) (2402.01306, sec. 4).

    The estimate is biased: π did not draw those responses. As π learns what answers a prompt, answers to other prompts
    become less likely than under π_ref, the mean falls below 0, and z is 0: the rule, not the exception.
    """
    ratios = []
    for part in item_batches(items, cfg.micro_tokens):
        said = read(policy, [item["other"] for item in part], cfg).taken                 # (R,)
        ratios.append(said - torch.stack([item["other_ref"] for item in part]))
    return torch.cat(ratios).mean().clamp(min=0)


def ask(policy, ref, items, cfg):
    """A batch: its items, which now know what the reference says of them; KTO's z; and what its means are over."""
    add_reference(items, ref, cfg)
    z = reference_point(policy, items, cfg) if items and needs(cfg, "z") else None
    rows, good = column(items, "rows"), []  # the tokens of every good response
    for (_, target), up in zip(rows, column(items, "up")):
        if up:
            good.append(sum(target))
    n = len(rows) - len(good) if needs(cfg, "bad") else len(items)
    n_nll = sum(good) if cfg.nll_per == "token" else len(good)
    return SimpleNamespace(items=items, z=z, n=max(1, n), n_nll=max(1, n_nll))


def apart(values, sides):
    """What belongs to the good rows, and what to the bad ones: (R,) -> (W,), (L,). sides: the places of both."""
    good, bad = sides
    return values[good], values[bad]


def compare(policy, ref, critic, batch, cfg):
    """Policy against reference: x of the losses, of one micro-batch after the other. lw and ll are log π of whole
    responses, n_w the tokens of the good ones."""
    for part in item_batches(batch.items, cfg.micro_tokens):
        said = read(policy, column(part, "rows"), cfg)
        good = torch.tensor(column(part, "up"))                                          # (R,), on the CPU
        sides = [send(side.nonzero()[:, 0], policy.device) for side in (good, ~good)]    # (W,), (L,)
        ratio = said.taken - torch.cat([item["ref"] for item in part])                   # (R,)
        x = SimpleNamespace(z=batch.z)
        x.a, x.b = apart(ratio, sides)
        x.lw, x.ll = apart(said.logp.sum(1), sides)
        x.n_w, _ = apart(said.mask.sum(1), sides)
        if needs(cfg, "anchors"):
            anchors = x.a.split([len(item["rows"]) - 1 for item in part])
            x.a = torch.stack([own.mean() for own in anchors])                           # (P,)
        for name in OF_THE_DATA:
            if needs(cfg, name):
                numbers = torch.tensor([item[name] for item in part], dtype=ratio.dtype)
                setattr(x, name, send(numbers, ratio.device))                            # (P,)
        if needs(cfg, "d"):
            x.d = x.a - x.b                                                              # (P,)
        if cfg.margin:
            x.d = x.d - cfg.margin / cfg.beta * x.gap
        if needs(cfg, "kl_w"):
            kl = sequence_kl(policy, ref, said.tokens, said.mask)                        # (R,)
            x.kl_w, x.kl_l = apart(kl, sides)
        if critic:
            first = said.mask * said.mask.cumsum(1).eq(1)  # V is read at the last token of the prompt
            v = token_scores(critic, said.tokens, first).sum(1)                          # (R,)
            x.v_w, x.v_l = apart(v, sides)
            r = torch.tensor(column(part, "r"), dtype=v.dtype)
            x.r_w, x.r_l = apart(send(r, v.device), sides)
        yield x


def batch_loss(x, batch, cfg):
    """A micro-batch's share of the loss of its batch, with the NLL term of the good responses."""
    _, loss_of = LOSSES[cfg.loss]
    loss = loss_of(x, cfg).sum() / batch.n
    if cfg.nll_coef:
        logp = x.lw if cfg.nll_per == "token" else x.lw / x.n_w                          # (W,)
        loss = loss - cfg.nll_coef * (logp.sum() / batch.n_nll)
    return loss


def joined(xs, name):
    """What all micro-batches have of a name."""
    return torch.cat([getattr(x, name) for x in xs])


def average(values):
    """Their mean, None where there are none."""
    return values.mean() if len(values) else None


@torch.no_grad()
def report(xs, batch, cfg):
    """Loss and metrics of a batch, from the x of its micro-batches."""
    a, b = joined(xs, "a"), joined(xs, "b")
    metrics = {"loss": sum(batch_loss(x, batch, cfg) for x in xs), "rewards/chosen": average(cfg.beta * a),
               "rewards/rejected": average(cfg.beta * b), "logps/chosen": average(joined(xs, "lw")),
               "logps/rejected": average(joined(xs, "ll"))}
    if len(a) and len(b):
        metrics["rewards/margin"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if needs(cfg, "pair"):
        metrics["rewards/accuracy"] = average(0.5 + 0.5 * (a - b).sign())
    if needs(cfg, "z"):
        metrics["z"] = batch.z
    return metrics


@torch.no_grad()
def evaluate(policy, ref, critic, source, run, step, cfg):
    """Held-out items, by the same loss; held-out prompts, answered: the KL to the reference and, where it is known, the
    true score."""
    metrics = {}
    if source.held:
        batch = ask(policy, ref, source.held, cfg)
        xs = list(compare(policy, ref, critic, batch, cfg))
        metrics = {f"val_{name}": value for name, value in report(xs, batch, cfg).items()}
    if source.prompts:
        old = ref or load_model(cfg.init, policy)  # back for a moment, where it has left the memory
        torch.manual_seed(cfg.seed)
        roll = respond(policy, source.prompts, cfg)
        kl = logps(policy, roll, cfg) - logps(old, roll, cfg)                            # (B, T-1)
        texts = roll.responses()
        run.samples(step + 1, source.prompts, texts)
        metrics |= dict(kl=kl.sum(1).mean(), response_length=roll.mask.sum(1).mean(),
                        gold=mean(truth(source.prompts, texts, roll.finished)))
    return metrics


# ---------------------------------------------------------------- the loop

def train(cfg, make_optimizer=Optimizer):
    """Take good and bad responses, ask the reference, compare, step, report: one step after another. make_optimizer
    makes that of the policy (configs/qwen2.py has another)."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    policy = load_model(cfg.init, setup(cfg, run.tok), n_scores=0, maker="python sft.py").prepare(cfg)
    source = FromPolicy(policy, cfg) if cfg.online else FromFile(policy, cfg)
    ref = source.read_by(reference(policy), begun(run))
    shared = dict(total=source.total, weight_decay=cfg.weight_decay, warmup=cfg.warmup, clip=cfg.clip_grad)
    optimizer = make_optimizer(policy, cfg.lr, kind=cfg.optimizer, muon_lr=cfg.muon_lr, **shared)
    modules, optimizers = dict(model=policy), dict(model=optimizer)
    if cfg.ref_every:
        modules["ref"] = ref
    if needs(cfg, "v_w"):  # V(x) is learnt beside the policy
        modules["critic"] = load_model(cfg.init, policy, n_scores=1)
        optimizers["critic"] = Optimizer(modules["critic"], cfg.critic_lr, **shared)
    critic = modules.get("critic")

    for step in steps(run, source.total, modules, optimizers, {}, cfg.save_every):
        if cfg.ref_every and step and step % cfg.ref_every == 0:
            ref.load_state_dict(policy.state_dict())
            source.forget()

        # 1. Take good and bad responses: of the file, or the best and the worst of what the policy says now.
        items, metrics = source.batch(step)

        # 2. Ask the reference how likely they are, where it has not said so yet.
        batch = ask(policy, ref, items, cfg)

        # 3. Compare policy and reference on them; the gradients of the micro-batches add up.
        xs = []
        for x in compare(policy, ref, critic, batch, cfg):
            batch_loss(x, batch, cfg).backward()
            xs.append(x)

        # 4. Step towards the good ones and away from the bad ones; online there may be none.
        if xs:
            metrics |= report(xs, batch, cfg) | optimizer.step(step)
            if critic:
                optimizers["critic"].step(step)

        # 5. Report.
        if run.evaluates(step):
            metrics |= evaluate(policy, ref, critic, source, run, step, cfg)
        run.log(step, ("loss", "rewards/margin", "gold"), **metrics)
    return run.finish(("loss", "rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected", "gold", "kl"),
                      then=source.then)


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
