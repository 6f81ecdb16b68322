"""The one typed stream that every front end consumes, and the statistics in it. Standard library only.

A generation yields :class:`PrefillProgress` (one or more), then :class:`Token` events, and always ends with exactly
one :class:`Done`. Figures that were not measured are ``None``, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Progress of a slow step before the first token: download, pack, load.

    ``done`` and ``total`` count ``unit``; ``total`` is 0 while it is not known.
    """

    stage: str
    done: int
    total: int
    unit: Literal["bytes", "steps"]


@dataclass(frozen=True, slots=True)
class Notice:
    """A line that the user should see once (a fallback, a default that was chosen). Never part of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What ``doctor`` found out about one thing.

    ``state`` is "ok", "note" (it works, and something would be better) or "problem" (a command would fail).
    ``remedy`` says what to do about the latter two.
    """

    area: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """``done`` of ``total`` prompt tokens are in the KV cache; ``reused`` of them were there from the turn before."""

    done: int
    total: int
    reused: int


@dataclass(frozen=True, slots=True)
class Token:
    """One new token. ``text`` is what can be shown of the reply now: empty while a character or stop string is
    incomplete, or while the model thinks: then ``reasoning`` is what can be shown of that. A model that thinks before
    it answers may do so again in between.
    """

    text: str
    id: int
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Counts of expert accesses: one for each distinct expert of each event (step and layer).

    ``compute_calls`` counts calls into kernels or libraries that computed experts, over ``events``.
    ``computed_on_cpu`` of the misses were computed there beside a device with memory of its own; None without one.
    ``read_ahead`` records were loaded by passes of several tokens before their event began, and ``read_ahead_used`` of
    them were taken by it (they are among ``pending``).
    """

    accesses: int
    hits: int
    pending: int
    misses: int
    computed_on_cpu: int | None
    hit_rate: float | None
    decode_hit_rate: float | None
    prefetched: int
    prefetch_used: int
    events: int
    compute_calls: int
    read_ahead: int = 0
    read_ahead_used: int = 0


@dataclass(frozen=True, slots=True)
class ByteStats:
    """``needed`` are the bytes of the distinct records that forward passes took and that were not held when the pass
    began: what had to be read. ``host_to_device``, ``device_to_host`` and ``not_moved`` (records that the CPU computed
    with where they lay) are None where slots are host memory.
    ``prefetched`` are those of the loads on a prediction, whether from disk or from RAM.
    """

    disk_read: int
    host_to_device: int | None
    per_decode_token: float | None
    needed: int | None = None
    device_to_host: int | None = None
    not_moved: int | None = None
    prefetched: int = 0


@dataclass(frozen=True, slots=True)
class SecondStats:
    """Wall time of the generation: ``compute`` is everything but the stalls.

    ``disk_busy`` is the time during which at least one read was running, whether compute waited for it or not.
    """

    compute: float
    stall_disk: float
    stall_link: float | None
    total: float
    disk_busy: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryStats:
    rss_peak_bytes: int
    ram_budget_bytes: int
    vram_peak_bytes: int | None
    vram_budget_bytes: int | None
    expert_slots: int
    residency: float


@dataclass(frozen=True, slots=True)
class TierStats:
    """The host tier: of the records that the device lacked, how many lay there. ``demoted`` came from the device."""

    slots: int
    hits: int
    misses: int
    hit_rate: float | None
    demoted: int


@dataclass(frozen=True, slots=True)
class PrefetchGain:
    """The latest test of ``prefetch`` against none: ``pairs`` of windows of decoded tokens.

    ``gain`` is how much faster it decodes (0.1: by a tenth), the mean over the pairs, and ``error`` its standard error,
    None with one pair. The rates are those of the windows.
    """

    prefetch: str
    pairs: int
    gain: float
    error: float | None
    off_tokens_per_s: float | None
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class PrefetchTrial:
    """What ``--prefetch auto`` found: ``choice`` after so many ``rounds`` of tests ("off" before the first).

    ``testing`` is what is being tested now, None between tests. ``gains`` are the latest of each candidate.
    """

    choice: str
    testing: str | None
    rounds: int
    gains: tuple[PrefetchGain, ...]

    def describe(self) -> str:
        """For people: ``next-gate (+12 %)``, ``off (next-gate: -3 %)``, ``off, testing next-gate``."""
        gains = {found.prefetch: f"{100 * found.gain:+.0f} %" for found in self.gains}
        if self.choice in gains:
            text = f"{self.choice} ({gains[self.choice]})"
        else:
            others = ", ".join(f"{name}: {gain}" for name, gain in gains.items())
            text = self.choice + (f" ({others})" if others and self.rounds else "")
        return text if self.testing is None else f"{text}, testing {self.testing}"


@dataclass(frozen=True, slots=True)
class GraphUse:
    """How the skeleton's operations are launched while one token is decoded (``--graphs``).

    ``reason``: why not as graphs. A token takes ``graphs`` launches then, in the place of ``operations``, of which one
    may be several kernels; both are 0 until one was recorded. ``tokens`` were run that way. ``held_bytes`` is what the
    device's memory lost to them.
    """

    used: bool
    reason: str | None = None
    graphs: int = 0
    operations: int = 0
    tokens: int = 0
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunStats:
    """Statistics of one generation or of a whole session. Field names are those of ``--stats-json``.

    ``start_s`` is the time from the start of the process to a loaded model; ``ttft_s`` from the request to the
    first token. ``shared_prompt_tokens`` of the ``prompt_tokens`` were copied from another row of a batch;
    ``decode_passes`` are the forward passes in which rows only decoded; ``prefill_passes`` ran ``prefilled_tokens``.
    ``miss`` and ``host_policy`` are None where slots are host memory. ``virtual``: seconds and rates are not this
    machine's but those that a simulated one would have. ``prefetch_auto`` is None unless ``prefetch`` is "auto";
    ``graphs`` is None where a device has none.
    """

    model: str
    device: str
    format: str
    dense_format: str
    policy: str
    scope: str = field(default="global", kw_only=True)
    prefetch: str
    miss: str | None = field(default=None, kw_only=True)
    host_policy: str | None = field(default=None, kw_only=True)
    seed: int | None
    prompt_tokens: int
    new_tokens: int
    start_s: float | None
    ttft_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    experts: ExpertStats
    bytes: ByteStats
    seconds: SecondStats
    memory: MemoryStats
    shared_prompt_tokens: int = 0
    decode_passes: int = 0
    prefill_passes: int = 0
    prefilled_tokens: int = 0
    host_tier: TierStats | None = None
    virtual: bool = False
    prefetch_auto: PrefetchTrial | None = None
    graphs: GraphUse | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that ``--stats-json`` writes."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a generation. ``text`` is the whole reply without stop strings, ``reasoning`` what the model thought
    before (empty: it did not); ``error`` is set with "error".
    """

    reason: FinishReason
    text: str
    prompt_tokens: int
    new_tokens: int
    stats: RunStats
    error: str | None = None
    reasoning: str = ""


