#!/usr/bin/env bash
# Hermes 3 (Teknium et al. 2024, 2408.11857): SFT, then DPO of a LoRA adapter, whose reference is the model without it.
#
# reported
#   For the 8B model: the two stages. The adapter has rank 32 and α 16, on all linear layers. There is no second model.
# reconstruction
#   Rank 8 of a width of 128, at twenty times full DPO's rate. The optimizer is AdamW. Adapter dropout, RMSProp and
#   NEFTune are left out.
#
# Effect to look for: the adapter gains most of what full DPO gains, with 7 % of its trained parameters and of its
# optimizer memory. It goes further to get there: look at the KL.
#
#   bash configs/hermes3.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/hermes3.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/dpo "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --lora_r 8 --lr 1e-3 --out $OUT/hermes3/dpo_lora "$@"
python reward.py compare $OUT/sft $OUT/dpo $OUT/hermes3/dpo_lora --save $OUT/tables/hermes3.json "$@"
