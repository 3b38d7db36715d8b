"""The samples that calibrate: the first of a dataset, each forward in a session of QPP's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import nncf
from torch import Tensor

from dqa_plugins.qpp import Forwards
from dqa_plugins.qpp.session import end

logger = logging.getLogger(__name__)


class FirstSamples:
    """The first samples of a dataset, whatever its batch size: the last batch is cut.

    Args:
        dataset: of NNCF; items are tensors, or tuples, lists or dicts of them.
        limit: number of samples, None for all.
        parameters: of the model's forward, by whose order the inputs are counted.
    """

    def __init__(self, dataset: nncf.Dataset, limit: int | None, parameters: Iterable[str] = ()) -> None:
        self.dataset, self.limit, self.parameters = dataset, limit, tuple(parameters)
        self.forwards: Forwards | None = None  # QPP: of the model
        self.inputs = 0  # tensors in an item

    def __iter__(self) -> Iterator[Any]:
        for item in map(self._in_order, self._items()):
            tensors = tuple(tensors_of(item))
            self.inputs = len(tensors)
            if self.forwards is None:
                yield item
                continue
            yield from self._run(item, tensors)

    def _in_order(self, item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        return {name: item[name] for name in sorted(item, key=self._position)}

    def _position(self, name: str) -> int:
        return self.parameters.index(name) if name in self.parameters else len(self.parameters)

    def _run(self, item: Any, tensors: tuple[Tensor, ...]) -> Iterator[Any]:
        """The item in a session, and what augmentation makes of it in another."""
        if self.forwards is None:
            return
        session = self.forwards.start(tensors)
        yield item
        end(session)
        changed = self.forwards.changed(tensors)
        if changed is not None:
            session = self.forwards.start(changed, augmented=True)
            yield _replaced(item, iter(changed))
            end(session)

    def _items(self) -> Iterator[Any]:
        if self.limit is None:
            yield from self.dataset.get_inference_data()
            return
        left = self.limit
        for item in self.dataset.get_inference_data():
            size = batch_size(item)
            yield item if size <= left else _cut(item, size, left)
            left -= size
            if left <= 0:
                return
        if left > 0:
            logger.warning("num_init_samples=%s, but the dataset holds %s samples", self.limit, self.limit - left)


def _replaced(item: Any, tensors: Iterator[Tensor]) -> Any:
    """An item with other tensors, in the order of `tensors_of`."""
    if isinstance(item, Tensor):
        return next(tensors)
    if isinstance(item, dict):
        return {key: _replaced(value, tensors) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)([_replaced(value, tensors) for value in item])
    return item


def tensors_of(item: Any) -> Iterator[Tensor]:
    """The tensors of a dataset item, in order."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict | list | tuple):
        for value in item.values() if isinstance(item, dict) else item:
            yield from tensors_of(value)


def batch_size(item: Any) -> int:
    """Samples in a dataset item: the first dimension of its first tensor; 1 without one."""
    return next((len(tensor) for tensor in tensors_of(item) if tensor.ndim), 1)


def _cut(item: Any, size: int, left: int) -> Any:
    if isinstance(item, Tensor):
        return item[:left] if item.ndim and len(item) == size else item
    if isinstance(item, dict):
        return {key: _cut(value, size, left) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)([_cut(value, size, left) for value in item])
    return item
