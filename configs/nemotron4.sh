#!/usr/bin/env bash
# Nemotron-4 340B (Nvidia 2024, 2406.11704): SFT in stages, DPO with an SFT term, and three rounds of Reward-aware
# Preference Optimization (RPO, backward KL), on data that the models made themselves.
#
# reported
#   The stages and their order. The SFT term is on the chosen answers. RPO regresses the implicit reward gap on the
#   reward model's. Each round starts from the round before, and refers to it.
# reconstruction
#   Sizes and weights are ours. The reward model that judges is a pairwise one. One of five attributes (truth, subject,
#   sentences, length, fillers) is trained beside it. RPO's data is sampled anew in every round.
#
# Every pair that DPO and RPO learn from is self-generated and judged by the reward model. Of human origin are the
# demonstrations and the labels behind the reward model.
#
# Effect to look for: the true reward in `write` grows with DPO and the first round, then hardly or no longer, while the
# proxy does. The model of five ratings explains nearly all of the variance of length and fillers (val_r2), and its
# first score orders the pairs as well as the pairwise one.
#
#   bash configs/nemotron4.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/nemotron4.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --families arith --steps 200 --out $OUT/nemotron4/sft1 "$@"
python sft.py --init $OUT/nemotron4/sft1 --steps 500 --out $OUT/nemotron4/sft2 "$@"
python reward.py label --policy $OUT/nemotron4/sft2 --out $OUT/nemotron4/labels "$@"
python reward.py train --init $OUT/nemotron4/sft2 --data $OUT/nemotron4/labels/pairs.jsonl --epochs 2 --out $OUT/nemotron4/reward "$@"
python reward.py label --policy $OUT/nemotron4/sft2 --by $OUT/nemotron4/reward --scale 0 --flip 0 --skip 8000 --n 2000 --out $OUT/nemotron4/pairs0 "$@"
python dpo.py --init $OUT/nemotron4/sft2 --data $OUT/nemotron4/pairs0/pairs.jsonl --nll_coef 0.2 --out $OUT/nemotron4/round0 "$@"
for round in 1 2 3; do
  python reward.py label --policy $OUT/nemotron4/round$((round - 1)) --by $OUT/nemotron4/reward --scale 0 --flip 0 --skip $((8000 + round * 2048)) --n 2000 --out $OUT/nemotron4/pairs$round "$@"
  python dpo.py --init $OUT/nemotron4/round$((round - 1)) --data $OUT/nemotron4/pairs$round/pairs.jsonl --loss rpo_backward --nll_coef 0.2 --out $OUT/nemotron4/round$round "$@"
done
python configs/nemotron4.py gold configs.reward_hacking:named configs.reward_hacking:sentences words "-1*no_filler" --data $OUT/nemotron4/labels/pairs.jsonl --out $OUT/nemotron4/ratings "$@"
python reward.py train --init $OUT/nemotron4/sft2 --data $OUT/nemotron4/ratings/ratings.jsonl --loss ratings --heads 5 --epochs 2 --out $OUT/nemotron4/rated "$@"
python reward.py label --policy $OUT/nemotron4/sft2 --scale 0 --flip 0 --skip 17000 --n 1000 --out $OUT/nemotron4/held "$@"
python reward.py accuracy $OUT/nemotron4/reward $OUT/nemotron4/rated --data $OUT/nemotron4/held/pairs.jsonl --save $OUT/tables/nemotron4.accuracy.json "$@"
python reward.py compare $OUT/nemotron4/sft2 $OUT/nemotron4/round0 $OUT/nemotron4/round1 $OUT/nemotron4/round2 $OUT/nemotron4/round3 --proxy $OUT/nemotron4/reward --save $OUT/tables/nemotron4.json "$@"
