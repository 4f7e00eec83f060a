#!/usr/bin/env bash
# Another language: Thai news with labels from scratch, one text a line, with a vocabulary of their own. There is no
# published figure: the run prints its bits per byte beside those of a bigram model.
#
#   DATA=news.txt VOCAB=4096 INIT=15M runs/thai_news.sh        # default: the sample of the tests; minutes on a CPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="${OUT:-out/thai}"
more=()
[[ ! -e "$out/config.json" ]] || more+=(--resume)

python -m finetune.text --data "${DATA:-tests/data/thai_news.txt}" --separator $'\n' --init "${INIT:-260K}" \
  --vocab_size "${VOCAB:-600}" --out "$out" --max_steps "${STEPS:-300}" --dropout 0.1 --prompt "กีฬา:" "${more[@]}"

python -m nanollama convert --src "$out/final" --dst "$out/bin/thai.bin" --format llama2c
python -m nanollama generate --ckpt "$out/bin/thai.bin" --prompt "กีฬา:" --max_new_tokens 60
