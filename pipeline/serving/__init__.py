"""A trained detector over HTTP: what a request may be and cost, the application, its page, replicas in Ray Serve."""
