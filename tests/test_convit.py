# Written from the test cells of nbs/2_position/convit.ipynb by `attnbook export`. Do not edit.
import torch

from attnbook.convit import gpsa_reference, positional_attention, positional_factors, positional_scores
from attnbook.testing import rel_error
from attnbook.testing import device as device_under_test


def example(Y=3, X=5, heads=4, d=8, batch=2, dtype=torch.float64, seed=0):
    "Random q, k, v, pos_weight, gate_logit for a Y x X grid, the same numbers in every type."
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, Y * X, d)] * 3 + [(heads, 3), (heads,)]
    q, k, v, w, gate = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    w = w * torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)
    return [t.to(device_under_test(), dtype) for t in (q, k, v, w, gate)]


def test_reference_against_loops():
    Y, X = 3, 5
    q, k, v, w, gate = example(Y, X, heads=2, batch=1)
    out, g = gpsa_reference(q, k, v, w, gate, (Y, X)), gate.sigmoid()
    for h in range(2):
        for i in range(Y * X):
            places = []
            for j in range(Y * X):
                dx, dy = j % X - i % X, j // X - i // X
                places.append(w[h, 0] * dx + w[h, 1] * dy + w[h, 2] * (dx * dx + dy * dy))
            content = (k[0, h] @ q[0, h, i] / 8**0.5).softmax(0)
            row = (1 - g[h]) * content + g[h] * torch.stack(places).softmax(0)
            assert rel_error(out[0, h, i], row @ v[0, h]) < 1e-12


def test_separable_form_is_the_dense_one():
    for grid in ((3, 5), (1, 7), (7, 1), (4, 4), (1, 1)):
        q, k, v, w, gate = example(*grid)
        dense = positional_scores(w, grid).softmax(-1)
        p_y, p_x = positional_factors(w, grid)
        for h in range(4): assert rel_error(torch.kron(p_y[h], p_x[h]), dense[h]) < 1e-12
        assert rel_error(positional_attention(v, w, grid), torch.einsum("hij,bhjd->bhid", dense, v)) < 1e-12
