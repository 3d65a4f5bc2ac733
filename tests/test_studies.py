"""The studies: what configs/when.py computes, against costs.py, PyTorch's counter and by hand; what configs/losses.py
writes; what pick.py, last_rows.py and changes.py choose and show. That the recipes run is in test_recipes.py."""
import importlib
import json
import math
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from torch.utils.flop_counter import FlopCounterMode

import costs
import data
import dpo
import grpo
import model as M
import ppo
import reward
from configs.record import table_rows
from data import OptionError, UserError
from policies import TOK, random_policy, save
from runs import write

WHEN, PICK, LAST, LOSSES, CHANGES = (
    importlib.import_module(name) for name in ("when", "pick", "last_rows", "losses", "changes"))
CPU = dict(device="cpu", dtype="fp32", threads=1)


# ---------------------------------------------------------------- FLOPs

@pytest.mark.parametrize("size", costs.SIZES)
def test_forward_flops_are_those_of_costs(size):
    """Which test_cost.py holds against PyTorch's counter."""
    shape, p, n = costs.SIZES[size], 17.5, 24.5
    for head, read in ((n, n), (0, n), (0, 1)):
        want = costs.forward_flops(M.GPTConfig(**shape), p + n, (p + n) / 2, head, read)
        assert WHEN.forward_flops(shape, p, n, head, read) == pytest.approx(want, rel=1e-12)


