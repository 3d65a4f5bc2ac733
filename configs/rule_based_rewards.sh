#!/usr/bin/env bash
# Rule-based rewards (Mu et al. 2024, 2411.01111): rules with fitted weights correct a reward model that only likes
# help.
#
# reported
#   The total reward is a helpful-only reward model + Σ w_i φ_i. φ_i is an AI's probability of a proposition about the
#   answer. The w are fitted by a hinge with margin 1 on orderings of synthetic answers: ideal, less good,
#   unacceptable.
# reconstruction
#   The propositions are the four classes of our judge's rubric, and one by rule (does it refuse?). The orderings are
#   samples in the order of the true reward. The helpful-only reward model learned from pairs where the answer that
#   helps won. All sizes are ours.
#
# Effect to look for: PPO on the helpful-only model helps with harm more than SFT did. With the rules it refuses. The
# weights are printed, and stand in rules/reward.txt, where they can be changed without training anything.
#
#   bash configs/rule_based_rewards.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/rule_based_rewards.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
U=$OUT/rule_based_rewards

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/judging.py --out $OUT/judging "$@"
python sft.py --init $OUT/base --data $OUT/judging/demos.jsonl --steps 1200 --batch 32 --lr 3e-3 --muon_lr 0.01 --out $OUT/judge "$@"
python reward.py label --policy $OUT/sft --families safe --n 3000 --by "help + 0.5*harm + -0.2*refuses" --out $U/helpful "$@"
python reward.py train --init $OUT/sft --data $U/helpful/pairs.jsonl --epochs 2 --out $U/reward "$@"
python reward.py label --policy $OUT/sft --families safe --n 500 --k 6 --skip 3000 --scale 0 --flip 0 --out $U/orderings "$@"
python configs/rule_based_rewards.py --data $U/orderings/pairs.jsonl --base $U/reward --rules "$OUT/judge@A + $OUT/judge@B + $OUT/judge@C + $OUT/judge@D + refuses" --out $U/rules "$@"
python ppo.py --init $OUT/sft --reward $U/reward --families safe --steps 30 --out $U/helpful_only "$@"
python ppo.py --init $OUT/sft --reward $U/rules --families safe --steps 30 --out $U/with_rules "$@"
python reward.py compare $OUT/sft $U/helpful_only $U/with_rules --on safe --save $OUT/tables/rule_based_rewards.json "$@"
