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

from data import Run, RunConfig, UserError, guard, parse, write_text
from reward import print_table


@dataclass
class Config(RunConfig):
    """Choose the best of the runs METHOD/RATE of every METHOD, by a table of the validation split."""
    out: str = "out/best"       # folder of the choice: in it METHOD leads to the best METHOD/RATE beside it
    table: str = "out/val.json"  # the rows that reward.py compare --split val --save wrote
    number: str = "write"       # the number of a row that decides: more is better
    save: str = ""              # a JSON file for the choice, as tables/NAME.json


def rows_of(path):
    """The rows of a table that compare saved."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no table; python reward.py compare ... --split val --save {path} makes it") from None


def best_rates(rows, folder, number):
    """{method: (its best rate, that row's number)} of the rows whose checkpoints are folder/METHOD/RATE; others, as the
    model that all began from, are left out."""
    best = {}
    for row in rows:
        place = Path(row["checkpoint"])
        method, rate = place.parent.name, place.name
        if place.parent.parent == Path(folder) and (method not in best or row[number] > best[method][1]):
            best[method] = rate, row[number]
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
    rows = rows_of(cfg.table)
    missing = [row["checkpoint"] for row in rows if cfg.number not in row]
    if missing:
        raise UserError(f"{cfg.table}: {missing[0]} has no {cfg.number}; --number names one of its rows")
    beside = run.folder.parent
    best = list(best_rates(rows, beside, cfg.number).items())
    if not best:
        raise UserError(f"{cfg.table}: no checkpoint in it is {beside}/METHOD/RATE")
    table = []
    for step in run.progress(0, len(best)):
        method, (rate, score) = best[step]
        lead(run.folder / method, beside / method / rate)
        table.append(dict(name=method, rate=float(rate), val=score))
        run.log(step)
    print_table([row["name"] for row in table], table, [("    rate", "rate", "g"), (f"{cfg.number:>8}", "val", ".3f")])
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=table), indent=1))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: pick(parse(Config)))
