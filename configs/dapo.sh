#!/usr/bin/env bash
# DAPO (Yu et al. 2025, 2503.14476): GRPO with four changes, against plain GRPO with as many updates.
#
#   reported        clip-higher (.2 below, .28 above), dynamic sampling (groups of equal rewards are replaced), the loss
#                   averaged over tokens, overlong reward shaping; no KL term
#   reconstruction  sizes and rates; 4 updates a rollout rather than 16; the last 16 of 80 tokens are the buffer
#
# Effect to look for: accuracy per update above GRPO's, at the price of more samples per step (`groups` in metrics.jsonl);
# zero_std stays at 0, where GRPO's rises as prompts become easy.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/dapo.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python grpo.py --init $OUT/sft --per response --minibatches 4 --steps 40 --out $OUT/dapo/grpo "$@"
python grpo.py --init $OUT/sft --per token --minibatches 4 --steps 40 --clip_high 0.28 --resample 3 --overlong 16 --out $OUT/dapo/dapo "$@"
python reward.py compare $OUT/sft $OUT/dapo/grpo $OUT/dapo/dapo --families arith,arith4 --on arith "$@"
