#!/usr/bin/env bash
# Kimi k1.5 (2025, 2501.12599): SFT, SFT on long thinking, RL, and four ways from long to short.
#
# reported
#   The stages. Prompts are rated by the SFT model's success, and the guessable ones are left out. RL is online policy
#   mirror descent: a square around the last iterate, the group mean as baseline, an optimizer that is reset every
#   iteration. It has a curriculum, and draws prompts ∝ 1 - success. From long to short: merging with the short model;
#   SFT on the shortest of 8 right samples; DPO of it over longer ones; RL with a length reward.
# reconstruction
#   A long chain of thought says the sum over, up to five times, before it works it out. The rater is the long model.
#   The DPO has an NLL term. The last RL is Dr. GRPO. τ, rates and sizes are ours.
#
# Effect to look for: each of the four last rows is much shorter than `rl`, and about as right, `merge` a little less.
#
#   bash configs/kimi_k15.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/kimi_k15.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
K=$OUT/kimi_k15

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/long_thinking.py --restate 5 --out $K/long_thinking "$@"
python sft.py --init $OUT/sft --data $K/long_thinking/demos.jsonl --steps 200 --lr 1e-3 --muon_lr 3e-3 --out $K/long "$@"
python configs/kimi_k15.py --policy $K/long --n 2000 --max_new 160 --out $K/prompts "$@"
python grpo.py --init $K/long --data $K/prompts/prompts.jsonl --pool 2000 --curriculum 0.3 --prioritized --adv dr_grpo --loss opmd --per constant --epochs 2 --reset --lr 5e-5 --steps 40 --max_new 160 --out $K/rl "$@"

python configs/merge.py $K/rl $OUT/sft --out $K/merge
python configs/long2short.py --policy $K/rl --k 8 --n 2000 --max_new 160 --out $K/short "$@"
python sft.py --init $K/rl --data $K/short/shortest.jsonl --steps 60 --lr 1e-3 --muon_lr 1e-3 --out $K/shortest_sft "$@"
python dpo.py --init $K/rl --data $K/short/pairs.jsonl --nll_coef 1 --lr 1e-5 --steps 30 --max_new 160 --out $K/short_dpo "$@"
python grpo.py --init $K/rl --len_reward 0.2 --adv dr_grpo --max_new 120 --steps 50 --out $K/short_rl "$@"
python reward.py compare $K/rl $K/long $OUT/sft $K/merge $K/shortest_sft $K/short_dpo $K/short_rl --families arith --on arith --max_new 160 --save $OUT/tables/kimi_k15.json "$@"
