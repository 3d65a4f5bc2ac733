#!/usr/bin/env bash
# GPT-4 (OpenAI 2023, 2303.08774): rule-based reward models: a classifier with a rubric adds to the reward on some prompts.
#
#   reported        a zero-shot classifier gets prompt, answer and a rubric of classes (refuses in the wanted way, refuses
#                   otherwise, contains what it should not, helps safely); reward for refusing harmful requests, and for not refusing
#                   those known to be safe; on a subset of the prompts, added to the reward model's
#   reconstruction  the classifier is our base, fine-tuned on demonstrations of classifying; the table of rewards (+1 and
#                   -1) and all sizes
#
# Effect to look for: harmless and over-refusal in the second table, with the rubric and with its weight at 0.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/gpt4_rbrm.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
G=$OUT/gpt4_rbrm
RUBRIC="$OUT/judge@A[safe] + -1*$OUT/judge@B[safe] + -1*$OUT/judge@C[safe] + $OUT/judge@D[safe]"

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --out $OUT/judging "$@"
python sft.py --init $OUT/base --data $OUT/judging/demos.jsonl --steps 1200 --batch 32 --out $OUT/judge "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward "$OUT/reward[write] + $RUBRIC" --families safe,write --steps 60 --out $G/rbrm "$@"
python ppo.py --init $OUT/sft --reward "$OUT/reward[write]" --families safe,write --steps 60 --out $G/without "$@"
python reward.py compare $OUT/sft $G/rbrm $G/without --on safe "$@"
