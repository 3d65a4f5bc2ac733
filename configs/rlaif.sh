#!/usr/bin/env bash
# RLAIF (Lee et al. 2023, 2309.00267): preferences from an AI instead of people, and RL straight on its ratings.
#
# reported
#   The judge's prompt is a preamble, a sample and an ending. It is asked in both orders, averaged, so that a bias for
#   a place cancels. Labels are soft, and the reward model is trained on them with cross-entropy. RL follows. In
#   direct RLAIF the judge's expected rating, as -1 to 1, is the reward itself.
# reconstruction
#   The judge is our base, fine-tuned on demonstrations of judging. It rates from 0 to 5, not from 1 to 10. RL is PPO,
#   where the paper has REINFORCE. All sizes are ours.
#
# Effect to look for: how often judge and truth agree, and how often the judge contradicts itself when the two answers
# change places (printed by label). PPO on AI labels is above SFT in `write`, beside PPO on labels of (simulated)
# people.
#
#   bash configs/rlaif.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/rlaif.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
R=$OUT/rlaif

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --out $OUT/judging "$@"
python sft.py --init $OUT/base --data $OUT/judging/demos.jsonl --steps 1200 --batch 32 --lr 3e-3 --muon_lr 0.01 --out $OUT/judge "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --out $OUT/ppo "$@"
python reward.py label --policy $OUT/sft --judge $OUT/judge --out $R/pairs "$@"
python reward.py train --init $OUT/sft --data $R/pairs/pairs.jsonl --loss soft --epochs 2 --out $R/reward "$@"
python ppo.py --init $OUT/sft --reward $R/reward --out $R/ppo "$@"
python ppo.py --init $OUT/sft --reward $OUT/judge@rate --out $R/direct "$@"
python reward.py compare $OUT/sft $OUT/ppo $R/ppo $R/direct --proxy $R/reward --save $OUT/tables/rlaif.json "$@"
