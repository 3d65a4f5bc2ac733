#!/usr/bin/env bash
# Reward hacking and five remedies: PPO without a KL penalty on a reward model of few labels (Gao et al. 2022,
# "Scaling Laws for Reward Model Overoptimization", 2210.10760; ensembles: Coste et al. 2310.02743).
#
# reported
#   Gold and proxy against d = √KL. Their forms are d (α - β d) for best-of-n and d (α - β log d) for RL. More labels
#   push the peak out. The least of an ensemble is harder to fool.
# reconstruction
#   The reward model has 3000 noisy labels, `more` 5000. The ensemble has three of the first kind. Further remedies are a
#   verifier (whole sentences, the thing named), and labels of the hacked policy's samples. All sizes are ours.
#
# Effect to look for: `reward` climbs to the end while `gold` peaks and falls (the sparklines of `hacked`, and the
# fits). The KL penalty ends with more true reward than SFT. The verifier holds for longer; more labels, the ensemble and
# the refreshed model only move the hack.
#
#   bash configs/reward_hacking.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/reward_hacking.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
H=$OUT/reward_hacking

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
for member in 1 2 3; do
  python reward.py label --policy $OUT/sft --n 3000 --skip $((3000 * member)) --out $H/pairs$member "$@"
  python reward.py train --init $OUT/sft --data $H/pairs$member/pairs.jsonl --epochs 2 --out $H/reward$member "$@"
done
python reward.py label --policy $OUT/sft --out $OUT/pairs "$@"
python reward.py train --init $OUT/sft --data $OUT/pairs/pairs.jsonl --out $OUT/reward "$@"
python ppo.py --init $OUT/sft --reward $H/reward1 --kl_coef 0 --steps 40 --eval_every 2 --eval_prompts 200 --out $H/hacked "$@"
python ppo.py --init $OUT/sft --reward $H/reward1 --kl_coef 0.1 --steps 40 --eval_every 2 --eval_prompts 200 --out $H/kl "$@"
python ppo.py --init $OUT/sft --reward $OUT/reward --kl_coef 0 --steps 40 --eval_every 2 --eval_prompts 200 --out $H/more "$@"
python ppo.py --init $OUT/sft --reward "$H/reward1|$H/reward2|$H/reward3" --kl_coef 0 --steps 40 --eval_every 2 --eval_prompts 200 --out $H/ensemble "$@"
python ppo.py --init $OUT/sft --reward "$H/reward1 + configs.reward_hacking:named + configs.reward_hacking:sentences" --kl_coef 0 --steps 40 --eval_every 2 --eval_prompts 200 --out $H/verifier "$@"
python reward.py label --policy $H/hacked --n 3000 --skip 14000 --out $H/refresh "$@"
python reward.py train --init $OUT/sft --data $H/pairs1/pairs.jsonl,$H/refresh/pairs.jsonl --epochs 2 --out $H/refreshed "$@"
python ppo.py --init $OUT/sft --reward $H/refreshed --kl_coef 0 --steps 40 --eval_every 2 --eval_prompts 200 --out $H/refreshing "$@"
python configs/reward_hacking.py $H/hacked $H/kl $H/more $H/ensemble $H/verifier $H/refreshing --policy $OUT/sft --proxy $H/reward1 --save $OUT/tables/reward_hacking.curves.json --out $H/curves "$@"
python reward.py label --policy $OUT/sft --n 1000 --skip 20000 --out $H/held "$@"
python reward.py accuracy "$H/reward1|$H/reward2|$H/reward3" $OUT/reward --data $H/held/pairs.jsonl,$H/refresh/pairs.jsonl --save $OUT/tables/reward_hacking.accuracy.json "$@"
python reward.py compare $OUT/sft $H/hacked $H/kl $H/more $H/ensemble $H/verifier $H/refreshing --proxy $H/reward1 --save $OUT/tables/reward_hacking.json "$@"
