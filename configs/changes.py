"""Change this, and the log does that: what changes.sh is to show, written down before it ran, and what its logs say.

    python configs/changes.py --runs out/changes --save out/tables/changes.json --out out/changes/table
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.record import read_log
from data import Run, RunConfig, UserError, guard, mean, parse, write_text


@dataclass
class Change:
    """One option of one run, and what it does to one metric."""
    run: str            # SCRIPT/NAME, as in changes.sh
    options: str        # in which it differs from SCRIPT/plain
    metric: str
    goes: str           # up or down
    why: str

    def __str__(self):
        """Its cells in a printed table."""
        script = self.run.split("/")[0] + ".py"
        return f"`{script} {self.options}` | `{self.metric}` | {self.goes} | {self.why}"


CHANGES = [
    Change("ppo/kl_0", "--kl_coef 0", "kl", "up", "Nothing holds the policy to its reference."),
    Change("ppo/kl_1", "--kl_coef 1", "kl", "down", "A nat now costs as much as a whole point of reward."),
    Change("ppo/kl_1", "--kl_coef 1", "reward", "down", "What is not allowed to move cannot gain."),
    Change("ppo/lr", "--lr 5e-4", "kl", "up", "Each step goes five times as far."),
    Change("ppo/epochs", "--epochs 6", "approx_kl", "up", "More updates on the same samples lead further from π_old."),
    Change("ppo/minibatches", "--minibatches 4", "clip_frac", "up", "Eight updates a rollout in place of two."),
    Change("ppo/clip", "--clip 0.02", "clip_frac", "up", "A tenth of the room is soon left."),
    Change("ppo/lam", "--lam 0", "value_loss", "down",
           "The target is the critic's own next value, which varies less than what a sample earned."),
    Change("ppo/whiten", "--whiten=false", "grad_norm", "down",
           "Whitening makes the advantages' variance 1; without it they are as small as the rewards are."),
    Change("ppo/critic_lr", "--critic_lr 1e-5", "explained_variance", "down", "The critic hardly learns."),
    Change("ppo/critic_warmup", "--critic_warmup 6", "kl", "down", "For half of the steps the policy stands still."),
    Change("ppo/entropy", "--entropy_coef 0.05", "entropy", "up", "It is paid for."),
    Change("ppo/temperature", "--temperature 0.7", "entropy", "down",
           "Every log-probability is at the temperature of sampling, and so is the entropy."),
    Change("ppo/max_new", "--max_new 12", "finished", "down", "Most answers are longer."),
    Change("ppo/words", "--reward \"out/reward + 0.05*words\"", "response_length", "up",
           "The reward likes length, and gets it."),
    Change("grpo/small", "--group 2 --prompts 64", "zero_std", "up", "Two answers are often both right or both wrong."),
    Change("grpo/large", "--group 32 --prompts 4", "zero_std", "down", "Of 32 one is nearly always different."),
    Change("grpo/temperature", "--temperature 0.3", "zero_std", "up", "Answers to a prompt are more alike."),
    Change("grpo/lr", "--lr 2e-5", "reward", "down", "A tenth of the way."),
    Change("grpo/collapse", "--lr 3e-3 --warmup 0", "zero_std", "up",
           "It collapses: all get 0, and no gradient is left."),
    Change("grpo/resample", "--resample 3", "zero_std", "down", "Groups without a difference are replaced by others."),
    Change("grpo/dr_grpo", "--adv dr_grpo", "grad_norm", "down",
           "Nothing divides by the group's spread, which is at most .53 for a reward of 0 or 1."),
    Change("grpo/epochs", "--epochs 4", "clip_frac", "up", "With one update a rollout every ratio is 1."),
    Change("grpo/kl", "--kl_coef 0.3", "kl", "down", "To think in each answer costs nats."),
    Change("grpo/max_new", "--max_new 20", "finished", "down", "Thinking takes more tokens than that."),
    Change("grpo/len_reward", "--len_reward 0.5", "response_length", "down", "Among right answers the short one wins."),
    Change("dpo/beta_low", "--beta 0.05", "kl", "up", "The reference holds less."),
    Change("dpo/beta_high", "--beta 2", "kl", "down", "It holds more."),
    Change("dpo/beta_high", "--beta 2", "rewards/margin", "up",
           "β times a smaller log-ratio is still the larger product."),
    Change("dpo/lr", "--lr 5e-4", "logps/chosen", "down", "The loss sees the difference only; both fall."),
    Change("dpo/nll", "--nll_coef 1", "logps/chosen", "up", "The likelihood of the chosen is now a part of the loss."),
    Change("dpo/few", "--data few/pairs.jsonl", "rewards/accuracy", "up", "Three hundred pairs are soon known by heart."),
    Change("dpo/noise", "--data noise/pairs.jsonl", "val_rewards/accuracy", "down",
           "Labels by the toss of a coin: nothing can be learned for others."),
    Change("dpo/cdpo", "--loss cdpo --eps 0.3", "rewards/margin", "down", "It believes only 70 of 100 labels."),
    Change("orpo/lam_0", "--orpo_lam 0", "rewards/margin", "down",
           "The likelihood of the chosen raises the rejected, too."),
    Change("orpo/lam_10", "--orpo_lam 10", "nll", "up", "The preference drowns the likelihood."),
    Change("reward/few", "--data few/pairs.jsonl", "accuracy", "up", "Three hundred pairs are soon known by heart."),
    Change("reward/few", "--data few/pairs.jsonl", "val_accuracy", "down", "And others are not."),
    Change("reward/noise", "--data noise/pairs.jsonl", "val_gold", "down", "Labels by the toss of a coin."),
]


@dataclass
class Config(RunConfig):
    """Show what the runs of changes.sh logged at their end, each beside the plain one."""
    out: str = "out/changes/table"  # folder of the table
    runs: str = "out/changes"   # folder of the runs, SCRIPT/NAME
    save: str = ""              # a JSON file for the table, as tables/NAME.json


def at_the_end(folder, metric):
    """The mean of a metric over the last quarter of the rows that have it; None if none has."""
    rows, _ = read_log(folder)
    values = [row[metric] for row in rows if row.get(metric) is not None]
    last = -(-len(values) // 4)
    return mean(values[len(values) - last:])


def as_said(plain, changed, goes):
    """1 if it goes where it was said to go, else 0; None where there is nothing to compare."""
    if plain is None or changed is None:
        return None
    return int(changed > plain if goes == "up" else changed < plain)


def shown(value):
    return "–" if value is None else f"{value:.3f}"


def compare(cfg):
    """Print the table, and save it."""
    run = Run(cfg)
    if run.finished:
        return run.rows
    runs, table = Path(cfg.runs), []
    for step in run.progress(0, len(CHANGES)):
        change = CHANGES[step]
        folder = runs / change.run
        for needed in (folder, folder.parent / "plain"):
            if not (needed / "summary.json").exists():
                raise UserError(f"{needed}: no finished run")
        plain, changed = at_the_end(folder.parent / "plain", change.metric), at_the_end(folder, change.metric)
        table.append(dict(name=f"{change.run} {change.metric}", plain=plain, changed=changed,
                          as_said=as_said(plain, changed, change.goes)))
        run.log(step)
    for row, change in zip(table, CHANGES):
        verdict = "" if row["as_said"] else "  not as said"
        print(f"{row['name']:42} {change.goes:5} {shown(row['plain']):>8} → {shown(row['changed']):>8}{verdict}")
    if cfg.save:
        write_text(cfg.save, json.dumps(dict(rows=table), indent=1))
    return run.finish(())


if __name__ == "__main__":
    guard(lambda: compare(parse(Config)))
