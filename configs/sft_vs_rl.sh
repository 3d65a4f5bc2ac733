#!/usr/bin/env bash
# "SFT memorizes, RL generalizes" (Chu et al. 2025, 2501.17161): train the same model on rule A, test it on rule B.
#
#   reported        both start from one SFT model; the test changes a rule of the task
#   reconstruction  the rule: sums of one or two steps in training, of three and four in the test, which the common start
#                   has seen: so the test is what each way makes of what it no longer trains on; SFT on the usual
#                   demonstrations (`sft`), and on ones that always think (`sft_think`): 200 steps, RL 100
#
# Effect to look for: in `arith1` and `arith2` all gain; what happens in `arith3` and `arith4` is the finding.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/sft_vs_rl.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python sft.py --init $OUT/sft --families arith1,arith2 --steps 200 --lr 1e-3 --muon_lr 3e-3 --out $OUT/sft_vs_rl/sft "$@"
python sft.py --init $OUT/sft --families arith1,arith2 --think 1 --steps 200 --lr 1e-3 --muon_lr 3e-3 --out $OUT/sft_vs_rl/sft_think "$@"
python grpo.py --init $OUT/sft --families arith1,arith2 --out $OUT/sft_vs_rl/rl "$@"
python reward.py compare $OUT/sft $OUT/sft_vs_rl/sft $OUT/sft_vs_rl/sft_think $OUT/sft_vs_rl/rl --families arith1,arith2,arith3,arith4 --on arith3,arith4 "$@"
