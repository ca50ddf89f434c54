#!/bin/sh
# In-domain fine-tuning, the paper's upper bound: 500 rollouts of the SFT policy on the target tasks, 50 per task. Action bounds
# are those of the zero-shot model.
#
#     sh examples/world_model/in_domain.sh --nproc-per-node 4
#
# data    data/libero_spatial_rollouts: 500 rollouts, LeRobotDataset v3.0; other rollouts for --validation
# steps   20,000 of 12 windows from the zero-shot model (the paper does not say how many)
# memory  estimated: as libero_zero_shot.sh
# hours   estimated: 5.9 GPU hours on H200 (20,000 * 1.06 s, derived in libero_zero_shot.sh), 1.5 on four
set -eu
torchrun "$@" -m rawdream_env world-model train --parallel fsdp2 --device cuda --objective window \
    --init runs/libero_zero_shot/world_model --model-name wan2.1-1.3b \
    --data data/libero_spatial_rollouts --validation data/libero_spatial_held_out \
    --run-dir runs/libero_in_domain --checkpointing --loss.pure-noise 0 \
    --transformer.steps 20000 --transformer.batch-size 12 --transformer.lr 7.5e-5 --transformer.warmup 500 \
    --transformer.decay 1 --transformer.ema 0.999 --save-every 2000 --validate-every 2000
