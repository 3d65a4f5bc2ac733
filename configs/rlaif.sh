#!/usr/bin/env bash
# RLAIF (Lee et al. 2023, 2309.00267): preferences from an AI instead of people, and RL straight on its ratings.
#
#   reported        the judge's prompt of preamble, sample and ending; both orders, averaged, so that a bias for a place
#                   cancels; soft labels, on which the reward model is trained with cross-entropy; RL; and direct RLAIF, where
#                   the judge's expected rating, as -1..1, is the reward itself
#   reconstruction  the judge is our base, fine-tuned on demonstrations of judging; it rates from 0 to 5, not from 1 to 10; PPO where the paper has REINFORCE; all sizes
#
# Effect to look for: how often judge and truth agree, and how often it contradicts itself when the two answers change
# places (printed by label); PPO on AI labels above SFT in `write`, beside PPO on labels of (simulated) people.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/rlaif.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
R=$OUT/rlaif

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --out $OUT/judging "$@"
python sft.py --init $OUT/base --data $OUT/judging/demos.jsonl --steps 1200 --batch 32 --out $OUT/judge "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --out $OUT/ppo "$@"
python reward.py label --policy $OUT/sft --judge $OUT/judge --out $R/pairs "$@"
python reward.py train --init $OUT/sft --data $R/pairs/pairs.jsonl --loss soft --out $R/reward "$@"
python ppo.py --init $OUT/sft --reward $R/reward --out $R/ppo "$@"
python ppo.py --init $OUT/sft --reward $OUT/judge@rate --out $R/direct "$@"
python reward.py compare $OUT/sft $OUT/ppo $R/ppo $R/direct --proxy $R/reward "$@"
