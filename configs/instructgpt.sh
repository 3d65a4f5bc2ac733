#!/usr/bin/env bash
# InstructGPT (Ouyang et al. 2022, 2203.02155): pretrain -> SFT -> reward model -> PPO, and PPO with pretraining mix.
#
#   reported        the three stages; all C(K,2) pairs of a prompt in one batch element; the critic started from the
#                   reward model; per-token KL in the reward; clip .2, γ = 1; one pass over each rollout; PPO-ptx adds
#                   γ_ptx times the pretraining loss to the same update
#   reconstruction  everything about size: K = 4 of 4-9 here, β and the learning rates are the toy's, and γ_ptx = 1,
#                   not 27.8: our losses are means per token, and the toy needs little
#
# Effect to look for: both PPO rows above SFT in `write`; the ptx row forgets less of the other families.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/instructgpt.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --k 4 --n 2000 --out $OUT/instructgpt/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/instructgpt/pairs/pairs.jsonl --out $OUT/instructgpt/reward "$@"
python ppo.py --init $OUT/sft --reward $OUT/instructgpt/reward --epochs 1 --out $OUT/instructgpt/ppo "$@"
python ppo.py --init $OUT/sft --reward $OUT/instructgpt/reward --epochs 1 --ptx_coef 1 --out $OUT/instructgpt/ppo_ptx "$@"
python reward.py compare $OUT/sft $OUT/instructgpt/ppo $OUT/instructgpt/ppo_ptx --proxy $OUT/instructgpt/reward "$@"
