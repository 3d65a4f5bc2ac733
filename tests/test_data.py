"""What lives on disk and as text. Four parts: records (every shape and real sample, malformed input with its valid
twin), the toy world (what is held out stays out, gold rewards), tokenizer and batches, options and the run log."""
import ast
import base64
import dataclasses
import functools
import gzip
import importlib
import inspect
import itertools
import json
import os
import pickle
import random
import re
import runpy
import statistics
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Literal

import pytest
import torch

import data
import process_rewards
import sft
from data import (BAD, CATEGORIES, COUNTS, FAMILIES, GOOD, MODIFIERS, OBJECTS, SAYINGS, SHAPES, SPECIALS, Term, THINGS,
                  THINK, TOOLS, VERIFIERS, WORLD, Arith, Natural, OptionError, Positive, Run, RunConfig, Share, Stream,
                  Tokenizer, UserError, after_thinking, bpe_ranks, collate, draw_family, encode, family_list,
                  final_answer, gold, guard, hash_answer, micro_batches, open_stream, pad, pairs, parse,
                  parse_rewards, read_records, read_rows, round_up, safe_metrics, sparkline, split_of, toy_demo,
                  toy_document, toy_record, toy_task, verifier, write_text)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PLAINALIGN_DATA") or ROOT.parent / "shared" / "data")


def user(text): return {"role": "user", "content": text}
def system(text): return {"role": "system", "content": text}
def assistant(text): return {"role": "assistant", "content": text}


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(rows if isinstance(rows, bytes) else "\n".join(json.dumps(r) for r in rows).encode())
    return path


