#!/usr/bin/env bash
# DAPO (Yu et al. 2025, 2503.14476): GRPO with four changes, against plain GRPO with as many updates.
#
# reported
#   The clip is higher above than below (.28, .2). Groups of equal rewards are replaced by others (dynamic sampling).
#   The loss is a mean over tokens. Overlong answers lose reward step by step. There is no KL term.
# reconstruction
#   Sizes and rates are ours. There are 4 updates a rollout rather than 16. The last 16 of 80 tokens are the buffer.
#
# Effect to look for: more sums of four steps are right than with GRPO after as many updates. The price is more
# samples a step (`groups` in metrics.jsonl). zero_std stays at 0, where GRPO's rises as prompts become easy.
#
#   bash configs/dapo.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/dapo.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python grpo.py --init $OUT/sft --per response --minibatches 4 --steps 40 --out $OUT/dapo/grpo "$@"
python grpo.py --init $OUT/sft --per token --minibatches 4 --steps 40 --clip_high 0.28 --resample 3 --overlong 16 --out $OUT/dapo/dapo "$@"
python reward.py compare $OUT/sft $OUT/dapo/grpo $OUT/dapo/dapo --families arith,arith4 --on arith --save $OUT/tables/dapo.json "$@"
