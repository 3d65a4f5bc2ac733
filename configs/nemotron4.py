"""Ratings of every response by several attributes, for a reward model with a score for each.

HelpSteer2's attributes are people's ratings of helpfulness, correctness, coherence, complexity and verbosity (Wang et
al. 2406.08673); Nemotron-4's reward model predicts all five. Here verifiers and reward models rate, the first the truth.

    python configs/nemotron4.py gold words "-1*no_filler"    out/pairs -> out/ratings/ratings.jsonl
    python reward.py train --loss ratings --heads 3 --data out/ratings/ratings.jsonl
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Count, Run, RunConfig, guard, open_stream, parse
from model import Reward, setup
from reward import EARLIER, counts, given_responses, repeat, totals, write_records


@dataclass
class Config(RunConfig):
    """Rate every response of a file by several attributes."""
    out: str = "out/ratings"    # folder of the run; the ratings are in its ratings.jsonl
    data: str = "out/pairs/pairs.jsonl"  # prompts with responses
    batch: Count = 128          # prompts at a time


def rated(records, attributes, like):
    """A record for each response, with what every attribute's reward says of it."""
    made, ratings = [], []
    repeated = repeat(records, counts(records, "responses"))
    for reward in attributes:
        ratings.append(totals(reward, repeated, given_responses(records, reward, like)))
    texts = [text for record in records for text in record["responses"]]
    for record, text, *rating in zip(repeated, texts, *ratings):
        own = {key: value for key, value in record.items() if key not in EARLIER}
        made.append(own | dict(response=text, ratings=rating))
    return made


def rate(cfg, specs):
    """Rate the responses of all files, and write ratings.jsonl."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    like = setup(cfg, run.tok)
    attributes = [Reward(spec, like, cfg.micro_tokens) for spec in specs]
    stream, _ = open_stream(cfg.data, "preference", cfg.seed, n_held=0, skip_bad=cfg.skip_bad)
    for reward in attributes:
        reward.check(stream.items, cfg.data)
    n, made = len(stream.items), []
    for step in run.progress(0, math.ceil(n / cfg.batch)):
        records = stream.batch(step, cfg.batch)[:n - step * cfg.batch]
        made += rated(records, attributes, like)
        run.log(step, ("responses",), responses=len(made))
    path = run.folder / "ratings.jsonl"
    write_records(path, made)
    return run.finish((), then=["reward.py", "train", "--loss", "ratings", "--heads", len(specs), "--data", path,
                                "--out", f"{cfg.out}_reward"])


if __name__ == "__main__":
    guard(lambda: rate(*parse(Config, ["reward", "reward..."])))
