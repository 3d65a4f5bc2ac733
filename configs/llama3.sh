#!/usr/bin/env bash
# Llama 3 (Grattafiori et al. 2024, 2407.21783, sec. 4.1): rounds of reward model, rejection sampling, SFT and DPO.
#
# reported
#   The stages. The best of K = 10 to 30 samples by the reward model becomes SFT data. DPO is on the latest
#   preferences, only those that are clearly better. Format tokens are masked in both answers, and .2 times the NLL of
#   the chosen is added. Weights are averaged over runs with other data or hyper-parameters.
# reconstruction
#   Two rounds of six. K is 10. SFT goes on from the last policy, the reward model from SFT. There is no third tier of
#   edited answers. A pair is clear if its true scores are .3 apart, flipped labels included. Only the two DPO runs
#   are averaged. The end token is the toy's only format token. Sizes, rates and β are ours.
#
# Effect to look for: in samples each round beats the one before. The second table compares round 2 with round 1.
#
#   bash configs/llama3.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/llama3.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
policy=$OUT/sft
for round in 1 2; do
  dir=$OUT/llama3/round$round
  python reward.py label --policy $policy --min_gap 0.3 --n 6000 --skip $((round * 8000)) --out $dir/pairs "$@"
  python reward.py train --init $OUT/sft --data $dir/pairs/pairs.jsonl --epochs 2 --out $dir/reward "$@"
  python reward.py label --policy $policy --by $dir/reward --k 10 --select best --n 2000 --skip $((round * 8000 + 6000)) --scale 0 --flip 0 --out $dir/best "$@"
  python sft.py --init $policy --data $dir/best/pairs.jsonl --steps 30 --lr 1e-4 --muon_lr 1e-3 --out $dir/sft "$@"
  for lr in 5e-5 1e-4; do
    python dpo.py --init $dir/sft --data $dir/pairs/pairs.jsonl --mask_end --nll_coef 0.2 --lr $lr --out $dir/dpo_$lr "$@"
  done
  python configs/merge.py $dir/dpo_5e-5 $dir/dpo_1e-4 --out $dir/policy
  policy=$dir/policy
done
python reward.py compare $OUT/sft $OUT/llama3/round1/policy $OUT/llama3/round2/policy --save $OUT/tables/llama3.json "$@"
python reward.py compare $OUT/llama3/round1/policy $OUT/llama3/round2/policy --families write --save $OUT/tables/llama3.rounds.json "$@"
