"""Average the weights of finished runs (model soups, Wortsman et al. 2203.05482): one model, as fast as each of them.

    Σ w_i θ_i    or, with --slerp, of two, tensor by tensor: the point t = w_2 of the arc from θ_1 to θ_2 (Shoemake 1985)

Gemma 2 (gemma2.sh), Llama 3 (llama3.sh) and Kimi k1.5 (kimi_k15.sh) average theirs. Adapters of LoRA are in the weights
of a finished run. It runs on the CPU, in seconds.

    python configs/merge.py out/a out/b --out out/c
    python configs/merge.py out/a out/b --weights 0.3,0.7 --slerp --out out/c
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import OptionError, Options, Tokenizer, UserError, bar, guard, parse
from model import Setup, checksum, load_model, raw, read_json, write_model


@dataclass
class Config(Options):
    """Average the weights of models of one architecture (model soups, 2203.05482)."""
    out: str = ""               # folder of the result
    weights: str = ""           # one number a model, comma-separated; none: all equal
    slerp: bool = False         # of two: along the arc between them, tensor by tensor, not the chord
    tokenizer: str = "toy"      # toy, the name of a tiktoken encoding, or a vocabulary file or folder


def slerp(a, b, t):
    """Spherical interpolation of two tensors: t = 0 is a, 1 is b, and between them the norm does not shrink as on the
    chord. Of tensors that (nearly) point the same or opposite ways, the chord."""
    norms = float(a.norm() * b.norm())
    cos = float((a * b).sum()) / norms if norms else 1.0
    if abs(cos) > 1 - 1e-12:
        return (1 - t) * a + t * b
    angle = math.acos(cos)
    of_a, of_b = math.sin((1 - t) * angle), math.sin(t * angle)
    return (of_a * a + of_b * b) / math.sin(angle)


def shares(cfg, folders):
    """The weight of each model."""
    if not cfg.weights:
        return [1 / len(folders)] * len(folders)
    try:
        weights = [float(weight) for weight in cfg.weights.split(",")]
    except ValueError:
        raise OptionError(f"--weights {cfg.weights}: not numbers with commas between them") from None
    if len(weights) != len(folders):
        raise OptionError(f"--weights {cfg.weights}: {len(weights)} for {len(folders)} checkpoints")
    if not all(map(math.isfinite, weights)):
        raise OptionError(f"--weights {cfg.weights}: not finite")
    return weights


def finished(out, made):
    """Whether the folder already holds this average, made of the same weights; what else it holds is an error."""
    out = Path(out)
    if (out / "config.json").exists():
        mark = read_json(out / "config.json").get("plainalign")
        if isinstance(mark, dict) and mark.get("made") == made:
            return True
    if (out / "config.json").exists() or (out / "run.json").exists():  # another model, or a run that is not finished
        raise UserError(f"{out} holds another model: choose another --out, or delete that folder")
    return False


def merge(cfg, folders):
    """Average the models of these folders, summed in float64, so that the mean of copies is the copy to the bit."""
    if not cfg.out:
        raise OptionError("--out: say where to write the result")
    weights = shares(cfg, folders)
    if cfg.slerp and (len(folders) != 2 or abs(sum(weights) - 1) > 1e-9):
        raise OptionError("--slerp goes between two checkpoints, with weights that add up to 1")
    like = Setup(Tokenizer.load(cfg.tokenizer))
    models = [load_model(folder, like) for folder in bar(folders, "reading", delay=0)]
    first = models[0]
    if any(model.config != first.config for model in models):
        raise UserError(f"{', '.join(folders)}: one has another architecture")
    states = [model.state_dict() for model in models]
    sums = [checksum(map(raw, state.values())) for state in bar(states, "checksums")]
    made = dict(of=sums, weights=weights, slerp=cfg.slerp)
    if finished(cfg.out, made):
        return print(f"{cfg.out} is finished; nothing to do")

    total = {}
    for name in bar(states[0], "merging"):
        tensors = [state[name].double() for state in states]
        if cfg.slerp:
            total[name] = slerp(*tensors, weights[1]).float()
        else:
            total[name] = sum(weight * tensor for weight, tensor in zip(weights, tensors)).float()
    first.load_state_dict(total)
    write_model(cfg.out, first, made)
    terms = [f"{weight:g} {folder}" for weight, folder in zip(weights, folders)]
    print(f"{cfg.out}: {' + '.join(terms)}")


if __name__ == "__main__":
    guard(lambda: merge(*parse(Config, positional=["checkpoint", "checkpoint..."])))
