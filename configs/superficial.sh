#!/usr/bin/env bash
# Superficial patterns: a reward model learns style where style goes with quality (an experiment of our own; on choosing data
# for reward models: Skywork-Reward, 2410.18451).
#
#   reported        nothing of this
#   reconstruction  all: the style is a "Sure. " in front; decoupled pairs have it on the worse answer, balanced ones on either
#
# Effect to look for: on ordinary pairs (the better answer has the style) and on decoupled ones, the model of confounded
# labels is right and then wrong; that of balanced labels does as well on both.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/superficial.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
P=$OUT/superficial

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --n 4000 --out $P/plain "$@"
python configs/superficial.py --data $P/plain/pairs.jsonl --better 1 --out $P/confounded "$@"
python configs/superficial.py --data $P/plain/pairs.jsonl --better 0.5 --out $P/balanced "$@"
python reward.py train --init $OUT/sft --data $P/confounded/pairs.jsonl --out $P/reward_confounded "$@"
python reward.py train --init $OUT/sft --data $P/balanced/pairs.jsonl --out $P/reward_balanced "$@"
python reward.py label --policy $OUT/sft --n 1000 --skip 4000 --scale 0 --flip 0 --out $P/held "$@"
python configs/superficial.py --data $P/held/pairs.jsonl --better 1 --out $P/ordinary "$@"
python configs/superficial.py --data $P/held/pairs.jsonl --better 0 --out $P/decoupled "$@"
python reward.py accuracy $P/reward_confounded $P/reward_balanced --data $P/ordinary/pairs.jsonl,$P/decoupled/pairs.jsonl "$@"
