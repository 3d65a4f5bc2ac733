#!/usr/bin/env bash
# Superficial patterns: a reward model learns style where style goes with quality. An experiment of our own; on
# choosing data for reward models see Skywork-Reward (2410.18451).
#
# reported
#   Nothing of this.
# reconstruction
#   All of it. The style is a "Sure. " in front. Confounded pairs have it on the better answer, decoupled ones on the
#   worse, balanced ones on either.
#
# Effect to look for: the model of confounded labels is right on ordinary pairs (the better answer has the style) and
# wrong on decoupled ones. The model of balanced labels does as well on both, on average over seeds.
#
#   bash configs/superficial.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/superficial.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
P=$OUT/superficial

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --n 4000 --out $P/plain "$@"
python configs/superficial.py --data $P/plain/pairs.jsonl --better 1 --out $P/confounded "$@"
python configs/superficial.py --data $P/plain/pairs.jsonl --better 0.5 --out $P/balanced "$@"
python reward.py train --init $OUT/sft --data $P/confounded/pairs.jsonl --epochs 2 --out $P/reward_confounded "$@"
python reward.py train --init $OUT/sft --data $P/balanced/pairs.jsonl --epochs 2 --out $P/reward_balanced "$@"
python reward.py label --policy $OUT/sft --n 1000 --skip 4000 --scale 0 --flip 0 --out $P/held "$@"
python configs/superficial.py --data $P/held/pairs.jsonl --better 1 --out $P/ordinary "$@"
python configs/superficial.py --data $P/held/pairs.jsonl --better 0 --out $P/decoupled "$@"
python reward.py accuracy $P/reward_confounded $P/reward_balanced --data $P/ordinary/pairs.jsonl,$P/decoupled/pairs.jsonl --save $OUT/tables/superficial.json "$@"
