#!/usr/bin/env bash
# DeepSeek-R1-Zero (2025, 2501.12948, version 1, sec. 2.2): GRPO with verifiable rewards straight from the base model, no SFT at all.
#
#   reported        the recipe: rule rewards for the answer and for a well-formed <think>, nothing else
#   reconstruction  sizes, the .1; the toy base has read conversations, with every sum worked out in <think>
#
# Effect to look for: sums (`arith`) above the base's, and above what SFT on demonstrations makes of it.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/r1_zero.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python grpo.py --init $OUT/base --reward "exact + 0.1*format" --steps 200 --out $OUT/r1_zero "$@"
python reward.py compare $OUT/base $OUT/r1_zero $OUT/sft --on arith "$@"
