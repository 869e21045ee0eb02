"""What the host makes for a device."""

import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`, of one that is usually on the host, and that nobody writes to again.

    Its copy to a GPU is queued behind the work there, from pinned memory: copied from other memory,
    the host would wait until all earlier work is done, and then the device for the host.
    """
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