Event = PrefillProgress | Token | Notice | Done


@dataclass(frozen=True, slots=True)
class RowsPass:
    """One forward pass over the rows of a batch is done: so many rows are in flight, with so many new tokens."""

    running: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class RowDone:
    """The end of one row of a batch; ``row`` counts the rows in the order in which they were taken. For the rest see
    :class:`Done`.
    """

    row: int
    reason: FinishReason
    text: str
    prompt_tokens: int
    new_tokens: int
    error: str | None = None
    reasoning: str = ""


RowEvent = RowsPass | RowDone | Notice


@dataclass(frozen=True, slots=True)
class Planned:
    """The memory plan, told before anything is packed or loaded: ``rows`` are (what, bytes, remark)."""

    summary: tuple[str, ...]
    rows: tuple[tuple[str, int, str], ...]


class ExpertState(IntEnum):
    """Where a record stands: in the device's slots, or, of those that are not there, in host memory behind them."""

    ABSENT = 0
    LOADING = 1
    READY = 2
    HOSTED = 3


@dataclass(frozen=True, slots=True)
class TierUse:
    """Slots of one tier that hold a record or wait for one, and how many accesses it served since the start."""

    name: str
    used: int
    slots: int
    hits: int


@dataclass(frozen=True, slots=True)
class TokenSample:
    """What one decoding forward pass took. ``seconds`` is its wall time, the stalls included; None: no such tier."""

    hits: int
    pending: int
    misses: int
    disk_bytes: int
    seconds: float
    stall_disk: float
    link_bytes: int | None = None
    stall_link: float | None = None


@dataclass(frozen=True, slots=True)
class LiveChanges:
    """What can be changed while a model is loaded. None leaves a setting as it is.

    ``residency`` is a share of all experts, ``ram`` the process's budget in bytes, ``vram`` that of the device's own
    memory, ``miss`` the way of experts that the device lacks, ``host_policy`` the policy of the RAM behind it.
    """

    policy: str | None = None
    scope: str | None = None
    prefetch: str | None = None
    miss: str | None = None
    host_policy: str | None = None
    residency: float | None = None
    ram: int | None = None
    vram: int | None = None


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Where a batch stands. ``rows_done`` of ``rows_total`` (None: not known) have their output row, rows of an
    earlier run included; ``row_tokens`` are the new tokens of the ``running`` rows. ``tokens_per_s`` is that of the
    run, prompts' time included; the hit rate and the bytes read for each new token are those of the session.
    """

    rows_done: int
    rows_total: int | None
    errors: int
    new_tokens: int
    row_tokens: int
    tokens_per_s: float | None
    hit_rate: float | None
    running: int = 0
    bytes_per_token: float | None = None
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """The expert cache and the counters at one moment: a copy that nobody changes afterwards.

    The sequences of sequences are [layer][expert], layers in the order of ``layers`` (their numbers in the model), each
    as long as the layer has experts. ``states`` holds values of :class:`ExpertState`. ``last_use`` and ``last_miss``
    are numbers of forward passes, -1 for never; ``forward`` is that of the latest pass. ``hits`` and ``misses`` count
    accesses since the start; a pending counts as neither. ``recent`` are the latest decoded tokens, oldest first.
    ``stats`` are those of the session, the running generation included; ``ttft_s`` that of the latest answer.
    ``context_used`` are the tokens in the KV cache. ``current`` is what :class:`LiveChanges` would change, None where
    the engine has no such setting.
    """

    layers: tuple[int, ...]
    states: tuple[bytes, ...]
    last_use: tuple[Sequence[int], ...]
    last_miss: tuple[Sequence[int], ...]
    hits: tuple[Sequence[int], ...]
    misses: tuple[Sequence[int], ...]
    forward: int
    tiers: tuple[TierUse, ...]
    recent: tuple[TokenSample, ...]
    stats: RunStats
    ttft_s: float | None
    context_used: int
    rss_bytes: int
    vram_bytes: int | None
    current: LiveChanges
