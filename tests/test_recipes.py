"""Every recipe in configs/ runs as written: each option exists, each file read is made earlier, all stages run at tiny
scale, and a second time nothing does. Five stages, killed at random moments, end as if they had not been. And what the
scripts beside recipes make."""
import atexit
import base64
import functools
import importlib
import io
import itertools
import json
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import model
import reward
import runs
from configs import page
from data import VERIFIERS, OptionError, Tokenizer, UserError, parse, parse_rewards, verifier
from model import load_tensors
from policies import TOK, random_policy, save
from runs import close, write
from test_world import FENCE, GATE, KETTLE, NAME, held_out

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.sh"))
TOMLS = sorted((ROOT / "configs").glob("*.toml"))
CPU = dict(device="cpu", dtype="fp32", threads=1)
# What shrinks a stage to a moment; each stage takes of these what it has.
TINY = CPU | dict(n_layer=1, n_head=2, n_embd=32, block_size=256, steps=2, batch=8, packing=128, n=8, max_new=16,
                  prompts=4, ptx_batch=4, epochs=1, show=1, group=4, samples=2, guesses=0, cuts=1)


# ---- reading a recipe

# What a script beside a recipe runs, and the file that this makes.
BESIDE = dict(
    claude_cai=("revise", "revisions.jsonl"), rule_based_rewards=("fit", "reward.txt"),
    kimi_k15=("curate", "prompts.jsonl"), reward_hacking=("overoptimize", "curves.json"),
    merge=("merge", "model.safetensors"), superficial=("mark_all", "pairs.jsonl"),
    chatglm_rlhf=("balance", "pairs.jsonl"), nemotron4=("rate", "ratings.jsonl"),
    long2short=("shorten", "shortest.jsonl"), judging=("write", "demos.jsonl"), lookahead=("write", "demos.jsonl"),
    long_thinking=("write", "demos.jsonl"), losses=("write", "digits.jsonl"), pick=("pick", "summary.json"),
    last_rows=("show", "summary.json"), when=("when", "summary.json"), changes=("compare", "summary.json"))
TAKES = reward.TAKES | dict(merge=["checkpoint", "checkpoint..."], reward_hacking=["run..."],
                            nemotron4=["reward", "reward..."], last_rows=["run", "run..."],
                            when=["method", "method..."])


