#!/usr/bin/env bash
# DeepSeek-V2 (2024, 2405.04434, sec. 4.2): GRPO in two stages, reasoning first, then preferences with three rewards.
#
# reported
#   Stage one is on reasoning, with a reward of its own. Stage two is on c1 helpful + c2 safe + c3 rule.
# reconstruction
#   A verifier stands for their reward model of reasoning. Each reward judges its own family only. The rule is: no
#   fillers. Sums stay among the prompts of stage two, so that they are not forgotten. The c and all sizes are ours.
#
# Effect to look for: stage two raises `write` and `safe`, and keeps the sums of stage one. `swapped` has the stages
# the other way round.
#
#   bash configs/deepseek_v2.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/deepseek_v2.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
V2=$OUT/deepseek_v2

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python reward.py label --policy $OUT/sft --families safe --n 4000 --out $V2/safe_pairs "$@"
python reward.py train --init $OUT/sft --data $V2/safe_pairs/pairs.jsonl --epochs 2 --out $V2/safe "$@"

preferences="$OUT/reward[write] + 0.5*no_filler[write] + $V2/safe[safe] + exact[arith]"
python grpo.py --init $OUT/sft --steps 100 --out $V2/stage1 "$@"
python grpo.py --init $V2/stage1 --families arith,write,safe --reward "$preferences" --kl_coef 0.05 --steps 100 --out $V2/stage2 "$@"
python grpo.py --init $OUT/sft --families arith,write,safe --reward "$preferences" --kl_coef 0.05 --steps 100 --out $V2/swapped1 "$@"
python grpo.py --init $V2/swapped1 --steps 100 --out $V2/swapped2 "$@"
python reward.py compare $OUT/sft $V2/stage1 $V2/stage2 $V2/swapped1 $V2/swapped2 --on write,safe --save $OUT/tables/deepseek_v2.json "$@"
