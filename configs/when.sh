#!/usr/bin/env bash
# When DPO, when PPO, when GRPO? All on the same data: one SFT model and one set of pairs. DPO learns from the pairs, the
# others from the reward model that learned from the same pairs. What is compared is the true reward at equal KL, and at
# equal compute.
#
# reported
#   Gold and proxy reward against d = √KL (Gao et al. 2022, 2210.10760). Online methods reach more reward than offline
#   ones at an equal KL (Tang et al. 2024, 2405.08448), PPO more than DPO in most settings when tuned (Xu et al. 2024,
#   2404.10719).
# reconstruction
#   Each point of a curve is a finished run of so many updates, with its rate falling to the end and no KL penalty (DPO: a
#   small β). Two rates a method; at each KL and each budget the one counts that the validation split prefers there. All
#   are asked the same 400 test prompts. RL samples 64 answers an update: PPO 64 prompts, GRPO 8 with a group of 8, online
#   DPO 32 with two. Best-of-n stands beside them.
#
# Effect to look for: at little KL all are close, and who has the pairs needs no reward model. At large KL the proxy goes
# on rising while gold falls: at which KL does that begin for each of them? At equal compute: is DPO ahead at first,
# since it samples nothing, and does what samples pass it later? `greedy` says what of a gain is not only sharper sampling.
#
#   bash configs/when.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/when.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
W=$OUT/when
SFT=$OUT/sft
PAIRS=$OUT/pairs/pairs.jsonl
RUNS=($SFT)
METHODS=()

learn() {  # METHOD SCRIPT "RATES..." "STEPS..." OPTIONS...: trains it for so many steps, at every rate
  for lr in $3; do
    for steps in $4; do
      python "$2" --init $SFT --lr $lr --steps $steps --eval_every 1000 --out $W/$1/$lr/$steps "${@:5}"
      RUNS+=($W/$1/$lr/$steps)
    done
  done
  METHODS+=($W/$1)
}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $SFT "$@"
python reward.py label --policy $SFT --out $OUT/pairs "$@"
python reward.py train --init $SFT --data $PAIRS --out $OUT/reward "$@"
learn dpo dpo.py "1e-4 2e-4" "16 32 64 128" --data $PAIRS --beta 0.05 "$@"
learn online_dpo dpo.py "1.5e-4 3e-4" "4 8 16 32" --online --data toy --reward $OUT/reward --beta 0.05 "$@"
learn ppo ppo.py "1e-4 2e-4" "4 8 16 32" --reward $OUT/reward --prompts 64 --epochs 1 --kl_coef 0 "$@"
learn grpo grpo.py "1e-4 2e-4" "4 8 16 32" --reward $OUT/reward --families write --prompts 8 --warmup 0 "$@"
python reward.py compare "${RUNS[@]}" --split val --families write --n 200 --show 0 --save $W/val.json "$@"
python reward.py compare "${RUNS[@]}" --proxy $OUT/reward --families write --show 0 --save $W/test.json "$@"
python reward.py compare $SFT --proxy $OUT/reward --families write --samples 16 --show 0 --save $W/best_of.json "$@"
python configs/when.py "${METHODS[@]}" --val $W/val.json --test $W/test.json --best_of $W/best_of.json --data $PAIRS --save $OUT/tables/when.json --out $W/curves "$@"
