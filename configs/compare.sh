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
#
# On a GPU, which one toy model does not keep busy, the four learn side by side; GPU= in front, and they do not.
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
PAIRS=$OUT/pairs/pairs.jsonl
READY=("$OUT/sft")  # the policies in the table, in order
STAGE=0
GPU=${GPU-$(python -c "import torch; print(torch.cuda.is_available() or '')")}
if [[ " $* " == *" --device cpu "* ]]; then GPU=; fi
RUNNING=            # processes that learn aside
trap 'kill $RUNNING 2> /dev/null || true' EXIT

begin() {  # NAME: says how far we are
  STAGE=$((STAGE + 1))
  echo "== stage $STAGE of 8: $1"
}
stage() {  # NAME SCRIPT OPTIONS...: runs it
  begin "$1"
  python "${@:2}"
}
learn() {  # FOLDER NAME SCRIPT OPTIONS...: a policy
  READY+=("$OUT/$1")
  if [ "$GPU" ]; then
    begin "$2, aside; what it prints is in $OUT/$1.log"
    python "$3" --out $OUT/$1 "${@:4}" > $OUT/$1.log 2>&1 &
    RUNNING="$RUNNING $!"
  else
    stage "$2" "$3" --out $OUT/$1 "${@:4}"
  fi
}
row() {  # OPTIONS...: the table of the policies that are ready
  if [ -z "$RUNNING" ]; then
    python reward.py compare "${READY[@]}" --proxy $OUT/reward --save $OUT/tables/compare.json "$@"
  fi
}

stage "pretraining" sft.py --loss_on all --init new --out $OUT/base "$@"
stage "supervised fine-tuning" sft.py --init $OUT/base --out $OUT/sft "$@"
stage "pairs of answers, labelled" reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
stage "a reward model" reward.py train --init $OUT/sft --data $PAIRS --out $OUT/reward "$@"
learn dpo "DPO" dpo.py --init $OUT/sft --data $PAIRS "$@"
row --show 0 "$@"
learn ppo "PPO" ppo.py --init $OUT/sft --reward $OUT/reward "$@"
row --show 0 "$@"
learn grpo "GRPO, on sums" grpo.py --init $OUT/sft "$@"
row --show 0 "$@"
learn orpo "ORPO" orpo.py --init $OUT/sft --data $PAIRS "$@"
for process in $RUNNING; do wait $process || { tail -n 3 $OUT/*.log; exit 1; }; done
RUNNING=
row "$@"
