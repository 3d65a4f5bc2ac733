#!/usr/bin/env bash
# Starling-7B (Zhu et al. 2024, COLM; the K-wise loss 2301.11270): a reward model from ranked lists of seven, and
# patient PPO.
#
# reported
#   Seven answers to each prompt are ranked. The loss is the K-wise (Plackett-Luce) likelihood of the whole ranking.
#   PPO trains the critic first. A constant is added to the reward of finished answers. Actor and critic are fully
#   tuned.
# reconstruction
#   The ranking is a noisy draw by the true reward. The constant is 1, and the first five steps are for the critic
#   alone. All sizes are ours.
#
# Effect to look for: the accuracy of two reward models from the same rankings, by all pairs and K-wise. PPO is above
# SFT.
#
#   bash configs/starling.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/starling.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
S=$OUT/starling

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --k 7 --n 1200 --out $S/ranked "$@"
python reward.py train --init $OUT/sft --data $S/ranked/pairs.jsonl --loss plackett_luce --epochs 3 --out $S/reward "$@"
python reward.py train --init $OUT/sft --data $S/ranked/pairs.jsonl --epochs 3 --out $S/all_pairs "$@"
python reward.py label --policy $OUT/sft --n 1000 --skip 2000 --scale 0 --flip 0 --out $S/held "$@"
python reward.py accuracy $S/reward $S/all_pairs --data $S/held/pairs.jsonl --save $OUT/tables/starling.accuracy.json "$@"
python ppo.py --init $OUT/sft --reward $S/reward --critic_warmup 5 --reward_shift 1 --steps 35 --out $S/ppo "$@"
python reward.py compare $OUT/sft $S/ppo --proxy $S/reward --save $OUT/tables/starling.json "$@"
