"""Around training: comparing runs."""
