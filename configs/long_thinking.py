"""Demonstrations of long chains of thought: sums that are said over before they are worked out (Kimi k1.5, 2501.12599).

    python configs/long_thinking.py               -> out/long_thinking/demos.jsonl

"<think>17 - 8 + 9, 17 - 8 + 9, 17 - 8 = 9, 9 + 9 = 18</think>The answer is 18."
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.judging import write_alone
from data import Arith, Count, Natural, RunConfig, guard, parse, toy_task


@dataclass
class Config(RunConfig):
    """Write demonstrations of sums with long chains of thought."""
    out: str = "out/long_thinking"  # folder of the run; the demonstrations are in its demos.jsonl
    n: Count = 12_800           # demonstrations
    restate: Natural = 5        # times, at most, that a sum is said over


def demonstrate(rng, restate):
    """A sum, and its answer after saying it over 0 to `restate` times."""
    task = toy_task("train", "arith", rng)
    times = rng.randint(0, restate)
    thought = ", ".join([task["key"]] * times + [Arith.text(task, rng).removesuffix(".")])
    return task["prompt"], f"<think>{thought}</think>The answer is {task['answer']}."


def write(cfg):
    """Write demos.jsonl."""
    return write_alone(cfg, lambda rng: demonstrate(rng, cfg.restate))


if __name__ == "__main__":
    guard(lambda: write(parse(Config)))
