from pathlib import Path

import pytest
import torch

from training.conversations import ConversationMaker, load_templates
from training.data import Augmentation, Augmenter, load_samples, sided_groups
from training.evaluate_nano import evaluate
from training.language import LanguageStage, TurnEncoder, train_grounding, train_language_model, train_vision_to_text
from training.optimisation import Optimisation, orthogonalise, train_only
from training.stage_1_perceiver import PerceiverStage, train_perceiver
from training.stage_3a_codebook import CodebookStage, start_code_rows, train_codebook
from training.train import Normalise, load_recipe
from training.views import annotate, see


FOLDER = Path(__file__).resolve().parents[2] / "training"
CODEBOOK = ("model.codebook.", "model.group_classifier.")


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_stage_trains_exactly_its_parameters(records, image_processor, model, processor, chance) -> None:
    generator = torch.Generator().manual_seed(0)
    encoder, normalise = TurnEncoder(processor, model.config), Normalise(image_processor)
    maker = ConversationMaker(load_templates(FOLDER / "templates.yaml"), records, chance)
    samples = load_samples(records, image_processor)
    few = {"steps": 2, "batch_size": 6, "warmup": 1}

    before = snapshot(model)
    train_language_model(model, encoder, [("Is it?", "Yes.")], LanguageStage(**few), generator)
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in changed(model, before))

    before = snapshot(model)
    augmenter = Augmenter(Augmentation(), sided_groups(records), generator)
    embedding = torch.nn.Embedding(model.config.num_mask_classes, model.config.vision_hidden_size)
    train_perceiver(model, embedding, samples, augmenter, normalise, PerceiverStage(**few, matching_share=1.0))
    moved = changed(model, before)
    assert all(name.startswith(("model.vision_tower.", "model.region_perceiver.")) for name in moved)
    assert "model.region_perceiver.region_queries" in moved

    before = snapshot(model)
    views = [[view] for view in see(model, samples, normalise)]
    assert not changed(model, before)
    train_vision_to_text(model, encoder, maker, views, LanguageStage(**few), generator)
    assert {name.rsplit(".", 2)[0] for name in changed(model, before)} == {"model.vision_to_text_projector"}

    before = snapshot(model)
    first = model.config.region_code_start_id
    train_codebook(model, [view for (view,) in views], CodebookStage(**few, revive_every=1), generator)
    rows = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert all(name.startswith(CODEBOOK) for name in changed(model, before) - rows)
    assert torch.equal(model.get_input_embeddings().weight[:first], before["lm_head.weight"][:first])
    core = model.model
    expected = core.vision_to_text_projector(core.codebook.decode(core.codebook.code_table())).flatten(0, 1)
    torch.testing.assert_close(model.lm_head.weight[first : first + len(expected)], expected)
    annotate(model, [view for (view,) in views])

    settings = LanguageStage(**few, weight_decay=0.1)
    for whole in (False, True):
        before = snapshot(model)
        train_grounding("grounding", model, encoder, maker, views, embedding, settings, generator, whole)
        moved = changed(model, before)
        assert not any(
            name.startswith(("model.vision_tower.", "model.region_perceiver.", *CODEBOOK)) for name in moved
        )
        assert ("model.vision_to_text_projector.linear_1.weight" in moved) == whole
        words = torch.equal(model.lm_head.weight[:first], before["lm_head.weight"][:first])
        assert words == (not whole)
        if not whole:
            assert {name for name in moved if "text_to_vision" not in name} == rows

    scores = evaluate(model.eval(), processor, records[:3], batch_size=2)
    assert len(scores["rows"]) == 3 and 0 <= scores["macro"] <= 1


def test_code_rows_start_as_projected_codes_again(model) -> None:
    start_code_rows(model)
    first = model.config.region_code_start_id
    assert torch.isfinite(model.lm_head.weight[first:]).all()


def test_frozen_batch_statistics_stay(model) -> None:
    train_only(model, ("model.codebook.",))
    assert not any(module.training for module in model.model.vision_tower.modules())
    with pytest.raises(ValueError, match="nothing_of_this_name"):
        train_only(model, ("nothing_of_this_name",))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(shaped))
        assert values.min() > 0.6 and values.max() < 1.3


def test_a_loss_that_is_not_finite_stops_the_stage(model) -> None:
    optimisation = Optimisation("a stage", train_only(model, ("model.codebook.",)), 5, 1e-3)
    with pytest.raises(FloatingPointError, match="a stage.*step 0"):
        optimisation.step(model.model.codebook.codes.sum() * float("nan"))


def test_a_recipe_refuses_keys_it_does_not_know(tmp_path: Path) -> None:
    recipe = load_recipe(FOLDER / "nano.yaml", ["seed=3", "stages.perceiver.steps=7"])
    assert recipe["seed"] == 3 and recipe["stages"]["perceiver"]["steps"] == 7
    with pytest.raises(ValueError, match="sead"):
        load_recipe(FOLDER / "nano.yaml", ["sead=3"])
    (tmp_path / "r.yaml").write_text((FOLDER / "nano.yaml").read_text(encoding="utf-8") + "\nextra: 1\n", "utf-8")
    with pytest.raises(ValueError, match="extra"):
        load_recipe(tmp_path / "r.yaml", [])
