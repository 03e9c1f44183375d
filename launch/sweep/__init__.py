"""Runs the points of a sweep on one machine, SLURM or Kubernetes."""
