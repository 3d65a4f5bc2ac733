#!/usr/bin/env bash
# DeepSeek-R1's distilled models (2025, 2501.12948, version 1, sec. 2.4 and 4.1): a small base model, fine-tuned on
# the big one's samples, against RL on the small model itself.
#
# reported
#   SFT only, on the samples of stage 3 of deepseek_r1.sh. No RL afterwards.
# reconstruction
#   The student has half the layers and three quarters of the width. It sees only the sums of those samples. It gets
#   400 steps of SFT, or 150 of RL.
#
# Effect to look for: the distilled student beats the student trained by RL.
#
#   bash configs/r1_distill.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/r1_distill.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
R1=$OUT/deepseek_r1

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --think 1 --steps 80 --out $R1/cold "$@"
python grpo.py --init $R1/cold --reward "exact + 0.1*format + 0.1*language" --steps 150 --out $R1/rl "$@"
python reward.py label --policy $R1/rl --families arith --by "0.3*exact + 0.3*format" --k 4 --n 4000 --select correct --out $R1/correct "$@"

python sft.py --loss_on all --init new --n_layer 2 --n_head 3 --n_embd 96 --out $OUT/r1_distill/base "$@"
python sft.py --init $OUT/r1_distill/base --data $R1/correct/pairs.jsonl --steps 400 --out $OUT/r1_distill/sft "$@"
python grpo.py --init $OUT/r1_distill/base --reward "exact + 0.1*format" --steps 150 --out $OUT/r1_distill/rl "$@"
python reward.py compare $OUT/r1_distill/base $OUT/r1_distill/sft $OUT/r1_distill/rl $R1/rl --families arith --on arith "$@"
