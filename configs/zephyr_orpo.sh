#!/usr/bin/env bash
# Zephyr 141B (model card HuggingFaceH4/zephyr-orpo-141b-A35b-v0.1; ORPO, Hong et al. 2024, 2403.07691): a base model
# aligned in one stage by ORPO, without SFT.
#
# reported
#   ORPO on 7k preference pairs, straight from the base model.
# reconstruction
#   The pairs are sampled from the toy's SFT model, which is trained for nothing else. λ is 1, not .1 or .05.
#
# Effect to look for: from the base, one stage gives both what SFT gives (nll falls) and a preference (margin rises).
# Its true reward in `write` beats SFT's.
#
#   bash configs/zephyr_orpo.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/zephyr_orpo.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python orpo.py --init $OUT/base --data $OUT/pairs/pairs.jsonl --lr 5e-4 --out $OUT/zephyr_orpo/orpo "$@"
python reward.py compare $OUT/sft $OUT/base $OUT/zephyr_orpo/orpo --save $OUT/tables/zephyr_orpo.json "$@"
