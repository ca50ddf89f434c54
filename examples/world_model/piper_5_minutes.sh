#!/bin/sh
# A small world model of the Piper tabletop, trained from scratch on play data with one CPU thread. Shows all steps: latents,
# training, held-out loss, imagined episodes beside real ones.
#
#     sh examples/world_model/piper_5_minutes.sh [FOLDER]
#
# data    160 + 32 play episodes of 128 steps, collected by this script (once, a few more minutes)
# steps   400 of 16 windows; the frame codec is the bundled one
# memory  not measured
# time    measured, one thread of a server CPU with bf16: 3.9 minutes
# result  measured, seed 0: held-out loss 6.09 -> 1.45; PSNR of the moving region, 8 held-out episodes: 14.7 dB over frames
#         0-8 and 14.0 over 64-128; copying the last true frame has 9.7 and 13.5. Over the whole frame and beyond 16 frames,
#         copying (which gets the true frame every chunk) is better: this demonstrates the trainer, it is not a good model
set -eu
out=${1:-runs/piper_5_minutes}
export OMP_NUM_THREADS=1

test -d "$out/play" || rawdream data collect --kind play --layout wide --episodes 160 --seed 1 --out "$out/play"
test -d "$out/held_out" || rawdream data collect --kind play --layout wide --episodes 32 --seed 2 --out "$out/held_out"

rawdream world-model train --data "$out/play" --validation "$out/held_out" --run-dir "$out/run" --codec embedded \
    --objective window --transformer.steps 400 --transformer.batch-size 16 --transformer.lr 1e-3 \
    --transformer.warmup 50 --transformer.decay 0.7 --transformer.ema 0.98 \
    --model.num-layers 3 --model.num-attention-heads 3 --model.attention-head-dim 48 --model.ffn-dim 384 \
    --model.stem-channels 48 --model.stem-blocks 1 --model.head-blocks 2 --save-every 200

echo "Metrics: $out/run/transformer/metrics.jsonl; videos: $out/run/transformer/validation"
