#!/usr/bin/env bash
# Learning to think: what SFT and GRPO of compare.sh make of sums when they are sampled, when their likeliest answer is
# taken, and when they are made to think; and how often they do it by themselves.
#
# Effect to look for: SFT thinks in a third of its answers, as its demonstrations do, and is mostly wrong without it. GRPO
# always thinks. Made to think, SFT is as good.
#
#   bash configs/thinking.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/thinking.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

ask() {  # NAME OPTIONS...: how both do on sums, and on those of four steps; many, so that the spread is that of seeds
  python reward.py compare $OUT/sft $OUT/grpo --families arith,arith4 --on arith --n 1600 --show 0 --save $OUT/tables/$1.json "${@:2}"
}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python grpo.py --init $OUT/sft --out $OUT/grpo "$@"
ask thinking "$@"
ask thinking.greedy --temperature 0 "$@"
ask thinking.made --begin "<think>" "$@"
ask thinking.who --judge format "$@"
