# SPDX-License-Identifier: Apache-2.0
"""The contract on running: the same bits every time, several threads at once, worker processes, a free interpreter.

Bits are promised per thread count, not across thread counts.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from contract_base import Base, Given, Place, Sizes, fastest, gradients, leaves, mapped, tracked
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

REPEATS = 50
#: Enough work for several threads.
WIDE = Sizes(33, 96, 160)


class Calls(Dataset[Tensor]):
    """Results of a primitive, computed where the data set is read."""

    def __init__(self, primitive: object, given: Given) -> None:
        self.primitive, self.given = primitive, given

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return self.primitive.linear(self.given)


def _in_child(primitive: object, given: Given, path: str) -> None:
    torch.set_num_threads(1)
    torch.save(primitive.linear(given), path)


class Running(Base):
    @pytest.fixture
    def threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    @pytest.fixture
    def on_cpu(self) -> Iterator[None]:
        with fastest(self.primitive.backends)[0].use():
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("count", [1, 2])
    def test_results_repeat_to_the_bit(self, place: Place, dtype: torch.dtype, count: int, threads: None) -> None:
        if place.interpreted:
            pytest.skip("Triton's interpreter has one thread")
        torch.set_num_threads(count)
        given = self.primitive.make(WIDE, dtype, place.device)
        dy = torch.randn(WIDE[:2], device=place.device).to(dtype)
        first = gradients(self.primitive.linear, given, dy)
        for _ in range(REPEATS - 1):
            y, grads = gradients(self.primitive.linear, given, dy)
            assert torch.equal(y, first[0])
            assert all(torch.equal(a, b) for a, b in zip(grads, first[1], strict=True))

    def test_four_threads_share_genes(self, device: str) -> None:
        given = self.primitive.make(Sizes(4, 24, 16), torch.float32, device)
        dy = torch.randn(4, 24, device=device)
        wanted = gradients(self.primitive.linear, given, dy)
        wrong: list[int] = []

        def work(thread: int) -> None:
            for turn in range(200):
                y, grads = gradients(self.primitive.linear, given, dy)
                if not all(torch.equal(a, b) for a, b in zip((y, *grads), (wanted[0], *wanted[1]), strict=True)):
                    wrong.append(thread * 1000 + turn)

        workers = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(4)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + 60
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        assert not any(worker.is_alive() for worker in workers), "the threads hang"
        assert not wrong

    def test_the_interpreter_is_free_while_kernels_run(self, on_cpu: None, threads: None) -> None:
        """A heartbeat goes on during one long call; with the lock held it would not beat once."""
        torch.set_num_threads(1)
        beats: list[float] = []
        done = threading.Event()

        def heartbeat() -> None:
            while not done.wait(0.002):
                beats.append(time.monotonic())

        given = self.primitive.make(Sizes(1024, 1536, 1536), torch.float32)
        pulse = threading.Thread(target=heartbeat, daemon=True)
        pulse.start()
        begin = time.monotonic()
        while time.monotonic() - begin < 0.2:
            start = time.monotonic()
            self.primitive.linear(given)
            end = time.monotonic()
        done.set()
        pulse.join()
        assert sum(start < beat < end for beat in beats) >= 2, (
            f"of {len(beats)} beats none fell into {end - start:.3f} s"
        )

    # Python's own where threads live: what a child may do is said in the text of the warning
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_worker_processes_of_a_data_loader(self, on_cpu: None, threads: None) -> None:
        torch.set_num_threads(2)
        given = self.primitive.make(WIDE, torch.float32)
        self.primitive.linear(given)  # the parent has had threads at work
        torch.set_num_threads(1)
        expected = self.primitive.linear(given)
        loader = DataLoader(Calls(self.primitive, given), batch_size=2, num_workers=2, timeout=60)
        for batch in loader:
            assert all(torch.equal(row, expected) for row in batch)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_forked_children_with_one_thread(self, on_cpu: None, threads: None, tmp_path: object) -> None:
        torch.set_num_threads(2)
        given = self.primitive.make(WIDE, torch.float32)
        self.primitive.linear(given)
        path = f"{tmp_path}/result.pt"
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(self.primitive, given, path))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        torch.set_num_threads(1)
        assert torch.equal(torch.load(path), self.primitive.linear(given))

    def test_side_effects_on_arguments(self, place: Place) -> None:
        """Arguments and upstream gradients keep their values and versions."""
        given = tracked(self.primitive.make(Sizes(5, 8, 6), torch.float32, place.device))
        before = mapped(given, lambda name, tensor: tensor.detach().clone())
        versions = [leaf._version for leaf in leaves(given)]
        dy = torch.ones(5, 8, device=place.device)
        self.primitive.linear(given).backward(dy)
        assert versions == [leaf._version for leaf in leaves(given)]
        assert all(torch.equal(a, b) for a, b in zip(leaves(given), leaves(before), strict=True))
        assert (dy == 1).all()
