"""How far the dream can be trusted: fidelity of the world model, dream against simulator, and the report.

- :mod:`rawdream_env.statistics`: rates with intervals, gains, rank correlation, kappa (numpy only);
- :mod:`rawdream_env.evaluation.world_model.replay`: recorded actions through a world model, open loop;
- :mod:`rawdream_env.evaluation.world_model.fidelity`: its frames against the recorded ones by horizon, with
  :mod:`~rawdream_env.evaluation.world_model.lpips`, :mod:`~rawdream_env.evaluation.world_model.fvd` and
  :mod:`~rawdream_env.evaluation.world_model.ghosting`;
- :mod:`rawdream_env.evaluation.world_model.evaluate`: the same as a command with a report;
- :mod:`rawdream_env.evaluation.side_by_side.evaluate`: one policy, the same starts, dream and simulator;
- :mod:`rawdream_env.evaluation.side_by_side.report`: the self-contained HTML page.

Nothing heavy is imported here; import the part you need.
"""
