"""The optimizer of small models."""

import copy

import torch
from torch import nn

from medsight.training.optimisation import muon_with_adamw, orthogonalise
from medsight.training.stage import frozen_modules


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.conv = nn.Conv2d(2, 3, 3)
        self.embed_tokens = nn.Embedding(5, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.inner(self.embed_tokens(ids))).square().mean() + self.conv.weight.square().sum()


def trained(model: Toy, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.tensor([0, 1, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()


def make(model: Toy) -> torch.optim.Optimizer:
    return muon_with_adamw(model, 3e-3, 1e-3, 0.01, betas=(0.9, 0.99), eps=0.1)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(shaped))
        assert values.min() > 0.6 and values.max() < 1.3


def test_what_is_frozen_is_kept_out_of_training_with_all_that_is_in_it() -> None:
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    adapter = nn.ModuleDict({"base": nn.Linear(2, 2), "dropout": nn.Dropout(), "low": nn.Linear(2, 2)})
    model = nn.ModuleList([frozen, adapter])
    model.requires_grad_(False)
    adapter["low"].requires_grad_(True)
    assert set(frozen_modules(model)) == {frozen, *frozen, adapter["base"]}


def test_inner_matrices_take_muon_and_tables_and_vectors_adamw() -> None:
    model = Toy()
    optimizer = make(model)
    muon, tables, vectors = optimizer.param_groups
    assert {id(p) for p in muon["params"]} == {id(model.inner.weight), id(model.conv.weight)} and muon["muon"]
    assert [id(p) for p in tables["params"]] == [id(model.embed_tokens.weight)]
    assert {id(p) for p in vectors["params"]} == {id(model.inner.bias), id(model.conv.bias)}
    assert vectors["weight_decay"] == 0 and tables["weight_decay"] == 0.01


def test_its_adamw_part_is_torchs_adamw() -> None:
    model, other = Toy(), Toy()
    trained(model, make(model), 5)
    reference = torch.optim.AdamW([other.embed_tokens.weight], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, eps=0.1)
    expected = copy.deepcopy(other)
    steps = Toy()
    optimizer = make(steps)
    for _ in range(5):  # the same gradients go to both
        steps(torch.tensor([0, 1, 3])).backward()
        other.embed_tokens.weight.grad = steps.embed_tokens.weight.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.embed_tokens.weight, other.embed_tokens.weight)
    assert not torch.equal(other.embed_tokens.weight, expected.embed_tokens.weight)


def test_a_loaded_optimizer_goes_on_as_if_it_had_never_been_saved() -> None:
    model = Toy()
    optimizer = make(model)
    trained(model, optimizer, 3)
    again = copy.deepcopy(model)
    loaded = make(again)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, optimizer, 3)
    trained(again, loaded, 3)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
