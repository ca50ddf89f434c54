#!/bin/sh
# Co-training: the zero-shot data and, as a fifth of the windows, the demonstrations that the policy is fine-tuned on (one per
# task in the paper). Action bounds are those of the zero-shot model.
#
#     sh examples/world_model/cotrain.sh --nproc-per-node 4
#
# data    as for libero_zero_shot.sh, and data/libero_spatial_demos (`rawdream data import-hdf5`); start from the zero-shot model
# steps   20,000 of 12 windows (our choice; the paper trains jointly from the start: --init models/wan and 100,000 steps)
# memory  estimated: as libero_zero_shot.sh
# hours   estimated: 5.9 GPU hours on H200 (20,000 * 1.06 s, derived in libero_zero_shot.sh), 1.5 on four
set -eu
torchrun "$@" -m rawdream_env world-model train --parallel fsdp2 --device cuda --objective window \
    --init runs/libero_zero_shot/world_model --model-name wan2.1-1.3b \
    --data data/libero_90,weight=4 data/libero_spatial_demos,weight=1,name=demos --deploy demos \
    --run-dir runs/libero_cotrain --checkpointing --loss.pure-noise 0 \
    --transformer.steps 20000 --transformer.batch-size 12 --transformer.lr 7.5e-5 --transformer.warmup 500 \
    --transformer.decay 1 --transformer.ema 0.999 --save-every 2000
