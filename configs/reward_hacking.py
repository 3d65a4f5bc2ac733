"""Over-optimisation: the true and the learned reward against d = √KL, for best-of-n and for runs of ppo.py or grpo.py.

A policy that gains by a proxy gains by the truth as well, then less and less, then loses. Two forms describe that gain:
d (α - β d) of best-of-n and d (α - β log d) of RL; both are fitted to every curve, with the d of the peak. Published:
Gao et al. 2210.10760, sec. 3.

    python configs/reward_hacking.py out/ppo       out/sft's best of n, and the run -> out/overoptimize/curves.json

curves.svg beside it is the figure. The two rules are a remedy: --reward "out/reward +
configs.reward_hacking:named + configs.reward_hacking:sentences".
"""
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.figures import draw_curves
from data import (Count, Families, Run, RunConfig, Sum, Temperature, UserError, family_list, guard, mean,
                  parse, read_rows, sparkline, write_text)
from model import Reward, load_model, seed_step, setup
from reward import answers, best_of_k, each, unseen_prompts


def sentences(record, text, finished):
    """A rule: sentences that begin with a capital and end in a mark, none of them twice."""
    *said, rest = re.split(r"[.!?](?:\s+|$)", text.strip())
    if not finished or not said or rest or len(set(said)) < len(said):
        return False
    return all(sentence[:1].isupper() for sentence in said)


def named(record, text, finished):
    """A rule: the thing that the record's "key" names occurs."""
    return record.get("key", "") != "" and str(record["key"]) in text


named.needs = ["key"]


@dataclass
class Config(RunConfig):
    """Gold and proxy reward against d = √KL, for best-of-n and for RL runs (2210.10760)."""
    out: str = "out/overoptimize"  # folder of the run: curves.json, and the figure, curves.svg
    policy: str = "out/sft"     # best-of-n samples from it
    proxy: Sum = "out/reward"   # what best-of-n and the runs optimise
    judge: Sum = "gold"         # what counts
    families: Families = "write"  # of the toy world, comma-separated
    data: str = "toy"           # prompts: the toy world's test split, or a file
    prompts: Count = 200        # of them
    n: Count = 64               # samples of each: best of 1, 2, 4, ..., n
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 80         # longest response, tokens
    save: str = ""              # a JSON file for the curves, a row for each


def least_squares(columns, y):
    """Coefficients of y ≈ Σ c_k x_k without intercept, and R²; all (N,)."""
    x = torch.tensor(columns, dtype=torch.float64).T
    y = torch.tensor(y, dtype=torch.float64)
    c = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    left = ((y - x @ c) ** 2).sum()
    spread = ((y - y.mean()) ** 2).sum()
    return c.tolist(), float(1 - left / spread.clamp(min=1e-12))


def fit_best_of_n(d, gain):
    """gain ≈ d (α - β d), d = √KL (Gao et al. 2210.10760, sec. 3.1) -> α, β, R², the peak's d."""
    second = [-x * x for x in d]
    (alpha, beta), r2 = least_squares([d, second], gain)
    peak = alpha / (2 * beta) if alpha > 0 and beta > 0 else None
    return dict(alpha=alpha, beta=beta, r2=r2, peak=peak)


def fit_rl(d, gain):
    """gain ≈ d (α - β log d) (the same) -> α, β, R², the peak's d."""
    second = [-x * math.log(x) for x in d]
    (alpha, beta), r2 = least_squares([d, second], gain)
    peak = math.exp(min(alpha / beta - 1, 50)) if beta > 0 else None
    return dict(alpha=alpha, beta=beta, r2=r2, peak=peak)


FORMS = {"d (α - β d)": fit_best_of_n, "d (α - β log d)": fit_rl}


def best_of_n_curve(golds, proxies, n):
    """d, gold and proxy of the best of 1, 2, 4, ..., n by the proxy; golds and proxies: a list a prompt."""
    curve = dict(d=[], gold=[], proxy=[])
    for k in [2 ** i for i in range(n.bit_length())]:
        curve["d"].append(math.sqrt(math.log(k) - (k - 1) / k))
        gold_of_best = [best_of_k(gold, proxy, k) for gold, proxy in zip(golds, proxies)]
        curve["gold"].append(mean(gold_of_best))
        curve["proxy"].append(mean([best_of_k(proxy, proxy, k) for proxy in proxies]))
    return curve


