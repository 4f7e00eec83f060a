#!/usr/bin/env bash
# llama2.c's models from scratch on TinyStories, with its settings, and the published loss to meet. Run it again to
# continue an interrupted run.
#
#   runs/stories.sh 260K                                       # an own vocabulary of 512 words; one GPU, or a patient CPU
#   TOKENIZER=tokenizer.model GPUS=4 runs/stories.sh 15M       # also 42M, 110M: Llama 2's 32,000 words, DDP by torchrun
#
# shape  validation loss, nats per token (karpathy/llama2.c's README and karpathy/tinyllamas)
# 260K   1.297   (of its own 512 words: with another vocabulary compare the bits per byte)
# 15M    1.072
# 42M    0.847
# 110M   0.760
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SHAPE="${1:?name the shape: 260K, 15M, 42M or 110M}"
GPUS="${GPUS:-1}"
case "$SHAPE" in
  260K) published=1.297; rows=128; tokens=512;  dropout=0.05; more=(--lr 1e-3 --weight_decay 0.01 --beta2 0.99) ;;
  15M)  published=1.072; rows=512; tokens=256;  dropout=0.0;  more=(--lr 5e-4 --weight_decay 0.1 --beta2 0.95) ;;
  42M)  published=0.847; rows=128; tokens=1024; dropout=0.1;  more=(--lr 5e-4 --weight_decay 0.1 --beta2 0.95) ;;
  110M) published=0.760; rows=128; tokens=1024; dropout=0.1;  more=(--lr 5e-4 --weight_decay 0.1 --beta2 0.95) ;;
  *) echo "error: shape $SHAPE: expected 260K, 15M, 42M or 110M" >&2; exit 2 ;;
esac
if [[ "$SHAPE" == 260K ]]; then
  more+=(--vocab_size 512)
else
  more+=(--tokenizer "${TOKENIZER:?name the tokenizer.model of Llama 2}" --dtype bf16 --compile)
fi
out="${OUT:-out/stories$SHAPE}"
batch="${BATCH:-32}" # rows in a micro-batch on each GPU; rows in a step: $rows on all of them, whatever their number
[[ ! -e "$out/config.json" ]] || more+=(--resume)

torchrun --standalone --nproc_per_node "$GPUS" -m finetune.tinystories --data tinystories --init "$SHAPE" --out "$out" \
  --seq_len "$tokens" --batch_size "$batch" --accumulate "$((rows / batch / GPUS))" "${more[@]}" --dropout "$dropout" \
  --max_steps "${STEPS:-100000}" --warmup_steps 1000 --schedule cosine --min_lr 0 \
  --eval_every 2000 --eval_tokens 6553600 --save_every 1000 --export hf

echo "published validation loss of $SHAPE: $published; this run: $out/summary.json"
python -m nanollama convert --src "$out/final" --dst "$out/bin/stories$SHAPE.bin" --format llama2c
python -m nanollama convert --src "$out/final" --dst "$out/stories$SHAPE.gguf" --format gguf
python -m parity.check --ckpt "$out/final"
python -m nanollama generate --ckpt "$out/bin/stories$SHAPE.bin" --prompt "Once upon a time"