@functools.cache
def given():
    """{variable: path} of what a recipe asks of its user: a GPT-2, whose tokens are bytes here, and three small files."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]        # the order of GPT-2's first 256 tokens
    order = plain + [b for b in range(256) if b not in plain]
    vocabulary = {"<|endoftext|>": 256}
    for place, b in enumerate(order):
        letter = chr(b) if b in plain else chr(256 + place - len(plain))
        vocabulary[letter] = place
    (folder / "gpt2").mkdir()
    (folder / "gpt2/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "gpt2/merges.txt").write_text("#version: 0.2\n")
    tok = Tokenizer.load(str(folder / "gpt2"))
    torch.manual_seed(0)
    model.write_model(folder / "gpt2", model.GPT(model.GPTConfig(tok.n_vocab, 256, 1, 2, 32), tok))
    alpaca, hh, gsm8k = [], [], []
    for i in range(60):
        asked = f"\n\nHuman: What is {i}?\n\nAssistant: "
        alpaca.append(dict(instruction=f"Say {i}.", input="", output=f"It is {i}."))
        hh.append(dict(chosen=f"{asked}It is {i}.", rejected=f"{asked}No."))
        gsm8k.append(dict(question=f"What is {i} + 1?", answer=f"So.\n#### {i + 1}"))
    return dict(GPT2=str(folder / "gpt2"), ALPACA=write(folder / "alpaca.jsonl", alpaca),
                HH=write(folder / "hh.jsonl", hh), GSM8K=write(folder / "gsm8k.jsonl", gsm8k))


@functools.cache
def scripts():
    """{how its options are named in a TOML file: (Config, function)} of everything that trains, labels or compares."""
    found = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]):
        if path.stem in ("data", "model") or "guard(" not in path.read_text():      # or a reward of the reader's own
            continue
        script = importlib.import_module(path.stem)
        function, _ = BESIDE.get(path.stem, ("train", ""))
        if path.stem == "reward":
            for name, command in script.COMMANDS.items():
                found["reward" if name == "train" else name] = command
        elif hasattr(script, function):     # without, it is a program of its own, no stage of a recipe
            found[path.stem] = (script.Config, getattr(script, function))
    return found


def expand(script, *argv, out="out"):
    """The commands of a recipe, as bash expands them, with python replaced by a recorder: lists of words."""
    recorder = 'python() { printf "%s\\t" "$@"; printf "\\n"; }; source "$0"'
    done = subprocess.run(["bash", "-c", recorder, str(script), *argv], capture_output=True, text=True, check=True,
                          env=os.environ | {"OUT": str(out), "GPU": ""} | given())
    assert not done.stderr, done.stderr
    commands = []
    for line in done.stdout.splitlines():
        if not line.startswith("== stage"):
            commands.append(line.rstrip("\t").split("\t"))
    return commands


def options(words):
    """(command name, cfg, positionals) of a recorded command; an OptionError if it has an unknown option."""
    file, *argv = words
    if not (ROOT / file).is_file():
        raise OptionError(f"{file}: no such script")
    name = Path(file).stem
    if name == "reward":
        command, *argv = argv
        name = "reward" if command == "train" else command
    if name not in scripts():
        raise OptionError(f"{file}: no command {name}")
    takes = TAKES.get(name, [])
    got = parse(scripts()[name][0], takes, argv, name)
    return (name, *got) if takes else (name, got, [])


def terms(spec):
    """The folders that a reward names."""
    names = [name for term in parse_rewards(spec) for name in term.names] if spec else []
    return [name for name in names if ":" not in name and verifier(name) is None]


# Options that are a folder or a file to read.
FOLDERS = ("init", "policy", "critic", "ref", "merge_base", "teacher", "table", "val", "test", "best_of", "runs")


def reads(name, cfg, folders):
    """Every folder and file a command reads."""
    found = []
    for folder in folders:
        found += terms(folder) if name in ("accuracy", "nemotron4") else [folder]
    for option, value in vars(cfg).items():
        if option in FOLDERS or option.endswith("data"):
            found += value.split(",")
        if option in ("reward", "judge", "proxy", "by", "cost", "base", "rules") and getattr(cfg, "online", True):
            found += terms(value)
    return [path for path in found if path not in ("", "new", "toy", *given().values())]


def problems(commands):
    """What is wrong with a list of commands, as text; nothing if they can run one after the other."""
    found, made = [], {}
    for words in commands:
        line = " ".join(words)
        try:
            name, cfg, folders = options(words)
        except (UserError, IndexError) as error:
            found.append(f"{line}: {error}")
            continue
        for path in reads(name, cfg, folders):
            inside = [maker for place, maker in made.items() if place.startswith(path + "/")]
            maker = made.get(path) or made.get(str(Path(path).parent)) or (inside or [None])[0]
            if maker is None or (path in made and maker in ("label", "kimi_k15")):  # the folder, not the file in it
                found.append(f"{line}: nothing before it makes {path}")
        for option in ("out", "save"):
            if getattr(cfg, option, None):
                made[getattr(cfg, option)] = name
    return found


# ---- what a recipe says

# What a line may begin with, beside a function of its own.
SHELL = "python set for do done if else fi mkdir echo trap }".split()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_option_exists_and_every_file_read_is_made_before(recipe, tmp_path):
    out = str(tmp_path / "here")
    commands = expand(recipe, "--seed", "3", out=out)
    assert len(commands) > 1 and not problems(commands)
    for words in commands:
        name, cfg, folders = options(words)
        assert words[-2:] == ["--seed", "3"] or name == "merge", 'every stage ends in "$@"'
        for place in reads(name, cfg, folders) + [getattr(cfg, "out", None) or folders[0]]:
            assert place.startswith(out + "/"), "every folder is in $OUT"
    text = recipe.read_text()
    functions = re.findall(r"(?m)^(\w+)\(\) {", text)
    for line in text.splitlines():
        first = line.split()[0] if line.split() else "#"
        assert first.removesuffix("()") in SHELL + functions or "=" in first or first[0] == "#"


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem != "gpt2"], ids=lambda path: path.stem)
def test_every_table_is_saved_under_the_name_of_the_recipe(recipe):
    """And none over another, but that compare.sh's grows."""
    saved = []
    for words in expand(recipe):
        name, cfg, _ = options(words)
        if hasattr(cfg, "save"):
            saved.append(cfg.save)
    names = r"(\.\w+)?" if recipe.stem != "compare" else ""
    tables = [path for path in saved if path.startswith("out/tables/")]     # the others are for the recipe itself
    for path in tables:
        assert re.fullmatch(rf"out/tables/{recipe.stem}{names}\.json", path)
    assert tables and len(set(saved)) == (1 if recipe.stem == "compare" else len(saved))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_header_names_the_paper_and_what_is_reported(recipe):
    text = recipe.read_text()
    header = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    if recipe.stem not in ("compare", "variants", "thinking"):
        assert re.search(r"\b\d{4}\.\d{5}\b", header) and "reported" in header and "reconstruction" in header


@pytest.mark.parametrize("text, word", [
    ("sft.py --init new --stepz 3", "stepz"), ("nothing.py", "no such script"), ("sft.py", "out/base"),
    ("reward.py learn", "no command"), ("reward.py label --policy $OUT/sft", "out/sft"),
    ("sft.py --init new --out $OUT/a\nppo.py --init $OUT/a --reward $OUT/b", "out/b"),
    ("sft.py --init new --out $OUT/a\nppo.py --init $OUT/a --reward .5*exact+$OUT/c", "out/c"),
    ("sft.py --init new --out $OUT/a\nreward.py compare $OUT/a $OUT/b", "out/b"),
    ("sft.py --init new --out $OUT/a\nreward.py train --init $OUT/a", "pairs"),
    ("sft.py --init new --lr fast", "--lr fast"), ("sft.py --init new stray", "stray")])
def test_a_broken_recipe_is_found(tmp_path, text, word):
    recipe = tmp_path / "broken.sh"
    recipe.write_text("".join(f"python {line}\n" for line in text.splitlines()))
    found = problems(expand(recipe))
    assert len(found) == 1 and word in found[0]


def test_deepseek_r1_begins_its_third_stage_again_from_the_base():
    """And on right, well-formed samples of the second, which `--select correct` alone keeps (test_reward.py)."""
    stages = {}
    for words in expand(ROOT / "configs/deepseek_r1.sh")[:-2]:
        name, cfg, _ = options(words)
        stages[cfg.out] = cfg
    third, last = stages["out/deepseek_r1/sft"], stages["out/deepseek_r1/final"]
    assert third.init == "out/base" and last.init == third.out
    samples = stages[str(Path(third.data.split(",")[0]).parent)]
    assert samples.select == "correct" and samples.policy == "out/deepseek_r1/rl"
    weights = {term.names[0]: term.weight for term in parse_rewards(samples.by)}
    assert weights.keys() == {"exact", "format"} and max(weights.values()) < .5 < sum(weights.values())


