"""How fast are the sampler and the training steps here? A program, not a test; nothing asserts on time.

    python tests/bench.py                        every item, a line of JSON each
    python tests/bench.py generate --batch 64    one item, with sizes of your own
    python tests/bench.py peers                  ours beside those of other libraries, in turn, and a table
    python tests/bench.py gpu                    what one card should reach, in ten minutes at most, and a table
    python tests/bench.py memory                 what each algorithm needs at each size of GPT-2, computed

What trains is each script's own train(), on a file of random digits and models of random weights; what is timed are its
steps. The first only warms up, and the last, which would evaluate and save, is never reached; seconds are medians of
the others. Sampled responses run to their full length, but those of `ragged` end at random, at .4 of it on average.

peak_share: FLOPs of the matmuls a second, attention included, beside those of one large matmul of that precision.
bound_share: the bytes that sampling has to read, all weights and the cache for every token, beside those of a copy.

`peers` needs peers.py, a program that prints such lines for TRL and transformers on the same work, and a Python that
has these: --peers and --peers_python, or the variables PEERS and PEERS_PYTHON.
"""
import argparse
import base64
import contextlib
import gc
import itertools
import json
import math
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import GPT2_SPECIALS, Tokenizer  # noqa: E402
from model import GPTConfig, find_device, generate, machine, new_model, setup, write_model  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import orpo  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from costs import SIZES, forward_flops, memory_table, n_params  # noqa: E402

# Items, and their texts, pairs or prompts where --batch does not say.
ITEMS = dict(generate=256, ragged=256, sft=32, reward=32, dpo=32, dpo_ahead=32, orpo=32, grpo=16, ppo=128)
SAMPLING = ("generate", "ragged")


# ---------------------------------------------------------------- what an item works on

def write_vocabulary(path, size):
    """A vocabulary of so many tokens, special ones included: all bytes, and pairs of bytes. No pair begins with a
    digit, so every digit of a text is one token."""
    pairs = itertools.product(range(255, ord("9"), -1), range(256))
    pieces = [*zip(range(256)), *pairs]
    lines = []
    for rank, piece in enumerate(pieces[:size - len(GPT2_SPECIALS)]):
        lines.append(base64.b64encode(bytes(piece)) + b" %d\n" % rank)
    path.write_bytes(b"".join(lines))
    return str(path)


def write_data(args, path):
    """A file of texts for sft, of pairs for all others. Special tokens count in the lengths that the options give."""
    rng, lines = random.Random(0), []

    def digits(n):
        return "".join(rng.choices("0123456789", k=n))
    for _ in range(2 * args.batch * (args.repeats + 2)):  # more than the steps see, as some are held out
        record = dict(prompt=digits(args.prompt - 2), chosen=digits(args.new - 1), rejected=digits(args.new - 1))
        if args.item == "sft":
            record = dict(text=digits(args.length - 1))
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return str(path)


@torch.no_grad()
def draw_model(args, like, n_scores=0, end=1e-12):
    """Random weights; the policy's are such that any token is the last with chance `end`: one number of its states is
    always 1, and only the end token's row of the head reads it. (The logits of all others are about 0.)"""
    torch.manual_seed(0)
    model = new_model(GPTConfig(**SIZES[args.size], n_scores=n_scores), like)
    norm, head = model.transformer.ln_f, model.transformer.wte.weight
    if not n_scores:
        norm.weight[0], norm.bias[0] = 0.0, 1.0
        head[:, 0] = 0.0
        head[like.tok.end] = 0.0
        head[like.tok.end, 0] = math.log(end / (1 - end) * model.config.vocab_size)
    return model


def any_score(record, text, finished):
    """A reward by which hardly two responses are alike, so that every group has something to learn from."""
    return sum(map(ord, text)) % 1009


