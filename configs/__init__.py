"""One file an experiment; `base.py` holds what they share."""
