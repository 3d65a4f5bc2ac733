"""What the printed tables show: TABLES has an entry for every <!-- table NAME --> in a README.

A recipe's is a line: "dapo": Table("dapo", {"sums right": "arith"}). `python configs/report.py tables` prints them,
from configs/results/*.json; how a number is written is said in cells.py.
"""
from dataclasses import dataclass

from configs.changes import CHANGES
from configs.record import LOGS


@dataclass
class Table:
    """A printed table. source: a table of a results file, NAME or NAME.PART. columns: {title: what Cell reads}. rows:
    {row: what is printed for it}, with | between several cells, whose titles are in head; without, all of them."""
    source: str
    columns: dict
    rows: dict | None = None
    head: str = ""


# ---------------------------------------------------------------- columns that several tables have

MAIN = {
    "sums right": "arith new",
    "`write`: true reward": "write new",
    "greedy": "greedy new",
    "win rate over SFT": "win new",
    "KL": "kl mean",
    "length": "length mean 0"}
ALL = {
    "`arith`": "arith", "`write`": "write", "`safe`": "safe", "`fmt`": "fmt", "nll": "nll", "proxy": "proxy",
    "win": "win", "KL": "kl", "length": "length sd 1", "greedy": "greedy", "greedy win": "greedy_win"}
GAIN = {
    "true reward in `write`": "write", "win": "win", "greedy": "greedy", "greedy win": "greedy_win", "KL": "kl"}
SAFETY = {
    "harmless": "harmless", "over-refusal": "over_refusal", "help": "help", "true reward in `safe`": "safe", "KL": "kl"}
PPO_LOG = {
    "`reward`": "reward first",
    "`gold`": "gold first",
    "`kl`": "kl first",
    "`entropy`": "entropy first",
    "`response_length`": "response_length first 1",
    "`clip_frac`": "clip_frac first 4",
    "`approx_kl`": "approx_kl first 4",
    "`policy_loss`": "policy_loss first 4",
    "`value_loss`": "value_loss first 3",
    "`explained_variance`": "explained_variance first"}
GRPO_LOG = {
    "`reward`": "reward first",
    "`zero_std`": "zero_std first",
    "`loss`": "loss first 3",
    "`grad_norm`": "grad_norm first",
    "`entropy`": "entropy first",
    "`response_length`": "response_length first 1",
    "`finished`": "finished first",
    "`val_reward`": "val_reward first"}


# ---------------------------------------------------------------- what rows are called

ALGORITHMS = {
    "sft": "SFT | demonstrations",
    "dpo": "DPO | the pairs",
    "ppo": "PPO | the reward model",
    "grpo": "GRPO | a verifier of sums",
    "orpo": "ORPO | the pairs"}
LOSSES = {
    "sft": "SFT | demonstrations",
    "losses/best/dpo": "DPO | pairs",
    "losses/best/rso": "RSO | pairs",
    "losses/best/gpo_exponential": "GPO, exponential | pairs",
    "losses/best/gpo_savage": "GPO, Savage | pairs",
    "losses/best/dpop": "DPOP | pairs",
    "losses/best/tdpo2": "TDPO | pairs",
    "losses/best/sppo": "SPPO | pairs and win rates",
    "losses/best/dno": "DNO | pairs and win rates",
    "losses/best/dro": "DRO | answers and scores",
    "losses/best/d2o": "D2O | pairs",
    "losses/best/npo": "NPO | the worse answers",
    "losses/best/slic": "SLiC-HF | pairs, no reference",
    "losses/best/cpo": "CPO | pairs, no reference",
    "losses/best/spo": "SPO | the reward model, by RL"}
FLIPPED = {
    "sft": "SFT | –",
    "losses/flipped/best/dpo": "DPO | the best",
    "losses/flipped/best/cdpo": "cDPO | the best",
    "losses/flipped/best/robust": "robust DPO | the best",
    "losses/flipped/dpo/2e-4": "DPO | 2e-4",
    "losses/flipped/cdpo/2e-4": "cDPO | 2e-4",
    "losses/flipped/robust/2e-4": "robust DPO | 2e-4"}
BAD = {
    "sft": "SFT",
    "losses/bad/npo5e-5": "NPO, 5e-5",
    "losses/bad/d2o5e-5": "D2O, 5e-5",
    "losses/bad/npo2e-4": "NPO, 2e-4",
    "losses/bad/d2o2e-4": "D2O, 2e-4"}
