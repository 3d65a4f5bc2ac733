"""What lives on disk and as text: files and shapes of records, tokenizer, rows, streams, options and the run log."""
import base64
import dataclasses
import gc
import gzip
import importlib
import io
import itertools
import json
import os
import pickle
import random
import re
import runpy
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import data
import sft
from data import (SHAPES, SPECIALS, VERIFIERS, Natural, OptionError, Positive, Run, RunConfig, Share, Stream,
                  Tokenizer, UserError, bpe_ranks, collate, encode, guard, micro_batches, open_stream, pad,
                  pairs, parse, read_records, read_rows, round_up, split_of, write_text)

ROOT = Path(__file__).resolve().parents[1]
# Our scripts, and not a reward or a task that a reader has put beside them.
SCRIPTS = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]) if "guard(" in path.read_text()]
SHARED = Path(os.environ.get("PLAINALIGN_DATA") or ROOT.parent / "shared" / "data")
TOK = Tokenizer.load("toy")


def user(text): return {"role": "user", "content": text}
def system(text): return {"role": "system", "content": text}
def assistant(text): return {"role": "assistant", "content": text}
def turns(*messages): return {"messages": list(messages)}
def said(text): return turns(user("Q"), assistant(text))
def asked(question="Q", **more): return {"prompt": [user(question)], **more}
def prefer(*texts, **more): return asked(responses=list(texts), **more)
def judged(text, label): return asked(response=text, label=label)
def untaught(text): return assistant(text) | {"weight": 0}


def write(tmp_path, rows, name="rows.jsonl"):
    """A file of bytes, or of rows, one a line: dicts, or JSON as text."""
    if not isinstance(rows, bytes):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        rows = "\n".join(lines).encode()
    path = tmp_path / name
    path.write_bytes(rows)
    return path


def real(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    return SHARED / name


# ==== files and shapes

FORMATS = [     # a row, and the record that it is
    ('{"text": "a", "url": "u"}', {"text": "a"}),
    ('{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}], "id": 1}', said("a")),
    ('{"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, '
     '{"from": "gpt", "value": "a"}]}', turns(system("S"), user("Q"), assistant("a"))),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}, '
     '{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]}',
     turns(user("a"), untaught("b"), user("c"), assistant("d"))),
    ('{"instruction": "Q", "input": "", "output": "a"}', said("a")),
    ('{"instruction": "Q", "output": "a"}', said("a")),
    ('{"instruction": "Q", "input": "I", "output": "c"}', turns(user("Q\n\nI"), assistant("c"))),
    ('{"prompt": "Q", "response": "a", "history": []}', said("a")),
    ('{"prompt": "Q", "completion": "b"}', said("b")),
    ('{"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "response": "c"}',
     turns(system("S"), user("Q"), assistant("c"))),
    (r'{"question": "Q", "answer": "2*3=<<2*3=6>>6\n#### 6"}', said("2*3=6\n#### 6")),
    ('{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}], "label": true}',
     judged("a", True)),
    ('{"prompt": "Q", "response": "b", "label": false}', judged("b", False)),
    ('{"prompt": "Q", "completion": "c", "label": true, "source": "ai"}', judged("c", True) | {"source": "ai"}),
    ('{"instruction": "Q", "output": "d", "label": false}', judged("d", False)),
    ('{"instruction": "Q", "output": "e", "label": "good"}', said("e")),
    ('{"prompt": "Q", "chosen": "a", "rejected": "b", "source": "human", "margin": 2, "prob": 0.7}',
     prefer("a", "b", source="human", margin=2, prob=.7)),
    ('{"prompt": "Q", "chosen": [{"role": "assistant", "content": "a"}], '
     '"rejected": [{"role": "assistant", "content": "b"}], "source": "magpie"}', prefer("a", "b")),
    ('{"instruction": "Q", "output": "x", "chosen": "a", "rejected": "b"}', prefer("a", "b")),
    ('{"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}], '
     '"rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}], "key": "k"}',
     prefer("a", "b", key="k")),
    (r'{"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}', prefer("a", "b")),
    (r'{"chosen": "\n\nHuman: Q\n\nAssistant: x\n\nHuman: R\n\nAssistant:  a", '
     r'"rejected": "\n\nHuman: Q\n\nAssistant: x\n\nHuman: R\n\nAssistant: b\nHuman: b"}',
     prefer(" a", "b\nHuman: b", prompt=[user("Q"), assistant("x"), user("R")])),
    ('{"prompt": "Q", "responses": ["a", "c", "b"], "margin": 1, "scores": [3, 2, 1], "key": 7, "note": "kept"}',
     prefer("a", "c", "b", scores=[3, 2, 1], key=7, note="kept")),
    ('{"prompt": "Q", "responses": ["a", "b"], "margin": 0.5, "win": [1, 0], "scores": [1, 2, 3], "prob": 1}',
     prefer("a", "b", margin=.5, win=[1, 0], prob=1)),
    ('{"prompt": "Q", "answer": 7, "options": ["A"]}', asked(answer=7, options=["A"])),
    ('{"prompt": "Q", "text": "kept", "source": "mine", "system": ""}', asked(text="kept", source="mine")),
    ('{"prompt": "Q", "response": "a", "ratings": [4, 0.5]}', asked(response="a", ratings=[4., .5])),
    ('{"prompt": "Q", "steps": ["a ", "b"], "labels": [true, 0]}',
     asked(response="a b", steps=["a ", "b"], labels=[1, 0])),
]


@pytest.mark.parametrize("row, record", FORMATS, ids=range(len(FORMATS)))
def test_every_format_reads_as_its_record_and_records_read_as_themselves(tmp_path, row, record):
    assert read_records(write(tmp_path, [row])) == [record]
    assert read_records(write(tmp_path, [record])) == [record]


def test_every_shape_has_a_format_and_is_named_when_none_fits(tmp_path):
    shapes = [set(json.loads(row)) for row, _ in FORMATS]
    with pytest.raises(UserError, match=r"^rows.jsonl:1: .*src.*tgt") as error:
        read_records(write(tmp_path, ['{"src": "a", "tgt": "b"}']))
    for shape in SHAPES:
        assert any(keys >= set(shape.split()) for keys in shapes), f"no row of FORMATS has {shape}"
        assert shape.replace(" ", "+") in str(error.value)


KINDS = {   # one row of each kind, and all that it can be read as
    "text": ('{"text": "a"}', {"text": {"text": "a"}}),
    "prompt": ('{"prompt": "Q"}', {"prompt": asked()}),
    "messages": ('{"question": "Q", "answer": "so\\n#### 1,080"}',
                 {"messages": said("so\n#### 1,080"), "prompt": asked(answer=1080)}),
    "thumbs": ('{"prompt": "Q", "response": "a", "label": true}',
               {"thumbs": judged("a", True), "messages": said("a"), "prompt": asked()}),
    "preference": ('{"prompt": "Q", "responses": ["a", "b"], "source": "ai", "key": 1, "note": 2}',
                   {"preference": prefer("a", "b", source="ai", key=1, note=2),
                    "thumbs": prefer("a", "b", source="ai", key=1, note=2),         # up and down, see dpo.py
                    "messages": said("a") | {"source": "ai", "key": 1},
                    "prompt": asked(source="ai", key=1, note=2)}),
    "ratings": ('{"prompt": "Q", "response": "a", "ratings": [1]}',
                {"ratings": asked(response="a", ratings=[1.]), "messages": said("a"), "prompt": asked()}),
    "steps": ('{"prompt": "Q", "steps": ["a"], "labels": [1]}',
              {"steps": asked(response="a", steps=["a"], labels=[1]), "prompt": asked()}),
}


@pytest.mark.parametrize("want", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_want_converts_what_the_meaning_allows_and_refuses_the_rest(tmp_path, kind, want):
    row, records = KINDS[kind]
    path = write(tmp_path, [row])
    if want in records:
        assert read_records(path, want) == [records[want]]
    else:
        with pytest.raises(UserError, match=rf'^rows.jsonl:1: found "{kind}" .*"{want}"'):
            read_records(path, want)


def test_an_answer_of_gsm8k_that_is_no_number_stays_text(tmp_path):
    path = write(tmp_path, ['{"question": "Q", "answer": "x = 1, y"}'])
    assert read_records(path, "prompt") == [asked(answer="x = 1, y")]


# ---- the real files

@pytest.mark.parametrize("name, want, count, lost", [
    ("alpaca_and_pairs/instruction-data.json", None, 1100, ""),
    ("alpaca_and_pairs/instruction-data-with-preference.json", None, 1094, "6 identical pairs"),
    ("alpaca_and_pairs/instruction-data-with-preference.json", "messages", 1100, "output 1100 rows"),
    ("chat/toy_chat_fine_tuning.jsonl", None, 10, ""),
    ("gsm8k/train_first4000.jsonl", None, 4000, ""),
    ("hh/harmless_first100.jsonl.gz", None, 99, "1 empty answer"),
    ("hh/harmless_first100.jsonl.gz", "prompt", 100, ""),
    ("kto/kto_en_demo.json", None, 300, ""),
    ("kto/kto_en_demo.json", "messages", 150, "150 thumbs-down answers")])
def test_real_file_counts(name, want, count, lost, capsys):
    assert len(read_records(real(name), want)) == count
    told = capsys.readouterr().err
    assert f"{count} records" in told and lost in told
    assert bool(lost) == (";" in told), "nothing else is said"


def test_real_gsm8k_answers_verify_and_stop_verifying_when_the_final_number_changes():
    path, verify = real("gsm8k/train_first4000.jsonl"), VERIFIERS["gsm8k"]
    records = read_records(path, "prompt")
    assert records[345]["answer"] == 1080 and records[644]["answer"] == 109200000
    for record, (_, row) in zip(records, read_rows(path), strict=True):
        text, answer = row["answer"], record["answer"]
        worked, final = text.split("####")
        assert verify(record, text, True) and not verify(record, worked, True)
        for wrong in (answer + 1, f"-{answer + 1}", f"1{answer}", f"{final.strip()}.5"):
            assert not verify(record, f"{worked}#### {wrong}", True)


# ---- what is dropped or not read, and said

@pytest.mark.parametrize("row, want, lost", [
    ('{"prompt": "Q", "chosen": "a", "rejected": "a"}', "preference", "1 identical pair"),
    ('{"prompt": "Q", "chosen": " \\n", "rejected": "a"}', "preference", "1 empty answer"),
    ('{"prompt": "Q", "responses": ["a"]}', "preference", "1 lone answer"),
    ('{"prompt": "Q", "responses": []}', "preference", "1 lone answer"),
    (r'{"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: b"}', "preference",
     "1 contradictory pair"),
    (r'{"chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R", "rejected": "\n\nHuman: Q\n\nAssistant: b"}',
     "preference", "1 broken transcript"),
    (r'{"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b\n\nAssistant: c"}',
     "preference", "1 broken transcript"),
    ('{"prompt": "Q", "response": " "}', "messages", "1 empty answer"),
    ('{"prompt": "Q", "responses": []}', "messages", "1 empty answer"),
    (judged("a", False), "messages", "1 thumbs-down answer"),
    (judged("", True), "thumbs", "1 empty answer"), ('{"text": "\\n"}', "text", "1 empty text"),
    (turns(user("a"), untaught("b")), "messages", "1 untrained conversation"),
    (turns(user("a"), untaught("b")) | {"label": True}, "thumbs", "1 untrained answer")])
def test_drops_are_counted_aloud(tmp_path, capsys, row, want, lost):
    good, _ = KINDS[want]
    assert len(read_records(write(tmp_path, [row, good]), want)) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"rows.jsonl: 1 records; dropped {lost}") and told.count("\n") == 1
    with pytest.raises(UserError, match=rf"^rows.jsonl: 0 records; dropped {lost}[^\n]*$"):
        read_records(write(tmp_path, [row]), want)


