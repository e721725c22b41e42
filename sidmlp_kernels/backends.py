"""Which backend runs: the one place of choosing.

A backend is a name, the type of device it runs on, and a function that says why it cannot do what
is asked ("" when it can). `resolve` takes an explicit name at its word, so it works or raises with
the reason. "auto" takes the first of `BACKENDS` that can, but for a backend that says `rather_not`:
that one leaves the sizes to the next of the same device, where there is one. The choice says why,
is logged, and stands in every printed plan.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .ops import library
from .spec import EncoderSpec, StudentSpec, T5Spec, check_choice
from .trie import host_library

logger = logging.getLogger("sidmlp_kernels")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Limits of csrc/torch/problem.cpp and csrc/sidmlp/beam_key.h.
_MAX_WIDTH = 1 << 20
_MAX_BLOCKS = 64
_MAX_BEAMS = 1 << 16
_MAX_ENCODER_LAYERS = 8  # csrc/sidmlp/encoder_view.h

_CUDA_CAPABILITY = (9, 0)  # CMakeLists.txt builds sm_90a only

# Limits of sidmlp_kernels/ops/triton: rows of these widths, and beams, are held in registers; from
# compute capability 8.0 on every GPU has the shared memory that its table of tiles wants.
_TRITON_CAPABILITY = (8, 0)
_TRITON_WIDTH = 16384
_TRITON_BEAMS = 1024
_TRITON_ENCODER = {"dim": 1024, "num_heads": 4096, "head_dim": 256, "hidden_dim": 16384}


@dataclass(frozen=True)
class Sizes:
    """What a backend is asked to run; None = not said."""

    spec: StudentSpec | None = None
    dtype: torch.dtype | None = None
    num_beams: int | None = None


@dataclass(frozen=True)
class Backend:
    """One way to run the operators.

    auto_dtype       what dtype="auto" means here
    why_not          Sizes -> "" or the reason why it cannot
    encoder_why_not  sizes of an encoder, dtype -> "" or why it has no operator for it
    rather_not       Sizes that it can run -> "" or the reason why another is faster, as a clause
    two_launches_why_not  Sizes, none None -> "" or why it decodes them in one launch only
    """

    name: str
    device_type: str
    auto_dtype: torch.dtype
    why_not: Callable[[Sizes], str]
    encoder_why_not: Callable[[EncoderSpec, torch.dtype], str]
    rather_not: Callable[[Sizes], str] = lambda sizes: ""
    two_launches_why_not: Callable[[Sizes], str] = lambda sizes: "the cuda backend alone has two"


@dataclass(frozen=True)
class Choice:
    """What `resolve` chose, and why in one line."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    reason: str


def _operators_why_not(sizes: Sizes) -> str:
    """The limits that csrc/torch checks for every backend, beyond those of StudentSpec."""
    if sizes.dtype is not None and sizes.dtype not in DTYPES.values():
        return f"dtype: expected one of {', '.join(DTYPES)}, got {sizes.dtype}"
    limits: list[tuple[str, int, int]] = []  # name, size, largest that is possible
    if sizes.spec is not None:
        spec = sizes.spec
        limits = [
            (name, getattr(spec, name), _MAX_WIDTH)
            for name in ("dim", "attention_dim", "ffn_dim", "hidden_dim")
        ]
        limits.append(("blocks_per_head", spec.blocks_per_head, _MAX_BLOCKS))
    if sizes.num_beams is not None:
        limits.append(("num_beams", sizes.num_beams, _MAX_BEAMS))
    return _above(limits)


def _above(limits: list[tuple[str, int, int]]) -> str:
    """What is too large among (name, size, largest that is possible)."""
    return "; ".join(
        f"{name}: expected at most {most}, got {got}" for name, got, most in limits if got > most
    )


def _cpu_why_not(sizes: Sizes) -> str:
    return library.load("cpu") or _operators_why_not(sizes)


def _cuda_why_not(sizes: Sizes) -> str:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = library.load("cuda")
    if reason:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability != _CUDA_CAPABILITY:
        return (
            f"it is built for compute capability {_CUDA_CAPABILITY[0]}.{_CUDA_CAPABILITY[1]} "
            f"(H100, H200), {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
        )
    return _operators_why_not(sizes)


