#!/usr/bin/env bash
# The preference losses that no other recipe shows: the same SFT model, the same pairs, each loss at the rate that the
# validation split prefers. And what some of them are for, each shown once.
#
# reported
#   RSO 2309.06657: a hinge, on pairs of samples that rejection sampling accepted. GPO 2402.05749: other convex losses.
#   SPPO 2405.00675 and DNO 2404.03715: self-play in rounds, on win rates. SPO 2401.04056: win rates within a group as
#   the reward of RL. DPOP 2402.13228: DPO makes the chosen answer less likely where both differ in little.
#   TDPO 2404.11999: holds the KL token by token. DRO 2405.19107: single answers with a score.
#   NPO 2404.05868 and D2O 2403.03419: only bad answers are labelled. SLiC-HF 2305.10425 and CPO 2401.08417: no
#   reference. cDPO (Mitchell 2023) and robust DPO 2403.00409: some labels are flipped.
# reconstruction
#   All of it is on the toy, in short runs: 48 updates of 16 pairs each. SPPO, DNO and DRO need to know how good an answer
#   is, RSO what is to be accepted, SPO what is preferred: that is the view of the reward model that learned from the same
#   pairs, never the truth. On pairs D2O has one anchor, and differs from DPO by its α alone; where only bad answers are
#   labelled its anchors are samples of the SFT model, drawn once. NPO reads the rejected answers only. SPO samples 64
#   answers an update.
#
# Effect to look for: in the first table, how far each gets, and at what KL; the rates that were chosen differ. Then, one
# table each. Labels flipped: robust DPO and cDPO against DPO. Only bad answers (unsafe requests helped, safe ones
# refused): at the low rate NPO and D2O mend a little; at the high one NPO loses the language (nll, KL), D2O less. Thumbs:
# KTO and DRO. One digit's difference: the chosen's log-ratio falls with DPO, and not with DPOP. Self-play: what the
# second round adds. RSO on its own pairs, and SPO with a preference function in place of a reward model.
#
#   bash configs/losses.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/losses.sh    in another folder than out/
# What came out: configs/README.md.
set -euo pipefail
OUT=${OUT:-out}
L=$OUT/losses
SFT=$OUT/sft
PAIRS=$OUT/pairs/pairs.jsonl
SCORED=$L/scored/pairs.jsonl  # the same answers, with what the reward model says of them
RATES="5e-5 1.5e-4 5e-4"
RUNS=($SFT)
BEST=($SFT)

learn() {  # NAME SCRIPT OPTIONS...: trains it at every rate
  for lr in $RATES; do
    python "$2" --init $SFT --lr $lr --steps 48 --eval_every 1000 --out $L/$1/$lr "${@:3}"
    RUNS+=($L/$1/$lr)
  done
  BEST+=($L/best/$1)
}

python sft.py --loss_on all --init new --out $OUT/base "$@"
python sft.py --init $OUT/base --out $SFT "$@"
python reward.py label --policy $SFT --out $OUT/pairs "$@"
python reward.py train --init $SFT --data $PAIRS --out $OUT/reward "$@"
python reward.py label --policy "" --data $PAIRS --by $OUT/reward --scale 0 --flip 0 --out $L/scored "$@"

# One table.
learn dpo dpo.py --data $PAIRS --batch 16 "$@"
learn rso dpo.py --data $PAIRS --batch 16 --loss rso "$@"
learn gpo_exponential dpo.py --data $PAIRS --batch 16 --loss gpo_exponential "$@"
learn gpo_savage dpo.py --data $PAIRS --batch 16 --loss gpo_savage "$@"
learn dpop dpo.py --data $PAIRS --batch 16 --loss dpop "$@"
learn tdpo2 dpo.py --data $PAIRS --batch 16 --loss tdpo2 "$@"
learn sppo dpo.py --data $SCORED --batch 16 --loss sppo --eta 5 "$@"
learn dno dpo.py --data $SCORED --batch 16 --loss dno "$@"
learn dro dpo.py --data $SCORED --batch 32 --loss dro --beta 1 "$@"
learn d2o dpo.py --data $PAIRS --batch 16 --loss d2o "$@"
learn slic orpo.py --data $PAIRS --batch 16 --loss slic "$@"
learn cpo orpo.py --data $PAIRS --batch 16 --loss cpo "$@"
RATES="2e-5 5e-5 1.5e-4"  # nothing holds these two back
learn npo dpo.py --data $PAIRS --batch 32 --loss npo "$@"
learn spo grpo.py --families write --reward $OUT/reward --prefer score --prompts 8 "$@"
python reward.py compare "${RUNS[@]}" --split val --families write --n 200 --show 0 --save $L/val.json "$@"
python configs/pick.py --table $L/val.json --save $OUT/tables/losses.rates.json --out $L/best "$@"
python reward.py compare "${BEST[@]}" --proxy $OUT/reward --families write --show 0 --save $OUT/tables/losses.json "$@"

# Three labels of ten are flipped, and nothing else is wrong with them.
python reward.py label --policy $SFT --n 1000 --skip 6000 --scale 0 --flip 0.3 --out $L/flipped/pairs "$@"
FLIPPED=($SFT)
for loss in dpo cdpo robust; do
  for lr in 2e-5 5e-5 2e-4; do
    python dpo.py --init $SFT --data $L/flipped/pairs/pairs.jsonl --loss $loss --eps 0.3 --beta 0.1 --lr $lr --epochs 2 --eval_every 1000 --out $L/flipped/$loss/$lr "$@"
    FLIPPED+=($L/flipped/$loss/$lr)
  done