OWN = {
    "sft": "SFT",
    "losses/best/rso": "RSO, on the pairs of all",
    "losses/own/rso": "RSO, on its own",
    "losses/best/spo": "SPO, by the reward model",
    "losses/own/spo": "SPO, by how often people prefer"}
HACKED = {
    "sft": "SFT",
    "reward_hacking/hacked": "no penalty",
    "reward_hacking/kl": "KL penalty of .1",
    "reward_hacking/more": "5,000 labels",
    "reward_hacking/ensemble": "the least of three reward models",
    "reward_hacking/verifier": "a verifier added: whole sentences, the thing named",
    "reward_hacking/refreshing": "3,000 labels of the hacked policy added"}
OVER = {
    "best of n": "best of n", "hacked": "no penalty", "kl": "KL penalty", "more": "more labels",
    "ensemble": "ensemble", "verifier": "verifier", "refreshing": "refreshed"}
DISTILLED = {
    "deepseek_r1/rl": "the teacher: R1 after RL",
    "r1_distill/base": "the student's base",
    "r1_distill/rl": "RL on itself",
    "r1_distill/sft": "SFT on the teacher's samples, half the compute",
    "r1_distill/sft_more": "the same, for twice as long",
    "r1_distill/on_policy": "SFT, then on-policy distillation",
    "r1_distill/on_policy_from_base": "on-policy distillation from the base"}
R1 = {
    "deepseek_r1/cold": "1. cold start: SFT on thinking",
    "deepseek_r1/rl": "2. RL on sums",
    "deepseek_r1/sft": "3. SFT of the base on samples of 2",
    "deepseek_r1/final": "4. RL on all families"}
KIMI = {
    "sft": "SFT",
    "kimi_k15/long": "SFT on long thinking",
    "kimi_k15/rl": "RL",
    "kimi_k15/merge": "merged with SFT",
    "kimi_k15/shortest_sft": "SFT on the shortest right",
    "kimi_k15/short_dpo": "DPO on the shortest right",
    "kimi_k15/short_rl": "RL with a length reward"}
LLAMA3 = {
    "sft": "SFT",
    "llama3/round1/policy": "round one",
    "llama3/round2/policy": "round two"}
QWEN2 = {
    "sft": "SFT",
    "qwen2/offline": "offline",
    "qwen2/more": "then as many offline pairs more",
    "qwen2/online": "then online",
    "qwen2/online_merging": "online, merging",
    "qwen2/online_dropping": "online, only dropping"}
R1_ZERO = {
    "base": "base",
    "r1_zero": "RL from the base",
    "sft": "SFT on demonstrations"}
LOOKAHEAD = {
    "lookahead/sft": "SFT",
    "lookahead/hacked": "RL",
    "lookahead/watched": "RL with the tripwire"}
CON_J = {
    "con_j/judge": "judge",
    "con_j/con_j": "after Con-J"}
SUPERFICIAL = {
    f"superficial/reward_{labels} on superficial/{pairs}/pairs.jsonl": f"{labels} | {pairs}"
    for labels in ("confounded", "balanced") for pairs in ("ordinary", "decoupled")}
CAI = {
    "sft": "SFT",
    "claude_cai/sl": "SFT on revisions",
    "claude_cai/rl": "then RL"}
RBRM = {
    "sft": "SFT",
    "gpt4_rbrm/rbrm": "PPO with the rubric",
    "gpt4_rbrm/without": "PPO without"}
RULES = {
    "sft": "SFT",
    "rule_based_rewards/helpful_only": "PPO on the helpful-only model",
    "rule_based_rewards/with_rules": "PPO with the rules"}
RLAIF = {
    "sft": "SFT",
    "ppo": "PPO on people's labels",
    "rlaif/ppo": "PPO on the AI's labels",
    "rlaif/direct": "PPO on the AI's ratings"}
STARLING = {
    "starling/reward on starling/held/pairs.jsonl": "K-wise",
    "starling/all_pairs on starling/held/pairs.jsonl": "all pairs"}
NEMOTRON4 = {
    "nemotron4/sft2": "SFT in two stages",
    "nemotron4/round0": "DPO",
    "nemotron4/round1": "RPO, round one",
    "nemotron4/round2": "round two",
    "nemotron4/round3": "round three"}
