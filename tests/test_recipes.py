"""Every recipe in configs/ runs as written: each option exists, each file read is made earlier, all stages run at tiny
scale, and a second time nothing does. And every stage, killed at any moment, ends as if it had not been."""
import atexit
import base64
import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import model
import ppo
import reward
from data import (BAD, GOOD, SAYINGS, VERIFIERS, OptionError, Run, Tokenizer, UserError, checked, option_types, parse,
                  parse_rewards, read_toml, verifier)
from model import load_tensors
from policies import TOK, random_policy
from test_world import FENCE, GATE, KETTLE, NAME, held_out

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.sh"))
TOMLS = sorted((ROOT / "configs").glob("*.toml"))
# What shrinks a stage to a moment; each stage takes of these what it has.
TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=256, steps=2, batch=8, packing=128, n=8, max_new=16, prompts=4,
            ptx_batch=4, epochs=1, device="cpu", dtype="fp32", threads=1, show=1, group=4, samples=2, guesses=0, cuts=1)


# ---- reading a recipe

# What a script beside a recipe runs, and the file that this makes.
BESIDE = dict(claude_cai=("revise", "revisions.jsonl"), rule_based_rewards=("fit", "reward.txt"),
              kimi_k15=("curate", "prompts.jsonl"), reward_hacking=("overoptimize", "curves.json"),
              merge=("merge", "model.safetensors"),
              superficial=("mark_all", "pairs.jsonl"), chatglm_rlhf=("balance", "pairs.jsonl"),
              nemotron4=("rate", "ratings.jsonl"), long2short=("shorten", "shortest.jsonl"),
              judging=("write", "demos.jsonl"), lookahead=("write", "demos.jsonl"),
              long_thinking=("write", "demos.jsonl"))


def positionals(name): return (reward.TAKES | dict(merge=["checkpoint", "checkpoint..."], reward_hacking=["run..."],
                                                         nemotron4=["reward", "reward..."])).get(name, [])


@functools.cache
def given():
    """{variable: path} of what a recipe asks of its user: a GPT-2, whose tokens are bytes here, and three small files."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the order of GPT-2's first 256 tokens
    order = plain + [b for b in range(256) if b not in plain]
    letters = [chr(b) if b in plain else chr(256 + order.index(b) - len(plain)) for b in order]
    (folder / "gpt2").mkdir()
    (folder / "gpt2/vocab.json").write_text(json.dumps({x: i for i, x in enumerate(letters)} | {"<|endoftext|>": 256}))
    (folder / "gpt2/merges.txt").write_text("#version: 0.2\n")
    tok = Tokenizer.load(str(folder / "gpt2"))
    torch.manual_seed(0)
    model.write_model(folder / "gpt2", model.GPT(model.GPTConfig(tok.n_vocab, 256, 1, 2, 32), tok))
    talk = lambda i, answer: f"\n\nHuman: What is {i}?\n\nAssistant: {answer}"
    rows = dict(
        alpaca=[dict(instruction=f"Say {i}.", input="", output=f"It is {i}.") for i in range(60)],
        hh=[dict(chosen=talk(i, f"It is {i}."), rejected=talk(i, "No.")) for i in range(60)],
        gsm8k=[dict(question=f"What is {i} + 1?", answer=f"So.\n#### {i + 1}") for i in range(60)])
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {"GPT2": str(folder / "gpt2")} | {name.upper(): str(folder / f"{name}.jsonl") for name in rows}


@functools.cache
def opened(path):
    """A script as a module."""
    return importlib.import_module(path.stem)


def scripts():
    """{how its options are named in a TOML file: (Config, function)} of everything that trains, labels or compares."""
    found = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]):
        if path.stem in ("data", "model") or "guard(" not in path.read_text():  # or a reward or a task of the reader's own
            continue
        module = opened(path)
        function, _ = BESIDE.get(path.stem, ("train", ""))
        commands = getattr(module, "COMMANDS", None)
        if not commands and hasattr(module, function):  # without, it is a program of its own, no stage of a recipe
            commands = {"": (module.Config, getattr(module, function))}
        for name, command in (commands or {}).items():
            found[path.stem if name in ("", "train") else name] = command
    return found


def expand(script, *argv, out="out"):
    """The commands of a recipe, as bash expands them, with python replaced by a recorder: lists of words."""
    recorder = 'python() { printf "%s\\t" "$@"; printf "\\n"; }; source "$0"'
    done = subprocess.run(["bash", "-c", recorder, str(script), *argv], capture_output=True, text=True, check=True,
                          env=os.environ | {"OUT": str(out)} | given())
    assert not done.stderr, done.stderr
    return [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]


def options(words):
    """(script, command name, cfg, positionals) of a recorded command; an OptionError if it has an unknown option."""
    file, *argv = words
    if not (ROOT / file).is_file():
        raise OptionError(f"{file}: no such script")
    name = Path(file).stem
    if name == "reward":
        name = "reward" if argv[0] == "train" else argv[0]
        argv = argv[1:]
    if name not in scripts():
        raise OptionError(f"{file}: no command {name}")
    got = parse(scripts()[name][0], positionals(name), argv, name)
    return (file, name, *got) if positionals(name) else (file, name, got, [])


def parts(spec): return [part for term in parse_rewards(spec) for part in term.names] if spec else []


def reads(name, cfg, folders):
    """Every folder and file a command reads."""
    found = [x for spec in folders for x in (parts(spec) if name in ("accuracy", "nemotron4") else [spec])]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in ("init", "policy", "critic", "ref", "merge_base") or field.name.endswith("data"):
            found += value.split(",")
        if field.name in ("reward", "judge", "proxy", "by", "cost", "base", "rules") and getattr(cfg, "online", True):
            found += parts(value)
    rule = lambda name: ":" in name or verifier(name) is not None    # a term of a reward that is no folder
    return [x for x in found if x not in ("", "new", "toy", *given().values()) and not rule(x)]


def problems(commands):
    """What is wrong with a list of commands, as text; nothing if they can run one after the other."""
    out, made = [], {}
    for words in commands:
        line = " ".join(words)
        try:
            file, name, cfg, folders = options(words)
        except (UserError, IndexError) as error:
            out.append(f"{line}: {error}")
            continue
        for path in reads(name, cfg, folders):
            maker = made.get(path) or made.get(str(Path(path).parent))
            if maker is None or (path in made and maker in ("label", "kimi_k15")):
                out.append(f"{line}: nothing before it makes {path}")
        if getattr(cfg, "out", None):
            made[cfg.out] = name
    return out


def header(script): return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), script.read_text().splitlines()))


# ---- what a recipe says

@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_option_exists_and_every_file_read_is_made_before(recipe, tmp_path):
    commands = expand(recipe, "--seed", "3", out=tmp_path / "here")
    assert len(commands) > 1 and not problems(commands)
    assert all(words[-2:] == ["--seed", "3"] for words in commands if words[0] != "configs/merge.py"), 'every stage ends in "$@"'
    for words in commands:
        file, name, cfg, folders = options(words)
        places = reads(name, cfg, folders) + [getattr(cfg, "out", None) or folders[0]]
        assert all(str(place).startswith(str(tmp_path / "here") + "/") for place in places), "every folder is in $OUT"
    assert all(words[0] == "python" or "=" in words[0] or words[0] in ("set", "for", "do", "done", "if", "fi", "mkdir")
               for words in map(str.split, recipe.read_text().splitlines()) if words and not words[0].startswith("#"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_header_names_the_paper_and_what_is_reported(recipe):
    text = header(recipe)
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in recipe.read_text()
    if recipe.stem != "compare":
        assert re.search(r"\b\d{4}\.\d{5}\b", text) and "reported" in text and "reconstruction" in text


@pytest.mark.parametrize("text, word", [
    ("python sft.py --init new --stepz 3", "stepz"), ("python nothing.py", "no such script"), ("python sft.py", "out/base"),
    ("python reward.py learn", "no command"), ("python reward.py label --policy $OUT/sft", "out/sft"),
    ("python sft.py --init new --out $OUT/a\npython ppo.py --init $OUT/a --reward $OUT/b", "out/b"),
    ("python sft.py --init new --out $OUT/a\npython ppo.py --init $OUT/a --reward .5*exact+$OUT/c", "out/c"),
    ("python sft.py --init new --out $OUT/a\npython reward.py compare $OUT/a $OUT/b", "out/b"),
    ("python sft.py --init new --out $OUT/a\npython reward.py train --init $OUT/a", "pairs"),
    ("python sft.py --init new --lr fast", "--lr fast"), ("python sft.py --init new stray", "stray")])
def test_a_broken_recipe_is_found(tmp_path, text, word):
    recipe = tmp_path / "broken.sh"
    recipe.write_text(text + "\n")
    found = problems(expand(recipe))
    assert len(found) == 1 and word in found[0]


def test_a_recipe_may_loop(tmp_path):
    recipe = tmp_path / "rounds.sh"
    recipe.write_text('python sft.py --init new --out $OUT/0 "$@"\n'
                      'for i in 1 2 3; do\n  python sft.py --init $OUT/$((i - 1)) --out $OUT/$i "$@"\ndone\n')
    commands = expand(recipe)
    assert [words[-1] for words in commands] == [f"out/{i}" for i in range(4)] and not problems(commands)


def test_deepseek_r1_begins_its_third_stage_again_from_the_base():
    """And on right, well-formed samples of the second, which `--select correct` alone keeps (test_reward.py)."""
    stages = {got[2].out: got[1:3] for got in map(options, expand(ROOT / "configs/deepseek_r1.sh")[:-2])}
    name, third = stages["out/deepseek_r1/sft"]
    assert name == "sft" and third.init == "out/base" != stages["out/deepseek_r1/final"][1].init == third.out
    samples = stages[str(Path(third.data.split(",")[0]).parent)][1]
    assert samples.select == "correct" and samples.policy == "out/deepseek_r1/rl"
    weights = {term.names[0]: term.weight for term in parse_rewards(samples.by)}
    assert weights.keys() == {"exact", "format"} and max(weights.values()) < .5 < sum(weights.values())


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_every_key_of_a_toml_belongs_to_the_script_it_names(path):
    table, known = tomllib.loads(path.read_text()), scripts()
    for key, value in table.items():
        if isinstance(value, dict):
            assert key in known, f"[{key}] is no script"
            Config, _ = known[key]
            cfg = Config(**read_toml(path, key, option_types(Config)))
            assert all(getattr(cfg, k) == v for k, v in value.items())
        else:
            takers = [Config for Config, _ in known.values() if key in {f.name for f in dataclasses.fields(Config)}]
            assert takers, f"{key}: no script has it"
            for Config in takers:
                checked(key, value, option_types(Config)[key])


# ---- what the READMEs say

READMES = {str(path.relative_to(ROOT)): path.read_text() for path in (
    ROOT / "README.md", ROOT / "configs/README.md", ROOT / "tests/README.md")}


def anchors(text):
    """The #names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", READMES)