def test_of_a_ranking_what_is_left_is_kept(tmp_path, capsys):
    path = write(tmp_path, ['{"prompt": "Q", "responses": ["a", "", "b", "a"]}'])
    assert read_records(path) == [prefer("a", "b")]
    assert "dropped 1 empty answer, 1 identical pair" in capsys.readouterr().err


def test_pairs_of_a_ranking():
    record = prefer(*"ACB", scores=[3, 2, 1], win=[1., .5, 0.], key="k")
    first, second, third = pairs(record)
    assert first["responses"] == ["A", "C"]
    assert second == prefer("A", "B", scores=[3, 1], win=[1., 0.], key="k")
    assert third["responses"] == ["C", "B"]
    assert pairs(record, "ends") == [second]
    two = prefer("a", "b", margin=3)
    assert pairs(two) == [two]


@pytest.mark.parametrize("rows, unread", [
    (['{"text": "a", "id": 1, "tools": [1], "url": null, "tags": [], "note": ""}', '{"text": "a", "id": 0}'],
     "id 2 rows, tools 1 row"),
    (['{"messages": [{"role": "user", "content": "Q", "name": "Al"}, {"role": "assistant", "content": "a"}]}'],
     "messages[].name 1 row"),
    (['{"prompt": "Q", "responses": ["a", "b"], "note": "kept", "key": "k"}'], ""),
    (['{"prompt": "Q", "responses": ["a", "b"], "source": "mine", "scores": [1]}'], "scores 1 row, source 1 row"),
    (['{"prompt": "Q", "responses": ["a", " ", "b"], "scores": [3, 2, 1]}'], "scores 1 row"),  # which are whose?
    (['{"prompt": "Q", "responses": ["a", "b", "c"], "margin": 1}'], "margin 1 row")])
def test_keys_that_are_not_read_are_named_once_with_their_counts(tmp_path, capsys, rows, unread):
    read_records(write(tmp_path, rows))
    told = capsys.readouterr().err
    _, _, named = told.partition("; not read: ")
    assert named.strip() == unread and told.count("\n") == 1


def test_hundreds_of_keys_are_not_all_named(tmp_path, capsys):
    row = {f"key{i}": 1 for i in range(500)}
    read_records(write(tmp_path, [row | {"text": "a"}]))
    assert len(capsys.readouterr().err) < 1000


# ---- rows that are refused

@pytest.mark.parametrize("row, key, word", [
    ('{"text": 1}', "text", "str"),
    ('{"messages": "a"}', "messages", "list"), ('{"messages": []}', "messages", "assistant turn"),
    ('{"messages": ["a"]}', "messages", "dict"), (turns(user("Q")), "messages", "assistant turn"),
    (turns({"content": "x"}, assistant("a")), "messages", "str"),
    (turns({"role": ["user"], "content": "x"}, assistant("a")), "messages", "str"),
    ('{"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]}', "messages", "weight"),
    ('{"messages": [{"role": "assistant", "content": "b", "weight": "0"}]}', "messages", "weight"),
    ('{"prompt": "Q", "completion": "a", "label": 1}', "label", "bool"),
    ('{"prompt": "Q", "response": null}', "response", "str"),
    ('{"prompt": 3}', "prompt", "str or list"), ('{"prompt": []}', "prompt", "empty"),
    ('{"prompt": [{"role": "assistant", "content": "a"}]}', "prompt", "assistant turn"),
    ('{"instruction": "Q", "output": "a", "input": ["I"]}', "input", "str"),
    ('{"instruction": null, "output": "a"}', "instruction", "str"),
    ('{"prompt": "Q", "chosen": "a", "rejected": 0}', "rejected", "str"),
    ('{"chosen": "a", "rejected": "b"}', "chosen", "prompt"),
    ('{"prompt": "Q", "responses": ["a", 1]}', "responses", "str"),
    ('{"prompt": "Q", "responses": ["a", "b"], "margin": "1.5"}', "margin", "float"),
    ('{"prompt": "Q", "responses": ["a", "b"], "prob": 1.5}', "prob", "between"),
    ('{"prompt": "Q", "responses": ["a", "b"], "scores": [2, true]}', "scores", "float"),
    ('{"question": "Q", "answer": 1}', "answer", "str"),
    ('{"prompt": "Q", "response": "a", "ratings": 3}', "ratings", "list"),
    ('{"prompt": "Q", "response": "a", "ratings": [1, true]}', "ratings", "float"),
    ('{"prompt": "Q", "response": "a", "ratings": []}', "ratings", "empty"),
    ('{"prompt": "Q", "steps": ["a", "b"], "labels": [1]}', "labels", "one for each"),
    ('{"prompt": "Q", "steps": ["a", "b"], "labels": [1, 2]}', "labels", "0 or 1"),
    ('{"prompt": "Q", "steps": ["a", "b"], "labels": [1, 0.5]}', "labels", "bool"),
    ('{"prompt": "Q", "steps": ["a", ""], "labels": [1, 1]}', "steps", "empty"),
    ('{"prompt": "Q", "steps": "ab", "labels": [1, 1]}', "steps", "list")])
def test_wrong_types_name_file_line_and_key(tmp_path, row, key, word):
    with pytest.raises(UserError, match=rf'^rows\.jsonl:2: [^\n]*"{key}[^\n]*{word}[^\n]*$'):
        read_records(write(tmp_path, ['{"text": "first"}', row]))


def refused_with_a_command(tmp_path, row, key):
    path = write(tmp_path, [row], "my rows.jsonl")
    with pytest.raises(UserError, match=rf"^my rows\.jsonl:1: [^\n]*{key}[^\n]*$") as error:
        read_records(path)
    assert f"python configs/formats.py '{path}'" in str(error.value)


def test_what_would_change_the_meaning_is_refused_with_the_command_that_converts_it(tmp_path):
    told = {"prompt": "Q", "response": "a"}
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    for key in data.MEANT:
        for row in (told, pair, told | {"ratings": [1]}, said("a")):
            refused_with_a_command(tmp_path, row | {key: "S"}, key)
        turn = assistant("b") | {key: "S"}
        refused_with_a_command(tmp_path, turns(user("a"), turn), key)
    for key in data.BESIDE:
        for row in (prefer("a", "b"), asked(), asked(ratings=[1], response="a")):
            refused_with_a_command(tmp_path, row | {key: "S"}, key)
    for key in data.SPOKEN:
        refused_with_a_command(tmp_path, {"text": "a", key: "S"}, key)
    for row in (told, pair, prefer("a", "b")):
        refused_with_a_command(tmp_path, row | {"prompt": "\n\nHuman: Q\n\nAssistant:"}, "prompt")
    for alien in ({"role": "tool", "content": "4"}, user([{"type": "text", "text": "a"}])):
        refused_with_a_command(tmp_path, turns(alien, assistant("b")), "messages")


# ---- bytes

A = b'{"text": "a"}'


