import numpy as np
import pytest

from meinst.pca import Batches, IncrementalPCA


def _fit(data, length, sizes):
    pca, start = IncrementalPCA(length), 0
    for size in sizes:
        pca.update(data[start : start + size])
        start += size
    assert start == len(data)
    return pca


def test_points_on_a_line_by_hand():
    pca = _fit(np.array([[-1.0, -1.0], [1.0, 1.0], [3.0, 3.0]]), 1, [3])
    assert pca.mean.tolist() == [1.0, 1.0]
    np.testing.assert_allclose(pca.components, [[0.5**0.5, 0.5**0.5]])
    np.testing.assert_allclose(pca.explained_variance, [8.0])  # 16 / (3 - 1)
    np.testing.assert_allclose(pca.ratio, [1.0])


def test_with_all_components_batches_give_the_exact_decomposition():
    data = np.random.default_rng(0).normal(size=(90, 6)) * [9, 7, 5, 3, 2, 1] + 4
    pca = _fit(data, 6, [30, 7, 53])
    centred = data - data.mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(pca.mean, data.mean(0))
    np.testing.assert_allclose(pca.explained_variance, singular**2 / 89, rtol=1e-9)
    np.testing.assert_allclose(np.abs((pca.components * rows).sum(1)), 1, rtol=1e-9)
    np.testing.assert_allclose(pca.ratio.sum(), 1)


def test_leading_components_of_batches_are_close_to_the_exact_ones():
    random = np.random.default_rng(1)
    data = random.normal(size=(4000, 3)) @ random.normal(size=(3, 50)) * 5 + random.normal(size=(4000, 50)) * 0.1
    pca = _fit(data, 3, [1000] * 4)
    rows = np.linalg.svd(data - data.mean(0), full_matrices=False)[2][:3]
    assert np.linalg.svd(pca.components @ rows.T)[1].min() > 0.9999  # the same space
    np.testing.assert_allclose(pca.ratio.sum(), 1, atol=1e-3)


def test_components_are_orthonormal_and_their_largest_entry_is_positive():
    pca = _fit(np.random.default_rng(2).normal(size=(60, 8)), 4, [20, 40])
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(4), atol=1e-12)
    largest = np.abs(pca.components).argmax(1)
    assert (pca.components[np.arange(4), largest] > 0).all()


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (3, [3]), (10, [10]), (13, [13]), (14, [10, 4]), (20, [10, 10]), (33, [10, 10, 13])]
)
def test_a_short_remainder_joins_the_batch_before_it(count, sizes):
    batches, cut = Batches(10, 4), []
    for row in np.arange(float(count))[:, None]:
        cut += batches.push(row[None])
    cut += batches.rest()
    assert [len(part) for part in cut] == sizes
    assert [value for part in cut for value in part[:, 0]] == list(range(count))


def test_a_large_push_is_cut_into_batches_at_once():
    batches = Batches(10, 4)
    assert [len(part) for part in batches.push(np.zeros((37, 1)))] == [10, 10, 10]
    assert [len(part) for part in batches.rest()] == [7]
