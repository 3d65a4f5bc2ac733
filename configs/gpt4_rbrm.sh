#!/usr/bin/env bash
# GPT-4 (OpenAI 2023, 2303.08774), rule-based reward models: a classifier with a rubric adds to the reward on some
# prompts.
#
# reported
#   A zero-shot classifier gets a prompt, an answer and a rubric of classes: it refuses as wanted, it refuses
#   otherwise, it contains what it should not, it helps safely. Refusing harmful requests is rewarded, and so is not
#   refusing those known to be safe. On a subset of the prompts this is added to the reward model's score.
# reconstruction
#   The classifier is our base, fine-tuned on demonstrations of classifying. The rewards (+1 and -1) and all sizes are
#   ours.
#
# Effect to look for: in the second table nearly all unsafe requests are refused with the rubric, and nearly no safe
# ones. Without it (its weight at 0) both stay as they were.
#
#   bash configs/gpt4_rbrm.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/gpt4_rbrm.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
G=$OUT/gpt4_rbrm
RUBRIC="$OUT/judge@A[safe] + -1*$OUT/judge@B[safe] + -1*$OUT/judge@C[safe] + $OUT/judge@D[safe]"

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --out $OUT/judging "$@"
python sft.py --init $OUT/base --data $OUT/judging/demos.jsonl --steps 1200 --batch 32 --lr 3e-3 --muon_lr 0.01 --out $OUT/judge "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward "$OUT/reward[write] + $RUBRIC" --families safe,write --steps 60 --out $G/rbrm "$@"
python ppo.py --init $OUT/sft --reward "$OUT/reward[write]" --families safe,write --steps 60 --out $G/without "$@"
python reward.py compare $OUT/sft $G/rbrm $G/without --on safe --save $OUT/tables/gpt4_rbrm.json "$@"