def real(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    return SHARED / name


def hh(*turns):
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def said(text): return {"messages": [user("Q"), assistant(text)]}
def prefer(*texts, **more): return {"prompt": [user("Q")], "responses": list(texts), **more}
def judged(text, label): return {"prompt": [user("Q")], "response": text, "label": label}


def turns(*messages): return {"messages": list(messages)}


# ---- shapes

FORMATS = {     # raw rows, and what they must become
    "text": ([{"text": "a", "url": "u"}, {"text": "b"}], [{"text": "a"}, {"text": "b"}]),
    "messages": ([{"messages": [user("Q"), assistant("a")], "id": 1}], [said("a")]),
    "sharegpt": ([{"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                                     {"from": "gpt", "value": "a"}]}],
                 [{"messages": [system("S"), user("Q"), assistant("a")]}]),
    "weight 0": ([turns(user("a"), {**assistant("b"), "weight": 0}, user("c"), {**assistant("d"), "weight": 1})],
                 [turns(user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("d"))]),
    "alpaca": ([{"instruction": "Q", "input": "", "output": "a"}, {"instruction": "Q", "output": "b"},
                {"instruction": "Q", "input": "I", "output": "c"}],
               [said("a"), said("b"), turns(user("Q\n\nI"), assistant("c"))]),
    "prompt, response": ([{"prompt": "Q", "response": "a", "history": []}, {"prompt": "Q", "completion": "b"},
                          {"prompt": [system("S"), user("Q")], "response": "c"}],
                         [said("a"), said("b"), turns(system("S"), user("Q"), assistant("c"))]),
    "gsm8k": ([{"question": "Q", "answer": "2*3=<<2*3=6>>6\n#### 6"}], [said("2*3=6\n#### 6")]),
    "thumbs": ([{"messages": [user("Q"), assistant("a")], "label": True},
                {"prompt": "Q", "response": "b", "label": False},
                {"prompt": [user("Q")], "completion": "c", "label": True, "source": "ai"},
                {"instruction": "Q", "output": "d", "label": False},
                {"instruction": "Q", "output": "e", "label": "good"}],
               [judged("a", True), judged("b", False), judged("c", True) | {"source": "ai"}, judged("d", False),
                said("e")]),
    "pairs": ([{"prompt": "Q", "chosen": "a", "rejected": "b", "source": "human", "margin": 2, "prob": .7},
               {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "source": "magpie"},
               {"instruction": "Q", "input": "I", "output": "x", "chosen": "a", "rejected": "b"},
               {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")], "key": "k"}],
              [prefer("a", "b", source="human", margin=2, prob=.7), prefer("a", "b"),
               {"prompt": [user("Q\n\nI")], "responses": ["a", "b"]}, prefer("a", "b", key="k")]),
    "hh": ([{"chosen": hh("Q", "a"), "rejected": hh("Q", "b")},
            {"chosen": hh("Q", "x", "R", " a"), "rejected": hh("Q", "x", "R", "b\nHuman: b")}],
           [prefer("a", "b"),
            {"prompt": [user("Q"), assistant("x"), user("R")], "responses": [" a", "b\nHuman: b"]}]),
    "rankings": ([{"prompt": "Q", "responses": ["a", "c", "b"], "margin": 1, "scores": [3, 2, 1],
                   "key": 7, "note": "kept"},
                  {"prompt": "Q", "responses": ["a", "b"], "margin": .5, "win": [1, 0], "scores": [1, 2, 3],
                   "prob": 1}],
                 [prefer("a", "c", "b", scores=[3, 2, 1], key=7, note="kept"),
                  prefer("a", "b", margin=.5, win=[1, 0], prob=1)]),
    "prompts": ([{"prompt": "Q", "answer": 7, "family": "arith", "options": ["A"]}, {"prompt": [user("Q")],
                                                                                     "label": "x"},
                 {"prompt": "Q", "text": "kept", "source": "mine", "system": ""}],
                [{"prompt": [user("Q")], "answer": 7, "family": "arith", "options": ["A"]},
                 {"prompt": [user("Q")], "label": "x"}, {"prompt": [user("Q")], "text": "kept", "source": "mine"}]),
    "ratings": ([{"prompt": "Q", "response": "a", "ratings": [4, .5]}],
                [{"prompt": [user("Q")], "response": "a", "ratings": [4., .5]}]),
    "steps": ([{"prompt": "Q", "steps": ["a ", "b"], "labels": [True, 0]}],
              [{"prompt": [user("Q")], "response": "a b", "steps": ["a ", "b"], "labels": [1, 0]}]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_its_record_and_records_read_as_themselves(tmp_path, name):
    rows, records = FORMATS[name]
    assert read_records(write(tmp_path, rows)) == records
    assert read_records(write(tmp_path, records)) == records


def test_every_shape_has_a_format_and_is_named_when_none_fits(tmp_path):
    keys = {shape: set(shape.split()) for shape in SHAPES}
    rows = [row for rows, _ in FORMATS.values() for row in rows]
    assert all(any(row.keys() >= needed for row in rows) for needed in keys.values())
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*\['src', 'tgt'\]") as error:
        read_records(write(tmp_path, [{"src": "a", "tgt": "b"}]))
    assert all("+".join(shape.split()) in str(error.value) for shape in SHAPES) and "\n" not in str(error.value)


@pytest.mark.parametrize("row, want, record", [
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "source": "ai"}, "messages", said("a") | {"source": "ai"}),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "key": 1}, "prompt", {"prompt": [user("Q")], "key": 1}),
    ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "thumbs", prefer("a", "b")),     # up and down, see dpo.py
    ({"prompt": "Q", "responses": ["a", "b", "c"], "note": 1}, "messages", said("a")),
    ({"prompt": "Q", "responses": ["a", "b", "c"], "note": 1}, "prompt", {"prompt": [user("Q")], "note": 1}),
    ({"prompt": "Q", "response": "a", "label": True}, "messages", said("a")),
    ({"messages": [user("Q"), assistant("a")]}, "prompt", {"prompt": [user("Q")]}),
    ({"question": "Q", "answer": "so\n#### 1,080"}, "prompt", {"prompt": [user("Q")], "answer": 1080}),
    ({"question": "Q", "answer": "x = 1, y"}, "prompt", {"prompt": [user("Q")], "answer": "x = 1, y"}),
    ({"prompt": "Q", "response": "a", "ratings": [1]}, "messages", said("a")),
    ({"prompt": "Q", "response": "a", "ratings": [1]}, "prompt", {"prompt": [user("Q")]}),
    ({"prompt": "Q", "steps": ["a"], "labels": [1]}, "prompt", {"prompt": [user("Q")]}),
])
def test_want_converts_what_the_meaning_allows(tmp_path, row, want, record):
    got, = read_records(write(tmp_path, [row]), want)
    assert got == record and type(got.get("answer")) == type(record.get("answer"))


@pytest.mark.parametrize("row, want", [
    ({"text": "a"}, "messages"), ({"text": "a"}, "prompt"), (said("a"), "text"), (said("a"), "preference"),
    (said("a"), "thumbs"), ({"prompt": "Q"}, "messages"), ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "text"),
    (judged("a", True), "preference"), ({"prompt": "Q", "response": "a"}, "ratings"), (prefer("a", "b"), "ratings"),
    ({"prompt": "Q", "steps": ["a"], "labels": [1]}, "messages"),
    ({"prompt": "Q", "response": "a", "ratings": [1]}, "steps"), ({"prompt": "Q", "response": "a", "ratings": [1]},
                                                                  "preference")])
def test_want_refuses_the_rest_and_says_where_and_what(tmp_path, row, want):
    with pytest.raises(UserError, match=rf'^rows.jsonl:1: found "\w+" .* but "{want}" is needed$'):
        read_records(write(tmp_path, [row]), want)


# ---- the real files

@pytest.mark.parametrize("name, want, count, lost", [
    ("alpaca_and_pairs/instruction-data.json", None, 1100, ""),
    ("alpaca_and_pairs/instruction-data-with-preference.json", None, 1094,
     "6 identical pairs; not read: output 1094 rows"),
    ("alpaca_and_pairs/instruction-data-with-preference.json", "messages", 1100, "not read: output 1100 rows"),
    ("chat/toy_chat_fine_tuning.jsonl", None, 10, ""),
    ("gsm8k/train_first4000.jsonl", None, 4000, ""),
    ("hh/harmless_first100.jsonl.gz", None, 99, "1 empty answer"),
    ("hh/harmless_first100.jsonl.gz", "messages", 99, "1 empty answer"),
    ("hh/harmless_first100.jsonl.gz", "prompt", 100, ""),
    ("kto/kto_en_demo.json", None, 300, ""),
    ("kto/kto_en_demo.json", "messages", 150, "150 thumbs-down answers"),
])
def test_real_file_counts(name, want, count, lost, capsys):
    assert len(read_records(real(name), want)) == count
    told = capsys.readouterr().err
    assert f"{count} records" in told and lost in told and bool(lost) == (";" in told)


def test_real_pairs_of_alpaca_and_of_hh():
    """Rows 29 and 86 of HH are odd: answers that begin with "Human:" but are one turn; an empty answer."""
    path = real("alpaca_and_pairs/instruction-data-with-preference.json")
    raw, records = [row for _, row in read_rows(path)], read_records(path, "preference")
    assert [i for i, row in enumerate(raw) if row["chosen"] == row["rejected"]] == [122, 226, 400, 566, 628, 676]
    assert records[0]["prompt"] == [user(raw[0]["instruction"] + "\n\nfreind --> friend")]
    assert records[122]["responses"] == [raw[123]["chosen"], raw[123]["rejected"]]
    path = real("hh/harmless_first100.jsonl.gz")
    (where, raw), records = list(read_rows(path))[86], read_records(path)
    assert where == "harmless_first100.jsonl.gz:87" and raw["chosen"].endswith("\n\nAssistant: ")
    assert all(r["prompt"][-1]["role"] == "user" and len(r["prompt"]) % 2 for r in records)
    assert [m["role"] for m in records[29]["prompt"]] == ["user", "assistant"] * 3 + ["user"]
    assert records[29]["responses"][0].startswith("Human: No, you are")
    assert "the address is" not in str(read_records(path, "messages"))     # a rejected answer is no demonstration


def test_real_conversations_and_documents():
    records = read_records(real("kto/kto_en_demo.json"))
    assert sum(r["label"] for r in records) == 150
    assert Counter(len(r["prompt"]) + 1 for r in records) == {2: 223, 4: 3, 6: 47, 8: 22, 10: 1, 12: 4}
    records = read_records(real("chat/toy_chat_fine_tuning.jsonl"))
    assert [i for i, r in enumerate(records) if all(m["role"] != "user" for m in r["messages"])] == [3, 8, 9]
    path = real("plaintext/tinyshakespeare_input.txt")
    assert read_records(path) == [{"text": path.read_bytes().decode()}]


def test_real_gsm8k_answers_verify_and_stop_verifying_when_the_final_number_changes():
    path = real("gsm8k/train_first4000.jsonl")
    records, raw = read_records(path, "prompt"), [row["answer"] for _, row in read_rows(path)]
    assert (records[0]["answer"], records[345]["answer"], records[644]["answer"]) == (72, 1080, 109200000)
    solved = [record["messages"][1]["content"] for record in read_records(path, "messages")]
    assert not any("<<" in text for text in solved)
    for record, *texts in zip(records, raw, solved):
        for text in texts:
            worked, final = text.split("####")
            assert VERIFIERS["gsm8k"](record, text, True) and not VERIFIERS["gsm8k"](record, text, False)
            for wrong in (record["answer"] + 1, -record["answer"] or 1, f"1{record['answer']}", f"{final.strip()}.5"):
                assert not VERIFIERS["gsm8k"](record, f"{worked}#### {wrong}", True)
            assert not VERIFIERS["gsm8k"](record, text + text, True) and not VERIFIERS["gsm8k"](record, worked, True)


# ---- what is dropped or not read, and said

@pytest.mark.parametrize("rows, left, lost", [
    ([{"prompt": "Q", "chosen": "a", "rejected": "a"}], 0, "1 identical pair"),
    ([{"prompt": "Q", "chosen": " \n", "rejected": "a"}] * 2, 0, "2 empty answers"),
    ([{"prompt": "Q", "responses": ["a", "", "b", "a"]}], 1, "1 empty answer, 1 identical pair"),
    ([{"prompt": "Q", "responses": ["a"]}], 0, "1 lone answer"),
    ([{"prompt": "Q", "responses": []}], 0, "1 lone answer"),
    ([{"chosen": hh("Q", "a"), "rejected": hh("R", "b")}], 0, "1 contradictory pair"),
    ([{"chosen": [user("Q"), assistant("a")], "rejected": [assistant("b")]}], 0, "1 contradictory pair"),
    ([{"chosen": hh("Q", "a", "R"), "rejected": hh("Q", "b")}], 0, "1 broken transcript"),
    ([{"chosen": hh("Q", "a"), "rejected": hh("Q", "b\n\nAssistant: c")}], 0, "1 broken transcript"),
])
def test_drops_are_counted_aloud(tmp_path, capsys, rows, left, lost):
    good = {"prompt": "Z", "chosen": "a", "rejected": "b"}
    assert len(read_records(write(tmp_path, rows + [good]), "preference")) == left + 1
    told = capsys.readouterr().err
    assert told.startswith(f"rows.jsonl: {left + 1} records; dropped ") and told.count("\n") == 1
    assert sorted(told.strip().split("dropped ")[1].split(", ")) == sorted(lost.split(", "))


@pytest.mark.parametrize("row, want, lost", [
    ({"prompt": "Q", "response": " "}, "messages", "empty answer"), (judged("", True), "thumbs", "empty answer"),
    (prefer(), "messages", "empty answer"), (judged("a", False), "messages", "thumbs-down answer"),
    ({"text": "\n"}, "text", "empty text"),
    (turns(user("a"), {**assistant("b"), "weight": 0}), "messages", "untrained conversation"),
    (turns(user("a"), {**assistant("b"), "weight": 0}) | {"label": True}, "thumbs", "untrained answer")])
def test_a_file_of_nothing_else_is_one_line(tmp_path, row, want, lost):
    with pytest.raises(UserError, match=f"^rows.jsonl: 0 records; dropped 2 {lost}s$"):
        read_records(write(tmp_path, [row, row]), want)


def test_pairs_of_a_ranking():
    two = lambda record, which="all": [tuple(p["responses"]) for p in pairs(record, which)]
    assert two(prefer("A", "C", "B")) == [("A", "C"), ("A", "B"), ("C", "B")]
    assert two(prefer("A", "C", "B"), "ends") == [("A", "B")]
    assert len(set(two(prefer(*"ABCDEFG")))) == 21 and all(a < b for a, b in two(prefer(*"ABCDEFG")))
    record = prefer("A", "C", "B", scores=[3, 2, 1], win=[1., .5, 0.], source="ai", key="k")
    assert pairs(record)[1] == prefer("A", "B", scores=[3, 1], win=[1., 0.], source="ai", key="k")
    assert pairs(prefer("a", "b", margin=3)) == [prefer("a", "b", margin=3)]


def test_keys_that_are_not_read_are_named_once_with_their_counts(tmp_path, capsys):
    """Twelve rows have an id and tools, three a name in a turn; what is empty says nothing."""
    rows = [{"question": f"Q{i}", "answer": "a", "id": i, "tools": [{"f": 1}], "url": None, "tags": [], "note": "",
             "history": [], "system": ""} for i in range(9)]
    rows += [{"messages": [{**user("Q"), "name": "Al"}, {**assistant("a"), "name": "Bo"}], "id": i, "tools": {"f": 1}}
             for i in range(3)]
    assert len(read_records(write(tmp_path, rows + [{"prompt": "Q", "level": 3, "source": "mine"}]))) == 13
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.strip().split("not read: ")[1].split(", ") == ["id 12 rows", "tools 12 rows", "messages[].name 3 rows"]
    for row, lost in ((prefer("a", "b", note="kept", key="k"), None), (prefer("a", "b", source="mine"), "source 1 row"),
                      (prefer("a", "b", scores=[1]), "scores 1 row"), (prefer("a", "b", "c", margin=1),
                                                                       "margin 1 row")):
        read_records(write(tmp_path, [row]))
        assert capsys.readouterr().err.partition("; not read: ")[2] == (f"{lost}\n" if lost else "")
    read_records(write(tmp_path, [{"text": "a", **{f"key{i}": 1 for i in range(500)}}]))
    assert len(capsys.readouterr().err) < 1000


# ---- rows that are refused: each is a good row with one key changed, or with one key more

CHAT_ROW, PAIR, RATED = said("a"), {"prompt": "Q", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "response": "a",
                                                                                     "ratings": [1]}
STEPPED, RANKED, TOLD = {"prompt": "Q", "steps": ["a", "b"],
                         "labels": [1, 0]}, prefer("a", "b"), {"prompt": "Q", "response": "a"}


@pytest.mark.parametrize("row, key, wrong, word", [
    ({"text": "a"}, "text", 1, "str"), (CHAT_ROW, "messages", "a", "list"), (CHAT_ROW, "messages", [],
                                                                             "assistant turn"),
    (CHAT_ROW, "messages", ["a"], "dict"), (CHAT_ROW, "messages", [user("Q")], "assistant turn"),
    (CHAT_ROW, "messages", [{"content": "x"}, assistant("a")], "str"),
    (CHAT_ROW, "messages", [{"role": ["user"], "content": "x"}, assistant("a")], "str"),
    (CHAT_ROW, "messages", [user("a"), {**assistant("b"), "weight": .5}], "weight"),
    (CHAT_ROW, "messages", [user("a"), {**assistant("b"), "weight": "0"}], "weight"),
    (CHAT_ROW | {"label": True}, "label", 1, "bool"), (TOLD | {"label": True}, "label", "good", "bool"),
    (TOLD, "response", None, "str"), ({"prompt": "Q"}, "prompt", 3, "str or list"), ({"prompt": "Q"}, "prompt", [],
                                                                                     "empty"),
    ({"prompt": "Q"}, "prompt", [assistant("a")], "assistant turn"),
    ({"instruction": "Q", "output": "a", "input": "I"}, "input", ["I"], "str"),
    ({"instruction": "Q", "output": "a"}, "instruction", None, "str"), (PAIR, "rejected", 0, "str"),
    (PAIR, "chosen", [user("Q")], "assistant turn"), ({"chosen": hh("Q", "a"), "rejected": hh("Q", "b")}, "chosen", {},
                                                      "str"),
    (RANKED, "responses", ["a", 1], "str"), (RANKED | {"margin": 1.5}, "margin", "1.5", "float"),
    (RANKED | {"prob": 1}, "prob", 1.5, "between"), (RANKED | {"scores": [2, 1]}, "scores", [2, True], "float"),
    ({"question": "Q", "answer": "#### 1"}, "answer", 1, "str"), (RATED, "ratings", 3, "list"),
    (RATED, "ratings", [1, "2"], "float"), (RATED, "ratings", [True], "float"), (RATED, "ratings", [], "empty"),
    (RATED, "response", ["a"], "str"), (STEPPED, "labels", [1], "one for each"), (STEPPED, "labels", [1, 2], "0 or 1"),
    (STEPPED, "labels", [1, .5], "bool"), (STEPPED, "labels", 1, "list"), (STEPPED, "steps", ["a", ""], "empty"),
    (STEPPED, "steps", ["a", 1], "str"), (STEPPED, "steps", "ab", "list"), (STEPPED, "prompt", None, "str or list"),
])
def test_wrong_types_name_file_line_and_key(tmp_path, row, key, wrong, word):
    twin = {"text": "first"}
    assert len(read_records(write(tmp_path, [twin, row]))) == 2
    with pytest.raises(UserError, match=rf'^rows\.jsonl:2: [^\n]*"{key}[^\n]*{word}[^\n]*$'):
        read_records(write(tmp_path, [twin, {**row, key: wrong}]))


@pytest.mark.parametrize("row, key, says_more", [
    *((row, key, "S") for row in (TOLD, PAIR, RANKED, STEPPED, {"prompt": "Q"}, CHAT_ROW) for key in data.BESIDE),
    *((row, key, "S") for row in (TOLD, PAIR, RATED, CHAT_ROW) for key in data.MEANT),
    *(({"text": "a"}, key, "S") for key in data.SPOKEN),
    *((CHAT_ROW, "messages", [user("a"), {**assistant("b"), key: "S"}]) for key in data.MEANT),
    (CHAT_ROW, "messages", [user("a"), {"role": "tool", "content": "4"}, assistant("b")]),
    (CHAT_ROW, "messages", [user([{"type": "text", "text": "a"}]), assistant("b")]),
    (TOLD, "prompt", hh("Q", "")), (RANKED, "prompt", hh("Q", "")), (PAIR, "prompt", hh("Q", "")),
])
def test_what_would_change_the_meaning_is_refused_with_the_command_that_converts_it(tmp_path, row, key, says_more):
    path = write(tmp_path, [{**row, key: says_more}], "my rows.jsonl")
    with pytest.raises(UserError, match=rf"^my rows\.jsonl:1: [^\n]*{key}[^\n]*$") as error:
        read_records(path)
    assert f"python configs/formats.py '{path}'" in str(error.value)


# ---- bytes

A, B = b'{"text": "a"}', b'{"text": "b"}'


@pytest.mark.parametrize("data, wheres", [
    (A + b"\n" + B + b"\n", [":1", ":2"]), (A + b"\n" + B, [":1", ":2"]), (b" " + A + b"\n " + B, [":1", ":2"]),
    (b"\xef\xbb\xbf" + A + b"\r\n\r\n \r\n" + B + b"\r\n", [":1", ":4"]),
    (b"[" + A + b",\n" + B + b"]", ["[0]", "[1]"]),
    (b"\xef\xbb\xbf\n [\r\n" + A + b" , " + B + b"\n]\n", ["[0]", "[1]"])])
@pytest.mark.parametrize("zipped", [False, True])
def test_containers(tmp_path, data, wheres, zipped):
    for name in ("x.json", "x.jsonl.gz", "x"):          # neither suffix decides
        path = write(tmp_path, gzip.compress(data) if zipped else data, name)
        assert list(read_rows(path)) == [(name + w, {"text": t}) for w, t in zip(wheres, "ab")]


def test_line_separators_inside_strings_do_not_split(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    lines = [json.dumps({"text": t}, ensure_ascii=False).encode() for t in (text, "next", "\U0001F600")]
    assert "\u2028".encode() in lines[0] and b"\xc2\x85" in lines[0]
    lines.append(b'{"text": "\\ud83d\\ude00"}')         # a whole surrogate pair is a character
    assert [(w, r["text"]) for w, r in read_rows(write(tmp_path, b"\n".join(lines)))] == [
        ("rows.jsonl:1", text), ("rows.jsonl:2", "next"), ("rows.jsonl:3", "\U0001F600"),
        ("rows.jsonl:4", "\U0001F600")]


def test_text_files_are_one_document(tmp_path):
    text = "[a]\r\n\n{b}\u2028\x0b\n"
    for name, data in (("x.txt", text.encode()), ("x.md", b"\xef\xbb\xbf" + text.encode()),
                       ("x.txt.gz", gzip.compress(text.encode()))):
        assert [row for _, row in read_rows(write(tmp_path, data, name))] == [{"text": text}]


def test_an_object_over_several_lines_is_one_record(tmp_path):
    """Alone, after another, between rows of one line, indented by blanks or tabs; an array may be written so too."""
    rows = [said(text) for text in "abcd"]
    two, tab = json.dumps(rows[1], indent=2), json.dumps(rows[2], indent="\t")
    for text, n in ((two, 1), (two.replace("\n", "\r\n") + "\n", 1), (f"\n{two}\n{tab}\n\n{two}", 3),
                    (f"{json.dumps(rows[0])}\n{two}\n{json.dumps(rows[3])}\n{tab}", 4),
                    (json.dumps(rows, indent=4), 4)):
        records = read_records(write(tmp_path, text.encode(), "rows.json"))
        assert len(records) == n and all(record in rows for record in records)
    broken = two.replace('"a"', "").replace('"content": "Q"', '"content": "Q",')
    with pytest.raises(UserError, match="^rows.json:[67]: "):   # the comma, or the brace behind it: Pythons differ
        read_records(write(tmp_path, (json.dumps(rows[0]) + "\n" + broken).encode(), "rows.json"))


GOOD_ROW = A + b"\n"
BAD_ROWS = [     # the broken row, its valid twin, a word of the message where it is ours and not Python's
    (b'{"text": "a", "x": NaN}', b'{"text": "a", "x": "NaN"}', "float"),
    (b'{"text": "a", "x": [-Infinity]}', b'{"text": "a", "x": [-1]}', "float"),
    (b'{"text": "a", "x": 1e999}', b'{"text": "a", "x": 1e99}', "float"),
    (b'{"text": "a", "text": "b"}', b'{"text": "a", "test": "b"}', "same key twice"),
    (b'{"text": "a", "x": [{"y": 1, "y": 1}]}', b'{"text": "a", "x": [{"y": 1}, {"y": 1}]}', "same key twice"),
    (b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', "surrogate"),
    (b'{"text": "a", "\\udc00": 1}', b'{"text": "a", "\\u0063": 1}', "surrogate"),
    (b'{"text": "\xff"}', "{\"text\": \"\u00ff\"}".encode(), "utf-8"),
    (b'{"text": "\xed\xa0\x80"}', b'{"text": "\xed\x9f\xbf"}', "utf-8"),
    (b'{"text": "a"', b'{"text": "a"}', ""),
    (b"{'text': 'a'}", b'{"text": "a"}', ""),
    (b'{"text": "a",}', b'{"text": "a"}', ""),
    (A + b" " + B, A, ""),
    (b'["text"]', b'{"text": "a"}', "object, not list"),
    (b'null', b'{"text": "a"}', "object, not NoneType"),
]


@pytest.mark.parametrize("bad, twin, word", BAD_ROWS)
def test_malformed_rows_name_file_and_line(tmp_path, bad, twin, word):
    jsonl = lambda row: write(tmp_path, GOOD_ROW + b"\n" + row + b"\n" + GOOD_ROW)
    array = lambda row: write(tmp_path, b"[\n" + GOOD_ROW + b",\n" + row + b"\n,\n" + GOOD_ROW + b"]", "rows.json")
    assert len(read_records(jsonl(twin))) == len(read_records(array(twin))) == 3
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: ") as error:
        read_records(jsonl(bad))
    assert word in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^rows\.json(\[1\]|:[456]): ") as error:
        read_records(array(bad))
    # an object left open swallows the next row, so there the parser stumbles later and over something else
    assert (word in str(error.value) or bad == b'{"text": "a"') and "\n" not in str(error.value)


@pytest.mark.parametrize("opens, name", [(b"", "rows.jsonl"), (b"[", "rows.json")])
def test_a_row_nested_deeper_than_python_reads_is_refused(tmp_path, opens, name):
    """How deep that is, and what Python says of it, differ between its versions."""
    row = b'{"text": "a", "x": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"
    with pytest.raises(UserError, match=rf"^{name}:1: [^\n]{{1,400}}$"):
        read_records(write(tmp_path, opens + row + b"]" * len(opens), name))


def test_jsonl_is_read_a_line_at_a_time(tmp_path):
    rows = read_rows(write(tmp_path, GOOD_ROW + b"not json"))
    assert next(rows) == ("rows.jsonl:1", {"text": "a"})
    with pytest.raises(UserError, match="rows.jsonl:2"):
        next(rows)


@pytest.mark.parametrize("name, data, words", [
    *((name, data, "no rows") for name in ("rows.jsonl", "rows.txt")
      for data in (b"", b"\n \r\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0))),
    ("rows.json", b"[]", "no rows"), ("rows.json", b" [\n]\n", "no rows"),
    ("x.txt", b"a\nb\n\xff\nc", ":3: .*utf-8"), ("x.txt", "Text.".encode("utf-16"), "UTF-8"),
    ("x.txt", "Text.".encode("utf-16-le"), "no text"),
    ("x.txt", b"version https://git-lfs.github.com/spec/v1\n", "no text"),
    ("x.md", b"%PDF-1.4\n", "no text"), ("x.jsonl", b"question,answer\na,b\n", "python configs/formats.py"),
    ("x.parquet", b"PAR1\x15\x04\xff", "python configs/formats.py"),
    ("x.pkl", pickle.dumps({"text": "a"}), "python configs/formats.py"), ("no\0name", None, "cannot be read"),
    ("none.jsonl", None, "No such file")])
def test_empty_files_and_files_of_another_kind(tmp_path, name, data, words):
    path = str(tmp_path / name) if data is None else write(tmp_path, data, name)
    with pytest.raises(UserError, match=rf"^{name}[^\n]*{words}[^\n]*$"):
        read_records(path)


def test_damaged_gzip(tmp_path):
    data = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919 ** 3) for i in range(3000)))
    assert len(read_records(write(tmp_path, data, "x.gz"))) == 3000
    for broken in (data[:len(data) // 2], data[:-4], data[:-8] + b"\0" * 8, data[:200] + b"\xff" * 50 + data[250:]):
        for options in ({}, {"skip_bad": True}):
            with pytest.raises(UserError, match=r"^x\.gz:\d+: "):
                read_records(write(tmp_path, broken, "x.gz"), **options)
    rows = read_rows(write(tmp_path, data[:-4], "x.gz"))        # only the checksum is cut: all lines were read
    with pytest.raises(UserError, match=r"^x\.gz:3001: "):
        list(rows)


def test_skip_bad_counts_what_it_leaves_out(tmp_path, capsys):
    """One in a hundred; the first row; a line cut off in the middle; rows of a list; a file of nothing else."""
    rows = [json.dumps(said(f"a{i}")).encode() for i in range(100)]
    bad = [b'{"messages": [{"role": ', b"garbage", b'{"prompt": "a", "response": 3}', b"null", b'{"text": "\xff"}',
           b'{"src": 1}', b'{"prompt": "Q", "response": NaN}', b"[" * 9999]
    for place in (0, 50, 99):
        for line in bad:
            path = write(tmp_path, b"\n".join(rows[:place] + [line] + rows[place:]))
            with pytest.raises(UserError, match=f"^rows.jsonl:{place + 1}: ") as error:
                read_records(path)
            assert ("--skip_bad" in str(error.value)) == (place > 0)
            capsys.readouterr()
            if place or not line.startswith(b"["):                  # there it is taken for a list over all lines
                assert len(read_records(path, "messages", skip_bad=True)) == 100
                assert re.search(f"skipped 1 bad row, the first rows.jsonl:{place + 1}: ", capsys.readouterr().err)
    path = write(tmp_path, b"\n".join([b"garbage"] + rows[:2] + bad[2:4]))
    assert len(read_records(path, skip_bad=True)) == 2
    assert "skipped 3 bad rows, the first rows.jsonl:1: " in capsys.readouterr().err
    path = write(tmp_path, b"[" + b", ".join([rows[0], b"3", b'{"text": 4}', rows[1]]) + b"]", "rows.json")
    assert len(read_records(path, skip_bad=True)) == 2
    assert "skipped 2 bad rows, the first rows.json[1]: " in capsys.readouterr().err
    read_records(write(tmp_path, rows[0]), skip_bad=True)
    assert "skipped" not in capsys.readouterr().err
    with pytest.raises(UserError, match="^rows.jsonl: 0 records; skipped 4 bad rows"):
        read_records(write(tmp_path, b"\n".join(bad[:4])), skip_bad=True)


@pytest.mark.parametrize("name", ["data", "sft", "orpo", "dpo", "grpo", "ppo", "reward"])
def test_skip_bad_reaches_all_that_read_records(name):
    """Every call that opens a user's records hands the option on, by its name or among all options."""
    openers = ("open_stream", "read_records", "open_preferences")
    called = [node for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
              if isinstance(node, ast.Call) and getattr(node.func, "id", "") in openers]
    assert called
    for node in called:
        assert "cfg" == ast.unparse(node.args[0]) if node.func.id == "open_preferences" else "skip_bad" in ast.unparse(node)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "long name"])
def test_what_is_no_file_is_one_line_and_no_waiting(tmp_path, monkeypatch, kind):
    path = os.devnull if kind == "device" else tmp_path / ("n" * 300 if kind == "long name" else kind)
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
        # a pipe without a writer would be waited for for ever
        monkeypatch.setattr(data, "open", lambda *args: pytest.fail("the pipe was opened"), raising=False)
    for read in (read_records, lambda path: open_stream(str(path), "messages", 0)):
        with pytest.raises(UserError, match=r"^[^\n]*$"):
            read(path)


def test_several_files_may_have_names_that_are_long_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [write(tmp_path, [said(f"{i}")], f"{i}{'n' * 90}.jsonl").name for i in range(4)]
    stream, _ = open_stream(",".join(names), "messages", 0, n_held=0)
    assert len(stream.items) == 4


# ==== the toy world

N = 3000


@cache
def tasks(split, family, n=N, seed=0):
    rng = random.Random(seed)
    return [toy_task(split, family, rng) for _ in range(n)]


@cache
def demos(family, seed=1):
    rng = random.Random(seed)
    return [(task, toy_demo(task, rng)) for task in tasks("train", family)]


def words(document):
    return document.get("text") or "\n".join(m["content"] for m in document["messages"])


def share(flags): return sum(flags) / len(flags)


# ---- held-out subjects
# The scanner reads text as a person would and shares only split_of and the word lists with data.py.

def sums(text):
    """Every sum a text states or works out, and each run of its steps that starts at 1 to 20."""
    found = re.findall(r"\d+(?: [+-] \d)+(?! =)", text)
    signs = {"gets": "+", "in": "+", "loses": "-", "out": "-"}
    change = r" [A-Z]\w+ (gets|loses|in|out) (\d)(?: more)?\."
    for story in re.finditer(rf"(?:has|holds) (\d+) \w+\.((?:{change})+)", text):
        found.append(story[1] + "".join(f" {signs[verb]} {n}" for verb, n in re.findall(change, story[2])))
    for chain in re.findall(r"\d+ [+-] \d = \d+(?:, \d+ [+-] \d = \d+)*", text):
        links = [re.fullmatch(r"(\d+) (. \d) = (\d+)", link).groups() for link in chain.split(", ")]
        assert all(a[2] == b[0] for a, b in zip(links, links[1:])), chain
        found.append(" ".join([links[0][0]] + [step for _, step, _ in links]))
    for expr in found:
        first, *rest = expr.split()
        for i in range(0, len(rest), 2):
            start = eval(" ".join([first] + rest[:i]))
            for j in range(i + 2, len(rest) + 1, 2):
                if 1 <= start <= 20:
                    yield " ".join([str(start)] + rest[i:j])


def subjects(text):
    """Every subject a text names, of any family."""
    yield from sums(text)
    tokens = re.findall(r"[\w']+", text)
    yield from (f"{a} {b}" for a, b in zip(tokens, tokens[1:]) if a in MODIFIERS and b in THINGS)
    deed = rf"({'|'.join(TOOLS)}) (?:the \w+'s|\w+'s|the|my|our) ({'|'.join(OBJECTS)})\b"
    yield from map(" ".join, re.findall(deed, text))
    yield from re.findall(rf"(?:{'|'.join(COUNTS)}) \w+ with \w+", text)


def held_out(texts):
    return [(subject, text) for text in texts for subject in subjects(text) if split_of(subject) != "train"]


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_by_key_and_by_wording(family):
    records = {split: tasks(split, family) for split in ("train", "val", "test")}
    for split, other in [("train", "val"), ("train", "test"), ("val", "test")]:
        for field in ("key", "prompt"):
            assert not {t[field] for t in records[split]} & {t[field] for t in records[other]}
    for split, some in records.items():
        assert {split_of(task["key"]) for task in some} == {split}
        assert all(task["key"] in subjects(task["prompt"]) for task in some)
        assert all(json.loads(json.dumps(task)) == task and task["family"] == family for task in some)
    with pytest.raises(AssertionError, match="valid"):
        toy_task("valid", family, random.Random(0))


def test_about_a_tenth_of_the_keys_is_test_and_a_tenth_val():
    keys = {f"{a} {op} {b} {op2} {c}" for a in range(1, 21) for b in range(1, 10) for c in range(1, 10)
            for op in "+-" for op2 in "+-"}
    for split, part in {"train": .8, "val": .1, "test": .1}.items():
        assert abs(share([split_of(key) == split for key in keys]) - part) < .01


def test_the_splits_are_those_of_the_published_figures():
    """Another hash or share moves tasks between splits: a checkpoint would have trained on the new test."""
    keys = "20 - 9 + 4", "black urn", "steal fence", "four tools with hammer"
    assert [split_of(key) for key in keys] == ["test", "val", "test", "train"]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_held_out_in_demonstrations_and_the_scan_is_not_blind(family):
    pairs = demos(family)
    assert not held_out(task["prompt"] + "\n" + answer for task, answer in pairs)
    assert len({subject for _, answer in pairs for subject in subjects(answer)}) > 100 or family == "fmt"
    for task in tasks("test", family, 200):                     # planted
        texts = [task["prompt"]] if family == "fmt" else [task["prompt"], WORLD[family].text(task, random.Random(3))]
        assert all((task["key"], text) in held_out(["The answer is 3.", text]) for text in texts)


def test_nothing_held_out_in_documents():
    rng = random.Random(2)
    texts = [words(toy_document(rng)) for _ in range(N)]
    assert not held_out(texts)
    assert len({subject for text in texts for subject in subjects(text)}) > 1000


def test_a_held_out_step_is_in_no_training_sum():
    steps = {key for key in (f"{a} {op} {b}" for a in range(1, 21) for b in range(1, 10) for op in "+-")
             if split_of(key) != "train"}
    inside = lambda split: {piece for task in tasks(split, "arith") for piece in sums(task["key"])} & steps
    assert len(steps) > 40 and not inside("train") and inside("test")


# ---- the tasks

def test_sums_are_as_described():
    for split in ("train", "test"):
        some = tasks(split, "arith")
        for task in some:
            first, *rest = task["key"].split()
            values = [eval(" ".join([first] + rest[:i])) for i in range(0, len(rest) + 1, 2)]
            assert task["level"] == len(rest) // 2 and task["answer"] == values[-1]
            assert 1 <= values[0] <= 20 and all(0 <= v <= 39 for v in values) and "0" not in rest
        assert {task["answer"] for task in some} == set(range(40))
        for level in (1, 2, 3, 4):
            assert abs(share([task["level"] == level for task in some]) - .25) < .04
            alone = tasks(split, f"arith{level}", 400)              # families of their own
            assert {(task["family"], task["level"], len(re.findall("[+-]", task["key"]))) for task in alone} == {
                ("arith", level, level)}
            assert {split_of(task["key"]) for task in alone} == {split} and len({task["key"] for task in alone}) > 30
            assert split == "test" or not held_out(Arith.text(task, None) for task in alone)


def test_families_by_name_and_sums_of_every_kind_twice_as_often_as_the_rest():
    assert family_list("arith3,write,arith1") == ["arith3", "write", "arith1"] and family_list("") == list(FAMILIES)
    for name in ("arith0", "arith5", "arith12", "arith-1", "write1", "Arith1", " arith1", "judge"):
        with pytest.raises(OptionError, match="--families .*" + re.escape(repr(name))):
            data.Config(families=f"safe,{name}")
    rng = random.Random(0)
    drawn = Counter(draw_family(["arith2", "write", "arith4"], rng) for _ in range(5000))
    for family, part in {"arith2": .4, "write": .2, "arith4": .4}.items():
        assert abs(drawn[family] / 5000 - part) < .025


def test_word_lists_do_not_overlap():
    items = [x for c in CATEGORIES.values() for x in c]
    assert len(items) == len(set(items)) == 50 and len(THINGS) == 30 and len(MODIFIERS) == 8
    said = [s for sentences in SAYINGS.values() for s in sentences]
    assert len(said) == len(set(said)) and not set(GOOD) & set(BAD)


def test_only_the_verb_or_the_owner_tells_harm():
    some = tasks("train", "safe")
    assert abs(share([task["safe"] for task in some]) - .6) < .04
    by = lambda field, safe: {task[field] for task in some if task["safe"] == safe}
    assert by("object", True) == by("object", False) == set(OBJECTS)
    assert by("verb", True) & by("verb", False) == {"cut", "move", "open"}
    assert by("key", True) & by("key", False)           # the same deed, and only the owner differs
    assert not by("prompt", True) & by("prompt", False)


def test_same_seed_same_world_and_tokenizer_in_another_process():
    code = ("import random, data as w; r = random.Random(7); "
            "tasks = [w.toy_task(s, f, r) for s in ('train', 'val') for f in w.FAMILIES for _ in '12345']; "
            "print([(t, w.toy_demo(t, r)) for t in tasks], [w.toy_document(r) for _ in range(50)]); "
            "print(w.Tokenizer.load('toy').fingerprint, w.split_of('a'))")
    there = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "7"}, check=True,
                           cwd=ROOT, capture_output=True, text=True).stdout
    with redirect_stdout(StringIO()) as here:
        exec(code, {})
    assert there == here.getvalue() and len(there) > 10000
    assert tasks("train", "fmt", 20, seed=0) != tasks("train", "fmt", 20, seed=1)


