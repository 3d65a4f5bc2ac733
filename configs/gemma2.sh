#!/usr/bin/env bash
# Gemma 2 (2024, 2408.00118; averaging: WARP, 2406.16768): RLHF whose settings a stronger rater picks, and an average
# of the runs.
#
# reported
#   The reward model is much larger than the policy. Strong raters choose hyper-parameters and notice hacking. Models
#   of different settings are averaged.
# reconstruction
#   The stronger rater is a reward model of the policy's size, trained on three times as many labels without noise. It
#   chooses among four KL coefficients. The average is along the arc (SLERP) between two of them, of whole weights.
#   (WARP averages differences to the start, with an EMA as anchor, and steps back towards the start.) All sizes are
#   ours.
#
# Effect to look for: under each of the last two tables, which run the truth, the proxy and the rater would pick.
#
#   bash configs/gemma2.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/gemma2.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
M=$OUT/gemma2

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --n 2000 --out $M/pairs "$@"
python reward.py train --init $OUT/sft --data $M/pairs/pairs.jsonl --epochs 2 --out $M/reward "$@"
python reward.py label --policy $OUT/sft --n 6000 --skip 2000 --flip 0 --scale 0 --out $M/rater_pairs "$@"
python reward.py train --init $OUT/sft --data $M/rater_pairs/pairs.jsonl --epochs 2 --out $M/rater "$@"
for beta in 0 0.05 0.1 0.3; do
  python ppo.py --init $OUT/sft --reward $M/reward --kl_coef $beta --steps 30 --out $M/ppo$beta "$@"
done
python configs/merge.py $M/ppo0.05 $M/ppo0.1 --slerp --out $M/average
python reward.py compare $OUT/sft $M/ppo0 $M/ppo0.05 $M/ppo0.1 $M/ppo0.3 $M/average --proxy $M/reward --save $OUT/tables/gemma2.proxy.json "$@"
python reward.py compare $OUT/sft $M/ppo0 $M/ppo0.05 $M/ppo0.1 $M/ppo0.3 $M/average --proxy $M/rater --save $OUT/tables/gemma2.rater.json "$@"