def _cuda_rather_not(sizes: Sizes) -> str:
    """What decides: in the results file of commit 525070c (H200, 2026-11-22, bf16, 50 beams, two
    catalogues), whose cuda variants are the plain kernel, triton takes 0.48 to 0.97 of its time for
    `beam_decode` at batch 1 to 4096, and 0.57 to 0.98 for `decode_states` but for one point (1.13
    at batch 512 of the smaller catalogue). Those are sizes that tensor cores take now; others were
    not measured, but run the same two kernels. Nor was float32, so that cuda keeps it.
    """
    if sizes.spec is None or sizes.dtype is None or sizes.dtype == torch.float32:
        return ""
    from .ops.cuda_kernels import tensor_cores_why_not  # can be run as a program

    plain = tensor_cores_why_not(sizes.spec, sizes.dtype, sizes.num_beams or 1)
    return plain and f"would take its plain kernel, slower in half precision ({plain})"


def _cuda_two_launches_why_not(sizes: Sizes) -> str:
    from .ops.cuda_kernels import two_launches_why_not  # can be run as a program

    assert sizes.spec is not None
    assert sizes.dtype is not None
    assert sizes.num_beams is not None
    return two_launches_why_not(sizes.spec, sizes.dtype, sizes.num_beams)


def _triton_why_not(sizes: Sizes) -> str:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = library.load("triton")
    if reason:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability < _TRITON_CAPABILITY:
        return (
            f"it needs compute capability {_TRITON_CAPABILITY[0]}.{_TRITON_CAPABILITY[1]} (A100) "
            f"or later, {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
        )
    limits: list[tuple[str, int, int]] = []
    if sizes.spec is not None:
        widths = ("dim", "hidden_dim")
        limits = [(name, getattr(sizes.spec, name), _TRITON_WIDTH) for name in widths]
    if sizes.num_beams is not None:
        limits.append(("num_beams", sizes.num_beams, _TRITON_BEAMS))
    return _operators_why_not(sizes) or _above(limits)


def _cpu_encoder_why_not(spec: EncoderSpec, dtype: torch.dtype) -> str:
    widths = ["dim"]
    widths += ["num_heads", "head_dim", "ffn_dim"] if isinstance(spec, T5Spec) else ["hidden_dim"]
    limits = [(name, getattr(spec, name), _MAX_WIDTH) for name in widths]
    limits.append(("num_layers", spec.num_layers, _MAX_ENCODER_LAYERS))
    return library.load("cpu") or _above(limits)


def _cuda_encoder_why_not(spec: EncoderSpec, dtype: torch.dtype) -> str:
    if not isinstance(spec, T5Spec):
        reason = host_library().encode_mlp_why_not(
            half=dtype != torch.float32,
            dim=spec.dim,
            layers=spec.num_layers,
            roles=spec.num_roles,
            hidden_dim=spec.hidden_dim,
        )
        return library.load("cuda") or str(reason)
    reason = host_library().encode_t5_why_not(
        half=dtype != torch.float32,
        dim=spec.dim,
        layers=spec.num_layers,
        heads=spec.num_heads,
        head_dim=spec.head_dim,
        ffn_dim=spec.ffn_dim,
    )
    return library.load("cuda") or str(reason)


def _triton_encoder_why_not(spec: EncoderSpec, dtype: torch.dtype) -> str:
    widths = {**_TRITON_ENCODER, "ffn_dim": _MAX_WIDTH, "num_layers": _MAX_ENCODER_LAYERS}
    limits = [(n, getattr(spec, n), most) for n, most in widths.items() if hasattr(spec, n)]
    return library.load("triton") or _above(limits)


# In the order of preference of "auto".
BACKENDS = (
    Backend(
        "cuda",
        "cuda",
        torch.float32,
        _cuda_why_not,
        _cuda_encoder_why_not,
        _cuda_rather_not,
        _cuda_two_launches_why_not,
    ),
    Backend("triton", "cuda", torch.float32, _triton_why_not, _triton_encoder_why_not),
    Backend("cpu", "cpu", torch.float32, _cpu_why_not, _cpu_encoder_why_not),
)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run here, best first.

    Asks the current GPU for its compute capability, which initialises CUDA in this process; a
    program that forks workers asks afterwards, in the workers.
    """
    return tuple(backend.name for backend in BACKENDS if not backend.why_not(Sizes()))


def why_not(
    name: str,
    spec: StudentSpec | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    num_beams: int | None = None,
) -> str:
    """Why backend `name` cannot run here, or not these sizes; "" when it can.

    Raises ValueError for an unknown name.
    """
    found = _by_name(name)
    return found.why_not(Sizes(spec, None if dtype is None else parse_dtype(dtype), num_beams))


def encoder_why_not(name: str, spec: EncoderSpec, dtype: torch.dtype | str) -> str:
    """Why backend `name` has no fused operator for this encoder; "" when it has one.

    Raises ValueError for an unknown name.
    """
    return _by_name(name).encoder_why_not(spec, parse_dtype(dtype))


def check_launches(
    launches: int, name: str, spec: StudentSpec, dtype: torch.dtype, num_beams: int
) -> None:
    """ValueError with the reason unless backend `name` decodes these sizes in 1 or 2 launches, as
    `launches` says."""
    if launches not in (1, 2):
        raise ValueError(f"launches: expected 1 or 2, got {launches!r}; pass one of these")
    if launches == 1:
        return
    reason = _by_name(name).two_launches_why_not(Sizes(spec, dtype, num_beams))
    if reason:
        raise ValueError(
            f"launches: expected 1 on backend {name}, got 2 ({reason}); pass 1, which gives the "
            "same results"
        )


def encoder_others(name: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends of the same device whose operator "auto" takes for an encoder that backend `name`,
    its choice for the decode, has none for.

    Triton's, in half precision: at the published sizes it takes 0.2 to 0.7 of the time of plain
    PyTorch in a CUDA graph (docs/kernels.md). In float32 that was not measured.
    """
    return ("triton",) if name == "cuda" and dtype != torch.float32 else ()


