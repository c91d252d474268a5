"""Sweeps over settings: `gtddp sweep`. (`gtddp_dist.sweep` is the recursion of a training step.)"""
