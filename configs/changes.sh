#!/usr/bin/env bash
# Change this, and the log does that: short runs, each with one option other than a plain run has. What every option does
# to the log was written down in changes.py before any of them ran.
#
# reported
#   Nothing. These are the options that one turns first, and what they do follows from the formulas of PPO (1707.06347),
#   GRPO (2402.03300), DPO (2305.18290) and ORPO (2403.07691).
# reconstruction
#   12 steps of PPO on 64 prompts, 24 of GRPO on 16 groups, 64 updates of DPO and of ORPO, 80 of the reward model.
#
# Effect to look for: in the table of tests/STUDY.md cover the figures, say which way the metric goes, and look.
#
#   bash configs/changes.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/changes.sh    in another folder than out/
# What came out: tests/STUDY.md.
set -euo pipefail
OUT=${OUT:-out}
C=$OUT/changes
SFT=$OUT/sft
PAIRS=$OUT/pairs/pairs.jsonl

# NAME OPTIONS...: a run in the folder of that name, which /"$@" begins with. Of an option said twice the last counts.
ppo() { python ppo.py --init $SFT --reward $OUT/reward --steps 12 --prompts 64 --eval_every 1000 --out $C/ppo/"$@"; }
grpo() { python grpo.py --init $SFT --steps 24 --prompts 16 --kl_coef 0.001 --warmup 2 --eval_every 1000 --out $C/grpo/"$@"; }
dpo() { python dpo.py --init $SFT --data $PAIRS --steps 64 --lr 1e-4 --eval_every 1000 --out $C/dpo/"$@"; }
orpo() { python orpo.py --init $SFT --data $PAIRS --steps 64 --eval_every 1000 --out $C/orpo/"$@"; }
reward() { python reward.py train --init $SFT --data $PAIRS --steps 80 --eval_every 1000 --out $C/reward/"$@"; }

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $SFT "$@"
python reward.py label --policy $SFT --out $OUT/pairs "$@"
python reward.py train --init $SFT --data $PAIRS --out $OUT/reward "$@"
python reward.py label --policy $SFT --n 300 --out $C/few "$@"
python reward.py label --policy $SFT --n 3000 --flip 0.5 --out $C/noise "$@"

ppo plain "$@"
ppo kl_0 --kl_coef 0 "$@"
ppo kl_1 --kl_coef 1 "$@"
ppo lr --lr 5e-4 "$@"
ppo epochs --epochs 6 "$@"
ppo minibatches --minibatches 4 "$@"
ppo clip --clip 0.02 "$@"
ppo lam --lam 0 "$@"
ppo whiten --whiten=false "$@"
ppo critic_lr --critic_lr 1e-5 "$@"
ppo critic_warmup --critic_warmup 6 "$@"
ppo entropy --entropy_coef 0.05 "$@"
ppo temperature --temperature 0.7 "$@"
ppo max_new --max_new 12 "$@"
ppo words --reward "$OUT/reward + 0.05*words" "$@"

grpo plain "$@"
grpo small --group 2 --prompts 64 "$@"
grpo large --group 32 --prompts 4 "$@"
grpo temperature --temperature 0.3 "$@"
grpo lr --lr 2e-5 "$@"
grpo collapse --lr 3e-3 --warmup 0 "$@"
grpo resample --resample 3 "$@"
grpo dr_grpo --adv dr_grpo "$@"
grpo epochs --epochs 4 "$@"
grpo kl --kl_coef 0.3 "$@"
grpo max_new --max_new 20 "$@"
grpo len_reward --len_reward 0.5 "$@"

dpo plain "$@"
dpo beta_low --beta 0.05 "$@"
dpo beta_high --beta 2 "$@"
dpo lr --lr 5e-4 "$@"
dpo nll --nll_coef 1 "$@"
dpo few --data $C/few/pairs.jsonl "$@"
dpo noise --data $C/noise/pairs.jsonl "$@"
dpo cdpo --loss cdpo --eps 0.3 "$@"

orpo plain "$@"
orpo lam_0 --orpo_lam 0 "$@"
orpo lam_10 --orpo_lam 10 "$@"

reward plain "$@"
reward few --data $C/few/pairs.jsonl "$@"
reward noise --data $C/noise/pairs.jsonl "$@"

python configs/changes.py --runs $C --save $OUT/tables/changes.json --out $C/table "$@"
