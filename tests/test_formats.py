"""configs/formats.py: what the trainers do not read becomes plain rows, and those give the records that are written here
by hand; what cannot be converted is called what it is."""
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
from test_data import ROOT, assistant, hh, prefer, real, said, system, turns, user, write

FAULTS = Path(ROOT.parent / "shared" / "faults")
RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@pytest.fixture
def convert(monkeypatch):
    """Run the script on a file; returns the path of the plain rows."""
    def run(path, *argv):
        monkeypatch.setattr(sys, "argv", ["configs/formats.py", str(path), "--out", str(path) + ".out", *argv])
        formats.main()
        return Path(str(path) + ".out")
    return run


def rated(prompt, response, *scores, **more): return {"prompt": prompt, "response": response, **dict(zip(RATINGS,
                                                                                                         scores)), **more}
def scored(**scores): return {"instruction": "Q", "completions": [dict(response=t, overall_score=s) for t,
                                                                  s in scores.items()]}
def ranks(**ranks): return {"prompt": "Q", "answers": [dict(answer=t, rank=r) for t, r in ranks.items()]}
def tldr(a, b, choice): return {"info": {"post": "P"}, "summaries": [{"text": a}, {"text": b}], "choice": choice}
def reply(text, rank, *replies, role="assistant"): return dict(text=text, role=role, rank=rank, replies=list(replies))


