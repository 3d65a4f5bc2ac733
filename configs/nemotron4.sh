#!/usr/bin/env bash
# Nemotron-4 340B (Nvidia 2024, 2406.11704): staged SFT -> DPO with an SFT term -> three rounds of Reward-aware
# Preference Optimization (RPO, backward KL), on data the models themselves made.
#
#   reported        the stages and their order; the SFT term on the chosen answers; RPO regresses the implicit reward gap
#                   on the reward model's, each round starting from, and referring to, the round before
#   reconstruction  sizes and weights; the reward model that judges is a pairwise one, and one of five attributes is
#                   trained beside it (truth, subject, sentences, length, fillers); RPO's data sampled anew in every round
#
# Every pair that DPO and RPO learn from is self-generated and judged by the reward model; of human origin are the
# demonstrations and the labels behind the reward model.
# Effect to look for: the true reward in `write` grows from round to round while KL stays moderate; the model of five
# ratings explains most of the variance of each (val_r2), and its first score orders the pairs as well as the pairwise one.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/nemotron4.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --families arith --steps 200 --out $OUT/nemotron4/sft1 "$@"
python sft.py --init $OUT/nemotron4/sft1 --steps 500 --out $OUT/nemotron4/sft2 "$@"
python reward.py label --policy $OUT/nemotron4/sft2 --out $OUT/nemotron4/labels "$@"
python reward.py train --init $OUT/nemotron4/sft2 --data $OUT/nemotron4/labels/pairs.jsonl --out $OUT/nemotron4/reward "$@"
python reward.py label --policy $OUT/nemotron4/sft2 --by $OUT/nemotron4/reward --scale 0 --flip 0 --skip 8000 --n 2000 --out $OUT/nemotron4/pairs0 "$@"
python dpo.py --init $OUT/nemotron4/sft2 --data $OUT/nemotron4/pairs0/pairs.jsonl --nll_coef 0.2 --out $OUT/nemotron4/round0 "$@"
for round in 1 2 3; do
  python reward.py label --policy $OUT/nemotron4/round$((round - 1)) --by $OUT/nemotron4/reward --scale 0 --flip 0 --skip $((8000 + round * 2048)) --n 2000 --out $OUT/nemotron4/pairs$round "$@"
  python dpo.py --init $OUT/nemotron4/round$((round - 1)) --data $OUT/nemotron4/pairs$round/pairs.jsonl --loss rpo_backward --nll_coef 0.2 --out $OUT/nemotron4/round$round "$@"
done
python configs/nemotron4.py gold named sentences words "-1*no_filler" --data $OUT/nemotron4/labels/pairs.jsonl --out $OUT/nemotron4/ratings "$@"
python reward.py train --init $OUT/nemotron4/sft2 --data $OUT/nemotron4/ratings/ratings.jsonl --loss ratings --heads 5 --out $OUT/nemotron4/rated "$@"
python reward.py label --policy $OUT/nemotron4/sft2 --scale 0 --flip 0 --skip 17000 --n 1000 --out $OUT/nemotron4/held "$@"
python reward.py accuracy $OUT/nemotron4/reward $OUT/nemotron4/rated --data $OUT/nemotron4/held/pairs.jsonl "$@"
python reward.py compare $OUT/nemotron4/sft2 $OUT/nemotron4/round0 $OUT/nemotron4/round1 $OUT/nemotron4/round2 $OUT/nemotron4/round3 --proxy $OUT/nemotron4/reward "$@"