@pytest.mark.parametrize("content, first, second", [
    (b'{"text": "a"}\n{"text": "b"}\n', ":1", ":2"), (b'{"text": "a"}\n{"text": "b"}', ":1", ":2"),
    (b' {"text": "a"}\n {"text": "b"}', ":1", ":2"),
    (b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \r\n{"text": "b"}\r\n', ":1", ":4"),
    (b'[{"text": "a"},\n{"text": "b"}]', "[0]", "[1]"),
    (b'\xef\xbb\xbf\n [\r\n{"text": "a"} , {"text": "b"}\n]\n', "[0]", "[1]")])
def test_containers(tmp_path, content, first, second):
    for name in ("x.json", "x.jsonl.gz", "x"):          # neither suffix decides
        for stored in (content, gzip.compress(content)):
            rows = dict(read_rows(write(tmp_path, stored, name)))
            assert rows == {name + first: {"text": "a"}, name + second: {"text": "b"}}


def test_51_line_separators_inside_strings_do_not_split(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode(), b'{"text": "\\ud83d\\ude00"}']
    first, second = read_records(write(tmp_path, b"\n".join(lines)))
    assert first == {"text": text} and second == {"text": "\U0001F600"}, "a whole surrogate pair is a character"


def test_text_files_are_one_document(tmp_path):
    text = "[a]\r\n\n{b}\u2028\x0b\n"
    raw = text.encode()
    for name, content in {"x.txt": raw, "x.md": b"\xef\xbb\xbf" + raw, "x.txt.gz": gzip.compress(raw)}.items():
        assert read_records(write(tmp_path, content, name)) == [{"text": text}]


def test_an_object_over_several_lines_is_one_record(tmp_path):
    """Alone, after another, behind a row of one line, indented by blanks or tabs; an array may be written so too."""
    row = said("a")
    line, blanks, tabs = json.dumps(row), json.dumps(row, indent=2), json.dumps(row, indent="\t")
    array = json.dumps([row, row], indent=4)
    windows = blanks.replace("\n", "\r\n")
    files = {blanks: 1, windows + "\n": 1, f"\n{blanks}\n{tabs}\n": 2, f"{line}\n{blanks}\n{tabs}": 3, array: 2}
    for text, n in files.items():
        assert read_records(write(tmp_path, text.encode(), "rows.json")) == [row] * n
    broken = blanks.replace('"content": "Q"', '"content": "Q",')
    with pytest.raises(UserError, match="^rows.json:[67]: "):   # the comma, or the brace behind it: Pythons differ
        read_records(write(tmp_path, [line, broken], "rows.json"))


@pytest.mark.parametrize("bad, twin, word", [   # its valid twin; a word of the message where it is ours
    (b'{"text": "a", "x": NaN}', b'{"text": "a", "x": "NaN"}', "float"),
    (b'{"text": "a", "x": [-Infinity]}', b'{"text": "a", "x": [-1]}', "float"),
    (b'{"text": "a", "x": 1e999}', b'{"text": "a", "x": 1e99}', "float"),
    (b'{"text": "a", "text": "b"}', b'{"text": "a", "test": "b"}', "same key twice"),
    (b'{"text": "a", "x": [{"y": 1, "y": 1}]}', b'{"text": "a", "x": [{"y": 1}, {"y": 1}]}', "same key twice"),
    (b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', "surrogate"),
    (b'{"text": "a", "\\udc00": 1}', b'{"text": "a", "\\u0063": 1}', "surrogate"),
    (b'{"text": "\xff"}', "{\"text\": \"\u00ff\"}".encode(), "utf-8"),
    (b'{"text": "\xed\xa0\x80"}', b'{"text": "\xed\x9f\xbf"}', "utf-8"),
    (b'{"text": "a"', b'{"text": "a"}', ""), (b"{'text': 'a'}", b'{"text": "a"}', ""),
    (b'{"text": "a",}', b'{"text": "a"}', ""), (b'{"text": "a"} {"text": "b"}', A, ""),
    (b'["text"]', b'{"text": "a"}', "object, not list"), (b'null', b'{"text": "a"}', "object, not NoneType"),
    (b'{"text": 3}', b'{"text": "3"}', "str"), (b'{"text": ' + b"[" * 9999 + b"]" * 9999 + b"}", A, "")])
def test_51_malformed_rows_name_file_and_line_and_are_left_out_when_asked(tmp_path, capsys, bad, twin, word):
    def lines(row):
        return write(tmp_path, b"\n".join([A, b"", row, A]))

    def array(row):
        return write(tmp_path, b"\n".join([b"[", A, b",", row, b",", A, b"]"]), "rows.json")
    assert len(read_records(lines(twin))) == 3 and len(read_records(array(twin))) == 3
    with pytest.raises(UserError, match=rf"^rows\.jsonl:3: [^\n]*{word}[^\n]*$"):
        read_records(lines(bad))
    with pytest.raises(UserError, match=r"^rows\.json(\[1\]|:[13456]): [^\n]*$"):
        read_records(array(bad))
    capsys.readouterr()
    assert len(read_records(lines(bad), skip_bad=True)) == 2
    assert "skipped 1 bad row, the first rows.jsonl:3: " in capsys.readouterr().err


def test_jsonl_is_read_a_line_at_a_time(tmp_path):
    rows = read_rows(write(tmp_path, A + b"\nnot json"))
    assert next(rows) == ("rows.jsonl:1", {"text": "a"})
    with pytest.raises(UserError, match="rows.jsonl:2"):
        next(rows)


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", b"", "no rows"), ("x.txt", b"", "no rows"), ("x.jsonl", b"\n \r\n", "no rows"),
    ("x.txt", b"\xef\xbb\xbf", "no rows"), ("x.jsonl", gzip.compress(b""), "no rows"), ("x.json", b"[]", "no rows"),
    ("x.txt", b"a\nb\n\xff\nc", ":3: .*utf-8"), ("x.txt", "Text.".encode("utf-16"), "UTF-8"),
    ("x.txt", "Text.".encode("utf-16-le"), "no text"), ("x.md", b"%PDF-1.4\n", "no text"),
    ("x.txt", b"version https://git-lfs.github.com/spec/v1\n", "no text"),
    ("x.jsonl", b"question,answer\na,b\n", "configs/formats.py"),
    ("x.pkl", pickle.dumps({"text": "a"}), "configs/formats.py")])
def test_empty_files_and_files_of_another_kind(tmp_path, name, content, words):
    with pytest.raises(UserError, match=rf"^{name}[^\n]*{words}[^\n]*$"):
        read_records(write(tmp_path, content, name))


def test_damaged_gzip(tmp_path):
    rows = ['{"text": "%d"}\n' % (i * 7919 ** 3) for i in range(3000)]
    whole = gzip.compress("".join(rows).encode())
    spoilt = whole[:200] + b"\xff" * 50 + whole[250:]
    no_checksum = whole[:-8] + b"\0" * 8
    for broken in (whole[:5000], spoilt, no_checksum):
        for skip_bad in (False, True):
            with pytest.raises(UserError, match=r"^x\.gz:\d+: "):
                read_records(write(tmp_path, broken, "x.gz"), skip_bad=skip_bad)
    with pytest.raises(UserError, match=r"^x\.gz:3001: "):     # only the checksum is cut: all lines were read
        read_records(write(tmp_path, whole[:-4], "x.gz"))


class Screen(io.StringIO):
    """A stderr that is a terminal."""
    def isatty(self):
        return True


LINES = (A + b"\n") * 300


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LINES), ("a.gz", gzip.compress(LINES, mtime=0)), ("a.json", b"[" + b",".join([A] * 300) + b"]")])
def test_reading_shows_how_far_it_is_where_somebody_watches(tmp_path, monkeypatch, name, content):
    path, bars, real_tqdm = write(tmp_path, content, name), [], data.tqdm

    def at_once(*args, delay, **options):
        bars.append(real_tqdm(*args, mininterval=0, miniters=1, **options))
        return bars[-1]
    monkeypatch.setattr(data, "tqdm", at_once)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    read_records(path)
    assert sys.stderr.getvalue() == f"{name}: 300 records\n"
    bars.clear()
    monkeypatch.setattr(sys, "stderr", Screen())
    read_records(path)
    shown = sys.stderr.getvalue()
    assert f"{name}:   0%" in shown and f"{name}: 100%" in shown and bars[0].n == len(content)
    assert shown.endswith(f"\r{name}: 300 records\n"), "the bar is gone"


def test_skip_bad_in_an_array_and_where_nothing_else_is_left(tmp_path, capsys):
    path = write(tmp_path, b'[{"text": "a"}, 3, {"text": 4}, {"text": "b"}]', "rows.json")
    assert len(read_records(path, skip_bad=True)) == 2
    assert "skipped 2 bad rows, the first rows.json[1]: " in capsys.readouterr().err
    read_records(write(tmp_path, A), skip_bad=True)
    assert "skipped" not in capsys.readouterr().err
    with pytest.raises(UserError, match="^rows.jsonl: 0 records; skipped 2 bad rows"):
        read_records(write(tmp_path, b"garbage\n3"), skip_bad=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_skip_bad_reaches_all_that_read_records(path):
    """Every call that opens a user's records hands the option on."""
    source = path.read_text(encoding="utf-8")
    calls = re.findall(r"(?<!def )\b(?:open_stream|read_records)\(", source)
    assert len(calls) == len(re.findall(r"skip_bad[,)]", source))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "long name", "byte 0", "none.jsonl"])
