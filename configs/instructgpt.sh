#!/usr/bin/env bash
# InstructGPT (Ouyang et al. 2022, 2203.02155): pretraining, SFT, reward model, PPO, and PPO with pretraining mix.
#
# reported
#   The three stages. All C(K, 2) pairs of a prompt are one batch element. The critic starts from the reward model.
#   The KL is in the reward, per token. Clip .2, γ = 1, one pass over each rollout. PPO-ptx adds γ_ptx times the
#   pretraining loss to the same update.
# reconstruction
#   All sizes. K is 4, theirs 4 to 9. β and the learning rates are the toy's. γ_ptx is 1, not 27.8: our losses are
#   means per token, and the toy needs little.
#
# Effect to look for: both PPO rows are above SFT in `write`. The ptx row keeps more of the pretraining: its loss (nll)
# is lower, and more sums are right, as that text works every sum out.
#
#   bash configs/instructgpt.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/instructgpt.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --k 4 --n 2000 --out $OUT/instructgpt/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/instructgpt/pairs/pairs.jsonl --epochs 2 --out $OUT/instructgpt/reward "$@"
python ppo.py --init $OUT/sft --reward $OUT/instructgpt/reward --epochs 1 --steps 30 --out $OUT/instructgpt/ppo "$@"
python ppo.py --init $OUT/sft --reward $OUT/instructgpt/reward --epochs 1 --ptx_coef 1 --steps 30 --out $OUT/instructgpt/ppo_ptx "$@"
python reward.py compare $OUT/sft $OUT/instructgpt/ppo $OUT/instructgpt/ppo_ptx --proxy $OUT/instructgpt/reward --save $OUT/tables/instructgpt.json "$@"
