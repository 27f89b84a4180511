"""Recurrences over positions that a trace can hold: transformers computes them by Python loops, which a trace fixes.

Each is a function that torch compiles with its loops and branches (`torch.jit.script`), called in place of transformers'
own. A single position, as in most steps, takes the direct update instead of a chunk's products.
"""

from __future__ import annotations

import contextlib
import sys
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch

from traceserve.building.writers.tracing.replacing import replaced


def _gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    initial: Optional[torch.Tensor],
    normalized: bool,
    chunk: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of the gated delta rule (Yang et al. 2024, arXiv:2412.06464), (batch, length, heads, value size),
    and the last state, (batch, heads, key size, value size).

    `query`, `key`: (batch, length, key heads, key size); `value`: (batch, length, heads, value size); `decay`, in logarithms,
    and `beta`: (batch, length, heads).
    """
    dtype = query.dtype
    batch, length, heads, width = value.size(0), value.size(1), value.size(2), value.size(3)
    shared = heads // key.size(2)
    if shared > 1:
        query, key = query.repeat_interleave(shared, dim=2), key.repeat_interleave(shared, dim=2)
    query, key, value = query.transpose(1, 2).float(), key.transpose(1, 2).float(), value.transpose(1, 2).float()
    decay, beta = decay.transpose(1, 2).float(), beta.transpose(1, 2).float().unsqueeze(-1)
    if normalized:
        query = query * torch.rsqrt((query * query).sum(dim=-1, keepdim=True) + 1e-6)
        key = key * torch.rsqrt((key * key).sum(dim=-1, keepdim=True) + 1e-6)
    query = query * key.size(-1) ** -0.5
    state = torch.zeros([batch, heads, key.size(-1), width], dtype=torch.float32, device=value.device)
    if initial is not None:
        state = initial.float()

    if length == 1:
        state = state * decay.exp().unsqueeze(-1)
        state = state + key.transpose(-1, -2) @ ((value - key @ state) * beta)
        return (query @ state).transpose(1, 2).to(dtype), state

    # A chunk's updates as products, by the UT transform; the last one is padded with updates that change nothing.
    chunk = min(chunk, length)
    missing = (chunk - length % chunk) % chunk
    scaled = key * beta
    written = value * beta
    parts = [
        torch.nn.functional.pad(each, [0, 0, 0, missing]).reshape([batch, heads, -1, chunk, each.size(-1)])
        for each in [query, key, scaled, written]
    ]
    query, key, scaled, written = parts[0], parts[1], parts[2], parts[3]
    decay = torch.nn.functional.pad(decay, [0, missing]).reshape([batch, heads, -1, chunk]).cumsum(dim=-1)
    later = torch.ones([chunk, chunk], dtype=torch.bool, device=key.device).triu(1)
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    system = (scaled @ key.transpose(-1, -2)) * between
    within = (query @ key.transpose(-1, -2)) * between
    since = decay.exp().unsqueeze(-1)
    new = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    known = torch.linalg.solve_triangular(system, scaled * since, upper=False, unitriangular=True)
    query = query * since
    key = key * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    kept = decay[..., -1].exp().unsqueeze(-1).unsqueeze(-1)
    outputs: List[torch.Tensor] = []
    for i in range(key.size(2)):
        change = new[:, :, i] - known[:, :, i] @ state
        outputs.append(query[:, :, i] @ state + within[:, :, i] @ change)
        state = state * kept[:, :, i] + key[:, :, i].transpose(-1, -2) @ change
    whole = torch.cat(outputs, dim=2)[:, :, :length]
    return whole.transpose(1, 2).to(dtype), state


def _sums_between(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of the values behind j up to i, (..., i, j); -inf where j is later."""
    length = values.size(-1)
    ones = torch.ones([length, length], dtype=torch.bool, device=values.device)
    sums = values.unsqueeze(-1).masked_fill(~ones.tril(-1), 0.0).cumsum(dim=-2)
    return sums.masked_fill(~ones.tril(0), float("-inf"))


