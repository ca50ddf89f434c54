"""Benchmarks: ratios measured with both sides interleaved in one run. ``python -m benchmarks`` runs all of them."""
