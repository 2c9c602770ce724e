"""From a data set to a registered model in one command: what is chosen, what is done, what is next."""
