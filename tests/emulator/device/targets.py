"""The GPUs that the fake device can be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Properties:
    """What ``torch.cuda.get_device_properties`` returns."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    L2_cache_size: int
    total_memory: int
    shared_memory_per_block: int = 48 * 1024
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    is_integrated: bool = False
    is_multi_gpu_board: bool = False
    gcnArchName: str = ""

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        return self.shared_memory_per_block_optin + 1024


TARGETS = {
    "sm_80": Properties("emulated A100", 8, 0, 108, 163 * 1024, 40 << 20, 80 << 30),
    "sm_90": Properties("emulated H200", 9, 0, 132, 227 * 1024, 50 << 20, 141 << 30),
}
