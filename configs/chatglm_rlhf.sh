#!/usr/bin/env bash
# ChatGLM-RLHF (Hou et al. 2024, 2404.00934): a reward model that length cannot fool, and rewards relative to a
# reference answer.
#
# reported
#   Pairs are balanced by length, within buckets. Scores are pulled towards 0. PPO gets r(x, y) - r(x, y_ref), so what
#   all answers to a prompt have in common cancels. A next-token loss works against forgetting. DPO learns from the
#   same pairs.
# reconstruction
#   y_ref is a sample of the reference policy. The next-token loss is on pretraining documents. Coefficients and all
#   sizes are ours.
#
# Effect to look for: PPO is above SFT, and forgets less of its pretraining (nll) than `ppo`, which is PPO without the
# three changes.
#
#   bash configs/chatglm_rlhf.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/chatglm_rlhf.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
G=$OUT/chatglm_rlhf

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python configs/chatglm_rlhf.py --data $OUT/pairs/pairs.jsonl --out $G/pairs "$@"
python reward.py train --init $OUT/sft --data $G/pairs/pairs.jsonl --center 0.01 --epochs 2 --out $G/reward "$@"
python ppo.py --init $OUT/sft --reward $G/reward --minus_reference --ptx_coef 0.3 --out $G/ppo "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --out $OUT/ppo "$@"
python dpo.py --init $OUT/sft --data $G/pairs/pairs.jsonl --out $G/dpo "$@"
python reward.py compare $OUT/sft $OUT/ppo $G/ppo $G/dpo --proxy $G/reward --save $OUT/tables/chatglm_rlhf.json "$@"