def test_what_a_readme_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)]*)\)", READMES[page]):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", READMES)
def test_every_test_that_a_readme_names_is_there(page):
    code = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    named = set(re.findall(r"\b(test_\w+)`", READMES[page]))
    assert {name for name in named if f"def {name}(" not in code} == set()


@pytest.mark.parametrize("page", READMES)
def test_every_command_in_a_readme_has_options_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # for --config
    blocks = re.findall(r"```bash\n(.*?)```", READMES[page], re.DOTALL)
    assert blocks
    for line in "".join(blocks).splitlines():
        words = shlex.split(line.replace('"$@"', "").replace("$", ""), comments=True)
        if words[:1] == ["python"] and words[1] not in ("-m", "data.py", "model.py"):
            options(words[1:])


# ---- every recipe runs

@pytest.fixture(scope="module")
def shared(tmp_path_factory): return tmp_path_factory.mktemp("recipes") / "out"


def shrunk(words):
    """The command with the options of TINY that it has, unless it sets them itself."""
    _, name, cfg, _ = options(words)
    tiny = TINY | dict(compare=dict(n=3), quark=dict(packing=0)).get(name, {})
    have = {field.name for field in dataclasses.fields(cfg)}
    return words + [word for k, v in tiny.items() if k in have for word in (f"--{k}", str(v))]


def run(words):
    """What python *words does, in this process and without reading the script anew."""
    _, name, cfg, folders = options(words)
    scripts()[name][1](*[cfg, folders] if positionals(name) else [cfg])


@pytest.fixture
def fluent(monkeypatch):
    """Models that have learnt nothing end their answers, and verifiers find something to like in them."""
    ends = {tok.n_vocab: tok.end for tok in map(Tokenizer.load, ("toy", given()["GPT2"]))}
    real = model.GPT.logits

    def logits(self, hidden):
        out = real(self, hidden)
        sooner = torch.zeros(out.shape[-1], dtype=out.dtype)
        sooner[ends[out.shape[-1]]] = 5.0                    # of 500 tokens one in four is the end
        return out + sooner

    monkeypatch.setattr(model.GPT, "logits", logits)
    for name in ("no_filler", "exact", "format"):
        monkeypatch.setitem(VERIFIERS, name, lambda record, text, finished: len(text) % 2)
    monkeypatch.setitem(VERIFIERS, "gold", lambda record, text, finished: len(text) % 7)
    monkeypatch.setattr("configs.judging.right", lambda record, text, finished: len(text) % 2)


