#!/usr/bin/env bash
# Self-Rewarding Language Models (Yuan et al. 2024, 2401.10020): one model answers, rates its own answers, and learns
# from that.
#
# reported
#   Fine-tuning is on answers, and on ratings by an additive rubric of 0 to 5 points. The model rates four samples a
#   prompt itself; the mean of three ratings counts. DPO sets the best against the worst, without ties. M1 to M3 are
#   its models.
# reconstruction
#   Prompts come from the toy, not from the model, and so does the rubric. The rating is its expectation under the
#   model, which is what a mean of many would be. DPO has an NLL term. All sizes are ours.
#
# Effect to look for: in samples `write` rises from M1 to M2, and again to M3. The rater has only seen whole sentences,
# and rates broken ones too high: at the default rate (5e-5) M3 ended below M1. The table of accuracy says what becomes
# of its judgement.
#
#   bash configs/self_rewarding.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/self_rewarding.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
S=$OUT/self_rewarding

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --kinds write,rate --n 32000 --out $S/judging "$@"
python sft.py --init $OUT/base --data $S/judging/demos.jsonl --steps 500 --lr 3e-3 --muon_lr 0.01 --out $S/m1 "$@"
python reward.py label --policy $OUT/sft --n 1000 --scale 0 --flip 0 --out $S/held "$@"
for round in 1 2; do
  python reward.py label --policy $S/m$round --k 4 --n 3000 --skip $((4000 * round)) --by $S/m$round@rate --select ends --scale 0 --flip 0 --out $S/pairs$round "$@"
  python dpo.py --init $S/m$round --data $S/pairs$round/pairs.jsonl --nll_coef 0.1 --lr 2e-5 --out $S/m$((round + 1)) "$@"
done
python reward.py accuracy $S/m1@rate $S/m2@rate $S/m3@rate --data $S/held/pairs.jsonl --save $OUT/tables/self_rewarding.accuracy.json "$@"
python reward.py compare $S/m1 $S/m2 $S/m3 --families write --save $OUT/tables/self_rewarding.json "$@"
python reward.py compare $S/m1 $S/m2 $S/m3 --data $S/judging/held_rate.jsonl --judge configs.judging:right --save $OUT/tables/self_rewarding.rates.json "$@"
