#!/usr/bin/env bash
# Process rewards (Lightman et al. 2023, "Let's Verify Step by Step", 2305.20050): a reward model that judges each step of a solution.
#
#   reported        a label for each step of sampled solutions; a classifier at the last token of every step
#   reconstruction  the labels are by rule (is each equation true, is the answer?), not people's; the thinking of sums; all sizes
#
# Effect to look for: the share of steps of held-out sums that are judged right (val_accuracy), above that of "always right".
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/process_rewards.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
P=$OUT/process_rewards

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --families arith --by exact --k 4 --n 2000 --select all --out $P/answers "$@"
python configs/process_rewards.py --init $OUT/sft --data $P/answers/pairs.jsonl --check --out $P/process "$@"
