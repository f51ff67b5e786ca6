"""Deformable convolution: every kernel tap samples the input at its own real-valued place.

B images, C input channels, O output channels, g offset groups, T kernel taps (row-major), h w output grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision import ops

from onestage.errors import UsageError
from onestage.ops.dispatch import wants_triton

Pair = tuple[int, int]

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)

# Output cells per gather: the gathered columns of a chunk (256 channels, 9 taps: 9 MB) stay near the cache.
CHUNK = 1024

ExportedForm = Literal["operator", "gather"]
_exported_form: ContextVar[ExportedForm | None] = ContextVar("exported_form", default=None)


@contextmanager
def exported_as(form: ExportedForm) -> Iterator[None]:
    """What a deformable convolution becomes in a program that other runtimes shall read and that is traced in here.

    Args:
        form: "operator": torchvision's, ONNX's DeformConv, for float32. "gather": indexing and matrix products, which
            every runtime has; slower, and its columns (9 times the channels) exist whole.
    """
    token = _exported_form.set(form)
    try:
        yield
    finally:
        _exported_form.reset(token)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution with torchvision's conventions, on any floating type.

    Args:
        x: [B, C, H, W] input; it counts as zero outside.
        offset: [B, g * T * 2, h, w], displacement of each tap in input cells; group-major, then tap, then (dy, dx).
        weight: [O, C / groups, kernel height, kernel width].
        bias: [O] or None.
        stride: Input cells per output cell.
        padding: Zero cells around the input.
        dilation: Input cells between taps.
        mask: [B, g * T, h, w] factor of each sample (DCNv2), or None.

    Returns:
        [B, O, h, w] of the type of `x`; samples and sums are float32 at least. On a GPU its order is channels-last,
        half types are multiplied as such, and autocast casts `x` as that of any convolution.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    form = _exported_form.get()
    if form is not None:
        compute = ops.deform_conv2d if form == "operator" else _deform_conv2d_indexed
        return compute(x, offset, weight, bias, stride, padding, dilation, mask)
    if x.dtype in KERNEL_TYPES and (wants_triton(x) or torch.compiler.is_compiling()):
        if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return _deform_op(x, offset, weight, bias, stride, padding, dilation, mask).permute(0, 3, 1, 2)
    # torchvision's op has no half types everywhere, and offsets lose their point in bf16: compute in float32.
    dtype = torch.promote_types(x.dtype, torch.float32)
    given = x.dtype
    x, offset, weight = x.to(dtype), offset.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    mask = None if mask is None else mask.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cpu" and weight.shape[1] == x.shape[1]:
            return deform_conv2d_gather(x, offset, weight, bias, stride, padding, dilation, mask).to(given)
        return ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask).to(given)


@torch.library.custom_op(
    "onestage::deform_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor offset, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "Tensor? mask) -> Tensor",
)
def _deform_op(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    """[B, h, w, O]; a custom op, so that `torch.compile` and `torch.export` take it as it is."""
    if wants_triton(x):
        from onestage.ops.triton.deform import deform_conv2d_triton

        out = deform_conv2d_triton(x, offset, weight, bias, stride, padding, dilation, mask)
    else:
        single = [None if tensor is None else tensor.float() for tensor in (x, offset, weight, bias)]
        out = ops.deform_conv2d(*single, stride, padding, dilation, None if mask is None else mask.float()).to(x.dtype)
    return out.permute(0, 2, 3, 1).contiguous()


@_deform_op.register_fake
def _(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], offset.shape[2], offset.shape[3], weight.shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offset, weight, bias, *ctx.how, mask = inputs
    ctx.save_for_backward(x, offset, weight, bias, mask)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """torchvision's backward, in float32."""
    x, offset, weight, bias, mask = ctx.saved_tensors
    stride, padding, dilation = ctx.how
    num_taps = weight.shape[2] * weight.shape[3]
    gradients = torch.ops.torchvision._deform_conv2d_backward(
        upstream.permute(0, 3, 1, 2).float().contiguous(),
        x.float().contiguous(),
        weight.float().contiguous(),
        offset.float().contiguous(),
        x.new_zeros(len(x), 1, dtype=torch.float32) if mask is None else mask.float().contiguous(),
        weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else bias.float(),
        *stride,
        *padding,
        *dilation,
        x.shape[1] // weight.shape[1],
        offset.shape[1] // (2 * num_taps),
        mask is not None,
    )
    for_x, for_weight, for_offset, for_mask, for_bias = (
        gradient if like is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, (x, weight, offset, mask, bias), strict=True)
    )
    for_bias, for_mask = None if bias is None else for_bias, None if mask is None else for_mask
    return for_x, for_offset, for_weight, for_bias, None, None, None, for_mask


_deform_op.register_autograd(_backward, setup_context=_keep_for_backward)


