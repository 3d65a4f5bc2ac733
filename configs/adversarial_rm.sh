#!/usr/bin/env bash
# An adversarial reward model ("Concrete Problems in AI Safety", Amodei et al. 2016, 1606.06565, sec. 4).
# The reward model looks for what the policy abuses.
#
# reported
#   A reward function could be an agent itself. It would search for states that it rates high and people do not.
# reconstruction
#   Everything else. Four times we run ten steps of PPO. After each, the policy's own samples are labelled, and the
#   reward model is trained on the new pairs beside the old ones. The comparison is forty steps on the first reward
#   model, frozen.
#
# Effect to look for: at about the same KL the policy of the adversarial reward has more true reward than the frozen
# one's.
#
#   bash configs/adversarial_rm.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/adversarial_rm.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
A=$OUT/adversarial_rm

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --n 1000 --out $A/pairs0 "$@"
python reward.py train --init $OUT/sft --data $A/pairs0/pairs.jsonl --epochs 2 --out $A/reward0 "$@"
python ppo.py --init $OUT/sft --reward $A/reward0 --kl_coef 0 --lr_end 1 --steps 40 --out $A/frozen "$@"
python ppo.py --init $OUT/sft --reward $A/reward0 --kl_coef 0 --lr_end 1 --steps 10 --out $A/ppo1 "$@"
data=$A/pairs0/pairs.jsonl
for round in 1 2 3; do
  python reward.py label --policy $A/ppo$round --n 500 --skip $((2000 * round)) --out $A/pairs$round "$@"
  data=$data,$A/pairs$round/pairs.jsonl
  python reward.py train --init $OUT/sft --data $data --epochs 2 --out $A/reward$round "$@"
  python ppo.py --init $A/ppo$round --reward $A/reward$round --kl_coef 0 --lr_end 1 --steps 10 --out $A/ppo$((round + 1)) "$@"
done
python reward.py compare $OUT/sft $A/frozen $A/ppo4 --proxy $A/reward0 --save $OUT/tables/adversarial_rm.json "$@"
