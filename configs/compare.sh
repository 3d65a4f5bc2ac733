#!/usr/bin/env bash
# Every algorithm from the same start: one SFT model, one set of preferences, one reward model learned from them.
#
# DPO, IPO and KTO learn from the pairs with a reference, ORPO and SimPO without one. PPO learns from the reward
# model. On sums a verifier replaces the reward model, for PPO, and for GRPO, Dr. GRPO and RLOO, which need no value
# function.
#
# Effect to look for: the last table. It shows the true (gold) reward on held-out prompts of each family, the win rate
# over SFT, KL and length. A finished stage is skipped and an interrupted one continues, so running it again costs
# nothing.
#
#   bash configs/compare.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/compare.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --out $OUT/ppo "$@"
python ppo.py --init $OUT/sft --reward exact --families arith --out $OUT/ppo_arith "$@"
python grpo.py --init $OUT/sft --out $OUT/grpo "$@"
python grpo.py --init $OUT/sft --adv dr_grpo --per constant --out $OUT/dr_grpo "$@"
python grpo.py --init $OUT/sft --adv rloo --out $OUT/rloo "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/dpo "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --loss ipo --beta 0.1 --lr 1e-4 --out $OUT/ipo "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --loss kto --batch 64 --lr 1e-4 --out $OUT/kto "$@"
python orpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/orpo "$@"
python orpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --loss simpo --lr 5e-5 --out $OUT/simpo "$@"
python reward.py compare $OUT/sft $OUT/ppo $OUT/ppo_arith $OUT/grpo $OUT/dr_grpo $OUT/rloo $OUT/dpo $OUT/ipo $OUT/kto $OUT/orpo $OUT/simpo --proxy $OUT/reward "$@"
