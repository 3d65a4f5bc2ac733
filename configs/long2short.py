"""Long to short: of several right answers to a prompt the shortest, for SFT; and over longer ones, for DPO.

A model that learned to think at length is asked k times. The shortest answer that is right is a demonstration; it is
also the better one of a pair with every longer answer that is wrong, or is right and at least 1.5 times as long.
Published: Kimi k1.5, 2501.12599, sec. 2.4.

    python configs/long2short.py       sums, answered by out/grpo -> out/short/shortest.jsonl, out/short/pairs.jsonl
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Count, Families, Run, RunConfig, Sum, Temperature, UserError, fits, guard, open_stream, parse
from model import Reward, load_model, seed_step, setup
from reward import answers, labelled, usable, write_records


@dataclass
class Config(RunConfig):
    """The shortest right answer to each prompt, by itself and over longer ones (Kimi k1.5, 2501.12599, sec. 2.4)."""
    out: str = "out/short"      # folder of the run: shortest.jsonl, pairs.jsonl
    policy: str = "out/grpo"    # checkpoint that answers
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "arith"  # of the toy world, comma-separated
    n: Count = 2000             # prompts
    by: Sum = "exact"           # what judges; more than .5 is right
    k: Count = 8                # answers to each
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 160        # longest answer, tokens; unfinished ones are not used
    batch: Count = 128          # prompts at a time


def shortest_of(group):
    """The shortest right answer, in a list; none if none is right."""
    right = [answer for answer in group if answer.score > 0.5]
    return sorted(right, key=lambda answer: answer.tokens)[:1]


def longer_than(short, group):
    """The answers that are longer and wrong, or at least 1.5 times as long."""
    longer = []
    for other in group:
        wrong = other.score <= 0.5 and other.tokens > short.tokens
        if wrong or other.tokens >= 1.5 * short.tokens:
            longer.append(other)
    return longer


def shorten(cfg):
    """Sample answers, and write the shortest right ones and their pairs."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    policy = load_model(cfg.policy, like, n_scores=0, maker="python grpo.py")
    judge = Reward(cfg.by, like, cfg.micro_tokens)
    stream, _ = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=0, skip_bad=cfg.skip_bad,
                            prepare=fits(policy.tok, policy.config.block_size, cfg.max_new))
    judge.check(stream.some(), cfg.data)
    n = min(cfg.n, len(stream.items)) if stream.items else cfg.n  # a file's prompts once each
    demos, pairs = [], []

    for step in run.progress(0, math.ceil(n / cfg.batch)):
        seed_step(cfg.seed, step)
        records = stream.batch(step, cfg.batch)[:n - step * cfg.batch]
        groups, _ = answers(policy, records, cfg.k, cfg, judge)
        for record, group in zip(records, groups):
            group = usable(group)
            for short in shortest_of(group):
                demos.append(labelled(record, dict(response=short.text, scores=[short.score]), "ai"))
                for other in longer_than(short, group):
                    keys = dict(responses=[short.text, other.text], scores=[short.score, other.score])
                    pairs.append(labelled(record, keys, "ai"))
        run.log(step, ("demos", "pairs"), demos=len(demos), pairs=len(pairs))

    if not demos:
        raise UserError(f"{cfg.policy}: to none of {n} prompts is an answer right")
    write_records(run.folder / "shortest.jsonl", demos)
    write_records(run.folder / "pairs.jsonl", pairs)
    return run.finish(("demos", "pairs"), then=["sft.py", "--init", cfg.policy, "--data", run.folder / "shortest.jsonl",
                                                "--out", f"{cfg.out}_sft"])


if __name__ == "__main__":
    guard(lambda: shorten(parse(Config)))
