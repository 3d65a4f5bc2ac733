#!/usr/bin/env bash
# GPT-2 on real data, on one GPU (configs/gpt2.toml): SFT on Alpaca; reward model, PPO and DPO on HH; GRPO on GSM8K.
# LoRA adapters then take the place of full SFT, PPO and DPO. After InstructGPT (2203.02155), DPO (2305.18290), HH
# (2204.05862), DeepSeekMath's GRPO (2402.03300) and LoRA (2106.09685).
#
# reported
#   The stages, the data sets and the losses.
# reconstruction
#   All sizes and rates: one epoch, a hundred steps of RL.
#
# GPT2 is a folder with GPT-2 in Hugging Face's layout: config.json, model.safetensors, vocab.json, merges.txt. For
# any size but the smallest, n_layer, n_head and n_embd go into configs/gpt2.toml first. ALPACA, HH and GSM8K are
# files of yours. What it needs: python tests/bench.py memory --micro_tokens 16384.
#
# Effect to look for: held-out losses fall. The reward of PPO and DPO is above SFT's. GSM8K stays near 0 at this size.
#
#   bash configs/gpt2.sh --seed 1        options that every stage knows may follow
#   OUT=/tmp/run bash configs/gpt2.sh    in another folder than out/
set -euo pipefail
OUT=${OUT:-out} GPT2=${GPT2:-gpt2} ALPACA=${ALPACA:-alpaca.json} HH=${HH:-hh.jsonl.gz} GSM8K=${GSM8K:-gsm8k.jsonl}

python sft.py --config configs/gpt2.toml --tokenizer "$GPT2" --init "$GPT2" --data "$ALPACA" --epochs 1 --out $OUT/gpt2/sft "$@"
python reward.py train --config configs/gpt2.toml --tokenizer "$GPT2" --init $OUT/gpt2/sft --data "$HH" --out $OUT/gpt2/reward "$@"
python ppo.py --config configs/gpt2.toml --tokenizer "$GPT2" --init $OUT/gpt2/sft --reward $OUT/gpt2/reward --data "$HH" --steps 100 --out $OUT/gpt2/ppo "$@"
python dpo.py --config configs/gpt2.toml --tokenizer "$GPT2" --init $OUT/gpt2/sft --data "$HH" --out $OUT/gpt2/dpo "$@"

python sft.py --config configs/gpt2.toml --tokenizer "$GPT2" --init "$GPT2" --data "$GSM8K" --epochs 1 --out $OUT/gpt2/gsm8k_sft "$@"
python grpo.py --config configs/gpt2.toml --tokenizer "$GPT2" --init $OUT/gpt2/gsm8k_sft --reward gsm8k --data "$GSM8K" --steps 100 --out $OUT/gpt2/gsm8k_grpo "$@"

python sft.py --config configs/gpt2.toml --tokenizer "$GPT2" --init "$GPT2" --data "$ALPACA" --epochs 1 --lora_r 16 --lr 2e-4 --out $OUT/gpt2/sft_lora "$@"
python ppo.py --config configs/gpt2.toml --tokenizer "$GPT2" --init $OUT/gpt2/sft --reward $OUT/gpt2/reward --data "$HH" --steps 100 --lora_r 16 --lr 2e-5 --critic_lr 5e-5 --out $OUT/gpt2/ppo_lora "$@"
python dpo.py --config configs/gpt2.toml --tokenizer "$GPT2" --init $OUT/gpt2/sft --data "$HH" --lora_r 16 --lr 2e-5 --out $OUT/gpt2/dpo_lora "$@"

python reward.py compare $OUT/gpt2/sft $OUT/gpt2/sft_lora $OUT/gpt2/ppo $OUT/gpt2/ppo_lora $OUT/gpt2/dpo $OUT/gpt2/dpo_lora --config configs/gpt2.toml --tokenizer "$GPT2" --data "$HH" --judge $OUT/gpt2/reward --n 64 "$@"
python reward.py compare $OUT/gpt2/gsm8k_sft $OUT/gpt2/gsm8k_grpo --config configs/gpt2.toml --tokenizer "$GPT2" --data "$GSM8K" --judge gsm8k --n 64 --samples 4 "$@"