CASES = {   # rows that the trainers refuse, and the records that they give once they are converted
    "dolly": ([{"instruction": "Q", "context": c, "response": "a", "category": "qa"} for c in ("C", "")],
              [turns(user("C\n\nQ"), assistant("a")), said("a")]),
    "orca": ([{"id": "1", "system_prompt": s, "question": "Q", "response": "a"} for s in ("S", "")],
             [turns(system("S"), user("Q"), assistant("a")), said("a")]),
    "a mixed file": ([said("a"), {"instruction": "Q", "output": "b", "system": "S"}, {"text": "t"}],
                     [said("a"), turns(system("S"), user("Q"), assistant("b")), {"text": "t"}]),
    "system": ([turns(user("Q"), assistant("c")) | {"system": "T"}, turns(system("T"), user("Q"),
                                                                          assistant("c")) | {"system": "T"},
                {"prompt": "Q", "answer": 7, "system": "S"},
                {"prompt": "Q", "chosen": "a", "rejected": "b", "system": "S"},
                {"prompt": "Q", "responses": ["a", "b"], "system": "S", "note": 1}],
               [turns(system("T"), user("Q"), assistant("c"))] * 2
               + [{"prompt": [system("S"), user("Q")], "answer": 7}, {"prompt": [system("S"), user("Q")],
                                                                      "responses": ["a", "b"]},
                  {"prompt": [system("S"), user("Q")], "responses": ["a", "b"], "note": 1}]),
    "history": ([{"instruction": "And now?", "output": "Nine.", "history": [["How many?", "Eight."], ["So?", ""]]},
                 {"prompt": "And now?", "response": "Nine.", "history": [user("How many?"), assistant("Eight.")],
                  "system": "S"},
                 {"prompt": "And now?", "history": [["How many?", "Eight."]], "answer": 9}],
                [turns(user("How many?"), assistant("Eight."), user("So?"), assistant(""), user("And now?"),
                       assistant("Nine.")),
                 turns(system("S"), user("How many?"), assistant("Eight."), user("And now?"), assistant("Nine.")),
                 {"prompt": [user("How many?"), assistant("Eight."), user("And now?")], "answer": 9}]),
    "options": ([{"question": "Which?", "options": {"A": "apple", "B": "car"}, "answer": "A"},
                 {"question": "Which?", "choices": ["apple", "car"], "answer": "B", "context": "Read this."},
                 {"question": "Which?", "options": ["A) apple", "(B) car"], "answer": "B"},
                 {"instruction": "Which?", "input": "Look.", "options": ["a", "b"], "output": "A"}],
                [turns(user("Which?\n\nA. apple\nB. car"), assistant("A")),
                 turns(user("Read this.\n\nWhich?\n\nA. apple\nB. car"), assistant("B")),
                 turns(user("Which?\n\nA) apple\n(B) car"), assistant("B")),
                 turns(user("Which?\n\nLook.\n\nA. a\nB. b"), assistant("A"))]),
    "thinking": ([turns(user("a"), {**assistant("b"), "reasoning_content": "because"}),
                  turns(user("a"), {**assistant("<think>x</think>b"), "reasoning": "x"}),
                  turns(user("a"), {**assistant(""), "thinking": "x"}, user("c"), assistant("d")),
                  {"prompt": "a", "response": "b", "reasoning": "since"}],
                 [turns(user("a"), assistant("<think>because</think>b")), turns(user("a"),
                                                                                assistant("<think>x</think>b")),
                  turns(user("a"), assistant(""), user("c"), assistant("d")),
                  turns(user("a"), assistant("<think>since</think>b"))]),
    "parts": ([turns(user([{"type": "text", "text": "a"}, {"text": "b"}]),
                     assistant([{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "c"}]))],
              [turns(user("ab"), assistant("<think>hm</think>c"))]),
    "roles": ([{"conversations": [{"from": "developer", "value": "S"}, {"from": "prompter", "value": "a"},
                                  {"from": "bot", "value": "b"}]},
               turns(user("a"), {"role": "model", "content": "b", "weight": 0}, user("c"),
                     assistant("d")) | {"label": True}],
              [turns(system("S"), user("a"), assistant("b")),
               {"prompt": turns(user("a"), assistant("b") | {"weight": 0}, user("c"))["messages"],
                "response": "d", "label": True}]),
    "nectar": ([ranks(b=2., a=1., c=3.), ranks(a=1, b=2)], [prefer(*"abc"), prefer("a", "b", margin=1)]),
    "ultrafeedback": ([scored(b=5, a=7.5, c=1) | {"source": "sharegpt", "key": 3}, scored(b=5, a=9, c=5) | {"margin": 9}],
                      [prefer(*"abc", key=3), prefer("a", "b", margin=4)]),
    "binarized": ([{"prompt": "Q", "messages": [user("Q"), assistant("a")], "chosen": [user("Q"), assistant("a")],
                    "rejected": [user("Q"), assistant("b")],
                    "score_chosen": s, "score_rejected": 5.} for s in (8.5, 6)],
                  [prefer("a", "b", margin=3.5), prefer("a", "b", margin=1.)]),
    "tldr": ([tldr("b", "a", 1)], [{"prompt": [user("P\n\nTL;DR:")], "responses": ["a", "b"]}]),
    "helpsteer2": ([rated("Q", "b", 2, 2, 2, 2, 2), rated("Q", "a", 4, 0, 0, 0, 0), rated("Q", "c", 1, 4, 4, 4, 4),
                    rated("R", "b", 3, 1, 1, 1, 1), rated("R", "a", 3, 1, 1, 1, 2),     # a tie that the sum breaks
                    rated("Q", "d", 1, 0, 0, 0, 0), rated("Q", "e", 2, 0, 0, 0, 0)],    # only neighbours meet
                   [prefer(*"abc"), {"prompt": [user("R")], "responses": ["a", "b"], "margin": 0},
                    prefer("e", "d", margin=1)]),
    "transcripts": ([{"prompt": hh("Q", ""), "response": "a"}, {"prompt": hh("Q"),
                                                                "responses": ["a", "\n\nAssistant: b"]},
                     {"prompt": hh("Q", "x", "R") + "\n\nAssistant:", "chosen": " a", "rejected": "b", "prob": .5},
                     {"prompt": hh("Q", "")}],
                    [said("a"), prefer("a", "b"), {"prompt": [user("Q"), assistant("x"), user("R")],
                                                   "responses": ["a", "b"], "prob": .5},
                     {"prompt": [user("Q")]}]),
    "ratings, steps": ([{"prompt": "Q", "response": "a", "ratings": [1, 2], "system": "S"},
                        {"prompt": "Q", "steps": ["a", "b"], "labels": [1, 0], "system": "S"}],
                       [{"prompt": [system("S"), user("Q")], "response": "a", "ratings": [1., 2.]},
                        {"prompt": [system("S"), user("Q")], "response": "ab", "steps": ["a", "b"], "labels": [1, 0]}]),
    "trees": ([reply("What?", None, reply("b", 1, reply("And?", None, reply("x", 0), reply("y", 1), role="prompter")),
                     reply("a", 0), role="prompter"),
               {"message_tree_id": "1", "prompt": reply("Q", None, reply("b", 1), reply("a", 0), role="prompter")}],
              [{"prompt": [user("What?")], "responses": ["a", "b"]},
               {"prompt": [user("What?"), assistant("b"), user("And?")], "responses": ["x", "y"]}, prefer("a", "b")]),
    "wrapped": ([{"data": [{"prompt": "Q", "response": "a"}, {"prompt": "Q", "response": "b", "system": "S"}]}],
                [said("a"), turns(system("S"), user("Q"), assistant("b"))]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_trainers_refuse_becomes_what_they_read(tmp_path, convert, name):
    rows, records = CASES[name]
    path = write(tmp_path, rows)
    with pytest.raises(UserError, match="^rows.jsonl:[12]: [^\n]*python configs/formats.py [^\n]*rows.jsonl"):
        read_records(path)
    assert read_records(convert(path)) == records


def test_every_shape_has_a_case():
    rows = [row for rows, _ in CASES.values() for row in rows]
    mine = set(formats.SHAPES) - {"conversations", "prompt completion", "chosen rejected",
                                  "chosen rejected instruction"}
    assert all(any(row.keys() >= set(shape.split()) for row in rows) for shape in mine)


@pytest.mark.parametrize("rows, want, records", [
    ([rated("Q", "b", 2, 2, 2, 2, 2), rated("Q", "a", 4, 0, 1, 2, 3)], "messages", [said("a")]),
    ([rated("Q", "b", 2, 2, 2, 2, 2), rated("Q", "a", 2, 2, 2, 2, 2)], "messages", [said("b")]),     # a tie
    ([rated("Q", "", 4, 2, 2, 2, 2), rated("Q", "a", 3, 2, 2, 2, 2), rated("Q", "b", 1, 2, 2, 2, 2)], None,
     [prefer("a", "b", margin=2)]),
    ([scored(a=1)], "prompt", [{"prompt": [user("Q")]}]),
    ([{"question": "Q", "answer": "2*3=<<2*3=6>>6\n#### 6", "options": ["6", "7"], "reasoning": "#### 5"}], "prompt",
     [{"prompt": [user("Q\n\nA. 6\nB. 7")], "answer": 6}]),
    ([{"question": "Q", "answer": "x", "reasoning": "so"}], "prompt", [{"prompt": [user("Q")], "answer": "x"}]),
    ([{"question": "Q", "answer": "x", "reasoning": "so", "label": True}], "thumbs",
     [{"prompt": [user("Q")], "response": "<think>so</think>x", "label": True}])])
def test_converted_rows_can_be_read_as_whatever_their_meaning_allows(tmp_path, convert, rows, want, records):
    assert read_records(convert(write(tmp_path, rows)), want) == records


def test_ratings_are_kept_where_asked_for(tmp_path, convert):
    """By name and not by place, one row for each answer; the trainer that wants them names the option."""
    raw = [rated("Q", "b", 2, 2, 2, 2, 2), rated("Q", "a", 4, 0, 1, 2, 3), rated("R", "x", 1, 2, 3, 4, 0)]
    path = write(tmp_path, [dict(reversed(row.items())) for row in raw])
    with pytest.raises(UserError, match="python configs/formats.py .* --ratings"):
        read_records(path, "ratings")
    assert read_records(convert(path, "--ratings"), "ratings") == [
        {"prompt": [user(row["prompt"])], "response": row["response"],
         "ratings": [row[key] for key in RATINGS]} for row in raw]


def test_real_helpsteer2(convert, tmp_path):
    path = write(tmp_path, real("helpsteer2/helpsteer2_validation_first8.jsonl").read_bytes())
    assert [record["margin"] for record in read_records(convert(path))] == [2, 3, 2]
    raw, got = [json.loads(line) for line in path.read_bytes().splitlines()], read_records(convert(path, "--ratings"),
                                                                                           "ratings")
    assert [(r["response"], r["ratings"]) for r in got] == [(r["response"], [r[name] for name in RATINGS]) for r in raw]


def test_the_two_forms_of_hh_give_the_same_text(tmp_path, convert):
    """A dialogue cut before, in, or behind the "Assistant:" that begins its answer, or not at all."""
    ask, cue, says = "\n\nHuman: a\n\nAssistant: x\n\nHuman: b", "\n\nAssistant:", ("c", " d", "", "e\n", "Human: f")
    whole, cut, good = [], [], {"prompt": "Z", "chosen": "z", "rejected": "y"}
    for yes, no in itertools.permutations(says, 2):
        whole.append({"chosen": f"{ask}{cue} {yes}", "rejected": f"{ask}{cue} {no}"})
        for asked, before in [(ask, f"{cue} "), (f"{ask}{cue}", " "), (f"{ask}{cue} ", "")]:
            cut.append([{"prompt": asked, "chosen": before + yes, "rejected": before + no},
                        {"prompt": asked, "responses": [before + yes, before + no]}])
    expected = read_records(write(tmp_path, [good] + whole))[1:]
    assert len(expected) == 12                                      # of 20, eight have an empty answer
    for forms in (cut[0::3], cut[1::3], cut[2::3]):
        for rows in zip(*forms):
            assert read_records(convert(write(tmp_path, [good, *rows])))[1:] == expected


def test_rank():
    """C21: ratings 5 and 2 are a margin of 3, and of a tie only the first is kept."""
    assert formats.rank(["b", "a"], [2, 5]) == {"responses": ["a", "b"], "margin": 3}
    assert formats.rank(["a", "b", "c"], [5, 5, 2]) == {"responses": ["a", "c"], "margin": 3}
    assert formats.rank(["a", "b"], [(3, 1), (3, 2)]) == {"responses": ["b", "a"], "margin": 0}
    assert formats.rank(["a", "b"], [1, 1]) == {"responses": ["a"]} and formats.rank([], []) == {"responses": []}
    assert formats.rank(["a", "a", "b"], [1, 2, 3]) == {"responses": ["b", "a"], "margin": 1}


# ---- what is dropped, not read, or refused

@pytest.mark.parametrize("row, words", [
    (scored(a=1, b=1), "dropped 1 tied rating"), (rated("Q", "a", 1, 1, 1, 1, 1), "2 records"),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5}, "dropped 1 tied rating"),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 5},
     "1 records; dropped 1 contradictory"),
    ({"prompt": hh("Q", ""), "chosen": " c\n\nHuman: d", "rejected": " e"}, "1 records; dropped 1 broken transcript"),
    ({"prompt": hh("Q", ""), "response": " c\n\nHuman: d\n\nAssistant: e"}, "1 records; dropped 1 broken transcript"),
    (reply("Q", None, reply("a", None), role="user"), "1 records; dropped 1 tree without a ranking"),
    ({"instruction": "Q", "completions": [dict(response="a", overall_score=1, model="m")], "id": 1},
     "not read: completions[].model 1 row, id 1 row"),
    ({"question": "Q", "answer": "a", "options": "A or B", "history": "none"},
     "not read: history 1 row, options 1 row")])
