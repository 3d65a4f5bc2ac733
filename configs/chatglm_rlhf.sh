#!/usr/bin/env bash
# ChatGLM-RLHF (Hou et al. 2024, 2404.00934): a reward model that length cannot fool, and rewards relative to a reference answer.
#
#   reported        pairs balanced by length within buckets; a pull of the scores towards 0; PPO on r(x, y) - r(x, y_ref), which cancels
#                   what a prompt's answers have in common; a next-token loss against forgetting; and DPO on the same pairs
#   reconstruction  y_ref is a sample of the reference policy; the next-token loss is on pretraining documents; coefficients and all sizes
#
# Effect to look for: PPO above SFT, with less of its pretraining forgotten (nll) than in `ppo`, PPO without the three changes.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/chatglm_rlhf.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
G=$OUT/chatglm_rlhf

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python configs/chatglm_rlhf.py --data $OUT/pairs/pairs.jsonl --out $G/pairs "$@"
python reward.py train --init $OUT/sft --data $G/pairs/pairs.jsonl --center 0.01 --out $G/reward "$@"
python ppo.py --init $OUT/sft --reward $G/reward --minus_reference --ptx_coef 0.3 --out $G/ppo "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --out $OUT/ppo "$@"
python dpo.py --init $OUT/sft --data $G/pairs/pairs.jsonl --out $G/dpo "$@"
python reward.py compare $OUT/sft $OUT/ppo $G/ppo $G/dpo --proxy $G/reward "$@"
