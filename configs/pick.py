"""The best rate of each method, chosen on the validation split; only these are then reported, on the test split.

    python reward.py compare out/sft out/x/dpo/1e-4 out/x/dpo/3e-4 --split val --save out/x/val.json
    python configs/pick.py --table out/x/val.json --out out/x/best

Checkpoints are called METHOD/RATE, in the folder that holds --out. out/x/best/dpo then leads to the best of
out/x/dpo/*, and recipes go on with it, whichever rate it is. Of equal ones the first in the table is taken.
"""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.record import name_of, table_rows
from data import Run, RunConfig, UserError, guard, parse, write_text
from reward import print_table


@dataclass
class Config(RunConfig):
    """Choose the best of the runs METHOD/RATE of every METHOD, by a table of the validation split."""
    out: str = "out/best"       # folder of the choice: in it METHOD leads to the best METHOD/RATE beside it
    table: str = "out/val.json"  # the rows that reward.py compare --split val --save wrote
    number: str = "write"       # the number of a row that decides: more is better
    save: str = ""              # a JSON file for the choice, as tables/NAME.json


def best_rates(rows, folder, number):
    """{method: its row with the highest number} of the rows whose checkpoints are folder/METHOD/RATE; others, as the
    model that all began from, are left out."""
    best = {}
    for row in rows:
        method = Path(name_of(row)).parent
        if method.parent != Path(folder):
            continue
        known = best.get(method.name)
        if known is None or row[number] > known[number]:
            best[method.name] = row
    return best


def lead(link, folder):
    """Make a link that leads to a folder; relative, so that both can be moved together."""
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def pick(cfg):
    """Choose, and make the links."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    rows = table_rows(cfg.table)
    for row in rows:
        if row.get(cfg.number) is None:
            raise UserError(f"{cfg.table}: {name_of(row)} has no {cfg.number}; --number names one of its rows")
    beside = run.folder.parent
    best = best_rates(rows, beside, cfg.number)
    if not best:
        raise UserError(f"{cfg.table}: no checkpoint in it is {beside}/METHOD/RATE")
    methods = list(best)
    table = []
    for step in run.progress(0, len(methods)):
        method = methods[step]
        row = best[method]
        folder = Path(name_of(row))
        try:
            rate = float(folder.name)
        except ValueError:
            raise UserError(f"{cfg.table}: {folder} is not called METHOD/RATE") from None
        lead(run.folder / method, folder)
        table.append(dict(name=method, rate=rate, val=row[cfg.number]))
        run.log(step)
    print_table(methods, table, [("    rate", "rate", "g"), (f"{cfg.number:>8}", "val", ".3f")])
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=table), indent=1))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: pick(parse(Config)))
