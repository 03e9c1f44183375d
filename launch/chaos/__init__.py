"""Random faults that hit runs, and what must come out nonetheless."""
