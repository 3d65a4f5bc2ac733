"""Plain rows from other people's files: from tables (CSV, TSV), and from shapes that only some data sets have.

    python configs/formats.py FILE                        writes FILE.plain.jsonl beside it
    python configs/formats.py FILE --out rows.jsonl       writes it elsewhere
    python configs/formats.py helpsteer2.jsonl --ratings  keeps the ratings of answers, rather than rank them

The trainers read plain rows: a text, messages, a prompt with its answer, a pair, a ranking, thumbs, ratings, steps
(data.SHAPES). This writes such rows, which one can look at, of

    system, system_prompt, history      turns before the prompt
    context, options, choices           part of a question
    reasoning, reasoning_content,       <think>...</think> in front of the answer
      thinking, parts of a content
    score_chosen, score_rejected        the margin of a pair
    prompt answers                      a ranking: Nectar's, by rank
    instruction completions             a ranking: UltraFeedback's, by overall_score
    prompt response helpfulness ...     a ranking: HelpSteer2's adjacent answers to one prompt
    info summaries choice               a pair: TL;DR's
    trees of replies                    a ranking wherever the assistant's replies are ranked: OpenAssistant's
    transcripts as prompts, and other names of roles and of keys

and leaves rows as they are that are plain already. Of equal scores only the first is kept, as a ranking has no ties.
What is dropped is counted on stderr, and keys that are not read are named there. A file that it cannot convert it calls
what it is, in one line.
"""
import csv
import itertools
import json
import re
import shlex
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where data.py is

import data
from data import BESIDE, Dropped, NotPlain, Options, Row, UserError, guard, parse, read_lines, read_rows, refuse


@dataclass
class Config(Options):
    """Write the rows of a file as the trainers read them."""
    out: str = ""               # file to write; empty: the name of the file, with .plain.jsonl at the end
    ratings: bool = False       # keep the ratings of answers (HelpSteer2), rather than rank by them
    skip_bad: bool = False      # leave out the rows of a file that cannot be understood, and count them


# ------------------------------------------------------------------------------------------------ turns and prompts

ROLES = data.ROLES | {"developer": "system", "prompter": "user", "model": "assistant", "bot": "assistant"}
THOUGHTS = "reasoning_content", "reasoning", "thinking"     # keys of what an answer thought before it spoke
CALLS = "tool_calls", "function_call"


def said_by(role, text):
    """A turn."""
    return {"role": role, "content": text}


def with_thought(row, said):
    """An answer with what it thought in front, as the toy world writes it; unless it says so already."""
    known = [key for key in THOUGHTS if row.get(key) and type(row[key]) is str]
    if not known or not said.strip():
        return said
    thought = row.take(known[0], str)
    if said.lstrip().startswith("<think>"):
        return said
    return f"<think>{thought}</think>{said}"


def content(turn, key):
    """What a turn says: a string, or parts of text and thinking, one after another."""
    if type(turn.get(key)) is not list:
        return turn.take(key, str)
    said = ""
    for part in turn.rows(key):
        kind = part.take("type", str) if "type" in part else "text"
        if kind == "thinking":
            said += f"<think>{part.take('thinking', str)}</think>"
        elif kind in ("text", "input_text", "output_text"):
            said += part.take("text", str)
        else:
            raise ValueError(f'"{turn.inside}{key}" has a part of type {kind!r}, and only text is read')
    return said


def plain_turn(turn):
    """A turn as {"role", "content"}, and its "weight" if it has one."""
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.take(who, str)
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f'"{turn.inside}{who}" is {role!r}, not one of {known}; what tools say is not read: write it '
                         'as text of one of these')
    for key in CALLS:
        if turn.get(key):
            raise ValueError(f'"{turn.inside}{key}": calls of tools are not read: write them into what the turn says')
    said = content(turn, what)
    if ROLES[role] == "assistant":
        said = with_thought(turn, said)
    plain = said_by(ROLES[role], said)
    if turn.get("weight") is not None:
        plain["weight"] = turn["weight"]
        turn.unread.discard(turn.inside + "weight")
    return plain


