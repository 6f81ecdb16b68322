"""The steps between a model's name and a running engine."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from cache.cache_log import CacheSetup, LoggedCache
from cache.expert_cache import ExpertCache
from cache.guesses import guesses_of
from cache.machines import Machine, MachineError, load_machine
from cache.trace import TraceRecorder
from cache.usage import ExpertUsage
from offload.checkpoint.dense_file import ensure_dense
from offload.checkpoint.expert_file import ExpertFile
from offload.checkpoint.formats import get_format
from offload.checkpoint.hub import ResolvedModel
from offload.checkpoint.library import OnEvent, ensure_pack
from offload.checkpoint.model_folder import side_folder
from offload.checkpoint.pack import record_layout
from offload.checkpoint.resolve import resolve
from offload.checkpoint.source import CheckpointSource, open_source
from offload.compute.calibration import load as load_calibration
from offload.compute.choose import expert_compute, grouped_kernels, products_for_cpu, published_for_cpu
from offload.compute.decoded import decode_bytes
from offload.compute.product import DECODE_BYTES, Products
from offload.compute.threads import OneThread, TorchThreads
from offload.config import DEFAULT_CONTEXT_TOKENS, DEFAULT_HOST_POLICY, EngineSettings
from offload.demo import DEMO_NAME
from offload.devices import Device, get_device
from offload.devices.on_paper import PaperDevice
from offload.errors import BudgetError, ModelError, UsageError
from offload.events import Notice, Planned
from offload.graph_choice import NOTHING_TO_LAUNCH, GraphChoice, why_no_graphs
from offload.host_side import NO_HOST_TIER, NOTHING_TO_CHOOSE, HostSide, modules_on_host
from offload.learning import earlier_events
from offload.live import LiveView
from offload.memory.activations import (
    activation_bytes,
    experts_per_token,
    graph_bytes,
    host_compute_bytes,
    row_bytes,
    staged_bytes,
)
from offload.memory.chunk import CANDIDATES as CHUNKS
from offload.memory.chunk import choose_chunk
from offload.memory.estimate import Work
from offload.memory.plan import Baseline, ModelSizes, Plan, make_plan
from offload.memory.planned import PlannedModel
from offload.memory.process import available_memory, bound_own_memory, process_memory, release_free_memory
from offload.memory.rows import (
    CANDIDATES,
    DEVICE_BYTES_PER_S,
    DISK_BYTES_PER_S,
    LINK_BYTES_PER_S,
    MEMORY_BYTES_PER_S,
    GainCurve,
)
from offload.memory.storage import AnyPlan, open_storage, staging_buffers
from offload.memory.tier_plan import Asked, TierPlan, Vram, make_tier_plan
from offload.meter import RunLabels, seconds_since_process_start
from offload.model.attention import attends_in_kernels, use_grouped_attention
from offload.model.experts import ExpertRuntime
from offload.model.families import needs_whole_prompts
from offload.model.families.deepseek_v4 import foretell_by_tokens
from offload.model.kv_cache import kv_row_memory, new_kv_cache
from offload.model.norms import fuse_norms
from offload.model.packed import can_pack
from offload.model.prefetch import RowGuesses, make_prefetcher
from offload.model.prompt import PromptEncoder
from offload.model.row_cache import whole_blocks_of
from offload.model.skeleton import count_weights, load_skeleton, skeleton_bytes
from offload.model.transformers_api import attends_eagerly
from offload.notices import say_what_is_run
from offload.planned import planned_model
from offload.protocol import OnLoad

_DEMO_RESIDENCY = 0.5


def plan_only(settings: EngineSettings, on_event: OnLoad, hardware: str | None = None) -> PlannedModel:
    """The plan and what to expect of it, from config.json alone, for this machine or for ``hardware``."""
    bound_own_memory()
    machine = _machine(hardware)
    resolved = resolve(settings, on_event, weights=False)
    with contextlib.suppress(ModelError):  # a folder with a config alone can be planned too
        _held = PromptEncoder(resolved.folder)  # its memory counts
    try:
        source = open_source(resolved.folder)  # as for a run, so that the process takes as much memory
    except ModelError:
        source = open_source(resolved.folder, weights=False)
    say_what_is_run(settings, resolved.name, source, on_event)
    device = get_device(settings.device) if machine is None else PaperDevice(machine)
    with contextlib.closing(device):
        _compiled = grouped_kernels(settings, device, source, on_event)  # as for a run, too
        available = None if machine is None else machine.ram_bytes
        plan = _plan(settings, resolved, source, device, available)
    weights = count_weights(source.model, source.experts)
    most = max(module.num_experts for module in source.experts)
    work = Work(len(source.experts), experts_per_token(source.config))
    return planned_model(plan, weights, work, most, device.machine, settings)


def _machine(name: str | None) -> Machine | None:
    try:
        return None if name is None else load_machine(name)
    except MachineError as error:
        raise UsageError(f"--hardware: {error}") from error


def _top_k(text: Any) -> int:
    return int(getattr(text, "num_experts_per_tok", None) or getattr(text, "num_experts_per_token", 0) or 0)


def open_model(settings: EngineSettings, on_event: OnLoad) -> dict[str, Any]:
    """Everything that :class:`offload.engine.Engine` is made of, as its keyword arguments."""
    bound_own_memory()
    if settings.model == DEMO_NAME:
        on_event(
            Notice(
                "using the demo model: a small one (135M) that shows the cache at work and often errs; "
                "name a real one with --model, for example --model Qwen/Qwen3-30B-A3B"
            )
        )
    resolved = resolve(settings, on_event)
    source = open_source(resolved.folder)
    say_what_is_run(settings, resolved.name, source, on_event)
    encoder = PromptEncoder(resolved.folder)
    generation_config = _generation_config(resolved.folder, source)
    with contextlib.ExitStack() as undo:  # what is open is closed again if a later step fails
        device = undo.enter_context(contextlib.closing(get_device(settings.device)))
        grouped = grouped_kernels(settings, device, source, on_event)  # what compiling takes counts in the plan
        plan = _plan(settings, resolved, source, device)  # before packing: a budget that is too small is said at once
        on_event(Planned(tuple(plan.summary()), tuple(plan.rows())))
        if device.virtual:
            on_event(Notice(f"{device.name} is a pretend GPU: all seconds and rates are what that machine would take"))
        if settings.batch_rows != 1 and not shares_passes(settings, source):
            what = f"rows of {source.config.model_type} models"
            on_event(Notice(f"{what} do not share forward passes; they run one by one"))
        _say_what_fits(settings, plan, source.method, on_event)
        if not isinstance(plan, Plan):
            device.set_budget(plan.vram_budget - plan.vram.reserved)
        folder = ensure_pack(source, resolved.name, resolved.revision, settings.format, settings.experts_dir, on_event)
        products = products_for_cpu(settings, on_event) if device.unified else Products(None, 0)
        if products.kernels is not None:
            products.kernels.states.clear()  # another model's
        file = undo.enter_context(ExpertFile(folder))
        if notice := file.fallback_notice():
            on_event(Notice(notice))
        if settings.verify:
            file.verify(on_event)
        modules = source.experts
        numbers = [module.layer for module in modules]
        most_experts = max(module.num_experts for module in modules)
        earlier = earlier_events(settings.learn_from, numbers, most_experts)
        dense = ensure_dense(source, folder, resolved.name, settings.dense_format, on_event)
        model = load_skeleton(source, device.load_device, on_event, dense, products)
        if _quantised(settings) and device.groups_attention:
            use_grouped_attention(model, products.kernels)
            if products.kernels is not None:
                fuse_norms(model, products.kernels)
        host_modules = None if device.unified else modules_on_host(modules)
        device.place(model)
        release_free_memory()
        storage = open_storage(device, plan, file, settings, on_event)
        undo.pop_all()
    slots = len(storage.arena.available)
    setup = CacheSetup(settings.policy, settings.scope, slots, tuple(numbers), most_experts, settings.seed or 0)
    if settings.cache_log is not None:
        cache: ExpertCache = LoggedCache(setup)
    else:
        cache = ExpertCache(setup.slots, setup.make_policy(earlier), setup.shared_layers(), setup.fill, setup.records)
    text = model.config.get_text_config()

    def new_recorder(folder: Path | None = None) -> TraceRecorder:
        made = TraceRecorder(resolved.name, len(modules), most_experts, _top_k(text), folder)
        parts = plan.to_json()["bytes"]
        resident = sum(size for name, size in parts.items() if name not in ("expert_slots", "unused"))
        made.add_meta(format=settings.format, expert_bytes=plan.sizes.slot_bytes, resident_bytes=resident)
        return made

    recorder = new_recorder(settings.trace_out.parent) if settings.trace_out is not None else None
    weight_format = get_format(settings.format)
    predictor = make_prefetcher(settings.prefetch, model, modules, earlier)
    published = published_for_cpu(settings, source, on_event) if device.unified else None
    compute = device.experts(expert_compute(weight_format, products, published, grouped))
    usage = ExpertUsage({module.layer: module.num_experts for module in modules})
    arena, loads = storage.arena, storage.loads
    host_side = None
    if host_modules is not None:
        host_side = HostSide(settings, source, host_modules, storage, file)
    elif settings.miss != "auto":
        on_event(Notice(f"--miss {settings.miss}: {NOTHING_TO_CHOOSE}"))
    if not device.has_graphs and settings.graphs == "on":
        on_event(Notice(f"--graphs on: {NOTHING_TO_LAUNCH}"))
    if device.unified and settings.host_policy != DEFAULT_HOST_POLICY:
        on_event(Notice(f"--host-policy {settings.host_policy}: {NO_HOST_TIER}"))
    host_experts = None if host_side is None else host_side.experts(settings.miss, on_event)
    ahead = settings.prefetch_bytes
    if ahead is None:
        each = guesses_of(experts_per_token(model.config), link=loads.link is not None)
        ahead = len(modules) * each * plan.sizes.slot_bytes
    runtime = ExpertRuntime(
        cache, arena, loads, file, weight_format, compute, recorder, predictor, usage, host_experts, ahead,
        RowGuesses(model, modules, cache),
    )  # fmt: skip
    runtime.attach(modules)
    if predictor is not None:
        foretell_by_tokens(model, modules, runtime.foretell)
    threads = TorchThreads()
    if products.kernels is not None and "native" not in (settings.format, settings.dense_format):
        products.kernels.threads = torch.get_num_threads()
        plain = attends_in_kernels(model, products.kernels) and can_pack(model, new_kv_cache(model.config, 1))
        threads = TorchThreads(OneThread(), OneThread(keeps_library=True) if plain else contextlib.nullcontext())
    return {
        "model": model,
        "threads": threads,
        "encoder": encoder,
        "generation_config": generation_config,
        "plan": plan,
        "labels": RunLabels(
            resolved.name,
            device.name,
            settings.format,
            settings.dense_format,
            settings.policy,
            settings.prefetch,
            None if device.virtual else seconds_since_process_start(),
            settings.scope,
            None if host_side is None else settings.miss,
            None if host_side is None else settings.host_policy,
        ),
        "runtime": runtime,
        "host_side": host_side,
        "storage": storage,
        "file": file,
        "live": LiveView(runtime, usage, storage),
        "new_recorder": new_recorder,
        "modules": modules,
        "graphs": GraphChoice.of(settings, device, shares_passes(settings, source), model.dtype),
        "settings": settings,
    }


def _say_what_fits(settings: EngineSettings, plan: AnyPlan, method: object, on_event: OnEvent) -> None:
    if _demo_residency(settings):
        on_event(
            Notice(
                f"the demo would fit any RAM: {plan.slots} of its {plan.sizes.num_experts} experts get a slot, so that "
                "the cache has something to do (--residency 1 holds all)"
            )
        )
    if settings.format == "native" and plan.residency < 1 and settings.model != DEMO_NAME and method is None:
        on_event(
            Notice(
                f"{plan.residency:.0%} of the experts fit the budget in the checkpoint's format; with --format int4 "
                "almost four times as many do, at some loss of quality (--dense-format int8 makes room, too)"
            )
        )


def _quantised(settings: EngineSettings) -> bool:
    return (settings.format, settings.dense_format) != ("native", "native")


def _plan(
    settings: EngineSettings,
    resolved: ResolvedModel,
    source: CheckpointSource,
    device: Device,
    ram: int | None = None,
) -> AnyPlan:
    """``ram``: of a machine that is not this one."""
    context = _context_tokens(settings, source)
    weight_format = get_format(settings.format)
    sizes = ModelSizes(
        skeleton_bytes=skeleton_bytes(source.model, source.experts, settings.dense_format),
        kv_bytes=0,
        activation_bytes=0,
        slot_bytes=max(record_layout(source, module, weight_format).record_bytes for module in source.experts),
        num_experts=sum(module.num_experts for module in source.experts),
        context_tokens=context,
        row_memory=kv_row_memory(source.model, context, settings.kv_cache),
    )
    if device.has_graphs and why_no_graphs(settings, device, shares_passes(settings, source)) is None:
        sizes = replace(sizes, graph_bytes=_graphs(source, context, sizes.row_memory.fixed))
    release_free_memory()
    now = process_memory()
    available = available_memory() if ram is None else ram - now.total
    residency = _DEMO_RESIDENCY if _demo_residency(settings) else settings.residency
    baseline = Baseline(now.anonymous, now.file)
    row_tokens = min(context, whole_blocks_of(settings.row_tokens or context))
    if device.unified and settings.vram is not None:
        raise UsageError(f"--vram: {device.name} has no memory of its own; give --ram")

    def sized(rows: int, chunk: int) -> ModelSizes:
        held = max(sizes.row_memory.bytes(context), rows * sizes.row_memory.bytes(row_tokens))
        activations = _activations(settings, source, context, chunk, rows, held)
        activations += sizes.row_memory.unpacked * max(context, rows * row_tokens)
        computing = 0 if device.unified else _host_computing(settings, source, context, chunk)
        return replace(
            sizes,
            rows=rows,
            chunk_tokens=chunk,
            kv_bytes=held,
            activation_bytes=activations,
            host_compute_bytes=computing,
        )

    def divided(with_rows: ModelSizes) -> AnyPlan:
        if device.unified:
            return make_plan(resolved.name, device.name, with_rows, baseline, available, settings.ram, residency)
        total, free = device.total_memory(), device.free_memory()
        assert total is not None and free is not None
        return make_tier_plan(
            resolved.name,
            device.name,
            with_rows,
            baseline,
            available,
            Vram(total, free, device.reserved_bytes()),
            staging_buffers(settings.read_workers),
            Asked(settings.vram, settings.ram, residency, settings.tiers == "exclusive"),
        )

    def plan(rows: int) -> AnyPlan:
        if needs_whole_prompts(source.model.config.model_type):
            return divided(sized(rows, context))
        if settings.prefill_chunk is not None:
            return divided(sized(rows, settings.prefill_chunk))
        smallest, *larger = [chunk for chunk in CHUNKS if chunk <= max(context, CHUNKS[0])]
        plans = {smallest: divided(sized(rows, smallest))}
        for chunk in larger:
            with contextlib.suppress(BudgetError):
                plans[chunk] = divided(sized(rows, chunk))
        curve = _gain_curve(source, sizes, plans[smallest])
        choice = choose_chunk({chunk: found.slots for chunk, found in plans.items()}, curve, context)
        return divided(replace(sized(rows, choice.tokens), chunk=choice))

    if not shares_passes(settings, source):
        return plan(1)
    if settings.batch_rows is not None:
        return plan(settings.batch_rows)
    plans = {1: plan(1)}
    for rows in CANDIDATES[1:]:
        with contextlib.suppress(BudgetError):
            plans[rows] = plan(rows)
    curve = _gain_curve(source, sizes, plans[1])
    return plans[curve.choose({rows: found.slots for rows, found in plans.items()})]


def shares_passes(settings: EngineSettings, source: CheckpointSource) -> bool:
    """Whether rows of a batch run together: if asked for, where the family can."""
    return settings.batch_rows != 1 and can_pack(source.model, new_kv_cache(source.config, 1))


def _gain_curve(source: CheckpointSource, sizes: ModelSizes, plan: AnyPlan) -> GainCurve:
    """At the rates of this machine, if it was measured; those of a device with memory of its own are assumed."""
    layers = len(source.experts)
    measured = load_calibration()
    disk = (measured and measured.disk_bytes_per_s) or DISK_BYTES_PER_S
    memory = (measured and measured.memory_bytes_per_s) or MEMORY_BYTES_PER_S
    if isinstance(plan, TierPlan):
        disk, memory = LINK_BYTES_PER_S if plan.in_memory == 1 else disk, DEVICE_BYTES_PER_S
    return GainCurve(
        layers,
        sizes.num_experts / layers,
        experts_per_token(source.config),
        sizes.slot_bytes,
        sizes.skeleton_bytes,
        disk,
        memory,
    )


def _activations(
    settings: EngineSettings, source: CheckpointSource, context: int, chunk: int, rows: int, kv_bytes: int
) -> int:
    """The peak inside a forward pass of ``rows`` rows, whose caches take ``kv_bytes`` together."""
    itemsize = source.dtype.itemsize
    chunk = max(chunk, rows)
    size = activation_bytes(source.config, itemsize, context, chunk, attends_eagerly(source.model))
    if _quantised(settings):
        size += DECODE_BYTES + staged_bytes(source.config, itemsize, context, chunk)
    if source.method and get_format(settings.format).published:
        size += decode_bytes(_expert_shapes(source), itemsize)
    return size + (row_bytes(source.config, itemsize, context, rows, kv_bytes) if rows > 1 else 0)


def _host_computing(settings: EngineSettings, source: CheckpointSource, context: int, chunk: int) -> int:
    """RAM for misses that the CPU computes beside a device."""
    itemsize = source.dtype.itemsize
    size = host_compute_bytes(source.config, itemsize, context, chunk)
    if settings.format != "native":
        size += DECODE_BYTES
    if source.method and get_format(settings.format).published:
        size += decode_bytes(_expert_shapes(source), itemsize)
    return size


def _graphs(source: CheckpointSource, context: int, fixed: int) -> int:
    return graph_bytes(source.config, source.dtype.itemsize, context, attends_eagerly(source.model), fixed)


def _expert_shapes(source: CheckpointSource) -> list[tuple[int, ...]]:
    return [shape for module in source.experts for shape, _ in module.tensors.values()]


def _demo_residency(settings: EngineSettings) -> bool:
    """Whether the demo's own default applies: nobody said how much memory to use."""
    return settings.model == DEMO_NAME and (settings.ram, settings.vram, settings.residency) == (None, None, None)


def _context_tokens(settings: EngineSettings, source: CheckpointSource) -> int:
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if settings.context_tokens is None:
        return min(DEFAULT_CONTEXT_TOKENS, longest or DEFAULT_CONTEXT_TOKENS)
    if longest and settings.context_tokens > longest:
        raise UsageError(f"--ctx: this model was made for at most {longest} tokens, not {settings.context_tokens}")
    return settings.context_tokens


def _generation_config(folder: Path, source: CheckpointSource) -> GenerationConfig:
    """The checkpoint's own defaults. Raises ModelError if they cannot be read."""
    path = side_folder(folder) / "generation_config.json"
    if not path.exists():
        return GenerationConfig.from_model_config(source.model.config)
    try:
        return GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: cannot be used ({reason}); mend it, or remove it to do without") from error
