"""The data that some losses are for, and a preference function: what losses.sh needs and no other recipe.

    python configs/losses.py --data out/pairs/pairs.jsonl --unsafe_data out/losses/unsafe/pairs.jsonl

digits.jsonl: pairs of answers to a sum that differ in one digit, as DPOP's authors have them (2402.13228).
thumbs.jsonl: of each pair one answer alone, the preferred one with a thumb up or the other with a thumb down, in turn.
bad.jsonl: of several answers to a prompt one that people call bad; the others are there as they came, and nobody says
what they are worth. It is the last one of a ranking, as `--loss d2o` and `npo` read it.
"""
import math
import random
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Count, Run, RunConfig, UserError, gold, guard, parse, read_records, read_rows, toy_task
from reward import write_records


@dataclass
class Config(RunConfig):
    """Write data for losses that are for special data."""
    out: str = "out/losses/special"  # folder of the run: digits.jsonl, thumbs.jsonl, bad.jsonl
    data: str = "out/pairs/pairs.jsonl"  # pairs, for the thumbs
    unsafe_data: str = "out/losses/unsafe/pairs.jsonl"  # single answers with scores; 0 and less is bad
    n: Count = 2000             # pairs that differ in one digit


SCALE = 3   # as --scale of reward.py label: how sure people are of a difference


def people(record, a, b):
    """A preference function for `grpo.py --prefer`: how often people prefer a to b, Bradley-Terry on the truth. It
    stands for a person, or a judge, who is asked during the training; no reward model is learned."""
    ahead = gold(record, a) - gold(record, b)
    return 1 / (1 + math.exp(-SCALE * ahead))


def one_digit(rng):
    """A sum with its answer, and the same with another last digit."""
    task = toy_task("train", "arith", rng)
    right = str(task["answer"])
    others = [digit for digit in "0123456789" if digit != right[-1]]
    wrong = right[:-1] + rng.choice(others)
    turn = dict(role="user", content=task["prompt"])
    answers = [f"The answer is {right}.", f"The answer is {wrong}."]
    return dict(prompt=[turn], responses=answers, key=task["key"])


def thumbs(pairs):
    """Of each pair one answer: of the first the preferred one, of the second the other, and so on."""
    out = []
    for i, record in enumerate(pairs):
        preferred, *_, other = record["responses"]
        up = i % 2 == 0
        answer = preferred if up else other
        out.append(dict(prompt=record["prompt"], response=answer, label=up, key=record["key"]))
    return out


def only_bad(answers):
    """Of single answers, those to one prompt one after another: a record for each prompt that has a bad one, of a
    score of 0 or less, which comes last, behind all others."""
    out = []
    for prompt, group in groupby(answers, key=lambda answer: answer["prompt"]):
        bad, others = None, []
        for answer in group:
            if bad is None and answer["scores"][0] <= 0:
                bad = answer
            else:
                others.append(answer["response"])
        if bad and others:
            responses = [*others, bad["response"]]
            out.append(dict(prompt=prompt, responses=responses, key=bad["key"]))
    return out


def write(cfg):
    """Write the three files."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    rng = random.Random(f"one digit {cfg.seed}")
    digits = [one_digit(rng) for _ in range(cfg.n)]
    pairs = read_records(cfg.data, "preference", cfg.skip_bad)
    answers = [row for _, row in read_rows(cfg.unsafe_data)]
    bad = only_bad(answers)
    if not bad:
        raise UserError(f"{cfg.unsafe_data}: no prompt has both a bad answer (a score of 0 or less) and another one")
    records = dict(digits=digits, thumbs=thumbs(pairs), bad=bad)
    for step in run.progress(0, 1):
        for name, some in records.items():
            write_records(run.folder / f"{name}.jsonl", some)
        run.log(step, records=sum(map(len, records.values())))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: write(parse(Config)))