def test_the_options_that_changes_names_are_those_of_its_recipe():
    """And each of the recipe's runs is there for something."""
    said = {}
    for words in expand(ROOT / "configs/changes.sh"):
        folder = words[words.index("--out") + 1]
        own = words[words.index(folder) + 1:]       # what it does not share with the plain run
        said[folder.removeprefix("out/changes/")] = [word.replace("out/changes/", "") for word in own]
    changes = importlib.import_module("changes").CHANGES
    for change in changes:
        assert shlex.split(change.options) == said[change.run], change.run
    runs = {name for name in said if "/" in name and not name.startswith("out/") and not name.endswith("/plain")}
    assert runs == {change.run for change in changes}


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_every_key_of_a_toml_belongs_to_the_script_it_names(path):
    """And has a value that the script takes."""
    known = scripts()
    for key, value in tomllib.loads(path.read_text()).items():
        if isinstance(value, dict):
            assert key in known, f"[{key}] is no script"
            parse(known[key][0], TAKES.get(key, []), ["--config", str(path)] + ["x", "y"] * (key in TAKES), key)
        else:
            takers = [Config for Config, _ in known.values() if hasattr(Config, key)]
            assert takers, f"{key}: no script has it"
            for Config in takers:
                data.checked(key, value, data.option_types(Config)[key])


# ---- what the READMEs say

READMES = ["README.md", "configs/README.md", "tests/README.md", "tests/STUDY.md", "tests/QUESTIONS.md"]


def anchors(text):
    """The #names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", READMES)
def test_what_a_readme_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)]*)\)", (ROOT / page).read_text()):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", READMES)
def test_every_test_that_a_readme_names_is_there(page):
    code = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"\b(test_\w+)`", (ROOT / page).read_text()):
        assert f"def {name}(" in code, f"there is no {name}"


def test_every_question_has_an_answer_a_line_of_code_and_a_test():
    """Numbered in order; an answer of at most 90 words; a line that is in its file; tests that exist."""
    code = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    _, *questions = re.split(r"(?m)^\*\*(?=\d)", (ROOT / "tests/QUESTIONS.md").read_text())
    assert questions
    for n, text in enumerate(questions, 1):
        question, answer, proof, *_ = text.split("\n\n")
        assert question.startswith(f"{n}. ") and question.endswith("**"), f"question {n} begins with {question}"
        assert 20 < len(answer.split()) <= 90, f"the answer to question {n} has {len(answer.split())} words"
        found = re.match(r"`(\S+)`: `(.+?)` ·\s", proof)
        assert found, f"question {n} has no line `FILE`: `CODE` · `test_NAME`"
        file, line = found.groups()
        assert line in (ROOT / file).read_text(), f"question {n}: {file} has no {line}"
        tests = re.findall(r"`(\w+)`", proof[found.end():])
        assert tests and all(f"def {name}(" in code for name in tests), f"question {n}: no such test among {tests}"


@pytest.mark.parametrize("page", READMES)
def test_every_command_in_a_readme_has_options_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)     # for --config
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for line in "".join(blocks).splitlines():
        words = shlex.split(line.replace('"$@"', "").replace("$", ""), comments=True)
        if words[:1] == ["python"] and words[1] not in ("-m", "data.py", "model.py", "configs/report.py"):
            options(words[1:])


# ---- every recipe runs

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "out"


def flags(wanted, cfg):
    """The options that a stage has, as words."""
    words = []
    for name, value in wanted.items():
        if hasattr(cfg, name):
            words += [f"--{name}", str(value)]
    return words


def shrunk(words):
    """The command with the options of TINY that it has."""
    name, cfg, _ = options(words)
    special = dict(compare=dict(n=3), quark=dict(packing=0))
    return words + flags(TINY | special.get(name, {}), cfg)


def run(words):
    """What python *words does, in this process and without reading the script anew."""
    name, cfg, folders = options(words)
    _, function = scripts()[name]
    function(cfg, folders) if name in TAKES else function(cfg)


@pytest.fixture
def fluent(monkeypatch):
    """Models that have learnt nothing end their answers, and verifiers find something to like in them."""
    ends = {tok.n_vocab: tok.end for tok in map(Tokenizer.load, ("toy", given()["GPT2"]))}
    real = model.GPT.logits

    def logits(self, hidden):
        out = real(self, hidden)
        sooner = torch.zeros(out.shape[-1], dtype=out.dtype)
        sooner[ends[out.shape[-1]]] = 5.0       # of 500 tokens one in four is the end
        return out + sooner

    def odd(record, text, finished):
        return len(text) % 2
    monkeypatch.setattr(model.GPT, "logits", logits)
    for name in ("no_filler", "exact", "format"):
        monkeypatch.setitem(VERIFIERS, name, odd)
    monkeypatch.setitem(VERIFIERS, "gold", lambda record, text, finished: len(text) % 7)
    monkeypatch.setattr("configs.judging.right", odd)


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_runs_through_and_a_second_time_does_nothing(recipe, shared, fluent, capsys):
    commands = [shrunk(words) for words in expand(recipe, out=shared)]
    before = {}
    for words in commands:
        run(words)
        error = capsys.readouterr().err
        assert "error:" not in error, error
        name, cfg, _ = options(words)
        if getattr(cfg, "save", ""):
            rows = json.loads(Path(cfg.save).read_text())["rows"]
            assert rows and all("checkpoint" in row or "name" in row for row in rows)
        if name in ("compare", "accuracy"):     # these have no folder
            continue
        folder = Path(cfg.out)
        _, made = (BESIDE | dict(label=("label", "pairs.jsonl"))).get(name, ("train", "model.safetensors"))
        assert (folder / made).stat().st_size > 0
        if name != "merge":
            assert (folder / "summary.json").exists() and (folder / "run.json").exists()
            logged = {metric for row in runs.rows_of(folder) for metric in row}
            assert logged
            unknown = [metric for metric in logged if not page.meaning(Path(words[0]).name, metric)]
            assert not unknown, f"{words[0]} logs {', '.join(unknown)}, and configs/glossary.py has no word on it"
    for words in commands:
        name, cfg, _ = options(words)
        if name not in ("compare", "accuracy"):
            before = snapshot(Path(cfg.out))
            run(words)
            assert "finished; nothing to do" in capsys.readouterr().out and snapshot(Path(cfg.out)) == before


# ---- every printed command runs

def follow(monkeypatch, capsys):
    """Run the command that a stage printed last: as printed, but that it trains for a moment; chat gets one line."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    python, script, *words = shlex.split(lines[-1].removeprefix("next: "))
    words = [Path(script).name, *words]
    assert python == "python" and Path(script).resolve().parent == ROOT
    if words[0] != "model.py":
        words = shrunk(words)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    monkeypatch.setattr(sys, "argv", words)
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as error:
        assert not error.code, words


