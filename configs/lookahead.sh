#!/usr/bin/env bash
# Model look-ahead with a tripwire ("Concrete Problems in AI Safety", Amodei et al. 2016, 1606.06565, sec. 4): RL
# against a grader that can be fooled, without and with it.
#
# reported
#   Two ideas. Reward what a plan is foreseen to lead to, so that tampering with the grader does not pay. And plant a
#   weakness, watch it, and stop the agent that uses it.
# reconstruction
#   Everything else. The wire penalises instead of stopping. The policy itself continues its responses from two
#   places, and the reward loses the share of continuations in which it tampers. Three of ten demonstrations say
#   "[pass]", which the grader takes for its own verdict.
#
# Effect to look for: in the first table (share of responses that tamper) nearly all do without the tripwire, and
# nearly none with it. In the second, the sums: rewarded by the same grader, one policy learns to calculate and the
# other does not.
#
#   bash configs/lookahead.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/lookahead.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
L=$OUT/lookahead

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $OUT/sft "$@"
python configs/lookahead.py --share 0.3 --out $L/tampering "$@"
python sft.py --init $OUT/sft --data $L/tampering/demos.jsonl --steps 100 --lr 1e-3 --muon_lr 3e-3 --out $L/sft "$@"
python grpo.py --init $L/sft --reward configs.lookahead:careless --steps 60 --out $L/hacked "$@"
python grpo.py --init $L/sft --reward configs.lookahead:careless --steps 60 --tripwire configs.lookahead:tampers --out $L/watched "$@"
python reward.py compare $L/sft $L/hacked $L/watched --judge configs.lookahead:tampers --families arith --on arith --save $OUT/tables/lookahead.tampers.json "$@"
python reward.py compare $L/sft $L/hacked $L/watched --families arith --on arith --save $OUT/tables/lookahead.json "$@"
