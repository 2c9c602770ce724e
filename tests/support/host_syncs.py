"""Which operations of torch make the host wait for the device."""

# these bring a number from the device to the host, and so wait for it
HOST_SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero"}