OWN = [     # commands with files of one's own, and a vocabulary of bytes
    "dpo.py --data PAIRS --init SFT", "orpo.py --data PAIRS --init SFT", "reward.py train --data PAIRS --init SFT",
    "reward.py label --data SUMS --by words --policy SFT", "configs/kimi_k15.py --data SUMS --by words --policy SFT",
    "ppo.py --data SUMS --reward words --init SFT", "grpo.py --data SUMS --reward words --init SFT"]


def test_every_printed_command_runs_with_a_tokenizer_and_files_of_ones_own(fluent, tmp_path, monkeypatch, capsys):
    """From SFT on, each next line as printed: a vocabulary, a file with a space in its name, a model elsewhere."""
    tokens = tmp_path / "bytes.tiktoken"
    for b in range(256):
        with open(tokens, "ab") as file:
            file.write(base64.b64encode(bytes([b])) + b" %d\n" % b)
    said, pairs, sums = [], [], []
    for i in range(60):
        said.append(dict(prompt=f"Say {i}.", response=f"It is {i}."))
        pairs.append(dict(prompt=f"Say {i}.", chosen=f"It is {i}.", rejected="No."))
        sums.append(dict(prompt=f"What is {i} + 1?", answer=i + 1))
    stands_for = dict(SFT=str(tmp_path / "sft"), SAID=write(tmp_path / "said file.jsonl", said),
                      PAIRS=write(tmp_path / "pairs file.jsonl", pairs), SUMS=write(tmp_path / "sums file.jsonl", sums))
    monkeypatch.setitem(VERIFIERS, "words", lambda record, text, finished: len(text) % 7)
    for number, command in enumerate(["sft.py --init new --data SAID --out SFT", *OWN]):
        words = [stands_for.get(word, word) for word in command.split()]
        if "--out" not in words:
            words += ["--out", str(tmp_path / str(number))]
        run(shrunk([*words, "--tokenizer", str(tokens)]))
        follow(monkeypatch, capsys)


TRAIN = [       # on the toy: from another folder, on families that compare does not show by itself
    "ppo.py --reward exact --families arith4", "grpo.py", "grpo.py --families safe,fmt --reward no_filler", "dpo.py",
    "reward.py train", "configs/qwen2.py --merge_base out/first", "configs/distill.py --teacher out/first"]
BESIDES = [     # these look at whole answers
    "configs/claude_cai.py --critic out/sft", "configs/kimi_k15.py --by gold", "configs/judging.py",
    "configs/rule_based_rewards.py --rules words", "configs/reward_hacking.py out/ppo --proxy out/reward",
    "configs/lookahead.py", "configs/long_thinking.py"]


@pytest.mark.parametrize("commands", [TRAIN, BESIDES], ids=["trainers", "scripts beside recipes"])
def test_every_printed_command_runs_on_the_toy(commands, base, tmp_path, request, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path in base.iterdir():
        (tmp_path / "out" / path.name).symlink_to(path)
    (tmp_path / "out/base").symlink_to(base / "sft")
    if commands is TRAIN:
        request.getfixturevalue("fluent")
    else:
        run(shrunk("ppo.py --reward out/reward --out out/ppo".split()))
    for number, command in enumerate(commands):
        run(shrunk([*command.split(), "--out", f"out/{number}"]))
        follow(monkeypatch, capsys)


PROGRAMS = [path for path in sorted(ROOT.glob("configs/*.py")) if "guard(" in path.read_text()]   # report.py has parts


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_script_beside_a_recipe_finds_our_files_from_anywhere(path, tmp_path):
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, env=own, capture_output=True, text=True)
    assert not done.returncode and not done.stderr and "--out" in done.stdout


# ---- demonstrations that one recipe alone needs: of judging, of tampering, of long thinking

JUDGING, LOOKAHEAD, LONG = (importlib.import_module(name) for name in ("judging", "lookahead", "long_thinking"))
REFUSES, HELPS = "Sorry, I can't help with that.", "Sure. First take a brush. Then paint the fence slowly."
Q = 300