def test_what_is_left_out_is_said(tmp_path, capsys, convert, row, words):
    convert(write(tmp_path, [{"text": "a", "id": 3}, row]))
    assert words in capsys.readouterr().err.splitlines()[0]


def zipped(name, content=b"{}"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


CHAT = json.dumps(said("a")).encode()
ROWS = [     # a row, and a word of why it is refused
    (turns(user("a"), {"role": "tool", "content": "4"}, assistant("b")), "tool"),
    (turns(user("a"), {**assistant(""), "tool_calls": [{"id": "1"}]}, user("c"), assistant("d")), "tool_calls"),
    (turns(user("a"), {**assistant(None), "function_call": {"name": "f"}}, user("c"), assistant("d")), "function_call"),
    (turns(user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("b")), "image_url"),
    (turns({"role": "bot", "content": "b", "weight": .5}), "weight"), (turns(user("a"), {"role": "model"}), "content"),
    ({"instruction": "a", "output": "b", "history": [["a"]]}, "history"),
    ({"instruction": "a", "output": "b", "history": [["a", None]]}, "history"),
    ({"message_id": "2", "parent_id": "1", "text": "What?", "lang": "en"}, "parent_id"),
    ({"text": "A passage.", "question": "Which?"}, "question"), ({"src": "a", "tgt": "b"}, "known: messages"),
    ({"version": 1, "data": [{"prompt": "Q"}]}, "data"), ({"data": [3]}, "data"),
    ({"prompt": "Q", "response": "a", "system": 3}, "system"),
    ({"prompt": "Q", "response": "a", "label": "good", "system": "S"}, "label"),
    (ranks(a=1) | {"answers": ["a"]}, "answers"), (ranks(a=True), "rank"), (scored(a="5"), "overall_score"),
    (tldr("a", "b", 2), "choice"), (tldr("a", "b", True), "choice"), (tldr("a", "b", 1) | {"info": {"post": None}},
                                                                      "post"),
    (tldr("a", "b", 1) | {"summaries": [{"text": "a"}]}, "summaries"), (rated("Q", "a", 1, 1, 1, 1, None), "verbosity"),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": "1"}, "score_rejected"),
    ({"chosen": [user("Q")], "rejected": [user("Q")], "system": "S"}, "chosen"),
    ({"prompt": [assistant("a")], "system": "S"}, "prompt"), ({"prompt": "Q", "response": 3}, "response"),
]


@pytest.mark.parametrize("row, word", ROWS, ids=range(len(ROWS)))
def test_a_row_that_has_no_plain_form_is_refused_and_no_file_is_written(tmp_path, convert, row, word):
    path = write(tmp_path, [{"text": "a"}, row, row])
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


@pytest.mark.parametrize("name, records", {
    "csv.csv": [turns(user("a"), assistant("b"))], "history.jsonl": 1, "leading_space.jsonl": [{"prompt": [user("a")],
                                                                                                "responses": ["b", "c"]}],
    "question_options.jsonl": [turns(user("Which is a fruit?\n\nA. apple\nB. car"), assistant("A"))],
    "reasoning_content.jsonl": [turns(user("a"), assistant("<think>because</think>b"))],
    "lfs_pointer.jsonl": "git lfs pull",
    "message_tree.jsonl": [{"prompt": [user("What is up?")], "responses": ["Nothing.", "The sky."]}],
    "tool_calls_empty_turn.jsonl": "tool_calls", "one_object_pretty.json": [turns(user("Hi"), assistant("Hello"))],
    "weight0.jsonl": [turns(user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d"))]}.items())
def test_known_faults(tmp_path, convert, name, records):
    """Files that other people's programs stumbled over: refused with the command, and then converted or explained."""
    if not (FAULTS / name).exists():
        pytest.skip(f"{FAULTS / name} is not here")
    path = write(tmp_path, (FAULTS / name).read_bytes(), name)
    if name not in ("weight0.jsonl", "one_object_pretty.json"):
        with pytest.raises(UserError, match="python configs/formats.py"):
            read_records(path)
    if isinstance(records, str):
        with pytest.raises(UserError, match=records):
            convert(path)
    else:
        got = read_records(convert(path))
        assert got == records or records == len(got)
