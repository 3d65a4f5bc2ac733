#!/usr/bin/env bash
# "SFT memorizes, RL generalizes" (Chu et al. 2025, 2501.17161): train the same model on rule A, test it on rule B.
#
# reported
#   SFT and RL start from one SFT model. The test changes a rule of the task.
# reconstruction
#   The rule: sums of two steps in training, of three and four in the test. The common start has seen the long
#   ones. So the test is what each way makes of what it no longer trains on. SFT is on the usual demonstrations
#   (`sft`), and on ones that always think (`sft_think`): 200 steps. RL has 100.
#
# Effect to look for: in `arith2` all gain. What happens in `arith3` and `arith4` is the finding.
#
#   bash configs/sft_vs_rl.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/sft_vs_rl.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python sft.py --init $OUT/sft --families arith2 --steps 200 --lr 1e-3 --muon_lr 3e-3 --out $OUT/sft_vs_rl/sft "$@"
python sft.py --init $OUT/sft --families arith2 --think 1 --steps 200 --lr 1e-3 --muon_lr 3e-3 --out $OUT/sft_vs_rl/sft_think "$@"
python grpo.py --init $OUT/sft --families arith2 --steps 100 --out $OUT/sft_vs_rl/rl "$@"
python reward.py compare $OUT/sft $OUT/sft_vs_rl/sft $OUT/sft_vs_rl/sft_think $OUT/sft_vs_rl/rl --families arith2,arith3,arith4 --on arith3,arith4 --save $OUT/tables/sft_vs_rl.json "$@"