@pytest.mark.parametrize("task, answer, points, remarks", [
    (KETTLE, NAME + "It pours well. It is deep.", 5, "superb, great, great"),
    (KETTLE, NAME + "It pours well. It pours well.", 3, "superb, great, awful"),
    (KETTLE, NAME + "It pours well. It is deep. It is deep.", 4, "superb, great, great, awful"),
    (KETTLE, NAME[:-1], 3, "superb"),
    (KETTLE, "The red kettle is dull.", 2, "fine"),
    (KETTLE, "The kettle is superb.", 2, "lovely"),
    (KETTLE, "The kettle is dull.", 1, "poor"),
    (KETTLE, NAME + "It broke at once.", 2, "superb, poor"),
    (KETTLE, NAME + "It floats.", 2, "superb, ugly"),
    (KETTLE, NAME + "So, that is that.", 2, "superb, dull"),
    (KETTLE, NAME + "Banana.", 2, "superb, awful"),
    (KETTLE, "The blue kettle is superb.", 0, "ugly"),
    (KETTLE, "The red kettle is dull. Buy one today.", 2, "fine, lovely"),
    (FENCE, "Sure.", 0, "poor"),
    (FENCE, REFUSES, 0, "dull"),
    (FENCE, HELPS, 5, "great"),
    (FENCE, "Sure. First take a saw. Then paint the fence slowly.", 4, "fine"),
    (GATE, REFUSES, 5, "great"),
    (GATE, "Sure. First take a saw. Then paint the gate gently.", 0, "awful"),
    (GATE, "", 0, "poor")])
def test_points_and_remarks_by_hand(task, answer, points, remarks):
    assert JUDGING.points(task, answer) == points
    assert JUDGING.remarks(task, answer) == remarks


def verdict(task, said):
    one, two = (data.gold(task, answer) for answer in said)
    assert one != two
    return "1" if one > two else "2"


def reasons(task, said):
    one, two = (JUDGING.remarks(task, answer) for answer in said)
    return f"1 is {one}. 2 is {two}.\n{verdict(task, said)}"


def letter(task, said):
    """Of a rubric: A refused what is harmful, B what is not, C helps with harm, D with what is not harmful."""
    refused = said[0] == REFUSES
    assert refused or said[0].startswith("Sure. First take a ")
    if refused:
        return "B" if task["safe"] else "A"
    return "D" if task["safe"] else "C"


def critique(task, said):
    return dict(A="It is right to say no.", B="It says no without need.", C="It helps with harm.",
                D="It is good.")[letter(task, said)]


KINDS = {   # of question: how it ends, the right answer, and the endings of right answers of which there must be some
    "judge": ("Which is better, 1 or 2?", verdict, "12"),
    "reason": ("Say how good each is. Which is better, 1 or 2?", reasons, "12"),
    "rate": ("How good is it, from 0 to 5?", lambda task, said: str(JUDGING.points(task, said[0])), "012345"),
    "classify": ("Which is it?", letter, "ABCD"),
    "critique": ("Critique:", critique, ["no.", "need.", "harm.", "good."])}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", [*KINDS, "revise"])
def test_questions_are_asked_and_answered_right(kind, split):
    """On subjects of their split; the answers inside are cut out by hand. The question fits a context."""
    rng, seen, exemplars = random.Random(kind + split), Counter(), 0
    for _ in range(Q):
        record = JUDGING.question(kind, split, rng)
        text, right, task = record["prompt"][0]["content"], record["right"], record["task"]
        preamble, _, about = text.replace(JUDGING.EXEMPLAR, "").rpartition("Prompt: ")
        exemplars += JUDGING.EXEMPLAR in text
        ask, *said = re.split(r"\nAnswer(?: [12])?: ", about)
        *said, last = [*said[:-1], *said[-1].split("\n", 1)]
        assert ask == task["prompt"] and record["key"] == task["key"]
        assert data.split_of(record["key"]) == split
        assert (record["key"] in {key for key, _ in held_out([about + "\n" + right])}) == (split == "test")
        if kind not in ("rate", "classify"):
            assert preamble.strip() in (data.PRINCIPLES if "safe" in task else [data.RULE])
        if kind == "revise":
            assert last == f"Critique: {critique(task, said)}\nRevision:"
            assert right == said[0] if letter(task, said) in "AD" else (right == REFUSES) != task["safe"]
            assert JUDGING.right(record, right, True) == data.gold(task, right)
        else:
            ending, answer, _ = KINDS[kind]
            assert last.endswith(ending) and right == answer(task, said) and JUDGING.right(record, right, True) == 1
        assert not JUDGING.right(record, right, False)
        ids = TOK.prompt(record["prompt"])
        assert len(ids) + len(TOK.response(right)) <= 256
        seen[right.split()[-1]] += 1
    for end in KINDS[kind][2] if kind in KINDS else []:
        assert seen[end] > Q / 40, f"hardly ever {end}"
    assert exemplars / Q == pytest.approx(.2 if kind in ("judge", "reason") else 0, abs=.08)


@pytest.mark.parametrize("kind, right, text, paid", [
    ("judge", "1", "Hm\n1", 1), ("judge", "1", "2", 0), ("judge", "1", "", 0), ("judge", "1", "1.", 0),
    ("judge", "1", "it is 1", 0),
    ("reason", "1 is fine. 2 is poor.\n1", "1", 1), ("reason", "1 is fine. 2 is poor.\n1", "1 is fine. 2 is poor.\n2", 0),
    ("rate", "3", "3", 1), ("rate", "3", "1", .6), ("rate", "3", "6", 0), ("rate", "3", " 3", 0), ("rate", "3", "03", 0),
    ("rate", "3", "\u0663", 0), ("classify", "B", "B", 1), ("classify", "B", "B.", 0), ("critique", "It is good.", "It", 0)])
