#!/usr/bin/env bash
# Hermes 3 (Teknium et al. 2024, 2408.11857): SFT -> DPO of a LoRA adapter, whose reference is the model without it.
#
#   reported        for the 8B model, the two stages; an adapter of rank 32, α 16, on all linear layers, no second model
#   reconstruction  rank 16 of a width of 128; Muon instead of RMSProp (AdamW did worse); an NLL term, without which
#                   the adapter drifts; adapter dropout and NEFTune are left out
#
# Effect to look for: the adapter's row comes near full DPO's with 15 % of its trained parameters and 7 % of its optimizer
# memory (Muon keeps one number a parameter, AdamW two).
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/hermes3.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/dpo "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --lora_r 16 --optimizer muon --nll_coef 0.2 --out $OUT/hermes3/dpo_lora "$@"
python reward.py compare $OUT/sft $OUT/dpo $OUT/hermes3/dpo_lora "$@"
