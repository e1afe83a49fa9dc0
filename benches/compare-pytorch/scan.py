"""The scan: mamba_ssm's Triton kernels on a GPU, a quadratic reference elsewhere.

y_t = S_t C_t with S_t = exp(-dt_t) S_{t-1} + x_t B_t^T. The kernels multiply x by dt, so they get x / dt.
Shapes: x `[B, T, H, P]`, dt `[B, T, H]` f32, b and c `[B, T, H, N]`.
"""

import torch

try:
    from mamba_ssm.ops.triton.ssd_combined import (
        _mamba_chunk_scan_combined_bwd,
        _mamba_chunk_scan_combined_fwd,
        mamba_chunk_scan_combined,
    )
except ImportError:
    mamba_chunk_scan_combined = None


def scan(x, dt, b, c, chunk, opaque):
    """`opaque` goes through one custom operator, so that a compiled layer stays one graph."""
    scaled = (x.float() / dt[..., None]).to(x.dtype)
    if opaque:
        return torch.ops.pipe_peer.scan(scaled, dt, b, c, chunk)
    if not x.is_cuda:
        return reference(scaled, dt, b, c)
    return mamba_chunk_scan_combined(scaled, dt, _minus_one(dt), b, c, chunk)


def _decays(dt):
    """exp of the sum of -dt over (s, l], `[B, H, T, T]`, zero above the diagonal."""
    sums = -dt.cumsum(1).transpose(1, 2)
    seq = dt.shape[1]
    above = torch.ones(seq, seq, dtype=torch.bool, device=dt.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(above, -torch.inf).exp()


def reference(scaled, dt, b, c):
    """The same as one lower-triangular matrix a head, in f32."""
    m = torch.einsum("blhn,bshn->bhls", c.float(), b.float()) * _decays(dt)
    return torch.einsum("bhls,bshp->blhp", m, scaled.float() * dt[..., None]).to(scaled.dtype)


def reference_backward(dy, scaled, dt, b, c):
    """Gradients of the reference by hand: a custom operator runs below autograd."""
    dy, xf, bf, cf = (t.float() for t in (dy, scaled, b, c))
    decays = _decays(dt)
    m = torch.einsum("blhn,bshn->bhls", cf, bf) * decays
    dx = torch.einsum("bhls,blhp->bshp", m, dy)
    dm = torch.einsum("blhp,bshp->bhls", dy, xf * dt[..., None])
    db = torch.einsum("bhls,blhn->bshn", dm * decays, cf)
    dc = torch.einsum("bhls,bshn->blhn", dm * decays, bf)
    d_sums = ((dm * m).sum(-1) - (dm * m).sum(-2)).transpose(1, 2)
    ddt = (dx * xf).sum(-1) - d_sums.flip(1).cumsum(1).flip(1)
    grads = (dx * dt[..., None], ddt, db, dc)
    return tuple(g.to(t.dtype).contiguous() for g, t in zip(grads, (scaled, dt, b, c)))


def _minus_one(dt):
    return torch.full((dt.shape[-1],), -1.0, device=dt.device)


@torch.library.custom_op("pipe_peer::scan", mutates_args=())
def _scan(x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor, chunk: int) -> torch.Tensor:
    if not x.is_cuda:
        return reference(x, dt, b, c).contiguous()
    return _mamba_chunk_scan_combined_fwd(x, dt, _minus_one(dt), b, c, chunk)[0]


@_scan.register_fake
def _(x, dt, b, c, chunk):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("pipe_peer::scan_backward", mutates_args=())
def _scan_backward(
    dy: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not x.is_cuda:
        return reference_backward(dy, x, dt, b, c)
    dx, ddt, db, dc = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c))
    # Without a gate the kernels only look at the shape of `out`, so x stands for it.
    _mamba_chunk_scan_combined_bwd(dy, x, dt, _minus_one(dt), b, c, x, chunk, dx=dx, ddt=ddt, dB=db, dC=dc)
    return dx, ddt, db, dc


@_scan_backward.register_fake
def _(dy, x, dt, b, c, chunk):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c))


def _save(ctx, inputs, output):
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    return (*torch.ops.pipe_peer.scan_backward(dy, *ctx.saved_tensors, ctx.chunk), None)


_scan.register_autograd(_backward, setup_context=_save)