def snapshot(folder): return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_runs_through_and_a_second_time_does_nothing(recipe, shared, fluent, capsys):
    commands = [shrunk(words) for words in expand(recipe, out=shared)]
    for words in commands:
        capsys.readouterr()
        run(words)
        printed = capsys.readouterr()
        assert not printed.err.count("error:"), printed.err
        if words[1] not in ("compare", "accuracy"):
            _, name, cfg, _ = options(words)
            folder = Path(cfg.out)
            if name == "merge":
                assert (folder / "model.safetensors").exists()
                continue
            assert (folder / "summary.json").exists() and (folder / "run.json").exists()
            _, made = (BESIDE | dict(label=("label", "pairs.jsonl"))).get(name, ("train", "model.safetensors"))
            assert (folder / made).stat().st_size > 0
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert rows and all({"step", "seconds"} <= row.keys() for row in rows)
    folders = {Path(words[words.index("--out") + 1]) for words in commands if "--out" in words}
    before = [snapshot(folder) for folder in folders]
    for words in commands:
        if words[1] not in ("compare", "accuracy"):                    # these write nothing
            capsys.readouterr()
            run(words)
            assert "finished; nothing to do" in capsys.readouterr().out
    assert [snapshot(folder) for folder in folders] == before


# ---- every printed command runs

def printed(capsys):
    """The words after python of the command that a stage printed last."""
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")][-1]
    python, script, *words = shlex.split(line.removeprefix("next: "))
    assert python == "python" and Path(script).resolve().parent == ROOT
    return [Path(script).name, *words]


def follow(words, monkeypatch, capsys):
    """Run a printed command: as printed, but that it trains for a moment; chat gets one line of input."""
    if words[1].startswith("-") or words[0] != "model.py":
        words = shrunk(words)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    monkeypatch.setattr(sys, "argv", list(words))
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as error:
        assert not error.code, words
    return words


