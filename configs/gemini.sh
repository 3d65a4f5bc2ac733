#!/usr/bin/env bash
# Gemini (2023, 2312.11805): RLHF in rounds. The reward model is refreshed with labels of what the policy has come to
# say.
#
# reported
#   SFT, a reward model, RLHF. Feedback on the newest model's answers goes into the next reward model. No algorithm was
#   published.
# reconstruction
#   Everything else: PPO, three rounds, 4000 new pairs before the second and the third. The reward model is trained on,
#   and PPO goes on from the last policy.
#
# Effect to look for: on pairs of the newest policy the refreshed model is right more often than the one before. In
# samples the true reward rises from round to round.
#
#   bash configs/gemini.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/gemini.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
M=$OUT/gemini

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --steps 20 --out $M/ppo1 "$@"
before=$OUT/reward
for round in 1 2; do
  python reward.py label --policy $M/ppo$round --n 4000 --skip $((8000 * round)) --out $M/new$round "$@"
  python reward.py train --init $before --data $M/new$round/pairs.jsonl,$OUT/pairs/pairs.jsonl --epochs 1 --out $M/reward$round "$@"
  python reward.py label --policy $M/ppo$round --n 2000 --skip $((8000 * round + 5000)) --scale 0 --flip 0 --out $M/held$round "$@"
  python ppo.py --init $M/ppo$round --reward $M/reward$round --steps 20 --out $M/ppo$((round + 1)) "$@"
  before=$M/reward$round
done
python reward.py accuracy $OUT/reward $M/reward1 $M/reward2 --data $M/held1/pairs.jsonl,$M/held2/pairs.jsonl --save $OUT/tables/gemini.accuracy.json "$@"
python reward.py compare $OUT/sft $M/ppo1 $M/ppo2 $M/ppo3 --proxy $before --save $OUT/tables/gemini.json "$@"
