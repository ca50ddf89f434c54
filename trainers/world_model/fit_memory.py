"""Before anything is allocated: does the training fit into the memory that is free, and with which settings?"""

from __future__ import annotations

import logging
from dataclasses import replace

from rawdream_env.trainers.common.distributed import ProcessGroup
from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
from rawdream_env.world_models.memory import fit_training, free_memory, require_memory
from rawdream_env.world_models.memory_estimates import GIB, training_memory

_logger = logging.getLogger(__name__)


def within_memory(config: WorldModelTrainConfig, group: ProcessGroup) -> WorldModelTrainConfig:
    """``config`` as it is, or with ``fit_memory`` the settings that fit best; only the cost of a step depends on them.

    Raises:
        NotEnoughMemoryError: it does not fit.
    """
    arch, rows = config.model, config.transformer.batch_size // group.size
    free = free_memory(group.device)
    if group.device == "cpu":
        free //= group.size  # of one machine
    frames = 1 + arch.context_latents + arch.chunk_latents
    if config.objective == "episode":  # teacher forcing: the clean frames, and as many noisy ones
        frames = 1 + 2 * config.episode_chunks * arch.chunk_latents
    shards = group.size if config.parallel == "fsdp2" else 1
    if not config.fit_memory:
        windows = min(config.micro_batch_size or rows, rows)
        estimate = training_memory(
            arch,
            windows,
            frames,
            world_size=shards,
            checkpointing=config.checkpointing,
            offload_optimizer=config.offload,
        )
        if group.device == "cpu":  # no context, no libraries' work space
            estimate = estimate.without("headroom")
        require_memory(estimate, free, f"Training {windows} rows at a time")
        return config
    divisors = [size for size in range(rows, 0, -1) if rows % size == 0]
    fit = fit_training(arch, free, divisors, frames=frames, world_size=shards, may_offload=config.parallel != "fsdp2")
    fit = group.value_from_first(fit)
    if group.first:
        _logger.info(
            "Training %d of %d rows at a time%s%s: about %.1f of the %.1f GiB that are free.",
            fit.micro_batch,
            rows,
            ", activations computed twice" if fit.checkpointing else "",
            ", the optimiser on the host" if fit.offload else "",
            fit.estimate.total / GIB,
            free / GIB,
        )
    return replace(config, micro_batch_size=fit.micro_batch, checkpointing=fit.checkpointing, offload=fit.offload)
