#!/usr/bin/env bash
# Relatives of what compare.sh trains, from its SFT model, its pairs and its reward model.
#
# On the pairs: KTO, for which each answer is good or bad by itself; SimPO, which has no reference; IPO. On sums: PPO
# with the verifier and a value function, and GRPO's relatives without one, Dr. GRPO and RLOO. GRPO is in the
# table, too, trained for as many steps.
#
# Effect to look for: `write` of the first three, and how short SimPO's answers become. `arith` of the others: the three
# without a value function end alike; PPO is two of a hundred behind, with a quarter of the samples.
#
#   bash configs/variants.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/variants.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
PAIRS=$OUT/pairs/pairs.jsonl

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $PAIRS --out $OUT/reward "$@"
python dpo.py --init $OUT/sft --data $PAIRS --loss kto --batch 64 --out $OUT/kto "$@"
python orpo.py --init $OUT/sft --data $PAIRS --loss simpo --lr 5e-5 --out $OUT/simpo "$@"
python dpo.py --init $OUT/sft --data $PAIRS --loss ipo --beta 0.1 --lr 1e-4 --out $OUT/ipo "$@"
python ppo.py --init $OUT/sft --reward exact --families arith --out $OUT/ppo_arith "$@"
python grpo.py --init $OUT/sft --out $OUT/grpo "$@"
python grpo.py --init $OUT/sft --adv dr_grpo --per constant --out $OUT/dr_grpo "$@"
python grpo.py --init $OUT/sft --adv rloo --out $OUT/rloo "$@"
python reward.py compare $OUT/sft $OUT/kto $OUT/simpo $OUT/ipo $OUT/ppo_arith $OUT/grpo $OUT/dr_grpo $OUT/rloo --proxy $OUT/reward --save $OUT/tables/variants.json "$@"
