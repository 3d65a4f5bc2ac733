"""Pairs in which length tells nothing: as many whose better response is longer as are shorter, by any difference.

People and reward models like long answers, so a reward model learns length first. Here the pairs are put in buckets by
how much longer one response is than the other; of each bucket as many are kept with the better one longer as with the
better one shorter. Published: ChatGLM-RLHF, Hou et al. 2404.00934, sec. 3.1.

    python configs/chatglm_rlhf.py                out/pairs -> out/balanced/pairs.jsonl
"""
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Count, Run, RunConfig, UserError, files, guard, parse, read_records
from reward import write_records


@dataclass
class Config(RunConfig):
    """Keep of a file as many pairs whose better response is longer as are shorter, by any difference."""
    out: str = "out/balanced"   # folder of the run; the pairs are in its pairs.jsonl
    data: str = "out/pairs/pairs.jsonl"  # pairs or rankings; several files with commas between
    width: Count = 3            # of a bucket, words


def length_side(record, width):
    """By how many words the lengths of best and worst response differ, in buckets of `width` words; 1 where the best is
    longer, -1 where it is shorter, 0 where neither is."""
    best, *_, worst = record["responses"]
    more = len(best.split()) - len(worst.split())
    side = (more > 0) - (more < 0)
    return -(-abs(more) // width), side


def length_balanced(records, width):
    """Of each bucket as many records whose best response is the longer one as others; the first ones of the file."""
    count = Counter(length_side(record, width) for record in records)
    taken, out = Counter(), []
    for record in records:
        size, side = length_side(record, width)
        taken[size, side] += 1
        others = count[size, -side]
        if side == 0 or taken[size, side] <= others:
            out.append(record)
    return out


def balance(cfg):
    """Balance the records of all files by length, and write pairs.jsonl."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    records = []
    for path in files(cfg.data):
        records += read_records(path, "preference", cfg.skip_bad)
    made = length_balanced(records, cfg.width)
    if not made:
        raise UserError(f"{cfg.data}: of {len(records)} pairs none is left; in all of them the better one is longer, "
                        "or in all of them shorter")
    for step in run.progress(0, 1):
        run.log(step, ("records",), records=len(made))
    path = run.folder / "pairs.jsonl"
    write_records(path, made)
    print(f"{path}: {len(made)} of {len(records)} pairs")
    return run.finish((), then=["reward.py", "train", "--data", path, "--out", f"{cfg.out}_reward"])


if __name__ == "__main__":
    guard(lambda: balance(parse(Config)))
