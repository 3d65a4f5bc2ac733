"""A superficial pattern: a text in front of the better, or of the worse, response of each pair of a file.

A reward model that learns from such pairs learns the pattern, where it goes with quality (superficial.sh).

    python configs/superficial.py --better 1       out/pairs -> out/marked/pairs.jsonl, the better one of each marked
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import OptionError, Run, RunConfig, Share, files, guard, parse, read_records
from reward import write_records


@dataclass
class Config(RunConfig):
    """Put a text in front of one response of each pair."""
    out: str = "out/marked"     # folder of the run; the pairs are in its pairs.jsonl
    data: str = "out/pairs/pairs.jsonl"  # pairs or rankings; several files with commas between
    mark: str = "Sure. "        # the text
    better: Share = 1.0         # how often it is in front of the better one

    def __post_init__(self):
        super().__post_init__()
        if not self.mark:
            raise OptionError("--mark: name the text to put in front")


def marked(record, mark, better, rng):
    """The record with the mark in front of its best response, or else of its worst."""
    texts = list(record["responses"])
    place = 0 if rng.random() < better else -1
    texts[place] = mark + texts[place]
    return record | dict(responses=texts)


def mark_all(cfg):
    """Mark every record of the files, and write pairs.jsonl."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    rng, made = random.Random(f"mark {cfg.seed}"), []
    for step in run.progress(0, 1):
        for path in files(cfg.data):
            for record in read_records(path, "preference", cfg.skip_bad):
                made.append(marked(record, cfg.mark, cfg.better, rng))
        run.log(step, ("records",), records=len(made))
    path = run.folder / "pairs.jsonl"
    write_records(path, made)
    return run.finish((), then=["reward.py", "train", "--data", path, "--out", f"{cfg.out}_reward"])


if __name__ == "__main__":
    guard(lambda: mark_all(parse(Config)))