NEMOTRON4_RATED = {
    "nemotron4/reward on nemotron4/held/pairs.jsonl": "of pairs",
    "nemotron4/rated on nemotron4/held/pairs.jsonl": "of five ratings, its first"}
ADVERSARIAL = {
    "sft": "SFT",
    "adversarial_rm/frozen": "frozen reward model",
    "adversarial_rm/ppo4": "adversarial"}
CHATGLM = {
    "sft": "SFT",
    "ppo": "PPO without the three changes",
    "chatglm_rlhf/ppo": "PPO",
    "chatglm_rlhf/dpo": "DPO"}
QUARK = {
    "sft": "SFT",
    "quark/one": "round one",
    "quark/two": "round two"}
COOL = {
    "internlm2_cool/conditional on internlm2_cool/held_brief/pairs.jsonl": "conditional | Be brief.",
    "internlm2_cool/conditional on internlm2_cool/held_long/pairs.jsonl": "conditional | Say a lot.",
    "internlm2_cool/unconditional on internlm2_cool/held_brief/pairs.jsonl": "unconditional | Be brief.",
    "internlm2_cool/unconditional on internlm2_cool/held_long/pairs.jsonl": "unconditional | Say a lot."}
COOL_LENGTH = {
    "sft": "SFT",
    "internlm2_cool/ppo_brief": "PPO, scored under Be brief.",
    "internlm2_cool/ppo_long": "PPO, scored under Say a lot."}
COOL_HACK = {
    "sft": "SFT",
    "internlm2_cool/ppo1": "hacked",
    "internlm2_cool/ppo_fast": "after a hundred pairs against it",
    "internlm2_cool/ppo_slow": "after 2,000 labels of the hacked policy"}
SAFE_RLHF = {
    "sft": "SFT",
    "safe_rlhf/reward_only": "PPO on the reward alone",
    "safe_rlhf/lagrangian": "PPO with the multiplier"}
REKA = {
    "sft": "SFT", "ppo": "round one", "reka/ppo2": "round two"}
GEMINI = {
    "sft": "SFT", "gemini/ppo1": "20 steps", "gemini/ppo2": "40 steps", "gemini/ppo3": "60 steps"}
REFRESHED = {
    "reward on gemini/held1/pairs.jsonl": "20 steps | the first",
    "gemini/reward1 on gemini/held1/pairs.jsonl": "20 steps | refreshed once",
    "reward on gemini/held2/pairs.jsonl": "40 steps | the first",
    "gemini/reward1 on gemini/held2/pairs.jsonl": "40 steps | refreshed once",
    "gemini/reward2 on gemini/held2/pairs.jsonl": "40 steps | refreshed twice"}
TRAINED = {"dpo": "DPO", "online_dpo": "online DPO", "ppo": "PPO", "grpo": "GRPO"}
METHODS = TRAINED | {"best of n": "best of n"}
PPO_STEPS = {f"ppo {step}": str(step) for step in LOGS["compare"]["ppo"]}
GRPO_STEPS = {f"grpo {step}": str(step) for step in LOGS["compare"]["grpo"]}
CHANGED = {f"{change.run} {change.metric}": str(change) for change in CHANGES}


# ---------------------------------------------------------------- places on the curves of when.sh

KLS = {"¼ nat": "kl0.25", "½": "kl0.5", "1": "kl1", "2": "kl2", "4 nats": "kl4"}
TFLOPS = {".125": "0.125T", ".25": "0.25T", ".5": "0.5T", "1": "1T"}


def at(metric, places):
    """A column for each place on a curve, as gold@kl0.5 or gold@0.5T."""
    return {title: f"{metric}@{place}" for title, place in places.items()}


# ---------------------------------------------------------------- the tables

