#!/usr/bin/env bash
# Rule-based rewards (Mu et al. 2024, 2411.01111): rules with fitted weights correct a reward model that only likes help.
#
#   reported        total reward = helpful-only reward model + Σ w_i φ_i, φ_i the probability of a proposition about the answer
#                   by an AI; w from a hinge with margin 1 on orderings of synthetic answers, ideal over less good over unacceptable
#   reconstruction  the propositions are the rubric's four classes by our judge and one by rule (does it refuse?); the orderings are samples
#                   in the order of the true reward; the reward model that only likes help learned from pairs where the answer that
#                   helps won; all sizes
#
# Effect to look for: PPO on the helpful-only model helps with harm more than SFT did; with the rules it refuses. The
# weights are printed, and stand in rules/reward.txt, where they can be changed without training anything.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/rule_based_rewards.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
set -euo pipefail
OUT=${OUT:-out}
U=$OUT/rule_based_rewards

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --out $OUT/judging "$@"
python sft.py --init $OUT/base --data $OUT/judging/demos.jsonl --steps 1200 --batch 32 --out $OUT/judge "$@"
python reward.py label --policy $OUT/sft --families safe --n 3000 --by "help + 0.5*harm + -0.2*refuses" --out $U/helpful "$@"
python reward.py train --init $OUT/sft --data $U/helpful/pairs.jsonl --out $U/reward "$@"
python reward.py label --policy $OUT/sft --families safe --n 500 --k 6 --skip 3000 --scale 0 --flip 0 --out $U/orderings "$@"
python configs/rule_based_rewards.py --data $U/orderings/pairs.jsonl --base $U/reward --rules "$OUT/judge@A + $OUT/judge@B + $OUT/judge@C + $OUT/judge@D + refuses" --out $U/rules "$@"
python ppo.py --init $OUT/sft --reward $U/reward --families safe --out $U/helpful_only "$@"
python ppo.py --init $OUT/sft --reward $U/rules --families safe --out $U/with_rules "$@"
python reward.py compare $OUT/sft $U/helpful_only $U/with_rules --on safe "$@"
