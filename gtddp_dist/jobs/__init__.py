"""Jobs: runs submitted to Slurm, put back into its queue, watched. No torch. See docs/design/0003-jobs.md."""
