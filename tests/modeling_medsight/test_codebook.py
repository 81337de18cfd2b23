"""The region codebook against a brute-force search and hand-made gradients."""

from typing import Any

import pytest
import torch

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightModel
from modeling_medsight.codebook_medsight import RegionCodebook

from .configurations import noise


def make_codebook(seed: int = 0, **overrides: Any) -> RegionCodebook:
    torch.manual_seed(seed)
    return MedSightModel(MedSightConfig.from_preset("tiny", **overrides)).codebook.double().eval()


@pytest.mark.parametrize("seed", range(4))
def test_each_region_gets_the_nearest_code_of_its_images_group(seed: int) -> None:
    codebook = make_codebook(seed)
    regions, groups = noise(3, 5, 16, seed=seed), torch.tensor([2, 0, 1])
    output = codebook(regions, groups)
    for b, group in enumerate(groups.tolist()):
        codes = [code / code.pow(2).sum().sqrt() for code in codebook.codes[group]]
        for n in range(5):
            vector = codebook.to_code(regions[b, n])
            vector = vector / vector.pow(2).sum().sqrt()
            distances = [(vector - code).pow(2).sum().item() for code in codes]
            nearest = distances.index(min(distances))
            assert output.code_indices[b, n] == nearest
            torch.testing.assert_close(output.code_vectors[b, n].double(), codes[nearest], rtol=1e-6, atol=1e-6)
            expected = codebook.from_code(output.code_vectors[b, n].double())
            torch.testing.assert_close(output.reconstructed_regions[b, n], expected)


def test_the_nearest_code_is_not_a_rounded_one_under_autocast() -> None:
    codebook = make_codebook(codes_per_group=12).float()
    with torch.no_grad():  # codes that lie close together
        codebook.codes[:] = codebook.codes[:, :1] + 0.003 * torch.randn(codebook.codes.shape)
    vectors = torch.nn.functional.normalize(codebook.code_table() + 0.001, dim=-1)
    codebook.to_code = torch.nn.Identity()
    expected = codebook(vectors, torch.arange(3)).code_indices
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook(vectors, torch.arange(3)).code_indices, expected)
    assert len(expected.unique()) > 4


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_the_losses_are_their_formulas(weight: float) -> None:
    codebook = make_codebook(commitment_loss_weight=weight).train()
    regions, groups = noise(2, 5, 16), torch.tensor([0, 2])
    output = codebook(regions, groups)
    vectors, nearest = codebook.encode(regions).double(), output.code_vectors.double()
    distance = sum((v - c).pow(2).sum() for v, c in zip(vectors.flatten(0, 1), nearest.flatten(0, 1), strict=True))
    torch.testing.assert_close(output.vq_loss.double(), (1 + weight) * distance / vectors.numel(), rtol=1e-5, atol=0)
    error = (codebook.from_code(nearest) - regions).pow(2).mean()
    torch.testing.assert_close(output.reconstruction_loss.double(), error, rtol=1e-5, atol=0)


def test_codes_are_drawn_to_regions_and_regions_to_codes_with_the_commitment_weight() -> None:
    codebook = make_codebook().train()
    regions, groups = noise(1, 3, 16), torch.tensor([1])
    output = codebook(regions, groups)
    gradients = torch.autograd.grad(output.vq_loss, [codebook.codes, *codebook.to_code.parameters()])
    assert [bool(gradient.any()) for gradient in gradients[0]] == [False, True, False]
    used = output.code_indices[0].unique().tolist()
    assert [bool(gradient.any()) for gradient in gradients[0][1]] == [m in used for m in range(4)]
    assert all(gradient.any() for gradient in gradients[1:])
    silent = make_codebook(commitment_loss_weight=0.0).train()
    silent(regions, groups).vq_loss.backward()
    assert not any(parameter.grad.any() for parameter in silent.to_code.parameters())


def test_the_gradient_passes_straight_through_the_choice_of_a_code() -> None:
    codebook = make_codebook().train()
    regions, groups = noise(1, 3, 16), torch.tensor([1])
    output = codebook(regions, groups)
    through = torch.autograd.grad(output.reconstructed_regions.pow(2).sum(), list(codebook.to_code.parameters()))
    vectors = codebook.encode(regions)
    at_code = output.code_vectors.detach().double().requires_grad_()
    slope = torch.autograd.grad(codebook.from_code(at_code).pow(2).sum(), at_code)[0]
    expected = torch.autograd.grad((vectors * slope).sum(), list(codebook.to_code.parameters()))
    for given, wanted in zip(through, expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for gradient in through)


@pytest.mark.parametrize("groups", [[3], [-1], [0, 1], []])
def test_groups_that_do_not_fit_the_images_are_refused(groups: list[int]) -> None:
    with pytest.raises(ValueError, match="groups"):
        make_codebook()(noise(1, 2, 16), torch.tensor(groups, dtype=torch.long))
