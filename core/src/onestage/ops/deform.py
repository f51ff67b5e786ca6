"""Deformable convolution: every kernel tap samples the input at its own real-valued place.

B images, C input channels, O output channels, g offset groups, T kernel taps (row-major), h w output grid.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops

Pair = tuple[int, int]

# Output pixels per gather: the gathered columns of a chunk (256 channels, 9 taps: 9 MB) stay near the cache.
CHUNK = 1024


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
        [B, O, h, w] of the type of `x`; computed in float32 at least.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    # torchvision's op has no half types everywhere, and offsets lose their point in bf16: compute in float32.
    dtype = torch.promote_types(x.dtype, torch.float32)
    given = x.dtype
    x, offset, weight = x.to(dtype), offset.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    mask = None if mask is None else mask.to(dtype)
    one_group = weight.shape[1] == x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cpu" and one_group and not _needs_grad(x, offset, weight, bias, mask):
            return deform_conv2d_gather(x, offset, weight, bias, mask, stride, padding, dilation).to(given)
        return ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask).to(given)


@torch.no_grad()
def deform_conv2d_gather(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """The same by gathering from a [cells, channels] table and one matrix product: fast on CPU, no gradient.

    Arguments as above, one weight group. A sample is a weighted bag of four table rows, which is what
    `embedding_bag` sums without writing the four rows out.
    """
    num_images, channels = x.shape[:2]
    kernel_height, kernel_width = weight.shape[2:]
    num_taps = kernel_height * kernel_width
    num_groups = offset.shape[1] // (2 * num_taps)
    grid = offset.shape[2:]
    index, share = _corners(x.shape[2:], offset, mask, (kernel_height, kernel_width), stride, padding, dilation)
    kernel = weight.permute(2, 3, 1, 0).reshape(num_taps * channels, -1)
    out = x.new_empty(num_images, grid[0] * grid[1], weight.shape[0])
    for image in range(num_images):
        # Row cell * g + group holds the channels of one offset group at one cell.
        table = x[image].permute(1, 2, 0).reshape(-1, channels // num_groups).contiguous()
        for rows in torch.arange(grid[0] * grid[1]).split(CHUNK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            columns = F.embedding_bag(
                index[image, part].reshape(-1, 4),
                table,
                per_sample_weights=share[image, part].reshape(-1, 4),
                mode="sum",
            )  # [pixels * taps * groups, C / g]
            torch.mm(columns.view(len(rows), -1), kernel, out=out[image, part])
    if bias is not None:
        out += bias
    return out.transpose(1, 2).reshape(num_images, -1, *grid)


def _corners(
    size: torch.Size, offset: Tensor, mask: Tensor | None, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Table rows [B, h * w, T, g, 4] and bilinear shares of the four cells around each sample."""
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
    top, left = y.floor(), x.floor()
    bottom_share, right_share = y - top, x - left
    ys = torch.stack((top, top, top + 1, top + 1), dim=-1)
    xs = torch.stack((left, left + 1, left, left + 1), dim=-1)
    share = torch.stack((1 - bottom_share, 1 - bottom_share, bottom_share, bottom_share), dim=-1)
    share *= torch.stack((1 - right_share, right_share, 1 - right_share, right_share), dim=-1)
    share *= (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
    if mask is not None:
        weights = mask.reshape(num_images, -1, num_taps, out_height * out_width).permute(0, 3, 2, 1)
        share *= weights[..., None]
    flat = ys.clamp_(0, height - 1).long() * width + xs.clamp_(0, width - 1).long()
    group = torch.arange(num_groups, device=device)[:, None]
    # A NaN offset becomes some integer above; its share stays NaN, its row must exist.
    return (flat * num_groups + group).clamp_(0, height * width * num_groups - 1), share


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value