def resolve(
    name: str,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    *,
    spec: StudentSpec | None = None,
    num_beams: int | None = None,
) -> Choice:
    """The backend, device and dtype to run with; each may be "auto".

    num_beams: of most requests, which "auto" reckons with; an explicit backend is not judged by it.

    Raises ValueError with each candidate's reason when none can, which for an explicit backend is
    the only candidate.
    """
    wanted = parse_device(device)
    number = None if dtype == "auto" else parse_dtype(dtype)
    auto = name == "auto"
    passed = []  # over, and why
    slower: Choice | None = None  # can run, but rather not
    for backend in BACKENDS if auto else (_by_name(name, "auto"),):
        if slower is not None and backend.device_type != slower.device.type:
            continue  # speed is no reason to leave the GPU
        sizes = Sizes(spec, number or backend.auto_dtype, num_beams if auto else None)
        if wanted is not None and wanted.type != backend.device_type:
            reason = f"it runs on {backend.device_type}, not on {wanted}"
        else:
            reason = backend.why_not(sizes)
        if reason:
            passed.append(f"{backend.name}: {reason}")
            continue
        runs_on = wanted or parse_device(backend.device_type)
        assert runs_on is not None  # only "auto" parses to None
        choice = Choice(backend, runs_on, number or backend.auto_dtype, "asked for")
        if not auto:
            return choice
        reason = "" if slower else backend.rather_not(sizes)
        if not reason:
            since = f"since {'; '.join(passed)}" if passed else "its first choice"
            return _logged(choice, f"by 'auto', {since}")
        passed.append(f"{backend.name}: {reason}")
        slower = choice
    if slower is not None:
        return _logged(slower, f"by 'auto', though {'; '.join(passed)}")
    asked = f"backend={name!r}, device={str(device)!r}, dtype={str(dtype)!r}"
    if auto and num_beams is not None:
        asked += f", num_beams={num_beams}"
    raise ValueError(
        f"backend: expected one that can run this model ({asked}), got none "
        f"({'; '.join(passed)}); `python -m sidmlp_kernels doctor` says what runs here"
    )


def _logged(choice: Choice, reason: str) -> Choice:
    """The choice of "auto" with its reason."""
    _log_once(choice.backend.name, choice.device, choice.dtype, reason)
    return replace(choice, reason=reason)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch.dtype from its name or itself; ValueError unless kernels read it."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(
            f"dtype: expected one of {', '.join(DTYPES)}, a torch.dtype of these or 'auto', got "
            f"{dtype!r}; weights are converted when the model loads"
        )
    return found


def parse_device(device: torch.device | str) -> torch.device | None:
    """A device with its index, None for "auto"; ValueError for what torch does not know."""
    if isinstance(device, str) and device == "auto":
        return None
    try:
        if not isinstance(device, (str, torch.device)):
            raise RuntimeError(f"a {type(device).__name__} is no device")
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device: expected 'auto', 'cpu', 'cuda' or a torch.device, got {device!r} ({error}); "
            "pass one of these"
        ) from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.index is None and found.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _by_name(name: object, *further: str) -> Backend:
    """The backend called `name`; `further` are names that the caller takes as well."""
    names = [backend.name for backend in BACKENDS]
    check_choice(name, "backend", [*further, *names])
    return BACKENDS[names.index(str(name))]


@functools.cache
def _log_once(name: str, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    logger.info("backend %s on %s with %s weights, chosen %s", name, device, dtype, reason)