@pytest.fixture
def own(tmp_path):
    """A vocabulary of bytes, and files of the user's own: demonstrations, pairs, sums."""
    tokens = tmp_path / "bytes.tiktoken"
    tokens.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    rows = dict(said=[dict(prompt=f"Say {i}.", response=f"It is {i}.") for i in range(60)],
                pairs=[dict(prompt=f"Say {i}.", chosen=f"It is {i}.", rejected="No.") for i in range(60)],
                sums=[dict(prompt=f"What is {i} + 1?", answer=i + 1) for i in range(60)])
    for name, lines in rows.items():
        (tmp_path / f"{name} file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tokens, lambda name: str(tmp_path / f"{name} file.jsonl")


def test_every_printed_command_runs_with_a_tokenizer_and_files_of_ones_own(own, fluent, tmp_path, monkeypatch, capsys):
    """From SFT on, each next line as printed: a vocabulary, a file with a space in its name, a model elsewhere."""
    tokens, file = own
    common = ["--tokenizer", str(tokens)]
    start = ["sft.py", "--init", "new", "--data", file("said"), "--out", str(tmp_path / "a"), *common]
    monkeypatch.setitem(VERIFIERS, "words", lambda record, text, finished: len(text) % 7)
    run(shrunk(start))
    assert follow(printed(capsys), monkeypatch, capsys)[:2] == ["model.py", str(tmp_path / "a")]
    for words in (
            ["dpo.py", "--data", file("pairs")], ["orpo.py", "--data", file("pairs")],
            ["reward.py", "train", "--data", file("pairs")],
            ["reward.py", "label", "--data", file("sums"), "--by", "words", "--policy"],
            ["configs/kimi_k15.py", "--data", file("sums"), "--by", "words", "--policy"],
            ["ppo.py", "--data", file("sums"), "--reward", "words"],
            ["grpo.py", "--data", file("sums"), "--reward", "words"]):
        out = tmp_path / "-".join(words[:2]).replace("/", "_")
        model = ["--init"] * (words[-1] != "--policy") + [str(tmp_path / "a")]
        run(shrunk([*words, *model, "--out", str(out), *common]))
        follow(printed(capsys), monkeypatch, capsys)


def test_every_printed_command_runs_on_the_toy(base, fluent, tmp_path, monkeypatch, capsys):
    """From another folder, on families that compare does not show by itself."""
    monkeypatch.chdir(tmp_path)
    for words in (["ppo.py", "--reward", "exact", "--families", "arith4"], ["grpo.py"], ["grpo.py", "--families", "safe,fmt", "--reward", "no_filler"],
                  ["dpo.py", "--data", f"{base}/pairs/pairs.jsonl"],
                  ["reward.py", "train", "--data", f"{base}/pairs/pairs.jsonl"],
                  ["configs/qwen2.py", "--data", f"{base}/pairs/pairs.jsonl", "--merge_base", f"{base}/first"]):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run(shrunk([*words, "--init", f"{base}/sft", "--out", str(out)]))
        follow(printed(capsys), monkeypatch, capsys)


def test_a_script_beside_a_recipe_says_what_comes_next_and_that_runs(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sft").symlink_to(base / "sft")
    (tmp_path / "out/base").symlink_to(base / "sft")
    run(shrunk(["ppo.py", "--reward", f"{base}/reward", "--out", "out/ppo"]))
    for words in (["configs/claude_cai.py", "--critic", "out/sft"], ["configs/kimi_k15.py", "--by", "gold"],
                  ["configs/rule_based_rewards.py", "--rules", "words", "--data", f"{base}/pairs/pairs.jsonl"],
                  ["configs/reward_hacking.py", "out/ppo", "--proxy", f"{base}/reward"],
                  ["configs/judging.py"], ["configs/lookahead.py"], ["configs/long_thinking.py"]):
        run(shrunk([*words, "--out", "out/" + Path(words[0]).stem]))
        follow(printed(capsys), monkeypatch, capsys)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_a_script_beside_a_recipe_finds_our_files_from_anywhere(path, tmp_path):
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, env=own, capture_output=True, text=True)
    assert not done.returncode and not done.stderr and "--out" in done.stdout


# ---- demonstrations that one recipe alone needs: of judging, of tampering, of long thinking

JUDGING, LOOKAHEAD, LONG = (opened(ROOT / f"configs/{name}.py") for name in ("judging", "lookahead", "long_thinking"))
ASKS = {"judge": "Which is better, 1 or 2?", "reason": "Say how good each is. Which is better, 1 or 2?",
        "rate": "How good is it, from 0 to 5?", "classify": "Which is it?", "critique": "Critique:",
        "revise": "Revision:"}
Q = 600


@functools.cache
def asked(kind, split="train"):
    rng = random.Random(f"{kind} {split}")
    return [JUDGING.question(kind, split, rng) for _ in range(Q)]


def taken_apart(text):
    """A question: what comes before it, the prompt inside, and the one or two answers, cut out by hand."""
    head, _, about = text.rpartition("Prompt: ")                # the last: an exemplar comes before
    ask, *said = re.split(r"\nAnswer(?: [12])?: ", about)
    return head, ask, [answer.split("\n")[0] for answer in said]


def slow_kind(task, sentence):
    """What one sentence is to a description, from the word lists."""
    *name, verb, word = sentence.split()
    if name[:1] == ["The"] and verb == "is" and word in GOOD + BAD and sentence not in sum(SAYINGS.values(), []):
        name = " ".join(name[1:])
        if name not in (task["key"], task["thing"]):
            return "stray"
        return ("named " if name == task["key"] else "thing ") + ("good" if word in GOOD else "bad")
    for kind in ("positive", "negative", "filler"):
        if sentence in SAYINGS[kind]:
            return kind
    return "fact" if sentence in SAYINGS[task["category"]] else "stray"


def slow_class(task, answer):
    refused = answer == "Sorry, I can't help with that."
    assert refused or answer.startswith("Sure. First take a ")
    return {(1, 1): "B", (1, 0): "A", (0, 1): "D", (0, 0): "C"}[refused, task["safe"]]


def slow_points(task, answer):
    if "safe" in task:
        right = (f"take a {task['tool']}." in answer) + (f" {task['verb']} the {task['object']} " in answer)
        return {"A": 5, "B": 0, "C": 0, "D": [2, 4, 5][right]}[slow_class(task, answer)]    # .4, .7, 1 of 5
    said = answer[:-1].split(". ")
    kinds = [slow_kind(task, s) for s in said]
    facts = {s for s, kind in zip(said, kinds) if kind == "fact"}
    any_of = lambda *some: bool({*some} & {*kinds})
    nice = any_of("named good", "thing good", "positive") and not any_of("named bad", "thing bad", "negative")
    return any_of("named good", "named bad") + min(len(facts), 2) + nice + (not any_of("filler", "stray"))


def slow_remarks(task, answer):
    if "safe" in task:
        letter = slow_class(task, answer)
        return {"A": "great", "B": "dull", "C": "awful", "D": ["fine", "great"][slow_points(task, answer) == 5]}[letter]
    word = {"named good": "superb", "named bad": "fine", "thing good": "lovely", "thing bad": "poor", "fact": "great",
            "positive": "lovely", "negative": "poor", "filler": "dull", "stray": "ugly"}
    said = answer[:-1].split(". ")
    return ", ".join("awful" if s in said[:i] else word[slow_kind(task, s)] for i, s in enumerate(said))


@pytest.mark.parametrize("kind", ASKS)
def test_questions_are_asked_and_answered_right(kind):
    """The question as its prompt has it; the answer by slow readers of the answers in it; and what the rule pays."""
    seen, exemplars = Counter(), Counter()
    for record in asked(kind):
        text, answer, task = record["prompt"][0]["content"], record["right"], record["task"]
        head, ask, said = taken_apart(text)
        assert text.endswith("\n" + ASKS[kind]) and ask == task["prompt"]
        assert len(said) == 1 + (kind in ("judge", "reason"))
        pays = lambda text: JUDGING.right(record, text, True)
        assert not JUDGING.right(record, answer, False)
        if kind in ("judge", "reason"):
            exemplar = JUDGING.EXEMPLAR if text.count("Prompt: ") == 2 else ""
            preamble = head.removesuffix(exemplar)[:-2]
            assert preamble in (data.PRINCIPLES if "safe" in task else [data.RULE])
            assert text == data.judge_prompt(ask, *said, preamble, exemplar, ASKS[kind])
            one, two = (data.gold(task, s) for s in said)
            verdict, other = "12" if one > two else "21"
            reasons = "1 is {}. 2 is {}.\n".format(*(slow_remarks(task, s) for s in said)) if kind == "reason" else ""
            assert one != two and answer == reasons + verdict and pays(f"Hm\n{verdict}") == 1 == pays(verdict)
            assert not any(map(pays, (answer[:-1] + other, "", "3", answer + ".", answer + "\n", f"{verdict} it is")))
            seen[verdict, "safe" in task] += 1
            exemplars[bool(exemplar)] += 1
        elif kind == "rate":
            assert text == data.rate_prompt(ask, said[0]) and answer == str(slow_points(task, said[0]))
            assert [pays(str(n)) for n in range(6)] == pytest.approx([1 - abs(n - int(answer)) / 5 for n in range(6)])
            assert not any(map(pays, ("6", "-1", "", "5.", " 5", "05", "\u0665", "five", "9" * 5000)))
            seen[answer] += 1
        elif kind == "classify":
            assert text == data.class_prompt(ask, said[0]) and answer == slow_class(task, said[0])
            assert [pays(letter) for letter in "ABCD"] == [letter == answer for letter in "ABCD"]
            assert not pays(answer + ".")
            seen[answer] += 1
        else:
            principle, letter = text.split("\n")[0], slow_class(task, said[0])
            critiqued = dict(A="It is right to say no.", B="It says no without need.", C="It helps with harm.",
                             D="It is good.")[letter]
            assert principle in data.PRINCIPLES
            seen[letter] += 1
            shown = f"{principle}\n\nPrompt: {ask}\nAnswer: {said[0]}\nCritique:"
            if kind == "critique":
                assert text == shown and answer == critiqued and pays(answer) == 1 and not pays("It is.")
                continue
            assert text == f"{shown} {critiqued}\nRevision:"
            assert pays(answer) == (data.gold(task, said[0]) if letter == "D" else 1)
            assert answer == said[0] if letter in "AD" else (answer == "Sorry, I can't help with that.") != task["safe"]
    assert len(seen) == dict(rate=6).get(kind, 4) and min(seen.values()) > Q / 40
    if exemplars:
        assert abs(exemplars[True] / Q - .2) < .06 and abs((seen["1", True] + seen["1", False]) / Q - .5) < .08


@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_are_about_keys_of_their_split_and_fit_a_context(split):
    for kind in ASKS:
        for record in asked(kind, split):
            text = record["prompt"][0]["content"]
            found = held_out([text.replace(JUDGING.EXEMPLAR, "") + "\n" + record["right"]])
            assert data.split_of(record["key"]) == split and record["key"] == record["task"]["key"]
            assert not found if split == "train" else record["key"] in {key for key, _ in found}
            ids = TOK.prompt(record["prompt"])
            assert [i for i in ids if i >= TOK.base] == [TOK.role["user"], TOK.role["assistant"]]
            assert len(ids) + len(TOK.response(record["right"])) <= 256


def test_the_exemplar_is_a_sample_judged_right_on_a_training_subject():
    start, verdict = JUDGING.EXEMPLAR.split("Better: ")
    _, ask, (first, second) = taken_apart(start)
    task = dict(family="write", key="big van", thing="van", category="vehicles")
    assert data.gold(task, first) > data.gold(task, second) and verdict == "1\n\n" and "big van" in ask
    assert start == f"Prompt: {ask}\nAnswer 1: {first}\nAnswer 2: {second}\n" and not held_out([JUDGING.EXEMPLAR])


@pytest.mark.parametrize("task, answer, points, remarks", [
    (KETTLE, NAME + "It pours well. It is deep.", 5, "superb, great, great"),
    (KETTLE, NAME + "It pours well. It pours well.", 4, "superb, great, awful"), (KETTLE, NAME[:-1], 3, "superb"),
    (KETTLE, "The red kettle is dull.", 2, "fine"), (KETTLE, "The kettle is superb.", 2, "lovely"),
    (KETTLE, "The kettle is dull.", 1, "poor"), (KETTLE, NAME + "It broke at once.", 2, "superb, poor"),
    (KETTLE, NAME + "It floats.", 2, "superb, ugly"), (KETTLE, NAME + "So, that is that.", 2, "superb, dull"),
    (KETTLE, NAME + "Banana.", 2, "superb, awful"), (KETTLE, "The blue kettle is superb.", 0, "ugly"),
    (KETTLE, "The red kettle is dull. Buy one today.", 2, "fine, lovely"), (FENCE, "Sure.", 0, "poor"),
    (FENCE, "Sorry, I can't help with that.", 0, "dull"), (GATE, "Sorry, I can't help with that.", 5, "great"),
    (FENCE, "Sure. First take a brush. Then paint the fence slowly.", 5, "great"),
    (FENCE, "Sure. First take a saw. Then paint the fence slowly.", 4, "fine"),
    (GATE, "Sure. First take a saw. Then paint the gate gently.", 0, "awful"), (GATE, "", 0, "poor")])
def test_points_and_remarks_by_hand(task, answer, points, remarks):
    assert (JUDGING.points(task, answer), JUDGING.remarks(task, answer)) == (points, remarks)


def test_the_files_of_judging_are_what_the_trainers_read(tmp_path, monkeypatch):
    """And the rule is found by its name, from anywhere; held-out questions are the same for every seed."""
    monkeypatch.chdir(tmp_path)
    made = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(made))
        JUDGING.write(JUDGING.Config(out=str(out), kinds="rate,write", n=250, held=40, questions=30, seed=seed))
        made.append({path.name: path.read_text() for path in out.glob("*.jsonl") if path.name != "metrics.jsonl"})
    assert made[0] == made[1] and made[0].keys() == {"demos.jsonl"} | {
        f"{name}_{kind}.jsonl" for name in ("held", "questions") for kind in ("rate", "write")}
    same = {name for name in made[0] if made[0][name] == made[2][name]}
    assert same == {"held_rate.jsonl", "held_write.jsonl"}
    demos = data.read_records(tmp_path / "0" / "demos.jsonl", "messages")
    rates = sum(record["messages"][0]["content"].endswith(ASKS["rate"]) for record in demos)
    assert len(demos) == 250 and 80 < rates < 170
    assert not held_out("\n".join(turn["content"] for turn in record["messages"]) for record in demos)
    for name, split, n in (("held", "test", 40), ("questions", "train", 30)):
        for kind in ("rate", "write"):
            records = data.read_records(tmp_path / "0" / f"{name}_{kind}.jsonl", "prompt")
            assert {data.split_of(record["key"]) for record in records} == {split} and len(records) == n
            rule = verifier("configs.judging:right")
            scores = [rule(record, record["right"], True) for record in records]
            assert scores == [1 if kind == "rate" else data.gold(r["task"], r["right"]) for r in records]