def script_of(args, like, folder):
    """The script of an item that trains, and its options."""
    data, policy, judge = (str(folder / name) for name in ("data.jsonl", "policy", "judge"))
    write_data(args, Path(data))
    write_model(policy, draw_model(args, like))
    if args.item == "ppo":
        write_model(judge, draw_model(args, like, n_scores=1))
    usual = dict(out=str(folder / "out"), init=policy, data=data, steps=args.repeats + 2, eval_every=10 ** 6,
                 save_every=10 ** 6)
    for name in ("tokenizer", "device", "dtype", "threads", "micro_tokens", "compile", "grad_checkpoint"):
        usual[name] = getattr(args, name)
    batch, rollout = dict(batch=args.batch), dict(prompts=args.batch, max_new=args.new, minibatches=args.minibatches)
    script, own = dict(
        sft=(sft, batch | dict(loss_on="all", packing=0, optimizer="adamw")),
        reward=(reward, batch | dict(optimizer="adamw")),
        dpo=(dpo, batch | dict(ref_every=10 ** 6)),  # the reference reads a batch when its step comes;
        dpo_ahead=(dpo, batch),                      # here it has read all of them before the first
        orpo=(orpo, batch),
        grpo=(grpo, rollout | dict(group=args.group, reward="bench:any_score")),
        ppo=(ppo, rollout | dict(epochs=args.epochs, reward=judge)))[args.item]
    Config = reward.Train if script is reward else script.Config
    return script, Config(**usual | own)


# ---------------------------------------------------------------- timing

class Enough(Exception):
    """All that was to be timed has been."""


class Clock:
    """Seconds of calls or steps, and those that the CPU worked. The first is a warm-up and does not count."""

    def __init__(self, device, repeats):
        self.device, self.repeats, self.seconds, self.cpu_seconds = device, repeats, [], []

    @contextlib.contextmanager
    def lap(self):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)

    def calls(self, function):
        """Time a function -> what the last call gave."""
        for _ in range(self.repeats + 1):
            with self.lap():
                result = function()
        return result

    def steps(self, steps):
        """model.steps, but that it is timed, and ends with Enough."""
        def timed(*args):
            for step in steps(*args):
                with self.lap():
                    yield step
                if len(self.seconds) > self.repeats:
                    raise Enough
        return timed

    def median(self):
        return statistics.median(self.seconds[1:])


def sample(args, like, clock):
    """Time the sampler -> how many tokens it draws."""
    # With chance p that a token is the last, n at most, the mean length is (1 - (1-p)^n) / p: .4 n where p n = 2.23.
    ends = dict(end=min(0.5, 2.23 / args.new)) if args.item == "ragged" else {}
    model = draw_model(args, like, **ends)
    prompts = torch.randint(256, (args.batch, args.prompt)).tolist()

    def call():
        torch.manual_seed(0)  # every call draws the same lengths
        return generate(model, prompts, args.new)
    return int(clock.calls(call).mask.sum())


def train(args, like, clock, folder):
    """Time the steps of a script's train() -> how many tokens a step draws, or reads if it draws none."""
    script, cfg = script_of(args, like, folder)
    with mock.patch.object(script, "steps", clock.steps(script.steps)), contextlib.suppress(Enough):
        script.train(cfg)
    rollouts = dict(ppo=args.batch * args.new, grpo=args.batch * args.group * args.new)
    pairs = 2 * args.batch * (args.prompt + args.new)
    return args.batch * args.length if args.item == "sft" else rollouts.get(args.item, pairs)