def is_transcript(value):
    return type(value) is str and value.startswith("\n\nHuman:")


def asked_in(transcript):
    """The turns of a transcript that ends where the assistant is to speak: with "\\n\\nAssistant:", or before it."""
    transcript = transcript.rstrip()
    cue = "" if transcript.endswith("\n\nAssistant:") else "\n\nAssistant:"
    return data.read_transcript(transcript + cue)[:-1]


def reply(asked, said):
    """An answer. With a transcript it is what ends the one transcript that both make up, so that it reads the same
    wherever the two are cut apart."""
    if not is_transcript(asked):
        return said
    cued = asked.rstrip().endswith("\n\nAssistant:") or said.startswith("\n\nAssistant:")
    cue = "" if cued else "\n\nAssistant: "
    *turns, last = data.read_transcript(asked + cue + said)
    if len(turns) != len(asked_in(asked)):
        raise Dropped("broken transcript")
    return last["content"]


def turns_of(row, key):
    """What is under a key as turns: messages, a transcript, or what a user says."""
    value = row.take(key, str, list)
    if type(value) is list:
        return [plain_turn(turn) for turn in row.rows(key)]
    return asked_in(value) if is_transcript(value) else [said_by("user", value)]


def dialogue(row, key):
    """(the turns before, the assistant's last turn) of messages, a transcript, or an answer alone."""
    if type(row[key]) is not list:
        return data.read_dialogue(row, key)
    turns = turns_of(row, key)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f'"{key}" must be messages that end in an assistant turn')
    return turns[:-1], turns[-1]


def after(row, turns):
    """Turns behind those that stand beside them: a system prompt, and earlier ones."""
    before = []
    for key in ("system", "system_prompt"):
        if row.get(key):
            said = said_by("system", row.take(key, str))
            before += [said] if [said] != turns[:1] else []
    return before + history(row) + turns


def history(row):
    """Earlier turns, from a list of [question, answer] or of turns."""
    earlier = row.get("history")
    if type(earlier) is not list:
        return []
    if all(type(turn) is dict for turn in earlier):
        return turns_of(row, "history")
    turns = []
    for pair in row.each("history", list):
        if [type(said) for said in pair] != [str, str]:
            raise ValueError('"history" must be a list of [question, answer] or of turns')
        turns += [said_by("user", pair[0]), said_by("assistant", pair[1])]
    return turns


def question(row, key):
    """What a row asks: with its context before a question, and its input and its options behind it."""
    turns = turns_of(row, key)
    if type(row[key]) is list or is_transcript(row[key]):
        return after(row, turns)
    parts = [row[key]]
    if row.get("context") and type(row["context"]) is str:
        parts.insert(0, row.take("context", str))
    if key == "instruction" and row.get("input"):
        parts.append(row.take("input", str))
    options = options_of(row)
    if options:
        parts.append(options)
    return after(row, [said_by("user", "\n\n".join(parts))])


