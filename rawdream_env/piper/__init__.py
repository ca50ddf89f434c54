"""The AgileX Piper tabletop: everything that knows this robot and its scene.

Importing this package registers the robot and its environments, and imports none of its parts.
"""

from __future__ import annotations

import gymnasium as gym

from rawdream_env.robots import Robot, register_robot

register_robot(
    Robot(
        name="piper",
        dream_env="rawdream/PiperDream-v0",
        sim_env="rawdream/PiperSim-v0",
        real_env="rawdream/PiperReal-v0",
        sim_options=("num_workers", "image_size", "judge_every", "layout"),
        kinematics="rawdream_env.piper.arm_map:ArmMap",
        scene="rawdream_env.piper.scene:SCENE",
        view="rawdream_env.piper.simulator.view:PiperView",
        goals="rawdream_env.piper.hindsight:GRAMMAR",
        episode_source="rawdream_env.piper.collect:PiperSource",
        sim_starts="rawdream_env.piper.starts:SimStarts",
        start_pack="rawdream_env.piper.starts:bundled_pack",
    )
)
for _name, _home in (("PiperDream", "envs"), ("PiperSim", "envs"), ("PiperReal", "real")):
    # No max_episode_steps: gym.make would add a TimeLimit on top of the environments' own horizon.
    gym.register(
        id=f"rawdream/{_name}-v0",
        entry_point=f"rawdream_env.piper.{_home}:{_name}Env",
        vector_entry_point=f"rawdream_env.piper.{_home}:{_name}VectorEnv",
    )
del _name, _home