def test_what_is_no_file_is_one_line_and_no_waiting(tmp_path, monkeypatch, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "device":
        path = os.devnull
    if kind == "long name":
        path = tmp_path / ("n" * 300)
    if kind == "byte 0":
        path = tmp_path / "no\0name"
    if kind == "pipe":
        os.mkfifo(path)                                 # without a writer it would be waited for for ever
        monkeypatch.setattr(data, "open", lambda *args: pytest.fail("the pipe was opened"), raising=False)
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        read_records(path)


# ==== the tokenizer

@pytest.fixture(params=["gpt2_bpe/r50k_base.tiktoken", "gpt2_bpe"])
def GPT2(request):
    return Tokenizer.load(str(real(request.param)))


def random_texts(n):
    """Text of every kind a user may paste: all of unicode, control characters, emoji, what looks special."""
    rng = random.Random(0)
    awkward = [*SPECIALS, "<|endoftext|>", "👩‍👩‍👧‍👦", "e\u0301", "\x00\x1b[0m\r\n", " \t \u00a0\u2028", "１２ ٣", " 7 8",
               "<think>", "</", "I'll", "\ufeff", "\ufffd", "日本語 "]
    texts = list(awkward)
    for _ in range(n):
        pieces = []
        for _ in range(rng.randint(0, 40)):
            first, end = rng.choice([(0, 128), (0, 0x3000), (0xE000, 0x110000)])    # not half a surrogate pair
            anything = chr(rng.randrange(first, end))
            pieces += rng.choice([[anything], rng.choices(awkward), rng.choices("ab 1<\n")])
        texts.append("".join(pieces))
    return texts


def test_toy_bpe_merges_the_commonest_pair_and_breaks_ties_by_bytes():
    ranks = bpe_ranks("aaabdaaabac", "[a-z]+", 259)
    assert sorted(ranks, key=ranks.get)[256:] == [b"aa", b"ab", b"aaab"]
    for i in range(256):
        assert ranks[bytes([i])] == i
    assert len(bpe_ranks("ab ab", "[a-z]+", 300)) == 257, "nothing is left to merge"
    assert b"aa" in bpe_ranks("zz aa", "[a-z]+", 257), "of two as common it is that which sorts first"
    assert b"xy" in bpe_ranks("xy xy xy ca cb", "[a-z]+", 257), "words count as often as they occur"


def test_any_text_round_trips_bytewise():
    for text in random_texts(300):
        ids = TOK.encode(text)
        assert TOK.decode(ids) == text
        assert b"".join(map(TOK.enc.decode_single_token_bytes, ids)) == text.encode()


def test_gpt2s_vocabulary_gives_gpt2s_ids_and_any_text_back(GPT2):
    golden = [row for _, row in read_rows(real("gpt2_bpe/golden_ids_tiktoken.jsonl"))]
    other = [row["text"] for row in golden if row["ids"] != GPT2.encode(row["text"])]
    assert len(golden) == 20 and other == ["a<|endoftext|>b"], "which is plain text to us, there a token"
    assert GPT2.n_vocab >= 50257 + 4 and GPT2.pad != GPT2.end
    for text in random_texts(100):
        assert GPT2.decode(GPT2.encode(text)) == text


def test_48_special_token_text_stays_plain_text():
    for text in [*SPECIALS, "a<|end|>b", "<|end|><|assistant|>", "<|endoftext|>"]:
        ids = TOK.encode(text)
        assert max(ids) < TOK.base and TOK.decode(ids) == text
        ids, _ = TOK.chat([user(text), assistant(text)])
        special = [i for i in ids if i >= TOK.base]
        assert special == [TOK.role["user"], TOK.role["assistant"], TOK.end]


def test_one_vocabulary_has_one_fingerprint_whatever_its_file():
    folder = Tokenizer.load(str(real("gpt2_bpe")))
    file = Tokenizer.load(str(real("gpt2_bpe/r50k_base.tiktoken")))
    assert folder.fingerprint == file.fingerprint != TOK.fingerprint


def gpt2_files(folder, merges, **more):
    """GPT-2's two files, as Hugging Face names them, for the 256 bytes and these merges; more: other ids."""
    pieces = list(data.byte_letters().values())
    pieces += [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    ids = {piece: i for i, piece in enumerate(pieces)} | more
    write_text(folder / "vocab.json", json.dumps(ids))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    return str(folder)


def test_gpt2s_two_files_are_read_anew(tmp_path):
    """An end of text or an added token in vocab.json is none of the ranks; what tiktoken keeps is not asked."""
    first = Tokenizer.load(gpt2_files(tmp_path, ["a b", "ab c"], extra=300))
    assert first.base == first.end == 258 and first.encode("abcab") == [257, 256]
    Tokenizer.load.cache_clear()
    other = Tokenizer.load(gpt2_files(tmp_path, ["x y"]))
    assert len(other.encode("ab")) == 2 and other.encode("xy") == [256]


@pytest.mark.parametrize("merge, piece, i", [
    ("a b", "ab", 999), ("a q1", "aq1", 999), ("a b c", "abc", 999),
    ("a \u4e2d", "a\u4e2d", 256)])
def test_gpt2s_two_files_have_to_agree(tmp_path, merge, piece, i):
    folder = gpt2_files(tmp_path, [merge], **{piece: i})
    with pytest.raises(UserError, match="^--tokenizer [^\n]*cannot be read[^\n]*$"):
        Tokenizer.load(folder)


def test_a_vocabulary_file_of_ones_own_and_unreadable_ones(tmp_path):
    lines = []
    for i in range(256):
        lines.append(base64.b64encode(bytes([i])).decode() + f" {i}")
    assert Tokenizer.load(str(write(tmp_path, lines, "bytes.tiktoken"))).encode("é!") == list("é!".encode())
    for i, bad in enumerate((["hello world"], ["YQ== 1 2"], lines[1:], lines + ["YWI= 7"], lines + ["YWI= -5"])):
        path = write(tmp_path, bad, f"bad{i}.tiktoken")
        with pytest.raises(UserError, match=f"^--tokenizer {path}: [^\n]*$"):
            Tokenizer.load(str(path))


def test_tokenizers_that_are_not_there_are_one_line(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    for name, word in {str(tmp_path): "No such file", "gpt3": "cl100k_base", "o200k_base": "no route"}.items():
        with pytest.raises(UserError, match=f"^--tokenizer {name}: [^\n]*{word}[^\n]*$"):
            Tokenizer.load(name)


def test_a_long_word_gives_the_ids_that_it_always_gave(monkeypatch, GPT2):
    """Split by the same pattern where a run of letters or blanks is long: here from three on, so nearly everywhere."""
    texts = [*random_texts(100), "abcd" * 50, "a" * 900 + " 17 - 8", " " * 300 + "b", "12 keys, 9 pens", "中文" * 200]
    for tok in (TOK, GPT2):
        usual = [tok.encode(text) for text in texts]
        with monkeypatch.context() as patch:
            patch.setattr(data, "LONG", 3)
            assert [tok.encode(text) for text in texts] == usual


@pytest.mark.parametrize("letter", ["a", "é", " "])
def test_a_word_of_a_million_letters_is_encoded(letter):
    word = "x" + letter * 10 ** 6 + "."
    assert TOK.decode(TOK.encode(word)) == word


# ---- the chat template

THREE_TURNS = [
    system("Be brief."), user("Hi"), assistant("Hello."), user("2 + 3?"),
    assistant("5 "), user("Bye"), assistant(" Bye.")]


def slow_chat(messages, prompt_weight=0):
    """(ids, target), a token at a time, as the docstring of Tokenizer describes the template."""
    rows = []       # (token, its target)
    for turn in messages:
        ours = turn["role"] == "assistant"
        silent = ours and not turn["content"].strip()
        left_out = silent or turn.get("weight") == 0
        outside = 0 if left_out else prompt_weight              # of the token that says who speaks
        inside = 1 if ours and not left_out else outside
        rows.append((TOK.role[turn["role"]], outside))
        for token in TOK.encode(turn["content"]):
            rows.append((token, inside))
        if ours:
            rows.append((TOK.end, inside))
    return [token for token, _ in rows], [target for _, target in rows]


def chats():
    """Conversations, some with a turn that is not trained on, or that says nothing."""
    yield THREE_TURNS
    for place in range(len(THREE_TURNS)):
        for change in ({"weight": 0}, {"weight": 1}, {"content": ""}, {"content": " \n"}):
            messages = list(THREE_TURNS)
            messages[place] = THREE_TURNS[place] | change
            yield messages


@pytest.mark.parametrize("prompt_weight", [0, .25])
def test_50_the_mask_covers_every_taught_turn_of_the_assistant_with_its_end_and_nothing_else(prompt_weight):
    for messages in chats():
        ids, target = slow_chat(messages, prompt_weight)
        assert TOK.chat(messages, prompt_weight) == (ids, target)
        (row, weights), = encode({"messages": messages}, TOK, 256, prompt_weight=prompt_weight)
        assert (row, weights) == (ids, [0] + target[1:])
    assert TOK.decode(TOK.chat(THREE_TURNS)[0]) == "Be brief.HiHello.2 + 3?5 Bye Bye."


# ==== records to rows

def digits(n): return "1234567890123456789012345"[:n]               # n tokens


def test_documents_are_cut_into_windows_and_nothing_is_lost():
    for n, block in itertools.product(range(1, 20), (2, 5, 16)):
        rows = encode({"text": digits(n)}, TOK, block, "all")
        whole = TOK.encode(digits(n)) + [TOK.end]
        if len(whole) % block == 1:
            whole.pop()                                             # a lone last token has nothing before it
        assert data.flat(ids for ids, _ in rows) == whole
        for ids, target in rows:
            assert len(ids) <= block
            assert target == [0] + [1] * (len(ids) - 1)


def test_conversations_keep_their_beginning():
    ids, target = TOK.chat(THREE_TURNS)
    record = {"messages": THREE_TURNS}
    for block in range(2, len(ids) + 2):
        cut = ids[:block]
        learns = any(target[:block])
        assert encode(record, TOK, block) == ([(cut, target[:block])] if learns else [])
        assert encode(record, TOK, block, "all") == [(cut, [0] + [1] * (len(cut) - 1))]


@pytest.mark.parametrize("prompt_weight", [0, .1, 1.])
def test_25_rows_with_nothing_to_learn_are_dropped(prompt_weight):
    long_ago = turns(user(digits(20)), assistant("Yes."))
    assert encode(long_ago, TOK, 16, prompt_weight=prompt_weight) == []
    assert encode(long_ago, TOK, 32, prompt_weight=prompt_weight) != []
    assert encode(turns(user("Hi")), TOK, 16, prompt_weight=prompt_weight) == []
    assert encode({"text": ""}, TOK, 16, "all") == []


def spell(n, word): return f"{word} " * n


def dialogue(rng):
    """A prompt of one to five turns of many lengths, with a system message half of the time."""
    speakers = [user, assistant] * rng.randint(0, 2) + [user]
    if rng.random() < .5:
        speakers.insert(0, system)
    return [say(spell(rng.randint(0, 12), letter)) for say, letter in zip(speakers, "abcdef")]


def whole_chats(messages):
    """All that may be left of a prompt: some last turns, the first of them not the assistant's, whose beginning may be
    gone; perhaps with the whole system message before."""
    parts = [TOK.chat([turn])[0] for turn in messages]
    for start, part in enumerate(parts):
        rest = data.flat(parts[start + 1:]) + [TOK.role["assistant"]]
        if messages[start]["role"] == "assistant":
            continue
        for gone in range(1, len(part) + 1):
            ids = part[:1] + part[gone:] + rest
            yield ids
            if start and messages[0]["role"] == "system":
                yield parts[0] + ids


def test_8_17_and_26_all_answers_have_the_very_same_prompt_a_whole_chat_and_none_is_cut_to_nothing():
    rng, cut = random.Random(17), 0
    for _ in range(600):
        block, messages = rng.randint(6, 60), dialogue(rng)
        answers = [spell(rng.randint(0, 25), letter) for letter in "pqr"]
        rows = encode({"prompt": messages, "responses": answers}, TOK, block)
        start = rows[0][1].index(1)
        prompt = rows[0][0][:start]
        assert prompt in whole_chats(messages)
        for (ids, target), text in zip(rows, answers, strict=True):
            response, n = TOK.response(text), len(ids) - start
            assert ids == prompt + response[:n] and len(ids) <= block
            assert target == [0] * start + [1] * n
            assert n >= min(len(response), block // 2), "an answer may always have half of the context"
        whole = TOK.prompt(messages)
        used = max(len(ids) for ids, _ in rows)
        needed = len(whole) + max(len(TOK.response(text)) for text in answers)
        too_long = data.too_long({"prompt": messages, "responses": answers}, TOK, block)
        assert too_long == (needed > block)
        if not too_long:
            assert prompt == whole and used == needed, "nothing is cut without need"
        elif len(messages) == 1:
            assert used == block, "no more is cut than has to be"
        cut += too_long
    assert 200 < cut < 590


@pytest.mark.parametrize("says, room, kept", [  # kept: of each turn the last tokens, or the whole of it
    ("1234", 15, [4, 8]), (digits(20), 15, [None, 13]), (digits(20), 30, [7, 20]), (digits(20), 43, [20, 20])])
def test_17_a_system_message_stays_unless_it_takes_more_than_half(says, room, kept):
    messages = [system(says), user(digits(20))]
    want = []
    for turn, n in zip(messages, kept):
        if n is not None:
            want += [TOK.role[turn["role"]], *TOK.encode(turn["content"])[-n:]]
    assert data.cut_prompt(TOK.prompt(messages), TOK, room) == want + [TOK.role["assistant"]]


def test_17_an_answer_leaves_with_its_question():
    says = [user("12345"), assistant("12"), user("12345"), assistant("12"), user("12")]
    whole, last_two = TOK.prompt(says), TOK.prompt(says[2:])
    assert data.cut_prompt(whole, TOK, 22) == whole[:1] + whole[3:], "the question loses its beginning"
    assert data.cut_prompt(whole, TOK, 18) == last_two


# ---- late rows

def anything(rng):
    """A text of up to 12 letters, some of which are two bytes or three."""
    return "".join(rng.choices("aé€ ", k=rng.randint(0, 12)))


def a_record(kind, rng):
    """A record of a kind as a file may give it, whose texts are of many lengths."""
    if kind == "text":
        return {"text": "a" + anything(rng) * rng.randint(0, 5)}
    speakers = [system] * rng.randint(0, 1) + [user, assistant] * rng.randint(0, 2) + [user]
    talk = [say(anything(rng)) for say in speakers]
    if kind == "preference":
        return {"prompt": talk, "responses": [anything(rng) for _ in range(3)]}
    if kind == "thumbs":
        return {"prompt": talk, "response": anything(rng), "label": True}
    return turns(*talk, assistant("a" + anything(rng)))


@pytest.mark.parametrize("kind", ["text", "preference", "thumbs", "messages"])
def test_late_rows_are_those_of_encode_and_what_is_too_long_is_known(kind):
    """Also after they have been forgotten, and where a text has as many tokens as bytes."""
    rng = random.Random(kind)
    for _ in range(800):
        record, weight = a_record(kind, rng), rng.choice([0, .1])
        whole = [len(ids) for ids, _ in encode(record, TOK, 10 ** 6)]
        block = max(4, max(whole) + rng.randint(-9, 3))
        late = data.late_rows(record, TOK, block, prompt_weight=weight)
        for _ in range(2):
            assert [tuple(row) for row in late] == encode(record, TOK, block, prompt_weight=weight)
            assert [len(row[0]) for row in late] == [len(ids) for ids, _ in late]
            data.made.cache_clear()
        assert data.too_long(record, TOK, block) == (kind != "text" and max(whole) > block)
        if "prompt" in record:
            size = len(TOK.prompt(record["prompt"]))
            assert [data.has_room(record["prompt"], TOK, size + room) for room in (-1, 0)] == [False, True]


def short_and_long(make):
    """200 records, of which every tenth is so long that it may not fit a context of 64 tokens."""
    return [make(f"{i}" + " long" * (15 if i % 10 == 0 else 0)) for i in range(200)]


@pytest.mark.parametrize("make", [
    lambda text: prefer(f"yes {text}", "no", prompt=[user("What?"), assistant("Is it?"), user(text)]),
    lambda text: turns(user("What?"), assistant("Is it?"), user(text), assistant("Yes."))])
def test_opening_a_file_tokenises_nothing_but_what_may_be_too_long(tmp_path, monkeypatch, make):
    seen, real_encode = [], Tokenizer.encode

    def watched(self, text):
        seen.append(text)
        return real_encode(self, text)
    monkeypatch.setattr(Tokenizer, "encode", watched)
    cfg = Pairs(data=str(write(tmp_path, short_and_long(make))))
    if "responses" in make(""):
        stream, held, _ = data.open_preferences(cfg, TOK, 64)
    else:
        stream, held = open_stream(cfg.data, "messages", 0, context=(TOK, 64),
                                   prepare=lambda record: data.late_rows(record, TOK, 64))
    assert len(stream.items) + len(held) == 200
    assert any("long" in text for text in seen)
    assert {text.count("long") for text in seen if re.search("[0-9]", text)} == {15}
    seen.clear()
    items = stream.batch(0, 8)
    for _ in range(5):
        list(data.item_batches(items, 64) if "responses" in make("") else map(tuple, items))
    assert 0 < len(seen) <= 8 * 6, "a record is tokenised once, however often its batch is read"


def test_a_document_is_tokenised_once_and_its_rows_are_kept(tmp_path, monkeypatch):
    path, n = write(tmp_path, [{"text": digits(50)}] * 40), len(TOK.encode(digits(50))) + 1
    train, held = opened(path, prepare=lambda record: data.late_rows(record, TOK, 16))
    monkeypatch.setattr(Tokenizer, "encode", lambda *args: pytest.fail("a document was tokenised again"))
    data.made.cache_clear()
    assert sum(len(ids) for ids, _ in train + held) == 40 * n > len(train)


@dataclass
class Pairs(data.Options):
    """What open_preferences asks for."""
    data: str = ""
    seed: int = 0
    pairs: str = "all"
    max_new: int = 8
    skip_bad: bool = False


def test_the_pairs_of_a_file_take_little_more_memory_than_their_text(tmp_path):
    """Tokenised they took twelve times as much: 160,000 pairs, 200 MB, were 3 GB."""
    rows = [prefer(f"{i} yes" + " yes" * 99, f"{i} no" + " no" * 99, prompt=[user(f"{i}" + " what" * 99)])
            for i in range(1000)]
    path = write(tmp_path, rows)
    tracemalloc.start()
    try:
        opened_now = data.open_preferences(Pairs(data=str(path)), TOK, 4096)
        held_now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert opened_now and peak < 4 * path.stat().st_size


def test_pythons_search_for_cycles_goes_on_afterwards(tmp_path):
    path = write(tmp_path, [said("A")])
    read_records(path)
    assert gc.isenabled()
    with pytest.raises(UserError):
        opened(path, "preference")
    assert gc.isenabled()


# ---- items of preferences

def learned(item):
    """What the rows of an item learn, as text, one word a row."""
    words = []
    for ids, target in item["rows"]:
        words.append(TOK.decode(ids[target.index(1):]))
    return " ".join(words)


@pytest.mark.parametrize("how, items", [    # what they learn, which are good, their scores
    (("pair", "all"), [("a b", [1, 0], [3, 1]), ("a c", [1, 0], [3, -1]), ("b c", [1, 0], [1, -1])]),
    (("pair", "ends"), [("a c", [1, 0], [3, -1])]),
    (("pair", "all", True), [("a b c", [1, 1, 0], [3, 1, -1])]),
    (("single", "all"), [("a", [1], [3]), ("c", [0], [-1])])])      # the middle would be up and down
def test_items_of_a_ranking_by_unit(how, items):
    record = prefer("a", "b", "c", scores=[3, 1, -1], win=[.9, .5, .1])
    got = data.preference_items(record, TOK, 64, *how)
    assert [(learned(item), item["up"], item["r"]) for item in got] == items
    assert got[-1]["p_l"] == .1


def test_17_all_items_of_a_ranking_have_one_prompt():
    record = prefer(spell(2, "yes"), spell(30, "yes"), spell(9, "yes"), prompt=[user(spell(30, "word"))])
    for unit in ("pair", "single"):
        prompts = set()
        for ids, target in data.column(data.preference_items(record, TOK, 48, unit), "rows"):
            prompts.add(tuple(ids[:target.index(1)]))
        assert len(prompts) == 1


@pytest.mark.parametrize("record, p", [
    ({"prob": 0, "margin": 1}, 0), ({"margin": -10 ** 6}, 0), ({"margin": 10 ** 6}, 1)])
def test_items_say_how_good_they_are_at_the_extremes(record, p):
    item = data.make_item(record, [1, 2], [True, False])
    assert item["p"] == pytest.approx(p) and item["p_l"] == pytest.approx(1 - p)
    item = data.make_item(record | {"margin": 9, "scores": [3, 1]}, [1, 2], [True, False])
    assert item["gap"] == 2, "scores tell more than a margin"


# ---- batches

def ragged(n, top, seed=0):
    """Rows of random lengths, each recognisable by its tokens, with random weights; the first of a row is 0."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        size = rng.randint(1, top)
        ids = rng.choices(range(TOK.base), k=size)
        target = rng.choices([0, .5, 1], k=size)
        rows.append((ids, [0] + target[1:]))
    return rows


@pytest.mark.parametrize("budget", [1, 64, 200, 1000, 10 ** 6])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_micro_batches_hold_every_row_once_within_the_budget(n, budget):
    lengths = [len(ids) for ids, _ in ragged(n, 60)]
    parts = micro_batches(lengths, budget)
    assert sorted(data.flat(parts)) == list(range(n))
    in_order = [lengths[i] for i in data.flat(parts)]
    assert in_order == sorted(in_order), "rows of like length are together"
    for part in parts:
        longest = max(lengths[i] for i in part)
        assert len(part) == 1 or len(part) * round_up(longest) <= budget
    eights = min(8, max(1, budget // 64))
    assert len(parts) <= n / eights + 1, "as many rows together as the budget allows"
    assert len(parts) == 1 or budget < 10 ** 6


@pytest.mark.parametrize("budget, most", [(1, 50), (64, 50), (300, 35), (10 ** 6, 1)])
def test_item_batches_keep_items_whole_and_within_the_budget(budget, most):
    items = [dict(number=i, rows=ragged(1 + i % 3, 40, i)) for i in range(50)]
    parts = list(data.item_batches(items, budget))
    numbers = [item["number"] for item in data.flat(parts)]
    assert sorted(numbers) == list(range(50)) and len(parts) <= most
    for part in parts:
        lengths = [len(ids) for ids, _ in data.column(part, "rows")]
        assert len(part) == 1 or len(lengths) * round_up(max(lengths)) <= budget


def test_pad_and_collate():
    tokens, mask = collate([([5, 6, 7], [0, .5, 1]), ([8], [0])], TOK)
    assert tokens.tolist() == [[5, 6, 7] + [TOK.pad] * 13, [8] + [TOK.pad] * 15]
    assert mask.tolist() == [[.5, 1] + [0] * 13, [0] * 15]
    assert pad([[1] * 17], 0).shape == (1, 32), "in steps of 16"
    assert pad([[1]], 0, width=33).shape == (1, 48)


@pytest.mark.parametrize("width", [40, 41, 128])
def test_52_packing_keeps_every_row_once_and_apart(width):
    rows = ragged(30, 40)
    tokens, mask, pos, see = sft.pack(rows, TOK, width)
    B, T = tokens.shape
    assert T == round_up(width) and mask.shape == (B, T - 1) and see.shape == (B, 1, T, T)
    total = sum(len(ids) for ids, _ in rows)
    assert B % 4 == 0 and B <= 2 * total / width + 4, "first fit leaves one line less than half full"
    found = []
    for line, weights, places, sees in zip(tokens.tolist(), mask.tolist(), pos.tolist(), see[:, 0]):
        real_end = T - line.count(TOK.pad)
        starts = [t for t in range(real_end) if places[t] == 0]
        weights = [0.] + weights
        assert not any(weights[real_end:]), "padding is not trained on"
        for start, end in itertools.pairwise([*starts, real_end]):
            assert places[start:end] == list(range(end - start))
            assert weights[start] == 0, "nothing is predicted across a boundary"
            found.append((line[start:end], weights[start:end]))
            for t in range(start, end):
                seen = sees[t].nonzero().flatten().tolist()
                assert seen == list(range(start, t + 1)), "a token sees its own sequence up to itself"
    assert see.any(-1).all(), "a query that sees nothing would be NaN"
    assert sorted(found) == sorted(rows)


# ==== streams

@pytest.mark.parametrize("size, n", [(10, 4), (7, 7), (5, 8), (1, 3), (12, 5)])
def test_44_every_item_comes_once_an_epoch_the_last_partial_batch_included(size, n):
    items = list(range(size))
    stream = Stream(items=items, seed=3)
    seen = data.flat(stream.batch(step, n) for step in range(size))     # n epochs
    epochs = [seen[start:start + size] for start in range(0, len(seen), size)]
    for epoch in epochs:
        assert sorted(epoch) == items
    assert size < 5 or epochs[0] != epochs[1], "another order every epoch"


@pytest.mark.parametrize("source", [{"items": "abcdefghijklmnopqrstuvw"}, {"make": lambda rng: rng.random()}])
def test_a_batch_depends_on_seed_and_step_alone(source):
    forward, backward = Stream(**source, seed=1), Stream(**source, seed=1)
    batches = [forward.batch(step, 5) for step in range(12)]
    random.seed(9)
    for step in reversed(range(12)):
        assert backward.batch(step, 5) == batches[step]
    other = Stream(**source, seed=2)
    assert other.batch(7, 5) != batches[7]


def opened(path, kind="text", **options):
    """(training items, held-out items) of a file."""
    stream, held = open_stream(str(path), kind, 0, **options)
    return stream.items, held


@pytest.mark.parametrize("size, n_held, held", [
    (45, 256, [19, 39]), (20, 256, [19]), (2, 256, [1]), (20, 0, []), (400, 5, [79, 159, 239, 319, 399])])
def test_about_one_record_in_20_is_held_out_and_not_trained_on(tmp_path, size, n_held, held):
    path = write(tmp_path, [{"text": f"{i}"} for i in range(size)])
    train, kept = ([int(record["text"]) for record in side] for side in opened(path, n_held=n_held))
    assert kept == held and sorted(train + held) == list(range(size))


SAME = {    # what makes the n-th record one of subject i
    "a prompt": lambda i, n: {"prompt": f"Say {i}!"},
    "case and spacing": lambda i, n: {"prompt": f"{'SAY ' if n % 2 else ' say'} {i}! "},
    "a key": lambda i, n: {"prompt": f"{n}", "key": f"key {i}"},
    "a number as key": lambda i, n: {"prompt": f"{n}", "key": i if n % 2 else f"{i}"},
    "a prompt or a key": lambda i, n: {"prompt": f"Say {i}!", "key": f"{i}" if n % 3 else ""}}
SIZES = random.Random(16)
MANY = [    # how many records each subject has, n_held, the least and the most records to hold out
    ([4] * 100, 256, 16, 20), ([2] * 15, 256, 2, 2), ([4] * 100, 8, 8, 8), ([990, 10], 256, 10, 10),
    ([10, 990], 256, 10, 10), ([30, 30], 256, 30, 30), ([30, 30], 12, 12, 12),
    (SIZES.choices(range(1, 31), k=60), 256, 30, 60)]


@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("sizes, n_held, least, most", MANY, ids=range(len(MANY)))
def test_16_held_out_by_subject_never_by_record(tmp_path, sizes, n_held, least, most, same):
    order = [i for i, size in enumerate(sizes) for _ in range(size)]
    random.Random(3).shuffle(order)
    rows = [SAME[same](i, n) | {"subject": i, "place": n} for n, i in enumerate(order)]
    sides = opened(write(tmp_path, rows), "prompt", n_held=n_held)
    train, held = ({record["subject"] for record in side} for side in sides)
    assert train and held and not train & held, "a subject is on both sides"
    assert least <= len(sides[1]) <= most
    assert len(sides[1]) == n_held or len(sides[0]) + len(sides[1]) == len(rows), "no record is lost"
    for side in sides:
        places = [record["place"] for record in side]
        assert places == sorted(places), "the order is that of the file"


def test_16_all_pairs_of_a_ranking_are_on_one_side(tmp_path):
    path = write(tmp_path, [prefer(*"abcd", key=i, prompt=[user(f"{i}")]) for i in range(40)])
    train, held = opened(path, "preference", prepare=pairs)
    assert len(train) == 38 * 6
    assert [pair["key"] for pair in held] == [19] * 6 + [39] * 6


@pytest.mark.parametrize("row, aloud", [
    (lambda i: {"prompt": "Say it", "response": f"{i}"}, True),
    (lambda i: {"prompt": f"{i}", "response": "a", "key": "one"}, True),
    (lambda i: turns(system("Tell."), assistant(f"{i}")), False)])     # nobody asks: every answer is a subject
def test_16_a_single_subject_is_said_aloud(tmp_path, capsys, row, aloud):
    train, held = opened(write(tmp_path, [row(i) for i in range(40)]), "messages")
    assert len(train) == 38 and len(held) == 2
    assert ("one subject" in capsys.readouterr().err) == aloud
    train, held = opened(write(tmp_path, [row(0)]), "messages")
    assert train == held and "one subject" in capsys.readouterr().err, "one record alone is its own judge"


def test_16_of_one_long_document_every_20th_piece_is_held_out(tmp_path, capsys):
    train, held = opened(write(tmp_path, ['{"text": "' + "a" * 40 + '"}']), prepare=lambda record: list(range(40)))
    assert held == [19, 39] and len(train) == 38
    assert "subject" not in capsys.readouterr().err


def test_16_a_long_chain_of_keys_and_prompts_is_one_subject():
    records = [asked(str((i + 1) // 2), key=str(i // 2)) for i in range(20_000)]
    assert len(set(data.subjects(records))) == 1
    del records[50:100]
    assert len(set(data.subjects(records))) == 2


def test_held_out_toy_records_are_of_the_val_split_and_the_same_for_every_seed():
    stream, held = open_stream("toy", "prompt", 0, "arith", n_held=50)
    _, other = open_stream("toy", "prompt", 1, "arith", n_held=50)
    assert held == other
    for split, records in {"train": stream.batch(0, 50), "val": held}.items():
        assert {split_of(record["key"]) for record in records} == {split}


def test_several_files_are_one_in_their_order(tmp_path, monkeypatch):
    """Each of its own shape; their names may be too long together for a file's; every 20th of all is held out."""
    monkeypatch.chdir(tmp_path)
    one, two = f"one{'n' * 150}.jsonl", f"two{'n' * 150}.jsonl"
    write(tmp_path, [turns(user(f"{i}"), assistant("A")) for i in range(30)], one)
    write(tmp_path, [{"prompt": f"{i}", "chosen": "A", "rejected": "B"} for i in range(30, 50)], two)
    train, held = opened(f"{one},{two}", "messages")
    assert held == [turns(user("19"), assistant("A")), turns(user("39"), assistant("A"))]
    asks = [int(data.asks(record)) for record in train]
    assert len(asks) == 48 and asks == sorted(asks)


@pytest.mark.parametrize("paths, message", [
    ("good.jsonl,none.jsonl", "none.jsonl: no such file"), ("toy,good.jsonl", "toy: no such file"),
    ("good.jsonl,bad.jsonl", "bad.jsonl:1: [^\n]*")])
def test_of_several_files_the_missing_or_broken_one_is_named(tmp_path, monkeypatch, paths, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ['{"text": "a"}'], "good.jsonl")
    write(tmp_path, ['{"text": 3}'], "bad.jsonl")
    with pytest.raises(UserError, match=f"^{message}$"):
        opened(paths)


@pytest.mark.parametrize("answer, kind", [({"response": "7"}, "messages"), ({"responses": ["7", "8"]}, "preference")])
def test_26_records_that_are_cut_to_the_context_are_counted_aloud(tmp_path, capsys, answer, kind):
    """A question of up to 24 tokens, who asks and who answers, a token, the end: 8 of 25 records have more than 20."""
    path = write(tmp_path, [{"prompt": digits(i)} | answer for i in range(25)])
    opened(path, kind, context=(TOK, 20))
    assert "8 of 25 records are longer than the context of 20" in capsys.readouterr().err
    opened(path, kind, context=(TOK, 30))
    assert "longer" not in capsys.readouterr().err
    assert not data.too_long(dict(text="long " * 100), TOK, 48), "of a document nothing is lost"


def test_18_rows_without_a_word_of_the_assistant_are_left_out_and_counted(tmp_path, capsys):
    def prepare(record):
        return encode(record, TOK, 16, prompt_weight=.1)
    rows = [turns(user(digits(i)), assistant("a")) for i in range(25)]
    train, held = opened(write(tmp_path, rows), "messages", prepare=prepare)
    assert len(train) + len(held) == 14 and "11 of 25 records" in capsys.readouterr().err
    with pytest.raises(UserError, match="no usable record"):
        opened(write(tmp_path, rows[20:]), "messages", prepare=prepare)


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
    given: str = ""             # a file, maybe


def read(*argv):
    return parse(Options, argv=list(argv), name="ours")


def told(capsys, main):
    """Exit code, stdout and stderr of a main function under guard."""
    capsys.readouterr()
    code = 0
    try:
        guard(main)
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def script(monkeypatch, name, *argv):
    """python name *argv, without starting a process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    if name == "data.py":
        return data.main
    return lambda: runpy.run_path(str(ROOT / name), run_name="__main__")


def test_flag_over_toml_over_default(tmp_path):
    shared = "lr = 1\nsteps = 7\nthreads = 2\nmicro_tokens = 3\nlora_r = 4\n"     # which other scripts have
    toml = write(tmp_path, f'{shared}[ours]\nsteps = 8\nkind = "two"\n[theirs]\nx = 1\n'.encode(), "a.toml")
    assert read() == Options()
    cfg = read("--config", str(toml), "--threads", "4")
    assert cfg == Options(lr=1.0, steps=8, threads=4, micro_tokens=3, kind="two") and type(cfg.lr) is float
    assert read("--steps=9", f"--config={toml}").steps == 9
    assert read("--steps", "3", "--steps", "9").steps == 9
    for argv in ("--loud", "--loud --steps 1", "--loud true", "--loud 1"):
        assert read(*argv.split()).loud
    for argv in ("--loud false", "--loud=false", "--loud 0", "--loud=0"):
        assert not read(*argv.split()).loud


def test_positionals():
    cfg, words = parse(Options, ["a", "b..."], ["x", "--steps", "2", "y", "z"], "ours")
    assert cfg == Options(steps=2) and words == ["x", "y", "z"]
    for argv in ([], ["x", "y"]):
        with pytest.raises(OptionError, match="got .*expected <a>"):
            parse(Options, ["a"], argv, "ours")


def refused(capsys, argv, words):
    """Refused with exit code 2 and one line that has these words."""
    code, out, err = told(capsys, lambda: read(*argv))
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 400
    for word in words.split():
        assert word in err


@pytest.mark.parametrize("argv, words", [
    ("--stepz 3", "--stepz --steps"), ("--zzz", "--zzz --help"), ("--steps", "--steps missing"), ("stray", "stray"),
    ("--steps --loud", "--steps missing"), ("--steps=", "--steps whole"), ("--lr fast", "--lr fast number"),
    ("--lr 1e999", "--lr finite"), ("--kind three", "--kind one two"), ("--loud=maybe", "--loud true"),
    ("--loud yes", "yes"), ("-steps 3", "-steps"), ("-- 3", "--"), ("--config", "--config missing"),
    ("--config no/such.toml", "--config no/such.toml"), ("--config=", "--config"), ("--config /", "--config"),
    ("--config " + "x" * 300, "--config"), ("--seed " + "9" * 6000, "--seed"), ("--out a\0b", "--out")])
def test_bad_flags_exit_2_with_one_line(capsys, argv, words):
    refused(capsys, argv.split(" "), words)


@pytest.mark.parametrize("text, words", [
    (b"stepz = 3", "stepz"), (b"[ours]\nstepz = 3", "stepz"), (b"steps = true", "--steps whole"),
    (b"lr = nan", "--lr finite"), (b"loud = 1", "--loud true"), (b"kind = 3", "--kind one"), (b"out = 3", "--out text"),
    (b"steps = [1]", "--steps"), (b"steps 3", "line 1"), (b"steps = 1\nsteps = 2", "overwrite"),
    (b"lr = \xff", "utf-8"), (b"[ours]\nlora_r = 1", "lora_r"),
    (b"ours = 5", "ours table"), (b"[[ours]]\nlr = 1", "ours table"), (b"steps = " + b"[" * 9000, "a.toml"),
    (b"steps = " + b"9" * 6000, "a.toml"), (b"[ours.lr]\nx = 1", "--lr number")])
def test_bad_toml_exits_2_with_one_line_naming_file_and_key(tmp_path, capsys, text, words):
    path = write(tmp_path, text, "a.toml")
    refused(capsys, ["--config", str(path)], f"{words} {path}")


NOT = {"lr": [0., -1., "fast", None, True, 10 ** 400, float("nan")], "steps": [-1, 1.5, "2", True], "save_every": [0],
       "seed": [-1, 10 ** 30], "share": [1.5, -.1], "threads": [10 ** 6], "kind": ["three", 3, ["one"]],
       "micro_tokens": [-1], "loud": [1, "true"], "out": [3, "a\0b", "a\udc80"]}


@pytest.mark.parametrize("name", NOT)
def test_options_are_checked_when_they_are_made_from_python_too(name):
    for value in NOT[name]:
        with pytest.raises(OptionError, match=rf"^--{name} [^\n]{{1,200}}$"):
            Options(**{name: value})
    cfg = Options(lr=1, steps=0, micro_tokens=1, share=1., signed=-3.)
    assert type(cfg.lr) is float and Options(share=0., lr=1e-9)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_option_has_a_comment_which_is_its_help(path):
    module = importlib.import_module(path.stem)
    configs = [Config for Config, *_ in getattr(module, "COMMANDS", {}).values()]
    for Config in configs + [getattr(module, "Config", RunConfig)]:
        comments = data.describe(Config)
        for field in dataclasses.fields(Config):
            assert comments[field.name][0], f"--{field.name} has no comment on its own line"


def test_help_groups_the_options_and_says_what_they_take(capsys):
    code, out, _ = told(capsys, lambda: read("--help"))
    assert code == 0 and "What this does." in out and "\nrun:\n  --out " in out
    assert re.search(r"\na group:\n  --kind +which \[one\].* one, two.\n  --loud ", out)


@pytest.mark.parametrize("argv, folders", [
    ("data.py", ""), ("sft.py", ""), ("ppo.py", "--out run"), ("model.py", "out/x"), ("reward.py label", ""),
    ("reward.py compare", "out/x out/y"), ("configs/kimi_k15.py", "")])
def test_scripts_refuse_unknown_options_and_missing_checkpoints(monkeypatch, capsys, tmp_path, argv, folders):
    monkeypatch.chdir(tmp_path)
    code, out, err = told(capsys, script(monkeypatch, *argv.split(), "--sede", "3"))
    assert code == 2 and err.count("\n") == 1 and "--seed" in err
    if argv != "data.py":
        code, out, err = told(capsys, script(monkeypatch, *argv.split(), *folders.split()))
        assert code == 1 and err.count("\n") == 1 and re.search("out/\\w+.*no checkpoint", err)


def test_reward_without_a_command_says_what_there_is(monkeypatch, capsys):
    for argv in ([], ["learn"], ["--help"]):
        code, out, err = told(capsys, script(monkeypatch, "reward.py", *argv))
        assert code in (0, 2) and "python reward.py train" in out and err.count("\n") <= 1


def fail(error):
    raise error


@pytest.mark.parametrize("error, code, line", [
    (UserError("it broke"), 1, "error: it broke\n"), (OptionError("--x"), 2, "error: --x\n"),
    (OSError(28, "No space left", "a file"), 1, "error: a file: No space left\n")])
def test_guard_tells_a_mistake_in_one_line(capsys, error, code, line):
    assert told(capsys, lambda: fail(error)) == (code, "", line)


def test_guard_lets_bugs_be_seen_and_pipes_end(capsys, monkeypatch):
    for bug in (ZeroDivisionError(), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        with pytest.raises(type(bug)):
            guard(lambda: fail(bug))
    code, _, _ = told(capsys, lambda: fail(KeyboardInterrupt()))
    assert code == 130
    monkeypatch.setattr(os, "_exit", lambda code: fail(EOFError(code)))
    with pytest.raises(EOFError):                                   # `| head`: no more output, no traceback
        guard(lambda: fail(BrokenPipeError()))


@pytest.mark.parametrize("run", [
    lambda: torch.empty(10 ** 15), lambda: torch.empty(2 ** 40, 2 ** 40), lambda: fail(MemoryError()),
    lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has ..."))])
def test_out_of_memory_is_one_line_that_says_what_needs_less(capsys, run):
    code, _, err = told(capsys, run)
    assert code == 1 and err.count("\n") == 1 and "--micro_tokens" in err


# ==== the run log

@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Options of a run in the folder "run" of a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return Options(out="run")


def go(cfg, start=0, total=5, loss=None):
    """A run whose metric is its step; returns it, unfinished."""
    run = Run(cfg)
    for step in run.progress(start, total):
        run.log(step, ("loss",), loss=torch.tensor(step + .5 if loss is None else loss), val=None)
    return run


def logged(cfg):
    return [json.loads(line) for line in Path(cfg.out, "metrics.jsonl").read_text().splitlines()]


def steps_of(cfg):
    return [row["step"] for row in logged(cfg)]


def everything(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_takes_no_run_with_other_options(cfg, finished):
    run = go(cfg)
    if finished:
        run.finish(("loss",))
    before = everything("run")
    for name, value in dict(lr=.25, kind="two", loud=True, seed=1, steps=6, tokenizer="other").items():
        with pytest.raises(UserError, match=rf"^[^\n]*--{name} [^\n]*{value}[^\n]*--out[^\n]*$"):
            Run(dataclasses.replace(cfg, **{name: value}))
    for same in (dict(save_every=2), dict(threads=3), dict(device="cpu"), dict(micro_tokens=9)):
        assert Run(dataclasses.replace(cfg, **same)).finished == finished
    assert everything("run") == before
    with pytest.raises(OptionError, match="--out"):
        Run(Options())


def test_a_finished_run_says_so_and_gives_its_rows_again(cfg, capsys):
    run = go(cfg)
    assert [(row["step"], row["loss"], row["val"]) for row in logged(cfg)] == [(i, i + .5, None) for i in range(5)]
    assert not Run(cfg).finished
    capsys.readouterr()
    assert run.finish(("loss", "val", "nothing"), then=["next.py", "a b"]) == logged(cfg)
    out = capsys.readouterr().out
    assert "5 steps" in out and "val" not in out and re.search("loss +▁▃▅▇█ +0.500 → 4.500", out)
    assert re.search(r"next: python \S*next.py 'a b'\n", out)
    assert json.loads(Path("run/summary.json").read_text()) == logged(cfg)[-1]
    write_text("run/checkpoint.safetensors", "left where `finish` was killed")
    again = Run(cfg)
    assert again.finished and again.rows == logged(cfg) and "nothing to do" in capsys.readouterr().out
    assert not Path("run/checkpoint.safetensors").exists()


@pytest.mark.parametrize("torn", ["", "\n", '{"step": 5, "lo', '{"step": 5, "loss": 1.5'])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_41_the_log_is_cut_to_the_checkpoint(cfg, start, torn):
    go(cfg)
    path, before = Path("run/metrics.jsonl"), logged(cfg)
    path.write_text(path.read_text() + torn)
    run = go(cfg, start, 8)
    assert steps_of(cfg) == list(range(8)) and logged(cfg)[:start] == before[:start] and run.rows == logged(cfg)


def test_41_the_seconds_of_a_resumed_run_add_up(cfg):
    go(cfg)
    lines = [json.dumps(row | {"seconds": 100 + row["step"]}) + "\n" for row in logged(cfg)]
    Path("run/metrics.jsonl").write_text("".join(lines))
    go(cfg, 3, 8)
    assert [row["seconds"] for row in logged(cfg)] == pytest.approx([100, 101, 102, 102, 102, 102, 102, 102], abs=.9)


@pytest.mark.parametrize("spoilt, rest", [      # "0\n1\n2" stands for the rows of steps 0, 1 and 2
    ("0\n1", [0, 1]), ("0\n{torn\n2", [0, 2]), ("", []), ("0\n1\n1\n2", [0, 1, 2]), ("0\n1\n" + '{"step": 2}', [0, 1]),
    ("1\n0\n2", [0, 1, 2]), ("\udc80[[1]]\n7\n0\n1\n2", [0, 1, 2]), ('{"step": [0]}\n1\n2', [1, 2]),
    ("[" * 9000 + "\n1\n2", [1, 2])])
def test_a_damaged_log_loses_no_row_in_silence_and_doubles_none(cfg, capsys, spoilt, rest):
    go(cfg)
    rows = Path("run/metrics.jsonl").read_text().splitlines()
    lines = [rows[int(line)] if line in ("0", "1", "2") else line for line in spoilt.split("\n")]
    Path("run/metrics.jsonl").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    capsys.readouterr()
    run = go(cfg, 3, 5)
    assert steps_of(cfg) == [*rest, 3, 4] and run.rows == logged(cfg)
    lost = 3 - len(rest)
    assert (f" {lost} are missing or damaged" in capsys.readouterr().err) == (lost > 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(cfg, bad):
    with pytest.raises(UserError, match=f"^step 0: loss is {bad}; [^\n]*$"):
        go(cfg, loss=bad)
    assert logged(cfg) == []


@pytest.mark.parametrize("path, given", [
    *itertools.product(["input"], ["input", "toy,input", "0.5*input[write]+exact", "input|b@answer"]),
    *itertools.product(["in.put/checkpoint.safetensors"], ["in.put", "toy,in.put", "0.5*in.put[write]+exact"]),
    ("rule.py", "rule:brief"), ("my/rule.py", "exact + 0.5*my.rule:brief[write]")])
def test_a_run_knows_its_inputs_by_their_content(cfg, capsys, path, given):
    """A changed file, checkpoint or rule ends an interrupted run in one line; a finished one only says so."""
    write_text(path, "one")
    cfg = dataclasses.replace(cfg, given=given)
    run = go(cfg)
    write_text(path, "one")                                     # written again, the same
    Run(cfg)
    write_text(path, "two")
    with pytest.raises(UserError, match=rf"^{path} has changed since [^\n]*--overwrite$"):
        Run(cfg)
    assert not Run(dataclasses.replace(cfg, overwrite=True)).finished
    run.finish(())
    capsys.readouterr()
    assert Run(cfg).finished and f"{path} changed" in capsys.readouterr().out
    Path(path).unlink()                                         # what is gone cannot be compared
    assert Run(cfg).finished and "changed" not in capsys.readouterr().out


def test_a_model_that_was_unfinished_when_a_run_began_has_changed_once_it_is_finished(cfg):
    """Its checkpoint is gone then, and its weights are in a file that was not there."""
    cfg = dataclasses.replace(cfg, given="base")
    write_text("base/checkpoint.safetensors", "half way")
    go(cfg)
    Path("base/checkpoint.safetensors").rename("base/model.safetensors")
    with pytest.raises(UserError, match="^base/model.safetensors has changed since run began"):
        Run(cfg)


def test_a_run_says_when_the_code_has_changed(cfg, capsys, monkeypatch):
    run = go(cfg)
    monkeypatch.setattr(data, "code_of", lambda cfg: "other")
    capsys.readouterr()
    assert not Run(cfg).finished and "the code changed" in capsys.readouterr().err
    run.finish(())
    assert Run(cfg).finished and re.search("nothing to do.*the code.*--overwrite", capsys.readouterr().out)


def test_overwrite_begins_anew_and_deletes_nothing_before_the_first_step(cfg):
    go(cfg).finish(())
    for name in ("checkpoint.safetensors", "model.safetensors", "config.json", "mine.txt"):
        Path("run", name).write_text("weights, or a user's own")
    before = everything("run")
    again = dataclasses.replace(cfg, overwrite=True, lr=.25)
    run = Run(again)
    assert not run.finished and run.left("checkpoint.safetensors") is None and everything("run") == before
    go(again, total=2)
    assert steps_of(cfg) == [0, 1] and everything("run").keys() == {"run.json", "metrics.jsonl", "lock", "mine.txt"}
    with pytest.raises(UserError, match="--lr"):
        Run(cfg)


def test_a_folder_is_written_by_one_process_at_a_time(cfg):
    """Two processes on one --out: the second ends in one line, and the first does not notice."""
    other = "import fcntl; f = open('run/lock', 'r+'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print(); input()"
    command = [sys.executable, "-u", "-c", other]
    run = Run(cfg)
    for step in run.progress(0, 3):
        run.log(step, loss=1.0)
        done = subprocess.run(command, capture_output=True, input=b"\n")
        assert done.returncode and b"BlockingIOError" in done.stderr, "somebody else got our lock"
    run.finish(())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()                               # now it has the lock
        with pytest.raises(UserError, match=r"^run: another process [^\n]*--out$"):
            go(dataclasses.replace(cfg, overwrite=True))
        process.communicate(b"\n")
    assert steps_of(cfg) == [0, 1, 2]


class Killed(BaseException):
    """What SIGKILL is to a process."""


@pytest.mark.parametrize("error, expected", [(Killed(), Killed), (OSError(28, "No space left on device"), UserError)])
@pytest.mark.parametrize("moment", ["os.replace", "os.fsync"])
def test_42_a_text_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, moment, error, expected):
    path = tmp_path / "a" / "x.json"
    write_text(path, "old")
    with monkeypatch.context() as patch, pytest.raises(expected):
        patch.setattr(moment, lambda *_, **__: fail(error))
        write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "né\u2028w")
    assert everything(path.parent) == {"x.json": "né\u2028w".encode()}
    with pytest.raises(UserError, match="not written, [^\n]*$"):
        write_text(path / "y.json", "in a file")


# ==== python data.py

def test_it_shows_the_families_that_are_asked_for_with_their_gold(monkeypatch, capsys):
    code, out, err = told(capsys, script(monkeypatch, "data.py", "--n", "2"))
    assert code == 0 and not err and len(re.findall(r"gold -?\d+\.\d\d\n", out)) == 2 * 4
    code, out, _ = told(capsys, script(monkeypatch, "data.py", "--families", "safe,arith2"))
    assert code == 0 and re.findall("── (.*) ──", out)[:2] == ["safe", "arith2"]


def test_it_shows_a_file_as_the_trainers_read_it(monkeypatch, capsys, tmp_path):
    unweighted = turns(user("R"), untaught("S"), user("T"), assistant("U"))
    path = write(tmp_path, ['{"prompt": "Q", "chosen": "good", "rejected": "bad"}', unweighted, '{"src": 1}'])
    code, out, err = told(capsys, script(monkeypatch, "data.py", path, "--skip_bad"))
    assert code == 0 and "2 records" in err and "skipped 1 bad row" in err
    for words in ("user +Q\n", "good.*bad", "user +R\n", "assistant +S +.not trained on.\n", "assistant +U\n"):
        assert re.search(words, out), words


def test_c30_planted_duplicates_and_test_prompts_in_the_training_set_are_counted(monkeypatch, capsys, tmp_path):
    """Nine training records, one of them twice; of four test prompts two are in training, in other case and spacing."""
    train = [{"prompt": f"Question {i}?", "response": f"{i}"} for i in range(9)]
    questions = ["question  3?", "Question 30?", "Question 7?", "Question 3 ?"]
    one = write(tmp_path, train + train[4:5], "train.jsonl")
    two = write(tmp_path, [prefer("a", "b", prompt=[user(text)]) for text in questions], "test.jsonl")
    code, _, err = told(capsys, script(monkeypatch, "data.py", one, two))
    assert code == 0 and f"{one}: 1 of 10 records are there already" in err
    assert f"{two}: 2 of 4 records ask what is asked in {one}" in err
    code, _, err = told(capsys, script(monkeypatch, "data.py", two))
    assert code == 0 and "there already" not in err and "asked in" not in err
