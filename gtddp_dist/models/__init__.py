"""Networks. A network is one file here and one line in `gtddp_dist.registry`."""
