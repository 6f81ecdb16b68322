"""The compiled kernels as Python functions over tensors. docs/formats.md has the layout of the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from offload.compute.kernels.build import BuildError, build
from offload.compute.states import States

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Shape(ctypes.Structure):
    """A quantised matrix: ``rows`` outputs of ``columns`` inputs; ``group`` is 0 with 8 bits (one scale a row)."""

    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "columns", "padded", "group", "bits")]


class Job(ctypes.Structure):
    """Weights (or, for an expert, its record) and the rows of the input that go through them."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("first", ctypes.c_int32),
        ("count", ctypes.c_int32),
    ]


class Expert(ctypes.Structure):
    """Where the matrices of a gated expert stand in its record, in bytes."""

    _fields_ = [
        ("gate_up", Shape),
        ("down", Shape),
        ("gate_up_codes", ctypes.c_int64),
        ("gate_up_params", ctypes.c_int64),
        ("down_codes", ctypes.c_int64),
        ("down_params", ctypes.c_int64),
    ]


class Attention(ctypes.Structure):
    """One token's queries, and the keys and values that they look at; distances are in values."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_head", "key_head", "key_step", "value_head", "value_step")),
        *((name, ctypes.c_int32) for name in ("heads", "shared", "keys", "width", "value_width", "dtype")),
        ("scale", ctypes.c_float),
    ]


class Prompt(ctypes.Structure):
    """The queries of many tokens, the keys and values that they look at, and where the results go."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_int64) for name in ("query_head", "query_step", "key_head", "key_step")),
        *((name, ctypes.c_int64) for name in ("value_head", "value_step")),
        *((name, ctypes.c_int32) for name in ("heads", "shared", "tokens", "keys", "width", "value_width", "window")),
        ("scale", ctypes.c_float),
    ]


HEAD_STEP, MOST_HEAD_WIDTH = 16, 512
"""What the attention kernel takes: heads whose width is a multiple of the first, at most the second."""


