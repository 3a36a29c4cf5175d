import torch

from pipeline.mini.muon import Muon, orthogonalize


def test_singular_values_come_close_to_one_and_directions_stay():
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert (orthogonalize(matrices) * (u @ vh)).sum() > 0.95 * 3 * 24 * 0.8


def test_a_fused_matrix_moves_like_its_parts():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(8, 8, generator=generator) for _ in range(3)]
    grads = [torch.randn(8, 8, generator=generator) for _ in range(3)]
    single = [torch.nn.Parameter(part.clone()) for part in parts]
    fused = torch.nn.Parameter(torch.cat(parts))
    fused.grad = torch.cat(grads)
    for param, grad in zip(single, grads, strict=True):
        param.grad = grad
    for optimizer in (Muon(single, lr=0.1), Muon([], [fused], lr=0.1)):
        optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([param.detach() for param in single]))


def test_a_tall_matrix_is_updated_as_its_transpose():
    wide = torch.nn.Parameter(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))
    tall = torch.nn.Parameter(wide.detach().T.clone())
    wide.grad = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    tall.grad = wide.grad.T.clone()
    for param in (wide, tall):
        Muon([param], lr=0.1).step()
    torch.testing.assert_close(tall.detach().T, wide.detach())


def test_it_descends_a_quadratic():
    target = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    param = torch.nn.Parameter(torch.zeros(6, 10))
    optimizer = Muon([param], lr=0.2, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        (param - target).square().sum().backward()
        optimizer.step()
    assert (param - target).square().sum() < 0.2 * target.square().sum()
