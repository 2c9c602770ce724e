"""Convolutional backbones: their construction from a config, their norms and their initial weights."""
