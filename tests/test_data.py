"""What lives on disk and as text. Four parts: records (every shape and real sample, malformed input with its valid
twin), the toy world (what is held out stays out, gold rewards), tokenizer and batches, options and the run log."""
import base64
import dataclasses
import gzip
import importlib
import itertools
import json
import math
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
import types
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
from data import (BAD, CATEGORIES, COUNTS, FAMILIES, GOOD, MODIFIERS, OBJECTS, SAYINGS, SHAPES, SPECIALS, THINGS, THINK,
                  TOOLS, VERIFIERS, WORLD, Arith, OptionError, Run, RunConfig, Stream, Tokenizer, UserError, Write,
                  bpe_ranks, check, collate, encode, final_answer, gold, guard, micro_batches, open_stream, pack, pad,
                  pairs, parse, parse_rewards, rank, read_records, read_rows, round_up, safe_metrics, sparkline,
                  split_of, toy_demo, toy_document, toy_task, verifier, write_text)


SHARED = Path(os.environ.get("PLAINALIGN_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


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


FORMATS = {     # three raw rows each, and what they must become
    "text": ([{"text": t} for t in "abc"], [{"text": t} for t in "abc"]),
    "messages": ([{"messages": [user("Q"), assistant(t)], "id": 1} for t in "abc"], [said(t) for t in "abc"]),
    "messages+label": ([{"messages": [user("Q"), assistant(t)], "label": t > "a"} for t in "abc"],
                       [judged(t, t > "a") for t in "abc"]),
    "sharegpt": ([{"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                                     {"from": "gpt", "value": t}]} for t in "abc"],
                 [{"messages": [system("S"), user("Q"), assistant(t)]} for t in "abc"]),
    "alpaca": ([{"instruction": "Q", "input": "", "output": "a"}, {"instruction": "Q", "output": "b"},
                {"instruction": "Q", "input": "I", "output": "c"}],
               [said("a"), said("b"), {"messages": [user("Q\n\nI"), assistant("c")]}]),
    "alpaca pairs": ([{"instruction": "Q", "input": i, "output": "x", "rejected": "b", "chosen": "a"}
                      for i in ("", "", "I")],
                     [prefer("a", "b"), prefer("a", "b"), {"prompt": [user("Q\n\nI")], "responses": ["a", "b"]}]),
    "prompt+response": ([{"prompt": "Q", "response": "a"}, {"prompt": "Q", "completion": "b"},
                         {"prompt": [system("S"), user("Q")], "response": "c"}],
                        [said("a"), said("b"), {"messages": [system("S"), user("Q"), assistant("c")]}]),
    "prompt+response+label": ([{"prompt": "Q", "response": "a", "label": True, "source": "ai"},
                               {"prompt": "Q", "completion": "b", "label": False, "source": "magpie"},
                               {"prompt": [user("Q")], "completion": "c", "label": True}],
                              [{**judged("a", True), "source": "ai"}, judged("b", False), judged("c", True)]),
    "helpsteer2": ([{"prompt": p, "response": r, **dict(zip(RATINGS, s))} for p, r, s in (
                        ("Q", "b", (2, 2, 2, 2, 2)), ("Q", "a", (4, 0, 0, 0, 0)), ("Q", "c", (1, 4, 4, 4, 4)))],
                   [prefer("a", "b", "c")]),
    "prompt+chosen": ([{"prompt": "Q", "chosen": "a", "rejected": "b"},
                       {"prompt": [user("Q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
                       {"prompt": hh("Q", ""), "chosen": " a", "rejected": " b", "source": "human"}],
                      [prefer("a", "b"), prefer("a", "b"), prefer(" a", " b", source="human")]),
    "ultrafeedback binarized": ([{"prompt": "Q", "prompt_id": "0", "messages": [user("Q"), assistant("a")],
                                  "chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")],
                                  "score_chosen": s, "score_rejected": 5.0} for s in (8.5, 6.0, 9)],
                                [prefer("a", "b", margin=m) for m in (3.5, 1.0, 4.0)]),
    "skywork": ([{"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant(t)], "source": "magpie"}
                 for t in "bcd"], [prefer("a", t) for t in "bcd"]),
    "hh": ([{"chosen": hh("Q", "a"), "rejected": hh("Q", t)} for t in "bc"]
           + [{"chosen": hh("Q", "x", "R", "a"), "rejected": hh("Q", "x", "R", "b\nHuman: b")}],
           [prefer("a", "b"), prefer("a", "c"),
            {"prompt": [user("Q"), assistant("x"), user("R")], "responses": ["a", "b\nHuman: b"]}]),
    "ultrafeedback": ([{"source": "sharegpt", "instruction": "Q", "completions": [
                          {"response": t, "overall_score": s, "model": "m"} for t, s in zip("bac", scores)]}
                       for scores in ((5, 7.5, 1), (2, 3, 1), (5, 9, 5))],
                      [prefer("a", "b", "c"), prefer("a", "b", "c"), prefer("a", "b", margin=4)]),
    "nectar": ([{"prompt": hh(q, ""), "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0},
                                                  {"answer": "c", "rank": 3.0}], "turns": 1} for q in "QQQ"],
               [prefer("a", "b", "c")] * 3),
    "ranking": ([{"prompt": "Q", "responses": list(t)} for t in ("abc", "acb", "ab")],
                [prefer(*"abc"), prefer(*"acb"), prefer(*"ab")]),
    "tldr": ([{"info": {"post": "P", "id": "t3"}, "summaries": [{"text": a, "note": "x"}, {"text": b}], "choice": c}
              for a, b, c in (("a", "b", 0), ("b", "a", 1), ("a", "c", 0))],
             [{"prompt": [user("P\n\nTL;DR:")], "responses": list(t)} for t in ("ab", "ab", "ac")]),
    "gsm8k": ([{"question": "Q", "answer": a} for a in ("2*3=<<2*3=6>>6\n#### 6", "#### 1,080", "#### -3")],
              [said("2*3=6\n#### 6"), said("#### 1,080"), said("#### -3")]),
    "rl prompt": ([{"prompt": "Q", "answer": 7, "family": "arith"}, {"prompt": [user("Q")], "label": "x"},
                   {"prompt": "Q", "system": "S", "text": "kept", "source": "mine"}],
                  [{"prompt": [user("Q")], "answer": 7, "family": "arith"}, {"prompt": [user("Q")], "label": "x"},
                   {"prompt": [system("S"), user("Q")], "text": "kept", "source": "mine"}]),
    "system": ([{"prompt": "Q", "response": "a", "system": "S"}, {"instruction": "Q", "output": "b", "system": ""},
                {"messages": [user("Q"), assistant("c")], "system": "T"}],
               [{"messages": [system("S"), user("Q"), assistant("a")]}, said("b"),
                {"messages": [system("T"), user("Q"), assistant("c")]}]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_its_record(tmp_path, name):
    rows, expected = FORMATS[name]
    assert read_records(write(tmp_path, rows)) == expected


def test_every_shape_has_a_format_and_is_named_when_none_fits(tmp_path):
    seen = set()
    for rows, _ in FORMATS.values():
        seen |= {max((k for k in SHAPES if row.keys() >= set(k)), key=len) for row in rows}
    assert seen == SHAPES.keys()
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*\['src', 'tgt'\]") as error:
        read_records(write(tmp_path, [{"src": "a", "tgt": "b"}]))
    assert all("+".join(keys) in str(error.value) for keys in SHAPES) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_canonical_records_read_back_as_themselves(tmp_path, name):
    records = FORMATS[name][1]
    assert read_records(write(tmp_path, records)) == records


# ---- the real files

@pytest.mark.parametrize("name, want, count, lost", [
    ("alpaca_and_pairs/instruction-data.json", None, 1100, ""),
    ("alpaca_and_pairs/instruction-data-with-preference.json", None, 1094, "dropped 6 identical pairs"),
    ("alpaca_and_pairs/instruction-data-with-preference.json", "messages", 1100, ""),
    ("chat/toy_chat_fine_tuning.jsonl", None, 10, ""),
    ("gsm8k/train_first4000.jsonl", None, 4000, ""),
    ("gsm8k/train_first4000.jsonl", "prompt", 4000, ""),
    ("helpsteer2/helpsteer2_validation_first8.jsonl", None, 3, "dropped 1 tied rating"),
    ("helpsteer2/helpsteer2_validation_first8.jsonl", "prompt", 4, ""),
    ("hh/harmless_first100.jsonl.gz", None, 99, "dropped 1 empty answer"),
    ("hh/harmless_first100.jsonl.gz", "messages", 99, "dropped 1 empty answer"),
    ("hh/harmless_first100.jsonl.gz", "prompt", 100, ""),
    ("kto/kto_en_demo.json", None, 300, ""),
    ("kto/kto_en_demo.json", "messages", 150, "dropped 150 thumbs-down answers"),
    ("plaintext/tinyshakespeare_input.txt", "text", 1, ""),
])
def test_real_file_counts(name, want, count, lost, capsys):
    assert len(read_records(real(name), want)) == count
    assert capsys.readouterr().err == f"{Path(name).name}: {count} records" + f"; {lost}" * bool(lost) + "\n"


def test_real_alpaca_input_and_the_six_identical_pairs():
    path = real("alpaca_and_pairs/instruction-data-with-preference.json")
    raw, records = [row for _, row in read_rows(path)], read_records(path, "preference")
    assert [i for i, row in enumerate(raw) if row["chosen"] == row["rejected"]] == [122, 226, 400, 566, 628, 676]
    assert records[0]["prompt"] == [user(raw[0]["instruction"] + "\n\nfreind --> friend")]
    assert records[2]["prompt"] == [user("Convert 45 kilometers to meters.")]
    assert records[122]["responses"] == [raw[123]["chosen"], raw[123]["rejected"]]


def test_real_hh_rows_29_and_86():
    path = real("hh/harmless_first100.jsonl.gz")
    (where, raw), records = list(read_rows(path))[86], read_records(path)
    assert where == "harmless_first100.jsonl.gz:87" and raw["chosen"].endswith("\n\nAssistant: ")
    assert all(r["prompt"][-1]["role"] == "user" and len(r["prompt"]) % 2 for r in records)
    odd = records[29]                       # its answers begin with "Human:" but are one turn
    assert [m["role"] for m in odd["prompt"]] == ["user", "assistant"] * 3 + ["user"]
    assert odd["responses"][0] == "Human: No, you are racist. She is not a thug and does not like thug hoodlum music."
    assert "the address is" not in str(read_records(path, "messages"))     # a rejected answer is no demonstration


def test_real_helpsteer2_margins():
    assert [r["margin"] for r in read_records(real("helpsteer2/helpsteer2_validation_first8.jsonl"))] == [2, 3, 2]


def test_real_kto_turns_and_labels():
    records = read_records(real("kto/kto_en_demo.json"))
    assert sum(r["label"] for r in records) == 150
    lengths = [len(r["prompt"]) + 1 for r in records]
    assert {n: lengths.count(n) for n in set(lengths)} == {2: 223, 4: 3, 6: 47, 8: 22, 10: 1, 12: 4}
    assert all(r["prompt"][-1]["role"] == "user" for r in records)


def test_real_chat_rows_without_a_user_turn():
    records = read_records(real("chat/toy_chat_fine_tuning.jsonl"))
    assert [i for i, r in enumerate(records) if all(m["role"] != "user" for m in r["messages"])] == [3, 8, 9]
    assert max(len(m["content"]) for r in records for m in r["messages"]) >= 26000


def test_real_gsm8k_answers():
    path = real("gsm8k/train_first4000.jsonl")
    records, raw = read_records(path, "prompt"), [row["answer"] for _, row in read_rows(path)]
    assert all(type(r["answer"]) is int for r in records)
    assert sum("," in a.split("####")[1] for a in raw) == 45
    assert (records[0]["answer"], records[345]["answer"], records[644]["answer"]) == (72, 1080, 109200000)
    demos = read_records(path, "messages")
    assert not any("<<" in r["messages"][1]["content"] for r in demos)
    assert demos[0]["messages"][1]["content"].endswith("48+24 = 72 clips altogether in April and May.\n#### 72")
    assert set(demos[0]) == {"messages"}


def test_real_text_is_verbatim():
    path = real("plaintext/tinyshakespeare_input.txt")
    assert read_records(path) == [{"text": path.read_bytes().decode()}]


# ---- conversions

def test_want_converts_what_the_meaning_allows(tmp_path, capsys):
    path = write(tmp_path, [{"prompt": "Q", "chosen": "a", "rejected": "b", "source": "ai"}])
    assert read_records(path, "messages") == [{**said("a"), "source": "ai"}]
    assert read_records(path, "prompt") == [{"prompt": [user("Q")], "source": "ai"}]
    thumbs = write(tmp_path, [{"prompt": "Q", "response": r, "label": r == "a"} for r in "ab"])
    capsys.readouterr()
    assert read_records(thumbs, "messages") == [said("a")]
    assert capsys.readouterr().err == "rows.jsonl: 1 records; dropped 1 thumbs-down answer\n"
    assert read_records(write(tmp_path, FORMATS["helpsteer2"][0]), "messages") == [said("a")]
    assert read_records(write(tmp_path, FORMATS["ultrafeedback"][0]), "messages") == [said("a")] * 3
    answers = [r["answer"] for r in read_records(write(tmp_path, FORMATS["gsm8k"][0]), "prompt")]
    assert answers == [6, 1080, -3] and all(type(a) is int for a in answers)
    assert read_records(write(tmp_path, [{"question": "Q", "answer": "x = 1, y"}]), "prompt")[0]["answer"] == "x = 1, y"


@pytest.mark.parametrize("name, want", [
    ("text", "messages"), ("text", "prompt"), ("messages", "text"), ("messages", "preference"),
    ("messages", "thumbs"), ("rl prompt", "messages"), ("hh", "thumbs"), ("prompt+response+label", "preference")])
def test_want_refuses_the_rest_and_says_where_and_what(tmp_path, name, want):
    with pytest.raises(UserError, match=rf'^rows.jsonl:1: found "\w+" .* but "{want}" is needed$'):
        read_records(write(tmp_path, FORMATS[name][0]), want)


# ---- what is dropped, and said

@pytest.mark.parametrize("rows, left, lost", [
    ([{"prompt": "Q", "chosen": "a", "rejected": "a"}], 0, "1 identical pair"),
    ([{"prompt": "Q", "chosen": " \n", "rejected": "a"}] * 2, 0, "2 empty answers"),
    ([{"prompt": "Q", "responses": ["a", "", "b", "a"]}], 1, "1 empty answer, 1 identical pair"),
    ([{"prompt": "Q", "response": ""}, {"messages": [user("Q"), assistant(" ")]}], 0, "2 empty answers"),
    ([{"text": "\n"}], 0, "1 empty text"),
    ([{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5}], 0, "1 tied rating"),
    ([{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 5}], 0, "1 contradictory pair"),
    ([{"chosen": hh("Q", "a"), "rejected": hh("R", "b")}], 0, "1 contradictory pair"),
    ([{"chosen": hh("Q", "a", "R"), "rejected": hh("Q", "b")}], 0, "1 broken transcript"),
    ([{"chosen": hh("Q", "a\n\nAssistant: c"), "rejected": hh("Q", "b")}], 0, "1 broken transcript"),
    ([{"prompt": p, "response": r, **dict.fromkeys(RATINGS, 3)} for p, r in ("Qa", "Ra", "Rb")], 0,
     "1 lone answer, 1 tied rating"),
])
def test_drops_are_counted_aloud(tmp_path, capsys, rows, left, lost):
    good = {"prompt": "Z", "chosen": "a", "rejected": "b"}
    assert len(read_records(write(tmp_path, rows + [good]))) == left + 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"rows.jsonl: {left + 1} records; dropped ") and printed.count("\n") == 1
    assert sorted(printed.strip().split("dropped ")[1].split(", ")) == sorted(lost.split(", "))
    if not left:
        with pytest.raises(UserError, match="^rows.jsonl: 0 records; dropped "):
            read_records(write(tmp_path, rows))


def test_helpsteer_tie_is_broken_by_the_mean_and_only_adjacent_rows_meet(tmp_path):
    row = lambda p, r, *s: {"prompt": p, "response": r, **dict(zip(RATINGS, s))}
    rows = [row("Q", "b", 3, 1, 1, 1, 1), row("Q", "a", 3, 1, 1, 1, 2), row("R", "x", 1, 1, 1, 1, 1),
            row("R", "y", 2, 1, 1, 1, 1), row("Q", "c", 0, 0, 0, 0, 0), row("Q", "d", 4, 0, 0, 0, 0)]
    assert read_records(write(tmp_path, rows)) == [
        prefer("a", "b", margin=0), {"prompt": [user("R")], "responses": ["y", "x"], "margin": 1},
        prefer("d", "c", margin=4)]


def test_a_margin_belongs_to_a_pair(tmp_path):
    rows = [prefer("a", "b", margin=0.5), prefer("a", "b", "c", margin=0.5)]
    assert read_records(write(tmp_path, rows)) == [rows[0], prefer("a", "b", "c")]


def test_rank_and_pairs():
    assert rank(["b", "a"], [2, 5]) == {"responses": ["a", "b"], "margin": 3}
    assert rank(["a", "b", "c"], [5, 5, 2]) == {"responses": ["a", "c"], "margin": 3}
    assert rank(["a", "b"], [1, 1]) == {"responses": ["a"]} and rank([], []) == {"responses": []}
    two = lambda record: [tuple(p["responses"]) for p in pairs(record)]
    assert two(prefer("A", "C", "B")) == [("A", "C"), ("A", "B"), ("C", "B")]
    assert len(set(two(prefer(*"ABCDEFG")))) == 21 and all(a < b for a, b in two(prefer(*"ABCDEFG")))
    assert pairs(prefer("a", "b", margin=3)) == [prefer("a", "b", margin=3)]
    assert all("margin" not in p for p in pairs(prefer(*"ABC")))
    assert all(p["prompt"] == [user("Q")] and p["source"] == "ai" for p in pairs(prefer(*"ABC", source="ai")))


# ---- bytes

A, B = b'{"text": "a"}', b'{"text": "b"}'


@pytest.mark.parametrize("data, wheres", [
    (A + b"\n" + B + b"\n", [":1", ":2"]), (A + b"\n" + B, [":1", ":2"]),
    (b"\xef\xbb\xbf" + A + b"\r\n\r\n \r\n" + B + b"\r\n", [":1", ":4"]),
    (b"[" + A + b",\n" + B + b"]", ["[0]", "[1]"]), (b"\xef\xbb\xbf\n [\r\n" + A + b" , " + B + b"\n]\n", ["[0]", "[1]"])])
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
        ("rows.jsonl:1", text), ("rows.jsonl:2", "next"), ("rows.jsonl:3", "\U0001F600"), ("rows.jsonl:4", "\U0001F600")]


def test_text_files_are_one_document(tmp_path):
    text = "[a]\r\n\n{b}\u2028\x0b\n"
    for name, data in (("x.txt", text.encode()), ("x.md", b"\xef\xbb\xbf" + text.encode()),
                       ("x.txt.gz", gzip.compress(text.encode()))):
        assert [row for _, row in read_rows(write(tmp_path, data, name))] == [{"text": text}]


GOOD_ROW = b'{"text": "a"}\n'
BAD_ROWS = [     # the broken row, its valid twin, a word of the message
    (b'{"text": "a", "x": NaN}', b'{"text": "a", "x": "NaN"}', "float"),
    (b'{"text": "a", "x": [-Infinity]}', b'{"text": "a", "x": [-1]}', "float"),
    (b'{"text": "a", "x": 1e999}', b'{"text": "a", "x": 1e99}', "float"),
    (b'{"text": "a", "text": "b"}', b'{"text": "a", "test": "b"}', "same key twice"),
    (b'{"text": "a", "x": [{"y": 1, "y": 1}]}', b'{"text": "a", "x": [{"y": 1}, {"y": 1}]}', "same key twice"),
    (b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', "surrogate"),
    (b'{"text": "a", "\\udc00": 1}', b'{"text": "a", "\\u0063": 1}', "surrogate"),
    (b'{"text": "\xff"}', "{\"text\": \"\u00ff\"}".encode(), "utf-8"),
    (b'{"text": "\xed\xa0\x80"}', b'{"text": "\xed\x9f\xbf"}', "utf-8"),
    (b'{"text": "a"', b'{"text": "a"}', "delimiter"),
    (b"{'text': 'a'}", b'{"text": "a"}', "quotes"),
    (b'{"text": "a",}', b'{"text": "a"}', "quotes"),
    (b'["text"]', b'{"text": "a"}', "object, not list"),
    (b'"text"', b'{"text": "a"}', "object, not str"),
    (b'null', b'{"text": "a"}', "object, not NoneType"),
    (b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"text": "a", "x": [[[[]]]]}', "recursion"),
]


@pytest.mark.parametrize("bad, twin, word", BAD_ROWS)
def test_malformed_rows_name_file_and_line(tmp_path, bad, twin, word):
    jsonl = lambda row: write(tmp_path, GOOD_ROW + b"\n" + row + b"\n" + GOOD_ROW)
    array = lambda row: write(tmp_path, b"[\n" + GOOD_ROW + b",\n" + row + b"\n,\n" + GOOD_ROW + b"]", "rows.json")
    assert len(read_records(jsonl(twin))) == len(read_records(array(twin))) == 3
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: ") as error:
        read_records(jsonl(bad))
    assert word in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^rows\.json(\[1\]|:[456]): |^rows.json:1: .*recursion") as error:
        read_records(array(bad))
    # an object left open swallows the next row, so there the parser stumbles later and over something else
    assert (word in str(error.value) or bad == b'{"text": "a"') and "\n" not in str(error.value)


def test_two_values_on_a_line(tmp_path):
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: Extra data"):
        read_records(write(tmp_path, GOOD_ROW + A + b" " + B))


def test_jsonl_is_read_a_line_at_a_time(tmp_path):
    rows = read_rows(write(tmp_path, GOOD_ROW + b"not json"))
    assert next(rows) == ("rows.jsonl:1", {"text": "a"})
    with pytest.raises(UserError, match="rows.jsonl:2"):
        next(rows)


@pytest.mark.parametrize("name, data", [
    *((name, data) for name in ("rows.jsonl", "rows.txt") for data in (b"", b"\n \r\n", b"\xef\xbb\xbf", gzip.compress(b""))),
    ("rows.json", b"[]"), ("rows.json", b" [\n]\n")])
def test_empty_files(tmp_path, name, data):
    with pytest.raises(UserError, match=f"^{name}.*no rows"):
        read_records(write(tmp_path, data, name))


def test_damaged_gzip(tmp_path):
    data = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919 ** 3) for i in range(3000)))
    assert len(read_records(write(tmp_path, data, "x.gz"))) == 3000
    for broken in (data[:len(data) // 2], data[:-4], data[:-8] + b"\0" * 8, data[:200] + b"\xff" * 50 + data[250:]):
        with pytest.raises(UserError, match=r"^x\.gz:\d+: "):
            read_records(write(tmp_path, broken, "x.gz"))
    rows = read_rows(write(tmp_path, data[:-4], "x.gz"))        # only the checksum is cut: all lines were read
    with pytest.raises(UserError, match=r"^x\.gz:3001: "):
        list(rows)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no-such.jsonl.*No such file"):
        read_records(tmp_path / "no-such.jsonl")


def test_invalid_utf8_in_a_text_names_its_line(tmp_path):
    with pytest.raises(UserError, match=r"^x\.txt:3: .*utf-8"):
        read_records(write(tmp_path, b"a\nb\n\xff\nc", "x.txt"))


# ---- a known shape with a wrong type: the valid twin is the row with `key` set back

@pytest.mark.parametrize("row, key, wrong", [
    ({"text": "a"}, "text", 1),
    ({"messages": [user("Q"), assistant("a")]}, "messages", "a"),
    ({"messages": [user("Q"), assistant("a")]}, "messages", []),
    ({"messages": [user("Q"), assistant("a")]}, "messages", ["a"]),
    ({"messages": [user("Q"), assistant("a")]}, "messages", [user("Q")]),
    ({"messages": [user("Q"), assistant("a")]}, "messages", [user("Q"), assistant(None)]),
    ({"messages": [user("Q"), assistant("a")]}, "messages", [{"role": "tool", "content": "x"}, assistant("a")]),
    ({"messages": [user("Q"), assistant("a")]}, "messages", [{"role": ["user"], "content": "x"}, assistant("a")]),
    ({"messages": [user("Q"), assistant("a")], "label": True}, "label", 1),
    ({"prompt": "Q", "response": "a", "label": True}, "label", "good"),
    ({"prompt": "Q", "response": "a"}, "response", None),
    ({"prompt": "Q", "response": "a", "system": "S"}, "system", 3),
    ({"prompt": "Q"}, "prompt", 3), ({"prompt": "Q"}, "prompt", []), ({"prompt": "Q"}, "prompt", [assistant("a")]),
    ({"instruction": "Q", "input": "I", "output": "a"}, "input", ["I"]),
    ({"instruction": "Q", "input": "I", "output": "a"}, "instruction", None),
    ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "rejected", 0),
    ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "chosen", [user("Q")]),
    ({"chosen": hh("Q", "a"), "rejected": hh("Q", "b")}, "chosen", {"a": 1}),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}, "score_rejected", "1"),
    ({"prompt": "Q", "responses": ["a", "b"]}, "responses", ["a", 1]),
    ({"prompt": "Q", "responses": ["a", "b"], "margin": 1.5}, "margin", "1.5"),
    ({"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}, "answers", ["a", "b"]),
    ({"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "choice", 2),
    ({"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "choice", True),
    ({"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "summaries", [{"text": "a"}]),
    ({"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "info", "P"),
    ({"question": "Q", "answer": "#### 1"}, "answer", 1),
])
def test_wrong_types_name_file_line_and_key(tmp_path, row, key, wrong):
    twin = {"text": "first"}
    assert len(read_records(write(tmp_path, [twin, row]))) == 2
    with pytest.raises(UserError, match=rf'^rows\.jsonl:2: .*"{key}') as error:
        read_records(write(tmp_path, [twin, {**row, key: wrong}]))
    assert "\n" not in str(error.value)


def test_wrong_types_inside_a_list_of_answers(tmp_path):
    for row, key in (({"instruction": "Q", "completions": [{"response": "a", "overall_score": "5"}]}, "overall_score"),
                     ({"prompt": "Q", "answers": [{"answer": "a", "rank": True}]}, "rank"),
                     ({"info": {"post": None}, "summaries": [], "choice": 0}, "post"),
                     ({"prompt": "Q", "response": "a", **dict.fromkeys(RATINGS, 1), "verbosity": None}, "verbosity"),
                     ({"chosen": "a", "rejected": "b"}, "chosen")):
        with pytest.raises(UserError, match=rf'^rows\.jsonl:1: .*"{key}"'):
            read_records(write(tmp_path, [row]))


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


def test_about_a_tenth_of_the_keys_is_test_and_a_tenth_val():
    keys = {f"{a} {op} {b} {op2} {c}" for a in range(1, 21) for b in range(1, 10) for c in range(1, 10)
            for op in "+-" for op2 in "+-"}
    for split, share in {"train": .8, "val": .1, "test": .1}.items():
        assert abs(sum(split_of(key) == split for key in keys) / len(keys) - share) < .01
    for names in ([f"{m} {t}" for m in MODIFIERS for t in THINGS],
                  [f"{v} {o}" for v in TOOLS for o in OBJECTS],
                  [f"{n} {c} with {x}" for n in COUNTS for c in CATEGORIES for x in CATEGORIES[c]]):
        for split in ("val", "test"):
            assert .06 < sum(split_of(name) == split for name in names) / len(names) < .14


def test_the_splits_are_those_of_the_published_figures():
    """Another hash or share moves tasks between splits: a checkpoint would have trained on the new test."""
    keys = "20 - 9 + 4", "black urn", "steal fence", "four tools with hammer"
    assert [split_of(key) for key in keys] == ["test", "val", "test", "train"]


def test_an_unknown_split_is_refused():
    with pytest.raises(AssertionError, match="valid"):
        toy_task("valid", "fmt", random.Random(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_held_out_in_demonstrations(family):
    pairs = demos(family)
    assert not held_out(task["prompt"] + "\n" + answer for task, answer in pairs)
    named = {subject for _, answer in pairs for subject in subjects(answer)}
    assert len(named) > 100 or family == "fmt"      # the scan is not blind; lists alone name no subject


def test_nothing_held_out_in_documents():
    rng = random.Random(2)
    texts = [words(toy_document(rng)) for _ in range(N)]
    assert not held_out(texts)
    assert len({subject for text in texts for subject in subjects(text)}) > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scan_finds_a_planted_task(family):
    for task in tasks("test", family, 200):
        rng = random.Random(3)
        assert (task["key"], task["prompt"]) in held_out([task["prompt"]])
        if family != "fmt":
            plain = WORLD[family].text(task, rng)
            assert (task["key"], plain) in held_out(["The answer is 3.", plain])


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
            assert abs(sum(task["level"] == level for task in some) / len(some) - .25) < .04


def test_word_lists_do_not_overlap():
    items = [x for c in CATEGORIES.values() for x in c]
    assert len(items) == len(set(items)) == 50 and len(THINGS) == 30 and len(MODIFIERS) == 8
    said = [s for sentences in SAYINGS.values() for s in sentences]
    assert len(said) == len(set(said)) == len(Write.KINDS)
    assert all(len(SAYINGS[c]) >= 6 for c in CATEGORIES) and not set(GOOD) & set(BAD)


def test_only_the_verb_or_the_owner_tells_harm():
    some = tasks("train", "safe")
    assert abs(statistics.mean(task["safe"] for task in some) - .6) < .04
    by = lambda field, safe: {task[field] for task in some if task["safe"] == safe}
    assert by("object", True) == by("object", False) == set(OBJECTS)
    assert by("verb", True) & by("verb", False) == {"cut", "move", "open"}
    assert by("key", True) & by("key", False)           # the same deed, and only the owner differs
    assert not by("prompt", True) & by("prompt", False)


def test_prompts_and_answers_are_short():
    for family, limit in {"arith": 125, "write": 220, "safe": 110, "fmt": 110}.items():
        for task, answer in demos(family):
            if "<think>" not in answer:
                assert len(task["prompt"]) + len(answer) <= limit


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_survives_json(family):
    for split in ("train", "val", "test"):
        for task in tasks(split, family, 200):
            assert json.loads(json.dumps(task)) == task and task["family"] == family


def test_same_seed_same_world_and_tokenizer_in_another_process():
    code = ("import random, data as w; r = random.Random(7); "
            "tasks = [w.toy_task(s, f, r) for s in ('train', 'val') for f in w.FAMILIES for _ in '12345']; "
            "print([(t, w.toy_demo(t, r)) for t in tasks], [w.toy_document(r) for _ in range(50)]); "
            "print(w.Tokenizer.load('toy').fingerprint, w.split_of('a'))")
    there = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "7"}, check=True,
                           cwd=ROOT, capture_output=True, text=True).stdout
    with redirect_stdout(StringIO()) as here:
        exec(code)
    assert there == here.getvalue() and len(there) > 10000
    assert tasks("train", "fmt", 20, seed=0) != tasks("train", "fmt", 20, seed=1)


# ---- demonstrations and documents

@pytest.mark.parametrize("family, low, high, spread",
                         [("arith", 1, 1, (0, 0)), ("write", .5, .85, (1, 1.4)), ("safe", .3, .5, (.6, .9)),
                          ("fmt", .6, .8, (.2, .3))])
def test_demonstrations_are_imperfect_as_stated(family, low, high, spread):
    scores = [gold(task, answer) for task, answer in demos(family)]
    assert low <= statistics.mean(scores) <= high and spread[0] <= statistics.pstdev(scores) <= spread[1]
    assert max(scores) >= (3 if family == "write" else 1)


def test_demonstrations_err_at_the_stated_rates():
    share = lambda flags: sum(flags) / len(flags)
    assert abs(share(["<think>" in answer for _, answer in demos("arith")]) - THINK) < .04
    scored = [(task, safe_metrics(task, answer)) for task, answer in demos("safe")]
    assert abs(share([m["refused"] for task, m in scored if task["safe"]]) - .25) < .04
    assert abs(share([m["cost"] for task, m in scored if not task["safe"]]) - .5) < .06
    assert abs(share([f"The {task['key']} is" in answer for task, answer in demos("write")]) - .85) < .04


def test_documents_are_conversations_and_a_quarter_text_of_one_to_six_sentences():
    rng = random.Random(4)
    documents = [toy_document(rng) for _ in range(N)]
    texts = [d["text"] for d in documents if "text" in d]
    assert abs(len(texts) / N - .25) < .03 and all(1 <= text.count(".") <= 6 for text in texts)
    wrong, thinking, sums_asked = 0, 0, 0
    for d in documents:
        if "messages" in d:
            user, assistant = d["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            if "The answer is" in assistant["content"]:
                asked = max(sums(user["content"]), key=len)
                sums_asked += 1
                wrong += final_answer(assistant["content"]) != eval(asked)
                thinking += "<think>" in assistant["content"]
    assert .06 < wrong / sums_asked < .14 and abs(thinking / sums_asked - THINK) < .05


# ---- gold rewards

@pytest.mark.parametrize("text, answer", [
    ("The answer is 18.", 18), ("  The answer is 18.\n", 18), ("The answer is 0.", 0),
    ("<think>17 - 8 = 9, 9 + 9 = 18</think>The answer is 18.", 18), ("The answer is -3.", -3),
    ("<think></think> The answer is 18.", 18), ("<think>two\nlines</think>\nThe answer is 18.", 18),
    ("<think>The answer is 4.</think>The answer is 18.", 18),
    ("The answer is 42 is wrong The answer is 42.", None), ("The answer is 17. The answer is 18.", None),
    ("The answer is 18. The answer is 18.", None), ("<think>17 - 8 = 9 The answer is 18.", None),
    ("<think>The answer is 18.</think>", None), ("The answer is 18.</think>", None),
    ("<think>a</think><think>b</think>The answer is 18.", None), ("The answer is 18.<think>a</think>", None),
    ("<think>a<think>b</think>The answer is 18.", None), ("So <think>a</think>The answer is 18.", None),
    ("The answer is 18", None), ("The answer is 18!", None), ("the answer is 18.", None), ("18", None),
    ("The answer is 018.", None), ("The answer is 1 8.", None), ("The answer is 18.0.", None), ("", None),
    ("The answer is -0.", None), ("The answer is \u0661\u0668.", None),
    pytest.param(f"The answer is {'9' * 5000}.", None, id="5000 digits")])
def test_final_answer_reads_the_whole_text_or_nothing(text, answer):
    assert final_answer(text) == answer


def test_gold_of_sums():
    task = {"family": "arith", "prompt": "What is 17 - 8 + 9?", "key": "17 - 8 + 9", "answer": 18, "level": 2}
    assert gold(task, "The answer is 18.") == 1 == gold(task, "<think>anything</think>The answer is 18.")
    assert gold(task, "The answer is 18.", finished=False) == 0 == gold(task, "The answer is 17.")
    assert Arith.text(task, None) == "17 - 8 = 9, 9 + 9 = 18."


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
    refused = float(unsafe == 1)
    assert safe_metrics(FENCE, response) == {"help": pytest.approx(help), "cost": 0, "refused": refused}
    scores = safe_metrics(GATE, response)
    assert (scores["cost"], scores["refused"]) == (float(unsafe == -1), refused)
    for task in (FENCE, GATE):
        assert gold(task, response, finished=False) == 0
        assert safe_metrics(task, response, finished=False) == {"help": 0, "cost": 0, "refused": 0}


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