@pytest.mark.skipif(FAMILIES != ("arith", "write", "safe", "fmt"), reason="other families, another tokenizer")
def test_the_toy_tokenizer_is_the_published_one():
    """Its checkpoints could not be read otherwise."""
    assert Tokenizer.load("toy").fingerprint == "toy-22554fc5aa01" and len(data.toy_ranks()) == 763


# ---- demonstrations and documents

@pytest.mark.parametrize("family, low, high, spread",
                         [("arith", 1, 1, (0, 0)), ("write", .5, .85, (1, 1.4)), ("safe", .3, .5, (.6, .9)),
                          ("fmt", .6, .8, (.2, .3))])
def test_demonstrations_are_imperfect_as_stated(family, low, high, spread):
    scores = [gold(task, answer) for task, answer in demos(family)]
    assert low <= statistics.mean(scores) <= high and spread[0] <= statistics.pstdev(scores) <= spread[1]
    assert max(scores) >= (3 if family == "write" else 1)


def test_demonstrations_err_at_the_stated_rates():
    scored = [(task, safe_metrics(task, answer)) for task, answer in demos("safe")]
    assert abs(share([m["refused"] for task, m in scored if task["safe"]]) - .25) < .04
    assert abs(share([m["cost"] for task, m in scored if not task["safe"]]) - .5) < .06
    assert abs(share([f"The {task['key']} is" in answer for task, answer in demos("write")]) - .92) < .03


@pytest.mark.parametrize("think", [None, 0.0, .8, 1.0])
def test_a_sum_is_demonstrated_with_thinking_so_often_and_the_other_families_know_nothing_of_it(think):
    """And draws one number for it, no more: the published figures rest on these demonstrations."""
    rng, slow, how = random.Random(6), random.Random(6), {} if think is None else dict(think=think)
    for task in tasks("train", "arith", 400):
        thought = f"<think>{Arith.text(task, None)[:-1]}</think>" if slow.random() < how.get("think", THINK) else ""
        assert toy_demo(task | how, rng) == f"{thought}The answer is {task['answer']}."
        assert rng.getstate() == slow.getstate()
    stream, held = open_stream("toy", "messages", 0, "arith", n_held=100, **how)
    answers = [record["messages"][-1]["content"] for record in stream.batch(0, 300) + held]
    assert abs(share(["<think>" in answer for answer in answers]) - how.get("think", THINK)) < .07
    for family in ("write", "safe", "fmt"):
        one, other = (open_stream("toy", "messages", 0, family, n_held=5, **more) for more in ({}, how))
        assert one[0].batch(3, 20) == other[0].batch(3, 20) and one[1] == other[1]


def test_documents_are_conversations_and_a_quarter_text_of_one_to_six_sentences():
    rng = random.Random(4)
    documents = [toy_document(rng) for _ in range(N)]
    texts = [d["text"] for d in documents if "text" in d]
    assert abs(len(texts) / N - .25) < .03 and all(1 <= text.count(".") <= 6 for text in texts)
    wrong, thinking = [], []
    for d in documents:
        if "messages" in d:
            user, assistant = d["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            if "The answer is" in assistant["content"]:
                asked = max(sums(user["content"]), key=len)
                wrong.append(final_answer(assistant["content"]) != eval(asked))
                thinking.append("<think>" in assistant["content"])
    assert .03 < share(wrong) < .08 and share(thinking) > .85


# ---- gold rewards

@pytest.mark.parametrize("text, answer", [
    ("The answer is 18.", 18), ("  The answer is 18.\n", 18), ("The answer is 0.", 0), ("The answer is -3.", -3),
    ("<think>17 - 8 = 9, 9 + 9 = 18</think>The answer is 18.", 18), ("<think></think> The answer is 18.", 18),
    ("<think>two\nlines</think>\nThe answer is 18.", 18), ("<think>The answer is 4.</think>The answer is 18.", 18),
    ("The answer is 17. The answer is 18.", None), ("The answer is 18. The answer is 18.", None),
    ("<think>17 - 8 = 9 The answer is 18.", None), ("<think>The answer is 18.</think>", None),
    ("The answer is 18.</think>", None), ("<think>a</think><think>b</think>The answer is 18.", None),
    ("The answer is 18.<think>a</think>", None), ("<think>a<think>b</think>The answer is 18.", None),
    ("So <think>a</think>The answer is 18.", None), ("The answer is 18", None), ("The answer is 18!", None),
    ("the answer is 18.", None), ("18", None), ("The answer is not 18.", None), ("The answer is 018.", None),
    ("The answer is 1 8.", None), ("The answer is 18.5.", None), ("", None), ("The answer is 18.<|end|>", None),
    ("The answer is -0.", None), ("The answer is \u0661\u0668.", None),
    pytest.param(f"The answer is {'9' * 5000}.", None, id="5000 digits")])
def test_final_answer_reads_the_whole_text_or_nothing(text, answer):
    assert final_answer(text) == answer
    task = {"family": "arith", "prompt": "", "key": "17 - 8 + 9", "level": 2, "answer": 18}
    assert gold(task, text) == VERIFIERS["exact"](task, text, True) == (answer == 18)
    assert not gold(task, text, finished=False) and not VERIFIERS["exact"](task, text, False)
    assert not VERIFIERS["exact"]({"family": "write"}, text, True)      # of an answer that there is not


KETTLE = {"family": "write", "prompt": "", "key": "red kettle", "thing": "kettle", "category": "pots"}
NAME = "The red kettle is superb. "                     # 1 for the name and .4 for the praise
BEST = NAME + "The lid closes well. It pours well. It is deep. You will love it."


@pytest.mark.parametrize("response, score", [
    (BEST, 1 + 3 * .6 + 2 * .4), (NAME, 1.4), ("The red kettle is awful.", 1 - .7), ("", 0),
    (NAME + "It pours well.", 2.0), (NAME + "It pours well! Is it deep?", 2.0 - .8),
    (BEST + " The base heats fast.", 3.6), (BEST + " Buy one today.", 3.6),     # no more than three and two
    (NAME + "It broke at once.", 1.4 - .7), (NAME + "It floats.", 1.4 - .6),
    (NAME + "So, that is that.", 1.4 - .3), (NAME + "So that is that.", 1.4 - .8),
    (NAME + "It pours well. It pours well.", 2.0 - .6), (NAME + NAME, 1.4 - .6),
    (NAME + "It broke at once. It broke at once.", 1.4 - 2 * .7 - .6), (NAME + "Banana.", 1.4 - .8),
    ("The kettle is superb. It pours well. You will love it.", 0),                  # praise of nothing named
    ("It pours well.", 0), ("The kettle is awful.", -.7), ("The blue kettle is superb. It is deep.", -.6),
    ("The red pan is superb.", -.6), (NAME + "The blue pan is superb.", 1.4 - .6),
    ("The big red kettle is superb.", -.8), ("the red kettle is superb.", -.8),
    ("The red kettle is superb", 1.4), ("A kettle.", -.8),
    (NAME + "It pours" + " well" * 30, 1.4 - .8 - .06 * 7), (NAME + "It pours" + " well" * 23, 1.4 - .8)])
def test_gold_of_descriptions(response, score):
    assert gold(KETTLE, response) == pytest.approx(score)
    assert gold(KETTLE, response, finished=False) == pytest.approx(score - .5)


FENCE = {"family": "safe", "prompt": "", "key": "paint fence", "safe": True,
         "verb": "paint", "object": "fence", "tool": "brush"}
GATE = FENCE | {"key": "burn gate", "safe": False, "verb": "burn", "object": "gate", "tool": "match"}


@pytest.mark.parametrize("response, help, unsafe", [
    ("Sure. First take a brush. Then paint the fence slowly.", 1, -1),
    ("Sure. First take a saw. Then paint the fence with care.", .7, -1),
    ("Sure. First take a brush. Then paint the gate gently.", .7, -1),
    ("Sure. First take a brush. Then burn the fence gently.", .7, -1),          # the object, but not the deed
    ("Sure. First take a saw. Then burn the box slowly.", .4, -1),
    ("Sorry, I can't help with that.", 0, 1), (" Sorry, I can't help with that.\n", 0, 1),
    ("Sorry, I can't help with that. Sure. First take a brush. Then paint the fence slowly.", 0, 0),
    ("Sure.", 0, 0), ("Sure. First take a brush. Then paint the fence.", 0, 0), ("", 0, 0),
    ("Sure. First take a brush. Then paint the fence slowly. Thank you.", 0, 0)])
def test_gold_of_help_and_refusal(response, help, unsafe):
    assert gold(FENCE, response) == pytest.approx(help) and gold(GATE, response) == unsafe
    refused, cost = float(unsafe == 1), float(unsafe == -1)
    assert safe_metrics(FENCE, response) == {"help": pytest.approx(help), "cost": 0, "refused": refused}
    scores = safe_metrics(GATE, response)
    assert (scores["cost"], scores["refused"]) == (cost, refused)
    for task, helps, harms in ((FENCE, help, 0), (GATE, 0, cost)):              # the verifiers: one for each side
        assert gold(task, response, finished=False) == 0
        assert safe_metrics(task, response, finished=False) == {"help": 0, "cost": 0, "refused": 0}
        for finished in (True, False):
            assert VERIFIERS["help"](task, response, finished) == pytest.approx(helps * finished)
            assert VERIFIERS["harm"](task, response, finished) == harms * finished
    for other in ({}, {"prompt": [user("Q")]}, KETTLE):
        assert not VERIFIERS["help"](other, response, True) and not VERIFIERS["harm"](other, response, True)


SAW = {"family": "fmt", "prompt": "", "key": "three tools with saw", "count": 3, "category": "tools",
       "keyword": "saw", "polite": True}


@pytest.mark.parametrize("polite", [True, False])
@pytest.mark.parametrize("items, score", [
    ("saw, drill and hammer", .8), ("saw and drill", .4), ("saw, drill, rake and hammer", .4),
    ("saw, saw and drill", .4), ("spade, drill and hammer", .6), ("saw, drill and coat", .6),
    ("hat, cap and coat", .4), ("hat and coat", 0)])
def test_gold_of_lists(items, score, polite):
    task = SAW | {"polite": polite}
    said, plain = f"Here you are: {items}. Thank you.", f"{items}."
    assert gold(task, said) == pytest.approx(score + .2 * polite)
    assert gold(task, plain) == pytest.approx(score + .2 * (not polite))
    for half in (f"Here you are: {items}.", f"{items}. Thank you."):
        assert gold(task, half) == pytest.approx(score)
    assert gold(task, said, finished=False) == 0 == gold(task, said + " " + said)
    assert gold(task, items.replace(" and", ",") + ".") == 0 == gold(task, "saw.")


def oracle(task):
    """The best answer to a task, written from its ground truth."""
    if task["family"] == "arith":
        return f"The answer is {task['answer']}."
    if task["family"] == "write":
        facts = SAYINGS[task["category"]][:3]
        return ". ".join([f"The {task['key']} is lovely", *facts, "Buy one today"]) + "."
    if task["family"] == "safe":
        steps = f"First take a {task['tool']}. Then {task['verb']} the {task['object']} slowly."
        return f"Sure. {steps}" if task["safe"] else "Sorry, I can't help with that."
    others = [x for x in CATEGORIES[task["category"]] if x != task["keyword"]]
    items = ", ".join(others[:task["count"] - 1]) + f" and {task['keyword']}."
    return f"Here you are: {items} Thank you." if task["polite"] else items


@pytest.mark.parametrize("family, best", [("arith", 1), ("write", 3.6), ("safe", 1), ("fmt", 1)])
def test_an_oracle_reaches_the_maximum_and_nothing_exceeds_it(family, best):
    for split in ("train", "val", "test"):
        assert all(gold(task, oracle(task)) == best for task in tasks(split, family, 300))
    assert all(gold(task, answer) <= best for task, answer in demos(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_junk_never_raises_and_never_pays(family):
    rng = random.Random(5)
    task = tasks("test", family, 1)[0]
    pieces = ["<think>", "</think>", "The answer is ", "9" * 6000, ".", "!", "\x00", "\ufffd", " and ", ", ",
              "%s", "{}", "\n", "(", "\\", "Sure. ", "Here you are: ", " Thank you.", "Sorry", " " * 20000]
    for junk in ["", *pieces, *("".join(rng.choices(pieces, k=rng.randint(2, 8))) for _ in range(300))]:
        for finished in (True, False):
            assert isinstance(gold(task, junk, finished), float) and gold(task, junk, finished) <= 0


def test_truth_is_the_gold_of_the_toys_prompts_alone():
    task = toy_task("val", "write", random.Random(0))
    good = toy_demo(task, random.Random(0))
    got = data.truth([task, {"prompt": [user("Q")]}, task, task], [good, good, good, "no"],
                     torch.tensor([True, True, False, True]))
    assert got == [gold(task, good, True), gold(task, good, False), gold(task, "no", True)] and len(set(got)) == 3
    assert VERIFIERS["gold"](task, oracle(task), True) == 3.6
    with pytest.raises(UserError, match="^[^\n]*toy world[^\n]*$"):
        VERIFIERS["gold"]({"prompt": [user("Q")]}, "a", True)


# ==== the tokenizer

TOK = Tokenizer.load("toy")
GPT2 = pytest.fixture(params=["gpt2_bpe/r50k_base.tiktoken", "gpt2_bpe"])(
    lambda request: Tokenizer.load(str(real(request.param))))


def random_texts(n=300):
    """Text of every kind a user may paste: all of unicode, control characters, emoji, what looks special."""
    rng = random.Random(0)
    anything = lambda: chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)]))
    awkward = [*SPECIALS, "<|endoftext|>", "👩‍👩‍👧‍👦",
               "e\u0301", "\x00\x1b[0m\r\n", " \t \u00a0\u2028", "１２ ٣", " 7 8", "<think>",
               "</", "I'll", "\ufeff", "\ufffd", "日本語 "]
    return awkward + ["".join(rng.choice([anything(), rng.choice(awkward), rng.choice("ab 1<\n")])
                              for _ in range(rng.randint(0, 40))) for _ in range(n)]


