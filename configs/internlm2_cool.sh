#!/usr/bin/env bash
# COOL RLHF (InternLM2, Cai et al. 2024, 2403.17297): one reward model for preferences that contradict each other,
# told apart by a system prompt; and a fast path against each reward hack that is seen.
#
# reported
#   Each kind of preference has a system prompt. The loss is focal, γ = 2, with a logarithmic barrier at ±5, λ = .02.
#   PPO has critic warm-up and λ = .99. The fast path: 20 to 100 pairs against the hack just seen. The slow path:
#   pairs from SFT, early and late policies.
# reconstruction
#   The contradicting preferences are short and long answers. The hack is planted: the first labels are of people who
#   like fillers. There is one round of the two paths, apart from each other, the slow one without early policies. β,
#   ptx and value clipping of PPO are our defaults, and all sizes are ours.
#
# Effect to look for: on held-out pairs under opposite system prompts (first tables) the conditional model is near 1,
# the other near ½. PPO on the conditional one writes short or long as the prompt says. Then the share of answers
# without fillers, and the true reward: hacked, and cured by a hundred pairs (fast) or by labelled samples of the
# hacked policy (slow).
#
#   bash configs/internlm2_cool.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/internlm2_cool.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
C=$OUT/internlm2_cool

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --n 2500 --out $C/sampled "$@"
python reward.py label --policy "" --data $C/sampled/pairs.jsonl --by "-1*words" --scale 0 --flip 0 --system "Be brief." --out $C/brief "$@"
python reward.py label --policy "" --data $C/sampled/pairs.jsonl --by words --scale 0 --flip 0 --system "Say a lot." --out $C/long "$@"
python reward.py label --policy "" --data $C/sampled/pairs.jsonl --by "-1*words" --scale 0 --flip 0 --out $C/brief_plain "$@"
python reward.py label --policy "" --data $C/sampled/pairs.jsonl --by words --scale 0 --flip 0 --out $C/long_plain "$@"
python reward.py label --policy $OUT/sft --n 500 --skip 2500 --by "-1*words" --scale 0 --flip 0 --out $C/held "$@"
python reward.py label --policy "" --data $C/held/pairs.jsonl --by "-1*words" --scale 0 --flip 0 --system "Be brief." --out $C/held_brief "$@"
python reward.py label --policy "" --data $C/held/pairs.jsonl --by words --scale 0 --flip 0 --system "Say a lot." --out $C/held_long "$@"
python reward.py train --init $OUT/sft --data $C/brief/pairs.jsonl,$C/long/pairs.jsonl --loss focal --barrier 0.02 --epochs 2 --out $C/conditional "$@"
python reward.py train --init $OUT/sft --data $C/brief_plain/pairs.jsonl,$C/long_plain/pairs.jsonl --loss focal --barrier 0.02 --epochs 2 --out $C/unconditional "$@"
python reward.py accuracy $C/conditional $C/unconditional --data $C/held_brief/pairs.jsonl,$C/held_long/pairs.jsonl --save $OUT/tables/internlm2_cool.accuracy.json "$@"
python ppo.py --init $OUT/sft --reward "$C/conditional{Be brief.}" --critic_warmup 3 --lam 0.99 --steps 30 --out $C/ppo_brief "$@"
python ppo.py --init $OUT/sft --reward "$C/conditional{Say a lot.}" --critic_warmup 3 --lam 0.99 --steps 30 --out $C/ppo_long "$@"
python reward.py compare $OUT/sft $C/ppo_brief $C/ppo_long --save $OUT/tables/internlm2_cool.length.json "$@"

python reward.py label --policy "" --data $C/sampled/pairs.jsonl --by "gold + -2*no_filler" --out $C/hackable "$@"
python reward.py train --init $OUT/sft --data $C/hackable/pairs.jsonl --loss focal --barrier 0.02 --epochs 2 --out $C/reward1 "$@"
python ppo.py --init $OUT/sft --reward $C/reward1 --critic_warmup 3 --lam 0.99 --steps 30 --out $C/ppo1 "$@"
python reward.py label --policy $OUT/sft --n 100 --skip 3200 --k 4 --by no_filler --select ends --scale 0 --flip 0 --out $C/fast "$@"
python reward.py train --init $C/reward1 --data $C/fast/pairs.jsonl --loss focal --barrier 0.02 --epochs 4 --batch 16 --out $C/reward_fast "$@"
python ppo.py --init $OUT/sft --reward $C/reward_fast --critic_warmup 3 --lam 0.99 --steps 30 --out $C/ppo_fast "$@"
python reward.py label --policy $C/ppo1 --n 2000 --skip 3200 --out $C/slow "$@"
python reward.py train --init $C/reward1 --data $C/slow/pairs.jsonl,$C/sampled/pairs.jsonl --loss focal --barrier 0.02 --epochs 2 --out $C/reward_slow "$@"
python ppo.py --init $OUT/sft --reward $C/reward_slow --critic_warmup 3 --lam 0.99 --steps 30 --out $C/ppo_slow "$@"
python reward.py compare $OUT/sft $C/ppo1 $C/ppo_fast $C/ppo_slow --judge no_filler --families write --save $OUT/tables/internlm2_cool.fillers.json "$@"
python reward.py compare $OUT/sft $C/ppo1 $C/ppo_fast $C/ppo_slow --save $OUT/tables/internlm2_cool.gold.json "$@"