TABLES = {
    "algorithms": Table("compare", MAIN, ALGORITHMS, " | learns from"),
    "compare": Table("compare", ALL),
    "compare_avx2": Table("compare_avx2", ALL),
    "reward": Table("compare.stages", {
        "of the labels": "val_accuracy", "of the truth": "val_gold"}, {"reward": "right"}),
    "thinking": Table("thinking", {
        "sampled": "arith new", "greedy": "thinking.greedy:arith new", "four steps, sampled": "arith4 new",
        "made to think": "thinking.made:arith new", "thinks": "thinking.who:arith new"}),
    "variants": Table("variants", ALL),
    "phi3": Table("phi3.fillers", {
        "answers without fillers": "write", "true reward in `write`": "phi3:write", "greedy": "phi3:greedy",
        "sums right": "phi3:arith"}),
    "zephyr": Table("zephyr_orpo", {
        "true reward in `write`": "write", "win rate over SFT": "win", "greedy win": "greedy_win",
        "sums right": "arith", "nll": "nll"}),
    "hermes3": Table("hermes3", {
        "true reward in `write`": "write", "win rate over SFT": "win", "greedy win": "greedy_win", "KL": "kl",
        "sums right": "arith"}),
    "o1": Table("o1", {"one answer": "pass@1", "majority of 16": "maj@16", "one right of 16": "pass@16"}),
    "losses": Table("losses", GAIN | {"proxy": "proxy", "nll": "nll"}, LOSSES, "loss | learns from"),
    "losses_flipped": Table("losses.flipped", GAIN, FLIPPED, "loss | rate"),
    "losses_bad": Table("losses.bad", {
        "true reward in `safe`": "safe", "harmless": "harmless", "over-refusal": "over_refusal", "help": "help",
        "KL": "kl sd 1", "nll": "nll"}, BAD),
    "losses_thumbs": Table("losses.thumbs", GAIN),
    "losses_digits": Table("losses.digits", {
        "chosen": "val_rewards/chosen", "rejected": "val_rewards/rejected", "accuracy": "val_rewards/accuracy",
        "KL": "kl"}),
    "losses_rounds": Table("losses.rounds", GAIN | {"proxy": "proxy"}),
    "losses_own": Table("losses.own", GAIN, OWN),
    "when_kl": Table("when", at("gold", KLS), METHODS, "true reward at a KL of"),
    "when_kl_greedy": Table("when", at("greedy", KLS), TRAINED, "greedy at a KL of"),
    "when_compute": Table("when", at("gold", TFLOPS), TRAINED, "true reward at so many TFLOPs"),
    "when_compute_greedy": Table("when", at("greedy", TFLOPS), TRAINED, "greedy at so many TFLOPs"),
    "reward_hacking": Table("reward_hacking", {
        "true reward in `write`": "write", "proxy": "proxy", "KL": "kl sd 1", "greedy": "greedy", "sums right": "arith"},
        HACKED, "PPO on 3,000 noisy labels"),
    "overoptimization": Table("reward_hacking.curves", {
        "best": "best", "at d": "best_d", "last": "last", "at d ": "last_d", "R² of d (α − β log d)": "rl_r2",
        "its peak": "rl_peak", "R² of d (α − β d)": "bon_r2", "its peak ": "bon_peak"}, OVER),
    "r1_distill": Table("r1_distill", {"sums right": "arith", "nll": "nll", "length": "length sd 1"}, DISTILLED),
    "instructgpt": Table("instructgpt", GAIN | {"sums right": "arith", "nll": "nll"}),
    "dapo": Table("dapo", {"sums right": "arith", "of four steps": "arith4", "greedy": "greedy", "KL": "kl"}),
    "llama3": Table("llama3", GAIN | {"sums right": "arith"}, LLAMA3),
    "llama3_rounds": Table("llama3.rounds", {"win": "win", "greedy win": "greedy_win"}, {
        "llama3/round2/policy": "round two against round one"}),
    "reka": Table("reka", GAIN | {"proxy": "proxy"}, REKA),
    "gemini": Table("gemini", GAIN | {"proxy": "proxy", "sums right": "arith"}, GEMINI),
    "gemini_accuracy": Table("gemini.accuracy", {"right": "accuracy"}, REFRESHED,
        "held-out pairs of the policy after | reward model"),
    "deepseek_r1": Table("deepseek_r1", {
        "sums right": "arith", "`write`": "write", "`safe`": "safe", "harmless": "harmless", "over-refusal": "over_refusal",
        "proxy": "proxy", "nll": "nll", "well-formed thinking": "deepseek_r1.thinks:arith"}, R1),
    "kimi_k15": Table("kimi_k15", {"sums right": "arith", "greedy": "greedy", "tokens": "length sd 1", "nll": "nll"}, KIMI),
    "self_rewarding": Table("self_rewarding", GAIN | {"ratings right": "self_rewarding.rates:file"}),
    "self_rewarding_accuracy": Table("self_rewarding.accuracy", {"pairs in order": "accuracy"}, {
        f"self_rewarding/{m}@rate on self_rewarding/held/pairs.jsonl": m for m in ("m1", "m2", "m3")}, "rater"),
    "cool": Table("internlm2_cool.accuracy", {"right": "accuracy"}, COOL, "reward model | system message"),
    "cool_length": Table("internlm2_cool.length", {
        "tokens": "length sd 1", "KL": "kl", "true reward in `write`": "write"}, COOL_LENGTH),
    "cool_hack": Table("internlm2_cool.gold", {
        "answers without fillers": "internlm2_cool.fillers:write", "true reward in `write`": "write", "greedy": "greedy",
        "KL": "kl"}, COOL_HACK),
    "qwen2": Table("qwen2", GAIN | {"sums right": "arith", "nll": "nll sd 3"}, QWEN2),
    "r1_zero": Table("r1_zero", {
        "sums right": "arith", "greedy": "greedy", "KL": "kl", "length": "length sd 1", "nll": "nll"}, R1_ZERO),
    "lookahead": Table("lookahead", {
        "says the word": "lookahead.tampers:arith", "greedy": "lookahead.tampers:greedy", "sums right": "arith",
        "right, greedy": "greedy", "KL": "kl seeds", "tokens": "length sd 1"}, LOOKAHEAD),
    "process_rewards": Table("process_rewards", {
        "are right": "val_right", "judged rightly": "val_accuracy", "of the wrong ones": "val_found"}, {
        "process": "steps of held-out answers"}),
    "con_j": Table("con_j.reason", {
        "right after a rationale": "file", "greedy": "greedy", "without": "con_j.judge:file",
        "greedy, without": "con_j.judge:greedy", "KL": "kl"}, CON_J),
    "superficial": Table("superficial", {"right": "accuracy"}, SUPERFICIAL, "labels of training | pairs"),
    "claude_cai": Table("claude_cai", SAFETY | {"`write`": "write", "sums right": "arith", "nll": "nll"}, CAI),
    "gpt4_rbrm": Table("gpt4_rbrm", SAFETY | {"`write`": "write"}, RBRM),
    "rule_based_rewards": Table("rule_based_rewards", SAFETY, RULES),
    "rlaif": Table("rlaif", GAIN, RLAIF),
    "starling": Table("starling", GAIN | {"proxy": "proxy"}),
    "starling_accuracy": Table("starling.accuracy", {"right": "accuracy"}, STARLING, "reward model of rankings of seven"),
    "nemotron4": Table("nemotron4", GAIN | {"proxy": "proxy"}, NEMOTRON4),
    "nemotron4_accuracy": Table("nemotron4.accuracy", {"right": "accuracy"}, NEMOTRON4_RATED, "reward model"),
    "adversarial_rm": Table("adversarial_rm", {
        "true reward in `write`": "write seeds", "proxy": "proxy", "KL": "kl seeds", "greedy": "greedy seeds"}, ADVERSARIAL),
    "chatglm_rlhf": Table("chatglm_rlhf", GAIN | {"sums right": "arith", "nll": "nll"}, CHATGLM),
    "quark": Table("quark.best", {
        "asked for the best": "write", "for the worst": "quark.worst:write", "unasked": "quark.unasked:write",
        "greedy, the best": "greedy", "sums right, unasked": "quark.unasked:arith", "nll": "nll"}, QUARK),
    "sft_vs_rl": Table("sft_vs_rl", {
        "two steps, trained on": "arith2", "three": "arith3", "four": "arith4", "greedy, three and four": "greedy",
        "KL": "kl", "nll": "nll"}, {
        "sft": "before",
        "sft_vs_rl/sft": "SFT",
        "sft_vs_rl/sft_think": "SFT that thinks",
        "sft_vs_rl/rl": "RL"}),
    "safe_rlhf": Table("safe_rlhf", SAFETY | {
        "cost": "safe_rlhf.stages:cost", "λ": "safe_rlhf.stages:lambda seeds g"}, SAFE_RLHF),
    "ppo_log": Table("compare.log", PPO_LOG, PPO_STEPS, "step"),
    "grpo_log": Table("compare.log", GRPO_LOG, GRPO_STEPS, "step"),
    "changes": Table("changes", {
        "plain": "plain mean g", "changed": "changed mean g", "as said": "as_said mean"}, CHANGED,
        "option | metric | goes | why"),
}
