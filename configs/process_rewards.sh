#!/usr/bin/env bash
# Process rewards (Lightman et al. 2023, "Let's Verify Step by Step", 2305.20050): a reward model that judges each
# step.
#
# reported
#   Each step of sampled solutions has a label. The reward model is a classifier at the last token of every step.
# reconstruction
#   The labels are by rule, not people's: is each equation true, is the answer? The solutions are the thinking of
#   sums. All sizes are ours.
#
# Effect to look for: the share of steps of held-out sums that are judged right (val_accuracy) is above that of
# "always right".
#
#   bash configs/process_rewards.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/process_rewards.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
P=$OUT/process_rewards

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --families arith --by exact --k 4 --n 2000 --select all --out $P/answers "$@"
python configs/process_rewards.py --init $OUT/sft --data $P/answers/pairs.jsonl --check --save $OUT/tables/process_rewards.json --out $P/process "$@"
