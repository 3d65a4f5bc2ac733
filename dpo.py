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

On the toy, 2 CPU cores with AMX, bf16, 8,000 pairs: 23 s; true reward +1.0 ± .1 over SFT, win rate .78 ± .03 (three
seeds).

Departures: dropout stays off, so that policy and reference agree until the first update; a fixed reference's
log-probabilities of what the run will see of a file are computed once, before training, and it then leaves the memory
but for evaluations.
"""
import contextlib
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (Count, Families, Natural, NonNegative, OptionError, Positive, Run, Share, Sum, Temperature, Tokenizer,
                  TrainConfig, UserError, add_mismatched, collate, compare_words, fits, guard, item_batches, make_item,
                  mean, open_stream, parse, preference_items, singles, truth)
from model import (Optimizer, Reward, at_positions, begun, full, generate, load_model, log_ratios, reference, setup,
                   steps, token_logprobs, token_scores)


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
    # Online Merging Optimizer (2405.17931)
    merge_base: str = ""        # the model before fine-tuning: mix what that changed into each update
    merge: Literal["ondare", "onties"] = "ondare"  # at random, or the largest changes where their signs agree
    merge_alpha: Share = 1e-4   # weight of that change
    merge_keep: Share = 0.5     # share of the parameters that each update touches
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
    eval_every: Count = 50      # updates between evaluations on held-out records

    def __post_init__(self):
        super().__post_init__()
        unit = LOSSES[self.loss][0]
        if self.online and (self.k < 2 or not self.steps):
            raise OptionError("--online needs --steps, and --k of at least 2")
        if not self.online and self.data == "toy":
            raise OptionError("--data toy: preferences come from a file (python reward.py label), or add --online")
        if self.margin and (unit != "pair" or self.loss in NO_MARGIN):
            raise OptionError(f"--margin: --loss {self.loss} has no difference to ask a margin of")
        if self.length_norm and self.loss.startswith("tdpo"):
            raise OptionError(f"--length_norm: --loss {self.loss} sets sums of log-ratios against sums of KL")
        if self.loss == "robust" and self.eps >= 0.5:
            raise OptionError(f"--eps {self.eps}: with half of the labels flipped they say nothing")
        if self.lora_r and (self.ref_every or self.merge_base):
            raise OptionError("--lora_r: the reference is the model it adapts; no --ref_every, no --merge_base")


# ---------------------------------------------------------------- the mathematics
# Each loss gives (N,) numbers, to be averaged over what its first word names: pairs, single responses, or bad ones.
# Its arguments are h, the options, and x, with
#   a, b                 log-ratio log π/π_ref of the chosen (or good) and of the rejected (or bad) responses
#   d                    a - b, for pairs
#   gap, p, p_w, p_l     of the data: r_w - r_l; P(w ≻ l); how often each of them wins
#   z                    KTO's reference point, see reference_point
#   kl_w, kl_l           TDPO's KL along each sequence
#   r_w, r_l, v_w, v_l   DRO's reward and V(x) of each response

logsig = F.logsigmoid  # log σ without underflow

LOSSES = {
    # the label's likelihood                                                                 DPO 2305.18290 eq. 7
    "dpo": ("pair", lambda x, h: -logsig(h.beta * x.d)),
    # labels smoothed: a share ε is wrong, so no margin is ever certain                      cDPO, Mitchell 2023
    "cdpo": ("pair", lambda x, h: -(1 - h.eps) * logsig(h.beta * x.d) - h.eps * logsig(-h.beta * x.d)),
    # unbiased under flips with probability ε: what the clean labels would give on average   rDPO 2403.00409 eq. 9
    "robust": ("pair", lambda x, h: ((h.eps * logsig(-h.beta * x.d) - (1 - h.eps) * logsig(h.beta * x.d))
                                     / (1 - 2 * h.eps))),
    # regress d on 1 / 2β: certain labels do not drive it to infinity                        IPO 2310.12036 eq. 17
    "ipo": ("pair", lambda x, h: (x.d - 1 / (2 * h.beta)) ** 2),
    # hinge, for pairs drawn by rejection sampling; TRL's "hinge"                            RSO 2309.06657 eq. 10
    "rso": ("pair", lambda x, h: F.relu(1 - h.beta * x.d)),
    # other convex f(β d); the logistic f is dpo, the hinge rso, the square ipo's            GPO 2402.05749 tab. 1
    "gpo_exponential": ("pair", lambda x, h: (-h.beta * x.d).exp()),
    "gpo_squared": ("pair", lambda x, h: (h.beta * x.d - 1) ** 2),
    "gpo_truncated": ("pair", lambda x, h: F.relu(1 - h.beta * x.d) ** 2),
    "gpo_savage": ("pair", lambda x, h: torch.sigmoid(-h.beta * x.d) ** 2),
    # match the gap of the scores, not only its sign: nothing diverges; KL(data || policy)   RPO 2406.11704 sec. 3.3
    "rpo_squared": ("pair", lambda x, h: (h.beta * x.d - h.eta * x.gap) ** 2),
    "rpo_backward": ("pair", lambda x, h: bernoulli_kl(h.eta * x.gap, h.beta * x.d)),  # NeMo's name
    "rpo_forward": ("pair", lambda x, h: bernoulli_kl(h.beta * x.d, h.eta * x.gap)),
    # a penalty once the chosen itself becomes less likely                                   DPOP 2402.13228 eq. 3
    "dpop": ("pair", lambda x, h: -logsig(h.beta * (x.d - h.lam * F.relu(-x.a)))),
    # penalise a KL that grows faster on the rejected than on the chosen                     TDPO 2404.11999 eq. 13, 16
    "tdpo1": ("pair", lambda x, h: -logsig(h.beta * (x.d - (x.kl_l - x.kl_w)))),
    "tdpo2": ("pair", lambda x, h: -logsig(h.beta * (x.d - h.alpha * (x.kl_l - x.kl_w.detach())))),
    # only the bad is labelled; the good are the reference's own samples, a their mean       D2O 2403.03419 eq. 6
    "d2o": ("pair", lambda x, h: -logsig(h.beta * x.a - h.alpha * x.b)),
    # log-ratios regress on win rates against the policy: self-play                          SPPO 2405.00675 eq. 4.7
    "sppo": ("pair", lambda x, h: ((x.a - h.eta * (x.p_w - .5)) ** 2 + (x.b - h.eta * (x.p_l - .5)) ** 2) / 2),
    "sppo_hard": ("pair", lambda x, h: (x.a - .5 / h.beta) ** 2 + (x.b + .5 / h.beta) ** 2),  # p 1 and 0, TRL's scale
    # soft labels p; the paper's are σ(win rate of w - win rate of l)                        DNO 2404.03715 alg. 1
    "dno": ("pair", lambda x, h: -x.p * logsig(h.beta * x.d) - (1 - x.p) * logsig(-h.beta * x.d)),
    # the chosen up and the rejected down, each by itself                                    APO-zero 2408.06266
    "apo_zero": ("pair", lambda x, h: torch.sigmoid(-h.beta * x.a) + torch.sigmoid(h.beta * x.b)),
    # thumbs up and down about a reference point z                                           KTO 2402.01306 eq. 8
    "kto": ("single", lambda x, h: torch.cat([h.lam_up * torch.sigmoid(h.beta * (x.z - x.a)),
                                              h.lam_down * torch.sigmoid(h.beta * (x.b - x.z))])),
    # r = V(x) + β log π/π_ref at the optimum: one square trains policy and V                DRO-V 2405.19107 eq. 4
    "dro": ("single", lambda x, h: torch.cat([x.r_w - x.v_w - h.beta * x.a, x.r_l - x.v_l - h.beta * x.b]) ** 2 / 2),
    # forget the bad; unlike gradient ascent it stops when they are gone                     NPO 2404.05868 eq. 3
    "npo": ("bad", lambda x, h: -2 / h.beta * logsig(-h.beta * x.b)),
}
NEEDS = dict(rpo_squared=["gap"], rpo_backward=["gap"], rpo_forward=["gap"], dno=["p"], sppo=["p_w", "p_l"])
NO_MARGIN = ("d2o", "sppo", "sppo_hard", "apo_zero")  # a and b do not meet in a difference


def needs(cfg):
    """What of x comes from the records."""
    return NEEDS.get(cfg.loss, []) + (["gap"] if cfg.margin else [])


def bernoulli_kl(s, t):
    """KL(Bernoulli(σ(s)) || Bernoulli(σ(t))), elementwise."""
    return torch.sigmoid(s) * (logsig(s) - logsig(t)) + torch.sigmoid(-s) * (logsig(-s) - logsig(-t))


def response_logps(logp, mask, skip=None, mean=False):
    """Token log-probs (B, T-1) -> (B,): their sum, or mean, over the masked tokens but for those where skip is."""
    keep = mask if skip is None else mask * ~skip
    total = (logp * keep).sum(1)
    return total / keep.sum(1).clamp(min=1) if mean else total


def sequence_kl(policy, ref, as_ref, tokens, mask, chunk=None):
    """TDPO's D = Σ_t KL(π_ref || π) over the response positions, whole vocabulary: (B, T), (B, T-1) -> (B,). The
    gradient goes through π. The head needs no as_ref: it is the embedding, which no adapter changes."""
    def head(hidden, ref_hidden):
        logp = full(policy.logits(hidden)).log_softmax(-1)                               # (N, V)
        with torch.no_grad():
            ref_logp = full(ref.logits(ref_hidden)).log_softmax(-1)                      # (N, V)
        return ((ref_logp.exp() * (ref_logp - logp)).sum(-1),)                           # (N,)
    where = mask.bool()
    with torch.no_grad(), as_ref():
        ref_hidden = ref(tokens[:, :-1])[where]                                          # (N, C)
    return at_positions(head, where, policy(tokens[:, :-1])[where], ref_hidden,
                        chunk=chunk or max(64, 2 ** 24 // policy.config.vocab_size))[0].sum(1)


# ---------------------------------------------------------------- rows of policy and reference
# An item is what data.make_item makes. Here it gets ref, log π_ref of each of its rows, and for KTO other, a mismatched
# row, with other_ref.

def sample_items(policy, records, reward, cfg, tok, amp):
    """Online: of cfg.k samples to each prompt the best against the worst; none where all are equally good -> items,
    scores (B, k)."""
    with amp():
        roll = generate(policy, [tok.prompt(r["prompt"]) for r in records], tok, cfg.max_new, cfg.k, cfg.temperature)
    scores = reward([r for r in records for _ in range(cfg.k)], roll)[0] - cfg.missing_end * ~roll.finished
    scores, rows, items = scores.view(-1, cfg.k), roll.rows(), []
    for i, (record, group) in enumerate(zip(records, scores)):
        record = {key: value for key, value in record.items() if key not in ("prob", "margin")}  # of a file's answers
        best, worst = int(group.argmax()), int(group.argmin())
        if group[best] > group[worst]:
            beats = (torch.sigmoid(group[:, None] - group).sum(1) - .5) / (cfg.k - 1)    # (k,) win rates
            told = {key: [float(x[best]), float(x[worst])] for key, x in (("scores", group), ("win", beats))}
            item = make_item(record | told, [rows[i * cfg.k + j] for j in (best, worst)], [True, False])
            items += [item] if LOSSES[cfg.loss][0] == "pair" else singles(item)
    if cfg.loss == "kto":
        if len({str(item["record"]["prompt"]) for item in items}) < 2:
            return [], scores  # z needs two prompts
        add_mismatched(items, policy.config.block_size)
    return items, scores


def row_logps(model, rows, cfg, tok, amp):
    """What the preference term takes of each row (R,), log π of all its response tokens (R,), tokens, mask."""
    tokens, mask = collate(rows, tok, model.device)                                      # (R, T), (R, T-1)
    with amp():
        logp = token_logprobs(model, tokens, mask)                                       # (R, T-1)
    skip = tokens[:, 1:] == tok.end if cfg.mask_end else None
    return response_logps(logp, mask, skip, cfg.length_norm), logp.sum(1), tokens, mask


def seen_items(stream, steps, batch):
    """The items that these steps see, each once, in the order of the file."""
    seen = set()
    for step in steps:
        seen.update(id(item) for item in stream.batch(step, batch))
    return [item for item in stream.items if id(item) in seen]


@torch.no_grad()
def add_reference(items, frozen, cfg, tok, amp, soon=None, bar=False):
    """Give the items that lack it log π_ref of their rows, and of the mismatched row; with `soon`, only the
    micro-batches that hold one of those items."""
    items = [item for item in items if "ref" not in item]
    if not items:
        return
    ref, as_ref = frozen
    soon = {id(item) for item in (items if soon is None else soon)}
    with as_ref(), tqdm(total=len(items), desc="reference", disable=not bar, leave=False) as progress:
        for part in item_batches(items, cfg.micro_tokens):
            progress.update(len(part))
            if soon.isdisjoint(id(item) for item in part):
                continue
            logps = row_logps(ref, [row for item in part for row in item["rows"]], cfg, tok, amp)[0]
            for item, s in zip(part, logps.split([len(item["rows"]) for item in part])):
                item["ref"] = s
            if "other" in part[0]:
                for item, s in zip(part, row_logps(ref, [item["other"] for item in part], cfg, tok, amp)[0]):
                    item["other_ref"] = s


@torch.no_grad()
def reference_point(policy, items, cfg, tok, amp):
    """KTO's z = max(0, mean log-ratio of mismatched responses), an estimate of KL(π || π_ref) (2402.01306, sec. 4).

    The estimate is biased: π did not draw those responses. As π learns what answers a prompt, answers to other prompts
    become less likely than under π_ref, the mean falls below 0, and z is 0: the rule, not the exception.
    """
    gaps = [row_logps(policy, [item["other"] for item in part], cfg, tok, amp)[0]
            - torch.stack([item["other_ref"] for item in part]) for part in item_batches(items, cfg.micro_tokens)]
    return torch.cat(gaps).mean().clamp(min=0)


def measure(policy, items, frozen, critic, cfg, tok, amp):
    """x of the losses but for z: what policy, reference, critic and data say of the good and bad rows of items."""
    s, whole, tokens, mask = row_logps(policy, [row for item in items for row in item["rows"]], cfg, tok, amp)
    up = torch.tensor([u for item in items for u in item["up"]], device=s.device)        # (R,)
    given = lambda values: torch.tensor(values, device=s.device, dtype=s.dtype)
    ratio = s - torch.cat([item["ref"] for item in items])                               # (R,)
    x = SimpleNamespace(a=ratio[up], b=ratio[~up], lw=whole[up], ll=whole[~up], n_w=mask.sum(1)[up])
    if cfg.loss == "d2o":
        x.a = torch.stack([part.mean() for part in x.a.split([len(item["rows"]) - 1 for item in items])])
    for key in needs(cfg):
        setattr(x, key, given([item[key] for item in items]))                            # (P,)
    if LOSSES[cfg.loss][0] == "pair":
        x.d = x.a - x.b - (cfg.margin / cfg.beta * x.gap if cfg.margin else 0)
    if cfg.loss.startswith("tdpo"):
        with amp():
            kl = sequence_kl(policy, *frozen, tokens, mask)                              # (R,)
        x.kl_w, x.kl_l = kl[up], kl[~up]
    if critic is not None:
        with amp():  # V is read at the last token of the prompt
            v = token_scores(critic, tokens, mask * mask.cumsum(1).eq(1)).sum(1)         # (R,)
        r = given([r for item in items for r in item["r"]])
        x.v_w, x.v_l, x.r_w, x.r_l = v[up], v[~up], r[up], r[~up]
    return x


def batch_loss(policy, items, frozen, critic, cfg, tok, amp):
    """Loss and metrics of a batch, micro-batch by micro-batch; in training the gradient is added up on the way."""
    unit, loss_of = LOSSES[cfg.loss]
    add_reference(items, frozen, cfg, tok, amp)
    z = reference_point(policy, items, cfg, tok, amp) if cfg.loss == "kto" else None
    n = max(1, sum(not item["up"][0] for item in items)) if unit == "bad" else len(items)
    good = [target for item in items for (_, target), u in zip(item["rows"], item["up"]) if u]
    n_good, n_w = len(good), sum(map(sum, good))  # responses, and their tokens
    loss, xs = 0.0, []
    for part in item_batches(items, cfg.micro_tokens):
        x = measure(policy, part, frozen, critic, cfg, tok, amp)
        x.z = z
        term = loss_of(x, cfg).sum() / n
        if cfg.nll_coef:
            term = term + cfg.nll_coef * (-x.lw.sum() / max(1, n_w) if cfg.nll_per == "token"
                                          else -(x.lw / x.n_w).sum() / max(1, n_good))
        if torch.is_grad_enabled():
            term.backward()
        loss += term.detach()
        xs.append(x)
    a, b, lw, ll = (torch.cat([getattr(x, k).detach() for x in xs]) for k in ("a", "b", "lw", "ll"))
    of = lambda values: float(values.mean()) if len(values) else None
    out = {"loss": loss, "rewards/chosen": of(cfg.beta * a), "rewards/rejected": of(cfg.beta * b),
           "logps/chosen": of(lw), "logps/rejected": of(ll)}
    if len(a) and len(b):
        out["rewards/margin"] = out["rewards/chosen"] - out["rewards/rejected"]
    if unit == "pair":
        out["rewards/accuracy"] = of(0.5 + 0.5 * (a - b).sign())
    if z is not None:
        out["z"] = z
    return out


# ---------------------------------------------------------------- the loop

def train(cfg):
    """Compare policy and reference on good and bad responses, and step on the loss of what comes out."""
    tok = Tokenizer.load(cfg.tokenizer)
    run = Run(cfg, tok)
    if run.finished:
        return run.rows
    device, amp = setup(cfg.device, cfg.dtype, cfg.threads)
    policy = load_model(cfg.init, tok, device, n_scores=0, maker="python sft.py")
    policy.prepare(cfg)
    frozen, block = reference(policy), policy.config.block_size
    fit = fits(tok, block, cfg.max_new)

    # Where rows come from: the policy itself, or a file whose reference log-probs are computed once.
    if cfg.online:
        reward = Reward(cfg.reward, tok, device, amp, cfg.micro_tokens)
        stream, prompts = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=64, prepare=fit,
                                      skip_bad=cfg.skip_bad)
        reward.meet(stream.some(), cfg.data)
        total, held = cfg.steps, []
    else:
        stream, held = open_stream(cfg.data, "preference" if LOSSES[cfg.loss][0] == "pair" else "thumbs", cfg.seed,
                                   n_held=256, context=(tok, block), skip_bad=cfg.skip_bad,
                                   prepare=lambda record: preference_items(
                                       record, tok, block, LOSSES[cfg.loss][0], cfg.pairs, cfg.loss == "d2o"))
        if any(item[key] is None for item in stream.items + held for key in needs(cfg)):
            raise UserError(f"{cfg.data}: --loss {cfg.loss} needs to know how much better a response is, and some "
                            "records have neither scores nor a margin")
        total = cfg.steps or math.ceil(cfg.epochs * len(stream.items) / cfg.batch)
        prompts = list({str(p["prompt"]): p for item in held for p in fit(item["record"])}.values())[:64]
        if cfg.loss == "kto":
            torch.manual_seed(cfg.seed)
            add_mismatched(stream.items + held, block)
        if not cfg.ref_every:
            # The micro-batches are those of the whole run, so that a resumed one has the same bits.
            ever = seen_items(stream, range(total), cfg.batch)
            soon = seen_items(stream, range(begun(run), total), cfg.batch)
            add_reference(ever + held, frozen, cfg, tok, amp, soon + held, bar=True)
            if not policy.adapter and not cfg.loss.startswith("tdpo"):
                frozen = None  # its log-probs are all that is needed: one model less in memory

    shared = dict(weight_decay=cfg.weight_decay, warmup=cfg.warmup, clip=cfg.clip_grad)
    modules, optimizers = dict(model=policy), dict(optimizer=Optimizer(
        policy, cfg.lr, total, cfg.optimizer, cfg.muon_lr, **shared))
    critic = None
    if cfg.merge_base:
        base = load_model(cfg.merge_base, tok, device, n_scores=0, maker="python sft.py --loss_on all --init new")
        optimizers["optimizer"].merge_in(policy, base, cfg.merge, cfg.merge_alpha, cfg.merge_keep)
    if cfg.ref_every:
        modules["ref"] = frozen[0]
    if cfg.loss == "dro":
        critic = modules["critic"] = load_model(cfg.init, tok, device, n_scores=1)
        optimizers["critic_opt"] = Optimizer(critic, cfg.critic_lr, total, **shared)

    for step in steps(run, total, modules, optimizers, {}, cfg.save_every):
        if cfg.ref_every and step and step % cfg.ref_every == 0:
            frozen[0].load_state_dict(policy.state_dict())
            for item in (stream.items or []) + held:
                item.pop("ref", None)
        if cfg.online:
            items, scores = sample_items(policy, stream.batch(step, cfg.batch), reward, cfg, tok, amp)
            metrics = dict(reward=scores.mean(), items=len(items))
        else:
            items, metrics = stream.batch(step, cfg.batch), {}
        if items:
            metrics |= batch_loss(policy, items, frozen, critic, cfg, tok, amp)
            for optimizer in reversed(optimizers.values()):  # the policy's numbers last
                metrics["grad_norm"], metrics["lr"] = optimizer.step(step)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == total:
            with torch.no_grad():
                if held:
                    val = batch_loss(policy, held, frozen, critic, cfg, tok, amp)
                    metrics |= {f"val_{key}": value for key, value in val.items()}
                if prompts:  # the reference comes back for a moment where it has left
                    old = frozen or (load_model(cfg.init, tok, device), contextlib.nullcontext)
                    torch.manual_seed(cfg.seed)
                    with amp():
                        roll = generate(policy, [tok.prompt(r["prompt"]) for r in prompts], tok, cfg.max_new,
                                        temperature=cfg.temperature)
                        kl = log_ratios(roll, policy, old, cfg.micro_tokens, cfg.temperature).sum(1)  # (B,)
                    texts = roll.responses(tok)
                    run.samples(step + 1, prompts, texts)
                    metrics |= dict(kl=kl.mean(), response_length=roll.mask.sum(1).mean(),
                                    gold=mean(truth(prompts, texts, roll.finished)))
        run.log(step, ("loss", "rewards/margin", "gold"), **metrics)
    then = (compare_words(cfg, cfg.data, cfg.families, cfg.reward) if cfg.online else
            compare_words(cfg, "toy" if cfg.tokenizer == "toy" else cfg.data))
    return run.finish(("loss", "rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected", "gold", "kl"),
                      then)


if __name__ == "__main__":
    guard(lambda: train(parse(Config)))
