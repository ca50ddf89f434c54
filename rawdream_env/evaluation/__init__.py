"""How far the dream can be trusted: fidelity of the world model, dream against simulator, and the report.

- :mod:`rawdream_env.evaluation.statistics`: rates with intervals, gains, rank correlation, kappa (numpy only);
- :mod:`rawdream_env.evaluation.fidelity`: open-loop replay of recorded episodes, PSNR and SSIM by horizon;
- :mod:`rawdream_env.evaluation.world_model`: all of it for one world model, with LPIPS, FVD and ghosting, as a command;
- :mod:`rawdream_env.evaluation.side_by_side`: one policy, the same starts, dream and simulator;
- :mod:`rawdream_env.evaluation.report`: the self-contained HTML page.

Nothing heavy is imported here; import the part you need.
"""