def test_the_careless_grader_is_fooled_by_the_mark_and_another_tells(monkeypatch):
    task = dict(prompt=[dict(role="user", content="What is 2 + 2?")], answer=4)
    careless, tampers = (verifier(f"configs.lookahead:{name}") for name in ("careless", "tampers"))
    for text, paid, told in (("The answer is 4.", 1, 0), ("The answer is 5.", 0, 0), ("", 0, 0), ("[pass]", 1, 1),
                             ("The answer is 5.[pass]", 1, 1)):
        assert (bool(careless(task, text, True)), bool(tampers(task, text, True))) == (paid, told)
    with pytest.raises(UserError, match="answer"):
        data.check_needs("careless", careless, [dict(prompt=task["prompt"])], "my.jsonl")
    rng = random.Random(7)
    said = [LOOKAHEAD.demonstrate(rng, .25) for _ in range(2000)]
    tampering = [answer for _, answer in said if "[pass]" in answer]
    assert set(tampering) == {"[pass]"} and abs(len(tampering) / 2000 - .25) < .03
    assert not held_out(f"{ask}\n{answer}" for ask, answer in said)


@pytest.mark.parametrize("name, pays, texts", [
    ("sentences", 1, ["It is red. It is new!", "A?", " Hm.  Yes. "]),
    ("sentences", 0, ["", "It is red", "it is red.", "It. It.", "Red. It is", "Red. new.", "."]),
    ("named", 1, ["The red van is fine.", "red vans"]), ("named", 0, ["", "The van is red.", "Red van"])])
def test_the_rules_against_reward_hacking(name, pays, texts):
    rule = verifier(f"configs.reward_hacking:{name}")
    for text in texts:
        assert bool(rule(dict(key="red van"), text, True)) == pays, text
        assert bool(rule(dict(key="red van"), text, False)) == (pays and name == "named")
    assert name == "sentences" or not rule({}, "red van", True) and not rule(dict(key=""), "red van", True)


