"""Incremental PCA (Ross et al. 2008): components of data of any size, seen batch by batch, in bounded memory.

The released encodings were fitted this way; the numbers agree with theirs for the same batches.
"""

import numpy as np

BATCH = 1024  # samples, of the released fit


class IncrementalPCA:
    """The `length` leading components of everything `update` has seen.

    Args:
        length: Components that are kept.

    Attributes:
        components: [length, D] float64, orthonormal rows, the largest entry of each positive.
        mean: [D].
        explained_variance: [length], per component.
        ratio: [length], share of the total variance.
        count: Samples seen.
    """

    def __init__(self, length: int):
        self.length = length
        self.count = 0
        self.components = np.zeros((0, 0))
        self.mean = np.zeros(0)
        self._singular = np.zeros(0)
        self._squares = np.zeros(0)  # [D] sum of squared deviations from the mean

    @property
    def explained_variance(self) -> np.ndarray:
        return self._singular**2 / max(self.count - 1, 1)

    @property
    def ratio(self) -> np.ndarray:
        return self._singular**2 / max(self._squares.sum(), np.finfo(np.float64).tiny)

    def update(self, batch: np.ndarray) -> None:
        """Takes one batch [n, D] into account; the first needs n >= `length`."""
        batch = np.asarray(batch, dtype=np.float64)
        batch_mean = batch.mean(0)
        deviations = batch - batch_mean
        squares = (deviations**2).sum(0)
        total = self.count + len(batch)
        if self.count == 0:
            assert len(batch) >= self.length, "the first batch must hold as many samples as components"
            self.mean, self._squares, stacked = batch_mean, squares, deviations
        else:
            # What the components remember stands for the batches before; one row for the shift of the mean.
            shift = batch_mean - self.mean
            weight = self.count * len(batch) / total
            stacked = np.concatenate((self._singular[:, None] * self.components, deviations, [weight**0.5 * shift]))
            self._squares = self._squares + squares + weight * shift**2
            self.mean = self.mean + shift * len(batch) / total
        self.count = total
        self._singular, self.components = _leading(stacked, self.length)


class Batches:
    """Cuts a stream of rows into batches of `size`, the last one never shorter than `least`.

    Args:
        size: Rows of a batch.
        least: A remainder shorter than this joins the batch before it.
    """

    def __init__(self, size: int, least: int):
        self.size = size
        self.least = least
        self._rows: list[np.ndarray] = []
        self._waiting = 0

    def push(self, rows: np.ndarray) -> list[np.ndarray]:
        """Batches that are certain to be whole after these rows [n, D]."""
        self._rows.append(rows)
        self._waiting += len(rows)
        if self._waiting < self.size + self.least:
            return []
        waiting, done = np.concatenate(self._rows), []
        while len(waiting) >= self.size + self.least:
            done.append(waiting[: self.size])
            waiting = waiting[self.size :]
        self._rows, self._waiting = [waiting], len(waiting)
        return done

    def rest(self) -> list[np.ndarray]:
        """What is left as one last batch, or nothing."""
        waiting = np.concatenate(self._rows) if self._rows else np.zeros((0, 0))
        self._rows, self._waiting = [], 0
        return [waiting] if len(waiting) else []


def _leading(rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest `length` singular values, descending, and their right singular vectors [length, D] of rows [n, D].

    By the eigenvectors of rows^T rows: D is small, and far from the last components nothing is lost by squaring.
    """
    values, vectors = np.linalg.eigh(rows.T @ rows)
    singular = np.sqrt(values[::-1][:length].clip(min=0))
    components = vectors.T[::-1][:length]
    largest = np.abs(components).argmax(1)
    signs = np.sign(components[np.arange(len(components)), largest])
    return singular, components * signs[:, None]
