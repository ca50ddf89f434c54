#!/bin/sh
# The paper's arm: pre-training on Open X-Embodiment, then about four hours of uncurated play of the Piper.
#
#     sh examples/world_model/open_x_pretraining.sh --nproc-per-node 8
#
# data    LeRobotDataset v3.0 folders of Open X data sets (bridge, fractal and droid are examples) and data/piper_play.
#         Every embodiment has its own action bounds, by name; A is the model's action dimension, smaller ones are padded
# steps   100,000 of 24 windows, then 20,000 of 16 on play (our choice; the paper does not give numbers)
# memory  estimated: as libero_zero_shot.sh, 3 windows a process
# hours   estimated: 59 GPU hours on H200 for the first part (24 * 4 * 7 TFLOP = 2.1 s a step at 40 % of 790 TFLOP/s), 7.9 for
#         the second (1.4 s a step): 8.4 hours on eight, without encoding
set -eu
common="-m rawdream_env world-model train --parallel fsdp2 --device cuda --objective window --model-name wan2.1-1.3b
    --checkpointing --loss.pure-noise 0 --transformer.lr 7.5e-5 --transformer.decay 1 --save-every 2000"
# shellcheck disable=SC2086  (the options in $common are words)
torchrun "$@" $common --init models/wan --run-dir runs/open_x \
    --data data/bridge,weight=2,camera=image_0,embodiment=widowx data/fractal,weight=2,embodiment=google_robot \
        data/droid,weight=1,camera=exterior_image_1_left,embodiment=franka \
    --transformer.steps 100000 --transformer.batch-size 24 --transformer.warmup 1000 --transformer.ema 0.9999
# shellcheck disable=SC2086
torchrun "$@" $common --init runs/open_x/world_model --run-dir runs/piper_play \
    --data data/piper_play,embodiment=piper --validation data/piper_play_held_out \
    --transformer.steps 20000 --transformer.batch-size 16 --transformer.warmup 500 --transformer.ema 0.999
