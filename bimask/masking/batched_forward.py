"""Blocks of images through one prepared net: how its passes are cut, and who makes them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor

from bimask.devices import memory_of
from bimask.masking.frozen import FrozenNet

T = TypeVar("T")

# The largest masked activation of one pass, in bytes, where the settings do not say: what stays in a
# CPU's cache, and elsewhere what most accelerators have to spare.
PASS_BYTES = {"cpu": 8 * 2**20}
PASS_BYTES_ELSEWHERE = 2**30
# Share of a GPU's memory that the activations of one pass may take: of all that the process may have,
# not of what is free at the moment, so that a run has the same passes and bits whenever it runs.
PASS_SHARE = 0.4


class BatchedForward:
    """Blocks of images through a net in passes of bounded size, by several threads where that pays.

    A CPU's threads are better spent on blocks of their own than within the kernels of one pass; an
    accelerator has one queue.

    Args:
        net: the prepared victim.
        device: where images and net are.
        size: images of a pass; "batch" holds no more than one block a member, so that a run alone
            needs the memory of one pass of its batch; "device" as many as the device is good for.
        threads: at most so many at work, 1 for none beside the caller's.
        fine: dtype that logits come back in.
        sample: (n, C, H, W) images, that a GPU's passes are measured by.
    """

    def __init__(
        self,
        net: FrozenNet,
        device: torch.device,
        *,
        size: int | Literal["batch", "device"],
        threads: int,
        fine: torch.dtype,
        sample: Tensor,
    ) -> None:
        self.net, self.device, self.size, self.fine = net, device, size, fine
        self.threads = threads if device.type == "cpu" else 1
        self._images = None if (memory := memory_of(device)) is None else _fitting(net, sample, memory)
        self._workers: ThreadPoolExecutor | None = None
        self._own = threading.local()  # a worker's net: a net holds the factors of the pass it is in

    def answer(self, images: Tensor, factors: Tensor | None = None) -> Tensor:
        """Logits of blocks: (B, N, C, H, W) under (B, C) factors -> (B, N, K)."""
        net = getattr(self._own, "net", self.net)
        logits: Tensor = net(images.flatten(0, 1), factors).to(self.fine)
        return logits.unflatten(0, images.shape[:2])

    def images_per_pass(self, n: int) -> int:
        """Images of one block in one pass, for blocks of n."""
        return n if isinstance(self.size, str) else min(n, self.size)

    def per_pass(self, members: int, n: int) -> int:
        """Blocks of n images in one pass."""
        if not isinstance(self.size, str):
            return max(1, self.size // n)
        images = self._images
        if images is None:
            size = torch.finfo(self.net.dtype).bits // 8 * self.net.activation
            images = PASS_BYTES.get(self.device.type, PASS_BYTES_ELSEWHERE) // size
        fitting = max(1, images // n)
        return min(members, fitting) if self.size == "batch" else fitting

    @contextmanager
    def shared_out(self) -> Iterator[None]:
        """While this is open, `each` hands its slices to threads of their own."""
        if self.threads == 1:
            yield
            return

        def begin() -> None:
            torch.set_num_threads(1)
            self._own.net = copy.deepcopy(self.net)

        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads, initializer=begin) as self._workers:
                yield
        finally:
            self._workers = None
            torch.set_num_threads(threads)  # some libraries know one number for all threads

    def each(self, work: Callable[[slice], T], count: int, most: int) -> list[T]:
        """`work` on slices of range(count), of at most `most`; none may touch what another's does."""
        if self._workers is None:
            return [work(part) for part in slices(count, most)]
        most = min(most, -(-count // self.threads))  # something for every worker
        return list(self._workers.map(work, slices(count, most)))


def _fitting(net: FrozenNet, sample: Tensor, memory: int) -> int:
    """Images of one pass, of all blocks together, on a device of so many bytes."""
    return int(PASS_SHARE * memory) // net.bytes_kept(sample)


def slices(n: int, size: int) -> Iterator[slice]:
    """range(n) in slices of at most `size`."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