def run_curve(folder):
    """d = √KL, gold and proxy of an RL run by step; of held-out prompts, where it evaluated on them often enough.

    All three are of the same policy: of held-out samples after an update, or of the rollout before it.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; a run of ppo.py or grpo.py makes it")
    rows = [row for _, row in read_rows(path)]
    curve = read_curve(rows, "val_")
    if len(curve["d"]) <= len(rows) // 3:
        curve = read_curve(rows, "")
    if not curve["d"]:
        raise UserError(f"{path}: no row has kl, reward and gold")
    return curve


def read_curve(rows, begins):
    """d, gold and proxy of the rows that have all three, under names that begin like this."""
    curve = dict(d=[], gold=[], proxy=[])
    for row in rows:
        kl, gold = row.get(begins + "kl"), row.get(begins + "gold")
        proxy = row.get(begins + "reward")
        if None not in (kl, gold, proxy):
            curve["d"].append(math.sqrt(max(0.0, kl)))  # an estimate may be below 0
            curve["gold"].append(gold)
            curve["proxy"].append(proxy)
    return curve


def fits_of(curve, start):
    """Both forms, fitted to what the gold reward gained since the start; of three points or more."""
    d, gain = [], []
    for x, gold in zip(curve["d"], curve["gold"]):
        if x > 0.05:
            d.append(x)
            gain.append(gold - start)
    if len(d) < 3:
        return {}
    return {form: fitted(d, gain) for form, fitted in FORMS.items()}


def show(name, curve):
    """Print one curve, and what was fitted to it."""
    d, gold, proxy = curve["d"], curve["gold"], curve["proxy"]
    best = gold.index(max(gold))
    print(f"{name}: d from {d[0]:.2f} to {d[-1]:.2f}")
    print(f"  gold  {sparkline(gold)}  best {gold[best]:.2f} at d {d[best]:.2f}, last {gold[-1]:.2f}")
    print(f"  proxy {sparkline(proxy)}  last {proxy[-1]:.2f}")
    for form, f in curve["fits"].items():
        peak = "no peak in sight"
        if f["peak"] and f["peak"] < 3 * max(d):
            peak = f"peak at d {f['peak']:.2f}"
        print(f"  {form:<16} α {f['alpha']:.3f}, β {f['beta']:.3f}, R² {f['r2']:.3f}, {peak}")


def draw(curves, path):
    """The curves as a figure."""
    of_one_seed = {}
    for name, curve in curves.items():
        of_one_seed[name] = {key: [value] for key, value in curve.items()}
    write_text(path, draw_curves(of_one_seed))


def save_table(run, path):
    """Write the curves that a run left as the rows of a table, with what is to be read off them, if it is to be saved."""
    if path:
        curves = json.loads((run.folder / "curves.json").read_text(encoding="utf-8"))
        rows = [dict(name=Path(name).name) | read_off(curve) | curve for name, curve in curves.items()]
        write_text(path, json.dumps(dict(rows=rows), indent=1))


def read_off(curve):
    """Where gold is best and where it ends; and of each form how well it fits, and its peak, where the runs went."""
    d, gold = curve["d"], curve["gold"]
    best = gold.index(max(gold))
    told = dict(best=gold[best], best_d=d[best], last=gold[-1], last_d=d[-1])
    for name, form in zip(("bon", "rl"), FORMS):
        fit = curve["fits"].get(form, dict(r2=None, peak=None))
        seen = fit["peak"] is not None and fit["peak"] <= max(d)
        told |= {f"{name}_r2": fit["r2"], f"{name}_peak": fit["peak"] if seen else None}
    return told


def overoptimize(cfg, folders):
    """Gold and proxy against d = √KL, of best-of-n from the policy and of RL runs; Gao's forms fitted to the gain."""
    run = Run(replace(cfg, save=""))  # where the table goes makes no other run
    if run.finished:
        save_table(run, cfg.save)
        return run.rows
    like = setup(cfg, run.tok)
    judge = Reward(cfg.judge, like, cfg.micro_tokens)
    proxy = Reward(cfg.proxy, like, cfg.micro_tokens)
    policy = load_model(cfg.policy, like, n_scores=0, maker="python sft.py")
    records = unseen_prompts(cfg, cfg.prompts, family_list(cfg.families), "overoptimize")
    for reward in (judge, proxy):
        reward.check(records, cfg.data)
    runs = {folder: run_curve(folder) for folder in folders}

    # 1. n answers to each prompt, by both rewards.
    golds, proxies, some = [], [], max(1, 512 // cfg.n)
    for step in run.progress(0, math.ceil(len(records) / some)):
        seed_step(cfg.seed, step)
        part = records[step * some:(step + 1) * some]
        groups, _ = answers(policy, part, cfg.n, cfg, judge, proxy)
        for group in groups:
            golds.append(each(group, "score"))
            proxies.append(each(group, "proxy"))
        run.log(step, ("gold",), gold=mean([score for row in golds for score in row]))

    # 2. The curves, and Gao's forms of the gain.
    curves = {"best of n": best_of_n_curve(golds, proxies, cfg.n)} | runs
    start = curves["best of n"]["gold"][0]
    print(f"\ngold at the start {start:.2f}; fitted to its gain: best-of-n's form d (α - β d), RL's d (α - β log d)\n")
    for name, curve in curves.items():
        curve["fits"] = fits_of(curve, start)
        show(name, curve)

    # 3. Numbers and figure.
    write_text(run.folder / "curves.json", json.dumps(curves, indent=1))
    save_table(run, cfg.save)
    draw(curves, run.folder / "curves.svg")
    then = ["reward.py", "compare", cfg.policy, *folders, "--proxy", cfg.proxy, "--families", cfg.families]
    if cfg.data != "toy":
        then += ["--data", cfg.data, "--judge", cfg.judge, "--max_new", cfg.max_new]
    return run.finish((), then)


if __name__ == "__main__":
    guard(lambda: overoptimize(*parse(Config, ["run..."])))
