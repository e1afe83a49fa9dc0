"""Teacher and student as plain functions over tables of tensors.

A layer is a function of its input and its table, so one compiled function serves every layer. Weights are cast to
the activations' type where they are used: f32 masters and bf16 arithmetic, as mixed-precision wrappers do.

    sequential (SmolLM2)   m = h + mixer(norm1 h);  out = m + down(silu(gate norm2 m) * up norm2 m)
    parallel (Phi-1.5)     n = norm h;  out = h + mixer(n) + down(gelu_new(up n))

Shapes: B sequences, T tokens, H heads, P head width, N state, d model width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scan import scan

EPS = 1e-5
GATE_OPEN = 1.278464542761  # SiLU of this is 1
TAPS = 4


@dataclass(frozen=True)
class Dims:
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    vocab: int
    seq: int
    theta: float
    rotary: int
    parallel: bool  # Phi: parallel block, LayerNorm, biases, untied head; else Llama
    state: int = 64
    chunk: int = 128

    @property
    def inner(self):
        return self.heads * self.head_width

    @property
    def key(self):
        return self.heads * self.state


MODELS = {
    "smollm2": Dims(576, 30, 9, 3, 64, 1536, 49152, 1024, 1e5, 64, False),
    "phi": Dims(2048, 24, 32, 32, 64, 8192, 51200, 2048, 1e4, 32, True),
}
TINY = {
    "smollm2": Dims(48, 3, 3, 1, 16, 96, 128, 32, 1e5, 16, False, state=16, chunk=16),
    "phi": Dims(64, 3, 4, 4, 16, 128, 160, 48, 1e4, 8, True, state=16, chunk=16),
}


# --- weights ---------------------------------------------------------------------------------------------------


def _matrix(rows, columns, like):
    return torch.randn(rows, columns, **like) / math.sqrt(columns)


def norm_weights(dims, name, like):
    """Ones, with a zero bias where the norm is a LayerNorm."""
    table = {name: torch.ones(dims.width, **like)}
    if dims.parallel:
        table[name + "_bias"] = torch.zeros(dims.width, **like)
    return table


def mlp_weights(dims, like):
    """`up` holds gate and up of a gated MLP in one matrix."""
    if dims.parallel:
        return {
            "up": _matrix(dims.hidden, dims.width, like),
            "up_bias": torch.zeros(dims.hidden, **like),
            "down": _matrix(dims.width, dims.hidden, like),
            "down_bias": torch.zeros(dims.width, **like),
        }
    return {"up": _matrix(2 * dims.hidden, dims.width, like), "down": _matrix(dims.width, dims.hidden, like)}


def block_weights(dims, like):
    """What teacher and student share: the norms and the MLP."""
    table = norm_weights(dims, "norm1", like) | mlp_weights(dims, like)
    if not dims.parallel:
        table |= norm_weights(dims, "norm2", like)
    return table


def attention_weights(dims, like):
    rows = (dims.heads + 2 * dims.kv_heads) * dims.head_width
    table = {"qkv": _matrix(rows, dims.width, like), "o": _matrix(dims.width, dims.inner, like)}
    if dims.parallel:
        table |= {"qkv_bias": torch.zeros(rows, **like), "o_bias": torch.zeros(dims.width, **like)}
    return table


def mixer_weights(dims, like):
    """Rows of `in_proj`: z, x, B, C, A_log, so that what the convolution reads and what phase 1 needs are slices."""
    rows = 2 * dims.inner + 2 * dims.key + dims.heads
    channels = dims.inner + 2 * dims.key
    conv = torch.zeros(channels, TAPS, **like)
    conv[:, -1] = 1
    return {
        "in_proj": _matrix(rows, dims.width, like),
        "z_bias": torch.full((dims.inner,), GATE_OPEN, **like),
        "conv": conv,
        "conv_bias": torch.zeros(channels, **like),
        "D": torch.zeros(dims.heads, **like),
        "out": _matrix(dims.width, dims.inner, like),
    }


def end_weights(dims, like):
    """Embedding, last norm and, where the head is not the embedding, the head."""
    table = {"embed": _matrix(dims.vocab, dims.width, like)} | norm_weights(dims, "norm", like)
    if dims.parallel:
        table |= {"head": _matrix(dims.vocab, dims.width, like), "head_bias": torch.zeros(dims.vocab, **like)}
    return table


def rotary_tables(dims, seq, like):
    """cos and sin, `[T, rotary / 2]`."""
    half = dims.rotary // 2
    rates = dims.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * rates
    return angles.cos().to(**like), angles.sin().to(**like)


# --- parts -----------------------------------------------------------------------------------------------------


def linear(x, table, name):
    bias = table.get(name + "_bias")
    return F.linear(x, table[name].to(x.dtype), None if bias is None else bias.to(x.dtype))


def norm(dims, x, table, name):
    weight = table[name].to(x.dtype)
    if dims.parallel:
        return F.layer_norm(x, (dims.width,), weight, table[name + "_bias"].to(x.dtype), EPS)
    return F.rms_norm(x, (dims.width,), weight, EPS)


def mlp(dims, n, table):
    if dims.parallel:
        return linear(F.gelu(linear(n, table, "up"), approximate="tanh"), table, "down")
    gate, up = linear(n, table, "up").chunk(2, -1)
    return linear(F.silu(gate) * up, table, "down")


def rotate(x, rotary):
    """Turns the first dimensions of `[B, heads, T, P]`: pairs (j, j + half)."""
    cos, sin = rotary
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def queries_keys_values(dims, n, table, rotary):
    """`[B, heads, T, P]` each; keys and values have the heads of the group only."""
    batch, seq, _ = n.shape
    sizes = [dims.heads, dims.kv_heads, dims.kv_heads]
    parts = linear(n, table, "qkv").split([s * dims.head_width for s in sizes], -1)
    q, k, v = (p.view(batch, seq, s, dims.head_width).transpose(1, 2) for p, s in zip(parts, sizes))
    return rotate(q, rotary), rotate(k, rotary), v


def attend(dims, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=dims.heads != dims.kv_heads)


def attention_matrix(dims, q, k, above):
    """softmax(Q K^T / sqrt P), causal, `[B, H, T, T]`, f32. The heads of a group share one product."""
    batch, heads, seq, width = q.shape
    rows = (q * width**-0.5).reshape(batch, dims.kv_heads, -1, width)
    scores = torch.matmul(rows, k.transpose(-1, -2)).view(batch, heads, seq, seq)
    return scores.float().masked_fill(above, -math.inf).softmax(-1)


def apply_matrix(dims, a, v):
    """A V for the heads of each group, `[B, H, T, P]`."""
    batch, heads, seq, _ = a.shape
    return torch.matmul(a.view(batch, dims.kv_heads, -1, seq), v).view(batch, heads, seq, -1)


def output(y, table):
    """Joins heads and projects."""
    return linear(y.transpose(1, 2).flatten(2), table, "o")


def convolve(x, taps, bias, shifted):
    """Causal depthwise convolution over `[B, T, channels]`; `shifted` writes it as multiply-adds that fuse."""
    seq = x.shape[1]
    taps, bias = taps.to(x.dtype), bias.to(x.dtype)
    if not shifted:
        y = F.conv1d(x.transpose(1, 2), taps[:, None], bias, padding=TAPS - 1, groups=x.shape[-1])
        return y[..., :seq].transpose(1, 2)
    padded = F.pad(x, (0, 0, TAPS - 1, 0))
    return bias + sum(taps[:, k] * padded[:, k : k + seq] for k in range(TAPS))


def mixer(dims, n, table, how):
    """Discrete Mamba-2: no activation after the convolution, decay sigmoid(-A_log), skip D, gate SiLU(z + z_bias)."""
    batch, seq, _ = n.shape
    inner, key = dims.inner, dims.key
    z, xbc, a_log = linear(n, table, "in_proj").split([inner, inner + 2 * key, dims.heads], -1)
    xbc = convolve(xbc, table["conv"], table["conv_bias"], how.shifted)
    x, b, c = (p.view(batch, seq, dims.heads, -1) for p in xbc.split([inner, key, key], -1))
    y = scan(x, F.softplus(a_log.float()), b, c, dims.chunk, how.opaque)
    y = y + table["D"].to(x.dtype)[:, None] * x
    return linear(y.flatten(2) * F.silu(z + table["z_bias"].to(z.dtype)), table, "out")


def mixer_matrix(dims, n, table, above, how):
    """The student's `[B, H, T, T]` without its diagonal D: (C_l . B_s) exp(sum of log a over (s, l]), f32."""
    batch, seq, _ = n.shape
    inner, key = dims.inner, dims.key
    rows = F.linear(n, table["in_proj"][2 * inner :].to(n.dtype))
    bc, a_log = rows.split([2 * key, dims.heads], -1)
    bc = convolve(bc, table["conv"][inner:], table["conv_bias"][inner:], how.shifted)
    b, c = (p.reshape(batch, seq, dims.heads, -1).transpose(1, 2) for p in bc.split(key, -1))
    sums = -F.softplus(a_log.float()).transpose(1, 2).cumsum(-1)
    decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(above, -math.inf).exp()
    return torch.matmul(c, b.transpose(-1, -2)).float() * decays


