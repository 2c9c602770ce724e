"""What a sweep has found: its best trial, tables for the terminal, and the page of `tune.report`."""