def bench(args):
    """Run an item -> its line, a dict."""
    device, config = find_device(args.device), GPTConfig(**SIZES[args.size])
    clock = Clock(device, args.repeats)
    gc.collect()  # what an item before this one has left
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # stdout is for the line
        folder = Path(folder)
        args.tokenizer = write_vocabulary(folder / "vocabulary", config.vocab_size)
        like = setup(args, Tokenizer.load(args.tokenizer))
        tokens = sample(args, like, clock) if args.item in SAMPLING else train(args, like, clock, folder)
    most = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    seconds, half = clock.median(), like.precision == "bf16"
    matmul, copy = ceilings(device, torch.bfloat16 if half else torch.float32)
    line = dict(
        what=args.item, peer="plainalign", size=args.size, dtype=like.precision, batch=args.batch,
        machine=machine(device, args.dtype), threads=torch.get_num_threads(), seconds=seconds,
        seconds_min=min(clock.seconds[1:]), cpu_seconds=statistics.median(clock.cpu_seconds[1:]), tokens=tokens,
        tokens_per_s=round(tokens / seconds), peak_memory_mb=round(most / 2 ** 20),
        peak_share=flops(args, config, tokens) / seconds / matmul)
    if args.item in SAMPLING:
        numbers = args.new * n_params(config) + cached_numbers(args, config, tokens)
        line["bound_share"] = numbers * (2 if half else 4) / seconds / copy
    return {name: round(value, 5) if type(value) is float else value for name, value in line.items()}


# ---------------------------------------------------------------- what is counted

def ceilings(device, dtype):
    """FLOPs a second of a large matmul; bytes a second that a large copy reads and writes."""
    n, size = (8192, 2 ** 30) if device.type == "cuda" else (2048, 2 ** 25)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    x, y = (torch.zeros(size, device=device, dtype=torch.uint8) for _ in "xy")
    matmul, copy = Clock(device, 5), Clock(device, 5)
    matmul.calls(lambda: a @ b)
    copy.calls(lambda: x.copy_(y))
    return 2 * n ** 3 / matmul.median(), 2 * size / copy.median()


def flops(args, config, tokens):
    """FLOPs of a call or step; tokens: how many it draws, if it draws any."""
    if args.item == "sft":
        return 3 * forward_flops(config, args.batch * args.length, args.length / 2)
    length = args.prompt + args.new
    said = forward_flops(config, length, length / 2, head=args.new)  # one pass over a row, logits of its response
    bare = forward_flops(config, length, length / 2, head=0, read=args.new)  # without them; backward costs two more
    scored = forward_flops(config, length, length / 2, head=0, read=1)
    pair = dict(reward=3 * scored, orpo=3 * said, dpo=4 * said, dpo_ahead=3 * said)
    if args.item in pair:
        return args.batch * 2 * pair[args.item]
    read = forward_flops(config, args.batch * args.prompt, args.prompt / 2, head=args.batch)
    drawn = read + forward_flops(config, tokens, args.prompt + args.new / 2)
    # In PPO policy, reference, critic and reward model read a rollout; policy and critic learn from it.
    learnt = dict(grpo=args.group * 3 * said, ppo=(2 + 3 * args.epochs) * (said + bare))
    return drawn + args.batch * learnt.get(args.item, 0)


def cached_numbers(args, config, tokens):
    """How many numbers of its cache the sampler reads for so many tokens."""
    return tokens * (args.prompt + args.new / 2) * 2 * config.n_layer * config.n_embd


# ---------------------------------------------------------------- on one card

class Target(NamedTuple):
    """What one card should reach, in seconds or as a share in percent."""
    name: str
    work: str
    item: str       # or a command
    options: dict   # of the item
    figure: str     # of its line
    was: str        # on an H200, before anything was done for cards
    least: str
    aim: str


GPT2 = dict(size="gpt2", prompt=64, repeats=3)
LONG = dict(batch=32, length=1024, micro_tokens=2 ** 15)
TARGETS = [  # the most telling first
    Target("sample", "sampling gpt2 256 × 128, of the bytes' bound", "generate", GPT2 | dict(batch=256, new=128),
           "bound_share", "6 %", "25 %", "50 %"),
    Target("sft", "SFT gpt2 32 × 1024, of the matmul peak", "sft", GPT2 | LONG, "peak_share", "16 %", "35 %", "50 %"),
    Target("compiled", "the same with --compile", "sft", GPT2 | LONG | dict(compile=True),
           "peak_share", "", "35 %", "50 %"),
    Target("grpo", "GRPO gpt2 64 × 16 × 256, as in configs/gpt2.toml", "grpo",
           GPT2 | dict(batch=64, group=16, new=256, minibatches=4, micro_tokens=2 ** 14),
           "seconds", "8.5 s", "3 s", "1.5 s"),
    Target("sample8", "sampling gpt2 8 × 128, of the bytes' bound", "generate", GPT2 | dict(batch=8, new=128),
           "bound_share", "1 %", "8 %", "20 %"),
    Target("tiny", "sampling tiny 256 × 64", "generate", dict(batch=256), "seconds", ".15-.26 s", ".03 s", ".015 s"),
    Target("base", "the toy's base, 700 steps", "python sft.py --loss_on all --init new --steps 700 --out $OUT/base", {},
           "seconds", "27 s", "10 s", "6 s"),
    Target("compare", "configs/compare.sh", "bash configs/compare.sh", {}, "seconds", "over 300 s", "120 s", "90 s")]
