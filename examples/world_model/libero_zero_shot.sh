#!/bin/sh
# The paper's zero-shot world model: Wan 2.1 trained on LIBERO-90 rollouts, without any rollout of the target tasks.
#
#     with torchrun's options as arguments:  sh examples/world_model/libero_zero_shot.sh --nproc-per-node 4
#
# data    data/libero_90: rollouts of an SFT policy on the 90 tasks with Gaussian noise on its actions, as LeRobotDataset
#         v3.0; data/libero_90_held_out: other rollouts. models/wan: `rawdream world-model convert`, at 256 pixels
# steps   100,000 of 12 windows of 33 frames, lr 7.5e-5, warm-up and cosine (paper, appendix A.1)
# memory  estimated: 1.4 G parameters; weights, gradients, two moments and averages in fp32 are 20 B each = 28 GB in all,
#         spread by fsdp2; activations with --checkpointing about 10 GB for 3 windows
# hours   estimated: 29 GPU hours on H200, 7.4 on four. A pass over 9 latent frames is 34.8 / 5 = 7 TFLOP; forward, backward
#         and checkpointing's second forward are 4 of them: 12 * 4 * 7 = 334 TFLOP a step, 1.06 s at 40 % of 790 TFLOP/s.
#         Not included: encoding, once, at 0.44 TFLOP per frame and five passes (four of them for --window-latents anchored)
set -eu
torchrun "$@" -m rawdream_env world-model train --parallel fsdp2 --device cuda --objective window \
    --init models/wan --model-name wan2.1-1.3b --data data/libero_90 --validation data/libero_90_held_out \
    --run-dir runs/libero_zero_shot --checkpointing --loss.pure-noise 0 \
    --transformer.steps 100000 --transformer.batch-size 12 --transformer.lr 7.5e-5 --transformer.warmup 1000 \
    --transformer.decay 1 --transformer.ema 0.9999 --save-every 2000 --validate-every 5000