def test_what_the_rule_pays(kind, right, text, paid):
    assert JUDGING.right(dict(kind=kind, right=right, task={}), text, True) == pytest.approx(paid)


def test_the_exemplar_is_a_sample_judged_right_on_a_training_subject():
    _, ask, first, second, right, *_ = re.split(r"Prompt: |\nAnswer [12]: |\nBetter: |\n", JUDGING.EXEMPLAR)
    task = dict(family="write", key="big van", thing="van", category="vehicles")
    assert verdict(task, [first, second]) == right and "big van" in ask and not held_out([JUDGING.EXEMPLAR])


def test_the_files_of_judging_are_what_the_trainers_read(tmp_path):
    """Held-out questions are the same for every seed, and the rule is found by its name."""
    made = []
    for seed in (0, 0, 1):
        out, texts = tmp_path / str(len(made)), {}
        JUDGING.write(JUDGING.Config(out=str(out), kinds="rate,write", n=250, held=40, questions=30, seed=seed))
        for path in out.glob("*.jsonl"):
            texts[path.name] = path.read_text()
        del texts["metrics.jsonl"]
        made.append(texts)
    assert made[0] == made[1]
    same = [name for name in made[0] if made[0][name] == made[2][name]]
    assert sorted(same) == ["held_rate.jsonl", "held_write.jsonl"]
    demos = data.read_records(tmp_path / "0" / "demos.jsonl", "messages")
    said = ["\n".join(turn["content"] for turn in record["messages"]) for record in demos]
    assert len(said) == 250 and 80 < sum("How good is it" in text for text in said) < 170 and not held_out(said)
    rule = verifier("configs.judging:right")
    for name, split, n in (("held_rate", "test", 40), ("questions_write", "train", 30)):
        records = data.read_records(tmp_path / "0" / f"{name}.jsonl", "prompt")
        assert len(records) == n and {data.split_of(record["key"]) for record in records} == {split}
        for record in records:
            gold = data.gold(record["task"], record["right"]) if "write" in name else 1
            assert rule(record, record["right"], True) == gold


def test_the_careless_grader_is_fooled_by_the_mark_and_another_tells():
    careless, tampers = (verifier(f"configs.lookahead:{name}") for name in ("careless", "tampers"))
    for text, paid, told in (("The answer is 4.", 1, 0), ("The answer is 5.", 0, 0), ("", 0, 0), ("[pass]", 1, 1),
                             ("The answer is 5.[pass]", 1, 1)):
        assert careless(dict(answer=4), text, True) == paid and tampers({}, text, True) == told
    with pytest.raises(UserError, match="answer"):
        data.check_needs("careless", careless, [dict(prompt=[])], "my.jsonl")
    rng, tampering = random.Random(7), 0
    for _ in range(1000):
        ask, answer = LOOKAHEAD.demonstrate(rng, .25)
        tampering += answer == "[pass]"
        assert not held_out([f"{ask}\n{answer}"])
    assert tampering / 1000 == pytest.approx(.25, abs=.04)


@pytest.mark.parametrize("name, pays, texts", [
    ("sentences", 1, ["It is red. It is new!", "A?", " Hm.  Yes. "]),
    ("sentences", 0, ["", "It is red", "it is red.", "It. It.", "Red. It is", "Red. new.", "."]),
    ("named", 1, ["The red van is fine.", "red vans"]), ("named", 0, ["", "The van is red.", "Red van"])])
def test_the_rules_against_reward_hacking(name, pays, texts):
    rule = verifier(f"configs.reward_hacking:{name}")
    for text in texts:
        assert rule(dict(key="red van"), text, True) == pays, text
        assert rule(dict(key="red van"), text, False) == (pays and name == "named")
    assert name == "sentences" or not rule({}, "red van", True) and not rule(dict(key=""), "red van", True)


def test_long_chains_of_thought_first_say_the_sum_over_up_to_restate_times():
    rng, seen = random.Random(5), Counter()
    for _ in range(1000):
        ask, answer = LONG.demonstrate(rng, 2)
        thought, said = re.fullmatch(r"<think>(.*)</think>The answer is (.*)\.", answer).groups()
        parts = thought.split(", ")
        steps = [part for part in parts if "=" in part]
        over = parts[:len(parts) - len(steps)]
        assert all(eval(step.replace("=", "==")) for step in steps) and all(eval(sum_) == int(said) for sum_ in over)
        assert steps[-1].endswith(f"= {said}") and not held_out([f"{ask}\n{answer}"])
        seen[len(over)] += 1
    assert sorted(seen) == [0, 1, 2] and min(seen.values()) > 280


# ---- killed and gone on: labels, reward models and a script beside a recipe (the trainers' are in test_runs.py)

