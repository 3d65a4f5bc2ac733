"""Prompts for RL, as Kimi k1.5 chooses them: how hard is each, and can its answer be guessed?

The policy answers every prompt k times; difficulty is 1 minus the share that is right, and grpo.py's --curriculum goes
by it. A prompt is left out if it has an answer of choice, or if one of a few answers without thinking is right: what
can be guessed teaches no thinking. Published: Kimi k1.5, 2501.12599, sec. 2.1.

    python configs/kimi_k15.py         sums, answered by out/sft -> out/prompts/prompts.jsonl
"""
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import (Count, Families, Natural, Run, RunConfig, Sum, Temperature, UserError, fits, guard, mean,
                  open_stream, parse)
from model import Reward, load_model, seed_step, setup
from reward import answers, write_records


@dataclass
class Config(RunConfig):
    """Choose prompts for RL: how hard is each, and can it be guessed? (Kimi k1.5, 2501.12599, sec. 2.1)"""
    out: str = "out/prompts"    # folder of the run; the records are in its prompts.jsonl
    policy: str = "out/sft"     # checkpoint that answers
    data: str = "toy"           # prompts: toy, or a file
    families: Families = "arith"  # of the toy world, comma-separated
    n: Count = 1000             # prompts
    by: Sum = "exact"           # what judges; more than .5 is right
    k: Count = 10               # answers to each; difficulty = 1 - the share that is right
    guesses: Natural = 8        # answers without thinking: one that is right, and the prompt is left out; 0: none
    begin: str = "The answer"    # how an answer without thinking begins
    cap: Natural = 0            # most prompts of one family (or "domain"); 0: no limit
    temperature: Temperature = 1.0  # of sampling
    max_new: Count = 80         # longest answer, tokens
    batch: Count = 64           # prompts at a time


OPTIONS = re.compile(r"(?m)^[ \t]*\(?A[.):]\s.*\n(?:[ \t]*\n)?[ \t]*\(?B[.):]\s")  # a line "A. ...", then one "B. ..."


def of_choice(record):
    """Whether a prompt is true-or-false, yes-or-no or multiple choice: right by luck too often to learn from."""
    answer = str(record.get("answer", "")).strip().strip("().").lower()
    if answer in ("true", "false", "yes", "no"):
        return True
    return OPTIONS.search(record["prompt"][-1]["content"]) is not None


def share_right(policy, judge, records, k, cfg, begin=()):
    """The share of k answers to each prompt that are right."""
    groups, _ = answers(policy, records, k, cfg, judge, begin=begin)
    return [mean([float(answer.score > 0.5) for answer in group]) for group in groups]


def domain(record):
    """The family or domain of a prompt, of which there may be a cap."""
    return str(record.get("family", record.get("domain")))


def why_not(record, guessed, taken, cfg):
    """Why a prompt is left out; nothing if it is kept. taken: how many of each domain are kept already."""
    if guessed:
        return "guessed"
    if of_choice(record):
        return "a choice"
    if cfg.cap and taken[domain(record)] >= cfg.cap:
        return f"above the cap of {domain(record)}"
    return ""


def curate(cfg):
    """Rate prompts by how often the policy gets them right, leave out what it guesses, and write prompts.jsonl."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like, begin = setup(cfg, run.tok), run.tok.encode(cfg.begin)
    policy = load_model(cfg.policy, like, n_scores=0, maker="python sft.py")
    judge = Reward(cfg.by, like, cfg.micro_tokens)
    stream, _ = open_stream(cfg.data, "prompt", cfg.seed, cfg.families, n_held=0, skip_bad=cfg.skip_bad,
                            prepare=fits(policy.tok, policy.config.block_size, cfg.max_new + len(begin)))
    judge.check(stream.some(), cfg.data)
    n = min(cfg.n, len(stream.items)) if stream.items else cfg.n  # a file's prompts once each
    made, lost, taken = [], Counter(), Counter()

    for step in run.progress(0, math.ceil(n / cfg.batch)):
        seed_step(cfg.seed, step)
        records = stream.batch(step, cfg.batch)[:n - step * cfg.batch]

        # 1. How often is each right, and how often without thinking?
        right = share_right(policy, judge, records, cfg.k, cfg)
        lucky = [0.0] * len(records)
        if cfg.guesses:
            lucky = share_right(policy, judge, records, cfg.guesses, cfg, begin)

        # 2. Keep those that have to be thought about, with their difficulty.
        for record, rate, luck in zip(records, right, lucky):
            why = why_not(record, luck, taken, cfg)
            if why:
                lost[why] += 1
            else:
                taken[domain(record)] += 1
                made.append(record | dict(difficulty=round(1 - rate, 4)))
        difficulty = mean([record["difficulty"] for record in made])
        run.log(step, ("kept",), kept=len(made), difficulty=difficulty)

    if not made:
        raise UserError(f"{cfg.policy}: of {n} prompts none is left: {dict(lost)}")
    path = run.folder / "prompts.jsonl"
    write_records(path, made)
    without = ", ".join(f"{count} {why}" for why, count in lost.items()) or "none"
    print(f"{path}: {len(made)} of {n} prompts; left out: {without}")
    return run.finish(("kept", "difficulty"), then=[
        "grpo.py", "--data", path, "--init", cfg.policy, "--reward", cfg.by, "--max_new", cfg.max_new,
        "--pool", len(made), "--prioritized", "--out", f"{cfg.out}_grpo"])


if __name__ == "__main__":
    guard(lambda: curate(parse(Config)))
