#!/usr/bin/env bash
# DeepSeek-R1-Zero (2025, 2501.12948, version 1, sec. 2.2): GRPO with verifiable rewards straight from the base model,
# no SFT.
#
# reported
#   The recipe: rule rewards for the answer and for a well-formed <think>, and nothing else.
# reconstruction
#   Sizes and the .1 are ours. The toy base has read conversations, with every sum worked out in <think>.
#
# Effect to look for: sums (`arith`) are above the base's, and above what SFT on demonstrations makes of it.
#
#   bash configs/r1_zero.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/r1_zero.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python grpo.py --init $OUT/base --reward "exact + 0.1*format" --steps 200 --out $OUT/r1_zero "$@"
python reward.py compare $OUT/base $OUT/r1_zero $OUT/sft --on arith --save $OUT/tables/r1_zero.json "$@"