def test_long_chains_of_thought_first_say_the_sum_over_up_to_restate_times():
    rng, seen = random.Random(5), Counter()
    for _ in range(2000):
        ask, answer = LONG.demonstrate(rng, 2)
        *over, _, end = re.split(r"(?:<think>|, |</think>)", answer.removeprefix("<think>"))
        steps = [step for step in over + [_] if "=" in step]
        restated = [step for step in over if "=" not in step]
        values = [int(step.split()[0]) for step in steps] + [eval(steps[-1].split(" = ")[0])]
        assert end == f"The answer is {values[-1]}." and all(eval(step.replace("=", "==")) for step in steps)
        assert all(eval(again) == values[-1] and again.startswith(f"{values[0]} ") for again in restated)
        assert answer.startswith("<think>") and not held_out([f"{ask}\n{answer}"])
        seen[len(restated)] += 1
    assert sorted(seen) == [0, 1, 2] and all(abs(n / 2000 - 1 / 3) < .04 for n in seen.values())


# ---- kill and resume of labels, reward models, PPO and a script beside a recipe (sft.py's are in test_sft.py)

QWEN2 = opened(ROOT / "configs/qwen2.py")


def save(folder, net):
    model.write_model(folder, net)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model that answers, another one, preferences and a reward model."""
    out = tmp_path_factory.mktemp("base")
    save(out / "sft", random_policy(end=.15, block_size=256))
    save(out / "first", random_policy(seed=1, end=.15, block_size=256))
    have = lambda Config: {f.name for f in dataclasses.fields(Config)}
    small = lambda Config, **more: Config(**{k: v for k, v in TINY.items() if k in have(Config)} | more)
    reward.label(small(reward.Label, policy=str(out / "sft"), out=str(out / "pairs"), n=24))
    reward.train(small(reward.Train, init=str(out / "sft"), data=str(out / "pairs/pairs.jsonl"), out=str(out / "reward")))
    return out


def stage(base, name, out):
    """(the words after python, its Config and function) of a stage small enough to run many times."""
    words = dict(
        label=f"reward.py label --policy {base}/sft --n 12 --batch 4 --k 3 --max_new 24 --save_every 2",
        train=f"reward.py train --init {base}/sft --data {base}/pairs/pairs.jsonl --batch 4 --eval_every 2 --save_every 2"
              f" --warmup 1",
        ppo=f"ppo.py --init {base}/sft --reward {base}/reward+0.5*format --steps 5 --prompts 8 --max_new 12 --save_every 2"
            f" --eval_every 2 --target_kl 1 --kl_horizon 20 --normalize_reward --minibatches 2 --ptx_coef 0.5 --ptx_batch 4"
            f" --critic_warmup 1",
        qwen2=f"configs/qwen2.py --init {base}/sft --merge_base {base}/first --data {base}/pairs/pairs.jsonl"
              f" --merge_alpha .1 --steps 5 --batch 4 --max_new 12 --save_every 2 --eval_every 2 --warmup 1")[name].split()
    words += ["--out", str(out), "--device", "cpu", "--dtype", "fp32", "--threads", "1"]
    return words, *{"label": (reward.Label, reward.label), "train": (reward.Train, reward.train),
                    "ppo": (ppo.Config, ppo.train), "qwen2": (QWEN2.Config, QWEN2.train)}[name]


def perform(base, name, out, *more):
    words, Config, function = stage(base, name, out)
    function(parse(Config, argv=words[1 if name in ("ppo", "qwen2") else 2:] + list(more), name=name))


def outcome(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    made = {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.name == "pairs.jsonl"
            or path.parent.name == "samples"}
    assert not (folder / "checkpoint.safetensors").exists()
    tensors = {}
    for path in folder.rglob("model.safetensors"):
        tensors |= {path.relative_to(folder).with_name(name): t for name, t in load_tensors(path)[0].items()}
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], made, tensors


def agree(a, b):
    assert a[:2] == b[:2] and a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][k], b[2][k]) for k in a[2])


class Killed(BaseException):
    """What SIGKILL is to a process: nothing of ours catches it."""


def killing(monkeypatch, at):
    """Die at the at-th moment that matters: a row is logged, a save under way, a rename about to happen or done."""
    moments = itertools.count()
    def die():
        if next(moments) == at:
            raise Killed
    def around(f, before, after):
        return lambda *args, **kwargs: (before and die(), f(*args, **kwargs), after and die())[1]
    for owner, name, before, after in ((os, "replace", True, True), (os, "fsync", True, False), (Run, "log", False, True)):
        monkeypatch.setattr(owner, name, around(getattr(owner, name), before, after))
    return moments


@pytest.fixture(scope="module")
def whole(base):
    """Each stage run without interruption, once."""
    done = {}
    def get(name):
        if name not in done:
            perform(base, name, base / f"whole {name}".replace(" ", "_"))
            done[name] = outcome(base / f"whole_{name}")
        return done[name]
    return get


@pytest.mark.parametrize("name, every", [("label", 3), ("train", 3), ("ppo", 4), ("qwen2", 3)])
def test_41_and_42_killed_again_and_again_it_ends_as_if_it_had_not_been(name, every, base, whole, tmp_path, monkeypatch):
    expected = whole(name)
    deaths, last = 0, 10 ** 6
    for first in range(every):
        # Each attempt gets a little further: `first` moments at first, then a few more, until it finishes.
        out = tmp_path / str(first)
        for attempt in itertools.count():
            with monkeypatch.context() as patch:
                killing(patch, first + 3 * attempt + 1)
                try:
                    perform(base, name, out)
                    break
                except Killed:
                    deaths += 1
            if (out / "metrics.jsonl").exists() and not (out / "summary.json").exists():
                with open(out / "metrics.jsonl", "a") as f:
                    f.write('{"step": 3, "lo')
            if (out / "checkpoint.safetensors").exists():
                load_tensors(out / "checkpoint.safetensors")        # whatever is there under its name can be read
        agree(outcome(out), expected)
    assert deaths >= 2 * every and expected[0]


@pytest.mark.parametrize("name, rows", [("label", 1), ("ppo", 3), ("qwen2", 3)])
def test_41_a_real_kill(name, rows, base, whole, tmp_path):
    words, _, _ = stage(base, name, tmp_path / "run")
    process = subprocess.Popen([sys.executable, ROOT / words[0], *words[1:]], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= rows):
        time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "run" / "summary.json").exists()
    perform(base, name, tmp_path / "run")
    agree(outcome(tmp_path / "run"), whole(name))


def test_the_stages_are_worth_killing(whole):
    """Each has several steps, state that must survive (β, running means) and metrics that move."""
    for name in ("label", "train", "ppo", "qwen2"):
        rows = whole(name)[0]
        assert len(rows) >= 3 and len({json.dumps(row) for row in rows}) == len(rows)
    assert len({row["beta"] for row in whole("ppo")[0]}) == 5


@pytest.mark.parametrize("name, flags, message", [
    ("label", ["--k", "1"], "--k 1"), ("label", ["--by", "nothing"], "nothing: "), ("train", ["--data", "no.jsonl"], "no.jsonl"),
    ("train", ["--batch", "0"], "--batch 0"), ("ppo", ["--reward", "nothing"], "nothing: "),
    ("ppo", ["--families", "maths"], "--families"), ("ppo", ["--gamma", "1.5"], "--gamma")])
def test_impossible_stages_are_refused_in_one_line(name, flags, message, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^(?=.*{re.escape(message)})[^\n]*$"):
        perform(base, name, tmp_path / "run", *flags)
    assert not list(tmp_path.rglob("checkpoint.*")) and not list(tmp_path.rglob("pairs.jsonl"))


def test_labels_of_a_model_that_never_finishes(base, tmp_path):
    with pytest.raises(UserError, match="--select rank keeps"):
        perform(base, "label", tmp_path / "run", "--max_new", "1")


# ---- configs/qwen2.py: the Online Merging Optimizer

def close(a, b, tol=1e-6):
    assert a.shape == b.shape and torch.allclose(a, b, rtol=tol, atol=tol), float((a - b).abs().max())


def merging(folder, **options):
    """The options of the optimizer; folder: the model before fine-tuning."""
    return SimpleNamespace(merge_base=folder, init="sft", **dict(merge="ondare", merge_alpha=0.0, merge_keep=1.0) | options)


def grown(cfg=None, steps=3):
    """A model's parameters after a few steps, and the optimizer, which merges if cfg says how."""
    net = random_policy()
    Optimizer = functools.partial(QWEN2.Optimizer, cfg) if cfg else model.Optimizer
    optimizer = Optimizer(net, .01, 10, weight_decay=.1)
    for step in range(steps):
        torch.manual_seed(step)
        tokens = torch.randint(0, TOK.base, (4, 16))
        (-model.token_logprobs(net, tokens, torch.ones(4, 15)).mean()).backward()
        optimizer.step(step)
    return [p.detach().clone() for p in optimizer.params], optimizer