done
python reward.py compare "${FLIPPED[@]}" --split val --families write --n 200 --show 0 --save $L/flipped/val.json "$@"
python configs/pick.py --table $L/flipped/val.json --save $OUT/tables/losses.flipped_rates.json --out $L/flipped/best "$@"
python reward.py compare $SFT $L/flipped/best/dpo $L/flipped/best/cdpo $L/flipped/best/robust $L/flipped/dpo/2e-4 $L/flipped/cdpo/2e-4 $L/flipped/robust/2e-4 --families write --show 0 --save $OUT/tables/losses.flipped.json "$@"

# Data that some losses are for: only what is bad, thumbs, pairs that differ in one digit.
python reward.py label --policy $SFT --families safe --n 800 --k 4 --select all --out $L/unsafe "$@"
python configs/losses.py --data $PAIRS --unsafe_data $L/unsafe/pairs.jsonl --out $L/special "$@"
for lr in 5e-5 2e-4; do
  python dpo.py --init $SFT --data $L/special/bad.jsonl --loss npo --beta 0.1 --batch 32 --steps 40 --lr $lr --eval_every 1000 --out $L/bad/npo$lr "$@"
  python dpo.py --init $SFT --data $L/special/bad.jsonl --loss d2o --alpha 0.3 --batch 16 --steps 40 --lr $lr --eval_every 1000 --out $L/bad/d2o$lr "$@"
done
python reward.py compare $SFT $L/bad/npo5e-5 $L/bad/d2o5e-5 $L/bad/npo2e-4 $L/bad/d2o2e-4 --families safe,write --on safe --show 0 --save $OUT/tables/losses.bad.json "$@"
python dpo.py --init $SFT --data $L/special/thumbs.jsonl --loss kto --batch 32 --lr 1.5e-4 --steps 60 --eval_every 1000 --out $L/thumbs/kto "$@"
python dpo.py --init $SFT --data $L/special/thumbs.jsonl --loss dro --beta 1 --batch 32 --lr 1.5e-4 --steps 60 --eval_every 1000 --out $L/thumbs/dro "$@"
python reward.py compare $SFT $L/thumbs/kto $L/thumbs/dro --families write --show 0 --save $OUT/tables/losses.thumbs.json "$@"
for loss in dpo dpop tdpo1 tdpo2; do
  python dpo.py --init $SFT --data $L/special/digits.jsonl --loss $loss --steps 40 --lr 3e-4 --eval_every 1000 --out $L/digits/$loss "$@"
done
python configs/last_rows.py $L/digits/dpo $L/digits/dpop $L/digits/tdpo1 $L/digits/tdpo2 --metrics val_rewards/chosen,val_rewards/rejected,val_rewards/accuracy,kl --save $OUT/tables/losses.digits.json --out $L/digits/table "$@"

# Self-play: pairs of the policy's own samples, twice; the policy of each round is the reference of the next.
python reward.py label --policy $SFT --k 4 --n 400 --skip 8000 --select ends --by $OUT/reward --scale 0 --flip 0 --out $L/rounds/pairs "$@"
for loss in dpo sppo dno; do
  python dpo.py --init $SFT --data $L/rounds/pairs/pairs.jsonl --loss $loss --eta 5 --lr 1.5e-4 --eval_every 1000 --out $L/rounds/${loss}1 "$@"
  python reward.py label --policy $L/rounds/${loss}1 --k 4 --n 400 --skip 9000 --select ends --by $OUT/reward --scale 0 --flip 0 --out $L/rounds/${loss}_pairs "$@"
  python dpo.py --init $L/rounds/${loss}1 --data $L/rounds/${loss}_pairs/pairs.jsonl --loss $loss --eta 5 --lr 1.5e-4 --eval_every 1000 --out $L/rounds/${loss}2 "$@"
done
python reward.py compare $SFT $L/rounds/dpo1 $L/rounds/dpo2 $L/rounds/sppo1 $L/rounds/sppo2 $L/rounds/dno1 $L/rounds/dno2 --proxy $OUT/reward --families write --show 0 --save $OUT/tables/losses.rounds.json "$@"

# RSO's own pairs: of eight samples those that rejection sampling accepts, in the reward model's order. And SPO without
# a reward model: a function says how often people would prefer one answer to another.
python reward.py label --policy $SFT --k 8 --n 400 --skip 10000 --select rso --by $OUT/reward --scale 0 --flip 0 --out $L/own/pairs "$@"
python dpo.py --init $SFT --data $L/own/pairs/pairs.jsonl --loss rso --lr 1.5e-4 --steps 40 --eval_every 1000 --out $L/own/rso "$@"
python grpo.py --init $SFT --families write --reward $OUT/reward --prefer configs.losses:people --prompts 8 --steps 40 --lr 1.5e-4 --out $L/own/spo "$@"
python reward.py compare $SFT $L/best/rso $L/own/rso $L/best/spo $L/own/spo --proxy $OUT/reward --families write --show 0 --save $OUT/tables/losses.own.json "$@"