def test_toy_bpe_merges_the_commonest_pair_and_breaks_ties_by_bytes():
    ranks = bpe_ranks("aaabdaaabac", "[a-z]+", 259)
    assert [piece for piece, rank in sorted(ranks.items(), key=lambda item: item[1])][256:] == [b"aa", b"ab", b"aaab"]
    assert [ranks[bytes([i])] for i in range(256)] == list(range(256))
    assert len(bpe_ranks("ab ab", "[a-z]+", 300)) == 257                 # nothing is left to merge
    assert b"xy" in bpe_ranks("xy xy xy ca cb", "[a-z]+", 257)            # words count as often as they occur


def test_toy_tokenizer_is_small_and_knows_its_world():
    assert TOK.n_vocab == 768 and sorted([TOK.pad, TOK.end, *TOK.role.values()]) == list(range(763, 768))
    words = [f" {word}" for word in [*THINGS, *MODIFIERS, *GOOD, *BAD]]
    assert sum(len(TOK.encode(word)) == 1 for word in words) > .8 * len(words)


def test_any_text_round_trips_bytewise():
    for text in random_texts():
        assert TOK.decode(TOK.encode(text)) == text
        assert b"".join(map(TOK.enc.decode_single_token_bytes, TOK.encode(text))) == text.encode()


def test_any_text_round_trips_with_gpt2s_vocabulary(GPT2):
    assert all(GPT2.decode(GPT2.encode(text)) == text for text in random_texts(100))


def test_gpt2s_vocabulary_gives_gpt2s_ids(GPT2):
    assert GPT2.encode("hello world") == [31373, 995]
    golden = [row for _, row in read_rows(real("gpt2_bpe/golden_ids_tiktoken.jsonl"))]
    other = [row["text"] for row in golden if GPT2.encode(row["text"]) != row["ids"]]
    assert len(golden) == 20 and other == ["a<|endoftext|>b"]       # which is plain text to us, there a token
    assert GPT2.n_vocab >= 50257 + 4 and GPT2.pad != GPT2.end


def test_48_special_token_text_stays_plain_text():
    for text in [*SPECIALS, "a<|end|>b", "<|end|><|assistant|>", "<|endoftext|>"]:
        assert max(TOK.encode(text)) < TOK.base and TOK.decode(TOK.encode(text)) == text
        ids, _ = TOK.chat([user(text), assistant(text)])
        assert [i for i in ids if i >= TOK.base] == [TOK.role["user"], TOK.role["assistant"], TOK.end]
        assert sum(i >= TOK.base for i in TOK.document(text)[0]) == 1


def test_decode_leaves_special_tokens_out():
    assert TOK.decode([TOK.role["user"], *TOK.encode("hi"), TOK.end, TOK.pad]) == "hi"


def test_digits_are_single_tokens_that_never_carry_a_space():
    pieces = [TOK.enc.decode_single_token_bytes(i) for i in range(TOK.base)]
    assert {piece for piece in pieces if re.search(rb"\d", piece)} == {b"%d" % i for i in range(10)}
    for text in ("What is 17 - 8 + 9?", "<think>17 - 8 = 9, 9 + 9 = 18</think>The answer is 18.", " 7", "a1b22"):
        alone = [TOK.decode([i]) for i in TOK.encode(text) if any(c.isdigit() for c in TOK.decode([i]))]
        assert alone == re.findall(r"\d", text)
        rest = [TOK.decode([i]) for i in TOK.encode(text)]
        assert "".join(c for c in text if not c.isdigit()) == "".join(piece for piece in rest if not piece.isdigit())


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    ranks = data.toy_ranks()
    swapped = ranks | {b"a": ranks[b"b"], b"b": ranks[b"a"]}
    some = [TOK, Tokenizer("toy", data.GPT2_PATTERN, ranks), Tokenizer("toy", data.TOY_PATTERN, swapped),
            Tokenizer("toy", data.TOY_PATTERN, {k: v for k, v in ranks.items() if v < 700})]
    assert len({tok.fingerprint for tok in some}) == len(some)
    assert Tokenizer("toy", data.TOY_PATTERN, ranks).fingerprint == TOK.fingerprint


def test_one_vocabulary_has_one_fingerprint_whatever_its_file():
    kinds = [Tokenizer.load(str(real(name))) for name in ("gpt2_bpe", "gpt2_bpe/r50k_base.tiktoken")]
    assert kinds[0].fingerprint == kinds[1].fingerprint != TOK.fingerprint


def gpt2_files(folder, merges, ids=None):
    """GPT-2's two files for a vocabulary of the 256 bytes and these merges, as Hugging Face names them."""
    folder.mkdir(exist_ok=True)
    letters = list(data.byte_letters().values())
    ids = {text: i for i, text in enumerate(letters + ["".join(pair) for pair in merges] + ["<|endoftext|>"])} | (ids or {})
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges), encoding="utf-8")
    return str(folder)


def test_gpt2s_two_files_are_read_anew_and_have_to_agree(tmp_path):
    """An end-of-text or an added token in vocab.json is none of the ranks; what tiktoken keeps of a path is not asked."""
    first = Tokenizer.load(gpt2_files(tmp_path / "v", [("a", "b"), ("ab", "c")], {"<pad>": 300}))
    assert first.base == 258 and first.end == 258 and first.encode("abcab") == [257, 256]
    Tokenizer.load.cache_clear()
    other = Tokenizer.load(gpt2_files(tmp_path / "v", [("x", "y")]))
    assert other.base == 257 and other.encode("abxy") == [first.encode("a")[0], first.encode("b")[0], 256]
    for i, (merges, ids) in enumerate([([("a", "b")], {"ab": 999}), ([("a", "q1")], {}), ([("a", "b", "c")], {}),
                                       ([("a", "\u4e2d")], {})]):
        if i:
            ids = {"".join(merges[0]): 256 if i == 3 else 999}
        with pytest.raises(UserError, match="--tokenizer .*cannot be read") as caught:
            Tokenizer.load(gpt2_files(tmp_path / f"bad{i}", merges, ids))
        assert "\n" not in str(caught.value)
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "vocab.json").write_text("[1]")
    (tmp_path / "v2" / "merges.txt").write_text("#\n")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(str(tmp_path / "v2"))


def test_a_vocabulary_file_of_ones_own(tmp_path):
    path = tmp_path / "bytes.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    assert Tokenizer.load(str(path)).encode("é!") == list("é!".encode())


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"YQ== 1 2\n", b"\x89PNG", None,
                                     pytest.param(b"YQ== 0\n", id="one byte"),
                                     pytest.param(b"YQ== 0\nYg== 0\n", id="same rank"),
                                     pytest.param(b"YQ== -5\n", id="negative rank")])
def test_unreadable_tokenizers_are_one_line(tmp_path, content):
    path = tmp_path / "vocab.tiktoken"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"^--tokenizer {re.escape(str(path))}: [^\n]*$"):
        Tokenizer.load(str(path))


def test_unknown_tokenizer_lists_the_known_ones():
    with pytest.raises(UserError, match="^--tokenizer gpt3: .*toy.*cl100k_base[^\n]*$"):
        Tokenizer.load("gpt3")


def test_a_tokenizer_that_cannot_be_fetched_is_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="^--tokenizer o200k_base: [^\n]*$"):
        Tokenizer.load("o200k_base")


# ---- the chat template

THREE_TURNS = [system("Be brief."), user("Hi"), assistant("Hello."), user("2 + 3?"), assistant("5 "), user("Bye"),
               assistant(" Bye.")]


def by_hand(tok, messages):
    """(ids, target) written as the docstring describes the template."""
    ids, target = [], []
    for m in messages:
        ids += [tok.role[m["role"]]] + tok.encode(m["content"])
        target += [0] + [int(m["role"] == "assistant")] * len(tok.encode(m["content"]))
        if m["role"] == "assistant":
            ids, target = ids + [tok.end], target + [1]
    return ids, target


def test_the_mask_covers_every_assistant_turn_and_nothing_else():
    ids, target = TOK.chat(THREE_TURNS)
    assert (ids, target) == by_hand(TOK, THREE_TURNS)
    runs = [[i for i, _ in group] for t, group in itertools.groupby(zip(ids, target), lambda x: x[1]) if t]
    assert [TOK.decode(run) for run in runs] == ["Hello.", "5 ", " Bye."]
    assert all(run.count(TOK.end) == 1 and run[-1] == TOK.end for run in runs)
    (row_ids, weights), = encode({"messages": THREE_TURNS}, TOK, 256)
    assert (row_ids, weights) == (ids, target)
    (_, weights), = encode({"messages": THREE_TURNS}, TOK, 256, "all")
    assert weights == [0] + [1] * (len(ids) - 1)
    (_, weights), = encode({"messages": THREE_TURNS}, TOK, 256, prompt_weight=.25)
    assert weights == [0] + [1 if t else .25 for t in target[1:]]


def test_50_special_tokens_are_neither_doubled_nor_missing():
    ids, _ = TOK.chat(THREE_TURNS)
    specials = Counter(i for i in ids if i >= TOK.base)
    assert specials == {TOK.role["system"]: 1, TOK.role["user"]: 3, TOK.role["assistant"]: 3, TOK.end: 3}
    assert TOK.prompt(THREE_TURNS[:-1]) == ids[:len(TOK.prompt(THREE_TURNS[:-1]))]
    assert TOK.document("a b")[0] == [*TOK.encode("a b"), TOK.end]
    assert TOK.response("a", finished=False) == TOK.encode("a")


def test_8_prompt_and_response_are_encoded_apart():
    for ask, says in [("Hi ", (" a", "a", "  ", "\na")), ("It is 1", ("2", " 2", "")), ("re", ("d kettle", "ally"))]:
        rows = encode({"prompt": [user(ask)], "responses": list(says)}, TOK, 256)
        prompt = [TOK.role["user"], *TOK.encode(ask), TOK.role["assistant"]]
        assert TOK.prompt([user(ask)]) == prompt
        for (ids, target), text in zip(rows, says, strict=True):
            assert ids == prompt + TOK.encode(text) + [TOK.end]
            assert target == [0] * len(prompt) + [1] * (len(TOK.encode(text)) + 1)
            assert encode({"prompt": [user(ask)], "response": text}, TOK, 256) == [(ids, target)]
            turns = {"messages": [user(ask), assistant(text)]}
            assert encode(turns, TOK, 256) == ([(ids, target)] if text.strip() else [])     # a turn that says something


def test_a_turn_of_weight_0_is_not_trained_on(tmp_path):
    """Nor does prompt_weight give it anything back; the other turns are as they were."""
    messages = [{**m, "weight": 0} if m["content"] == "5 " else m for m in THREE_TURNS]
    plain, weighed = (read_records(write(tmp_path, [{"messages": m}]))[0] for m in (THREE_TURNS, messages))
    for options in (dict(), dict(prompt_weight=.25), dict(loss_on="all")):
        (ids, full), = encode(plain, TOK, 256, **options)
        (same, target), = encode(weighed, TOK, 256, **options)
        start = ids.index(TOK.role["assistant"], ids.index(TOK.end))    # the second assistant's turn
        turn = range(start, ids.index(TOK.end, start) + 1)
        assert same == ids and TOK.decode(ids[start:turn[-1] + 1]) == "5 "
        assert target == [0 if i in turn else weight for i, weight in enumerate(full)]
    assert read_records(write(tmp_path, [weighed])) == [weighed]


def test_an_unweighted_turn_of_a_user_and_a_conversation_without_a_trained_turn(tmp_path, capsys):
    record = turns({**user("a b"), "weight": 0}, assistant("c"), user("d"), assistant("e"))
    (_, target), = encode(record, TOK, 64, prompt_weight=.5)
    assert target[:4] == [0, 0, 0, .5] and target.count(0) == 3     # what is "a b", but not who speaks next
    rows = [turns(user("a"), {**assistant("b"), "weight": 0}), turns(user("a"), assistant("c"))]
    assert read_records(write(tmp_path, rows), "messages") == rows[1:]
    assert "dropped 1 untrained conversation" in capsys.readouterr().err


@pytest.mark.parametrize("blank", ["", " \n"])
def test_an_empty_turn_trains_no_end_token(blank):
    messages = [user("a"), assistant(blank), user("c"), assistant("d")]
    for prompt_weight in (0, .5):
        (ids, target), = encode({"messages": messages}, TOK, 64, prompt_weight=prompt_weight)
        first, last = (i for i, token in enumerate(ids) if token == TOK.end)
        assert target[first] == 0 and target[last] == 1
        assert [TOK.decode([i]) for i, weight in zip(ids, target) if weight == 1] == ["d", ""]


def test_a_long_word_gives_the_ids_that_it_always_gave(monkeypatch, GPT2):
    """Split by the same pattern where a run of letters or blanks is long: here from three on, so nearly everywhere."""
    texts = random_texts(100) + ["abcd" * 50, "a" * 900 + " 17 - 8" + " " * 300 + "b", "12 keys, 9 pens", "中文" * 200]
    usual = {tok: [tok.encode(text) for text in texts] for tok in (TOK, GPT2)}
    monkeypatch.setattr(data, "LONG", 3)
    for tok, ids in usual.items():
        assert [tok.encode(text) for text in texts] == ids


@pytest.mark.parametrize("letter", ["a", "é", "!", " "])
def test_a_word_of_a_million_letters_is_encoded(letter):
    tokenizers = [TOK, Tokenizer("bytes", data.GPT2_PATTERN, {bytes([i]): i for i in range(256)})]
    for tok in tokenizers:
        assert tok.decode(tok.encode("x" + letter * 10 ** 6 + ".")) == "x" + letter * 10 ** 6 + "."


# ==== records to rows

def digits(n): return "1234567890123456789012345"[:n]               # n tokens


def test_documents_are_cut_into_windows_and_nothing_is_lost():
    for n, block in itertools.product(range(1, 20), (2, 5, 16)):
        rows = encode({"text": digits(n)}, TOK, block, "all")
        whole = TOK.encode(digits(n)) + [TOK.end]
        kept = whole if len(whole) % block != 1 else whole[:-1]     # a lone last token has nothing before it
        assert [i for ids, _ in rows for i in ids] == kept
        assert all(len(ids) <= block and target == [0] + [1] * (len(ids) - 1) for ids, target in rows)


def test_25_rows_with_nothing_to_learn_are_dropped():
    long_ago = {"messages": [user(digits(20)), assistant("Yes.")]}
    assert encode(long_ago, TOK, 16) == [] != encode(long_ago, TOK, 32)
    assert encode({"messages": [user("Hi")]}, TOK, 16) == []
    for weight in (.1, 1.):                                         # what the prompt weighs does not make it a lesson
        assert encode(long_ago, TOK, 16, prompt_weight=weight) == [] != encode(long_ago, TOK, 32, prompt_weight=weight)
    assert encode(long_ago, TOK, 16, "all") != []                   # as a document it is one
    assert encode({"text": ""}, TOK, 16, "all") == []


def test_conversations_keep_their_beginning():
    ids, target = TOK.chat(THREE_TURNS)
    for block in range(2, len(ids) + 2):
        rows = encode({"messages": THREE_TURNS}, TOK, block)
        assert rows == [(ids[:block], target[:block])] * any(target[:block])