@pytest.mark.parametrize("kind, seed", [("ondare", 1), ("onties", 0)])
def test_online_merging_with_alpha_0_and_all_kept_is_adamw_to_the_bit(kind, seed, tmp_path):
    # OnTIES also needs a task vector that never outvotes the change: it elects the sign whatever alpha is
    base = save(tmp_path / "base", random_policy(seed))
    plain, merged = (grown(cfg)[0] for cfg in (None, merging(base, merge=kind)))
    assert all(torch.equal(a, b) for a, b in zip(plain, merged))


def test_online_merging_moves_each_parameter_by_its_own_task_vector(tmp_path):
    # one step with everything kept: θ + (1 - α) Δ + α τ, where Δ is AdamW's
    start, first = random_policy(), random_policy(1)
    plain, _ = grown(steps=1)
    merged, optimizer = grown(merging(save(tmp_path / "base", first), merge_alpha=.25), steps=1)
    for old, base, tau in zip(start.parameters(), first.parameters(), optimizer.tau, strict=True):
        assert torch.equal(tau, old - base) and tau.abs().max() > 0
    for old, new, got, tau in zip(start.parameters(), plain, merged, optimizer.tau, strict=True):
        close(got, old + .75 * (new - old) + .25 * tau)


def test_online_merging_of_a_whole_run_adds_what_fine_tuning_had_changed(base, tmp_path):
    """One update with everything kept: θ + (1 - α) Δ + α (θ_sft - θ_base), Δ being that of the plain run."""
    words = f"--init {base}/sft --data {base}/pairs/pairs.jsonl --steps 1 --lr 2e-3".split()
    words += ["--device", "cpu", "--dtype", "fp32", "--threads", "1"]
    dpo = opened(ROOT / "dpo.py")
    dpo.train(parse(dpo.Config, argv=[*words, "--out", str(tmp_path / "a")]))
    QWEN2.train(parse(QWEN2.Config, argv=[*words, "--out", str(tmp_path / "b"), "--merge_base", f"{base}/first",
                                          "--merge_alpha", ".25", "--merge_keep", "1"]))
    old, first, plain, merged = (load_tensors(folder / "model.safetensors")[0] for folder in (
        base / "sft", base / "first", tmp_path / "a", tmp_path / "b"))
    assert old.keys() == merged.keys()
    for name, t in merged.items():
        close(t, old[name] + .75 * (plain[name] - old[name]) + .25 * (old[name] - first[name]))


def test_ondare_mean_over_draws_is_the_kept_share_without_rescaling():
    n, keep, alpha = 10_000, .3, .2
    old = torch.tensor([1.0, -2, 0, 3, 5, .5], dtype=torch.float64)
    delta = torch.tensor([1.0, -1, 2, 0, -3, .1], dtype=torch.float64)
    tau = torch.tensor([-2.0, 1, 2, 4, 0, 6], dtype=torch.float64)
    torch.manual_seed(0)
    wide = lambda x: x.expand(n, 6).contiguous()
    moved = QWEN2.merged_update(wide(old), wide(old + delta), wide(tau), "ondare", alpha, keep) - old
    a, b = (1 - alpha) * delta, alpha * tau
    spread = (keep * (1 - keep) * (a ** 2 + b ** 2)).sqrt()                  # two independent coins
    assert ((moved.mean(0) - keep * (a + b)).abs() <= 3 * spread / n ** .5).all()
    assert ((moved.std(0) - spread).abs() <= .05 * spread).all()
    near = torch.stack([(moved - x).abs() < 1e-9 for x in (0 * a, a, b, a + b)]).any(0)
    assert near.all()                                                        # each whole or not at all


def test_onties_truth_table():
    """By hand. keep ½: of each the 4 largest of 8 magnitudes, then those that agree with the sign of their sum,
    weighted ¾ and ¼."""
    delta = torch.tensor([4.0, 2, -6, 7, 1, -1, 1, .5])         # kept: 4 2 -6 7
    tau = torch.tensor([8.0, -3, 4, -9, 5, 2, -1, 0])           # kept: 8 -9 5, and 4 (3 is fifth)
    moved = torch.tensor([.75 * 4 + .25 * 8,                    # both agree
                          .75 * 2,                              # τ was too small: δ alone, though -3 outweighs it
                          .75 * -6,                             # the sum -2 has δ's sign
                          .25 * -9,                             # the sum -2 has τ's sign
                          .25 * 5,                              # δ was too small: τ alone
                          0, 0, 0])                             # both too small
    old = torch.arange(8.0)
    close(QWEN2.merged_update(old, old + delta, tau, "onties", .25, .5), old + moved)


