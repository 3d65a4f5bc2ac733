#!/usr/bin/env bash
# Kimi k1.5 (2025, 2501.12599): pretraining -> SFT -> long-CoT SFT -> RL -> long2short, in four ways.
#
#   reported        the stages; prompts rated by the SFT model's success, the guessable left out; RL by online policy mirror
#                   descent (a square around the last iterate, group mean as baseline, optimizer reset every iteration),
#                   with a curriculum and prompts drawn ∝ 1 - success; long2short by merging with the short model, SFT on
#                   the shortest of 8 right samples, DPO of it over longer ones, and RL with a length reward
#   reconstruction  a long chain of thought says the sum over, up to five times, before it works it out; the
#                   rater is the long model; the NLL term of the DPO; the last RL is Dr. GRPO; τ, rates and sizes
#
# Effect to look for: each of the four last rows is much shorter than `rl` and about as right.
# Options that every stage knows (seed, device, dtype, threads) can follow: bash configs/kimi_k15.sh --seed 1. OUT is the folder: OUT=/tmp/run bash ...
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
python reward.py compare $K/rl $K/long $OUT/sft $K/merge $K/shortest_sft $K/short_dpo $K/short_rl --families arith --on arith --max_new 160 "$@"
