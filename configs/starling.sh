#!/usr/bin/env bash
# Starling-7B (Zhu et al. 2024, COLM; the K-wise loss 2301.11270): a reward model from ranked lists of seven, and PPO that takes its time.
#
#   reported        seven answers to each prompt, ranked; the K-wise (Plackett-Luce) likelihood of the whole ranking; PPO with the
#                   critic trained first; a constant added to the reward of finished answers; actor and critic fully tuned
#   reconstruction  the ranking is a noisy draw by the true reward; the constant 1 and five critic-only steps; all sizes
#
# Effect to look for: accuracy of the two reward models from the same rankings, all pairs and K-wise; PPO above SFT.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/starling.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
S=$OUT/starling

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --k 7 --n 1200 --out $S/ranked "$@"
python reward.py train --init $OUT/sft --data $S/ranked/pairs.jsonl --loss plackett_luce --epochs 3 --out $S/reward "$@"
python reward.py train --init $OUT/sft --data $S/ranked/pairs.jsonl --epochs 3 --out $S/all_pairs "$@"
python reward.py label --policy $OUT/sft --n 1000 --skip 2000 --scale 0 --flip 0 --out $S/held "$@"
python reward.py accuracy $S/reward $S/all_pairs --data $S/held/pairs.jsonl "$@"
python ppo.py --init $OUT/sft --reward $S/reward --critic_warmup 5 --reward_shift 1 --steps 35 --out $S/ppo "$@"
python reward.py compare $OUT/sft $S/ppo --proxy $S/reward "$@"
