"""The nearest distribution, against conditions that only it fulfils."""

import torch

from pumice.evaluate.attacks.simplex import project


def test_the_result_fulfils_the_conditions_of_the_nearest_point():
    """p = max(x - theta, 0) of sum 1: the Karush-Kuhn-Tucker conditions, which are sufficient."""
    x = torch.randn(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    p = project(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (p >= 0).all()
    inside = p > 0
    assert not inside.all()
    theta = torch.where(inside, x - p, torch.inf).amin(-1)
    torch.testing.assert_close(torch.where(inside, x - p, theta[:, None]), theta[:, None].expand(50, 9))
    assert (x <= theta[:, None] + 1e-12)[~inside].all()


def test_by_hand():
    x = torch.tensor([[0.2, 0.3, 0.5], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.8, -3.0]])
    third = 1 / 3
    expected = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0, 0], [third] * 3, [0.6, 0.4, 0]])
    torch.testing.assert_close(project(x), expected)
    torch.testing.assert_close(project(x + 100), expected, rtol=0, atol=1e-5)


def test_a_whole_vocabulary_in_single_precision():
    x = torch.randn(2, 3, 49408, generator=torch.Generator().manual_seed(0))
    p = project(x)
    assert p.shape == x.shape and p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(p.double(), project(x.double()), rtol=0, atol=1e-6)
    torch.testing.assert_close(project(p), p, rtol=0, atol=1e-7)
    torch.testing.assert_close(project(x[1, 2]), p[1, 2])
