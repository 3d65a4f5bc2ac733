#!/usr/bin/env bash
# Constitutional AI (Bai et al. 2022, 2212.08073), the published method behind Claude: harmless by principles, not by
# labels.
#
# reported
#   SL-CAI: the model answers. It criticises and revises its answers by principles drawn from sixteen, several times.
#   It is fine-tuned on the last revisions and on helpful samples. RL-CAI: an AI compares two answers by a principle,
#   after a rationale, with labels clamped to .4-.6. A hybrid preference model learns helpfulness from people and
#   harmlessness from the AI. RL follows.
# reconstruction
#   Critic and judge are our base, fine-tuned on demonstrations of criticising and judging. People's preferences are
#   noisy labels by the true reward of `write`. RL is PPO. All sizes are ours. How Claude 3 itself was trained is not
#   published.
#
# Effect to look for: next to no unsafe request is helped after SL-CAI, and safe ones are helped more. RL-CAI changes
# little there, and raises `write`.
#
#   bash configs/claude_cai.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/claude_cai.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
C=$OUT/claude_cai

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --out $OUT/judging "$@"
python sft.py --init $OUT/base --data $OUT/judging/demos.jsonl --steps 1200 --batch 32 --lr 3e-3 --muon_lr 0.01 --out $OUT/judge "$@"
python configs/claude_cai.py --policy $OUT/sft --critic $OUT/judge --n 2000 --rounds 2 --out $C/revisions "$@"
python reward.py label --policy $OUT/sft --families write --n 600 --k 4 --select best --out $C/demos "$@"
python sft.py --init $OUT/sft --data $C/revisions/revisions.jsonl,$C/demos/pairs.jsonl --steps 50 --lr 1e-3 --muon_lr 3e-3 --out $C/sl "$@"
python reward.py label --policy $C/sl --families safe --n 3000 --judge $OUT/judge --preamble principles --rationale --clamp 0.6 --out $C/harmless "$@"
python reward.py label --policy $C/sl --families write --n 3000 --out $C/helpful "$@"
python reward.py train --init $OUT/sft --data $C/harmless/pairs.jsonl,$C/helpful/pairs.jsonl --loss soft --epochs 3 --out $C/reward "$@"
python ppo.py --init $C/sl --reward $C/reward --families safe,write --steps 30 --out $C/rl "$@"
python reward.py compare $OUT/sft $C/sl $C/rl --on safe --proxy $C/reward --save $OUT/tables/claude_cai.json "$@"
