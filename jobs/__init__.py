"""The commands: one stage, one entry file, at most 80 lines each."""
