"""One table of what several runs logged last: the same metrics of each, side by side.

    python configs/last_rows.py out/dpo out/dpop --metrics val_rewards/chosen,val_rewards/accuracy
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Run, RunConfig, UserError, guard, parse, write_text
from model import read_json
from reward import print_table


@dataclass
class Config(RunConfig):
    """Show the last row of several runs."""
    out: str = "out/last_rows"  # folder of the table
    metrics: str = "val_loss"   # what is shown of a row, with commas between
    save: str = ""              # a JSON file for the table, as tables/NAME.json


def last_row(folder, names):
    """What a finished run logged last of these metrics."""
    path = Path(folder) / "summary.json"
    if not path.exists():
        raise UserError(f"{folder}: no finished run")
    last = read_json(path)
    row = {}
    for name in names:
        if last.get(name) is None:
            raise UserError(f"{folder}: its last row has no {name}, but {', '.join(last)}")
        row[name] = last[name]
    return row


def show(cfg, folders):
    """Print the table, and save it."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    names = cfg.metrics.split(",")
    table = []
    for step in run.progress(0, len(folders)):
        row = dict(checkpoint=folders[step])
        table.append(row | last_row(folders[step], names))
        run.log(step)
    columns = [(f"  {name:>7}", name, ".3f") for name in names]     # as wide as -12.345 at least
    print_table(folders, table, columns)
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=table), indent=1))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: show(*parse(Config, ["run", "run..."])))
