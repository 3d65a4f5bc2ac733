#!/usr/bin/env bash
# Reka (2024, 2404.12387): InstructGPT's stages, with more than one round of RLHF.
#
# reported
#   SFT, then several rounds of RLHF with PPO.
# reconstruction
#   Two rounds. The second reward model learns from 8,000 labels of the first policy's samples, and from the old ones.
#   All sizes are ours.
#
# Effect to look for: the second round gains again in `write`, in samples. (With 3,000 new labels, on one seed, two
# thirds as much.)
#
#   bash configs/reka.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/reka.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
K=$OUT/reka

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --out $OUT/ppo "$@"
python reward.py label --policy $OUT/ppo --n 8000 --skip 8000 --out $K/pairs2 "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl,$K/pairs2/pairs.jsonl --epochs 2 --out $K/reward2 "$@"
python ppo.py --init $OUT/ppo --reward $K/reward2 --out $K/ppo2 "$@"
python reward.py compare $OUT/sft $OUT/ppo $K/ppo2 --proxy $K/reward2 --save $OUT/tables/reka.json "$@"
