"""Makes reference.safetensors: what the public reference code computes on the tiny checkpoint.

    python -m rawdream_env.testing.openvla_oft FOLDER
    python reference.py FOLDER CHECKOUT reference.safetensors

The second command needs an environment of its own: numpy, safetensors, timm 0.9.10, tokenizers 0.19.1 and transformers 4.40.1
as OpenVLA-OFT's fork changes it (attention of Llama over the whole sequence). CHECKOUT is a checkout of
github.com/moojink/openvla-oft. Nothing of this package is imported.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

SENTENCES = ["lift the cup", "put the pot on the stove and then, after that, stack the blue block onto the red block"]
STATISTICS = {
    "q01": [-0.75, -0.66, -0.94, -0.1, -0.21, -0.18, 0.0],
    "q99": [0.94, 0.86, 0.93, 0.1, 0.18, 0.14, 1.0],
    "mask": [True] * 6 + [False],
}
IMAGES = 2


def pixels(index: int) -> np.ndarray:
    """Normalised pixels (1, 6, 224, 224)."""
    return np.random.default_rng(100 + index).standard_normal((1, 6, 224, 224), dtype=np.float32)


def reference_model(folder: Path, checkout: str):
    """OpenVLA-OFT's model class with the weights of ``folder``."""
    sys.path.insert(0, checkout)
    for name in ("prismatic", "prismatic.training", "prismatic.vla", "prismatic.extern", "prismatic.extern.hf"):
        module = types.ModuleType(name)  # their __init__ files import the training code and its requirements
        module.__path__ = [str(Path(checkout, *name.split(".")))]
        sys.modules[name] = module
    import timm
    from prismatic.extern.hf import modeling_prismatic
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig

    raw = json.loads((folder / "config.json").read_text())
    towers = iter(raw.pop("timm_model_args"))
    create = timm.create_model
    timm.create_model = lambda *args, **kwargs: create(*args, **kwargs, **next(towers))
    config = OpenVLAConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "model_type", "image_sizes")})
    config._attn_implementation = "sdpa"
    model = modeling_prismatic.OpenVLAForActionPrediction(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))  # strict: every name and shape
    model.norm_stats = {"tiny": {"action": STATISTICS}}
    return model


def main(folder: Path, checkout: str, out: str) -> None:
    from transformers import LlamaTokenizerFast

    model = reference_model(folder, checkout)
    tokenizer = LlamaTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    head = model.language_model.lm_head
    tensors: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for index in range(IMAGES):
            prompt = f"In: What action should the robot take to {SENTENCES[index]}?\nOut:"
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            if index == 1:  # one prompt ends in the blank, the other needs it appended
                ids = torch.cat([ids, torch.tensor([[29871]])], dim=1)
            values = torch.from_numpy(pixels(index))
            scores: list[torch.Tensor] = []
            hook = head.register_forward_hook(lambda module, args, output, kept=scores: kept.append(output))
            actions, hidden = model.predict_action(
                ids, unnorm_key="tiny", pixel_values=values, attention_mask=torch.ones_like(ids)
            )
            hook.remove()
            blank = 256 + ids.shape[1] - (1 if index == 1 else 0)
            logits = scores[0][0, blank : blank + 56]
            assert torch.allclose(head(hidden)[0], logits)
            features = model.vision_backbone(values)[0]
            tensors |= {
                f"{index}.input_ids": ids[0].numpy(),
                f"{index}.features": features[::16].numpy(),
                f"{index}.logits": logits[:, 31744:32000].numpy(),
                f"{index}.tokens": logits.argmax(-1).numpy(),
                f"{index}.actions": actions.astype(np.float64),
            }
    import timm
    import transformers

    about = {"command": "python reference.py FOLDER CHECKOUT reference.safetensors"}
    about |= {"timm": timm.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, out, about)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
