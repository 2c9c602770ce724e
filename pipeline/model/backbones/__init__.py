"""Convolutional backbones: which one a config means, their norms and their starting weights."""
