"""Turns files into arrays: frames, sound, transcripts and the teacher's vectors."""
