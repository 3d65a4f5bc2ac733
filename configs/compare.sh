#!/usr/bin/env bash
# Four algorithms from the same start: one SFT model, one set of preferences, one reward model learned from them.
#
# PPO learns from the reward model, DPO from the pairs with a reference, ORPO without one. GRPO learns sums from a
# verifier and needs no value function. configs/variants.sh makes a second table, of their relatives.
#
# Effect to look for: the table, printed again as soon as a policy is ready; the last one is complete. It shows the true
# (gold) reward on held-out prompts of each family, the win rate over SFT, KL and length. A finished stage is skipped and
# an interrupted one continues, so running it again costs nothing.
#
#   bash configs/compare.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/compare.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
PAIRS=$OUT/pairs/pairs.jsonl
READY=("$OUT/sft")  # the policies in the table, in order
STAGE=0

stage() {  # NAME SCRIPT OPTIONS...: says how far we are, then runs it
  STAGE=$((STAGE + 1))
  echo "== stage $STAGE of 8: $1"
  python "${@:2}"
}
row() {  # POLICY OPTIONS...: adds a policy to the table
  READY+=("$1")
  python reward.py compare "${READY[@]}" --proxy $OUT/reward --save $OUT/tables/compare.json "${@:2}"
}

stage "pretraining" sft.py --loss_on all --init new --out $OUT/base "$@"
stage "supervised fine-tuning" sft.py --init $OUT/base --out $OUT/sft "$@"
stage "pairs of answers, labelled" reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
stage "a reward model" reward.py train --init $OUT/sft --data $PAIRS --out $OUT/reward "$@"
stage "DPO" dpo.py --init $OUT/sft --data $PAIRS --out $OUT/dpo "$@"
row $OUT/dpo --show 0 "$@"
stage "PPO" ppo.py --init $OUT/sft --reward $OUT/reward --out $OUT/ppo "$@"
row $OUT/ppo --show 0 "$@"
stage "GRPO, on sums" grpo.py --init $OUT/sft --out $OUT/grpo "$@"
row $OUT/grpo --show 0 "$@"
stage "ORPO" orpo.py --init $OUT/sft --data $PAIRS --out $OUT/orpo "$@"
row $OUT/orpo "$@"
