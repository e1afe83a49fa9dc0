"""Soft cross-entropy of phase 3: -sum_v softmax(teacher)_v log_softmax(student)_v, mean over tokens.

`Plain` holds both models' T x V logits. `Chunked` goes through the tokens in pieces and makes the gradients at once,
as fused linear cross-entropies do, so only one piece of logits exists at a time.
"""

import torch
import torch.nn.functional as F


def distance(student, teacher):
    """From logits, mean over tokens, f32."""
    s, t = student.float(), teacher.float()
    return (s.logsumexp(-1) - (t.softmax(-1) * s).sum(-1)).mean()


def eager_distance(student, teacher):
    """The same by the library's fused operators, which need fewer launches."""
    return F.cross_entropy(student.float(), teacher.float().softmax(-1))


def piece(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, scale):
    """Summed loss of some tokens, the gradient of their logits and of their hidden states."""
    s = F.linear(hidden, weight, bias).float()
    t = F.linear(teacher_hidden, teacher_weight, teacher_bias).float()
    lse = s.logsumexp(-1, keepdim=True)
    p = t.softmax(-1)
    loss = (lse.squeeze(-1) - (p * s).sum(-1)).sum() * scale
    grad = (((s - lse).exp() - p) * scale).to(hidden.dtype)
    return loss, grad, grad @ weight


def _accumulate_f32(total, grad, hidden):
    torch.addmm(total, grad.t(), hidden, out_dtype=torch.float32, out=total)


def _accumulate_rounded(total, grad, hidden):
    total += grad.t() @ hidden


def accumulator(device, dtype):
    """The product that adds into f32 where this device has it."""
    like = {"device": device, "dtype": dtype}
    try:
        total = torch.ones(16, 16, device=device)
        _accumulate_f32(total, torch.ones(16, 16, **like), torch.ones(16, 16, **like))
        if bool((total == 17).all()):
            return _accumulate_f32
    except (RuntimeError, TypeError, NotImplementedError):
        pass
    return _accumulate_rounded


class Chunked(torch.autograd.Function):
    """Hidden states and head to the loss; gradients are made with the loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, rows, run, accumulate):
        teacher_hidden, teacher_weight, teacher_bias = teacher
        w = weight.to(hidden.dtype)
        b = None if bias is None else bias.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        scale = 1.0 / len(hidden)
        for at in range(0, len(hidden), rows):
            some = slice(at, at + rows)
            part, grad, d_hidden[some] = run(
                hidden[some], w, b, teacher_hidden[some], teacher_weight, teacher_bias, scale
            )
            loss += part
            accumulate(d_weight, grad, hidden[some])
            if d_bias is not None:
                d_bias += grad.sum(0, dtype=torch.float32)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    def backward(ctx, dy):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return d_hidden * dy, d_weight * dy, None if d_bias is None else d_bias * dy, None, None, None, None
