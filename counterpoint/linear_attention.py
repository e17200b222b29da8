"""Self-attention whose cost is linear in the tokens: a ReLU kernel in place of softmax, plus a convolution.

LiT (arXiv 2501.12976): a depth-wise convolution of the values over the token grid gives back the locality
that plain linear attention lacks, and a few heads do as well as many.
"""

import math

import torch
from torch import Tensor, nn

EPSILON = 1e-6
"""Keeps the quotient finite where a query's features meet no key's: ReLU features may all be zero."""


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax-free attention [B,heads,N,d] of query, key and value [B,heads,N,d], in O(N d^2) a head.

    With phi = ReLU, O_i = phi(Q_i) sum_j phi(K_j)^T V_j / (phi(Q_i) sum_j phi(K_j)^T + 1e-6)
    (Katharopoulos et al. 2020, eq. 5). Sums over tokens are taken in float32 whatever the inputs are, for in
    half precision they overflow; the result has `value`'s dtype.
    """
    with torch.autocast(value.device.type, enabled=False):
        q, k, v = query.float().relu(), key.float().relu(), value.float()
        state = k.transpose(-1, -2) @ v
        total = k.sum(dim=-2).unsqueeze(-1)
        return ((q @ state) / (q @ total + EPSILON)).to(value.dtype)


class LinearAttention(nn.Module):
    """Linear self-attention of tokens [B,N,width] on a square grid, in the place of diffusers' `Attention`.

    O = linear_attention(Q, K, V) + DWC(V), then the output projection, where DWC is a depth-wise convolution
    of V laid out as [B,width,side,side]. Projections have the names and shapes of `Attention`'s, whatever the
    number of heads.
    """

    def __init__(self, width: int, heads: int, kernel_size: int) -> None:
        """Make it with `heads`, and a square convolution of odd `kernel_size`; 0 leaves the convolution out.

        Raises ValueError if the heads do not divide the width, or the kernel has no middle.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide the width of {width}: use a divisor")
        if kernel_size and not kernel_size % 2:
            raise ValueError(f"kernel_size={kernel_size} has no middle: use an odd one, or 0 for none")
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.local = (
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
            if kernel_size
            else None
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return [B,N,width]. Raises ValueError for cross-attention, a mask, or tokens that are no square."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "linear attention is self-attention over all tokens: pass neither encoder_hidden_states nor "
                "attention_mask"
            )
        value = self.to_v(hidden_states)
        attended = linear_attention(
            self._by_head(self.to_q(hidden_states)),
            self._by_head(self.to_k(hidden_states)),
            self._by_head(value),
        )
        out = attended.transpose(1, 2).flatten(2)
        if self.local is not None:
            out = out + self._convolved(value)
        projected: Tensor = self.to_out(out)
        return projected

    def _by_head(self, tokens: Tensor) -> Tensor:
        """Return tokens [B,N,width] as [B,heads,N,width / heads]."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _convolved(self, value: Tensor) -> Tensor:
        """Return the values [B,N,width] after the depth-wise convolution over their grid."""
        assert self.local is not None
        side = math.isqrt(value.shape[1])
        if side * side != value.shape[1]:
            raise ValueError(
                f"{value.shape[1]} tokens are no square grid, which the convolution of linear attention "
                "needs: use square images, or kernel_size=0"
            )
        grid = value.transpose(1, 2).unflatten(2, (side, side))
        return self.local(grid).flatten(2).transpose(1, 2)
