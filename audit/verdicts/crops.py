"""SSCD of training pictures as training cut them: the index has the whole picture, the model saw its centre crop."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from audit.verdicts.compare import References

if TYPE_CHECKING:
    from pipelines.descriptor import Descriptor


class TrainingCrops:
    """Descriptors of centre crops, computed once a picture and only where training cut something off.

    Args:
        references: the pictures at the generated size.
        descriptor: the index's.
        pool: threads that read pictures.
    """

    def __init__(self, references: References, descriptor: Descriptor, pool: ThreadPoolExecutor) -> None:
        self.references, self.descriptor, self.pool = references, descriptor, pool
        self._vectors: dict[int, NDArray[np.float32]] = {}

    def describe(self, ids: Iterable[int]) -> None:
        """Describe the crops of these pictures, all in one batch; those that cannot be read are left out."""
        wanted = [id for id in dict.fromkeys(ids) if id not in self._vectors]
        self.references.prefetch(wanted, self.pool)
        cut = [id for id in wanted if self.references.cropped.get(id)]
        crops = [(id, pixels) for id in cut if (pixels := self.references.pixels(id)) is not None]
        if crops:
            vectors = self.descriptor([np.ascontiguousarray(pixels) for _, pixels in crops]).numpy()
            self._vectors |= dict(zip((id for id, _ in crops), vectors, strict=True))

    def vector(self, id: int) -> NDArray[np.float32] | None:
        """Unit vector of a described picture's crop, [D]; None where the crop is the whole picture."""
        return self._vectors.get(id)

    def larger(self, vector: NDArray[np.float32], id: int, whole: float) -> float:
        """The larger of an image's cosines to the whole picture and to its training crop.

        Args:
            vector: of the image, [D].
            id: a described picture.
            whole: cosine to the whole picture.
        """
        crop = self._vectors.get(id)
        return whole if crop is None else max(whole, float(vector @ crop))
