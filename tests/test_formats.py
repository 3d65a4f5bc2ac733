"""configs/formats.py: what the trainers do not read becomes plain rows, and those give the records that are written
here by hand; what cannot be converted is called what it is."""
import bz2
import gzip
import io
import itertools
import json
import lzma
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import formats
from data import UserError, read_records
from test_data import ROOT, asked, assistant, prefer, real, said, system, turns, untaught, user, write

FAULTS = Path(ROOT.parent / "shared" / "faults")
RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@pytest.fixture
def convert(monkeypatch):
    """Run the script on a file; returns the path of the plain rows."""
    def run(path, *argv):
        out = Path(f"{path}.out")
        monkeypatch.setattr(sys, "argv", ["configs/formats.py", str(path), "--out", str(out), *argv])
        formats.main()
        return out
    return run


def rated(prompt, response, *scores):
    """A row of HelpSteer2: a score for each attribute."""
    return {"prompt": prompt, "response": response, **dict(zip(RATINGS, scores))}


CASES = {   # rows that the trainers refuse, and the records that they give once they are converted
    "dolly": ([
        '{"instruction": "Q", "context": "C", "response": "a", "category": "qa"}',
        '{"instruction": "Q", "context": "", "response": "a", "category": "qa"}'
    ], [
        turns(user("C\n\nQ"), assistant("a")),
        said("a")
    ]),
    "orca": ([
        '{"id": "1", "system_prompt": "S", "question": "Q", "response": "a"}'
    ], [turns(system("S"), user("Q"), assistant("a"))]),
    "a mixed file": ([
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]}',
        '{"instruction": "Q", "output": "b", "system": "S"}',
        '{"text": "t"}'
    ], [
        said("a"),
        turns(system("S"), user("Q"), assistant("b")),
        {"text": "t"}
    ]),
    "system": ([
        '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "c"}], "system": "T"}',
        '{"messages": [{"role": "system", "content": "T"}, {"role": "user", "content": "Q"}, {"role": "assistant", '
        '"content": "c"}], "system": "T"}',
        '{"prompt": "Q", "answer": 7, "system": "S"}',
        '{"prompt": "Q", "chosen": "a", "rejected": "b", "system": "S"}',
        '{"prompt": "Q", "responses": ["a", "b"], "system": "S", "note": 1}'
    ], [
        turns(system("T"), user("Q"), assistant("c")),
        turns(system("T"), user("Q"), assistant("c")),
        {"prompt": [system("S"), user("Q")], "answer": 7},
        {"prompt": [system("S"), user("Q")], "responses": ["a", "b"]},
        {"prompt": [system("S"), user("Q")], "responses": ["a", "b"], "note": 1}
    ]),
    "history": ([
        '{"instruction": "And now?", "output": "Nine.", "history": [["How many?", "Eight."], ["So?", ""]]}',
        '{"prompt": "And now?", "response": "Nine.", "history": [{"role": "user", "content": "How many?"}, {"role": '
        '"assistant", "content": "Eight."}], "system": "S"}',
        '{"prompt": "And now?", "history": [["How many?", "Eight."]], "answer": 9}'
    ], [
        turns(user("How many?"), assistant("Eight."), user("So?"), assistant(""), user("And now?"), assistant("Nine.")),
        turns(system("S"), user("How many?"), assistant("Eight."), user("And now?"), assistant("Nine.")),
        {"prompt": [user("How many?"), assistant("Eight."), user("And now?")], "answer": 9}
    ]),
    "options": ([
        '{"question": "Which?", "options": {"A": "apple", "B": "car"}, "answer": "A"}',
        '{"question": "Which?", "choices": ["apple", "car"], "answer": "B", "context": "Read this."}',
        '{"question": "Which?", "options": ["A) apple", "(B) car"], "answer": "B"}',
        '{"instruction": "Which?", "input": "Look.", "options": ["a", "b"], "output": "A"}'
    ], [
        turns(user("Which?\n\nA. apple\nB. car"), assistant("A")),
        turns(user("Read this.\n\nWhich?\n\nA. apple\nB. car"), assistant("B")),
        turns(user("Which?\n\nA) apple\n(B) car"), assistant("B")),
        turns(user("Which?\n\nLook.\n\nA. a\nB. b"), assistant("A"))
    ]),
    "thinking": ([
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": '
        '"because"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b", '
        '"reasoning": "x"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "thinking": "x"}, '
        '{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}',
        '{"prompt": "a", "response": "b", "reasoning": "since"}'
    ], [
        turns(user("a"), assistant("<think>because</think>b")),
        turns(user("a"), assistant("<think>x</think>b")),
        turns(user("a"), assistant(""), user("c"), assistant("d")),
        turns(user("a"), assistant("<think>since</think>b"))
    ]),
    "parts": ([
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}, {"role": '
        '"assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "c"}]}]}'
    ], [turns(user("ab"), assistant("<think>hm</think>c"))]),
    "roles": ([
        '{"conversations": [{"from": "developer", "value": "S"}, {"from": "prompter", "value": "a"}, {"from": "bot", '
        '"value": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b", "weight": 0}, {"role": '
        '"user", "content": "c"}, {"role": "assistant", "content": "d"}], "label": true}'
    ], [
        turns(system("S"), user("a"), assistant("b")),
        {"prompt": [user("a"), untaught("b"), user("c")], "response": "d", "label": True}
    ]),
    "nectar": ([
        '{"prompt": "Q", "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}, {"answer": "c", '
        '"rank": 3.0}]}',
        '{"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}'
    ], [
        prefer(*"abc"),
        prefer("a", "b", margin=1)
    ]),
    "ultrafeedback": ([
        '{"instruction": "Q", "completions": [{"response": "b", "overall_score": 5}, {"response": "a", '
        '"overall_score": 7.5}, {"response": "c", "overall_score": 1}], "source": "sharegpt", "key": 3}',
        '{"instruction": "Q", "completions": [{"response": "b", "overall_score": 5}, {"response": "a", '
        '"overall_score": 9}, {"response": "c", "overall_score": 5}], "margin": 9}'
    ], [
        prefer(*"abc", key=3),
        prefer("a", "b", margin=4)
    ]),
    "binarized": ([
        '{"prompt": "Q", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}], '
        '"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}], '
        '"rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}], '
        '"score_chosen": 8.5, "score_rejected": 5.0}'
    ], [prefer("a", "b", margin=3.5)]),
    "tldr": (['{"info": {"post": "P"}, "summaries": [{"text": "b"}, {"text": "a"}], "choice": 1}'],
             [prefer("a", "b", prompt=[user("P\n\nTL;DR:")])]),
    "helpsteer2": ([
        rated("Q", "b", 2, 2, 2, 2, 2),
        rated("Q", "a", 4, 0, 0, 0, 0),
        rated("Q", "c", 1, 4, 4, 4, 4),
        rated("R", "b", 3, 1, 1, 1, 1),
        rated("R", "a", 3, 1, 1, 1, 2),     # a tie that the sum breaks
        rated("Q", "d", 1, 0, 0, 0, 0),     # only neighbours meet
        rated("Q", "e", 2, 0, 0, 0, 0)
    ], [
        prefer(*"abc"),
        {"prompt": [user("R")], "responses": ["a", "b"], "margin": 0},
        prefer("e", "d", margin=1)
    ]),
    "transcripts": ([
        r'{"prompt": "\n\nHuman: Q\n\nAssistant: ", "response": "a"}',
        r'{"prompt": "\n\nHuman: Q", "responses": ["a", "\n\nAssistant: b"]}',
        r'{"prompt": "\n\nHuman: Q\n\nAssistant: x\n\nHuman: R\n\nAssistant:", "chosen": " a", "rejected": "b", '
        '"prob": 0.5}',
        r'{"prompt": "\n\nHuman: Q\n\nAssistant: "}'
    ], [
        said("a"),
        prefer("a", "b"),
        {"prompt": [user("Q"), assistant("x"), user("R")], "responses": ["a", "b"], "prob": 0.5},
        asked()
    ]),
    "ratings, steps": ([
        '{"prompt": "Q", "response": "a", "ratings": [1, 2], "system": "S"}',
        '{"prompt": "Q", "steps": ["a", "b"], "labels": [1, 0], "system": "S"}'
    ], [
        {"prompt": [system("S"), user("Q")], "response": "a", "ratings": [1.0, 2.0]},
        {"prompt": [system("S"), user("Q")], "response": "ab", "steps": ["a", "b"], "labels": [1, 0]}
    ]),
    "trees": ([
        '{"text": "What?", "role": "prompter", "rank": null, "replies": [{"text": "b", "role": "assistant", "rank": '
        '1, "replies": [{"text": "And?", "role": "prompter", "rank": null, "replies": [{"text": "x", "role": '
        '"assistant", "rank": 0, "replies": []}, {"text": "y", "role": "assistant", "rank": 1, "replies": []}]}]}, '
        '{"text": "a", "role": "assistant", "rank": 0, "replies": []}]}',
        '{"message_tree_id": "1", "prompt": {"text": "Q", "role": "prompter", "rank": null, "replies": [{"text": '
        '"b", "role": "assistant", "rank": 1, "replies": []}, {"text": "a", "role": "assistant", "rank": 0, '
        '"replies": []}]}}'
    ], [
        prefer("a", "b", prompt=[user("What?")]),
        {"prompt": [user("What?"), assistant("b"), user("And?")], "responses": ["x", "y"]},
        prefer("a", "b")
    ]),
    "wrapped": ([
        '{"data": [{"prompt": "Q", "response": "a"}, {"prompt": "Q", "response": "b", "system": "S"}]}'
    ], [
        said("a"),
        turns(system("S"), user("Q"), assistant("b"))
    ]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_trainers_refuse_becomes_what_they_read(tmp_path, convert, name):
    rows, records = CASES[name]
    path = write(tmp_path, rows)
    with pytest.raises(UserError, match="^rows.jsonl:[12]: [^\n]*python configs/formats.py [^\n]*rows.jsonl"):
        read_records(path)
    assert read_records(convert(path)) == records


def test_every_shape_has_a_case():
    as_ever = {"conversations", "prompt completion", "chosen rejected", "chosen rejected instruction"}
    every = []
    for rows, _ in CASES.values():
        every += [set(json.loads(row)) if isinstance(row, str) else set(row) for row in rows]
    for shape in formats.SHAPES.keys() - as_ever:
        assert any(keys >= set(shape.split()) for keys in every), f"no case has {shape}"


@pytest.mark.parametrize("rows, want, record", [
    ([rated("Q", "b", 2, 2, 2, 2, 2), rated("Q", "a", 4, 0, 1, 2, 3)], "messages", said("a")),
    ([rated("Q", "b", 2, 2, 2, 2, 2), rated("Q", "a", 2, 2, 2, 2, 2)], "messages", said("b")),     # a tie
    ([rated("Q", "", 4, 2, 2, 2, 2), rated("Q", "a", 3, 2, 2, 2, 2), rated("Q", "b", 1, 2, 2, 2, 2)], None,
     prefer("a", "b", margin=2)),
    (['{"instruction": "Q", "completions": [{"response": "a", "overall_score": 1}]}'], "prompt", asked()),
    ([r'{"question": "Q", "answer": "2*3=<<2*3=6>>6\n#### 6", "options": ["6", "7"], "reasoning": "#### 5"}'], "prompt",
     asked("Q\n\nA. 6\nB. 7", answer=6)),
    (['{"question": "Q", "answer": "x", "reasoning": "so"}'], "prompt", asked(answer="x")),
    (['{"question": "Q", "answer": "x", "reasoning": "so", "label": true}'], "thumbs",
     asked(response="<think>so</think>x", label=True))])
def test_converted_rows_can_be_read_as_whatever_their_meaning_allows(tmp_path, convert, rows, want, record):
    assert read_records(convert(write(tmp_path, rows)), want) == [record]


def test_ratings_are_kept_where_asked_for(tmp_path, convert):
    """By name and not by place, one row for each answer; the trainer that wants them names the option."""
    row = rated("Q", "a", 4, 0, 1, 2, 3)
    path = write(tmp_path, [row, dict(reversed(row.items()))])
    with pytest.raises(UserError, match="python configs/formats.py .* --ratings"):
        read_records(path, "ratings")
    record = asked(response="a", ratings=[4, 0, 1, 2, 3])
    assert read_records(convert(path, "--ratings"), "ratings") == [record, record]


def test_real_helpsteer2(convert, tmp_path):
    path = write(tmp_path, real("helpsteer2/helpsteer2_validation_first8.jsonl").read_bytes())
    margins = [record["margin"] for record in read_records(convert(path))]
    assert margins == [2, 3, 2]
    records = read_records(convert(path, "--ratings"), "ratings")
    for line, record in zip(path.read_bytes().splitlines(), records, strict=True):
        row = json.loads(line)
        assert record["response"] == row["response"]
        assert record["ratings"] == [row[name] for name in RATINGS]


def test_the_two_forms_of_hh_give_the_same_text(tmp_path, convert):
    """A dialogue cut before, in, or behind the "Assistant:" that begins its answer, or not at all."""
    ask, cue, good = "\n\nHuman: a\n\nAssistant: x\n\nHuman: b", "\n\nAssistant:", '{"text": "first"}'
    for yes, no in itertools.permutations(("c", " d", "e\n", "Human: f"), 2):
        whole = {"chosen": f"{ask}{cue} {yes}", "rejected": f"{ask}{cue} {no}"}
        _, expected = read_records(write(tmp_path, [good, whole]))
        for prompt, before in ((ask, f"{cue} "), (f"{ask}{cue}", " "), (f"{ask}{cue} ", "")):
            answers = [before + yes, before + no]
            rows = [good, {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
                    {"prompt": prompt, "responses": answers}]
            assert read_records(convert(write(tmp_path, rows)))[1:] == [expected, expected]


@pytest.mark.parametrize("texts, scores, ranked", [
    ("ba", [2, 5], {"responses": ["a", "b"], "margin": 3}),                 # C21: ratings 5 and 2 are a margin of 3
    ("abc", [5, 5, 2], {"responses": ["a", "c"], "margin": 3}),             # of a tie only the first is kept
    ("ab", [(3, 1), (3, 2)], {"responses": ["b", "a"], "margin": 0}),
    ("ab", [1, 1], {"responses": ["a"]}), ("", [], {"responses": []}),
    ("aab", [1, 2, 3], {"responses": ["b", "a"], "margin": 1})])
def test_rank(texts, scores, ranked):
    assert formats.rank(list(texts), scores) == ranked


# ---- what is dropped, not read, or refused

@pytest.mark.parametrize("row, words", [
    ('{"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}', "dropped 1 tied rating"),
    (rated("Q", "a", 1, 1, 1, 1, 1), "2 records"),
    ('{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5}', "1 tied rating"),
    ('{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 5}',
     "1 records; dropped 1 contradictory"),
    (r'{"prompt": "\n\nHuman: Q\n\nAssistant: ", "chosen": " c\n\nHuman: d", "rejected": " e"}',
     "1 records; dropped 1 broken transcript"),
    (r'{"prompt": "\n\nHuman: Q\n\nAssistant: ", "response": " c\n\nHuman: d\n\nAssistant: e"}',
     "1 records; dropped 1 broken transcript"),
    ('{"text": "Q", "role": "user", "replies": [{"text": "a", "role": "assistant", "rank": null}]}',
     "1 records; dropped 1 tree without a ranking"),
    ('{"instruction": "Q", "completions": [{"response": "a", "overall_score": 1, "model": "m"}], "id": 1}',
     "not read: completions[].model 1 row, id 1 row"),
    ('{"question": "Q", "answer": "a", "options": "A or B", "history": "none"}',
     "not read: history 1 row, options 1 row")])
def test_what_is_left_out_is_said(tmp_path, capsys, convert, row, words):
    convert(write(tmp_path, ['{"text": "a", "id": 3}', row]))
    assert words in capsys.readouterr().err.splitlines()[0]


def zipped(name, content=b"{}"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


CHAT = json.dumps(said("a")).encode()
ROWS = [     # a row, and a word of why it is refused
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "4"}, {"role": "assistant", '
     '"content": "b"}]}', "tool"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": '
     '"1"}]}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}', "tool_calls"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "function_call": '
     '{"name": "f"}}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}', "function_call"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, {"role": '
     '"assistant", "content": "b"}]}', "image_url"),
    ('{"messages": [{"role": "bot", "content": "b", "weight": 0.5}]}', "weight"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "model"}]}', "content"),
    ('{"instruction": "a", "output": "b", "history": [["a"]]}', "history"),
    ('{"instruction": "a", "output": "b", "history": [["a", null]]}', "history"),
    ('{"message_id": "2", "parent_id": "1", "text": "What?", "lang": "en"}', "parent_id"),
    ('{"text": "A passage.", "question": "Which?"}', "question"),
    ('{"src": "a", "tgt": "b"}', "known: messages"),
    ('{"version": 1, "data": [{"prompt": "Q"}]}', "data"),
    ('{"data": [3]}', "data"),
    ('{"prompt": "Q", "response": "a", "system": 3}', "system"),
    ('{"prompt": "Q", "response": "a", "label": "good", "system": "S"}', "label"),
    ('{"prompt": "Q", "answers": ["a"]}', "answers"),
    ('{"prompt": "Q", "answers": [{"answer": "a", "rank": true}]}', "rank"),
    ('{"instruction": "Q", "completions": [{"response": "a", "overall_score": "5"}]}', "overall_score"),
    ('{"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}', "choice"),
    ('{"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": true}', "choice"),
    ('{"info": {"post": null}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}', "post"),
    ('{"info": {"post": "P"}, "summaries": [{"text": "a"}], "choice": 1}', "summaries"),
    ('{"prompt": "Q", "response": "a", "helpfulness": 1, "correctness": 1, "coherence": 1, "complexity": 1, '
     '"verbosity": null}', "verbosity"),
    ('{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": "1"}', "score_rejected"),
    ('{"chosen": [], "rejected": [{"role": "user", "content": "Q"}], "system": "S"}', "chosen"),
    ('{"prompt": [{"role": "assistant", "content": "a"}], "system": "S"}', "prompt"),
    ('{"prompt": "Q", "response": 3}', "response"),
]


@pytest.mark.parametrize("row, word", ROWS, ids=range(len(ROWS)))
def test_a_row_that_has_no_plain_form_is_refused_and_no_file_is_written(tmp_path, convert, row, word):
    path = write(tmp_path, ['{"text": "a"}', row, row])
    with pytest.raises(UserError, match=rf'^rows.jsonl:2[^\n]* [^\n]*{word}[^\n]*$'):
        convert(path)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert read_records(convert(path, "--skip_bad")) == [{"text": "a"}]


NOT_JSON = [     # a file, and a word of what it is called
    ("a.jsonl", b"- question: a\n  answer: b\n", "YAML"), ("a.jsonl", b"---\nquestion: a\n", "YAML"),
    ("a.json", b"\n<!DOCTYPE html>\n<html><body>Not Found</body></html>\n", "HTML"),
    ("a.json", b"<?xml version='1.0'?><a/>", "XML"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ("a.jsonl", b"PAR1\x15\x04" + bytes(40), "parquet"), ("a.json", b"ARROW1\0\0", "Arrow"),
    ("a.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "Arrow"), ("a.jsonl", zipped("a.jsonl"), "zip"),
    ("a.xlsx", zipped("[Content_Types].xml"), "Excel"), ("a.pkl", pickle.dumps({"text": "a"}), "pickle"),
    ("a.jsonl", bz2.compress(CHAT), "bzip2"), ("a.jsonl", lzma.compress(CHAT), "xz"),
    ("a.tar", bytes(257) + b"ustar\0", "tar"),
    ("a.jsonl", b"\x28\xb5\x2f\xfd\0\0", "zstd"), ("a.jsonl", gzip.compress(gzip.compress(CHAT)), "twice"),
    ("a.jsonl", CHAT.decode().encode("utf-16"), "UTF-16"), ("a.csv", CHAT.decode().encode("utf-16-be"), "UTF-16"),
    ("a.txt", "Text.".encode("utf-16"), "UTF-16"), ("a.txt", "Text.".encode("utf-32"), "UTF-32"),
    ("a.pdf", b"%PDF-1.4\n", "PDF"),
    ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "UTF-8"), ("a.jsonl", b"Once upon a time there was\n", ".txt"),
    ("a.jsonl", b"{'text': 'a'}\n", ":1: "), ("a.bin", b"\x89PNG\r\n\x1a\n\0\0", "neither"),
    ("a.jsonl", b"", "no rows"),
    ("a.csv", b"question,answer\na,b\nc\n", ":3: not 2 cells"), ("a.csv", b"question,answer\na,b,c\n", "not 2 cells"),
    ("a.csv", b"question,question\na,b\n", "one name"), ("a.csv", b'question,answer\na,"b\n', ":2: "),
    ("a.csv", b"question,answer\na,\xff\n", "utf-8"), ("a.csv", b"question,answer\n", "0 records"),
    ("a.jsonl", b"Once, there was\na, b\n", "no shape"), ("a.csv", b"src,tgt\na,b\n", "no shape"),
]


@pytest.mark.parametrize("name, content, word", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_cannot_be_converted_is_called_what_it_is(tmp_path, convert, name, content, word):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=rf"^{name}[^\n]*{re.escape(word)}[^\n]*$"):
        convert(path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


# ---- tables, files, options

@pytest.mark.parametrize("name, content, records", [
    ("a.csv", b"question,answer\na,b\n", turns(user("a"), assistant("b"))),
    ("a.csv", b"text\nHello there\n", {"text": "Hello there"}),
    ("a b.tsv", b"question\tanswer\na\tb\n", turns(user("a"), assistant("b"))),
    ("a.jsonl", b'\xef\xbb\xbf"question";"answer"\r\n"a;\r\nb";"c ""d"""\r\n', turns(user("a;\r\nb"),
                                                                                     assistant('c "d"'))),
    ("a.csv.gz", gzip.compress(b'"question","answer"\n"a","b"\n'), turns(user("a"), assistant("b"))),
    ("a.csv", b"prompt,system,response,label\nQ,S,a,True\n",
     {"prompt": [system("S"), user("Q")], "response": "a", "label": True}),
    ("a.csv", b"instruction,output\nQ," + b"a" * 200_000, said("a" * 200_000)),
])
def test_tables_become_rows(tmp_path, convert, name, content, records):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match="python configs/formats.py"):
        read_records(path)
    assert read_records(convert(path)) == [records]


def test_plain_rows_and_documents_stay_as_they_are(tmp_path, convert):
    rows = [said("a") | {"id": 1}, {"prompt": "Q", "responses": ["a", ""], "note": [1]},
            {"prompt": "Q", "response": "", "tools": []}]
    for container in (write(tmp_path, rows), write(tmp_path, json.dumps(rows, indent=2).encode(), "a.json")):
        assert [json.loads(line) for line in convert(container).read_text().splitlines()] == rows
    assert json.loads(convert(write(tmp_path, b"a\nb\n", "a.txt")).read_text()) == {"text": "a\nb\n"}


def test_the_command_that_a_trainer_prints_makes_the_file_beside(tmp_path):
    path = write(tmp_path, CASES["history"][0], "my rows.jsonl")
    with pytest.raises(UserError) as error:
        read_records(path)
    words = shlex.split(re.search(r"python (configs/formats.py .*)", str(error.value))[1])
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert read_records(tmp_path / "my rows.plain.jsonl") == CASES["history"][1]
    assert done.stderr.startswith("my rows.jsonl: 3 records") and not done.stdout


def test_the_file_to_be_read_is_never_overwritten_and_an_older_one_only_by_a_whole_one(tmp_path, monkeypatch, convert):
    path = write(tmp_path, CASES["nectar"][0])
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["formats.py", str(path), "--out", str(path)])
    with pytest.raises(UserError, match="to be read"):
        formats.main()
    assert path.read_bytes() == before
    out = convert(path)
    older = out.read_bytes()
    with pytest.raises(UserError):
        convert(write(tmp_path, CASES["tldr"][0] + [{"src": 1}]))
    assert out.read_bytes() == older and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name, n", {
    "csv.csv": 1, "history.jsonl": 1, "leading_space.jsonl": 1, "question_options.jsonl": 1,
    "reasoning_content.jsonl": 1, "message_tree.jsonl": 1, "lfs_pointer.jsonl": "git lfs pull",
    "tool_calls_empty_turn.jsonl": "tool_calls"}.items())
def test_known_faults(tmp_path, convert, name, n):
    """Files that other people's programs stumbled over: refused with the command, and then converted or explained."""
    if not (FAULTS / name).exists():
        pytest.skip(f"{FAULTS / name} is not here")
    path = write(tmp_path, (FAULTS / name).read_bytes(), name)
    with pytest.raises(UserError, match="python configs/formats.py"):
        read_records(path)
    if n == 1:
        assert len(read_records(convert(path))) == 1
    else:
        with pytest.raises(UserError, match=n):
            convert(path)
