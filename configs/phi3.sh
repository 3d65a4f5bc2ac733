#!/usr/bin/env bash
# Phi-3 (Abdin et al. 2024, 2404.14219): SFT -> DPO, with unwanted behaviour as the rejected answer.
#
#   reported        SFT, then DPO whose rejected answers are outputs of an unwanted kind
#   reconstruction  the unwanted kind: here fillers ("So, that is that"), which the demonstrations taught; a rule finds
#                   them, so every pair sets an answer without against one with
#
# Effect to look for: in the first table (share of answers without fillers) the share with them falls by 80 % or more;
# in the second the true reward of every family is kept.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/phi3.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --by no_filler --k 4 --n 4000 --scale 0 --flip 0 --select ends --out $OUT/phi3/pairs "$@"
python dpo.py --init $OUT/sft --data $OUT/phi3/pairs/pairs.jsonl --out $OUT/phi3/dpo "$@"
python reward.py compare $OUT/sft $OUT/phi3/dpo --judge no_filler --families write "$@"
python reward.py compare $OUT/sft $OUT/phi3/dpo "$@"
