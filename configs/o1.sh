#!/usr/bin/env bash
# OpenAI o1 (2024, "Learning to reason with LLMs"): RL through a chain of thought. No paper or algorithm is published;
# its like are DeepSeek-R1 (2501.12948) and Kimi k1.5 (2501.12599).
#
# reported
#   RL trains the thinking. No preference is trained into it. Accuracy rises with training, and with test-time compute.
# reconstruction
#   Everything else. The algorithm is GRPO, and the reward sees only what follows the thinking. Test-time compute is
#   the number of samples: the majority counts (maj@k), or one that is right, as a perfect verifier would pick
#   (pass@k).
#
# Effect to look for: in the last tables accuracy rises with the number of samples from column to column (each doubles
# it; two votes can only agree or tie, so maj@2 is maj@1), and with training from row to row.
#
#   bash configs/o1.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/o1.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python grpo.py --init $OUT/sft --reward exact@answer --steps 10 --warmup 2 --lr_end 1 --out $OUT/o1/steps10 "$@"
python grpo.py --init $OUT/sft --reward exact@answer --steps 30 --warmup 2 --lr_end 1 --out $OUT/o1/steps30 "$@"
python grpo.py --init $OUT/sft --reward exact@answer --steps 100 --warmup 2 --lr_end 1 --out $OUT/o1/steps100 "$@"
python reward.py compare $OUT/sft $OUT/o1/steps10 $OUT/o1/steps30 $OUT/o1/steps100 --families arith --on arith --n 200 --samples 16 --save $OUT/tables/o1.json "$@"
