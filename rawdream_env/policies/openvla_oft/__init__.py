"""OpenVLA-OFT with discrete action tokens, built from stock transformers.

======================  ============================================================================================
``policy.py``           ``OpenVLAOFT``: the model behind the policy protocol
``config.py``           sizes, and which checkpoints can be used
``checkpoint.py``       safetensors by upstream names, in one file or in shards
``vision.py``           DINOv2 and SigLIP towers, projector
``language.py``         Llama with bidirectional attention, and its self-test
``images.py, jpeg.py``  the image pipeline without TensorFlow
``augment.py``          random crops and colors of supervised training
``prompt.py``           instructions to token ids
``statistics.py``       model actions to environment actions and back
``adapters.py``         LoRA: add, export, save, load
``frame_cache.py``      prepared frames and features of frozen towers, computed once
======================  ============================================================================================
"""