# --- layers ----------------------------------------------------------------------------------------------------


def finish(dims, h, n, mixed, table):
    """The block's output from its mixer's."""
    if dims.parallel:
        return h + mixed + mlp(dims, n, table)
    m = h + mixed
    return m + mlp(dims, norm(dims, m, table, "norm2"), table)


def teacher_layer(dims, h, table, rotary):
    n = norm(dims, h, table, "norm1")
    q, k, v = queries_keys_values(dims, n, table, rotary)
    return finish(dims, h, n, output(attend(dims, q, k, v), table), table)


def teacher_layer_with_matrix(dims, h, table, rotary, above):
    """What `output_attentions` does: the matrix is made, used and handed out."""
    n = norm(dims, h, table, "norm1")
    q, k, v = queries_keys_values(dims, n, table, rotary)
    a = attention_matrix(dims, q, k, above).to(h.dtype)
    return finish(dims, h, n, output(apply_matrix(dims, a, v), table), table), a


def student_layer(dims, h, table, how):
    n = norm(dims, h, table, "norm1")
    return finish(dims, h, n, mixer(dims, n, table, how), table)


# --- losses of one layer ---------------------------------------------------------------------------------------


def matrix_distance(dims, n, student, a, above, how):
    """Frobenius norm of M - A, mean over sequences and heads."""
    m = mixer_matrix(dims, n, student, above, how)
    seq = m.shape[-1]
    at = torch.arange(seq, device=m.device)
    skip = torch.where(at[:, None] == at, student["D"][:, None, None], 0.0)
    return ((m + skip - a) ** 2).sum(-1).sum(-1).add(1e-12).sqrt().mean()