def deform_conv2d_gather(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    """The same by gathering from a [cells, channels] table and one matrix product: fast on CPU.

    Arguments as above, one weight group. A sample is a weighted bag of four table rows, which is what
    `embedding_bag` sums without writing the four rows out.
    """
    table, share, kernel, index = _gather_plan(x, offset, weight, stride, padding, dilation, mask)
    return _as_maps(_GatherProduct.apply(table, share, kernel, index), bias, offset)


def _deform_conv2d_indexed(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    """The same with nothing but indexing, products and sums, of any size: for export."""
    if weight.shape[1] != x.shape[1]:
        raise UsageError("a grouped deformable convolution has no gather formulation", "export it as an operator")
    table, share, kernel, index = _gather_plan(x, offset, weight, stride, padding, dilation, mask)
    corners = [table[index[..., corner]] * share[..., corner, None] for corner in range(4)]  # [M, T * g, C / g]
    columns = corners[0] + corners[1] + corners[2] + corners[3]
    return _as_maps(columns.reshape(-1, kernel.shape[0]) @ kernel, bias, offset)


def _gather_plan(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_GatherProduct` wants: table, shares, kernel, index."""
    num_taps = weight.shape[2] * weight.shape[3]
    num_groups = offset.shape[1] // (2 * num_taps)
    index, share = _corners(x.shape[2:], offset, mask, (weight.shape[2], weight.shape[3]), stride, padding, dilation)
    # Row cell * g + group holds the channels of one offset group at one cell of the batch.
    table = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1] // num_groups).contiguous()
    kernel = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])  # [T * C, O]
    return table, share, kernel, index


def _as_maps(out: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """[B * h * w, O] as [B, O, h, w]."""
    if bias is not None:
        out = out + bias
    num_images, _, height, width = offset.shape
    return out.reshape(num_images, height * width, out.shape[1]).transpose(1, 2).unflatten(2, (height, width))


class _GatherProduct(torch.autograd.Function):
    """Gathers columns [M, T * C] and multiplies them with the kernel, chunk by chunk; keeps none for the backward.

    table [rows, C / g], share [M, T * g, 4], kernel [T * C, O], index like share: [M, O].
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, share: Tensor, kernel: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(table, share, kernel, index)
        out = table.new_empty(len(share), kernel.shape[1])
        for start in range(0, len(share), CHUNK):
            part = slice(start, start + CHUNK)
            columns = _gather(table, share[part], index[part])
            torch.mm(columns.view(-1, len(kernel)), kernel, out=out[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, share, kernel, index = ctx.saved_tensors
        grad_table, grad_share, grad_kernel = torch.zeros_like(table), torch.empty_like(share), torch.zeros_like(kernel)
        for start in range(0, len(share), CHUNK):
            part = slice(start, start + CHUNK)
            grad_columns = (grad[part] @ kernel.T).view(-1, table.shape[1])
            with torch.enable_grad():
                part_share = share[part].detach().requires_grad_()
                columns = _gather(table, part_share, index[part])
            # torch knows the bag's gradient for the shares; the one for the table is faster by hand.
            grad_share[part] = torch.autograd.grad(columns, part_share, grad_columns)[0]
            grad_kernel += columns.detach().view(-1, len(kernel)).T @ grad[part]
            if ctx.needs_input_grad[0]:
                rows, weights = index[part].reshape(-1, 4), share[part].reshape(-1, 4)
                for corner in range(4):
                    grad_table.index_add_(0, rows[:, corner], grad_columns * weights[:, corner, None])
        return grad_table, grad_share, grad_kernel, None


def _gather(table: Tensor, share: Tensor, index: Tensor) -> Tensor:
    """Samples [m * T * g, C / g]."""
    return F.embedding_bag(index.reshape(-1, 4), table, per_sample_weights=share.reshape(-1, 4), mode="sum")


def _corners(
    size: torch.Size,
    offset: Tensor,
    mask: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor]:
    """Table rows and bilinear shares of the four cells around each sample, both [B * h * w, T * g, 4]."""
    height, width = size
    num_images, _, out_height, out_width = offset.shape
    num_taps = kernel[0] * kernel[1]
    # [B, g, T, 2, h * w] -> [B, h * w, T, g, 2]
    offset = offset.reshape(num_images, -1, num_taps, 2, out_height * out_width).permute(0, 4, 2, 1, 3)
    num_groups = offset.shape[3]
    device = offset.device
    cell = torch.arange(out_height * out_width, device=device)
    tap = torch.arange(num_taps, device=device)
    row = (cell // out_width * stride[0] - padding[0])[:, None] + tap // kernel[1] * dilation[0]  # [h * w, T]
    column = (cell % out_width * stride[1] - padding[1])[:, None] + tap % kernel[1] * dilation[1]
    # Beyond one cell outside everything is zero, so clamping there changes nothing and keeps the integers small.
    y = (row[None, :, :, None] + offset[..., 0]).clamp(-1, height)
    x = (column[None, :, :, None] + offset[..., 1]).clamp(-1, width)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    ys = torch.stack((top, top, top + 1, top + 1), dim=-1)
    xs = torch.stack((left, left + 1, left, left + 1), dim=-1)
    share = torch.stack((1 - down, 1 - down, down, down), dim=-1)
    share = share * torch.stack((1 - right, right, 1 - right, right), dim=-1)
    share = share * ((ys >= 0) & (ys < height) & (xs >= 0) & (xs < width))
    if mask is not None:
        factors = mask.reshape(num_images, -1, num_taps, out_height * out_width).permute(0, 3, 2, 1)
        share = share * factors[..., None]
    index = ys.clamp_(0, height - 1).long() * width + xs.clamp_(0, width - 1).long()
    index += torch.arange(num_images, device=device).reshape(-1, 1, 1, 1, 1) * (height * width)
    index = index * num_groups + torch.arange(num_groups, device=device)[:, None]
    # A NaN offset became some integer above; its share stays NaN, its row must exist.
    index.clamp_(0, num_images * height * width * num_groups - 1)
    shape = (num_images * out_height * out_width, num_taps * num_groups, 4)
    return index.reshape(shape), share.reshape(shape)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value