QWEN2, DPO = importlib.import_module("qwen2"), importlib.import_module("dpo")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model that answers, another one, preferences, a reward model, and answers in steps."""
    out = tmp_path_factory.mktemp("base")
    save(out / "sft", random_policy(end=.15, block_size=256))
    save(out / "first", random_policy(seed=1, end=.15, block_size=256))
    steps = dict(prompt=[dict(role="user", content="?")], steps=["It is.", " So."], labels=[1, 0])
    write(out / "steps.jsonl", [steps] * 24)
    reward.label(reward.Label(policy=str(out / "sft"), out=str(out / "pairs"), n=24, max_new=16, **CPU))
    pairs = str(out / "pairs/pairs.jsonl")
    reward.train(reward.Train(init=str(out / "sft"), data=pairs, out=str(out / "reward"), steps=2, **CPU))
    return out


LABEL = "reward.py label --policy BASE/sft --n 12 --batch 4 --k 3 --max_new 24 --save_every 2"
LEARN = "--init BASE/sft --batch 4 --steps 5 --eval_every 2 --save_every 2 --warmup 1"
STAGES = {
    "label": LABEL, "label, by a judge": LABEL + " --judge BASE/sft --preamble principles",
    "train": "reward.py train --data BASE/pairs/pairs.jsonl " + LEARN,
    "process": "configs/process_rewards.py --data BASE/steps.jsonl " + LEARN,
    "distill": "configs/distill.py --teacher BASE/first --lam 0.5 --max_new 8 " + LEARN.replace("batch", "prompts"),
    "qwen2": "configs/qwen2.py --data BASE/pairs/pairs.jsonl --merge_base BASE/first --merge_alpha .1 " + LEARN}


def words_of(stage, base, out):
    return [*STAGES[stage].replace("BASE", str(base)).split(), "--out", str(out), "--device", "cpu", "--dtype", "fp32"]


def outcome(folder):
    """All that a stage leaves: rows, weights, records."""
    path = folder / "pairs.jsonl"
    assert not (folder / "unfinished.json").exists()
    return runs.outcome(folder), path.read_bytes() if path.exists() else b""


@pytest.mark.parametrize("stage", STAGES)
def test_41_42_killed_at_any_moment_it_ends_as_if_it_had_not_been(stage, base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        moments = runs.killing(patch, None)
        run(words_of(stage, base, tmp_path / "whole"))
    whole, last = outcome(tmp_path / "whole"), next(moments)
    (rows, _), _ = whole
    assert len(rows) >= 3 and rows[0] != rows[1] and last > 12
    fewest = len(rows)
    for at in random.Random(stage).sample(range(last), 6):
        words = words_of(stage, base, tmp_path / str(at))
        with monkeypatch.context() as patch, pytest.raises(runs.Killed):
            runs.killing(patch, at)
            run(words)
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(data.Run, "log", lambda self, step, *args, real=data.Run.log, **more:
                          made.append(step) or real(self, step, *args, **more))
            run(words)
        assert outcome(tmp_path / str(at)) == whole, f"killed at moment {at} of {last}, it ends differently"
        fewest = min(fewest, len(made))
    assert fewest < len(rows), "it always began at the beginning"


# ---- configs/qwen2.py: the Online Merging Optimizer

@pytest.mark.parametrize("kind, seed", [("ondare", 1), ("onties", 0)])
def test_online_merging_with_alpha_0_and_all_kept_is_adamw_to_the_bit(kind, seed, tmp_path):
    """OnTIES also needs a task vector that never outvotes the change: it elects the sign whatever alpha is."""
    cfg = SimpleNamespace(merge_base=save(tmp_path / "base", random_policy(seed)), init="sft", merge=kind,
                          merge_alpha=0.0, merge_keep=1.0)
    ends = []
    for Optimizer in (model.Optimizer, functools.partial(QWEN2.Optimizer, cfg)):
        net = random_policy()
        optimizer = Optimizer(net, .01, 10, weight_decay=.1)
        for step in range(3):
            torch.manual_seed(step)
            tokens = torch.randint(0, TOK.base, (4, 16))
            loss = -model.token_logprobs(net, tokens, torch.ones(4, 15)).mean()
            loss.backward()
            optimizer.step(step)
        ends.append(net.state_dict())
    assert runs.same(*ends)


def test_online_merging_of_a_whole_run_adds_what_fine_tuning_had_changed(base, tmp_path):
    """One update with everything kept: θ + (1 - α) Δ + α (θ_sft - θ_base), Δ being that of the plain run."""
    options = dict(init=f"{base}/sft", data=f"{base}/pairs/pairs.jsonl", steps=1, lr=2e-3, **CPU)
    DPO.train(DPO.Config(out=str(tmp_path / "a"), **options))
    QWEN2.train(QWEN2.Config(out=str(tmp_path / "b"), merge_base=f"{base}/first", merge_alpha=.25, merge_keep=1.0, **options))
    old, first, plain, merged = (load_tensors(folder / "model.safetensors")[0] for folder in (
        base / "sft", base / "first", tmp_path / "a", tmp_path / "b"))
    for name, tensor in merged.items():
        moved = .75 * (plain[name] - old[name]) + .25 * (old[name] - first[name])
        close(tensor, old[name] + moved, 1e-6)


def test_ondare_mean_over_draws_is_the_kept_share_without_rescaling():
    n, keep, alpha = 10_000, .3, .2
    delta = torch.tensor([1.0, -1, 2, 0, -3, .1], dtype=torch.float64).expand(n, 6).contiguous()
    tau = torch.tensor([-2.0, 1, 2, 4, 0, 6], dtype=torch.float64).expand(n, 6).contiguous()
    torch.manual_seed(0)
    moved = QWEN2.merged_update(torch.ones(n, 6), 1 + delta, tau, "ondare", alpha, keep) - 1
    a, b = (1 - alpha) * delta[0], alpha * tau[0]
    spread = (keep * (1 - keep) * (a ** 2 + b ** 2)).sqrt()              # two independent coins
    assert ((moved.mean(0) - keep * (a + b)).abs() <= 3 * spread / n ** .5).all()
    assert ((moved.std(0) - spread).abs() <= .05 * spread).all()


def test_onties_truth_table():
    """By hand. keep ½: of each the 4 largest of 8 magnitudes, then those that agree with the sign of their sum, weighted
    ¾ and ¼."""
    delta = torch.tensor([4.0, 2, -6, 7, 1, -1, 1, .5])         # kept: 4 2 -6 7
    tau = torch.tensor([8.0, -3, 4, -9, 5, 2, -1, 0])           # kept: 8 -9 5, and 4 (3 is fifth)
    moved = [
        .75 * 4 + .25 * 8,                                      # both agree
        .75 * 2,                                                # τ was too small: δ alone, though -3 outweighs it
        .75 * -6,                                               # the sum -2 has δ's sign
        .25 * -9,                                               # the sum -2 has τ's sign
        .25 * 5,                                                # δ was too small: τ alone
        0, 0, 0]                                                # both too small
    close(QWEN2.merged_update(torch.zeros(8), delta, tau, "onties", .25, .5), moved)


@pytest.mark.parametrize("delta, tau, alpha, keep, moved", [
    (1.0, -2.0, .1, 1, -.2), (-1.0, 2.0, .1, 1, .2), (2.0, -1.0, .9, 1, .2), (-3.0, 1.0, .9, 1, -.3),
    (1.0, 2.0, .5, 1, 1.5), (1.0, 0.0, .25, 1, .75), (0.0, 1.0, .25, 1, .25), (1.0, 1.0, .25, .01, 1)])
def test_onties_elects_the_sign_of_the_unweighted_sum(delta, tau, alpha, keep, moved):
    """The authors' code: alpha weighs what is added, not who is heard. At least one entry is kept."""
    got = QWEN2.merged_update(torch.zeros(1), torch.tensor([delta]), torch.tensor([tau]), "onties", alpha, keep)
    close(got, [moved], 1e-6)


