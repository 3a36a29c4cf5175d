"""Quantises keys and values to 4 or 8 bits and back.

x' = code · scale + zero (asymmetric). Keys have one scale per channel and group of tokens, because some channels of the
keys are large for all tokens. Values have one scale per token and group of channels (KIVI, arXiv 2402.02750).

zero is the minimum of its group. scale is rounded up so that the codes cover the group. Both have the dtype of the
states. Therefore zero is exact, nothing overflows, constant groups are restored exactly, and |x - x'| ≤ scale / 2. In
bf16 and groups of 32, scale and zero take 1 bit per element.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.attend import DTYPES, MAX_DIMS

BITS = (4, 8)
LEAST_GROUP = 16  # tokens: the smallest tile of a kernel; a tile must not span two groups
VALUE_GROUP = 32  # channels
ABSENT = -1e30  # keys with this bias or less are masked out


@dataclass(frozen=True, eq=False)
class Quantised:
    """Quantised keys and values of N packed tokens in Hkv heads of d dims; token n is in key group n // group.

    k_codes, v_codes  uint8 [Hkv, N, d · bits / 8]; with 4 bits, byte i holds channel i in its low half and
                      channel i + d / 2 in its high half
    k_scale, k_zero   [Hkv, N / group, d]
    v_scale, v_zero   [Hkv, N, d / value_group]
    """

    bits: int
    group: int
    k_codes: Tensor
    k_scale: Tensor
    k_zero: Tensor
    v_codes: Tensor
    v_scale: Tensor
    v_zero: Tensor

    def __len__(self) -> int:
        return self.k_codes.shape[1]

    @property
    def heads(self) -> int:
        return self.k_codes.shape[0]

    @property
    def dims(self) -> int:
        return self.k_scale.shape[2]

    @property
    def value_group(self) -> int:
        return self.dims // self.v_scale.shape[2]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "Quantised":
        return Quantised(self.bits, self.group, **{name: x.to(device) for name, x in self.tensors.items()})

    def between(self, begin: int, end: int) -> "Quantised":
        """Views of tokens begin … end - 1, both multiples of `group`. Kernels copy views that are not contiguous."""
        if begin % self.group or end % self.group:
            raise ConfigError(f"expected multiples of {self.group} tokens, got {begin} to {end}")
        tokens, groups = slice(begin, end), slice(begin // self.group, end // self.group)
        cuts = {name: x[:, groups if name in ("k_scale", "k_zero") else tokens] for name, x in self.tensors.items()}
        return Quantised(self.bits, self.group, **cuts)


def concatenated(parts: list[Quantised]) -> Quantised:
    """Concatenates the tokens of all parts. Raises ConfigError if heads, dims, bits, groups or dtypes differ."""
    kinds = list({(p.bits, p.group, p.value_group, p.heads, p.dims, p.k_scale.dtype) for p in parts})
    if len(kinds) != 1:
        raise ConfigError(f"expected parts of one (bits, group, value_group, heads, dims, dtype), got {kinds}")
    joined = {name: torch.cat([p.tensors[name] for p in parts], 1) for name in parts[0].tensors}
    return Quantised(parts[0].bits, parts[0].group, **joined)


@torch.no_grad()
def quantise(k: Tensor, v: Tensor, bits: int, group: int = 32, value_group: int | None = None) -> Quantised:
    """Quantises k, v [Hkv, N, d] of one dtype (fp32, bf16 or fp16) to 4 or 8 bits, without gradient.

    group        tokens that share a scale in each channel of the keys; a power of two, at least 16, that divides N
    value_group  channels that share a scale in each token's values; None: the divisor of d nearest to 32

    Raises ConfigError for arguments that do not fit. A group with a value that is not finite becomes NaN.
    """
    _check_states(k, v, bits, group, value_group)
    value_group = value_group or usual_value_group(k.shape[2])
    k_codes, k_scale, k_zero = _fitted(k.unflatten(1, (k.shape[1] // group, group)), 2, bits)
    v_codes, v_scale, v_zero = _fitted(v.unflatten(2, (v.shape[2] // value_group, value_group)), 3, bits)
    k_codes, v_codes = _packed(k_codes.flatten(1, 2), bits), _packed(v_codes.flatten(2, 3), bits)
    return Quantised(bits, group, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero)


@torch.no_grad()
def dequantise(q: Quantised, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns k, v [Hkv, N, d] in `dtype`, computed in fp32."""
    k_codes, v_codes = _unpacked(q.k_codes, q.bits), _unpacked(q.v_codes, q.bits)
    k_codes = k_codes.unflatten(1, (len(q) // q.group, q.group))
    v_codes = v_codes.unflatten(2, (q.dims // q.value_group, q.value_group))
    k = _spread(k_codes, q.k_scale.unsqueeze(2), q.k_zero.unsqueeze(2))
    v = _spread(v_codes, q.v_scale.unsqueeze(3), q.v_zero.unsqueeze(3))
    return k.flatten(1, 2).to(dtype), v.flatten(2, 3).to(dtype)


def usual_value_group(dims: int) -> int:
    """The default value_group for heads of `dims` channels: the divisor nearest to VALUE_GROUP."""
    return min(
        (part for part in range(1, dims + 1) if dims % part == 0), key=lambda part: max(part, VALUE_GROUP**2 / part)
    )


def _fitted(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uint8 codes in the shape of x, and the scale and zero of each group along `dim`; all contiguous."""
    x = x.contiguous()
    zero, highest = x.aminmax(dim=dim, keepdim=True)
    levels = 2**bits - 1
    scale = _rounded_up((highest.float() - zero.float()) / levels, x.dtype)
    steps = scale.float().masked_fill(scale == 0, 1.0)
    codes = (x.float() - zero.float()).div_(steps).round_().clamp_(0, levels).to(torch.uint8)
    return codes, scale.squeeze(dim), zero.squeeze(dim)


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest values of `dtype` that are at least x, for x ≥ 0."""
    near = x.to(dtype)
    if dtype == x.dtype:
        return near
    return (near.view(torch.int16) + (near.float() < x)).view(dtype)  # + 1 on the bits gives the next float


def _spread(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.addcmul(zero.float(), codes.float(), scale.float())


def _packed(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | high << 4


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else torch.cat([codes & 15, codes >> 4], -1)


def _check_states(k: Tensor, v: Tensor, bits: int, group: int, value_group: int | None) -> None:
    if k.dtype not in DTYPES or k.dtype != v.dtype:
        raise ConfigError(f"k and v must share a dtype of {DTYPES}, got {k.dtype}, {v.dtype}")
    if k.ndim != 3 or k.shape != v.shape or not 1 <= k.shape[2] <= MAX_DIMS:
        raise ConfigError(f"expected k, v [Hkv, N, d], d from 1 to {MAX_DIMS}, got {list(k.shape)}, {list(v.shape)}")
    if bits not in BITS:
        raise ConfigError(f"bits must be one of {BITS}, got {bits}")
    if bits == 4 and k.shape[2] % 2:
        raise ConfigError(f"4 bits need an even head dimension, got {k.shape[2]}; use 8 bits")
    if group < LEAST_GROUP or group & (group - 1):
        raise ConfigError(f"group must be a power of two of at least {LEAST_GROUP}, got {group}")
    if k.shape[1] % group:
        raise ConfigError(f"expected a multiple of {group} tokens, got {k.shape[1]}")
    if value_group is not None and (value_group < 1 or k.shape[2] % value_group):
        raise ConfigError(f"value_group must divide the head dimension, {k.shape[2]}, got {value_group}")