SMALLEST = dict(size="tiny", batch=4, group=2, prompt=16, new=8, length=32, repeats=1)
SMALLEST_STAGES = """
sft = {steps = 20}
label = {n = 80}
reward = {steps = 2}
ppo = {steps = 2, prompts = 4, eval_prompts = 4}
grpo = {steps = 2, prompts = 4}
dpo = {steps = 2}
orpo = {steps = 2}
compare = {n = 4}
"""


def run_command(command, args, seconds):
    """Time a command, which is ended after so many seconds -> its line."""
    with tempfile.TemporaryDirectory() as folder:
        if args.smallest:
            (Path(folder) / "smallest.toml").write_text(SMALLEST_STAGES)
            command += " --config $OUT/smallest.toml"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of `python`: the one that runs this
        env = os.environ | dict(OUT=folder, PATH=path)
        start = time.perf_counter()
        with subprocess.Popen(command, shell=True, cwd=ROOT, env=env, stdout=2, start_new_session=True) as process:
            try:
                code = process.wait(seconds)
            except BaseException:  # too long, or Ctrl-C: nothing that it started goes on
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if code:
            raise RuntimeError(f"exit code {code}")
        return dict(command=command, seconds=round(time.perf_counter() - start, 1))


OPTIONS = ("size", "batch", "prompt", "new", "length", "group", "epochs", "minibatches", "micro_tokens", "dtype", "device",
           "threads", "repeats")