class Kernels:
    """The library's functions. Each call uses :attr:`threads`, or torch's number of threads where that is None.

    Inputs and outputs are contiguous float32 or bfloat16. Products of float32 inputs are exact in float32. With
    ``integer_dot`` bfloat16 inputs, and what goes into the second matrix of such an expert, are taken as integers:
    beside 4-bit weights as 8 bits with a scale for each of the weights' groups, beside 8-bit weights as 15 bits with a
    scale for every 128 columns, or 64 in the kernels for many tokens (the ``wide`` ones).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._linear = library.rl_linear
        self._experts = library.rl_silu_experts
        self._wide_linear = library.rl_wide_linear
        self._wide_experts = library.rl_wide_experts
        self._combine = library.rl_combine
        self._decode = library.rl_decode
        self._encode = library.rl_encode
        self._rms_norm = library.rl_rms_norm
        self._attend = library.rl_attend
        self._attend_prompt = library.rl_attend_prompt
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._linear.argtypes = [pointer, number, pointer, pointer, number, pointer, number, pointer, number, number]
        self._experts.argtypes = [pointer, number, pointer, pointer, number, number, pointer, number, pointer, number]
        self._wide_linear.argtypes = [pointer, number, pointer, pointer, pointer, pointer, number, number]
        self._wide_experts.argtypes = [pointer, number, pointer, pointer, pointer, pointer, number]
        self._combine.argtypes = [number, number, pointer, pointer, pointer, number, pointer, number, number]
        self._decode.argtypes = [pointer, pointer, pointer, pointer, number, number]
        self._encode.argtypes = [pointer, pointer, number, pointer, pointer, pointer, number]
        self._rms_norm.argtypes = [number, number, pointer, pointer, number, ctypes.c_float, number, pointer, number]
        self._attend.argtypes = [pointer, pointer, number]
        self._attend_prompt.argtypes = [pointer, number]
        self.threads: int | None = None
        self.states = States()
        """Where results of many tokens go."""
        self.integer_dot = bool(library.rl_integer_dot())
        """Whether the processor has integer dot products, and so there are products for many tokens, of bfloat16
        inputs."""
        self.prompts = bool(library.rl_prompts())
        """Whether there is :meth:`attend_prompt`."""

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def linear(
        self,
        shape: Shape,
        jobs: Sequence[tuple[int, int, int, int]],
        inputs: torch.Tensor,
        output: torch.Tensor,
        token_of: torch.Tensor | None = None,
    ) -> None:
        """``output[r] = weights @ inputs[token_of[r]]`` for the rows of each job: (codes, params, first row, rows).

        ``inputs`` is [tokens, columns], ``output`` [rows, shape.rows], ``token_of`` int32[rows] (None: row is token).
        """
        _check(
            self._linear(
                ctypes.byref(shape),
                len(jobs),
                (Job * len(jobs))(*(Job(*job) for job in jobs)),
                inputs.data_ptr(),
                _DTYPES[inputs.dtype],
                None if token_of is None else token_of.data_ptr(),
                inputs.dtype == torch.float32,
                output.data_ptr(),
                _DTYPES[output.dtype],
                self._threads(),
            )
        )

    def silu_experts(
        self,
        expert: Expert,
        jobs: Sequence[tuple[int, int, int, int]],
        inputs: torch.Tensor,
        output: torch.Tensor,
        token_of: torch.Tensor,
    ) -> None:
        """``output[r] = down(silu(gate(x)) * up(x))`` with ``x = inputs[token_of[r]]``; a job names its record, and 0.

        ``inputs`` is [tokens, hidden], ``output`` float32[rows, hidden], ``token_of`` int32[rows].
        """
        _check(
            self._experts(
                ctypes.byref(expert),
                len(jobs),
                (Job * len(jobs))(*(Job(*job) for job in jobs)),
                inputs.data_ptr(),
                _DTYPES[inputs.dtype],
                inputs.shape[0],
                token_of.data_ptr(),
                inputs.dtype == torch.float32,
                output.data_ptr(),
                self._threads(),
            )
        )

    def wide_linear(
        self,
        shape: Shape,
        jobs: Sequence[tuple[int, int, int, int]],
        inputs: torch.Tensor,
        output: torch.Tensor,
        token_of: torch.Tensor | None = None,
    ) -> None:
        """As :meth:`linear` with ``inputs`` in bfloat16, for many tokens; see :attr:`integer_dot`."""
        _check(
            self._wide_linear(
                ctypes.byref(shape),
                len(jobs),
                (Job * len(jobs))(*(Job(*job) for job in jobs)),
                inputs.data_ptr(),
                None if token_of is None else token_of.data_ptr(),
                output.data_ptr(),
                _DTYPES[output.dtype],
                self._threads(),
            )
        )

    def wide_experts(
        self,
        expert: Expert,
        jobs: Sequence[tuple[int, int, int, int]],
        inputs: torch.Tensor,
        output: torch.Tensor,
        token_of: torch.Tensor,
    ) -> None:
        """As :meth:`silu_experts` with ``inputs`` in bfloat16, for many tokens; see :attr:`integer_dot`."""
        _check(
            self._wide_experts(
                ctypes.byref(expert),
                len(jobs),
                (Job * len(jobs))(*(Job(*job) for job in jobs)),
                inputs.data_ptr(),
                token_of.data_ptr(),
                output.data_ptr(),
                self._threads(),
            )
        )

    def combine(
        self, products: torch.Tensor, weights: torch.Tensor, token_of: torch.Tensor, output: torch.Tensor
    ) -> None:
        """``output[token_of[r]] = sum of weights[r] * products[r]`` in the order of r; overwrites ``output``.

        ``products`` is float32[rows, hidden], ``weights`` float32[rows], ``output`` [tokens, hidden].
        """
        rows, hidden = products.shape
        _check(
            self._combine(
                rows,
                hidden,
                products.data_ptr(),
                weights.data_ptr(),
                token_of.data_ptr(),
                output.shape[0],
                output.data_ptr(),
                _DTYPES[output.dtype],
                self._threads(),
            )
        )

    def decode(self, shape: Shape, codes: int, params: int, output: torch.Tensor) -> None:
        """The weights themselves into ``output`` [rows, columns]; ``codes`` and ``params`` are addresses."""
        _check(
            self._decode(
                ctypes.byref(shape),
                codes,
                params,
                output.data_ptr(),
                _DTYPES[output.dtype],
                self._threads(),
            )
        )

    def encode(
        self, shape: Shape, weights: torch.Tensor, codes: torch.Tensor, params: torch.Tensor
    ) -> tuple[float, float]:
        """Quantise ``weights`` [rows, columns] into ``codes`` and ``params``.

        Returns the sums of squared errors and of squared weights.
        """
        sums = (ctypes.c_double * 2)()
        _check(
            self._encode(
                ctypes.byref(shape),
                weights.data_ptr(),
                _DTYPES[weights.dtype],
                codes.data_ptr(),
                params.data_ptr(),
                sums,
                self._threads(),
            )
        )
        return sums[0], sums[1]

    def rms_norm(
        self, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float, way: int, output: torch.Tensor
    ) -> None:
        """The root mean square norm of each row of ``inputs`` [..., width], times ``weight`` [width], into ``output``.

        All are contiguous and of one dtype. ``way``: 0 rounds before the product and after it, 1 only after it, 2 is
        as 1 with a weight of ``1 + weight``.
        """
        width = weight.shape[0]
        _check(
            self._rms_norm(
                inputs.numel() // width,
                width,
                inputs.data_ptr(),
                weight.data_ptr(),
                _DTYPES[inputs.dtype],
                epsilon,
                way,
                output.data_ptr(),
                self._threads(),
            )
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, output: torch.Tensor
    ) -> None:
        """One token's attention over all keys, into ``output`` [heads, value width], contiguous.

        ``query`` is [heads, width], ``key`` [shared heads, keys, width], ``value`` [shared heads, keys, value width],
        all of one dtype with any distances but that of the last dimension, which is 1; see :data:`HEAD_STEP`.
        """
        what = Attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            query.stride(0),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            query.shape[0],
            key.shape[0],
            key.shape[1],
            query.shape[1],
            value.shape[2],
            _DTYPES[query.dtype],
            scale,
        )
        _check(self._attend(ctypes.byref(what), output.data_ptr(), self._threads()))

    def attend_prompt(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        output: torch.Tensor,
    ) -> None:
        """Causal attention of many tokens, the last of all keys, into ``output`` [tokens, heads, value width].

        ``query`` is [heads, tokens, width], ``key`` and ``value`` as in :meth:`attend`; all are bfloat16. With a
        ``window`` a token sees so many positions, its own included. See :attr:`prompts`.
        """
        what = Prompt(
            *(states.data_ptr() for states in (query, key, value, output)),
            *(distance for states in (query, key, value) for distance in states.stride()[:2]),
            query.shape[0],
            *key.shape[:1],
            query.shape[1],
            *key.shape[1:],
            value.shape[2],
            window or 0,
            scale,
        )
        _check(self._attend_prompt(ctypes.byref(what), self._threads()))


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for the input of a product")


_loaded: dict[str, Kernels | str] = {}


def load_kernels(on_failure: Callable[[str], None] | None = None) -> Kernels | None:
    """The kernels of this machine, compiled at the first call of all; None, with ``on_failure`` told why, without."""
    if "kernels" not in _loaded:
        try:
            _loaded["kernels"] = Kernels(ctypes.CDLL(str(build())))
        except (BuildError, OSError) as error:
            _loaded["kernels"] = str(error)
    found = _loaded["kernels"]
    if isinstance(found, Kernels):
        return found
    if on_failure is not None:
        on_failure(found)
    return None
