#!/usr/bin/env bash
# Quark (Lu et al. 2022, 2205.13636): learn from all samples, each behind a token that tells its quality, and ask for
# the best.
#
# reported
#   Samples are sorted by reward into five parts of equal size, with a token for each. The loss is the likelihood of
#   the sample behind its token + .05 KL to the reference without the token - .06 entropy. Explore with the best
#   token, and again.
# reconstruction
#   The token is a system message. There are two rounds. The reward is the true one of `write`. All sizes are ours.
#
# configs/quark.py is sft.py with the two terms more.
#
# Effect to look for: the same model, asked for the best and for the worst. The second round is above the first. What is
# not among the samples is forgotten: the other families, and some of the pretraining.
#
#   bash configs/quark.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/quark.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
Q=$OUT/quark

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python reward.py label --policy $OUT/sft --n 8000 --scale 0 --flip 0 --out $Q/samples1 "$@"
python configs/quark.py --init $OUT/sft --data $Q/samples1/pairs.jsonl --quantiles 5 --kl_coef 0.05 --ent_coef 0.06 --steps 300 --lr 1e-3 --muon_lr 3e-3 --out $Q/one "$@"
python reward.py label --policy $Q/one --n 8000 --skip 8192 --system "Quality 5." --scale 0 --flip 0 --out $Q/samples2 "$@"
python configs/quark.py --init $Q/one --ref $OUT/sft --data $Q/samples1/pairs.jsonl,$Q/samples2/pairs.jsonl --quantiles 5 --kl_coef 0.05 --ent_coef 0.06 --steps 300 --lr 1e-3 --muon_lr 3e-3 --out $Q/two "$@"
python reward.py compare $OUT/sft $Q/one $Q/two --system "Quality 5." --save $OUT/tables/quark.best.json "$@"
python reward.py compare $OUT/sft $Q/one $Q/two --system "Quality 1." --save $OUT/tables/quark.worst.json "$@"
python reward.py compare $OUT/sft $Q/one $Q/two --save $OUT/tables/quark.unasked.json "$@"
