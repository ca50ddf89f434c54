"""How far the dream can be trusted: fidelity of the world model, dream against simulator, and the report.

- :mod:`rawdream_env.evaluation.statistics`: rates with intervals, gains, rank correlation, kappa (numpy only);
- :mod:`rawdream_env.evaluation.replay`: recorded episodes through a world model, open loop; does it hear its actions?
- :mod:`rawdream_env.evaluation.fidelity`: its frames against the recorded ones by horizon, with
  :mod:`~rawdream_env.evaluation.lpips`, :mod:`~rawdream_env.evaluation.fvd` and
  :mod:`~rawdream_env.evaluation.ghosting`;
- :mod:`rawdream_env.evaluation.world_model`: the same as a command with a report;
- :mod:`rawdream_env.evaluation.side_by_side`: one policy, the same starts, dream and simulator;
- :mod:`rawdream_env.evaluation.report`: the self-contained HTML page.

Nothing heavy is imported here; import the part you need.
"""
