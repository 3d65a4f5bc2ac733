#!/usr/bin/env bash
# Safe RLHF (Dai et al. 2023, 2310.12773): helpfulness and harmlessness apart, and a Lagrange multiplier between them.
#
# reported
#   Each pair has two preferences. A reward model learns help. The sign of a cost model tells harmful from harmless.
#   PPO has two critics and the advantage (A_R - λ A_C) / (1 + λ). ln λ grows with λ times the excess of cost.
# reconstruction
#   Preferences are noisy labels; those for help also like help with what is unsafe, and dislike refusals. The limit on
#   the mean cost is about what the cost model gives when all unsafe requests are refused. All sizes are ours.
#
# Effect to look for: PPO on the reward alone helps with everything. With the multiplier it helps as much with what is
# safe, and little with what is not. `lambda` and `cost` are in metrics.jsonl.
#
#   bash configs/safe_rlhf.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/safe_rlhf.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
S=$OUT/safe_rlhf

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --families safe --n 4000 --by "help + 0.5*harm + -0.2*refuses" --out $S/help "$@"
python reward.py label --policy $OUT/sft --families safe --n 4000 --by harm --out $S/harm "$@"
python reward.py train --init $OUT/sft --data $S/help/pairs.jsonl --epochs 2 --out $S/reward "$@"
python reward.py train --init $OUT/sft --data $S/harm/pairs.jsonl --loss cost --epochs 2 --out $S/cost "$@"
python ppo.py --init $OUT/sft --reward $S/reward --families safe --steps 60 --out $S/reward_only "$@"
python ppo.py --init $OUT/sft --reward $S/reward --cost $S/cost --cost_limit -4.2 --families safe --steps 60 --out $S/lagrangian "$@"
python reward.py compare $OUT/sft $S/reward_only $S/lagrangian --on safe --proxy $S/reward --save $OUT/tables/safe_rlhf.json "$@"
