#!/usr/bin/env bash
# DeepSeek-R1's distilled models (2025, 2501.12948, version 1, sec. 2.4 and 4.1): a small base model, fine-tuned on
# the big one's samples, against RL on the small model itself. And on-policy distillation (GKD, Agarwal et al. 2023,
# 2306.13649): the student samples, and the big model says of every token how likely it was.
#
# reported
#   R1: SFT only, on the samples of stage 3 of deepseek_r1.sh. No RL afterwards.
#   GKD: the student is a fine-tuned one. Its own samples teach it more than a fixed set of the teacher's or of others.
#   Which divergence is best depends on the task.
# reconstruction
#   The student has half the layers and three quarters of the width. It sees only the sums of those samples. It gets
#   400 steps of SFT, or 150 of RL. On-policy distillation takes 170 steps after that SFT, or 340 from the base.
#   A token of a response costs 2 + 6 operations a weight of the student with RL, for sampling it and learning from it;
#   2 a weight of the teacher more when it is distilled, who has three times as many weights; and 6 with SFT. So these
#   need about the same compute: RL, either distillation with the SFT before it, and 800 steps of SFT, `sft_more`. `sft`
#   needs half. What the teacher and its samples cost is not counted.
#
# Effect to look for: the distilled students beat the student trained by RL. Do samples of its own, for the same
# compute, take the student further than more of the teacher's? Look at what is forgotten (nll), too.
#
#   bash configs/r1_distill.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/r1_distill.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
R1=$OUT/deepseek_r1
D=$OUT/r1_distill

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --think 1 --steps 80 --out $R1/cold "$@"
python grpo.py --init $R1/cold --reward "exact + 0.1*format + 0.1*language" --steps 150 --out $R1/rl "$@"
python reward.py label --policy $R1/rl --families arith --by "0.3*exact + 0.3*format" --k 4 --n 4000 --select correct --out $R1/correct "$@"

python sft.py --loss_on all --init new --n_layer 2 --n_head 3 --n_embd 96 --out $D/base "$@"
python sft.py --init $D/base --data $R1/correct/pairs.jsonl --steps 400 --out $D/sft "$@"
python sft.py --init $D/base --data $R1/correct/pairs.jsonl --steps 800 --out $D/sft_more "$@"
python grpo.py --init $D/base --reward "exact + 0.1*format" --steps 150 --out $D/rl "$@"
python configs/distill.py --init $D/sft --teacher $R1/rl --steps 170 --out $D/on_policy "$@"
python configs/distill.py --init $D/base --teacher $R1/rl --steps 340 --out $D/on_policy_from_base "$@"
python reward.py compare $D/base $D/sft $D/sft_more $D/rl $D/on_policy $D/on_policy_from_base $R1/rl --families arith --on arith --save $OUT/tables/r1_distill.json "$@"
