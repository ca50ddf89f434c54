"""The LIBERO suites: everything that knows this benchmark, its simulator, its protocols and its initial states.

Importing this package registers one robot and two environments per suite, and imports none of their parts:
``rawdream/LiberoSpatialSim-v0`` is the simulator (extra ``[libero]``), ``rawdream/LiberoSpatialDream-v0`` the dream, and so
on for Object, Goal, Long (``libero_10``) and 90.
"""

from __future__ import annotations

import gymnasium as gym

from rawdream_env.robots import Robot, register_robot

SUITES = {
    "libero_spatial": "Spatial",
    "libero_object": "Object",
    "libero_goal": "Goal",
    "libero_10": "Long",
    "libero_90": "90",
}
"""Name of a suite, which is also the name of its robot -> its part of the environment ids."""

for _suite, _title in SUITES.items():
    register_robot(
        Robot(
            name=_suite,
            dream_env=f"rawdream/Libero{_title}Dream-v0",
            sim_env=f"rawdream/Libero{_title}Sim-v0",
            sim_options=("num_workers", "image_size", "judge_every", "chunk_len"),
            episode_source="rawdream_env.libero.collect:LiberoSource",
            sim_starts=f"rawdream_env.libero.starts:{_suite}",
        )
    )
    for _kind in ("Dream", "Sim"):
        # No max_episode_steps: gym.make would add a TimeLimit on top of the environments' own horizon.
        gym.register(
            id=f"rawdream/Libero{_title}{_kind}-v0",
            entry_point=f"rawdream_env.libero.envs:Libero{_kind}Env",
            vector_entry_point=f"rawdream_env.libero.envs:Libero{_kind}VectorEnv",
            kwargs={"suite": _suite},
        )
del _suite, _title, _kind
