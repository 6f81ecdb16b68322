"""States of a pass: their memory is used again, and never while somebody holds it."""

from __future__ import annotations

import torch

from offload.compute.states import LEAST_BYTES, States

SHAPE = (512, 1024)  # a MiB of bfloat16


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    states = States()
    first = states.empty(SHAPE, torch.bfloat16)
    place = first.data_ptr()
    assert first.shape == SHAPE and first.dtype == torch.bfloat16 and first.is_contiguous() and place % 64 == 0
    second = states.empty(SHAPE, torch.bfloat16)
    assert second.data_ptr() != place
    view = first.view(2, -1)[1:].transpose(0, 1)
    del first
    assert states.empty(SHAPE, torch.bfloat16).data_ptr() not in (place, second.data_ptr()), "a view is held"
    assert states.bytes == 3 * LEAST_BYTES
    del view
    again = [states.empty((1, *SHAPE), torch.bfloat16), states.empty((256, 1024), torch.float32)]
    assert place in [state.data_ptr() for state in again]
    assert states.bytes == 3 * LEAST_BYTES


def test_modules_may_keep_what_they_are_given() -> None:
    states = States()
    with torch.inference_mode():
        total = torch.zeros(SHAPE)
        kept = []
        for number in range(4):
            state = states.empty(SHAPE, torch.float32).fill_(number)
            total += state
            kept.append(state.unsqueeze(0) if number % 2 else state + 0)
    assert [float(state.flatten()[0]) for state in kept] == [0, 1, 2, 3]
    assert (total == 6).all()


def test_small_and_large_ones_are_left_to_the_allocator_and_the_rest_is_bounded() -> None:
    states = States(8 * LEAST_BYTES)
    small = states.empty((3, 5), torch.float32)
    large = states.empty((2 * LEAST_BYTES,), torch.uint8)
    assert small.shape == (3, 5) and large.shape == (2 * LEAST_BYTES,) and states.bytes == 0
    held = [states.empty((LEAST_BYTES,), torch.uint8) for _ in range(8)]
    assert states.bytes == 8 * LEAST_BYTES
    for number, state in enumerate(held):
        state.fill_(number)
    more = states.empty((LEAST_BYTES,), torch.uint8).fill_(100)
    assert states.bytes == LEAST_BYTES
    assert [int(state[-1]) for state in held] == list(range(8)) and int(more[0]) == 100
    states.clear()
    assert states.bytes == 0 and int(more[-1]) == 100
