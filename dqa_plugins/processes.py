"""The processes of a torch.distributed group: exact exchanges, and errors where others would wait for ever.

Every exchange begins with the lengths of what follows and carries what it is about, so that ranks which have come to
different places learn it instead of mixing their data. What one rank's share of the work raises, all ranks raise. A
rank that died or never calls is an error of the backend, within the group's timeout: `RankLost`. Nothing is pickled.

Without an initialised group there is one process, and nothing is exchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import RankLost, RanksDiffer, UnsupportedCombination


class Processes:
    """This process and the others of its group.

    Args:
        group: of torch.distributed; None: the default group, if one is initialised.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.

    Raises:
        UnsupportedCombination: this process is no member of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size, self._device = 0, 1, torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise UnsupportedCombination("this process is no member of the group that was given.")
            if "nccl" in str(dist.get_backend(group)):
                self._device = torch.device("cuda", torch.cuda.current_device())

    def mine(self, count: int) -> range:
        """Which of `count` pieces of work are this process's: every size-th, so that costs even out."""
        return range(self.rank, count, self.size)

    def gather(self, payload: bytes, about: str) -> Iterator[bytes]:
        """What each rank gives, in the order of ranks: one at a time, so that memory holds one.

        Args:
            payload: of this rank.
            about: what it is, the same on all ranks.

        Raises:
            RankLost: a rank does not answer. RanksDiffer: a rank exchanges something else.
        """
        if self.size == 1:
            yield payload
            return
        head = about.encode()[:128].ljust(128, b"\0")
        mine = torch.frombuffer(bytearray(head + len(payload).to_bytes(8, "little")), dtype=torch.uint8)
        heads = [torch.empty_like(mine, device=self._device) for _ in range(self.size)]
        self._call(about, partial(dist.all_gather, heads, mine.to(self._device), group=self.group))
        found = [bytes(h.cpu().numpy()) for h in heads]
        for rank, other in enumerate(found):
            if other[:128] != head:
                name = other[:128].rstrip(b"\0").decode(errors="replace")
                raise RanksDiffer(
                    f"rank {self.rank} exchanges '{about}' while rank {rank} exchanges '{name}'. Make the same calls "
                    "in the same order on every rank."
                )
        for rank, other in enumerate(found):
            length = int.from_bytes(other[128:], "little")
            if rank == self.rank:
                buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0)
            else:
                buffer = torch.empty(length, dtype=torch.uint8)
            if length:
                sent = buffer.to(self._device)
                source = rank if self.group is None else dist.get_global_rank(self.group, rank)
                self._call(about, partial(dist.broadcast, sent, source, group=self.group))
                buffer = sent.cpu()
            yield payload if rank == self.rank else bytes(buffer.numpy())

    def share(
        self,
        work: Callable[[], Any],
        about: str,
        *,
        pack: Callable[[Any], bytes] = lambda value: json.dumps(value).encode(),
        unpack: Callable[[bytes], Any] = json.loads,
    ) -> list[Any]:
        """Do this rank's work, and tell all ranks what came of it.

        Args:
            work: returns what `pack` takes: JSON-compatible values (floats travel exactly), unless told otherwise.
            about: what it is, the same on all ranks, for messages.
            pack, unpack: between values and bytes.

        Returns:
            what `work` returned on each rank.

        Raises:
            whatever `work` raises here; RankLost: it raised on another rank, or a rank does not answer.
        """
        if self.size == 1:
            return [work()]
        failure: Exception | None = None
        try:
            mine = b"+" + pack(work())
        except Exception as error:  # told to the others, and raised again below
            failure, mine = error, f"-{type(error).__name__}: {error}".encode()
        payloads = list(self.gather(mine, about))
        if failure is not None:
            raise failure
        for rank, payload in enumerate(payloads):
            if payload[:1] == b"-":
                raise RankLost(f"{about}: rank {rank} failed with {payload[1:].decode(errors='replace')}")
        return [unpack(payload[1:]) for payload in payloads]

    def agree(self, work: Callable[[], dict[str, Any]], about: str, hint: str) -> None:
        """Raise unless `work` returns the same JSON-compatible values on all ranks.

        Raises:
            RanksDiffer: with the first entries in which a rank differs from rank 0. What `share` raises.
        """
        found = self.share(work, about)
        for rank, other in enumerate(found):
            differing = [key for key in {**found[0], **other} if found[0].get(key) != other.get(key)]
            if differing:
                more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
                raise RanksDiffer(
                    f"{about}: ranks 0 and {rank} differ in {', '.join(map(repr, differing[:4]))}{more}. {hint}"
                )

    def _call(self, about: str, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise RankLost(
                f"{about}: rank {self.rank} of {self.size} got no answer from the others ({str(error)[:300]}). A rank "
                "died or raised, or not every rank made this call; the time to wait is that of "
                "init_process_group(timeout=...)."
            ) from error


def pack_tensors(tensors: dict[str, Tensor]) -> bytes:
    """Named tensors as bytes: a JSON header of (name, dtype, shape), then the values."""
    header = json.dumps([[name, str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()]).encode()
    flat = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values())
    return b"".join([len(header).to_bytes(8, "little"), header, *(f.numpy().tobytes() for f in flat)])


def unpack_tensors(payload: bytes) -> dict[str, Tensor]:
    """Inverse of `pack_tensors`, on the CPU."""
    start = 8 + int.from_bytes(payload[:8], "little")
    found = {}
    for name, kind, shape in json.loads(payload[8:start]):
        dtype = getattr(torch, kind)
        tensor = torch.empty(shape, dtype=dtype)
        size = tensor.numel() * tensor.element_size()
        if size:
            values = torch.frombuffer(bytearray(payload[start : start + size]), dtype=dtype)
            tensor.copy_(values.reshape(shape))
        start += size
        found[name] = tensor
    return found
