#!/usr/bin/env bash
# Phi-3 (Abdin et al. 2024, 2404.14219): SFT, then DPO with unwanted behaviour as the rejected answer.
#
# reported
#   SFT, then DPO whose rejected answers are outputs of an unwanted kind.
# reconstruction
#   The unwanted kind is fillers ("So, that is that"), which the demonstrations taught. A rule finds them, so every
#   pair sets an answer without against one with. All sizes are ours.
#
# Effect to look for: the first table shows the share of answers without fillers. The share with them falls by 80 % or
# more. In the second table the true reward of every family is kept.
#
#   bash configs/phi3.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/phi3.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --by no_filler --k 4 --n 4000 --scale 0 --flip 0 --select ends --out $OUT/phi3/pairs "$@"
python dpo.py --init $OUT/sft --data $OUT/phi3/pairs/pairs.jsonl --out $OUT/phi3/dpo "$@"
python reward.py compare $OUT/sft $OUT/phi3/dpo --judge no_filler --families write --save $OUT/tables/phi3.fillers.json "$@"
python reward.py compare $OUT/sft $OUT/phi3/dpo --save $OUT/tables/phi3.json "$@"
