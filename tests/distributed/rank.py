"""What a process of :class:`ranks.Ranks` runs: it joins the group, then calls what it is sent.

Its tensors are on the CPU, where the kernels run in the interpreter, with a GPU or without.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import pickle
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

# Some of them for what is run only: they are imported once, before the ranks are forked.
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch.distributed.device_mesh import DeviceMesh

from fusedformer.testing import poisoned_memory


def serve(connection: Connection, rank: int, size: int, store: str, seconds: float) -> None:
    """Answer each ``(function, args, ranks)`` with ``(True, result)`` or ``(False, traceback)``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in range(1, size + 1)}
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # the tests are over; nothing of the group needs to be closed in order
        answer: tuple[bool, Any]
        try:
            function, args, ranks = pickle.loads(request)
            torch.manual_seed(0)
            with poisoned_memory():
                answer = True, function(meshes[ranks], *args)
            sent = pickle.dumps(answer)
        except BaseException:
            sent = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(sent)