def measure(target, args, seconds):
    """The line of a target. It is a process of its own: what breaks a card in one would break it for all others."""
    if seconds < 0:
        raise TimeoutError(f"--minutes {args.minutes:g} are over")
    if target.item not in ITEMS:
        return run_command(f"{target.item} --device {args.device}", args, seconds)
    options, words = vars(args) | target.options | (SMALLEST if args.smallest else {}), []
    for name in OPTIONS:
        words += [f"--{name}", str(options[name])]
    if options["compile"]:
        words.append("--compile")
    done = subprocess.run([sys.executable, __file__, target.item, *words], capture_output=True, text=True,
                          timeout=seconds)
    print(done.stderr, file=sys.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def on_a_card(args):
    """All targets, a line each as soon as it is there, and a table. One that fails does not keep the others from it."""
    end, rows = time.perf_counter() + 60 * args.minutes, []
    for target in TARGETS:
        if args.only and target.name not in args.only.split(","):
            continue
        try:
            line = measure(target, args, end - time.perf_counter())
            got = line[target.figure]
            here = f"{got:.3g} s" if target.figure == "seconds" else f"{100 * got:.3g} %"
        except Exception as error:  # out of memory, say
            here = type(error).__name__
            line = dict(error=f"{here}: {error}"[:300])
        print(json.dumps(dict(target=target.name) | line), flush=True)
        rows.append((target.work, here, target.was, target.least, target.aim))
    print_table(("work", "here", "was", "at least", "aim"), rows)


def print_table(heads, rows):
    """In markdown."""
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")


# ---------------------------------------------------------------- beside other libraries

# What peers.py is told of an item. Its sampler goes on with rows that have ended, so `ragged` takes it no less time.
PEERS = dict(
    generate="generate --batch 256 --cache static --steps 3", ragged="generate --batch 256 --cache static --steps 3",
    sft="sft", reward="reward", dpo="dpo", dpo_ahead="dpo --precompute", orpo="orpo", grpo="grpo", ppo="ppo")


def last_line(command):
    """The last line of JSON that a program prints, as a dict. (TRL prints dicts, too, as Python writes them.)"""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"'):
            print(line, file=sys.stderr, flush=True)
            return json.loads(line)
    print(f"no line of JSON from {command}\n{done.stderr[-500:]}", file=sys.stderr, flush=True)
    return {}


def beside_peers(args):
    """All items of theirs and ours, round after round, each in a process of its own, and a table."""
    lines, items = defaultdict(list), args.only.split(",") if args.only else list(PEERS)
    for _ in range(args.rounds):
        for item in items:
            theirs = f"{args.peers_python} {args.peers} {PEERS[item]} --threads {args.threads or 1}"
            for dtype in ("fp32", "bf16"):
                lines[item, dtype].append(last_line(f"{theirs} --dtype {dtype}"))
            ours = f"{sys.executable} {__file__} {item} --threads {args.threads or 1} --repeats 4"
            lines[item, "ours"].append(last_line(ours))
    rows = []
    for item in items:
        fp32, bf16, ours = (median(lines[item, side], "cpu_seconds") for side in ("fp32", "bf16", "ours"))
        best = "bf16" if bf16 < fp32 else "fp32"
        memory, our_memory = median(lines[item, best], "peak_rss_mb"), median(lines[item, "ours"], "peak_memory_mb")
        rows.append((item, f"{fp32:.3g}", f"{bf16:.3g}", f"{ours:.3g}", f"{min(fp32, bf16) / ours:.2f}",
                     f"{memory:.0f}", f"{our_memory:.0f}", f"{our_memory / memory:.2f}"))
    print_table(("CPU seconds", "theirs fp32", "bf16", "ours", "ratio", "peak MB, theirs", "ours", "ratio"), rows)


def median(lines, name):
    """Of the lines that have it; NaN if none has."""
    found = [line[name] for line in lines if name in line]
    return statistics.median(found) if found else math.nan


# ---------------------------------------------------------------- the program

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", nargs="?", choices=[*ITEMS, "peers", "gpu", "memory"], help="none: every item")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--batch", type=int, default=0, help="texts, pairs or prompts; 0: as many as the peers have")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--length", type=int, default=128, help="sft: tokens of a text")
    parser.add_argument("--group", type=int, default=8, help="grpo: responses to a prompt")
    parser.add_argument("--epochs", type=int, default=4, help="ppo: passes over a rollout")
    parser.add_argument("--minibatches", type=int, default=1, help="grpo, ppo: updates a pass")
    parser.add_argument("--micro_tokens", type=int, default=4096, help="tokens a forward pass holds")
    parser.add_argument("--grad_checkpoint", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training forward")
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch likes; peers: 1")
    parser.add_argument("--repeats", type=int, default=8, help="calls or steps that count")
    parser.add_argument("--only", default="", help="gpu, peers: some of the targets or items, with commas between them")
    parser.add_argument("--minutes", type=float, default=10, help="gpu: what is not done by then is left out")
    parser.add_argument("--smallest", action="store_true", help="gpu: all at a moment's size, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="peers: how often each is measured")
    parser.add_argument("--peers", default=os.environ.get("PEERS", "peers.py"))
    parser.add_argument("--peers_python", default=os.environ.get("PEERS_PYTHON", "python"))
    args = parser.parse_args()
    commands = dict(peers=beside_peers, gpu=on_a_card, memory=memory_table)
    if args.item in commands:
        commands[args.item](args)
    elif args.item:
        args.batch = args.batch or ITEMS[args.item]
        print(json.dumps(bench(args)), flush=True)
    else:
        for item in ITEMS:  # each in a process of its own, so that the peak of its memory is its own
            subprocess.run([sys.executable, __file__, item, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
