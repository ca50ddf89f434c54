"""Evaluation of world models, judges and policies, with reports.

- :mod:`rawdream_env.statistics`: rates with intervals, gains, rank correlation, kappa (numpy only);
- :mod:`rawdream_env.evaluation.world_model.replay`: replay of recorded actions in a world model (open loop);
- :mod:`rawdream_env.evaluation.world_model.fidelity`: imagined against recorded frames by horizon, with
  :mod:`~rawdream_env.evaluation.world_model.lpips`, :mod:`~rawdream_env.evaluation.world_model.fvd` and
  :mod:`~rawdream_env.evaluation.world_model.ghosting`;
- :mod:`rawdream_env.evaluation.world_model.evaluate`: ``rawdream world-model evaluate``;
- :mod:`rawdream_env.evaluation.judges.evaluate`: ``rawdream judge evaluate``;
- :mod:`rawdream_env.evaluation.side_by_side.evaluate`: ``rawdream policy evaluate``, policies in the dream and
  in the simulator from the same starts;
- :mod:`rawdream_env.evaluation.side_by_side.report`: the self-contained HTML page.

Import the submodule you need: this module imports nothing heavy.
"""
