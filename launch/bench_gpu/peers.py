"""What attention is compared with: torch's flash op, cuDNN's, and FlexAttention compiled with its block mask."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from armillary.launch.bench_gpu.attention import Case


@dataclass
class Peer:
    """Calls without arguments. The backward makes its graph when it is first called, outside what is timed."""

    call: Callable[..., Tensor]
    """Of q, k and v as the peer likes them: the result."""
    inputs: list[Tensor]
    pull: Tensor
    graph: Any = None

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.inputs)

    def backward(self) -> tuple[Tensor, ...]:
        if self.graph is None:
            leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
            self.graph = (self.call(*leaves), leaves)
        out, leaves = self.graph
        return torch.autograd.grad(out, leaves, self.pull, retain_graph=True)


def peers_of(case: "Case", q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Peer]:
    """By name; what a peer refuses it refuses when it is called."""
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    dense = [tensor.contiguous() for tensor in heads_first]
    peers = {"flex": Peer(_in_order(flex(case, q.device)), dense, d_out)}
    if case.kind in ("full", "causal"):
        from torch.nn.attention import SDPBackend

        peers["flash"] = Peer(_in_order(sdpa(case, SDPBackend.FLASH_ATTENTION)), heads_first, d_out)
        peers["cudnn"] = Peer(_in_order(sdpa(case, SDPBackend.CUDNN_ATTENTION)), heads_first, d_out)
    elif case.kind == "window":
        peers["flash"] = Peer(flash_window(case), [q, k, v], d_out)
    else:
        rows = [tensor.flatten(0, 1) for tensor in (q, k, v, d_out)]
        peers["flash"] = Peer(flash_packed(case, q.device), rows[:3], rows[3])
    return peers


def _in_order(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Results as ours are shaped: a view."""
    return lambda *inputs: call(*inputs).transpose(1, 2)


def sdpa(case: "Case", backend: Any) -> Callable[..., Tensor]:
    from torch.nn.attention import sdpa_kernel

    options: dict[str, Any] = {"is_causal": case.mask.causal, "enable_gqa": case.heads != case.kv_heads}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def flash_window(case: "Case") -> Callable[..., Tensor]:
    """The op beneath torch's flash backend, which knows windows."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False,
            window_size_left=case.mask.window - 1, window_size_right=0,
        )[0]  # fmt: skip

    return call


def flash_packed(case: "Case", device: torch.device) -> Callable[..., Tensor]:
    """The same op on documents, whose ends it is told."""
    ends = torch.from_numpy(np.cumsum((0, *case.lengths)).astype(np.int32)).to(device)
    longest = max(case.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, case.mask.causal, False
        )[0]  # fmt: skip

    return call


def flex(case: "Case", device: torch.device) -> Callable[..., Tensor]:
    """Compiled when it is first called, for this case alone."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Else it would be compiled for sizes that vary, and after eight of them no longer.
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": "eager"} if device.type == "cpu" else {"dynamic": False}
    compiled = torch.compile(flex_attention, **options)
    documents = torch.from_numpy(np.repeat(np.arange(len(case.lengths)), case.lengths)).to(device)
    window = case.mask.window

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shown = query >= key
        if window:
            shown = shown & (query - key < window)
        if len(case.lengths) > 1:
            shown = shown & (documents[query] == documents[key])
        return shown

    made: list[Any] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not made:
            needed = case.kind != "full"
            made.append(create_block_mask(rule, None, None, case.seq, case.seq, device) if needed else None)
        return compiled(q, k, v, block_mask=made[0], enable_gqa=case.heads != case.kv_heads)

    return call
