#!/usr/bin/env bash
# DeepSeek-R1 (2025, 2501.12948, version 1, sec. 2.3): cold start, RL on reasoning, SFT of the base on its samples, RL
# on all.
#
# reported
#   (1) A little SFT of the base, on long chains of thought.
#   (2) GRPO. The reward is the verifier's verdict plus the share of words in the target language, and a format reward.
#   (3) Samples of (2), without the wrong and the badly formed, plus general data: SFT of the *base* again.
#   (4) GRPO on everything. Rules judge reasoning, reward models the rest. Helpfulness is judged by what follows the
#       thinking, harmlessness by all of it.
# reconstruction
#   Sizes and rates are ours. The general data are the best of 4 samples by the reward model; theirs is a curated set.
#   One reward model plays both roles. Only (4) has a KL term. Toy sums hold no words that could be mixed, so the
#   language reward is full from the start.
#
# Effect to look for: (2) leaves a third of the wrong sums. (3) keeps that from a fresh start, and brings the other
# families. (4) raises what the reward model likes, and fewer unsafe requests are helped. The second table is about the
# format.
#
#   bash configs/deepseek_r1.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/deepseek_r1.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
R1=$OUT/deepseek_r1

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --think 1 --steps 80 --out $R1/cold "$@"
python grpo.py --init $R1/cold --reward "exact + 0.1*format + 0.1*language" --steps 150 --out $R1/rl "$@"

python reward.py label --policy $R1/cold --families write,safe,fmt --out $R1/pairs "$@"
python reward.py train --init $R1/cold --data $R1/pairs/pairs.jsonl --epochs 2 --out $R1/reward "$@"
# .3 + .3 is above .5, and so "correct", only if both hold
python reward.py label --policy $R1/rl --families arith --by "0.3*exact + 0.3*format" --k 4 --n 4000 --select correct --out $R1/correct "$@"
python reward.py label --policy $R1/rl --families write,safe,fmt --by $R1/reward --k 4 --n 4000 --skip 8000 --select best --out $R1/general "$@"
python sft.py --init $OUT/base --data $R1/correct/pairs.jsonl,$R1/general/pairs.jsonl --steps 400 --out $R1/sft "$@"

python grpo.py --init $R1/sft --families arith,write,safe,fmt --reward "exact[arith] + $R1/reward@answer[write,fmt] + $R1/reward[safe]" --kl_coef 0.1 --lr 1e-4 --steps 50 --out $R1/final "$@"
python reward.py compare $R1/cold $R1/rl $R1/sft $R1/final --on arith,write,safe,fmt --proxy $R1/reward --save $OUT/tables/deepseek_r1.json "$@"
python reward.py compare $R1/cold $R1/rl $R1/sft $R1/final --judge format --families arith --on arith --save $OUT/tables/deepseek_r1.thinks.json "$@"