def _state_space(
    inputs: torch.Tensor,
    steps: torch.Tensor,
    decay: torch.Tensor,
    written: torch.Tensor,
    read: torch.Tensor,
    skipped: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    initial: Optional[torch.Tensor],
    softplus: bool,
    shortest: float,
    longest: float,
    chunk: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of Mamba 2 (Dao and Gu 2024, arXiv:2405.21060), (batch, length, heads, size), and the last state,
    (batch, heads, size, state size).

    `inputs`: (batch, length, heads, size); `steps`: (batch, length, heads); `decay`, A, and `skipped`, D: (heads); `written`,
    B, and `read`, C: (batch, length, groups, state size).
    """
    batch, length, heads, size = inputs.size(0), inputs.size(1), inputs.size(2), inputs.size(3)
    if bias is not None:
        steps = steps + bias.to(steps.dtype)
    if softplus:
        steps = torch.nn.functional.softplus(steps)
    steps = torch.clamp(steps, shortest, longest).float()
    inputs = inputs.float()
    written = written.float().repeat_interleave(heads // written.size(2), dim=2)
    read = read.float().repeat_interleave(heads // read.size(2), dim=2)
    residual = torch.zeros([1], device=inputs.device)
    if skipped is not None:
        residual = inputs * skipped.unsqueeze(-1)
    inputs = inputs * steps.unsqueeze(-1)
    decay = decay.float() * steps
    state = torch.zeros([batch, heads, size, written.size(-1)], dtype=torch.float32, device=inputs.device)
    if initial is not None:
        state = initial.float()

    if length == 1:
        state = state * decay[:, 0].exp().unsqueeze(-1).unsqueeze(-1)
        state = state + inputs[:, 0].unsqueeze(-1) * written[:, 0].unsqueeze(-2)
        return ((state @ read[:, 0].unsqueeze(-1)).squeeze(-1).unsqueeze(1) + residual).contiguous(), state

    chunk = min(chunk, length)
    missing = (chunk - length % chunk) % chunk
    parts = [
        torch.nn.functional.pad(each, [0, 0, 0, 0, 0, missing])
        .reshape([batch, -1, chunk, heads, each.size(-1)])
        .permute(0, 3, 1, 2, 4)
        for each in [inputs, written, read]
    ]
    inputs, written, read = parts[0], parts[1], parts[2]  # (batch, heads, chunks, chunk, ...)
    decay = torch.nn.functional.pad(decay, [0, 0, 0, missing]).reshape([batch, -1, chunk, heads]).permute(0, 3, 1, 2)
    since = decay.cumsum(dim=-1)
    within = (read @ written.transpose(-1, -2)) * _sums_between(decay).exp()
    outputs = within @ inputs
    added = (inputs * (since[..., -1:] - since).exp().unsqueeze(-1)).transpose(-1, -2) @ written
    kept = since[..., -1].exp().unsqueeze(-1).unsqueeze(-1)
    seen = read * since.exp().unsqueeze(-1)
    parts = []
    for i in range(inputs.size(2)):
        parts.append(outputs[:, :, i] + seen[:, :, i] @ state.transpose(-1, -2))
        state = state * kept[:, :, i] + added[:, :, i]
    whole = torch.cat(parts, dim=2)[:, :, :length].transpose(1, 2)
    return (whole + residual).contiguous(), state  # callers take views of it


def _selective_scan(
    inputs: torch.Tensor, steps: torch.Tensor, decay: torch.Tensor, written: torch.Tensor, read: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of Mamba (Gu and Dao 2023, arXiv:2312.00752), (batch, channels, length), and the last state,
    (batch, channels, state size).

    `inputs`, `steps`: (batch, channels, length); `decay`, A: (channels, state size); `written`, B, and `read`, C: (batch,
    state size, length).
    """
    state = torch.zeros([inputs.size(0), inputs.size(1), decay.size(-1)], dtype=inputs.dtype, device=inputs.device)
    kept = torch.exp(decay.unsqueeze(0).unsqueeze(2) * steps.unsqueeze(-1))
    added = steps.unsqueeze(-1) * written.transpose(1, 2).unsqueeze(1).float() * inputs.unsqueeze(-1).float()
    outputs: List[torch.Tensor] = []
    for i in range(inputs.size(2)):
        state = kept[:, :, i] * state + added[:, :, i]
        outputs.append((state.to(read.dtype) @ read[:, :, i].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=-1), state


@lru_cache(maxsize=None)
def _scripted(function: Callable[..., Tuple[torch.Tensor, torch.Tensor]]) -> Any:
    return torch.jit.script(function)


def _chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: Optional[torch.Tensor] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    outputs, state = _scripted(_gated_delta)(
        query, key, value, g, beta, initial_state, use_qk_l2norm_in_kernel, chunk_size
    )
    return outputs, state if output_final_state else None


def _mamba2_chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: Optional[torch.Tensor] = None,
    dt_bias: Optional[torch.Tensor] = None,
    initial_states: Optional[torch.Tensor] = None,
    dt_softplus: bool = False,
    dt_limit: Tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: object,
) -> object:
    outputs, state = _scripted(_state_space)(
        hidden_states, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, *map(float, dt_limit), chunk_size
    )
    return (outputs, state) if return_final_states else outputs


def _mamba_selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor] = None,
    z: Optional[torch.Tensor] = None,
    delta_bias: Optional[torch.Tensor] = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: object,
) -> object:
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    outputs, state = _scripted(_selective_scan)(hidden_states, dt, A, B, C)
    if D is not None:
        outputs = outputs + hidden_states * D[None, :, None]
    if z is not None:
        outputs = outputs * torch.nn.functional.silu(z)
    return (outputs, state) if return_last_state else outputs


# transformers' functions, which each model's file has for itself, under these names from version 5 on. Where one is
# missing, the model's own loop is traced, and the gate finds the lengths that it does not fit.
_OURS: Dict[str, Callable[..., object]] = {
    "torch_chunk_gated_delta_rule": _chunk_gated_delta_rule,
    "mamba2_chunk_scan": _mamba2_chunk_scan,
    "mamba_selective_scan": _mamba_selective_scan,
}


@contextlib.contextmanager
def recurrences_of_any_length(model: torch.nn.Module) -> Iterator[None]:
    """Make a model's recurrences hold for any number of positions in a trace."""
    modules = {sys.modules[type(part).__module__] for part in model.modules() if type(part).__module__ in sys.modules}
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(
                replaced(module, **{name: ours for name, ours in _OURS.items() if hasattr(module, name)})
            )
        yield
