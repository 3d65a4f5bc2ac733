#!/usr/bin/env bash
# Con-J (Ye et al. 2024, 2410.03742): a judge that learns from its own judgements.
#
# reported
#   The judge samples judgements with a rationale. DPO sets the right verdict against the wrong one, with an SFT term.
# reconstruction
#   The first judge is our base, fine-tuned on few demonstrations. The true reward says which verdict is right.
#   Questions on which all samples agree are left out; the paper gives hints there. All sizes are ours.
#
# Effect to look for: hardly more verdicts on held-out questions are right (in the first table; in the second without a
# rationale). label prints how often a verdict changes when the two answers change places.
#
#   bash configs/con_j.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/con_j.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
J=$OUT/con_j

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --kinds judge,reason --n 25600 --questions 4000 --out $J/judging "$@"
python sft.py --init $OUT/base --data $J/judging/demos.jsonl --steps 800 --batch 32 --lr 3e-3 --muon_lr 0.01 --out $J/judge "$@"
python reward.py label --policy $J/judge --data $J/judging/questions_reason.jsonl --by configs.judging:right --k 4 --n 4000 --select ends --scale 0 --flip 0 --out $J/pairs "$@"
python dpo.py --init $J/judge --data $J/pairs/pairs.jsonl --nll_coef 0.2 --out $J/con_j "$@"
python reward.py compare $J/judge $J/con_j --data $J/judging/held_reason.jsonl --judge configs.judging:right --save $OUT/tables/con_j.reason.json "$@"
python reward.py compare $J/judge $J/con_j --data $J/judging/held_judge.jsonl --judge configs.judging:right --save $OUT/tables/con_j.judge.json "$@"
python reward.py label --policy $OUT/sft --judge $J/judge --rationale --n 1000 --out $J/before "$@"
python reward.py label --policy $OUT/sft --judge $J/con_j --rationale --n 1000 --out $J/after "$@"
