#!/usr/bin/env bash
# Process rewards (Lightman et al. 2023, "Let's Verify Step by Step", 2305.20050): a reward model that judges each
# step.
#
# reported
#   Each step of sampled solutions has a label. The reward model is a classifier at the last token of every step.
# reconstruction
#   The labels are by rule, not people's: is each equation true, is the answer? The solutions are the thinking of
#   sums, sampled at a temperature of 1.5, so that there are wrong steps among them. All sizes are ours.
#
# Effect to look for: the share of held-out steps that are judged rightly (val_accuracy) is above that of "always
# right" (val_right), and more than half of the wrong steps are found (val_found).
#
#   bash configs/process_rewards.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/process_rewards.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
P=$OUT/process_rewards

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --families arith --think 1 --steps 100 --out $P/thinker "$@"
python reward.py label --policy $P/thinker --families arith --by exact --k 4 --n 3000 --temperature 1.5 --select all --out $P/answers "$@"
python configs/process_rewards.py --init $P/thinker --data $P/answers/pairs.jsonl --check --epochs 4 --save $OUT/tables/process_rewards.json --out $P/process "$@"