def orient_from_matrix(dims, h, teacher, student, a, above, how):
    return matrix_distance(dims, norm(dims, h, teacher, "norm1"), student, a, above, how)


def orient_layer(dims, h, teacher, student, rotary, above, how):
    """Loss of phase 1 and the teacher's output. The matrix is rebuilt from Q and K beside SDPA, or made once."""
    n = norm(dims, h, teacher, "norm1")
    q, k, v = queries_keys_values(dims, n, teacher, rotary)
    a = attention_matrix(dims, q, k, above)
    if how.rebuild:
        y = attend(dims, q, k, v)
    else:
        a = a.to(h.dtype)
        y = apply_matrix(dims, a, v)
    loss = matrix_distance(dims, n, student, a, above, how)
    return loss, finish(dims, h, n, output(y, teacher), teacher)


def align_layer(dims, h, teacher, student, rotary, how):
    """Loss of phase 2 and the teacher's output: mean over tokens of the distance of the blocks' outputs.

    In a parallel block residual and MLP are the same on both sides, so only the mixers' outputs are compared.
    """
    n = norm(dims, h, teacher, "norm1")
    attended = output(attend(dims, *queries_keys_values(dims, n, teacher, rotary)), teacher)
    mixed = mixer(dims, n, student, how)
    out = finish(dims, h, n, attended, teacher)
    gap = mixed - attended if dims.parallel else finish(dims, h, n, mixed, teacher) - out
    return gap.float().square().sum(-1).add(1e-12).sqrt().mean(), out
