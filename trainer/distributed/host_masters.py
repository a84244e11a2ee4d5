"""parallel.cpu_offload without FSDP2: masters, gradients and moments on the host, copies for computing on the device.

What DeepSpeed's ZeRO-Offload does on one GPU (Ren et al. 2021): the device holds two bytes of each trained number, the host 18.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from trainer.distributed.compute_copies import ComputeCopies, CopyUse


class HostMasters(ComputeCopies):
    """Copies on `device` of masters on the host. A gradient is sent to the host while backward goes on, and added there at its end.

    After `backward()` the gradients of masters are complete: `.grad` is float32, on the host, as the optimizer wants it.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model, parameters, dtype, device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pinned = device.type == "cuda"
        # Page-locked memory of the copies' type: values pass it on their way to the device, gradients on their way back.
        self.staged = {p: torch.empty(p.shape, dtype=dtype, pin_memory=pinned) for p in self.uses}
        self.grads = {p: torch.zeros_like(p, requires_grad=False) for p in self.uses}  # allocated once: fresh pages cost more
        self.sums: dict[Tensor, Tensor] = {}  # of parameters that are used more than once in a forward, float32, on the device
        self.sent: dict[Tensor, Tensor] = {}  # on the host, or on their way to it
        self.task = -1  # number of the backward that they belong to

    def copy(self, parameter: Tensor, use: CopyUse) -> None:
        """Make the copy of `parameter` anew: cast on the host, half the bytes go over the bus."""
        staged = self.staged[parameter]
        staged.copy_(parameter.detach())
        # Ordered before the next gradient that is sent through the same memory: its stream waits for this one.
        use.copy.copy_(staged, non_blocking=True)

    def receive(self, parameter: Tensor, use: CopyUse, grad: Tensor, is_only_use: bool) -> None:
        """Send the gradient to the host, once all uses of the copy have given theirs."""
        if (task := torch._C._current_graph_task_id()) != self.task:
            self.task = task
            self.sent.clear()  # of a backward that failed
            self.sums.clear()
            engine = Variable._execution_engine  # type: ignore[attr-defined]  # torch declares it nowhere
            engine.queue_callback(self.collect)
        if is_only_use:
            self.send(parameter, grad, self.staged[parameter])
            return
        before = self.sums.get(parameter)
        self.sums[parameter] = total = grad.float() if before is None else before + grad.float()
        if not use.open:
            self.send(parameter, total, torch.empty(total.shape, pin_memory=self.stream is not None))

    def send(self, parameter: Tensor, grad: Tensor, target: Tensor) -> None:
        """Copy a gradient to `target` on the host, beside what the device computes."""
        self.sent[parameter] = target
        if self.stream is None:
            target.copy_(grad)
            return
        self.stream.wait_stream(torch.cuda.current_stream(grad.device))
        with torch.cuda.stream(self.stream):
            target.copy_(grad, non_blocking=True)
        grad.record_stream(self.stream)  # its memory is not reused before it has been read

    def collect(self) -> None:
        """Add the gradients of one backward to those of the masters. Host sync: the host cannot add what has not arrived."""
        if self.stream is not None:
            self.stream.synchronize()
        for parameter, arrived in self.sent.items():
            if parameter.grad is None:
                parameter.grad = self.grads[parameter].copy_(arrived)
            else:
                parameter.grad.add_(arrived)
        self.sent.clear()
        self.sums.clear()
