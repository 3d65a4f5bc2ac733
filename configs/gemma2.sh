#!/usr/bin/env bash
# Gemma 2 (2024, 2408.00118; averaging: WARP, 2406.16768): RLHF whose settings a stronger rater picks, and an average of the runs.
#
#   reported        RLHF on a reward model much larger than the policy; strong raters to choose hyper-parameters and to notice hacking;
#                   an average of models from different settings
#   reconstruction  the stronger rater is a reward model of three times as many labels without noise, of the policy's size; four KL
#                   coefficients to choose from; the average is along the arc (SLERP) between two of them, of whole weights (WARP:
#                   of differences to the start, with an EMA as anchor, and a step back towards the start); all sizes
#
# Effect to look for: under each last table, which run truth, proxy and rater would pick.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/gemma2.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
M=$OUT/gemma2

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --n 2000 --out $M/pairs "$@"
python reward.py train --init $OUT/sft --data $M/pairs/pairs.jsonl --out $M/reward "$@"
python reward.py label --policy $OUT/sft --n 6000 --skip 2000 --flip 0 --scale 0 --out $M/rater_pairs "$@"
python reward.py train --init $OUT/sft --data $M/rater_pairs/pairs.jsonl --out $M/rater "$@"
for beta in 0 0.05 0.1 0.3; do
  python ppo.py --init $OUT/sft --reward $M/reward --kl_coef $beta --out $M/ppo$beta "$@"
done
python configs/merge.py $M/ppo0.05 $M/ppo0.1 --slerp --out $M/average
python reward.py compare $OUT/sft $M/ppo0 $M/ppo0.05 $M/ppo0.1 $M/ppo0.3 $M/average --proxy $M/reward "$@"
python reward.py compare $OUT/sft $M/ppo0 $M/ppo0.05 $M/ppo0.1 $M/ppo0.3 $M/average --proxy $M/rater "$@"
