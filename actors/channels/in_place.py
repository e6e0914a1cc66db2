"""One copy of the weights for trainer and engines that take turns.

The trainer's parameters become views of a shared memory segment that engines map. A publish then
copies nothing: it reads the weights once to tell their checksums. While the trainer changes them no
engine may compute, which is why engines sleep from the end of generation to the next publish.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.actors.allocator import release_freed_memory
from loopwright.actors.shared_memory import SharedWeights, unlink_stale
from loopwright.actors.weights import ChannelLost, WeightManifest


def adopt(backend: Any, names: Mapping[str, str], views: Mapping[str, Tensor]) -> bool:
    """Let parameters of a trainer backend be `views` from now on, which hold their values already.

    `names`: published name -> parameter. False, and nothing is changed, where the model is spread
    over ranks, lies on another device or in another dtype than the views, or has other parameters.
    """
    if backend.ranks.size > 1:
        return False
    parameters = dict(backend.model.named_parameters(remove_duplicate=False))
    if any(names[name] not in parameters for name in views):  # merged for the publish
        return False
    pairs = [(parameters[names[name]], view) for name, view in views.items()]
    if any(mine.device != view.device or mine.dtype != view.dtype for mine, view in pairs):
        return False
    for mine, view in pairs:
        mine.data = view
    release_freed_memory()  # the parameters' own, which the trainer's allocator would keep
    return True


class InPlaceChannel:
    """Full weights that engines read where the trainer trains them."""

    def __init__(self, run_name: str, dtype: torch.dtype | None = None) -> None:
        """Nothing is allocated before the first publish. In another `dtype` than the trainer's
        parameters it is a copy that engines map in place."""
        self._dtype = dtype
        self._run_name = run_name
        self._source: Any = None
        self._shared: SharedWeights | None = None
        self._last: WeightManifest | None = None
        self._adopted = False

    def publish(self, version: int, source: Any, members: tuple[str, ...]) -> WeightManifest:
        """As `WeightChannel.publish`, of a trainer backend; all engines are asleep."""
        if source is not self._source or self._shared is None:
            if self._shared is not None:
                self._shared.close()
            shapes = source.published_shapes()
            self._shared = SharedWeights.create(
                self._run_name, shapes, in_place=True, dtype=self._dtype
            )
            self._source = source
            self._shared.write_buckets(version, source.published_buckets())
            self._adopted = adopt(source, {name: name for name in shapes}, self._shared.views())
            unlink_stale(self._run_name)
        if not self._adopted:  # one copy more, but engines still map it in place
            self._last = self._shared.overwrite(version, source.published_buckets())
            return self._last
        self._last = self._shared.published(version)
        return self._last

    def resend(self, version: int, members: tuple[str, ...]) -> WeightManifest:
        """The last manifest, as long as no step was taken since."""
        if self._last is None or self._last.version != version:
            raise ChannelLost(f"this trainer has not published version {version}")
        return self._last

    def close(self) -> None:
        """Unlink the segment; the trainer's parameters and engines keep what they map."""
        if self._shared is not None:
            self._shared.close()
            self._shared = self._source = None
        unlink_stale(self._run_name)