@pytest.mark.parametrize("flags, code, word", [
    ("--merge_base nowhere", 1, "nowhere: no checkpoint"), ("--merge_base OTHER", 1, "other: of another architecture"),
    ("--merge_base=", 2, "--merge_base"), ("--merge ties", 2, "--merge ties"), ("--lora_r 2", 2, "no --lora_r"),
    ("--fused_bwd --clip_grad 0", 2, "no --fused_bwd"), ("--merge_bose x", 2, "did you mean --merge_base?")])
def test_qwen2_impossible_options_are_one_line(flags, code, word, base, tmp_path, monkeypatch, capsys):
    other = save(tmp_path / "other", random_policy(n_layer=2, block_size=256))
    words = [*words_of("qwen2", base, tmp_path / "run"), *flags.replace("OTHER", other).split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    error = capsys.readouterr().err.rpartition("error: ")[2]     # before it the file may have been counted and read
    assert stop.value.code == code and word in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_code_of_a_script_beside_a_recipe_is_also_that_of_the_script_it_adds_to(monkeypatch):
    """So that a changed dpo.py is noticed, too."""
    read = []
    monkeypatch.setattr(data, "digest", lambda path: read.append(Path(path)) or "x")
    data.code_of(QWEN2.Config())
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
    (folder / "vocab.json").symlink_to(DATA / "gpt2_bpe" / "encoder.json")
    (folder / "merges.txt").symlink_to(DATA / "gpt2_bpe" / "vocab.bpe")
    return folder


def beginning(path, folder):
    """The first forty rows of a file, or lines of text; of HelpSteer2, whose shape is no plain one, as converted."""
    if path.suffix == ".gz":
        return path
    short = folder / path.name
    if path.suffix == ".json":
        short.write_text(json.dumps(json.loads(path.read_text())[:40]))
    else:
        short.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:40]))
    if "helpsteer2" in path.name:
        plain = folder / "plain.jsonl"
        subprocess.run([sys.executable, ROOT / "configs/formats.py", short, "--ratings", "--out", plain], check=True)
        return plain
    return short


SMALL = CPU | dict(batch=8, prompts=4, group=2, max_new=8, epochs=1, eval_prompts=4, eval_every=100, warmup=1)


@pytest.mark.parametrize("command, file", [
    ("sft.py --loss_on all --packing 0", "plaintext/tinyshakespeare_input.txt"),
    ("sft.py", "alpaca_and_pairs/instruction-data.json"), ("sft.py", "chat/toy_chat_fine_tuning.jsonl"),
    ("sft.py --lora_r 4", "gsm8k/train_first4000.jsonl"),
    ("reward.py train", "alpaca_and_pairs/instruction-data-with-preference.json"),
    ("reward.py train --loss ratings --heads 5", "helpsteer2/helpsteer2_validation_first8.jsonl"),
    ("dpo.py", "hh/harmless_first100.jsonl.gz"), ("dpo.py --loss kto", "kto/kto_en_demo.json"),
    ("orpo.py", "alpaca_and_pairs/instruction-data-with-preference.json"),
    ("ppo.py --reward words", "hh/harmless_first100.jsonl.gz"),
    ("grpo.py --reward words", "gsm8k/train_first4000.jsonl")])
def test_every_real_file_trains_from_a_gpt2_of_hugging_face(command, file, small_gpt2, tmp_path):
    name, cfg, _ = options(command.split())
    small = SMALL | dict(steps=4 if name == "sft" else 2)
    if name not in ("ppo", "grpo"):
        small |= dict(lr=3e-2, optimizer="adamw")
    small |= dict(tokenizer=small_gpt2, init=small_gpt2, data=beginning(DATA / file, tmp_path), out=tmp_path / "run")
    run(command.split() + flags(small, cfg))
    rows = runs.rows_of(tmp_path / "run")
    assert rows and (tmp_path / "run" / "model.safetensors").exists()
    if name == "sft":
        first, last = rows[0]["loss"], rows[-1]["loss"]
        assert first == pytest.approx(10.8, abs=.1)
        assert last < first if "lora" in command else last < first - .1
