"""Says in a sentence that torch has no such device, before anything is loaded."""

import torch

from dsd_p2p.errors import ConfigError


def device_type(device: str) -> str:
    """Return the type of a torch device, such as "cuda" for "cuda:1". The device need not exist here.

    Raises:
        ConfigError: torch knows no such type.
    """
    try:
        return torch.device(device).type
    except RuntimeError as exc:
        raise _unusable(device, exc) from exc


def check_device(device: str) -> None:
    """Check that tensors can be made on a torch device.

    Raises:
        ConfigError: they cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise _unusable(device, exc) from exc


def _unusable(device: str, exc: Exception) -> ConfigError:
    reason = str(exc).splitlines()[0].rstrip(".")
    return ConfigError(f"--device {device}: torch cannot use it here ({reason}); use --device cpu")
