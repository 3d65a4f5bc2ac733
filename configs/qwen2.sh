#!/usr/bin/env bash
# Qwen2 (Yang et al. 2024, 2407.10671): offline DPO, then online DPO on the policy's own samples, with the Online
# Merging Optimizer (Lu et al. 2024, 2405.17931; configs/qwen2.py) against the alignment tax.
#
# reported
#   The two stages. Of several samples a prompt the reward model's best is set against its worst. The optimizer mixes
#   what fine-tuning changed into every update.
# reconstruction
#   The reward model learns from rankings of the offline policy's samples. Of the two variants it is OnDARE. What
#   fine-tuning changed is the offline stage minus the base. α, the share kept and all sizes are ours.
#
# Effect to look for: the online stage gains true reward, while as many further offline pairs with the same judge
# (`more`) end below SFT. With merging the KL is two thirds of that, and `online_dropping` (α = 0) shows that the
# dropping alone does it.
#
#   bash configs/qwen2.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/qwen2.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python dpo.py --init $OUT/sft --data $OUT/pairs/pairs.jsonl --steps 100 --out $OUT/qwen2/offline "$@"

python reward.py label --policy $OUT/qwen2/offline --k 4 --n 4000 --skip 8000 --out $OUT/qwen2/labels "$@"
python reward.py train --init $OUT/sft --data $OUT/qwen2/labels/pairs.jsonl --epochs 2 --out $OUT/qwen2/reward "$@"
python reward.py label --policy $OUT/sft --by $OUT/qwen2/reward --k 4 --select ends --n 3400 --skip 8000 --scale 0 --flip 0 --out $OUT/qwen2/pairs "$@"
python dpo.py --init $OUT/qwen2/offline --data $OUT/qwen2/pairs/pairs.jsonl --steps 100 --lr 1e-4 --out $OUT/qwen2/more "$@"
python dpo.py --init $OUT/qwen2/offline --online --data toy --reward $OUT/qwen2/reward --k 4 --steps 100 --lr 1e-4 --out $OUT/qwen2/online "$@"
python configs/qwen2.py --init $OUT/qwen2/offline --online --data toy --reward $OUT/qwen2/reward --k 4 --steps 100 --lr 1e-4 --merge_base $OUT/base --out $OUT/qwen2/online_merging "$@"
python configs/qwen2.py --init $OUT/qwen2/offline --online --data toy --reward $OUT/qwen2/reward --k 4 --steps 100 --lr 1e-4 --merge_base $OUT/base --merge_alpha 0 --out $OUT/qwen2/online_dropping "$@"
python reward.py compare $OUT/sft $OUT/qwen2/offline $OUT/qwen2/more $OUT/qwen2/online $OUT/qwen2/online_merging $OUT/qwen2/online_dropping --proxy $OUT/qwen2/reward --save $OUT/tables/qwen2.json "$@"
