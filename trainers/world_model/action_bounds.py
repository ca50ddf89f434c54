"""Action bounds of a training run: one raw action is one condition, in every data set, in fine-tuning and in a rollout.

The paper normalises actions with the q01 and q99 of the world model's training data (appendix A.1). Data sets of one
embodiment (a robot and its action convention) therefore share their bounds:

- a model that is trained further keeps the bounds it was trained with;
- a new action path gets the quantiles of all data of the embodiment together, each action counted once, whatever the
  weights of the data sets.

Embodiments are named by the user (``embodiment=NAME`` in a data entry), as a mixture of Open X data sets needs it: the same
number is another distance on another robot. Data without a name are the embodiment "", that of the model's rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rawdream_env.data import schema
from rawdream_env.errors import CheckpointError, DatasetError
from rawdream_env.files import read_json
from rawdream_env.trainers.world_model.latent_dataset import LatentDataset, QuantileBounds
from rawdream_env.world_models.wan.rollout import WanWorldModel

NO_INFORMATION = 1e6
"""Half the width of the bounds of an action dimension that never moved: every value becomes about 0."""
STATISTICS = "statistics.json"


def rollout_bounds(bounds: QuantileBounds, action_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``action_low`` and ``action_high`` of a rollout that normalises like ``normalise_actions``: dimensions that never
    moved, and those that the data do not have, become 0.
    """
    low, high = (np.pad(np.asarray(side, np.float64), (0, action_dim - len(side))) for side in bounds)
    still = high - low < 1e-6
    low, high = np.where(still, -NO_INFORMATION, low), np.where(still, NO_INFORMATION, high)
    return tuple(low.tolist()), tuple(high.tolist())


def action_path_is_new(model: WanWorldModel) -> bool:
    """Whether no action has an effect yet, as in a model that was converted from Wan."""
    last = model.transformer.condition_embedder.action_proj
    return not (last.weight.any() or last.bias.any())


def bounds_of_model(model: WanWorldModel | None, folder: str | Path) -> dict[str, QuantileBounds]:
    """The bounds by embodiment that ``model``, read from ``folder``, was trained with; "" are those of its rollouts.

    Empty without a model or with a new action path. Statistics of an earlier version, which were separate for each data
    set, count as embodiments with the names of the data sets.
    """
    if model is None or action_path_is_new(model):
        return {}
    known = {"": (np.asarray(model.config.action_low), np.asarray(model.config.action_high))}
    path = Path(folder) / STATISTICS
    for label, entry in (read_json(path) if path.is_file() else {}).items():
        try:
            low, high = (np.asarray(entry.get(new, entry[old]), np.float64)
                         for new, old in (("action_low", "q01"), ("action_high", "q99")))  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has no action quantiles of {label!r}; restore it from a copy.") from error
        if low.ndim != 1 or low.shape != high.shape or not np.isfinite([low, high]).all():
            raise CheckpointError(f"{path} has unusable action quantiles of {label!r}; restore it from a copy.")
        if name := str(entry.get("embodiment", label)):
            known[name] = low, high
    return known


def bounds_of_data(
    datasets: Sequence[LatentDataset], embodiments: Sequence[str], known: Mapping[str, QuantileBounds]
) -> list[QuantileBounds]:
    """The bounds of each data set, (A,) each: those ``known`` for its embodiment, else those of all its data together.

    Raises:
        DatasetError: data sets of one embodiment, or its known bounds, have different numbers of action dimensions.
    """
    shared = dict(known)
    for name in dict.fromkeys(embodiments):
        members = [d for d, own in zip(datasets, embodiments, strict=True) if own == name]
        dims = {str(d.folder): d.action_dim for d in members}
        if len(set(dims.values())) > 1:
            raise DatasetError(
                f"data sets of one embodiment share their action statistics, but have different action dimensions: {dims}. "
                "Name the embodiments: embodiment=NAME in each data entry."
            )
        if name not in shared:
            shared[name] = _quantiles(members)
        dim, (low, high) = members[0].action_dim, shared[name]
        if len(low) < dim or (np.abs([low[dim:], high[dim:]]) < NO_INFORMATION).any():
            raise DatasetError(
                f"{members[0].folder} has {dim} action dimensions, but the model was trained with bounds of {len(low)} for "
                f"embodiment {name!r}. If it is another robot, add embodiment=NAME to its data entry."
            )
        shared[name] = low[:dim], high[:dim]
    return [shared[name] for name in embodiments]


def _quantiles(datasets: Sequence[LatentDataset]) -> QuantileBounds:
    """q01 and q99 over all actions of some data sets."""
    if len(datasets) == 1:
        return datasets[0].bounds
    stats = schema.numeric_stats(np.concatenate([dataset.all_actions() for dataset in datasets]))
    return stats["q01"], stats["q99"]
