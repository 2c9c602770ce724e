"""Operations of torch that make the host wait for the device, and a mode that refuses them."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# They bring a number from the device to the host, and so wait for it.
HOST_SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero"}


class RefuseHostSyncs(TorchDispatchMode):
    """Within it such an operation is an AssertionError, also on a CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in HOST_SYNCS, f"{name} makes the host wait for the device"
        return function(*args, **(kwargs or {}))
