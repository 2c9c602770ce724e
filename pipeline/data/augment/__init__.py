"""What can be added to the published augmentation, as pure functions of (seed, epoch, sample): `scene` is the entry."""
