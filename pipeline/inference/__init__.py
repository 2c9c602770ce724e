"""A trained detector at work: pictures in, boxes out; one graph for other runtimes."""