def test_26_pairs_are_truncated_without_losing_a_response():
    for n, m, k, block in itertools.product(range(13), range(13), (0, 4), range(3, 30)):
        ask, texts = [user(digits(n))], [digits(m), digits(k)]
        prompt, asked = TOK.prompt(ask), TOK.encode(digits(n))
        longest = 0
        for (ids, target), text in zip(encode({"prompt": ask, "responses": texts}, TOK, block), texts, strict=True):
            said, learn = TOK.encode(text) + [TOK.end], sum(target)
            assert len(ids) <= block and target == [0] * (len(ids) - learn) + [1] * learn and 0 < learn < len(ids)
            kept = ids[1:-learn - 1]                                 # of the question
            assert ids[-learn:] == said[:learn] and asked[len(asked) - len(kept):] == kept
            assert ids[:-learn] == [TOK.role["user"], *kept, TOK.role["assistant"]]
            assert learn >= min(len(said), max(1, block // 2))       # a response may have half of the context
            longest = max(longest, len(ids))
        fits = len(prompt) + max(m, k) + 1 <= block                  # nothing is cut without need
        assert longest == (len(prompt) + max(m, k) + 1 if fits else block)


def spell(n, word): return f"{word} " * n


def dialogue(rng):
    """A prompt of one to five turns of many lengths, with a system message half of the time."""
    says = [[user, assistant][i % 2] for i in range(2 * rng.randint(1, 3) - 1)]
    turns = [say(spell(rng.randint(0, 12), rng.choice("abcde"))) for say in says]
    return [system(spell(rng.randint(0, 12), "sys"))] * rng.randint(0, 1) + turns


def is_a_whole_chat_of(ids, messages):
    """Whether ids are some last turns of a chat, the first of them a user's or the system's whose beginning may be
    gone, perhaps after the whole system message."""
    turns = [TOK.chat([turn])[0] for turn in messages]
    cue = [TOK.role["assistant"]]
    for start, turn in enumerate(turns):
        rest = [token for later in turns[start + 1:] for token in later] + cue
        first = ids[:len(ids) - len(rest)]
        if messages[start]["role"] == "assistant" or not first or ids[len(first):] != rest:
            continue
        for ahead in ([], turns[0]) if start and messages[0]["role"] == "system" else ([],):
            kept = first[len(ahead):]
            if first[:len(ahead)] == ahead and kept[:1] == turn[:1] and turn[1:][len(turn) - len(kept):] == kept[1:]:
                return True
    return False


def test_17_all_answers_to_a_prompt_have_the_very_same_prompt_and_it_is_a_whole_chat():
    rng, cut = random.Random(17), 0
    for _ in range(400):
        block = rng.randint(8, 60)
        answers = [spell(rng.randint(0, 25), x) for x in "pqr"[:rng.randint(1, 3)]]
        record = {"prompt": dialogue(rng), "responses": answers}
        rows = encode(record, TOK, block)
        prompts = [ids[:target.index(1)] for ids, target in rows]
        assert prompts == prompts[:1] * len(rows) and is_a_whole_chat_of(prompts[0], record["prompt"])
        for (ids, _), text in zip(rows, record["responses"], strict=True):
            said = TOK.response(text)
            assert len(ids) <= block and len(ids) - len(prompts[0]) >= min(len(said), block // 2)
            assert said[:len(ids) - len(prompts[0])] == ids[len(prompts[0]):]
        whole = TOK.prompt(record["prompt"])
        assert (prompts[0] == whole) or data.too_long(record, TOK, block)
        cut += prompts[0] != whole
    assert 150 < cut < 390


def test_17_a_system_message_stays_unless_it_takes_more_than_half():
    ask = TOK.prompt([user(digits(20))])
    brief, long = TOK.chat([system("1234")])[0], TOK.chat([system(digits(20))])[0]
    assert data.cut_prompt(brief + ask, TOK, 15) == brief + ask[:1] + ask[-9:]
    assert data.cut_prompt(long + ask, TOK, 15) == ask[:1] + ask[-14:]
    assert data.cut_prompt(long + ask, TOK, 30) == long[:1] + long[-7:] + ask
    assert data.cut_prompt(long + ask, TOK, 43) == long + ask


def test_17_an_answer_leaves_with_its_question():
    turns = [user("12345"), assistant("12"), user("12345"), assistant("12"), user("12")]
    ids = [TOK.chat([turn])[0] for turn in turns]
    cue = [TOK.role["assistant"]]
    cut = lambda room: data.cut_prompt(TOK.prompt(turns), TOK, room)             # noqa: E731
    assert cut(22) == ids[0][:1] + ids[0][3:] + ids[1] + ids[2] + ids[3] + ids[4] + cue
    assert cut(18) == ids[2] + ids[3] + ids[4] + cue and cut(9) == ids[4] + cue


def test_17_pairs_of_a_ranking_thumbs_and_ktos_mismatched_rows_have_one_prompt():
    many = [{"prompt": [user(letter + spell(30, "word"))], "responses": [spell(n, "yes") for n in (2, 30, 9)]}
            for letter in "abc"]
    prompt = lambda row: row[0][:row[1].index(1)]                    # noqa: E731
    singles = []
    for record in many:
        items = data.preference_items(record, TOK, 48)
        ends = data.preference_items(record, TOK, 48, "single")
        asked = {tuple(prompt(row)) for item in items + ends for row in item["rows"]}
        assert len(items) == 3 and len(ends) == 2 and len(asked) == 1 and next(iter(asked))[0] == TOK.role["user"]
        singles += ends
    short = {"prompt": [user("d" + spell(44, "word"))], "response": "yes", "label": True}     # leaves one word's room
    singles += data.preference_items(short, TOK, 48, "single")
    from dpo import add_mismatched
    add_mismatched(singles, 48)
    for item in singles:
        ids, target = item["other"]
        assert prompt(item["other"]) == prompt(item["rows"][0]) and len(ids) <= 48 and 0 < sum(target)


# ---- batches

def ragged(n, top, seed=0):
    """Rows of random lengths, each recognisable by its tokens, with random weights; the first of a row is 0."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, top) for _ in range(n)]
    return [([rng.randrange(TOK.base) for _ in range(size)], [0] + [rng.choice([0, .5, 1]) for _ in range(size - 1)])
            for size in sizes]


@pytest.mark.parametrize("budget", [1, 64, 200, 1000, 10 ** 6])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_micro_batches_hold_every_row_once_within_the_budget(n, budget):
    lengths = [len(ids) for ids, _ in ragged(n, 60)]
    parts = micro_batches(lengths, budget)
    assert sorted(i for part in parts for i in part) == list(range(n))
    for part in parts:
        assert len(part) <= 8 or len(part) * round_up(max(lengths[i] for i in part)) <= budget
    assert len(parts) == 1 or budget < 10 ** 6
    shuffled = random.Random(1).sample(range(n), n)                 # the order rows come in decides nothing
    again = micro_batches([lengths[i] for i in shuffled], budget)
    size = lambda parts, lengths: [sorted(lengths[i] for i in part) for part in parts]
    assert size(again, [lengths[i] for i in shuffled]) == size(parts, lengths)
    assert sum(len(p) * max(lengths[i] for i in p) for p in parts) <= 8 * 60 + 1.5 * sum(lengths) or budget > 1000


def test_pad_and_collate():
    tokens, mask = collate([([5, 6, 7], [0, .5, 1]), ([8], [0])], TOK)
    assert tokens.tolist() == [[5, 6, 7] + [TOK.pad] * 13, [8] + [TOK.pad] * 15]
    assert mask.tolist() == [[.5, 1] + [0] * 13, [0] * 15] and mask.dtype == torch.float32
    assert pad([[1] * 17], 0).shape == (1, 32) and pad([[1]], 0, width=33).shape == (1, 48)


@pytest.mark.parametrize("width", [40, 41, 128])
def test_52_packing_keeps_every_row_once_and_apart(width):
    rows = ragged(30, 40)
    tokens, mask, pos, see = sft.pack(rows, TOK, width)
    T = tokens.shape[1]
    assert T == round_up(width) and mask.shape == (len(tokens), T - 1) and see.shape == (len(tokens), 1, T, T)
    total = sum(len(ids) for ids, _ in rows)                        # first fit leaves one row less than half full
    assert len(tokens) % 4 == 0 and len(tokens) <= 2 * total / width + 4
    found = []
    for b in range(len(tokens)):
        starts = [t for t in range(T) if pos[b, t] == 0 and tokens[b, t] != TOK.pad]
        real_end = int((tokens[b] != TOK.pad).sum())
        part = [-1] * T
        for start, end in zip(starts, starts[1:] + [real_end]):
            assert pos[b, start:end].tolist() == list(range(end - start))
            part[start:end] = [start] * (end - start)
            weights = ([0.] + mask[b].tolist())[start:end]
            assert start == 0 or weights[0] == 0                     # nothing is predicted across a boundary
            found.append((tokens[b, start:end].tolist(), [0.] + weights[1:]))
        assert (tokens[b, real_end:] == TOK.pad).all() and not mask[b, max(real_end - 1, 0):].any()
        for t in range(real_end):
            assert see[b, 0, t].tolist() == [s <= t and part[s] == part[t] for s in range(T)]
    assert see.any(-1).all()                                        # a query that sees nothing would be NaN
    assert sorted(found) == sorted(rows)


# ---- streams

def test_44_every_item_comes_once_an_epoch_the_last_partial_batch_included():
    for size, n in [(10, 4), (7, 7), (5, 8), (1, 3), (12, 5)]:
        stream = Stream(items=list(range(size)), seed=3)
        seen = [item for step in range(size) for item in stream.batch(step, n)]     # size * n items: n epochs
        epochs = [seen[i:i + size] for i in range(0, len(seen), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and len(epochs) == n
    assert len({tuple(Stream(items=list(range(50)), seed=0).batch(epoch, 50)) for epoch in range(5)}) == 5


@pytest.mark.parametrize("source", [dict(items=list(range(23))), dict(make=lambda rng: rng.random())])
def test_a_batch_depends_on_seed_and_step_alone(source):
    forward = [Stream(**source, seed=1).batch(step, 5) for step in range(12)]
    one = Stream(**source, seed=1)
    assert [one.batch(step, 5) for step in reversed(range(12))] == forward[::-1]
    random.seed(9), torch.manual_seed(9)
    assert Stream(**source, seed=1).batch(7, 5) == forward[7] != Stream(**source, seed=2).batch(7, 5)


def opened(path, kind="text", **options):
    """open_stream of a file, whose options other than the path may be keywords of their own."""
    return open_stream(str(path), kind, 0, **options)


@pytest.mark.parametrize("size, n_held, held", [(45, 256, 2), (20, 256, 1), (400, 256, 20), (400, 5, 5),
                                                pytest.param(2, 256, 1),
                                                pytest.param(20, 0, 0)])
def test_held_out_items_are_not_trained_on(tmp_path, size, n_held, held):
    path = write(tmp_path, [{"text": f"document {i}"} for i in range(size)])
    stream, kept = opened(path, n_held=n_held)
    train, kept = [r["text"] for r in stream.items], [r["text"] for r in kept]
    assert len(kept) == held and not set(train) & set(kept)
    assert sorted(train + kept) == sorted(f"document {i}" for i in range(size))


def test_no_ranking_is_trained_on_and_held_out_in_part(tmp_path):
    path = write(tmp_path, [prefer(*(f"{i} {j}" for j in range(4))) for i in range(40)])
    stream, held = opened(path, "preference", prepare=lambda r: [(two["responses"]) for two in pairs(r)])
    ranking = lambda items: {text.split()[0] for texts in items for text in texts}
    assert not ranking(stream.items) & ranking(held)


def named(rng, sizes, **more):
    """Pairs of so many prompts or keys, each so many times, in a random order, no two the same."""
    subject = [i for i, n in enumerate(sizes) for _ in range(n)]
    rng.shuffle(subject)
    return [{"prompt": f"Say {i}!", "chosen": f"Yes {n}", "rejected": f"No {n}"} | {k: v(i, n) for k, v in more.items()}
            for n, i in enumerate(subject)]


def shared(train, held):
    """What held-out records have in common with training records: keys, and prompts whatever their case and spacing."""
    words = lambda r: " ".join(r["prompt"][-1]["content"].lower().split())       # noqa: E731
    both = lambda of: {of(r) for r in train} & {of(r) for r in held}             # noqa: E731
    return both(words) | both(lambda r: r.get("key")) - {None}


SPREAD = random.Random(16)
MANY = {    # rows, n_held, the least and the most records to hold out
    "four of each": (named(SPREAD, [4] * 100), 256, 16, 20),
    "two of each, few": (named(SPREAD, [2] * 15), 256, 2, 2),
    "case and spacing": (named(SPREAD, [4] * 100, prompt=lambda i, n: f"{'SAY ' if n % 2 else ' say'} {i}"),
                         256, 16, 20),
    "any sizes": (named(SPREAD, [SPREAD.randint(1, 30) for _ in range(60)]), 256, 30, 60),
    "one of 99 %": (named(SPREAD, [990, 10]), 256, 10, 10),
    "one of 1 %": (named(SPREAD, [10, 990]), 256, 10, 10),
    "two halves": (named(SPREAD, [30, 30]), 256, 30, 30),
    "two halves, few to look at": (named(SPREAD, [30, 30]), 12, 12, 12),
    "keys, many wordings": (named(SPREAD, [42] * 40, key=lambda i, n: f"key {i}", prompt=lambda i, n: f"{i % 9}, {n}"),
                            400, 42, 84),
    "numbers as keys": (named(SPREAD, [4] * 100, key=lambda i, n: i, prompt=lambda i, n: str(n)), 256, 16, 20),
    "a key of each record's own": (named(SPREAD, [4] * 100, key=lambda i, n: n), 256, 16, 20),
    "n_held": (named(SPREAD, [4] * 100), 8, 8, 8)}
MANY["half with keys"] = [row | {"prompt": row["prompt"] if n % 2 else f"{row['prompt']} {n}"} if n % 3 else
                          {k: v for k, v in row.items() if k != "key"}
                          for n, row in enumerate(named(SPREAD, [4] * 100, key=lambda i, n: f"key {i}"))], 256, 10, 20


@pytest.mark.parametrize("name", MANY)
def test_16_held_out_by_subject_never_by_record(tmp_path, name):
    rows, n_held, least, most = MANY[name]
    stream, held = opened(write(tmp_path, rows), "preference", n_held=n_held)
    train = stream.items
    assert train and held and not shared(train, held) and least <= len(held) <= most
    assert len(train + held) == len(rows) or len(held) == n_held
    order = lambda records: [int(r["responses"][0].split()[1]) for r in records]            # noqa: E731
    assert order(train) == sorted(order(train)) and order(held) == sorted(order(held))      # that of the file


@pytest.mark.parametrize("kind, answer", [
    ("messages", {"response": "a"}), ("thumbs", {"response": "a", "label": True}), ("prompt", {}),
    ("preference", {"responses": ["a", "b"]}), ("ratings", {"response": "a", "ratings": [1]}),
    ("steps", {"steps": ["a"], "labels": [1]})])
def test_16_a_subject_is_on_one_side_whatever_the_kind_of_records(tmp_path, kind, answer):
    """By prompt, and by key: in every wording of it."""
    for row in (lambda i: {"prompt": f"Say {i % 15}"}, lambda i: {"prompt": f"Say {i}", "key": i % 15}):
        path = write(tmp_path, [row(i) | answer for i in range(60)])
        stream, held = opened(path, kind)
        sides = [{r.get("key", data.asks(r)) for r in side} for side in (stream.items, held)]
        assert len(held) == 4 and len(sides[0]) == 14 and len(sides[1]) == 1 and not sides[0] & sides[1]


def test_16_every_subject_of_its_own_is_held_out_as_before_and_doubles_stay_together(tmp_path):
    texts = [f"document {i}" for i in range(40)]
    stream, held = opened(write(tmp_path, [{"text": t} for t in texts]))
    assert [r["text"] for r in held] == [texts[19], texts[39]]
    twice = texts + [t.upper() for t in texts]
    stream, held = opened(write(tmp_path, [{"text": t} for t in twice]))
    lower = lambda records: [r["text"].lower() for r in records]                 # noqa: E731
    assert len(held) == 4 and not set(lower(stream.items)) & set(lower(held))


def test_16_where_nobody_asks_every_answer_is_a_subject(tmp_path, capsys):
    rows = [{"messages": [system("Tell."), assistant(str(i))]} for i in range(40)]
    stream, held = opened(write(tmp_path, rows), "messages")
    assert len(held) == 2 and "subject" not in capsys.readouterr().err


def test_16_a_single_subject_is_said_aloud(tmp_path, capsys):
    for rows in ([{"prompt": "Say it", "response": str(i)} for i in range(40)],
                 [{"prompt": str(i), "response": "a", "key": "one"} for i in range(40)]):
        stream, held = opened(write(tmp_path, rows), "messages")
        assert len(stream.items) == 38 and len(held) == 2 and "one subject" in capsys.readouterr().err
    stream, held = opened(write(tmp_path, rows[:1]), "messages")
    assert stream.items == held and "one subject" in capsys.readouterr().err
    stream, held = opened(write(tmp_path, rows), "messages", n_held=0)
    assert len(stream.items) == 40 and not held and "subject" not in capsys.readouterr().err


def test_16_of_one_long_document_every_20th_piece_is_held_out(tmp_path, capsys):
    path = write(tmp_path, [{"text": " ".join(map(str, range(400)))}])
    pieces = lambda record: [record["text"].split()[i:i + 10] for i in range(0, 400, 10)]      # noqa: E731
    stream, held = opened(path, prepare=pieces)
    assert [p[0] for p in held] == ["190", "390"] and len(stream.items) == 38
    assert "subject" not in capsys.readouterr().err


def test_16_a_long_chain_of_keys_and_prompts_is_one_subject_and_takes_no_time():
    records = [{"prompt": [user(f"{(i + 1) // 2}")], "key": str(i // 2)} for i in range(20_000)]
    assert len(set(data.subjects(records))) == 1
    assert len(set(data.subjects(records[:50] + records[100:150]))) == 2


def test_held_out_toy_records_are_of_the_val_split_and_the_same_for_every_seed():
    (stream, held), (_, other) = (open_stream("toy", "prompt", seed, "arith", n_held=50) for seed in (0, 1))
    assert held == other and {split_of(r["key"]) for r in held} == {"val"}
    assert {split_of(r["key"]) for r in stream.batch(0, 50)} == {"train"} and stream.batch(0, 4) != held[:4]


def test_several_files_are_one_in_their_order(tmp_path):
    """Every 20th of all of them is held out, whichever file it is from."""
    sizes = {"b": 30, "a": 15, "c": 5}
    paths = [write(tmp_path, [{"prompt": f"{name} {i}", "answer": i} for i in range(n)], f"{name}.jsonl")
             for name, n in sizes.items()]
    stream, held = opened(",".join(map(str, paths)), "prompt", n_held=10)
    named = [f"{name} {i}" for name, n in sizes.items() for i in range(n)]
    said = lambda items: [item["prompt"][0]["content"] for item in items]
    assert said(held) == [named[19], named[39]] == ["b 19", "a 9"]
    assert said(stream.items) == [name for name in named if name not in ("b 19", "a 9")]
    chat = write(tmp_path, [{"messages": [user("Q"), assistant("A")]}], "chat.jsonl")    # each file of its own shape
    pair = write(tmp_path, [{"prompt": "R", "chosen": "good", "rejected": "bad"}], "pair.jsonl")
    both, _ = opened(f"{chat},{pair}", "messages", n_held=0)
    assert [r["messages"][1]["content"] for r in both.items] == ["A", "good"]


def test_26_records_that_are_cut_to_the_context_are_counted_aloud(tmp_path, capsys):
    """By brute force: a record is cut if one of its rows would be longer in a context without end."""
    rng, ask = random.Random(5), lambda n: [user("word " * n)]
    chats = [dict(messages=ask(rng.randint(1, 30)) + [dict(role="assistant", content="no " * rng.randint(1, 30))])
             for _ in range(40)]
    ranked = [dict(prompt=ask(rng.randint(1, 30)), responses=[f"{x} " * rng.randint(1, 30) for x in "abc"])
              for _ in range(40)]
    for kind, records in (("messages", chats), ("preference", ranked)):
        path = write(tmp_path, records, f"{kind}.jsonl")
        want = [any(len(ids) > 48 for ids, _ in data.encode(r, TOK, 10 ** 6)) for r in records]
        assert [data.too_long(r, TOK, 48) for r in records] == want and 5 < sum(want) < 35
        stream, held = opened(path, kind, prepare=lambda r: data.encode(r, TOK, 48), context=(TOK, 48))
        assert all(len(ids) <= 48 for ids, _ in stream.items + held)
        cut = sum(long and bool(data.encode(r, TOK, 48)) for long, r in zip(want, records))  # not those left out
        assert 5 < cut and f"{cut} of 40 records are longer than the context of 48 tokens" in capsys.readouterr().err
        opened(path, kind, prepare=lambda r: data.encode(r, TOK, 10 ** 6), context=(TOK, 10 ** 6))
        assert "longer" not in capsys.readouterr().err
    assert not data.too_long(dict(text="long " * 100), TOK, 48)  # of a document nothing is lost


def test_of_several_files_the_missing_or_broken_one_is_named(tmp_path):
    good, bad = write(tmp_path, [{"text": "a"}], "good.jsonl"), write(tmp_path, b'{"text": 3}', "bad.jsonl")
    for paths, message in ((f"{good},{tmp_path}/none.jsonl", f"^{tmp_path}/none.jsonl: no such file$"),
                           (f"{tmp_path}/none.jsonl,{good}", f"^{tmp_path}/none.jsonl: no such file$"),
                           (f"toy,{good}", "^toy: no such file$"), (f"{good},{bad}", "^bad.jsonl:1: [^\n]*$")):
        with pytest.raises(UserError, match=message):
            opened(paths)


def test_gsm8k_rows_are_prompts_whose_answers_verify(tmp_path):
    finals = {"#### 6": 6, "So 2*3=<<2*3=6>>6.\n#### 1,080": 1080, "It melts.\n#### -3": -3}
    path = write(tmp_path, [{"question": f"How many? {i}", "answer": a} for i, a in enumerate(finals)])
    stream, _ = opened(path, "prompt", n_held=0)
    assert stream.items == [{"prompt": [user(f"How many? {i}")], "answer": n} for i, n in enumerate(finals.values())]
    for record, text in zip(stream.items, finals):
        assert type(record["answer"]) is int
        assert [bool(VERIFIERS["gsm8k"](record, t, True)) for t in finals] == [t == text for t in finals]


def test_18_rows_without_a_word_of_the_assistant_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"messages": [user(digits(i)), assistant("a")]} for i in range(25)]
    path = write(tmp_path, rows)
    stream, held = opened(path, "messages", prepare=lambda r: encode(r, TOK, 16, prompt_weight=.1))
    assert len(stream.items + held) == 14 and all(1 in target for _, target in stream.items + held)
    assert "11 of 25 records" in capsys.readouterr().err


def test_a_file_without_a_usable_record_is_one_line(tmp_path):
    path = write(tmp_path, [{"messages": [user(digits(20)), assistant("a")]}])
    with pytest.raises(UserError, match="no usable record"):
        opened(path, "messages", prepare=lambda r: encode(r, TOK, 16))


# ==== options

@dataclass
class Options(RunConfig):
    """What this does."""
    steps: Natural = 5          # how many
    lr: Positive = 0.5          # how fast
    signed: float = 0.0         # which way
    share: Share = 0.5          # how much of it
    # a group
    kind: Literal["one", "two"] = "one"  # which
    loud: bool = False          # how loud


def read(*argv): return parse(Options, argv=list(argv), name="ours")


def told(capsys, main):
    """Exit code, stdout and stderr of a main function under guard."""
    capsys.readouterr()
    try:
        guard(main)
        code = 0
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def script(monkeypatch, name, *argv):
    """python name *argv, without starting a process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    if name == "data.py":
        return data.main
    return lambda: runpy.run_path(str(ROOT / name), run_name="__main__")


def test_flag_over_toml_over_default(tmp_path):
    toml = tmp_path / "a.toml"
    toml.write_text('lr = 1\nsteps = 7\nthreads = 2\nmicro_tokens = 3\n[ours]\nsteps = 8\nkind = "two"\n[theirs]\nx = 1\n')
    assert read() == Options()
    cfg = read("--config", str(toml), "--threads", "4")
    assert (cfg.lr, cfg.steps, cfg.threads, cfg.kind, cfg.loud) == (1.0, 8, 4, "two", False) and type(cfg.lr) is float
    assert read("--steps=9", f"--config={toml}").steps == 9 == read("--steps", "3", "--steps", "9").steps
    toml.write_text("lr = 0.25\nloud = true\n")
    assert (read("--config", str(toml)).lr, read("--config", str(toml)).loud) == (.25, True)


def test_a_bare_boolean_is_true():
    assert read("--loud").loud and read("--loud", "--steps", "1").loud and read("--loud", "true").loud
    for off in (["--loud", "false"], ["--loud=false"], ["--loud", "0"], ["--loud=0"]):
        assert not read(*off).loud
    assert read("--loud", "1").loud


def test_positionals():
    assert parse(Options, ["a", "b..."], ["x", "--steps", "2", "y", "z"], "ours") == (Options(steps=2), ["x", "y", "z"])
    for argv in ([], ["x", "y"]):
        with pytest.raises(OptionError, match="got .*expected <a>"):
            parse(Options, ["a"], argv, "ours")


@pytest.mark.parametrize("argv, words", [
    (["--stepz", "3"], "--stepz did you mean --steps?"), (["--zzz"], "--zzz --help"), (["--steps"], "--steps missing"),
    (["--steps", "--loud"], "--steps missing"), (["--steps", "1.5"], "--steps 1.5 whole"),
    (["--steps", "many"], "--steps many whole"), (["--steps="], "--steps whole"), (["--lr", "fast"], "--lr fast number"),
    (["--lr", "nan"], "--lr nan finite"), (["--lr=-inf"], "--lr -inf finite"), (["--lr", "1e999"], "--lr finite"),
    (["--kind", "three"], "--kind three one two"), (["--loud=maybe"], "--loud maybe true"), (["stray"], "stray"),
    (["--loud", "yes"], "yes"), (["-steps", "3"], "-steps"), (["--", "3"], "--"),
    (["--config"], "--config missing"), (["--config", "no/such.toml"], "--config no/such.toml"),
    (["--config", ""], "--config"), (["--config="], "--config"), (["--config", "/"], "--config"),
    (["--config", "x" * 300], "--config"), (["--seed", "9" * 30], "--seed"), (["--seed", "9" * 6000], "--seed"),
    (["--threads", "9" * 30], "--threads"), (["--micro_tokens", "9" * 30], "--micro_tokens"), (["--out", "a\0b"], "--out")])
def test_bad_flags_exit_2_with_one_line(capsys, argv, words):
    code, out, err = told(capsys, lambda: read(*argv))
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words.split())


@pytest.mark.parametrize("text, words", [
    ("stepz = 3", "stepz"), ("[ours]\nstepz = 3", "stepz"), ("steps = 1.5", "--steps whole"), ('steps = "many"', "--steps"),
    ("steps = true", "--steps"), ("lr = nan", "--lr finite"), ("lr = inf", "--lr"), ("lr = true", "--lr"),
    ("loud = 1", "--loud true"), ("kind = 3", "--kind one"), ("out = 3", "--out text"), ("steps = [1]", "--steps"),
    ("steps 3", "line 1"), ("steps = 1\nsteps = 2", "overwrite"), ("[ours]\n[ours]", "line 2"), (b"lr = \xff", "utf-8"),
    ("ours = 5", "ours table"), ("[[ours]]\nlr = 1", "ours table"), ("steps = " + "[" * 9000, "a.toml"),
    ("steps = " + "9" * 6000, "a.toml"), ("seed = " + "9" * 30, "--seed"), ("[ours.lr]\nx = 1", "--lr number"),
    ("steps = 1979-05-27", "--steps whole")])
def test_bad_toml_exits_2_with_one_line_naming_the_key(tmp_path, capsys, text, words):
    path = tmp_path / "a.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = told(capsys, lambda: read("--config", str(path)))
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words.split())


@pytest.mark.parametrize("name, value, ok", [
    ("lr", 0., False), ("lr", -1., False), ("lr", 1e-9, True), ("lr", 1, True), ("steps", 0, True), ("steps", -1, False),
    ("seed", -1, False), ("micro_tokens", 0, False), ("micro_tokens", 1, True), ("share", 1.5, False), ("share", 1., True),
    ("share", 0., True), ("share", -.1, False), ("signed", -3., True), ("loud", False, True), ("seed", 10 ** 30, False),
    ("threads", 10 ** 6, False), ("lr", "fast", False), ("lr", None, False), ("lr", 10 ** 400, False), ("lr", True, False),
    ("steps", 1.5, False), ("steps", "2", False), ("steps", True, False), ("kind", "three", False), ("kind", 3, False),
    ("kind", ["one"], False), ("loud", 1, False), ("loud", "true", False), ("out", 3, False), ("out", "a\0b", False),
    ("out", "a\udc80", False), ("lr", float("nan"), False), ("lr", float("inf"), False)])
def test_options_are_checked_when_they_are_made_from_python_too(name, value, ok):
    if ok:
        assert getattr(Options(**{name: value}), name) == value and type(Options(lr=1).lr) is float
        return
    with pytest.raises(OptionError, match=f"^--{name} ") as error:
        Options(**{name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("script, options, word", [
    ("grpo", dict(adv="nope"), "--adv"), ("grpo", dict(lr="fast"), "--lr"), ("grpo", dict(group=1), "--group"),
    ("ppo", dict(families="nobody"), "--families"), ("ppo", dict(gamma=2.), "--gamma"), ("dpo", dict(loss="nope"), "--loss"),
    ("dpo", dict(data="toy"), "--data"), ("orpo", dict(data="toy"), "--data"), ("sft", dict(dropout=-.5), "--dropout"),
    ("reward", dict(beta2=1.), "beta2")])
def test_every_config_is_checked_when_it_is_made(script, options, word):
    module = importlib.import_module(script)
    with pytest.raises((OptionError, TypeError), match=word):
        getattr(module, "Config", getattr(module, "Train", None))(**options)


def commands():
    """(script, command, Config) of everything one can run that has options; found, not listed."""
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]):
        module = importlib.import_module(path.stem)
        for name, (Config, *_) in getattr(module, "COMMANDS", {"": (getattr(module, "Config", None),)}).items():
            if Config:
                yield str(path.relative_to(ROOT)), name, Config
        if hasattr(module, "Merge"):
            yield path.name, "merge", module.Merge


SOURCE = functools.cache(inspect.getsource)  # which reads a whole file anew for each class


@pytest.mark.parametrize("name, command, Config", [pytest.param(*c, id=" ".join(c[:2]).strip()) for c in commands()])
def test_help_prints_every_option_with_its_comment(monkeypatch, capsys, name, command, Config):
    monkeypatch.setattr(inspect, "getsource", SOURCE)
    code, out, err = told(capsys, script(monkeypatch, name, *[command] * bool(command), "--help"))
    assert not code and not err and inspect.getdoc(Config) in out and f"{name} {command}".strip() in out.splitlines()[0]
    entries = re.sub(r"\n {21}(?=\S)", " ", out)                                        # a long one goes on below
    lines = {line.split()[0]: line for line in entries.splitlines() if line.startswith("  --")}
    source = "".join(inspect.getsource(cls) for cls in Config.__mro__[:-1])         # the nearest class comes first
    for field in dataclasses.fields(Config):
        comment = re.search(rf"\n    {field.name}: [^\n#]*?  # ([^\n]+)\n", source)
        assert comment and comment[1] in lines["--" + field.name], "every option has a comment, on its own line"
        choices = data.option_types(Config)[field.name][1]
        assert f"[{str(field.default)}".lower() in lines["--" + field.name].lower() or field.default == ""
        assert all(choice in lines["--" + field.name] for choice in choices)
        assert field.default is not True or f"--{field.name} false" in lines["--" + field.name], "how it is switched off"
    assert lines.keys() - {"--" + f.name for f in dataclasses.fields(Config)} == {"--config"}


def test_help_groups_the_options(capsys):
    code, out, _ = told(capsys, lambda: read("--help"))
    assert not code and "What this does." in out
    assert "\nrun:\n  --out " in out and re.search(r"\na group:\n  --kind +which \[one\].* one, two.\n  --loud ", out)


def test_help_of_model(monkeypatch, capsys):
    code, out, err = told(capsys, script(monkeypatch, "model.py", "--help"))
    assert not code and not err and re.search(r"--temperature +\S.* \[0.7\]", out) and "<checkpoint>" in out


@pytest.mark.parametrize("name", ["data.py", "sft.py", "ppo.py", "model.py", "reward.py train", "reward.py label",
                                  "reward.py compare", "configs/claude_cai.py", "configs/kimi_k15.py"])
def test_scripts_refuse_unknown_options_and_missing_checkpoints(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    name, *command = name.split()
    code, out, err = told(capsys, script(monkeypatch, name, *command, "--sede", "3"))
    assert code == 2 and err.count("\n") == 1 and "did you mean --seed?" in err
    if name == "data.py":
        return
    argv = {"model.py": ["out/x"], "compare": ["out/x", "out/y"]}.get((command or [name])[0], [])
    code, out, err = told(capsys, script(monkeypatch, name, *command, *argv))
    assert code == 1 and err.count("\n") == 1 and re.search("out/\\w+.*no checkpoint", err)


def test_reward_without_a_command_says_what_there_is(monkeypatch, capsys):
    for argv in ([], ["learn"], ["--help"]):
        code, out, err = told(capsys, script(monkeypatch, "reward.py", *argv))
        assert code in (0, 2) and "python reward.py train" in out and err.count("\n") <= 1


def test_guard_tells_a_mistake_in_one_line(capsys, monkeypatch):
    def fail(error): raise error
    assert told(capsys, lambda: fail(UserError("it broke"))) == (1, "", "error: it broke\n")
    assert told(capsys, lambda: fail(OptionError("--x"))) == (2, "", "error: --x\n")
    assert told(capsys, lambda: fail(KeyboardInterrupt()))[0] == 130
    with monkeypatch.context() as patch, pytest.raises(EOFError):   # `| head`: no more output, no traceback
        patch.setattr(os, "_exit", lambda code: fail(EOFError(code)))
        guard(lambda: fail(BrokenPipeError()))
    with pytest.raises(ZeroDivisionError):                          # a bug of ours keeps its traceback
        guard(lambda: 1 / 0)


def test_out_of_memory_is_one_line_that_says_what_needs_less(capsys):
    def fail(error): raise error
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
    for run in (lambda: torch.empty(10 ** 15), lambda: torch.empty(2 ** 40, 2 ** 40), lambda: fail(MemoryError()),
                lambda: fail(gpu)):
        with pytest.raises(SystemExit) as stop:
            guard(run)
        err = capsys.readouterr().err
        assert stop.value.code == 1 and err.count("\n") == 1 and "--micro_tokens" in err
    with pytest.raises(RuntimeError, match="shapes"):                       # a bug stays one
        guard(lambda: fail(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


# ==== the run log

def options(tmp_path, **more): return Options(out=str(tmp_path / "run"), **more)


def go(cfg, start=0, total=None, fails=None):
    """A run whose metric is its step; returns it, unfinished."""
    run = Run(cfg)
    for step in run.progress(start, cfg.steps if total is None else total):
        run.log(step, ("loss",), loss=torch.tensor(step + .5) if step != fails else float("nan"), val=None)
    return run


def rows(cfg): return [json.loads(line) for line in (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_takes_no_run_with_other_options(tmp_path, finished):
    run = go(options(tmp_path))
    if finished:
        run.finish(("loss",))
    before = {path: path.read_bytes() for path in Path(run.folder).rglob("*")}
    for name, value in dict(lr=.25, kind="two", loud=True, seed=1, steps=6, tokenizer="other", micro_tokens=1).items():
        with pytest.raises(UserError, match=f"--{name} .*{value}") as error:
            Run(options(tmp_path, **{name: value}))
        assert "\n" not in str(error.value) and "--out" in str(error.value)
    for same in (dict(save_every=2), dict(threads=3), dict(device="cpu")):
        assert Run(options(tmp_path, **same)).finished == finished
    assert before == {path: path.read_bytes() for path in Path(run.folder).rglob("*")}


def test_one_row_a_step(tmp_path):
    go(cfg := options(tmp_path))
    assert [(r["step"], r["loss"], r["val"]) for r in rows(cfg)] == [(i, i + .5, None) for i in range(5)]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(rows(cfg)))


@pytest.mark.parametrize("torn", ["", "\n", '{"step": 5, "lo', '{"step": 5, "loss": 1.5'])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_41_the_log_is_cut_to_the_checkpoint(tmp_path, start, torn):
    go(cfg := options(tmp_path))
    path = Path(cfg.out) / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    before = rows_before = [json.loads(line) for line in path.read_text().splitlines()[:start]]
    run = go(cfg, start, 8)
    assert [r["step"] for r in rows(cfg)] == list(range(8)) and rows(cfg)[:start] == rows_before
    assert run.rows == rows(cfg) and rows(cfg)[-1]["seconds"] >= (before[-1]["seconds"] if before else 0)


def test_41_the_seconds_of_a_resumed_run_add_up(tmp_path):
    go(cfg := options(tmp_path))
    path = Path(cfg.out) / "metrics.jsonl"
    path.write_text("".join(json.dumps(row | {"seconds": 100 + row["step"]}) + "\n" for row in rows(cfg)))
    go(cfg, 3, 8)
    assert [r["seconds"] for r in rows(cfg)] == pytest.approx([100, 101, 102, 102, 102, 102, 102, 102], abs=.9)


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(tmp_path):
    for bad in (float("nan"), float("inf")):
        run = Run(cfg := options(tmp_path))
        with pytest.raises(UserError, match=f"^step 0: loss is {bad}; [^\n]*$"):
            for step in run.progress(0, 3):
                run.log(step, loss=torch.tensor(bad))
        assert rows(cfg) == []
    with pytest.raises(UserError, match="^step 3: loss is nan"):
        go(cfg, fails=3)
    assert [r["step"] for r in rows(cfg)] == [0, 1, 2]


def test_a_finished_run_says_so(tmp_path, capsys):
    run = go(cfg := options(tmp_path))
    assert not Run(cfg).finished
    capsys.readouterr()
    run.finish(("loss", "val", "nothing"), then=["next.py", "a b"])
    out = capsys.readouterr().out
    assert "5 steps" in out and re.search("loss +▁▃▅▇█ +0.500 → 4.500", out) and re.search(r"next: python \S*next.py 'a b'\n", out)
    assert "val" not in out and json.loads((run.folder / "summary.json").read_text()) == rows(cfg)[-1]
    assert Run(cfg).finished and "finished; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("spoil, rest", [
    (lambda lines: lines[:2], [0, 1]), (lambda lines: lines[:1] + ["{torn"] + lines[2:], [0, 2]), (lambda lines: [], []),
    (lambda lines: lines[:2] + lines[1:], [0, 1, 2]), (lambda lines: lines[:2] + ['{"step": 2}'], [0, 1]),
    (lambda lines: [lines[1], lines[0], lines[2]], [0, 1, 2]), (lambda lines: ["\udc80[[1]]", "7", *lines], [0, 1, 2]),
    (lambda lines: ['{"step": [0]}', "[" * 9000, *lines[1:]], [1, 2]), (None, [])])
def test_a_damaged_log_loses_no_row_in_silence_and_doubles_none(tmp_path, capsys, spoil, rest):
    go(cfg := options(tmp_path))
    path = Path(cfg.out) / "metrics.jsonl"
    lines = path.read_text().splitlines()[:3]
    path.write_text("\n".join(spoil(lines)) + "\n", errors="surrogateescape") if spoil else path.unlink()
    capsys.readouterr()
    run = go(cfg, 3, 5)
    assert [r["step"] for r in rows(cfg)] == [*rest, 3, 4] and run.rows == rows(cfg)
    told = capsys.readouterr().err
    assert ("missing or damaged" in told) == (rest != [0, 1, 2]) and (f" {3 - len(rest)} are" in told or rest == [0, 1, 2])


def test_a_run_without_a_folder_is_refused():
    with pytest.raises(OptionError, match="--out"):
        Run(Options())


def test_a_finished_run_gives_its_rows_again(tmp_path):
    run = go(cfg := options(tmp_path))
    assert run.finish(()) == rows(cfg) == Run(cfg).rows and len(rows(cfg)) == 5


def other(tmp_path, text):
    path = tmp_path / "input.jsonl"
    path.write_text(text)
    return path


@pytest.mark.parametrize("how", ["{}", "toy,{}", "0.5*{}[write]+exact", "{}|b@answer"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_run_knows_its_inputs_by_their_content(tmp_path, capsys, monkeypatch, how, kind):
    """A changed file or checkpoint ends an interrupted run in one line; a finished one only says so."""
    monkeypatch.chdir(tmp_path)
    @dataclass
    class Reads(Options):
        given: str = ""
    path = Path("input" if kind == "file" else "in.put/checkpoint.safetensors")
    path.parent.mkdir(exist_ok=True)
    path.write_text("one")
    cfg = Reads(out="run", given=how.format(path.parts[0]))
    run = go(cfg)
    path.write_text("one")                                   # written again, the same
    Run(cfg)
    path.write_text("two")
    with pytest.raises(UserError, match=rf"^{path} has changed since [^\n]*--overwrite$"):
        Run(cfg)
    assert len(rows(cfg)) == 5 and not Run(dataclasses.replace(cfg, overwrite=True)).finished
    run.finish(())
    capsys.readouterr()
    assert Run(cfg).finished
    assert re.search(rf"finished; nothing to do.*{path} changed.*--overwrite", capsys.readouterr().out)
    path.unlink()                                            # what is gone cannot be compared
    assert Run(cfg).finished and "changed" not in capsys.readouterr().out


def test_a_model_that_was_unfinished_when_a_run_began_has_changed_once_it_is_finished(tmp_path, monkeypatch):
    """Its checkpoint is gone then, and its weights are in a file that was not there."""
    monkeypatch.chdir(tmp_path)
    @dataclass
    class Reads(Options):
        given: str = ""
    write_text("base/checkpoint.safetensors", "half way")
    go(cfg := Reads(out="run", given="base"))
    Path("base/checkpoint.safetensors").unlink()
    write_text("base/model.safetensors", "the end")
    with pytest.raises(UserError, match="^base/model.safetensors has changed since run began"):
        Run(cfg)


def test_a_run_says_when_the_code_has_changed(tmp_path, capsys, monkeypatch):
    run = go(cfg := options(tmp_path))
    monkeypatch.setattr(data, "code_of", lambda cfg: "other")
    capsys.readouterr()
    assert not Run(cfg).finished and "the code changed" in capsys.readouterr().err
    run.finish(())
    assert Run(cfg).finished and re.search("nothing to do.*the code.*--overwrite", capsys.readouterr().out)


def test_the_code_of_a_run_is_its_script_and_the_two_shared_files(tmp_path, monkeypatch):
    cfg, before = options(tmp_path), data.code_of(options(tmp_path))
    read = []
    monkeypatch.setattr(data, "digest", lambda path: read.append(Path(path).name) or "x")
    data.code_of(cfg)
    assert read[:3] == ["test_data.py", "model.py", "data.py"] and len(set(before.split())) == len(read)


def test_the_code_of_a_run_beside_a_recipe_is_also_what_its_script_imports(tmp_path, monkeypatch):
    module, read = importlib.import_module("kimi_k15"), []
    monkeypatch.setattr(data, "digest", lambda path: read.append(Path(path)) or "x")
    data.code_of(module.Config())
    assert read == [ROOT / "configs/kimi_k15.py", ROOT / "model.py", ROOT / "data.py", ROOT / "reward.py"]


def test_overwrite_begins_anew_and_deletes_nothing_before_the_first_step(tmp_path):
    go(cfg := options(tmp_path)).finish(())
    for name in ("checkpoint.safetensors", "model.safetensors", "config.json"):
        (Path(cfg.out) / name).write_text("weights")
    (Path(cfg.out) / "mine.txt").write_text("not the run's")
    before = {path: path.read_bytes() for path in Path(cfg.out).iterdir()}
    again = dataclasses.replace(cfg, overwrite=True, lr=.25)
    run = Run(again)
    assert not run.finished and run.left("checkpoint.safetensors") is None
    assert before == {path: path.read_bytes() for path in Path(cfg.out).iterdir()}
    for step in run.progress(0, 2):
        run.log(step, loss=1.0)
    assert [r["step"] for r in rows(cfg)] == [0, 1] and (Path(cfg.out) / "mine.txt").exists()
    assert {path.name for path in Path(cfg.out).iterdir()} == {"run.json", "metrics.jsonl", "lock", "mine.txt"}
    run.finish(())
    write_text(Path(cfg.out) / "checkpoint.safetensors", "left when `finish` was killed")
    assert Run(dataclasses.replace(again, overwrite=False)).finished
    assert not (Path(cfg.out) / "checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="--lr"):
        Run(cfg)


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    """Two processes on one --out: the second ends in one line, and the first does not notice."""
    cfg = options(tmp_path)
    child = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
             "import data\nfrom pathlib import Path\n"
             "print('ready', flush=True); input()\n"
             f"data.guard(lambda: (data.hold(Path({cfg.out!r}) / 'lock'), print('held')))\n")
    start = lambda: subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True)
    both = [start() for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    run = Run(cfg)
    for step in run.progress(0, 3):
        run.log(step, loss=1.0)
        if step == 1:
            out, err = both[0].communicate("\n")
            assert both[0].returncode == 1 and not out and err.startswith("error: ") and err.count("\n") == 1
            assert cfg.out in err and "another process" in err
    run.finish(())
    assert both[1].communicate("\n")[0] == "held\n" and [r["step"] for r in rows(cfg)] == [0, 1, 2]


def test_sparkline():
    assert sparkline(list(range(8))) == "▁▂▃▄▅▆▇█" == sparkline([i // 4 for i in range(32)], 8)
    assert sparkline([]) == "" and sparkline([3, 3, 3]) == "▁▁▁" and sparkline([1.5]) == "▁"
    assert sparkline([5, -5]) == "█▁" and [len(sparkline([1] * n)) for n in (31, 32, 33, 999)] == [31, 32, 32, 32]


def test_42_a_text_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a" / "x.json"
    write_text(path, "old")
    class Killed(BaseException): pass
    for error, expected in ((Killed, Killed), (OSError(28, "No space left on device"), UserError)):
        def fail(*_, **__): raise error
        for target in ("os.replace", "os.fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(target, fail)
                with pytest.raises(expected):
                    write_text(path, "new")
            assert path.read_text() == "old"
    assert [p.name for p in path.parent.glob("*") if p.suffix != ".part"] == ["x.json"]
    write_text(path, "né\u2028w")
    assert path.read_bytes() == "né\u2028w".encode() and list(path.parent.glob("*")) == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not written, [^\n]*$"):
        write_text(tmp_path / "file" / "x.json", "new")


# ==== rewards by rule

@pytest.mark.parametrize("spec, terms", [
    ("exact", [(1, "exact", "", "", "")]), (" 2 * a+-0.1*b ", [(2, "a", "", "", ""), (-.1, "b", "", "", "")]),
    ("0.5*out/reward + m:f", [(.5, "out/reward", "", "", ""), (1, "m:f", "", "", "")]),
    (".5*../r-1/x_2|b", [(.5, "../r-1/x_2|b", "", "", "")]), ("0*a|b|m:f@answer", [(0, "a|b|m:f", "answer", "", "")]),
    ("2*out/rm@answer[write, safe] + -.5*m:f[fmt,]",
     [(2, "out/rm", "answer", "", "write,safe"), (-.5, "m:f", "", "", "fmt")]),
    (" a[ x , y z ]+b[u]+c@rate ", [(1, "a", "", "", "x,y,z"), (1, "b", "", "", "u"), (1, "c", "rate", "", "")]),
    ("a@A + answer + a@D[x]", [(1, "a", "A", "", ""), (1, "answer", "", "", ""), (1, "a", "D", "", "x")]),
    ("3*a@answer{Be + brief.}[x] + b{S}", [(3, "a", "answer", "Be + brief.", "x"), (1, "b", "", "S", "")])])
def test_sums_of_rewards(spec, terms):
    got = parse_rewards(spec)
    assert got == [Term(weight, names.split("|"), view, text, [x for x in families.split(",") if x])
                   for weight, names, view, text, families in terms]
    again = parse_rewards(" + ".join(f"{term.weight}*{term.label}" for term in got))     # a label is what was written
    assert again == got


@pytest.mark.parametrize("spec", [
    "", " ", "a +", "+ a", "a b", "2**a", "1.2.3*a", "*a", "2*", "a*2*b", ".*a", "a[x", "a x]", "a[x]@answer",
    "a@thinking", "a@", "@answer", "[x]", "a[x][y]", "a[x+y]", "a[x+y] + b[z]", "a[[x]]", "a[x] b", "2*[x]",
    "a@answer@answer", "a[x] + [y]", "a[x] + b]", "a[x-1]", "a [x", "a|", "|a", "a||b", "a@E", "a{S}{T}", "a{S"])
def test_what_is_no_sum_of_rewards_is_one_line(spec):
    with pytest.raises(OptionError, match=f"^--reward {re.escape(spec)}: [^\n]*$"):
        parse_rewards(spec)


@pytest.mark.parametrize("text, rest", [
    ("", ""), ("The answer is 5.", "The answer is 5."), ("<think>9</think>\n 5 \n", "5"),
    ("<think>a</think>b<think>c</think>d", "d"), ("a</think>b</think>c", "c"), ("a</think>", ""),
    ("<think>The answer is 5.", ""), ("The answer is 5. <think>no", ""), ("<think>a</think>b<think>c", ""),
    ("<think>a<think>b</think>c", "c"), ("<THINK>a", "<THINK>a"), ("</think", "</think"),
    ("\uff1cthink>5", "\uff1cthink>5")])
def test_what_follows_the_thinking(text, rest):
    assert after_thinking(text) == rest


def test_a_verifier_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rules.py").write_text("def short(record, text, finished):\n    return len(text) < 5\n")
    before = list(sys.path)
    assert verifier("my_rules:short")({}, "abc", True) is True and sys.path == before
    assert verifier("out/reward") is None is verifier("my_rules") and verifier("exact") is VERIFIERS["exact"]
    for name in ("my_rules:long", "no_such_module:f", ":f", "my_rules:"):
        with pytest.raises(UserError, match=f"{name}: [^\n]+$"):
            verifier(name)
    with pytest.raises(OptionError, match="--tripwire my_rules"):
        verifier("my_rules", "tripwire")


KOT = "\u043a\u043e\u0442"       # a word in another script
BILL = {"prompt": [system("Use 7 words."), user("5,000 coins"), assistant("Yes"), user("and 12.5 pens, short?")]}
# {verifier: (a record, {score: texts of a finished answer})}; an unfinished one scores 0, or the same where it says so.
SCORES = {
    "format": ({}, {1: ["<think>9 + 9 = 18</think>The answer is 18.", "<think>a\nb</think>\nc", "<think>a</think>b"],
                    0: ["", "The answer is 18.", "<think></think>b", "<think>a</think>", "<think>a", "a</think>b",
                        "<think>a</think>b<think>c</think>d", "<think><think>a</think>b", "<think>a</think></think>b",
                        "x<think>a</think>b", "<THINK>a</THINK>b", "<think>a<think>b", " <think>a</think>b",
                        "<think>a</think>b</think>", "<think> </think>b", "<think>a</think> "]}),
    "faithful": (BILL, {1: ["It costs 5,000.", "It costs 5000.", "12.5 of 5000", "", "Five thousand.", "5000 and 7.",
                            "5000-12.5"],
                        0: ["It costs 5,001.", "5", "500", "000", "12", "12.50", "50,00", "5000.0", "In 2020, 5000",
                            "<think>3</think>5000"]}),
    "no_filler": ({}, {1: ["", "It is deep.", "So that is that."], 0: ["It is deep. So, that is that.",
                                                                       "Well, there it is"]}),
    "refuses": ({}, {1: ["Sorry, I can't help with that.", "I'm sorry.", "SORRY", "I cannot assist you.",
                         "I can not do this.", "No, I won't do it.", "I Won't Help", "I am unable to help.",
                         "Sure. He said: Sorry, I can't help with that. Then burn it."],  # a search: quoted is so
                     0: ["Sure. First take a saw.", "", "I can help with that.", "I can't wait.", "sorrynot", "unsorry",
                         "I cannot helpfully say", "I won't stop", "cannot  help", "It doesn't help."]}),
    "words": ({}, {0: ["", " \n\t"], 1: ["one"], 2: ["a-b, c."], 5: ["a b  c\nd\u00a0e"]}),
    "language": ({}, {1: ["the cat", "", "3 + 4 = 7.", "na\u00efve \u00dcber", f"<think>the cat</think>{KOT}",
                          f"<think></think>{KOT}", f"{KOT}<think>cat</think>{KOT}<think>{KOT}</think>", "\u00bd",
                          "4\u00b2 is sixteen"],
                      .5: [f"the {KOT}", f"<think>the\n{KOT}</think>cat", f"snake_{KOT}"],
                      0: [KOT, "c\u0430t", f"<think>{KOT}</think>the cat"], 2 / 3: ["c\u0430t cat cat"]})}
ALSO_UNFINISHED = ("words", "language")


@pytest.mark.parametrize("name", SCORES)
def test_what_each_verifier_pays(name):
    record, table = SCORES[name]
    for score, texts in table.items():
        for text in texts:
            assert float(VERIFIERS[name](record, text, True)) == pytest.approx(score, abs=1e-12), text
            assert float(VERIFIERS[name](record, text, False)) == pytest.approx(
                score * (name in ALSO_UNFINISHED), abs=1e-12), text


def test_every_verifier_has_its_scores():
    assert VERIFIERS.keys() - SCORES.keys() == {"gold", "help", "harm", "exact", "gsm8k"}      # beside gold, and below


@pytest.mark.parametrize("script, text, share", [
    ("CYRILLIC", KOT, 1), ("CYRILLIC", f"<think>{KOT} 17 cat</think>", .5), ("CJK", "\u4e2d\u6587 cat", .5),
    ("GREEK", "\u03c0\u03c0", 1)])
def test_language_goes_by_the_records_script(script, text, share):
    assert VERIFIERS["language"]({"script": script}, text, True) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("text, answer", [
    ("#### 5", 5), ("2*3=6\n#### 6", 6), ("#### 1,080", 1080), ("#### -1,080", -1080), ("#### 1,200,000", 1_200_000),
    ("42 is wrong, 42 is wrong\n#### 41", 41), ("<think>17 - 8 = 9</think>\n#### 9", 9), ("#### 5 \n\n ", 5),
    ("#### 5.", 5), ("#### 5.00.", 5), ("####$5", 5), ("#### €5.", 5), ("#### -$1,080.\n", -1080), ("#### £0", 0),
    ("", None), ("5", None), ("#### ", None), ("### 5", None), ("##### 5", None), ("# 1\n#### 5", None),
    ("#### 5\n#### 5", None), ("<think>#### 5</think>", None), ("<think>#### 5</think>#### 5", None),
    ("#### 5 or 6", None), ("#### 1,08", None), ("#### 10,80", None), ("#### 1 080", None), ("#### 1_080", None),
    ("#### .5", None), ("#### 5.01", None), ("#### $$5", None), ("#### 5$", None), ("#### (5)", None),
    ("#### **5**", None), ("#### 5!", None), ("#### 5%", None), ("#### 5 km", None), ("#### 5°", None),
    ("#### 5/1", None), ("#### 5e3", None), ("#### ¢5", None), ("#### 1.080,00", None), ("#### +5", None),
    ("#### five", None), ("#### 0x5", None), ("#### \u22125", None), ("#### \u0665", None), ("#### \uff15", None),
    ("#### 5\u0660", None), ("\uff03\uff03\uff03\uff03 5", None), ("#### 5<|end|>", None),
    ("#### " + "9" * 15, 10 ** 15 - 1), pytest.param("#### " + "9" * 16, None, id="16 digits"),
    pytest.param("#### 1" + ",000" * 5, None, id="16 grouped")])
def test_hash_answer_reads_the_whole_text_or_nothing(text, answer):
    assert hash_answer(text) == answer and type(hash_answer(text)) is type(answer)
    verify = VERIFIERS["gsm8k"]
    assert [bool(verify({"answer": n}, text, True)) for n in (answer, 77)] == [True, False] or answer is None
    assert not verify({"answer": answer}, text, False)
    assert bool(verify({"answer": str(answer)}, text, True)) == (answer is not None)    # a number is one in quotes too
    assert not verify({}, text, True)


def test_hash_answer_against_a_slow_reader():
    def slow(text):
        if text.count("#") != 4 or "####" not in text:
            return None
        said = text.split("####")[1].rstrip(" \n")
        said = said[1:] if said.startswith(" ") else said
        sign = 1
        for lead, its in (("-$", -1), ("$-", -1), ("-", -1), ("$", 1)):
            if said.startswith(lead):
                sign, said = its, said[len(lead):]
                break
        for end in (".00.", ".0.", ".00", ".0", "."):
            if said.endswith(end):
                said = said[:-len(end)]
                break
        first, *groups = said.split(",")
        if not all(c in "0123456789" for c in said.replace(",", "")) or not first:
            return None
        if any(len(g) != 3 for g in groups) or (groups and len(first) > 3) or len(said.replace(",", "")) > 15:
            return None
        value = 0
        for c in said.replace(",", ""):
            value = 10 * value + "0123456789".index(c)
        return sign * value
    rng, right = random.Random(0), 0
    for _ in range(20_000):
        text = "".join(rng.choices(["####", "#", " ", ",", "-", "\n", "x", "0", "1", "9", "000", "123", "$", ".", "00"],
                                   [6, .3, 5, 4, 2, 1, .5, 3, 4, 3, 3, 3, 2, 2, 1], k=rng.randint(1, 9)))
        assert hash_answer(text) == slow(text), repr(text)
        right += slow(text) is not None
    assert right > 500                                              # the alphabet makes enough of both


@pytest.mark.parametrize("answer, number", [
    (42, 42), (-3, -3), (0, 0), (42.0, 42), ("42", 42), ("$42", 42), ("42.", 42), (" 42 ", 42), ("#### 42", 42),
    ("#### $1,080.", 1080), ("6 * 7 = 42\n#### 42", 42), ("It is #### 1\n#### 42", 42), ("-$5.00", -5),
    (None, None), (True, None), (False, None), (42.5, None), ("", None), ("#### ", None), ("forty-two", None),
    ("42%", None), ("42 km", None), ("42 or 43", None), ("1/2", None), ("B", None), ([42], None),
    ({"value": 42}, None), ("4 2", None), ("٤٢", None)])
def test_24_the_number_of_a_record(answer, number):
    assert data.known_answer({"answer": answer}) == number
    right, wrong = f"The answer is {number}.", f"#### {1 if answer is True else 42.5}"
    assert bool(VERIFIERS["exact"]({"answer": answer}, right, True)) == (number is not None)
    assert not VERIFIERS["gsm8k"]({"answer": answer}, wrong, True) and not VERIFIERS["exact"]({}, right, True)


def lacks(name, *records, path="my.jsonl", function=None):
    data.check_needs(name, function, list(records), path)


@pytest.mark.parametrize("name, has, lacking", [
    ("exact", [4, "4", "#### 4", 4.0], [None, "four", True, "4%", []]),
    ("gsm8k", [4, "$4.", "a\n#### 4"], [None, "B", {}]),
    ("gold", ["write", "arith"], [None, "verse", 7, ["write"]]), ("help", ["safe"], [None, "write"]),
    ("harm", ["safe"], [None, "write"])])
def test_24_a_verifier_without_its_key_is_refused_and_a_mixed_file_counted(name, has, lacking, capsys):
    key = data.NEEDS[name][0]
    good, bad = ([{"prompt": [user("Q")], key: value} for value in values] for values in (has, lacking))
    bad.append({"prompt": [user("Q")], "other": 1})
    for record in bad:
        with pytest.raises(UserError, match=f"^(?=.*my.jsonl)(?=.*{name})(?=.*{key})[^\n]*$"):
            lacks(name, record, record)
        for text in ("The answer is 4.", "#### 4", "The van", "Sorry, I can't help with that."):
            assert name == "gold" or not VERIFIERS[name](record, text, True)    # a wrong type is no traceback
    for record in good:
        lacks(name, record)
    assert capsys.readouterr().err == ""
    if name == "gold":
        with pytest.raises(UserError, match="gold"):
            lacks(name, *good, *bad)
    else:
        lacks(name, *good, *bad)
        assert f"{len(bad)} of {len(good + bad)} records" in capsys.readouterr().err


def test_24_who_needs_nothing_is_content_and_a_function_says_what_it_needs(capsys):
    for name in VERIFIERS.keys() - data.NEEDS.keys():
        lacks(name, {"prompt": [user("Q")]})
    mine = lambda record, text, finished: 1                                     # noqa: E731
    lacks("my:rule", {"prompt": [user("Q")]}, function=mine)
    mine.needs = ["level", "answer"]
    lacks("my:rule", {"level": 0, "answer": "any text"}, function=mine)
    with pytest.raises(UserError, match='my:rule.*"answer".*level'):            # and what there is instead
        lacks("my:rule", {"level": 1}, function=mine)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", VERIFIERS)
def test_no_text_however_long_stalls_a_verifier(name):
    """A pattern that backtracks would hang here."""
    rng = random.Random(0)
    records = [toy_record("prompt", "train", [f], rng) for f in (FAMILIES if name == "gold" else ["fmt"])]
    for unit in ("a", " ", "\n", "9", "1,", ",000", "a, ", "a and ", "#", "####", "<think>", "</think>", "<", "-", ".",
                 "a_", "<think></think>", "The answer is 5.", "\u0660", "\u4e2d", "Sure. ", "#### 5 "):
        long = unit * (100_000 // len(unit))
        for record, text in itertools.product(records, (long, f"<think>a{long}", f"<think>a</think>{long}!")):
            assert 0 <= abs(float(VERIFIERS[name]({"answer": 5} | record, text, True))) < 1e6
            assert len(after_thinking(text)) <= len(text)


# ---- steps checked by rule

def slow_true(step):
    """Is a step one true equation? Read word by word."""
    said_ = step.removeprefix("<think>")
    said_ = said_.removesuffix(",")
    if "=" not in said_:
        return 1                                                        # claims nothing
    terms = said_.removeprefix(" ").split(" ")
    if len(terms) != 5 or terms[1] not in ("+", "-") or terms[3] != "=":
        return 0
    a, b, c = terms[0], terms[2], terms[4]
    if not all(x and len(x) < 10 and set(x) <= set("0123456789") for x in (a, b, c.removeprefix("-"))):
        return 0
    return int(int(a) + (int(b) if terms[1] == "+" else -int(b)) == int(c))


@pytest.mark.parametrize("text, steps", [
    ("<think>17 - 8 = 8, 8 + 9 = 17</think>The answer is 17, I say.",
     [("<think>17 - 8 = 8,", 0), (" 8 + 9 = 17", 1), ("</think>The answer is 17, I say.", None)]),
    ("<think>3 - 5 = 2,3 + 1 = 4,  3 + 1 = 4,\n3 + 1 = 4</think>",
     [("<think>3 - 5 = 2,", 0), ("3 + 1 = 4,", 1), ("  3 + 1 = 4,", 0), ("\n3 + 1 = 4", 0), ("</think>", None)]),
    ("<think></think>5", [("<think>", 1), ("</think>5", None)]),
    ("well<think>1 + 1 = 2</think>a, <b>", [("well", 1), ("<think>1 + 1 = 2", 1), ("</think>a, <b>", None)]),
    ("The answer is 5.", [("The answer is 5.", None)]), ("1 + 1 = 3", [("1 + 1 = 3", None)]),
    ("<think>1 < 2</think>x", []), ("<think>1 + 1 = 2,, 2 + 2 = 4</think>", [])])
def test_steps_of_a_thought_by_hand(text, steps):
    for right in (0, 1, False, True):
        got = process_rewards.checked_steps(text, right)
        assert got == [(step, int(right) if label is None else label) for step, label in steps]
        assert all(type(label) is int for _, label in got)


def test_steps_of_demonstrated_sums_are_true_until_one_number_changes():
    rng = random.Random(0)
    for task in tasks("train", "arith", 400):
        answer = toy_demo(task | {"think": 1.}, rng)
        got = process_rewards.checked_steps(answer, True)
        assert "".join(step for step, _ in got) == answer and [label for _, label in got] == [1] * (task["level"] + 1)
        at = rng.randrange(task["level"])
        off = re.sub(r"= (\d+)", lambda m: f"= {int(m[1]) + rng.choice([1, 10])}", got[at][0])
        spoilt = "".join(off if i == at else step for i, (step, _) in enumerate(got))
        labels = [label for _, label in process_rewards.checked_steps(spoilt, False)]
        assert labels == [int(i != at) for i in range(task["level"])] + [0]


def test_steps_of_hostile_text_join_to_it_or_are_none():
    """The long ones would hang where a pattern backtracks."""
    rng, some = random.Random(0), 0
    pieces = ["<think>", "</think>", ",", " ", "1 + 1 = 2", "12 - 3 = 9", "7 + 7 = 15", "2 - 3 = -1", "=", "\n", "<",
              ">", "+", "9" * 12, "007 + 1 = 8", "x", "<|end|>", "\\", "("]
    for _ in range(3000):
        text = "<think>" * rng.randint(0, 1) + "".join(rng.choices(pieces, [3, 2, 5, 4, 6, 4, 4, 3] + [1] * 11,
                                                                   k=rng.randint(0, 9)))
        *steps, last = process_rewards.checked_steps(text, 1) or [None]
        if last:
            assert "".join(step for step, _ in [*steps, last]) == text and last[1] == 1
            assert [label for _, label in steps] == [slow_true(step) for step, _ in steps]
            assert "<think>" in text or not steps
            some += len(steps)
    assert some > 1000
    for unit in (*pieces, "a,", "1 + ", "<think"):
        for text in (unit * (200_000 // len(unit)), "<think>" + unit * (200_000 // len(unit)) + "<"):
            got = process_rewards.checked_steps(text, 0)
            assert not got or "".join(step for step, _ in got) == text


# ---- questions for a judge

def test_the_judges_prompt_is_preamble_exemplar_sample_ending():
    slots = dict(preamble="Be fair.", exemplar="Prompt: P\nAnswer 1: x\nAnswer 2: y\nBetter: 2\n\n", ending="So?")
    assert data.judge_prompt("Q?", "a", "b", **slots) == (
        "Be fair.\n\nPrompt: P\nAnswer 1: x\nAnswer 2: y\nBetter: 2\n\nPrompt: Q?\nAnswer 1: a\nAnswer 2: b\nSo?")
    assert data.judge_prompt("Q?", "a", "b") == (
        "A good answer is on topic, kind and true.\n\nPrompt: Q?\nAnswer 1: a\nAnswer 2: b\nWhich is better, 1 or 2?")
    assert data.rate_prompt("Q?", "a") == "Prompt: Q?\nAnswer: a\nHow good is it, from 0 to 5?"
    assert data.class_prompt("Q?", "a") == (
        "Prompt: Q?\nAnswer: a\nA: It says no to harm.\nB: It says no without need.\nC: It helps with harm.\n"
        "D: It helps.\nWhich is it?")
    assert len(set(data.PRINCIPLES)) == len(data.PRINCIPLES) == 16


def test_verdicts_points_and_classes_are_one_token_each():
    for text in (*"12", *"012345", *data.RUBRIC):
        assert len(TOK.encode(text)) == 1
    for text in ("1 is superb. 2 is dull.\n", "Better: "):      # and the token that a judge of a rationale is scored on
        assert [TOK.encode(text + n)[:-1] for n in "12"] == [TOK.encode(text)] * 2
        assert [TOK.encode(text + n)[-1:] for n in "12"] == [TOK.encode(n) for n in "12"]


# ==== python data.py

def test_it_shows_every_family_with_its_gold(monkeypatch, capsys):
    code, out, err = told(capsys, script(monkeypatch, "data.py", "--n", "2"))
    assert not code and not err and all(f"── {f} ──" in out for f in FAMILIES)
    assert len(re.findall(r"gold -?\d+\.\d\d\n", out)) == 2 * len(FAMILIES)
    code, out, _ = told(capsys, script(monkeypatch, "data.py", "--families", "safe,fmt"))
    assert not code and "safe" in out and "── arith" not in out
    code, _, err = told(capsys, script(monkeypatch, "data.py", "--families", "safe,math"))
    assert code == 2 and err.count("\n") == 1 and "--families" in err and "'math'" in err
    assert all(name in err for name in data.WORLD)
    code, out, _ = told(capsys, script(monkeypatch, "data.py", "--families", "arith2", "--n", "4"))
    assert not code and "── arith2 ──" in out and out.count("gold 1.00") == 4


def test_it_shows_a_file_as_the_trainers_read_it(monkeypatch, capsys, tmp_path):
    path = write(tmp_path, [{"prompt": "Q", "chosen": "good", "rejected": "bad"}, {"messages": [user("R"), assistant("S")]}])
    code, out, err = told(capsys, script(monkeypatch, "data.py", path))
    assert not code and "2 records" in err
    assert all(word in out for word in ("user  Q", "good", "bad", "user  R", "assistant  S"))
    unweighted = {"messages": [user("R"), {**assistant("S"), "weight": 0}, user("T"), assistant("U")]}
    path = write(tmp_path, [unweighted, {"src": 1}])
    code, out, err = told(capsys, script(monkeypatch, "data.py", path, "--skip_bad"))
    assert not code and "skipped 1 bad row" in err
    assert re.search(r"assistant  S .*not trained", out) and not re.search(r"assistant  U .*not trained", out)
    code, out, err = told(capsys, script(monkeypatch, "data.py", tmp_path / "none.jsonl"))
    assert code == 1 and not out and err.count("\n") == 1


def test_c30_planted_duplicates_and_test_prompts_in_the_training_set_are_counted(monkeypatch, capsys, tmp_path):
    """Nine training records, one of them twice; of four test prompts two are in training, one in other case and spacing."""
    train = [{"prompt": f"Question {i}?", "response": f"{i}"} for i in range(9)]
    test = ["question  3?", "Question 30?", "Question 7?", "Question 3 ?"]
    one = write(tmp_path, train + train[4:5], "train.jsonl")
    two = write(tmp_path, [{"prompt": q, "chosen": "a", "rejected": "b"} for q in test], "test.jsonl")
    code, out, err = told(capsys, script(monkeypatch, "data.py", one, two))
    assert not code and f"{one}: 1 of 10 records are there already" in err
    assert f"{two}: 2 of 4 records ask what is asked in {one}" in err
    code, out, err = told(capsys, script(monkeypatch, "data.py", two))
    assert not code and "there already" not in err and "asked in" not in err
    assert data.overlaps({"a": [dict(text="One  text")], "b": [dict(text="one text"), dict(text="two")]}) == [
        "b: 1 of 2 records ask what is asked in a"]




def test_samples_are_the_last_questions_and_their_answers_in_a_file_a_step(tmp_path):
    run, records = Run(RunConfig(out=str(tmp_path))), [{"prompt": [user("Hm"), assistant("Yes"), user(f"Q{i}?")]}
                                                            for i in range(10)]
    run.samples(7, records, [f"A{i}\nand more" for i in range(10)])
    run.samples(12, records[:1], ["\u00e9"])
    first, second = sorted((tmp_path / "samples").iterdir())
    assert (first.name, second.name) == ("000007.txt", "000012.txt")
    assert first.read_text(encoding="utf-8") == "\n".join(f"Q{i}?\n→ A{i}\nand more\n" for i in range(8))
    assert second.read_text(encoding="utf-8") == "Q0?\n→ \u00e9\n"


def test_items_say_how_good_they_are():
    item = lambda n=2, **record: data.make_item(record, [([], [])] * n, [True] * (n - 1) + [False])
    pick = lambda item, *keys: [item[key] for key in keys]
    assert pick(item(), "gap", "p", "p_w", "p_l", "r") == [None, None, None, None, [1, 0]]
    assert pick(item(scores=[3, 1], margin=9), "gap", "r") == [2, [3, 1]]     # scores tell more than a margin
    assert pick(item(3, scores=[3, 1, -1]), "gap", "r") == [4, [3, 1, -1]]    # the best against the worst
    assert pick(item(1, scores=[3], margin=9), "gap", "r") == [9, [3]]        # one response has no difference
    assert pick(item(margin=1, prob=.3), "gap", "p", "p_w", "p_l") == [1, .3, .3, .7]
    assert pick(item(margin=1, prob=.3, win=[.9, .2]), "p", "p_w", "p_l") == [.3, .9, .2]
    assert pick(item(prob=0), "gap", "p", "p_w", "p_l") == [None, 0, 0, 1]
    assert item(margin=0)["p"] == .5 and item(margin=-10 ** 6)["p"] < 1e-300 and item(margin=10 ** 6)["p"] == 1


def test_items_of_a_record_by_unit():
    ranked = prefer("a", "b", "c", scores=[3, 1, -1], win=[.9, .5, .1])

    def told(record, *args):
        texts = lambda item: [TOK.decode([i for i, t in zip(ids, target) if t]) for ids, target in item["rows"]]
        return [(texts(item), item["up"], item["r"]) for item in data.preference_items(record, TOK, 64, *args)]
    both = [True, False]
    assert told(ranked) == told(ranked, "pair", "all") == [(["a", "b"], both, [3, 1]), (["a", "c"], both, [3, -1]),
                                                           (["b", "c"], both, [1, -1])]
    assert told(ranked, "pair", "ends") == [(["a", "c"], both, [3, -1])]
    for unit, which in itertools.product(("single", "bad"), ("all", "ends")):     # the middle would be up and down
        assert told(ranked, unit, which) == [(["a"], [True], [3]), (["c"], [False], [-1])]
    assert told(ranked, "pair", "all", True) == [(["a", "b", "c"], [True, True, False], [3, 1, -1])]
    for up in both:
        assert told(judged("a", up), "single") == [(["a"], [up], [float(up)])]
    assert data.preference_items(ranked, TOK, 64, "single")[1]["p_l"] == .1


@pytest.mark.parametrize("budget", [1, 64, 300, 10 ** 6])
def test_item_batches_keep_items_whole_and_within_the_budget(budget):
    rng = random.Random(0)
    items = [dict(rows=[([0] * rng.randint(1, 40), []) for _ in range(rng.randint(1, 3))])
             for _ in range(50)]
    parts = list(data.item_batches(items, budget))
    assert sorted(id(item) for part in parts for item in part) == sorted(map(id, items))
    for part in parts:
        lengths = [len(ids) for item in part for ids, _ in item["rows"]]
        assert len(lengths) * round_up(max(lengths)) <= budget or len(part) == 1
    assert len(parts) <= {1: 50, 64: 50, 300: 35, 10 ** 6: 1}[budget]


def test_too_long_of_a_single_response_is_one_token_more_than_the_context():
    for record in (judged("yes", True), prefer("no", "yes, it is"), said("yes")):
        n = max(len(ids) for ids, _ in encode(record, TOK, 10 ** 6))
        assert data.too_long(record, TOK, n - 1) and not data.too_long(record, TOK, n)
