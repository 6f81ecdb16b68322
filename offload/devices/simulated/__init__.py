"""A pretend GPU, so that everything about GPUs but their arithmetic runs, is timed and is tested without one."""

from offload.devices.simulated.device import SimulatedDevice
from offload.devices.simulated.tensor import SimulatedError, VramExhausted

__all__ = ["SimulatedDevice", "SimulatedError", "VramExhausted"]
