"""A GPU that is not there: its tensors say that they lie on it, hold their numbers on the CPU, and
meet none that lies elsewhere.

What must not happen on a GPU, and goes unseen on a CPU, is an error here: a product of tensors on
two devices, a result left on the host, numbers read as an array. What a GPU computes, and how fast,
is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# what takes tensors of both devices
BOTH = ("copy_", "index", "index_put_")


class Elsewhere(Tensor):
    """A tensor on the GPU. To torch's own code, which has no GPU to ask, it is one on the meta
    device.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    device = property(lambda self: GPU)
    is_meta = property(lambda self: False)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("numbers on a GPU are no array")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        kwargs.pop("device", None)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name not in BOTH:
            _meet(name, tensors)
        # what is changed in place stays what it was
        known = {id(x.inner): x for x in tensors if isinstance(x, Elsewhere)}
        found = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name == "copy_" and not isinstance(args[0], Elsewhere):
            return args[0]
        return tree_map(
            lambda x: known.get(id(x), Elsewhere(x)) if isinstance(x, Tensor) else x, found
        )


class Pretended(TorchFunctionMode):
    """While it lasts, this thread has a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        here = bool(args) and isinstance(args[0], Elsewhere)
        if name == "to" and isinstance(args[0], Tensor):
            return _moved(args[0], args[1:], kwargs)
        if name == "cpu" and here:
            return args[0].inner.clone()
        if name == "tolist" and here:
            return args[0].inner.tolist()
        if name == "new_tensor" and here:
            return Elsewhere(torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)))
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            del kwargs["device"]
            return Elsewhere(func(*tree_map(bare, args), **tree_map(bare, kwargs)))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("where", "scaled_dot_product_attention", "embedding_bag") and any(
            isinstance(x, Elsewhere) for x in tensors
        ):
            # inside, torch makes tensors on the device that it takes them to be on
            _meet(name, tensors)
            return Elsewhere(func(*tree_map(bare, args), **tree_map(bare, kwargs)))
        return func(*args, **kwargs)


def bare(x: Any) -> Any:
    """The numbers of a tensor on the GPU; anything else as it is."""
    return x.inner if isinstance(x, Elsewhere) else x


def _meet(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise where tensors of two devices would; one number may lie anywhere."""
    for x in tensors:
        if x.ndim and not isinstance(x, Elsewhere):
            raise RuntimeError(
                f"{name}: expected all tensors to be on one device, but found {x.device} beside "
                f"{GPU}"
            )


def _moved(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    places = [
        a.device if isinstance(a, Tensor) else a
        for a in (*args, kwargs.pop("device", None))
        if not _is_plain(a)
    ]
    kinds = [
        a.dtype if isinstance(a, Tensor) else a
        for a in args
        if _is_plain(a) or isinstance(a, Tensor)
    ]
    kwargs.pop("non_blocking", None)
    inner = bare(x)
    changed = inner.to(*kinds, **kwargs) if kinds or kwargs else inner
    place = torch.device(places[0]) if places else x.device
    if place == x.device and changed is inner:
        return x
    changed = changed.clone() if changed is inner else changed
    return Elsewhere(changed) if place.type == "cuda" else changed.to(place)


def _is_plain(x: Any) -> bool:
    return x is None or isinstance(x, torch.dtype | bool | torch.memory_format)
