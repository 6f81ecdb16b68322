"""Terminal front ends. They depend on :mod:`offload.events` and :mod:`offload.protocol` only, never on torch."""
