"""S3-FIFO: three queues, and no order by use."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from cache.keys import ExpertKey
from cache.policies.base import PolicyError
from cache.policies.queued import QueuedPolicy, Skip, Step

_PROMOTE, _REINSERT = "promote", "reinsert"
_MOST_USES = 3


class S3FIFO(QueuedPolicy):
    """New records go through a small queue; those used more than once there, or soon after they left, get to the main
    one.

    A victim comes from the small queue while it has at least ``small`` of all residents, else from the main one, whose
    records get another round for each use, at most three.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
    """

    name = "s3fifo"

    def __init__(self, *, small: float = 0.1) -> None:
        super().__init__()
        if not 0 < small < 1:
            raise PolicyError(f"s3fifo: small must be between 0 and 1, not {small}")
        self._share = small
        self._small: OrderedDict[ExpertKey, int] = OrderedDict()  # oldest first -> uses
        self._main: OrderedDict[ExpertKey, int] = OrderedDict()
        self._ghosts: OrderedDict[ExpertKey, None] = OrderedDict()  # left the small queue not long ago

    def record_event(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            queue = self._small if key in self._small else self._main
            if key in queue:
                queue[key] = min(_MOST_USES, queue[key] + 1)

    def admit(self, key: ExpertKey) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def search(self, skip: Skip) -> Iterator[Step]:
        in_small = len(self._small)
        target = self._share * (in_small + len(self._main))
        small = iter(self._small.items())
        main = iter(self._main.items())
        behind: deque[tuple[ExpertKey, int]] = deque()  # what the search puts behind the main queue
        small_left = main_left = True
        while small_left or main_left or behind:
            if small_left and (in_small >= target or not (main_left or behind)):
                key, uses = next(small, (None, 0))
                if key is None:
                    small_left = False
                elif not skip(key):
                    in_small -= 1
                    if uses > 1:
                        behind.append((key, 0))
                        yield Step(key, _PROMOTE)
                    else:
                        yield Step(key)
                continue
            key, uses = next(main, (None, 0)) if main_left else behind.popleft() if behind else (None, 0)
            if key is None:
                main_left = False
                if not behind and not small_left:
                    return
            elif not skip(key):
                if uses:
                    behind.append((key, uses - 1))
                    yield Step(key, _REINSERT)
                else:
                    yield Step(key)

    def change(self, step: Step) -> None:
        if step.change == _PROMOTE:
            del self._small[step.key]
            self._main[step.key] = 0
        else:
            self._main[step.key] -= 1
            self._main.move_to_end(step.key)

    def remove(self, key: ExpertKey) -> None:
        if key in self._main:
            del self._main[key]
            return
        del self._small[key]
        self._ghosts[key] = None
        while len(self._ghosts) > len(self._small) + len(self._main) + 1:
            self._ghosts.popitem(last=False)

    def resident(self) -> set[ExpertKey]:
        return {*self._small, *self._main}

    def check_integrity(self) -> None:
        assert not self._small.keys() & self._main.keys(), "a record is in one queue"
        assert not self._ghosts.keys() & self.resident(), "a ghost is not resident"
