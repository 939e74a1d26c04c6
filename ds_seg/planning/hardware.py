"""The machines that a plan is for, and what is assumed of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30
_GPUS_A_NODE = 8
_EAGER_MS = {"none": 4.0, "selective": 6.5, "block": 6.0}
_COMPILED_MS = 3.5
_COMPILED_MOVED = 2 / 3
FORWARD_MS = _EAGER_MS["none"] / 3
"""Python's time for a block that no gradient passes: nothing of it is computed again or compiled."""


def find_host_ms(policy: str, *, compiled: bool) -> float:
    """Python's time for a block, forward and backward: ZeRO-3's hooks and launching kernels.

    Measured on CPUs with blocks that take hardly any computation (docs/performance.md).
    """
    return _COMPILED_MS if compiled else _EAGER_MS[policy]


def find_moved_share(*, compiled: bool) -> float:
    """What blocks read and write beside products and attention, of what they do where each operator is a kernel.

    Compiled: counted by hand for the 6B model's block, where LayerScale, drop path, residual and norm become one.
    """
    return _COMPILED_MOVED if compiled else 1.0


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal GPUs; bandwidths are of one GPU in one direction."""

    gpus: int
    nodes: int
    gpu_memory_gib: float
    host_memory_gib: float | None = None
    """Of a node; None: not known, so nothing is refused for want of it."""
    interconnect_gbps: float = 400.0
    """Of the network card that each GPU has, gigabits a second."""
    nvlink_gb_per_s: float = 300.0
    """Between the GPUs of a node."""
    hop_us: float = 3.4
    """Of a ring, from one GPU to the next in a node."""
    node_hop_us: float = 14.0
    """Of a ring, from node to node. Source of both: NCCL `src/graph/tuning.cc`, latencies of rings, simple protocol."""
    peak_tflops: float = 989.0
    """Dense bf16 matrix products."""
    utilisation: float = 0.65
    """Share of the peak that matrix products reach."""
    attention_utilisation: float = 0.33
    """The same of attention, forward and backward. Source: FlashAttention-2 in the FlashAttention-3 paper, figure 5."""
    hbm_gb_per_s: float = 2000.0
    """What the optimizer reads and writes."""
    elementwise_gb_per_s: float = 2000.0
    """What all other kernels read and write: norms, activations, upsampling, losses."""
    pcie_gb_per_s: float = 25.0
    pageable_gb_per_s: float = 10.0
    """Over PCIe from host memory that is not page-locked."""
    host_gb_per_s: float = 100.0
    """Host memory of a node, as an optimizer on the CPU sees it."""
    overlaps: bool = True
    """Whether computation, communication, Python and copies to the host go on at once, as with GPUs."""
    storage_gb_per_s: float = 2.0
    """What all processes together write to the file system."""
    usable: float = 0.95
    """Of a GPU's memory: the system and the driver take some, and nothing fits to the last byte."""
    context_gib: float = 1.5
    """CUDA context, kernels and workspaces; as much as a third more for the buffers of collectives."""
    fragmentation: float = 0.05
    """Of what is allocated and freed in a step."""
    process_gib: float = 4.0
    """Host memory of a process: Python, torch, CUDA's host side."""
    worker_gib: float = 1.0
    """Host memory of a data loading process."""

    @property
    def gpus_a_node(self) -> int:
        """GPUs, and processes, of a node."""
        return math.ceil(self.gpus / self.nodes)

    @property
    def collective_gb_per_s(self) -> float:
        """What a collective over all GPUs reaches: a ring enters a node through one card, and there is one for each."""
        cards = self.gpus_a_node * 0.8 * self.interconnect_gbps / 8
        return self.nvlink_gb_per_s if self.nodes == 1 else min(self.nvlink_gb_per_s, cards)

    @property
    def ring_s(self) -> float:
        """Seconds of a collective over all GPUs that moves nothing: once around the ring."""
        return 1e-6 * (self.hop_us * (self.gpus - self.nodes) + self.node_hop_us * (self.nodes - 1))

    @property
    def ring_in_node_s(self) -> float:
        """The same inside a node."""
        return 1e-6 * self.hop_us * (self.gpus_a_node - 1)

    def describe(self) -> list[str]:
        """What is assumed, as lines of text."""
        host = "not given: not limited" if self.host_memory_gib is None else f"{self.host_memory_gib:g} GiB per node"
        return [
            f"peak {self.peak_tflops:g} TFLOP/s (dense bf16) per GPU, of which products reach {self.utilisation:.0%}, "
            f"attention {self.attention_utilisation:.0%}, the head's FP32 products half as much as others (TF32); "
            f"norms, activations and losses read and write {self.elementwise_gb_per_s:g} GB/s",
            f"collectives at {self.nvlink_gb_per_s:g} GB/s inside a node, between nodes at most at what the network "
            f"cards carry, one of {self.interconnect_gbps:g} Gbit/s per GPU (80% of it reached); a ring adds "
            f"{self.hop_us:g} us from GPU to GPU and {self.node_hop_us:g} us from node to node; computation hides "
            "them as far as it lasts",
            f"optimizer limited by memory bandwidth: {self.hbm_gb_per_s:g} GB/s on a GPU; in host memory "
            f"{self.host_gb_per_s:g} GB/s per node, reached over PCIe at {self.pcie_gb_per_s:g} GB/s "
            f"({self.pageable_gb_per_s:g} where memory is not page-locked)",
            f"{self.usable:.0%} of a GPU's memory can be used; CUDA context, kernels and workspaces "
            f"{self.context_gib:g} GiB, a third more for collectives; fragmentation {self.fragmentation:.0%} of what a "
            "step allocates",
            "Python (ZeRO-3's hooks, kernel launches) per block and micro-batch, by checkpointing: "
            f"{', '.join(f'{policy} {ms:g} ms' for policy, ms in _EAGER_MS.items())}, compiled {_COMPILED_MS:g} ms; "
            f"{FORWARD_MS:.2g} ms where no gradient passes; computation hides it as far as it lasts",
            f"host memory {host}; {self.process_gib:g} GiB per process, {self.worker_gib:g} GiB per data worker",
            f"checkpoints at {self.storage_gb_per_s:g} GB/s; evaluations are not counted",
        ]


def place(gpus: int, nodes: int | None = None) -> int:
    """Nodes of so many GPUs: the number given, or as few as hold as many each, 8 at most."""
    if nodes is not None and nodes <= gpus:
        return nodes
    return next(count for count in range(math.ceil(gpus / _GPUS_A_NODE), gpus + 1) if gpus % count == 0)