def said(prompt, at_least):
    """An answer with which the whole row is a multiple of 16 tokens, so that nothing is padded."""
    text = "a"
    while len(text) < at_least or (len(prompt) + len(TOK.response(text))) % 16:
        text += " a"
    return text


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A language model that never ends its answers, a reward model, pairs, and how long prompt and answers are."""
    folder = tmp_path_factory.mktemp("flops")
    shape = dict(n_layer=2, n_head=4, n_embd=128, block_size=128)
    save(folder / "lm", random_policy(end=0.0, **shape))
    save(folder / "rm", random_policy(1, n_scores=1, **shape))
    asked = [dict(role="user", content="? " * 8)]
    prompt = TOK.prompt(asked)
    records = []
    for i in range(40):
        turns = [dict(role="user", content="? " * 8)]
        one = said(prompt, 40)
        records.append(dict(prompt=turns, responses=[one, "b" + one[1:]], key=str(i)))
    n = len(TOK.response(records[0]["responses"][0]))
    assert (len(prompt) + n) % 16 == 0
    return SimpleNamespace(out=folder, lm=str(folder / "lm"), rm=str(folder / "rm"), n=n, p=len(prompt),
                           pairs=write(folder / "pairs.jsonl", records), records=records)


KINDS = {
    "dpo": (dpo, dict(batch=8, ref_every=100)),     # the reference with every batch, not beforehand
    "online": (dpo, dict(batch=4, k=3, online=True)),
    "ppo": (ppo, dict(prompts=6, eval_prompts=2, epochs=3)),
    "grpo": (grpo, dict(prompts=2, group=4)),
    "grpo, KL": (grpo, dict(prompts=2, group=4, kl_coef=.1, epochs=2))}


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_step_are_what_pytorch_counts(kind, start, monkeypatch):
    """Of the second step of the real training, by the row that it logs. Attention is left out on both sides: on a CPU
    its kernel is not counted."""
    script, options = KINDS[kind]
    known = dict(init=start.lm, data=start.pairs, reward=start.rm, max_new=start.n, steps=3, eval_every=10, **CPU)
    cfg = script.Config(out=str(start.out / kind), **known | options)
    counts, rows, real = [], [], data.Run.log

    def log(self, step, show=(), **metrics):
        counts.append(counter.get_total_flops())
        rows.append(metrics)
        real(self, step, show, **metrics)
    monkeypatch.setattr(data.Run, "log", log)
    monkeypatch.setattr(WHEN, "attention_flops", lambda shape, T: 0)
    with FlopCounterMode(display=False) as counter:
        script.train(cfg)
    shape = json.loads((start.out / "lm/config.json").read_text())
    pairs = WHEN.mean_lengths(start.records, TOK)
    assert (pairs.p, pairs.n, pairs.answers) == (start.p, start.n, 80)
    row = {name: float(value) for name, value in rows[1].items() if value is not None}
    told = WHEN.step_cost(asdict(cfg))(asdict(cfg), row, shape, pairs)
    assert told == pytest.approx(counts[1] - counts[0], rel=.005)


def test_flops_of_a_run_are_the_sum_over_its_steps(tmp_path):
    shape, pairs = costs.SIZES["tiny"], SimpleNamespace(p=10, n=20)
    (tmp_path / "run.json").write_text(json.dumps(dict(loss="dpo", online=True, batch=4, k=3)))
    write(tmp_path / "metrics.jsonl", [dict(step=i, items=items) for i, items in enumerate((4, 1, 0))])
    one = WHEN.passes(shape, 10, 20)
    sampled = WHEN.sample_flops(shape, 10, 20, 3) + 3 * one.score
    want = 3 * 4 * sampled + (4 + 1 + 0) * 2 * 4 * one.logps
    assert WHEN.run_flops(tmp_path, shape, pairs) == pytest.approx(want, rel=1e-12)


# ---------------------------------------------------------------- curves

@pytest.mark.parametrize("xs, x, y", [
    ([0, 1, 3], 0, 0), ([0, 1, 3], .5, 5), ([0, 1, 3], 2, 15), ([0, 1, 3], 3, 20), ([0, 1, 3], 3.1, None),
    ([0, 2, 1], 1, 5),              # it falls back to 1, where y is 20: the first crossing counts
    ([0, 0, 2], 1, 15), ([0, 0, 0], 0, 0), ([0], 0, None)])
def test_read_off_by_hand(xs, x, y):
    got = WHEN.read_off(xs, [0, 10, 20][:len(xs)], x)
    assert got == (None if y is None else pytest.approx(y))


def test_rewards_are_read_off_on_a_line_in_root_kl_and_in_flops():
    """A KL of 1 is half-way to a KL of 4; an estimate below 0 counts as 0."""
    kl, flops = [0.0, -.01, 4.0], [0, 1e12, 3e12]
    curve = dict(kl=kl, gold=[0.0, 0.0, 2.0], proxy=[0.0, 0.0, 6.0], greedy=[1.0, 1.0, 3.0], flops=flops,
                 val_kl=kl, val_gold=[0.0, 0.0, 2.0])
    got = WHEN.told({"1e-4": curve}, [1, 9], [2])
    assert got == {"gold@kl1": 1.0, "proxy@kl1": 3.0, "greedy@kl1": 2.0, "rate@kl1": 1e-4,
                   "gold@2T": 1.0, "proxy@2T": 3.0, "greedy@2T": 2.0, "rate@2T": 1e-4}


def test_validation_chooses_the_rate_at_each_place_and_the_test_split_is_told():
    """Validation prefers the second rate at a KL of 1, and the first at equal compute, whatever the test split says. The
    first never comes to a KL of 4; the second comes to 9, but on one split only."""
    first = dict(kl=[0.0, 2.25], gold=[0.0, 3.0], val_kl=[0.0, 2.25], val_gold=[0.0, 30.0], flops=[0, 2e12])
    second = dict(kl=[0.0, 1.0, 9.0], gold=[0.0, 4.0, 8.0], val_kl=[0.0, 1.0, 4.0], val_gold=[0.0, 25.0, 26.0],
                  flops=[0, 1e12, 2e12])
    curves = {"1": first, "2": second}
    assert WHEN.told(curves, [1, 4, 9], [2]) == {
        "rate@kl1": 2.0, "gold@kl1": 4.0, "rate@kl4": 2.0, "gold@kl4": 6.0, "rate@2T": 1.0, "gold@2T": 3.0}


def test_best_of_n_over_kl():
    curve = WHEN.best_of_n({"best@4": 3.0, "best@1": 1.0, "best@2": 2.0, "pass@4": 9.0})
    assert curve["n"] == [1, 2, 4] and curve["gold"] == [1.0, 2.0, 3.0]
    assert curve["kl"] == pytest.approx([0, math.log(2) - .5, math.log(4) - .75])
    at_4 = math.log(4) - .75
    assert WHEN.told_of_best(curve, [at_4, 1]) == {f"gold@kl{at_4:g}": pytest.approx(3.0)}


def finished_runs(folder, steps):
    """A model to begin from, folders dpo/1e-4/STEPS of runs of DPO with as many rows, and two tables of them."""
    table = [dict(checkpoint=save(folder / "sft", random_policy()), kl=0.0, write=1.0, greedy=2.0, proxy=3.0)]
    for n in steps:
        path = folder / "dpo/1e-4" / str(n)
        path.mkdir(parents=True)
        (path / "run.json").write_text(json.dumps(dict(loss="dpo", online=False, batch=1)))
        write(path / "metrics.jsonl", [dict(step=i) for i in range(n)])
        table.append(dict(checkpoint=str(path), kl=n / 8, write=1 + n, greedy=2 + n, proxy=3 + n))
    for split in ("test", "val"):
        data.write_text(folder / f"{split}.json", json.dumps(dict(rows=table)))
    records = [dict(prompt=[dict(role="user", content="?")], responses=["a b c", "d"])]
    return records, dict(out=str(folder / "curves"), test=str(folder / "test.json"), val=str(folder / "val.json"),
                         data=write(folder / "pairs.jsonl", records), save=str(folder / "when.json"))


def test_the_whole_of_when(tmp_path, capsys):
    """From folders and tables to numbers: the runs of DPO in the order of their steps, not of their names."""
    records, options = finished_runs(tmp_path, [16, 8, 32])
    best_of = {"checkpoint": "sft", "kl": 0.0, "write": 1.0, "best@1": 1.0, "best@2": 4.0}
    data.write_text(tmp_path / "best_of.json", json.dumps(dict(rows=[best_of])))
    WHEN.when(WHEN.Config(best_of=str(tmp_path / "best_of.json"), kl="1,4,5", tflops="1e-6", **options),
              [str(tmp_path / "dpo")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "when.json").read_text())["rows"]}
    curve, numbers = rows["dpo 1e-4"], rows["dpo"]
    assert curve["steps"] == [0, 8, 16, 32] and curve["gold"] == curve["val_gold"] == [1, 9, 17, 33]
    assert numbers["gold@kl1"] == pytest.approx(9) and numbers["proxy@kl4"] == pytest.approx(35)
    assert "gold@kl5" not in numbers and "gold@kl1" not in rows["best of n"]
    per_step = curve["flops"][1] / 8
    assert curve["flops"] == pytest.approx([0, 8 * per_step, 16 * per_step, 32 * per_step])
    assert numbers["gold@1e-06T"] == pytest.approx(1 + 1e6 / per_step)          # a point of gold a step
    shape, pairs = json.loads((tmp_path / "sft/config.json").read_text()), WHEN.mean_lengths(records, TOK)
    sampled = WHEN.sample_flops(shape, pairs.p, pairs.n, 2)
    assert rows["sampling the pairs"]["tflops"] * 1e12 == pytest.approx(sampled)
    trained = 2 * 3 * WHEN.forward_flops(shape, pairs.p, pairs.n, head=0, read=1)
    assert rows["the reward model, an epoch"]["tflops"] * 1e12 == pytest.approx(trained)
    assert "–" in capsys.readouterr().out


@pytest.mark.parametrize("change, error, word", [
    (dict(kl="1,x"), OptionError, "--kl"), (dict(tflops=""), OptionError, "--tflops"),
    (dict(folder="dpo/1e-4/8"), UserError, "no runs"), (dict(val="short.json"), UserError, "no row of"),
    (dict(test="nowhere.json"), UserError, "No such file"), (dict(val="empty.json"), UserError, "needed are"),
    (dict(best_of="rates.json"), UserError, "needed are")])
def test_what_when_cannot_read_is_one_line(change, error, word, tmp_path):
    _, options = finished_runs(tmp_path, [8])
    rows = json.loads((tmp_path / "val.json").read_text())["rows"]
    for name, some in dict(short=rows[:1], empty=[], rates=[dict(name="dpo", rate=1e-4)]).items():
        data.write_text(tmp_path / f"{name}.json", json.dumps(dict(rows=some)))
    folder = str(tmp_path / change.pop("folder", "dpo"))
    for split in change.keys() & {"val", "test", "best_of"}:
        change[split] = str(tmp_path / change[split])
    with pytest.raises(error, match=word):
        WHEN.when(WHEN.Config(**options | change), [folder])


# ---------------------------------------------------------------- what was chosen on the validation split

def scored(folder, **numbers):
    """Rows of a table: {METHOD/RATE: number}."""
    return [dict(checkpoint=str(folder / name), write=number) for name, number in numbers.items()]


def test_the_best_rate_of_each_method(tmp_path):
    rows = scored(tmp_path, **{"dpo/1e-4": 1.0, "dpo/3e-4": 2.0, "dpo/1e-3": 2.0, "ppo/1e-4": 3.0, "ppo/3e-4": -4.0})
    rows.append(dict(checkpoint=str(tmp_path.parent / "sft"), write=9.0))       # what all began from
    assert PICK.best_rates(rows, tmp_path, "write") == dict(dpo=rows[1], ppo=rows[3]), "of equal ones the first"


def test_pick_leads_to_the_best_and_says_its_rate(tmp_path):
    for name in ("dpo/1e-4", "dpo/3e-4"):
        (tmp_path / name).mkdir(parents=True)
    table, saved = tmp_path / "val.json", tmp_path / "tables/x.json"
    for best, other in (("1e-4", "3e-4"), ("3e-4", "1e-4")):                    # the second time the link is there
        data.write_text(table, json.dumps(dict(rows=scored(tmp_path, **{f"dpo/{best}": 2.0, f"dpo/{other}": 1.0}))))
        PICK.pick(PICK.Config(out=str(tmp_path / "best"), table=str(table), save=str(saved), overwrite=True))
        assert (tmp_path / "best/dpo").resolve() == (tmp_path / "dpo" / best).resolve()
        assert json.loads(saved.read_text())["rows"] == [dict(name="dpo", rate=float(best), val=2.0)]


def test_a_table_keeps_both_names_of_a_model_that_is_in_it_twice(tmp_path, capsys):
    """As out/x/dpo/1e-4 and out/x/best/dpo are; and what an earlier table had besides."""
    folders = [save(tmp_path / name, random_policy(seed)) for name, seed in (("sft", 0), ("a", 1), ("b", 1), ("c", 2))]
    cfg = reward.Compare(families="write", n=2, max_new=4, show=0, save=str(tmp_path / "table.json"), **CPU)
    reward.compare(cfg, [folders[0], folders[3]])
    reward.compare(cfg, folders[:3])
    assert [row["checkpoint"] for row in table_rows(cfg.save)] == folders


@pytest.mark.parametrize("rows, word", [
    (None, "No such file"), ([], "no checkpoint"), ([dict(name="dpo", write=1)], "no checkpoint"),
    ([dict(checkpoint="HERE/best/dpo", write=1)], "METHOD/RATE"),
    ([dict(checkpoint="elsewhere/dpo/1", write=1)], "no checkpoint"),
    ([dict(checkpoint="dpo/1")], "has no write")])
def test_a_table_that_nothing_can_be_picked_from_is_one_line(rows, word, tmp_path):
    table = tmp_path / "val.json"
    if rows is not None:
        text = json.dumps(dict(rows=rows))
        table.write_text(text.replace("HERE", str(tmp_path)))
    with pytest.raises(UserError, match=word):
        PICK.pick(PICK.Config(out=str(tmp_path / "best"), table=str(table)))


def test_last_rows_are_those_of_finished_runs(tmp_path, capsys):
    for name, number in (("a", 1.5), ("b", -2.0)):
        data.write_text(tmp_path / name / "summary.json", json.dumps(dict(step=1, loss=number)))
    folders = [str(tmp_path / name) for name in "ab"]
    cfg = LAST.Config(out=str(tmp_path / "table"), metrics="loss", save=str(tmp_path / "x.json"))
    LAST.show(cfg, folders)
    assert f"{folders[1]}   -2.000\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [
        dict(checkpoint=folders[0], loss=1.5), dict(checkpoint=folders[1], loss=-2.0)]
    for name, metrics, word in (("a", "kl", "no kl, but step, loss"), ("c", "loss", "no finished run")):
        with pytest.raises(UserError, match=word):
            LAST.show(LAST.Config(out=str(tmp_path / metrics), metrics=metrics), [str(tmp_path / name)])


def test_a_change_is_the_mean_of_the_last_quarter_beside_the_plain_runs(tmp_path, monkeypatch):
    """Of the rows that have the metric; None where none has."""
    monkeypatch.setattr(CHANGES, "CHANGES", [
        CHANGES.Change("ppo/kl", "--kl_coef 0", "kl", "up", ""), CHANGES.Change("ppo/kl", "--kl_coef 0", "gold", "up", "")])
    for name, values in (("plain", [9, 9, 9, 9, None, 1, 2, None]), ("kl", [9, 9, 3])):
        rows = [dict(step=i, seconds=i, kl=value) for i, value in enumerate(values)]
        data.write_text(tmp_path / "ppo" / name / "summary.json", "{}")
        write(tmp_path / "ppo" / name / "metrics.jsonl", rows)
    cfg = dict(runs=str(tmp_path), save=str(tmp_path / "x.json"))
    CHANGES.compare(CHANGES.Config(out=str(tmp_path / "table"), **cfg))
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [
        dict(name="ppo/kl kl", plain=1.5, changed=3, as_said=1),
        dict(name="ppo/kl gold", plain=None, changed=None, as_said=None)]
    assert (CHANGES.as_said(1, 2, "down"), CHANGES.as_said(2, 1, "down"), CHANGES.as_said(1, 1, "up")) == (0, 1, 0)
    (tmp_path / "ppo/plain/summary.json").unlink()
    with pytest.raises(UserError, match="plain: no finished run"):
        CHANGES.compare(CHANGES.Config(out=str(tmp_path / "again"), **cfg))



# ---------------------------------------------------------------- the data that some losses are for

def test_pairs_that_differ_in_one_digit():
    rng = random.Random(3)
    for _ in range(200):
        record = LOSSES.one_digit(rng)
        right, wrong = record["responses"]
        assert len(right) == len(wrong) and sum(a != b for a, b in zip(right, wrong)) == 1
        first, *changes = record["key"].replace("- ", "-").replace("+ ", "").split()
        total = int(first) + sum(map(int, changes))
        assert right == f"The answer is {total}."
        assert data.split_of(record["key"]) == "train"


def test_a_thumb_of_each_pair_up_and_down_in_turn(tmp_path):
    turn = [dict(role="user", content="?")]
    pairs = [dict(prompt=turn, responses=[f"good {i}", f"bad {i}"], key=str(i)) for i in range(3)]
    path = write(tmp_path / "thumbs.jsonl", LOSSES.thumbs(pairs))
    read = data.read_records(path, "thumbs")
    assert [(record["response"], record["label"]) for record in read] == [
        ("good 0", True), ("bad 1", False), ("good 2", True)]


def test_the_bad_answer_is_last_and_the_others_as_they_came(tmp_path):
    """A prompt without a bad answer, or with nothing else, gives none; a second bad answer is one of the others."""
    def answer(asked, text, score):
        return dict(prompt=[dict(role="user", content=asked)], response=text, scores=[score], key=asked)
    made = LOSSES.only_bad([answer("a", "x", .1), answer("a", "harm", 0), answer("a", "y", 1), answer("a", "worse", -1),
                            answer("b", "x", 1), answer("c", "harm", 0), answer("d", "harm", -1), answer("d", "z", 1)])
    assert [record["responses"] for record in made] == [["x", "y", "worse", "harm"], ["z", "harm"]]
    first = data.read_records(write(tmp_path / "bad.jsonl", made), "preference")[0]
    items = data.preference_items(first, TOK, 64, one=True)
    assert [item["up"] for item in items] == [[True, True, True, False]]        # as d2o reads it


def test_people_prefer_by_the_truth():
    record = data.toy_record("prompt", "train", ["write"], random.Random(1))
    good, bad = f"The {record['key']} is superb.", "Banana."
    lead = data.gold(record, good) - data.gold(record, bad)
    assert LOSSES.people(record, good, bad) == pytest.approx(1 / (1 + math.exp(-3 * lead))) and lead > 1
    assert LOSSES.people(record, good, bad) + LOSSES.people(record, bad, good) == pytest.approx(1)
    assert LOSSES.people(record, bad, bad) == .5