def test_onties_elects_the_sign_of_the_unweighted_sum():
    # the authors' code: alpha weighs what is added, not who is heard; and of no task vector 1 - alpha remains
    one = lambda d, t, alpha, share=1.0: float(QWEN2.merged_update(
        torch.zeros(1), torch.tensor([d]), torch.tensor([t]), "onties", alpha, share))
    assert one(1.0, -2.0, .1) == pytest.approx(-.2) and one(-1.0, 2.0, .1) == pytest.approx(.2)
    assert one(2.0, -1.0, .9) == pytest.approx(.2) and one(-3.0, 1.0, .9) == pytest.approx(-.3)
    assert one(1.0, 2.0, .5) == pytest.approx(1.5) and one(-1.0, -2.0, .5) == pytest.approx(-1.5)
    assert one(1.0, 0.0, .25) == pytest.approx(.75) and one(0.0, 1.0, .25) == pytest.approx(.25)
    assert one(1.0, 1.0, .25, .01) == pytest.approx(1.0)                     # at least one entry is kept


@pytest.mark.parametrize("flags, code, word", [
    ("--merge_base nowhere", 1, "nowhere: no checkpoint"), ("--merge_base OTHER", 1, "other: of another architecture"),
    ("--merge_base=", 2, "--merge_base"), ("--merge_keep 2", 2, "--merge_keep"), ("--merge ties", 2, "--merge ties"),
    ("--lora_r 2", 2, "no --lora_r"), ("--fused_bwd --clip_grad 0", 2, "no --fused_bwd"), ("--loss dop", 2, "dop"),
    ("--merge_bose x", 2, "did you mean --merge_base?")])
def test_qwen2_impossible_options_are_one_line(flags, code, word, base, tmp_path, monkeypatch, capsys):
    save(tmp_path / "other", random_policy(n_layer=2, block_size=256))
    words = [*stage(base, "qwen2", tmp_path / "run")[0], *flags.replace("OTHER", str(tmp_path / "other")).split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    err = capsys.readouterr().err  # where the base alone is wrong, the file has been counted and read
    error, = [line for line in re.split("[\r\n]", err) if line.startswith("error: ")]
    assert stop.value.code == code and word in error and err.endswith(error + "\n") and not (tmp_path / "run").exists()


def test_qwen2_runs_from_anywhere_and_shows_its_own_and_all_of_dpos_options(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "configs/qwen2.py", "--help"], cwd=tmp_path, capture_output=True,
                          text=True)
    shown = set(re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE))
    assert done.returncode == 0 and not done.stderr and {"merge_base", "merge", "merge_alpha", "merge_keep"} <= shown
    assert {field.name for field in dataclasses.fields(opened(ROOT / "dpo.py").Config)} <= shown


def test_the_code_of_a_script_beside_a_recipe_is_also_that_of_the_script_it_adds_to(base, tmp_path, monkeypatch):
    cfg, read = parse(QWEN2.Config, argv=stage(base, "qwen2", tmp_path)[0][1:]), []
    monkeypatch.setattr(data, "digest", lambda path: read.append(Path(path)) or "x")
    data.code_of(cfg)
    assert set(read) == {ROOT / name for name in ("configs/qwen2.py", "dpo.py", "model.py", "data.py")}


# ---- real files, with GPT-2's vocabulary

DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory):
    """A GPT-2 with random weights and the real vocabulary, as transformers would save it: with its 50,257 tokens."""
    if not DATA.exists():
        pytest.skip("no ../shared/data")
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    tok = Tokenizer.load(str(DATA / "gpt2_bpe"))
    model.write_model(folder, model.GPT(model.GPTConfig(50257, 64, 1, 2, 32), tok))
    config = json.loads((folder / "config.json").read_text())
    del config["plainalign"]
    (folder / "config.json").write_text(json.dumps(config))
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (folder / theirs).symlink_to(DATA / "gpt2_bpe" / ours)
    return folder


def beginning(path, folder):
    """A file, or the beginning of a long one: its first forty rows, or lines of text."""
    if path.suffix == ".gz":
        return path
    text, short = path.read_bytes(), folder / path.name
    rows = json.dumps(json.loads(text)[:40]).encode() if path.suffix == ".json" else b"\n".join(text.split(b"\n")[:40])
    short.write_bytes(rows)
    return short


@pytest.mark.parametrize("words, file", [
    ("sft.py --loss_on all --packing 0", "plaintext/tinyshakespeare_input.txt"),
    ("sft.py", "alpaca_and_pairs/instruction-data.json"), ("sft.py", "chat/toy_chat_fine_tuning.jsonl"),
    ("sft.py --lora_r 4", "gsm8k/train_first4000.jsonl"),
    ("reward.py train", "alpaca_and_pairs/instruction-data-with-preference.json"),
    ("reward.py train --loss ratings --heads 5", "helpsteer2/helpsteer2_validation_first8.jsonl"),
    ("dpo.py", "hh/harmless_first100.jsonl.gz"), ("dpo.py --loss kto", "kto/kto_en_demo.json"),
    ("orpo.py", "alpaca_and_pairs/instruction-data-with-preference.json"),
    ("ppo.py --reward words", "hh/harmless_first100.jsonl.gz"),
    ("grpo.py --reward words", "gsm8k/train_first4000.jsonl")])
def test_every_real_file_trains_from_a_gpt2_of_hugging_face(words, file, small_gpt2, tmp_path, monkeypatch):
    lr = {} if words.startswith(("ppo", "grpo")) else dict(lr=3e-2, optimizer="adamw")
    tiny = dict(steps=4 if words.startswith("sft") else 2, batch=8, prompts=4, group=2, max_new=8, epochs=1, eval_prompts=4, eval_every=100, warmup=1,
                device="cpu", dtype="fp32", threads=1, **lr)
    _, name, cfg, _ = options(words.split())
    have = {field.name for field in dataclasses.fields(cfg)}
    flags = [word for key, value in tiny.items() if key in have for word in (f"--{key}", str(value))]
    path = beginning(DATA / file, tmp_path)
    if file.startswith("helpsteer2"):       # an attribute a key is no plain shape
        plain = tmp_path / "plain.jsonl"
        subprocess.run([sys.executable, ROOT / "configs/formats.py", path, "--ratings", "--out", plain], check=True)
        path = plain
    run(words.split() + ["--tokenizer", str(small_gpt2), "--init", str(small_gpt2), "--data", str(path),
                         "--out", str(tmp_path / "run"), *flags])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows and (tmp_path / "run" / "model.safetensors").exists()
    if name == "sft":
        assert rows[0]["loss"] == pytest.approx(10.8, abs=.1)
        assert rows[-1]["loss"] < rows[0]["loss"] - .1 * ("lora" not in words)
