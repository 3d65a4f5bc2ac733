#!/usr/bin/env bash
# Con-J (Ye et al. 2024, 2410.03742): a judge that learns from its own judgements, those that came out right against those that did not.
#
#   reported        sampled judgements with a rationale; the correct verdict over the wrong one for DPO, with an SFT term
#   reconstruction  the first judge is our base, fine-tuned on few demonstrations; correct is what the true reward says; no hints where all
#                   samples agree (such questions are left out); all sizes
#
# Effect to look for: the share of right verdicts on held-out questions rises (in the first table; in the second without a rationale); label
# prints how often a verdict changes when the two answers change places.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/con_j.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
J=$OUT/con_j

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --kinds judge,reason --n 25600 --questions 4000 --out $J/judging "$@"
python sft.py --init $OUT/base --data $J/judging/demos.jsonl --steps 800 --batch 32 --out $J/judge "$@"
python reward.py label --policy $J/judge --data $J/judging/questions_reason.jsonl --by configs.judging:right --k 4 --n 4000 --select ends --scale 0 --flip 0 --out $J/pairs "$@"
python dpo.py --init $J/judge --data $J/pairs/pairs.jsonl --nll_coef 0.2 --out $J/con_j "$@"
python reward.py compare $J/judge $J/con_j --data $J/judging/held_reason.jsonl --judge configs.judging:right "$@"
python reward.py compare $J/judge $J/con_j --data $J/judging/held_judge.jsonl --judge configs.judging:right "$@"
python reward.py label --policy $OUT/sft --judge $J/judge --rationale --n 1000 --out $J/before "$@"
python reward.py label --policy $OUT/sft --judge $J/con_j --rationale --n 1000 --out $J/after "$@"