def options_of(row):
    """The options of a question as one text, a line each: "A. apple"; "" if there are none, or not plain ones."""
    key = "choices" if "choices" in row else "options"
    options = row.get(key)
    if type(options) is list and len(options) <= 26:
        options = dict(zip(string.ascii_uppercase, options))
    if type(options) is not dict or any(type(text) is not str for text in options.values()):
        return ""
    row.take(key, list, dict)
    lines = []
    for letter, text in options.items():
        named = text.startswith((f"{letter}.", f"{letter})", f"({letter})"))
        lines.append(text if named else f"{letter}. {text}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ shapes
OF_RANKINGS = "margin", "scores", "win"


def with_keys(row, plain, *keys):
    """A plain row with these keys too, where a row has them, and with what any record may have."""
    for key in ("key", "source", *keys):
        if row.get(key) is not None and key not in plain:
            plain[key] = row[key]
            row.unread.discard(key)
    return plain


# Each of these makes a plain row of one shape.

def chat(row, messages):
    row.take(messages, list)
    turns = turns_of(row, messages)
    return with_keys(row, {"messages": after(row, turns)}, "label")


def answered(row, asked, answer):
    said = reply(row[asked], row.take(answer, str))
    plain = {"prompt": question(row, asked), "response": with_thought(row, said)}
    if (asked, answer) == ("question", "answer"):           # GSM8K's, which may end in "#### 7"
        plain = {"question": plain["prompt"], "answer": plain["response"]}
    if asked == "prompt":
        return with_keys(row, plain, "label", "ratings")
    if type(row.get("label")) is bool:                      # anything else is the name of a class
        return with_keys(row, plain, "label")
    return with_keys(row, plain)


def pair(row, chosen, rejected, prompt=None):
    asked, best = dialogue(row, chosen)
    other, worst = dialogue(row, rejected)
    if asked != other:
        raise Dropped("contradictory pair")
    if not asked and not prompt:
        raise ValueError(f'"{chosen}" must be messages or a transcript, as there is no "prompt"')
    if asked:
        asked = after(row, asked)
    else:
        asked = question(row, prompt)
        for said in (best, worst):
            said["content"] = reply(row[prompt], said["content"])
    plain = {"prompt": asked, "chosen": [best], "rejected": [worst]}
    if row.get("score_chosen") is not None:
        high = row.take("score_chosen", int, float)
        low = row.take("score_rejected", int, float)
        if high < low:
            raise Dropped("contradictory pair")
        plain["margin"] = high - low
        if high == low:
            plain = {"prompt": asked, "responses": [best["content"]]}
            row.lost = {"tied rating": 1}
            return with_keys(row, plain)
    return with_keys(row, plain, *OF_RANKINGS, "prob")


def ranked(row, prompt, scores, answers):
    """A ranking by scores, whose prompt is turns."""
    kept = rank(answers, scores)
    row.lost = {"tied rating": len(answers) - len(kept["responses"])}
    return with_keys(row, {"prompt": prompt} | kept, *OF_RANKINGS)


def rank(responses, scores):
    """Order responses best first: {"responses": [...]}, and the "margin" of the scores where two are left.

    A ranking has no ties: of equal scores or equal texts the first is kept. Empty texts stay, as the trainers count
    them. A score may be a tuple (score, tie-break), whose first number makes the margin: ratings 5 and 2 give margin 3.
    """
    kept, order = {}, []                                    # {text: score}
    for score, text in sorted(zip(scores, responses), key=lambda pair: pair[0], reverse=True):
        if not text.strip():
            order.append(text)
        elif text not in kept and score not in kept.values():
            kept[text] = score
            order.append(text)
    if len(kept) != 2:
        return {"responses": order}
    best, worst = (score[0] if isinstance(score, tuple) else score for score in kept.values())
    return {"responses": order, "margin": best - worst}


def by_score(row, prompt, answers, text, score, sign):
    said, scores = [], []
    for item in row.rows(answers):
        said.append(reply(row[prompt], item.take(text, str)))
        scores.append(sign * item.take(score, int, float))
    return ranked(row, question(row, prompt), scores, said)


def nectar(row, prompt, answers):
    return by_score(row, prompt, answers, "answer", "rank", -1)


def ultrafeedback(row, instruction, completions):
    return by_score(row, instruction, completions, "response", "overall_score", 1)


def tldr(row, info, summaries, choice):
    about = Row(row.take(info, dict), f"{info}.", row.unread)
    prompt = said_by("user", about.take("post", str) + "\n\nTL;DR:")
    texts = [summary.take("text", str) for summary in row.rows(summaries)]
    best = row.take(choice, int)
    if len(texts) != 2 or best not in (0, 1):
        raise ValueError(f'"{choice}" must be 0 or 1, and "{summaries}" two')
    plain = {"prompt": after(row, [prompt]), "responses": [texts[best], texts[1 - best]]}
    return with_keys(row, plain, *OF_RANKINGS)


def ours(row, prompt, responses=None):
    """A prompt, or a ranking, that keeps all else it has; a verifier may want it."""
    plain = {key: value for key, value in row.items() if key not in BESIDE}
    plain["prompt"] = after(row, turns_of(row, prompt))
    if responses:
        plain["responses"] = [reply(row[prompt], said) for said in row.each(responses, str)]
    row.unread -= plain.keys()
    return plain


def stepped(row, prompt, steps, labels):
    return with_keys(row, {"prompt": question(row, prompt)}, steps, labels)


SHAPES = {
    "messages": chat,
    "conversations": chat,
    "prompt response": answered,
    "prompt completion": answered,
    "instruction output": answered,
    "instruction response": answered,                       # Dolly
    "question response": answered,                          # Orca
    "question answer": answered,
    "chosen rejected": pair,
    "chosen rejected prompt": pair,
    "chosen rejected instruction": pair,
    "prompt answers": nectar,
    "instruction completions": ultrafeedback,
    "info summaries choice": tldr,
    "prompt responses": ours,
    "prompt steps labels": stepped,
    "prompt": ours,
}


# ------------------------------------------------------------------------------------------------ several rows

RATINGS = "helpfulness", "correctness", "coherence", "complexity", "verbosity"


def helpsteer(rows, keep_ratings):
    """The ranking of rows that each rate an answer to one prompt: by helpfulness, and of equals by the sum of all five.
    Or one of them as it is, with the list of its ratings."""
    answers, scores, prompts = [], [], []
    for row in rows:
        ratings = [row.take(key, int, float) for key in RATINGS]
        said = reply(row["prompt"], row.take("response", str))
        answers.append(with_thought(row, said))
        scores.append((ratings[0], sum(ratings)))
        prompts.append(question(row, "prompt"))
    if keep_ratings:
        plain = {"prompt": prompts[0], "response": answers[0], "ratings": ratings}
        return with_keys(rows[0], plain)
    return ranked(rows[0], prompts[0], scores, answers)


def grouped(rows, keep_ratings):
    """Yield (where, Rows): adjacent answers that are rated, of one prompt, together; any other row alone."""
    def group(item):
        where, row = item
        rated = row.keys() >= {"prompt", "response", *RATINGS}
        return ("prompt", row["prompt"]) if rated and not keep_ratings else where
    for _, items in itertools.groupby(rows, group):
        wheres, found = zip(*items)
        yield ", ".join(wheres), [Row(row) for row in found]


def tree(node, before=()):
    """The rankings of a tree of replies: wherever two or more of the assistant's are ranked, best first."""
    role, text = node.take("role", str), node.take("text", str)
    turns = [*before, said_by(ROLES[role], text)]
    replies = node.rows("replies") if node.get("replies") else []
    order, rankings = [], []
    for reply in replies:
        if reply.get("rank") is not None and reply.get("role") == "assistant":
            order.append((reply.take("rank", int), reply["text"]))
    if len(order) > 1:
        order.sort()
        rankings = [{"prompt": turns, "responses": [text for _, text in order]}]
    for reply in replies:
        rankings += tree(reply, turns)
    return rankings


def convert(rows, keep_ratings=False):
    """The plain rows of a Row, or of several Rows that belong together."""
    row = root = rows[0]
    if type(row.get("prompt")) is dict:
        root = Row(row.take("prompt", dict), "prompt.", row.unread)
    if root.keys() >= {"text", "role", "replies"}:
        plain = tree(root)
        if not plain:
            raise Dropped("tree without a ranking")
    elif row.keys() >= {"prompt", "response", *RATINGS}:
        plain = [helpsteer(rows, keep_ratings)]
    elif is_plain(row):
        row.unread.clear()                                  # its reader will name what it does not read
        return [row]
    else:
        shape = shape_of(row)
        plain = [SHAPES[shape](row, *shape.split())]
    for made in plain:
        is_plain(made)                                      # if not, its ValueError says what is wrong
    return plain


def is_plain(row):
    """Whether the trainers read a row as it is, if only to drop it. A ValueError: neither they nor this can."""
    try:
        data.to_record(Row(row))
    except Dropped:
        return True
    except NotPlain:
        return False
    return True


def shape_of(row):
    """The shape that fits a row with the most keys."""
    fitting = [shape for shape in SHAPES if row.keys() >= set(shape.split())]
    if not fitting:
        known = ", ".join(shape.replace(" ", "+") for shape in SHAPES)
        raise ValueError(f"no shape has the keys {list(row)}; known: {known}")
    return max(fitting, key=lambda shape: len(shape.split()))


# ------------------------------------------------------------------------------------------------ files

UNPACK = "unpack it first (only gzip is read as it is)"
PANDAS = "pandas.read_{}('{{}}').to_json('rows.jsonl', orient='records', lines=True) in Python makes a file to read"
AS_JSON = "write its rows as JSON, one a line"
PICKLE = "it may run code when it is loaded; whoever made it should write its rows with json.dumps"
# How a file begins that is no text: what it is, and what to do.
MAGIC = {
    b"PAR1": ("a parquet file", PANDAS.format("parquet")),
    b"ARROW1": ("an Arrow file", PANDAS.format("feather")),
    b"\xff\xff\xff\xff": ("an Arrow stream", "datasets.Dataset.from_file('{}').to_json('rows.jsonl') in Python makes a "
                                             "file to read"),
    b"Obj\x01": ("an Avro file", AS_JSON),
    b"SQLite format 3": ("an SQLite database", AS_JSON),
    b"\x89HDF": ("an HDF5 file", PANDAS.format("hdf")),
    b"\x93NUMPY": ("a NumPy array", AS_JSON),
    b"%PDF": ("a PDF", "write its text to a .txt file"),
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"BZh": ("packed with bzip2", UNPACK),
    b"\xfd7zXZ": ("packed with xz", UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", UNPACK),
    b"\x04\x22\x4d\x18": ("packed with lz4", UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"\x1f\x8b": ("packed twice with gzip", "unpack it once"),
    **{bytes([128, protocol]): ("a Python pickle", PICKLE) for protocol in (2, 3, 4, 5)},
}


def foreign(head, path):
    """What a file is that begins with these bytes, and what to do, if it is no text in UTF-8 or no data; "" else."""
    for start, (what, remedy) in MAGIC.items():
        if head.startswith(start):
            if b"[Content_Types].xml" in head[:60]:         # the first file in this zip archive
                what, remedy = "an Excel or Word file", "save it as .csv or .txt"
            return f"{what}: {remedy.format(path)}"
    if head[257:262] == b"ustar":
        return f"a tar archive: {UNPACK}"
    if head.startswith(b"version https://git-lfs"):
        return "only a Git LFS pointer to the data: git lfs pull gets the file itself"
    encoding = json.detect_encoding(head)
    if not encoding.startswith("utf-8"):
        return f"{encoding.upper()}, or no text at all: save it as UTF-8"
    if b"\0" in head:
        return f"neither JSON nor text: {AS_JSON}"
    return ""


def not_json(line):
    """What a file is whose first line is neither JSON nor that of a table, and what to do."""
    if re.match(r"<!doctype html|<html|<head|<body", line, re.IGNORECASE):
        return "a web page (HTML): the download gave an error or a login page; get the raw file"
    if line.startswith("<"):
        return f"XML: {AS_JSON}"
    if re.match(r"---$|%YAML|- |[\w.-]+:( |$)", line):
        return f"YAML: {AS_JSON}"
    return "text: name it .txt if it is one document, or write a JSON object on each line"


def separator(line, path):
    """What stands between the cells of a table whose first line this is; "" if it is no table's."""
    cell = r'("[^"]*"|[^",;\t|]*)'
    for sign in "\t,;|":
        if re.fullmatch(cell + f"({re.escape(sign)}{cell})+", line[:1000]):
            return sign
    return "," if path.removesuffix(".gz").endswith((".csv", ".tsv")) else ""     # of one column


def read_table(path, sign, bad):
    """Yield (where, row) of a CSV or TSV file, whose first line names the columns."""
    name = Path(path).name
    csv.field_size_limit(2 ** 31 - 1)
    lines = (line.decode("utf-8") for _, line in read_lines(path))
    reader = csv.DictReader(lines, delimiter=sign, strict=True)
    try:
        columns = reader.fieldnames
        if len(set(columns)) < len(columns):
            raise UserError(f"{name}:1: two columns of one name: {columns}")
        for row in reader:
            if None in row or None in row.values():
                refuse(bad, f"{name}:{reader.line_num}: not {len(columns)} cells, as the first line has")
                continue
            if row.get("label", "").lower() in ("true", "false"):
                row["label"] = row["label"].lower() == "true"
            yield f"{name}:{reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{name}:{reader.reader.line_num}: {error}") from None


def beginning(path):
    """(the first 512 bytes of a file at least, its first line that is not blank)."""
    head, first = b"", ""
    for _, line in read_lines(path):
        head += line
        first = first or line.decode("utf-8", errors="replace").strip()
        if len(head) >= 512 and first:
            break
    return head, first


def read_any(path, bad):
    """Yield (where, row) of a file; what is neither JSON nor text nor a table is called what it is, in a UserError."""
    name = Path(path).name
    head, first = beginning(path)
    if what := foreign(head, path):
        raise UserError(f"{name}: this is {what}")
    document = name.removesuffix(".gz").endswith((".txt", ".md"))
    if document or not first or first[0] in "{[":
        return unwrapped(read_rows(path, bad))
    if sign := separator(first, path):
        return read_table(path, sign, bad)
    raise UserError(f"{name}: this is {not_json(first)}")


def unwrapped(rows):
    """Yield (where, row), and in place of a row that is only {"data": [...]} the rows in it."""
    for where, row in rows:
        key = next(iter(row), "")
        inside = row[key] if len(row) == 1 and key not in SHAPES else None
        if type(inside) is list and all(type(item) is dict for item in inside):
            for i, item in enumerate(inside):
                yield f"{where} {key}[{i}]", item
        else:
            yield where, row


def write_rows(path, out, cfg):
    """Convert a file to a file of plain rows; returns how many there are and what became of all, in a line."""
    n, dropped, unread = 0, Counter(), Counter()
    bad = [] if cfg.skip_bad else None
    rows = read_any(path, bad)
    with open(out, "w", encoding="utf-8") as f:
        for where, found in grouped(rows, cfg.ratings):
            try:
                plain = convert(found, cfg.ratings)
            except Dropped as reason:
                dropped[str(reason)] += 1
                continue
            except ValueError as error:
                refuse(bad, f"{where}: {error}")
                continue
            for row in plain:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
            n += len(plain)
            dropped.update(found[0].lost)
            for row in found:
                unread.update(row.unread)
    return n, data.summary(path, n, dropped, bad, unread)


def main():
    """Write the plain rows of a file under another name; no file at all if there are none."""
    cfg, (path,) = parse(Config, positional=["file"])
    stem = re.sub(r"\.(jsonl?|csv|tsv|txt|md)$", "", path.removesuffix(".gz"))
    out = Path(cfg.out or f"{stem}.plain.jsonl")
    if out.exists() and out.samefile(path):
        raise UserError(f"--out {out}: this is the file to be read")
    part = out.with_name(out.name + ".part")
    try:
        n, line = write_rows(path, part, cfg)
        if not n:
            raise UserError(line)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{line}\nin {out}; to look at it: python data.py {shlex.quote(str(out))}", file=sys.stderr)


if __name__ == "__main__":
    guard(main)
