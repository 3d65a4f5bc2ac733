#!/usr/bin/env bash
# OpenAI o1 (2024, "Learning to reason with LLMs"; no paper or algorithm is published, its like are DeepSeek-R1 2501.12948
# and Kimi k1.5 2501.12599): RL through a chain of thought, and accuracy that rises with training and with test-time compute.
#
#   reported        that RL trains the thinking, that no preference is trained into it, and the two curves
#   reconstruction  everything else: GRPO, the reward sees only what follows the thinking, and test-time compute is the
#                   number of samples, of which the majority counts (maj@k), or one that is right, as a perfect verifier
#                   would pick (pass@k)
#
# Effect to look for: in the last tables accuracy rises with the number of samples (each column doubles it; two votes can
# only agree or tie, so maj@2 is maj@1), and with training from row to row.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/o1.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python grpo.py --init $OUT/sft --reward exact@answer --steps 10 --warmup 2 --lr_end 1 --out $OUT/o1/steps10 "$@"
python grpo.py --init $OUT/sft --reward exact@answer --steps 30 --warmup 2 --lr_end 1 --out $OUT/o1/steps30 "$@"
python grpo.py --init $OUT/sft --reward exact@answer --steps 100 --warmup 2 --lr_end 1 --out $OUT/o1/steps100 "$@"
python reward.py compare $OUT/sft $OUT/o1/steps10 $OUT/o1/steps30 $OUT/o1/steps100 --families arith --on arith --n 200 --samples 16 "$@"
