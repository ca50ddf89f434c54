"""The state of B imagined episodes, batched along dim 0, and the checks of what a world model is given.

Rows can be selected, mixed and joined without an effect on other rows: ``State.where`` resets some rows, ``state[rows]``
removes finished episodes, and ``State.cat`` adds replays.

Shape letters: B rows, H W picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from rawdream_env.errors import InvalidActionError
from rawdream_env.seeding import NoiseKey

State = TypeVar("State", bound="RowState")
Rows = Sequence[int] | np.ndarray | Tensor | slice


@dataclass(frozen=True)
class RowState:
    """Base of the states. A field of a subclass is a tensor (B, ...), a tuple of such tensors (which may be empty), or a tuple
    with one label per row.
    """

    keys: tuple[NoiseKey, ...]
    chunks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Rows) -> Self:
        """The chosen rows (indices, which may repeat, a slice or a boolean mask) as a state of their own."""
        index = np.arange(len(self))[rows.numpy() if isinstance(rows, Tensor) else rows]
        picked = torch.as_tensor(np.atleast_1d(index))
        chosen = picked.tolist()
        return _build([self], lambda x: x[0][picked.to(x[0].device)], lambda x: tuple(x[0][i] for i in chosen))

    @classmethod
    def where(cls, mask: Sequence[bool] | np.ndarray | Tensor, a: Self, b: Self) -> Self:
        """Row by row ``a`` where ``mask`` (B,) is true, else ``b``."""
        chosen = [bool(m) for m in mask]
        pick = torch.tensor(chosen)

        def mix(x: Sequence[Tensor]) -> Tensor:
            return torch.where(pick.to(x[0].device).view(-1, *[1] * (x[0].dim() - 1)), x[0], x[1])

        return _build([a, b], mix, lambda x: tuple(p if m else q for m, p, q in zip(chosen, x[0], x[1], strict=True)))

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Join states along the rows."""
        return _build(list(states), torch.cat, lambda x: sum(x, ()))


def _build(
    states: list[State],
    tensor: Callable[[list[Tensor]], Tensor],
    label: Callable[[list[tuple[Any, ...]]], tuple[Any, ...]],
) -> State:
    """A state whose fields are computed from the same fields of ``states``."""
    out: dict[str, Any] = {}
    for name in (field.name for field in fields(states[0])):
        values = [getattr(state, name) for state in states]
        if isinstance(values[0], Tensor):
            out[name] = tensor(values)
        elif all(isinstance(item, Tensor) for item in values[0]):
            out[name] = tuple(tensor(list(group)) for group in zip(*values, strict=True))
        else:
            out[name] = label(values)
    return type(states[0])(**out)


def check_start(frames: Tensor, keys: Sequence[NoiseKey], frame_shape: tuple[int, ...]) -> None:
    """``ValueError`` unless ``frames`` are uint8 (B, H, W, 3) of ``frame_shape`` and there is one key for each."""
    if frames.shape[1:] != frame_shape or frames.dtype != torch.uint8:
        raise ValueError(
            f"start frames must be uint8 {('B', *frame_shape)}, got {frames.dtype} {tuple(frames.shape)}; "
            "resize them to the world model's frame_shape"
        )
    if len(keys) != len(frames):
        raise ValueError(f"{len(frames)} start frames but {len(keys)} noise keys")


def checked_actions(actions: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A chunk of actions (B, K, A) as fp32 on the CPU.

    Raises:
        InvalidActionError: another shape, or values that are not finite.
    """
    actions = torch.as_tensor(actions, dtype=torch.float32).cpu()
    if actions.shape != shape:
        raise InvalidActionError(f"actions must have shape {shape}, got {tuple(actions.shape)}")
    if not torch.isfinite(actions).all():
        raise InvalidActionError("actions contain NaN or infinity; check the policy before stepping")
    return actions
