"""Benchmarks: commands that measure, and record with what they measured. Ratios within one run, not seconds."""
